"""Passes signals from `rlora train` on to the processes that it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any


# Seconds in which signals count as one, as in `rlora_trl.trainer.stopping`.
SAME_SIGNAL = 1.0


class Relay:
    """
    Passes SIGINT, SIGTERM and SIGHUP on to the child processes while a `with` block waits for them.

    A second signal, a second or more after the first, kills them: a checkpoint is complete at any moment. Where there
    is no child process, a signal ends this one.

    Attributes:
        signal (`int`, *optional*): The first signal that this process has received.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._received = 0.0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Relay:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            # `nohup` ignores SIGHUP, and it stays ignored.
            if number is not None and signal.getsignal(number) not in (None, signal.SIG_IGN):
                self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)

    def _receive(self, number: int, frame: Any) -> None:
        import psutil

        children = psutil.Process().children()
        now, again = time.monotonic(), False
        if self.signal is None:
            self.signal, self._received = number, now
        elif now - self._received < SAME_SIGNAL:
            return
        else:
            again, children = True, psutil.Process().children(recursive=True)
        if not children:
            raise SystemExit(128 + self.signal)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                if again:
                    child.kill()
                elif os.name != "nt":  # where the console has sent Ctrl-C to all of them
                    child.send_signal(number)
