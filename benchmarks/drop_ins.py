"""Suite `drop-ins`: losses of fastntxent.compat, compared with the plain formulas of the libraries they replace.

Batches are small and in float32, so a step is mostly Python and PyTorch calls. The formulas are the ones that the
libraries compute, without the libraries' checks. The values and gradients of a formula and our drop-in are compared
first. The two are then timed alternately, on one thread and on all threads. Scales and biases are learnt, as in
training with the libraries.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastntxent.compat import lightly, open_clip, sentence_transformers, solo_learn, sup_contrast

from .timing import BATCHES, TEMPERATURE, Case, Phases, interleave, quantiles

SIZES = (64, 256)
BANK = 4096  # rows of lightly's memory bank
CLASSES = 10
STEPS = 10  # per reading of the clock

Formula = Callable[..., Tensor]


class Pair(NamedTuple):
    """A library's formula and our drop-in for it. Both take two views, followed by any learnt parameters.

    normalized: whether the views are unit rows.
    learnt: initial values of the learnt parameters.
    """

    plain: Formula
    ours: Formula
    normalized: bool = False
    learnt: tuple[float, ...] = ()


def _solo_learn(z_i: Tensor, z_j: Tensor) -> Tensor:
    z, indexes = F.normalize(torch.cat((z_i, z_j)), dim=1), torch.arange(len(z_i)).repeat(2)
    sim = torch.exp(z @ z.T / TEMPERATURE)
    same = indexes[:, None] == indexes[None, :]
    neg = ~same
    pos = same.float().fill_diagonal_(0)
    pos, neg = (sim * pos).sum(dim=1), (sim * neg).sum(dim=1)
    return -(torch.log(pos / (pos + neg))).mean()


def _clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits, targets = scale.exp() * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def _siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    n = len(image)
    logits = scale.exp() * image @ text.T + bias
    return -F.logsigmoid((2 * torch.eye(n) - 1) * logits).sum() / n


def _ranking(a: Tensor, b: Tensor, symmetric: bool = False) -> Tensor:
    scores = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / TEMPERATURE
    loss = F.cross_entropy(scores, torch.arange(len(a)))
    return (loss + F.cross_entropy(scores.T, torch.arange(len(a)))) / 2 if symmetric else loss


def _sup_contrast(z_i: Tensor, z_j: Tensor) -> Tensor:
    labels = _classes(len(z_i))[:, None]
    mask, z = (labels == labels.T).float().repeat(2, 2), torch.cat((z_i, z_j))
    logits = z @ z.T / 0.07
    logits = logits - logits.max(dim=1, keepdim=True).values.detach()
    others = torch.ones_like(mask).fill_diagonal_(0)
    mask = mask * others
    log_prob = logits - (logits.exp() * others).sum(dim=1, keepdim=True).log()
    return -((mask * log_prob).sum(dim=1) / mask.sum(dim=1)).mean()


def _bank(z_i: Tensor, z_j: Tensor, bank: Tensor) -> Tensor:
    u, v = F.normalize(z_i, dim=1), F.normalize(z_j, dim=1)
    negatives = bank.clone()
    bank[: len(v)] = v.detach()[: len(bank)]  # for the next step
    logits = torch.cat(((u * v).sum(dim=1, keepdim=True), u @ negatives.T), dim=1) / 0.5
    return F.cross_entropy(logits, torch.zeros(len(u), dtype=torch.long))


def _classes(n: int) -> Tensor:
    return torch.arange(n) % CLASSES


def _with_bank(d: int) -> Pair:
    """Return lightly's loss with a memory bank, as the plain formula and as our drop-in. Each has its own bank. Both
    banks start with the same rows."""
    loss = lightly.NTXentLoss(memory_bank_size=(BANK, d))
    return Pair(functools.partial(_bank, bank=loss.memory_bank.bank.clone()), loss)


def pairs(d: int) -> dict[str, Pair]:
    """Return the pairs to compare, by the names of the library and its loss."""
    ranking = sentence_transformers.MultipleNegativesRankingLoss(None, scale=1 / TEMPERATURE)
    symmetric = sentence_transformers.MultipleNegativesRankingLoss(
        None, scale=1 / TEMPERATURE, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    # These return a dict only with output_dict=True.
    clip, siglip = cast("Formula", open_clip.ClipLoss()), cast("Formula", open_clip.SigLipLoss())
    sup_con = sup_contrast.SupConLoss()
    return {
        "solo-learn, simclr_loss_func": Pair(
            _solo_learn,
            lambda z_i, z_j: solo_learn.simclr_loss_func(
                torch.cat((z_i, z_j)), torch.arange(len(z_i)).repeat(2), TEMPERATURE
            ),
        ),
        "open_clip, ClipLoss": Pair(
            _clip, lambda image, text, scale: clip(image, text, scale.exp()), normalized=True, learnt=(2.66,)
        ),
        "open_clip, SigLipLoss": Pair(
            _siglip,
            lambda image, text, scale, bias: siglip(image, text, scale.exp(), bias),
            normalized=True,
            learnt=(2.3, -10.0),
        ),
        "sentence-transformers, MultipleNegativesRankingLoss": Pair(
            _ranking, lambda a, b: ranking.compute_loss_from_embeddings([a, b])
        ),
        "the same, in both directions": Pair(
            functools.partial(_ranking, symmetric=True), lambda a, b: symmetric.compute_loss_from_embeddings([a, b])
        ),
        "SupContrast, SupConLoss with labels": Pair(
            _sup_contrast,
            lambda z_i, z_j: sup_con(torch.stack((z_i, z_j), dim=1), _classes(len(z_i))),
            normalized=True,
        ),
        f"lightly, NTXentLoss with a bank of {BANK:,}": _with_bank(d),
    }


def check(pair: Pair, given: list[Tensor]) -> None:
    """Raise unless the values and all gradients agree."""
    expected, found = (
        (value.detach(), *torch.autograd.grad(value, given)) for value in (loss(*given) for loss in pair[:2])
    )
    for mine, theirs in zip(found, expected, strict=True):
        if not (mine - theirs).norm() <= 1e-4 * theirs.norm() + 1e-6:
            raise AssertionError(f"the drop-in differs from its formula: {mine}, expected {theirs}")


def inputs(pair: Pair, n: int, d: int, seed: int = 0) -> list[Tensor]:
    """Return two views and the learnt parameters, as leaf tensors."""
    views = [view.detach() for view in Case(n, d).inputs(seed)]
    if pair.normalized:
        views = [F.normalize(view, dim=1) for view in views]
    return [tensor.requires_grad_() for tensor in (*views, *map(torch.tensor, pair.learnt))]


def run(arguments: argparse.Namespace) -> tuple[list[dict[str, object]], dict[str, str]]:
    """Return the results of every pair at every size and number of threads."""
    results = []
    before = torch.get_num_threads()
    try:
        for threads in sorted({1, before}):
            torch.set_num_threads(threads)
            for d in arguments.d or [128]:
                for n in arguments.n or SIZES:
                    for name, pair in pairs(d).items():
                        found = _compare(pair, n, d, arguments.seconds)
                        results.append({"loss": name, "n": n, "d": d, "threads": threads, **found})
                        print(results[-1], flush=True)
    finally:
        torch.set_num_threads(before)
    return results, {}


def _compare(pair: Pair, n: int, d: int, seconds: float) -> dict[str, object]:
    batches = [inputs(pair, n, d, seed) for seed in range(BATCHES)]
    check(pair, batches[0])

    def steps(loss: Formula, turn: int) -> Phases:
        given = batches[turn % BATCHES]
        start = time.perf_counter()
        for _ in range(STEPS):
            for tensor in given:
                tensor.grad = None
            loss(*given).backward()
        return {"both": (time.perf_counter() - start) / STEPS}

    calls = {name: functools.partial(steps, getattr(pair, name)) for name in ("plain", "ours")}
    times = {name: phases["both"] for name, phases in interleave(calls, seconds).items()}
    return {
        **{name: quantiles(durations) for name, durations in times.items()},
        "plain_over_ours": statistics.median(times["plain"]) / statistics.median(times["ours"]),
    }
