"""The losses as modules."""

from .labels import SupConLoss
from .queue import NegativeQueue, QueueInfoNCELoss
from .towers import CLIPLoss, InfoNCELoss
from .views import (
    DCLLoss,
    DCLWLoss,
    DebiasedLoss,
    HardNegativeLoss,
    MACLLoss,
    MultiViewNTXentLoss,
    NTXentLoss,
    RINCELoss,
)

__all__ = [
    "CLIPLoss",
    "DCLLoss",
    "DCLWLoss",
    "DebiasedLoss",
    "HardNegativeLoss",
    "InfoNCELoss",
    "MACLLoss",
    "MultiViewNTXentLoss",
    "NTXentLoss",
    "NegativeQueue",
    "QueueInfoNCELoss",
    "RINCELoss",
    "SupConLoss",
]
