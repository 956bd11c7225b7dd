"""A small SimCLR trainer on the fused loss: `python -m fastntxent.simclr --help`."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .build import load_encoder
    from .config import Config
    from .data import ImageData, load_data
    from .history import TrainingError
    from .pipeline import run
    from .stopping import InterruptedRun
    from .train import Trainer
else:
    # Modules are loaded on first use, so that the command can report a missing package as a readable error.
    _WHERE = {
        "Config": "config",
        "ImageData": "data",
        "InterruptedRun": "stopping",
        "Trainer": "train",
        "TrainingError": "history",
        "load_data": "data",
        "load_encoder": "build",
        "run": "pipeline",
    }

    def __getattr__(name: str) -> object:
        """Load a name from its module."""
        if name not in _WHERE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_WHERE})


__all__ = ["Config", "ImageData", "InterruptedRun", "Trainer", "TrainingError", "load_data", "load_encoder", "run"]
