"""Models with the adapters of `quality.py`'s methods, made on one base that stays as it is."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from common import TARGETS, share_weights
from peft import LilyConfig, LoraConfig, get_peft_model
from quality_lab import LabLinear, add_lab
from quality_runs import LAB, Run
from quality_train import Adapted, SelectedHead
from torch import nn

from rlora_trl import RLoraConfig
from rlora_trl.analysis.heads import head_similarities, mean_similarity
from rlora_trl.tuner import MultiHeadAdapter, find_routings


_PRESETS = {
    "rlora": RLoraConfig,
    "hydra": RLoraConfig.hydra_lora,
    "multi_lora": RLoraConfig.multi_lora,
    "moe_lora": RLoraConfig.moe_lora,
    "mtl_lora": RLoraConfig.mtl_lora,
}


def adapt(base: nn.Module, runs: Sequence[Run], tasks: Sequence[str]) -> Adapted:
    """
    A model with new adapters for runs that train side by side; the base is not changed.

    Args:
        base (`nn.Module`): Causal language model of transformers.
        runs (`Sequence[Run]`): One, or several of a lab method.
        tasks (`Sequence[str]`): Names of the suite's tasks.
    """
    model = share_weights(base).requires_grad_(False)
    head = SelectedHead(model.get_output_embeddings())
    model.set_output_embeddings(head)
    if runs[0].method == "base":
        return Adapted(model, head, len(runs))
    if runs[0].method in LAB:
        return _adapt_lab(model, head, runs, len(tasks))
    return _adapt_packaged(model, head, runs[0], tasks)


def _adapt_lab(model: nn.Module, head: SelectedHead, runs: Sequence[Run], num_tasks: int) -> Adapted:
    options = [run.lab() for run in runs]
    model, state = add_lab(model, options, [run.seed for run in runs], num_tasks)
    layers = [module for module in model.modules() if isinstance(module, LabLinear)]
    pairs = [(role, getattr(layer, role)) for role in ("A", "B", "router") for layer in layers]

    def set_tasks(ids: torch.Tensor) -> None:
        state.tasks = ids

    def end_dropout() -> None:
        state.masks = False

    return Adapted(
        model,
        head,
        len(runs),
        [(role, parameter) for role, parameter in pairs if parameter is not None],
        stacked=True,
        set_tasks=set_tasks,
        end_dropout=end_dropout,
    )


def _config(run: Run, tasks: Sequence[str]) -> Any:
    options = {"target_modules": list(TARGETS), **run.adapter_options()}
    if run.method == "lora":
        return LoraConfig(**options)
    if run.method == "lily":
        return LilyConfig(**options)
    if run.method == "mtl_lora" or options.get("router") == "task":
        options.setdefault("tasks", list(tasks))
    return _PRESETS[run.method](**options)


def _adapt_packaged(model: nn.Module, head: SelectedHead, run: Run, tasks: Sequence[str]) -> Adapted:
    torch.manual_seed(run.seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="With `num_heads=1`")
        warnings.filterwarnings("ignore", message="`target_modules` names")
        wrapped = get_peft_model(model, _config(run, tasks))
    named = [(name, p) for name, p in wrapped.named_parameters() if p.requires_grad]
    routings = find_routings(wrapped)
    routed = [routing for routing in routings if routing.kind == "task"]

    def set_tasks(ids: torch.Tensor) -> None:
        for routing in routed:
            routing.update(task_ids=ids)

    def forget() -> None:
        for routing in routings:
            routing.forget_batch()

    def end_dropout() -> None:
        for module in wrapped.modules():
            if isinstance(module, MultiHeadAdapter):
                module.dropout = 0.0
            elif isinstance(module, nn.Dropout):
                module.p = 0.0

    layers = [module for module in wrapped.modules() if isinstance(module, MultiHeadAdapter)]
    has_heads = bool(layers) and layers[0].num_heads > 1

    return Adapted(
        wrapped,
        head,
        parameters=[(_role(name), parameter) for name, parameter in named],
        autocast=next(model.parameters()).dtype != torch.float32,
        set_tasks=set_tasks if routed else None,
        after_step=forget,
        end_dropout=end_dropout,
        similarity=(lambda: _similarity_by_layer(wrapped)) if has_heads else None,
    )


def _similarity_by_layer(model: nn.Module) -> dict[str, float]:
    return {layer: mean_similarity({layer: cosines}) for layer, cosines in head_similarities(model).items()}


def _role(name: str) -> str:
    """A, B or router, by the names of PEFT's LoRA and Lily and of the library."""
    if "router" in name:
        return "router"
    parts = name.split(".")
    return "A" if any(part in ("lora_A", "lily_A", "A") for part in parts) else "B"
