"""The sub-command `embed`: computes features of images with a trained encoder. Same exit statuses as the trainer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..files import write_whole
from .arrays import MIN_SIZE
from .build import load_encoder, pick_device
from .config import PROGRAM, Parser
from .encode_input import Input, images_of
from .images import default_threads, progress_bar, told_bad
from .models import Encoder
from .notes import counted
from .output import check_output_file, first_line, printable
from .pixels import BadFile
from .ranks import MISTAKES

# ITU-R 601 weights, as in Pillow's conversion to grey.
_GREY = (0.299, 0.587, 0.114)


class Features(NamedTuple):
    """Features (N, F) of the input's images at the indices `places`, and the unreadable files and folders."""

    features: Tensor
    places: list[int]
    bad: list[BadFile]


def main(argv: Sequence[str]) -> int:
    """Run the sub-command and return the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        _embed(arguments)
    except MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def _embed(arguments: argparse.Namespace) -> None:
    for name, least in (("image_size", MIN_SIZE), ("batch_size", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    device = pick_device(arguments.device)
    encoder = load_encoder(arguments.checkpoint).to(device)
    found = images_of(arguments.images, arguments.image_size, encoder.image_size, default_threads())
    if any(path.exists() and arguments.out.exists() and path.samefile(arguments.out) for path in arguments.images):
        raise ValueError(f"--out {printable(arguments.out)} is an input file")
    width = try_size(encoder, found.shape, device)
    check_output_file(arguments.out, arguments.overwrite, _bytes_of(found, width))
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)

    with progress_bar(None if arguments.quiet else len(found.names), "embedding") as advance:
        done = encode_images(encoder, found, width, arguments.batch_size, device, arguments.skip_bad, advance)
    note = told_bad(done.bad, len(found.names), found.where, arguments.skip_bad)
    if note:
        print(f"note: {note}", file=sys.stderr)
    if not done.places:
        raise ValueError(f"no image of {found.where} can be read")
    if not done.features.isfinite().all():
        print("note: some features are not finite; the encoder's parameters may not be finite either", file=sys.stderr)
    features = F.normalize(done.features, out=done.features) if arguments.normalize else done.features
    arrays = _arrays(features, found, done.places)
    write_whole(arguments.out, lambda file: np.savez(file, allow_pickle=False, **arrays))
    if not arguments.quiet:
        images = counted(len(features), "image", "images")
        print(f"{width} features of each of {images} written to {printable(arguments.out)}: {', '.join(arrays)}")


def try_size(encoder: Encoder, shape: tuple[int, int, int], device: torch.device) -> int:
    """Return the number of features for an image of this shape; ValueError if the encoder does not accept the shape."""
    try:
        with torch.no_grad():
            return encoder(torch.zeros(1, encoder.channels, *shape[1:], device=device)).shape[1]
    except Exception as error:  # networks may raise anything for an image of the wrong size
        size = " x ".join(map(str, shape[1:]))
        trained = " x ".join(map(str, encoder.size))
        raise ValueError(
            f"the encoder, trained on images of {trained} pixels, does not take {size}: {first_line(error)}"
        ) from error


def encode_images(
    encoder: Encoder,
    found: Input,
    width: int,
    batch_size: int,
    device: torch.device,
    skip_bad: bool,
    advance: Callable[[], object] = lambda: None,
) -> Features:
    """Encode the images of an input as they are read, `batch_size` at a time. Features are float32 on the CPU.

    Without `skip_bad`, images after the first bad one are read only to find further bad ones.
    """
    features = torch.empty(len(found.names), width)
    places: list[int] = []
    bad = list(found.unreadable)
    start = 0
    for batch in _batches(found, batch_size, bad, skip_bad, advance):
        images = torch.stack([image for _, image in batch])
        places += [place for place, _ in batch]
        try:
            with torch.no_grad():
                h = encoder(_with_channels(images.to(device).float() / 255, encoder.channels))
        except RuntimeError as error:
            raise ValueError(
                f"the encoder fails on a batch of {len(images)} images: {first_line(error)}; is --batch-size too large?"
            ) from error
        features[start : start + len(h)] = h.float().cpu()
        start += len(h)
    return Features(features[:start], places, bad)


def _batches(
    found: Input, batch_size: int, bad: list[BadFile], skip_bad: bool, advance: Callable[[], object]
) -> Iterator[list[tuple[int, Tensor]]]:
    """Yield batches of images with their indices in the input, and append bad images to `bad`."""
    batch: list[tuple[int, Tensor]] = []
    for place, image in enumerate(found.read()):
        advance()
        if isinstance(image, BadFile):
            bad.append(image)
        elif skip_bad or not bad:
            batch.append((place, image))
            if len(batch) == batch_size:
                yield batch
                batch = []
    if batch and (skip_bad or not bad):
        yield batch


def _with_channels(x: Tensor, channels: int) -> Tensor:
    """Return the images converted to grey or to colour."""
    if x.shape[1] == channels:
        return x
    if channels == 1:
        return (x * x.new_tensor(_GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)
    return x.expand(-1, channels, -1, -1)


def _arrays(features: Tensor, found: Input, places: list[int]) -> dict[str, Any]:
    """Return the arrays of the file. Text has a fixed-length dtype, which np.load reads without pickle."""
    arrays: dict[str, Any] = {
        "features": features.numpy(),
        "paths": np.array([printable(found.names[place]) for place in places], np.str_),
    }
    if found.class_names:
        arrays["labels"] = found.labels[torch.tensor(places)].numpy()
        arrays["class_names"] = np.array(found.class_names, np.str_)
    return arrays


def _bytes_of(found: Input, width: int) -> int:
    """Return an upper bound on the file's size in bytes: features, labels, text at 4 bytes a character, and headers."""
    texts = [found.names, found.class_names]
    characters = sum(len(text) * max(map(len, text), default=0) for text in texts)
    return len(found.names) * (4 * width + 8) + 4 * characters + 2**16


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"{PROGRAM} embed",
        description="Compute features of images with a trained encoder and write them to an .npz file: features (N, F) "
        "float32, paths (N,) and, if the images have classes, labels (N,) int64 and class_names (C,). docs/encoder.md "
        "shows how to use them.",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="folders and image files, or an .npz "
                        "file with an array `images`")  # fmt: skip
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="PATH", help="folder or checkpoint of "
                        "a run")  # fmt: skip
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help=".npz file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    parser.add_argument("--skip-bad", action="store_true", help="skip files that cannot be read as images")
    parser.add_argument("--image-size", type=int, metavar="PX", help="crop and resize images to this many pixels a "
                        "side (default: the size used in training)")  # fmt: skip
    parser.add_argument("--normalize", action="store_true", help="scale every feature vector to length 1")
    parser.add_argument(
        "--batch-size", type=int, default=256, metavar="N", help="images encoded at once (default: 256)"
    )
    parser.add_argument("--device", default="auto", metavar="DEV", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")
    return parser
