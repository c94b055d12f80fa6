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
    "train_step": "--settings 6x512 2x512 --families floor lora rlora_loop ours ours_task ours_uniform --sizes 3x4 "
    "--dtype float32 --rounds 2 --repeats 1 --busy",
    "layer": "--layers gate_proj --tokens 8 --rounds 1 --repeats 1",
    "decode": "--batches 1 --prompt 4 --repeats 1 --warmup 1",
    "cpu": "--tokens 8 --layers 1 --repeats 1 --steps 0",
    "host": "--repeats 1",
    "experts": "--settings 1x16 --hidden 64 --intermediate 32 --experts 4 --layers 1 --vocabulary 100 --rounds 2 "
    "--repeats 1 --dtype float32",
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


def test_smallest_export_time(monkeypatch, tmp_path):
    import export_time

    monkeypatch.setattr(export_time, "LAYERS", 1)
    monkeypatch.setattr(export_time, "SHAPES", {"gate_proj": (16, 24)})
    threads = torch.get_num_threads()
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["export_time.py", "--repeats", "2", "--out", str(out)])
    export_time.main()
    torch.set_num_threads(threads)
    row = json.loads(out.read_text())
    assert row["export_rank"] == 8 and 0 < row["export_ms"] <= row["slowest_ms"] and row["torch"]


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


def test_time_to_loss(monkeypatch, tmp_path, capsys):
    """Without a model: pretraining, a choice of learning rates, and a curve for each form and seed."""
    import time_to_loss

    for task, answer in (("sums", "7"), ("signs", "no")):
        (tmp_path / task).mkdir()
        rows = [{"prompt": f"{task} {i}: ", "completion": answer} for i in range(8)]
        for name in ("train", "test"):
            (tmp_path / task / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = "--layers 1 --pretrain_s 0.1 --batch 5 --steps 4 --search_steps 1 --every 2 --test_rows 2 --test_batch 3"
    options = f"--data {tmp_path} {sizes} --learning_rates 1e-3 1e-2 --seeds 0 --out {tmp_path / 'rows.jsonl'}"
    time_to_loss.main(options.split())
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["family"] for row in rows] == ["lora", "lora_16bit", "ours"]
    for row in rows:
        steps, seconds, losses = zip(*row["curve"], strict=True)
        assert steps == (0, 2, 4) and sorted(seconds) == list(seconds) and seconds[0] == 0.0
        assert losses[0] == pytest.approx(rows[0]["curve"][0][2], rel=1e-3)  # all start at the base
        assert all(0 < loss < 20 for loss in losses) and len(set(losses)) == 3
        assert row["learning_rate"] in (1e-3, 1e-2) and row["tasks"] == ["signs", "sums"]
    assert "| form | learning rate |" in capsys.readouterr().out


# All benchmarks of a GPU


def test_all_benchmarks_share_the_gpus(monkeypatch, tmp_path, capsys):
    import gpu_all

    (tmp_path / "script.py").write_text(
        "import os, sys\n"
        "open(sys.argv[-1], 'a').write(sys.argv[1] + ' ' + os.environ['CUDA_VISIBLE_DEVICES'] + '\\n')\n"
        "sys.exit(sys.argv[1] == 'fails')\n"
    )
    jobs = {name: gpu_all.Job(1, f"script.py {name}") for name in ("a", "fails", "b")}
    jobs["time_to_loss"] = gpu_all.Job(1, "script.py time_to_loss")
    jobs |= {"pair": gpu_all.Job(1, "script.py pair", gpus=2), "long": gpu_all.Job(1000, "script.py long")}
    monkeypatch.setattr(gpu_all, "JOBS", jobs)
    monkeypatch.setattr(gpu_all, "HERE", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    with pytest.raises(SystemExit, match="Failed: fails"):
        gpu_all.main(["--limit", "100", "--data", "folder", "--out", str(tmp_path / "out"), "--only", *jobs])
    ran = dict(line.split() for line in (tmp_path / "out" / "script.jsonl").read_text().splitlines())
    assert ran.keys() == {"a", "fails", "b", "time_to_loss", "pair"} and ran.pop("pair") == "4,5"
    assert set(ran.values()) <= {"4", "5", "6"}
    assert "Not run, for lack of time or GPUs: long" in capsys.readouterr().out

    # One GPU takes them in their order, and leaves out what needs two.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    gpu_all.main(["--out", str(tmp_path / "one"), "--only", "b", "pair", "a"])
    assert (tmp_path / "one" / "script.jsonl").read_text().splitlines() == ["b 4", "a 4"]


def test_commands_of_all_benchmarks_are_valid():
    import gpu_all
    import train_step

    for name, job in gpu_all.JOBS.items():
        script, *options = job.command.split()
        assert (ROOT / "benchmarks" / script).is_file(), name
        if script == "train_step.py":
            args = train_step.parse(options)
            assert {v.family for v in train_step.chosen_variants(args)} >= set(args.families), name
        elif script in ("large.py", "experts.py"):
            importlib.import_module(script[:-3]).parse(options)


# Tables and bars


def row(variant, family, ms, run="1", **kwargs):
    sizes = {"num_heads": 3, "r": 4, "shape": "qwen2.5-3b", "layers": 36, "setting": "8x2048", "base": "bfloat16"}
    times = {"median_ms": ms, "min_ms": ms, "p90_ms": ms and 1.2 * ms, "peak_gib": 30.0}
    machine = {"device": "H100", "date": "2026-01-02", "command": "c", "started": run}
    return {"variant": variant, "family": family, **sizes, **times, **machine, **kwargs}


def test_bars_are_ratios_of_one_run():
    from report import FLOOR, LORA_16, ON_A_GPU, OURS, TASK, bars

    train = [
        # A short run on a faster machine must not be mixed with the long one.
        row(FLOOR, "floor", 100.0, "2"),
        row(FLOOR, "floor", 200.0),
        row(LORA_16, "lora_16bit", 300.0),
        row(OURS, "ours", 240.0),
        row(OURS, "ours", 110.0, "2"),
        # Other depths, bases, hosts, models with Liger and compiled ones are other measurements.
        row(OURS, "ours", 1.0, layers=9),
        row(OURS, "ours", 1.0, liger="0.8"),
        row(f"{OURS}, compiled", "ours_compiled", 1.0),
        row(FLOOR, "floor", 200.0, busy=True),
        row(OURS, "ours", 228.0, busy=True),
        row(LORA_16, "lora_16bit", 100.0, setting="6x512", base="nf4"),
        row(OURS, "ours", 90.0, setting="6x512", base="nf4"),
        row(OURS, "ours", 100.0, setting="6x512"),
        row(TASK, "ours_task", 104.0, setting="6x512"),
    ]
    machine = {"device": "H100", "date": "2026-01-02"}
    step = {"kind": "step", "processes": 2, "case": "bf16-zero3", **machine}
    files = {
        **dict.fromkeys(ON_A_GPU, []),
        "train_step": train,
        "decode": [row(LORA_16, "lora_16bit", 5.0, batch=16), row(OURS, "ours", 6.0, batch=16)],
        "host": [row(OURS, "ours", None, case="mlp", forward_us=70.0, backward_us=80.0)],
        "large": [{**step, "method": "ours", "median_ms": 90.0}, {**step, "method": "lora", "median_ms": 100.0}],
    }
    result = {bar.name: (bar.value, bar.met) for bar in bars(files)}
    expected = {
        "8x2048: time / floor": (1.2, False),
        "8x2048, busy host: time / floor": (1.14, True),
        "6x512, nf4: time / LoRA with a 16-bit adapter": (0.9, True),
        "6x512, nf4: ninth decile / median": (1.2, False),
        "6x512: task router / softmax": (1.04, True),
        "host time of a call in an MLP, us": (150.0, True),
        "bf16-zero3 on two GPUs: time / LoRA": (0.9, True),
        "decoding, batch 16: time / LoRA with a 16-bit adapter": (1.2, False),
        # Not measured.
        "6x512, nf4: time / floor": (None, None),
        "nf4-zero3 on two GPUs: time / LoRA": (None, None),
    }
    for name, (value, met) in expected.items():
        assert result[name] == (value if value is None else pytest.approx(value), met), name
    lines = {bar.name: bar.line() for bar in bars(files)}
    assert lines["8x2048: time / floor"].endswith("1.200  at most 1.08   not met")
    assert "not measured" in lines["6x512, nf4: time / floor"]


def test_rows_are_of_the_newest_day_and_one_card():
    from report import FLOOR, of_one_day

    train = [
        row(FLOOR, "floor", 1.0, date="2026-01-01"),
        row(FLOOR, "floor", 2.0, device="H200"),
        row(FLOOR, "floor", 3.0),
        row(FLOOR, "floor", 4.0),
    ]
    files = {"train_step": train, "decode": [train[0]], "host": [train[1], train[2]]}
    assert of_one_day(files) == {"train_step": train[2:], "decode": [], "host": [train[2]]}
    assert of_one_day({"train_step": []}) == {"train_step": []}


def test_tables_have_ratios_and_failures():
    from report import FLOOR, LORA, OURS, Column, compiled_table, heads_table, steps_of, steps_table

    rows = [
        row(OURS, "ours", 240.0),
        row(FLOOR, "floor", 200.0),
        row(LORA, "lora", 300.0),
        row("R-LoRA loop N=3 r=4", "rlora_loop", None, error="out of memory"),
        row("axolotl", "axolotl", None, error="ImportError: no axolotl"),
    ]
    columns = [Column("2 x 512", steps_of(rows, "2x512")), Column("8 x 2048", steps_of(rows, "8x2048"))]
    lines = steps_table(columns, memory=True).splitlines()
    assert lines[0] == "| form | 8 x 2048 | GiB |"  # a column without rows is left out, and families have an order
    assert lines[2:6] == [
        f"| {FLOOR} | 200 / 240 (1.00) | 30.0 |",
        f"| {LORA} | 300 / 360 (1.50) | 30.0 |",
        "| R-LoRA loop N=3 r=4 | out of memory | 30.0 |",
        f"| **{OURS}** | 240 / 288 (1.20) | 30.0 |",
    ]
    assert lines[-1] == "Not measured: axolotl (ImportError: no axolotl)."
    assert steps_table(columns[:1]) == ""

    assert heads_table(rows) == compiled_table(rows) == ""
    rows += [row(f"N={n} r={r}", "ours", 240.0 + n + r, num_heads=n, r=r) for n in (3, 10) for r in (4, 16)]
    assert heads_table(rows).splitlines()[2:] == ["| 3 | 247 | 259 |", "| 10 | 254 | 266 |"]
    rows += [row(f"{FLOOR}, compiled", "floor_compiled", 100.0), row(f"{OURS}, compiled", "ours_compiled", 120.0)]
    rows += [row(f"{FLOOR}, CUDA graphs", "floor_graphs", 50.0), row(f"{OURS}, CUDA graphs", "ours_graphs", 60.0)]
    table = compiled_table(rows)
    assert f"| qwen2.5-3b, 36 layers, 8 x 2048 | **{OURS}** | 240 | 120 | 60 | 1.20 |" in table
    assert len(table.splitlines()) == 4


def test_sections_without_rows_are_left_out(monkeypatch):
    import report
    from report import FLOOR, LORA_16, ON_A_GPU, OURS, TASK, UNIFORM, sections

    # Times to a loss are those of any machine: the repository has rows.
    monkeypatch.setattr(report, "read", lambda name: [])

    def headings(**files):
        text = sections({**dict.fromkeys(ON_A_GPU, []), **files}, [])
        return [line[4:] for line in text.splitlines() if line.startswith("### ")]

    assert headings() == []
    names = {FLOOR: "floor", LORA_16: "lora_16bit", OURS: "ours", TASK: "ours_task", UNIFORM: "ours_uniform"}
    steps = [
        row(name, family, 10.0, r=10 if name == UNIFORM else 4, setting="2x512") for name, family in names.items()
    ]
    steps[-1]["num_heads"] = 1
    assert headings(train_step=steps[:3]) == ["Short steps"]
    assert headings(train_step=steps) == ["Short steps", "Task router", "One head as plain LoRA"]
    liger, busy = ([{**step, key: value} for step in steps] for key, value in (("liger", "0.8"), ("busy", True)))
    assert headings(train_step=liger + busy) == ["With Liger's kernels", "On a busy host"]
    host = [row(OURS, "ours", None, case=case, forward_us=70.0, backward_us=80.0) for case in ("mlp", "layer")]
    sharded = [
        row(name, "x", 9.0, kind="step", processes=2, case="bf16-zero3", method=name, batch=4, length=2048)
        for name in ("lora", "ours")
    ]
    decode = [row(LORA_16, "lora_16bit", 5.0, batch=16, tokens_per_second=1.0)]
    experts = [row(name, family, 10.0, setting="2x2048") for name, family in list(names.items())[:3]]
    assert headings(experts=experts) == ["Experts"]
    assert headings(host=host, large=sharded, decode=decode) == ["ZeRO-3", "Host time of a call", "Decoding"]


def test_the_same_loss_is_reached_between_two_measurements():
    from report import reached, time_to_loss_table

    curve = [[0, 0.0, 3.0], [10, 1.0, 2.0], [20, 2.0, 2.5], [30, 3.0, 1.0]]
    assert reached(curve, 3.5) == (0, 0.0)
    assert reached(curve, 2.5) == (5.0, 0.5)
    assert reached(curve, 1.75) == (25.0, 2.5)
    assert reached(curve, 0.5) == (30, 3.0)  # never: the end

    facts = {"model": "m", "batch": 4, "tasks": ["a"], "learning_rate": 1e-3}
    rows = [
        row("LoRA", "lora", None, seed=0, curve=[[0, 0.0, 3.0], [10, 1.0, 2.0]], **facts),
        row("ours", "ours", None, seed=0, curve=[[0, 0.0, 3.0], [10, 2.0, 1.0]], **facts),
    ]
    assert time_to_loss_table(rows).splitlines()[2:4] == [
        "| LoRA | 0.001 | 2.0000 | 10 | 1.0 | 100 |",
        "| **ours** | 0.001 | 1.0000 | 5 | 1.0 | 200 |",
    ]
    assert time_to_loss_table([]) == ""


def test_the_figure_has_a_panel_for_each_setting(tmp_path):
    from report import FLOOR, OURS, draw

    draw([row(OURS, "ours", 240.0)], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()  # no floor, no ratio
    widths = []
    for settings in (["8x2048"], ["8x2048", "2x512"]):
        rows = [row(*form, setting=s) for s in settings for form in ((FLOOR, "floor", 200.0), (OURS, "ours", 240.0))]
        draw(rows, tmp_path / "plot.png")
        widths.append(int.from_bytes((tmp_path / "plot.png").read_bytes()[16:20], "big"))
    assert widths[1] > 1.4 * widths[0]
