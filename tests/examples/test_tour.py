"""`examples/tour.ipynb`: all cells run, on a tiny model, and the file has no outputs."""

import json
import os
import re

import pytest
import torch
from processes import CPU, ROOT
from testing_utils import SPECIAL
from tiny_flan import load_tiny_flan
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


NOTEBOOK = ROOT / "examples" / "tour.ipynb"


@pytest.fixture
def tiny_model(tmp_path):
    """A model that knows the words of the tasks."""
    rows = [row for split in ("train", "test") for rows in load_tiny_flan(split, seed=0).values() for row in rows]
    words = sorted({word for row in rows for word in (row["prompt"] + row["completion"]).split()})
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_no_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5 and not any(cell["outputs"] or cell["execution_count"] for cell in code)


@pytest.mark.slow
def test_all_cells(tiny_model, tmp_path, monkeypatch):
    nbclient, nbformat = (pytest.importorskip(name) for name in ("nbclient", "nbformat"))
    environment = {"TOUR_MODEL": str(tiny_model), "TOUR_FOLDER": str(tmp_path / "tour"), "TOUR_STEPS": "12", **CPU}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert re.search(r"base [\d.]+ %   LoRA [\d.]+ %   R-LoRA [\d.]+ %", printed)
    assert "user/tour" in printed and "with the adapter:" in printed
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "head_similarity</code>: " in (tmp_path / "tour" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "tour" / "pulled" / "adapter_model.safetensors").is_file()
