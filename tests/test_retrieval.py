"""Streamed cosine search, and measures of a representation."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import fastntxent
from fastntxent import contrastive_accuracy, effective_rank, positive_ranks, retrieve, zero_shot_classify
from fastntxent.ops import ranks
from fastntxent.ops import search as module
from tests.cases import LargestTensor

ROOT = Path(__file__).resolve().parents[1]


def signs(rows, d, seed):
    """Return rows of 1 and -1. Their cosine similarities are exact, and many are tied."""
    return torch.randint(0, 2, (rows, d), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


@pytest.fixture
def tile(monkeypatch):
    """Return a function that sets the rows and columns of a tile."""

    def set_tile(rows, columns):
        for name, value in {"_QUERIES": rows, "_COLUMNS": columns, "_COLUMNS_PER_K": 1, "_TIED": 2 * columns}.items():
            monkeypatch.setattr(module, name, value)

    return set_tile


@given(
    q=st.integers(1, 9),
    c=st.integers(1, 40),
    d=st.sampled_from([1, 4, 16]),
    k=st.integers(1, 40),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 17)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_retrieve_equals_a_stable_sort_of_all_scores(tile, q, c, d, k, shape, dtype, seed):
    k = min(k, c)
    queries, corpus = signs(q, d, seed).to(dtype), signs(c, d, seed + 1).to(dtype)
    tile(*shape)
    found = retrieve(3 * queries, corpus / 7, k)
    classes = zero_shot_classify(queries, corpus)
    scores, indices = (queries @ corpus.T / d).sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.indices, indices[:, :k])
    torch.testing.assert_close(found.scores, scores[:, :k], rtol=1e-6, atol=1e-6)
    assert torch.equal(classes.classes, indices[:, 0])
    torch.testing.assert_close(classes.scores, scores[:, 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("k", "compiled"), [(1, False), (2, False), (7, False), (300, False), (1999, False), (2000, False), (7, True)]
)
def test_retrieve_returns_the_lowest_indices_among_equal_rows(k, compiled):
    corpus = signs(3, 16, 0)[torch.randint(0, 3, (2000,), generator=torch.Generator().manual_seed(1))]
    corpus[5::11] = torch.nan
    queries = signs(20, 16, 2)
    queries[4] = torch.nan
    search = torch.compile(retrieve, backend="eager", fullgraph=True) if compiled else retrieve
    sims = (queries @ corpus.T / 16).nan_to_num(nan=-torch.inf)
    scores, indices = sims.sort(dim=1, descending=True, stable=True)
    found = search(queries, corpus, k)
    assert torch.equal(found.indices, indices[:, :k])
    torch.testing.assert_close(found.scores, scores[:, :k])


@pytest.mark.parametrize(
    "function",
    [
        lambda z: retrieve(z, z, 2).indices,
        lambda z: zero_shot_classify(z, z).classes,
        lambda z: positive_ranks(z, z.flip(0)),
    ],
)
def test_searches_compile_to_at_most_two_graphs_for_all_sizes(function):
    graphs = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(function, backend=graphs, fullgraph=True)
    for rows in range(8, 32, 4):
        z = torch.randn(rows, 5)
        assert torch.equal(compiled(z), function(z))
    assert graphs.frame_count <= 2  # one for the first size, one for all others


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_retrieve_is_accurate_in_every_dtype(dtype):
    queries, corpus = torch.randn(30, 8).to(dtype), torch.randn(90, 8).to(dtype)
    found = retrieve(queries, corpus, 5)
    expected = F.normalize(queries.double(), dim=1) @ F.normalize(corpus.double(), dim=1).T
    assert found.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.scores.double(), expected.topk(5).values, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.indices, expected.topk(5).indices)


def test_retrieve_can_return_the_whole_corpus_and_accepts_zero_rows():
    corpus = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    assert retrieve(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), corpus, 3).indices.tolist() == [[1, 0, 2], [0, 1, 2]]


def test_retrieve_never_holds_all_scores():
    queries, corpus = torch.randn(4000, 4), torch.randn(20000, 4)
    with LargestTensor() as largest:
        retrieve(queries, corpus, 10)
        zero_shot_classify(queries, corpus)
    assert largest.numel <= module._TILE_BYTES // 4


# Limits in MiB on the memory that a call adds in a fresh process. They are close to what the docstrings promise. A
# search uses a tile of 32 MiB, the unit rows of the tile's queries and columns (5 MiB at 128 features in float32), and
# at most 32 MiB more (16 MiB for zero_shot_classify). positive_ranks uses 16 MiB of similarities plus O(N D).
PEAKS = {
    "retrieve(torch.randn(2500, 128), torch.randn(30000, 128), 10)": 64,
    "retrieve(torch.randn(200, 16), torch.randn(60000, 16), 500)": 72,
    "retrieve(torch.ones(2500, 128), torch.ones(30000, 128), 10)": 64,
    "retrieve(torch.randn(600, 128).double(), torch.randn(30000, 128).double(), 10)": 72,
    "zero_shot_classify(torch.randn(2500, 128).half(), torch.randn(30000, 128).half())": 64,
    "positive_ranks(torch.randn(4000, 16), torch.randn(4000, 16))": 24,
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: ru_maxrss has other units elsewhere")
@pytest.mark.parametrize("call", PEAKS)
def test_memory_stays_within_the_documented_limits(call):
    name, _, arguments = call.partition("(")
    code = f"""
import resource, torch
from fastntxent import {name} as function
torch.set_num_threads(1)
arguments = ({arguments[:-1]})
function(*(x[:9] if isinstance(x, torch.Tensor) else 2 for x in arguments))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
function(*arguments)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) < PEAKS[call]


def test_positive_ranks_equal_a_count(monkeypatch):
    z_i, z_j = torch.randn(2, 11, 4, dtype=torch.float64)
    u = F.normalize(torch.cat((z_i, z_j)), dim=1)
    sims = u @ u.T
    expected = [
        1 + sum(bool(sims[i, j] >= sims[i, (i + 11) % 22]) for j in range(22) if j not in (i, (i + 11) % 22))
        for i in range(22)
    ]
    assert positive_ranks(z_i, z_j).tolist() == expected
    monkeypatch.setattr(ranks, "_TILE", 50)
    assert positive_ranks(z_i, z_j).tolist() == expected
    assert float(contrastive_accuracy(z_i, z_j)) == pytest.approx(expected.count(1) / 22)


def test_positive_ranks_of_a_collapsed_batch_are_the_worst():
    z = torch.ones(8, 4)
    assert positive_ranks(z, z).tolist() == [15] * 16
    assert contrastive_accuracy(z, z) == 0
    assert positive_ranks(z[:1], z[:1]).tolist() == [1, 1]


def test_positive_ranks_never_hold_all_pairs(monkeypatch):
    monkeypatch.setattr(ranks, "_TILE", 2**14)
    z_i, z_j = torch.randn(2, 1000, 4)
    with LargestTensor() as largest:
        positive_ranks(z_i, z_j)
    assert largest.numel <= 2**14


def test_effective_rank_of_known_matrices():
    assert float(effective_rank(torch.eye(7))) == pytest.approx(7, rel=1e-5)
    assert float(effective_rank(torch.ones(9, 5))) == pytest.approx(1, abs=1e-4)
    assert float(effective_rank(torch.zeros(3, 2))) == 0
    assert effective_rank(torch.tensor([[1.0, 2.0], [3.0, torch.nan]])).isnan()
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert float(effective_rank(torch.diag(4 * p))) == pytest.approx(2**1.5, rel=1e-12)


def test_effective_rank_is_invariant_to_rotation_and_differentiable():
    z = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    torch.testing.assert_close(effective_rank(z @ rotation), effective_rank(z))
    assert torch.autograd.gradcheck(effective_rank, z)
    assert effective_rank(z.detach().bfloat16()).dtype == torch.float32


BAD_CALLS = {
    "queries": (lambda: retrieve([[1.0]], torch.eye(2), 1), TypeError, "queries must be a torch.Tensor, got list"),
    "corpus rank": (lambda: retrieve(torch.eye(2), torch.ones(2), 1), ValueError, "corpus must have 2 dimensions"),
    "features": (lambda: retrieve(torch.eye(2), torch.eye(3), 1), ValueError, "queries and corpus.*features, got 2"),
    "dtypes": (lambda: retrieve(torch.eye(2), torch.eye(2).double(), 1), ValueError, "same dtype"),
    "k 0": (lambda: retrieve(torch.eye(2), torch.eye(2), 0), ValueError, "k must be at least 1, got 0"),
    "k 3": (lambda: retrieve(torch.eye(2), torch.eye(2), 3), ValueError, r"k must be in \[1, 2\].*got 3"),
    "k text": (lambda: retrieve(torch.eye(2), torch.eye(2), "all"), TypeError, "k must be an int, got str"),
    "k bool": (lambda: retrieve(torch.eye(2), torch.eye(2), True), TypeError, "k must be an int, got bool"),
    "classes": (lambda: zero_shot_classify(torch.eye(2), None), TypeError, "class_features must be a torch.Tensor"),
    "ranks": (lambda: positive_ranks(torch.eye(2), torch.eye(3)), ValueError, "same shape"),
    "effective rank": (lambda: effective_rank(torch.ones(3)), ValueError, "z must have 2 dimensions"),
    "uniformity t": (lambda: fastntxent.uniformity(torch.eye(2), t="2"), TypeError, "t must be a number, got str"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_raises_an_error_that_describes_it(case):
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("k", [1, 3, 5])
def test_retrieve_puts_nan_last(k):
    corpus = torch.eye(5)
    corpus[1, 2] = torch.nan
    queries = torch.tensor([[3.0, 1.0, 2.0, 0.5, -1.0], [torch.nan] * 5])
    scores, indices = retrieve(queries, corpus, k)
    assert indices[0].tolist() == [0, 2, 3, 4, 1][:k]
    assert scores[0, -1].isinf() == (k == 5)
    assert scores[1].eq(-torch.inf).all()
    assert indices[1].tolist() == list(range(k))
