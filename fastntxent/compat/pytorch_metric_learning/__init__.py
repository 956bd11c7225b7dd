"""pytorch-metric-learning's `NTXentLoss`, `SupConLoss`, and what it wraps around a loss."""

from .distributed import DistributedLossWrapper
from .losses import NTXentLoss, SelfSupervisedLoss, SupConLoss
from .memory import CrossBatchMemory

__all__ = ["CrossBatchMemory", "DistributedLossWrapper", "NTXentLoss", "SelfSupervisedLoss", "SupConLoss"]
