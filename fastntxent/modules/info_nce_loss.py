"""InfoNCE from queries to keys as a module."""

from __future__ import annotations

from torch import Tensor

from ..losses import info_nce
from ..losses.false_negatives import Limits
from ..losses.info_nce_loss import check_hardness, check_positives
from ..options import HardnessMode, Positives, SeveralForm
from ..validation import check_parameter
from .base import ModuleOptions, TemperatureLoss, Unpack


class InfoNCELoss(TemperatureLoss):
    r"""InfoNCE from queries to keys as a module.

    .. math::
        L_n = \log(1 + e^{\nu_n - s_n/\tau}), \quad
        \nu_n = \log \sum_{j \in \text{negatives}(n)} e^{s_{nj}/\tau}

    van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018. s_n is the similarity of
    query n to its own key. Queries pick keys, but keys do not pick queries; `clip` has both directions.

    With positives="same_id" and form "out", the positives are part of the denominator. Near convergence the gradient
    then has an absolute error of about eps / tau, the rounding error of a logit (eps is the machine epsilon). The
    gradient of form "in" keeps its relative accuracy. If every row has one positive, both forms give the same loss.

    The options `margin`, `relative_margin` and `ceiling` leave a negative out only if its similarity exceeds the limit
    by more than rounding. A negative whose similarity is NaN stays in. No gradient flows through the choice of
    negatives. Limits apply to explicit negatives too.

    The hardness options follow Lan et al., "LLaVE: Large Language and Vision Embedding Models with Hardness-Weighted
    Contrastive Learning", 2025, as in sentence-transformers. There, all queries share the explicit negatives, but
    "hard_negatives" selects only the query's own, and the rest count as in-batch negatives. Here it selects all
    explicit negatives.

    Call it as `loss(query, key, negatives=None, ids=None)`; `forward` describes the arguments. `info_nce` is the same
    loss as a function.

    Args:
        temperature: tau > 0, a float or a 0-d floating-point tensor, which may require a gradient. The host does not
            read a tensor on an accelerator, so its sign is not checked there. With `learn_temperature`, the value is
            read and initialises the parameter.
        in_batch_negatives: Whether the keys of other samples are negatives. None: only without explicit negatives.
        positives: "pair": row n of the other side is the only positive of row n. "same_id": all rows of the other side
            with the id of row n are its positives; this needs `ids` and cannot be combined with label smoothing,
            margins, a ceiling, explicit negatives, hardness or in_batch_negatives=False.
        form: With positives="same_id", how the positives are combined. "out" averages their negative log-probabilities,
            which gives nu' - mean_p s_np / tau, with nu' the log-sum-exp over all columns. "in" takes the negative
            logarithm of their mean probability.
        label_smoothing: The share of the target, in [0, 1), that is spread evenly over the positive and the negatives,
            as in `torch.nn.functional.cross_entropy`.
        margin: Leave a negative out of row i's sum where its similarity to row i is above s_pos - margin, with s_pos
            the similarity of row i to its positive. A finite float; None sets no limit. Cannot be combined with
            `relative_margin` or `label_smoothing`.
        relative_margin: Leave a negative out of row i's sum where its similarity to row i is above (1 -
            relative_margin) s_pos. A float in [0, 1]; None sets no limit. Cannot be combined with `margin` or
            `label_smoothing`.
        ceiling: Leave a negative out of row i's sum where its similarity to row i is above this finite float. If there
            is also a margin, the smaller limit applies. None sets no limit. Cannot be combined with `label_smoothing`.
        hardness_mode: Which negatives get harder logits: "in_batch_negatives", "hard_negatives" (the explicit ones) or
            "all_negatives".
        hardness_strength: Add this multiple (0 or more) of the similarity to the logits of the negatives that
            `hardness_mode` selects. No gradient flows through the addend. Cannot be combined with `label_smoothing`.
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
        ValueError: a number is out of range, or an option is unknown or cannot be combined with another.

    Example:
        >>> import torch, fastntxent
        >>> loss = fastntxent.InfoNCELoss(temperature=1.0)
        >>> loss(torch.eye(4), torch.eye(4))
        tensor(0.7437)
    """

    _shown = (
        "in_batch_negatives",
        "positives",
        "form",
        "label_smoothing",
        "margin",
        "relative_margin",
        "ceiling",
        "hardness_mode",
        "hardness_strength",
    )

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        in_batch_negatives: bool | None = None,
        positives: Positives = "pair",
        form: SeveralForm = "out",
        label_smoothing: float = 0.0,
        margin: float | None = None,
        relative_margin: float | None = None,
        ceiling: float | None = None,
        hardness_mode: HardnessMode = "all_negatives",
        hardness_strength: float = 0.0,
        **options: Unpack[ModuleOptions],
    ):
        super().__init__(temperature, **options)
        self.label_smoothing = check_parameter("label_smoothing", label_smoothing)
        limits = Limits.checked(margin, relative_margin, ceiling, label_smoothing)
        self.margin, self.relative_margin, self.ceiling = margin, relative_margin, ceiling
        self.hardness_mode = hardness_mode
        self.hardness_strength = check_hardness(hardness_mode, hardness_strength, label_smoothing)
        check_positives(
            positives, form, limits, label_smoothing=label_smoothing, hardness_strength=hardness_strength,
            in_batch_negatives=in_batch_negatives,
        )  # fmt: skip
        self.positives, self.form = positives, form
        self.in_batch_negatives = in_batch_negatives

    def forward(self, query: Tensor, key: Tensor, negatives: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """Return the loss of queries that pick their keys.

        Args:
            query: (N, D) embeddings of the queries, float16, bfloat16, float32 or float64. Row n belongs to sample n.
            key: (N, D) embeddings of the keys, with the shape, dtype and device of `query`. Row n is the positive of
                row n of `query`.
            negatives: Explicit negatives with the dtype and device of `query`: (K, D), shared by all queries, or (N, K,
                D), one set per query. None: the keys of other samples are the negatives.
            ids: (N,) integers, the group of each sample. Samples of the same group are not negatives of each other,
                which removes false negatives. An id must mean the same on every rank. None: every other sample is a
                negative. Explicit negatives have no ids.

        Returns:
            A 0-d tensor, or (N,) for "none"; float64 for float64 embeddings, else float32.
        """
        return info_nce(
            query,
            key,
            self.temperature,
            negatives=negatives,
            ids=ids,
            positives=self.positives,
            form=self.form,
            in_batch_negatives=self.in_batch_negatives,
            label_smoothing=self.label_smoothing,
            margin=self.margin,
            relative_margin=self.relative_margin,
            ceiling=self.ceiling,
            hardness_mode=self.hardness_mode,
            hardness_strength=self.hardness_strength,
            **self._options,
        )
