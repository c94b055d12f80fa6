"""Several published adapters on one base model: to switch between, or to mix."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ..files.checks import CheckedAdapter
from ..files.names import hub_name
from ..hub.pull import pull_checked
from ..tuner import RLoraLayer
from .names import adapter_name, split_revision


def load(
    adapters: str | Sequence[str] | Mapping[str, str],
    base: torch.nn.Module | str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    **base_kwargs: Any,
) -> PeftModel:
    """
    Load adapters on one base model; the first is active, `set_adapter` switches.

    Args:
        adapters (`str`, `Sequence[str]` or `Mapping[str, str]`):
            Repositories or folders; `"user/name@revision"` names a revision. With a mapping, by the names that they
            get; otherwise they are called as their repositories.
        base (`torch.nn.Module` or `str`, *optional*):
            The base model, or its name. Defaults to the one that the adapters name, at the revision that they name.
        token (`str` or `bool`, *optional*), cache_dir (`str`, *optional*):
            As in [`pull_adapter`].
        base_kwargs:
            Arguments of `AutoModelForCausalLM.from_pretrained`, such as `dtype` and `device_map`.

    Returns:
        `PeftModel`: In eval mode.

    Raises:
        AdapterCheckError: If an adapter is damaged, hostile, or of another base model than `base`.
        ValueError: If the adapters belong to different base models, or to different revisions of one.
    """
    by_name = _named(adapters)
    pulled: dict[str, CheckedAdapter] = {}
    for name, place in by_name.items():
        repo_id, revision = split_revision(place)
        pulled[name] = pull_checked(
            repo_id, revision=revision, token=token, cache_dir=cache_dir, base_model=_name_of(base)
        )
    if base is None or isinstance(base, str):
        base = _load_base(base, pulled, {"token": token, **base_kwargs})
    model: PeftModel | None = None
    for name, adapter in pulled.items():
        if model is None:
            model = PeftModel.from_pretrained(base, str(adapter.folder), adapter_name=name)
        else:
            model.load_adapter(str(adapter.folder), name)
    assert model is not None
    return model.eval()


def _named(adapters: str | Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    if isinstance(adapters, Mapping):
        named = dict(adapters)
    else:
        named = {}
        for place in [adapters] if isinstance(adapters, str) else adapters:
            named[adapter_name(split_revision(place)[0], named)] = place
    if not named:
        raise ValueError(f"`load` needs adapters, got {adapters!r}.")
    return named


def _name_of(base: torch.nn.Module | str | None) -> str | None:
    """The Hub name of a base model. A folder may hold the model of any name, and may have moved."""
    if isinstance(base, torch.nn.Module):
        config = getattr(base, "config", None)
        return hub_name(getattr(config, "_name_or_path", None) or getattr(base, "name_or_path", None))
    return base if base is not None and not os.path.isdir(base) else None


def _load_base(name: str | None, pulled: Mapping[str, CheckedAdapter], kwargs: dict[str, Any]) -> torch.nn.Module:
    bases = {adapter.base_model for adapter in pulled.values()}
    if name is None:
        if len(bases) != 1 or None in bases:
            told = ", ".join(f"{name}: {adapter.base_model}" for name, adapter in pulled.items())
            raise ValueError(f"The adapters do not share one base model ({told}). Load those of each by themselves.")
        name = next(iter(bases))
    pinned = {key: adapter.base_model_revision for key, adapter in pulled.items() if adapter.base_model_revision}
    # A revision of the adapters' own base model means nothing for another, such as a copy in a folder.
    if bases == {name} and "revision" not in kwargs and pinned:
        if len(set(pinned.values())) > 1:
            told = ", ".join(f"{key}: {revision}" for key, revision in pinned.items())
            raise ValueError(
                f"The adapters were trained on different revisions of {name} ({told}). Load those of each by "
                "themselves, or choose one with `revision`."
            )
        kwargs = {"revision": next(iter(pinned.values())), **kwargs}
    return AutoModelForCausalLM.from_pretrained(name, **kwargs)


def mix(model: PeftModel, weights: Mapping[str, float]) -> None:
    """
    Run several adapters at once: the sum of their deltas, each times its weight, is added to the base model.

    Adapters that are not listed are off. `model.set_adapter(name)` goes back to one, as it is.

    Args:
        model (`PeftModel`): With R-LoRA adapters.
        weights (`Mapping[str, float]`): Weights by adapter name, any finite numbers; 1.0 is the adapter as it is.

    Raises:
        ValueError: If there are no weights, one is not finite, or an adapter is not loaded.
    """
    unknown = [name for name in weights if name not in model.peft_config]
    if unknown or not weights:
        raise ValueError(
            f"`mix` needs weights of loaded adapters ({', '.join(model.peft_config)}), got {dict(weights)!r}."
        )
    scaled = {name: torch.tensor(float(weight)) for name, weight in weights.items()}
    if not all(bool(torch.isfinite(weight)) for weight in scaled.values()):
        raise ValueError(f"Weights must be finite numbers, got {dict(weights)!r}.")
    # First, as it sets all scales to 1.0.
    model.base_model.set_adapter(list(weights), inference_mode=True)
    for module in model.modules():
        if isinstance(module, RLoraLayer):
            for name in model.peft_config:
                module.set_scale(name, float(weights.get(name, 1.0)))
