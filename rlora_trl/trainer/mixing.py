"""
Mixing of tasks: how many rows of each task an epoch draws, and which ones.

The rates are those of T5 (Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, section
3.5.2, https://arxiv.org/abs/1910.10683). With n_i the size of task i and K a cap, its share is proportional to

    proportional    min(n_i, K)
    equal           1
    temperature     min(n_i, K) ^ (1/T)

`TaskMixture` turns sizes into shares and into whole rows for each epoch, `MixtureSampler` chooses the rows, and
`mix_tasks` applies both to datasets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets
from torch.utils.data import Sampler

from ..evaluation.columns import arrow_batches
from .tasks import AnyDataset, label_tasks, name_tasks, refuse_splits


Mixing: TypeAlias = Literal["proportional", "equal", "temperature"]
Unit: TypeAlias = Literal["rows", "tokens"]

# First word of the key of each random stream, so that no permutation of rows shares its numbers with a shuffle.
_ROWS, _ORDER = 0, 1


@dataclass(frozen=True)
class TaskMixture:
    """
    How much of each task an epoch draws.

    Without a cap an epoch draws as many rows as there are; with one, as many as tasks have up to their cap. Counted
    in tokens, the same holds of tokens, and a task's rows are its tokens over the mean length of its rows.

    Args:
        rows (`Mapping[str, int]`): Rows by task.
        tokens (`Mapping[str, int]`, *optional*): Tokens by task; only needed, and only used, with `unit="tokens"`.
        mixing (`str`, *optional*, defaults to `"proportional"`): `"proportional"`, `"equal"` or `"temperature"`.
        temperature (`float`, *optional*, defaults to `1.0`):
            T of `"temperature"`, at least 1. At 1 it is proportional; the larger, the more equal.
        cap (`int`, *optional*): K: rows (or tokens) beyond which a task counts as no larger.
        unit (`str`, *optional*, defaults to `"rows"`): What sizes, shares and the cap count: `"rows"` or `"tokens"`.

    Raises:
        ValueError: If an option is not as above, a task is empty, or a task would get no row.
    """

    rows: Mapping[str, int]
    _: KW_ONLY
    tokens: Mapping[str, int] | None = None
    mixing: Mixing = "proportional"
    temperature: float = 1.0
    cap: int | None = None
    unit: Unit = "rows"

    def __post_init__(self) -> None:
        check_options(self.mixing, self.temperature, self.cap, self.unit)
        _check_sizes("rows", self.rows)
        if self.unit == "tokens":
            if self.tokens is None or set(self.tokens) != set(self.rows):
                given = "none" if self.tokens is None else ", ".join(self.tokens)
                raise ValueError(
                    f'`unit="tokens"` needs the tokens of each task ({", ".join(self.rows)}), got those of: {given}. '
                    "Give them as `tokens={task: number}`."
                )
            _check_sizes("tokens", self.tokens)
        for task, draws in self.draws.items():
            if draws == 0:
                raise ValueError(self._no_draw(task))

    @cached_property
    def _sizes(self) -> Mapping[str, int]:
        if self.unit == "tokens":
            assert self.tokens is not None
            return {task: self.tokens[task] for task in self.rows}
        return self.rows

    @cached_property
    def _capped(self) -> dict[str, int]:
        return {task: size if self.cap is None else min(size, self.cap) for task, size in self._sizes.items()}

    @cached_property
    def shares(self) -> dict[str, float]:
        """Share of each task in what is drawn, in `unit`; they sum to 1."""
        if self.mixing == "equal":
            return dict.fromkeys(self.rows, 1 / len(self.rows))
        weights = {task: size ** (1 / self.temperature) for task, size in self._capped.items()}
        total = math.fsum(weights.values())
        return {task: weight / total for task, weight in weights.items()}

    @cached_property
    def draws(self) -> dict[str, int]:
        """Rows of each task in one epoch. Fractions are settled by largest remainder, so that they add up."""
        size = sum(self._capped.values())
        # Units drawn over the mean units of a row, which is 1 where units are rows.
        exact = {task: share * size / (self._sizes[task] / self.rows[task]) for task, share in self.shares.items()}
        draws = {task: math.floor(number) for task, number in exact.items()}
        left = round(math.fsum(exact.values())) - sum(draws.values())
        for task in sorted(exact, key=lambda task: draws[task] - exact[task])[:left]:
            draws[task] += 1
        return draws

    @cached_property
    def repeats(self) -> dict[str, float]:
        """How often one epoch goes through the rows of each task."""
        return {task: draws / self.rows[task] for task, draws in self.draws.items()}

    @cached_property
    def total(self) -> int:
        """Rows that one epoch draws."""
        return sum(self.draws.values())

    def _no_draw(self, task: str) -> str:
        # Only tokens come here: of rows, the smallest task gets at least as many as it has below the cap.
        mean = self._sizes[task] / self.rows[task]
        tokens = self.shares[task] * sum(self._capped.values())
        remedy = "raise `cap`" if self.cap is not None else 'use `unit="rows"`'
        return (
            f"Task {task!r} would have no row in an epoch: its share of {100 * self.shares[task]:.2g} % is "
            f"{tokens:.4g} tokens, and its rows have {mean:.4g} on average. Remove the task, or {remedy}."
        )

    def table(self) -> str:
        """
        The mixture as text: a line for each task and their total.

        Returns:
            `str`: Columns task, rows, tokens (where they are the unit), share, rows per epoch and repeats, aligned.
        """
        counted = [self.rows] if self.unit == "rows" else [self.rows, self._sizes]
        lines = [["task", "rows", "tokens"][: 1 + len(counted)] + ["share", "rows per epoch", "repeats"]]
        for task in self.rows:
            sizes = [f"{sizes[task]:,}" for sizes in counted]
            lines.append([str(task), *sizes, *_drawn(self.shares[task], self.draws[task], self.repeats[task])])
        sizes = [f"{sum(sizes.values()):,}" for sizes in counted]
        lines.append(["total", *sizes, *_drawn(1.0, self.total, self.total / sum(self.rows.values()))])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) for first, *rest in lines
        )


def _drawn(share: float, draws: int, repeats: float) -> list[str]:
    return [f"{100 * share:.2f} %", f"{draws:,}", f"{repeats:.2f}x"]


def check_options(mixing: Any, temperature: Any, cap: Any, unit: Any, *, prefix: str = "") -> None:
    """
    Check the options of a [`TaskMixture`].

    Args:
        mixing, temperature, cap, unit: See [`TaskMixture`].
        prefix (`str`, *optional*): What the user's names of all but the first have before them.

    Raises:
        ValueError: If one is outside its range, or they do not go together.
    """
    for name, value, accepted in (("mixing", mixing, get_args(Mixing)), (f"{prefix}unit", unit, get_args(Unit))):
        if value not in accepted:
            listed = ", ".join(map(repr, accepted))
            raise ValueError(f"`{name}` must be one of {listed}, got {value!r}. Choose one.")
    name = f"{prefix}temperature"
    # Written so that NaN fails too.
    if isinstance(temperature, bool) or not isinstance(temperature, Real) or not float(temperature) >= 1:
        raise ValueError(
            f"`{name}` must be a number of at least 1, got {temperature!r}. 1 mixes in proportion to the sizes, 2 is "
            "a common choice to favor small tasks."
        )
    if temperature != 1 and mixing != "temperature":
        raise ValueError(
            f"`{name}={temperature!r}` has no effect with `mixing={mixing!r}`. Set `mixing='temperature'`, or leave "
            f"`{name}` at 1."
        )
    if cap is None:
        return
    name = f"{prefix}cap"
    if isinstance(cap, bool) or not isinstance(cap, Integral) or cap < 1:
        raise ValueError(f"`{name}` must be a whole number of at least 1, or None, got {cap!r}. It counts {unit}.")
    if mixing == "equal":
        raise ValueError(
            f'`{name}={cap!r}` has no meaning with `mixing="equal"`, where sizes don\'t count. Leave `{name}` unset.'
        )


def _check_sizes(name: str, sizes: Mapping[str, int]) -> None:
    if not sizes:
        raise ValueError(f"`{name}` names no task. Give at least one, as {{task: number}}.")
    for task, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, Integral) or size < 1:
            raise ValueError(
                f"`{name}[{task!r}]` must be a whole number of at least 1, got {size!r}. Remove a task that is empty."
            )


def _check_draw(seed: int, epoch: int) -> None:
    for name, value in (("seed", seed), ("epoch", epoch)):
        if value < 0:
            raise ValueError(f"`{name}` must be 0 or more, got {value}. Count from 0.")


class MixtureSampler(Sampler[int]):
    """
    Draws rows of several tasks, a fixed number of each in every epoch, in random order.

    Each task has an endless sequence of shuffled passes over its rows, of which epoch e takes the part from
    e * draws to (e + 1) * draws. So the rows of a task are used evenly over epochs, and none a second time before all
    others were used once. What is drawn depends on the seed and the epoch alone: it is the same on all processes,
    and no earlier epoch is replayed to resume in a later one.

    > [!NOTE]
    > In several processes, a data loader that accelerate prepared needs `dataloader.set_sampler(sampler)` before
    > `skip_first_batches`: its `set_epoch` does not find the sampler otherwise, and would resume in epoch 0.

    Args:
        task_of_row (`Sequence[int]` or `np.ndarray`): Index of the task of each row of the dataset.
        draws (`Sequence[int]`): Rows of each task in one epoch, by index of the task.
        seed (`int`, *optional*, defaults to `42`): Seed of the draws.

    Raises:
        ValueError: If a row has a task without draws, draws have a task without rows, nothing is drawn, or the seed is
            negative.
    """

    def __init__(self, task_of_row: Sequence[int] | np.ndarray, draws: Sequence[int], seed: int = 42) -> None:
        super().__init__()
        # `[:]` for the column of a dataset, which is read row by row otherwise.
        tasks = np.asarray(task_of_row[:], dtype=np.int64)  # [rows]
        self.draws = [int(number) for number in draws]
        outside = tasks[(tasks < 0) | (tasks >= len(self.draws))]
        if outside.size:
            raise ValueError(
                f"`task_of_row` has task {outside[0]}, and `draws` are those of {len(self.draws)} tasks. Count tasks "
                "from 0, and give the draws of each."
            )
        _check_draw(seed, 0)
        self.seed = seed
        self.epoch = 0
        counts = np.bincount(tasks, minlength=len(self.draws))
        for task, (count, number) in enumerate(zip(counts, self.draws, strict=True)):
            if number < 0 or (number > 0 and count == 0):
                raise ValueError(
                    f"`draws[{task}]` is {number}, and the task has {count} rows. Draw 0 or more, and only of tasks "
                    "with rows."
                )
        if not any(self.draws):
            raise ValueError(f"`draws` are {self.draws}, an epoch without rows. Draw a row of at least one task.")
        by_task = np.argsort(tasks, kind="stable")
        self._rows = np.split(by_task, np.cumsum(counts)[:-1])  # one array of rows for each task

    def set_epoch(self, epoch: int) -> None:
        """
        Choose the epoch that the next iteration draws.

        Args:
            epoch (`int`): Number of the epoch, from 0.

        Raises:
            ValueError: If it is negative.
        """
        _check_draw(self.seed, epoch)
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return sum(self.draws)

    def __iter__(self) -> Iterator[int]:
        drawn = np.concatenate([self._draw(task) for task in range(len(self.draws))])
        yield from self._generator(_ORDER, self.epoch).permutation(drawn).tolist()

    def _draw(self, task: int) -> np.ndarray:
        rows, draws = self._rows[task], self.draws[task]
        if draws == 0:
            return rows[:0]
        start, end = self.epoch * draws, (self.epoch + 1) * draws
        first = start // len(rows)
        passes = range(first, (end - 1) // len(rows) + 1)
        sequence = np.concatenate([self._generator(_ROWS, task, index).permutation(rows) for index in passes])
        offset = first * len(rows)
        return sequence[start - offset : end - offset]

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))


class PartSampler(Sampler[int]):
    """
    Goes through one part of a dataset in each epoch, in random order, and from the last on to the first again.

    For packed data, whose parts are the packed draws of one epoch each. Packing gives parts of slightly different
    lengths; an epoch has as many rows as the shortest, so that its steps are known.

    Args:
        lengths (`Sequence[int]`): Rows of the parts, which follow each other in the dataset.
        seed (`int`, *optional*, defaults to `42`): Seed of the order.
    """

    def __init__(self, lengths: Sequence[int], seed: int = 42) -> None:
        super().__init__()
        self.lengths, self.seed, self.epoch = list(lengths), seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through; see [`MixtureSampler.set_epoch`]."""
        _check_draw(self.seed, epoch)
        self.epoch = int(epoch)

    def __len__(self) -> int:
        return min(self.lengths)

    def __iter__(self) -> Iterator[int]:
        part = self.epoch % len(self.lengths)
        generator = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(_ORDER, self.epoch)))
        order = generator.permutation(self.lengths[part])[: len(self)]
        yield from (sum(self.lengths[:part]) + order).tolist()


def count_tasks(dataset: Dataset, num_tasks: int, column: str = "task_ids") -> tuple[list[int], list[int]]:
    """
    Rows and tokens of each task in a tokenized dataset that names tasks by number.

    Args:
        dataset (`Dataset`): With a column `input_ids`.
        num_tasks (`int`): Number of tasks, whose numbers are 0 to `num_tasks` - 1.
        column (`str`, *optional*, defaults to `"task_ids"`): Integer column that names the task of each row.

    Returns:
        `tuple[list[int], list[int]]`: Rows and tokens by number of the task.

    Raises:
        ValueError: If a column is missing, the column of tasks is not one of integers, or it names another task.
    """
    for name in (column, "input_ids"):
        if name not in dataset.column_names:
            raise ValueError(
                f"Counting tasks needs a column {name!r}; the dataset has {', '.join(dataset.column_names)}. "
                "Tokenize it, and number its tasks, before."
            )
    rows = np.zeros(num_tasks, dtype=np.int64)
    tokens = np.zeros(num_tasks, dtype=np.int64)
    for batch in arrow_batches(dataset.select_columns([column, "input_ids"])):
        numbers = _task_numbers(batch[column], column, num_tasks)
        rows += np.bincount(numbers, minlength=num_tasks)
        np.add.at(tokens, numbers, _lengths(batch))
    return rows.tolist(), tokens.tolist()


def _task_numbers(numbers: pa.ChunkedArray, column: str, num_tasks: int) -> np.ndarray:
    if not pa.types.is_integer(numbers.type) or numbers.null_count:
        raise ValueError(
            f"Column {column!r} must hold one integer in each row, got {numbers.type} with {numbers.null_count} empty "
            "rows. Number the tasks from 0."
        )
    tasks = numbers.to_numpy()
    if tasks.min() < 0 or tasks.max() >= num_tasks:
        raise ValueError(
            f"Column {column!r} names tasks {tasks.min()} to {tasks.max()}, and there are {num_tasks}, from 0. Raise "
            "`num_tasks`, or number the tasks again."
        )
    return tasks


def _lengths(batch: pa.Table) -> np.ndarray:
    """Tokens of each row."""
    return pc.fill_null(pc.list_value_length(batch["input_ids"]), 0).to_numpy()


def mix_tasks(
    datasets: Mapping[str, AnyDataset],
    *,
    mixing: Mixing = "proportional",
    temperature: float = 1.0,
    cap: int | None = None,
    unit: Unit = "rows",
    sizes: Mapping[str, int] | None = None,
    seed: int = 42,
    epoch: int = 0,
    task_column: str = "task",
    text_column: str = "text",
    any_format: bool = False,
) -> AnyDataset:
    """
    Mix the datasets of several tasks into one, with the shares of T5 (https://arxiv.org/abs/1910.10683, 3.5.2).

    Map-style datasets give the rows that one epoch draws; see [`TaskMixture`] for their number and [`MixtureSampler`]
    for which. Streams give a stream, whose `set_epoch` draws anew:

    - In proportion to all rows, tasks take turns until each row was seen once.
    - `"equal"` without `sizes` draws tasks with equal chances until each has ended once; one that ends starts again.
    - Otherwise tasks are drawn with the chances of a [`TaskMixture`] of their sizes, until as many rows as it draws.

    > [!NOTE]
    > Each epoch reads every stream from its start, in the order of its shards. Of a task whose stream is longer than
    > what an epoch draws, all epochs see the same first rows: `shuffle` that stream, with a large buffer, before.

    Args:
        datasets (`Mapping[str, Dataset | IterableDataset]`): Datasets by task, all of one of TRL's formats.
        mixing (`str`, *optional*, defaults to `"proportional"`): `"proportional"`, `"equal"` or `"temperature"`.
        temperature (`float`, *optional*, defaults to `1.0`): T of `"temperature"`, at least 1.
        cap (`int`, *optional*): Rows (or tokens) beyond which a task counts as no larger.
        unit (`str`, *optional*, defaults to `"rows"`):
            What sizes and the cap count: `"rows"`, or `"tokens"` of map-style datasets with a column `input_ids`.
        sizes (`Mapping[str, int]`, *optional*):
            Rows by task, of streams. Where it is needed and not given, it is what the stream's `info` says of its
            split. That is the number before any `filter`, `take` or `skip`: give `sizes` after those.
        seed (`int`, *optional*, defaults to `42`): Seed of the draws.
        epoch (`int`, *optional*, defaults to `0`): Epoch to draw; of a stream, the one to start with.
        task_column (`str`, *optional*, defaults to `"task"`): Name of the new column.
        text_column (`str`, *optional*, defaults to `"text"`): Column of the format that is plain text.
        any_format (`bool`, *optional*, defaults to `False`):
            Columns are of no known format, as a `formatting_func` makes text of them: those that all tasks have are
            kept, where their types can be brought together.

    Returns:
        `Dataset` or `IterableDataset`: With the columns of the common format and the task column.

    Raises:
        ValueError: See [`TaskMixture`] and [`join_tasks`]; and if sizes are unknown, or given and of no use.
        TypeError: If a task is not a dataset, or streamed and map-style ones are mixed.
    """
    check_options(mixing, temperature, cap, unit)
    _check_draw(seed, epoch)
    refuse_splits(datasets)
    datasets = name_tasks(datasets)
    plan = partial(TaskMixture, mixing=mixing, temperature=temperature, cap=cap, unit=unit)
    labeled = label_tasks(datasets, task_column=task_column, text_column=text_column, any_format=any_format)
    if isinstance(next(iter(labeled.values())), Dataset):
        if sizes is not None:
            raise ValueError("`sizes` is for streams; the rows of these datasets are counted. Leave `sizes` unset.")
        return _mix_rows(labeled, plan, unit, seed, epoch)
    if unit == "tokens":
        raise ValueError(
            '`unit="tokens"` needs datasets whose tokens can be counted, got streams. Use `unit="rows"`, or load '
            "them without `streaming=True`."
        )
    if mixing != "equal" and temperature == 1 and cap is None:
        # As `join_tasks`, which would open each stream a second time.
        mixed = interleave_datasets(list(labeled.values()), stopping_strategy="all_exhausted_without_replacement")
    elif mixing == "equal" and sizes is None:
        mixed = _mix_equally(list(labeled.values()), seed)
    else:
        mixed = _mix_streams(labeled, plan(_rows_of_streams(datasets, sizes)), seed)
    mixed.set_epoch(epoch)
    return mixed


def mix_streams(train_dataset: Any, args: Any, *, any_format: bool = False) -> Any:
    """
    Training data with streams by task mixed; everything else is returned as it is, and mixed when it is sampled.

    Args:
        train_dataset: What `RLoraSFTTrainer` takes.
        args ([`RLoraSFTConfig`]): Has the options.
        any_format (`bool`, *optional*, defaults to `False`): See [`mix_tasks`].

    Raises:
        ValueError: If one stream is to be mixed, whose tasks can't be told apart; and see [`mix_tasks`].
    """
    if not args.mixes_tasks:
        return train_dataset
    if isinstance(train_dataset, IterableDataset):
        raise ValueError(
            f"`mixing={args.mixing!r}` needs the tasks of a stream apart. Pass a dictionary of streams by task, or "
            "mix them yourself with `rlora_trl.mix_tasks`."
        )
    if not isinstance(train_dataset, Mapping) or not any(
        isinstance(dataset, IterableDataset) for dataset in train_dataset.values()
    ):
        return train_dataset
    return mix_tasks(
        train_dataset,
        mixing=args.mixing,
        temperature=args.mixing_temperature,
        cap=args.mixing_cap,
        unit=args.mixing_unit,
        seed=args.seed,
        task_column=args.task_column,
        text_column=args.dataset_text_field,
        any_format=any_format,
    )


def _mix_rows(
    labeled: Mapping[str, Dataset], plan: Callable[..., TaskMixture], unit: Unit, seed: int, epoch: int
) -> Dataset:
    rows = {task: len(dataset) for task, dataset in labeled.items()}
    tokens = {task: _tokens(task, dataset) for task, dataset in labeled.items()} if unit == "tokens" else None
    mixture = plan(rows, tokens=tokens)
    task_of_row = np.repeat(np.arange(len(rows)), list(rows.values()))
    sampler = MixtureSampler(task_of_row, list(mixture.draws.values()), seed)
    sampler.set_epoch(epoch)
    return concatenate_datasets(list(labeled.values())).select(list(sampler))


def _tokens(task: str, dataset: Dataset) -> int:
    if "input_ids" not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise ValueError(
            f"`unit='tokens'` counts the column 'input_ids', and task {task!r} has {columns}. Tokenize the datasets "
            "before, or use `unit='rows'`."
        )
    return sum(int(_lengths(batch).sum()) for batch in arrow_batches(dataset.select_columns(["input_ids"])))


def _mix_equally(streams: list[IterableDataset], seed: int) -> IterableDataset:
    chances = [1 / len(streams)] * len(streams)
    mixed = interleave_datasets(streams, probabilities=chances, seed=seed, stopping_strategy="all_exhausted")
    # From epoch 1 on, datasets 5.2 would draw from the epoch alone and forget the seed; below a `skip` or `take` it
    # derives the draws from both. (No upstream issue as of datasets 5.2; datasets#7051 is about the same method.)
    return mixed.skip(0)


def _mix_streams(streams: Mapping[str, IterableDataset], mixture: TaskMixture, seed: int) -> IterableDataset:
    endless = [stream.repeat(None) for stream in streams.values()]
    chances = [mixture.shares[task] for task in streams]
    # `take` also makes later epochs draw from the seed and the epoch; see `_mix_equally`.
    return interleave_datasets(endless, probabilities=chances, seed=seed).take(mixture.total)


def _rows_of_streams(streams: Mapping[str, IterableDataset], sizes: Mapping[str, int] | None) -> dict[str, int]:
    if sizes is not None:
        sizes = name_tasks(sizes, "sizes")
        if set(sizes) != set(streams):
            given, needed = ", ".join(map(str, sizes)), ", ".join(map(str, streams))
            raise ValueError(
                f"`sizes` names the tasks {given}, and the datasets are {needed}. Give the rows of each dataset."
            )
        return {task: sizes[task] for task in streams}
    rows = {}
    for task, stream in streams.items():
        # A split such as "train[:10%]" is not in the table, and its rows are not known.
        split = (stream.info.splits or {}).get(str(stream.split))
        if split is None or not split.num_examples:
            raise ValueError(
                f"Task {task!r} is a stream of unknown length, and its share depends on that. Give the rows of each "
                'task as `sizes={task: rows}`, or use `mixing="proportional"` without `cap`, or `mixing="equal"`.'
            )
        rows[task] = split.num_examples
    return rows
