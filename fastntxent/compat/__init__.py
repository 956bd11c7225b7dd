"""Drop-ins: the contrastive losses of other libraries, by their names, signatures, defaults and values.

One module a library, which imports nothing of it: `lightly`, `pytorch_metric_learning`, `solo_learn`, `sup_contrast`,
`info_nce`, `open_clip`, `sentence_transformers`, `simclr`, `torchmultimodal`. docs/migration.md has a before and after
for each, and what differs. What they share: half-precision embeddings give a float32 loss, no loss is NaN where the
library's divides zero by zero, and bad input is an error that names the argument.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

_DROP_INS = (
    "info_nce",
    "lightly",
    "open_clip",
    "pytorch_metric_learning",
    "sentence_transformers",
    "simclr",
    "solo_learn",
    "sup_contrast",
    "torchmultimodal",
)


def __getattr__(name: str) -> ModuleType:
    """A drop-in's module, which is imported when it is first asked for."""
    if name not in _DROP_INS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f".{name}", __name__)


def __dir__() -> list[str]:
    return sorted({*globals(), *_DROP_INS})
