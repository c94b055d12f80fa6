"""Plans of `quality.py`: lists of runs by name."""

from itertools import product
from typing import Any

from quality_runs import Run


CELLS = tuple(product(("multitask", "setting1"), ("plenty", "little")))
RATES = (2e-4, 5e-4, 1e-3, 2e-3, 4e-3)


def grid(
    methods: dict[str, tuple[str, dict[str, Any]]],
    rates: tuple[float, ...] = RATES,
    seeds: tuple[int, ...] = (0,),
    cells: tuple[tuple[str, str], ...] = CELLS,
    **settings: Any,
) -> list[Run]:
    """All runs of methods (a label, then method and options) x cells x learning rates x seeds."""
    return [
        Run(method, suite, size, rate, seed=seed, options=options, label=label, **settings)
        for (label, (method, options)), (suite, size), rate, seed in product(methods.items(), cells, rates, seeds)
    ]


def tuning() -> list[Run]:
    """The learning rates of LoRA and of three forms of R-LoRA."""
    return grid(
        {
            "LoRA r=10": ("lab_lora", {}),
            "R-LoRA": ("lab_rlora", {}),
            "R-LoRA, no dropout": ("lab_rlora", {"dropout": 0.0}),
            "ranks as heads": ("lab_ranks", {}),
        }
    )


PLANS = {"tuning": tuning}
