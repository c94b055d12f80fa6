"""Losses that keep the heads of a router in use, and how their gradients enter the backward pass.

A balance loss is a function of the router's logits alone, so its gradient is added where the gradient of the logits is
made: in the backward pass of each layer. Nothing is collected in the forward pass, where gradient checkpointing would
lose or double it, and no tensor is kept for it but a few sums of each layer.

With p_t the softmax of the logits of token t, P_i and f_i the mean over the tokens that count of p_ti and of [head i
has the largest p_t], and H the entropy:

    switch               N sum_i f_i P_i                       Fedus et al. 2021, arXiv 2101.03961, section 2.2
    importance           CV^2 of P = N sum_i P_i^2 - 1         Shazeer et al. 2017, arXiv 1701.06538, section 4
    mutual_information   -(H(P) - mean_t H(p_t))               Chen et al. 2022 (Mod-Squad), arXiv 2212.08066
    z                    mean_t (log sum_i exp l_ti)^2         Zoph et al. 2022 (ST-MoE), arXiv 2202.08906, section 3

Each has, for one token, a derivative for p_ti that depends on the sums alone (N f_i, 2 N P_i, log P_i, 0), one for the
token's entropy and one for its squared log-sum-exp: these N + 2 numbers are the `slope`.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import rank_space
from .rank_space import Layout


BALANCE_LOSSES = ("none", "switch", "importance", "mutual_information", "z")


def balance_loss(logits: torch.Tensor, kind: str, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """
    The balance loss of one layer, written out, for autograd; in float32 or wider.

    Args:
        logits (`torch.Tensor` of shape `[T, N]`): The router's logits.
        kind (`str`): One of `BALANCE_LOSSES`; "none" gives zero.
        token_mask (`torch.Tensor` of shape `[T]`, *optional*): Non-zero for the tokens that count.

    Returns:
        `torch.Tensor`: A scalar.

    Raises:
        ValueError: If `kind` is unknown.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if token_mask is not None:
        logits = logits[token_mask.bool()]
    num_heads = logits.shape[-1]
    p = logits.softmax(-1)
    mean = p.mean(0)
    if kind == "none":
        return logits.new_zeros(())
    if kind == "switch":
        top = (p == p.amax(-1, keepdim=True)).to(p.dtype)
        return num_heads * ((top / top.sum(-1, keepdim=True)).mean(0) * mean).sum()
    if kind == "importance":
        return mean.var(correction=0) / mean.mean() ** 2
    if kind == "mutual_information":
        return (mean * mean.log()).sum() - (p * logits.log_softmax(-1)).sum(-1).mean()
    if kind == "z":
        return (logits.logsumexp(-1) ** 2).mean()
    raise ValueError(f"`kind` must be one of {', '.join(BALANCE_LOSSES)}, got {kind!r}. Use 'switch', for example.")


_serials = itertools.count()
# By serial number, for operators of compiled graphs: a number can be the value of a tensor, which an object can't.
_tallies: weakref.WeakValueDictionary[int, RoutingTally] = weakref.WeakValueDictionary()


@dataclass
class RoutingTally:
    """
    What the layers share during the forward and backward passes of one micro-batch, and where they write their sums.

    Args:
        record (`torch.Tensor` of shape `[L, at least 3 + 3 N + 1]`):
            A row for each layer, to which its `rank_space.statistics` are added, and in the column after them its loss
            times its tokens. See [`new_record`].
        kind (`str`): One of `BALANCE_LOSSES`.
        factor (`float`):
            What the gradient of the sum over tokens is multiplied by: the coefficient over layers and tokens of the
            whole step.
        whole_step (`bool`): Take shares of heads over the whole step, as far as they are known, not the micro-batch.
        expected_tokens (`float`): Tokens of the whole step on all ranks, for `whole_step`.
        prior (`torch.Tensor` of shape `[L, at least 2 N]`, *optional*):
            Shares f and P of the step before, on all ranks, for `whole_step`. They stand in for the part of the step
            that this rank has not seen.
        upstream (`torch.Tensor`, *optional*):
            The gradient that the loss of the micro-batch receives, with any loss scaling in it. Set by
            [`capture_loss_grad`]; until then layers add no gradient.

    Attributes:
        ticket (`torch.Tensor`): A scalar on the CPU by which [`tally_of`] finds the tally, while it lives.
    """

    record: torch.Tensor
    kind: str = "none"
    factor: float = 0.0
    whole_step: bool = False
    expected_tokens: float = 0.0
    prior: torch.Tensor | None = None
    upstream: torch.Tensor | None = None
    ticket: torch.Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        serial = next(_serials)
        _tallies[serial] = self
        self.ticket = torch.tensor(serial, dtype=torch.int64, device="cpu")


def tally_of(ticket: torch.Tensor) -> RoutingTally:
    """
    The tally with this ticket.

    Raises:
        RuntimeError: If there is none any more.
    """
    serial = int(ticket)
    tally = _tallies.get(serial)
    if tally is None:
        raise RuntimeError(
            f"The routing tally {serial} that a backward pass was to report to is gone. Keep it until the "
            "backward pass is over."
        )
    return tally


def new_record(num_layers: int, num_heads: int, device: torch.device | str | None = None) -> torch.Tensor:
    """A record of zeros for [`RoutingTally`]; its rows start at multiples of 16 bytes, which the kernels like."""
    columns = Layout(num_heads, 1).statistics_columns + 1
    return torch.zeros(num_layers, -(-columns // 4) * 4, device=device)


class LayerProbe(NamedTuple):
    """The tally, the row of one layer in it, and a mask `[T]` (`uint8`) of the tokens that count, if not all do."""

    tally: RoutingTally
    row: int
    token_mask: torch.Tensor | None = None

    def close(self, ops: ModuleType, partials: torch.Tensor, layout: Layout) -> torch.Tensor | None:
        """Add the sums of a layer to the record; the slope of its balance loss, or `None` without one."""
        tally = self.tally
        active = tally.kind != "none" and tally.upstream is not None
        return ops.finalize_routing_stats(
            partials,
            tally.record[self.row],
            tally.prior[self.row] if tally.prior is not None and tally.whole_step else None,
            layout,
            kind=tally.kind,
            factor=tally.factor,
            whole_step=tally.whole_step,
            expected_tokens=tally.expected_tokens,
            upstream=tally.upstream if active else None,
        )


class _CaptureLossGrad(torch.autograd.Function):
    """The identity; its backward pass, which comes before that of all layers, notes the gradient of the loss."""

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
    """The loss of a micro-batch, through which its layers learn by what gradients are scaled (fp16, DeepSpeed)."""
    return _CaptureLossGrad.apply(loss, tally)


def report(P: torch.Tensor, dP: torch.Tensor, layout: Layout, probe: LayerProbe) -> torch.Tensor:
    """Add the sums of a layer to the record, and the gradient of its balance loss to `dP`, in place."""
    partials = rank_space.statistics(P, layout, probe.token_mask).unsqueeze(0)
    slope = probe.close(rank_space, partials, layout)
    if slope is not None:
        rank_space.logits_of(dP, layout).add_(rank_space.balance_gradient(P, layout, slope, probe.token_mask))
    return dP


class _ProbedProjections(torch.autograd.Function):
    """The identity on the projections P; the backward pass adds the gradient of the balance loss to the logits'."""

    @staticmethod
    def forward(
        ctx: Any,
        P: torch.Tensor,
        token_mask: torch.Tensor | None,
        ticket: torch.Tensor,
        row: int,
        layout: Layout,
    ) -> torch.Tensor:
        ctx.save_for_backward(P, token_mask, ticket)
        ctx.row, ctx.layout = row, layout
        return P.view_as(P)

    @staticmethod
    def backward(ctx: Any, dP: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        P, token_mask, ticket = ctx.saved_tensors
        # By name, as the operator is defined where this module is needed.
        return torch.ops.rlora_trl.record(P, dP, token_mask, ticket, ctx.row, *ctx.layout), None, None, None, None


def probe_projections(P: torch.Tensor, layout: Layout, probe: LayerProbe) -> torch.Tensor:
    """P `[T, K]` itself, with the balance loss attached to its logits, for forms that autograd takes apart."""
    return _ProbedProjections.apply(P, probe.token_mask, probe.tally.ticket, probe.row, layout)
