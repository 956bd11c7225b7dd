"""Gradient caching against the step it stands for."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from fastntxent import NTXentLoss, cached_backward


def whole_batch_step(encoder, views, loss_fn):
    loss = loss_fn(*(encoder(view) for view in views))
    loss.backward()
    return loss.detach()


def gradients(*modules):
    return [p.grad for module in modules for p in module.parameters()]


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 10, 100, (3, 0, 7), [10]])
def test_cached_backward_equals_whole_batch(chunk_size):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5)).double()
    loss_fn = NTXentLoss(0.2, learn_temperature=True).double()
    views = torch.randn(2, 10, 6, dtype=torch.float64).unbind()
    expected = whole_batch_step(encoder, views, loss_fn)
    expected_gradients = [g.clone() for g in gradients(encoder, loss_fn)]
    encoder.zero_grad()
    loss_fn.zero_grad()
    loss = cached_backward(encoder, views, loss_fn, chunk_size=chunk_size)
    torch.testing.assert_close(loss, expected)
    assert not loss.requires_grad
    for value, e in zip(gradients(encoder, loss_fn), expected_gradients, strict=True):
        torch.testing.assert_close(value, e)


def test_cached_backward_holds_one_chunk_of_activations():
    encoder, sizes = nn.Linear(6, 5), []
    encoder.register_forward_hook(lambda module, args, output: sizes.append((len(output), output.requires_grad)))
    cached_backward(encoder, torch.randn(2, 10, 6).unbind(), NTXentLoss(), chunk_size=4)
    assert sizes == [(4, False), (4, False), (2, False)] * 2 + [(4, True), (4, True), (2, True)] * 2


def test_cached_backward_of_no_rows_takes_as_many_passes():
    # What a rank without rows owes the others, if the encoder or the loss is over all of them.
    encoder, sizes = nn.Linear(6, 5), []
    encoder.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    cached_backward(encoder, torch.randn(2, 0, 6).unbind(), lambda z_i, z_j: (z_i * z_j).sum(), chunk_size=[0, 0])
    assert sizes == [0] * 8
    assert torch.equal(encoder.weight.grad, torch.zeros_like(encoder.weight))


def test_cached_backward_accumulates_in_grad():
    encoder = nn.Linear(6, 5)
    views = torch.randn(2, 10, 6).unbind()
    cached_backward(encoder, views, NTXentLoss(), chunk_size=4)
    once = encoder.weight.grad.clone()
    cached_backward(encoder, views, NTXentLoss(), chunk_size=4)
    torch.testing.assert_close(encoder.weight.grad, 2 * once)


def test_cached_backward_replays_dropout():
    # With a loss linear in the embeddings the gradient is a sum over rows of what dropout let through in the *first*
    # pass: the embeddings that the loss saw.
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 1, bias=False))
    seen = []

    def loss_fn(z_i, z_j):
        seen.append(torch.cat((z_i, z_j)).detach())
        return (z_i + z_j).sum()

    views = torch.ones(2, 10, 6).unbind()
    cached_backward(encoder, views, loss_fn, chunk_size=3)
    weight = encoder[1].weight
    torch.testing.assert_close(seen[0].sum(), (weight.grad * weight).sum())


def test_cached_backward_goes_on_with_the_random_numbers_of_one_pass():
    encoder = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    views = torch.randn(2, 8, 4).unbind()
    torch.manual_seed(5)
    for view in views:
        for chunk in view.split(4):
            encoder(chunk)
    expected = torch.rand(3)
    torch.manual_seed(5)
    cached_backward(encoder, views, NTXentLoss(), chunk_size=4)
    assert torch.equal(torch.rand(3), expected)


def test_cached_backward_updates_running_statistics_once():
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    plain = copy.deepcopy(encoder)
    views = torch.randn(2, 12, 6).unbind()
    cached_backward(encoder, views, NTXentLoss(), chunk_size=4)
    for view in views:
        for chunk in view.split(4):
            plain(chunk)
    for value, expected in zip(encoder.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, expected)


class Replica(nn.Linear):
    """Notes, as DistributedDataParallel would act on it, whether each pass with a graph is to synchronise."""

    def __init__(self):
        super().__init__(6, 5)
        self.synchronise, self.log = True, []

    @contextlib.contextmanager
    def no_sync(self):
        self.synchronise = False
        yield
        self.synchronise = True

    def forward(self, x):
        if torch.is_grad_enabled():
            self.log.append(self.synchronise)
        return super().forward(x)


def test_cached_backward_synchronises_in_the_last_chunk():
    encoder = Replica()
    cached_backward(encoder, torch.randn(2, 10, 6).unbind(), NTXentLoss(), chunk_size=5)
    assert encoder.log == [False, False, False, True]


def test_cached_backward_unused_view_gets_zero_gradient():
    encoder = nn.Linear(6, 5)
    cached_backward(encoder, torch.randn(2, 10, 6).unbind(), lambda z_i, z_j: z_i.sum(), chunk_size=5)
    assert encoder.weight.grad.isfinite().all()


VIEW = torch.randn(4, 6)


@pytest.mark.parametrize(
    ("views", "chunk_size", "loss_fn", "error", "message"),
    [
        ([VIEW, VIEW], 0, None, ValueError, "chunk_size must be at least 1, got 0"),
        ([VIEW, VIEW], 2.0, None, TypeError, "chunk_size must be an integer, or several, got float"),
        ([VIEW, VIEW], [2, True], None, TypeError, "chunk_size must be an integer, or several, got bool"),
        ([VIEW, VIEW], [5, -1], None, ValueError, "chunk_size must be at least 0, got -1"),
        ([VIEW, VIEW], [], None, ValueError, "chunk_size must hold the rows of at least one chunk, got none"),
        ([VIEW, VIEW], [2, 1], None, ValueError, r"chunk_size must add up to the 4 rows of views\[0\], got 3"),
        ([], 2, None, ValueError, "at least one tensor"),
        ([VIEW, [1]], 2, None, TypeError, r"views\[1\] must be a torch.Tensor, got list"),
        ([VIEW, VIEW[:0]], 2, None, ValueError, r"views\[1\] must have at least one row"),
        ([VIEW, VIEW], 2, lambda a, b: a + b, ValueError, "loss_fn must return a scalar"),
        ([VIEW, VIEW], 2, lambda a, b: 1.0, TypeError, "loss_fn must return a torch.Tensor, got float"),
    ],
)
def test_cached_backward_bad_input_is_named(views, chunk_size, loss_fn, error, message):
    with pytest.raises(error, match=message):
        cached_backward(nn.Linear(6, 5), views, loss_fn or NTXentLoss(), chunk_size=chunk_size)


def test_cached_backward_views_must_not_be_one_tensor():
    with pytest.raises(TypeError, match="views must be a sequence of tensors"):
        cached_backward(nn.Linear(6, 5), VIEW, NTXentLoss(), chunk_size=2)


def test_cached_backward_encoder_must_be_a_module():
    with pytest.raises(TypeError, match=r"encoder must be a torch\.nn\.Module, got function"):
        cached_backward(lambda x: x, [VIEW, VIEW], NTXentLoss(), chunk_size=2)
