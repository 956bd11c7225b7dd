"""A loss of the embeddings' first features, at several widths."""

import pytest
import torch

import fastntxent


def test_matryoshka_is_the_weighted_sum_of_the_losses_of_cut_rows():
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
        ({"dims": []}, ValueError, "dims must have at least one width, got none"),
        ({"dims": [0]}, ValueError, "dims must be at least 1, got 0"),
        ({"dims": [2.5]}, TypeError, "dims must be an int, got float"),
        ({"dims": [5]}, ValueError, "dims must be at most the embeddings' number of features, 4, got 5"),
        ({"dims": [2], "weights": [1, 2]}, ValueError, "weights must be one for each of the 1 dims, got 2"),
        ({"dims": [2], "weights": [0]}, ValueError, "weights must be finite, and one of them not 0"),
        ({"dims": [2], "weights": ["a"]}, TypeError, "weights must be a number, got str"),
    ],
)
def test_matryoshka_errors_name_the_argument(options, error, words):
    with pytest.raises(error, match=words):
        fastntxent.matryoshka(fastntxent.nt_xent, *torch.randn(2, 6, 4), 0.5, **options)


def test_matryoshka_of_no_embeddings_or_of_a_function_as_a_module_is_an_error():
    with pytest.raises(ValueError, match="matryoshka needs embeddings among the arguments"):
        fastntxent.matryoshka(lambda x: x, torch.arange(3), dims=[1])
    with pytest.raises(TypeError, match="loss must be a module, got function"):
        fastntxent.MatryoshkaLoss(lambda x: x, dims=[1])


def test_multi_clip_errors_name_the_argument():
    z = torch.randn(3, 5, 4)
    with pytest.raises(TypeError, match="features must be a sequence of tensors"):
        fastntxent.multi_clip(z)
    with pytest.raises(ValueError, match="features must be of at least two towers, got 1"):
        fastntxent.multi_clip([z[0]])
    with pytest.raises(ValueError, match="weights must be one for each of the 3 pairs, got 2"):
        fastntxent.multi_clip(list(z), weights=[1, 2])
    with pytest.raises(ValueError, match="weights must be finite, at least 0, and one of them above"):
        fastntxent.multi_clip(list(z), weights=[0, 0, 0])
    with pytest.raises(ValueError, match="same shape"):
        fastntxent.multi_clip([z[0], z[1][:3]])


@pytest.mark.parametrize("loss", [fastntxent.info_nce, fastntxent.clip])
def test_several_positives_need_ids_and_take_no_smoothing(loss):
    z_i, z_j = torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match="ids"):
        loss(z_i, z_j, positives="same_id")
    with pytest.raises(ValueError, match="label_smoothing"):
        loss(z_i, z_j, positives="same_id", ids=torch.arange(5), label_smoothing=0.1)
    with pytest.raises(ValueError, match="positives must be one of 'pair', 'same_id', got 'all'"):
        loss(z_i, z_j, positives="all")
    with pytest.raises(ValueError, match="form must be one of 'out', 'in', got 'pairs'"):
        loss(z_i, z_j, positives="same_id", ids=torch.arange(5), form="pairs")
