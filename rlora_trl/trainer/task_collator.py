"""A data collator that adds the task ids of a batch to what any other collator returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.utils import logging
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .task_ids import IGNORED_LABEL, ROW_START_MARK, ROW_STARTS, TASK_IDS, TOKEN_MASK


logger = logging.get_logger(__name__)


class _Piece(NamedTuple):
    """Where the tokens of one example are in one row of a batch."""

    example: int
    columns: np.ndarray  # of its tokens in the row
    first: int = 0  # the token of the example that is at the first of these columns
    fit: int = 2  # 2: all of its tokens and no others; 1: it is truncated; 0: tokens were added, or are not known


class TaskCollator:
    """
    Wraps any collator, and adds the tasks of the batch.

    Adds task ids to the batch if examples have them: `[B]`, or `[B, S]` with -1 for padding where rows were packed or
    joined (padding-free), with a mask `[B, S]` of the tokens that begin a row. Adds a mask of the tokens that are not
    padding if the batch has no attention mask.

    The collator may pad on either side, truncate, drop, repeat or reorder rows, or join all in one row: examples are
    found by their tokens. A collator that changes tokens must return one row per example, in order.

    Args:
        collator (`Callable`): Makes a batch of examples, with `input_ids` `[B, S]`.
        required (`bool`, *optional*, defaults to `False`):
            Whether each row needs a task. Otherwise rows without a matching example have none, with a warning.

    Raises:
        TypeError: If the collator does not return a mapping.
        ValueError: If tasks are required, and the task of a row is unknown.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Any], required: bool = False) -> None:
        self.collator = collator
        self.required = required
        # TRL's own keeps rows in their order, and has an attribute for joining them.
        self._is_trl = type(collator) is DataCollatorForLanguageModeling

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        task_ids: list[Any] = [example.get(TASK_IDS) for example in examples]
        rest = [{name: value for name, value in example.items() if name != TASK_IDS} for example in examples]
        # Copied, because the collator may change its input. Images become tokens only in the collator.
        tokens = [_copy_of(example["input_ids"]) for example in examples] if "input_ids" in examples[0] else None
        batch = _as_tensors(self.collator(rest))

        # Without tokens to compare, assume one row per example, in order.
        ids = batch.get("input_ids")
        if tokens is None or not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            if task_ids[0] is not None:
                batch[TASK_IDS] = self._by_order(task_ids, batch)
            return batch
        mask = batch.get("attention_mask")
        mask = mask.numpy(force=True) != 0 if isinstance(mask, torch.Tensor) and mask.shape == ids.shape else None
        if mask is not None and task_ids[0] is None:
            return batch

        # Find the examples in the rows.
        rows = ids.numpy(force=True)
        joined = self._joined(rows, tokens, batch)
        pieces = self._by_row(rows, mask, tokens) if joined is None else joined
        is_packed = np.ndim(task_ids[0]) > 0
        if mask is None and not is_packed and any(piece is not None and piece.fit == 0 for piece in pieces):
            beside = _columns_beside_padding(rows, [len(each) for each in tokens], batch.get("labels"))
            pieces = pieces if beside is None else [_Piece(row, columns, fit=0) for row, columns in enumerate(beside)]

        if mask is None:
            _add_masks(batch, rows, pieces)
        if task_ids[0] is not None:
            if None in pieces:
                self._miss(len(rows), len(examples))
            self._add_tasks(batch, task_ids, rows, pieces, joined is not None)
        return batch

    def _by_order(self, task_ids: list[Any], batch: Mapping[str, Any]) -> torch.Tensor:
        """Task ids `[B]` of rows that can't be compared with the examples, one for each example."""
        for name in ("labels", "input_ids", "inputs_embeds"):
            if hasattr(batch.get(name), "__len__") and len(batch[name]) != len(task_ids):
                self._miss(len(batch[name]), len(task_ids))
                return torch.full((len(batch[name]),), -1)
        return torch.tensor([int(task_id) for task_id in task_ids])

    def _joined(
        self, rows: np.ndarray, tokens: list[np.ndarray], batch: Mapping[str, Any]
    ) -> list[_Piece | None] | None:
        """The pieces of all examples, one after the other in a single row; `None` if the row is not that."""
        if self._is_trl and not self.collator.padding_free:  # type: ignore[attr-defined]
            return None
        # A row of one example needs no other treatment, unless its positions say that it is joined.
        if len(rows) != 1 or (len(tokens) == 1 and "attention_mask" in batch):
            return None
        whole = np.concatenate(tokens)[: rows.shape[1]]
        if not np.array_equal(rows[0, : whole.size], whole):
            return None
        bounds = np.cumsum([0, *map(len, tokens)]).tolist()
        return [
            _Piece(example, np.arange(start, min(end, rows.shape[1])))
            for example, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
            if start < rows.shape[1]
        ]

    def _by_row(self, rows: np.ndarray, mask: np.ndarray | None, tokens: list[np.ndarray]) -> list[_Piece | None]:
        """The piece in each row; `None` for a row of an unknown example."""
        masks: list[Any] = [None] * len(rows) if mask is None else list(mask)
        in_order = len(rows) == len(tokens)
        if in_order and self._is_trl and mask is not None:
            return [_Piece(index, np.flatnonzero(masks[index])) for index in range(len(rows))]

        # The example of the same index, if all fit exactly.
        same = [_find(row, masks[i], tokens[i], i) for i, row in enumerate(rows)] if in_order else []
        exact = in_order and all(piece is not None and piece.fit == 2 for piece in same)
        if exact and (mask is not None or _is_padding(rows, same)):
            return same

        # Any example.
        matches: list[_Piece | None] = []
        for index, row in enumerate(rows):
            pieces = [_find(row, masks[index], each, example) for example, each in enumerate(tokens)]
            used = {piece.example for piece in matches if piece is not None}
            # The best of those that fit, and the longest; then that of the same index, or one that no row has yet.
            ranked = [
                ((piece.fit, len(piece.columns), in_order and example == index, example not in used), piece)
                for example, piece in enumerate(pieces)
                if piece is not None
            ]
            matches.append(max(ranked, key=lambda pair: pair[0])[1] if ranked else None)
        if all(matches):
            return matches
        if not in_order or any(one is None and other is not None for one, other in zip(same, matches, strict=True)):
            return [None] * len(rows)

        # The collator changed tokens, but returned one row for each example.
        return [
            piece or _Piece(index, _columns_of(masks[index], rows.shape[1]), fit=0) for index, piece in enumerate(same)
        ]

    def _miss(self, rows: int, examples: int) -> None:
        text = (
            f"The data collator made {rows} rows from {examples} examples, with tokens that match no example, so "
            "the task of each row is unknown. A collator may pad, truncate, drop, repeat or reorder rows; if it "
            "changes tokens, it must return one row per example, in order."
        )
        if self.required:
            raise ValueError(f'{text} `router="task"` needs the task of each row.')
        logger.warning_once(f"{text} These rows are not counted for any task.")

    def _add_tasks(
        self,
        batch: Any,
        task_ids: list[Any],
        rows: np.ndarray,
        pieces: Sequence[_Piece | None],
        is_joined: bool,
    ) -> None:
        is_packed = np.ndim(task_ids[0]) > 0
        if not is_packed and not is_joined:
            batch[TASK_IDS] = torch.tensor([-1 if piece is None else int(task_ids[piece.example]) for piece in pieces])
            return

        table = np.full(rows.shape, -1, dtype=np.int64)  # [B, S]
        for index, piece in enumerate(pieces):
            if piece is None:
                continue
            ids = task_ids[piece.example]
            if not is_packed:
                ids = np.where(np.arange(len(piece.columns)) == 0, int(ids) + ROW_START_MARK, int(ids))
            part = np.asarray(ids)[piece.first : piece.first + len(piece.columns)]
            table[0 if is_joined else index, piece.columns[: len(part)]] = part

        starts = table >= ROW_START_MARK - 1  # a row of no known task starts with -1, marked
        batch[TASK_IDS] = torch.from_numpy(np.where(starts, table - ROW_START_MARK, table))
        batch[ROW_STARTS] = torch.from_numpy(starts)


def _copy_of(ids: Any) -> np.ndarray:
    # Not `np.array(tensor)`, which warns (NumPy 2 with torch 2.13).
    return ids.numpy(force=True).copy() if isinstance(ids, torch.Tensor) else np.array(ids)


def _as_tensors(batch: Any) -> Any:
    """The batch as a mapping that can be added to, with tensors in place of NumPy arrays."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"The data collator returned a {type(batch).__name__}; it must return a dictionary of tensors, such as "
            '{"input_ids": ..., "labels": ...}.'
        )
    made = batch if isinstance(batch, MutableMapping) else dict(batch)
    for name, value in list(made.items()):
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            made[name] = torch.from_numpy(value)
    return made


def _add_masks(batch: Any, rows: np.ndarray, pieces: Sequence[_Piece | None]) -> None:
    """Add which tokens of a batch without an attention mask count, for statistics and for `SFTTrainer`."""
    counted = np.zeros(rows.shape, dtype=bool)  # [B, S]
    if len(rows) == 1 and all(pieces):
        counted[0, np.concatenate([piece.columns for piece in pieces if piece is not None])] = True
    else:
        for index, piece in enumerate(pieces):
            counted[index, slice(None) if piece is None else piece.columns] = True
    if not counted.all():
        batch[TOKEN_MASK] = torch.from_numpy(counted)
    # `SFTTrainer.compute_loss` (TRL 1.16) counts tokens by one of the two and raises without them.
    if "attention_mask" not in batch and "position_ids" not in batch:
        batch["attention_mask"] = torch.from_numpy(counted).to(batch["input_ids"].device, torch.int64)


def _find(row: np.ndarray, mask: np.ndarray | None, tokens: np.ndarray, example: int) -> _Piece | None:
    """Where a row holds an example, padded or truncated on either side; `None` if it does not."""
    length = len(tokens)
    if mask is None:
        return _find_beside_padding(row, tokens, example)
    columns = np.flatnonzero(mask)
    present = row[columns]
    if len(present) <= length:
        for first in {0, length - len(present)}:
            if len(present) and np.array_equal(present, tokens[first : first + len(present)]):
                return _Piece(example, columns, first, fit=2 if len(present) == length else 1)
        return None

    # The beginning or the end of a sequence may have been added.
    for start in range(1 + len(present) - length if len(present) - length <= 2 else 0):
        if length and np.array_equal(present[start : start + length], tokens):
            return _Piece(example, columns[start : start + length], fit=0)
    return None


def _find_beside_padding(row: np.ndarray, tokens: np.ndarray, example: int) -> _Piece | None:
    length, width = len(tokens), len(row)
    shorter = min(length, width)
    for first, start in ((0, 0), (length - shorter, width - shorter)):
        columns = np.arange(start, start + shorter)
        if shorter and np.array_equal(row[columns], tokens[first : first + shorter]):
            # All other tokens are padding, of one value.
            if len(np.unique(np.delete(row, columns))) <= 1:
                return _Piece(example, columns, first, fit=2 if shorter == length else 1)
    return None


def _columns_beside_padding(rows: np.ndarray, lengths: Sequence[int], labels: Any) -> list[np.ndarray] | None:
    """
    Columns of the tokens in rows whose tokens the collator changed, such as by adding a beginning to all.

    Rows of shorter examples have correspondingly more padding than the row of the longest: on one side, of one value,
    without a loss.

    Args:
        rows (`np.ndarray` of shape `[B, S]`): Tokens.
        lengths (`Sequence[int]`): Tokens that the examples had.
        labels (`torch.Tensor` of shape `[B, S]`, *optional*): Labels of the tokens.

    Returns:
        `list[np.ndarray]`, *optional*: Columns by row; `None` if no such padding is found.
    """
    if not isinstance(labels, torch.Tensor) or labels.shape != rows.shape or min(lengths) == max(lengths):
        return None
    width, ignored = rows.shape[1], labels.numpy(force=True) == IGNORED_LABEL
    short, longest = int(np.argmin(lengths)), int(np.argmax(lengths))
    for step in (-1, 1):  # padding on the right, on the left
        turned = rows[:, ::step]
        is_padding = (turned == turned[short, 0]) & ignored[:, ::step]  # [B, S]
        runs = np.where(is_padding.all(1), width, np.argmin(is_padding, axis=1))  # [B]
        padding = max(lengths) - np.asarray(lengths) + runs[longest]  # [B]
        if (runs >= padding).all() and (padding < width).all():
            return [np.arange(width - pad) if step == -1 else np.arange(pad, width) for pad in padding.tolist()]
    return None


def _is_padding(rows: np.ndarray, pieces: Sequence[_Piece | None]) -> bool:
    """Whether all tokens outside the pieces have one value, so that they are padding."""
    beside = np.ones(rows.shape, dtype=bool)
    for index, piece in enumerate(pieces):
        if piece is not None:
            beside[index, piece.columns] = False
    return len(np.unique(rows[beside])) <= 1


def _columns_of(mask: np.ndarray | None, width: int) -> np.ndarray:
    """Columns of the tokens in a row that the collator changed: those in the mask, or all without a mask."""
    return np.arange(width) if mask is None else np.flatnonzero(mask)
