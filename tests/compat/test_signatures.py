"""Names, order and defaults of the drop-ins' parameters, compared with the libraries if they are installed."""

import inspect
import math
from enum import Enum

import pytest

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
from tests import peers

MNRL = "MultipleNegativesRankingLoss"
SIGNATURES = [
    (lightly, "NTXentLoss", "temperature=0.5, memory_bank_size=0, gather_distributed=False"),
    (lightly, "NTXentLoss.forward", "self, out0, out1"),
    (lightly, "MemoryBankModule.forward", "self, output, labels=None, update=False"),
    (lightly, "DCLLoss", "temperature=0.1, weight_fn=None, gather_distributed=False"),
    (lightly, "DCLLoss.forward", "self, out0, out1"),
    (lightly, "DCLWLoss", "temperature=0.1, sigma=0.5, gather_distributed=False"),
    (lightly, "negative_mises_fisher_weights", "out0, out1, sigma=0.5"),
    (pytorch_metric_learning, "NTXentLoss", "temperature=0.07, **kwargs"),
    (pytorch_metric_learning, "SupConLoss", "temperature=0.1, **kwargs"),
    (
        pytorch_metric_learning,
        "NTXentLoss.forward",
        "self, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None",
    ),
    (pytorch_metric_learning, "SelfSupervisedLoss", "loss, symmetric=True"),
    (pytorch_metric_learning, "SelfSupervisedLoss.forward", "self, embeddings, ref_emb"),
    (pytorch_metric_learning, "CrossBatchMemory", "loss, embedding_size, memory_size=1024, miner=None, **kwargs"),
    (
        pytorch_metric_learning,
        "CrossBatchMemory.forward",
        "self, embeddings, labels, indices_tuple=None, enqueue_mask=None",
    ),
    (pytorch_metric_learning, "DistributedLossWrapper", "loss, efficient=False"),
    (
        pytorch_metric_learning,
        "DistributedLossWrapper.forward",
        "self, embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None, enqueue_mask=None",
    ),
    (info_nce, "InfoNCE", "temperature=0.1, reduction='mean', negative_mode='unpaired'"),
    (info_nce, "InfoNCE.forward", "self, query, positive_key, negative_keys=None"),
    (
        info_nce,
        "info_nce",
        "query, positive_key, negative_keys=None, temperature=0.1, reduction='mean', negative_mode='unpaired'",
    ),
    (
        open_clip,
        "ClipLoss",
        "local_loss=False, gather_with_grad=False, cache_labels=False, rank=0, world_size=1, use_horovod=False",
    ),
    (
        open_clip,
        "ClipLoss.forward",
        "self, image_features, text_features, logit_scale, logit_bias=None, output_dict=False",
    ),
    (
        open_clip,
        "DistillClipLoss.forward",
        "self, image_features, text_features, logit_scale, dist_image_features, dist_text_features, dist_logit_scale, "
        "output_dict=False",
    ),
    (
        open_clip,
        "CoCaLoss",
        "caption_loss_weight, clip_loss_weight, pad_id=0, local_loss=False, gather_with_grad=False, "
        "cache_labels=False, rank=0, world_size=1, use_horovod=False",
    ),
    (
        open_clip,
        "CoCaLoss.forward",
        "self, image_features, text_features, logits, labels, logit_scale, output_dict=False",
    ),
    (
        gist,
        "GISTEmbedLoss",
        "model, guide, temperature=0.01, margin_strategy='absolute', margin=0.0, contrast_anchors=True, "
        "contrast_positives=True, gather_across_devices=False",
    ),
    (
        gist,
        "CachedGISTEmbedLoss",
        "model, guide, temperature=0.01, mini_batch_size=32, mini_batch_num_tokens=None, show_progress_bar=False, "
        "margin_strategy='absolute', margin=0.0, contrast_anchors=True, contrast_positives=True, "
        "gather_across_devices=False",
    ),
    (
        sentence_transformers,
        MNRL,
        "model, scale=20.0, similarity_fct=cos_sim, gather_across_devices=False, directions=('query_to_doc',), "
        "partition_mode='joint', hardness_mode=None, hardness_strength=0.0",
    ),
    (solo_learn, "simclr_loss_func", "z, indexes, temperature=0.1"),
    (solo_learn, "ressl_loss_func", "q, k, queue, temperature_q=0.1, temperature_k=0.04"),
    (sup_contrast, "SupConLoss", "temperature=0.07, contrast_mode='all', base_temperature=0.07"),
    (sup_contrast, "SupConLoss.forward", "self, features, labels=None, mask=None"),
    (
        simclr,
        "add_contrastive_loss",
        "hidden, hidden_norm=True, temperature=1.0, tpu_context=None, weights=1.0, strategy=None",
    ),
    (
        torchmultimodal,
        "ContrastiveLossWithTemperature",
        f"logit_scale={math.log(1 / 0.07)}, logit_scale_min=0.0, logit_scale_max={math.log(100)}",
    ),
    (
        torchmultimodal,
        "ContrastiveLossWithTemperature.forward",
        "self, embeddings_a, embeddings_b, backprop_type=BackpropType.GLOBAL, cross_entropy_kwargs=None, mask=None",
    ),
]
INSTALLED = {
    lightly: lambda name: peers.lightly("ntx_ent_loss" if name.startswith(("NTXent", "Memory")) else "dcl_loss"),
    pytorch_metric_learning: lambda name: peers.needs(
        f"pytorch_metric_learning.{'utils.distributed' if name.startswith('Distributed') else 'losses'}"
    ),
    info_nce: lambda name: peers.needs("info_nce"),
    open_clip: lambda name: peers.open_clip(),
    gist: lambda name: peers.sentence_transformers().sentence_transformer.losses,
    sentence_transformers: lambda name: peers.sentence_transformers().sentence_transformer.losses,
}


# Keyword arguments that only our calls have.
OURS_ALONE = {"ids"}


def parameters(module, name):
    found = module
    for part in name.split("."):
        found = getattr(found, part)
    shared = [
        parameter
        for parameter in inspect.signature(found).parameters.values()
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or parameter.name not in OURS_ALONE
    ]
    return ", ".join(map(shown, shared))


def shown(parameter):
    default = parameter.default
    if default is inspect.Parameter.empty:
        return f"{'**' if parameter.kind is inspect.Parameter.VAR_KEYWORD else ''}{parameter.name}"
    if callable(default):
        default = default.__name__
    elif not isinstance(default, Enum):
        default = repr(default)
    return f"{parameter.name}={default}"


@pytest.mark.parametrize(("module", "name", "signature"), SIGNATURES)
def test_our_signature_equals_the_recorded_one(module, name, signature):
    assert parameters(module, name) == signature


@pytest.mark.parametrize(("module", "name", "signature"), [row for row in SIGNATURES if row[0] in INSTALLED])
def test_installed_library_has_the_recorded_signature(module, name, signature):
    theirs = parameters(INSTALLED[module](name), name)
    if module is open_clip and "horovod" not in theirs:  # open_clip 4 dropped its last argument
        signature = signature.removesuffix(", use_horovod=False")
    assert theirs.removesuffix(", **kwargs") == signature.removesuffix(", **kwargs")


@pytest.mark.parametrize(
    "call",
    [
        open_clip.ClipLoss.forward,
        open_clip.SigLipLoss.forward,
        sentence_transformers.MultipleNegativesRankingLoss.forward,
        sentence_transformers.CachedMultipleNegativesRankingLoss.forward,
    ],
)
def test_ids_comes_last_as_a_keyword_argument(call):
    last = list(inspect.signature(call).parameters.values())[-1]
    assert (last.name, last.kind, last.default) == ("ids", inspect.Parameter.KEYWORD_ONLY, None)
