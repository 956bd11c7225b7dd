"""Distillation from a teacher function: how the function is called, and that teacher features give the same results."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import fastntxent
from fastntxent import distill
from fastntxent.backends import tiling
from tests import dense
from tests.cases import BACKENDS, KERNELS
from tests.ranks import on_ranks

N, D = 11, 5
GENERATOR = torch.Generator().manual_seed(0)
IMAGE, TEXT = torch.randn(2, N, D, generator=GENERATOR, dtype=torch.float64)
T_IMAGE, T_TEXT = F.normalize(torch.randn(2, N, D + 3, generator=GENERATOR, dtype=torch.float64), dim=-1)
SIMS = T_IMAGE @ T_TEXT.T


def looked_up(rows: Tensor, cols: Tensor) -> Tensor:
    return SIMS[rows[:, None], cols]


def results(*teacher: Tensor, image: Tensor = IMAGE, text: Tensor = TEXT, **options: Any) -> list[Tensor]:
    """Return the value and the gradients."""
    image, text = (x.clone().requires_grad_() for x in (image, text))
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    value = distill(image, text, *teacher, temperature=tau, **options)
    upstream = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view(value.shape)
    return [value.detach(), *torch.autograd.grad((value * upstream).sum(), (image, text, tau))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("edge", [1, 4, N - 1, N, N + 1])
def test_teacher_function_equals_teacher_features(edge, reduction, backend, monkeypatch):
    monkeypatch.setattr(tiling, "BLOCK_CPU", edge)
    options = {"reduction": reduction, "backend": backend, "teacher_temperature": 0.1}
    for called, of_features in zip(
        results(teacher=looked_up, **options), results(T_IMAGE, T_TEXT, **options), strict=True
    ):
        torch.testing.assert_close(called, of_features, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("reduction", "times"), [("mean", 2), ("sum", 2), ("none", 3)])
def test_teacher_is_called_for_every_pair_as_often_as_documented(reduction, times, monkeypatch):
    monkeypatch.setattr(tiling, "BLOCK_CPU", 4)
    asked = torch.zeros(N, N)

    def teacher(rows: Tensor, cols: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        for index in (rows, cols):
            assert index.dtype == torch.int64
            assert index.device.type == "cpu"
            assert index.ndim == 1
            assert len(index) <= 4
        asked[rows[:, None], cols] += 1
        return looked_up(rows, cols)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        results(teacher=teacher, reduction=reduction, backend="blocked")
    assert (asked == times).all()


def test_memory_that_the_teacher_returns_is_not_modified():
    held = SIMS.clone()
    distill(IMAGE, TEXT, teacher=lambda rows, cols: held[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1])
    assert torch.equal(held, SIMS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_teacher_similarities_are_converted_to_the_dtype_of_the_student(dtype):
    rounded = SIMS.to(dtype)
    for value, expected in zip(
        results(teacher=lambda rows, cols: rounded[rows[:, None], cols]),
        results(teacher=lambda rows, cols: rounded.double()[rows[:, None], cols]),
        strict=True,
    ):
        assert torch.equal(value, expected)


@pytest.mark.parametrize("student", [torch.float16, torch.bfloat16, torch.float32])
def test_student_gets_its_gradient_in_its_own_dtype(student):
    image, text = IMAGE.to(student), TEXT.to(student)
    value, d_image, d_text, _ = results(teacher=looked_up, image=image, text=text)
    true = results(teacher=looked_up, image=image.double(), text=text.double())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), true[0], rtol=1e-5, atol=1e-6)
    for gradient, expected in zip((d_image, d_text), true[1:3], strict=True):
        assert gradient.dtype == student
        torch.testing.assert_close(gradient.double(), expected, rtol=2 * torch.finfo(student).eps, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_similarity_of_minus_infinity_gives_a_pair_probability_0(reduction, backend, monkeypatch):
    monkeypatch.setattr(tiling, "BLOCK_CPU", 4)
    sims = SIMS.clone()
    sims[::2, 1::3] = -torch.inf
    sims.diagonal()[:5] = -torch.inf

    def true(image: Tensor, text: Tensor, tau: Tensor) -> Tensor:
        image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
        logits, targets = image @ text.T / tau, sims / 0.2
        rows, cols = (-(t.softmax(1) * x.log_softmax(1)).sum(1) for x, t in ((logits, targets), (logits.T, targets.T)))
        return (rows + cols) / 2 if reduction == "none" else (rows + cols).mean() / 2

    given = [x.clone().requires_grad_() for x in (IMAGE, TEXT, torch.tensor(0.3, dtype=torch.float64))]
    expected = true(*given)
    upstream = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).view(expected.shape)
    gradients = torch.autograd.grad((expected * upstream).sum(), given)
    values = results(
        teacher=lambda rows, cols: sims[rows[:, None], cols],
        teacher_temperature=0.2,
        reduction=reduction,
        backend=backend,
    )
    for value, truth in zip(values, (expected.detach(), *gradients), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-12)


def test_nan_from_the_teacher_reaches_only_the_losses_of_its_row_and_column():
    sims = SIMS.clone()
    sims[3, 4] = torch.nan
    rows = distill(IMAGE, TEXT, teacher=lambda rows, cols: sims[rows[:, None], cols], reduction="none")
    assert rows.isnan().nonzero().flatten().tolist() == [3, 4]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_tower_changes_neither_the_other_gradient_nor_the_value(reduction):
    options: dict[str, Any] = {"teacher": looked_up, "temperature": 0.3, "reduction": reduction}
    whole = [x.clone().requires_grad_() for x in (IMAGE, TEXT)]
    loss = distill(*whole, **options)
    expected = torch.autograd.grad(loss.sum(), whole)
    for index in range(2):
        towers = [x.clone() for x in (IMAGE, TEXT)]
        towers[index].requires_grad_()
        (gradient,) = torch.autograd.grad(distill(*towers, **options).sum(), towers[index])
        torch.testing.assert_close(gradient, expected[index])
    value = distill(IMAGE, TEXT, **options)
    assert not value.requires_grad
    torch.testing.assert_close(value, loss.detach())


def test_module_accepts_a_teacher_function():
    module = fastntxent.DistillLoss(0.3, teacher_temperature=0.2)
    expected = distill(IMAGE, TEXT, teacher=looked_up, temperature=0.3, teacher_temperature=0.2)
    assert torch.equal(module(IMAGE, TEXT, teacher=looked_up), expected)


def test_teacher_may_be_a_falsy_module():
    class Table(torch.nn.Sequential):  # has length 0, so it is falsy
        def forward(self, *indices: Tensor) -> Tensor:
            return looked_up(*indices)

    assert torch.equal(distill(IMAGE, TEXT, teacher=Table()), distill(IMAGE, TEXT, teacher=looked_up))


def test_error_raised_by_the_teacher_passes_through():
    def teacher(rows: Tensor, cols: Tensor) -> Tensor:
        raise LookupError("no such sample")

    with pytest.raises(LookupError, match="no such sample"):
        distill(IMAGE, TEXT, teacher=teacher)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_is_refused_except_by_the_reference(reduction):
    image = IMAGE.clone().requires_grad_()
    loss = distill(image, TEXT, teacher=looked_up, reduction=reduction)
    (gradient,) = torch.autograd.grad(loss.sum(), image, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()
    loss = distill(image, TEXT, teacher=looked_up, reduction=reduction, backend="reference")
    (gradient,) = torch.autograd.grad(loss.sum(), image, create_graph=True)
    gradient.square().sum().backward()
    assert image.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_func_grad_and_vmap_equal_autograd(reduction):
    def loss(image: Tensor) -> Tensor:
        return distill(image, TEXT, teacher=looked_up, reduction=reduction).sum()

    images = torch.stack((IMAGE, TEXT))
    expected = []
    for image in images:
        leaf = image.clone().requires_grad_()
        expected.append(torch.autograd.grad(loss(leaf), leaf)[0])
    torch.testing.assert_close(torch.func.grad(loss)(IMAGE), expected[0])
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(images), torch.stack(expected))
    torch.testing.assert_close(torch.vmap(loss)(images), torch.stack([loss(image) for image in images]))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_code_around_the_loss_equals_eager(reduction):
    def loss(image: Tensor, text: Tensor) -> Tensor:
        return 2 * distill(torch.sin(image), text, teacher=looked_up, reduction=reduction).sum()

    compiled = torch.compile(loss, backend="aot_eager")
    for function in (loss, compiled):
        leaves = [x.clone().requires_grad_() for x in (IMAGE, TEXT)]
        value = function(*leaves)
        found = [value.detach(), *torch.autograd.grad(value, leaves)]
        if function is loss:
            expected = found
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", KERNELS)
def test_teacher_temperature_may_be_a_tensor_or_a_logit_scale(backend):
    logits = SIMS / 0.2
    true = dense.distill(
        F.normalize(IMAGE, dim=1), F.normalize(TEXT, dim=1), torch.tensor(0.5), logits, torch.eye(N).double(), 1.0
    ).mean()
    for options in ({"teacher_temperature": torch.tensor(0.2, requires_grad=True)}, {"teacher_logit_scale": 5.0}):
        value = distill(IMAGE, TEXT, teacher=looked_up, logit_scale=2.0, backend=backend, **options)
        torch.testing.assert_close(value, true, rtol=1e-6, atol=1e-8)


# --- sharp teachers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("t_tau", [1e-4, 1e-8, 1e-37])
def test_sharp_teacher_costs_no_accuracy(t_tau, normalize, called, reduction, backend):
    # Logits reach 1e37, so their rounding errors exceed the range of exp. Log-sum-exps and probabilities must use the
    # same rounded logits.
    n, generator = 60, torch.Generator().manual_seed(3)
    image = torch.randn(n, 16, generator=generator)
    text = image + torch.randn(n, 16, generator=generator)
    t_image = F.normalize(torch.randn(n, 24, generator=generator), dim=1)
    t_text = F.normalize(t_image + torch.randn(n, 24, generator=generator) / 3, dim=1)
    sims = t_image.double() @ t_text.double().T
    if called:
        single = sims.float()
        sims, teacher = single.double(), {"teacher": lambda rows, cols: single[rows[:, None], cols]}
    else:
        teacher = dict(zip(("teacher_image_features", "teacher_text_features"), (t_image, t_text), strict=True))
    if not normalize:
        image, text = (F.normalize(x, dim=1) for x in (image, text))

    def found(loss: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (image, text, torch.tensor(0.07))]
        value = loss(*leaves)
        upstream = torch.linspace(-1, 2, value.numel(), dtype=dtype).view(value.shape)
        return [value.detach(), *torch.autograd.grad((value * upstream).sum(), leaves)]

    def true(a: Tensor, b: Tensor, tau: Tensor) -> Tensor:
        a, b = (F.normalize(x, dim=1) if normalize else x for x in (a, b))
        losses = dense.distill(a, b, tau, sims / t_tau, torch.eye(n, dtype=torch.float64), 1.0)
        return losses if reduction == "none" else losses.mean()

    options = {**teacher, "teacher_temperature": t_tau, "normalize": normalize, "reduction": reduction}
    values, references = (
        found(lambda a, b, tau, name=name: distill(a, b, temperature=tau, backend=name, **options), torch.float32)
        for name in (backend, "reference")
    )
    for value, reference, truth in zip(values, references, found(true, torch.float64), strict=True):
        scale = float(truth.abs().max()) if truth.ndim else max(float(truth.abs()), 1.0)
        error, of_reference = (float((x.double() - truth).abs().max()) / scale for x in (value, reference))
        assert error < 2 * of_reference + 1e-5


# --- across ranks ----------------------------------------------------------------------------------------------------


def over_ranks(sizes: list[int]) -> dict[str, Any]:
    rank = dist.get_rank()
    here = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    found: dict[str, Any] = {"asked": torch.zeros(2, N, N)}

    def teacher(rows: Tensor, cols: Tensor) -> Tensor:
        found["asked"][int(backward), rows[:, None], cols] += 1
        return looked_up(rows, cols)

    backward = False
    image, text = (x[here].clone().requires_grad_() for x in (IMAGE, TEXT))
    loss = distill(image, text, teacher=teacher, temperature=0.3, reduction="none", group="world")
    backward = True
    loss.sum().backward()
    found["results"] = loss.detach(), image.grad, text.grad

    def local(rows: Tensor, cols: Tensor) -> Tensor:
        return SIMS[here, here][rows[:, None], cols]

    for name, options in {
        "fails on one": {"teacher": local if rank else looked_up},
        "called on one": {"teacher": looked_up}
        if rank
        else {
            "teacher_image_features": T_IMAGE[here],
            "teacher_text_features": T_TEXT[here],
        },
    }.items():
        try:
            distill(image, text, group="world", **options)
        except Exception as error:
            found[name] = type(error), str(error)
    found["after"] = distill(image, text, teacher=looked_up, temperature=0.3, group="world").detach()
    return found


@functools.cache
def of_two_ranks() -> list[dict[str, Any]]:
    return on_ranks(2, over_ranks, [4, N - 4])


def test_each_rank_calls_the_teacher_for_its_own_rows_and_columns():
    for rank, here in enumerate((slice(0, 4), slice(4, N))):
        expected = torch.zeros(2, N, N)
        expected[0, here] += 2
        expected[1, here] += 1
        expected[1, :, here] += 1
        assert torch.equal(of_two_ranks()[rank]["asked"], expected)


def test_rows_across_ranks_equal_one_process():
    leaves = [x.clone().requires_grad_() for x in (IMAGE, TEXT)]
    loss = distill(*leaves, teacher=looked_up, temperature=0.3, reduction="none")
    expected = [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]
    for index, true in enumerate(expected):
        found = torch.cat([of_rank["results"][index] for of_rank in of_two_ranks()])
        torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-12)


def test_teacher_that_raises_on_one_rank_raises_on_all():
    (first, words), (second, _) = (of_rank["fails on one"] for of_rank in of_two_ranks())
    assert (first, second) == (RuntimeError, IndexError)
    assert words.startswith("the teacher of distill (call 2) raised an error on rank 1")
    expected = distill(IMAGE, TEXT, teacher=looked_up, temperature=0.3)
    for of_rank in of_two_ranks():
        torch.testing.assert_close(of_rank["after"], expected)


def test_different_kinds_of_teacher_on_ranks_raise_an_error():
    for of_rank in of_two_ranks():
        assert of_rank["called on one"] == (
            ValueError,
            "these must be the same on every rank: teacher is 'features' on rank 0; 'a function' on rank 1",
        )
