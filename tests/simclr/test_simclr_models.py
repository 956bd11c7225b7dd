import copy
import warnings

import pytest
import torch
from torch import nn

from fastntxent.simclr.models import LEAST_RESNET_WIDTH, ResNet, Standardise, build_model, check_model, check_width

OWN = ["conv", "resnet18", "resnet50"]


def build(model="conv", channels=3, image_size=32, width=8, seed=0):
    return build_model(
        model, mean=[0.4] * channels, std=[0.2] * channels, image_size=image_size, width=width, hidden=16, proj_dim=12,
        seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("model", OWN)
@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (1, (28, 28)), (3, (32, 32)), (3, (96, 72))])
def test_build_model_takes_images_of_any_size(model, channels, size):
    net = build(model, channels, max(size))
    x = torch.rand(2, channels, *size)
    assert net(x).shape == (2, 12)
    assert net.encoder(x).shape == (2, net.encoder.feature_dim)


@pytest.mark.parametrize("model", OWN)
def test_built_model_depends_only_on_the_seed(model):
    state = torch.get_rng_state()
    first, again, other = build(model, seed=1), build(model, seed=1), build(model, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.rand(4, 3, 32, 32)
    assert torch.equal(first(x), again(x))
    assert not torch.equal(first(x), other(x))


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
@pytest.mark.parametrize("width", [1, 4, LEAST_RESNET_WIDTH - 1])
def test_resnet_refuses_a_width_whose_backward_overruns_memory(model, width):
    message = f"^width must be at least {LEAST_RESNET_WIDTH} for {model}, got {width}: .*AVX2"
    with pytest.raises(ValueError, match=message):
        build(model, width=width)
    with pytest.raises(ValueError, match=message):
        ResNet(model, 3, width, 32)


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_resnet_gradient_at_the_least_width_matches_float64(model):
    # The network is in eval mode. In training mode, batch norms over only four images would amplify the rounding errors
    # of 50 layers to 3 % of the gradient.
    net = build(model, width=LEAST_RESNET_WIDTH).eval()
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for dtype in (torch.float32, torch.float64):
        net.to(dtype)
        parameters = list(net.encoder.parameters())
        gradients.append(torch.autograd.grad(net(x.to(dtype)).square().sum(), parameters))
    for value, truth in zip(*gradients, strict=True):
        assert float((value - truth).norm()) < 1e-4 * float(truth.norm())


# torchvision's resnet18 has 11,689,512 parameters, of which the classifier has 513,000. Its resnet50 has 25,557,032
# parameters, of which the classifier has 2,049,000.
@pytest.mark.parametrize(("model", "parameters", "features"), [
    ("resnet18", 11_176_512, 512), ("resnet50", 23_508_032, 2048),
])  # fmt: skip
def test_resnet_has_torchvisions_numbers_of_parameters_and_features(model, parameters, features):
    encoder = build(model, width=0, image_size=224).encoder
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert encoder.feature_dim == features


def test_resnet50_gives_torchvisions_features():
    models = pytest.importorskip("torchvision.models", reason="needs torchvision", exc_type=(ImportError, RuntimeError))
    ours, theirs = build("resnet50", width=64, image_size=224).encoder.body, models.resnet50()
    theirs.fc = nn.Identity()
    # In torchvision's blocks the shortcut comes last too, so the tensors have the same order.
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.rand(2, 3, 96, 96)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("image_size", "kernel", "pools"), [(64, 3, 0), (65, 7, 1)])
def test_resnet_stem_depends_on_the_image_size(model, image_size, kernel, pools):
    modules = list(build(model, image_size=image_size).encoder.modules())
    assert next(m for m in modules if isinstance(m, nn.Conv2d)).kernel_size == (kernel, kernel)
    assert sum(isinstance(m, nn.MaxPool2d) for m in modules) == pools


def test_standardise_centres_each_channel():
    x = torch.rand(8, 2, 5, 5)
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3))
    y = Standardise(mean.tolist(), std.tolist())(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3)), torch.ones(2), atol=1e-5, rtol=0)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OWN, "timm:resnet18.a1_in1k", "torchvision:vit_b_16", "a.b:c.d", "_x:y"])
def test_check_model_accepts_names_without_importing_them(name):
    check_model(name)


@pytest.mark.parametrize(("name", "words"), [
    ("resnet", "must be one of conv, resnet18, resnet50, timm:NAME, .*, got 'resnet'; did you mean resnet50"),
    ("", "must be one of conv"),
    ("timm:", "must name a model of timm, such as timm:resnet18, got 'timm:'"),
    ("timm:hf-hub:some/one", "must name a model of timm"),
    ("torchvision:../x", "must name a model of torchvision"),
    (":make", "must have the form package.module:factory, got ':make'"),
    ("module:", "must have the form package.module:factory"),
    ("..module:make", "must have the form package.module:factory"),
    ("module:make()", "must have the form package.module:factory"),
])  # fmt: skip
def test_check_model_explains_the_form_of_a_name(name, words):
    with pytest.raises(ValueError, match=f"^--model {words}"):
        check_model(name, "--model")


@pytest.mark.parametrize("name", ["timm:resnet18", "module:make"])
def test_check_width_refuses_models_with_a_fixed_width(name):
    with pytest.raises(ValueError, match=f"^--width applies only to the models conv, .*; {name} has a fixed width"):
        check_width(name, 8, "--width")


# --- images for an encoder -------------------------------------------------------------------------------------------


IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("images", "error", "words"), [
    ((IMAGES * 255).byte(), TypeError, r"floating-point in \[0, 1\], got torch.uint8: .*x.float\(\) / 255"),
    (IMAGES.long(), TypeError, r"floating-point in \[0, 1\], got torch.int64"),
    (IMAGES.numpy(), TypeError, "must be a tensor, got ndarray"),
    (IMAGES[0], ValueError, r"shape \(N, 3, H, W\), got \(3, 32, 32\)"),
    (IMAGES[:, :1], ValueError, r"shape \(N, 3, H, W\), got \(4, 1, 32, 32\)"),
    (IMAGES.permute(0, 2, 3, 1), ValueError, r"shape \(N, 3, H, W\), got \(4, 32, 32, 3\)"),
])  # fmt: skip
def test_encoder_refuses_images_of_the_wrong_type_or_shape(images, error, words, training):
    with pytest.raises(error, match=words):
        build().encoder.train(training)(images)


def test_encoder_checks_the_values_of_images_only_in_eval_mode():
    encoder = build().encoder.eval()
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got values up to .*: divide values in 0..255 by 255"):
        encoder(IMAGES * 255)
    with pytest.warns(UserWarning, match="the encoder standardises them itself"):
        encoder((IMAGES - 0.5) / 0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(IMAGES * 1.2 - 0.1)  # bicubic resizing overshoots like this
        encoder(IMAGES[:0])
        encoder.train()((IMAGES - 0.5) / 0.25)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_encoder_runs_in_other_precisions_and_under_autocast(dtype):
    encoder = build().encoder.eval()
    expected = encoder(IMAGES)
    h = copy.deepcopy(encoder).to(dtype)(IMAGES.to(dtype))
    assert h.dtype == dtype
    torch.testing.assert_close(h.float(), expected, rtol=0, atol=0.02 * float(expected.detach().abs().max()))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            encoder(IMAGES).float(), expected, rtol=0, atol=0.02 * float(expected.detach().abs().max())
        )


def traced(encoder):
    with warnings.catch_warnings():
        # PyTorch warns if a check would become part of the trace. (torch.jit does not list the class for mypy.)
        warnings.simplefilter("error", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return torch.jit.trace(encoder, IMAGES[:2])


def exported(encoder):
    return torch.export.export(encoder, (IMAGES[:2],), dynamic_shapes=({0: torch.export.Dim("n", min=1)},)).module()


COMPILERS = {
    "compile": lambda encoder: torch.compile(encoder, fullgraph=True, backend="eager"),
    "export": exported,
    "trace": traced,
    "script": torch.jit.script,
    "fx": torch.fx.symbolic_trace,
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("model", ["conv", "resnet18"])
def test_encoder_can_be_compiled_exported_traced_and_scripted(compiler, model):
    encoder = build(model).encoder.eval()
    made = COMPILERS[compiler](encoder)
    for n in (1, 2, 4):
        torch.testing.assert_close(made(IMAGES[:n]), encoder(IMAGES[:n]), rtol=1e-4, atol=1e-5)
