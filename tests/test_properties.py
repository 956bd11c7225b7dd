"""Properties of NT-Xent that hold for all embeddings, on inputs drawn by hypothesis."""

import math

import hypothesis.extra.numpy as arrays
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastntxent import neg_lse, nt_xent, nt_xent_terms
from tests.cases import BACKENDS

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@st.composite
def batches(draw, min_n=1):
    """Draw two float64 views without short rows, and a temperature."""
    n, d = draw(st.integers(min_n, 12)), draw(st.integers(2, 9))
    elements = st.floats(-4, 4, width=32)
    z = torch.tensor(draw(arrays.arrays("float64", (2, n, d), elements=elements)))
    z[..., 0] += torch.where(z.norm(dim=-1) < 0.1, 1.0, 0.0)
    return z[0], z[1], draw(st.floats(0.02, 10))


drawn = settings(max_examples=40, deadline=None)
close = {"rtol": 1e-9, "atol": 1e-10}


@given(batch=batches())
@drawn
def test_nt_xent_swap_of_views_changes_nothing(backend, batch):
    z_i, z_j, tau = batch
    torch.testing.assert_close(
        nt_xent(z_j, z_i, tau, backend=backend), nt_xent(z_i, z_j, tau, backend=backend), **close
    )


@given(batch=batches(), seed=st.integers(0, 2**16))
@drawn
def test_nt_xent_permutation_of_samples_permutes_rows(backend, batch, seed):
    z_i, z_j, tau = batch
    order = torch.randperm(len(z_i), generator=torch.Generator().manual_seed(seed))
    rows = nt_xent(z_i, z_j, tau, reduction="none", backend=backend).view(2, -1)
    permuted = nt_xent(z_i[order], z_j[order], tau, reduction="none", backend=backend).view(2, -1)
    torch.testing.assert_close(permuted, rows[:, order], **close)


@given(batch=batches(), seed=st.integers(0, 2**16))
@drawn
def test_nt_xent_rotation_changes_nothing(backend, batch, seed):
    z_i, z_j, tau = batch
    d = z_i.shape[1]
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))
    torch.testing.assert_close(
        nt_xent(z_i @ rotation, z_j @ rotation, tau, backend=backend), nt_xent(z_i, z_j, tau, backend=backend), **close
    )


@given(batch=batches(), scale=st.floats(1e-3, 1e3))
@drawn
def test_nt_xent_scaling_of_rows_changes_nothing(backend, batch, scale):
    z_i, z_j, tau = batch
    scales = torch.linspace(1, scale, len(z_i), dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        nt_xent(z_i * scales, z_j / scales, tau, backend=backend), nt_xent(z_i, z_j, tau, backend=backend), **close
    )


@given(n=st.integers(1, 40), d=st.integers(1, 9), tau=st.floats(0.002, 10))
@drawn
def test_nt_xent_all_rows_equal_gives_log_of_2n_minus_1(backend, n, d, tau):
    z = torch.full((n, d), 0.3, dtype=torch.float64)
    assert float(nt_xent(z, z, tau, backend=backend)) == pytest.approx(math.log(2 * n - 1), rel=1e-9, abs=1e-9)


@given(batch=batches())
@drawn
def test_nt_xent_gradient_is_orthogonal_to_each_row(backend, batch):
    z_i, z_j, tau = batch
    z_i.requires_grad_()
    (gradient,) = torch.autograd.grad(nt_xent(z_i, z_j, tau, backend=backend), z_i)
    radial = (gradient * z_i).sum(dim=1).abs()
    assert (radial <= 1e-12 / tau).all()


@given(batch=batches())
@drawn
def test_nt_xent_gradient_has_no_rotational_part(backend, batch):
    # Rotating all rows does not change the loss. So the sum of d z^T over all rows z is symmetric, where d is the
    # gradient with respect to z.
    z_i, z_j, tau = (*(z.requires_grad_() for z in batch[:2]), batch[2])
    d_i, d_j = torch.autograd.grad(nt_xent(z_i, z_j, tau, backend=backend), (z_i, z_j))
    moment = d_i.T @ z_i + d_j.T @ z_j
    assert (moment - moment.T).abs().max() <= 1e-11 / tau


@given(batch=batches())
@drawn
def test_nt_xent_loss_is_never_negative(backend, batch):
    z_i, z_j, tau = batch
    assert (nt_xent(z_i, z_j, tau, reduction="none", backend=backend) >= 0).all()


@given(batch=batches())
@drawn
def test_nt_xent_terms_add_up(backend, batch):
    z_i, z_j, tau = batch
    terms = nt_xent_terms(z_i, z_j, tau, backend=backend)
    torch.testing.assert_close(terms.alignment + terms.distribution, tau * terms.loss, **close)


@given(batch=batches(min_n=2))
@drawn
def test_neg_lse_is_at_least_its_largest_logit_and_at_most_log_m_more(backend, batch):
    z, _, tau = batch
    M = len(z)
    u = torch.nn.functional.normalize(z, dim=1)
    nu = neg_lse(u, torch.arange(M), tau, backend=backend)
    largest = ((u @ u.T) / tau).fill_diagonal_(-math.inf).amax(dim=1)
    slack = 1e-12 / tau + 1e-12
    assert (nu >= largest - slack).all()
    assert (nu <= largest + math.log(M) + slack).all()
