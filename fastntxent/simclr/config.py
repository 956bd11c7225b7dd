"""The settings of a run, and the command line generated from them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from ..options import BackendName
from .augment import PRESETS
from .models import check_model, check_width
from .sources import SOURCES

DEFAULT_PRESET = {"mnist5k": "digits", "digits": "digits", "fashion-mnist": "objects"}
PROGRAM = "python -m fastntxent.simclr"


def _option(default: Any, group: str, text: str, *, same: bool = True, **argparse_options: Any) -> Any:
    """Return a field with its command-line option. If `same`, a resumed run must use the checkpoint's value."""
    metadata = {"group": group, "help": text, "same": same, "argparse": argparse_options}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """The settings of one run. `--help` explains each of them, and `check` validates the values."""

    data: str = _option("mnist5k", "data", "data set", choices=tuple(SOURCES))
    data_dir: Path | None = _option(  # noqa: RUF009 (a path is immutable)
        None, "data", "folder of the data set's files; for npz, the file itself", same=False, type=Path, metavar="PATH"
    )
    image_size: int | None = _option(
        None, "data", "crop and resize the images of a folder to this many pixels a side (default: 32); other data "
        "sets keep their size, which must equal this value if it is given", type=int, metavar="PX",
    )  # fmt: skip
    skip_bad: bool = _option(False, "data", "skip files that cannot be read as images, instead of stopping", same=False)
    in_memory: str = _option(
        "auto", "data", "keep decoded images in memory, or read each from its file when it is needed; auto: keep them "
        "if they take at most 512 MiB", same=False, choices=("auto", "yes", "no"),
    )  # fmt: skip
    workers: int | None = _option(
        None, "data", "worker processes that read images while the model trains; 0: read in the main process (default: "
        "one per core, at most 8, if images are read from files, else 0)", same=False, type=int, metavar="N",
    )  # fmt: skip
    download: bool = _option(False, "data", "let torchvision download a missing data set", same=False)
    augment: str = _option(
        "auto",
        "data",
        "preset of the random augmentation; auto: digits for mnist5k and digits, objects for fashion-mnist, photos for "
        "all others",
        choices=("auto", *PRESETS),
    )

    model: str = _option(
        "conv", "model", "encoder: conv, resnet18, resnet50, timm:NAME, torchvision:NAME, or package.module:factory, a "
        "function that returns a module from images (N, C, H, W) to features (N, F)",
        metavar="NAME",
    )  # fmt: skip
    width: int = _option(
        0, "model", "channels of the first layer of conv, resnet18 and resnet50 (at least 8 for the ResNets); 0: 16 "
        "for conv, 64 for the ResNets", metavar="N",
    )  # fmt: skip
    norm: str = _option("batch", "model", "normalisation in the encoder and the head", choices=("batch", "none"))
    proj_hidden: int = _option(256, "model", "hidden units of the projection head", metavar="N")
    proj_dim: int = _option(128, "model", "dimension of the embedding that the loss sees", metavar="D")

    objective: str = _option(
        "nt_xent",
        "loss",
        "what to minimise: the whole loss, or one term of tau L = L_a + L_d alone (alignment: L_a, distribution: L_d)",
        choices=("nt_xent", "alignment", "distribution"),
    )
    loss: str = _option(
        "fused",
        "loss",
        "implementation of the loss: fused kernels, or the dense reference in plain PyTorch",
        choices=("fused", "reference"),
    )
    backend: BackendName = _option(  # noqa: RUF009 (a field like the others)
        "auto",
        "loss",
        "backend of the fused loss: auto, or a name from fastntxent.backends()",
        same=False,
        metavar="NAME",
    )
    temperature: float = _option(0.5, "loss", "temperature, or its initial value if it is learnt", metavar="TAU")
    learn_temperature: bool = _option(False, "loss", "learn the temperature along with the model")
    verify_every: int = _option(
        0, "loss", "every K steps, compare loss and gradient of the current batch with the float64 reference, and stop "
        "(exit status 1) if an error exceeds its budget; 0: never", same=False, metavar="K",
    )  # fmt: skip

    epochs: int = _option(
        65, "training", "passes over the data; a resumed run cannot change this number, because the learning-rate "
        "schedule depends on it", metavar="N",
    )  # fmt: skip
    max_steps: int = _option(
        0, "training", "stop after this many steps, counted from the start of the run; the schedule does not change, "
        "so a later --resume continues as if there had been no stop; 0: no limit", same=False, metavar="N",
    )  # fmt: skip
    batch_size: int = _option(256, "training", "images per step; under torchrun, the total of all ranks", metavar="N")
    accumulate_batch: int = _option(
        0, "training", "images that the loss sees per step, in place of --batch-size, while the encoder runs on "
        "--chunk images at a time (gradient caching); 0: off", metavar="B",
    )  # fmt: skip
    chunk: int = _option(
        0, "training", "images the encoder processes at once with --accumulate-batch; 0: --batch-size", metavar="C"
    )
    optimizer: str = _option("adamw", "training", "optimiser", choices=("adamw", "lars"))
    lr: float = _option(
        0.0, "training", "peak learning rate; 0: 0.003 for adamw, 0.075 sqrt(batch) for lars", metavar="LR"
    )
    weight_decay: float = _option(
        1e-4, "training", "weight decay, applied only to matrices and convolution kernels", metavar="WD"
    )
    momentum: float = _option(0.9, "training", "momentum of lars", metavar="M")
    warmup_epochs: float | None = _option(
        None, "training", "epochs of linear warm-up before the cosine decay (default: 3, or a tenth of --epochs if "
        "that is less)", type=float, metavar="N",
    )  # fmt: skip
    seed: int = _option(0, "training", "seed of the initial weights, the image order and the random views", metavar="N")
    device: str = _option(
        "auto", "training", "auto, cpu, cuda, cuda:1, ...; under torchrun, cuda gives each rank a GPU; results are "
        "bitwise reproducible only on the same device",
        same=False, metavar="DEV",
    )  # fmt: skip
    amp: str = _option(
        "auto", "training", "mixed precision of the model; auto: bf16 on a CUDA device, off elsewhere",
        choices=("auto", "off", "bf16", "fp16"),
    )  # fmt: skip

    out: Path = _option(  # noqa: RUF009
        Path("runs/simclr"), "output", "folder for the checkpoint, figures, metrics and report", same=False, type=Path,
        metavar="DIR",
    )  # fmt: skip
    resume: str = _option(
        "", "output", "continue from a checkpoint, by default the one in --out; options that are not given come from "
        "the checkpoint, and options that affect the result must match it",
        same=False, nargs="?", const="auto", metavar="PATH",
    )  # fmt: skip
    overwrite: bool = _option(
        False, "output", "start from scratch even if --out holds the checkpoint of an earlier run", same=False
    )
    checkpoint_every: int = _option(
        200, "output", "steps between checkpoints; one is also written at the end; 0: only at the end", same=False,
        metavar="K",
    )  # fmt: skip
    log_every: int = _option(
        10, "output", "steps between rows of the log: loss, alignment, uniformity, ...", same=False, metavar="K"
    )
    tensorboard: bool = _option(False, "output", "also log to TensorBoard, in --out", same=False)
    wandb: str = _option("", "output", "also log to this project of Weights & Biases", same=False, metavar="PROJECT")
    knn: int = _option(5, "output", "number of neighbours in the k-NN evaluation", same=False, metavar="K")
    eval_limit: int = _option(
        10000, "output", "maximum number of training and of test images in the evaluation", same=False, metavar="N"
    )
    quiet: bool = _option(False, "output", "no progress bar and no summary", same=False)

    def __post_init__(self) -> None:
        for name in ("data_dir", "out"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Path(getattr(self, name)))

    @property
    def batch(self) -> int:
        """The number of images that the loss sees per step, if the data set has that many."""
        return self.accumulate_batch or self.batch_size

    @property
    def warmup(self) -> float:
        """Epochs of linear warm-up, with the default resolved."""
        return min(3.0, self.epochs / 10) if self.warmup_epochs is None else self.warmup_epochs

    @property
    def preset(self) -> str:
        """The augmentation preset's name, with `auto` resolved."""
        return DEFAULT_PRESET.get(self.data, "photos") if self.augment == "auto" else self.augment

    def check(self) -> None:
        """Raise ValueError, naming the option, if a value is invalid."""
        for option in fields(self):
            allowed = option.metadata["argparse"].get("choices")
            value, wanted = getattr(self, option.name), kind(option)
            accepted = (int, float) if wanted is float else wanted
            if isinstance(value, int) and abs(value) >= 2**63:
                raise ValueError(f"{flag(option.name)} must be less than 2^63, got {value}")
            missing = value is None and option.default is None
            if not (missing or isinstance(value, accepted)) or (isinstance(value, bool) and wanted is not bool):
                raise ValueError(f"{flag(option.name)} must be {wanted.__name__}, got {value!r}")
            if allowed and value not in allowed:
                raise ValueError(f"{flag(option.name)} must be one of {', '.join(allowed)}, got {value!r}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise ValueError(f"{flag(name)} must be at least {least}, got {value}")
        if self.momentum >= 1:
            raise ValueError(f"--momentum must be less than 1, got {self.momentum}: the step would grow without bound")
        if self.warmup_epochs is not None and self.warmup_epochs > self.epochs:
            raise ValueError(f"--warmup-epochs must be at most --epochs {self.epochs}, got {self.warmup_epochs}")
        check_model(self.model, "--model")
        if self.width:
            check_width(self.model, self.width, "--width")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"--temperature must be positive, got {self.temperature}")
        for name in ("accumulate_batch", "chunk"):
            if getattr(self, name) == 1:
                raise ValueError(f"{flag(name)} must be 0 (off) or at least 2, got 1")
        if self.loss == "reference" and self.backend not in ("auto", "reference"):
            raise ValueError(f"--loss reference and --backend {self.backend} cannot be combined")
        for name in ("learn_temperature", "verify_every"):
            if self.objective != "nt_xent" and getattr(self, name):
                raise ValueError(f"{flag(name)} requires --objective nt_xent, got {self.objective}")
        if self.chunk and not self.accumulate_batch:
            raise ValueError("--chunk requires --accumulate-batch")

    def to_dict(self) -> dict[str, str | int | float | bool | None]:
        """Return the fields as values that JSON and a checkpoint can hold."""
        return {name: str(v) if isinstance(v, Path) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """Return the settings that `to_dict` turned into `values`, ignoring names unknown to this version."""
        known = {option.name: option.metadata["argparse"].get("type") for option in fields(cls)}
        return cls(**{
            name: known[name](value) if known[name] and value is not None else value
            for name, value in values.items()
            if name in known
        })  # fmt: skip


_LEAST: dict[str, float] = {
    "image_size": 8, "width": 0, "proj_hidden": 1, "proj_dim": 1, "verify_every": 0, "epochs": 1, "max_steps": 0,
    "batch_size": 2, "accumulate_batch": 0, "chunk": 0, "lr": 0, "weight_decay": 0, "momentum": 0,
    "warmup_epochs": 0, "seed": 0, "workers": 0, "checkpoint_every": 0, "log_every": 1, "knn": 1, "eval_limit": 2,
}  # fmt: skip


def kind(option: Field[Any]) -> type:
    """Return the type of a field's values, other than None."""
    return option.metadata["argparse"].get("type") or type(option.default)


def flag(name: str) -> str:
    """Return the command-line spelling of a field's name."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line, without argparse's list of all options above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}; {self.prog} --help lists the options\n")


def parse_args(argv: Sequence[str] | None) -> dict[str, Any]:
    """Return only the options that were given, by field name, with the path of `--config` as "config"."""
    parser = Parser(
        prog=PROGRAM,
        description="Train an image encoder with SimCLR and the fused NT-Xent loss, evaluate it, and write a report.",
        epilog=f"torchrun --nproc-per-node N -m {PROGRAM.split()[-1]} ...: run on N processes. "
        f"{PROGRAM} study --help: show what the loss's terms and its temperature do. "
        f"{PROGRAM} embed --help: compute features of images with a trained encoder. "
        f"{PROGRAM} export --help: export a trained encoder for torch.export.load.",
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100),
    )
    groups = {
        name: parser.add_argument_group(name)
        for name in dict.fromkeys(option.metadata["group"] for option in fields(Config))
    }
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings named like these options; "
                        "the command line overrides it")  # fmt: skip
    for option in fields(Config):
        extra = dict(option.metadata["argparse"])
        default = option.default
        text = option.metadata["help"]
        if isinstance(default, bool):
            extra["action"] = "store_true"
        else:
            extra.setdefault("type", type(default))
            if default not in (None, "", 0):
                text += f" (default: {default})"
        groups[option.metadata["group"]].add_argument(flag(option.name), help=text, **extra)
    return vars(parser.parse_args(argv))
