"""The settings of a run: compared with the checkpoint when it is resumed, and recorded as they were used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset

from ..evaluation.formats import has_transform
from ..files.record import Scalar, is_plain, select_hyperparameters
from ..reading import shorten
from .resuming import FRESH_START_HINT, step_of
from .state_files import DATA, read_state
from .task_ids import TASK_IDS


logger = get_logger(__name__)

# Settings that the optimizer's state in a checkpoint overrides, or that the position in the data depends on.
_MUST_MATCH = (
    *("learning_rate", "router_learning_rate", "loraplus_lr_ratio", "train_a", "optim", "optim_args", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "seed", "data_seed", "train_sampling_strategy"),
    *("mixing", "mixing_temperature", "mixing_cap", "mixing_unit", "packing", "packing_strategy"),
    "dataset_num_proc",
)
# Settings that take effect when they are changed, and change the run.
_WARN_IF_CHANGED = (
    *("num_train_epochs", "max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
    *("max_length", "dataloader_drop_last", "ignore_data_skip", "average_tokens_across_devices", "nan_policy"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size"),
    *("balance_loss", "balance_coef", "balance_scope", "loss_type", "label_smoothing_factor", "neftune_noise_alpha"),
    *("completion_only_loss", "assistant_only_loss", "padding_free", "bf16", "fp16", "tf32"),
)
# Numbers of rows to compare: by their tokens, or by their text if they are not tokenized.
_SAMPLED_ROWS, _SAMPLED_TEXTS = 10_000, 64
# Implementations of one algorithm with the same state.
_SAME_OPTIMIZER = {"adamw_torch_fused": "adamw_torch"}


@dataclass
class RunSettings:
    """
    The settings of a run, including those of its earlier parts if it was resumed with others.

    Attributes:
        parts (`list[dict]`): One for each start and resumption: `from_step`; `compared`, all settings by name, as
            JSON values; `recorded`, those that may be published.
    """

    parts: list[dict[str, Any]] = field(default_factory=list)

    def begin(
        self,
        step: int,
        args: Any,
        data: Any,
        earlier: list[dict[str, Any]] | None = None,
        batch_size: int | None = None,
        router_rate: float | None = None,
    ) -> None:
        """
        Start a part of the run.

        Args:
            step (`int`): Number of steps before it.
            args ([`RLoraSFTConfig`]): The configuration.
            data (`dict`, *optional*): See [`describe_data`].
            earlier (`list[dict]`, *optional*): The parts of the run that is resumed.
            batch_size (`int`, *optional*): Rows of a micro-batch of a device, if `auto_find_batch_size` uses another
                number than `args` has.
            router_rate (`float`, *optional*): Learning rate of task routers, if `args` gives none.
        """
        # Parts that ended before their first step changed nothing.
        before = [part for part in earlier or [] if part["from_step"] < step]
        used = {} if batch_size is None else {"per_device_train_batch_size": batch_size}
        compared, recorded = {**settings_of(args, data), **used}, {**select_hyperparameters(args), **used}
        if router_rate is not None:
            recorded["router_learning_rate"] = router_rate
        self.parts = [*before, {"from_step": step, "compared": compared, "recorded": recorded}]

    def recorded(self, step: int) -> dict[str, Scalar]:
        """
        The settings that the steps of the run used, to be published.

        Args:
            step (`int`): Number of steps so far.

        Returns:
            `dict[str, Scalar]`: Settings by name; one that changed is text such as "0.01 until step 10, then 0.02".
        """
        trained = [part for part in self.parts if part["from_step"] < step] or self.parts[-1:]
        names = dict.fromkeys(name for part in trained for name in part["recorded"])
        return {name: self._over_time(name, trained) for name in names}

    @staticmethod
    def _over_time(name: str, parts: list[dict[str, Any]]) -> Scalar:
        values = [(part["from_step"], part["recorded"].get(name, "unset")) for part in parts]
        changes = [values[0], *(after for before, after in pairwise(values) if after[1] != before[1])]
        if len(changes) == 1:
            return changes[0][1]
        steps = [f"{value} until step {until}" for (_, value), (until, _) in pairwise(changes)]
        text = f"{', then '.join(steps)}, then {changes[-1][1]}"
        return text if is_plain(text) else f"{changes[-1][1]} since step {changes[-1][0]}, others before"


def settings_of(args: Any, data: Any) -> dict[str, Any]:
    """All settings that are compared, as JSON values; see [`RunSettings`]."""
    values = {name: getattr(args, name, None) for name in (*_MUST_MATCH, *_WARN_IF_CHANGED)}
    values = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    values["optim"] = _SAME_OPTIMIZER.get(str(values["optim"]), values["optim"])
    values["data_seed"] = values["seed"] if values["data_seed"] is None else values["data_seed"]
    if not values["packing"]:  # without it, these do not change the rows
        values["packing_strategy"] = values["dataset_num_proc"] = None
    # Infinity, which JSON lacks, as text.
    return json.loads(json.dumps({**values, DATA: data}, default=str), parse_constant=str)


def describe_data(dataset: Any, rows: int | None = None) -> dict[str, Any] | None:
    """
    Fingerprint prepared training data, to check that a resumed run has the same data.

    The digest covers the tokens and tasks of at most 10,000 rows, evenly spaced.

    Args:
        dataset: The data.
        rows (`int`, *optional*): Only the first rows.

    Returns:
        `dict`, *optional*: The number of `rows`, and a `digest`; `None` for streams and data with a transform, which
        can't be read in advance.
    """
    if not isinstance(dataset, Dataset) or has_transform(dataset):
        return None

    total = len(dataset) if rows is None else min(rows, len(dataset))
    tokens = [name for name in ("input_ids", "labels", TASK_IDS) if name in dataset.column_names]
    count = min(total, _SAMPLED_ROWS if "input_ids" in tokens else _SAMPLED_TEXTS)
    sample = dataset.with_format("arrow").select([index * total // count for index in range(count)])

    digest = hashlib.sha256()
    if "input_ids" in tokens:
        for batch in sample.select_columns(tokens).iter(batch_size=1000):
            for name in tokens:
                _digest_numbers(digest, batch[name])
    else:  # not images, which are large and whose files may have moved
        columns = [name for name in dataset.column_names if name not in ("image", "images")]
        texts = sample.with_format(None).select_columns(columns).to_list()
        digest.update(json.dumps(texts, sort_keys=True, default=str).encode())
    return {"rows": total, "digest": digest.hexdigest()[:16]}


def _digest_numbers(digest: Any, column: pa.ChunkedArray) -> None:
    """Add a column of integers, or of lists of integers, to a digest that does not depend on their type or chunks."""
    if not pa.types.is_integer(column.type):
        digest.update(pc.fill_null(pc.list_value_length(column), -1).to_numpy().astype(np.int64).tobytes())
        column = pc.list_flatten(column)
    digest.update(pc.fill_null(column, -1).to_numpy().astype(np.int64).tobytes())


def check_run(checkpoint: Path, args: Any, data: Any) -> None:
    """
    Compare the settings of a run with those of its checkpoint, and warn about harmless differences.

    Args:
        checkpoint (`Path`): The checkpoint. Checkpoints of earlier versions, without settings, are not compared.
        args ([`RLoraSFTConfig`]): The configuration of the run.
        data (`dict`, *optional*): See [`describe_data`].

    Raises:
        ValueError: If settings differ on which the optimizer state or the position in the data depends.
    """
    parts = read_state(checkpoint).get("runs")
    if not parts:
        return
    saved, present = parts[-1]["compared"], settings_of(args, data)
    refused = _differences(saved, present, (*_MUST_MATCH, DATA))
    if refused:
        raise ValueError(
            f"The run can't be resumed from {str(checkpoint)!r}, which was trained with other settings:\n  "
            + "\n  ".join(refused)
            + "\nThe optimizer state and the position in the data depend on these settings. Resume with "
            f"the settings of the checkpoint. {FRESH_START_HINT}"
        )
    changed = _differences(saved, present, _WARN_IF_CHANGED)
    if changed:
        logger.warning(
            f"The run is resumed from step {step_of(checkpoint)} with changed settings, which the record will list: "
            + "; ".join(changed)
            + ". Pass the earlier values to continue the run unchanged."
        )


def _differences(saved: Mapping[str, Any], present: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    differing = [name for name in names if name in saved and saved[name] != present[name]]
    return [
        f"{name}: checkpoint has {_in_words(name, saved[name])}, this run has {_in_words(name, present[name])}"
        for name in differing
    ]


def _in_words(name: str, value: Any) -> str:
    if name != DATA:
        return shorten(value, 100)
    return "a stream" if value is None else f"{value['rows']:,} rows (digest {value['digest']})"
