"""benchmarks/: the published loops are the paper's function, the scripts survive failures, ratios are of one run."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from rlora_trl.kernels.reference import multihead_delta_reference


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
D_IN, D_OUT, TOKENS = 7, 11, 13


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    """Lets scripts of benchmarks be imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


# The published loops


def loop_layer(num_heads=3, dropout=0.0, **kwargs):
    from loop_forms import LoopLinear

    base = nn.Linear(D_IN, D_OUT, bias=False)
    layer = LoopLinear(base, 2, num_heads, 1.5, dropout, **kwargs)
    return layer.double() if dropout == 0.0 else layer


@pytest.mark.parametrize("head_dropout", [False, True])
@pytest.mark.parametrize("a_once", [False, True])
def test_loops_are_the_reference(head_dropout, a_once):
    layer = loop_layer(head_dropout=head_dropout, a_once=a_once)
    x = torch.randn(TOKENS, D_IN, dtype=torch.float64, requires_grad=True)
    B = torch.stack([head.weight for head in layer.lora_B])
    delta = multihead_delta_reference(x, layer.lora_A.weight, B, layer.lora_route.weight, scaling=1.5)
    expected = x @ layer.base_layer.weight.T + delta
    found = layer(x)
    # The weights of the heads go through float32, as published.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(found)
    parameters = [x, layer.lora_A.weight, *(head.weight for head in layer.lora_B), layer.lora_route.weight]
    for a, b in zip(
        torch.autograd.grad(found, parameters, upstream),
        torch.autograd.grad(expected, parameters, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("a_once, products", [(False, 4), (True, 1)])
def test_where_the_product_with_a_is(a_once, products):
    for head_dropout in (False, True):
        layer = loop_layer(num_heads=4, head_dropout=head_dropout, a_once=a_once)
        calls: list[int] = []
        layer.lora_A.register_forward_hook(lambda module, args, output, calls=calls: calls.append(1))
        layer(torch.randn(TOKENS, D_IN, dtype=torch.float64))
        assert len(calls) == products


@pytest.mark.parametrize("head_dropout, a_once", [(True, False), (True, True), (False, False)])
def test_each_head_has_a_mask_of_its_own(head_dropout, a_once):
    layer = loop_layer(num_heads=4, dropout=0.5, head_dropout=head_dropout, a_once=a_once).train()
    seen = []
    layer.dropout.register_forward_hook(lambda module, args, output: seen.append(output != 0))
    layer(torch.randn(200, D_IN))
    assert len(seen) == 4
    assert seen[0].shape[-1] == (2 if head_dropout else D_IN)
    for i, mask in enumerate(seen):
        assert all(not torch.equal(mask, other) for other in seen[:i])


# What the scripts share


def test_variants_share_the_weights_of_the_base():
    from common import baselines, ours, share_weights
    from testing_utils import TINY_MODELS

    base = TINY_MODELS["qwen2"]()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    wrapped = [variant.wrap(share_weights(base)) for variant in (*baselines(), ours(3, 4))]
    owned = {parameter.data_ptr() for parameter in base.parameters()}
    for model in wrapped:
        frozen = [parameter for name, parameter in model.named_parameters() if "lora" not in name]
        assert {parameter.data_ptr() for parameter in frozen} == owned
        assert not any(parameter.requires_grad for parameter in frozen)
    assert list(base.state_dict()) == list(before)  # nothing was put into the base itself
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_numerics_are_checked(monkeypatch):
    import common
    from loop_forms import LoopLinear

    for variant in (*common.baselines(), common.ours(3, 4)):
        assert common.check_numerics(variant, torch.float32, "cpu") < 1e-5
    forward = LoopLinear.forward
    monkeypatch.setattr(LoopLinear, "forward", lambda self, x: 1.01 * forward(self, x))
    with pytest.raises(RuntimeError, match="numerics off by"):
        common.check_numerics(common.baselines()[5], torch.float32, "cpu")


def test_what_fails_loses_its_turn():
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
    assert calls == {"a": 9, "b": 4, "c": 1}


def test_train_step_reports_rows_of_all_forms(monkeypatch, tmp_path, capsys):
    """At tiny sizes, with one form that fails: it gets a row which says why, and the others their times."""
    import shapes
    import train_step
    from loop_forms import LoopLinear

    monkeypatch.setitem(shapes._QWEN25, "qwen2.5-3b", (32, 48, 1, 4, 2, 90, True))
    monkeypatch.setitem(train_step.SETTINGS, "6x512", (2, 8, False, 2, 1))
    forward = LoopLinear.forward

    def broken(self, x):
        if len(self.lora_B) == 5:
            raise torch.OutOfMemoryError
        return forward(self, x)

    monkeypatch.setattr(LoopLinear, "forward", broken)
    out = tmp_path / "rows.jsonl"
    arguments = ["--settings", "6x512", "--families", "floor", "lora", "rlora_loop", "ours", "--heads", "3"]
    train_step.main([*arguments, "--ranks", "4", "--dtype", "float32", "--out", str(out)])
    rows = {row["variant"]: row for row in map(json.loads, out.read_text().splitlines())}
    failed = rows.pop("R-LoRA loop N=5 r=4")
    assert failed["median_ms"] is None and failed["error"] == "out of memory"
    assert set(rows) == {
        "frozen base (floor)",
        "PEFT LoRA r=10",
        "PEFT LoRA r=10, dropout 0.2",
        "R-LoRA loop N=3 r=4",
        "rlora_trl N=3 r=4",
    }
    assert all(row["median_ms"] >= row["min_ms"] > 0 and row["repeats"] == 2 for row in rows.values())
    assert all(row["layers"] == 1 and row["dtype"] == "float32" and row["torch"] for row in rows.values())
    assert len(capsys.readouterr().out.splitlines()) == 6


# Tables and bars


def row(variant, family, ms, run="1", **kwargs):
    sizes = {"num_heads": 3, "r": 4, "shape": "qwen2.5-3b", "layers": 36, "setting": "8x2048", "base": "bfloat16"}
    times = {"median_ms": ms, "min_ms": ms, "peak_gib": 30.0, "activation_gib": 20.0}
    return {"variant": variant, "family": family, **sizes, **times, "command": "c", "started": run, **kwargs}


def by_name(found):
    return {bar.name: bar for bar in found}


def test_bars_are_ratios_of_one_run():
    from report import FLOOR, LORA, LORA_DROPOUT, OURS, bars

    rows = [
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
    ]
    found = by_name(bars(rows, [], [], show=None))
    assert found["8x2048: time / floor"].value == pytest.approx(1.2) and found["8x2048: time / floor"].met is False
    assert found["8x2048: time / LoRA with dropout 0.2"].value == pytest.approx(0.75)
    assert found["8x2048: time / LoRA with dropout 0.2"].met is True
    loop = found["8x2048: R-LoRA loop N=3 / ours N=3, time"]
    assert loop.value == pytest.approx(2.5) and loop.met is True  # at least
    assert found["8x2048: peak memory / LoRA without dropout"].met is False
    assert found["8x2048: N=10 / N=3, time"].value == 1.0 and found["8x2048: N=10 / N=3, time"].met is True
    assert found["6x512: time / floor"].value is None and found["6x512: time / floor"].met is None
    assert found["4-bit base, 8x2048: time / LoRA without dropout"].value is None


def test_bars_of_memory_decoding_and_cpu():
    from report import FLOOR, LORA, OURS, bars

    train = [
        row(FLOOR, "floor", 1.0, setting="6x512", activation_gib=10.0, saved_gib=5.0),
        row(OURS, "ours", 1.0, setting="6x512", activation_gib=12.0, saved_gib=6.0),
        row("HydraLoRA loop N=3 r=4", "hydra_loop", 1.0, setting="6x512", activation_gib=40.0, saved_gib=30.0),
    ]
    decode = [row(LORA, "lora", 5.0, batch=16), row(OURS, "ours", 6.0, batch=16), row(OURS, "ours", 1.0, batch=1)]
    cpu = [row("R-LoRA loop N=3 r=4", "rlora_loop", 4.0, case="a step"), row(OURS, "ours", 3.0, case="a step")]
    lines = []
    found = by_name(bars(train, decode, cpu, show=lines.append))
    assert len(lines) == len(found)
    kept = found["6x512: activations (kept for backward) / HydraLoRA loop"]
    assert kept.value == pytest.approx(0.2) and kept.met is True
    assert found["6x512: all that a step allocates / HydraLoRA loop"].value == pytest.approx(0.3)
    assert found["6x512: the same above the floor's / HydraLoRA loop's"].value == pytest.approx(2 / 30)
    assert found["decoding, batch 16: time / LoRA"].met is False
    assert found["decoding, batch 1: time / LoRA"].value is None
    assert found["CPU, a step: time / R-LoRA loop"].met is True


def test_runs_of_one_setting_are_listed_by_their_start():
    from report import FLOOR, LORA, OURS, runs_table

    rows = [
        row(name, "x", ms, setting="6x512", started=f"2026-01-0{day}T10:00:07+00:00", min_ms=ms - day)
        for day, times in ((2, (100.0, 150.0, 140.0)), (1, (110.0, 150.0, 165.0)), (3, (100.0, None, 120.0)))
        for name, ms in zip((FLOOR, LORA, OURS), times, strict=True)
        if ms is not None
    ]
    lines = runs_table(rows, "6x512").splitlines()[2:]
    # A run without LoRA is left out.
    assert [line.split(" | ")[0] for line in lines] == ["| 2026-01-01 10:00", "| 2026-01-02 10:00"]
    assert lines[0].split(" | ")[1:] == ["110", "150", "165", "1.50", "1.50", "1.10 |"]
    assert runs_table(rows[:3], "6x512") == ""


def test_tables_have_ratios_and_failures():
    from report import FLOOR, LORA, OURS, compiled_table, growth_table, train_table

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


def test_the_plot_leaves_out_what_was_not_measured(tmp_path):
    from report import FLOOR, OURS, draw

    train = [row(FLOOR, "floor", 200.0), row(OURS, "ours", 240.0)]
    draw(train, [], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    train += [row("rlora_trl N=5 r=4", "ours", 250.0, num_heads=5)]
    draw(train, [], tmp_path / "one.png")
    layer = [{"variant": OURS, "tokens": t, "d_in": 2, "d_out": 3, "forward_backward_ms": t} for t in (10, 100)]
    draw(train, layer, tmp_path / "two.png")
    assert (tmp_path / "one.png").stat().st_size > 5000
    assert _width(tmp_path / "two.png") > 1.8 * _width(tmp_path / "one.png")


def _width(path):
    """Of a PNG."""
    return int.from_bytes(path.read_bytes()[16:20], "big")
