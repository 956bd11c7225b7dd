"""The devices of this machine, and which backends have been proved on them."""

from __future__ import annotations

import torch

from .backends import candidates, check_name, checkable
from .verification import policy
from .verification.verdict import Verdict


def verify(
    device: torch.device | str | None = None, *, backend: str | None = None, refresh: bool = False
) -> dict[str, Verdict]:
    """Prove the kernels on a device, before `backend="auto"` takes them: values and gradients against float64.

    `auto` does this by itself at its first call on a GPU. Calling it beforehand moves the time (up to two minutes, most
    of it while Triton compiles) to where it suits: the start of a container, a node of the same kind, the first line of
    a script. Each backend is checked in a process of its own, so that a kernel that crashes or hangs there costs a
    message; what passes on a GPU is timed. Verdicts and times are kept under the user's cache folder, for this device
    model, driver, PyTorch, Triton and these kernels.

    Args:
        device: a CPU or GPU of this machine; None for the current GPU, or the CPU where there is none.
        backend: the name of one to check; None for all that can run there, which are then timed.
        refresh: check again what has a verdict, and time it again.

    Returns:
        A `Verdict` by backend; its `ok` says whether it has passed, and printed it is one line.

    Raises:
        ValueError: there is no such device or backend.

    Example:
        >>> import fastntxent
        >>> fastntxent.verify("tpu")
        Traceback (most recent call last):
        ...
        ValueError: device must be a CPU or a GPU of this machine, got 'tpu'
    """
    place = find(device)
    possible = checkable(place.type)
    if backend is not None:
        check_name(backend)
        if backend not in possible:
            raise ValueError(
                f"backend must be one that can be checked on {place} ({', '.join(possible) or 'none'}), got {backend!r}"
            )
        possible = {backend: possible[backend]}
    rivals = {} if backend else candidates(place.type)
    verdicts = policy.verify(place, possible, refresh=refresh, timed=bool(rivals))
    if rivals:
        verdicts, _ = policy.time_passed(place, rivals, verdicts, refresh=refresh)
    policy.forget()
    return verdicts


def find(device: torch.device | str | None) -> torch.device:
    """The device of a name, with its index; ValueError if it is not there."""
    if device is None:
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError):
        place = torch.device("meta")
    count = torch.cuda.device_count() if place.type == "cuda" else int(place.type == "cpu")
    if (place.index or 0) >= count:
        raise ValueError(f"device must be a CPU or a GPU of this machine, got {str(device)!r}")
    return place if place.type == "cpu" else torch.device("cuda", place.index or 0)


def present() -> list[torch.device]:
    """The CPU and every GPU of this machine."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
