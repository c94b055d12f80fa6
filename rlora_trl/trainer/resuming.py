"""Whether a run may go on from a checkpoint, and whether it really does."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files.layout import CONFIG_NAME, WEIGHTS_NAME
from ..files.reading import read_safetensors_header, shorten
from ..files.tensors import file_digest
from ..tuner import RLoraConfig
from .saving import adapter_folder


logger = get_logger(__name__)

STATE_FILE = "rlora_state.json"
PROBE_FILE = "rlora_probe.safetensors"
# What an adapter computes depends on these, so a run can't be resumed with others.
_FIXED = (
    *("r", "num_heads", "lora_alpha", "use_rslora", "share_a", "router", "router_top_k", "init_weights", "tasks"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "bias", "trainable_token_indices"),
)
_UNORDERED = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
# A run may go on with others of these, but not unawares.
_TOLD = ("head_dropout", "dropout_position")
# Of one process, of FSDP, of DeepSpeed.
_OPTIMIZER_STATES = ("optimizer.pt", "optimizer.bin", "optimizer_0", "global_step*")
# Of the loss on the probe: other devices and other numbers of processes round otherwise, in bfloat16 by a percent.
_PROBE_TOLERANCE = 0.02
_PROBE_ROWS, _PROBE_TOKENS = 2, 1024
# Where rows lie in a packed batch, for attention kernels; they follow from `position_ids` too.
_OF_ROWS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
INSTEAD = (
    "To begin a new run from the adapter instead, pass `AutoPeftModelForCausalLM.from_pretrained(checkpoint, "
    "is_trainable=True)` and don't resume."
)


def step_of(checkpoint: Path) -> int:
    """The step that a folder's name says it is a checkpoint of, or -1."""
    prefix, _, step = checkpoint.name.rpartition("-")
    return int(step) if prefix == PREFIX_CHECKPOINT_DIR and step.isdecimal() else -1


def list_checkpoints(root: str | Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    found = [path for path in Path(root).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and step_of(path) >= 0]
    return sorted(found, key=step_of, reverse=True)


def find_checkpoint(root: str | Path) -> Path:
    """
    The newest checkpoint of a folder that is whole. Others are passed over with a warning.

    Raises:
        ValueError: If there is none.
    """
    problems = []
    for path in list_checkpoints(root):
        problem = checkpoint_problem(path)
        if problem is None:
            return path
        problems.append(f"{path}: {problem}")
        logger.warning(f"The checkpoint {path} is passed over, as it is damaged: {problem}.")
    told = f" ({'; '.join(problems)})" if problems else ""
    raise ValueError(
        f"`resume_from_checkpoint=True` needs a checkpoint in {str(root)!r}, and there is none that is whole{told}. "
        "Pass the folder of one, or start anew."
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint has of ours; empty if it has nothing."""
    path = checkpoint / STATE_FILE
    return read_object(path) if path.exists() else {}


def read_object(path: Path) -> dict[str, Any]:
    """
    A JSON object from a file.

    Raises:
        ValueError: If the file is missing, can't be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} can't be read ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds a {type(value).__name__} instead of an object")
    return value


def list_files(checkpoint: Path) -> dict[str, int]:
    """The files of a checkpoint with their sizes in bytes, but for text, which people edit, and our own state."""
    return {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.suffix not in (".json", ".md", ".py")
    }


def checkpoint_problem(checkpoint: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or `None`."""
    try:
        _check_files(checkpoint)
    except ValueError as error:  # `AdapterCheckError` is one
        return str(error)
    return None


def _check_files(checkpoint: Path) -> None:
    read_object(checkpoint / TRAINER_STATE_NAME)
    if not any(any(checkpoint.glob(pattern)) for pattern in (WEIGHTS_NAME, f"*/{WEIGHTS_NAME}")):
        raise ValueError(f"it has no adapter ({WEIGHTS_NAME})")
    state = read_state(checkpoint)
    for name, size in state.get("files", {}).items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"{name} has {path.stat().st_size} bytes and was saved with {size}")
    if not any(any(checkpoint.glob(pattern)) for pattern in _OPTIMIZER_STATES):
        raise ValueError("it has no state of the optimizer, as with `save_only_model=True`")
    for adapter, digest in state.get("adapters", {}).items():
        folder = adapter_folder(checkpoint, adapter)
        read_object(folder / CONFIG_NAME)
        path = folder / WEIGHTS_NAME
        if file_digest(path, read_safetensors_header(path)) != digest:
            raise ValueError(f"the tensors in {path.relative_to(checkpoint)} are not those that were saved")


def check_files(checkpoint: Path) -> None:
    """
    Check the files of a checkpoint.

    Raises:
        ValueError: If some are missing or damaged.
    """
    problem = checkpoint_problem(checkpoint)
    if problem is not None:
        raise ValueError(
            f"The run can't be resumed from {str(checkpoint)!r}: {problem}. Resume from another checkpoint. {INSTEAD}"
        )


def check_strategy(checkpoint: Path, strategy: str, processes: int) -> None:
    """
    See whether the optimizer's state in a checkpoint is divided as this run divides it.

    Args:
        checkpoint (`Path`): The checkpoint.
        strategy (`str`): How this run spreads its training.
        processes (`int`): Its processes.

    Raises:
        ValueError: If it is divided otherwise, with what to do.
    """
    state = read_state(checkpoint)
    saved = state.get("strategy", strategy)
    if "strategy" not in state and any(checkpoint.glob("global_step*")) != strategy.startswith("DeepSpeed"):
        saved = "another strategy"
    if saved != strategy:
        raise ValueError(
            f"The state of the optimizer in {str(checkpoint)!r} was saved with {saved}, and this run has {strategy}. "
            f"Resume with the former. {INSTEAD}"
        )
    ranks = state.get("processes", processes)
    if ranks != processes and strategy.startswith("DeepSpeed"):
        tag = f"global_step{step_of(checkpoint)}"
        raise ValueError(
            f"DeepSpeed's state in {str(checkpoint)!r} is divided among {ranks} processes, and this run has "
            f"{processes}. Resume with {ranks}; or convert it, in that folder, with `python -m "
            f"deepspeed.checkpoint.ds_to_universal --input_folder {tag} --output_folder {tag}_universal` (ZeRO-1 and "
            '2: `--inject_missing_state` too), and resume once with `"checkpoint": {"load_universal": true}` in the '
            "DeepSpeed configuration and the same batch of a step."
        )


def check_settings(checkpoint: Path, config: RLoraConfig, adapter_name: str) -> None:
    """
    Compare the adapter of a run with that of a checkpoint.

    Raises:
        ValueError: If what the adapters compute is not the same, with each difference.
    """
    folder = adapter_folder(checkpoint, adapter_name)
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(
            f"The checkpoint {str(checkpoint)!r} has no adapter named {adapter_name!r} (adapter_config.json). Resume "
            "from a checkpoint of this run."
        )
    saved = RLoraConfig.from_pretrained(str(folder))
    differences = _differences(saved, config, _FIXED)
    if differences:
        raise ValueError(
            f"The run can't be resumed from {str(checkpoint)!r}, whose adapter is another one:\n  "
            + "\n  ".join(differences)
            + f"\nResume with the settings of the checkpoint. {INSTEAD}"
        )
    for difference in _differences(saved, config, _TOLD):
        logger.warning(f"The run goes on with another setting than it had. {difference}")


def _differences(saved: RLoraConfig, present: RLoraConfig, names: tuple[str, ...]) -> list[str]:
    told = []
    for name in names:
        before, now = (_plain(getattr(config, name, None), name) for config in (saved, present))
        if before != now:
            told.append(f"{name}: checkpoint has {shorten(before, 200)}, this run has {shorten(now, 200)}")
    return told


def _plain(value: Any, name: str) -> Any:
    """A setting as it compares: without order where order means nothing, and `None` for what is empty."""
    if isinstance(value, Mapping):
        return dict(sorted(value.items())) or None
    if isinstance(value, list | tuple | set | frozenset):
        return (sorted(value) if name in _UNORDERED else list(value)) or None
    return value


def make_probe(batch: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
    """
    A few rows of a batch, on which a resumed run shows that it computes what it did.

    Returns:
        `dict[str, torch.Tensor]`: The batch cut to at most 2 rows and 1,024 tokens, on the CPU; `None` for batches
            that can't be cut (pictures among the text, no labels).
    """
    ids, labels = batch.get("input_ids"), batch.get("labels")
    if not isinstance(ids, torch.Tensor) or not isinstance(labels, torch.Tensor) or ids.ndim != 2:
        return None
    probe = {}
    for name, value in batch.items():
        if value is None or name in _OF_ROWS:
            continue
        cuttable = isinstance(value, torch.Tensor) and 0 < value.ndim <= 2
        if not cuttable or tuple(value.shape) != tuple(ids.shape[: value.ndim]):
            return None
        cut = value[:_PROBE_ROWS]
        probe[name] = (
            (cut if cut.ndim == 1 else cut[:, :_PROBE_TOKENS])
            .detach()
            .cpu()
            .clone(memory_format=torch.contiguous_format)
        )
    # The first token of a row has no loss.
    return probe if bool((probe["labels"][:, 1:] != -100).any()) else None


def same_loss(expected: float, found: float) -> bool:
    """Whether two losses on the probe are those of one model, in nats per token."""
    return abs(found - expected) <= _PROBE_TOLERANCE * max(1.0, abs(expected))


def compare_tensors(
    expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], checkpoint: str | os.PathLike
) -> str | None:
    """What differs between the tensors of a checkpoint and those that train, or `None`."""
    if expected.keys() != found.keys():
        return f"{checkpoint} and the model have tensors of different names"
    other = [name for name in sorted(expected) if not torch.equal(expected[name].to(found[name].dtype), found[name])]
    if not other:
        return None
    name = other[0]
    return (
        f"{len(other)} of {len(expected)} tensors in the model are not those in {checkpoint}, among them {name} "
        f"(norm {found[name].float().norm():.6g}, saved with {expected[name].float().norm():.6g})"
    )
