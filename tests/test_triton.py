"""The Triton kernels against the oracle: on a GPU where there is one, else in Triton's interpreter at small sizes."""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastntxent import backends, budget, cross_neg_lse, nt_xent
from fastntxent.backends import select
from tests import test_losses
from tests.cases import (
    Batch,
    assert_cross_neg_lse_within_budget,
    assert_gradient_within_rounding,
    assert_neg_lse_within_budget,
    assert_within_budget,
    assert_within_rounding,
    converged_batch,
    cross_result,
    evaluate,
    random_batch,
    start_of_training,
)

STATUS = backends()["triton"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(not STATUS.available, reason=f"needs Triton: {STATUS.reason}"),
    # Logarithms of empty sums, and the exponentials of the regime that is not wanted.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

if STATUS.available:
    backward = importlib.import_module("fastntxent.backends.triton.backward")
    config = importlib.import_module("fastntxent.backends.triton.config")

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def on_device(batch: Batch) -> Batch:
    return batch.map(lambda z: z.to(DEVICE))


def upstream(n: int, scale: float = 1.0) -> torch.Tensor:
    return torch.linspace(-scale, scale, 2 * n, dtype=torch.float64, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.001, 0.1, 10.0])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 3), (33, 16), (40, 130), (20, 300)])
def test_nt_xent_within_budget(n, d, temperature, dtype):
    if d > 1:  # on the line every unit row is 1 or -1, and the gradient is nothing but rounding
        assert_within_budget(on_device(random_batch(n, d, temperature, dtype=dtype)), "triton")
    else:
        batch = on_device(random_batch(n, d, temperature, dtype=dtype))
        result, truth = evaluate(batch, "triton"), evaluate(batch.map(torch.Tensor.double), "reference")
        torch.testing.assert_close(result.loss.double(), truth.loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.005, 0.1])
@pytest.mark.parametrize("n", [15, 16, 17, 31, 32, 33, 63, 65, 80])
def test_nt_xent_at_tile_edges_within_budget(n, temperature):
    batch = on_device(random_batch(n, 20, temperature))
    assert_within_budget(batch, "triton")
    assert_within_budget(batch, "triton", reduction="none", upstream=upstream(n))


@pytest.mark.parametrize("temperature", [0.02, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nt_xent_of_rows_as_they_are_within_budget(dtype, temperature):
    # How long the rows are is known to the device alone: both regimes are launched, one of them returns.
    batch = random_batch(40, 24, temperature, dtype=dtype).map(lambda z: z / 8)._replace(normalize=False)
    assert_within_budget(on_device(batch), "triton", reduction="none", upstream=upstream(40))


@pytest.mark.parametrize("scale", [1e-30, 65536.0, 1e30])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
def test_nt_xent_upstream_of_any_magnitude_within_budget(temperature, scale):
    batch = on_device(random_batch(33, 40, temperature))
    assert_within_budget(batch, "triton", reduction="none", upstream=upstream(33, scale))


@pytest.mark.parametrize("length", [1e-13, 1e-9, 1e-30, 1e30])
def test_nt_xent_rows_of_any_length_within_budget(length):
    z_i, z_j, *_ = random_batch(20, 16, 0.5)
    assert_within_budget(on_device(Batch(F.normalize(z_i, dim=1) * length, z_j, 0.5)), "triton")


@pytest.mark.parametrize("temperature", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("loss", [None, 0.7, 1e-3, 1e-6])
def test_gradient_accuracy_at_every_stage_of_training(loss, temperature):
    shape = 64, 128, temperature
    batch = start_of_training(*shape) if loss is None else converged_batch(*shape, loss)
    assert_gradient_within_rounding(on_device(batch), "triton")


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


@pytest.mark.parametrize("temperature", [0.005, 0.2])
@pytest.mark.parametrize("groups", ["samples", "unique", "one", "few", "negative"])
@pytest.mark.parametrize(("M", "K"), [(1, 40), (70, 1), (33, 100)])
def test_neg_lse_of_any_groups_within_budget(groups, M, K, temperature):
    assert_neg_lse_within_budget("triton", M, groups, temperature, device=DEVICE)
    assert_cross_neg_lse_within_budget("triton", M, K, groups, temperature, device=DEVICE)


@pytest.mark.parametrize("needs", ["u", "v", "temperature"])
def test_cross_neg_lse_forms_the_gradients_that_are_wanted(needs):
    ids = torch.arange(20, device=DEVICE), torch.arange(30, device=DEVICE)

    def gradient(name):
        torch.manual_seed(0)
        tensors = {"u": torch.randn(20, 8), "v": torch.randn(30, 8), "temperature": torch.tensor(0.7)}
        tensors = {key: tensor.to(DEVICE) for key, tensor in tensors.items()}
        tensors[needs].requires_grad_()
        nus = cross_neg_lse(tensors["u"], tensors["v"], *ids, tensors["temperature"], backend=name)
        return torch.autograd.grad(nus.rows.sum() + 2 * nus.cols.sum(), tensors[needs])

    torch.testing.assert_close(gradient("triton"), gradient("reference"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("d", [24, 300])
def test_tf32_is_taken_where_pytorch_may(d):
    batch = on_device(random_batch(40, d, 0.2))
    truth = evaluate(batch.map(torch.Tensor.double), "reference")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        value = evaluate(batch, "triton")
    finally:
        torch.set_float32_matmul_precision(before)
    for v, t in zip(value, truth, strict=True):
        assert budget.measure(v, t).rms < 2e-3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [24, 300])
def test_same_bits_every_time(d, dtype):
    batch = on_device(random_batch(70, d, 0.1, dtype=dtype))
    for a, b in zip(evaluate(batch, "triton"), evaluate(batch, "triton"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tiles", [1, 2, 3, 8])
def test_squares_of_any_size_within_budget(monkeypatch, tiles):
    monkeypatch.setattr(config, "edge_of_square", lambda n_rows, n_cols, block: tiles * block)
    assert_within_budget(on_device(random_batch(150, 16, 0.1)), "triton")
    u, v = torch.randn(150, 8, device=DEVICE) / 3, torch.randn(70, 8, device=DEVICE) / 3
    ids = torch.arange(150, device=DEVICE), torch.arange(70, device=DEVICE)
    for nu, expected in zip(
        cross_neg_lse(u, v, *ids, 0.3, backend="triton"),
        cross_neg_lse(u, v, *ids, 0.3, backend="reference"),
        strict=True,
    ):
        torch.testing.assert_close(nu, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_panels_within_budget(monkeypatch, dtype):
    monkeypatch.setattr(backward, "WORKSPACE", 1)  # panels of the least height
    assert_within_budget(on_device(random_batch(100, 300, 0.1, dtype=dtype)), "triton")


def as_if(monkeypatch, family: str, rows: float) -> None:
    """Tiles are those of this device, for a batch of so many rows."""
    look_up = config.look_up
    monkeypatch.setattr(config, "family", lambda device: family)
    monkeypatch.setattr(config, "look_up", lambda name, kernel, width, n, DP: look_up(name, kernel, width, rows, DP))


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU takes its own tiles alone: needs the interpreter")
@pytest.mark.parametrize("rows", [1, math.inf], ids=["small batch", "large batch"])
@pytest.mark.parametrize("d", [16, 128, 256, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", ["sm_80", "sm_90", "sm_100", "small", "gfx942"])
def test_every_tile_of_the_table_within_budget(monkeypatch, family, dtype, d, rows):
    as_if(monkeypatch, family, rows)
    for temperature in (0.005, 0.1) if rows > 1 else (0.1,):
        assert_within_budget(random_batch(70, d, temperature, dtype=dtype), "triton")


@pytest.mark.parametrize("multiprocessors", [1, 3, 64])
def test_columns_in_parts_within_budget(monkeypatch, multiprocessors):
    monkeypatch.setattr(config, "multiprocessors", lambda device: multiprocessors)
    assert_within_budget(on_device(random_batch(70, 16, 0.1)), "triton")
    assert_within_budget(on_device(random_batch(70, 16, 0.005)), "triton", reduction="none", upstream=upstream(70))


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory holds NaN, or an integer that no index should be."""

    def poison(allocate):
        def allocated(*args, **kwargs):
            fresh = allocate(*args, **kwargs)
            return fresh.fill_(torch.nan if fresh.is_floating_point() else -(2**40))

        return allocated

    for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "d", "temperature"), [(1, 40, 0.1), (35, 24, 0.005), (35, 24, 0.1), (40, 300, 0.1)])
def test_memory_that_was_not_written_is_not_used(poisoned, monkeypatch, n, d, temperature, dtype):
    monkeypatch.setattr(backward, "WORKSPACE", 1)
    monkeypatch.setattr(config, "look_up", uneven(config.look_up))
    batch = on_device(random_batch(n, d, temperature, dtype=dtype))
    assert_within_budget(batch, "triton")
    assert_within_budget(batch, "triton", reduction="none", upstream=upstream(n))
    assert_cross_neg_lse_within_budget("triton", n, n // 2 + 1, "samples", temperature, d=d, device=DEVICE)


def uneven(look_up):
    """Tiles of other heights in `form` and in `gather`, of other widths than heights everywhere."""
    sizes = {"form": (32, 64), "gather": (128, 32), "direct": (32, 64), "owned": (64, 32), "fused": (64, 32)}

    def chosen(family, kernel, width, n, DP):
        tile = look_up(family, kernel, width, n, DP)
        return tile and tile._replace(block_m=sizes[kernel][0], block_n=sizes[kernel][1])

    return chosen


@pytest.mark.parametrize("temperature", [0.005, 0.0168, 0.1])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_temperature_that_the_host_must_not_read(monkeypatch, normalize, temperature):
    forward = importlib.import_module("fastntxent.backends.triton.forward")
    monkeypatch.setattr(forward, "on_device", lambda inv_tau: True)
    batch = random_batch(40, 24, temperature)._replace(normalize=normalize)
    if not normalize:
        batch = batch.map(lambda z: F.normalize(z, dim=1))
    assert_within_budget(on_device(batch), "triton")
    assert_within_budget(on_device(batch), "triton", reduction="none", upstream=upstream(40))


@pytest.mark.parametrize("ratio", [2.0**10, 2.0**14])
def test_one_row_much_longer_than_the_rest_leaves_their_gradients_accurate(ratio):
    generator = torch.Generator().manual_seed(0)
    u, v = (F.normalize(torch.randn(n, 16, generator=generator), dim=1).to(DEVICE) for n in (20, 40))
    v[7] *= ratio
    u_ids, v_ids = torch.zeros(20, dtype=torch.int64, device=DEVICE), torch.arange(40, device=DEVICE)
    v_ids[7] = 0  # the long one is nobody's negative
    batch, weights = (u, v, u_ids, v_ids + (v_ids != 0)), (torch.ones(20, device=DEVICE), torch.ones(40, device=DEVICE))
    runs = ("triton", torch.float32), ("reference", torch.float64)
    value, truth = (cross_result(batch, 0.5, weights, *run)[2] for run in runs)
    # G counts each row's length over the longest: its small float16 part loses a bit for each bit of ratio beyond 2^12.
    assert_within_rounding(value, truth, 1 / 0.5, times=max(1.0, ratio / 2**12))


@pytest.mark.parametrize(
    ("rows", "launches"),
    [
        (1, ["_pack_kernel", "_owned_kernel", "_fused_kernel", "unpack_kernel"]),
        (math.inf, ["_pack_kernel", "_direct_kernel", "_finish_kernel", "_fused_kernel", "unpack_kernel"]),
    ],
    ids=["small batch", "large batch"],
)
def test_loss_and_gradient_take_these_launches_and_no_operator_of_pytorch(monkeypatch, rows, launches):
    launched = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **__: launched.append(self.name)

    for module in ("pack", "forward", "backward"):
        module = importlib.import_module(f"fastntxent.backends.triton.{module}")
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(name))
    as_if(monkeypatch, "sm_90", rows)

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operators.add(func.overloadpacket.__name__)
            return func(*args, **kwargs or {})

    operators, inv_tau = set(), torch.tensor(10.0)
    z_i, z_j = torch.randn(2, 40, 16, device=DEVICE)
    with Operators():
        select("triton", DEVICE, torch.float32).nt_xent_scalar(z_i, z_j, inv_tau, True, True)
    assert launched == launches
    views = {"slice", "select", "unbind", "detach", "alias", "as_strided"}
    assert operators <= views | {"new_empty", "empty", "empty_like", "_local_scalar_dense"}, operators


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
        step()  # compiles
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


def test_nan_reaches_the_loss_and_every_row_that_sees_it():
    z_i, z_j, *_ = on_device(random_batch(40, 16, 0.1))
    z_i[3, 5] = torch.nan
    assert nt_xent(z_i, z_j, 0.1, backend="triton").isnan()
    assert nt_xent(z_i, z_j, 0.1, reduction="none", backend="triton").isnan().all()


def test_float64_and_other_devices_are_refused():
    z = torch.randn(4, 3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(TypeError, match=r"backend 'triton' takes torch.float16, .*, got torch.float64"):
        nt_xent(z, z, backend="triton")
    with pytest.raises(ValueError, match="backend 'triton' serves cuda"):
        select("triton", "xpu", torch.float32)


def test_auto_does_not_pick_what_no_device_has_verified():
    assert type(select("auto", "cuda", torch.float32)).__name__ == "BlockedBackend"


def test_without_a_device_or_the_interpreter_it_says_what_it_needs():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a CUDA device")
    code = "import fastntxent; print(fastntxent.backends()['triton'].reason)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "no CUDA device here; under TRITON_INTERPRET=1" in done.stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the compilers that Triton ships for Linux")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_kernels_compile_within_the_chip_without_a_spill_and_on_its_matrix_units(target, tmp_path):
    # In a process of its own: here triton interprets.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks", "kernels", "--targets", target, "--check"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("shared") >= 40


@pytest.mark.skipif(DEVICE == "cuda", reason="needs Triton's interpreter: a GPU has test_losses.py's cases on cuda")
@pytest.mark.parametrize("name", sorted(test_losses.CASES))
def test_family_equals_its_dense_formulas(name):
    case = test_losses.CASES[name]
    drawn = test_losses.draw(case, 6, 8, 0.3, 0).to(torch.float32)
    value = test_losses.results(lambda *args, **options: case.loss(*args, backend="triton", **options), drawn)
    for v, t in zip(value, test_losses.truth(case, drawn, "mean", True), strict=True):
        torch.testing.assert_close(v.double(), t, rtol=1e-4, atol=1e-5)
