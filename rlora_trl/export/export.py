"""`export_lora`: an adapter under a fixed mixture of its heads, written for those who don't have this package."""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..analysis.measuring import HeadWeights, fixed_weights, measure_head_weights
from ..tuner import RLoraConfig
from ..tuner.bnb_cpu import kept_quantized
from ..tuner.layer import RLoraLayer
from ..tuner.selection import adapted_layers, adapter_config, check_weights, core_model
from .bare import bare_base
from .gap import ExportGap, measure_export_gap
from .loading import load_adapted
from .lora import PREFIX, check_targets_kept, lora_config, lora_tensors, save_lora_config, target_names
from .merge import check_merged, write_merged
from .report import MARKER, ExportReport, render_card
from .verify import LOGITS_TOLERANCE, check_export, take_reference


logger = logging.get_logger(__name__)

# Weights of the heads: measured, the same for all layers, or by layer.
Mixtures: TypeAlias = HeadWeights | Sequence[float] | torch.Tensor | Mapping[str, Sequence[float] | torch.Tensor]
_NOT_COMPARED = (
    "The base takes no token ids alone, so logits were not compared; the weights of each layer were. Compare outputs "
    "on inputs of yours."
)
Rows: TypeAlias = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class _Mixture:
    """The weights `[N]` by layer, whether the adapter itself weighs all tokens so, and where they are from."""

    weights: dict[str, torch.Tensor]
    exact: bool
    origin: str


def export_lora(
    model: nn.Module | str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    adapter_name: str | None = "default",
    task: str | None = None,
    routing: Mixtures | None = None,
    data: Mapping[str, Rows] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    merge: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    published_as: tuple[str, str] | None = None,
) -> ExportReport:
    """
    Write an adapter as a plain LoRA adapter of PEFT's format, which needs nothing of this package.

    The heads get fixed weights. For `router="uniform"`, and for a task of `router="task"`, these are the adapter's own
    and the export is the same function. Other routers weigh the heads anew for each token: their export is the mean
    over a task's tokens, and loses something, which `data` has measured.

    Before the export gets its place, stock PEFT loads it on the model's base and it is compared with the adapter. The
    model is left as it was, bit for bit.

    Args:
        model (`torch.nn.Module` or `str`):
            A `PeftModel`, a transformers model with the adapter loaded, or the folder or Hub name of an adapter.
        output_dir (`str`):
            Folder to write, which may hold an earlier export but nothing else.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            The adapter to export; `None` for the only one, or the active one.
        task (`str`, *optional*):
            The task to export it for. `router="task"` needs it. An adapter that knows its tasks takes these only.
        routing ([`HeadWeights`], weights, or weights by layer, *optional*):
            Weights of the heads: measured by [`measure_head_weights`], N numbers for all layers, or such numbers by
            layer.
            By default the adapter's own, those of `task` recorded with the adapter, or measured on `data`. What was
            measured on an adapter with `router="uniform"` or "task" are its own.
        data (`Mapping[str, Sequence[Mapping]]`, *optional*):
            Rows by task, as for [`score_tasks`], to measure on what is lost: those of `task`, or without a task all.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            The model's tokenizer, which `data` needs and which goes into a merged model. Loaded with the adapter where
            `model` is a name.
        merge (`bool`, *optional*, defaults to `False`):
            Write the full model with the adapter merged into it, in the dtype of the base, or where the base is
            quantized, in 16 bits.
        revision (`str`, *optional*):
            Branch, tag or commit of the adapter, where `model` is a name on the Hub.
        token (`str` or `bool`, *optional*):
            For the Hub, as in `huggingface_hub.hf_hub_download`: where `model` is a name, or a folder whose base model
            is private.
        published_as (`tuple[str, str]`, *optional*):
            Where the export will be published beside its adapter, for the card: name of the Hub repository, and folder
            in it, as in `("user/name", "exports/sst2")`.

    Returns:
        [`ExportReport`]: What was exported; the card in the folder says the same.

    Raises:
        ValueError: If the weights are not known or are none, the adapter or the task is unknown, the folder holds
            something else, the model is sharded or offloaded, or the export does not do what the adapter does. Nothing
            is written then.
    """
    target = _check_target(Path(output_dir))
    source: str | None = None
    if not isinstance(model, nn.Module):
        source = os.fspath(model)
        model, loaded_tokenizer = load_adapted(source, adapter_name or "default", revision=revision, token=token)
        tokenizer = tokenizer if tokenizer is not None else loaded_tokenizer
    adapter_name, config = _chosen_adapter(model, adapter_name)
    _check_task(config, task)
    source = source or (config.source.name if config.source is not None else None)
    _check_whole(model)
    layers = adapted_layers(model, adapter_name)
    rows = _rows_of(data, task, tokenizer)
    with kept_quantized(core_model(model)):
        mixture = _choose_mixture(model, config, adapter_name, layers, task, routing, rows, tokenizer, token)
        mixture = _checked_mixture(mixture, layers, adapter_name)
        job = _Job(model, config, adapter_name, layers, mixture, task)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            stage = Path(scratch) / "export"
            stage.mkdir()
            report = job.write_merged(stage, tokenizer) if merge else job.write_adapter(stage)
            if rows:
                assert tokenizer is not None
                loss = measure_export_gap(model, tokenizer, adapter_name, rows, mixture.weights, known_task=task)
                report = _with_loss(report, loss)
            report = dataclasses.replace(report, path=str(output_dir))
            repo_id, subfolder = published_as or (None, None)
            render_card(report, config, source, repo_id, subfolder).save(stage / "README.md")
            _put(stage, target)
    for warning in report.warnings:
        logger.warning(warning)
    return report


@dataclass(frozen=True)
class _Job:
    """One adapter and the weights under which it is exported."""

    model: nn.Module
    config: RLoraConfig
    adapter_name: str
    layers: dict[str, RLoraLayer]
    mixture: _Mixture
    task: str | None

    def write_adapter(self, stage: Path) -> ExportReport:
        """Write and check a LoRA adapter; the card is not yet there."""
        core = core_model(self.model)
        tensors = lora_tensors(self.layers, self.adapter_name, self.mixture.weights)
        rank = next(iter(tensors.values())).shape[0]
        transposed = any(layer.fan_in_fan_out for layer in self.layers.values())
        with bare_base(core) as base:
            targets = target_names(self.layers, (name for name, _ in base.named_modules()))
            config = lora_config(self.config, rank, targets, transposed)
            check_targets_kept(config, base)
        with kept_quantized(core):
            others = other_tensors(self.model, self.adapter_name, self.config)
        save_lora_config(config, stage)
        save_file({**tensors, **others}, stage / "adapter_model.safetensors", metadata={"format": "pt"})
        error = self._verify(stage)
        return self._report(rank, error, _refused_by_engines(self.config, others))

    def write_merged(self, stage: Path, tokenizer: PreTrainedTokenizerBase | None) -> ExportReport:
        """Write and check a full model; the card is not yet there."""
        job = (self.model, self.adapter_name, self.layers, self.mixture.weights, stage)
        notes = write_merged(*job)
        error = check_merged(*job)
        if getattr(core_model(self.model), "is_quantized", False) and error is not None:
            notes += (
                f"Against the adapter on the quantized base, logits change by up to {error:.2g} of the largest.",
            )
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        tensors = lora_tensors(self.layers, self.adapter_name, self.mixture.weights)
        rank = next(iter(tensors.values())).shape[0]
        return dataclasses.replace(self._report(rank, error, notes), merged=True)

    def _verify(self, stage: Path) -> float | None:
        dtype = compute_dtype(self.model)
        reference = take_reference(self.model, self.adapter_name, self.layers, self.mixture.weights, dtype)
        return check_export(self.model, stage, reference, dtype)

    def _report(self, rank: int, error: float | None, warnings: tuple[str, ...]) -> ExportReport:
        return ExportReport(
            path="",
            task=self.task,
            rank=rank,
            layers=len(self.layers),
            exact=self.mixture.exact,
            max_logit_error=error,
            mixture=self.mixture.origin,
            warnings=warnings if error is not None else (*warnings, _NOT_COMPARED),
        )


def _with_loss(report: ExportReport, loss: ExportGap) -> ExportReport:
    return dataclasses.replace(
        report,
        kl=loss.kl,
        accuracy_dynamic=loss.accuracy_dynamic,
        accuracy_export=loss.accuracy_export,
        rows=loss.rows,
    )


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The least precise floating-point dtype among a base's parameters and its quantized layers' products."""
    core = core_model(model)
    names = {name: parameter.dtype for name, parameter in core.named_parameters() if ".rlora_adapters." not in name}
    dtypes = {dtype for dtype in names.values() if dtype in LOGITS_TOLERANCE}
    if getattr(core, "is_quantized", False) or not dtypes:
        dtypes.add(torch.bfloat16)
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def other_tensors(model: nn.Module, adapter_name: str, config: RLoraConfig) -> dict[str, torch.Tensor]:
    """What the adapter trains besides its heads (whole modules, biases, rows of embeddings), named as in files."""
    # Layers that PEFT takes for embeddings would be saved whole.
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


def _refused_by_engines(config: RLoraConfig, others: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    if not others:
        return ()
    parts = {
        "`modules_to_save`": config.modules_to_save,
        "trained biases": config.bias != "none",
        "rows of embeddings": config.trainable_token_indices,
    }
    what = " and ".join(name for name, there in parts.items() if there) or "embeddings"
    return (
        f"The adapter trained {what} besides its heads. PEFT loads the export with them; vLLM and llama.cpp refuse "
        "it. For those, use `merge=True`.",
    )


def _rows_of(
    data: Mapping[str, Rows] | None, task: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> dict[str, Rows]:
    """The rows to measure on, by task."""
    if data is None:
        return {}
    if tokenizer is None:
        raise ValueError("`data` needs the model's tokenizer, and `tokenizer` is None. Pass it.")
    if task is not None and task not in data:
        raise ValueError(
            f"`data` has no rows of task {task!r}, only of {', '.join(map(repr, data)) or 'none'}. Add them, or leave "
            "`data` out."
        )
    chosen = dict(data) if task is None else {task: data[task]}
    for name, rows in chosen.items():
        row = rows[0] if len(rows) else {}
        if not (isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)):
            raise ValueError(
                f"Rows of `data[{name!r}]` need a `prompt` and a `completion`, both text; got "
                f"{'no rows' if not row else ', '.join(row)}. Bring them to this form, or leave `data` out."
            )
    return chosen


def _choose_mixture(
    model: nn.Module,
    config: RLoraConfig,
    adapter_name: str,
    layers: Mapping[str, RLoraLayer],
    task: str | None,
    routing: Mixtures | None,
    rows: Mapping[str, Rows],
    tokenizer: PreTrainedTokenizerBase | None,
    token: str | bool | None,
) -> _Mixture:
    heads = config.num_heads
    own = heads == 1 or config.router == "uniform"
    # Measured weights of such adapters are their own, rounded.
    measured_own = isinstance(routing, HeadWeights) and (own or (config.router == "task" and task is not None))
    if routing is not None and not measured_own:
        return _given_mixture(routing, layers, heads, task)
    if own:
        equal = torch.full((heads,), 1 / heads, dtype=torch.float64)
        return _Mixture(dict.fromkeys(layers, equal), True, "all the same, as in the adapter")
    if config.router == "task":
        chosen = _known_task(config, task)
        table = fixed_weights(layers, adapter_name, chosen)
        return _Mixture(dict(zip(layers, table, strict=True)), True, f"those learned for the task `{chosen}`")
    recorded = _recorded_mixtures(config, token)
    if recorded is not None and (recorded.weights if task is None else task in recorded.weights):
        return _measured_mixture(recorded, task, "measured in training and recorded with the adapter")
    if rows:
        assert tokenizer is not None
        measured = measure_head_weights(model, tokenizer, rows, adapter_name=adapter_name)
        return _measured_mixture(measured, task, "measured on the data that the loss is measured on")
    known = f"recorded with it are mixtures of {', '.join(map(repr, recorded.weights))}" if recorded else "none"
    raise ValueError(
        f"The adapter has `router={config.router!r}`, which weighs its heads anew for each token, and no mean weights "
        f"are known{f' for task {task!r}' if task else ''} ({known}). Pass "
        "`data={task: rows}` and `tokenizer` to measure them, or `routing`, for example "
        "`routing=measure_head_weights(model, tokenizer, {task: rows})`."
    )


def _chosen_adapter(model: nn.Module, adapter_name: str | None) -> tuple[str, RLoraConfig]:
    try:
        return adapter_config(model, adapter_name)
    except ValueError as error:
        raise ValueError(f"`adapter_name={adapter_name!r}` can't be exported. {error}") from None


def _check_task(config: RLoraConfig, task: str | None) -> None:
    """Refuse a task that the adapter does not have. One that does not tell its tasks may have any."""
    if task is not None and config.tasks and task not in config.tasks:
        raise ValueError(
            f"The adapter's tasks are {', '.join(map(repr, config.tasks))}; got `task={task!r}`. Set `task` to one of "
            "these."
        )


def _known_task(config: RLoraConfig, task: str | None) -> str:
    tasks = config.tasks or []
    if task is None and len(tasks) == 1:
        return tasks[0]
    if task is None:
        raise ValueError(
            f"The adapter has `router='task'` and a mixture for each of {', '.join(map(repr, tasks))}; got "
            "`task=None`. Set `task` to one of these, or give weights in `routing`."
        )
    return task


def _given_mixture(routing: Mixtures, layers: Mapping[str, RLoraLayer], num_heads: int, task: str | None) -> _Mixture:
    if isinstance(routing, HeadWeights):
        return _measured_mixture(routing, task, "measured")
    if isinstance(routing, Mapping):
        weights = {name: check_weights(_exact(given), num_heads, f" of {name}") for name, given in routing.items()}
        return _Mixture(weights, False, "given, by layer")
    weight = check_weights(_exact(routing), num_heads)
    return _Mixture(dict.fromkeys(layers, weight), False, f"given, {[round(w, 4) for w in weight.tolist()]}")


def _exact(weights: Sequence[float] | torch.Tensor) -> torch.Tensor:
    """Weights as they were given: 0.3 and not the nearest number of 32 bits."""
    return weights if isinstance(weights, torch.Tensor) else torch.tensor(list(weights), dtype=torch.float64)


def _measured_mixture(mixtures: HeadWeights, task: str | None, origin: str) -> _Mixture:
    if task is not None:
        return _Mixture(mixtures.for_task(task), False, f"the mean over the tokens of the task, {origin}")
    tasks = ", ".join(f"`{name}`" for name in mixtures.weights)
    kind = f"the mean over the tokens of {tasks}" if len(mixtures.weights) == 1 else f"the plain mean over {tasks}"
    return _Mixture(mixtures.mean(), False, f"{kind}, {origin}")


def _checked_mixture(mixture: _Mixture, layers: Mapping[str, RLoraLayer], adapter_name: str) -> _Mixture:
    """The mixture with weights that sum to 1 (in a record they are rounded); that of another adapter is refused."""
    missing, unknown = sorted(set(layers) - set(mixture.weights)), sorted(set(mixture.weights) - set(layers))
    if missing or unknown:
        raise ValueError(
            f"Weights of the heads must be there for all {len(layers)} layers of the adapter and no other; missing: "
            f"{', '.join(missing[:3]) or 'none'}; unknown: {', '.join(unknown[:3]) or 'none'}. Layers are named like "
            f"{next(iter(layers))!r}."
        )
    weights = {
        name: check_weights(mixture.weights[name], layer.num_heads[adapter_name], f" of {name}")
        for name, layer in layers.items()
    }
    return dataclasses.replace(mixture, weights=weights)


def _recorded_mixtures(config: RLoraConfig, token: str | bool | None) -> HeadWeights | None:
    if config.source is None:
        return None
    from ..files.record import find_record

    record = find_record(config, token)
    return None if record is None else record.mixtures


def _check_whole(model: nn.Module) -> None:
    """Refuse what stock PEFT could not be tried on: parameters that are elsewhere."""
    for name, parameter in model.named_parameters():
        kind = type(parameter).__name__
        if hasattr(parameter, "ds_id") or kind in ("DTensor", "FlatParameter") or "_fsdp_wrapped_module" in name:
            raise ValueError(
                f"The model's parameters are sharded over processes ({name} by DeepSpeed ZeRO-3, FSDP or tensor "
                "parallelism). Save the adapter, load it in one process, and export it there."
            )
        if parameter.device.type == "meta":
            raise ValueError(
                f"{name} of the model is offloaded to CPU or disk. Load the model with a `device_map` that has room "
                "for all of it, or on the CPU, and export it then."
            )


def _check_target(target: Path) -> Path:
    """Where to write, made absolute; its parents are made."""
    if target.exists() and not target.is_dir():
        raise ValueError(f"`output_dir` {str(target)!r} is a file. Name a folder.")
    if target.is_dir() and any(target.iterdir()):
        card = target / "README.md"
        if not (card.is_file() and MARKER in card.read_text(encoding="utf-8", errors="replace")):
            raise ValueError(
                f"`output_dir` {str(target)!r} holds files that are no earlier export, and would be replaced. Name "
                "another folder, or empty it."
            )
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _put(stage: Path, target: Path) -> None:
    """Move an export to its place at once; what was there before goes."""
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
