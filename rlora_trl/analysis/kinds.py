"""What figures and reports share: layers by kind and depth, selections, and the range of colors."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch


_SMALLEST_SPAN = 0.05  # smaller differences between weights stay pale
# A few strong weights would leave all others pale: colors end at this quantile where the strongest weight is further
# from an equal share than this factor.
_SHOWN_SHARE, _CLIPPED_FROM = 0.95, 1.5


def group_layers(layers: Sequence[str]) -> dict[str, list[tuple[str, int]]]:
    """Depths and indices of layers by kind: "model.layers.3.mlp.up_proj" is of kind "mlp.up_proj", at depth "3"."""
    groups: dict[str, list[tuple[str, int]]] = {}
    for index, name in enumerate(layers):
        match = re.search(r"\.(\d+)\.", name)
        depth, kind = (match[1], name[match.end() :]) if match else ("", name)
        kind = ".".join(part for part in kind.split(".") if not part.isdigit())  # experts share a panel
        groups.setdefault(kind, []).append((depth, index))
    for members in groups.values():
        members.sort(key=lambda member: (int(member[0] or 0), member[1]))
    return dict(sorted(groups.items()))


def evenly_spaced(names: list[str], count: int) -> list[str]:
    """At most `count` of the names, the first and the last among them."""
    if len(names) <= count:
        return names
    return [names[index * (len(names) - 1) // (count - 1)] for index in range(count)]


def color_span(table: torch.Tensor) -> tuple[float, bool]:
    """
    The distance from an equal share at which colors end, and whether weights lie outside.

    Args:
        table (`torch.Tensor` of shape `[..., N]`): Head weights.
    """
    distances = (table - 1.0 / table.shape[-1]).abs().flatten().sort().values
    largest = max(_SMALLEST_SPAN, float(distances[-1]))
    span = max(_SMALLEST_SPAN, float(distances[int(_SHOWN_SHARE * (len(distances) - 1))]))
    clipped = largest > _CLIPPED_FROM * span
    return (span if clipped else largest), clipped
