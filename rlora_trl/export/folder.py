"""Exports an adapter from its files alone, for programs that have the base model in a form of their own."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..files.checks import CheckedAdapter
from ..files.layout import CARD_NAME, WEIGHTS_NAME
from ..reading import first_few, read_safetensors_header
from ..tuner import RLoraConfig
from ..tuner.config import AdapterSource
from ..tuner.layer import RLoraLayer, RLoraLinear
from ..tuner.patterns import settle_patterns
from ..tuner.routing import Routing
from ..tuner.selection import adapter_of
from ..tuner.stored import split_by_layer
from .export import check_task
from .lora import PREFIX, lora_config, lora_tensors, save_lora_config
from .report import ExportReport, render_card
from .verify import check_deltas
from .weights import choose_head_weights


_NAME = "default"


def export_folder(checked: CheckedAdapter, output_dir: Path, *, task: str) -> ExportReport:
    """
    Write a checked adapter as a plain LoRA adapter, without its base model.

    As [`export_lora`], with the adapter's own head weights or those recorded with it. `target_modules` of the export
    lists the paths of the adapted layers, as shorter names might select others in the base, which is not known here.

    Args:
        checked ([`CheckedAdapter`]): The adapter.
        output_dir (`Path`): The folder to create.
        task (`str`): The task to export the adapter for, one of its tasks where it names them.

    Returns:
        [`ExportReport`]: The facts about the export. Nothing is measured.

    Raises:
        ValueError: If the task is unknown, no head weights are known for it, the adapter has trained more than its
            heads, or the written tensors differ from the adapter.
    """
    config = checked.config
    check_task(config, task)
    layers = read_layers(checked)
    source = copy.copy(config)
    source.source = AdapterSource(str(checked.folder))  # type: ignore[misc]  # where the record is
    weights = choose_head_weights(layers, _NAME, source, task=task)

    # The files, which are read again and compared with the adapter.
    tensors = lora_tensors(layers, _NAME, weights.by_layer)
    rank = next(iter(tensors.values())).shape[0]
    output_dir.mkdir()
    save_lora_config(lora_config(config, rank, list(layers), [], config.fan_in_fan_out), output_dir)
    save_file(tensors, output_dir / WEIGHTS_NAME, metadata={"format": "pt"})
    check_deltas(load_file(output_dir / WEIGHTS_NAME), layers, _NAME, weights.by_layer)

    report = ExportReport(
        path=str(output_dir),
        task=task,
        rank=rank,
        layers=len(layers),
        exact=weights.exact,
        mixture=weights.origin,
    )
    render_card(report, config, None).save(output_dir / CARD_NAME)
    return report


def read_layers(checked: CheckedAdapter) -> dict[str, RLoraLayer]:
    """
    The adapted layers of a checked adapter, around linear layers without values.

    Args:
        checked ([`CheckedAdapter`]): The adapter.

    Returns:
        `dict[str, RLoraLayer]`: By their paths in the base model. Each has one adapter, named "default", on the CPU.

    Raises:
        ValueError: If the file has tensors besides the heads, which a plain LoRA adapter for engines can't have, or
            adapters of experts.
    """
    path = checked.folder / WEIGHTS_NAME
    stored = split_by_layer(path, read_safetensors_header(path))
    # PEFT saves the base's own weight of an adapted output head too.
    trained = set(stored.others) - {f"{PREFIX}{layer}.base_layer.weight" for layer in stored.layers}
    if trained:
        raise ValueError(
            f"The adapter has trained {first_few(sorted(trained))} besides its heads, and engines load LoRA only. "
            "Merge it into its base with `export_lora(..., merge=True)`, and serve that model."
        )
    experts = [layer for layer in checked.layers if len(stored.layers[layer]["B"].shape) == 4]
    if experts:
        raise ValueError(
            f"The adapter adapts experts ({first_few(experts, 1)}), whose LoRA can't be written without the base "
            "model. Use `export_lora` or `rlora export`."
        )
    # Patterns of a stranger, as names of layers; and shapes of LoRA don't depend on how the base stores its weight.
    config = copy.copy(checked.config)
    settle_patterns(config, list(stored.layers), stored.ranks, str(path))
    config.fan_in_fan_out = False

    routing = Routing(config.tasks, config.router)
    tensors = load_file(path)
    layers: dict[str, RLoraLayer] = {}
    for layer in checked.layers:
        values = {role: tensors[f"{PREFIX}{layer}.rlora_adapters.{role}"] for role in stored.layers[layer]}
        layers[layer] = _layer_of(values, layer, config, routing)
    return layers


def _layer_of(values: Mapping[str, torch.Tensor], layer: str, config: RLoraConfig, routing: Routing) -> RLoraLayer:
    """A layer with the adapter that has these tensors, by role."""
    base = nn.Linear(values["A"].shape[-1], values["B"].shape[1], bias=False, device="meta")
    module = RLoraLinear(base, _NAME, config, layer_name=layer, routing=routing)
    adapter_of(module, _NAME).load_state_dict(values)
    return module
