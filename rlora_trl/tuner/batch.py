"""The context of a batch for the layers, and checks of task ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from ..kernels import RoutingTally
from .head_usage import HeadUsage


# Names of tasks, or their indices in `RLoraConfig.tasks`.
TaskIds: TypeAlias = torch.Tensor | np.ndarray | Sequence[int] | Sequence[str]
IN_TRAINERS = "for `transformers.Trainer` a column of integers, and `remove_unused_columns=False`"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class BatchContext(NamedTuple):
    """
    The context of a batch: everything besides the input that the layers of one adapter use.

    [`Routing.using`] sets it. A recomputation (activation checkpointing) gets the context of the forward pass that it
    repeats.

    Args:
        task_ids (`torch.Tensor` of shape `[B]` or `[B, S]`, *optional*): Tasks of rows or tokens, -1 for none.
        task (`int`, *optional*): Task of all tokens if `task_ids` is not set; see [`set_task`].
        token_mask (`torch.Tensor` of shape `[B, S]`, *optional*): Zero where a token does not count.
        tally (`RoutingTally`, *optional*): Collects the routing statistics of a training step.
        usage ([`HeadUsage`], *optional*): Collects the head weights of an evaluation.
        seed (`int`, *optional*): Seed of all dropout masks of the batch; without it each layer draws its own.
        seed_tensor (`torch.Tensor`, *optional*): The same seed in memory: a compiled graph would bake in a number.
        rows_repeat (`bool`, *optional*, defaults to `False`): Layers may get each row several times in a row, as in
            beam search and multiple choice.
        lengths (`tuple[int]`, *optional*): Sequence lengths of the batch (those of encoder and decoder may differ);
            empty where they are unknown.
        groups (`InputGroups`, *optional*): Layers that get the same input.
        copies (`int`, *optional*): How often `generate` repeats each row at present. An encoder gets each row once.
    """

    task_ids: torch.Tensor | None = None
    task: int | None = None
    token_mask: torch.Tensor | None = None
    tally: RoutingTally | None = None
    usage: HeadUsage | None = None
    seed: int | None = None
    seed_tensor: torch.Tensor | None = None
    rows_repeat: bool = False
    lengths: tuple[int, ...] = ()
    groups: Any = None
    copies: int | None = None

    def fits(self, shape: torch.Size) -> bool:
        """Whether `task_ids` determine the task of each token of an input `[*shape, d_in]`."""
        assert self.task_ids is not None
        # One task for each token.
        if self.task_ids.ndim == 2:
            return self.task_ids.shape == shape or (len(shape) == 1 and shape.numel() == self.task_ids.numel())

        # One task for each row. All of a batch of one row belongs to it, such as the patches of its pictures.
        rows = self.task_ids.shape[0]
        if rows == 1:
            return True
        if len(shape) > 1 and self.copies is not None:
            return shape[0] in (rows, rows * self.copies)
        if len(shape) > 1:
            return shape[0] == rows or (self.rows_repeat and rows > 0 and shape[0] % rows == 0)

        # Rows and tokens are flattened into one dimension. Experts see a subset of the tokens, which has no rows.
        sizes = [rows * length for length in self.lengths] or [rows]
        exact = bool(self.lengths) and not self.rows_repeat
        return any(size > 0 and (shape[0] == size if exact else shape[0] % size == 0) for size in sizes)


class BatchShape(NamedTuple):
    """
    Sizes of the batch that a model is called with.

    Args:
        rows (`int`): Number of rows, B.
        shape (`torch.Size`, *optional*): `[B, S]`, where a row is one sequence of tokens.
        rows_repeat (`bool`), lengths (`tuple[int]`): See [`BatchContext`].
        input_ids (`torch.Tensor` of shape `[B, S]`, *optional*): The tokens, if they are passed as such.
    """

    rows: int
    shape: torch.Size | None
    rows_repeat: bool
    lengths: tuple[int, ...]
    input_ids: torch.Tensor | None = None


def describe_batch(args: Sequence[Any], kwargs: Mapping[str, Any], generates: bool = False) -> BatchShape | None:
    """
    Find the sizes of a batch in the arguments of `forward` or `generate`.

    Args:
        args (`Sequence`), kwargs (`Mapping`): The arguments.
        generates (`bool`, *optional*, defaults to `False`): Tokens are generated, so lengths grow.

    Returns:
        [`BatchShape`], or `None` if no argument is a tensor.
    """
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor) and value.ndim}
    first = next((value for value in args if isinstance(value, torch.Tensor) and value.ndim), None)
    if first is not None:
        tensors.setdefault("inputs_embeds" if first.is_floating_point() else "input_ids", first)

    # Without tokens, the input may be an image or audio, with the batch as its first dimension.
    tokens = next((tensors[name] for name in ("input_ids", "inputs", "inputs_embeds") if name in tensors), None)
    if tokens is None:
        other = next(iter(tensors.values()), None)
        return None if other is None else BatchShape(other.shape[0], None, generates, ())

    # Multiple choice has one more dimension: [B, C, S] and [B, C, S, d].
    axes = tokens.ndim - tokens.is_floating_point()
    sequences = [tokens] + [tensors[name] for name in ("decoder_input_ids", "labels") if name in tensors]
    lengths = () if generates or axes != 2 else tuple({x.shape[1] for x in sequences if x.ndim > 1})
    shape = tokens.shape[:2] if axes == 2 else None
    input_ids = None if tokens.is_floating_point() else tokens
    return BatchShape(tokens.shape[0], shape, generates or axes > 2, lengths, input_ids)


def task_index(task: str | int, tasks: Sequence[str]) -> int:
    """
    The index of a task in the tasks of an adapter.

    Args:
        task (`str` or `int`): Its name or its index.
        tasks (`Sequence[str]`): The adapter's tasks.

    Raises:
        ValueError: If the adapter has no such task.
    """
    if isinstance(task, str) and task in tasks:
        return tasks.index(task)
    if isinstance(task, Integral) and not isinstance(task, bool) and 0 <= task < len(tasks):
        return int(task)
    names = ", ".join(f"{index}: {name}" for index, name in enumerate(tasks)) or "(none)"
    raise ValueError(
        f"The adapter has no task {task!r}; it has {names}. Use one of these names or indices, or "
        "None for the mean over all tasks."
    )


def resolve_task_ids(task_ids: TaskIds, tasks: Sequence[str]) -> torch.Tensor:
    """
    Convert task ids as a user passes them to a tensor of indices.

    Args:
        task_ids (`torch.Tensor`, `np.ndarray`, `pandas.Series` or `list`): Names or indices of tasks.
        tasks (`Sequence[str]`): The adapter's tasks.

    Returns:
        `torch.Tensor` of shape `[B]` or `[B, S]`: Indices, -1 for no task.

    Raises:
        TypeError: If they are neither a list of names or indices nor a tensor of integers.
        ValueError: If the adapter lacks a task.
    """
    # Arrays of NumPy and pandas hold integers or names.
    if isinstance(task_ids, np.ndarray):
        task_ids = torch.from_numpy(task_ids) if task_ids.dtype.kind in "iu" else task_ids.tolist()
    if not isinstance(task_ids, str | torch.Tensor) and hasattr(task_ids, "tolist"):
        task_ids = task_ids.tolist()

    # A list has one entry for each row.
    if isinstance(task_ids, Sequence) and not isinstance(task_ids, str) and not _is_nested(task_ids):
        return torch.tensor([task_index(task, tasks) for task in task_ids], dtype=torch.int64)  # [B]

    if not isinstance(task_ids, torch.Tensor) or task_ids.dtype not in _INTEGERS or task_ids.ndim not in (1, 2):
        received = "a list of lists" if isinstance(task_ids, list) else repr(task_ids)
        if isinstance(task_ids, torch.Tensor):
            received = f"a tensor {list(task_ids.shape)} of {task_ids.dtype}"
        raise TypeError(
            f"`task_ids` must be a list with the task of each row, such as {list(tasks[:2])!r}, or a tensor of "
            f"integers with one for each row or for each token, got {received}. To use one task for all rows, repeat "
            "it or call `set_task`."
        )
    if task_ids.numel():
        smallest, largest = map(int, task_ids.aminmax())
        if smallest < -1 or largest >= len(tasks):
            task_index(largest if largest >= len(tasks) else smallest, tasks)
    return task_ids


def _is_nested(task_ids: Sequence[Any]) -> bool:
    nested = [isinstance(entry, list | tuple | np.ndarray | torch.Tensor) and np.ndim(entry) > 0 for entry in task_ids]
    return bool(nested) and all(nested)


def check_task_ids(task_ids: torch.Tensor, batch: BatchShape, generates: bool) -> None:
    """
    Check the shape of task ids against the batch.

    Args:
        task_ids (`torch.Tensor` of shape `[B]` or `[B, S]`): The task ids.
        batch ([`BatchShape`]): Sizes of the batch.
        generates (`bool`): Tokens are generated, and have the tasks of their rows.

    Raises:
        ValueError: If there is neither one for each row nor one for each token.
    """
    if task_ids.ndim == 1 and len(task_ids) == batch.rows:
        return
    by_token = None if generates else batch.shape
    if task_ids.ndim == 2 and task_ids.shape == by_token:
        return
    remedy = "" if by_token is None else f", or a tensor {list(by_token)} with one for each token"
    raise ValueError(
        f"`task_ids` has shape {list(task_ids.shape)}, but the batch has {batch.rows} rows. Pass one for each "
        f"row{remedy}."
    )
