"""Transforms of torch.func and of autograd, applied to the public functions that take tensors."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

from tests.calls import CALLS, outputs

N_SLICES = 3

# These modify rows that they hold between calls, and transforms do not support that.
STATEFUL = {"QueueInfoNCELoss", "lightly.NTXentLoss bank"}
# In these, sizes or branches depend on batched values, so PyTorch's vmap raises an error.
DATA_DEPENDENT = {
    "pytorch_metric_learning.NTXentLoss pairs",
    "pytorch_metric_learning.SupConLoss pairs",
    "torchmultimodal.contrastive_loss_with_temperature mask",
}
VMAPPED = [name for name in CALLS if name not in STATEFUL | DATA_DEPENDENT]
# These run no kernels, so PyTorch computes their forward-mode derivatives.
PLAIN_PYTORCH = {
    "info_nce own",
    "alignment",
    "effective_rank",
    "split_views",
    "lightly.MemoryBankModule",
    "sentence_transformers.cos_sim",
    "sentence_transformers.dot_score",
}
# lightly's NT-Xent reads the sign of the temperature, so it takes no batched temperature.
BATCHED_TEMPERATURE = [name for name in VMAPPED if CALLS[name].temperature and "lightly.NTXent" not in name]


def loss_of(name, **options):
    call = CALLS[name]
    if call.temperature:
        options.setdefault("temperature", 0.5)
    run = call.make(**options)
    return lambda *inputs: tuple(outputs(run(*inputs)))


def slices(name):
    torch.manual_seed(0)
    batches = [CALLS[name].inputs(6) for _ in range(N_SLICES)]
    return [tuple(x.detach() for x in batch) for batch in batches]


def stacked(batches):
    return tuple(torch.stack(tensors) for tensors in zip(*batches, strict=True))


@pytest.mark.parametrize("name", VMAPPED)
def test_vmap_equals_a_loop(name):
    loss, batches = loss_of(name), slices(name)
    expected = stacked([loss(*batch) for batch in batches])
    torch.testing.assert_close(torch.vmap(loss)(*stacked(batches)), expected)


@pytest.mark.parametrize("name", BATCHED_TEMPERATURE)
def test_vmap_over_temperatures_equals_a_loop(name):
    batch, temperatures = slices(name)[0], torch.tensor([0.3, 0.4, 0.5])
    expected = stacked([loss_of(name, temperature=tau)(*batch) for tau in temperatures])
    torch.testing.assert_close(torch.vmap(lambda tau: loss_of(name, temperature=tau)(*batch))(temperatures), expected)


def test_vmap_over_temperatures_rejects_an_invalid_temperature():
    batch = slices("nt_xent")[0]
    with pytest.raises(ValueError, match=r"temperature must be positive and finite, got -1\.0"):
        torch.vmap(lambda tau: loss_of("nt_xent", temperature=tau)(*batch))(torch.tensor([0.5, -1.0]))


def differentiable(name):
    """Return the inputs, a loss (one value per row where possible), and the inputs that need a gradient."""
    torch.manual_seed(0)
    inputs = CALLS[name].inputs(5)
    loss = loss_of(name, **({"reduction": "none"} if CALLS[name].reduction else {}))
    return inputs, loss, [x for x in inputs if x.requires_grad]


@pytest.mark.parametrize("name", list(CALLS))
def test_batched_upstream_gradients_equal_a_loop(name):
    inputs, loss, wanted = differentiable(name)
    output = loss(*inputs)[0]
    if not output.requires_grad:
        return
    upstream = torch.eye(output.numel()).view(-1, *output.shape)
    batched = torch.autograd.grad(output, wanted, upstream, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(output, wanted, each, retain_graph=True) for each in upstream]
    torch.testing.assert_close(batched, stacked(expected))


@pytest.mark.parametrize("name", [name for name in CALLS if name not in STATEFUL])
def test_forward_mode_is_right_or_refused_with_advice(name):
    inputs, loss, wanted = differentiable(name)
    if not (wanted and loss(*inputs)[0].requires_grad):
        return
    tangents = [torch.randn_like(x) if x.requires_grad else None for x in inputs]
    with forward_ad.dual_level():
        duals = [x if t is None else forward_ad.make_dual(x.detach(), t) for x, t in zip(inputs, tangents, strict=True)]
        if name not in PLAIN_PYTORCH:
            with pytest.raises(RuntimeError, match="no forward-mode derivative; pass backend='reference'"):
                loss(*duals)
            return
        tangent = forward_ad.unpack_dual(loss(*duals)[0]).tangent
    gradients = torch.autograd.grad(loss(*inputs)[0].sum(), wanted)
    expected = sum((g * t).sum() for g, t in zip(gradients, filter(lambda t: t is not None, tangents), strict=True))
    torch.testing.assert_close(tangent.sum(), expected, rtol=1e-4, atol=1e-5)
