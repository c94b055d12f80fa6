"""Early stopping in evaluation by task: its callback sees only the evaluation that has its metric."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from transformers import EarlyStoppingCallback
from transformers.trainer_callback import CallbackHandler


class EarlyStopping:
    """
    Keeps `EarlyStoppingCallback` out of evaluations that don't have its metric.

    `Trainer` calls its callbacks after the evaluation of each dataset of a dictionary, and this one warns that it is
    disabled if it does not find `metric_for_best_model` (no upstream issue as of transformers 5.23).

    Args:
        handler (`CallbackHandler`): The callbacks of the trainer.
        args (`TrainingArguments`): Has `metric_for_best_model`.
        tasks (`Sequence[str]`): Names of the datasets.
        prefix (`str`): Prefix of the metrics, such as `"eval"`.
    """

    def __init__(self, handler: CallbackHandler, args: Any, tasks: Sequence[str], prefix: str) -> None:
        self.handler = handler
        self.is_for_training = prefix == "eval"
        metric = args.metric_for_best_model or "loss"
        self.metric = metric if metric.startswith("eval_") else f"eval_{metric}"
        # The longest first: a name may be a prefix of another.
        names = sorted((f"{prefix}_{task}" for task in tasks), key=len, reverse=True)
        self.part = next((name for name in names if self.metric.startswith(f"{name}_")), None)

    def at_task(self, prefix: str) -> AbstractContextManager[None]:
        """A context for the evaluation of one task, whose metrics have this prefix."""
        return nullcontext() if prefix == self.part else self._without_callback()

    def at_means(self, metrics: Mapping[str, float], means: Mapping[str, float]) -> AbstractContextManager[None]:
        """A context for the means over tasks, where the callback may warn of a missing metric."""
        seen = self.metric in metrics and self.metric not in means
        return self._without_callback() if seen or not self.is_for_training else nullcontext()

    @contextmanager
    def _without_callback(self) -> Generator[None, None, None]:
        callbacks = self.handler.callbacks
        self.handler.callbacks = [entry for entry in callbacks if not isinstance(entry, EarlyStoppingCallback)]
        try:
            yield
        finally:
            self.handler.callbacks = callbacks
