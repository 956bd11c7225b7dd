"""Autocast around the backward, or around both passes, changes no gradient of the public functions of tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastntxent
from fastntxent.algebra import product
from tests.calls import CALLS, outputs

# Left out, because these are products of plain PyTorch, which autocast runs in half precision: cos_sim, dot_score, and
# the products in the backward of effective_rank's svdvals.
PLAIN_PYTORCH = {"effective_rank", "sentence_transformers.cos_sim", "sentence_transformers.dot_score"}
NAMES = [name for name in CALLS if name not in PLAIN_PYTORCH]
WITH_BACKEND = [name for name in NAMES if CALLS[name].reduction and "." not in name]


def results(name: str, *, forward: bool, backward: bool, **options: Any) -> list[torch.Tensor]:
    """Return the values, then the gradients that are not None, with autocast around one, both or neither of the
    passes."""
    torch.manual_seed(0)
    call = CALLS[name]
    temperature = torch.tensor(0.3, requires_grad=True)
    run = call.make(**({"temperature": temperature} if call.temperature else {}), **options)
    inputs = call.inputs(16)
    with torch.autocast("cpu", torch.bfloat16, enabled=forward):
        values = outputs(run(*inputs))
    smooth = [x for x in values if x.requires_grad]
    if not smooth:
        return values
    upstream = [torch.linspace(0.5, 1.5, x.numel()).view(x.shape).to(x) for x in smooth]
    parameters = run.parameters() if isinstance(run, torch.nn.Module) else ()
    wanted = [x for x in (*inputs, temperature, *parameters) if x.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, enabled=backward):
        gradients = torch.autograd.grad(smooth, wanted, upstream, allow_unused=True)
    return [*(x.detach() for x in values), *(g for g in gradients if g is not None)]


def assert_unchanged(name: str, **options: Any) -> None:
    expected = results(name, forward=False, backward=False, **options)
    for forward in (True, False):
        for x, y in zip(results(name, forward=forward, backward=True, **options), expected, strict=True):
            assert x.dtype == y.dtype
            assert (x.double() - y.double()).norm() <= 1e-6 * y.double().norm()


@pytest.mark.parametrize("name", NAMES)
def test_autocast_around_the_backward_changes_no_gradient(name):
    assert_unchanged(name)
    if CALLS[name].reduction:
        assert_unchanged(name, reduction="none")


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("name", WITH_BACKEND)
def test_autocast_around_the_backward_changes_no_gradient_of_pytorch_backends(name, backend):
    assert_unchanged(name, backend=backend)
    assert_unchanged(name, backend=backend, reduction="none")


def test_autocast_changes_no_gradient_of_compiled_code():
    labels, weights = torch.arange(16) % 4, torch.rand(4, 4)

    def loss(z):
        return fastntxent.sup_con(z, labels, pair_weights=weights)

    def gradient(function, enabled):
        z = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return torch.autograd.grad(function(z), z)[0]

    torch.testing.assert_close(gradient(torch.compile(loss, backend="aot_eager"), True), gradient(loss, False))


def test_product_has_the_derivatives_of_a_product():
    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    a, b = a.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(product, (a, b), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(product, (a, b))
    assert torch.autograd.gradcheck(lambda a: product(a, b.detach()), (a,), check_forward_ad=True)
    assert torch.autograd.gradcheck(lambda b: product(a.detach(), b), (b,), check_forward_ad=True)
    slices = torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(product, in_dims=(0, None))(slices, b), slices @ b)
