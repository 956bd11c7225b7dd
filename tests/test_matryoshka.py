"""Losses computed on the leading features of embeddings, at several widths; CLIP with several towers or positives."""

import inspect
from functools import partial

import pytest
import torch

import fastntxent
from fastntxent.compat import open_clip, sup_contrast
from fastntxent.trees import named_tensors


def test_matryoshka_equals_the_weighted_sum_of_the_losses_of_cut_rows():
    z_i, z_j = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True).unbind()
    ids = torch.arange(6) // 2
    value = fastntxent.matryoshka(fastntxent.nt_xent, z_i, z_j, 0.3, dims=[8, 3], weights=[1.0, 0.5], ids=ids)
    one, other = (fastntxent.nt_xent(z_i[:, :d], z_j[:, :d], 0.3, ids=ids) for d in (8, 3))
    torch.testing.assert_close(value, one + other / 2)
    gradients = (torch.autograd.grad(x, (z_i, z_j), retain_graph=True) for x in (value, one + other / 2))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_matryoshka_cuts_embeddings_in_sequences_and_leaves_the_rest(reduction):
    z = torch.randn(3, 5, 4)
    options = {"reduction": reduction}
    value = fastntxent.matryoshka(fastntxent.multi_clip, list(z), torch.tensor(0.5), dims=[2], **options)
    torch.testing.assert_close(value, fastntxent.multi_clip(list(z[..., :2]), 0.5, **options))


def test_module_trains_the_parameters_of_its_loss():
    loss = fastntxent.MatryoshkaLoss(fastntxent.CLIPLoss(), dims=[4, 2], weights=[1, 2])
    z_i, z_j = torch.randn(2, 6, 4)
    loss(z_i, z_j).backward()
    assert loss.loss.log_temperature.grad.abs() > 0
    assert repr(loss).startswith("MatryoshkaLoss(\n  dims=[4, 2], weights=[1, 2]")


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dims": []}, ValueError, "dims must have at least one width, got an empty"),
        ({"dims": [0]}, ValueError, "dims must be at least 1, got 0"),
        ({"dims": [2.5]}, TypeError, "dims must be an int, got float"),
        ({"dims": [5]}, ValueError, "dims must be at most the embeddings' number of features, 4, got 5"),
        ({"dims": [2], "weights": [1, 2]}, ValueError, "weights must have one number for each of the 1 dims, got 2"),
        ({"dims": [2], "weights": [0]}, ValueError, "weights must be finite and not all 0"),
        ({"dims": [2], "weights": ["a"]}, TypeError, "weights must be a number for each of the dims, got str"),
        ({"dims": 2}, TypeError, "dims must be a sequence of ints, got int"),
        ({"dims": None}, TypeError, "dims must be a sequence of ints, got NoneType"),
        ({"dims": [2], "weights": 1.0}, TypeError, "weights must be a sequence, a number for each of the dims, got fl"),
    ],
)
def test_matryoshka_errors_name_the_argument(options, error, words):
    with pytest.raises(error, match=words):
        fastntxent.matryoshka(fastntxent.nt_xent, *torch.randn(2, 6, 4), 0.5, **options)


def test_matryoshka_rejects_calls_without_embeddings_and_wrong_kinds_of_loss():
    with pytest.raises(ValueError, match="matryoshka needs an embedding among the arguments"):
        fastntxent.matryoshka(lambda x: x, torch.arange(3), dims=[1])
    with pytest.raises(TypeError, match="loss must be a module, got function"):
        fastntxent.MatryoshkaLoss(lambda x: x, dims=[1])
    with pytest.raises(TypeError, match="loss must be a function or a module, got str"):
        fastntxent.matryoshka("nt_xent", torch.eye(3), dims=[1])


def test_matryoshka_rejects_sparse_embeddings_and_results_that_are_not_tensors():
    z = torch.randn(6, 4)
    with pytest.raises(TypeError, match=r"z_j must be a dense \(strided\) tensor, got torch.sparse_coo"):
        fastntxent.matryoshka(fastntxent.nt_xent, z, z.to_sparse(), dims=[2])
    with pytest.raises(TypeError, match=r"features\[1\] must be a dense \(strided\) tensor"):
        fastntxent.matryoshka(fastntxent.multi_clip, [z, z.to_sparse()], dims=[2])
    with pytest.raises(TypeError, match="loss must return a tensor, or a tuple, list or mapping of tensors, got float"):
        fastntxent.matryoshka(lambda z: (z.sum(), 1.0), z, dims=[2])


def _terms(z_i, z_j):
    return fastntxent.nt_xent_terms(z_i, z_j)


def _towers(loss, **options):
    return lambda z_i, z_j: loss(z_i, z_j, logit_scale=2.0, **options)


LOGITS, CAPTIONS = torch.randn(6, 3, 7), torch.randint(1, 7, (6, 3))


@pytest.mark.parametrize(
    "loss",
    [
        _terms,
        _towers(open_clip.ClipLoss(), output_dict=True),
        lambda z_i, z_j: open_clip.DistillClipLoss()(z_i, z_j, 2.0, z_j, z_i, 3.0),
        _towers(open_clip.CoCaLoss(2.0, 1.0), logits=LOGITS, labels=CAPTIONS),
        lambda z_i, z_j: [z_i.sum(), {"of": z_j.sum(dim=0).square().sum()}],
    ],
    ids=["named tuple", "dict", "tuple", "CoCa", "list"],
)
def test_matryoshka_weights_every_entry_of_the_result(loss):
    z_i, z_j = torch.randn(2, 6, 8)
    value = fastntxent.matryoshka(loss, z_i, z_j, dims=[8, 3], weights=[1.0, -0.5])
    whole, cut = (loss(z_i[:, :d], z_j[:, :d]) for d in (8, 3))
    assert type(value) is type(whole)
    expected = [a - b / 2 for (_, a), (_, b) in zip(named_tensors(whole, ""), named_tensors(cut, ""), strict=True)]
    torch.testing.assert_close([x for _, x in named_tensors(value, "")], expected)


def test_matryoshka_does_not_cut_pair_weights_masks_or_logits():
    z, labels, weights = torch.randn(6, 4), torch.arange(6) % 3, torch.rand(3, 3)
    value = fastntxent.matryoshka(fastntxent.sup_con, z, labels, pair_weights=weights, dims=[2])
    torch.testing.assert_close(value, fastntxent.sup_con(z[:, :2], labels, pair_weights=weights))
    views, mask = torch.randn(6, 2, 4), torch.rand(6, 6)
    loss = sup_contrast.SupConLoss()
    for arguments, options in (((None, mask), {}), ((), {"mask": mask})):
        value = fastntxent.MatryoshkaLoss(loss, dims=[3])(views, *arguments, **options)
        torch.testing.assert_close(value, loss(views[..., :3], mask=mask))
    images, texts = torch.randn(2, 6, 8)
    coca = open_clip.CoCaLoss(2.0, 1.0)
    both = fastntxent.matryoshka(coca, images, texts, LOGITS, CAPTIONS, 2.0, dims=[5])
    torch.testing.assert_close(both, coca(images[:, :5], texts[:, :5], LOGITS, CAPTIONS, 2.0))


def test_matryoshka_does_not_cut_arguments_bound_by_partial():
    z_i, z_j, key = torch.randn(3, 6, 4)

    def loss(z_i, z_j, other):
        return (z_i * z_j).sum() + other.sum()

    value = fastntxent.matryoshka(partial(loss, other=key), z_i, z_j, dims=[2])
    torch.testing.assert_close(value, loss(z_i[:, :2], z_j[:, :2], key))


def test_matryoshka_knows_the_names_of_arguments_behind_partial():
    views, mask, loss = torch.randn(6, 2, 4), torch.rand(6, 6), sup_contrast.SupConLoss()
    value = fastntxent.matryoshka(partial(loss), views, None, mask, dims=[3])
    torch.testing.assert_close(value, loss(views[..., :3], mask=mask))


@pytest.mark.parametrize(
    "options",
    [
        {"positives": "same_id", "form": "in"},
        {"margin": 0.1},
        {"relative_margin": 0.2, "ceiling": 0.5},
        {"label_smoothing": 0.1},
        {"reduction": "none", "normalize": False},
    ],
)
def test_multi_clip_and_its_module_pass_every_option_to_clip(options):
    z, ids = torch.randn(3, 6, 4), torch.tensor([0, 0, 1, 1, 2, 3])
    weights = [1.0, 0.5, 2.0]
    pairs = zip(weights, [(0, 1), (0, 2), (1, 2)], strict=True)
    expected = sum(w * fastntxent.clip(z[a], z[b], 0.3, ids=ids, **options) for w, (a, b) in pairs)
    plain = fastntxent.clip(z[0], z[1], 0.3, ids=ids, reduction=options.get("reduction", "mean"))
    assert not torch.allclose(fastntxent.clip(z[0], z[1], 0.3, ids=ids, **options), plain)  # the options matter
    value = fastntxent.multi_clip(list(z), 0.3, weights=weights, ids=ids, **options)
    module = fastntxent.MultiCLIPLoss(0.3, weights=weights, learn_temperature=False, **options)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(module(list(z), ids), expected)


def test_multi_clip_has_all_options_of_clip_except_the_bias():
    clip, several = (inspect.signature(f).parameters for f in (fastntxent.clip, fastntxent.multi_clip))
    assert {name: p.default for name, p in several.items() if name in clip} == {
        name: p.default for name, p in clip.items() if name not in ("image_features", "text_features", "logit_bias")
    }


def test_multi_clip_errors_name_the_argument():
    z = torch.randn(3, 5, 4)

    def of_module(weights):
        return fastntxent.MultiCLIPLoss(weights=weights)

    with pytest.raises(TypeError, match="features must be a sequence of tensors"):
        fastntxent.multi_clip(z)
    with pytest.raises(TypeError, match=r"features\[0\] must be a torch.Tensor, got NoneType"):
        fastntxent.multi_clip([None, z[0]])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"features\[0\] must be a torch.Tensor, got list"):
        fastntxent.multi_clip([[[1.0]], z[0]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="features must hold at least two towers, got 1"):
        fastntxent.multi_clip([z[0]])
    with pytest.raises(ValueError, match="weights must have one number for each of the 3 pairs, got 2"):
        fastntxent.multi_clip(list(z), weights=[1, 2])
    for function in (lambda weights: fastntxent.multi_clip(list(z), weights=weights), of_module):
        with pytest.raises(ValueError, match="weights must be finite and at least 0, and not all 0"):
            function([0, 0, 0])
        with pytest.raises(ValueError, match=r"weights must be finite and at least 0, .*got \[-1.0, 2.0, 2.0\]"):
            function([-1.0, 2.0, 2.0])
        with pytest.raises(TypeError, match="weights must be a sequence, a number for each pair, got float"):
            function(0.5)
        with pytest.raises(TypeError, match="weights must be a number for each pair, got str"):
            function(["a", 1, 1])
    with pytest.raises(ValueError, match="same shape"):
        fastntxent.multi_clip([z[0], z[1][:3]])


@pytest.mark.parametrize("loss", [fastntxent.info_nce, fastntxent.clip])
def test_several_positives_need_ids(loss):
    z_i, z_j = torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match="ids must be given with positives 'same_id', got None"):
        loss(z_i, z_j, positives="same_id")
    with pytest.raises(ValueError, match="positives must be one of 'pair', 'same_id', got 'all'"):
        loss(z_i, z_j, positives="all")
    with pytest.raises(ValueError, match="form must be one of 'out', 'in', got 'pairs'"):
        loss(z_i, z_j, positives="same_id", ids=torch.arange(5), form="pairs")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("label_smoothing", 0.1, "label_smoothing must be 0 with positives 'same_id', got 0.1"),
        ("margin", 0.0, "margin must be None with positives 'same_id', got 0.0"),
        ("relative_margin", 0.1, "relative_margin must be None with positives 'same_id', got 0.1"),
        ("ceiling", 0.1, "ceiling must be None with positives 'same_id', got 0.1"),
        ("hardness_strength", 2.0, "hardness_strength must be 0 with positives 'same_id', got 2.0"),
        ("in_batch_negatives", False, "in_batch_negatives must be None or True with positives 'same_id', got False"),
    ],
)
def test_options_unsupported_with_same_id_positives_are_rejected(option, value, words):
    z_i, z_j = torch.randn(2, 5, 4)
    options = {"positives": "same_id", option: value}
    calls = [
        lambda: fastntxent.info_nce(z_i, z_j, ids=torch.arange(5), **options),
        lambda: fastntxent.InfoNCELoss(**options),
    ]
    if option not in ("hardness_strength", "in_batch_negatives"):
        calls += [
            lambda: fastntxent.clip(z_i, z_j, ids=torch.arange(5), **options),
            lambda: fastntxent.multi_clip([z_i, z_j], ids=torch.arange(5), **options),
            lambda: fastntxent.CLIPLoss(**options),
            lambda: fastntxent.MultiCLIPLoss(**options),
        ]
    for call in calls:
        with pytest.raises(ValueError, match=f"^{words}$"):
            call()
