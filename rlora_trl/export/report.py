"""The report of an export, and its card."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .._version import __version__
from ..files.markdown import code, escape
from ..files.names import hub_name
from ..files.task_types import auto_model_class, generates
from ..tuner import RLoraConfig


# Marks a folder as an export, which a new one may replace.
MARKER = "<!-- rlora_trl: export -->"

# Values that `vllm serve --max-lora-rank` accepts (vLLM 0.33).
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ExportReport:
    """
    Facts about an export, and its fidelity to the adapter.

    Args:
        path (`str`): Folder of the export.
        task (`str` or `None`): The exported task; `None` for the mean over tasks, or for weights from the caller.
        rank (`int`): Rank of the LoRA adapter, before merging if it was merged.
        layers (`int`): Number of adapted layers.
        exact (`bool`): Whether the export is the same function as the adapter (for that task).
        mixture (`str`): Source of the head weights, in words.
        kl (`float` or `None`): Mean KL(adapter || export) of the predicted distributions, in nats per token of the
            completions in `data`; `None` without data.
        accuracy_dynamic (`float` or `None`), accuracy_export (`float` or `None`):
            Accuracy of the adapter and of the export on `data`, ratios in `[0, 1]`; `None` without data.
        rows (`int` or `None`): Number of rows that were measured.
        warnings (`tuple[str, ...]`): Limitations of the export, for its users.
        merged (`bool`): Whether the export is a full model rather than an adapter.
    """

    path: str
    task: str | None
    rank: int
    layers: int
    exact: bool
    mixture: str
    kl: float | None = None
    accuracy_dynamic: float | None = None
    accuracy_export: float | None = None
    rows: int | None = None
    warnings: tuple[str, ...] = ()
    merged: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {**dataclasses.asdict(self), "warnings": list(self.warnings)}


def render_card(
    report: ExportReport,
    config: RLoraConfig,
    source: str | None,
    repo_id: str | None = None,
    subfolder: str | None = None,
) -> ModelCard:
    """
    The card of an export. It names repositories of the Hub only, never local folders.

    Args:
        report ([`ExportReport`]): The facts about the export.
        config ([`RLoraConfig`]): Configuration of the exported adapter.
        source (`str`, *optional*): Name or folder of that adapter.
        repo_id (`str`, *optional*): Hub repository that the adapter and the export are published in.
        subfolder (`str`, *optional*): Folder of the export in it.
    """
    base = hub_name(config.base_model_name_or_path)
    data = ModelCardData(
        library_name="transformers" if report.merged else "peft",
        base_model=base,
        base_model_relation="finetune" if report.merged else "adapter",
        tags=["rlora"] if report.merged else ["lora", "rlora"],
    )

    # The location of the export: arguments for code, a folder for shells, and the download command.
    arguments, folder, download = '"this folder"', "this_folder", None
    if repo_id is not None:
        arguments = json.dumps(repo_id) + (f", subfolder={json.dumps(subfolder)}" if subfolder else "")
        folder = f"adapter/{subfolder or ''}".rstrip("/")
        include = f' --include "{subfolder}/*"' if subfolder else ""
        download = f"hf download {repo_id}{include} --local-dir adapter"

    adapter = repo_id or hub_name(source)
    return ModelCard.from_template(
        data,
        template_str=resources.files(__package__).joinpath("card_template.md").read_text(encoding="utf-8"),
        marker=MARKER,
        report=report,
        task=None if report.task is None else code(report.task),
        mixture=escape(report.mixture, 2000),
        config=config,
        router=repr(config.router),
        origin=f"the R-LoRA adapter [{adapter}](https://huggingface.co/{adapter})" if adapter else "an R-LoRA adapter",
        base=base or "BASE_MODEL",
        auto_model=auto_model_class(config.task_type),
        generates=generates(config.task_type),
        location=arguments,
        name=(subfolder or repo_id or "name").rpartition("/")[2],
        folder=folder,
        download=download,
        vllm_rank=next((rank for rank in _VLLM_RANKS if rank >= report.rank), report.rank),
        version=__version__,
    )
