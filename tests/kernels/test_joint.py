"""Groups of layers with the same input against the fp64 reference, with both back ends."""

import pytest
import torch
import torch.utils.checkpoint
from kernel_helpers import DEVICE, INTERPRETED, TOLERANCE, CountedProducts, make, relative_error

from rlora_trl.kernels import LayerProbe, RoutingStats, RoutingTally, fused, keep_mask, rank_space
from rlora_trl.kernels import joint as joint_module
from rlora_trl.kernels.joint import JointGroup, joint_outputs
from rlora_trl.kernels.joint_space import CallSettings
from rlora_trl.kernels.reference import multihead_delta_reference
from rlora_trl.tuner.task_tables import derivatives_of, task_tables


pytestmark = pytest.mark.usefixtures("poisoned_allocations")
NAMES = ("A", "B", "router", "anchor_A", "anchor_B")
SCALING = 1.7
# (N, r, d_in, tokens): one head; odd sizes; more tokens than a block; rows wider than a tile.
SIZES = [(1, 10, 8, 5), (3, 4, 37, 67), (2, 5, 31, 64), (10, 4, 24, 130), (4, 16, 24, 40), (10, 16, 24, 33)]
D_OUTS = (170, 40, 300)
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def make_group(size, members, dtype, *, biased=False, dropout=0.0, top_k=0, routers=(), tasks=None, row=-1, **kinds):
    """Tensors of each member, the input, the group and its settings."""
    num_heads, r, d_in, tokens = size
    layers = [make((num_heads, r, d_in, d_out, tokens), dtype, **kinds) for d_out in D_OUTS[:members]]
    x = layers[0]["x"]
    wide = [torch.randn(d_out, d_in, dtype=torch.float64) * d_in**-0.5 for d_out in D_OUTS[:members]]
    weights = [w.to(DEVICE, dtype) for w in wide]
    biases = [torch.randn(w.shape[0], device=DEVICE).to(dtype) if biased else None for w in weights]
    tensors = [tuple(layer.get(name) for name in NAMES) for layer in layers]
    layout = rank_space.layout_of(
        *tensors[0][:2], routed=tensors[0][2] is not None or bool(routers), anchor_A=tensors[0][3], top_k=top_k
    )
    group = JointGroup(tensors, weights, biases, layout, SCALING, dtype, routers)
    seeds = [2**61 + 12345 + place for place in range(members)] if dropout else []
    settings = CallSettings(dropout, seeds)
    if routers:
        tables = task_tables(routers)
        settings.tables, settings.of_mean = [t.logits for t in tables], derivatives_of(tables)
        if tasks is None:
            settings.row, settings.tables = row, [t.logits[row:][:1].clone() for t in tables]
        else:
            rows = torch.where(tasks < 0, len(routers[0]), tasks)
            settings.tasks, settings.one_hot = tasks, torch.nn.functional.one_hot(rows, len(routers[0]) + 1).to(dtype)
    return layers, x, group, settings


def expected_outputs(layers, x, group, settings, top_k=0):
    """The outputs in float64, and the tensors that gradients are wanted for."""
    x = x.detach().double().cpu().requires_grad_(True)
    outputs, trained = [], [x]
    for place, layer in enumerate(layers):
        wide = {name: layer[name].detach().double().cpu() for name in NAMES if name in layer}
        for name in ("A", "B", "router"):
            if name in wide:
                trained.append(wide[name].requires_grad_(True))
        mask = None
        if settings.seeds:
            shape = (x.shape[0], group.sizes.layout.num_heads, group.sizes.layout.r)
            mask = keep_mask(settings.seeds[place], shape, settings.dropout)
        if settings.tables:
            router = group.parameters[3 * place + 2].detach().double().cpu().requires_grad_(True)
            trained.append(router)
            table = torch.cat([router, router.softmax(-1).mean(0, keepdim=True).log()])
            rows = torch.full((x.shape[0],), settings.row) if settings.tasks is None else settings.tasks.cpu()
            wide["logits"] = table[rows]
        delta = multihead_delta_reference(
            x, **wide, scaling=SCALING, dropout=settings.dropout, head_masks=mask, top_k=top_k
        )
        bias = group.biases[place]
        shift = 0.0 if bias is None else bias.double().cpu()
        outputs.append(x @ group.weights[place].double().cpu().T + shift + delta)
    return outputs, trained


def compare(size, members, dtype, top_k=0, ahead=True, **options):
    layers, x, group, settings = make_group(size, members, dtype, top_k=top_k, **options)
    with torch.no_grad():
        downs, ups = group.concat() if ahead else (None, ())
    outputs = joint_outputs(x, group, settings, (), downs, ups)
    upstream = [torch.randn_like(y) for y in outputs]
    trained = [x, *[p for p in group.parameters if p is not None]]
    grads = torch.autograd.grad(outputs, trained, upstream)

    wanted, wide = expected_outputs(layers, x, group, settings, top_k)
    wanted_grads = torch.autograd.grad(wanted, wide, [dy.double().cpu() for dy in upstream])
    for y, expected in zip(outputs, wanted, strict=True):
        assert y.dtype == dtype and relative_error(y, expected) < TOLERANCE[dtype][""]
    routers = {id(parameter) for parameter in group.parameters[2::3]}
    for parameter, grad, expected in zip(trained, grads, wanted_grads, strict=True):
        assert grad.dtype == parameter.dtype and grad.shape == parameter.shape
        if id(parameter) in routers and size[0] == 1:
            assert grad.abs().max() < 1e-6
            continue
        tolerance = TOLERANCE[dtype]
        limit = tolerance.get("router", tolerance[""]) if id(parameter) in routers else tolerance[""]
        assert relative_error(grad, expected) < limit, tuple(parameter.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_against_reference(size, members, dtype):
    if INTERPRETED and size not in SIZES[:2] and (members, dtype) not in ((1, torch.float32), (2, torch.bfloat16)):
        pytest.skip("slow in the interpreter")
    compare(size, members, dtype, dropout=0.3)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_kinds_of_adapters(shared, anchored, routed, dropout):
    kinds = {"shared": shared, "anchored": anchored, "routed": routed}
    compare((3, 4, 13, 67), 2, torch.float32, dropout=dropout, biased=True, **kinds)


@pytest.mark.parametrize(("num_heads", "top_k"), [(3, 2), (8, 2), (5, 5)])
def test_top_k(num_heads, top_k):
    compare((num_heads, 4, 13, 67), 2, torch.float32, top_k=top_k, dropout=0.3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
def test_weights_that_were_not_concatenated_ahead(biased, dtype):
    compare((3, 4, 37, 67), 2, dtype, dropout=0.3, biased=biased, ahead=False)


@pytest.mark.parametrize("given", ["tasks", "one", "mean"])
def test_task_routers(given):
    routers = [torch.randn(4, 3, device=DEVICE, requires_grad=True) for _ in range(2)]
    tasks = torch.randint(-1, 4, (67,), device=DEVICE) if given == "tasks" else None
    row = 2 if given == "one" else -1
    compare((3, 4, 13, 67), 2, torch.float32, routed=False, routers=routers, tasks=tasks, row=row, dropout=0.3)


@pytest.mark.parametrize("tokens", [5000, 9000, 20000])
def test_many_tokens(tokens):
    if INTERPRETED or DEVICE == "cpu":
        pytest.skip("other tiles, on a GPU only")
    compare((3, 4, 256, tokens), 2, torch.float32, dropout=0.3)


@pytest.mark.parametrize("shape", [(2, 0, 13), (13,), (2, 3, 13)])
def test_leading_shapes_and_empty_inputs(shape):
    _, _, group, settings = make_group((3, 4, 13, 1), 2, torch.float32, dropout=0.2)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    outputs = joint_outputs(x, group, settings)
    assert [y.shape for y in outputs] == [(*shape[:-1], d_out) for d_out in D_OUTS[:2]]
    sum(y.sum() for y in outputs).backward()
    assert x.grad.shape == x.shape
    assert all(torch.isfinite(p.grad).all() for p in group.parameters)


def test_strided_inputs_and_gradients():
    """Gradients of sums are expanded scalars, and inputs may be transposed."""
    _, _, group, settings = make_group((3, 4, 13, 1), 2, torch.float32)
    found = []
    x = torch.randn(13, 4, 6, device=DEVICE).permute(1, 2, 0)
    for value in (x, x.contiguous()):
        leaf = value.detach().requires_grad_(True)
        outputs = joint_outputs(leaf, group, settings)
        found.append(torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), [leaf, *group.parameters]))
    torch.testing.assert_close(*found)


def test_only_the_gradients_that_are_needed():
    _, x, group, settings = make_group((3, 4, 13, 8), 2, torch.float32)
    for trained in [x, *group.parameters]:
        for tensor in [x, *group.parameters]:
            tensor.requires_grad_(tensor is trained)
            tensor.grad = None
        sum(y.sum() for y in joint_outputs(x, group, settings)).backward()
        assert [tensor is trained for tensor in [x, *group.parameters] if tensor.grad is not None] == [True]


def test_an_output_that_is_not_used():
    _, x, group, settings = make_group((3, 4, 13, 8), 2, torch.float32)
    joint_outputs(x, group, settings)[0].sum().backward()
    assert [p.grad is not None for p in group.parameters] == [True] * 3 + [False] * 3
    alone = x.grad.clone()
    x.grad = None
    one = JointGroup(group.tensors[:1], group.weights[:1], group.biases[:1], group.sizes.layout, SCALING, x.dtype)
    joint_outputs(x, one, settings)[0].sum().backward()
    torch.testing.assert_close(x.grad, alone)


@pytest.mark.parametrize("masked", [True, False])
def test_statistics_and_balance_gradients_are_those_of_single_layers(masked):
    size, members = (3, 4, 13, 67), 2
    _, x, group, settings = make_group(size, members, torch.float32, dropout=0.2)
    mask = (torch.rand(67, device=DEVICE) > 0.4).to(torch.uint8) if masked else None
    settings.token_mask = mask
    found = []
    for joint in (True, False):
        stats = RoutingStats.zeros(members, 3, DEVICE)
        tally = RoutingTally(stats, kind="switch", factor=0.3, upstream=torch.tensor(2.0, device=DEVICE))
        probes = [LayerProbe(tally, place, mask) for place in range(members)]
        if joint:
            outputs = joint_outputs(x, group, settings, probes)
        else:
            outputs = []
            for place, probe in enumerate(probes):
                seed = settings.seeds[place]
                spec = fused.DeltaSpec(group.sizes.layout, SCALING, 0.2, seed, False, probe)
                weight = group.weights[place]
                outputs.append(fused.fused_delta(x, *group.tensors[place], None, x @ weight.T, spec))
        upstream = [torch.ones_like(y) for y in outputs]
        grads = torch.autograd.grad(outputs, [x, *group.parameters], upstream)
        found.append([stats.data, *outputs, *grads])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert found[0][0][:, 0].eq(67 if mask is None else mask.sum()).all()


def test_saved_for_backward():
    """x, the projections and the concatenated weights; nothing of the size of the outputs but the frozen weights."""
    num_heads, r, d_in, tokens = size = (5, 4, 32, 100)
    _, x, group, settings = make_group(size, 2, torch.bfloat16 if DEVICE == "cuda" else torch.float32, dropout=0.2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        joint_outputs(x, group, settings)
    weights = {w.data_ptr() for w in group.weights}
    elements = sum(t.numel() for t in saved if t.data_ptr() not in weights)
    sizes = group.sizes
    assert elements == tokens * (d_in + 2 * sizes.k) + 2 * sizes.k * d_in + sizes.z * sum(D_OUTS[:2])


def test_a_weight_that_was_changed_before_the_backward_pass_is_refused():
    _, x, group, settings = make_group((3, 4, 13, 67), 2, torch.float32)
    outputs = joint_outputs(x, group, settings)
    group.weights[1].add_(0.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs, x, [torch.ones_like(y) for y in outputs])


def test_gradients_have_no_gradients():
    _, x, group, settings = make_group((3, 4, 13, 67), 1, torch.float32)
    (output,) = joint_outputs(x, group, settings)
    upstream = torch.ones_like(output).requires_grad_(True)
    (dx,) = torch.autograd.grad(output, x, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()


def test_torch_func_goes_through_its_own_call(monkeypatch):
    """Which looks at every argument; without it the call is shorter."""
    _, x, group, settings = make_group((3, 4, 13, 67), 1, torch.float32)
    monkeypatch.setattr(joint_module, "_apply", lambda *args: pytest.fail("not for torch.func"))
    monkeypatch.setattr(torch._C, "_are_functorch_transforms_active", lambda: True)
    called = []
    monkeypatch.setattr(joint_module._Joint, "apply", lambda *args: called.append(args) or (x, x))
    with torch.no_grad():
        ahead = group.concat()
    joint_outputs(x, group, settings, (), *ahead)
    assert len(called) == 1


def test_a_recomputation_skips_the_unused_outputs():
    """As for plain frozen layers at the end of a checkpointed block, whose products are not run a second time."""
    _, x, group, settings = make_group((3, 4, 13, 67), 1, torch.float32)
    trained = [x, *group.parameters]
    (y,) = torch.utils.checkpoint.checkpoint(lambda: joint_outputs(x, group, settings), use_reentrant=False)
    expected = torch.autograd.grad(joint_outputs(x, group, settings)[0].square().sum(), trained)
    with CountedProducts(columns=D_OUTS[0]) as counted:
        actual = torch.autograd.grad(y.square().sum(), trained)
    assert counted.count == 0
    torch.testing.assert_close(actual, expected)


class Doubled:
    """A weight that is stored as its half."""

    def __init__(self, weight):
        self.half, self.shape, self.device, self.calls = weight / 2, weight.shape, weight.device, 0

    def dense(self):
        self.calls += 1
        return 2 * self.half


def test_weights_that_are_dequantized():
    _, x, group, settings = make_group((3, 4, 13, 67), 2, torch.float32, biased=True)
    weights = [Doubled(weight) for weight in group.weights]
    other = JointGroup(group.tensors, weights, group.biases, group.sizes.layout, SCALING, x.dtype)
    found = []
    for one in (group, other):
        outputs = joint_outputs(x, one, settings)
        found.append([*outputs, *torch.autograd.grad([y.sum() for y in outputs], [x, *group.parameters])])
    torch.testing.assert_close(*found)
    assert [weight.calls for weight in weights] == [2, 2]  # forward and backward, and not kept between
