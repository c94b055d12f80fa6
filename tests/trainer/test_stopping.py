"""What training does at a signal: in this process, which sends it to itself."""

import os
import signal
import threading
import time

import pytest
from datasets import Dataset
from testing_utils import task_rows
from trainer_utils import make_trainer
from transformers import TrainerCallback

from rlora_trl.trainer import stopping
from rlora_trl.trainer.stopping import StopOnSignal, TrainingStopped


class SendsSignal(TrainerCallback):
    """Sends a signal to this process when an event of a step comes."""

    def __init__(self, event, step, number=signal.SIGTERM):
        self.step, self.number = step, number
        setattr(self, event, self._send)

    def _send(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def stop(trainer, event="on_step_begin", step=3, number=signal.SIGTERM, **options):
    """Train until a signal stops it; the error, and the steps that have checkpoints."""
    with pytest.raises(TrainingStopped) as raised, StopOnSignal(trainer.args) as stopping:
        trainer.add_callback(SendsSignal(event, step, number))
        trainer.add_callback(stopping)
        trainer.train(**options)
    return raised.value, checkpoints(trainer.args.output_dir)


def checkpoints(folder):
    return sorted(int(name.removeprefix("checkpoint-")) for name in os.listdir(folder) if name.startswith("check"))


def logged(trainer, name):
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}


SAVES = {"save_strategy": "steps", "save_steps": 100, "max_steps": 12, "mixture_rows": 0}


@pytest.mark.parametrize("number", stopping.STOP_SIGNALS)
def test_finishes_the_step(model_folders, tmp_path, number, capfd):
    before = [signal.getsignal(other) for other in stopping.STOP_SIGNALS]
    error, steps = stop(make_trainer(model_folders, tmp_path, **SAVES), number=number)
    assert (error.code, steps) == (128 + number, [4])
    assert [signal.getsignal(other) for other in stopping.STOP_SIGNALS] == before
    name = signal.Signals(number).name
    assert f"{name}: training stops after this step. A second signal" in (text := capfd.readouterr().err)
    assert f"Stopped by {name}. The newest checkpoint is {tmp_path}/checkpoint-4. To resume, run the" in text


@pytest.mark.parametrize(
    "event, step, stops_after", [("on_step_begin", 3, 4), ("on_step_begin", 5, 6), ("on_evaluate", 6, 7)]
)
def test_resumed_run_is_the_same(model_folders, tmp_path, event, step, stops_after):
    """With its evaluations at the end of an epoch of six steps, also if the signal comes in the last of them."""
    settings = {**SAVES, "eval_strategy": "epoch", "max_steps": 14}
    settings["train"] = {"same": Dataset.from_list(task_rows("same", 48))}
    settings["evaluate"] = Dataset.from_list(task_rows("same", 8, 5))

    def trainer(folder):
        return make_trainer(model_folders, folder, **settings)

    whole = trainer(tmp_path / "whole")
    whole.train()
    assert list(logged(whole, "eval_loss")) == [6, 12, 14]
    _, steps = stop(trainer(tmp_path / "run"), event, step)
    assert steps == [stops_after]
    resumed = trainer(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    for name in ("loss", "eval_loss"):
        assert logged(resumed, name) == pytest.approx(logged(whole, name), rel=1e-6)


def test_saves_nothing_where_nothing_is_to_be_saved(model_folders, tmp_path, capfd):
    error, steps = stop(make_trainer(model_folders, tmp_path, **{**SAVES, "save_strategy": "no"}))
    assert (error.code, steps) == (143, [])
    assert f"Stopped by SIGTERM. {tmp_path} has no checkpoint." in capfd.readouterr().err


def test_checkpoint_that_can_not_be_resumed_from(model_folders, tmp_path, capfd):
    stop(make_trainer(model_folders, tmp_path, **SAVES, save_only_model=True))
    assert "checkpoint-4, without the state of the optimizer (`save_only_model`)." in capfd.readouterr().err


def test_end_of_training_is_not_the_end_of_the_run(model_folders, tmp_path):
    """What follows it may take minutes, so a signal in the last step stops the run too."""
    for number, event in enumerate(("on_step_begin", "on_step_end", "on_save")):
        step = 11 if event == "on_step_begin" else 12
        error, steps = stop(make_trainer(model_folders, tmp_path / str(number), **SAVES), event, step)
        assert (error.code, steps) == (143, [12])


def test_takes_precedence_over_the_handler_of_transformers(model_folders, tmp_path):
    """Which ends training, three seconds later, as if it were complete."""
    former = signal.getsignal(signal.SIGTERM)
    try:
        error, steps = stop(make_trainer(model_folders, tmp_path, **SAVES, enable_jit_checkpoint=True))
    finally:
        signal.signal(signal.SIGTERM, former)
    assert (error.code, steps) == (143, [4])


class Arguments:
    save_only_model = False

    def __init__(self, folder):
        self.output_dir = str(folder)


def test_ends_at_once_before_training(tmp_path):
    with pytest.raises(TrainingStopped) as raised, StopOnSignal(Arguments(tmp_path)):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert raised.value.code == 130


def test_signals_of_one_moment_are_one(tmp_path, monkeypatch):
    """A terminal and the launcher send what a user sent once."""
    monkeypatch.setattr(stopping, "SAME_SIGNAL", 0.2)
    with pytest.raises(TrainingStopped) as raised, StopOnSignal(Arguments(tmp_path)) as stop:
        stop.on_train_begin(None, None, None)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        survived = True
        time.sleep(0.25)
        os.kill(os.getpid(), signal.SIGINT)
    assert survived and raised.value.code == 130


def test_errors_that_a_signal_causes(tmp_path):
    with pytest.raises(TrainingStopped) as raised, StopOnSignal(Arguments(tmp_path)) as stop:
        stop.on_train_begin(None, None, None)
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("DataLoader worker is killed by signal: Terminated.")
    assert raised.value.code == 143
    with pytest.raises(RuntimeError, match="other"), StopOnSignal(Arguments(tmp_path)):
        raise RuntimeError("other")


def test_signals_that_are_ignored_stay_ignored(tmp_path):
    """As `nohup` has it."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopOnSignal(Arguments(tmp_path)):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_thread_can_have_no_handler(tmp_path):
    before, found = signal.getsignal(signal.SIGTERM), []

    def run():
        with StopOnSignal(Arguments(tmp_path)):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]


def test_forks_end_by_sigterm(tmp_path):
    """Such as those that tokenize: their pool ends them so."""
    with StopOnSignal(Arguments(tmp_path)):
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGINT)  # of the terminal: the main process decides
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
