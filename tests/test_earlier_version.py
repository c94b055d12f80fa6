"""Adapters and checkpoints that an earlier version wrote load, and mean the same."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel


sys.path.insert(0, str(Path(__file__).parent / "fixtures"))

from earlier_version import EARLIER, build_base, logits_of, make_trainer


EXPECTED = json.loads((EARLIER / "expected.json").read_text(encoding="utf-8"))


def test_adapter_of_an_earlier_version_gives_the_same_logits():
    model = PeftModel.from_pretrained(build_base(), EARLIER / "adapter")

    torch.testing.assert_close(logits_of(model)[0, -1, :8], torch.tensor(EXPECTED["logits"]), rtol=1e-4, atol=1e-4)


def test_run_of_an_earlier_version_is_resumed(tmp_path):
    shutil.copytree(EARLIER / "checkpoint-4", tmp_path / "checkpoint-4")
    trainer = make_trainer(tmp_path)

    trainer.train(resume_from_checkpoint=True)

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(EXPECTED["losses"], rel=1e-4)
    assert trainer.tasks_seen() == EXPECTED["tasks_seen"]
