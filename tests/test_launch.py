"""Recording and repeating the launches of a call, and preparing kernels for a graph capture."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastntxent
from fastntxent import ops
from fastntxent.backends import warming
from fastntxent.sides import Side
from fastntxent.verification import policy
from tests.interpreter import pad_rows

pytest.importorskip("triton")
launch = importlib.import_module("fastntxent.backends.triton.launch")
config = importlib.import_module("fastntxent.backends.triton.config")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WITHOUT_INTERPRETER = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def short_padding(monkeypatch):
    if DEVICE == "cpu":
        pad_rows(monkeypatch, 128)


@pytest.fixture
def recordings(monkeypatch):
    """Return an empty store of recordings, and record calls in the interpreter too."""
    kept: dict = {}
    monkeypatch.setattr(launch, "RECORDS", True)
    monkeypatch.setattr(launch, "_recordings", kept)
    return kept


def calls(n=12, d=5, dtype=torch.float32, seed=0):
    """Return, by name, a loss, the rows that get a gradient, and how many recordings its value and gradient make."""
    generator = torch.Generator().manual_seed(seed)
    z_i, z_j, v = (torch.randn(rows, d, generator=generator).to(DEVICE, dtype) for rows in (n, n, n + 5))
    tensors = [x.requires_grad_() for x in (z_i, z_j, v)]
    ids, v_ids = torch.arange(n, device=DEVICE) // 3, torch.arange(n + 5, device=DEVICE) // 4
    weights, bias = torch.linspace(-1, 2, n, device=DEVICE), torch.tensor(-2.0, device=DEVICE)
    return {
        "nt_xent_scalar": (lambda k: ops.nt_xent_scalar(z_i, z_j, k, True, True, "triton"), tensors[:2], 1),
        "nt_xent_scalar twice the same": (lambda k: ops.nt_xent_scalar(z_i, z_i, k, True, True, "triton"), [z_i], 1),
        "nt_xent_rows": (
            lambda k: (ops.nt_xent_rows(z_i, z_j, k, False, "triton")[0] * weights.repeat(2)).sum(), tensors[:2], 1
        ),
        "neg_lse": (lambda k: (ops.neg_lse(z_i, ids, k, "triton") * weights).sum(), [z_i], 2),
        "neg_lse_sum": (lambda k: ops.neg_lse_sum(z_i, ids, k, weights, "triton"), [z_i], 2),
        "cross_neg_lse": (
            lambda k: (ops.cross_neg_lse(z_i, v, ids, v_ids, k, "triton")[0] * weights).sum(), [z_i, v], 2
        ),
        "cross_neg_lse one side": (
            lambda k: (ops.cross_neg_lse(z_i, v.detach(), ids, v_ids, k, "triton")[0] * weights).sum(), [z_i], 2
        ),
        "sigmoid_scalar": (
            lambda k: ops.sigmoid_scalar(z_i, z_j, k, bias, True, False, True, "triton"), tensors[:2], 1
        ),
        "sigmoid_scalar two views": (
            lambda k: ops.sigmoid_scalar(z_i, z_j, k, bias, True, True, True, "triton"), tensors[:2], 1
        ),
        "softplus": (
            lambda k: (
                ops.softplus_sums(Side(z_i, ids), Side(v, v_ids), k, bias, positives=True, backend="triton") * weights
            ).sum(), [z_i, v], 2
        ),
        "softplus one side": (
            lambda k: (
                ops.softplus_sums(Side(z_i, ids), None, k, bias, positives=False, backend="triton") * weights
            ).sum(), [z_i], 2
        ),
    }  # fmt: skip


def results(call, k):
    loss, wanted, _ = call
    value = loss(k)
    return [value.detach(), *torch.autograd.grad(value, wanted)]


@pytest.mark.parametrize("name", calls())
@pytest.mark.parametrize(
    ("dtype", "k"), [(torch.float32, 10.0), pytest.param(torch.bfloat16, 200.0, marks=pytest.mark.slow)]
)
def test_repeated_recordings_give_the_bits_of_ordinary_launches(recordings, monkeypatch, name, dtype, k):
    for _ in range(2):
        results(calls(dtype=dtype)[name], k)
    recorded = [recording for recording in recordings.values() if isinstance(recording, launch.Recording)]
    assert len(recorded) == calls()[name][2]
    repeat, repeated = launch.Recording.repeat, []

    def noted(self, given):
        repeated.append(self)
        return repeat(self, given)

    monkeypatch.setattr(launch.Recording, "repeat", noted)
    found = results(calls(dtype=dtype, seed=1)[name], k)
    assert repeated == recorded
    monkeypatch.setattr(launch, "RECORDS", False)
    expected = results(calls(dtype=dtype, seed=1)[name], k)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", calls())
def test_no_operation_of_pytorch_comes_between_launches(name, monkeypatch):
    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.overloadpacket.__name__)
            return func(*args, **kwargs or {})

    seen: set[str] = set()
    monkeypatch.setattr(launch.Work, "launch", lambda *_, **__: None)  # the interpreter itself calls PyTorch
    backend = importlib.import_module("fastntxent.backends.triton.backend")
    for each in ("nt_xent_scalar", "nt_xent_rows_backward", "neg_lse", "neg_lse_backward", "cross_neg_lse",
                 "cross_neg_lse_backward", "sigmoid_scalar", "_softplus"):  # fmt: skip
        whole = getattr(backend.TritonBackend, each)

        def watched(self, *args, whole=whole):
            with Operators():
                return whole(self, *args)

        monkeypatch.setattr(backend.TritonBackend, each, watched)
    results(calls()[name], 10.0)
    assert seen <= {"empty", "slice", "select", "unbind", "split_with_sizes", "detach", "alias", "as_strided"}, seen


def recorded(recordings):
    return sum(isinstance(recording, launch.Recording) for recording in recordings.values())


def test_calls_that_depend_on_changing_values_are_not_recorded(recordings):
    call = calls()["nt_xent_scalar"]
    for step in range(4):
        results(call, 10.0 + step)  # a temperature schedule
    assert recorded(recordings) == 0
    loss = lambda k: ops.neg_lse(call[1][0], torch.arange(12, device=DEVICE), k, "triton").sum()  # noqa: E731
    for _ in range(3):
        torch.autograd.grad(loss(10.0), call[1][0])  # the backward copies an expanded gradient, and so is not recorded
    assert recorded(recordings) == 1


def test_a_call_with_a_large_workspace_is_not_recorded(recordings, monkeypatch):
    monkeypatch.setattr(launch, "LARGEST", 4096)
    for _ in range(3):
        results(calls()["nt_xent_scalar"], 10.0)
    assert recordings
    assert recorded(recordings) == 0


def test_recordings_are_kept_apart_by_strides_alignment_and_settings(recordings):
    z = torch.randn(12, 9, device=DEVICE)
    views = z[:, :8].contiguous(), z[:, :8], z.flatten()[1:97].view(12, 8)
    for view in views:
        for _ in range(2):
            ops.nt_xent_scalar(view.requires_grad_(), view, 10.0, True, True, "triton")
    assert recorded(recordings) == 3
    with config.forced("rows=4096 tiles=1"):
        for _ in range(2):
            ops.nt_xent_scalar(views[0], views[0], 10.0, True, True, "triton")
    assert recorded(recordings) == 4


def test_repeated_calls_return_float32_whatever_the_default_dtype(recordings):
    call = calls()["nt_xent_scalar"]
    expected = results(call, 10.0)
    results(call, 10.0)
    torch.set_default_dtype(torch.float64)
    try:
        found = results(call, 10.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [x.dtype for x in found] == [torch.float32] * 3
    assert all(map(torch.equal, found, expected))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the compilers that Triton ships for Linux")
def test_repeated_compiled_launches_pass_the_recorded_arguments():
    code = """
import torch
from benchmarks import host
from fastntxent import nt_xent
with host.empty_triton() as device:
    z_i, z_j = torch.randn(2, 256, 4, requires_grad=True)
    told = []
    for _ in range(3):
        device.launched.clear()
        nt_xent(z_i, z_j, 0.1, backend="triton").backward()
        told.append([tuple("pointer" if hasattr(x, "data_ptr") else x for x in each) for each in device.launched])
first, second, third = told
print(len(third))
assert first == second
for whole, again in zip(first, third, strict=True):
    assert len(whole) == len(again)
    for x, y in zip(whole, again):
        assert (type(y) is int and y % 16 == 0 and y > 0) if isinstance(x, str) else x is y or x == y, (x, y)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=WITHOUT_INTERPRETER
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 4


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("3.2.0", False),
        pytest.param("2.10", False, marks=pytest.mark.slow),
        pytest.param("3.3.0", True, marks=pytest.mark.slow),
        ("3.10.0a1", True),
    ],
)
def test_triton_older_than_3_3_is_not_available_and_says_why(version, fits):
    code = f"""
import triton
triton.__version__ = {version!r}
import fastntxent
print(fastntxent.backends()["triton"].reason)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, check=True
    )
    reason = "None" if fits else f"RuntimeError: Triton 3.3 or newer is needed, but {version} is installed"
    assert done.stdout.strip() == reason


# --- before a capture ------------------------------------------------------------------------------------------------


def compiled_for(name: str) -> bool:
    """Return whether the kernel is compiled again for each value of this argument or option."""
    return name.isupper() or name in ("num_warps", "num_stages", "maxnreg")


@pytest.mark.parametrize("temperature", [0.1, pytest.param(0.001, marks=pytest.mark.slow)])
def test_warm_up_launches_the_kernels_of_every_temperature(monkeypatch, temperature):
    launched, whole = set(), launch.Work.launch

    def seen(self, kernel, grid, **named):
        launched.add(
            (kernel.fn.__name__, *sorted((name, value) for name, value in named.items() if compiled_for(name)))
        )
        whole(self, kernel, grid, **named)

    monkeypatch.setattr(launch.Work, "launch", seen)
    views = torch.randn(2, 12, 5, device=DEVICE, requires_grad=True)
    fastntxent.warm_up(fastntxent.NTXentLoss(temperature, backend="triton"), *views.unbind())
    warmed, launched_here = set(launched), launched
    for tau in (0.1, 0.001):
        launched_here.clear()
        fastntxent.nt_xent(*views, tau, backend="triton").backward()
        with torch.no_grad():
            fastntxent.nt_xent(*views, tau, backend="triton")
        assert launched_here <= warmed


def test_warm_up_leaves_gradients_state_and_generators_as_they_were():
    loss, (query, key) = fastntxent.QueueInfoNCELoss(16, 4), torch.randn(2, 6, 4).unbind()
    query.requires_grad_()
    fastntxent.warm_up(loss, query, key)
    fastntxent.warm_up(loss.forward, query, key=key)
    fastntxent.warm_up(functools.partial(loss, key=key), query)
    assert loss.queue.filled == 0
    assert query.grad is None
    state = torch.get_rng_state()
    fastntxent.warm_up(lambda z: fastntxent.nt_xent(torch.dropout(z, 0.5, True), z, 0.5), query)
    assert torch.equal(torch.get_rng_state(), state)


def test_warm_up_runs_the_backward_if_only_parameters_need_a_gradient():
    encoder, images, reached = torch.nn.Linear(5, 4), torch.randn(6, 5), []
    encoder.register_full_backward_hook(lambda *_: reached.append(True))
    with torch.no_grad():
        fastntxent.warm_up(lambda x: fastntxent.nt_xent(encoder(x), encoder(x + 1), 0.5), images)
    assert reached
    assert encoder.weight.grad is None


def test_warm_up_passes_an_argument_given_twice_as_one_object():
    seen = []
    z = torch.randn(6, 4, requires_grad=True)

    def loss(a, b=None, *, scale):
        seen.append((a is b, scale))
        return fastntxent.nt_xent(a, b, 0.5) * scale

    fastntxent.warm_up(loss, z, z, scale=2.0)
    assert set(seen) == {(True, 2.0)}


@pytest.mark.parametrize(
    "call",
    [
        lambda a, b: (fastntxent.nt_xent, a, b),
        lambda a, b: (fastntxent.multiview_nt_xent, [a, b]),
        lambda a, b: (functools.partial(fastntxent.nt_xent, a, z_j=b),),
        lambda a, b: (lambda views: fastntxent.nt_xent(views["a"], views["b"][0]), {"a": a, "b": (b,)}),
    ],
    ids=["tensors", "list", "partial", "mapping"],
)
def test_warm_up_leaves_the_graph_of_its_inputs(call):
    z = torch.randn(2, 6, 4, requires_grad=True)
    a, b = z * 2, z + 1
    loss, *inputs = call(a[0], b[1])
    fastntxent.warm_up(loss, *inputs)
    loss(*inputs).backward()
    assert z.grad is not None


def test_warm_up_also_runs_the_backend_chosen_for_a_capture():
    taken = []

    class Chosen(policy.Decision):
        def take(self, dtype, rows, features, captured=False):
            taken.append(captured)
            return "blocked"

    device = torch.device("cuda", 0)
    with mock.patch.dict(policy._decided, {device: Chosen({}, None, None)}):
        fastntxent.warm_up(
            lambda z: z.sum() + len(policy.choose_backend(device, {}, torch.float32, 4, 4)), torch.randn(2, 2)
        )
    assert taken == [False, False, True, True]


def test_calls_during_a_warm_up_return_right_losses():
    z_i, z_j = torch.randn(2, 12, 5, device=DEVICE).unbind()
    expected = [fastntxent.nt_xent(z_i, z_j, tau, backend="triton") for tau in (0.1, 0.001)]
    with warming():
        found = [fastntxent.nt_xent(z_i, z_j, tau, backend="triton") for tau in (0.1, 0.001)]
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_forced_settings_are_restored_after_the_block():
    with config.forced("rows=5 tiles=1"):
        with config.forced("tiles=8"):
            assert dict(config.forced_now()) == {"tiles": 8}
        assert dict(config.forced_now()) == {"rows": 5, "tiles": 1}
    assert not config.forced_now()


def test_recording_a_call_that_cannot_be_recorded_is_tried_only_once(recordings, monkeypatch):
    made, whole = [], launch.Recording.__init__

    def noted(self, *args):
        made.append(self)
        whole(self, *args)

    monkeypatch.setattr(launch.Recording, "__init__", noted)
    z_i, z_j = torch.randn(2, 12, 5, device=DEVICE).unbind()
    for _ in range(4):
        ops.nt_xent_scalar(z_i, z_j, 10.0, True, True, "triton")  # no gradient: only the value
    assert len(made) == 1


def test_number_of_recordings_is_bounded_if_temperatures_change(recordings, monkeypatch):
    monkeypatch.setattr(launch, "KEPT", 4)
    for n in range(9):
        results(calls()["nt_xent_scalar"], 10.0 + n)
    assert len(recordings) == 4


def test_warm_up_raises_errors_that_say_what_is_not_supported(monkeypatch):
    with pytest.raises(TypeError, match="loss must be a function or a module, got float"):
        fastntxent.warm_up(0.1)
    with pytest.raises(TypeError, match="loss must return a tensor, got dict"):
        fastntxent.warm_up(lambda z: {"loss": z.sum()}, torch.ones(2))  # type: ignore[return-value]
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"outside torch\.inference_mode"):
        fastntxent.warm_up(fastntxent.nt_xent, *torch.randn(2, 6, 4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="warm_up must be called before the capture of a CUDA graph"):
        fastntxent.warm_up(fastntxent.nt_xent, *torch.randn(2, 6, 4))
