"""Products grouped by expert, and the deltas of experts, against one expert at a time in float64."""

import pytest
import torch
from kernel_helpers import DEVICE, INTERPRETED, TOLERANCE, relative_error

from rlora_trl.kernels import RoutingStats, RoutingTally, balance_loss, capture_loss_grad, grouped, rank_space
from rlora_trl.kernels.dropout import keep_mask
from rlora_trl.kernels.reference import multihead_delta_reference


if INTERPRETED or DEVICE == "cuda":
    pytest.importorskip("rlora_trl.kernels.triton_grouped", reason="needs Triton")

# Rows by expert: none, one, tiles of 64 less one, exactly, and more; all rows with one expert; no rows at all.
COUNTS = {"mixed": [0, 1, 63, 64, 130, 0, 5], "last": [0, 0, 70], "one": [17], "none": [0, 0]}
# Heads, rank, inputs, outputs: odd, prime and wide sizes.
SIZES = {"small": (3, 4, 37, 50), "wide": (10, 16, 160, 131), "one_head": (1, 2, 64, 16)}
DTYPES = [torch.float32, torch.bfloat16] if INTERPRETED or DEVICE == "cuda" else [torch.float64, torch.float32]


@pytest.fixture(autouse=True)
def _triton(monkeypatch):
    if INTERPRETED:
        monkeypatch.setenv("RLORA_TRL_KERNELS", "triton")


def groups_of(counts):
    return grouped.RowGroups(offsets=torch.tensor(counts, device=DEVICE).cumsum(0).to(torch.int32))


def draw(*shape, dtype, scale=1.0):
    return (torch.randn(shape, dtype=torch.float64) * scale).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("narrow", "wide"), [(11, 37), (16, 300), (176, 131)])
def test_products_are_those_of_each_expert(dtype, counts, narrow, wide, poisoned_allocations):
    counts = COUNTS[counts]
    groups, rows, experts = groups_of(counts), sum(counts), len(counts)
    down = draw(experts, narrow, wide, dtype=dtype, scale=wide**-0.5)
    up = draw(experts, wide, narrow, dtype=dtype, scale=narrow**-0.5)
    x, z, start = draw(rows, wide, dtype=dtype), draw(rows, narrow, dtype=dtype), draw(rows, wide, dtype=dtype)

    pieces = [slice(end - count, end) for count, end in zip(counts, groups.offsets.tolist(), strict=True)]
    actual = {
        "narrow": grouped.grouped_product(x, down, groups),
        "wide": grouped.grouped_product(z, up, groups),
        "transposed": grouped.grouped_product(z, down.transpose(1, 2), groups),
        "slice": grouped.grouped_product(x, down[:, 1:5], groups),
        "added": grouped.add_product(start.clone(), z, up, groups),
        "outer": grouped.grouped_outer(z, x, groups, experts),
        "outer_transposed": grouped.grouped_outer(x, z, groups, experts),
    }
    down, up, x, z, start = (t.double().cpu() for t in (down, up, x, z, start))

    def by_expert(product):
        return torch.cat([product(e, piece) for e, piece in enumerate(pieces)])

    expected = {
        "narrow": by_expert(lambda e, piece: x[piece] @ down[e].T),
        "wide": by_expert(lambda e, piece: z[piece] @ up[e].T),
        "transposed": by_expert(lambda e, piece: z[piece] @ down[e]),
        "slice": by_expert(lambda e, piece: x[piece] @ down[e, 1:5].T),
        "added": by_expert(lambda e, piece: start[piece] + z[piece] @ up[e].T),
        "outer": torch.stack([z[piece].T @ x[piece] for piece in pieces]),
        "outer_transposed": torch.stack([x[piece].T @ z[piece] for piece in pieces]),
    }
    for name, tensor in actual.items():
        assert tensor.shape == expected[name].shape, name
        assert relative_error(tensor, expected[name]) <= TOLERANCE[dtype][""], name


def parameters(size, experts, dtype, *, shared=True, routed=True, anchored=True):
    heads, r, d_in, d_out = size
    own = () if shared else (heads,)
    return {
        "A": draw(experts, *own, r, d_in, dtype=dtype, scale=d_in**-0.5).requires_grad_(),
        "B": draw(experts, heads, d_out, r, dtype=dtype, scale=r**-0.5).requires_grad_(),
        "router": draw(experts, heads, d_in, dtype=dtype, scale=d_in**-0.5).requires_grad_() if routed else None,
        "anchor_A": draw(experts, *own, r, d_in, dtype=dtype, scale=d_in**-0.5) if anchored else None,
        "anchor_B": draw(experts, *own, d_out, r, dtype=dtype, scale=r**-0.5) if anchored else None,
    }


KINDS = {
    "plain": {},
    "top_k": {"top_k": 2},
    "own_a": {"shared": False},
    "uniform": {"routed": False},
    "no_anchor": {"anchored": False},
    "logits": {"routed": False, "logits": True},
    "dropout": {"dropout": 0.3},
    "input": {"dropout": 0.3, "position": "input"},
}


def run(kind, size, counts, dtype, form):
    """The output and all gradients of one form, and the reference's."""
    kind = dict(KINDS[kind])
    top_k, logits = kind.pop("top_k", 0), kind.pop("logits", False)
    dropout, position = kind.pop("dropout", 0.0), kind.pop("position", "head")
    seed = 1234 if dropout else None
    experts, rows, (heads, r, d_in, d_out) = len(counts), sum(counts), size
    groups, scaling = groups_of(counts), 1.7
    wide = dtype if dtype == torch.float64 else torch.float32
    params = parameters(size, experts, wide, **kind)
    x = draw(rows, d_in, dtype=dtype).requires_grad_()
    own = draw(rows, heads, dtype=wide).requires_grad_() if logits else None
    W = draw(experts, d_out, d_in, dtype=dtype, scale=d_in**-0.5)
    dy = draw(rows, d_out, dtype=dtype)
    layout = rank_space.Layout(
        heads,
        r,
        logits or params["router"] is not None,
        params["anchor_A"] is not None,
        kind.get("shared", True),
        top_k,
    )
    inputs = {"x": x, "A": params["A"], "B": params["B"], "router": params["router"], "logits": own}
    inputs = {name: tensor for name, tensor in inputs.items() if tensor is not None}

    weights = grouped.concat_experts(*params.values(), layout, scaling=scaling, multiple=16 if form == "fused" else 1)
    if form == "composed":
        base = grouped.grouped_product(x, W, groups) if dtype == torch.float64 else loop_product(x, W, groups)
        y = base + grouped.grouped_delta(
            x, weights, groups, dropout=dropout, seed=seed, dropout_position=position, logits=own
        )
    else:
        call = grouped.GroupedCall(
            *(groups, layout, weights.initial_A, dropout, seed),
            lambda rows: loop_product(rows, W, groups),
            lambda rows: loop_product(rows, W.transpose(1, 2), groups),
        )
        y = grouped.fused_grouped(x, weights, own, call)
    grads = torch.autograd.grad(y, list(inputs.values()), dy)

    # The reference, in float64 on the CPU.
    wides = {name: tensor.detach().double().cpu().requires_grad_() for name, tensor in inputs.items()}
    anchors = [None if params[n] is None else params[n].double().cpu() for n in ("anchor_A", "anchor_B")]
    shape = (rows, heads, r) if position == "head" else (rows, d_in)
    mask = keep_mask(seed, shape, dropout).double() if dropout else None
    expected, start = [], 0
    for e, count in enumerate(counts):
        piece = slice(start, start + count)
        masks = {} if mask is None else {f"{position}_masks" if position == "head" else "input_mask": mask[piece]}
        expected.append(
            wides["x"][piece] @ W[e].double().cpu().T
            + multihead_delta_reference(
                wides["x"][piece],
                wides["A"][e],
                wides["B"][e],
                wides["router"][e] if "router" in wides else None,
                *(None if anchor is None else anchor[e] for anchor in anchors),
                scaling=scaling,
                dropout=dropout,
                logits=wides["logits"][piece] if "logits" in wides else None,
                top_k=top_k,
                **masks,
            )
        )
        start += count
    expected = torch.cat(expected)
    expected_grads = torch.autograd.grad(expected, list(wides.values()), dy.double().cpu(), allow_unused=True)
    results = {"y": (y, expected)}
    return results | {
        name: (grad, torch.zeros_like(wide) if want is None else want)
        for (name, wide), grad, want in zip(wides.items(), grads, expected_grads, strict=True)
    }


def loop_product(x, W, groups):
    pieces = [x[start:end] @ W[e].T for e, start, end in groups.segments(len(x))]
    return torch.cat(pieces) if pieces else x.new_zeros(0, W.shape[1])


# Against float64, relative: sixteen bits lose half of the digits of a difference of heads; see `TOLERANCE`.
@pytest.mark.parametrize("form", ["composed", "fused"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_deltas_and_gradients_are_those_of_each_expert(kind, size, dtype, form):
    if form == "fused" and kind == "input":
        pytest.skip("dropout on the input is composed")
    if kind == "top_k" and SIZES[size][0] < 3:
        pytest.skip("one head")
    torch.manual_seed(0)
    for name, (actual, expected) in run(kind, SIZES[size], COUNTS["mixed"], dtype, form).items():
        limit = TOLERANCE[dtype].get(name, TOLERANCE[dtype][""])
        if name in ("router", "logits") and SIZES[size][0] == 1:
            assert actual.abs().max() <= limit  # one head has nothing to choose
        elif kind == "top_k" and dtype == torch.bfloat16:
            continue  # rounded logits select other heads
        else:
            assert relative_error(actual, expected) <= limit, name


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("form", ["composed", "fused"])
def test_gradcheck(form, shared):
    torch.manual_seed(1)
    size, counts = (2, 3, 5, 4), [2, 0, 3]
    params = parameters(size, 3, torch.float64, shared=shared)
    groups, W = groups_of(counts), draw(3, 4, 5, dtype=torch.float64)
    layout = rank_space.Layout(2, 3, True, True, shared)
    x = draw(5, 5, dtype=torch.float64).requires_grad_()

    def function(x, A, B, router):
        weights = grouped.concat_experts(
            A, B, router, params["anchor_A"], params["anchor_B"], layout, scaling=1.3, multiple=4
        )
        if form == "composed":
            return grouped.grouped_delta(x, weights, groups, dropout=0.2, seed=5)
        call = grouped.GroupedCall(
            *(groups, layout, weights.initial_A, 0.2, 5),
            lambda rows: grouped.grouped_product(rows, W, groups),
            lambda rows: grouped.grouped_product(rows, W.transpose(1, 2), groups),
        )
        return grouped.fused_grouped(x, weights, None, call)

    assert torch.autograd.gradcheck(function, (x, params["A"], params["B"], params["router"]))


@pytest.mark.parametrize("form", ["composed", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_at_its_initial_values_adds_nothing(form, dtype):
    torch.manual_seed(2)
    counts = COUNTS["mixed"]
    params = parameters(SIZES["small"], len(counts), torch.float32)
    params["router"] = torch.zeros_like(params["router"])
    params["anchor_A"] = params["A"].detach()
    params["anchor_B"] = rank_space.mean_of_heads(params["B"].detach())
    layout = rank_space.Layout(3, 4)
    weights = grouped.concat_experts(*params.values(), layout, scaling=2.0, multiple=16)
    x, groups = draw(sum(counts), 37, dtype=dtype), groups_of(counts)
    W = draw(len(counts), 50, 37, dtype=dtype)
    base = loop_product(x, W, groups)
    if form == "composed":
        y = base + grouped.grouped_delta(x, weights, groups)
    else:
        product = lambda rows: loop_product(rows, W, groups)  # noqa: E731
        call = grouped.GroupedCall(groups, layout, weights.initial_A, 0.0, None, product, product)
        y = grouped.fused_grouped(x, weights, None, call)
    assert torch.equal(y, base)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", ["composed", "fused", "one_by_one"])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("kind", ["switch", "importance", "mutual_information", "z"])
def test_balance_losses_are_those_of_each_expert(kind, counts, form, masked):
    counts, (heads, r, d_in, d_out), per_token = COUNTS[counts], SIZES["small"], 2
    dtype = torch.float32 if INTERPRETED or DEVICE == "cuda" else torch.float64
    params, rows = parameters(SIZES["small"], len(counts), dtype), sum(counts)
    layout = rank_space.Layout(heads, r)
    weights = grouped.concat_experts(*params.values(), layout, scaling=1.7)
    x, W = draw(rows, d_in, dtype=dtype).requires_grad_(), draw(len(counts), d_out, d_in, dtype=dtype)
    mask = (torch.arange(rows, device=DEVICE) % 3 > 0) if masked else None
    ends = torch.tensor(counts).cumsum(0).tolist()
    pieces = [(end - count, end) for count, end in zip(counts, ends, strict=True)]

    stats = RoutingStats.zeros(2 + len(counts), heads, DEVICE)
    stats = stats._replace(data=stats.data.to(dtype))
    counted = rows if mask is None else int(mask.sum())
    tally = RoutingTally(stats, kind, 0.7 / max(counted / per_token, 1.0))
    probe = grouped.ExpertsProbe(tally, 2, groups_of(counts), len(counts), per_token, mask)
    if form == "composed":
        y = grouped.grouped_delta(x, weights, probe.groups, probe=probe)
    elif form == "fused":
        product = lambda rows: loop_product(rows, W, probe.groups)  # noqa: E731
        back = lambda rows: loop_product(rows, W.transpose(1, 2), probe.groups)  # noqa: E731
        call = grouped.GroupedCall(probe.groups, layout, weights.initial_A, 0.0, None, product, back, probe)
        y = grouped.fused_grouped(x, weights, None, call)
    else:
        parts = []
        for expert, (start, end) in enumerate(pieces):
            one = grouped.RowGroups(expert=expert)
            own = probe._replace(groups=one, counts=None if mask is None else mask[start:end])
            parts.append(grouped.grouped_delta(x[start:end], weights, one, probe=own))
        y = torch.cat(parts)
    actual = torch.autograd.grad(capture_loss_grad(0.0 * y.sum(), tally), [x, params["router"]])

    formula = 0.0 * x.sum() + 0.0 * params["router"].sum()
    for expert, (start, end) in enumerate(pieces):
        part, own = x[start:end], None if mask is None else mask[start:end]
        size = len(part) if own is None else int(own.sum())
        if size:
            loss = balance_loss(part @ params["router"][expert].T, kind, own)
            formula = formula + size / counted * loss
            assert (stats.loss / stats.tokens)[2 + expert].item() == pytest.approx(loss.item(), rel=1e-4, abs=1e-5)
    assert stats.tokens.sum() == counted and not stats.data[:2].any()
    for a, b in zip(actual, torch.autograd.grad(0.7 * formula, [x, params["router"]]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-9 if dtype == torch.float64 else 2e-6)


def test_rows_are_sorted_by_expert():
    experts = torch.tensor([2, 0, 2, 1, 0], device=DEVICE)
    order, groups = grouped.sort_by_expert(experts, 4)
    assert experts[order].tolist() == [0, 0, 1, 2, 2]
    assert order.tolist() == [1, 4, 3, 0, 2]  # equal ones keep their order
    assert groups.offsets.tolist() == [2, 3, 5, 5]
