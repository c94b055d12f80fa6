"""
The forward pass of the authors' code of R-LoRA and HydraLoRA as a reference, written from its formulas.

    y = W x + s sum_i softmax(route x)_i B_i A x

W is the weight of the base, and in R-LoRA that minus s mean_i(B_i) A with the initial values.
"""

import copy
import json
import math

import torch
from testing_utils import TINY_MODELS
from torch import nn


PREFIX = "base_model.model."
MLP = ("gate_proj", "up_proj", "down_proj")


class AuthorsLinear(nn.Module):
    """One adapted layer. Its weights have the names that the authors' code saves."""

    def __init__(self, base: nn.Linear, r: int, num_heads: int, scaling: float):
        super().__init__()
        out_features, in_features = base.weight.shape
        self.base, self.num_heads, self.scaling = base, num_heads, scaling
        self.lora_A = nn.Linear(in_features, r, bias=False)
        self.lora_route = nn.Linear(in_features, num_heads, bias=False)
        for head in range(num_heads):
            self.add_module(f"lora_B{head}", nn.Linear(r, out_features, bias=False))

    @property
    def heads(self):
        return [self.get_submodule(f"lora_B{head}").weight for head in range(self.num_heads)]

    @torch.no_grad()
    def subtract_initial_delta(self):
        self.base.weight -= self.scaling * sum(B @ self.lora_A.weight for B in self.heads) / self.num_heads

    def forward(self, x):
        weights = torch.softmax(self.lora_route(x), dim=-1)
        h = self.lora_A(x)
        delta = sum(weights[..., head, None] * (h @ B.T) for head, B in enumerate(self.heads))
        return self.base(x) + self.scaling * delta


def author_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, AuthorsLinear)}


def authors_model(base, *, r=4, num_heads=3, alpha=32, rank_stablization=False, random_heads=False, targets=MLP):
    """A copy of a base with the authors' layers before the first step; with random heads their delta is subtracted."""
    model = copy.deepcopy(base)
    scaling = alpha / math.sqrt(r) if rank_stablization else alpha / r
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.endswith(targets):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, AuthorsLinear(module, r, num_heads, scaling))
    with torch.no_grad():
        for layer in author_layers(model).values():
            for B in layer.heads:
                B.copy_(torch.randn_like(B) * 0.2 if random_heads else torch.zeros_like(B))
            if random_heads:
                layer.subtract_initial_delta()
    return model.requires_grad_(False).eval()


@torch.no_grad()
def train(model, seed=1, scale=0.3):
    """Move all that the authors' code trains, in place of a training."""
    generator = torch.Generator().manual_seed(seed)
    for layer in author_layers(model).values():
        for name, parameter in layer.named_parameters():
            if name.startswith("lora_"):
                parameter += scale * torch.randn(parameter.shape, generator=generator) * 0.2


def state(model, dtype=torch.float32):
    """What the authors' code saves: all whose name has `lora_`."""
    return {f"{PREFIX}{name}": t.to(dtype) for name, t in model.state_dict().items() if "lora_" in name}


def save(folder, model, dtype=torch.float32, **fields):
    """A folder as the authors' `save_pretrained` writes it."""
    layer = next(iter(author_layers(model).values()))
    config = {
        "base_model_name_or_path": "path_to_model",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 32.0,
        "lora_dropout": 0.1,
        "lora_nums": layer.num_heads,
        "merge_weights": False,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": layer.lora_A.weight.shape[0],
        "target_modules": list(MLP),
        "task_type": "CAUSAL_LM",
    }
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config | fields, indent=2, sort_keys=True))
    torch.save(state(model, dtype), folder / "adapter_model.bin")
    return folder


def tiny_base():
    torch.manual_seed(3)
    return TINY_MODELS["llama"]().eval()
