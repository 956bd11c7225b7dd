"""A small SimCLR trainer on the fused loss: `python -m fastntxent.simclr --help`."""

from .build import load_encoder
from .config import Config
from .data import ImageData, load_data
from .history import TrainingError
from .run import run
from .stopping import InterruptedRun
from .train import Trainer

__all__ = ["Config", "ImageData", "InterruptedRun", "Trainer", "TrainingError", "load_data", "load_encoder", "run"]
