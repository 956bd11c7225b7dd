"""pytorch-metric-learning's `NTXentLoss` and `SupConLoss`, and its wrappers around a loss."""

from .distributed import DistributedLossWrapper
from .losses import NTXentLoss, SelfSupervisedLoss, SupConLoss
from .memory import CrossBatchMemory

__all__ = ["CrossBatchMemory", "DistributedLossWrapper", "NTXentLoss", "SelfSupervisedLoss", "SupConLoss"]
