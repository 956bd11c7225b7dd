"""sentence-transformers' `losses.GISTEmbedLoss`, an InfoNCE without the false negatives that a guide model finds, and
its cached form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..chunked_view import ChunkedView
from ..losses import guided_info_nce
from ..modules.base import TypedModule
from ..options import MARGIN_STRATEGIES, MarginStrategy
from ..validation import (
    check_choice,
    check_features,
    check_parameter,
    check_row_each,
    check_rows,
    check_same,
    check_temperature,
)
from .cached import (
    check_has_batches,
    check_mini_batches,
    embedded,
    loss_and_gradients,
    loss_of_two_passes,
    mini_batched,
    with_progress,
)
from .shared import as_columns, default_group

__all__ = ["CachedGISTEmbedLoss", "GISTEmbedLoss"]

_GIST = """
@misc{solatorio2024gistembed,
    title={GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning},
    author={Aivin V. Solatorio},
    year={2024},
    eprint={2402.16829},
    archivePrefix={arXiv},
    primaryClass={cs.LG}
}
"""


class GISTEmbedLoss(TypedModule):
    """InfoNCE of anchors against the batch's positives, anchors and negatives, without candidates that a guide rejects.

    A guide model decides which candidates are too similar to be negatives; see `fastntxent.guided_info_nce`.
    `compute_loss_from_embeddings` is the loss without the models.

    Args:
        model: Maps a dict of features to a dict with "sentence_embedding". None if the loss is called with embeddings.
        guide: The guide model, called like `model`. If both have a tokenizer, and the guide has a different vocabulary
            or a smaller max_seq_length, "input_ids" are decoded by the model's tokenizer and tokenized again for the
            guide.
        temperature: tau > 0, a float or a 0-d floating-point tensor.
        margin_strategy: How the limit for negatives is computed from g, the guide's similarity of anchor and positive:
            g - margin for "absolute", g - margin abs(g) for "relative".
        margin: The margin. A negative is left out if its similarity in the guide is above the limit.
        contrast_anchors: Use other anchors as negatives.
        contrast_positives: Use other positives as negatives of a positive.
        gather_across_devices: Use the batch of all ranks of the default process group. The loss is the mean over all
            ranks' anchors, the same on every rank, and anchors that are used as negatives come from all ranks. (In the
            library, the mean and these negatives cover only the rank's own anchors.)

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a number is out of range, an option is unknown, or, when called, a model is missing or the columns
            do not match.

    Example:
        >>> import torch
        >>> z, guide = torch.eye(3), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])  # samples 0 and 2 are alike
        >>> loss = GISTEmbedLoss(None, None, temperature=1.0, margin=0.5)
        >>> loss.compute_loss_from_embeddings([z, z], [guide, guide])
        tensor(0.8843)
    """

    _several_negatives = False  # whether a call may have more than one column of negatives

    def __init__(
        self,
        model: nn.Module | None,
        guide: nn.Module | None,
        temperature: float | Tensor = 0.01,
        margin_strategy: MarginStrategy = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        gather_across_devices: bool = False,
    ):
        super().__init__()
        check_choice("margin_strategy", margin_strategy, MARGIN_STRATEGIES)
        self.model = model
        self.guide = guide
        self.temperature = check_temperature(temperature)
        self.margin_strategy = margin_strategy
        self.margin = check_parameter("margin", margin)
        self.contrast_anchors = contrast_anchors
        self.contrast_positives = contrast_positives
        self.gather_across_devices = gather_across_devices
        self.must_retokenize = _reads_otherwise(model, guide)

    def forward(self, sentence_features: Iterable[Mapping[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Return the loss, a 0-d tensor.

        Args:
            sentence_features: The features of anchor, positive and, optionally, negative, one dict each.
            labels: Unused, as in the library.
        """
        model, guide = self._models()
        columns = as_columns("sentence_features", sentence_features)
        # Before the model runs, because the model writes its outputs into the dict.
        for_guide = [self._features_for_guide(column) for column in columns]
        embeddings = [model(column)["sentence_embedding"] for column in columns]
        with torch.no_grad():
            guide_embeddings = [guide(column)["sentence_embedding"] for column in for_guide]
        return self.compute_loss_from_embeddings(embeddings, guide_embeddings)

    def _models(self) -> tuple[nn.Module, nn.Module]:
        if self.model is None or self.guide is None:
            missing = "model" if self.model is None else "guide"
            raise ValueError(f"{missing} must be given to call the loss with features, got None")
        return self.model, self.guide

    def _features_for_guide(self, column: Mapping[str, Any]) -> dict[str, Any]:
        if not self.must_retokenize:
            return dict(column)
        if "input_ids" not in column:
            raise ValueError(
                "sentence_features must have 'input_ids' to decode for a guide that reads text differently, "
                f"got {', '.join(map(repr, column))}"
            )
        model: Any = self.model
        guide: Any = self.guide
        texts = model.tokenizer.batch_decode(column["input_ids"], skip_special_tokens=True)
        features = (guide.preprocess if hasattr(guide, "preprocess") else guide.tokenize)(texts)
        device = getattr(guide, "device", column["input_ids"].device)
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in features.items()}

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], guide_embeddings: Sequence[Tensor]) -> Tensor:
        """Return the loss of embeddings, a 0-d tensor.

        Args:
            embeddings: Anchors, positives and, optionally, negatives, (N, D) each.
            guide_embeddings: The guide's embeddings of the same columns, (N, E) each.
        """
        several, group = self._several_negatives, default_group() if self.gather_across_devices else None
        embeddings = as_columns("embeddings", embeddings)
        guide_embeddings = as_columns("guide_embeddings", guide_embeddings)
        if len(embeddings) < 2 or (len(embeddings) > 3 and not several):
            number = "at least 2" if several else "2 or 3"
            raise ValueError(f"embeddings must have {number} columns, anchors first, got {len(embeddings)}")
        if len(guide_embeddings) != len(embeddings):
            raise ValueError(
                f"guide_embeddings must have {len(embeddings)} columns like embeddings, got {len(guide_embeddings)}"
            )
        for name, columns in (("embeddings", embeddings), ("guide_embeddings", guide_embeddings)):
            for index, column in enumerate(columns):
                check_rows(f"{name}[{index}]", column, may_be_empty=group is not None)
                check_features(f"{name}[0]", columns[0], f"{name}[{index}]", column)
        for index, column in enumerate(guide_embeddings):
            check_row_each(f"guide_embeddings[{index}]", column, f"embeddings[{index}]", embeddings[index])
        check_same("embeddings[0]", embeddings[0], "embeddings[1]", embeddings[1], "shape", "dtype", "device")
        anchor, positive, *negatives = embeddings
        guide_anchor, guide_positive, *guide_negatives = guide_embeddings
        return guided_info_nce(
            anchor,
            positive,
            guide_anchor,
            guide_positive,
            self.temperature,
            margin=self.margin,
            margin_strategy=self.margin_strategy,
            negatives=_joined(negatives),
            guide_negatives=_joined(guide_negatives),
            contrast_anchors=self.contrast_anchors,
            contrast_positives=self.contrast_positives,
            group=group,
        )

    def get_config_dict(self) -> dict[str, Any]:
        """Return the arguments, as the library's trainer records them."""
        return {
            "guide": self.guide,
            "temperature": self.temperature,
            "margin_strategy": self.margin_strategy,
            "margin": self.margin,
            "contrast_anchors": self.contrast_anchors,
            "contrast_positives": self.contrast_positives,
            "gather_across_devices": self.gather_across_devices,
        }

    @property
    def citation(self) -> str:
        """BibTeX of the loss's paper, for the library's model card."""
        return _GIST


class CachedGISTEmbedLoss(GISTEmbedLoss):
    """GISTEmbedLoss for batches whose activations do not fit in memory: the models see mini-batches.

    The call embeds all columns without a graph, with the model and with the guide. The backward embeds them again with
    the model only, as in `CachedMultipleNegativesRankingLoss`; `fastntxent.cached_backward` says what is repeated. With
    gradients disabled the model runs once.

    Args:
        model: Maps a dict of features to a dict with "sentence_embedding". None if the loss is called with embeddings.
        guide: The guide model, called like `model`. If both have a tokenizer, and the guide has a different vocabulary
            or a smaller max_seq_length, "input_ids" are decoded by the model's tokenizer and tokenized again for the
            guide. It gets the same mini-batches as the model.
        temperature: tau > 0, a float or a 0-d floating-point tensor.
        mini_batch_size: The number of rows of a column that the models see at a time.
        mini_batch_num_tokens: The largest number of tokens that the models see at a time, counted in the features'
            attention_mask. If given, it is used instead of mini_batch_size. A longer row is a mini-batch by itself.
        show_progress_bar: Show the model's mini-batches of both passes with tqdm.
        margin_strategy: How the limit for negatives is computed from g, the guide's similarity of anchor and positive:
            g - margin for "absolute", g - margin abs(g) for "relative".
        margin: The margin. A negative is left out if its similarity in the guide is above the limit.
        contrast_anchors: Use other anchors as negatives.
        contrast_positives: Use other positives as negatives of a positive.
        gather_across_devices: Use the batch of all ranks of the default process group. The loss is the mean over all
            ranks' anchors, the same on every rank, and anchors that are used as negatives come from all ranks. (In the
            library, the mean and these negatives cover only the rank's own anchors.)

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a number is out of range, an option is unknown, or, when called, a model is missing or the columns
            do not match.

    Memory holds the activations of one mini-batch, both models' embeddings, the gradients of the model's embeddings,
    and a copy of the model's buffers.

    Example:
        >>> import torch
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.words = torch.nn.EmbeddingBag(9, 4)
        ...     def forward(self, features):
        ...         return {"sentence_embedding": self.words(features["input_ids"])}
        >>> model, guide = Model(), Model()
        >>> loss = CachedGISTEmbedLoss(model, guide, mini_batch_size=2)
        >>> loss([{"input_ids": torch.randint(9, (6, 3))} for _ in range(2)]).backward()
        >>> model.words.weight.grad.shape, guide.words.weight.grad
        (torch.Size([9, 4]), None)
    """

    uses_gradient_cache = True  # tells the library's MatryoshkaLoss to decorate calculate_loss
    _several_negatives = True

    def __init__(
        self,
        model: nn.Module | None,
        guide: nn.Module | None,
        temperature: float | Tensor = 0.01,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        show_progress_bar: bool = False,
        margin_strategy: MarginStrategy = "absolute",
        margin: float = 0.0,
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        gather_across_devices: bool = False,
    ):
        super().__init__(
            model,
            guide,
            temperature=temperature,
            margin_strategy=margin_strategy,
            margin=margin,
            contrast_anchors=contrast_anchors,
            contrast_positives=contrast_positives,
            gather_across_devices=gather_across_devices,
        )
        check_has_batches(model, "GISTEmbedLoss")
        self.mini_batch_size, self.mini_batch_num_tokens = check_mini_batches(mini_batch_size, mini_batch_num_tokens)
        self.show_progress_bar = show_progress_bar

    def forward(self, sentence_features: Iterable[Mapping[str, Any]], labels: Tensor | None = None) -> Tensor:
        """Return the loss, a 0-d tensor whose backward runs the model again.

        Args:
            sentence_features: The features of anchor, positive and any number of negatives, one dict each. The first
                dimension of all their tensors is the batch.
            labels: Unused, as in the library.
        """
        columns = as_columns("sentence_features", sentence_features)
        if not torch.is_grad_enabled():
            views, of_guide = self._views(columns, passes=1)
            return self.calculate_loss(_lists(embedded(views)), _lists(embedded(of_guide)))
        views, of_guide = self._views(columns, passes=2)

        def loss_of(leaves: list[Tensor]) -> Tensor:
            with torch.no_grad():
                guide_embeddings = embedded(of_guide)
            return self.calculate_loss(_lists(leaves), _lists(guide_embeddings), with_backward=True)

        return loss_of_two_passes(views, loss_of)

    def _views(self, columns: Sequence[Any], passes: int) -> tuple[list[ChunkedView], list[ChunkedView]]:
        """Return the mini-batches of the model and of the guide."""
        model, guide = self._models()
        size, num_tokens = self.mini_batch_size, self.mini_batch_num_tokens
        views = mini_batched(model, columns, size=size, num_tokens=num_tokens)
        of_guide = mini_batched(
            guide, columns, name="guide", size=size, num_tokens=num_tokens, prepare=self._features_for_guide
        )
        return with_progress(views, passes) if self.show_progress_bar else views, of_guide

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        """Return the loss of embeddings, a 0-d tensor.

        Args:
            reps: The model's embeddings, for each column a list of mini-batches.
            reps_guided: The guide's embeddings, in the same form.
            with_backward: Also set the gradients of the model's embeddings. The returned loss then has a gradient only
                with respect to a learnt temperature.
        """
        loss = self.compute_loss_from_embeddings(list(map(torch.cat, reps)), list(map(torch.cat, reps_guided)))
        if not with_backward:
            return loss
        return loss_and_gradients(loss, [part for column in reps for part in column], self.temperature)

    def get_config_dict(self) -> dict[str, Any]:
        """Return the arguments, as the library's trainer records them."""
        return {
            **super().get_config_dict(),
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
        }


def _joined(columns: list[Tensor]) -> Tensor | None:
    """Return the rows of all columns, concatenated, or None if there are no columns."""
    if len(columns) > 1:
        return torch.cat(columns)
    return columns[0] if columns else None


def _lists(embeddings: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return each column's embeddings as a list of one mini-batch."""
    return [[column] for column in embeddings]


def _reads_otherwise(model: Any, guide: Any) -> bool:
    """Return whether the guide needs its own features: it has a different vocabulary or a smaller max_seq_length."""
    if not (hasattr(model, "tokenizer") and hasattr(guide, "tokenizer")):
        return False
    shorter = bool(guide.max_seq_length < model.max_seq_length)
    return shorter or model.tokenizer.get_vocab() != guide.tokenizer.get_vocab()
