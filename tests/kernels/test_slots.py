"""Head weighting for tokens of different adapters in one batch, against the equations in float64."""

import pytest
import torch
from kernel_helpers import DEVICE, INTERPRETED

from rlora_trl.kernels.rank_space import mean_of_heads
from rlora_trl.kernels.reference import multihead_delta_reference
from rlora_trl.kernels.slots import SlotLayout, mix_slots, mix_slots_torch


if INTERPRETED or DEVICE == "cuda":
    pytest.importorskip("rlora_trl.kernels.triton_slots", reason="needs Triton")
DTYPE = torch.float32 if INTERPRETED or DEVICE == "cuda" else torch.float64

D_IN, D_OUT, WIDTH = 24, 18, 40
# Slots of one buffer; `None` is plain LoRA, whose rank is less than the width too.
SLOTS = [
    SlotLayout(3, 4, 0, 1, 1),
    None,
    SlotLayout(5, 2, 2, 1, 1),
    SlotLayout(2, 3, 0, 1, 0),
    SlotLayout(4, 5, 3, 0, 1),
    SlotLayout(3, 4, 2, 0, 0),
    SlotLayout(),  # empty
    SlotLayout(1, 1, 0, 1, 1),
]


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    if INTERPRETED:
        monkeypatch.setenv("RLORA_TRL_KERNELS", "triton")


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def adapter(layout):
    """A, B, router, A0 and B0."""
    heads = () if layout.shared else (layout.num_heads,)
    A, A0 = draw(*heads, layout.r, D_IN), draw(*heads, layout.r, D_IN)
    B, B0 = draw(layout.num_heads, D_OUT, layout.r), draw(*heads, D_OUT, layout.r)
    return (A, B, draw(layout.num_heads, D_IN), *((A0, B0) if layout.anchored else (None, None)))


def packed(layout, A, B, R, A0, B0):
    """`down` and `up` with scaling 1, written out by head."""
    N = layout.num_heads
    downs = [R] if A0 is None else [R, A0.reshape(-1, D_IN)]
    down = torch.cat([(A if A0 is None else A - A0).reshape(-1, D_IN), *downs])
    up = list(B)
    if A0 is not None:
        up += [mean_of_heads(B) - B0] if layout.shared else list((B - B0) / N)
    return down, torch.cat(up, dim=1)


def slot_buffers():
    """`down` and `up` of all slots, padded with zeros; the layouts; and the delta of a token in each."""
    torch.manual_seed(0)
    downs, ups = torch.zeros(len(SLOTS), WIDTH, D_IN).double(), torch.zeros(len(SLOTS), D_OUT, WIDTH).double()
    deltas = []
    for slot, layout in enumerate(SLOTS):
        if layout is None:
            down, up = draw(7, D_IN), draw(D_OUT, 7)
            deltas.append(lambda x, down=down, up=up: x @ down.T @ up.T)
        elif layout.num_heads == 0:
            deltas.append(lambda x: torch.zeros(len(x), D_OUT, dtype=torch.float64))
            continue
        else:
            tensors = adapter(layout)
            down, up = packed(layout, *tensors)
            assert down.shape[0] == layout.down_rows and up.shape[1] == layout.up_columns
            deltas.append(lambda x, t=tensors, k=layout.top_k: multihead_delta_reference(x, *t, top_k=k))
        downs[slot, : len(down)], ups[slot, :, : up.shape[1]] = down, up
    layouts = torch.tensor([layout or SlotLayout() for layout in SLOTS], dtype=torch.int32)
    return downs, ups, layouts, deltas


def test_each_token_has_the_delta_of_its_slot():
    downs, ups, layouts, deltas = slot_buffers()
    slots = torch.tensor([*range(len(SLOTS)), -1, *range(len(SLOTS)), -1])
    x = draw(len(slots), D_IN)
    # Two layers that read the same input, such as gate and up; in the second the slots are in another order.
    u = torch.stack([torch.einsum("tmi,ti->tm", down[slots], x) for down in (downs, downs.flip(0))])
    layouts = torch.stack([layouts, layouts.flip(0)])
    z = mix_slots(u.to(DEVICE, DTYPE), slots.to(DEVICE), layouts.to(DEVICE)).cpu().double()

    tolerance = {"rtol": 1e-9, "atol": 1e-9} if DTYPE == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    assert z.shape == u.shape and bool((z[:, slots < 0] == 0).all())
    for layer, up in enumerate((ups, ups.flip(0))):
        functions = deltas if layer == 0 else deltas[::-1]
        for token, slot in enumerate(slots.tolist()):
            expected = functions[slot](x[token : token + 1])[0] if slot >= 0 else torch.zeros(D_OUT).double()
            torch.testing.assert_close(up[slot] @ z[layer, token], expected, **tolerance, msg=f"{layer} {slot}")


def test_of_equal_logits_the_first_are_kept():
    layout = SlotLayout(4, 2, 2, 0, 1)
    u = torch.zeros(1, 3, 16, device=DEVICE, dtype=DTYPE)
    u[..., :2] = 1.0
    u[0, 1, 5] = 1.0  # the logit of the last head is larger
    z = mix_slots(u, torch.zeros(3, device=DEVICE, dtype=torch.int32), torch.tensor([[layout]]).int().to(DEVICE))
    used = z[0].cpu().reshape(3, 8, 2)[:, :4, 0] > 0
    assert used.tolist() == [[True, True, False, False], [True, False, False, True], [True, True, False, False]]


def test_an_untrained_adapter_changes_nothing():
    """A = A0 and B = B0: the terms cancel before anything is rounded."""
    layout = SlotLayout(3, 4, 0, 1, 1)
    A, B, R, _, _ = adapter(layout)
    down, up = packed(layout, A, B, torch.zeros_like(R), A, mean_of_heads(B))
    u = (draw(5, D_IN) @ down.T).unsqueeze(0).to(DEVICE, torch.float32)
    u = torch.nn.functional.pad(u, (0, 16 - u.shape[-1]))
    z = mix_slots(u, torch.zeros(5, device=DEVICE, dtype=torch.long), torch.tensor([[layout]]).int().to(DEVICE))
    assert bool((z[..., : 3 * 4].abs() < 1e-7).all()) and bool((up[:, 12:] == 0).all())


def test_other_slots_do_not_matter():
    """What is left in the buffers of tokens without an adapter, or in other slots, doesn't reach a result."""
    downs, _, layouts, _ = slot_buffers()
    slots = torch.tensor([0, -1, 2])
    u = torch.einsum("tmi,ti->tm", downs[slots], draw(3, D_IN))
    u[1] = float("nan")
    z = mix_slots(u.unsqueeze(0).to(DEVICE, DTYPE), slots.to(DEVICE), layouts.unsqueeze(0).to(DEVICE))
    assert bool(z.isfinite().all())


def test_slots_that_were_never_written():
    """vLLM leaves those of the tokens that pad a batch uninitialized: they give zeros, and nothing else is read."""
    downs, _, layouts, _ = slot_buffers()
    slots = torch.tensor([0, len(SLOTS), 2**30, 2**31 - 1, -(2**31), 2], dtype=torch.int32)
    u = torch.einsum("tmi,ti->tm", downs[slots.clamp(0, 2).long()], draw(len(slots), D_IN)).to(DEVICE, DTYPE)
    layouts = layouts.unsqueeze(0).to(DEVICE)
    z = mix_slots(u.unsqueeze(0), slots.to(DEVICE), layouts)
    assert bool((z[:, 1:5] == 0).all())
    known = mix_slots(u[[0, 5]].unsqueeze(0), slots[[0, 5]].to(DEVICE), layouts)
    assert torch.equal(z[:, [0, 5]], known) and bool((known != 0).any())


def test_a_compiled_graph_has_no_break():
    downs, _, layouts, _ = slot_buffers()
    u = torch.randn(1, 4, WIDTH, device=DEVICE, dtype=DTYPE)
    slots = torch.tensor([0, 1, -1, 3], device=DEVICE)
    layouts = layouts.unsqueeze(0).to(DEVICE)
    compiled = torch.compile(lambda u: mix_slots(u, slots, layouts) + 1, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(u), mix_slots_torch(u, slots, layouts) + 1)
    torch.library.opcheck(torch.ops.rlora_trl.mix_slots, (u, slots, layouts))
