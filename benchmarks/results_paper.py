"""The paper's tables in docs/results.md, from the rows of `quality.py`: methods as their packages have them."""

import math
import statistics
from collections.abc import Sequence
from itertools import product

from quality_data import SUITES
from quality_intervals import Estimate, at_settings, compare, differences
from quality_plans import PACKAGED
from quality_report import parameters, setting_text, table
from quality_rows import Cell, Row
from results_lines import PAPER_SETTING, Line, Study, lines_of, seeds_text
from results_tables import NOT_MEASURED, number


PACKAGED_REFERENCE = "PEFT LoRA r=10"


def setting_1_block(study: Study, cell: Cell = ("setting1", "plenty")) -> str:
    """Setting 1 by task, as Table 2: at the paper's learning rate, and each tuned."""
    parts = []
    for tuned in (False, True):
        lines = lines_of(study, PACKAGED, PACKAGED_REFERENCE, tuned=tuned, cells=[cell])
        if tuned:
            lines = [line for line in lines if _is_tuned(line, cell)]
        if lines:
            rate = "each at its best learning rate" if tuned else f"all at learning rate {setting_text(PAPER_SETTING)}"
            parts += [f"Setting 1, {cell[1]}, {rate}: accuracy in %.", _by_task(lines, cell)]
    return "\n\n".join(parts) or NOT_MEASURED


def _is_tuned(line: Line, cell: Cell) -> bool:
    """Whether there was something to choose from; what is not trained has one setting."""
    return len(line.method.settings(cell)) >= 3 or line.settings[cell][0] == 0.0


def _by_task(lines: Sequence[Line], cell: Cell) -> str:
    head = ["method", *SUITES[cell[0]], "mean", "parameters, M", "learning rate", "seeds", "similarity of heads"]
    body = []
    for line in lines:
        rows, setting = line.method.runs(cell, line.settings[cell], line.seeds), line.settings[cell]
        means = [statistics.mean(row["accuracy"][task] for row in rows) for task in SUITES[cell[0]]]
        is_reference = line.method.name == PACKAGED_REFERENCE
        difference = "" if is_reference or cell not in line.each else str(line.each[cell])
        trained = setting[0] > 0
        shown = [parameters(line.method) if trained else "", setting_text(setting) if trained else ""]
        tasks = [f"{mean:.1f}" for mean in means]
        facts = [*shown, seeds_text(line.seeds), _similarity(rows), difference]
        body.append([line.method.name, *tasks, number(line.accuracy(cell)), *facts])
    return table([*head, f"difference from {PACKAGED_REFERENCE}"], body)


def _similarity(rows: Sequence[Row]) -> str:
    """The mean cosine between heads, of methods that have several."""
    found = [row["head_similarity"] for row in rows if row.get("head_similarity") is not None]
    return number(statistics.mean(found)) if found else ""


# R-LoRA, also with heads from zero, and methods of the paper's comparison that have a smaller scale.
_OURS = ("rlora_trl, no dropout", "rlora_trl", "rlora_trl, zero B")
_THEIRS = ("HydraLoRA", "PEFT LoRA r=10, alpha/r")


def same_rate_block(study: Study) -> str:
    """R-LoRA less the paper's other methods, both at each learning rate, in the cells that have both."""
    lines = []
    for ours, theirs in product(_OURS, _THEIRS):
        each = {cell: _difference(study, ours, theirs, [cell]) for cell in study.cells}
        cells = [cell for cell, found in each.items() if found]
        lines += [(ours, theirs, ", ".join(cell), each[cell]) for cell in cells]
        if len(cells) > 1:
            lines.append((ours, theirs, "mean", _difference(study, ours, theirs, cells)))
    if not lines:
        return NOT_MEASURED
    rates = sorted({rate for *_, found in lines for rate in found})
    body = [[*names, *(str(found.get(rate, "")) for rate in rates)] for *names, found in lines]
    head = ["method", "less", "cell", *(f"{rate:g}" for rate in rates)]
    return f"Differences in points, both at the same learning rate, by that rate.\n\n{table(head, body)}"


def _difference(study: Study, ours: str, theirs: str, cells: Sequence[Cell]) -> dict[float, Estimate]:
    """By learning rate, the mean over the cells; only rates that both have in all of them."""
    if not {ours, theirs} <= set(study.methods):
        return {}
    mine, other = study.methods[ours], study.methods[theirs]
    found = {}
    for rate in sorted({rate for cell in cells for rate, _ in mine.settings(cell)}):
        here = dict.fromkeys(cells, (rate, PAPER_SETTING[1]))
        _, mean = at_settings(mine, here, other, here)
        if mean is not None:
            found[rate] = mean
    return found


def transfer_block(study: Study) -> str:
    """Means over the tasks of BIG-Bench Hard after training on others, as Table 3."""
    found = [{**row, **row["transferred"]} for row in study.rows if "transferred" in row]
    return _by_rate(found, "Mean accuracy over the tasks of BIG-Bench Hard in %, by learning rate", reference="base")


def single_block(study: Study, suite: str = "gsm8k") -> str:
    """One task whose answers are generated, as Table 6."""
    found = [row for row in study.rows if row["suite"] == suite]
    return _by_rate(found, "Answers with the right number in %, by learning rate")


def _by_rate(rows: Sequence[Row], text: str, reference: str = PACKAGED_REFERENCE) -> str:
    """The methods of packages at each learning rate, mean over seeds, and the differences from one of them."""
    by_method = {name: [row for row in rows if row["name"] == name] for name in PACKAGED}
    by_method = {name: found for name, found in by_method.items() if found}
    rates = sorted({row["learning_rate"] for row in rows if row["learning_rate"] > 0})
    if not rates:
        return NOT_MEASURED
    body = []
    for name, found in by_method.items():
        others = [] if name == reference else by_method.get(reference, [])
        sizes = sorted({row["trainable"] for row in found})
        line = [name, f"{sizes[0] / 1e6:.2f}" if sizes[0] else ""]
        for rate in rates:
            at_rate = [row for row in found if row["learning_rate"] in (rate, 0.0)]
            mean = number(statistics.mean(row["mean_accuracy"] for row in at_rate)) if at_rate else ""
            line.append(
                f"{mean} ± {_standard_error(at_rate[0]):.2f}{_apart(at_rate, others, rate)}" if at_rate else ""
            )
        body.append(line)
    head = ["method", "parameters, M", *(f"{rate:g}" for rate in rates)]
    below = f"below the difference from {reference} at that rate in points, paired by test row"
    return f"{text}, with the standard error by test rows; {below}.\n\n{table(head, body)}"


def _apart(ours: Sequence[Row], others: Sequence[Row], rate: float) -> str:
    """The difference from another method at a learning rate with its interval, on a line of its own."""
    other = [row for row in others if row["learning_rate"] in (rate, 0.0)]
    suite = ours[0].get("transfer") or ours[0]["suite"]
    _, mean = compare({(suite, ""): differences(ours, other)})
    return f"<br>{mean}" if mean is not None else ""


def _standard_error(row: Row) -> float:
    """Of the mean over tasks, in points: tasks are fixed, their test rows are a sample."""
    shares = [(row["accuracy"][task] / 100, count) for task, count in row["scored_rows"].items()]
    return 100 * math.sqrt(sum(p * (1 - p) / n for p, n in shares)) / len(shares)
