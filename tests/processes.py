"""Other processes for tests: programs, launchers, and functions that begin at once in forks of a warm process.

    run([*RLORA, "--help"])                                          a program, to its end
    Program([*torchrun(2), "script.py"], folder / "output.txt")      a launcher that works while the test looks on
    server.run("programs:train", settings, folder=folder)            a function, in a fork of the server
    Program([*torchrun(2), *script("programs:train", ...)], ...)     the same function in each rank of a launcher

Every process has a time limit, and is ended by its id. A function is named `module:name` and receives its folder as a
path, then its arguments; arguments and result are JSON. Each rank that calls one leaves `result-<rank>.json` in that
folder, and, in a fork, what it prints as `output-<rank>.txt`.
"""

import ctypes
import faulthandler
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path


TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
# Folders of modules that have functions to call.
FOLDERS = [str(TESTS / name) for name in ("faults", "distributed", "hub")]
# The command, also where it is not installed.
RLORA = [sys.executable, "-c", "from rlora_cli import main; main()"]
# Environment of processes that train on the CPU, several of them on one machine.
CPU = {
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "GLOO_SOCKET_IFNAME": "lo",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
SERVER_LIFE = 1800  # seconds that a server lives at most
PR_SET_PDEATHSIG = 1


class WorkerError(Exception):
    """An exception of a function that was called in another process."""

    def __init__(self, type: str, message: str, traceback: str, bases: list[str]):
        super().__init__(f"{type}: {message}\n\n{traceback}")
        self.type = type  # name of the class
        self.message = message
        self.traceback = traceback
        self.bases = bases  # names of the class and of all its base classes


# Programs and launchers


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def torchrun(ranks):
    """The first words of a command that starts a script in this many ranks."""
    address = ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), *address]


def script(function, *arguments, folder, timeout):
    """The last words of a launcher's command, with which each rank calls a function; see `read_result`."""
    folder.mkdir(parents=True, exist_ok=True)
    call = {"function": function, "arguments": arguments, "folder": str(folder), "timeout": timeout}
    (folder / "call.json").write_text(json.dumps(call))
    return [str(TESTS / "processes.py"), "call", str(folder / "call.json")]


def run(command, *, timeout=180, env=None, **options):
    """Run a program to its end; its exit code and its output, as text."""
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, **options}
    return subprocess.run(command, timeout=timeout, env=env, **options)


class Program:
    """A program in its own session; its output goes to a file."""

    def __init__(self, command, output, *, env=None):
        self.output = output
        with open(output, "w") as file:
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
            env = {**os.environ, **(env or {})}
            self.process = subprocess.Popen(command, **streams, cwd=ROOT, env=env, start_new_session=True)

    def wait(self, timeout):
        """The exit code; a program that takes longer is ended, and has none."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.stop()

    def stop(self):
        """End a launcher, which ends its ranks; those that it leaves end themselves (`signal.alarm`)."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def tail(self, limit=6000):
        return self.output.read_text(errors="replace")[-limit:]


# A warm process and its forks


class Server:
    """A process that has imported what functions need, and calls them in forks of itself."""

    def __init__(self, folder, env):
        # Inductor of torch 2.6 starts a thread when it is imported, for processes that compile side by side.
        self.folder, self.env = folder, {"TORCHINDUCTOR_COMPILE_THREADS": "1", **env}
        self.log = folder / "server.txt"
        self.process = None
        self._runs = 0

    def _ask(self, command):
        if self.process is None or self.process.poll() is not None:
            with open(self.log, "w") as log:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
                command_line = [sys.executable, str(TESTS / "processes.py"), "serve"]
                self.process = subprocess.Popen(command_line, **pipes, env=self.env, text=True)
        print(json.dumps(command), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, f"the server ended: {self.log.read_text(errors='replace')[-3000:]}"
        return json.loads(line)

    def start(self, function, *arguments, folder=None, ranks=1, distributed=None, timeout=60):
        """
        Call a function in a fork, or in one for each rank.

        Args:
            function (`str`): Its `module:name`.
            arguments: Its arguments behind the folder.
            folder (`Path`, *optional*): Its folder, which also gets results and outputs. Default: a new one.
            ranks (`int`): How many processes.
            distributed (`bool`, *optional*): Whether their environment is that of ranks. Default: of several.
            timeout (`int`): Seconds until a process ends itself.
        """
        self._runs += 1
        folder = folder or self.folder / f"run{self._runs}"
        folder.mkdir(parents=True, exist_ok=True)
        call = {"function": function, "arguments": arguments, "folder": str(folder), "timeout": timeout}
        port = free_port() if (ranks > 1 if distributed is None else distributed) else None
        return Run(self, folder, timeout, self._ask({**call, "ranks": ranks, "port": port}))

    def run(self, function, *arguments, **options):
        """Call a function and wait; its result, or a list of the results of several ranks."""
        results = self.start(function, *arguments, **options).results()
        return results[0] if len(results) == 1 else results

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Run:
    """The processes of a call. Their ids are theirs until `wait` has collected them."""

    def __init__(self, server, folder, timeout, pids):
        self.server, self.folder, self.timeout, self.pids = server, folder, timeout, pids
        self.handles = [os.pidfd_open(pid) for pid in pids]
        self.statuses = None

    def ended(self, timeout=0.0, ranks=None):
        """Whether all processes, or those of some ranks, have ended; waits some seconds for it."""
        deadline = time.monotonic() + timeout
        for rank in range(len(self.pids)) if ranks is None else ranks:
            if not select.select([self.handles[rank]], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return False
        return True

    def kill(self):
        for handle in self.handles:
            signal.pidfd_send_signal(handle, signal.SIGKILL)

    def wait(self):
        """The exit status of each process."""
        if self.statuses is None:
            if not self.ended(self.timeout + 10):
                self.kill()
            self.statuses = [os.waitstatus_to_exitcode(self.server._ask({"reap": pid})) for pid in self.pids]
            for handle in self.handles:
                os.close(handle)
        return self.statuses

    def results(self):
        """What each rank returned. Raises `WorkerError` where one raised an error, `RuntimeError` where one died."""
        self.wait()
        for rank, status in enumerate(self.statuses):
            if status != 0:
                read_result(self.folder, rank)
                raise RuntimeError(f"Rank {rank} died with exit code {status}.\n{self.output()}")
        return [read_result(self.folder, rank) for rank in range(len(self.pids))]

    def output(self, limit=5000):
        paths = sorted(self.folder.glob("output-*.txt"))
        return "\n----\n".join(path.read_text(errors="replace")[-limit:] for path in paths)


def read_result(folder, rank=0):
    """What a rank returned, None where it has not; raises what it raised as a `WorkerError`."""
    path = folder / f"result-{rank}.json"
    answer = json.loads(path.read_text()) if path.exists() else {}
    if "error" in answer:
        raise WorkerError(**answer["error"])
    return answer.get("result")


# In the other process


def call_function(call):
    """Call a function in this process, one rank or the only one; leaves its result and returns the exit status."""
    signal.alarm(call["timeout"])
    faulthandler.dump_traceback_later(max(1, call["timeout"] - 5))
    module, _, name = call["function"].partition(":")
    try:
        result = getattr(import_module(module), name)(Path(call["folder"]), *call["arguments"])
        text, status = json.dumps({"result": result}, default=_as_text), 0
    except BaseException as error:
        trace = "".join(traceback.format_exception(error))
        print(trace, file=sys.stderr)
        bases = [base.__name__ for base in type(error).__mro__]
        answer = {"type": bases[0], "message": str(error), "traceback": trace, "bases": bases}
        text, status = json.dumps({"error": answer}), 1
    # Whole or not at all, for those who wait for it.
    path = Path(call["folder"], f"result-{os.environ.get('RANK', 0)}.json")
    path.with_suffix(".part").write_text(text)
    path.with_suffix(".part").rename(path)
    return status


def _as_text(value):
    if isinstance(value, Path) or hasattr(value, "isoformat"):
        return str(value)
    raise TypeError(f"A result must be JSON, got a {type(value).__name__} in it.")


def serve():
    """Answer each line of input, a command as JSON, by a line; a call by the ids of its processes."""
    signal.alarm(SERVER_LIFE)
    # Nothing that a library prints may come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        command = json.loads(line)
        if "reap" in command:
            answer = os.waitpid(command["reap"], 0)[1]
        else:
            answer = _fork_ranks(command)
        print(json.dumps(answer), file=answers, flush=True)


def _fork_ranks(call):
    import_module(call["function"].partition(":")[0])
    # Trainers collect garbage several times each, which takes half a second with all that libraries made.
    gc.freeze()

    # A fork has no thread but its own, and the locks that others held. (Arrow's allocator looks after its own.)
    names = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    others = [name for name in names if not name.startswith("jemalloc")][1:]
    if others:
        raise RuntimeError(f"threads run in the process that forks: {others}")
    return [_fork(call, rank) for rank in range(call["ranks"])]


def _fork(call, rank):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        nothing = os.open(os.devnull, os.O_RDONLY)
        output = os.open(Path(call["folder"], f"output-{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream, file in enumerate((nothing, output, output)):
            os.dup2(file, stream)
        if call["port"]:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": call["ranks"], "LOCAL_WORLD_SIZE": call["ranks"]}
            ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": call["port"]}
            os.environ |= {name: str(value) for name, value in ranks.items()}
        status = call_function(call)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not what `sys.exit` runs, which belongs to the process that was forked.
        os._exit(status)


if __name__ == "__main__":
    sys.path[:0] = FOLDERS
    if sys.argv[1] == "serve":
        serve()
    else:
        sys.exit(call_function(json.loads(Path(sys.argv[2]).read_text())))
