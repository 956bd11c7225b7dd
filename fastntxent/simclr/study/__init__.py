"""A study of the loss: how its two terms and its temperature shape the encoder that the trainer learns.

docs/study.md presents the results. `python -m fastntxent.simclr study` repeats the study; `--help` lists the options.
"""

from .conduct import conduct
from .plan import FULL, QUICK, Plan

__all__ = ["FULL", "QUICK", "Plan", "conduct"]
