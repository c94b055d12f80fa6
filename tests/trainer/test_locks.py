"""Two processes and one output folder: one trains, and their saves follow each other."""

import contextlib
import os
import re
import signal
import socket
import time

import pytest
from processes import WorkerError
from trainer_utils import make_trainer

from rlora_trl.trainer.locks import HeldElsewhere, hold, sole_run


@pytest.fixture
def holder(tmp_path):
    """Start processes that hold the lock on a file until they are ended; they end with the test."""
    processes = []

    def start(path):
        ready, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                with hold(path, wait=False):
                    # As a data loader has them; it outlives its parent for a moment.
                    worker = os.fork()
                    if worker:
                        os.write(write, str(worker).encode())
                    time.sleep(120)
            finally:
                os._exit(1)
        processes.append((child, int(os.read(ready, 20))))
        return child

    yield start
    for child, worker in processes:
        end(child)
        os.kill(worker, signal.SIGKILL)


def end(child):
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        return


def test_lock_ends_with_its_process(holder, tmp_path):
    path = tmp_path / "lock"
    other = holder(path)
    with pytest.raises(HeldElsewhere, match=f"^process {other} on {socket.gethostname()}$"), hold(path, wait=False):
        raise AssertionError("two processes hold it")
    end(other)
    with hold(path, wait=False):
        assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert not path.exists()


def test_waits_for_the_other_process(tmp_path):
    path, log = tmp_path / "lock", tmp_path / "log"
    children = []
    for _ in range(4):
        children.append(os.fork())
        if not children[-1]:
            for _ in range(25):
                with hold(path, wait=True):
                    assert not log.exists()
                    log.write_text("held")
                    time.sleep(0.001)
                    log.unlink()
            os._exit(0)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert not path.exists()


def test_second_run_is_refused(model_folders, holder, tmp_path):
    other = holder(tmp_path / ".rlora-training.lock")
    trainer = make_trainer(model_folders, tmp_path, max_steps=1)
    text = re.escape(f"`output_dir={str(tmp_path)!r}` is in use: process {other} on ")
    with pytest.raises(ValueError, match=f"^{text}.* Pass another `output_dir`, or stop the other run."):
        trainer.train()
    # What is trained already is still saved.
    trainer.save_model()
    assert (tmp_path / "adapter_config.json").exists()
    end(other)
    trainer.train()
    assert not list(tmp_path.glob(".rlora*"))


def test_hidden_text_of_a_lock_is_not_shown(holder, tmp_path):
    other = holder(tmp_path / ".rlora-training.lock")
    (tmp_path / ".rlora-training.lock").write_text("\x1b[2J")
    with pytest.raises(ValueError, match="is in use: another process trains into it"), sole_run(tmp_path):
        raise AssertionError("two processes hold it")
    end(other)


def test_folder_that_can_not_be_locked(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with sole_run(tmp_path / "file"), hold(tmp_path / "file" / "lock", wait=True):
        assert (tmp_path / "file").read_text() == ""


def test_scratch_of_a_process_that_saves_stays(model_folders, holder, tmp_path, monkeypatch):
    """Only what dead processes have left is removed when training starts."""
    stage = tmp_path / ".rlora-saving" / "model"
    stage.mkdir(parents=True)
    other = holder(tmp_path / ".rlora-saving.lock")
    trainer = make_trainer(model_folders, tmp_path, max_steps=1)
    seen = []
    monkeypatch.setattr(
        "rlora_trl.trainer.checkpoints.restore_set_aside", lambda root: seen.append(stage.exists()) or restore(root)
    )
    from rlora_trl.trainer.saving import restore_set_aside as restore

    signal.signal(signal.SIGALRM, lambda number, frame: end(other))
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    began = time.monotonic()
    trainer.train()
    assert time.monotonic() - began > 0.4 and seen == [True] and not stage.exists()


def test_ranks_of_a_second_run_all_end(server, model_folders, holder, tmp_path):
    (tmp_path / "out").mkdir()
    other = holder(tmp_path / "out" / ".rlora-training.lock")
    settings = {"model": model_folders["llama"], "output": str(tmp_path / "out"), "strategy": "ddp"}
    settings["arguments"] = {"max_steps": 2}
    errors = [run["error"] for run in server.run("programs:train_ranks", settings, folder=tmp_path / "run", ranks=2)]
    assert all(f"process {other} on" in error[2] for error in errors), errors
    with pytest.raises(WorkerError):
        server.run("programs:train", {**settings, "strategy": "single"}, folder=tmp_path / "single")


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_a_link_in_place_of_a_lock_leads_nowhere(tmp_path, link):
    """In the folder of somebody else it could lead to any file of the user, whose text the lock would replace."""
    victim = tmp_path / "victim"
    victim.write_text("kept")
    link(victim, tmp_path / "lock")
    with contextlib.suppress(OSError), hold(tmp_path / "lock", wait=False):
        pass
    assert victim.read_text() == "kept"
