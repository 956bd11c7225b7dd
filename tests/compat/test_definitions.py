"""Drop-ins against definitions written out here, and errors that several drop-ins share."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, normalize

from fastntxent.compat import lightly, pytorch_metric_learning, simclr, solo_learn, sup_contrast, torchmultimodal
from tests.peers import assert_same, batch, drawn, sizes, temperatures

few = {**sizes, "n": st.integers(1, 12)}


def off_diagonal(n, m):
    return ~torch.eye(n, m, dtype=torch.bool)


# --- solo-learn ------------------------------------------------------------------------------------------------------


@given(**few, tau=temperatures, classes=st.integers(1, 6))
@drawn
def test_solo_learn_loss_equals_its_definition(n, d, seed, tau, classes):
    (z,), _ = batch(1, n, d, seed)
    indexes = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(seed))
    same = indexes[:, None] == indexes
    some = (same & off_diagonal(n, n)).any(dim=1)

    def definition(z):
        u = normalize(z, dim=1)
        sims = torch.exp(u @ u.T / tau)
        positive = (sims * (same & off_diagonal(n, n))).sum(dim=1)[some]
        negative = (sims * ~same).sum(dim=1)[some]
        return -(positive / (positive + negative)).log().sum() / max(1, int(some.sum())) + 0 * z.sum()

    assert_same(lambda z: solo_learn.simclr_loss_func(z, indexes, tau), definition, tau, z)


def test_float_labels_group_rows_by_value():
    z = torch.randn(6, 3)
    expected = solo_learn.simclr_loss_func(z, torch.tensor([0, 1, 0, 2, 1, 2]))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        labels = torch.tensor([0.0, 1.5, -0.0, -3.0, 1.5, -3.0], dtype=dtype)
        assert solo_learn.simclr_loss_func(z, labels) == expected


# --- SupContrast -----------------------------------------------------------------------------------------------------


@given(
    **few,
    tau=temperatures,
    base=temperatures,
    v=st.integers(1, 3),
    mode=st.sampled_from(["all", "one"]),
    kind=st.sampled_from([None, "labels", torch.bool, torch.float32, torch.float64, torch.int64]),
)
@drawn
def test_sup_contrast_loss_equals_its_definition(n, d, seed, tau, base, v, mode, kind):
    z, _ = batch(v, n, d, seed)
    features = normalize(z, dim=2).transpose(0, 1).contiguous() * 1.1
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=generator)
    arguments, mask = {}, torch.eye(n)
    if kind == "labels":
        arguments, mask = {"labels": labels}, labels[:, None] == labels
    elif kind is not None:  # any mask, not necessarily symmetric; numbers are weights
        mask = torch.rand(n, n, generator=generator) * (2 if kind.is_floating_point else 3)
        mask = (mask > 0.8) if kind is torch.bool else mask.to(kind)
        arguments = {"mask": mask}

    def definition(features):
        rows = torch.cat(features.unbind(dim=1))
        anchors = features[:, 0] if mode == "one" else rows
        logits = anchors @ rows.T / tau
        others = off_diagonal(*logits.shape)
        weights = mask.to(logits).repeat(len(anchors) // n, v) * others
        total = weights.sum(dim=1)
        log_prob = logits - torch.where(others, logits, -math.inf).logsumexp(dim=1, keepdim=True)
        log_prob = torch.where(weights != 0, log_prob, 0)
        losses = -(weights * log_prob).sum(dim=1) / torch.where(total < 1e-6, 1, total)
        return losses.mean()

    loss = sup_contrast.SupConLoss(tau, mode, base)
    # Remove the factor tau / base, which scales rounding errors too.
    assert_same(lambda f: base / tau * loss(f, **arguments), definition, tau, features)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_sup_contrast_keeps_small_weights_beside_a_large_diagonal(dtype):
    # There are two rows. Each is the only positive of the other, and there is no negative, so the loss is 0. The
    # diagonal of the mask belongs to no pair.
    features = normalize(torch.tensor([[[-1.1, 0.2]], [[1.1, 0.1]]]), dim=2).requires_grad_()
    mask = torch.tensor([[100.0, 1e-3], [2e-3, 100.0]], dtype=dtype)
    loss = sup_contrast.SupConLoss(1.0, base_temperature=1.0)(features, mask=mask)
    assert abs(loss) < 1e-6
    assert torch.autograd.grad(loss, features)[0].abs().max() < 1e-6


def test_sup_contrast_flattens_features_and_takes_labels_of_any_dtype():
    features = torch.randn(4, 2, 3, 5)
    loss = sup_contrast.SupConLoss(temperature=1.0)
    torch.testing.assert_close(loss(features), loss(features.flatten(2)))
    labels = torch.tensor([0, 1, 1, 0])
    for dtype in (torch.uint8, torch.int32, torch.bool, torch.float32):
        torch.testing.assert_close(loss(features, labels.to(dtype)), loss(features, labels))
    assert loss(features, labels[:, None]) == loss(features, labels)


def test_sup_contrast_gradient_of_the_temperature_includes_its_scale_factor():
    features = normalize(torch.randn(4, 2, 3, dtype=torch.float64), dim=2)
    for arguments in ({}, {"labels": torch.tensor([0, 1, 1, 0])}, {"mask": torch.rand(4, 4).double()}):

        def value(tau, arguments=arguments):
            return sup_contrast.SupConLoss(tau)(features, **arguments)

        tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(value, tau, check_undefined_grad=False)


def test_sup_contrast_mask_works_under_autocast_and_in_half_precision():
    features = normalize(torch.randn(8, 2, 16), dim=2)
    loss, mask = sup_contrast.SupConLoss(0.1), torch.rand(8, 8) > 0.5
    expected = loss(features, mask=mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(features, mask=mask), expected)
        torch.testing.assert_close(loss(features, mask=mask.float()), expected)
    half = loss(features.half(), mask=mask)
    torch.testing.assert_close(half, loss(features.half().float(), mask=mask))


def test_sup_contrast_does_not_divide_by_a_sum_of_weights_near_zero():
    features, ones = normalize(torch.randn(4, 2, 3, dtype=torch.float64), dim=2), torch.ones(4, 4).double()
    loss = sup_contrast.SupConLoss(0.5)
    torch.testing.assert_close(loss(features, mask=1e-8 * ones), 7e-8 * loss(features, mask=ones), rtol=1e-9, atol=0)


def test_sup_contrast_names_invalid_arguments():
    features, labels = torch.randn(4, 2, 3), torch.arange(4)
    with pytest.raises(ValueError, match=r"features must have shape \(B, V, \.\.\.\), got \(4, 3\)"):
        sup_contrast.SupConLoss()(features[:, 0])
    with pytest.raises(ValueError, match="labels and mask must not both be given"):
        sup_contrast.SupConLoss()(features, labels, torch.eye(4))
    with pytest.raises(ValueError, match="contrast_mode must be one of 'all', 'one', got 'none'"):
        sup_contrast.SupConLoss(contrast_mode="none")
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\) or \(4, 1\), got \(3,\)"):
        sup_contrast.SupConLoss()(features, labels[:3])
    with pytest.raises(ValueError, match=r"mask must have shape \(4, 4\), got \(4, 3\)"):
        sup_contrast.SupConLoss()(features, mask=torch.ones(4, 3))
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0"):
        sup_contrast.SupConLoss(0)
    for base, error in ((0.0, ValueError), (-1.0, ValueError), ("x", TypeError)):
        with pytest.raises(error, match="base_temperature must be"):
            sup_contrast.SupConLoss(base_temperature=base)
    with pytest.raises(TypeError, match=r"features must be a torch\.Tensor, got list"):
        sup_contrast.SupConLoss()([features])
    with pytest.raises(TypeError, match=r"features must be a dense .* got torch\.sparse_coo"):
        sup_contrast.SupConLoss()(features.to_sparse())
    for mask in (torch.eye(4).to_sparse(), torch.eye(4).to(torch.complex64)):
        with pytest.raises(TypeError, match=r"mask must (be a dense|hold real numbers)"):
            sup_contrast.SupConLoss()(features, mask=mask)
    with pytest.raises(TypeError, match=r"mask must be a torch\.Tensor, got list"):
        sup_contrast.SupConLoss()(features, mask=[[1] * 4] * 4)


LABELLED = {
    "solo_learn": lambda labels: solo_learn.simclr_loss_func(torch.eye(4), labels),
    "sup_contrast": lambda labels: sup_contrast.SupConLoss()(torch.eye(4)[:, None], labels),
    "nt_xent": lambda labels: pytorch_metric_learning.NTXentLoss()(torch.eye(4), labels),
    "sup_con": lambda labels: pytorch_metric_learning.SupConLoss()(torch.eye(4), labels),
    "references": lambda labels: pytorch_metric_learning.SupConLoss()(
        torch.eye(4), torch.arange(4), ref_emb=torch.eye(4), ref_labels=labels
    ),
}


@pytest.mark.parametrize("name", LABELLED)
def test_labels_that_cannot_be_ids_are_refused(name):
    nan = torch.tensor([0.0, 0.0, math.nan, math.nan])
    with pytest.raises(ValueError, match=r"(labels|indexes) must not be NaN"):
        LABELLED[name](nan)
    for labels in (torch.zeros(4, dtype=torch.complex64), torch.zeros(4).to_sparse()):
        with pytest.raises(TypeError, match=r"(labels|indexes) must (be a dense|hold real numbers)"):
            LABELLED[name](labels)
    with pytest.raises(TypeError, match=r"(labels|indexes) must be a torch\.Tensor, got list"):
        LABELLED[name]([0, 0, 1, 1])


# --- google-research/simclr ------------------------------------------------------------------------------------------


@given(**few, tau=temperatures, norm=st.booleans(), kind=st.sampled_from(["default", "number", "vector"]))
@drawn
def test_simclr_loss_equals_its_definition(n, d, seed, tau, norm, kind):
    z, _ = batch(2, n, d, seed)
    hidden = z.flatten(0, 1) if norm else normalize(z.flatten(0, 1), dim=1) * 1.1
    vector = torch.rand(n, generator=torch.Generator().manual_seed(seed)).mul(2).sub(0.5).relu()  # some are 0
    weights = {"default": 1.0, "number": 0.7, "vector": vector}[kind]

    def definition(hidden):
        if norm:
            hidden = hidden / hidden.square().sum(dim=1, keepdim=True).clamp_min(1e-12).sqrt()
        a, b = hidden.chunk(2)
        targets, itself = torch.arange(n), ~off_diagonal(n, n)
        total = torch.tensor(0.0)
        for x, y in ((a, b), (b, a)):
            logits = torch.cat((x @ y.T, (x @ x.T).masked_fill(itself, -math.inf)), dim=1) / tau
            losses = cross_entropy(logits, targets, reduction="none") * weights
            counted = vector.count_nonzero().clamp_min(1) if kind == "vector" else n
            total = total + losses.sum() / counted
        return total

    assert_same(lambda z: simclr.add_contrastive_loss(z, norm, tau, weights=weights).loss, definition, tau, hidden)


def test_simclr_returns_logits_that_are_formed_on_demand():
    hidden = torch.randn(12, 5, requires_grad=True)
    loss, logits, labels = simclr.add_contrastive_loss(hidden, temperature=0.5)
    u = normalize(hidden, dim=1)
    expected = u[:6] @ u[6:].T / 0.5
    assert logits.shape == (6, 6)
    torch.testing.assert_close(logits.dense(), expected)
    torch.testing.assert_close(logits.argmax(), expected.argmax(dim=1))
    assert labels.tolist() == list(range(6))
    assert torch.autograd.grad(logits.dense().sum(), hidden, retain_graph=True)[0].any()
    assert "not formed" in repr(logits)
    loss.backward()


def test_simclr_normalises_short_rows_as_tensorflow_does():
    u = normalize(torch.randn(6, 3), dim=1)
    expected = simclr.add_contrastive_loss(0.1 * u, hidden_norm=False, temperature=0.1).loss
    torch.testing.assert_close(simclr.add_contrastive_loss(1e-7 * u, temperature=0.1).loss, expected)


def test_simclr_names_invalid_arguments():
    z = torch.randn(4, 3)
    with pytest.raises(ValueError, match="hidden must have an even number of rows"):
        simclr.add_contrastive_loss(z[:3])
    with pytest.raises(ValueError, match=r"weights must be a number or have shape \(2,\), got \(4,\)"):
        simclr.add_contrastive_loss(z, weights=torch.ones(4))
    with pytest.raises(TypeError, match="weights must be a number or a tensor, got list"):
        simclr.add_contrastive_loss(z, weights=[1.0, 2.0])


def test_simclr_takes_a_context_of_one_replica():
    z = torch.randn(4, 3)
    for name in ("num_replicas", "num_replicas_in_sync"):
        one = SimpleNamespace(**{name: 1})
        loss = simclr.add_contrastive_loss(z, tpu_context=one, strategy=one).loss
        assert loss == simclr.add_contrastive_loss(z).loss


# --- torchmultimodal -------------------------------------------------------------------------------------------------


@given(
    **few,
    scale=st.floats(-0.5, 3),
    smoothing=st.sampled_from([0.0, 0.3]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    masked=st.booleans(),
)
@drawn
def test_torchmultimodal_loss_equals_its_definition(n, d, seed, scale, smoothing, reduction, masked):
    z, _ = batch(2, n, d, seed)
    mask = torch.rand(n, generator=torch.Generator().manual_seed(seed)) > 0.4 if masked else None
    kept = slice(None) if mask is None or not mask.any() else mask
    options = {"label_smoothing": smoothing, "reduction": reduction}

    def definition(a, b, logit_scale):
        logits = a @ b.T * logit_scale.exp()
        targets = torch.arange(n)[kept]
        loss_a, loss_b = (cross_entropy(x[kept], targets, **options) for x in (logits, logits.T))
        value = ((loss_a + loss_b) / 2).sum()
        return value * 0 if mask is not None and not mask.any() else value

    def ours(a, b, logit_scale):
        return torchmultimodal.contrastive_loss_with_temperature(
            a, b, logit_scale, mask=mask, cross_entropy_kwargs=options
        ).loss.sum()

    assert_same(ours, definition, math.exp(-scale), *normalize(z, dim=2), torch.tensor(scale))


def test_torchmultimodal_module_clamps_its_scale():
    loss = torchmultimodal.ContrastiveLossWithTemperature()
    assert loss.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    z = torch.eye(4)
    with torch.no_grad():
        loss.logit_scale.fill_(9.0)
    loss(z, z).backward()
    assert loss.logit_scale.item() == pytest.approx(math.log(100))
    assert loss.logit_scale.grad is not None
    parameter = torch.nn.Parameter(torch.tensor(-1.0))
    bounded = torchmultimodal.ContrastiveLossWithTemperature(parameter, logit_scale_min=None)
    assert bounded.logit_scale is parameter
    bounded(z, z)
    assert parameter.item() == -1


def test_torchmultimodal_output_has_both_directions_and_logits_on_demand():
    a, b = normalize(torch.randn(2, 5, 3), dim=2)
    mask = torch.tensor([True, False, True, True, False])
    out = torchmultimodal.contrastive_loss_with_temperature(a, b, torch.tensor(1.0), mask)
    torch.testing.assert_close(out.logits_a.dense(), (a @ b.T * math.e)[mask])
    torch.testing.assert_close(out.logits_b.dense(), (b @ a.T * math.e)[mask])
    torch.testing.assert_close(out.loss_a, cross_entropy(out.logits_a.dense(), torch.arange(5)[mask]))
    torch.testing.assert_close(out.loss_b, cross_entropy(out.logits_b.dense(), torch.arange(5)[mask]))
    torch.testing.assert_close(out.loss, (out.loss_a + out.loss_b) / 2)


def test_torchmultimodal_names_invalid_arguments():
    z = torch.eye(4)
    loss = torchmultimodal.ContrastiveLossWithTemperature()
    with pytest.raises(ValueError, match="must not both be None"):
        torchmultimodal.ContrastiveLossWithTemperature(logit_scale_min=None, logit_scale_max=None)
    with pytest.raises(ValueError, match="label_smoothing and reduction, got weight too"):
        loss(z, z, cross_entropy_kwargs={"weight": torch.ones(4)})
    with pytest.raises(ValueError, match=r"mask must be bool of shape \(4,\)"):
        loss(z, z, mask=torch.ones(4))
    with pytest.raises(TypeError, match=r"mask must be a torch\.Tensor, got list"):
        loss(z, z, mask=[True] * 4)
    with pytest.raises(TypeError, match=r"logit_scale must be a torch\.Tensor, got float"):
        torchmultimodal.contrastive_loss_with_temperature(z, z, 1.0)


ALWAYS_GATHER = [
    lambda z: torchmultimodal.ContrastiveLossWithTemperature()(z, z),
    lambda z: solo_learn.simclr_loss_func(z, torch.zeros(4)),
]


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")
@pytest.mark.parametrize("call", ALWAYS_GATHER)
def test_group_of_one_process_changes_nothing(call):
    alone = call(torch.eye(4))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert call(torch.eye(4)) == alone
    finally:
        dist.destroy_process_group()


OF_TEMPERATURE = [
    lambda z, t, labels: lightly.NTXentLoss(t, (8, 3))(z, z.detach() + 1),
    lambda z, t, labels: lightly.DCLWLoss(t)(z, z.detach() + 1),
]
OF_LABELS = [
    lambda z, t, labels: pytorch_metric_learning.NTXentLoss(t)(z, labels),
    lambda z, t, labels: pytorch_metric_learning.SupConLoss(t)(z, labels),
    lambda z, t, labels: sup_contrast.SupConLoss(t)(z[:, None].repeat(1, 2, 1), labels),
    lambda z, t, labels: sup_contrast.SupConLoss(t, "one")(z[:, None].repeat(1, 2, 1), labels),
    lambda z, t, labels: solo_learn.simclr_loss_func(z, labels, t),
]


@pytest.mark.parametrize(
    ("loss", "changed"),
    [(loss, "temperature") for loss in OF_TEMPERATURE + OF_LABELS] + [(loss, "labels") for loss in OF_LABELS],
)
def test_backward_raises_if_temperature_or_labels_changed_in_place(loss, changed):
    z, temperature, labels = torch.randn(6, 3, requires_grad=True), torch.tensor(0.5), torch.arange(6) // 2
    value = loss(z, temperature, labels)
    {"temperature": temperature, "labels": labels}[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
