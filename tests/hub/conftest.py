"""Fixtures of the tests that need a Hub: `hub`, a real server on 127.0.0.1, and `worker`, a process for the client."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server import HubServer
from worker import Worker


CALL = """
from importlib import import_module

module, _, name = function.partition(":")
result = getattr(import_module(module), name)(*arguments, **keywords)
"""
DROPPED = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


class Hub(HubServer):
    """The server together with the processes that use it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.home = folder / "home"  # HF_HOME of the worker: cache and saved tokens
        self.worker = Worker(self.env(), folder)

    def env(self, home: Path | str | None = None, **changes: str) -> dict[str, str]:
        """A whole environment for a process that uses this Hub as "user", and `home` (the worker's) as HF_HOME."""
        kept = {key: value for key, value in os.environ.items() if not key.upper().startswith(DROPPED)}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home or self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            **changes,
        }

    def run(self, source: str, *, timeout: float = 180, **changes: str) -> str:
        """Run source text in a fresh process and return what it printed; `changes` go into its environment."""
        done = self.run_command([sys.executable, "-c", source], timeout=timeout, **changes)
        if done.returncode != 0:
            raise RuntimeError(f"Exit code {done.returncode}\n{done.stderr}")
        return done.stdout

    def run_command(self, command: list[str], *, timeout: float = 180, **changes: str) -> subprocess.CompletedProcess:
        """Run a program, such as the CLI, in a fresh process; exit code and output are in what is returned."""
        pipes = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        return subprocess.run(command, env=self.env(**changes), timeout=timeout, **pipes)

    def call(self, function: str, *arguments: Any, **keywords: Any) -> Any:
        """Call "package.module:function" in the worker; arguments and result go through JSON."""
        return self.worker.run(CALL, function=function, arguments=arguments, keywords=keywords)

    def wipe(self) -> None:
        """Empty HF_HOME, so that nothing is in the client's cache."""
        shutil.rmtree(self.home, ignore_errors=True)


@pytest.fixture(scope="session")
def _hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub
        hub.worker.stop()


@pytest.fixture
def hub(_hub: Hub) -> Iterator[Hub]:
    """The Hub without any repository, and the client with an empty cache."""
    _hub.reset()
    _hub.wipe()
    yield _hub
    assert not _hub.errors, "\n".join(_hub.errors)


@pytest.fixture
def worker(hub: Hub) -> Worker:
    """The process for client code: `worker.run(source, **variables)` returns the variable `result`."""
    return hub.worker
