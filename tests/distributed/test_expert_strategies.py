"""Mixtures of experts on two processes: each strategy trains what one process trains, and saves complete adapters."""

import pytest
import torch
from expert_models import build
from peft import AutoPeftModelForCausalLM
from testing_utils import build_tokenizer, random_ids


pytestmark = pytest.mark.slow

TIMEOUT = 300
STEPS = {"max_steps": 6, "learning_rate": 1e-2}
CASES = {
    "ddp": {"strategy": "plain"},
    "zero2": {"strategy": "zero2"},
    "zero3": {"strategy": "zero3"},
    # B and the experts of the base are gathered when they are used.
    "zero3-parts": {
        "strategy": "zero3",
        "arguments": {**STEPS, "gradient_checkpointing": True},
        "zero": {"stage3_param_persistence_threshold": 200},
    },
    "fsdp2": {"strategy": "fsdp2"},
}
# Losses relative to those of one process: sums in other orders.
TOLERANCE = 1e-4


def case(name, values):
    return {"name": name, "base": "float32", "arguments": STEPS, **values}


# DeepSpeed takes the blocks of the first family as wholes ("leaf modules"), and gathers each part of the second's.
@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def outcomes(launch, tmp_path_factory, request):
    """What one process and two did, by case, and the folder of the two."""
    pytest.importorskip("deepspeed")
    model = tmp_path_factory.mktemp("moe")
    build(request.param).save_pretrained(model)
    build_tokenizer().save_pretrained(model)
    models = {"float32": str(model)}
    options = {"model_init_kwargs": {"dtype": "float32", "experts_implementation": "grouped_mm"}}
    values = {
        name: {**value, "arguments": {**STEPS, **value.get("arguments", {}), **options}}
        for name, value in CASES.items()
    }
    alone = [case("alone", {"strategy": "plain", "arguments": {**STEPS, **options}})]
    one = launch(tmp_path_factory.mktemp("alone"), "strategy_run", alone, models, timeout=TIMEOUT)["alone"][0]
    folder = tmp_path_factory.mktemp("ranks")
    cases = [case(name, value) for name, value in values.items()]
    return one, launch(folder, "strategy_run", cases, models, ranks=2, timeout=TIMEOUT), folder


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_one_process(outcomes, name):
    one, ranks, _ = outcomes
    expected = torch.tensor(one["losses"])
    assert expected[-1] < expected[0]
    for outcome in ranks[name]:
        assert outcome["base_is_unchanged"]
        assert not outcome["warnings"]
        torch.testing.assert_close(torch.tensor(outcome["losses"]), expected, rtol=TOLERANCE, atol=0.0)


@pytest.mark.parametrize("name", CASES)
def test_a_saved_adapter_is_complete(outcomes, name):
    _, ranks, folder = outcomes
    model = AutoPeftModelForCausalLM.from_pretrained(folder / f"out-{name}").eval()
    with torch.no_grad():
        logits = model(random_ids()).logits
    torch.testing.assert_close(logits, ranks[name][0]["logits"], rtol=1e-4, atol=1e-4)
