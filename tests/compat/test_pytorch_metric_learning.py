"""fastntxent.compat.pytorch_metric_learning against the library, if it is installed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastntxent.compat import pytorch_metric_learning as ours
from tests.peers import assert_same, batch, drawn, needs, sizes

names = st.sampled_from(["NTXentLoss", "SupConLoss"])
temperatures = st.floats(0.1, 2)
few = {**sizes, "n": st.integers(1, 12)}


def losses(name, tau, distance="CosineSimilarity", reducer=None, **options):
    make = getattr(needs("pytorch_metric_learning.distances"), distance)
    theirs = getattr(needs("pytorch_metric_learning.losses"), name)
    return (cls(tau, distance=make(**options), reducer=reducer) for cls in (getattr(ours, name), theirs))


def warm(name, tau):
    """Return a temperature at which no SupCon loss rounds to 0. The library skips anchors whose loss is 0."""
    return max(tau, 0.3) if name == "SupConLoss" else tau


def labels_of(n, classes, seed):
    return torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed + 1))


@given(**few, tau=temperatures, name=names, classes=st.integers(1, 6), dot=st.booleans())
@drawn
def test_loss_with_labels_agrees_with_the_library(n, d, seed, tau, name, classes, dot):
    options = {"normalize_embeddings": False} if dot else {}
    tau = warm(name, tau)
    mine, theirs = losses(name, tau, "DotProductSimilarity" if dot else "CosineSimilarity", **options)
    (z,), _ = batch(1, n, d, seed)
    z = torch.nn.functional.normalize(z, dim=1) * 1.2 if dot else z
    labels = labels_of(n, classes, seed)
    assert_same(lambda z: mine(z, labels), lambda z: theirs(z, labels), tau, z)


@given(**few, tau=temperatures, name=names, classes=st.integers(1, 6), k=st.integers(1, 15), own=st.booleans())
@drawn
def test_loss_with_references_agrees_with_the_library(n, d, seed, tau, name, classes, k, own):
    tau = warm(name, tau)
    mine, theirs = losses(name, tau)
    (z,), _ = batch(1, n, d, seed)
    (ref,), _ = batch(1, n if own else k, d, seed + 3)
    labels = labels_of(n, classes, seed)
    ref_labels = labels if own else labels_of(k, classes, seed + 3)

    def loss(function):
        return lambda z, ref: function(z, labels, ref_emb=ref, ref_labels=ref_labels)

    assert_same(loss(mine), loss(theirs), tau, z, ref)


@given(**few, tau=temperatures, name=names, classes=st.integers(1, 6), itself=st.booleans())
@drawn
def test_references_without_labels_get_the_labels_of_the_rows_as_in_the_library(n, d, seed, tau, name, classes, itself):
    tau = warm(name, tau)
    mine, theirs = losses(name, tau)
    (z,), _ = batch(1, n, d, seed)
    (ref,), _ = batch(1, n, d, seed + 3)
    labels = labels_of(n, classes, seed)

    def loss(function):
        return lambda z, ref: function(z, labels, ref_emb=z if itself else ref)

    assert_same(loss(mine), loss(theirs), tau, z, ref)


REDUCERS = {
    "mean": lambda r: r.MeanReducer(),
    "sum": lambda r: r.SumReducer(),
    "non-zero": lambda r: r.AvgNonZeroReducer(),
    "above": lambda r: r.ThresholdReducer(low=0.7),
    "below": lambda r: r.ThresholdReducer(high=1.5),
    "between": lambda r: r.ThresholdReducer(low=0.5, high=2),
    "never": lambda r: r.ThresholdReducer(low=1e4),
    "classes": lambda r: r.ClassWeightedReducer(torch.tensor([0.5, 2.0, 0.0, 1.5, 3.0, 0.1])),
    "anchors": lambda r: r.PerAnchorReducer(),
    "anchors, non-zero": lambda r: r.PerAnchorReducer(r.AvgNonZeroReducer()),
    "anchors, custom aggregation": lambda r: r.PerAnchorReducer(aggregation_func=lambda x, n: x.amax(dim=1) + n),
    "several": lambda r: r.MultipleReducers({"loss": r.SumReducer()}),
    "nothing": lambda r: r.DoNothingReducer(),
}


@given(
    **few,
    tau=temperatures,
    name=names,
    classes=st.integers(1, 6),
    of=st.sampled_from(["labels", "references", "pairs"]),
)
@pytest.mark.parametrize("reducer", REDUCERS)
@settings(drawn, max_examples=40)
def test_reducers_agree_with_the_library(reducer, n, d, seed, tau, name, classes, of):
    tau = warm(name, tau)
    reducers = needs("pytorch_metric_learning.reducers")
    mine, theirs = losses(name, tau, reducer=REDUCERS[reducer](reducers))
    (z,), _ = batch(1, n, d, seed)
    (ref,), _ = batch(1, n, d, seed + 3)
    labels, ref_labels = labels_of(n, classes, seed), labels_of(n, classes, seed + 3)
    matches = labels[:, None] == ref_labels
    pairs = (*torch.where(matches), *torch.where(~matches))
    again = torch.randint(0, max(len(pairs[0]), 1), (5,), generator=torch.Generator().manual_seed(seed))
    # Repeat some positive pairs, but not for per-anchor reducers. The library's per-anchor reducers count a repeated
    # pair in the gradient but not in the value.
    if len(pairs[0]) and not reducer.startswith("anchors"):
        pairs = (*(torch.cat((index, index[again])) for index in pairs[:2]), *pairs[2:])

    def loss(function):
        def call(z, ref):
            if of == "labels":
                value = function(z, labels)
            elif of == "pairs":
                value = function(z, labels, pairs, ref)
            else:
                value = function(z, labels, ref_emb=ref, ref_labels=ref_labels)
            return sums_of(value["loss"], z) if reducer == "nothing" else value

        return call

    assert_same(loss(mine), loss(theirs), tau, z, ref)


def sums_of(info, z):
    """Return one number that depends on everything that a loss returns."""
    losses, indices, kind = info["losses"], info["indices"], info["reduction_type"]
    if kind == "already_reduced":
        assert indices is None
        assert losses == 0
        return (z * 0).sum()
    numbers = indices if kind == "element" else indices[0] * 100 + indices[1]
    return (losses * (numbers + 1) / 1000).sum()  # larger weights would overflow in the library's gradient


def test_reducer_of_the_self_supervised_loss_agrees_with_the_library():
    reducers, theirs = needs("pytorch_metric_learning.reducers"), needs("pytorch_metric_learning.losses")
    z, ref = batch(2, 6, 4, 0)[0]
    for symmetric in (True, False):
        mine, library = losses("NTXentLoss", 0.5, reducer=reducers.SumReducer())
        mine, library = ours.SelfSupervisedLoss(mine, symmetric), theirs.SelfSupervisedLoss(library, symmetric)
        assert_same(mine, library, 0.5, z, ref)


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_per_anchor_reducer_works_with_more_references_than_rows(name):
    # The library's reducer holds a square matrix (rows x rows), even if there are more references than rows.
    reducers = needs("pytorch_metric_learning.reducers")
    z, ref, labels = torch.randn(6, 3), torch.randn(11, 3), torch.arange(11) % 3
    mine = getattr(ours, name)(0.5, reducer=reducers.PerAnchorReducer(reducers.SumReducer()))
    whole = getattr(ours, name)(0.5, reducer=reducers.DoNothingReducer())
    value = mine(z, labels[:6], ref_emb=ref, ref_labels=labels)
    info = whole(z, labels[:6], ref_emb=ref, ref_labels=labels)["loss"]
    means = info["losses"]
    if name == "NTXentLoss":
        means = torch.stack([means[info["indices"][0] == anchor].mean() for anchor in range(6)])
    torch.testing.assert_close(value, means.sum())
    pairs = (*info["indices"], *torch.where(labels[:6, None] != labels)) if name == "NTXentLoss" else None
    if pairs:
        again = tuple(index[torch.arange(len(index)).repeat(2)[1:]] for index in pairs[:2])
        values = [mine(z, None, (*positives, *pairs[2:]), ref) for positives in (pairs[:2], again)]
        torch.testing.assert_close(values, [value, value])


@given(**few, tau=temperatures, name=names, k=st.integers(1, 15), p=st.integers(0, 30), q=st.integers(0, 30))
@drawn
def test_loss_with_pairs_agrees_with_the_library(n, d, seed, tau, name, k, p, q):
    tau = warm(name, tau)
    mine, theirs = losses(name, tau)
    (z,), _ = batch(1, n, d, seed)
    (ref,), _ = batch(1, k, d, seed + 3)
    generator = torch.Generator().manual_seed(seed)

    def index(size, high):
        return torch.randint(0, high, (size,), generator=generator)

    # Random pairs, some of them repeated. The parity of a + b decides their kind, so no pair is of both kinds.
    a1, b1, a2, b2 = index(p, n), index(p, k), index(q, n), index(q, k)
    kept1, kept2 = (a1 + b1) % 2 == 0, (a2 + b2) % 2 == 1
    pairs = (a1[kept1], b1[kept1], a2[kept2], b2[kept2])

    def loss(function):
        return lambda z, ref: function(z, indices_tuple=pairs, ref_emb=ref)

    assert_same(loss(mine), loss(theirs), tau, z, ref)


@given(**few, tau=temperatures, name=names, classes=st.integers(1, 4), t=st.integers(0, 40))
@drawn
def test_loss_with_triplets_agrees_with_the_library(n, d, seed, tau, name, classes, t):
    tau = warm(name, tau)
    mine, theirs = losses(name, tau)
    (z,), _ = batch(1, n, d, seed)
    labels = labels_of(n, classes, seed)
    a, p, negative = torch.randint(0, n, (3, t), generator=torch.Generator().manual_seed(seed))
    kept = (labels[a] == labels[p]) & (a != p) & (labels[a] != labels[negative])
    triplets = (a[kept], p[kept], negative[kept])
    assert_same(lambda z: mine(z, labels, triplets), lambda z: theirs(z, labels, triplets), tau, z)


@given(**few, tau=temperatures, name=names, symmetric=st.booleans())
@drawn
def test_self_supervised_loss_agrees_with_the_library(n, d, seed, tau, name, symmetric):
    tau = warm(name, tau)
    mine, theirs = losses(name, tau)
    mine = ours.SelfSupervisedLoss(mine, symmetric)
    theirs = needs("pytorch_metric_learning.losses").SelfSupervisedLoss(theirs, symmetric)
    assert_same(mine, theirs, tau, *batch(2, n, d, seed)[0])


@given(**few, tau=temperatures, name=names, steps=st.integers(1, 4))
@drawn
def test_librarys_memory_accepts_our_loss(n, d, seed, tau, name, steps):
    tau = warm(name, tau)
    memory = needs("pytorch_metric_learning.losses").CrossBatchMemory
    memories = [memory(loss, d, memory_size=16).double() for loss in losses(name, tau)]
    for step in range(steps):
        (z,), _ = batch(1, n, d, seed + step)
        labels = labels_of(n, 3, seed + step)
        results = []
        for loss in memories:
            inputs = z.double().requires_grad_()
            value = loss(inputs, labels)
            results.append((value.detach(), *torch.autograd.grad(value, inputs)))
        torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.float32, torch.bool]
)
def test_labels_may_have_any_dtype(name, dtype):
    loss = getattr(ours, name)()
    z, ref = torch.randn(6, 3), torch.randn(4, 3)
    labels = torch.tensor([0, 1, 0, 1, 1, 1])
    expected, with_ref = loss(z, labels), loss(z, labels, ref_emb=ref, ref_labels=labels[:4])
    assert expected > 0
    torch.testing.assert_close(loss(z, labels.to(dtype)), expected)
    torch.testing.assert_close(loss(z, labels.to(dtype), ref_emb=ref, ref_labels=labels[:4].to(dtype)), with_ref)


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_loss_without_anything_to_compare_is_zero_and_has_a_gradient(name):
    loss = getattr(ours, name)()
    nothing = torch.empty(0, dtype=torch.int64)
    for z, labels, pairs in (
        (torch.randn(4, 3), torch.arange(4), None),  # no positive
        (torch.randn(4, 3), torch.zeros(4), None),  # no negative
        (torch.randn(1, 3), torch.zeros(1), None),
        (torch.empty(0, 3), torch.empty(0), None),
        (torch.empty(0, 3).half(), torch.empty(0), None),
        (torch.randn(4, 3), None, (nothing,) * 3),
        (torch.randn(4, 3), None, (torch.tensor([0, 1]), torch.tensor([1, 0]), nothing, nothing)),
    ):
        z.requires_grad_()
        value = loss(z, labels, pairs)
        assert value == 0
        assert not torch.autograd.grad(value, z)[0].any()


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_loss_without_rows_or_references_is_zero(name):
    loss = getattr(ours, name)()
    z, labels = torch.randn(4, 3, requires_grad=True), torch.arange(4)
    for rows, refs in ((4, 0), (0, 4), (0, 0)):
        value = loss(z[:rows], labels[:rows], ref_emb=z[:refs], ref_labels=labels[:refs])
        assert value == 0
        assert not torch.autograd.grad(value, z)[0].any()


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_half_precision_and_autocast_give_the_float32_loss(name):
    loss = getattr(ours, name)(0.1)
    z, labels = torch.randn(12, 8).half(), torch.arange(12) % 4
    pairs = torch.where((labels[:, None] == labels).fill_diagonal_(False)) + torch.where(labels[:, None] != labels)
    expected = loss(z.float(), labels)
    for value in (loss(z, labels), loss(z, indices_tuple=pairs), loss(z, labels, ref_emb=z, ref_labels=labels)):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(z.float(), labels), expected)
        torch.testing.assert_close(loss(z.float(), indices_tuple=pairs), expected)


def test_low_temperatures_keep_their_gradient():
    # The library adds the smallest float to a ratio that underflows. At a temperature of 0.005, its loss stops at 87,
    # without a gradient.
    z = torch.tensor([[1.0, 0.0], [-1.0, 0.01], [1.0, 0.02]], requires_grad=True)
    value = ours.NTXentLoss(0.005)(z, torch.tensor([0, 0, 1]))
    assert value > 200
    assert torch.autograd.grad(value, z)[0].norm() > 0.5


def test_anchor_counts_even_if_its_loss_rounds_to_zero():
    z, labels = torch.tensor([[1.0, 0.0], [1.0, 0.01], [-1.0, 0.02], [0.0, -1.0]]), torch.tensor([0, 0, 1, 1])
    mine, theirs = losses("SupConLoss", 0.04)
    assert mine(z.double(), labels) == pytest.approx(float(theirs(z.double(), labels)))
    assert mine(z, labels) == pytest.approx(float(mine(z.double(), labels)), rel=1e-5)
    assert theirs(z, labels) > 3 * mine(z, labels)  # in float32 the library counts only one of four anchors


def test_temperature_may_be_a_parameter():
    loss = ours.NTXentLoss(torch.nn.Parameter(torch.tensor(0.5)))
    for pairs in (None, (torch.tensor([0]), torch.tensor([1]), torch.tensor([0, 0]), torch.tensor([2, 3]))):
        value = loss(torch.randn(4, 3), torch.tensor([0, 0, 1, 1]), pairs)
        assert torch.autograd.grad(value, loss.temperature)[0] != 0


class LpDistance:
    p, power = 2, 1


class DivisorReducer:
    def __call__(self, *_):
        raise AssertionError


@pytest.mark.parametrize("cls", [ours.NTXentLoss, ours.SupConLoss])
def test_invalid_arguments_are_named(cls):
    z, labels = torch.randn(4, 3), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="distance must be None, CosineSimilarity or DotProductSimilarity"):
        cls(distance=LpDistance())
    with pytest.raises(ValueError, match=f"reducer of {cls.__name__} must not be DivisorReducer"):
        cls(reducer=DivisorReducer())
    for reducer in ("mean", DivisorReducer):
        with pytest.raises(TypeError, match=f"reducer of {cls.__name__} must be None or a reducer of"):
            cls(reducer=reducer)
    with pytest.raises(ValueError, match=r"embedding_regularizer of .* must be None"):
        cls(embedding_regularizer=DivisorReducer())
    with pytest.raises(ValueError, match=r"collect_stats of .* must be None or False"):
        cls(collect_stats=True)
    with pytest.raises(TypeError, match="nonsense"):
        cls(nonsense=1)
    with pytest.raises(ValueError, match="labels and indices_tuple must not both be None"):
        cls()(z)
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\), one per row, got \(3,\)"):
        cls()(z, labels[:3])
    with pytest.raises(ValueError, match=r"ref_labels must have shape \(4,\), one per row, got \(3,\)"):
        cls()(z, labels, ref_emb=z, ref_labels=labels[:3])
    with pytest.raises(ValueError, match="indices_tuple must have 3 or 4 tensors, got 2"):
        cls()(z, labels, (labels, labels))
    with pytest.raises(TypeError, match="indices_tuple must be a tuple of 3 or 4 tensors, got int"):
        cls()(z, labels, 3)
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\), one per row, got \(4, 1\)"):
        cls()(z, labels[:, None])
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\), one per row, got \(3,\)"):
        cls()(z, labels[:3], (labels, labels, labels))
    with pytest.raises(TypeError, match=r"labels must be a torch\.Tensor, got list"):
        cls()(z, [0, 0, 1, 1])
    with pytest.raises(TypeError, match="loss must be NTXentLoss or SupConLoss"):
        ours.SelfSupervisedLoss(torch.nn.MSELoss())


def test_pair_given_as_positive_and_negative_is_an_error():
    pair = (torch.tensor([0, 0]), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="the same pair as a positive and as a negative one"):
        ours.SupConLoss()(torch.randn(3, 2), indices_tuple=(*pair, *pair))


def test_defaults_are_the_librarys():
    theirs = needs("pytorch_metric_learning.losses")
    for name in ("NTXentLoss", "SupConLoss"):
        assert getattr(ours, name)().temperature == getattr(theirs, name)().temperature
        assert type(getattr(theirs, name)().reducer).__name__ == getattr(ours, name)._reducer


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_temperature_is_checked_by_the_constructor(name):
    for temperature in (0, -1.0, torch.tensor(0.0)):
        with pytest.raises(ValueError, match="temperature must be positive and finite, got"):
            getattr(ours, name)(temperature)
    with pytest.raises(TypeError, match="temperature must be a float or a 0-d tensor, got str"):
        getattr(ours, name)("x")


def test_distributed_wrapper_equals_the_loss_in_one_process():
    (z,), labels = batch(1, 12, 4, 0)
    loss = ours.SupConLoss()
    wrapper = ours.DistributedLossWrapper(loss, efficient=True)
    assert wrapper(z, labels, ref_emb=z[:5], ref_labels=labels[:5]) == loss(z, labels, None, z[:5], labels[:5])
    with pytest.raises(TypeError, match="loss must be NTXentLoss or SupConLoss of"):
        ours.DistributedLossWrapper(torch.nn.Identity())


@pytest.mark.parametrize(
    ("indices", "error", "says"),
    [
        (([0, 0], [1, 2], [3, 99]), ValueError, r"indices_tuple must have indices in \[0, 16\), got \[3, 99\]"),
        (([0, 0], [1, -2], [3, 4]), ValueError, "indices_tuple must have indices in"),
        (([0, 0], [1], [3, 4]), ValueError, r"indices_tuple must hold pairs of equal lengths, got \[2, 1, 2\]"),
        (([0.0], [1.0], [3.0]), TypeError, "indices_tuple must hold tensors of one dimension and an integer dtype"),
    ],
)
@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_invalid_indices_are_named(name, indices, error, says):
    loss = getattr(ours, name)()
    with pytest.raises(error, match=says):
        loss(torch.randn(16, 4), indices_tuple=tuple(map(torch.tensor, indices)))


def test_references_need_labels_and_the_same_number_of_features():
    loss = ours.NTXentLoss()
    z, labels = torch.randn(16, 4), torch.arange(16) // 2
    with pytest.raises(ValueError, match="ref_labels must be given if ref_emb and embeddings do not have the same"):
        loss(z, labels, ref_emb=torch.randn(4, 4))
    with pytest.raises(ValueError, match="features"):
        loss(z, labels, ref_emb=torch.randn(4, 5), ref_labels=labels[:4])
