"""
Stops training at a signal, with a checkpoint: SIGTERM of a cluster, SIGINT of Ctrl-C, SIGHUP of a closed terminal.

A signal is only noted when it comes. The step that runs is finished and saved as any checkpoint is, then
`TrainingStopped` ends the program. Before and after training there is nothing to finish, and it ends at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from accelerate import PartialState
from accelerate.utils import gather
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from .resuming import list_checkpoints


STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
# Seconds in which signals count as one: a terminal or `timeout` sends them to a launcher and its processes, and the
# launcher sends its own on.
SAME_SIGNAL = 1.0
# Seconds that a worker of a data loader outlives SIGTERM, as the step that runs needs it.
_WORKER_GRACE = 10


class TrainingStopped(SystemExit):
    """
    A signal has stopped training. Uncaught, it ends the program with the exit code that shells use: 128 + the signal.

    Args:
        number (`int`): The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class StopOnSignal(TrainerCallback):
    """
    Stops training at SIGINT, SIGTERM or SIGHUP. Use it in a `with` statement, and pass it to the trainer.

    The step that runs is finished, with its evaluation if one is due, and saved. On several ranks all stop after the
    same step; which one costs a reduction of one number in each step. A second signal, a second or more after the
    first, stops at once. With `save_strategy="no"` nothing is saved.

    Args:
        args ([`RLoraSFTConfig`]): Has the output folder, and whether checkpoints are saved.
    """

    def __init__(self, args: Any) -> None:
        self._args = args
        self._process = os.getpid()
        self._former: dict[int, Any] = {}
        self._trains = False
        self._signal: int | None = None  # that this process has received
        self._received = 0.0
        self._agreed: int | None = None  # that some rank had received at the end of the last step
        self._saves = False

    def __enter__(self) -> Self:
        self._install()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)
        self._former.clear()
        # After a signal, other errors come from processes that it has ended.
        if self._signal is not None and isinstance(error, Exception):
            stopped = TrainingStopped(self._signal)
        elif isinstance(error, TrainingStopped):
            stopped = error
        else:
            return
        if _is_main_process():
            tqdm.write(self._describe(stopped), file=sys.stderr)
        if stopped is not error:
            raise stopped from error

    def _install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in STOP_SIGNALS:
            former = signal.getsignal(number)
            # `nohup` ignores SIGHUP, and the background jobs of a script ignore SIGINT.
            if former not in (None, signal.SIG_IGN, self._receive):
                self._former.setdefault(number, former)
                signal.signal(number, self._receive)

    def _describe(self, error: TrainingStopped) -> str:
        newest = next(iter(list_checkpoints(self._args.output_dir)), None)
        if newest is None:
            return f"Stopped by {error.signal.name}. {self._args.output_dir} has no checkpoint."
        text = f"Stopped by {error.signal.name}. The newest checkpoint is {newest}"
        if self._args.save_only_model:
            return f"{text}, without the state of the optimizer (`save_only_model`)."
        return f"{text}. To resume, run the same command with `--resume_from_checkpoint true`."

    # Signals

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:
            _receive_in_fork(number)
            return
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._received = number, now
            if self._trains:
                _announce(number)
                return
        elif now - self._received < SAME_SIGNAL:
            return
        raise TrainingStopped(number)

    # Training

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Again, as the handler of `enable_jit_checkpoint` would train no further, but score and save as if at the end.
        self._install()
        self._trains = True
        loader = kwargs.get("train_dataloader")
        if loader is not None and loader.num_workers:
            loader.worker_init_fn = partial(_init_worker, loader.worker_init_fn)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._agreed = self._agree(args.device)
        # After the last step of an epoch its evaluation comes first, which a resumed run would not make up for.
        if self._agreed and not float(state.epoch).is_integer():
            self._save(args, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._agreed:
            self._save(args, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._agreed and self._saves:
            raise TrainingStopped(self._agreed)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trains = False
        # Agreed on too: a rank that left alone would leave the others in the collectives of the last save.
        agreed = self._agree(args.device)
        if agreed is not None:
            raise TrainingStopped(agreed)

    def _agree(self, device: torch.device) -> int | None:
        """A signal that some rank has received, or `None`. Call it on all ranks."""
        if PartialState().num_processes == 1:
            return self._signal
        received = torch.tensor([self._signal or 0], device=device)
        return int(gather(received).max()) or None

    def _save(self, args: Any, control: Any) -> None:
        if args.save_strategy == SaveStrategy.NO:
            assert self._agreed is not None
            raise TrainingStopped(self._agreed)
        self._saves = control.should_save = True


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _announce(number: int) -> None:
    if _is_main_process():
        text = f"\n{signal.Signals(number).name}: training stops after this step. A second signal stops it at once.\n"
        os.write(2, text.encode())  # a handler may interrupt a print


def _receive_in_fork(number: int) -> None:
    """A signal in a process that was forked from the one that trains, and has its handlers."""
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _init_worker(former: Callable[[int], None] | None, worker: int) -> None:
    """Have a worker of a data loader outlive SIGTERM while the step that needs it is finished."""
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_WORKER_GRACE))
    if former is not None:
        former(worker)
