"""Reads an untrusted `adapter_config.json`, and checks it before PEFT uses it."""

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypedDict

from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError

from ..reading import MIB, AdapterCheckError, read_json, shorten
from ..tuner.config import RLoraConfig


CONFIG_LIMIT = MIB
_MAX_ITEMS, _MAX_TEXT = 10_000, 512
_LIBRARY = re.compile(r"transformers(\.\w+)*", re.ASCII)

_MAX_FACTOR, _MAX_INDEX = 1e6, 2**31 - 1
# Bounds of the numbers in a field.
_BOUNDS: dict[str, tuple[float, float]] = {
    "r": (1, 16_384),
    "num_heads": (1, 4_096),
    "rank_pattern": (1, 16_384),
    "lora_alpha": (-_MAX_FACTOR, _MAX_FACTOR),
    "alpha_pattern": (-_MAX_FACTOR, _MAX_FACTOR),
    "init_gamma": (-_MAX_FACTOR, _MAX_FACTOR),
    "layers_to_transform": (0, _MAX_INDEX),
    "trainable_token_indices": (0, _MAX_INDEX),
}

# Regular expressions. In names of n characters, k repeats in a row take about n**k / k! steps, and each choice doubles
# them.
_MAX_PATTERN, _MAX_REPEATS, _MAX_CHOICES = 1000, 4, 8
# PEFT extends these expressions by one repeat, and tries each on every layer.
_MAX_INNER_REPEATS = 2
_PLAIN_NAME = re.compile(r"[\w.-]*", re.ASCII)
_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*+\]"  # an escape, a set of characters
    r"|\(\?(?:[=!]|<[=!]|P?<\w+>|P=\w+\)|#[^)]*\)|[a-zA-Z-]*[:)]|>)?|\(|\)|\|"
    r"|[*+?]|\{\d*,?\d*\}|.",
    re.DOTALL,
)
_VERBOSE = re.compile(r"\(\?[a-zA-Z-]*x")
_LITERAL = re.compile(r"[^.^$\[(\\]|\\\W")


class _FieldTypes(TypedDict, total=False):
    """Types of the fields that PEFT uses without a check."""

    r: int | None
    num_heads: int | None
    lora_alpha: int | float | None
    init_gamma: int | float | None
    rank_pattern: dict[str, int] | None
    alpha_pattern: dict[str, int | float] | None
    layers_to_transform: int | list[int] | None
    trainable_token_indices: list[int] | dict[str, list[int]] | None
    target_modules: str | list[str] | None
    exclude_modules: str | list[str] | None
    modules_to_save: str | list[str] | None
    layers_pattern: str | list[str] | None
    tasks: str | list[str] | None
    base_model_name_or_path: str | None
    revision: str | None


def read_config(path: Path) -> RLoraConfig:
    """
    Read the configuration of an R-LoRA adapter.

    Args:
        path (`Path`): The file.

    Returns:
        [`RLoraConfig`]: The configuration. Unknown fields are left out, with a warning.

    Raises:
        AdapterCheckError: If the file is not such a configuration, names code to import, or has a value out of range.
    """
    data = _read(path, "RLORA", "Load it with `peft.PeftModel.from_pretrained`, or name an R-LoRA adapter.")

    names = {field.name for field in fields(RLoraConfig)}
    unknown = sorted(set(data) - names - {"runtime_config"})  # which PEFT drops too
    if unknown:
        warnings.warn(
            f"{path} has unknown fields, which are ignored: {shorten(', '.join(unknown), 200)}. It was written by a "
            "newer version; update rlora_trl and peft if results differ.",
            stacklevel=3,
        )

    try:
        return RLoraConfig(**{name: value for name, value in data.items() if name in names})
    # Values of unexpected types raise many kinds of errors.
    except Exception as error:
        raise AdapterCheckError(
            f"{path} is not a valid configuration: {shorten(str(error), 400)} Save the adapter again."
        ) from error


def read_lora_config(path: Path) -> Mapping[str, Any]:
    """
    Read the configuration of a plain LoRA adapter, such as an export.

    Args:
        path (`Path`): The file.

    Returns:
        `Mapping[str, Any]`: The fields.

    Raises:
        AdapterCheckError: If the file is not such a configuration, names code to import, or has a value out of range.
    """
    data = _read(path, "LORA", "Export it again.")
    # PEFT imports the module named there.
    if data.get("megatron_config") or data.get("megatron_core") not in (None, "megatron.core"):
        raise AdapterCheckError(
            f"{path} sets `megatron_config` or `megatron_core`, which name code to import. Export it again."
        )
    return data


def _read(path: Path, method: str, remedy: str) -> dict[str, Any]:
    data = read_json(path, limit=CONFIG_LIMIT)
    if not isinstance(data, dict):
        raise AdapterCheckError(
            f"{path} holds a {type(data).__name__}, and a configuration must be a JSON object. Save the adapter again."
        )
    if data.get("peft_type") != method:
        raise AdapterCheckError(
            f"{path} has `peft_type` {shorten(data.get('peft_type'))}, and {method} is expected. {remedy}"
        )
    try:
        _check_auto_mapping(data.get("auto_mapping"))
        _check_types(data)
        _check_bounds(data)
        _check_patterns(data)
    except AdapterCheckError as error:
        raise AdapterCheckError(f"{path}: {error}") from error
    return data


def _check_auto_mapping(mapping: Any) -> None:
    if mapping is None:
        return
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if not isinstance(library, str) or not _LIBRARY.fullmatch(library) or not str(name).isidentifier():
        raise AdapterCheckError(
            f"`auto_mapping` is {shorten(mapping)}, and PEFT would import what it names; only classes of transformers "
            "are accepted. Set `task_type` instead, and save the adapter again."
        )


def _check_types(data: Mapping[str, Any]) -> None:
    for name, accepted in _FieldTypes.__annotations__.items():
        value = data.get(name)
        try:
            validate_typed_dict(_FieldTypes, {name: value})  # type: ignore[type-var]
        except StrictDataclassError as error:
            raise AdapterCheckError(
                f"`{name}` must be of type {accepted}, got {shorten(value)}. Correct it, or save the adapter again."
            ) from error
        if isinstance(value, list | dict) and len(value) > _MAX_ITEMS and name != "trainable_token_indices":
            raise AdapterCheckError(f"`{name}` has {len(value)} entries, more than {_MAX_ITEMS}. Shorten it.")


def _check_bounds(data: Mapping[str, Any]) -> None:
    for name, (least, most) in _BOUNDS.items():
        for number in _leaves(data.get(name)):
            if not least <= number <= most:
                raise AdapterCheckError(
                    f"`{name}` must be from {least:.10g} to {most:.10g}, got {shorten(number)}. Correct it, or save "
                    "the adapter again."
                )

    for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "tasks"):
        is_expression = isinstance(data.get(name), str) and name in ("target_modules", "exclude_modules")
        for text in _leaves(data.get(name)):
            if not text or (len(text) > _MAX_TEXT and not is_expression):
                raise AdapterCheckError(
                    f"`{name}` must have names of 1 to {_MAX_TEXT} characters, got {len(text)}: {shorten(text)}. "
                    "Correct it, or save the adapter again."
                )
    for name in ("base_model_name_or_path", "revision"):
        text = data.get(name) or ""
        if len(text) > _MAX_TEXT or not text.isprintable():
            raise AdapterCheckError(
                f"`{name}` must be printable text of at most {_MAX_TEXT} characters, got {shorten(text)}. Correct it."
            )


def _leaves(value: Any) -> Iterator[Any]:
    """All values of a field, which may hold one value, a list or an object of values, or null."""
    if isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    elif value is not None:
        yield value


def _check_patterns(data: Mapping[str, Any]) -> None:
    # A string is a regular expression, a list has plain names.
    for name in ("target_modules", "exclude_modules"):
        if isinstance(data.get(name), str):
            check_pattern(data[name], name)

    # PEFT takes these for regular expressions in any case.
    texts = {name: list(_leaves(data.get(name))) for name in ("modules_to_save", "layers_pattern")}
    texts |= {name: list(data.get(name) or ()) for name in ("rank_pattern", "alpha_pattern")}
    for name, patterns in texts.items():
        for pattern in patterns:
            if len(pattern) > _MAX_TEXT or not _PLAIN_NAME.fullmatch(pattern):
                check_pattern(pattern, name, _MAX_INNER_REPEATS)


def check_pattern(pattern: str, field: str, max_repeats: int = _MAX_REPEATS) -> None:
    """
    Check that a regular expression is valid, and that matching it takes a bounded time.

    Refused are nested repeats, such as `(a+)+`, which take exponential time; more than `max_repeats` repeats in a row,
    which take that power of the length of a name; and many choices in a row (optional characters, or alternatives that
    begin alike), each of which doubles the time.

    Args:
        pattern (`str`): The expression.
        field (`str`): Name of the field, for messages.
        max_repeats (`int`, *optional*, defaults to `4`): Maximum number of repeats in a row.

    Raises:
        AdapterCheckError: If the expression is refused.
    """
    quoted = f"`{field}` of the adapter's configuration has the regular expression {shorten(pattern)}"
    if len(pattern) > _MAX_PATTERN:
        raise AdapterCheckError(
            f"{quoted} of {len(pattern)} characters, more than {_MAX_PATTERN}. List names instead."
        )

    try:
        re.compile(pattern)
        repeats, choices, *_ = _cost(iter(_TOKEN.findall(pattern)))
    except (re.error, RecursionError, OverflowError) as error:
        raise AdapterCheckError(f"{quoted}, which is not valid ({error}). Correct it, or list names.") from error

    problem = None
    # Verbose expressions skip spaces and comments, so they are misread above.
    if math.isinf(repeats) or _VERBOSE.search(pattern):
        problem = "repeats within repeats"
    elif repeats > max_repeats:
        problem = f"{repeats:g} repeats in a row"
    elif choices > _MAX_CHOICES:
        problem = "many choices in a row"
    if problem:
        raise AdapterCheckError(f"{quoted} with {problem}, which may take exponential time. List names instead.")


def _cost(tokens: Iterator[str]) -> tuple[float, float, float, bool]:
    """
    Cost of matching a group, whose tokens are taken up to its closing bracket.

    Returns:
        Repeats in a row (infinite where they are nested) and choices in bits, of the branch with the most; the choice
        between branches in bits; and whether what the group matches varies in length.
    """
    repeats, choices = [0.0], [0.0]  # by branch
    starts: list[str | None] = [None]  # token that each branch begins with; "" if its first item is optional
    varies = False
    item: bool | None = None  # whether the item before varies in length; None if there is none to repeat
    for token in tokens:
        if token == ")":
            break
        if token == "|":
            repeats.append(0.0)
            choices.append(0.0)
            starts.append(None)
            item = None
        elif item is not None and (token in ("*", "+", "?") or (token[0] == "{" and len(token) > 2)):
            low, high = _bounds(token)
            # A repeat of an item that varies takes exponential time.
            if math.isinf(high) or (item and high > 1):
                repeats[-1] += math.inf if item else 1
            else:
                choices[-1] += math.log2(high - low + 1)
            if low == 0 and repeats[-1] + choices[-1] <= 1:
                starts[-1] = ""
            varies |= low != high
            item = None
        elif item is not None or token not in ("?", "+"):  # which make the quantifier before lazy or possessive
            starts[-1] = token.lower() if starts[-1] is None else starts[-1]
            item = False
            if token[0] == "(" and token[-1] != ")":
                inner_repeats, inner_choices, overlap, inner_varies = _cost(tokens)
                repeats[-1] += inner_repeats
                # What a lookaround has matched is not matched again.
                if not token.endswith(("=", "!")):
                    choices[-1] += inner_choices + overlap
                    varies |= inner_varies
                    item = inner_varies

    # Branches that begin alike, or with no plain letter, can match at the same place.
    plain = Counter(start for start in starts if start and _LITERAL.fullmatch(start))
    overlap = math.log2(max(plain.values(), default=0) + len(starts) - plain.total())
    return max(repeats), max(choices), overlap, varies or len(starts) > 1


def _bounds(token: str) -> tuple[int, float]:
    """Minimum and maximum number of repeats of a quantifier."""
    if token in ("*", "+", "?"):
        return {"*": (0, math.inf), "+": (1, math.inf), "?": (0, 1)}[token]
    low, comma, high = token.strip("{}").partition(",")
    return int(low or 0), (float(high) if high else math.inf) if comma else int(low or 0)
