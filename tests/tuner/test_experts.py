"""Adapters on the weights of experts: every family against a loop over experts in float64."""

import copy

import pytest
import torch
from expert_models import EXPERT_MODELS, build, mean_loss, with_loops
from peft import get_peft_model
from testing_utils import perturb, random_ids

from rlora_trl import RLoraConfig


# Against a loop in float64. In float64 only the order of additions differs; PyTorch's grouped product has no float64,
# and float32 rounds to 6e-8 in each of some dozen products.
TOL = {torch.float64: {"rtol": 1e-9, "atol": 1e-11}, torch.float32: {"rtol": 2e-4, "atol": 2e-5}}
DTYPES = {"grouped_mm": torch.float32}
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
# Families whose experts have one form.
ONE_FORM = ("llama4",)
CASES = [(family, form) for family in EXPERT_MODELS for form in IMPLEMENTATIONS if family not in ONE_FORM]
CASES += [(family, None) for family in ONE_FORM]
CONFIGS = {
    "softmax": {},
    "kaiming": {"router_init": "kaiming_uniform"},
    "top_k": {"router": "top_k", "router_top_k": 2, "router_init": "kaiming_uniform"},
    "uniform": {"router": "uniform"},
    "own_a": {"share_a": False},
    "zero_b": {"init_weights": "zero_b", "router_init": "kaiming_uniform"},
    "uniform_zero_a": {"router": "uniform", "init_weights": "zero_a"},
}


def adapt(model, *, form=None, **settings):
    if form is not None:
        model.set_experts_implementation(form)
    torch.manual_seed(1)
    return get_peft_model(model, RLoraConfig(r=3, num_heads=3, **settings))


def adapt_wide(family, *, form=None, **settings):
    """An adapter in training, away from its initial values, in the widest dtype that the base computes in."""
    model = adapt(build(family), form=form, **settings).train().to(DTYPES.get(form, torch.float64))
    perturb(model)
    return model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def compare_with_loop(model, ids, **forward):
    """Outputs and gradients of a model and of the same model with loops over experts."""
    masks, logits = forward.pop("masks", None), forward.pop("logits", None)
    loop = with_loops(copy.deepcopy(model).double(), masks=masks, task_logits=logits)
    results = []
    for each in (model, loop):
        output = each(ids, **(forward if each is model else {})).logits
        mean_loss(output, ids).backward()
        results.append((output.detach(), gradients(each)))
    (output, grads), (expected, expected_grads) = results
    tolerance = TOL[output.dtype]
    torch.testing.assert_close(output.double(), expected, **tolerance)
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        wide = expected_grads[name]
        torch.testing.assert_close(grad.double(), wide, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
    assert any(grad.abs().max() > 0 for name, grad in grads.items() if "down_proj" in name)


@pytest.mark.parametrize(("family", "form"), CASES)
def test_step_0_is_the_base_model_bit_for_bit(family, form):
    model = build(family)
    ids = random_ids()
    if form is not None:
        model.set_experts_implementation(form)
    with torch.no_grad():
        expected = model(ids).logits
        adapted = adapt(model, form=form).eval()
        assert torch.equal(adapted(ids).logits, expected)
    assert torch.equal(adapted(ids).logits, expected)  # with a graph

    perturb(adapted)
    with torch.no_grad():
        assert not torch.allclose(adapted(ids).logits, expected, atol=1e-3)
        with adapted.disable_adapter():
            assert torch.equal(adapted(ids).logits, expected)


@pytest.mark.parametrize(("family", "form"), CASES)
def test_gradients_are_those_of_a_loop_over_experts(family, form):
    model = adapt_wide(family, form=form, head_dropout=0.0)
    compare_with_loop(model, random_ids())


@pytest.mark.parametrize("form", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CONFIGS)
def test_each_configuration_equals_the_loop(name, form):
    model = adapt_wide("qwen3_moe", form=form, head_dropout=0.0, **CONFIGS[name])
    compare_with_loop(model, random_ids())
