"""
Tables and figures of the balance losses, from the rows that `balance.py` wrote: one for each kind of router in them.

    python benchmarks/balance_report.py             # prints the tables, draws docs/figures/balance-*.png
    python benchmarks/balance_report.py --update    # also writes the tables into docs/routing.md
"""

import argparse
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

from balance import COEFS, LOGGED, Run
from report import HERE, ROOT


BEGIN, END = "<!-- balance:begin -->", "<!-- balance:end -->"
# The palette of Okabe and Ito, which color-blind readers can tell apart.
COLORS = dict(zip(COEFS, ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7"), strict=True))
LABELS = {"none": "no balance loss", "switch": "switch", "importance": "importance", "z": "z"}
LABELS |= {"mutual_information": "mutual information"}
VARIED = ("loss", "coef", "scope", "seed")

# What tells kinds of routers apart, each with a table and a figure of its own.
ROUTER = ("router", "router_init", "router_learning_rate")

Group = tuple[str, float, str]


def read(path: Path, where: dict[str, str]) -> list[dict]:
    """
    The rows of a file whose fields are as in `where`, and differ in nothing but loss, coefficient, scope and seed.

    Raises:
        ValueError: If there are none, if they differ in something else, or if a run is there twice.
    """
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if all(str(row.get(key)) == value for key, value in where.items())]
    if not rows:
        raise ValueError(f"{path} has no rows{f' with {where}' if where else ''}. Run benchmarks/balance.py first.")
    for key in set(Run.__dataclass_fields__) - {*VARIED, *ROUTER}:
        values = {json.dumps(row[key]) for row in rows}
        if len(values) > 1:
            raise ValueError(f"Rows differ in `{key}`: {', '.join(sorted(values))}. Choose with `--where {key}=...`.")
    runs = [tuple(row[key] for key in (*ROUTER, *VARIED)) for row in rows]
    if len(set(runs)) < len(runs):
        twice = next(run for run in runs if runs.count(run) > 1)
        raise ValueError(f"{path} has run {twice} more than once. Remove one.")
    return rows


def groups(rows: list[dict]) -> dict[Group, list[dict]]:
    """Rows by loss, coefficient and scope, in the order of the losses, each by seed."""
    found: dict[Group, list[dict]] = {}
    for row in sorted(rows, key=lambda r: (list(COEFS).index(r["loss"]), r["coef"], r["scope"] != "micro", r["seed"])):
        found.setdefault((row["loss"], row["coef"], row["scope"]), []).append(row)
    return found


def final(rows: list[dict], key: str) -> str:
    """Mean over seeds of what was logged last."""
    values = [row["history"][-1].get(key) for row in rows if row["history"]]
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.3f}" if len(known) == len(rows) else "not logged"


def table(rows: list[dict]) -> str:
    """Accuracy in percent, mean of tasks; the standard deviation is that of a sample of seeds."""
    seeds = sorted({row["seed"] for row in rows})
    names = ["loss", "coef", "scope", "accuracy, %", *(f"seed {seed}" for seed in seeds)]
    names += ["head_load_max at the end", "router_entropy at the end, nats"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for (loss, coef, scope), same in groups(rows).items():
        by_seed = {row["seed"]: 100 * row["mean_accuracy"] for row in same}
        mean = f"{statistics.mean(by_seed.values()):.1f}"
        spread = f" ± {statistics.stdev(by_seed.values()):.1f}" if len(by_seed) > 1 else ""
        cells = [loss, *(["", ""] if loss == "none" else [f"{coef:g}", scope]), mean + spread]
        cells += [f"{by_seed[seed]:.1f}" if seed in by_seed else "" for seed in seeds]
        cells += [final(same, "head_load_max"), final(same, "router_entropy")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def note(rows: list[dict]) -> str:
    """What was trained, device, versions and commands."""
    row = rows[0]
    heads = row["num_heads"]
    scored, trained = sum(row["scored_rows"].values()), sum(row["trained_rows"].values())
    packages = ("torch", "triton", "transformers", "peft", "trl", "rlora_trl")
    machines = dict.fromkeys(
        ", ".join([r["device"], *(f"{name} {r[name]}" for name in packages), r["date"]]) for r in rows
    )
    commands = dict.fromkeys(f"`{r['command']}`" for r in rows)
    return (
        f"{row['model']}, {len(row['tasks'])} tasks ({', '.join(row['tasks'])}), {trained} training rows, "
        f"{scored} test rows, {row['steps']} steps of {row['batch']} rows in micro-batches of {row['micro_batch']}, "
        f"r={row['r']}, N={heads}. Accuracy is the mean of tasks, ± the standard deviation over seeds. Even use of "
        f"the heads is head_load_max {1 / heads:.3f} and router_entropy ln {heads} = {math.log(heads):.3f}.\n\n"
        f"{'; '.join(machines)}. {'; '.join(commands)}"
    )


def replace_block(path: Path, text: str) -> None:
    """Put the generated text between its marks."""
    old = path.read_text()
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if not pattern.search(old):
        raise ValueError(f"{path} has no block between {BEGIN!r} and {END!r}. Add both lines where the table belongs.")
    path.write_text(pattern.sub(lambda _: f"{BEGIN}\n\n{text}\n\n{END}", old))


def label(group: Group, among: list[Group]) -> str:
    """Name of a line: the coefficient, and the scope where the figure has several for that loss."""
    loss, coef, scope = group
    if loss == "none":
        return LABELS[loss]
    several = len({other[2] for other in among if other[0] == loss}) > 1
    return f"{LABELS[loss]}, {coef:g}" + (f", {scope}" if several else "")


def mean_curve(curves: list[dict[int, float]]) -> dict[int, float]:
    """Mean over seeds, at the steps that all have."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {step: statistics.mean(curve[step] for curve in curves) for step in steps}


def draw(rows: list[dict], path: Path) -> None:
    """Load of the busiest head and entropy of the router over training: mean over seeds, thin lines for seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heads = rows[0]["num_heads"]
    panels = {
        "head_load_max": ("load of the busiest head (share)", 1 / heads, "even: 1/N"),
        "router_entropy": ("entropy of the router (nats)", math.log(heads), "even: ln N"),
    }
    columns = 5 if len(groups(rows)) <= 5 else 3
    lines = math.ceil(len(groups(rows)) / columns)  # of the legend
    height = 3.95 + 0.25 * lines
    figure, axes = plt.subplots(1, 2, figsize=(9.5, height))
    for axis, (key, (name, even, even_label)) in zip(axes, panels.items(), strict=True):
        draw_panel(axis, groups(rows), key)
        axis.axhline(even, color="0.55", linewidth=1, linestyle=":", zorder=1)
        below = key == "head_load_max"  # on the side of the line where no curve runs
        axis.annotate(
            even_label,
            (0.02, even),
            xycoords=("axes fraction", "data"),
            xytext=(0, -4 if below else 4),
            textcoords="offset points",
            va="top" if below else "bottom",
            fontsize=8,
            color="0.4",
        )
        axis.margins(y=0.08)
        axis.set(xlabel="training step", ylabel=name)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="0.92", linewidth=0.8)
        axis.set_axisbelow(True)
    handles, labels = axes[0].get_legend_handles_labels()
    seeds = len({row["seed"] for row in rows})
    figure.suptitle(f"{rows[0]['model']}, N={heads} heads; mean of {seeds} seeds (thin: each seed)", fontsize=10)
    figure.tight_layout(rect=(0, 0.25 * lines / height, 1, 1))
    figure.legend(handles, labels, loc="lower center", ncols=columns, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw_panel(axis: Any, found: dict[Group, list[dict]], key: str) -> None:
    """One line for each group, and thin ones for its seeds."""
    styles = {group: index for loss in COEFS for index, group in enumerate(g for g in found if g[0] == loss)}
    for group, same in found.items():
        curves = [{entry["step"]: entry[key] for entry in row["history"] if key in entry} for row in same]
        curves = [curve for curve in curves if curve]
        if not curves:
            continue
        look = {"color": COLORS[group[0]], "linestyle": ("-", "--", "-.", (0, (1, 1)))[styles[group] % 4]}
        if len(curves) > 1:
            for curve in curves:
                axis.plot(curve.keys(), curve.values(), linewidth=0.6, alpha=0.45, **look)
        mean = mean_curve(curves)
        axis.plot(mean.keys(), mean.values(), linewidth=1.9, label=label(group, list(found)), **look)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=HERE / "results" / "balance.jsonl")
    parser.add_argument("--where", nargs="+", default=[], metavar="FIELD=VALUE", help="only rows with these settings")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures", help="folder of the figures")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "routing.md")
    parser.add_argument("--update", action="store_true", help="write the table into the document")
    args = parser.parse_args()
    rows = read(args.rows, dict(condition.split("=", 1) for condition in args.where))
    kinds: dict[tuple, list[dict]] = {}
    for row in rows:
        kinds.setdefault(tuple(row[key] for key in ROUTER), []).append(row)
    parts = []
    for (router, router_init, learning_rate), same in kinds.items():
        rate = f"learning rate {learning_rate:g}" if learning_rate else "same learning rate for all parameters"
        path = args.figures / f"balance-{router_init}.png"
        parts.append(
            f"**`router={router!r}`, `router_init={router_init!r}`, {rate}**\n\n{table(same)}\n\n{note(same)}"
        )
        absent = [key for key in LOGGED if not any(key in entry for row in same for entry in row["history"])]
        if absent:
            print(f"Not logged by these runs: {', '.join(absent)}.")
        if not {"head_load_max", "router_entropy"} & set(absent):
            draw(same, path)
            alt = f"Load of the busiest head and entropy of the router, router_init {router_init}"
            parts.append(f"![{alt}](figures/{path.name})")
    text = "\n\n".join(parts)
    print(text)
    if args.update:
        replace_block(args.document, text)


if __name__ == "__main__":
    main()
