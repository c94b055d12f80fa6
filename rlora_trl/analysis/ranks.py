"""How many directions of a layer an adapter changes: the effective rank of its delta.

With singular values s_i of the delta and p_i = s_i / sum(s), the effective rank is exp(-sum_i p_i ln p_i) (Roy and
Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, section 2). It is between 1 and
the rank: 1 if one direction has all the weight, the rank if all have the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from ..tuner.config import SAFETENSORS_NAME


# Names of tensors in a file of an adapter.
_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.rlora_adapters\.(?P<name>A|B|A0|B0)")
# Wider factors are not measured: a file may claim any rank, and singular values take its cube.
_MAX_WIDTH = 1024
# Deltas this much smaller than their factors are rounding errors of an adapter that has not been trained.
_NOTHING = 1e-6


def effective_ranks(
    folder: str | Path, head_weights: Mapping[str, torch.Tensor] | None = None
) -> dict[str, tuple[float, int]]:
    """
    The effective rank of the delta of each layer, under fixed head weights.

    Args:
        folder (`str` or `Path`):
            Folder of a saved adapter, or its safetensors file. One layer at a time is read.
        head_weights (`Mapping[str, torch.Tensor]`, *optional*):
            Weights `[N]` by name of the layer, such as [`HeadWeights.mean`]. Layers without any get equal weights.

    Returns:
        `dict[str, tuple[float, int]]`: By name of the layer in the base model the effective rank, and the largest that
        its tensors allow. A delta of zero has an effective rank of 0; of experts, it is their mean. Layers whose
        factors have more than 1,024 columns are left out.

    Raises:
        FileNotFoundError: If the folder or file does not exist.
        ValueError: If a layer lacks A or B.
    """
    path = Path(folder)
    path = path / SAFETENSORS_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Pass the folder of a saved adapter, or its {SAFETENSORS_NAME}."
        )

    ranks = {}
    with safe_open(path, framework="pt") as file:
        keys: dict[str, dict[str, str]] = {}
        for key in file.keys():
            if match := _TENSOR.fullmatch(key):
                keys.setdefault(match["layer"], {})[match["name"]] = key
        for layer, names in keys.items():
            if not {"A", "B"} <= names.keys():
                raise ValueError(
                    f"{path} has {', '.join(names.values())} and not both A and B. Save the adapter again."
                )
            if _width({name: file.get_slice(key).get_shape() for name, key in names.items()}) > _MAX_WIDTH:
                continue
            tensors = {name: file.get_tensor(key).double() for name, key in names.items()}
            weights = None if head_weights is None else head_weights.get(layer)
            ranks[layer] = effective_rank(*delta_factors(tensors, weights))
    return ranks


def _width(shapes: Mapping[str, list[int]]) -> int:
    """The columns of the factors, from the shapes of the tensors of a layer."""
    share_a = len(shapes["A"]) < len(shapes["B"])
    return shapes["A"][-2] * (1 if share_a else shapes["B"][-3]) * (2 if "A0" in shapes else 1)


def delta_factors(
    tensors: Mapping[str, torch.Tensor], weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Factor the delta of a layer under fixed head weights, without its scaling, as `ups @ downs`.

    With an anchor, it is Bw (A - A0) + (Bw - B0) A0, where Bw is the weighted sum of the heads (docs/method.md).

    Args:
        tensors (`Mapping[str, torch.Tensor]`):
            A `[r, d_in]` or `[N, r, d_in]`, B `[N, d_out, r]`, and A0 and B0 if there is an anchor; of experts with E
            as a first dimension.
        weights (`torch.Tensor` of shape `[N]`, or `[E, N]` of experts, *optional*): Defaults to equal ones.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Factors `[..., d_out, k]` and `[..., k, d_in]`.
    """
    A, B = tensors["A"], tensors["B"]
    A0, B0 = tensors.get("A0"), tensors.get("B0")
    heads = B.shape[-3]
    weights = torch.full((heads,), 1.0 / heads) if weights is None else weights
    weighted = weights.to(B)[..., None, None] * B  # [..., N, d_out, r]

    if A.ndim < B.ndim:
        downs, ups = [A], [weighted.sum(-3)]
        if A0 is not None and B0 is not None:
            downs, ups = [A - A0, A0], [ups[0], ups[0] - B0]
    else:
        downs, ups = list(A.unbind(-3)), list(weighted.unbind(-3))
        if A0 is not None and B0 is not None:
            downs += A0.unbind(-3)
            ups += (weighted - B0 / heads).unbind(-3)
            downs[:heads] = (A - A0).unbind(-3)
    return torch.cat(ups, dim=-1), torch.cat(downs, dim=-2)


def effective_rank(ups: torch.Tensor, downs: torch.Tensor) -> tuple[float, int]:
    """
    The effective rank of `ups @ downs`, and the largest that the shapes allow.

    Args:
        ups (`torch.Tensor` of shape `[..., d_out, k]`), downs (`torch.Tensor` of shape `[..., k, d_in]`):
            The factors, in float64 or float32. Of several products, the mean is returned.
    """
    # The product has the singular values of a small matrix [k, k]: Q has orthonormal columns.
    small = torch.linalg.qr(ups).R @ torch.linalg.qr(downs.mT).R.mT
    values = torch.linalg.svdvals(small)  # [..., k]
    bound = torch.linalg.matrix_norm(ups) * torch.linalg.matrix_norm(downs)
    values = torch.where(values > _NOTHING * bound[..., None], values, 0.0)

    shares = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    ranks = torch.special.entr(shares).sum(-1).exp() * (values.sum(-1) > 0)
    limit = min(ups.shape[-2], ups.shape[-1], downs.shape[-1])
    return float(ranks.mean()), limit
