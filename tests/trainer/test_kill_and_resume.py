"""A run that is killed after a checkpoint and resumed in a new process gives the losses of an uninterrupted one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[4])
from transformers import TrainerCallback
from testing_utils import task_datasets
from rlora_trl import RLoraSFTConfig, RLoraSFTTrainer

model, folder, resume = sys.argv[1], sys.argv[2], sys.argv[3] == "resume"
log = open(folder + "/losses.jsonl", "a")

class Log(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            print(json.dumps([state.global_step, logs["loss"]]), file=log, flush=True)

trainer = RLoraSFTTrainer(
    model, RLoraSFTConfig(folder, max_steps=24, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_strategy="steps", save_steps=6, report_to="none", bf16=False, gradient_checkpointing=False,
        disable_tqdm=True, dataloader_pin_memory=False, gradient_accumulation_steps=2),
    train_dataset=task_datasets(), callbacks=[Log()])
trainer.train(resume_from_checkpoint=resume)
"""


def start(model, folder, mode):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, model, str(folder), mode, str(Path(__file__).parent.parent)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )


def read_losses(folder):
    path = folder / "losses.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [tuple(json.loads(line)) for line in lines]


def wait(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]


@pytest.mark.slow
def test_kill_and_resume(model_folders, tmp_path):
    model = model_folders["llama"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    wait(start(model, whole, "new"))

    process = start(model, killed, "new")
    deadline = time.monotonic() + 240
    # Past the checkpoint of step 6, so that steps after it are lost.
    while len(read_losses(killed)) < 8 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = read_losses(killed)
    assert 8 <= len(before) < 24, "the run was to be killed in the middle"
    assert (killed / "checkpoint-6" / "adapter_model.safetensors").is_file()

    wait(start(model, killed, "resume"))
    after = read_losses(killed)[len(before) :]
    assert after[0][0] in (7, 13, 19)
    expected = dict(read_losses(whole))
    assert len(expected) == 24
    for step, loss in before + after:
        assert loss == pytest.approx(expected[step], rel=1e-6), step
