"""Tables of docs/results.md, from the rows of `quality.py`."""

import statistics
from collections.abc import Sequence

from quality_intervals import chosen
from quality_plans import BY_TASK, IDEA_CELLS, IDEAS, INITIAL, METHODS, TUNED, WORDS, word_label
from quality_report import REFERENCE, parameters, setting_text, table
from quality_rows import Cell, Row, cells_of
from quality_runs import Run
from results_lines import (
    PAPER_SETTING,
    TUNING_SEEDS,
    Line,
    Study,
    idea_lines,
    is_lora,
    lines_of,
    seeds_text,
    tuned_line,
    with_seeds,
)


# The best of the ideas with one setting for all cells, on the seeds that settings are chosen on.
RECIPE = "ranks by task, router 0.2"
OURS = "R-LoRA"
WORDS_CELL: Cell = ("words", "plenty")
TASK_ROUTER = "library, by task"  # there, the library's own
# Forms of R-LoRA as readers know them: the default first.
FORMS = {"R-LoRA, no dropout": "default", "R-LoRA": "with the paper's head dropout"}
NOT_MEASURED = "Not measured."


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _cell_text(line: Line, cell: Cell, reference: str, with_setting: bool) -> str:
    """Accuracy, its setting, and below the difference from the reference."""
    value = line.accuracy(cell)
    if value is None:
        return ""
    text = number(value) + (f" ({setting_text(line.settings[cell])})" if with_setting else "")
    return text if line.method.name == reference or cell not in line.each else f"{text}<br>{line.each[cell]}"


def _mean_text(line: Line, reference: str) -> str:
    """The mean difference from the reference, of a line that has it."""
    return "" if line.mean is None or line.method.name == reference else str(line.mean)


def _by_cell(lines: Sequence[Line], cells: Sequence[Cell], reference: str, *, with_setting: bool) -> str:
    head = ["method", "parameters, M", "seeds", *(", ".join(cell) for cell in cells), "mean", "mean difference"]
    body = []
    for line in lines:
        shown = [_cell_text(line, cell, reference, with_setting) for cell in cells]
        facts = [line.method.name, parameters(line.method), seeds_text(line.seeds)]
        body.append([*facts, *shown, number(line.mean_accuracy(cells)), _mean_text(line, reference)])
    return table(head, body)


# The blocks of the page


def tuned_block(study: Study) -> str:
    """LoRA and the forms of R-LoRA, each at its best setting in each cell."""
    return _forms_block(
        study,
        f"Mean accuracy over the tasks in % (best learning rate, chosen on {with_seeds(TUNING_SEEDS)}), and "
        f"below the difference from {REFERENCE} at its own best, in points.",
        tuned=True,
    )


def paper_rate_block(study: Study) -> str:
    """The same methods, all at the paper's learning rate."""
    return _forms_block(
        study,
        f"Mean accuracy over the tasks in % at learning rate {setting_text(PAPER_SETTING)}, and below the difference "
        f"from {REFERENCE} at the same rate, in points.",
        tuned=False,
    )


def _forms_block(study: Study, text: str, *, tuned: bool) -> str:
    lines = lines_of(study, TUNED, REFERENCE, tuned=tuned, cells=study.cells)
    return f"{text}\n\n{_by_cell(lines, study.cells, REFERENCE, with_setting=tuned)}" if lines else NOT_MEASURED


def recipe_line(study: Study, label: str) -> Line | None:
    """The recipe, with one setting, beside LoRA tuned for each cell, on seeds that nothing was chosen on."""
    if not {label, REFERENCE} <= set(study.methods):
        return None
    line = tuned_line(study.methods[label], study.methods[REFERENCE], study.cells, one=True)
    return None if set(line.seeds) <= set(TUNING_SEEDS) or line.mean is None else line


def recipe_block(study: Study, label: str = RECIPE) -> str:
    """The recipe beside LoRA, cell by cell; empty without rows of other seeds."""
    one = recipe_line(study, label)
    if one is None:
        return ""
    ours, lora = one.method, study.methods[REFERENCE]
    theirs = chosen(lora, study.cells, TUNING_SEEDS)
    body = []
    for cell in study.cells:
        other = f"{number(lora.mean(cell, theirs[cell], one.seeds))} ({setting_text(theirs[cell])})"
        body.append([", ".join(cell), number(one.accuracy(cell)), other, str(one.each[cell])])
    own = [lora.mean(cell, theirs[cell], one.seeds) for cell in study.cells]
    whole = statistics.mean(value for value in own if value is not None)
    body.append(["mean over cells", number(one.mean_accuracy(study.cells)), number(whole), f"**{one.mean}**"])
    each = tuned_line(ours, lora, study.cells)
    if each.mean is not None and not set(each.seeds) <= set(TUNING_SEEDS):
        body.append(["mean, tuned for each cell too", number(each.mean_accuracy(study.cells)), "", str(each.mean)])
    name = f"`{label}` ({METHODS[label].what})" if label in METHODS else f"`{label}`"
    setting = setting_text(one.settings[study.cells[0]])
    text = (
        f"{name} has one setting for all cells (learning rate {setting}) and "
        f"{parameters(ours)} M parameters; {REFERENCE} has {parameters(lora)} M and its best setting in each cell. "
        f"Settings of both were chosen on {with_seeds(TUNING_SEEDS)}, and the comparison uses "
        f"{with_seeds(one.seeds)}. Accuracy in %, differences in points."
    )
    return f"{text}\n\n{table(['cell', label, REFERENCE, 'difference'], body)}"


def tried_block(study: Study) -> str:
    """All ideas, with what they are and how many settings they were given."""
    lines = idea_lines(study)
    if not lines:
        return NOT_MEASURED
    cells, reference = [cell for cell in IDEA_CELLS if cell in study.cells], study.methods[REFERENCE]
    theirs = chosen(reference, cells, TUNING_SEEDS)
    own = Line(reference, theirs, TUNING_SEEDS, {}, None)
    body = []
    for line in (own, *lines):
        settings = [len(line.method.settings(cell)) for cell in cells if cell in line.settings]
        shown = [_cell_text(line, cell, line.method.name, True) for cell in cells]
        name = line.method.name
        facts = [name, METHODS[name].what, str(max(settings, default=0)), seeds_text(line.seeds)]
        body.append([*facts, *shown, _mean_text(line, REFERENCE)])
    head = ["method", "what it is", "settings tried", "seeds", *(", ".join(cell) for cell in cells), "mean difference"]
    text = (
        f"Accuracy in % (best learning rate), and the mean difference from {REFERENCE} on the same seeds in points. "
        "Settings tried is the number of learning rates in a cell."
    )
    planned = [name for name in IDEAS if name not in study.methods]
    left = f"\n\nPlanned and not run in these cells: {'; '.join(planned)}." if planned else ""
    return f"{text}\n\n{table(head, body)}{left}"


def by_task_block(study: Study) -> str:
    """Gates that know the task of a row, beside LoRA; each at its best setting in each cell."""
    return _described_block(study, BY_TASK)


def initial_block(study: Study) -> str:
    """R-LoRA with initial values of other sizes, likewise."""
    return _described_block(study, INITIAL)


def _described_block(study: Study, names: Sequence[str]) -> str:
    """Methods by cell, and what they are."""
    lines = lines_of(study, names, REFERENCE, tuned=True, cells=study.cells)
    if not lines:
        return NOT_MEASURED
    reference = lines_of(study, [REFERENCE], REFERENCE, tuned=True, cells=study.cells)
    what = "\n".join(f"- {line.method.name}: {METHODS[line.method.name].what}." for line in lines)
    return f"{_by_cell([*reference, *lines], study.cells, REFERENCE, with_setting=True)}\n\n{what}"


def batches_block(rows: Sequence[Row]) -> str:
    """LoRA and R-LoRA with other batches, in the cells that have them, on the seeds that settings are chosen on."""
    usual, body = PAPER_SETTING[1], []
    others = [row for row in rows if row["batch"] != usual]
    if not others:
        return NOT_MEASURED
    model = others[0]["model"]
    cells = Study([row for row in others if row["model"] == model]).cells
    same = [row for row in rows if row["model"] == model and row["seed"] in TUNING_SEEDS]
    for batch in sorted({usual, *(row["batch"] for row in others)}):
        study = Study([row for row in same if row["batch"] == batch])
        shown = [cell for cell in cells if cell in study.cells]
        for line in lines_of(study, [REFERENCE, *FORMS], REFERENCE, tuned=True, cells=shown):
            tried = [str(len(line.method.settings(cell))) for cell in line.settings]
            texts = [_cell_text(line, cell, REFERENCE, True) if cell in shown else "" for cell in cells]
            facts = [str(batch), line.method.name, ", ".join(tried), seeds_text(line.seeds)]
            body.append([*facts, *texts, _mean_text(line, REFERENCE) if shown == cells else ""])
    names = [", ".join(cell) for cell in cells]
    head = ["batch", "method", "learning rates tried", "seeds", *names, "mean difference"]
    text = (
        f"{model}: accuracy in % (best learning rate of that batch), and below the difference from {REFERENCE} with "
        "the same batch, in points."
    )
    return f"{text}\n\n{table(head, body)}"


def question_line(study: Study) -> Line | None:
    """The library's router by task beside LoRA, both with the input alone in the prompt."""
    label = word_label(TASK_ROUTER, "input")
    lines = lines_of(study, [label], word_label(REFERENCE, "input"), tuned=True, cells=[WORDS_CELL])
    return lines[0] if lines else None


def words_block(study: Study) -> str:
    """One input, many questions: by what the prompt says of the question. The reference is LoRA with instructions."""
    reference = word_label(REFERENCE, "instruction")
    body = []
    for prompt, names in WORDS.items():
        by_label = {word_label(name, prompt): name for name in names}
        for line in lines_of(study, by_label, reference, tuned=True, cells=[WORDS_CELL]):
            accuracy, setting = number(line.accuracy(WORDS_CELL)), setting_text(line.settings[WORDS_CELL])
            facts = [parameters(line.method), accuracy, setting, seeds_text(line.seeds), _mean_text(line, reference)]
            body.append([prompt, by_label[line.method.name], *facts])
    head = ["prompt", "method", "parameters, M", "exact match, %", "learning rate", "seeds", "difference"]
    return table(head, body) if body else NOT_MEASURED


def summary_block(study: Study) -> str:
    """The answers in a few lines."""
    found = []
    for tuned, how in ((True, "each tuned"), (False, f"both at learning rate {setting_text(PAPER_SETTING)}")):
        for line in lines_of(study, FORMS, REFERENCE, tuned=tuned, cells=study.cells):
            if line.mean is not None:
                where = f"mean over {len(study.cells)} cells, {with_seeds(line.seeds)}"
                form = f"{OURS} ({FORMS[line.method.name]})"
                found.append(f"- **{form} less {REFERENCE}, {how}:** {line.mean} points ({where}).")
    recipe = recipe_line(study, RECIPE)
    if recipe is not None:
        where = f"mean over {len(study.cells)} cells, {with_seeds(recipe.seeds)}"
        found.append(f"- **The best idea less {REFERENCE}, tuned for each cell:** {recipe.mean} points ({where}).")
    asked = question_line(study)
    if asked is not None:
        which = f'`router="task"`, which is told the task, less a {REFERENCE} that is not told'
        found.append(f"- **One input, many questions: {which}:** {asked.mean} points ({with_seeds(asked.seeds)}).")
    ideas = [(line, line.mean) for line in idea_lines(study) if line.mean is not None]
    if ideas:
        above, below = sum(mean.low > 0 for _, mean in ideas), sum(mean.high < 0 for _, mean in ideas)
        own = sum(is_lora(line.method.name) for line, _ in ideas)
        where = f"mean over {len(ideas[0][0].settings)} cells, seeds of {seeds_text(TUNING_SEEDS)}"
        found.append(
            f"- **Of {len(ideas)} methods that were tried** ({own} of them variants of LoRA; {where}), {above} have "
            f"an interval above {REFERENCE} and {below} one below it. If none differed from it at all, about "
            f"{0.025 * len(ideas):.0f} would lie above it by chance."
        )
    return "\n".join(found) or NOT_MEASURED


def accuracy_lines(study: Study) -> list[Line]:
    """The forms of R-LoRA that the README compares with LoRA, each tuned; only those with rows in all cells."""
    lines = lines_of(study, FORMS, REFERENCE, tuned=True, cells=study.cells)
    return [line for line in lines if line.mean is not None]


def readme_block(studies: Sequence[Study]) -> str:
    """The answer in a few lines, for readers who look at nothing else."""
    found = []
    for study in studies:
        lines = accuracy_lines(study)
        if lines:
            each = ", ".join(f"{FORMS[line.method.name]} {line.mean}" for line in lines)
            found.append(f"- {study.model} ({with_seeds(lines[0].seeds)}): {each}.")
    if not found:
        return NOT_MEASURED
    text = (
        f"**Accuracy** of R-LoRA less that of {REFERENCE}, which has as many parameters, each at its own rate: "
        f"points with 95 % intervals, mean over {len(studies[0].cells)} settings of real tasks."
    )
    asked = [(study, line) for study in studies if (line := question_line(study)) is not None]
    if asked:
        gains = ", ".join(f"{line.mean} ({study.model}, {with_seeds(line.seeds)})" for study, line in asked)
        found.append(
            '- Another suite, without the question in the prompt: `router="task"`, which is told the task, less a '
            f"{REFERENCE} that is not told: {gains}."
        )
    return "\n".join([text, "", *found])


def facts_block(study: Study) -> str:
    """What was run: tasks, amounts, settings, machines."""
    return f"{_amounts(study)}\n\n{_runs(study)}"


def _amounts(study: Study) -> str:
    """Tasks, training rows and test rows of each cell."""
    body = []
    for cell in [cell for cell in cells_of(study.methods.values()) if cell in (*study.cells, WORDS_CELL)]:
        rows = [row for row in study.rows if (row["suite"], row["size"]) == cell]
        trained = [row for row in rows if row["learning_rate"] > 0 and row["batch"] == PAPER_SETTING[1]] or rows
        amounts = sorted({(Run.from_dict(row).rows, Run.from_dict(row).passes) for row in trained})
        taken = [f"{most:,} x {passes}" for most, passes in amounts]
        steps, scored = sorted({row["steps"] for row in trained}), rows[0]["scored_rows"]
        counts = sorted(set(scored.values()))
        tested = f"{counts[0]}-{counts[-1]}" if len(counts) > 1 else str(counts[0])
        shown = ["; ".join(taken), ", ".join(map(str, steps)), tested]
        body.append([", ".join(cell), ", ".join(scored), *shown])
    head = ["cell", "tasks", "training rows of a task, at most, x epochs"]
    return table([*head, f"steps of batch {PAPER_SETTING[1]}", "test rows of a task"], body)


def _runs(study: Study) -> str:
    """Runs, budgets of tuning, parameters and machines, as a list."""
    rows, trained = study.rows, [row for row in study.rows if row["learning_rate"] > 0]
    by_count: dict[int, list[str]] = {}
    for method in study.methods.values():
        most = max(len(method.settings(cell)) for cell in method.rows)
        by_count.setdefault(most, []).append(method.name)
    budget = [
        f"{count} for {', '.join(f'`{name}`' for name in names) if len(names) <= 8 else f'{len(names)} methods'}"
        for count, names in sorted(by_count.items(), reverse=True)
    ]
    rates, seeds = (sorted({row[name] for row in trained}) for name in ("learning_rate", "seed"))
    sizes = sorted({row["trainable"] for row in trained})
    facts = {
        "Base model": study.model,
        f"Runs with batch {PAPER_SETTING[1]}": f"{len(rows)} of {len(study.methods)} methods; {with_seeds(seeds)}",
        "Learning rates": ", ".join(f"{rate:g}" for rate in rates),
        "Settings of a method, at most, in a cell": "; ".join(budget),
        "Trained parameters": f"{sizes[0] / 1e6:.2f} to {sizes[-1] / 1e6:.2f} million" if sizes else "none",
        "Machine": _machines(rows),
    }
    return "\n".join(f"- {name}: {text}." for name, text in facts.items())


def _machines(rows: Sequence[Row]) -> str:
    """Devices and versions, each with the days on which it ran."""
    days: dict[str, set[str]] = {}
    for row in rows:
        versions = [f"{name} {row[name]}" for name in ("torch", "transformers", "peft") if name in row]
        days.setdefault(", ".join([row["device"], *versions]), set()).add(row["date"])
    return "; ".join(f"{machine}, {' and '.join(sorted(dates))}" for machine, dates in sorted(days.items()))
