"""Checks before ranks exchange anything: all ranks must be in the same call, or in the backward of the same call."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..algebra import in_double
from ..ops.register import saved
from . import wire

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FORWARD, _BACKWARD, _TEACHER = 0, 1, 2

# The constants of `_checksum`, as signed 64-bit numbers: Knuth's multiplier, and 2^64 divided by the golden ratio. Both
# are odd, and their bits have no regular pattern.
_MIX, _STEP = 6364136223846793005, -7046029254386353131

# The number of loss calls so far in each group.
_calls: weakref.WeakKeyDictionary[ProcessGroup, int] = weakref.WeakKeyDictionary()


class Alike(NamedTuple):
    """A tensor that must hold the same values on every rank."""

    tensor: Tensor


class Turn:
    """One call of a loss. `number` is the position of the call among the calls in its group. If calls are checked, the
    number is the same on every rank."""

    def __init__(self, group: ProcessGroup, number: int, function: str, checked: bool):
        self._group, self._number, self._function, self._checked = group, number, function, checked
        self._parts = 0

    def part(self) -> Part:
        """Return a new `Part`, for the next term of the loss that communicates in its backward."""
        self._parts += 1
        return Part(self, self._parts)

    def begin_backward(self, part: int, failed: bool, device: torch.device) -> None:
        """Raise unless every rank has reached the backward of this part without an error. If this rank has `failed`,
        its own error is not raised here: the caller re-raises it. A no-op if calls are not checked."""
        what = f"the backward of {self._function}, call {self._number}, part {part}"
        self._meet_again(_BACKWARD, part, failed, what, device)

    def end_calls_of_teacher(self, failed: bool, device: torch.device) -> None:
        """Raise unless every rank has called its teacher without an error. If this rank has `failed`, its own error is
        not raised here: the caller re-raises it. A no-op if calls are not checked."""
        self._meet_again(_TEACHER, 0, failed, f"the teacher of {self._function} (call {self._number})", device)

    def _meet_again(self, phase: int, part: int, failed: bool, what: str, device: torch.device) -> None:
        if not self._checked:
            return
        headers = _meet(self._group, torch.tensor([phase, self._number, part, int(failed)], device=device), what)
        lost = [str(rank) for rank, (*_, failed_there) in enumerate(headers) if failed_there]
        if lost and not failed:
            raise RuntimeError(f"{what} raised an error on rank {', '.join(lost)}")


class Part(NamedTuple):
    """A term of a loss that communicates in its backward. The autograd node of the term stores this record."""

    turn: Turn
    number: int

    def begin_backward(self, ctx: Any, device: torch.device) -> list[Any]:
        """Return the values that the node saved. If calls are checked, first check that every rank is in this backward.

        Without the check, ranks would exchange numbers of different losses if they ran the backwards of two losses in
        different orders or skipped a backward. If a saved tensor was changed in place on one rank, the check makes
        every rank raise.
        """
        try:
            values = saved(ctx)
        except RuntimeError:
            self.turn.begin_backward(self.number, True, device)
            raise
        self.turn.begin_backward(self.number, False, device)
        return values


def agree(
    group: ProcessGroup, function: str, n_samples: int, facts: dict[str, object] | None, device: torch.device
) -> tuple[Turn, list[int]]:
    """Return this call's `Turn` and the number of samples on each rank. `facts` are the values that must be the same on
    every rank. If `facts` is None, nothing is compared, and every rank is assumed to have `n_samples` samples."""
    number = _calls.get(group, 0) + 1
    samples = [n_samples] * group.size()
    if facts is not None:
        described = {name: _describe(fact) for name, fact in facts.items()}
        digest = hashlib.sha256(repr(sorted(described.items())).encode()).digest()[:8]
        header = torch.tensor([_FORWARD, number, n_samples, int.from_bytes(digest, "big", signed=True)], device=device)
        alike = {name: fact.tensor for name, fact in facts.items() if isinstance(fact, Alike)}
        for x in alike.values():
            header[-1] += _checksum(x)  # computed on the tensor's device: the host waits only for the headers
        headers = _meet(group, header, f"a call of {function}")
        if len({digest for *_, digest in headers}) > 1:
            described |= {name: f"{described[name]} and checksum {int(_checksum(x)):x}" for name, x in alike.items()}
            raise ValueError(_disagreement(wire.gather_objects(group, described)))
        number = max(number for _, number, *_ in headers)  # a rank that raised earlier has counted fewer calls
        samples = [n for _, _, n, _ in headers]
    _calls[group] = number
    return Turn(group, number, function, facts is not None), samples


def _meet(group: ProcessGroup, header: Tensor, what: str) -> list[list[int]]:
    """Return the headers of all ranks. Raise unless all ranks are in a forward, or in the same part of the same call.

    A header has four numbers, of which the first is the phase and the second the call's number. All headers have the
    same size, so they can be gathered even if the ranks are in different phases.
    """
    headers = wire.gather_numbers(group, header).tolist()
    phases = {(phase,) if phase == _FORWARD else (phase, number, part) for phase, number, part, _ in headers}
    if len(phases) > 1:
        found = [f"rank {rank} is in {this}" for rank, this in enumerate(wire.gather_objects(group, what))]
        raise RuntimeError(
            "the ranks must call losses, and run their backwards, in the same order: " + "; ".join(found)
        )
    return headers


def _describe(fact: object) -> str:
    """Return the text by which a value is compared and shown. The value of a tensor is read only if the tensor is 0-d
    and in host memory."""
    if isinstance(fact, Alike):
        return f"a tensor of shape {tuple(fact.tensor.shape)}"
    if not isinstance(fact, Tensor):
        return repr(fact)
    number = repr(fact.item()) if fact.ndim == 0 and fact.device.type == "cpu" else f"a tensor ({fact.ndim}-d)"
    return number + (", requires_grad" if fact.requires_grad and torch.is_grad_enabled() else "")


def _checksum(x: Tensor) -> Tensor:
    """Return a 64-bit checksum (0-d) of the values and their positions. It does not depend on the dtype if that dtype
    holds the values exactly."""
    wide = in_double(x.detach()).flatten() + 0.0  # turns -0 into 0
    bits = wide.view(torch.int64) if wide.dtype == torch.float64 else wide.float().view(torch.int32).to(torch.int64)
    places = torch.arange(1, len(bits) + 1, device=bits.device) * _STEP
    for _ in range(2):  # each round is a bijection on the bits
        bits = (bits ^ (bits >> 32 & 0xFFFFFFFF) ^ places) * _MIX
    return (bits ^ (bits >> 32 & 0xFFFFFFFF)).sum()


def _disagreement(described: Sequence[dict[str, str]]) -> str:
    if len({of_rank["function"] for of_rank in described}) > 1:  # arguments of different functions cannot be compared
        described = [{"function": of_rank["function"]} for of_rank in described]
    parts = []
    for name in sorted({name for of_rank in described for name in of_rank}):
        ranks: dict[str, list[str]] = {}
        for rank, of_rank in enumerate(described):
            ranks.setdefault(of_rank.get(name, "not given"), []).append(str(rank))
        if len(ranks) > 1:
            values = "; ".join(f"{value} on rank {', '.join(which)}" for value, which in ranks.items())
            parts.append(f"{name} is {values}")
    return "these must be the same on every rank: " + ". ".join(parts)
