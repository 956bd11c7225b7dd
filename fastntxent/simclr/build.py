"""The device and the model of a run, and loading a trained encoder from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .checkpoint import FILE_NAME, load_checkpoint
from .config import Config
from .data import TrainingData
from .models import Encoder, SimCLR, build_encoder, build_model, check_model
from .output import first_line, printable
from .ranks import ALONE, Ranks

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """Return the device that `--device` names; for cuda on several ranks, this rank's GPU.

    Raises:
        ValueError: the device cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.group and name.startswith("cuda"):
        if name != "cuda":
            raise ValueError(f"--device must be cuda for {ranks.world} ranks, one GPU for each, got {name}")
        if ranks.local >= torch.cuda.device_count():
            raise ValueError(
                "--device cuda needs a GPU for each rank on a machine, but this machine has "
                f"{torch.cuda.device_count()}, and none is left for its rank {ranks.local}; start fewer ranks "
                "with --nproc-per-node, or use --device cpu"
            )
        torch.cuda.set_device(ranks.local)
        return torch.device("cuda", ranks.local)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails on a device without memory, such as "meta"
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used: {first_line(error)}") from error
    return device


def make_model(config: Config, data: TrainingData, device: torch.device, encoder: nn.Module | None = None) -> SimCLR:
    """Return the model of a run as it is before the first step.

    Args:
        encoder: a user's module that replaces `config.model`. It maps standardised images (N, C, H, W) to features
            (N, F). It is moved to the device and trained in place.

    Raises:
        ValueError: the encoder cannot be built or trained on this data, or the device does not support the mixed
            precision.
        ImportError: a package or module of the encoder cannot be imported.
    """
    on_cuda = device.type == "cuda"
    amp = ("bf16" if on_cuda else "off") if config.amp == "auto" else config.amp
    if amp != "off" and not on_cuda:
        raise ValueError(f"--amp {amp} needs a CUDA device, got {device}")
    mean, std = data.channel_moments()
    _, height, width = data.image_shape
    return build_model(
        config.model,
        mean=mean,
        std=std,
        image_size=(height, width),
        width=config.width,
        hidden=config.proj_hidden,
        proj_dim=config.proj_dim,
        seed=config.seed,
        batch_norm=config.norm == "batch",
        amp_dtype=AMP_DTYPES[amp],
        encoder=encoder,
    ).to(device)


def load_encoder(path: Path | str, encoder: nn.Module | None = None) -> Encoder:
    """Return the trained encoder of a run, on the CPU and in eval mode.

    Args:
        path: a run's folder, or a checkpoint of this trainer.
        encoder: a module of the trained architecture; its parameters are overwritten. Required if the run's Trainer was
            given a module. For other runs, the module is used in place of the network that the checkpoint names, so
            nothing is imported by name.

    Returns:
        A module that maps float images (N, C, H, W) in [0, 1] to features (N, F). Its attributes `channels` and
        `image_size` describe the training images; `feature_dim` is F.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: the file is not a checkpoint of this trainer, is damaged, or does not match the module.
        ImportError: a package or module of the network cannot be imported.
    """
    path = Path(path)
    if path.is_dir():
        path /= FILE_NAME
    name = printable(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {name}")
    state = load_checkpoint(path)
    try:
        config = Config.from_dict(state["config"])
        channels, height, width = map(int, state["image_shape"])
        parameters = {key: value for key, value in state["model"].items() if key.startswith(_PREFIX)}
        check_model(config.model)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{name} is not a complete checkpoint of the trainer ({type(error).__name__}: {error})"
        ) from error
    if encoder is None and state.get("own_encoder"):
        raise ValueError(
            f"{name} holds the parameters of a module that was passed to Trainer: pass a module of that architecture "
            "to load_encoder(path, encoder=module)"
        )
    nothing = [0.0] * channels
    with torch.random.fork_rng(devices=[]):
        made = build_encoder(
            config.model,
            mean=nothing,
            std=nothing,
            image_size=(height, width),
            width=config.width if encoder is None else 0,
            batch_norm=encoder is not None or config.norm == "batch",
            encoder=encoder,
            train=False,
        )
    load_parameters(made, {key.removeprefix(_PREFIX): value for key, value in parameters.items()}, name)
    return made.cpu().eval()


_PREFIX = "encoder."


def load_parameters(module: nn.Module, parameters: dict[str, torch.Tensor], name: str) -> None:
    """Load a checkpoint's parameters into a module; ValueError, naming the file, if they do not match the module."""
    try:
        module.load_state_dict(parameters)
    except (RuntimeError, TypeError, AttributeError) as error:
        _, *differences = str(error).splitlines() or [""]
        words = "; ".join(difference.strip() for difference in differences[:3]) or str(error)
        raise ValueError(f"{name} holds parameters of a different architecture: {printable(words)[:500]}") from error
