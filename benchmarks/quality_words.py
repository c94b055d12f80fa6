"""The suite `words` of `quality.py`: the same inputs with different questions.

    python benchmarks/quality_words.py --source instruction-induction --out DATA/words

`--source` is a clone of https://github.com/orhonovich/instruction-induction (Apache-2.0), the data of "Instruction
Induction" (arXiv 2205.10782). The tasks here are all of its tasks whose inputs are single words or pairs of numbers. A
word, or a pair, is in the training rows or in the test rows of all tasks, never in both.
"""

import argparse
import json
import random
import zlib
from pathlib import Path
from typing import Any


# The question of each task; a prompt is the question, "Input:" with the input, and "Answer:". Words follow a space, as
# their tokens are others at the beginning of a text.
QUESTIONS = {
    "antonyms": "What is the opposite of the word?",
    "synonyms": "What is a synonym of the word?",
    "rhymes": "Which word rhymes with it?",
    "first_word_letter": "What is the first letter of the word?",
    "second_word_letter": "What is the second letter of the word?",
    "letters_list": "Write the word letter by letter, with spaces.",
    "singular_to_plural": "What is the plural of the word?",
    "translation_en-de": "Translate the word into German.",
    "translation_en-es": "Translate the word into Spanish.",
    "translation_en-fr": "Translate the word into French.",
    "sum": "What is the sum of the two numbers?",
    "diff": "What is the first number less the second?",
}
WORD_TASKS = tuple(QUESTIONS)
TEST_SHARE = 15  # percent of the inputs
MAX_TRAIN, MAX_TEST = 4000, 400
# Other answers that count, by the field that has them.
_OTHERS = ("possible_translations", "other_rhymes")


def is_test(text: str) -> bool:
    """Whether rows with this input are test rows, in all tasks."""
    return zlib.crc32(text.lower().encode()) % 100 < TEST_SHARE


def examples(source: Path, task: str) -> list[dict[str, Any]]:
    """All rows of a task, each input once."""
    found: dict[str, dict[str, Any]] = {}
    for part in ("induce", "execute"):
        data = json.loads((source / "data" / "raw" / part / f"{task}.json").read_text(encoding="utf-8"))
        for example in data["examples"].values():
            found.setdefault(example["input"], example)
    return list(found.values())


def row(task: str, example: dict[str, Any]) -> dict[str, Any]:
    """A row of the suite."""
    answers = [example["output"], *(answer for name in _OTHERS for answer in example.get(name, []))]
    if task == "rhymes":  # the word itself is among its rhymes
        answers = [answer for answer in answers if answer != example["input"]]
    return {
        "task": task,
        "input": example["input"],
        "prompt": f"{QUESTIONS[task]}\nInput: {example['input']}\nAnswer:",
        "completion": f" {example['output']}",
        "options": [],
        "answers": [f" {answer}" for answer in dict.fromkeys(answers)],
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="clone of the data's repository")
    parser.add_argument("--out", type=Path, required=True, help="folder of the suite")
    args = parser.parse_args(arguments)
    for task in WORD_TASKS:
        rows = [row(task, example) for example in examples(args.source, task)]
        random.Random(task).shuffle(rows)
        folder = args.out / task
        folder.mkdir(parents=True, exist_ok=True)
        for split, most, wanted in (("train", MAX_TRAIN, False), ("test", MAX_TEST, True)):
            chosen = [one for one in rows if is_test(one["input"]) == wanted][:most]
            text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in chosen)
            (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
            print(f"{task:<20} {split:<6} {len(chosen):>5} rows")


if __name__ == "__main__":
    main()
