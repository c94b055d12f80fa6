"""How Triton's compiled kernels are launched: through their own launcher if Triton is known, else as usual."""

import logging
from types import SimpleNamespace

import pytest
import torch
from kernel_helpers import DEVICE, INTERPRETED

from rlora_trl.kernels import fused
from rlora_trl.kernels.rank_space import Layout


triton_ops = pytest.importorskip("rlora_trl.kernels.triton_ops", reason="needs Triton")

# `JITFunction.run` as it ends in Triton 3.6, and in 3.2.
KNOWN = """
def run(self, *args, grid, warmup, **kwargs):
    device = driver.active.get_current_device()
    stream = driver.active.get_current_stream(device)
    kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata,
               knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())
"""
BEFORE_CONSTANTS = KNOWN.replace("knobs.runtime.", "self.CompiledKernel.").replace(
    "*bound_args.values()", "*non_constexpr_vals"
)
# Ways in which another version may differ.
UNKNOWN = {
    "another parameter": KNOWN.replace("kernel.packed_metadata,", "kernel.packed_metadata, kernel.options,"),
    "another order": KNOWN.replace("stream, kernel.function", "kernel.function, stream"),
    "grid in one": KNOWN.replace("grid_0, grid_1, grid_2", "grid"),
    "no hooks": KNOWN.replace("knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, ", ""),
    "by keyword": KNOWN.replace("launch_metadata,", "launch_metadata=launch_metadata,").replace(
        ", *bound", ", args=bound"
    ),
    "constants left out": KNOWN.replace("*bound_args.values()", "*non_constexpr_vals"),
    "renamed": KNOWN.replace("kernel.run(", "kernel.launch("),
    "two launches": KNOWN + KNOWN[KNOWN.index("    kernel.run") :],
    "another stream": KNOWN.replace("get_current_stream(device)", "get_stream(device, grid)"),
    "delegated": "def run(self, *args, **kwargs):\n    return self.launcher(*args, **kwargs)\n",
}


@pytest.fixture(autouse=True)
def _not_yet_checked():
    triton_ops.has_known_launcher.cache_clear()
    yield
    triton_ops.has_known_launcher.cache_clear()


@pytest.fixture
def function_of(monkeypatch):
    def make(source):
        monkeypatch.setattr(triton_ops.inspect, "getsource", lambda run: source)
        return lambda: None

    return make


def test_installed_triton_is_known(caplog):
    assert triton_ops.has_known_launcher()
    assert not caplog.records


@pytest.mark.parametrize("takes_constants", [True, False])
def test_known_launchers(function_of, monkeypatch, takes_constants):
    monkeypatch.setattr(
        triton_ops, "_KERNEL_ARGUMENTS", "*bound_args.values()" if takes_constants else "*non_constexpr_vals"
    )
    assert triton_ops._launches_as_known(function_of(KNOWN)) is takes_constants
    assert triton_ops._launches_as_known(function_of(BEFORE_CONSTANTS)) is not takes_constants


@pytest.mark.parametrize("source", UNKNOWN.values(), ids=UNKNOWN)
def test_other_launchers(function_of, monkeypatch, source):
    monkeypatch.setattr(triton_ops, "_KERNEL_ARGUMENTS", "*bound_args.values()")
    assert source != KNOWN
    assert not triton_ops._launches_as_known(function_of(source))


def test_no_source(monkeypatch, caplog):
    def fail(run):
        raise OSError("could not get source code")

    monkeypatch.setattr(triton_ops.inspect, "getsource", fail)
    with caplog.at_level(logging.WARNING):
        assert not triton_ops.has_known_launcher()
        assert not triton_ops.has_known_launcher()
    assert len(caplog.records) == 1
    assert "launches kernels in an unknown way (3.2 to 3.6 are supported)" in caplog.text
    assert "results are the same" in caplog.text


class Kernel:
    """A jitted function that notes how it is launched."""

    def __init__(self):
        self.looked_up, self.launched = [], []

    def __getitem__(self, grid):
        def launch(*args):
            self.looked_up.append((grid, args))
            return SimpleNamespace(run=lambda *args: self.launched.append(args), function=7, packed_metadata=(4, 1))

        return launch


def launch_twice(monkeypatch):
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: ("stream", device)))
    monkeypatch.setattr(triton_ops.triton.runtime, "driver", driver)
    kernel, tensor = Kernel(), torch.zeros(4)
    variant = triton_ops.Variant(kernel, (16, True))
    for _ in range(2):
        variant.launch(3, (tensor,), (0.5,))
    return kernel, tensor


def test_known_launcher_is_called(monkeypatch):
    monkeypatch.setattr(triton_ops, "_TAKES_CONSTANTS", True)
    kernel, tensor = launch_twice(monkeypatch)
    assert kernel.looked_up == [((3, 1, 1), (tensor, 0.5, 16, True))]
    none = (None, None, None)
    assert kernel.launched == [(3, 1, 1, ("stream", -1), 7, (4, 1), *none, tensor.data_ptr(), 0.5, 16, True)]


class Launcher:
    """Triton's launcher, with and without memory that it must allocate."""

    launch_cooperative_grid, launch_pdl = False, True

    def __init__(self, scratch=0):
        self.global_scratch_size, self.profile_scratch_size = scratch, 0
        self.launch = object()

    def __call__(self, gridX, gridY, gridZ, stream, function, *args):  # noqa: N803
        global_scratch = profile_scratch = None
        self.launch(gridX, gridY, gridZ, stream, function, self.launch_cooperative_grid, self.launch_pdl,
                    global_scratch, profile_scratch, *args)  # fmt: skip


class OlderLauncher(Launcher):
    def __call__(self, *args):
        self.launch(*args)


def test_the_function_behind_a_launcher():
    launcher = Launcher()
    assert triton_ops._launcher(launcher) == (launcher.launch, (False, True, None, None))
    for other in (Launcher(scratch=64), OlderLauncher(), len):
        assert triton_ops._launcher(other) == (other, ())


def test_unknown_launcher_is_not_called(monkeypatch, caplog):
    monkeypatch.setattr(triton_ops, "_LAUNCHED_WITH", ("grid", "function"))
    with caplog.at_level(logging.WARNING):
        kernel, tensor = launch_twice(monkeypatch)
    assert kernel.looked_up == [((3, 1, 1), (tensor, 0.5, 16, True))] * 2
    assert not kernel.launched
    assert len(caplog.records) == 1


def test_interpreted_kernels_do_not_ask(monkeypatch):
    monkeypatch.setattr(triton_ops, "_launches_as_known", lambda run: pytest.fail("nothing was compiled"))
    calls = []
    variant = triton_ops.Variant({(1, 1, 1): lambda *args: calls.append(args)}, ())
    for _ in range(2):
        variant.launch(1, (torch.zeros(1),))
    assert len(calls) == 2 and not variant.compiled


@pytest.mark.skipif(not INTERPRETED, reason="kernels get addresses; the torch twins get tensors")
def test_a_mask_on_another_device_is_refused():
    layout, ops = Layout(3, 4), fused.backend(torch.device(DEVICE), torch.float32)
    P = torch.randn(67, 11)
    partials = torch.empty(ops.stats_rows(67), 12)
    with pytest.raises(ValueError, match="`token_mask` must be on cpu"):
        ops.mix(P, 16, layout, partials=partials, token_mask=torch.ones(67, device="meta"))
