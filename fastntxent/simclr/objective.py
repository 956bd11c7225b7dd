"""The objective of a run: NT-Xent, or one of its two terms alone."""

from __future__ import annotations

from torch import Tensor

from .. import NTXentLoss, nt_xent_terms
from ..distributed import Group
from ..options import BackendName
from .config import Config


class OneTerm(NTXentLoss):
    """L_a or L_d alone, where tau L = L_a + L_d; see `nt_xent_terms`.

    Training with one term shows why SimCLR needs both. L_a (alignment) alone is already minimal if all embeddings are
    one point, and L_d (distribution) alone ignores which rows are views of the same image.
    """

    def __init__(self, term: str, temperature: float, *, backend: BackendName, group: Group | None) -> None:
        super().__init__(temperature, backend=backend, group=group)
        self.term = term

    def forward(self, z_i: Tensor, z_j: Tensor, ids: Tensor | None = None) -> Tensor:
        assert ids is None
        terms = nt_xent_terms(z_i, z_j, self.temperature, backend=self.backend, group=self.group)
        value: Tensor = getattr(terms, self.term)
        return value


def build_objective(config: Config, group: Group | None = None) -> NTXentLoss:
    """Return the loss module of a run. If a group is given, the loss covers the batch of all its ranks.

    Raises:
        ValueError: the settings choose the dense loss, and a group is given.
    """
    backend: BackendName = "reference" if config.loss == "reference" else config.backend
    if group and backend == "reference":
        given = "--loss" if config.loss == "reference" else "--backend"
        raise ValueError(f"{given} reference is a dense loss for one process, but this run has several ranks")
    if config.objective == "nt_xent":
        return NTXentLoss(config.temperature, backend=backend, group=group, learn_temperature=config.learn_temperature)
    return OneTerm(config.objective, config.temperature, backend=backend, group=group)
