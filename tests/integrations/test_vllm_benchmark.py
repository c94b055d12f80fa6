"""benchmarks/vllm_layers.py: its smallest run with vLLM, and without it its judgment, table and document."""

import importlib
import importlib.util
import json

import pytest
import torch
from processes import ROOT

from rlora_trl.integrations.vllm_layers import VLLM_VERSION


@pytest.fixture
def script(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("vllm_layers")


# With vLLM


@pytest.fixture
def installed():
    """Skips without the release of vLLM that the layers are for."""
    pytest.importorskip("vllm.lora.layers", exc_type=ImportError)
    version = importlib.import_module("vllm").__version__
    if version.partition("+")[0] != VLLM_VERSION:
        pytest.skip(f"needs vLLM {VLLM_VERSION}")


def test_smallest_run(installed, script, monkeypatch, tmp_path, capsys):
    import shapes
    from vllm.lora import utils

    before = utils._all_lora_classes
    monkeypatch.setitem(shapes._QWEN25, "qwen2.5-3b", (64, 96, 1, 4, 2, 100, True))
    monkeypatch.setattr(script, "DTYPES", script.DTYPES[:1])
    out = tmp_path / "rows.jsonl"
    script.main(["--shapes", "qwen2.5-3b", "--tokens", "1", "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    compared = [row for row in rows if row["part"] != "speed"]
    timed = [row for row in rows if row["part"] == "speed"]

    assert len(compared) == len(script.KINDS) * (2 + len(script.STEPS))
    assert all(row["ok"] and row["vllm"].startswith(VLLM_VERSION) for row in rows)
    assert {name for row in compared for name in row["by_adapter"]} == {*script.ADAPTERS, "none", "empty slot"}
    assert [row["variant"] for row in timed] == [script.STOCK, script.RLORA, script.LORA]
    assert all(row[key] > 0 for row in timed for key in row if key.endswith("_us"))
    assert len([line for line in capsys.readouterr().out.splitlines() if " ok " in line]) == len(rows)
    assert utils._all_lora_classes == before


def test_failures_are_rows_and_the_command_fails(installed, script, monkeypatch, tmp_path, capsys):
    """Also one that the layers would not notice: the head weights of other tokens."""
    from rlora_trl.integrations import vllm_layers

    mix = vllm_layers.mix_slots
    monkeypatch.setattr(vllm_layers, "mix_slots", lambda u, *rest: mix(u, *rest).roll(1, 1))
    monkeypatch.setattr(script, "DTYPES", script.DTYPES[:1])
    with pytest.raises(SystemExit, match="12 row"):
        script.main(["--parts", "correct"])
    assert capsys.readouterr().out.count("FAILED") == 12


# Without vLLM


def test_vllm_is_needed(script, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        script.main([])
    assert f"pip install vllm=={VLLM_VERSION}" in capsys.readouterr().err


def test_outputs_are_judged(script, tmp_path):
    """Right ones pass in 16 bits; those with another adapter, or without one, do not."""
    adapters = script.make_adapters(tmp_path, 64, 96)
    assert [adapter.name for adapter in adapters] == [*script.ADAPTERS]
    own = script.Reference(adapters, torch.bfloat16)
    exact = script.Reference(adapters, torch.float64, held=torch.bfloat16)
    x = torch.randn(len(script.TOKENS), 64, dtype=torch.bfloat16)
    for kind in ("gate_up_proj", "qkv_proj"):
        with torch.no_grad():
            right, base = (own.output(kind, x, meant) for meant in (script.TOKENS, [-1] * len(x)))
            row = script.judge(right, own, exact, kind, x, script.TOKENS)
            assert row["ok"] and row["worst"] == 1.0
            assert row["by_adapter"].keys() == {*script.ADAPTERS, "none", "empty slot"}
            for number, name in enumerate(script.ADAPTERS):
                rows = torch.tensor(script.TOKENS) == number
                wrong = torch.where(rows[:, None], base, right)
                row = script.judge(wrong, own, exact, kind, x, script.TOKENS)
                assert [key for key, each in row["by_adapter"].items() if not each["ok"]] == [name]


def speed_rows(script, tokens, factor, **fields):
    times = {"lora_graph_us": 10.0, "linear_graph_us": 20.0, "base_graph_us": 8.0, "lora_eager_us": 1000.0}
    common = {"part": "speed", "shape": "qwen2.5-3b", "tokens": tokens, "slots": 4, "dtype": "bfloat16", "ok": True}
    common |= {"device": "card", "torch": "2", "triton": "3", "vllm": "0.32.0", "date": "2026-01-01", "command": "a"}
    return [
        common | {"variant": name} | {key: value * scale for key, value in times.items()} | fields
        for name, scale in ((script.STOCK, 1.0), (script.RLORA, factor), (script.LORA, 1.5))
    ]


def test_table(script):
    """Of the largest run, relative to vLLM's own layers; a row that failed leaves its line out."""
    rows = speed_rows(script, 1, 1.2) + speed_rows(script, 16, 2.0)
    rows += speed_rows(script, 64, 3.0)[:2] + speed_rows(script, 256, 9.0, command="b")
    lines = script.speed_table(rows).splitlines()
    assert [line for line in lines if line.startswith("| q")] == [
        "| qwen2.5-3b, 1 | 8 | 10 | 12 (1.20) | 15 (1.50) | 20 | 24 (1.20) | 30 (1.50) |",
        "| qwen2.5-3b, 16 | 8 | 10 | 20 (2.00) | 15 (1.50) | 20 | 40 (2.00) | 30 (1.50) |",
    ]
    assert "4 adapters in a batch" in lines[-1] and "1.0 to 1.0 ms with vLLM's" in lines[-1]
    assert "1.2 to 3.0 ms with the plugin's. card, torch 2, triton 3, vLLM 0.32.0, 2026-01-01." in lines[-1]


def test_the_document_counts_what_was_compared_on_a_gpu(script):
    facts = {"part": "graph", "device": "card", "command": "a"}
    rows = [
        facts | {"ok": True, "worst": 1.04},
        facts | {"ok": False, "error": "no"},
        facts | {"ok": True, "worst": 1.0},
    ]
    assert "3 cases" in script.document(rows) and "at most 1.04 times" in script.document(rows)
    assert "1 failed" in script.document(rows)
    assert script.document([row | {"device": "cpu"} for row in rows]) == script.document([]) == ""


def test_the_page_has_the_table_of_the_rows(script, monkeypatch, tmp_path):
    page = tmp_path / "vllm.md"
    page.write_text(script.PAGE.read_text())
    monkeypatch.setattr(script, "PAGE", page)
    script.main(["--update"])
    assert page.read_text() == (ROOT / "docs" / "integrations" / "vllm.md").read_text()
