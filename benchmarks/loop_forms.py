"""HydraLoRA and R-LoRA as published: one loop over heads, each with a product of its own at the size of the output.

Written from the formulas of the papers (HydraLoRA arXiv 2404.19245, R-LoRA arXiv 2502.15455), in the way that their
published code computes them: adapters in float32 unless autocast says otherwise, one dropout module for each head.
"""

import torch
from torch import nn


class LoopLinear(nn.Module):
    """A frozen linear layer with N heads, computed one after the other."""

    def __init__(
        self, base: nn.Linear, r: int, num_heads: int, scaling: float, dropout: float, head_dropout: bool
    ) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.head_dropout = base, scaling, head_dropout
        options = {"bias": False, "device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(base.in_features, r, **options)
        self.lora_B = nn.ModuleList(nn.Linear(r, base.out_features, **options) for _ in range(num_heads))
        self.lora_route = nn.Linear(base.in_features, num_heads, **options)
        self.dropouts = nn.ModuleList(nn.Dropout(dropout) for _ in range(num_heads if head_dropout else 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base_layer(x)
        weights = torch.softmax(self.lora_route(x).float(), dim=-1).to(result.dtype)
        if self.head_dropout:
            h = self.lora_A(x)
            inputs = [dropout(h) for dropout in self.dropouts]
        else:
            h = self.lora_A(self.dropouts[0](x))
            inputs = [h] * len(self.lora_B)
        for i, head in enumerate(self.lora_B):
            result = result + weights[..., i : i + 1] * head(inputs[i]).to(result.dtype) * self.scaling
        return result


def wrap_in_loops(model: nn.Module, targets: tuple[str, ...], **kwargs) -> nn.Module:
    """Replace the target layers and freeze everything else."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in targets:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoopLinear(module, **kwargs))
    return model
