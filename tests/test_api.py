"""The public functions and modules: conventions, layouts, errors."""

import importlib
import inspect
import math
import pkgutil
import re
import subprocess
import sys
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

import fastntxent
from fastntxent import (
    NTXentLoss,
    alignment,
    backends,
    compat,
    cross_neg_lse,
    neg_lse,
    nt_xent,
    nt_xent_terms,
    split_views,
    uniformity,
)
from fastntxent.validation import check_integer
from tests.cases import BACKENDS, random_batch

table = importlib.import_module("fastntxent.backends")


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def test_nt_xent_reductions_agree(backend):
    z_i, z_j, *_ = random_batch(7, 5, 0.3)
    rows = nt_xent(z_i, z_j, 0.3, reduction="none", backend=backend)
    assert rows.shape == (14,)
    torch.testing.assert_close(nt_xent(z_i, z_j, 0.3, reduction="sum", backend=backend), rows.sum())
    torch.testing.assert_close(nt_xent(z_i, z_j, 0.3, backend=backend), rows.mean())


def test_nt_xent_rows_are_in_the_order_of_the_views(backend):
    z_i, z_j, *_ = random_batch(4, 5, 0.3)
    rows = nt_xent(z_i, z_j, 0.3, reduction="none", backend=backend)
    swapped = nt_xent(z_j, z_i, 0.3, reduction="none", backend=backend)
    torch.testing.assert_close(torch.cat((rows[4:], rows[:4])), swapped)


def test_nt_xent_of_equal_embeddings_has_the_published_value(backend):
    # The paper's loss at chance: with all embeddings equal and N = 256, it is log(2N - 1) at any temperature.
    z = torch.ones(256, 128)
    assert float(nt_xent(z, z, 0.1, backend=backend)) == pytest.approx(math.log(511), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nt_xent_value_is_at_least_float32_and_gradient_has_the_input_dtype(backend, dtype):
    z = random_batch(6, 4, 0.5, dtype=dtype).z_i.requires_grad_()
    loss = nt_xent(z, z.detach() + 1, backend=backend)
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert z.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_nt_xent_temperature_tensor_gets_its_gradient_in_its_own_dtype(backend, dtype):
    z_i, z_j, *_ = random_batch(6, 4, 0.5)
    temperature = torch.tensor(0.5, dtype=dtype, requires_grad=True)
    nt_xent(z_i, z_j, temperature, backend=backend).backward()
    assert temperature.grad.dtype == dtype
    assert temperature.grad.shape == ()
    assert temperature.grad != 0


def test_nt_xent_does_not_change_its_arguments(backend):
    z_i, z_j, *_ = random_batch(300, 8, 0.5)
    temperature = torch.tensor(0.5)
    before = [t.clone() for t in (z_i, z_j, temperature)]
    nt_xent(z_i.requires_grad_(), z_j.requires_grad_(), temperature.requires_grad_(), backend=backend).backward()
    for t, b in zip((z_i, z_j, temperature), before, strict=True):
        assert torch.equal(t.detach(), b)


def test_nt_xent_backward_twice_accumulates(backend):
    z = random_batch(5, 4, 0.5).z_i.requires_grad_()
    loss = nt_xent(z, z.detach().flip(0), backend=backend)
    loss.backward(retain_graph=True)
    once = z.grad.clone()
    loss.backward()
    torch.testing.assert_close(z.grad, 2 * once)


def test_nt_xent_accepts_the_same_tensor_as_both_views(backend):
    z = random_batch(5, 4, 0.5).z_i.requires_grad_()
    nt_xent(z, z, backend=backend).backward()
    expected = z.detach().double().requires_grad_()
    nt_xent(expected, expected, backend="reference").backward()
    torch.testing.assert_close(z.grad.double(), expected.grad, rtol=1e-5, atol=1e-7)


def test_nt_xent_nan_embeddings_give_nan(backend):
    z = torch.randn(4, 3)
    z[1, 1] = math.nan
    assert nt_xent(z, z, backend=backend).isnan()


def test_nt_xent_terms_add_up(backend):
    z_i, z_j, *_ = random_batch(6, 4, 0.3)
    terms = nt_xent_terms(z_i, z_j, 0.3, backend=backend)
    torch.testing.assert_close(terms.alignment + terms.distribution, 0.3 * terms.loss)
    torch.testing.assert_close(terms.loss, 2 * nt_xent(z_i, z_j, 0.3, backend=backend))
    bare = nt_xent_terms(z_i, z_j, 0.3, normalize=False, backend=backend)
    torch.testing.assert_close(bare.loss, 2 * nt_xent(z_i, z_j, 0.3, normalize=False, backend=backend))
    assert terms._fields == ("alignment", "distribution", "loss")


def test_nt_xent_terms_can_be_differentiated_one_at_a_time(backend):
    z = random_batch(6, 4, 0.3).z_i.requires_grad_()
    other = z.detach().flip(0)
    nt_xent_terms(z, other, 0.3, backend=backend).alignment.backward()
    expected = z.detach().clone().requires_grad_()
    (-2 / 6 * torch.nn.functional.cosine_similarity(expected, other).sum()).backward()
    torch.testing.assert_close(z.grad, expected.grad, rtol=1e-5, atol=1e-7)


def test_nt_xent_loss_module_equals_function(backend):
    z_i, z_j, *_ = random_batch(6, 4, 0.2)
    module = NTXentLoss(0.2, reduction="sum", normalize=False, backend=backend)
    assert torch.equal(module(z_i, z_j), nt_xent(z_i, z_j, 0.2, reduction="sum", normalize=False, backend=backend))
    assert module.temperature == 0.2
    assert not list(module.parameters())


def test_nt_xent_loss_module_learns_its_temperature(backend):
    z_i, z_j, *_ = random_batch(16, 8, 0.2)
    module = NTXentLoss(0.2, learn_temperature=True, backend=backend)
    assert module.temperature.item() == pytest.approx(0.2)
    assert module.log_temperature.item() == pytest.approx(math.log(0.2))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = module(z_i, z_j)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert module.temperature.item() > 0
    restored = NTXentLoss(0.9, learn_temperature=True)
    restored.load_state_dict(module.state_dict())
    assert restored.temperature.item() == module.temperature.item()


@pytest.mark.parametrize("learn_temperature", [True, False])
def test_nt_xent_loss_module_temperature_can_be_scheduled(learn_temperature):
    z_i, z_j, *_ = random_batch(16, 8, 0.2)
    module = NTXentLoss(0.9, learn_temperature=learn_temperature)
    module.temperature = 0.2
    torch.testing.assert_close(module(z_i, z_j).detach(), nt_xent(z_i, z_j, 0.2))
    with pytest.raises(ValueError, match="temperature must be positive"):
        module.temperature = 0.0


def test_nt_xent_loss_module_prints_its_settings():
    assert "temperature=0.2, reduction='sum'" in repr(NTXentLoss(0.2, reduction="sum"))
    assert "learn_temperature=True" in repr(NTXentLoss(learn_temperature=True))


def test_split_views_accepts_every_layout():
    z_i, z_j = torch.randn(2, 3, 4)
    for pair in (
        split_views(torch.cat((z_i, z_j))),
        split_views(torch.stack((z_i, z_j), dim=1).flatten(0, 1), "interleaved"),
        split_views(torch.stack((z_i, z_j), dim=1)),
    ):
        assert torch.equal(pair[0], z_i)
        assert torch.equal(pair[1], z_j)


def test_alignment_and_uniformity_equal_their_definitions(backend):
    z_i, z_j, *_ = random_batch(12, 5, 1.0, dtype=torch.float64)
    u_i, u_j = (torch.nn.functional.normalize(z, dim=1) for z in (z_i, z_j))
    assert float(alignment(z_i, z_j)) == pytest.approx(float((u_i - u_j).norm(dim=1).pow(2).mean()), rel=1e-12)
    expected = torch.pdist(u_i).pow(2).mul(-3).exp().mean().log()
    assert float(uniformity(z_i, t=3, backend=backend)) == pytest.approx(float(expected), rel=1e-12)


def test_uniformity_gradient_equals_autograd_of_its_definition(backend):
    z = random_batch(12, 5, 1.0, dtype=torch.float64).z_i.requires_grad_()
    u = torch.nn.functional.normalize(z, dim=1)
    (expected,) = torch.autograd.grad(torch.pdist(u).pow(2).mul(-2).exp().mean().log(), z)
    (value,) = torch.autograd.grad(uniformity(z, backend=backend), z)
    torch.testing.assert_close(value, expected)


# --- errors: one case each -------------------------------------------------------------------------------------------

Z = torch.randn(4, 3)
IDS = torch.arange(4)
BAD_CALLS = {
    "not a tensor": (lambda: nt_xent([[1.0]], Z), TypeError, "z_i must be a torch.Tensor, got list"),
    "None": (lambda: nt_xent(Z, None), TypeError, "z_j must be a torch.Tensor, got NoneType"),
    "integers": (lambda: nt_xent(Z.long(), Z.long()), TypeError, "z_i must be float16.*got torch.int64"),
    "complex": (lambda: nt_xent(Z.to(torch.cfloat), Z.to(torch.cfloat)), TypeError, "got torch.complex64"),
    "nested": (lambda: nt_xent(torch.nested.nested_tensor([Z, Z]), Z), TypeError, "dense"),
    "sparse": (lambda: nt_xent(Z.to_sparse(), Z.to_sparse()), TypeError, "dense"),
    "one dimension": (lambda: nt_xent(Z[0], Z[0]), ValueError, r"z_i must have 2 dimensions.*\(3,\)"),
    "three dimensions": (lambda: nt_xent(Z[None], Z[None]), ValueError, r"z_i must have 2 dimensions.*\(1, 4, 3\)"),
    "empty batch": (lambda: nt_xent(Z[:0], Z[:0]), ValueError, r"z_i must have at least one row.*\(0, 3\)"),
    "no features": (lambda: nt_xent(Z[:, :0], Z[:, :0]), ValueError, r"one feature.*\(4, 0\)"),
    "different N": (lambda: nt_xent(Z, Z[:3]), ValueError, r"same shape, got \(4, 3\) and \(3, 3\)"),
    "different D": (lambda: nt_xent(Z, Z[:, :2]), ValueError, r"same shape, got \(4, 3\) and \(4, 2\)"),
    "different dtypes": (lambda: nt_xent(Z, Z.double()), ValueError, "same dtype, got torch.float32 and torch.float64"),
    "different devices": (lambda: nt_xent(Z, Z.to("meta")), ValueError, "same device, got cpu and meta"),
    "temperature 0": (lambda: nt_xent(Z, Z, 0.0), ValueError, "temperature must be positive and finite, got 0.0"),
    "temperature 1e-39": (
        lambda: nt_xent(Z, Z, 1e-39),
        ValueError,
        "temperature must be at least 2.939e-39, got 1e-39",
    ),
    "temperature -1": (lambda: nt_xent(Z, Z, -1), ValueError, "temperature must be positive and finite, got -1"),
    "temperature nan": (lambda: nt_xent(Z, Z, math.nan), ValueError, "got nan"),
    "temperature inf": (lambda: nt_xent(Z, Z, math.inf), ValueError, "got inf"),
    "temperature 1e300": (
        lambda: nt_xent(Z, Z, 1e300),
        ValueError,
        r"temperature must be at most 7.136e\+44, got 1e\+300",
    ),
    "temperature tensor 1e300": (
        lambda: nt_xent(Z, Z, torch.tensor(1e300, dtype=torch.float64)),
        ValueError,
        r"temperature must be at most 7.136e\+44, got 1e\+300",
    ),
    "temperature 10**400": (
        lambda: nt_xent(Z, Z, 10**400),
        ValueError,
        r"temperature must be in the range of a float, up to 1.8e\+308, got int out of range",
    ),
    "temperature Fraction": (
        lambda: nt_xent(Z, Z, Fraction(10**400)),
        ValueError,
        "temperature must be in the range of a float, .*, got Fraction out of range",
    ),
    "temperature tiny": (lambda: nt_xent(Z, Z, 1e-320), ValueError, "temperature"),
    "temperature tensor 0": (lambda: nt_xent(Z, Z, torch.tensor(0.0)), ValueError, "positive and finite, got 0.0"),
    "temperature tensor nan": (lambda: nt_xent(Z, Z, torch.tensor(math.nan)), ValueError, "got nan"),
    "temperature 1-d": (lambda: nt_xent(Z, Z, torch.ones(1)), ValueError, r"0-d tensor, got shape \(1,\)"),
    "temperature integers": (lambda: nt_xent(Z, Z, torch.tensor(1)), TypeError, "floating-point.*torch.int64"),
    "temperature on meta": (lambda: nt_xent(Z, Z, torch.ones((), device="meta")), ValueError, "device cpu, got meta"),
    "temperature text": (lambda: nt_xent(Z, Z, "warm"), TypeError, "temperature must be a float.*got str"),
    "temperature bool": (lambda: nt_xent(Z, Z, True), TypeError, "got bool"),
    "reduction": (lambda: nt_xent(Z, Z, reduction="avg"), ValueError, "reduction must be one of.*got 'avg'"),
    "reduction list": (
        lambda: nt_xent(Z, Z, reduction=["mean"]),
        ValueError,
        r"reduction must be one of.*got \['mean'\]",
    ),
    "reduction array": (
        lambda: nt_xent(Z, Z, reduction=np.array("mean")),
        ValueError,
        "reduction must be one of.*array",
    ),
    "backend list": (lambda: nt_xent(Z, Z, backend=["cpu"]), ValueError, r"backend must be 'auto'.*got \['cpu'\]"),
    "reduction None": (lambda: nt_xent(Z, Z, reduction=None), ValueError, "reduction must be one of.*got None"),
    "backend": (lambda: nt_xent(Z, Z, backend="tpu"), ValueError, "backend must be 'auto' or one of.*got 'tpu'"),
    "backend None": (lambda: nt_xent(Z, Z, backend=None), ValueError, "backend must be.*got None"),
    "module temperature": (lambda: NTXentLoss(0.0), ValueError, "temperature must be positive"),
    "module learnt temperature": (lambda: NTXentLoss(-1.0, learn_temperature=True), ValueError, "temperature"),
    "module reduction": (lambda: NTXentLoss(reduction="avg"), ValueError, "reduction must be"),
    "module backend": (lambda: NTXentLoss(backend="tpu"), ValueError, "backend must be"),
    "terms shapes": (lambda: nt_xent_terms(Z, Z[:3]), ValueError, "same shape"),
    "terms temperature": (lambda: nt_xent_terms(Z, Z, 0.0), ValueError, "temperature must be positive"),
    "terms backend": (lambda: nt_xent_terms(Z, Z, backend="tpu"), ValueError, "backend must be"),
    "neg_lse 1-d": (lambda: neg_lse(Z[0], IDS, 1.0), ValueError, "u must have 2 dimensions"),
    "cross_neg_lse 1-d": (lambda: cross_neg_lse(Z, Z[0], IDS, IDS, 1.0), ValueError, "v must have 2 dimensions"),
    "cross_neg_lse dtype": (
        lambda: cross_neg_lse(Z, Z.double(), IDS, IDS, 1.0),
        ValueError,
        "u and v must have the same dtype, got torch.float32 and torch.float64",
    ),
    "cross_neg_lse features": (
        lambda: cross_neg_lse(Z, Z[:, :1], IDS, IDS, 1.0),
        ValueError,
        "u and v must have the same number of features",
    ),
    "cross_neg_lse ids shape": (
        lambda: cross_neg_lse(Z[:3], Z, IDS[:3], IDS[:3], 1.0),
        ValueError,
        r"v_ids must have shape \(4,\), one per row of v, got \(3,\)",
    ),
    "cross_neg_lse ids dtype": (
        lambda: cross_neg_lse(Z, Z, IDS.float(), IDS, 1.0),
        TypeError,
        "u_ids must have an integer dtype",
    ),
    "cross_neg_lse temperature": (
        lambda: cross_neg_lse(Z, Z, IDS, IDS, 0.0),
        ValueError,
        "temperature must be positive and finite",
    ),
    "neg_lse ids type": (lambda: neg_lse(Z, [0, 1, 2, 3], 1.0), TypeError, "ids must be a torch.Tensor, got list"),
    "neg_lse ids dtype": (lambda: neg_lse(Z, IDS.float(), 1.0), TypeError, "ids must have an integer dtype"),
    "neg_lse ids bool": (lambda: neg_lse(Z, IDS > 1, 1.0), TypeError, "ids must have an integer dtype"),
    "neg_lse ids shape": (lambda: neg_lse(Z, IDS[:3], 1.0), ValueError, r"ids must have shape \(4,\).*\(3,\)"),
    "neg_lse ids 2-d": (lambda: neg_lse(Z, IDS[:, None], 1.0), ValueError, r"ids must have shape \(4,\)"),
    "neg_lse ids device": (lambda: neg_lse(Z, IDS.to("meta"), 1.0), ValueError, "ids must be on the device of u"),
    "neg_lse temperature": (lambda: neg_lse(Z, IDS, -0.1), ValueError, "temperature must be positive"),
    "split odd": (lambda: split_views(Z[:3]), ValueError, "even number of rows, got 3"),
    "split layout": (lambda: split_views(Z, "zipped"), ValueError, "layout must be one of.*got 'zipped'"),
    "split three views": (lambda: split_views(torch.randn(4, 3, 2)), ValueError, r"\(N, 2, D\), got \(4, 3, 2\)"),
    "split integers": (lambda: split_views(IDS[:, None]), TypeError, "z must be float16"),
    "uniformity one row": (lambda: uniformity(Z[:1]), ValueError, "at least two rows"),
    "uniformity t": (lambda: uniformity(Z, t=0), ValueError, "t must be positive and finite, got 0"),
    "alignment shapes": (lambda: alignment(Z, Z[:3]), ValueError, "same shape"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_raises_an_error_that_describes_it(case):
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()


# Functions, each with a valid value for each of its tensor arguments.
TENSORS = {
    "nt_xent": (nt_xent, {"z_i": Z, "z_j": Z, "temperature": torch.tensor(0.5), "ids": IDS}),
    "nt_xent_terms": (nt_xent_terms, {"z_i": Z, "z_j": Z, "temperature": torch.tensor(0.5)}),
    "multiview_nt_xent": (fastntxent.multiview_nt_xent, {"views": torch.stack((Z, Z)), "ids": IDS}),
    "neg_lse": (neg_lse, {"u": Z, "ids": IDS, "temperature": torch.tensor(0.5)}),
    "cross_neg_lse": (
        cross_neg_lse,
        {"u": Z, "v": Z[:2], "u_ids": IDS, "v_ids": IDS[:2], "temperature": torch.tensor(0.5)},
    ),
    "sup_con": (fastntxent.sup_con, {"z": Z, "labels": IDS % 2, "temperature": torch.tensor(0.5)}),
    "sup_con of weights": (fastntxent.sup_con, {"z": Z, "labels": IDS % 2, "pair_weights": torch.ones(2, 2)}),
    "sup_con of several labels": (fastntxent.sup_con, {"z": Z, "labels": torch.eye(4)[:, :3].long()}),
    "clip": (
        fastntxent.clip,
        {
            "image_features": Z,
            "text_features": Z,
            "logit_scale": torch.tensor(2.0),
            "logit_bias": torch.tensor(1.0),
            "ids": IDS,
        },
    ),
    "info_nce": (fastntxent.info_nce, {"query": Z, "key": Z, "negatives": Z[:2], "ids": IDS}),
    "info_nce of own negatives": (fastntxent.info_nce, {"query": Z, "key": Z, "negatives": torch.stack([Z] * 4)}),
    "dcl": (fastntxent.dcl, {"z_i": Z, "z_j": Z, "temperature": torch.tensor(0.5)}),
    "dclw": (fastntxent.dclw, {"z_i": Z, "z_j": Z, "temperature": torch.tensor(0.5)}),
    "debiased": (partial(fastntxent.debiased, tau_plus=0.1), {"z_i": Z, "z_j": Z}),
    "rince": (fastntxent.rince, {"z_i": Z, "z_j": Z, "temperature": torch.tensor(0.5)}),
    "macl": (fastntxent.macl, {"z_i": Z, "z_j": Z, "temperature": torch.tensor(0.5)}),
    "alignment": (alignment, {"z_i": Z, "z_j": Z}),
    "uniformity": (uniformity, {"z": Z}),
    "positive_ranks": (fastntxent.positive_ranks, {"z_i": Z, "z_j": Z}),
    "effective_rank": (fastntxent.effective_rank, {"z": Z}),
    "split_views": (split_views, {"z": Z}),
    "split_views of three dimensions": (split_views, {"z": torch.stack((Z, Z), dim=1)}),
    "retrieve": (partial(fastntxent.retrieve, k=1), {"queries": Z, "corpus": Z}),
    "push": (lambda **tensors: fastntxent.NegativeQueue(4, 3).push(**tensors), {"z": Z, "ids": IDS}),
    "NTXentLoss": (NTXentLoss, {"temperature": torch.tensor(0.5)}),
    "compat.solo_learn": (compat.solo_learn.simclr_loss_func, {"z": Z, "indexes": IDS % 2}),
    "compat.sup_contrast labels": (
        lambda **tensors: compat.sup_contrast.SupConLoss()(**tensors),
        {"features": torch.stack((Z, Z), dim=1), "labels": IDS % 2},
    ),
    "compat.sup_contrast mask": (
        lambda **tensors: compat.sup_contrast.SupConLoss()(**tensors),
        {"features": torch.stack((Z, Z), dim=1), "mask": torch.eye(4)},
    ),
    "compat.info_nce": (compat.info_nce.info_nce, {"query": Z, "positive_key": Z, "negative_keys": Z[:2]}),
    "compat.open_clip": (
        lambda **tensors: compat.open_clip.ClipLoss()(Z, Z, **tensors),
        {"logit_scale": torch.tensor(2.0), "logit_bias": torch.tensor(1.0)},
    ),
    "compat.simclr": (compat.simclr.add_contrastive_loss, {"hidden": Z, "weights": torch.ones(2)}),
    "compat.torchmultimodal": (
        partial(compat.torchmultimodal.contrastive_loss_with_temperature, Z, Z),
        {"logit_scale": torch.tensor(1.0), "mask": IDS < 3},
    ),
    "compat.pytorch_metric_learning": (
        lambda **tensors: compat.pytorch_metric_learning.NTXentLoss(0.5)(**tensors),
        {"embeddings": Z, "labels": IDS % 2},
    ),
}
UNFIT = {
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr() if x.ndim == 2 else x.to_sparse(),
    "mkldnn": lambda x: x.float().to_mkldnn() if x.ndim else x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor(list(x.float().view(len(x), -1)) if x.ndim else [x.view(1)]),
    "jagged": lambda x: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(3, 3)], layout=torch.jagged),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "complex": lambda x: x.to(torch.complex64),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch warns that some tensor types are prototypes
@pytest.mark.parametrize("unfit", UNFIT)
@pytest.mark.parametrize("name", TENSORS)
def test_unsupported_kind_of_tensor_raises_an_error_that_names_the_argument(name, unfit):
    function, tensors = TENSORS[name]
    function(**tensors)
    for argument, tensor in tensors.items():
        with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b") as raised:
            function(**{**tensors, argument: UNFIT[unfit](tensor)})
        assert not isinstance(raised.value, NotImplementedError)


def test_meta_tensor_raises_an_error_that_names_the_argument():
    ids, weights = IDS.to("meta"), torch.ones(2, device="meta")
    for argument, call in {
        "labels": lambda: fastntxent.sup_con(Z, ids),
        "logit_scale": lambda: fastntxent.clip(Z, Z, logit_scale=weights[0]),
        "logit_bias": lambda: fastntxent.clip(Z, Z, logit_bias=weights[0]),
        "temperature": lambda: NTXentLoss(weights[0], learn_temperature=True),
        "indexes": lambda: compat.solo_learn.simclr_loss_func(Z, ids),
        "mask": lambda: compat.torchmultimodal.contrastive_loss_with_temperature(Z, Z, torch.tensor(0.0), ids > 1),
        "weights": lambda: compat.simclr.add_contrastive_loss(Z, weights=weights),
    }.items():
        with pytest.raises((TypeError, ValueError), match=rf"\b{argument}\b.*meta"):
            call()


FEW = torch.zeros(1, 1)
TOO_MANY = {
    "nt_xent": lambda rows, ids: nt_xent(rows, rows),
    "nt_xent with a gradient": lambda rows, ids: nt_xent(rows.detach().requires_grad_(), rows),
    "nt_xent per row": lambda rows, ids: nt_xent(rows, rows, reduction="none"),
    "nt_xent with ids": lambda rows, ids: nt_xent(rows, rows, ids=ids),
    "neg_lse": lambda rows, ids: neg_lse(rows, ids, 0.5),
    "cross_neg_lse": lambda rows, ids: cross_neg_lse(FEW, rows, IDS[:1], ids, 0.5),
    "sup_con": lambda rows, ids: fastntxent.sup_con(rows, ids),
    "clip": lambda rows, ids: fastntxent.clip(rows, rows),
    "multiview_nt_xent": lambda rows, ids: fastntxent.multiview_nt_xent([rows, rows]),
    "dcl": lambda rows, ids: fastntxent.dcl(rows, rows),
    "positive_ranks": lambda rows, ids: fastntxent.positive_ranks(rows, rows),
}


@pytest.mark.parametrize("n", [2**31, 2**40])
@pytest.mark.parametrize("name", TOO_MANY)
def test_too_many_rows_are_rejected_before_any_memory_is_allocated(name, n):
    with pytest.raises(ValueError, match=rf"must have at most 2147483647 rows, got {n}|got {2 * n}"):
        TOO_MANY[name](FEW.expand(n, 1), IDS[:1].expand(n))


def test_too_many_rows_in_two_views_together_are_rejected():
    rows = FEW.expand(2**30, 1).requires_grad_()
    with pytest.raises(ValueError, match="z_i and z_j together must have at most 2147483647 rows, got 2147483648"):
        nt_xent(rows, rows)


NUMBERS = {
    "nt_xent": lambda n: nt_xent(Z, Z.flip(0), n(0.3), label_smoothing=n(0.1)),
    "NTXentLoss": lambda n: NTXentLoss(n(0.3))(Z, Z.flip(0)),
    "nt_xent_terms": lambda n: nt_xent_terms(Z, Z.flip(0), n(0.3)).loss,
    "multiview_nt_xent": lambda n: fastntxent.multiview_nt_xent([Z, Z.flip(0)], n(0.3), label_smoothing=n(0.1)),
    "macl": lambda n: fastntxent.macl(Z, Z.flip(0), n(0.3), alpha=n(0.3), a_0=n(0.1)),
    "debiased": lambda n: fastntxent.debiased(Z, Z.flip(0), n(0.3), tau_plus=n(0.1)),
    "hard_negative": lambda n: fastntxent.hard_negative(Z, Z.flip(0), n(0.3), tau_plus=n(0.1), beta=n(0.3)),
    "dclw": lambda n: fastntxent.dclw(Z, Z.flip(0), n(0.3), sigma=n(0.3)),
    "rince": lambda n: fastntxent.rince(Z, Z.flip(0), n(0.3), q=n(0.3), lam=n(0.1)),
    "uniformity": lambda n: uniformity(Z, t=n(0.3)),
    "clip": lambda n: fastntxent.clip(Z, Z.flip(0), logit_scale=n(0.3), logit_bias=n(0.1)),
    "CLIPLoss": lambda n: fastntxent.CLIPLoss(n(0.1), max_logit_scale=n(0.3))(Z, Z.flip(0)).detach(),
    "info_nce": lambda n: fastntxent.info_nce(
        Z, Z.flip(0), n(0.3), hardness_mode="all_negatives", hardness_strength=n(0.3)
    ),
    "lightly": lambda n: compat.lightly.NTXentLoss(n(0.3))(Z, Z.flip(0)),
    "open_clip": lambda n: compat.open_clip.ClipLoss()(Z, Z.flip(0), n(0.3), n(0.1)),
    "simclr": lambda n: compat.simclr.add_contrastive_loss(Z, temperature=n(0.3), weights=n(0.3)).loss,
}


@pytest.mark.parametrize("number", [np.float16, np.float32, np.float64, Fraction])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_any_real_type_are_converted_to_float(name, number):
    value = NUMBERS[name](number)
    assert isinstance(value, torch.Tensor)
    assert torch.equal(value, NUMBERS[name](lambda x: float(number(x))))


@pytest.mark.parametrize("value", [True, np.bool_(True), np.array(0.5), 1j, "0.5"])
def test_values_that_are_not_real_numbers_are_rejected(value):
    for call in (
        lambda: nt_xent(Z, Z, label_smoothing=value),
        lambda: nt_xent(Z, Z, value),
        lambda: fastntxent.CLIPLoss(max_logit_scale=value),
    ):
        with pytest.raises(TypeError, match=f"must be a .*got {type(value).__name__}"):
            call()


def test_check_integer_accepts_only_integers():
    assert type(check_integer("k", np.int64(3), 1)) is int
    for value in (True, np.bool_(True), 3.0, "3", torch.tensor(3)):
        with pytest.raises(TypeError, match="k must be an int, got"):
            check_integer("k", value, 1)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        check_integer("k", np.int64(0), 1)


# --- the table of backends -------------------------------------------------------------------------------------------


def test_backends_returns_a_consistent_status_for_each_backend():
    table = backends()
    assert {"reference", "blocked"} <= set(table)
    for status in table.values():
        assert status.available == (status.reason is None)
        assert status.available or status.details is None
        assert status.device_types


def test_backends_says_that_the_cpu_kernels_were_not_built():
    code = """
import sys
sys.modules["fastntxent._cpu"] = None
import fastntxent, torch
status = fastntxent.backends()["cpu"]
assert "the CPU kernels were not built" in status.reason and "pip install -v" in status.reason, status
assert not status.available and status.details is None, status
fastntxent.nt_xent(*torch.randn(2, 4, 3))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_backends_says_which_instruction_set_and_threads_the_cpu_kernels_use():
    status = backends()["cpu"]
    if not status.available:
        pytest.skip(f"needs the CPU kernels built: {status.reason}")
    before = torch.get_num_threads()
    try:
        for count, words in ((1, "1 thread"), (2, "2 threads")):
            torch.set_num_threads(count)
            assert re.fullmatch(rf"(amx|avx512_bf16|avx512|avx2|neon|portable), {words}", backends()["cpu"].details)
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def broken_backend(monkeypatch):
    """A backend that fails to import, at the top of the order of preference."""
    entry = table._TABLE["blocked"]._replace(module="fastntxent.backends.does_not_exist", device_types=("cpu",))
    monkeypatch.setattr(table, "_TABLE", {"broken": entry, **table._TABLE})
    table._first_serving.cache_clear()
    yield
    table._load.cache_clear()
    table._first_serving.cache_clear()


def test_backends_reports_the_error_of_a_backend_that_fails_to_import(broken_backend):
    status = backends()["broken"]
    assert not status.available
    assert "does_not_exist" in status.reason


def test_requesting_an_unavailable_backend_raises_an_error_that_says_why(broken_backend):
    with pytest.raises(RuntimeError, match=r"backend 'broken' is not available: ModuleNotFoundError.*does_not_exist"):
        nt_xent(Z, Z, backend="broken")
    for call in (
        lambda: NTXentLoss(backend="broken")(Z, Z),
        lambda: nt_xent_terms(Z, Z, backend="broken"),
        lambda: neg_lse(Z, IDS, 0.5, backend="broken"),
        lambda: uniformity(Z, backend="broken"),
    ):
        with pytest.raises(RuntimeError, match="'broken' is not available"):
            call()


def test_auto_skips_a_backend_that_fails_to_import(broken_backend):
    assert table._TABLE["broken"].auto == "yes"
    torch.testing.assert_close(nt_xent(Z, Z), nt_xent(Z, Z, backend="reference"))


def test_requesting_a_backend_on_an_unsupported_device_raises(broken_backend):
    with pytest.raises(ValueError, match="'broken' supports cpu tensors, got tensors on cuda"):
        table.select("broken", "cuda", torch.float32)


# --- the package -----------------------------------------------------------------------------------------------------


def test_public_names_are_documented():
    for name in fastntxent.__all__:
        doc = inspect.getdoc(getattr(fastntxent, name))
        assert doc, name
        assert len(doc.splitlines()[0]) > 20, name


def test_import_sets_no_global_state_and_loads_no_extras():
    code = """
import sys, torch
def state():
    return (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(), torch.get_rng_state().tolist())
before = state()
import fastntxent
assert state() == before
assert not {"matplotlib", "sklearn", "mlxtend", "PIL"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_drop_ins_load_on_first_access():
    code = """
import sys, fastntxent
def loaded():
    return {name.rpartition(".")[2] for name in sys.modules if name.startswith("fastntxent.compat.")}
fastntxent.compat
assert not loaded()
fastntxent.compat.lightly.NTXentLoss
assert loaded() == {"lightly", "shared"}, loaded()
for module in (fastntxent, fastntxent.compat):
    assert not hasattr(module, "does_not_exist")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    modules = {name for _, name, _ in pkgutil.iter_modules(compat.__path__)}
    assert set(compat.__all__) == modules - {"cached", "pairs", "shared"}
    assert set(compat.__all__) <= set(dir(compat))


def test_package_needs_no_numpy():
    # PyTorch itself warns if NumPy is missing.
    code = """
import sys, warnings
sys.modules["numpy"] = None
warnings.simplefilter("ignore")
import torch
warnings.simplefilter("error")
import fastntxent
z = torch.randn(6, 4, requires_grad=True)
fastntxent.nt_xent(z, z.detach().flip(0), 0.1).backward()
fastntxent.sup_con(z, torch.arange(6) % 2, form="in").backward()
fastntxent.QueueInfoNCELoss(4, 4)(z, z.detach()).backward()
fastntxent.retrieve(z, z, 2)
fastntxent.backends()
for name in fastntxent.compat.__all__:
    getattr(fastntxent.compat, name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
