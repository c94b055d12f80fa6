"""4-bit weights are dequantized as bitsandbytes does, bit for bit; on a CPU in Triton's interpreter."""

import pytest
import torch
from kernel_helpers import DEVICE, INTERPRETED

from rlora_trl.kernels import four_bit
from rlora_trl.kernels.fused import KERNELS_VARIABLE


functional = pytest.importorskip("bitsandbytes.functional")
triton_four_bit = pytest.importorskip("rlora_trl.kernels.triton_four_bit")

pytestmark = pytest.mark.skipif(
    not (INTERPRETED or DEVICE == "cuda"), reason="test_fused.py runs this file in the interpreter"
)
# Triton's interpreter cuts bfloat16 off where a GPU rounds.
DTYPES = [torch.float16, torch.float32] + [torch.bfloat16] * torch.cuda.is_available()


@pytest.fixture(autouse=True)
def triton_kernels(monkeypatch):
    monkeypatch.setenv(KERNELS_VARIABLE, "triton")


def quantized(shape=(96, 192), *, dtype=torch.float16, **options):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    return functional.quantize_4bit(weight, **{"quant_type": "nf4", "compress_statistics": True, **options})


def from_formula(packed, state, dtype):
    """Section 3 of QLoRA, in float32; bitsandbytes on a CPU is wrong where blocks go over the end of a row."""
    scale = state.absmax.float()
    if state.nested:
        second = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(scale)]
        scale = state.state2.code[state.absmax.long()] * second + state.offset
    packed = packed.view(torch.uint8).flatten().long()
    values = state.code[torch.stack([packed >> 4, packed & 15], dim=1)].flatten()
    values = values * scale.repeat_interleave(state.blocksize)[: len(values)]
    return values.view(state.shape).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compress_statistics": False},
        {"quant_type": "fp4"},
        {"blocksize": 128},
        {"blocksize": 4096},
        {"quant_storage": torch.bfloat16},
        {"quant_storage": torch.float32, "compress_statistics": False},
        {"shape": (33, 32)},  # the last block is not full
        {"shape": (300, 512)},  # several programs
    ],
    ids=str,
)
def test_the_same_bits(options, dtype):
    packed, state = quantized(dtype=dtype, **options)
    found = triton_four_bit.dequantize(packed, state, dtype)
    assert found.dtype == dtype and found.shape == state.shape
    assert torch.equal(found, from_formula(packed, state, dtype))
    if DEVICE == "cuda":
        assert torch.equal(found, functional.dequantize_4bit(packed, state))


def test_another_dtype_of_products():
    packed, state = quantized(dtype=torch.float32)
    found = triton_four_bit.dequantize(packed, state, torch.float16)
    assert torch.equal(found, from_formula(packed, state, torch.float16))


@pytest.mark.parametrize("case", ["two roundings", "transposed", "odd", "few bytes", "strided", "other dtypes"])
def test_what_is_left_to_bitsandbytes(case):
    packed, state = quantized(shape={"odd": (33, 35), "few bytes": (33, 34)}.get(case, (96, 192)))
    dtype = torch.bfloat16 if case == "two roundings" else torch.float16
    if case == "transposed":
        packed = packed.t()
    if case == "other dtypes":
        state.code = state.code.double()
    if case == "strided":
        packed = torch.stack([packed, packed], dim=1)[:, 0]
    assert triton_four_bit.dequantize(packed, state, dtype) is None
    expected = functional.dequantize_4bit(packed, state).to(dtype)
    assert torch.equal(four_bit.dequantize(packed, state, dtype), expected)


def test_without_triton(monkeypatch):
    monkeypatch.setenv(KERNELS_VARIABLE, "torch")
    monkeypatch.setattr(triton_four_bit, "dequantize", None)  # a call would fail
    packed, state = quantized()
    found = four_bit.dequantize(packed, state, torch.float16)
    assert torch.equal(found, functional.dequantize_4bit(packed, state))


def test_an_unaligned_weight():
    packed, state = quantized()
    shifted = torch.cat([packed.new_zeros(1, 1), packed])[1:]
    found = triton_four_bit.dequantize(shifted, state, torch.float16)
    assert torch.equal(found, from_formula(packed, state, torch.float16))
