"""Every public loss, measure, primitive and drop-in as a call on tensors, for the tests that cover all of them
(compilation, export, tracing, transforms, autocast)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastntxent as fx
from fastntxent.compat import (
    gist,
    info_nce,
    lightly,
    open_clip,
    pytorch_metric_learning,
    sentence_transformers,
    simclr,
    solo_learn,
    sup_contrast,
    torchmultimodal,
)

D = 4


class Call(NamedTuple):
    """`make` turns options (a temperature, a reduction) into a callable; `inputs` returns the callable's arguments for
    N samples."""

    make: Callable[..., Callable[..., Any]]
    inputs: Callable[[int], tuple[Tensor, ...]]
    temperature: bool = True  # whether `make` takes a temperature
    reduction: bool = True

    def at(self, temperature: float | Tensor) -> Callable[..., Any]:
        return self.make(temperature=temperature) if self.temperature else self.make()


def rows(n: int) -> Tensor:
    return torch.randn(n, D, requires_grad=True)


def learnt(value: float) -> Tensor:
    return torch.tensor(value, requires_grad=True)


def one(n: int) -> tuple[Tensor, ...]:
    return (rows(n),)


def views(n: int) -> tuple[Tensor, ...]:
    return rows(n), rows(n)


def three(n: int) -> tuple[Tensor, ...]:
    return rows(n), rows(n), rows(n)


def taught(n: int) -> tuple[Tensor, ...]:
    """Return the rows of two towers, and the rows of their teacher, which are wider and need no gradient."""
    return *views(n), torch.randn(n, D + 2), torch.randn(n, D + 2)


def captioned(n: int) -> tuple[Tensor, ...]:
    return *views(n), torch.randn(n, 3, 7, requires_grad=True), torch.randint(0, 7, (n, 3))


def with_ids(n: int) -> tuple[Tensor, ...]:
    return *views(n), torch.arange(n) // 2


def labelled(n: int) -> tuple[Tensor, ...]:
    return rows(2 * n), torch.arange(n).repeat(2) // 2


def two_sets(n: int) -> tuple[Tensor, ...]:
    return rows(n), torch.arange(n) // 2, rows(n + 2), torch.arange(n + 2) // 2


def pairs(n: int) -> tuple[Tensor, ...]:
    a = torch.arange(2 * n)
    return rows(2 * n), a, (a + n) % (2 * n), a, (a + 1) % (2 * n)


def by_sample(n: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 2, D, requires_grad=True),)


def of(function: Callable[..., Any], **options: Any) -> Callable[..., Callable[..., Any]]:
    """Return a `make` whose callables pass their tensors to the function by position."""
    return lambda **more: lambda *tensors: function(*tensors, **options, **more)


def module(cls: Callable[..., nn.Module], *args: Any, **options: Any) -> Callable[..., Callable[..., Any]]:
    return lambda **more: cls(*args, **options, **more)


def with_ids_last(name: str, **options: Any) -> Callable[..., Callable[..., Any]]:
    return lambda **more: lambda a, b, ids: getattr(fx, name)(a, b, ids=ids, **options, **more)


def masked(**options: Any) -> Callable[..., Callable[..., Any]]:
    def make(**more: Any) -> Callable[..., Any]:
        loss = sup_contrast.SupConLoss(**options, **more)
        return lambda z, mask: loss(z, None, mask)

    return make


def of_references(cls: Callable[..., nn.Module]) -> Callable[..., Callable[..., Any]]:
    def make(**more: Any) -> Callable[..., Any]:
        loss = cls(**more)
        return lambda z, labels, ref, ref_labels: loss(z, labels, None, ref, ref_labels)

    return make


def of_pairs(cls: Callable[..., nn.Module]) -> Callable[..., Callable[..., Any]]:
    def make(**more: Any) -> Callable[..., Any]:
        loss = cls(**more)
        return lambda z, *indices: loss(z, None, indices)

    return make


def several_towers(**options: Any) -> Callable[..., Any]:
    loss = fx.MultiCLIPLoss(learn_temperature=False, **options)
    return lambda *z: loss(z)


def of_columns(**options: Any) -> Callable[..., Callable[..., Any]]:
    def make() -> Callable[..., Any]:
        loss = sentence_transformers.MultipleNegativesRankingLoss(None, **options)
        return lambda *columns: loss(list(columns))

    return make


_debiased = {"tau_plus": 0.1}
_hard = {"tau_plus": 0.1, "beta": 0.5}
_pml = pytorch_metric_learning

# Keys: the public name, then the variant, if any.
CALLS: dict[str, Call] = {
    **{name: Call(of(getattr(fx, name)), views) for name in ("nt_xent", "dcl", "dclw", "rince", "macl", "info_nce")},
    "clip": Call(of(fx.clip), views),
    "distill": Call(of(fx.distill), taught),
    "distill temperature": Call(of(fx.distill, teacher_temperature=0.2), taught),
    "guided_info_nce": Call(of(fx.guided_info_nce), taught),
    "guided_info_nce negatives": Call(
        lambda **o: lambda *z: fx.guided_info_nce(*z[:4], negatives=z[4], guide_negatives=z[5], margin=0.1, **o),
        lambda n: (*taught(n), rows(n + 1), torch.randn(n + 1, D + 2)),
    ),
    "siglip": Call(of(fx.siglip, bias=-1.0), views),
    "siglip ids": Call(with_ids_last("siglip", bias=-1.0), with_ids),
    "siglip bias": Call(lambda **o: lambda a, b, c: fx.siglip(a, b, bias=c, **o), lambda n: (*views(n), learnt(-1.0))),
    "nt_logistic": Call(of(fx.nt_logistic), views),
    "nt_logistic ids": Call(with_ids_last("nt_logistic", bias=-1.0), with_ids),
    "debiased": Call(of(fx.debiased, **_debiased), views),
    "hard_negative": Call(of(fx.hard_negative, **_hard), views),
    "hard_negative undebiased": Call(of(fx.hard_negative, tau_plus=0.0, beta=0.5), views),
    "nt_xent ids": Call(with_ids_last("nt_xent"), with_ids),
    "nt_xent smoothed": Call(of(fx.nt_xent, label_smoothing=0.1), views),
    "nt_xent rows": Call(of(fx.nt_xent, normalize=False), views),
    "nt_xent temperatures": Call(of(fx.nt_xent), lambda n: (*views(n), torch.rand(2 * n) + 0.5), temperature=False),
    "nt_xent_terms": Call(of(fx.nt_xent_terms), views, reduction=False),
    "multiview_nt_xent": Call(of(fx.multiview_nt_xent), lambda n: (torch.randn(3, n, D, requires_grad=True),)),
    "multiview_nt_xent list": Call(lambda **o: lambda *z: fx.multiview_nt_xent(z, label_smoothing=0.1, **o), three),
    "sup_con": Call(of(fx.sup_con), labelled),
    "sup_con in": Call(of(fx.sup_con, form="in"), labelled),
    "sup_con pairs": Call(of(fx.sup_con, form="pairs"), labelled),
    "sup_con weights": Call(
        lambda **o: lambda z, labels, weights: fx.sup_con(z, labels, pair_weights=weights, **o),
        lambda n: (*labelled(n), torch.rand(n, n)),
    ),
    "sup_con several": Call(of(fx.sup_con), lambda n: (rows(n), torch.rand(n, 3) < 0.5)),
    "info_nce shared": Call(
        lambda **o: lambda a, b, c: fx.info_nce(a, b, negatives=c, in_batch_negatives=True, hardness_strength=0.5, **o),
        lambda n: (*views(n), rows(n + 2)),
    ),
    "info_nce own": Call(
        lambda **o: lambda a, b, c: fx.info_nce(a, b, negatives=c, label_smoothing=0.1, **o),
        lambda n: (*views(n), torch.randn(n, 3, D, requires_grad=True)),
    ),
    "nt_xent margin": Call(of(fx.nt_xent, margin=0.1), views),
    "nt_xent margin ceiling": Call(of(fx.nt_xent, relative_margin=0.1, ceiling=0.3), views),
    "clip margin": Call(of(fx.clip, margin=0.1), views),
    "sup_con ceiling": Call(of(fx.sup_con, ceiling=0.1), labelled),
    "clip same_id": Call(with_ids_last("clip", positives="same_id", form="in"), with_ids),
    "info_nce same_id": Call(with_ids_last("info_nce", positives="same_id"), with_ids),
    "multi_clip": Call(lambda **o: lambda *z: fx.multi_clip(z, **o), three),
    "matryoshka": Call(lambda **o: lambda a, b: fx.matryoshka(fx.nt_xent, a, b, dims=[2, 4], **o), views),
    "MultiCLIPLoss": Call(several_towers, three),
    "MatryoshkaLoss": Call(lambda **o: fx.MatryoshkaLoss(fx.NTXentLoss(**o), dims=[2, 4]), views),
    "lightly.MACLLoss": Call(module(lightly.MACLLoss), views, reduction=False),
    **{
        f"solo_learn.{name}": Call(of(getattr(solo_learn, name)), views, reduction=False)
        for name in ("mocov3_loss_func", "nnclr_loss_func")
    },
    "solo_learn.mocov2plus_loss_func": Call(
        lambda **o: lambda a, b, queue: solo_learn.mocov2plus_loss_func(a, b, queue, **o),
        lambda n: (*views(n), torch.randn(D, n + 2)),
        reduction=False,
    ),
    "solo_learn.ressl_loss_func": Call(
        lambda temperature: lambda a, b, queue: solo_learn.ressl_loss_func(a, b, queue, temperature, temperature / 2),
        lambda n: (rows(n), torch.randn(n, D), torch.randn(n + 2, D)),
        reduction=False,
    ),
    "clip smoothed": Call(with_ids_last("clip", label_smoothing=0.1), with_ids),
    "NTXentLoss": Call(module(fx.NTXentLoss), views),
    "NTXentLoss ids": Call(module(fx.NTXentLoss, label_smoothing=0.1), with_ids),
    "MultiViewNTXentLoss": Call(module(fx.MultiViewNTXentLoss), lambda n: (torch.randn(3, n, D, requires_grad=True),)),
    "DCLLoss": Call(module(fx.DCLLoss), views),
    "DCLWLoss": Call(module(fx.DCLWLoss), views),
    "DebiasedLoss": Call(module(fx.DebiasedLoss, **_debiased), views),
    "HardNegativeLoss": Call(module(fx.HardNegativeLoss, **_hard), views),
    "RINCELoss": Call(module(fx.RINCELoss), views),
    "MACLLoss": Call(module(fx.MACLLoss), views),
    "SupConLoss": Call(module(fx.SupConLoss), labelled),
    "InfoNCELoss": Call(module(fx.InfoNCELoss), views),
    "CLIPLoss": Call(module(fx.CLIPLoss, learn_temperature=False), views),
    "DistillLoss": Call(module(fx.DistillLoss, teacher_temperature=0.2), taught),
    "GuidedInfoNCELoss": Call(module(fx.GuidedInfoNCELoss, margin=0.1), taught),
    "SigLIPLoss": Call(module(fx.SigLIPLoss, bias=-1.0, learn_temperature=False), views),
    "SigLIPLoss learnt": Call(module(fx.SigLIPLoss, bias=-1.0), views, temperature=False),
    "NTLogisticLoss": Call(module(fx.NTLogisticLoss), views),
    "CLIPLoss learnt": Call(module(fx.CLIPLoss), views, temperature=False),
    "QueueInfoNCELoss": Call(module(fx.QueueInfoNCELoss, 16, D), views),
    "neg_lse": Call(lambda temperature: lambda u, ids: fx.neg_lse(u, ids, temperature), labelled, reduction=False),
    "cross_neg_lse": Call(
        lambda temperature: lambda u, i, v, j: fx.cross_neg_lse(u, v, i, j, temperature), two_sets, reduction=False
    ),
    "alignment": Call(of(fx.alignment), views, False, False),
    "uniformity": Call(of(fx.uniformity), one, False, False),
    "positive_ranks": Call(of(fx.positive_ranks), views, False, False),
    "contrastive_accuracy": Call(of(fx.contrastive_accuracy), views, False, False),
    "effective_rank": Call(of(fx.effective_rank), one, False, False),
    "split_views": Call(of(fx.split_views, layout="interleaved"), lambda n: (rows(2 * n),), False, False),
    "retrieve": Call(of(fx.retrieve, k=2), views, False, False),
    "zero_shot_classify": Call(of(fx.zero_shot_classify), lambda n: (rows(n), rows(3)), False, False),
    "gist.GISTEmbedLoss": Call(
        lambda temperature: (
            lambda a, b, c, d: gist.GISTEmbedLoss(None, None, temperature).compute_loss_from_embeddings([a, b], [c, d])
        ),
        taught,
        reduction=False,
    ),
    "info_nce.InfoNCE": Call(module(info_nce.InfoNCE), views),
    "info_nce.info_nce": Call(of(info_nce.info_nce), views),
    "lightly.NTXentLoss": Call(module(lightly.NTXentLoss), views, reduction=False),
    "lightly.NTXentLoss bank": Call(module(lightly.NTXentLoss, memory_bank_size=(16, D)), views, reduction=False),
    "lightly.NTXentLoss negative": Call(lambda temperature: lightly.NTXentLoss(-temperature), views, reduction=False),
    "lightly.DCLLoss": Call(module(lightly.DCLLoss), views, reduction=False),
    "lightly.DCLWLoss": Call(module(lightly.DCLWLoss), views, reduction=False),
    "lightly.MemoryBankModule": Call(module(lightly.MemoryBankModule, (16, D)), one, False, False),
    "lightly.negative_mises_fisher_weights": Call(of(lightly.negative_mises_fisher_weights), views, False, False),
    "open_clip.ClipLoss": Call(
        lambda temperature: lambda a, b: open_clip.ClipLoss()(a, b, logit_scale=temperature), views, reduction=False
    ),
    "open_clip.ClipLoss ids": Call(
        lambda temperature: lambda a, b, ids: open_clip.ClipLoss()(a, b, logit_scale=temperature, ids=ids),
        with_ids,
        reduction=False,
    ),
    "open_clip.DistillClipLoss": Call(
        lambda temperature: lambda a, b, c, d: open_clip.DistillClipLoss()(a, b, temperature, c, d, 2.0),
        taught,
        reduction=False,
    ),
    "open_clip.CoCaLoss": Call(
        lambda temperature: lambda *tensors: sum(open_clip.CoCaLoss(2.0, 1.0)(*tensors, logit_scale=temperature)),
        captioned,
        reduction=False,
    ),
    "open_clip.SigLipLoss": Call(
        lambda temperature: lambda a, b: open_clip.SigLipLoss()(a, b, logit_scale=temperature, logit_bias=-1.0),
        views,
        reduction=False,
    ),
    "pytorch_metric_learning.NTXentLoss": Call(module(_pml.NTXentLoss), labelled, reduction=False),
    "pytorch_metric_learning.NTXentLoss references": Call(of_references(_pml.NTXentLoss), two_sets, reduction=False),
    "pytorch_metric_learning.NTXentLoss pairs": Call(of_pairs(_pml.NTXentLoss), pairs, reduction=False),
    "pytorch_metric_learning.SupConLoss": Call(module(_pml.SupConLoss), labelled, reduction=False),
    "pytorch_metric_learning.SupConLoss references": Call(of_references(_pml.SupConLoss), two_sets, reduction=False),
    "pytorch_metric_learning.SupConLoss pairs": Call(of_pairs(_pml.SupConLoss), pairs, reduction=False),
    "pytorch_metric_learning.SelfSupervisedLoss": Call(
        lambda **o: _pml.SelfSupervisedLoss(_pml.NTXentLoss(**o)), views, reduction=False
    ),
    "pytorch_metric_learning.DistributedLossWrapper": Call(
        lambda **o: _pml.DistributedLossWrapper(_pml.SupConLoss(**o)), labelled, reduction=False
    ),
    "sentence_transformers.MultipleNegativesRankingLoss": Call(of_columns(), three, False, False),
    "sentence_transformers.MultipleNegativesRankingLoss ids": Call(
        lambda: lambda a, b, ids: sentence_transformers.MultipleNegativesRankingLoss(None)([a, b], ids=ids),
        with_ids,
        False,
        False,
    ),
    "sentence_transformers.MultipleNegativesRankingLoss directions": Call(
        of_columns(directions=sentence_transformers.DIRECTIONS, hardness_mode="all_negatives", hardness_strength=0.5),
        three,
        False,
        False,
    ),
    "sentence_transformers.cos_sim": Call(of(sentence_transformers.cos_sim), views, False, False),
    "sentence_transformers.dot_score": Call(of(sentence_transformers.dot_score), views, False, False),
    "simclr.add_contrastive_loss": Call(
        lambda **o: lambda z: simclr.add_contrastive_loss(z, **o).loss, lambda n: (rows(2 * n),), reduction=False
    ),
    "simclr.add_contrastive_loss weights": Call(
        lambda **o: lambda z, weights: simclr.add_contrastive_loss(z, weights=weights, **o).loss,
        lambda n: (rows(2 * n), torch.rand(n)),
        reduction=False,
    ),
    "solo_learn.simclr_loss_func": Call(of(solo_learn.simclr_loss_func), labelled, reduction=False),
    "sup_contrast.SupConLoss": Call(module(sup_contrast.SupConLoss), by_sample, reduction=False),
    "sup_contrast.SupConLoss labels": Call(
        module(sup_contrast.SupConLoss), lambda n: (*by_sample(n), torch.arange(n) // 2), reduction=False
    ),
    "sup_contrast.SupConLoss one": Call(
        module(sup_contrast.SupConLoss, contrast_mode="one"),
        lambda n: (*by_sample(n), torch.arange(n) // 2),
        reduction=False,
    ),
    "sup_contrast.SupConLoss mask": Call(masked(), lambda n: (*by_sample(n), torch.rand(n, n) < 0.5), reduction=False),
    "sup_contrast.SupConLoss weights": Call(
        masked(contrast_mode="one"), lambda n: (*by_sample(n), torch.rand(n, n)), reduction=False
    ),
    "torchmultimodal.ContrastiveLossWithTemperature": Call(
        module(torchmultimodal.ContrastiveLossWithTemperature), views, False, False
    ),
    "torchmultimodal.contrastive_loss_with_temperature": Call(
        lambda: lambda a, b: torchmultimodal.contrastive_loss_with_temperature(a, b, torch.tensor(1.0)).loss,
        views,
        False,
        False,
    ),
    "torchmultimodal.contrastive_loss_with_temperature mask": Call(
        lambda: (
            lambda a, b, mask: torchmultimodal.contrastive_loss_with_temperature(a, b, torch.tensor(1.0), mask).loss
        ),
        lambda n: (*views(n), torch.arange(n) % 2 == 0),
        False,
        False,
    ),
}

# Public names without a call above; most are not functions of tensors.
NO_CALLS = {
    *(
        "BackendStatus",
        "Classification",
        "CrossNegLse",
        "NTXentTerms",
        "Retrieval",
        "Sharding",
        "Verdict",
        "backends",
        "verify",
        "warm_up",
    ),
    "NegativeQueue",  # covered by QueueInfoNCELoss
    "pytorch_metric_learning.CrossBatchMemory",  # reads on the host how many rows it holds
    "cached_backward",  # runs an encoder and a backward
    "sentence_transformers.CachedMultipleNegativesRankingLoss",  # runs an encoder and a backward, as do the next two
    "sentence_transformers.CachedMultipleNegativesSymmetricRankingLoss",
    "gist.CachedGISTEmbedLoss",
    *("simclr.ContrastiveLoss", "torchmultimodal.ContrastiveLossOutput"),
    *("torchmultimodal.BackpropType", "torchmultimodal.DEFAULT_LOGIT_SCALE"),
}


def public_names() -> set[str]:
    modules = {name: getattr(fx.compat, name) for name in fx.compat.__all__}
    return set(fx.__all__) | {f"{name}.{public}" for name, module in modules.items() for public in module.__all__}


def outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if isinstance(x, Tensor)]


def gradients(result: Any, inputs: tuple[Any, ...]) -> list[Tensor | None]:
    """Return the gradients of a weighted sum of all outputs, one for each input that requires a gradient; [] if no
    output requires one."""
    differentiable = [x for x in outputs(result) if x.requires_grad]
    if not differentiable:
        return []
    total = sum((x.double() * torch.linspace(0.5, 1.5, x.numel()).view(x.shape)).sum() for x in differentiable)
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    return list(torch.autograd.grad(total, wanted, allow_unused=True))


def assert_same(result: Any, expected: Any, inputs: tuple[Any, ...]) -> None:
    """Compare values, and gradients if the expected outputs have any."""
    torch.testing.assert_close(outputs(result), outputs(expected))
    if any(x.requires_grad for x in outputs(expected)):
        torch.testing.assert_close(gradients(result, inputs), gradients(expected, inputs))
