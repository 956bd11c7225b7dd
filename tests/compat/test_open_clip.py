"""fastntxent.compat.open_clip against open_clip, where it is installed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastntxent.compat import open_clip as ours
from tests.peers import assert_same, batch, drawn, open_clip, sizes


@given(**sizes, scale=st.floats(0.5, 20), bias=st.none() | st.floats(-10, 10), wide=st.booleans())
@drawn
def test_clip_loss_equals_open_clip(n, d, seed, scale, bias, wide):
    losses = [ours.ClipLoss(), open_clip().ClipLoss(cache_labels=True)]
    z, _ = batch(2, n, d, seed)
    shape = (1,) if wide else ()

    def called(loss):
        return lambda a, b, s: loss(a, b, s, logit_bias=bias).sum()  # of a scale (1,) theirs is 0-d too

    features = torch.nn.functional.normalize(z, dim=2)
    assert_same(*map(called, losses), 1 / scale, *features, torch.full(shape, scale))


def test_bias_has_a_gradient_of_zero():
    features = torch.nn.functional.normalize(torch.randn(2, 5, 3), dim=2)
    bias = torch.tensor([-10.0], requires_grad=True)
    value = ours.ClipLoss()(*features, torch.tensor(10.0), bias)
    assert value == ours.ClipLoss()(*features, torch.tensor(10.0))
    assert not torch.autograd.grad(value, bias)[0].any()


def test_output_dict():
    z = torch.eye(4)
    out = ours.ClipLoss()(z, z, torch.tensor(1.0), output_dict=True)
    assert out == {"contrastive_loss": ours.ClipLoss()(z, z, 1.0)}


def test_how_a_group_gathers_is_nothing_in_one_process():
    z = torch.eye(4)
    gathering = ours.ClipLoss(local_loss=True, gather_with_grad=True, rank=0, world_size=1, use_horovod=True)
    assert gathering(z, z, 1.0) == ours.ClipLoss()(z, z, 1.0)


def test_errors():
    z = torch.eye(4)
    with pytest.raises(ValueError, match="logit_scale must be a 0-d tensor"):
        ours.ClipLoss()(z, z, torch.ones(4))
    with pytest.raises(TypeError, match="logit_scale must be a float or a tensor of one element, got None"):
        ours.ClipLoss()(z, z, None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'logits'"):  # a model that is not CLIP's
        ours.ClipLoss()(image_features=z, text_features=z, logit_scale=1.0, logits=z)
    with pytest.raises(ValueError, match="same shape"):
        ours.ClipLoss()(z, z[:3], 1.0)


@pytest.mark.parametrize("bias", [False, True])
def test_what_a_model_returns_is_what_the_loss_takes(bias):
    # As the trainers call it; a parameter of one element is what fully sharded training makes of a number.
    z = torch.eye(4).requires_grad_()
    scale = torch.ones(1, requires_grad=True)
    model_out = {"image_features": z, "text_features": z, "logit_scale": scale.exp()}
    if bias:
        model_out["logit_bias"] = torch.full((1,), -10.0)
    losses = ours.ClipLoss(cache_labels=True)(**model_out, output_dict=True)
    assert list(losses) == ["contrastive_loss"]
    sum(losses.values()).backward()
    assert scale.grad.shape == (1,)
    assert z.grad.any()
