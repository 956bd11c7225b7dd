"""sentence-transformers' `losses.MultipleNegativesRankingLoss`, its cached forms, and the similarity functions for
them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ..algebra import log_add, row_dots, row_losses, unit_rows
from ..batch import Batch
from ..chunked_view import ChunkedView
from ..losses.info_nce_loss import hardened, hardened_neg_lse
from ..modules.base import TypedModule
from ..opening import open_batch
from ..options import HARDNESS_MODES, HardnessMode
from ..sides import Side
from ..validation import check_choice, check_parameter, check_temperature
from .cached import (
    NO_MODEL,
    check_has_batches,
    check_mini_batches,
    embedded,
    loss_and_gradients,
    loss_of_two_passes,
    mini_batched,
    with_progress,
)
from .gist import CachedGISTEmbedLoss as CachedGISTEmbedLoss
from .gist import GISTEmbedLoss as GISTEmbedLoss
from .shared import as_columns, default_group

__all__ = [
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "MultipleNegativesRankingLoss",
    "cos_sim",
    "dot_score",
]

Direction: TypeAlias = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"]
PartitionMode: TypeAlias = Literal["joint", "per_direction"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
PARTITION_MODES: tuple[str, ...] = get_args(PartitionMode)

logger = logging.getLogger(__name__)


def cos_sim(a: Tensor, b: Tensor) -> Tensor:
    """Return cosine similarities (M, K). As an argument of a loss it only selects cosines; the loss forms no matrix.

    Args:
        a: (M, D) rows.
        b: (K, D) rows.

    Returns:
        A tensor (M, K), the cosine of each row of a with each row of b.

    Example:
        >>> import torch
        >>> cos_sim(torch.tensor([[2.0, 0.0]]), torch.eye(2))
        tensor([[1., 0.]])
    """
    return unit_rows(a) @ unit_rows(b).T


def dot_score(a: Tensor, b: Tensor) -> Tensor:
    """Return inner products (M, K). As an argument of a loss it only selects inner products; the loss forms no matrix.

    Args:
        a: (M, D) rows.
        b: (K, D) rows.

    Returns:
        A tensor (M, K), the inner product of each row of a with each row of b.

    Example:
        >>> import torch
        >>> dot_score(torch.tensor([[2.0, 0.0]]), torch.eye(2))
        tensor([[2., 0.]])
    """
    return a @ b.T


_NORMALIZES = {"cos_sim": True, "dot_score": False}
_OF_MODELS = {"cosine": "cos_sim", "dot": "dot_score"}  # a model's similarity_fn_name


def _similarity_name(similarity_fct: object) -> object:
    """Return the name of a similarity function. For a model's method `similarity`, return the name that the model's
    settings select."""
    name = getattr(similarity_fct, "__name__", similarity_fct)
    of_model = getattr(getattr(similarity_fct, "__self__", None), "similarity_fn_name", None)
    return name if name != "similarity" or of_model is None else _OF_MODELS.get(of_model, of_model)


def _checked_directions(directions: Any) -> tuple[Direction, ...]:
    if isinstance(directions, str) or not isinstance(directions, Iterable):
        raise TypeError(f"directions must be a tuple of names, got {directions!r}")
    directions = tuple(directions)
    for direction in directions:
        check_choice("directions", direction, DIRECTIONS)
    return directions


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
_GRAD_CACHE = """
@misc{gao2021scaling,
    title={Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author={Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan},
    year={2021},
    eprint={2101.06983},
    archivePrefix={arXiv},
    primaryClass={cs.LG}
}
"""


class MultipleNegativesRankingLoss(TypedModule):
    """InfoNCE of anchors against all positives and hard negatives of the batch, and its variants.

    `compute_loss_from_embeddings` is the loss without the model. Memory is O(C N D) for C columns.

    Args:
        model: Maps a dict of features to a dict with "sentence_embedding". None if the loss is called with embeddings.
        scale: 1 / temperature, positive.
        similarity_fct: `cos_sim` or `dot_score`, from this module or from the library; recognised by its name.
        gather_across_devices: Use the batch of all ranks of the default process group. The loss is the mean over all
            ranks' anchors, the same on every rank (the library's is over the rank's anchors). The gradient is the
            library's.
        directions: The similarities in the softmax: "query_to_doc" (required), "query_to_query", "doc_to_query" and
            "doc_to_doc".
        partition_mode: "joint" for one softmax over all directions, or "per_direction" for one softmax per direction,
            whose losses are averaged ("query_to_doc" and "doc_to_query" only).
        hardness_mode: Which logits of a query get extra weight: "in_batch_negatives" (documents of other queries),
            "hard_negatives" (the query's hard negatives), "all_negatives", or None.
        hardness_strength: This multiple of the similarity, without a gradient, is added to the logits that
            hardness_mode selects.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a number is out of range, an option is unknown, or, when called, the model is missing or the columns
            do not match.

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
        scale = check_temperature(scale, name="scale")
        check_choice("similarity_fct", _similarity_name(similarity_fct), tuple(_NORMALIZES))
        directions = _checked_directions(directions)
        if "query_to_doc" not in directions:
            raise ValueError(f"directions must include 'query_to_doc', which has the positive pair, got {directions}")
        check_choice("partition_mode", partition_mode, PARTITION_MODES)
        if partition_mode == "per_direction" and {"query_to_query", "doc_to_doc"} & set(directions):
            raise ValueError(
                "partition_mode must be 'joint' with 'query_to_query' or 'doc_to_doc', which have no positive pair"
            )
        if hardness_mode is not None:
            check_choice("hardness_mode", hardness_mode, HARDNESS_MODES)
        hardness_strength = check_parameter("hardness_strength", hardness_strength)
        if hardness_mode is not None and hardness_strength == 0:
            logger.warning("hardness_mode=%r has no effect with a hardness_strength of 0", hardness_mode)
        self.model = model
        self.scale = scale
        self.similarity_fct = similarity_fct
        self.gather_across_devices = gather_across_devices
        self.directions = directions
        self.partition_mode = partition_mode
        self.hardness_mode = hardness_mode
        self.hardness_strength = hardness_strength

    def forward(
        self, sentence_features: Iterable[Any], labels: Tensor | None = None, *, ids: Tensor | None = None
    ) -> Tensor:
        """Return the loss, a 0-d tensor.

        Args:
            sentence_features: One element per column (anchor, positive, negatives...), either a dict of features or an
                embedding (N, D).
            labels: Unused, as in the library.
            ids: (N,) integers, an extension of this package: samples with the same id are not negatives of each other,
                in any column. A sample's own hard negatives still count.
        """
        embeddings = [self._embedding_of(column) for column in as_columns("sentence_features", sentence_features)]
        return self.compute_loss_from_embeddings(embeddings, labels, ids=ids)

    def _embedding_of(self, column: Any) -> Tensor:
        if isinstance(column, Tensor):
            return column
        if self.model is None:
            raise ValueError(NO_MODEL)
        return self.model(column)["sentence_embedding"]

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], labels: Tensor | None = None, *, ids: Tensor | None = None
    ) -> Tensor:
        """Return the loss of embeddings, a 0-d tensor.

        Args:
            embeddings: Anchors, positives, negatives..., (N, D) each.
            labels: Unused, as in the library.
            ids: (N,) integers, with the meaning of the loss's `ids`.
        """
        group = default_group() if self.gather_across_devices else None
        embeddings = as_columns("embeddings", embeddings)
        if len(embeddings) < 2:
            raise ValueError(f"embeddings must hold at least anchors and positives, got {len(embeddings)} tensors")
        normalize = _NORMALIZES[str(_similarity_name(self.similarity_fct))]
        columns = {f"embeddings[{index}]": column for index, column in enumerate(embeddings)}
        config = MultipleNegativesRankingLoss.get_config_dict(self)
        batch = open_batch(group, type(self).__name__, columns, ids=ids, normalize=normalize, **config)
        inv_tau = batch.logit_scale(self.scale, "scale")
        if ids is None and (loss := self._at_once(batch, embeddings, inv_tau)) is not None:
            return loss
        groups = batch.sample_ids() if ids is None else ids
        u, v, *negatives = map(batch.unit_rows, embeddings)
        pos = inv_tau * row_dots(u, v)
        directions = self._nu_by_direction(batch, u, v, negatives, groups, inv_tau)
        if self.partition_mode == "per_direction":
            losses = torch.stack([row_losses(nu, pos) for nu in directions.values()]).mean(dim=0)
            return batch.reduce(losses)
        joint = torch.full_like(pos, -torch.inf)
        for nu in directions.values():
            joint = log_add(joint, nu)
        losses = row_losses(joint, pos)
        if "doc_to_query" in directions:  # this softmax counts the positive twice: log(2 e^pi + e^nu) - pi
            log_2 = torch.full_like(pos, 2).log()
            losses = log_2 + row_losses(joint - log_2, pos)
        return batch.reduce(losses)

    def _at_once(self, batch: Batch, embeddings: list[Tensor], inv_tau: float | Tensor) -> Tensor | None:
        """Return the loss in one call if it is plain InfoNCE, in one direction or the mean of both; otherwise None."""
        symmetric = set(self.directions) == {"query_to_doc", "doc_to_query"} and self.partition_mode == "per_direction"
        if len(embeddings) > 2 or self.hardness_mode is not None or not (symmetric or len(set(self.directions)) == 1):
            return None
        anchors, positives = embeddings
        return batch.info_nce_at_once(anchors, positives, inv_tau, both=symmetric)

    def _nu_by_direction(
        self, batch: Batch, u: Tensor, v: Tensor, negatives: list[Tensor], groups: Tensor, inv_tau: float | Tensor
    ) -> dict[str, Tensor]:
        """Return, for each direction, the log-sum-exp (N,) over the rows of other groups, and in "query_to_doc" also
        over the sample's own hard negatives."""
        queries, keys = Side(u, groups), Side(v, groups)
        docs = Side(torch.cat((v, *negatives)), groups.repeat(1 + len(negatives)))
        of_docs = batch.beside(docs.u)
        others_hardness = self._hardness("in_batch_negatives")
        nu: dict[str, Tensor] = {}
        to_query = None
        if others_hardness or "doc_to_query" not in self.directions:
            to_doc = hardened_neg_lse(batch, queries, docs, inv_tau, others_hardness, beside=of_docs)
        else:  # one pass over the similarities gives both directions
            to_doc, to_query = batch.cross_neg_lse(queries, docs, inv_tau, beside=of_docs)
        for own in negatives:
            to_doc = log_add(to_doc, hardened(row_dots(u, own), inv_tau, self._hardness("hard_negatives")))
        nu["query_to_doc"] = to_doc
        if "query_to_query" in self.directions:
            nu["query_to_query"] = batch.neg_lse(u, groups, inv_tau)
        if "doc_to_query" in self.directions:
            if to_query is None:
                to_query = batch.neg_lse_to(keys, queries, inv_tau)
            nu["doc_to_query"] = to_query[: u.shape[0]]
        if "doc_to_doc" in self.directions:
            nu["doc_to_doc"] = batch.neg_lse_to(keys, docs, inv_tau, beside=of_docs)
        return nu

    def _hardness(self, mode: str) -> float:
        return self.hardness_strength if self.hardness_mode in (mode, "all_negatives") else 0.0

    def get_config_dict(self) -> dict[str, Any]:
        """Return the arguments, as the library's trainer records them."""
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
        """BibTeX of the loss's paper, for the library's model card."""
        directions = set(self.directions)
        if directions == set(DIRECTIONS) and self.partition_mode == "joint":
            return _GTE
        if directions == {"query_to_doc", "doc_to_query"} and self.partition_mode == "per_direction":
            return _JINA
        return _CPC


class CachedMultipleNegativesRankingLoss(MultipleNegativesRankingLoss):
    """MultipleNegativesRankingLoss for batches whose activations do not fit in memory: the model sees mini-batches.

    The call embeds all columns without a graph. The backward embeds them again, one mini-batch at a time, from the same
    state and with the same random numbers (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory
    Limited Setup", 2021; `fastntxent.cached_backward` says what is repeated). With gradients disabled nothing runs
    twice. Under DistributedDataParallel gradients are synchronised once, in the last mini-batch.

    Args:
        model: Maps a dict of features to a dict with "sentence_embedding". None if the loss is called with embeddings.
        scale: 1 / temperature, positive.
        similarity_fct: `cos_sim` or `dot_score`, from this module or from the library; recognised by its name.
        mini_batch_size: The number of rows of a column that the model sees at a time.
        mini_batch_num_tokens: The largest number of tokens that the model sees at a time, counted in the features'
            attention_mask. If given, it is used instead of mini_batch_size. A longer row is a mini-batch by itself.
            Under `fully_shard` use mini_batch_size, because every rank must have the same number of mini-batches. With
            either argument, padding beyond the longest text of a mini-batch is cut off.
        gather_across_devices: Use the batch of all ranks of the default process group. The loss is the mean over all
            ranks' anchors, the same on every rank (the library's is over the rank's anchors). The gradient is the
            library's.
        directions: The similarities in the softmax: "query_to_doc" (required), "query_to_query", "doc_to_query" and
            "doc_to_doc".
        partition_mode: "joint" for one softmax over all directions, or "per_direction" for one softmax per direction,
            whose losses are averaged ("query_to_doc" and "doc_to_query" only).
        show_progress_bar: Show the mini-batches of both passes with tqdm.
        hardness_mode: Which logits of a query get extra weight: "in_batch_negatives" (documents of other queries),
            "hard_negatives" (the query's hard negatives), "all_negatives", or None.
        hardness_strength: This multiple of the similarity, without a gradient, is added to the logits that
            hardness_mode selects.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a number is out of range, an option is unknown, or, when called, the model is missing or the columns
            do not match.

    Memory holds the activations of one mini-batch, the embeddings and their gradients, and a copy of the model's
    buffers.

    Example:
        >>> import torch
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.words = torch.nn.EmbeddingBag(9, 4)
        ...     def forward(self, features):
        ...         return {"sentence_embedding": self.words(features["input_ids"])}
        >>> model = Model()
        >>> loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
        >>> loss([{"input_ids": torch.randint(9, (6, 3))} for _ in range(2)]).backward()
        >>> model.words.weight.grad.shape
        torch.Size([9, 4])
    """

    uses_gradient_cache = True  # tells the library's MatryoshkaLoss to decorate calculate_loss

    def __init__(
        self,
        model: nn.Module | None,
        scale: float | Tensor = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        directions: tuple[Direction, ...] = ("query_to_doc",),
        partition_mode: PartitionMode = "joint",
        show_progress_bar: bool = False,
        hardness_mode: HardnessMode | None = None,
        hardness_strength: float = 0.0,
    ):
        super().__init__(
            model,
            scale=scale,
            similarity_fct=similarity_fct,
            gather_across_devices=gather_across_devices,
            directions=directions,
            partition_mode=partition_mode,
            hardness_mode=hardness_mode,
            hardness_strength=hardness_strength,
        )
        check_has_batches(model, "MultipleNegativesRankingLoss")
        self.mini_batch_size, self.mini_batch_num_tokens = check_mini_batches(mini_batch_size, mini_batch_num_tokens)
        self.show_progress_bar = show_progress_bar

    def forward(
        self, sentence_features: Iterable[Any], labels: Tensor | None = None, *, ids: Tensor | None = None
    ) -> Tensor:
        """Return the loss, a 0-d tensor whose backward runs the model again.

        Args:
            sentence_features: One element per column (anchor, positive, negatives...), either dicts of features or
                embeddings (N, D). The first dimension of all tensors in the features is the batch.
            labels: Unused, as in the library.
            ids: (N,) integers, an extension of this package: samples with the same id are not negatives of each other,
                in any column. A sample's own hard negatives still count.
        """
        columns = as_columns("sentence_features", sentence_features)
        if any(isinstance(column, Tensor) for column in columns):
            return super().forward(columns, labels, ids=ids)
        if not torch.is_grad_enabled():
            embeddings = embedded(self._views(columns, passes=1))
            return self.calculate_loss([[column] for column in embeddings], labels, ids=ids)
        return loss_of_two_passes(
            self._views(columns, passes=2),
            lambda leaves: self.calculate_loss([[leaf] for leaf in leaves], labels, with_backward=True, ids=ids),
        )

    def _views(self, columns: Sequence[Any], passes: int) -> list[ChunkedView]:
        if self.model is None:
            raise ValueError(NO_MODEL)
        views = mini_batched(self.model, columns, size=self.mini_batch_size, num_tokens=self.mini_batch_num_tokens)
        return with_progress(views, passes) if self.show_progress_bar else views

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        labels: Tensor | None = None,
        *,
        with_backward: bool = False,
        ids: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of embeddings, a 0-d tensor.

        Args:
            reps: The embeddings, for each column a list of mini-batches.
            labels: Unused, as in the library.
            with_backward: Also set the gradients of the embeddings. The returned loss then has a gradient only with
                respect to a learnt scale.
            ids: (N,) integers, with the meaning of the loss's `ids`.
        """
        embeddings = [torch.cat(column) for column in as_columns("reps", reps)]
        loss = self.compute_loss_from_embeddings(embeddings, labels, ids=ids)
        if not with_backward:
            return loss
        return loss_and_gradients(loss, [part for column in reps for part in column], self.scale)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the arguments, as the library's trainer records them."""
        return {
            **super().get_config_dict(),
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the method's paper, for the library's model card."""
        return _GRAD_CACHE


class CachedMultipleNegativesSymmetricRankingLoss(CachedMultipleNegativesRankingLoss):
    """CachedMultipleNegativesRankingLoss in the directions "query_to_doc" and "doc_to_query", one softmax for each.

    Args:
        model: Maps a dict of features to a dict with "sentence_embedding". None if the loss is called with embeddings.
        scale: 1 / temperature, positive.
        similarity_fct: `cos_sim` or `dot_score`, from this module or from the library; recognised by its name.
        mini_batch_size: The number of rows of a column that the model sees at a time.
        mini_batch_num_tokens: The largest number of tokens that the model sees at a time, counted in the features'
            attention_mask. If given, it is used instead of mini_batch_size. A longer row is a mini-batch by itself.
            Under `fully_shard` use mini_batch_size, because every rank must have the same number of mini-batches. With
            either argument, padding beyond the longest text of a mini-batch is cut off.
        gather_across_devices: Use the batch of all ranks of the default process group. The loss is the mean over all
            ranks' anchors, the same on every rank (the library's is over the rank's anchors). The gradient is the
            library's.
        show_progress_bar: Show the mini-batches of both passes with tqdm.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a number is out of range, an option is unknown, or, when called, the model is missing or the columns
            do not match.

    Example:
        >>> import torch
        >>> loss = CachedMultipleNegativesSymmetricRankingLoss(None, scale=1.0)
        >>> loss([torch.eye(4), torch.eye(4)])  # log(e + 3) - 1
        tensor(0.7437)
    """

    def __init__(
        self,
        model: nn.Module | None,
        scale: float | Tensor = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
    ):
        super().__init__(
            model,
            scale=scale,
            similarity_fct=similarity_fct,
            mini_batch_size=mini_batch_size,
            mini_batch_num_tokens=mini_batch_num_tokens,
            gather_across_devices=gather_across_devices,
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
            show_progress_bar=show_progress_bar,
        )
