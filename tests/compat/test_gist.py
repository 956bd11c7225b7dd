"""fastntxent.compat.gist against its definition, and against sentence-transformers if it is installed."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastntxent.compat import gist as ours
from fastntxent.compat import sentence_transformers as of_library
from tests.peers import assert_same, drawn, sentence_transformers, sizes
from tests.ranks import on_ranks

options = {
    "temperature": st.floats(0.05, 1),
    "columns": st.integers(2, 3),
    "arguments": st.fixed_dictionaries(
        {
            "margin_strategy": st.sampled_from(["absolute", "relative"]),
            "margin": st.floats(0, 0.4),
            "contrast_anchors": st.booleans(),
            "contrast_positives": st.booleans(),
        }
    ),
}


def drawn_case(n, d, seed, columns):
    """Return embeddings, and a guide's embeddings in float64, so that a similarity is unlikely to lie within rounding
    error of a limit.
    """
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator) + torch.randn(columns, n, d, generator=generator)
    guide = torch.randn(n, 6, generator=generator) + torch.randn(columns, n, 6, generator=generator)
    return z, guide.double()


def dense(embeddings, guides, temperature, margin_strategy, margin, contrast_anchors, contrast_positives):
    """Return the cross-entropy over all cosine matrices side by side. A negative is left out if the guide's cosine
    exceeds the anchor's limit. A row's cosine with itself is always left out.
    """
    (a, p, *n), (g_a, g_p, *g_n) = ([F.normalize(z, dim=1) for z in each] for each in (embeddings, guides))
    of_positive = (g_a * g_p).sum(dim=1, keepdim=True)
    limits = of_positive - margin * (of_positive.abs() if margin_strategy == "relative" else 1)
    itself, none = torch.eye(len(a), dtype=torch.bool), torch.zeros(len(a), len(a), dtype=torch.bool)

    def scores(u, v, g_u, g_v, kept=none, left_out=none):
        return (u @ v.T).masked_fill(((g_u @ g_v.T > limits) & ~kept) | left_out, -torch.inf)

    parts = [scores(a, p, g_a, g_p, kept=itself)]
    if contrast_anchors:
        parts.append(scores(a, a, g_a, g_a, left_out=itself))
    if contrast_positives:
        parts.append(scores(p, p, g_p, g_p, left_out=itself))
    parts += [scores(a, *n, g_a, *g_n)] if n else []
    return F.cross_entropy(torch.cat(parts, dim=1) / temperature, torch.arange(len(a)))


@given(**sizes, **options)
@drawn
def test_loss_equals_its_definition(n, d, seed, temperature, columns, arguments):
    z, guide = drawn_case(n, d, seed, columns)
    loss = ours.GISTEmbedLoss(None, None, temperature, **arguments)
    assert_same(
        lambda *z: loss.compute_loss_from_embeddings(z, guide.unbind()),
        lambda *z: dense(z, guide.to(z[0].dtype), temperature, **arguments),
        temperature,
        *z,
    )


class Embedding(nn.Module):
    """A model of one-token texts, with a tokenizer whose vocabulary is a list of words."""

    def __init__(self, vocabulary, d, max_seq_length=8):
        super().__init__()
        self.table = nn.Embedding(len(vocabulary), d)
        self.vocabulary, self.max_seq_length = vocabulary, max_seq_length
        self.tokenizer = SimpleNamespace(
            get_vocab=lambda: {word: index for index, word in enumerate(vocabulary)},
            batch_decode=lambda ids, skip_special_tokens: [vocabulary[index] for index in ids.flatten().tolist()],
        )

    def forward(self, features):
        features["sentence_embedding"] = self.table(features["input_ids"].flatten())
        return features

    def tokenize(self, texts):
        return {
            "input_ids": torch.tensor([[self.vocabulary.index(text)] for text in texts]),
            "lengths": [1] * len(texts),
        }


WORDS = ["ant", "bee", "cat", "dog", "elk", "fox"]


@pytest.mark.parametrize("vocabulary", [WORDS, WORDS[::-1]])
def test_loss_embeds_the_columns_with_the_model_and_the_guide(vocabulary):
    model, guide = Embedding(WORDS, 5), Embedding(vocabulary, 4)
    loss = ours.GISTEmbedLoss(model, guide)
    assert loss.must_retokenize == (vocabulary != WORDS)
    features = [{"input_ids": torch.tensor([[i], [j], [k]])} for i, j, k in ((0, 1, 2), (3, 4, 5), (2, 0, 4))]
    ids = [column["input_ids"].flatten() for column in features]
    in_guide = [torch.tensor([vocabulary.index(WORDS[i]) for i in column]) for column in ids]
    expected = loss.compute_loss_from_embeddings(
        [model.table(column) for column in ids], [guide.table(column) for column in in_guide]
    )
    value = loss(features, torch.zeros(3))
    assert torch.equal(value, expected)
    value.backward()
    assert model.table.weight.grad.any()
    assert guide.table.weight.grad is None


def test_guide_with_a_shorter_maximum_length_must_retokenize():
    assert ours.GISTEmbedLoss(Embedding(WORDS, 5), Embedding(WORDS, 4, max_seq_length=4)).must_retokenize


def test_guide_that_must_retokenize_needs_input_ids():
    loss = ours.GISTEmbedLoss(Embedding(WORDS, 5), Embedding(WORDS[::-1], 4))
    with pytest.raises(ValueError, match=r"sentence_features must have 'input_ids'.*got 'pixels'"):
        loss([{"pixels": torch.zeros(3)}] * 2)


class Encoder(nn.Module):
    """A model that averages the word embeddings of padded texts. It has dropout and running statistics. It writes to
    its input, as the library's modules do.
    """

    def __init__(self, d, dropout=0.3):
        super().__init__()
        self.words, self.dropout = nn.Embedding(11, d).double(), nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(d, affine=False).double()

    def forward(self, features):
        mask = features["attention_mask"]
        words = self.dropout(self.words(features["input_ids"])) * mask[..., None]
        features["sentence_embedding"] = z = words.sum(1) / mask.sum(1, keepdim=True)
        self.norm(z)
        return features


def text_columns(count, n=10, width=7):
    """Return columns of full-length texts. Padding would be cut off, and dropout would then draw fewer numbers."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(11, (count, n, width), generator=generator)
    return [{"input_ids": column, "attention_mask": torch.ones_like(column), "task": "query"} for column in ids]


def uncached_in_chunks(model, guide, columns, size, **arguments):
    """Return the uncached loss of embeddings that the model computes in the cached loss's mini-batches, so that dropout
    draws the same masks.
    """

    def embeddings(encoder):
        return [
            torch.cat(
                [
                    encoder({key: x[i : i + size] for key, x in column.items() if key != "task"})["sentence_embedding"]
                    for i in range(0, len(column["input_ids"]), size)
                ]
            )
            for column in columns
        ]

    z = embeddings(model)
    with torch.no_grad():
        of_guide = embeddings(guide)
    # The uncached loss takes one column of negatives, so several columns are concatenated.
    return ours.GISTEmbedLoss(None, None, **arguments).compute_loss_from_embeddings(
        *([*rows[:2], *([torch.cat(rows[2:])] if rows[2:] else [])] for rows in (z, of_guide))
    )


@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("arguments", [{}, {"margin": 0.2, "margin_strategy": "relative", "contrast_anchors": False}])
def test_cached_loss_equals_the_uncached_one_with_dropout(columns, arguments):
    ends = []
    for cached in (True, False):
        torch.manual_seed(0)
        model, guide, temperature = Encoder(5), Encoder(4), nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        guide.eval()
        for _ in range(2):
            inputs = text_columns(columns)
            if cached:
                loss = ours.CachedGISTEmbedLoss(model, guide, temperature, mini_batch_size=4, **arguments)(inputs)
            else:
                loss = uncached_in_chunks(model, guide, inputs, 4, temperature=temperature, **arguments)
            assert not any("sentence_embedding" in column for column in inputs)
            drawn_between = torch.rand(1)
            (3 * loss / 2).backward()
        gradients = [temperature.grad, model.words.weight.grad]
        assert guide.words.weight.grad is None
        ends.append([loss.detach(), *gradients, *model.buffers(), *guide.buffers(), drawn_between, torch.rand(1)])
    torch.testing.assert_close(*ends, atol=1e-12, rtol=1e-12)


def test_cached_loss_with_a_token_limit_equals_the_uncached_one():
    model, guide = Encoder(5).eval(), Encoder(4).eval()
    ends = []
    for loss in (ours.CachedGISTEmbedLoss(model, guide, mini_batch_num_tokens=15), ours.GISTEmbedLoss(model, guide)):
        model.zero_grad()
        value = loss(text_columns(3), torch.zeros(0))
        value.backward()
        with torch.no_grad():
            of_evaluation = loss(text_columns(3))
        ends.append([value.detach(), model.words.weight.grad, of_evaluation])
    torch.testing.assert_close(*ends, atol=1e-12, rtol=1e-12)


def test_guide_of_a_cached_loss_runs_once_without_gradients():
    model, guide, runs = Encoder(5), Encoder(4), []
    for name, encoder in (("model", model), ("guide", guide)):
        encoder.register_forward_hook(
            lambda module, args, out, name=name: runs.append(
                (name, len(out["sentence_embedding"]), torch.is_grad_enabled())
            )
        )
    loss = ours.CachedGISTEmbedLoss(model, guide, mini_batch_size=4)
    loss(text_columns(2)).backward()
    first, of_guide, second = (
        [(name, n, gradients) for n in (4, 4, 2, 4, 4, 2)]
        for name, gradients in (("model", False), ("guide", False), ("model", True))
    )
    assert runs == [*first, *of_guide, *second]
    runs.clear()
    with torch.no_grad():
        loss(text_columns(2))
    assert runs == [*first, *of_guide]


def test_model_may_be_its_own_guide():
    # As model and as guide, the encoder updates its running statistics. The second pass, in the backward, must not.
    model = Encoder(5, dropout=0.0)
    loss = ours.CachedGISTEmbedLoss(model, model, mini_batch_size=5)(text_columns(2))
    seen = int(model.norm.num_batches_tracked)
    loss.backward()
    assert model.norm.num_batches_tracked == seen == 8
    cached = model.words.weight.grad
    model.zero_grad()
    ours.GISTEmbedLoss(model, model)(text_columns(2)).backward()
    torch.testing.assert_close(cached, model.words.weight.grad, atol=1e-12, rtol=1e-12)


def cached_on_ranks():
    """Return loss and gradient under DistributedDataParallel, and loss and gradient of one process with all rows."""
    rows = slice(0, 6) if dist.get_rank() == 0 else slice(6, 10)
    ends = []
    for gathers in (True, False):
        torch.manual_seed(0)
        model, guide = Encoder(5).eval(), Encoder(4).eval()
        columns, words = text_columns(3), model.words.weight
        if gathers:
            ddp = DistributedDataParallel(model)
            columns = [
                {key: x[rows] if isinstance(x, torch.Tensor) else x for key, x in column.items()} for column in columns
            ]
            loss = ours.CachedGISTEmbedLoss(ddp, guide, 0.2, mini_batch_size=2, gather_across_devices=True)(columns)
        else:
            loss = ours.GISTEmbedLoss(model, guide, 0.2)(columns)
        loss.backward()
        ends.append((loss.detach(), words.grad))
    return ends


def test_cached_loss_across_ranks_equals_the_loss_of_one_process():
    for ends in on_ranks(2, cached_on_ranks):
        torch.testing.assert_close(*ends, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("vocabulary", [WORDS, WORDS[::-1]])
def test_cached_loss_feeds_the_guide_as_the_uncached_one_does(vocabulary):
    model, guide = Embedding(WORDS, 5), Embedding(vocabulary, 4)
    features = [{"input_ids": torch.tensor([[i], [j], [k]])} for i, j, k in ((0, 1, 2), (3, 4, 5), (2, 0, 4))]
    ends = []
    for loss in (ours.CachedGISTEmbedLoss(model, guide, mini_batch_size=2), ours.GISTEmbedLoss(model, guide)):
        model.zero_grad()
        value = loss(features, None)
        value.backward()
        ends.append([value.detach(), model.table.weight.grad])
    torch.testing.assert_close(*ends)


def test_cached_loss_whose_guide_fails_leaves_the_model_as_it_was():
    model, guide = Encoder(5), Encoder(4)
    guide.register_forward_pre_hook(lambda *_: 1 // 0)
    statistics, random_state = [b.clone() for b in model.buffers()], torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        ours.CachedGISTEmbedLoss(model, guide, mini_batch_size=4)(text_columns(2))
    for now, before in zip(model.buffers(), statistics, strict=True):
        assert torch.equal(now, before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_cached_loss_names_invalid_arguments():
    model = Encoder(5)
    with pytest.raises(ValueError, match="mini_batch_size must be at least 1, got 0"):
        ours.CachedGISTEmbedLoss(model, model, mini_batch_size=0)
    with pytest.raises(ValueError, match="guide must be given to call the loss with features"):
        ours.CachedGISTEmbedLoss(model, None)(text_columns(2))
    with pytest.raises(TypeError, match=r"guide must be a torch\.nn\.Module, got function"):
        ours.CachedGISTEmbedLoss(model, lambda features: features)(text_columns(2))
    with pytest.raises(ValueError, match="embeddings must have at least 2 columns, anchors first, got 1"):
        ours.CachedGISTEmbedLoss(model, model)(text_columns(1))
    static = nn.Sequential(type("StaticEmbedding", (nn.EmbeddingBag,), {})(9, 4))
    with pytest.raises(ValueError, match="begins with a StaticEmbedding: use GISTEmbedLoss"):
        ours.CachedGISTEmbedLoss(static, model)


def test_invalid_arguments_are_named():
    z = torch.eye(4)
    loss = ours.GISTEmbedLoss(None, None)
    with pytest.raises(ValueError, match="model must be given to call the loss with features"):
        loss([{}, {}])
    with pytest.raises(ValueError, match="guide must be given to call the loss with features"):
        ours.GISTEmbedLoss(Embedding(WORDS, 5), None)([{}, {}])
    with pytest.raises(ValueError, match="embeddings must have 2 or 3 columns, anchors first, got 4"):
        loss.compute_loss_from_embeddings([z] * 4, [z] * 4)
    with pytest.raises(ValueError, match=r"embeddings\[0\] and embeddings\[1\] must have the same shape"):
        loss.compute_loss_from_embeddings([z, z[:1]], [z, z[:1]])
    with pytest.raises(ValueError, match=r"guide_embeddings\[1\] must have .*, one for each row of embeddings\[1\]"):
        loss.compute_loss_from_embeddings([z, z], [z, z[:1]])
    with pytest.raises(TypeError, match=r"embeddings\[1\] must be a torch.Tensor, got NoneType"):
        loss.compute_loss_from_embeddings([z, None], [z, z])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="guide_embeddings must have 3 columns like embeddings, got 2"):
        loss.compute_loss_from_embeddings([z] * 3, [z] * 2)
    with pytest.raises(ValueError, match="margin_strategy must be one of"):
        ours.GISTEmbedLoss(None, None, margin_strategy="both")
    with pytest.raises(ValueError, match="temperature must be positive"):
        ours.GISTEmbedLoss(None, None, temperature=0.0)


def test_loss_gives_a_trainer_its_configuration_and_citation():
    loss = ours.GISTEmbedLoss(None, None, margin=0.1)
    assert loss.get_config_dict() == {
        "guide": None,
        "temperature": 0.01,
        "margin_strategy": "absolute",
        "margin": 0.1,
        "contrast_anchors": True,
        "contrast_positives": True,
        "gather_across_devices": False,
    }
    cached = ours.CachedGISTEmbedLoss(None, None, margin=0.1, mini_batch_size=8)
    assert cached.get_config_dict() == {
        **loss.get_config_dict(),
        "mini_batch_size": 8,
        "mini_batch_num_tokens": None,
    }
    for each in (loss, cached):
        assert "2402.16829" in each.citation
        assert getattr(of_library, type(each).__name__) is type(each)


@given(**sizes, **options)
@drawn
def test_loss_agrees_with_the_library(n, d, seed, temperature, columns, arguments):
    losses = sentence_transformers().sentence_transformer.losses
    z, guide = drawn_case(n, d, seed, columns)
    loss = ours.GISTEmbedLoss(None, None, temperature, **arguments)
    theirs = of_the_library(losses, "GISTEmbedLoss", {"temperature": temperature, **arguments}, None, None)
    theirs.model = lambda column: {"sentence_embedding": column["z"]}
    theirs.guide = lambda column: {"sentence_embedding": column["guide"]}
    assert_same(
        lambda *z: loss.compute_loss_from_embeddings(z, guide.unbind()),
        lambda *z: theirs([{"z": a, "guide": g.to(a.dtype)} for a, g in zip(z, guide, strict=True)], None),
        temperature,
        *z,
    )


def of_the_library(losses, name, arguments, model, guide):
    """Return a loss of the library without calling its constructor, which requires models with tokenizers."""
    theirs = getattr(losses, name).__new__(getattr(losses, name))
    nn.Module.__init__(theirs)
    arguments = {"gather_across_devices": False, "show_progress_bar": False, "mini_batch_num_tokens": None, **arguments}
    for key, value in arguments.items():
        setattr(theirs, key, value)
    theirs.similarity_fct, theirs.cross_entropy_loss = nn.CosineSimilarity(dim=-1), nn.CrossEntropyLoss()
    theirs.must_retokenize, theirs.model, theirs.guide = False, model, guide
    return theirs


@pytest.mark.parametrize("columns", [2, 3, 5])
@pytest.mark.parametrize("widths", [None, [5, 3]])
def test_cached_loss_agrees_with_the_library(columns, widths):
    theirs = sentence_transformers()
    losses = theirs.sentence_transformer.losses
    options = {"margin_strategy": "relative", "margin": 0.1, "contrast_anchors": True, "contrast_positives": True}
    arguments = {"temperature": 0.2, "mini_batch_size": 4, **options}
    ends = []
    for is_ours in (True, False):
        torch.manual_seed(0)
        model, guide = Encoder(5), Encoder(4).eval()
        torch.manual_seed(1)
        in_library = theirs.SentenceTransformer(modules=[model], device="cpu")  # MatryoshkaLoss needs it
        if is_ours:
            loss = ours.CachedGISTEmbedLoss(in_library, guide, **arguments)
        else:
            loss = of_the_library(losses, "CachedGISTEmbedLoss", arguments, in_library, guide)
        in_library.train()
        if widths is not None:
            loss = losses.MatryoshkaLoss(in_library, loss, widths, matryoshka_weights=[1, 0.3])
        value = loss(text_columns(columns), torch.zeros(0))
        (3 * value).backward()
        ends.append([value.detach(), model.words.weight.grad])
    torch.testing.assert_close(*ends, atol=1e-9, rtol=1e-9)
