"""A signal stops `rlora train` and all that it started, with a checkpoint and an exit code that says so."""

import json
import os
import signal
import time
from contextlib import suppress

import psutil
import pytest
from processes import CPU, RLORA, Program
from testing_utils import task_rows


pytestmark = pytest.mark.slow

# Seconds in which a program loads its libraries and trains some steps, and in which it ends after a signal.
START, END = 150, 60
ENDLESS = 1_000_000
ARGUMENTS = {
    "use_cpu": "true",
    "bf16": "false",
    "report_to": "none",
    "disable_tqdm": "true",
    "dataloader_pin_memory": "false",
    "gradient_checkpointing": "false",
    "learning_rate": "1e-2",
    "lr_scheduler_type": "constant",
    "logging_steps": "1",
    "per_device_train_batch_size": "4",
    "save_steps": "2",
    "save_total_limit": "2",
    "score_rows": "0",
    "mixture_rows": "0",
}
TWO_RANKS = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
# Variable by which all processes of a program are found: PyTorch's launcher gives ranks sessions of their own.
MARK = "RLORA_TEST_PROGRAM"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    rows = [{**row, "task": task} for task in ("same", "colour") for row in task_rows(task, 9)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def start(model_folders, data, tmp_path):
    """Start `rlora train`; it ends with the test, whatever happens."""
    programs = []

    def start(*words, **arguments):
        arguments = {**ARGUMENTS, "output_dir": tmp_path / "out", "max_steps": ENDLESS, **arguments}
        arguments |= {"model_name_or_path": model_folders["llama"], "dataset_name": data}
        options = [str(word) for name, value in arguments.items() for word in (f"--{name}", value)]
        log = tmp_path / f"output{len(programs)}.txt"
        programs.append(Program([*RLORA, "train", *words, *options], log, env={**CPU, MARK: str(log)}))
        return programs[-1]

    yield start
    for program in programs:
        for process in members(program):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        program.process.wait()


def members(program):
    """The processes of a program that have not ended."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get(MARK) == str(program.output):
                found.append(process)
    return found


def training_processes(program):
    return [process for process in members(program) if "rlora_cli.train_process" in process.cmdline()]


def steps_in(folder):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))


def wait_until(condition, program, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, program.tail()
        time.sleep(0.02)


def wait_for_steps(program, folder, step=2):
    wait_until(lambda: program.process.poll() is not None or max(steps_in(folder), default=0) >= step, program, START)
    assert program.process.poll() is None, program.tail()


def assert_all_end(program, seconds=END):
    wait_until(lambda: not members(program), program, seconds)


def losses_in(folder):
    state = json.loads((folder / f"checkpoint-{max(steps_in(folder))}" / "trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


def assert_same_losses(start, tmp_path, *words):
    """A run that resumes after the signal has the losses of a run that nothing happened to."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    step = max(steps_in(out))
    resumed = start(*words, max_steps=step + 3, resume_from_checkpoint="true")
    assert resumed.wait(START) == 0, resumed.tail()
    undisturbed = start(*words, max_steps=step + 3, output_dir=whole)
    assert undisturbed.wait(START) == 0, undisturbed.tail()
    losses = losses_in(out)
    assert list(losses) == list(range(1, step + 4)) and len(set(losses.values())) > step // 2
    assert losses == pytest.approx(losses_in(whole), rel=1e-6)


def assert_stopped(program, folder, name):
    """It left a checkpoint of its last step, said which it is in one line, and left nothing else."""
    text = program.tail()
    newest = folder / f"checkpoint-{max(steps_in(folder))}"
    lines = [line for line in text.splitlines() if line.startswith("Stopped by")]
    assert lines == [
        f"Stopped by {name}. The newest checkpoint is {newest}. To resume, run the same command with "
        "`--resume_from_checkpoint true`."
    ], text
    assert "Traceback" not in text and "Error" not in text and "exitcode" not in text, text
    assert (newest / "rlora_state.json").is_file() and not (folder / "adapter_config.json").exists()
    assert not list(folder.glob(".rlora*"))


def to_launcher(program, number):
    os.kill(program.process.pid, number)


def to_all(program, number):
    """As a terminal does, or `timeout`, or a cluster."""
    os.killpg(program.process.pid, number)


@pytest.mark.parametrize(
    "send, name",
    [(to_launcher, "SIGTERM"), (to_all, "SIGINT"), (to_all, "SIGTERM"), (to_launcher, "SIGHUP")],
    ids=["launcher-TERM", "all-INT", "all-TERM", "launcher-HUP"],
)
def test_stops_with_a_checkpoint(start, tmp_path, send, name):
    program = start(dataloader_num_workers=1)
    wait_for_steps(program, tmp_path / "out")
    send(program, signal.Signals[name])
    assert program.process.wait(END) == 128 + signal.Signals[name], program.tail()
    assert_all_end(program, 1)
    assert_stopped(program, tmp_path / "out", name)
    if send is to_all and name == "SIGTERM":
        assert_same_losses(start, tmp_path)


@pytest.mark.parametrize("words", [[], TWO_RANKS], ids=["one", "ranks"])
def test_second_signal_stops_at_once(start, tmp_path, words):
    """Also a process that can't finish its step: the launcher ends it."""
    program = start(*words)
    wait_for_steps(program, tmp_path / "out")
    training_processes(program)[-1].suspend()
    to_launcher(program, signal.SIGINT)
    time.sleep(1.2)
    began = time.monotonic()
    to_launcher(program, signal.SIGINT)
    assert program.process.wait(END) == 130, program.tail()
    assert_all_end(program, 10)
    assert time.monotonic() - began < 25, "PyTorch's launcher waits for 30 seconds"
    assert "Traceback" not in program.tail()


def test_ends_with_its_launcher(start, tmp_path):
    program = start(dataloader_num_workers=1)
    wait_for_steps(program, tmp_path / "out")
    to_launcher(program, signal.SIGKILL)
    assert_all_end(program)
    assert_stopped(program, tmp_path / "out", "SIGTERM")


@pytest.mark.parametrize("send", [to_launcher, to_all])
def test_signal_before_training(start, send):
    program = start()
    # Before Python itself has started, which is when that process has a second thread, it answers SIGINT by itself.
    wait_until(lambda: any(process.num_threads() > 1 for process in training_processes(program)), program, START)
    send(program, signal.SIGINT)
    assert program.process.wait(END) == 130, program.tail()
    assert_all_end(program, 10)
    assert "Traceback" not in program.tail()


@pytest.mark.parametrize(
    "send, name", [(to_launcher, "SIGTERM"), (to_all, "SIGINT")], ids=["launcher-TERM", "all-INT"]
)
def test_ranks_stop_after_the_same_step(start, tmp_path, send, name):
    program = start(*TWO_RANKS)
    wait_for_steps(program, tmp_path / "out")
    send(program, signal.Signals[name])
    assert program.process.wait(END) == 128 + signal.Signals[name], program.tail()
    assert_all_end(program, 10)
    assert_stopped(program, tmp_path / "out", name)
    newest = tmp_path / "out" / f"checkpoint-{max(steps_in(tmp_path / 'out'))}"
    assert {path.name for path in newest.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    if name == "SIGTERM":
        assert_same_losses(start, tmp_path, *TWO_RANKS)


def test_one_rank_receives_the_signal(start, tmp_path):
    program = start(*TWO_RANKS)
    wait_for_steps(program, tmp_path / "out")
    ranks = [process for process in members(program) if process.environ().get("LOCAL_RANK") == "1"]
    assert len(ranks) == 1
    ranks[0].terminate()
    assert program.process.wait(END) == 143, program.tail()
    assert_all_end(program, 10)
    assert_stopped(program, tmp_path / "out", "SIGTERM")
