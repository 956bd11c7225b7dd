"""The family of losses written out densely, as oracles that share no code with the package.

Most take embeddings (already normalised) and the temperature, and return one loss per row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def per_row(tau: Tensor) -> Tensor:
    return tau[:, None] if tau.ndim else tau


def multiview(u: Tensor, tau: Tensor, ids: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """Return the loss of each row of views (V, N, D): the mean over its positives p of the cross-entropy of p in the
    softmax over p and the negatives."""
    V, N, _ = u.shape
    rows = u.flatten(0, 1)
    logits = rows @ rows.T / per_row(tau)
    sample = torch.arange(N).repeat(V)
    group = sample if ids is None else ids.repeat(V)
    losses = []
    for i in range(V * N):
        negatives = (group != group[i]).nonzero().flatten().tolist()
        positives = [j for j in range(V * N) if j != i and sample[j] == sample[i]]
        terms = [
            F.cross_entropy(logits[i, [p, *negatives]], torch.tensor(0), label_smoothing=smoothing) for p in positives
        ]
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses)


def pairs_and_negatives(u: Tensor) -> tuple[Tensor, Tensor]:
    """For two views (2, N, D), return each row's similarity to its positive (2N,) and to its negatives (2N, 2N - 2)."""
    N = u.shape[1]
    rows = u.flatten(0, 1)
    sims = rows @ rows.T
    sample = torch.arange(N).repeat(2)
    pos = (u[0] * u[1]).sum(dim=1).repeat(2)
    return pos, sims[sample[:, None] != sample].view(2 * N, 2 * N - 2)


def dcl(u: Tensor, tau: Tensor) -> Tensor:
    pos, negatives = pairs_and_negatives(u)
    return -pos / tau + torch.logsumexp(negatives / tau, dim=1)


def dclw(u: Tensor, tau: Tensor, sigma: float) -> Tensor:
    pos, negatives = pairs_and_negatives(u)
    weight = torch.exp(pos.detach() / sigma)
    return -(2 - weight / weight.mean()) * pos / tau + torch.logsumexp(negatives / tau, dim=1)


def hard_negative(u: Tensor, tau: Tensor, tau_plus: float, beta: float) -> Tensor:
    pos, negatives = pairs_and_negatives(u)
    n = negatives.shape[1]
    pos, exps = torch.exp(pos / tau), torch.exp(negatives / tau)
    importance = exps**beta
    reweighted = (importance * exps).sum(dim=1) / importance.mean(dim=1)
    estimate = (reweighted - tau_plus * n * pos) / (1 - tau_plus)
    return -torch.log(pos / (pos + torch.maximum(estimate, n * torch.exp(-1 / tau))))


def rince(u: Tensor, tau: Tensor, q: float, lam: float) -> Tensor:
    pos, negatives = pairs_and_negatives(u)
    pos, everything = torch.exp(pos / tau), torch.exp(pos / tau) + torch.exp(negatives / tau).sum(dim=1)
    return -(pos**q) / q + (lam * everything) ** q / q


def macl(u: Tensor, tau: Tensor, alpha: float, a_0: float) -> Tensor:
    pos, negatives = pairs_and_negatives(u)
    tau = tau * (1 + alpha * (pos.mean().detach() - a_0))
    logits = torch.cat((pos[:, None], negatives), dim=1) / tau
    missed = torch.softmax(logits, dim=1)[:, 1:].sum(dim=1)  # 1 - p of the positive
    # The first form is accurate if p is near 1, the second if p is near 0.
    losses = torch.where(missed < 0.5, -torch.log1p(-missed.clamp_max(0.5)), -torch.log_softmax(logits, dim=1)[:, 0])
    return losses / missed.detach()


def sup_con(u: Tensor, tau: Tensor, labels: Tensor, form: str) -> Tensor:
    """Supervised contrastive loss; 0 for a row without a positive."""
    logits = u @ u.T / tau
    losses = []
    for i in range(len(u)):
        others = torch.tensor([j for j in range(len(u)) if j != i], dtype=torch.long)
        if labels.ndim == 1:
            shared = (labels[others] == labels[i]).to(u.dtype)
        else:
            shared = (labels[others] & labels[i]).sum(dim=1).to(u.dtype)
        if not shared.any():
            losses.append(0 * logits[i, i])
            continue
        everything = torch.logsumexp(logits[i, others], dim=0)
        positives, negatives = logits[i, others[shared > 0]], logits[i, others[shared == 0]]
        if form == "out":
            losses.append((shared * (everything - logits[i, others])).sum() / shared.sum())
        elif form == "in":
            losses.append(-torch.log(torch.exp(positives - everything).mean()))
        else:
            terms = [torch.logsumexp(torch.cat((p[None], negatives)), dim=0) - p for p in positives]
            losses.append(torch.stack(terms).mean())
    return torch.stack(losses)


def weighted_sup_con(u: Tensor, tau: Tensor, labels: Tensor, pair_weights: Tensor) -> Tensor:
    """For each row, the cross-entropy of the softmax over the other rows. The targets are the pair weights, scaled to a
    sum of 1. The loss is 0 if all weights are 0."""
    logits = u @ u.T / tau
    losses = []
    for i in range(len(u)):
        others = torch.tensor([j for j in range(len(u)) if j != i], dtype=torch.long)
        weights = pair_weights[labels[i], labels[others]].to(u.dtype)
        if not weights.any():
            losses.append(0 * logits[i, i])
            continue
        targets = weights / weights.sum()
        losses.append(-(targets * torch.log_softmax(logits[i, others], dim=0)).sum())
    return torch.stack(losses)


def info_nce(
    query: Tensor,
    key: Tensor,
    tau: Tensor,
    *,
    negatives: Tensor | None = None,
    in_batch: bool = True,
    ids: Tensor | None = None,
    smoothing: float = 0.0,
    hardness: tuple[float, float] = (0.0, 0.0),
) -> Tensor:
    """`hardness` holds two strengths: one for the in-batch negatives, one for the explicit negatives."""
    losses = []
    for n in range(len(query)):
        t = tau[n] if tau.ndim else tau
        candidates = [(query[n] @ key[n] / t)[None]]
        if in_batch:
            group = torch.arange(len(key)) if ids is None else ids
            sims = key[group != group[n]] @ query[n]
            candidates.append(sims / t + hardness[0] * sims.detach())
        if negatives is not None:
            sims = (negatives[n] if negatives.ndim == 3 else negatives) @ query[n]
            candidates.append(sims / t + hardness[1] * sims.detach())
        losses.append(F.cross_entropy(torch.cat(candidates), torch.tensor(0), label_smoothing=smoothing))
    return torch.stack(losses)


def clip(image: Tensor, text: Tensor, tau: Tensor, ids: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    one = info_nce(image, text, tau, ids=ids, smoothing=smoothing)
    other = info_nce(text, image, tau, ids=ids, smoothing=smoothing)
    return (one + other) / 2


def distill(image: Tensor, text: Tensor, tau: Tensor, t_image: Tensor, t_text: Tensor, t_tau: float | Tensor) -> Tensor:
    """For each pair, half of the image's cross-entropy with the teacher's softmax over the texts, plus half of the
    text's cross-entropy with the teacher's softmax over the images."""
    logits, targets = image @ text.T / tau, t_image @ t_text.T / t_tau

    def direction(logits: Tensor, targets: Tensor) -> Tensor:
        return -(targets.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)

    return (direction(logits, targets) + direction(logits.T, targets.T)) / 2


def guided(
    query: Tensor,
    key: Tensor,
    *rest: Tensor,
    guide: Sequence[Tensor],
    margin: float = 0.0,
    relative: bool = False,
    anchors: bool = True,
    positives: bool = True,
) -> Tensor:
    """`rest` holds the negatives, if any, then the temperature; `guide` holds the guide's rows for query, key and
    negatives."""
    *negatives, tau = rest
    losses = []
    for n in range(len(query)):
        threshold = guide[0][n] @ guide[1][n]
        threshold = threshold - margin * (threshold.abs() if relative else 1)
        candidates = [(query, guide[0], j, key, guide[1]) for j in range(len(key)) if j != n]
        if anchors:
            candidates += [(query, guide[0], j, query, guide[0]) for j in range(len(key)) if j != n]
        if positives:
            candidates += [(key, guide[1], j, key, guide[1]) for j in range(len(key)) if j != n]
        for each in negatives:
            candidates += [(query, guide[0], j, each, guide[2]) for j in range(len(each))]
        sims = [
            rows[n] @ cols[j] for rows, g_rows, j, cols, g_cols in candidates if not g_rows[n] @ g_cols[j] > threshold
        ]
        logits = torch.stack([query[n] @ key[n], *sims]) / tau
        losses.append(F.cross_entropy(logits, torch.tensor(0)))
    return torch.stack(losses)


def siglip(image: Tensor, text: Tensor, tau: Tensor, bias: float | Tensor, ids: Tensor | None = None) -> Tensor:
    """For each image, the sum over the texts of a binary cross-entropy. Its target is 1 if the two have the same id."""
    groups = torch.arange(len(image)) if ids is None else ids
    together = (groups[:, None] == groups).to(image.dtype)
    logits = image @ text.T / tau + bias
    return F.binary_cross_entropy_with_logits(logits, together, reduction="none").sum(dim=1)


def softplus_sums(
    u: Tensor, v: Tensor, u_ids: Tensor, v_ids: Tensor, k: Tensor, bias: Tensor, positives: bool
) -> Tensor:
    """For each row, the sum of log(1 + exp(x)) over the columns of other groups, where x = k s + bias. `positives` adds
    the sum of log(1 + exp(-x)) over the columns of the row's own group."""
    x, agree = k * (u @ v.T) + bias, u_ids[:, None] == v_ids
    values = -F.logsigmoid(torch.where(agree, x, -x))
    return (values if positives else values.masked_fill(agree, 0)).sum(dim=1)


def nt_logistic(u: Tensor, tau: Tensor, bias: float | Tensor, ids: Tensor | None = None) -> Tensor:
    """For two views (2, N, D): the sum of each row's binary cross-entropies with its positive and with its
    negatives."""
    N = u.shape[1]
    rows, groups = u.flatten(0, 1), (torch.arange(N) if ids is None else ids).repeat(2)
    logits = rows @ rows.T / tau + bias
    losses = []
    for i in range(2 * N):
        negatives = logits[i, groups != groups[i]]
        positive = logits[i, (i + N) % (2 * N)]
        losses.append(-F.logsigmoid(positive) - F.logsigmoid(-negatives).sum())
    return torch.stack(losses)


def limited(u: Tensor, tau: Tensor, ids: Tensor | None = None, **limits: float) -> Tensor:
    """`multiview` without the negatives whose similarity is above the row's limit. The limit depends on the row's least
    similar positive and on the ceiling."""
    V, N, _ = u.shape
    rows = u.flatten(0, 1)
    sims = rows @ rows.T
    sample = torch.arange(N).repeat(V)
    group = sample if ids is None else ids.repeat(V)
    losses = []
    for i in range(V * N):
        positives = [j for j in range(V * N) if j != i and sample[j] == sample[i]]
        limit = limit_of(sims[i, positives].min(), **limits)
        logits = sims[i] / (tau[i] if tau.ndim else tau)
        negatives = ((group != group[i]) & (sims[i] <= limit)).nonzero().flatten().tolist()
        terms = [F.cross_entropy(logits[[p, *negatives]], torch.tensor(0)) for p in positives]
        losses.append(torch.stack(terms).mean())
    return torch.stack(losses)


def limit_of(
    positive: Tensor, margin: float | None = None, relative_margin: float | None = None, ceiling: float | None = None
) -> Tensor:
    limit = torch.tensor(torch.inf, dtype=positive.dtype)
    if margin is not None:
        limit = positive.detach() - margin
    if relative_margin is not None:
        limit = positive.detach() * (1 - relative_margin)
    return limit if ceiling is None else limit.clamp_max(ceiling)


def limited_info_nce(
    query: Tensor, key: Tensor, tau: Tensor, ids: Tensor | None = None, negatives: Tensor | None = None, **limits: float
) -> Tensor:
    groups = torch.arange(len(key)) if ids is None else ids
    losses = []
    for n in range(len(query)):
        t, positive = tau[n] if tau.ndim else tau, query[n] @ key[n]
        limit = limit_of(positive, **limits)
        sims = key[groups != groups[n]] @ query[n]
        if negatives is not None:
            sims = torch.cat((sims, (negatives[n] if negatives.ndim == 3 else negatives) @ query[n]))
        logits = torch.cat((positive[None], sims[sims <= limit])) / t
        losses.append(F.cross_entropy(logits, torch.tensor(0)))
    return torch.stack(losses)


def limited_sup_con(u: Tensor, tau: Tensor, labels: Tensor, form: str, ceiling: float) -> Tensor:
    """`sup_con` without the negatives whose similarity is above the ceiling; 0 for a row without a positive."""
    sims = u @ u.T
    losses = []
    for i in range(len(u)):
        others = torch.arange(len(u)) != i
        positives = sims[i, others & (labels == labels[i])] / tau
        negatives = sims[i, (labels != labels[i]) & (sims[i] <= ceiling)] / tau
        if not len(positives):
            losses.append(0 * sims[i, i] / tau)
        elif form == "pairs":
            terms = [torch.logsumexp(torch.cat((p[None], negatives)), dim=0) - p for p in positives]
            losses.append(torch.stack(terms).mean())
        else:
            everything = torch.logsumexp(torch.cat((positives, negatives)), dim=0)
            of_positives = torch.logsumexp(positives, dim=0) - math.log(len(positives))
            losses.append(everything - (positives.mean() if form == "out" else of_positives))
    return torch.stack(losses)


def several(u: Tensor, v: Tensor, tau: Tensor, ids: Tensor, form: str) -> Tensor:
    """For each row of u, the cross-entropy in the softmax over all rows of v, where every row of v with the same id is
    a positive."""
    logits = u @ v.T / tau
    losses = []
    for i in range(len(u)):
        log_probabilities = torch.log_softmax(logits[i], dim=0)[ids == ids[i]]
        if form == "out":
            losses.append(-log_probabilities.mean())
        else:
            losses.append(-(torch.logsumexp(log_probabilities, dim=0) - math.log(len(log_probabilities))))
    return torch.stack(losses)


def towers(u: Tensor, v: Tensor, k: Tensor, both: bool) -> Tensor:
    """InfoNCE from u to v at inverse temperature k; with `both`, the mean of both directions (CLIP). The formula stays
    accurate for tiny losses."""
    N = len(u)
    logits = k * (u @ v.T)
    pos, others = logits.diagonal(), ~torch.eye(N, dtype=torch.bool, device=u.device)

    def direction(logits: Tensor) -> Tensor:
        nu = torch.logsumexp(logits[others].view(N, N - 1), dim=1)
        return 0 - F.logsigmoid(pos - nu)

    return (direction(logits) + direction(logits.T)) / 2 if both else direction(logits)
