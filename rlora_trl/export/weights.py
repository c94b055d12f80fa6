"""The head weights that an adapter is exported under: its own, recorded in training, measured, or the caller's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ..analysis.measuring import head_weights_by_layer
from ..files.head_weights import HeadWeights
from ..files.record import find_record
from ..reading import first_few, printable, shorten
from ..tuner import RLoraConfig
from ..tuner.layer import RLoraLayer
from ..tuner.selection import check_weights


# The same for all layers, or by layer.
GivenWeights: TypeAlias = Sequence[float] | torch.Tensor | Mapping[str, Sequence[float] | torch.Tensor]
Routing: TypeAlias = HeadWeights | GivenWeights


@dataclass(frozen=True)
class ExportWeights:
    """
    The head weights of an export.

    Args:
        by_layer (`dict[str, torch.Tensor]`): Weights `[N]` by name of the layer, in float64; `[E, N]` where experts
            have their own.
        exact (`bool`): The adapter uses these weights for every token too.
        origin (`str`): Where they come from, for the report and the card.
    """

    by_layer: dict[str, torch.Tensor]
    exact: bool
    origin: str


def choose_head_weights(
    layers: Mapping[str, RLoraLayer],
    adapter_name: str,
    config: RLoraConfig,
    *,
    task: str | None = None,
    routing: Routing | None = None,
    measure: Callable[[], HeadWeights] | None = None,
    token: str | bool | None = None,
) -> ExportWeights:
    """
    Choose the head weights of an export and check them against the layers.

    Args:
        layers (`Mapping[str, RLoraLayer]`): The adapted layers by name.
        adapter_name (`str`), config ([`RLoraConfig`]): The adapter.
        task (`str`, *optional*): The task to export it for.
        routing ([`HeadWeights`], weights, or weights by layer, *optional*): The caller's choice, which comes first.
        measure (`Callable`, *optional*): Measures head weights on the caller's data, the last resort.
        token (`str` or `bool`, *optional*): For the record of an adapter on the Hub.

    Raises:
        ValueError: If no head weights are known, they are invalid, or they belong to other layers.
    """
    uniform = config.num_heads == 1 or config.router == "uniform"
    by_task = config.router == "task"
    # Measuring an adapter whose head weights don't depend on the token gives its own, rounded.
    if isinstance(routing, HeadWeights) and (uniform or (by_task and task is not None)):
        routing = None

    if isinstance(routing, HeadWeights):
        weights = _mean_over_tokens(routing, task, "measured")
    elif routing is not None:
        weights = _given(routing, layers, config.num_heads)
    elif uniform:
        equal = torch.full((config.num_heads,), 1 / config.num_heads, dtype=torch.float64)
        weights = ExportWeights(dict.fromkeys(layers, equal), True, "equal, as in the adapter")
    elif by_task:
        task = _only_task(config) if task is None else task
        origin = f"those learned for the task `{printable(task)}`"
        weights = ExportWeights(head_weights_by_layer(layers, adapter_name, task), True, origin)
    else:
        weights = _recorded_or_measured(config, task, measure, token)
    return _match_layers(weights, layers, adapter_name)


def _given(routing: GivenWeights, layers: Mapping[str, RLoraLayer], num_heads: int) -> ExportWeights:
    """The caller's head weights, in double precision (0.3, not the nearest float32)."""
    if isinstance(routing, Mapping):
        by_layer = {name: check_weights(_double(values), num_heads, f" of {name}") for name, values in routing.items()}
        return ExportWeights(by_layer, False, "given, by layer")
    weights = check_weights(_double(routing), num_heads)
    origin = f"given, {[round(weight, 4) for weight in weights.tolist()]}"
    return ExportWeights(dict.fromkeys(layers, weights), False, origin)


def _double(weights: Sequence[float] | torch.Tensor) -> torch.Tensor:
    return weights if isinstance(weights, torch.Tensor) else torch.tensor(list(weights), dtype=torch.float64)


def _only_task(config: RLoraConfig) -> str:
    tasks = config.tasks or []
    if len(tasks) != 1:
        raise ValueError(
            f"The adapter has `router='task'` and learned head weights for each of {first_few(map(repr, tasks), 10)}; "
            "got `task=None`. Set `task` to one of these, or give weights in `routing`."
        )
    return tasks[0]


def _recorded_or_measured(
    config: RLoraConfig,
    task: str | None,
    measure: Callable[[], HeadWeights] | None,
    token: str | bool | None,
) -> ExportWeights:
    record = find_record(config, token)
    recorded = None if record is None else record.mixtures
    if recorded is not None and (recorded.weights if task is None else task in recorded.weights):
        return _mean_over_tokens(recorded, task, "measured in training and recorded with the adapter")
    if measure is not None:
        return _mean_over_tokens(measure(), task, "measured on the given data")

    tasks = first_few(map(repr, recorded.weights), 10) if recorded else "none"
    raise ValueError(
        f"The adapter has `router={config.router!r}`, which computes head weights for each token, and no mean weights "
        f"are known{f' for task {shorten(task)}' if task else ''} (recorded: {tasks}). Pass `data={{task: rows}}` and "
        "`tokenizer` to measure them, or `routing`, for example `routing=measure_head_weights(model, tokenizer, "
        "{task: rows})`."
    )


def _mean_over_tokens(measured: HeadWeights, task: str | None, origin: str) -> ExportWeights:
    if task is not None:
        return ExportWeights(measured.for_task(task), False, f"the mean over the tokens of the task, {origin}")
    tasks = first_few((f"`{name}`" for name in measured.weights), 10)
    mean = f"the mean over the tokens of {tasks}" if len(measured.weights) == 1 else f"the plain mean over {tasks}"
    return ExportWeights(measured.mean(), False, f"{mean}, {origin}")


def _match_layers(weights: ExportWeights, layers: Mapping[str, RLoraLayer], adapter_name: str) -> ExportWeights:
    """The weights with sums of exactly 1 (in a record they are rounded); those of another adapter are refused."""
    missing, unknown = set(layers) - set(weights.by_layer), set(weights.by_layer) - set(layers)
    if missing or unknown:
        raise ValueError(
            f"Head weights must be given for all {len(layers)} layers of the adapter and for no other; missing: "
            f"{first_few(missing) or 'none'}; unknown: {first_few(unknown) or 'none'}. Layers are named like "
            f"{next(iter(layers))!r}."
        )
    by_layer = {
        name: check_weights(weights.by_layer[name], layer.num_heads[adapter_name], f" of {name}", layer.num_experts)
        for name, layer in layers.items()
    }
    return ExportWeights(by_layer, weights.exact, weights.origin)
