"""benchmarks/: published loops compute the paper's function, every script runs at its smallest, tables follow rows."""

import importlib
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from processes import ROOT
from torch import nn

from rlora_trl.kernels.reference import multihead_delta_reference


D_IN, D_OUT, TOKENS = 7, 11, 13


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    """Lets scripts of benchmarks be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


# The published loops


def loop_layer(num_heads=3, dropout=0.0, **kwargs):
    from loop_forms import LoopLinear

    layer = LoopLinear(nn.Linear(D_IN, D_OUT, bias=False), 2, num_heads, 1.5, dropout, **kwargs)
    return layer.double() if dropout == 0.0 else layer


@pytest.mark.parametrize("head_dropout", [False, True])
@pytest.mark.parametrize("a_once", [False, True])
def test_loops_are_the_reference(head_dropout, a_once):
    layer = loop_layer(head_dropout=head_dropout, a_once=a_once)
    products = []
    layer.lora_A.register_forward_hook(lambda *args: products.append(1))
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64, requires_grad=True)
    output = layer(x)
    assert len(products) == (1 if a_once else 3)

    B = torch.stack([head.weight for head in layer.lora_B])
    delta = multihead_delta_reference(x, layer.lora_A.weight, B, layer.lora_route.weight, scaling=1.5)
    expected = x @ layer.base_layer.weight.T + delta
    # The weights of the heads go through float32, as published.
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(output)
    parameters = [x, layer.lora_A.weight, *(head.weight for head in layer.lora_B), layer.lora_route.weight]
    gradients = (torch.autograd.grad(y, parameters, upstream) for y in (output, expected))
    for gradient, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_dropout, a_once", [(True, False), (True, True), (False, False)])
def test_each_head_has_its_own_mask(head_dropout, a_once):
    layer = loop_layer(num_heads=4, dropout=0.5, head_dropout=head_dropout, a_once=a_once).train()
    masks = []
    layer.dropout.register_forward_hook(lambda module, args, output: masks.append(output != 0))
    layer(torch.randn(200, D_IN))
    assert len(masks) == 4 and masks[0].shape[-1] == (2 if head_dropout else D_IN)
    for i, mask in enumerate(masks):
        assert all(not torch.equal(mask, other) for other in masks[:i])


# Every script at its smallest


def test_variants_share_the_weights_of_the_base():
    from common import baselines, ours, ours_as_lora, ours_by_task, share_weights
    from testing_utils import TINY_MODELS

    base = TINY_MODELS["qwen2"]()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    pointers = {parameter.data_ptr() for parameter in base.parameters()}
    for variant in (*baselines(), ours(3, 4), ours_by_task(), ours_as_lora()):
        model = variant.wrap(share_weights(base))
        frozen = [parameter for name, parameter in model.named_parameters() if "lora" not in name]
        assert {parameter.data_ptr() for parameter in frozen} == pointers
        assert not any(parameter.requires_grad for parameter in frozen)
    assert list(base.state_dict()) == list(before)  # nothing was put into the base itself
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_numerics_are_checked(monkeypatch):
    import common
    from loop_forms import LoopLinear

    for variant in (*common.baselines(), common.ours(3, 4), common.ours_by_task(), common.ours_as_lora()):
        assert common.check_numerics(variant, torch.float32, "cpu") < 1e-5
    forward = LoopLinear.forward
    monkeypatch.setattr(LoopLinear, "forward", lambda self, x: 1.01 * forward(self, x))
    with pytest.raises(RuntimeError, match="numerics off by"):
        common.check_numerics(common.baselines()[5], torch.float32, "cpu")


def test_fused_functions_are_put_into_each_mlp_and_checked(monkeypatch):
    """With a stand-in for a package: its function is bound to the MLP, and compared with PEFT's LoRA."""
    import common
    from shapes import mlp

    def function(self, x):
        return factor * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    factor, variant = 1.0, common.fused()[0]
    package = types.SimpleNamespace(apply_lora_mlp_swiglu=function)
    monkeypatch.setitem(sys.modules, common.FUSED[variant.family], package)
    model = nn.ModuleDict({"mlp": mlp(8, 12, "cpu", torch.float32)})
    wrapped = variant.wrap(model)
    assert wrapped.base_model.model["mlp"].forward.__func__ is function
    assert common.check_numerics(variant, torch.float32, "cpu") < 1e-5
    factor = 1.01
    with pytest.raises(RuntimeError, match="numerics off by"):
        common.check_numerics(variant, torch.float32, "cpu")


def test_an_object_in_another_process():
    from common import Elsewhere, FailedElsewhereError, attempt

    numbers = Elsewhere(list, [3, 4])
    assert numbers.index(4) == 1
    numbers.append(5)
    assert numbers.index(5) == 2
    assert attempt(lambda: numbers.index(6)) == (None, "ValueError: 6 is not in list")
    with pytest.raises(FailedElsewhereError, match="TypeError: 'int' object is not iterable"):
        Elsewhere(list, 3)


def test_spinning_processes_end():
    from common import spinning

    def children():
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    before = children()
    with spinning(False):
        assert not children() - before
    with spinning(True):
        started = children() - before
        assert len(started) == -(-len(os.sched_getaffinity(0)) // 2)
    assert not started & children()


def test_summary():
    from common import summary

    assert summary([5.0, 1.0, 4.0, 3.0, 2.0] * 2) == {"median_ms": 3.0, "min_ms": 1.0, "p90_ms": 5.0, "repeats": 10}
    assert summary([7.0])["p90_ms"] == 7.0


def test_a_form_that_fails_loses_its_turn():
    from common import take_turns

    calls = {"a": 0, "b": 0, "c": 0}

    def count(name):
        calls[name] += 1
        if name == "b" and calls[name] == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if name == "c":
            raise ValueError("wrong\nin two lines")

    functions = {name: lambda name=name: count(name) for name in calls}
    times, failed = take_turns(functions, rounds=3, repeats=2, warmup=1)
    assert failed == {"b": "out of memory", "c": "ValueError: wrong"}
    assert list(functions) == list(times) == ["a"] and len(times["a"]) == 6


SMALLEST = {
    "train_step": "--settings 6x512 2x512 --families floor lora rlora_loop ours ours_task ours_uniform --heads 3 "
    "--ranks 4 --dtype float32 --rounds 2 --repeats 1 --busy",
    "layer": "--layers gate_proj --tokens 8 --rounds 1 --repeats 1",
    "decode": "--batches 1 --prompt 4 --repeats 1 --warmup 1",
    "cpu": "--tokens 8 --layers 1 --repeats 1 --steps 0",
    "host": "--repeats 1",
    "trainer_overhead": "--settings 2x8 --steps 3 --warmup 1",
}


@pytest.mark.parametrize("name", SMALLEST)
def test_smallest_run(monkeypatch, tmp_path, name):
    """A row for each form. One form of `train_step` fails: its row says why, and the others have their times."""
    import shapes
    from common import fused
    from loop_forms import LoopLinear

    # Tiny sizes, and one form that fails.
    script, out = importlib.import_module(name), tmp_path / "rows.jsonl"
    monkeypatch.setitem(shapes._QWEN25, "qwen2.5-3b", (32, 48, 1, 4, 2, 1000, True))
    if name in ("layer", "cpu"):
        monkeypatch.setattr(script, "LAYERS", {"gate_proj": (32, 48)})
    if name == "train_step":
        monkeypatch.setitem(script.SETTINGS, "6x512", (2, 8, False))
        monkeypatch.setitem(script.SETTINGS, "2x512", (1, 8, True))
        forward = LoopLinear.forward

        def broken(self, x):
            if len(self.lora_B) == 5:
                raise torch.OutOfMemoryError
            return forward(self, x)

        monkeypatch.setattr(LoopLinear, "forward", broken)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *SMALLEST[name].split(), "--out", str(out)])
    script.main()

    # A row for each form, with its times or its error.
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    failed = [(row["variant"], row["error"]) for row in rows if row.get("error")]
    expected = [("R-LoRA loop N=5 r=4", "out of memory")] * 2 if name == "train_step" else []
    if name == "host":
        expected = [(v.name, f"ModuleNotFoundError: {v.family} is not installed") for v in fused()]
    assert failed == expected
    times = [[row[key] for key in row if key.endswith(("_ms", "_us"))] for row in rows if not row.get("error")]
    assert len(times) >= 4 and all(times) and all(row["torch"] for row in rows)
    assert all(time > 0 for values in times for time in values if not isinstance(time, list))


def test_liger_is_put_in_as_by_trl(monkeypatch, tmp_path):
    """Before the adapters, with the loss left as it is; rows say the version."""
    import shapes
    import train_step

    calls = []
    monkeypatch.setitem(shapes._QWEN25, "qwen2.5-3b", (32, 48, 1, 4, 2, 1000, True))
    monkeypatch.setitem(train_step.SETTINGS, "6x512", (2, 8, False))
    monkeypatch.setattr(train_step, "apply_liger_kernel", lambda model, options: calls.append((type(model), options)))
    monkeypatch.setattr(train_step, "version", lambda name: "1.2.3")
    options = "--settings 6x512 --families floor axolotl --rounds 1 --repeats 1 --liger --out"
    train_step.main([*options.split(), str(tmp_path / "rows.jsonl")])
    assert [(kind.__name__, options) for kind, options in calls] == [
        ("Qwen2ForCausalLM", {"fused_linear_cross_entropy": False})
    ]
    floor, axolotl = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert floor["liger"] == axolotl["liger"] == "1.2.3" and floor["p90_ms"] > 0 and not floor["busy"]
    assert axolotl["error"] == "ModuleNotFoundError: axolotl is not installed"
    assert axolotl["package"] == "axolotl none"


# Tables and bars


def row(variant, family, ms, run="1", **kwargs):
    sizes = {"num_heads": 3, "r": 4, "shape": "qwen2.5-3b", "layers": 36, "setting": "8x2048", "base": "bfloat16"}
    times = {"median_ms": ms, "min_ms": ms, "peak_gib": 30.0, "activation_gib": 20.0}
    return {"variant": variant, "family": family, **sizes, **times, "command": "c", "started": run, **kwargs}


def test_bars_are_ratios_of_one_run():
    from report import FLOOR, LORA, LORA_DROPOUT, OURS, bars

    train = [
        # A short run on a faster machine must not be mixed with the long one.
        row(FLOOR, "floor", 100.0, "2"),
        row(FLOOR, "floor", 200.0),
        row(LORA, "lora", 300.0, peak_gib=28.0),
        row(LORA_DROPOUT, "lora", 320.0),
        row("R-LoRA loop N=3 r=4", "rlora_loop", 600.0),
        row(OURS, "ours", 240.0),
        row("rlora_trl N=10 r=4", "ours", 240.0, num_heads=10),
        row(OURS, "ours", 110.0, "2"),
        # Other depths, bases and compiled models are other measurements.
        row(OURS, "ours", 1.0, layers=9),
        row(OURS, "ours", 1.0, base="nf4"),
        row(f"{OURS}, compiled", "ours_compiled", 1.0),
        # Memory is compared at the small setting, time is not.
        row(FLOOR, "floor", None, setting="6x512", activation_gib=10.0, saved_gib=5.0),
        row(OURS, "ours", None, setting="6x512", activation_gib=12.0, saved_gib=6.0),
        row("HydraLoRA loop N=3 r=4", "hydra_loop", None, setting="6x512", activation_gib=40.0, saved_gib=30.0),
    ]
    decode = [row(LORA, "lora", 5.0, batch=16), row(OURS, "ours", 6.0, batch=16), row(OURS, "ours", 1.0, batch=1)]
    cpu = [row("R-LoRA loop N=3 r=4", "rlora_loop", 4.0, case="a step"), row(OURS, "ours", 3.0, case="a step")]
    lines = []
    result = {bar.name: (bar.value, bar.met) for bar in bars(train, decode, cpu, show=lines.append)}
    assert len(lines) == len(result)
    expected = {
        "8x2048: time / floor": (1.2, False),
        "8x2048: time / LoRA with dropout 0.2": (0.75, True),
        "8x2048: R-LoRA loop N=3 / ours N=3, time": (2.5, True),  # at least
        "8x2048: peak memory / LoRA without dropout": (30 / 28, False),
        "8x2048: N=10 / N=3, time": (1.0, True),
        "6x512: activations (kept for backward) / HydraLoRA loop": (0.2, True),
        "decoding, batch 16: time / LoRA": (1.2, False),
        "CPU, a step: time / R-LoRA loop": (0.75, True),
    }
    for name, (value, met) in expected.items():
        assert result[name] == (pytest.approx(value), met), name
    assert result["6x512: all that a step allocates / HydraLoRA loop"][0] == pytest.approx(0.3)
    assert result["6x512: the same above the floor's / HydraLoRA loop's"][0] == pytest.approx(2 / 30)

    # What was not measured has no ratio.
    for name in ("4-bit base, 8x2048: time / LoRA without dropout", "decoding, batch 1: time / LoRA"):
        assert result[name][0] is None, name


def test_tables_have_ratios_and_failures():
    from report import FLOOR, LORA, OURS, compiled_table, growth_table, runs_table, train_table

    rows = [
        row(FLOOR, "floor", 200.0),
        row(LORA, "lora", 300.0),
        row("R-LoRA loop N=3 r=4", "rlora_loop", None, error="out of memory"),
        row(OURS, "ours", 240.0),
    ]
    table = train_table(rows, "qwen2.5-3b", "bfloat16", "8x2048")
    assert f"| **{OURS}** | 240 | 240 | 1.20 | 0.80 | 30.0 | 20.0 |" in table
    assert "| R-LoRA loop N=3 r=4 | out of memory |" in table
    rows += [row(OURS, "ours", 100.0 + depth, "2", layers=depth) for depth in (9, 18)]
    assert growth_table(rows).splitlines()[0] == "| form, ms/step | 9 layers | 18 layers | 36 layers |"
    assert f"| {OURS} | 109 | 118 | 240 |" in growth_table(rows)
    assert compiled_table(rows) == ""
    rows += [row(f"{FLOOR}, compiled", "floor_compiled", 100.0), row(f"{OURS}, compiled", "ours_compiled", 120.0)]
    assert f"| qwen2.5-3b, 36 layers, 8x2048 | {OURS} | 240 | 120 | 0.50 | 1.20 |" in compiled_table(rows)

    # Runs of one setting are listed by their start; a run without LoRA is left out.
    rows = [
        row(name, "x", ms, setting="6x512", started=f"2026-01-0{day}T10:00:07+00:00", min_ms=ms - day)
        for day, times in ((2, (100.0, 150.0, 140.0)), (1, (110.0, 150.0, 165.0)), (3, (100.0, None, 120.0)))
        for name, ms in zip((FLOOR, LORA, OURS), times, strict=True)
        if ms is not None
    ]
    lines = runs_table(rows, "6x512").splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| 2026-01-01 10:00", "| 2026-01-02 10:00"]
    assert lines[0].split(" | ")[1:] == ["110", "150", "165", "1.50", "1.50", "1.10 |"]


def test_the_plot_leaves_out_what_was_not_measured(tmp_path):
    from report import FLOOR, OURS, draw

    train = [row(FLOOR, "floor", 200.0), row(OURS, "ours", 240.0)]
    draw(train, [], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    train += [row("rlora_trl N=5 r=4", "ours", 250.0, num_heads=5)]
    layer = [{"variant": OURS, "tokens": t, "d_in": 2, "d_out": 3, "forward_backward_ms": t} for t in (10, 100)]
    widths = []
    for rows in ([], layer):
        draw(train, rows, tmp_path / "plot.png")
        widths.append(int.from_bytes((tmp_path / "plot.png").read_bytes()[16:20], "big"))
    assert widths[1] > 1.8 * widths[0]
