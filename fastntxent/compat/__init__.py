"""Drop-ins: the contrastive losses of other libraries, by their names, signatures, defaults and values.

One module a library, which imports nothing of it: `lightly`, `pytorch_metric_learning`, `solo_learn`, `sup_contrast`,
`info_nce`, `open_clip`, `sentence_transformers` (and `gist`, its loss with a guide), `simclr`, `torchmultimodal`.
docs/migration.md has a before and after for each, and what differs. What they share: half-precision embeddings give a
float32 loss, no loss is NaN where the library's divides zero by zero, and bad input is an error that names the
argument.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import (
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
else:

    def __getattr__(name: str) -> object:
        """Load a drop-in when it is first used."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return importlib.import_module(f"{__name__}.{name}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


__all__ = [
    "gist",
    "info_nce",
    "lightly",
    "open_clip",
    "pytorch_metric_learning",
    "sentence_transformers",
    "simclr",
    "solo_learn",
    "sup_contrast",
    "torchmultimodal",
]
