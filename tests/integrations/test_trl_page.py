"""docs/integrations/trl.md: its commands as written, and each feature of the trainers that it lists as tested."""

import json
import os
import shlex
import sqlite3
import sys

import processes
import pytest
from peft import LoraConfig
from safetensors.torch import load_file
from testing_utils import build_tokenizer, task_datasets, task_rows
from transformers import AutoModelForCausalLM
from trl import BEMACallback, SFTConfig, SFTTrainer

from rlora_trl import RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer


PROGRAMS = {
    "rlora": processes.RLORA,
    "python": [sys.executable],
    "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"],
}
SMALL = "--max_steps 2 --report_to none --save_strategy no --bf16 false --use_cpu --dataloader_pin_memory false"
STEPS = {"report_to": "none", "save_strategy": "no", "bf16": False, "use_cpu": True, "dataloader_pin_memory": False}


@pytest.fixture
def rows_folder(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, task_rows("first", 12))))
    return folder


def run(command, folder, **variables):
    path = os.pathsep.join([str(processes.ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, **processes.CPU, "PYTHONPATH": path, **variables}
    return processes.run(command, cwd=folder, env=env, timeout=300)


@pytest.fixture
def script(blocks, adapter, rows_folder, tmp_path):
    """The script of the page on files of the test, with settings for a CPU."""
    (text,) = blocks("trl.md", "python")
    assert "rlora" not in text
    for name, value in {
        "user/adapter": adapter,
        "my-rows": rows_folder,
        '"trained", max_steps=2': f'"trained", max_steps=2, **{STEPS}',
    }.items():
        assert name in text
        text = text.replace(name, str(value))
    (tmp_path / "script.py").write_text(text)
    return tmp_path / "script.py"


def test_without_the_module_the_script_fails(script, tmp_path):
    result = run([sys.executable, "script.py"], tmp_path)
    assert result.returncode == 1 and result.stderr.endswith("KeyError: 'RLORA'\n")


@pytest.mark.slow
def test_commands_as_written(blocks, script, adapter, model_folders, rows_folder, tmp_path):
    """Each line of the first block; what it trains can be told by the files that it leaves."""
    before = load_file(adapter / "adapter_model.safetensors")
    left = {"rlora": ["adapter/adapter_model.safetensors"], "script.py": ["trained/adapter_model.safetensors"]}
    lines = blocks("trl.md", "bash")[0].splitlines()
    assert len(lines) == 4
    for line in lines:
        words = shlex.split(line, comments=True)
        names = {"BASE": model_folders["llama"], "DATA": str(rows_folder)}
        command = [*PROGRAMS[words[0]], *(names.get(word, word) for word in words[1:] if word != "ARGUMENTS")]
        if "script.py" not in words:
            command += SMALL.split()
        folder = tmp_path / f"line-{lines.index(line)}"
        folder.mkdir()
        if "script.py" in words:
            (folder / "script.py").write_text(script.read_text())
        result = run(command, folder)
        assert result.returncode == 0, (line, result.stderr)
        expected = next((files for word, files in left.items() if word in words), ["lora/model.safetensors"])
        for name in expected:
            trained = load_file(folder / name)
            assert "script.py" not in words or any(not trained[key].equal(before[key]) for key in before), line


def test_the_stock_script_refuses_any_adapter_as_its_model(adapter, tmp_path):
    """So that registering would not help `trl sft`, as the page says."""
    with pytest.raises(ValueError, match="Unrecognized model"):
        SFTTrainer(str(adapter), SFTConfig(str(tmp_path), **STEPS), train_dataset=task_datasets(12)["first"])


def logged_run(model_folders, folder, tracker, **options):
    args = RLoraSFTConfig(
        str(folder), **{**STEPS, "report_to": tracker, "logging_steps": 1, "max_steps": 2, **options}
    )
    trainer = RLoraSFTTrainer(
        model_folders["llama"],
        args,
        train_dataset=task_datasets(12),
        peft_config=RLoraConfig(),
        processing_class=build_tokenizer(),
    )
    trainer.train()
    logged = {key for entry in trainer.state.log_history for key in entry if "loss" in key or key.startswith("head_")}
    assert {"loss", "first_loss", "head_load_max"} <= logged
    return {f"train/{key}" for key in logged if key != "train_loss"}  # at the end, which wandb's callback keeps apart


def test_tensorboard(model_folders, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    logged = logged_run(model_folders, tmp_path / "out", "tensorboard")
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert logged <= set(events.Tags()["scalars"])
    assert len(events.Scalars("train/first_loss")) == 2


def test_wandb(model_folders, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_PROJECT", "rlora-test")
    logged = logged_run(model_folders, tmp_path / "out", "wandb")
    try:
        assert logged <= set(dict(wandb.run.summary))
    finally:
        wandb.finish()
    assert list(tmp_path.rglob("*.wandb"))


def test_trackio(model_folders, rows_folder, tmp_path):
    """In a process of its own, as trackio chooses its folder when it is imported."""
    pytest.importorskip("trackio")
    words = ["--model_name_or_path", model_folders["llama"], "--dataset_name", str(rows_folder), *SMALL.split()]
    words += ["--report_to", "trackio", "--logging_steps", "1", "--output_dir", "out", "--project", "rlora-test"]
    result = run([*processes.RLORA, "train", *words], tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    assert result.returncode == 0, result.stderr
    (database,) = (tmp_path / "trackio").rglob("rlora-test.db")
    with sqlite3.connect(database) as connection:
        rows = [json.loads(row) for (row,) in connection.execute("SELECT metrics FROM metrics")]
    assert {"train/loss", "train/head_load_max", "train/router_entropy"} <= {key for row in rows for key in row}


@pytest.mark.parametrize("kind", ["lora", "rlora"])
def test_bema_fails_with_every_adapter(model_folders, tmp_path, kind):
    """As the page says; once this passes upstream, the row of the page changes."""
    trainer, args, config = {
        "lora": (SFTTrainer, SFTConfig, LoraConfig(task_type="CAUSAL_LM")),
        "rlora": (RLoraSFTTrainer, RLoraSFTConfig, RLoraConfig()),
    }[kind]
    trainer = trainer(
        AutoModelForCausalLM.from_pretrained(model_folders["llama"]),
        args(str(tmp_path), max_steps=1, **STEPS),
        train_dataset=task_datasets(12)["first"],
        peft_config=config,
        processing_class=build_tokenizer(),
        callbacks=[BEMACallback()],
    )
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'peft_config'"):
        trainer.train()
