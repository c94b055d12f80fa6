"""benchmarks/quality.py with a tiny model on the CPU: the lab is the library, runs side by side are runs alone."""

import json
import multiprocessing
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from processes import ROOT
from testing_utils import TINY_MODELS, perturb
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from rlora_trl import RLoraConfig
from rlora_trl.evaluation.metrics import find_number
from rlora_trl.evaluation.scoring import score_tasks


sys.path.insert(0, str(ROOT / "benchmarks"))

import quality
import quality_words
from initial_delta import shares
from quality_data import SUITES, TRANSFER_SUITES, MicroBatch, Tokens, training_steps
from quality_lab import LabLinear, LabOptions, LabState, add_lab
from quality_methods import adapt
from quality_plans import METHODS as PLAN_METHODS
from quality_plans import PLANS
from quality_rows import all_rows
from quality_runs import LAB, METHODS, Run, groups_of, with_model
from quality_train import Adapted, FlatAdamW, TrainingOptions, score, train
from quality_worker import CAUSAL, Trainer, WorkerSettings, generated, run_facts


TARGETS = ["gate_proj", "up_proj", "down_proj"]
SMALL = {"train_rows": 10, "epochs": 2, "test_rows": 8, "batch": 8}


@pytest.fixture(scope="module", autouse=True)
def verbosity():
    """Workers are processes of their own, and silence transformers; here they share one with other tests."""
    before = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Suites of learnable rows, with options of one token and of two."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    for suite, tasks in {**SUITES, **TRANSFER_SUITES}.items():
        for number, task in enumerate(tasks):
            (folder / suite / task).mkdir(parents=True)
            for split, count in (("train", 24), ("test", 12))[suite in TRANSFER_SUITES :]:
                rows = [row(draw, long=number % 2 == 1) for _ in range(count)]
                if suite == "words":
                    rows = [{**one, "options": [], "answers": one["options"][:2]} for one in rows]
                if suite == "gsm8k":
                    rows = [{**one, "options": [], "completion": f" w{i % 2}"} for i, one in enumerate(rows)]
                text = "".join(json.dumps(one) + "\n" for one in rows)
                (folder / suite / task / f"{split}.jsonl").write_text(text)
    return folder


def row(draw, long):
    words = [f"w{draw.randrange(20)}" for _ in range(draw.randrange(2, 7))]
    options = [" red blue", " red", " green blue"] if long else [" red", " blue", " green"]
    return {
        "prompt": f"{' '.join(words)} Answer:",
        "input": " ".join(words),
        "completion": options[int(words[-1][1:]) % 3],
        "options": options,
    }


@pytest.fixture(scope="module")
def trainer(model_folders, data):
    return Trainer(WorkerSettings(Path(model_folders["llama"]), data, "cpu", dtype="float32"))


# The lab


LIBRARY = {
    "R-LoRA": ({}, {}),
    "an A for each head": ({"share_a": False}, {"share_a": False}),
    "ranks as heads": ({"share_a": False, "r": 1, "heads": 8}, {"share_a": False, "r": 1, "num_heads": 8}),
    "uniform": ({"gate": "uniform"}, {"router": "uniform"}),
    "zero A": ({"init": "zero_a"}, {"init_weights": "zero_a"}),
    "zero B, alpha/r": ({"init": "zero_b", "scaling": "alpha/r"}, {"init_weights": "zero_b", "use_rslora": False}),
    "top-k": ({"gate": "top_k", "top_k": 2}, {"router": "top_k", "router_top_k": 2, "router_init": "kaiming_uniform"}),
    "by task": ({"gate": "task"}, {"router": "task", "tasks": ["a", "b"]}),
}


def copied(lab, adapter):
    """Give an adapter of the library the values of run 0 of a lab layer."""
    with torch.no_grad():
        adapter.A.copy_(lab.A[0, 0] if adapter.share_a else lab.A[0])
        adapter.B.copy_(lab.B[0].transpose(1, 2))
        if adapter.router is not None:
            adapter.router.copy_(lab.router[0])


@pytest.mark.parametrize("name", LIBRARY)
def test_lab_is_the_library(name):
    """Outputs and gradients, from the same anchor, after both have moved away from it."""
    lab_settings, settings = LIBRARY[name]
    ids, tasks = torch.randint(5, 60, (4, 6)), torch.tensor([0, 1, 1, 0])
    base = TINY_MODELS["llama"]().double()
    state = base.state_dict()
    options = LabOptions(**lab_settings)
    lab, shared = add_lab(base, [options], [3], 2)
    lab.double()
    library = TINY_MODELS["llama"]().double()
    library.load_state_dict(state)
    library = get_peft_model(library, RLoraConfig(target_modules=TARGETS, head_dropout=0.0, **settings)).double()
    layers = [
        (lab.get_submodule(path.removeprefix("base_model.model.")), module.rlora_adapters["default"])
        for path, module in library.named_modules()
        if hasattr(module, "rlora_adapters")
    ]
    for layer, adapter in layers:
        copied(layer, adapter)
        adapter.reset_anchor()

    perturb(lab)
    for layer, adapter in layers:
        copied(layer, adapter)
    shared.tasks = tasks
    context = {"task_ids": tasks} if options.gate == "task" else {}
    outputs = lab(input_ids=ids).logits, library(input_ids=ids, **context).logits
    assert (outputs[0] - base_logits(state, ids)).abs().max() > 1e-3
    assert_same(*outputs)

    upstream = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(upstream)
    for layer, adapter in layers:
        A = layer.A.grad[0, 0] if adapter.share_a else layer.A.grad[0]
        assert_same(A, adapter.A.grad)
        assert_same(layer.B.grad[0].transpose(1, 2), adapter.B.grad)
        if adapter.router is not None:
            assert_same(layer.router.grad[0], adapter.router.grad)


def assert_same(a, b):
    """But for the norms of the model, which compute in float32."""
    assert (a - b).norm() <= 1e-5 * b.norm()


def base_logits(state, ids):
    model = TINY_MODELS["llama"]().double()
    model.load_state_dict(state)
    return model(input_ids=ids).logits


def test_lab_lora_is_lora():
    torch.manual_seed(0)
    base = TINY_MODELS["llama"]()
    lora = get_peft_model(base, LoraConfig(r=4, use_rslora=True, lora_alpha=32, target_modules=TARGETS))
    torch.manual_seed(0)
    lab, _ = add_lab(TINY_MODELS["llama"](), [LabOptions(**{**LAB["lab_lora"], "r": 4})], [0], 1)
    perturb(lab)
    with torch.no_grad():
        for path, layer in lab.named_modules():
            if isinstance(layer, LabLinear):
                other = lora.get_submodule(f"base_model.model.{path}")
                other.lora_A["default"].weight.copy_(layer.A[0, 0])
                other.lora_B["default"].weight.copy_(layer.B[0, 0].T)
    ids = torch.randint(5, 60, (4, 6))
    assert_same(lab(input_ids=ids).logits, lora(input_ids=ids).logits)


@pytest.mark.parametrize("init", ["rlora", "orthogonal", "mirrored", "zero_a", "zero_b"])
@pytest.mark.parametrize(
    "gate", ["softmax", "competing", "sigmoid", "uniform", "sum", "task", "task_sigmoid", "task_shift"]
)
@pytest.mark.parametrize("share_a", [True, False])
def test_first_delta_is_zero(init, gate, share_a):
    torch.manual_seed(0)
    base, ids = TINY_MODELS["llama"](), torch.randint(5, 60, (4, 6))
    before = base(input_ids=ids).logits
    lab, state = add_lab(base, [LabOptions(init=init, gate=gate, share_a=share_a)], [0], 2)
    state.tasks = torch.tensor([0, 1, 0, 1])
    torch.testing.assert_close(lab(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"gate": "sigmoid", "share_a": False}, {"init": "orthogonal", "heads": 2}])
def test_share_sets_the_size_of_the_first_delta(settings):
    """Of weights of any size."""
    ratios = []
    for factor in (1.0, 7.0):
        base = torch.nn.Sequential(torch.nn.Linear(96, 256, bias=False))
        base[0].weight.data.mul_(factor)
        lab, _ = add_lab(base, [LabOptions(targets=("0",), share=0.05, **settings)], [0], 2)
        layer = lab[0]
        delta = layer.factors[0, 0] * layer.first_gate * layer.B[0].mT @ layer.A[0]  # of each head
        ratios.append((delta.sum(0).norm() / layer.base_layer.weight.norm()).item())
    assert ratios == pytest.approx([0.05, 0.05], rel=0.25)


def test_the_share_of_the_initial_delta():
    """Beside weights ten times as large it is a tenth."""
    found = []
    for factor in (1.0, 10.0):
        torch.manual_seed(0)
        model = TINY_MODELS["llama"]()
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.data.mul_(factor)
        torch.manual_seed(1)
        found.append(shares(get_peft_model(model, RLoraConfig(target_modules=list(TARGETS), head_dropout=0.2))))
    assert set(found[0]) == {"gate_proj", "up_proj", "down_proj"} and found[0]["gate_proj"] == found[1]["gate_proj"]
    assert found[1]["up_proj"] == pytest.approx(found[0]["up_proj"] / 10) and found[1]["up_proj"] > 0


def test_a_shift_by_task_goes_through_the_heads():
    """y = W x + s sum_i B_i (g_i A_i x + c_i), with c by task in units of 0.1."""
    options = LabOptions(r=2, heads=3, share_a=False, gate="task_shift", init="zero_a", scaling="alpha/sqrt(rN)")
    linear, state = torch.nn.Linear(8, 6, bias=False), LabState(tasks=torch.tensor([1, 0]))
    layer = LabLinear(linear, "down_proj", [options], state, 2, [torch.Generator().manual_seed(0)])
    with torch.no_grad():
        layer.A.normal_()
        layer.router.normal_()
    x = torch.randn(2, 5, 8)
    factor = 32.0 / 6**0.5
    for row, task in enumerate(state.tasks.tolist()):
        gates = 2 * torch.sigmoid(layer.router[0, task, :3])
        shift = 0.1 * layer.router[0, task, 3:].view(3, 2)
        inner = torch.einsum("td,nrd->tnr", x[row], layer.A[0]) * gates[:, None] + shift
        expected = linear(x[row]) + factor * torch.einsum("tnr,nro->to", inner, layer.B[0])
        torch.testing.assert_close(layer(x)[row], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("position", ["head", "input"])
def test_dropout_has_its_own_masks(position):
    options = LabOptions(r=2, heads=4, gate="sum", init="zero_a", anchor=False, dropout=0.5, position=position)
    linear = torch.nn.Linear(64, 32, bias=False)
    layer = LabLinear(linear, "down_proj", [options], LabState(), 0, [torch.Generator().manual_seed(0)]).train()
    with torch.no_grad():
        layer.A.fill_(1.0)
        layer.B.zero_()
        for head in range(4):  # each head writes to outputs of its own
            layer.B[0, head, :, 8 * head : 8 * head + 8] = 1.0
    x = torch.ones(500, 1, 64)
    heads = (layer(x) - linear(x)).view(500, 4, 8)[..., 0]
    mean = heads.mean().item()
    layer.eval()
    assert mean == pytest.approx((layer(x) - linear(x)).mean().item(), rel=0.1)
    same = (heads == heads[:, :1]).all(1).float().mean()
    assert same == 1.0 if position == "input" else same < 0.2
    layer.train().state.masks = False
    assert (layer(x) - linear(x)).std() < 1e-3


# Training


def small(method, **changes):
    return Run(method, **{**SMALL, **changes})


def without_clock(rows):
    return [{name: value for name, value in row.items() if name not in ("seconds", "side_by_side")} for row in rows]


def test_runs_side_by_side_are_runs_alone(trainer):
    """Of several seeds, rates and settings; micro-batches make no difference either."""
    settings = [
        {"seed": 0},
        {"seed": 1, "learning_rate": 5e-3},
        {"seed": 1, "options": {"b_ratio": 4.0, "weight_decay": 0.1, "decay_to": "init", "ema": 0.9}},
        {"seed": 2, "options": {"warmup": 0.5, "gamma": 16.0, "temperature": 0.5, "clip": 0.1}},
    ]
    runs = [small("lab_rlora", **{**one, "options": {"dropout": 0.0, **one.get("options", {})}}) for one in settings]
    assert [len(group) for group in groups_of(runs, 8)] == [4]
    together = trainer.rows(runs)
    assert len({tuple(row["losses"]) for row in together}) == 4
    for run, row in zip(runs, together, strict=True):
        (alone,) = trainer.rows([run])
        assert row["losses"] == pytest.approx(alone["losses"], abs=2e-3)
        assert row["mean_accuracy"] == pytest.approx(alone["mean_accuracy"], abs=4)
        assert row["losses"][-1] < row["losses"][0] and row["key"] == run.key


def test_micro_batches_change_nothing(trainer, monkeypatch):
    run = small("lab_lora")
    (whole,) = trainer.rows([run])
    monkeypatch.setattr(
        trainer, "settings", trainer.settings.__class__(**{**vars(trainer.settings), "train_tokens": 20})
    )
    (parts,) = trainer.rows([run])
    assert parts["losses"] == pytest.approx(whole["losses"], abs=1e-3)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "lab"])
def test_each_method_trains_and_leaves_the_base(trainer, method):
    before = {name: tensor.clone() for name, tensor in trainer.base.state_dict().items()}
    (row,) = trainer.rows([small(method)])
    assert "error" not in row, row
    assert list(trainer.base.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.base.state_dict().items())
    if method == "base":
        assert row["trainable"] == 0 and row["steps"] == 0
    else:
        assert row["steps"] == 16 and row["losses"][-1] < row["losses"][0]
        (faster,) = trainer.rows([small(method, options={"b_ratio": 0.0, "a_ratio": 0.0, "router_rate": 0.0})])
        assert faster["losses"][-1] > row["losses"][-1]


def test_a_changed_base_is_loaded_again(trainer):
    """PiSSA takes what it adapts out of the weights."""
    before = {name: tensor.clone() for name, tensor in trainer.base.state_dict().items()}
    (row,) = trainer.rows([small("lora", options={"init_lora_weights": "pissa"})])
    assert "changed the weights of the base" in row["error"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.base.state_dict().items())


def test_optimizer_is_adamw():
    """With a decay, and a gradient that is clipped for one run and not for the other."""
    torch.manual_seed(0)
    values, options = torch.randn(2, 3, 4), TrainingOptions(weight_decay=0.1, warmup=0.3)
    stacked = torch.nn.Parameter(values.clone())
    single = [torch.nn.Parameter(value.clone()) for value in values]
    flat = FlatAdamW(adapted(stacked, 2), [options] * 2, [1e-2, 3e-2], 10)
    others = [torch.optim.AdamW([p], lr=1.0, weight_decay=0.1) for p in single]
    for step in range(10):
        gradient = torch.randn(2, 3, 4) * torch.tensor([0.01, 10.0])[:, None, None]
        stacked.grad.add_(gradient)
        flat.step()
        for k, (parameter, optimizer) in enumerate(zip(single, others, strict=True)):
            optimizer.param_groups[0]["lr"] = (1e-2, 3e-2)[k] * options.factor(step, 10)
            parameter.grad = gradient[k].clone()
            torch.nn.utils.clip_grad_norm_([parameter], 1.0)
            optimizer.step()
        for k in range(2):
            torch.testing.assert_close(stacked[k], single[k], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [label for label, one in PLAN_METHODS.items() if one.method in LAB])
def test_nothing_waits_for_the_device(name):
    """On a device without values each wait fails, and so does each tensor that is elsewhere."""
    one = PLAN_METHODS[name]
    runs = [Run(one.method, options=one.options, seed=seed) for seed in (0, 1)]
    with torch.device("meta"):
        base = TINY_MODELS["llama"]().to(torch.bfloat16).eval()
    base.set_attn_implementation(CAUSAL)
    model = adapt(base, runs, ["a", "b"])
    rows = [Tokens([5, 6, 7], 1, [8, 1], 0), Tokens([5, 6], 1, [8], 1)]
    (steps,) = training_steps([[rows]] * 2, 10_000)
    (batch,) = steps
    steps = [[MicroBatch(*(tensor.to("meta") for tensor in vars(batch).values()))]] * 4
    losses = train(model, steps, [run.training() for run in runs], [1e-3, 2e-3])
    assert losses.shape == (4, 2)


def adapted(parameter, runs):
    return Adapted(torch.nn.Module(), None, runs, [("A", parameter)], stacked=True)


def test_decay_towards_the_initial_values_and_averages():
    torch.manual_seed(0)
    start = torch.randn(2, 3, 4)
    parameter = torch.nn.Parameter(start.clone())
    options = [TrainingOptions(weight_decay=1.0, decay_to=to, ema=0.5, warmup=0.0) for to in ("init", "zero")]
    flat = FlatAdamW(adapted(parameter, 2), options, [0.1, 0.1], 20)
    average = start.clone()
    for step in range(20):
        flat.step()  # without a gradient
        average = torch.lerp(average, parameter.detach(), max(0.5, 1 / (step + 2)))
    assert torch.equal(parameter[0], start[0]) and parameter[1].norm() < 0.5 * start[1].norm()
    flat.use_average()
    torch.testing.assert_close(parameter.detach(), average)


def test_preconditioned_gradients_do_not_depend_on_the_factorization():
    """A scaled by M and B by its inverse give the same first change of the product."""
    torch.manual_seed(0)
    A, B, upstream = torch.randn(3, 8), torch.randn(3, 5), torch.randn(5, 8)
    M = torch.randn(3, 3)
    changes = []
    for mix in (torch.eye(3), M):
        a, b = mix @ A, torch.linalg.inv(mix).T @ B
        parameters = [("A", torch.nn.Parameter(a[None, None])), ("B", torch.nn.Parameter(b[None, None]))]
        holder = Adapted(torch.nn.Module(), None, 1, parameters, stacked=True)
        flat = FlatAdamW(holder, [TrainingOptions(precondition=1e-9)], [0.1], 1)
        ((parameters[0][1][0, 0].T @ parameters[1][1][0, 0]) * upstream.T).sum().backward()
        flat._precondition()
        dA, dB = parameters[0][1].grad[0, 0], parameters[1][1].grad[0, 0]
        changes.append(dB.T @ a + b.T @ dA)
    torch.testing.assert_close(*changes, rtol=1e-3, atol=1e-3)


def test_scores_are_the_package_s(trainer, data):
    """Options of several tokens, some of which are the beginning of another."""
    (row,) = trainer.rows([small("base")])
    tasks = trainer.tasks("multitask", 8)
    scores = score_tasks(trainer.base, trainer.tokenizer, tasks.test)
    assert {task: score.correct for task, score in scores.items()} == {
        task: int(bits, 16).bit_count() for task, bits in row["right"].items()
    }
    assert row["scored_rows"] == dict.fromkeys(tasks.names, 8)
    assert sum(len(members) for members in tasks.candidates().members) > len(tasks.candidates().inputs)


@pytest.mark.parametrize("prompt", ["input", "name"])
def test_answers_are_those_of_greedy_decoding(trainer, prompt):
    """A row without options is right if what the model would write up to the end is one of its answers."""
    adapter = Run("lab_lora", "words", learning_rate=0.1, prompt=prompt, **{**SMALL, "epochs": 30, "train_rows": 4})
    tasks = trainer.tasks("words", 8, prompt)
    adapted, expected = adapt(trainer.base, [adapter], tasks.names), {}
    batches = training_steps([tasks.batches(4, 30, 8, 0)], 10_000)
    train(adapted, batches, [adapter.training()], [0.1])
    candidates = tasks.candidates()
    scores, misses = score(adapted, list(candidates.batches(1, 500, 500)), candidates.count)
    found = candidates.correct(scores[0].numpy(), misses[0].numpy())
    for number, task in enumerate(tasks.names):
        expected[task] = []
        for one in tasks.test[task]:
            text = f"Input: {one['input']}\nAnswer:"
            text = text if prompt == "input" else f"Task: {task}\n{text}"
            written = greedy(adapted, trainer.tokenizer(text)["input_ids"], number, trainer.tokenizer.eos_token_id)
            expected[task].append(any(written == trainer.tokenizer(a)["input_ids"] for a in one["answers"]))
    assert found == expected
    rights = [right for rows in found.values() for right in rows]
    assert 0 < sum(rights) < len(rights)


@torch.no_grad()
def greedy(adapted, ids, task, end, most=6):
    """The tokens that a model writes before the end, or the first `most`."""
    begin = len(ids)
    while len(ids) - begin < most:
        zero = torch.zeros(1, dtype=torch.int64)
        batch = MicroBatch(torch.tensor([ids]), zero + task, zero + len(ids) - 1, zero, zero.float(), zero)
        token = int(adapted.logits(batch).argmax())
        if token == end:
            return ids[begin:]
        ids = [*ids, token]
    return ids[begin:]


@pytest.mark.parametrize("method", ["lab_lora", "rlora"])
def test_generated_answers(trainer, method):
    """In batches of prompts of several lengths as one at a time, and the base's attention is what it was."""
    run = Run(method, "gsm8k", learning_rate=0.05, **{**SMALL, "epochs": 20})
    tasks = trainer.tasks("gsm8k", 8)
    adapted = adapt(trainer.base, [run], tasks.names)
    train(adapted, training_steps([tasks.batches(10, 20, 8, 0)], 10_000), [run.training()], [0.05])
    adapted.model.eval()
    expected = []
    for one in tasks.test["gsm8k"]:
        end = trainer.tokenizer.eos_token_id
        written = greedy(adapted, trainer.tokenizer(one["prompt"])["input_ids"], 0, end, most=20)
        text = trainer.tokenizer.decode(written)
        expected.append(find_number(text) is not None and find_number(text) == find_number(one["completion"]))
    assert generated(adapted, trainer.tokenizer, tasks, "number", 20) == {"gsm8k": expected}
    assert 0 < sum(expected) < len(expected)
    assert trainer.base.config._attn_implementation == CAUSAL


def test_scores_of_tasks_that_were_not_trained_on(trainer):
    rows = trainer.rows([small("lab_lora", transfer="bbh"), small("lab_lora", transfer="bbh", learning_rate=0.1)])
    alone = trainer.rows([small("lab_lora", learning_rate=0.1)])
    assert "transferred" not in alone[0] and rows[1]["accuracy"] == alone[0]["accuracy"]
    assert set(rows[0]["transferred"]["accuracy"]) == set(TRANSFER_SUITES["bbh"])
    assert rows[0]["transferred"]["accuracy"] != rows[1]["transferred"]["accuracy"]
    with pytest.raises(ValueError, match="`transfer` must be one of , bbh"):
        small("lab_lora", transfer="words")


def test_similarity_of_heads(trainer):
    """Heads that start at random are independent; with one head there is none, and the lab measures none."""
    rows = trainer.rows([small("rlora")]) + trainer.rows([small("rlora", options={"num_heads": 1})])
    assert abs(rows[0]["head_similarity"]) < 0.5 and rows[1]["head_similarity"] is None
    by_layer = rows[0]["head_similarities"]  # a value for each of the layers, which are as many for each projection
    assert (
        list(by_layer) == ["gate_proj", "up_proj", "down_proj"] and len({len(one) for one in by_layer.values()}) == 1
    )
    values = [value for one in by_layer.values() for value in one]
    assert sum(values) / len(values) == pytest.approx(rows[0]["head_similarity"], abs=1e-3)
    assert trainer.rows([small("lab_rlora")])[0]["head_similarity"] is None
    (hydra,) = trainer.rows([small("hydra", learning_rate=1e-4)])
    assert hydra["head_similarity"] > rows[0]["head_similarity"]


def test_a_head_for_each_task():
    """With gates "own" a task's outputs depend on its own head only, and on the task."""
    base = TINY_MODELS["llama"]().double()
    lab, state = add_lab(base, [LabOptions(heads=2, r=2, share_a=False, gate="own", init="zero_b")], [0], 2)
    perturb(lab.double())
    ids = torch.randint(5, 60, (1, 6)).expand(2, -1)
    state.tasks = torch.tensor([0, 1])
    before = lab(input_ids=ids).logits
    assert not torch.allclose(before[0], before[1])
    with torch.no_grad():
        for module in lab.modules():
            if isinstance(module, LabLinear):
                module.B[:, 1].zero_()
    after = lab(input_ids=ids).logits
    assert torch.equal(before[0], after[0]) and not torch.allclose(before[1], after[1])
    with pytest.raises(ValueError, match="needs an initial delta of zero"):
        LabOptions(heads=2, gate="own")


# Data


def test_rows_depend_on_the_seed_only(trainer):
    tasks = trainer.tasks("multitask", 8)
    first, again, other = (tasks.batches(20, 2, 8, seed) for seed in (0, 0, 1))
    assert first == again and first != other and len(first) == len(other) == 2 * (7 * 20 // 8)
    rows = [id(row) for batch in first[: len(first) // 2] for row in batch]
    assert len(set(rows)) == len(rows)
    # Lengths of seeds that train side by side are alike.
    widths = [[max(len(row.ids) for row in batch) for batch in batches] for batches in (first, other)]
    assert max(abs(a - b) for a, b in zip(*widths, strict=True)) <= 1


def test_losses_are_those_of_completions(trainer):
    tasks = trainer.tasks("multitask", 8)
    row, example = tasks.train["mrpc"][0], tasks.example(1, 0)
    text = trainer.tokenizer.decode(example.ids[: example.begin + 1])
    assert text == row["prompt"]
    assert trainer.tokenizer.decode(example.targets).strip() == f"{row['completion'].strip()} <eos>"


def test_words_are_in_one_split_of_all_tasks(tmp_path):
    """Other fields than `output` count as answers, but the word itself is no rhyme of it."""
    raw = tmp_path / "source" / "data" / "raw"
    words = [f"word{i}" for i in range(60)]
    for part in ("induce", "execute"):
        (raw / part).mkdir(parents=True)
        for task in quality_words.WORD_TASKS:
            examples = {
                str(i): {"input": word, "output": f"{word}x", "other_rhymes": [f"{word}x", word, f"{word}y"]}
                for i, word in enumerate(words)
            }
            (raw / part / f"{task}.json").write_text(json.dumps({"examples": examples}))
    quality_words.main(["--source", str(tmp_path / "source"), "--out", str(tmp_path / "words")])

    inputs = {"train": set(), "test": set()}
    for path in (tmp_path / "words").glob("*/*.jsonl"):
        rows = [json.loads(line) for line in path.open()]
        found = [one["input"] for one in rows]
        assert len(set(found)) == len(found)
        inputs[path.stem] |= set(found)
    assert inputs["train"] | inputs["test"] == set(words) and not inputs["train"] & inputs["test"]
    rhyme = json.loads((tmp_path / "words" / "rhymes" / "test.jsonl").read_text().splitlines()[0])
    word = rhyme["input"]
    assert rhyme["answers"] == [f" {word}x", f" {word}y"] and rhyme["completion"] == f" {word}x"
    assert rhyme["prompt"] == f"{quality_words.QUESTIONS['rhymes']}\nInput: {word}\nAnswer:"


# Runs, keys and groups


def test_keys_are_stable():
    run = Run("lab_lora", options={"ema": 0.9, "r": 4}, label="one", model="SmolLM2")
    assert run.key == "e670f45f7a80ada4"
    same = Run("lab_lora", options={"r": 4, "ema": 0.9}, label="other", wave=3, batch=32, model="SmolLM2")
    assert same.key == run.key == Run.from_dict(json.loads(json.dumps({**vars(run), "accuracy": {}}))).key
    others = [{"seed": 1}, {"learning_rate": 1e-4}, {"options": {}}, {"batch": 16}, {"model": ""}, {"epochs": 3}]
    assert len({run.key, *(Run(**{**vars(run), **change}).key for change in others)}) == 7


def test_wrong_runs_are_refused_at_once():
    for wrong in ({"method": "lor"}, {"method": "lora", "suite": "glue"}, {"method": "lora", "size": "huge"}):
        with pytest.raises(ValueError, match="must be one of"):
            Run(**wrong)
    with pytest.raises(ValueError, match="has no options num_heads"):
        Run("lab_lora", options={"num_heads": 3})
    with pytest.raises(ValueError, match="`gate` must be one of"):
        Run("lab", options={"gate": "hard"})
    with pytest.raises(ValueError, match="`schedule` must be one of"):
        Run("lora", options={"schedule": "step"})


def test_groups():
    runs = with_model(
        [Run("lab_lora", learning_rate=rate, seed=seed) for rate in (1e-3, 2e-3, 3e-3) for seed in (0, 1)]
        + [Run("lab_lora", options={"heads": 2}), Run("lora"), Run("lora", seed=1), Run("lora")]
        + [Run("lab_lora", learning_rate=9.0, wave=-1), Run("lab_lora", options={"dropout": 0.1})],
        "model",
    )
    groups = groups_of(runs, 3)
    assert [run.learning_rate for run in groups[0]] == [9.0]
    assert sorted(map(len, groups)) == [1, 1, 1, 1, 1, 3, 3]  # the repeated run is left out
    assert all(len({run.seed for run in group}) == 1 for group in groups)  # the same rows


@pytest.mark.parametrize("name", PLANS)
def test_plans(name, smol):
    """Methods that train have at most the parameters of LoRA with rank 10, a few named ones aside."""
    runs = PLANS[name]()
    assert len({run.key for run in runs}) == len(runs)
    if name == "ideas":
        assert len({run.label for run in runs}) > 20
        assert [group[0].wave for group in groups_of(runs, 8)] == sorted(run[0].wave for run in groups_of(runs, 8))
    sizes = {run.label: run for run in runs}
    # Lily shares its matrices between layers: 1.85 million parameters, whatever their number.
    larger = {"8 ranks as heads", "10 ranks by task", "LoRA-MoE", "PEFT Lily", "a LoRA for each task; input"}
    for label, run in sizes.items():
        count = 30 // smol.config.num_hidden_layers * adapt(smol, [run], SUITES["multitask"]).trainable()
        assert count <= 1_900_800 or label in larger, (label, count)


def test_finals_are_at_the_chosen_settings_on_other_seeds():
    from quality_finals import finals

    def row(label, rate, accuracy, cell=("multitask", "plenty"), seed=0):
        run = replace(Run("lab_lora", *cell, rate, seed=seed, label=label, batch=16), model="small")
        return {**run_facts(run), "mean_accuracy": accuracy}

    rows = [row("LoRA r=10", rate, accuracy) for rate, accuracy in ((1e-3, 70.0), (2e-3, 71.0))]
    rows += [row("LoRA r=10", 1e-3, 50.0, ("words", "plenty")), row("LoRA r=10", 5e-4, 99.0, seed=3)]
    runs = finals(rows, ["LoRA r=10"], (3, 4))
    assert {(run.suite, run.learning_rate, run.batch, run.seed, run.model) for run in runs} == {
        (suite, rate, 16, seed, "small") for suite, rate in (("multitask", 2e-3), ("words", 1e-3)) for seed in (3, 4)
    }
    with pytest.raises(ValueError, match="needs rows of 'R-LoRA' with a seed of"):
        finals(rows, ["R-LoRA"])
    with pytest.raises(ValueError, match="needs rows of 'R-LoRA'"):
        finals([], ["R-LoRA"])


@pytest.fixture(scope="module")
def smol():
    """A model of SmolLM2-135M's shape with few of its layers."""
    config = LlamaConfig(
        vocab_size=8, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3
    )
    config.num_hidden_layers = 6
    return LlamaForCausalLM(config)


# The queue


def run_main(model_folders, data, tmp_path, runs, *arguments):
    path, out = tmp_path / "runs.json", tmp_path / "rows.jsonl"
    path.write_text(json.dumps([{**SMALL, **run} for run in runs]))
    command = ["--model", model_folders["llama"], "--data", str(data), "--runs", str(path), "--out", str(out)]
    quality.main([*command, "--dtype", "float32", *arguments])
    return all_rows(out)


def test_a_whole_plan(model_folders, data, tmp_path, capsys):
    """Two processes. A run that fails has a row and does not harm those beside it; it alone is tried once more."""
    runs = [{"method": "lab_lora", "learning_rate": rate} for rate in (1e-3, 2e-3)]
    runs += [{"method": "base"}, {"method": "lora", "options": {"no_such_field": 1}}]
    runs += [{"method": "lab_lora", "options": {"targets": ["no_layer"]}}]
    rows = run_main(model_folders, data, tmp_path, runs, "--workers_per_gpu", "2")
    assert len(rows) == 5 and {row["name"] for row in rows if "error" in row} == {
        "lora (no_such_field 1)",
        "lab_lora (targets ['no_layer'])",
    }
    assert "has no layers no_layer" in next(
        row["error"] for row in rows if row["method"] == "lab_lora" and "error" in row
    )
    good = [row for row in rows if "error" not in row]
    assert all(set(row["accuracy"]) == set(SUITES["multitask"]) for row in good)
    text = (tmp_path / "rows.jsonl").read_text()
    assert str(tmp_path) not in text and str(data) not in text

    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"key": "cut')
    rows = run_main(model_folders, data, tmp_path, runs)
    assert len(rows) == 7 and all("error" in row for row in rows[5:])
    assert "2 runs in 2 groups" in capsys.readouterr().out


def test_the_limit_ends_the_processes(model_folders, data, tmp_path, capsys):
    rows = run_main(model_folders, data, tmp_path, [{"method": "lab_lora"}], "--total_limit", "0.5")
    assert rows == [] and "1 runs left" in capsys.readouterr().out
    assert not multiprocessing.active_children()


def test_no_group_is_started_that_does_not_fit(model_folders, data, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "MARGIN", 1e6)
    runs = [{"method": "lora"}, {"method": "lora", "seed": 1}]
    assert len(run_main(model_folders, data, tmp_path, runs)) == 1


def test_a_process_that_dies_is_replaced(model_folders, data, tmp_path):
    settings = WorkerSettings(Path(model_folders["llama"]), data, "cpu", dtype="float32")
    runs = with_model([small("lab_lora"), small("lora")], "llama")
    pool = quality.Pool([settings], [[run] for run in runs], tmp_path / "rows.jsonl", 60)
    give = pool._give

    def give_and_kill(worker):
        give(worker)
        if not pool.done and worker.group:
            worker.process.kill()

    pool._give = give_and_kill
    pool.run()
    rows = all_rows(tmp_path / "rows.jsonl")
    assert [("error" in row) for row in rows] == [True, False]
    assert "the process ended with code -9" in rows[0]["error"]
