"""Other libraries' losses, if installed, and comparisons of our losses with them."""

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st

from benchmarks.competitors import lightly_loss

drawn = settings(max_examples=200, deadline=None)
sizes = {"n": st.integers(2, 24), "d": st.integers(2, 24), "seed": st.integers(0, 2**20)}
temperatures = st.floats(0.05, 2)


def needs(module):
    return pytest.importorskip(module, reason=f"needs {module}")


def lightly(module):
    needs("lightly")
    return lightly_loss(module)


def open_clip():
    """Return open_clip's module of losses alone: importing the whole package needs a working torchvision."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("needs open_clip")
    path = Path(spec.submodule_search_locations[0], "loss.py")
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sentence_transformers():
    try:
        importlib.import_module("sentence_transformers.sentence_transformer.losses")
        return importlib.import_module("sentence_transformers")
    except Exception as error:  # with a broken torchvision, the import raises something other than ImportError
        pytest.skip(f"needs sentence_transformers 6: {error}")


def batch(count, n, d, seed):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator) + torch.randn(count, n, d, generator=generator)
    labels = torch.randint(0, max(n // 3, 1), (n,), generator=generator)
    return z, labels


def assert_same(ours, theirs, tau, *tensors, exact=1e-9):
    """Compare values and gradients. The tolerance is `exact` in float64. In float32 it is the rounding error of logits
    of size 1/tau, which does not shrink when losses and gradients do."""
    for dtype, tolerance in ((torch.float64, exact), (torch.float32, 1.5e-6 * (1 + 1 / tau))):
        mine, other = (value_and_gradients(loss, [z.to(dtype) for z in tensors]) for loss in (ours, theirs))
        sizes = [1.0, *(gradient_size(z, tau) for z in tensors)]
        for a, b, size in zip(mine, other, sizes, strict=True):
            assert float((a - b).norm()) <= tolerance * max(float(b.norm()), size), (dtype, a, b)


def gradient_size(z, tau):
    """Return roughly the largest norm that the gradient of a mean over the rows can have; for a scalar input
    (temperature, scale), 1/tau."""
    return 1 / tau if z.ndim < 2 else 1 / (tau * float(z.norm(dim=-1).min()) * len(z) ** 0.5)


def value_and_gradients(loss, tensors):
    inputs = [z.clone().requires_grad_() for z in tensors]
    value = loss(*inputs)
    # A library may return a constant 0, which depends on no input.
    return [value.detach(), *torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)]
