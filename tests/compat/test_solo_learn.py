"""The two-tower losses of fastntxent.compat.solo_learn against their definitions."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastntxent.compat import solo_learn


def gradients(loss, *tensors):
    leaves = [x.clone().requires_grad_() for x in tensors]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_mocov2plus_is_a_cross_entropy_against_the_queue(temperature):
    query, key, queue = (F.normalize(torch.randn(n, 6, dtype=torch.float64), dim=1) for n in (5, 5, 9))

    def definition(query, key):
        logits = torch.cat(((query * key).sum(dim=1, keepdim=True), query @ queue.T), dim=1) / temperature
        return F.cross_entropy(logits, torch.zeros(5, dtype=torch.long))

    value = gradients(lambda q, k: solo_learn.mocov2plus_loss_func(q, k, queue.T, temperature), query, key)
    for ours, theirs in zip(value, gradients(definition, query, key), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("name", "scale"), [("mocov3_loss_func", True), ("nnclr_loss_func", False)])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_mocov3_and_nnclr_are_a_cross_entropy_against_the_batch(name, scale, temperature):
    a, b = torch.randn(2, 7, 6, dtype=torch.float64)

    def definition(a, b):
        logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / temperature
        return F.cross_entropy(logits, torch.arange(7)) * (2 * temperature if scale else 1)

    value = gradients(lambda a, b: getattr(solo_learn, name)(a, b, temperature), a, b)
    for ours, theirs in zip(value, gradients(definition, a, b), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("temperatures", [{}, {"temperature_q": 0.5, "temperature_k": 0.2}])
@pytest.mark.parametrize("sizes", [(5, 9), (7, 3), (1, 1), (3, 1500)])
def test_ressl_is_the_cross_entropy_of_two_softmaxes_over_the_queue(sizes, temperatures):
    n, length = sizes
    query, key, queue = (F.normalize(torch.randn(rows, 6, dtype=torch.float64), dim=1) for rows in (n, n, length))

    def definition(q, queue, temperature_q=0.1, temperature_k=0.04):
        targets = (key @ queue.detach().T / temperature_k).softmax(dim=1)
        return -(targets * (q @ queue.T / temperature_q).log_softmax(dim=1)).sum(dim=1).mean()

    value = gradients(lambda q, queue: solo_learn.ressl_loss_func(q, key, queue, **temperatures), query, queue)
    expected = gradients(lambda q, queue: definition(q, queue, **temperatures), query, queue)
    for ours, theirs in zip(value, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("temperatures", [(0.1, 0.04), (0.05, 0.04), (0.2, 0.05)])
def test_ressl_is_accurate_where_the_student_agrees_with_the_teacher(temperatures):
    """A loss of 1e-4 must not be computed as the difference of two numbers near 20."""
    for _ in range(5):
        query, queue = (F.normalize(torch.randn(n, 64), dim=1) for n in (32, 64))
        key = F.normalize(query + 0.075 * torch.randn(32, 64), dim=1)
        queue[:32] = F.normalize(query + 0.05 * torch.randn(32, 64), dim=1)

        def definition(q, k=key, v=queue):
            targets = (k.double() @ v.double().T / temperatures[1]).softmax(dim=1)
            return -(targets * (q @ v.double().T / temperatures[0]).log_softmax(dim=1)).sum(dim=1).mean()

        value, gradient = gradients(lambda q, k=key, v=queue: solo_learn.ressl_loss_func(q, k, v, *temperatures), query)
        true_value, true_gradient = gradients(definition, query.double())
        torch.testing.assert_close(value.double(), true_value, rtol=1e-5, atol=0)
        assert (gradient - true_gradient).norm() < 5e-5 * true_gradient.norm()


def test_ressl_has_a_gradient_for_temperature_q_and_none_for_the_keys():
    query, key, queue = (F.normalize(torch.randn(n, 6, dtype=torch.float64), dim=1) for n in (5, 5, 9))
    key.requires_grad_()
    temperatures = torch.tensor([0.1, 0.04], dtype=torch.float64).requires_grad_()
    loss = solo_learn.ressl_loss_func(query, key, queue, *temperatures)
    d_key, d_temperatures = torch.autograd.grad(loss, [key, temperatures], allow_unused=True)
    assert d_temperatures[1] == 0
    eps = 1e-6
    ends = [solo_learn.ressl_loss_func(query, key, queue, 0.1 + step, 0.04) for step in (eps, -eps)]
    torch.testing.assert_close(d_temperatures[0], (ends[0] - ends[1]).detach() / (2 * eps), rtol=1e-6, atol=1e-6)
    assert d_key is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_ressl_is_computed_in_float32(dtype):
    query, key, queue = (F.normalize(torch.randn(n, 6), dim=1).to(dtype) for n in (5, 5, 9))
    value = gradients(lambda q: solo_learn.ressl_loss_func(q, key, queue), query)
    expected = gradients(lambda q: solo_learn.ressl_loss_func(q, key.double(), queue.double()), query.double())
    assert value[0].dtype == torch.float32
    torch.testing.assert_close(value[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value[1].double(), expected[1], rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


def test_ressl_never_holds_all_logits():
    seen: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))
            return out

    query, key, queue = (F.normalize(torch.randn(n, 4), dim=1) for n in (3000, 3000, 4000))
    query.requires_grad_()
    with Sizes():
        solo_learn.ressl_loss_func(query, key, queue).backward()
    assert max(seen) < 3000 * 4000 / 4


def test_ressl_names_invalid_arguments():
    z = torch.eye(4)
    with pytest.raises(ValueError, match="temperature_k must be positive"):
        solo_learn.ressl_loss_func(z, z, z, 0.1, 0.0)
    with pytest.raises(ValueError, match="temperature_q must be positive"):
        solo_learn.ressl_loss_func(z, z, z, -1.0)
    with pytest.raises(ValueError, match="q and k must have the same shape"):
        solo_learn.ressl_loss_func(z, z[:2], z)
    with pytest.raises(ValueError, match="queue must have"):
        solo_learn.ressl_loss_func(z, z, z[:, :2])
    with pytest.raises(ValueError, match="queue must have at least one row"):
        solo_learn.ressl_loss_func(z, z, z[:0])


def test_mocov2plus_queue_must_have_a_column_for_each_negative():
    for queue in (torch.ones(2), torch.ones(3, 2), torch.ones(2, 0)):
        with pytest.raises(ValueError, match=r"queue must have shape \(2, K\), a column for each negative, got"):
            solo_learn.mocov2plus_loss_func(torch.eye(2), torch.eye(2), queue)
    with pytest.raises(ValueError, match="query and queue must have the same dtype"):
        solo_learn.mocov2plus_loss_func(torch.eye(2), torch.eye(2), torch.ones(2, 3).double())


def test_nnclr_errors_use_its_argument_names():
    z = torch.eye(4)
    with pytest.raises(TypeError, match=r"nn must be a torch.Tensor, got NoneType"):
        solo_learn.nnclr_loss_func(None, z)
    with pytest.raises(ValueError, match="nn and p must have the same shape"):
        solo_learn.nnclr_loss_func(z, z[:2])
    with pytest.raises(ValueError, match="p must have 2 dimensions"):
        solo_learn.nnclr_loss_func(z, z[0])
