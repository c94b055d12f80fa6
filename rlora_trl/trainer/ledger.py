"""Counts rows and tokens by task, and averages the training loss by task."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from torch.nn import functional as F

from ..reading import shorten
from .state_files import is_count
from .task_ids import IGNORED_LABEL, ROW_STARTS, TASK_IDS, token_mask_of


logger = get_logger(__name__)


class TaskLedger:
    """
    Counts the rows and tokens of each task that a run has seen, and sums the loss of each task since the last log.

    Rows and tokens are counted from the batch alone. Only the loss needs the model's outputs; if these lack it, one
    warning says so, and rows and tokens are still counted.

    Args:
        tasks (`Sequence[str]`): Names of the tasks, in the order of their ids.
        device (`torch.device`): Device of the counts.

    Attributes:
        has_log_probs (`bool`): Whether some outputs had `log_probs`; other outputs need not be kept then.
    """

    def __init__(self, tasks: Sequence[str], device: torch.device) -> None:
        self.tasks = list(tasks)
        # The last column is for rows of no known task.
        self.seen = torch.zeros(2, len(tasks) + 1, dtype=torch.int64, device=device)  # rows, tokens
        self.losses = torch.zeros(2, len(tasks) + 1, device=device)  # since the last log: tokens with a loss, losses
        # Over all ranks, from the checkpoint that this run resumed from.
        self.before = torch.zeros(2, len(tasks), dtype=torch.int64)  # rows, tokens
        self.has_log_probs = False
        self._has_warned = False

    def note(self, batch: dict[str, Any], outputs: Any) -> None:
        """
        Add a micro-batch.

        Args:
            batch (`dict[str, Any]`): From [`TaskCollator`], with task ids `[B]` or `[B, S]` (-1 for no task).
            outputs: The outputs of the model, `None` if they are not known.

        Raises:
            ValueError: If the numbers of rows and tokens of the batch are not known.
        """
        task_ids = batch[TASK_IDS]
        self.add(task_ids, token_mask_of(batch), batch.get(ROW_STARTS), batch_shape(batch))

        self.has_log_probs = self.has_log_probs or getattr(outputs, "log_probs", None) is not None
        log_probs = label_log_probs(outputs, batch)
        if log_probs is not None:
            self.add_losses(task_ids, *log_probs)
        elif not self._has_warned:
            self._has_warned = True
            logger.warning(_explain_missing(outputs))

    @torch.no_grad()
    def add(
        self,
        task_ids: torch.Tensor,
        token_mask: torch.Tensor | None,
        row_starts: torch.Tensor | None,
        shape: tuple[int, int],
    ) -> None:
        """
        Count the rows and tokens of a micro-batch.

        Args:
            task_ids (`torch.Tensor` of shape `[B]` or `[B, S]`): Tasks, -1 for none.
            token_mask (`torch.Tensor` of shape `[B, S]`, *optional*): Tokens that are not padding.
            row_starts (`torch.Tensor` of shape `[B, S]`, *optional*): Tokens that begin a row of the data, if rows are
                packed or joined.
            shape (`tuple[int, int]`): B and S.
        """
        starts = row_starts  # [B, S]
        if starts is None:
            # One row of the data in each, whatever side the padding is on.
            starts = torch.zeros(shape, dtype=torch.bool, device=task_ids.device)
            starts[:, 0] = True
        counted = torch.ones_like(starts) if token_mask is None else token_mask.bool()  # [B, S]

        tasks = self._task_of_tokens(task_ids, shape)
        for target, mask in ((self.seen[0], starts), (self.seen[1], counted)):
            target.index_add_(0, tasks.flatten(), mask.flatten().to(target))

    @torch.no_grad()
    def add_losses(self, task_ids: torch.Tensor, log_probs: torch.Tensor, labeled: torch.Tensor) -> None:
        """
        Add the losses of a micro-batch: of all tokens but the first `[B, S - 1]`, or of shifted labels `[B, S]`.

        Args:
            task_ids (`torch.Tensor` of shape `[B]` or `[B, S]`): Tasks, -1 for none.
            log_probs (`torch.Tensor` of shape `[B, S - 1]` or `[B, S]`): Log-probabilities of the labels.
            labeled (`torch.Tensor` of the same shape): Tokens with a loss.
        """
        if task_ids.ndim == 2:
            task_ids = task_ids[:, -log_probs.shape[1] :]
        tasks = self._task_of_tokens(task_ids, log_probs.shape).flatten()

        # A batch that is not finite, which may be skipped, must not hide the losses of all others.
        log_probs = log_probs.detach().to(self.losses)
        finite = torch.isfinite(log_probs)
        labeled = labeled.to(finite.device) & finite
        self.losses[0].index_add_(0, tasks, labeled.flatten().to(self.losses))
        self.losses[1].index_add_(0, tasks, -log_probs.where(labeled, 0.0).flatten())

    def _task_of_tokens(self, task_ids: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The column of each token `[B, S]`: its task, or the last for tokens of no task."""
        by_token = task_ids[:, None].expand(*shape) if task_ids.ndim == 1 else task_ids
        return torch.where(by_token < 0, len(self.tasks), by_token)

    def pop_mean_losses(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """
        Mean losses by task since the last call, and start again from zero.

        Args:
            reduce (`Callable`): Sums a tensor over all ranks.

        Returns:
            `dict[str, float]`: `<task>_loss` of each task that had tokens with a loss.
        """
        tokens, losses = reduce(self.losses).tolist()
        self.losses.zero_()
        return {
            f"{task}_loss": loss / count
            for task, loss, count in zip(self.tasks, losses, tokens, strict=False)
            if count > 0
        }

    def totals(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, dict[str, int]]:
        """
        Rows and tokens by task since training began.

        Args:
            reduce (`Callable`): Sums a tensor over all ranks.

        Returns:
            `dict[str, dict[str, int]]`: `{task: {"rows": ..., "tokens": ...}}`.
        """
        rows, tokens = (self.before + reduce(self.seen)[:, :-1].cpu()).tolist()
        return {
            task: {"rows": row, "tokens": token} for task, row, token in zip(self.tasks, rows, tokens, strict=True)
        }

    def load(self, totals: dict[str, dict[str, Any]]) -> None:
        """
        Continue from the totals of a checkpoint; see [`totals`].

        Raises:
            ValueError: If they are not counts by task.
        """
        if not isinstance(totals, Mapping):
            raise ValueError(f"the rows and tokens of tasks must be an object, got {shorten(totals)}")
        for index, task in enumerate(self.tasks):
            counts = totals.get(task, {})
            values = [counts.get(name, 0) for name in ("rows", "tokens")] if isinstance(counts, Mapping) else [None]
            if not all(map(is_count, values)):
                raise ValueError(f"the rows and tokens of task {task!r} must be counts, got {shorten(counts)}")
            self.before[:, index] = torch.tensor(values)
        self.seen.zero_()
        self.losses.zero_()


def batch_shape(batch: Mapping[str, Any]) -> tuple[int, int]:
    """
    The shape `[B, S]` of the tokens of a batch.

    Raises:
        ValueError: If no tensor of the batch has it.
    """
    for name in ("input_ids", "inputs_embeds", "labels", "shift_labels"):
        tensor = batch.get(name)
        if isinstance(tensor, torch.Tensor) and tensor.ndim >= 2:
            return tensor.shape[0], tensor.shape[1]
    raise ValueError(
        "Counting the tasks of a batch needs `input_ids` `[B, S]` (or `inputs_embeds`, `labels`), and the collator "
        f"returned {', '.join(sorted(batch)) or 'nothing'}. Have it add `input_ids`."
    )


@torch.no_grad()
def label_log_probs(outputs: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """
    Log-probabilities of the labels of a batch, and which tokens have a loss.

    They are the `log_probs` of TRL's fused head (trl 1.16), or are computed from `logits`.

    Args:
        outputs: The outputs of the model.
        batch (`Mapping[str, Any]`): The batch, with `labels` `[B, S]`, or `shift_labels` `[B, S]` where the sequence
            is divided among processes.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`, *optional*: Log-probabilities and a mask, `[B, S - 1]` or (of
        `shift_labels`) `[B, S]`; `None` if the outputs do not have them.
    """
    labels, shifted = batch.get("labels"), batch.get("shift_labels")
    targets = shifted if shifted is not None else None if labels is None else labels[:, 1:]
    if targets is None:
        return None

    log_probs = getattr(outputs, "log_probs", None)
    if log_probs is not None and log_probs.shape == targets.shape:
        return log_probs, targets != IGNORED_LABEL

    logits = getattr(outputs, "logits", None)
    if logits is None or logits.ndim != 3 or logits.shape[0] != targets.shape[0]:
        return None
    if logits.shape[1] not in (targets.shape[1], targets.shape[1] + 1):
        return None
    # Row by row, as a float32 copy of all logits may be gigabytes.
    rows = [
        F.cross_entropy(
            row[: target.shape[0]].float(), target.to(row.device), reduction="none", ignore_index=IGNORED_LABEL
        )
        for row, target in zip(logits, targets, strict=True)
    ]
    return -torch.stack(rows), targets != IGNORED_LABEL


def _explain_missing(outputs: Any) -> str:
    """Why there is no loss by task, and the remedy."""
    if outputs is None:
        received = "no forward pass of the model was seen in `compute_loss`"
    else:
        fields = outputs if isinstance(outputs, Mapping) else vars(outputs) if hasattr(outputs, "__dict__") else {}
        shapes = [f"`{name}` {list(v.shape)}" for name, v in fields.items() if isinstance(v, torch.Tensor)]
        received = f"found {type(outputs).__name__} with {', '.join(shapes) or 'no tensors'}"
    return (
        "`<task>_loss` is not logged: it needs outputs with `log_probs` of the labels (TRL's fused head) or `logits`, "
        f"and {received} (trl {importlib.metadata.version('trl')}). Training is not affected, and rows and tokens of "
        "tasks are counted. With a loss of your own, return outputs with `logits`; otherwise `pip install --upgrade "
        "rlora-trl` installs versions that were tested together."
    )
