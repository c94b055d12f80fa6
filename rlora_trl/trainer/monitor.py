"""What layers record of a step: balance losses, and how evenly heads are used."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..analysis.heads import head_cosines, mean_between
from ..kernels import RoutingTally
from ..kernels.balance import new_record
from ..kernels.rank_space import Layout
from ..tuner import MultiHeadAdapter


class RoutingMonitor:
    """
    Gives each micro-batch a tally for its layers to write to, and adds up what they wrote.

    A balance loss is the mean over layers, and over micro-batches and ranks by the tokens that count, so that its
    coefficient means the same however a batch is split.

    Args:
        adapters (`Sequence[MultiHeadAdapter]`): The adapters in training that have a router, with equally many heads.
        kind (`str`): The balance loss, one of `BALANCE_LOSSES`.
        coefficient (`float`): What it is multiplied by.
        whole_step (`bool`): Take the shares of heads over the whole step rather than the micro-batch.
        device (`torch.device`): Where the adapters compute.

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
            raise ValueError(f"Adapters trained together need one number of heads, got {sorted(heads)}.")
        self.adapters = list(adapters)
        self.num_heads = heads.pop()
        self.kind, self.coefficient, self.whole_step = kind, coefficient, whole_step
        self.factor = 0.0
        self.expected_tokens = 0.0
        # For the scope of the whole step: tokens that this rank and the others still have, and shares `[L, 2 N]` of
        # the step before: of all ranks, of this one, of the others.
        self.own_left = self.others = torch.zeros((), device=device)
        self.prior: torch.Tensor | None = None
        self.prior_own = self.prior_others = torch.zeros((), device=device)
        self.step = new_record(len(adapters), self.num_heads, device)
        self.logged = torch.zeros_like(self.step)
        for row, adapter in enumerate(self.adapters):
            adapter.routing_row = row

    def begin_step(
        self, tokens: torch.Tensor, average_over: int, reduce: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """
        Close the record of the step before, and take in how many tokens the next one has.

        Args:
            tokens (`torch.Tensor`): Tokens of this rank's micro-batches that count, a scalar.
            average_over (`int`): Ranks whose gradients will be averaged.
            reduce (`Callable`): Sums a tensor over the ranks.
        """
        own = tokens.reshape(1).to(self.step)
        if self.whole_step:  # one collective for both
            own = torch.cat([own, self._counts_and_heads()])
        sums = reduce(own)
        if self.whole_step:
            self._set_prior(sums[1:], own[1:])
        self.logged += self.step
        self.step.zero_()
        self.expected_tokens, self.own_left = float(sums[0]), own[0]
        self.others = self.expected_tokens - self.own_left
        self.factor = self.coefficient * average_over / (len(self.adapters) * max(self.expected_tokens, 1.0))

    def _counts_and_heads(self) -> torch.Tensor:
        """Tokens of each layer, and the sums that f and P are made from, in one row."""
        return torch.cat([self.step[:, 0], self.step[:, 3 : 3 + 2 * self.num_heads].flatten()])

    def _shares(self, sums: torch.Tensor) -> torch.Tensor:
        """f and P `[L, 2 N]` from what [`_counts_and_heads`] gives."""
        layers = len(self.adapters)
        return sums[layers:].view(layers, -1) / sums[:layers, None].clamp(min=1.0)

    def _set_prior(self, sums: torch.Tensor, own: torch.Tensor) -> None:
        if not bool((sums[: len(self.adapters)] > 0).all()):
            return  # nothing was recorded: the run begins, or goes on from a checkpoint that told the shares
        self.prior, self.prior_own = self._shares(sums), self._shares(own)
        self.prior_others = self._shares(sums - own)

    def tally(self, divided_by: int, tokens: torch.Tensor | int) -> RoutingTally:
        """
        The tally of one micro-batch.

        Args:
            divided_by (`int`): What the trainer will divide the loss of a micro-batch by, beside what the loss itself
                was divided by.
            tokens (`torch.Tensor` or `int`): Tokens of the micro-batch that count.
        """
        prior = None
        if self.whole_step and self.prior is not None:
            # What is not seen yet: other ranks, which are taken to be as in the step before, and what is left of this
            # rank's own part, which is taken to be as its own was.
            self.own_left = self.own_left - tokens
            left = (self.others + self.own_left).clamp(min=1.0)
            prior = (self.others * self.prior_others + self.own_left * self.prior_own) / left
            # Rows that start at multiples of 16 bytes, which the kernels like.
            prior = torch.nn.functional.pad(prior, (0, -prior.shape[1] % 4))
        return RoutingTally(
            self.step,
            self.kind,
            self.factor * divided_by,
            self.whole_step,
            self.expected_tokens,
            prior,
        )

    def restart(self) -> None:
        """Forget all that was recorded and not logged."""
        self.step.zero_()
        self.logged = torch.zeros_like(self.step)

    def drop_step(self) -> None:
        """Forget what the running step has recorded."""
        self.step.zero_()

    def summary(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """
        What was recorded since the last call, over all ranks: means over layers.

        Args:
            reduce (`Callable`): Sums a tensor over the ranks.

        Returns:
            `dict[str, float]`: `balance_loss` (without the coefficient), `router_entropy` (nats, of one token's
            probabilities), `head_load_max` (mean weight of the most used head of a layer) and `head_load_cv` (standard
            deviation over mean of the heads' mean weights). Empty if nothing was recorded.
        """
        record = reduce(self.logged + self.step).cpu().double()
        self.logged = -self.step  # what the running step has so far is told already
        tokens = record[:, :1]
        if not bool((tokens > 0).all()):
            return {}
        columns = Layout(self.num_heads, 1).statistics_columns
        load = record[:, 3 + 2 * self.num_heads : columns] / tokens  # [L, N]
        values = [
            record[:, columns : columns + 1] / tokens,
            record[:, 2:3] / tokens,
            load.amax(1),
            load.std(1, correction=0) / load.mean(1),
        ]
        means = torch.stack([value.mean() for value in values]).tolist()
        named = dict(zip(("balance_loss", "router_entropy", "head_load_max", "head_load_cv"), means, strict=True))
        if self.kind == "none":
            del named["balance_loss"]
        return named

    def state(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> list[list[float]] | None:
        """
        What a resumed run needs to go on as this one: the sums of the step that ended last, of each rank.

        Args:
            gather (`Callable`): Joins `[1, n]` of all ranks to `[ranks, n]`.
        """
        return gather(self._counts_and_heads()[None]).tolist() if self.whole_step else None

    def load_state(self, state: list[list[float]] | None, rank: int, ranks: int) -> None:
        """Take up what [`state`] gave; on another number of ranks, each takes an equal part to have been its own."""
        if state is None or not self.whole_step:
            return
        sums = torch.tensor(state, device=self.step.device)
        self._set_prior(sums.sum(0), sums[rank] if len(sums) == ranks else sums.sum(0) / ranks)


def head_similarity(adapters: Sequence[MultiHeadAdapter]) -> float | None:
    """
    The mean cosine between the heads B of an adapter, over pairs and adapters.

    `None` on a rank that holds only parts of the heads (DeepSpeed ZeRO-3, FSDP), or with a single head.
    """
    cosines = []
    for adapter in adapters:
        B = adapter.B.detach()
        if B.shape[0] < 2 or type(B) is not torch.Tensor or B.numel() == 0:
            return None
        cosines.append(mean_between(head_cosines(B)))
    return torch.stack(cosines).mean().item() if cosines else None
