"""The losses as functions: conventions, reductions and the O(M D) formulas over the operators. docs/losses.md has all
formulas in one place."""

from .adaptive import macl
from .debiased import debiased, hard_negative
from .decoupled import dcl, dclw
from .multiview import multiview_nt_xent
from .queries import info_nce
from .robust import rince
from .simclr import NTXentTerms, nt_xent, nt_xent_terms
from .supervised import sup_con
from .two_towers import clip

__all__ = [
    "NTXentTerms",
    "clip",
    "dcl",
    "dclw",
    "debiased",
    "hard_negative",
    "info_nce",
    "macl",
    "multiview_nt_xent",
    "nt_xent",
    "nt_xent_terms",
    "rince",
    "sup_con",
]
