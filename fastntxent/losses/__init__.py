"""The losses as functions. A loss checks its arguments, opens a batch and writes its formula with the batch's methods.
docs/losses.md lists all formulas."""

from .clip_loss import clip, multi_clip
from .dcl_loss import dcl, dclw
from .debiased_loss import debiased, hard_negative
from .distill_loss import distill
from .guided_loss import guided_info_nce
from .info_nce_loss import info_nce
from .macl_loss import macl
from .multiview_loss import multiview_nt_xent
from .nt_xent_loss import NTXentTerms, nt_xent, nt_xent_terms
from .rince_loss import rince
from .siglip_loss import nt_logistic, siglip
from .sup_con_loss import sup_con

__all__ = [
    "NTXentTerms",
    "clip",
    "dcl",
    "dclw",
    "debiased",
    "distill",
    "guided_info_nce",
    "hard_negative",
    "info_nce",
    "macl",
    "multi_clip",
    "multiview_nt_xent",
    "nt_logistic",
    "nt_xent",
    "nt_xent_terms",
    "rince",
    "siglip",
    "sup_con",
]
