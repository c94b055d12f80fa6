"""Scores by task: of likelihoods where rows have options, of generated answers where a metric asks for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..tuner.routing import find_routings, using_all
from .encoding import TokenLimits, position_limit
from .generation import generate_answers
from .likelihood import score_likely
from .metrics import GENERATED, METRICS, find_number


@dataclass(frozen=True)
class TaskScore:
    """
    Score of one task.

    Args:
        correct (`int`): Rows that are entirely correct.
        total (`int`): All rows.
        metric (`str`, *optional*, defaults to `"accuracy"`): What was measured; see [`score_tasks`].
        values (`tuple[float, ...]`, *optional*): The value of each row, in `[0, 1]`, in the order of the rows.
        answers (`tuple[str, ...]`, *optional*): What the model wrote, if it generated answers.
    """

    correct: int
    total: int
    metric: str = "accuracy"
    values: tuple[float, ...] = field(default=(), compare=False, repr=False)
    answers: tuple[str, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of_rows(cls, metric: str, values: Sequence[float], answers: Sequence[str] = ()) -> TaskScore:
        """The score of a task from the values of its rows."""
        return cls(sum(value == 1 for value in values), len(values), metric, tuple(values), tuple(answers))

    @property
    def accuracy(self) -> float:
        """Share of entirely correct rows, a ratio in `[0, 1]`."""
        return self.correct / self.total

    @property
    def score(self) -> float:
        """Mean value of the rows, a ratio in `[0, 1]`. It is the accuracy unless the metric is F1."""
        return sum(self.values) / self.total if self.values else self.accuracy


def choose_metric(metric: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """
    The metric of a task where one is set for all tasks: that of likelihoods if rows have options.

    Args:
        metric (`str`): `"auto"` or one of [`METRICS`].
        rows (`Sequence[Mapping]`): Rows of the task.

    Raises:
        ValueError: If there is no such metric.
    """
    if metric not in ("auto", *METRICS):
        raise ValueError(f"`metric` is {metric!r}, and must be one of {', '.join(('auto', *METRICS))}. Choose one.")
    return metric if metric in GENERATED and not any(row.get("options") for row in rows) else "accuracy"


def score_tasks(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    batch_size: int = 32,
    description: str | None = None,
    max_length: int | None = None,
    metric: str | Mapping[str, str] = "auto",
    max_new_tokens: int = 256,
    stop: Sequence[str] = (),
) -> dict[str, TaskScore]:
    """
    Score a causal language model on several tasks, in eval mode.

    Adapters with `router="task"` score each task with its own head weights, and tasks that they lack with the mean
    over tasks; after [`set_task`] all tasks with those of the one that was set.

    Args:
        model (`torch.nn.Module`):
            Causal language model of transformers, with or without adapters.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer.
        tasks (`Mapping[str, Sequence[Mapping]]`):
            Rows by task. A row has `prompt`, `completion` and, where the task has them, `options` (which contain the
            completion).
        batch_size (`int`, *optional*, defaults to `32`):
            Sequences in one forward pass.
        description (`str`, *optional*):
            Shows a progress bar with this text.
        max_length (`int`, *optional*):
            Maximum number of tokens of a prompt with its completion; longer prompts lose their beginning, with a
            warning. Defaults to the positions of the model.
        metric (`str` or `Mapping[str, str]`, *optional*, defaults to `"auto"`):
            `"accuracy"`, which `"auto"` stands for: with options a row is correct if the completion is the most likely
            one, the end of the sequence included wherever the tokens of one option are a prefix of another's; without,
            if greedy decoding of the prompt gives the completion and then the end of the sequence. The others generate
            an answer by greedy decoding and compare its text with the completion: `"exact_match"` and `"f1"` after
            SQuAD's normalization, `"number"` by the number after `####`, else by the last one. A single name leaves
            tasks with options at `"accuracy"`; a mapping sets the metric of each task that it names.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Maximum number of tokens of a generated answer, which else ends with the sequence.
        stop (`Sequence[str]`, *optional*):
            Texts that end a generated answer too, such as `"\\n"`.

    Returns:
        `dict[str, TaskScore]`: Scores by task, in the order of `tasks`, with the value of each row.

    Raises:
        ValueError: If a task has no rows, a completion is not among its options, has no number to compare or is longer
            than the model allows, or there is no such metric or task.
    """
    metrics = _metrics_by_task(tasks, metric)
    limits = TokenLimits(max_length, position_limit(model))
    likely = partial(score_likely, model, tokenizer, limits=limits, batch_size=batch_size, description=description)
    generate = partial(
        generate_answers,
        model,
        tokenizer,
        max_new_tokens=max_new_tokens,
        limits=limits,
        stop=stop,
        batch_size=batch_size,
        description=description,
    )

    was_training = model.training
    model.eval()
    scores: dict[str, TaskScore] = {}
    try:
        for portion in _portions(model, tasks):
            scores |= _score(portion, metrics, likely, generate)
    finally:
        model.train(was_training)
    return scores


def _portions(
    model: torch.nn.Module, tasks: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Iterator[Mapping[str, Sequence[Mapping[str, Any]]]]:
    """Parts of `tasks` to score at once. Task routers have the task of a part until the next one is asked for."""
    routings = [routing for routing in find_routings(model) if routing.kind == "task" and routing.batch.task is None]
    if not routings:
        yield tasks
        return
    for task, rows in tasks.items():
        with using_all([(routing, {"task": routing.find_task(task)}) for routing in routings]):
            yield {task: rows}


def _score(
    tasks: Mapping[str, Sequence[Mapping[str, Any]]],
    metrics: Mapping[str, str],
    likely: Callable[..., dict[str, list[float]]],
    generate: Callable[..., list[str]],
) -> dict[str, TaskScore]:
    """Scores of tasks, by the likelihood of completions or by generated answers, in the order of `tasks`."""
    generated = {task: rows for task, rows in tasks.items() if metrics[task] in GENERATED}
    others = {task: rows for task, rows in tasks.items() if task not in generated}
    values = likely(others) if others else {}
    # Prompts of all tasks together, in batches of similar length; then the answers of each task again.
    written = iter(generate([row["prompt"] for rows in generated.values() for row in rows]) if generated else [])

    scores = {task: TaskScore.of_rows("accuracy", values[task]) for task in others}
    for task, rows in generated.items():
        pairs = [(next(written), row["completion"]) for row in rows]
        compared = [GENERATED[metrics[task]](answer, completion) for answer, completion in pairs]
        scores[task] = TaskScore.of_rows(metrics[task], compared, [answer for answer, _ in pairs])
    return {task: scores[task] for task in tasks}


def _metrics_by_task(
    tasks: Mapping[str, Sequence[Mapping[str, Any]]], metric: str | Mapping[str, str]
) -> dict[str, str]:
    """The metric of each task, whose rows have been checked for it."""
    by_name = metric if isinstance(metric, Mapping) else {}
    unknown = [task for task in by_name if task not in tasks]
    if unknown:
        raise ValueError(f"`metric` names the task {unknown[0]!r}; the tasks are {', '.join(tasks)}. Use their names.")

    metrics = {}
    for task, rows in tasks.items():
        if len(rows) == 0:
            raise ValueError(f"Task {task!r} has no rows to score. Remove it, or check its split.")
        # The name of a metric for one task holds whether or not it has options.
        chosen = choose_metric(by_name.get(task, "auto") if isinstance(metric, Mapping) else metric, rows)
        metrics[task] = by_name[task] if by_name.get(task) in GENERATED else chosen
        if metrics[task] == "number":
            _refuse_no_number(task, rows)
    return metrics


def _refuse_no_number(task: str, rows: Sequence[Mapping[str, Any]]) -> None:
    for number, row in enumerate(rows, start=1):
        if find_number(row["completion"]) is None:
            raise ValueError(
                f"Task {task!r}, row {number}: its completion {row['completion'][-60:]!r} has no number, which the "
                "metric 'number' compares. Use another metric for this task, such as 'exact_match'."
            )
