"""The options that are chosen by name: a type for the signatures, and a tuple of the same names for the checks."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Reduction: TypeAlias = Literal["mean", "sum", "none"]
BackendName: TypeAlias = Literal["auto", "cpu", "cuda", "triton", "blocked", "reference"]
Layout: TypeAlias = Literal["concatenated", "interleaved"]
SupConForm: TypeAlias = Literal["out", "in", "pairs"]
HardnessMode: TypeAlias = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]
Positives: TypeAlias = Literal["pair", "same_id"]
SeveralForm: TypeAlias = Literal["out", "in"]
MarginStrategy: TypeAlias = Literal["absolute", "relative"]
Strategy: TypeAlias = Literal["auto", "all_gather", "ring"]

BACKENDS: tuple[str, ...] = get_args(BackendName)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
LAYOUTS: tuple[str, ...] = get_args(Layout)
FORMS: tuple[str, ...] = get_args(SupConForm)
HARDNESS_MODES: tuple[str, ...] = get_args(HardnessMode)
POSITIVES: tuple[str, ...] = get_args(Positives)
SEVERAL_FORMS: tuple[str, ...] = get_args(SeveralForm)
MARGIN_STRATEGIES: tuple[str, ...] = get_args(MarginStrategy)
STRATEGIES: tuple[str, ...] = get_args(Strategy)
