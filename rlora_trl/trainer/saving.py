"""Writes adapters in full under every strategy, and checks them before they replace an earlier save."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..files.layout import CONFIG_NAME, WEIGHTS_NAME
from ..files.tensors import file_digest
from ..reading import AdapterCheckError, TensorEntry, first_few, read_safetensors_header
from ..tuner.comparison import compare_tensors


# Folder for unfinished saves, within the folder that is saved to.
STAGING = ".rlora-saving"
_REPLACED = ".rlora-replaced-"
_ADAPTER = ".rlora_adapters."
_OUT_OF_SPACE = ("No space left", "os error 28", "Disk quota exceeded", "os error 122")
# Errors of safetensors and `torch.save` that may have other causes.
_MAYBE_OUT_OF_SPACE = (
    *("File too large", "os error 27", "PytorchStreamWriter failed", "inline_container", "iostream error"),
)


@dataclass(frozen=True)
class SavedTensor:
    """The name in the model of a saved tensor (`None` if PEFT makes it), and its full shape."""

    name: str | None
    shape: tuple[int, ...]


class FullTensors:
    """
    The tensors of a model's adapters, by their names in the model and in the files.

    Args:
        model (`PeftModel`): The model, sharded or not.

    Attributes:
        files (`dict[str, dict[str, SavedTensor]]`): By adapter, and by name in its file.
    """

    def __init__(self, model: PeftModel) -> None:
        tensors = [*model.named_parameters(remove_duplicate=False), *_saved_buffers(model)]
        # PEFT selects and renames tensors. Tensors without values show how, whichever process holds the values.
        stand_ins = {name: torch.empty(full_shape(tensor), device="meta") for name, tensor in tensors}
        names = {id(stand_in): name for name, stand_in in stand_ins.items()}
        self.files: dict[str, dict[str, SavedTensor]] = {}
        for adapter in model.peft_config:
            selected = get_peft_model_state_dict(model, state_dict=dict(stand_ins), adapter_name=adapter)
            self.files[adapter] = {
                saved: SavedTensor(names.get(id(tensor)), tuple(tensor.shape)) for saved, tensor in selected.items()
            }

    @property
    def names(self) -> list[str]:
        """Unique names in the model, sorted, so that all processes have one order."""
        return sorted({entry.name for entries in self.files.values() for entry in entries.values() if entry.name})


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """
    The persistent buffers, by name, as a state dict has them.

    PEFT keeps the original rows of `trainable_token_indices` in such a buffer.
    """
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def full_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The full shape of a tensor that may be sharded by ZeRO-3. (Tensors of FSDP2 have their full shape.)"""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def gather_tensors(model: nn.Module, names: Iterable[str], *, keep: bool) -> dict[str, torch.Tensor]:
    """
    The full values of tensors under any strategy. Call it on all ranks, with the same names.

    Adapters are returned in float32: DeepSpeed's float32 values where it trains copies in 16 bits.

    Args:
        model (`torch.nn.Module`): The model.
        names (`Iterable[str]`): Names of parameters and buffers.
        keep (`bool`): Whether this process needs the values; the others only take part in gathering.

    Returns:
        `dict[str, torch.Tensor]`: On the CPU, by name; empty with `keep=False`.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # a pass without a backward pass leaves 16-bit copies
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensors: dict[str, torch.Tensor] = dict(everything)
    gathered = {}
    for name in names:
        value = _whole(tensors[name])
        if keep:
            dtype = torch.promote_types(value.dtype, torch.float32) if _ADAPTER in name else tensors[name].dtype
            gathered[name] = value.detach().to("cpu", dtype, copy=True)
    return gathered


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full values of a tensor, on all ranks."""
    if tensor.requires_grad and (hasattr(tensor, "_hp_mapping") or hasattr(tensor, "_z3_optimizer")):
        from deepspeed.utils import safe_get_full_fp32_param

        master = safe_get_full_fp32_param(tensor)
        if master is not None:
            return master
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def adapter_folder(root: str | Path, adapter_name: str) -> Path:
    """The folder of an adapter in that of its model: PEFT saves each adapter but "default" in a subfolder."""
    return Path(root) if adapter_name == "default" else Path(root, adapter_name)


def check_saved(root: Path, tensors: FullTensors, strategy: str) -> dict[str, str]:
    """
    Check the files of adapters against the tensors of the model.

    Args:
        root (`Path`): The folder that the model was saved in.
        tensors ([`FullTensors`]): The tensors of the model.
        strategy (`str`): How training is distributed, and the setting for it, for the message.

    Returns:
        `dict[str, str]`: The digest of each adapter's file, by its name.

    Raises:
        RuntimeError: If a file is missing, lacks a tensor, has one of another shape, or one that is not finite.
    """
    digests = {}
    for adapter, expected in tensors.files.items():
        path = adapter_folder(root, adapter) / WEIGHTS_NAME
        try:
            entries = read_safetensors_header(path)
            problems = _describe_differences(expected, entries)
            if problems:
                raise AdapterCheckError(f"it {'; it '.join(problems)}")
            digests[adapter] = file_digest(path, entries, finite=True)
        except AdapterCheckError as error:
            raise RuntimeError(
                f"Adapter {adapter!r} was not saved, and earlier files are unchanged: the written file does not match "
                f"the model ({error}). Training ran with {strategy}."
            ) from error
    return digests


def _describe_differences(expected: dict[str, SavedTensor], entries: dict[str, TensorEntry]) -> list[str]:
    differences = compare_tensors(
        {name: tensor.shape for name, tensor in expected.items()},
        {name: entry.shape for name, entry in entries.items()},
    )
    problems = []
    if differences.missing:
        problems.append(f"lacks {first_few(differences.missing)}")
    if differences.unknown:
        problems.append(f"has unknown {first_few(differences.unknown)}")
    if differences.misshapen:
        name = min(differences.misshapen)
        wanted, written = differences.misshapen[name]
        problems.append(
            f"has {len(differences.misshapen)} tensors of other shapes, such as {name}: {list(written)} instead of "
            f"{list(wanted)}"
        )
    return problems


def flush_to_disk(folder: Path) -> None:
    """Flush all files of a folder to the disk, before it is renamed."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            try:
                os.fsync(file.fileno())
            except OSError as error:  # some file systems can't, or not for a file opened for reading
                if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
                    raise


def move_files(source: Path, target: Path) -> None:
    """
    Move all files of a folder into another, over those of the same names.

    Configurations of adapters are moved last: a new folder has one only after all other files.
    """
    paths = sorted(
        (path.relative_to(source) for path in source.rglob("*") if path.is_file()),
        key=lambda path: path.name == CONFIG_NAME,
    )
    for path in paths:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / path, target / path)
    shutil.rmtree(source)


def move_folder(source: Path, target: Path) -> None:
    """Rename a folder in one step. An existing target is set aside meanwhile; see [`restore_set_aside`]."""
    aside = target.with_name(f"{_REPLACED}{target.name}")
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(target, aside)
    try:
        os.replace(source, target)
    except OSError:
        if aside.exists():
            os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def restore_set_aside(root: Path) -> None:
    """Restore folders that a killed process had set aside, and remove its unfinished saves."""
    for aside in root.glob(f"{_REPLACED}checkpoint-*"):
        target = root / aside.name.removeprefix(_REPLACED)
        if target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(aside, target)
    shutil.rmtree(root / STAGING, ignore_errors=True)


@contextmanager
def explain_full_disk(folder: Path, what: str) -> Generator[None, None, None]:
    """
    Turn the many errors with which libraries report a full disk into one clear error.

    Args:
        folder (`Path`): The destination.
        what (`str`): Name of what is saved, for the message.

    Raises:
        OSError: If the disk is full, or probably full.
    """
    try:
        yield
    except Exception as error:
        full = full_disk_error(error, folder, f"{what} in {str(folder)!r}")
        if full is None:
            raise
        raise full from error


def full_disk_error(error: BaseException, folder: Path, what: str) -> OSError | None:
    """The error for a save that failed for lack of space, or `None` if it failed for another reason."""
    text = str(error)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    number = getattr(error, "errno", None)
    is_full = number in (errno.ENOSPC, errno.EDQUOT) or any(sign in text for sign in _OUT_OF_SPACE)
    is_full = is_full or (isinstance(error, OSError | RuntimeError) and free < 2**20)
    may_be_full = number == errno.EFBIG or any(sign in text for sign in _MAYBE_OUT_OF_SPACE)
    if not is_full and (not may_be_full or "Input/output error" in text):
        return None
    return OSError(
        errno.ENOSPC,
        f"There is {'' if is_full else 'probably '}no space left to save {what} ({free / 2**20:.1f} MiB are free at "
        f"{existing}{'' if is_full else ', so it may be a quota or a limit on files'}; {text}). Earlier saves "
        "are unchanged. Free some space or keep fewer checkpoints (`save_total_limit`), and resume from the newest.",
    )
