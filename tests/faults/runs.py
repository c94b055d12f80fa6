"""Start runs from a process that has everything imported, kill them, and read what they left."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


# Seconds that the server lives at most.
SERVER_LIFE = 900
# Of the environment of every run.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class ForkServer:
    """The process of `fork_server.py`, and what it is asked."""

    def __init__(self, folder):
        self.log = folder / "server.txt"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(Path(__file__).parent / "fork_server.py"), str(SERVER_LIFE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **SETTINGS},
                text=True,
            )
        assert self._answer() == "ready"

    def _answer(self):
        line = self.process.stdout.readline()
        assert line, f"the server ended: {self.log.read_text()[-3000:]}"
        return json.loads(line)

    def ask(self, command):
        print(json.dumps(command), file=self.process.stdin, flush=True)
        return self._answer()

    def start(self, program, folder, given, *, processes=1, timeout=60):
        """Start a function of `programs.py`; returns a `Run`."""
        folder.mkdir(parents=True, exist_ok=True)
        command = {"start": program, "folder": str(folder), "given": given, "processes": processes}
        return Run(self, folder, self.ask({**command, "port": free_port(), "timeout": timeout}))

    def run(self, program, folder, given, *, processes=1, timeout=60):
        """Run a function of `programs.py` to its end; what each rank wrote down, or the one result of one process."""
        run = self.start(program, folder, given, processes=processes, timeout=timeout)
        statuses = run.wait()
        assert not any(statuses), f"{statuses}: {run.output()}"
        results = [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(processes)]
        return results[0] if processes == 1 else results

    def close(self):
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Run:
    """The processes of a run; their ids stay theirs until they are collected."""

    def __init__(self, server, folder, pids):
        self.server, self.folder, self.pids = server, folder, pids
        self.handles = [os.pidfd_open(pid) for pid in pids]
        self.statuses = None

    def ended(self, timeout=0.0):
        """Whether all processes have ended, waiting for it for some seconds."""
        deadline = time.monotonic() + timeout
        for handle in self.handles:
            if not select.select([handle], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return False
        return True

    def kill(self):
        for handle in self.handles:
            signal.pidfd_send_signal(handle, signal.SIGKILL)

    def wait(self, timeout=600):
        """The exit statuses of all processes, killed after `timeout` seconds; they end themselves before that."""
        if self.statuses is None:
            if not self.ended(timeout):
                self.kill()
            self.statuses = [os.waitstatus_to_exitcode(self.server.ask({"reap": pid})) for pid in self.pids]
            for handle in self.handles:
                os.close(handle)
        return self.statuses

    def output(self, limit=5000):
        texts = (path.read_text()[-limit:] for path in sorted(self.folder.glob("output-*.txt")))
        return "\n----\n".join(texts)
