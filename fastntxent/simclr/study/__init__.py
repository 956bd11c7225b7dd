"""What the two terms of the loss and its temperature do, measured on runs of the trainer: docs/study.md explains them.

`python -m fastntxent.simclr study --help` says how to run it.
"""

from .conduct import conduct
from .plan import FULL, QUICK, Plan

__all__ = ["FULL", "QUICK", "Plan", "conduct"]
