"""
A bounded folder of things that several processes make and use, each made once.

Locks are those of `flock`: the system releases them when a process ends, however it ends, and they also hold between
threads, as each has opened the file itself. A folder on NFS needs a server with locks.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path


# Locks are files, and their number must not grow with the names that strangers ask for.
_STRIPES = 64


class CacheFullError(OSError):
    """There is no room: processes use everything that is in the cache."""


class FolderCache:
    """
    Folders by key, of at most a total size. The least recently used ones are removed first, but none that was given to
    a process that is still running: it may read it at any time.

    Args:
        root (`Path`): The folder that holds them, which is created.
        max_bytes (`int`): The most bytes that they may have together.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self.root, self.max_bytes = root, max_bytes
        for part in ("entries", "making", "locks", "users"):
            (root / part).mkdir(parents=True, exist_ok=True, mode=0o700)
        self._held: dict[str, int] = {}  # open locks of the entries that this process uses

    @contextmanager
    def lock(self, name: str) -> Generator[None, None, None]:
        """Hold a lock of this name, between all threads and processes; different names may share one."""
        file = os.open(self._stripe(name), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    def get(self, key: str, make: Callable[[Path], None]) -> Path:
        """
        A folder, which is made where it is missing, and remains until this process ends.

        Args:
            key (`str`): Its name, which stands for its contents: letters, digits, "-" and "_".
            make (`Callable`): Writes the contents into a folder that it creates. What it raises is passed on, and
                nothing is kept.

        Returns:
            `Path`: The folder. It must not be changed.

        Raises:
            CacheFullError: If the new folder has no room.
        """
        entry, staged = self.root / "entries" / key, self.root / "making" / key
        with self.lock(f"make {key}"):
            if self._use(key):
                return entry
            shutil.rmtree(staged, ignore_errors=True)  # of a process that was killed
            try:
                make(staged)
                self._add(key, staged)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
        return entry

    def _stripe(self, name: str) -> Path:
        number = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:4], "big") % _STRIPES
        # Who makes an entry holds a lock of the first kind already, if any.
        return self.root / "locks" / f"{'make' if name.startswith('make ') else 'other'}-{number:02}"

    @contextmanager
    def _whole(self) -> Generator[None, None, None]:
        """Hold the lock on the list of entries and on their users."""
        file = os.open(self.root / "locks" / "all", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    def _use(self, key: str) -> bool:
        """Note the use of an entry by this process; whether there is one."""
        entry = self.root / "entries" / key
        with self._whole():
            if not entry.is_dir():
                return False
            self._note(key)
            return True

    def _note(self, key: str) -> None:
        os.utime(self.root / "entries" / key)
        if key not in self._held:
            file = os.open(self.root / "users" / key, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(file, fcntl.LOCK_SH)
            self._held[key] = file

    def _add(self, key: str, staged: Path) -> None:
        """Move a new folder to the entries, after removing as many as it needs room for."""
        _flush(staged)
        size = _size(staged)
        with self._whole():
            self._remove_leftovers()
            entries = {path: _size(path) for path in (self.root / "entries").iterdir()}
            total = sum(entries.values())
            for path in sorted(entries, key=lambda path: path.stat().st_mtime_ns):
                if total + size > self.max_bytes and self._remove(path):
                    total -= entries[path]
            if total + size > self.max_bytes:
                raise CacheFullError(
                    f"{self.root} has no room: a new entry of {size:,} bytes and {total:,} bytes that running "
                    f"processes use are more than {self.max_bytes:,}. Allow more, or restart processes that need "
                    "fewer."
                )
            staged.rename(self.root / "entries" / key)
            self._note(key)

    def _remove(self, entry: Path) -> bool:
        """Remove an entry, unless a running process uses it."""
        users = self.root / "users" / entry.name
        file = os.open(users, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Half an entry must not be left under its name.
            removed = self.root / "making" / f"{entry.name}.removed"
            shutil.rmtree(removed, ignore_errors=True)
            entry.rename(removed)
            shutil.rmtree(removed, ignore_errors=True)
            users.unlink(missing_ok=True)
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(file)

    def _remove_leftovers(self) -> None:
        """Remove what killed processes were making."""
        for path in (self.root / "making").iterdir():
            file = os.open(self._stripe(f"make {path.name}"), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            except BlockingIOError:
                continue  # it is being made, or shares the lock of one that is
            finally:
                os.close(file)


def _size(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _flush(folder: Path) -> None:
    """Write files to the disk, so that a machine that fails leaves no entry with empty files."""
    for path in [*folder.rglob("*"), folder]:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
