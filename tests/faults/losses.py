"""What runs told of their losses."""

import json


def losses_in(folder):
    """Pairs of step and loss as a run told them; a line that was cut short is not one."""
    path = folder / "losses.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [tuple(json.loads(line)) for line in lines if line.endswith("\n")]
