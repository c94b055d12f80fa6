"""
The data of the R-LoRA paper (arXiv 2502.15455) from the Hub, as rows of a task with a prompt, an answer and options.

Each function below turns a row of one schema into a prompt, its completion and its options. [`SETS`] says which
repository has which schema. All are stored as Parquet files, and no code of a repository is run. The prompts are those
of this package, as the paper prints none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeAlias

from datasets import Dataset, DatasetDict, Features, List, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetNotFoundError

from ..reading import shorten


PREFIX = "paper:"

# Prompt, completion and options; `None` for a row that has no answer among its options.
_Row: TypeAlias = tuple[str, str, Sequence[str]] | None
_FEATURES = Features(
    {
        "task": Value("string"),
        "prompt": Value("string"),
        "completion": Value("string"),
        "options": List(Value("string")),
    }
)


class PaperSet(NamedTuple):
    """
    One data set.

    Args:
        repository (`str`): Its name on the Hub.
        configuration (`str` or `None`): Its configuration there.
        convert (`Callable`): From a row to prompt, completion and options, or to `None`.
        columns (`tuple[str, ...]`): The columns that `convert` reads.
        splits (`dict[str, str]`): Splits in the repository by what they are used for.
        metric (`str`): How answers are scored unless the user says otherwise.
    """

    repository: str
    configuration: str | None
    convert: Callable[[Mapping[str, Any]], _Row]
    columns: tuple[str, ...]
    splits: dict[str, str]
    metric: str = "auto"


# Rows of each schema


def _listed(question: str, options: Sequence[str], answer: int) -> _Row:
    """A question with its options on lines of their own."""
    options = [" ".join(option.split()) for option in options]
    lines = "".join(f"- {option}\n" for option in options)
    # One of two equal options can't be told from the other.
    if not 0 <= answer < len(options) or len(set(options)) < len(options):
        return None
    return f"{question.strip()}\nOptions:\n{lines}Answer:", f" {options[answer]}", [f" {option}" for option in options]


def _boolq(row: Mapping[str, Any]) -> _Row:
    prompt = f"{row['passage'].strip()}\nQuestion: {row['question'].strip()}?\nAnswer:"
    return prompt, " yes" if row["answer"] else " no", [" no", " yes"]


def _piqa(row: Mapping[str, Any]) -> _Row:
    return _listed(f"Goal: {row['goal']}\nWhich way works?", [row["sol1"], row["sol2"]], int(row["label"]))


def _siqa(row: Mapping[str, Any]) -> _Row:
    options = [row["answerA"], row["answerB"], row["answerC"]]
    return _listed(f"{row['context']}\n{row['question']}", options, int(row["label"]) - 1)


def _winogrande(row: Mapping[str, Any]) -> _Row:
    question = f"Sentence: {row['sentence']}\nWhat belongs in the blank?"
    return _listed(question, [row["option1"], row["option2"]], int(row["answer"] or 0) - 1)


def _hellaswag(row: Mapping[str, Any]) -> _Row:
    text = _without_marks(f"{row['activity_label']}: {row['ctx']}")
    answer = int(row["label"]) if row["label"] != "" else -1
    return _listed(f"Text: {text}\nHow does it go on?", [_without_marks(text) for text in row["endings"]], answer)


def _without_marks(text: str) -> str:
    """Without what is left of the headings of WikiHow."""
    return " ".join(re.sub(r"\[.*?\]", "", text.replace(" [title]", ". ")).split())


def _choices(row: Mapping[str, Any], question: str) -> _Row:
    labels, texts = row["choices"]["label"], row["choices"]["text"]
    key = row["answerKey"].strip()
    return _listed(f"Question: {row[question]}", texts, labels.index(key) if key in labels else -1)


def _gsm8k(row: Mapping[str, Any]) -> _Row:
    prompt = f"Problem: {row['question'].strip()}\nSolve it step by step; end with #### and the number.\nAnswer:"
    return prompt, f" {re.sub('<<.*?>>', '', row['answer']).strip()}", []


@dataclass(frozen=True)
class _Glue:
    """A task of GLUE: the columns of its texts with their names in the prompt, a question, and the label's words."""

    texts: dict[str, str]
    question: str
    words: tuple[str, ...]

    def __call__(self, row: Mapping[str, Any]) -> _Row:
        label = int(row["label"])
        if not 0 <= label < len(self.words):  # -1: rows without an answer
            return None
        lines = "".join(f"{name}: {row[column].strip()}\n" for column, name in self.texts.items())
        options = [f" {word}" for word in self.words]
        return f"{lines}{self.question} Options: {', '.join(self.words)}.\nAnswer:", options[label], options


_SENTENCES = {"sentence1": "Sentence 1", "sentence2": "Sentence 2"}
_GLUE_TASKS = {
    "sst2": _Glue({"sentence": "Review"}, "Is the review positive or negative?", ("negative", "positive")),
    "cola": _Glue({"sentence": "Sentence"}, "Is it acceptable English?", ("no", "yes")),
    "mrpc": _Glue(_SENTENCES, "Do the two sentences say the same thing?", ("no", "yes")),
    "qqp": _Glue({"question1": "Question 1", "question2": "Question 2"}, "Do they ask the same thing?", ("no", "yes")),
    "mnli": _Glue(
        {"premise": "Premise", "hypothesis": "Hypothesis"}, "Does the first imply the second?", ("yes", "maybe", "no")
    ),
    "qnli": _Glue(
        {"question": "Question", "sentence": "Sentence"}, "Does the sentence answer the question?", ("yes", "no")
    ),
    "rte": _Glue(_SENTENCES, "Does the first imply the second?", ("yes", "no")),
}


# BIG-Bench Hard: the options stand in the question, except for those of three tasks.
_BBH_OPTIONS = {
    "boolean_expressions": ["False", "True"],
    "sports_understanding": ["no", "yes"],
    "web_of_lies": ["No", "Yes"],
}
_LETTER, _DASH = re.compile(r"^(\([A-Z]\))(?: |$)", re.MULTILINE), re.compile(r"^- (.+)$", re.MULTILINE)


def _bbh(row: Mapping[str, Any], task: str, examples: str | None = None) -> _Row:
    question, answer = row["input"].strip(), row["target"].strip()
    listed = question.partition("\nOptions:\n")[2]
    options = _LETTER.findall(listed) or [option.strip() for option in _DASH.findall(listed)]
    options = options or _BBH_OPTIONS.get(task, [])
    if options and (answer not in options or len(options) == 1):  # broken off
        return None
    # The form of the few-shot prompts.
    prompt = f"{question}\nAnswer:" if examples is None else f"{examples.strip()}\n\nQ: {question}\nA:"
    return prompt, f" {answer}", [f" {option}" for option in options]


_OWN_TEST, _VALIDATION = {"train": "train", "test": "test"}, {"train": "train", "test": "validation"}
_CHOICES = ("choices", "answerKey")
# "Setting 1": eight tasks of common sense, and GSM8K.
_SETTING1 = {
    "boolq": PaperSet("google/boolq", None, _boolq, ("question", "answer", "passage"), _VALIDATION),
    "piqa": PaperSet("baber/piqa", None, _piqa, ("goal", "sol1", "sol2", "label"), _VALIDATION),
    "siqa": PaperSet(
        *("lighteval/siqa", None, _siqa, ("context", "question", "answerA", "answerB", "answerC", "label")),
        _VALIDATION,
    ),
    "hellaswag": PaperSet(
        *("Rowan/hellaswag", None, _hellaswag, ("activity_label", "ctx", "endings", "label")), _VALIDATION
    ),
    "winogrande": PaperSet(
        *("allenai/winogrande", "winogrande_xl", _winogrande, ("sentence", "option1", "option2", "answer")),
        _VALIDATION,
    ),
    "arc_easy": PaperSet(
        *("allenai/ai2_arc", "ARC-Easy", partial(_choices, question="question"), ("question", *_CHOICES)), _OWN_TEST
    ),
    "arc_challenge": PaperSet(
        *("allenai/ai2_arc", "ARC-Challenge", partial(_choices, question="question"), ("question", *_CHOICES)),
        _OWN_TEST,
    ),
    "openbookqa": PaperSet(
        *("allenai/openbookqa", "main", partial(_choices, question="question_stem"), ("question_stem", *_CHOICES)),
        _OWN_TEST,
    ),
    "gsm8k": PaperSet("openai/gsm8k", "main", _gsm8k, ("question", "answer"), _OWN_TEST, "number"),
}
# Tasks of the authors' code for single tasks and ablations; the test rows of GLUE have no answers.
_GLUE = {
    task: PaperSet(
        repository="nyu-mll/glue",
        configuration=task,
        convert=glue,
        columns=(*glue.texts, "label"),
        splits={"train": "train", "test": "validation_matched" if task == "mnli" else "validation"},
    )
    for task, glue in _GLUE_TASKS.items()
}
_BBH_METRICS = {"multistep_arithmetic_two": "number", "object_counting": "number", "word_sorting": "exact_match"}
_BBH = {
    task: PaperSet(
        *("SaylorTwift/bbh", task, partial(_bbh, task=task), ("input", "target"), {"test": "test"}),
        _BBH_METRICS.get(task, "auto"),
    )
    for task in (
        *("boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages"),
        *("formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects"),
        *("logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation"),
        *("multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table"),
        *("reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks"),
        *("sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects"),
        *("tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies"),
        "word_sorting",
    )
}
SETS: dict[str, PaperSet] = {**_SETTING1, **_GLUE, **_BBH}
# The examples of BIG-Bench Hard, three for each task.
_EXAMPLES = PaperSet(
    *("Joschka/big_bench_hard", "few_shot_prompts", lambda row: None, ("dataset_name", "answer_only_prompt")),
    {"test": "few_shot_prompts"},
)
_GROUPS = {"setting1": tuple(_SETTING1), "glue": tuple(_GLUE), "bbh": tuple(_BBH), "bbh-few-shot": tuple(_BBH)}


def load_paper_data(name: str, *, root: str | Path | None = None) -> DatasetDict:
    """
    Load data of the R-LoRA paper.

    Args:
        name (`str`): `"setting1"`, `"glue"`, `"bbh"`, `"bbh-few-shot"`, or one of their tasks, such as `"gsm8k"`.
        root (`str` or `Path`, *optional*): Folder with copies of the repositories, instead of the Hub.

    Returns:
        `DatasetDict`: The splits "train", if there is one, and "test", with `task`, `prompt`, `completion`, `options`.

    Raises:
        ValueError: If there is no such data, or a repository has other splits or columns than expected.
        FileNotFoundError: If a repository can't be loaded.
    """
    tasks = _tasks_of(name)
    examples = _load_examples(root) if name == "bbh-few-shot" else {}
    parts: dict[str, list[Dataset]] = {}
    for task in tasks:
        source = SETS[task]
        if examples:
            source = source._replace(convert=partial(_bbh, task=task, examples=examples[task]))
        for split, data in _load(source, root).items():
            parts.setdefault(split, []).append(_convert(source, task, data))
    return DatasetDict({split: concatenate_datasets(data) for split, data in parts.items()})


def paper_metrics(name: str) -> dict[str, str]:
    """The metric of each task of some data (`"paper:setting1"`) that has one of its own; none for other data."""
    tasks = _tasks_of(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else ()
    return {task: SETS[task].metric for task in tasks if SETS[task].metric != "auto"}


def _tasks_of(name: str) -> tuple[str, ...]:
    if name in SETS:
        return (name,)
    if name not in _GROUPS:
        raise ValueError(
            f"There is no data {shorten(PREFIX + name)}; there are {', '.join(_GROUPS)}, and their tasks: "
            f"{', '.join(SETS)}. Use one of these names."
        )
    return _GROUPS[name]


def _load(source: PaperSet, root: str | Path | None) -> dict[str, Dataset]:
    """The splits of a set by use, whose columns have been checked."""
    try:
        data = _read(source, root)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"The dataset {source.repository} can't be loaded from the Hub: {error}") from error

    for split in source.splits.values():
        if split not in data:
            raise ValueError(
                f"The dataset {source.repository} has no split {split!r}; it has {', '.join(data)}. It has changed "
                "since this version of rlora_trl: load it with your own code."
            )
        missing = [column for column in source.columns if column not in data[split].column_names]
        if missing:
            raise ValueError(
                f"The dataset {source.repository}, split {split!r}, has no column {missing[0]!r}; it has "
                f"{', '.join(data[split].column_names)}. It has changed since this version of rlora_trl: load it with "
                "your own code."
            )
    return {use: data[split] for use, split in source.splits.items()}


def _read(source: PaperSet, root: str | Path | None) -> DatasetDict:
    if root is None:
        return load_dataset(source.repository, source.configuration)
    # `datasets` (5.2) knows cached data by the names of local files, wherever and however new they are.
    with TemporaryDirectory() as cache:
        place = str(Path(root) / source.repository)
        return load_dataset(place, source.configuration, cache_dir=cache, keep_in_memory=True)


def _load_examples(root: str | Path | None) -> dict[str, str]:
    rows = _load(_EXAMPLES, root)["test"]
    examples = dict(zip(rows["dataset_name"], rows["answer_only_prompt"], strict=True))
    missing = [task for task in _BBH if task not in examples]
    if missing:
        raise ValueError(
            f"The dataset {_EXAMPLES.repository} has no examples of the task {missing[0]!r}. It has changed since "
            "this version of rlora_trl: load it with your own code."
        )
    return examples


def _convert(source: PaperSet, task: str, data: Dataset) -> Dataset:
    def convert(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows = []
        for values, index in zip(zip(*batch.values(), strict=True), indices, strict=True):
            row = dict(zip(batch, values, strict=True))
            try:
                rows.append(source.convert(row))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"The dataset {source.repository}, row {index + 1}: {shorten(row, 200)} can't be read "
                    f"({type(error).__name__}: {error}). Load it with your own code."
                ) from error
        kept = [row for row in rows if row is not None]
        return {
            "task": [task] * len(kept),
            "prompt": [prompt for prompt, _, _ in kept],
            "completion": [completion for _, completion, _ in kept],
            "options": [list(options) for _, _, options in kept],
        }

    columns = data.select_columns(list(source.columns)).with_format(None)
    # Without the cache of `datasets`, which would not see that another version of this package converts otherwise.
    return columns.map(
        convert,
        batched=True,
        with_indices=True,
        remove_columns=list(source.columns),
        features=_FEATURES,
        keep_in_memory=True,
        load_from_cache_file=False,
    )
