"""`export_lora`: an adapter under fixed head weights, as plain LoRA for programs that lack this package."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..analysis.measuring import measure_head_weights
from ..files.layout import CARD_NAME, WEIGHTS_NAME
from ..reading import first_few, shorten
from ..tuner import RLoraConfig
from ..tuner.bnb_cpu import kept_quantized
from ..tuner.layer import RLoraLayer
from ..tuner.selection import adapted_layers, adapter_config, core_model
from ..tuner.task_heads import TaskHeads, find_task_heads
from .experts import refuse_mean_weights, split_layers
from .gap import measure_export_gap
from .loading import load_adapted
from .lora import (
    PREFIX,
    base_module_names,
    check_targets_kept,
    lora_config,
    lora_tensors,
    rank_of,
    save_lora_config,
    target_names,
)
from .merge import check_mergeable, merge_export
from .report import MARKER, ExportReport, render_card
from .verify import check_deltas
from .weights import Routing, choose_head_weights


logger = logging.get_logger(__name__)

Rows: TypeAlias = Sequence[Mapping[str, Any]]


def export_lora(
    model: nn.Module | str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    adapter_name: str | None = "default",
    task: str | None = None,
    routing: Routing | None = None,
    data: Mapping[str, Rows] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    merge: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    published_as: tuple[str, str] | None = None,
) -> ExportReport:
    """
    Write an adapter as a plain LoRA adapter in PEFT's format, which loads without this package.

    The export uses the same head weights for every token. With `router="uniform"`, and for a task of `router="task"`,
    the adapter does so too, and the export is the same function. Other routers compute head weights for each token:
    their export uses the mean over the tokens of a task, which is an approximation. Pass `data` to measure how good.

    The written tensors are compared with the adapter, layer by layer, before the export replaces what was in the
    folder. The model does not change.

    Args:
        model (`torch.nn.Module` or `str`):
            A `PeftModel`, a transformers model with the adapter loaded, or the folder or Hub name of an adapter.
        output_dir (`str`):
            Folder to write. It may hold an earlier export, which is replaced, but nothing else.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            The adapter to export; `None` for the only one, or the active one.
        task (`str`, *optional*):
            The task to export the adapter for, one of its tasks where it names them. Required by `router="task"`.
        routing ([`HeadWeights`], weights, or weights by layer, *optional*):
            Head weights: measured by [`measure_head_weights`], N numbers for all layers, or N numbers by layer.
            Defaults to the adapter's own, those recorded with it for `task`, or those measured on `data`. Measured
            weights of an adapter with `router="uniform"` or `"task"` are replaced by its own.
        data (`Mapping[str, Sequence[Mapping]]`, *optional*):
            Rows by task, as for [`score_tasks`], to compare the export with the adapter on: those of `task`, or all
            without a task.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The model's tokenizer, which `data` requires and which is saved with a merged model. Loaded with the
            adapter where `model` is a name.
        merge (`bool`, *optional*, defaults to `False`):
            Write the full model with the adapter merged into it by PEFT, in the dtype of the base, which must not be
            quantized. Needs memory for a copy of the base.
        revision (`str`, *optional*):
            Branch, tag or commit of the adapter, where `model` is a name on the Hub.
        token (`str` or `bool`, *optional*):
            Hub token, as in `huggingface_hub.hf_hub_download`, where `model` is a name or its base model is private.
        published_as (`tuple[str, str]`, *optional*):
            Hub repository and folder that the export will be published in, for its card:
            `("user/name", "exports/sst2")`.

    Returns:
        [`ExportReport`]: The facts about the export, which are also in its card.

    Raises:
        ValueError: If no head weights are known or they are invalid, the adapter or the task is unknown, the folder
            holds something else, the model is sharded or offloaded, the base can't be merged into, or the written
            tensors differ from the adapter. Nothing is written then.
    """
    target = _check_target(Path(output_dir))

    # Find the adapter, and load it if `model` is a name.
    source: str | None = None
    if not isinstance(model, nn.Module):
        source = os.fspath(model)
        model, loaded_tokenizer = load_adapted(source, adapter_name or "default", revision=revision, token=token)
        tokenizer = tokenizer if tokenizer is not None else loaded_tokenizer
    adapter_name, config = _find_adapter(model, adapter_name)
    source = source or (config.source.name if config.source is not None else None)
    core, layers = core_model(model), adapted_layers(model, adapter_name)

    check_task(config, task)
    _check_heads(core, task, merge)
    _check_whole(model)
    if merge:
        check_mergeable(core)
    rows = _select_rows(data, task, tokenizer)

    def measure() -> Any:
        return measure_head_weights(model, tokenizer, rows, adapter_name=adapter_name)

    with kept_quantized(core), tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        weights = choose_head_weights(
            layers, adapter_name, config, task=task, routing=routing, measure=measure if rows else None, token=token
        )

        refuse_mean_weights(layers, weights.exact)

        # Everything is written to a temporary folder and moved at the end.
        stage = Path(scratch) / "export"
        rank, others = _write_adapter(model, config, adapter_name, layers, weights.by_layer, stage, task)
        warnings = (*_refused_by_engines(config, others), *_refused_for_experts(layers))
        if merge:
            adapter = stage.rename(stage.with_name("adapter"))
            warnings = merge_export(core, adapter, layers, stage, tokenizer)

        report = ExportReport(
            path=str(output_dir),
            task=task,
            rank=rank,
            layers=len(layers),
            exact=weights.exact,
            mixture=weights.origin,
            warnings=warnings,
            merged=merge,
        )
        if rows:
            assert tokenizer is not None
            gap = measure_export_gap(model, tokenizer, adapter_name, rows, weights.by_layer, known_task=task)
            report = dataclasses.replace(report, **dataclasses.asdict(gap))

        repo_id, subfolder = published_as or (None, None)
        render_card(report, config, source, repo_id, subfolder).save(stage / CARD_NAME)
        _move_into_place(stage, target)

    for warning in report.warnings:
        logger.warning(warning)
    return report


def _write_adapter(
    model: nn.Module,
    config: RLoraConfig,
    adapter_name: str,
    layers: Mapping[str, RLoraLayer],
    head_weights: Mapping[str, torch.Tensor],
    folder: Path,
    task: str | None,
) -> tuple[int, dict[str, torch.Tensor]]:
    """Write a LoRA adapter and check it; returns its rank, and the tensors in it that are not LoRA's."""
    core = core_model(model)
    tensors = lora_tensors(layers, adapter_name, head_weights)
    rank = rank_of(tensors, layers)
    linear, experts = split_layers(layers)
    transposed = any(layer.fan_in_fan_out for layer in linear.values())
    targets = target_names(linear, base_module_names(core)) if linear else []
    exported = lora_config(config, rank, targets, sorted(experts), transposed)
    check_targets_kept(exported, core)
    others = _with_head_of(task, core, other_tensors(model, adapter_name, config))

    folder.mkdir()
    save_lora_config(exported, folder)
    save_file({**tensors, **others}, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    check_deltas(load_file(folder / WEIGHTS_NAME), layers, adapter_name, head_weights)
    return rank, others


def other_tensors(model: nn.Module, adapter_name: str, config: RLoraConfig) -> dict[str, torch.Tensor]:
    """Tensors trained besides the heads (whole modules, biases, rows of embeddings), named as in PEFT's files."""
    # If targets contain names of embeddings, PEFT would save these layers in full.
    targets = config.target_modules
    targeted = not isinstance(targets, str) and any("embed" in name or "lm_head" in name for name in targets or ())
    state = get_peft_model_state_dict(
        model, adapter_name=adapter_name, save_embedding_layers=False if targeted else "auto"
    )
    prefix = PREFIX if core_model(model) is model else ""
    return {
        f"{prefix}{name}": tensor.detach().to("cpu").contiguous().clone()
        for name, tensor in state.items()
        if ".rlora_adapters." not in name
    }


def _with_head_of(task: str | None, core: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with the head of one task under the name of a plain head, if the model has heads of tasks."""
    places = {name.split(".")[0]: module for name, module in core.named_modules() if isinstance(module, TaskHeads)}
    for place, module in places.items() if task is not None else ():
        every = f"{PREFIX}{place}.heads."
        own = f"{every}{module.tasks.index(task)}."
        kept = {name: tensor for name, tensor in tensors.items() if name.startswith(own) or every not in name}
        tensors = {name.replace(own, f"{PREFIX}{place}."): tensor for name, tensor in kept.items()}
    return tensors


def _refused_by_engines(config: RLoraConfig, others: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """A warning about tensors that vLLM and llama.cpp don't load."""
    if not others:
        return ()
    parts = {
        "`modules_to_save`": config.modules_to_save,
        "trained biases": config.bias != "none",
        "rows of embeddings": config.trainable_token_indices,
    }
    what = " and ".join(name for name, trained in parts.items() if trained) or "embeddings"
    return (
        f"The adapter trained {what} besides its heads. PEFT loads the export with them; vLLM and llama.cpp refuse "
        "it. For those, use `merge=True`.",
    )


def _refused_for_experts(layers: Mapping[str, RLoraLayer]) -> tuple[str, ...]:
    """A warning that engines don't load LoRA on parameters."""
    _, experts = split_layers(layers)
    if not experts:
        return ()
    return (
        "The adapter adapts weights of experts. PEFT loads the export; vLLM and llama.cpp don't know PEFT's form of "
        "LoRA for them. For those, use `merge=True`.",
    )


def _select_rows(
    data: Mapping[str, Rows] | None, task: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Rows]:
    """Rows by task to measure on."""
    if data is None:
        return {}
    if tokenizer is None:
        raise ValueError("`data` needs the model's tokenizer, and `tokenizer` is None. Pass it.")
    if task is not None and task not in data:
        raise ValueError(
            f"`data` has no rows of task {shorten(task)}, only of {first_few(map(repr, data), 10) or 'none'}. Add "
            "them, or leave `data` out."
        )
    selected = dict(data) if task is None else {task: data[task]}
    for name, rows in selected.items():
        row = rows[0] if len(rows) else {}
        if not (isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)):
            raise ValueError(
                f"Rows of `data[{name!r}]` need a `prompt` and a `completion`, both text; got "
                f"{'no rows' if not row else ', '.join(row)}. Convert them, or leave `data` out."
            )
    return selected


def _find_adapter(model: nn.Module, adapter_name: str | None) -> tuple[str, RLoraConfig]:
    try:
        return adapter_config(model, adapter_name)
    except ValueError as error:
        raise ValueError(f"`adapter_name={adapter_name!r}` can't be exported. {error}") from None


def check_task(config: RLoraConfig, task: str | None) -> None:
    """Refuse a task that the adapter does not have. An adapter without task names accepts any."""
    if task is not None and config.tasks and task not in config.tasks:
        raise ValueError(
            f"The adapter's tasks are {first_few(map(repr, config.tasks), 10)}; got `task={shorten(task)}`. Set "
            "`task` to one of these."
        )


def _check_heads(core: nn.Module, task: str | None, merge: bool) -> None:
    """Refuse what an export can't have of a model with heads of tasks: all of them, or a merged model."""
    heads = find_task_heads(core)
    if heads and task not in heads[0].tasks:
        raise ValueError(
            f"The model has a classification head for each of the tasks {first_few(map(repr, heads[0].tasks), 10)}, "
            f"and an export has one: set `task` to one of these, got {shorten(task)}."
        )
    if heads and merge:
        raise ValueError(
            "`merge=True` can't be used with heads of tasks (`add_task_heads`). Export without it, and merge the "
            "export into a base with the labels of the task: "
            "`PeftModel.from_pretrained(base, export).merge_and_unload()`."
        )


def _check_whole(model: nn.Module) -> None:
    """Refuse a model whose parameters are not all in this process."""
    for name, parameter in model.named_parameters():
        kind = type(parameter).__name__
        if hasattr(parameter, "ds_id") or kind in ("DTensor", "FlatParameter") or "_fsdp_wrapped_module" in name:
            raise ValueError(
                f"The model's parameters are sharded over processes ({name} by DeepSpeed ZeRO-3, FSDP or tensor "
                "parallelism). Save the adapter, load it in one process, and export it there."
            )
        if parameter.device.type == "meta":
            raise ValueError(
                f"{name} of the model is offloaded to CPU or disk. Load the whole model on one device, for example on "
                "the CPU, and export it there."
            )


def _check_target(target: Path) -> Path:
    """The folder to write as an absolute path. Its parents are created."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"`output_dir` {str(target)!r} is a file. Name a folder.")
    if target.is_dir() and any(target.iterdir()):
        card = target / CARD_NAME
        if not (card.is_file() and MARKER in card.read_text(encoding="utf-8", errors="replace")):
            raise ValueError(
                f"`output_dir` {str(target)!r} holds files that are not an earlier export, and would be replaced. "
                "Name another folder, or empty it."
            )
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _move_into_place(stage: Path, target: Path) -> None:
    """Replace the target folder by the staged one in one step."""
    if target.exists():
        old = stage.with_name("old")
        target.rename(old)
        try:
            stage.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        stage.rename(target)
