"""What a run minimises: NT-Xent, or one of its two terms by itself."""

from __future__ import annotations

from torch import Tensor

from .. import NTXentLoss, nt_xent_terms
from ..distributed import Group
from ..options import BackendName
from .config import Config


class OneTerm(NTXentLoss):
    """L_a or L_d of tau L = L_a + L_d alone; see `nt_xent_terms`.

    Half of SimCLR, to learn from: alignment alone is at its best where all embeddings are one point, distribution
    alone knows nothing of views.
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
    """The loss module of a run, over the ranks of a group; ValueError for the dense loss, which is of one process."""
    backend: BackendName = "reference" if config.loss == "reference" else config.backend
    if group and backend == "reference":
        given = "--loss" if config.loss == "reference" else "--backend"
        raise ValueError(f"{given} reference is the dense loss of one process, and this run is over several ranks")
    if config.objective == "nt_xent":
        return NTXentLoss(config.temperature, backend=backend, group=group, learn_temperature=config.learn_temperature)
    return OneTerm(config.objective, config.temperature, backend=backend, group=group)
