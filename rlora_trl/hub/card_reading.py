"""Reads cards. Their contents are untrusted: values of unexpected types and sizes are ignored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from huggingface_hub import CardData, EvalResult
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.repocard_data import model_index_to_eval_results

from ..files.card_text import check_card_text, read_card_text
from ..reading import shorten
from ..tuner.task_names import MAX_TASK_NAME, MAX_TASKS


# Around the generated part of a card.
BEGIN = "<!-- rlora_trl: generated, rewritten by each push -->"
END = "<!-- rlora_trl: end -->"
TASK_TAG = "task:"

# Sentences of the cards that Trainer, TRL, PEFT and transformers generate.
_AUTOMATIC = (
    "This model is a fine-tuned version of",
    "[More Information Needed]",
    "More information needed",
    "This model card has been generated automatically",
)
# Metadata of such cards that is wrong for an adapter, or names a folder. TRL 1.16 writes `licence: license`.
_AUTOMATIC_KEYS = ("licence", "model_name", "base_model", "library_name", "pipeline_tag", "eval_results", "metrics")
_MAX_NAMES, _MAX_NAME_LENGTH = MAX_TASKS, MAX_TASK_NAME
# Fields of a result that the Hub identifies it by, or that are compared.
_RESULT_NAMES = (
    *("task_type", "dataset_type", "dataset_name", "dataset_config", "dataset_split", "dataset_revision"),
    "metric_type",
)


@dataclass
class ExistingCard:
    """The contents of a card around its generated part: metadata, results, and the text before and after it."""

    metadata: dict[str, Any] = field(default_factory=dict)
    results: list[EvalResult] = field(default_factory=list)
    before: str = ""
    after: str = ""
    newline: str = "\n"


def read_card(path: Path) -> str | None:
    """The text of a card as [`read_card_text`] reads it; `None` if the file is missing."""
    return read_card_text(path) if path.is_file() else None


def hand_written(text: str) -> str:
    """
    The hand-written text of a card, without metadata, generated part, and text of automatic cards.

    Args:
        text (`str`): The card.
    """
    card = read_existing(text)
    return "\n\n".join(part.strip() for part in (card.before, card.after) if part.strip())


def read_existing(text: str | None) -> ExistingCard:
    """
    Parse a card.

    Args:
        text (`str`, *optional*): The card. If Trainer, TRL or PEFT generated it, only part of its metadata is kept.

    Raises:
        ValueError: If the metadata can't be read.
    """
    if not text or not text.strip():
        return ExistingCard()
    text = text.removeprefix("\ufeff")
    newline = "\r\n" if text.count("\r\n") == text.count("\n") == text.count("\r") > 0 else "\n"
    match = REGEX_YAML_BLOCK.search(text)
    if match is None:
        return ExistingCard({}, [], *_split_body(text, newline), newline)

    try:
        metadata = {key: value for key, value in check_card_text(text).items() if value is not None}
        results = _read_results(metadata.pop("model-index", None))
    except Exception as error:  # what `huggingface_hub` raises for results of a wrong shape, too
        raise ValueError(
            f"The metadata of the existing card, between its two lines of ---, can't be read: {error}. Correct it, or "
            "remove it: the rest of the card is kept."
        ) from error
    if results:
        metadata.pop("model_name", None)  # the name of `model-index`

    body = text[match.end() :]
    if BEGIN not in body and any(sentence in body for sentence in _AUTOMATIC):
        metadata = {key: value for key, value in metadata.items() if key not in _AUTOMATIC_KEYS}
        return ExistingCard(metadata, newline=newline)
    return ExistingCard(metadata, results, *_split_body(body, newline), newline)


def _read_results(model_index: Any) -> list[EvalResult]:
    """The results in the metadata of a card; an error if they have another shape than the Hub's."""
    if not model_index:
        return []
    _, results = model_index_to_eval_results(model_index)
    for result in results:
        for name in _RESULT_NAMES:
            if isinstance(value := getattr(result, name), list | dict):
                raise ValueError(f"`{name}` of a result in `model-index` must be a text, got {shorten(value)}")
    return results


def _split_body(body: str, newline: str) -> tuple[str, str]:
    """The text before and after the generated part, which is cut out wherever it is."""
    if BEGIN not in body and END not in body:
        if any(sentence in body for sentence in _AUTOMATIC) or not body.strip():
            return "", ""
        gap = newline if body.startswith(newline) else 2 * newline
        return "", gap + body

    before, _, rest = body.partition(BEGIN)
    if END not in rest:
        # With one marker missing, generated and hand-written text can't be distinguished: all of it is kept.
        return before.replace(END, ""), rest.replace(END, "")
    _, _, after = rest.partition(END)

    # Further generated parts in the text after the first one, each up to its end.
    *parts, last = after.split(END)
    kept = [part.partition(BEGIN)[0] for part in parts] + [last]
    return before, "".join(kept).replace(BEGIN, "").replace(END, "")


def read_card_info(card_data: CardData | Mapping[str, Any] | None, model_index: Any = None) -> dict[str, Any]:
    """
    The facts about an adapter in the metadata of a card. Values of unexpected types are ignored.

    Args:
        card_data (`CardData` or `Mapping`): Metadata of a card, or `ModelInfo.card_data`.
        model_index (`list`, *optional*): `ModelInfo.model_index`, for metadata without results.

    Returns:
        `dict`: Always `tasks` (`list[str]`), `metrics` (`dict[str, dict[str, float]]`, by task) and `exports`
        (`dict[str, str]`, folders by task). If the card has them: `format`, `r`, `num_heads`, `router`, `scaling`,
        `digest`, `parameters`, `base_model`, `base_model_revision`, `license`, and `measured`, the names of the
        metrics that a push has written.
    """
    # Its attributes rather than `to_dict`, which fails for results of a wrong shape.
    data: dict[str, Any] = dict(vars(card_data) if isinstance(card_data, CardData) else card_data or {})
    block = data.get("rlora")
    block = block if isinstance(block, Mapping) else {}
    info: dict[str, Any] = {key: block[key] for key, is_valid in _FIELDS.items() if is_valid(block.get(key))}
    for key in ("base_model", "license"):
        if names := names_in(data.get(key)):
            info[key] = names[0]

    tagged = [tag.removeprefix(TASK_TAG) for tag in names_in(data.get("tags")) if tag.startswith(TASK_TAG)]
    info["tasks"] = list(dict.fromkeys(names_in(block.get("tasks")) or [name for name in tagged if name]))
    exports = block.get("exports")
    exports = exports if isinstance(exports, Mapping) else {}
    info["exports"] = {k: v for k, v in list(exports.items())[:_MAX_NAMES] if _is_name(k) and _is_name(v)}
    info["measured"] = names_in(block.get("measured"))

    info["metrics"] = {}
    for task, metric, value in _read_metrics(data.get("eval_results"), data.get("model-index") or model_index):
        if _is_name(task) and _is_name(metric) and is_finite(value):
            info["metrics"].setdefault(task, {}).setdefault(metric, float(value))
    return info


def _read_metrics(eval_results: Any, model_index: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Name of the dataset (in cards of this package that of the task), name of the metric, and value."""
    for result in eval_results if isinstance(eval_results, list) else []:
        if isinstance(result, EvalResult):
            yield result.dataset_name, result.metric_type, result.metric_value
    for model in _mappings(model_index):
        for entry in _mappings(model.get("results")):
            dataset = entry.get("dataset")
            for metric in _mappings(entry.get("metrics")):
                if isinstance(dataset, Mapping):
                    yield dataset.get("name"), metric.get("type"), metric.get("value")


def names_in(value: Any) -> list[str]:
    """The names in a metadata value, which may be one name, a list, or anything else."""
    entries = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [entry for entry in entries[:_MAX_NAMES] if _is_name(entry)]


def is_finite(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number, not a boolean."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    entries = value[:_MAX_NAMES] if isinstance(value, list) else []
    return [entry for entry in entries if isinstance(entry, Mapping)]


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_NAME_LENGTH


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# Keys of the block `rlora` in the metadata.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("format", "r", "num_heads", "parameters"), _is_count),
    **dict.fromkeys(("router", "digest", "base_model_revision"), _is_name),
    "scaling": is_finite,
}
