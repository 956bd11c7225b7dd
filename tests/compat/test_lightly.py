"""fastntxent.compat.lightly against lightly, if it is installed."""

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st

from fastntxent.compat import lightly as ours
from tests.peers import assert_same, batch, drawn, lightly, sizes, temperatures

signs = st.sampled_from([1, -1])


@given(**sizes, tau=temperatures, sign=signs)
@drawn
def test_nt_xent_agrees_with_lightly(n, d, seed, tau, sign):
    theirs = lightly("ntx_ent_loss").NTXentLoss(sign * tau)
    assert_same(ours.NTXentLoss(sign * tau), theirs, tau, *batch(2, n, d, seed)[0])


@given(**sizes, tau=temperatures, sign=signs, weighted=st.booleans())
@drawn
def test_dcl_agrees_with_lightly(n, d, seed, tau, sign, weighted):
    weight_fn = (lambda a, b: (a - 2 * b).square().sum(dim=1)) if weighted else None
    theirs = lightly("dcl_loss").DCLLoss(sign * tau, weight_fn)
    assert_same(ours.DCLLoss(sign * tau, weight_fn), theirs, tau, *batch(2, n, d, seed)[0])


@given(**sizes, tau=temperatures, sigma=st.floats(0.2, 2), sign=signs)
@drawn
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_dclw_agrees_with_lightly(n, d, seed, tau, sigma, sign):
    theirs = lightly("dcl_loss").DCLWLoss(tau, sign * sigma)
    assert_same(ours.DCLWLoss(tau, sign * sigma), theirs, tau, *batch(2, n, d, seed)[0])


@given(**sizes, tau=temperatures, sign=signs, size=st.integers(1, 40), steps=st.integers(1, 4))
@drawn
def test_memory_bank_agrees_with_lightly_step_by_step(n, d, seed, tau, sign, size, steps):
    banks = []
    for module in (ours, lightly("ntx_ent_loss")):
        torch.manual_seed(seed)
        banks.append(module.NTXentLoss(sign * tau, memory_bank_size=(size, d)).double())
    mine, theirs = banks
    for step in range(steps):
        z_i, z_j = batch(2, n, d, seed + step)[0].double()
        torch.testing.assert_close(mine(z_i, z_j), theirs(z_i, z_j))  # without gradients, the banks do not change
        results = []
        for loss in banks:
            inputs = [z.clone().requires_grad_() for z in (z_i, z_j)]
            value = loss(*inputs)
            results.append((value.detach(), *torch.autograd.grad(value, inputs)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(mine.memory_bank.bank, theirs.memory_bank.bank)
        assert mine.memory_bank.bank_ptr == int(theirs.memory_bank.bank_ptr)


def test_memory_bank_without_a_dim_takes_it_from_the_first_batch():
    torch.manual_seed(0)
    loss = ours.NTXentLoss(memory_bank_size=8)
    z_i, z_j = torch.randn(2, 3, 4)
    loss(z_i.requires_grad_(), z_j)
    assert loss.memory_bank.bank.shape == (8, 4)
    torch.testing.assert_close(loss.memory_bank.bank[:3], torch.nn.functional.normalize(z_j, dim=1))
    assert not loss.state_dict()


def test_memory_bank_does_not_change_without_a_gradient():
    z_i, z_j = torch.randn(2, 3, 4, requires_grad=True)
    for module in (ours, lightly("ntx_ent_loss")):
        loss = module.NTXentLoss(memory_bank_size=(8, 4))
        before = loss.memory_bank.bank.clone()
        with torch.no_grad():
            loss(z_i, z_j)
        assert torch.equal(loss.memory_bank.bank, before)


def test_memory_bank_first_used_in_inference_mode_can_be_trained():
    loss = ours.NTXentLoss(memory_bank_size=8)
    z_i, z_j = torch.randn(2, 3, 4)
    with torch.inference_mode():
        loss(z_i, z_j)
    loss(z_i.requires_grad_(), z_j).backward()
    assert loss.memory_bank.bank_ptr == 3


@pytest.mark.parametrize("rows", [3, 7, 8, 20])
@pytest.mark.parametrize("first", [True, False])
def test_memory_bank_module_agrees_with_lightly(rows, first):
    results = []
    for module in (ours, lightly("ntx_ent_loss")):
        torch.manual_seed(0)
        bank = module.MemoryBankModule((8, 4), feature_dim_first=first)
        for step in range(4):
            _, held = bank(torch.full((rows, 4), float(step)), update=step != 2)
            assert held.shape == ((4, 8) if first else (8, 4))
            results.append((held, bank.bank.clone(), bank.bank_ptr.clone()))
    torch.testing.assert_close(results[:4], results[4:])


def test_memory_bank_takes_sizes_in_many_forms_and_0_means_no_bank():
    for size in (0, (0,), (0, 4), [0]):
        for module in (ours, lightly("ntx_ent_loss")):
            out = torch.ones(2, 4)
            assert module.MemoryBankModule(size)(out, update=True) == (out, None)
    for shape in ((8, 4), [8, 4], torch.Size((8, 4)), np.array([8, 4]), (np.int64(8), torch.tensor(4))):
        assert ours.MemoryBankModule(shape).bank.shape == (8, 4)
    assert ours.MemoryBankModule().size == (65536,)


def test_memory_bank_misuse_is_named_and_changes_nothing():
    bank = ours.MemoryBankModule((8, 4))
    before = bank.bank.clone()
    for output, error, message in (
        (torch.ones(3, 5), ValueError, "output and the bank's rows must have the same number of features, got 5 and 4"),
        (torch.ones(3, 1), ValueError, "output and the bank's rows must have the same number of features, got 1 and 4"),
        (torch.ones(4), ValueError, "output must have 2 dimensions"),
        (torch.ones(3, 2, 4), ValueError, "output must have 2 dimensions"),
        (None, TypeError, "output must be a torch.Tensor"),
    ):
        with pytest.raises(error, match=message):
            bank(output, update=True)
        assert torch.equal(bank.bank, before)
        assert bank.bank_ptr == 0
    loss = ours.NTXentLoss(memory_bank_size=(8, 4))
    for grad in (True, False):
        with pytest.raises(ValueError, match="out0 and the bank's rows must have the same number of features"):
            loss(torch.ones(3, 5, requires_grad=grad), torch.ones(3, 5))


@pytest.mark.parametrize("size", [(40, 4), pytest.param(40, marks=pytest.mark.slow)])
def test_memory_bank_compiles_at_most_twice_for_all_batch_sizes(size):
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(ours.NTXentLoss(memory_bank_size=size))
        losses[-1](*torch.ones(2, 1, 4))  # with an int size, the first call sets the dim
    eager, loss = losses
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for n in (3, 3, 4, 17, 9, 12, 3):
        z_i, z_j = torch.randn(n, 4, requires_grad=True), torch.randn(n, 4)
        values = [call(z_i, z_j) for call in (eager, compiled)]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(torch.autograd.grad(value, z_i) for value in values))
        assert loss.memory_bank.bank_ptr == eager.memory_bank.bank_ptr
    assert counter.frame_count <= 2  # one compilation for the first batch size, one for all others


@pytest.mark.slow
def test_memory_bank_compiled_by_inductor_gives_the_eager_gradient():
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(ours.NTXentLoss(memory_bank_size=(8, 4)))
    torch._dynamo.reset()
    calls = losses[0], torch.compile(losses[1], fullgraph=True)
    for _ in range(2):
        z_i, z_j = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
        torch.testing.assert_close(*(torch.autograd.grad(call(z_i, z_j), z_i) for call in calls))


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss", "bank"])
def test_negative_temperature_may_be_a_tensor_in_host_memory(name, shape):
    results = []
    for module in (ours, lightly("dcl_loss" if name == "DCLLoss" else "ntx_ent_loss")):
        torch.manual_seed(0)
        tau = torch.nn.Parameter(torch.full(shape, -0.5))
        loss = getattr(module, "DCLLoss" if name == "DCLLoss" else "NTXentLoss")(
            tau, **({"memory_bank_size": (8, 4)} if name == "bank" else {})
        )
        value = loss(*torch.randn(2, 3, 4))
        results.append([value, *torch.autograd.grad(value, tau)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("temperature", [1.0, -1.0])
def test_loss_of_one_sample_is_zero(temperature):
    z = torch.ones(1, 3, requires_grad=True)
    weighted = ours.DCLLoss(temperature, lambda a, b: 2)
    for loss in (ours.NTXentLoss(temperature), ours.DCLLoss(temperature), weighted):
        value = loss(z, 2 * z)
        assert value == 0
        assert not torch.autograd.grad(value, z)[0].any()


def test_temperature_may_be_a_parameter():
    loss = ours.NTXentLoss(torch.nn.Parameter(torch.tensor(0.5)))
    assert len(list(loss.parameters())) == 1
    loss(*torch.randn(2, 4, 3)).backward()
    assert loss.temperature.grad != 0


def test_half_precision_gives_a_float32_loss_with_and_without_a_bank():
    z_i, z_j = torch.randn(2, 4, 3).half()
    for loss in (ours.NTXentLoss(), ours.NTXentLoss(memory_bank_size=(8, 3)), ours.DCLLoss(), ours.DCLWLoss()):
        value = loss(z_i, z_j)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, loss(z_i.float(), z_j.float()), rtol=1e-5, atol=1e-6)


def test_invalid_arguments_are_named():
    for temperature in (1e-9, torch.tensor(-1e-9)):
        with pytest.raises(ValueError, match="temperature must not be within 1e-8 of zero, got"):
            ours.NTXentLoss(temperature)
    for loss in (ours.NTXentLoss, ours.DCLLoss, ours.DCLWLoss, ours.MACLLoss):
        for wrong, got in (("a", "str"), ([0.1], "list"), (1j, "complex"), (None, "NoneType"), (True, "bool")):
            with pytest.raises(TypeError, match=f"temperature must be a float or a tensor of one element, got {got}"):
                loss(wrong)
        with pytest.raises(TypeError, match=r"temperature must be a floating-point tensor, got torch.int64"):
            loss(torch.tensor(1))
        with pytest.raises(ValueError, match=r"temperature must be a float or have one element, got shape \(2,\)"):
            loss(torch.ones(2))
    for loss in (ours.DCLLoss, ours.DCLWLoss):
        with pytest.raises(ValueError, match="temperature must not be zero, got 0"):
            loss(0)
    for temperature in (0.0, -1.0, float("nan"), torch.tensor(1e-9)):
        with pytest.raises(ValueError, match="temperature must be at least 1e-8, got"):
            ours.MACLLoss(temperature)
    with pytest.raises(ValueError, match=r"A_0 must be in \[0, 1\], got 2"):
        ours.MACLLoss(A_0=2)
    with pytest.raises(ValueError, match="z0 and z1 must have the same shape"):
        ours.MACLLoss()(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="out0 and out1 must have the same shape"):
        ours.NTXentLoss()(torch.ones(2, 3), torch.ones(3, 3))
    for size in ((-1, 3), (4, 3, 2), -1):
        with pytest.raises(ValueError, match=r"memory_bank_size must be an int or a pair .*, without negative"):
            ours.NTXentLoss(memory_bank_size=size)
        with pytest.raises(ValueError, match=r"^size must be an int or a pair \(size, dim\)"):
            ours.MemoryBankModule(size)
    for bad in ("x", 2.0, (4.0, 3), None):
        with pytest.raises(TypeError, match="memory_bank_size must be an int or a pair"):
            ours.NTXentLoss(memory_bank_size=bad)


@pytest.mark.parametrize("shape", [(3,), (4, 1), (4, 4)])
def test_weights_of_the_wrong_shape_are_an_error(shape):
    loss = ours.DCLLoss(weight_fn=lambda a, b: torch.ones(shape))
    with pytest.raises(ValueError, match=r"weight_fn must return a number or 4 weights, got shape"):
        loss(*torch.randn(2, 4, 3))


def test_weights_may_be_a_single_number():
    z_i, z_j = torch.randn(2, 4, 3)
    expected = ours.DCLLoss(weight_fn=lambda a, b: torch.full((4,), 2.0))(z_i, z_j)
    for weight in (2, torch.tensor(2.0), torch.tensor([2.0])):
        torch.testing.assert_close(ours.DCLLoss(weight_fn=lambda a, b, weight=weight: weight)(z_i, z_j), expected)
    with pytest.raises(TypeError, match="weight_fn's result must be a number, got NoneType"):
        ours.DCLLoss(weight_fn=lambda a, b: None)(z_i, z_j)  # type: ignore[return-value]


@pytest.mark.parametrize("loss", [ours.NTXentLoss, ours.DCLLoss, ours.DCLWLoss])
def test_gathering_changes_nothing_in_one_process(loss):
    z_i, z_j = torch.randn(2, 4, 3)
    assert loss(gather_distributed=True)(z_i, z_j) == loss()(z_i, z_j)
