"""Ctrl-C and SIGTERM, which SLURM and torchrun send, end a run after the step in progress, with a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class InterruptedRun(KeyboardInterrupt):
    """Training was asked to stop, and did after a whole step; its checkpoint is written.

    Attributes:
        number: the signal's number.
    """

    def __init__(self, words: str, number: int) -> None:
        super().__init__(words)
        self.number = number


class StopRequest:
    """The signal that asked this process to stop.

    Attributes:
        number: the signal's number; 0 while there is none.
    """

    def __init__(self, speak: bool = True) -> None:
        self.number = 0
        self._speak = speak

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note the first signal in here instead of acting on it; a second Ctrl-C raises KeyboardInterrupt at once.

        A handler that the program has set itself stays in place. Signals reach the main thread alone: in another
        thread this is a no-op.
        """
        self.number = 0
        replaced = {}
        if threading.current_thread() is threading.main_thread():
            for number, default in _SIGNALS.items():
                if signal.getsignal(number) == default:
                    replaced[number] = signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in replaced.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
        if self._speak:  # by os.write: a signal may arrive in the midst of a print()
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")


def ignore_signals(_: int) -> None:
    """Leave stopping to the main process: for its DataLoader's worker processes, which receive the signals too."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
