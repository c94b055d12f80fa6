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
        *("head_similarity", "aux_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_num_tokens"),
        *("eval_aux_loss", "train_samples_per_second", "train_steps_per_second", "train_tokens_per_second"),
    )
)
# What `Trainer.evaluate` adds to the metrics of one dataset.
_SPEEDS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
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
    hidden = {*(_FOR_TRACKERS - set(of_tasks)), *of_tasks[_MOST_TASKS:]}

    # The metrics of one dataset share a prefix, which that of its running time shows.
    prefix = min((name for name in logs if name.endswith("_runtime")), key=len, default="").removesuffix("_runtime")
    if prefix not in ("", "train"):
        hidden |= {f"{prefix}_{speed}" for speed in _SPEEDS}
    return {name: value for name, value in logs.items() if name not in hidden}


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

    The default is the last of its class, as `Trainer` adds it after the callbacks that it is given. Those, and
    callbacks of other classes, such as the notebook callback, are not replaced.

    Args:
        trainer (`Trainer`): The trainer.
        tasks (`Callable`): Returns the names of the tasks.
    """
    callbacks = trainer.callback_handler.callbacks
    for index, callback in reversed(list(enumerate(callbacks))):
        if type(callback) is PrinterCallback:
            callbacks[index] = TaskPrinterCallback(tasks)
            return
        if type(callback) is ProgressCallback:
            callbacks[index] = TaskProgressCallback(tasks)
            return
