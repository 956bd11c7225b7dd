import pytest
import torch
from torch import nn

from fastntxent.simclr.models import LEAST_RESNET_WIDTH, ResNet18, Standardise, build_model


def build(model="conv", channels=3, image_size=32, width=8, seed=0):
    return build_model(
        model, mean=[0.4] * channels, std=[0.2] * channels, image_size=image_size, width=width, hidden=16, proj_dim=12,
        seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("model", ["conv", "resnet18"])
@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (1, (28, 28)), (3, (32, 32)), (3, (96, 72))])
def test_build_model_takes_any_image(model, channels, size):
    net = build(model, channels, max(size))
    x = torch.rand(2, channels, *size)
    assert net(x).shape == (2, 12)
    assert net.encoder(x).shape == (2, net.encoder.feature_dim)


@pytest.mark.parametrize("model", ["conv", "resnet18"])
def test_build_model_is_a_function_of_its_seed(model):
    state = torch.get_rng_state()
    first, again, other = build(model, seed=1), build(model, seed=1), build(model, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.rand(4, 3, 32, 32)
    assert torch.equal(first(x), again(x))
    assert not torch.equal(first(x), other(x))


@pytest.mark.parametrize("width", [1, 4, LEAST_RESNET_WIDTH - 1])
def test_resnet18_refuses_a_width_whose_backward_overruns_memory(width):
    message = f"^width must be at least {LEAST_RESNET_WIDTH} for resnet18, got {width}: .*AVX2"
    with pytest.raises(ValueError, match=message):
        build("resnet18", width=width)
    with pytest.raises(ValueError, match=message):
        ResNet18([0.4], [0.2], width, 32)


def test_resnet18_of_the_least_width_has_the_gradient_of_float64():
    net = build("resnet18", width=LEAST_RESNET_WIDTH)
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for dtype in (torch.float32, torch.float64):
        net.to(dtype)
        parameters = list(net.encoder.parameters())
        gradients.append(torch.autograd.grad(net(x.to(dtype)).square().sum(), parameters))
    for value, truth in zip(*gradients, strict=True):
        assert float((value - truth).norm()) < 1e-3 * float(truth.norm())


def test_resnet18_is_resnet18():
    encoder = build("resnet18", width=64, image_size=224).encoder
    # torchvision's resnet18 has 11,689,512 parameters, 513,000 of them in its classifier.
    assert sum(p.numel() for p in encoder.parameters()) == 11_176_512


@pytest.mark.parametrize(("image_size", "kernel", "pools"), [(64, 3, 0), (65, 7, 1)])
def test_resnet18_stem_goes_by_the_image_size(image_size, kernel, pools):
    modules = list(build("resnet18", image_size=image_size).encoder.modules())
    assert next(m for m in modules if isinstance(m, nn.Conv2d)).kernel_size == (kernel, kernel)
    assert sum(isinstance(m, nn.MaxPool2d) for m in modules) == pools


def test_standardise_centres_each_channel():
    x = torch.rand(8, 2, 5, 5)
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3))
    y = Standardise(mean.tolist(), std.tolist())(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.std((0, 2, 3)), torch.ones(2), atol=1e-5, rtol=0)
