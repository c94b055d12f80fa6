"""Measured head weights: means over the right tokens, all state restored; and fixed ones in every forward path."""

import copy
import json

import pytest
import torch
from peft import get_peft_model
from testing_utils import TINY_MODELS, perturb, random_ids, task_rows

from rlora_trl import RLoraConfig, analysis
from rlora_trl.analysis.measuring import measure_head_weights
from rlora_trl.files.head_weights import HeadWeights
from rlora_trl.tuner import find_routings
from rlora_trl.tuner.selection import adapted_layers, fixed_head_weights


ROUTERS = {
    "softmax": {},
    "top_k": {"router": "top_k", "router_top_k": 2, "router_init": "kaiming_uniform"},
    "task": {"router": "task", "tasks": ["first", "same"]},
    "uniform": {"router": "uniform"},
    "own_a": {"share_a": False},
    "input_dropout": {"dropout_position": "input", "head_dropout": 0.2},
    "no_anchor": {"init_weights": "zero_b", "router_init": "kaiming_uniform"},
}
TASKS = {task: task_rows(task, 12) for task in ("first", "same")}


def adapted(name="llama", scale=2.0, **kwargs):
    model = get_peft_model(TINY_MODELS[name](), RLoraConfig(task_type="CAUSAL_LM", **kwargs)).eval()
    perturb(model, scale)
    return model


def logits(model, ids=None, **kwargs):
    with torch.no_grad():
        return model(random_ids() if ids is None else ids, **kwargs).logits


def error(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


def by_hand(model, tokenizer, rows):
    """Mean weights of one layer after the other, row by row: no padding, no batches."""
    sums, count = None, 0
    inputs = {}
    layers = adapted_layers(model, "default")
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].detach()))
        for name, layer in layers.items()
    ]
    for row in rows:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        logits(model, torch.tensor([ids]))
        weights = [
            layer.rlora_adapters["default"].head_weights(inputs[name])[0].sum(0) for name, layer in layers.items()
        ]
        sums = torch.stack(weights) if sums is None else sums + torch.stack(weights)
        count += len(ids)
    for hook in hooks:
        hook.remove()
    return (sums / count).detach(), count


@pytest.mark.parametrize("router", ["softmax", "top_k", "own_a"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_means_over_all_tokens_but_padding(tokenizer, router, name):
    model = adapted(name, **ROUTERS[router])
    measured = measure_head_weights(model, tokenizer, TASKS, batch_size=5)
    assert measured.layers == tuple(adapted_layers(model, "default"))
    assert all(layer.startswith(("model.layers.", "transformer.h.")) for layer in measured.layers)
    for task, rows in TASKS.items():
        expected, count = by_hand(model, tokenizer, rows)
        assert measured.tokens[task] == count
        assert torch.allclose(measured.weights[task], expected, atol=1e-5)
        assert torch.allclose(measured.weights[task].sum(-1), torch.ones(len(measured.layers)), atol=1e-5)
    # Tasks differ, and so do layers: nothing was added up twice.
    assert (measured.weights["first"] - measured.weights["same"]).abs().max() > 1e-3
    assert measured.weights["first"].std(0).max() > 1e-2


def test_learned_head_weights_are_read_as_they_are(tokenizer):
    model = adapted(**ROUTERS["task"])
    measured = measure_head_weights(model, tokenizer, TASKS)
    for index, task in enumerate(("first", "same")):
        for layer, weights in measured.for_task(task).items():
            router = adapted_layers(model, "default")[layer].rlora_adapters["default"].router
            assert torch.allclose(weights, router[index].softmax(-1))
    with pytest.raises(ValueError, match="The adapter has no task 'colour'.*first.*same"):
        measure_head_weights(model, tokenizer, {"colour": task_rows("colour", 3)})
    uniform = measure_head_weights(adapted(**ROUTERS["uniform"]), tokenizer, TASKS)
    assert all(torch.equal(weights, torch.full((6, 3), 1 / 3)) for weights in uniform.weights.values())


def test_formats_and_choice_of_rows(tokenizer):
    model = adapted()
    pairs = TASKS["first"]
    texts = [{"text": row["prompt"] + row["completion"]} for row in pairs]
    expected = measure_head_weights(model, tokenizer, {"t": pairs})
    assert torch.equal(measure_head_weights(model, tokenizer, {"t": texts}).weights["t"], expected.weights["t"])
    turns = [("user", "prompt"), ("assistant", "completion")]
    chats = [{"messages": [{"role": role, "content": row[key]} for role, key in turns]} for row in pairs]
    split = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in chats]
    chat = measure_head_weights(model, tokenizer, {"t": chats})
    assert chat.tokens["t"] > expected.tokens["t"]  # with the words of the template
    assert torch.equal(measure_head_weights(model, tokenizer, {"t": split}).weights["t"], chat.weights["t"])

    # Evenly over all rows, which may be sorted.
    some = measure_head_weights(model, tokenizer, {"t": pairs}, max_rows=4)
    assert torch.equal(some.weights["t"], measure_head_weights(model, tokenizer, {"t": pairs[::3]}).weights["t"])
    short = measure_head_weights(model, tokenizer, {"t": pairs}, max_length=2)
    assert short.tokens["t"] == 2 * len(pairs)
    with pytest.raises(ValueError, match="Row 0 of task 't' has the columns 'question'"):
        measure_head_weights(model, tokenizer, {"t": [{"question": "w1"}]})
    with pytest.raises(ValueError, match="Task 't' has no rows"):
        measure_head_weights(model, tokenizer, {"t": []})
    with pytest.raises(ValueError, match="`max_rows` must be at least 1"):
        measure_head_weights(model, tokenizer, {"t": pairs}, max_rows=0)


def test_state_is_restored(tokenizer):
    model = adapted()
    alone = measure_head_weights(model, tokenizer, TASKS)
    model.add_adapter("other", RLoraConfig(task_type="CAUSAL_LM", num_heads=2))
    model.set_adapter("other")
    model.train()
    model.base_model.model.model.layers[1].eval()
    routing = next(routing for routing in find_routings(model))
    routing.update(usage=object(), token_mask=object())
    modes = {name: module.training for name, module in model.named_modules()}
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="'t' has the columns"):
        measure_head_weights(model, tokenizer, {"t": [{"x": 1}]}, adapter_name="default")
    before = routing.batch
    with model.disable_adapter():
        measured = measure_head_weights(model, tokenizer, TASKS, adapter_name="default")
    assert routing.batch is before
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trains
    assert model.active_adapters == ["other"]
    # Whatever is active besides: the adapter runs alone.
    assert torch.equal(measured.weights["first"], alone.weights["first"])
    assert measure_head_weights(model, tokenizer, TASKS).weights["first"].shape == (6, 2)  # the active one
    with pytest.raises(ValueError, match="'third' is unknown; R-LoRA adapters of the model: 'default', 'other'"):
        measure_head_weights(model, tokenizer, TASKS, adapter_name="third")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="Set `adapter_name`"):
        measure_head_weights(model, tokenizer, TASKS)


def test_merged_adapters_are_refused(tokenizer):
    model = adapted()
    model.add_adapter("even", RLoraConfig(task_type="CAUSAL_LM", router="uniform"))
    model.merge_adapter(["even"])
    with pytest.raises(ValueError, match=r"merged into the base \(even\).*`unmerge_adapter\(\)`"):
        measure_head_weights(model, tokenizer, TASKS, adapter_name="default")


def test_json_round_trip():
    weights = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    mixtures = HeadWeights(("a", "b", "c"), {"x": weights, "y": weights.flip(0)}, {"x": 7, "y": 9})
    text = json.dumps(mixtures.to_dict())
    again = HeadWeights.from_dict(json.loads(text))
    assert (again.layers, again.tokens) == (mixtures.layers, mixtures.tokens)
    assert all(torch.allclose(again.weights[task], mixtures.weights[task], atol=1e-6) for task in "xy")
    assert json.dumps(again.to_dict()) == text
    assert torch.allclose(again.mean()["a"], (weights[0] + weights[2]) / 2, atol=1e-6)
    with pytest.raises(ValueError, match="'z' was not measured; there are head weights of 'x', 'y'"):
        mixtures.for_task("z")


GOOD = {"layers": ["a"], "weights": {"x": [[0.25, 0.75]]}, "tokens": {"x": 3}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": None}, "`layers` of head weights must be a list"),
        ({"layers": ["a", "b"]}, r"shape \[2, N\]"),
        ({"weights": [[0.5, 0.5]]}, "`weights` of head weights must be lists by task"),
        ({"weights": {"x": [["0.5", 0.5]]}}, "must be lists of numbers"),
        ({"weights": {"x": [[True, 0]]}}, "must be lists of numbers"),
        ({"weights": {"x": [[float("nan"), 1.0]]}}, "must be lists of numbers"),
        ({"weights": {"x": [[0.5, 0.5], [1.0]]}}, "all of one length"),
        ({"weights": {"x": []}}, "must be lists of numbers"),
        ({"weights": {"x": [[1.5, -0.5]]}}, "at least 0 that sum to 1"),
        ({"weights": {"x": [[0.5, 0.6]]}}, "sums differ from 1 by up to 0.1"),
        ({"tokens": {"x": -1}}, "`tokens` of head weights must be numbers"),
        ({"tokens": {"y": 3}}, "Give both for the same tasks"),
    ],
)
def test_broken_content_is_refused(change, message):
    HeadWeights.from_dict(GOOD)
    with pytest.raises(ValueError, match=message):
        HeadWeights.from_dict({**GOOD, **change})
    with pytest.raises(ValueError, match="`tokens`"):
        HeadWeights.from_dict({"layers": ["a"], "weights": {}})


def one_head_only(model, ids, head, **kwargs):
    """What the model gives if only one head were there: that of a copy whose heads are all that one."""
    other = copy.deepcopy(model)
    for layer in adapted_layers(other, "default").values():
        adapter = layer.rlora_adapters["default"]
        with torch.no_grad():
            adapter.B.copy_(adapter.B[head].expand_as(adapter.B))
            if not adapter.share_a:
                # The anchor subtracts each head's own product, so only A and B may be copied.
                adapter.A.copy_(adapter.A[head].expand_as(adapter.A))
    return logits(other, ids, **kwargs)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("router", ROUTERS)
def test_fixed_head_weights_in_every_path(router):
    """Weight one on one head is that head; in the packed, the fused and the compiled path, and restored after."""
    model, ids = adapted(**ROUTERS[router]), random_ids(2, 40)
    layers = adapted_layers(model, "default")
    before = logits(model, ids)
    for head in (0, 2):
        weights = dict.fromkeys(layers, [float(index == head) for index in range(3)])
        expected = one_head_only(model, ids, head)
        with fixed_head_weights(model, "default", weights):
            packed = logits(model, ids)
            fused = model(ids).logits.detach()  # with gradients
            short = logits(model, ids[:1, :3])  # few tokens: another kernel
            adapter = next(iter(layers.values())).rlora_adapters["default"]
            x = torch.randn(5, adapter.in_features)
            fixed = adapter.head_weights(x)
            if router in ("softmax", "top_k"):
                compiled = torch.compile(adapter, backend="aot_eager", fullgraph=True)(x)
                assert error(compiled, adapter(x)) <= 1e-5
        for got in (packed, fused):
            assert torch.isfinite(got).all()
            assert error(got, expected) <= 1e-5
        assert error(short, expected[:1, :3]) <= 1e-5
        assert torch.equal(fixed, torch.tensor(weights[next(iter(layers))]).expand(5, -1))
        assert (expected - before).abs().max() > 1e-3
        # No stale weights in what inference keeps.
        assert torch.equal(logits(model, ids), before)


def test_fixed_head_weights_in_training_and_half_precision():
    model, ids = adapted(), random_ids()
    weights = dict.fromkeys(adapted_layers(model, "default"), [0.0, 1.0, 0.0])
    model.train()
    with fixed_head_weights(model, "default", weights):
        model(ids, labels=ids).loss.backward()
    for layer in adapted_layers(model, "default").values():
        gradient = layer.rlora_adapters["default"].B.grad
        assert torch.isfinite(gradient).all()
        # Of the heads without weight nothing is used but, where there is an anchor, their mean is not either.
        assert gradient[1].abs().max() > 0 and gradient[0].abs().max() <= 1e-5 * gradient[1].abs().max()
    half = adapted().to(torch.bfloat16)
    with fixed_head_weights(half, "default", weights):
        assert torch.isfinite(logits(half)).all()


def test_fixed_head_weights_are_restored_after_errors_and_not_copied():
    model = adapted()
    before = logits(model)
    layers = adapted_layers(model, "default")
    with (
        pytest.raises(RuntimeError, match="stop"),
        fixed_head_weights(model, "default", dict.fromkeys(layers, [1, 0, 0])),
    ):
        copied = copy.deepcopy(model)
        inner = logits(model)
        with fixed_head_weights(model, "default", dict.fromkeys(layers, [0, 1, 0])):
            assert not torch.equal(logits(model), inner)
        assert torch.equal(logits(model), inner)
        raise RuntimeError("stop")
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(copied), before)


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.5, 0.6, 0.2], [1.5, -0.5, 0.0], [float("nan"), 0.5, 0.5]])
def test_weights_that_are_none(weights):
    model = adapted()
    layers = adapted_layers(model, "default")
    with pytest.raises(ValueError, match="must be 3 numbers of at least 0 that sum to 1"):
        with fixed_head_weights(model, "default", dict.fromkeys(layers, weights)):
            pass
    assert all(layer.rlora_adapters["default"].fixed_logits is None for layer in layers.values())
    with pytest.raises(ValueError, match="these differ: model.layers.0.mlp.up_proj"):
        fixed = dict.fromkeys(layers, [1, 0, 0])
        del fixed["model.layers.0.mlp.up_proj"]
        with fixed_head_weights(model, "default", fixed):
            pass


@pytest.mark.parametrize("old", ["HeadMixtures", "measure_mixtures"])
def test_former_names_warn_once(old):
    analysis.__dict__.pop(old, None)
    with pytest.warns(
        FutureWarning, match=rf"`rlora_trl.analysis.{old}` is now called `(HeadWeights|measure_head_weights)`"
    ) as warned:
        exec(f"from rlora_trl.analysis import {old}", namespace := {})
        assert namespace[old] is getattr(analysis, old)
    assert len(warned) == 1 and warned[0].filename == "<string>"
    assert namespace[old] in (HeadWeights, measure_head_weights)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = analysis.nothing
