"""Encoders and the projection head.

An encoder maps images in [0, 1] to features h; the head maps h to the embedding z, where the loss lives, and
is thrown away afterwards (SimCLR, section 4.2). Both encoders take any number of channels and any image size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL_IMAGE = 64
DEFAULT_WIDTH = {"conv": 16, "resnet18": 64}
# The shortcuts of a ResNet are 1 x 1 convolutions of stride 2, channels last. On a CPU with AVX2 and no AVX-512 oneDNN
# (jit_avx2_1x1_convolution_bwd_weights, as of PyTorch 2.13) copies their input in whole blocks of 8 channels into
# scratch memory for the channels that there are: below 8 it writes past the end, which leaves wrong gradients or a
# corrupt heap. From 8 on there is room for every block.
LEAST_RESNET_WIDTH = 8


def check_model(model: str, name: str = "model") -> None:
    """Raise ValueError, under the setting's name, for a model that there is not."""
    if model not in DEFAULT_WIDTH:
        raise ValueError(f"{name} must be one of {', '.join(DEFAULT_WIDTH)}, got {model!r}")


def check_width(model: str, width: int, name: str = "width") -> None:
    """Raise ValueError, under the setting's name, for a width at which PyTorch does not train the model soundly."""
    if model == "resnet18" and width < LEAST_RESNET_WIDTH:
        raise ValueError(
            f"{name} must be at least {LEAST_RESNET_WIDTH} for resnet18, got {width}: below that PyTorch 2.13 "
            "overruns its memory in the backward of the shortcuts, on a CPU with AVX2 but without AVX-512"
        )


class Standardise(nn.Module):
    """(x - mean) / std per channel; inside the encoder, so that nobody who loads it can forget it."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        # Channels last is 1.3 to 2.5 times as fast for these encoders on a CPU.
        return ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


def _conv(inputs: int, outputs: int, kernel: int, stride: int, batch_norm: bool) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=not batch_norm)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs) if batch_norm else nn.Identity())


class ConvEncoder(nn.Module):
    """Three stride-2 convolutions and a 2 x 2 pool: an encoder for small images and two CPU cores.

    The 2 x 2 pool keeps a trace of where things are, which a global pool of so shallow a network would lose.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], width: int, batch_norm: bool = True) -> None:
        super().__init__()
        self.feature_dim = 16 * width
        self.layers = nn.Sequential(
            Standardise(mean, std),
            _conv(len(mean), width, 5, 2, batch_norm), nn.ReLU(),
            _conv(width, 2 * width, 3, 2, batch_norm), nn.ReLU(),
            _conv(2 * width, 4 * width, 3, 2, batch_norm), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layers(x)
        return h


class _Residual(nn.Module):
    """Two 3 x 3 convolutions around a shortcut (He et al. 2016, the block of ResNet-18)."""

    def __init__(self, inputs: int, outputs: int, stride: int, batch_norm: bool) -> None:
        super().__init__()
        self.first = _conv(inputs, outputs, 3, stride, batch_norm)
        self.second = _conv(outputs, outputs, 3, 1, batch_norm)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1, stride, batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 without its classifier; `width` channels in the first stage (64 in the paper).

    Images of at most 64 pixels get a 3 x 3 stem and no max-pool, as in SimCLR's CIFAR-10 experiments
    (appendix B.9); larger ones the usual 7 x 7 stem.

    Raises:
        ValueError: width is below LEAST_RESNET_WIDTH.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], width: int, image_size: int, batch_norm: bool = True
    ) -> None:
        super().__init__()
        check_width("resnet18", width)
        self.feature_dim = 8 * width
        small = image_size <= SMALL_IMAGE
        stem = [
            Standardise(mean, std),
            _conv(len(mean), width, 3 if small else 7, 1 if small else 2, batch_norm),
            nn.ReLU(),
        ]
        if not small:
            stem.append(nn.MaxPool2d(3, 2, 1))
        blocks = []
        inputs = width
        for stage in range(4):
            outputs = width * 2**stage
            blocks += [
                _Residual(inputs, outputs, 1 if stage == 0 else 2, batch_norm),
                _Residual(outputs, outputs, 1, batch_norm),
            ]
            inputs = outputs
        self.layers = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.layers(x)
        return h


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
    """Images -> embeddings z, optionally under autocast."""

    def __init__(self, encoder: ConvEncoder | ResNet18, projector: Projector, amp_dtype: torch.dtype | None = None):
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.amp_dtype = amp_dtype

    def forward(self, x: Tensor) -> Tensor:
        # Autocast lives here and not around the step, so that gradient caching re-runs it the same way.
        with torch.autocast(x.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            z: Tensor = self.projector(self.encoder(x))
        return z


def build_model(
    model: str,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int,
    width: int,
    hidden: int,
    proj_dim: int,
    seed: int,
    batch_norm: bool = True,
    amp_dtype: torch.dtype | None = None,
) -> SimCLR:
    """A model whose initial parameters are a function of the arguments; torch's global generator is untouched.

    Args:
        model: "conv" or "resnet18".
        mean, std: of each channel of the images in [0, 1]; their length is the number of channels.
        image_size: decides the stem of a ResNet.
        width: channels of the encoder's first layer, at least 8 for "resnet18"; 0 for its default.
        hidden, proj_dim: units of the projection head's two layers.
        seed: of the initial parameters.
        batch_norm: False leaves BatchNorm out, with biases in its place.
        amp_dtype: run the forward under autocast to this dtype.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        width = width or DEFAULT_WIDTH[model]
        encoder: ConvEncoder | ResNet18
        if model == "conv":
            encoder = ConvEncoder(mean, std, width, batch_norm)
        else:
            encoder = ResNet18(mean, std, width, image_size, batch_norm)
        projector = Projector(encoder.feature_dim, hidden, proj_dim, batch_norm)
    simclr = SimCLR(encoder, projector, amp_dtype)
    simclr.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs
    return simclr
