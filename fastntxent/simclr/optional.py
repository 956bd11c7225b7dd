"""Imports of optional packages, which the loss itself does not need."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def require(module: str, install: str = "fastntxent[simclr]") -> ModuleType:
    """Import and return an optional module. If it is missing, the ImportError says what to install."""
    package = module.partition(".")[0] if "[" in install else install
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs the package {package}: pip install {install} ({error})") from error
    except RuntimeError as error:  # torchvision with a PyTorch that it was not built for
        raise ImportError(f"the installed {package} does not work with this PyTorch: {error}") from error
