"""The registered operators `torch.ops.fastntxent.*`, behind differentiable functions.

    neg_lse        (u, ids, inv_tau)                 -> nu                               any ids, any weights
    neg_lse_sum    (u, ids, inv_tau, weights)        -> weighted sum of nu, d_u, d_inv_tau
    cross_neg_lse  (u, v, u_ids, v_ids, inv_tau)     -> nu of the rows, nu of the columns
    held_neg_lse   (u, rows, u_ids, row_ids, held, inv_tau) -> nu against the first `held` rows of a buffer
    held_loss         (u, rows, u_ids, row_ids, held, inv_tau, against) -> a loss against the buffer, with its gradient
    limited_neg_lse   (u, v, u_ids, v_ids, u_limits, v_limits, inv_tau) -> nu of what is no more similar than a limit
    limited_nt_xent_scalar, limited_nt_xent_value    -> NT-Xent with such limits, the former with its gradient
    nt_xent_rows   (z_i, z_j, inv_tau)               -> nu, pi                           the weighted path
    nt_xent_scalar    (z_i, z_j, inv_tau)               -> loss, d_z_i, d_z_j, d_inv_tau    the scalar path
    nt_xent_value   (z_i, z_j, inv_tau)               -> loss                             where no gradient is wanted
    sup_con_scalar (z, ids, inv_tau)                 -> loss, d_z, d_inv_tau             SupCon in one call
    info_nce_scalar, info_nce_value                  -> the same of two towers, in one direction or both (CLIP)
    softplus       (u, v, u_ids, v_ids, inv_tau, bias) -> sums of log(1 + exp(logit + bias)) over other groups
    sigmoid_scalar, sigmoid_value                    -> SigLIP's or NT-Logistic's loss, the former with its gradient
    positive_lse, positive_sum                       -> sums over the rows of the same group
    soft_dots, soft_dots_sum                         -> a teacher's expectations of a student's similarities
    guided_neg_lse                                   -> nu without the columns that a guide leaves out
    pair_dots      (u, v, a, b)                      -> u_a . v_b of every pair of indices
    mask_product   (mask, x)                         -> mask @ x, for a mask of any dtype
    positive_ranks (u)                               -> the place of each row's positive
    nearest        (queries, corpus, k)              -> the best k by cosine similarity, and which they are
    copy_now       (x)                               -> a copy of a buffer that will change before the backward

All but the `_value`s, `positive_ranks`, `nearest` and `copy_now` have a `_backward`, an operator too. The scalar path
forms the gradient together with the loss, once, for an upstream gradient of 1; its backward only scales. The public
layer takes it where a gradient is wanted and one number is asked for. `neg_lse_sum` is the scalar path of a loss that
is linear in nu.
"""

from ..algebra import autocast_off
from .guided import guided_neg_lse
from .held import copy_now, held_loss, held_neg_lse
from .limited import limited_neg_lse, limited_nt_xent_scalar
from .neg_lse import cross_neg_lse, neg_lse, neg_lse_sum
from .nt_xent import nt_xent_rows, nt_xent_scalar
from .pairs import mask_product, pair_dots
from .positives import positive_lse, positive_sum
from .ranks import positive_ranks
from .register import may_be_differentiated, tracing, uncompiled, unobserved, watched_by_autograd
from .search import nearest
from .soft_targets import called_neg_lse, soft_dots, soft_dots_sum
from .softplus import sigmoid_scalar, softplus_sums
from .sup_con import sup_con_scalar
from .towers import info_nce_scalar

__all__ = [
    "autocast_off",
    "called_neg_lse",
    "copy_now",
    "cross_neg_lse",
    "guided_neg_lse",
    "held_loss",
    "held_neg_lse",
    "info_nce_scalar",
    "limited_neg_lse",
    "limited_nt_xent_scalar",
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
    "sigmoid_scalar",
    "soft_dots",
    "soft_dots_sum",
    "softplus_sums",
    "sup_con_scalar",
    "tracing",
    "uncompiled",
    "unobserved",
    "watched_by_autograd",
]
