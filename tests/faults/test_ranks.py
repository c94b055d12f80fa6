"""A rank that dies or hangs ends the others, and the run resumes from its checkpoint, also on fewer ranks."""

import shutil
import signal
import time
from pathlib import Path

import pytest
from processes import CPU, Program, WorkerError, read_result, script, torchrun
from runs import losses_in, run, start


pytestmark = pytest.mark.slow

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")
# Two of them resume under DeepSpeed: one is for dropout, the other for another number of ranks.
WITH_DROPOUT = "zero3"
STEPS = 4
ARGUMENTS = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2}
# With other initial values, so that no weight is equal only because it was drawn with the same seed.
RESUME = {"resume": True, "save": True, "spoil": True}
# Seconds in which the other ranks end when one has died, and in which a launcher ends.
DEADLINE = 20
LAUNCHER_DEADLINE = 60
# Seconds that collectives wait, where one rank hangs.
GROUP_TIMEOUT = 4
# Relative, of losses that were summed in another order.
TOLERANCE = 1e-5


def settings_for(model, output, strategy, **rest):
    arguments = {**ARGUMENTS, **rest.pop("arguments", {})}
    return {"model": model, "output": str(output), "strategy": strategy, "arguments": arguments, **rest}


def losses_by_step(outcome):
    return {entry["step"]: entry["loss"] for entry in outcome["logs"] if "loss" in entry}


def error_of_first_rank(folder):
    """What training raised, or what followed it; True if the rank ended before it could report one."""
    try:
        outcome = read_result(folder)
    except WorkerError as error:
        return str(error)
    return outcome is None or outcome["error"]


def wait_for(path, victim):
    """Wait until a rank has left a file."""
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline and not victim.ended(0.02), victim.output()


def lose_a_rank(server, folder, settings):
    """Run until the second rank dies in the third step; the first ends with an error."""
    victim = start(server, "train_ranks", folder / "first", {**settings, "die": {"rank": 1, "step": 3}}, ranks=2)
    wait_for(folder / "first" / "died", victim)
    assert victim.ended(DEADLINE), f"a rank still runs {DEADLINE} s after the other died: {victim.output()}"
    assert victim.wait()[1] == -signal.SIGKILL
    assert error_of_first_rank(folder / "first"), victim.output()
    output = Path(settings["output"])
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-2"}


@pytest.fixture(scope="module", params=STRATEGIES)
def lost(request, server, model_folders, tmp_path_factory):
    """A strategy, settings and folder of a run that lost a rank, and the outcome of a run that lost none."""
    folder = tmp_path_factory.mktemp(request.param)
    # Masks follow from the generator of each rank: on another number of them they would be others.
    dropout = 0.3 if request.param == WITH_DROPOUT else 0.0
    settings = settings_for(model_folders["llama"], folder / "out", request.param, config={"head_dropout": dropout})
    whole = {**settings, "output": str(folder / "whole" / "out"), "save": True}
    outcome, _ = run(server, "train_ranks", folder / "whole", whole, ranks=2)
    assert outcome["error"] is None and outcome["save_error"] is None
    assert len(set(losses_by_step(outcome).values())) == STEPS
    lose_a_rank(server, folder, settings)
    return request.param, settings, folder, outcome


def test_resumes_with_as_many(server, lost, tmp_path):
    _, settings, folder, whole = lost
    output = shutil.copytree(folder / "out", tmp_path / "out")
    settings = {**settings, "output": str(output), **RESUME}
    ranks = run(server, "train_ranks", tmp_path, settings, ranks=2)
    for outcome in ranks:
        assert outcome["error"] is None and outcome["save_error"] is None
        assert losses_by_step(outcome) == pytest.approx(losses_by_step(whole), rel=1e-6)
        assert outcome["weights"] == {step: whole["weights"][step] for step in ("2", "3", "4")}
    assert [step for step, _ in losses_in(tmp_path)] == [3, 4]


def test_all_stop_when_one_receives_a_signal(server, lost, tmp_path):
    """After the same step, with its checkpoint."""
    strategy, settings, _, whole = lost
    settings = {**settings, "output": str(tmp_path / "out")}
    first = {**settings, "stop": {"rank": 1, "step": 3}}
    stopped = run(server, "stop_ranks", tmp_path / "first", first, ranks=2)
    assert stopped == [{"code": 143, "step": 3}] * 2
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    # The state of ZeRO-3 as earlier versions wrote it.
    resume = {**RESUME, "lost_anchors": strategy == "zero3"}
    for outcome in run(server, "train_ranks", tmp_path, {**settings, **resume}, ranks=2):
        assert outcome["error"] is None
        assert losses_by_step(outcome) == pytest.approx(losses_by_step(whole), rel=1e-6)
        assert outcome["weights"] == {step: whole["weights"][step] for step in ("3", "4")}


@pytest.mark.parametrize("lost", ["ddp", "zero2", "fsdp2"], indirect=True)
def test_resumes_with_another_number(server, lost, tmp_path):
    """On one process, which accumulates: the batch of a step is the same."""
    strategy, settings, folder, whole = lost
    output = shutil.copytree(folder / "out", tmp_path / "out")
    settings = {**settings, "output": str(output), **RESUME}
    if strategy == "ddp":
        settings["strategy"] = "single"
    elif strategy.startswith("zero"):
        settings["deepspeed"] = {"checkpoint": {"load_universal": True}}
        convert = {"checkpoint": str(output / "checkpoint-2"), "stage": int(strategy[4:])}
        run(server, "make_universal", tmp_path / "universal", convert)
    settings["arguments"] = {**settings["arguments"], "gradient_accumulation_steps": 2}
    (outcome,) = run(server, "train_ranks", tmp_path, settings)
    assert outcome["error"] is None and outcome["save_error"] is None
    assert losses_by_step(outcome) == pytest.approx(losses_by_step(whole), rel=TOLERANCE)
    assert list(outcome["weights"]) == ["2", "3", "4"] and outcome["weights"]["2"] == whole["weights"]["2"]
    assert [step for step, _ in losses_in(tmp_path)] == [3, 4]


@pytest.mark.parametrize("lost", ["zero2"], indirect=True)
def test_deepspeed_refuses_another_number(server, lost, tmp_path):
    _, settings, folder, _ = lost
    output = shutil.copytree(folder / "out", tmp_path / "out")
    (outcome,) = run(server, "train_ranks", tmp_path, {**settings, "output": str(output), "resume": True})
    kind, _, text = outcome["error"]
    assert kind == "ValueError" and "ds_to_universal" in text and "load_universal" in text, text


def test_a_rank_that_hangs(server, model_folders, tmp_path):
    """The others wait as long as their process group does (`ddp_timeout`), and no longer."""
    settings = settings_for(model_folders["llama"], tmp_path / "out", "ddp", group_timeout=GROUP_TIMEOUT)
    hang = {"rank": 1, "step": 3, "by": "SIGSTOP"}
    victim = start(server, "train_ranks", tmp_path / "run", {**settings, "die": hang}, ranks=2)
    wait_for(tmp_path / "run" / "died", victim)
    began = time.monotonic()
    ended = victim.ended(GROUP_TIMEOUT + DEADLINE, ranks=[0])
    victim.kill()
    victim.wait()
    assert ended, f"{time.monotonic() - began} s: {victim.output()}"
    assert read_result(tmp_path / "run")["error"]
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-2"}


def test_launcher_ends(model_folders, tmp_path):
    """Started as users do, by `torchrun`, all ranks end with an error when one has died."""
    settings = settings_for(model_folders["llama"], tmp_path / "out", "ddp", die={"rank": 1, "step": 3})
    words = script("programs:train_ranks", settings, folder=tmp_path, timeout=2 * LAUNCHER_DEADLINE)
    launcher = Program([*torchrun(2), *words], tmp_path / "output.txt", env=CPU)
    code = launcher.wait(LAUNCHER_DEADLINE)
    assert code not in (0, None) and "SIGKILL" in launcher.tail(), launcher.tail()
    assert (tmp_path / "died").exists() and not (tmp_path / "out" / "checkpoint-4").exists()
    assert (tmp_path / "out" / "checkpoint-2").is_dir()
