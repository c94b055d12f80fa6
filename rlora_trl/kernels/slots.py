"""Head weighting for a batch whose tokens have different adapters, which lie in the slots of a server.

A server such as vLLM keeps `down` and `up` of several adapters in buffers of one width M, multiplies each token by
those of its slot, and knows nothing of heads. This module is the step between its two products:

    u = down x  [M]         with down = [A - A0; R; A0]   (or [A; R] without an anchor)
    z           [M]         z_i = w_i (A - A0) x + (w_i - 1/N) A0 x   for each head, then A0 x
    delta = up z            with up = scaling [B_1 .. B_N, mean B - B0]

where w is the softmax of the logits R x, or of the K largest. Columns beyond these are zero. It is the function of
`rank_space.mix`; the rows A - A0 in place of A let a server that holds 16 bits round what training has changed, rather
than large terms that cancel.

A row of numbers says how each slot is packed, so that one launch with fixed arguments, which a CUDA graph can replay,
serves slots of R-LoRA of any size, slots of plain LoRA (z = u), and tokens without an adapter (z = 0).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import rank_space
from .fused import backend
from .operators import NAMESPACE


class SlotLayout(NamedTuple):
    """
    How the adapter of a slot is packed, a row of `layouts`.

    Args:
        num_heads (`int`, *optional*, defaults to `0`): N; 0 for plain LoRA or an empty slot, whose z is u.
        r (`int`, *optional*, defaults to `0`): Rank of each head.
        top_k (`int`, *optional*, defaults to `0`): Heads kept for each token; 0 keeps all.
        anchored (`int`, *optional*, defaults to `0`): 1 if there are rows of A0.
        shared (`int`, *optional*, defaults to `0`): 1 if all heads share one A.
    """

    num_heads: int = 0
    r: int = 0
    top_k: int = 0
    anchored: int = 0
    shared: int = 0

    @property
    def h_rows(self) -> int:
        """Rows of A, and of A0."""
        return self.r if self.shared else self.r * self.num_heads

    @property
    def down_rows(self) -> int:
        """Rows of `down`: A, R and A0."""
        return self.num_heads + self.h_rows * (1 + self.anchored)

    @property
    def up_columns(self) -> int:
        """Columns of `up`: those of the heads, and of the anchor."""
        return self.num_heads * self.r + self.h_rows * self.anchored


def mix_slots_torch(u: torch.Tensor, slots: torch.Tensor, layouts: torch.Tensor) -> torch.Tensor:
    """
    [`mix_slots`] in plain torch, without a decision that depends on values, so that it can be captured in a graph.
    """
    width, num_slots = u.shape[-1], layouts.shape[1]
    rows = layouts[:, slots.clamp(0, num_slots - 1)].unsqueeze(-1)  # [S, T, 5, 1]
    num_heads, r, top_k, anchored, shared = rows.long().unbind(2)  # [S, T, 1] each
    column = torch.arange(width, device=u.device)
    packed, heads_end = num_heads > 0, num_heads * r
    h_rows = torch.where(shared > 0, r, heads_end)
    anchor = h_rows + num_heads

    def columns_of_u(index: torch.Tensor) -> torch.Tensor:
        return u.gather(-1, index.clamp(0, width - 1).expand_as(u))

    # Head weights, and that of each column of z. Of equal logits the first counts as larger.
    logits = torch.where(packed & (column < num_heads), columns_of_u(h_rows + column), float("-inf"))
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    dropped = (top_k > 0) & (order.argsort(-1) >= top_k)
    logits = torch.where(packed, logits.masked_fill(dropped, float("-inf")), 0.0)
    head = (column // r.clamp(min=1)).clamp(max=width - 1).expand_as(u)
    w = logits.softmax(-1).gather(-1, head)  # [S, T, M]

    # z of the heads, then that of the anchor.
    place = torch.where(shared > 0, column % r.clamp(min=1), column)
    h0 = torch.where(anchored > 0, columns_of_u(anchor + place), 0.0)
    z = w * columns_of_u(place) + (w - 1.0 / num_heads.clamp(min=1).to(u.dtype)) * h0
    in_anchor = (anchored > 0) & (column < heads_end + h_rows)
    z_anchor = torch.where(in_anchor, columns_of_u(anchor + column - heads_end), 0.0)
    z = torch.where(packed, torch.where(column < heads_end, z, z_anchor), u)
    return torch.where(((slots >= 0) & (slots < num_slots))[:, None], z, 0.0)


def _mix_slots(u: torch.Tensor, slots: torch.Tensor, layouts: torch.Tensor) -> torch.Tensor:
    if backend(u.device, u.dtype) is not rank_space:
        from .triton_slots import mix_slots_triton

        return mix_slots_triton(u.contiguous(), slots.contiguous(), layouts.contiguous())
    return mix_slots_torch(u, slots, layouts)


def _define(name: str, schema: str, run: Callable) -> Any:
    """Register an operator that returns a tensor like its first argument; compilers don't look into it."""
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "CompositeExplicitAutograd", run)
    torch.library.register_fake(qualified, lambda u, *_: torch.empty_like(u))
    return getattr(getattr(torch.ops, NAMESPACE), name)


_operator = _define("mix_slots", "(Tensor u, Tensor slots, Tensor layouts) -> Tensor", _mix_slots)


def mix_slots(u: torch.Tensor, slots: torch.Tensor, layouts: torch.Tensor) -> torch.Tensor:
    """
    z from u for tokens of different adapters. Not differentiable.

    Args:
        u (`torch.Tensor` of shape `[S, T, M]`):
            Products with `down`, in float32 or float64, of S linear layers that read the same input.
        slots (`torch.Tensor` of shape `[T]`):
            Slot of each token, an integer; negative for a token without an adapter. Numbers from L on are treated
            alike: a server may leave the slots of the tokens that pad a batch uninitialized.
        layouts (`torch.Tensor` of shape `[S, L, 5]`, int32):
            A [`SlotLayout`] for each layer and slot.

    Returns:
        `torch.Tensor` of shape `[S, T, M]`, like `u`.
    """
    return _operator(u, slots, layouts)
