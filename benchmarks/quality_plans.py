"""Plans of `quality.py`: lists of runs by name, and the methods that they compare."""

from itertools import product
from typing import Any, NamedTuple

from quality_runs import Run


CELLS = tuple(product(("multitask", "setting1"), ("plenty", "little")))
IDEA_CELLS = CELLS[:2]  # those that all ideas are tried in
RATES = (2e-4, 5e-4, 1e-3, 2e-3, 4e-3)


class Method(NamedTuple):
    """
    A row of a table.

    Args:
        method (`str`): Of a [`Run`].
        options (`dict`): Likewise.
        what (`str`): What it is, for readers of the table.
        rates (`tuple[float, ...]`): Learning rates of the plan `ideas`.
        wave (`int`): Lower ones first, there.
    """

    method: str
    options: dict[str, Any]
    what: str
    rates: tuple[float, ...] = (1e-3, 2e-3)
    wave: int = 0


# Learning rates of ideas. Gates of 1 make the delta larger than a softmax does, so their best rate is lower.
_USUAL, _HIGH, _LOW = (5e-4, 1e-3), (1e-3, 2e-3), (2e-4, 5e-4)


def _lora(what: str, wave: int = 0, rates: tuple[float, ...] = _USUAL, **options: Any) -> Method:
    return Method("lab_lora", options, what, rates, wave)


def _ranks(what: str, wave: int = 0, rates: tuple[float, ...] = _HIGH, **options: Any) -> Method:
    # Seven heads of rank 1 with a router have as many parameters as LoRA of rank 10.
    return Method("lab_ranks", {"heads": 7, **options}, what, rates, wave)


def _gates(what: str, wave: int = 0, **options: Any) -> Method:
    """Ranks as heads whose gates are 1 at the start."""
    return _ranks(what, wave, _USUAL, **{"gate": "sigmoid", "scaling": "alpha/sqrt(rN)", **options})


def _heads(what: str, wave: int = 0, rates: tuple[float, ...] = _USUAL, **options: Any) -> Method:
    return Method("lab_rlora", {"dropout": 0.0, **options}, what, rates, wave)


_RANKS = _ranks("seven heads of rank 1, each with an A of its own, softmax router, no dropout")
_NO_DROPOUT = "R-LoRA without head dropout, as the library has it by default"

TUNED = {
    "LoRA r=10": _lora("LoRA of rank 10 with alpha/sqrt(r), the reference"),
    "R-LoRA": Method(
        "lab_rlora", {}, "as the paper: three heads of rank 4, Table 1, softmax router from zero, head dropout 0.2"
    ),
    "R-LoRA, no dropout": _heads(_NO_DROPOUT),
    "8 ranks as heads": Method("lab_ranks", {}, "eight heads of rank 1, more parameters than LoRA has"),
    "ranks as heads": _RANKS,
}

# Names of the MLP and of attention.
_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SHARE = "initial values such that the first delta has 5 % of the norm of the layer's weight"
_EARLY = {"router_init": "kaiming_uniform", "router_rate": 0.01}

# What is tried against LoRA, and what of it LoRA can have too. Settings that do not change a shape train side by side.
IDEAS = {
    "LoRA r=10": TUNED["LoRA r=10"],
    "LoRA, EMA 0.98": _lora("scored with an average of the weights over about 50 steps", ema=0.98),
    "LoRA, EMA 0.95": _lora("scored with an average of the weights over about 20 steps", ema=0.95),
    "LoRA+ 4": _lora("LoRA+: B learns four times as fast as A", rates=_LOW, b_ratio=4.0),
    "LoRA+ 16": _lora("LoRA+: B learns 16 times as fast as A", rates=_LOW, b_ratio=16.0),
    "LoRA, A faster": _lora("A learns four times as fast as B", a_ratio=4.0),
    "LoRA, decay 0.1": _lora("weight decay", weight_decay=0.1),
    "LoRA, warm-up 0.2": _lora("the learning rate rises over a fifth of the steps", warmup=0.2),
    "LoRA, beta2 0.98": _lora("AdamW forgets squared gradients sooner", beta2=0.98),
    "LoRA, alpha 64": _lora("twice the scale", alpha=64.0),
    "LoRA, rates by width": _lora("lower rates for wider layers", width_power=0.5),
    "ranks as heads": _RANKS,
    "ranks, EMA 0.98": _ranks("ranks as heads, scored with an average of the weights", ema=0.98),
    "ranks, decay to init 0.1": _ranks(
        "weights decay towards their initial values, where the delta is zero", weight_decay=0.1, decay_to="init"
    ),
    "ranks, decay to zero 0.1": _ranks("usual weight decay, which moves the delta away from zero", weight_decay=0.1),
    "ranks, B faster": _ranks("B learns four times as fast as A", rates=_USUAL, b_ratio=4.0),
    "ranks, A faster": _ranks("A learns four times as fast as B", rates=_USUAL, a_ratio=4.0),
    "ranks, router faster": _ranks("the router learns ten times as fast", router_ratio=10.0),
    "ranks, early router": _ranks("a random router with a high rate of its own, so that it decides early", **_EARLY),
    "ranks, temperature 0.3": _ranks("a sharper softmax", temperature=0.3),
    "ranks, gamma 16": _ranks("larger initial values of A and B", gamma=16.0),
    "ranks, gamma 256": _ranks("smaller initial values of A and B", gamma=256.0),
    "ranks, orthogonal": _ranks("orthogonal initial rows of A and B", init="orthogonal"),
    "ranks, rates by width": _ranks("lower rates for wider layers", width_power=0.5),
    "ranks, sigmoid": _gates("gates that do not compete: twice a sigmoid for each rank, 1 at the start"),
    "ranks, sigmoid, router 5 times as fast": _gates("sigmoid gates that learn faster than A and B", router_ratio=5.0),
    "ranks, sigmoid, temperature 0.3": _gates("sharper sigmoid gates", temperature=0.3),
    "ranks, sigmoid, EMA 0.98": _gates("sigmoid gates, scored with an average of the weights", ema=0.98),
    "ranks, sigmoid, early router": _gates("sigmoid gates, and a high rate of the router", router_rate=0.01),
    "ranks, sigmoid, gamma 256": _gates("sigmoid gates, smaller initial values", gamma=256.0),
    "ranks, sigmoid, orthogonal": _gates("sigmoid gates, orthogonal initial rows", init="orthogonal"),
    "ranks, dropout 0.1": _ranks("head dropout 0.1", 1, dropout=0.1),
    "ranks, dropout 0.2": _ranks("head dropout 0.2", 1, dropout=0.2),
    "ranks, dropout 0.2 for a half": _ranks(
        "head dropout in the first half of training only", 1, dropout=0.2, dropout_until=0.5
    ),
    "ranks, sigmoid, zero B": _gates("sigmoid gates, B starts at zero as in LoRA", 1, init="zero_b"),
    "ranks, sigmoid, zero A": _gates("sigmoid gates, A starts at zero", 1, init="zero_a"),
    "ranks, sigmoid, dropout 0.1": _gates("sigmoid gates and head dropout", 1, dropout=0.1),
    "ranks, competing": _gates(
        "a softmax times the number of heads, so that each gate starts at 1", 1, gate="competing"
    ),
    "ranks, top 4": _ranks(
        "the four ranks with the largest logits count for a token",
        1,
        gate="top_k",
        top_k=4,
        router_init="kaiming_uniform",
    ),
    "ranks, zero A, early router": _ranks(
        "A starts at zero, and the router decides early", 1, init="zero_a", **_EARLY
    ),
    "LoRA, Table 1 and anchor": _lora(
        "R-LoRA's initial values, less the initial delta; one head, no router", 1, init="rlora"
    ),
    "LoRA, orthogonal and anchor": _lora("orthogonal initial rows, less the initial delta", 1, init="orthogonal"),
    "LoRA, Table 1 and anchor, decay to init 0.1": _lora(
        "the same as Table 1 and anchor, and weights decay towards their initial values",
        1,
        init="rlora",
        weight_decay=0.1,
        decay_to="init",
    ),
    "LoRA, mirrored": _lora("two halves of the ranks that cancel out at the start, no anchor", 1, init="mirrored"),
    "LoRA, dropout 0.1": _lora("LoRA's own dropout, on the input", 1, dropout=0.1, position="input"),
    "LoRA, rank dropout 0.2": _lora("dropout on A x", 1, dropout=0.2),
    "LoRA, rank dropout 0.2 for a half": _lora(
        "dropout on A x in the first half of training only", 1, dropout=0.2, dropout_until=0.5
    ),
    "LoRA, preconditioned": _lora("gradients scaled by the other matrix (arXiv 2402.02347)", 1, precondition=1e-4),
    "LoRA, more rank in down": _lora(
        "the same budget, with more rank in down_proj", 1, ranks={"down_proj": 16, "gate_proj": 7, "up_proj": 7}
    ),
    "LoRA, down only": _lora("the whole budget in down_proj", 1, r=30, targets=("down_proj",)),
    "LoRA, all linear layers": _lora("attention too, with rank 6", 1, r=6, targets=_ALL),
    "ranks, all linear layers": _ranks("ranks as heads, attention too, four heads a layer", 1, heads=4, targets=_ALL),
    "R-LoRA, no dropout": _heads(_NO_DROPOUT, 1),
    "R-LoRA, dropout 0.2 for a half": _heads(
        "head dropout in the first half of training only", 1, dropout=0.2, dropout_until=0.5
    ),
    **{
        f"R-LoRA, no dropout, gamma {gamma}": _heads("smaller initial values of A and B", 1, gamma=float(gamma))
        for gamma in (256, 1024, 4096)
    },
    "R-LoRA, no dropout, 5 % of the weight": _heads(_SHARE, 1, share=0.05),
    "R-LoRA, 5 % of the weight": _heads(f"head dropout 0.2, {_SHARE}", 1, dropout=0.2, share=0.05),
    "R-LoRA, gamma 1024": _heads("head dropout 0.2, smaller initial values of A and B", 1, dropout=0.2, gamma=1024.0),
    "R-LoRA, sigmoid": _heads("gates that do not compete", 1, gate="sigmoid", scaling="alpha/sqrt(rN)"),
    "R-LoRA, sigmoid, dropout 0.1": _heads(
        "gates that do not compete, and head dropout", 1, gate="sigmoid", scaling="alpha/sqrt(rN)", dropout=0.1
    ),
    "R-LoRA, competing": _heads("a softmax times the number of heads", 1, gate="competing", scaling="alpha/sqrt(rN)"),
    "R-LoRA, decay to init 0.1": _heads(
        "weights decay towards their initial values", 1, weight_decay=0.1, decay_to="init"
    ),
    "R-LoRA, zero A, early router": _heads(
        "A starts at zero, and the router decides early", 1, init="zero_a", **_EARLY
    ),
    "R-LoRA by task": _heads("head weights by task in place of a router", 1, gate="task"),
}


# A router of a few numbers for each task needs a rate at which these can move.
def _by_task(what: str, **options: Any) -> Method:
    """Ranks as heads, each with a gate for each task; nine have as many parameters as LoRA of rank 10."""
    usual = {"heads": 9, "gate": "task_sigmoid", "scaling": "alpha/sqrt(rN)", "router_rate": 0.05}
    return Method("lab_ranks", {**usual, **options}, what, _LOW)


# Gates that know the task of a row, in training and in scoring.
BY_TASK = {
    "ranks by task": _by_task("nine ranks, each with a gate for each task: twice a sigmoid, 1 at the start"),
    "10 ranks by task": _by_task("ten ranks with such gates, slightly more parameters than LoRA has", heads=10),
    "ranks by task, router 0.01": _by_task("nine ranks with gates by task that learn slower", router_rate=0.01),
    "ranks by task, router 0.2": _by_task("nine ranks with gates by task that learn faster", router_rate=0.2),
    "ranks by task, router 0.2, EMA 0.98": _by_task(
        "gates by task that learn faster, scored with an average of the weights", router_rate=0.2, ema=0.98
    ),
    **{
        f"ranks by task, router 0.2, gamma {gamma}": _by_task(
            "gates by task that learn faster, smaller initial values", router_rate=0.2, gamma=float(gamma)
        )
        for gamma in (256, 1024)
    },
    "ranks by task, router 0.2, 5 % of the weight": _by_task(
        f"gates by task that learn faster, {_SHARE}", router_rate=0.2, share=0.05
    ),
    "ranks by task, shift": _by_task(
        "nine ranks with gates by task, and a vector by task that is added to A x", gate="task_shift"
    ),
    "ranks by task, shift, router 0.2": _by_task(
        "gates and vectors by task that learn faster", gate="task_shift", router_rate=0.2
    ),
    "ranks by task, EMA 0.98": _by_task("gates by task, scored with an average of the weights", ema=0.98),
    "ranks by task, gamma 256": _by_task("gates by task, smaller initial values", gamma=256.0),
    "ranks by task, decay to init 0.1": _by_task(
        "gates by task, weights decay towards their initial values", weight_decay=0.1, decay_to="init"
    ),
    "ranks by task, zero B": _by_task("gates by task, B starts at zero as in LoRA", init="zero_b"),
    # What `RLoraConfig(r=1, num_heads=9, share_a=False, router="task", lora_alpha=96)` is.
    "ranks by task, softmax": Method(
        "lab_ranks",
        {"heads": 9, "gate": "task", "alpha": 96.0, "router_rate": 0.05},
        "nine ranks, weighed by nine times a softmax for each task",
        _LOW,
    ),
    "heads by task": _heads(
        "five heads of rank 3 with such gates for each task",
        rates=_LOW,
        **{"heads": 5, "r": 3, "gate": "task_sigmoid", "scaling": "alpha/sqrt(rN)", "router_rate": 0.05},
    ),
    "R-LoRA by task, N=5": _heads(
        "five heads of rank 3, a softmax for each task", **{"heads": 5, "r": 3, "gate": "task", "router_rate": 0.05}
    ),
}

# Methods as their packages have them.
PACKAGED = {
    "base": Method("base", {}, "the model as it is", (0.0,)),
    "PEFT LoRA r=10": Method("lora", {}, "PEFT's LoRA, alpha/sqrt(r)"),
    "PEFT LoRA r=4": Method("lora", {"r": 4}, "the same with less than half the parameters"),
    "PEFT LoRA r=10, alpha/r": Method("lora", {"use_rslora": False}, "PEFT's LoRA with its default scaling"),
    "Multi-LoRA": Method("multi_lora", {}, "the mean of several LoRAs, each with its own A"),
    "LoRA-MoE": Method("moe_lora", {}, "LoRAs mixed by a router, two of them for each token"),
    "HydraLoRA": Method("hydra", {}, "one A, heads B from zero, a router"),
    "MTL-LoRA": Method(
        "mtl_lora", {}, "one A, and learned head weights for each task; without its transformation of A x"
    ),
    "PEFT Lily": Method("lily", {}, "PEFT's Lily: matrices shared between layers"),
    "rlora_trl": Method("rlora", {}, "R-LoRA as in the paper"),
    "rlora_trl, no dropout": Method("rlora", {"head_dropout": 0.0}, "without head dropout, the default"),
    "rlora_trl, zero B": Method("rlora", {"init_weights": "zero_b"}, "B starts at zero"),
    "rlora_trl, zero A": Method("rlora", {"init_weights": "zero_a"}, "A starts at zero"),
}
TRIED = {**IDEAS, **TUNED, **BY_TASK}
# R-LoRA with Table 1 and with initial values of other sizes, without head dropout and with it.
INITIAL = tuple(
    f"{name}{size}"
    for name in ("R-LoRA, no dropout", "R-LoRA")
    for size in ("", ", gamma 256", ", gamma 1024", ", gamma 4096", ", 5 % of the weight")
    if f"{name}{size}" in TRIED
)
METHODS = {**TRIED, **PACKAGED}


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
        run for label, one in IDEAS.items() for run in grid({label: one}, one.rates, cells=IDEA_CELLS, wave=one.wave)
    ]


def packaged() -> list[Run]:
    """The methods of the library and of PEFT on the paper's Setting 1."""
    return grid(PACKAGED, RATES[:4], cells=CELLS[2:3])


def transfer() -> list[Run]:
    """The same, trained on other tasks and scored on BIG-Bench Hard too: at the paper's rate and at a better one."""
    # MTL-LoRA has head weights for the tasks that it was trained on, and none for others.
    methods = {name: one for name, one in PACKAGED.items() if name != "MTL-LoRA"}
    return grid(methods, (RATES[0], RATES[2]), cells=CELLS[:1], transfer="bbh")


def single() -> list[Run]:
    """One task whose answers are generated."""
    names = ("base", "PEFT LoRA r=10", "PEFT LoRA r=4", "HydraLoRA", "rlora_trl", "rlora_trl, no dropout")
    methods = {name: PACKAGED[name] for name in names}
    return grid(methods, (RATES[0], RATES[2]), cells=(("gsm8k", "plenty"),), train_rows=4000, epochs=2)


def by_task() -> list[Run]:
    """Gates that know the task, in all cells."""
    return [run for label, one in BY_TASK.items() for run in grid({label: one}, (2e-4, 5e-4, 1e-3))]


# The suite of one input and many questions: prompts, and the methods with each.
_WORD_METHODS = {**TUNED, **BY_TASK}
# Twelve tasks: somewhat more parameters than the others.
_WORD_METHODS["a LoRA for each task"] = Method(
    "lab", {"r": 1, "heads": 12, "share_a": False, "gate": "own", "init": "zero_b"}, "twelve LoRAs of rank 1"
)
# The library's own router by task at the library's rate, in full and as the rest learns.
_WORD_METHODS["library, by task"] = Method("rlora", {"router": "task", "head_dropout": 0.0, "router_rate": 0.05}, "")
_WORD_METHODS["library, by task, common rate"] = Method("rlora", {"router": "task", "head_dropout": 0.0}, "")
WORDS = {
    "instruction": ("LoRA r=10", "R-LoRA by task, N=5", "ranks by task"),
    "name": ("LoRA r=10",),
    "input": ("LoRA r=10", "R-LoRA, no dropout", "R-LoRA by task, N=5", "ranks by task", "a LoRA for each task"),
}
WORDS["input"] += ("library, by task", "library, by task, common rate")


def word_label(method: str, prompt: str) -> str:
    """The label of a method's runs with a kind of prompt."""
    return f"{method}; {prompt}"


def words() -> list[Run]:
    """One input and many questions: with the question in the prompt, with the task's name, or without."""
    return [
        run
        for prompt, names in WORDS.items()
        for name in names
        for run in grid(
            {word_label(name, prompt): _WORD_METHODS[name]}, RATES[1:], cells=(("words", "plenty"),), prompt=prompt
        )
    ]


def second_model() -> list[Run]:
    """The learning rates of LoRA and R-LoRA on another model, which may need lower ones."""
    names = ("LoRA r=10", "R-LoRA", "R-LoRA, no dropout", "ranks by task, router 0.2")
    return grid({name: METHODS[name] for name in names}, (1e-4, *RATES[:4]))


def batches() -> list[Run]:
    """Smaller and larger batches for LoRA and R-LoRA, each with rates that may suit them."""
    methods = {name: TUNED[name] for name in ("LoRA r=10", "R-LoRA", "R-LoRA, no dropout")}
    return [
        run
        for batch, rates in ((16, (5e-4, 1e-3)), (64, (1e-3, 2e-3)))
        for run in grid(methods, rates, (0, 1, 2), batch=batch)
    ]


# All labels that rows can have.
LABELS = (*METHODS, *(word_label(name, prompt) for prompt, names in WORDS.items() for name in names))

PLANS = {
    "tuning": tuning,
    "second_model": second_model,
    "batches": batches,
    "ideas": ideas,
    "packaged": packaged,
    "transfer": transfer,
    "single": single,
    "by_task": by_task,
    "words": words,
}
