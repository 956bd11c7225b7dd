"""The family's modules, conventions and errors."""

import inspect
import math
from functools import partial

import pytest
import torch
from torch import Tensor

import fastntxent
from fastntxent import (
    clip,
    dcl,
    dclw,
    debiased,
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

# Module, its options, the arguments of a call, the function with the same options.
MODULES = {
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
    "CLIPLoss": ({"label_smoothing": 0.1}, (Z, W, LABELS), lambda *a, **o: clip(*a[:2], ids=a[2], **o)),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("learn", [True, False])
def test_module_equals_its_function(name, learn):
    options, args, function = MODULES[name]
    common = {"reduction": "none", "normalize": False, "backend": "blocked"}
    module = getattr(fastntxent, name)(0.3, learn_temperature=learn, **options, **common)

    def expected(temperature):
        # At the module's own: exp(log(0.3)) is 0.3 but for the last bits, which are a processor's.
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
def test_module_defaults_are_its_functions(name):
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
        "CLIPLoss": clip,
    }[name]
    for option, parameter in inspect.signature(function).parameters.items():
        if option in module and parameter.default is not inspect.Parameter.empty:
            # clip's temperature is None to tell it from one that is given beside a logit_scale.
            default = 0.07 if (name, option) == ("CLIPLoss", "temperature") else parameter.default
            assert module[option].default == default, option


def test_clip_default_temperature_is_its_modules():
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


def test_clip_module_keeps_its_scale_below_the_bound():
    module = fastntxent.CLIPLoss(0.001)
    torch.testing.assert_close(module(Z, W).detach(), clip(Z, W, 0.01))
    assert module.logit_scale == 100
    assert module.temperature < 0.01
    fixed = fastntxent.CLIPLoss(0.001, learn_temperature=False, max_logit_scale=None)
    torch.testing.assert_close(fixed(Z, W), clip(Z, W, 0.001))


def test_clip_module_over_a_batch_of_features_under_vmap():
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
    "clip without bound": partial(fastntxent.CLIPLoss, max_logit_scale=None),
    "queue": partial(fastntxent.QueueInfoNCELoss, 8, 4),
}


@pytest.mark.parametrize("name", LEARNT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_learnt_temperature_far_away_gives_numbers_or_an_error_in_words(name, dtype):
    rows = torch.float64 if dtype == torch.float64 else torch.float32

    def results(log_temperature: float, module_dtype: torch.dtype, rows_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        module = LEARNT[name](learn_temperature=True).to(module_dtype)
        with torch.no_grad():
            module.log_temperature.fill_(log_temperature)
        z, w = Z.to(rows_dtype), W.to(rows_dtype)
        arguments = {"sup_con": (z, LABELS), "multiview": ([z, w],)}.get(name, (z, w))
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
        if -400 < log_temperature < 0:  # at 0 a loss in float32 no longer knows its temperature
            true_value, true_gradient = results(log_temperature, torch.float64, torch.float64)
            torch.testing.assert_close(value.double(), true_value, rtol=1e-4, atol=1e-30)
            largest = torch.finfo(dtype).max
            expected = true_gradient.to(dtype) if true_gradient.abs() < largest else gradient
            torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=1e-6)
    assert finite > 2


def test_mean_is_finite_where_the_sum_of_its_rows_is_not():
    z, w = Z.float().repeat(9, 1), W.float().repeat(9, 1)
    for loss in (dcl, macl, info_nce, clip):
        for backend in BACKENDS:
            value, rows = (loss(z, w, 1e-38, reduction=r, backend=backend) for r in ("mean", "none"))
            assert rows.sum().isinf()
            torch.testing.assert_close(value.double(), rows.double().mean())


def test_sup_con_without_any_positive_is_zero():
    for form in ("out", "in", "pairs"):
        z = Z.clone().requires_grad_()
        loss = sup_con(z, torch.arange(6), 0.1, form=form)
        assert loss == 0
        assert torch.equal(torch.autograd.grad(loss, z)[0], torch.zeros_like(z))
        assert sup_con(Z[:1], LABELS[:1], 0.1, form=form) == 0


def test_sup_con_of_two_views_is_nt_xent_in_every_form():
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


def test_dcl_published_value():
    # All embeddings equal: log(2N - 2), whatever the temperature.
    z = torch.ones(256, 8)
    assert float(dcl(z, z, 0.1)) == pytest.approx(math.log(510), rel=1e-6)


def test_rince_small_q_tends_to_info_nce():
    z_i, z_j, *_ = random_batch(8, 6, 0.5)
    value = rince(z_i, z_j, 0.5, q=1e-6, lam=0.1, reduction="none")
    torch.testing.assert_close(value, nt_xent(z_i, z_j, 0.5, reduction="none") + math.log(0.1), rtol=1e-4, atol=1e-4)


def test_temperatures_per_row_that_are_equal_are_one_temperature():
    z_i, z_j, *_ = random_batch(8, 6, 0.5, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        value = nt_xent(z_i, z_j, torch.full((16,), 0.25, dtype=dtype), reduction="none")
        torch.testing.assert_close(value, nt_xent(z_i, z_j, 0.25, reduction="none"))


def test_negatives_that_require_a_gradient_get_one():
    negatives = torch.randn(5, 4, requires_grad=True)
    info_nce(Z, W, negatives=negatives).backward()
    assert negatives.grad.abs().min() > 0


@pytest.mark.parametrize("name", MODULES)
def test_module_compiles_whole(name):
    options, args, _ = MODULES[name]
    module = getattr(fastntxent, name)(0.3, learn_temperature=True, **options)
    eager = module(*args)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)(*args)
    torch.testing.assert_close(compiled, eager)
    (a,), (b,) = (torch.autograd.grad(x, module.log_temperature) for x in (compiled, eager))
    torch.testing.assert_close(a, b)


# --- errors: one test each -------------------------------------------------------------------------------------------

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
    "views rank": (lambda: multiview_nt_xent(Z), ValueError, r"views must have shape \(V, N, D\), got \(6, 4\)"),
    "views one": (lambda: multiview_nt_xent([Z]), ValueError, "at least two views, got 1"),
    "views shapes": (lambda: multiview_nt_xent([Z, W[:2]]), ValueError, r"views\[0\] and views\[1\].*same shape"),
    "views type": (lambda: multiview_nt_xent(3), TypeError, "views must be a tensor or a sequence of tensors, got int"),
    "views member": (lambda: multiview_nt_xent([Z, None]), TypeError, r"views\[1\] must be a torch.Tensor"),
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
        "form must be 'out' where a row has several labels, got 'in'",
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
    "clip scale": (lambda: clip(Z, W, logit_scale=-1.0), ValueError, "logit_scale must be positive"),
    "clip bias": (lambda: clip(Z, W, logit_bias="0"), TypeError, "logit_bias must be a float or .*, got str"),
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
def test_bad_input_is_named(case):
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()


def test_ranks_of_nan_are_last():
    z = torch.randn(8, 4)
    assert fastntxent.positive_ranks(z * torch.nan, z).eq(15).all()
    one = z.clone()
    one[3] = torch.nan
    ranks = fastntxent.positive_ranks(one, z)
    assert ranks.min() >= 1
    assert ranks[3] == ranks[11] == 15


def test_a_column_of_labels_is_not_one_label_each():
    z = torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"labels must have shape \(6,\) .* labels.squeeze\(1\)"):
        fastntxent.sup_con(z, torch.arange(6)[:, None])
    assert fastntxent.sup_con(z, torch.ones(6, 1, dtype=torch.bool)).isfinite()


def test_what_cannot_be_is_named():
    z_i, z_j = torch.randn(2, 6, 4)
    with pytest.raises(ValueError, match=r"logit_bias must be a float or have one element, got shape \(6,\)"):
        fastntxent.clip(z_i, z_j, logit_bias=torch.zeros(6))
    with pytest.raises(ValueError, match="q / temperature must be below 89"):
        fastntxent.rince(z_i, z_j, 0.005)
    assert fastntxent.rince(z_i.double(), z_j.double(), 0.005).isfinite()
    with pytest.raises(ValueError, match="negatives must be given where in_batch_negatives is False"):
        fastntxent.info_nce(z_i, z_j, in_batch_negatives=False)
    assert fastntxent.macl(z_i * torch.nan, z_j).isnan()
    with pytest.raises(TypeError, match="init_process_group"):
        fastntxent.Sharding(None)


def test_clip_scale_beyond_its_bound_comes_back_and_goes_no_further():
    z = torch.nn.functional.normalize(torch.randn(16, 8), dim=1)
    for other, moves in ((torch.nn.functional.normalize(torch.randn(16, 8), dim=1), True), (z, False)):
        loss = fastntxent.CLIPLoss(temperature=1e-3)
        loss(z, other).backward()
        # Descent makes log_temperature larger, the scale smaller, or nothing at all.
        assert (loss.log_temperature.grad < 0) == moves
        assert moves or loss.log_temperature.grad == 0
