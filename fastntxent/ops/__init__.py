"""The registered operators `torch.ops.fastntxent.*`, behind differentiable functions.

    neg_lse        (u, ids, inv_tau)                 -> nu                               any ids, any weights
    neg_lse_sum    (u, ids, inv_tau, weights)        -> weighted sum of nu, d_u, d_inv_tau
    cross_neg_lse  (u, v, u_ids, v_ids, inv_tau)     -> nu of the rows, nu of the columns
    held_neg_lse   (u, rows, u_ids, row_ids, held, inv_tau) -> nu against the first `held` rows of a buffer
    nt_xent_rows   (z_i, z_j, inv_tau)               -> nu, pi                           the weighted path
    nt_xent_scalar    (z_i, z_j, inv_tau)               -> loss, d_z_i, d_z_j, d_inv_tau    the scalar path
    nt_xent_value   (z_i, z_j, inv_tau)               -> loss                             where no gradient is wanted
    positive_lse, positive_sum                       -> sums over the rows of the same group
    pair_dots      (u, v, a, b)                      -> u_a . v_b of every pair of indices
    mask_product   (mask, x)                         -> mask @ x, for a mask of any dtype
    positive_ranks (u)                               -> the place of each row's positive
    nearest        (queries, corpus, k)              -> the best k by cosine similarity, and which they are
    copy_now       (x)                               -> a copy of a buffer that will change before the backward

All but `nt_xent_value`, `positive_ranks`, `nearest` and `copy_now` have a `_backward`, an operator too. The scalar path
forms the gradient together with the loss, once, for an upstream gradient of 1; its backward only scales. The public
layer takes it where a gradient is wanted and one number is asked for. `neg_lse_sum` is the scalar path of a loss that
is linear in nu.
"""

from .held import copy_now, held_neg_lse
from .neg_lse import cross_neg_lse, neg_lse, neg_lse_sum
from .nt_xent import nt_xent_rows, nt_xent_scalar
from .pairs import mask_product, pair_dots
from .positives import positive_lse, positive_sum
from .ranks import positive_ranks
from .register import autocast_off, may_be_differentiated, tracing, unobserved
from .search import nearest

__all__ = [
    "autocast_off",
    "copy_now",
    "cross_neg_lse",
    "held_neg_lse",
    "mask_product",
    "may_be_differentiated",
    "nearest",
    "neg_lse",
    "neg_lse_sum",
    "nt_xent_rows",
    "nt_xent_scalar",
    "pair_dots",
    "positive_lse",
    "positive_ranks",
    "positive_sum",
    "tracing",
    "unobserved",
]
