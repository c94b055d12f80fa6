"""
Locks on an output folder, so that two processes don't write into it at the same time.

They are POSIX record locks: the system releases them when the process ends, however it ends; processes that it has
forked don't hold them; and NFS has them. Where a file system has none, nothing is locked.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..reading import AdapterCheckError, read_bytes


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


SAVING_LOCK = ".rlora-saving.lock"
_TRAINING_LOCK = ".rlora-training.lock"
_MAX_NOTE = 1000


class HeldElsewhere(Exception):
    """Another process holds the lock. The message says which, if it is known."""


@contextmanager
def sole_run(folder: Path) -> Generator[None, None, None]:
    """
    Let no other process train into a folder.

    Raises:
        ValueError: If another process does.
    """
    path = folder / _TRAINING_LOCK
    with ExitStack() as stack:
        try:
            stack.enter_context(hold(path, wait=False))
        except HeldElsewhere as holder:
            raise ValueError(
                f"`output_dir={str(folder)!r}` is in use: {holder} trains into it, and the two runs would overwrite "
                "each other's checkpoints. Pass another `output_dir`, or stop the other run. (If its machine is gone, "
                f"and the file system still has its lock, delete {path}.)"
            ) from holder
        yield


@contextmanager
def hold(path: Path, *, wait: bool) -> Generator[None, None, None]:
    """
    Hold the lock on a file, which is created, and removed at the end.

    Args:
        path (`Path`): The file. Its text names the process that holds the lock.
        wait (`bool`): Whether to wait for another process.

    Raises:
        HeldElsewhere: With `wait=False`, if another process holds the lock.
    """
    file = _acquire(path, wait)
    try:
        yield
    finally:
        if file is not None:
            # Before the lock is released: who waits for it sees that the file is no longer the one of that name.
            path.unlink(missing_ok=True)
            os.close(file)


def _acquire(path: Path, wait: bool) -> int | None:
    """The open and locked file; `None` where files can't be locked or written."""
    while fcntl is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Its text is replaced: a link in the folder of somebody else would lead to another file.
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError:  # saving will say what is wrong with the folder, if anything is saved
            return None
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            os.close(file)
            raise OSError(f"{path} is not a file of its own, but a link or a pipe. Remove it, and train again.")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except (BlockingIOError, PermissionError) as error:  # systems differ
            os.close(file)
            raise HeldElsewhere(_read_note(path)) from error
        except OSError:  # the file system has no locks
            os.close(file)
            return None
        if _is_still(file, path):
            with contextlib.suppress(OSError):  # a full disk; the text is only for messages
                os.truncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file
        os.close(file)
    return None


def _is_still(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _read_note(path: Path) -> str:
    try:
        text = read_bytes(path, _MAX_NOTE).decode(errors="replace")
    except AdapterCheckError:  # it has just ended
        text = ""
    return text if text.isprintable() and text else "another process"
