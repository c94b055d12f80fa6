"""Rendering the card of an adapter: metadata for the Hub's filters, and a page for readers.

The words and tables of the page are in `card_template.md`, between two markers. Text written by hand around them, and
metadata set by hand, survive every push. Names of tasks are untrusted text and are escaped.

Metadata and page have limited sizes: of many tasks they list the first ones and say so; the record has all.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from ..evaluation.metrics import METRICS as SCORES
from ..files.layout import CONFIG_NAME, RECORD_NAME, task_slug
from ..files.markdown import code, escape
from ..files.names import hub_name
from ..files.record import AdapterRecord, TaskRecord, is_plain
from ..files.task_types import auto_model_class, auto_peft_class, generates
from ..reading import MIB, printable
from .card_reading import BEGIN, END, TASK_TAG, ExistingCard, is_finite, names_in, read_card_info, read_existing


if TYPE_CHECKING:
    from ..tuner.config import RLoraConfig


INFO_FORMAT = 1
_TAGS = ("rlora", "multi-task", "lora")
_TASK_TYPE = "text-generation"
# Longer tables of tasks are folded, so that the code to load the adapter stays on the first screen.
_FOLDED_FROM = 25
# Tasks in the metadata, which readers of cards cut after 1,000 names; rows of a table, columns of metrics, and entries
# of a list. A card of the most tasks with the longest names stays below the limits.
_LISTED_TASKS, _ROWS, _METRICS, _ENTRIES = 500, 100, 12, 20
# Bytes of the metadata. Earlier versions refuse more, and it would take seconds to write.
_METADATA_SIZE = MIB // 4
# Scores of the base model by those of the adapter, and names of metrics that are not written as they are spoken.
_BASE = {name: f"base_{name}" for name in SCORES}
_SPOKEN = {"f1": "F1", "number": "exact match of the number"}
_HUB_METRICS = ("accuracy", "exact_match", "f1")  # by their names on the Hub
# Of an export in a record; see `AdapterRecord`.
_EXPORT_FIELDS = ("task", "path", "rank", "exact", "kl", "accuracy", "accuracy_dynamic", "rows")
# Defaults of most runs, which a reader need not see.
_USUAL = {
    "train_a": True,
    "warmup_steps": 0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "weight_decay": 0,
    "label_smoothing_factor": 0,
    "neftune_noise_alpha": 0,
    "loss_type": "nll",
}


def render_card(
    config: RLoraConfig,
    record: AdapterRecord | None,
    *,
    repo_id: str | None = None,
    digest: str | None = None,
    num_parameters: int | None = None,
    figures: Sequence[str] = (),
    license: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    existing: str | None = None,
) -> ModelCard:
    """
    Render the card of an adapter, or update an existing one.

    Unknown facts are left out, and so are base models and datasets in local folders. Of many tasks, the metadata lists
    at most the first 500, and tables show the first 100; the card says so.

    Args:
        config ([`RLoraConfig`]):
            Configuration of the adapter.
        record ([`AdapterRecord`], *optional*):
            What training recorded.
        repo_id (`str`, *optional*):
            Repository of the card. Without it, the code in the card loads from the folder that the card is in.
        digest (`str`, *optional*), num_parameters (`int`, *optional*):
            Digest of the adapter's tensors, see [`adapter_digest`], and number of its trainable parameters.
        figures (`Sequence[str]`, *optional*):
            Paths of figures in the repository.
        license (`str`, *optional*), datasets (`Sequence[str]`, *optional*), tags (`Sequence[str]`, *optional*):
            Metadata of the Hub. Lists are added to those of the existing card; a license replaces its license.
        existing (`str`, *optional*):
            Text of the existing card. A card that Trainer or PEFT generated is replaced; other text without markers
            is kept below the generated part.

    Returns:
        `ModelCard`: Rendering again with its text as `existing` gives the same text.

    Raises:
        ValueError: If the metadata of `existing` can't be read.
    """
    old = read_existing(existing)
    info = read_card_info(old.metadata)
    license = license or old.metadata.get("license")
    full_list = CONFIG_NAME if record is None else RECORD_NAME
    record = _complete(config, record or AdapterRecord(), old)
    base_name = (record.base_model or "").rpartition("/")[2]
    name = (repo_id or "").rpartition("/")[2] or (f"{base_name}-rlora" if base_name else "R-LoRA adapter")

    # Results: those of the record, and others of the existing card, which the page shows too.
    own, others = _merge_results(record.tasks, old, info, digest)
    recorded = _unique(metric for task in record.tasks for metric in task.metrics)
    shown = {*SCORES, *_BASE.values(), *_other_metrics(record.tasks)}
    record = replace(record, tasks=_with_results(record.tasks, [*own, *others]))

    # Metadata: what is set here replaces what the existing card has; `None` leaves a key out.
    generates_text = generates(config.task_type)

    def metadata(count: int) -> dict[str, Any]:
        """The metadata with the first `count` tasks, exports and datasets of tasks."""
        tasks = record.tasks[:count]
        names = {task.name for task in tasks}
        listed = (result for result in own if result.dataset_name in names and result.metric_type in shown)
        results = [*listed, *others]
        present = {result.metric_type for result in results}
        measured = [metric for metric in _unique([*recorded, *info["measured"]]) if metric in present]
        return {
            **old.metadata,
            "base_model": record.base_model,
            "base_model_relation": "adapter" if record.base_model else None,
            "library_name": "peft",
            "license": license,
            "pipeline_tag": old.metadata.get("pipeline_tag") or (_TASK_TYPE if generates_text else None),
            "datasets": _merge_datasets(tasks, datasets, old) or None,
            "metrics": _unique(
                [*(name for name in _HUB_METRICS if name in measured), *names_in(old.metadata.get("metrics"))]
            )
            or None,
            "tags": _merge_tags(tasks, record.tasks, tags, old, info),
            "eval_results": results or None,
            "model_name": name if results else old.metadata.get("model_name"),
            "rlora": _info_block(config, record, digest, num_parameters, tasks, measured, record.exports[:count]),
        }

    most = min(_LISTED_TASKS, max(len(record.tasks), len(record.exports)))
    header, listed = _fit_metadata(metadata, most, old.newline)

    # The page.
    generated = _render_page(
        config=config,
        record=record,
        title=None if re.search(r"^# ", old.before, re.MULTILINE) else name,
        source=repo_id or ".",
        digest=digest,
        num_parameters=num_parameters,
        figures=figures,
        license=", ".join(names_in(license)[:_ENTRIES]),
        model_class=auto_model_class(config.task_type),
        peft_class=auto_peft_class(config.task_type),
        generates=generates_text,
        listed=listed,
        full_list=full_list,
    )
    body = (old.before or old.newline) + generated.replace("\n", old.newline) + (old.after or old.newline)
    return ModelCard(f"---{old.newline}{header}{old.newline}---{old.newline}{body}")


def _complete(config: RLoraConfig, record: AdapterRecord, old: ExistingCard) -> AdapterRecord:
    """A copy of the record with all tasks of the configuration, and with names on the Hub only."""
    candidates = [record.base_model, config.base_model_name_or_path, *names_in(old.metadata.get("base_model"))]
    base_model = next((name for name in candidates if hub_name(name)), None)
    recorded = {task.name: task for task in record.tasks}
    tasks = [recorded.get(name, TaskRecord(name)) for name in _unique([*(config.tasks or ()), *recorded])]
    return replace(
        record,
        base_model=base_model,
        base_model_revision=(record.base_model_revision or config.revision) if base_model else None,
        base_model_license=record.base_model_license if base_model else None,
        tasks=[replace(task, dataset=hub_name(task.dataset)) for task in tasks],
    )


# Metadata


def _fit_metadata(metadata: Callable[[int], dict[str, Any]], count: int, newline: str) -> tuple[str, int]:
    """The YAML of the metadata, of at most `count` tasks and the size that readers accept, and its number of tasks."""
    while True:
        header = ModelCardData(**metadata(count)).to_yaml(line_break=newline)
        # In bytes, as the card as a whole is limited.
        size = len(header.encode("utf-8"))
        if size <= _METADATA_SIZE or count == 0:
            return header, count
        count = min(count - 1, int(0.95 * count * _METADATA_SIZE / size))


def _merge_results(
    tasks: Sequence[TaskRecord], old: ExistingCard, info: Mapping[str, Any], digest: str | None
) -> tuple[list[EvalResult], list[EvalResult]]:
    """
    Results for the metadata: those of the record, and others of the existing card.

    What an earlier push measured is dropped if the tensors have changed, or the adapter has lost the task. It is known
    by its task and by the metrics that the metadata lists as `measured`.
    """
    names = {task.name for task in tasks}
    changed = bool(digest and info.get("digest")) and digest != info["digest"]
    others = []
    for result in old.results:
        measured = result.dataset_name in info["tasks"] and result.metric_type in info["measured"]
        if not measured or not (changed or (names and result.dataset_name not in names)):
            others.append(result)
    own = _own_results(tasks, {result.dataset_type for result in others if result.dataset_name not in names})

    # The Hub identifies a result by its dataset and configuration, so each task needs its own pair.
    owners = {result.unique_identifier: result.dataset_name for result in own}
    present = {(result.dataset_name, result.metric_type) for result in own}
    renamed = []
    for result in others:
        name = owners.get(result.unique_identifier, result.dataset_name)
        if (name, result.metric_type) not in present:
            renamed.append(replace(result, dataset_name=name))
    return own, renamed


def _own_results(tasks: Sequence[TaskRecord], others: set[str]) -> list[EvalResult]:
    """
    The metrics of the record.

    Args:
        tasks (`Sequence[TaskRecord]`): The tasks. Those that share a dataset, with each other or with one of
            `others`, are distinguished by its configuration, which gets the name of the task.
        others (`set[str]`): Datasets of other results.
    """
    used = Counter(task.dataset for task in tasks)
    results = []
    for task in tasks:
        shared = task.dataset is not None and (used[task.dataset] > 1 or task.dataset in others)
        # The Hub shows the first metric of a task as its main one.
        for metric, value in sorted(task.metrics.items(), key=lambda entry: _rank(entry[0])):
            if is_finite(value):
                bounds = task.intervals.get(metric)
                results.append(
                    EvalResult(
                        task_type=_TASK_TYPE,
                        dataset_type=task.dataset or task_slug(task.name),
                        dataset_name=task.name,
                        dataset_config=task.name if shared else None,
                        metric_type=metric,
                        metric_name=_capitalized(_spoken(metric)),
                        metric_value=float(value),
                        metric_args=_measured_on(bounds, task.metric_rows),
                    )
                )
    return results


def _measured_on(bounds: Sequence[float] | None, rows: int | None) -> dict[str, Any] | None:
    """The interval of a metric, and the number of rows, for the metadata."""
    if bounds is None:
        return None
    return {"interval_95": [round(bound, 4) for bound in bounds], **({} if rows is None else {"rows": rows})}


def _rank(metric: str) -> int:
    return SCORES.index(metric) if metric in SCORES else len(SCORES)


def _spoken(metric: str) -> str:
    """The name of a metric in text."""
    own = metric.removeprefix("base_") if metric in _BASE.values() else metric
    spoken = _SPOKEN.get(own, own.replace("_", " "))
    return spoken if own == metric else f"base {spoken}"


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def _with_results(tasks: Sequence[TaskRecord], results: Iterable[EvalResult]) -> list[TaskRecord]:
    """The tasks with the metrics of the metadata, so that page and metadata agree."""
    metrics: dict[str, dict[str, float]] = {task.name: {} for task in tasks}
    for result in results:
        if result.dataset_name in metrics and is_finite(result.metric_value):
            metrics[result.dataset_name].setdefault(result.metric_type, float(result.metric_value))
    return [replace(task, metrics=metrics[task.name]) for task in tasks]


def _merge_datasets(tasks: Sequence[TaskRecord], datasets: Sequence[str], old: ExistingCard) -> list[str]:
    names = [*(task.dataset for task in tasks), *datasets, *names_in(old.metadata.get("datasets"))]
    return _unique(name for name in names if name and hub_name(name))


def _merge_tags(
    listed: Sequence[TaskRecord],
    tasks: Sequence[TaskRecord],
    tags: Sequence[str],
    old: ExistingCard,
    info: Mapping[str, Any],
) -> list[str]:
    # Tags of tasks that the adapter has lost, or that are not listed, go.
    managed = {_tag(task.name) for task in tasks}
    outdated = managed | ({_tag(name) for name in info["tasks"]} if tasks else set())
    # The Hub computes the tags `base_model:`.
    present = [tag for tag in names_in(old.metadata.get("tags")) if not tag.startswith("base_model:")]
    kept = (tag for tag in present if tag not in outdated)
    return _unique([*_TAGS, *(_tag(task.name) for task in listed), *tags, *kept])


def _tag(task: str) -> str:
    return TASK_TAG + " ".join(task.split())


def _info_block(
    config: RLoraConfig,
    record: AdapterRecord,
    digest: str | None,
    num_parameters: int | None,
    tasks: Sequence[TaskRecord],
    measured: list[str],
    exports: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The block of metadata that the zoo reads without downloading the adapter; see [`read_card_info`]."""
    block = {
        "format": INFO_FORMAT,
        "r": config.r,
        "num_heads": config.num_heads,
        "router": config.router,
        "scaling": config.scaling(),
        "digest": digest,
        "parameters": num_parameters,
        "base_model_revision": record.base_model_revision,
        "tasks": [task.name for task in tasks],
        "measured": measured,
        "exports": {str(export.get("task") or export["path"]): str(export["path"]) for export in exports},
    }
    return {key: value for key, value in block.items() if value is not None and value != [] and value != {}}


# The page


def _render_page(config: RLoraConfig, record: AdapterRecord, **values: Any) -> str:
    """The generated part of the card, from marker to marker."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {
        "text": escape,
        "literal": _literal,
        "code": code,
        "link": _hub_link,
        "count": _count,
        "metric": _metric,
        "points": _points,
        "score": _score,
        "spoken": _spoken,
        "quote": quote,
        "without_empty_columns": _without_empty_columns,
    }
    template = resources.files(__package__).joinpath("card_template.md").read_text(encoding="utf-8")

    base_arguments = [_literal(record.base_model or "")]
    if record.base_model_revision:
        base_arguments.append(f"revision={_literal(record.base_model_revision)}")
    page = environment.from_string(template).render(
        begin=BEGIN,
        end=END,
        folded_from=_FOLDED_FROM,
        rows=_ROWS,
        entries=_ENTRIES,
        config=config,
        record=record,
        base_model=record.base_model,
        base_arguments=", ".join(base_arguments),
        task=record.tasks[0].name if config.router == "task" and record.tasks else None,
        scores=SCORES,
        metrics=_other_metrics(record.tasks),
        measured=len({name for task in record.tasks for name in task.metrics} - {*SCORES, *_BASE.values()}),
        exports=[{**dict.fromkeys(_EXPORT_FIELDS), **export} for export in record.exports],
        settings=_shown_settings(record),
        versions={name: value for name, value in record.versions.items() if is_plain(name) and is_plain(value)},
        data_licenses={
            _hub_link(task.dataset, "datasets/") or escape(task.name): task.license
            for task in record.tasks
            if task.license
        },
        **values,
    )
    return re.sub(r"\n{3,}", "\n\n", page).strip()


def _other_metrics(tasks: Sequence[TaskRecord]) -> list[str]:
    """Names of the first metrics except scores, the loss last."""
    names = dict.fromkeys(name for task in tasks for name in task.metrics)
    others = [name for name in names if name not in (*SCORES, *_BASE.values(), "loss")]
    return [*others[: _METRICS - 1], *(["loss"] if "loss" in names else others[_METRICS - 1 : _METRICS])]


def _shown_settings(record: AdapterRecord) -> dict[str, Any]:
    """Settings as `RLoraSFTConfig` names them, without usual ones and switches that are off."""
    settings = {
        name: value
        for name, value in record.hyperparameters.items()
        if is_plain(name) and is_plain(value) and (value is not False or name == "train_a")
        if not (name in _USUAL and value == _USUAL[name])
        if name not in ("balance_loss", "balance_coef")  # in the table of the adapter
    }
    if not settings.get("packing"):
        settings.pop("packing_strategy", None)
    return settings


def _without_empty_columns(table: str) -> str:
    """A Markdown table without the columns that are empty in all rows. Pipes within cells are escaped."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.strip().splitlines()]
    shown = [index for index in range(len(rows[0])) if any(row[index].strip() for row in rows[2:])]
    return "\n".join(f"|{'|'.join(row[index] for index in shown)}|" for row in rows)


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _score(task: TaskRecord, name: str) -> str:
    """A score of a task, with its interval if that was measured on the same rows."""
    value, bounds = task.metrics.get(name), task.intervals.get(name)
    shown = _metric(value, name)
    if bounds is None or not shown.endswith("%"):
        return shown
    return f"{shown} ({100 * bounds[0]:.1f} to {100 * bounds[1]:.1f})"


def _metric(value: float | None, name: str) -> str:
    if value is None:
        return ""
    # A score beyond 1 was written by hand, in percent.
    is_share = name == "share" or name.endswith("accuracy") or name in (*SCORES, *_BASE.values())
    if is_share and 0 <= value <= 1:
        return f"{100 * value:.1f}%"
    return f"{value:.4g}"


def _points(value: float | None, other: float | None) -> str:
    """The difference of two ratios in percentage points."""
    if value is None or other is None or not (0 <= value <= 1 and 0 <= other <= 1):
        return ""
    return f"{100 * (value - other):+.1f}".replace("-0.0", "+0.0")


def _hub_link(name: str | None, kind: str = "") -> str:
    return f"[{escape(name)}](https://huggingface.co/{kind}{quote(name)})" if name else ""


def _literal(text: str) -> str:
    """A printable string of Python that can't end the code block, nor look like one of the markers."""
    # The escapes of `printable` are those of Python.
    return printable(json.dumps(text, ensure_ascii=False)).replace("<", "\\u003c")


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
