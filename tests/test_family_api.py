"""The modules, conventions and errors of the family of losses."""

import copy
import inspect
import math
import pickle
import pydoc
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastntxent
from fastntxent import (
    clip,
    dcl,
    dclw,
    debiased,
    distill,
    guided_info_nce,
    hard_negative,
    info_nce,
    macl,
    multiview_nt_xent,
    nt_xent,
    rince,
    sup_con,
)
from tests.cases import BACKENDS, random_batch

Z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
W = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 0, 1, 2, 2])

# For each module: its options, the arguments of a call, and a function that takes the same arguments and options.
MODULES: dict[str, tuple[dict[str, Any], tuple[Any, ...], Any]] = {
    "NTXentLoss": ({"label_smoothing": 0.1}, (Z, W, LABELS), lambda *a, **o: nt_xent(*a[:2], ids=a[2], **o)),
    "MultiViewNTXentLoss": (
        {"label_smoothing": 0.1},
        ([Z, W, Z], LABELS),
        lambda v, i, **o: multiview_nt_xent(v, ids=i, **o),
    ),
    "DCLLoss": ({}, (Z, W), dcl),
    "DCLWLoss": ({"sigma": 0.3}, (Z, W), dclw),
    "DebiasedLoss": ({"tau_plus": 0.2}, (Z, W), debiased),
    "HardNegativeLoss": ({"tau_plus": 0.2, "beta": 0.5}, (Z, W), hard_negative),
    "RINCELoss": ({"q": 0.2, "lam": 0.3}, (Z, W), rince),
    "MACLLoss": ({"alpha": 0.3, "a_0": 0.1}, (Z, W), macl),
    "SupConLoss": ({"form": "pairs"}, (Z, LABELS), sup_con),
    "InfoNCELoss": (
        {"in_batch_negatives": True, "hardness_mode": "hard_negatives", "hardness_strength": 2.0},
        (Z, W, Z[:3], LABELS),
        lambda q, k, n, i, **o: info_nce(q, k, negatives=n, ids=i, **o),
    ),
    "DistillLoss": ({"teacher_temperature": 0.2}, (Z, W, Z[:, :3], W[:, 1:]), distill),
    "GuidedInfoNCELoss": (
        {"margin": 0.1, "margin_strategy": "relative", "contrast_anchors": False},
        (Z, W, Z[:, :3], W[:, 1:], Z[:2], W[:2, :3]),
        lambda q, k, g, h, n, m, **o: guided_info_nce(q, k, g, h, negatives=n, guide_negatives=m, **o),
    ),
    "CLIPLoss": ({"label_smoothing": 0.1}, (Z, W, LABELS), lambda *a, **o: clip(*a[:2], ids=a[2], **o)),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("learn", [True, False])
def test_module_equals_its_function(name, learn):
    options, args, function = MODULES[name]
    common = {"reduction": "none", "normalize": False, "backend": "blocked"}
    module = getattr(fastntxent, name)(0.3, learn_temperature=learn, **options, **common)

    def expected(temperature):
        # Use the module's temperature: exp(log(0.3)) is 0.3 up to the last bits, which depend on the processor.
        with torch.no_grad():
            own = float(module.temperature)
        assert own == pytest.approx(temperature)
        return function(*args, temperature=own, **options, **common)

    value = module(*args)
    torch.testing.assert_close(value.detach(), expected(0.3))
    assert len(list(module.parameters())) == learn
    for option, setting in {**options, **common}.items():
        assert f"{option}={setting!r}" in repr(module)
    if learn:
        (gradient,) = torch.autograd.grad(value.sum(), module.log_temperature)
        assert gradient != 0
        restored = getattr(fastntxent, name)(0.9, learn_temperature=True)
        restored.load_state_dict(module.state_dict())
        assert restored.temperature.item() == pytest.approx(0.3)
    module.temperature = 0.5
    torch.testing.assert_close(module(*args).detach(), expected(0.5))


@pytest.mark.parametrize("name", MODULES)
def test_module_has_the_defaults_of_its_function(name):
    module = inspect.signature(getattr(fastntxent, name)).parameters
    assert next(iter(module)) == "temperature"
    function = {
        "NTXentLoss": nt_xent,
        "MultiViewNTXentLoss": multiview_nt_xent,
        "DCLLoss": dcl,
        "DCLWLoss": dclw,
        "DebiasedLoss": debiased,
        "HardNegativeLoss": hard_negative,
        "RINCELoss": rince,
        "MACLLoss": macl,
        "SupConLoss": sup_con,
        "InfoNCELoss": info_nce,
        "DistillLoss": distill,
        "GuidedInfoNCELoss": guided_info_nce,
        "CLIPLoss": clip,
    }[name]
    for option, parameter in inspect.signature(function).parameters.items():
        if option in module and parameter.default is not inspect.Parameter.empty:
            # clip and distill default to None, to detect a temperature given together with a logit_scale.
            of_towers = name in ("CLIPLoss", "DistillLoss") and option == "temperature"
            default = 0.07 if of_towers else parameter.default
            assert module[option].default == default, option


def new_module(name, **options):
    return getattr(fastntxent, name)(*(8, 4) if name == "QueueInfoNCELoss" else (), **options)


@pytest.mark.parametrize("name", [*MODULES, "QueueInfoNCELoss"])
def test_module_signature_names_every_option(name):
    signature = inspect.signature(getattr(fastntxent, name))
    assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in signature.parameters.values())
    shared = {
        "reduction": "mean",
        "normalize": True,
        "backend": "auto",
        "group": None,
        "learn_temperature": name == "CLIPLoss",
    }
    last = [*signature.parameters.values()][-len(shared) :]
    assert {p.name: p.default for p in last if p.kind is p.KEYWORD_ONLY} == shared
    assert f"{name}{signature}" in pydoc.plain(pydoc.render_doc(getattr(fastntxent, name)))


@pytest.mark.parametrize("name", [*MODULES, "QueueInfoNCELoss"])
def test_unknown_option_of_a_module_raises_an_error_that_names_it(name):
    message = rf"^{name}\.__init__\(\) got an unexpected keyword argument 'normalise'$"
    with pytest.raises(TypeError, match=message):
        new_module(name, normalise=False)


@pytest.mark.parametrize("name", [*fastntxent.modules.__all__])
def test_module_rejects_a_string_for_each_bool_option(name):
    module = getattr(fastntxent, name)
    needed = {"size": 8, "dim": 4} if name in ("NegativeQueue", "QueueInfoNCELoss") else {}
    parameters = inspect.signature(module).parameters.items()
    flags = [option for option, p in parameters if p.annotation in ("bool", "bool | None")]
    assert "normalize" in flags
    for option in flags:
        with pytest.raises(TypeError, match=f"^{option} must be a bool, got 'no'$"):
            module(**needed, **{option: "no"})


def test_user_subclass_of_a_module_keeps_its_own_signature():
    class Mine(fastntxent.NTXentLoss):
        def __init__(self, steps, **options):
            super().__init__(**options)

    class Same(fastntxent.NTXentLoss):
        pass

    assert [*inspect.signature(Mine).parameters] == ["steps", "options"]
    assert inspect.signature(Same) == inspect.signature(fastntxent.NTXentLoss)
    assert Mine(3, label_smoothing=0.1, reduction="sum").label_smoothing == 0.1


@pytest.mark.parametrize("name", [*MODULES, "QueueInfoNCELoss"])
@pytest.mark.parametrize("learn", [True, False])
def test_module_copies_and_pickles(name, learn):
    module = new_module(name, reduction="none", learn_temperature=learn)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        assert repr(twin) == repr(module)
        assert torch.equal(torch.as_tensor(twin.temperature), torch.as_tensor(module.temperature))
        assert twin.state_dict().keys() == module.state_dict().keys()


def test_clip_has_the_default_temperature_of_its_module():
    torch.testing.assert_close(clip(Z, W), clip(Z, W, 0.07), rtol=0, atol=0)


def test_clip_logit_scale_is_the_inverse_temperature():
    scale = torch.tensor(5.0, requires_grad=True)
    value = clip(Z, W, logit_scale=scale)
    torch.testing.assert_close(value.detach(), clip(Z, W, 0.2))
    (gradient,) = torch.autograd.grad(value, scale)
    tau = torch.tensor(0.2, requires_grad=True)
    (of_tau,) = torch.autograd.grad(clip(Z, W, tau), tau)
    torch.testing.assert_close(gradient, -of_tau * 0.2**2)


def test_clip_logit_bias_cancels():
    bias = torch.tensor(-10.0, requires_grad=True)
    value = clip(Z, W, 0.2, logit_bias=bias)
    assert torch.equal(value.detach(), clip(Z, W, 0.2))
    assert torch.autograd.grad(value, bias)[0] == 0
    assert torch.equal(clip(Z, W, 0.2, logit_bias=3), clip(Z, W, 0.2))


def test_clip_module_clamps_its_scale_to_the_bound():
    module = fastntxent.CLIPLoss(0.001)
    torch.testing.assert_close(module(Z, W).detach(), clip(Z, W, 0.01))
    assert module.logit_scale == 100
    assert module.temperature < 0.01
    fixed = fastntxent.CLIPLoss(0.001, learn_temperature=False, max_logit_scale=None)
    torch.testing.assert_close(fixed(Z, W), clip(Z, W, 0.001))


def test_clip_module_under_vmap_equals_a_loop():
    module = fastntxent.CLIPLoss(0.001)
    images, texts = torch.stack((Z, W, -Z)), torch.stack((W, -Z, Z))
    each = torch.stack([module(*pair) for pair in zip(images, texts, strict=True)])
    torch.testing.assert_close(torch.vmap(module)(images, texts), each)


LEARNT = {
    "nt_xent": fastntxent.NTXentLoss,
    "multiview": fastntxent.MultiViewNTXentLoss,
    "dcl": fastntxent.DCLLoss,
    "dclw": fastntxent.DCLWLoss,
    "debiased": partial(fastntxent.DebiasedLoss, tau_plus=1e-9),
    "hard_negative": partial(fastntxent.HardNegativeLoss, tau_plus=1e-9),
    "rince": fastntxent.RINCELoss,
    "macl": fastntxent.MACLLoss,
    "sup_con": fastntxent.SupConLoss,
    "info_nce": fastntxent.InfoNCELoss,
    "clip": fastntxent.CLIPLoss,
    "guided": fastntxent.GuidedInfoNCELoss,
    "distill": partial(fastntxent.DistillLoss, teacher_temperature=0.2),
    "clip without bound": partial(fastntxent.CLIPLoss, max_logit_scale=None),
    "queue": partial(fastntxent.QueueInfoNCELoss, 8, 4),
}


@pytest.mark.parametrize("name", LEARNT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_extreme_learnt_temperature_gives_a_finite_loss_or_a_clear_error(name, dtype):
    rows = torch.float64 if dtype == torch.float64 else torch.float32

    def results(log_temperature: float, module_dtype: torch.dtype, rows_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        module = LEARNT[name](learn_temperature=True).to(module_dtype)
        with torch.no_grad():
            module.log_temperature.fill_(log_temperature)
        z, w = Z.to(rows_dtype), W.to(rows_dtype)
        arguments = {
            "sup_con": (z, LABELS),
            "multiview": ([z, w],),
            "distill": (z, w, w, z),
            "guided": (z, w, w, z),
        }.get(name, (z, w))
        value = module(*arguments)
        return value.detach(), *torch.autograd.grad(value, module.log_temperature)

    finite = 0
    for log_temperature in (-1000.0, -400.0, -100.0, -87.0, -60.0, -45.0, -20.0, -2.0, 20.0, 100.0, 1000.0):
        try:
            value, gradient = results(log_temperature, dtype, rows)
        except ValueError:
            with pytest.raises(ValueError, match=r"temperature must be|logit_scale .*must be|exp ends"):
                results(log_temperature, dtype, rows)
            continue
        finite += 1
        assert value.isfinite()
        assert not gradient.isnan()
        if -400 < log_temperature < 0:  # at 20 and above, a float32 loss does not resolve its temperature
            true_value, true_gradient = results(log_temperature, torch.float64, torch.float64)
            torch.testing.assert_close(value.double(), true_value, rtol=1e-4, atol=1e-30)
            largest = torch.finfo(dtype).max
            expected = true_gradient.to(dtype) if true_gradient.abs() < largest else gradient
            torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=1e-6)
    assert finite > 2


def test_mean_is_finite_even_if_the_sum_of_its_rows_overflows():
    z, w = Z.float().repeat(9, 1), W.float().repeat(9, 1)
    for loss in (dcl, macl, info_nce, clip):
        for backend in BACKENDS:
            value, rows = (loss(z, w, 1e-38, reduction=r, backend=backend) for r in ("mean", "none"))
            assert rows.sum().isinf()
            torch.testing.assert_close(value, rows.double().mean().float())  # summed in another order: ulps apart


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["nt_xent", "clip", "siglip", "info_nce", "dcl"])
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 3e19), (torch.float32, 1e38), (torch.bfloat16, 1e38), (torch.float64, 1e150)]
)
def test_rows_whose_squared_length_overflows_are_normalised(name, reduction, dtype, size, backend):
    rows = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).clamp(-3, 3).to(dtype)
    results = []
    for scale in (1.0, size):
        z = (rows[0] * scale).requires_grad_()  # the other view has rows of ordinary length
        losses = getattr(fastntxent, name)(z, rows[1], 0.5, reduction=reduction, backend=backend)
        losses.mean().backward()
        results.append((losses.detach().double(), z.grad.double() * scale))
    # Rounding to bfloat16 changes the row, and gradients of 1e-38 are subnormal.
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    for value, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


def test_sup_con_without_any_positive_is_zero():
    for form in ("out", "in", "pairs"):
        z = Z.clone().requires_grad_()
        loss = sup_con(z, torch.arange(6), 0.1, form=form)
        assert loss == 0
        assert torch.equal(torch.autograd.grad(loss, z)[0], torch.zeros_like(z))
        assert sup_con(Z[:1], LABELS[:1], 0.1, form=form) == 0


def test_sup_con_keeps_weights_far_smaller_than_a_rows_weight_with_itself():
    # Each of the two rows has one positive and no negatives, so its loss and gradient are 0.
    z = Z[:2].clone().requires_grad_()
    weights = torch.tensor([[100.0, 1e-3], [2e-3, 100.0]])
    labels = torch.zeros(2, 8192, dtype=torch.int64)
    labels[0] = labels[1, 0] = 1  # the first row has every label, and the second row has one of them
    for loss in (sup_con(z, torch.tensor([0, 1]), 1.0, pair_weights=weights), sup_con(z, labels, 1.0)):
        assert abs(loss) < 1e-6
        assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_sup_con_near_the_smallest_temperature_is_finite_and_positive(backend):
    labels = torch.arange(37) % 3
    losses = sup_con(torch.randn(37, 3), labels, 1e-38, reduction="none", backend=backend)
    assert losses.isfinite().all()
    assert (losses > 0).all()


def test_sup_con_identity_pair_weights_change_nothing():
    labels = LABELS % 3
    for reduction in ("mean", "sum", "none"):
        value = sup_con(Z, labels, 0.2, pair_weights=7 * torch.eye(5), reduction=reduction)
        torch.testing.assert_close(value, sup_con(Z, labels, 0.2, reduction=reduction))


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e30, 3e38])
def test_sup_con_depends_only_on_the_ratios_of_pair_weights(size):
    weights, labels = torch.rand(3, 3) + 0.01, LABELS % 3
    value = sup_con(Z, labels, 0.2, pair_weights=size * weights.double())
    torch.testing.assert_close(value, sup_con(Z, labels, 0.2, pair_weights=weights), rtol=1e-5, atol=1e-5)


def test_sup_con_rows_whose_pair_weights_are_all_zero_have_no_loss():
    z = Z.clone().requires_grad_()
    loss = sup_con(z, LABELS % 3, 0.1, pair_weights=torch.zeros(3, 3))
    assert loss == 0
    assert not torch.autograd.grad(loss, z)[0].any()
    # Of the pairs of different rows, only one has a weight.
    alone = torch.eye(6) + torch.eye(6).roll(1, 0) * torch.tensor([1.0, 0, 0, 0, 0, 0])
    rows = sup_con(Z, torch.arange(6), 0.1, pair_weights=alone, reduction="none")
    assert rows.ne(0).sum() == 1
    torch.testing.assert_close(sup_con(Z, torch.arange(6), 0.1, pair_weights=alone), rows.sum())


def test_sup_con_module_holds_its_weights_as_a_buffer():
    weights = torch.rand(3, 3)
    module = fastntxent.SupConLoss(0.2, pair_weights=weights)
    assert torch.equal(module(Z, LABELS % 3), sup_con(Z, LABELS % 3, 0.2, pair_weights=weights))
    assert list(module.state_dict()) == ["pair_weights"]
    assert not fastntxent.SupConLoss().state_dict()


def test_backward_raises_if_sup_con_weights_were_changed_in_place():
    weights = torch.rand(3, 3)
    loss = sup_con(Z.clone().requires_grad_(), LABELS % 3, pair_weights=weights)
    weights += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_sup_con_of_two_views_equals_nt_xent_in_every_form():
    z_i, z_j, *_ = random_batch(9, 5, 0.2, dtype=torch.float64)
    labels = torch.arange(9).repeat(2)
    expected = nt_xent(z_i, z_j, 0.2, reduction="none")
    for form in ("out", "in", "pairs"):
        value = sup_con(torch.cat((z_i, z_j)), labels, 0.2, form=form, reduction="none")
        torch.testing.assert_close(value, expected)
    one_hot = torch.nn.functional.one_hot(labels)
    torch.testing.assert_close(sup_con(torch.cat((z_i, z_j)), one_hot, 0.2, reduction="none"), expected)


@pytest.mark.parametrize("labels_dtype", [torch.uint8, torch.int16, torch.int64])
def test_sup_con_takes_labels_of_any_integer_dtype(labels_dtype):
    for form in ("out", "in", "pairs"):
        value = sup_con(Z, LABELS.to(labels_dtype), 0.2, form=form)
        torch.testing.assert_close(value, sup_con(Z, LABELS * 10**12 - 1, 0.2, form=form))


def test_losses_without_negatives_are_zero_and_macl_is_one():
    z = Z[:1].clone().requires_grad_()
    w = W[:1]
    values = [
        dcl(z, w),
        dclw(z, w),
        debiased(z, w, tau_plus=0.1),
        hard_negative(z, w, tau_plus=0.1, beta=1),
        macl(z, w) - 1,
        info_nce(z, w),
        clip(z, w),
        multiview_nt_xent([z, w, z]),
        nt_xent(z, w, ids=torch.tensor([3])),
        nt_xent(z, w, label_smoothing=0.5),
        nt_xent(Z, W, ids=torch.ones(6, dtype=torch.long)) + 0 * z.sum(),
    ]
    for value in values:
        assert value == 0
        gradient = torch.autograd.grad(value, z)[0]
        assert torch.equal(gradient, torch.zeros_like(z))


def test_dcl_of_equal_embeddings_has_the_published_value():
    # If all embeddings are equal, the loss is log(2N - 2) at any temperature.
    z = torch.ones(256, 8)
    assert float(dcl(z, z, 0.1)) == pytest.approx(math.log(510), rel=1e-6)


def test_rince_small_q_tends_to_info_nce():
    z_i, z_j, *_ = random_batch(8, 6, 0.5)
    value = rince(z_i, z_j, 0.5, q=1e-6, lam=0.1, reduction="none")
    torch.testing.assert_close(value, nt_xent(z_i, z_j, 0.5, reduction="none") + math.log(0.1), rtol=1e-4, atol=1e-4)


def test_equal_temperatures_per_row_give_the_loss_of_one_temperature():
    z_i, z_j, *_ = random_batch(8, 6, 0.5, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        value = nt_xent(z_i, z_j, torch.full((16,), 0.25, dtype=dtype), reduction="none")
        torch.testing.assert_close(value, nt_xent(z_i, z_j, 0.25, reduction="none"))


def test_negatives_that_require_a_gradient_get_one():
    negatives = torch.randn(5, 4, requires_grad=True)
    info_nce(Z, W, negatives=negatives).backward()
    assert negatives.grad.abs().min() > 0


@pytest.mark.parametrize("name", MODULES)
def test_module_compiles_without_graph_breaks(name):
    options, args, _ = MODULES[name]
    module = getattr(fastntxent, name)(0.3, learn_temperature=True, **options)
    eager = module(*args)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)(*args)
    torch.testing.assert_close(compiled, eager)
    (a,), (b,) = (torch.autograd.grad(x, module.log_temperature) for x in (compiled, eager))
    torch.testing.assert_close(a, b)


# --- errors: one case each -------------------------------------------------------------------------------------------

INTS = torch.arange(6)
BAD_CALLS = {
    "nt_xent ids": (lambda: nt_xent(Z, W, ids=INTS[:3]), ValueError, r"ids must have shape \(6,\)"),
    "nt_xent ids dtype": (lambda: nt_xent(Z, W, ids=INTS.float()), TypeError, "ids must have an integer dtype"),
    "nt_xent smoothing": (
        lambda: nt_xent(Z, W, label_smoothing=1.0),
        ValueError,
        r"label_smoothing must be in \[0, 1\)",
    ),
    "nt_xent smoothing type": (
        lambda: nt_xent(Z, W, label_smoothing="a"),
        TypeError,
        "label_smoothing must be a number",
    ),
    "nt_xent temperatures": (
        lambda: nt_xent(Z, W, torch.ones(6)),
        ValueError,
        r"have shape \(12,\), one per row, or be",
    ),
    "nt_xent a temperature 0": (lambda: nt_xent(Z, W, torch.arange(12.0)), ValueError, "temperature must be positive"),
    "nt_xent a temperature list": (lambda: nt_xent(Z, W, [0.1]), TypeError, "one temperature per row, got list"),
    "sup_con least temperature": (lambda: sup_con(Z, LABELS, 2.9e-39), ValueError, "at least 2.939e-39, got 2.9e-39"),
    "views rank": (lambda: multiview_nt_xent(Z), ValueError, r"views must have shape \(V, N, D\), got \(6, 4\)"),
    "views only one": (lambda: multiview_nt_xent([Z]), ValueError, "at least two views, got 1"),
    "views shapes": (lambda: multiview_nt_xent([Z, W[:2]]), ValueError, r"views\[0\] and views\[1\].*same shape"),
    "views type": (lambda: multiview_nt_xent(3), TypeError, "views must be .* or a list or tuple of tensors, got int"),
    "views member": (
        lambda: multiview_nt_xent([Z, None]),  # type: ignore[list-item]
        TypeError,
        r"views\[1\] must be a torch.Tensor",
    ),
    "dcl shapes": (lambda: dcl(Z, W[:2]), ValueError, "same shape"),
    "dcl reduction": (lambda: dcl(Z, W, reduction="avg"), ValueError, "reduction must be one of"),
    "dcl temperatures": (lambda: dcl(Z, W, torch.ones(12)), ValueError, r"must be a 0-d tensor, got shape \(12,\)"),
    "dclw sigma": (lambda: dclw(Z, W, sigma=0), ValueError, "sigma must be positive and finite, got 0"),
    "dclw sigma type": (lambda: dclw(Z, W, sigma=None), TypeError, "sigma must be a number, got NoneType"),
    "debiased prior": (lambda: debiased(Z, W, tau_plus=1), ValueError, r"tau_plus must be in \[0, 1\), got 1"),
    "debiased nan": (lambda: debiased(Z, W, tau_plus=math.nan), ValueError, "tau_plus must be in.*got nan"),
    "hcl beta": (lambda: hard_negative(Z, W, tau_plus=0.1, beta=-1), ValueError, r"beta must be in \[0, inf\), got -1"),
    "rince q": (lambda: rince(Z, W, q=0), ValueError, r"q must be in \(0, 1\], got 0"),
    "rince lam": (lambda: rince(Z, W, lam=1), ValueError, r"lam must be in \(0, 1\), got 1"),
    "macl alpha": (lambda: macl(Z, W, alpha=2), ValueError, r"alpha must be in \[0, 1\], got 2"),
    "macl a_0": (lambda: macl(Z, W, a_0=-1), ValueError, r"a_0 must be in \[0, 1\], got -1"),
    "sup_con rank": (lambda: sup_con(Z[None], LABELS), ValueError, "z must have 2 dimensions"),
    "sup_con labels": (lambda: sup_con(Z, LABELS[:2]), ValueError, r"labels must have shape \(6,\)"),
    "sup_con labels type": (lambda: sup_con(Z, [0] * 6), TypeError, "labels must be a torch.Tensor, got list"),
    "sup_con labels dtype": (lambda: sup_con(Z, LABELS.float()), TypeError, "labels must have an integer dtype"),
    "sup_con form": (lambda: sup_con(Z, LABELS, form="mean"), ValueError, "form must be one of 'out', 'in', 'pairs'"),
    "sup_con multi form": (
        lambda: sup_con(Z, LABELS[:, None].bool(), form="in"),
        ValueError,
        "form must be 'out' with several labels per row, got 'in'",
    ),
    "sup_con weights type": (
        lambda: sup_con(Z, LABELS % 2, pair_weights=[[1.0]]),
        TypeError,
        "pair_weights must be a torch.Tensor, got list",
    ),
    "sup_con weights dtype": (
        lambda: sup_con(Z, LABELS % 2, pair_weights=torch.eye(2, dtype=torch.int64)),
        TypeError,
        "pair_weights must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "sup_con weights shape": (
        lambda: sup_con(Z, LABELS % 2, pair_weights=torch.ones(2, 3)),
        ValueError,
        r"pair_weights must have shape \(C, C\), a row and a column for each class, got shape \(2, 3\)",
    ),
    "sup_con weights negative": (
        lambda: sup_con(Z, LABELS % 2, pair_weights=-torch.ones(2, 2)),
        ValueError,
        r"pair_weights must be finite and at least 0, got -1\.0",
    ),
    "sup_con weights nan": (
        lambda: sup_con(Z, LABELS % 2, pair_weights=torch.full((2, 2), torch.nan)),
        ValueError,
        "pair_weights must be finite and at least 0, got nan",
    ),
    "sup_con weights form": (
        lambda: sup_con(Z, LABELS % 2, form="in", pair_weights=torch.eye(2)),
        ValueError,
        "form must be 'out' with pair_weights, got 'in'",
    ),
    "sup_con weights ceiling": (
        lambda: sup_con(Z, LABELS % 2, ceiling=0.5, pair_weights=torch.eye(2)),
        ValueError,
        r"ceiling must be None with pair_weights, got 0\.5",
    ),
    "sup_con weights classes": (
        lambda: sup_con(Z, LABELS % 2 + 1, pair_weights=torch.eye(2)),
        ValueError,
        r"labels must be in \[0, 2\), the classes of pair_weights, got 2",
    ),
    "sup_con weights negative class": (
        lambda: sup_con(Z, -(LABELS % 2), pair_weights=torch.eye(2)),
        ValueError,
        r"labels must be in \[0, 2\), the classes of pair_weights, got -1",
    ),
    "sup_con weights several": (
        lambda: sup_con(Z, LABELS[:, None].bool(), pair_weights=torch.eye(2)),
        ValueError,
        r"labels must have shape \(6,\) with pair_weights, got \(6, 1\)",
    ),
    "sup_con multi shape": (lambda: sup_con(Z, LABELS[:3, None]), ValueError, r"\(6, C\).*got \(3, 1\)"),
    "sup_con multi dtype": (lambda: sup_con(Z, LABELS[:, None].float()), TypeError, "labels must be bool or"),
    "info_nce shapes": (lambda: info_nce(Z, W[:3]), ValueError, "query and key must have the same shape"),
    "info_nce negatives": (lambda: info_nce(Z, W, negatives=Z[:, :2]), ValueError, "query and negatives.*features"),
    "info_nce negatives rank": (lambda: info_nce(Z, W, negatives=Z[0]), ValueError, "negatives must have 2 dimensions"),
    "info_nce negatives dtype": (lambda: info_nce(Z, W, negatives=Z.double()), ValueError, "same dtype"),
    "info_nce paired": (lambda: info_nce(Z, W, negatives=torch.ones(3, 2, 4)), ValueError, r"\(6, K, D\).*\(3, 2, 4\)"),
    "info_nce paired dtype": (
        lambda: info_nce(Z, W, negatives=torch.ones(6, 2, 4).int()),
        TypeError,
        "negatives must be",
    ),
    "info_nce hardness": (
        lambda: info_nce(Z, W, hardness_strength=-1),
        ValueError,
        r"hardness_strength must be in \[0",
    ),
    "info_nce hardness mode": (lambda: info_nce(Z, W, hardness_mode="all"), ValueError, "hardness_mode must be one of"),
    "info_nce both": (
        lambda: info_nce(Z, W, hardness_strength=1, label_smoothing=0.1),
        ValueError,
        "label_smoothing and hardness_strength cannot both",
    ),
    "clip shapes": (lambda: clip(Z, W[:3]), ValueError, "image_features and text_features must have the same shape"),
    "clip both scales": (lambda: clip(Z, W, 0.5, logit_scale=10.0), ValueError, "temperature and logit_scale must not"),
    "clip scale 1e-39": (
        lambda: clip(Z, W, logit_scale=1e-39),
        ValueError,
        r"logit_scale in torch.float32 must be from 2.939e-39 to 3.403e\+38, got 1e-39",
    ),
    "clip scale": (lambda: clip(Z, W, logit_scale=-1.0), ValueError, "logit_scale must be positive"),
    "clip bias": (lambda: clip(Z, W, logit_bias="0"), TypeError, "logit_bias must be a float or .*, got str"),
    "clip bias nan": (lambda: clip(Z, W, logit_bias=math.nan), ValueError, "logit_bias must be finite, got nan"),
    "clip bias inf": (lambda: clip(Z, W, logit_bias=torch.tensor([math.inf])), ValueError, "logit_bias must be finite"),
    "clip bias range": (
        lambda: clip(Z, W, logit_bias=torch.tensor(1e300, dtype=torch.float64)),
        ValueError,
        r"logit_bias in torch.float32 must be from -3.4e\+38 to 3.4e\+38, got 1e\+300",
    ),
    "clip bias shape": (
        lambda: clip(Z, W, logit_bias=torch.zeros(2)),
        ValueError,
        r"logit_bias must be a float or have one element, got shape \(2,\)",
    ),
    "clip bias sparse": (
        lambda: clip(Z, W, logit_bias=torch.zeros(1).to_sparse()),
        TypeError,
        "logit_bias must be a d",
    ),
    "module bias": (
        lambda: fastntxent.SigLIPLoss(bias=1e300),
        ValueError,
        r"bias in torch.float32 must be from -3.4e\+38 to 3.4e\+38, got 1e\+300",
    ),
    "module bias set": (
        lambda: setattr(fastntxent.SigLIPLoss(), "bias", -1e300),
        ValueError,
        "bias in torch.float32 must be from",
    ),
    "module hardness smoothing": (
        lambda: fastntxent.InfoNCELoss(hardness_strength=1, label_smoothing=0.1),
        ValueError,
        "label_smoothing and hardness_strength cannot both",
    ),
    "distill shapes": (
        lambda: distill(Z, W[:3], Z, W),
        ValueError,
        "image_features and text_features must have the same shape",
    ),
    "distill teacher": (
        lambda: distill(Z, W, Z[:3], W[:3]),
        ValueError,
        "teacher_image_features must have 6 rows, one for each row of image_features, got 3",
    ),
    "distill teacher's width": (
        lambda: distill(Z, W, Z, W[:, :2]),
        ValueError,
        "teacher_image_features and teacher_text_features must have the same shape",
    ),
    "distill teacher type": (
        lambda: distill(Z, W, None, W),
        TypeError,
        "teacher_image_features must be a torch.Tensor",
    ),
    "distill teacher dtype": (lambda: distill(Z, W, Z, W.long()), TypeError, "teacher_text_features must be float16"),
    "distill no teacher": (
        lambda: distill(Z, W),
        TypeError,
        "either teacher_image_features and teacher_text_features, or teacher, must be given",
    ),
    "distill two teachers": (
        lambda: distill(Z, W, Z, W, teacher=lambda rows, cols: rows[:, None] + 0.5 * cols),
        ValueError,
        "teacher must not be given with teacher_image_features and teacher_text_features: it replaces them",
    ),
    "distill teacher and text features": (
        lambda: distill(Z, W, teacher_text_features=W, teacher=lambda rows, cols: Z @ W.T),
        ValueError,
        "teacher must not be given with teacher_text_features",
    ),
    "distill teacher is a matrix": (
        lambda: distill(Z, W, teacher=Z @ W.T),
        TypeError,
        "teacher must be a function of image and text indices, got Tensor",
    ),
    "distill teacher returns a list": (
        lambda: distill(Z, W, teacher=lambda rows, cols: (Z @ W.T).tolist()),  # type: ignore[return-value]
        TypeError,
        r"teacher\(rows, cols\) must be a torch.Tensor, got list",
    ),
    "distill teacher returns integers": (
        lambda: distill(Z, W, teacher=lambda rows, cols: rows[:, None] + cols),
        TypeError,
        r"teacher\(rows, cols\) must be float16, bfloat16, float32 or float64, got torch.int64",
    ),
    "distill teacher returns a row": (
        lambda: distill(Z, W, teacher=lambda rows, cols: Z[rows, 0]),
        ValueError,
        r"teacher\(rows, cols\) must have shape \(6, 6\), the lengths of rows and cols, got \(6,\)",
    ),
    "distill teacher returns a sparse tensor": (
        lambda: distill(Z, W, teacher=lambda rows, cols: (Z @ W.T).to_sparse()),
        TypeError,
        r"teacher\(rows, cols\) must be a dense \(strided\) tensor",
    ),
    "distill teacher on meta": (
        lambda: distill(Z, W, teacher=lambda rows, cols: (Z @ W.T).to("meta")),
        ValueError,
        r"teacher\(rows, cols\) must be on the device of its arguments \(cpu\), got meta",
    ),
    "normalize type": (lambda: nt_xent(Z, W, 0.1, normalize="no"), TypeError, "normalize must be a bool, got 'no'"),
    "normalize None": (lambda: fastntxent.clip(Z, W, normalize=None), TypeError, "normalize must be a bool, got None"),
    "module learn_temperature type": (
        lambda: fastntxent.NTXentLoss(learn_temperature="no"),
        TypeError,
        "learn_temperature must be a bool, got 'no'",
    ),
    "in_batch_negatives type": (
        lambda: fastntxent.info_nce(Z, W, negatives=W, in_batch_negatives="no"),
        TypeError,
        "in_batch_negatives must be a bool, got 'no'",
    ),
    "contrast_anchors type": (
        lambda: fastntxent.guided_info_nce(Z, W, Z, W, contrast_anchors="no"),
        TypeError,
        "contrast_anchors must be a bool, got 'no'",
    ),
    "module no teacher": (lambda: fastntxent.DistillLoss()(Z, W), TypeError, "or teacher, must be given"),
    "distill both scales": (
        lambda: distill(Z, W, Z, W, 0.5, logit_scale=10.0),
        ValueError,
        "temperature and logit_scale must not",
    ),
    "distill both teacher's scales": (
        lambda: distill(Z, W, Z, W, teacher_temperature=0.5, teacher_logit_scale=10.0),
        ValueError,
        "teacher_temperature and teacher_logit_scale must not",
    ),
    "distill teacher's temperature": (
        lambda: distill(Z, W, Z, W, teacher_temperature=0.0),
        ValueError,
        "teacher_temperature must be positive",
    ),
    "distill teacher's scale": (
        lambda: distill(Z, W, Z, W, teacher_logit_scale=-1.0),
        ValueError,
        "teacher_logit_scale must be positive",
    ),
    "module teacher's temperature": (
        lambda: fastntxent.DistillLoss(teacher_temperature=-1),
        ValueError,
        "teacher_temperature must be positive",
    ),
    "guided shapes": (lambda: guided_info_nce(Z, W[:3], Z, W), ValueError, "query and key must have the same shape"),
    "guided guide": (
        lambda: guided_info_nce(Z, W, Z, W[:3]),
        ValueError,
        "guide_key must have 6 rows, one for each row of key, got 3",
    ),
    "guided guide's width": (
        lambda: guided_info_nce(Z, W, Z, W[:, :2]),
        ValueError,
        "guide_query and guide_key must have the same number of features, got 4 and 2",
    ),
    "guided guide type": (lambda: guided_info_nce(Z, W, None, W), TypeError, "guide_query must be a torch.Tensor"),
    "guided margin": (lambda: guided_info_nce(Z, W, Z, W, margin=math.nan), ValueError, "margin must be in.*got nan"),
    "guided margin type": (lambda: guided_info_nce(Z, W, Z, W, margin="0"), TypeError, "margin must be a number"),
    "guided strategy": (
        lambda: guided_info_nce(Z, W, Z, W, margin_strategy="none"),
        ValueError,
        "margin_strategy must be one of 'absolute', 'relative', got 'none'",
    ),
    "guided negatives": (
        lambda: guided_info_nce(Z, W, Z, W, negatives=Z),
        TypeError,
        "guide_negatives must be a torch.Tensor, got NoneType",
    ),
    "guided negatives' guide": (
        lambda: guided_info_nce(Z, W, Z, W, negatives=Z[:2], guide_negatives=Z),
        ValueError,
        "guide_negatives must have 2 rows, one for each row of negatives, got 6",
    ),
    "guided guide alone": (
        lambda: guided_info_nce(Z, W, Z, W, guide_negatives=Z),
        ValueError,
        "guide_negatives must be given with negatives",
    ),
    "guided negatives rank": (
        lambda: guided_info_nce(Z, W, Z, W, negatives=Z[None], guide_negatives=Z),
        ValueError,
        "negatives must have 2 dimensions",
    ),
    "guided temperatures": (lambda: guided_info_nce(Z, W, Z, W, torch.ones(6)), ValueError, "must be a 0-d tensor"),
    "module margin": (lambda: fastntxent.GuidedInfoNCELoss(margin=math.inf), ValueError, "margin must be in"),
    "module strategy": (
        lambda: fastntxent.GuidedInfoNCELoss(margin_strategy="x"),
        ValueError,
        "margin_strategy must be one of",
    ),
    "clip backend": (lambda: clip(Z, W, backend="tpu"), ValueError, "backend must be"),
    "module sigma": (lambda: fastntxent.DCLWLoss(sigma=-1), ValueError, "sigma must be positive"),
    "module tau_plus": (lambda: fastntxent.DebiasedLoss(tau_plus=2), ValueError, "tau_plus must be in"),
    "module beta": (lambda: fastntxent.HardNegativeLoss(beta=-2), ValueError, "beta must be in"),
    "module q": (lambda: fastntxent.RINCELoss(q=2), ValueError, "q must be in"),
    "module alpha": (lambda: fastntxent.MACLLoss(alpha=2), ValueError, "alpha must be in"),
    "module form": (lambda: fastntxent.SupConLoss(form="x"), ValueError, "form must be one of"),
    "module smoothing": (lambda: fastntxent.NTXentLoss(label_smoothing=2), ValueError, "label_smoothing must be in"),
    "module hardness": (lambda: fastntxent.InfoNCELoss(hardness_mode="x"), ValueError, "hardness_mode must be one of"),
    "module bound": (lambda: fastntxent.CLIPLoss(max_logit_scale=0), ValueError, "max_logit_scale must be in"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_raises_an_error_that_describes_it(case):
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()


def test_positive_ranks_of_nan_rows_are_the_worst():
    z = torch.randn(8, 4)
    assert fastntxent.positive_ranks(z * torch.nan, z).eq(15).all()
    one = z.clone()
    one[3] = torch.nan
    ranks = fastntxent.positive_ranks(one, z)
    assert ranks.min() >= 1
    assert ranks[3] == ranks[11] == 15


def test_sup_con_rejects_integer_labels_in_a_column():
    z = torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"labels must have shape \(6,\) .* labels.squeeze\(1\)"):
        fastntxent.sup_con(z, torch.arange(6)[:, None])
    assert fastntxent.sup_con(z, torch.ones(6, 1, dtype=torch.bool)).isfinite()


def guided_keys(z: Tensor, w: Tensor, guide: Tensor, **options: float) -> Tensor:
    return guided_info_nce(
        z, w, guide, guide, 0.2, contrast_anchors=False, contrast_positives=False, reduction="none", **options
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [3, 384])
def test_guide_keeps_ties_whichever_tile_computes_them(backend, width):
    # Every row of the guide occurs four times and is as similar to its copies as to itself. The copies of a row lie in
    # several tiles.
    generator = torch.Generator().manual_seed(0)
    z, w = torch.randn(2, 1200, 8, generator=generator)
    guide = torch.randn(300, width, generator=generator).repeat(4, 1)
    kept = guided_keys(z, w, guide, backend=backend)
    torch.testing.assert_close(kept, info_nce(z, w, 0.2, reduction="none"))
    left_out = guided_keys(z, w, guide, margin=1e-5, backend=backend)
    torch.testing.assert_close(left_out, info_nce(z, w, 0.2, ids=torch.arange(300).repeat(4), reduction="none"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_guide_never_leaves_out_negatives_because_of_nan(backend):
    guide = Z.clone()
    guide[2] = torch.nan
    losses, without = guided_keys(Z, W, guide, margin=3.0, backend=backend), info_nce(Z, W, 0.2, reduction="none")
    torch.testing.assert_close(losses[2], without[2])  # row 2's limit is NaN, so it keeps all negatives
    pairs = torch.stack((W[0], W[2])), torch.tensor([0, 1])
    only = info_nce(Z[:1], W[:1], 0.2, negatives=pairs[0][1:])
    torch.testing.assert_close(losses[0], only)  # row 0 keeps one negative: key 2, whose guide similarity is NaN


@pytest.mark.parametrize("backend", BACKENDS)
def test_guide_that_leaves_out_all_negatives_gives_a_loss_of_zero(backend):
    z, w, tau = Z.clone().requires_grad_(), W.clone().requires_grad_(), torch.tensor(0.1, requires_grad=True)
    loss = guided_info_nce(z, w, Z, W, tau, margin=5.0, backend=backend)
    assert loss == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, (z, w, tau)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_guide_that_leaves_out_nothing_gives_the_unguided_loss(backend):
    from fastntxent.compat.sentence_transformers import MultipleNegativesRankingLoss

    directions = ("query_to_doc", "query_to_query", "doc_to_doc")
    expected = MultipleNegativesRankingLoss(None, 5.0, directions=directions)([Z, W])
    torch.testing.assert_close(guided_info_nce(Z, W, Z, W, 0.2, margin=-5.0, backend=backend), expected)


def test_arguments_that_cannot_work_raise_an_error_that_says_why():
    z_i, z_j = torch.randn(2, 6, 4)
    with pytest.raises(ValueError, match=r"logit_bias must be a float or have one element, got shape \(6,\)"):
        fastntxent.clip(z_i, z_j, logit_bias=torch.zeros(6))
    with pytest.raises(ValueError, match=r"q / temperature must be below 88\.7"):
        fastntxent.rince(z_i, z_j, 0.005)
    assert fastntxent.rince(z_i.double(), z_j.double(), 0.005).isfinite()
    with pytest.raises(ValueError, match="negatives must be given when in_batch_negatives is False"):
        fastntxent.info_nce(z_i, z_j, in_batch_negatives=False)
    assert fastntxent.macl(z_i * torch.nan, z_j).isnan()
    with pytest.raises(TypeError, match="init_process_group"):
        fastntxent.Sharding(None)


def test_clip_scale_beyond_its_bound_can_only_be_trained_back():
    z = torch.nn.functional.normalize(torch.randn(16, 8), dim=1)
    for other, moves in ((torch.nn.functional.normalize(torch.randn(16, 8), dim=1), True), (z, False)):
        loss = fastntxent.CLIPLoss(temperature=1e-3)
        loss(z, other).backward()
        # A negative gradient makes a descent step lower the scale. A gradient of 0 leaves the scale unchanged.
        assert (loss.log_temperature.grad < 0) == moves
        assert moves or loss.log_temperature.grad == 0
