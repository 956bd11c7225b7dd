"""The oracle compared with loops in NumPy, results worked out by hand, and finite differences."""

import math

import numpy as np
import pytest
import torch

from fastntxent import neg_lse, nt_xent, nt_xent_terms
from tests.cases import random_batch


def loop_nt_xent(z_i: np.ndarray, z_j: np.ndarray, temperature: float) -> np.ndarray:
    """Return each row's loss, equation 1 of the SimCLR paper, computed one sum at a time without the package."""
    rows = [row / max(math.sqrt(sum(x * x for x in row)), 1e-12) for row in np.concatenate([z_i, z_j])]
    n = len(z_i)
    losses = []
    for i, row in enumerate(rows):
        sims = [sum(a * b for a, b in zip(row, other, strict=True)) / temperature for other in rows]
        denominator = sum(math.exp(sim) for k, sim in enumerate(sims) if k != i)
        losses.append(math.log(denominator) - sims[(i + n) % (2 * n)])
    return np.array(losses)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 10.0])
@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 1), (3, 4), (7, 5)])
def test_reference_equals_numpy_loop(n, d, temperature):
    z_i, z_j, *_ = random_batch(n, d, temperature, dtype=torch.float64)
    rows = nt_xent(z_i, z_j, temperature, reduction="none", backend="reference")
    np.testing.assert_allclose(rows, loop_nt_xent(z_i.numpy(), z_j.numpy(), temperature), rtol=1e-12, atol=1e-13)


def test_reference_neg_lse_equals_numpy_loop():
    u = random_batch(9, 4, 1.0, dtype=torch.float64).z_i
    ids = torch.tensor([3, 1, 3, 2, 2, 3, 1, 1, -5])
    value = neg_lse(u, ids, 0.7, backend="reference")
    for i in range(9):
        terms = [math.exp(float(u[i] @ u[j]) / 0.7) for j in range(9) if ids[j] != ids[i]]
        assert float(value[i]) == pytest.approx(math.log(sum(terms)), rel=1e-13)


def test_reference_single_sample_is_zero():
    z = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    loss = nt_xent(z, -2 * z, 0.1, backend="reference")
    assert str(loss.item()) == "0.0"  # not -0.0
    (gradient,) = torch.autograd.grad(loss, z)
    assert torch.equal(gradient, torch.zeros_like(z))


def test_reference_two_samples_worked_by_hand():
    # Both views are (1, 0), (0, 1). Each row has a positive at 1 and two negatives at 0, so its loss is
    # log(e^k + 2) - k, where k = 1 / temperature.
    z = torch.eye(2, dtype=torch.float64)
    assert float(nt_xent(z, z, 0.5, backend="reference")) == pytest.approx(math.log(math.exp(2) + 2) - 2, rel=1e-15)
    # Opposite positives: with z_j = -z_i, each positive is at -1.
    assert float(nt_xent(z, -z, 0.5, backend="reference")) == pytest.approx(math.log(math.exp(-2) + 2) + 2, rel=1e-15)


def test_reference_two_samples_gradient_worked_by_hand():
    # Both views are e1 = (1, 0), e2 = (0, 1). The gradient with respect to row 1 has only e1 and e2 parts, and the
    # normalisation removes the e1 part. Let k = 1 / temperature, and let p = 1 / (e^k + 2) be the probability of a
    # single negative. The loss of row 1 adds k p e2 for each of its two negatives. The losses of rows 2 and 4, which
    # have row 1 as a negative, add k p e2 each. The mean is over 4 rows.
    z_i = torch.eye(2, dtype=torch.float64, requires_grad=True)
    z_j = torch.eye(2, dtype=torch.float64)
    temperature = 0.5
    p = 1 / (math.exp(1 / temperature) + 2)
    (gradient,) = torch.autograd.grad(nt_xent(z_i, z_j, temperature, backend="reference"), z_i)
    expected = (1 / temperature) * 4 * p / 4
    torch.testing.assert_close(gradient, torch.tensor([[0, expected], [expected, 0]], dtype=torch.float64))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalize", [True, False])
def test_reference_gradient_equals_finite_differences(reduction, normalize):
    z_i, z_j, *_ = random_batch(4, 3, 0.3, dtype=torch.float64)
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *args: nt_xent(*args, reduction=reduction, normalize=normalize, backend="reference"),
        (z_i.requires_grad_(), z_j.requires_grad_(), temperature),
    )


def test_reference_second_derivative_equals_finite_differences():
    z_i, z_j, *_ = random_batch(3, 3, 0.3, dtype=torch.float64)
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda *args: nt_xent(*args, backend="reference"), (z_i.requires_grad_(), z_j.requires_grad_(), temperature)
    )


def test_reference_terms_equal_numpy_loop():
    z_i, z_j, *_ = random_batch(5, 3, 0.3, dtype=torch.float64)
    temperature = 0.3
    terms = nt_xent_terms(z_i, z_j, temperature, backend="reference")
    u_i, u_j = (z.numpy() / np.linalg.norm(z.numpy(), axis=1, keepdims=True) for z in (z_i, z_j))
    alignment = -2 * np.sum(u_i * u_j) / 5
    loss = loop_nt_xent(z_i.numpy(), z_j.numpy(), temperature).sum() / 5
    assert float(terms.alignment) == pytest.approx(alignment, rel=1e-13)
    assert float(terms.loss) == pytest.approx(loss, rel=1e-13)
    assert float(terms.distribution) == pytest.approx(temperature * loss - alignment, rel=1e-13)


@pytest.mark.parametrize("normalize", [True, False])
def test_reference_terms_gradients_equal_finite_differences(normalize):
    z_i, z_j, *_ = random_batch(4, 3, 0.3, dtype=torch.float64)
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *args: tuple(nt_xent_terms(*args, normalize=normalize, backend="reference")),
        (z_i.requires_grad_(), z_j.requires_grad_(), temperature),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_reference_narrow_input_is_computed_in_float32(dtype):
    batch = random_batch(20, 16, 0.1, dtype=dtype)
    value = nt_xent(batch.z_i, batch.z_j, 0.1, backend="reference")
    truth = nt_xent(batch.z_i.double(), batch.z_j.double(), 0.1, backend="reference")
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(truth), rel=1e-6)
