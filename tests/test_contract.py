"""Every path to a kernel checks its tensors: a wrong tensor raises an error that names the argument."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastntxent
from fastntxent.compat import open_clip
from tests.cases import BACKENDS, KERNELS
from tests.hostile import REFUSALS, Campaign, operators, valid_arguments, with_cut_storage
from tests.test_losses import CASES, Drawn, draw


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("name", operators())
def test_operator_rejects_wrong_tensors_by_name_or_returns_right_numbers(name, backend):
    campaign = Campaign(backend)
    campaign.run(name)
    assert not campaign.faults
    assert campaign.calls > 25 * sum("Tensor" in str(a.type) for a in schema(name).arguments)


def schema(name: str) -> torch.FunctionSchema:
    return getattr(torch.ops.fastntxent, name).default._schema


def test_campaign_finds_a_call_that_is_not_checked(monkeypatch):
    kernels = importlib.import_module("fastntxent.ops.kernels")

    def without_shapes(call: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    monkeypatch.setattr(kernels, "checked", without_shapes)
    campaign = Campaign("blocked")
    arguments = valid_arguments("cross_neg_lse_backward", "blocked")
    campaign.judge("", "cross_neg_lse_backward", "d_rows", {**arguments, "d_rows": torch.randn(7)})
    assert "names no argument" in campaign.faults[0]


def loss_of(case, drawn: Drawn, backend: str) -> tuple[Tensor, list[Tensor]]:
    tensors = [z.clone().requires_grad_() for z in drawn.tensors]
    return case.loss(*(z * 1 for z in tensors), drawn.tau, backend=backend, **drawn.options), tensors


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


# --- between forward and backward ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut", [lambda t: t.half(), lambda t: t[: len(t) // 2], lambda t: t[:1], lambda t: t[..., None]]
)
@pytest.mark.parametrize("backend", KERNELS)
def test_saved_tensor_hooks_that_change_tensors_raise_or_only_round(case, backend, cut):
    def unpack(t: Tensor) -> Tensor:
        return cut(t) if t.is_floating_point() and t.ndim else t

    drawn = draw(case, 24, 12, 0.3, 0).to(torch.float32)
    exact, tensors = loss_of(case, drawn, backend)
    expected = torch.autograd.grad(exact, tensors)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        loss, tensors = loss_of(case, drawn, backend)
    try:
        gradients = torch.autograd.grad(loss, tensors)
    except REFUSALS:
        return
    for gradient, right in zip(gradients, expected, strict=True):  # no error, so only rounding to half precision
        assert float((gradient - right).norm() / right.norm()) < 0.01


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("change", [lambda d: d[:3], lambda d: d.double(), lambda d: d[None]])
def test_node_prehook_that_returns_a_wrong_gradient_raises(backend, change):
    u = torch.randn(8, 4, requires_grad=True)
    nu = fastntxent.neg_lse(u, torch.arange(8), 0.5, backend=backend)
    nu.grad_fn.register_prehook(lambda gradients: tuple(change(d) for d in gradients))
    with pytest.raises(REFUSALS, match=r"must have|must be|has changed the (size|type) of value"):
        nu.sum().backward()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("free", [False, True])
def test_backward_raises_if_ids_were_freed_or_replaced(backend, free):
    u, ids = torch.randn(8, 4, requires_grad=True), torch.arange(8)
    nu = fastntxent.neg_lse(u, ids, 0.5, backend=backend)
    if free:
        ids.untyped_storage().resize_(0)
    else:
        ids.data = torch.arange(5)
    with pytest.raises(ValueError, match="ids must have"):
        nu.sum().backward()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("share", [0, 0.5])
def test_rows_whose_memory_was_freed_raise(backend, share):
    whole = torch.randn(8, 4)
    with pytest.raises(ValueError, match=r"z_j must have its elements in memory, got shape \(8, 4\)"):
        fastntxent.nt_xent(whole, with_cut_storage(whole, share), normalize=False, backend=backend)
    with pytest.raises(ValueError, match="u must have its elements in memory"):
        fastntxent.neg_lse(with_cut_storage(whole, share), torch.arange(8), 0.5, backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_raises_if_an_argument_was_changed_in_place(case, backend, reduction):
    drawn = draw(case, 8, 4, 0.3, 0)
    for wants_tau in (True, False):
        tau = drawn.tau.clone().requires_grad_(wants_tau)
        # A teacher function holds the similarities itself, so autograd cannot see them change.
        for changed in ("temperature", *(name for name in drawn.options if name != "sims")):
            options = {name: option.clone() for name, option in drawn.options.items()}
            given = tau * 1
            tensors = [z.clone().requires_grad_() for z in drawn.tensors]
            loss = case.loss(*tensors, given, backend=backend, reduction=reduction, **options).sum()
            with torch.no_grad():
                {"temperature": given, **options}[changed].zero_()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


SCALED = {
    "clip": lambda a, b, scale: fastntxent.clip(a, b, logit_scale=scale),
    "siglip": lambda a, b, scale: fastntxent.siglip(a, b, logit_scale=scale),
    "ClipLoss": open_clip.ClipLoss(),
    "SigLipLoss": open_clip.SigLipLoss(),
}


@pytest.mark.parametrize("around", ["nothing", "hooks", "checkpoint"])
@pytest.mark.parametrize("name", SCALED)
def test_backward_raises_if_a_logit_scale_was_changed_in_place(name, around):
    """Autograd's own version check does not suffice: hooks skip it, and a checkpoint runs the forward again."""
    z, scale = torch.randn(2, 8, 4), torch.tensor(2.0, requires_grad=True)
    rows = z[0].clone().requires_grad_()

    def loss(a):
        return SCALED[name](a, z[1], scale)

    if around == "checkpoint":
        value = checkpoint(loss, rows, use_reentrant=False)
    else:
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
        with hooks if around == "hooks" else contextlib.nullcontext():
            value = loss(rows)
    with torch.no_grad():
        scale.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [True, False])
def test_backward_raises_or_is_right_if_rows_were_changed_in_place(case, backend, normalize):
    drawn = draw(case, 8, 4, 0.3, 0)

    def gradients(change: bool) -> tuple[Tensor, ...]:
        tensors = [z.clone().requires_grad_() for z in drawn.tensors]
        rows = [z * 1 for z in tensors]
        loss = case.loss(*rows, drawn.tau, backend=backend, normalize=normalize, **drawn.options)
        if change:
            with torch.no_grad():
                for z in rows:
                    z.mul_(3)
        return torch.autograd.grad(loss, tensors)

    expected = gradients(False)
    try:
        found = gradients(True)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
    else:
        assert all(map(torch.equal, found, expected))


def test_loss_may_be_changed_in_place_by_its_caller():
    z, tau = torch.randn(6, 4, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    (whole,) = torch.autograd.grad(fastntxent.nt_xent(z, z + 1, tau), z)
    loss = fastntxent.nt_xent(z, z + 1, tau)
    loss /= 4
    (quarter,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(quarter, whole / 4)


# --- PyTorch's lazy tensors -------------------------------------------------------------------------------------------


def negated(x: Tensor) -> Tensor:
    """Return x as a view with PyTorch's negative bit set."""
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lazily_negated_rows_and_gradients_equal_materialised_ones(case, backend, normalize):
    drawn = draw(case, 8, 4, 0.3, 0)

    def gradients(lazy: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        tensors = [z.clone().requires_grad_() for z in drawn.tensors]
        losses = case.loss(
            *(lazy(z) for z in tensors), drawn.tau, reduction="none", backend=backend, normalize=normalize,
            **drawn.options,
        )  # fmt: skip
        upstream = torch.linspace(-1, 2, len(losses), dtype=losses.dtype)
        return losses, *torch.autograd.grad(losses, tensors, lazy(upstream))

    for found, expected in zip(gradients(negated), gradients(torch.clone), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", KERNELS)
def test_efficient_zero_tensors_equal_ordinary_zeros(backend):
    zeros, z = torch._efficientzerotensor((6, 4)), torch.randn(6, 4)
    found = fastntxent.nt_xent(z, zeros, normalize=False, backend=backend)
    torch.testing.assert_close(found, fastntxent.nt_xent(z, torch.zeros(6, 4), normalize=False, backend=backend))


def test_operator_rejects_a_meta_tensor_among_cpu_tensors():
    u = torch.randn(8, 4)
    words = r"ids must be on the device of u \(cpu\), got meta"
    with warnings.catch_warnings(), pytest.raises(ValueError, match=words):
        torch.ops.fastntxent.neg_lse(u, torch.arange(8, device="meta"), torch.tensor(2.0), "auto")


def test_checked_raises_an_error_that_names_an_argument_that_is_no_tensor():
    contract = importlib.import_module("fastntxent.ops.contract")
    with pytest.raises(TypeError, match=r"ids must be a torch\.Tensor, got float"):
        contract.checked("neg_lse", torch.randn(4, 3), 1.0, 0.5)
    with pytest.raises(TypeError, match=r"u must be a torch\.Tensor, got NoneType"):
        contract.checked("neg_lse", None, torch.arange(4), 0.5)
