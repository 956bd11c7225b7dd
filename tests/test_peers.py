"""The loss family compared with the libraries in common use, if they are installed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastntxent
from tests.peers import assert_same, batch, drawn, lightly, needs, sizes, temperatures


@given(**sizes, tau=temperatures)
@drawn
def test_dcl_equals_lightly(n, d, seed, tau):
    loss = lightly("dcl_loss").DCLLoss(tau)
    assert_same(lambda a, b: fastntxent.dcl(a, b, tau), loss, tau, *batch(2, n, d, seed)[0])


@given(**sizes, tau=temperatures, sigma=st.floats(0.2, 2))
@drawn
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_dclw_equals_lightly(n, d, seed, tau, sigma):
    loss = lightly("dcl_loss").DCLWLoss(tau, sigma)
    assert_same(lambda a, b: fastntxent.dclw(a, b, tau, sigma=sigma), loss, tau, *batch(2, n, d, seed)[0])


@given(**sizes, tau=temperatures, alpha=st.floats(0, 0.5), a_0=st.floats(0, 0.5))
@drawn
def test_macl_equals_lightly(n, d, seed, tau, alpha, a_0):
    loss = lightly("macl_loss").MACLLoss(temperature=tau, alpha=alpha, A_0=a_0)
    (z_i, z_j), _ = batch(2, n, d, seed)
    # lightly divides a row's loss by 1 - exp(-loss) + 1e-8, and ours has no such eps. Compare only batches in which
    # 1 - exp(-loss), estimated at the base temperature, is much larger for every row.
    if float(fastntxent.nt_xent(z_i, z_j, tau, reduction="none").min()) > 0.05:
        assert_same(
            lambda a, b: fastntxent.macl(a, b, tau, alpha=alpha, a_0=a_0), loss, tau * (1 - alpha), z_i, z_j, exact=1e-6
        )


@given(**sizes, tau=temperatures)
@drawn
def test_sup_con_pairs_equals_pytorch_metric_learning(n, d, seed, tau):
    loss = needs("pytorch_metric_learning.losses").NTXentLoss(tau)
    (z,), labels = batch(1, n, d, seed)
    same = labels[:, None] == labels
    counts = same.sum(dim=1) - 1
    if same.all() or not counts.any():
        return  # the library's loss is 0 if there is no negative pair, or no positive pair

    def ours(z):  # the library's mean is over pairs, ours over rows
        return (fastntxent.sup_con(z, labels, tau, form="pairs", reduction="none") * counts).sum() / counts.sum()

    assert_same(ours, lambda z: loss(z, labels), tau, z)


# At smaller temperatures float32 can round an anchor's loss to 0, and the library's mean then skips this anchor.
@given(**sizes, tau=st.floats(0.3, 2))
@drawn
def test_sup_con_out_equals_pytorch_metric_learning(n, d, seed, tau):
    loss = needs("pytorch_metric_learning.losses").SupConLoss(tau)
    (z,), labels = batch(1, n, d, seed)
    same = labels[:, None] == labels
    if same.all() or not (same.sum(dim=1) > 1).any():
        return
    assert_same(lambda z: fastntxent.sup_con(z, labels, tau), lambda z: loss(z, labels), tau, z)


@given(**sizes, tau=temperatures)
@drawn
def test_info_nce_equals_info_nce_pytorch(n, d, seed, tau):
    loss = needs("info_nce").InfoNCE(tau)
    (query, key), _ = batch(2, n, d, seed)
    assert_same(lambda a, b: fastntxent.info_nce(a, b, tau), loss, tau, query, key)


@given(**sizes, tau=temperatures, k=st.integers(1, 9), paired=st.booleans())
@drawn
def test_info_nce_with_negatives_equals_info_nce_pytorch(n, d, seed, tau, k, paired):
    loss = needs("info_nce").InfoNCE(tau, negative_mode="paired" if paired else "unpaired")
    (query, key), _ = batch(2, n, d, seed)
    negatives = torch.randn(*((n, k, d) if paired else (k, d)), generator=torch.Generator().manual_seed(seed + 1))
    assert_same(
        lambda a, b, c: fastntxent.info_nce(a, b, tau, negatives=c),
        lambda a, b, c: loss(a, b, c),
        tau,
        query,
        key,
        negatives,
    )


@given(**sizes, tau=temperatures)
@drawn
def test_nt_xent_equals_pytorch_metric_learning(n, d, seed, tau):
    losses = needs("pytorch_metric_learning.losses")
    loss = losses.SelfSupervisedLoss(losses.NTXentLoss(tau))
    assert_same(lambda a, b: fastntxent.nt_xent(a, b, tau), loss, tau, *batch(2, n, d, seed)[0])
