"""InfoNCE with a guide as a module."""

from __future__ import annotations

from torch import Tensor

from ..losses import guided_info_nce
from ..options import MARGIN_STRATEGIES, MarginStrategy
from ..validation import check_choice, check_flag, check_parameter
from .base import ModuleOptions, TemperatureLoss, Unpack


class GuidedInfoNCELoss(TemperatureLoss):
    r"""InfoNCE without the negatives that a guide rejects, as a module.

    .. math::
        L_n = \log(1 + e^{\nu_n - s_n/\tau}), \quad
        \nu_n = \log \sum_{j \in C(n),\ g_{nj} \le g_n - m} e^{s_{nj}/\tau}

    s are the similarities of the embeddings and g the cosine similarities of the guide's embeddings; s_n and g_n are
    the similarities of query n to key n. The candidates C(n) are the keys of other samples and the explicit negatives,
    compared with query n. `contrast_anchors` adds the other queries, compared with query n; `contrast_positives` adds
    the other keys, compared with key n.

    Solatorio, "GISTEmbed: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning", 2024, with
    the semantics of sentence-transformers' `GISTEmbedLoss`.

    A row is never a negative of itself or of its positive. Ties stay in: a negative is left out only where its
    similarity in the guide exceeds the limit by more than rounding, eps sqrt(E), which is 3e-6 in float32 at E = 768. A
    pair whose similarity or limit is NaN stays in too. The loss of a query without negatives is 0. No gradient flows
    through the choice of negatives.

    Call it as `loss(query, key, guide_query, guide_key, negatives=None, guide_negatives=None)`; `forward` describes the
    arguments. `guided_info_nce` is the same loss as a function.

    Args:
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. With `learn_temperature`, the value is
            read and initialises the parameter.
        margin: m, a finite float. A negative stays where g_nj <= g_n - m ("absolute"), or where g_nj <= g_n - m
            abs(g_n) ("relative").
        margin_strategy: "absolute" or "relative", the meaning of `margin`.
        contrast_anchors: Whether the other queries are negatives of a query.
        contrast_positives: Whether the other keys, compared with a query's own key, count as negatives in the loss of
            that query.
        reduction: "mean" over the N queries, "sum", or "none" for one loss per query.
        normalize: True divides each row by max(||z||, 1e-12) like `torch.nn.functional.normalize` (by max(||z||,
            6.1e-5) in float16). False takes the rows as they are, and their products must not overflow.
        backend: "auto", which chooses one for the device, or a name from `backends()`.
        group: The ranks that hold the batch: "world" (the default process group, looked up at each call), a process
            group, a one-dimensional DeviceMesh, or a `Sharding`, which adds options. Each rank passes its own samples,
            any number of them, even none. Negatives come from all ranks. "mean" and "sum" cover the whole batch and are
            equal on every rank. Once DistributedDataParallel has averaged the parameters' gradients, these equal the
            gradients of one process with the whole batch. "none" returns this rank's losses. None: this rank's samples
            are the whole batch. Explicit negatives (K, D) are shared by all ranks too; each rank passes any number of
            them.
        learn_temperature: Make the temperature a parameter. It is stored as its logarithm, `log_temperature`, so no
            optimiser step can make it negative. Exclude it from weight decay.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a number is out of range, or an option is unknown.

    Example:
        >>> import torch, fastntxent
        >>> z = torch.eye(3)
        >>> guide = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])  # samples 0 and 2 are alike
        >>> fastntxent.GuidedInfoNCELoss(temperature=1.0, margin=0.5, reduction="none")(z, z, guide, guide)
        tensor([0.7437, 1.1654, 0.7437])
    """

    _shown = ("margin", "margin_strategy", "contrast_anchors", "contrast_positives")

    def __init__(
        self,
        temperature: float | Tensor = 0.01,
        *,
        margin: float = 0.0,
        margin_strategy: MarginStrategy = "absolute",
        contrast_anchors: bool = True,
        contrast_positives: bool = True,
        **options: Unpack[ModuleOptions],
    ):
        super().__init__(temperature, **options)
        check_choice("margin_strategy", margin_strategy, MARGIN_STRATEGIES)
        self.margin = check_parameter("margin", margin)
        self.margin_strategy = margin_strategy
        self.contrast_anchors = check_flag("contrast_anchors", contrast_anchors)
        self.contrast_positives = check_flag("contrast_positives", contrast_positives)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        guide_query: Tensor,
        guide_key: Tensor,
        negatives: Tensor | None = None,
        guide_negatives: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of queries that pick their keys, against the negatives that the guide leaves in.

        Args:
            query: (N, D) embeddings of the queries, float16, bfloat16, float32 or float64. Row n belongs to sample n.
            key: (N, D) embeddings of the keys, with the shape, dtype and device of `query`. Row n is the positive of
                row n of `query`.
            guide_query: (N, E) embeddings from the guide for the samples of `query`, of any floating-point dtype. They
                are always normalised and get no gradient.
            guide_key: (N, E) embeddings from the guide for the samples of `key`, like `guide_query`.
            negatives: (K, D) explicit negatives of all queries, with the dtype and device of `query`. None: no explicit
                negatives.
            guide_negatives: (K, E) embeddings from the guide for the explicit negatives, like `guide_query`. Required
                with `negatives`, and not allowed without.

        Returns:
            A 0-d tensor, or (N,) for "none"; float64 for float64 embeddings, else float32.
        """
        return guided_info_nce(
            query,
            key,
            guide_query,
            guide_key,
            self.temperature,
            margin=self.margin,
            margin_strategy=self.margin_strategy,
            negatives=negatives,
            guide_negatives=guide_negatives,
            contrast_anchors=self.contrast_anchors,
            contrast_positives=self.contrast_positives,
            **self._options,
        )
