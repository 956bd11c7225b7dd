"""Call every operator with one wrong argument at a time: the error must name it, or the numbers must be correct.

python -m tests.hostile [--kernels PATH]    the whole campaign; PATH is a build of fastntxent._cpu to test,
                                            such as the AddressSanitizer build of csrc/cpu/sanitize.sh
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

N, D = 40, 24
REFUSALS = (TypeError, ValueError, RuntimeError, NotImplementedError, IndexError)


def operators() -> list[str]:
    """Return the names of all operators that the package registers."""
    import fastntxent.ops.contract as contract

    return list(contract._CALLS)


def valid_arguments(
    name: str, backend: str, dtype: torch.dtype = torch.float32, overload: str = "default"
) -> dict[str, object]:
    """Return valid arguments for the operator's schema. The log-sum-exps `neg_lse`, `rows_neg_lse`, `cols_neg_lse` and
    `lse` come from a forward; other results that a backward reads are random numbers."""
    from fastntxent import ops

    generator = torch.Generator().manual_seed(0)
    sums = torch.float64 if dtype == torch.float64 else torch.float32

    def rows(n: int) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(n, D, generator=generator, dtype=torch.float64)).to(dtype)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(sums)

    k, bias = torch.tensor(2.0, dtype=sums), torch.tensor(-1.0, dtype=sums)
    z_i, z_j, u, v = rows(N), rows(N), rows(2 * N), rows(N + 8)
    ids, v_ids = torch.arange(2 * N) // 2, torch.arange(N + 8) // 3
    two_sides = {"u": u, "v": v, "u_ids": ids, "v_ids": v_ids, "inv_tau": k}
    known: dict[str, object] = {
        "z_i": z_i, "z_j": z_j, "ids": ids, **two_sides,
        "rows": v, "row_ids": v_ids, "held": torch.tensor(7), "weights": numbers(2 * N), "d_loss": numbers(),
        "d_sum": numbers(2 * N) if name == "positive_sum_backward" else numbers(), "d_u": numbers(2 * N, D),
        "d_v": numbers(N + 8, D), "t_u": rows(2 * N)[:, 8:], "t_v": rows(N + 8)[:, 8:], "rows_lse": numbers(2 * N) + 3,
        "cols_lse": numbers(N + 8) + 3, "g_u": rows(2 * N)[:, 8:], "g_v": rows(N + 8)[:, 8:], "limits": numbers(2 * N),
        "d_z_i": numbers(N, D), "d_z_j": numbers(N, D), "d_inv_tau": numbers(), "d_neg_lse": numbers(2 * N),
        "d_pos": numbers(2 * N), "d_lse": numbers(2 * N), "d_rows": numbers(2 * N), "d_cols": numbers(N + 8),
        "nu": numbers(2 * N), "normalize": True, "mean": True, "both": True, "same": False, "needs_u": True,
        "needs_v": True, "needs_i": True, "needs_j": True,
        "backend": backend, "a": torch.arange(30) % (2 * N), "b": torch.arange(30) % 7, "d_dots": numbers(30),
        "mask": torch.rand(6, N, generator=generator) > 0.5, "x": rows(N), "d_out": numbers(6, D),
        "against": numbers(2 * N), "d_against": numbers(2 * N),
        "u_limits": numbers(2 * N), "v_limits": numbers(N + 8), "limit_scale": 1.0, "limit_shift": -0.1,
        "bias": bias, "d_bias": numbers(), "positives": True, "two_views": True,
        "queries": rows(9), "corpus": v, "k": 5, "z": u, "form": "in",
    }  # fmt: skip
    known["rows_neg_lse"], known["cols_neg_lse"] = ops.cross_neg_lse(u, v, ids, v_ids, k, "blocked")
    known["lse"] = ops.positive_lse(u, v, ids, v_ids, k, same=False)
    two_views = name.startswith("nt_xent")
    known["neg_lse"] = (
        ops.nt_xent_rows(z_i, z_j, k, True, "blocked")[0] if two_views else ops.neg_lse(u, ids, k, "blocked")
    )
    if overload == "float":
        known["inv_tau"] = 2.0
    schema = getattr(getattr(torch.ops.fastntxent, name), overload)._schema
    return {argument.name: known[argument.name] for argument in schema.arguments}


def with_cut_storage(x: Tensor, share: float) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(int(x.untyped_storage().nbytes() * share))
    return x


def wrong(x: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield replacements for x that are wrong, or that only look wrong."""
    for dtype in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
        torch.int64, torch.bool, torch.complex64,
    ):  # fmt: skip
        if dtype != x.dtype:
            yield f"as {dtype}", lambda dtype=dtype: x.to(dtype)
    for dim in range(x.ndim):
        size = x.shape[dim]
        for length in (0, 1, 2, size // 2, size - 1):
            yield f"{length} of dimension {dim}", lambda dim=dim, length=length: x.narrow(dim, 0, length).clone()
            yield f"a view of {length} of it", lambda dim=dim, length=length: x.narrow(dim, 0, length)
        yield f"more in dimension {dim}", lambda dim=dim: torch.cat((x, x.narrow(dim, 0, 1)), dim)
        yield f"one of dimension {dim}, expanded", lambda dim=dim: x.narrow(dim, 0, 1).expand(x.shape)
        yield (
            f"every second of dimension {dim}",
            lambda dim=dim: x.repeat_interleave(2, dim).unflatten(dim, (-1, 2)).select(dim + 1, 0),
        )
    yield "a number", lambda: x.flatten()[0].clone()
    yield "flat", lambda: x.flatten()[:7].clone()
    yield "one dimension more", lambda: x[None]
    yield "one dimension more at the end", lambda: x[..., None]
    yield "transposed", lambda: x.T if x.ndim == 2 else x
    yield "nothing", lambda: x.new_empty(0)
    yield "freed", lambda: with_cut_storage(x, 0)
    yield "half freed", lambda: with_cut_storage(x, 0.5)
    yield "without data", lambda: x.to("meta")
    yield "sparse", lambda: x.to_sparse()
    yield "sparse rows", lambda: x.to_sparse_csr()
    yield "nested", lambda: torch.nested.nested_tensor([x, x])
    yield "negated", lambda: torch.complex(torch.zeros_like(x), -x).conj().imag
    yield "zeros not written", lambda: torch._efficientzerotensor(x.shape, dtype=x.dtype)
    yield "not a number", lambda: x * float("nan")
    yield "infinite", lambda: x * float("inf")
    yield "negative", lambda: -x.abs() - 1
    yield "huge", lambda: x * 2**62


def wrong_numbers() -> Iterator[tuple[str, Callable[[], float]]]:
    """Yield numbers that are invalid as an inverse temperature, or only just valid."""
    for value in (0.0, -0.0, -2.0, float("nan"), float("inf"), -float("inf"), 1e-300):
        yield f"as {value}", lambda value=value: value
    yield "a huge one", lambda: 1e300


def _close(x: Tensor, y: Tensor, bfloat16: bool) -> bool:
    """Return whether two results agree. If the rows are bfloat16, kernels may round the terms of a sum to bfloat16.
    The tolerance is then relative to the largest element, because terms that cancel leave their rounding errors in
    small elements."""
    largest = float(y.nan_to_num(0, 0, 0).abs().max()) if bfloat16 and y.numel() else 0.0
    tolerance = torch.finfo(torch.bfloat16).eps if bfloat16 else 1e-3
    return torch.allclose(x, y, tolerance, max(1e-4, tolerance * largest), equal_nan=True)


class Campaign:
    """Counts the calls and collects the faults."""

    def __init__(self, backend: str):
        self.backend = backend
        self.calls = 0
        self.faults: list[str] = []

    def run(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        for overload in getattr(torch.ops.fastntxent, name).overloads():
            self.run_overload(name, dtype, overload)

    def run_overload(self, name: str, dtype: torch.dtype, overload: str) -> None:
        arguments = valid_arguments(name, self.backend, dtype, overload)
        for argument, value in arguments.items():
            if (overload == "float" and argument != "inv_tau") or not isinstance(value, Tensor | float):
                continue
            for what, make in wrong(value) if isinstance(value, Tensor) else wrong_numbers():
                try:
                    replacement = make()
                except REFUSALS:  # no such tensor exists
                    continue
                self.calls += 1
                label = f"{name}, {argument} {what} ({dtype})"
                self.judge(label, name, argument, {**arguments, argument: replacement})

    def judge(self, label: str, name: str, argument: str, arguments: dict[str, object]) -> None:
        operator = getattr(torch.ops.fastntxent, name)
        try:
            found = operator(*arguments.values())
        except REFUSALS as error:
            # PyTorch may raise first: its dispatcher has kernels only for dense tensors, and indexing checks bounds.
            told = [f"{name} must" for name in (*arguments, "temperature")]
            told += ["Could not run", "out of bounds for", "index out of range"]
            if "report this bug" in str(error) or not any(each in str(error) for each in told):
                self.faults.append(f"{label}: names no argument: {type(error).__name__}: {str(error)[:150]}")
            return
        far_away = any(f" {value} " in label for value in ("huge", "infinite", "negative"))  # exponentials overflow
        if "backend" not in arguments or self.backend == "blocked" or far_away:
            return
        expected = operator(*{**arguments, "backend": "blocked"}.values())
        for x, y in zip(*((r,) if isinstance(r, Tensor) else r for r in (found, expected)), strict=True):
            if not (x.is_meta and y.is_meta) and not _close(x.double(), y.double(), "bfloat16" in label):
                self.faults.append(f"{label}: differs from plain PyTorch")


def use_kernels(path: str) -> None:
    """Replace the installed CPU kernels with the build at this path."""
    spec = importlib.util.spec_from_file_location("fastntxent._cpu", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["fastntxent._cpu"] = module


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kernels", metavar="PATH")
    options = parser.parse_args()
    if options.kernels:
        use_kernels(options.kernels)
    warnings.simplefilter("ignore")
    campaign = Campaign("cpu")
    for name in operators():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            campaign.run(name, dtype)
    print(f"{campaign.calls} calls of {len(operators())} operators, {len(campaign.faults)} faults")
    print("\n".join(campaign.faults))
    return bool(campaign.faults)


if __name__ == "__main__":
    sys.exit(main())
