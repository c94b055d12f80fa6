"""Programs on one process or several of this machine, each with a bounded life."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch


# Seconds for one launch; most take less than 30.
TIMEOUT = 120
# In the GPU suite, on a machine with two: `RLORA_TRL_TEST_DEVICE=cuda`.
ON_GPU = os.environ.get("RLORA_TRL_TEST_DEVICE") == "cuda"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def stop(process):
    """End a launcher and its ranks: it ends them when asked to; else they end themselves (`signal.alarm`)."""
    process.terminate()
    try:
        process.wait(40)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def launch(folder, start, cases, processes, *, program="balance_run.py", timeout=TIMEOUT):
    """
    Run cases in one process or several; what each rank found, by case.

    Args:
        folder (`Path`): A new folder for what is given and found.
        start (`dict`): What all cases share, for the program.
        cases (`list[dict]`): Cases, each with a `name`.
        processes (`int`): How many processes; on GPUs, one for each.
        program (`str`, *optional*): The program in this folder that runs them.
        timeout (`int`, *optional*): Seconds.
    """
    folder.mkdir(parents=True)
    given = {"cases": cases, "timeout": timeout + 20, **start}
    (folder / "cases.json").write_text(json.dumps(given))
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    command += [str(Path(__file__).parent / program), str(folder / "cases.json")]
    settings = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(processes)))}
    if not ON_GPU:
        settings |= {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **settings},
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = f"no end after {timeout} s"
        finally:
            if process.poll() is None:
                stop(process)
    assert code == 0, f"{code}: {(folder / 'output.txt').read_text()[-6000:]}"
    return {
        entry["name"]: [torch.load(folder / f"{entry['name']}.{rank}.pt") for rank in range(processes)]
        for entry in cases
    }
