"""Gradient caching, compared with the step without caching."""

import collections
import contextlib
import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from fastntxent import NTXentLoss, QueueInfoNCELoss, cached_backward, nt_xent
from tests.ranks import on_ranks


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


def test_cached_backward_runs_the_encoder_with_a_graph_on_one_chunk_at_a_time():
    encoder, sizes = nn.Linear(6, 5), []
    encoder.register_forward_hook(lambda module, args, output: sizes.append((len(output), output.requires_grad)))
    cached_backward(encoder, torch.randn(2, 10, 6).unbind(), NTXentLoss(), chunk_size=4)
    assert sizes == [(4, False), (4, False), (2, False)] * 2 + [(4, True), (4, True), (2, True)] * 2


def test_cached_backward_runs_every_chunk_even_without_rows():
    # A rank without rows must run as many passes as the other ranks, because encoder and loss may call collectives.
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
    # The loss is the sum of the embeddings, so the gradient sums the features that dropout kept in the second pass.
    # Gradient times weight equals the loss only if the first pass kept the same features.
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


def test_cached_backward_advances_the_generator_as_one_pass_does():
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
    """An encoder that logs, in each pass with a graph, whether DistributedDataParallel would synchronise gradients."""

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


def test_cached_backward_synchronises_gradients_only_in_the_last_chunk():
    encoder = Replica()
    cached_backward(encoder, torch.randn(2, 10, 6).unbind(), NTXentLoss(), chunk_size=5)
    assert encoder.log == [False, False, False, True]


def test_cached_backward_accepts_a_loss_that_ignores_a_view():
    encoder, views = nn.Linear(6, 5), torch.randn(2, 10, 6).unbind()
    cached_backward(encoder, views, lambda z_i, z_j: z_i.sum(), chunk_size=5)
    torch.testing.assert_close(encoder.weight.grad, views[0].sum(dim=0).expand(5, -1))


VIEW = torch.randn(4, 6)


@pytest.mark.parametrize(
    ("views", "chunk_size", "loss_fn", "error", "message"),
    [
        ([VIEW, VIEW], 0, None, ValueError, "chunk_size must be at least 1, got 0"),
        ([VIEW, VIEW], 2.0, None, TypeError, "chunk_size must be an int, got float"),
        ([VIEW, VIEW], [2, True], None, TypeError, "chunk_size must be an int, got bool"),
        ([VIEW, VIEW], [5, -1], None, ValueError, "chunk_size must be at least 0, got -1"),
        ([VIEW, VIEW], [], None, ValueError, "chunk_size must list the number of rows of at least one chunk"),
        ([VIEW, VIEW], [2, 1], None, ValueError, r"chunk_size must add up to the 4 rows of views\[0\], got 3"),
        ([], 2, None, ValueError, "at least one view, got an empty sequence"),
        ([VIEW, [1]], 2, None, TypeError, r"views\[1\] must be a torch.Tensor, got list"),
        ([VIEW, VIEW[:0]], 2, None, ValueError, r"views\[1\] must have at least one row"),
        ([VIEW, VIEW], 2, lambda a, b: a + b, ValueError, "loss_fn must return a scalar"),
        ([VIEW, VIEW], 2, lambda a, b: 1.0, TypeError, "loss_fn must return a torch.Tensor, got float"),
    ],
)
def test_cached_backward_raises_an_error_that_names_the_bad_argument(views, chunk_size, loss_fn, error, message):
    with pytest.raises(error, match=message):
        cached_backward(nn.Linear(6, 5), views, loss_fn or NTXentLoss(), chunk_size=chunk_size)


def test_cached_backward_rejects_a_single_tensor_as_views():
    with pytest.raises(TypeError, match="views must be a sequence of tensors"):
        cached_backward(nn.Linear(6, 5), VIEW, NTXentLoss(), chunk_size=2)


def test_cached_backward_rejects_an_encoder_that_is_not_a_module():
    with pytest.raises(TypeError, match=r"encoder must be a torch\.nn\.Module, got function"):
        cached_backward(lambda x: x, [VIEW, VIEW], NTXentLoss(), chunk_size=2)


def loss_of(z_i, z_j):
    return nt_xent(z_i, z_j, 0.2)


def chunked_step(encoder, views, loss_fn, chunk_size):
    """The step without caching: one pass over the chunks, which stores all activations."""
    loss = loss_fn(*(torch.cat([encoder(chunk) for chunk in view.split(chunk_size)]) for view in views))
    loss.backward()
    return loss.detach()


class Stateful(nn.Module):
    """An encoder whose embeddings depend on its previous calls."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 5)
        self.init()

    def init(self):
        pass

    def forward(self, x):
        h = self.first(x)
        return self.last(torch.tanh(h / self.scale(h)))


class InPlace(Stateful):
    def init(self):
        self.register_buffer("running", torch.ones(8))
        self.register_buffer("expanded", torch.ones(1).expand(8))
        self.register_buffer("sparse", torch.eye(8).to_sparse(), persistent=False)

    def scale(self, h):
        self.running.mul_(0.5).add_(h.detach().std(0))
        self.running.data.mul_(1.1)
        return self.running + self.expanded + torch.sparse.mm(self.sparse, self.running[:, None])[:, 0]


class Assigned(Stateful):
    running: Tensor
    transient: Tensor
    unset: Tensor | None

    def init(self):
        self.register_buffer("running", torch.ones(8))
        self.register_buffer("transient", torch.ones(8), persistent=False)
        self.register_buffer("unset", None)
        self.norm = nn.Module()
        self.norm.running = self.running  # shared, until `running` is assigned

    def scale(self, h):
        self.running = 0.5 * self.running + 0.5 * h.detach().std(0)
        self.norm.running.mul_(1.5)
        self.transient.data = 0.5 * self.transient.data + 1
        self.unset = self.running if self.unset is None else self.unset + self.running
        return self.running * self.norm.running * self.transient * self.unset


class Resized(Stateful):
    def init(self):
        self.register_buffer("grown", torch.ones(1))

    def scale(self, h):
        size = len(self.grown)
        self.grown.resize_(size + 1).fill_(size)
        return 1 + self.grown.sum()


class Attributes(Stateful):
    inner: Any

    def init(self):
        self.inner = nn.Module()
        self.inner.step, self.inner.mean = 0, torch.ones(8)
        self.list, self.tuple, self.set = [1.0], (torch.ones(8),), set()
        self.dict: dict[str, Any] = {"mean": torch.ones(8), "nested": {"last": collections.deque([1.0, 2.0], maxlen=2)}}
        self.counter, self.array = collections.Counter("a"), np.ones(1)

    def scale(self, h):
        self.inner.step += 1
        self.inner.mean = 0.5 * self.inner.mean + h.detach().std(0)
        self.list.append(self.inner.step)
        self.tuple[0].mul_(1.5)
        self.set.add(self.inner.step)
        self.dict["mean"].mul_(0.5).add_(h.detach().abs().mean())
        self.dict["nested"]["last"].append(float(self.inner.step))
        self.counter["a"] += 1
        self.array += 0.5
        numbers = self.inner.step * len(self.list) * len(self.set) * self.counter["a"] + self.array[0]
        return numbers * self.inner.mean * self.tuple[0] * self.dict["mean"] * self.dict["nested"]["last"][0]


class Created(Stateful):
    late: Tensor

    def init(self):
        self.norm = None

    def scale(self, h):
        if self.norm is None:
            self.norm = nn.BatchNorm1d(8)
            self.register_buffer("late", torch.rand(8))
        self.late = 1.5 * self.late
        self.norm(h.detach())
        return 1 + self.late + self.norm.running_var + F.dropout(torch.ones(8))


class Random(Stateful):
    def init(self):
        self.torch, self.python = torch.Generator().manual_seed(3), random.Random(3)
        self.numpy: list[Any] = [np.random.default_rng(3), np.random.RandomState(3)]

    def scale(self, h):
        own = torch.rand(8, generator=self.torch) + self.python.random() + self.numpy[0].random() + self.numpy[1].rand()
        return 1 + own + torch.rand(8) + random.random() + np.random.rand()


class Normalised(Stateful):
    def init(self):
        parametrizations.spectral_norm(self.first)
        parametrizations.weight_norm(self.last)
        self.norm, self.mean_norm = nn.BatchNorm1d(8), nn.BatchNorm1d(8, momentum=None)

    def scale(self, h):
        self.norm(h), self.mean_norm(h)
        return self.norm.running_var + self.mean_norm.running_var + self.norm.num_batches_tracked


class Checkpointed(Stateful):
    def forward(self, x):
        return self.last(checkpoint(lambda x: F.dropout(torch.tanh(self.first(x))), x, use_reentrant=False))


class OldNorms(Stateful):
    def init(self):
        nn.utils.spectral_norm(self.first)
        nn.utils.weight_norm(self.last)

    def scale(self, h):
        return 1.0


STATEFUL = [
    InPlace, Assigned, Resized, Attributes, Created, Random, Normalised, OldNorms, Checkpointed,
    pytest.param(lambda: torch.jit.script(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))), id="scripted"),
    pytest.param(lambda: torch.compile(Assigned(), backend="eager"), id="compiled"),
]  # fmt: skip


def seed_all(seed):
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)


@pytest.mark.parametrize("make", STATEFUL)
@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning"
)  # the old norms of nn.utils, and TorchScript, are deprecated
def test_cached_backward_of_a_stateful_encoder_equals_the_uncached_step(make):
    views, later = torch.randn(2, 10, 6).unbind(), torch.randn(4, 6)
    ends = []
    for step in (cached_backward, chunked_step):
        seed_all(1)
        encoder = make()
        losses = [step(encoder, views, loss_of, chunk_size=4) for _ in range(2)]
        drawn = random.random(), np.random.rand(), torch.rand(1).item()
        ends.append((losses, gradients(encoder), encoder(later).detach(), drawn))  # `later` reveals the state
    torch.testing.assert_close(*ends)


def test_cached_backward_keeps_the_identity_of_state_objects():
    encoder = Attributes()
    encoder.register_buffer("running", torch.ones(3))
    objects = [encoder.running, *encoder.tuple, encoder.list, encoder.dict["mean"], encoder.dict["nested"]["last"]]
    parameters = list(encoder.parameters())
    cached_backward(encoder, torch.randn(2, 10, 6).unbind(), loss_of, chunk_size=5)
    kept = [encoder.running, *encoder.tuple, encoder.list, encoder.dict["mean"], encoder.dict["nested"]["last"]]
    assert all(now is before for now, before in zip(kept, objects, strict=True))
    assert all(now is before for now, before in zip(encoder.parameters(), parameters, strict=True))


def test_cached_backward_does_not_break_an_earlier_graph_that_saved_a_buffer():
    encoder = nn.Linear(6, 5)
    encoder.register_buffer("scale", torch.ones(5))
    z = encoder(torch.randn(3, 6)) * encoder.scale
    cached_backward(encoder, torch.randn(2, 10, 6).unbind(), loss_of, chunk_size=5)
    z.sum().backward()


class Failing(Attributes):
    """Raises in the forward that `countdown` selects."""

    def init(self):
        super().init()
        self.generator = torch.Generator().manual_seed(3)
        self.countdown = iter(())  # restoring the encoder's state does not rewind it

    def scale(self, h):
        scale = super().scale(h) + torch.rand(8, generator=self.generator) + random.random()
        if next(self.countdown, 1) == 0:
            raise FloatingPointError("in forward")
        return scale


def failing_loss(z_i, z_j):
    torch.rand(3)
    raise FloatingPointError("in the loss")


@pytest.mark.parametrize("fails_in", [0, 2, 4, 6, 7, "the loss"])
def test_cached_backward_restores_state_and_generators_after_an_error(fails_in):
    views, later = torch.randn(2, 10, 6).unbind(), torch.randn(4, 6)
    seed_all(1)
    encoder = Failing()
    seed_all(2)
    expected = copy.deepcopy(encoder)(later), random.random(), torch.rand(1)
    seed_all(2)
    if fails_in != "the loss":
        encoder.countdown = iter(range(fails_in, -1, -1))
    with pytest.raises(FloatingPointError):
        cached_backward(encoder, views, failing_loss if fails_in == "the loss" else loss_of, chunk_size=5)
    torch.testing.assert_close((encoder(later), random.random(), torch.rand(1)), expected)


def test_cached_backward_keeps_changes_that_the_loss_makes_to_the_encoder():
    class WithQueue(InPlace):
        def init(self):
            super().init()
            self.criterion = QueueInfoNCELoss(12, 5)
            self.centre = torch.zeros(5)

        def loss(self, z_i, z_j):
            self.centre = self.centre + z_i.detach().mean(0)
            return self.criterion(z_i, z_j.detach())

    ends = []
    for step in (cached_backward, chunked_step):
        torch.manual_seed(1)
        encoder = WithQueue()
        views = torch.randn(2, 10, 6).unbind()
        for _ in range(2):
            step(encoder, views, encoder.loss, chunk_size=5)
        queue = encoder.criterion.queue
        ends.append((encoder.running, encoder.centre, len(queue), queue.rows, gradients(encoder)))
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("change", ["twice", "generator", "array", "key"])
def test_cached_backward_keeps_every_change_that_the_loss_makes(change):
    class Kept(InPlace):
        def init(self):
            super().init()
            self.centre, self.generator, self.counts = torch.zeros(5), torch.Generator(), np.zeros(3)
            self.steps = {0: "steps"}

        def forward(self, x):
            self.centre = self.centre + 1
            return super().forward(x)

        def loss(self, z_i, z_j):
            for _ in range(2):
                if change == "twice":
                    self.centre = self.centre + 10
                elif change == "generator":
                    torch.rand(1, generator=self.generator)
                elif change == "array":
                    self.counts += 1
                else:
                    (step,) = self.steps
                    self.steps[step + 1] = self.steps.pop(step)
            return nt_xent(z_i, z_j)

    ends = []
    for step in (cached_backward, chunked_step):
        torch.manual_seed(1)
        encoder = Kept()
        for _ in range(3):
            step(encoder, torch.randn(2, 10, 6).unbind(), encoder.loss, chunk_size=5)
        steps = torch.tensor(list(encoder.steps))
        ends.append((encoder.centre, encoder.generator.get_state(), torch.tensor(encoder.counts), steps))
    torch.testing.assert_close(*ends)


def test_cached_backward_runs_a_frozen_encoder_once_and_equals_the_uncached_step():
    encoder, views = Normalised().requires_grad_(False), torch.randn(2, 10, 6).unbind()
    plain, runs = copy.deepcopy(encoder), []
    encoder.register_forward_hook(lambda *_: runs.append(1))
    ends = []
    for module, step in ((encoder, cached_backward), (plain, chunked_step)):
        loss_fn = NTXentLoss(0.2, learn_temperature=True)
        loss = step(module, views, loss_fn, chunk_size=5)
        ends.append((loss, gradients(loss_fn), module.norm.running_var.clone()))
    torch.testing.assert_close(*ends)
    assert len(runs) == 4
    for module, step in ((encoder, cached_backward), (plain, chunked_step)):
        with pytest.raises(RuntimeError, match="does not require grad"):
            step(module, views, loss_of, chunk_size=5)


def test_cached_backward_gives_gradients_to_parameters_outside_the_encoder():
    outside = nn.Linear(6, 5)
    encoder, views = nn.Sequential(nn.Tanh()), torch.randn(2, 10, 6).unbind()
    encoder.register_forward_hook(lambda module, args, output: outside(output))
    cached_backward(encoder, views, loss_of, chunk_size=4)
    (expected,) = torch.autograd.grad(loss_of(*map(encoder, views)), outside.weight)
    torch.testing.assert_close(outside.weight.grad, expected)


class Towers(nn.Module):
    """Two towers in one encoder, chosen by the dtype of the input."""

    def __init__(self):
        super().__init__()
        self.tokens, self.rows = nn.EmbeddingBag(9, 5), nn.Linear(6, 5)

    def forward(self, x):
        return self.rows(x) if x.is_floating_point() else self.tokens(x)


def tower_views():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(10, 6, generator=generator), torch.randint(9, (10, 3), generator=generator)


@pytest.mark.parametrize("frozen", ["tokens", "rows", None])
def test_cached_backward_accepts_a_view_whose_embeddings_need_no_gradient(frozen):
    encoder = Towers()
    if frozen:
        encoder.get_submodule(frozen).requires_grad_(False)
    plain = copy.deepcopy(encoder)
    cached_backward(encoder, tower_views(), loss_of, chunk_size=4)
    chunked_step(plain, tower_views(), loss_of, chunk_size=4)
    torch.testing.assert_close(gradients(encoder), gradients(plain))


def test_cached_backward_neither_changes_its_inputs_nor_gives_them_gradients():
    class Scaling(Stateful):
        def forward(self, x):
            return self.last(torch.tanh(self.first(x.mul_(2))))

    encoder = Scaling()
    views = [torch.randn(10, 6, requires_grad=True) for _ in range(2)]
    before = [view.detach().clone() for view in views]
    cached_backward(encoder, views, loss_of, chunk_size=4)
    plain = copy.deepcopy(encoder)
    plain.zero_grad()
    chunked_step(plain, [view.clone() for view in before], loss_of, chunk_size=10)
    torch.testing.assert_close(gradients(encoder), gradients(plain))
    for view, value in zip(views, before, strict=True):
        assert view.grad is None
        assert torch.equal(view, value)


def test_cached_backward_copies_embeddings_whose_memory_the_encoder_reuses():
    # CUDA graphs reuse their output memory like this, so the embeddings must be copied.
    class Static(nn.Linear):
        memory: Tensor

        def forward(self, x):
            z = super().forward(x)
            if torch.is_grad_enabled():
                return z
            self.memory = z if not hasattr(self, "memory") else self.memory.copy_(z)
            return self.memory

    encoder = Static(6, 5)
    views = torch.randn(2, 10, 6).unbind()
    loss = cached_backward(encoder, views, loss_of, chunk_size=5)
    torch.testing.assert_close(loss, loss_of(*map(encoder, views)).detach())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_cached_backward_works_under_no_grad_and_inference_mode(mode):
    encoder = nn.Linear(6, 5)
    with mode():
        views = torch.randn(2, 10, 6).unbind()
        loss = cached_backward(encoder, views, loss_of, chunk_size=4)
    (expected,) = torch.autograd.grad(loss_of(*(encoder(view.clone()) for view in views)), encoder.weight)
    torch.testing.assert_close(encoder.weight.grad, expected)
    assert not loss.is_inference()


def test_cached_backward_under_autocast_reaches_every_parameter():
    encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
    plain, views = copy.deepcopy(encoder), torch.randn(2, 10, 6).unbind()
    with torch.autocast("cpu", torch.bfloat16):
        cached_backward(encoder, views, loss_of, chunk_size=5)
        chunked_step(plain, views, loss_of, chunk_size=5)
    torch.testing.assert_close(gradients(encoder), gradients(plain), atol=1e-3, rtol=2e-2)


def test_cached_backward_raises_if_the_second_pass_gives_different_embeddings():
    counter = iter(range(100))
    encoder = nn.Linear(6, 5)
    encoder.register_forward_hook(lambda module, args, output: output + next(counter))
    with pytest.raises(RuntimeError, match="different embeddings in the second pass"):
        cached_backward(encoder, torch.randn(2, 10, 6).unbind(), loss_of, chunk_size=5)


def test_cached_backward_raises_within_cached_parametrizations():
    encoder = parametrizations.orthogonal(nn.Linear(6, 5))
    with parametrize.cached(), pytest.raises(RuntimeError, match=r"parametrize\.cached"):
        cached_backward(encoder, torch.randn(2, 10, 6).unbind(), loss_of, chunk_size=5)


@pytest.mark.parametrize(
    ("encoder", "views", "error", "message"),
    [
        (
            nn.LazyLinear(5),
            2 * [torch.ones(4, 6)],
            ValueError,
            "encoder must be initialised, got a lazy layer",
        ),
        (nn.LSTM(6, 5), 2 * [torch.ones(4, 6)], TypeError, r"encoder must return a torch\.Tensor, got tuple"),
        (nn.Flatten(0), 2 * [torch.ones(4, 6)], ValueError, r"3 embeddings, one per input row, got shape \(18,\)"),
        (nn.Linear(6, 5), 2 * [torch.ones(4, 6).to_sparse()], TypeError, r"views\[0\] must be a dense"),
        (
            nn.Linear(6, 5),
            [torch.ones(4, 6), torch.ones(4, 6, requires_grad=True).relu()],
            ValueError,
            r"views\[1\] must be data without a graph, got the output of ReluBackward0",
        ),
    ],
)
def test_cached_backward_raises_an_error_that_names_an_unsupported_encoder_or_view(encoder, views, error, message):
    with pytest.raises(error, match=message):
        cached_backward(encoder, views, loss_of, chunk_size=3)


def test_cached_backward_replays_the_generator_of_the_encoders_device():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

    class Moving(Stateful):
        def forward(self, x):
            return self.last(F.dropout(torch.tanh(self.first(x.cuda()))))

    views, ends = torch.randn(2, 10, 6).unbind(), []
    for step in (cached_backward, chunked_step):
        torch.manual_seed(1)
        encoder = Moving().cuda()
        ends.append((step(encoder, views, loss_of, chunk_size=4), gradients(encoder), torch.rand(1, device="cuda")))
    torch.testing.assert_close(*ends)


def replicated_step(encoder, views, loss_fn, chunk_size):
    """The uncached step in DDP, which synchronises buffers in the first chunk and gradients in the last."""
    *chunks, last = (chunk for view in views for chunk in view.split(chunk_size))
    with encoder.no_sync():
        z = [encoder(chunk) for chunk in chunks]
    loss_fn(*torch.cat([*z, encoder(last)]).chunk(2)).backward()


def step_on_ranks(views, step, loss_fn, **options):
    """Run two steps; return the gradients of the second, and embeddings that reveal the state afterwards. The initial
    state differs between the ranks."""
    torch.manual_seed(1)
    encoder = DistributedDataParallel(Assigned(), **options)
    encoder.module.transient.mul_(1 + dist.get_rank())  # overwritten by the first rank's broadcast
    for _ in range(2):
        encoder.zero_grad()
        step(encoder, views, loss_fn, chunk_size=2)
    return [g.clone() for g in gradients(encoder)], encoder.module(views[0]).detach()


def cached_on_ranks():
    """Return cached and uncached results for each set-up, and the error of each unsupported one."""
    generator = torch.Generator().manual_seed(1)
    views = [view.split((6, 4))[dist.get_rank()] for view in torch.randn(2, 10, 6, generator=generator)]
    loss_fn = NTXentLoss(0.2, group=dist.group.WORLD)
    found: dict[str, Any] = {}
    for name in ("find_unused_parameters", "gradient_as_bucket_view"):
        options = {name: True}
        found[name] = [step_on_ranks(views, step, loss_fn, **options) for step in (cached_backward, replicated_step)]

    ends = []
    for step in (cached_backward, chunked_step):
        torch.manual_seed(1)
        encoder = fully_shard(Assigned(), mesh=init_device_mesh("cpu", (2,)))
        step(encoder, [view[:4] for view in views], loss_fn, chunk_size=2)  # every rank has the same number of chunks
        ends.append(([g.full_tensor() for g in gradients(encoder)], encoder(views[0]).detach()))
    found["fully_shard"] = ends

    torch.manual_seed(1)
    towers, whole = [view.split((6, 4))[dist.get_rank()] for view in tower_views()], Towers()
    replica = DistributedDataParallel(copy.deepcopy(whole), find_unused_parameters=True)
    loss = cached_backward(replica, towers, loss_fn, chunk_size=2)
    expected = chunked_step(whole, tower_views(), loss_of, chunk_size=10)
    found["towers"] = (loss, gradients(replica)), (expected, gradients(whole))

    for name, both, options in (
        ("a tower without find_unused_parameters", Towers(), {}),
        ("a last view without a gradient", Towers(), {"find_unused_parameters": True}),
        ("a static graph", Towers(), {"static_graph": True}),
    ):
        both.tokens.requires_grad_(name != "a last view without a gradient")
        try:
            cached_backward(DistributedDataParallel(both, **options), towers, loss_fn, chunk_size=3)
        except (RuntimeError, ValueError) as error:
            found[name] = str(error)
    return found


@pytest.fixture(scope="module")
def of_ranks():
    return on_ranks(2, cached_on_ranks)


@pytest.mark.parametrize(
    "how",
    [
        "find_unused_parameters",
        "gradient_as_bucket_view",
        "fully_shard",
        "towers",
    ],
)
def test_cached_backward_on_ranks_equals_the_uncached_step(of_ranks, how):
    for found in of_ranks:
        torch.testing.assert_close(*found[how])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("a tower without find_unused_parameters", "find_unused_parameters=True"),
        ("a last view without a gradient", "reorder views so that its last view has a gradient"),
        ("a static graph", "with static_graph=True"),
    ],
)
def test_cached_backward_on_ranks_raises_if_a_gradient_would_not_be_averaged(of_ranks, how, message):
    for found in of_ranks:
        assert message in found[how]
