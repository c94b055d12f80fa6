"""Counts how much the tokens of each task use each head, for evaluation."""

from __future__ import annotations

import torch


class HeadUsage:
    """
    Sums of the head weights by task and layer.

    Args:
        num_tasks (`int`), num_layers (`int`), num_heads (`int`): Sizes.
        device (`torch.device`, *optional*): Where the sums are kept.

    Attributes:
        weights (`torch.Tensor` of shape `[num_tasks + 1, num_layers, num_heads]`): Sums of head weights; the last row
            is for tokens without a task.
        tokens (`torch.Tensor` of shape `[num_tasks + 1, num_layers]`): Number of tokens in each sum.
    """

    def __init__(
        self, num_tasks: int, num_layers: int, num_heads: int, device: torch.device | str | None = None
    ) -> None:
        self.weights = torch.zeros(num_tasks + 1, num_layers, num_heads, device=device)
        self.tokens = torch.zeros(num_tasks + 1, num_layers, device=device)

    def add(self, layer: int, weights: torch.Tensor, task_ids: torch.Tensor | None, mask: torch.Tensor | None) -> None:
        """
        Add the tokens of one layer.

        Args:
            layer (`int`): Index of the layer.
            weights (`torch.Tensor` of shape `[T, N]`): Head weights; N may be smaller than `num_heads`.
            task_ids (`torch.Tensor` of shape `[T]`, *optional*): Tasks, negative for tokens without a task.
            mask (`torch.Tensor` of shape `[T]`, *optional*): Zero where a token does not count.
        """
        no_task = self.weights.shape[0] - 1
        if task_ids is None:
            task_ids = torch.full(weights.shape[:1], no_task, device=weights.device)
        task_ids = torch.where(task_ids < 0, no_task, task_ids)  # [T]

        # `where` rather than a product: the weights of padding may be NaN.
        counted = torch.ones_like(weights[:, 0]) if mask is None else mask.to(weights.dtype)  # [T]
        weights = torch.where(counted[:, None] > 0, weights, 0.0).to(self.weights)  # [T, N]

        num_heads = weights.shape[1]
        self.weights[:, layer, :num_heads].index_add_(0, task_ids, weights)
        self.tokens[:, layer].index_add_(0, task_ids, counted.to(self.tokens))
