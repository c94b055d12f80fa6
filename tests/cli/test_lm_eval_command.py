"""`rlora lm-eval`: the harness on a task in local files, against a direct call of the model."""

import importlib.util
import json
import os
import sys

import processes
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from testing_utils import build_tokenizer, task_rows

from rlora_cli import lm_eval


COLOURS = ["red", "blue", "green"]
TASK = """\
task: local_colour
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: answer
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""
needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra `lm-eval`")


def likelihoods(model, row, vocabulary=None):
    """The log-likelihood of each option, unpadded, with the first words of the vocabulary."""
    tokenizer, values = build_tokenizer(), []
    for option in row["choices"]:
        begin = len(tokenizer(row["prompt"])["input_ids"])
        ids = tokenizer(f"{row['prompt']} {option}", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(ids).logits[0, :, :vocabulary].float(), -1)
        values.append(sum(logprobs[i - 1, ids[0, i]].item() for i in range(begin, ids.shape[1])))
    return values


def run(folder, model_args):
    """Run the command on the task in a folder: accuracy, and the likelihoods of each row."""
    path = os.pathsep.join([str(processes.ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, **processes.CPU, "PYTHONPATH": path, "HF_HOME": str(folder / "hub")}
    words = ["--model", "hf", "--model_args", model_args, "--tasks", "local_colour", "--include_path", str(folder)]
    words += ["--device", "cpu", "--batch_size", "4", "--output_path", str(folder / "out"), "--log_samples"]
    result = processes.run([*processes.RLORA, "lm-eval", *words], env=env, cwd=folder, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "local_colour" in result.stdout
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    samples.unlink()
    return [row["acc"] for row in rows], [[float(pair[0]) for pair in row["filtered_resps"]] for row in rows]


@pytest.mark.slow
@needs_harness
def test_base_and_adapter(make_adapter, model_folders, tmp_path):
    rows = [
        {"prompt": row["prompt"], "choices": COLOURS, "answer": COLOURS.index(row["completion"].strip())}
        for row in task_rows("colour", 12)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "colour.yaml").write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    folder = make_adapter()
    model = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    base_args = f"pretrained={model_folders['llama']},dtype=float32"
    with model.disable_adapter():
        expected_base = [likelihoods(model, row) for row in rows]
    # The harness cuts the vocabulary of a model with an adapter to that of its tokenizer.
    expected = [likelihoods(model, row, len(build_tokenizer())) for row in rows]

    for values, args in ((expected_base, base_args), (expected, f"{base_args},peft={folder}")):
        accuracies, found = run(tmp_path, args)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(values), rtol=1e-4, atol=1e-4)
        best = [row.index(max(row)) for row in values]
        assert accuracies == [float(choice == row["answer"]) for choice, row in zip(best, rows, strict=True)]
    assert expected != expected_base


def test_arguments_are_passed_on_unchanged(rlora, monkeypatch):
    """Underscores, help and double hyphens too."""
    received = []
    module = type(sys)("lm_eval.__main__")
    module.cli_evaluate = lambda: received.append(list(sys.argv))
    monkeypatch.setitem(sys.modules, "lm_eval", type(sys)("lm_eval"))
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", module)
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: True)
    before = list(sys.argv)
    for words in (["run", "--model_args", "a=b", "--debug"], ["--help"], ["ls", "--", "-x"], []):
        result = rlora("lm-eval", *words)
        assert result.exit_code == 0, result.stderr
        assert received.pop() == ["lm-eval", *words]
    assert sys.argv == before


def test_the_harness_is_not_installed(rlora, monkeypatch):
    monkeypatch.setattr(lm_eval, "find_spec", lambda name: None)
    result = rlora("lm-eval", "--tasks", "arc_easy")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Install it with `pip install rlora-trl[lm-eval]`." in result.stderr
