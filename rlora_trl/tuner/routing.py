"""What adapters must know of a batch beyond their input: the task of each row or token, and which tokens count."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from transformers.utils import logging

from ..kernels import LayerProbe, RoutingTally
from .recomputation import ContextHistory, in_backward


if TYPE_CHECKING:
    from .adapter import PrefetchedWeights


logger = logging.get_logger(__name__)

# Names of tasks, or their places in `RLoraConfig.tasks`.
TaskIds: TypeAlias = torch.Tensor | np.ndarray | Sequence[int] | Sequence[str]
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Contexts that are kept for recomputations, which is that many forward passes at least.
_REMEMBERED = 256


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


class BatchContext(NamedTuple):
    """
    What the layers of one adapter know of a batch.

    A recomputation (activation checkpointing) gets the context of the forward pass that it repeats; see
    [`Routing.batch`].

    Args:
        task_ids (`torch.Tensor` of shape `[B]` or `[B, S]`, *optional*): Tasks, -1 where the task is not known.
        task (`int`, *optional*): Task of all tokens where `task_ids` is not given; see [`set_task`].
        token_mask (`torch.Tensor` of shape `[B, S]`, *optional*): Not zero where tokens count.
        tally (`RoutingTally`, *optional*): Where statistics of a training step go.
        usage ([`HeadUsage`], *optional*): Where the weights of the heads go in evaluation.
        seed (`int`, *optional*): Seed of all dropout masks of the batch; without it each layer draws its own.
        seed_tensor (`torch.Tensor`, *optional*): The same in memory, for graphs, of which a number would be a
            constant.
        rows_repeat (`bool`, *optional*, defaults to `False`): Layers may see each row several times in succession, as
            in beam search and multiple choice.
        lengths (`tuple[int]`, *optional*): Tokens of a row, of each sequence that a row has (encoder, decoder), where
            they are known.
    """

    task_ids: torch.Tensor | None = None
    task: int | None = None
    token_mask: torch.Tensor | None = None
    tally: RoutingTally | None = None
    usage: HeadUsage | None = None
    seed: int | None = None
    seed_tensor: torch.Tensor | None = None
    rows_repeat: bool = False
    lengths: tuple[int, ...] = ()


class GivenBatch(NamedTuple):
    """
    The batch that a model is called with.

    Args:
        rows (`int`): Its rows, B.
        shape (`torch.Size`, *optional*): `[B, S]`, for one sequence of tokens in a row.
        rows_repeat (`bool`), lengths (`tuple[int]`): See [`BatchContext`].
    """

    rows: int
    shape: torch.Size | None
    rows_repeat: bool
    lengths: tuple[int, ...]


class Routing:
    """
    State that the layers of one adapter share: what is known of the batch, and where statistics go.

    Args:
        tasks (`Sequence[str]`): Names of the adapter's tasks, in the order of `RLoraConfig.tasks`.
        kind (`str`): `RLoraConfig.router`.
    """

    def __init__(self, tasks: Sequence[str] | None, kind: str) -> None:
        self.tasks = tuple(tasks or ())
        self.kind = kind
        self._batch = BatchContext()
        self._history: ContextHistory[BatchContext] = ContextHistory(_REMEMBERED)
        # The weights that `WeightPrefetch` laid side by side for a forward pass, by the number of the layer.
        self.packed: dict[int, PrefetchedWeights] = {}
        self._layers = 0
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take along the tasks, not the batch."""
        batch = BatchContext(task=self._batch.task)
        return {**self.__dict__, "_batch": batch, "_history": ContextHistory(_REMEMBERED), "packed": {}}

    @property
    def batch(self) -> BatchContext:
        """
        What is known of the batch, in a recomputation of the one that it repeats; see [`ContextHistory`].

        Raises:
            RuntimeError: If a recomputation repeats a forward pass that is no longer remembered.
        """
        # The history is nothing for a graph, which would be compiled again each time that it grows.
        if torch.compiler.is_compiling() or not in_backward():
            return self._batch
        repeated = self._history.of_recomputation()
        return self._batch if repeated is None else repeated

    def note_forward(self) -> None:
        """Remember the batch for recomputations. A layer calls it when it runs in a pass that may be repeated."""
        if not torch.compiler.is_compiling() and not in_backward():
            self._history.note_forward(self._batch)

    def _set(self, batch: BatchContext) -> None:
        if torch.compiler.is_compiling():
            self._batch = batch
        elif in_backward() and len(self._history):  # by what a recomputation repeats, which has its own caller
            self._history.replace(batch)
        else:
            self._history.note_set(batch)
            self._batch = batch

    def forget_batch(self) -> None:
        """Drop the batch and what is remembered of earlier ones, when their backward passes are over."""
        self._history.clear()
        self._batch = BatchContext(task=self._batch.task, usage=self._batch.usage)

    def update(self, **values: Any) -> None:
        """Replace some values of [`BatchContext`] from now on; a seed is put into memory too."""
        if "seed" in values:
            seed = values["seed"]
            values["seed_tensor"] = None if seed is None else torch.tensor(seed, dtype=torch.int64, device="cpu")
        self._set(self.batch._replace(**values))

    @contextmanager
    def using(self, **values: Any) -> Generator[None, None, None]:
        """Replace some values of [`BatchContext`], and put the context before back in the end."""
        before = self.batch
        self.update(**values)
        try:
            yield
        finally:
            self._set(before)

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
        if isinstance(task, Integral) and not isinstance(task, bool) and 0 <= task < len(self.tasks):
            return int(task)
        listed = ", ".join(f"{index}: {name}" for index, name in enumerate(self.tasks)) or "(none)"
        raise ValueError(
            f"Task {task!r} is unknown to the adapter, whose tasks are {listed}. Use one of these names or numbers, "
            "or None for the mean mixture."
        )

    def set_task(self, task: str | int | None) -> None:
        """See [`set_task`]."""
        self._check_has_tasks("set_task")
        self.update(task=None if task is None else self.index_of(task))

    def _check_has_tasks(self, what: str) -> None:
        if self.kind != "task":
            raise ValueError(
                f'`{what}` is for adapters with `router="task"`; this one has `router={self.kind!r}`, which chooses '
                "its heads without being told the task. Leave it out."
            )

    def resolve(self, task_ids: TaskIds) -> torch.Tensor:
        """
        Task ids as given by a user, as a tensor `[B]` or `[B, S]`.

        Raises:
            TypeError: If they are neither a list of names or numbers nor a tensor of integers.
            ValueError: If the adapter has no task router, or does not know a task.
        """
        self._check_has_tasks("task_ids")
        if isinstance(task_ids, np.ndarray):  # any array of integers, or of names
            task_ids = torch.from_numpy(task_ids) if task_ids.dtype.kind in "iu" else task_ids.tolist()
        if not isinstance(task_ids, str | torch.Tensor) and hasattr(task_ids, "tolist"):  # of pandas
            task_ids = task_ids.tolist()
        if isinstance(task_ids, Sequence) and not isinstance(task_ids, str) and not _is_nested(task_ids):
            return torch.tensor([self.index_of(task) for task in task_ids], dtype=torch.int64)
        if not isinstance(task_ids, torch.Tensor) or task_ids.dtype not in _INTEGERS or task_ids.ndim not in (1, 2):
            what = "a list of lists" if isinstance(task_ids, list) else repr(task_ids)
            if isinstance(task_ids, torch.Tensor):
                what = f"a tensor {list(task_ids.shape)} of {task_ids.dtype}"
            raise TypeError(
                f"`task_ids` must be a list with the task of each row, such as {list(self.tasks[:2])!r}, or a tensor "
                f"of integers with one for each row or for each token, got {what}. For one task in all rows, repeat "
                "it, or call `set_task`."
            )
        if task_ids.numel():
            smallest, largest = map(int, task_ids.aminmax())
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
        batch = self.batch
        tokens = shape.numel()
        if batch.task_ids is None:
            return None if batch.task is None else torch.full((tokens,), batch.task, device=device)
        if not _fit(batch, batch.task_ids.shape, shape):
            raise ValueError(
                f"`task_ids` of shape {list(batch.task_ids.shape)} do not fit an input of shape {[*shape, 'd_in']}. "
                "Give one for each row or one for each token. A layer that does not work on the batch as it is "
                "(experts, encoders of pictures) can be left out by `exclude_modules`."
            )
        ids = batch.task_ids.to(device, torch.int64).reshape(-1)
        # A task for each row serves all of its tokens; beam search repeats rows one by one.
        return ids if ids.numel() == tokens else ids.repeat_interleave(tokens // max(ids.numel(), 1))

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
        mask = self.batch.token_mask
        if mask is None:
            return None
        if mask.numel() != tokens:
            self._warn_once(
                "mask",
                f"A layer with an adapter sees {tokens} tokens of a batch of {mask.numel()}: it does not "
                "work on the batch as it is (experts do so, or encoders). All of them count in balance losses and in "
                "statistics of heads, padding too. Name such layers in `exclude_modules` to leave them out.",
            )
            return None
        return mask.reshape(-1)

    def probe(self, row: int | None, tokens: int) -> LayerProbe | None:
        """What the backward pass of a layer reports to, if anything is to be recorded."""
        tally = self.batch.tally
        if tally is None or row is None or self.kind == "uniform":
            return None
        return LayerProbe(tally, row, self.mask_for(tokens))


def _is_nested(task_ids: Sequence[Any]) -> bool:
    nested = [isinstance(entry, list | tuple | np.ndarray | torch.Tensor) and np.ndim(entry) > 0 for entry in task_ids]
    return bool(nested) and all(nested)


def _fit(batch: BatchContext, ids: torch.Size, shape: torch.Size) -> bool:
    """Whether task ids of shape `[B]` or `[B, S]` say the task of each token of an input, given its leading sizes."""
    if len(ids) == 2:  # one for each token
        return ids == shape or (len(shape) == 1 and shape.numel() == ids.numel())
    rows = ids[0]
    if len(shape) > 1:
        return shape[0] == rows or (batch.rows_repeat and rows > 0 and shape[0] % rows == 0)
    # Rows and tokens as one. Experts see some of the tokens, whose rows are not known.
    units = [rows * length for length in batch.lengths] or [rows]
    exact = bool(batch.lengths) and not batch.rows_repeat
    return any(unit > 0 and (shape[0] == unit if exact else shape[0] % unit == 0) for unit in units)


def describe_batch(args: Sequence[Any], kwargs: Mapping[str, Any], generates: bool = False) -> GivenBatch | None:
    """
    What is known of the batch from the arguments of `forward` or `generate`; `None` if there is no tensor.

    Args:
        args (`Sequence`), kwargs (`Mapping`): The arguments.
        generates (`bool`, *optional*, defaults to `False`): Whether tokens are generated, so that lengths grow.
    """
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor) and value.ndim}
    first = next((value for value in args if isinstance(value, torch.Tensor) and value.ndim), None)
    if first is not None:
        tensors.setdefault("inputs_embeds" if first.is_floating_point() else "input_ids", first)
    tokens = next((tensors[name] for name in ("input_ids", "inputs", "inputs_embeds") if name in tensors), None)
    if tokens is None:
        other = next(iter(tensors.values()), None)  # pictures, sounds
        return None if other is None else GivenBatch(other.shape[0], None, generates, ())

    # `[B, S]`, `[B, S, d]`, or for multiple choice `[B, C, S]` and `[B, C, S, d]`.
    axes = tokens.ndim - tokens.is_floating_point()
    sequences = [tokens] + [tensors[name] for name in ("decoder_input_ids", "labels") if name in tensors]
    lengths = () if generates or axes != 2 else tuple({x.shape[1] for x in sequences if x.ndim > 1})
    return GivenBatch(tokens.shape[0], tokens.shape[:2] if axes == 2 else None, generates or axes > 2, lengths)


def check_task_ids(task_ids: torch.Tensor, batch: GivenBatch, generates: bool) -> None:
    """
    Check task ids against the batch.

    Args:
        task_ids (`torch.Tensor`): Of shape `[B]` or `[B, S]`.
        batch ([`GivenBatch`]): The batch.
        generates (`bool`): Whether tokens are generated, whose tasks are those of their rows.

    Raises:
        ValueError: If they are neither one for each row nor one for each token.
    """
    if task_ids.ndim == 1 and len(task_ids) == batch.rows:
        return
    by_token = None if generates else batch.shape
    if task_ids.ndim == 2 and task_ids.shape == by_token:
        return
    remedy = "" if by_token is None else f", or a tensor {list(by_token)} with one for each token"
    raise ValueError(
        f"`task_ids` has shape {list(task_ids.shape)}, and the batch has {batch.rows} rows. Give one for each "
        f"row{remedy}."
    )


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
