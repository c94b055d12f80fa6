"""4-bit weights that bitsandbytes reorders on some CPUs; test_quantized.py trains and saves whole models with them."""

import pytest
import torch
from torch import nn

from rlora_trl.tuner.bnb_cpu import guard_cpu_order, kept_quantized, undo_cpu_order


bnb = pytest.importorskip("bitsandbytes")


@pytest.fixture(params=[False, True], ids=["plain scales", "double quantization"])
def layer(request):
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=request.param)
    return layer.to("cpu").requires_grad_(False)


def state_of(layer):
    state = layer.weight.quant_state
    tensors = {name: value.clone() for name, value in vars(state).items() if isinstance(value, torch.Tensor)}
    return {"weight": layer.weight.data.clone(), **tensors}


def assert_same(layer, expected):
    actual = state_of(layer)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_kept_quantized_restores_what_changed_inside(layer):
    model, expected = nn.Sequential(layer), state_of(layer)
    state = layer.weight.quant_state
    with kept_quantized(model):
        layer.weight.data = layer.weight.data.flip(0)
        state.absmax = state.absmax + 1
        state.packing_format_for_cpu = True
    assert_same(layer, expected)
    assert layer.weight.quant_state is state and not getattr(state, "packing_format_for_cpu", False)


def test_kept_quantized_restores_after_an_error(layer):
    expected = state_of(layer)
    with pytest.raises(KeyError), kept_quantized(nn.Sequential(layer)):
        layer.weight.data = layer.weight.data.flip(0)
        raise KeyError
    assert_same(layer, expected)


def test_undo_leaves_weights_in_the_first_order_alone(layer):
    expected = state_of(layer)
    undo_cpu_order(layer)
    assert_same(layer, expected)
    undo_cpu_order(nn.Linear(4, 4))
    undo_cpu_order(nn.Identity())


def test_scales_in_the_other_order_come_back(layer):
    """As bitsandbytes leaves them without double quantization: two-dimensional, transposed, in another dtype."""
    state = layer.weight.quant_state
    expected = torch.arange(64.0)
    state.absmax = expected.view(8, 8).T.contiguous().bfloat16()
    undo_cpu_order(layer)
    assert torch.equal(state.absmax, expected) and state.absmax.dtype == torch.float32


def test_a_guarded_layer_is_hooked_once_and_trains_after_inference(layer):
    model = nn.Sequential(nn.Linear(64, 64), layer).bfloat16()
    guard_cpu_order(model)
    guard_cpu_order(model)
    assert len(layer._forward_pre_hooks) == 1

    expected, x = state_of(layer), torch.randn(2, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        model.eval()(x)
    model.train()(x).sum().backward()
    assert model[0].weight.grad.abs().sum() > 0
    layer.state_dict()
    assert_same(layer, expected)
