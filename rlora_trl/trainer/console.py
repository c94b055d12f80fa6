"""Selects the log entries that the console shows. Trackers get all entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments


# Entries that only trackers get, logged by Trainer, SFTTrainer and this package.
_FOR_TRACKERS = frozenset(
    (
        *("grad_norm", "grad_norm_A", "grad_norm_B", "grad_norm_router", "entropy", "mean_token_accuracy"),
        *("num_tokens", "num_input_tokens_seen", "total_flos", "balance_loss", "router_entropy", "head_load_cv"),
        *("head_similarity", "aux_loss"),
    )
)
_SPEEDS = ("_samples_per_second", "_steps_per_second", "_tokens_per_second", "_model_preparation_time")
# With more tasks than this, the console shows those with the highest losses.
_MOST_TASKS = 6


def select_for_console(logs: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """
    Select the entries of a log for the console.

    In training these are the loss, the learning rate, the largest share of a head, and the losses of the tasks (the
    six highest, if there are more); in evaluation losses, accuracies, and custom metrics.

    Args:
        logs (`Mapping[str, Any]`): All entries, as `Trainer.log` gets them.
        tasks (`Sequence[str]`): Names of the tasks.
    """
    names = {f"{prefix}{task}_loss" for task in tasks for prefix in ("", "task_")}
    of_tasks = sorted((name for name in logs if name in names), key=lambda name: logs[name], reverse=True)
    hidden = {*of_tasks[_MOST_TASKS:], *(name for name in logs if _is_for_trackers(name))}
    return {name: value for name, value in logs.items() if name not in hidden}


def _is_for_trackers(name: str) -> bool:
    if name.endswith(_SPEEDS):
        return True
    if name.startswith("eval_"):
        measure = name.removeprefix("eval_")
        is_of_pass = any(measure == entry or measure.endswith(f"_{entry}") for entry in _FOR_TRACKERS)
        return is_of_pass or name.endswith("_runtime")
    return name in _FOR_TRACKERS


class _OnConsole:
    """Passes on what [`select_for_console`] selects."""

    def __init__(self, tasks: Callable[[], Sequence[str]]) -> None:
        super().__init__()
        self._tasks = tasks

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        shown = None if logs is None else select_for_console(logs, self._tasks())
        super().on_log(args, state, control, logs=shown, **kwargs)  # type: ignore[misc]


class TaskProgressCallback(_OnConsole, ProgressCallback):
    """`ProgressCallback` that shows selected entries of the logs."""


class TaskPrinterCallback(_OnConsole, PrinterCallback):
    """`PrinterCallback` that prints selected entries of the logs."""


def shorten_console_logs(trainer: Trainer, tasks: Callable[[], Sequence[str]]) -> None:
    """
    Show selected log entries on the console, in place of the default callbacks of transformers.

    Callbacks of other classes, such as custom subclasses or the notebook callback, are not replaced.

    Args:
        trainer (`Trainer`): The trainer.
        tasks (`Callable`): Returns the names of the tasks.
    """
    handler = trainer.callback_handler
    for index, callback in enumerate(handler.callbacks):
        if type(callback) is PrinterCallback:
            handler.callbacks[index] = TaskPrinterCallback(tasks)
        elif type(callback) is ProgressCallback:
            shown = handler.callbacks[index] = TaskProgressCallback(tasks)
            shown.max_str_len = callback.max_str_len
