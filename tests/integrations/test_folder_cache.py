"""Entries are made once, by whichever thread or process; the oldest that nobody uses make room."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlora_trl.integrations.folder_cache import CacheFullError, FolderCache


MODULE = Path(__file__).parents[2] / "rlora_trl" / "integrations" / "folder_cache.py"
# Without the package, which would be imported for seconds.
PROGRAM = f"""
import importlib.util, os, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("folder_cache", {str(MODULE)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
root, max_bytes = Path(sys.argv[1]), int(sys.argv[2])
cache = module.FolderCache(root / "cache", max_bytes)

def writes(size, seconds=0.0):
    def make(folder):
        folder.mkdir()
        with open(root / "made", "a") as log:
            log.write(folder.name + "\\n")
        (folder / "data").write_bytes(b"x" * (size // 2))
        time.sleep(seconds)
        (folder / "rest").write_bytes(b"x" * (size - size // 2))
    return make
"""


def program(root, code, max_bytes=1000):
    """A process with a cache, which runs code."""
    command = [sys.executable, "-c", PROGRAM + code, str(root), str(max_bytes)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process):
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return output.strip()


def writes(size, made=None):
    def make(folder):
        folder.mkdir()
        (folder / "data").write_bytes(b"x" * size)
        if made is not None:
            made.append(folder.name)

    return make


def entries(root):
    return sorted(path.name for path in (root / "cache" / "entries").iterdir())


def test_threads_make_an_entry_once(tmp_path):
    cache, made, paths = FolderCache(tmp_path / "cache", 1000), [], []

    def make(folder):
        writes(10, made)(folder)
        time.sleep(0.2)

    threads = [threading.Thread(target=lambda: paths.append(cache.get("key", make))) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    assert made == ["key"] and len(paths) == 4 and len(set(paths)) == 1
    assert (paths[0] / "data").read_bytes() == b"x" * 10


def test_processes_make_an_entry_once(tmp_path):
    code = "path = cache.get('key', writes(10, 0.5)); print(path, (path / 'rest').stat().st_size)"
    outputs = [finish(process) for process in [program(tmp_path, code) for _ in range(3)]]
    assert set(outputs) == {f"{tmp_path / 'cache' / 'entries' / 'key'} 5"}
    assert (tmp_path / "made").read_text() == "key\n"


def test_a_failure_leaves_nothing_and_is_passed_on(tmp_path):
    cache = FolderCache(tmp_path / "cache", 1000)

    def fails(folder):
        writes(10)(folder)
        raise ValueError("no such task")

    with pytest.raises(ValueError, match="no such task"):
        cache.get("key", fails)
    assert not entries(tmp_path) and not list((tmp_path / "cache" / "making").iterdir())
    assert cache.get("key", writes(10)).is_dir()


def test_the_least_recently_used_are_removed(tmp_path):
    for key in "abc":
        finish(program(tmp_path, f"cache.get({key!r}, writes(300))"))
        time.sleep(0.01)
    finish(program(tmp_path, "cache.get('a', writes(300))"))
    finish(program(tmp_path, "cache.get('d', writes(300))"))
    assert entries(tmp_path) == ["a", "c", "d"]
    finish(program(tmp_path, "cache.get('e', writes(900))"))
    assert entries(tmp_path) == ["e"]
    assert (tmp_path / "made").read_text().split() == ["a", "b", "c", "d", "e"]


def test_what_a_running_process_uses_stays(tmp_path):
    cache = FolderCache(tmp_path / "cache", 1000)
    used = cache.get("used", writes(400))
    finish(program(tmp_path, "cache.get('left', writes(500))"))
    finish(program(tmp_path, "cache.get('new', writes(600))"))
    assert entries(tmp_path) == ["new", "used"] and (used / "data").stat().st_size == 400

    running = program(tmp_path, "cache.get('new', writes(1)); print('has it', flush=True); sys.stdin.read()")
    assert running.stdout.readline() == "has it\n"
    with pytest.raises(CacheFullError, match=r"has no room: a new entry of 300 bytes and 1,000 bytes that running"):
        cache.get("third", writes(300))
    assert entries(tmp_path) == ["new", "used"] and not list((tmp_path / "cache" / "making").iterdir())

    finish(running)
    cache.get("third", writes(300))
    assert entries(tmp_path) == ["third", "used"]


def test_an_entry_larger_than_the_cache(tmp_path):
    with pytest.raises(CacheFullError, match="a new entry of 2,000 bytes and 0 bytes"):
        FolderCache(tmp_path / "cache", 1000).get("key", writes(2000))
    assert not entries(tmp_path)


def test_a_killed_process_leaves_its_place_to_others(tmp_path):
    code = "cache.get('key', writes(10, 60))"
    killed = program(tmp_path, code)
    while not (tmp_path / "cache" / "making" / "key" / "data").exists():
        assert killed.poll() is None
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()

    # Of another name, and of the same.
    cache = FolderCache(tmp_path / "cache", 1000)
    cache.get("other", writes(10))
    assert not (tmp_path / "cache" / "making" / "key").exists()
    assert (cache.get("key", writes(20)) / "data").stat().st_size == 20


def test_locks_are_few(tmp_path):
    cache = FolderCache(tmp_path / "cache", 1000)
    for number in range(500):
        with cache.lock(f"name-{number}"):
            pass
    with cache.lock("\ud800"):
        pass
    assert len(list((tmp_path / "cache" / "locks").iterdir())) <= 64


def test_the_folder_is_private(tmp_path):
    FolderCache(tmp_path / "cache", 1000)
    assert (tmp_path / "cache" / "entries").stat().st_mode & 0o077 == 0
