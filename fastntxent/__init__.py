"""NT-Xent (SimCLR) and its family, without ever holding the 2N x 2N similarity matrix."""

from .backends import BackendStatus, backends
from .caching import cached_backward
from .functional import CrossNegLse, NTXentTerms, cross_neg_lse, neg_lse, nt_xent, nt_xent_terms
from .layouts import split_views
from .metrics import alignment, uniformity
from .modules import NTXentLoss

__version__ = "0.1.0"

__all__ = [
    "BackendStatus",
    "CrossNegLse",
    "NTXentLoss",
    "NTXentTerms",
    "alignment",
    "backends",
    "cached_backward",
    "cross_neg_lse",
    "neg_lse",
    "nt_xent",
    "nt_xent_terms",
    "split_views",
    "uniformity",
]
