"""Fixtures of the tests that need a Hub: `hub`, a real server on 127.0.0.1, and `worker`, which runs client code."""

import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
from server import HubServer


DROPPED = ("HF_", "HUGGING", "TRANSFORMERS_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


class Worker:
    """Runs source text as client of the Hub, each in its own process, which has everything imported."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.server = processes.Server(folder, env)

    def run(self, source: str, /, **variables: Any) -> Any:
        """Execute `source` with `variables` and return its variable `result`; both go through JSON.

        Raises `WorkerError` with the name of the exception's class.
        """
        return self.server.run("client:execute", textwrap.dedent(source), variables, timeout=180)


class Hub(HubServer):
    """The server together with the processes that use it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.home = folder / "home"  # HF_HOME of clients: cache and saved tokens
        self.worker = Worker(folder, self.env())

    def env(self, **changes: str) -> dict[str, str]:
        """A whole environment for a process that uses this Hub as "user"."""
        environment = {key: value for key, value in os.environ.items() if not key.upper().startswith(DROPPED)}
        return environment | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            **changes,
        }

    def run(self, source: str, **changes: str) -> str:
        """Run source text in a fresh process and return what it printed; `changes` go into its environment."""
        done = processes.run([sys.executable, "-c", source], env=self.env(**changes))
        if done.returncode != 0:
            raise RuntimeError(f"Exit code {done.returncode}\n{done.stderr}")
        return done.stdout

    def wipe(self) -> None:
        """Empty HF_HOME, so that nothing is in the client's cache."""
        shutil.rmtree(self.home, ignore_errors=True)


@pytest.fixture(scope="session")
def _hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub
        hub.worker.server.close()


@pytest.fixture
def hub(_hub: Hub) -> Iterator[Hub]:
    """The Hub without any repository, and the client with an empty cache."""
    _hub.reset()
    _hub.wipe()
    yield _hub
    assert not _hub.errors, "\n".join(_hub.errors)


@pytest.fixture
def worker(hub: Hub) -> Worker:
    """Runs client code: `worker.run(source, **variables)` returns the variable `result`."""
    return hub.worker
