"""torch.compile, torch.export and torch.jit.trace of every public function of tensors, at changing batch sizes."""

from __future__ import annotations

import io

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from fastntxent import NTXentLoss
from tests.calls import CALLS, NO_CALLS, assert_same, outputs, public_names, views

SIZES = (4, 7, 3, 12, 47, 16)

# Rows held between calls: a pointer of the module's, not a function of the inputs.
STATEFUL = {"QueueInfoNCELoss", "lightly.NTXentLoss bank"}
# Takes the distinct pairs, as many as there are: a size that no graph knows.
DATA_DEPENDENT = {"pytorch_metric_learning.SupConLoss pairs"}
WITHOUT_STATE = [name for name in CALLS if name not in STATEFUL]


def test_every_public_name_has_a_case():
    assert {name.split()[0] for name in CALLS} | NO_CALLS == public_names()


def counted(function):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


def scheduled(call):
    """The call with its temperature as the first argument: a module's is set, as a schedule does."""
    if not call.temperature:
        loss = call.make()
        return lambda tau, *tensors: loss(*tensors)
    loss = call.at(0.5)
    if not isinstance(loss, nn.Module):
        return lambda tau, *tensors: call.at(tau)(*tensors)

    def run(tau, *tensors):
        getattr(loss, "loss", loss).temperature = tau
        return loss(*tensors)

    return run


@pytest.mark.parametrize("name", [name for name in WITHOUT_STATE if name not in DATA_DEPENDENT])
def test_compile_takes_two_graphs_at_changing_sizes_and_temperatures(name):
    call = CALLS[name]
    run = scheduled(call)
    compiled, counter = counted(run)
    for n in SIZES:
        inputs = (0.3 + n / 100, *call.inputs(n))
        assert_same(compiled(*inputs), run(*inputs), inputs)
    assert counter.frame_count <= 2  # the first batch size, and then any


class Tensors(nn.Module):
    """A loss whose outputs are a tuple of tensors, which export and tracing want."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *inputs):
        return tuple(outputs(self.call(*inputs)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", WITHOUT_STATE)
def test_jit_trace_gives_value_and_gradient_of_other_sizes(name):
    call = CALLS[name]
    torch.manual_seed(0)
    loss = Tensors(call.at(0.5))
    # Traced without a wish for gradients, and checked by a second trace.
    traced = torch.jit.trace(loss, tuple(x.detach() for x in call.inputs(8)))
    assert "PythonOp" not in str(traced.graph)
    for n in (8, 12, 5):
        inputs = call.inputs(n)
        assert_same(traced(*inputs), loss(*inputs), inputs)


def dynamic(inputs):
    """The first dimension of each tensor, or the second of stacked views, or both of a mask."""
    auto, n = torch.export.Dim.AUTO, 8
    return (tuple({dim: auto for dim, size in enumerate(x.shape) if size >= n} for x in inputs),)


# torchmultimodal's clamps its parameter in place, which torch.export refuses.
EXPORTED = [
    name
    for name in WITHOUT_STATE
    if isinstance(CALLS[name].at(0.5), nn.Module) and name != "torchmultimodal.ContrastiveLossWithTemperature"
]


@pytest.mark.parametrize("name", [*EXPORTED, "uniformity", "positive_ranks", "sup_contrast.SupConLoss mask"])
def test_export_gives_value_and_gradient_of_other_sizes(name):
    call = CALLS[name]
    loss = Tensors(call.at(0.5))
    inputs = call.inputs(8)
    program = torch.export.export(loss, inputs, dynamic_shapes=dynamic(inputs), strict=False).module()
    for n in (8, 12, 33):
        inputs = call.inputs(n)
        assert_same(program(*inputs), loss(*inputs), inputs)


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_a_model_loads_after_saving(strict):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.loss = nn.Linear(4, 3), NTXentLoss(learn_temperature=True)

        def forward(self, x_i, x_j):
            return self.loss(self.encoder(x_i), self.encoder(x_j))

    model = Model()
    inputs = views(8)
    program = torch.export.export(model, inputs, dynamic_shapes=dynamic(inputs)[0], strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    inputs = views(11)
    torch.testing.assert_close(loaded(*inputs), model(*inputs))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_traced_call_with_a_bad_temperature_raises():
    loss = Tensors(lambda a, b, tau: NTXentLoss(tau)(a, b))
    traced = torch.jit.trace(loss, (*views(4), torch.tensor(0.5)), check_trace=False)
    with pytest.raises(RuntimeError, match="1 / temperature must be positive and finite"):
        traced(*views(4), torch.tensor(-0.5))
