"""Gradient caching in real set-ups: several encoders, mappings and dataclasses as inputs, tokens, AMP, ranks."""

import collections
import copy
import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from fastntxent import CLIPLoss, MultiViewNTXentLoss, NTXentLoss, cached_backward, clip, nt_xent
from tests.ranks import on_ranks

EXACT = {"atol": 1e-12, "rtol": 1e-12}
N, WIDTH, D = 10, 7, 5


def gradients(*modules):
    return [None if p.grad is None else p.grad.clone() for module in modules for p in module.parameters()]


class Encoding(collections.UserDict):
    """Like Hugging Face's BatchEncoding: a mapping that is not a dict and whose items are also attributes."""

    def __init__(self, data, n_sequences):
        super().__init__(data)
        self.n_sequences = n_sequences

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A user's batch class, which cannot be copied by calling its constructor."""

    pixels: torch.Tensor
    nested: dict
    temperature: torch.Tensor
    name: str = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "name", "images")


class Pair(collections.namedtuple("Pair", "pixels scale")):
    pass


@dataclasses.dataclass
class Output:
    pooler_output: torch.Tensor
    rows: tuple


class Image(nn.Module):
    """An encoder with dropout that accepts pixels in every container of this file."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, D)).double()

    def forward(self, inputs, shift=0.0):
        if isinstance(inputs, Inputs):
            assert inputs.name == "images"
            inputs = inputs.pixels * inputs.nested["scale"][0] * inputs.temperature
        elif isinstance(inputs, Pair):
            inputs = inputs.pixels * inputs.scale
        elif isinstance(inputs, (list, tuple)):
            inputs = sum(inputs)
        elif isinstance(inputs, Mapping):
            inputs = inputs["pixels"]
        return self.layers(inputs) + shift


class Text(nn.Module):
    """Like a Hugging Face model: called with keyword arguments; the embeddings are one field of the output."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(11, 8).double(), nn.Linear(8, D).double()
        self.dropout, self.seen = nn.Dropout(0.3), []

    def forward(self, input_ids, attention_mask, normalise=False, note=None):
        self.seen.append(attention_mask.sum().item())
        words = self.dropout(self.words(input_ids)) * attention_mask[..., None]
        mean = words.sum(1) / attention_mask.sum(1, keepdim=True)
        z = self.head(mean)
        return Output(nn.functional.normalize(z) if normalise else z, (mean, z))


def pixels():
    return torch.randn(N, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def lengths():
    return torch.tensor([3, 1, 7, 2, 2, 5, 1, 1, 6, 4])


def text_inputs(kind=Encoding):
    ids = torch.randint(11, (N, WIDTH), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(WIDTH) < lengths()[:, None]).long()
    data = {"input_ids": ids, "attention_mask": mask, "note": "as it is"}
    return kind(data, n_sequences=1) if kind is Encoding else kind(data)


def chunked(call, sizes):
    """Return the embeddings of one pass over the chunks, which stores all activations. `call` takes a slice of rows."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return torch.cat([call(slice(end - size, end)) for end, size in zip(ends, sizes, strict=True)])


def of_chunks(encoder, x):
    return chunked(lambda rows: encoder(x[rows].clone()), BY_FOUR)


def rows_of(inputs, rows):
    return {key: value[rows] if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}


BY_FOUR = [4, 4, 2]


def clip_step(image, text, loss_fn, sizes=BY_FOUR):
    """The uncached step of an image tower and a text tower."""
    torch.manual_seed(3)
    x, words = pixels(), text_inputs()
    z_i = chunked(lambda rows: image(x[rows]), sizes)
    z_t = chunked(lambda rows: text(**rows_of(words, rows)).pooler_output, sizes)
    loss = loss_fn(z_i, z_t)
    loss.backward()
    return loss.detach()


def cached_clip_step(image, text, loss_fn, **options):
    torch.manual_seed(3)
    chunks = {} if "chunk_tokens" in options else {"chunk_size": 4}
    arguments = {"unpack": True, "output": [None, "pooler_output"], **chunks, **options}
    return cached_backward([image, text], [pixels(), text_inputs()], loss_fn, **arguments)


def towers():
    torch.manual_seed(0)
    return Image(), Text(), CLIPLoss(0.2, learn_temperature=True).double()


def test_two_towers_equal_the_uncached_step():
    image, text, loss_fn = towers()
    plain = copy.deepcopy((image, text, loss_fn))
    loss, expected = cached_clip_step(image, text, loss_fn), clip_step(*plain)
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(gradients(image, text, loss_fn), gradients(*plain), **EXACT)


@pytest.mark.parametrize("frozen", ["image", "text"])
def test_a_frozen_tower_runs_once(frozen):
    image, text, loss_fn = towers()
    runs: collections.Counter = collections.Counter()

    def count(module, args, out):
        runs.update(["image" if isinstance(out, torch.Tensor) else "text"])
        module.statistics(out if isinstance(out, torch.Tensor) else out.rows[1])

    for tower in (image, text):
        tower.statistics = nn.BatchNorm1d(D, affine=False).double()
        tower.register_forward_hook(count)
    (image if frozen == "image" else text).requires_grad_(False)
    plain = copy.deepcopy((image, text, loss_fn))
    runs.clear()
    cached_clip_step(image, text, loss_fn)
    assert runs == {frozen: 3, "image" if frozen == "text" else "text": 6}
    clip_step(*plain)
    torch.testing.assert_close(gradients(image, text, loss_fn), gradients(*plain), **EXACT)
    for tower, expected in zip((image, text), plain[:2], strict=True):
        torch.testing.assert_close(list(tower.buffers()), list(expected.buffers()))


def test_a_frozen_tower_that_shares_state_runs_in_both_passes():
    class Counting(nn.Module):
        def __init__(self, counter):
            super().__init__()
            self.counter, self.linear = counter, nn.Linear(6, D).double()

        def forward(self, x):
            self.counter.steps = self.counter.steps + 1
            return self.linear(x) * self.counter.steps

    def step(by):
        torch.manual_seed(0)
        counter = nn.Module()
        counter.register_buffer("steps", torch.zeros((), dtype=torch.float64))
        frozen, learning = Counting(counter).requires_grad_(False), Counting(counter)
        by(frozen, learning)
        return gradients(learning), counter.steps

    def uncached(*encoders):
        nt_xent(*(of_chunks(encoder, pixels()) for encoder in encoders)).backward()

    found = step(lambda *encoders: cached_backward(encoders, 2 * [pixels()], nt_xent, chunk_size=4))
    torch.testing.assert_close(found, step(uncached), **EXACT)


def test_one_encoder_may_serve_several_of_the_views():
    query, document = Image(), Image()
    plain = copy.deepcopy((query, document))
    views, loss_fn = [pixels(), pixels() + 1, pixels() - 1], MultiViewNTXentLoss(0.3)
    torch.manual_seed(3)
    cached_backward(nn.ModuleList([query, document, document]), views, lambda *z: loss_fn(z), chunk_size=4)
    torch.manual_seed(3)
    of_views = zip((plain[0], plain[1], plain[1]), views, strict=True)
    loss_fn([of_chunks(encoder, x) for encoder, x in of_views]).backward()
    torch.testing.assert_close(gradients(query, document), gradients(*plain), **EXACT)


SHAPES = {
    "dict": lambda x: {"pixels": x, "other": None},
    "ordered": lambda x: collections.OrderedDict(pixels=x),
    "read-only": lambda x: types.MappingProxyType({"pixels": x}),
    "mapping": lambda x: Encoding({"pixels": x}, n_sequences=1),
    "dataclass": lambda x: Inputs(x, {"scale": [torch.ones(N, 1, dtype=x.dtype)]}, torch.ones((), dtype=x.dtype)),
    "named tuple": lambda x: Pair(x, torch.ones(N, 1, dtype=x.dtype)),
    "list": lambda x: [x, torch.zeros_like(x)],
    "tuple": lambda x: (x, torch.zeros_like(x)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_in_any_container_give_the_result_of_a_tensor(shape):
    found = []
    for make in (SHAPES[shape], lambda x: x):
        torch.manual_seed(0)
        encoder = Image()
        types_seen: set[type] = set()
        encoder.register_forward_pre_hook(lambda module, args, seen=types_seen: seen.add(type(args[0])))
        loss = cached_backward(encoder, [make(pixels()), make(pixels() + 1)], nt_xent, chunk_size=4)
        assert types_seen == {dict if shape == "read-only" and make is SHAPES[shape] else type(make(pixels()))}
        found.append((loss, gradients(encoder)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_unpack_passes_the_elements_of_an_input_as_separate_arguments():
    class Noting(Image):
        def forward(self, *args, **kwargs):
            noted.append((len(args), sorted(kwargs)))
            return super().forward(kwargs.get("pixels", args[0] if args else None))

    x = pixels()
    for unpack, view, expected in (
        (False, {"pixels": x}, (1, [])),
        (True, {"pixels": x}, (0, ["pixels"])),
        (True, [x, x], (2, [])),
        (False, [x, x], (1, [])),
        (True, x, (1, [])),
    ):
        noted: list = []
        cached_backward(Noting(), [view, view], nt_xent, chunk_size=N, unpack=unpack)
        assert noted == 4 * [expected]


def test_an_encoder_that_writes_to_its_inputs_does_not_change_the_views():
    class Writing(Image):
        def forward(self, inputs, shift=0.0):
            inputs["z"] = super().forward(inputs["pixels"].mul_(2))
            return inputs

    view = {"pixels": pixels()}
    cached_backward(Writing(), [view, view], nt_xent, chunk_size=4, output="z")
    assert list(view) == ["pixels"]
    assert torch.equal(view["pixels"], pixels())


@pytest.mark.parametrize(
    "output", ["pooler_output", lambda out: out.rows[1], ["pooler_output", lambda out: out.rows[1]]]
)
def test_output_selects_the_embeddings(output):
    found = []
    for way in (output, "pooler_output"):
        torch.manual_seed(0)
        text = Text()
        loss = cached_backward(text, 2 * [text_inputs(dict)], nt_xent, chunk_size=4, unpack=True, output=way)
        found.append((loss, gradients(text)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_output_may_be_an_index():
    class Recurrent(nn.LSTM):
        def forward(self, x, hx=None):
            return super().forward(x, hx)

    encoder, x = Recurrent(6, D).double(), pixels()
    cached_backward(encoder, [x, x + 1], nt_xent, chunk_size=N, output=0)
    (expected,) = torch.autograd.grad(nt_xent(encoder(x)[0], encoder(x + 1)[0]), encoder.weight_ih_l0)
    torch.testing.assert_close(encoder.weight_ih_l0.grad, expected, **EXACT)


def test_a_model_of_both_towers_takes_one_view_with_both_inputs():
    class Both(nn.Module):
        def __init__(self, image, text):
            super().__init__()
            self.image, self.text = image, text

        def forward(self, pixels, input_ids, attention_mask, note):
            return {"image_embeds": self.image(pixels), "text_embeds": self.text(input_ids, attention_mask)}

    image, text, loss_fn = (module.eval() for module in towers())
    plain = copy.deepcopy((image, text, loss_fn))
    together = lambda out: torch.cat((out["image_embeds"], out["text_embeds"].pooler_output), 1)  # noqa: E731
    view = {"pixels": pixels(), **text_inputs()}
    loss = cached_backward(
        Both(image, text), [view], lambda z: loss_fn(*z.chunk(2, 1)), chunk_size=4, unpack=True, output=together
    )
    torch.testing.assert_close(loss, clip_step(*plain), **EXACT)
    torch.testing.assert_close(gradients(image, text, loss_fn), gradients(*plain), **EXACT)


def test_encoder_kwargs_go_to_every_call():
    found = []
    shift = torch.full((), 0.5, dtype=torch.float64)
    for own in ([{"shift": shift}, {"normalise": True}], None):
        image, text, _ = towers()
        if own is None:
            image.register_forward_hook(lambda module, args, z: z + shift)
            text.register_forward_pre_hook(lambda m, a, k: (a, {**k, "normalise": True}), with_kwargs=True)
        found.append((cached_clip_step(image, text, clip, encoder_kwargs=own), gradients(image, text)))
    torch.testing.assert_close(*found, **EXACT)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (7, [4, 7, 4, 7, 6, 4]),  # tokens of the rows, by chunk: 3 + 1, 7, 2 + 2, 5 + 1 + 1, 6, 4
        (1, [3, 1, 7, 2, 2, 5, 1, 1, 6, 4]),
        (100, [32]),
    ],
)
def test_chunk_tokens_splits_the_rows_by_their_numbers_of_tokens(budget, expected):
    image, text, loss_fn = towers()
    plain = copy.deepcopy((image, text, loss_fn))
    ones = lambda x: torch.ones(len(x), dtype=torch.int32)  # noqa: E731
    loss = cached_clip_step(image, text, loss_fn, chunk_tokens=budget, lengths=[ones, "attention_mask"])
    assert text.seen[: len(expected)] == expected
    text.eval(), image.eval()  # dropout masks depend on the chunks, so dropout is off here
    for module in plain[:2]:
        module.eval()
    for module in (image, text, loss_fn):
        module.zero_grad()
    loss = cached_clip_step(image, text, loss_fn, chunk_tokens=budget, lengths=[ones, "attention_mask"])
    torch.testing.assert_close(loss, clip_step(*plain), **EXACT)
    torch.testing.assert_close(gradients(image, text, loss_fn), gradients(*plain), **EXACT)


def test_lengths_may_be_a_function_of_the_view():
    text = Text()
    view = text_inputs(dict)
    by_width = lambda view: view["input_ids"].shape[1] * torch.ones(N, dtype=torch.long)  # noqa: E731
    cached_backward(
        text, [view, view], nt_xent, chunk_tokens=2 * WIDTH, lengths=by_width, unpack=True, output="pooler_output"
    )
    expected = lengths().reshape(-1, 2).sum(1).tolist()
    assert text.seen == 2 * expected  # caching restores `seen`, which is state of the encoder, so it records one pass


def test_chunk_sizes_may_be_listed_for_each_view():
    image, text, loss_fn = towers()
    sizes = []
    image.register_forward_hook(lambda module, args, z: sizes.append(len(z)))
    cached_clip_step(image, text, loss_fn, chunk_size=[[6, 0, 4], [10]])
    assert sizes == 2 * [6, 0, 4]
    assert text.seen == [32]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # in the pass without a graph
def test_a_checkpointed_encoder_equals_the_uncached_step(reentrant):
    class Checkpointed(Image):
        def forward(self, x, shift=0.0):
            hidden = checkpoint(self.layers[:3], x.requires_grad_(), use_reentrant=reentrant)
            return checkpoint(self.layers[3], hidden, use_reentrant=reentrant)

    found = []
    for checkpointed in (True, False):
        torch.manual_seed(0)
        encoder = (Checkpointed if checkpointed else Image)()
        plain = copy.deepcopy(encoder)
        torch.manual_seed(3)
        loss = cached_backward(encoder, [pixels(), pixels() + 1], nt_xent, chunk_size=4)
        drawn = torch.rand(1)
        torch.manual_seed(3)
        nt_xent(of_chunks(plain, pixels()), of_chunks(plain, pixels() + 1)).backward()
        torch.testing.assert_close(gradients(encoder), gradients(plain), **EXACT)
        found.append((loss, gradients(encoder), drawn))
    torch.testing.assert_close(*found, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_amp_with_a_scaler_equals_the_uncached_step(dtype):
    def step(cached):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))
        optimizer, scaler = torch.optim.SGD(encoder.parameters(), lr=0.1), torch.amp.GradScaler("cpu", 2.0**12)
        views = torch.randn(2, N, 6).unbind()
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                if cached:
                    loss = cached_backward(encoder, views, lambda *z: scaler.scale(nt_xent(*z)), chunk_size=4)
                else:
                    loss = scaler.scale(nt_xent(*map(encoder, views)))
            if not cached:
                loss.backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return loss.detach(), gradients(encoder), list(encoder.parameters())

    (loss, *found), (expected_loss, *expected) = step(True), step(False)
    torch.testing.assert_close(loss, expected_loss, atol=0, rtol=torch.finfo(dtype).eps)
    for values, of_uncached in zip(found, expected, strict=True):
        for value, other in zip(values, of_uncached, strict=True):
            # Gradients of weights are sums, rounded to half precision once per chunk.
            assert torch.dist(value, other) < 4 * torch.finfo(dtype).eps * other.norm()


def test_a_scaler_skips_the_step_after_an_overflow():
    encoder, scaler = nn.Linear(6, 5), torch.amp.GradScaler("cpu", 2.0**12)
    optimizer, before = torch.optim.SGD(encoder.parameters(), lr=0.1), encoder.weight.detach().clone()
    views = torch.randn(2, N, 6).unbind()
    cached_backward(encoder, views, lambda *z: scaler.scale(nt_xent(*z) * torch.inf), chunk_size=4)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(encoder.weight, before)
    assert scaler.get_scale() == 2.0**11


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


@pytest.mark.parametrize("swap", [False, True])
def test_a_parametrised_buffer_that_the_encoder_assigns_is_restored(swap):
    class Running(nn.Module):
        scale: torch.Tensor

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, D).double()
            self.register_buffer("scale", torch.ones(D, dtype=torch.float64))
            parametrize.register_parametrization(self, "scale", Doubling())

        def forward(self, x):
            self.scale = self.scale + 1
            return self.linear(x) * self.scale

    found = []
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for cached in (True, False):
            torch.manual_seed(0)
            encoder = Running()
            if cached:
                cached_backward(encoder, [pixels(), pixels() + 1], nt_xent, chunk_size=4)
            else:
                nt_xent(of_chunks(encoder, pixels()), of_chunks(encoder, pixels() + 1)).backward()
            found.append((gradients(encoder), encoder.scale))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    torch.testing.assert_close(*found, **EXACT)


X = torch.randn(4, 6)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([nn.Linear(6, 5)], [X, X]), {}, ValueError, "encoder must hold a module for each of the 2 views, got 1"),
        (([nn.Linear(6, 5), abs], [X, X]), {}, TypeError, r"encoder\[1\] must be a torch\.nn\.Module, got builtin"),
        (([nn.Linear(6, 5), nn.LazyLinear(5)], [X, X]), {}, ValueError, r"encoder\[1\] must be initialised"),
        ((nn.Linear(6, 5), {"x": X}), {}, TypeError, "views must be a sequence, one element per view, got one dict"),
        ((nn.Linear(6, 5), [X, {"x": "y"}]), {}, TypeError, r"views\[1\] must be a torch.Tensor, got dict without"),
        (
            (nn.Linear(6, 5), [X, {"x": X, "y": [X, X[:3]]}]),
            {},
            ValueError,
            r"views\[1\]\['y'\]\[1\] must have as many rows as views\[1\]\['x'\], 4, got shape \(3, 6\); pass inputs",
        ),
        (
            (nn.Linear(6, 5), [Pair(X, (X * torch.ones((), requires_grad=True)))]),
            {},
            ValueError,
            r"views\[0\]\[1\] must be data without a graph, got the output of MulBackward0",
        ),
        ((nn.Linear(6, 5), [X, [X.to_sparse()]]), {}, TypeError, r"views\[1\]\[0\] must be a dense"),
        ((nn.Linear(6, 5), [[X[:0]], X]), {}, ValueError, r"views\[0\]\[0\] must have at least one row"),
        ((nn.Linear(6, 5), [X, X]), {"chunk_tokens": 3}, TypeError, "either chunk_size or chunk_tokens must be given"),
        ((nn.Linear(6, 5), [X, X]), {"chunk_size": None}, TypeError, "either chunk_size or chunk_tokens must be given"),
        (
            (nn.Linear(6, 5), [X, X]),
            {"chunk_size": None, "chunk_tokens": 0},
            ValueError,
            "chunk_tokens must be at least 1",
        ),
        (
            (nn.Linear(6, 5), [X, X]),
            {"chunk_size": None, "chunk_tokens": 3},
            ValueError,
            r"views\[0\] has no 'attention_mask' to count tokens with",
        ),
        (
            (nn.Linear(6, 5), [X, X]),
            {"chunk_size": None, "chunk_tokens": 3, "lengths": lambda x: [1]},
            ValueError,
            r"lengths must give a number for each of the 4 rows of views\[0\], got 1",
        ),
        (
            (nn.Linear(6, 5), [X, X]),
            {"chunk_size": None, "chunk_tokens": 3, "lengths": lambda x: x[:, 0]},
            TypeError,
            "lengths must be an int, got float",
        ),
        ((nn.Linear(6, 5), [X, X]), {"chunk_size": [[4], [3]]}, ValueError, r"add up to the 4 rows of views\[1\]"),
        ((nn.Linear(6, 5), [X, X]), {"chunk_size": [[4]]}, ValueError, "chunk_size must hold an element for each of"),
        ((nn.Linear(6, 5), [X, X]), {"output": [0]}, ValueError, "output must hold an element for each of the 2 views"),
        ((nn.Linear(6, 5), [X, X]), {"encoder_kwargs": 1}, TypeError, "encoder_kwargs must be a mapping, got int"),
        ((nn.LSTM(6, 5), [X, X]), {}, TypeError, r"got tuple; use output= to select the embeddings"),
        ((nn.LSTM(6, 5), [X, X]), {"output": 1}, TypeError, r"encoder, at output=1, must return a torch\.Tensor, got"),
        (
            (nn.LSTM(6, 5), [X, X]),
            {"output": lambda out: out[0][0]},
            ValueError,
            "output, called with the result of encoder",
        ),
    ],
)
def test_bad_input_raises_an_error_that_names_the_argument(arguments, options, error, message):
    with pytest.raises(error, match=message):
        cached_backward(*arguments, NTXentLoss(), **{"chunk_size": 2, **options})


def share(x):
    """Return this rank's rows: the first 6, or the last 4."""
    return x[slice(0, 6) if dist.get_rank() == 0 else slice(6, N)]


def towers_on_ranks():
    """Return cached and expected results of towers wrapped in DDP, FSDP2 and FSDP1. The expected results come from one
    process, or from the same ranks without caching."""
    found: dict[str, Any] = {}
    loss_fn = CLIPLoss(0.2, group=dist.group.WORLD)
    arguments = {"unpack": True, "output": [None, "pooler_output"]}
    views = [share(pixels()), rows_of(text_inputs(), slice(0, 6) if dist.get_rank() == 0 else slice(6, N))]
    for frozen in (None, "image", "text"):
        image, text, _ = (module.eval() for module in towers())
        if frozen:
            (image if frozen == "image" else text).requires_grad_(False)
        plain = copy.deepcopy((image, text))
        wrapped = [
            DistributedDataParallel(tower) if any(p.requires_grad for p in tower.parameters()) else tower
            for tower in (image, text)
        ]
        loss = cached_backward(wrapped, views, loss_fn, chunk_size=2, **arguments)
        expected = clip_step(*plain, CLIPLoss(0.2))
        found[f"ddp, frozen: {frozen}"] = (loss, gradients(image, text)), (expected, gradients(*plain))

    image, text, _ = (module.eval() for module in towers())
    plain = copy.deepcopy((image, text))
    mesh = init_device_mesh("cpu", (2,))
    sharded = [fully_shard(image, mesh=mesh), fully_shard(text, mesh=mesh)]
    sizes = [2, 2, 2] if dist.get_rank() == 0 else [2, 2, 0]  # every rank has the same number of chunks
    loss = cached_backward(sharded, views, loss_fn, chunk_size=sizes, **arguments)
    expected = clip_step(*plain, CLIPLoss(0.2))
    full = [p.grad.full_tensor() for module in sharded for p in module.parameters()]
    found["fsdp"] = (loss, full), (expected, gradients(*plain))

    for use_orig_params in (True, False):
        ends = []
        for cached in (True, False):
            wrapped = [
                FullyShardedDataParallel(tower.eval(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
                for tower in towers()[:2]
            ]
            if cached:
                cached_backward(wrapped, views, loss_fn, chunk_size=sizes, **arguments)
            else:
                loss_fn(wrapped[0](views[0]), wrapped[1](**views[1]).pooler_output).backward()
            ends.append(gradients(*wrapped))
        found[f"the first FSDP, use_orig_params={use_orig_params}"] = ends

    # Dropout and a scaler, compared with the same calls without caching.
    ends = []
    for cached in (True, False):
        towers_now = [DistributedDataParallel(tower) for tower in towers()[:2]]
        scaler = torch.amp.GradScaler("cpu", 2.0**8)
        torch.manual_seed(5 + dist.get_rank())
        if cached:
            scaled_loss = lambda *z, scaler=scaler: scaler.scale(loss_fn(*z))  # noqa: E731
            scaled = cached_backward(towers_now, views, scaled_loss, chunk_size=N, **arguments)
        else:
            scaled = scaler.scale(loss_fn(towers_now[0](views[0]), towers_now[1](**views[1]).pooler_output))
            scaled.backward()
        ends.append((scaled.detach(), gradients(*towers_now)))
    found["dropout and a scaler"] = ends
    return found


@pytest.fixture(scope="module")
def of_ranks():
    return on_ranks(2, towers_on_ranks)


@pytest.mark.parametrize(
    "how",
    [
        *("ddp, frozen: None", "ddp, frozen: image", "ddp, frozen: text", "dropout and a scaler"),
        *("fsdp", "the first FSDP, use_orig_params=True", "the first FSDP, use_orig_params=False"),
    ],
)
def test_towers_on_ranks_equal_the_uncached_step(of_ranks, how):
    for found in of_ranks:
        torch.testing.assert_close(*found[how], **EXACT)
