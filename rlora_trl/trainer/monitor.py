"""Collects the routing statistics of a step: balance losses, and how evenly heads are used."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..analysis.heads import head_cosines, mean_between
from ..kernels import RoutingStats, RoutingTally
from ..reading import shorten
from ..tuner import MultiHeadAdapter


# In a state. Readers of checkpoints take files of at most four million values.
_MOST_NUMBERS = 1_000_000


class RoutingMonitor:
    """
    Creates the tally of each micro-batch, and sums the statistics that the layers add to it.

    A balance loss is the mean over layers, and over micro-batches and ranks by the tokens that count, so that its
    coefficient means the same however a batch is split. A weight of experts is one layer: each expert has a row of
    statistics, and counts by the tokens that it gets.

    Args:
        adapters (`Sequence[MultiHeadAdapter]`): The adapters in training that have a router, with equally many heads.
        kind (`str`): The balance loss, one of `BALANCE_LOSSES`.
        coefficient (`float`): Weight of the balance loss.
        whole_step (`bool`): Use the shares of heads over the whole step rather than over the micro-batch.
        device (`torch.device`): Device of the adapters.

    Raises:
        ValueError: If adapters have different numbers of heads.
    """

    def __init__(
        self,
        adapters: Sequence[MultiHeadAdapter],
        kind: str,
        coefficient: float,
        whole_step: bool,
        device: torch.device,
    ) -> None:
        heads = {adapter.num_heads for adapter in adapters}
        if len(heads) != 1:
            raise ValueError(
                f"Adapters that train together must have the same number of heads, got {sorted(heads)}. Set the same "
                "`num_heads` for all of them."
            )
        self.adapters = list(adapters)
        self.num_heads = heads.pop()
        self.kind, self.coefficient, self.whole_step = kind, coefficient, whole_step
        self.factor = 0.0
        self.expected_tokens = 0.0
        # For the scope of the whole step: remaining tokens of this rank and of the other ranks, and sums of the step
        # before for one token of a layer [R, 1 + 2 N], over all ranks, on this rank and on the others.
        self.rank_tokens = self.other_tokens = torch.zeros((), device=device)
        self.prior: torch.Tensor | None = None
        self.prior_of_rank = self.prior_of_others = torch.zeros((), device=device)
        # Rows of statistics: one for a linear layer, and one for each expert.
        sizes = [adapter.num_experts or 1 for adapter in self.adapters]
        for adapter, end, size in zip(self.adapters, itertools.accumulate(sizes), sizes, strict=True):
            adapter.routing_row = end - size
        self.layer_of_row = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device)  # [R]
        # Of the running step, and of the steps since the last summary.
        self.step = RoutingStats.zeros(sum(sizes), self.num_heads, device)
        self.unlogged = RoutingStats.zeros(sum(sizes), self.num_heads, device)

    def begin_step(
        self, tokens: torch.Tensor, average_over: int, reduce: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """
        End the step before, and set the number of tokens of the next one.

        Args:
            tokens (`torch.Tensor`): Tokens of this rank's micro-batches that count, a scalar.
            average_over (`int`): Ranks whose gradients will be averaged.
            reduce (`Callable`): Sums a tensor over the ranks.
        """
        # One collective for the tokens of this step and the shares of the step before.
        rank_sums = tokens.reshape(1).to(self.step.data)
        if self.whole_step:
            rank_sums = torch.cat([rank_sums, self._share_sums()])
        sums = reduce(rank_sums)
        if self.whole_step:
            self._set_prior(sums[1:], rank_sums[1:])

        self.unlogged.data.add_(self.step.data)
        self.step.data.zero_()
        self.expected_tokens, self.rank_tokens = float(sums[0]), rank_sums[0]
        self.other_tokens = self.expected_tokens - self.rank_tokens
        self.factor = self.coefficient * average_over / (len(self.adapters) * max(self.expected_tokens, 1.0))

    def _share_sums(self) -> torch.Tensor:
        """The tokens `[R]` and the sums behind f and P `[R, 2 N]` of the step, in one row."""
        return torch.cat([self.step.tokens, self.step.head_shares.flatten()])

    def _of_layers(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over the rows of each layer, `[R]` or `[R, n]` to `[L]` or `[L, n]`."""
        return values.new_zeros(len(self.adapters), *values.shape[1:]).index_add_(0, self.layer_of_row, values)

    def _rates(self, sums: torch.Tensor) -> torch.Tensor:
        """Tokens, f and P of rows for one token of their layer `[R, 1 + 2 N]`, from [`_share_sums`]."""
        rows = len(self.layer_of_row)
        tokens, shares = sums[:rows], sums[rows:].view(rows, -1)
        of_layer = self._of_layers(tokens).clamp(min=1.0)[self.layer_of_row]
        return torch.cat([tokens[:, None], shares], 1) / of_layer[:, None]

    def _set_prior(self, sums: torch.Tensor, rank_sums: torch.Tensor) -> None:
        # No tokens at the start of a run, nor in the first step after a checkpoint, which has loaded the shares.
        if not bool((self._of_layers(sums[: len(self.layer_of_row)]) > 0).all()):
            return
        self.prior, self.prior_of_rank = self._rates(sums), self._rates(rank_sums)
        self.prior_of_others = self._rates(sums - rank_sums)

    def tally(self, divided_by: int, tokens: torch.Tensor | int) -> RoutingTally:
        """
        The tally of one micro-batch.

        Args:
            divided_by (`int`): Divisor that the trainer applies to the loss of a micro-batch, besides the loss's own.
            tokens (`torch.Tensor` or `int`): Tokens of the micro-batch that count.
        """
        prior = rows = None
        if self.whole_step and self.prior is not None:
            # For tokens not seen yet, the shares of the step before are used: those of the other ranks, and those of
            # this rank for the rest of its micro-batches.
            self.rank_tokens = self.rank_tokens - tokens
            left = (self.other_tokens + self.rank_tokens).clamp(min=1.0)
            rates = (self.other_tokens * self.prior_of_others + self.rank_tokens * self.prior_of_rank) / left
            rows = rates[:, 0]
            prior = rates[:, 1:] / rows[:, None].clamp(min=torch.finfo(rates.dtype).tiny)
        return RoutingTally(
            self.step,
            self.kind,
            self.factor * divided_by,
            self.whole_step,
            self.expected_tokens,
            prior,
            rows,
        )

    def restart(self) -> None:
        """Discard all statistics that were not logged."""
        self.step.data.zero_()
        self.unlogged.data.zero_()

    def drop_step(self) -> None:
        """Discard the statistics of the running step."""
        self.step.data.zero_()

    def summary(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """
        Statistics since the last call, over all ranks: means over layers.

        Args:
            reduce (`Callable`): Sums a tensor over the ranks.

        Returns:
            `dict[str, float]`: `balance_loss` (without the coefficient), `router_entropy` (nats, of one token's
            probabilities), `head_load_max` (mean weight of the most used head of a layer) and `head_load_cv` (standard
            deviation over mean of the heads' mean weights). Layers without tokens are left out; empty if all are. In
            a layer of experts, these are means over experts by their tokens.
        """
        stats = self.step._replace(data=reduce(self.unlogged.data + self.step.data).cpu().double())
        # The sums of the running step are logged now, and must not be counted again at its end.
        self.unlogged.data.copy_(-self.step.data)
        # A layer may have had no tokens: a tower without its input, a head that the loss doesn't use.
        tokens, layers = stats.tokens, self.layer_of_row.cpu()
        of_layer = tokens.new_zeros(len(self.adapters)).index_add_(0, layers, tokens)  # [L]
        if not bool((of_layer > 0).any()):
            return {}

        load = stats.head_weights / tokens[:, None]  # [R, N]
        by_row = {
            "balance_loss": stats.loss / tokens,
            "router_entropy": stats.entropy / tokens,
            "head_load_max": load.amax(1),
            "head_load_cv": load.std(1, correction=0) / load.mean(1),
        }
        if self.kind == "none":
            del by_row["balance_loss"]
        # Experts by their tokens, then the mean over layers.
        values = torch.where(tokens > 0, torch.stack(list(by_row.values())), 0.0)  # [4, R]
        shares = tokens / of_layer.clamp(min=1.0)[layers] / (of_layer > 0).sum()
        return dict(zip(by_row, (values * shares).sum(1).tolist(), strict=True))

    def state(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> list[list[float]] | None:
        """
        The state for an exact resume: sums of the last step on each rank.

        Args:
            gather (`Callable`): Concatenates `[1, n]` of all ranks to `[ranks, n]`.

        Returns:
            `list[list[float]]` or `None`: A row for each rank, or one for all where experts on many ranks have too
            many numbers for a state in JSON; `None` unless the scope is the whole step, and if a sum is not finite.
        """
        if not self.whole_step:
            return None
        sums = gather(self._share_sums()[None])
        if sums.numel() > _MOST_NUMBERS:
            sums = sums.sum(0, keepdim=True)
        return sums.tolist() if bool(sums.isfinite().all()) else None

    def load_state(self, state: list[list[float]] | None, rank: int, ranks: int) -> None:
        """
        Load the result of [`state`]; on another number of ranks, each takes an equal part as its own.

        Raises:
            ValueError: If it does not have the numbers of this adapter.
        """
        if state is None or not self.whole_step:
            return
        numbers = self._share_sums().numel()
        rows = state if isinstance(state, list) else [None]
        if not rows or not all(_is_row(row, numbers) for row in rows):
            raise ValueError(f"the sums of heads must be lists of {numbers} numbers, got {shorten(state)}")
        sums = torch.tensor(state, device=self.step.data.device)
        self._set_prior(sums.sum(0), sums[rank] if len(sums) == ranks else sums.sum(0) / ranks)


def _is_row(row: Any, numbers: int) -> bool:
    """Whether a value is a list of that many numbers which fit into a float32."""
    return (
        isinstance(row, list)
        and len(row) == numbers
        and all(type(value) in (int, float) and abs(value) < 1e38 for value in row)
    )


def head_similarity(adapters: Sequence[MultiHeadAdapter]) -> float | None:
    """
    The mean cosine similarity of the heads B of an adapter, over pairs of heads and adapters.

    Args:
        adapters (`Sequence[MultiHeadAdapter]`): The adapters in training.

    Returns:
        `float` or `None`: `None` with a single head, and on a rank that holds shards (DeepSpeed ZeRO-3, FSDP).
    """
    cosines = []
    for adapter in adapters:
        B = adapter.B.detach()
        if type(B) is not torch.Tensor or B.numel() == 0 or B.shape[-3] < 2:
            return None
        cosines.append(mean_between(head_cosines(B)))
    return torch.stack(cosines).mean().item() if cosines else None
