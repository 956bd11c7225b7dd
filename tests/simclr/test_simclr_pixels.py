import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastntxent.simclr.pixels import BadFile, decode, try_decode

RAMP = np.linspace(0, 65535, 32 * 32).reshape(32, 32)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return str(path)


def error_of(path, size=8):
    answer = try_decode(str(path), size)
    assert isinstance(answer, BadFile), answer
    return answer.reason


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2"), ("pgm", "<u2"), ("tif", np.int32)],
)
def test_decode_scales_16_bit_images(tmp_path, suffix, dtype):
    path = save(tmp_path / f"x.{suffix}", RAMP.astype(dtype))
    pixels = decode(path, 32)
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels - RAMP / 257).max() <= 0.51


def test_decode_takes_floats_from_0_to_1(tmp_path):
    pixels = decode(save(tmp_path / "x.tif", (RAMP / 65535).astype(np.float32)), 32)
    assert np.abs(pixels - RAMP / 257).max() <= 0.51


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (RAMP.astype(np.int32) + 1, "its integers must lie in 0..65535, got 1..65536"),
        (RAMP.astype(np.int32) - 1, "its integers must lie in 0..65535, got -1..65534"),
        ((RAMP / 257).astype(np.float32), "its floating-point values must lie in [0, 1], got [0, 255]"),
        ((RAMP - 1).astype(np.float32), "its floating-point values must lie in [0, 1], got [-1, 65534]"),
        (
            np.where(RAMP > 9, np.nan, 0).astype(np.float32),
            "its floating-point values must lie in [0, 1], got [nan, nan]",
        ),
    ],
)
def test_decode_refuses_values_outside_the_range(tmp_path, array, words):
    assert error_of(save(tmp_path / "x.tif", array)) == words


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_decode_converts_every_mode_as_pillow_does(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    path = tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr") else "x.png")
    image.save(path)
    with Image.open(path) as again:
        assert again.mode == mode
        assert np.array_equal(decode(str(path), 12).transpose(1, 2, 0), np.asarray(again.convert("RGB")))


@pytest.mark.parametrize("shape", [(20, 60), (33, 20), (16, 16), (1, 1), (1, 300), (57, 91)])
def test_decode_crops_the_centre_square_as_pillows_fit_does(tmp_path, shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    path = save(tmp_path / "x.png", pixels)
    for size in (8, 17):
        assert np.array_equal(
            decode(path, size).transpose(1, 2, 0), np.asarray(ImageOps.fit(Image.fromarray(pixels), (size, size)))
        )


@pytest.mark.parametrize("shape", [(1501, 2003), (999, 1237), (64, 80), (800, 40)])
@pytest.mark.parametrize("size", [32, 64])
def test_decode_of_a_jpeg_at_reduced_scale_is_close_to_full_scale(tmp_path, shape, size):
    coarse = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    image = Image.fromarray(coarse).resize(shape[::-1])
    image.save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as whole:
        expected = np.asarray(ImageOps.fit(whole.convert("RGB"), (size, size))).astype(int)
    assert np.abs(decode(str(tmp_path / "x.jpg"), size).transpose(1, 2, 0) - expected).max() <= 3


TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE",
    8: "ROTATE_270",
}  # fmt: skip


@pytest.mark.parametrize("orientation", [0, 1, *TURNS, 9])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_decode_turns_images_upright(tmp_path, orientation, suffix):
    upright = np.zeros((40, 56, 3), np.uint8)
    upright[:20] = 255
    upright[:, :20, 2] = 128
    image = Image.fromarray(upright)
    # A camera stores the image with the inverse of the turn that the tag asks for.
    stored = image.transpose(getattr(Image, TURNS[orientation])) if orientation in TURNS else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"x.{suffix}", exif=exif, quality=95)
    expected = np.asarray(ImageOps.fit(image, (16, 16))).transpose(2, 0, 1).astype(int)
    assert np.abs(decode(str(tmp_path / f"x.{suffix}"), 16) - expected).mean() < 4


def test_decode_takes_an_image_with_damaged_exif(tmp_path):
    image = Image.fromarray(np.full((16, 16, 3), 99, np.uint8))
    image.save(tmp_path / "x.jpg", exif=b"Exif\0\0nonsense that is no TIFF header")
    assert abs(int(decode(str(tmp_path / "x.jpg"), 8).mean()) - 99) <= 1


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def flat_png(width, height, rows):
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((width // 8 + 2) * rows), 9)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + png_chunk(b"IEND", b"")


def encoded(kind):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def with_a_short_chunk():
    png = encoded("PNG")
    at = png.index(b"IDAT")
    return png[: at - 4] + struct.pack(">I", 10) + png[at:]


BROKEN = {
    **{f"cut.{kind.lower()}": encoded(kind)[:900] for kind in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "PPM", "WEBP")},
    "empty.png": b"",
    "page.jpg": b"<html>404</html>",
    "zeros.jpg": bytes(5000),
    "chunk.png": with_a_short_chunk(),
    "bomb.png": flat_png(15000, 14000, 1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_try_decode_returns_the_reason_why_a_file_is_bad(tmp_path, name):
    (tmp_path / name).write_bytes(BROKEN[name])
    words = error_of(tmp_path / name)
    assert words
    assert "\n" not in words
    assert str(tmp_path) not in words


def test_try_decode_survives_random_cuts_and_flipped_bits(tmp_path):
    random = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        whole = np.frombuffer(encoded(kind), np.uint8)
        for _ in range(40):
            content = whole[: random.integers(1, len(whole))].copy()
            content[random.integers(0, min(len(content), 200))] ^= 1 << random.integers(8)
            (tmp_path / "x.png").write_bytes(content.tobytes())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert isinstance(try_decode(str(tmp_path / "x.png"), 8), (BadFile, np.ndarray))


LARGE = """
import sys, warnings
from fastntxent.simclr import load_data
data = load_data("folder", sys.argv[1], 8, in_memory=sys.argv[2])
data.train_images[:2]
"""


@pytest.mark.slow
@pytest.mark.parametrize("in_memory", ["yes", "no"])
def test_large_image_is_read_without_a_warning(tmp_path, in_memory):
    for name in range(10):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "0.png").write_bytes(flat_png(9500, 9500, 9500))  # 90 million pixels: Pillow warns
    command = [
        sys.executable,
        "-W",
        "error::RuntimeWarning",
        "-W",
        "error::UserWarning",
        "-c",
        LARGE,
        tmp_path,
        in_memory,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
