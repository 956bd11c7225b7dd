"""The losses as modules."""

from .clip_loss import CLIPLoss, MultiCLIPLoss
from .dcl_loss import DCLLoss, DCLWLoss
from .debiased_loss import DebiasedLoss, HardNegativeLoss
from .distill_loss import DistillLoss
from .guided_loss import GuidedInfoNCELoss
from .info_nce_loss import InfoNCELoss
from .macl_loss import MACLLoss
from .multiview_loss import MultiViewNTXentLoss
from .nt_xent_loss import NTXentLoss
from .queue import NegativeQueue, QueueInfoNCELoss
from .rince_loss import RINCELoss
from .siglip_loss import NTLogisticLoss, SigLIPLoss
from .sup_con_loss import SupConLoss

__all__ = [
    "CLIPLoss",
    "DCLLoss",
    "DCLWLoss",
    "DebiasedLoss",
    "DistillLoss",
    "GuidedInfoNCELoss",
    "HardNegativeLoss",
    "InfoNCELoss",
    "MACLLoss",
    "MultiCLIPLoss",
    "MultiViewNTXentLoss",
    "NTLogisticLoss",
    "NTXentLoss",
    "NegativeQueue",
    "QueueInfoNCELoss",
    "RINCELoss",
    "SigLIPLoss",
    "SupConLoss",
]
