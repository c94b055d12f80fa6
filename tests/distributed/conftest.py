"""`launch`, which runs cases in one process or in several ranks of this machine."""

import pytest
import torch
from cases import ON_GPU
from processes import Program, script, torchrun


@pytest.fixture(scope="session")
def launch(server):
    def launch(folder, program, cases, *inputs, ranks=1, timeout=120):
        """
        Run cases; returns what each rank saved, by case.

        Args:
            folder (`Path`): A new folder for what is saved.
            program (`str`): The module here whose `run_cases` runs them.
            cases (`list[dict]`): Cases, each with a `name`.
            inputs: What all cases share.
            ranks (`int`): How many processes; on GPUs, one for each.
            timeout (`int`): Seconds.
        """
        function = f"{program}:run_cases"
        if ON_GPU:
            # A CUDA device can't be used in a fork of a process that has looked for one.
            command = torchrun(ranks) if ranks > 1 else torchrun(1)[:1]
            words = script(function, cases, *inputs, folder=folder, timeout=timeout + 20)
            devices = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(ranks)))}
            launcher = Program([*command, *words], folder / "output.txt", env=devices)
            code = launcher.wait(timeout)
            assert code == 0, f"{code}: {launcher.tail()}"
        else:
            server.run(function, cases, *inputs, folder=folder, ranks=ranks, timeout=timeout)
        names = [case["name"] for case in cases]
        return {name: [torch.load(folder / f"{name}.{rank}.pt") for rank in range(ranks)] for name in names}

    return launch
