"""fastntxent.compat.lightly against lightly, where it is installed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastntxent.compat import lightly as ours
from tests.peers import assert_same, batch, drawn, lightly, sizes, temperatures

signs = st.sampled_from([1, -1])


@given(**sizes, tau=temperatures, sign=signs)
@drawn
def test_nt_xent_equals_lightly(n, d, seed, tau, sign):
    theirs = lightly("ntx_ent_loss").NTXentLoss(sign * tau)
    assert_same(ours.NTXentLoss(sign * tau), theirs, tau, *batch(2, n, d, seed)[0])


@given(**sizes, tau=temperatures, sign=signs, weighted=st.booleans())
@drawn
def test_dcl_equals_lightly(n, d, seed, tau, sign, weighted):
    weight_fn = (lambda a, b: (a - 2 * b).square().sum(dim=1)) if weighted else None
    theirs = lightly("dcl_loss").DCLLoss(sign * tau, weight_fn)
    assert_same(ours.DCLLoss(sign * tau, weight_fn), theirs, tau, *batch(2, n, d, seed)[0])


@given(**sizes, tau=temperatures, sigma=st.floats(0.2, 2))
@drawn
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_dclw_equals_lightly(n, d, seed, tau, sigma):
    theirs = lightly("dcl_loss").DCLWLoss(tau, sigma)
    assert_same(ours.DCLWLoss(tau, sigma), theirs, tau, *batch(2, n, d, seed)[0])


@given(**sizes, tau=temperatures, sign=signs, size=st.integers(1, 40), steps=st.integers(1, 4))
@drawn
def test_memory_bank_equals_lightly_step_by_step(n, d, seed, tau, sign, size, steps):
    banks = []
    for module in (ours, lightly("ntx_ent_loss")):
        torch.manual_seed(seed)
        banks.append(module.NTXentLoss(sign * tau, memory_bank_size=(size, d)).double())
    mine, theirs = banks
    for step in range(steps):
        z_i, z_j = batch(2, n, d, seed + step)[0].double()
        torch.testing.assert_close(mine(z_i, z_j), theirs(z_i, z_j))  # without a gradient the banks stay
        results = []
        for loss in banks:
            inputs = [z.clone().requires_grad_() for z in (z_i, z_j)]
            value = loss(*inputs)
            results.append((value.detach(), *torch.autograd.grad(value, inputs)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(mine.memory_bank.bank, theirs.memory_bank.bank)
        assert mine.memory_bank.bank_ptr == int(theirs.memory_bank.bank_ptr)


def test_memory_bank_without_a_dim_finds_it_in_the_first_batch():
    torch.manual_seed(0)
    loss = ours.NTXentLoss(memory_bank_size=8)
    z_i, z_j = torch.randn(2, 3, 4)
    loss(z_i.requires_grad_(), z_j)
    assert loss.memory_bank.bank.shape == (8, 4)
    torch.testing.assert_close(loss.memory_bank.bank[:3], torch.nn.functional.normalize(z_j, dim=1))
    assert not loss.state_dict()


@pytest.mark.parametrize("temperature", [1.0, -1.0])
def test_one_sample_is_zero(temperature):
    z = torch.ones(1, 3, requires_grad=True)
    for loss in (ours.NTXentLoss(temperature), ours.DCLLoss(temperature), ours.DCLLoss(temperature, lambda a, b: 2)):
        value = loss(z, 2 * z)
        assert value == 0
        assert not torch.autograd.grad(value, z)[0].any()


def test_temperature_may_be_a_parameter():
    loss = ours.NTXentLoss(torch.nn.Parameter(torch.tensor(0.5)))
    assert len(list(loss.parameters())) == 1
    loss(*torch.randn(2, 4, 3)).backward()
    assert loss.temperature.grad != 0


def test_half_precision_gives_float32_also_with_a_bank():
    z_i, z_j = torch.randn(2, 4, 3).half()
    for loss in (ours.NTXentLoss(), ours.NTXentLoss(memory_bank_size=(8, 3)), ours.DCLLoss(), ours.DCLWLoss()):
        value = loss(z_i, z_j)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(z_i.float(), z_j.float()), rtol=1e-5, atol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="temperature must not be within 1e-8 of zero, got 1e-09"):
        ours.NTXentLoss(1e-9)
    for size in ((-1, 3), (4, 3, 2), -1):
        with pytest.raises(ValueError, match=r"memory_bank_size must be \(size, dim\), size or 0, none negative"):
            ours.NTXentLoss(memory_bank_size=size)
    for size in ("x", 2.0, (4.0, 3), None):
        with pytest.raises(TypeError, match="memory_bank_size must be an int or two of them"):
            ours.NTXentLoss(memory_bank_size=size)


@pytest.mark.parametrize("shape", [(3,), (4, 1), (4, 4)])
def test_weights_of_another_shape_are_an_error(shape):
    loss = ours.DCLLoss(weight_fn=lambda a, b: torch.ones(shape))
    with pytest.raises(ValueError, match=r"weight_fn must return a number or shape \(4,\), got shape"):
        loss(*torch.randn(2, 4, 3))


def test_weights_may_be_one_number():
    z_i, z_j = torch.randn(2, 4, 3)
    expected = ours.DCLLoss(weight_fn=lambda a, b: torch.full((4,), 2.0))(z_i, z_j)
    for weight in (2, torch.tensor(2.0), torch.tensor([2.0])):
        torch.testing.assert_close(ours.DCLLoss(weight_fn=lambda a, b, weight=weight: weight)(z_i, z_j), expected)
    with pytest.raises(TypeError, match="what weight_fn returns must be a number, got NoneType"):
        ours.DCLLoss(weight_fn=lambda a, b: None)(z_i, z_j)


@pytest.mark.parametrize("loss", [ours.NTXentLoss, ours.DCLLoss, ours.DCLWLoss])
def test_gathering_is_nothing_in_one_process(loss):
    z_i, z_j = torch.randn(2, 4, 3)
    assert loss(gather_distributed=True)(z_i, z_j) == loss()(z_i, z_j)
