"""Tables and plot of the measurements, and their ratios against the bars, from the raw rows in `results/`.

    python benchmarks/report.py                 # prints the tables
    python benchmarks/report.py --bars          # prints the bars
    python benchmarks/report.py --update        # writes the tables into the documents, and draws the plot

Ratios are made of rows of one run. Where several runs measured the same thing, the one with the most rows counts, and
of equals the newest.
"""

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


HERE = Path(__file__).parent
ROOT = HERE.parent
BEGIN, END = "<!-- {name}: written by benchmarks/report.py -->", "<!-- end of {name} -->"
Row = dict[str, Any]

FLOOR, LORA, LORA_DROPOUT, LORA_16 = (
    "frozen base (floor)",
    "PEFT LoRA r=10",
    "PEFT LoRA r=10, dropout 0.2",
    "PEFT LoRA r=10, 16-bit adapter",
)
OURS = "rlora_trl N=3 r=4"
MAIN_SHAPE = "qwen2.5-3b"
# Of ours, what the short table shows.
SHORT = ((3, 4), (5, 4), (10, 4), (10, 16))


def read(name: str) -> list[Row]:
    """The rows of a file in `results/`."""
    path = HERE / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def chosen(rows: list[Row], **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def by_run(rows: list[Row]) -> list[list[Row]]:
    """Rows of the same run together; the run with the most rows first, of equals the newest."""
    runs: dict[tuple, list[Row]] = {}
    for row in rows:
        runs.setdefault((row.get("started"), row["command"]), []).append(row)
    newest_first = list(runs.values())[::-1]
    return sorted(newest_first, key=len, reverse=True)  # equals stay in order


def whole_models(rows: list[Row], shape: str, base: str, setting: str) -> list[Row]:
    """Training steps of one shape in one setting, at its full depth and not compiled."""
    found = [r for r in chosen(rows, shape=shape, base=base, setting=setting) if not _compiled(r)]
    deepest = max((row.get("layers") or 0 for row in found), default=0)
    return [row for row in found if (row.get("layers") or deepest) == deepest]


def _compiled(row: Row) -> bool:
    return row.get("family", "").endswith("_compiled")


def _bold(row: Row) -> str:
    return f"**{row['variant']}**" if row.get("family", "").startswith("ours") else row["variant"]


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if value and base else ""


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


# Training steps


def train_table(rows: list[Row], shape: str, base: str, setting: str, short: bool = False) -> str:
    """Step time, its ratios to the floor and to LoRA without dropout of the same run, and memory."""
    lines: dict[str, list[str]] = {}
    for run in by_run(whole_models(rows, shape, base, setting)):
        times = {row["variant"]: row.get("median_ms") for row in run}
        for row in run:
            sizes = (row.get("num_heads"), row.get("r"))
            if row["variant"] in lines or (short and row.get("family") == "ours" and sizes not in SHORT):
                continue
            if row.get("median_ms") is None:
                lines[row["variant"]] = [_bold(row), row.get("error", "out of memory"), "", "", "", "", ""]
                continue
            ms = row["median_ms"]
            activations = f"{row['activation_gib']:.1f}" if "activation_gib" in row else ""
            lines[row["variant"]] = [
                _bold(row),
                f"{ms:.0f}",
                f"{row['min_ms']:.0f}",
                _ratio(ms, times.get(FLOOR)),
                _ratio(ms, times.get(LORA)),
                f"{row['peak_gib']:.1f}",
                activations,
            ]
    head = ["form", "ms/step", "min ms", "vs. floor", "vs. LoRA", "peak GiB", "activations GiB"]
    return _table(head, list(lines.values()))


def compiled_table(rows: list[Row]) -> str:
    """Steps of the whole model under `torch.compile`, beside the same without it."""
    lines = []
    for run in by_run([row for row in rows if row.get("median_ms")]):
        times = {(row["variant"], row["setting"]): row["median_ms"] for row in run}
        for row in run:
            if not _compiled(row):
                continue
            setting, ms = row["setting"], row["median_ms"]
            eager = times.get((row["variant"].removesuffix(", compiled"), setting))
            name = row["variant"].removesuffix(", compiled")
            model = f"{row['shape']}, {row['layers']} layers, {setting}"
            floor = times.get((f"{FLOOR}, compiled", setting))
            cells = [model, name, f"{eager:.0f}" if eager else "", f"{ms:.0f}", _ratio(ms, eager), _ratio(ms, floor)]
            lines.append(cells)
    head = ["model", "form", "ms/step", "compiled ms/step", "compiled vs. eager", "vs. compiled floor"]
    return _table(head, lines) if lines else ""


def runs_table(rows: list[Row], setting: str) -> str:
    """The same forms in each run of one setting of the 3B shape: host-bound times vary from run to run."""
    lines = []
    runs = by_run(whole_models(rows, MAIN_SHAPE, "bfloat16", setting))
    for run in sorted(runs, key=lambda run: run[0].get("started") or ""):
        times = {row["variant"]: row for row in run if row.get("median_ms")}
        if not {FLOOR, LORA, OURS} <= set(times):
            continue
        floor, lora, mine = (times[name]["median_ms"] for name in (FLOOR, LORA, OURS))
        fastest = _ratio(times[OURS]["min_ms"], times[FLOOR]["min_ms"])
        cells = [f"{floor:.0f}", f"{lora:.0f}", f"{mine:.0f}", _ratio(mine, floor), fastest, _ratio(mine, lora)]
        lines.append([str(run[0].get("started")).replace("T", " ")[:16], *cells])
    head = ["run", "floor ms", "LoRA ms", "rlora_trl ms", "vs. floor", "vs. floor, min", "vs. LoRA"]
    return _table(head, lines) if len(lines) > 1 else ""


def growth_run(rows: list[Row]) -> list[Row]:
    """The rows of forms that were measured at several depths of one shape, the last of each; times, not ratios."""
    rows = chosen(rows, shape=MAIN_SHAPE, base="bfloat16", setting="8x2048")
    timed = [row for row in rows if row.get("median_ms") and row.get("started") and not _compiled(row)]
    last = {(row["variant"], row["layers"]): row for row in timed}
    return [row for row in last.values() if sum(name == row["variant"] for name, _ in last) > 1]


def growth_table(rows: list[Row]) -> str:
    """Step time by layers."""
    run = growth_run(rows)
    depths = sorted({row["layers"] for row in run})
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in run):
        times = {row["layers"]: row["median_ms"] for row in run if row["variant"] == variant}
        lines.append([variant, *(f"{times[depth]:.0f}" if depth in times else "" for depth in depths)])
    return _table(["form, ms/step", *(f"{depth} layers" for depth in depths)], lines) if lines else ""


# One layer, decoding, the host, a CPU


def layer_table(rows: list[Row], name: str, value: str = "forward_backward_ms") -> str:
    """One layer's time (forward and backward) or memory by form and tokens."""
    known = [row for row in rows if row.get("layer", "gate_proj") == name and row.get(value) is not None]
    tokens = sorted({row["tokens"] for row in known})
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in known):
        found = {row["tokens"]: row[value] for run in reversed(by_run(chosen(known, variant=variant))) for row in run}
        cells = [f"{found[count]:.3g}" if count in found else "" for count in tokens]
        lines.append([_bold(next(row for row in known if row["variant"] == variant)), *cells])
    return _table(["form", *(f"{count} tokens" for count in tokens)], lines) if lines else ""


def decode_table(rows: list[Row]) -> str:
    """Milliseconds and tokens per second of a decoding step."""
    lines = []
    for run in by_run([row for row in rows if row.get("median_ms") and row["family"] != "floor"]):
        times = {(row["variant"], row["batch"]): row["median_ms"] for row in run}
        for row in run:
            ms = row["median_ms"]
            ratio = _ratio(ms, times.get((LORA, row["batch"])))
            speed = f"{row['tokens_per_second']:.0f}"
            lines.append([_bold(row), row.get("base", "bfloat16"), str(row["batch"]), f"{ms:.1f}", speed, ratio])
    return _table(["form", "base", "batch", "ms/token", "tokens/s", "vs. LoRA"], lines)


def host_table(rows: list[Row]) -> str:
    """Host time to issue a call of one layer."""
    lines = []
    for row in rows:
        both = row["forward_us"] + row["backward_us"]
        lines.append([_bold(row), f"{row['forward_us']:.0f}", f"{row['backward_us']:.0f}", f"{both:.0f}"])
    return _table(["form", "forward us", "backward us", "total us"], lines) if lines else ""


def cpu_table(rows: list[Row]) -> str:
    """Milliseconds on a CPU, and ratios to the loop and to LoRA of the same run."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        run = by_run([row for row in chosen(rows, case=case) if row["median_ms"]])[0]
        times = {row["variant"]: row["median_ms"] for row in run}
        for row in run:
            ms, loop = row["median_ms"], times.get("R-LoRA loop N=3 r=4")
            lines.append([case, _bold(row), f"{ms:.1f}", _ratio(ms, loop), _ratio(ms, times.get(LORA))])
    return _table(["case", "form", "ms", "vs. R-LoRA loop", "vs. LoRA"], lines)


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
    A ratio of two rows of one run, and its limit.

    Args:
        name (`str`): What is compared.
        value (`float`, *optional*): The ratio; `None` where a row is missing.
        limit (`float`, *optional*): Without one it is there for comparison.
        at_least (`bool`): The limit is a lower one.
    """

    name: str
    value: float | None
    limit: float | None
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        if self.value is None or self.limit is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def cells(self) -> list[str]:
        sign = "at least" if self.at_least else "at most"
        limit = "" if self.limit is None else f"{sign} {self.limit:.3g}"
        verdict = {True: "met", False: "**not met**", None: ""}[self.met]
        return [self.name, "not measured" if self.value is None else f"{self.value:.3f}", limit, verdict]


def ratio(rows: list[Row], above: str, below: str, value: str = "median_ms") -> float | None:
    """`value` of the variant `above` over that of `below`, from the first run that has both."""
    for run in by_run(rows):
        found = {row["variant"]: row[value] for row in run if row.get(value)}
        if above in found and below in found:
            return found[above] / found[below]
    return None


def bars(train: list[Row], decode: list[Row], cpu: list[Row], show: Callable[[str], None] | None = print) -> list[Bar]:
    """
    All bars of the project, for the 3B shape: what was measured, the limit, and whether it is met.

    Args:
        train, decode, cpu (`list[dict]`): Rows of `train_step.py`, `decode.py` and `cpu.py`.
        show (`Callable`, *optional*, defaults to `print`): Is given each bar in a line.
    """
    long, short = (whole_models(train, MAIN_SHAPE, "bfloat16", setting) for setting in ("8x2048", "6x512"))
    hydra, loop3, loop5 = "HydraLoRA loop N=3 r=4", "R-LoRA loop N=3 r=4", "R-LoRA loop N=5 r=4"
    found = [
        Bar("8x2048: time / floor", ratio(long, OURS, FLOOR), 1.18),
        Bar("8x2048: time / LoRA with dropout 0.2", ratio(long, OURS, LORA_DROPOUT), 0.90),
        Bar("8x2048: time / LoRA with a 16-bit adapter", ratio(long, OURS, LORA_16), None),
        Bar("6x512: time / floor", ratio(short, OURS, FLOOR), 1.40),
        Bar("6x512: time / LoRA without dropout", ratio(short, OURS, LORA), 1.00),
        Bar("6x512: time / LoRA with a 16-bit adapter", ratio(short, OURS, LORA_16), None),
        Bar("8x2048: R-LoRA loop N=3 / ours N=3, time", ratio(long, loop3, OURS), 2.2, True),
        Bar("8x2048: R-LoRA loop N=5 / ours N=5, time", ratio(long, loop5, "rlora_trl N=5 r=4"), 3.0, True),
        Bar("8x2048: the same with A x once, N=3", ratio(long, f"{loop3}, A x once", OURS), None),
        Bar("8x2048: the same with A x once, N=5", ratio(long, f"{loop5}, A x once", "rlora_trl N=5 r=4"), None),
        Bar("6x512: activations (kept for backward) / HydraLoRA loop", ratio(short, OURS, hydra, "saved_gib"), 1 / 3),
        Bar("6x512: all that a step allocates / HydraLoRA loop", ratio(short, OURS, hydra, "activation_gib"), None),
        Bar("6x512: the same above the floor's / HydraLoRA loop's", _added(short, OURS, hydra), None),
        Bar("6x512: peak memory / LoRA without dropout", ratio(short, OURS, LORA, "peak_gib"), 1.01),
        Bar("8x2048: peak memory / LoRA without dropout", ratio(long, OURS, LORA, "peak_gib"), 1.01),
        Bar("8x2048: N=10 / N=3, time", ratio(long, "rlora_trl N=10 r=4", OURS), 1.03),
    ]
    for setting in ("8x2048", "6x512"):
        rows = whole_models(train, MAIN_SHAPE, "nf4", setting)
        found.append(Bar(f"4-bit base, {setting}: time / LoRA without dropout", ratio(rows, OURS, LORA), 1.00))
        found.append(Bar(f"4-bit base, {setting}: time / LoRA, 16-bit adapter", ratio(rows, OURS, LORA_16), None))
    for batch in (1, 16):
        rows = [row for row in chosen(decode, shape=MAIN_SHAPE, batch=batch) if row.get("base") == "bfloat16"]
        found.append(Bar(f"decoding, batch {batch}: time / LoRA", ratio(rows, OURS, LORA), 1.00))
        found.append(Bar(f"decoding, batch {batch}: time / LoRA, 16-bit adapter", ratio(rows, OURS, LORA_16), None))
    for case in dict.fromkeys(row["case"] for row in cpu):
        rows = chosen(cpu, case=case)
        found.append(Bar(f"CPU, {case}: time / R-LoRA loop", ratio(rows, OURS, loop3), 1.00))
    if show is not None:
        for bar in found:
            name, value, limit, verdict = bar.cells()
            show(f"{name:<62} {value:>12}  {limit:<14} {verdict.strip('*')}")
    return found


def _added(rows: list[Row], above: str, below: str) -> float | None:
    """The ratio of activations beyond the floor's."""
    for run in by_run(rows):
        found = {row["variant"]: row["activation_gib"] for row in run if row.get("activation_gib")}
        if {above, below, FLOOR} <= set(found):
            return (found[above] - found[FLOOR]) / (found[below] - found[FLOOR])
    return None


# The plot

_BLUES = ("#9ecae1", "#4292c6", "#08519c", "#041f47")
_GREY, _ORANGE = "#8c8c8c", "#d9661f"


def draw(train: list[Row], layer: list[Row], path: Path) -> None:
    """How the cost grows with heads, rank and layers (whole models) and tokens (one layer); no panel without rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    long = [r for r in whole_models(train, MAIN_SHAPE, "bfloat16", "8x2048") if r.get("median_ms")]
    run = next((run for run in by_run(long) if any(r["variant"] == FLOOR for r in run)), [])
    mine = [r for r in run if r["family"] == "ours"]
    gate = [r for r in layer if r.get("layer", "gate_proj") == "gate_proj" and r.get("forward_backward_ms")]
    panels: list[Callable[[Any], None]] = []
    if len({r["num_heads"] for r in mine}) > 1:
        panels.append(lambda axis: _draw_ratios(axis, run, "num_heads", "r"))
    if len({r["r"] for r in mine}) > 1:
        panels.append(lambda axis: _draw_ratios(axis, run, "r", "num_heads"))
    if growth_run(train):
        panels.append(lambda axis: _draw_layers(axis, growth_run(train)))
    if len({r["tokens"] for r in gate}) > 1:
        panels.append(lambda axis: _draw_tokens(axis, gate))
    if not panels:
        return
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5.4 * columns, 3.9 * lines), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        panel(axis)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.92")
        axis.set_axisbelow(True)
        axis.title.set_size(10)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.tight_layout(h_pad=2.0, w_pad=2.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_ratios(axis: Any, run: list[Row], across: str, each: str) -> None:
    """Step time over the floor's against heads or rank, a line for each of the other, with LoRA beside it."""
    floor = next(r["median_ms"] for r in run if r["variant"] == FLOOR)
    mine = [r for r in run if r["family"] == "ours"]
    signs = {"num_heads": "N", "r": "r"}
    for color, value in zip(_BLUES, sorted({r[each] for r in mine}), strict=False):
        points = sorted((r[across], r["median_ms"] / floor) for r in mine if r[each] == value)
        axis.plot(*zip(*points, strict=True), marker="o", ms=4, color=color, label=f"rlora_trl, {signs[each]}={value}")
    for name, style in ((LORA, "--"), (LORA_16, ":")):
        for row in chosen(run, variant=name):
            axis.axhline(row["median_ms"] / floor, color=_GREY, ls=style, lw=1.4, label=name)
    if across == "num_heads":
        for family, mark, label in (
            ("rlora_loop", "s", "R-LoRA loop, r=4"),
            ("hydra_loop", "D", "HydraLoRA loop, r=4"),
        ):
            points = sorted((r["num_heads"], r["median_ms"] / floor) for r in run if r["family"] == family)
            if points:
                axis.plot(*zip(*points, strict=True), marker=mark, ms=5, lw=1, color=_ORANGE, label=label)
    values = sorted({r[across] for r in mine})
    axis.set(
        xticks=values,
        xlabel={"num_heads": "heads N", "r": "rank r of a head"}[across],
        ylabel="step time / frozen base",
        title=f"Whole 3B model by {'heads' if across == 'num_heads' else 'rank'}, 8 x 2048 tokens",
    )
    # Room for the legend above the lines.
    axis.set_ylim(1.0, 1.0 + 1.35 * (axis.get_ylim()[1] - 1.0))
    axis.legend(fontsize=7.5, frameon=False, ncols=2, loc="upper left")


def _draw_layers(axis: Any, run: list[Row]) -> None:
    """Step time against layers."""
    colors = {FLOOR: "0.2", LORA: _GREY, LORA_16: _GREY, OURS: _BLUES[2]}
    for variant in dict.fromkeys(row["variant"] for row in run):
        points = sorted((r["layers"], r["median_ms"]) for r in run if r["variant"] == variant)
        style = {LORA_16: ":", LORA: "--"}.get(variant, "-")
        axis.plot(*zip(*points, strict=True), marker="o", ms=4, ls=style, color=colors.get(variant), label=variant)
    row = run[0]
    axis.set(
        xticks=sorted({r["layers"] for r in run}),
        xlabel="layers",
        ylabel="ms/step",
        title=f"Whole model by layers, 3B sizes, {row['setting'].replace('x', ' x ')} tokens",
    )
    axis.set_xlim(0, None)
    axis.set_ylim(0, None)
    axis.legend(fontsize=7.5, frameon=False)


def _draw_tokens(axis: Any, rows: list[Row]) -> None:
    """One layer's time against tokens."""
    styles = {FLOOR: ("0.2", "-"), LORA: (_GREY, "--"), LORA_16: (_GREY, ":"), OURS: (_BLUES[2], "-")}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        same = chosen(rows, variant=variant)
        points = sorted({row["tokens"]: row["forward_backward_ms"] for row in same}.items())
        if len(points) > 1:
            color, style = styles.get(variant, (_ORANGE, "-"))
            axis.plot(*zip(*points, strict=True), marker="o", ms=4, color=color, ls=style, label=variant)
    axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms, forward and backward")
    tokens = sorted({row["tokens"] for row in rows})
    axis.set_xticks(tokens, [f"{count:,}" for count in tokens])
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_title(f"One layer, {rows[0]['d_in']} to {rows[0]['d_out']}, by tokens")
    axis.legend(fontsize=7.5, frameon=False)


# The documents


def replace_block(path: Path, name: str, text: str) -> None:
    """Put a generated block between its marks."""
    begin, end = BEGIN.format(name=name), END.format(name=name)
    old = path.read_text()
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(old):
        raise ValueError(f"{path} has no block between {begin!r} and {end!r}. Add both lines where the table belongs.")
    path.write_text(pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", old))


def sections(train: list[Row], layer: list[Row], decode: list[Row], hosts: list[Row], cpu: list[Row]) -> str:
    """All tables, each under a heading; what has no rows is left out."""
    found: list[tuple[str, str]] = []
    for shape, base, setting in dict.fromkeys((r["shape"], r.get("base"), r["setting"]) for r in train):
        # A setting of which only compiled rows or other depths are known has no table of its own.
        if base is not None and any(r["variant"] == FLOOR for r in whole_models(train, shape, base, setting)):
            found.append((f"{shape}, {base} base, {setting}", train_table(train, shape, base, setting)))
            if (shape, base, setting) == (MAIN_SHAPE, "bfloat16", "6x512"):
                found.append((f"{shape}, {base} base, {setting}, by run", runs_table(train, setting)))
    found.append(("Growth with layers, 3B sizes, 8x2048", growth_table(train)))
    found.append(("`torch.compile` of the whole model", compiled_table(train)))
    found.append(("Host time per call of one layer", host_table(hosts)))
    for name in dict.fromkeys(row.get("layer", "gate_proj") for row in layer):
        sizes = next(r for r in layer if r.get("layer", "gate_proj") == name)
        title = f"One layer, {sizes['d_in']} to {sizes['d_out']}, bfloat16"
        found.append((f"{title}: forward and backward ms", layer_table(layer, name)))
        found.append((f"{title}: memory beyond inputs and weights, MiB", layer_table(layer, name, "peak_mib")))
    found.append(("Decoding, qwen2.5-3b", decode_table(decode) if decode else ""))
    if cpu:
        found.append((f"On a CPU ({cpu[-1]['processor']}), float32", cpu_table(cpu)))
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in found if text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write into the documents and draw the plot")
    parser.add_argument("--bars", action="store_true", help="print the ratios and whether they meet the bars")
    args = parser.parse_args()
    train, layer, decode, cpu = (read(name) for name in ("train_step", "layer", "decode", "cpu"))
    if args.bars:
        bars(train, decode, cpu)
        return
    long = whole_models(train, MAIN_SHAPE, "bfloat16", "8x2048")
    note = f"{machine(long)}; Qwen2.5-3B shape, bfloat16, gate/up/down, 8 x 2048 tokens with checkpointing."
    short = f"{train_table(train, MAIN_SHAPE, 'bfloat16', '8x2048', short=True)}\n\n{note}"
    full = f"{machine(train)}\n\n" + sections(train, layer, decode, read("host"), cpu)
    print(full)
    if args.update:
        replace_block(ROOT / "README.md", "step times", short)
        replace_block(ROOT / "docs" / "performance.md", "all tables", full)
        draw(train, layer, ROOT / "docs" / "figures" / "cost.png")


if __name__ == "__main__":
    main()
