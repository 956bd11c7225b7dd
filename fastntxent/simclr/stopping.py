"""Ctrl-C and SIGTERM, which SLURM and torchrun send, end a run after the step in progress, with a checkpoint."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
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
        self._settled = False
        self._process = os.getpid()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Note the first signal in here instead of acting on it; a second Ctrl-C raises KeyboardInterrupt at once.

        A handler that the program has set itself stays in place. Signals reach the main thread alone: in another
        thread this is a no-op.
        """
        self.number, self._settled, self._process = 0, False, os.getpid()
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

    def settle(self) -> None:
        """Ignore all further signals until `listening` ends: the checkpoint is written, and the process is ending."""
        self._settled = True

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._settled or os.getpid() != self._process:  # a worker process has this handler until `ignore_signals`
            return
        if self.number:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.number = number
        if self._speak:  # by os.write: a signal may arrive in the midst of a print()
            os.write(2, b"\nstopping after this step; Ctrl-C stops at once\n")


def ignore_signals(worker: int, then: Callable[[int], object] | None = None) -> None:
    """Leave stopping to the main process: for its DataLoader's worker processes, which receive the signals too.

    A worker that a signal ends makes PyTorch raise RuntimeError in the main process, in the midst of any step.

    Args:
        worker: the worker's number.
        then: the `worker_init_fn` of a user's DataLoader.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if then is not None:
        then(worker)


def kill_workers() -> None:
    """Kill all worker processes: one that hangs in a read, and ignores SIGTERM, would keep this process from ending."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise
    for worker in multiprocessing.active_children():
        worker.kill()
