"""The scalar path of two towers, `info_nce_scalar`, which computes InfoNCE or CLIP with its gradient in one call: every
backend compared with the dense formula."""

import itertools

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

from fastntxent import ops, split_views
from tests import dense
from tests.cases import (
    KERNELS,
    TILE,
    Batch,
    LargestTensor,
    assert_towers_within_budget,
    converged_batch,
    random_batch,
    towers_result,
)
from tests.test_ops import REFUSED, Cut, Recorder, opcheck

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=KERNELS)
def backend(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["info_nce", "clip"])
def both(request):
    return request.param


def result(batch, backend, both, *, mean=True, needs=(True, True), dtype=torch.float32):
    """Return the operator's loss and gradients."""
    return towers_result(batch, both, mean, needs, lambda *arguments: ops.info_nce_scalar(*arguments, backend), dtype)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 10.0])
@pytest.mark.parametrize("n", [1, 2, 3, 17, 64, 130])
@pytest.mark.parametrize("d", [3, 128, 200])
def test_towers_within_budget(backend, both, n, d, temperature):
    assert_towers_within_budget(random_batch(n, d, temperature), backend, both=both)


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 65])
def test_towers_dtypes_within_budget(backend, both, n, dtype, normalize, mean):
    batch = random_batch(n, 24, 0.3, dtype=dtype)._replace(normalize=normalize)
    assert_towers_within_budget(batch, backend, both=both, mean=mean)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("loss", [0.7, 1e-3, 1e-6])
def test_towers_converged_within_budget(backend, both, loss, temperature):
    assert_towers_within_budget(converged_batch(64, 64, temperature, loss), backend, both=both)


@pytest.mark.parametrize("temperature", [0.01, 0.3])
@pytest.mark.parametrize("n", [TILE - 1, TILE, TILE + 1])
def test_towers_at_tile_edges_within_budget(backend, both, n, temperature):
    assert_towers_within_budget(random_batch(n, 20, temperature), backend, both=both)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=["z_i", "z_j", "temperature"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.01, 0.3])
@pytest.mark.parametrize("n", [1, 70])
def test_towers_with_a_frozen_side_within_budget(backend, both, n, temperature, normalize, needs):
    batch = random_batch(n, 24, temperature)._replace(normalize=normalize)
    assert_towers_within_budget(batch, backend, both=both, needs=needs)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_towers_compute_no_gradient_of_a_frozen_side(backend, both, needs):
    z = [z.requires_grad_(need) for z, need in zip(random_batch(40, 8, 0.3)[:2], needs, strict=True)]
    _, *gradients, _ = torch.ops.fastntxent.info_nce_scalar.float(*z, 2.0, True, both, True, *needs, backend)
    for gradient, need in zip(gradients, needs, strict=True):
        assert gradient.shape == (40, 8)
        assert gradient.untyped_storage().nbytes() == (4 * 40 * 8 if need else 4)
        assert need or not gradient.any()
    whole = result(random_batch(40, 8, 0.3), backend, both)
    found = result(random_batch(40, 8, 0.3), backend, both, needs=needs)
    torch.testing.assert_close(found[0], whole[0])
    torch.testing.assert_close(found[1], whole[1 if needs[0] else 2], atol=1e-7, rtol=1e-5)


def test_towers_of_one_feature_have_gradients_near_zero(backend, both):
    # In one dimension every unit row is 1 or -1, and a small step does not change it.
    for n, temperature in itertools.product((1, 2, 17), (0.1, 0.5, 10.0)):
        batch = random_batch(n, 1, temperature)
        u, v = (z.double().sign() for z in batch[:2])
        loss, d_z_i, d_z_j, _ = result(batch, backend, both)
        truth = dense.towers(u, v, torch.tensor(1 / temperature).double(), both).mean()
        torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-12)
        assert max(d_z_i.abs().max(), d_z_j.abs().max()) < 1e-5 / temperature
    assert_towers_within_budget(batch._replace(normalize=False), backend, both=both)


def test_towers_without_negatives_have_no_loss_and_no_gradient(backend, both):
    loss, *gradients = result(random_batch(1, 5, 0.1), backend, both)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


def test_dense_formula_equals_the_cross_entropy(both):
    u, v = (F.normalize(z.double(), dim=1) for z in random_batch(12, 5, 0.3)[:2])
    tau = torch.tensor(0.3, dtype=torch.float64)
    expected = (dense.clip if both else dense.info_nce)(u, v, tau)
    torch.testing.assert_close(dense.towers(u, v, 1 / tau, both), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_towers_of_rows_around_eps_within_budget(backend, both, dtype):
    eps = {torch.float16: 6e-5, torch.float32: 1e-12}[dtype]
    z_i, z_j, *_ = random_batch(20, 16, 0.5)
    for length in (eps / 10, 10 * eps):  # a row shorter than eps is divided by eps: its gradient keeps a radial part
        batch = Batch((F.normalize(z_i, dim=1) * length).to(dtype), z_j.to(dtype), 0.5)
        assert_towers_within_budget(batch, backend, both=both)
        assert_towers_within_budget(batch._replace(z_i=batch.z_j, z_j=batch.z_i), backend, both=both)


@pytest.mark.parametrize("layout", ["interleaved", "transposed", "every other feature", "expanded"])
def test_towers_of_strided_rows_equal_contiguous(backend, both, layout):
    z_i, z_j, *_ = random_batch(30, 24, 0.2)
    if layout == "interleaved":
        z_i, z_j = split_views(torch.stack((z_i, z_j), dim=1))
    elif layout == "transposed":
        z_i, z_j = z_i.T.contiguous().T, z_j.T.contiguous().T
    elif layout == "every other feature":
        z_i, z_j = z_i[:, ::2], z_j[:, 1::2]
    else:
        z_j = z_j[:1].expand(30, -1)

    def call(z_i, z_j):
        return torch.ops.fastntxent.info_nce_scalar.float(z_i, z_j, 5.0, True, both, True, True, True, backend)

    for value, expected in zip(call(z_i, z_j), call(z_i.contiguous(), z_j.contiguous()), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("seed", range(3))
def test_towers_of_huge_logits_are_no_worse_than_the_formula(backend, both, seed):
    # Logits of 1e5 have rounding errors of 1e-2, which cancel only if forward and backward round alike.
    batch = random_batch(64, 16, 0.1, seed=seed).map(lambda z: z * 30)._replace(normalize=False)
    assert_towers_within_budget(batch, backend, both=both)


def test_towers_same_bits_every_time(backend, both):
    batch = random_batch(TILE + 1, 32, 0.1)
    first, second = (result(batch, backend, both) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("temperature", [0.005, 0.3])
def test_towers_value_without_gradient_equals_the_scalar_path(backend, both, temperature, mean):
    z_i, z_j, *_ = random_batch(70, 8, temperature)
    value = ops.info_nce_scalar(z_i, z_j, 1 / temperature, True, both, mean, backend)
    with_gradient = ops.info_nce_scalar(z_i.requires_grad_(), z_j, 1 / temperature, True, both, mean, backend)
    torch.testing.assert_close(value, with_gradient.detach(), rtol=3e-7, atol=0)


@pytest.mark.parametrize("mean", [True, False])
def test_loss_of_both_directions_is_the_mean_of_the_two(backend, mean):
    z_i, z_j, *_ = random_batch(40, 8, 0.2, dtype=torch.float64)

    def gradients(*directions: bool) -> tuple[Tensor, ...]:
        z = [z.clone().requires_grad_() for z in (z_i, z_j)]
        k = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
        both = len(directions) == 1
        losses = [ops.info_nce_scalar(*(z if forth else z[::-1]), k, True, both, mean, backend) for forth in directions]
        loss = sum(losses) / len(losses)
        return loss.detach(), *torch.autograd.grad(loss, (*z, k))

    torch.testing.assert_close(gradients(True), gradients(True, False))


def test_towers_create_no_tensor_of_all_pairs(backend, both):
    n = 4 * TILE
    z_i, z_j = (torch.randn(n, 4, requires_grad=True) for _ in range(2))
    with LargestTensor() as largest:
        torch.autograd.grad(ops.info_nce_scalar(z_i, z_j, 2.0, True, both, True, backend), (z_i, z_j))
    assert largest.numel < n * n / 4


def test_nan_in_one_row_reaches_the_loss(backend, both):
    z_i, z_j, *_ = random_batch(20, 8, 0.2)
    for z in (z_i, z_j):
        ill = z.clone()
        ill[3, 2] = torch.nan
        pair = (ill, z_j) if z is z_i else (z_i, ill)
        loss, *gradients = result(Batch(*pair, 0.2), backend, both)
        assert loss.isnan()
        assert all(gradient.isnan().any() for gradient in gradients)


# --- the operators ---------------------------------------------------------------------------------------------------


def sides(n=6, d=4, *, dtype=torch.float32, needs=(True, True)):
    z = random_batch(n, d, 0.5, dtype=dtype)[:2]
    return tuple(each.requires_grad_(need) for each, need in zip(z, needs, strict=True))


def inverse_temperature(requires_grad=True):
    return torch.tensor(2.0, requires_grad=requires_grad)


def dense_loss(z_i, z_j, k, both=True):
    return dense.towers(F.normalize(z_i, dim=1), F.normalize(z_j, dim=1), k, both).mean()


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scalar_operator_passes_opcheck(backend, both, dtype, needs):
    z = sides(dtype=dtype, needs=needs)
    opcheck("info_nce_scalar", (*z, inverse_temperature(), True, both, False, *needs, backend))


def test_value_operator_passes_opcheck_and_has_no_gradient(backend, both):
    z = sides(needs=(False, False))
    opcheck("info_nce_value", (*z, inverse_temperature(False), True, both, True, backend))
    loss = torch.ops.fastntxent.info_nce_value(*sides(), inverse_temperature(), True, both, True, backend)
    with pytest.raises(RuntimeError, match="use fastntxent::info_nce_scalar"):
        loss.backward()


def test_backward_operator_passes_opcheck():
    z_i, z_j = sides(needs=(False, False))
    k = inverse_temperature(False)
    opcheck("info_nce_scalar_backward", (torch.tensor(2.0), z_i, z_j, k, z_i, z_j, k))
    frozen = torch.zeros(()).expand(6, 4)
    opcheck("info_nce_scalar_backward", (torch.tensor(2.0), z_i, frozen, k, z_i, z_j, k))


@pytest.mark.parametrize("k", [2.0, inverse_temperature()])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_eager_call_gives_the_bits_of_the_operator(backend, both, k, needs):
    z = sides(20, 8, needs=needs)
    found = ops.info_nce_scalar(*z, k, True, both, True, backend)
    expected, *_ = torch.ops.fastntxent.info_nce_scalar(*z, k, True, both, True, *needs, backend)
    inputs = [x for x in (*z, k) if isinstance(x, Tensor) and x.requires_grad]
    assert torch.equal(found, expected)
    for short, whole in zip(*(torch.autograd.grad(1.5 * loss, inputs) for loss in (found, expected)), strict=True):
        assert torch.equal(short, whole)


@pytest.mark.parametrize("wants", ["z_i", "z_j", "k"])
def test_scalar_path_is_used_if_a_gradient_is_needed(backend, wants):
    tensors = dict(zip(("z_i", "z_j"), sides(needs=(False, False)), strict=True), k=inverse_temperature(False))

    def loss():
        return ops.info_nce_scalar(*tensors.values(), True, True, True, backend)

    with Recorder() as recorder:
        loss()
        tensors[wants].requires_grad_()
        loss().backward()
        with torch.no_grad():
            loss()
    assert recorder.names == ["info_nce_value", "info_nce_scalar", "info_nce_value"]
    assert {name for name, x in tensors.items() if x.grad is not None} == {wants}


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_compile_gives_the_same_gradients_and_recompiles_once(backend, both, needs):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(z_i, z_j, k):
        return ops.info_nce_scalar(z_i, z_j, k, True, both, True, backend)

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for n in (8, 12, 7, 33):
        tensors = (*sides(n, needs=needs), inverse_temperature())
        inputs = [x for x in tensors if x.requires_grad]
        results = [(value, *torch.autograd.grad(value, inputs)) for value in (compiled(*tensors), loss(*tensors))]
        torch.testing.assert_close(*results)
    assert counter.frame_count <= 2  # one compilation for the first batch size, one for all others


@pytest.mark.parametrize("needs", [(True, True), (True, False)])
def test_compile_with_inductor_gives_the_same_gradients(backend, needs):
    torch._dynamo.reset()
    z = sides(needs=needs)

    def loss(z_i, z_j):
        return ops.info_nce_scalar(z_i * 2, z_j + 1, 2.0, True, True, True, backend)

    inputs = [x for x in z if x.requires_grad]
    expected = torch.autograd.grad(loss(*z), inputs)
    torch.testing.assert_close(torch.autograd.grad(torch.compile(loss, fullgraph=True)(*z), inputs), expected)


def test_transforms_equal_the_formula(backend, both):
    z_i, z_j = sides(needs=(False, False))
    k = inverse_temperature(False)

    def loss(z_i, z_j, k):
        return ops.info_nce_scalar(z_i, z_j, k, True, both, True, backend)

    def formula(z_i, z_j, k):
        return dense_loss(z_i, z_j, k, both)

    for argnums in (0, 1, 2, (0, 1, 2)):
        value, expected = (torch.func.grad(f, argnums=argnums)(z_i, z_j, k) for f in (loss, formula))
        torch.testing.assert_close(value, expected)
    many = torch.stack((z_i, z_j, z_i + 1))
    found = [
        torch.func.vmap(torch.func.grad_and_value(f), in_dims=(0, None, None))(many, z_j, k) for f in (loss, formula)
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("by", ["z_i", "z_j", "k"])
def test_second_derivative_is_refused_with_advice(backend, by):
    tensors = dict(zip(("z_i", "z_j"), sides(), strict=True), k=inverse_temperature())
    loss = ops.info_nce_scalar(*tensors.values(), True, True, True, backend)
    (gradient,) = torch.autograd.grad(loss, tensors[by], create_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(dense_loss(*tensors.values()), tensors[by])[0])
    with pytest.raises(RuntimeError, match=REFUSED):
        gradient.square().sum().backward()


def test_forward_derivative_is_refused_with_advice(backend):
    z_i, z_j = sides(needs=(False, False))
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.func.jvp(lambda z: ops.info_nce_scalar(z, z_j, 2.0, True, True, True, backend), (z_i,), (z_i,))


def test_upstream_gradient_of_none_gives_no_gradient(backend):
    z_i, z_j = sides()
    Cut.apply(ops.info_nce_scalar(z_i, z_j, 2.0, True, True, True, backend)).backward()
    assert z_i.grad is None
    assert z_j.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(backend, both, dtype):
    batch = random_batch(40, 16, 0.1)
    expected = result(batch, backend, both)
    with torch.autocast("cpu", dtype=dtype):
        found = result(batch, backend, both)
    assert all(map(torch.equal, found, expected))


def test_backward_raises_if_an_argument_was_changed_in_place(backend):
    for changed in range(3):
        leaves = (*sides(), inverse_temperature())
        tensors = [x * 1 for x in leaves]
        loss = ops.info_nce_scalar(*tensors, True, True, True, backend)
        with torch.no_grad():
            tensors[changed].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_loss_of_meta_tensors_has_the_right_shapes():
    z = torch.empty(6, 4, device="meta", requires_grad=True)
    loss = ops.info_nce_scalar(z, z.detach(), 0.5, True, True, True, "auto")
    loss.backward()
    assert loss.shape == ()
    assert z.grad.shape == z.shape
