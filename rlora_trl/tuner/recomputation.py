"""
Finds the context of the forward pass that a recomputation repeats.

Activation checkpointing runs a forward pass again during the backward pass, when the caller may have set another
context. Two facts identify the context of the first pass:

- The autograd node that triggers the recomputation was created in that pass, and a thread numbers its nodes in the
  order of their creation. So each context is stored with the number of the next node.
- A recomputation may contain checkpoints, whose nodes are created and triggered while it runs: nested backward passes
  in one thread. They have the context of the outermost one.

This holds for every kind of checkpointing and every caller.
"""

from __future__ import annotations

from collections import deque
from threading import get_ident
from typing import Generic, NamedTuple, TypeVar

import torch
from torch.autograd import Variable


T = TypeVar("T")
# Contexts that may be set between two forward passes: the end of the last one, a new task, and so on.
_PENDING = 16


def in_backward() -> bool:
    """Whether autograd runs in this thread, so that a forward pass is a recomputation."""
    return torch._C._current_graph_task_id() != -1


class _Since(NamedTuple, Generic[T]):
    """The context of a thread's forward passes from node `number` on."""

    thread: int
    number: int
    context: T


class _Frame(Generic[T]):
    """
    A backward pass that recomputes: the node that triggered it, and the contexts that the repeated code sets.

    Each context is stored with the number of the next node, as nested checkpoints create nodes too.
    """

    def __init__(self, graph_task: int) -> None:
        self.graph_task = graph_task
        self.node = -1
        self.contexts: list[tuple[int, T]] = []

    def begin(self, node: int, context: T) -> None:
        """Start the recomputation that another node triggers."""
        self.node, self.contexts = node, [(-1, context)]

    def set(self, context: T) -> None:
        """Set another context inside the recomputation."""
        self.contexts.append((torch._C._autograd._get_sequence_nr(), context))

    def find(self, node: int) -> T:
        """The context of a node that the recomputation created."""
        return next(context for number, context in reversed(self.contexts) if number <= node)


class ContextHistory(Generic[T]):
    """
    The contexts of earlier forward passes, for recomputations.

    Args:
        length (`int`): Number of contexts to remember.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self.clear()

    def clear(self) -> None:
        """Forget all contexts, when no backward pass follows."""
        self._entries: deque[_Since[T]] = deque(maxlen=self.length)
        self._frames: dict[int, list[_Frame[T]]] = {}
        # Contexts that were set since the last pass: a node may be created before any layer runs.
        self._pending: deque[_Since[T]] = deque(maxlen=_PENDING)
        self._last_read: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def note_set(self, context: T) -> None:
        """Note that this thread sets a context for its next forward passes."""
        self._pending.append(_Since(get_ident(), torch._C._autograd._get_sequence_nr(), context))

    def note_forward(self, context: T) -> None:
        """Note that a layer runs with a context in this thread, in a forward pass that may be repeated."""
        # Frames remain only if a backward pass failed.
        if self._frames:
            self._frames.clear()

        thread, number = get_ident(), torch._C._autograd._get_sequence_nr()
        before, self._last_read[thread] = self._last_read.get(thread, -1), number
        if not self._entries or self._entries[-1].context is not context or self._entries[-1].thread != thread:
            pending = [since for since in self._pending if since.thread == thread]
            if pending and pending[-1].context is context:
                # The first context of a thread holds from its first node on.
                if before == -1:
                    pending[0] = _Since(thread, -1, pending[0].context)
                self._entries.extend(pending)
            else:
                # Another thread set it. A reentrant checkpoint creates its node before its layers run.
                first = -1 if before == -1 else number if torch.is_grad_enabled() else before
                self._entries.append(_Since(thread, first, context))
        self._pending.clear()

    def of_recomputation(self) -> T | None:
        """
        The context of the pass that is repeated in this thread; `None` if none was noted.

        Raises:
            RuntimeError: If it was forgotten, or several threads may have run it.
        """
        frame = self._frame()
        return None if frame is None else frame.contexts[-1][1]

    def replace(self, context: T) -> None:
        """Set a context inside a recomputation, until it ends."""
        frame = self._frame()
        if frame is not None:
            frame.set(context)

    def _frame(self) -> _Frame[T] | None:
        graph_task, node = torch._C._current_graph_task_id(), torch._C._current_autograd_node()
        if node is None or not self._entries:
            return None

        # A nested backward pass gets its own frame until it ends.
        number = node._sequence_nr()
        frames = self._frames.setdefault(get_ident(), [])
        if not frames or frames[-1].graph_task != graph_task:
            frame: _Frame[T] = _Frame(graph_task)
            frames.append(frame)
            Variable._execution_engine.queue_callback(lambda: frames.remove(frame) if frame in frames else None)

        # The node may differ from the last call's.
        frame = frames[-1]
        if frame.node != number:
            frame.begin(number, frames[-2].find(number) if len(frames) > 1 else self._find(number))
        return frame

    def _find(self, number: int) -> T:
        """The context at a node; each thread has a candidate, as nodes of all threads share their numbers."""
        candidates: dict[int, T] = {}
        for since in reversed(self._entries):
            if since.number <= number:
                candidates.setdefault(since.thread, since.context)
                if len(candidates) == len(self._last_read):
                    break

        contexts = list(candidates.values())
        if not contexts or any(context is not contexts[0] for context in contexts[1:]):
            reason = "several threads have run passes" if contexts else f"{self.length} later ones have run"
            raise RuntimeError(
                "Activation checkpointing repeats a forward pass, but the tasks of its batch are not known, because "
                f"{reason}. Call `backward` after fewer forward passes, and run those of one model in one thread."
            )
        return contexts[0]
