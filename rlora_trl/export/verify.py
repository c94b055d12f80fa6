"""Whether an export does what the adapter does: loaded by stock PEFT on the same base, and compared.

Two comparisons, as neither is enough. The logits of whole passes show that everything is in its place, but on a base
of 16 or 4 bits rounding blurs them. So the delta of each layer is compared by itself too, in float64 on random inputs,
where a wrong scaling, a wrong weight of a head or a swapped layer shows whatever the base is made of.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from ..analysis.mixtures import input_device
from ..tuner.fixed import adapter_of, core_model, fixed_mixtures, kept_quantized, only_adapter
from ..tuner.layer import RLoraLayer
from .bare import bare_base


# Largest difference of logits, relative to the largest logit, that rounding explains, by dtype of the base. Seen on
# models of 2 to 30 layers: in float32 2e-7 to 3e-6; in 16 bits, where sums in another order differ, up to 0.03.
LOGITS_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.1}
# Of the delta of one layer, relative to the size of its terms. The export is rounded to float32, and so are the logits
# of the weights: 1e-6. An adapter kept in 16 bits rounds its own sums.
DELTA_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}

PROMPT_LENGTHS = (3, 11, 32)
_ROWS = 4
_NAME = "export"


@dataclass(frozen=True)
class Reference:
    """
    What the adapter itself gives under the fixed mixture.

    Args:
        logits (`list[torch.Tensor]`): Of the fixed prompts, float32 on the CPU.
        deltas (`dict[str, torch.Tensor]`): By layer, of the inputs of [`probe_inputs`].
    """

    logits: list[torch.Tensor]
    deltas: dict[str, torch.Tensor]


def fixed_prompts(core: PreTrainedModel) -> list[torch.Tensor]:
    """Token ids `[1, S]`, the same for every model of one vocabulary."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = core.get_input_embeddings().weight.shape[0]
    return [torch.randint(vocabulary, (1, length), generator=generator) for length in PROMPT_LENGTHS]


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


@torch.no_grad()
def take_reference(
    model: nn.Module, adapter_name: str, layers: Mapping[str, RLoraLayer], mixtures: Mapping[str, torch.Tensor]
) -> Reference:
    """What the adapter gives under fixed mixtures."""
    with only_adapter(model, adapter_name), fixed_mixtures(model, adapter_name, mixtures):
        deltas = {}
        for name, layer in layers.items():
            adapter = adapter_of(layer, adapter_name)
            deltas[name] = adapter(probe_inputs(layer.in_features, adapter.A.device)).cpu()
        return Reference(prompt_logits(model), deltas)


def logits_error(logits: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest logit; infinite where one is not finite."""
    largest = max(float(expected.abs().max()) for expected in reference)
    difference = max(float((got - expected).abs().max()) for got, expected in zip(logits, reference, strict=True))
    error = difference / max(largest, torch.finfo(torch.float32).tiny)
    return error if error == error else float("inf")


def check_export(
    model: nn.Module, folder: Path, reference: Reference, parameter_dtype: torch.dtype, base_dtype: torch.dtype
) -> float:
    """
    Load an export with stock PEFT on the base of a model, and compare it with the adapter that it was made from.

    Args:
        model (`torch.nn.Module`): The model with the adapter; as it was afterwards.
        folder (`Path`): The export.
        reference ([`Reference`]): What it must give.
        parameter_dtype (`torch.dtype`): Dtype of the adapter.
        base_dtype (`torch.dtype`): Dtype in which the base computes.

    Returns:
        `float`: The error of the logits, see [`logits_error`].

    Raises:
        ValueError: If they differ by more than rounding explains.
    """
    with bare_base(core_model(model)) as base:
        with warnings.catch_warnings(), kept_quantized(base):
            warnings.simplefilter("ignore")  # about the base's configuration, which is not at issue
            loaded = PeftModel.from_pretrained(base, str(folder), adapter_name=_NAME).eval()
        _check_deltas(loaded, reference, DELTA_TOLERANCE[parameter_dtype])
        error = logits_error(prompt_logits(loaded), reference.logits)
    tolerance = LOGITS_TOLERANCE[base_dtype]
    if not error <= tolerance:
        raise ValueError(
            f"The export does not do what the adapter does: with stock PEFT logits differ by {error:.2g} of the "
            f"largest, and rounding in {base_dtype} explains {tolerance:g}. Nothing was written; please report it."
        )
    return error


@torch.no_grad()
def _check_deltas(loaded: nn.Module, reference: Reference, tolerance: float) -> None:
    found = {
        name: layer
        for name, layer in core_model(loaded).named_modules()
        if isinstance(layer, LoraLayer) and _NAME in layer.lora_A
    }
    if set(found) != set(reference.deltas):
        differing = ", ".join(sorted(set(found) ^ set(reference.deltas))[:3])
        raise ValueError(
            f"The export does not adapt the layers that the adapter does; with stock PEFT these differ: {differing}. "
            "Nothing was written; please report it."
        )
    for name, layer in found.items():
        down, up = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        inputs = probe_inputs(down.shape[1], down.device)
        down, up = down.to(inputs.dtype), up.to(inputs.dtype) * layer.scaling[_NAME]
        hidden = inputs @ down.T
        difference = ((hidden @ up.T).cpu() - reference.deltas[name]).abs()
        terms = float((hidden.norm(dim=1, keepdim=True) * up.norm(dim=1)).max())
        error = float(difference.max())
        if not error <= tolerance * terms:
            raise ValueError(
                f"The export does not do what the adapter does: in {name} its delta differs by {error:.2g}, where "
                f"rounding explains {tolerance * terms:.2g}. Nothing was written; please report it."
            )
