"""Every backend compared with the oracle: stages of training, temperatures, sizes, dtypes and layouts."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastntxent import cross_neg_lse, error_budget, neg_lse, nt_xent_terms, split_views
from fastntxent.opening import open_batch
from fastntxent.sides import Side
from tests.cases import (
    BACKENDS,
    CUDA_KERNELS,
    KERNELS,
    TILE,
    Batch,
    assert_arrays_within_budget,
    assert_cross_neg_lse_within_budget,
    assert_gradient_within_rounding,
    assert_neg_lse_within_budget,
    assert_within_budget,
    blocked,
    converged_batch,
    cross_result,
    evaluate,
    needs_cuda,
    random_batch,
    start_of_training,
    tiling,
)
from tests.tiers import every_pair

TEMPERATURES = [0.001, 0.01, 0.07, 0.5, 10.0]
HALF = TILE // 2  # the N that fills one tile, because M = 2N


@pytest.fixture(params=KERNELS)
def backend(request):
    return request.param


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("n", [1, 2, 3, 129])
@pytest.mark.parametrize("d", [2, 127, 128, 513])
def test_nt_xent_within_budget(backend, n, d, temperature):
    assert_within_budget(random_batch(n, d, temperature), backend)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("n", [HALF - 1, HALF, HALF + 1, 2 * HALF + 1])
def test_nt_xent_at_tile_edges_within_budget(backend, n, temperature):
    assert_within_budget(random_batch(n, 32, temperature), backend)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nt_xent_dtypes_within_budget(backend, dtype, normalize, reduction):
    batch = random_batch(65, 24, 0.3, dtype=dtype)._replace(normalize=normalize)
    assert_within_budget(batch, backend, reduction=reduction)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("n", [1, 3, HALF + 1])
def test_nt_xent_random_upstream_within_budget(backend, n, normalize, temperature):
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(2 * n, generator=generator, dtype=torch.float64)
    batch = random_batch(n, 40, temperature)
    if not normalize:  # rows of length about 1 keep the logits in the range of a trained network
        batch = batch.map(lambda z: z / 10)._replace(normalize=False)
    assert_within_budget(batch, backend, upstream=upstream, reduction="none")


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 65536.0, 1e30])
@pytest.mark.parametrize("temperature", [0.01, 0.019, 0.1])
def test_nt_xent_upstream_of_any_magnitude_within_budget(backend, temperature, scale):
    upstream = torch.linspace(-1, 1, 66, dtype=torch.float64) * scale
    assert_within_budget(random_batch(33, 40, temperature), backend, upstream=upstream, reduction="none")


@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0, 1e4, 1e8])
@pytest.mark.parametrize("samples", ["apart", "anywhere"])
def test_nt_xent_extreme_upstream_entry_spoils_no_other_row(backend, samples, temperature):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    z = torch.linalg.qr(z)[0] if samples == "apart" else z
    noise = (0.01 if samples == "apart" else 0.5) * torch.randn(2, 16, 16, generator=generator, dtype=torch.float64)
    batch = Batch(*(z + noise).float(), temperature)
    for entry in (1e38, 1e-38, 2.0**120):
        upstream = torch.ones(32, dtype=torch.float64)
        upstream[1] = entry
        result = evaluate(batch, backend, upstream=upstream, reduction="none")
        truth = evaluate(batch.map(Tensor.double), "reference", upstream=upstream, reduction="none")
        for value, true in zip(result[1:3], truth[1:3], strict=True):
            held = true.abs().amax(dim=1) < torch.finfo(torch.float32).max
            errors = (value - true).abs().amax(dim=1) / true.abs().amax(dim=1)
            assert held.any()
            assert errors[held].max() < 1e-4
            assert not value[~held].isnan().any()


@pytest.mark.parametrize("temperature", [0.005, 0.02, 1.0])
def test_nt_xent_float64_large_losses_within_budget(backend, temperature):
    z_i, z_j, *_ = random_batch(33, 8, temperature, dtype=torch.float64)
    assert_within_budget(Batch(z_i, -z_j, temperature), backend)  # opposite positives: losses of about 2 / tau


@pytest.mark.parametrize("inv_tau", [40, 52, 54, 56, 70, 82, 84, 86, 88, 90, 94, 110, 400])
@pytest.mark.parametrize("stage", ["collapsed", "converged"])
def test_nt_xent_near_the_range_of_float32_exponentials_within_budget(backend, stage, inv_tau):
    if stage == "collapsed":  # all logits are near the maximum
        z = torch.ones(2, 60, 16) + 1e-3 * torch.randn(2, 60, 16, generator=torch.Generator().manual_seed(0))
        batch = Batch(*z, 1 / inv_tau)
    else:
        batch = converged_batch(60, 16, 1 / inv_tau, 1e-3)
    assert_within_budget(batch, backend, upstream=torch.linspace(-1e-6, 1e-6, 120).double(), reduction="none")


@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("loss", [0.7, 1e-3, 1e-6])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nt_xent_converged_within_budget(backend, reduction, loss, temperature):
    batch = converged_batch(200, 64, temperature, loss)
    upstream = torch.ones(400, dtype=torch.float64) if reduction == "none" else None
    assert_within_budget(batch, backend, reduction=reduction, upstream=upstream)


@every_pair(slow_pairs=True, loss=[None, 0.7, 1e-3, 1e-6], temperature=[0.01, 0.1, 0.5])
def test_gradient_is_accurate_at_every_stage_of_training(backend, loss, temperature):
    shape = 512, 128, temperature
    batch = start_of_training(*shape) if loss is None else converged_batch(*shape, loss)
    if loss is not None:
        assert float(evaluate(batch.map(torch.Tensor.double), "reference").loss) == pytest.approx(loss, rel=0.02)
    assert_gradient_within_rounding(batch, backend)


@pytest.mark.parametrize("rows", ["duplicates", "collapsed"])
def test_similar_rows_of_many_features_are_about_as_accurate_as_in_pytorch(backend, rows):
    # In the dot product of similar rows, the terms have the same sign. So the error of a single sum over all features
    # would grow with the number of features.
    errors = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        z_i, z_j = torch.randn(2, 16, 8192, generator=generator)
        if rows == "duplicates":  # each row is also a row of another sample
            z_j = z_i.roll(1, 0)
        else:
            z_i, z_j = (torch.randn(1, 8192, generator=generator) + 0.1 * z for z in (z_i, z_j))
        batch = Batch(z_i, z_j, 0.1)
        truth = evaluate(batch.map(torch.Tensor.double), "reference")
        errors.append([difference(evaluate(batch, name), truth) for name in (backend, "reference")])
    ours, dense = torch.tensor(errors).square().mean(0).sqrt()
    assert (ours <= 3 * dense).all(), f"errors of the loss and its gradient: {ours}, of the dense formula: {dense}"


def difference(result, truth):
    return float((result.loss - truth.loss).abs()), float((result.d_z_i - truth.d_z_i).norm() / truth.d_z_i.norm())


@pytest.mark.parametrize("n", [HALF - 1, HALF + 1])
@pytest.mark.parametrize("layout", ["interleaved", "transposed", "every other feature", "expanded"])
def test_nt_xent_strided_views_equal_contiguous(backend, layout, n):
    z_i, z_j, *_ = random_batch(n, 24, 0.2)
    if layout == "interleaved":
        z_i, z_j = split_views(torch.stack((z_i, z_j), dim=1))
    elif layout == "transposed":
        z_i, z_j = z_i.T.contiguous().T, z_j.T.contiguous().T
    elif layout == "every other feature":
        z_i, z_j = z_i[:, ::2], z_j[:, 1::2]
    else:
        z_i, z_j = z_i[:1].expand(n, -1), z_j
    strided = Batch(z_i, z_j, 0.2)
    assert not strided.z_i.is_contiguous()
    contiguous = strided.map(torch.Tensor.contiguous)
    for value, expected in zip(evaluate(strided, backend), evaluate(contiguous, backend), strict=True):
        assert torch.equal(value, expected)


def test_nt_xent_duplicate_rows_within_budget(backend):
    z_i, z_j, *_ = random_batch(40, 16, 0.1)
    z_i[1:7] = z_i[0]
    z_j[5:11] = z_i[0] * 2
    assert_within_budget(Batch(z_i, z_j, 0.1), backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nt_xent_zero_rows_within_budget(backend, dtype):
    z_i, z_j, *_ = random_batch(40, 16, 0.5, dtype=dtype)
    z_i[3] = 0
    z_j[3] = 0
    z_j[8] = 0
    batch = Batch(z_i, z_j, 0.5)
    loss, truth = error_budget.true_loss_and_gradient(z_i, z_j, 0.5)
    results = [evaluate(batch, name) for name in (backend, "reference")]
    value, same = (torch.cat((r.d_z_i, r.d_z_j)) for r in results)
    # A zero row's gradient is d_u / eps, 1e4 to 1e12 times larger than other gradients. So zero rows are judged
    # separately.
    zero = torch.zeros(80, dtype=torch.bool).index_fill(0, torch.tensor([3, 43, 48]), True)
    for rows in (zero, ~zero):
        limit = error_budget.allowed(error_budget.errors_of(same[rows], truth[rows]), dtype, 2.0, output_dtype=dtype)
        assert error_budget.errors_of(value[rows], truth[rows]).within(limit)
    assert float(results[0].loss) == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1e-13, 1e-11, 1e-9])
def test_nt_xent_rows_around_eps_within_budget(backend, length, dtype):
    z_i, z_j, *_ = random_batch(20, 16, 0.5, dtype=dtype)
    # All rows of one view are short. A row shorter than eps is divided by eps, so its gradient keeps its radial part.
    batch = Batch(torch.nn.functional.normalize(z_i, dim=1) * length, z_j, 0.5)
    assert_within_budget(batch, backend)


@pytest.mark.parametrize("n", [64, HALF + 1])
@pytest.mark.parametrize("seed", range(3))
def test_nt_xent_huge_logits_are_no_worse_than_the_reference(backend, n, seed):
    # Logits of 1e5 are rounded to 1e-2. The errors cancel only if forward and backward round them alike.
    batch = random_batch(n, 16, 0.1, seed=seed).map(lambda z: z * 30)._replace(normalize=False)
    truth = evaluate(batch.map(torch.Tensor.double), "reference")
    value, same = (torch.cat((r.d_z_i, r.d_z_j)) for r in (evaluate(batch, backend), evaluate(batch, "reference")))
    true = torch.cat((truth.d_z_i, truth.d_z_j))
    assert error_budget.errors_of(value, true).rms < 4 * error_budget.errors_of(same, true).rms + 1e-6


@pytest.mark.parametrize("n", [1, 5])
def test_nt_xent_of_a_single_feature_has_a_gradient_near_zero(backend, n):
    # With one feature, every unit row is 1 or -1, and no small step changes it.
    batch = random_batch(n, 1, 0.5)
    result, truth = evaluate(batch, backend), evaluate(batch.map(torch.Tensor.double), "reference")
    torch.testing.assert_close(result.loss.double(), truth.loss, rtol=1e-6, atol=0)
    for gradient in (result.d_z_i, result.d_z_j):
        assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [0.001, 0.1, 5.0])
@pytest.mark.parametrize("groups", ["unique", "one", "few", "sorted", "negative"])
@pytest.mark.parametrize("M", [1, 2, TILE - 1, TILE + 1])
def test_neg_lse_any_groups_within_budget(backend, M, groups, temperature):
    assert_neg_lse_within_budget(backend, M, groups, temperature)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_neg_lse_half_precision_rows_within_budget(backend, dtype):
    value = assert_neg_lse_within_budget(backend, 50, "sorted", 0.1, dtype=dtype)
    assert value[0].dtype == torch.float32
    assert value[1].dtype == dtype


@pytest.mark.parametrize("temperature", [0.001, 0.1])
@pytest.mark.parametrize("groups", [1, 3, 10**6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("M", [1, 50, TILE + 1])
def test_neg_lse_sum_is_the_weighted_sum_of_neg_lse(backend, M, dtype, groups, temperature):
    generator = torch.Generator().manual_seed(2)
    u = torch.nn.functional.normalize(torch.randn(M, 16, generator=generator), dim=1).to(dtype).requires_grad_()
    ids = torch.randint(0, groups, (M,), generator=generator)
    k = torch.tensor(1 / temperature, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    weights = torch.rand(M, generator=generator, dtype=k.dtype)
    batch = open_batch(None, "neg_lse_sum", {"u": u}, ids=ids, backend=backend)
    nu = batch.neg_lse(u, ids, k)
    expected = (torch.where(nu == -math.inf, 0, nu) * weights).sum()
    value = batch.weighted_neg_lse(u, ids, k, weights)
    with torch.no_grad():
        torch.testing.assert_close(batch.weighted_neg_lse(u, ids, k, weights), value)
    tolerance = {"rtol": 1e-12 if dtype == torch.float64 else 1e-5, "atol": 1e-12 if dtype == torch.float64 else 1e-5}
    torch.testing.assert_close(value, expected, **tolerance)
    for v, e in zip(torch.autograd.grad(2 * value, (u, k)), torch.autograd.grad(2 * expected, (u, k)), strict=True):
        scale = float(e.abs().max()) or 1.0
        rounding = torch.finfo(v.dtype).eps if v.dtype == torch.float16 else 0
        torch.testing.assert_close(v / scale, e / scale, rtol=0, atol=4 * max(tolerance["atol"], rounding))


@pytest.mark.parametrize("temperature", [0.001, 0.1, 5.0])
@pytest.mark.parametrize("groups", ["samples", "unique", "one", "few", "negative"])
@pytest.mark.parametrize(("M", "K"), [(1, 1), (1, 30), (30, 1), (23, 49), (TILE + 1, 100), (100, TILE - 1)])
def test_cross_neg_lse_any_groups_within_budget(backend, M, K, groups, temperature):
    assert_cross_neg_lse_within_budget(backend, M, K, groups, temperature)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_cross_neg_lse_dtypes_and_strides_within_budget(backend, dtype):
    u, v = torch.randn(31, 40, dtype=torch.float64), torch.randn(24, 52, dtype=torch.float64).T
    batch = (0.3 * u[:, ::2]).to(dtype), (0.3 * v[:, 4:]).to(dtype), torch.arange(31) % 5, torch.arange(52) % 7
    weights = torch.linspace(-1, 1, 31), torch.linspace(1, 2, 52)
    value, same, truth = (
        cross_result(batch, 0.2, weights, *each)
        for each in ((backend, dtype), ("reference", dtype), ("reference", torch.float64))
    )
    logit_size = float((batch[0].double() @ batch[1].double().T).abs().max()) / 0.2
    assert_arrays_within_budget(value, same, truth, dtype, logit_size)


@pytest.mark.parametrize("needs", ["u", "v", "temperature"])
def test_cross_neg_lse_computes_a_single_requested_gradient(backend, needs):
    ids = torch.arange(20), torch.arange(30)

    def gradient(name):
        torch.manual_seed(0)
        tensors = {"u": torch.randn(20, 8), "v": torch.randn(30, 8), "temperature": torch.tensor(0.7)}
        tensors = {key: tensor.double() for key, tensor in tensors.items()}
        tensors[needs].requires_grad_()
        nus = cross_neg_lse(tensors["u"], tensors["v"], *ids, tensors["temperature"], backend=name)
        return torch.autograd.grad(nus.rows.sum() + 2 * nus.cols.sum(), tensors[needs])

    torch.testing.assert_close(gradient(backend), gradient("reference"))


def test_cross_neg_lse_of_one_side_against_itself_equals_neg_lse(backend):
    u = F.normalize(torch.randn(70, 12), dim=1)
    ids = torch.arange(70) // 2
    nus = cross_neg_lse(u, u, ids, ids, 0.1, backend=backend)
    for nu in nus:
        torch.testing.assert_close(nu, neg_lse(u, ids, 0.1, backend=backend))


def test_neg_lse_row_without_negatives_is_minus_infinity_with_zero_gradient(backend):
    u = torch.randn(3, 4, requires_grad=True)
    nu = neg_lse(u, torch.zeros(3, dtype=torch.long), 0.5, backend=backend)
    assert (nu == -math.inf).all()
    (gradient,) = torch.autograd.grad(nu, u, torch.ones(3))
    assert torch.equal(gradient, torch.zeros(3, 4))


def test_a_nan_row_does_not_hide_that_other_rows_overflow(backend):
    # The exponentials of the longest row's logits overflow. The NaN must not hide this, wherever it is in the batch.
    u, ids = torch.tensor([[300.0, 0.0], [torch.nan, 0.0], [2.0, 1.0], [1.0, 1.0]]), torch.tensor([0, 0, 1, 2])
    expected = torch.tensor([600.0, torch.nan, torch.nan, torch.nan])
    for order in map(list, itertools.permutations(range(4))):
        nu = neg_lse(u[order], ids[order], 1.0, backend=backend)
        torch.testing.assert_close(nu, expected[order], equal_nan=True)


@pytest.mark.parametrize("temperature", [0.001, 0.5])
def test_neg_lse_of_rows_without_negatives_can_be_masked_out(backend, temperature):
    # The masked rows get an upstream gradient of 0 * inf = NaN, which must not reach the gradient with respect to u.
    u = torch.nn.functional.normalize(torch.randn(4, 3), dim=1).requires_grad_()
    ids = torch.zeros(4, dtype=torch.long)
    nu = neg_lse(u, ids, temperature, backend=backend)
    (gradient,) = torch.autograd.grad(torch.where(nu.isinf(), 0, nu.square()).sum(), u)
    assert torch.equal(gradient, torch.zeros(4, 3))


@needs_cuda
@pytest.mark.parametrize("backend", CUDA_KERNELS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("temperature", [0.01, 0.5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nt_xent_on_cuda_within_budget(backend, dtype, temperature, reduction):
    upstream = torch.linspace(-1, 1, 600, dtype=torch.float64, device="cuda") if reduction == "none" else None
    batch = random_batch(300, 32, temperature, dtype=dtype).map(torch.Tensor.cuda)
    assert_within_budget(batch, backend, upstream=upstream, reduction=reduction)


@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_nt_xent_terms_gradients_within_budget(backend, temperature):
    batch = random_batch(33, 16, temperature)

    def gradients(name, dtype, term):
        z_i, z_j = (z.to(dtype, copy=True).requires_grad_() for z in (batch.z_i, batch.z_j))
        tau = torch.tensor(temperature, dtype=dtype, requires_grad=True)
        terms = nt_xent_terms(z_i, z_j, tau, backend=name)
        return torch.autograd.grad(getattr(terms, term), (z_i, z_j, tau), allow_unused=True, materialize_grads=True)

    for term in ("alignment", "distribution", "loss"):
        value = gradients(backend, torch.float32, term)
        same = gradients("reference", torch.float32, term)
        truth = gradients("reference", torch.float64, term)
        for v, s, t in zip(value, same, truth, strict=True):
            scale = 1 / temperature**2 if t.ndim == 0 else 0.0
            limit = error_budget.allowed(error_budget.errors_of(s, t, scale=scale), torch.float32, 1 / temperature)
            assert error_budget.errors_of(v, t, scale=scale).within(limit), term


@pytest.mark.parametrize("name", BACKENDS)
def test_nt_xent_same_bits_every_time(name):
    batch = random_batch(HALF + 1, 32, 0.1)
    first, second = evaluate(batch, name), evaluate(batch, name)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_blocked_block_size_does_not_change_the_result(monkeypatch):
    batch = random_batch(50, 16, 0.1, dtype=torch.float64)
    whole = evaluate(batch, "blocked")
    monkeypatch.setattr(tiling, "BLOCK_CPU", 7)
    for a, b in zip(evaluate(batch, "blocked"), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_blocked_running_maximum_equals_direct_exponentials(monkeypatch, temperature):
    batch = random_batch(50, 16, temperature, dtype=torch.float64)
    ones = torch.ones(100)
    direct = evaluate(batch, "blocked", reduction="none", upstream=ones)
    monkeypatch.setattr(tiling, "BLOCK_CPU", 16)
    monkeypatch.setattr(blocked, "_stays_in_range", lambda *_: False)
    for a, b in zip(evaluate(batch, "blocked", reduction="none", upstream=ones), direct, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def blocks_of(*rows):
    return [tiling.Blocks(Side(u, torch.arange(len(u)))) for u in rows]


def test_blocked_computes_exponentials_directly_only_in_range():
    unit = torch.nn.functional.normalize(torch.randn(100, 8), dim=1)
    in_range = {
        (1.0, 50.0): True,
        (1.0, 60.0): False,
        (3.0, 10.0): False,
        (torch.nan, 10.0): False,
    }
    for (length, inv_tau), expected in in_range.items():
        assert blocked._stays_in_range(blocks_of(unit * length), inv_tau) == expected
        assert blocked._stays_in_range(blocks_of(unit, unit * length**2), inv_tau) == expected
        assert blocked._stays_in_range(blocks_of(unit * length**2, unit), inv_tau) == expected


def test_blocked_tiles_cover_each_pair_once(monkeypatch):
    monkeypatch.setattr(tiling, "BLOCK_CPU", 4)
    for M in (1, 3, 4, 5, 8, 13):
        seen = torch.zeros(M, M, dtype=torch.long)
        tiles = blocked._DirectTiles(blocks_of(torch.randn(M, 3)), torch.tensor(1.0))
        for tile, _ in tiles.logits():
            seen[tile.rows, tile.cols] += 1
            if not tile.diagonal:
                seen[tile.cols, tile.rows] += 1
        assert (seen == 1).all()
        for K in (1, 4, 9):
            seen = torch.zeros(M, K, dtype=torch.long)
            tiles = blocked._DirectTiles(blocks_of(torch.randn(M, 3), torch.randn(K, 3)), torch.tensor(1.0))
            for tile, _ in tiles.logits():
                assert not tile.diagonal
                seen[tile.rows, tile.cols] += 1
            assert (seen == 1).all()
