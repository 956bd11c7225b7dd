"""NT-Xent (SimCLR) and its family, without the 2N x 2N similarity matrix."""

import importlib
from typing import TYPE_CHECKING

from .backends import BackendStatus, backends
from .caching import cached_backward
from .devices import verify, warm_up
from .distributed import Sharding
from .losses import (
    NTXentTerms,
    clip,
    dcl,
    dclw,
    debiased,
    distill,
    guided_info_nce,
    hard_negative,
    info_nce,
    macl,
    multi_clip,
    multiview_nt_xent,
    nt_logistic,
    nt_xent,
    nt_xent_terms,
    rince,
    siglip,
    sup_con,
)
from .matryoshka import MatryoshkaLoss, matryoshka
from .metrics import alignment, contrastive_accuracy, effective_rank, positive_ranks, uniformity
from .modules import (
    CLIPLoss,
    DCLLoss,
    DCLWLoss,
    DebiasedLoss,
    DistillLoss,
    GuidedInfoNCELoss,
    HardNegativeLoss,
    InfoNCELoss,
    MACLLoss,
    MultiCLIPLoss,
    MultiViewNTXentLoss,
    NegativeQueue,
    NTLogisticLoss,
    NTXentLoss,
    QueueInfoNCELoss,
    RINCELoss,
    SigLIPLoss,
    SupConLoss,
)
from .primitives import CrossNegLse, cross_neg_lse, neg_lse
from .retrieval import Classification, Retrieval, retrieve, zero_shot_classify
from .two_views import split_views
from .verification.verdict import Verdict

if TYPE_CHECKING:
    from . import compat as compat
else:

    def __getattr__(name: str) -> object:
        """Import the drop-ins on first use."""
        if name != "compat":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(f"{__name__}.{name}")


__version__ = "0.2.0"

__all__ = [
    "BackendStatus",
    "CLIPLoss",
    "Classification",
    "CrossNegLse",
    "DCLLoss",
    "DCLWLoss",
    "DebiasedLoss",
    "DistillLoss",
    "GuidedInfoNCELoss",
    "HardNegativeLoss",
    "InfoNCELoss",
    "MACLLoss",
    "MatryoshkaLoss",
    "MultiCLIPLoss",
    "MultiViewNTXentLoss",
    "NTLogisticLoss",
    "NTXentLoss",
    "NTXentTerms",
    "NegativeQueue",
    "QueueInfoNCELoss",
    "RINCELoss",
    "Retrieval",
    "Sharding",
    "SigLIPLoss",
    "SupConLoss",
    "Verdict",
    "alignment",
    "backends",
    "cached_backward",
    "clip",
    "contrastive_accuracy",
    "cross_neg_lse",
    "dcl",
    "dclw",
    "debiased",
    "distill",
    "effective_rank",
    "guided_info_nce",
    "hard_negative",
    "info_nce",
    "macl",
    "matryoshka",
    "multi_clip",
    "multiview_nt_xent",
    "neg_lse",
    "nt_logistic",
    "nt_xent",
    "nt_xent_terms",
    "positive_ranks",
    "retrieve",
    "rince",
    "siglip",
    "split_views",
    "sup_con",
    "uniformity",
    "verify",
    "warm_up",
    "zero_shot_classify",
]
