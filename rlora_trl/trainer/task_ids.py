"""Task ids from a column of names, through preparation, packing and collation, to the layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, Features, LargeList, List, Value
from transformers.utils import logging
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..evaluation.columns import add_column, by_row, encode, task_namer
from ..evaluation.formats import as_shown, has_transform
from .tasks import AnyDataset


# Not a name that datasets use; a user's own column `task_ids` is none of the trainer's business.
TASK_IDS = "rlora_task_ids"
# Where rows of the data begin, in batches whose rows are packed or joined.
ROW_STARTS = "rlora_row_starts"
# Only where tokens that don't count can't be told from an attention mask.
TOKEN_MASK = "rlora_token_mask"
logger = logging.get_logger(__name__)

# Added to the id of the first token of a row, so that packing carries both in one column.
_START = 1 << 30
IGNORED_LABEL = -100  # the label of a token without a loss


def number_tasks(
    dataset: AnyDataset, names: Sequence[str], task_column: str, *, unknown_allowed: bool = False
) -> AnyDataset:
    """
    Add a column with the place of each row's task among `names`.

    Args:
        dataset (`Dataset` or `IterableDataset`): With the column `task_column`.
        names (`Sequence[str]`): Names of the tasks.
        task_column (`str`): Column of names.
        unknown_allowed (`bool`, *optional*, defaults to `False`): Tasks that are not among `names` get -1.

    Raises:
        ValueError: If a task is not among `names`, at once or, in a stream, when its row comes.
    """
    index: dict[str | None, int] = {name: place for place, name in enumerate(names)}
    name_of = task_namer(dataset, task_column)

    def place_of(value: Any) -> int:
        name = name_of(value)
        if name in index:
            return index[name]
        if unknown_allowed:
            return -1
        raise ValueError(
            f"Column {task_column!r} has a row of task {value!r}, and the adapter's tasks are {', '.join(names)}. Add "
            "it to `RLoraConfig(tasks=[...])` of a new adapter, or filter the row out."
        )

    if isinstance(dataset, Dataset):
        values, numbers = encode(dataset, task_column)
        places = np.asarray([place_of(value) for value in values], dtype=np.int64)
        return add_ids(dataset, places[numbers])
    return dataset.map(lambda row: {TASK_IDS: place_of(row[task_column])}, features=with_ids(dataset.features))


def ids_of(dataset: Dataset) -> np.ndarray:
    """The task id of each row `[rows]`, of a dataset with a column of them that is not packed."""
    return by_row(dataset, [TASK_IDS], lambda ids: ids)


def with_ids(features: Features | None) -> Features | None:
    """The features of a stream with a column of task ids. Without them `map` leaves a stream that knows no columns."""
    return None if features is None else Features({**features, TASK_IDS: Value("int64")})


def add_ids(dataset: Dataset, numbers: np.ndarray) -> Dataset:
    """The dataset with a column of task ids, which a transform passes on beside what it makes of a row."""
    numbered = add_column(as_shown(dataset), TASK_IDS, numbers)  # which drops formats
    if not has_transform(dataset):
        return numbered
    transform = dataset.format["format_kwargs"]["transform"]
    columns = [*dataset.format["columns"], TASK_IDS]
    return numbered.with_transform(partial(_transform_but_ids, transform), columns)


def _transform_but_ids(transform: Callable[[dict[str, Any]], Any], batch: dict[str, Any]) -> dict[str, Any]:
    rest = dict(batch)
    numbers = rest.pop(TASK_IDS, None)
    made = dict(transform(rest))
    return made if numbers is None else {**made, TASK_IDS: numbers}


def number_alike(dataset: AnyDataset, task_id: int) -> AnyDataset:
    """Add a column of task ids with one number in all rows."""
    if isinstance(dataset, Dataset):
        return add_ids(dataset, np.full(len(dataset), task_id, dtype=np.int64))
    return dataset.map(lambda row: {TASK_IDS: task_id}, features=with_ids(dataset.features))


def is_packed(dataset: Any) -> bool:
    """Whether a dataset has the task of each token, as [`spread_over_tokens`] gives it, rather than of each row."""
    features = dataset.features if isinstance(dataset, Dataset) else None
    return features is not None and isinstance(features.get(TASK_IDS), List | LargeList)


def spread_over_tokens(dataset: AnyDataset, **map_kwargs: Any) -> AnyDataset:
    """
    Turn the task of each row into a list with the task of each of its tokens, which can be packed like them.

    The first of a row is marked as such; [`TaskCollator`] takes the mark off again.
    """

    def spread(row: dict[str, Any]) -> dict[str, list[int]]:
        task_id, length = int(row[TASK_IDS]), len(row["input_ids"])
        return {"_token_task_ids": [task_id + _START * (place == 0) for place in range(length)]}

    spread_out = dataset.map(spread, remove_columns=[TASK_IDS], **map_kwargs)
    return spread_out.rename_column("_token_task_ids", TASK_IDS)


class _Piece(NamedTuple):
    """Where the tokens of one example are in one row of a batch."""

    example: int
    places: np.ndarray  # of its tokens in the row
    first: int = 0  # the token of the example that is at the first of these places
    fit: int = 2  # 2: all of its tokens and no others; 1: it is truncated; 0: tokens were added, or are not known


class TaskCollator:
    """
    Any collator, and the tasks of the batch.

    Adds task ids to the batch if examples have them: `[B]`, or `[B, S]` with -1 for padding where rows were packed or
    joined (padding-free), with a mask `[B, S]` of the tokens that begin a row. Adds a mask of the tokens that count
    where padding can't be told from an attention mask.

    A collator may pad on either side, truncate, drop, repeat or reorder rows, or join all in one: the examples are
    found again by their tokens. One that changes tokens must keep a row for each example, in their order.

    Args:
        collator (`Callable`): Makes a batch of examples, with `input_ids` `[B, S]`.
        required (`bool`, *optional*, defaults to `False`):
            Whether each row needs its task. Otherwise rows whose example is not found have none, with a warning.

    Raises:
        TypeError: If the collator does not return a mapping.
        ValueError: If tasks are required and rows can't be told.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Any], required: bool = False) -> None:
        self.collator = collator
        self.required = required
        # TRL's own keeps rows in their order, and says whether it joins them.
        self._is_trl = type(collator) is DataCollatorForLanguageModeling

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        given: list[Any] = [example.get(TASK_IDS) for example in examples]
        rest = [{name: value for name, value in example.items() if name != TASK_IDS} for example in examples]
        # Taken before the collator, which may change what it is given. Pictures become tokens only there.
        tokens = [_copy_of(example["input_ids"]) for example in examples] if "input_ids" in examples[0] else None
        batch = _as_tensors(self.collator(rest))

        ids = batch.get("input_ids")
        if tokens is None or not isinstance(ids, torch.Tensor) or ids.ndim != 2:
            if given[0] is not None:
                batch[TASK_IDS] = self._by_order(given, batch)
            return batch
        mask = batch.get("attention_mask")
        mask = mask.numpy(force=True) != 0 if isinstance(mask, torch.Tensor) and mask.shape == ids.shape else None
        if mask is not None and given[0] is None:
            return batch

        rows = ids.numpy(force=True)
        joined = self._joined(rows, tokens, batch)
        pieces = self._by_row(rows, mask, tokens) if joined is None else joined
        packed = np.ndim(given[0]) > 0
        if mask is None and not packed and any(piece is not None and piece.fit == 0 for piece in pieces):
            places = _places_beside_padding(rows, [len(each) for each in tokens], batch.get("labels"))
            pieces = pieces if places is None else [_Piece(row, own, fit=0) for row, own in enumerate(places)]
        if mask is None:
            _add_masks(batch, rows, pieces)
        if given[0] is not None:
            if None in pieces:
                self._miss(len(rows), len(examples))
            self._add_tasks(batch, given, rows, pieces, joined is not None)
        return batch

    def _by_order(self, given: list[Any], batch: Mapping[str, Any]) -> torch.Tensor:
        """Tasks of rows whose tokens are not known before, one for each example."""
        for name in ("labels", "input_ids", "inputs_embeds"):
            if hasattr(batch.get(name), "__len__") and len(batch[name]) != len(given):
                self._miss(len(batch[name]), len(given))
                return torch.full((len(batch[name]),), -1)
        return torch.tensor([int(task_id) for task_id in given])

    def _joined(
        self, rows: np.ndarray, tokens: list[np.ndarray], batch: Mapping[str, Any]
    ) -> list[_Piece | None] | None:
        """All examples, one after the other in a single row; `None` if the row is not that."""
        if self._is_trl and not self.collator.padding_free:  # type: ignore[attr-defined]
            return None
        # A row of one example needs no other treatment, unless it says by its positions that it is joined.
        if len(rows) != 1 or (len(tokens) == 1 and "attention_mask" in batch):
            return None
        whole = np.concatenate(tokens)[: rows.shape[1]]
        if not np.array_equal(rows[0, : whole.size], whole):
            return None
        starts = np.cumsum([0, *map(len, tokens)])
        return [
            _Piece(example, np.arange(start, min(end, rows.shape[1])))
            for example, (start, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))
            if start < rows.shape[1]
        ]

    def _by_row(self, rows: np.ndarray, mask: np.ndarray | None, tokens: list[np.ndarray]) -> list[_Piece | None]:
        """The example of each row; `None` for a row of which it is not known."""
        masks: list[Any] = [None] * len(rows) if mask is None else list(mask)
        in_order = len(rows) == len(tokens)
        if in_order and self._is_trl and mask is not None:
            return [_Piece(place, np.flatnonzero(masks[place])) for place in range(len(rows))]
        own = [_find(row, masks[place], tokens[place], place) for place, row in enumerate(rows)] if in_order else []
        exact = in_order and all(piece is not None and piece.fit == 2 for piece in own)
        if exact and (mask is not None or _is_padding(rows, own)):
            return own

        found: list[_Piece | None] = []
        for place, row in enumerate(rows):
            pieces = [_find(row, masks[place], each, example) for example, each in enumerate(tokens)]
            used = {piece.example for piece in found if piece is not None}
            # The best of those that fit, and the longest; then that of the same place, or one that no row has yet.
            ranked = [
                ((piece.fit, len(piece.places), in_order and example == place, example not in used), piece)
                for example, piece in enumerate(pieces)
                if piece is not None
            ]
            found.append(max(ranked, key=lambda pair: pair[0])[1] if ranked else None)
        if all(found):
            return found
        moved = not in_order or any(mine is None and other is not None for mine, other in zip(own, found, strict=True))
        if moved:
            return [None] * len(rows)
        # Other tokens than were given, but one row for each example.
        return [
            piece or _Piece(place, _places_of(masks[place], rows.shape[1]), fit=0) for place, piece in enumerate(own)
        ]

    def _miss(self, rows: int, examples: int) -> None:
        text = (
            f"The data collator made {rows} rows of {examples} examples, and their tokens are not those of the "
            "examples, so that the task of each row is not known. A collator may pad, truncate, drop, repeat or "
            "reorder rows; one that changes tokens must return one row for each example, in their order."
        )
        if self.required:
            raise ValueError(f'{text} `router="task"` needs the task of each row.')
        logger.warning_once(f"{text} These rows are not counted for any task.")

    def _add_tasks(
        self,
        batch: Any,
        given: list[Any],
        rows: np.ndarray,
        pieces: Sequence[_Piece | None],
        is_joined: bool,
    ) -> None:
        packed = np.ndim(given[0]) > 0
        if not packed and not is_joined:
            batch[TASK_IDS] = torch.tensor([-1 if piece is None else int(given[piece.example]) for piece in pieces])
            return
        table = np.full(rows.shape, -1, dtype=np.int64)
        for place, piece in enumerate(pieces):
            if piece is None:
                continue
            ids = given[piece.example]
            if not packed:
                ids = np.where(np.arange(len(piece.places)) == 0, int(ids) + _START, int(ids))
            own = np.asarray(ids)[piece.first : piece.first + len(piece.places)]
            table[0 if is_joined else place, piece.places[: len(own)]] = own
        starts = table >= _START - 1  # a row of no known task starts with -1, marked
        batch[TASK_IDS] = torch.from_numpy(np.where(starts, table - _START, table))
        batch[ROW_STARTS] = torch.from_numpy(starts)


def _copy_of(ids: Any) -> np.ndarray:
    # Not `np.array(tensor)`, which warns (NumPy 2 with torch 2.13).
    return ids.numpy(force=True).copy() if isinstance(ids, torch.Tensor) else np.array(ids)


def _as_tensors(batch: Any) -> Any:
    """What a collator returned as a mapping that can be added to, with tensors for NumPy's arrays."""
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
    """Which tokens of a batch without an attention mask count, for statistics and for `SFTTrainer`."""
    counted = np.zeros(rows.shape, dtype=bool)
    if len(rows) == 1 and all(pieces):
        counted[0, np.concatenate([piece.places for piece in pieces if piece is not None])] = True
    else:
        for place, piece in enumerate(pieces):
            counted[place, slice(None) if piece is None else piece.places] = True
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
    places = np.flatnonzero(mask)
    own = row[places]
    if len(own) <= length:
        for first in {0, length - len(own)}:
            if len(own) and np.array_equal(own, tokens[first : first + len(own)]):
                return _Piece(example, places, first, fit=2 if len(own) == length else 1)
        return None
    # The beginning or the end of a sequence may have been added.
    for start in range(1 + len(own) - length if len(own) - length <= 2 else 0):
        if length and np.array_equal(own[start : start + length], tokens):
            return _Piece(example, places[start : start + length], fit=0)
    return None


def _find_beside_padding(row: np.ndarray, tokens: np.ndarray, example: int) -> _Piece | None:
    length, width = len(tokens), len(row)
    kept = min(length, width)
    for first, start in ((0, 0), (length - kept, width - kept)):
        places = np.arange(start, start + kept)
        if kept and np.array_equal(row[places], tokens[first : first + kept]):
            # What is beside the tokens is padding, all of one value.
            if len(np.unique(np.delete(row, places))) <= 1:
                return _Piece(example, places, first, fit=2 if kept == length else 1)
    return None


def _places_beside_padding(rows: np.ndarray, lengths: Sequence[int], labels: Any) -> list[np.ndarray] | None:
    """
    Places of tokens in rows of one example each, whose tokens were changed, such as by a beginning added to all.

    Rows of shorter examples have that much more padding than that of the longest: on one side, of one value, without a
    loss.

    Args:
        rows (`np.ndarray` of shape `[B, S]`): Tokens.
        lengths (`Sequence[int]`): Tokens that the examples had.
        labels (`torch.Tensor` of shape `[B, S]`, *optional*): Labels of the tokens.

    Returns:
        `list[np.ndarray]`, *optional*: Places by row; `None` where no such padding is found.
    """
    if not isinstance(labels, torch.Tensor) or labels.shape != rows.shape or min(lengths) == max(lengths):
        return None
    width, ignored = rows.shape[1], labels.numpy(force=True) == IGNORED_LABEL
    short, longest = int(np.argmin(lengths)), int(np.argmax(lengths))
    for step in (-1, 1):  # padding on the right, on the left
        turned = rows[:, ::step]
        is_padding = (turned == turned[short, 0]) & ignored[:, ::step]
        runs = np.where(is_padding.all(1), width, np.argmin(is_padding, axis=1))
        padding = max(lengths) - np.asarray(lengths) + runs[longest]
        if (runs >= padding).all() and (padding < width).all():
            return [np.arange(width - own) if step == -1 else np.arange(own, width) for own in padding.tolist()]
    return None


def _is_padding(rows: np.ndarray, pieces: Sequence[_Piece | None]) -> bool:
    """Whether what is beside the pieces is of one value in all rows, as padding is; a token of another row is not."""
    beside = np.ones(rows.shape, dtype=bool)
    for place, piece in enumerate(pieces):
        if piece is not None:
            beside[place, piece.places] = False
    return len(np.unique(rows[beside])) <= 1


def _places_of(mask: np.ndarray | None, width: int) -> np.ndarray:
    """Places of the tokens of a row that were changed: what the mask says, or else all, as padding is not known."""
    if mask is not None:
        return np.flatnonzero(mask)
    return np.arange(width)


def token_mask_of(batch: dict[str, Any]) -> torch.Tensor | None:
    """The mask `[B, S]` of the tokens of a batch that count, or `None` where all do."""
    for name in (TOKEN_MASK, "attention_mask"):
        mask = batch.get(name)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            return mask
    return None


def count_tokens(batch: dict[str, Any]) -> int | torch.Tensor:
    """How many tokens of a batch count."""
    mask = token_mask_of(batch)
    if mask is not None:
        return mask.sum()
    tokens = batch.get("input_ids", batch.get("inputs_embeds"))
    return 0 if tokens is None else tokens.shape[0] * tokens.shape[1]
