"""4-bit weights of bitsandbytes, dequantized with one launch (QLoRA, arXiv 2305.14314, section 3)."""

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from .triton_ops import Variant


# Bytes per program.
_BLOCK = 2048
# Kernels index with 32 bits.
_MOST_VALUES = 2**31
# Triton compiles for numbers of bytes that are multiples of 16, which allows wide loads and stores, and [`Variant`]
# keeps what it has compiled.
_MULTIPLE = 2 * 16


@triton.jit
def dequantize_kernel(
    packed,
    absmax,
    code,
    absmax2,
    code2,
    offset,
    out,
    num_bytes,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP2: tl.constexpr,
    NESTED: tl.constexpr,
):
    """
    `out = code[nibble] * scale of its block`, the upper half of each byte first.

    `GROUP` is the bytes of a block with one scale, `ROWS` the blocks of a program. With double quantization (`NESTED`)
    the scales are `code2[absmax] * absmax2 + offset`, with an `absmax2` for each `GROUP2` of them. Products and sums
    are rounded to float32 one by one, as bitsandbytes' kernels do.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, GROUP)
    places = rows[:, None] * GROUP + columns[None, :]
    inside = rows * GROUP < num_bytes
    read = places < num_bytes

    scale = tl.load(absmax + rows, mask=inside, other=0)
    if NESTED:
        second = tl.load(absmax2 + rows // GROUP2, mask=inside, other=0)
        scale = tl.load(code2 + scale.to(tl.int32)) * second + tl.load(offset)

    values = tl.load(packed + places, mask=read, other=0).to(tl.int32)
    upper = tl.load(code + (values >> 4)) * scale[:, None]
    lower = tl.load(code + (values & 15)) * scale[:, None]
    targets = rows[:, None] * (2 * GROUP) + tl.arange(0, 2 * GROUP)[None, :]
    tl.store(out + targets, tl.interleave(upper, lower).to(out.dtype.element_ty), mask=targets < 2 * num_bytes)


@lru_cache(maxsize=64)
def _variant(group: int, group2: int, dtype: torch.dtype) -> tuple[int, Variant]:
    """Blocks of a program, and the kernel; `group2` is 0 without double quantization."""
    rows = max(1, _BLOCK // group)
    constants = (rows, group, max(group2, 1), group2 > 0)
    # A fused multiplication and addition would round once where bitsandbytes rounds twice.
    return rows, Variant(dequantize_kernel, constants, enable_fp_fusion=False)


def dequantize(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor | None:
    """
    A weight in `dtype`, bit for bit as bitsandbytes dequantizes it.

    Args:
        packed (`torch.Tensor`): Two values in each byte, of any storage dtype.
        state (`bitsandbytes.functional.QuantState`): How it was quantized.
        dtype (`torch.dtype`): Of the result.

    Returns:
        `torch.Tensor` of shape `state.shape`, or `None` if bitsandbytes must do it: a number of values that is no
        multiple of 32, or more than 2^31; a transposed weight; tensors on several devices or of other dtypes than
        quantization gives them; or another rounding on the way.
    """
    values = math.prod(state.shape)
    rounds_once = state.dtype in (dtype, torch.float32)
    if values % _MULTIPLE or values >= _MOST_VALUES or not rounds_once:
        return None
    if packed.shape[0] == 1 or not packed.is_contiguous() or not _has_usual_dtypes(state):
        return None

    absmax, code, second = state.absmax, state.code, state.state2
    nested = (absmax, absmax, absmax) if second is None else (second.absmax, second.code, state.offset)
    out = torch.empty(state.shape, dtype=dtype, device=packed.device)
    if packed.dtype != torch.uint8:
        packed = packed.view(torch.uint8)
    tensors = (packed, absmax, code, *nested, out)
    device, addresses = packed.get_device(), 0
    for tensor in tensors:
        if tensor.get_device() != device:
            return None
        addresses |= tensor.data_ptr()

    rows, kernel = _variant(state.blocksize // 2, 0 if second is None else second.blocksize, dtype)
    programs = triton.cdiv(values // 2, rows * (state.blocksize // 2))
    kernel.launch(programs, tensors, (values // 2,), aligned=addresses % 16 == 0)
    return out


def _has_usual_dtypes(state: Any) -> bool:
    """Whether the tensors of a state have the dtypes that bitsandbytes gives them, for which kernels are compiled."""
    second, wide = state.state2, torch.float32
    if state.code.dtype != wide:
        return False
    if second is None:
        return state.absmax.dtype == wide
    dtypes = (second.absmax.dtype, second.code.dtype, state.offset.dtype)
    return state.absmax.dtype == torch.uint8 and dtypes == (wide, wide, wide)
