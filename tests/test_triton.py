"""The Triton kernels compared with the oracle: on a GPU if there is one, else at small sizes in the interpreter."""

import importlib
import inspect
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastntxent import backends, cross_neg_lse, error_budget, neg_lse, nt_logistic, nt_xent, ops, siglip
from fastntxent.backends import select
from fastntxent.backends.base import Upstream
from fastntxent.sides import Side
from tests import tensor_cores, test_false_negatives, test_losses
from tests.cases import (
    Batch,
    assert_arrays_within_budget,
    assert_cross_neg_lse_within_budget,
    assert_gradient_within_rounding,
    assert_neg_lse_within_budget,
    assert_sigmoid_within_budget,
    assert_softplus_within_budget,
    assert_towers_within_budget,
    assert_within_budget,
    assert_within_rounding,
    converged_batch,
    cross_result,
    drift,
    evaluate,
    random_batch,
    sigmoid_result,
    softplus_result,
    start_of_training,
)
from tests.interpreter import pad_rows
from tests.tiers import every_case, every_pair, tiered

STATUS = backends()["triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(not STATUS.available, reason=f"needs Triton: {STATUS.reason}"),
    # NumPy warns about logarithms of empty sums, and about exponentials in the regime that is not used.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

if STATUS.available:
    backward = importlib.import_module("fastntxent.backends.triton.backward")
    config = importlib.import_module("fastntxent.backends.triton.config")
    launch = importlib.import_module("fastntxent.backends.triton.launch")
    pack = importlib.import_module("fastntxent.backends.triton.pack")
    tiles = importlib.import_module("fastntxent.backends.triton.tiles")
    LOOK_UP = config.look_up

    import triton
    import triton.language as tl

    @triton.jit
    def store_similarities(
        x_ptr, lo_ptr, out_ptr, DP: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr, SAME: tl.constexpr
    ):
        s = tiles.similarities(x_ptr, lo_ptr, x_ptr, lo_ptr, 0, 0, DP, SPLIT, False, UPCAST, 128, 128, 64, SAME)
        at = tl.arange(0, 128)
        tl.store(out_ptr + at[:, None] * 128 + at[None, :], s)

    PADDED_ROWS = pack.PADDED_ROWS

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def short_padding(monkeypatch):
    if DEVICE == "cpu" and STATUS.available:
        pad_rows(monkeypatch, 128)


@pytest.fixture(autouse=True)
def no_launches_recorded_with_other_tables(monkeypatch):
    monkeypatch.setattr(launch, "_recordings", {})


@pytest.fixture(autouse=True)
def tensor_cores_that_round(monkeypatch):
    if DEVICE == "cpu":
        tensor_cores.interpret(monkeypatch, tensor_cores.chosen)


def on_device(batch: Batch) -> Batch:
    return batch.map(lambda z: z.to(DEVICE))


def upstream(n: int, scale: float = 1.0) -> torch.Tensor:
    return torch.linspace(-scale, scale, 2 * n, dtype=torch.float64, device=DEVICE)


@every_pair(size=[(1, 1), (2, 3), (33, 16), (40, 130), (20, 300)], temperature=[0.001, 0.1, 10.0], dtype=DTYPES)
def test_nt_xent_within_budget(size, temperature, dtype):
    n, d = size
    if d > 1:  # in one dimension every unit row is 1 or -1, and the gradient is pure rounding
        assert_within_budget(on_device(random_batch(n, d, temperature, dtype=dtype)), "triton")
    else:
        batch = on_device(random_batch(n, d, temperature, dtype=dtype))
        result, truth = evaluate(batch, "triton"), evaluate(batch.map(torch.Tensor.double), "reference")
        torch.testing.assert_close(result.loss.double(), truth.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.005, 0.1])
@pytest.mark.parametrize("n", tiered([15, 16, 17, 31, 32, 33, 63, 65, 80], slow=lambda n: n in (31, 32, 33, 63, 80)))
def test_nt_xent_at_tile_edges_within_budget(n, temperature):
    batch = on_device(random_batch(n, 20, temperature))
    assert_within_budget(batch, "triton")
    assert_within_budget(batch, "triton", reduction="none", upstream=upstream(n))


@pytest.mark.parametrize("temperature", [0.02, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nt_xent_of_unnormalised_rows_within_budget(dtype, temperature):
    # Only the device knows the rows' lengths, so the kernels of both regimes are launched. The kernels of the wrong
    # regime return at once.
    batch = random_batch(40, 24, temperature, dtype=dtype).map(lambda z: z / 8)._replace(normalize=False)
    assert_within_budget(on_device(batch), "triton", reduction="none", upstream=upstream(40))


@pytest.mark.parametrize("scale", [1e-30, 65536.0, 1e30])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_nt_xent_upstream_of_any_magnitude_within_budget(temperature, scale):
    batch = on_device(random_batch(33, 40, temperature))
    assert_within_budget(batch, "triton", reduction="none", upstream=upstream(33, scale))


@pytest.mark.parametrize("length", [1e-13, 1e-9, 1e-30, 1e30])
def test_nt_xent_normalises_rows_of_extreme_norms_within_budget(length):
    z_i, z_j, *_ = random_batch(20, 16, 0.5)
    assert_within_budget(on_device(Batch(F.normalize(z_i, dim=1) * length, z_j, 0.5)), "triton")


@pytest.fixture(params=["device"] if DEVICE == "cuda" else tensor_cores.FAMILIES)
def each_chip(request, monkeypatch):
    """Use one chip's tiles and rounding. Return a function that switches to the chip's tiles for a given number of
    rows."""
    if DEVICE == "cuda":
        return lambda rows: None
    tensor_cores.interpret(monkeypatch, request.param)
    as_if(monkeypatch, tensor_cores.FAMILIES[request.param], 1)
    return lambda rows: as_if(monkeypatch, tensor_cores.FAMILIES[request.param], rows)


@every_pair(slow_pairs=True, loss=[None, 0.7, 1e-3, 1e-6], temperature=[0.01, 0.1, 0.5])
def test_gradient_is_accurate_at_every_stage_of_training(each_chip, loss, temperature):
    shape = 64, 128, temperature
    batch = start_of_training(*shape) if loss is None else converged_batch(*shape, loss)
    assert_gradient_within_rounding(on_device(batch), "triton")


@pytest.mark.parametrize("d", [64, 256])
def test_gradient_is_accurate_with_the_tiles_of_a_large_batch(each_chip, d):
    each_chip(math.inf)
    assert_gradient_within_rounding(on_device(converged_batch(64, d, 0.01, 0.7)), "triton")


@pytest.fixture
def one_multiprocessor(monkeypatch):
    """Make one program walk over all columns."""
    monkeypatch.setattr(config, "multiprocessors", lambda device: 1)


@pytest.mark.slow
def test_gradient_over_many_columns_does_not_drift(each_chip, one_multiprocessor):
    each_chip(math.inf)
    assert drift("triton", DEVICE) < 5e-6


@pytest.fixture
def sums_in_tensor_cores(monkeypatch):
    """Let the tensor cores add float32 products to the accumulator that they are given."""
    import triton.language as tl

    def add_product(acc, a, a_lo, b, b_lo, *modes):
        return tl.dot(a, b, tl.dot(a, b_lo, tl.dot(a_lo, b, acc)))

    monkeypatch.setattr(tiles, "add_product", add_product)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="needs the interpreter: compiled code cannot be patched")
def test_gradient_limits_reject_sums_in_tensor_cores(sums_in_tensor_cores, each_chip, one_multiprocessor):
    with pytest.raises(AssertionError, match="allowed"):
        assert_gradient_within_rounding(converged_batch(64, 128, 0.01, 1e-3), "triton")
    each_chip(math.inf)
    assert drift("triton") > 2e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["interleaved", "transposed", "every other feature", "expanded"])
def test_strided_views_equal_contiguous(layout, dtype):
    z_i, z_j, *_ = on_device(random_batch(20, 24, 0.2, dtype=dtype))
    if layout == "interleaved":
        z_i, z_j = torch.stack((z_i, z_j), dim=1).unbind(1)
    elif layout == "transposed":
        z_i, z_j = z_i.T.contiguous().T, z_j.T.contiguous().T
    elif layout == "every other feature":
        z_i, z_j = z_i[:, ::2], z_j[:, 1::2]
    else:
        z_i, z_j = z_i[:1].expand(20, -1), z_j
    strided = Batch(z_i, z_j, 0.2)
    contiguous = strided.map(torch.Tensor.contiguous)
    for value, expected in zip(evaluate(strided, "triton"), evaluate(contiguous, "triton"), strict=True):
        assert torch.equal(value, expected)


@every_pair(
    slow_pairs=True,
    size=[(1, 40), (70, 1), (33, 100)],
    groups=["samples", "unique", "one", "few", "negative"],
    temperature=[0.005, 0.2],
)
def test_neg_lse_of_any_groups_within_budget(size, groups, temperature):
    M, K = size
    assert_neg_lse_within_budget("triton", M, groups, temperature, device=DEVICE)
    assert_cross_neg_lse_within_budget("triton", M, K, groups, temperature, device=DEVICE)


@pytest.mark.parametrize("needs", ["u", "v", "temperature"])
def test_cross_neg_lse_computes_a_single_requested_gradient(needs):
    ids = torch.arange(20, device=DEVICE), torch.arange(30, device=DEVICE)

    def gradient(name):
        torch.manual_seed(0)
        tensors = {"u": torch.randn(20, 8), "v": torch.randn(30, 8), "temperature": torch.tensor(0.7)}
        tensors = {key: tensor.to(DEVICE) for key, tensor in tensors.items()}
        tensors[needs].requires_grad_()
        nus = cross_neg_lse(tensors["u"], tensors["v"], *ids, tensors["temperature"], backend=name)
        return torch.autograd.grad(nus.rows.sum() + 2 * nus.cols.sum(), tensors[needs])

    torch.testing.assert_close(gradient("triton"), gradient("reference"), rtol=1e-4, atol=1e-4)


@every_case(dtype=DTYPES, temperature=[0.005, 0.1], both=[False, True], size=[(33, 40)])
def test_towers_within_budget(size, dtype, temperature, both):
    n, d = size
    batch = on_device(random_batch(n, d, temperature, dtype=dtype))
    for needs in ((True, True), (True, False), (False, True)):
        assert_towers_within_budget(batch, "triton", both=both, needs=needs)


@every_pair(
    slow_pairs=True,
    size=[(1, 1), (1, None), (2, None), (33, 100), (70, 1), (70, None)],
    groups=["samples", "unique", "one", "few", "negative"],
    bias=[-10.0, 3.0],
    dtype=DTYPES,
    d=[16, 40],
)
def test_softplus_of_any_groups_within_budget(size, groups, bias, dtype, d):
    for positives in (False, True) if size[1] else (False,):
        options = {"bias": bias, "dtype": dtype, "d": d, "positives": positives, "device": DEVICE}
        assert_softplus_within_budget("triton", *size, groups, **options)


@pytest.mark.parametrize("n", tiered([15, 16, 17, 31, 32, 33, 63, 65, 80], slow=lambda n: n in (31, 32, 33, 63, 80)))
def test_softplus_at_tile_edges_within_budget(n):
    for size in ((n, None), (n, 32), (32, n)):
        assert_softplus_within_budget("triton", *size, "samples", positives=size[1] is not None, device=DEVICE)


@every_pair(
    slow_pairs=True,
    size=[(1, 1), (2, 3), (33, 16), (40, 130), (20, 300)],
    numbers=[(0.1, -10.0), (0.01, -20.0), (10.0, 0.0)],
    dtype=DTYPES,
    two_views=[True, False],
)
def test_sigmoid_losses_within_budget(size, numbers, dtype, two_views):
    temperature, bias = numbers
    n, d = size
    batch = on_device(random_batch(n, d, temperature, dtype=dtype))
    if d == 1:  # in one dimension every unit row is 1 or -1, and the gradient is pure rounding
        batch = batch._replace(normalize=False)
    for needs in ((True, True),) if two_views else ((True, True), (True, False), (False, True), (False, False)):
        assert_sigmoid_within_budget(batch, "triton", two_views=two_views, bias=bias, needs=needs)


@pytest.mark.parametrize("two_views", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid_losses_of_unnormalised_rows_within_budget(dtype, two_views):
    batch = random_batch(40, 24, 0.3, dtype=dtype).map(lambda z: z / 8)._replace(normalize=False)
    assert_sigmoid_within_budget(on_device(batch), "triton", two_views=two_views, bias=-3.0)


def converged_views() -> torch.Tensor:
    """Return two views of samples with orthogonal directions; the views nearly agree."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0][:60]
    return F.normalize(centres + 0.02 * torch.randn(2, 60, 64, generator=generator), dim=2)


@pytest.mark.parametrize("two_views", [True, False])
def test_sigmoid_losses_keep_their_accuracy_when_converged(each_chip, two_views):
    loss = nt_logistic if two_views else siglip

    def result(views, backend):
        z = views.to(DEVICE, copy=True).requires_grad_()
        value = loss(z[0], z[1], 0.0275, bias=-18.0, normalize=False, backend=backend)
        return value.detach(), torch.autograd.grad(value, z)[0]

    for rows in (1, math.inf):
        each_chip(rows)
        value, gradient = result(converged_views(), "triton")
        true_value, true_gradient = result(converged_views().double(), "reference")
        assert 1e-8 < float(true_value) < 1e-5
        assert_within_rounding(value, true_value, 1 / 0.0275)
        assert_within_rounding(gradient, true_gradient, 1 / 0.0275)


def test_float16_gradients_do_not_underflow_when_converged():
    # Every derivative with respect to a logit is below 1e-8. In units of the largest weight, float16 would lose all
    # digits.
    z = converged_views().to(DEVICE, torch.float16)

    def gradient(dtype, backend):
        views = z.to(dtype, copy=True).requires_grad_()
        loss = siglip(views[0], views[1], 0.02, bias=-24.0, normalize=False, backend=backend)
        return torch.autograd.grad(loss * 2.0**24, views)[0]

    true = gradient(torch.float64, "reference")
    assert error_budget.errors_of(gradient(torch.float16, "triton"), true).rms < 2e-3


@every_pair(slow_pairs=True, scale=[1e-30, 1e30], dtype=DTYPES)
def test_softplus_gradient_scales_with_an_upstream_of_any_magnitude(scale, dtype):
    u, v = (F.normalize(torch.randn(n, 24), dim=1).to(DEVICE, dtype) for n in (33, 40))
    batch, weights = (u, v, torch.arange(33, device=DEVICE), torch.arange(40, device=DEVICE)), torch.ones(33)

    def gradients(scale):
        sums = lambda *given: ops.softplus_sums(*given, positives=True, backend="triton")  # noqa: E731
        return softplus_result(batch, (5.0, -2.0), scale * weights.to(DEVICE), sums, dtype)[3:]

    for found, expected in zip(gradients(scale), gradients(1.0), strict=True):
        torch.testing.assert_close(found / scale, expected, rtol=1e-5, atol=0)


def limited_result(batch, dtype, backend, **limits):
    z_i, z_j = (z.to(dtype, copy=True).requires_grad_() for z in (batch.z_i, batch.z_j))
    tau = torch.tensor(batch.temperature, dtype=torch.float64, requires_grad=True)
    losses = nt_xent(z_i, z_j, tau, normalize=batch.normalize, backend=backend, **limits)
    weighted = (losses * torch.linspace(-1, 2, len(losses)).to(losses)).sum() if losses.ndim else losses
    return losses.detach(), *torch.autograd.grad(weighted, (z_i, z_j, tau))


def ceiling_between(batch: Batch, share: float) -> float:
    """Return a ceiling above this share of the similarities, in a gap that is wider than the rounding errors."""
    u = F.normalize(torch.cat((batch.z_i, batch.z_j)).double(), dim=1)
    ordered = (u @ u.T).flatten().sort().values
    first = int(len(ordered) * share)
    gap = first + int(ordered[first : first + 400].diff().argmax())
    return float(ordered[gap : gap + 2].mean())


@every_pair(
    slow_pairs=True,
    size=[(2, 3), (33, 16), (40, 130), (70, 260)],
    temperature=[0.005, 0.1, 10.0],
    dtype=DTYPES,
    reduction=["mean", "none"],
)
def test_limits_within_budget(size, temperature, dtype, reduction):
    n, d = size
    batch = on_device(random_batch(n, d, temperature, dtype=dtype))
    options = {"ceiling": ceiling_between(batch, 0.6) if n > 2 else 0.9, "reduction": reduction}
    value = limited_result(batch, dtype, "triton", **options)
    same, truth = (limited_result(batch, each, "reference", **options) for each in (dtype, torch.float64))
    scales = [0.0, 0.0, 0.0, 3 * len(same[0].flatten()) / temperature**2]
    assert_arrays_within_budget(value, same, truth, dtype, 1 / temperature, scales)


@pytest.mark.parametrize("loss", tiered([0.7, 1e-3, 1e-6], slow=lambda loss: loss > 1e-6))
def test_limits_keep_the_accuracy_of_a_converged_gradient(each_chip, loss):
    batch = on_device(converged_batch(64, 128, 0.02, loss))
    options = {"ceiling": ceiling_between(batch, 0.9)}
    for rows in (1, math.inf):
        each_chip(rows)
        value = limited_result(batch, torch.float32, "triton", **options)
        truth = limited_result(batch, torch.float64, "reference", **options)
        for v, t in zip(value[1:3], truth[1:3], strict=True):
            assert_within_rounding(v, t, 1 / 0.02)


@pytest.mark.parametrize("dtype", tiered(DTYPES, slow=lambda dtype: dtype != torch.float32))
@pytest.mark.parametrize(
    ("d", "rows"),
    [
        (8, 1),
        (40, 1),
        *(pytest.param(*large, marks=pytest.mark.slow) for large in ((300, 1), (128, math.inf), (300, math.inf))),
    ],
)
def test_limits_leave_out_the_same_pairs_in_forward_and_backward(each_chip, d, rows, dtype):
    # All pairs of directions form the same angle, but rows round differently, so rounding decides which pairs exceed
    # the limit. If the backward makes the same choice, the probabilities of each row sum to 1.
    each_chip(rows)
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.eye(8, d, dtype=torch.float64) + 0.3 * torch.ones(1, d), dim=1)
    cosine = float(directions[0] @ directions[1])
    ids = torch.randint(0, 8, (150,), generator=generator)
    noise = 1 + 2.0 ** (-8 if dtype == torch.bfloat16 else -11) * torch.randn(150, d, generator=generator)
    u = (directions[ids] if dtype == torch.float32 else directions[ids] * noise).to(DEVICE, dtype)
    u = u if dtype != torch.float32 else F.normalize(u * torch.rand(150, 1, generator=generator).to(DEVICE), dim=1)
    ids, limits = ids.to(DEVICE), torch.full((150,), cosine, device=DEVICE)
    kernels: Any = select("triton", DEVICE, dtype)
    for rows_of, cols_of in ((slice(None), None), (slice(0, 70), slice(70, None))):
        one, other = (None if at is None else Side(u[at], ids[at], limits[at]) for at in (rows_of, cols_of))
        sides = [(one, one)] if other is None else [(one, other), (other, one)]
        nus = [nu for nu in kernels.limited_neg_lse(one, other, 1.0) if nu is not None]
        expected, pairs = 0.0, 0
        for side, against in sides:
            s = side.u.double() @ against.u.double().T
            apart = side.ids[:, None] != against.ids
            logits = s.masked_fill(~apart | (s > side.limits[:, None]), -math.inf)
            nu = nus[len(nus) - 1 if side is other else 0]
            of_rows = (logits.softmax(dim=1).nan_to_num() * s).sum(dim=1)
            # Rounding also decides whether a row keeps any negative. If it keeps some in the kernel but none in
            # float64, their similarities equal the limit up to rounding.
            of_rows = torch.where(logits.isfinite().any(dim=1), of_rows, cosine)
            expected += float(of_rows[nu > -math.inf].sum())
            pairs += int(apart.sum())
        counted = float(torch.cat(nus).exp().sum()) / math.exp(cosine)
        assert 0 < counted < 0.99 * pairs, "rounding should leave some pairs out and keep others"
        if dtype == torch.float32:  # all similarities are equal, and rounding decides which rows keep a negative
            expected = sum(int((nu > -math.inf).sum()) for nu in nus) * cosine
        upstreams = [Upstream(torch.ones_like(nu), nu) for nu in nus]
        *_, d_k = kernels.limited_neg_lse_backward(one, other, 1.0, upstreams[0], upstreams[-1])
        assert float(d_k) == pytest.approx(
            expected, abs=2e-3
        )  # a pair that counts only in the forward or only in the backward changes the sum by more


@pytest.mark.parametrize("same", [True, False])
def test_similarities_have_the_same_bits_with_rows_and_columns_exchanged(each_chip, same):
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).to(DEVICE) / 4
    high = x.half()
    low, found = (x - high.float()).half(), torch.empty(128, 128, device=DEVICE)
    split = config.products_at_once(config.chip(found.device))
    store_similarities[(1,)](high, low, found, 128, split, tiles.INTERPRETED, same, **tiles.NO_CONTRACTION)
    torch.testing.assert_close(found, x @ x.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(found, found.T) == same


@pytest.mark.skipif(DEVICE == "cuda", reason="needs Triton's interpreter: these tests use tensors in host memory")
def test_limits_behave_as_on_every_backend(maxima_that_drop_nan):
    test_false_negatives.test_negatives_exactly_at_the_limit_are_kept("triton")
    test_false_negatives.test_copies_of_the_positive_are_kept_with_a_margin_of_zero("triton", 128)
    for temperature in (1.0, 0.005):
        test_false_negatives.test_rows_that_lose_all_negatives_have_no_loss_and_no_gradient("triton", temperature)
        test_false_negatives.test_nan_similarities_are_kept("triton", temperature)
    for temperature, length in ((1e6, 1.0), (0.5, 1e-4), (500.0, 1.0)):
        test_false_negatives.test_limits_stay_precise_when_logits_are_small("triton", temperature, length)


@pytest.mark.parametrize("d", [24, 300])
def test_nt_xent_at_high_matmul_precision_is_as_accurate_as_tf32(d):
    batch = on_device(random_batch(40, d, 0.2))
    truth = evaluate(batch.map(torch.Tensor.double), "reference")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        value = evaluate(batch, "triton")
    finally:
        torch.set_float32_matmul_precision(before)
    for v, t in zip(value, truth, strict=True):
        assert error_budget.errors_of(v, t).rms < 2e-3


@pytest.mark.parametrize("dtype", tiered(DTYPES, slow=lambda dtype: dtype == torch.bfloat16))
@pytest.mark.parametrize("d", tiered([24, 300], slow=lambda d: d == 300))
def test_same_bits_every_time(d, dtype):
    batch = on_device(random_batch(70, d, 0.1, dtype=dtype))
    for a, b in zip(evaluate(batch, "triton"), evaluate(batch, "triton"), strict=True):
        assert torch.equal(a, b)
    options = batch, -3.0, False, (True, True), lambda *given: ops.sigmoid_scalar(*given, "triton"), dtype
    for a, b in zip(sigmoid_result(*options), sigmoid_result(*options), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("tiles", "M", "dtype", "d", "rows_held"),
    [
        (1, 151, torch.bfloat16, 16, 2),
        pytest.param(1, 129, torch.float32, 130, 1, marks=pytest.mark.slow),
        pytest.param(2, 261, torch.float16, 40, 1, marks=pytest.mark.slow),
        (3, 200, torch.float32, 16, 2),
        pytest.param(8, 100, torch.bfloat16, 130, 1, marks=pytest.mark.slow),
        (8, 127, torch.float16, 16, 2),
    ],
)
def test_sums_over_squares_of_tiles_equal_the_reference(monkeypatch, tiles, M, dtype, d, rows_held):
    # Covers squares without a mask, squares with the diagonal or a positive, and squares that end inside a tile.
    if DEVICE == "cpu":
        monkeypatch.setattr(config, "rows_held", lambda chip: rows_held)
    generator = torch.Generator().manual_seed(0)
    u, v = (F.normalize(torch.randn(n, d, generator=generator), dim=1).to(DEVICE, dtype) for n in (M, M // 2))
    unique, samples = torch.arange(M, device=DEVICE), torch.arange(M, device=DEVICE) % (M // 2)

    def sums(backend, dtype):
        x, y = u.to(dtype), v.to(dtype)
        yield from (neg_lse(x, ids, 0.1, backend=backend) for ids in (unique, samples))
        yield from cross_neg_lse(x, y, unique, unique[M // 2 : M // 2 * 2], 0.1, backend=backend)

    with config.forced(f"rows=100000 tiles={tiles}"):
        found = list(sums("triton", dtype))
    for value, expected in zip(found, sums("reference", torch.float64), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.skipif(DEVICE == "cuda", reason="needs the interpreter, where the mask is a Python function")
@pytest.mark.parametrize("multiprocessors", [1, 4])
def test_ids_are_compared_only_in_tiles_that_may_share_an_id(monkeypatch, multiprocessors):
    compared, apart = set(), tiles.apart

    def recorded(rows_ids_ptr, cols_ids_ptr, row, col, *rest):
        compared.add((row.handle.data.item(), col.handle.data.item()))
        return apart(rows_ids_ptr, cols_ids_ptr, row, col, *rest)

    monkeypatch.setattr(backward, "apart", recorded)
    monkeypatch.setattr(config, "multiprocessors", lambda device: multiprocessors)
    assert_within_budget(random_batch(96, 16, 0.1), "triton")  # six tiles of 32 rows
    starts = range(0, 192, 32)
    assert compared == {(row, col) for row in starts for col in starts if row % 96 == col % 96}
    compared.clear()
    assert_within_budget(random_batch(80, 16, 0.1), "triton")  # five tiles; the third has rows of both views
    starts = range(0, 160, 32)
    own = {(row, col) for row in starts for col in starts if {*_ids(row)} & {*_ids(col)}}
    assert own <= compared
    assert len(compared) < 25


def _ids(row: int) -> list[int]:
    return [i % 80 for i in range(row, row + 32)]


@pytest.fixture
def small_panels(monkeypatch):
    """Use panels with small squares of G: 64 rows in the interpreter, and 256 (the minimum) on a GPU, whose tiles are
    larger. The interpreter is slow, so it uses panels for rows with fewer features than the table requires."""
    monkeypatch.setattr(config, "PANEL", 1)
    if DEVICE == "cpu":
        monkeypatch.setattr(config, "PADDED_ROWS", 64)

        def look_up(family, kernel, width, n, DP):
            return None if kernel in ("fused", "pairs") else LOOK_UP(family, kernel, width, n, DP)

        monkeypatch.setattr(config, "look_up", look_up)


# Enough pairs for two squares on the diagonal and part of a third, and enough features for two blocks of `gather`.
PAIRS, FEATURES = (33, 130) if DEVICE == "cpu" else (260, 260)


@every_pair(slow_pairs=True, temperature=[0.01, 0.1], dtype=DTYPES)
def test_panels_of_several_squares_within_budget(small_panels, dtype, temperature):
    assert_within_budget(on_device(random_batch(2 * PAIRS, FEATURES, temperature, dtype=dtype)), "triton")


@pytest.mark.parametrize("dtype", DTYPES)
def test_panels_of_unnormalised_rows_within_budget(small_panels, dtype):
    batch = random_batch(PAIRS, FEATURES, 0.3, dtype=dtype).map(lambda z: z / 32)._replace(normalize=False)
    assert_within_budget(on_device(batch), "triton", reduction="none", upstream=upstream(PAIRS))


@pytest.mark.parametrize(("M", "K"), [(4 * PAIRS, 3 * PAIRS), (20, 5 * PAIRS)])
def test_panels_of_two_sides_within_budget(small_panels, M, K):
    assert_cross_neg_lse_within_budget("triton", M, K, "few", 0.2, d=FEATURES, device=DEVICE)


@pytest.mark.parametrize("dtype", tiered(DTYPES, slow=lambda dtype: dtype != torch.float32))
def test_panels_of_sigmoid_losses_within_budget(small_panels, dtype):
    options = {"dtype": dtype, "d": FEATURES, "device": DEVICE}
    assert_softplus_within_budget("triton", 4 * PAIRS, None, "few", **options)
    assert_softplus_within_budget("triton", 4 * PAIRS, 3 * PAIRS, "samples", positives=True, **options)
    batch = on_device(random_batch(PAIRS, FEATURES, 0.1, dtype=dtype))
    for two_views in (True, False):
        assert_sigmoid_within_budget(batch, "triton", two_views=two_views, bias=-10.0)


def as_if(monkeypatch, family: str, rows: float) -> None:
    """Use the tiles of this chip family, for a batch of this many rows."""
    pad_rows(monkeypatch, PADDED_ROWS)
    monkeypatch.setattr(config, "family", lambda device: family)
    monkeypatch.setattr(config, "look_up", lambda name, kernel, width, n, DP: LOOK_UP(name, kernel, width, rows, DP))


def tiles_used(family: str, dtype: torch.dtype, d: int, rows: float) -> set[tuple]:
    """Return the tile of each kernel that a batch of this kind launches, and whether the tile holds all features."""
    DP, width = pack.padded_features(d), 4 if dtype == torch.float32 else 2
    tiles = {kernel: config.look_up(family, kernel, width, rows, DP) for kernel in config.KERNELS}
    unused = ("form", "gather") if tiles["fused"] else ()
    return {
        (kernel, width, tile[:3], tile.block_d == DP)
        for kernel, tile in tiles.items()
        if tile is not None and kernel not in unused
    }


def batches_of_every_tile() -> list[tuple]:
    """Return a small set of batches that uses every tile of the table (a greedy cover)."""
    families, dtypes = ["sm_80", "sm_90", "sm_100", "small", "gfx942"], [torch.bfloat16, torch.float32]
    every = {
        case: tiles_used(*case) for case in itertools.product(families, dtypes, [16, 128, 256, 300], [1, math.inf])
    }
    left, chosen = set().union(*every.values()), []
    while left:
        chosen.append(max(every, key=lambda case: len(every[case] & left)))
        left -= every[chosen[-1]]
    return chosen


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="needs the interpreter: a GPU takes only its own tiles")
@pytest.mark.parametrize(("family", "dtype", "d", "rows"), batches_of_every_tile())
def test_every_tile_of_the_table_within_budget(monkeypatch, family, dtype, d, rows):
    as_if(monkeypatch, family, rows)
    for temperature in (0.005, 0.1) if rows > 1 else (0.1,):
        assert_within_budget(random_batch(70, d, temperature, dtype=dtype), "triton")


@pytest.mark.parametrize("multiprocessors", tiered([1, 3, 64], slow=lambda count: count == 64))
def test_columns_in_parts_within_budget(monkeypatch, multiprocessors):
    monkeypatch.setattr(config, "multiprocessors", lambda device: multiprocessors)
    assert_within_budget(on_device(random_batch(70, 16, 0.1)), "triton")
    assert_within_budget(on_device(random_batch(70, 16, 0.005)), "triton", reduction="none", upstream=upstream(70))
    for K in (None, 90):
        assert_softplus_within_budget("triton", 70, K, "samples", positives=K is not None, device=DEVICE)


@pytest.fixture
def poisoned(monkeypatch):
    """Fill new floating-point memory with NaN, and new int64 memory with an integer that is no valid index."""

    def poison(allocate):
        def allocated(*args, **kwargs):
            fresh = allocate(*args, **kwargs)
            if fresh.is_floating_point() or fresh.dtype == torch.int64:
                fresh.fill_(torch.nan if fresh.is_floating_point() else -(2**40))
            return fresh

        return allocated

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "case",
    tiered(
        [(1, 40, 0.1), (35, 24, 0.005), (35, 24, 0.1), (40, 300, 0.1)],
        slow=lambda case: case not in ((1, 40, 0.1), (35, 24, 0.005)),
    ),
)
def test_uninitialised_memory_is_not_used(poisoned, monkeypatch, case, dtype):
    n, d, temperature = case
    monkeypatch.setattr(config, "PANEL", 1)
    monkeypatch.setattr(config, "look_up", uneven(config.look_up))
    batch = on_device(random_batch(n, d, temperature, dtype=dtype))
    assert_within_budget(batch, "triton")
    assert_within_budget(batch, "triton", reduction="none", upstream=upstream(n))
    assert_cross_neg_lse_within_budget("triton", n, n // 2 + 1, "samples", temperature, d=d, device=DEVICE)
    assert_softplus_within_budget("triton", n, n // 2 + 1, "samples", dtype=dtype, d=d, positives=True, device=DEVICE)
    for two_views in (True, False):
        assert_sigmoid_within_budget(batch, "triton", two_views=two_views, bias=-3.0)


EDGE = 256 if DEVICE == "cpu" else 512  # rows of a square; the padded rows of both views end inside the second square


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "M", "K"), [(11 * EDGE // 16, 5 * EDGE // 8, EDGE // 16), (EDGE // 2 + 2, EDGE // 16, 5 * EDGE // 8)]
)
def test_partial_squares_of_a_panel_use_no_uninitialised_memory(poisoned, monkeypatch, n, M, K):
    monkeypatch.setattr(config, "edge_of_panel", lambda *_: EDGE)
    assert_within_budget(on_device(random_batch(n, 257, 0.2)), "triton")
    assert_cross_neg_lse_within_budget("triton", M, K, "few", 0.2, d=257, device=DEVICE)


def uneven(look_up):
    """Return a `look_up` whose tiles are never square, and have different heights for `form` and `gather`."""
    sizes = {"form": (32, 64), "gather": (128, 32), "direct": (32, 64), "owned": (64, 32), "fused": (64, 32)}
    sizes |= {variant: sizes[kernel] for kernel, variant in config.VARIANTS.items()}

    def chosen(family, kernel, width, n, DP):
        tile = look_up(family, kernel, width, n, DP)
        return tile and tile._replace(block_m=sizes[kernel][0], block_n=sizes[kernel][1])

    return chosen


@pytest.mark.parametrize("temperature", tiered([0.005, 0.0168, 0.1], slow=lambda temperature: temperature == 0.0168))
@pytest.mark.parametrize("normalize", [True, False])
def test_losses_within_budget_if_only_the_device_knows_the_temperature(monkeypatch, normalize, temperature):
    contract = importlib.import_module("fastntxent.ops.contract")
    unread = lambda inv_tau, dtype: torch.as_tensor(inv_tau, dtype=dtype, device=DEVICE)  # noqa: E731
    monkeypatch.setattr(contract, "_inverse_temperature", unread)
    batch = random_batch(40, 24, temperature)._replace(normalize=normalize)
    if not normalize:
        batch = batch.map(lambda z: F.normalize(z, dim=1))
    assert_within_budget(on_device(batch), "triton")
    assert_within_budget(on_device(batch), "triton", reduction="none", upstream=upstream(40))
    if temperature == 0.1:
        for two_views in (True, False):
            assert_sigmoid_within_budget(on_device(batch), "triton", two_views=two_views, bias=-3.0)


@pytest.mark.parametrize("ratio", [2.0**10, 2.0**14])
def test_one_much_longer_row_leaves_the_other_gradients_accurate(ratio):
    generator = torch.Generator().manual_seed(0)
    u, v = (F.normalize(torch.randn(n, 16, generator=generator), dim=1).to(DEVICE) for n in (20, 40))
    v[7] *= ratio
    u_ids, v_ids = torch.zeros(20, dtype=torch.int64, device=DEVICE), torch.arange(40, device=DEVICE)
    v_ids[7] = 0  # the long row is not a negative of any row
    batch, weights = (u, v, u_ids, v_ids + (v_ids != 0)), (torch.ones(20, device=DEVICE), torch.ones(40, device=DEVICE))
    runs = ("triton", torch.float32), ("reference", torch.float64)
    value, truth = (cross_result(batch, 0.5, weights, *run)[2] for run in runs)
    # A column of G is multiplied by the length of its row of v, relative to the longest row. Beyond a ratio of 2^14,
    # the smaller float16 part of the largest elements of G loses one bit for each further factor of two. Smaller
    # elements begin to lose bits at smaller ratios.
    assert_within_rounding(value, truth, 1 / 0.5, times=max(1.0, ratio / 2**12))


@pytest.mark.parametrize(
    ("rows", "launches"),
    [
        (1, ["_pack_kernel", "_owned_kernel", "_scale_kernel", "_fused_kernel", "_unpack_kernel"]),
        (
            math.inf,
            ["_pack_kernel", "_direct_kernel", "_finish_kernel", "_scale_kernel", "_fused_kernel", "_unpack_kernel"],
        ),
    ],
    ids=["small batch", "large batch"],
)
def test_loss_and_gradient_take_only_the_expected_launches(monkeypatch, rows, launches):
    launched = []

    class Recorder:
        def __init__(self, name, kernel):
            self.name, self.arg_names = name, kernel.arg_names

        def __getitem__(self, grid):
            return lambda *_, **__: launched.append(self.name)

    for file in ("pack", "forward", "finish", "weights", "backward", "unpack"):
        module = importlib.import_module(f"fastntxent.backends.triton.{file}")
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(name, getattr(module, name)))
    as_if(monkeypatch, "sm_90", rows)

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operators.add(func.overloadpacket.__name__)
            return func(*args, **kwargs or {})

    operators: set[str] = set()
    kernels: Any = select("triton", DEVICE, torch.float32)
    z_i, z_j = torch.randn(2, 40, 16, device=DEVICE)
    with Operators():
        kernels.nt_xent_scalar(z_i, z_j, 10.0, True, True)
    assert launched == launches
    views = {"slice", "select", "unbind", "detach", "alias", "as_strided"}
    assert operators <= views | {"new_empty", "empty", "empty_like"}, operators


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("temperature_on", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(40, 16), (1500, 64), (600, 300)])
def test_a_cuda_graph_captures_loss_and_gradient(n, d, dtype, temperature_on):
    temperature = torch.tensor(0.1, device=temperature_on)
    held = [torch.randn(n, d, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2)]

    def step():
        loss = nt_xent(*held, temperature, backend="triton")
        return loss, *torch.autograd.grad(loss, held)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compile the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            for z in held:
                z.copy_(torch.randn(n, d))
        graph.replay()
        for value, expected in zip(captured, step(), strict=True):
            assert torch.equal(value, expected)


def kernels():
    """Return every kernel that is launched, by name."""
    modules = ("pack", "sides", "forward", "finish", "weights", "backward", "panels", "softplus", "unpack")
    found = [vars(importlib.import_module(f"fastntxent.backends.triton.{module}")) for module in modules]
    return {name: value for each in found for name, value in each.items() if name.endswith("_kernel")}


@pytest.mark.parametrize("name", kernels() if STATUS.available else [])
def test_kernel_parameters_are_in_the_conventional_order(name):
    parameters = inspect.signature(kernels()[name].fn).parameters
    numbers = (
        "inv_tau",
        "bias",
        "log_terms",
        "limit_scale",
        "limit_shift",
        "eps",
        "factor",
        "pos_factor",
        "share",
        "loss_factor",
    )

    def kind(parameter):
        if parameter.annotation is not parameter.empty:
            return "constant"
        if parameter.name.endswith("_ptr"):
            return "pointer"
        if parameter.name.startswith("stride_"):
            return "stride"
        return "number" if parameter.name in numbers else "size"

    kinds = [kind(parameter) for parameter in parameters.values()]
    assert kinds == sorted(kinds, key=["pointer", "size", "stride", "number", "constant"].index)


def test_unspecialised_sizes_are_parameters_of_a_kernel():
    # If a size were renamed only in the kernels, Triton would compile a kernel for each of its values.
    assert set(tiles.SIZES) <= {name for kernel in kernels().values() for name in kernel.arg_names}


@pytest.fixture
def maxima_that_drop_nan(monkeypatch):
    """Make the interpreter return the number as the maximum of a number and NaN, as devices do. Before Triton 3.9, the
    interpreter returned NaN."""
    if DEVICE == "cpu":
        interpreter = importlib.import_module("triton.runtime.interpreter")
        monkeypatch.setattr(
            interpreter.InterpreterBuilder, "create_maxnumf", lambda self, a, b: self.binary_op(a, b, np.fmax)
        )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.005, 0.1])
def test_nan_reaches_every_result_that_depends_on_it(maxima_that_drop_nan, temperature, normalize):
    z_i, z_j, *_ = random_batch(40, 16, 0.1)
    z_i[3, 5] = torch.nan
    batch = on_device(Batch(F.normalize(z_i, dim=1), F.normalize(z_j, dim=1), temperature, normalize))
    for options in ({}, {"reduction": "none", "upstream": upstream(40)}):
        with config.forced("rows=100000"):
            values = evaluate(batch, "triton", **options)
        for value, expected in zip(values, evaluate(batch, "reference", **options), strict=True):
            assert expected.isnan().all()
            assert value.isnan().all()


@pytest.mark.parametrize("d", tiered([16, 300], slow=lambda d: d == 300))
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_reaches_every_dependent_result_of_sigmoid_losses(maxima_that_drop_nan, dtype, d):
    z_i, z_j, *_ = random_batch(40, d, 0.1, dtype=dtype)
    z_i[3, 5] = torch.nan
    batch = on_device(Batch(z_i, z_j, 0.1))
    for two_views in (True, False):
        scalar = lambda *given: ops.sigmoid_scalar(*given, "triton")  # noqa: E731
        loss, d_i, d_j, *numbers = sigmoid_result(batch, -3.0, two_views, (True, True), scalar, dtype)
        assert all(x.isnan().all() for x in (loss, d_j, *numbers))
        assert d_i.isnan().any(dim=1).all() if two_views else d_i[3].isnan().all()


def test_float64_and_other_devices_are_rejected():
    z = torch.randn(4, 3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(TypeError, match=r"backend 'triton' supports torch.float16, .*, got torch.float64"):
        nt_xent(z, z, backend="triton")
    with pytest.raises(ValueError, match="backend 'triton' supports cuda"):
        select("triton", "xpu", torch.float32)


def test_auto_does_not_choose_unverified_kernels():
    assert type(select("auto", "cuda", torch.float32)).__name__ == "BlockedBackend"


def test_status_without_device_or_interpreter_says_what_the_backend_needs():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    code = "import fastntxent; print(fastntxent.backends()['triton'].reason)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "no CUDA device is available; with TRITON_INTERPRET=1" in done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the compilers that Triton ships for Linux")
@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_kernels_compile_within_the_chip_without_a_spill_and_on_its_matrix_units(target, tmp_path):
    # This needs a separate process, because this process runs Triton's interpreter. `make kernels-report` compiles
    # every case for every chip.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", "kernels", "--targets", target, "--quick", "--check"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("shared") >= 30


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the compilers that Triton ships for Linux")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_compiled_sums_of_float32_leave_the_matrix_units(target):
    # The sums of the half-precision gradient do stay in the matrix units. Their counts show that this test would detect
    # float32 sums that stay there.
    code = f"""
from benchmarks import kernels
from fastntxent.backends.triton import config
for dtype in ("fp32", "bf16"):
    tile = config.look_up("{target}", "fused", 4 if dtype == "fp32" else 2, 10_000, 128)
    report = kernels.compile_one("{target}", "fused", dtype, 128, "usual", tile, False)
    print(report.products, report.fresh, report.restored, *report.faults())
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=environment
    )
    assert done.returncode == 0, done.stderr
    split, half = ([int(number) for number in line.split()] for line in done.stdout.splitlines())
    assert split[0] <= 3 * split[1]
    assert split[2] > 0
    assert half[0] > half[1]
    assert half[2] == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the compilers that Triton ships for Linux")
def test_sums_of_packed_rows_have_one_order_whatever_the_strides():
    # A reduction adds in the order of its layout, which follows the strides. So every sum must have only two terms,
    # whose order does not matter.
    code = """
import triton
from benchmarks import kernels
compile, done = triton.compile, []
triton.compile = lambda *args, **options: done.append(compile(*args, **options)) or done[-1]
for variant in ("usual", "transposed"):
    kernels.compile_one("sm_90", "pack", "fp32", 128, variant)
    print(done[-1].asm["ttgir"], "=" * 80)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=environment
    )
    assert done.returncode == 0, done.stderr
    usual, transposed, _ = done.stdout.split("=" * 80)
    assert "order = [0, 1]" in transposed
    assert "order = [0, 1]" not in usual
    for ttgir in (usual, transposed):
        reductions = re.findall(
            r'"tt.reduce"\(%\S+\) <{axis = (\d).*?= arith\.(\w+) .*?}\) : \(tensor<([\dx]+)x', ttgir, re.DOTALL
        )
        sums = [shape.split("x")[int(axis)] for axis, operation, shape in reductions if operation == "addf"]
        assert sums
        assert set(sums) == {"2"}


@pytest.mark.skipif(DEVICE == "cuda", reason="needs Triton's interpreter: on a GPU, test_losses.py runs these cases")
@pytest.mark.parametrize("name", sorted(test_losses.CASES))
def test_family_equals_its_dense_formulas(name):
    case = test_losses.CASES[name]
    drawn = test_losses.draw(case, 6, 8, 0.3, 0).to(torch.float32)
    value = test_losses.results(lambda *args, **options: case.loss(*args, backend="triton", **options), drawn)
    for v, t in zip(value, test_losses.truth(case, drawn, "mean", True), strict=True):
        torch.testing.assert_close(v.double(), t, rtol=1e-4, atol=1e-5)
