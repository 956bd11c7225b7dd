"""Drop-ins: the contrastive losses of other libraries, with the same names, signatures, defaults and values.

There is one module per library, and it imports nothing from that library: `lightly`, `pytorch_metric_learning`,
`solo_learn`, `sup_contrast`, `info_nce`, `open_clip`, `sentence_transformers` (and `gist`, its guided losses), `simclr`
and `torchmultimodal`. docs/migration.md shows code that uses each library before and after the change, and lists the
differences. All contrastive losses are float32 for half-precision embeddings. They are never NaN where the library
divides zero by zero. Errors name the bad argument.
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
