"""Every loss of the family compared with its dense float64 oracle, on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastntxent
from fastntxent import error_budget
from fastntxent.backends import tiling
from fastntxent.compat import lightly
from tests import dense
from tests.cases import BACKENDS, CUDA_KERNELS, KERNELS, LargestTensor, assert_within_rounding, needs_cuda
from tests.tiers import every_case


class Case(NamedTuple):
    """A loss, and its oracle on unit rows. Both take embeddings, a temperature, and options drawn with the embeddings
    (ids, labels)."""

    loss: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    inputs: Callable[[int, int, torch.Generator], tuple[list[Tensor], dict[str, Tensor]]]
    counted: Callable[..., Tensor] | None = None  # the rows that the mean counts
    per_row: int = 0  # number of temperatures divided by N; 0 for a single temperature
    logit_size: Callable[[float], float] = lambda tau: 1 / tau  # size of the largest term
    min_n: int = 2


def normal(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def views(count: int, *, ids: int = 0):
    def inputs(n: int, d: int, generator: torch.Generator):
        z = normal(1, n, d, generator=generator) + normal(count, n, d, generator=generator)
        return [z], {"ids": torch.randint(-ids, ids, (n,), generator=generator)} if ids else {}

    return inputs


def labelled(n_classes: int, multi: bool = False):
    def inputs(n: int, d: int, generator: torch.Generator):
        labels = torch.randint(0, n_classes, (n,), generator=generator)
        if multi:
            labels = torch.rand(n, n_classes, generator=generator) < 0.4
        else:
            labels[0] = -9  # the only row of its class
        return [normal(n, d, generator=generator)], {"labels": labels}

    return inputs


def towers(*, negatives: str = "", ids: int = 0):
    def inputs(n: int, d: int, generator: torch.Generator):
        query = normal(n, d, generator=generator)
        tensors = [query, query + normal(n, d, generator=generator)]
        if negatives:
            tensors.append(normal(*((n, 3, d) if negatives == "paired" else (5, d)), generator=generator))
        return tensors, {"ids": torch.randint(0, ids, (n,), generator=generator)} if ids else {}

    return inputs


def taught(n: int, d: int, generator: torch.Generator):
    """Return two towers and, as options, the unit rows of a teacher of a different width."""
    tensors, _ = towers()(n, d, generator)
    teacher = normal(1, n, d + 2, generator=generator) + normal(2, n, d + 2, generator=generator)
    return tensors, dict(zip(("t_image", "t_text"), F.normalize(teacher, dim=-1), strict=True))


def distill(**options: float):
    return lambda image, text, tau, t_image, t_text, **kw: fastntxent.distill(
        image, text, t_image, t_text, tau, **options, **kw
    )


def called(n: int, d: int, generator: torch.Generator):
    """Return two towers and, as an option, teacher similarities that are not products of features."""
    tensors, _ = towers()(n, d, generator)
    return tensors, {"sims": torch.tanh(normal(n, n, generator=generator))}


def distill_called(**options: float):
    return lambda image, text, tau, sims, **kw: fastntxent.distill(
        image, text, None, None, tau, teacher=lambda rows, cols: sims[rows[:, None], cols], **options, **kw
    )


def dense_called(t_tau: float | None = None):
    def oracle(image, text, tau, sims):
        return dense.distill(image, text, tau, sims, torch.eye(len(sims)).to(sims), t_tau or tau.detach())

    return oracle


def guided_inputs(negatives: bool = False):
    """Return a function that draws embeddings and, as options, the unit rows of a guide of a different width."""

    def inputs(n: int, d: int, generator: torch.Generator):
        tensors, _ = towers(negatives="unpaired" if negatives else "")(n, d, generator)
        guide = normal(n, d + 2, generator=generator)
        names = {"g_query": guide, "g_key": guide + normal(n, d + 2, generator=generator)}
        if negatives:
            names["g_negatives"] = normal(5, d + 2, generator=generator)
        return tensors, {name: F.normalize(g, dim=-1) for name, g in names.items()}

    return inputs


def guided(**options):
    def loss(query, key, *rest, g_query, g_key, g_negatives=None, **kw):
        *given, tau = rest
        negatives = given[0] if given else None
        return fastntxent.guided_info_nce(
            query, key, g_query, g_key, tau, negatives=negatives, guide_negatives=g_negatives, **options, **kw
        )

    return loss


def dense_guided(**options):
    return lambda *tensors, **guide: dense.guided(*tensors, guide=list(guide.values()), **options)


def of_views(name: str, **options: float):
    return lambda z, tau, **kw: getattr(fastntxent, name)(z[0], z[1], tau, **options, **kw)


def of_info_nce(**options):
    def loss(query, key, *rest, **kw):
        *negatives, tau = rest
        return fastntxent.info_nce(query, key, tau, negatives=negatives[0] if negatives else None, **options, **kw)

    return loss


def dense_info_nce(**options):
    def oracle(query, key, *rest, **kw):
        *negatives, tau = rest
        return dense.info_nce(query, key, tau, negatives=negatives[0] if negatives else None, **options, **kw)

    return oracle


def sup_con(form: str):
    return (
        lambda z, tau, labels, **kw: fastntxent.sup_con(z, labels, tau, form=form, **kw),
        lambda u, tau, labels: dense.sup_con(u, tau, labels, form),
    )


def weighted(n_classes: int, *, absent: int = 0):
    """Return a function that draws labels outside the last `absent` classes, and pair weights with some zeros and an
    all-zero row 0."""

    def inputs(n: int, d: int, generator: torch.Generator):
        labels = torch.randint(0, n_classes - absent, (n,), generator=generator)
        weights = torch.rand(n_classes, n_classes, generator=generator, dtype=torch.float64)
        weights[torch.rand(n_classes, n_classes, generator=generator) < 0.3] = 0
        weights[0] = 0
        return [normal(n, d, generator=generator)], {"labels": labels, "pair_weights": 5 * weights}

    return inputs


def weighted_sup_con(z, tau, labels, pair_weights, **kw):
    return fastntxent.sup_con(z, labels, tau, pair_weights=pair_weights.to(z.device), **kw)


def weighs_something(labels: Tensor, pair_weights: Tensor) -> Tensor:
    return (pair_weights[labels[:, None], labels].fill_diagonal_(0)).any(dim=1)


def with_positive(labels: Tensor) -> Tensor:
    if labels.ndim == 1:
        return (labels[:, None] == labels).sum(dim=1) > 1
    return ((labels[:, None] & labels).any(dim=2).fill_diagonal_(False)).any(dim=1)


CASES = {
    "nt_xent ids": Case(of_views("nt_xent"), dense.multiview, views(2, ids=3)),
    "nt_xent smoothing": Case(
        of_views("nt_xent", label_smoothing=0.2), lambda u, tau: dense.multiview(u, tau, smoothing=0.2), views(2)
    ),
    "nt_xent ids smoothing": Case(
        of_views("nt_xent", label_smoothing=0.2),
        lambda u, tau, ids: dense.multiview(u, tau, ids, smoothing=0.2),
        views(2, ids=2),
    ),
    "nt_xent temperatures": Case(of_views("nt_xent"), dense.multiview, views(2), per_row=2),
    "multiview": Case(fastntxent.multiview_nt_xent, dense.multiview, views(3)),
    "multiview one sample": Case(fastntxent.multiview_nt_xent, dense.multiview, views(3), min_n=1),
    "multiview ids temperatures smoothing": Case(
        lambda z, tau, **kw: fastntxent.multiview_nt_xent(list(z), tau, label_smoothing=0.1, **kw),
        lambda u, tau, ids: dense.multiview(u, tau, ids, smoothing=0.1),
        views(4, ids=3),
        per_row=4,
    ),
    "dcl": Case(of_views("dcl"), dense.dcl, views(2)),
    "dclw": Case(of_views("dclw", sigma=0.3), lambda u, tau: dense.dclw(u, tau, 0.3), views(2)),
    "debiased": Case(
        of_views("debiased", tau_plus=0.05), lambda u, tau: dense.hard_negative(u, tau, 0.05, 0), views(2)
    ),
    "debiased at its bound": Case(
        of_views("debiased", tau_plus=0.6), lambda u, tau: dense.hard_negative(u, tau, 0.6, 0), views(2)
    ),
    "debiased without a prior": Case(
        of_views("debiased", tau_plus=0), lambda u, tau: dense.hard_negative(u, tau, 0, 0), views(2)
    ),
    "hard_negative": Case(
        of_views("hard_negative", tau_plus=0.05, beta=0.7),
        lambda u, tau: dense.hard_negative(u, tau, 0.05, 0.7),
        views(2),
        logit_size=lambda tau: 2.4 / tau,
    ),
    "hard_negative at its bound": Case(
        of_views("hard_negative", tau_plus=0.5, beta=1),
        lambda u, tau: dense.hard_negative(u, tau, 0.5, 1),
        views(2),
        logit_size=lambda tau: 3 / tau,
    ),
    "rince": Case(of_views("rince", q=0.3, lam=0.1), lambda u, tau: dense.rince(u, tau, 0.3, 0.1), views(2)),
    "rince robust": Case(of_views("rince", q=1, lam=0.4), lambda u, tau: dense.rince(u, tau, 1, 0.4), views(2)),
    "macl": Case(of_views("macl", alpha=0.7, a_0=0.2), lambda u, tau: dense.macl(u, tau, 0.7, 0.2), views(2)),
    "sup_con out": Case(*sup_con("out"), labelled(3), with_positive),
    "sup_con in": Case(*sup_con("in"), labelled(3), with_positive),
    "sup_con pairs": Case(*sup_con("pairs"), labelled(3), with_positive),
    "sup_con out multi-label": Case(*sup_con("out"), labelled(4, multi=True), with_positive),
    "sup_con weights": Case(weighted_sup_con, dense.weighted_sup_con, weighted(4), weighs_something),
    "sup_con weights of absent classes": Case(
        weighted_sup_con, dense.weighted_sup_con, weighted(9, absent=3), weighs_something
    ),
    "sup_con in few positives": Case(*sup_con("in"), labelled(20), with_positive),
    "sup_con pairs one class": Case(*sup_con("pairs"), labelled(1), with_positive),
    "sup_con in one class": Case(*sup_con("in"), labelled(1), with_positive),
    "info_nce": Case(of_info_nce(), dense_info_nce(), towers()),
    "info_nce one sample": Case(of_info_nce(), dense_info_nce(), towers(), min_n=1),
    "info_nce ids smoothing": Case(of_info_nce(label_smoothing=0.1), dense_info_nce(smoothing=0.1), towers(ids=4)),
    "info_nce temperatures": Case(of_info_nce(), dense_info_nce(), towers(ids=4), per_row=1),
    "info_nce unpaired": Case(of_info_nce(), dense_info_nce(in_batch=False), towers(negatives="unpaired")),
    "info_nce unpaired temperatures": Case(
        of_info_nce(), dense_info_nce(in_batch=False), towers(negatives="unpaired"), per_row=1
    ),
    "info_nce paired": Case(of_info_nce(), dense_info_nce(in_batch=False), towers(negatives="paired")),
    "info_nce paired temperatures": Case(
        of_info_nce(), dense_info_nce(in_batch=False), towers(negatives="paired"), per_row=1
    ),
    "info_nce both unpaired": Case(
        of_info_nce(in_batch_negatives=True, label_smoothing=0.1),
        dense_info_nce(smoothing=0.1),
        towers(negatives="unpaired", ids=4),
    ),
    "info_nce both paired": Case(
        of_info_nce(in_batch_negatives=True, label_smoothing=0.1),
        dense_info_nce(smoothing=0.1),
        towers(negatives="paired"),
    ),
    "info_nce hard in batch": Case(
        of_info_nce(in_batch_negatives=True, hardness_mode="in_batch_negatives", hardness_strength=4.0),
        dense_info_nce(hardness=(4.0, 0)),
        towers(negatives="unpaired"),
        logit_size=lambda tau: 1 / tau + 4,
    ),
    "info_nce hard explicit": Case(
        of_info_nce(in_batch_negatives=True, hardness_mode="hard_negatives", hardness_strength=4.0),
        dense_info_nce(hardness=(0, 4.0)),
        towers(negatives="paired"),
        logit_size=lambda tau: 1 / tau + 4,
    ),
    "info_nce hard all temperatures": Case(
        of_info_nce(in_batch_negatives=True, hardness_strength=4.0),
        dense_info_nce(hardness=(4.0, 4.0)),
        towers(negatives="unpaired", ids=4),
        per_row=1,
        logit_size=lambda tau: 1 / tau + 4,
    ),
    "clip": Case(fastntxent.clip, dense.clip, towers()),
    **{
        f"info_nce same_id {form}": Case(
            of_info_nce(positives="same_id", form=form),
            lambda u, v, tau, ids, form=form: dense.several(u, v, tau, ids, form),
            towers(ids=4),
        )
        for form in ("out", "in")
    },
    "info_nce same_id in temperatures": Case(
        of_info_nce(positives="same_id", form="in"),
        lambda u, v, tau, ids: dense.several(u * (1 / tau)[:, None], v, torch.ones(()), ids, "in"),
        towers(ids=4),
        per_row=1,
    ),
    **{
        f"clip same_id {form}": Case(
            lambda *args, form=form, **kw: fastntxent.clip(*args, positives="same_id", form=form, **kw),
            lambda u, v, tau, ids, form=form: (
                (dense.several(u, v, tau, ids, form) + dense.several(v, u, tau, ids, form)) / 2
            ),
            towers(ids=4),
        )
        for form in ("out", "in")
    },
    "nt_xent margin": Case(of_views("nt_xent", margin=0.1), lambda u, tau: dense.limited(u, tau, margin=0.1), views(2)),
    "nt_xent relative margin ids": Case(
        of_views("nt_xent", relative_margin=0.4),
        lambda u, tau, ids: dense.limited(u, tau, ids, relative_margin=0.4),
        views(2, ids=3),
    ),
    "nt_xent ceiling": Case(
        of_views("nt_xent", ceiling=0.1), lambda u, tau: dense.limited(u, tau, ceiling=0.1), views(2)
    ),
    "nt_xent margin ceiling temperatures": Case(
        of_views("nt_xent", margin=-0.2, ceiling=0.3),
        lambda u, tau: dense.limited(u, tau, margin=-0.2, ceiling=0.3),
        views(2),
        per_row=2,
    ),
    "multiview margin": Case(
        lambda z, tau, **kw: fastntxent.multiview_nt_xent(z, tau, margin=-0.3, **kw),
        lambda u, tau: dense.limited(u, tau, margin=-0.3),
        views(3),
    ),
    "info_nce margin ids": Case(
        of_info_nce(margin=0.1),
        lambda *args, ids: dense.limited_info_nce(*args, ids, margin=0.1),
        towers(ids=4),
    ),
    **{
        f"info_nce margin {kind}": Case(
            of_info_nce(in_batch_negatives=True, relative_margin=0.2),
            lambda query, key, negatives, tau: dense.limited_info_nce(
                query, key, tau, None, negatives, relative_margin=0.2
            ),
            towers(negatives=kind),
        )
        for kind in ("unpaired", "paired")
    },
    "clip margin": Case(
        lambda *args, **kw: fastntxent.clip(*args, margin=0.05, **kw),
        lambda u, v, tau: (
            (dense.limited_info_nce(u, v, tau, margin=0.05) + dense.limited_info_nce(v, u, tau, margin=0.05)) / 2
        ),
        towers(),
    ),
    **{
        f"sup_con {form} ceiling": Case(
            lambda z, tau, labels, form=form, **kw: fastntxent.sup_con(z, labels, tau, form=form, ceiling=0.2, **kw),
            lambda u, tau, labels, form=form: dense.limited_sup_con(u, tau, labels, form, 0.2),
            labelled(3),
            with_positive,
        )
        for form in ("out", "in", "pairs")
    },
    "multi_clip": Case(
        lambda a, b, c, tau, **kw: fastntxent.multi_clip([a, b, c[:, 0]], tau, weights=[1, 0, 0.5], **kw),
        lambda a, b, c, tau: dense.clip(a, b, tau) + dense.clip(b, c[:, 0], tau) / 2,
        towers(negatives="paired"),
    ),
    "clip one sample": Case(fastntxent.clip, dense.clip, towers(), min_n=1),
    "distill": Case(
        distill(teacher_temperature=0.2), lambda *args, **kw: dense.distill(*args, **kw, t_tau=0.2), taught
    ),
    "distill at its temperature": Case(
        distill(), lambda u, v, tau, **kw: dense.distill(u, v, tau, **kw, t_tau=tau.detach()), taught
    ),
    "distill one sample": Case(
        distill(teacher_logit_scale=3.0), lambda *args, **kw: dense.distill(*args, **kw, t_tau=1 / 3), taught, min_n=1
    ),
    "distill called": Case(distill_called(teacher_temperature=0.2), dense_called(0.2), called),
    "distill called at its temperature": Case(distill_called(), dense_called(), called),
    "distill called one sample": Case(distill_called(teacher_logit_scale=3.0), dense_called(1 / 3), called, min_n=1),
    "guided_info_nce": Case(guided(), dense_guided(), guided_inputs()),
    "guided_info_nce margin": Case(
        guided(margin=-0.2, contrast_anchors=False), dense_guided(margin=-0.2, anchors=False), guided_inputs()
    ),
    "guided_info_nce relative": Case(
        guided(margin=0.1, margin_strategy="relative", contrast_positives=False),
        dense_guided(margin=0.1, relative=True, positives=False),
        guided_inputs(),
    ),
    "guided_info_nce keys alone": Case(
        guided(contrast_anchors=False, contrast_positives=False),
        dense_guided(anchors=False, positives=False),
        guided_inputs(),
    ),
    "guided_info_nce negatives": Case(guided(margin=0.05), dense_guided(margin=0.05), guided_inputs(negatives=True)),
    "guided_info_nce one sample": Case(guided(), dense_guided(), guided_inputs(), min_n=1),
    "siglip": Case(
        lambda *args, **kw: fastntxent.siglip(*args, bias=-2.0, **kw), lambda *args: dense.siglip(*args, -2.0), towers()
    ),
    "siglip one sample": Case(fastntxent.siglip, lambda *args: dense.siglip(*args, -10.0), towers(), min_n=1),
    "siglip ids": Case(
        lambda *args, **kw: fastntxent.siglip(*args, bias=1.0, **kw),
        lambda *args, ids: dense.siglip(*args, 1.0, ids),
        towers(ids=4),
    ),
    "nt_logistic": Case(of_views("nt_logistic"), lambda u, tau: dense.nt_logistic(u, tau, 0.0), views(2)),
    "nt_logistic ids bias": Case(
        of_views("nt_logistic", bias=-3.0), lambda u, tau, ids: dense.nt_logistic(u, tau, -3.0, ids), views(2, ids=3)
    ),
    "clip ids smoothing": Case(
        lambda *args, **kw: fastntxent.clip(*args, label_smoothing=0.1, **kw),
        lambda *args, **kw: dense.clip(*args, smoothing=0.1, **kw),
        towers(ids=4),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


class Drawn(NamedTuple):
    tensors: list[Tensor]
    options: dict[str, Tensor]
    tau: Tensor

    def to(self, dtype: torch.dtype) -> Drawn:
        return self._replace(tensors=[z.to(dtype) for z in self.tensors])


def draw(case: Case, n: int, d: int, tau: float, seed: int) -> Drawn:
    generator = torch.Generator().manual_seed(seed)
    tensors, options = case.inputs(max(n, case.min_n), d, generator)
    temperature = torch.tensor(tau, dtype=torch.float64)
    if case.per_row:
        n_rows = case.per_row * tensors[0].shape[-2]
        temperature = tau * (0.5 + torch.rand(n_rows, generator=generator, dtype=torch.float64))
    return Drawn(tensors, options, temperature)


def results(loss: Callable[..., Tensor], drawn: Drawn, upstream: Tensor | None = None) -> list[Tensor]:
    """Return the value and every gradient."""
    tensors = [z.detach().clone().requires_grad_() for z in drawn.tensors]
    tau = drawn.tau.detach().clone().requires_grad_()
    value = loss(*tensors, tau, **drawn.options)
    weighted = value if value.ndim == 0 else (value * upstream.to(value)).sum()
    return [value.detach(), *torch.autograd.grad(weighted, (*tensors, tau))]


def truth(case: Case, drawn: Drawn, reduction: str, normalize: bool, upstream: Tensor | None = None) -> list[Tensor]:
    def loss(*args: Tensor, **options: Tensor) -> Tensor:
        *tensors, tau = args
        losses = case.oracle(*(F.normalize(z, dim=-1) if normalize else z for z in tensors), tau, **options)
        if reduction == "none":
            return losses
        count = len(losses) if case.counted is None else int(case.counted(**options).sum())
        return losses.sum() / (max(count, 1) if reduction == "mean" else 1)

    return results(loss, drawn.to(torch.float64), upstream)


@every_case(normalize=[True, False], reduction=["mean", "sum", "none"], backend=BACKENDS)
def test_loss_equals_its_dense_formula(case, normalize, reduction, backend):
    for seed, (n, d, tau) in enumerate([(1, 3, 0.5), (5, 4, 0.3), (12, 6, 0.2)]):
        drawn = draw(case, n, d, tau, seed)
        if not normalize:
            drawn = drawn._replace(tensors=[0.5 * z for z in drawn.tensors])
        rows = len(case.oracle(*drawn.tensors, drawn.tau, **drawn.options))
        upstream = torch.linspace(-1, 2, rows, dtype=torch.float64)
        value = results(
            lambda *a, **o: case.loss(*a, reduction=reduction, normalize=normalize, backend=backend, **o),
            drawn,
            upstream,
        )
        for v, t in zip(value, truth(case, drawn, reduction, normalize, upstream), strict=True):
            torch.testing.assert_close(v, t, rtol=1e-9, atol=1e-10)


@every_case(
    numbers=[(0.07, False), (0.5, False), (0.5, True)],
    dtype=[torch.float16, torch.bfloat16, torch.float32],
    backend=KERNELS,
)
def test_loss_dtypes_within_budget(case, numbers, dtype, backend):
    tau, autocast = numbers
    drawn = draw(case, 16, 12, tau, 0).to(dtype)
    true = truth(case, drawn, "mean", True)

    def computed(name: str) -> list[Tensor]:
        def loss(*args: Tensor, **options: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                return case.loss(*args, backend=name, **options)

        return results(loss, drawn)

    size = case.logit_size(tau / 2 if case.per_row else tau)
    value = computed(backend)
    for v, s, t in zip(value, computed("reference"), true, strict=True):
        # The temperature's gradient is a difference of similarities, which can cancel, divided by tau^2.
        scale = 1 / tau**2 / max(t.numel(), 1) if t.shape == drawn.tau.shape and t is true[-1] else 0.0
        limit = error_budget.allowed(error_budget.errors_of(s, t, scale=scale), dtype, size, output_dtype=v.dtype)
        errors = error_budget.errors_of(v, t, scale=scale)
        assert errors.within(limit), f"{errors}, allowed {limit}"
    assert value[0].dtype == torch.float32
    assert all(g.dtype == dtype for g in value[1:-1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_temperature_gets_its_gradient_if_no_embedding_needs_one(case, reduction, backend):
    drawn = draw(case, 6, 4, 0.3, 0)
    tau = drawn.tau.clone().requires_grad_()

    def gradient(wanted: bool) -> Tensor:
        tensors = [z.detach().requires_grad_(wanted) for z in drawn.tensors]
        loss = case.loss(*tensors, tau, reduction=reduction, backend=backend, **drawn.options)
        return torch.autograd.grad(loss.sum(), tau)[0]

    torch.testing.assert_close(gradient(False), gradient(True), rtol=1e-9, atol=1e-12)


@given(
    name=st.sampled_from(sorted(CASES)),
    n=st.integers(1, 20),
    d=st.integers(2, 9),
    tau=st.floats(0.05, 5),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=300, deadline=None)
def test_loss_equals_its_dense_formula_on_drawn_inputs(name, n, d, tau, seed):
    case = CASES[name]
    drawn = draw(case, n, d, tau, seed)
    for v, t in zip(results(case.loss, drawn), truth(case, drawn, "mean", True), strict=True):
        torch.testing.assert_close(v, t, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_same_bits_every_time(case, backend):
    drawn = draw(case, 40, 16, 0.1, 0).to(torch.float32)
    first, second = (results(lambda *a, **o: case.loss(*a, backend=backend, **o), drawn) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_loss_never_holds_all_pairs(case, backend):
    drawn = draw(case, 1500, 8, 0.1, 0).to(torch.float32)
    with LargestTensor() as largest:
        results(lambda *a, **o: case.loss(*a, backend=backend, **o), drawn)
    assert 1500 * 8 <= largest.numel < 1500 * 1500 / 4


TILED = [name for name in CASES if name.startswith(("distill", "guided", "siglip", "nt_logistic"))]


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("edge", [1, 5, 11, 12, 13])
def test_loss_in_tiles_of_any_edge_equals_its_dense_formula(name, reduction, edge, monkeypatch):
    monkeypatch.setattr(tiling, "BLOCK_CPU", edge)
    case = CASES[name]
    drawn = draw(case, 12, 6, 0.3, 0)
    upstream = torch.linspace(-1, 2, len(case.oracle(*drawn.tensors, drawn.tau, **drawn.options)))
    value = results(lambda *a, **o: case.loss(*a, reduction=reduction, backend="blocked", **o), drawn, upstream)
    for v, t in zip(value, truth(case, drawn, reduction, True, upstream), strict=True):
        torch.testing.assert_close(v, t, rtol=1e-9, atol=1e-10)


# The weights of these losses are detached, but finite differences of the gradient see the weights change.
DETACHED = {name for name in CASES if name.startswith(("dclw", "macl", "info_nce hard"))}
# These use plain tensor code, no kernel.
PLAIN = {name for name in CASES if name.startswith("info_nce paired")}


@pytest.mark.parametrize("name", sorted(CASES.keys() - DETACHED))
def test_loss_second_derivative_of_the_reference_equals_finite_differences(name):
    case, drawn = CASES[name], draw(CASES[name], 4, 3, 0.5, 0)
    z, *rest = drawn.tensors
    assert torch.autograd.gradgradcheck(
        lambda z: case.loss(z, *rest, drawn.tau, backend="reference", **drawn.options), z.requires_grad_(), atol=1e-4
    )


@pytest.mark.parametrize("name", sorted(CASES.keys() - PLAIN))
def test_loss_second_derivative_of_a_kernel_is_refused(name):
    case, drawn = CASES[name], draw(CASES[name], 4, 3, 0.5, 0)
    z, *rest = drawn.tensors
    loss = case.loss(z.requires_grad_(), *rest, drawn.tau, backend="blocked", **drawn.options)
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


CONVERGED = {
    "nt_xent ids": lambda z_i, z_j, ids, tau, **kw: fastntxent.nt_xent(z_i, z_j, tau, ids=ids, **kw),
    "multiview": lambda z_i, z_j, ids, tau, **kw: fastntxent.multiview_nt_xent([z_i, z_j, z_i], tau, **kw),
    "info_nce": lambda z_i, z_j, ids, tau, **kw: fastntxent.info_nce(z_i, z_j, tau, **kw),
    "info_nce explicit": lambda z_i, z_j, ids, tau, **kw: fastntxent.info_nce(
        z_i, z_j, tau, negatives=z_i.detach().roll(1, dims=0).unsqueeze(1), in_batch_negatives=True, **kw
    ),
    "clip": lambda z_i, z_j, ids, tau, **kw: fastntxent.clip(z_i, z_j, tau, **kw),
    "distill": lambda z_i, z_j, ids, tau, **kw: fastntxent.distill(
        z_i, z_j, z_j.detach(), z_i.detach(), tau, teacher_temperature=0.05, **kw
    ),
    "guided_info_nce": lambda z_i, z_j, ids, tau, **kw: fastntxent.guided_info_nce(
        z_i, z_j, z_j.detach(), z_i.detach(), tau, margin=0.95, **kw
    ),
    "siglip": lambda z_i, z_j, ids, tau, **kw: fastntxent.siglip(z_i, z_j, tau / 2, bias=-18.0, **kw),
    "nt_logistic": lambda z_i, z_j, ids, tau, **kw: fastntxent.nt_logistic(z_i, z_j, tau / 2, bias=-18.0, **kw),
    "debiased": lambda z_i, z_j, ids, tau, **kw: fastntxent.debiased(z_i, z_j, tau, tau_plus=1e-9, **kw),
    "macl": lambda z_i, z_j, ids, tau, **kw: fastntxent.macl(z_i, z_j, tau, alpha=0, **kw) - 1,
}


@pytest.mark.parametrize("name", CONVERGED)
def test_gradient_keeps_its_accuracy_when_converged(name):
    # Orthogonal sample directions and views that almost agree give float32 losses of 1e-7 to 1e-6.
    generator = torch.Generator().manual_seed(0)
    centres = torch.linalg.qr(normal(64, 64, generator=generator))[0][:60]
    views = (centres + 0.02 * normal(2, 60, 64, generator=generator)).float()
    ids = torch.arange(60) // 2

    def result(z: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        z = z.clone().requires_grad_()
        loss = CONVERGED[name](z[0], z[1], ids, 0.055, backend=backend)
        return loss.detach(), torch.autograd.grad(loss, z)[0]

    _, gradient = result(views, "auto")
    true_loss, true_gradient = result(views.double(), "reference")
    assert 1e-8 < float(true_loss) < 1e-5
    assert_within_rounding(gradient, true_gradient, 1 / 0.055)


def test_macl_value_and_gradient_are_accurate_if_nt_xent_underflows():
    # Let x be the log-sum-exp of the negatives minus the positive, so NT-Xent is l = softplus(x). MACL is
    # l / (1 - exp(-l)) = softplus(x) / sigmoid(x), which tends to 1 as l tends to 0. Its gradient with respect to x is
    # 1, because the weight 1 / (1 - exp(-l)) is detached.
    centres = torch.linalg.qr(normal(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    views = centres + 0.01 * normal(2, 16, 16, generator=torch.Generator().manual_seed(1))
    for tau in (0.05, 0.015, 0.01, 0.005, 0.001):
        for backend in BACKENDS:
            z = views.float().requires_grad_()
            losses = fastntxent.macl(z[0], z[1], tau, alpha=0, reduction="none", backend=backend)
            (gradient,) = torch.autograd.grad(losses, z, torch.full_like(losses, 65536))

            u = F.normalize(z.detach().double(), dim=-1).requires_grad_()
            pos, negatives = dense.pairs_and_negatives(u)
            x = torch.logsumexp(negatives / tau, dim=1) - pos / tau
            assert (x < -15).any()
            true = torch.where(x < -40, 1, F.softplus(x) / torch.sigmoid(x))
            torch.testing.assert_close(losses.double(), true, rtol=1e-4, atol=0)
            (d_u,) = torch.autograd.grad(x.sum(), u)
            d_z = (d_u - u * (u * d_u).sum(dim=-1, keepdim=True)) / z.double().norm(dim=-1, keepdim=True)
            assert float((gradient / 65536 - d_z).norm() / d_z.norm()) < 1e-4


def test_macl_reference_has_the_second_derivative_of_a_loss_with_fixed_weights():
    z = normal(2, 4, 3, generator=torch.Generator().manual_seed(0))
    losses = fastntxent.nt_xent(*z, 0.3, reduction="none", backend="reference")
    weights = 1 / -torch.expm1(-losses)

    def held(z: Tensor) -> Tensor:
        return (fastntxent.nt_xent(*z, 0.3, reduction="none", backend="reference") * weights).sum()

    def macl(z: Tensor) -> Tensor:
        return fastntxent.macl(*z, 0.3, alpha=0, reduction="sum", backend="reference")

    hessian = torch.autograd.functional.hessian
    torch.testing.assert_close(hessian(macl, z), hessian(held, z))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rince_is_finite_if_a_power_overflows_but_the_difference_does_not(backend):
    # With equal rows, the loss is 1.1 exp(k) - exp(k), where k = 1 / tau. float32 can hold exp(k), but not 1.1 exp(k).
    def results(dtype: torch.dtype, name: str) -> list[Tensor]:
        z = torch.tensor([[1.0, 0.0]], dtype=dtype).repeat(4, 1)
        tau = torch.tensor(1 / 88.7, dtype=torch.float64, requires_grad=True)
        value = fastntxent.rince(z[:2], z[2:], tau, q=1.0, lam=1.1 / 3, normalize=False, backend=name)
        return [value.detach(), *torch.autograd.grad(value, tau)]

    truth = results(torch.float64, "reference")
    assert torch.tensor(88.7).exp() * 1.1 == torch.inf
    for value, true in zip(results(torch.float32, backend), truth, strict=True):
        torch.testing.assert_close(value.double(), true, rtol=1e-3, atol=0)


@pytest.mark.parametrize("q", [1e-45, 1e-20, 0.3])
def test_rince_value_is_accurate_for_the_smallest_q(q):
    drawn = draw(CASES["rince"], 5, 4, 0.2, 0).to(torch.float32)
    loss = of_views("rince", q=q, lam=0.1)
    u = F.normalize(drawn.tensors[0].double(), dim=-1)
    pos, negatives = (sims / drawn.tau for sims in dense.pairs_and_negatives(u))
    difference = torch.logsumexp(torch.cat((pos[:, None], negatives), dim=1), dim=1) + math.log(0.1) - pos
    true = torch.exp(q * pos) * torch.expm1(q * difference) / q if q == 0.3 else difference
    torch.testing.assert_close(loss(*drawn.tensors, drawn.tau, reduction="none").double(), true, rtol=1e-5, atol=1e-6)


@needs_cuda
@pytest.mark.parametrize("backend", CUDA_KERNELS)
@pytest.mark.parametrize("temperature_on", ["cpu", "cuda"])
def test_loss_on_cuda_equals_its_dense_formula(case, temperature_on, backend):
    drawn = draw(case, 24, 16, 0.3, 0).to(torch.float32)
    on_cuda = Drawn(
        [z.cuda() for z in drawn.tensors],
        {name: option.cuda() for name, option in drawn.options.items()},
        drawn.tau.to(temperature_on),
    )
    value, again = (results(lambda *a, **o: case.loss(*a, backend=backend, **o), on_cuda) for _ in range(2))
    for v, a, t in zip(value, again, truth(case, drawn, "mean", True), strict=True):
        assert torch.equal(v, a)
        torch.testing.assert_close(v.cpu().double(), t, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature_on", [None, "cpu", "meta"])
def test_loss_keeps_all_tensors_on_the_device_of_the_embeddings(case, temperature_on):
    # Meta tensors, like tensors on an accelerator, reject a vector in host memory but accept a 0-d tensor.
    drawn = draw(case, 6, 4, 0.3, 0)
    tensors = [torch.empty_like(z, device="meta", requires_grad=True) for z in drawn.tensors]
    options = {name: torch.empty_like(option, device="meta") for name, option in drawn.options.items()}
    temperature = drawn.tau.to(temperature_on) if temperature_on else 0.3
    for reduction in ("mean", "none"):
        loss = case.loss(*tensors, temperature, reduction=reduction, backend="blocked", **options)
        gradients = torch.autograd.grad(loss.sum(), tensors)
        assert {x.device.type for x in (loss, *gradients)} == {"meta"}


@pytest.mark.parametrize("sigma", [1e-6, 1e-40, 1e-300, 5e-324])
@pytest.mark.parametrize("loss", [fastntxent.DCLWLoss, lightly.DCLWLoss])
def test_dclw_with_a_tiny_sigma_weights_only_the_most_similar_pair(loss, sigma):
    z_i, z_j = torch.randn(2, 8, 4)
    pos, negatives = dense.pairs_and_negatives(F.normalize(torch.stack((z_i, z_j)).double(), dim=2))
    weights = torch.full((8,), 2.0, dtype=torch.float64)
    weights[pos[:8].argmax()] -= 8
    expected = (-weights.repeat(2) * pos / 0.1 + torch.logsumexp(negatives / 0.1, dim=1)).mean()
    torch.testing.assert_close(loss(0.1, sigma=sigma)(z_i, z_j).double(), expected, rtol=1e-5, atol=1e-5)
