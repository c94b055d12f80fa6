"""A long-lived Python process for code that talks to the Hub of the tests.

`huggingface_hub` reads its settings when it is imported, so client code cannot run in pytest's own process, and an
import of PEFT takes seconds, so it should not run in a new process each time. `Worker.run` sends source text to one
process that stays; run as a program, this file is that process.
"""

import contextlib
import json
import linecache
import os
import queue
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class WorkerError(Exception):
    """An exception of the code that a worker ran."""

    def __init__(self, type: str, message: str, traceback: str, bases: list[str]) -> None:
        super().__init__(f"{type}: {message}\n\n{traceback}")
        self.type = type  # name of the class
        self.message = message
        self.traceback = traceback
        self.bases = bases  # names of the class and all its base classes, to test "is a ValueError"


class Worker:
    """Runs source text in a process of its own, which is started at the first use and again after it died."""

    def __init__(self, env: Mapping[str, str], folder: Path) -> None:
        self.env = dict(env)
        self.log = folder / "worker.log"
        self.timeout = 180.0  # seconds that one `run` may take
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()

    def run(self, source: str, /, **variables: Any) -> Any:
        """Execute `source` with `variables`, in a namespace of its own, and return its variable `result`.

        Values go through JSON; paths and dates come back as text. The environment, the working directory and
        `sys.argv` are put back afterwards. Raises `WorkerError` with the name of the exception's class.
        """
        process = self._start()
        process.stdin.write(
            json.dumps({"source": textwrap.dedent(source), "variables": variables}, default=str) + "\n"
        )
        process.stdin.flush()
        try:
            line = self._answers.get(timeout=self.timeout)
        except queue.Empty:
            self.stop()
            raise TimeoutError(f"The worker gave no answer in {self.timeout} s.\n{self._tail()}") from None
        if not line:
            code = process.wait(10)
            self.stop()
            raise RuntimeError(f"The worker died with exit code {code}.\n{self._tail()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(**answer["error"])
        return answer["result"]

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(10)
            process.stdin.close()

    def _start(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._answers = queue.Queue()
            with self.log.open("a") as log:
                command = [sys.executable, str(Path(__file__).resolve())]
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
                self._process = subprocess.Popen(command, env=self.env, text=True, **pipes)
            threading.Thread(target=_forward, args=(self._process.stdout, self._answers), daemon=True).start()
        return self._process

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""


def _forward(stream: Any, answers: "queue.Queue[str]") -> None:
    """Put each line in the queue, and an empty one at the end, so that waiting for a line can have a time limit."""
    with stream:
        for line in stream:
            answers.put(line)
    answers.put("")


def _serve() -> None:
    """Answer requests from stdin on what was stdout; prints of the code go to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # `python worker.py` puts the folder of this file first, where names such as `server` are only for the tests.
    sys.path.pop(0)
    for number, line in enumerate(sys.stdin):
        answer = _execute(f"<worker {number}>", **json.loads(line))
        print(json.dumps(answer, default=_as_text), file=answers, flush=True)


def _execute(name: str, source: str, variables: dict[str, Any]) -> dict[str, Any]:
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    namespace = {"__name__": "__worker__", **variables}
    try:
        with _restored():
            exec(compile(source, name, "exec"), namespace)
        result = namespace.get("result")
        json.dumps(result, default=_as_text)
        return {"result": result}
    except BaseException as error:
        bases = [base.__name__ for base in type(error).__mro__]
        text = "".join(traceback.format_exception(error))
        return {"error": {"type": bases[0], "message": str(error), "traceback": text, "bases": bases}}


@contextlib.contextmanager
def _restored() -> Any:
    environ, folder, argv = dict(os.environ), os.getcwd(), list(sys.argv)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environ)
        os.chdir(folder)
        sys.argv[:] = argv


def _as_text(value: Any) -> str:
    if isinstance(value, Path) or hasattr(value, "isoformat"):
        return str(value)
    raise TypeError(f"`result` must be JSON, got a {type(value).__name__} in it.")


if __name__ == "__main__":
    _serve()
