"""The card of an adapter: metadata for the Hub's filters, and a page for people.

Generated text lies between two markers. What is written by hand around it, and what is set by hand in the metadata,
survives every push. Names of tasks come from users, and those of other people's adapters from strangers: all are
escaped.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard
from urllib.parse import quote

from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..files.layout import EXPORTS, task_slug
from ..files.names import hub_name
from ..files.record import BASE_ACCURACY, AdapterRecord, TaskRecord, is_plain


if TYPE_CHECKING:
    from ..tuner.config import RLoraConfig


BEGIN = "<!-- rlora_trl: generated, rewritten by each push -->"
END = "<!-- rlora_trl: end -->"
INFO_FORMAT = 1

# Sentences of cards that Trainer, TRL, PEFT and transformers write where nobody has written one.
_AUTOMATIC = (
    "This model is a fine-tuned version of",
    "[More Information Needed]",
    "More information needed",
    "This model card has been generated automatically",
)
# Metadata of such cards that is wrong for an adapter, or the name of a folder.
_AUTOMATIC_KEYS = ("license", "model_name", "base_model", "library_name", "pipeline_tag", "eval_results", "metrics")
_TAGS = ("rlora", "multi-task", "lora")
_TASK_TAG = "task:"
_TASK_TYPE = "text-generation"
# A table of more tasks is folded, so that the code to load the adapter stays on the first screen.
_FOLDED_FROM = 25
_MAX_NAMES, _MAX_NAME_LENGTH = 1000, 300

# By PEFT's task type: the classes of PEFT and of transformers that load the model.
_CLASSES = {
    "SEQ_CLS": "SequenceClassification",
    "SEQ_2_SEQ_LM": "Seq2SeqLM",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
}
_ROUTERS = {
    "softmax": " with a router that weighs them for each token",
    "top_k": " with a router that chooses {top_k} of them for each token",
    "task": " with a learned mixture of them for each task",
    "uniform": ", all of the same weight",
}
# By the name of a picture: what it is, and how to read it.
_FIGURES = {
    "routing": (
        "Mean weight of each head by task and layer",
        "White: an equal share; red: the task uses the head more; blue: less.",
    ),
    "head_similarity": (
        "Cosine similarity between the heads",
        "1: copies of each other; 0: unrelated.",
    ),
}
# Settings that nobody has chosen, and that are the same in most runs.
_SILENT = {
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


@dataclass
class _Existing:
    """What an existing card has of its own: metadata, results, and text around the generated one."""

    metadata: dict[str, Any] = field(default_factory=dict)
    results: list[EvalResult] = field(default_factory=list)
    before: str = ""
    after: str = ""
    newline: str = "\n"

    @property
    def info(self) -> dict[str, Any]:
        return read_card_info(self.metadata)


@dataclass
class _Facts:
    """All that is known of an adapter, from its configuration, its record and its earlier card."""

    config: RLoraConfig
    record: AdapterRecord
    source: str
    name: str | None
    base_model: str | None
    base_revision: str | None
    tasks: list[TaskRecord]
    exports: list[dict[str, Any]]
    digest: str | None
    num_parameters: int | None
    figures: list[str]
    license: Any  # a name, or a list of names in a card that somebody wrote


def render_card(
    config: RLoraConfig,
    record: AdapterRecord | None,
    *,
    repo_id: str | None = None,
    digest: str | None = None,
    num_parameters: int | None = None,
    figures: Sequence[str] = (),
    exports: Sequence[str] = (),
    license: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    existing: str | None = None,
) -> ModelCard:
    """
    Write the card of an adapter, or bring an existing one up to date.

    What is not known is left out, and so are folders: a base model or data set that is not on the Hub is not named.

    Args:
        config ([`RLoraConfig`]):
            Configuration of the adapter.
        record ([`AdapterRecord`], *optional*):
            What training recorded.
        repo_id (`str`, *optional*):
            Repository that the card is for; without it, the code in the card loads from the folder it lies in.
        digest (`str`, *optional*), num_parameters (`int`, *optional*):
            Of the adapter's tensors, see [`adapter_digest`], and how many of its parameters train.
        figures (`Sequence[str]`, *optional*):
            Paths of pictures in the repository.
        exports (`Sequence[str]`, *optional*):
            Tasks whose plain-LoRA export is in the repository, besides those of `record.exports`.
        license (`str`, *optional*), datasets (`Sequence[str]`, *optional*), tags (`Sequence[str]`, *optional*):
            Metadata of the Hub. Lists are united with what the card has; a license replaces that of the card.
        existing (`str`, *optional*):
            Text of the present card. A card that Trainer or PEFT wrote is replaced; other text without markers is
            kept below the generated one.

    Returns:
        `ModelCard`: Rendering again with its text as `existing` gives the same text.

    Raises:
        ValueError: If the metadata of `existing` can't be read.
    """
    old = _read_existing(existing)
    facts = _collect_facts(config, record, old, repo_id, digest, num_parameters, figures, exports, license)
    results = _merge_results(facts, old)
    _show_results(facts.tasks, results)
    data = _metadata(facts, old, results, datasets, tags)
    generated = _render_body(facts, has_title=bool(re.search(r"^# ", old.before, re.MULTILINE)))
    body = (old.before or old.newline) + generated.replace("\n", old.newline) + (old.after or old.newline)
    header = f"---{old.newline}{data.to_yaml(line_break=old.newline)}{old.newline}---{old.newline}"
    return ModelCard(header + body)


def read_card(path: Path) -> str | None:
    """The text of a card with its line ends as they are; `None` if there is no such file."""
    if not path.is_file():
        return None
    with open(path, encoding="utf-8", newline="") as file:
        return file.read()


def hand_written(text: str) -> str:
    """
    The text of a card that somebody wrote: all but the metadata, generated text, and cards that Trainer or PEFT wrote.

    Args:
        text (`str`): The card.
    """
    old = _read_existing(text)
    return "\n\n".join(part.strip() for part in (old.before, old.after) if part.strip())


def read_card_info(card_data: CardData | Mapping[str, Any] | None, model_index: Any = None) -> dict[str, Any]:
    """
    What the metadata of a card says of an adapter. Values of unexpected types are ignored: anybody may write a card.

    Args:
        card_data (`CardData` or `Mapping`): Metadata of a card, or `ModelInfo.card_data`.
        model_index (`list`, *optional*): `ModelInfo.model_index`, for metadata that came without it.

    Returns:
        `dict`: Always `tasks` (`list[str]`), `metrics` (`dict[str, dict[str, float]]`, by task) and `exports`
        (`dict[str, str]`, folders by task); where they are known `format`, `r`, `num_heads`, `router`, `scaling`,
        `digest`, `parameters`, `base_model`, `base_model_revision`, `license`, and `measured`, the names of the
        metrics that a push has put there.
    """
    # Its fields as they are: results of a wrong shape would break `to_dict`.
    data: dict[str, Any] = dict(vars(card_data) if isinstance(card_data, CardData) else card_data or {})
    block = data.get("rlora")
    block = block if isinstance(block, Mapping) else {}
    info: dict[str, Any] = {}
    for key in ("format", "r", "num_heads", "parameters"):
        value = block.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            info[key] = value
    for key in ("router", "digest", "base_model_revision"):
        if _is_name(block.get(key)):
            info[key] = block[key]
    scaling = block.get("scaling")
    if _is_finite(scaling):
        info["scaling"] = float(scaling)
    for key in ("base_model", "license"):
        first = next(iter(_names(data.get(key))), None)
        if first is not None:
            info[key] = first
    tagged = [tag.removeprefix(_TASK_TAG) for tag in _names(data.get("tags")) if tag.startswith(_TASK_TAG)]
    info["tasks"] = _unique(_names(block.get("tasks")) or [name for name in tagged if name])
    exports = block.get("exports")
    exports = exports if isinstance(exports, Mapping) else {}
    info["exports"] = {k: v for k, v in list(exports.items())[:_MAX_NAMES] if _is_name(k) and _is_name(v)}
    info["measured"] = _names(block.get("measured"))
    info["metrics"] = {}
    for task, metric, value in _read_metrics(data.get("eval_results"), data.get("model-index") or model_index):
        if _is_name(task) and _is_name(metric) and _is_finite(value):
            info["metrics"].setdefault(task, {}).setdefault(metric, float(value))
    return info


def _read_metrics(eval_results: Any, model_index: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Name of the data set, which in our cards is that of the task, name of the metric, and value."""
    for result in eval_results if isinstance(eval_results, list) else []:
        if isinstance(result, EvalResult):
            yield result.dataset_name, result.metric_type, result.metric_value
    for model in _mappings(model_index):
        for entry in _mappings(model.get("results")):
            dataset = entry.get("dataset")
            for metric in _mappings(entry.get("metrics")):
                if isinstance(dataset, Mapping):
                    yield dataset.get("name"), metric.get("type"), metric.get("value")


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    entries = value[:_MAX_NAMES] if isinstance(value, list) else []
    return [entry for entry in entries if isinstance(entry, Mapping)]


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_NAME_LENGTH


def _is_finite(value: Any) -> TypeGuard[float]:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _names(value: Any) -> list[str]:
    """A list of names, of what may be one name, a list, or anything."""
    entries = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [entry for entry in entries[:_MAX_NAMES] if _is_name(entry)]


def _unique(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _read_existing(text: str | None) -> _Existing:
    if not text or not text.strip():
        return _Existing()
    text = text.removeprefix("\ufeff")
    newline = "\r\n" if text.count("\r\n") == text.count("\n") == text.count("\r") > 0 else "\n"
    match = REGEX_YAML_BLOCK.search(text)
    if match is None:
        return _Existing({}, [], *_split_body(text, newline), newline)
    try:
        data: Any = ModelCard(text).data
        metadata, results = data.to_dict(), list(data.eval_results or [])
    except Exception as error:  # PyYAML's, and whatever else metadata of a wrong shape brings about
        raise ValueError(
            f"The metadata of the existing card, between its two lines of ---, can't be read: {error}. Correct it, or "
            "remove it: the rest of the card is kept."
        ) from error
    metadata.pop("model-index", None)
    body = text[match.end() :]
    if BEGIN not in body and any(sentence in body for sentence in _AUTOMATIC):
        kept = {key: value for key, value in metadata.items() if key not in _AUTOMATIC_KEYS}
        return _Existing(kept, newline=newline)
    return _Existing(metadata, results, *_split_body(body, newline), newline)


def _split_body(body: str, newline: str) -> tuple[str, str]:
    """Text before and after the generated part, which is taken out wherever it is."""
    if BEGIN not in body and END not in body:
        if any(sentence in body for sentence in _AUTOMATIC) or not body.strip():
            return "", ""
        gap = newline if body.startswith(newline) else 2 * newline
        return "", gap + body
    before, _, rest = body.partition(BEGIN)
    if END not in rest:
        # A marker without its partner: nobody can tell what is generated, so all of it is kept.
        return before.replace(END, ""), rest.replace(END, "")
    _, _, after = rest.partition(END)
    while BEGIN in after and END in after.partition(BEGIN)[2]:
        kept, _, rest = after.partition(BEGIN)
        after = kept + rest.partition(END)[2]
    return before, after.replace(BEGIN, "").replace(END, "")


def _collect_facts(
    config: RLoraConfig,
    record: AdapterRecord | None,
    old: _Existing,
    repo_id: str | None,
    digest: str | None,
    num_parameters: int | None,
    figures: Sequence[str],
    exports: Sequence[str],
    license: str | None,
) -> _Facts:
    record = record if record is not None else AdapterRecord()
    candidates = [record.base_model, config.base_model_name_or_path, *_names(old.metadata.get("base_model"))]
    base_model = next((name for name in candidates if hub_name(name)), None)
    recorded = {task.name: task for task in record.tasks}
    names = _unique([*(config.tasks or ()), *recorded])
    # Copies: results of the earlier card are added to them below.
    tasks = [replace(recorded.get(name, TaskRecord(name))) for name in names]
    exported = {str(export.get("path")): export for export in record.exports}
    for task in exports:
        path = f"{EXPORTS}/{task_slug(task)}"
        exported.setdefault(path, {"task": task, "path": path})
    return _Facts(
        config=config,
        record=record,
        source=repo_id or ".",
        name=(repo_id or "").rpartition("/")[2] or None,
        base_model=base_model,
        base_revision=(record.base_model_revision or config.revision) if base_model else None,
        tasks=tasks,
        exports=list(exported.values()),
        digest=digest,
        num_parameters=num_parameters,
        figures=list(figures),
        license=license or old.metadata.get("license"),
    )


def _merge_results(facts: _Facts, old: _Existing) -> list[EvalResult]:
    """
    Results for the metadata: those of the record, then those that the card has besides.

    What an earlier push measured is dropped once the tensors are others, or the adapter has lost the task: it is no
    longer true. Results of that push are those of its tasks and of the metrics that its metadata lists.
    """
    info, names = old.info, {task.name for task in facts.tasks}
    changed = bool(facts.digest and info.get("digest")) and facts.digest != info["digest"]
    kept = []
    for result in old.results:
        measured = result.dataset_name in info["tasks"] and result.metric_type in info["measured"]
        if not measured or not (changed or (names and result.dataset_name not in names)):
            kept.append(result)
    results = _own_results(facts.tasks, {result.dataset_type for result in kept if result.dataset_name not in names})
    # The Hub takes results of one place, as it sees it, for those of one task.
    owners = {result.unique_identifier: result.dataset_name for result in results}
    present = {(result.dataset_name, result.metric_type) for result in results}
    for result in kept:
        name = owners.get(result.unique_identifier, result.dataset_name)
        if (name, result.metric_type) not in present:
            results.append(replace(result, dataset_name=name))
    return results


def _own_results(tasks: Sequence[TaskRecord], taken: Collection[str]) -> list[EvalResult]:
    """The metrics of the record. Tasks of one data set are told apart by its configuration, which gets their name."""
    used = Counter(hub_name(task.dataset) for task in tasks)
    results = []
    for task in tasks:
        dataset = hub_name(task.dataset)
        shared = dataset is not None and (used[dataset] > 1 or dataset in taken)
        # The first metric of a task is taken for its main one.
        for metric, value in sorted(task.metrics.items(), key=lambda entry: entry[0] != "accuracy"):
            if _is_finite(value):
                results.append(
                    EvalResult(
                        task_type=_TASK_TYPE,
                        dataset_type=dataset or task_slug(task.name),
                        dataset_name=task.name,
                        dataset_config=task.name if shared else None,
                        metric_type=metric,
                        metric_name=metric.replace("_", " ").capitalize(),
                        metric_value=float(value),
                    )
                )
    return results


def _show_results(tasks: Sequence[TaskRecord], results: Sequence[EvalResult]) -> None:
    """Add to the tasks what the metadata says of them: the page and the metadata agree."""
    by_name = {task.name: task for task in tasks}
    for task in tasks:
        task.metrics = {}
    for result in results:
        if result.dataset_name in by_name and _is_finite(result.metric_value):
            by_name[result.dataset_name].metrics.setdefault(result.metric_type, float(result.metric_value))


def _metadata(
    facts: _Facts, old: _Existing, results: list[EvalResult], datasets: Sequence[str], tags: Sequence[str]
) -> ModelCardData:
    kept, info = old.metadata, old.info
    names = [task.name for task in facts.tasks]
    outdated = {_tag(name) for name in info["tasks"] if names and name not in names}
    own_tags = [*_TAGS, *map(_tag, names), *tags]
    kept_tags = [tag for tag in _names(kept.get("tags")) if tag not in outdated and not tag.startswith("base_model:")]
    of_tasks = [task.dataset for task in facts.tasks if task.dataset]
    all_datasets = _unique([name for name in (*of_tasks, *datasets, *_names(kept.get("datasets"))) if hub_name(name)])
    there = {result.metric_type for result in results}
    own_metrics = [metric for task in facts.record.tasks for metric in task.metrics]
    measured = [metric for metric in _unique([*own_metrics, *info["measured"]]) if metric in there]
    metrics = _unique([*(name for name in measured if name == "accuracy"), *_names(kept.get("metrics"))])
    values = {
        "base_model": facts.base_model,
        "base_model_relation": "adapter" if facts.base_model else None,
        "library_name": "peft",
        "license": facts.license,
        "pipeline_tag": kept.get("pipeline_tag") or (_TASK_TYPE if _generates(facts.config) else None),
        "datasets": all_datasets or None,
        "metrics": metrics or None,
        "tags": _unique([*own_tags, *kept_tags]),
        "eval_results": results or None,
        "model_name": _model_name(facts) if results else kept.get("model_name"),
        "rlora": _info_block(facts, measured),
    }
    return ModelCardData(**{**{key: value for key, value in kept.items() if key not in values}, **values})


def _info_block(facts: _Facts, measured: list[str]) -> dict[str, Any]:
    """What the zoo reads of an adapter without downloading it; see [`read_card_info`]."""
    config = facts.config
    block = {
        "format": INFO_FORMAT,
        "r": config.r,
        "num_heads": config.num_heads,
        "router": config.router,
        "scaling": config.scaling(),
        "digest": facts.digest,
        "parameters": facts.num_parameters,
        "base_model_revision": facts.base_revision,
        "tasks": [task.name for task in facts.tasks],
        "measured": measured,
        "exports": {str(export.get("task") or export["path"]): str(export["path"]) for export in facts.exports},
    }
    return {key: value for key, value in block.items() if value is not None and value != [] and value != {}}


def _tag(task: str) -> str:
    return _TASK_TAG + " ".join(task.split())


def _model_name(facts: _Facts) -> str:
    base = (facts.base_model or "").rpartition("/")[2]
    return facts.name or (f"{base}-rlora" if base else "R-LoRA adapter")


def _generates(config: RLoraConfig) -> bool:
    return config.task_type in (None, "CAUSAL_LM")


def _render_body(facts: _Facts, has_title: bool) -> str:
    """The generated part of the card, from marker to marker."""
    template = resources.files(__package__).joinpath("card_template.md").read_text(encoding="utf-8")
    config, tasks = facts.config, facts.tasks
    kind = _CLASSES.get(str(config.task_type), "CausalLM")
    arguments = _literal(facts.base_model) if facts.base_model else "..."
    if facts.base_revision:
        arguments += f", revision={_literal(facts.base_revision)}"
    export = next(iter(facts.exports), None)
    card = ModelCard.from_template(
        ModelCardData(library_name="peft"),  # the real metadata come later: their keys could be names of the template
        template_str=template,
        begin=BEGIN,
        end=END,
        title=None if has_title else _escape(_model_name(facts)),
        summary=_summary(facts),
        task_table=_task_table(tasks),
        num_tasks=len(tasks),
        folded=len(tasks) >= _FOLDED_FROM,
        base_model=_literal(facts.base_model) if facts.base_model else None,
        base_arguments=arguments,
        source=_literal(facts.source),
        auto_model=f"AutoModelFor{kind}",
        auto_peft=f"AutoPeftModelFor{kind}",
        generates=_generates(config),
        task=_literal(tasks[0].name) if config.router == "task" and tasks else None,
        export=_literal(str(export["path"])) if export else None,
        export_table=_export_table(facts.exports),
        exports_measured=any(export.get("kl") is not None for export in facts.exports),
        adapter_table=_adapter_table(facts),
        hyperparameter_table=_hyperparameter_table(facts.record),
        versions=_versions(facts.record),
        figures=[(*_figure_texts(path), quote(path)) for path in facts.figures],
        licenses=_licenses(facts),
    )
    return re.sub(r"\n{3,}", "\n\n", card.text).strip()


def _summary(facts: _Facts) -> str:
    config = facts.config
    base = f" for {_hub_link(facts.base_model)}" if facts.base_model else ""
    count = {0: "", 1: ", trained on one task"}.get(len(facts.tasks), f", trained on {len(facts.tasks)} tasks")
    heads = f"one head of rank {config.r}"
    if config.num_heads > 1:
        routing = _ROUTERS[config.router].format(top_k=config.router_top_k)
        heads = f"{config.num_heads} heads of rank {config.r}{routing}"
    text = f"An [R-LoRA](https://huggingface.co/papers/2502.15455) adapter{base}{count}: {heads}."
    accuracies = [task.metrics["accuracy"] for task in facts.tasks if "accuracy" in task.metrics]
    if len(accuracies) > 1:
        of = "its" if len(accuracies) == len(facts.tasks) else f"{len(accuracies)} of its"
        text += f" Mean accuracy over {of} tasks: {_metric('accuracy', sum(accuracies) / len(accuracies))}"
        told = [task.metrics for task in facts.tasks if "accuracy" in task.metrics]
        of_base = [metrics[BASE_ACCURACY] for metrics in told if BASE_ACCURACY in metrics]
        if len(of_base) == len(accuracies):
            text += f", that of the base model alone: {_metric('accuracy', sum(of_base) / len(of_base))}"
        text += "."
    return text


def _task_table(tasks: Sequence[TaskRecord]) -> str:
    metrics = _unique([metric for task in tasks for metric in task.metrics])
    others = [name for name in metrics if name not in ("accuracy", BASE_ACCURACY)]
    others.sort(key=lambda name: name == "loss")
    accuracies = [(task.metrics.get("accuracy"), task.metrics.get(BASE_ACCURACY)) for task in tasks]
    columns = {
        "task": [_escape(task.name) for task in tasks],
        "cluster": [_escape(task.cluster) for task in tasks],
        "data set": [_hub_link(hub_name(task.dataset), "datasets/") for task in tasks],
        "rows seen": [_count(task.rows) for task in tasks],
        "tokens seen": [_count(task.tokens) for task in tasks],
        "share": ["" if task.share is None else f"{100 * task.share:.1f} %" for task in tasks],
        "accuracy": [_metric("accuracy", own) for own, _ in accuracies],
        "base": [_metric("accuracy", base) for _, base in accuracies],
        "gain (points)": [_points(own, base) for own, base in accuracies],
        **{
            _escape(name.replace("_", " ")): [_metric(name, task.metrics.get(name)) for task in tasks]
            for name in others
        },
        "rows tested": [_count(task.metric_rows) for task in tasks],
    }
    return _table(columns, left=("task", "cluster", "data set"))


def _export_table(exports: Sequence[Mapping[str, Any]]) -> str:
    columns = {
        "task": [_escape(export.get("task")) for export in exports],
        "`subfolder`": [_escape(export["path"]) for export in exports],
        "rank": [_count(export.get("rank")) for export in exports],
        "exact": ["" if export.get("exact") is None else "yes" if export["exact"] else "no" for export in exports],
        "accuracy": [_metric("accuracy", export.get("accuracy")) for export in exports],
        "with its router": [_metric("accuracy", export.get("accuracy_dynamic")) for export in exports],
        "lost (points)": [
            _points(export.get("accuracy_dynamic"), export.get("accuracy")).removeprefix("+") for export in exports
        ],
        "KL from it": [_metric("kl", export.get("kl")) for export in exports],
        "rows tested": [_count(export.get("rows")) for export in exports],
    }
    return _table(columns, left=("task", "`subfolder`"))


def _adapter_table(facts: _Facts) -> str:
    config, record = facts.config, facts.record
    scaling = f"{config.scaling():.4g} (`lora_alpha` {config.lora_alpha:g}, {'√' if config.use_rslora else ''}rank)"
    dropout = "on the input" if config.dropout_position == "input" else "a mask of its own for each head"
    balance = None
    if record.balance_loss not in (None, "none"):
        coefficient = "" if record.balance_coef is None else f", coefficient {record.balance_coef:g}"
        balance = _escape(record.balance_loss) + coefficient
    revision = f" at `{facts.base_revision[:12]}`" if facts.base_revision else ""
    top_k = f", {config.router_top_k} heads for each token" if config.router_top_k else ""
    rows = {
        "base model": _hub_link(facts.base_model) + revision,
        "its dtype in training": _escape(record.base_dtype),
        "its quantization in training": _escape(record.quantization),
        "heads": f"{config.num_heads}" + ("" if config.share_a else ", an A for each"),
        "rank of each": f"{config.r}" + _patterns(config.rank_pattern),
        "scaling": scaling + _patterns(config.alpha_pattern),
        "dropout": f"{config.head_dropout:g}, {dropout}" if config.head_dropout else "none",
        "router": config.router + top_k,
        "balance loss": balance,
        "initial values": f"{config.init_weights}" if config.init_weights else None,
        "target modules": _targets(config.target_modules),
        "modules trained in full": _targets(config.modules_to_save),
        "trainable parameters": _count(facts.num_parameters),
        "digest of the tensors": f"`{facts.digest}`" if facts.digest else None,
    }
    shown = {name: value for name, value in rows.items() if value}
    return _table({" ": list(shown), "  ": list(shown.values())}, left=(" ", "  "))


def _patterns(values: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{_escape(pattern)}: {value:g}" for pattern, value in values.items())
    return f" ({listed})" if listed else ""


def _hyperparameter_table(record: AdapterRecord) -> str:
    """Settings as `RLoraSFTConfig` names them. Switches that are off say little, but for one that is on by default."""
    values = {
        name: value
        for name, value in record.hyperparameters.items()
        if is_plain(name) and is_plain(value) and (value is not False or name == "train_a")
        if not (name in _SILENT and value == _SILENT[name])
        if name not in ("balance_loss", "balance_coef")  # told with the adapter
    }
    if not values.get("packing"):
        values.pop("packing_strategy", None)
    columns = {
        "argument": [f"`{name}`" for name in values],
        "value": [f"{value:g}" if isinstance(value, float) else _escape(value) for value in values.values()],
    }
    return _table(columns, left=tuple(columns))


def _versions(record: AdapterRecord) -> str:
    return ", ".join(
        f"{_escape(name)} {_escape(value)}"
        for name, value in record.versions.items()
        if is_plain(name) and is_plain(value)
    )


def _licenses(facts: _Facts) -> str:
    known = {}
    if facts.license:
        known["This adapter"] = ", ".join(_names(facts.license))
    if facts.base_model and facts.record.base_model_license:
        known[_hub_link(facts.base_model)] = facts.record.base_model_license
    for task in facts.tasks:
        if task.license:
            known[_hub_link(hub_name(task.dataset), "datasets/") or _escape(task.name)] = task.license
    return "\n".join(f"- {name}: {_escape(license)}" for name, license in known.items())


def _table(columns: Mapping[str, Sequence[str]], left: Sequence[str]) -> str:
    """A Markdown table of columns by title, without those that are empty; numbers, not in `left`, to the right."""
    shown = {title: cells for title, cells in columns.items() if any(cells)}
    if not shown:
        return ""
    lines = [shown, ["---" if title in left else "---:" for title in shown], *zip(*shown.values(), strict=True)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _metric(name: str, value: float | None) -> str:
    if value is None:
        return ""
    # Beyond 1 somebody has written percents by hand.
    if name.endswith("accuracy") and 0 <= value <= 1:
        return f"{100 * value:.1f} %"
    return f"{value:.4f}"


def _points(value: float | None, other: float | None) -> str:
    """The difference of two ratios in points of a percent."""
    if value is None or other is None or not (0 <= value <= 1 and 0 <= other <= 1):
        return ""
    return f"{100 * (value - other):+.1f}".replace("-0.0", "+0.0")


def _targets(modules: Any) -> str | None:
    if not modules:
        return None
    return ", ".join(map(_escape, [modules] if isinstance(modules, str) else sorted(modules)))


def _hub_link(name: str | None, kind: str = "") -> str:
    return f"[{_escape(name)}](https://huggingface.co/{kind}{quote(name)})" if name else ""


def _figure_texts(path: str) -> tuple[str, str]:
    """What a picture shows, and how to read it, if that is known."""
    stem = path.rpartition("/")[2].rpartition(".")[0]
    return _FIGURES.get(stem) or (_escape(stem.replace("_", " ")), "")


def _escape(text: Any) -> str:
    """Text of others as one line that means nothing to Markdown or HTML; underscores within words may stay."""
    line = html.escape(" ".join(str(text).split()), quote=False) if text is not None else ""
    line = re.sub(r"([\\`*\[\]|~$])", r"\\\1", line)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)


def _literal(text: str) -> str:
    """A string of Python that can't end the code block, nor look like one of the markers."""
    return json.dumps(text, ensure_ascii=False).replace("<", "\\u003c")
