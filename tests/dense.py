"""The family written out densely in float64: one oracle for each loss, sharing nothing with the package.

Each takes embeddings (normalised already), the temperature, and returns the losses of the rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def per_row(tau: Tensor) -> Tensor:
    return tau[:, None] if tau.ndim else tau


def multiview(u: Tensor, tau: Tensor, ids: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """(V, N, D): for each row the mean over its positives of a cross-entropy among that one and the negatives."""
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
    """Of two views (2, N, D): every row's similarity to its positive (2N,), and to its negatives (2N, 2N - 2)."""
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
    # The form that keeps its digits: of p near 1, and of p near 0.
    losses = torch.where(missed < 0.5, -torch.log1p(-missed.clamp_max(0.5)), -torch.log_softmax(logits, dim=1)[:, 0])
    return losses / missed.detach()


def sup_con(u: Tensor, tau: Tensor, labels: Tensor, form: str) -> Tensor:
    """0 for a row without a positive."""
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
    """`hardness`: of the in-batch and of the explicit negatives."""
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
