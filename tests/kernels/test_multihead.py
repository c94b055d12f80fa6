"""The rank-space form against the loop over heads, in float64: outputs and every gradient."""

import itertools

import pytest
import torch

from rlora_trl.kernels import keep_mask, mean_of_heads, multihead_delta
from rlora_trl.kernels.reference import multihead_delta_reference


HEADS, RANKS = (1, 2, 3, 8), (1, 3, 5)


def make(num_heads, r, *, d_in=13, d_out=17, tokens=11, router=True, anchor=True, dtype=torch.float64):
    """Inputs by name; sizes are primes, so that no two can be mixed up."""
    shapes = {"x": (tokens, d_in), "A": (r, d_in), "B": (num_heads, d_out, r)}
    if router:
        shapes["router"] = (num_heads, d_in)
    tensors = {name: torch.randn(shape, dtype=dtype, requires_grad=True) for name, shape in shapes.items()}
    if anchor:
        tensors["anchor_A"] = torch.randn(r, d_in, dtype=dtype)
        tensors["anchor_B"] = torch.randn(d_out, r, dtype=dtype)
    return tensors


def masks(tensors, position, p, seed):
    tokens, d_in = tensors["x"].shape
    num_heads, _, r = tensors["B"].shape
    if position == "head":
        return {"head_masks": keep_mask(seed, (tokens, num_heads, r), p)}
    return {"input_mask": keep_mask(seed, (tokens, d_in), p)}


def relative_error(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("position", ["head", "input"])
@pytest.mark.parametrize("router", [True, False])
@pytest.mark.parametrize("anchor", [True, False])
@pytest.mark.parametrize(("num_heads", "r"), list(itertools.product(HEADS, RANKS)))
def test_equals_loop_over_heads(num_heads, r, anchor, router, position):
    tensors = make(num_heads, r, router=router, anchor=anchor)
    trained = [name for name in ("x", "A", "B", "router") if name in tensors]
    p, seed = 0.3, 77
    y = multihead_delta(**tensors, scaling=1.7, dropout=p, seed=seed, dropout_position=position)
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, [tensors[name] for name in trained], upstream)
    expected = multihead_delta_reference(**tensors, scaling=1.7, dropout=p, **masks(tensors, position, p, seed))
    expected_grads = torch.autograd.grad(expected, [tensors[name] for name in trained], upstream)
    assert relative_error(y, expected) < 1e-9
    for name, grad, expected_grad in zip(trained, grads, expected_grads, strict=True):
        if name == "router" and num_heads == 1:
            # One head weighs 1 whatever its logit.
            assert grad.abs().max() < 1e-12
        else:
            assert relative_error(grad, expected_grad) < 1e-9, name


@pytest.mark.parametrize("position", ["head", "input"])
@pytest.mark.parametrize("num_heads", HEADS)
def test_gradcheck(num_heads, position):
    tensors = make(num_heads, 3, d_in=5, d_out=4, tokens=3)

    def function(x, A, B, router):
        anchor = {name: tensors[name] for name in ("anchor_A", "anchor_B")}
        return multihead_delta(x, A, B, router, **anchor, dropout=0.4, seed=5, dropout_position=position)

    assert torch.autograd.gradcheck(function, [tensors[name] for name in ("x", "A", "B", "router")])


def test_anchor_gets_no_gradient():
    tensors = make(3, 2)
    tensors["anchor_A"].requires_grad_(True)
    tensors["anchor_B"].requires_grad_(True)
    multihead_delta(**tensors).sum().backward()
    assert tensors["anchor_A"].grad is None
    assert tensors["anchor_B"].grad is None
    assert tensors["A"].grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_heads", [1, 3, 7])
def test_zero_at_the_anchor_in_every_dtype(dtype, num_heads):
    """With A and B at their initial values and equal weights, nothing is left to round."""
    A, B = torch.randn(5, 33), torch.randn(num_heads, 29, 5)
    y = multihead_delta(
        torch.randn(10, 33, dtype=dtype), A, B, torch.zeros(num_heads, 33), A.clone(), mean_of_heads(B), scaling=16.0
    )
    assert y.dtype == dtype
    assert torch.count_nonzero(y) == 0


# Relative RMS error against float64. One rounding to bfloat16 is 2**-9 = 0.2 %; output and gradients pass through
# three (weights, projection, mixture). The router's gradient is a difference of heads, which doubles it.
TOLERANCE = {torch.float32: {"router": 2e-6, "": 1e-6}, torch.bfloat16: {"router": 2e-2, "": 8e-3}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    tolerance = TOLERANCE[dtype]
    tensors = make(3, 4, d_in=64, d_out=48, tokens=100)
    # Weights of the size that they have in a layer, so that projections and logits are of order one.
    size = {"x": 1.0, "B": 4**-0.5, "anchor_B": 4**-0.5}
    low = {
        name: (size.get(name, 64**-0.5) * tensor.detach())
        .to(dtype if name == "x" else torch.float32)
        .requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }
    wide = {name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in low.items()}
    names = ["x", "A", "B", "router"]
    y, expected = multihead_delta(**low, scaling=2.0), multihead_delta_reference(**wide, scaling=2.0)
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, [low[name] for name in names], upstream)
    expected_grads = torch.autograd.grad(expected, [wide[name] for name in names], upstream.double())
    assert relative_error(y.double(), expected) < tolerance[""]
    for name, grad, expected_grad in zip(names, grads, expected_grads, strict=True):
        assert grad.dtype == low[name].dtype
        assert relative_error(grad.double(), expected_grad) < tolerance.get(name, tolerance[""]), name


@pytest.mark.parametrize("shape", [(13,), (2, 3, 13), (0, 13), (2, 0, 13), (1, 1, 1, 13)])
def test_leading_shapes(shape):
    tensors = make(3, 2)
    x = torch.randn(shape, dtype=torch.float64)
    y = multihead_delta(**{**tensors, "x": x})
    expected = multihead_delta_reference(**{**tensors, "x": x.reshape(-1, 13)})
    assert y.shape == (*shape[:-1], 17)
    torch.testing.assert_close(y.reshape(-1, 17), expected)


def test_non_contiguous_input():
    tensors = make(2, 3)
    x = torch.randn(13, 4, 6, dtype=torch.float64).permute(1, 2, 0)
    assert not x.is_contiguous()
    torch.testing.assert_close(
        multihead_delta(**{**tensors, "x": x}), multihead_delta(**{**tensors, "x": x.contiguous()})
    )


def test_no_mask_without_a_seed():
    tensors = make(2, 3)
    torch.testing.assert_close(multihead_delta(**tensors, dropout=0.5), multihead_delta(**tensors))


def test_head_dropout_is_unbiased():
    """The mean over seeds goes to the output without dropout."""
    tensors = {name: tensor.detach() for name, tensor in make(3, 4, tokens=2, anchor=False).items()}
    exact = multihead_delta(**tensors)
    draws = torch.stack([multihead_delta(**tensors, dropout=0.3, seed=seed) for seed in range(3000)])
    error = (draws.mean(0) - exact).abs() / (draws.std(0) / 3000**0.5)
    assert error.max() < 5


def test_no_tensor_of_output_size_for_each_head():
    """The largest tensor saved for backward is the input or the output's size, whatever the number of heads."""
    num_heads, tokens, d_out, d_in = 16, 64, 256, 32
    tensors = make(num_heads, 2, d_in=d_in, d_out=d_out, tokens=tokens)
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        multihead_delta(**tensors, dropout=0.2, seed=1)
    assert max(sizes) < num_heads * tokens * d_out / 4
    assert max(sizes) <= max(tokens * d_out, tensors["B"].numel() + d_out * 2)
