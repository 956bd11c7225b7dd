"""Every setting of a run, and the command line made from them."""

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
    """A field and its command-line option. `same`: a resumed run must agree with its checkpoint on it."""
    metadata = {"group": group, "help": text, "same": same, "argparse": argparse_options}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """The settings of one run; `--help` says what each means, `check` what values it takes."""

    data: str = _option("mnist5k", "data", "the data set", choices=tuple(SOURCES))
    data_dir: Path | None = _option(  # noqa: RUF009 (a path does not change)
        None, "data", "where its files are; for npz, the file itself", same=False, type=Path, metavar="PATH"
    )
    image_size: int | None = _option(
        None, "data", "side in pixels that the images of a folder are cut and resized to (default: 32); other data "
        "keep their size, and must have this one if it is given", type=int, metavar="PX",
    )  # fmt: skip
    skip_bad: bool = _option(False, "data", "go on without the files that cannot be read as images", same=False)
    in_memory: str = _option(
        "auto", "data", "keep decoded images in memory, or read each from its file whenever it is needed; auto: in "
        "memory if they take at most 512 MiB", same=False, choices=("auto", "yes", "no"),
    )  # fmt: skip
    workers: int | None = _option(
        None, "data", "processes that read images while the model trains; 0: the run's own (default: where images are "
        "read from files one for each core, at most 8)", same=False, type=int, metavar="N",
    )  # fmt: skip
    download: bool = _option(False, "data", "let torchvision download a missing data set", same=False)
    augment: str = _option(
        "auto",
        "data",
        "what a random view may do to an image; auto: digits for mnist5k and digits, objects for fashion-mnist, "
        "photos for the rest",
        choices=("auto", *PRESETS),
    )

    model: str = _option(
        "conv", "model", "the encoder: conv, resnet18, resnet50, timm:NAME, torchvision:NAME, or "
        "package.module:factory, a function that returns a module from images (N, C, H, W) to features (N, F)",
        metavar="NAME",
    )  # fmt: skip
    width: int = _option(
        0, "model", "channels of the first layer of conv, resnet18 and resnet50, at least 8 for the latter two; 0: 16 "
        "for conv, 64 for the others", metavar="N",
    )  # fmt: skip
    norm: str = _option("batch", "model", "normalisation in encoder and head", choices=("batch", "none"))
    proj_hidden: int = _option(256, "model", "hidden units of the projection head", metavar="N")
    proj_dim: int = _option(128, "model", "dimension of the embedding the loss sees", metavar="D")

    objective: str = _option(
        "nt_xent",
        "loss",
        "what is minimised: the loss, or one of its terms alone, L_a or L_d of tau L = L_a + L_d",
        choices=("nt_xent", "alignment", "distribution"),
    )
    loss: str = _option(
        "fused",
        "loss",
        "fused kernels, or the dense reference in plain PyTorch",
        choices=("fused", "reference"),
    )
    backend: BackendName = _option(  # noqa: RUF009 (a field, as the others)
        "auto",
        "loss",
        "backend of the fused loss, a name from fastntxent.backends()",
        same=False,
        metavar="NAME",
    )
    temperature: float = _option(0.5, "loss", "temperature, or its start if it is learnt", metavar="TAU")
    learn_temperature: bool = _option(False, "loss", "learn the temperature along with the model")
    verify_every: int = _option(
        0, "loss", "every K steps compare loss and gradient with the float64 reference on the batch at hand, and "
        "stop (exit status 1) if an error exceeds its budget; 0: never", same=False, metavar="K",
    )  # fmt: skip

    epochs: int = _option(
        65, "training", "passes over the data; the schedule spans them, so a resumed run cannot change this",
        metavar="N",
    )  # fmt: skip
    max_steps: int = _option(
        0, "training", "stop after this many steps, counted from the start of the run, with the schedule left as it "
        "is: a later --resume goes on as if nothing had happened; 0: no limit", same=False, metavar="N",
    )  # fmt: skip
    batch_size: int = _option(256, "training", "images per step, of all ranks under torchrun", metavar="N")
    accumulate_batch: int = _option(
        0, "training", "images the loss sees per step, in place of --batch-size, with the encoder running on --chunk "
        "of them at a time (gradient caching); 0: off", metavar="B",
    )  # fmt: skip
    chunk: int = _option(
        0, "training", "images the encoder sees at once with --accumulate-batch; 0: --batch-size", metavar="C"
    )
    optimizer: str = _option("adamw", "training", "the optimiser", choices=("adamw", "lars"))
    lr: float = _option(
        0.0, "training", "peak learning rate; 0: 0.003 for adamw, 0.075 sqrt(batch) for lars", metavar="LR"
    )
    weight_decay: float = _option(1e-4, "training", "weight decay of matrices and kernels", metavar="WD")
    momentum: float = _option(0.9, "training", "momentum of lars", metavar="M")
    warmup_epochs: float | None = _option(
        None, "training", "epochs of linear warm-up before the cosine (default: 3, or a tenth of --epochs if that is "
        "less)", type=float, metavar="N",
    )  # fmt: skip
    seed: int = _option(0, "training", "seed of the initial weights, the order and the views", metavar="N")
    device: str = _option(
        "auto", "training", "auto, cpu, cuda, cuda:1, ...; under torchrun cuda is a GPU for each rank; a run is "
        "reproduced bit by bit on the same device only",
        same=False, metavar="DEV",
    )  # fmt: skip
    amp: str = _option(
        "auto", "training", "mixed precision of the model; auto: bf16 on a CUDA device, off elsewhere",
        choices=("auto", "off", "bf16", "fp16"),
    )  # fmt: skip

    out: Path = _option(  # noqa: RUF009
        Path("runs/simclr"), "output", "folder for checkpoint, figures, metrics and report", same=False, type=Path,
        metavar="DIR",
    )  # fmt: skip
    resume: str = _option(
        "", "output", "continue from a checkpoint, by default the one in --out; options not given again are taken "
        "from it, and those that shape the result must agree with it",
        same=False, nargs="?", const="auto", metavar="PATH",
    )  # fmt: skip
    overwrite: bool = _option(
        False, "output", "start afresh even if --out holds the checkpoint of an earlier run", same=False
    )
    checkpoint_every: int = _option(
        200, "output", "steps between checkpoints, besides one at the end; 0: at the end only", same=False,
        metavar="K",
    )  # fmt: skip
    log_every: int = _option(
        10, "output", "steps between measurements of alignment and uniformity", same=False, metavar="K"
    )
    tensorboard: bool = _option(False, "output", "log to TensorBoard too, in --out", same=False)
    wandb: str = _option("", "output", "log to Weights & Biases too, in this project", same=False, metavar="PROJECT")
    knn: int = _option(5, "output", "neighbours of the k-nearest-neighbour evaluation", same=False, metavar="K")
    eval_limit: int = _option(
        10000, "output", "images of either part, at most, that the evaluation uses", same=False, metavar="N"
    )
    quiet: bool = _option(False, "output", "no progress bar and no summary", same=False)

    def __post_init__(self) -> None:
        for name in ("data_dir", "out"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, Path(getattr(self, name)))

    @property
    def batch(self) -> int:
        """Samples per step, as the loss sees them."""
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
        """Raise ValueError, naming the option, for a value that no run can use."""
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
            raise ValueError(f"--loss reference is a backend of its own, and --backend {self.backend} another")
        for name in ("learn_temperature", "verify_every"):
            if self.objective != "nt_xent" and getattr(self, name):
                raise ValueError(f"{flag(name)} is for --objective nt_xent, not for {self.objective}")
        if self.chunk and not self.accumulate_batch:
            raise ValueError("--chunk has a meaning only with --accumulate-batch")

    def to_dict(self) -> dict[str, str | int | float | bool | None]:
        """The fields as values that JSON and a checkpoint can hold."""
        return {name: str(v) if isinstance(v, Path) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`; unknown names, from another version, are left out."""
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
    """The type of a field's values, other than None."""
    return option.metadata["argparse"].get("type") or type(option.default)


def flag(name: str) -> str:
    """The command-line spelling of a field's name."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, where argparse would list every option above it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}; {self.prog} --help lists the options\n")


def parse_args(argv: Sequence[str] | None) -> dict[str, Any]:
    """The options that were given, and only those, by field name."""
    parser = Parser(
        prog=PROGRAM,
        description="Train an image encoder with SimCLR and the fused NT-Xent loss, judge it, and write a report.",
        epilog=f"torchrun --nproc-per-node N -m {PROGRAM.split()[-1]} ...: the same run over N processes. "
        f"{PROGRAM} study --help: runs that show what the loss's terms and its temperature do. "
        f"{PROGRAM} embed --help: features of images by a trained encoder. "
        f"{PROGRAM} export --help: a trained encoder for torch.export.load.",
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100),
    )
    groups = {
        name: parser.add_argument_group(name)
        for name in dict.fromkeys(option.metadata["group"] for option in fields(Config))
    }
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file of settings, named as these "
                        "options are; the command line has the last word")  # fmt: skip
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
