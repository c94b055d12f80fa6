"""What docs/models.md says of each architecture, as checks that raise where it does not hold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES, Architecture
from peft import PeftModel, get_peft_model
from testing_utils import perturb
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig

from rlora_trl import RLoraConfig, export_lora
from rlora_trl.tuner import RLoraLinear
from rlora_trl.tuner.experts import RLoraExpertWeight
from rlora_trl.tuner.layer import RLoraLayer


TASKS = ["first", "second"]
# Of float32 outputs: step 0 adds and subtracts the same product; a merge and an export sum in another order.
STEP_ZERO, MERGED = 1e-5, 1e-4
TOWERS = ("language_model", "text_model", "vision_model", "vision_tower", "visual")


class Row:
    """What the cells of one architecture share."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.base = architecture.build()  # never changed

    def new_base(self) -> Any:
        """A copy of the base, which shares its configurations: they are most of a copy's time."""
        values = [value for module in self.base.modules() for value in vars(module).values()]
        return copy.deepcopy(self.base, {id(v): v for v in values if isinstance(v, PreTrainedConfig)})

    @cached_property
    def batch(self) -> dict[str, Any]:
        return self.architecture.batch(self.base)

    @cached_property
    def expected(self) -> torch.Tensor:
        """The outputs of the base."""
        return outputs(self.base, self.batch)

    @cached_property
    def trained(self) -> Any:
        """A model with default targets after a few steps, see [`check_trains`]."""
        model = adapted(self.architecture)
        close(outputs(model, self.batch), self.expected, STEP_ZERO)
        train(model, self.batch)
        return model.eval()


@lru_cache(maxsize=1)
def _row(name: str) -> Row:
    return Row(ARCHITECTURES[name])


def row_of(architecture: Architecture) -> Row:
    return _row(architecture.name)


def base_of(architecture: Architecture) -> Any:
    """A new copy of the tiny model, whose weights are always the same."""
    return row_of(architecture).new_base()


def adapted(architecture: Architecture, base: nn.Module | None = None, **fields: Any) -> Any:
    config = RLoraConfig(task_type=architecture.task_type, **{"head_dropout": 0.2, **fields})
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


def differ(actual: torch.Tensor, other: torch.Tensor) -> None:
    """Outputs differ by much more than a merge may change them; else equal ones would prove nothing."""
    assert float((actual - other).abs().max()) > 10 * MERGED * float(other.abs().max())


def train(model: nn.Module, batch: Mapping[str, Any], steps: int = 2) -> None:
    """A few steps lower the loss; in each, all that trains gets a gradient, and nothing else moves."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss_before = loss(model, batch)
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
    assert loss(model, batch) < loss_before


def check_trains(architecture: Architecture, folder: Path) -> None:
    """With default targets: step 0 is the base model, and training lowers the loss and changes the adapter only."""
    assert row_of(architecture).trained


def check_reloads(architecture: Architecture, folder: Path) -> None:
    row = row_of(architecture)
    expected = outputs(row.trained, row.batch)
    differ(expected, row.expected)
    row.trained.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(row.new_base(), folder).eval()
    assert torch.equal(outputs(loaded, row.batch), expected)


def load_in_4_bits(base: Any) -> Any:
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
    torch.manual_seed(0)
    return (
        type(base)
        .from_pretrained(
            None,
            config=copy.deepcopy(base.config),
            state_dict=base.state_dict(),
            quantization_config=quantization,
            dtype=torch.bfloat16,
        )
        .eval()
    )


def check_4_bit(architecture: Architecture, folder: Path) -> None:
    """Step 0 is the quantized base bit for bit, and training works."""
    row = row_of(architecture)
    base = load_in_4_bits(row.base)
    batch = {
        key: value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in row.batch.items()
    }
    expected = outputs(base, batch)
    model = adapted(architecture, base)
    layers = [layer for layer in model.modules() if isinstance(layer, RLoraLinear)]
    assert any(layer.get_base_layer().weight.dtype == torch.uint8 for layer in layers), "no weight is packed"
    assert torch.equal(outputs(model, batch), expected)
    train(model, batch, steps=3)  # a loss in bfloat16 may be the same after two


def check_merges(architecture: Architecture, folder: Path) -> None:
    batch = row_of(architecture).batch
    model = adapted(architecture, router="uniform")
    perturb(model)
    expected = outputs(model, batch)
    differ(expected, row_of(architecture).expected)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, RLoraLayer) for module in merged.modules())
    close(outputs(merged, batch), expected, MERGED)


def check_exports(architecture: Architecture, folder: Path) -> None:
    """The export for a task is, in stock PEFT, the same function; and each row of a batch can have its own task."""
    batch = row_of(architecture).batch
    model = adapted(architecture, router="task", tasks=TASKS)
    perturb(model, scale=1.0)
    by_task = {}
    for task in TASKS:
        model.set_task(task)
        by_task[task] = outputs(model, batch)
    differ(*by_task.values())
    differ(by_task["second"], row_of(architecture).expected)
    export_lora(model, folder / "export", task="second")
    check_tasks_of_rows(model, batch, by_task)

    exported = PeftModel.from_pretrained(model.unload(), folder / "export").eval()
    assert exported.peft_config["default"].peft_type == "LORA"
    close(outputs(exported, batch), by_task["second"], MERGED)


def check_tasks_of_rows(model: nn.Module, batch: Mapping[str, Any], by_task: Mapping[str, torch.Tensor]) -> None:
    """A batch with `task_ids` has, in each row, the outputs of the row's task."""
    model.set_task(None)
    rows = len(by_task[TASKS[0]])
    names = [TASKS[row % 2] for row in range(rows)]
    mixed = outputs(model, {**batch, "task_ids": names})
    expected = torch.stack([by_task[name][row] for row, name in enumerate(names)])
    if "return_loss" in batch:  # a similarity of two rows: that of a row with itself has one task
        mixed, expected = mixed.diagonal(), expected.diagonal()
    close(mixed, expected, STEP_ZERO)


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
