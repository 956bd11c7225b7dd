"""The queue of negatives and its loss, compared with a plain list of all pushed rows."""

import copy
import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastntxent import NegativeQueue, QueueInfoNCELoss, info_nce
from tests import dense
from tests.cases import BACKENDS
from tests.tiers import every_pair


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(size=st.integers(1, 12), batches=st.lists(st.integers(1, 30), max_size=8), with_ids=st.booleans())
@settings(max_examples=200, deadline=None)
def test_queue_holds_the_last_rows(size, batches, with_ids):
    queue, pushed, pushed_ids = NegativeQueue(size, 3, dtype=torch.float64), [], []
    for step, n in enumerate(batches):
        z, ids = normal(n, 3, seed=step), torch.arange(n) + 100 * step
        queue.push(5 * z, ids if with_ids else None)
        pushed += F.normalize(z, dim=1).tolist()
        pushed_ids += ids.tolist()
    assert len(queue) == min(size, len(pushed))
    assert queue.rows.shape == (len(queue), 3)
    torch.testing.assert_close(sorted(queue.rows.tolist()), sorted(pushed[-size:]))
    if with_ids:
        assert sorted(queue.ids.tolist()) == sorted(pushed_ids[-size:])


def oracle(query, key, tau, held, in_batch, ids=None, held_ids=None):
    """Return the loss of each query, with the rows in the queue as its explicit negatives."""
    losses = []
    for n in range(len(query)):
        rows = [held[j] for j in range(len(held)) if ids is None or held_ids[j] != ids[n]]
        if in_batch:
            group = range(len(key)) if ids is None else ids
            rows += [key[m] for m in range(len(key)) if group[m] != group[n]]
        one = slice(n, n + 1)
        negatives = torch.stack(rows)[None] if rows else None
        losses.append(dense.info_nce(query[one], key[one], tau, negatives=negatives, in_batch=False))
    return torch.cat(losses)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("with_ids", [True, False])
@pytest.mark.parametrize("size", [1, 5, 8, 100])
def test_queue_loss_equals_its_dense_formula_at_every_step(size, with_ids, in_batch, backend):
    loss = QueueInfoNCELoss(
        size, 4, 0.3, in_batch_negatives=in_batch, queue_dtype=torch.float64, reduction="none", backend=backend
    )
    held: list = []
    held_ids: list = []
    for step, n in enumerate([3, 3, 7, 1, 4]):  # batch sizes that divide the queue's size, and others that do not
        query, key = (normal(n, 4, seed=10 * step + i).requires_grad_() for i in (0, 1))
        ids = torch.randint(0, 6, (n,), generator=torch.Generator().manual_seed(step)) if with_ids else None
        value = loss(query, key, ids)
        unit = [F.normalize(z, dim=1) for z in (query, key)]
        expected = oracle(
            *unit, torch.tensor(0.3).double(), held, in_batch, ids.tolist() if with_ids else None, held_ids
        )
        torch.testing.assert_close(value, expected)
        weights = torch.linspace(1, 2, n, dtype=torch.float64)
        # The queue has changed since the forward. The gradient must use the rows held during the forward.
        for v, e in zip(
            torch.autograd.grad((value * weights).sum(), (query, key)),
            torch.autograd.grad((expected * weights).sum(), (query, key)),
            strict=True,
        ):
            torch.testing.assert_close(v, e)
        held = (held + list(unit[1].detach()))[-size:]
        held_ids = (held_ids + (ids.tolist() if with_ids else [None] * n))[-size:]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_neg_lse_has_the_same_dtype_for_an_empty_queue(dtype):
    queue, u = NegativeQueue(4, 3), torch.eye(3, dtype=dtype)
    empty = queue.neg_lse(u, None, 1.0, "auto")
    queue.push(u)
    assert empty.dtype == queue.neg_lse(u, None, 1.0, "auto").dtype
    assert (empty == -torch.inf).all()


def test_empty_queue_has_no_negatives():
    query, key = normal(4, 3), normal(4, 3, seed=1)
    loss = QueueInfoNCELoss(8, 3, 0.2, in_batch_negatives=False)
    assert loss(query.requires_grad_(), key) == 0
    both = QueueInfoNCELoss(8, 3, 0.2)
    torch.testing.assert_close(both(query, key), info_nce(query, key, 0.2))


def test_queue_rows_without_ids_are_negatives_of_every_id():
    queue = NegativeQueue(4, 2)
    queue.push(torch.eye(2))
    for ids in (None, torch.tensor([-1]), torch.tensor([0])):
        nu = queue.neg_lse(torch.tensor([[1.0, 0.0]]), ids, torch.tensor(1.0), "auto")
        assert float(nu) == pytest.approx(math.log(math.e + 1), rel=1e-6)
    queue.push(torch.eye(2), torch.tensor([5, 6]))
    ids = torch.tensor([5])
    nu = queue.neg_lse(torch.tensor([[1.0, 0.0]]), ids, torch.tensor(1.0), "auto")
    assert float(nu) == pytest.approx(math.log(math.e + 2), rel=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_restored_queue_continues_like_the_saved_one(tmp_path, steps):
    def step(loss, seed):
        return loss(normal(3, 4, seed=seed).float(), normal(3, 4, seed=seed + 50).float(), torch.arange(3) + seed)

    loss = QueueInfoNCELoss(5, 4, 0.2)
    for seed in range(steps):
        step(loss, seed)
    torch.save(loss.state_dict(), tmp_path / "loss.pt")
    restored = QueueInfoNCELoss(5, 4, 0.2)
    restored.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
    twin = copy.deepcopy(loss)
    for seed in range(steps, steps + 3):
        expected = step(loss, seed)
        assert torch.equal(step(restored, seed), expected)
        assert torch.equal(step(twin, seed), expected)


@pytest.mark.parametrize(
    ("state", "error"),
    [(torch.tensor([5, 5]), ValueError), (None, TypeError), (torch.ones(2), TypeError), ((0, 0), TypeError)],
)
def test_queue_rejects_an_invalid_extra_state_and_stays_unchanged(state, error):
    queue = filled_queue()
    before = contents(queue)
    with pytest.raises(error, match=r"cannot hold|must be a tensor of two integers"):
        queue.set_extra_state(state)
    assert_holds(queue, before)


def filled_queue(n=3, size=5, dim=4, seed=0, **options):
    queue = NegativeQueue(size, dim, **options)
    queue.push(normal(n, dim, seed=seed), torch.arange(n))
    return queue


def contents(queue):
    return copy.deepcopy((queue.pointer, queue.filled, queue._rows, queue._ids))


def assert_holds(queue, expected):
    assert (queue.pointer, queue.filled) == expected[:2]
    assert torch.equal(queue._rows, expected[2])
    assert torch.equal(queue._ids, expected[3])


def with_nan(state):
    state["_rows"][1, 1] = math.nan


def of_cursor(*cursor, dtype=torch.int64):
    return lambda state: state.update(_extra_state=torch.tensor(cursor, dtype=dtype))


SPOILED = {
    "fewer rows": lambda state: state.update(_rows=torch.randn(4, 4)),
    "different number of features": lambda state: state.update(_rows=torch.randn(5, 3)),
    "rows of integers": lambda state: state.update(_rows=torch.ones(5, 4, dtype=torch.int64)),
    "rows are None": lambda state: state.update(_rows=None),
    "rows on meta": lambda state: state.update(_rows=torch.empty(5, 4, device="meta")),
    "a NaN among the rows": with_nan,
    "fewer ids": lambda state: state.update(_ids=torch.arange(4)),
    "ids of floats": lambda state: state.update(_ids=torch.ones(5)),
    "filled beyond the size": of_cursor(0, 6),
    "pointer beyond the size": of_cursor(5, 5),
    "pointer below zero": of_cursor(-1, 5),
    "filled below zero": of_cursor(-1, -1),
    "pointer not after the last row": of_cursor(1, 4),
    "a cursor of floats": of_cursor(4.0, 4.0, dtype=torch.float64),
    "a cursor of three numbers": of_cursor(4, 4, 4),
    "no cursor": lambda state: state.update(_extra_state=None),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", SPOILED)
def test_queue_that_rejects_a_state_dict_stays_unchanged(name, assign):
    state = copy.deepcopy(filled_queue(4, seed=1).state_dict())
    SPOILED[name](state)
    parent = torch.nn.ModuleDict({"moco": filled_queue()})
    before = contents(parent["moco"])
    with pytest.raises(RuntimeError, match=r"moco\._(rows|ids|extra_state)"):
        parent.load_state_dict({f"moco.{key}": value for key, value in state.items()}, strict=False, assign=assign)
    assert_holds(parent["moco"], before)


@pytest.mark.parametrize("left_out", [{"_rows"}, {"_ids"}, {"_extra_state"}, {"_rows", "_ids"}])
def test_queue_loads_nothing_from_an_incomplete_state_dict(left_out):
    state = {key: value for key, value in filled_queue(4, seed=1).state_dict().items() if key not in left_out}
    queue = filled_queue()
    before = contents(queue)
    assert set(queue.load_state_dict({**state, "other": torch.ones(1)}, strict=False)[0]) == left_out
    assert_holds(queue, before)
    with pytest.raises(RuntimeError, match="Missing key"):
        queue.load_state_dict(state)
    assert_holds(queue, before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("n", [3, 5, 7])
def test_queue_loads_a_state_dict_of_another_dtype_or_a_saved_module(n, assign, tmp_path):
    saved = filled_queue(n, seed=1, dtype=torch.float64)
    torch.save(saved, tmp_path / "queue.pt")
    same = torch.load(tmp_path / "queue.pt", weights_only=False)
    assert_holds(same, contents(saved))
    queue = filled_queue(2)
    queue.load_state_dict(saved.state_dict(), assign=assign)
    assert queue.rows.dtype == (torch.float64 if assign else torch.float32)
    before = contents(saved)
    for other in (queue, same):
        other.push(torch.eye(4), torch.arange(4))
    assert_holds(saved, before)  # no memory is shared, even after `assign`
    saved.push(torch.eye(4), torch.arange(4))
    torch.testing.assert_close(contents(queue), contents(saved), check_dtype=False)


def test_queue_state_dict_shares_all_buffers_with_the_queue():
    queue = filled_queue()
    state = queue.state_dict()  # shares the module's buffers, as in PyTorch
    queue.push(torch.eye(4))
    before = contents(queue)
    queue.load_state_dict(state)
    assert_holds(queue, before)


def test_queue_that_fails_to_push_stays_unchanged():
    queue = filled_queue()
    before = contents(queue)
    for z, ids in ((torch.ones(2, 4, device="meta"), None), (torch.ones(2, 4), torch.arange(3))):
        with pytest.raises(ValueError, match=r"z must hold values|ids must have shape"):
            queue.push(z, ids)
        assert_holds(queue, before)


@pytest.mark.parametrize("half", [False, True])
def test_queue_moved_to_meta_is_empty(half):
    loss = QueueInfoNCELoss(5, 4)
    loss(torch.eye(4), torch.eye(4))
    loss.to("meta")
    assert len(loss.queue) == 0
    state = filled_queue().state_dict()
    with pytest.raises(RuntimeError, match="meta device"):
        loss.queue.load_state_dict(state)
    loss.to_empty(device="cpu")
    assert len(loss.queue) == 0
    (loss.half() if half else loss).queue.load_state_dict(state)
    assert len(loss.queue) == 3


@every_pair(slow_pairs=True, with_ids=[True, False], in_batch=[True, False])
def test_queue_loss_compiles_to_at_most_two_graphs_for_all_batch_sizes(with_ids, in_batch):
    eager, loss = (QueueInfoNCELoss(40, 4, 0.3, in_batch_negatives=in_batch) for _ in range(2))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for step, n in enumerate((3, 3, 4, 17, 9, 12, 3)):
        query, key = normal(n, 4, seed=step).requires_grad_(), normal(n, 4, seed=step + 50)
        ids = (torch.arange(n) % 3,) if with_ids else ()
        values = [call(query, key, *ids) for call in (eager, compiled)]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(torch.autograd.grad(value, query) for value in values))
        assert_holds(loss.queue, contents(eager.queue))
    assert counter.frame_count <= 2  # one compilation for the first batch size, one for all others


def test_inductor_gradient_of_the_queue_loss_uses_the_rows_held_in_the_forward():
    eager, loss = (QueueInfoNCELoss(8, 4, 0.3) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    pairs = []
    for step in range(3):
        query, key = (normal(5, 4, seed=10 * step + i).float().requires_grad_() for i in (0, 1))
        pairs.append(((query, key), [call(query, key) for call in (eager, compiled)]))
    for inputs, values in pairs:  # the queue has changed since, in the call itself and in later calls
        torch.testing.assert_close(*(torch.autograd.grad(value, inputs) for value in values))


def test_queue_takes_no_rows_in_evaluation_mode():
    loss = QueueInfoNCELoss(5, 4, 0.2).eval()
    z = torch.randn(3, 4)
    assert torch.equal(loss(z, z), loss(z, z))
    assert len(loss.queue) == 0
    loss.train()(z, z)
    assert len(loss.queue) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_queue_in_half_precision_holds_unit_rows_and_gives_accurate_losses(dtype, autocast):
    # The squares of these rows overflow float16, so rows must be normalised in float32 before they are rounded.
    key = (normal(6, 8) * 3000).to(dtype)
    query = normal(6, 8, seed=1).to(dtype).requires_grad_()
    losses = [QueueInfoNCELoss(9, 8, 0.1, queue_dtype=dtype), QueueInfoNCELoss(9, 8, 0.1).to(dtype)]
    for loss in losses:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss(query, key)
            value = loss(query, key)
        assert loss.queue.rows.dtype == dtype
        assert value.dtype == torch.float32
        (gradient,) = torch.autograd.grad(value, query)
        assert gradient.dtype == dtype
        assert gradient.isfinite().all()
        held = loss.queue.rows[:6].double()
        torch.testing.assert_close(held.norm(dim=1), torch.ones(6).double(), rtol=0.01, atol=0)
        unit = [F.normalize(z.detach().double(), dim=1) for z in (query, key)]
        rounded = [row.to(dtype).double() for row in unit[1]]
        expected = oracle(*unit, torch.tensor(0.1).double(), rounded, True).mean()
        assert float(value) == pytest.approx(float(expected), rel=2e-3)


def test_queue_gets_no_gradient_but_keys_do():
    loss = QueueInfoNCELoss(4, 3, 0.2)
    query, key = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    loss(query, key)
    loss(query, key).backward()
    assert query.grad is not None
    assert key.grad is not None
    assert not loss.queue.rows.requires_grad


BAD_CALLS = {
    "size": (lambda: NegativeQueue(0, 2), ValueError, "size must be at least 1, got 0"),
    "size type": (lambda: NegativeQueue(2.0, 2), TypeError, "size must be an int, got float"),
    "dim": (lambda: NegativeQueue(2, 0), ValueError, "dim must be at least 1, got 0"),
    "dtype": (lambda: NegativeQueue(2, 2, dtype=torch.int8), TypeError, "dtype must be a floating-point dtype"),
    "push rank": (lambda: NegativeQueue(2, 2).push(torch.ones(2)), ValueError, "z must have 2 dimensions"),
    "push features": (
        lambda: NegativeQueue(2, 2).push(torch.ones(1, 3)),
        ValueError,
        "z and the queue's rows.*features, got 3 and 2",
    ),
    "push ids": (
        lambda: NegativeQueue(2, 2).push(torch.ones(1, 2), torch.ones(1)),
        TypeError,
        "ids must have an integer dtype",
    ),
    "loss features": (
        lambda: QueueInfoNCELoss(2, 2)(torch.ones(1, 3), torch.ones(1, 3)),
        ValueError,
        "query and the queue's rows",
    ),
    "loss shapes": (
        lambda: QueueInfoNCELoss(2, 2)(torch.ones(1, 2), torch.ones(2, 2)),
        ValueError,
        "query and key must have the same shape",
    ),
    "loss temperature": (lambda: QueueInfoNCELoss(2, 2, -1.0), ValueError, "temperature must be positive"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_raises_an_error_that_describes_it(case):
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()


def test_queue_made_in_inference_mode_accepts_rows_outside_it():
    with torch.inference_mode():
        queue = NegativeQueue(4, 3)
    queue.push(torch.randn(2, 3))
    assert len(queue) == 2


def test_queue_loss_backward_raises_if_the_temperature_was_changed_in_place():
    temperature, query = torch.tensor(0.5), torch.randn(3, 4, requires_grad=True)
    loss = QueueInfoNCELoss(8, 4, temperature)(query, torch.randn(3, 4))
    temperature.fill_(0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_queue_loss_can_be_traced_only_in_evaluation_mode():
    loss, views = QueueInfoNCELoss(8, 4), (torch.randn(3, 4), torch.randn(3, 4))
    with pytest.raises(RuntimeError, match=r"NegativeQueue\.push must not be called under"):
        torch.jit.trace(loss, views, check_trace=False)
    loss(*views)
    traced = torch.jit.trace(loss.eval(), views)
    others = torch.randn(5, 4), torch.randn(5, 4)
    torch.testing.assert_close(traced(*others), loss(*others))
