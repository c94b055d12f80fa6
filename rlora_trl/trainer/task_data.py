"""The data of a run by task: task names, the task of each row through preparation and packing, draws of an epoch."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset, concatenate_datasets
from trl import pack_dataset

from ..evaluation.columns import AnyDataset, tells_tasks
from ..evaluation.formats import check_rows, has_transform
from ..tuner import RLoraConfig
from .config import RLoraSFTConfig
from .lost_rows import LostRows, rows_of_tasks
from .mixing import TaskMixture, count_tasks, prepare_tasks
from .run_settings import describe_data
from .samplers import MixtureSampler, PartSampler
from .task_evaluation import split_by_task
from .task_ids import TASK_IDS, ids_of, is_packed, number_alike, number_tasks, spread_over_tokens
from .tasks import columns_of


logger = get_logger(__name__)

# Epochs that are drawn and packed before training.
_PACKED_EPOCHS = 16


class TaskData:
    """
    The data of one trainer by task.

    It joins the tasks of a run, gives each row the id of its task, keeps the ids through TRL's preparation and
    packing, and plans how many rows of each task an epoch draws.

    Args:
        args ([`RLoraSFTConfig`]): Configuration of the run.
        config ([`RLoraConfig`]): Configuration of the adapter. Its `tasks` are filled in.
        is_new (`bool`): Whether the adapter is created by this run.
        labels_are_used (`bool`): Whether batches use the labels of the data. A custom collator may set others.

    Attributes:
        names (`list[str]`): Names of the tasks, in the order of their ids.
        earlier (`frozenset[str]`): Tasks that the adapter was trained on before.
        mixture ([`TaskMixture`], *optional*): The rows that an epoch draws from each task, if known before training.
        sampler (`Sampler`, *optional*): Draws them, unless an epoch is each row once.
    """

    def __init__(self, args: RLoraSFTConfig, config: RLoraConfig, *, is_new: bool, labels_are_used: bool) -> None:
        self.names: list[str] = []
        self.earlier: frozenset[str] = frozenset() if is_new else frozenset(config.tasks or ())
        self.mixture: TaskMixture | None = None
        self.sampler: MixtureSampler | PartSampler | None = None
        self._args, self._config, self._is_new = args, config, is_new
        self._lost_rows = LostRows(
            args.max_length, labels_are_used=labels_are_used, routes_by_task=self.routes_by_task
        )
        # TRL prepares the training data first, under the name "train", which evaluation data may have too.
        self._has_training = False
        self._trained_tasks: list[str] | None = None
        self._saw_training = self._rows_are_checked = False

    @property
    def routes_by_task(self) -> bool:
        """Whether each task has its own head weights, so that each row needs a task."""
        return self._config.router == "task"

    # Before the trainer prepares the data

    def join(self, train_dataset: Any, *, any_format: bool) -> Any:
        """
        Join the tasks of the training data, name them, and give each row the id of its task.

        Args:
            train_dataset: What [`RLoraSFTTrainer`] takes.
            any_format (`bool`): Whether a `formatting_func` creates the text, so that rows may have any columns.

        Returns:
            `Dataset` or `IterableDataset`: With a column of task ids, if the data name their tasks.

        Raises:
            ValueError, TypeError: See [`RLoraSFTTrainer`].
        """
        train_dataset, tasks, self._rows_are_checked = prepare_tasks(train_dataset, self._args, any_format=any_format)
        self.names = name_tasks_of_adapter(self._config, tasks, is_new=self._is_new)
        self._config.tasks = list(self.names) or None
        # A stream names its tasks row by row.
        if tasks is not None or isinstance(train_dataset, IterableDataset) or self.routes_by_task:
            train_dataset = self._with_task_ids(train_dataset)
        self._has_training = train_dataset is not None
        self._trained_tasks = tasks
        return train_dataset

    def split_evaluation(self, eval_dataset: Any) -> Any:
        """Evaluation data by task, see [`split_by_task`]; with a warning for tasks that only training data have."""
        eval_dataset = split_by_task(eval_dataset, self._args.task_column)
        _warn_of_missing_tasks(eval_dataset, self._trained_tasks)
        return eval_dataset

    def _with_task_ids(self, dataset: Any) -> Any:
        if self.names and self._names_tasks(dataset):
            # With a task router each row needs a known task; the stream of another router may have others.
            return number_tasks(dataset, self.names, self._args.task_column, unknown_allowed=not self.routes_by_task)
        if self.routes_by_task and dataset is not None:
            raise ValueError(
                '`router="task"` needs the task of each row, and the training data has no task column. Pass '
                "a dictionary of datasets by task, or a dataset with a column (`task_column`) and, for a stream, "
                "`RLoraConfig(tasks=[...])`."
            )
        return dataset

    def _names_tasks(self, dataset: Any) -> bool:
        column = self._args.task_column
        is_data = isinstance(dataset, Dataset | IterableDataset)
        return is_data and column in columns_of(dataset) and tells_tasks(dataset, column)

    def number_evaluation(self, dataset: Any) -> Any:
        """Evaluation data with task ids, if a column or the key in the dictionary names the task."""
        if isinstance(dataset, Mapping):
            return {name: self._number_one(data, name) for name, data in dataset.items()}
        return self._number_one(dataset, "")

    def _number_one(self, dataset: Any, name: str) -> Any:
        if not self.names or not isinstance(dataset, Dataset | IterableDataset) or TASK_IDS in columns_of(dataset):
            return dataset
        if self._names_tasks(dataset):
            return number_tasks(dataset, self.names, self._args.task_column, unknown_allowed=True)
        return number_alike(dataset, self.names.index(name)) if name in self.names else dataset

    # While the trainer prepares the data

    def prepare(
        self,
        dataset: AnyDataset,
        name: str,
        args: RLoraSFTConfig,
        packing: bool,
        *,
        any_format: bool,
        prepare: Callable[[AnyDataset, RLoraSFTConfig, bool], AnyDataset],
    ) -> AnyDataset:
        """
        Prepare one dataset as `SFTTrainer` does, and keep the task of each row, or with packing of each token.

        Args:
            dataset (`Dataset` or `IterableDataset`): The data.
            name (`str`): Its name, such as `"train"`.
            args ([`RLoraSFTConfig`]), packing (`bool`): As `SFTTrainer._prepare_dataset` gets them.
            any_format (`bool`): See [`join`].
            prepare (`Callable`): `SFTTrainer._prepare_dataset`, given data, configuration and `packing`.
        """
        is_training = self._has_training and not self._saw_training and name == "train"
        self._saw_training = self._saw_training or is_training
        if is_packed(dataset):
            return dataset
        if not any_format and not (is_training and self._rows_are_checked):
            dataset = check_rows(dataset, f"The dataset {name!r}", text_column=args.dataset_text_field)

        dataset = self._lost_rows.renumber(dataset)
        before = rows_of_tasks(dataset, len(self.names)) if isinstance(dataset, Dataset) else None
        if not packing or TASK_IDS not in columns_of(dataset):
            dataset = prepare(dataset, args, packing)
            return dataset if packing else self._drop_lost_rows(dataset, before, name, is_training)

        # TRL's packing keeps only tokens and labels, so rows are packed here, after all other steps.
        if args.max_length is None:
            raise ValueError("`packing=True` needs `max_length`, which is None. Set it to the length of a packed row.")
        unpacked = copy.copy(args)
        unpacked.max_length, unpacked.shuffle_dataset = None, False
        dataset = prepare(dataset, unpacked, False)
        cut_at = args.max_length if args.packing_strategy == "bfd" else None
        dataset = self._drop_lost_rows(dataset, before, name, is_training, cut_at)
        return self._pack(dataset, args, name, is_training)

    def _drop_lost_rows(
        self, dataset: AnyDataset, before: Any, name: str, is_training: bool, cut_at: int | None = None
    ) -> AnyDataset:
        """Remove tasks without remaining rows from prepared data, and note the lost rows for one warning."""
        if before is None or not isinstance(dataset, Dataset):
            return dataset
        if not is_training:
            return self._lost_rows.note_evaluation(name, dataset, before, self.names, cut_at)
        gone = self._lost_rows.note_training(dataset, before, self.names, cut_at)
        if not gone:
            return dataset
        self.names = self._lost_rows.forget(gone, self.names, self.earlier)
        numbered = self._lost_rows.renumber(dataset)
        # Without truncation, rows without a label are still present.
        return numbered.select(np.flatnonzero(ids_of(numbered) >= 0))

    # Packing

    def _pack(self, dataset: AnyDataset, args: RLoraSFTConfig, name: str, is_training: bool) -> AnyDataset:
        """
        Do the last steps of `SFTTrainer._prepare_dataset`, and pack the task of each token with the tokens. TRL's
        packing would drop it (no upstream issue as of trl 1.16).
        """
        map_kwargs: dict[str, Any] = {}
        if isinstance(dataset, Dataset):
            map_kwargs = {"num_proc": args.dataset_num_proc, "desc": f"Packing {name} dataset"}
        with PartialState().main_process_first():
            if is_training and isinstance(dataset, Dataset):
                self.mixture = self._plan_mixture(dataset)
                if args.mixes_tasks:
                    return self._pack_epochs(dataset, args, map_kwargs)
            return _pack_rows(dataset, args, map_kwargs)

    def _pack_epochs(self, dataset: Dataset, args: RLoraSFTConfig, map_kwargs: dict[str, Any]) -> Dataset:
        """Draw and pack each epoch separately; the sampler then uses one of these parts per epoch."""
        sampler = self._sample_mixture(dataset)

        def packed(epoch: int) -> Dataset:
            sampler.set_epoch(epoch)
            return _pack_rows(dataset.select(list(sampler)), args, map_kwargs)

        parts = [packed(0)]
        epochs = math.ceil(args.num_train_epochs)
        if args.max_steps > 0:
            rows = args.max_steps * args.gradient_accumulation_steps * args.train_batch_size
            epochs = math.ceil(rows * PartialState().num_processes / len(parts[0]))
        # Packed parts take disk space, so later epochs repeat them from the first.
        parts += [packed(epoch) for epoch in range(1, min(epochs, _PACKED_EPOCHS))]
        self.sampler = PartSampler([len(part) for part in parts], args.seed)
        return concatenate_datasets(parts)

    # After the trainer has prepared the data

    def settle(self, train_dataset: Any, eval_dataset: Any, *, came_prepared: bool) -> tuple[Any, Any]:
        """
        Warn about rows that preparation has dropped, record the remaining tasks, and plan the draws of an epoch.

        Args:
            train_dataset, eval_dataset: The prepared data.
            came_prepared (`bool`): Whether the user prepared them (`skip_prepare_dataset`).

        Returns:
            `tuple`: The training and evaluation data to use.

        Raises:
            RuntimeError: If `SFTTrainer` did not prepare the training data.
            ValueError: If no row (with a task router: no row of one task) has a token to train on, or the tasks can't
                be mixed as configured.
        """
        if self._has_training and not came_prepared and not self._saw_training:
            raise RuntimeError(
                "`SFTTrainer` did not prepare the training data under the name 'train', so that the mixture of tasks "
                "would be lost. Install a version of TRL that `rlora_trl` supports (`pip install rlora-trl`)."
            )
        if came_prepared and isinstance(train_dataset, Dataset) and not has_transform(train_dataset):
            train_dataset, eval_dataset = self._drop_prepared(train_dataset, eval_dataset)
        if self._lost_rows.places is not None:
            self._config.tasks = list(self.names) or None
            self._lost_rows.places = None  # all datasets have the new ids
        self.report_lost_rows()
        self._plan_epochs(train_dataset)
        return train_dataset, eval_dataset

    def _drop_prepared(self, train_dataset: Dataset, eval_dataset: Any) -> tuple[Dataset, Any]:
        if not {TASK_IDS, "labels"} <= set(train_dataset.column_names):
            return train_dataset, eval_dataset
        before = rows_of_tasks(train_dataset, len(self.names))
        dropped: Any = self._drop_lost_rows(train_dataset, before, "train", is_training=True)
        if isinstance(eval_dataset, dict):
            return dropped, {name: self._lost_rows.renumber(part) for name, part in eval_dataset.items()}
        return dropped, self._lost_rows.renumber(eval_dataset)

    def report_lost_rows(self) -> None:
        """Log one warning about the rows that preparation has dropped since the last report."""
        self._lost_rows.warn()

    def _plan_epochs(self, train_dataset: Any) -> None:
        args = self._args
        has_ids = isinstance(train_dataset, Dataset) and TASK_IDS in train_dataset.column_names
        if has_ids and not args.packing and self.mixture is None:
            self.mixture = self._plan_mixture(train_dataset)
            if args.mixes_tasks:
                self.sampler = self._sample_mixture(train_dataset)
        if args.mixes_tasks and self.mixture is None and isinstance(train_dataset, Dataset):
            raise ValueError(
                f"`mixing={args.mixing!r}` mixes tasks, and the training data has no task column. Pass a "
                "dictionary of datasets by task, or set `task_column` to the column that names them."
            )

    def _sample_mixture(self, dataset: Dataset) -> MixtureSampler:
        strategy = self._args.train_sampling_strategy
        if strategy != "random":
            raise ValueError(
                f"`mixing={self._args.mixing!r}` draws rows itself and can't be combined with "
                f"`train_sampling_strategy={strategy!r}`. Leave that at 'random'."
            )
        assert self.mixture is not None
        draws = [self.mixture.draws.get(task, 0) for task in self.names]
        return MixtureSampler(ids_of(dataset), draws, self._args.seed)

    def _plan_mixture(self, dataset: Dataset) -> TaskMixture:
        args = self._args
        if "input_ids" in dataset.column_names:
            rows, tokens = count_tasks(dataset, len(self.names), TASK_IDS)
        elif args.mixing_unit == "tokens":
            columns = ", ".join(name for name in dataset.column_names if name != TASK_IDS)
            raise ValueError(
                f"`mixing_unit='tokens'` counts the column 'input_ids', and the training data has {columns}: rows "
                "with images, or with a transform, get their tokens when a batch is made. Set `mixing_unit='rows'`."
            )
        else:
            rows, tokens = rows_of_tasks(dataset, len(self.names))[:-1].tolist(), None

        present = [index for index, count in enumerate(rows) if count]
        return TaskMixture(
            {self.names[index]: rows[index] for index in present},
            tokens=None if tokens is None else {self.names[index]: tokens[index] for index in present},
            mixing=args.mixing,
            temperature=args.mixing_temperature,
            cap=args.mixing_cap,
            unit=args.mixing_unit,
        )

    def sample_rows(self, train_dataset: Any, rows: int) -> Dataset | None:
        """At most `rows` rows of each task of the prepared training data, evenly spread; `None` if it has no tasks."""
        if rows < 1 or not self.names or not isinstance(train_dataset, Dataset):
            return None
        if TASK_IDS not in train_dataset.column_names:
            return None
        if is_packed(train_dataset):  # each row has several tasks
            return train_dataset.select(_spread(range(len(train_dataset)), rows * len(self.names)))
        ids = ids_of(train_dataset)
        indices = [_spread(np.flatnonzero(ids == task).tolist(), rows) for task in np.unique(ids)]
        return train_dataset.select(sorted(itertools.chain(*indices)))

    def describe(self, train_dataset: Any) -> dict[str, Any] | None:
        """A fingerprint of the training data, to compare with a checkpoint; see [`describe_data`]."""
        # A resumed run may have more packed parts (one per epoch), so compare only the first.
        sampler = self.sampler
        return describe_data(train_dataset, sampler.lengths[0] if isinstance(sampler, PartSampler) else None)


def _spread(indices: Sequence[int], count: int) -> list[int]:
    """At most `count` of the indices, at even distances."""
    if len(indices) <= count:
        return list(indices)
    return [indices[(2 * number + 1) * len(indices) // (2 * count)] for number in range(count)]


def _pack_rows(dataset: AnyDataset, args: RLoraSFTConfig, map_kwargs: dict[str, Any]) -> AnyDataset:
    dataset = spread_over_tokens(dataset, **map_kwargs).select_columns(["input_ids", "labels", TASK_IDS])
    if args.shuffle_dataset:
        dataset = dataset.shuffle(seed=args.seed)
    dataset = pack_dataset(dataset, args.max_length, args.packing_strategy, map_kwargs)
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


def name_tasks_of_adapter(config: RLoraConfig, tasks: list[str] | None, *, is_new: bool) -> list[str]:
    """
    The names of an adapter's tasks in the order of their ids: earlier tasks, then new ones in the training data.

    Args:
        config ([`RLoraConfig`]): Configuration of the adapter.
        tasks (`list[str]`, *optional*): Tasks of the training data.
        is_new (`bool`): Whether the adapter is created by this run.

    Raises:
        ValueError: If the adapter has head weights by task, and lacks a task of the training data.
    """
    recorded = list(config.tasks or [])
    added = [task for task in tasks or [] if task not in recorded]
    if added and recorded and config.router == "task":
        remedy = (
            "Name all tasks, or leave `tasks` to the trainer." if is_new else "Train a new adapter on all of them."
        )
        raise ValueError(
            f"The adapter has head weights for each of its tasks ({', '.join(recorded)}), and the training data has "
            f"{', '.join(added)} too. {remedy}"
        )
    return recorded + added


def _warn_of_missing_tasks(eval_dataset: Any, tasks: list[str] | None) -> None:
    if not isinstance(eval_dataset, Mapping) or not tasks or not set(map(str, eval_dataset)) & set(tasks):
        return
    absent = [task for task in tasks if task not in {str(name) for name in eval_dataset}]
    if absent:
        logger.warning(
            f"`eval_dataset` has no data for {', '.join(absent)}, which the training data has: means over tasks leave "
            "these tasks out. Add them, or ignore this."
        )
