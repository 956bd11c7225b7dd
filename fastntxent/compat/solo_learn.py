"""solo-learn's contrastive losses: `simclr_loss_func` (unsupervised and supervised), `mocov2plus_loss_func`,
`mocov3_loss_func`, `nnclr_loss_func` and `ressl_loss_func` of `solo.losses`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..algebra import in_double, row_dots, row_losses
from ..losses import info_nce
from ..opening import open_batch
from ..sides import Side, Teacher
from ..validation import check_features, check_rows, check_same, check_temperature, check_tensor
from ..watching import watched
from .shared import as_ids, default_group

__all__ = ["mocov2plus_loss_func", "mocov3_loss_func", "nnclr_loss_func", "ressl_loss_func", "simclr_loss_func"]


@watched
def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float | Tensor = 0.1) -> Tensor:
    r"""SimCLR's loss of rows in any order. The positives of a row are the rows with the same index.

    .. math:: L_i = -\log \frac{\sum_{p \in P(i)} e^{s_{ip}/\tau}}
        {\sum_{p \in P(i)} e^{s_{ip}/\tau} + \sum_{n \notin P(i), n \ne i} e^{s_{in}/\tau}}

    If the index of a row is its sample's number, this is SimCLR's loss. If it is the row's class, this is the
    supervised form, `sup_con(form="in")` minus the logarithm of the size of P(i).

    As in solo-learn, in a process group the loss covers the batch of all ranks, positives included, and is the same on
    every rank. Indexes must then mean the same on every rank.

    Args:
        z: (M, D), the embeddings of all views, normalised here.
        indexes: (M,), of any dtype, the sample or the class of each row.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there.

    Returns:
        A 0-d tensor, the mean over the rows that have a positive, or 0 if there are none. (solo-learn's loss is
        infinite and its gradient NaN as soon as one row has no positive.)

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, dtypes or devices do not match, the batch is empty, a number is out of range, or arguments
            differ between ranks.
        RuntimeError: a rank does not answer or is in a different call, or a second derivative is requested.

    Example:
        >>> import torch
        >>> simclr_loss_func(torch.eye(4).repeat(2, 1), torch.arange(4).repeat(2), temperature=1.0)
        tensor(1.1654)
    """
    group = default_group()
    check_rows("z", z, may_be_empty=group is not None)
    ids = as_ids("indexes", indexes, z)
    batch = open_batch(group, "simclr_loss_func", {"z": z}, temperature=temperature)
    inv_tau = batch.inverse_temperature(temperature)
    if (loss := batch.sup_con_at_once(z, ids, inv_tau, "ratio")) is not None:
        return loss
    u = batch.unit_rows(z)
    nu = batch.neg_lse(u, ids, inv_tau)
    lse = batch.positive_lse(u, ids, inv_tau)
    alone = lse.isneginf()
    losses = row_losses(nu, lse.masked_fill(alone, 0)).masked_fill(alone, 0)
    return batch.reduce(losses, counted=~alone)


def mocov2plus_loss_func(query: Tensor, key: Tensor, queue: Tensor, temperature: float | Tensor = 0.1) -> Tensor:
    """MoCo v2's loss: cross-entropy of each query with its key against the queue's columns. Nothing is normalised here.

    As in solo-learn, the loss covers this process's queries only, even in a process group.

    Args:
        query: (N, D), normalised by the caller.
        key: (N, D), normalised by the caller.
        queue: (D, K), one negative per column. It must not change before the backward; solo-learn passes a clone.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there.

    Returns:
        A 0-d tensor, the mean over the queries; float64 for float64 embeddings, else float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, dtypes or devices do not match, the batch is empty, or a number is out of range.

    Example:
        >>> import torch
        >>> mocov2plus_loss_func(torch.eye(2), torch.eye(2), torch.zeros(2, 3), temperature=1.0)  # log(e + 3) - 1
        tensor(0.7437)
    """
    check_rows("query", query)
    check_tensor("queue", queue)
    if queue.ndim != 2 or queue.shape[0] != query.shape[1] or queue.shape[1] == 0:
        raise ValueError(
            f"queue must have shape ({query.shape[1]}, K), a column for each negative, got {tuple(queue.shape)}"
        )
    check_same("query", query, "queue", queue, "dtype", "device")
    return info_nce(query, key, temperature, negatives=queue.T, normalize=False)


def mocov3_loss_func(query: Tensor, key: Tensor, temperature: float | Tensor = 0.2) -> Tensor:
    """MoCo v3's loss: cross-entropy of each query with its key among all keys, times 2 temperature.

    In a process group the keys come from all ranks, and the mean is over all ranks' queries (solo-learn's is over the
    rank's queries).

    Args:
        query: (N, D), normalised here.
        key: (N, D), normalised here.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there.

    Returns:
        A 0-d tensor; float64 for float64 embeddings, else float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, dtypes or devices do not match, the batch is empty, a number is out of range, or arguments
            differ between ranks.
        RuntimeError: a rank does not answer or is in a different call, or a second derivative is requested.

    Example:
        >>> import torch
        >>> mocov3_loss_func(torch.eye(4), torch.eye(4), temperature=0.5)  # log(1 + 3 / e^2)
        tensor(0.3408)
    """
    return info_nce(query, key, temperature, group=default_group()) * (2 * temperature)


def nnclr_loss_func(nn: Tensor, p: Tensor, temperature: float | Tensor = 0.1) -> Tensor:
    """NNCLR's loss: cross-entropy of each nearest neighbour with its prediction among all predictions.

    In a process group the predictions come from all ranks, and the mean is over all ranks' rows (solo-learn's is over
    the rank's rows).

    Args:
        nn: (N, D), for each sample the row of the queue that is nearest to its first view, normalised here.
        p: (N, D), the predictions of the second view, normalised here.
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there.

    Returns:
        A 0-d tensor; float64 for float64 embeddings, else float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, dtypes or devices do not match, the batch is empty, a number is out of range, or arguments
            differ between ranks.
        RuntimeError: a rank does not answer or is in a different call, or a second derivative is requested.

    Example:
        >>> import torch
        >>> nnclr_loss_func(torch.eye(4), torch.eye(4), temperature=1.0)  # log(e + 3) - 1
        tensor(0.7437)
    """
    group = default_group()
    check_rows("nn", nn, may_be_empty=group is not None)
    check_rows("p", p, may_be_empty=group is not None)
    check_same("nn", nn, "p", p, "shape", "dtype", "device")
    return info_nce(nn, p, temperature, group=group)


@watched
def ressl_loss_func(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature_q: float | Tensor = 0.1,
    temperature_k: float | Tensor = 0.04,
) -> Tensor:
    r"""ReSSL's loss: cross-entropy of a query's and its key's softmax over the queue. Nothing is normalised here.

    .. math:: L_i = -\sum_j p^k_{ij} \log p^q_{ij}, \qquad p^k_{ij} = \mathrm{softmax}_j(k_i \cdot v_j/\tau_k), \quad
        p^q_{ij} = \mathrm{softmax}_j(q_i \cdot v_j/\tau_q)

    where v are the rows of the queue. Zheng et al., "ReSSL: Relational Self-Supervised Learning with Weak
    Augmentation", 2021. As in solo-learn, the loss covers this process's queries only, even in a process group.

    Args:
        q: (N, D), normalised by the caller.
        k: (N, D), normalised by the caller. It gets no gradient.
        queue: (K, D), one row per entry. It must not change before the backward; solo-learn passes a clone.
        temperature_q: The queries' temperature, tau > 0, a float or a 0-d floating-point tensor.
        temperature_k: The keys' temperature, tau > 0, a float or a 0-d floating-point tensor. It gets no gradient.

    Returns:
        A 0-d tensor, the mean over the queries; float64 for float64 embeddings, else float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes, dtypes or devices do not match, the batch is empty, or a number is out of range.

    Memory is O((N + K) D): the logits (N, K) are never stored.

    Example:
        >>> import torch
        >>> ressl_loss_func(torch.eye(4), torch.eye(4), torch.eye(4), 1.0, 1.0)  # the entropy of softmax([1, 0, 0, 0])
        tensor(1.2683)
    """
    check_temperature(temperature_q, q, name="temperature_q")
    check_temperature(temperature_k, q, name="temperature_k")
    batch = open_batch(None, "ressl_loss_func", {"q": q, "k": k}, normalize=False)
    check_rows("queue", queue)
    check_same("q", q, "queue", queue, "dtype", "device")
    check_features("q", q, "queue", queue)
    inv_tau, teachers_inv_tau = (batch.inverse_temperature(tau) for tau in (temperature_q, temperature_k))
    if isinstance(teachers_inv_tau, Tensor):
        teachers_inv_tau = teachers_inv_tau.detach()
    u, v, t = batch.unit_rows(q), batch.unit_rows(queue), batch.unit_rows(k.detach())
    # Choose as a query's positive the queue's row that is nearest to the query's key (any row would do). Let l_j be the
    # query's logits, pi the logit of the positive, nu the log-sum-exp of the other logits, and p_j the key's
    # probabilities. Then
    #     -sum_j p_j log p^q_j = softplus(nu - pi) + sum_{j != positive} p_j (pi - l_j).
    held = v.detach()
    nearest = ops.nearest(t, held, 1)[1].squeeze(1)
    others = batch.beside(queue)
    rows, cols = Side(u, nearest), Side(v, others.sample_ids())
    nu = batch.neg_lse_to(rows, cols, inv_tau, beside=others)
    sims = row_dots(u, v[nearest])
    teachers_pos = teachers_inv_tau * row_dots(t, held[nearest])
    # The keys are the teacher. Its nu is computed in tiles, so it comes from the same logits as the probabilities, bit
    # for bit.
    teachers_nu = batch.in_tiles().neg_lse_to(
        rows._replace(u=t), cols._replace(u=held), teachers_inv_tau, beside=others.in_tiles()
    )
    # The queue's rows have no softmax over the keys: an infinite log-sum-exp makes their probabilities 0.
    teachers_lse = torch.logaddexp(teachers_nu, teachers_pos), torch.full_like(held[:, 0], torch.inf)
    expected = batch.soft_dots_at_once(rows, cols, Teacher(t, held, teachers_inv_tau, *teachers_lse))
    assert expected is not None, "the batch is in one process, and its losses are reduced"
    missed = torch.sigmoid(teachers_nu - teachers_pos)
    soft = in_double(missed * sims).sum() - expected
    return batch.reduce(row_losses(nu, inv_tau * sims)) + (inv_tau * soft / batch.n_samples).to(u.dtype)
