"""What adapters must know of a batch beyond their input: the task of each row or token, and which tokens count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers.utils import logging

from ..kernels import LayerProbe, RoutingTally


if TYPE_CHECKING:
    from .adapter import PackedAhead


logger = logging.get_logger(__name__)

# Names of tasks, or their places in `RLoraConfig.tasks`.
TaskIds: TypeAlias = torch.Tensor | Sequence[int] | Sequence[str]


class HeadUsage:
    """
    Sums of the weights of the heads by task and layer, for evaluation.

    Args:
        num_tasks (`int`), num_layers (`int`), num_heads (`int`): Sizes.
        device (`torch.device`, *optional*): Where to sum.

    Attributes:
        weights (`torch.Tensor` of shape `[num_tasks + 1, num_layers, num_heads]`): Sums of weights; the last row is of
            tokens whose task is not known.
        tokens (`torch.Tensor` of shape `[num_tasks + 1, num_layers]`): Tokens summed over.
    """

    def __init__(
        self, num_tasks: int, num_layers: int, num_heads: int, device: torch.device | str | None = None
    ) -> None:
        self.weights = torch.zeros(num_tasks + 1, num_layers, num_heads, device=device)
        self.tokens = torch.zeros(num_tasks + 1, num_layers, device=device)

    def add(self, layer: int, weights: torch.Tensor, task_ids: torch.Tensor | None, mask: torch.Tensor | None) -> None:
        """Add the weights `[T, N]` of one layer for tokens of tasks `[T]`, where `mask` `[T]` is not zero."""
        unknown = self.weights.shape[0] - 1
        if task_ids is None:
            task_ids = torch.full(weights.shape[:1], unknown, device=weights.device)
        task_ids = torch.where(task_ids < 0, unknown, task_ids)
        counted = torch.ones_like(weights[:, 0]) if mask is None else mask.to(weights.dtype)
        # Selected rather than multiplied: what padding computes may be NaN.
        weights = torch.where(counted[:, None] > 0, weights, 0.0).to(self.weights)
        heads = weights.shape[1]  # of an adapter that may have fewer than others
        self.weights[:, layer, :heads].index_add_(0, task_ids, weights)
        self.tokens[:, layer].index_add_(0, task_ids, counted.to(self.tokens))


class Routing:
    """
    State that the layers of one adapter share: the tasks of the batch at hand, and where statistics go.

    Args:
        tasks (`Sequence[str]`): Names of the adapter's tasks, in the order of `RLoraConfig.tasks`.
        kind (`str`): `RLoraConfig.router`.
    """

    def __init__(self, tasks: Sequence[str] | None, kind: str) -> None:
        self.tasks = tuple(tasks or ())
        self.kind = kind
        # `[B]` or `[B, S]`, -1 where the task is not known; for the batch at hand.
        self.task_ids: torch.Tensor | None = None
        # Set by `set_task`, for all batches that don't say.
        self.task: int | None = None
        self.token_mask: torch.Tensor | None = None  # [B, S]; not zero where tokens count
        self.tally: RoutingTally | None = None
        self.usage: HeadUsage | None = None
        # That of all dropout masks of the batch, where a recomputation can't draw what the forward pass drew; and the
        # same in memory, for graphs, of which a number would be a constant.
        self._seed: int | None = None
        self.seed_tensor: torch.Tensor | None = None
        # The weights that `StepPacking` laid side by side for a forward pass, by the number of the layer.
        self.packed: dict[int, PackedAhead] = {}
        self._layers = 0
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take along the tasks, not the batch."""
        batch: dict[str, Any] = {
            "task_ids": None,
            "token_mask": None,
            "tally": None,
            "usage": None,
            "_seed": None,
            "seed_tensor": None,
            "packed": {},
        }
        return {**self.__dict__, **batch}

    @property
    def seed(self) -> int | None:
        """The seed of all dropout masks of the batch; `None` if each layer draws its own."""
        return self._seed

    @seed.setter
    def seed(self, seed: int | None) -> None:
        self._seed = seed
        self.seed_tensor = None if seed is None else torch.tensor(seed, dtype=torch.int64, device="cpu")

    def number_layer(self) -> int:
        """A number for each of the layers that share this, in the order in which they are made."""
        self._layers += 1
        return self._layers - 1

    def _warn_once(self, key: str, text: str) -> None:
        # A logger is no part of a graph.
        if key not in self._warned and not torch.compiler.is_compiling():
            self._warned.add(key)
            logger.warning(text)

    def index_of(self, task: str | int) -> int:
        """
        The place of a task in the adapter's list.

        Raises:
            ValueError: If the adapter does not know it.
        """
        if isinstance(task, str) and task in self.tasks:
            return self.tasks.index(task)
        if isinstance(task, int) and not isinstance(task, bool) and 0 <= task < len(self.tasks):
            return task
        listed = ", ".join(f"{index}: {name}" for index, name in enumerate(self.tasks)) or "(none)"
        raise ValueError(
            f"Task {task!r} is unknown to the adapter, whose tasks are {listed}. Use one of these names or numbers, "
            "or None for the mean mixture."
        )

    def set_task(self, task: str | int | None) -> None:
        """See [`set_task`]."""
        self._check_has_tasks("set_task")
        self.task = None if task is None else self.index_of(task)

    def _check_has_tasks(self, what: str) -> None:
        if self.kind != "task":
            raise ValueError(
                f'`{what}` is for adapters with `router="task"`; this one has `router={self.kind!r}`, which chooses '
                "its heads without being told the task. Leave it out."
            )

    def resolve(self, task_ids: TaskIds) -> torch.Tensor:
        """
        Task ids as given by a user, as a tensor.

        Raises:
            ValueError: If the adapter has no task router, or does not know a task.
        """
        self._check_has_tasks("task_ids")
        if not isinstance(task_ids, torch.Tensor):
            return torch.tensor([self.index_of(task) for task in task_ids])
        largest, smallest = int(task_ids.max()), int(task_ids.min())
        if largest >= len(self.tasks) or smallest < -1:
            self.index_of(largest if largest >= len(self.tasks) else smallest)
        return task_ids

    def token_task_ids(self, shape: torch.Size, device: torch.device) -> torch.Tensor | None:
        """
        The task of each token of an input of shape `[..., d_in]`, given `shape` without the last.

        Returns:
            `torch.Tensor` of shape `[T]` and dtype `int64`, -1 where it is not known; `None` if no task is known.

        Raises:
            ValueError: If the batch's task ids do not fit the shape.
        """
        tokens = shape.numel()
        if self.task_ids is None:
            return None if self.task is None else torch.full((tokens,), self.task, device=device)
        ids = self.task_ids.to(device, torch.int64).reshape(-1)
        # A task for each row serves all of its tokens; beam search repeats rows one by one.
        if ids.numel() == 0 or tokens % ids.numel():
            raise ValueError(
                f"`task_ids` of shape {list(self.task_ids.shape)} do not fit an input of shape {[*shape, 'd_in']}. "
                "Give one for each row or one for each token."
            )
        return ids.repeat_interleave(tokens // ids.numel())

    def warn_of_mean_mixture(self) -> None:
        """Say once that tokens are mixed without their task."""
        self._warn_once(
            "mean",
            'An adapter with `router="task"` runs without the task: it uses the mean of the mixtures of its tasks '
            f'({", ".join(self.tasks)}). Call `model.set_task("{self.tasks[0]}")`, or pass `task_ids=` with each '
            "batch.",
        )

    def mask_for(self, tokens: int) -> torch.Tensor | None:
        """The token mask `[T]` if the batch has one that fits an input of that many tokens."""
        if self.token_mask is None:
            return None
        if self.token_mask.numel() != tokens:
            self._warn_once(
                "mask",
                f"A layer with an adapter sees {tokens} tokens of a batch of {self.token_mask.numel()}: it does not "
                "work on the batch as it is (experts do so, or encoders). All of them count in balance losses and in "
                "statistics of heads, padding too. Name such layers in `exclude_modules` to leave them out.",
            )
            return None
        return self.token_mask.reshape(-1)

    def probe(self, row: int | None, tokens: int) -> LayerProbe | None:
        """What the backward pass of a layer reports to, if anything is to be recorded."""
        if self.tally is None or row is None or self.kind == "uniform":
            return None
        return LayerProbe(self.tally, row, self.mask_for(tokens))


def find_routings(model: torch.nn.Module) -> list[Routing]:
    """The routing states of all adapters of a model, each once."""
    found: dict[int, Routing] = {}
    for module in model.modules():
        routing = getattr(module, "routing", None)
        if isinstance(routing, Routing):
            found[id(routing)] = routing
    return list(found.values())


def set_task(model: torch.nn.Module, task: str | int | None) -> None:
    """
    Choose the task of all batches that follow, for adapters with `router="task"`.

    Args:
        model (`torch.nn.Module`): A model with adapters, through PEFT or transformers.
        task (`str` or `int`): Name of a task in the adapter's `tasks`, or its place there; `None` for the mean
        mixture.

    Raises:
        ValueError: If the model has no adapter with such a router, or the adapter does not know the task.
    """
    routings = find_routings(model)
    if not routings:
        raise ValueError("`set_task` needs a model with R-LoRA adapters, and this one has none. Load one first.")
    chosen = [routing for routing in routings if routing.kind == "task"]
    for routing in chosen or routings:
        routing.set_task(task)
