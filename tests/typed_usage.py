"""User code for the type checkers only: `test_typing.py` checks it, and nothing runs it.

The checkers report an unused `type: ignore`. So every line with a `type: ignore` must have a type error, and no other
line may have one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from typing_extensions import assert_type

import fastntxent
from fastntxent.compat import (
    info_nce,
    lightly,
    open_clip,
    pytorch_metric_learning,
    sentence_transformers,
    sup_contrast,
    torchmultimodal,
)

z = torch.randn(8, 4)
ids = torch.arange(8)

# A module is called with the arguments of its forward, and returns a tensor.
assert_type(fastntxent.NTXentLoss(0.1, label_smoothing=0.1)(z, z, ids=ids), Tensor)
assert_type(fastntxent.MultiViewNTXentLoss()([z, z, z]), Tensor)
assert_type(fastntxent.DCLLoss(backend="cpu")(z, z), Tensor)
assert_type(fastntxent.DCLWLoss(sigma=0.5)(z, z), Tensor)
assert_type(fastntxent.DebiasedLoss(tau_plus=0.1)(z, z), Tensor)
assert_type(fastntxent.HardNegativeLoss(beta=1)(z, z), Tensor)
assert_type(fastntxent.RINCELoss()(z, z), Tensor)
assert_type(fastntxent.MACLLoss()(z, z), Tensor)
assert_type(fastntxent.SupConLoss(form="pairs", reduction="none")(z, ids), Tensor)
assert_type(fastntxent.InfoNCELoss(hardness_mode="hard_negatives")(z, z, negatives=z), Tensor)
assert_type(fastntxent.CLIPLoss(torch.tensor(0.1))(z, z), Tensor)
assert_type(fastntxent.QueueInfoNCELoss(16, 4)(z, z, ids), Tensor)
assert_type(fastntxent.DistillLoss()(z, z, z, z), Tensor)
assert_type(fastntxent.DistillLoss()(z, z, teacher=lambda rows, cols: z[rows] @ z[cols].T), Tensor)
fastntxent.NTXentLoss()(z)  # type: ignore
fastntxent.NTXentLoss()(z, z, labels=ids)  # type: ignore
fastntxent.QueueInfoNCELoss(16, 4)(z, z, "ids")  # type: ignore
fastntxent.DistillLoss()(z, z, teacher=z)  # type: ignore

# Calls of drop-ins are typed in the same way.
assert_type(lightly.NTXentLoss(torch.tensor(0.1))(z, z), Tensor)
assert_type(lightly.MemoryBankModule((16, 4))(z, update=True), "tuple[Tensor, Tensor | None]")
assert_type(fastntxent.compat.lightly.DCLLoss()(z, z), Tensor)
assert_type(sup_contrast.SupConLoss(contrast_mode="one")(z[:, None], labels=ids), Tensor)
assert_type(info_nce.InfoNCE(negative_mode="paired")(z, z, z[:, None]), Tensor)
assert_type(open_clip.ClipLoss()(z, z, 1.0), "Tensor | dict[str, Tensor]")
assert_type(pytorch_metric_learning.NTXentLoss()(z, ids), Tensor)
assert_type(sentence_transformers.MultipleNegativesRankingLoss(None, directions=("query_to_doc",))([z, z]), Tensor)
assert_type(torchmultimodal.ContrastiveLossWithTemperature()(z, z), Tensor)
sup_contrast.SupConLoss(contrast_mode="two")  # type: ignore
info_nce.info_nce(z, z, negative_mode="own")  # type: ignore
sentence_transformers.MultipleNegativesRankingLoss(None, directions=("doc",))  # type: ignore
sentence_transformers.MultipleNegativesRankingLoss(None, partition_mode="both")  # type: ignore
open_clip.ClipLoss()(z, z)  # type: ignore
nothing = fastntxent.compat.nothing  # type: ignore

# Functions. An option that is chosen by name accepts only the names in fastntxent/options.py.
assert_type(fastntxent.nt_xent(z, z, 1, backend="reference"), Tensor)
assert_type(fastntxent.retrieve(z, z, 3).indices, Tensor)
assert_type(fastntxent.split_views(z, "interleaved"), "tuple[Tensor, Tensor]")
fastntxent.nt_xent(z, z, reduction="max")  # type: ignore
fastntxent.nt_xent(z, z, backend="fast")  # type: ignore
fastntxent.nt_xent(z, z, "0.1")  # type: ignore
fastntxent.NTXentLoss(reduction="max")  # type: ignore
fastntxent.NTXentLoss(backend="fast")  # type: ignore
fastntxent.NTXentLoss(normalise=False)  # type: ignore
fastntxent.CLIPLoss(learn_temperature="no")  # type: ignore
fastntxent.CLIPLoss(learn_temperature=False, normalize=False)
fastntxent.SupConLoss(form="sum")  # type: ignore
fastntxent.sup_con(z, ids, form="sum")  # type: ignore
fastntxent.info_nce(z, z, hardness_mode="all")  # type: ignore
fastntxent.InfoNCELoss(hardness_mode="all")  # type: ignore
fastntxent.split_views(z, "pairs")  # type: ignore
fastntxent.uniformity(z, backend="fast")  # type: ignore
fastntxent.neg_lse(z, ids, 0.1, backend="fast")  # type: ignore
fastntxent.retrieve(z, z, "3")  # type: ignore
mesh = init_device_mesh("cpu", (2,))
fastntxent.nt_xent(z, z, group=fastntxent.Sharding(mesh, strategy="ring"))
fastntxent.Sharding(mesh, strategy="star")  # type: ignore
