"""What adapters must know of a batch beyond their input: the task of each row or token, and which tokens count."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from threading import get_ident
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from transformers.utils import logging

from ..kernels import LayerProbe, RoutingTally


if TYPE_CHECKING:
    from .adapter import PackedAhead


logger = logging.get_logger(__name__)

# Names of tasks, or their places in `RLoraConfig.tasks`.
TaskIds: TypeAlias = torch.Tensor | np.ndarray | Sequence[int] | Sequence[str]
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Contexts that are kept for recomputations: setting one and taking it back are two.
_REMEMBERED = 512


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
            in beam search.
    """

    task_ids: torch.Tensor | None = None
    task: int | None = None
    token_mask: torch.Tensor | None = None
    tally: RoutingTally | None = None
    usage: HeadUsage | None = None
    seed: int | None = None
    seed_tensor: torch.Tensor | None = None
    rows_repeat: bool = False


class _Since(NamedTuple):
    """The context of all forward passes of a thread whose autograd nodes are numbered from `number` on."""

    thread: int
    number: int
    batch: BatchContext


def in_backward() -> bool:
    """Whether autograd is at work in this thread, so that a forward pass that runs now is a recomputation."""
    return torch._C._current_graph_task_id() != -1


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
        self._history: deque[_Since] = deque(maxlen=_REMEMBERED)
        self._threads: set[int] = set()  # that have set contexts
        # The weights that `StepPacking` laid side by side for a forward pass, by the number of the layer.
        self.packed: dict[int, PackedAhead] = {}
        self._layers = 0
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take along the tasks, not the batch."""
        kept = BatchContext(task=self._batch.task)
        return {
            **self.__dict__,
            "_batch": kept,
            "_history": deque(maxlen=_REMEMBERED),
            "_threads": set(),
            "packed": {},
        }

    @property
    def batch(self) -> BatchContext:
        """
        What is known of the batch.

        Activation checkpointing repeats a forward pass inside of the backward pass, when the caller may have set
        another context long since. The autograd node that asks for the recomputation was made by the forward pass to
        be repeated, and nodes are numbered in the order in which a thread makes them: so the number says which context
        was set then. This holds for every kind of checkpointing, whoever calls it.

        Raises:
            RuntimeError: If a recomputation repeats a forward pass that is no longer remembered.
        """
        # The history is nothing for a graph, which would be compiled again each time that it grows.
        if torch.compiler.is_compiling() or not self._history or not in_backward():
            return self._batch
        return self._batch_of_recomputation()

    @batch.setter
    def batch(self, batch: BatchContext) -> None:
        if not torch.compiler.is_compiling():
            thread = get_ident()
            self._threads.add(thread)
            if not self._history:
                self._history.append(_Since(thread, -1, self._batch))
            self._history.append(_Since(thread, torch._C._autograd._get_sequence_nr(), batch))
        self._batch = batch

    def _batch_of_recomputation(self) -> BatchContext:
        node = torch._C._current_autograd_node()
        if node is None:
            return self._batch
        number = node._sequence_nr()
        # A thread numbers its own nodes. More than one has set contexts only where a whole model with checkpoints
        # inside is recomputed, by the thread of a device.
        found: dict[int, BatchContext] = {}
        for since in reversed(self._history):
            if since.number <= number:
                found.setdefault(since.thread, since.batch)
                if len(found) == len(self._threads):
                    break
        contexts = list(found.values())
        if not contexts or any(batch is not contexts[0] for batch in contexts[1:]):
            raise RuntimeError(
                "Activation checkpointing repeats a forward pass whose tasks are not known any more: the last "
                f"{_REMEMBERED // 2} passes are remembered, of one thread. Call `backward` after fewer forward "
                "passes, and don't nest checkpoints."
            )
        return contexts[0]

    def forget_batch(self) -> None:
        """Drop the batch and what is remembered of earlier ones, when their backward passes are over."""
        self._history.clear()
        self._threads.clear()
        self._batch = BatchContext(task=self._batch.task, usage=self._batch.usage)

    def update(self, **values: Any) -> None:
        """Replace some values of [`BatchContext`] from now on; a seed is put into memory too."""
        self.batch = self._replaced(values)

    def _replaced(self, values: dict[str, Any]) -> BatchContext:
        if "seed" in values:
            seed = values["seed"]
            values["seed_tensor"] = None if seed is None else torch.tensor(seed, dtype=torch.int64, device="cpu")
        return self._batch._replace(**values)

    @contextmanager
    def using(self, **values: Any) -> Generator[None, None, None]:
        """Replace some values of [`BatchContext`], and put the context before back in the end."""
        before = self._batch
        if torch.is_grad_enabled():
            self.update(**values)
        else:  # nothing will be recomputed, nor must it be remembered
            self._batch = self._replaced(values)
        try:
            yield
        finally:
            if self._history and self._history[-1].batch is not before:
                self.batch = before
            self._batch = before

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
        if isinstance(task_ids, list | tuple):
            return torch.tensor([self.index_of(task) for task in task_ids], dtype=torch.int64)
        if not isinstance(task_ids, torch.Tensor) or task_ids.dtype not in _INTEGERS or task_ids.ndim not in (1, 2):
            what = repr(task_ids)
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
        if not _fit(batch.task_ids.shape, shape, batch.rows_repeat):
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


def _fit(ids: torch.Size, shape: torch.Size, rows_repeat: bool) -> bool:
    """Whether task ids of shape `[B]` or `[B, S]` say the task of each token of an input, given its leading sizes."""
    if len(ids) == 2:  # one for each token
        return ids == shape or (len(shape) == 1 and shape.numel() == ids.numel())
    if len(shape) == 1:  # rows and tokens as one
        return ids[0] > 0 and shape[0] % ids[0] == 0
    return shape[0] == ids[0] or (rows_repeat and ids[0] > 0 and shape[0] % ids[0] == 0)


def batch_shape(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Size | None:
    """
    Rows and, for text, tokens of a row of what a model is called with: `[B, S]`, or `[B]`.

    Args:
        args (`Sequence`), kwargs (`Mapping`): Arguments of `forward` or `generate`.
    """
    tokens = next((kwargs[name] for name in ("input_ids", "inputs") if kwargs.get(name) is not None), None)
    embedded = kwargs.get("inputs_embeds")
    if tokens is None and embedded is None:
        tokens = next((value for value in args if isinstance(value, torch.Tensor)), None)
    if isinstance(tokens, torch.Tensor) and tokens.ndim >= 1:
        return tokens.shape[: 1 if tokens.is_floating_point() else 2]
    if isinstance(embedded, torch.Tensor) and embedded.ndim >= 2:
        return embedded.shape[:2]
    others = (value for value in kwargs.values() if isinstance(value, torch.Tensor) and value.ndim >= 1)
    other = next(others, None)  # pictures, sounds
    return None if other is None else other.shape[:1]


def check_task_ids(task_ids: torch.Tensor, shape: torch.Size, generates: bool) -> None:
    """
    Check task ids against the batch.

    Args:
        task_ids (`torch.Tensor`): Of shape `[B]` or `[B, S]`.
        shape (`torch.Size`): That of the batch; see [`batch_shape`].
        generates (`bool`): Whether tokens are generated, whose tasks are those of their rows.

    Raises:
        ValueError: If they are neither one for each row nor one for each token.
    """
    if task_ids.ndim == 1 and len(task_ids) == shape[0]:
        return
    if task_ids.ndim == 2 and not generates and task_ids.shape == shape:
        return
    by_token = "" if generates or len(shape) < 2 else f", or a tensor {list(shape)} with one for each token"
    raise ValueError(
        f"`task_ids` has shape {list(task_ids.shape)}, and the batch has {shape[0]} rows. Give one for each "
        f"row{by_token}."
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
