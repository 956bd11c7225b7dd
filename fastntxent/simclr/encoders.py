"""Encoders from outside this package: networks of timm and torchvision, and the user's modules.

A network that cannot be trained as an encoder is rejected before training, with an error that names the network.
"""

from __future__ import annotations

import copy
import difflib
import functools
import importlib
import inspect
import re
import sys
import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .batch_norm import without_sync
from .optional import require
from .output import first_line

LIBRARIES = ("timm:", "torchvision:")
_GIVEN_TO_FACTORIES = ("channels", "image_size")

Size = tuple[int, int]
Made = TypeVar("Made")

# Modules that factories have returned. The evaluation builds an untrained encoder to compare with the trained one. If a
# factory returned the same module again, the trained encoder would be compared with itself.
_made: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def check_name(model: str, name: str) -> None:
    """Raise ValueError unless `model` has the form timm:NAME, torchvision:NAME or package.module:factory."""
    source, _, rest = model.partition(":")
    if model.startswith(LIBRARIES):
        if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*", rest, re.ASCII):
            raise ValueError(f"{name} must name a model of {source}, such as {source}:resnet18, got {model!r}")
    elif not all(part.isidentifier() for part in (*source.split("."), *rest.split("."))):
        raise ValueError(f"{name} must have the form package.module:factory, got {model!r}")


def by_name(model: str, channels: int, size: Size) -> nn.Module:
    """Return the network that `model` names, with new parameters from torch's global generator. `check_name` must
    accept the name.

    Args:
        channels: number of channels of the images.
        size: height and width of the images.

    Raises:
        ValueError: there is no such network, or it cannot be built.
        ImportError: a package or module cannot be imported.
    """
    library, _, name = model.partition(":")
    if library == "timm":
        return _timm(model, name, channels, size)
    if library == "torchvision":
        return _torchvision(model, name, channels, size)
    return _from_factory(model, channels, size)


def find(model: str) -> None:
    """Import the library or the factory that a model's name refers to, without building the network.

    Raises:
        ValueError, ImportError: as in `by_name`.
    """
    library, _, name = model.partition(":")
    if library in ("timm", "torchvision"):
        require(library, install=library)
    elif name:
        _check_origin(model, _imported(model))


def adopt(name: str, body: nn.Module, channels: int, size: Size, *, train: bool = True) -> int:
    """Return the number of features of a network, after checking that it can serve as an encoder.

    The network is run on two images of zeros. This run initialises lazy layers, and may draw from torch's global
    generator. SyncBatchNorms become ordinary batch norms; in training, every batch norm uses the rows of all ranks.

    Args:
        name: the network's name in messages.
        channels, size: number of channels of the images, and their (height, width).
        train: whether the network will be trained. If so, a copy is also run forward and backward in training mode.

    Raises:
        ValueError: the network cannot serve as an encoder.
    """
    if not isinstance(body, nn.Module):
        raise ValueError(f"{name} must be a torch.nn.Module, got {_kind(body)}")
    for place, tensor in (*body.named_parameters(), *body.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{name} must have its parameters in memory, but {place} is on the meta device")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(
                f"{name} must have float32 parameters, but {place} is {tensor.dtype}; for mixed precision use --amp"
            )
    without_sync(body)
    device = next((p.device for p in body.parameters()), torch.device("cpu"))
    images = torch.zeros(2, channels, *size, device=device)
    body.eval()
    features = _features_of(name, body, images)
    if not train:
        return features
    if not any(p.requires_grad for p in body.parameters()):
        raise ValueError(f"{name} has no parameters to train")
    try:
        twin = copy.deepcopy(body)
    except Exception as error:
        raise ValueError(
            f"{name} must be a module that copy.deepcopy can copy, as the evaluation does: {_reason(error)}"
        ) from error
    twin.train()
    if _features_of(f"{name} in training mode", twin, images, backward=True) != features:
        raise ValueError(f"{name} must return as many features in training mode as in eval mode")
    body.train()
    return features


def _features_of(name: str, body: nn.Module, images: Tensor, *, backward: bool = False) -> int:
    """Return the number of features per image; ValueError if the output is not features or the backward fails."""
    shape = " x ".join(map(str, images.shape[1:]))
    try:
        with torch.set_grad_enabled(backward):
            h = body(images)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{name} does not take images of {shape} (channels, height, width): {_reason(error)}"
        ) from error
    if not isinstance(h, Tensor):
        raise ValueError(f"{name} must return a tensor of features (N, F) and nothing else, got {_kind(h)}")
    found = f"{tuple(h.shape)} for two images of {shape}"
    if h.dtype != torch.float32:
        raise ValueError(f"{name} must return float32 features, got {h.dtype}")
    if h.ndim == 4 and h.shape[2:] != (1, 1):
        raise ValueError(
            f"{name} must return features (N, F), got maps {found}: add torch.nn.AdaptiveAvgPool2d(1) at its end"
        )
    if h.ndim == 3:
        raise ValueError(
            f"{name} must return features (N, F), got {found}: return one token per image, or the mean over tokens"
        )
    if h.ndim not in (2, 4) or h.shape[0] != len(images) or h.shape[1] < 1:
        raise ValueError(f"{name} must return features (N, F), one row per image, got {found}")
    if backward:
        _try_backward(name, h)
    return h.shape[1]


def _try_backward(name: str, h: Tensor) -> None:
    if not h.requires_grad:
        raise ValueError(
            f"{name} must return features with a gradient: is there a detach() or torch.no_grad() in its forward?"
        )
    try:
        h.sum().backward()
    except Exception as error:
        raise ValueError(f"{name} fails in its backward: {_reason(error)}") from error


def _timm(model: str, name: str, channels: int, size: Size) -> nn.Module:
    timm = require("timm", install="timm")
    if not timm.is_model(name):
        raise ValueError(_unknown(model, "timm", name, timm.list_models()))
    create = functools.partial(timm.create_model, name, pretrained=False, num_classes=0, in_chans=channels)
    generator = torch.get_rng_state()
    try:
        return _make(model, functools.partial(create, img_size=_side(size)))
    except ValueError as error:
        if not (isinstance(error.__cause__, TypeError) and "img_size" in str(error.__cause__)):
            raise
    torch.set_rng_state(generator)
    return _make(model, create)  # a network that takes no img_size


def _torchvision(model: str, name: str, channels: int, size: Size) -> nn.Module:
    models = require("torchvision.models", install="torchvision")
    names = models.list_models(module=models)  # classifiers only: other models load weights, or return no features
    if name not in names:
        raise ValueError(_unknown(model, "torchvision", name, names))
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        options = {"image_size": _side(size)}
    elif name.startswith("maxvit"):
        options = {"input_size": size}
    network = _make(model, functools.partial(models.get_model, name, weights=None, **options))
    linear = [place for place, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear or network.get_submodule(linear[-1]).out_features != 1000:
        raise ValueError(f"--model {model} has no linear classifier to remove; write a factory that returns features")
    parent, _, last = linear[-1].rpartition(".")
    setattr(network.get_submodule(parent), last, nn.Identity())
    return network if channels == 3 else _GreyAsColour(network)


class _GreyAsColour(nn.Module):
    """A network for images with three channels, wrapped to take images with one channel."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.network(x.expand(-1, 3, -1, -1))
        return h


def _from_factory(model: str, channels: int, size: Size) -> nn.Module:
    factory = _imported(model)
    if isinstance(factory, nn.Module):
        raise ValueError(f"--model {model} is a module, but it must be a function that returns a new module")
    if not callable(factory):
        raise ValueError(f"--model {model} must be a function that returns a torch.nn.Module, got {_kind(factory)}")
    _check_origin(model, factory)
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError) as error:
        raise ValueError(f"--model {model} has no signature that Python can inspect: {_reason(error)}") from error
    offered = {"channels": channels, "image_size": _side(size)}
    given = {}
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.name in offered and parameter.kind != parameter.POSITIONAL_ONLY:
            given[parameter.name] = offered[parameter.name]
        elif parameter.default is parameter.empty:
            raise ValueError(
                f"--model {model} may require only the arguments {' and '.join(_GIVEN_TO_FACTORIES)}, but it requires "
                f"{parameter.name}"
            )
    body = _make(model, functools.partial(factory, **given))
    if not isinstance(body, nn.Module):
        raise ValueError(f"--model {model} must return a torch.nn.Module, got {_kind(body)}")
    if body in _made:
        raise ValueError(f"--model {model} returned the same module a second time, but each call must return a new one")
    _made.add(body)
    return body


def _imported(model: str) -> Any:
    """Import and return the object that a name of the form package.module:factory refers to."""
    module_name, _, attribute = model.partition(":")
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(
            f"--model {model} names a module of Python's standard library, which has no encoders; "
            "if you mean a file of that name, rename it"
        )
    try:
        found = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if f"{module_name}.".startswith(f"{missing}."):
            words = f"there is no module {missing}: it must be in the current directory or installed"
        else:
            words = f"{module_name} needs the package {missing}, which is not installed: pip install {missing}"
        raise ImportError(f"--model {model}: {words}") from error
    except ImportError as error:
        raise ImportError(f"--model {model}: importing {module_name} failed: {first_line(error)}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"--model {model}: importing {module_name} failed: {_reason(error)}") from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except Exception as error:
            known = [name for name, value in getattr(found, "__dict__", {}).items() if callable(value)]
            raise ValueError(_unknown(model, module_name, attribute, known)) from error
    return found


def _check_origin(model: str, factory: Any) -> None:
    """Raise ValueError for a function that is written in C or belongs to the standard library.

    `load_encoder` calls the function that a checkpoint names, and a malicious checkpoint must not be able to name
    os.system.
    """
    while isinstance(factory, functools.partial):
        factory = factory.func
    home = (getattr(factory, "__module__", None) or "builtins").partition(".")[0]
    if home in sys.stdlib_module_names or isinstance(factory, types.BuiltinFunctionType):
        raise ValueError(f"--model {model} must be a function or class from your own module, got one from {home}")


def _make(model: str, factory: Callable[[], Made]) -> Made:
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise ValueError(f"--model {model} cannot be built: {_reason(error)}") from error


def _unknown(model: str, place: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"--model {model}: {place} has no {name}" + (f"; did you mean {' or '.join(near)}?" if near else "")


def _side(size: Size) -> int | Size:
    """Return the side of a square image, or the (height, width) of an image that is not square."""
    return size[0] if size[0] == size[1] else size


def _kind(value: object) -> str:
    return f"a value of type {type(value).__name__}"


def _reason(error: BaseException) -> str:
    """Return the error's type and first line, for a message on one line."""
    words = first_line(error)
    kind = type(error).__name__
    return kind if words == kind else f"{kind}: {words}"
