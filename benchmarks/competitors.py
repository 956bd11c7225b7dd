"""The losses to compare, by name. `make(temperature)` returns a function loss(z_i, z_j), which calls the loss as its
documentation recommends."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

import fastntxent
from fastntxent.options import BackendName

from . import losses

Loss = Callable[[Tensor, Tensor], Tensor]

PACKAGES = ("lightly", "pytorch-metric-learning", "info-nce-pytorch")


class Competitor(NamedTuple):
    """A loss to compare: how to make it, on which devices and up to which size it runs, and its reference."""

    make: Callable[[float], Loss]  # raises ImportError if it cannot run here
    largest: int  # samples; beyond this a step takes about half a minute, or needs many GiB
    truth: Callable[[Tensor, Tensor, float], Tensor] = losses.oracle
    note: str = ""
    device_types: tuple[str, ...] = ("any",)


def our_loss(name: str, temperature: float, normalize: bool = True) -> Loss:
    """Return our loss on a backend, or raise ImportError if the backend cannot run here."""
    status = fastntxent.backends()[name]
    if not status.available:
        raise ImportError(status.reason)
    return fastntxent.NTXentLoss(temperature, normalize=normalize, backend=cast("BackendName", name))


def _compiled(temperature: float) -> Loss:
    torch.compiler.reset()  # a user compiles for a single size, so reuse nothing compiled for another size
    return torch.compile(lambda z_i, z_j: losses.dense(z_i, z_j, temperature), dynamic=False)


def _lightly(temperature: float) -> Loss:
    return lightly_loss("ntx_ent_loss").NTXentLoss(temperature=temperature)


def lightly_loss(name: str) -> types.ModuleType:
    """Return a module of lightly.loss. torchvision need not be installed."""
    if importlib.util.find_spec("lightly") and not _imports("torchvision"):
        _lightly_without_torchvision()
    return importlib.import_module(f"lightly.loss.{name}")


def _imports(name: str) -> bool:
    """Return whether a module can be imported. A torchvision built for another PyTorch version cannot be."""
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True


def _lightly_without_torchvision() -> None:
    """Make NT-Xent and other losses of the installed lightly.loss importable without the rest of lightly.

    The rest needs torchvision. `lightly.models.utils` is left empty, because NT-Xent calls it only for a memory bank
    shared by several processes.
    """
    package = importlib.util.find_spec("lightly")
    assert package is not None
    assert package.submodule_search_locations is not None
    (root,) = package.submodule_search_locations
    for name in ("loss", "models", "models.modules", "models.utils"):
        module = types.ModuleType(f"lightly.{name}")
        module.__path__ = [str(Path(root, *name.split(".")))]
        sys.modules[module.__name__] = module
    sys.modules["lightly.models"].utils = sys.modules["lightly.models.utils"]  # type: ignore[attr-defined]


def _pytorch_metric_learning(temperature: float) -> Loss:
    library = importlib.import_module("pytorch_metric_learning.losses")
    return library.SelfSupervisedLoss(library.NTXentLoss(temperature=temperature))


def _info_nce(temperature: float) -> Loss:
    return importlib.import_module("info_nce").InfoNCE(temperature=temperature)


OURS = {
    name: Competitor(partial(our_loss, name), 16384 if name == "blocked" else 65536, device_types=status.device_types)
    for name, status in fastntxent.backends().items()
    if name != "reference"
}
COMPETITORS = {
    **OURS,
    "eager": Competitor(lambda temperature: partial(losses.dense, temperature=temperature), 4096),
    "compiled": Competitor(_compiled, 4096),
    "chunked": Competitor(lambda temperature: partial(losses.chunked, temperature=temperature), 16384),
    "flex-attention": Competitor(losses.FlexAttention, 65536, device_types=("cuda",)),
    "lightly": Competitor(_lightly, 4096),
    "pytorch-metric-learning": Competitor(_pytorch_metric_learning, 64),  # O(N^3) memory
    "info-nce-pytorch": Competitor(
        _info_nce, 16384, losses.one_way, "a different loss, for scale: one direction, no negatives within a view"
    ),
}


def names(device: str, n: int, only: Collection[str] | None = None) -> list[str]:
    """Return the names of the losses that run on a device with n samples, ours first."""
    return [
        name
        for name, competitor in COMPETITORS.items()
        if n <= competitor.largest and {"any", device} & set(competitor.device_types) and (not only or name in only)
    ]


def load(chosen: Iterable[str], temperature: float) -> tuple[dict[str, Loss], dict[str, str]]:
    """Return the losses that can be made here, and the reasons why the others cannot."""
    made, missing = {}, {}
    for name in chosen:
        try:
            made[name] = COMPETITORS[name].make(temperature)
        except ImportError as error:
            missing[name] = str(error)
    return made, missing


def versions() -> dict[str, str]:
    """Return the installed version of every library that is compared."""
    installed = {package.metadata["Name"]: package.version for package in importlib.metadata.distributions()}
    return {package: installed[package] for package in PACKAGES if package in installed}
