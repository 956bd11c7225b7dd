"""Device and model of a run, and the encoder back out of its checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from .checkpoint import first_line, load_checkpoint
from .config import Config
from .data import ImageData
from .models import SimCLR, build_model
from .ranks import ALONE, Ranks

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device of `--device`, of several ranks each one's own GPU; ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.group and name.startswith("cuda"):
        if name != "cuda":
            raise ValueError(f"--device must be cuda for {ranks.world} ranks, which is a GPU for each, got {name}")
        if ranks.local >= torch.cuda.device_count():
            raise ValueError(
                f"--device cuda must find a GPU for each rank of a machine, got {torch.cuda.device_count()} for rank "
                f"{ranks.local} of it; start fewer with --nproc-per-node, or take --device cpu"
            )
        torch.cuda.set_device(ranks.local)
        return torch.device("cuda", ranks.local)
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device without memory, such as "meta", has nothing to read
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used: {first_line(error)}") from error
    return device


def make_model(config: Config, data: ImageData, device: torch.device, encoder: nn.Module | None = None) -> SimCLR:
    """The model of a run as it is before its first step."""
    on_cuda = device.type == "cuda"
    amp = ("bf16" if on_cuda else "off") if config.amp == "auto" else config.amp
    if amp != "off" and not on_cuda:
        raise ValueError(f"--amp {amp} needs a CUDA device, got {device}")
    mean, std = data.channel_moments()
    return build_model(
        config.model,
        mean=mean,
        std=std,
        image_size=data.image_size,
        width=config.width,
        hidden=config.proj_hidden,
        proj_dim=config.proj_dim,
        seed=config.seed,
        batch_norm=config.norm == "batch",
        amp_dtype=AMP_DTYPES[amp],
    ).to(device)


def load_encoder(path: Path | str) -> nn.Module:
    """The trained encoder of a checkpoint, on the CPU and in eval mode.

    Args:
        path: a `checkpoint.pt` of this trainer.

    Returns:
        A module from (N, C, H, W) images in [0, 1] to (N, F) features.

    Raises:
        FileNotFoundError, ValueError: as `load_checkpoint` does.
    """
    state = load_checkpoint(Path(path))
    config = Config.from_dict(state["config"])
    nothing = [0.0] * state["channels"]
    model = build_model(
        config.model,
        mean=nothing,
        std=nothing,
        image_size=state["image_size"],
        width=config.width,
        hidden=config.proj_hidden,
        proj_dim=config.proj_dim,
        seed=config.seed,
        batch_norm=config.norm == "batch",
    )
    model.load_state_dict(state["model"])
    return model.encoder.eval()
