"""What the tensors of a call have to be, checked where the kernels take their addresses.

A kernel reads and writes as many elements as the first rows of a call say. A tensor of another shape, dtype or device
would have it read or write beyond the memory of that tensor. The public functions check what they are given, but other
ways lead here too: `torch.ops.fastntxent` itself, saved-tensor hooks and autograd's own hooks that return something
else, `.data =`, exported and traced programs. So each call passes through `checked`, forward and backward, one process
or many, whatever the backend.

An argument is one of

    rows N D    a dense floating-point matrix; all rows of a call have one dtype and device
    full N D    the same in float32 or float64
    ids N       an integer for each row
    sums N      a number for each row, in the accumulation dtype: float64 for float64 rows, else float32
    grad N D    a gradient in the accumulation dtype
    index P     int64 numbers of rows
    mask B C    bool or numbers, one for each pair of rows
    number      0-d in the accumulation dtype, in host memory or where the rows are
    count       a 0-d integer in host memory

with the same letter for the same size. Tensors that PyTorch negates lazily (`z.conj().imag`), or whose zeros it has not
written yet, are resolved here: a kernel reads what lies in memory.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.base import accumulation_dtype
from ..validation import FLOAT_DTYPES, ID_DTYPES, check_positive

_ROWS = ("rows", "full")


class _Argument(NamedTuple):
    name: str
    kind: str
    sizes: tuple[tuple[int, str], ...]  # a factor and a letter for each dimension


class _Call(NamedTuple):
    arguments: tuple[_Argument, ...]
    order: tuple[int, ...]  # rows first: they say what the letters stand for


def _parse(text: str) -> _Call:
    arguments = []
    for part in text.split(", "):
        name, kind, *sizes = part.replace(":", "").split()
        factors = [re.fullmatch(r"(\d*)([A-Z])", size) for size in sizes]
        arguments.append(_Argument(name, kind, tuple((int(f[1] or 1), f[2]) for f in factors if f)))
    order = sorted(range(len(arguments)), key=lambda index: arguments[index].kind not in _ROWS)
    return _Call(tuple(arguments), tuple(order))


_TWO_VIEWS = "z_i: rows N D, z_j: rows N D, inv_tau: number"
_ONE_SIDE = "u: rows M D, ids: ids M, inv_tau: number"
_TWO_SIDES = "u: rows M D, v: rows K D, u_ids: ids M, v_ids: ids K, inv_tau: number"
_PAIRS = "u: full M D, v: full K D, a: index P, b: index P"
_HELD = "u: rows M D, rows: rows K D, u_ids: ids M, row_ids: ids K, held: count, inv_tau: number"

# The tensors of each call in order; what follows them is no tensor.
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
        "nt_xent_rows": _TWO_VIEWS,
        "nt_xent_rows_backward": f"d_neg_lse: sums 2N, d_pos: sums 2N, {_TWO_VIEWS}, neg_lse: sums 2N",
        "nt_xent_value": _TWO_VIEWS,
        "nt_xent_scalar": _TWO_VIEWS,
        "nt_xent_scalar_backward": (
            f"d_loss: number, d_z_i: grad N D, d_z_j: grad N D, d_inv_tau: number, {_TWO_VIEWS}"
        ),
        "positive_lse": _TWO_SIDES,
        "positive_lse_backward": f"d_lse: sums M, {_TWO_SIDES}, lse: sums M",
        "positive_sum": f"{_TWO_SIDES}, nu: sums M",
        "positive_sum_backward": f"d_sum: sums M, {_TWO_SIDES}, nu: sums M",
        "pair_dots": _PAIRS,
        "pair_dots_backward": f"d_dots: sums P, {_PAIRS}",
        "mask_product": "mask: mask B C, x: full C D",
        "mask_product_backward": "d_out: grad B D, mask: mask B C, x: full C D",
        "nearest": "queries: rows Q D, corpus: rows K D",
        "positive_ranks": "u: full 2N D",
    }.items()
}


def checked(call: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors of a call, as a kernel may read them; an error that names the first that is not what it has to be."""
    tensors = tuple(map(_resolved, tensors))
    check_kinds(call, tensors)
    arguments, order = _CALLS[call]
    sizes: dict[str, tuple[int, str]] = {}  # of each letter, and the argument that set it
    for index in order:
        argument, x = arguments[index], tensors[index]
        _check_sizes(argument, x, sizes)
        _check_storage(argument.name, x)
        if argument.name == "inv_tau" and x.is_cpu:  # a compiled caller's checks saw no value; here there is one
            check_positive("1 / temperature", x.item())
    return tensors


def check_kinds(call: str, tensors: Sequence[Tensor]) -> None:
    """Layouts, dtypes, dimensions and devices: what is known of tensors without data too."""
    arguments, order = _CALLS[call]
    rows, rows_name = rows_of(call, tensors), arguments[order[0]].name
    for index in order:
        (name, kind, letters), x = arguments[index], tensors[index]
        if x.layout != torch.strided or x.is_nested:
            raise TypeError(f"{name} must be a dense (strided) tensor, got layout {x.layout}, nested: {x.is_nested}")
        _check_dtype(name, kind, x.dtype, rows, rows_name)
        if x.ndim != len(letters):
            raise ValueError(f"{name} must have {len(letters)} dimensions, got shape {tuple(x.shape)}")
        if kind == "count":
            if x.device.type != "cpu":
                raise ValueError(f"{name} must be in host memory, got {x.device}")
        elif x.device != rows.device and not (kind == "number" and x.device.type == "cpu"):
            raise ValueError(f"{name} must be on the device of {rows_name}, {rows.device}, got {x.device}")


def rows_of(call: str, tensors: Sequence[Tensor]) -> Tensor:
    """The first rows among the tensors of a call: its dtype and device are those of the call."""
    return tensors[_CALLS[call].order[0]]


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
            raise ValueError(f"{name} must have shape {known}, to fit {sizes[letter][1]}, got {tuple(x.shape)}")


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
            raise TypeError(f"{name} must have the dtype of {rows_name}, {rows.dtype}, got {dtype}")
    elif dtype != accumulation_dtype(rows.dtype):
        expected = accumulation_dtype(rows.dtype)
        raise TypeError(f"{name} must be {expected} where {rows_name} is {rows.dtype}, got {dtype}")


def _check_storage(name: str, x: Tensor) -> None:
    """The last element lies within the storage, which may have been freed or cut since the tensor was made."""
    if x.is_contiguous():  # quickly, for nearly every tensor
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
    if x.is_neg():
        x = x.resolve_neg()
    if x._is_zerotensor():
        x = x.clone()
    return x
