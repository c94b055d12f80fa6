"""Loads several published adapters on one base model, to switch between them or to mix them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from ..files.checks import CheckedAdapter
from ..files.names import hub_name
from ..hub.pull import pull_checked
from ..tuner import RLoraLayer
from .search import split_revision


def load(
    adapters: str | Sequence[str] | Mapping[str, str],
    base: torch.nn.Module | str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    **base_kwargs: Any,
) -> PeftModel:
    """
    Load adapters on one base model. The first is active; `set_adapter` switches to another.

    Args:
        adapters (`str`, `Sequence[str]` or `Mapping[str, str]`):
            Repositories or folders; `"user/name@revision"` names a revision. A mapping sets their names in the model;
            by default these are the names of the repositories.
        base (`torch.nn.Module` or `str`, *optional*):
            The base model or its name. Defaults to the base model and revision that the adapters name.
        token (`str` or `bool`, *optional*), cache_dir (`str`, *optional*):
            As in [`pull_adapter`].
        base_kwargs:
            Arguments of `AutoModelForCausalLM.from_pretrained`, such as `dtype` and `device_map`.

    Returns:
        `PeftModel`: In eval mode.

    Raises:
        AdapterCheckError: If an adapter is damaged, hostile, or was trained on another base model than `base`.
        ValueError: If the adapters have different base models, or different revisions of one.
    """
    # Pull and check all of them before a model is loaded.
    pulled: dict[str, CheckedAdapter] = {}
    for name, source in _named(adapters).items():
        repo_id, revision = split_revision(source)
        pulled[name] = pull_checked(
            repo_id, revision=revision, token=token, cache_dir=cache_dir, base_model=_hub_name_of(base)
        )

    if base is None or isinstance(base, str):
        base = _load_base(base, pulled, {"token": token, **base_kwargs})
    (first, adapter), *others = pulled.items()
    model = PeftModel.from_pretrained(base, str(adapter.folder), adapter_name=first)
    for name, adapter in others:
        model.load_adapter(str(adapter.folder), name)
    return model.eval()


def _named(adapters: str | Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Repositories or folders by adapter name: the last part of the repository's name, numbered if it is taken."""
    if not adapters:
        raise ValueError(f"`load` needs at least one adapter, got {adapters!r}. Name a repository or a folder.")
    if isinstance(adapters, Mapping):
        return dict(adapters)

    named: dict[str, str] = {}
    for source in [adapters] if isinstance(adapters, str) else adapters:
        # PyTorch separates the names of modules by dots.
        plain = re.sub(r"[^\w-]", "_", split_revision(source)[0].rstrip("/").rsplit("/", 1)[-1])
        name, count = plain, 2
        while name in named:
            name, count = f"{plain}_{count}", count + 1
        named[name] = source
    return named


def _hub_name_of(base: torch.nn.Module | str | None) -> str | None:
    """The Hub name of a base model, `None` for a folder, which may hold any model."""
    if isinstance(base, torch.nn.Module):
        config = getattr(base, "config", None)
        return hub_name(getattr(config, "_name_or_path", None) or getattr(base, "name_or_path", None))
    return base if base is not None and not os.path.isdir(base) else None


def _load_base(name: str | None, pulled: Mapping[str, CheckedAdapter], kwargs: dict[str, Any]) -> torch.nn.Module:
    bases = {adapter.base_model for adapter in pulled.values()}
    if name is None:
        if len(bases) != 1 or None in bases:
            by_adapter = ", ".join(f"{name}: {adapter.base_model}" for name, adapter in pulled.items())
            raise ValueError(
                f"The adapters do not share one base model ({by_adapter}). Call `load` once for each base model."
            )
        name = next(iter(bases))

    pinned = {key: adapter.base_model_revision for key, adapter in pulled.items() if adapter.base_model_revision}
    # The revision belongs to the base model that the adapters name, not to a copy of it in a folder.
    if bases == {name} and "revision" not in kwargs and pinned:
        if len(set(pinned.values())) > 1:
            by_adapter = ", ".join(f"{key}: {revision}" for key, revision in pinned.items())
            raise ValueError(
                f"The adapters were trained on different revisions of {name} ({by_adapter}). Choose one with "
                "`revision`, or call `load` once for each."
            )
        kwargs = {"revision": next(iter(pinned.values())), **kwargs}
    # A stranger's adapter may name the base: its code is run only if the caller says so, and nothing asks.
    return AutoModelForCausalLM.from_pretrained(name, **{"trust_remote_code": False, **kwargs})


def mix(model: PeftModel, weights: Mapping[str, float]) -> None:
    """
    Run several adapters at once: the weighted sum of their deltas is added to the base model.

    Other adapters are inactive. `model.set_adapter(name)` returns to a single adapter at weight 1.

    Args:
        model (`PeftModel`): A model with R-LoRA adapters.
        weights (`Mapping[str, float]`): Weights by adapter name, any finite numbers; 1.0 leaves an adapter unchanged.

    Raises:
        ValueError: If `weights` is empty, a weight is not finite, or an adapter is not loaded.
    """
    unknown = [name for name in weights if name not in model.peft_config]
    if unknown or not weights:
        raise ValueError(
            f"`mix` needs weights of loaded adapters ({', '.join(model.peft_config)}), got {dict(weights)!r}. Name "
            "these only."
        )
    if not all(math.isfinite(weight) for weight in weights.values()):
        raise ValueError(f"Weights must be finite numbers, got {dict(weights)!r}. Correct them.")

    # Activation comes first, as it resets all scales to 1.0.
    model.base_model.set_adapter(list(weights), inference_mode=True)
    for module in model.modules():
        if isinstance(module, RLoraLayer):
            for name in model.peft_config:
                module.set_scale(name, float(weights.get(name, 1.0)))
