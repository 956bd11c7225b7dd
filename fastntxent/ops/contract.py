"""Checks on the tensors of every call, made before the kernels take their addresses.

A kernel takes its sizes from the first matrix of rows in a call. If another tensor did not match it in shape, dtype or
device, the kernel would read or write outside that tensor's memory. The public functions check their arguments, but
calls also arrive by other routes: `torch.ops.fastntxent` used directly, saved-tensor and autograd hooks that return a
different tensor, `.data =`, exported and traced programs. So every kernel call goes through `checked`: forward and
backward, with one process or many, on every backend except `reference`, which has no kernels.

Each argument has one of these kinds. Within a call, the same letter means the same size.

    rows N D    a floating-point matrix; all such matrices of a call share one dtype
    full N D    like rows, but in float32 or float64 only
    ids N       one integer per row
    sums N      one number per row or pair, in the accumulation dtype: float64 for float64 rows, else float32
    grad N D    a gradient in the accumulation dtype
    index P     int64 row indices
    mask B C    bool or a real dtype, one entry per pair of rows
    number      0-d in the accumulation dtype, in host memory or on the rows' device; inv_tau may be a Python number
    count       a 0-d integer tensor in host memory

All tensors are dense and on one device, except numbers and counts in host memory.

Kernels read raw memory, so lazily negated tensors (`z.conj().imag`) and zero tensors without storage are resolved here.
An inv_tau or bias in host memory is passed to the kernel as a Python number.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algebra import accumulation_dtype
from ..validation import FLOAT_DTYPES, ID_DTYPES, check_positive

_ROWS = ("rows", "full")
_FLOAT32 = struct.Struct("f")
_MOST_PASSED = 4096
_passed: set[Hashable] = set()


class _Argument(NamedTuple):
    name: str
    kind: str
    sizes: tuple[tuple[int, str], ...]  # one (factor, letter) per dimension


class _Call(NamedTuple):
    arguments: tuple[_Argument, ...]
    order: tuple[int, ...]  # the order of checking: rows come first because they set the sizes
    inv_tau: int | None  # the position of inv_tau among the arguments, or None
    bias: int | None


def _parse(text: str) -> _Call:
    arguments = []
    for part in text.split(", "):
        name, kind, *sizes = part.replace(":", "").split()
        factors = [re.fullmatch(r"(\d*)([A-Z])", size) for size in sizes]
        arguments.append(_Argument(name, kind, tuple((int(f[1] or 1), f[2]) for f in factors if f)))
    order = sorted(range(len(arguments)), key=lambda index: arguments[index].kind not in _ROWS)
    places = {argument.name: index for index, argument in enumerate(arguments)}
    return _Call(tuple(arguments), tuple(order), places.get("inv_tau"), places.get("bias"))


_TWO_VIEWS = "z_i: rows N D, z_j: rows N D, inv_tau: number"
_SCALAR_BACKWARD = f"d_loss: number, d_z_i: grad N D, d_z_j: grad N D, d_inv_tau: number, {_TWO_VIEWS}"
_ONE_SIDE = "u: rows M D, ids: ids M, inv_tau: number"
_TWO_SIDES = "u: rows M D, v: rows K D, u_ids: ids M, v_ids: ids K, inv_tau: number"
_PAIRS = "u: full M D, v: full K D, a: index P, b: index P"
_LIMITED = "u: rows M D, v: rows K D, u_ids: ids M, v_ids: ids K, u_limits: sums M, v_limits: sums K, inv_tau: number"
_STUDENT = "u: full M D, v: full K D, t_u: full M E, t_v: full K E, u_ids: ids M, v_ids: ids K"
_TAUGHT = f"{_STUDENT}, inv_tau: number, rows_lse: sums M, cols_lse: sums K"
_GUIDED = (
    "u: full M D, v: full K D, g_u: full M E, g_v: full K E, u_ids: ids M, v_ids: ids K, inv_tau: number, "
    "limits: sums M"
)
_HELD = "u: rows M D, rows: rows K D, u_ids: ids M, row_ids: ids K, held: count, inv_tau: number"

# The tensor arguments of each call, in order; all other arguments come after them. A call has its operator's name.
_CALLS = {
    name: _parse(text)
    for name, text in {
        "neg_lse": _ONE_SIDE,
        "neg_lse_backward": f"d_neg_lse: sums M, {_ONE_SIDE}, neg_lse: sums M",
        "neg_lse_sum": f"{_ONE_SIDE}, weights: sums M",
        "neg_lse_sum_backward": "d_sum: number, d_u: grad M D, d_inv_tau: number, u: rows M D, inv_tau: number",
        "cross_neg_lse": _TWO_SIDES,
        "cross_neg_lse_backward": (
            f"d_rows: sums M, d_cols: sums K, {_TWO_SIDES}, rows_neg_lse: sums M, cols_neg_lse: sums K"
        ),
        "held_neg_lse": _HELD,
        "held_neg_lse_backward": f"d_neg_lse: sums M, {_HELD}, neg_lse: sums M",
        "held_loss": f"{_HELD}, against: sums M",
        "held_loss_backward": (
            "d_loss: number, d_u: grad M D, d_inv_tau: number, d_against: sums M, u: rows M D, inv_tau: number, "
            "against: sums M"
        ),
        "nt_xent_rows": _TWO_VIEWS,
        "nt_xent_rows_backward": f"d_neg_lse: sums 2N, d_pos: sums 2N, {_TWO_VIEWS}, neg_lse: sums 2N",
        "nt_xent_value": _TWO_VIEWS,
        "nt_xent_scalar": _TWO_VIEWS,
        "nt_xent_scalar_backward": _SCALAR_BACKWARD,
        "info_nce_value": _TWO_VIEWS,
        "info_nce_scalar": _TWO_VIEWS,
        "info_nce_scalar_backward": _SCALAR_BACKWARD,
        "limited_neg_lse": _LIMITED,
        "limited_neg_lse_backward": (
            f"d_rows: sums M, d_cols: sums K, {_LIMITED}, rows_neg_lse: sums M, cols_neg_lse: sums K"
        ),
        "limited_nt_xent_value": _TWO_VIEWS,
        "limited_nt_xent_scalar": _TWO_VIEWS,
        "limited_nt_xent_scalar_backward": _SCALAR_BACKWARD,
        "sigmoid_value": f"{_TWO_VIEWS}, bias: number",
        "sigmoid_scalar": f"{_TWO_VIEWS}, bias: number",
        "sigmoid_scalar_backward": (
            "d_loss: number, d_z_i: grad N D, d_z_j: grad N D, d_inv_tau: number, d_bias: number, "
            f"{_TWO_VIEWS}, bias: number"
        ),
        "softplus": f"{_TWO_SIDES}, bias: number",
        "softplus_backward": f"d_rows: sums M, d_cols: sums K, {_TWO_SIDES}, bias: number",
        "sup_con_scalar": "z: rows M D, ids: ids M, inv_tau: number",
        "positive_lse": _TWO_SIDES,
        "positive_lse_backward": f"d_lse: sums M, {_TWO_SIDES}, lse: sums M",
        "positive_sum": f"{_TWO_SIDES}, nu: sums M",
        "positive_sum_backward": f"d_sum: sums M, {_TWO_SIDES}, nu: sums M",
        "soft_dots": _TAUGHT,
        "soft_dots_backward": f"d_rows: sums M, d_cols: sums K, {_TAUGHT}",
        "soft_dots_sum": _TAUGHT,
        "soft_dots_sum_backward": "d_sum: number, d_u: grad M D, d_v: grad K D, u: full M D, v: full K D",
        "guided_neg_lse": _GUIDED,
        "guided_neg_lse_backward": f"d_neg_lse: sums M, {_GUIDED}, neg_lse: sums M",
        "pair_dots": _PAIRS,
        "pair_dots_backward": f"d_dots: sums P, {_PAIRS}",
        "mask_product": "mask: mask B C, x: full C D",
        "mask_product_backward": "d_out: grad B D, mask: mask B C, x: full C D",
        "nearest": "queries: rows Q D, corpus: rows K D",
        "positive_ranks": "u: full 2N D",
    }.items()
}


def checked(call: str, *values: Tensor | float) -> tuple[Any, ...]:
    """Return the arguments of a call in the form that kernels take. If one is invalid, raise an error that names it."""
    found: list[Any] = []
    # `known` has everything that the checks of kinds and sizes depend on. A set look-up is faster than these checks.
    known: list[Hashable] = [call]
    for x in values:
        if isinstance(x, Tensor):
            x = _resolved(x) if x.is_neg() or x._is_zerotensor() else x
            known.append("nested" if x.is_nested else (x.dtype, x.device, x.layout, x.shape))
        else:
            known.append(float)
        found.append(x)
    if (key := tuple(known)) not in _passed:
        check_kinds(call, found)
        _check_all_sizes(call, found)
        if len(_passed) >= _MOST_PASSED:
            _passed.clear()
        _passed.add(key)
    arguments, _, inv_tau, bias = _CALLS[call]
    for argument, x in zip(arguments, found, strict=True):
        if isinstance(x, Tensor):
            _check_storage(argument.name, x)
    dtype = accumulation_dtype(rows_of(call, found).dtype)
    if inv_tau is not None and (not isinstance(x := found[inv_tau], Tensor) or x.is_cpu):
        found[inv_tau] = _inverse_temperature(x, dtype)
    if bias is not None and isinstance(x := found[bias], Tensor) and x.is_cpu:
        found[bias] = _rounded(x.item(), dtype)
    return tuple(found)


def taken_by(call: str, arguments: Sequence[Any]) -> Sequence[Any]:
    """Return the arguments that the contract covers: the leading tensors, and inv_tau even if it is a float."""
    return arguments[: len(_CALLS[call].arguments)]


def check_kinds(call: str, values: Sequence[Tensor | float]) -> None:
    """Check layouts, dtypes, numbers of dimensions and devices, which even tensors without data have."""
    arguments, order, *_ = _CALLS[call]
    rows, rows_name = rows_of(call, values), arguments[order[0]].name
    for index in order:
        (name, kind, letters), x = arguments[index], values[index]
        if not isinstance(x, Tensor):
            if name == "inv_tau":
                continue
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.layout != torch.strided or x.is_nested:
            raise TypeError(f"{name} must be a dense (strided) tensor, got layout {x.layout}, nested: {x.is_nested}")
        _check_dtype(name, kind, x.dtype, rows, rows_name)
        if x.ndim != len(letters):
            raise ValueError(f"{name} must have {len(letters)} dimensions, got shape {tuple(x.shape)}")
        if kind == "count":
            if x.device.type != "cpu":
                raise ValueError(f"{name} must be in host memory, got {x.device}")
        elif x.device != rows.device and not (kind == "number" and x.device.type == "cpu"):
            raise ValueError(f"{name} must be on the device of {rows_name} ({rows.device}), got {x.device}")


def rows_of(call: str, values: Sequence[Any]) -> Tensor:
    """Return the first matrix of rows in a call, which sets the call's dtype and device."""
    rows: Tensor = values[_CALLS[call].order[0]]
    return rows


def _inverse_temperature(inv_tau: Tensor | float, dtype: torch.dtype) -> float:
    """Return 1/tau rounded to `dtype`, so that every kernel uses the same number.

    The range is checked here again, because under torch.compile the public layer has no value to check.
    """
    value = _rounded(inv_tau.item() if isinstance(inv_tau, Tensor) else inv_tau, dtype)
    check_positive("1 / temperature", value)
    return value


def _rounded(value: float, dtype: torch.dtype) -> float:
    if dtype != torch.float32:
        return value
    try:
        (value,) = _FLOAT32.unpack(_FLOAT32.pack(value))
    except OverflowError:
        return math.copysign(math.inf, value)
    return value


def _check_all_sizes(call: str, values: Sequence[Tensor | float]) -> None:
    arguments, order, *_ = _CALLS[call]
    sizes: dict[str, tuple[int, str]] = {}  # letter -> its size, and the name of the argument that set it
    for index in order:
        if isinstance(x := values[index], Tensor):
            _check_sizes(arguments[index], x, sizes)


def _check_sizes(argument: _Argument, x: Tensor, sizes: dict[str, tuple[int, str]]) -> None:
    name, kind, letters = argument
    for size, (factor, letter) in zip(x.shape, letters, strict=True):
        if kind in _ROWS and size == 0:
            raise ValueError(f"{name} must have at least one row and one feature, got shape {tuple(x.shape)}")
        if letter not in sizes:
            if size % factor:
                raise ValueError(f"{name} must have an even number of rows, got shape {tuple(x.shape)}")
            sizes[letter] = size // factor, name
        elif size != factor * sizes[letter][0]:
            known = tuple(factor * sizes[letter][0] if letter in sizes else "any" for factor, letter in letters)
            raise ValueError(f"{name} must have shape {known} to match {sizes[letter][1]}, got {tuple(x.shape)}")


def _check_dtype(name: str, kind: str, dtype: torch.dtype, rows: Tensor, rows_name: str) -> None:
    if kind == "mask":
        if dtype.is_complex:
            raise TypeError(f"{name} must be bool or have a real dtype, got {dtype}")
    elif kind == "index":
        if dtype != torch.int64:
            raise TypeError(f"{name} must be torch.int64, got {dtype}")
    elif kind in ("ids", "count"):
        if dtype not in ID_DTYPES:
            raise TypeError(f"{name} must have an integer dtype, got {dtype}")
    elif kind in _ROWS:
        if dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {dtype}")
        if kind == "full" and dtype != accumulation_dtype(dtype):
            raise TypeError(f"{name} must be float32 or float64, got {dtype}")
        if dtype != rows.dtype:
            raise TypeError(f"{name} must have the dtype of {rows_name} ({rows.dtype}), got {dtype}")
    elif dtype != accumulation_dtype(rows.dtype):
        expected = accumulation_dtype(rows.dtype)
        raise TypeError(f"{name} must be {expected} when {rows_name} is {rows.dtype}, got {dtype}")


def _check_storage(name: str, x: Tensor) -> None:
    """Raise if the last element lies outside the storage, which may have been freed or resized."""
    if x.is_contiguous():  # the fast path, taken by nearly every tensor
        spanned = x.numel()
    else:
        spanned = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    held = x.untyped_storage().nbytes()
    if held < (x.storage_offset() + spanned) * x.itemsize:
        raise ValueError(
            f"{name} must have its elements in memory, got shape {tuple(x.shape)} on a storage of {held} bytes "
            "(freed or resized)"
        )


def _resolved(x: Tensor) -> Tensor:
    x = x.resolve_neg()
    return x.clone() if x._is_zerotensor() else x
