"""Plans of `quality.py`: lists of runs by name, and the methods that they compare."""

from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

from quality_runs import Run


CELLS = tuple(product(("multitask", "setting1"), ("plenty", "little")))
RATES = (2e-4, 5e-4, 1e-3, 2e-3, 4e-3)


class Method(NamedTuple):
    """
    A row of a table.

    Args:
        method (`str`): Of a [`Run`].
        options (`dict`): Likewise.
        rates (`tuple[float, ...]`): Learning rates of the plan `ideas`.
        wave (`int`): Lower ones first, there.
    """

    method: str
    options: dict[str, Any]
    rates: tuple[float, ...] = (1e-3, 2e-3)
    wave: int = 0


def _lora(wave: int = 0, rates: tuple[float, ...] = (5e-4, 1e-3), **options: Any) -> Method:
    return Method("lab_lora", options, rates, wave)


def _ranks(wave: int = 0, rates: tuple[float, ...] = (1e-3, 2e-3), **options: Any) -> Method:
    # Seven heads of rank 1 with a router have as many parameters as LoRA of rank 10.
    return Method("lab_ranks", {"heads": 7, **options}, rates, wave)


def _heads(wave: int = 0, rates: tuple[float, ...] = (5e-4, 1e-3), **options: Any) -> Method:
    return Method("lab_rlora", {"dropout": 0.0, **options}, rates, wave)


TUNED = {
    "LoRA r=10": _lora(),
    "R-LoRA": Method("lab_rlora", {}),
    "R-LoRA, no dropout": _heads(),
    "8 ranks as heads": Method("lab_ranks", {}),
    "ranks as heads": _ranks(),
}

# Names of the MLP and of attention.
_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LOW, _HIGH = (2e-4, 5e-4), (2e-3, 4e-3)
_EARLY = {"router_init": "kaiming_uniform", "router_rate": 0.01}

# What is tried against LoRA, and what of it LoRA can have too. Settings that do not change a shape train side by side.
IDEAS = {
    "LoRA r=10": _lora(),
    "LoRA, EMA 0.98": _lora(ema=0.98),
    "LoRA, EMA 0.95": _lora(ema=0.95),
    "LoRA+ 4": _lora(rates=_LOW, b_ratio=4.0),
    "LoRA+ 16": _lora(rates=_LOW, b_ratio=16.0),
    "LoRA, A faster": _lora(a_ratio=4.0),
    "LoRA, decay 0.1": _lora(weight_decay=0.1),
    "LoRA, warm-up 0.2": _lora(warmup=0.2),
    "LoRA, beta2 0.98": _lora(beta2=0.98),
    "LoRA, alpha 64": _lora(alpha=64.0),
    "LoRA, rates by width": _lora(width_power=0.5),
    "ranks as heads": _ranks(),
    "ranks, EMA 0.98": _ranks(ema=0.98),
    "ranks, decay to init 0.1": _ranks(weight_decay=0.1, decay_to="init"),
    "ranks, decay to zero 0.1": _ranks(weight_decay=0.1),
    "ranks, B faster": _ranks(rates=(5e-4, 1e-3), b_ratio=4.0),
    "ranks, A faster": _ranks(rates=(5e-4, 1e-3), a_ratio=4.0),
    "ranks, router faster": _ranks(router_ratio=10.0),
    "ranks, early router": _ranks(**_EARLY),
    "ranks, temperature 0.3": _ranks(temperature=0.3),
    "ranks, gamma 16": _ranks(gamma=16.0),
    "ranks, gamma 256": _ranks(gamma=256.0),
    "ranks, orthogonal": _ranks(init="orthogonal"),
    "ranks, rates by width": _ranks(width_power=0.5),
    "ranks, sigmoid": _ranks(rates=(5e-4, 1e-3), gate="sigmoid", scaling="alpha/sqrt(rN)"),
    "ranks, sigmoid, EMA 0.98": _ranks(rates=(5e-4, 1e-3), gate="sigmoid", scaling="alpha/sqrt(rN)", ema=0.98),
    "ranks, sigmoid, early router": _ranks(
        rates=(5e-4, 1e-3), gate="sigmoid", scaling="alpha/sqrt(rN)", router_rate=0.01
    ),
    "ranks, sigmoid, gamma 256": _ranks(rates=(5e-4, 1e-3), gate="sigmoid", scaling="alpha/sqrt(rN)", gamma=256.0),
    "ranks, sigmoid, orthogonal": _ranks(
        rates=(5e-4, 1e-3), gate="sigmoid", scaling="alpha/sqrt(rN)", init="orthogonal"
    ),
    "ranks, dropout 0.1": _ranks(1, dropout=0.1),
    "ranks, dropout 0.2": _ranks(1, dropout=0.2),
    "ranks, dropout 0.2 for a half": _ranks(1, dropout=0.2, dropout_until=0.5),
    "ranks, sigmoid, zero B": _ranks(1, (5e-4, 1e-3), gate="sigmoid", scaling="alpha/sqrt(rN)", init="zero_b"),
    "ranks, sigmoid, zero A": _ranks(1, (5e-4, 1e-3), gate="sigmoid", scaling="alpha/sqrt(rN)", init="zero_a"),
    "ranks, sigmoid, dropout 0.1": _ranks(1, (5e-4, 1e-3), gate="sigmoid", scaling="alpha/sqrt(rN)", dropout=0.1),
    "ranks, competing": _ranks(1, (5e-4, 1e-3), gate="competing", scaling="alpha/sqrt(rN)"),
    "ranks, top 4": _ranks(1, gate="top_k", top_k=4, router_init="kaiming_uniform"),
    "ranks, zero A, early router": _ranks(1, init="zero_a", **_EARLY),
    "LoRA, Table 1 and anchor": _lora(1, init="rlora"),
    "LoRA, orthogonal and anchor": _lora(1, init="orthogonal"),
    "LoRA, Table 1 and anchor, decay to init 0.1": _lora(1, init="rlora", weight_decay=0.1, decay_to="init"),
    "LoRA, mirrored": _lora(1, init="mirrored"),
    "LoRA, dropout 0.1": _lora(1, dropout=0.1, position="input"),
    "LoRA, rank dropout 0.2": _lora(1, dropout=0.2),
    "LoRA, rank dropout 0.2 for a half": _lora(1, dropout=0.2, dropout_until=0.5),
    "LoRA, preconditioned": _lora(1, precondition=1e-4),
    "LoRA, more rank in down": _lora(1, ranks={"down_proj": 16, "gate_proj": 7, "up_proj": 7}),
    "LoRA, down only": _lora(1, r=30, targets=("down_proj",)),
    "LoRA, all linear layers": _lora(1, r=6, targets=_ALL),
    "ranks, all linear layers": _ranks(1, heads=4, targets=_ALL),
    "R-LoRA, no dropout": _heads(1),
    "R-LoRA, dropout 0.2 for a half": _heads(1, dropout=0.2, dropout_until=0.5),
    "R-LoRA, sigmoid": _heads(1, gate="sigmoid", scaling="alpha/sqrt(rN)"),
    "R-LoRA, sigmoid, dropout 0.1": _heads(1, gate="sigmoid", scaling="alpha/sqrt(rN)", dropout=0.1),
    "R-LoRA, competing": _heads(1, gate="competing", scaling="alpha/sqrt(rN)"),
    "R-LoRA, decay to init 0.1": _heads(1, weight_decay=0.1, decay_to="init"),
    "R-LoRA, zero A, early router": _heads(1, init="zero_a", **_EARLY),
    "R-LoRA by task": _heads(1, gate="task"),
}

# Routed by task, with about as many parameters as LoRA r=10, and a rate at which a router of a few numbers can move.
_ROUTER = {"router_rate": 0.05}
BY_TASK = {
    "R-LoRA by task, N=5": _heads(0, heads=5, r=3, gate="task", **_ROUTER),
    "ranks by task": Method(
        "lab_ranks", {"heads": 9, "gate": "task_sigmoid", "scaling": "alpha/sqrt(rN)", **_ROUTER}, (5e-4, 1e-3)
    ),
}
# A second look at gates that do not compete.
SIGMOID = {
    "ranks, sigmoid, router 5 times as fast": _ranks(0, gate="sigmoid", scaling="alpha/sqrt(rN)", router_ratio=5.0),
    "ranks, sigmoid, temperature 0.3": _ranks(0, gate="sigmoid", scaling="alpha/sqrt(rN)", temperature=0.3),
}

# Methods as their packages have them.
PACKAGED = {
    "base": Method("base", {}, (0.0,)),
    "PEFT LoRA r=10": Method("lora", {}),
    "PEFT LoRA r=4": Method("lora", {"r": 4}),
    "Multi-LoRA": Method("multi_lora", {}),
    "LoRA-MoE": Method("moe_lora", {}),
    "HydraLoRA": Method("hydra", {}),
    "MTL-LoRA": Method("mtl_lora", {}),
    "PEFT Lily": Method("lily", {}),
    "rlora_trl": Method("rlora", {}),
    "rlora_trl, no dropout": Method("rlora", {"head_dropout": 0.0}),
    "rlora_trl, zero B": Method("rlora", {"init_weights": "zero_b"}),
    "rlora_trl, zero A": Method("rlora", {"init_weights": "zero_a"}),
}
METHODS = {**TUNED, **IDEAS, **BY_TASK, **SIGMOID, **PACKAGED}


def grid(
    methods: dict[str, Method],
    rates: tuple[float, ...] = RATES,
    seeds: tuple[int, ...] = (0,),
    cells: tuple[tuple[str, str], ...] = CELLS,
    **settings: Any,
) -> list[Run]:
    """All runs of methods x cells x learning rates x seeds. What is not trained has one run for each cell."""
    return [
        Run(one.method, suite, size, rate, seed=seed, options=one.options, label=label, **settings)
        for (label, one), (suite, size) in product(methods.items(), cells)
        for rate, seed in ([(0.0, 0)] if one.method == "base" else product(rates, seeds))
    ]


def tuning() -> list[Run]:
    """The learning rates of LoRA and of R-LoRA in four forms."""
    return grid(TUNED)


def ideas() -> list[Run]:
    """All ideas, each with two learning rates; first those that train side by side with many others."""
    return [
        run for label, one in IDEAS.items() for run in grid({label: one}, one.rates, cells=CELLS[:2], wave=one.wave)
    ]


def packaged() -> list[Run]:
    """The methods of the library and of PEFT."""
    return grid(PACKAGED)


def words() -> list[Run]:
    """One input and many questions: with the question in the prompt, with the task's name, or without."""
    lora, by_task = {"LoRA r=10": TUNED["LoRA r=10"]}, BY_TASK
    # Twelve tasks: somewhat more parameters than the others.
    each = {
        "a LoRA for each task": Method("lab", {"r": 1, "heads": 12, "share_a": False, "gate": "own", "init": "zero_b"})
    }
    prompts = {
        "instruction": {**lora, **by_task},
        "name": lora,
        "input": {**lora, "R-LoRA, no dropout": TUNED["R-LoRA, no dropout"], **by_task, **each},
    }
    return [
        replace(run, label=f"{run.label}; {prompt}")
        for prompt, methods in prompts.items()
        for run in grid(methods, RATES[1:], cells=(("words", "plenty"),), prompt=prompt)
    ]


PLANS = {"tuning": tuning, "ideas": ideas, "packaged": packaged, "words": words}
