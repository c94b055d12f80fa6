"""Tables of `quality.py`, from the rows that it wrote: each method with its own learning rate, beside tuned LoRA.

    python benchmarks/quality_report.py                           # results/quality.jsonl, best learning rates
    python benchmarks/quality_report.py --rows ROWS --curves      # accuracy at each learning rate too
    python benchmarks/quality_report.py --tune_seeds 0 --test_seeds 1 2 3 4 5

A method is tuned over what its rows vary: learning rate and batch. The rate is chosen on the seeds of `--tune_seeds`
and the accuracies are those of `--test_seeds`, by default all seeds for both; then all methods look better than they
are, those with more settings most. Intervals are of 95 %, by a bootstrap of test rows (within tasks, the same for both
methods, all seeds and both sizes of a suite) and of seeds.
"""

import argparse
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from quality_intervals import Seeds, against
from quality_rows import Cell, Method, Row, Setting, by_model, cells_of, methods_of, read
from report import HERE, replace_block


ROWS = HERE / "results" / "quality.jsonl"
REFERENCE = "LoRA r=10"


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines)])


def in_order(methods: dict[str, Method], reference: str) -> list[Method]:
    """The reference first."""
    return sorted(methods.values(), key=lambda method: method.name != reference)


def setting_text(setting: Setting) -> str:
    rate, batch = setting
    return f"{rate:g}" + (f", batch {batch}" if batch != 32 else "")


def parameters(method: Method) -> str:
    """Trained parameters, in millions."""
    counts = {row["trainable"] for by in method.rows.values() for runs in by.values() for row in runs.values()}
    return " / ".join(dict.fromkeys(f"{count / 1e6:.2f}" for count in sorted(counts)))


def seconds(method: Method) -> str:
    """Seconds of training for a run, the median; of runs side by side their share."""
    shares = [
        row["seconds"].get("train", 0.0) / row["side_by_side"]
        for by_setting in method.rows.values()
        for runs in by_setting.values()
        for row in runs.values()
    ]
    return f"{statistics.median(shares):.1f}"


def tuned_table(methods: dict[str, Method], seeds: Seeds, reference: str = REFERENCE) -> str:
    """Each method at its best setting in each cell, and its difference from the reference at its own."""
    cells = cells_of(methods.values())
    lines = []
    for method in in_order(methods, reference):
        each = against(method, methods[reference], cells, seeds)[0] if reference in methods else {}
        line = [method.name, parameters(method), seconds(method)]
        for cell in cells:
            setting = method.best(cell, seeds.tune)
            mean = None if setting is None else method.mean(cell, setting, seeds.test)
            if setting is None or mean is None:
                line.append("")
                continue
            count = len(method.runs(cell, setting, seeds.test))
            text = f"{mean:.2f} ({setting_text(setting)}; {count} seed{'s' * (count > 1)})"
            line.append(text + (f" {each[cell]}" if cell in each and method.name != reference else ""))
        lines.append(line)
    head = ["method", "parameters, M", "s a run", *(", ".join(cell) for cell in cells)]
    return table(head, lines)


def mean_table(methods: dict[str, Method], seeds: Seeds, reference: str = REFERENCE) -> str:
    """Differences from the reference, tuned for each cell, as means over all cells that the reference has."""
    if reference not in methods:
        return ""
    cells = [cell for cell in cells_of(methods.values()) if cell in methods[reference].rows]
    ranked = []
    for method in methods.values():
        if method.name == reference:
            continue
        shared = [cell for cell in cells if cell in method.rows]
        tuned, fixed = (
            against(method, methods[reference], shared, seeds, one_setting=one)[1] for one in (False, True)
        )
        if tuned is not None:
            setting = method.best_for_all(shared, seeds.tune)
            one = "" if setting is None or fixed is None else f"{fixed} ({setting_text(setting)})"
            line = [method.name, f"{len(shared)} of {len(cells)}", str(tuned.seeds), str(tuned), one]
            ranked.append((len(shared), tuned.value, line))
    lines = [line for _, _, line in sorted(ranked, key=lambda entry: entry[:2], reverse=True)]
    return table(["method", "cells", "seeds", "tuned for each cell", "one setting for all cells"], lines)


def curves_table(methods: dict[str, Method], cell: Cell, reference: str = REFERENCE) -> str:
    """Accuracy by setting in a cell, mean over seeds."""
    columns = sorted({setting for method in methods.values() for setting in method.settings(cell)})
    lines = []
    for method in in_order(methods, reference):
        if cell in method.rows:
            means = [method.mean(cell, setting) for setting in columns]
            best = max(mean for mean in means if mean is not None)
            shown = ["" if m is None else f"**{m:.2f}**" if m == best else f"{m:.2f}" for m in means]
            lines.append([method.name, *shown])
    return table(["method", *map(setting_text, columns)], lines)


def report(rows: list[Row], seeds: Seeds, reference: str = REFERENCE, *, curves: bool = False) -> str:
    """All tables."""
    methods = methods_of(rows)
    parts = [
        f"Mean accuracy over tasks, %. Differences from {reference}, both at their best settings, in points.",
        tuned_table(methods, seeds, reference),
        f"Differences from {reference}, tuned for each cell: means over cells.",
        mean_table(methods, seeds, reference),
    ]
    if curves:
        for cell in cells_of(methods.values()):
            parts += [f"By learning rate: {', '.join(cell)}.", curves_table(methods, cell, reference)]
    return "\n\n".join(part for part in parts if part)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, nargs="+", default=[ROWS])
    parser.add_argument("--reference", default=REFERENCE, help="name of the method to compare with")
    parser.add_argument("--tune_seeds", type=int, nargs="+", help="to choose settings on")
    parser.add_argument("--test_seeds", type=int, nargs="+", help="to compare on")
    parser.add_argument("--curves", action="store_true", help="accuracy at each learning rate too")
    parser.add_argument("--update", type=Path, help="document with a block `quality` to write the tables into")
    args = parser.parse_args(arguments)
    seeds = Seeds(*(None if chosen is None else tuple(chosen) for chosen in (args.tune_seeds, args.test_seeds)))
    rows = read(*args.rows)
    if not rows:
        parser.error(f"{', '.join(map(str, args.rows))}: no rows without an error.")
    models = by_model(rows)
    parts = [(model, report(same, seeds, args.reference, curves=args.curves)) for model, same in models.items()]
    text = "\n\n".join(f"Base model: {model}.\n\n{tables}" if len(models) > 1 else tables for model, tables in parts)
    print(text)
    if args.update is not None:
        replace_block(args.update, "quality", text)


if __name__ == "__main__":
    main()
