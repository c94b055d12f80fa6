"""
Writes adapters with routers that decide per token in the packed form, which the layers of `vllm_layers` compute.

vLLM loads two matrices for each layer, `lora_A` and `lora_B`. The packed form uses their places:

    lora_A = [A - A0; R; A0 | header]   [rows, d_in + 8]        lora_B = scaling [B_1 .. B_N, mean B - B0; 0]

The header are eight more columns, whose first row has the numbers of the layer's `SlotLayout`; `lora_B` has one more
row, of zeros. A layer of vLLM without the plugin, and PEFT, refuse matrices of these shapes, rather than compute
something else from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..export.folder import read_layers
from ..export.lora import lora_config, save_lora_config, tensor_names
from ..files.checks import CheckedAdapter
from ..files.layout import WEIGHTS_NAME
from ..kernels.multihead import multihead_delta
from ..kernels.rank_space import mean_of_heads
from ..kernels.slots import SlotLayout, mix_slots
from ..reading import first_few
from ..tuner import MultiHeadAdapter
from ..tuner.layer import RLoraLayer
from ..tuner.selection import adapter_of


TOKEN_ROUTERS = ("softmax", "top_k")
# Columns of the header: this number, which stands for the form, the five of `SlotLayout`, and two of zeros.
HEADER_COLUMNS = 8
_FORM = 77
# bfloat16 holds whole numbers up to this one.
_MAX_NUMBER = 256
_NAME = "default"
_ROWS = 4


def write_packed(checked: CheckedAdapter, output_dir: Path) -> int:
    """
    Write a checked adapter in the packed form, which is exact for all its tasks, as its router decides per token.

    Args:
        checked ([`CheckedAdapter`]): The adapter, with `router="softmax"` or `"top_k"`.
        output_dir (`Path`): The folder to create, with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        `int`: The rank that a server must allow: max(2r + N, (N + 1) r) with a shared A and an anchor.

    Raises:
        ValueError: If the router decides otherwise, the adapter has trained more than its heads, adapts experts or the
            output head, or is too large for the form; or if the written tensors differ from the adapter.
    """
    config = checked.config
    if config.router not in TOKEN_ROUTERS:
        raise ValueError(
            f"The packed form is for `router` {' or '.join(map(repr, TOKEN_ROUTERS))}, got {config.router!r}, whose "
            "tasks are exactly plain LoRA. Use `export_folder`."
        )
    layers = read_layers(checked)
    heads = [name for name in layers if name.rpartition(".")[2] in ("lm_head", "embed_tokens")]
    if heads:
        raise ValueError(
            f"The adapter adapts {first_few(heads)}, which vLLM computes outside of its linear layers: the plugin "
            "can't serve it. Export it with `export_lora`, as an approximation."
        )

    names = tensor_names(layers)
    tensors: dict[str, torch.Tensor] = {}
    rank = 0
    for name, layer in layers.items():
        down, up, layout = pack_layer(adapter_of(layer, _NAME), name)
        rank = max(rank, layout.down_rows, layout.up_columns)
        tensors |= dict(zip(names[name], (down, up), strict=True))

    output_dir.mkdir()
    save_lora_config(lora_config(config, rank, list(layers), [], False), output_dir)
    save_file(tensors, output_dir / WEIGHTS_NAME, metadata={"format": "pt"})
    _check_written(load_file(output_dir / WEIGHTS_NAME), layers)
    return rank


def pack_layer(adapter: MultiHeadAdapter, name: str) -> tuple[torch.Tensor, torch.Tensor, SlotLayout]:
    """
    The two matrices of a layer in the packed form.

    Args:
        adapter ([`MultiHeadAdapter`]): The adapter of the layer, with logits for each token.
        name (`str`): The layer, for messages.

    Returns:
        `tuple`: `lora_A` `[rows, d_in + 8]` and `lora_B` `[d_out + 1, columns]` in float32, and their
        [`SlotLayout`].

    Raises:
        ValueError: If a size is too large for the header.
    """
    A, B, R = (_wide(tensor) for tensor in (adapter.A, adapter.B, adapter.router))
    columns = adapter.layout()
    num_heads, r = columns.num_heads, columns.r
    layout = SlotLayout(num_heads, r, columns.top_k, int(columns.anchored), int(columns.shared))
    if max(layout) > _MAX_NUMBER:
        raise ValueError(
            f"{name} has {num_heads} heads of rank {r}, and the packed form has at most {_MAX_NUMBER} of each. Export "
            "the adapter with `export_lora`, as an approximation."
        )

    downs, ups = [A.flatten(0, -2), R], list(B)
    if adapter.A0 is not None:
        A0, B0 = _wide(adapter.A0), _wide(adapter.B0)
        downs = [(A - A0).flatten(0, -2), R, A0.flatten(0, -2)]
        ups += [mean_of_heads(B) - B0] if adapter.share_a else list((B - B0) / num_heads)
    header = torch.zeros(layout.down_rows, HEADER_COLUMNS, dtype=torch.float64)
    header[0, : 1 + len(layout)] = torch.tensor([_FORM, *layout], dtype=torch.float64)
    down = torch.cat([torch.cat(downs), header], dim=1)  # [rows, d_in + 8]
    up = adapter.scaling * torch.cat(ups, dim=1)
    up = torch.cat([up, up.new_zeros(1, layout.up_columns)])  # [d_out + 1, columns]
    return down.float().contiguous(), up.float().contiguous(), layout


def _wide(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor.detach().to("cpu", torch.float64)


def is_packed(down: torch.Tensor, d_in: int) -> bool:
    """Whether `lora_A` of a layer with `d_in` inputs is in the packed form."""
    return down.shape[1] == d_in + HEADER_COLUMNS


def unpack_layer(down: torch.Tensor, up: torch.Tensor, d_in: int) -> tuple[torch.Tensor, torch.Tensor, SlotLayout]:
    """
    The two matrices of a layer and their [`SlotLayout`]; those of plain LoRA are returned as they are.

    Args:
        down (`torch.Tensor` of shape `[rows, d_in + 8]` or `[rank, d_in]`): `lora_A`.
        up (`torch.Tensor` of shape `[d_out + 1, columns]` or `[d_out, rank]`): `lora_B`.
        d_in (`int`): Inputs of the layer.

    Raises:
        ValueError: If the header and the shapes disagree.
    """
    if not is_packed(down, d_in):
        return down, up, SlotLayout()
    form, *numbers = (round(number) for number in down[0, d_in : d_in + 6].tolist())
    layout = SlotLayout(*numbers)
    known = form == _FORM and min(layout) >= 0 and max(layout[3:]) <= 1 and layout.num_heads > 0 and layout.r > 0
    if not known or (down.shape[0], up.shape[1]) != (layout.down_rows, layout.up_columns):
        raise ValueError(
            f"`lora_A` and `lora_B` have the shapes {tuple(down.shape)} and {tuple(up.shape)} and the header "
            f"{[form, *numbers]}, which is not the packed form of R-LoRA. Remove the adapter from the cache of the "
            "plugin."
        )
    return down[:, :d_in], up[:-1], layout


@torch.no_grad()
def _check_written(tensors: Mapping[str, torch.Tensor], layers: Mapping[str, RLoraLayer]) -> None:
    """Compare the written tensors with the adapter, on random tokens."""
    names = tensor_names(layers)
    for name, layer in layers.items():
        adapter = adapter_of(layer, _NAME)
        generator = torch.Generator().manual_seed(layer.in_features)
        x = torch.randn(_ROWS, layer.in_features, generator=generator, dtype=torch.float64)
        down, up = (tensors[part] for part in names[name])
        down, up, layout = unpack_layer(down, up, layer.in_features)
        down, up = down.double(), up.double()
        u = torch.nn.functional.pad(x @ down.T, (0, max(0, up.shape[1] - down.shape[0])))
        layouts = torch.tensor([[layout]], dtype=torch.int32)
        z = mix_slots(u.unsqueeze(0), torch.zeros(_ROWS, dtype=torch.long), layouts)[0, :, : up.shape[1]]

        expected = _delta(adapter, x, layout.top_k)
        # Both factors were rounded to float32 once, and so were the logits.
        terms = z.abs() @ up.abs().T + (x.abs() @ down.abs().T).amax(1, keepdim=True) * up.abs().sum(1)
        difference = ((z @ up.T) - expected).abs()
        if not bool((difference <= 1e-5 * terms + 1e-12).all()):
            raise ValueError(
                f"The packed form differs from the adapter: in {name} its delta is off by {difference.max():.2g}. "
                "Nothing was written; please report it."
            )


def _delta(adapter: MultiHeadAdapter, x: torch.Tensor, top_k: int) -> torch.Tensor:
    """The delta of tokens in float64."""
    A, B, R = _wide(adapter.A), _wide(adapter.B), _wide(adapter.router)
    A0, B0 = (None if tensor is None else _wide(tensor) for tensor in (adapter.A0, adapter.B0))
    return multihead_delta(x, A, B, R, A0, B0, scaling=adapter.scaling, top_k=top_k)
