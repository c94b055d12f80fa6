"""benchmarks/large.py at tiny sizes on the CPU: its 4-bit models, its processes, its search, and its tables."""

import json
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model
from processes import ROOT
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from rlora_trl import RLoraConfig


sys.path.insert(0, str(ROOT / "benchmarks"))

import large
import large_report
from large_models import build_model
from large_shapes import SHAPES


CPU = torch.device("cpu")
TINY = SHAPES["tiny"]


# Models


def as_bytes(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("name", list(SHAPES))
def test_counts_agree_with_the_model_and_the_adapter(name):
    shape = SHAPES[name].with_layers(2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config(64))
        assert sum(p.numel() for p in model.parameters() if p.ndim > 1) == shape.parameters
        model = get_peft_model(model, RLoraConfig(r=4, num_heads=3))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == shape.adapter_parameters(4, 3)
    assert shape.lora_rank(4, 3) * 3 * 2 * (shape.hidden + shape.mlp) == pytest.approx(trained, rel=0.05)


@pytest.mark.parametrize(
    "family, storage",
    [("LlamaConfig", torch.uint8), ("Qwen2Config", torch.bfloat16), ("MistralConfig", torch.uint8)],
)
def test_four_bit_model_is_what_transformers_loads(tmp_path, storage, family):
    """Filled weight by weight, it equals the same 16-bit weights quantized by `from_pretrained`, bit for bit."""
    pytest.importorskip("bitsandbytes")
    shape = replace(TINY, family=family)
    build_model(shape, "bf16", CPU, 64).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=storage,
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.bfloat16)
    made = build_model(shape, "nf4", CPU, 64, storage)

    # Modules, parameters, states and buffers.
    assert {n: type(m) for n, m in made.named_modules()} == {n: type(m) for n, m in loaded.named_modules()}
    assert {n: type(p) for n, p in made.named_parameters()} == {n: type(p) for n, p in loaded.named_parameters()}
    for ours, theirs in (
        (made.state_dict(), loaded.state_dict()),
        (dict(made.named_buffers()), dict(loaded.named_buffers())),
    ):
        assert ours.keys() == theirs.keys()
        assert all(ours[key].dtype == theirs[key].dtype for key in ours)
        # As bytes: packed values may look like NaN.
        assert all(torch.equal(as_bytes(ours[key]), as_bytes(theirs[key])) for key in ours)

    # What transformers and PEFT ask a quantized model.
    for name in ("is_loaded_in_4bit", "is_quantized", "quantization_method"):
        assert getattr(made, name) == getattr(loaded, name), name
    assert made.config.quantization_config.to_dict() == loaded.config.quantization_config.to_dict()
    assert type(made.hf_quantizer) is type(loaded.hf_quantizer)
    weight = made.model.layers[0].mlp.gate_proj.weight
    assert weight.quant_state.nested and weight.module.quant_state is weight.quant_state

    ids = torch.randint(0, TINY.vocabulary, (2, 9))
    with torch.no_grad():
        assert torch.equal(made(ids).logits, loaded(ids).logits)


# A worker, in this process


def job(**changes):
    arguments = ["--tiny", "--steps", "1", "--warmup", "1"]
    name, method = changes.pop("case", "nf4"), changes.pop("method", "ours")
    made = large.make_job(large.parse(arguments), name, method, changes.pop("processes", 1), **changes)
    return {**made, "layers": made["layers"] or TINY.layers, "id": 1, "limit": 60}


@pytest.mark.parametrize("method", ["ours", "lora"])
def test_worker_trains_four_bit_models(monkeypatch, method):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import large_worker

    answer = large_worker.answer(job(method=method))
    assert "error" not in answer, answer
    row = answer["row"]
    assert len(row["times_ms"]) == 1 and row["times_ms"][0] > 0
    assert row["loss"] == pytest.approx(torch.tensor(float(TINY.vocabulary)).log().item(), rel=0.1)
    lora = TINY.lora_rank(4, 3) * 3 * TINY.layers * (TINY.hidden + TINY.mlp)
    assert row["trainable"] == (TINY.adapter_parameters(4, 3) if method == "ours" else lora)
    assert answer["environment"]["torch"] == torch.__version__


def test_worker_reports_errors(monkeypatch):
    import large_worker

    def build(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(large_worker, "build_model", build)
    assert large_worker.answer(job())["error"] == large.OUT_OF_MEMORY
    monkeypatch.setattr(large_worker, "build_model", lambda *args: 1 / 0)
    assert large_worker.answer(job())["error"] == "ZeroDivisionError: division by zero"


def test_both_methods_train_on_the_same_tokens():
    import large_worker

    ours, lora = (large_worker.random_rows(6, 8, 500, tasks=tasks) for tasks in (True, False))
    assert ours["input_ids"] == lora["input_ids"] and len({tuple(row) for row in ours["input_ids"]}) == 6
    assert set(ours["task"]) == {"task0", "task1", "task2", "task3"} and "task" not in lora.column_names


# Processes


STUB = """
    import json, os, sys, time
    from pathlib import Path
    folder, rank = Path(sys.argv[2]), int(os.environ.get("RANK", 0))
    for line in sys.stdin:
        job = json.loads(line)
        behavior = job["behavior"][rank]
        print("rank", rank, "has to", behavior, flush=True)
        if behavior == "die":
            sys.exit(3)
        if behavior == "hang":
            time.sleep(100)
        row = {"times_ms": [10.0 + rank, 20.0 + rank, 12.0 + rank], "peak_gib": 1.0 + rank, "peak_with_start_gib": 3.0,
               "reserved_gib": 2.0, "loss": 6.0, "build_s": 0, "wall_s": 1, "engine": os.environ.get("WORLD_SIZE", "")}
        errors = {"error": "it broke", "memory": "out of memory", "memory left": "out of memory"}
        answer = {"error": errors[behavior]} if behavior in errors else {"row": row}
        answer["left_gib"] = 1.0 if behavior in ("leave", "memory left") else 0.0
        answer["environment"] = {"device": "stub", "date": "today"}
        path = folder / f"{job['id']}.{rank}.json"
        path.with_suffix(".draft").write_text(json.dumps(answer))
        path.with_suffix(".draft").replace(path)
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    program = tmp_path / "stub.py"
    program.write_text(textwrap.dedent(STUB))
    monkeypatch.setattr(large, "PROGRAM", program)
    started = []

    def start(processes=2, strategy="single"):
        started.append(large.Workers(tmp_path, processes, strategy))
        return started[-1]

    yield start
    for workers in started:
        workers.end()


@pytest.mark.parametrize(
    ("behavior", "limit", "error"),
    [
        (["error", "hang"], 20, "it broke"),
        (["work", "die"], 20, "a process died"),
        (["hang", "work"], 1.5, "no answer within 2 s"),
    ],
)
def test_a_failing_process_ends_the_others(stub, behavior, limit, error):
    workers = stub()
    answers = workers.run({**job(processes=2), "behavior": behavior}, limit)
    row = large.merge(job(processes=2), answers, "large.py")
    assert row["error"] == error and row["median_ms"] is None and row["parameters"] == TINY.parameters
    assert not workers.alive and f"has to {behavior[0]}" in workers.log_tail()
    assert error in large.line_of(row)


def test_a_process_works_until_it_keeps_memory(stub):
    workers = stub(1)
    for behavior, alive in (("memory", True), ("work", True), ("memory left", False)):
        answers = workers.run({**job(), "behavior": [behavior]}, 20)
        assert answers[0].get("error") == (None if behavior == "work" else large.OUT_OF_MEMORY)
        assert workers.alive == alive


def test_all_cases_run_or_say_why(stub, tmp_path, monkeypatch, capsys):
    """Two lanes share the cases of one process; a case of two that fails leaves a row, and the next ones run."""
    make_job = large.make_job

    def with_behavior(args, name, method, processes, **changes):
        behavior = "die" if (name, method, processes) == ("bf16-zero2", "ours", 2) else "work"
        return make_job(args, name, method, processes, **changes, behavior=[behavior] * processes)

    monkeypatch.setattr(large, "make_job", with_behavior)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    out = tmp_path / "rows" / "large.jsonl"
    args = large.parse(["--tiny", "--processes", "2", "1", "--lanes", "2", "--cases", "nf4", "bf16-zero2", "bf16"])
    large.run_cases(args, large.Recorder(out, "large.py"), large.Clock(60), tmp_path)
    rows = large_report.read(out)
    expected = {(p, c, m) for p in (1, 2) for c in args.cases for m in large.METHODS}
    assert {(row["processes"], row["case"], row["method"]) for row in rows} == expected and len(rows) == len(expected)
    failed = [row for row in rows if "error" in row]
    assert [(row["case"], row["method"], row["processes"]) for row in failed] == [("bf16-zero2", "ours", 2)]
    assert "has to die" in capsys.readouterr().out
    # Of two processes, the slower one gives the time and the larger one the memory.
    pair = next(row for row in rows if row["processes"] == 2 and "error" not in row)
    assert (pair["median_ms"], pair["peak_gib"], pair["engine"], pair["device"]) == (13.0, 2.0, "2", "stub")
    large.run_cases(args, large.Recorder(out, "large.py"), large.Clock(5), tmp_path)
    assert len(large_report.read(out)) == len(rows) and "no time is left" in capsys.readouterr().out


# The search


@pytest.mark.parametrize("expected", [0.5, 0.7, 1.2])
def test_search_finds_the_most_layers_in_few_tries(expected):
    def peak(layers):
        return 3.0 + 0.72 * layers + 0.1 * (layers % 3)

    for capacity in (78.4, 40.0, 79.9, 30.0, 0.0):
        search, tries = large.Search(88, expected), 0
        while (layers := search.next(capacity)) is not None:
            tries += 1
            assert layers not in search.fits and layers not in search.fails, "tried twice"
            search.note(layers, peak(layers) if peak(layers) <= capacity else None)
        most = max(search.fits, default=0)
        assert tries <= 9 and capacity < peak(most + 1)
        assert peak(most) <= capacity if most else min(search.fails) == 1


def test_search_stops_at_other_errors_than_memory():
    tries = []

    def attempt(layers):
        tries.append(layers)
        return {"error": "ImportError: no"} if len(tries) == 2 else {"reserved_gib": 60.0, "gpu_gib": 79.0}

    search = large.Search(88, 0.7)
    large.search_layers(search, attempt, large.Clock(60))
    assert len(tries) == 2 and set(search.fits) == {88} and not search.fails


def test_a_layer_takes_what_is_expected():
    shape = SHAPES["mistral-large-123b"]
    assert large.gib_per_layer(shape, 2048) == pytest.approx(0.516 * shape.layer_weights / 2**30, rel=0.15)


# Tables


def row(**changes):
    made = {
        "kind": "step", "case": "nf4", "base": "nf4", "processes": 1, "method": "ours", "shape": "qwen2.5-7b",
        "layers": 28, "parameters": 7615283200, "batch": 4, "length": 2048, "median_ms": 1100.0, "peak_gib": 12.34,
        "peak_with_start_gib": 13.5, "device": "GPU X", "torch": "2", "date": "2026-01-01", "command": "large.py",
    }  # fmt: skip
    return {**made, **changes}


ROWS = [
    row(),
    row(method="lora", median_ms=1000.0, peak_gib=11.9),
    row(processes=2, median_ms=1222.2),
    row(processes=2, method="lora", median_ms=1250.0),
    row(processes=2, case="bf16-fsdp2", median_ms=None, error="RuntimeError: no"),
    row(processes=2, case="bf16-fsdp2", method="lora", median_ms=800.0),
    row(case="bf16", method="lora", median_ms=720.0),
    row(kind="largest", shape="mistral-large-123b", layers=88, parameters=122.6e9, batch=1, median_ms=3000.0),
    row(kind="largest", shape="mistral-large-123b", layers=88, parameters=122.6e9, batch=1, method="lora",
        median_ms=None, error="out of memory"),
]  # fmt: skip


def test_tables():
    text = large_report.tables(ROWS)
    assert "| 1 | 4-bit | 1000 | 1100 | 1.10 | 11.9 | 12.3 | 13.5 |" in text
    assert "| 2 | 4-bit, DDP | 1250 | 1222 | 0.98 |" in text
    assert "| 2 | bf16, FSDP2 | 800 | failed |  |" in text
    assert "| 1 to 2 | 4-bit | 80 % | 90 % |" in text
    assert "| 1 to 2 | bf16, FSDP2 | 90 % (of bf16) |  |" in text
    assert "| mistral-large-123b, 88 | 122.6 B | out of memory | 3000 | out of memory | 12.3 |" in text
    assert "GPU X: qwen2.5-7b shape, 28 layers, 4 x 2048 tokens" in text and "torch 2, 2026-01-01." in text

    # The last run counts, with the median of its rounds; each device has its own tables.
    again = [row(command="large.py --rounds 3", median_ms=value) for value in (900.0, 990.0, 950.0)]
    assert "| 1 | 4-bit | 1000 | 950 |" in large_report.tables([*ROWS, *again])
    both = large_report.tables([*ROWS, row(device="GPU Y", median_ms=500.0)])
    assert "| 1 | 4-bit | 1000 | 1100 |" in both and "| 1 | 4-bit |  | 500 |" in both


def test_report_replaces_its_block_alone(tmp_path):
    document, rows = tmp_path / "large-models.md", tmp_path / "large.jsonl"
    rows.write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    document.write_text("# Large\n\nnothing here\n")
    with pytest.raises(ValueError, match="has no block between"):
        large_report.update(document, rows)
    document.write_text(f"# Large\n\n{large_report.BEGIN}\nold\n{large_report.END}\n\nAfter.\n")
    text = large_report.update(document, rows)
    written = document.read_text()
    assert written == f"# Large\n\n{large_report.BEGIN}\n\n{text}\n\n{large_report.END}\n\nAfter.\n"
    large_report.update(document, rows)
    assert document.read_text() == written
