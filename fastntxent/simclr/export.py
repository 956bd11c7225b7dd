"""The sub-command `export`: writes a trained encoder as a torch.export program. Same exit statuses as the trainer."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from ..files import write_whole
from .build import load_encoder
from .config import PROGRAM, Parser
from .models import Encoder
from .output import check_output_file, first_line, printable
from .ranks import MISTAKES


def main(argv: Sequence[str]) -> int:
    """Run the sub-command and return the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        encoder = load_encoder(arguments.checkpoint)
        size = sum(tensor.nbytes for tensor in encoder.state_dict().values())
        check_output_file(arguments.out, arguments.overwrite, 2 * size + 2**20)
        program = export_encoder(encoder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about weights in channels-last format
            write_whole(arguments.out, lambda file: torch.export.save(program, file))
    except MISTAKES as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    shape = ", ".join(map(str, (encoder.channels, *encoder.size)))
    print(f"{printable(arguments.out)} maps images (N, {shape}) in [0, 1] to features (N, {encoder.feature_dim})")
    return 0


def export_encoder(encoder: Encoder) -> torch.export.ExportedProgram:
    """Return the encoder, in eval mode, as a program for any number of images of the size used in training.

    Raises:
        ValueError: the encoder cannot be exported, or the program gives different features.
    """
    encoder.eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, encoder.channels, *encoder.size, generator=generator)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batch = torch.export.Dim("batch", min=1)
            program = torch.export.export(encoder, (images[:2],), dynamic_shapes=({0: batch},))
            run = program.module()
            differences = [(run(part) - encoder(part)).abs().max() for part in (images, images[:1])]
            scale = encoder(images).abs().max()
    except Exception as error:  # tracing an arbitrary network may raise anything
        raise ValueError(
            f"torch.export cannot export the encoder: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not max(differences) <= 1e-3 * scale:
        raise ValueError("the exported encoder gives different features: its forward may depend on values or be random")
    return program


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=f"{PROGRAM} export",
        description="Write a trained encoder as a program that torch.export.load reads without this package. The "
        "program maps any number of images in [0, 1], of the size used in training, to features.",
    )
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="PATH", help="folder or checkpoint of "
                        "a run")  # fmt: skip
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="file to write, for example encoder.pt2"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    return parser
