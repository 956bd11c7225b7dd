"""The drop-in for pytorch-metric-learning's CrossBatchMemory, against the library if it is installed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastntxent.compat import pytorch_metric_learning as ours
from tests.peers import batch, drawn, needs, temperatures

names = st.sampled_from(["NTXentLoss", "SupConLoss"])
MINERS = {
    "none": lambda: None,
    "pairs": lambda: needs("pytorch_metric_learning.miners").PairMarginMiner(pos_margin=0.2, neg_margin=0.6),
    "triplets": lambda: needs("pytorch_metric_learning.miners").TripletMarginMiner(margin=0.1),
}


def memories(name, tau, d, miner="none", size=16):
    """Return our memory around our loss, and the library's memory around the library's loss."""
    theirs = needs("pytorch_metric_learning.losses")
    tau = max(tau, 0.3) if name == "SupConLoss" else tau  # below 0.3, the library skips anchors whose loss rounds to 0
    return [
        library.CrossBatchMemory(getattr(library, name)(tau), d, memory_size=size, miner=MINERS[miner]()).double()
        for library in (ours, theirs)
    ]


def labels_of(n, classes, seed):
    return torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed + 1))


def assert_steps_are_the_same(memories, steps):
    """Compare value, gradient and held rows after each step. A step holds the embeddings and any further arguments."""
    for z, *arguments in steps:
        results = []
        for memory in memories:
            inputs = z.double().requires_grad_()
            value = memory(inputs, *arguments)
            results.append((value.detach(), *torch.autograd.grad(value, inputs), *memory.state_dict().values()))
        torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)


@given(
    n=st.integers(2, 16),
    d=st.integers(2, 8),
    seed=st.integers(0, 2**20),
    tau=temperatures,
    name=names,
    steps=st.integers(1, 4),
    miner=st.sampled_from(list(MINERS)),
)
@drawn
def test_memory_equals_the_library(n, d, seed, tau, name, steps, miner):
    both = memories(name, tau, d, miner)
    assert_steps_are_the_same(
        both, [(batch(1, n, d, seed + step)[0][0], labels_of(n, 3, seed + step)) for step in range(steps)]
    )


@given(n=st.integers(1, 12), k=st.integers(1, 12), seed=st.integers(0, 2**20), tau=temperatures, name=names)
@drawn
def test_enqueue_mask_gives_the_librarys_results(n, k, seed, tau, name):
    both = memories(name, tau, 4)
    mask = torch.randperm(n + k, generator=torch.Generator().manual_seed(seed)) < k
    steps = [(batch(1, n + k, 4, seed + step)[0][0], labels_of(n + k, 3, seed + step)) for step in range(3)]
    assert_steps_are_the_same(both, [(*step, None, mask) for step in steps])


@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("given_as", ["pairs", "triplets"])
@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_given_pairs_are_added_to_the_miners_pairs_as_in_the_library(name, given_as, miner):
    both = memories(name, 0.5, 4, miner)
    z, labels = batch(1, 8, 4, 0)[0][0], torch.arange(8) % 3
    anchors, positives = torch.where((labels[:, None] == labels).fill_diagonal_(False))
    indices = (anchors, positives, *torch.where(labels[:, None] != labels))
    if given_as == "triplets":
        indices = (anchors, positives, (anchors + 1) % 9 % 8)
        kept = labels[indices[0]] != labels[indices[2]]
        indices = tuple(index[kept] for index in indices)
    assert_steps_are_the_same(both, [(z, labels, indices)])


def test_a_row_is_not_a_positive_of_its_copy_even_in_a_batch_of_one():
    # In a batch of one row, the library counts the row as its own positive.
    memory = ours.CrossBatchMemory(ours.SupConLoss(0.5), 3, memory_size=4)
    z, labels = torch.randn(3, 3), torch.tensor([0, 1, 0])
    memory(z[:1], labels[:1])
    memory(z[1:2], labels[1:2])
    expected = ours.SupConLoss(0.5)(z[2:], indices_tuple=tuple(map(torch.tensor, ([0], [0], [0], [1]))), ref_emb=z)
    assert expected == 0  # with one positive and one negative pair, the loss is 0, as in the library
    assert memory(z[2:], labels[2:]) == 0
    assert memory(z[:1], labels[:1]) > 0


def test_a_batch_that_adds_no_row_leaves_the_memory_as_it_is():
    # After this call the library's memory would count as full, although it holds only rows of zeros with label 0.
    memory = ours.CrossBatchMemory(ours.NTXentLoss(), 3, memory_size=4)
    z, labels = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    assert memory(z, labels, enqueue_mask=torch.zeros(4, dtype=torch.bool)) == 0
    assert (memory.queue_idx, memory.has_been_filled) == (0, False)


def test_gradient_uses_the_rows_held_when_the_loss_was_computed():
    distance = type("DotProductSimilarity", (), {"normalize_embeddings": False})()
    gradients = []
    for later in (False, True):
        memory = ours.CrossBatchMemory(ours.NTXentLoss(0.5, distance=distance), 3, memory_size=6)
        z = torch.arange(18.0).view(6, 3).sin().requires_grad_()
        value = memory(z, torch.arange(6) % 2)
        if later:
            memory(torch.ones(6, 3), torch.arange(6))
        gradients.append(torch.autograd.grad(value, z)[0])
    torch.testing.assert_close(*gradients)


def test_memory_names_its_buffers_as_the_library_does():
    memory = ours.CrossBatchMemory(ours.NTXentLoss(), 3, memory_size=4)
    z = torch.randn(3, 3)
    memory(z, torch.tensor([5, 6, 7]))
    assert list(memory.state_dict()) == ["embedding_memory", "label_memory"]
    torch.testing.assert_close(memory.embedding_memory[:3], z)
    assert memory.label_memory.tolist() == [5, 6, 7, 0]
    memory.add_to_memory(z[:2], torch.tensor([8, 9]), 2)
    assert memory.label_memory.tolist() == [9, 6, 7, 8]
    assert memory.curr_batch_idx.tolist() == [3, 0]
    memory.reset_queue()
    assert memory.queue_idx == 0
    assert not memory.embedding_memory.any()


def test_distributed_wrapper_accepts_our_memory_and_the_librarys():
    (z,), labels = batch(1, 12, 4, 0)
    mask = torch.arange(12) % 2 == 0
    for module in (ours, needs("pytorch_metric_learning.losses")):
        values = []
        for wrap in (lambda memory: memory, ours.DistributedLossWrapper):
            loss = wrap(module.CrossBatchMemory(ours.SupConLoss(0.5), 4, memory_size=32))
            values.append((loss(z, labels), loss(z, labels, enqueue_mask=mask)))
        torch.testing.assert_close(*values)
    with pytest.raises(ValueError, match="ref_emb and ref_labels must be None with a CrossBatchMemory"):
        loss(z, labels, ref_emb=z)


def test_invalid_arguments_are_named():
    memory = ours.CrossBatchMemory(ours.NTXentLoss(), 3, memory_size=4)
    z, labels, mask = torch.randn(5, 3), torch.arange(5), torch.ones(5, dtype=torch.bool)
    with pytest.raises(TypeError, match="loss must be NTXentLoss or SupConLoss of fastntxent"):
        ours.CrossBatchMemory(torch.nn.Identity(), 3)
    with pytest.raises(ValueError, match="embedding_size must be at least 1, got 0"):
        ours.CrossBatchMemory(ours.NTXentLoss(), 0)
    with pytest.raises(TypeError, match="memory_size must be an int, got float"):
        ours.CrossBatchMemory(ours.NTXentLoss(), 3, 2.5)
    with pytest.raises(ValueError, match=r"at most 4 rows \(memory_size\) can be added in one call, got 5"):
        memory(z, labels)
    with pytest.raises(ValueError, match=r"at most 4 rows \(memory_size\) can be added in one call, got 5"):
        memory(z, labels, enqueue_mask=mask)
    with pytest.raises(ValueError, match="embeddings and the memory's rows must have the same number of features"):
        memory(z[:, :2], labels)
    with pytest.raises(ValueError, match=r"labels must have shape \(5,\), one per row, got \(5, 1\)"):
        memory(z, labels[:, None])
    with pytest.raises(ValueError, match=r"enqueue_mask must be bool of shape \(5,\), got torch.bool of shape \(4,\)"):
        memory(z, labels, enqueue_mask=mask[:4])
    with pytest.raises(ValueError, match="indices_tuple and enqueue_mask must not both be given"):
        memory(z, labels, (labels, labels, labels), mask)
