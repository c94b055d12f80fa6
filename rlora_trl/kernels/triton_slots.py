"""The Triton kernel of `slots.py`: one program for each token of each layer."""

import torch
import triton
import triton.language as tl


@triton.jit
def mix_slots_kernel(
    u_ptr,
    slots_ptr,
    layouts_ptr,
    z_ptr,
    tokens,
    num_slots,
    M: tl.constexpr,
    M2: tl.constexpr,
):
    """
    z_i = w_i u[A - A0] + (w_i - 1/N) u[A0] for each head, then u[A0], with w = softmax(u[R]).

    M2 is a power of two that covers M. All sizes of the adapter are read from memory: a graph replays the launch.
    """
    token = tl.program_id(0)
    layer = tl.program_id(1)
    column = tl.arange(0, M2)
    inside = column < M
    row = (layer.to(tl.int64) * tokens + token) * M
    slot = tl.load(slots_ptr + token).to(tl.int64)
    # The slots of the tokens that pad a batch may be uninitialized: only those in range are read.
    known = (slot >= 0) & (slot < num_slots)
    layout = layouts_ptr + (layer * num_slots + tl.where(known, slot, 0)) * 5
    N = tl.load(layout)

    if not known:
        tl.store(z_ptr + row + column, tl.zeros([M2], tl.float32), mask=inside)
    elif N == 0:
        tl.store(z_ptr + row + column, tl.load(u_ptr + row + column, mask=inside), mask=inside)
    else:
        r = tl.load(layout + 1)
        top_k = tl.load(layout + 2)
        anchored = tl.load(layout + 3) > 0
        shared = tl.load(layout + 4) > 0
        heads_end = N * r
        h_rows = tl.where(shared, r, heads_end)
        anchor = h_rows + N

        # Logits of all heads, and of the head of each column: registers can't be indexed.
        in_heads = column < heads_end
        head = column // r
        logits = tl.load(u_ptr + row + h_rows + column, mask=column < N, other=-float("inf"))
        own = tl.load(u_ptr + row + h_rows + head, mask=in_heads, other=0.0)
        kept = column < N
        own_kept = in_heads
        if top_k > 0:
            # The number of heads with a larger logit, or the same and a lower index.
            before = tl.zeros([M2], tl.int32)
            own_before = tl.zeros([M2], tl.int32)
            j = 0
            while j < N:  # not `range`, which Triton's interpreter refuses for numbers from memory
                other = tl.load(u_ptr + row + h_rows + j)
                before += tl.where((other > logits) | ((other == logits) & (j < column)), 1, 0)
                own_before += tl.where((other > own) | ((other == own) & (j < head)), 1, 0)
                j += 1
            kept = kept & (before < top_k)
            own_kept = own_kept & (own_before < top_k)
        top = tl.max(logits, axis=0)
        total = tl.sum(tl.where(kept, tl.exp(logits - top), 0.0), axis=0)
        w = tl.where(own_kept, tl.exp(own - top), 0.0) / total

        place = tl.where(shared, column % r, column)
        d = tl.load(u_ptr + row + place, mask=in_heads, other=0.0)
        h0 = tl.load(u_ptr + row + anchor + place, mask=in_heads & anchored, other=0.0)
        z = w * d + (w - 1.0 / N) * h0
        in_anchor = anchored & (column >= heads_end) & (column < heads_end + h_rows)
        z_anchor = tl.load(u_ptr + row + anchor + column - heads_end, mask=in_anchor, other=0.0)
        tl.store(z_ptr + row + column, tl.where(in_heads, z, z_anchor), mask=inside)


def mix_slots_triton(u: torch.Tensor, slots: torch.Tensor, layouts: torch.Tensor) -> torch.Tensor:
    """[`mix_slots`] on a GPU, for contiguous tensors and `u` in float32."""
    z = torch.empty_like(u)
    layers, tokens, width = u.shape
    if tokens:
        grid = (tokens, layers)
        mix_slots_kernel[grid](
            u, slots, layouts, z, tokens, layouts.shape[1], M=width, M2=triton.next_power_of_2(width), num_warps=1
        )
    return z
