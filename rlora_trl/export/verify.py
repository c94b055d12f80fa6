"""Whether an export does what the adapter does: loaded by stock PEFT on the same base, and compared.

Two comparisons, as neither is enough. The logits of whole passes show that everything is in its place, but on a base
of 16 or 4 bits rounding blurs them. So the delta of each layer is compared by itself too, in float64 on random inputs,
where a wrong scaling, a wrong weight of a head or a swapped layer shows whatever the base is made of.

Rounding is relative to what is summed, not to the sum: a delta is the small difference of the heads and the anchor,
and is rounded as they are. So the bound of a delta is made of the sizes of its terms ([`term_factors`]), and that of
the logits is measured, by rounding the adapter's parameters once more ([`rounding_noise`]).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..analysis.measuring import input_device
from ..tuner import MultiHeadAdapter
from ..tuner.bnb_cpu import kept_quantized
from ..tuner.layer import RLoraLayer
from ..tuner.selection import adapter_of, core_model, fixed_head_weights, only_adapter
from .bare import bare_base


# Largest difference of logits, relative to the largest logit, that rounding in the base explains, by its dtype. Seen
# on models of 2 to 30 layers: in float32 2e-7 to 3e-6; in 16 bits, where sums in another order differ, up to 0.03.
LOGITS_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.1}
# How many times the change that one more rounding of the parameters makes. Seen over dtypes, widths, depths and sizes
# of weights: half of it to 1.5 times.
NOISE_FACTOR = 4
# Beyond this, logits are another function's, whatever rounding explains: large weights make it explain everything.
LOGITS_CEILING = 0.5
# Of this many roundings the one that changes most: where a model is steep, one in some hundred changes little.
NOISE_DRAWS = 3

PROMPT_LENGTHS = (3, 11, 32)
logger = logging.get_logger(__name__)
_ROWS = 4
_NAME = "export"


@dataclass(frozen=True)
class Reference:
    """
    What the adapter itself gives under the fixed mixture.

    Args:
        logits (`list[torch.Tensor]`): Of the fixed prompts, float32 on the CPU.
        noise (`float`): What rounding in the adapter changes of them, see [`rounding_noise`].
        deltas (`dict[str, torch.Tensor]`): By layer, of the inputs of [`probe_inputs`], without rounding.
        rounding (`dict[str, torch.Tensor]`): By layer, the largest error of each of these values that computing them
            explains.
    """

    logits: list[torch.Tensor]
    noise: float
    deltas: dict[str, torch.Tensor]
    rounding: dict[str, torch.Tensor]


def takes_token_ids(core: PreTrainedModel) -> bool:
    """
    Whether a model computes something from token ids alone: none of images or sound does, nor one that compares texts
    with those (CLIP), which has no head over a vocabulary.
    """
    compares = any(hasattr(core.config, f"{kind}_config") for kind in ("vision", "audio"))
    return core.main_input_name == "input_ids" and not (compares and core.get_output_embeddings() is None)


def fixed_prompts(core: PreTrainedModel) -> list[torch.Tensor]:
    """Token ids `[1, S]`, the same for every model of one vocabulary; none where a model does not take such."""
    if not takes_token_ids(core):
        return []
    generator = torch.Generator().manual_seed(0)
    vocabulary = core.get_input_embeddings().weight.shape[0]
    prompts = [torch.randint(vocabulary, (1, length), generator=generator) for length in PROMPT_LENGTHS]
    end = getattr(core.config, "eos_token_id", None)
    if getattr(core.config, "is_encoder_decoder", False) and isinstance(end, int):
        for ids in prompts:
            ids[:, -1] = end  # from which BART classifies
    return prompts


@torch.no_grad()
def prompt_logits(model: nn.Module) -> list[torch.Tensor]:
    """The outputs of a model for [`fixed_prompts`], in float32 on the CPU."""
    core = core_model(model)
    device = input_device(core)
    outputs = []
    for ids in fixed_prompts(core):
        inputs = {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}
        if getattr(core.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = inputs["input_ids"]
        # Not the `PeftModel` around it, whose forward a trainer may have put under autocast.
        output = core(**inputs)
        outputs.append((output.logits if "logits" in output else output[0]).float().cpu())
    return outputs


def probe_inputs(in_features: int, device: torch.device) -> torch.Tensor:
    """Random inputs `[4, d_in]` of a layer, the same for every layer of that width."""
    generator = torch.Generator().manual_seed(in_features)
    inputs = torch.randn(_ROWS, in_features, generator=generator, dtype=torch.float64)
    return inputs.to(device, torch.float32 if device.type == "mps" else torch.float64)


def wide_copy(adapter: MultiHeadAdapter, weights: torch.Tensor) -> MultiHeadAdapter:
    """
    A copy of an adapter that computes in float64 (float32 on MPS) under fixed weights `[N]` of its heads: the function
    that its parameters define, without the rounding of their dtype.
    """
    wide = torch.float32 if adapter.A.device.type == "mps" else torch.float64
    copied = copy.deepcopy(adapter, {id(adapter.routing): adapter.routing}).to(wide).eval()
    copied.fix_head_weights(weights)
    return copied


def term_factors(adapter: MultiHeadAdapter, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The sizes of the terms that an adapter sums under fixed weights of its heads, as a product.

    Args:
        adapter ([`MultiHeadAdapter`]): The adapter.
        weights (`torch.Tensor` of shape `[N]`): The weights.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `down` `[k, d_in]` and `up` `[d_out, k]`, of at least 0: the absolute
        values of the terms of the delta of x sum to at most `up down |x|`.
    """
    A, B = adapter.A.detach().abs(), adapter.B.detach().abs()
    weighted = weights.to(B.device, B.dtype)[:, None, None] * B  # [N, d_out, r]
    downs, ups = ([A], [weighted.sum(0)]) if adapter.share_a else (list(A), list(weighted))
    if adapter.A0 is not None and adapter.B0 is not None:
        A0, B0 = adapter.A0.detach().abs(), adapter.B0.detach().abs()
        # The heads' mean occurs twice: h0 is taken off each head's input, and comes back with (mean B - B0).
        downs += [A0] if adapter.share_a else list(A0)
        ups += [2 * B.mean(0) + B0] if adapter.share_a else list((2 * B + B0) / adapter.num_heads)
    return torch.cat(downs), adapter.scaling * torch.cat(ups, dim=1)


def summed_rounding(adapter: MultiHeadAdapter) -> float:
    """The error of a delta in the adapter's dtype, relative to the sizes of its terms: a rounding for each of them."""
    return (adapter.in_features + adapter.r + adapter.num_heads) * torch.finfo(adapter.A.dtype).eps


@torch.no_grad()
def take_reference(
    model: nn.Module,
    adapter_name: str,
    layers: Mapping[str, RLoraLayer],
    mixtures: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> Reference:
    """What the adapter gives under fixed mixtures, on a base that computes in `dtype`."""
    deltas, rounding = {}, {}
    for name, layer in layers.items():
        adapter = wide_copy(adapter_of(layer, adapter_name), mixtures[name])
        inputs = probe_inputs(layer.in_features, adapter.A.device)
        deltas[name] = adapter(inputs).cpu()
        down, up = term_factors(adapter, mixtures[name])
        rounding[name] = summed_rounding(adapter) * (inputs.abs() @ down.T @ up.T).cpu()
    with only_adapter(model, adapter_name), fixed_head_weights(model, adapter_name, mixtures):
        logits = adapter_logits(model, dtype)
        noise = rounding_noise(model, adapter_name, layers, logits, dtype)
    return Reference(logits, noise, deltas, rounding)


def adapter_logits(model: nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
    """
    The [`prompt_logits`] of a model with its adapter.

    Raises:
        ValueError: If they are not finite, so that there is nothing to compare with.
    """
    logits = prompt_logits(model)
    if not all(bool(output.isfinite().all()) for output in logits):
        raise ValueError(
            f"The adapter itself gives logits that are not finite on a base in {dtype}. Load the base in "
            "torch.bfloat16 or torch.float32, or correct the adapter's parameters. Nothing was written."
        )
    return logits


@torch.no_grad()
def rounding_noise(
    model: nn.Module,
    adapter_name: str,
    layers: Mapping[str, RLoraLayer],
    logits: list[torch.Tensor],
    dtype: torch.dtype,
) -> float:
    """
    What rounding in an adapter changes of the logits of the fixed prompts.

    Each of its parameters is changed by a rounding, at random upwards or downwards, and put back; `NOISE_DRAWS` times.
    So the heads and the anchor no longer cancel to the last bit, as where they are rounded in another order.

    Args:
        model (`torch.nn.Module`), adapter_name (`str`), layers (`Mapping[str, RLoraLayer]`): The adapter, which runs
            under fixed mixtures.
        logits (`list[torch.Tensor]`): The logits as they are.
        dtype (`torch.dtype`): In which the base computes. An export is rounded to float32 in any case.

    Returns:
        `float`: The largest change, see [`logits_error`].
    """
    parameters = [p for layer in layers.values() for p in adapter_of(layer, adapter_name).parameters()]
    kept = [parameter.detach().clone() for parameter in parameters]
    eps = max(torch.finfo(kind).eps for kind in (dtype, torch.float32, *(value.dtype for value in kept)))
    changes = []
    try:
        for draw in range(NOISE_DRAWS):
            for index, (parameter, value) in enumerate(zip(parameters, kept, strict=True)):
                parameter.copy_(rounded_at_random(value, eps, draw * len(parameters) + index))
            changes.append(logits_error(prompt_logits(model), logits))
        return max(changes)
    finally:
        for parameter, value in zip(parameters, kept, strict=True):
            parameter.copy_(value)


def rounded_at_random(values: torch.Tensor, eps: float, seed: int) -> torch.Tensor:
    """Values that are larger or smaller by `eps` of themselves, in the dtype and on the device of `values`."""
    generator = torch.Generator(values.device).manual_seed(seed)
    signs = torch.randint(2, values.shape, generator=generator, dtype=torch.int8, device=values.device) * 2 - 1
    return values + values * (eps * signs)


def logits_tolerance(dtype: torch.dtype, noise: float) -> float:
    """
    The largest difference of logits, relative to the largest, that is accepted: what rounding explains, with a warning
    if that is more than `LOGITS_CEILING`, which is accepted then.

    Args:
        dtype (`torch.dtype`): Dtype in which the base computes.
        noise (`float`): What rounding in the adapter changes, see [`rounding_noise`].
    """
    explained = LOGITS_TOLERANCE[dtype] + NOISE_FACTOR * noise
    if explained <= LOGITS_CEILING:
        return explained
    logger.warning(
        f"Rounding in {dtype} explains differences of logits of {explained:.2g} of the largest, as the adapter's "
        f"parameters are large; at most {LOGITS_CEILING} is accepted. Load the base in a wider dtype for a "
        "closer check."
    )
    return LOGITS_CEILING


def logits_error(logits: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest logit; infinite where one is not finite, 0 without prompts."""
    if not reference:
        return 0.0
    largest = max(float(expected.abs().max()) for expected in reference)
    difference = max(float((got - expected).abs().max()) for got, expected in zip(logits, reference, strict=True))
    error = difference / max(largest, torch.finfo(torch.float32).tiny)
    return error if error == error else float("inf")


def worst(difference: torch.Tensor, bound: torch.Tensor) -> str:
    """Where a difference exceeds its bound the most, in words."""
    place = torch.where(difference <= bound, 0.0, difference - bound).argmax()
    values = (float(tensor.flatten()[place]) for tensor in (difference, bound))
    return "differs by {:.2g}, where rounding explains {:.2g}".format(*values)


def check_export(model: nn.Module, folder: Path, reference: Reference, dtype: torch.dtype) -> float | None:
    """
    Load an export with stock PEFT on the base of a model, and compare it with the adapter that it was made from.

    Args:
        model (`torch.nn.Module`): The model with the adapter; as it was afterwards.
        folder (`Path`): The export.
        reference ([`Reference`]): What it must give.
        dtype (`torch.dtype`): Dtype in which the base computes.

    Returns:
        `float` or `None`: The error of the logits, see [`logits_error`]; `None` where there are none.

    Raises:
        ValueError: If they differ by more than rounding explains.
    """
    with bare_base(core_model(model)) as base:
        with warnings.catch_warnings(), kept_quantized(base):
            warnings.simplefilter("ignore")  # about the base's configuration, which is not at issue
            loaded = PeftModel.from_pretrained(base, str(folder), adapter_name=_NAME).eval()
        _check_deltas(loaded, reference)
        error = logits_error(prompt_logits(loaded), reference.logits)
    tolerance = logits_tolerance(dtype, reference.noise)
    if not error <= tolerance:
        raise ValueError(
            f"The export does not do what the adapter does: with stock PEFT logits differ by {error:.2g} of the "
            f"largest, and at most {tolerance:.2g} is accepted in {dtype}. Nothing was written; please report it."
        )
    return error if reference.logits else None


@torch.no_grad()
def _check_deltas(loaded: nn.Module, reference: Reference) -> None:
    found = {
        name: layer
        for name, layer in core_model(loaded).named_modules()
        if isinstance(layer, LoraLayer) and _NAME in layer.lora_A
    }
    if set(found) != set(reference.deltas):
        differing = ", ".join(sorted(set(found) ^ set(reference.deltas))[:3])
        raise ValueError(
            f"The export does not adapt the layers that the adapter does: stock PEFT {peft.__version__} puts it "
            f"elsewhere on this base, and these differ: {differing}. Export a full model with `merge=True`, or leave "
            "these layers out of `target_modules` when the adapter is trained. Nothing was written."
        )
    for name, layer in found.items():
        down, up = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        inputs = probe_inputs(down.shape[1], down.device)
        down, up = down.to(inputs.dtype), up.to(inputs.dtype) * layer.scaling[_NAME]
        difference = ((inputs @ down.T @ up.T).cpu() - reference.deltas[name]).abs()
        # Both matrices were rounded to float32 once.
        terms = (inputs.abs() @ down.abs().T @ up.abs().T).cpu()
        bound = 2 * torch.finfo(torch.float32).eps * terms + reference.rounding[name]
        if not bool((difference <= bound).all()):
            raise ValueError(
                f"The export does not do what the adapter does: in {name} its delta "
                f"{worst(difference, bound)}. Nothing was written; please report it."
            )
