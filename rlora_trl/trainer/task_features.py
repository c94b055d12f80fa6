"""
Aligns the column types of several tasks, so that each row reads as in the dataset of its task alone.

Messages of chats differ between tasks in their fields: `name`, `tool_calls`, a `content` that is always empty. Arrow
has one type for a column, and a struct of all fields would fill those that a task lacks with nulls. A chat template
sees these (`"tool_calls" in message`) and renders the task in another way than alone. So structs that differ in their
fields become `datasets.Json`, which reads back with the fields that were written. (It rounds floats in such structs to
ten decimals.) `datasets` aligns columns, but not structs (https://github.com/huggingface/datasets/issues/6466, open).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from functools import partial, reduce
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate.logging import get_logger
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Json, LargeList, List, Value
from datasets.table import table_cast

from ..evaluation.columns import INTEGER_TYPES, TEXT_TYPES, is_text


_FLOATS = ("float16", "float32", "float64")
_FIRST_ROWS = 5
# Types that JSON can hold.
_PLAIN = (*INTEGER_TYPES, *_FLOATS, *TEXT_TYPES, "bool", "null")

logger = get_logger(__name__)


class _DifferentTypes(Exception):
    """Two features have no type in common."""


def align_features(datasets: Mapping[str, Dataset | IterableDataset], *, may_drop: bool = False) -> dict[str, Any]:
    """
    Cast the datasets of several tasks to the same features, whatever their order.

    - Columns of nulls take the type that other tasks give them; integers, floats, texts and lists the wider type.
    - Structs that differ in their fields become `Json`, so that a row reads as in the dataset of its task alone. (If
      JSON can't hold their values, such as images, they become one struct, with nulls for absent fields.)
    - Images take the mode that one of the tasks sets. Tools that are JSON in one task become JSON in all.
    - Class labels with different names become integers; if other tasks have texts, they become their names.

    Args:
        datasets (`Mapping[str, Dataset | IterableDataset]`): Datasets by task, all with the same columns.
        may_drop (`bool`, *optional*, defaults to `False`):
            Columns with types that can't be aligned are dropped, with a warning, unless no column would remain.

    Returns:
        `dict[str, Dataset | IterableDataset]`: Datasets by task.

    Raises:
        ValueError: If a column has types that can't be aligned, such as texts and lists of messages.
    """
    features = {task: _features_of(dataset) for task, dataset in datasets.items()}
    common, problems = Features(), {}
    for column in next(iter(features.values())):
        try:
            common[column] = _common_column(column, features)
        except ValueError as error:
            problems[column] = error

    if problems and not (may_drop and common):
        raise next(iter(problems.values()))
    if problems:
        logger.warning(
            f"Columns {', '.join(map(repr, problems))} are dropped, and `formatting_func` does not get them: "
            + " ".join(map(str, problems.values()))
        )
        datasets = {task: dataset.select_columns(list(common)) for task, dataset in datasets.items()}
        features = {task: Features({column: own[column] for column in common}) for task, own in features.items()}
    return {task: _cast(dataset, features[task], common) for task, dataset in datasets.items()}


def _features_of(dataset: Dataset | IterableDataset) -> Features:
    if dataset.features is not None:
        return dataset.features
    # As `datasets` infers them; but later rows of such a stream may have more fields than the first.
    first = Dataset.from_list(list(dataset.take(_FIRST_ROWS))).features
    return Features({column: _any_fields(feature) for column, feature in first.items()})


def _any_fields(feature: Any) -> Any:
    if isinstance(feature, dict):
        return Json() if _fits_json(feature) else feature
    if isinstance(feature, List | LargeList):
        return type(feature)(_any_fields(feature.feature))
    return feature


def _common_column(column: str, by_task: Mapping[str, Features]) -> Any:
    features = {task: features[column] for task, features in by_task.items()}
    if any(isinstance(feature, ClassLabel) for feature in features.values()):
        others = [f for f in features.values() if not isinstance(f, ClassLabel) and not _is_null(f)]
        if others and all(map(is_text, others)):
            return reduce(_common, others)
    if column == "tools" and any(map(is_text, features.values())) and all(map(_is_text_or_json, features.values())):
        return Value("large_string")  # TRL reads tools from JSON too
    first_task, first = next(iter(features.items()))
    common = first
    for task, feature in features.items():
        try:
            common = _common(common, feature)
        except _DifferentTypes as error:
            raise ValueError(
                f"Tasks {first_task!r} and {task!r} can't be joined: their column {column!r} has the types {first} "
                f"and {feature}. Bring them to the same type, for example with `Dataset.cast_column` or `Dataset.map`."
            ) from error
    return common


def _common(one: Any, other: Any) -> Any:
    """The type that holds the values of both, in either order."""
    # Not `==`, which ignores the order of the fields of a struct.
    if repr(one) == repr(other) or _is_null(other):
        return one
    if _is_null(one):
        return other
    if isinstance(one, dict | Json) or isinstance(other, dict | Json):
        return _common_struct(one, other)
    if isinstance(one, List | LargeList) and isinstance(other, List | LargeList):
        kind = List if isinstance(one, List) and isinstance(other, List) else LargeList
        return kind(_common(one.feature, other.feature))
    if isinstance(one, ClassLabel) or isinstance(other, ClassLabel):
        one, other = (Value("int64") if isinstance(feature, ClassLabel) else feature for feature in (one, other))
    if isinstance(one, Image) and isinstance(other, Image) and one.decode == other.decode:
        if None in (one.mode, other.mode):
            return one if other.mode is None else other
    if isinstance(one, Value) and isinstance(other, Value):
        return Value(_common_dtype(one.dtype, other.dtype))
    raise _DifferentTypes


def _common_dtype(one: str, other: str) -> str:
    if one in TEXT_TYPES and other in TEXT_TYPES:
        return "large_string" if "large_string" in (one, other) else "string"
    for kind in (INTEGER_TYPES, _FLOATS):
        if one in kind and other in kind:
            wider = str(np.promote_types(one, other))
            if wider in kind:
                return wider
    if one == other:
        return one
    raise _DifferentTypes


def _common_struct(one: Any, other: Any) -> Any:
    if not all(isinstance(feature, dict | Json) for feature in (one, other)):
        raise _DifferentTypes
    # The order of fields matters: a template may print a struct.
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        with suppress(_DifferentTypes):  # as a content that is a text in some rows and a list of parts in others
            return {name: _common(one[name], other[name]) for name in one}
    if _fits_json(one) and _fits_json(other):
        return Json()
    if isinstance(one, Json) or isinstance(other, Json):
        raise _DifferentTypes
    names = sorted({*one, *other})
    return {name: _common(one.get(name, Value("null")), other.get(name, Value("null"))) for name in names}


def _is_text_or_json(feature: Any) -> bool:
    return is_text(feature) or _is_null(feature) or (not isinstance(feature, Value) and _fits_json(feature))


def _is_null(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype == "null"


def _fits_json(feature: Any) -> bool:
    if isinstance(feature, dict):
        return all(_fits_json(part) for part in feature.values())
    if isinstance(feature, List | LargeList):
        return _fits_json(feature.feature)
    return isinstance(feature, Json | ClassLabel) or (isinstance(feature, Value) and feature.dtype in _PLAIN)


def _cast(dataset: Dataset | IterableDataset, present: Features, common: Features) -> Dataset | IterableDataset:
    common = Features({column: common[column] for column in present})  # in the order of the dataset's own columns

    # What Arrow can't cast: classes to their names, tools to JSON.
    for column, feature in present.items():
        if isinstance(feature, ClassLabel) and getattr(common[column], "dtype", None) in TEXT_TYPES:
            present = Features({**present, column: common[column]})
            arguments = {"column": column, "labels": feature}
            dataset = dataset.map(_name_classes, fn_kwargs=arguments, features=present)
    tools = present.get("tools")
    if is_text(common.get("tools")) and not is_text(tools) and not _is_null(tools):
        present = Features({**present, "tools": common["tools"]})
        dataset = dataset.map(_write_tools, features=present)

    # A stream without features needs those that can read more than its first rows.
    if repr(present) == repr(common) and (dataset.features is not None or "Json" not in repr(common)):
        return dataset
    if isinstance(dataset, IterableDataset):
        return dataset.cast(common)
    # As `Dataset.cast`, but of copies: see `_cast_batch`.
    cast = dataset.with_format("arrow").map(
        partial(_cast_batch, schema=common.arrow_schema), batched=True, features=common, desc="Casting the dataset"
    )
    return cast.with_format(**dataset.format)


def _cast_batch(batch: pa.Table, schema: pa.Schema) -> pa.Table:
    """
    Cast a batch by `datasets`, after copying its rows into one part (`take`).

    `datasets` casts each part alone, one for each row of a dataset with indices, and all values of a list of which a
    batch is a slice. No upstream issue as of datasets 5.2.
    """
    return table_cast(batch.take(np.arange(len(batch))), schema)


def _write_tools(row: dict[str, Any]) -> dict[str, Any]:
    tools = row["tools"]
    return {"tools": None if tools is None else json.dumps(tools, ensure_ascii=False)}


def _name_classes(row: dict[str, Any], column: str, labels: ClassLabel) -> dict[str, Any]:
    label = row[column]
    return {column: None if label is None or label < 0 else labels.int2str(label)}
