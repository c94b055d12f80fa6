"""The fused function against the fp64 reference, with both back ends: torch twins, and Triton in its interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.checkpoint
from kernel_helpers import DEVICE, INTERPRETED, TOLERANCE, CountedProducts, fused_multihead, make, relative_error

from rlora_trl import MultiHeadAdapter
from rlora_trl.kernels import fused, keep_mask
from rlora_trl.kernels.rank_space import Layout
from rlora_trl.kernels.reference import multihead_delta_reference


pytestmark = pytest.mark.usefixtures("poisoned_allocations")
TRAINED = ("x", "A", "B", "router", "logits")
# (N, r, d_in, d_out, tokens): one head; odd and prime sizes; a rank that needs no padding; more tokens than a block,
# and one more or one less than a multiple of it; a single token, as in decoding.
SIZES = [
    (1, 1, 8, 8, 5),
    (3, 4, 13, 17, 67),
    (2, 5, 31, 7, 64),
    (8, 3, 16, 48, 129),
    (5, 16, 24, 40, 63),
    (10, 4, 9, 11, 1),
]


def compare(tensors, dtype, *, dropout=0.0, seed=None, mode="alone", top_k=0):
    num_heads, d_out, r = tensors["B"].shape
    extra = {}
    if mode != "alone":
        source = torch.randn(tensors["x"].shape[0], d_out, dtype=torch.float64).to(DEVICE, dtype).requires_grad_(True)
        extra = {"base": source * 1.0, "inplace": mode == "inplace"}
    y = fused_multihead(**tensors, scaling=1.7, dropout=dropout, seed=seed, top_k=top_k, **extra)
    names = [name for name in TRAINED if name in tensors]
    upstream = torch.randn_like(y)
    inputs = [tensors[name] for name in names] + ([source] if mode in ("base", "inplace") else [])
    grads = torch.autograd.grad(y, inputs, upstream)

    wide = {name: t.detach().double().cpu().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    masks = None if seed is None else keep_mask(seed, (tensors["x"].shape[0], num_heads, r), dropout)
    expected = multihead_delta_reference(**wide, scaling=1.7, dropout=dropout, head_masks=masks, top_k=top_k)
    if mode != "alone":
        expected = expected + source.detach().double().cpu()
    expected_grads = torch.autograd.grad(expected, [wide[name] for name in names], upstream.double().cpu())
    tolerance = TOLERANCE[dtype]
    assert y.dtype == dtype
    assert relative_error(y, expected) < tolerance[""]
    for name, grad, expected_grad in zip(names, grads, expected_grads, strict=False):
        assert grad.dtype == tensors[name].dtype and grad.shape == tensors[name].shape
        if name in ("router", "logits") and num_heads == 1:
            assert grad.abs().max() == 0 or grad.abs().max() < 1e-6
        else:
            assert relative_error(grad, expected_grad) < tolerance.get(name, tolerance[""]), name
    if mode in ("base", "inplace"):
        assert torch.equal(grads[-1], upstream)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_against_reference(size, dtype):
    compare(make(size, dtype), dtype, dropout=0.3, seed=123456789)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("mode", ["alone", "base", "inplace"])
def test_variants(mode, anchored, routed, dropout):
    tensors = make((3, 4, 13, 17, 67), torch.float32, routed, anchored)
    compare(tensors, torch.float32, dropout=dropout, seed=2**60 + 7 if dropout else None, mode=mode)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_a_down_projection_for_each_head(size, dtype):
    compare(make(size, dtype, shared=False), dtype, dropout=0.3, seed=99)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("anchored", [True, False])
def test_variants_with_a_down_projection_for_each_head(anchored, routed, dropout):
    tensors = make((3, 4, 13, 17, 67), torch.float32, routed, anchored, shared=False)
    compare(tensors, torch.float32, dropout=dropout, seed=5 if dropout else None, mode="base")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("num_heads", "top_k"), [(3, 1), (3, 2), (3, 3), (8, 2), (5, 4)])
def test_top_k(num_heads, top_k, shared, dtype):
    tensors = make((num_heads, 4, 13, 17, 67), dtype, shared=shared)
    if top_k == 1:  # the kept head weighs 1 whatever its logit
        tensors["router"].requires_grad_(False)
        y = fused_multihead(**tensors, top_k=1)
        wide = {name: t.detach().double().cpu() for name, t in tensors.items()}
        assert relative_error(y, multihead_delta_reference(**wide, top_k=1)) < TOLERANCE[dtype][""]
    else:
        compare(tensors, dtype, dropout=0.3, seed=11, top_k=top_k)


def test_of_equal_logits_the_first_are_kept():
    tensors = make((4, 2, 8, 6, 70), torch.float32)
    tensors["router"] = torch.zeros_like(tensors["router"])
    first = {**tensors, "router": None, "B": tensors["B"][:2]}
    anchors = {"anchor_A": None, "anchor_B": None}
    y = fused_multihead(**{**tensors, **anchors}, top_k=2)
    torch.testing.assert_close(y, fused_multihead(**{**first, **anchors}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("anchored", [True, False])
def test_logits_of_tasks(anchored, dtype):
    tensors = make((3, 4, 13, 17, 67), dtype, anchored=anchored, task_logits=True)
    compare(tensors, dtype, dropout=0.3, seed=11, mode="base")


@pytest.mark.parametrize("num_heads", [1, 2, 3, 8])
def test_gradcheck(num_heads):
    tensors = make((num_heads, 3, 5, 4, 3), torch.float64)
    if DEVICE == "cuda":
        pytest.skip("float64 uses the torch twins, checked on the CPU")

    def function(x, A, B, router):
        anchor = {name: tensors[name] for name in ("anchor_A", "anchor_B")}
        return fused_multihead(x, A, B, router, **anchor, dropout=0.4, seed=5)

    assert torch.autograd.gradcheck(function, [tensors[name] for name in TRAINED[:4]])


@pytest.mark.parametrize("shape", [(13,), (2, 3, 13), (0, 13), (2, 0, 13)])
def test_leading_shapes_and_empty_inputs(shape):
    tensors = make((3, 4, 13, 17, 1), torch.float32)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    y = fused_multihead(**{**tensors, "x": x}, dropout=0.2, seed=3)
    assert y.shape == (*shape[:-1], 17)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(torch.isfinite(tensors[name].grad).all() for name in ("A", "B", "router"))


def test_non_contiguous_input_and_gradient():
    tensors = make((3, 4, 13, 17, 1), torch.float32)
    x = torch.randn(13, 4, 6, device=DEVICE).permute(1, 2, 0)
    outputs, grads = [], []
    for value in (x, x.contiguous()):
        leaf = value.detach().requires_grad_(True)
        y = fused_multihead(**{**tensors, "x": leaf})
        upstream = torch.arange(17 * 24, device=DEVICE, dtype=torch.float32).view(17, 4, 6).permute(1, 2, 0)
        grads.append(torch.autograd.grad(y, leaf, upstream)[0])
        outputs.append(y)
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(grads[0], grads[1])


def test_only_the_gradients_that_are_needed():
    tensors = make((3, 4, 13, 17, 8), torch.float32)
    for trained in TRAINED[:4]:
        for name in TRAINED[:4]:
            tensors[name].requires_grad_(name == trained)
            tensors[name].grad = None
        fused_multihead(**tensors).sum().backward()
        assert [name for name in TRAINED[:4] if tensors[name].grad is not None] == [trained]


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_saved_for_backward(routed, dropout):
    """x, the [T, 2r + N] projections, the concatenated weights; no mask, and nothing of the size of the output."""
    size = num_heads, r, d_in, d_out, tokens = (5, 4, 32, 64, 100)
    tensors = make(size, torch.bfloat16 if DEVICE == "cuda" else torch.float32, routed)
    saved = []

    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused_multihead(**tensors, dropout=dropout, seed=1 if dropout else None)
    size_of_element = tensors["x"].element_size()
    saved_bytes = sum(t.numel() * t.element_size() for t in saved)
    layout = Layout(num_heads, r, routed, anchored=True)
    columns, mixture = fused.widths(layout, torch.device(DEVICE))
    assert columns >= 2 * r + num_heads * routed
    assert saved_bytes == size_of_element * (tokens * (d_in + columns) + columns * d_in + mixture * d_out)


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize(("shared", "top_k", "task_logits"), [(False, 0, False), (True, 2, False), (True, 0, True)])
def test_inference_of_the_other_kinds(shared, top_k, task_logits, tokens):
    made = make((3, 4, 13, 17, tokens), torch.float32, shared=shared, task_logits=task_logits)
    weights = {name: t.detach() for name, t in made.items()}
    x, logits = weights.pop("x"), weights.pop("logits", None)
    spec = fused.DeltaSpec(Layout(3, 4, shared=shared, top_k=top_k), 1.7)
    names = ("A", "B", "router", "anchor_A", "anchor_B")
    delta = fused.InferenceDelta(fused.concat_weights(*map(weights.get, names), spec, torch.float32))
    expected = fused_multihead(x, **weights, scaling=1.7, logits=logits, top_k=top_k)
    torch.testing.assert_close(delta.apply(x, logits=logits), expected)


@pytest.mark.parametrize("tokens", [1, 9, 40])
@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("anchored", [True, False])
def test_inference(anchored, routed, tokens):
    tensors = {name: t.detach() for name, t in make((3, 4, 13, 17, tokens), torch.float32, routed, anchored).items()}
    x, weights = tensors.pop("x"), tensors
    spec = fused.DeltaSpec(Layout(3, 4, routed, anchored), 1.7)
    names = ("A", "B", "router", "anchor_A", "anchor_B")
    delta = fused.InferenceDelta(fused.concat_weights(*map(weights.get, names), spec, torch.float32))
    expected = fused_multihead(x, **weights, scaling=1.7)
    base = torch.randn(tokens, 17, device=DEVICE)
    torch.testing.assert_close(delta.apply(x), expected)
    torch.testing.assert_close(delta.apply(x, base), base + expected)
    written = base.clone()
    assert delta.apply(x, written, inplace=True) is written
    torch.testing.assert_close(written, base + expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("routed", "anchored", "shared"),
    [(True, True, True), (False, True, True), (True, False, False), (True, True, False)],
)
def test_layers_concatenated_together_are_those_concatenated_one_by_one(routed, anchored, shared, dtype):
    names = ("A", "B", "router", "anchor_A", "anchor_B")
    layers = []
    for _ in range(3):
        tensors = make((3, 4, 13, 170, 1), dtype, routed, anchored, shared)
        layers.append(tuple(tensors[name].detach() if name in tensors else None for name in names))
    spec = fused.DeltaSpec(Layout(3, 4, routed, anchored, shared), 1.7)
    expected = [fused.concat_weights(*tensors, spec, dtype) for tensors in layers]
    for addresses in (None, expected[0].ops.addresses_of(layers)):
        for together, alone in zip(fused.concat_layers(layers, addresses, spec, dtype), expected, strict=True):
            assert together[4:] == alone[4:]
            for tensor, one_by_one in zip(together[:4], alone[:4], strict=True):
                assert torch.equal(tensor, one_by_one) and tensor.stride() == one_by_one.stride()


def test_matrices_below_each_other():
    names = ("A", "B", "router", "anchor_A", "anchor_B")
    layers = [tuple(make((3, 4, 13, 17, 1), torch.float32).get(name) for name in names) for _ in range(4)]
    with torch.no_grad():
        together = fused.concat_layers(layers, None, fused.DeltaSpec(Layout(3, 4), 1.7), torch.float32)
    for places in ([1], [1, 2], [0, 1, 2], [2, 1], [0, 3]):
        below = fused.below_each_other([(together, place) for place in places])
        assert torch.equal(below, torch.cat([together[place].down for place in places]))
        in_order = places == list(range(places[0], places[-1] + 1))
        assert (below.untyped_storage().data_ptr() == together.downs.untyped_storage().data_ptr()) == in_order


def test_an_input_that_must_be_copied_is_saved_once():
    """An input with strided rows is saved itself, not as a copy beside it."""
    tensors = make((3, 4, 13, 17, 20), torch.float32)
    x = tensors.pop("x").detach().view(4, 5, 13).transpose(0, 1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fused_multihead(x, **tensors)
    assert any(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for t in saved)
    assert not any(t.numel() == x.numel() and t.is_contiguous() for t in saved)
    expected = fused_multihead(x.contiguous(), **tensors)
    upstream = torch.randn_like(y)
    inputs = [tensors[name] for name in ("A", "B", "router")]
    for actual, reference in zip(
        torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(actual, reference)


def test_gradients_of_parameters_lie_as_the_parameters_do():
    """The gradient of B is made in another order; optimizers that run over flat memory need this one."""
    tensors = make((3, 4, 13, 17, 67), torch.float32)
    for _ in range(2):  # the second is added to the first
        fused_multihead(**tensors).square().sum().backward()
    for name in ("A", "B", "router"):
        assert tensors[name].grad.stride() == tensors[name].stride(), name
    once = {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    fused_multihead(**once).square().sum().backward()
    torch.testing.assert_close(tensors["B"].grad, 2 * once["B"].grad)


@pytest.mark.parametrize("mode", ["alone", "base"])
def test_a_recomputation_skips_the_unused_output(mode):
    """As for a plain frozen layer at the end of a checkpointed block, whose product is not run a second time."""
    tensors = make((3, 4, 13, 17, 67), torch.float32)
    extra = {} if mode == "alone" else {"base": torch.randn(67, 17, device=DEVICE)}
    y = torch.utils.checkpoint.checkpoint(lambda: fused_multihead(**tensors, **extra), use_reentrant=False)
    names = ("x", "A", "B", "router")
    expected = torch.autograd.grad(
        fused_multihead(**tensors, **extra).square().sum(), [tensors[name] for name in names]
    )
    with CountedProducts(columns=17) as counted:
        actual = torch.autograd.grad(y.square().sum(), [tensors[name] for name in names])
    assert counted.count == 0
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["alone", "base"])
def test_autocast(mode):
    """An adapter computes in the dtype of autocast; gradients are in the dtype of the parameters."""
    adapter = MultiHeadAdapter(13, 17, 4, 3, 1.7, init_weights=False).to(DEVICE).train()
    x, extra = torch.randn(67, 13, device=DEVICE, requires_grad=True), {}
    if mode != "alone":
        extra["base"] = torch.randn(67, 17, device=DEVICE, dtype=torch.bfloat16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = adapter(x, **extra)
    expected = adapter(x.bfloat16(), **extra)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    y.float().square().sum().backward()
    assert x.grad.dtype == adapter.A.grad.dtype == torch.float32


def test_errors(monkeypatch):
    tensors = make((3, 4, 13, 17, 9), torch.float32)
    monkeypatch.setenv(fused.KERNELS_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="must be one of auto, triton, torch, got 'cuda'"):
        fused_multihead(**tensors)
    monkeypatch.setenv(fused.KERNELS_VARIABLE, "triton")
    monkeypatch.setattr(fused, "_triton_ops", lambda: None)
    with pytest.raises(ImportError, match="pip install triton"):
        fused_multihead(**tensors)
    monkeypatch.setenv(fused.KERNELS_VARIABLE, "torch")
    fused_multihead(**tensors)


IN_INTERPRETER = [
    "kernels/test_fused.py",
    "kernels/test_balance.py",
    "kernels/test_rank_space.py",
    "kernels/test_triton_ops.py",
    "kernels/test_joint.py",
    "kernels/test_four_bit.py",
    "kernels/test_slots.py",
    "tuner/test_prefetch.py",
]


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="runs this file again, in the interpreter")
@pytest.mark.parametrize("name", IN_INTERPRETER)
def test_triton_in_its_interpreter(name):
    """This and other files once more with Triton's kernels, interpreted on the CPU."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", fused.KERNELS_VARIABLE: "triton", "PYTEST_XDIST_WORKER": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", f"tests/{name}"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
