"""
Which layers the patterns of a configuration select.

The user's own configuration may have regular expressions, which PEFT matches. Those in a file come from a stranger,
and an expression can take exponential time, so Python's `re` never runs them. Names are compared as text; in place of
an expression, the file says which layers it has, or RE2 matches it, in time linear in the length of the name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

from peft.tuners.tuners_utils import check_target_module_exists

from ..reading import AdapterCheckError, shorten
from .config import RLoraConfig
from .layer_names import endings, is_plain, value_for


ALL_LINEAR = "all-linear"
_Value = TypeVar("_Value")

# An expression of more characters, or a longer program of RE2, is no list of layers.
_MAX_LENGTH, _MAX_PROGRAM, _MAX_EXPRESSIONS = 1000, 10_000, 50
# RE2 takes at most milliseconds for a name; this bounds the number of names and expressions.
_MAX_SECONDS = 1.0
# PEFT goes through all names in these fields for each module of a model.
_MAX_NAMES = 100


def settle_patterns(
    config: RLoraConfig, names: Sequence[str], stored: Mapping[str, int] | None = None, source: str = "the adapter"
) -> None:
    """
    Replace the regular expressions of a loaded configuration by names of layers, and leave out names without a layer.

    Args:
        config ([`RLoraConfig`]): A configuration from a file; its fields are replaced.
        names (`Sequence[str]`): Names of all modules of the model.
        stored (`Mapping[str, int]`, *optional*): Ranks of the layers in the adapter's file, if it is known.
        source (`str`, *optional*): Where the configuration comes from, for messages.

    Raises:
        AdapterCheckError: If a field has an expression that can't be replaced.
    """
    fields = ("target_parameters", "modules_to_save", "layers_pattern")
    names_only = {field: getattr(config, field) for field in fields}
    refuse_expressions(names_only, source)
    matcher = LinearMatcher(source)

    # Layers. `layers_to_transform` selects among them still.
    layers: Collection[str] | None = stored if stored and set(names).issuperset(stored) else None
    changed: dict[str, Any] = {}
    for field in ("target_modules", "exclude_modules"):
        targets = getattr(config, field)
        if _needs_settling(targets):
            if layers is None:
                changed[field] = set(filter(matcher.selection(targets, field), names))
            else:
                changed |= {"target_modules": set(layers), "exclude_modules": None}
    for field, value in changed.items():
        setattr(config, field, value)

    # Ranks and alphas.
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field)
        if not patterns or not (len(patterns) > _MAX_NAMES or any(not is_plain(pattern) for pattern in patterns)):
            continue
        if layers is None:
            layers = [name for name in names if check_target_module_exists(config, name)]
        if field == "rank_pattern" and stored and set(layers) <= set(stored):
            values = {name: stored[name] for name in layers if stored[name] != config.r}
        else:
            values = matcher.values(patterns, layers, field)
        setattr(config, field, values)


def make_portable(config: RLoraConfig, layers: Sequence[str]) -> None:
    """
    Replace patterns of the user's own configuration that would mean something else, or nothing, in its file.

    These are expressions that RE2 does not have, such as look-arounds, and overlapping patterns: the first one that
    matches counts, and PEFT sorts them when it saves a configuration.

    Args:
        config ([`RLoraConfig`]): The configuration; such fields get the names of layers.
        layers (`Sequence[str]`): The layers that it has selected.
    """
    matcher = LinearMatcher("the configuration")
    targets = config.target_modules
    if isinstance(targets, str) and not matcher.can_match(targets):
        config.target_modules = set(layers)  # type: ignore[assignment]
    if isinstance(config.exclude_modules, str) and not matcher.can_match(config.exclude_modules):
        # What is left of it: nothing that the targets select.
        config.target_modules, config.exclude_modules = set(layers), None  # type: ignore[assignment]

    for field, default in (("rank_pattern", config.r), ("alpha_pattern", config.lora_alpha)):
        patterns = getattr(config, field)
        values = {layer: value_for(patterns, layer, default) for layer in layers} if patterns else {}
        sorted_patterns = dict(sorted(patterns.items()))
        portable = all(is_plain(pattern) or matcher.can_match(pattern) for pattern in patterns)
        if not portable or any(value_for(sorted_patterns, layer, default) != values[layer] for layer in values):
            setattr(config, field, {layer: value for layer, value in values.items() if value != default})


def _needs_settling(targets: Any) -> bool:
    if isinstance(targets, str):
        return targets.lower() != ALL_LINEAR
    return targets is not None and len(targets) > _MAX_NAMES


def refuse_expressions(fields: Mapping[str, Any], source: str, limit: int = _MAX_NAMES) -> None:
    """
    Refuse regular expressions in fields that hold names of modules, and too many names.

    Args:
        fields (`Mapping[str, Any]`): A name, or a collection of names, by field.
        source (`str`): Where the fields come from, for messages.
        limit (`int`, *optional*, defaults to `100`): The most names of a field.

    Raises:
        AdapterCheckError: If a field has either.
    """
    for field, value in fields.items():
        value = value or ()
        patterns = [value] if isinstance(value, str) else list(value)
        expressions = [pattern for pattern in patterns if not is_plain(pattern)]
        if expressions:
            raise AdapterCheckError(
                f"`{field}` of {source} has {shorten(expressions[0])}, and must have names of modules: letters, "
                "digits, '.', '_' and '-'. A regular expression from a file is not run. Replace it by names in "
                "adapter_config.json."
            )
        if len(patterns) > limit:
            raise AdapterCheckError(
                f"`{field}` of {source} has {len(patterns)} names, more than {limit}. Name what they end in."
            )


class LinearMatcher:
    """
    Matches patterns of a file within a time limit: names as text, regular expressions by RE2.

    Args:
        source (`str`): Where the patterns come from, for messages.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._expressions = 0
        self._seconds = 0.0

    def selection(self, targets: Any, field: str) -> Callable[[str], bool]:
        """
        The test of `target_modules` or `exclude_modules`.

        Args:
            targets (`str` or `Collection[str]`, *optional*): An expression for whole names, or ends of names.
            field (`str`): Name of the field.

        Returns:
            `Callable[[str], bool]`: Whether a module is selected, by its name.
        """
        if isinstance(targets, str):
            return self.compile(targets, field)
        ends = set(targets or ())
        return lambda name: not ends.isdisjoint(endings(name))

    def can_match(self, pattern: str) -> bool:
        """Whether [`LinearMatcher.compile`] accepts an expression."""
        try:
            self.compile(pattern, "target_modules")
        except AdapterCheckError:
            return False
        return True

    def values(self, patterns: Mapping[str, _Value], layers: Iterable[str], field: str) -> dict[str, _Value]:
        """Values by layer, of the first pattern that matches each; layers without one are left out."""
        order = {pattern: index for index, pattern in enumerate(patterns)}
        expressions = {
            order[pattern]: self.compile(rf"(?:.*\.)?(?:{pattern})", field)
            for pattern in patterns
            if not is_plain(pattern)
        }
        ordered = list(patterns.values())

        values = {}
        for layer in layers:
            matching = [order[end] for end in endings(layer) if end in order]
            first = min(matching, default=len(ordered))
            first = next((index for index, match in expressions.items() if index < first and match(layer)), first)
            if first < len(ordered):
                values[layer] = ordered[first]
        return values

    def compile(self, pattern: str, field: str) -> Callable[[str], bool]:
        """
        The test of a regular expression, which must match a whole name.

        Args:
            pattern (`str`): The expression.
            field (`str`): Name of its field, for messages.

        Returns:
            `Callable[[str], bool]`: The test, which raises `AdapterCheckError` when the time is over.

        Raises:
            AdapterCheckError: If RE2 can't match the expression, or it is too long.
        """
        import re2  # only few adapters have expressions

        self._expressions += 1
        problem, compiled = None, None
        if len(pattern) > _MAX_LENGTH:
            problem = f"has {len(pattern)} characters, more than {_MAX_LENGTH}"
        elif self._expressions > _MAX_EXPRESSIONS:
            problem = f"is one of more than {_MAX_EXPRESSIONS}"
        else:
            options = re2.Options()
            options.log_errors, options.never_capture = False, True
            try:
                compiled = re2.compile(pattern.encode(), options)
            except (re2.error, UnicodeEncodeError) as error:
                reason = error.args[0] if isinstance(error, re2.error) else b"half of a surrogate pair"
                problem = f"is not valid, or can't be matched in linear time ({shorten(reason, 100)})"
            if compiled is not None and compiled.programsize > _MAX_PROGRAM:
                problem = "is too large"
        if compiled is None or problem:
            raise AdapterCheckError(
                f"The regular expression {shorten(pattern)} in `{field}` of {self.source} {problem}. List names of "
                "layers in adapter_config.json instead, or load the adapter together with its weights by "
                "`PeftModel.from_pretrained`, which takes the layers from these."
            )

        def matches(name: str) -> bool:
            start = time.perf_counter()
            matched = compiled.fullmatch(name.encode("utf-8", "replace")) is not None
            self._seconds += time.perf_counter() - start
            if self._seconds > _MAX_SECONDS:
                raise AdapterCheckError(
                    f"The regular expressions in `{field}` of {self.source} take more than {_MAX_SECONDS:g} s to "
                    "match. List names of layers instead."
                )
            return matched

        return matches


def unselected(config: RLoraConfig, layers: Iterable[str], source: str) -> str | None:
    """
    The first layer of a file that its configuration does not select, as far as text and RE2 can tell.

    Args:
        config ([`RLoraConfig`]): The configuration.
        layers (`Iterable[str]`): The layers that have an adapter in the file.
        source (`str`): Where the configuration comes from, for messages.

    Returns:
        `str`, or `None` if it selects all, or has an expression that RE2 can't match.
    """
    targets = config.target_modules
    if targets is None or (isinstance(targets, str) and targets.lower() == ALL_LINEAR):
        return None
    matcher = LinearMatcher(source)
    try:
        of_modules = matcher.selection(targets, "target_modules")
        of_parameters = matcher.selection(config.target_parameters, "target_parameters")
        excluded = matcher.selection(config.exclude_modules, "exclude_modules")
        has_index = _index_test(config)
        return next(
            (
                layer
                for layer in layers
                if not (of_modules(layer) or of_parameters(layer)) or excluded(layer) or not has_index(layer)
            ),
            None,
        )
    except AdapterCheckError:  # the layers in the file replace such an expression
        return None


def _index_test(config: RLoraConfig) -> Callable[[str], bool]:
    """The test whether a layer has one of the indices in `layers_to_transform`."""
    indices = config.layers_to_transform
    if indices is None:
        return lambda layer: True
    only_indices = SimpleNamespace(
        layers_to_transform=indices if isinstance(indices, int) else frozenset(indices),
        layers_pattern=config.layers_pattern,
    )

    def has_index(layer: str) -> bool:
        only_indices.target_modules = {layer}
        return bool(check_target_module_exists(only_indices, layer))

    return has_index
