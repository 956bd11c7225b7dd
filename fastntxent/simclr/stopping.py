"""Ctrl-C and SIGTERM (sent by SLURM and torchrun) stop a run after the current step, with a checkpoint."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

_workers: weakref.WeakSet[BaseProcess] = weakref.WeakSet()  # worker processes of the loaders passed to `read`
_SIGNALS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class InterruptedRun(KeyboardInterrupt):
    """A signal stopped training after a complete step, and a checkpoint was written.

    Attributes:
        number: the signal's number.
    """

    def __init__(self, words: str, number: int) -> None:
        super().__init__(words)
        self.number = number


class StopRequest:
    """The signal that asked this process to stop.

    Attributes:
        number: the signal's number, or 0 if there was none.
    """

    def __init__(self, speak: bool = True) -> None:
        self.number = 0
        self._speak = speak
        self._settled = False
        self._process = os.getpid()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """In this block, record the first signal instead of acting on it. A second Ctrl-C raises KeyboardInterrupt.

        A handler that the program has installed stays in place. Only the main thread receives signals, so this is a
        no-op in other threads.
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
        """Ignore further signals until `listening` ends. Call this once the checkpoint is written and the run ends."""
        self._settled = True

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._settled or os.getpid() != self._process:  # worker processes inherit this handler
            return
        if self.number:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.number = number
        if self._speak:  # os.write, because a signal may arrive during a print()
            os.write(2, b"\nstopping after this step; press Ctrl-C to stop at once\n")


def ignore_signals(worker: int, then: Callable[[int], object] | None = None) -> None:
    """Ignore stop signals in a DataLoader worker. Workers receive them too, but only the main process handles them.

    If a signal killed a worker, PyTorch would raise RuntimeError in the main process at an arbitrary point of a step.

    Args:
        worker: the worker's number.
        then: the `worker_init_fn` of a user's DataLoader, called afterwards.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if then is not None:
        then(worker)


def read(loader: DataLoader[Any]) -> Iterator[Any]:
    """Iterate over a DataLoader whose workers ignore signals, and kill the workers when this process exits.

    The iterator may live until this process exits, because its workers are persistent or a traceback refers to it.
    Python would then send the workers SIGTERM, which they ignore, and wait for them forever.
    """
    batches = iter(loader)
    _workers.update(getattr(batches, "_workers", ()))
    return batches


def _kill_at_exit(process: int) -> None:
    if os.getpid() == process and (left := list(_workers)):  # a forked child inherits this handler
        _kill(left)


atexit.register(_kill_at_exit, os.getpid())


def kill_workers() -> None:
    """Kill all worker processes. A worker that hangs in a read ignores SIGTERM and would keep this process alive."""
    _kill(multiprocessing.active_children())


def _kill(workers: Iterable[BaseProcess]) -> None:
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would raise
    for worker in workers:
        worker.kill()
