"""Several processes that share the work of a command, as `accelerate launch` or `torchrun` starts them."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from .errors import explain


if TYPE_CHECKING:
    import torch

    from rlora_trl.evaluation import TaskScore


T = TypeVar("T")

# One process may wait for the others for as long as they score.
_TIMEOUT = timedelta(days=1)
# Seconds that the other processes give the main one to report an error.
_GRACE = 20


class Ranks:
    """
    The processes of a command; a single one if no launcher has started it.

    Only the main process prints. A rank that fails ends all of them, and the main process reports its error.
    """

    def __init__(self) -> None:
        self.index, self.count = 0, 1
        self.device: torch.device | None = None
        if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            import torch
            from accelerate import PartialState

            state = PartialState(cpu=not torch.cuda.is_available(), timeout=_TIMEOUT)
            self.index, self.count, self.device = state.process_index, state.num_processes, state.device

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.count > 1 and error[0] is None:
            from accelerate import PartialState

            PartialState().destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.index == 0

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Keep what all processes would print for the main process."""
        if self.is_main:
            yield
            return
        with open(os.devnull, "w") as nothing, redirect_stderr(nothing):
            yield

    @contextmanager
    def together(self) -> Iterator[None]:
        """
        End all processes if one fails in the `with` block. All of them must come to it.

        Raises:
            Exception: In the main process, what it has raised itself, or the error of the first that has failed.
            typer.Exit: In the others.
        """
        if self.count == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as raised:  # raised below, once the others know
            error = raised

        report = None if error is None else (explain(error), "".join(traceback.format_exception(error)))
        failed = [(index, entry) for index, entry in enumerate(self.gather(report)) if entry is not None]
        if failed and not self.is_main:
            # A launcher ends all processes as soon as one has failed, and the main process has to report first.
            time.sleep(_GRACE)
            raise typer.Exit(1)
        if error is not None:
            raise error
        for index, (explained, trace) in failed:
            if explained is None:
                raise RuntimeError(f"Process {index} has failed:\n{trace}")
            raise ValueError(f"Process {index}: {explained}")

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in each of them."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        gathered: list[T] = gather_object([value])
        return gathered

    def share(self, tasks: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        """The rows of each task that this process scores; tasks without any are left out."""
        parts = {task: rows[self.index :: self.count] for task, rows in tasks.items()}
        return {task: rows for task, rows in parts.items() if len(rows)}

    def join(self, scores: dict[str, TaskScore], tasks: Mapping[str, Sequence[Any]]) -> dict[str, TaskScore]:
        """The scores of all rows, in their order, from those of the shares of all processes."""
        if self.count == 1:
            return scores
        from rlora_trl.evaluation import TaskScore

        shares, joined = self.gather(scores), {}
        for task, rows in tasks.items():
            places = [divmod(row, self.count) for row in range(len(rows))]
            values = [shares[rank][task].values[place] for place, rank in places]
            written = [share[task].answers for share in shares if task in share]
            answers = [shares[rank][task].answers[place] for place, rank in places] if any(written) else ()
            joined[task] = TaskScore.of_rows(shares[0][task].metric, values, answers)
        return joined
