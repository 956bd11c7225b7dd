"""fastntxent.compat.open_clip against open_clip, if it is installed."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastntxent.compat import open_clip as ours
from tests.peers import assert_same, batch, drawn, open_clip, sizes, value_and_gradients


@given(**sizes, scale=st.floats(0.5, 20), bias=st.none() | st.floats(-10, 10), wide=st.booleans())
@drawn
def test_clip_loss_agrees_with_open_clip(n, d, seed, scale, bias, wide):
    losses = [ours.ClipLoss(), open_clip().ClipLoss(cache_labels=True)]
    z, _ = batch(2, n, d, seed)
    shape = (1,) if wide else ()

    def called(loss):
        return lambda a, b, s: loss(a, b, s, logit_bias=bias).sum()  # no-op: it is 0-d even for a scale of shape (1,)

    features = F.normalize(z, dim=2)
    assert_same(*map(called, losses), 1 / scale, *features, torch.full(shape, scale))


def test_bias_has_a_gradient_of_zero():
    features = F.normalize(torch.randn(2, 5, 3), dim=2)
    bias = torch.tensor([-10.0], requires_grad=True)
    value = ours.ClipLoss()(*features, torch.tensor(10.0), bias)
    assert value == ours.ClipLoss()(*features, torch.tensor(10.0))
    assert not torch.autograd.grad(value, bias)[0].any()


def test_output_dict_names_the_loss():
    z = torch.eye(4)
    out = ours.ClipLoss()(z, z, torch.tensor(1.0), output_dict=True)
    assert out == {"contrastive_loss": ours.ClipLoss()(z, z, 1.0)}


def test_gathering_options_change_nothing_in_one_process():
    z = torch.eye(4)
    gathering = ours.ClipLoss(local_loss=True, gather_with_grad=True, rank=0, world_size=1, use_horovod=True)
    assert gathering(z, z, 1.0) == ours.ClipLoss()(z, z, 1.0)


def dense_clip_loss(image, text, scale):
    logits, labels = scale * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def dense_distill_loss(image, text, scale, dist_image, dist_text, dist_scale):
    directions = [
        F.cross_entropy(student, teacher.softmax(dim=1))  # targets are probabilities
        for student, teacher in (
            (scale * image @ text.T, dist_scale * dist_image @ dist_text.T),
            (scale * text @ image.T, dist_scale * dist_text @ dist_image.T),
        )
    ]
    return sum(directions) / 2


@given(**sizes, scale=st.floats(0.5, 20), dist_scale=st.floats(0.5, 20))
@drawn
def test_distill_clip_loss_equals_its_definition(n, d, seed, scale, dist_scale):
    z, _ = batch(4, n, d + 1, seed)
    image, text = F.normalize(z[:2], dim=2)
    teacher = F.normalize(z[2:, :, :d], dim=2).double()  # float32 values, the same for students of either dtype

    def called(index):
        def ours_at(a, b, s):
            return ours.DistillClipLoss()(a, b, s, *teacher, dist_scale)[index]

        def definition(a, b, s):
            return dense_distill_loss(a, b, s, *teacher.to(a.dtype), dist_scale) if index else dense_clip_loss(a, b, s)

        return ours_at, definition

    for index in (0, 1):
        assert_same(*called(index), 1 / scale, image, text, torch.tensor(scale))


@given(**sizes, weights=st.tuples(st.floats(0, 3), st.sampled_from([0.0, 0.5, 1.0])), pad=st.sampled_from([0, 3, -100]))
@drawn
def test_coca_loss_equals_its_definition(n, d, seed, weights, pad):
    z, _ = batch(2, n, d, seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, 5, 7, generator=generator)
    labels = torch.randint(0, 7, (n, 5), generator=generator)
    labels[:, -1] = pad
    labels[0, 0] = 1  # at least one label is not padding

    def ours_of(a, b, logits, scale):
        return sum(ours.CoCaLoss(*weights, pad_id=pad)(a, b, logits, labels, scale))

    def definition(a, b, logits, scale):
        kept = labels != pad
        caption = -logits.log_softmax(dim=2)[kept].gather(1, labels[kept][:, None]).mean()
        return weights[0] * caption + weights[1] * dense_clip_loss(a, b, scale)

    inputs = [*F.normalize(z.double(), dim=2), logits.double(), torch.tensor(4.0, dtype=torch.float64)]
    value, true = (value_and_gradients(loss, inputs) for loss in (ours_of, definition))
    for a, b in zip(value, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_output_dict_of_distill_clip_loss_and_coca_loss_names_both_losses():
    z, logits, labels = torch.eye(4), torch.randn(4, 2, 3), torch.ones(4, 2, dtype=torch.int64)
    for loss, call, names in (
        (ours.DistillClipLoss(), (z, z, 1.0, z, z, 2.0), ("contrastive_loss", "distill_loss")),
        (ours.CoCaLoss(2.0, 0.5), (z, z, logits, labels, 1.0), ("contrastive_loss", "caption_loss")),
    ):
        assert loss(*call, output_dict=True) == dict(zip(names, loss(*call), strict=True))


def test_coca_loss_with_a_clip_weight_of_0_ignores_the_features():
    nothing = torch.full((4, 3), torch.nan, dtype=torch.float16)
    contrastive, caption = ours.CoCaLoss(1.0, 0.0)(
        nothing, nothing, torch.zeros(4, 2, 3), torch.ones(4, 2, dtype=torch.int64), 1.0
    )
    assert torch.equal(contrastive, torch.tensor(0.0))
    assert contrastive.dtype == torch.float32
    assert caption.isfinite()


IDS = torch.tensor([0, 1, 0, 2, 1, 0, 3])


def test_clip_loss_leaves_out_negatives_with_the_same_id():
    z = F.normalize(torch.randn(2, 7, 5, dtype=torch.float64), dim=2)
    left_out = (IDS[:, None] == IDS) & ~torch.eye(7, dtype=torch.bool)

    def definition(image, text, scale):
        logits = (scale * image @ text.T).masked_fill(left_out, -torch.inf)
        return (F.cross_entropy(logits, torch.arange(7)) + F.cross_entropy(logits.T, torch.arange(7))) / 2

    inputs = [*z, torch.tensor(5.0, dtype=torch.float64)]
    ends = [
        value_and_gradients(loss, inputs)
        for loss in (lambda *x: ours.ClipLoss()(*x, output_dict=True, ids=IDS)["contrastive_loss"], definition)
    ]
    torch.testing.assert_close(*ends)


def test_siglip_loss_takes_pairs_with_the_same_id_as_positives():
    z = F.normalize(torch.randn(2, 7, 5, dtype=torch.float64), dim=2)
    sign = torch.where(IDS[:, None] == IDS, 1, -1)

    def definition(image, text, scale, bias):
        return -F.logsigmoid(sign * (scale * image @ text.T + bias)).sum() / 7

    inputs = [*z, *torch.tensor([5.0, -3.0], dtype=torch.float64)]
    ends = [value_and_gradients(loss, inputs) for loss in (lambda *x: ours.SigLipLoss()(*x, ids=IDS), definition)]
    torch.testing.assert_close(*ends)


def test_invalid_arguments_are_named():
    z = torch.eye(4)
    with pytest.raises(ValueError, match="logit_scale must be a 0-d tensor"):
        ours.ClipLoss()(z, z, torch.ones(4))
    with pytest.raises(TypeError, match="logit_scale must be a float or a tensor of one element, got None"):
        ours.ClipLoss()(z, z, None)
    # This is a call with the output of a model other than CLIP.
    with pytest.raises(TypeError, match="unexpected keyword argument 'logits'"):
        ours.ClipLoss()(image_features=z, text_features=z, logit_scale=1.0, logits=z)
    with pytest.raises(ValueError, match="same shape"):
        ours.ClipLoss()(z, z[:3], 1.0)
    for loss in (ours.ClipLoss(), ours.SigLipLoss()):
        with pytest.raises(ValueError, match=r"ids must have shape \(4,\)"):
            loss(z, z, 1.0, ids=torch.arange(3))
    for loss in (ours.ClipLoss(), ours.SigLipLoss()):
        for bias in (math.nan, math.inf, torch.tensor([math.nan])):
            with pytest.raises(ValueError, match="logit_bias must be finite, got"):
                loss(z, z, 1.0, bias)
        with pytest.raises(ValueError, match=r"logit_bias in torch.float32 must be from .*, got 1e\+300"):
            loss(z, z, 1.0, torch.tensor(1e300, dtype=torch.float64))
    with pytest.raises(ValueError, match="must have 4 rows, one for each row of image_features, got 3"):
        ours.DistillClipLoss()(z, z, 1.0, z[:3], z[:3], 1.0)
    with pytest.raises(ValueError, match="dist_image_features and dist_text_features must have the same shape"):
        ours.DistillClipLoss()(z, z, 1.0, z, z[:3], 1.0)
    with pytest.raises(TypeError, match=r"dist_text_features must be a torch.Tensor, got NoneType"):
        ours.DistillClipLoss()(z, z, 1.0, z, None, 1.0)
    with pytest.raises(TypeError, match="dist_logit_scale must be a float or a tensor of one element, got None"):
        ours.DistillClipLoss()(z, z, 1.0, z, z, None)
    with pytest.raises(TypeError, match="logit_scale must be a float or a tensor of one element, got None"):
        ours.CoCaLoss(1.0, 1.0)(z, z, z[None], z[None], None)


@pytest.mark.parametrize("bias", [False, True])
def test_loss_accepts_the_output_dict_of_a_model(bias):
    # Trainers call the loss like this. Fully sharded training turns a scalar parameter into one of shape (1,).
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
