"""Validates a checkpoint before a run resumes from it, and the loaded tensors after."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files.config import read_config
from ..files.layout import CONFIG_NAME, WEIGHTS_NAME
from ..files.names import hub_name
from ..files.record import AdapterRecord
from ..files.tensors import file_digest
from ..reading import AdapterCheckError, read_safetensors_header, shorten
from ..tuner import RLoraConfig
from .saving import adapter_folder
from .state_files import read_object, read_state, read_trainer_state


logger = get_logger(__name__)

# The output of an adapter depends on these, so a run can't be resumed with other values.
_MUST_MATCH = (
    *("r", "num_heads", "lora_alpha", "use_rslora", "share_a", "router", "router_top_k", "init_weights", "tasks"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("target_parameters", "modules_to_save", "bias", "trainable_token_indices"),
)
_UNORDERED = (
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
)
# A run may resume with other values of these, with a warning.
_WARN_IF_CHANGED = ("head_dropout", "dropout_position")
# Written by one process, by FSDP, by DeepSpeed.
_OPTIMIZER_STATES = ("optimizer.pt", "optimizer.bin", "optimizer_0", "global_step*")
FRESH_START_HINT = (
    "To start a new run from the adapter instead, pass `AutoPeftModelForCausalLM.from_pretrained(checkpoint, "
    "is_trainable=True)` and don't resume."
)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint folder, or -1 for other folders."""
    prefix, _, step = checkpoint.name.rpartition("-")
    return int(step) if prefix == PREFIX_CHECKPOINT_DIR and step.isdecimal() else -1


def list_checkpoints(root: str | Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    folders = [path for path in Path(root).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and step_of(path) >= 0]
    return sorted(folders, key=step_of, reverse=True)


def find_checkpoint(root: str | Path) -> Path:
    """
    The newest complete checkpoint in a folder. Damaged ones are skipped with a warning.

    Raises:
        ValueError: If the folder has no complete checkpoint.
    """
    problems = []
    for path in list_checkpoints(root):
        problem = checkpoint_problem(path)
        if problem is None:
            return path
        problems.append(f"{path}: {problem}")
        logger.warning(f"Skipped the damaged checkpoint {path}: {problem}.")
    details = f" ({'; '.join(problems)})" if problems else ""
    raise ValueError(
        f"`resume_from_checkpoint=True` found no complete checkpoint in {str(root)!r}{details}. Pass the folder of a "
        "checkpoint, or start a new run."
    )


def list_files(checkpoint: Path) -> dict[str, int]:
    """Sizes in bytes of the files of a checkpoint, except for text and JSON, which may be edited."""
    return {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.suffix not in (".json", ".md", ".py")
    }


def checkpoint_problem(checkpoint: Path) -> str | None:
    """A description of what is wrong with the files of a checkpoint, or `None`."""
    try:
        _check_files(checkpoint)
    except ValueError as error:  # `AdapterCheckError` is one
        return str(error)
    return None


def _check_files(checkpoint: Path) -> None:
    step = read_trainer_state(checkpoint).get("global_step")
    if step_of(checkpoint) not in (-1, step):
        raise AdapterCheckError(f"its state is of step {step}")
    state = read_state(checkpoint)
    sizes = list_files(checkpoint)

    # The adapters, of which DeepSpeed's and FSDP's checkpoints have copies in their own formats.
    weights = [name for name in sizes if name == WEIGHTS_NAME or name.endswith(f"/{WEIGHTS_NAME}")]
    if not weights:
        raise AdapterCheckError(f"it has no adapter ({WEIGHTS_NAME})")
    headers = {name: read_safetensors_header(checkpoint / name) for name in weights}

    # Names from the file are only looked up among those of the folder.
    for name, size in state.get("files", {}).items():
        if name not in sizes:
            raise AdapterCheckError(f"{shorten(name)[1:-1]} is missing")
        if sizes[name] != size:
            raise AdapterCheckError(f"{shorten(name)[1:-1]} has {sizes[name]} bytes and was saved with {size}")
    if not any(any(checkpoint.glob(pattern)) for pattern in _OPTIMIZER_STATES):
        raise AdapterCheckError("it has no optimizer state (`save_only_model=True`?)")

    for adapter, digest in state.get("adapters", {}).items():
        name = WEIGHTS_NAME if adapter == "default" else f"{adapter}/{WEIGHTS_NAME}"
        if name not in headers:
            raise AdapterCheckError(f"{shorten(name)[1:-1]} is missing")
        read_object((checkpoint / name).with_name(CONFIG_NAME))
        if file_digest(checkpoint / name, headers[name]) != digest:
            raise AdapterCheckError(f"the tensors in {name} differ from those that were saved")


def check_files(checkpoint: Path) -> None:
    """
    Check the files of a checkpoint.

    Raises:
        ValueError: If there is no such folder, or files are missing or damaged.
    """
    if not checkpoint.is_dir():
        others = ", ".join(path.name for path in list_checkpoints(checkpoint.parent)) or "no checkpoint"
        raise ValueError(
            f"There is no checkpoint {str(checkpoint)!r}; {str(checkpoint.parent)!r} has {others}. Pass the folder of "
            "a checkpoint, or `True` for the newest one in `output_dir`."
        )
    problem = checkpoint_problem(checkpoint)
    if problem is not None:
        raise ValueError(
            f"The run can't be resumed from {str(checkpoint)!r}: {problem.rstrip('.')}. Resume from another "
            f"checkpoint. {FRESH_START_HINT}"
        )


def check_strategy(checkpoint: Path, strategy: str, processes: int) -> None:
    """
    Check that the optimizer state in a checkpoint is sharded as in this run.

    Args:
        checkpoint (`Path`): The checkpoint.
        strategy (`str`): How this run distributes its training.
        processes (`int`): Number of its processes.

    Raises:
        ValueError: If it is sharded differently, with the remedy.
    """
    state = read_state(checkpoint)
    saved = state.get("strategy", strategy)
    if "strategy" not in state and any(checkpoint.glob("global_step*")) != strategy.startswith("DeepSpeed"):
        saved = "another strategy"
    if saved != strategy:
        raise ValueError(
            f"The optimizer state in {str(checkpoint)!r} was saved with {saved}, and this run uses {strategy}. "
            f"Resume with the strategy of the checkpoint. {FRESH_START_HINT}"
        )
    ranks = state.get("processes", processes)
    if ranks != processes and strategy.startswith("DeepSpeed"):
        tag = f"global_step{step_of(checkpoint)}"
        raise ValueError(
            f"DeepSpeed's state in {str(checkpoint)!r} is sharded over {ranks} processes, and this run has "
            f"{processes}. Resume with {ranks} processes; or convert it, in that folder, with `python -m "
            f"deepspeed.checkpoint.ds_to_universal --input_folder {tag} --output_folder {tag}_universal` (ZeRO-1 and "
            '2: `--inject_missing_state` too), and resume once with `"checkpoint": {"load_universal": true}` in the '
            "DeepSpeed configuration and the same number of rows per step."
        )


def check_settings(checkpoint: Path, config: RLoraConfig, adapter_name: str, base_commit: str | None = None) -> None:
    """
    Compare the adapter and base model of a run with those of a checkpoint.

    Args:
        checkpoint (`Path`): The checkpoint.
        config ([`RLoraConfig`]): Configuration of the adapter in training.
        adapter_name (`str`): Its name.
        base_commit (`str`, *optional*): The commit of the loaded base model, if known.

    Raises:
        ValueError: If the adapters compute different functions, or the base models are known to differ.
    """
    folder = adapter_folder(checkpoint, adapter_name)
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"The checkpoint {str(checkpoint)!r} has no adapter named {adapter_name!r} (adapter_config.json). Resume "
            "from a checkpoint of this run."
        )
    saved = read_config(folder / CONFIG_NAME)
    differences = [*_differences(saved, config, _MUST_MATCH), *_base_differences(folder, saved, config, base_commit)]
    if differences:
        raise ValueError(
            f"The run can't be resumed from {str(checkpoint)!r}, which has another adapter or base model:\n  "
            + "\n  ".join(differences)
            + f"\nResume with the settings of the checkpoint. {FRESH_START_HINT}"
        )
    for difference in _differences(saved, config, _WARN_IF_CHANGED):
        logger.warning(f"The run is resumed with a changed setting. {difference}")


def _base_differences(folder: Path, saved: RLoraConfig, config: RLoraConfig, commit: str | None) -> list[str]:
    """
    How the base models differ.

    Where both commits are known they decide, as a repository may have several names. Another local folder may hold the
    same model: it is warned of.
    """
    record = AdapterRecord.load(folder)
    saved_commit = None if record is None else record.base_model_revision
    if commit is not None and saved_commit is not None:
        if commit == saved_commit:
            return []
        remedy = f"load the former with `model_init_kwargs={{'revision': {saved_commit!r}}}`"
        return [f"commit of the base model: checkpoint has {saved_commit}, this run has {commit} ({remedy})"]

    before, now = saved.base_model_name_or_path, config.base_model_name_or_path
    if before == now:
        return []
    if not hub_name(before) or not hub_name(now):
        logger.warning(
            f"The checkpoint was trained on the base model {before!r}, and this run has {now!r}. Make sure that they "
            "are the same model: the weights of local folders are not compared."
        )
        return []
    return [f"base model: checkpoint has {before}, this run has {now}"]


def _differences(saved: RLoraConfig, present: RLoraConfig, names: tuple[str, ...]) -> list[str]:
    differences = []
    for name in names:
        before, now = (_plain(getattr(config, name, None), name) for config in (saved, present))
        if before != now:
            differences.append(f"{name}: checkpoint has {shorten(before, 200)}, this run has {shorten(now, 200)}")
    return differences


def _plain(value: Any, name: str) -> Any:
    """A setting in the form to compare: sorted if its order is meaningless, `None` for empty values."""
    if isinstance(value, Mapping):
        return dict(sorted(value.items())) or None
    if isinstance(value, list | tuple | set | frozenset):
        return (sorted(value, key=str) if name in _UNORDERED else list(value)) or None
    return value


def describe_changed_values(
    expected: Mapping[str, torch.Tensor], present: Mapping[str, torch.Tensor], checkpoint: str | os.PathLike
) -> str | None:
    """How the tensors in training differ from those of a checkpoint, in words, or `None`."""
    if expected.keys() != present.keys():
        return f"{checkpoint} and the model have tensors of different names"
    differing = [
        name for name in sorted(expected) if not torch.equal(expected[name].to(present[name].dtype), present[name])
    ]
    if not differing:
        return None
    name = differing[0]
    norms = f"norm {present[name].float().norm():.6g}, saved with {expected[name].float().norm():.6g}"
    return (
        f"{len(differing)} of {len(expected)} tensors in the model differ from {checkpoint}, among them {name} "
        f"({norms})"
    )
