"""
Writes the adapters of experts as PEFT's LoRA on parameters (`target_parameters`, peft 0.21).

PEFT keeps the factors of all E experts in one pair of matrices: row e r + j of `lora_A` and column j E + e of `lora_B`
belong to rank j of expert e. Weights of one module have nested wrappers, in the order in which the module defines
them: the first is within all others.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch.nn import functional as F

from ..reading import first_few
from ..tuner.experts import RLoraExpertWeight
from ..tuner.layer import RLoraLayer


def split_layers(layers: Mapping[str, RLoraLayer]) -> tuple[dict[str, RLoraLayer], dict[str, RLoraExpertWeight]]:
    """Linear layers, and weights of experts, by name."""
    experts = {name: layer for name, layer in layers.items() if isinstance(layer, RLoraExpertWeight)}
    return {name: layer for name, layer in layers.items() if name not in experts}, experts


def refuse_mean_weights(layers: Mapping[str, RLoraLayer], exact: bool) -> None:
    """
    Refuse head weights that are means over tokens.

    Args:
        layers (`Mapping[str, RLoraLayer]`): The adapted layers by name.
        exact (`bool`): The adapter uses the head weights of the export for every token.

    Raises:
        ValueError: If they are not exact, and the adapter adapts experts.
    """
    _, experts = split_layers(layers)
    if experts and not exact:
        raise ValueError(
            f"The adapter can't be exported as LoRA: it adapts experts ({first_few(experts, 1)}), and its router "
            "weighs the heads of each expert for each token. Weights for a whole layer do not stand for those of its "
            'experts, whose heads have nothing in common. Export adapters with `router="task"` or `"uniform"`, or '
            "without experts (`target_parameters=[]`). Nothing was written."
        )


def peft_names(experts: Collection[str], order: Mapping[str, int]) -> dict[str, str]:
    """
    The modules that PEFT puts around weights of experts.

    Args:
        experts (`Collection[str]`): Names of the weights, such as "model.layers.0.mlp.experts.down_proj".
        order (`Mapping[str, int]`): Place of each in its module.

    Returns:
        `dict[str, str]`: Names of PEFT's modules by name of the weight.
    """
    names: dict[str, str] = {}
    for module in dict.fromkeys(name.rpartition(".")[0] for name in experts):
        inside = sorted((name for name in experts if name.rpartition(".")[0] == module), key=order.__getitem__)
        for depth, name in enumerate(reversed(inside)):
            names[name] = module + ".base_layer" * depth
    return names


def place_in_module(layer: RLoraExpertWeight) -> int:
    """The place of a weight among the parameters of its module."""
    return list(layer.get_base_layer()._parameters).index(layer.parameter_name)


def _swapped(layer: RLoraExpertWeight) -> bool:
    """Whether PEFT takes the outputs of a weight for its inputs: without that attribute it expects outputs first."""
    return layer.transposed and not getattr(layer.get_base_layer(), "is_transposed", False)


def pack(
    down: torch.Tensor, up: torch.Tensor, rank: int, layer: RLoraExpertWeight
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The matrices of PEFT's file.

    Args:
        down (`torch.Tensor` of shape `[E, k, d_in]`), up (`torch.Tensor` of shape `[E, d_out, k]`): Factors of the
            experts' deltas.
        rank (`int`): Rank to pad to with zeros.
        layer ([`RLoraExpertWeight`]): The layer.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `lora_A` `[rank E, d_in]` and `lora_B` `[d_out, rank E]`; with `d_in` and
        `d_out` exchanged where PEFT does so.
    """
    down, up = (up.mT, down.mT) if _swapped(layer) else (down, up)
    down = F.pad(down, (0, 0, 0, rank - down.shape[1]))
    up = F.pad(up, (0, rank - up.shape[2]))
    # [E, rank, d_in] to rows, and [E, d_out, rank] to columns with the expert last.
    return down.reshape(-1, down.shape[2]), up.permute(1, 2, 0).reshape(up.shape[1], -1)


def unpack(A: torch.Tensor, B: torch.Tensor, layer: RLoraExpertWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors `[E, k, d_in]` and `[E, d_out, k]` of the matrices of PEFT's file; see [`pack`]."""
    down = A.reshape(layer.num_experts, -1, A.shape[1])
    up = B.reshape(B.shape[0], -1, layer.num_experts).permute(2, 0, 1)
    return (up.mT, down.mT) if _swapped(layer) else (down, up)
