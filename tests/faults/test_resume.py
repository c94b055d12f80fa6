"""A resumed run is the run that was saved, or it does not begin."""

import json
import logging
import shutil

import pytest
import torch
from testing_utils import TINY_MODELS, task_datasets
from transformers.trainer import Trainer

from rlora_trl import RLoraConfig, RLoraSFTConfig, RLoraSFTTrainer


ARGUMENTS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "gradient_checkpointing": False,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "mixture_rows": 0,
}


def build(model, output, config=None, tasks=None, **arguments):
    data = task_datasets(12)
    return RLoraSFTTrainer(
        model,
        RLoraSFTConfig(str(output), **{**ARGUMENTS, "max_steps": 5, **arguments}),
        train_dataset={(tasks or {}).get(name, name): rows for name, rows in data.items()},
        peft_config=RLoraConfig(**{"head_dropout": 0.2, **(config or {})}),
    )


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


@pytest.fixture(scope="module")
def run(model_folders, tmp_path_factory):
    """Model, output folder with checkpoints of steps 2 and 4, and the losses of five steps."""
    output = tmp_path_factory.mktemp("run") / "out"
    trainer = build(model_folders["llama"], output)
    trainer.train()
    assert {path.name for path in output.glob("checkpoint-*")} >= {"checkpoint-2", "checkpoint-4"}
    shutil.rmtree(output / "checkpoint-5", ignore_errors=True)
    return model_folders["llama"], output, losses(trainer)


@pytest.fixture
def output(run, tmp_path):
    """A copy of the run's output that may be damaged."""
    return shutil.copytree(run[1], tmp_path / "out")


def refused(trainer, resume=True):
    """The error with which a run is refused; no step of it was made."""
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=resume)
    assert not any(entry["step"] > 4 for entry in trainer.state.log_history)
    return str(error.value)


@pytest.mark.parametrize("resume", [True, "checkpoint-2"])
def test_unchanged_run_resumes(run, output, resume):
    model, _, expected = run
    trainer = build(model, output)
    trainer.train(resume_from_checkpoint=resume if resume is True else str(output / resume))
    resumed = losses(trainer)
    assert resumed == pytest.approx(expected, rel=1e-6) and set(resumed) == {1, 2, 3, 4, 5}


# A resume that did not really load


def test_adapter_that_was_not_loaded(run, output, monkeypatch):
    """As with a model that is wrapped once more, so that no saved name fits."""
    monkeypatch.setattr(Trainer, "_load_from_checkpoint", lambda *args, **kwargs: None)
    text = refused(build(run[0], output))
    assert "tensors in the model differ from" in text and "checkpoint-4" in text, text


def test_one_tensor_that_was_not_loaded(run, output, monkeypatch):
    load = Trainer._load_from_checkpoint

    def load_most(self, *args, **kwargs):
        load(self, *args, **kwargs)
        name, parameter = next((n, p) for n, p in self.model.named_parameters() if n.endswith(".router"))
        parameter.data[0, 0] += 1e-3

    monkeypatch.setattr(Trainer, "_load_from_checkpoint", load_most)
    text = refused(build(run[0], output))
    assert "1 of " in text and ".router" in text, text


@pytest.mark.parametrize("resume", [True, "checkpoint-4"])
def test_other_adapter_in_the_checkpoint(run, output, tmp_path, resume):
    other = build(run[0], tmp_path / "other", seed=7)
    other.save_model()
    for step in (2, 4):
        shutil.copy(tmp_path / "other" / "adapter_model.safetensors", output / f"checkpoint-{step}")
    text = refused(build(run[0], output), resume if resume is True else str(output / resume))
    assert "adapter_model.safetensors differ from those that were saved" in text, text


def test_other_base_model_in_a_local_folder_is_warned_of(run, output, tmp_path, tokenizer, caplog):
    torch.manual_seed(5)
    TINY_MODELS["llama"]().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    with caplog.at_level(logging.WARNING):
        build(str(tmp_path / "base"), output).train(resume_from_checkpoint=True)
    assert f"this run has {str(tmp_path / 'base')!r}. Make sure that they are the same model" in caplog.text


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"])
def test_file_that_is_gone(run, output, name):
    for step in (2, 4):
        (output / f"checkpoint-{step}" / name).unlink()
    trainer = build(run[0], output)
    assert name in refused(trainer) and name in refused(trainer, str(output / "checkpoint-4"))


def test_no_optimizer_was_saved(run, tmp_path):
    """Without the moments of its optimizer it would be another run."""
    trainer = build(run[0], tmp_path / "out", save_only_model=True)
    trainer.train()
    text = refused(build(run[0], tmp_path / "out"))
    assert "save_only_model" in text, text


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "optimizer.pt").write_bytes((folder / "optimizer.pt").read_bytes()[:-9]),
        lambda folder: (folder / "trainer_state.json").write_text((folder / "trainer_state.json").read_text()[:40]),
        lambda folder: (folder / "trainer_state.json").write_text(""),
        lambda folder: (folder / "rlora_state.json").write_text(""),
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
    ],
    ids=["optimizer cut", "state cut", "state empty", "own state empty", "settings cut", "no adapter"],
)
def test_damaged_checkpoint_is_passed_over(run, output, damage, caplog):
    """As a disk may leave it that lost what was not flushed: the run resumes from the one before."""
    model, _, expected = run
    damage(output / "checkpoint-4")
    trainer = build(model, output)
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=True)
    assert f"Skipped the damaged checkpoint {output / 'checkpoint-4'}" in caplog.text
    assert losses(trainer) == pytest.approx(expected, rel=1e-6)
    assert json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


# Other settings


@pytest.mark.parametrize(
    ("setting", "before", "now"),
    [
        ("r", 4, 8),
        ("num_heads", 3, 2),
        ("lora_alpha", 32, 16),
        ("router", "softmax", "task"),
        ("init_weights", "rlora", "zero_b"),
        ("target_modules", None, ["up_proj"]),
        ("share_a", True, False),
    ],
)
def test_other_settings_are_refused(run, output, setting, before, now):
    text = refused(build(run[0], output, {setting: now}))
    line = next(line.strip() for line in text.splitlines() if line.strip().startswith(f"{setting}: "))
    if before is None:
        assert "down_proj" in line and line.endswith("this run has ['up_proj']"), line
    else:
        assert line == f"{setting}: checkpoint has {before!r}, this run has {now!r}"


def test_all_differences_are_listed(run, output):
    text = refused(build(run[0], output, {"r": 8, "num_heads": 2}, tasks={"same": "other"}))
    assert "r: checkpoint has 4, this run has 8" in text
    assert "num_heads: checkpoint has 3, this run has 2" in text
    assert "tasks: checkpoint has ['first', 'colour', 'same'], this run has ['first', 'colour', 'other']" in text


def test_other_dropout_is_a_choice(run, output, caplog):
    trainer = build(run[0], output, {"head_dropout": 0.0})
    with caplog.at_level("WARNING"):
        trainer.train(resume_from_checkpoint=True)
    assert "head_dropout: checkpoint has 0.2, this run has 0.0" in caplog.text
    assert trainer.state.global_step == 5
