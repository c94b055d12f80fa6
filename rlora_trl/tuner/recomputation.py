"""
Which batch a recomputation repeats.

Activation checkpointing runs a forward pass again inside of the backward pass, when its caller may have set another
context long since. Two things say which context the pass had:

- The autograd node that asks for the recomputation was made by that pass, and a thread numbers its nodes in the order
  in which it makes them. So contexts are noted with the number of the next node.
- A recomputation may contain checkpoints itself, whose nodes are made, and asked for, while it runs: backward passes
  within backward passes, in one thread. They have the context of the outermost.

This holds for every kind of checkpointing, whoever calls it.
"""

from __future__ import annotations

from collections import deque
from threading import get_ident
from typing import Generic, NamedTuple, TypeVar

import torch
from torch.autograd import Variable


T = TypeVar("T")
# Contexts that are set between two forward passes: that of the one before is taken back, a task is chosen, and so on.
_PENDING = 16


def in_backward() -> bool:
    """Whether autograd is at work in this thread, so that a forward pass that runs now is a recomputation."""
    return torch._C._current_graph_task_id() != -1


class _Since(NamedTuple, Generic[T]):
    """The context of forward passes of a thread whose nodes are numbered from `number` on."""

    thread: int
    number: int
    context: T


class _Frame(Generic[T]):
    """
    A backward pass that recomputes: the node that asks for it, and the contexts of what is repeated.

    The contexts come with the number of the next node when they were set: a checkpoint within makes nodes of its own.
    """

    def __init__(self, graph_task: int) -> None:
        self.graph_task = graph_task
        self.node = -1
        self.contexts: list[tuple[int, T]] = []

    def begin(self, node: int, context: T) -> None:
        """Begin what another node asks for."""
        self.node, self.contexts = node, [(-1, context)]

    def set(self, context: T) -> None:
        """Set another context, within what is repeated."""
        self.contexts.append((torch._C._autograd._get_sequence_nr(), context))

    def find(self, node: int) -> T:
        """The context of a node that was made by what is repeated."""
        return next(context for number, context in reversed(self.contexts) if number <= node)


class ContextHistory(Generic[T]):
    """
    The contexts of earlier forward passes, for those that are repeated.

    Args:
        length (`int`): How many contexts are remembered.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.clear()

    def clear(self) -> None:
        """Forget all, when no backward pass is to come."""
        self._entries: deque[_Since[T]] = deque(maxlen=self.length)
        self._frames: dict[int, list[_Frame[T]]] = {}
        # What was set since the last pass: a node may be made before any layer runs.
        self._pending: deque[_Since[T]] = deque(maxlen=_PENDING)
        self._last_read: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def note_set(self, context: T) -> None:
        """Note that this thread sets a context now, for the forward passes to come."""
        self._pending.append(_Since(get_ident(), torch._C._autograd._get_sequence_nr(), context))

    def note_forward(self, context: T) -> None:
        """Note that a layer runs with a context in this thread, in a forward pass that may be repeated."""
        if self._frames:  # of a backward pass that has failed
            self._frames.clear()
        thread, number = get_ident(), torch._C._autograd._get_sequence_nr()
        before, self._last_read[thread] = self._last_read.get(thread, -1), number
        if not self._entries or self._entries[-1].context is not context or self._entries[-1].thread != thread:
            own = [since for since in self._pending if since.thread == thread]
            if own and own[-1].context is context:
                if before == -1:  # nothing was noted of this thread: it has had the first one from its beginning
                    own[0] = _Since(thread, -1, own[0].context)
                self._entries.extend(own)
            else:
                # Set by another thread. A reentrant checkpoint makes its node before its layers run.
                first = -1 if before == -1 else number if torch.is_grad_enabled() else before
                self._entries.append(_Since(thread, first, context))
        self._pending.clear()

    def of_recomputation(self) -> T | None:
        """
        The context of the pass that is repeated in this thread; `None` if no pass was noted.

        Raises:
            RuntimeError: If it is no longer remembered, or several threads could have run it.
        """
        frame = self._frame()
        return None if frame is None else frame.contexts[-1][1]

    def replace(self, context: T) -> None:
        """Set a context within a recomputation, for the rest of it."""
        frame = self._frame()
        if frame is not None:
            frame.set(context)

    def _frame(self) -> _Frame[T] | None:
        graph_task, node = torch._C._current_graph_task_id(), torch._C._current_autograd_node()
        if node is None or not self._entries:
            return None
        number = node._sequence_nr()
        frames = self._frames.setdefault(get_ident(), [])
        if not frames or frames[-1].graph_task != graph_task:
            frame: _Frame[T] = _Frame(graph_task)
            frames.append(frame)
            # When this backward pass ends, the one around it goes on.
            Variable._execution_engine.queue_callback(lambda: frames.remove(frame) if frame in frames else None)
        frame = frames[-1]
        if frame.node != number:
            frame.begin(number, frames[-2].find(number) if len(frames) > 1 else self._find(number))
        return frame

    def _find(self, number: int) -> T:
        found: dict[int, T] = {}
        for since in reversed(self._entries):
            if since.number <= number:
                found.setdefault(since.thread, since.context)
                if len(found) == len(self._last_read):
                    break
        contexts = list(found.values())
        if not contexts or any(context is not contexts[0] for context in contexts[1:]):
            why = "several threads have run passes" if contexts else f"{self.length} later ones have run"
            raise RuntimeError(
                "Activation checkpointing repeats a forward pass, and which tasks its batch had is not known, as "
                f"{why}. Call `backward` after fewer forward passes, and run those of one model in one thread."
            )
        return contexts[0]
