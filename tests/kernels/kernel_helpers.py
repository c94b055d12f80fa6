"""Shared by the tests of the kernels: the device under test, and the fused function with plain arguments."""

import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlora_trl.kernels import fused, rank_space


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def fused_multihead(
    x,
    A,
    B,
    router=None,
    anchor_A=None,
    anchor_B=None,
    *,
    base=None,
    scaling=1.0,
    dropout=0.0,
    seed=None,
    inplace=False,
    logits=None,
    top_k=0,
    probe=None,
):
    """`fused.fused_delta` with the layout that the tensors imply, called like `multihead_delta`."""
    routed = router is not None or logits is not None
    spec = fused.DeltaSpec(
        rank_space.layout_of(A, B, routed=routed, anchor_A=anchor_A, top_k=top_k),
        scaling,
        dropout if seed is not None else 0.0,
        seed if dropout > 0.0 else None,
        inplace,
        probe,
    )
    return fused.fused_delta(x, A, B, router, anchor_A, anchor_B, logits, base, spec)


# Relative RMS error against float64. float32: sums of a few dozen products. 16 bits: one rounding is 2**-9 (bfloat16)
# or 2**-12 (float16), and a result passes through three of them; the router's gradient is a difference of heads, which
# doubles it.
TOLERANCE = {
    torch.float64: {"": 1e-12},
    torch.float32: {"": 2e-6, "router": 1e-5, "logits": 1e-5},
    torch.bfloat16: {"": 1.5e-2, "router": 3e-2, "logits": 3e-2},
    torch.float16: {"": 1.5e-3, "router": 4e-3, "logits": 4e-3},
}


def make(size, dtype, routed=True, anchored=True, shared=True, task_logits=False):
    num_heads, r, d_in, d_out, tokens = size
    scale = {"x": 1.0, "B": r**-0.5, "anchor_B": r**-0.5, "logits": 1.0}
    heads = () if shared else (num_heads,)
    shapes = {"x": (tokens, d_in), "A": (*heads, r, d_in), "B": (num_heads, d_out, r)}
    shapes |= {"router": (num_heads, d_in)} if routed and not task_logits else {}
    shapes |= {"anchor_A": (*heads, r, d_in), "anchor_B": (*heads, d_out, r)} if anchored else {}
    shapes |= {"logits": (tokens, num_heads)} if task_logits else {}
    weight_dtype = dtype if dtype == torch.float64 else torch.float32
    return {
        name: (scale.get(name, d_in**-0.5) * torch.randn(shape, dtype=torch.float64))
        .to(DEVICE, dtype if name == "x" else weight_dtype)
        .requires_grad_(not name.startswith("anchor"))
        for name, shape in shapes.items()
    }


def relative_error(a, b):
    return ((a.double().cpu() - b).norm() / b.norm().clamp(min=1e-12)).item()


class CountedProducts(TorchDispatchMode):
    """Counts the matrix products with as many output columns as a layer has."""

    def __init__(self, columns):
        super().__init__()
        self.columns, self.count = columns, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        self.count += func.overloadpacket in products and result.shape[-1] == self.columns
        return result
