"""
Training strategies on one process and two: the same losses, and complete adapters that give the same logits elsewhere.

Single process, DDP, DeepSpeed ZeRO-1, 2, 3 and 3 with offload to the CPU, and FSDP2; on bases in float32, bfloat16 and
4 bits. On CPU with gloo, or on two GPUs (`make test-multi-gpu`).
"""

import pytest
import torch
from cases import ON_GPU
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from strategy_run import four_bit
from testing_utils import random_ids
from transformers import AutoModelForCausalLM

from rlora_trl.hub import check_adapter
from rlora_trl.tuner import MultiHeadAdapter


pytestmark = pytest.mark.slow

DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BASES = ("float32", "bfloat16", "4bit")
ZERO = ("zero1", "zero2", "zero3", "zero3-offload")
STRATEGIES = ("ddp", *ZERO, "fsdp2")
TIMEOUT = 300
# Losses of 20 steps beside those of one process, relative. In float32 sums have other orders (2e-7 on CPU); in 16 bits
# products of half the rows, and the copies that DeepSpeed trains, are rounded otherwise (2.5e-3). With 4 bits that
# moves the fourth loss by 0.8 % on a GPU: there one process takes the rows of each rank as a micro-batch there.
LOSS_TOLERANCE = {"float32": 2e-4 if ON_GPU else 2e-6, "bfloat16": 1e-2, "4bit": 1e-2}
# Of DDP beside that one process, which does the same products.
SPLIT_TOLERANCE = 2e-4
# Logits beside those of the model in training, relative to the largest: the same operations on the same values. On a
# GPU the base of a model in training may lie in memory otherwise, and its products be done by other kernels.
SLACK = {"float32": 1e-5, "bfloat16": 2**-7, "4bit": 2**-7} if ON_GPU else dict.fromkeys(BASES, 0.0)
SOME_STEPS = {"arguments": {"max_steps": 4, "learning_rate": 1e-2}}
DROPOUT = {"config": {"head_dropout": 0.5}, "batch_seed": True}
# Micro-batches with the rows of each of two ranks.
SPLIT_ROWS = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
# Routers by task, which have a learning rate, and with it a parameter group, of their own.
BY_TASK = {"config": {"router": "task"}, "arguments": {"max_steps": 6, "learning_rate": 1e-3}}
ACCUMULATED = {"max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}


def case(strategy, base, name=None, **kwargs):
    """A case for `strategy_run.py`; with few steps where other cases prove the losses of many."""
    entry = {"name": name or f"{strategy}-{base}", "strategy": strategy.replace("ddp", "plain"), "base": base}
    few = {"arguments": {"max_steps": 6}} if base == "bfloat16" and strategy in ("zero1", "zero3-offload") else {}
    return {**entry, **(SOME_STEPS if base == "4bit" else few), **kwargs}


SPLIT = case("plain", "4bit", "split-4bit", arguments={**SOME_STEPS["arguments"], **SPLIT_ROWS})
SAVED_HEAD = {"config": {"head_dropout": 0.0, "modules_to_save": ["lm_head"]}}
CHECKPOINTED = {"max_steps": 4, "gradient_checkpointing": True}
EXTRAS = [
    case("zero3", "float32", "zero3-checkpointed", arguments=CHECKPOINTED),
    # A and the router stay whole; B, and the weights of the base, are gathered when they are used.
    case("zero3", "float32", "zero3-parts", arguments=CHECKPOINTED, zero={"stage3_param_persistence_threshold": 200}),
    case("zero3", "float32", "zero3-given", **SOME_STEPS, given=True),
    case("zero3", "bfloat16", "zero3-lm_head", **SOME_STEPS, **SAVED_HEAD),
    case("fsdp2", "bfloat16", "fsdp2-lm_head", **SOME_STEPS, **SAVED_HEAD),
    case("ddp", "float32", "ddp-dropout", **SOME_STEPS, **DROPOUT),
    case("fsdp2", "float32", "fsdp2-dropout", **SOME_STEPS, **DROPOUT, fsdp={"activation_checkpointing": True}),
    case("fsdp2", "bfloat16", "fsdp2-accumulated", arguments=ACCUMULATED),
    case("fsdp2", "bfloat16", "fsdp2-ram", **SOME_STEPS, fsdp={"cpu_ram_efficient_loading": True}),
    *(case(strategy, "float32", f"{strategy}-by-task", **BY_TASK) for strategy in ("zero2", "zero3", "fsdp2")),
]


@pytest.fixture(scope="module")
def models(model_folders, tmp_path_factory):
    """Folders of the models by base."""
    half = tmp_path_factory.mktemp("half")
    AutoModelForCausalLM.from_pretrained(model_folders["llama"], dtype=torch.bfloat16).save_pretrained(half)
    return {"float32": model_folders["llama"], "bfloat16": str(half), "4bit": model_folders["llama64"]}


@pytest.fixture(scope="module")
def alone(launch, models, tmp_path_factory):
    """Outcomes of one process with the whole batch, by case, and their folder."""
    folder = tmp_path_factory.mktemp("alone")
    cases = [case("plain", base) for base in BASES] + [SPLIT, case("plain", "float32", "plain-by-task", **BY_TASK)]
    return launch(folder, "strategy_run", cases, models, timeout=TIMEOUT), folder


@pytest.fixture(scope="module")
def ranks(launch, models, tmp_path_factory):
    """Outcomes of two processes, by case, and their folder."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("ranks")
    cases = [case(strategy, base) for strategy in STRATEGIES for base in BASES] + EXTRAS
    return launch(folder, "strategy_run", cases, models, ranks=2, timeout=TIMEOUT), folder


@pytest.fixture(autouse=True)
def _one_thread():
    """As the ranks have it: on some CPUs two threads round products otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def loaded_logits(folder, base, *, autocast=False, rounded=False, in_order=False):
    """
    Logits of a saved adapter on its base, loaded as a user loads it; and of the base alone.

    Args:
        folder (`Path`): Where the adapter was saved.
        base (`str`): One of `BASES`.
        autocast (`bool`): In mixed precision, as one process and DDP train.
        rounded (`bool`): With adapters rounded to bfloat16, which DeepSpeed trains copies in.
        in_order (`bool`): On CPU, with 4-bit weights in the order of training.
    """
    options = {"quantization_config": four_bit()} if base == "4bit" else {}
    dtype = torch.float32 if base == "float32" else torch.bfloat16
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": DEVICE}, **options).eval()
    adapters = [module for module in model.modules() if isinstance(module, MultiHeadAdapter)]
    assert adapters and all(p.dtype == torch.float32 for adapter in adapters for p in adapter.parameters())
    for adapter in adapters if rounded else []:
        adapter.to(torch.bfloat16)
    for module in model.modules() if in_order else []:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    ids = random_ids().to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        logits = model(input_ids=ids).logits.float().cpu()
        with model.disable_adapter():
            return logits, model(input_ids=ids).logits.float().cpu()


def assert_saved_adapter_is_the_trained_one(folder, name, base, outcome):
    """
    The file is complete, in float32 and finite, and loaded elsewhere gives the logits of the trained model.

    Args:
        folder (`Path`): Where the cases ran.
        name (`str`): The case.
        base (`str`): One of `BASES`.
        outcome (`list[dict]`): The outcome on each rank.
    """
    output = folder / f"out-{name}"
    check_adapter(output)
    saved = load_file(output / "adapter_model.safetensors")
    adapter = {key: value for key, value in saved.items() if ".rlora_adapters." in key}
    for tensor in ("A", "B", "router", "A0", "B0"):
        assert sum(key.endswith(f".{tensor}") for key in adapter) == 6, name  # three projections in each of two layers
    assert len(adapter) == 30 and all(value.dtype == torch.float32 for value in adapter.values()), name
    assert all(value.isfinite().all() for value in saved.values()), name

    # As a user loads it, in the precision of training.
    mixed, deepspeed, fsdp = base != "float32", name.startswith("zero"), outcome[0]["type"] == "FSDP"
    computed = {"autocast": mixed and not (deepspeed or fsdp), "rounded": mixed and deepspeed, "in_order": fsdp}
    logits, without = loaded_logits(output, base, **computed)
    largest = without.abs().max().item()
    assert (logits - without).abs().max() > 0.1 * largest, name  # training has done something
    for rank in outcome:
        difference = (rank["logits"].float() - logits).abs().max().item()
        assert difference <= SLACK[base] * largest, f"{name}: {difference:.2e} beside logits of {largest:.2e}"
    if computed["rounded"]:  # and as it is loaded, in float32, it is close
        exact, _ = loaded_logits(output, base)
        assert (exact - logits).abs().max() <= 2**-5 * largest, name


@pytest.mark.parametrize("base", BASES)
def test_one_process(alone, base):
    outcome, folder = alone
    assert outcome[f"plain-{base}"][0]["processes"] == 1
    assert_saved_adapter_is_the_trained_one(folder, f"plain-{base}", base, outcome[f"plain-{base}"])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes(ranks, strategy, base):
    outcome, folder = ranks
    name = f"{strategy}-{base}"
    expected = {"ddp": "MULTI_GPU" if ON_GPU else "MULTI_CPU", "fsdp2": "FSDP"}.get(strategy, "DEEPSPEED")
    assert [(rank["processes"], rank["type"]) for rank in outcome[name]] == [(2, expected)] * 2
    assert_saved_adapter_is_the_trained_one(folder, name, base, outcome[name])


@pytest.mark.parametrize("base", BASES)
def test_losses_agree(alone, ranks, base):
    (expected,) = [rank["losses"] for rank in alone[0]["split-4bit" if base == "4bit" else f"plain-{base}"]]
    assert len(expected) == (4 if base == "4bit" else 20) and expected[-1] < 0.8 * expected[0]
    for strategy in STRATEGIES:
        for rank in ranks[0][f"{strategy}-{base}"]:
            steps = 6 if base == "bfloat16" and strategy in ("zero1", "zero3-offload") else len(expected)
            assert rank["losses"] == pytest.approx(expected[:steps], rel=LOSS_TOLERANCE[base]), strategy


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_losses_agree_with_routers_by_task(alone, ranks, strategy):
    (expected,) = [rank["losses"] for rank in alone[0]["plain-by-task"]]
    assert len(expected) == 6 and expected[-1] < expected[0]
    for rank in ranks[0][f"{strategy}-by-task"]:
        assert rank["losses"] == pytest.approx(expected, rel=LOSS_TOLERANCE["float32"])


def test_four_bits_are_rounded_by_the_rows_of_a_product(alone, ranks):
    """Ranks begin with the values of one process; what differs is what the rows of its products make of rounding."""
    losses = alone[0]["split-4bit"][0]["losses"]
    assert losses == pytest.approx(alone[0]["plain-4bit"][0]["losses"], rel=3e-2)
    for rank in ranks[0]["ddp-4bit"]:
        assert rank["losses"] == pytest.approx(losses, rel=SPLIT_TOLERANCE)


@pytest.mark.parametrize("base", BASES)
def test_all_begin_with_the_same_values(alone, ranks, base):
    (expected,) = [rank["initial"] for rank in alone[0][f"plain-{base}"]]
    for strategy in [strategy for strategy in STRATEGIES if not strategy.startswith("zero3")]:  # which has shards
        for rank in ranks[0][f"{strategy}-{base}"]:
            # DeepSpeed trains copies in 16 bits.
            rounded = strategy in ZERO and base != "float32"
            assert set(rank["initial"]) == set(expected), strategy
            for name, value in rank["initial"].items():
                if rounded and name.endswith(".B0"):  # the mean of heads that are rounded
                    continue
                assert torch.equal(value, expected[name].to(value.dtype) if rounded else expected[name]), strategy


@pytest.mark.parametrize("base", BASES)
def test_dtypes(alone, ranks, base):
    """Adapters are float32 parameters everywhere but under DeepSpeed, which keeps float32 values beside its own."""
    activations = torch.float32 if base == "float32" else torch.bfloat16
    cases = {"plain": alone[0], **dict.fromkeys(STRATEGIES, ranks[0])}
    for strategy, outcome in cases.items():
        stored = activations if strategy in ZERO else torch.float32
        for rank in outcome[f"{strategy}-{base}"]:
            dtypes = rank["dtypes"]
            assert dtypes["parameters"] == {stored}, strategy
            assert dtypes["products"] == {(activations, stored)}, strategy
            # DeepSpeed keeps gradients elsewhere.
            assert dtypes["gradients"] == (set() if strategy in ZERO else {torch.float32}), strategy
            assert rank["base_is_unchanged"], strategy


@pytest.mark.parametrize("base", BASES)
def test_gradient_norms_are_logged(alone, ranks, base):
    """Norms are those of one process where the trainer has gradients; no step warns that it has none."""
    expected = alone[0][f"plain-{base}"][0]
    for strategy in ("ddp", "fsdp2"):
        for rank in ranks[0][f"{strategy}-{base}"]:
            for norms, of_one in zip(rank["norms"], expected["norms"], strict=True):
                assert len(norms) == 3 and norms == pytest.approx(of_one, rel=30 * LOSS_TOLERANCE[base]), strategy
    for outcome in (alone[0], ranks[0]):
        assert all(rank["warnings"] == [] for case_ranks in outcome.values() for rank in case_ranks)


@pytest.mark.parametrize("name", ["zero3-float32", "zero3-checkpointed", "zero3-parts"])
def test_zero_3_does_little_for_small_tensors(alone, ranks, name):
    """Anchors are not gathered, other small tensors all at once, and weights are concatenated for all layers."""
    outcome, folder = ranks
    whole = ("A", "router") if name == "zero3-parts" else ("A", "B", "router")
    expected = alone[0]["plain-float32"][0]["losses"]
    for rank in outcome[name]:
        work, losses = rank["work"], rank["losses"]
        assert work["kept"] == sorted(6 * whole)  # three projections in each of two layers
        assert (work["_post_step"], work["all_gather_into_tensor"]) == (1, 1)
        # In the forward pass and in the recomputation, if they are not there when the pass begins.
        assert work["concat_weights"] == (12 if name == "zero3-parts" else 0)
        assert losses == pytest.approx(expected[: len(losses)], rel=LOSS_TOLERANCE["float32"])
    assert_saved_adapter_is_the_trained_one(folder, name, "float32", outcome[name])


def test_zero_3_takes_anchors_of_the_first_rank(ranks):
    outcome, folder = ranks
    first, second = (rank["initial"] for rank in outcome["zero3-given"])
    assert first.keys() == second.keys() and not any(
        torch.equal(first[name], second[name]) for name in first if name.endswith(".A")
    )
    # Logits of both ranks are those of the file.
    assert_saved_adapter_is_the_trained_one(folder, "zero3-given", "float32", outcome["zero3-given"])
    saved = load_file(folder / "out-zero3-given" / "adapter_model.safetensors")
    anchors = {name.removesuffix("0"): value for name, value in saved.items() if name.endswith(".A0")}
    initial = {name.replace(".default", ""): value for name, value in first.items()}
    assert len(anchors) == 6 and all(torch.equal(value, initial[name]) for name, value in anchors.items())


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_modules_to_save(ranks, models, strategy):
    outcome, folder = ranks
    name = f"{strategy}-lm_head"
    assert_saved_adapter_is_the_trained_one(folder, name, "bfloat16", outcome[name])
    saved = load_file(folder / f"out-{name}" / "adapter_model.safetensors")
    (head,) = [value for key, value in saved.items() if "lm_head" in key]
    before = load_file(f"{models['bfloat16']}/model.safetensors")["lm_head.weight"]
    assert head.shape == before.shape and not torch.equal(head.to(before.dtype), before)


def test_fsdp_checkpointing_recomputes_the_same_masks(ranks):
    """accelerate's does not restore random states; losses of later steps depend on the gradients of those before."""
    outcome, folder = ranks
    for rank, expected in zip(outcome["fsdp2-dropout"], outcome["ddp-dropout"], strict=True):
        assert rank["losses"] == pytest.approx(expected["losses"], rel=LOSS_TOLERANCE["float32"])
    assert_saved_adapter_is_the_trained_one(folder, "fsdp2-dropout", "float32", outcome["fsdp2-dropout"])


def test_fsdp_accumulates_gradients(alone, ranks):
    expected = alone[0]["plain-bfloat16"][0]
    for rank in ranks[0]["fsdp2-accumulated"]:
        assert rank["losses"] == pytest.approx(expected["losses"][:4], rel=LOSS_TOLERANCE["bfloat16"])
        assert rank["dtypes"] == expected["dtypes"]


def test_fsdp_loading_on_one_rank(ranks):
    outcome, folder = ranks
    assert_saved_adapter_is_the_trained_one(folder, "fsdp2-ram", "bfloat16", outcome["fsdp2-ram"])
    steps = len(outcome["fsdp2-ram"][0]["losses"])
    assert steps == 4
    for rank in outcome["fsdp2-ram"]:
        assert rank["dtypes"] == outcome["fsdp2-bfloat16"][0]["dtypes"]
        assert rank["losses"][0] == pytest.approx(outcome["fsdp2-bfloat16"][0]["losses"][0], rel=1e-6)
