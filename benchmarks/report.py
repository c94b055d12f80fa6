"""Tables and figure of docs/performance.md, and the ratios against the bars, from the raw rows in `results/`.

    python benchmarks/report.py                 # prints the tables
    python benchmarks/report.py --bars          # prints the bars
    python benchmarks/report.py --update        # writes the tables into the documents, and draws the figure

Rows are those of the newest day on which training steps were measured, and of one kind of card. Ratios are made of
rows of one run. Where several runs of that day measured the same thing, the one with the most rows counts, and of
equals the newest. What was not measured that day is left out.
"""

import argparse
import json
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from large_report import find, latest


HERE = Path(__file__).parent
ROOT = HERE.parent
BEGIN, END = "<!-- {name}: written by benchmarks/{script} -->", "<!-- end of {name} -->"
Row = dict[str, Any]

FLOOR, LORA, LORA_16 = "frozen base (floor)", "PEFT LoRA r=10", "PEFT LoRA r=10, 16-bit adapter"
OURS, TASK, UNIFORM = "rlora_trl N=3 r=4", "rlora_trl N=3 r=4, task router", "rlora_trl N=1 r=10, uniform"
AXOLOTL, UNSLOTH = "axolotl LoRA r=10, 16-bit adapter", "Unsloth LoRA r=10, 16-bit adapter"
MAIN_SHAPE = "qwen2.5-3b"
SHORT, LONG = ("2x512", "1x2048", "6x512"), "8x2048"
# Families in the order of the tables.
_LORA = ("floor", "lora", "lora_16bit", "axolotl", "unsloth")
_LOOPS = ("hydra_loop", "rlora_loop", "rlora_loop_a_once")
_OURS = ("ours", "ours_task", "ours_uniform")
_ORDER = (*_LORA, *_LOOPS, *_OURS)
# Files of `results/` whose rows come from a GPU.
ON_A_GPU = ("train_step", "decode", "experts", "host", "large", "time_to_loss", "trainer_overhead")


# Rows


def read(name: str) -> list[Row]:
    """The rows of a file in `results/`."""
    path = HERE / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def chosen(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def of_one_day(files: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The rows of the newest day of training steps, on the card that most of that day's steps ran on."""
    steps = files["train_step"]
    newest = max((row["date"] for row in steps), default=None)
    cards = Counter(row["device"] for row in chosen(steps, date=newest))
    device = cards.most_common(1)[0][0] if cards else None
    return {name: chosen(rows, date=newest, device=device) for name, rows in files.items()}


def by_run(rows: list[Row]) -> list[list[Row]]:
    """Rows of the same run together; the run with the most rows first, of equals the newest."""
    runs: dict[tuple, list[Row]] = {}
    for row in rows:
        runs.setdefault((row.get("started"), row["command"]), []).append(row)
    newest_first = list(runs.values())[::-1]
    return sorted(newest_first, key=len, reverse=True)  # equals stay in order


def steps_of(
    rows: list[Row],
    setting: str,
    shape: str = MAIN_SHAPE,
    base: str = "bfloat16",
    busy: bool = False,
    liger: bool = False,
) -> list[Row]:
    """Training steps of one setting, at the model's full depth and not compiled."""
    found = [row for row in chosen(rows, shape=shape, base=base, setting=setting) if not _compiled(row)]
    found = [row for row in found if bool(row.get("busy")) == busy and bool(row.get("liger")) == liger]
    deepest = max((row["layers"] for row in found), default=0)
    return [row for row in found if row["layers"] == deepest]


def _compiled(row: Row) -> bool:
    return row.get("family", "").endswith(("_compiled", "_graphs"))


def _bold(row: Row) -> str:
    return f"**{row['variant']}**" if row.get("family", "").startswith("ours") else row["variant"]


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value and base else ""


def _table(head: list[str], lines: list[list[str]]) -> str:
    """A table; empty without lines."""
    rows = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows) if lines else ""


# Training steps


class Column(NamedTuple):
    """A column of a table of steps: its title, and the rows that it may show."""

    title: str
    rows: list[Row]


class Cell(NamedTuple):
    """What a column shows of a variant: its row, and the floor's time in the same run."""

    row: Row
    floor: float | None

    def text(self) -> str:
        """Median, ninth decile, and the median over the floor's."""
        if self.row.get("median_ms") is None:
            return "out of memory" if self.row.get("error") == "out of memory" else ""
        median = self.row["median_ms"]
        p90 = f" / {self.row['p90_ms']:.0f}" if "p90_ms" in self.row else ""
        return f"{median:.0f}{p90} ({_ratio(median, self.floor)})" if self.floor else f"{median:.0f}{p90}"


def cells_of(rows: list[Row]) -> dict[str, Cell]:
    """What is shown of each variant: from the first run that has it."""
    cells: dict[str, Cell] = {}
    for run in by_run(rows):
        floor = next((row.get("median_ms") for row in run if row["variant"] == FLOOR), None)
        for row in run:
            cells.setdefault(row["variant"], Cell(row, floor))
    return cells


def steps_table(columns: list[Column], keep: Callable[[Row], bool] = lambda row: True, memory: bool = False) -> str:
    """
    Variants by columns, and below what failed for another reason than memory; empty without rows.

    Args:
        columns (`list[Column]`): Those without rows are left out.
        keep (`Callable`, *optional*): Which rows are shown.
        memory (`bool`, *optional*, defaults to `False`): A last column with the peak memory of the last one.
    """
    columns = [Column(title, [row for row in rows if keep(row)]) for title, rows in columns]
    columns = [column for column in columns if any(row.get("median_ms") for row in column.rows)]
    if not columns:
        return ""
    found = [cells_of(column.rows) for column in columns]
    unsorted = {name: cell.row for cells in found for name, cell in cells.items()}
    known = dict(sorted(unsorted.items(), key=lambda item: _ORDER.index(item[1]["family"])))

    lines, failures = [], {}
    for name, row in known.items():
        shown = [cells[name].text() if name in cells else "" for cells in found]
        if not any(shown):
            failures[name] = row["error"]
            continue
        if memory:
            peak = found[-1][name].row.get("peak_gib") if name in found[-1] else None
            shown.append(f"{peak:.1f}" if peak else "")
        lines.append([_bold(row), *shown])
    head = ["form", *(column.title for column in columns), *(["GiB"] if memory else [])]
    notes = [f"Not measured: {name} ({error})." for name, error in failures.items()]
    return "\n\n".join([_table(head, lines), *notes])


def is_usual(row: Row) -> bool:
    """Forms of the main tables; of ours, three heads of rank 4 and ten of rank 16."""
    return row["family"] not in _OURS or (row.get("num_heads"), row.get("r")) in (
        (3, 4),
        (10, 16),
        (1, 10),
    )


def _title(setting: str) -> str:
    return setting.replace("x", " x ")


def settings_table(rows: list[Row], families: tuple[str, ...], needed: str | None = None, **options: Any) -> str:
    """Some families by settings of one model; empty where `needed`, one of them, was not measured."""
    columns = [Column(_title(setting), steps_of(rows, setting, **options)) for setting in (*SHORT, LONG)]
    if needed is not None:
        columns = [column for column in columns if chosen(column.rows, family=needed)]
    sizes = {row.get("num_heads") for column in columns for row in column.rows if row["family"] == needed}
    return steps_table(
        columns,
        lambda row: (
            row["family"] in families
            and is_usual(row)
            and (row["family"] != "ours" or needed is None or row.get("num_heads") in sizes)
        ),
    )


def heads_table(rows: list[Row]) -> str:
    """Step time by heads and rank, in long steps of the 3B shape; empty unless all of a grid were measured."""
    run = next(iter(by_run([row for row in steps_of(rows, LONG) if row.get("median_ms")])), [])
    times = {(row["num_heads"], row["r"]): row["median_ms"] for row in chosen(run, family="ours")}
    heads, ranks = (sorted({pair[i] for pair in times}) for i in (0, 1))
    if len(heads) < 2 or len(ranks) < 2 or len(times) < len(heads) * len(ranks):
        return ""
    lines = [[f"{n}", *(f"{times[n, r]:.0f}" if (n, r) in times else "" for r in ranks)] for n in heads]
    return _table(["heads", *(f"r={r}" for r in ranks)], lines)


def experts_table(rows: list[Row]) -> str:
    """Steps of a mixture of experts with adapters on all experts, by setting, at the model's full depth."""
    deepest = max((row["layers"] for row in rows), default=0)
    settings = dict.fromkeys(row["setting"] for row in rows)
    columns = [Column(_title(one), chosen(rows, layers=deepest, setting=one)) for one in settings]
    return steps_table(columns, is_usual, memory=True)


def compiled_table(rows: list[Row]) -> str:
    """Steps of the whole model under `torch.compile`, without and with CUDA graphs, beside the same without it."""
    lines = []
    for run in by_run([row for row in rows if row.get("median_ms")]):
        times = {(row["variant"], row["setting"]): row["median_ms"] for row in run}
        for row in run:
            setting, name = row["setting"], row["variant"]
            compiled, graphs = (times.get((f"{name}, {how}", setting)) for how in ("compiled", "CUDA graphs"))
            if _compiled(row) or not (compiled or graphs):
                continue
            model = f"{row['shape']}, {row['layers']} layers, {_title(setting)}"
            both = [f"{ms:.0f}" if ms else "" for ms in (compiled, graphs)]
            floor = times.get((f"{FLOOR}, CUDA graphs", setting))
            lines.append([model, _bold(row), f"{row['median_ms']:.0f}", *both, _ratio(graphs, floor)])
    head = ["model", "form", "ms/step", "compiled", "with CUDA graphs", "vs. floor with CUDA graphs"]
    return _table(head, lines)


# Several GPUs, decoding, the host, the time to a loss, the trainer, a CPU


def sharded_table(rows: list[Row]) -> str:
    """Steps under ZeRO-3 on several GPUs, LoRA beside ours."""
    lines = []
    rows = [row for row in latest(rows) if row.get("kind") == "step" and row["processes"] > 1]
    for row in chosen(rows, method="ours"):
        lora = find(rows, **{key: row[key] for key in ("case", "processes", "shape", "layers")}, method="lora")
        if "zero3" in row["case"] and row["median_ms"] and lora is not None and lora["median_ms"]:
            base = "4-bit" if row["case"].startswith("nf4") else "bf16"
            model = f"{row['shape']}, {row['layers']} layers, {base}, {row['batch']} x {row['length']} per GPU"
            times = [f"{lora['median_ms']:.0f}", f"{row['median_ms']:.0f}"]
            lines.append([model, str(row["processes"]), *times, _ratio(row["median_ms"], lora["median_ms"])])
    return _table(["model", "GPUs", "LoRA ms/step", "rlora_trl ms/step", "ratio"], lines)


def decode_table(rows: list[Row]) -> str:
    """Milliseconds of a decoding step by base and batch, and ratios to LoRA with a 16-bit adapter of the same run."""
    timed = [row for row in rows if row.get("median_ms") and row["family"] != "floor"]
    cases = list(dict.fromkeys((row.get("base", "bfloat16"), row["batch"]) for row in timed))
    columns = [[row for row in timed if (row.get("base", "bfloat16"), row["batch"]) == case] for case in cases]
    return _by_column([f"{base}, batch {batch}" for base, batch in cases], columns, LORA_16)


def _by_column(titles: list[str], columns: list[list[Row]], beside: str) -> str:
    """Median times of forms by columns, each with its ratio to the form `beside` of its run."""
    shown: dict[str, dict[str, str]] = {}
    for title, rows in zip(titles, columns, strict=True):
        run = by_run(rows)[0]
        base = next((row["median_ms"] for row in run if row["variant"] == beside), None)
        for row in run:
            text = f"{row['median_ms']:.1f} ({_ratio(row['median_ms'], base)})" if base else f"{row['median_ms']:.1f}"
            shown.setdefault(_bold(row), {})[title] = text
    return _table(["form", *titles], [[name, *(cells.get(t, "") for t in titles)] for name, cells in shown.items()])


def host_table(rows: list[Row]) -> str:
    """Host time of a call of an adapted layer, in an MLP block and alone."""
    timed = [row for row in rows if row.get("case") and row["forward_us"]]
    found = {(row["variant"], row["case"]): row for run in reversed(by_run(timed)) for row in run}
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in timed):
        cells = []
        for case in ("mlp", "layer"):
            row = found.get((variant, case))
            cells += [f"{row['forward_us'] + row['backward_us']:.0f}"] if row else [""]
            cells += [f"{row['forward_us']:.0f} + {row['backward_us']:.0f}"] if row else [""]
        lines.append([_bold(chosen(timed, variant=variant)[0]), *cells])
    return _table(["form", "in an MLP, us", "forward + backward", "alone, us", "forward + backward"], lines)


def reached(curve: list[list[float]], loss: float) -> tuple[float, float]:
    """Step and seconds at which a held-out loss was reached, between two measurements by interpolation."""
    (step, seconds, value), *rest = curve
    for next_step, next_seconds, next_value in rest:
        if value <= loss:
            break
        part = min(1.0, (value - loss) / (value - next_value)) if next_value < value else 1.0
        step, seconds = step + part * (next_step - step), seconds + part * (next_seconds - seconds)
        value = value + part * (next_value - value)
    return step, seconds


def time_to_loss_table(rows: list[Row]) -> str:
    """Steps and seconds to the best held-out loss that all forms reach, means over seeds."""
    run = next(iter(by_run(rows)), [])
    seeds = sorted({row["seed"] for row in run})
    best = {(row["variant"], row["seed"]): min(point[2] for point in row["curve"]) for row in run}
    common = {seed: max(loss for (_, other), loss in best.items() if other == seed) for seed in seeds}
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in run):
        same = chosen(run, variant=variant)
        steps, seconds = zip(*(reached(row["curve"], common[row["seed"]]) for row in same), strict=True)
        lowest = statistics.mean(best[variant, row["seed"]] for row in same)
        pace = statistics.mean(1e3 * row["curve"][-1][1] / row["curve"][-1][0] for row in same)
        times = [f"{statistics.mean(steps):.0f}", f"{statistics.mean(seconds):.1f}", f"{pace:.0f}"]
        lines.append([_bold(same[0]), f"{same[0]['learning_rate']:g}", f"{lowest:.4f}", *times])
    if not lines:
        return ""
    loss = statistics.mean(common.values())
    head = ["form", "learning rate", "lowest loss", f"steps to {loss:.4f}", f"seconds to {loss:.4f}", "ms/step"]
    amounts = f"batch {run[0]['batch']}, {len(run[0]['tasks'])} tasks, means over {len(seeds)} seed(s)"
    note = f"Model: {run[0]['model']}; {amounts}; {run[0]['device']}."
    return f"{_table(head, lines)}\n\n{note}"


def trainer_table(rows: list[Row]) -> str:
    """Mean step times of `RLoraSFTTrainer` with and without statistics."""
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        run = by_run(chosen(rows, setting=setting))[0]
        lines += [[_title(setting), row["variant"], f"{row['mean_ms']:.1f}", f"{row['ratio']:.3f}"] for row in run]
    return _table(["setting", "trainer", "ms/step", "ratio"], lines)


def cpu_table(rows: list[Row]) -> str:
    """Milliseconds on a CPU by case, and ratios to LoRA of the same run."""
    timed = [row for row in rows if row["median_ms"]]
    cases = list(dict.fromkeys(row["case"] for row in timed))
    return _by_column(cases, [chosen(timed, case=case) for case in cases], LORA)


def machine(rows: list[Row]) -> str:
    """Device and versions, in one line."""
    row = rows[-1]
    return (
        f"{row['device']}, torch {row['torch']}, triton {row['triton']}, transformers {row['transformers']}, "
        f"peft {row['peft']}, {row['date']}"
    )


# Bars


@dataclass(frozen=True)
class Bar:
    """
    What was measured, and the most that it may be.

    Args:
        name (`str`): What is compared.
        value (`float`, *optional*): The ratio, or microseconds; `None` where a row is missing.
        limit (`float`): The most that it may be.
    """

    name: str
    value: float | None
    limit: float

    @property
    def met(self) -> bool | None:
        return None if self.value is None else self.value <= self.limit

    def line(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:.3f}"
        verdict = {True: "met", False: "not met", None: ""}[self.met]
        return f"{self.name:<62} {value:>12}  at most {self.limit:<6.4g} {verdict}"


def ratio(rows: list[Row], above: str, below: str) -> float | None:
    """The median of the variant `above` over that of `below`, from the first run that has both."""
    for run in by_run(rows):
        found = {row["variant"]: row["median_ms"] for row in run if row.get("median_ms")}
        if above in found and below in found:
            return found[above] / found[below]
    return None


def spread(rows: list[Row], variant: str) -> float | None:
    """The ninth decile over the median, from the first run that has the variant."""
    row = next((row for run in by_run(rows) for row in run if row["variant"] == variant and row.get("p90_ms")), None)
    return None if row is None else row["p90_ms"] / row["median_ms"]


def bars(files: dict[str, list[Row]]) -> list[Bar]:
    """
    All bars of the project's step times.

    Args:
        files (`dict[str, list[dict]]`): Rows of one day and card by name of their file, see [`of_one_day`].
    """
    train = files["train_step"]
    found = []
    for base, variant in (("bfloat16", OURS), ("nf4", OURS), ("bfloat16", TASK)):
        rows = steps_of(train, "6x512", base=base)
        name = f"6x512, {base}{', task router' if variant == TASK else ''}"
        found.append(Bar(f"{name}: time / floor", ratio(rows, variant, FLOOR), 1.20))
        found.append(Bar(f"{name}: time / LoRA with a 16-bit adapter", ratio(rows, variant, LORA_16), 0.95))
        found.append(Bar(f"{name}: ninth decile / median", spread(rows, variant), 1.15))
    found.append(Bar("6x512: task router / softmax", ratio(steps_of(train, "6x512"), TASK, OURS), 1.05))
    for setting in ("2x512", "1x2048"):
        rows = steps_of(train, setting)
        found.append(Bar(f"{setting}: time / LoRA with a 16-bit adapter", ratio(rows, OURS, LORA_16), 1.00))
    found.append(Bar("8x2048, busy host: time / floor", ratio(steps_of(train, LONG, busy=True), OURS, FLOOR), 1.15))

    calls = chosen(files["host"], variant=OURS, case="mlp")
    microseconds = calls[-1]["forward_us"] + calls[-1]["backward_us"] if calls else None
    found.append(Bar("host time of a call in an MLP, us", microseconds, 200))

    limit = 1.07 if any("H200" in row["device"] for row in train) else 1.08
    found.append(Bar("8x2048: time / floor", ratio(steps_of(train, LONG), OURS, FLOOR), limit))
    small = steps_of(train, LONG, shape="qwen2.5-0.5b")
    found.append(Bar("8x2048, 0.5B shape: time / floor", ratio(small, OURS, FLOOR), 1.12))

    sharded = [row for row in latest(files["large"]) if row.get("kind") == "step" and row["processes"] == 2]
    for case in ("bf16-zero3", "nf4-zero3"):
        mine, lora = (find(sharded, case=case, method=method) for method in ("ours", "lora"))
        both = mine is not None and lora is not None and mine["median_ms"] and lora["median_ms"]
        value = mine["median_ms"] / lora["median_ms"] if mine is not None and lora is not None and both else None
        found.append(Bar(f"{case} on two GPUs: time / LoRA", value, 1.00))
    rows = [row for row in chosen(files["decode"], batch=16) if row.get("base") == "bfloat16"]
    found.append(Bar("decoding, batch 16: time / LoRA with a 16-bit adapter", ratio(rows, OURS, LORA_16), 1.00))
    return found


# The figure

_COLORS = {"ours": "#08519c", "others": "#9a9a9a"}
_SHOWN = (LORA, LORA_16, AXOLOTL, UNSLOTH, OURS, TASK, UNIFORM)


def draw(train: list[Row], path: Path) -> None:
    """Step times over the frozen base's, a panel for each setting that was measured; nothing without rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {}
    for setting in (*SHORT, LONG):
        cells = cells_of(steps_of(train, setting))
        known = {name: cells[name] for name in _SHOWN if name in cells}
        ratios = {n: c.row["median_ms"] / c.floor for n, c in known.items() if c.floor and c.row.get("median_ms")}
        if ratios:
            panels[setting] = ratios
    if not panels:
        return
    names = [name for name in _SHOWN if any(name in ratios for ratios in panels.values())][::-1]
    # Two columns: on the pages of the site, a wider figure has letters too small to read.
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    size = (2.0 + 2.9 * columns, 0.4 + lines * (0.55 + 0.26 * len(names)))
    figure, axes = plt.subplots(
        lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (setting, ratios) in zip(axes.flat, panels.items(), strict=False):
        for place, name in enumerate(names):
            if name in ratios:
                color = _COLORS["ours" if name.startswith("rlora_trl") else "others"]
                axis.barh(place, ratios[name] - 1, left=1, color=color, height=0.62)
                axis.text(ratios[name] + 0.01, place, f"{ratios[name]:.2f}", va="center", fontsize=8.5)
        axis.set_title(f"{_title(setting)} tokens", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8.5)
    highest = max(ratio for ratios in panels.values() for ratio in ratios.values())
    axes[0, 0].set_xlim(1, 1 + 1.15 * max(0.1, highest - 1))
    axes[0, 0].set_yticks(range(len(names)), names)
    figure.supxlabel("step time / that of the frozen base, which has no adapter", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


# The documents


def replace_block(path: Path, name: str, text: str, script: str = "report.py") -> None:
    """Put a block that a script generates between its marks."""
    begin, end = BEGIN.format(name=name, script=script), END.format(name=name)
    old = path.read_text()
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(old):
        raise ValueError(f"{path} has no block between {begin!r} and {end!r}. Add both lines where the table belongs.")
    path.write_text(pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", old))


def sections(files: dict[str, list[Row]], cpu: list[Row]) -> str:
    """All tables, each under a heading with a sentence; what has no rows is left out."""
    train = files["train_step"]
    short = [Column(_title(setting), steps_of(train, setting)) for setting in SHORT]
    shapes = ("qwen2.5-0.5b", MAIN_SHAPE, "qwen2.5-7b")
    long = [Column(shape, steps_of(train, LONG, shape=shape)) for shape in shapes]
    usual = (*_LORA, "ours")
    found = [
        (
            "Short steps",
            "Batch x tokens, without gradient checkpointing; the memory is that of the last column.",
            steps_table(short, lambda row: row["family"] in usual and is_usual(row), memory=True),
        ),
        ("Long steps", "8 x 2048 tokens with gradient checkpointing, by shape.", steps_table(long, is_long_form)),
        ("Heads and rank", "ms/step of the 3B shape, 8 x 2048 tokens.", heads_table(train)),
        ("4-bit bases", "NF4 with double quantization.", settings_table(train, usual, base="nf4")),
        (
            "Task router",
            '`router="task"` beside the softmax router; each row has a task.',
            settings_table(train, ("floor", "ours", "ours_task"), needed="ours_task"),
        ),
        (
            "One head as plain LoRA",
            '`num_heads=1, router="uniform"` is a LoRA of the same rank, which merges and exports exactly.',
            settings_table(train, (*_LORA, "ours_uniform"), needed="ours_uniform"),
        ),
        (
            "Experts",
            "A mixture of experts of hidden size 2048 with 64 experts, 8 for each token, as Qwen3-30B-A3B has them; "
            "adapters on all experts, by batch x tokens, with gradient checkpointing. LoRA is PEFT's on the same "
            "parameters (`target_parameters`).",
            experts_table(files["experts"]),
        ),
        (
            "With Liger's kernels",
            "`use_liger_kernel=True`: RMSNorm, SwiGLU and rotary embeddings in the model, under all forms.",
            settings_table(train, (*_LORA, *_OURS), liger=True),
        ),
        (
            "On a busy host",
            "With a spinning process on every second core.",
            settings_table(train, (*_LORA, *_OURS), busy=True),
        ),
        (
            "`torch.compile` of the whole model",
            'With CUDA graphs: `mode="reduce-overhead"`.',
            compiled_table(train),
        ),
        ("ZeRO-3", "Several GPUs, a batch each.", sharded_table(files["large"])),
        (
            "Host time of a call",
            "To issue a call of an adapted layer: one of the three in an MLP block (activation included), or alone.",
            host_table(files["host"]),
        ),
        (
            "Time to the same loss",
            "The lowest held-out loss that all forms reach, on the same batches and with the same choice of learning "
            "rates.",
            # Of any machine: losses don't depend on it.
            time_to_loss_table(files["time_to_loss"] or read("time_to_loss")),
        ),
        (
            "Decoding",
            "ms for a token of each row, from a cache (x LoRA with a 16-bit adapter).",
            decode_table(files["decode"]),
        ),
        ("Statistics of the trainer", "Steps of `RLoraSFTTrainer`.", trainer_table(files["trainer_overhead"])),
        ("On a CPU", f"{cpu[-1]['processor']}, float32: ms (x LoRA)." if cpu else "", cpu_table(cpu)),
    ]
    blocks = [(title, [text, table] if text else [table]) for title, text, table in found if table]
    return "\n\n".join("\n\n".join([f"### {title}", *parts]) for title, parts in blocks)


def is_long_form(row: Row) -> bool:
    """Of the table of long steps, which compares with the published loops too."""
    return row["family"] in (*_LORA, *_LOOPS, "ours") and is_usual(row)


def is_readme_form(row: Row) -> bool:
    """Of the README's table: the base, PEFT's LoRA, the faster of the fused ones, and R-LoRA."""
    sixteen = ("PEFT LoRA r=10, 16-bit adapter", "Unsloth LoRA r=10, 16-bit adapter")
    return row["variant"] in ("frozen base (floor)", "PEFT LoRA r=10", *sixteen, "rlora_trl N=3 r=4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write into the documents and draw the figure")
    parser.add_argument("--bars", action="store_true", help="print the bars and whether they are met")
    args = parser.parse_args()
    files = of_one_day({name: read(name) for name in ON_A_GPU})
    train, cpu = files["train_step"], read("cpu")
    if args.bars:
        print("\n".join(bar.line() for bar in bars(files)))
        return
    if not train:
        parser.error("results/train_step.jsonl has no rows. Run `make bench` first.")
    full = f"{machine(train)}\n\n{sections(files, chosen(cpu, date=max((row['date'] for row in cpu), default=None)))}"
    print(full)
    if args.update:
        columns = [Column(_title(setting), steps_of(train, setting)) for setting in ("6x512", LONG)]
        note = (
            "Milliseconds of a training step, median / ninth decile (times that of the frozen base, through which "
            f"gradients flow), by batch x tokens, and memory; Qwen2.5-3B shape, MLP projections; {machine(train)}."
        )
        short = f"{steps_table(columns, is_readme_form, memory=True)}\n\n{note}"
        replace_block(ROOT / "README.md", "step times", short)
        replace_block(ROOT / "docs" / "performance.md", "all tables", full)
        draw(train, ROOT / "docs" / "figures" / "cost.png")


if __name__ == "__main__":
    main()
