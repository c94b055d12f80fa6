"""benchmarks/results_page.py: the page from rows that are made up, whose answers are known."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
from processes import ROOT


sys.path.insert(0, str(ROOT / "benchmarks"))

import results_page
from quality_data import SUITES
from quality_plans import CELLS, IDEAS, INITIAL, METHODS, word_label
from quality_rows import by_model, methods_of
from quality_runs import Run
from quality_worker import run_facts, scored
from results_figures import CURVES, HEADS, curve, draw_heads, draw_ideas, draw_learning_rates
from results_lines import Study, gaps, paper_line, shared_seeds, tuned_line
from results_paper import same_rate_block, single_block, transfer_block
from results_tables import (
    NOT_MEASURED,
    RECIPE,
    TASK_ROUTER,
    by_task_block,
    facts_block,
    initial_block,
    readme_block,
    recipe_block,
    summary_block,
    tried_block,
    tuned_block,
    words_block,
)


DOCUMENT = ROOT / "docs" / "results.md"
LORA = "LoRA r=10"
MULTITASK = CELLS[:2]
TEST_ROWS = 50


def made(label, share, rate=1e-3, seed=0, cell=CELLS[0], model="small"):
    """A row of a method of the plans: rows of each task are right with a probability, easy ones for all methods."""
    method = METHODS[label]
    run = Run(method.method, *cell, rate, seed=seed, options=method.options, label=label, model=model)
    draws = {task: np.random.default_rng([i, seed]).random(TEST_ROWS) for i, task in enumerate(SUITES[cell[0]])}
    spent = {"seconds": {"train": 1.0}, "side_by_side": 1, "steps": 10, "trainable": 1_900_800}
    machine = {"device": "CPU", "date": "2026-01-01", "torch": "2", "command": "quality.py"}
    return {**run_facts(run), **scored({task: list(draw < share) for task, draw in draws.items()}), **spent, **machine}


def tuning(cells=CELLS, model="small"):
    """LoRA best at 1e-3 and behind at the paper's rate, R-LoRA as good and best at 2e-3; two ideas."""
    shares = {
        LORA: {2e-4: 0.4, 1e-3: 0.7, 2e-3: 0.5},
        "R-LoRA": {2e-4: 0.6, 1e-3: 0.5, 2e-3: 0.7},
        RECIPE: {1e-3: 0.9, 2e-3: 0.2},
        "LoRA+ 4": {2e-4: 0.1},
    }
    return [
        made(label, share, rate, 0, cell, model)
        for label, by_rate in shares.items()
        for rate, share in by_rate.items()
        for cell in cells
    ]


def final(label=RECIPE, share=0.8, rate=1e-3, cells=CELLS):
    """Both on seeds that nothing was chosen on."""
    pairs = [(LORA, 0.7, 1e-3), (label, share, rate)]
    return [made(name, right, at, seed, cell) for name, right, at in pairs for seed in (3, 4) for cell in cells]


def write(rows, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def cells_in(text, name):
    """The cells of a method's line in a table."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_is_written_from_rows(tmp_path, capsys):
    document, rows, readme = (tmp_path / name for name in ("results.md", "rows.jsonl", "README.md"))
    shutil.copy(DOCUMENT, document)
    shutil.copy(ROOT / "README.md", readme)
    pages = ["--document", str(document), "--readme", str(readme), "--figures", str(tmp_path)]
    pages += ["--heads", str(tmp_path / "no_rows.jsonl")]
    packaged = [made("base", 0.3, 0.0, cell=CELLS[2]), made("PEFT LoRA r=10", 0.5, cell=CELLS[2])]
    shares = {2e-4: 0.4, 5e-4: 0.6, 1e-3: 0.8}
    packaged += [made("rlora_trl", share, rate, cell=CELLS[2]) for rate, share in shares.items()]
    packaged += [made("HydraLoRA", 0.9, 2e-4, cell=CELLS[2]), made("PEFT LoRA r=10", 0.4, 5e-4, cell=CELLS[2])]
    packaged += [made("PEFT LoRA r=10", 0.6, 2e-4, cell=CELLS[2])]
    failed = {"key": "failed", "error": "out of memory"}
    write([*tuning(), *final(), *packaged, failed], rows)
    results_page.main(["--rows", str(rows), *pages])
    text = document.read_text()
    assert "- small (seed 0): with the paper's head dropout +0.00 [+0.00, +0.00].\n" in readme.read_text()

    marks = r"<!-- ([\w ]+): written by benchmarks/results_page.py -->\n\n(.*?)\n\n<!-- end of \1 -->"
    blocks = dict(re.findall(marks, text, re.DOTALL))
    assert set(blocks) == set(results_page.page(tuning()))
    difference = "+0.00 [+0.00, +0.00] points (mean over 4 cells, seed 0)"
    assert f"- **R-LoRA (with the paper's head dropout) less LoRA r=10, each tuned:** {difference}" in text
    assert re.search(r"both at learning rate 0.0002:\*\* \+\d", blocks["summary"])
    assert "| multitask, plenty | sst2, mrpc" in blocks["facts"] and "1,500 x 1 | 10 | 50 |" in blocks["facts"]
    assert "the comparison uses seeds 3, 4." in blocks["recipe"]
    at_rate, tuned = blocks["setting 1"].split("each at its best learning rate")
    assert cells_in(at_rate, "PEFT LoRA r=10")[-6] == f"{packaged[-1]['mean_accuracy']:.2f}"
    assert len(cells_in(at_rate, "base")) == 1 + len(SUITES["setting1"]) + 6
    assert cells_in(at_rate, "rlora_trl")[-4] == "0.0002" and cells_in(at_rate, "rlora_trl")[-1].startswith("-")
    assert cells_in(tuned, "rlora_trl")[-4] == "0.001" and cells_in(tuned, "rlora_trl")[-1].startswith("+")
    assert "| HydraLoRA |" in at_rate and "| HydraLoRA |" not in tuned  # one learning rate is no tuning
    assert {path.name for path in tmp_path.glob("*.png")} == {"accuracy.png", "learning_rate.png", "ideas.png"}

    second = [made("R-LoRA, no dropout", 0.7, cell=cell, model="large") for cell in CELLS]
    second += [made(LORA, 0.7, cell=cell, model="large") for cell in CELLS]
    write([*tuning(), *second], rows)
    results_page.main(["--rows", str(rows), *pages])
    assert "- large (seed 0): default +0.00 [+0.00, +0.00].\n" in readme.read_text()

    write(tuning(), rows)  # without the other seeds, and the page is written over
    results_page.main(["--rows", str(rows), *pages])
    text = document.read_text()
    best = text.split("## The best idea, on other seeds")[1].split("\n## ")[0]
    assert NOT_MEASURED in best and NOT_MEASURED in text.split("## The paper's tables")[1]
    write([failed], rows)
    with pytest.raises(SystemExit):
        results_page.main(["--rows", str(rows), *pages])
    assert "no rows without an error" in capsys.readouterr().err


def test_methods_are_compared_on_seeds_that_chose_nothing():
    """The best setting of the first seeds has no luck on others."""
    rows = tuning(MULTITASK) + final("R-LoRA", 0.3, 2e-3, MULTITASK)
    methods = methods_of(rows)
    line = tuned_line(methods["R-LoRA"], methods[LORA], MULTITASK)
    assert line.seeds == (3, 4) and set(line.settings.values()) == {(2e-3, 32)}
    assert line.mean.seeds == 2 and line.mean.high < -20
    # What has other seeds at another setting only is compared on the seed of tuning.
    rows = tuning(MULTITASK) + final("R-LoRA", 0.3, 1e-3, MULTITASK)
    methods = methods_of(rows)
    assert tuned_line(methods["R-LoRA"], methods[LORA], MULTITASK).seeds == (0,)
    assert gaps(methods["R-LoRA"], MULTITASK[:1]) == ["R-LoRA, multitask, plenty: 0.002"]
    assert gaps(methods[LORA], MULTITASK) == gaps(methods["LoRA+ 4"], MULTITASK) == []
    # Cells that a method has no rows in do not matter, but then there is no mean over all.
    rows = tuning(MULTITASK[:1]) + final("R-LoRA", 0.3, 2e-3, MULTITASK[:1]) + [made(LORA, 0.7, cell=MULTITASK[1])]
    methods = methods_of(rows)
    line = tuned_line(methods["R-LoRA"], methods[LORA], MULTITASK)
    assert line.seeds == (3, 4) and list(line.each) == [MULTITASK[0]] and line.mean is None


def test_at_the_paper_s_rate_all_seeds_count():
    rows = tuning(MULTITASK) + [made(LORA, 0.4, 2e-4, 1, cell) for cell in MULTITASK]
    methods = methods_of(rows)
    assert paper_line(methods["R-LoRA"], methods[LORA], MULTITASK).seeds == (0,)
    rows += [made("R-LoRA", 0.8, 2e-4, 1, cell) for cell in MULTITASK]
    methods = methods_of(rows)
    line = paper_line(methods["R-LoRA"], methods[LORA], MULTITASK)
    assert line.seeds == (0, 1) and line.mean.value == pytest.approx(30, abs=6)
    assert shared_seeds() == ()


def test_the_recipe_has_one_setting():
    """Also where a cell has a better one."""
    rows = tuning() + final() + [made(RECIPE, 1.0, 4e-3, seed, CELLS[0]) for seed in (0, 3, 4)]
    text = recipe_block(Study(rows), RECIPE)
    assert "learning rate 0.001" in text and "1.90 M" in text
    assert float(cells_in(text, "multitask, plenty")[1]) < 90
    assert float(cells_in(text, "mean, tuned for each cell too")[1]) > 80
    mean = cells_in(text, "mean over cells")[-1]
    value, low, high = map(float, re.fullmatch(r"\*\*(\S+) \[(\S+), (\S+)\]\*\*", mean).groups())
    assert 0 < low < value < high and value == pytest.approx(10, abs=3)  # 80 and 70 %, 1,500 test rows of each seed
    expected = "- **The best idea less LoRA r=10, tuned for each cell:** " + mean.strip("*")
    assert expected in summary_block(Study(rows))
    assert recipe_block(Study(tuning()), RECIPE) == recipe_block(Study(rows), "no such method") == ""
    missing = [row for row in rows if row["seed"] == 0 or (row["suite"], row["size"]) != CELLS[3]]
    assert recipe_block(Study(missing), RECIPE) == ""  # not in all cells


def test_ideas_are_sorted_and_counted():
    study = Study(tuning() + [made("ranks, top 4", 0.5, cell=CELLS[0])])
    text = tried_block(study)
    names = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert names == [LORA, RECIPE, "R-LoRA", "LoRA+ 4", "ranks, top 4"]  # last what lacks a cell
    assert cells_in(text, "LoRA+ 4")[1:3] == [IDEAS["LoRA+ 4"].what, "1"] and cells_in(text, "R-LoRA")[2] == "3"
    assert cells_in(text, "LoRA+ 4")[3] == "0"
    summary = summary_block(study)
    assert "Of 3 methods that were tried** (1 of them variants of LoRA; mean over 2 cells, seeds of 0-2)" in summary
    assert "1 have an interval above LoRA r=10 and 1 one below it" in summary


def test_settings_are_chosen_on_three_seeds():
    """Where a method has them; one with one seed only is compared on that one, beside LoRA's setting by three."""
    lucky = [made(LORA, 0.9, 2e-3, 0, CELLS[0]), *(made(LORA, 0.3, 2e-3, seed, CELLS[0]) for seed in (1, 2))]
    steady = [made(LORA, 0.7, 1e-3, seed, CELLS[0]) for seed in (0, 1, 2)]
    methods = methods_of([*lucky, *steady, made("LoRA+ 4", 0.7, 2e-4, 0, CELLS[0])])
    line = tuned_line(methods["LoRA+ 4"], methods[LORA], CELLS[:1])
    assert line.seeds == (0,) and line.each[CELLS[0]].value == 0
    assert tuned_line(methods[LORA], methods[LORA], CELLS[:1]).settings == {CELLS[0]: (1e-3, 32)}


def test_methods_that_know_the_task():
    others = [row for row in tuning() if row["name"] != RECIPE]  # the best idea knows the task too
    rows = [*others, *(made("ranks by task", 0.8, cell=cell) for cell in CELLS)]
    text = by_task_block(Study(rows))
    assert cells_in(text, LORA)[-1] == "" and cells_in(text, "ranks by task")[-1].startswith("+")
    assert f"- ranks by task: {METHODS['ranks by task'].what}." in text
    assert by_task_block(Study(others)) == NOT_MEASURED


def test_initial_values_of_other_sizes():
    rows = [*tuning(), *(made("R-LoRA, gamma 1024", 0.9, cell=cell) for cell in CELLS)]
    text = initial_block(Study(rows))
    assert cells_in(text, "R-LoRA")[1] and cells_in(text, "R-LoRA, gamma 1024")[-1].startswith("+")
    assert "ranks" not in text and len(INITIAL) == len(set(INITIAL)) > 4


def test_days_of_one_machine_are_joined():
    rows = tuning()
    other = [{**row, "date": "2026-12-31"} for row in rows[:3]]
    line = next(one for one in facts_block(Study([*rows, *other])).splitlines() if one.startswith("- Machine"))
    assert line.endswith(f"{rows[0]['date']} and 2026-12-31.") and line.count(rows[0]["device"]) == 1


def test_one_input_with_many_questions():
    """Beside LoRA with the question in the prompt; the suite is no cell of the other tables."""
    cell = ("words", "plenty")
    rows = tuning()
    for method, prompt, share in ((LORA, "instruction", 0.5), (LORA, "input", 0.2), ("ranks by task", "input", 0.6)):
        row = made(method, share, cell=cell)
        rows.append({**row, "name": word_label(method, prompt), "label": word_label(method, prompt)})
    study = Study(rows)
    assert cell not in study.cells
    lines = [[part.strip() for part in line.strip("|").split("|")] for line in words_block(study).splitlines()[2:]]
    assert [line[:2] for line in lines] == [["instruction", LORA], ["input", LORA], ["input", "ranks by task"]]
    assert [line[-1][:1] for line in lines] == ["", "-", "+"]
    assert words_block(Study(tuning())) == NOT_MEASURED


def test_the_gain_of_knowing_the_task_is_against_the_same_prompt():
    """Both with the input alone: LoRA that is asked the question is another comparison."""
    rows = tuning()
    for method, prompt, share in ((LORA, "instruction", 0.9), (LORA, "input", 0.2), (TASK_ROUTER, "input", 0.6)):
        for seed in (0, 3):
            label = word_label(method, prompt)
            row = made(LORA, share, seed=seed, cell=("words", "plenty"))
            rows.append({**row, "name": label, "label": label})
    study = Study(rows)
    means = [row["mean_accuracy"] for row in rows if row["suite"] == "words" and row["seed"] == 3]
    gain = f"{means[2] - means[1]:+.2f} ["
    assert f"less a {LORA} that is not told: {gain}" in readme_block([study])
    assert "| words, plenty |" in facts_block(study)
    line = next(one for one in summary_block(study).splitlines() if "many questions" in one)
    assert gain in line and line.endswith("(seed 3).")
    assert "many questions" not in summary_block(Study(tuning())) + readme_block([Study(tuning())])


def test_transfer_and_a_single_task():
    """The mean over seeds at each learning rate; what is not trained has the same everywhere."""
    rows = [made("rlora_trl", share, rate, seed) for rate, share in ((2e-4, 0.4), (1e-3, 0.8)) for seed in (0, 1)]
    rows += [made("base", 0.5, 0.0), made("HydraLoRA", 0.5, 2e-4)]
    assert transfer_block(Study([*tuning(), *rows])) == NOT_MEASURED
    moved = {name: rows[0][name] for name in ("mean_accuracy", "accuracy", "scored_rows")}
    text = transfer_block(Study([{**row, "transferred": moved} for row in rows]))
    expected = f"{moved['mean_accuracy']:.2f}"
    shown = [cell.split(" ± ")[0] for cell in cells_in(text, "base")[2:]]
    assert shown == [expected] * 2 and cells_in(text, "HydraLoRA")[3] == ""
    error = float(cells_in(text, "base")[2].split(" ± ")[1])
    assert error == pytest.approx(100 * (0.4 * 0.6 / (TEST_ROWS * len(SUITES["multitask"]))) ** 0.5, rel=0.05)

    one = {**rows[0], "suite": "gsm8k", "mean_accuracy": 3.0}
    text = single_block(Study([*rows, one, {**one, "seed": 1, "mean_accuracy": 4.0}]))
    assert cells_in(text, "rlora_trl")[2].startswith("3.50 ± ") and "base" not in text


def test_the_same_rate_for_two_methods():
    """Ahead at a low rate in both cells, behind at a higher one that one cell has; the mean needs both."""
    low = [
        made(name, share, 2e-4, cell=cell)
        for cell in CELLS[:2]
        for name, share in (("rlora_trl", 0.9), ("HydraLoRA", 0.5))
    ]
    high = [
        made(name, share, 1e-3) for name, share in (("rlora_trl", 0.4), ("HydraLoRA", 0.8), ("PEFT LoRA r=4", 0.1))
    ]
    lines = [
        [part.strip() for part in line.split("|")[1:-1]]
        for line in same_rate_block(Study([*low, *high])).splitlines()[2:]
    ]
    assert lines[0] == ["method", "less", "cell", "0.0002", "0.001"]
    assert [line[:3] for line in lines[2:]] == [
        ["rlora_trl", "HydraLoRA", where] for where in ("multitask, plenty", "multitask, little", "mean")
    ]
    assert [[cell[:1] for cell in line[3:]] for line in lines[2:]] == [["+", "-"], ["+", ""], ["+", ""]]
    assert lines[2][3].startswith(f"{low[0]['mean_accuracy'] - low[1]['mean_accuracy']:+.2f} [")
    assert same_rate_block(Study(tuning())) == NOT_MEASURED


def test_differences_by_rate():
    rows = [made("base", 0.4, 0.0)] + [made("rlora_trl", 0.8, rate) for rate in (2e-4, 1e-3)]
    names = ("mean_accuracy", "accuracy", "scored_rows", "right")
    moved = [{**row, "transfer": "bbh", "transferred": {name: row[name] for name in names}} for row in rows]
    text = transfer_block(Study(moved))
    points = rows[1]["mean_accuracy"] - rows[0]["mean_accuracy"]
    assert all(f"<br>{points:+.2f} [" in cell for cell in cells_in(text, "rlora_trl")[2:])
    assert "<br>" not in "".join(cells_in(text, "base"))


def test_other_batches_have_a_block_of_their_own():
    # A batch that was tried in one cell only must not decide the settings of all other tables.
    better = [{**made(LORA, 0.95), "batch": 16}, {**made("R-LoRA", 0.9), "batch": 16}]
    blocks, usual = results_page.page([*tuning(), *better]), results_page.page(tuning())
    assert all(blocks[name] == text for name, text in usual.items() if name != "batches")
    assert usual["batches"] == NOT_MEASURED
    lines = [line for line in blocks["batches"].splitlines() if line.startswith(("| 16 |", "| 32 |"))]
    assert [line.split(" | ")[:2] for line in lines] == [
        [f"| {batch}", name] for batch in (16, 32) for name in (LORA, "R-LoRA")
    ]
    assert "batch 16)<br>-" in lines[1] and "+0.00" in lines[3]
    ends = [line.split(" | ")[-1].strip("| ") for line in lines]
    assert ends[0] == ends[2] == "" and ends[1] == lines[1].split("<br>")[1].split(" | ")[0] and ends[1][0] == "-"


def test_rows_of_two_models_stay_apart():
    rows = tuning() + tuning(CELLS[:1], model="other")
    assert list(by_model(rows)) == ["small", "other"]
    blocks = results_page.page(rows)
    assert "**small**" in blocks["tuned"] and blocks["tuned"].count("| R-LoRA |") == 2
    assert blocks["facts"].count("- Runs with batch 32:") == 2 and blocks["tried"].count("| R-LoRA |") == 1
    with pytest.raises(ValueError, match="Rows of small, other"):
        methods_of(rows)


@pytest.mark.parametrize(
    "rows",
    [
        tuning(CELLS[:1]),
        [row for row in tuning() if row["name"] != LORA],
        [row for row in tuning() if row["learning_rate"] != 2e-4],
        [made("base", 0.3, 0.0)],
        [made(LORA, 0.3, seed=3)],
        [made(LORA, 0.3), made("R-LoRA", 0.3, cell=CELLS[2])],
        [{**made(LORA, 0.5), "name": "unknown"}],
    ],
    ids=["one cell", "no reference", "no paper's rate", "base only", "other seeds", "no common cell", "unknown name"],
)
def test_missing_rows_do_not_crash(rows, tmp_path):
    blocks = results_page.page(rows)
    assert all(isinstance(text, str) for text in blocks.values())
    study = Study(rows)
    draw_learning_rates([study], tmp_path / "a.png")
    draw_ideas(study, tmp_path / "b.png")
    if LORA not in study.methods:
        assert tuned_block(study) == NOT_MEASURED and not (tmp_path / "b.png").exists()


def test_a_curve_is_of_the_seeds_that_all_its_rates_have():
    rows = [made(LORA, 0.5, 1e-3), made(LORA, 0.9, 1e-3, seed=1), made(LORA, 0.6, 2e-3)]
    method = methods_of(rows)[LORA]
    assert curve(method, CELLS[0]) == {1e-3: rows[0]["mean_accuracy"], 2e-3: rows[2]["mean_accuracy"]}
    assert len(CURVES) <= 5 and set(CURVES) <= set(METHODS)


def test_the_figure_of_heads(tmp_path):
    rows = [{"name": name, "head_similarities": {"a": [0.1, 0.2], "b": [0.3, 0.4]}} for name in (*HEADS, "other")]
    draw_heads(rows, tmp_path / "heads.png")
    assert (tmp_path / "heads.png").stat().st_size > 1000 and set(HEADS) <= set(METHODS)
    draw_heads([{"name": "base"}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_text_has_no_results():
    """Numbers with a decimal point are in generated blocks only."""
    text = re.sub(r"<!-- ([\w ]+): written by .*?<!-- end of \1 -->", "", DOCUMENT.read_text(), flags=re.S)
    assert "## Limits" in text and not re.findall(r"\d+\.\d+|\d+ ?%", text)


def test_methods_say_what_they_are():
    assert all(method.what and not method.what.endswith(".") for method in METHODS.values())
