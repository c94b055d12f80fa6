"""
Mixing of tasks: how many rows of each task an epoch draws, and which ones.

The rates follow T5 (Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer, section
3.5.2, https://arxiv.org/abs/1910.10683). With n_i the size of task i and K a cap, its share is proportional to

    proportional    min(n_i, K)
    equal           1
    temperature     min(n_i, K) ^ (1/T)

`TaskMixture` turns sizes into shares and into whole rows for each epoch, `MixtureSampler` chooses the rows, and
`mix_tasks` applies both to datasets. `prepare_tasks` is the trainer's entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

from ..evaluation.columns import AnyDataset, arrow_batches
from ..tuner.task_names import MAX_TASKS
from .samplers import MixtureSampler, check_draw
from .tasks import join_labeled, join_tasks, label_tasks, name_tasks, refuse_splits, task_names, tasks_in


Mixing: TypeAlias = Literal["proportional", "equal", "temperature"]
Unit: TypeAlias = Literal["rows", "tokens"]


@dataclass(frozen=True)
class TaskMixture:
    """
    The rows that an epoch draws from each task.

    An epoch draws as many rows as the tasks have, each counted up to the cap. With `unit="tokens"` it draws that many
    tokens, and the rows of a task are its tokens divided by the mean length of its rows.

    Args:
        rows (`Mapping[str, int]`): Rows by task.
        tokens (`Mapping[str, int]`, *optional*): Tokens by task, for `unit="tokens"` only.
        mixing (`str`, *optional*, defaults to `"proportional"`): `"proportional"`, `"equal"` or `"temperature"`.
        temperature (`float`, *optional*, defaults to `1.0`):
            T of `"temperature"`, at least 1. 1 is proportional; higher values sample small tasks more often.
        cap (`int`, *optional*): K, the maximum task size (in rows or tokens) used when computing shares.
        unit (`str`, *optional*, defaults to `"rows"`): Unit of sizes, shares and the cap: `"rows"` or `"tokens"`.

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
                counts = "none" if self.tokens is None else ", ".join(self.tokens)
                raise ValueError(
                    f'`unit="tokens"` needs the tokens of each task ({", ".join(self.rows)}), got those of: {counts}. '
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
        """Share of each task in an epoch, in `unit`; they sum to 1."""
        if self.mixing == "equal":
            return dict.fromkeys(self.rows, 1 / len(self.rows))
        weights = {task: size ** (1 / self.temperature) for task, size in self._capped.items()}
        total = math.fsum(weights.values())
        return {task: weight / total for task, weight in weights.items()}

    @cached_property
    def draws(self) -> dict[str, int]:
        """Rows of each task in one epoch, rounded by the largest remainder so that the total stays."""
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
        # Only with tokens: in rows, the smallest task gets at least as many as it has below the cap.
        mean = self._sizes[task] / self.rows[task]
        tokens = self.shares[task] * sum(self._capped.values())
        remedy = "raise `cap`" if self.cap is not None else 'use `unit="rows"`'
        return (
            f"Task {task!r} would have no row in an epoch: its share of {100 * self.shares[task]:.2g}% is "
            f"{tokens:.4g} tokens, and its rows have {mean:.4g} on average. Remove the task, or {remedy}."
        )

    def table(self) -> str:
        """
        The mixture as text, with a line for each task and one for their total.

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
    return [f"{100 * share:.2f}%", f"{draws:,}", f"{repeats:.2f}x"]


def check_options(mixing: Any, temperature: Any, cap: Any, unit: Any, *, prefix: str = "") -> None:
    """
    Check the options of a [`TaskMixture`].

    Args:
        mixing, temperature, cap, unit: See [`TaskMixture`].
        prefix (`str`, *optional*): Prefix of all names but the first in messages.

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

    name = f"{prefix}cap"
    if cap is None:
        return
    if not _is_positive_integer(cap):
        raise ValueError(f"`{name}` must be a whole number of at least 1, or None, got {cap!r}. It counts {unit}.")
    if mixing == "equal":
        raise ValueError(
            f'`{name}={cap!r}` has no effect with `mixing="equal"`, which ignores sizes. Leave `{name}` unset.'
        )


def _is_positive_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _check_sizes(name: str, sizes: Mapping[str, int]) -> None:
    if not sizes:
        raise ValueError(f"`{name}` names no task. Give at least one, as {{task: number}}.")
    for task, size in sizes.items():
        if not _is_positive_integer(size):
            raise ValueError(
                f"`{name}[{task!r}]` must be a whole number of at least 1, got {size!r}. Remove a task that is empty."
            )


def count_tasks(dataset: Dataset, num_tasks: int, column: str = "task_ids") -> tuple[list[int], list[int]]:
    """
    Count the rows and tokens of each task in a tokenized dataset.

    Args:
        dataset (`Dataset`): With a column `input_ids`.
        num_tasks (`int`): Number of tasks.
        column (`str`, *optional*, defaults to `"task_ids"`): Integer column with the task of each row, from 0.

    Returns:
        `tuple[list[int], list[int]]`: Rows and tokens by task.
    """
    rows = np.zeros(num_tasks, dtype=np.int64)
    tokens = np.zeros(num_tasks, dtype=np.int64)
    for batch in arrow_batches(dataset.select_columns([column, "input_ids"])):
        tasks = batch[column].to_numpy()  # [n]
        rows += np.bincount(tasks, minlength=num_tasks)
        np.add.at(tokens, tasks, _lengths(batch))
    return rows.tolist(), tokens.tolist()


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
    for which. Streams give a stream, and its `set_epoch` draws another epoch:

    - In proportion to all rows, tasks take turns until each row was seen once.
    - `"equal"` without `sizes` draws tasks with equal probability until each has ended once; one that ends restarts.
    - Otherwise tasks are drawn with the shares of a [`TaskMixture`] of their sizes, until as many rows as it draws.

    > [!NOTE]
    > Each epoch reads every stream from its start, in the order of its shards. If the stream of a task is longer than
    > what an epoch draws, all epochs see the same first rows: `shuffle` that stream, with a large buffer, before.

    Args:
        datasets (`Mapping[str, Dataset | IterableDataset]`): Datasets by task, all of one of TRL's formats.
        mixing (`str`, *optional*, defaults to `"proportional"`): `"proportional"`, `"equal"` or `"temperature"`.
        temperature (`float`, *optional*, defaults to `1.0`): T of `"temperature"`, at least 1.
        cap (`int`, *optional*): Maximum task size (in rows or tokens) used when computing shares.
        unit (`str`, *optional*, defaults to `"rows"`):
            Unit of sizes and the cap: `"rows"`, or `"tokens"` of map-style datasets with a column `input_ids`.
        sizes (`Mapping[str, int]`, *optional*):
            Rows by task, for streams. By default the number in the stream's `info`, which ignores `filter`, `take` and
            `skip`: pass `sizes` after those.
        seed (`int`, *optional*, defaults to `42`): Seed of the draws.
        epoch (`int`, *optional*, defaults to `0`): Epoch to draw; of a stream, the one to start with.
        task_column (`str`), text_column (`str`), any_format (`bool`): See [`label_tasks`].

    Returns:
        `Dataset` or `IterableDataset`: With the columns of the common format and the task column.

    Raises:
        ValueError: See [`TaskMixture`] and [`label_tasks`]; and if sizes are unknown, or passed without effect.
        TypeError: If a task is not a dataset, or streams and map-style datasets are mixed.
    """
    check_options(mixing, temperature, cap, unit)
    check_draw(seed, epoch)
    refuse_splits(datasets)
    datasets = name_tasks(datasets)
    plan = partial(TaskMixture, mixing=mixing, temperature=temperature, cap=cap, unit=unit)
    labeled = label_tasks(datasets, task_column=task_column, text_column=text_column, any_format=any_format)

    # Map-style data.
    if isinstance(next(iter(labeled.values())), Dataset):
        if sizes is not None:
            raise ValueError("`sizes` is for streams; the rows of these datasets are counted. Leave `sizes` unset.")
        return _mix_rows(labeled, plan, unit, seed, epoch)

    # Streams.
    if unit == "tokens":
        raise ValueError(
            '`unit="tokens"` needs datasets whose tokens can be counted, got streams. Use `unit="rows"`, or load '
            "them without `streaming=True`."
        )
    if mixing != "equal" and temperature == 1 and cap is None:
        mixed = join_labeled(list(labeled.values()), seed)
    elif mixing == "equal" and sizes is None:
        mixed = _mix_equally(list(labeled.values()), seed)
    else:
        mixed = _mix_streams(labeled, plan(_rows_of_streams(datasets, sizes)), seed)
    mixed.set_epoch(epoch)
    return mixed


class TaskRows(NamedTuple):
    """
    Training data as one dataset, and its tasks.

    Args:
        dataset (`Dataset` or `IterableDataset`, *optional*): All rows.
        names (`list[str]`, *optional*): Names of the tasks; `None` if the data do not have any, and for one stream.
        are_checked (`bool`): Whether rows were checked, so that messages name their task.
    """

    dataset: Any
    names: list[str] | None
    are_checked: bool = False


def prepare_tasks(train_dataset: Any, args: Any, *, any_format: bool = False) -> TaskRows:
    """
    The `train_dataset` of `RLoraSFTTrainer` as one dataset, and the names of its tasks.

    Streams by task are mixed here (`args.mixing`). Map-style data are joined here, and mixed by a sampler later.

    Args:
        train_dataset: A dictionary of datasets by task, a dataset with or without a task column, or `None`.
        args ([`RLoraSFTConfig`]): Has the options of mixing, the names of columns and the seed.
        any_format (`bool`, *optional*, defaults to `False`): See [`label_tasks`].

    Returns:
        [`TaskRows`].

    Raises:
        ValueError: If there are more tasks than an adapter may have, or one stream is to be mixed, the tasks of which
            can't be separated; and see [`mix_tasks`] and [`tasks_in`].
        TypeError: See [`mix_tasks`].
    """
    refuse_splits(train_dataset)
    if isinstance(train_dataset, IterableDataset) and args.mixes_tasks:
        raise ValueError(
            f"`mixing={args.mixing!r}` needs a stream for each task, got one stream. Pass a dictionary of streams "
            "by task, or mix them yourself with `rlora_trl.mix_tasks`."
        )

    # One dataset, or none.
    if isinstance(train_dataset, Dataset | IterableDataset):
        return TaskRows(train_dataset, tasks_in(train_dataset, args.task_column, required=args.task_column != "task"))
    if not isinstance(train_dataset, Mapping):
        return TaskRows(train_dataset, None)

    # A dataset for each task.
    names = task_names(train_dataset)
    if len(names) > MAX_TASKS:
        raise ValueError(
            f"`train_dataset` has {len(names)} tasks, and an adapter has at most {MAX_TASKS}. Combine some of them."
        )
    has_streams = any(isinstance(dataset, IterableDataset) for dataset in train_dataset.values())
    options = {"task_column": args.task_column, "text_column": args.dataset_text_field, "any_format": any_format}
    if not (has_streams and args.mixes_tasks):
        return TaskRows(join_tasks(train_dataset, seed=args.seed, **options), names, are_checked=not has_streams)
    mixed = mix_tasks(
        train_dataset,
        mixing=args.mixing,
        temperature=args.mixing_temperature,
        cap=args.mixing_cap,
        unit=args.mixing_unit,
        seed=args.seed,
        **options,
    )
    return TaskRows(mixed, names)


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
            "first, or use `unit='rows'`."
        )
    return sum(int(_lengths(batch).sum()) for batch in arrow_batches(dataset.select_columns(["input_ids"])))


def _mix_equally(streams: list[IterableDataset], seed: int) -> IterableDataset:
    shares = [1 / len(streams)] * len(streams)
    mixed = interleave_datasets(streams, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")
    # From epoch 1 on, datasets 5.2 would use only the epoch as the seed; under a `skip` or `take` it uses both. (No
    # upstream issue as of datasets 5.2; datasets#7051 is about the same method.)
    return mixed.skip(0)


def _mix_streams(streams: Mapping[str, IterableDataset], mixture: TaskMixture, seed: int) -> IterableDataset:
    endless = [stream.repeat(None) for stream in streams.values()]
    shares = [mixture.shares[task] for task in streams]
    # `take` also makes later epochs draw from the seed and the epoch; see `_mix_equally`.
    return interleave_datasets(endless, probabilities=shares, seed=seed).take(mixture.total)


def _rows_of_streams(streams: Mapping[str, IterableDataset], sizes: Mapping[str, int] | None) -> dict[str, int]:
    if sizes is not None:
        sizes = name_tasks(sizes, "sizes")
        if set(sizes) != set(streams):
            raise ValueError(
                f"`sizes` names the tasks {', '.join(sizes)}, and the datasets are {', '.join(streams)}. Give the "
                "rows of each dataset."
            )
        return {task: sizes[task] for task in streams}
    rows = {}
    for task, stream in streams.items():
        # A split such as "train[:10%]" is not in the table, and its rows are not known.
        split = (stream.info.splits or {}).get(str(stream.split))
        if split is None or not split.num_examples:
            raise ValueError(
                f"Task {task!r} is a stream of unknown length, and its share depends on its length. Pass the rows of "
                'each task as `sizes={task: rows}`, or use `mixing="proportional"` without `cap`, or `mixing="equal"`.'
            )
        rows[task] = split.num_examples
    return rows
