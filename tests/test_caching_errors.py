"""Invalid calls of cached_backward: each error names the argument, what was expected and what was given."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastntxent import NTXentLoss, cached_backward

N, FEATURES, D = 6, 8, 4
X = torch.randn(2, N, FEATURES, generator=torch.Generator().manual_seed(0))


class Encoder(nn.Module):
    """A layer with dropout that counts its calls and returns `output(result, count)`."""

    calls: Tensor

    def __init__(self, output: Callable[[Tensor, int], Any] = lambda z, calls: z):
        super().__init__()
        self.layer = nn.Linear(FEATURES, D)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.output = output

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.output(nn.functional.dropout(self.layer(x), 0.1), int(self.calls))


def frozen() -> nn.Module:
    return Encoder().requires_grad_(False)


def of_loss(loss_fn: Any) -> dict[str, Any]:
    return {"loss_fn": loss_fn}


def returning(output: Callable[[Tensor, int], Any]) -> dict[str, Any]:
    return {"encoder": Encoder(output)}


def with_backward(a: Tensor, b: Tensor) -> Tensor:
    loss = (a * b).sum()
    loss.backward()
    return loss


def tokens(lengths: Any) -> dict[str, Any]:
    return {"chunk_size": None, "chunk_tokens": 2, "lengths": lengths}


LOSS = NTXentLoss()
BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    # the encoder
    "encoder is None": ({"encoder": None}, TypeError, "encoder must be a torch.nn.Module, got NoneType"),
    "encoder is a class": ({"encoder": nn.Linear}, TypeError, "encoder must be a torch.nn.Module, got type"),
    "encoder is a dict": ({"encoder": {"a": frozen()}}, TypeError, "encoder must be a torch.nn.Module, got dict"),
    "encoder is a generator": (
        {"encoder": (frozen() for _ in range(2))},
        TypeError,
        "encoder must be a torch.nn.Module, got generator",
    ),
    "encoder is empty": ({"encoder": []}, ValueError, "encoder must hold a module for each of the 2 views, got 0"),
    "encoder without forward": (
        {"encoder": nn.ModuleDict({"a": Encoder()})},
        TypeError,
        "encoder must have a forward, got ModuleDict, which has none",
    ),
    "encoder on meta": (
        {"encoder": Encoder().to("meta")},
        ValueError,
        "encoder must have its parameters in memory, got some on the meta device",
    ),
    # the encoder's output
    "returns None": (returning(lambda z, calls: None), TypeError, "encoder must return a torch.Tensor, got NoneType"),
    "returns a scalar": (
        returning(lambda z, calls: z.sum()),
        ValueError,
        "encoder must return 2 embeddings, one per input row, got shape ()",
    ),
    "returns columns": (
        returning(lambda z, calls: z.T),
        ValueError,
        "encoder must return 2 embeddings, one per input row, got shape (4, 2)",
    ),
    "returns integers": (
        returning(lambda z, calls: z.long()),
        TypeError,
        "encoder must return floating-point embeddings, got torch.int64",
    ),
    "returns sparse": (
        returning(lambda z, calls: z.to_sparse()),
        TypeError,
        "encoder must return a dense (strided) tensor with values, got torch.sparse_coo",
    ),
    "returns meta": (
        returning(lambda z, calls: z.to("meta")),
        TypeError,
        "encoder must return a dense (strided) tensor with values, got a tensor on the meta device",
    ),
    "returns nested": (
        returning(lambda z, calls: torch.nested.nested_tensor(list(z.detach()))),
        TypeError,
        "encoder must return a dense (strided) tensor with values, got a nested tensor",
    ),
    "returns rows of different widths": (
        returning(lambda z, calls: z[:, :calls]),
        ValueError,
        "encoder must return rows of the same shape, got (1,) and (2,)",
    ),
    "returns another width in the second pass": (
        returning(lambda z, calls, seen=[]: (seen.append(1), z[:, :2] if len(seen) > 6 else z)[1]),
        RuntimeError,
        "encoder must return the same shape in both passes over the same rows, got (2, 4), then (2, 2)",
    ),
    "returns other imaginary numbers in the second pass": (
        returning(lambda z, calls, seen=[]: (seen.append(1), torch.complex(0 * z, len(seen) * z))[1])
        | {"loss_fn": lambda *z: torch.stack(z).abs().sum()},
        RuntimeError,
        "encoder gave different embeddings in the second pass over the same rows",
    ),
    "returns other numbers in the second pass": (
        returning(lambda z, calls, seen=[]: (seen.append(1), len(seen) * z)[1]),
        RuntimeError,
        "encoder gave different embeddings in the second pass over the same rows",
    ),
    "returns no graph": (
        returning(lambda z, calls: z.detach()),
        RuntimeError,
        "encoder must return embeddings that require a gradient, as its parameters do, got embeddings that do not",
    ),
    "nothing to learn": (
        {"encoder": nn.Flatten()},
        RuntimeError,
        "got one that does not require grad, because neither the encoder nor loss_fn has anything to learn",
    ),
    "frozen": ({"encoder": frozen()}, RuntimeError, "because neither the encoder nor loss_fn has anything to learn"),
    # the views
    "views are None": ({"views": None}, TypeError, "views must be a sequence, one element per view, got NoneType"),
    "views are a number": ({"views": 2}, TypeError, "views must be a sequence, one element per view, got int"),
    "views is a tensor": ({"views": X}, TypeError, "views must be a sequence of tensors, one per view, got one tensor"),
    "no views": ({"views": []}, ValueError, "views must hold at least one view, got an empty sequence"),
    "views are a NumPy array": ({"views": X.numpy()}, TypeError, "views[0] must be a torch.Tensor, got ndarray"),
    "view without rows": ({"views": [X[0], X[1, :0]]}, ValueError, "views[1] must have at least one row, got shape"),
    "view is a scalar": (
        {"views": [X[0, 0, 0], X[1]]},
        ValueError,
        "views[0] must have at least one row, got shape ()",
    ),
    "view on meta": (
        {"views": [X[0], X[1].to("meta")]},
        ValueError,
        "views[1] must have values, got a tensor on the meta device",
    ),
    "views of different lengths": (
        {"views": [X[0], X[1, :3]]},
        ValueError,
        "z_i and z_j must have the same shape, got (6, 4) and (3, 4)",  # raised by this loss; other losses accept them
    ),
    "view with keys that are not names": (
        {"views": [{"x": X[0]}, {3: X[1]}], "unpack": True},
        TypeError,
        "views[1] must have argument names as its keys, got 3",
    ),
    # the loss
    "loss is None": (of_loss(None), TypeError, "loss_fn must be a function of embeddings, got NoneType"),
    "loss is a string": (of_loss("nt_xent"), TypeError, "loss_fn must be a function of embeddings, got str"),
    "loss is a class": (
        of_loss(NTXentLoss),
        TypeError,
        "loss_fn must be a function of embeddings, got the class NTXentLoss: pass an instance of it",
    ),
    "loss returns None": (of_loss(lambda a, b: None), TypeError, "loss_fn must return a torch.Tensor, got NoneType"),
    "loss returns a float": (of_loss(lambda a, b: 1.0), TypeError, "loss_fn must return a torch.Tensor, got float"),
    "loss returns two tensors": (
        of_loss(lambda a, b: (a.sum(), b.sum())),
        TypeError,
        "loss_fn must return a torch.Tensor, got tuple",
    ),
    "loss returns a value for each row": (
        of_loss(NTXentLoss(reduction="none")),
        ValueError,
        "loss_fn must return a scalar, got shape (12,)",
    ),
    "loss returns an integer": (
        of_loss(lambda a, b: torch.tensor(3)),
        TypeError,
        "loss_fn must return a floating-point scalar, got torch.int64",
    ),
    "loss returns a complex number": (
        of_loss(lambda a, b: a.sum() + 0j),
        TypeError,
        "loss_fn must return a floating-point scalar, got torch.complex64",
    ),
    "loss returns a meta tensor": (
        of_loss(lambda a, b: a.sum().to("meta")),
        TypeError,
        "loss_fn must return a dense (strided) tensor with a value, got a tensor on the meta device",
    ),
    "loss returns a sparse tensor": (
        of_loss(lambda a, b: a.sum().to_sparse()),
        TypeError,
        "loss_fn must return a dense (strided) tensor with a value, got torch.sparse_coo",
    ),
    "loss returns a detached tensor": (
        of_loss(lambda a, b: LOSS(a, b).detach()),
        RuntimeError,
        "loss_fn must return a loss to differentiate, got one that does not require grad, although the embeddings do",
    ),
    "loss calls backward": (
        of_loss(with_backward),
        RuntimeError,
        "loss_fn must return the loss without calling its backward",
    ),
    # chunks
    **{
        f"chunks of {size!r}": ({"chunk_size": size}, error, f"chunk_size must be {says}")
        for size, error, says in (
            (0, ValueError, "at least 1, got 0"),
            (-1, ValueError, "at least 1, got -1"),
            (True, TypeError, "an int, got bool"),
            (2.0, TypeError, "an int, got float"),
            ("2", TypeError, "an int, got str"),
            ({2: 2}, TypeError, "an int, got dict"),
            (torch.tensor(2), TypeError, "an int, got Tensor"),
            ([3, -1, 4], ValueError, "at least 0, got -1"),
            ([3.0, 3.0], TypeError, "an int, got float"),
            ([[3, 3], 6], TypeError, "an int, got list"),
        )
    },
    "chunks of None": (
        {"chunk_size": None},
        TypeError,
        "either chunk_size or chunk_tokens must be given, but not both",
    ),
    "chunks are empty lists": ({"chunk_size": [[], []]}, ValueError, "chunk_size must list the number of rows of at"),
    "chunks of too many rows": (
        {"chunk_size": [3, 4]},
        ValueError,
        "chunk_size must add up to the 6 rows of views[0], got 7",
    ),
    **{
        f"tokens of {number!r}": ({"chunk_size": None, "chunk_tokens": number}, error, f"chunk_tokens must be {says}")
        for number, error, says in (
            (0, ValueError, "at least 1, got 0"),
            (True, TypeError, "an int, got bool"),
            (2.0, TypeError, "an int, got float"),
            ([2], TypeError, "an int, got list"),
        )
    },
    "lengths are None": (
        tokens(None),
        ValueError,
        "lengths must be the key of a mask with views[0]'s 6 rows, got None, shape",
    ),
    "lengths are an index of one row": (
        tokens(3),
        ValueError,
        "lengths must be the key of a mask with views[0]'s 6 rows, got 3, shape",
    ),
    "lengths are the key of a text": (
        {**tokens("text"), "views": [{"x": X[0], "text": "abc"}, X[1]]},
        ValueError,
        "lengths must be the key of a mask with views[0]'s 6 rows, got 'text', str",
    ),
    "lengths return None": (
        tokens(lambda view: None),
        TypeError,
        "lengths must give a number for each of the 6 rows of views[0], got NoneType",
    ),
    "lengths return a scalar": (
        tokens(lambda view: torch.tensor(6)),
        TypeError,
        "lengths must give a number for each of the 6 rows of views[0], got int",
    ),
    "lengths below zero": (tokens(lambda view: [-1] * len(view)), ValueError, "lengths must be at least 0, got -1"),
    # the encoder's arguments and output
    "unpack is a string": ({"unpack": "no"}, TypeError, "unpack must be a bool, got 'no'"),
    "kwargs are a number": ({"encoder_kwargs": 3}, TypeError, "encoder_kwargs must be a mapping, got int"),
    "kwargs with a key that is a number": (
        {"encoder_kwargs": {1: 2}},
        TypeError,
        "encoder_kwargs must have argument names as its keys, got 1",
    ),
    "output is a float": (
        {"output": 3.5},
        ValueError,
        "output must be a function, or a key, index or attribute of the output of encoder (Tensor), got 3.5",
    ),
    "output is a missing key": (
        {**returning(lambda z, calls: {"a": z}), "output": "b"},
        ValueError,
        "output must be a function, or a key, index or attribute of the output of encoder (dict with the keys 'a'), "
        "got 'b'",
    ),
    "output is an index beyond the last": (
        {**returning(lambda z, calls: (z,)), "output": 3},
        ValueError,
        "of the output of encoder (tuple of length 1), got 3",
    ),
    "output returns None": (
        {"output": lambda z: None},
        TypeError,
        "output, called with the result of encoder, must return a torch.Tensor, got NoneType",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_raises_an_error_that_names_the_argument_and_changes_nothing(name):
    options, error, message = BAD_CALLS[name]
    arguments = {"encoder": Encoder(), "views": X.unbind(), "loss_fn": LOSS, "chunk_size": 2, **options}
    torch.manual_seed(0)
    state, encoder = torch.get_rng_state(), arguments["encoder"]
    with pytest.raises(error, match=re.escape(message)):
        cached_backward(**arguments)
    assert torch.equal(torch.get_rng_state(), state)
    if isinstance(encoder, Encoder) and not encoder.calls.is_meta:
        assert encoder.calls == 0


def test_errors_raised_by_the_callers_functions_pass_through():
    def broken(*args: Any) -> Any:
        raise LookupError("mine")

    for options in (returning(broken), of_loss(broken), tokens(broken), {"output": broken}):
        with pytest.raises(LookupError, match="mine"):
            cached_backward(**{"encoder": Encoder(), "views": X.unbind(), "loss_fn": LOSS, "chunk_size": 2, **options})


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_nan_or_infinite_loss_is_returned_without_an_error(factor):
    encoder = nn.Linear(FEATURES, D)
    loss = cached_backward(encoder, X.unbind(), lambda a, b: LOSS(a, b) * factor, chunk_size=2)
    assert not loss.isfinite()
    assert encoder.weight.grad.isnan().any()


def test_embeddings_without_a_graph_are_accepted_if_the_loss_has_something_to_learn():
    loss_fn = NTXentLoss(learn_temperature=True)
    cached_backward(Encoder(lambda z, calls: z.detach()), X.unbind(), loss_fn, chunk_size=2)
    assert loss_fn.log_temperature.grad is not None
    outside = torch.ones((), requires_grad=True)
    cached_backward(Encoder(), X.unbind(), lambda a, b: outside, chunk_size=2)
    assert outside.grad == 1


def test_encoder_may_define_call_instead_of_forward():
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(FEATURES, D)

        def __call__(self, x: Tensor) -> Tensor:
            return self.layer(x)

    encoder = Called()
    cached_backward(encoder, X.unbind(), LOSS, chunk_size=2)
    assert encoder.layer.weight.grad is not None


def test_frozen_encoder_may_return_integers():
    encoders = [nn.Linear(FEATURES, D), Encoder(lambda z, calls: z.argmax(dim=1)).requires_grad_(False)]
    cached_backward(encoders, X.unbind(), nn.CrossEntropyLoss(), chunk_size=4)
    assert encoders[0].weight.grad is not None
