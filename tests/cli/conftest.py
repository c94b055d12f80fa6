"""The command line in this process, and an adapter for it as training leaves one."""

import json

import pytest
from peft import get_peft_model
from testing_utils import perturb, task_rows
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rlora_cli.app import app
from rlora_trl import RLoraConfig


OPTIONS = {"same": [" yes", " no"], "colour": [" red", " blue", " green"], "first": []}


@pytest.fixture
def rlora():
    """Run the command line with these words; the result has `exit_code`, `stdout` and `stderr`."""

    def run(*words, **settings):
        return CliRunner().invoke(app, [str(word) for word in words], prog_name="rlora", **settings)

    return run


@pytest.fixture(scope="session")
def rows_folder(tmp_path_factory):
    """Three tasks, in a folder with a train and a test split."""
    folder = tmp_path_factory.mktemp("rows")
    for split, seed in (("train", 0), ("test", 1)):
        rows = [
            {**row, "task": task, "options": options}
            for task, options in OPTIONS.items()
            for row in task_rows(task, 8, seed)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture
def make_adapter(model_folders, tmp_path):
    """Save an adapter that has left its initial values, with the settings given, and return its folder."""

    def make(name="adapter", **config):
        model = AutoModelForCausalLM.from_pretrained(model_folders["llama"])
        config = {"task_type": "CAUSAL_LM", "tasks": list(OPTIONS), **config}
        model = get_peft_model(model, RLoraConfig(**config))
        perturb(model)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make
