"""Observes training steps: use of heads, counts and losses by task, gradients."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch import nn

from ..kernels import RoutingTally
from ..tuner import MultiHeadAdapter
from .config import RLoraSFTConfig
from .gradients import FirstGradients, gradient_norms
from .ledger import TaskLedger
from .monitor import RoutingMonitor, head_similarity
from .nan_policy import NanGuard
from .task_ids import TASK_IDS, count_tokens


logger = get_logger(__name__)


class StepObserver:
    """
    Observes the training steps of one trainer, for its logs, its balance loss and its checkpoints.

    Args:
        adapters (`dict[str, MultiHeadAdapter]`): The adapters in training, by name.
        tasks (`Sequence[str]`): Names of the tasks, in the order of their ids.
        args ([`RLoraSFTConfig`]): Configuration of the run.
        model (`torch.nn.Module`): The model in training.
        accelerator (`Callable[[], Accelerator]`): Returns the trainer's, which a hyperparameter search may replace.

    Attributes:
        monitor ([`RoutingMonitor`], *optional*): Use of heads, if adapters have a router.
        ledger ([`TaskLedger`], *optional*): Counts and losses by task, if the data name tasks.
        nan_guard ([`NanGuard`]): Applies `nan_policy` to steps with gradients that are not finite.
        records_step (`bool`): Whether layers write statistics in the running step.
    """

    def __init__(
        self,
        adapters: Mapping[str, MultiHeadAdapter],
        tasks: Sequence[str],
        args: RLoraSFTConfig,
        model: nn.Module,
        accelerator: Callable[[], Accelerator],
    ) -> None:
        self.adapters = dict(adapters)
        self._balances = args.balances
        self.ledger = TaskLedger(tasks, args.device) if tasks else None
        self.nan_guard = NanGuard(args.nan_policy, model)
        self.monitor: RoutingMonitor | None = None
        routed = [adapter for adapter in self.adapters.values() if adapter.router is not None]
        if routed:
            scope = args.balance_scope == "global"
            self.monitor = RoutingMonitor(routed, args.balance_loss, args.balance_coef, scope, args.device)

        self._accelerator = accelerator
        self.records_step = False
        self._gradient_norms: dict[str, float] = {}
        self._first_gradients: FirstGradients | None = None
        self._is_fresh = False
        self._outputs: Any = None

    def reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over ranks."""
        return self._accelerator().reduce(tensor, "sum") if self._accelerator().num_processes > 1 else tensor

    # A run

    @contextmanager
    def watching_first_step(self, *, is_fresh: bool) -> Generator[None, None, None]:
        """
        Report gradients that are missing or zero in the first step of a run.

        Args:
            is_fresh (`bool`): Whether the adapters have their initial values.
        """
        self._is_fresh = is_fresh
        self._watch_first_gradients()
        try:
            yield
        finally:
            self._end_first_gradients(report=False)

    def restart(self) -> None:
        """Discard the observations of an abandoned attempt."""
        self._gradient_norms = {}
        self.nan_guard.restart()
        if self.monitor is not None:
            self.monitor.restart()
        if self._first_gradients is None or self._first_gradients.squares:
            self._watch_first_gradients()

    def _watch_first_gradients(self) -> None:
        self._end_first_gradients(report=False)
        self._first_gradients = FirstGradients(self.adapters, fresh=self._is_fresh)

    def _end_first_gradients(self, *, report: bool) -> None:
        watched, self._first_gradients = self._first_gradients, None
        if watched is None:
            return
        watched.close()
        for problem in watched.report() if report else []:
            logger.warning(f"The first step gave {problem}")

    # A step

    def begin_step(self, batches: Sequence[dict[str, Any]], *, will_log: bool, ranks_alike: int) -> None:
        """
        Begin a step.

        Args:
            batches (`Sequence[dict]`): Its micro-batches on this rank.
            will_log (`bool`): Whether the step ends in a log.
            ranks_alike (`int`): Number of ranks that have the same batches.
        """
        self.records_step = bool(batches) and self.monitor is not None and (self._balances or will_log)
        if self.monitor is None or not self.records_step:
            return
        tokens = torch.as_tensor(sum(count_tokens(batch) for batch in batches), dtype=torch.float32)
        if self._balances:
            averaged_over = self._accelerator().num_processes // ranks_alike
            self.monitor.begin_step(tokens / ranks_alike, averaged_over, self.reduce)
        else:
            self.monitor.begin_step(tokens, 1, lambda tensor: tensor)

    def tally(self, batch: dict[str, Any], divided_by: int) -> RoutingTally:
        """
        The tally to which the layers add the statistics of a micro-batch, in a step that records them.

        Args:
            batch (`dict`): The micro-batch.
            divided_by (`int`): Divisor that the trainer will apply to its loss.
        """
        assert self.monitor is not None
        return self.monitor.tally(divided_by, count_tokens(batch))

    @contextmanager
    def reading_outputs(self, model: nn.Module, batch: dict[str, Any]) -> Generator[None, None, None]:
        """Count the tasks of a micro-batch, and their losses from the outputs of the model in this `with` block."""
        if self.ledger is None or TASK_IDS not in batch:
            yield
            return
        # Removed after one pass: a model with a reference to its trainer can't be copied or pickled.
        hook = model.register_forward_hook(self._keep_outputs)
        try:
            yield
            self.ledger.note(batch, self._outputs)
        finally:
            hook.remove()
            self._outputs = None

    def _keep_outputs(self, module: nn.Module, args: Any, outputs: Any) -> None:
        assert self.ledger is not None
        # With a custom loss or label smoothing the model runs twice. Only the pass with the fused head counts then;
        # the logits of the other are not kept alive.
        has_log_probs = getattr(outputs, "log_probs", None) is not None
        if has_log_probs or (self._outputs is None and not self.ledger.has_log_probs):
            self._outputs = outputs

    def end_step(self, *, is_skipped: bool, will_log: bool) -> None:
        """
        Observe the gradients of a step, after the last backward pass and before clipping.

        Args:
            is_skipped (`bool`): Whether the step is skipped, as its gradients are not finite.
            will_log (`bool`): Whether it ends in a log.
        """
        if is_skipped and self.monitor is not None:
            self.monitor.drop_step()
        if will_log:
            scaler = self._accelerator().scaler
            scale = scaler.get_scale() if scaler is not None else 1.0
            norms = gradient_norms(list(self.adapters.values()))
            self._gradient_norms = {name: norm / scale for name, norm in norms.items()}
        self._end_first_gradients(report=True)

    def extend_logs(self, logs: dict[str, float]) -> None:
        """Add the observations since the last log. Call it on all ranks."""
        if self.monitor is not None:
            logs.update(self.monitor.summary(self.reduce))
        similarity = head_similarity(list(self.adapters.values()))
        if similarity is not None:
            logs["head_similarity"] = similarity
        logs.update(self._gradient_norms)
        if self.nan_guard.skipped:
            logs["skipped_steps"] = self.nan_guard.skipped
        if self.ledger is not None:
            by_task = self.ledger.pop_mean_losses(self.reduce)
            # The name of a task may clash with another entry.
            logs.update({name if name not in logs else f"task_{name}": loss for name, loss in by_task.items()})

    # Checkpoints

    def tasks_seen(self) -> dict[str, dict[str, int]]:
        """Rows and tokens of each task so far. Call it on all ranks."""
        return {} if self.ledger is None else self.ledger.totals(self.reduce)

    def load_tasks_seen(self, seen: dict[str, dict[str, int]] | None) -> None:
        """Continue counting from what [`tasks_seen`] returned."""
        if self.ledger is not None:
            self.ledger.load({} if seen is None else seen)

    def head_sums(self) -> list[list[float]] | None:
        """Sums of the last step that a balance loss over whole steps uses in the next. Call it on all ranks."""
        return None if self.monitor is None else self.monitor.state(self._accelerator().gather)

    def load_head_sums(self, sums: list[list[float]] | None) -> None:
        """Continue from what [`head_sums`] returned."""
        if self.monitor is not None:
            self.monitor.load_state(sums, self._accelerator().process_index, self._accelerator().num_processes)
