"""Encoders and the projection head.

An encoder maps images in [0, 1] to features h. The head maps h to the embedding z, the input of the loss, and is thrown
away after training (SimCLR, section 4.2). This module contains the package's own networks, which take any image size.
`encoders` provides networks from other libraries and from users.
"""

import difflib
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting, is_tracing  # type: ignore[attr-defined]  # missing from torch's stubs

from . import encoders

SMALL_IMAGE = 64
DEFAULT_WIDTH = {"conv": 16, "resnet18": 64, "resnet50": 64}
# The shortcuts of a ResNet are 1 x 1 convolutions of stride 2, channels last. On a CPU with AVX2 but no AVX-512, oneDNN
# (jit_avx2_1x1_convolution_bwd_weights, as of PyTorch 2.13) copies their input in whole blocks of 8 channels, but
# allocates scratch memory only for the actual number of channels. With fewer than 8 channels it writes past the end,
# which gives wrong gradients or corrupts the heap. From 8 channels on the gradients are right (8 to 40, 50 and 100 were
# compared with float64).
LEAST_RESNET_WIDTH = 8


def check_model(model: str, name: str = "model") -> None:
    """Raise ValueError for a string that cannot be a model's name, without importing anything.

    `name` is the setting's name in the error.
    """
    if model in DEFAULT_WIDTH:
        return
    if ":" in model:
        encoders.check_name(model, name)
        return
    near = difflib.get_close_matches(model, DEFAULT_WIDTH, n=1)
    raise ValueError(
        f"{name} must be one of {', '.join(DEFAULT_WIDTH)}, timm:NAME, torchvision:NAME or package.module:factory, "
        f"got {model!r}" + (f"; did you mean {near[0]}?" if near else "")
    )


def check_width(model: str, width: int, name: str = "width") -> None:
    """Raise ValueError if the model has a fixed width, or if PyTorch may train the model incorrectly at this width."""
    if model not in DEFAULT_WIDTH:
        raise ValueError(f"{name} applies only to the models {', '.join(DEFAULT_WIDTH)}; {model} has a fixed width")
    if model != "conv" and width < LEAST_RESNET_WIDTH:
        raise ValueError(
            f"{name} must be at least {LEAST_RESNET_WIDTH} for {model}, got {width}: below that, PyTorch 2.13 "
            "overruns a buffer in the backward of the shortcuts on CPUs with AVX2 but without AVX-512"
        )


class Standardise(nn.Module):
    """(x - mean) / std per channel. It is part of the encoder, so a loaded encoder takes images in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], channels_last: bool = True) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        # On a CPU, channels last makes convolutions 1.3 to 2.5 times as fast.
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x.contiguous()


class Encoder(nn.Module):
    """Maps float images (N, C, H, W) in [0, 1] to features (N, F): standardises, runs a network, flattens.

    Attributes:
        channels: C.
        size: (height, width) of the images that the encoder was built for, in pixels. Fully convolutional networks take
            images of other sizes too.
        image_size: the larger of height and width.
        feature_dim: F.

    Calling an encoder raises ValueError or TypeError for images of the wrong dtype or shape and for values above 8,
    such as 0..255. It warns about values outside [-0.5, 1.5], which suggest standardised images. Values are checked
    only on a CPU in eval mode.
    """

    def __init__(
        self,
        body: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        size: tuple[int, int],
        feature_dim: int,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.channels = len(mean)
        self.size = size
        self.image_size = max(size)
        self.feature_dim = feature_dim
        self.standardise = Standardise(mean, std, channels_last)
        self.body = body
        if channels_last:
            # Convert only the weights of convolutions: a tensor with five dimensions cannot have this layout.
            for module in body.modules():
                if isinstance(module, nn.Conv2d):
                    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stubs

    def forward(self, x: Tensor) -> Tensor:
        if not is_scripting():
            _check_images(x, self.channels, self.training)
        h: Tensor = self.body(self.standardise(x))
        return h.flatten(1)


@torch.fx.wrap  # torch.fx records this call instead of running it
def _check_images(x: Tensor, channels: int, training: bool) -> None:
    if is_tracing():
        return
    if not isinstance(x, Tensor):
        raise TypeError(f"images must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"images must be floating-point in [0, 1], got {x.dtype}: convert uint8 with x.float() / 255")
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"images must have the shape (N, {channels}, H, W), got {tuple(x.shape)}")
    # Check values only if there are any and reading them is cheap: on a GPU, reading would wait for the device.
    if training or type(x) is not Tensor or x.device.type != "cpu" or torch.compiler.is_compiling() or not x.numel():
        return
    low, high = map(float, x.detach().aminmax())
    if high > 8:
        raise ValueError(f"images must lie in [0, 1], got values up to {high:g}: divide values in 0..255 by 255")
    if low < -0.5 or high > 1.5:
        warnings.warn(
            f"images should lie in [0, 1], got [{low:.3g}, {high:.3g}]: the encoder standardises them itself",
            stacklevel=3,
        )


def _conv(inputs: int, outputs: int, kernel: int, stride: int, batch_norm: bool) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=not batch_norm)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs) if batch_norm else nn.Identity())


class ConvNet(nn.Sequential):
    """Three stride-2 convolutions and an average pool to 2 x 2: an encoder for small images on two CPU cores.

    This pool keeps coarse positions, which a global pool after so shallow a network would lose.
    """

    def __init__(self, channels: int, width: int, batch_norm: bool = True) -> None:
        super().__init__(
            _conv(channels, width, 5, 2, batch_norm), nn.ReLU(),
            _conv(width, 2 * width, 3, 2, batch_norm), nn.ReLU(),
            _conv(2 * width, 4 * width, 3, 2, batch_norm), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.feature_dim = 16 * width


class _Basic(nn.Module):
    """Two 3 x 3 convolutions with a shortcut (He et al. 2016, the block of ResNet-18)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, batch_norm: bool) -> None:
        super().__init__()
        self.first = _conv(inputs, width, 3, stride, batch_norm)
        self.second = _conv(width, width, 3, 1, batch_norm)
        self.shortcut = _shortcut(inputs, width, stride, batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class _Bottleneck(nn.Module):
    """1 x 1, 3 x 3 (with the stride) and 1 x 1 convolutions with a shortcut (the block of ResNet-50)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, batch_norm: bool) -> None:
        super().__init__()
        self.first = _conv(inputs, width, 1, 1, batch_norm)
        self.second = _conv(width, width, 3, stride, batch_norm)
        self.third = _conv(width, 4 * width, 1, 1, batch_norm)
        self.shortcut = _shortcut(inputs, 4 * width, stride, batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.third(F.relu(self.second(F.relu(self.first(x))))) + self.shortcut(x))


def _shortcut(inputs: int, outputs: int, stride: int, batch_norm: bool) -> nn.Module:
    same = inputs == outputs and stride == 1
    return nn.Identity() if same else _conv(inputs, outputs, 1, stride, batch_norm)


_RESNETS: dict[str, tuple[type[_Basic | _Bottleneck], tuple[int, ...]]] = {
    "resnet18": (_Basic, (2, 2, 2, 2)),
    "resnet50": (_Bottleneck, (3, 4, 6, 3)),
}


class ResNet(nn.Sequential):
    """A ResNet without its classifier, with `width` channels in the first layer (64 in the paper).

    Images of at most 64 pixels a side get a 3 x 3 stem and no max-pool, as in SimCLR's CIFAR-10 experiments (appendix
    B.9). Larger images get the usual 7 x 7 stem.

    Args:
        model: "resnet18" or "resnet50".

    Raises:
        ValueError: width is below LEAST_RESNET_WIDTH.
    """

    def __init__(self, model: str, channels: int, width: int, image_size: int, batch_norm: bool = True) -> None:
        check_width(model, width)
        block, depths = _RESNETS[model]
        small = image_size <= SMALL_IMAGE
        layers: list[nn.Module] = [
            _conv(channels, width, 3 if small else 7, 1 if small else 2, batch_norm),
            nn.ReLU(),
        ]
        if not small:
            layers.append(nn.MaxPool2d(3, 2, 1))
        inputs = width
        for stage, depth in enumerate(depths):
            for index in range(depth):
                layers.append(block(inputs, width * 2**stage, 2 if stage and not index else 1, batch_norm))
                inputs = width * 2**stage * block.expansion
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.feature_dim = inputs


class Projector(nn.Sequential):
    """The two-layer head g(h) = W2 relu(BN(W1 h)) of the paper."""

    def __init__(self, inputs: int, hidden: int, outputs: int, batch_norm: bool = True) -> None:
        super().__init__(
            nn.Linear(inputs, hidden, bias=not batch_norm),
            nn.BatchNorm1d(hidden) if batch_norm else nn.Identity(),
            nn.ReLU(),
            nn.Linear(hidden, outputs),
        )


class SimCLR(nn.Module):
    """Maps images to embeddings z, optionally under autocast."""

    def __init__(self, encoder: Encoder, projector: Projector, amp_dtype: torch.dtype | None = None):
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.amp_dtype = amp_dtype

    def forward(self, x: Tensor) -> Tensor:
        # Autocast is applied here, not around the step, so that gradient caching reruns it in the same way.
        with torch.autocast(x.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            z: Tensor = self.projector(self.encoder(x))
        return z


def build_model(
    model: str,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int | tuple[int, int],
    width: int,
    hidden: int,
    proj_dim: int,
    seed: int,
    batch_norm: bool = True,
    amp_dtype: torch.dtype | None = None,
    encoder: nn.Module | None = None,
) -> SimCLR:
    """Return a model whose initial parameters depend only on the arguments. torch's global generator is unchanged.

    Args:
        model: a name that passes `check_model`.
        mean, std: mean and standard deviation of each channel of the images in [0, 1].
        image_size: side of the images, or (height, width).
        width: channels of the first layer of "conv", or of a ResNet (which needs at least 8); 0: the default.
        hidden, proj_dim: units of the two layers of the projection head.
        seed: seed of the initial parameters. Only PyTorch's CPU generator is seeded.
        batch_norm: False replaces BatchNorm with biases in "conv", the ResNets and the head.
        amp_dtype: dtype of autocast in the forward; None: no autocast.
        encoder: a user's module that replaces `model`. It is used directly, not copied.

    Raises:
        ValueError, ImportError: the network cannot be built, or cannot serve as an encoder.
    """
    devices = {p.device for p in encoder.parameters() if p.is_cuda} if isinstance(encoder, nn.Module) else ()
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        made = build_encoder(
            model, mean=mean, std=std, image_size=image_size, width=width, batch_norm=batch_norm, encoder=encoder
        )
        projector = Projector(made.feature_dim, hidden, proj_dim, batch_norm)
    return SimCLR(made, projector, amp_dtype)


def build_encoder(
    model: str,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int | tuple[int, int],
    width: int,
    batch_norm: bool = True,
    encoder: nn.Module | None = None,
    train: bool = True,
) -> Encoder:
    """Return the encoder of `build_model`, with parameters drawn from torch's global generator.

    Args:
        train: whether the encoder will be trained. If so, an encoder that cannot be trained is rejected.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    channels = len(mean)
    if encoder is None and model in DEFAULT_WIDTH:
        width = width or DEFAULT_WIDTH[model]
        net = ConvNet(channels, width, batch_norm) if model == "conv" else ResNet(
            model, channels, width, max(size), batch_norm
        )  # fmt: skip
        return Encoder(net, mean, std, size, net.feature_dim)

    name = "the encoder" if encoder is not None else f"--model {model}"
    if not batch_norm:
        raise ValueError(f"--norm none applies only to {', '.join(DEFAULT_WIDTH)}; {name} has its own normalisation")
    if encoder is not None and width:
        raise ValueError(f"--width applies only to {', '.join(DEFAULT_WIDTH)}, not to your own encoder, got {width}")
    body = encoders.by_name(model, channels, size) if encoder is None else encoder
    feature_dim = encoders.adopt(name, body, channels, size, train=train)
    if isinstance(body, Encoder):  # a loaded encoder, which already standardises images
        return body
    library = encoder is None and model.startswith(encoders.LIBRARIES)
    return Encoder(body, mean, std, size, feature_dim, channels_last=library)
