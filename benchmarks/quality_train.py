"""Training and scoring of the runs of `quality.py`, one or several of one shape side by side.

All trained parameters are one tensor `[K, P]`, a row for each run, so that clipping, AdamW, decay and averages are a
handful of operations, with settings that may differ between runs. Nothing waits for the device within a run.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from quality_data import MicroBatch
from torch import nn
from torch.nn import functional as F


ROLES = ("A", "B", "router")


@dataclass(frozen=True)
class TrainingOptions:
    """
    Settings of training that any method can have. All may differ between runs that train side by side.

    Args:
        a_ratio (`float`), b_ratio (`float`), router_ratio (`float`): Rates of A, B (LoRA+) and the router, as
            multiples of the learning rate.
        router_rate (`float`): Rate of the router.
        width_power (`float`): The rates of A and B are divided by (width / 1000) to this power, where the width is
            that of their longer side.
        weight_decay (`float`), decay_to (`str`): Decay towards "zero" or towards the initial values ("init").
        ema (`float`): Decay of an average of the weights, which is scored.
        warmup (`float`), schedule (`str`), floor (`float`): Share of the steps up, then "cosine", "linear" or
            "constant", down to a share of the learning rate.
        clip (`float`): Largest norm of a gradient.
        beta1 (`float`), beta2 (`float`), eps (`float`): AdamW's.
        dropout_until (`float`): Share of the steps with dropout.
        precondition (`float`): If not 0, gradients of A and B of lab adapters are multiplied by the inverses of B B^T
            and A A^T plus this share of their mean diagonal (arXiv 2402.02347).
    """

    a_ratio: float = 1.0
    b_ratio: float = 1.0
    router_ratio: float = 1.0
    router_rate: float | None = None
    width_power: float = 0.0
    weight_decay: float = 0.0
    decay_to: str = "zero"
    ema: float = 0.0
    warmup: float = 0.06
    schedule: str = "cosine"
    floor: float = 0.0
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    dropout_until: float = 1.0
    precondition: float = 0.0

    def __post_init__(self) -> None:
        for name, accepted in (("decay_to", ("zero", "init")), ("schedule", ("cosine", "linear", "constant"))):
            if getattr(self, name) not in accepted:
                raise ValueError(f"`{name}` must be one of {', '.join(accepted)}, got {getattr(self, name)!r}.")

    def rate(self, role: str, shape: Sequence[int], learning_rate: float) -> float:
        """The learning rate of a parameter."""
        if role == "router":
            return self.router_ratio * learning_rate if self.router_rate is None else self.router_rate
        ratio = self.a_ratio if role == "A" else self.b_ratio
        return learning_rate * ratio / (max(shape) / 1000) ** self.width_power

    def factor(self, step: int, steps: int) -> float:
        """Of the learning rate in a step."""
        warmup = max(1, round(self.warmup * steps))
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[self.schedule]
        return self.floor + (1 - self.floor) * shape


TRAINING_NAMES = frozenset(option.name for option in fields(TrainingOptions))


@dataclass
class Adapted:
    """
    A model with the adapters of K runs.

    Args:
        model (`nn.Module`): Called with `input_ids`; its head is a [`SelectedHead`].
        head ([`SelectedHead`]): That head.
        runs (`int`): K.
        parameters (`list`): Role, and parameter: `[K, ..]` if `stacked`.
        stacked (`bool`): The parameters have a dimension for the runs.
        autocast (`bool`): The model needs autocast, as its adapter is wider than its base.
        set_tasks (`Callable`): Called with the tasks of the rows before a forward pass.
        after_step (`Callable`): Called after each step.
        end_dropout (`Callable`): Turns dropout off.
        similarity (`Callable`): The mean cosine between the heads B by layer, if there are several.
    """

    model: nn.Module
    head: "SelectedHead"
    runs: int = 1
    parameters: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    stacked: bool = False
    autocast: bool = False
    set_tasks: Callable[[torch.Tensor], Any] | None = None
    after_step: Callable[[], Any] | None = None
    end_dropout: Callable[[], Any] | None = None
    similarity: Callable[[], dict[str, float]] | None = None

    def precision(self) -> Any:
        """A context for forward passes: autocast, if the model needs it."""
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, dtype=torch.bfloat16) if self.autocast else nullcontext()

    def logits(self, batch: MicroBatch) -> torch.Tensor:
        """The logits `[P, vocabulary]` at the batch's positions, in float32."""
        if self.set_tasks is not None:
            self.set_tasks(batch.tasks)
        self.head.positions = batch.positions
        with self.precision():
            return self.model(input_ids=batch.ids, use_cache=False).logits.float()

    def trainable(self) -> int:
        """Trained parameters of one run."""
        return sum(parameter.numel() for _, parameter in self.parameters) // self.runs


class SelectedHead(nn.Module):
    """The output head of a model, for chosen positions only, if any: most tokens of a prompt have no loss."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.positions: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.positions is None:
            return self.head(hidden)
        return self.head(hidden.flatten(0, -2).index_select(0, self.positions))


class FlatAdamW:
    """
    AdamW with clipping by run, decay to zero or to the initial values, and an average of the weights.

    Args:
        adapted ([`Adapted`]): Whose parameters.
        options (`Sequence[TrainingOptions]`), rates (`Sequence[float]`): Of the runs.
        steps (`int`): All steps.
    """

    def __init__(
        self, adapted: Adapted, options: Sequence[TrainingOptions], rates: Sequence[float], steps: int
    ) -> None:
        self.adapted, K = adapted, adapted.runs
        self.parameters = [parameter for _, parameter in adapted.parameters]
        device = self.parameters[0].device
        self.values = torch.cat([p.detach().float().reshape(K, -1) for p in self.parameters], 1)  # [K, P]
        self.gradients = torch.zeros_like(self.values)
        self.m, self.v = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self.views = self._views(self.values)
        for parameter, view, gradient in zip(self.parameters, self.views, self._views(self.gradients), strict=True):
            # Parameters of the library keep their own storage: it looks at their version counters.
            if adapted.stacked:
                parameter.data = view
            parameter.grad = gradient

        parts = [
            torch.tensor([o.rate(role, p.shape[-2:], rate) for o, rate in zip(options, rates, strict=True)])[
                :, None
            ].expand(K, p.numel() // K)
            for role, p in adapted.parameters
        ]
        self.rates = torch.cat(parts, 1).to(device)  # [K, P]

        def by_run(name: str) -> torch.Tensor:
            return torch.tensor([getattr(o, name) for o in options], device=device)[:, None]

        self.clip, self.eps = by_run("clip"), by_run("eps")
        self.beta1, self.beta2 = by_run("beta1"), by_run("beta2")
        schedule = torch.tensor([[o.factor(step, steps) for o in options] for step in range(steps)])
        self.schedule = schedule[..., None].to(device)  # [steps, K, 1]
        self.decay = by_run("weight_decay") if any(o.weight_decay for o in options) else None
        to_init = [o.decay_to == "init" and o.weight_decay > 0 for o in options]
        self.initial = None
        if any(to_init):
            self.initial = self.values * torch.tensor(to_init, device=device)[:, None]
        self.ema = by_run("ema") if any(o.ema for o in options) else None
        self.average = self.values.clone() if self.ema is not None else None
        self.step_number = 0
        self.pairs = self._pairs() if options[0].precondition else []
        self.damping = options[0].precondition

    def _views(self, flat: torch.Tensor) -> list[torch.Tensor]:
        sizes = [parameter.numel() // self.adapted.runs for parameter in self.parameters]
        return [part.view(p.shape) for part, p in zip(flat.split(sizes, 1), self.parameters, strict=True)]

    def _pairs(self) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """A and B of all layers, those of one shape together."""
        by_role = {role: [p for found, p in self.adapted.parameters if found == role] for role in ("A", "B")}
        alike: dict[tuple, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for A, B in zip(by_role["A"], by_role["B"], strict=True):
            members = alike.setdefault((A.shape, B.shape), ([], []))
            members[0].append(A)
            members[1].append(B)
        return list(alike.values())

    def _precondition(self) -> None:
        """Multiply gradients by inverses of Gram matrices; see [`TrainingOptions`]."""
        for pair in self.pairs:
            A, B = (torch.stack([p.detach() for p in side]) for side in pair)  # [L, K, N or 1, r, d]
            gram_B = B @ B.mT if A.shape[2] > 1 else (B @ B.mT).sum(2, keepdim=True)
            for gram, side in ((gram_B, pair[0]), (A @ A.mT, pair[1])):
                mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
                eye = torch.eye(gram.shape[-1], device=gram.device)
                # With a zero B nothing is known, and AdamW does not look at the scale.
                inverse = torch.linalg.inv_ex(gram + (self.damping * mean + 1e-12) * eye).inverse
                gradients = inverse @ torch.stack([p.grad for p in side])
                torch._foreach_copy_([p.grad for p in side], list(gradients.unbind(0)))

    @torch.no_grad()
    def step(self) -> None:
        if self.pairs:
            self._precondition()
        g, t = self.gradients, self.step_number + 1
        norm = torch.linalg.vector_norm(g, dim=1, keepdim=True)  # [K, 1]
        g.mul_((self.clip / (norm + 1e-6)).clamp_(max=1.0))
        self.m.lerp_(g, 1 - self.beta1)
        self.v.lerp_(g.mul_(g), 1 - self.beta2)
        root = (self.v / (1 - self.beta2**t)).sqrt_().add_(self.eps)
        rates = self.rates * self.schedule[self.step_number]
        update = (self.m / (1 - self.beta1**t)).div_(root)
        if self.decay is not None:
            target = self.values if self.initial is None else self.values - self.initial
            update.add_(target * self.decay)
        self.values.sub_(update.mul_(rates))
        if self.average is not None:
            # Early on, the mean of all values so far.
            weight = torch.maximum(1 - self.ema, torch.full_like(self.ema, 1 / (t + 1)))
            self.average.lerp_(self.values, weight)
        g.zero_()
        self.step_number += 1
        self._write(self.views)

    def _write(self, views: list[torch.Tensor]) -> None:
        if not self.adapted.stacked:
            torch._foreach_copy_(self.parameters, views)

    @torch.no_grad()
    def use_average(self) -> None:
        """Replace the weights of runs with an average by it."""
        if self.average is not None:
            self.values.copy_(torch.where(self.ema > 0, self.average, self.values))
            self._write(self.views)


def train(
    adapted: Adapted, steps: list[list[MicroBatch]], options: Sequence[TrainingOptions], rates: Sequence[float]
) -> torch.Tensor:
    """
    Train the adapters of all runs.

    Args:
        adapted ([`Adapted`]): The model.
        steps: The micro-batches of each step, on the device.
        options (`Sequence[TrainingOptions]`), rates (`Sequence[float]`): Of the runs; one `dropout_until` for all.

    Returns:
        `torch.Tensor` of shape `[steps, K]`: The losses.
    """
    optimizer = FlatAdamW(adapted, options, rates, len(steps))
    losses = optimizer.values.new_zeros(len(steps), adapted.runs)
    last_masked = round(options[0].dropout_until * len(steps))
    adapted.model.train()
    for number, batches in enumerate(steps):
        if number == last_masked and adapted.end_dropout is not None:
            adapted.end_dropout()
        for batch in batches:
            token_losses = F.cross_entropy(adapted.logits(batch), batch.targets, reduction="none") * batch.weights
            losses[number].index_add_(0, batch.owners, token_losses.detach())
            token_losses.sum().backward()
        optimizer.step()
        if adapted.after_step is not None:
            adapted.after_step()
    optimizer.use_average()
    return losses


@torch.no_grad()
def score(adapted: Adapted, batches: list[MicroBatch], candidates: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-likelihoods of all candidates for all runs, and how many tokens of each are not the likeliest one.

    Args:
        adapted ([`Adapted`]): The model.
        batches: On the device.
        candidates (`int`): Options and answers of all test rows.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shape `[K, candidates]`, on the CPU.
    """
    adapted.model.eval()
    scores = torch.zeros(adapted.runs * candidates, dtype=torch.float64, device=batches[0].ids.device)
    misses = torch.zeros_like(scores)
    for batch in batches:
        logits = adapted.logits(batch)
        values = -F.cross_entropy(logits, batch.targets, reduction="none")
        scores.index_add_(0, batch.owners, values.double())
        misses.index_add_(0, batch.owners, (logits.argmax(-1) != batch.targets).double())
    return scores.view(adapted.runs, candidates).cpu(), misses.view(adapted.runs, candidates).cpu()


class Clock:
    """Seconds of the parts of a run."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.last = device, {}, time.perf_counter()

    def lap(self, name: str) -> None:
        """Name the time since the last call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now
