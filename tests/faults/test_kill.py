"""A run killed by SIGKILL at any moment resumes from the newest complete checkpoint with the same losses."""

import json
import os
import random
import re
import time

import pytest
import torch
from runs import losses_in, run, start
from safetensors.torch import load_file

from rlora_trl.hub import check_adapter


pytestmark = pytest.mark.slow

SEED = 20
STEPS = 16
KILLS = 30
KILLS_IN_WRITES = 10
# Seconds for all kills together.
TIMEOUT = 240
# As `RLoraSFTTrainer` has it: where a checkpoint is until it is complete.
STAGING = ".rlora-saving"


def settings_for(model, output, **rest):
    arguments = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    return {"model": model, "output": str(output), "arguments": {**arguments, "save_total_limit": 3}, **rest}


def steps_of_checkpoints(output):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in output.glob("checkpoint-*"))


def assert_complete(checkpoint):
    """Everything that a resumed run needs is there and loads."""
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    check_adapter(checkpoint)
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == step
    for name in ("optimizer.pt", "scheduler.pt"):
        assert torch.load(checkpoint / name, weights_only=True), name
    # Generators are kept as arrays of NumPy.
    assert torch.load(checkpoint / "rng_state.pth", weights_only=False)
    json.loads((checkpoint / "rlora_state.json").read_text())


def checkpoints_in(staging):
    """Names of the checkpoints that are being written; the folder comes and goes meanwhile."""
    try:
        return {name for name in os.listdir(staging) if name.startswith("checkpoint-")}
    except FileNotFoundError:
        return set()


def wait_for_write(victim, staging, skipped):
    """Wait until a checkpoint is being written, after `skipped` others; or until the run ends."""
    seen = set()
    while not victim.ended():
        seen |= checkpoints_in(staging)
        if len(seen) > skipped:
            return
        time.sleep(0.0005)


def kill_somewhere(server, folder, settings, kind, draw):
    """Start a run and kill it at a moment of a kind; returns the run, ended."""
    if kind == "operation":
        settings = {**settings, "kill_at": draw.randint(1, 120)}
    victim = start(server, "train", folder, settings)
    if kind == "moment":
        victim.ended(draw.uniform(0.0, 1.5))
    elif kind == "write":
        wait_for_write(victim, folder.parent / "out" / STAGING, draw.randint(0, 2))
        time.sleep(draw.uniform(0.0, 0.03))
    else:
        victim.ended(60)
    victim.kill()
    victim.wait()
    return victim


@pytest.fixture(scope="module")
def uninterrupted(server, model_folders, tmp_path_factory):
    """Losses by step, and the adapter, of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    run(server, "train", folder, settings_for(model_folders["llama"], folder / "out"))
    losses = dict(losses_in(folder))
    assert sorted(losses) == list(range(1, STEPS + 1)) and len(set(losses.values())) > STEPS // 2
    return losses, load_file(folder / "out" / "adapter_model.safetensors")


def assert_same_run(losses, folders):
    for folder in folders:
        for step, loss in losses_in(folder):
            assert loss == pytest.approx(losses[step], rel=1e-6), f"{folder.name}, step {step}"


def kill_until_it_ends(server, settings, output, draw, kills, began):
    """
    Start a run again and again, each time killed at some moment, until one ends; counts the kills by kind in `kills`.

    Returns the folders of all runs, how many of them resumed, and how many were killed during a write.
    """
    folders, status, resumed, in_writes = [], -9, 0, 0
    while status == -9:
        assert time.monotonic() - began < TIMEOUT, kills
        before = steps_of_checkpoints(output)
        kind = min(kills, key=kills.get)
        folders.append(output.parent / f"run{len(folders)}")
        victim = kill_somewhere(server, folders[-1], settings, kind, draw)
        status = victim.statuses[0]
        assert status in (0, -9), victim.output()

        # It resumed from the newest checkpoint.
        steps = losses_in(folders[-1])
        if steps:
            assert steps[0][0] == max(before, default=0) + 1
            resumed += bool(before)

        # All checkpoints are complete, and none was lost.
        if status == -9:
            kills[kind] += 1
            in_writes += any((output / STAGING).glob("*"))
            for step in steps_of_checkpoints(output):
                assert_complete(output / f"checkpoint-{step}")
            assert max(steps_of_checkpoints(output), default=0) >= max(before, default=0)
    return folders, resumed, in_writes


def test_runs_killed_at_random_moments(server, model_folders, uninterrupted, tmp_path):
    losses, adapter = uninterrupted
    draw = random.Random(SEED)
    began = time.monotonic()
    kills = {"moment": 0, "write": 0, "operation": 0}
    in_writes = resumed = chains = 0
    while sum(kills.values()) < KILLS or in_writes < KILLS_IN_WRITES:
        chains += 1
        output = tmp_path / f"chain{chains}" / "out"
        settings = settings_for(model_folders["llama"], output)
        folders, *counts = kill_until_it_ends(server, settings, output, draw, kills, began)
        resumed, in_writes = resumed + counts[0], in_writes + counts[1]

        # The losses and the adapter are those of the run that nothing happened to; nothing else is left.
        assert_same_run(losses, folders)
        trained = load_file(output / "adapter_model.safetensors")
        assert trained.keys() == adapter.keys()
        for name, tensor in adapter.items():
            torch.testing.assert_close(trained[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
        assert not list((output / STAGING).glob("*"))
        assert all(re.fullmatch(r"checkpoint-\d+", path.name) for path in output.glob("checkpoint*"))

    print(f"seed {SEED}: {kills}, {in_writes} of them in writes; {resumed} resumed runs in {chains} chains")
    assert resumed > KILLS // 2 and min(kills.values()) >= KILLS // 3
