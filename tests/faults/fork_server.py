"""A process that imports everything once, and starts runs, of one process or of several ranks, by `fork`.

    python fork_server.py                    (by `runs.ForkServer`)

Each line of its input is a command as JSON, and is answered by a line:

    {"start": "<function of programs.py>", "given": {...}, "folder": "...", "processes": 2, "port": ..., "timeout": 60}
                                             starts it; the answer is the list of the ids of its processes
    {"reap": 1234}                           collects a process that has ended; the answer is its exit status

What a rank prints goes to `<folder>/output-<rank>.txt`. A process ends itself after `timeout` seconds, and this one
when its input ends.
"""

import ctypes
import faulthandler
import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))

PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)


def start(command):
    names = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    # A fork has no thread but its own, and the locks that others held. (Arrow's allocator sees to its own.)
    others = [name for name in names if not name.startswith("jemalloc")][1:]
    if others:
        raise RuntimeError(f"threads run in the process that forks: {others}")
    return [fork_rank(command, rank) for rank in range(command["processes"])]


def fork_rank(command, rank):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.alarm(command["timeout"])
        output = os.open(Path(command["folder"], f"output-{rank}.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.close(0)
        faulthandler.dump_traceback_later(max(1, command["timeout"] - 5))
        if command["processes"] > 1 or command["given"].get("strategy", "single") != "single":
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(command["processes"]),
                "LOCAL_WORLD_SIZE": str(command["processes"]),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(command["port"]),
            }
        getattr(programs, command["start"])(Path(command["folder"]), command["given"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not what `sys.exit` runs, which belongs to the process that was forked.
        os._exit(status)


def main():
    # Nothing that a library prints may come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        answer = os.waitpid(command["reap"], 0)[1] if "reap" in command else start(command)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    signal.alarm(int(sys.argv[1]))
    import programs

    # Runs collect garbage several times each, which takes half a second with all that libraries made.
    gc.freeze()
    main()
