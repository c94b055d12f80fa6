"""A rank that dies or hangs ends the others, and the run goes on from its checkpoint, also on fewer."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from losses import losses_in
from runs import SETTINGS, free_port


pytestmark = pytest.mark.slow

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")
# Two of them go on under DeepSpeed: one is for dropout, the other for another number of ranks.
WITH_DROPOUT = "zero3"
STEPS = 4
ARGUMENTS = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2}
# With an adapter of other values, so that nothing is as it was only because it was drawn alike once more.
GO_ON = {"resume": True, "save": True, "spoil": True}
# Seconds in which the ranks that are left end, when one has died; with a launcher, all of it.
DEADLINE = 20
LAUNCHER_DEADLINE = 60
# Seconds that collectives wait, where one rank hangs.
GROUP_TIMEOUT = 4
# Relative, of losses that were summed in another order.
TOLERANCE = 1e-5


def given_for(model, output, strategy, **rest):
    arguments = {**ARGUMENTS, **rest.pop("arguments", {})}
    return {"model": model, "output": str(output), "strategy": strategy, "arguments": arguments, **rest}


def losses_by_step(told):
    return {entry["step"]: entry["loss"] for entry in told["logs"] if "loss" in entry}


def lose_a_rank(server, folder, given):
    """Run until the second rank dies in the third step, and see what becomes of the first."""
    run = server.start("train_ranks", folder / "first", {**given, "die": {"rank": 1, "step": 3}}, processes=2)
    deadline = time.monotonic() + 60
    while not (folder / "first" / "died").exists():
        assert time.monotonic() < deadline and not run.ended(0.02), run.output()
    assert run.ended(DEADLINE), f"a rank still runs {DEADLINE} s after the other died: {run.output()}"
    assert run.wait()[1] == -signal.SIGKILL
    # The first tells of an error, or had one even in telling.
    told = folder / "first" / "result-0.json"
    assert not told.exists() or json.loads(told.read_text())["error"], run.output()
    output = Path(given["output"])
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-2"}


@pytest.fixture(scope="module", params=STRATEGIES)
def lost(request, server, model_folders, tmp_path_factory):
    """A strategy, the settings and the folder of a run that lost a rank, and what a whole one told."""
    folder = tmp_path_factory.mktemp(request.param)
    # Masks follow from the generator of each rank: on another number of them they would be others.
    dropout = 0.3 if request.param == WITH_DROPOUT else 0.0
    given = given_for(model_folders["llama"], folder / "out", request.param, config={"head_dropout": dropout})
    whole = {**given, "output": str(folder / "whole" / "out"), "save": True}
    told, _ = server.run("train_ranks", folder / "whole", whole, processes=2)
    assert told["error"] is None and told["save_error"] is None
    assert len(set(losses_by_step(told).values())) == STEPS
    lose_a_rank(server, folder, given)
    return request.param, given, folder, told


def test_goes_on_with_as_many(server, lost, tmp_path):
    _, given, folder, whole = lost
    output = shutil.copytree(folder / "out", tmp_path / "out")
    given = {**given, "output": str(output), **GO_ON}
    ranks = server.run("train_ranks", tmp_path, given, processes=2)
    for told in ranks:
        assert told["error"] is None and told["save_error"] is None
        assert losses_by_step(told) == pytest.approx(losses_by_step(whole), rel=1e-6)
        assert told["weights"] == {step: whole["weights"][step] for step in ("2", "3", "4")}
    assert [step for step, _ in losses_in(tmp_path)] == [3, 4]


@pytest.mark.parametrize("lost", ["ddp", "zero2", "fsdp2"], indirect=True)
def test_goes_on_with_another_number(server, lost, tmp_path):
    """On one process, which accumulates: the batch of a step is the same."""
    strategy, given, folder, whole = lost
    output = shutil.copytree(folder / "out", tmp_path / "out")
    given = {**given, "output": str(output), **GO_ON}
    if strategy == "ddp":
        given["strategy"] = "single"
    elif strategy.startswith("zero"):
        stage = int(strategy[4:])
        given["deepspeed"] = {"checkpoint": {"load_universal": True}}
        server.run(
            "make_universal", tmp_path / "universal", {"checkpoint": str(output / "checkpoint-2"), "stage": stage}
        )
    given["arguments"] = {**given["arguments"], "gradient_accumulation_steps": 2}
    told = server.run("train_ranks", tmp_path, given)
    assert told["error"] is None and told["save_error"] is None
    assert losses_by_step(told) == pytest.approx(losses_by_step(whole), rel=TOLERANCE)
    assert list(told["weights"]) == ["2", "3", "4"] and told["weights"]["2"] == whole["weights"]["2"]
    assert [step for step, _ in losses_in(tmp_path)] == [3, 4]


@pytest.mark.parametrize("lost", ["zero2"], indirect=True)
def test_deepspeed_tells_of_the_number(server, lost, tmp_path):
    _, given, folder, _ = lost
    output = shutil.copytree(folder / "out", tmp_path / "out")
    told = server.run("train_ranks", tmp_path, {**given, "output": str(output), "resume": True}, processes=1)
    kind, _, text = told["error"]
    assert kind == "ValueError" and "ds_to_universal" in text and "load_universal" in text, text


def test_a_rank_that_hangs(server, model_folders, tmp_path):
    """The others wait as long as their process group does (`ddp_timeout`), and no longer."""
    given = given_for(model_folders["llama"], tmp_path / "out", "ddp", group_timeout=GROUP_TIMEOUT)
    hang = {"rank": 1, "step": 3, "by": "SIGSTOP"}
    run = server.start("train_ranks", tmp_path / "run", {**given, "die": hang}, processes=2)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "died").exists():
        assert time.monotonic() < deadline, run.output()
        time.sleep(0.02)
    told = tmp_path / "run" / "result-0.json"
    while not told.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    waited = time.time() - (tmp_path / "run" / "died").stat().st_mtime
    run.kill()
    run.wait()
    assert told.exists() and waited < GROUP_TIMEOUT + DEADLINE, f"{waited} s: {run.output()}"
    assert json.loads(told.read_text())["error"]
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-2"}


def test_launcher_ends(model_folders, tmp_path):
    """Started as users do, by `torchrun`, all end with an error when one has died."""
    given = given_for(model_folders["llama"], tmp_path / "out", "ddp", die={"rank": 1, "step": 3})
    (tmp_path / "given.json").write_text(json.dumps(given))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(free_port()), str(Path(__file__).parent / "programs.py"), "train_ranks"]
    with open(tmp_path / "output.txt", "w") as output:
        process = subprocess.Popen(
            [*command, str(tmp_path)], stdout=output, stderr=output, env={**os.environ, **SETTINGS}
        )
        try:
            code = process.wait(LAUNCHER_DEADLINE)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    told = (tmp_path / "output.txt").read_text()
    assert code != 0 and "SIGKILL" in told, told[-3000:]
    assert (tmp_path / "died").exists() and not (tmp_path / "out" / "checkpoint-4").exists()
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
