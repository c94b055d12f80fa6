"""Rows to score or to measure on, by task, and conversations as text."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, IterableDataset
from trl import maybe_convert_to_chatml

from ..foreign import explain_failure
from ..reading import shorten
from .columns import encode_default_tasks, encode_tasks, is_text
from .formats import COMPANIONS_OF_TEXT, PAIR, SHAREGPT_KEYS, check_format, check_row, check_rows, list_columns
from .loading import READING_ERRORS, explain_read_errors, load_splits


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_ASSISTANTS = ("assistant", "gpt")  # the role of an answer in OpenAI's and ShareGPT's formats
# Characters of a conversation as text. A chat template is a program, and may write any number.
_MAX_TEXT = 2**24


def rows_by_task(
    dataset: Dataset,
    task_column: str,
    limit: int | None = None,
    *,
    where: str = "The data",
    scored: bool = False,
    answers: bool = False,
    warn: Callable[[str], Any] | None = None,
) -> dict[str, list[dict]]:
    """
    The rows of each task, in the order in which tasks first occur.

    Args:
        dataset (`Dataset`): A dataset with a column that names the task.
        task_column (`str`): That column, of strings, integers or classes.
        limit (`int`, *optional*): Only the first rows of each task.
        where (`str`, *optional*): Name of the data in messages.
        scored (`bool`, *optional*, defaults to `False`): Check that prompts, completions and options can be scored.
        answers (`bool`, *optional*, defaults to `False`): Check that completions of text are among their options.
        warn (`Callable`, *optional*): For a column that the user did not choose; see [`encode_default_tasks`].

    Returns:
        `dict[str, list[dict]]`: Rows by task; empty if the user did not choose the column and it names no tasks.

    Raises:
        ValueError: If the column is of another type, or has rows without a task or with a value that can't name one;
            if rows can't be scored, with the row, counted from 1, and the column.
    """
    encode = encode_tasks if warn is None else partial(encode_default_tasks, warn=warn)
    try:
        tasks = encode(dataset, task_column)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if tasks is None:
        return {}
    names, numbers = tasks

    firsts = [np.flatnonzero(numbers == number)[:limit] for number in range(len(names))]
    indices = np.sort(np.concatenate(firsts))
    rows: dict[str, list[dict]] = {name: [] for name in names}
    for index, row in zip(indices.tolist(), dataset.select(indices), strict=True):
        if answers:
            _check_options(row, f"{where}, row {index + 1}")
        rows[names[numbers[index]]].append(_scorable_row(row, index, where) if scored else row)
    return rows


def _scorable_row(row: dict[str, Any], index: int, where: str) -> dict[str, Any]:
    texts = dict.fromkeys(PAIR, "")
    check_row(row, index, names=PAIR, where=where, text_column="completion", first=texts)
    return {**row, "options": _check_options(row, f"{where}, row {index + 1}")}


def _check_options(row: Mapping[str, Any], where: str) -> list[str]:
    """
    The options of a row.

    Raises:
        ValueError: If they are no texts, or the completion, if it is text, is none of them.
    """
    options, completion = _options(row.get("options"), where), row.get("completion")
    if options and isinstance(completion, str) and completion not in options:
        raise ValueError(
            f"{where} has completion {shorten(completion, 60)}, which is not among its options "
            f"{shorten(options, 200)}. Write it exactly as one of them, spaces included."
        )
    return options


def is_scorable(dataset: Any) -> bool:
    """Whether the rows of a map-style dataset have a prompt and a completion, both plain text."""
    if isinstance(dataset, IterableDataset) or not set(PAIR) <= set(dataset.column_names or ()):
        return False
    first = dataset[0] if len(dataset) else {}
    return bool(first) and all(is_text(dataset.features[name]) or isinstance(first[name], str) for name in PAIR)


def load_task_rows(
    name: str,
    *,
    split: str | None = None,
    task_column: str | None = None,
    limit: int | None = None,
    default_task: str | None = None,
    answers: bool = False,
) -> dict[str, list[dict]]:
    """
    Load rows to score or to measure on, by task, in any format that can be trained on.

    Args:
        name (`str`):
            File, folder or dataset on the Hub; see [`load_splits`].
        split (`str`, *optional*):
            Defaults to "test" if there is one, else to the only one.
        task_column (`str`, *optional*):
            Column that names the task. Defaults to "task"; if there is no such column, or its values do not look like
            task names, all rows are one task.
        limit (`int`, *optional*):
            Only the first rows of each task.
        default_task (`str`, *optional*):
            Name of that one task. Defaults to the name of the data.
        answers (`bool`, *optional*, defaults to `False`):
            Rows must have an answer to score, which plain text has not, and which is among the options, if any.

    Returns:
        `dict[str, list[dict]]`: Rows by task; `conversations` have become `messages`.

    Raises:
        ValueError: If there is no such split or column, or no rows, or rows without a task or of another format; see
            [`rows_by_task`] and [`check_rows`].
    """
    dataset, where = _load_split(name, split)
    if task_column is not None and task_column not in dataset.column_names:
        raise ValueError(
            f"{name} has no column {task_column!r} to name tasks; it has {', '.join(dataset.column_names)}."
        )

    # One format for all rows.
    with explain_read_errors(Path(name), READING_ERRORS):
        names = _check_scorable(dataset, where, answers)
    if names == ("text",):
        chats = [column for column in ("messages", *SHAREGPT_KEYS) if column in dataset.column_names]
        dataset = dataset.remove_columns(chats)
    if names == ("conversations",):
        dataset = dataset.map(maybe_convert_to_chatml, remove_columns="conversations")

    # Rows by task.
    column, tasks = task_column or "task", {}
    if column in dataset.column_names:
        warn = None if task_column else lambda text: warnings.warn(f"{name}: {text}", stacklevel=4)
        tasks = rows_by_task(dataset, column, limit, where=where, answers=answers, warn=warn)
    if tasks:
        return tasks
    rows = dataset.select(range(min(len(dataset), limit or len(dataset)))).to_list()
    for number, row in enumerate(rows if answers else (), start=1):
        _check_options(row, f"{where}, row {number}")
    return {default_task or Path(name).stem: rows}


def _load_split(name: str, split: str | None) -> tuple[Dataset, str]:
    """One split, and its name in messages."""
    splits = load_splits(name, file_split=split or "test")
    selected = split or ("test" if "test" in splits else next(iter(splits)))
    if selected not in splits or (split is None and selected != "test" and len(splits) > 1):
        missing = f"split {split!r}" if split else 'split "test"'
        raise ValueError(f"{name} has no {missing}; it has {', '.join(splits)}. Name one of them.")
    if len(splits[selected]) == 0:
        raise ValueError(f"{name} has no rows in split {selected!r}.")
    return splits[selected], name if len(splits) == 1 else f"{name}, split {selected!r}"


def _check_scorable(dataset: Dataset, where: str, answers: bool) -> tuple[str, ...]:
    """The columns of the format, all rows of which have been checked."""
    columns = [name for name in dataset.column_names if name != "input_ids"]  # tokenized data are read by their text
    names = check_format(columns, dataset[0], where)
    if answers and names == ("text",):
        raise ValueError(
            f"{where} has the columns {list_columns(columns)}; accepted are 'prompt' with 'completion', or "
            "'messages' that end with an answer, as plain text has no answer to score. Rename its columns."
        )
    read = [name for name in dataset.column_names if name in (*names, *COMPANIONS_OF_TEXT)]
    check_rows(dataset.select_columns(read), where)
    return names


def text_rows(tasks: Mapping[str, Sequence[Mapping[str, Any]]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """
    Rows by task with prompt, completion and options as text, as [`score_tasks`] takes them.

    The chat template writes conversations as text, as in training. Of `messages` the last turn of the assistant is the
    answer; what follows it is left out. Options are texts that replace the content of that turn.

    Args:
        tasks (`Mapping[str, Sequence[Mapping]]`): Rows by task, from [`load_task_rows`].
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.

    Returns:
        `dict[str, list[dict]]`: Rows by task.

    Raises:
        ValueError: If messages have no answer, or the tokenizer has no chat template.
    """
    return {
        task: [_text_row(row, tokenizer, f"Task {task!r}, row {number}") for number, row in enumerate(rows, start=1)]
        for task, rows in tasks.items()
    }


def _text_row(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: str) -> dict[str, Any]:
    options = _options(row.get("options"), where)
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return {**row, "options": options}
    prompt, answer = _split_messages(row, where)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where} is a conversation, and the model's tokenizer has no chat template to write it with. Use a model "
            "that has one, or give 'prompt' and 'completion' as text."
        )
    turns = [answer, *([{"role": answer[0]["role"], "content": option}] for option in options)]
    # The prompt is that of the last turn: all have the same, unless a template writes some of them otherwise.
    with explain_failure(
        f"{where}: the tokenizer's chat template does not write this conversation",
        "Correct the row, or use a tokenizer with another chat template.",
    ):
        pairs = [_write(prompt, turn, row, tokenizer) for turn in turns]
    completions = [completion for _, completion in pairs]
    return {**row, "prompt": pairs[-1][0], "completion": completions[0], "options": completions[1:]}


def _options(options: Any, where: str) -> list[str]:
    """The options of a row; a CSV file has them as a list in JSON."""
    if isinstance(options, str):
        with suppress(ValueError, RecursionError):  # refused below
            options = json.loads(options)
    options = [] if options is None else options
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError(
            f"{where}, column 'options': it is {shorten(options, 60)}, and must be a list of texts, such as "
            '[" yes", " no"]. Correct it.'
        )
    return options


def _split_messages(row: Mapping[str, Any], where: str) -> tuple[list[dict], list[dict]]:
    """The messages before the answer, and the answer."""
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        return row["prompt"], row["completion"]
    messages = row.get("messages") or []
    answers = [index for index, message in enumerate(messages) if message.get("role") in _ASSISTANTS]
    if not answers or answers[-1] == 0:
        raise ValueError(
            f"{where}, column 'messages': it has no answer of the assistant to a message before it, only the roles "
            f"{list_columns(message.get('role') for message in messages)}. Add the answer, or remove the "
            "row."
        )
    return messages[: answers[-1]], [messages[answers[-1]]]


def _write(
    prompt: list[dict], answer: list[dict], row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, str]:
    """A conversation as text, split where the answer begins, without its end of the sequence: scoring adds that."""
    tools = row.get("tools")
    options = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    }
    before = _apply_template(tokenizer, prompt, add_generation_prompt=True, **options)
    whole = _apply_template(tokenizer, [*prompt, *answer], **options)
    # Some templates open an answer in another way than they write it.
    before = os.path.commonprefix([before, whole])

    # The tokenizer adds the beginning of the sequence as well.
    bos = tokenizer.bos_token
    if bos and before.startswith(bos) and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]:
        whole, before = whole[len(bos) :], before[len(bos) :]
    completion = whole[len(before) :].rstrip("\n")
    return before, completion.removesuffix(tokenizer.eos_token or "")


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **options: Any) -> str:
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    if len(text) > _MAX_TEXT:
        raise ValueError(f"it writes {len(text)} characters, and at most {_MAX_TEXT} are accepted")
    return text
