"""What docs/models.md says of each architecture, as checks that raise where it does not hold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from architectures import Architecture
from peft import PeftModel, get_peft_model
from testing_utils import perturb
from torch import nn
from transformers import BitsAndBytesConfig

from rlora_trl import RLoraConfig, export_lora
from rlora_trl.tuner import RLoraLinear
from rlora_trl.tuner.experts import RLoraExpertWeight
from rlora_trl.tuner.layer import RLoraLayer


TASKS = ["first", "second"]
# Of float32 outputs: step 0 adds and subtracts the same product; a merge and an export sum in another order.
STEP_ZERO, MERGED = 1e-5, 1e-4
TOWERS = ("language_model", "text_model", "vision_model", "vision_tower", "visual")


@lru_cache(maxsize=1)
def _built(architecture_name: str, build: Callable[[], nn.Module]) -> nn.Module:
    return build()


def base_of(architecture: Architecture) -> Any:
    """A new copy of the tiny model, whose weights are always the same."""
    return copy.deepcopy(_built(architecture.name, architecture.build))


def adapted(architecture: Architecture, base: nn.Module | None = None, **fields: Any) -> Any:
    config = RLoraConfig(task_type=architecture.task_type, **fields)
    return get_peft_model(base_of(architecture) if base is None else base, config).eval()


def outputs(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        output = model(**batch)
    logits = output.logits_per_image if "logits_per_image" in output else output.logits
    return logits.float()


def loss(model: nn.Module, batch: Mapping[str, Any]) -> float:
    with torch.no_grad():
        return float(model.eval()(**batch).loss)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def train(model: nn.Module, batch: Mapping[str, Any], steps: int = 5) -> None:
    """A few steps, in which all that trains gets a gradient and moves."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trained.values(), lr=5e-3)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        still = [name for name, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0]
        assert not still, f"no gradient for {still}"
        optimizer.step()
    # On CPU, bitsandbytes changes the order of packed weights.
    whole = {name for name, p in model.named_parameters() if p.dtype != torch.uint8}
    moved = {name for name, p in model.named_parameters() if name in whole and not torch.equal(p, before[name])}
    assert moved == set(trained), moved ^ set(trained)


def check_trains(architecture: Architecture, folder: Path) -> None:
    """With default targets: step 0 is the base model, and training lowers the loss and changes the adapter only."""
    base = base_of(architecture)
    batch = architecture.batch(base)
    expected = outputs(base, batch)
    model = adapted(architecture)
    close(outputs(model, batch), expected, STEP_ZERO)
    before = loss(model, batch)
    train(model, batch)
    assert loss(model, batch) < before


def check_reloads(architecture: Architecture, folder: Path) -> None:
    model = adapted(architecture)
    batch = architecture.batch(model)
    perturb(model)
    expected = outputs(model, batch)
    base = base_of(architecture)
    assert not torch.allclose(expected, outputs(base, batch), atol=1e-4)
    model.save_pretrained(folder)
    assert torch.equal(outputs(PeftModel.from_pretrained(base, folder).eval(), batch), expected)


def load_in_4_bits(architecture: Architecture, base: Any, folder: Path) -> Any:
    # Heads that train and output heads stay in 16 bits. On CPU, bitsandbytes packs blocks of 64 inputs and 32 outputs.
    linear = {name: module for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    odd = [name for name, module in linear.items() if module.in_features % 64 or module.out_features % 32]
    output = base.get_output_embeddings()
    heads = ["classifier", "score", *(name for name, module in linear.items() if module is output)]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[*heads, *odd],
    )
    base.save_pretrained(folder)
    torch.manual_seed(0)
    return architecture.auto.from_pretrained(folder, quantization_config=quantization, dtype=torch.bfloat16).eval()


def check_4_bit(architecture: Architecture, folder: Path) -> None:
    """Step 0 is the quantized base bit for bit, and training works."""
    base = load_in_4_bits(architecture, base_of(architecture), folder)
    batch = {
        key: value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in architecture.batch(base).items()
    }
    expected = outputs(base, batch)
    model = adapted(architecture, base)
    layers = [layer for layer in model.modules() if isinstance(layer, RLoraLinear)]
    assert any(layer.get_base_layer().weight.dtype == torch.uint8 for layer in layers), "no weight is packed"
    assert torch.equal(outputs(model, batch), expected)
    before = loss(model, batch)
    train(model, batch)
    assert loss(model, batch) < before


def check_merges(architecture: Architecture, folder: Path) -> None:
    model = adapted(architecture, router="uniform")
    batch = architecture.batch(model)
    perturb(model)
    expected = outputs(model, batch)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, RLoraLayer) for module in merged.modules())
    close(outputs(merged, batch), expected, MERGED)


def check_exports(architecture: Architecture, folder: Path) -> None:
    """The export for a task is, in stock PEFT, the same function."""
    model = adapted(architecture, router="task", tasks=TASKS)
    batch = architecture.batch(model)
    perturb(model)
    model.set_task("second")
    expected = outputs(model, batch)
    export_lora(model, folder / "export", task="second")
    exported = PeftModel.from_pretrained(base_of(architecture), folder / "export").eval()
    assert exported.peft_config["default"].peft_type == "LORA"
    close(outputs(exported, batch), expected, MERGED)


CAPABILITIES: dict[str, Callable[[Architecture, Path], None]] = {
    "trains": check_trains,
    "reloads exactly": check_reloads,
    "4-bit": check_4_bit,
    "merges": check_merges,
    "exports": check_exports,
}


def default_targets(architecture: Architecture) -> list[str]:
    """The layers that get an adapter by default: the ends of their names, and the tower of a model with several."""
    model = adapted(architecture)
    kinds = (RLoraLinear, RLoraExpertWeight)
    adapted_names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    found = set()
    for name in adapted_names:
        parts = name.split(".")
        tower = [f"{part}.*" for part in parts if part in TOWERS]
        found.add(".".join([*tower[:1], *(part for part in parts[-2:] if not part.isdigit())]))
    return sorted(found)
