"""The CUDA kernels compared with the oracle. If backend "cuda" is unavailable, the same sources run on an emulated
device."""

import importlib
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import binary
from fastntxent import backends, cross_neg_lse, error_budget, neg_lse, nt_xent
from fastntxent.backends import select
from tests import tensor_cores
from tests.cases import (
    Batch,
    assert_cross_neg_lse_within_budget,
    assert_gradient_within_rounding,
    assert_neg_lse_within_budget,
    assert_towers_within_budget,
    assert_within_budget,
    converged_batch,
    drift,
    evaluate,
    needs_cuda,
    random_batch,
    start_of_training,
)
from tests.emulated import COMPILER, GEFORCE, H100, emulated_kernels
from tests.tiers import every_case, tiered

STATUS = backends()["cuda"]
DEVICE = "cuda" if STATUS.available else "cpu"
pytestmark = pytest.mark.skipif(
    not STATUS.available and COMPILER is None, reason="needs a CUDA device, or Linux and a C++ compiler to emulate one"
)
needs_emulator = pytest.mark.skipif(
    STATUS.available, reason="needs the emulated device: on a GPU, the configuration is fixed"
)

package = importlib.import_module("fastntxent.backends")
calls = importlib.import_module("fastntxent.backends.cuda.calls")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def emulate(monkeypatch):
    """If backend "cuda" is unavailable, emulate it and return a function that changes the device; else return None."""
    if STATUS.available:
        return None
    kernels = emulated_kernels()
    backend = calls.CudaBackend(kernels, "cpu")
    load = package._load
    monkeypatch.setattr(package, "_load", lambda name: backend if name == "cuda" else load(name))

    def device(multiprocessors, shared=H100, *, seed=1, chip=None):
        kernels.emulate(multiprocessors, shared, seed, *tensor_cores.CHIPS[chip or tensor_cores.chosen])
        backend.workspace.cache_clear()

    device(3)
    return device


@pytest.mark.slow
@pytest.mark.skipif(binary.built() is None, reason="needs the CUDA kernels built")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the cuobjdump that Triton ships for Linux")
def test_kernels_spill_nowhere_and_run_on_the_matrix_units():
    reports = binary.built_kernels(binary.built())
    found = {(report.chip, report.operands) for report in reports}
    for chip in ("sm_80", "sm_90"):
        assert found >= {(chip, kind) for kind in ("half", "bfloat", "split")}
    for report in reports:  # a forward and a gradient, each a loop over tiles around a loop over steps
        (forward, _), (gradient, step) = report.tiles()
        assert not forward.flops
        assert gradient.flops == 3 * step.flops
    assert not [(report, report.faults()) for report in reports if report.faults()]


def on_device(batch: Batch) -> Batch:
    return batch.map(lambda z: z.to(DEVICE))


def upstream(n: int, scale: float = 1.0) -> torch.Tensor:
    return torch.linspace(-scale, scale, 2 * n, dtype=torch.float64, device=DEVICE)


@pytest.mark.skipif(os.environ.get("CI") != "true", reason="needs CI=true, where the kernels must have been built")
def test_kernels_were_built():
    assert ".abi3." in importlib.import_module("fastntxent._cuda").__file__


@every_case(size=[(1, 1), (2, 3), (33, 16), (40, 130), (20, 300)], temperature=[0.001, 0.1, 10.0], dtype=DTYPES)
def test_nt_xent_within_budget(size, temperature, dtype):
    n, d = size
    batch = on_device(random_batch(n, d, temperature, dtype=dtype))
    if d > 1:  # with one feature, every unit row is 1 or -1, and the gradient is pure rounding error
        assert_within_budget(batch, "cuda")
    else:
        result, truth = evaluate(batch, "cuda"), evaluate(batch.map(torch.Tensor.double), "reference")
        torch.testing.assert_close(result.loss.double(), truth.loss, rtol=1e-5, atol=1e-6)


@needs_emulator
@every_case(size=[(70, 64), (66, 200), (40, 520)], multiprocessors=[1, 5], shared=[H100, GEFORCE], dtype=DTYPES)
def test_every_cut_within_budget(emulate, size, multiprocessors, shared, dtype):
    n, d = size
    # Covers rows that fit in shared memory or not, gradient tasks for different numbers of feature chunks, and columns
    # divided into shares or not.
    emulate(multiprocessors, shared)
    assert_within_budget(random_batch(n, d, 0.005 if n == 66 else 0.1, dtype=dtype), "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["grid=1", "grid=3"])
def test_forced_grids_within_budget(emulate, form, dtype):
    if emulate:
        emulate(5)
    backend: Any = select("cuda", DEVICE, dtype)
    assert form in backend.forms(torch.device(DEVICE), dtype)
    with backend.forced(form):
        assert_within_budget(on_device(random_batch(97, 200, 0.1, dtype=dtype)), "cuda")
    assert backend.blocks == 0
    one, all_blocks = (backend.workspace(0, calls.DTYPES[dtype], 194, 0, 200, blocks) for blocks in (1, 0))
    assert one < all_blocks  # a single block does not divide the columns into shares


@needs_emulator
@pytest.mark.parametrize("multiprocessors", [1, 4])
def test_bits_do_not_depend_on_the_order_of_events(emulate, multiprocessors):
    # The seed decides the order of the warps, and when each asynchronous copy happens. A missing barrier or wait would
    # change the bits. With an odd seed the device accepts the whole grid, with an even seed only half of it.
    for dtype in DTYPES:
        batch = random_batch(70, 150, 0.1, dtype=dtype)
        results = []
        for seed in range(4):
            emulate(multiprocessors, seed=seed)
            results.append(evaluate(batch, "cuda"))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("temperature", [0.005, 0.1])
@pytest.mark.parametrize("n", [15, 16, 17, 31, 32, 33, 63, 64, 65, 97])
def test_nt_xent_at_tile_edges_within_budget(n, temperature):
    batch = on_device(random_batch(n, 20, temperature))
    assert_within_budget(batch, "cuda")
    assert_within_budget(batch, "cuda", reduction="none", upstream=upstream(n))


@pytest.mark.parametrize("n", tiered([128, 200, 300], slow=lambda n: n == 200))
@pytest.mark.parametrize("dtype", DTYPES)
def test_larger_batches_within_budget(n, dtype):
    assert_within_budget(on_device(random_batch(n, 128, 0.1, dtype=dtype)), "cuda")


@pytest.mark.parametrize("temperature", [0.02, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nt_xent_of_unnormalised_rows_within_budget(dtype, temperature):
    # Only the device knows the lengths of the rows, and so whether exp leaves its range.
    batch = random_batch(40, 24, temperature, dtype=dtype).map(lambda z: z / 8)._replace(normalize=False)
    assert_within_budget(on_device(batch), "cuda", reduction="none", upstream=upstream(40))
    assert_within_budget(on_device(batch), "cuda")


@pytest.mark.parametrize("seed", range(3))
def test_nt_xent_huge_logits_are_no_worse_than_the_reference(seed):
    # Logits of 1e5 are rounded to 1e-2. The errors cancel only if forward and backward round them alike.
    batch = on_device(random_batch(64, 16, 0.1, seed=seed).map(lambda z: z * 30)._replace(normalize=False))
    truth = evaluate(batch.map(torch.Tensor.double), "reference")
    value, same = (torch.cat((r.d_z_i, r.d_z_j)) for r in (evaluate(batch, "cuda"), evaluate(batch, "reference")))
    true = torch.cat((truth.d_z_i, truth.d_z_j))
    assert error_budget.errors_of(value, true).rms < 4 * error_budget.errors_of(same, true).rms + 1e-6


@pytest.mark.parametrize("scale", [1e-30, 65536.0, 1e30])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_nt_xent_upstream_of_any_magnitude_within_budget(temperature, scale):
    batch = on_device(random_batch(33, 40, temperature))
    assert_within_budget(batch, "cuda", reduction="none", upstream=upstream(33, scale))


@pytest.mark.parametrize("length", [1e-13, 1e-9, 1e-30, 1e30])
def test_nt_xent_normalises_rows_of_extreme_norms_within_budget(length):
    z_i, z_j, *_ = random_batch(20, 16, 0.5)
    assert_within_budget(on_device(Batch(F.normalize(z_i, dim=1) * length, z_j, 0.5)), "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_nt_xent_zero_rows_within_budget(dtype):
    z_i, z_j, *_ = on_device(random_batch(40, 16, 0.5, dtype=dtype))
    z_i[3] = 0
    z_j[3] = 0
    z_j[8] = 0
    batch = Batch(z_i, z_j, 0.5)
    _, truth = error_budget.true_loss_and_gradient(z_i, z_j, 0.5)
    value, same = (torch.cat((r.d_z_i, r.d_z_j)) for r in (evaluate(batch, "cuda"), evaluate(batch, "reference")))
    zero = torch.zeros(80, dtype=torch.bool).index_fill(0, torch.tensor([3, 43, 48]), True).to(DEVICE)
    for rows in (zero, ~zero):
        limit = error_budget.allowed(error_budget.errors_of(same[rows], truth[rows]), dtype, 2.0, output_dtype=dtype)
        assert error_budget.errors_of(value[rows], truth[rows]).within(limit)


@pytest.fixture(params=["device"] if STATUS.available else tensor_cores.FAMILIES)
def each_chip(request, emulate):
    """Round like the tensor cores of each emulated chip, or run on the real device."""
    if emulate:
        emulate(3, chip=request.param)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("loss", [None, 0.7, 1e-3, 1e-6])
def test_gradient_is_accurate_at_every_stage_of_training(each_chip, loss, temperature):
    shape = 64, 128, temperature
    batch = start_of_training(*shape) if loss is None else converged_batch(*shape, loss)
    assert_gradient_within_rounding(on_device(batch), "cuda")


def test_gradient_over_many_columns_does_not_drift(each_chip):
    assert drift("cuda", DEVICE) < 5e-6


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 1e-4), (torch.bfloat16, 8e-4)])
@pytest.mark.parametrize("loss", [None, 0.7, 1e-3, 1e-6])
def test_half_precision_gradient_is_accurate_before_it_is_rounded(loss, dtype, limit):
    # Each element of G is rounded to 8 or 11 bits. Independent errors average out in the sum over a row's negatives.
    batch = start_of_training(64, 128, 0.1) if loss is None else converged_batch(64, 128, 0.1, loss)
    batch = on_device(batch.map(lambda z: z.to(dtype)))
    kernels: Any = select("cuda", DEVICE, dtype)
    _, *gradients, _ = kernels.nt_xent_scalar(batch.z_i, batch.z_j, 10.0, batch.normalize, True)
    truth = evaluate(batch.map(torch.Tensor.double), "reference")
    true = torch.cat((truth.d_z_i, truth.d_z_j))
    assert float((torch.cat(gradients).double() - true).norm() / true.norm()) < limit


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
    for value, expected in zip(evaluate(strided, "cuda"), evaluate(contiguous, "cuda"), strict=True):
        assert torch.equal(value, expected)


@every_case(
    size=[(1, 40), (70, 1), (33, 100), (200, 150)],
    groups=["samples", "unique", "one", "few", "negative"],
    temperature=[0.005, 0.2],
)
def test_neg_lse_of_any_groups_within_budget(size, groups, temperature):
    M, K = size
    assert_neg_lse_within_budget("cuda", M, groups, temperature, device=DEVICE)
    assert_cross_neg_lse_within_budget("cuda", M, K, groups, temperature, device=DEVICE)


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

    torch.testing.assert_close(gradient("cuda"), gradient("reference"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("both", [False, True], ids=["info_nce", "clip"])
@pytest.mark.parametrize("temperature", [0.005, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(33, 40)])
def test_towers_within_budget(n, d, dtype, temperature, both):
    batch = on_device(random_batch(n, d, temperature, dtype=dtype))
    for needs in ((True, True), (True, False), (False, True)):
        assert_towers_within_budget(batch, "cuda", both=both, needs=needs)


@pytest.mark.parametrize("temperature", [0.001, 0.5])
def test_neg_lse_of_rows_without_negatives_can_be_masked_out(temperature):
    u = F.normalize(torch.randn(4, 3, device=DEVICE), dim=1).requires_grad_()
    nu = neg_lse(u, torch.zeros(4, dtype=torch.long, device=DEVICE), temperature, backend="cuda")
    (gradient,) = torch.autograd.grad(torch.where(nu.isinf(), 0, nu.square()).sum(), u)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [24, 300])
def test_same_bits_every_time(d, dtype):
    batch = on_device(random_batch(70, d, 0.1, dtype=dtype))
    for a, b in zip(evaluate(batch, "cuda"), evaluate(batch, "cuda"), strict=True):
        assert torch.equal(a, b)


def test_nan_reaches_the_loss_and_every_row_that_sees_it():
    z_i, z_j, *_ = on_device(random_batch(40, 16, 0.1))
    z_i[3, 5] = torch.nan
    for temperature in (0.005, 0.1):
        assert nt_xent(z_i, z_j, temperature, backend="cuda").isnan()
        assert nt_xent(z_i, z_j, temperature, reduction="none", backend="cuda").isnan().all()


def test_value_without_gradient_equals_value_with_gradient():
    z_i, z_j, *_ = on_device(random_batch(40, 16, 0.1))
    alone = nt_xent(z_i, z_j, 0.1, backend="cuda")
    assert torch.equal(alone, nt_xent(z_i.requires_grad_(), z_j, 0.1, backend="cuda").detach())


def test_float64_and_other_devices_are_rejected():
    z = torch.randn(4, 3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(TypeError, match=r"backend 'cuda' supports torch.float16, .*, got torch.float64"):
        nt_xent(z, z, backend="cuda")
    with pytest.raises(ValueError, match=f"backend 'cuda' supports {DEVICE}"):
        select("cuda", "xpu", torch.float32)


def test_auto_does_not_choose_unverified_kernels():
    assert type(select("auto", "cuda", torch.float32)).__name__ == "BlockedBackend"


def test_an_invalid_kernel_call_raises_an_error_that_describes_it(emulate):
    backend: Any = select("cuda", DEVICE, torch.float32)
    side = ((0, 4, 3, 1), (0, 0, 0, 0), 0, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="fastntxent's CUDA kernel: fntx_cuda_run: a matrix"):
        backend.kernels.run(1, 2, True, 3, 2.0, 0, 1e-12, side, None, 0, 0, 0, 1.0, 0, 256, 0, 0, 0)


@needs_emulator
def test_a_device_with_too_little_shared_memory_raises_an_error_that_says_so(emulate):
    emulate(1, 48 * 1024)
    with pytest.raises(RuntimeError, match="fntx_cuda_workspace: the device has too little shared memory for a block"):
        nt_xent(*random_batch(4, 3, 0.1)[:2], 0.1, backend="cuda")


@needs_cuda
def test_a_temperature_on_the_device_is_not_read_by_the_host():
    z_i, z_j, *_ = random_batch(40, 16, 0.1).map(torch.Tensor.cuda)
    temperature = torch.tensor(0.1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = nt_xent(z_i, z_j, temperature, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(loss, nt_xent(z_i, z_j, 0.1, backend="cuda"))


@needs_cuda
def test_a_cuda_graph_captures_loss_and_gradient():
    z = torch.randn(2, 64, 32, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.autograd.grad(nt_xent(*z, 0.1, backend="cuda"), z)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = nt_xent(*z, 0.1, backend="cuda")
        (gradient,) = torch.autograd.grad(loss, z)
    for _ in range(3):
        z.data.normal_()
        graph.replay()
        expected = nt_xent(*z, 0.1, backend="cuda")
        assert torch.equal(loss, expected)
        assert torch.equal(gradient, *torch.autograd.grad(expected, z))


def test_status_without_a_device_says_what_the_backend_needs():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    code = "import fastntxent; print(fastntxent.backends()['cuda'].reason)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no CUDA device is available" in done.stdout or "the CUDA kernels were not built" in done.stdout
