"""Initial values of a multi-head adapter, as functions that fill tensors in place."""

import math

import torch
from torch import nn


INIT_SCHEMES = ("rlora", "zero_a", "zero_b", False)
ROUTER_INITS = ("zeros", "kaiming_uniform")


def table1_std(d_out: int, fan: int, gamma: float) -> float:
    """
    Standard deviation of Table 1 of the R-LoRA paper: `d_out^(1/4) / sqrt(gamma) / sqrt(fan)`.

    Args:
        d_out (`int`): Output features of the layer.
        fan (`int`): Input features of the layer for `A`, its output features for `B`.
        gamma (`float`): Constant of Table 1.
    """
    return d_out**0.25 / math.sqrt(gamma) / math.sqrt(fan)


def init_heads_(A: torch.Tensor, B: torch.Tensor, scheme: str | bool, gamma: float) -> None:
    """
    Fill `A` and the head matrices `B`.

    - `"rlora"`: Table 1 of the paper. A ~ N(0, 1/d_in) and B_i ~ N(0, 1/d_out), each times
      d_out^(1/4)/sqrt(gamma). The authors' code has r^(1/4) and applies the factor once for each head to A.
    - `"zero_a"`: B as above, A zero. `"zero_b"`: A Kaiming-uniform, B zero, as in LoRA and HydraLoRA.
    - `False`: both Kaiming-uniform, so that the delta is not zero; for tests.

    Args:
        A (`torch.Tensor` of shape `[r, d_in]` or `[N, r, d_in]`): Down-projection, shared or one for each head.
        B (`torch.Tensor` of shape `[N, d_out, r]`): Head matrices.
        scheme (`str` or `bool`): One of the above.
        gamma (`float`): Constant of Table 1.
    """
    d_in, d_out = A.shape[-1], B.shape[1]
    with torch.no_grad():
        if scheme == "rlora":
            A.normal_(0.0, table1_std(d_out, d_in, gamma))
        elif scheme == "zero_a":
            A.zero_()
        else:
            nn.init.kaiming_uniform_(A.view(-1, d_in), a=math.sqrt(5))

        if scheme in ("rlora", "zero_a"):
            B.normal_(0.0, table1_std(d_out, d_out, gamma))
        elif scheme == "zero_b":
            B.zero_()
        else:
            for head in B:
                nn.init.kaiming_uniform_(head, a=math.sqrt(5))


def init_router_(router: torch.Tensor, scheme: str) -> None:
    """
    Fill the router `[N, d_in]`, or `[tasks, N]` for a task router.

    `"zeros"` gives equal head weights, `"kaiming_uniform"` is what the authors' code does.
    """
    with torch.no_grad():
        if scheme == "zeros":
            router.zero_()
        else:
            nn.init.kaiming_uniform_(router, a=math.sqrt(5))
