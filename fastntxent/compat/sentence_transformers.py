"""sentence-transformers' `losses.MultipleNegativesRankingLoss`, and the similarities it knows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ..backends.base import row_dots, row_losses
from ..common import (
    cross_neg_lse,
    inverse_temperature,
    log_add,
    neg_lse_of_columns,
    neg_lse_of_rows,
    reduce,
    sample_ids,
    unit_rows,
)
from ..distributed import Shard, open_shard
from ..losses.queries import hardened, hardened_neg_lse
from ..modules.base import TypedModule
from ..options import HARDNESS_MODES, HardnessMode
from ..validation import check_choice, check_in_range, check_number, check_positive, check_rows, check_same
from .shared import default_group

__all__ = ["MultipleNegativesRankingLoss", "cos_sim", "dot_score"]

Direction: TypeAlias = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
PartitionMode: TypeAlias = Literal["joint", "per_direction"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
PARTITION_MODES: tuple[str, ...] = get_args(PartitionMode)

logger = logging.getLogger(__name__)


def cos_sim(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarities (M, K). The loss takes it as a name and forms no such matrix.

    Example:
        >>> import torch
        >>> cos_sim(torch.tensor([[2.0, 0.0]]), torch.eye(2))
        tensor([[1., 0.]])
    """
    return unit_rows(a) @ unit_rows(b).T


def dot_score(a: Tensor, b: Tensor) -> Tensor:
    """Inner products (M, K). The loss takes it as a name and forms no such matrix.

    Example:
        >>> import torch
        >>> dot_score(torch.tensor([[2.0, 0.0]]), torch.eye(2))
        tensor([[2., 0.]])
    """
    return a @ b.T


_NORMALIZES = {"cos_sim": True, "dot_score": False}
_OF_MODELS = {"cosine": "cos_sim", "dot": "dot_score"}  # a model's similarity_fn_name


def _similarity_name(similarity_fct: object) -> object:
    """Its name, or that of the function which a model's method `similarity` stands for."""
    name = getattr(similarity_fct, "__name__", similarity_fct)
    of_model = getattr(getattr(similarity_fct, "__self__", None), "similarity_fn_name", None)
    return name if name != "similarity" or of_model is None else _OF_MODELS.get(of_model, of_model)


_GTE = """
@misc{li2023generaltextembeddingsmultistage,
      title={Towards General Text Embeddings with Multi-stage Contrastive Learning},
      author={Zehan Li and Xin Zhang and Yanzhao Zhang and Dingkun Long and Pengjun Xie and Meishan Zhang},
      year={2023},
      eprint={2308.03281},
      archivePrefix={arXiv},
      primaryClass={cs.CL},
      url={https://arxiv.org/abs/2308.03281},
}
"""
_JINA = """
@misc{günther2024jinaembeddings28192token,
      title={Jina Embeddings 2: 8192-Token General-Purpose Text Embeddings for Long Documents},
      author={Michael Günther and Jackmin Ong and Isabelle Mohr and Alaeddine Abdessalem and Tanguy Abel and \
Mohammad Kalim Akram and Susana Guzman and Georgios Mastrapas and Saba Sturua and Bo Wang and Maximilian Werk and \
Nan Wang and Han Xiao},
      year={2024},
      eprint={2310.19923},
      archivePrefix={arXiv},
      primaryClass={cs.CL},
      url={https://arxiv.org/abs/2310.19923},
}
"""
_CPC = """
@misc{oord2019representationlearningcontrastivepredictive,
      title={Representation Learning with Contrastive Predictive Coding},
      author={Aaron van den Oord and Yazhe Li and Oriol Vinyals},
      year={2019},
      eprint={1807.03748},
      archivePrefix={arXiv},
      primaryClass={cs.LG},
      url={https://arxiv.org/abs/1807.03748},
}
"""


class MultipleNegativesRankingLoss(TypedModule):
    """InfoNCE of anchors against all positives and hard negatives of the batch, and its variants.

    Args:
        model: turns a dict of features into a dict with "sentence_embedding"; None where calls bring embeddings.
        scale: 1 / temperature, positive.
        similarity_fct: `cos_sim` or `dot_score`, ours or the library's: known by its name.
        gather_across_devices: whether the batch is that of all ranks of the default process group. The loss is the mean
            over all ranks' anchors, on every rank (theirs over the rank's own), and its gradient the library's.
        directions: what an anchor and its positive are compared with: "query_to_doc" (always there), "query_to_query",
            "doc_to_query", "doc_to_doc".
        partition_mode: "joint", one softmax over all directions, or "per_direction", the mean of one for each
            ("query_to_doc" and "doc_to_query" alone).
        hardness_mode, hardness_strength: strength times the similarity, without a gradient, is added to the logits from
            queries to "in_batch_negatives" (all documents of other queries), to "hard_negatives" (a query's own), or to
            "all_negatives".

    Its call takes the features of anchor, positive, negatives..., a dict each, or their embeddings, (N, D) each, and
    labels, which nothing reads. `compute_loss_from_embeddings` is the loss without the model.

    Memory is O(C N D) for C columns.

    Example:
        >>> import torch
        >>> loss = MultipleNegativesRankingLoss(None, scale=1.0)
        >>> loss([torch.eye(4), torch.eye(4)])  # log(e + 3) - 1
        tensor(0.7437)
    """

    def __init__(
        self,
        model: nn.Module | None,
        scale: float | Tensor = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: PartitionMode = "joint",
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
    ):
        super().__init__()
        if not isinstance(scale, Tensor):
            scale = check_number("scale", scale)
            check_positive("scale", scale)
        check_choice("similarity_fct", _similarity_name(similarity_fct), tuple(_NORMALIZES))
        for direction in directions:
            check_choice("directions", direction, DIRECTIONS)
        if "query_to_doc" not in directions:
            raise ValueError(f"directions must have 'query_to_doc', which has the positive pair, got {directions}")
        check_choice("partition_mode", partition_mode, PARTITION_MODES)
        if partition_mode == "per_direction" and {"query_to_query", "doc_to_doc"} & set(directions):
            raise ValueError(
                "partition_mode must be 'joint' with 'query_to_query' or 'doc_to_doc', which have no positive pair"
            )
        if hardness_mode is not None:
            check_choice("hardness_mode", hardness_mode, HARDNESS_MODES)
        hardness_strength = check_in_range(
            "hardness_strength", hardness_strength, 0, math.inf, with_low=True, with_high=False
        )
        if hardness_mode is not None and hardness_strength == 0:
            logger.warning("hardness_mode=%r has no effect with a hardness_strength of 0", hardness_mode)
        self.model = model
        self.scale = scale
        self.similarity_fct = similarity_fct
        self.gather_across_devices = gather_across_devices
        self.directions = tuple(directions)
        self.partition_mode = partition_mode
        self.hardness_mode = hardness_mode
        self.hardness_strength = hardness_strength

    def forward(self, sentence_features: Iterable[Any], labels: Tensor | None = None) -> Tensor:
        return self.compute_loss_from_embeddings([self._embed(column) for column in sentence_features], labels)

    def _embed(self, column: Any) -> Tensor:
        if isinstance(column, Tensor):
            return column
        if self.model is None:
            raise ValueError("model must be given where a call brings features and not embeddings, got None")
        return self.model(column)["sentence_embedding"]

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of anchors, positives, negatives..., (N, D) each; `labels` are for the library's signature alone."""
        group = default_group() if self.gather_across_devices else None
        if len(embeddings) < 2:
            raise ValueError(f"embeddings must hold anchors and positives at least, got {len(embeddings)} tensors")
        for index, column in enumerate(embeddings):
            check_rows(f"embeddings[{index}]", column, may_be_empty=group is not None)
            check_same("embeddings[0]", embeddings[0], f"embeddings[{index}]", column, "shape", "dtype", "device")
        normalize = _NORMALIZES[str(_similarity_name(self.similarity_fct))]
        shard = open_shard(
            group, type(self).__name__, embeddings[0], "auto",
            **self.get_config_dict(), gradients=[column.requires_grad for column in embeddings],
        )  # fmt: skip
        inv_tau = inverse_temperature(1 / self.scale, embeddings[0], shard=shard)
        u, v, *negatives = (unit_rows(column, normalize) for column in embeddings)
        pos = inv_tau * row_dots(u, v)
        directions = self._directions(u, v, negatives, inv_tau, shard)
        if self.partition_mode == "per_direction":
            losses = torch.stack([row_losses(nu, pos) for nu in directions.values()]).mean(dim=0)
            return reduce(losses, "mean", shard=shard)
        joint = torch.full_like(pos, -torch.inf)
        for nu in directions.values():
            joint = log_add(joint, nu)
        losses = row_losses(joint, pos)
        if "doc_to_query" in directions:  # the softmax has the positive twice: log(2 e^pi + e^nu) - pi
            log_2 = torch.full_like(pos, 2).log()
            losses = log_2 + row_losses(joint - log_2, pos)
        return reduce(losses, "mean", shard=shard)

    def _directions(
        self, u: Tensor, v: Tensor, negatives: list[Tensor], inv_tau: Tensor, shard: Shard | None
    ) -> dict[str, Tensor]:
        """Of each direction the log-sum-exp over what is no positive (N,)."""
        samples = sample_ids(u, shard)
        docs, of_docs = torch.cat((v, *negatives)), samples.repeat(1 + len(negatives))
        docs_shard = open_shard(shard.group, type(self).__name__, docs, "auto") if shard else None
        others_hardness = self._hardness("in_batch_negatives")
        nu: dict[str, Tensor] = {}
        to_query = None
        if others_hardness or "doc_to_query" not in self.directions:
            to_doc = hardened_neg_lse(u, docs, samples, of_docs, inv_tau, others_hardness, "auto", shard, docs_shard)
        else:  # both directions from one pass
            to_doc, to_query = cross_neg_lse(u, docs, samples, of_docs, inv_tau, "auto", shard, docs_shard)
        for own in negatives:
            to_doc = log_add(to_doc, hardened(row_dots(u, own), inv_tau, self._hardness("hard_negatives")))
        nu["query_to_doc"] = to_doc
        if "query_to_query" in self.directions:
            nu["query_to_query"] = neg_lse_of_rows(u, samples, inv_tau, "auto", shard)
        if "doc_to_query" in self.directions:
            if to_query is None:
                to_query = neg_lse_of_columns(v, u, samples, samples, inv_tau, "auto", shard, shard)
            nu["doc_to_query"] = to_query[: u.shape[0]]
        if "doc_to_doc" in self.directions:
            nu["doc_to_doc"] = neg_lse_of_columns(v, docs, samples, of_docs, inv_tau, "auto", shard, docs_shard)
        return nu

    def _hardness(self, mode: str) -> float:
        return self.hardness_strength if self.hardness_mode in (mode, "all_negatives") else 0.0

    def get_config_dict(self) -> dict[str, Any]:
        """The arguments, as the library's trainer records them."""
        return {
            "scale": self.scale,
            "similarity_fct": _similarity_name(self.similarity_fct),
            "gather_across_devices": self.gather_across_devices,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "hardness_mode": self.hardness_mode,
            "hardness_strength": self.hardness_strength,
        }

    @property
    def temperature(self) -> float | Tensor:
        """1 / scale."""
        return 1 / self.scale

    @property
    def citation(self) -> str:
        """BibTeX of the paper whose loss this is, for the library's model card."""
        directions = set(self.directions)
        if directions == set(DIRECTIONS) and self.partition_mode == "joint":
            return _GTE
        if directions == {"query_to_doc", "doc_to_query"} and self.partition_mode == "per_direction":
            return _JINA
        return _CPC
