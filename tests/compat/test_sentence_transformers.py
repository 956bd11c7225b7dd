"""fastntxent.compat.sentence_transformers against its definition, and against the library, where it is installed."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from fastntxent.compat import sentence_transformers as ours
from tests.peers import assert_same, drawn, sentence_transformers, sizes

extra_directions = [
    directions
    for size in range(4)
    for directions in itertools.combinations(("query_to_query", "doc_to_query", "doc_to_doc"), size)
]
options = {
    "scale": st.floats(1, 20),
    "columns": st.integers(2, 4),
    "extra": st.sampled_from(extra_directions),
    "per_direction": st.booleans(),
    "mode": st.sampled_from([None, "in_batch_negatives", "hard_negatives", "all_negatives"]),
    "strength": st.floats(0, 9),
    "cosine": st.booleans(),
}


def drawn_case(n, d, seed, scale, columns, extra, per_direction, mode, strength, cosine):
    per_direction = per_direction and set(extra) <= {"doc_to_query"}
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator) + torch.randn(columns, n, d, generator=generator)
    arguments = {
        "scale": scale,
        "directions": ("query_to_doc", *extra),
        "partition_mode": "per_direction" if per_direction else "joint",
        "hardness_mode": mode,
        "hardness_strength": strength,
    }
    return (z if cosine else normalize(z, dim=2)), arguments, cosine


def dense(embeddings, scale, directions, partition_mode, hardness_mode, hardness_strength, cosine):
    """The definition, candidate by candidate: which kind each is decides what is added to its logit."""
    u, *docs = (normalize(z, dim=1) if cosine else z for z in embeddings)
    n, losses = len(u), []
    for i in range(n):
        positive = scale * u[i] @ docs[0][i]
        of_direction = {"query_to_doc": [positive], "query_to_query": [], "doc_to_query": [], "doc_to_doc": []}
        for j, (column, doc) in itertools.product(range(n), enumerate(docs)):
            sim = u[i] @ doc[j]
            kind = "in_batch_negatives" if i != j else "hard_negatives"
            added = hardness_strength * sim.detach() if hardness_mode in (kind, "all_negatives") else 0
            if (i, 0) != (j, column):
                of_direction["query_to_doc"].append(scale * sim + added)
            if i != j:
                of_direction["doc_to_doc"].append(scale * docs[0][i] @ doc[j])
        for j in range(n):
            of_direction["doc_to_query"].append(scale * docs[0][i] @ u[j])
            if i != j:
                of_direction["query_to_query"].append(scale * u[i] @ u[j])
        chosen = [of_direction[name] for name in directions]
        if partition_mode == "joint":
            chosen = [list(itertools.chain(*chosen))]
        log_z = [torch.logsumexp(torch.stack(logits), dim=0) for logits in chosen]
        losses.append(sum(log_z) / len(log_z) - positive)
    return sum(losses) / n


@given(**{**sizes, "n": st.integers(1, 5)}, **options)
@drawn
def test_loss_equals_its_definition(n, d, seed, **drawn_options):
    z, arguments, cosine = drawn_case(n, d, seed, **drawn_options)
    loss = ours.MultipleNegativesRankingLoss(
        None, similarity_fct=ours.cos_sim if cosine else ours.dot_score, **arguments
    )
    assert_same(lambda *z: loss(z), lambda *z: dense(z, **arguments, cosine=cosine), 1 / (arguments["scale"] + 9), *z)


@given(**{**sizes, "n": st.integers(1, 24)}, **options)
@drawn
def test_loss_equals_sentence_transformers(n, d, seed, **drawn_options):
    theirs = sentence_transformers()
    z, arguments, cosine = drawn_case(n, d, seed, **drawn_options)
    arguments["similarity_fct"] = theirs.util.cos_sim if cosine else theirs.util.dot_score
    mine = ours.MultipleNegativesRankingLoss(None, **arguments)
    other = theirs.sentence_transformer.losses.MultipleNegativesRankingLoss(None, **arguments)
    assert_same(
        lambda *z: mine.compute_loss_from_embeddings(list(z), None),
        lambda *z: other.compute_loss_from_embeddings(list(z), None),
        1 / (arguments["scale"] + 9),
        *z,
    )
    assert mine.get_config_dict() == other.get_config_dict()
    assert mine.temperature == other.temperature
    assert mine.citation == other.citation


@pytest.mark.parametrize(
    ("options", "eprint"),
    [
        ({}, "1807.03748"),
        ({"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}, "2310.19923"),
        ({"directions": ours.DIRECTIONS[::-1]}, "2308.03281"),
    ],
)
def test_citation_is_of_the_papers_loss(options, eprint):
    citation = ours.MultipleNegativesRankingLoss(None, **options).citation
    assert citation.startswith("\n@misc{")
    assert f"eprint={{{eprint}}}" in citation


def test_hardness_without_strength_is_a_warning(caplog):
    ours.MultipleNegativesRankingLoss(None, hardness_mode="hard_negatives", hardness_strength=1.0)
    ours.MultipleNegativesRankingLoss(None, hardness_strength=0.0)
    assert not caplog.records
    ours.MultipleNegativesRankingLoss(None, hardness_mode="hard_negatives")
    assert "hardness_mode='hard_negatives' has no effect with a hardness_strength of 0" in caplog.text


class Similarity:
    def __init__(self, similarity_fn_name):
        self.similarity_fn_name = similarity_fn_name

    def similarity(self, a, b):
        raise AssertionError


def test_similarity_of_a_model_is_the_function_it_stands_for():
    z = list(torch.randn(2, 4, 3))
    for model, name in ((Similarity("cosine"), "cos_sim"), (Similarity("dot"), "dot_score")):
        loss = ours.MultipleNegativesRankingLoss(None, similarity_fct=model.similarity)
        assert loss(z) == ours.MultipleNegativesRankingLoss(None, similarity_fct=getattr(ours, name))(z)
        assert loss.get_config_dict()["similarity_fct"] == name
    with pytest.raises(ValueError, match="similarity_fct must be one of 'cos_sim', 'dot_score', got 'euclidean'"):
        ours.MultipleNegativesRankingLoss(None, similarity_fct=Similarity("euclidean").similarity)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 5)

    def forward(self, features):
        return {"sentence_embedding": self.linear(features["input"])}


def test_a_model_embeds_the_columns():
    model = Model()
    columns = torch.randn(3, 4, 3)
    loss = ours.MultipleNegativesRankingLoss(model)
    value = loss([{"input": column} for column in columns], None)
    torch.testing.assert_close(value, loss([model.linear(column) for column in columns]))
    value.backward()
    assert model.linear.weight.grad.any()
    assert set(loss.state_dict()) == {"model.linear.weight", "model.linear.bias"}


def test_gathering_is_nothing_in_one_process():
    z = list(torch.randn(2, 4, 3))
    gathering = ours.MultipleNegativesRankingLoss(None, gather_across_devices=True)
    assert gathering(z) == ours.MultipleNegativesRankingLoss(None)(z)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0}, "scale must be positive and finite, got 0"),
        ({"similarity_fct": torch.cdist}, "similarity_fct must be one of 'cos_sim', 'dot_score', got 'cdist'"),
        ({"directions": ()}, "directions must have 'query_to_doc'"),
        ({"directions": ("query_to_doc", "x")}, "directions must be one of"),
        ({"partition_mode": "x"}, "partition_mode must be one of 'joint', 'per_direction', got 'x'"),
        (
            {"partition_mode": "per_direction", "directions": ("query_to_doc", "doc_to_doc")},
            "partition_mode must be 'joint'",
        ),
        ({"hardness_mode": "x"}, "hardness_mode must be one of"),
        ({"hardness_strength": -1.0}, "hardness_strength must be in"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        ours.MultipleNegativesRankingLoss(None, **options)


def test_errors_of_a_call():
    loss = ours.MultipleNegativesRankingLoss(None)
    with pytest.raises(ValueError, match="anchors and positives at least, got 1 tensors"):
        loss([torch.eye(3)])
    with pytest.raises(ValueError, match="model must be given"):
        loss([{}, {}])
    with pytest.raises(ValueError, match="same shape"):
        loss([torch.eye(3), torch.eye(3)[:2]])
