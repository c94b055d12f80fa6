"""What was trained on, by task: rows, tokens, loss."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.logging import get_logger
from torch.nn import functional as F

from .task_ids import IGNORED_LABEL, ROW_STARTS, TASK_IDS, token_mask_of


logger = get_logger(__name__)


class TaskLedger:
    """
    Counts the rows and tokens of each task that a run has seen, and sums the loss of each since the last log.

    Rows and tokens are counted from the batch alone. Only the loss needs the model's outputs; where these lack it, one
    warning says so and the rest is counted all the same.

    Args:
        tasks (`Sequence[str]`): Names of the tasks, in the order of their ids.
        device (`torch.device`): Device of the counts.

    Attributes:
        has_log_probs (`bool`): Whether outputs have had `log_probs`, so that others are not worth keeping.
    """

    def __init__(self, tasks: Sequence[str], device: torch.device) -> None:
        self.tasks = list(tasks)
        # Rows and tokens; then, since the last log, tokens with a loss and their loss.
        self.seen = torch.zeros(2, len(tasks) + 1, dtype=torch.int64, device=device)
        self.losses = torch.zeros(2, len(tasks) + 1, device=device)
        # Totals over all ranks in the checkpoint that this run resumed from.
        self.before = torch.zeros(2, len(tasks), dtype=torch.int64)
        self.has_log_probs = False
        self._has_warned = False

    def note(self, batch: dict[str, Any], outputs: Any) -> None:
        """
        Add a micro-batch.

        Args:
            batch (`dict[str, Any]`): As the collator made it, with task ids `[B]` or `[B, S]` (-1 for no task).
            outputs: What the model returned for it, `None` if that is not known.

        Raises:
            ValueError: If the batch does not show its number of rows and tokens.
        """
        task_ids = batch[TASK_IDS]
        self.add(task_ids, token_mask_of(batch), batch.get(ROW_STARTS), batch_shape(batch))

        self.has_log_probs = self.has_log_probs or getattr(outputs, "log_probs", None) is not None
        found = label_log_probs(outputs, batch)
        if found is not None:
            self.add_losses(task_ids, *found)
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
            token_mask (`torch.Tensor` of shape `[B, S]`, *optional*): Tokens that are no padding.
            row_starts (`torch.Tensor` of shape `[B, S]`, *optional*): Tokens that begin a row of the data, if rows
                were packed or joined.
            shape (`tuple[int, int]`): B and S.
        """
        starts = row_starts
        if starts is None:
            starts = torch.zeros(shape, dtype=torch.bool, device=task_ids.device)
            starts[:, 0] = True
        counted = torch.ones_like(starts) if token_mask is None else token_mask.bool()

        tasks = self._task_of_tokens(task_ids, shape)
        # A row starts with a token even where the padding is on the left.
        for target, mask in ((self.seen[0], starts), (self.seen[1], counted)):
            target.index_add_(0, tasks.flatten(), mask.flatten().to(target))

    @torch.no_grad()
    def add_losses(self, task_ids: torch.Tensor, log_probs: torch.Tensor, labeled: torch.Tensor) -> None:
        """
        Add the losses of a micro-batch, whose labels are those of all tokens but the first, or of each token the next.

        Args:
            task_ids (`torch.Tensor` of shape `[B]` or `[B, S]`): Tasks, -1 for none.
            log_probs (`torch.Tensor` of shape `[B, S - 1]` or `[B, S]`): Log-probabilities of the labels.
            labeled (`torch.Tensor` of the same shape): Tokens with a loss.
        """
        if task_ids.ndim == 2:
            task_ids = task_ids[:, -log_probs.shape[1] :]
        tasks = self._task_of_tokens(task_ids, log_probs.shape).flatten()

        # One batch that is not finite, which may be left out of training, shall not hide the loss of all others.
        log_probs = log_probs.detach().to(self.losses)
        finite = torch.isfinite(log_probs)
        labeled = labeled.to(finite.device) & finite
        self.losses[0].index_add_(0, tasks, labeled.flatten().to(self.losses))
        self.losses[1].index_add_(0, tasks, -log_probs.where(labeled, 0.0).flatten())

    def _task_of_tokens(self, task_ids: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The task of each token `[B, S]`; those of no task count in the last column."""
        by_token = task_ids[:, None].expand(*shape) if task_ids.ndim == 1 else task_ids
        return torch.where(by_token < 0, len(self.tasks), by_token)

    def tell(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """Mean loss of each task that had one since the last call, as `<task>_loss`, over all ranks."""
        tokens, losses = reduce(self.losses).tolist()
        self.losses.zero_()
        return {
            f"{task}_loss": loss / count
            for task, loss, count in zip(self.tasks, losses, tokens, strict=False)
            if count > 0
        }

    def totals(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, dict[str, int]]:
        """Rows and tokens of each task, over all ranks, since training began."""
        rows, tokens = (self.before + reduce(self.seen)[:, :-1].cpu()).tolist()
        return {
            task: {"rows": row, "tokens": token} for task, row, token in zip(self.tasks, rows, tokens, strict=True)
        }

    def load(self, totals: dict[str, dict[str, Any]]) -> None:
        """Continue from what [`totals`] returned."""
        for place, task in enumerate(self.tasks):
            known = totals.get(task, {})
            self.before[:, place] = torch.tensor([int(known.get("rows", 0)), int(known.get("tokens", 0))])
        self.seen.zero_()
        self.losses.zero_()


def batch_shape(batch: Mapping[str, Any]) -> tuple[int, int]:
    """
    Rows and tokens of a batch, padding included.

    Raises:
        ValueError: If no tensor of the batch shows them.
    """
    for name in ("input_ids", "inputs_embeds", "labels", "shift_labels"):
        tensor = batch.get(name)
        if isinstance(tensor, torch.Tensor) and tensor.ndim >= 2:
            return tensor.shape[0], tensor.shape[1]
    raise ValueError(
        "The tasks of a batch are counted by its `input_ids` `[B, S]` (or `inputs_embeds`, `labels`), and the "
        f"collator made a batch of {', '.join(sorted(batch)) or 'nothing'}. Have the collator add `input_ids`."
    )


@torch.no_grad()
def label_log_probs(outputs: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """
    Log-probabilities of the labels of a batch, and which tokens have a loss; `None` where outputs do not have them.

    They are `log_probs` of TRL's fused head (trl 1.16), or are computed from `logits`.

    Args:
        outputs: What the model returned.
        batch (`Mapping[str, Any]`): The batch, with `labels` `[B, S]`, or `shift_labels` `[B, S]` where the sequence
            is divided among processes.
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
    """Why there is no loss by task, what was found, and what to do."""
    if outputs is None:
        found = "no forward pass of the model was seen in `compute_loss`"
    else:
        fields = outputs if isinstance(outputs, Mapping) else vars(outputs) if hasattr(outputs, "__dict__") else {}
        shapes = [f"`{name}` {list(v.shape)}" for name, v in fields.items() if isinstance(v, torch.Tensor)]
        found = f"found {type(outputs).__name__} with {', '.join(shapes) or 'no tensors'}"
    return (
        "`<task>_loss` is not logged: it needs outputs with `log_probs` of the labels (TRL's fused head) or `logits`, "
        f"and {found} (trl {importlib.metadata.version('trl')}). Training is not affected, and the rows and tokens of "
        "tasks are counted. With a loss of your own, return outputs with `logits`; otherwise `pip install --upgrade "
        "rlora-trl` installs versions that were tested together."
    )
