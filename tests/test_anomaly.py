"""Losses without any negatives, or without any positives, give no NaN in any node of the backward. PyTorch's anomaly
detection checks every node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastntxent as fx
from tests.cases import BACKENDS

N, D = 5, 4
SAME = torch.zeros(N, dtype=torch.int64)
ALONE = torch.arange(N)


def queue(a: Tensor, b: Tensor, **options: Any) -> Tensor:
    loss = fx.QueueInfoNCELoss(8, D, **options)
    return loss(a, b, SAME) + loss(b, a, SAME)


def one_sample(name: str, **options: Any) -> Callable[..., Tensor]:
    return lambda a, b, **o: getattr(fx, name)(a[:1], b[:1], **options, **o)


# Each entry takes two views (N, D) and options.
LOSSES: dict[str, Callable[..., Tensor]] = {
    **{
        f"{name} {options}": lambda a, b, name=name, options=options, **o: getattr(fx, name)(
            a, b, ids=SAME, **options, **o
        )
        for name in ("nt_xent", "info_nce", "clip")
        for options in ({}, {"label_smoothing": 0.1}, {"margin": 0.1})
    },
    **{
        f"{name} same_id {form}": lambda a, b, name=name, form=form, **o: getattr(fx, name)(
            a, b, ids=SAME, positives="same_id", form=form, **o
        )
        for name in ("info_nce", "clip")
        for form in ("out", "in")
    },
    **{
        f"{name} under its ceiling": lambda a, b, name=name, **o: getattr(fx, name)(a, b, ceiling=-1.5, **o)
        for name in ("nt_xent", "info_nce", "clip")
    },
    "info_nce explicit": lambda a, b, **o: fx.info_nce(
        a, b, ids=SAME, negatives=a[:2] * 2, in_batch_negatives=True, hardness_strength=0.5, **o
    ),
    "multiview_nt_xent": lambda a, b, **o: fx.multiview_nt_xent([a, b, a], ids=SAME, **o),
    "multi_clip": lambda a, b, **o: fx.multi_clip([a, b, a], ids=SAME, **o),
    "matryoshka": lambda a, b, **o: fx.matryoshka(fx.nt_xent, a, b, ids=SAME, dims=[2, D], **o),
    "siglip": lambda a, b, **o: fx.siglip(a, b, ids=SAME, **o),
    "nt_logistic": lambda a, b, **o: fx.nt_logistic(a, b, ids=SAME, **o),
    **{
        f"sup_con {form} {name} {options}": lambda a, b, form=form, labels=labels, options=options, **o: fx.sup_con(
            a, labels, form=form, **options, **o
        )
        for form in ("out", "in", "pairs")
        for name, labels in (("same", SAME), ("alone", ALONE))
        for options in ({}, {"ceiling": -1.5})
    },
    "sup_con every label": lambda a, b, **o: fx.sup_con(a, torch.ones(N, 2, dtype=torch.bool), **o),
    "sup_con no label": lambda a, b, **o: fx.sup_con(a, torch.zeros(N, 2, dtype=torch.bool), **o),
    "sup_con no weight": lambda a, b, **o: fx.sup_con(a, SAME, pair_weights=torch.zeros(1, 1), **o),
    "guided_info_nce": lambda a, b, **o: fx.guided_info_nce(a, b, torch.ones(N, 2), torch.ones(N, 2), margin=0.5, **o),
    "distill": lambda a, b, **o: fx.distill(a[:1], b[:1], torch.ones(1, 2), torch.ones(1, 2), **o),
    "distill called": lambda a, b, **o: fx.distill(a[:1], b[:1], teacher=lambda rows, cols: torch.ones(1, 1), **o),
    **{f"{name} one sample": one_sample(name) for name in ("nt_xent", "dcl", "dclw", "rince", "macl", "info_nce")},
    "debiased one sample": one_sample("debiased", tau_plus=0.1),
    "hard_negative one sample": one_sample("hard_negative", tau_plus=0.1, beta=0.5),
    "queue": queue,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_loss_without_negatives_or_positives_gives_no_nan(name, reduction, backend):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(N, D, generator=generator).requires_grad_() for _ in range(2))
    learnt = [a, b]
    options: dict[str, Any] = {"reduction": reduction, "backend": backend}
    if name != "queue":
        learnt.append(torch.tensor(0.3, requires_grad=True))
        options["temperature"] = learnt[-1]
    with torch.autograd.detect_anomaly():
        loss = LOSSES[name](a, b, **options)
        loss.sum().backward()
    assert loss.isfinite().all()
    for x in learnt:
        assert x.grad is None or x.grad.isfinite().all()
