"""The line that the console shows of a log: selected entries, short. Trackers get all entries in full."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerControl, TrainerState, TrainingArguments

from ..reading import printable


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
# Characters of a line where there is no terminal to ask, and the fewest that a line is cut to.
_WIDTH, _LEAST_WIDTH = 160, 60
_SHORT_NAMES = {"learning_rate": "lr"}


def select_for_console(logs: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """
    Select the entries of a log for the console.

    In training these are the loss, the learning rate, the largest share of a head, and the losses of the tasks (the
    six highest, if there are more); in evaluation losses, accuracies, and custom metrics.

    Args:
        logs (`Mapping[str, Any]`): All entries, as `Trainer.log` gets them.
        tasks (`Sequence[str]`): Names of the tasks.
    """
    of_tasks = sorted(_losses_of_tasks(logs, tasks), key=lambda name: logs[name], reverse=True)
    hidden = {*(_FOR_TRACKERS - set(of_tasks)), *of_tasks[_MOST_TASKS:]}

    # The metrics of one dataset share a prefix, which that of its running time shows.
    prefix = min((name for name in logs if name.endswith("_runtime")), key=len, default="").removesuffix("_runtime")
    if prefix not in ("", "train"):
        hidden |= {f"{prefix}_{speed}" for speed in _SPEEDS}
    return {name: value for name, value in logs.items() if name not in hidden}


def _losses_of_tasks(logs: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, str]:
    """The task of each entry that is the loss of one in training, by name of the entry."""
    names = {f"{prefix}{task}_loss": task for task in tasks for prefix in ("", "task_")}
    return {name: names[name] for name in logs if name in names}


def describe_log(logs: Mapping[str, Any], tasks: Sequence[str], *, step: int, max_steps: int, width: int) -> str:
    """
    A log as a line of text, for example

        step 10/60  loss 4.369  lr 0.001985  head_load_max 0.3714  epoch 0.1  by task: sst2 6.388  rte 5.1  +8 tasks

    Entries are those of [`select_for_console`], under the names that trackers have (`lr` is `learning_rate`). Of the
    losses by task, the highest first, as many are shown as the line has room for; other entries go to further lines.

    Args:
        logs (`Mapping[str, Any]`): All entries, as `Trainer.log` gets them.
        tasks (`Sequence[str]`): Names of the tasks.
        step (`int`): The optimizer step.
        max_steps (`int`): Steps of the run; 0 if they are unknown.
        width (`int`): Characters of a line.
    """
    shown = select_for_console(logs, tasks)
    task_of = _losses_of_tasks(logs, tasks)
    entries = [
        f"{printable(_SHORT_NAMES.get(name, name))} {_format(value)}"
        for name, value in shown.items()
        if name not in task_of
    ]
    lines = [f"step {step}/{max_steps}" if max_steps > 0 else f"step {step}"]
    for entry in entries:
        if len(lines[-1]) + 2 + len(entry) > width:
            lines.append("")
        lines[-1] += f"  {entry}"

    # The losses by task, highest first.
    by_task = sorted((name for name in shown if name in task_of), key=lambda name: shown[name], reverse=True)
    losses = [f"{printable(task_of[name])} {_format(shown[name])}" for name in by_task]
    for count in range(len(losses), 0, -1):
        left_out = len(task_of) - count
        more = f"  +{left_out} task{'s' if left_out > 1 else ''}" if left_out else ""
        end = f"  by task: {'  '.join(losses[:count])}{more}"
        if len(lines[-1]) + len(end) <= width:
            lines[-1] += end
            break
    return "\n".join(lines)


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


class _OnConsole:
    """Shows logs as lines of [`describe_log`]."""

    def __init__(self, tasks: Callable[[], Sequence[str]]) -> None:
        super().__init__()
        self._tasks = tasks

    def _write(self, state: TrainerState, logs: Mapping[str, Any]) -> None:
        width = max(_LEAST_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns)
        # Above the progress bars, if there are any.
        tqdm.write(describe_log(logs, self._tasks(), step=state.global_step, max_steps=state.max_steps, width=width))


class TaskProgressCallback(_OnConsole, ProgressCallback):
    """`ProgressCallback` that shows logs as lines of [`describe_log`]."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # As in the base class, an evaluation without training shows no log.
        if logs is not None and state.is_world_process_zero and self.training_bar is not None:
            self._write(state, logs)


class TaskPrinterCallback(_OnConsole, PrinterCallback):
    """`PrinterCallback` that shows logs as lines of [`describe_log`]."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and state.is_local_process_zero:
            self._write(state, logs)


def shorten_console_logs(trainer: Trainer, tasks: Callable[[], Sequence[str]]) -> None:
    """
    Show logs on the console as lines of [`describe_log`], in place of the default callbacks of transformers.

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
