"""Dropout masks as a function of a seed and a position, so that no mask is ever stored.

A mask element is `hash(seed, index) >= p * 2**32`, where `index` counts the elements of the masked tensor. The forward
pass saves the seed; the backward pass, or a recomputation under gradient checkpointing, computes the mask again. A
counter-based hash rather than a `torch.Generator` computes any element independently of the others: a GPU kernel and
this module give the same bits, whatever the tiling.
"""

import torch


_DISTRIBUTED = torch.distributed.is_available()
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
# Multipliers and shifts of a 32-bit mixer with a low bias between input and output bits ("lowbias32", C. Wellons,
# "Prospecting for Hash Functions", 2018). Every step is a bijection of 32-bit integers.
_MIX_MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
_SPLITMIX_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
# Odd constant from the golden ratio; it spreads the seeds of ranks, which differ by one, over all 64 bits.
_GOLDEN = 0x9E3779B97F4A7C15


def _mix32(value: torch.Tensor) -> torch.Tensor:
    """Mix the low 32 bits of an int64 tensor; the result is in `[0, 2**32)`."""
    value = value ^ (value >> 16)
    value = (value * _MIX_MULTIPLIERS[0]) & _MASK32
    value = value ^ (value >> 15)
    value = (value * _MIX_MULTIPLIERS[1]) & _MASK32
    return value ^ (value >> 16)


def mask_parameters(seed: int, p: float) -> tuple[int, int, int]:
    """
    The numbers that define a mask.

    Args:
        seed (`int`): Seed of the mask.
        p (`float`): Probability in `[0, 1)` that an element is dropped.

    Returns:
        `tuple[int, int, int]`: Two 32-bit keys that each depend on all bits of the seed (the finalizer of SplitMix64),
        and [`mask_threshold`].
    """
    value = (seed + _GOLDEN) & _MASK64
    value = ((value ^ (value >> 30)) * _SPLITMIX_MULTIPLIERS[0]) & _MASK64
    value = ((value ^ (value >> 27)) * _SPLITMIX_MULTIPLIERS[1]) & _MASK64
    value ^= value >> 31
    return value & _MASK32, value >> 32, mask_threshold(p)


def mask_threshold(p: float) -> int:
    """The smallest 32 bits of an element that dropout keeps, with probability `p` of dropping it."""
    return round(p * 2**32)


def _tensor_keys(seed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys of [`mask_parameters`] from a seed in an int64 tensor, whose arithmetic wraps as needed."""

    def shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
        return (value >> bits) & (_MASK64 >> bits)  # a logical shift, without copies of the sign

    value = seed + _wrapped(_GOLDEN)
    value = (value ^ shifted(value, 30)) * _wrapped(_SPLITMIX_MULTIPLIERS[0])
    value = (value ^ shifted(value, 27)) * _wrapped(_SPLITMIX_MULTIPLIERS[1])
    value = value ^ shifted(value, 31)
    return value & _MASK32, shifted(value, 32)


def _wrapped(value: int) -> int:
    """64 bits as a signed integer."""
    return value - 2**64 if value >= 2**63 else value


def draw_seed() -> int:
    """
    Draw the seed of one dropout mask from PyTorch's default CPU generator.

    Gradient checkpointing restores that generator before it recomputes a forward pass, so the recomputation draws the
    same seed. The rank is mixed in, because trainers seed all ranks identically and ranks must not share masks.

    Returns:
        `int`: A seed in `[0, 2**63)`.
    """
    seed = int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64).item())
    if _DISTRIBUTED and torch.distributed.is_initialized():
        seed ^= (torch.distributed.get_rank() * _GOLDEN) & (2**63 - 1)
    return seed


def draw_seed_tensor(device: torch.device) -> torch.Tensor:
    """[`draw_seed`] under `torch.compile`: a scalar int64 tensor, from the generator of `device`."""
    seed = torch.randint(0, 2**62, (), dtype=torch.int64, device=device)
    if _DISTRIBUTED and torch.distributed.is_initialized():
        seed = seed ^ ((torch.distributed.get_rank() * _GOLDEN) & (2**62 - 1))
    return seed


def keep_mask(
    seed: int | torch.Tensor, shape: tuple[int, ...], p: float, device: torch.device | str | None = None
) -> torch.Tensor:
    """
    The elements that dropout keeps.

    Args:
        seed (`int` or scalar int64 `torch.Tensor`):
            Non-negative seed, see [`draw_seed`]; a number and a tensor of that number give the same mask.
        shape (`tuple[int, ...]`):
            Shape of the tensor to mask. Elements are numbered in row-major order, modulo 2**32.
        p (`float`):
            Probability in `[0, 1)` that an element is dropped.
        device (`torch.device` or `str`, *optional*):
            Device of the mask.

    Returns:
        `torch.Tensor`: Boolean tensor of that shape, `True` with probability `1 - p`.
    """
    count = 1
    for size in shape:
        count = count * size
    index = torch.arange(count, device=device, dtype=torch.int64) & _MASK32

    first: int | torch.Tensor
    second: int | torch.Tensor
    if isinstance(seed, torch.Tensor):
        first, second = _tensor_keys(seed)
    else:
        first, second, _ = mask_parameters(seed, p)

    # Two rounds: after one, the masks of two seeds would be the same sequence read in different orders.
    bits = _mix32(_mix32((index + first) & _MASK32) ^ second)
    return (bits >= mask_threshold(p)).view(shape)
