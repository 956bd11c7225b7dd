"""Functions that call the registered operators `torch.ops.fastntxent.*`.

    neg_lse          (u, ids, inv_tau)               -> nu, for any ids
    neg_lse_sum      (u, ids, inv_tau, weights)      -> weighted sum of nu, d_u, d_inv_tau
    cross_neg_lse    (u, v, u_ids, v_ids, inv_tau)   -> nu of the rows, nu of the columns
    held_neg_lse     (u, rows, u_ids, row_ids, held, inv_tau) -> nu against the first `held` rows of a buffer
    held_loss        (u, rows, u_ids, row_ids, held, inv_tau, against) -> a loss against the buffer, with its gradient
    limited_neg_lse  (u, v, u_ids, v_ids, u_limits, v_limits, inv_tau) -> nu over similarities up to each row's limit
    limited_nt_xent_scalar, limited_nt_xent_value    -> NT-Xent with such limits; `_scalar` also returns its gradient
    nt_xent_rows     (z_i, z_j, inv_tau)             -> nu, pi: the weighted path
    nt_xent_scalar   (z_i, z_j, inv_tau)             -> loss, d_z_i, d_z_j, d_inv_tau: the scalar path
    nt_xent_value    (z_i, z_j, inv_tau)             -> loss, when no gradient is needed
    sup_con_scalar   (z, ids, inv_tau)               -> loss, d_z, d_inv_tau: SupCon in one call
    info_nce_scalar, info_nce_value                  -> InfoNCE or CLIP; `_scalar` also returns its gradient
    softplus         (u, v, u_ids, v_ids, inv_tau, bias) -> sums of log(1 + exp(logit + bias)) over other groups
    sigmoid_scalar, sigmoid_value                    -> SigLIP or NT-Logistic; `_scalar` also returns its gradient
    positive_lse, positive_sum                       -> log-sum-exps and sums over the rows of the same group
    soft_dots, soft_dots_sum                         -> a student's similarities averaged under a teacher's softmax
    guided_neg_lse                                   -> nu without the columns that a guide excludes
    pair_dots        (u, v, a, b)                    -> u_a . v_b for every pair of indices
    mask_product     (mask, x)                       -> mask @ x without the mask's diagonal, any real dtype or bool
    positive_ranks   (u)                             -> the rank of each row's positive
    nearest          (queries, corpus, k)            -> each query's k largest cosine similarities, and their indices
    copy_now         (x)                             -> a copy of a buffer that may change before the backward

Each of these has a `_backward` operator, except `sup_con_scalar` (which shares `neg_lse_sum_backward`), the operators
whose names end in `_value`, `positive_ranks`, `nearest` and `copy_now`. The scalar path computes the loss and its
gradient for an upstream gradient of 1 in one call, and its backward only multiplies by the actual upstream gradient.
If a loss has a scalar path, the public layer uses it in a single process whenever a gradient is needed and the loss is
reduced to a single number. `neg_lse_sum` is the scalar path of any loss that is linear in nu. The weighted path returns
nu and pi of every row, and its backward takes any upstream gradients for them.
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
