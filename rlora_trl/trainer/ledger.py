"""What was trained on, by task: rows, tokens, loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class TaskLedger:
    """
    Counts the rows and tokens of each task that a run has seen, and sums the loss of each since it was last told.

    Args:
        tasks (`Sequence[str]`): Names of the tasks, in the order of their ids.
        device (`torch.device`): Where losses are.
    """

    def __init__(self, tasks: Sequence[str], device: torch.device) -> None:
        self.tasks = list(tasks)
        # Rows and tokens; then, since the last log, tokens with a loss and their loss.
        self.seen = torch.zeros(2, len(tasks) + 1, dtype=torch.int64, device=device)
        self.losses = torch.zeros(2, len(tasks) + 1, device=device)
        # What ranks had seen in all when this run went on from a checkpoint.
        self.before = torch.zeros(2, len(tasks), dtype=torch.int64)

    @torch.no_grad()
    def add(
        self,
        task_ids: torch.Tensor,
        token_mask: torch.Tensor | None,
        row_starts: torch.Tensor | None,
        log_probs: torch.Tensor,
        label_mask: torch.Tensor,
    ) -> None:
        """
        Add a micro-batch.

        Args:
            task_ids (`torch.Tensor` of shape `[B]` or `[B, S]`): Tasks, -1 for none.
            token_mask (`torch.Tensor` of shape `[B, S]`, *optional*): Tokens that are no padding.
            row_starts (`torch.Tensor` of shape `[B, S]`, *optional*): Tokens that begin a row of the data, if rows
                were packed or joined.
            log_probs (`torch.Tensor` of shape `[B, S - 1]`): Log-probabilities of the labels.
            label_mask (`torch.Tensor` of shape `[B, S - 1]`): Tokens with a loss.
        """
        rows, width = log_probs.shape[0], log_probs.shape[1] + 1
        starts = row_starts
        if starts is None:
            starts = torch.zeros(rows, width, dtype=torch.bool, device=log_probs.device)
            starts[:, 0] = True
        by_token = task_ids[:, None].expand(rows, width) if task_ids.ndim == 1 else task_ids
        nobody = len(self.tasks)
        by_token = torch.where(by_token < 0, nobody, by_token)
        counted = torch.ones_like(starts) if token_mask is None else token_mask.bool()
        # A row starts with a token even where the padding is on the left.
        for target, mask in ((self.seen[0], starts), (self.seen[1], counted)):
            target.index_add_(0, by_token.flatten(), mask.flatten().to(target))
        labelled = by_token[:, 1:].flatten()
        # One batch that is not finite, which may be left out of training, shall not hide the loss of all others.
        finite = torch.isfinite(log_probs)
        self.losses[0].index_add_(0, labelled, (label_mask & finite).flatten().to(self.losses))
        self.losses[1].index_add_(0, labelled, -log_probs.where(finite, 0.0).flatten().to(self.losses))

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
        """Go on from what [`totals`] gave."""
        for place, task in enumerate(self.tasks):
            known = totals.get(task, {})
            self.before[:, place] = torch.tensor([int(known.get("rows", 0)), int(known.get("tokens", 0))])
        self.seen.zero_()
        self.losses.zero_()
