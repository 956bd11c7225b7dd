"""Leaving out negatives that are too similar to a row: ties, NaN, errors, and large and converged batches."""

import pytest
import torch
import torch.nn.functional as F

import fastntxent
from fastntxent import error_budget
from tests.cases import BACKENDS, KERNELS, converged_batch, random_batch


@pytest.mark.parametrize("backend", BACKENDS)
def test_negatives_exactly_at_the_limit_are_kept(backend):
    # Similarities of these two-feature rows are exactly 0 and 1. With a margin of 0, the limit is 1.
    z_i = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    exact = fastntxent.nt_xent(z_i, z_i, 1.0, backend=backend)
    torch.testing.assert_close(fastntxent.nt_xent(z_i, z_i, 1.0, margin=0.0, backend=backend), exact)
    fewer = fastntxent.nt_xent(z_i, z_i, 1.0, margin=1e-3, reduction="none", backend=backend)
    # The first two samples lose each other as negatives, and keep the third sample's two rows. The third sample keeps
    # all four of its negatives.
    left_out, kept = torch.log(torch.tensor(1 + 2 * torch.e**-1)), torch.log(torch.tensor(1 + 4 * torch.e**-1))
    torch.testing.assert_close(fewer, torch.stack([left_out, left_out, kept] * 2))


@pytest.mark.parametrize("d", [8, 128, 768])
@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_of_the_positive_are_kept_with_a_margin_of_zero(backend, d):
    z, w = torch.randn(2, 40, d)
    query, key = z.repeat(4, 1), (z + 0.1 * w).repeat(4, 1)
    losses = fastntxent.info_nce(query, key, 0.01, margin=0.0, reduction="none", backend=backend)
    assert losses.min() > 1.38  # log 4: the positive and three copies of it


@pytest.mark.parametrize("d", [1, 3, 48, 300])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_are_kept_whatever_the_similarity_to_the_positive(backend, d):
    """Opposite, equal and orthogonal positives, and rows that are not normalised."""
    options = {"reduction": "none", "backend": backend}
    for x, y in torch.randn(8, 2, 1, d).repeat(1, 1, 4, 1):
        orthogonal = y - (x * y).sum(dim=1, keepdim=True) / (x * x).sum(dim=1, keepdim=True) * x
        for positive in (-x, x, orthogonal):
            query = fastntxent.info_nce(x, positive, 1.0, margin=0.0, **options)
            torch.testing.assert_close(query, torch.full((4,), 4.0).log())
        for limits in ({"margin": 0.0}, {"relative_margin": 0.0}):
            losses = fastntxent.nt_xent(x, -x, 1.0, **limits, **options)
            torch.testing.assert_close(losses, torch.full((8,), 4.0).log())
        torch.testing.assert_close(
            fastntxent.nt_xent(x, x, 1.0, ceiling=1.0, **options), torch.full((8,), 7.0).log(), rtol=1e-5, atol=1e-5
        )
        of_lengths = {"normalize": False, "margin": 0.0}
        both = fastntxent.clip(F.normalize(x), 5 * F.normalize(y), 1.0, **of_lengths, **options)
        torch.testing.assert_close(both, torch.full((4,), 4.0).log())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [2e-3, 5e-4])
@pytest.mark.parametrize("backend", KERNELS)
def test_weights_near_the_smallest_numbers_give_no_nan(backend, temperature, dtype):
    """Logits of positives exceed all others by hundreds of nats, so weights in the gradient are as small as 1e-200."""
    x, w = torch.randn(2, 6, 5, dtype=torch.float64)
    y, ids = x + 0.3 * w, torch.tensor([0, 1, 2, 0, 1, 5])
    losses = [
        lambda a, b, **to: fastntxent.nt_xent(a, b, temperature, ceiling=0.0, **to),
        lambda a, b, **to: fastntxent.nt_xent(a, b, temperature, ids=ids, **to),
        lambda a, b, **to: fastntxent.clip(a, b, temperature, ids=ids, positives="same_id", form="in", **to),
        lambda a, b, **to: fastntxent.sup_con(torch.cat((a, b)), ids.repeat(2), temperature, ceiling=0.4, **to),
    ]
    for loss in losses:
        found = []
        for name in (backend, "reference"):
            a, b = (z.to(dtype, copy=True).requires_grad_() for z in (x, y))
            found.append(torch.autograd.grad(loss(a, b, backend=name), (a, b)))
        for ours, reference in zip(*found, strict=True):
            assert ours.isfinite().all()
            # float32 resolves logits of 1,000 only to 6e-5, so the weights have relative errors of that size. In
            # float64, rounding is negligible.
            torch.testing.assert_close(ours, reference, rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=1e-5)


@pytest.mark.parametrize(("temperature", "length"), [(1e6, 1.0), (0.5, 1e-4), (500.0, 1.0)])
@pytest.mark.parametrize("backend", KERNELS)
def test_limits_stay_precise_when_logits_are_small(backend, temperature, length):
    z_i, z_j = length * torch.randn(2, 64, 32, dtype=torch.float64)
    options = {"margin": 0.0, "normalize": False}
    expected = fastntxent.nt_xent(z_i, z_j, temperature, backend="reference", **options)
    value = fastntxent.nt_xent(z_i.float(), z_j.float(), temperature, backend=backend, **options)
    torch.testing.assert_close(value.double(), expected, rtol=2e-4, atol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.005])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_lose_all_negatives_have_no_loss_and_no_gradient(backend, temperature):
    z = torch.randn(2, 6, 4, requires_grad=True)
    loss = fastntxent.nt_xent(z[0], z[1], temperature, ceiling=-2.0, backend=backend)
    assert loss == 0
    assert not torch.autograd.grad(loss, z)[0].any()


@pytest.mark.parametrize("temperature", [1.0, 0.005])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_similarities_are_kept(backend, temperature):
    z = torch.randn(2, 6, 4)
    z[0, 3, 1] = torch.nan
    losses = fastntxent.nt_xent(z[0], z[1], temperature, margin=0.5, reduction="none", backend=backend)
    assert losses.isnan().all()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("stage", ["start", 0.7, 1e-6])
def test_limits_keep_the_accuracy_of_nt_xent(backend, stage):
    batch = random_batch(700, 32, 0.1) if stage == "start" else converged_batch(300, 32, 0.02, stage)
    similarities = F.normalize(torch.cat((batch.z_i, batch.z_j)).double(), dim=1)
    similarities = similarities @ similarities.T
    # Put the ceiling in a gap between similarities, so that rounding decides no comparison.
    ordered = similarities.flatten().sort().values
    high = int(len(ordered) * 0.9)
    gap = int((ordered[high + 1 : high + 2000] - ordered[high : high + 1999]).argmax()) + high
    ceiling = float(ordered[gap : gap + 2].mean())

    def result(dtype, name):
        z_i, z_j = (z.to(dtype, copy=True).requires_grad_() for z in (batch.z_i, batch.z_j))
        loss = fastntxent.nt_xent(z_i, z_j, batch.temperature, ceiling=ceiling, normalize=batch.normalize, backend=name)
        return [loss.detach(), *torch.autograd.grad(loss, (z_i, z_j))]

    truth, same, value = (
        result(torch.float64, "reference"),
        result(torch.float32, "reference"),
        result(torch.float32, backend),
    )
    for v, s, t in zip(value, same, truth, strict=True):
        limit = error_budget.allowed(error_budget.errors_of(s, t), torch.float32, 1 / batch.temperature)
        assert error_budget.errors_of(v, t).within(limit)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"margin": 0.1, "relative_margin": 0.1}, ValueError, "margin and relative_margin must not both be given"),
        ({"margin": float("nan")}, ValueError, "margin must be finite, got nan"),
        ({"ceiling": float("inf")}, ValueError, "ceiling must be finite, got inf"),
        ({"margin": "0.1"}, TypeError, "margin must be a number, got str"),
        ({"margin": torch.tensor(0.1)}, TypeError, "margin must be a number, got Tensor"),
        ({"relative_margin": 1.5}, ValueError, r"relative_margin must be in \[0, 1\], got 1.5"),
        ({"margin": 0.1, "label_smoothing": 0.1}, ValueError, "label_smoothing cannot be combined with margin"),
    ],
)
@pytest.mark.parametrize("loss", [fastntxent.nt_xent, fastntxent.info_nce, fastntxent.clip])
def test_errors_name_the_argument(loss, options, error, words):
    with pytest.raises(error, match=words):
        loss(*torch.randn(2, 6, 4), 0.5, **options)


def test_sup_con_rejects_a_ceiling_with_several_labels_per_row():
    with pytest.raises(ValueError, match="ceiling must be None with several labels per row"):
        fastntxent.sup_con(torch.randn(6, 4), torch.ones(6, 2, dtype=torch.bool), 0.5, ceiling=0.1)
