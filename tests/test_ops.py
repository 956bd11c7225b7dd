"""The registered operators: opcheck, compilation, transforms, autocast, and calls that raise."""

import importlib

import pytest
import torch
import torch._dynamo.testing
import torch.fx.experimental.proxy_tensor
import torch.overrides
from torch.utils._python_dispatch import TorchDispatchMode

from fastntxent import NTXentLoss, cross_neg_lse, error_budget, neg_lse, nt_xent, ops, split_views, sup_con
from fastntxent.opening import open_batch
from fastntxent.sides import Side
from tests.cases import BACKENDS, CUDA_KERNELS, KERNELS, needs_constants, needs_cuda, random_batch


@pytest.fixture(params=KERNELS)
def backend(request):
    return request.param


def views(n=6, d=4, dtype=torch.float32, requires_grad=True):
    z_i, z_j, *_ = random_batch(n, d, 0.5, dtype=dtype)
    return z_i.requires_grad_(requires_grad), z_j.requires_grad_(requires_grad)


def inverse_temperature(requires_grad=True):
    return torch.tensor(2.0, requires_grad=requires_grad)


def opcheck(name, arguments):
    """Run opcheck on both overloads: with inv_tau as a tensor, as in `arguments`, and as a float."""
    operator = getattr(torch.ops.fastntxent, name)
    torch.library.opcheck(operator.default, arguments)
    if "float" in operator.overloads():
        names = [argument.name for argument in operator.default._schema.arguments]
        floats = {"inv_tau": 2.0}
        torch.library.opcheck(
            operator.float, tuple(floats.get(each, x) for each, x in zip(names, arguments, strict=True))
        )


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("name", ["nt_xent_scalar", "nt_xent_rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nt_xent_operators_pass_opcheck(backend, name, normalize, dtype):
    z_i, z_j = views(dtype=dtype)
    mean = (True,) if name == "nt_xent_scalar" else ()
    opcheck(name, (z_i, z_j, inverse_temperature(), normalize, *mean, backend))


def test_neg_lse_operator_passes_opcheck(backend):
    u = torch.randn(6, 4, requires_grad=True)
    opcheck("neg_lse", (u, torch.arange(6) // 2, inverse_temperature(), backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_neg_lse_sum_operator_passes_opcheck(backend, dtype):
    u = torch.randn(6, 4, dtype=dtype, requires_grad=True)
    opcheck("neg_lse_sum", (u, torch.arange(6) // 2, inverse_temperature(), torch.ones(6), backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_cross_neg_lse_operator_passes_opcheck(backend, wanted, dtype):
    u, v = (torch.randn(rows, 4, dtype=dtype, requires_grad=need) for rows, need in zip((6, 9), wanted, strict=True))
    ids = torch.arange(6), torch.arange(9)
    opcheck("cross_neg_lse", (u, v, *ids, inverse_temperature(), backend))


@pytest.mark.parametrize("held", [0, 1, 9])
def test_held_neg_lse_passes_opcheck_and_equals_the_reference(backend, held):
    u, rows, k = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4), inverse_temperature()
    ids = torch.arange(6) % 3, torch.arange(9) % 4
    arguments = (u, rows, *ids, torch.tensor(held), k, backend)
    opcheck("held_neg_lse", arguments)
    opcheck(
        "held_neg_lse_backward",
        (torch.ones(6), *(t.detach() for t in arguments[:-1]), torch.ones(6), backend),
    )
    dense = open_batch(None, "held", {"u": u}, backend="reference")
    values = [
        ops.held_neg_lse(*arguments),
        dense.neg_lse_to_held(Side(u, ids[0]), Side(rows, ids[1]), k, torch.tensor(held)),
    ]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), (u, k)) for value in values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", ["out", "in", "ratio", "pairs"])
def test_sup_con_operator_passes_opcheck(backend, form, dtype):
    z = torch.randn(6, 4, dtype=dtype, requires_grad=True)
    opcheck("sup_con_scalar", (z, torch.arange(6) // 2, inverse_temperature(), form, True, True, backend))
    with pytest.raises(ValueError, match="form must be one of"):
        torch.ops.fastntxent.sup_con_scalar(z, torch.arange(6), inverse_temperature(), "both", True, True, backend)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_soft_dots_operators_pass_opcheck(needs):
    u, v = (torch.randn(n, 4, requires_grad=need) for n, need in zip((6, 9), needs, strict=True))
    teacher = (torch.randn(6, 5), torch.randn(9, 5), torch.arange(6), torch.arange(9), inverse_temperature(False))
    tensors = (u, v, *teacher, torch.full((6,), 4.0), torch.full((9,), 4.0))
    opcheck("soft_dots", tensors)
    opcheck("soft_dots_sum", (*tensors, *needs))
    detached = tuple(x.detach() for x in tensors)
    opcheck("soft_dots_backward", (torch.randn(6), torch.randn(9), *detached, *needs))
    opcheck("soft_dots_sum_backward", (torch.tensor(2.0), *detached[:2], *detached[:2]))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_guided_neg_lse_operators_pass_opcheck(needs):
    u, v = (torch.randn(n, 4, requires_grad=need) for n, need in zip((6, 9), needs, strict=True))
    guide, ids = (torch.randn(6, 5), torch.randn(9, 5)), (torch.arange(6), torch.arange(9))
    tensors = (u, v, *guide, *ids, inverse_temperature(), torch.linspace(-9, 2, 6))
    opcheck("guided_neg_lse", tensors)
    detached = tuple(x.detach() for x in tensors)
    nu = torch.ops.fastntxent.guided_neg_lse(*detached)
    opcheck("guided_neg_lse_backward", (torch.randn(6), *detached, nu, *needs))


def test_copy_now_operator_passes_opcheck():
    torch.library.opcheck(torch.ops.fastntxent.copy_now.default, (torch.randn(6, 4)[:3],))


def test_value_operator_passes_opcheck_and_has_no_gradient(backend):
    opcheck("nt_xent_value", (*views(requires_grad=False), inverse_temperature(False), True, False, backend))
    loss = torch.ops.fastntxent.nt_xent_value(*views(), inverse_temperature(), True, False, backend)
    with pytest.raises(RuntimeError, match="use fastntxent::nt_xent_scalar"):
        loss.backward()


@pytest.mark.parametrize("k", [2.0, inverse_temperature()])
def test_eager_calls_give_the_bits_of_the_operators(backend, k):
    z_i, z_j = views(20, 8)
    calls = {
        "nt_xent_scalar": (z_i, z_j, k, True, True, backend),
        "nt_xent_rows": (z_i, z_j, k, True, backend),
        "neg_lse": (z_i, torch.arange(20), k, backend),
        "neg_lse_sum": (z_i, torch.arange(20), k, torch.linspace(-1, 2, 20), backend),
        "cross_neg_lse": (z_i, z_j, torch.arange(20), torch.arange(20), k, backend),
        "sup_con_scalar": (z_i, torch.arange(20) // 3, k, "in", True, True, backend),
    }
    for name, arguments in calls.items():
        results = []
        for call in (getattr(ops, name), getattr(torch.ops.fastntxent, name)):
            outputs = call(*arguments)
            outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
            outputs = outputs[:1] if name in ("nt_xent_scalar", "neg_lse_sum", "sup_con_scalar") else outputs
            total = sum((output * 1.5).sum() for output in outputs)
            inputs = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
            results.append([*outputs, *torch.autograd.grad(total, inputs)])
        for short, whole in zip(*results, strict=True):
            assert torch.equal(short, whole), name


def test_backward_operators_pass_opcheck(backend):
    z_i, z_j = views(requires_grad=False)
    k = inverse_temperature(requires_grad=False)
    ids, weights = torch.arange(6).repeat(2), torch.randn(12)
    u = torch.cat((z_i, z_j))
    nu = ops.neg_lse(u, ids, k, backend)
    calls = {
        "neg_lse_backward": (weights, u, ids, k, nu, backend),
        "nt_xent_rows_backward": (weights, weights, z_i, z_j, k, nu, True, backend),
        "cross_neg_lse_backward": (weights, weights, u, u, ids, ids, k, nu, nu, True, False, backend),
        "nt_xent_scalar_backward": (torch.tensor(2.0), z_i, z_j, k, z_i, z_j, k),
        "neg_lse_sum_backward": (torch.tensor(2.0), u, k, u, k),
    }
    for name, arguments in calls.items():
        opcheck(name, arguments)


def test_pair_operators_pass_opcheck():
    u, v = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    a, b = torch.tensor([0, 3, 3, 5]), torch.tensor([4, 0, 0, 2])
    torch.library.opcheck(torch.ops.fastntxent.pair_dots.default, (u, v, a, b))
    torch.library.opcheck(torch.ops.fastntxent.mask_product.default, (torch.rand(3, 6) < 0.5, u))
    torch.library.opcheck(torch.ops.fastntxent.positive_ranks.default, (u.detach(),))


def test_pair_dots_rejects_negative_indices():
    u, none = torch.randn(4, 3), torch.tensor([-1])
    for a, b in ((none, none + 1), (none + 1, none)):
        with pytest.raises(IndexError, match="out of range"):
            ops.pair_dots(u, u, a, b)


@pytest.mark.parametrize("chunk", [1, 8, 2**20])
def test_pair_operators_equal_the_dense_product_whatever_the_chunk_size(monkeypatch, chunk):
    monkeypatch.setattr(ops.pairs, "_CHUNK", chunk)
    u, v = torch.randn(6, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    a, b, mask = torch.tensor([0, 3, 3, 5]), torch.tensor([4, 0, 0, 2]), torch.rand(3, 6) < 0.5
    results = [
        (ops.pair_dots(u, v, a, b), ops.mask_product(mask, u)),
        ((u @ v.T)[a, b], mask.float().fill_diagonal_(0) @ u),
    ]
    gradients = [torch.autograd.grad((d * torch.arange(4)).sum() + m.square().sum(), (u, v)) for d, m in results]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_mask_product_has_a_gradient_for_a_mask_of_any_dtype(dtype):
    mask, x = torch.rand(4, 6, dtype=dtype, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    dense = (mask.float() * (1 - torch.eye(4, 6))) @ x
    gradients = [torch.autograd.grad(out.square().sum(), (mask, x)) for out in (ops.mask_product(mask, x), dense)]
    torch.testing.assert_close(*gradients)


def test_traced_mask_product_has_a_gradient_for_a_mask_that_needs_one_later():
    mask, x = torch.rand(4, 6), torch.randn(6, 3)
    traced = torch.jit.trace(lambda mask: ops.mask_product(mask, x), (mask,), check_trace=False)
    mask = torch.rand(4, 6, requires_grad=True)
    expected = (1 - torch.eye(4, 6)) * x.sum(dim=1)
    torch.testing.assert_close(torch.autograd.grad(traced(mask).sum(), mask)[0], expected)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx_graph_takes_the_temperature_as_an_input(backend, tracing_mode):
    trace = torch.fx.experimental.proxy_tensor.make_fx(
        lambda a, b, tau: nt_xent(a, b, tau, backend=backend), tracing_mode=tracing_mode
    )
    graph = trace(*views(requires_grad=False), torch.tensor(0.5))
    z_i, z_j = views(requires_grad=False)
    torch.testing.assert_close(graph(z_i, z_j, torch.tensor(0.2)), nt_xent(z_i, z_j, 0.2, backend=backend))


def test_torch_function_modes_see_the_operators(backend):
    class Watch(torch.overrides.TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch() as watch:
        nt_xent(*views(), backend=backend)
    assert "fastntxent.nt_xent_scalar.float" in watch.seen


class Step(torch.nn.Module):
    def __init__(self, backend, **options):
        super().__init__()
        self.encoder = torch.nn.Linear(5, 4)
        self.loss = NTXentLoss(0.3, backend=backend, **options)

    def forward(self, x_i, x_j):
        return self.loss(self.encoder(x_i), self.encoder(x_j)).sum()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"learn_temperature": True}], ids=["mean", "none", "learnt temperature"]
)
def test_compile_fullgraph_gives_the_same_gradients_and_recompiles_once(name, options):
    torch.manual_seed(0)
    torch._dynamo.reset()
    step = Step(name, **options)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for n in (8, 12, 7, 33):
        x = torch.randn(2, n, 5)
        gradients = []
        for run in (step, compiled):
            step.zero_grad()
            run(*x).backward()
            gradients.append([p.grad.clone() for p in step.parameters()])
        for expected, value in zip(*gradients, strict=True):
            torch.testing.assert_close(value, expected)
    assert counter.frame_count <= 2  # one compilation for the first batch size, one for all others


@needs_constants
@pytest.mark.parametrize("name", BACKENDS)
def test_compile_of_a_temperature_schedule_recompiles_once(name):
    torch._dynamo.reset()
    z_i, z_j = views()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda a, b, tau: nt_xent(a, b, tau, backend=name), fullgraph=True, backend=counter)
    for tau in (0.5, 0.4, 0.3, 0.2, 0.1):
        torch.testing.assert_close(compiled(z_i, z_j, tau), nt_xent(z_i, z_j, tau, backend=name))
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKENDS)
def test_compile_with_dynamic_true_gives_the_same_value(name):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda z: nt_xent(*split_views(z, "interleaved"), backend=name), fullgraph=True, dynamic=True
    )
    z = torch.randn(12, 4)
    torch.testing.assert_close(compiled(z), nt_xent(z[0::2], z[1::2], backend=name))


def test_compile_with_inductor_gives_the_same_gradient(backend):
    torch._dynamo.reset()
    step = Step(backend)
    x = torch.randn(2, 8, 5)
    expected = torch.autograd.grad(step(*x), step.encoder.weight)
    value = torch.autograd.grad(torch.compile(step, fullgraph=True)(*x), step.encoder.weight)
    torch.testing.assert_close(value, expected)


def test_compiled_call_with_bad_temperature_tensor_raises(backend):
    torch._dynamo.reset()
    z_i, z_j = views()
    compiled = torch.compile(lambda a, b, t: nt_xent(a, b, t, backend=backend), backend="aot_eager")
    with pytest.raises(ValueError, match="1 / temperature must be positive and finite"):
        compiled(z_i, z_j, torch.tensor(-1.0))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_func_grad_equals_reference(backend, reduction):
    z_i, z_j = views(requires_grad=False)

    def loss(z, tau, name):
        return nt_xent(z, z_j, tau, reduction=reduction, backend=name).square().sum()

    value = torch.func.grad(loss, argnums=(0, 1))(z_i, torch.tensor(0.5), backend)
    expected = torch.func.grad(loss, argnums=(0, 1))(z_i, torch.tensor(0.5), "reference")
    torch.testing.assert_close(value, expected)


def test_func_vmap_of_grad_equals_reference(backend):
    z = torch.randn(3, 6, 4)

    def gradients(name):
        return torch.func.vmap(torch.func.grad(lambda z: nt_xent(z, z + 1, 0.3, backend=name)))(z)

    torch.testing.assert_close(gradients(backend), gradients("reference"))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_around_a_vmap_equals_reference(backend, reduction):
    # In float64, because no error budget covers a sum of squares in float32.
    z, others = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    z.requires_grad_()

    def total(z, name):
        def loss(a, b):
            return nt_xent(a, b, 0.3, reduction=reduction, backend=name)

        return torch.func.vmap(loss)(z, others).square().sum()

    expected = torch.func.grad(total)(z.detach(), "reference")
    torch.testing.assert_close(torch.func.grad(total)(z.detach(), backend), expected)
    torch.testing.assert_close(torch.autograd.grad(total(z, backend), z)[0], expected)


def test_func_vmap_over_another_dimension_equals_reference(backend):
    z, others = torch.randn(6, 3, 4), torch.randn(3, 6, 4)

    def losses(name):
        return torch.func.vmap(lambda a, b: nt_xent(a, b, 0.3, backend=name), in_dims=(1, 0))(z, others)

    torch.testing.assert_close(losses(backend), losses("reference"))


def test_half_precision_gradient_is_rounded_after_its_scaling(backend):
    # A converged batch: float16 can hold the gradients only after a loss scaler has multiplied them.
    z_i = random_batch(40, 64, 0.05, dtype=torch.float16).z_i
    z_j = z_i.clone()
    _, truth = error_budget.true_loss_and_gradient(z_i, z_j, 0.05)
    assert truth.abs().max() < 1e-6
    scale = 1 / float(truth.abs().max())
    (nt_xent(z_i.requires_grad_(), z_j, 0.05, backend=backend) * scale).backward()
    assert error_budget.errors_of(z_i.grad, truth[:40] * scale).rms < torch.finfo(torch.float16).eps


def test_func_jacrev_equals_reference(backend):
    z = torch.randn(5, 4)

    def jacobian(name):
        return torch.func.jacrev(lambda z: nt_xent(z, z + 1, 0.3, reduction="none", backend=name))(z)

    torch.testing.assert_close(jacobian(backend), jacobian("reference"))


REFUSED = "pass backend='reference'"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("by", ["z_i", "temperature"])
def test_second_derivative_is_refused_with_advice(backend, reduction, by):
    z_i, z_j = views()
    inputs = {"z_i": z_i, "temperature": torch.tensor(0.5, requires_grad=True)}
    loss = nt_xent(z_i, z_j, inputs["temperature"], reduction=reduction, backend=backend).sum()
    (gradient,) = torch.autograd.grad(loss, inputs[by], create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        gradient.square().sum().backward()


@pytest.mark.parametrize(
    "loss",
    [
        lambda u, ids, name: neg_lse(u, ids, 0.5, backend=name),
        lambda u, ids, name: cross_neg_lse(u, u.detach() + 1, ids, ids, 0.5, backend=name).rows,
    ],
    ids=["neg_lse", "cross_neg_lse"],
)
def test_neg_lse_second_derivative_is_refused_with_advice(backend, loss):
    u = torch.randn(6, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(u, torch.arange(6), backend).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        gradient.sum().backward()


def test_compiled_and_transformed_cross_neg_lse_equals_reference(backend):
    torch._dynamo.reset()
    ids = torch.arange(6), torch.arange(9)

    def total(u, v, name=backend):
        nus = cross_neg_lse(u, v, *ids, 0.5, backend=name)
        return nus.rows.sum() + 2 * nus.cols.sum()

    u, v = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    expected = torch.autograd.grad(total(u, v, "reference"), (u, v))
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(u, v), (u, v)), expected)
    torch.testing.assert_close(torch.autograd.grad(compiled(u, v.detach()), u), expected[:1])
    torch.testing.assert_close(torch.func.grad(total, argnums=(0, 1))(u, v), expected)
    many = torch.func.vmap(torch.func.grad(total), in_dims=(0, None))(u.expand(2, 6, 4), v)
    torch.testing.assert_close(many, expected[0].expand(2, 6, 4))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.grad(lambda z: torch.func.grad(f)(z).sum()),
        torch.func.hessian,
        lambda f: lambda z: torch.func.jvp(f, (z,), (z,)),
    ],
    ids=["grad of grad", "hessian", "jvp"],
)
def test_func_second_and_forward_derivatives_are_refused_with_advice(backend, transform):
    with pytest.raises(RuntimeError, match=REFUSED):
        transform(lambda z: nt_xent(z, z + 1, backend=backend))(torch.randn(6, 4))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_keeps_sums_in_float32(name, dtype, reduction):
    z_i, z_j, *_ = random_batch(40, 16, 0.1)
    expected = [z.clone().requires_grad_() for z in (z_i, z_j)]
    nt_xent(*expected, 0.1, reduction=reduction, backend=name).sum().backward()
    value = [z.clone().requires_grad_() for z in (z_i, z_j)]
    with torch.autocast("cpu", dtype=dtype):
        loss = nt_xent(*value, 0.1, reduction=reduction, backend=name)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    for v, e in zip(value, expected, strict=True):
        assert torch.equal(v.grad, e.grad)


@pytest.mark.parametrize("name", BACKENDS)
def test_autocast_leaves_neg_lse_alone(name):
    u = torch.nn.functional.normalize(torch.randn(20, 16), dim=1)
    expected = neg_lse(u, torch.arange(20), 0.1, backend=name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(neg_lse(u, torch.arange(20), 0.1, backend=name), expected)


def test_autocast_is_off_inside_the_kernels(backend, monkeypatch):
    kernels = type(importlib.import_module("fastntxent.backends").select(backend, "cpu", torch.float32))
    states = []

    def watch(original):
        def watched(self, *args):
            states.append(torch.is_autocast_enabled("cpu"))
            return original(self, *args)

        return watched

    for method in ("nt_xent_scalar", "nt_xent_rows", "nt_xent_rows_backward"):
        monkeypatch.setattr(kernels, method, watch(getattr(kernels, method)))
    z_i, z_j = views()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nt_xent(z_i, z_j, backend=backend).backward()
        nt_xent(z_i, z_j, reduction="none", backend=backend).sum().backward()
    assert states == [False] * 3


class Recorder(TorchDispatchMode):
    """Records the names of the package's operators as they are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastntxent":
            self.names.append(func.name().removeprefix("fastntxent::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("wants", ["z_i", "z_j", "temperature"])
def test_scalar_path_is_used_if_a_gradient_is_needed(backend, wants):
    arguments = dict(zip(("z_i", "z_j"), views(requires_grad=False), strict=True), temperature=torch.tensor(0.5))
    with Recorder() as recorder:
        nt_xent(**arguments, backend=backend)
        arguments[wants].requires_grad_()
        nt_xent(**arguments, backend=backend).backward()
        nt_xent(**arguments, reduction="none", backend=backend).sum().backward()
        with torch.no_grad():
            nt_xent(**arguments, backend=backend)
    assert recorder.names == [
        "nt_xent_value",
        "nt_xent_scalar",  # its backward only multiplies the saved gradients
        *("nt_xent_rows", "nt_xent_rows_backward"),
        "nt_xent_value",
    ]


def test_autocast_around_the_backward_changes_nothing(backend):
    z_i, z_j = views()
    (expected,) = torch.autograd.grad(nt_xent(z_i, z_j, reduction="none", backend=backend).sum(), z_i)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (value,) = torch.autograd.grad(nt_xent(z_i, z_j, reduction="none", backend=backend).sum(), z_i)
    assert torch.equal(value, expected)


def test_autocast_model_trains_through_the_loss(backend):
    encoder = torch.nn.Linear(5, 4)
    x = torch.randn(2, 8, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_i, z_j = encoder(x[0]), encoder(x[1])
        assert z_i.dtype == torch.bfloat16
        loss = nt_xent(z_i, z_j, 0.1, backend=backend)
    loss.backward()
    assert loss.dtype == torch.float32
    assert encoder.weight.grad.isfinite().all()


def test_no_grad_and_inference_mode_give_the_same_value(backend):
    z_i, z_j = views()
    expected = nt_xent(z_i, z_j, backend=backend).detach()
    with torch.no_grad():
        torch.testing.assert_close(nt_xent(z_i, z_j, backend=backend), expected, rtol=3e-7, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(nt_xent(z_i, z_j, backend=backend), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradient(backend, use_reentrant):
    z_i, z_j = views()
    (expected,) = torch.autograd.grad(nt_xent(z_i, z_j, backend=backend), z_i)
    loss = torch.utils.checkpoint.checkpoint(
        lambda a, b: nt_xent(a, b, backend=backend), z_i, z_j, use_reentrant=use_reentrant
    )
    loss.backward()
    assert torch.equal(z_i.grad, expected)


def test_calls_from_several_threads_agree(backend):
    from concurrent.futures import ThreadPoolExecutor

    def gradient(seed):
        z_i, z_j, *_ = random_batch(100, 8, 0.5, seed=seed)
        return torch.autograd.grad(nt_xent(z_i.requires_grad_(), z_j, backend=backend), z_i)[0]

    expected = [gradient(seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for value, single in zip(pool.map(gradient, range(8)), expected, strict=True):
            torch.testing.assert_close(value, single)


def test_loss_of_meta_tensors_has_the_right_shapes():
    z = torch.empty(6, 4, device="meta", requires_grad=True)
    loss = nt_xent(z, z.detach(), 0.5)
    loss.backward()
    assert loss.shape == ()
    assert z.grad.shape == z.shape
    assert neg_lse(z, torch.empty(6, dtype=torch.long, device="meta"), 0.5).shape == (6,)


@needs_cuda
@pytest.mark.parametrize("backend", CUDA_KERNELS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cuda_step_never_waits_for_the_device(backend, reduction):
    z_i, z_j = (z.detach().cuda().requires_grad_() for z in views(300, 32))
    temperature = torch.tensor(0.5, device="cuda", requires_grad=True)

    def step():
        nt_xent(z_i, z_j, temperature, reduction=reduction, backend=backend).sum().backward()

    step()  # the first call loads kernels and may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Cut(torch.autograd.Function):
    """An identity whose backward returns None."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, d_x):
        return None


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_gradient_of_none_gives_no_gradient(backend, reduction):
    z_i, z_j = torch.randn(2, 8, 4).unbind()
    z_i.requires_grad_()
    Cut.apply(nt_xent(z_i, z_j, backend=backend, reduction=reduction)).sum().backward()
    assert z_i.grad is None or not z_i.grad.any()
    Cut.apply(sup_con(z_i, torch.arange(8) // 2, backend=backend, reduction=reduction)).sum().backward()
    assert z_i.grad is None or not z_i.grad.any()
