"""Encoders from elsewhere: which are accepted, and the errors for all others."""

from __future__ import annotations

import functools
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastntxent.simclr import Config, load_encoder
from fastntxent.simclr.build import make_model
from fastntxent.simclr.checkpoint import FILE_NAME, load_checkpoint, save_checkpoint
from fastntxent.simclr.encoders import by_name
from fastntxent.simclr.models import Encoder, build_model

CPU = torch.device("cpu")


class Net(nn.Module):
    """A typical network, whose `view` fails on channels-last maps."""

    def __init__(self, channels: int = 1, image_size: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, 2, 1)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4 * (image_size // 2) ** 2, 6)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.linear(x.view(x.size(0), -1))


def net(change=lambda h, module: h, *, make: Any = Net):
    """Return a factory of Nets whose output goes through `change`."""

    class Changed(make):
        def forward(self, x):
            return change(super().forward(x), self)

    return lambda: Changed()


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, d_h):
        raise NotImplementedError("no formula\nfor this")


def changed_in_place(h):
    square = h * h
    h.add_(1)
    return square


class Uncopied(Net):
    def __deepcopy__(self, memo):
        raise RuntimeError("only once")


def raising():
    raise KeyError("depth")


def leaving():
    sys.exit(3)


def make(channels, image_size=None):
    return Net(channels, image_size)


MODULE = Net()
SOUND = {
    "make": make,
    "Net": Net,
    "partial": functools.partial(make, channels=1),
    "no_arguments": lambda: Net(),
    "any_arguments": lambda *args, **kwargs: Net() if not args and not kwargs else None,
    "lazy": lambda: nn.Sequential(nn.LazyConv2d(3, 3), nn.LazyBatchNorm2d(), nn.AdaptiveAvgPool2d(1)),
    "five_dimensions": lambda: nn.Sequential(nn.Unflatten(1, (1, 1)), nn.Conv3d(1, 2, (1, 3, 3)), nn.Flatten()),
    "pooled": lambda: nn.Sequential(nn.Conv2d(1, 6, 3), nn.SyncBatchNorm(6), nn.AdaptiveAvgPool2d(1)),
}
FAULTY = {
    "missing": (None, r"my_encoders has no missing; did you mean raising\?"),
    "number": (3, "must be a function that returns a torch.nn.Module, got a value of type int"),
    "module": (MODULE, "is a module, but it must be a function that returns a new module"),
    "same": (lambda: MODULE, "returned the same module a second time"),
    "no_module": (lambda: 3, "must return a torch.nn.Module, got a value of type int"),
    "argument": (lambda depth: Net(), "may require only the arguments channels and image_size, but it requires depth"),
    "raising": (raising, "cannot be built: KeyError: 'depth'"),
    "leaving": (leaving, "cannot be built: SystemExit: 3"),
    "tuple": (net(lambda h, _: (h, h)), "must return a tensor of features .* got a value of type tuple"),
    "dict": (net(lambda h, _: {"h": h}), "must return a tensor of features .* got a value of type dict"),
    "tuple_in_training": (
        net(lambda h, module: (h, h) if module.training else h), "in training mode must return a tensor .* tuple",
    ),
    "other_in_training": (
        net(lambda h, module: h[:, :5] if module.training else h), "must return as many features in training mode",
    ),
    "half": (net(lambda h, _: h.half()), "must return float32 features, got torch.float16"),
    "integer": (net(lambda h, _: h.long()), "must return float32 features, got torch.int64"),
    "maps": (lambda: nn.Conv2d(1, 4, 3), r".*got maps \(2, 4, 14, 14\) for two images of 1 x 16 x 16: .*AvgPool2d"),
    "tokens": (net(lambda h, _: h[:, None]), r".*got \(2, 1, 6\) .*: return one token per image, or the mean"),
    "other_rows": (net(lambda h, _: h[:1]), r".*one row per image, got \(1, 6\)"),
    "flat": (net(lambda h, _: h.flatten()), r".*one row per image, got \(12,\)"),
    "no_features": (net(lambda h, _: h[:, :0]), r".*one row per image, got \(2, 0\)"),
    "no_parameters": (lambda: nn.Flatten(), "has no parameters to train"),
    "frozen": (lambda: Net().requires_grad_(False), "has no parameters to train"),
    "double": (lambda: Net().double(), "must have float32 parameters, but conv.weight is torch.float64; .* --amp"),
    "meta": (lambda: Net().to("meta"), ".*conv.weight is on the meta device"),
    "too_small": (lambda: nn.Conv2d(1, 4, 17), "does not take images of 1 x 16 x 16 .*: RuntimeError: .*Kernel size"),
    "detached": (net(lambda h, _: h.detach()), r"must return features with a gradient: .*detach\(\)"),
    "no_backward": (net(lambda h, _: NoBackward.apply(h)), "fails in its backward: NotImplementedError: no formula$"),
    "in_place": (net(lambda h, _: changed_in_place(h)), "fails in its backward: RuntimeError: .* inplace operation"),
    "uncopied": (Uncopied, "must be a module that copy.deepcopy can copy, .*: RuntimeError: only once"),
}  # fmt: skip


@pytest.fixture
def module(monkeypatch):
    """A module of factories that can be imported, like a file in the current directory."""
    module = types.ModuleType("my_encoders")
    for name, factory in (SOUND | {name: factory for name, (factory, _) in FAULTY.items()}).items():
        if name != "missing":
            setattr(module, name, factory)
    monkeypatch.setitem(sys.modules, "my_encoders", module)
    return module


def build(model="conv", channels=1, size=16, seed=0, **options):
    settings = {"width": 0, "hidden": 8, "proj_dim": 4, **options}
    return build_model(model, mean=[0.4] * channels, std=[0.2] * channels, image_size=size, seed=seed, **settings)


@pytest.mark.parametrize("name", SOUND)
def test_factory_makes_an_encoder_that_depends_only_on_the_seed(module, name):
    state = torch.get_rng_state()
    first, again, other = (build(f"my_encoders:{name}", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    images = torch.rand(5, 1, 16, 16)
    first(images).sum().backward()
    assert all(p.grad is not None for p in first.parameters())
    h = first.eval().encoder(images)
    assert h.shape == (5, first.encoder.feature_dim)
    assert not torch.equal(h, other.eval().encoder(images))


@pytest.mark.parametrize("name", FAULTY)
def test_unusable_factory_is_refused_with_the_reason(module, name):
    message = f"^--model my_encoders:{name}( in training mode)?:? {FAULTY[name][1]}"
    if name == "same":
        build("my_encoders:same")
    with pytest.raises(ValueError, match=message) as raised:
        build(f"my_encoders:{name}")
    assert "\n" not in str(raised.value)


def test_factory_gets_the_channels_and_size_of_the_images(module):
    seen = []

    def make(image_size, *, channels=1):
        seen.append((channels, image_size))
        return Net(channels)

    module.make = make
    build("my_encoders:make", size=(16, 16))
    with pytest.raises(ValueError, match="does not take images of 3 x 16 x 24"):
        build("my_encoders:make", channels=3, size=(16, 24))
    assert seen == [(1, 16), (3, (16, 24))]


def test_encoder_standardises_images_before_the_network(module):
    model = build("my_encoders:make").eval()
    images = torch.rand(3, 1, 16, 16)
    torch.testing.assert_close(model.encoder(images), model.encoder.body((images - 0.4) / 0.2))


FILES = {
    "broken": ("x = = 3", ValueError, "importing broken failed: SyntaxError: invalid syntax"),
    "leaves": ("import sys; sys.exit()", ValueError, "importing leaves failed: SystemExit"),
    "needs": (
        "import no_such_package.of_mine",
        ImportError,
        "needs needs the package no_such_package, .*: pip install",
    ),
    "lacks": ("from torch import nothing_there", ImportError, "importing lacks failed: cannot import name"),
}


@pytest.mark.parametrize("name", FILES)
def test_failed_import_of_a_module_is_reported_with_the_cause(name, tmp_path, monkeypatch):
    text, error, words = FILES[name]
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(error, match=f"^--model {name}:make: {words}") as raised:
        build(f"{name}:make")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["no_such_module:make", "my_encoders.part:make"])
def test_missing_module_is_reported(module, name):
    with pytest.raises(ImportError, match=f"there is no module {name.partition(':')[0]}: .* the current directory"):
        build(name)


@pytest.mark.slow
def test_command_line_finds_a_factory_in_the_current_directory(tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from torch import nn\n"
        "def make(channels):\n"
        "    return nn.Sequential(nn.Conv2d(channels, 6, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1))\n"
    )
    options = ["--data", "digits", "--max-steps", 2, "--eval-limit", 40, "--quiet", "--device", "cpu", "--out", "run"]
    done = cli(*options, "--model", "mine:make")
    assert done.returncode == 0, done.stderr
    monkeypatch.syspath_prepend(tmp_path)
    encoder = load_encoder("run")
    assert (encoder.channels, encoder.image_size, encoder.feature_dim) == (1, 8, 6)
    done = cli(*options, "--model", "mine:mak")
    assert (done.returncode, done.stderr) == (2, "error: --model mine:mak: mine has no mak; did you mean make?\n")


def test_norm_and_width_are_refused_for_foreign_encoders(module):
    with pytest.raises(ValueError, match=r"--norm none applies only to conv, .*; --model my_encoders:make has its own"):
        build("my_encoders:make", batch_norm=False)
    with pytest.raises(ValueError, match=r"--width applies only to conv, .* not to your own encoder, got 8"):
        build(encoder=Net(), width=8)
    with pytest.raises(ValueError, match="--width applies only to the models conv"):
        Config(model="my_encoders:make", width=8).check()


@pytest.mark.parametrize("name", ["os:system", "builtins:exec", "subprocess:call"])
def test_functions_of_the_standard_library_are_not_called(name):
    with pytest.raises(ValueError, match=f"--model {name} names a module of Python's standard library"):
        by_name(name, 1, (16, 16))


@pytest.mark.parametrize("attribute", ["sys.exit", "Path", "torch.rand", "functools.partial", "reader"])
def test_stdlib_and_c_functions_in_a_users_module_are_not_called(module, attribute):
    module.sys, module.Path, module.torch, module.functools = sys, Path, torch, functools
    module.reader = functools.partial(Path.read_text, Path("x"))
    with pytest.raises(ValueError, match="must be a function or class from your own module, got one from"):
        build(f"my_encoders:{attribute}")


# --- libraries -------------------------------------------------------------------------------------------------------


class FixedSize(Net):
    def __init__(self, channels, image_size):
        super().__init__(channels, image_size)
        self.expected = image_size

    def forward(self, x):
        assert x.shape[2] == self.expected
        return super().forward(x)


@pytest.fixture
def fake_timm(monkeypatch):
    timm: Any = types.ModuleType("timm")
    called = []

    def create_model(name, *, pretrained, num_classes, in_chans, **kwargs):
        called.append({"name": name, "pretrained": pretrained, "num_classes": num_classes, **kwargs})
        if name == "vit":
            return FixedSize(in_chans, kwargs["img_size"])
        if name == "bad":
            raise RuntimeError("cannot\nbe")
        if kwargs:
            torch.rand(1)  # as if layers had drawn random numbers before the error
            raise TypeError("__init__() got an unexpected keyword argument 'img_size'")
        return nn.Sequential(nn.Conv2d(in_chans, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    timm.create_model, timm.list_models = create_model, lambda: ["vit", "conv", "bad"]
    timm.is_model = lambda name: name in timm.list_models()
    monkeypatch.setitem(sys.modules, "timm", timm)
    return called


def test_timm_models_are_built_for_the_channels_and_size_of_the_images(fake_timm):
    assert build("timm:vit").encoder.feature_dim == 6
    assert fake_timm == [{"name": "vit", "pretrained": False, "num_classes": 0, "img_size": 16}]
    encoder = build("timm:conv", seed=3).encoder
    assert "img_size" not in fake_timm[-1]
    torch.manual_seed(3)
    torch.testing.assert_close(encoder.body[0].weight, nn.Conv2d(1, 5, 3).weight)


def test_timm_mistakes_are_reported(fake_timm):
    with pytest.raises(ValueError, match=r"^--model timm:con: timm has no con; did you mean conv\?$"):
        build("timm:con")
    with pytest.raises(ValueError, match=r"^--model timm:bad cannot be built: RuntimeError: cannot$"):
        build("timm:bad")


def test_missing_library_is_reported_with_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="this needs the package timm: pip install timm"):
        build("timm:resnet18")


class Classifier(nn.Module):
    def __init__(self, classes=1000):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, classes))

    def forward(self, x):
        return self.classifier(self.features(x))


@pytest.fixture
def fake_torchvision(monkeypatch):
    models: Any = types.ModuleType("torchvision.models")
    called = []

    def get_model(name, *, weights, **kwargs):
        called.append({"name": name, "weights": weights, **kwargs})
        return Classifier() if name != "squeezenet" else nn.Sequential(nn.Conv2d(3, 1000, 3), nn.AdaptiveAvgPool2d(1))

    models.get_model = get_model
    models.list_models = lambda module: (
        ["classifier", "squeezenet", "vit_b", "inception_v3"] if module is models else []
    )
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    return called


@pytest.mark.parametrize("channels", [1, 3])
def test_torchvision_models_lose_their_classifier_and_take_grey_images(fake_torchvision, channels):
    encoder = build("torchvision:classifier", channels).encoder.eval()
    assert encoder.feature_dim == 9
    grey = torch.rand(2, 1, 16, 16)
    assert encoder(grey.expand(-1, channels, -1, -1)).shape == (2, 9)
    network = encoder.body if channels == 3 else encoder.body.network
    expected = network(((grey - 0.4) / 0.2).expand(-1, 3, -1, -1))
    torch.testing.assert_close(encoder(grey.expand(-1, channels, -1, -1)), expected)


def test_torchvision_models_get_the_options_they_need(fake_torchvision):
    build("torchvision:vit_b", 3)
    build("torchvision:inception_v3", 3)
    assert fake_torchvision == [
        {"name": "vit_b", "weights": None, "image_size": 16},
        {"name": "inception_v3", "weights": None, "aux_logits": False, "init_weights": True},
    ]


def test_torchvision_mistakes_are_reported(fake_torchvision):
    with pytest.raises(ValueError, match=r"^--model torchvision:clasifier: .*; did you mean classifier\?$"):
        build("torchvision:clasifier")
    with pytest.raises(ValueError, match="squeezenet has no linear classifier to remove"):
        build("torchvision:squeezenet")


REAL = {"reason": "needs the library, and a PyTorch that it works with", "exc_type": (ImportError, RuntimeError)}


@pytest.mark.parametrize(("name", "size", "features"), [
    ("resnet18", 32, 512), ("vit_tiny_patch16_224", 32, 192), ("convnext_atto", 32, 320),
    ("deit_tiny_distilled_patch16_224", 32, 192),
])  # fmt: skip
@pytest.mark.parametrize("channels", [1, 3])
def test_real_timm_models_work_as_encoders(name, size, features, channels):
    pytest.importorskip("timm", **REAL)
    model = build(f"timm:{name}", channels, size)
    model(torch.rand(2, channels, size, size)).sum().backward()
    assert model.encoder.feature_dim == features


@pytest.mark.parametrize(("name", "size", "features"), [
    ("resnet18", 32, 512), ("mobilenet_v3_small", 32, 1024), ("vit_b_16", 32, 768), ("efficientnet_b0", 32, 1280),
    ("googlenet", 32, 1024), ("swin_t", 32, 768),
])  # fmt: skip
def test_real_torchvision_models_work_as_encoders(name, size, features):
    pytest.importorskip("torchvision.models", **REAL)
    model = build(f"torchvision:{name}", 1, size)
    model(torch.rand(2, 1, size, size)).sum().backward()
    assert model.encoder.feature_dim == features


@pytest.mark.parametrize(("name", "words"), [
    ("timm:resnet8", "timm has no resnet8; did you mean resnet18"),
    ("timm:inception_v3", "does not take images of 3 x 28 x 28"),
    ("torchvision:resnet19", "torchvision has no resnet19; did you mean resnet18"),
    ("torchvision:vit_b_16", "cannot be built: .* indivisible by patch size"),
    ("torchvision:inception_v3", "does not take images of 3 x 28 x 28"),
    ("torchvision:fasterrcnn_resnet50_fpn", "torchvision has no fasterrcnn"),
])  # fmt: skip
def test_mistakes_with_the_real_libraries_are_reported(name, words):
    pytest.importorskip(name.partition(":")[0], **REAL)
    with pytest.raises(ValueError, match=words):
        build(name, 3, 28)


# --- the user's own module -------------------------------------------------------------------------------------------


def test_users_module_is_used_directly_and_set_to_training_mode(stripes):
    module = Net().eval()
    model = make_model(Config(proj_hidden=8, proj_dim=4), stripes, CPU, encoder=module)
    assert model.encoder.body is module
    assert module.training
    assert isinstance(model.encoder, Encoder)
    assert (model.encoder.channels, model.encoder.image_size, model.encoder.feature_dim) == (1, 16, 6)


@pytest.mark.parametrize(("encoder", "words"), [
    (Net, "the encoder must be a torch.nn.Module, got a value of type type"),
    (nn.Flatten(), "the encoder has no parameters to train"),
    (nn.Conv2d(3, 4, 3), "the encoder does not take images of 1 x 16 x 16"),
])  # fmt: skip
def test_users_module_that_cannot_be_an_encoder_is_refused(stripes, encoder, words):
    with pytest.raises(ValueError, match=words):
        make_model(Config(), stripes, CPU, encoder=encoder)


def test_trained_encoder_keeps_its_own_standardisation(stripes):
    encoder = build("conv").encoder
    model = make_model(Config(proj_hidden=8, proj_dim=4), stripes, CPU, encoder=encoder)
    assert model.encoder is encoder


# --- the encoder of a checkpoint -------------------------------------------------------------------------------------


@pytest.fixture
def trained(make_trainer, module, tmp_path):
    """Return the folder of a finished run whose encoder came from a factory, and that encoder."""
    trainer = make_trainer(model="my_encoders:make", width=0, max_steps=2)
    trainer.fit()
    return tmp_path / "run", trainer.model.eval().encoder


@pytest.mark.parametrize("given", ["folder", "file", "text"])
def test_load_encoder_gives_the_trained_encoder_of_a_factory(trained, stripes, given):
    folder, expected = trained
    path = {"folder": folder, "file": folder / FILE_NAME, "text": str(folder)}[given]
    state = torch.get_rng_state()
    encoder = load_encoder(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert (encoder.channels, encoder.image_size, encoder.feature_dim) == (1, 16, 6)
    assert not encoder.training
    images = stripes.test_images / 255
    torch.testing.assert_close(encoder(images), expected(images))


def test_load_encoder_into_a_module_imports_nothing(trained, stripes, monkeypatch):
    folder, expected = trained
    monkeypatch.delitem(sys.modules, "my_encoders")
    with pytest.raises(ImportError, match="there is no module my_encoders"):
        load_encoder(folder)
    encoder = load_encoder(folder, encoder=Net())
    images = stripes.test_images / 255
    torch.testing.assert_close(encoder(images), expected(images))


@pytest.mark.parametrize(("other", "words"), [
    (nn.Sequential(nn.Conv2d(1, 6, 3), nn.AdaptiveAvgPool2d(1)), "Missing key.*Unexpected key"),
    (nn.Sequential(Net()), "Missing key.*Unexpected key"),
])  # fmt: skip
def test_load_encoder_refuses_a_module_that_does_not_fit(trained, other, words):
    with pytest.raises(
        ValueError, match=f"checkpoint.pt holds parameters of a different architecture: {words}"
    ) as raised:
        load_encoder(trained[0], encoder=other)
    assert "\n" not in str(raised.value)


def test_load_encoder_refuses_parameters_of_different_shapes(trained):
    class Wider(Net):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4 * 8**2, 7)

    with pytest.raises(ValueError, match=r"a different architecture: size mismatch for body.linear.weight"):
        load_encoder(trained[0], encoder=Wider())


def rewritten(folder, **changes):
    """Rewrite the run's checkpoint with these changes, dropping entries that are None, and return the folder."""
    state = load_checkpoint(folder / FILE_NAME) | changes
    save_checkpoint(folder / FILE_NAME, {key: value for key, value in state.items() if value is not None})
    return folder


def test_load_encoder_asks_for_the_module_that_was_passed_to_the_trainer(trained):
    folder = rewritten(trained[0], own_encoder=True)
    with pytest.raises(
        ValueError, match=r"checkpoint.pt holds .* passed to Trainer: .*load_encoder\(path, encoder=module\)"
    ):
        load_encoder(folder)
    assert load_encoder(folder, encoder=Net()).feature_dim == 6


@pytest.mark.parametrize("changes", [
    {"config": None}, {"image_shape": None}, {"image_shape": [1, 2]}, {"model": None}, {"config": 3}, {"model": []},
    {"image_shape": "many"}, {"image_shape": 3}, {"config": {"model": 3}}, {"config": {"model": "nothing"}},
])  # fmt: skip
def test_load_encoder_refuses_an_incomplete_or_malformed_checkpoint(trained, changes):
    with pytest.raises(ValueError, match=r"checkpoint.pt is not a complete checkpoint of the trainer"):
        load_encoder(rewritten(trained[0], **changes))


def test_load_encoder_calls_no_function_of_the_standard_library(trained):
    folder = rewritten(trained[0], config={"model": "os:getcwd"})
    with pytest.raises(ValueError, match="names a module of Python's standard library"):
        load_encoder(folder)


def test_load_encoder_reports_a_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"^no checkpoint at {tmp_path}/{FILE_NAME}$"):
        load_encoder(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"^no checkpoint at {tmp_path}/nowhere$"):
        load_encoder(tmp_path / "nowhere")


def test_load_encoder_restores_the_size_of_images_that_are_not_square(make_trainer, module, stripes):
    module.make = lambda image_size: nn.Sequential(nn.Conv2d(1, 6, image_size), nn.Flatten())
    cut = replace(stripes, train_images=stripes.train_images[..., :12], test_images=stripes.test_images[..., :12])
    trainer = make_trainer(data=cut, model="my_encoders:make", width=0, max_steps=1)
    trainer.fit()
    encoder = load_encoder(trainer.config.out)
    assert encoder.image_size == 16
    assert encoder(torch.rand(2, 1, 16, 12)).shape == (2, 6)
