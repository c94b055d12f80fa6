"""Launchers of the Triton kernels: each has the arguments and results of its torch twin in `rank_space.py`.

Imported only where Triton is.
"""

from functools import lru_cache
from typing import Any

import torch
import triton

from . import triton_kernels as kernels
from .dropout import mask_parameters
from .rank_space import Layout


# Older versions launch a compiled kernel without the constants that it was compiled for.
_TAKES_CONSTANTS = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
# Tokens of one program of the kernels that only mix. The tiles are a few registers wide, so that this only sets how
# many programs there are.
_BLOCK_T = 64
# Elements of one program that copies weights: of a row of A, and of a head.
_BLOCK_D = 1024
_BLOCK_W = 256
# Rows of partial sums that are added up at a time.
_BLOCK_S = 128


class _Variant:
    """
    A kernel with its constants.

    Compiled kernels are kept and launched directly, with addresses in place of tensors: that costs the host a third of
    what Triton's own look-up takes, which counts where steps are short.

    Args:
        kernel: The jitted function, whose parameters are tensors, then numbers that it is not specialised on, then
            constants.
        constants (`tuple`): The latter.
    """

    def __init__(self, kernel: Any, constants: tuple) -> None:
        self.kernel, self.constants = kernel, constants
        self.compiled: dict[tuple, Any] = {}
        self.passed = constants if _TAKES_CONSTANTS else ()

    def launch(
        self, programs: int, tensors: tuple[torch.Tensor, ...], numbers: tuple = (), aligned: bool = True
    ) -> None:
        """
        Launch a one-dimensional grid.

        Args:
            programs (`int`): Its size.
            tensors (`tuple[torch.Tensor, ...]`), numbers (`tuple`): Arguments in order.
            aligned (`bool`): Whether all tensors are known to start at multiples of 16 bytes, which Triton
                specialises on.
        """
        device = tensors[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self.launch(programs, tensors, numbers, aligned)
        grid = (programs, 1, 1)
        key = (device.index, *[tensor.dtype for tensor in tensors])
        compiled = self.compiled.get(key) if aligned else None
        if compiled is not None:
            compiled[grid](*[tensor.data_ptr() for tensor in tensors], *numbers, *self.passed)
            return None
        compiled = self.kernel[grid](*tensors, *numbers, *self.constants)
        if aligned and compiled is not None:  # the interpreter compiles nothing
            self.compiled[key] = compiled
        return None


def _padding(width: int, used: int) -> int:
    """A size for a tile that covers the columns of zeros."""
    return triton.next_power_of_2(max(width - used, 1))


def _mask_numbers(dropout: float, seed: int | torch.Tensor | None) -> tuple[int, int, int, float]:
    """Keys and threshold of the masks as signed 32-bit integers, which Triton passes as one type; and the scale."""
    if seed is None or dropout <= 0.0:
        return 0, 0, 0, 1.0
    # Keys of a seed in memory are made by the kernel, which needs no synchronisation.
    first, second, threshold = mask_parameters(0 if isinstance(seed, torch.Tensor) else seed, dropout)
    return (
        first - 2**32 if first >= 2**31 else first,
        second - 2**32 if second >= 2**31 else second,
        threshold - 2**32 if threshold >= 2**31 else threshold,
        1.0 / (1.0 - dropout),
    )


def _seed_kind(dropout: float, seed: int | torch.Tensor | None) -> tuple[bool, bool]:
    """Whether anything is dropped, and whether the seed is in memory."""
    dropped = seed is not None and dropout > 0.0
    return dropped, dropped and isinstance(seed, torch.Tensor)


@lru_cache(maxsize=1024)
def _pack_variant(
    d_in: int, d_out: int, rows: int, columns: int, layout: Layout, router: bool
) -> tuple[int, _Variant]:
    """The programs of `pack_kernel`, and the kernel."""
    num_heads, r, routed, anchored, shared, _ = layout
    blocks = triton.cdiv(d_in, _BLOCK_D)
    sizes = (d_in, d_out * r, rows * blocks, blocks, r, num_heads, columns, _padding(columns, layout.z_columns))
    constants = (*sizes, routed, router, anchored, shared, _BLOCK_D, _BLOCK_W)
    return rows * blocks + triton.cdiv(d_out * r, _BLOCK_W), _Variant(kernels.pack_kernel, constants)


@lru_cache(maxsize=1024)
def _mix_variant(
    k: int, z: int, layout: Layout, dropped: bool, seed_in_memory: bool, statistics: bool, masked: bool
) -> _Variant:
    num_heads, r, routed, anchored, shared, top_k = layout
    sizes = (r, triton.next_power_of_2(r), num_heads, triton.next_power_of_2(num_heads))
    kinds = (routed, anchored, shared, top_k if top_k < num_heads else 0)
    flags = (dropped, seed_in_memory, statistics, masked, _BLOCK_T)
    return _Variant(kernels.mix_kernel, (k, z, _padding(z, layout.z_columns), *sizes, *kinds, *flags))


@lru_cache(maxsize=1024)
def _mix_backward_variant(
    k: int, z: int, width: int, layout: Layout, dropped: bool, seed_in_memory: bool, balanced: bool, masked: bool
) -> _Variant:
    num_heads, r, routed, anchored, shared, top_k = layout
    widths = (k, _padding(k, layout.p_columns), z, width, _padding(width, num_heads * r))
    sizes = (r, triton.next_power_of_2(r), num_heads, triton.next_power_of_2(num_heads))
    kinds = (routed, anchored, shared, top_k if top_k < num_heads else 0)
    flags = (dropped, seed_in_memory, balanced, masked, _BLOCK_T)
    return _Variant(kernels.mix_backward_kernel, (*widths, *sizes, *kinds, *flags))


def _aligned(*tensors: torch.Tensor) -> bool:
    """Whether tensors start at multiples of 16 bytes: those that come from outside may be views."""
    return not any(tensor.data_ptr() % 16 for tensor in tensors)


def statistics_rows(tokens: int) -> int:
    """See `rank_space.statistics_rows`: one for each program of `mix`."""
    return -(-tokens // _BLOCK_T)


def pack(
    A: torch.Tensor,
    B: torch.Tensor,
    router: torch.Tensor | None,
    anchor_A: torch.Tensor | None,
    anchor_B: torch.Tensor | None,
    layout: Layout,
    *,
    scaling: float,
    dtype: torch.dtype,
    down_rows: int,
    up_columns: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `rank_space.pack`."""
    d_out, d_in = B.shape[1], A.shape[-1]
    down = torch.empty(down_rows, d_in, dtype=dtype, device=A.device)
    up = torch.empty(d_out, up_columns, dtype=dtype, device=A.device)
    programs, variant = _pack_variant(d_in, d_out, down_rows, up_columns, layout, router is not None)
    # Where a parameter is missing its place is taken by one that is there, and not read.
    places = [A, B, A if router is None else router, A if anchor_A is None else anchor_A]
    places.append(B if anchor_B is None else anchor_B)
    given = [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in places]
    # Parameters may be views into one buffer, as DeepSpeed and FSDP make them.
    variant.launch(programs, (*given, down, up), (float(scaling),), _aligned(*given))
    return down, up


def mix(
    P: torch.Tensor,
    z_width: int,
    layout: Layout,
    *,
    dropout: float = 0.0,
    seed: int | torch.Tensor | None = None,
    partials: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `rank_space.mix`."""
    tokens, k = P.shape
    Z = torch.empty(tokens, z_width, dtype=P.dtype, device=P.device)
    if tokens > 0:
        masked = partials is not None and token_mask is not None
        dropped, in_memory = _seed_kind(dropout, seed)
        variant = _mix_variant(k, z_width, layout, dropped, in_memory, partials is not None, masked)
        # Where a tensor is missing its place is taken by one that is there, and not touched.
        counted = token_mask if token_mask is not None and masked else P
        places = (P, Z, P if partials is None else partials, counted, seed if isinstance(seed, torch.Tensor) else P)
        variant.launch(-(-tokens // _BLOCK_T), places, (tokens, *_mask_numbers(dropout, seed)), _aligned(counted))
    return Z


def mix_backward(
    P: torch.Tensor,
    dZ: torch.Tensor,
    layout: Layout,
    *,
    scaling: float = 1.0,
    heads_width: int = 0,
    dropout: float = 0.0,
    seed: int | torch.Tensor | None = None,
    slope: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `rank_space.mix_backward`."""
    tokens, k = P.shape
    width = max(heads_width, layout.num_heads * layout.r)
    heads, dP = torch.empty(tokens, width, dtype=P.dtype, device=P.device), torch.empty_like(P)
    if tokens > 0:
        masked = slope is not None and token_mask is not None
        dropped, in_memory = _seed_kind(dropout, seed)
        variant = _mix_backward_variant(k, dZ.shape[1], width, layout, dropped, in_memory, slope is not None, masked)
        # Where a tensor is missing its place is taken by one that is there, and not touched.
        counted = token_mask if token_mask is not None and masked else P
        given = (P if slope is None else slope, counted, seed if isinstance(seed, torch.Tensor) else P)
        numbers = (tokens, *_mask_numbers(dropout, seed), float(scaling))
        variant.launch(-(-tokens // _BLOCK_T), (P, dZ, heads, dP, *given), numbers, _aligned(counted))
    return heads, dP


_KINDS = {"none": 0, "switch": 1, "importance": 2, "mutual_information": 3, "z": 4}


@lru_cache(maxsize=1024)
def _summarise_variant(num_heads: int, kind: int, whole_step: bool, prior: bool, slope: bool) -> _Variant:
    constants = (num_heads, triton.next_power_of_2(num_heads), kind, whole_step, prior, slope, _BLOCK_S)
    return _Variant(kernels.summarise_kernel, constants)


def summarise(
    partials: torch.Tensor,
    record: torch.Tensor,
    prior: torch.Tensor | None,
    layout: Layout,
    *,
    kind: str,
    factor: float,
    whole_step: bool,
    expected_tokens: float,
    upstream: torch.Tensor | None,
) -> torch.Tensor | None:
    """See `rank_space.summarise`."""
    num_heads = layout.num_heads
    slope = None
    if upstream is not None:
        slope = torch.empty(num_heads + 2, dtype=torch.float32, device=partials.device)
    variant = _summarise_variant(num_heads, _KINDS[kind], whole_step, prior is not None, slope is not None)
    tensors = (
        *(partials, record, record if prior is None else prior),
        *(record if upstream is None else upstream, record if slope is None else slope),
    )
    numbers = (partials.shape[0], float(factor), float(expected_tokens))
    variant.launch(1, tensors, numbers, _aligned(*tensors))
    return slope


@lru_cache(maxsize=1024)
def _project_mix_variant(d_in: int, z: int, layout: Layout) -> _Variant:
    num_heads, r, routed, anchored, *_ = layout
    r2, heads2 = triton.next_power_of_2(r), triton.next_power_of_2(num_heads)
    # A tile of weights has r or N rows; this keeps it in registers.
    block = max(256, min(1024, 8192 // max(r2, heads2)))
    sizes = (d_in, z, _padding(z, layout.z_columns), r, r2, num_heads, heads2)
    return _Variant(kernels.project_mix_kernel, (*sizes, routed, anchored, block))


def project_mix(x: torch.Tensor, down: torch.Tensor, z_width: int, layout: Layout) -> torch.Tensor:
    """See `rank_space.project_mix`."""
    x = x.contiguous()
    Z = torch.empty(x.shape[0], z_width, dtype=x.dtype, device=x.device)
    if x.shape[0] > 0:
        variant = _project_mix_variant(x.shape[1], z_width, layout)
        variant.launch(x.shape[0], (x, down, Z), (), _aligned(x))
    return Z
