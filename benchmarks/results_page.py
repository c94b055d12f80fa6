"""docs/results.md, its figures and a block of the README, from all rows of `quality.py` in `results/`.

    python benchmarks/results_page.py       # what `make results` does

The text of the page is written by hand and has no numbers; these are in blocks that this script replaces. What has no
rows is left out or said not to be measured. If there are rows of several base models, the first one has most of them.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from quality_intervals import REPEATS
from quality_rows import Row, by_model, read
from report import HERE, ROOT, replace_block
from results_figures import draw_accuracy, draw_heads, draw_ideas, draw_learning_rates
from results_lines import PAPER_SETTING, gaps
from results_paper import same_rate_block, setting_1_block, single_block, transfer_block
from results_tables import (
    NOT_MEASURED,
    Study,
    batches_block,
    by_task_block,
    facts_block,
    initial_block,
    paper_rate_block,
    readme_block,
    recipe_block,
    summary_block,
    tried_block,
    tuned_block,
    words_block,
)


def studies_of(rows: Sequence[Row]) -> list[Study]:
    """The models, with the rows of the usual batch: other batches have few rows, and a block of their own."""
    usual = [row for row in rows if row["batch"] == PAPER_SETTING[1]]
    return [Study(same) for same in by_model(usual).values()]


def joined(studies: Sequence[Study], block: Callable[[Study], str]) -> str:
    """A block of each base model, under its name if there are several."""
    texts = [(study.model, block(study)) for study in studies]
    return "\n\n".join(f"**{model}**\n\n{text}" if len(studies) > 1 else text for model, text in texts if text)


def page(rows: Sequence[Row]) -> dict[str, str]:
    """The blocks of the page by name."""
    studies = studies_of(rows)
    intervals = (
        f"Intervals are of 95 %, by {REPEATS:,} resamples of the test rows within each task, the same rows for both "
        "methods and for both sizes of a suite, and of seeds where there are several."
    )
    return {
        "summary": joined(studies, summary_block),
        "facts": f"{joined(studies, facts_block)}\n\n{intervals}",
        "tuned": joined(studies, tuned_block),
        "paper rate": joined(studies, paper_rate_block),
        "initial values": joined(studies, initial_block),
        "batches": batches_block(rows),
        "recipe": joined(studies, recipe_block) or NOT_MEASURED,
        "by task": joined(studies, by_task_block),
        "words": joined(studies, words_block),
        "tried": tried_block(studies[0]),
        "setting 1": joined(studies, setting_1_block),
        "same rate": joined(studies, same_rate_block),
        "transfer": joined(studies, transfer_block),
        "single task": joined(studies, single_block),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, nargs="+", default=sorted((HERE / "results").glob("quality*.jsonl")))
    parser.add_argument("--heads", type=Path, default=HERE / "results" / "heads.jsonl", help="rows for their figure")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs" / "figures", help="folder")
    args = parser.parse_args(arguments)
    rows = read(*args.rows)
    if not rows:
        parser.error("There are no rows without an error. Run benchmarks/quality.py first.")
    for name, text in page(rows).items():
        replace_block(args.document, name, text, Path(__file__).name)
    studies = studies_of(rows)
    first = studies[0]
    replace_block(args.readme, "accuracy", readme_block(studies), Path(__file__).name)
    draw_accuracy(studies, args.figures / "accuracy.png")
    draw_learning_rates(studies, args.figures / "learning_rate.png")
    draw_ideas(first, args.figures / "ideas.png")
    if args.heads.exists():
        draw_heads(read(args.heads), args.figures / "heads.png")
    print(f"{args.document}: {len(rows)} rows")
    # Without these a method is compared on the seed that its settings were chosen on, and the recipe not at all.
    for line in (line for method in first.methods.values() for line in gaps(method, first.cells)):
        print(f"No other seed at the chosen setting of {line}")


if __name__ == "__main__":
    main()
