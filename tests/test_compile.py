"""torch.compile, torch.export and torch.jit.trace of the public functions of tensors, with changing batch sizes."""

from __future__ import annotations

import io

import pytest
import torch
import torch._dynamo.testing
import torch.fx.experimental.symbolic_shapes
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import fastntxent
from fastntxent import NTXentLoss
from tests.calls import CALLS, NO_CALLS, assert_same, outputs, public_names, views
from tests.cases import needs_constants
from tests.tiers import tiered

SIZES = (4, 7, 3, 12, 47, 16)

# These hold rows between calls: the position in the queue is state of the module, not a function of the inputs.
STATEFUL = {"QueueInfoNCELoss", "lightly.NTXentLoss bank"}
# This loss selects the distinct pairs. Their number depends on the data.
DATA_DEPENDENT = {"pytorch_metric_learning.SupConLoss pairs"}
WITHOUT_STATE = [name for name in CALLS if name not in STATEFUL]


def test_every_public_name_has_a_case():
    assert {name.split()[0] for name in CALLS} | NO_CALLS == public_names()


def counted(function):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


def scheduled(call):
    """Return a function of a temperature and the call's tensors. If the call makes a module, the function assigns the
    temperature to the module, as a schedule does."""
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


# Modules and drop-ins compile to the graphs of the functions that they call, so their cases are marked slow.
COMPILED = tiered(
    (name for name in WITHOUT_STATE if name not in DATA_DEPENDENT),
    slow=lambda name: "." in name or " " in name or name[0].isupper(),
)


@pytest.mark.parametrize("name", COMPILED)
def test_compile_needs_at_most_two_graphs_for_changing_sizes_and_temperatures(name):
    call = CALLS[name]
    run = scheduled(call)
    compiled, counter = counted(run)
    for n in SIZES:
        inputs = (0.3 + n / 100, *call.inputs(n))
        assert_same(compiled(*inputs), run(*inputs), inputs)
    assert counter.frame_count <= 2  # one for the first batch size, one for all others


# Losses and primitives that pass the caller's temperature on to an operator unchanged.
OF_A_FLOAT = [
    *(
        "nt_xent",
        "nt_xent_terms",
        "nt_xent ids",
        "multiview_nt_xent",
        "dcl",
        "dclw",
        "debiased",
        "hard_negative",
        "rince",
    ),
    *("sup_con", "sup_con in", "sup_con pairs", "info_nce", "info_nce shared", "clip", "neg_lse", "cross_neg_lse"),
    *("NTXentLoss", "SupConLoss", "CLIPLoss", "open_clip.ClipLoss", "pytorch_metric_learning.NTXentLoss"),
]


@needs_constants
@pytest.mark.parametrize("name", OF_A_FLOAT)
def test_a_float_temperature_is_a_constant_of_the_graph(name):
    call = CALLS[name]
    graphs, inputs = [], call.inputs(8)

    def keep(graph, examples):
        graphs.append(graph)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    compiled = torch.compile(call.at(0.25), fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    assert_same(compiled(*inputs), call.at(0.25)(*inputs), inputs)
    forward, backward = graphs
    taken = [node.meta["val"].shape for node in forward.graph.nodes if node.op == "placeholder"]
    assert sorted(taken) == sorted(x.shape for x in inputs)  # a CPU tensor among the inputs would prevent CUDA graphs
    temperatures = [number for graph in (forward, backward) for number in _temperatures(graph)]
    assert temperatures
    assert all(type(number) is float for number in temperatures)
    assert not any("_local_scalar_dense" in graph.code or ".item" in graph.code for graph in graphs)


def _temperatures(graph):
    """Yield the inv_tau argument of each call of our operators in the graph."""
    for node in graph.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.name.startswith("fastntxent::"):
            names = [argument.name for argument in schema.arguments]
            yield from (x for argument, x in zip(names, node.args, strict=True) if argument == "inv_tau")


@needs_constants
@pytest.mark.parametrize("name", ["nt_xent", "info_nce", "NTXentLoss"])
def test_a_changing_temperature_costs_one_more_graph(name):
    call, kernels = CALLS[name], []

    def keep(graph, examples):
        kernels.append(graph)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    run = scheduled(call)
    compiled = torch.compile(run, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    for n in range(6):
        inputs = (0.3 + n / 100, *call.inputs(8))
        assert_same(compiled(*inputs), run(*inputs), inputs)
    assert len(kernels) == 4  # forward and backward, for the first temperature and for all others


@needs_constants
@pytest.mark.parametrize(
    "loss",
    [
        lambda hardness, *z: fastntxent.info_nce(*z, 0.5, hardness_strength=hardness),
        lambda hardness, *z: fastntxent.hard_negative(*z, 0.5, tau_plus=0.1, beta=hardness),
    ],
    ids=["info_nce", "hard_negative"],
)
def test_a_changing_hardness_costs_one_more_graph(loss):
    kernels, inputs = [], [z.detach().requires_grad_() for z in views(8)]

    def keep(graph, examples):
        kernels.append(graph)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    for n in range(5):
        value = compiled(0.3 + n / 10, *inputs)
        value.backward()
        torch.testing.assert_close(value, loss(0.3 + n / 10, *inputs))
    assert len(kernels) == 4  # forward and backward, for the first hardness and for all others


def test_pytorch_that_cannot_detect_constants_compiles_the_same_loss(monkeypatch):
    monkeypatch.delattr(torch.fx.experimental.symbolic_shapes, "has_static_value", raising=False)
    torch._dynamo.reset()
    inputs = views(8)
    compiled = torch.compile(lambda *z: fastntxent.nt_xent(*z, 0.5), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), fastntxent.nt_xent(*inputs, 0.5))


class Tensors(nn.Module):
    """A loss with a tuple of tensors as its output, which export and tracing require."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *inputs):
        return tuple(outputs(self.call(*inputs)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", WITHOUT_STATE)
def test_jit_trace_gives_right_values_and_gradients_at_other_sizes(name):
    call = CALLS[name]
    torch.manual_seed(0)
    loss = Tensors(call.at(0.5))
    # Trace with inputs that need no gradient: inputs that need one must still get it from the traced loss. To check the
    # trace, torch.jit.trace traces a second time.
    traced = torch.jit.trace(loss, tuple(x.detach() for x in call.inputs(8)))
    assert "PythonOp" not in str(traced.graph)
    for n in (8, 12, 5):
        inputs = call.inputs(n)
        assert_same(traced(*inputs), loss(*inputs), inputs)


def dynamic(inputs):
    """Make the batch dimensions dynamic: usually the first, but the second of stacked views and both of a mask."""
    auto, n = torch.export.Dim.AUTO, 8
    return (tuple({dim: auto for dim, size in enumerate(x.shape) if size >= n} for x in inputs),)


# torchmultimodal's module clamps its parameter in place, which torch.export rejects.
EXPORTED = [
    name
    for name in WITHOUT_STATE
    if isinstance(CALLS[name].at(0.5), nn.Module) and name != "torchmultimodal.ContrastiveLossWithTemperature"
]


@pytest.mark.parametrize(
    "name",
    tiered(
        [*EXPORTED, "uniformity", "positive_ranks", "sup_contrast.SupConLoss mask"],
        slow=lambda name: "." in name or " " in name,
    ),
)
def test_export_gives_right_values_and_gradients_at_other_sizes(name):
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
