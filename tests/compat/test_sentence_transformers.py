"""fastntxent.compat.sentence_transformers against its definition, and against the library if it is installed."""

import inspect
import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from fastntxent.compat import sentence_transformers as ours
from tests.peers import assert_same, drawn, sentence_transformers, sizes
from tests.ranks import on_ranks

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


def dense(embeddings, scale, directions, partition_mode, hardness_mode, hardness_strength, cosine, ids=None):
    """Return the loss by its definition, candidate by candidate. In query_to_doc, the kind of a negative decides
    whether a hardness is added to its logit. Other samples with the same id are not candidates.
    """
    u, *docs = (normalize(z, dim=1) if cosine else z for z in embeddings)
    n, losses = len(u), []
    for i in range(n):
        others = [j for j in range(n) if j == i or ids is None or ids[j] != ids[i]]
        positive = scale * u[i] @ docs[0][i]
        of_direction = {"query_to_doc": [positive], "query_to_query": [], "doc_to_query": [], "doc_to_doc": []}
        for j, (column, doc) in itertools.product(others, enumerate(docs)):
            sim = u[i] @ doc[j]
            kind = "in_batch_negatives" if i != j else "hard_negatives"
            added = hardness_strength * sim.detach() if hardness_mode in (kind, "all_negatives") else 0
            if (i, 0) != (j, column):
                of_direction["query_to_doc"].append(scale * sim + added)
            if i != j:
                of_direction["doc_to_doc"].append(scale * docs[0][i] @ doc[j])
        for j in others:
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


@given(**{**sizes, "n": st.integers(1, 5)}, **options)
@drawn
def test_loss_with_ids_equals_its_definition(n, d, seed, **drawn_options):
    z, arguments, cosine = drawn_case(n, d, seed, **drawn_options)
    ids = torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(seed))
    loss = ours.MultipleNegativesRankingLoss(
        None, similarity_fct=ours.cos_sim if cosine else ours.dot_score, **arguments
    )
    assert_same(
        lambda *z: loss(z, ids=ids),
        lambda *z: dense(z, **arguments, cosine=cosine, ids=ids),
        1 / (arguments["scale"] + 9),
        *z,
    )


@given(**{**sizes, "n": st.integers(1, 24)}, **options)
@drawn
def test_loss_agrees_with_sentence_transformers(n, d, seed, **drawn_options):
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
def test_citation_names_the_paper_of_the_chosen_loss(options, eprint):
    citation = ours.MultipleNegativesRankingLoss(None, **options).citation
    assert citation.startswith("\n@misc{")
    assert f"eprint={{{eprint}}}" in citation


def test_hardness_mode_without_strength_logs_a_warning(caplog):
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


def test_similarity_method_of_a_model_counts_as_its_similarity_function():
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


def test_model_embeds_the_columns():
    model = Model()
    columns = torch.randn(3, 4, 3)
    loss = ours.MultipleNegativesRankingLoss(model)
    value = loss([{"input": column} for column in columns], None)
    torch.testing.assert_close(value, loss([model.linear(column) for column in columns]))
    value.backward()
    assert model.linear.weight.grad.any()
    assert set(loss.state_dict()) == {"model.linear.weight", "model.linear.bias"}


def test_gathering_changes_nothing_in_one_process():
    z = list(torch.randn(2, 4, 3))
    gathering = ours.MultipleNegativesRankingLoss(None, gather_across_devices=True)
    assert gathering(z) == ours.MultipleNegativesRankingLoss(None)(z)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0}, "scale must be positive and finite, got 0"),
        ({"scale": torch.tensor(0.0)}, "scale must be positive and finite, got 0.0"),
        ({"scale": torch.ones(2)}, r"scale must be a 0-d tensor, got shape \(2,\)"),
        ({"similarity_fct": torch.cdist}, "similarity_fct must be one of 'cos_sim', 'dot_score', got 'cdist'"),
        ({"directions": ()}, "directions must include 'query_to_doc'"),
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
def test_invalid_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ours.MultipleNegativesRankingLoss(None, **options)


@pytest.mark.parametrize(
    "cls",
    [
        ours.MultipleNegativesRankingLoss,
        ours.CachedMultipleNegativesRankingLoss,
        ours.CachedMultipleNegativesSymmetricRankingLoss,
    ],
)
@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.tensor(True), "scale must be a floating-point tensor, got torch.bool"),
        (torch.tensor(1), "scale must be a floating-point tensor, got torch.int64"),
        ("20", "scale must be a float or a 0-d tensor, got str"),
        (None, "scale must be a float or a 0-d tensor, got NoneType"),
    ],
)
def test_scale_of_the_wrong_type_is_refused_by_the_constructor(cls, scale, message):
    with pytest.raises(TypeError, match=message):
        cls(None, scale=scale)


def test_call_checks_the_scale_again_and_names_it():
    scale = torch.nn.Parameter(torch.tensor(20.0))
    loss = ours.MultipleNegativesRankingLoss(None, scale=scale)
    with torch.no_grad():
        scale.fill_(-1.0)
    with pytest.raises(ValueError, match=r"scale must be positive and finite, got -1.0"):
        loss(list(torch.randn(2, 4, 3)))
    with pytest.raises(ValueError, match=r"^scale in torch.float32 must be from"):
        ours.MultipleNegativesRankingLoss(None, scale=1e300)(list(torch.randn(2, 4, 3)))


@pytest.mark.parametrize("directions", [None, "query_to_doc", 3])
def test_directions_that_are_not_a_tuple_are_refused(directions):
    with pytest.raises(TypeError, match=f"^directions must be a tuple of names, got {directions!r}$"):
        ours.MultipleNegativesRankingLoss(None, directions=directions)


@pytest.mark.parametrize("columns", [None, 3, {"input_ids": torch.ones(2, 3)}, "text"])
def test_call_refuses_features_that_are_not_a_sequence_of_columns(columns):
    words = f"must be a sequence, one element per column, got {type(columns).__name__}"
    model = Model()
    for loss in (
        ours.MultipleNegativesRankingLoss(model),
        ours.CachedMultipleNegativesRankingLoss(model),
        ours.GISTEmbedLoss(model, model),
        ours.CachedGISTEmbedLoss(model, model),
    ):
        with pytest.raises(TypeError, match=f"sentence_features {words}"):
            loss(columns)
    with pytest.raises(TypeError, match=f"embeddings {words}"):
        ours.MultipleNegativesRankingLoss(None).compute_loss_from_embeddings(columns)


def test_call_names_invalid_arguments():
    loss = ours.MultipleNegativesRankingLoss(None)
    with pytest.raises(ValueError, match="at least anchors and positives, got 1 tensors"):
        loss([torch.eye(3)])
    with pytest.raises(ValueError, match="model must be given"):
        loss([{}, {}])
    with pytest.raises(ValueError, match="same shape"):
        loss([torch.eye(3), torch.eye(3)[:2]])
    with pytest.raises(ValueError, match=r"ids must have shape \(3,\)"):
        loss([torch.eye(3), torch.eye(3)], ids=torch.arange(2))


class TextModel(torch.nn.Module):
    """A model that takes the output of a tokenizer. It has dropout and running statistics. It writes to its input, as
    the library's modules do.
    """

    def __init__(self):
        super().__init__()
        self.words, self.head = torch.nn.Embedding(11, 8).double(), torch.nn.Linear(8, 5).double()
        self.dropout, self.norm = torch.nn.Dropout(0.3), torch.nn.BatchNorm1d(5, affine=False).double()
        self.widths = []

    def forward(self, features):
        mask = features["attention_mask"]
        words = self.dropout(self.words(features["input_ids"])) * mask[..., None]
        features["sentence_embedding"] = z = self.head(words.sum(1) / mask.sum(1, keepdim=True))
        if len(z) > 1:
            self.norm(z)
        self.widths.append((len(mask), mask.shape[1], z.requires_grad))
        return features


def text_columns(count=3, n=10, width=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for _ in range(count):
        lengths = torch.randint(1, width, (n, 1), generator=generator)
        mask = (torch.arange(width) < lengths).long()
        ids = torch.randint(11, (n, width), generator=generator)
        columns.append({"input_ids": ids, "attention_mask": mask, "prompt_length": 0, "task": "query"})
    return columns


def rows_of(column, rows):
    return {key: value[rows] if isinstance(value, torch.Tensor) else value for key, value in column.items()}


CACHED = ours.CachedMultipleNegativesRankingLoss
CACHED_OPTIONS = [
    {},
    {"directions": ours.DIRECTIONS, "scale": 5.0, "similarity_fct": ours.dot_score},
    {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    {"hardness_mode": "all_negatives", "hardness_strength": 3.0},
    {"hardness_mode": "hard_negatives", "hardness_strength": 3.0, "directions": ("query_to_doc", "doc_to_doc")},
]


@pytest.mark.parametrize("options", CACHED_OPTIONS)
@pytest.mark.parametrize("chunking", [{"mini_batch_size": 4}, {"mini_batch_size": 32}, {"mini_batch_num_tokens": 9}])
def test_cached_loss_equals_the_uncached_one(options, chunking):
    torch.manual_seed(0)
    model = TextModel().eval()
    ends = []
    for loss in (CACHED(model, **options, **chunking), ours.MultipleNegativesRankingLoss(model, **options)):
        model.zero_grad()
        value = loss(text_columns(), None)
        (3 * value / 2).backward()
        with torch.no_grad():
            of_evaluation = loss(text_columns())
        ends.append((value.detach(), [p.grad for p in model.parameters()], of_evaluation))
    torch.testing.assert_close(*ends, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("options", CACHED_OPTIONS)
def test_cached_loss_takes_ids(options):
    torch.manual_seed(0)
    model, ids, ends = TextModel().eval(), torch.arange(10) // 3, []
    for loss in (CACHED(model, **options, mini_batch_size=4), ours.MultipleNegativesRankingLoss(model, **options)):
        model.zero_grad()
        value = loss(text_columns(), None, ids=ids)
        value.backward()
        with torch.no_grad():
            of_evaluation = loss(text_columns(), ids=ids)
        z = list(torch.ones(2, 10, 3))
        ends.append((value.detach(), [p.grad for p in model.parameters()], of_evaluation, loss(z, ids=ids)))
    torch.testing.assert_close(*ends, atol=1e-12, rtol=1e-12)


def test_cached_loss_repeats_dropout_and_leaves_the_state_of_one_pass():
    ends = []
    for cached in (True, False):
        torch.manual_seed(0)
        model = TextModel()
        for _ in range(2):
            columns = text_columns()
            for column in columns:
                column["attention_mask"][::4] = 1  # no padding to cut: dropout's draws depend on the width
            if cached:
                loss = CACHED(model, mini_batch_size=4)(columns)
            else:
                chunks = [[rows_of(column, slice(i, i + 4)) for i in range(0, 10, 4)] for column in columns]
                z = [torch.cat([model(chunk)["sentence_embedding"] for chunk in column]) for column in chunks]
                loss = ours.MultipleNegativesRankingLoss(None)(z)
            assert not any("sentence_embedding" in column for column in columns)
            drawn = torch.rand(1)  # between the passes
            loss.backward()
        ends.append((loss.detach(), [p.grad for p in model.parameters()], list(model.buffers()), drawn, torch.rand(1)))
    torch.testing.assert_close(*ends, atol=1e-12, rtol=1e-12)


def test_cached_loss_encodes_one_mini_batch_at_a_time_and_cuts_its_padding():
    columns = text_columns(2)
    model = TextModel()
    seen = []
    model.register_forward_hook(lambda module, args, out: seen.append(module.widths[-1]))
    CACHED(model, mini_batch_size=4)(columns).backward()
    longest = [int(c["attention_mask"][i : i + 4].sum(1).max()) for c in columns for i in range(0, 10, 4)]
    rows = 2 * [4, 4, 2]
    assert seen == [(n, w, learns) for learns in (False, True) for n, w in zip(rows, longest, strict=True)]


def test_cached_loss_without_gradients_runs_the_model_once():
    model, runs = TextModel().eval(), []
    model.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        CACHED(model, mini_batch_size=5)(text_columns(2))
    with torch.inference_mode():
        CACHED(model, mini_batch_size=5)(text_columns(2))
    assert len(runs) == 8


def test_cached_losses_may_be_summed():
    # Gradient accumulation and training on several data sets do this. Each backward repeats its own forward.
    ends = []
    for kind in (CACHED, ours.MultipleNegativesRankingLoss):
        torch.manual_seed(0)
        model = TextModel().eval()
        options = {"mini_batch_size": 3} if kind is CACHED else {}
        first, second = (kind(model, scale=scale, **options) for scale in (3.0, 20.0))
        (first(text_columns(seed=1)) + 0.5 * second(text_columns(2, seed=2))).backward()
        ends.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*ends, atol=1e-12, rtol=1e-12)


def test_cached_loss_learns_its_scale():
    ends = []
    for kind, options in ((CACHED, {"mini_batch_size": 3}), (ours.MultipleNegativesRankingLoss, {})):
        torch.manual_seed(0)
        model, log_scale = TextModel().eval(), torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        (7 * kind(model, scale=log_scale.exp(), **options)(text_columns())).backward()
        ends.append([log_scale.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*ends, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cached_loss_uses_autocast_in_both_passes(dtype):
    ends, seen = [], []
    for kind, options in ((CACHED, {"mini_batch_size": 3}), (ours.MultipleNegativesRankingLoss, {})):
        torch.manual_seed(0)
        model = TextModel().float().eval()
        model.head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        scaler = torch.amp.GradScaler("cpu", 2.0**10)
        with torch.autocast("cpu", dtype):
            loss = kind(model, **options)(text_columns())
        scaler.scale(loss).backward()
        ends.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert set(seen) == {dtype}
    for value, expected in zip(*ends, strict=True):
        assert torch.dist(value, expected) < 8 * torch.finfo(dtype).eps * expected.norm()


def test_cached_loss_whose_second_pass_does_not_repeat_the_first_is_an_error():
    model, counter = TextModel(), iter(range(100))
    model.head.register_forward_hook(lambda module, args, z: z + next(counter))
    statistics, torch_state = [b.clone() for b in model.buffers()], torch.get_rng_state()
    loss = CACHED(model, mini_batch_size=5)(text_columns(2))
    with pytest.raises(RuntimeError, match="model gave different embeddings in the second pass"):
        loss.backward()
    for now, before in zip(model.buffers(), statistics, strict=True):
        assert torch.equal(now, before)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_cached_loss_with_a_frozen_column_trains_the_other():
    class Router(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.document = TextModel().requires_grad_(False), TextModel()

        def forward(self, features):
            return (self.query if features["task"] == "query" else self.document)(features)

    ends = []
    for kind, options in ((CACHED, {"mini_batch_size": 4}), (ours.MultipleNegativesRankingLoss, {})):
        torch.manual_seed(0)
        model, columns = Router().eval(), text_columns(2)
        columns[1]["task"] = "document"
        kind(model, **options)(columns).backward()
        assert all(p.grad is None for p in model.query.parameters())
        ends.append([p.grad for p in model.document.parameters()])
    torch.testing.assert_close(*ends, atol=1e-12, rtol=1e-12)


def test_cached_loss_takes_embeddings_as_the_uncached_one_does():
    z = list(torch.randn(3, 6, 5))
    assert CACHED(None)(z) == ours.MultipleNegativesRankingLoss(None)(z)


def test_cached_symmetric_loss_equals_the_loss_of_both_directions():
    model = TextModel().eval()
    loss = ours.CachedMultipleNegativesSymmetricRankingLoss(model, mini_batch_size=3)
    both = ours.MultipleNegativesRankingLoss(
        model, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    )
    torch.testing.assert_close(loss(text_columns(2)), both(text_columns(2)))


def test_cached_loss_shows_a_progress_bar(capsys):
    pytest.importorskip("tqdm", reason="needs tqdm")
    loss = CACHED(TextModel(), mini_batch_size=5, show_progress_bar=True)
    loss(text_columns(2)).backward()
    assert "Embed mini-batches: 100%" in capsys.readouterr().err


def test_cached_loss_gives_its_configuration_and_citation():
    loss = CACHED(None, mini_batch_size=8)
    assert loss.get_config_dict() == {
        **ours.MultipleNegativesRankingLoss(None).get_config_dict(),
        "mini_batch_size": 8,
        "mini_batch_num_tokens": None,
    }
    assert "eprint={2101.06983}" in loss.citation
    assert loss.temperature == 1 / 20


def test_cached_losses_name_invalid_arguments():
    with pytest.raises(ValueError, match="mini_batch_size must be at least 1, got 0"):
        CACHED(None, mini_batch_size=0)
    with pytest.raises(ValueError, match="mini_batch_num_tokens must be at least 1, got 0"):
        CACHED(None, mini_batch_num_tokens=0)
    with pytest.raises(ValueError, match="model must be given"):
        CACHED(None)([{}, {}])
    static = torch.nn.Sequential(type("StaticEmbedding", (torch.nn.EmbeddingBag,), {})(9, 4))
    with pytest.raises(ValueError, match="begins with a StaticEmbedding"):
        CACHED(static)
    model = TextModel()
    with pytest.raises(ValueError, match=r"sentence_features\[1\]\['x'\] must have as many rows as"):
        CACHED(model)([text_columns(1)[0], {**text_columns(1)[0], "x": torch.ones(3)}])
    with pytest.raises(ValueError, match=r"sentence_features\[0\] has no 'attention_mask' to count tokens with"):
        CACHED(model, mini_batch_num_tokens=9)([{"x": torch.ones(3)}] * 2)
    with pytest.raises(ValueError, match="at least anchors and positives, got 1 tensors"):
        CACHED(model)(text_columns(1))


def cached_on_ranks():
    """Return loss and gradients under DistributedDataParallel, loss and gradients of one process with all rows, and the
    number of forwards whose backward would synchronise.
    """
    rows = slice(0, 6) if dist.get_rank() == 0 else slice(6, 10)
    ends, synchronised = [], []
    for gathers in (True, False):
        torch.manual_seed(0)
        model = TextModel().eval()
        columns = text_columns(2)
        if gathers:
            ddp = DistributedDataParallel(model)
            model.register_forward_hook(
                lambda *_: synchronised.append(ddp.require_backward_grad_sync and torch.is_grad_enabled())  # noqa: B023
            )
            columns = [rows_of(column, rows) for column in columns]
            loss = CACHED(ddp, mini_batch_size=2, gather_across_devices=True)(columns)
        else:
            loss = ours.MultipleNegativesRankingLoss(model)(columns)
        loss.backward()
        ends.append((loss.detach(), [p.grad for p in model.parameters()]))
    return ends, sum(synchronised)


def test_cached_loss_across_ranks_equals_the_loss_of_one_process():
    for ends, synchronised in on_ranks(2, cached_on_ranks):
        torch.testing.assert_close(*ends, atol=1e-12, rtol=1e-12)
        assert synchronised == 1


@pytest.mark.parametrize("options", CACHED_OPTIONS)
@pytest.mark.parametrize("chunking", [{"mini_batch_size": 4}, {"mini_batch_num_tokens": 9}])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_cached_loss_agrees_with_sentence_transformers(options, chunking):
    theirs = sentence_transformers()
    losses, ends = theirs.sentence_transformer.losses, []
    arguments = {**options, **chunking}
    fct = "dot_score" if "similarity_fct" in options else "cos_sim"
    for module, similarities in ((ours, ours), (losses, theirs.util)):
        torch.manual_seed(0)
        model = TextModel()
        model = theirs.SentenceTransformer(modules=[model], device="cpu") if module is losses else model
        torch.manual_seed(1)
        loss = module.CachedMultipleNegativesRankingLoss(
            model, **{**arguments, "similarity_fct": getattr(similarities, fct)}
        )
        value = loss(text_columns(), torch.zeros(0))
        (3 * value).backward()
        ends.append((value.detach(), [p.grad for p in model.parameters()]))
        if module is losses:
            continue
        mine = loss
    torch.testing.assert_close(*ends, atol=1e-9, rtol=1e-9)
    assert mine.get_config_dict() == loss.get_config_dict()
    assert mine.citation == loss.citation
    assert mine.temperature == loss.temperature


@pytest.mark.parametrize("name", ["CachedMultipleNegativesRankingLoss", "CachedMultipleNegativesSymmetricRankingLoss"])
def test_cached_losses_have_the_librarys_signatures(name):
    losses = sentence_transformers().sentence_transformer.losses
    mine, other = (inspect.signature(getattr(module, name).__init__).parameters for module in (ours, losses))
    assert list(mine) == list(other)
    for parameter in other.values():
        if parameter.name != "similarity_fct":
            assert mine[parameter.name].default == parameter.default


def test_matryoshka_loss_of_the_library_takes_the_cached_loss():
    theirs = sentence_transformers()
    ends = []
    for kind, options in ((CACHED, {"mini_batch_size": 4}), (ours.MultipleNegativesRankingLoss, {})):
        torch.manual_seed(0)
        model = theirs.SentenceTransformer(modules=[TextModel().eval()], device="cpu").eval()
        loss = theirs.sentence_transformer.losses.MatryoshkaLoss(
            model, kind(model, **options), [5, 3], matryoshka_weights=[1, 0.3]
        )
        value = loss(text_columns(), torch.zeros(0))
        (2 * value).backward()
        ends.append((value.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*ends, atol=1e-9, rtol=1e-9)
