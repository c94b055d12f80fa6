"""What an export reports of itself, and its card."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .._version import __version__
from ..files.names import hub_name
from ..tuner import RLoraConfig


# By which a folder is known to hold an export that a new one may replace.
MARKER = "<!-- rlora_trl: export -->"

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}

# What `vllm serve --max-lora-rank` takes (vLLM 0.33).
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ExportReport:
    """
    What was exported, and what it costs.

    Args:
        path (`str`): Folder of the export.
        task (`str` or `None`): The task that it is for; `None` for all of the adapter's tasks, or for given weights.
        rank (`int`): Rank of the LoRA adapter, or of what was merged.
        layers (`int`): Number of layers that it changes.
        exact (`bool`): It is the same function as the adapter (for that task), as all tokens get these weights there
            too.
        max_logit_error (`float` or `None`):
            Largest difference of logits between the export and the adapter under the fixed weights, on fixed prompts,
            relative to the largest logit. For a merged quantized base, what replacing the quantized weights by 16-bit
            ones changes. `None` where the base takes no token ids alone: the weights of each layer were compared.
        mixture (`str`): Where the weights of the heads are from, in words.
        kl (`float` or `None`): Mean over tokens of KL(adapter || export) of the predicted distributions, in nats, over
            the completions of the given data; `None` without data.
        accuracy_dynamic (`float` or `None`), accuracy_export (`float` or `None`):
            Accuracy of the adapter and of the export on the given data, ratios in `[0, 1]`; `None` without data.
        rows (`int` or `None`): Rows that these three were measured on.
        warnings (`tuple[str, ...]`): What users of the export should know.
        merged (`bool`): It is a full model, not an adapter.
    """

    path: str
    task: str | None
    rank: int
    layers: int
    exact: bool
    max_logit_error: float | None
    mixture: str
    kl: float | None = None
    accuracy_dynamic: float | None = None
    accuracy_export: float | None = None
    rows: int | None = None
    warnings: tuple[str, ...] = ()
    merged: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return {**dataclasses.asdict(self), "warnings": list(self.warnings)}


@dataclass(frozen=True)
class _Place:
    """Where the reader of a card finds the export, as arguments of code and as a folder of shells."""

    repo_id: str | None
    subfolder: str | None

    @property
    def arguments(self) -> str:
        if self.repo_id is None:
            return '"this folder"'
        return json.dumps(self.repo_id) + (f", subfolder={json.dumps(self.subfolder)}" if self.subfolder else "")

    @property
    def name(self) -> str:
        return (self.subfolder or self.repo_id or "name").rpartition("/")[2]

    @property
    def folder(self) -> str:
        return "this_folder" if self.repo_id is None else f"adapter/{self.subfolder or ''}".rstrip("/")

    @property
    def download(self) -> str:
        """A line for the shell, or nothing where the export is there."""
        if self.repo_id is None:
            return ""
        only = f' --include "{self.subfolder}/*"' if self.subfolder else ""
        return f"hf download {self.repo_id}{only} --local-dir adapter\n"


def render_card(
    report: ExportReport,
    config: RLoraConfig,
    source: str | None,
    repo_id: str | None = None,
    subfolder: str | None = None,
) -> ModelCard:
    """
    The card of an export. Folders are not named: the Hub takes names of its own only, and they are nobody's business.

    Args:
        report ([`ExportReport`]): What was exported.
        config ([`RLoraConfig`]): Configuration of the adapter that it was made from.
        source (`str`, *optional*): Name or folder of that adapter.
        repo_id (`str`, *optional*): Repository of the Hub in which the adapter and the export are published.
        subfolder (`str`, *optional*): Folder of the export in it.
    """
    base = hub_name(config.base_model_name_or_path)
    place = _Place(repo_id, subfolder)
    data = ModelCardData(
        library_name="transformers" if report.merged else "peft",
        base_model=base,
        base_model_relation="finetune" if report.merged else "adapter",
        tags=["rlora"] if report.merged else ["lora", "rlora"],
    )
    what = "Model with an R-LoRA adapter merged into it" if report.merged else "Plain LoRA export of an R-LoRA adapter"
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n{MARKER}\n\n# {what}",
        _origin(report, config, repo_id or hub_name(source)),
        _loss(report),
        *([_list("Notes", report.warnings)] if report.warnings else []),
        _use_merged(place) if report.merged else _use_adapter(report, base, config.task_type, place),
        f"Made with the Python package rlora-trl {__version__}.\n",
    ]
    return ModelCard("\n\n".join(parts))


def _origin(report: ExportReport, config: RLoraConfig, name: str | None) -> str:
    origin = f"the R-LoRA adapter [{name}](https://huggingface.co/{name})" if name else "an R-LoRA adapter"
    task = f" for the task `{report.task}`" if report.task else ""
    compared = "the weights of each layer agree"
    if report.max_logit_error is not None:
        compared = f"logits of fixed prompts differ by at most {report.max_logit_error:.1e} of the largest"
    return (
        f"Exported from {origin} with {config.num_heads} heads of rank {config.r} and `router={config.router!r}`"
        f"{task}. Weights of the heads: {report.mixture}. {'Merged' if report.merged else 'LoRA'} rank {report.rank}, "
        f"{report.layers} layers. Checked against the adapter under the same weights: {compared}."
    )


def _loss(report: ExportReport) -> str:
    if report.exact:
        lines = ["The adapter weighs its heads in this way for all tokens, so the export is the same function."]
    else:
        lines = [
            "The adapter weighs its heads anew for each token; the export gives all tokens the same weights, and is "
            "another function."
        ]
    if report.kl is None or report.accuracy_dynamic is None or report.accuracy_export is None:
        lines += [] if report.exact else ["How much is lost was not measured."]
    else:
        lines += [
            f"Measured on {report.rows} rows: accuracy {report.accuracy_export:.1%}, the adapter's "
            f"{report.accuracy_dynamic:.1%}; mean KL divergence of the predicted distributions "
            f"{report.kl:.2g} nats per token."
        ]
    return "## What is lost\n\n" + " ".join(lines)


def _list(title: str, entries: tuple[str, ...]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {entry}" for entry in entries)


def _use_merged(place: _Place) -> str:
    return (
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({place.arguments})\n```"
    )


def _use_adapter(report: ExportReport, base: str | None, task_type: Any, place: _Place) -> str:
    name = base or "BASE_MODEL"
    kind = str(getattr(task_type, "value", task_type))
    auto = _AUTO_CLASSES.get(kind, _AUTO_CLASSES["CAUSAL_LM"])
    rank = next((allowed for allowed in _VLLM_RANKS if allowed >= report.rank), report.rank)
    with_peft = (
        "## Use\n\nWith PEFT, without any other package:\n\n```python\n"
        f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f'base = {auto}.from_pretrained("{name}")\n'
        f"model = PeftModel.from_pretrained(base, {place.arguments})\n```"
    )
    if kind in _AUTO_CLASSES and kind != "CAUSAL_LM":
        return with_peft
    return (
        f"{with_peft}\n\nWith vLLM:\n\n```\n{place.download}"
        f"vllm serve {name} --enable-lora --lora-modules {place.name}={place.folder} --max-lora-rank {rank}\n```\n\n"
        "With llama.cpp:\n\n```\n"
        f"python convert_lora_to_gguf.py --base BASE_MODEL_FOLDER --outfile lora.gguf {place.folder}\n"
        "llama-server -m base.gguf --lora lora.gguf\n```"
    )
