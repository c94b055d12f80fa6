"""The adapter that is converted: its configuration and its tensors, read as files of a stranger."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from ..files.checks import WEIGHTS_LIMIT
from ..files.config import read_fields
from ..files.layout import CONFIG_NAME, PICKLED_WEIGHTS_NAME, WEIGHTS_NAME
from ..files.pickled import load_pickled, read_pickled_header
from ..files.tensors import is_finite
from ..reading import AdapterCheckError, TensorEntry, read_safetensors_header, shorten
from ..tuner import RLoraConfig


# Where the authors' callback saves the adapter, within a checkpoint or the output of a run.
_AUTHORS_FOLDER = "sft_lora_model"


class Converted(NamedTuple):
    """A converted adapter: its configuration, and its tensors by their names in the file."""

    config: RLoraConfig
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """
    A file of tensors whose header was checked.

    Args:
        path (`Path`): The file.
        entries (`dict[str, TensorEntry]`): Type and shape of each tensor, by name, in the order of the file.
    """

    path: Path
    entries: dict[str, TensorEntry]

    def load(self) -> dict[str, torch.Tensor]:
        """
        Read the tensors, in float32 unless they have a larger type.

        Raises:
            AdapterCheckError: If they can't be read, or a value is NaN or infinite.
        """
        pickled = self.path.suffix == ".bin"
        tensors = load_pickled(self.path, self.entries) if pickled else load_file(self.path)
        for name, tensor in tensors.items():
            if not is_finite(tensor):
                raise AdapterCheckError(
                    f"{self.path} holds NaN or infinity in {name}. The file is damaged or training diverged; use an "
                    "earlier checkpoint."
                )
        # A clone: tensors of a pickle may share a storage, which safetensors refuses.
        return {
            name: tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True).contiguous()
            for name, tensor in tensors.items()
        }


@dataclass(frozen=True)
class Source:
    """An adapter to convert: the fields of its configuration, and its weights."""

    folder: Path
    fields: Mapping[str, Any]
    weights: Weights

    @property
    def config_path(self) -> Path:
        """The file of the fields, for messages."""
        return self.folder / CONFIG_NAME


def read_source(folder: str | os.PathLike) -> Source:
    """
    Read the configuration of an adapter and the header of its weights.

    Raises:
        AdapterCheckError: If the folder holds no adapter of `peft_type` LORA, or a damaged or hostile one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterCheckError(
            f"{folder} is not a folder. Pass the one that holds {CONFIG_NAME}. An adapter on the Hub must be "
            "downloaded first: `hf download user/adapter --local-dir FOLDER`."
        )
    if not (folder / CONFIG_NAME).exists():
        inner = folder / _AUTHORS_FOLDER
        hint = f"pass {inner}" if inner.is_dir() else "pass the folder that the adapter was saved in"
        raise AdapterCheckError(f"{folder} has no {CONFIG_NAME}: {hint}.")
    fields = read_fields(
        folder / CONFIG_NAME,
        "LORA",
        "What is converted is a plain LoRA adapter of PEFT, or one of the authors' code, whose type is LORA too. An "
        "R-LoRA adapter needs no conversion, and `rlora export` writes it as LoRA.",
    )
    return Source(folder, fields, read_weights(folder))


def read_weights(path: str | os.PathLike) -> Weights:
    """
    Read the header of the weights in a folder, or of a file.

    Raises:
        AdapterCheckError: If there is none, or it is damaged or hostile.
    """
    path = Path(path)
    if path.is_dir():
        found = [name for name in (WEIGHTS_NAME, PICKLED_WEIGHTS_NAME) if (path / name).exists()]
        if len(found) != 1:
            has = f"both {' and '.join(found)}" if found else f"neither {WEIGHTS_NAME} nor {PICKLED_WEIGHTS_NAME}"
            raise AdapterCheckError(f"{path} has {has}, and one of them is expected. Pass a folder with one.")
        path = path / found[0]
    if path.suffix == ".bin":
        return Weights(path, read_pickled_header(path, limit=WEIGHTS_LIMIT))
    return Weights(path, read_safetensors_header(path, limit=WEIGHTS_LIMIT))


def dropout_of(source: Source) -> float:
    """The probability of dropout in a configuration, 0 if it is not set."""
    value = source.fields.get("lora_dropout") or 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise AdapterCheckError(
            f"{source.config_path} has `lora_dropout` {shorten(value)}, and a number in [0, 1) is expected. Correct "
            "it."
        )
    return float(value)


def required_number(source: Source, field: str) -> Any:
    """A field that a configuration must have; its type and range were checked if it is there."""
    value = source.fields.get(field)
    if value is None:
        raise AdapterCheckError(
            f"{source.config_path} has no `{field}`, without which nothing can be converted. Add it."
        )
    return value


def new_config(source: Source, given: Mapping[str, Any], **fields: Any) -> RLoraConfig:
    """
    The configuration of the converted adapter, as a saved one is.

    Args:
        source ([`Source`]): The source, for messages.
        given (`Mapping[str, Any]`): Fields that the caller has set, and that override others unless they are `None`.
        fields: Fields from the source.

    Raises:
        AdapterCheckError: If a value that was taken from the source is not accepted.
    """
    overriding = {name: value for name, value in given.items() if value is not None}
    try:
        config = RLoraConfig(inference_mode=True, **{**fields, **overriding})
    except (TypeError, ValueError) as error:
        raise AdapterCheckError(
            f"{source.config_path} can't be converted: {shorten(str(error), 400)} Correct the file."
        ) from error
    # `RLoraConfig` makes a set of them, which would be written in any order.
    for name in ("target_modules", "exclude_modules"):
        if isinstance(getattr(config, name), set):
            setattr(config, name, sorted(getattr(config, name)))
    return config
