"""The shared state of the layers of one adapter: the batch context, and earlier contexts for recomputations."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..kernels import LayerProbe
from .batch import IN_TRAINERS, BatchContext, TaskIds, resolve_task_ids, task_index
from .recomputation import ContextHistory, in_backward
from .task_heads import find_task_heads
from .task_tables import TaskTable, task_tables


logger = logging.get_logger(__name__)

# Contexts kept for recomputations; at least as many forward passes can wait for their backward pass.
_REMEMBERED = 256


class Routing:
    """
    State that the layers of one adapter share.

    Args:
        tasks (`Sequence[str]`): Names of the adapter's tasks, in the order of `RLoraConfig.tasks`.
        kind (`str`): `RLoraConfig.router`.
    """

    def __init__(self, tasks: Sequence[str] | None, kind: str) -> None:
        self.tasks = tuple(tasks or ())
        self.kind = kind
        self._batch = BatchContext()
        self._history: ContextHistory[BatchContext] = ContextHistory(_REMEMBERED)
        self._layers = 0
        self._tokens_of: tuple[Any, ...] = ()
        self._tables: dict[int, TaskTable] = {}
        self._warned: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles keep the task that [`set_task`] chose, and nothing else about a batch."""
        batch = BatchContext(task=self._batch.task)
        return {
            **self.__dict__,
            "_batch": batch,
            "_history": ContextHistory(_REMEMBERED),
            "_tokens_of": (),
            "_tables": {},
        }

    @property
    def batch(self) -> BatchContext:
        """
        The context of the batch; in a recomputation, that of the forward pass which it repeats.

        Raises:
            RuntimeError: If a recomputation repeats a forward pass whose context was dropped.
        """
        # `torch.compile` must not see the history: a graph would be recompiled whenever it grows.
        if torch.compiler.is_compiling() or not in_backward():
            return self._batch
        repeated = self._history.of_recomputation()
        return self._batch if repeated is None else repeated

    def note_forward(self) -> None:
        """Remember the context for recomputations. A layer calls it in every pass that may be repeated."""
        if not torch.compiler.is_compiling() and not in_backward():
            self._history.note_forward(self._batch)

    def _set(self, batch: BatchContext) -> None:
        if torch.compiler.is_compiling():
            self._batch = batch
        elif in_backward() and len(self._history):
            # Set by the recomputed code, for this recomputation only.
            self._history.replace(batch)
        else:
            self._history.note_set(batch)
            self._batch = batch

    def forget_batch(self) -> None:
        """Drop the context of the batch and earlier contexts. Call it after the backward passes."""
        self._history.clear()
        self._tokens_of, self._tables = (), {}
        self._batch = BatchContext(task=self._batch.task, usage=self._batch.usage, groups=self._batch.groups)

    def update(self, **values: Any) -> None:
        """Replace values of [`BatchContext`] for all following batches. A seed is also stored as a tensor."""
        if "seed" in values:
            seed = values["seed"]
            values["seed_tensor"] = None if seed is None else torch.tensor(seed, dtype=torch.int64, device="cpu")
        # Not by `_replace`, from which `torch.compile` makes an empty tuple (torch 2.11).
        before = self.batch
        unknown = [name for name in values if name not in before._fields]
        if unknown:
            raise TypeError(f"A batch has no {', '.join(unknown)}; it has {', '.join(before._fields)}.")
        fields = [values.get(name, value) for name, value in zip(before._fields, before, strict=True)]
        self._set(BatchContext(*fields))

    @contextmanager
    def using(self, **values: Any) -> Generator[None, None, None]:
        """Replace values of [`BatchContext`] for the duration of a `with` block."""
        before = self.batch
        self.update(**values)
        try:
            yield
        finally:
            self._set(before)

    def number_layer(self) -> int:
        """Count the layers that share this state; returns the index of the next one."""
        self._layers += 1
        return self._layers - 1

    def index_of(self, task: str | int) -> int:
        """The index of a task in the adapter's tasks; see [`task_index`]."""
        return task_index(task, self.tasks)

    def find_task(self, *names: str | None) -> int | None:
        """The index of the first of `names` that a task router has; `None` without such a router or name."""
        if self.kind != "task":
            return None
        return next((self.tasks.index(name) for name in names if name in self.tasks), None)

    def set_task(self, task: str | int | None) -> None:
        """See [`set_task`]."""
        self._check_has_tasks("set_task")
        self.update(task=None if task is None else self.index_of(task))

    def resolve(self, task_ids: TaskIds) -> torch.Tensor:
        """
        Convert task ids to a tensor `[B]` or `[B, S]`; see [`resolve_task_ids`].

        Raises:
            TypeError: If they are neither a list of names or indices nor a tensor of integers.
            ValueError: If the adapter has no task router, or lacks a task.
        """
        self._check_has_tasks("task_ids")
        return resolve_task_ids(task_ids, self.tasks)

    def _check_has_tasks(self, what: str) -> None:
        if self.kind != "task":
            raise ValueError(
                f'`{what}` needs an adapter with `router="task"`, and this adapter has `router={self.kind!r}`, which '
                f"does not use tasks. Leave `{what}` out."
            )

    def token_task_ids(self, shape: torch.Size, device: torch.device) -> torch.Tensor | None:
        """
        The task of each token of an input.

        Args:
            shape (`torch.Size`): Shape of the input without its last dimension.
            device (`torch.device`): Device of the result.

        Returns:
            `torch.Tensor` of shape `[T]` and dtype `int64`, -1 for no task; `None` if the batch has no tasks.

        Raises:
            ValueError: If the batch's task ids do not fit the shape.
        """
        batch, tokens = self.batch, shape.numel()
        if batch.task_ids is None:
            return None if batch.task is None else torch.full((tokens,), batch.task, device=device)
        if not batch.fits(shape):
            raise ValueError(
                f"`task_ids` of shape {list(batch.task_ids.shape)} do not fit an input of shape {[*shape, 'd_in']}. "
                "Pass one for each row or for each token. Leave out layers that get only part of the batch (experts, "
                "vision encoders) with `exclude_modules`."
            )

        # All tokens of a row have its task. Beam search repeats each row.
        ids = batch.task_ids.to(device, torch.int64).reshape(-1)
        return ids if ids.numel() == tokens else ids.repeat_interleave(tokens // max(ids.numel(), 1))  # [T]

    def one_hot_tasks(
        self, shape: torch.Size, device: torch.device, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """
        [`token_task_ids`], and the same as rows with a one `[T, K + 1]` in a dtype; kept for the layers of a batch.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`, or `None` if all tokens have the same task or none.
        """
        batch = self.batch
        if batch.task_ids is None:
            return None
        given, key = batch.task_ids, (batch.task_ids._version, shape, device, dtype)
        if not self._tokens_of or self._tokens_of[0] is not given or self._tokens_of[1] != key:
            ids = self.token_task_ids(shape, device)
            assert ids is not None
            rows = torch.where(ids < 0, len(self.tasks), ids)
            self._tokens_of = (given, key, ids, nn.functional.one_hot(rows, len(self.tasks) + 1).to(dtype))
        return self._tokens_of[2], self._tokens_of[3]

    def begin_tables(self, routers: Mapping[int, torch.Tensor]) -> None:
        """
        Compute the logits of the tasks for all layers of a forward pass; see [`task_tables`].

        Args:
            routers (`Mapping[int, torch.Tensor]`): The routers `[K, N]` by number of the layer; none drops the tables.
        """
        self._tables = {}
        alike: dict[tuple[Any, ...], dict[int, torch.Tensor]] = {}
        for layer, router in routers.items():
            alike.setdefault((router.device, router.dtype, router.shape), {})[layer] = router
        for group in alike.values():
            self._tables.update(zip(group, task_tables(list(group.values())), strict=True))

    def table_of(self, layer: int, router: torch.Tensor) -> TaskTable:
        """The logits of the tasks in a layer."""
        table = self._tables.get(layer)
        return table if table is not None and table.holds_for(router) else task_tables([router])[0]

    def mask_for(self, tokens: int) -> torch.Tensor | None:
        """The token mask `[T]` of the batch, if it has one for that number of tokens."""
        mask = self.batch.token_mask
        if mask is None:
            return None
        if mask.numel() != tokens:
            self._warn_once(
                "mask",
                f"A layer with an adapter gets {tokens} tokens of a batch of {mask.numel()}, as experts and encoders "
                "do. All of them count in balance losses and head statistics, padding included. To leave such layers "
                "out, name them in `exclude_modules`.",
            )
            return None
        return mask.reshape(-1)

    def probe(self, row: int | None, tokens: int) -> LayerProbe | None:
        """The probe that collects statistics in the backward pass of a layer, if the batch has a tally."""
        tally = self.batch.tally
        if tally is None or row is None or self.kind == "uniform":
            return None
        return LayerProbe(tally, row, self.mask_for(tokens))

    def warn_of_mean_weights(self) -> None:
        """Warn, once, that a task router runs without a task."""
        self._warn_once(
            "mean",
            'An adapter with `router="task"` got no task and uses the mean of the head weights of its tasks '
            f'({", ".join(self.tasks)}). Call `model.set_task("{self.tasks[0]}")`, or pass `task_ids=` with each '
            f"batch ({IN_TRAINERS}).",
        )

    def _warn_once(self, key: str, text: str) -> None:
        # `torch.compile` can't trace a logger.
        if key not in self._warned and not torch.compiler.is_compiling():
            self._warned.add(key)
            logger.warning(text)


@contextmanager
def using_all(contexts: Iterable[tuple[Routing, Mapping[str, Any]]]) -> Generator[None, None, None]:
    """
    Enter [`Routing.using`] for several adapters.

    Args:
        contexts (`Iterable[tuple[Routing, Mapping]]`): The state of each adapter, with its values of [`BatchContext`].
    """
    with ExitStack() as stack:
        for routing, values in contexts:
            stack.enter_context(routing.using(**values))
        yield


def find_routings(model: torch.nn.Module) -> list[Routing]:
    """The shared states of all adapters of a model, each once."""
    routings: dict[int, Routing] = {}
    for module in model.modules():
        routing = getattr(module, "routing", None)
        if isinstance(routing, Routing):
            routings[id(routing)] = routing
    return list(routings.values())


def set_task(model: torch.nn.Module, task: str | int | None) -> None:
    """
    Choose the task of all following batches, for adapters with `router="task"` and heads of tasks.

    Args:
        model (`torch.nn.Module`): A model with adapters, loaded by PEFT or transformers.
        task (`str` or `int`): Name of a task in the adapter's `tasks`, or its index; `None` for the mean over tasks.

    Raises:
        ValueError: If no adapter of the model has a task router and there are no heads of tasks ([`add_task_heads`]),
            or they lack the task.
    """
    routings, heads = find_routings(model), find_task_heads(model)
    if not routings and not heads:
        raise ValueError("`set_task` needs a model with R-LoRA adapters, and this one has none. Load one first.")
    with_tasks = [routing for routing in routings if routing.kind == "task"]
    for routing in with_tasks or ([] if heads else routings):
        routing.set_task(task)
    for head in heads:
        head.set_task(task)
