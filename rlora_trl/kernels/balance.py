"""Balance losses keep all heads of a router in use; how their gradients enter the backward pass.

A balance loss depends only on the router's logits, so each layer adds its gradient where the backward pass computes
the gradient of the logits. The forward pass only stores a few sums per layer; anything that it collected would be lost
or counted twice under gradient checkpointing.

With p_t the softmax of the logits of token t, P_i and f_i the mean over the tokens that count of p_ti and of [head i
has the largest p_t], and H the entropy:

    switch               N sum_i f_i P_i                       Fedus et al. 2021, arXiv 2101.03961, section 2.2
    importance           CV^2 of P = N sum_i P_i^2 - 1         Shazeer et al. 2017, arXiv 1701.06538, section 4
    mutual_information   -(H(P) - mean_t H(p_t))               Chen et al. 2022 (Mod-Squad), arXiv 2212.08066
    z                    mean_t (log sum_i exp l_ti)^2         Zoph et al. 2022 (ST-MoE), arXiv 2202.08906, section 3

For one token, the gradient of each loss has N + 2 coefficients (`coeffs`): the derivatives for p_ti, which depend only
on the sums (N f_i, 2 N P_i, log P_i, 0), one for the entropy of the token, and one for its squared log-sum-exp.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .rank_space import Layout, stats_columns


# Rows of float32 start at multiples of 16 bytes, which loads and stores of the kernels prefer.
_ALIGNED_COLUMNS = 4


class RoutingStats(NamedTuple):
    """
    Sums over the tokens that count, one row for each of L layers, with a name for each group of columns. Each expert
    is a layer here, whose tokens are those that it gets.

    Args:
        data (`torch.Tensor` of shape `[L, at least 3 + 3 N + 1]`): The columns of `rank_space.routing_stats`, then the
            balance loss times its tokens.
        num_heads (`int`): N.
    """

    data: torch.Tensor
    num_heads: int

    @classmethod
    def zeros(cls, num_layers: int, num_heads: int, device: torch.device | str | None = None) -> RoutingStats:
        """Statistics of no tokens."""
        columns = stats_columns(num_heads) + 1
        return cls(torch.zeros(num_layers, columns + -columns % _ALIGNED_COLUMNS, device=device), num_heads)

    @property
    def tokens(self) -> torch.Tensor:
        """Tokens that count, `[L]`."""
        return self.data[:, 0]

    @property
    def entropy(self) -> torch.Tensor:
        """Entropies of the probabilities, in nats, `[L]`."""
        return self.data[:, 2]

    @property
    def head_shares(self) -> torch.Tensor:
        """The sums behind f, then those behind P, `[L, 2 N]`."""
        return self.data[:, 3 : 3 + 2 * self.num_heads]

    @property
    def head_weights(self) -> torch.Tensor:
        """Weights of the heads, `[L, N]`."""
        return self.data[:, 3 + 2 * self.num_heads : stats_columns(self.num_heads)]

    @property
    def loss(self) -> torch.Tensor:
        """The balance loss times the tokens of its micro-batch, `[L]`."""
        return self.data[:, stats_columns(self.num_heads)]


_serials = itertools.count()
# By serial number, for the operators of compiled graphs: a tensor can hold a number, but no object.
_tallies: weakref.WeakValueDictionary[int, RoutingTally] = weakref.WeakValueDictionary()


@dataclass
class RoutingTally:
    """
    The balance loss of one micro-batch, which all layers share during its forward and backward pass.

    Args:
        stats ([`RoutingStats`]): Each layer adds its sums to its row.
        kind (`str`, *optional*, defaults to `"none"`): One of `BALANCE_LOSSES`.
        factor (`float`, *optional*, defaults to `0.0`):
            Factor of the gradient of the sum over tokens: the coefficient divided by the layers and by the tokens of
            the whole step.
        whole_step (`bool`, *optional*, defaults to `False`):
            Use shares of heads over the step so far rather than over the micro-batch.
        expected_tokens (`float`, *optional*, defaults to `0.0`):
            Tokens of the whole step on all ranks, for `whole_step`.
        prior (`torch.Tensor` of shape `[L, 2 N]`, *optional*):
            Shares f and P of the step before, on all ranks, for `whole_step`. They stand in for the part of the step
            that this rank has not seen.
        prior_rows (`torch.Tensor` of shape `[L]`, *optional*):
            Shares of the experts in the rows of their layer in the step before, with `prior`; 1 for other layers.
        upstream (`torch.Tensor`, *optional*):
            The gradient that the loss of the micro-batch receives, including any loss scaling. Set by
            [`capture_loss_grad`]; until then layers add no gradient.

    Attributes:
        ticket (`torch.Tensor`): A scalar on the CPU by which [`tally_of`] finds the tally while it lives.
    """

    stats: RoutingStats
    kind: str = "none"
    factor: float = 0.0
    whole_step: bool = False
    expected_tokens: float = 0.0
    prior: torch.Tensor | None = None
    prior_rows: torch.Tensor | None = None
    upstream: torch.Tensor | None = None
    ticket: torch.Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.prior is not None:
            self.prior = torch.nn.functional.pad(self.prior, (0, -self.prior.shape[1] % _ALIGNED_COLUMNS))
        serial = next(_serials)
        _tallies[serial] = self
        self.ticket = torch.tensor(serial, dtype=torch.int64, device="cpu")


def tally_of(ticket: torch.Tensor) -> RoutingTally:
    """
    The tally with this ticket.

    Raises:
        RuntimeError: If the tally no longer exists.
    """
    serial = int(ticket)
    tally = _tallies.get(serial)
    if tally is None:
        raise RuntimeError(
            f"A backward pass reports to routing tally {serial}, which no longer exists. Keep a reference to the "
            "tally until its backward pass has finished."
        )
    return tally


class LayerProbe(NamedTuple):
    """The tally, one layer's row in it, and a mask `[T]` (`uint8`) of the tokens that count, unless all do."""

    tally: RoutingTally
    row: int
    token_mask: torch.Tensor | None = None

    def finish(self, ops: ModuleType, partials: torch.Tensor, layout: Layout) -> torch.Tensor | None:
        """
        Add the sums of the layer to its statistics, at the start of its backward pass.

        Args:
            ops (`ModuleType`): The back end, see `fused.backend`.
            partials (`torch.Tensor` of shape `[rows, 3 + 3 N]`): Partial sums of `rank_space.routing_stats`.
            layout ([`Layout`]): Of the layer.

        Returns:
            `torch.Tensor` of shape `[N + 2]` or `None`: Coefficients of the gradient of the balance loss, if there is
            one.
        """
        tally = self.tally
        active = tally.kind != "none" and tally.upstream is not None
        return ops.finalize_routing_stats(
            partials,
            tally.stats.data[self.row],
            tally.prior[self.row] if tally.prior is not None and tally.whole_step else None,
            layout,
            kind=tally.kind,
            factor=tally.factor,
            whole_step=tally.whole_step,
            expected_tokens=tally.expected_tokens,
            upstream=tally.upstream if active else None,
        )


class _CaptureLossGrad(torch.autograd.Function):
    """The identity; its backward pass, which runs before that of all layers, keeps the gradient of the loss."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, tally: RoutingTally) -> torch.Tensor:
        ctx.tally = tally
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.tally.upstream = grad.detach().float()
        return grad, None


def capture_loss_grad(loss: torch.Tensor, tally: RoutingTally) -> torch.Tensor:
    """
    The identity on a loss, whose backward pass stores the incoming gradient in `tally`.

    Balance gradients are then scaled like the loss itself (fp16 loss scaling, DeepSpeed, accumulation).

    Args:
        loss (`torch.Tensor`): The loss of a micro-batch, a scalar.
        tally ([`RoutingTally`]): The tally of its layers.

    Returns:
        `torch.Tensor`: The loss.
    """
    return _CaptureLossGrad.apply(loss, tally)
