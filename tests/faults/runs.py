"""Training runs of programs.py in other processes, and the losses that they leave."""

import json


def start(server, program, folder, settings, *, ranks=1):
    """Start a function of programs.py; returns a `processes.Run`."""
    distributed = ranks > 1 or settings.get("strategy", "single") != "single"
    return server.start(f"programs:{program}", settings, folder=folder, ranks=ranks, distributed=distributed)


def run(server, program, folder, settings, *, ranks=1):
    """Run a function of programs.py to its end; the results of all ranks."""
    return start(server, program, folder, settings, ranks=ranks).results()


def losses_in(folder):
    """Pairs of step and loss as a run wrote them; a line that was cut short is not one."""
    path = folder / "losses.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [tuple(json.loads(line)) for line in lines if line.endswith("\n")]
