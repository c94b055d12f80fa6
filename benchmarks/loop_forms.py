"""HydraLoRA and R-LoRA as published: one loop over heads, each with products of its own.

Written from the formulas of the papers (HydraLoRA arXiv 2404.19245, R-LoRA arXiv 2502.15455), with the operations of
their published code in its order. Over heads i, with s the scaling and w the softmax (float32) of the logits:

    HydraLoRA   y = W x + sum_i w_i B_i (A drop(x)) s       a fresh mask on x in each iteration
    R-LoRA      y = W x + sum_i w_i B_i (drop(A x)) s       a fresh mask on A x in each iteration

Both compute the product with A inside the loop, once for each head, and autograd saves the tensors of each iteration.
`a_once` moves it out, which changes only the cost of R-LoRA; HydraLoRA then has one mask for all heads.
"""

import torch
from torch import nn


class LoopLinear(nn.Module):
    """
    A frozen linear layer with N heads, computed one after the other.

    Args:
        base (`nn.Linear`): The layer.
        r (`int`), num_heads (`int`), scaling (`float`): Rank of the heads, their number, and the factor of their sum.
        dropout (`float`): Probability that an element is dropped.
        head_dropout (`bool`): Dropout on A x (R-LoRA) rather than on x (HydraLoRA).
        a_once (`bool`, *optional*, defaults to `False`): Compute A x once, before the loop.
    """

    def __init__(
        self,
        base: nn.Linear,
        r: int,
        num_heads: int,
        scaling: float,
        dropout: float,
        head_dropout: bool,
        a_once: bool = False,
    ) -> None:
        super().__init__()
        self.base_layer, self.scaling, self.head_dropout, self.a_once = base, scaling, head_dropout, a_once
        # In float32, as their trainers keep them; autocast runs their products in 16 bits.
        options = {"bias": False, "device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(base.in_features, r, **options)
        self.lora_B = nn.ModuleList(nn.Linear(r, base.out_features, **options) for _ in range(num_heads))
        self.lora_route = nn.Linear(base.in_features, num_heads, **options)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., d_in]` to `[..., d_out]`, in the dtype of the base layer's output."""
        result = self.base_layer(x)
        weights = torch.softmax(self.lora_route(x), dim=-1, dtype=torch.float32).to(result.dtype)
        h_once = None
        if self.a_once:
            h_once = self.lora_A(x if self.head_dropout else self.dropout(x))  # [..., r]
        for i, head in enumerate(self.lora_B):
            if self.head_dropout:
                h = self.dropout(self.lora_A(x) if h_once is None else h_once)
            else:
                h = self.lora_A(self.dropout(x)) if h_once is None else h_once
            result = result + weights[..., i].unsqueeze(-1) * head(h) * self.scaling
        return result


def wrap_in_loops(model: nn.Module, targets: tuple[str, ...], **kwargs) -> nn.Module:
    """Replace the target layers, by their last name, and freeze everything else; `kwargs` as in [`LoopLinear`]."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in targets:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoopLinear(module, **kwargs))
    return model
