"""What a run is trained with: compared with its checkpoint when it is resumed, and recorded as it really was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset

from ..hub.record import Scalar, is_plain, select_hyperparameters
from ..safe_files import shorten
from .resuming import INSTEAD, read_state, step_of


logger = get_logger(__name__)

# Settings of the optimizer, which its state in a checkpoint overrides, and what the place in the data depends on.
_MUST_MATCH = (
    *("learning_rate", "router_learning_rate", "loraplus_lr_ratio", "train_a", "optim", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "seed", "data_seed", "train_sampling_strategy"),
    *("mixing", "mixing_temperature", "mixing_cap", "mixing_unit", "packing", "packing_strategy", "max_length"),
)
# What takes effect when it is changed, and changes what the run is.
_WARN_IF_CHANGED = (
    *("num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps", "max_grad_norm"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "world_size"),
    *("balance_loss", "balance_coef", "balance_scope", "loss_type", "label_smoothing_factor", "neftune_noise_alpha"),
    *("completion_only_loss", "assistant_only_loss", "padding_free", "bf16", "fp16", "tf32"),
)
_DATA = "training data"
# Rows whose tokens are compared.
_SAMPLED_ROWS = 64


@dataclass
class RunSettings:
    """
    The settings of a run, from its first step on, also where it was resumed with others.

    Attributes:
        parts (`list[dict]`): One for each time that it began or was resumed: `from_step`; `compared`, all settings by
            name, as JSON has them; `recorded`, those that may be published.
    """

    parts: list[dict[str, Any]] = field(default_factory=list)

    def begin(
        self,
        step: int,
        args: Any,
        data: Any,
        earlier: list[dict[str, Any]] | None = None,
        batch_size: int | None = None,
    ) -> None:
        """
        Take in what the run does from now on.

        Args:
            step (`int`): Steps that it has behind it.
            args ([`RLoraSFTConfig`]): The configuration.
            data (`dict`, *optional*): See [`describe_data`].
            earlier (`list[dict]`, *optional*): The parts of the run that is resumed.
            batch_size (`int`, *optional*): Rows of a micro-batch of a device, where `auto_find_batch_size` has found
                another number than `args` has.
        """
        # What ended before it made a step has left no trace.
        before = [part for part in earlier or [] if part["from_step"] < step]
        found = {} if batch_size is None else {"per_device_train_batch_size": batch_size}
        compared, recorded = {**settings_of(args, data), **found}, {**select_hyperparameters(args), **found}
        self.parts = [*before, {"from_step": step, "compared": compared, "recorded": recorded}]

    def recorded(self, step: int) -> dict[str, Scalar]:
        """
        The settings that the steps of the run, `step` up to now, were really made with, to be published.

        A setting that was changed is text such as "0.01 until step 10, then 0.02".
        """
        trained = [part for part in self.parts if part["from_step"] < step] or self.parts[-1:]
        names = dict.fromkeys(name for part in trained for name in part["recorded"])
        return {name: self._over_time(name, trained) for name in names}

    @staticmethod
    def _over_time(name: str, parts: list[dict[str, Any]]) -> Scalar:
        values = [(part["from_step"], part["recorded"].get(name, "unset")) for part in parts]
        changes = [values[0], *(now for before, now in zip(values, values[1:], strict=False) if now[1] != before[1])]
        if len(changes) == 1:
            return changes[0][1]
        steps = [f"{value} until step {until}" for (_, value), (until, _) in zip(changes, changes[1:], strict=False)]
        text = f"{', then '.join(steps)}, then {changes[-1][1]}"
        return text if is_plain(text) else f"{changes[-1][1]} since step {changes[-1][0]}, others before"


def settings_of(args: Any, data: Any) -> dict[str, Any]:
    """All settings that are compared, as JSON has them; see [`RunSettings`]."""
    values = {name: getattr(args, name, None) for name in (*_MUST_MATCH, *_WARN_IF_CHANGED)}
    values = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    return json.loads(json.dumps({**values, _DATA: data}, default=str))


def describe_data(dataset: Any, rows: int | None = None) -> dict[str, Any] | None:
    """
    What shows whether prepared training data are the same: the number of rows, and a digest of some of them.

    Args:
        dataset: The data.
        rows (`int`, *optional*): Only the first ones.

    Returns:
        `dict` with `rows` and `digest`, or `None` for streams and for data with a transform, whose rows are not known.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return None
    total = len(dataset) if rows is None else min(rows, len(dataset))
    tokens = [name for name in ("input_ids", "labels") if name in dataset.column_names]
    # Pictures are large, and their files may lie elsewhere.
    columns = tokens or [name for name in dataset.column_names if name not in ("image", "images")]
    chosen = [place * total // min(total, _SAMPLED_ROWS) for place in range(min(total, _SAMPLED_ROWS))]
    sample = dataset.with_format(None).select_columns(columns).select(chosen).to_list()
    text = json.dumps(sample, sort_keys=True, default=str)
    return {"rows": total, "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}


def check_run(checkpoint: Path, args: Any, data: Any) -> None:
    """
    Compare what a run is to be trained with, with what its checkpoint was trained with.

    Args:
        checkpoint (`Path`): The checkpoint; one without such settings, of an earlier version, is not compared.
        args ([`RLoraSFTConfig`]): The configuration of the run.
        data (`dict`, *optional*): See [`describe_data`].

    Raises:
        ValueError: If settings differ that the state of the optimizer or the place in the data depends on, with each.
            Others that differ are warned of by name.
    """
    parts = read_state(checkpoint).get("runs")
    if not parts:
        return
    saved, present = parts[-1]["compared"], settings_of(args, data)
    refused = _differences(saved, present, (*_MUST_MATCH, _DATA))
    if refused:
        raise ValueError(
            f"The run can't be resumed from {str(checkpoint)!r}, which was trained with other settings:\n  "
            + "\n  ".join(refused)
            + "\nThe state of the optimizer and the place in the data in the checkpoint are those of its settings. "
            f"Resume with these. {INSTEAD}"
        )
    changed = _differences(saved, present, _WARN_IF_CHANGED)
    if changed:
        logger.warning(
            f"The run is resumed from step {step_of(checkpoint)} with other settings, which its record will say: "
            + "; ".join(changed)
            + ". Pass the earlier values to continue the run unchanged."
        )


def _differences(saved: Mapping[str, Any], present: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    differing = [name for name in names if name in saved and saved[name] != present[name]]
    # Of data that are a stream nothing is known.
    known = [name for name in differing if name != _DATA or None not in (saved[name], present[name])]
    return [
        f"{name}: checkpoint has {_in_words(saved[name])}, this run has {_in_words(present[name])}" for name in known
    ]


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['rows']:,} rows (digest {value['digest']})"
    return shorten(value, 100)
