"""Shared by the tests of the kernels: the device under test, and the fused function with plain arguments."""

import os

import torch

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
    weight=None,
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
    return fused.fused_delta(x, A, B, router, anchor_A, anchor_B, logits, base, weight, spec)
