"""The uses of a trained encoder: embed, search, export."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastntxent.simclr import Config, ImageData, Trainer, load_encoder
from fastntxent.simclr import embed as embed_module
from fastntxent.simclr.embed import main as embed
from fastntxent.simclr.export import export_encoder
from fastntxent.simclr.export import main as export
from fastntxent.simclr.models import build_model
from tests.simclr.conftest import make_stripes

Image = pytest.importorskip("PIL.Image")
PAGE = Path(__file__).parents[2] / "docs/encoder.md"


def save_images(folder: Path, count: int = 10, mode: str = "RGB") -> np.ndarray:
    """Save random 16 x 16 images in two class folders. Return all pixels (N, H, W, C), in the order of file names."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        place = folder / ("cat" if index < count // 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).convert(mode).save(place / f"{index:03}.png")
    return pixels


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folders of two finished runs by the channels of their images: 1 (grey) and 3 (colour)."""
    folders = {}
    for channels in (1, 3):
        train, test = make_stripes(30, 0), make_stripes(10, 1)
        images = [part[0].expand(-1, channels, -1, -1).contiguous() for part in (train, test)]
        data = ImageData("stripes", images[0], train[1], images[1], test[1], class_names=("a", "b", "c"))
        out = tmp_path_factory.mktemp("runs") / f"of {channels}"
        config = Config(
            out=out, batch_size=15, epochs=1, width=4, proj_hidden=8, proj_dim=4, device="cpu", quiet=True,
            augment="digits",
        )  # fmt: skip
        Trainer(config, data).fit()
        folders[channels] = out
    return folders


@pytest.fixture
def run(runs):
    return runs[3]


def embedded(run: Path, *arguments: object, out: Path) -> dict[str, np.ndarray]:
    assert embed([*map(str, arguments), "--checkpoint", str(run), "--out", str(out), "--quiet"]) == 0
    with np.load(out, allow_pickle=False) as file:
        return dict(file)


def truth(run: Path, pixels: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return load_encoder(run)(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)


# --- embed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_embed_gives_the_encoders_features_of_a_folder(run, tmp_path, batch_size):
    pixels = save_images(tmp_path / "images", 20)
    found = embedded(run, tmp_path / "images", "--batch-size", batch_size, out=tmp_path / "f.npz")
    torch.testing.assert_close(torch.from_numpy(found["features"]), truth(run, pixels))
    assert found["features"].dtype == np.float32
    assert found["paths"].tolist() == [f"{'cat' if i < 10 else 'dog'}/{i:03}.png" for i in range(20)]
    assert found["labels"].tolist() == [0] * 10 + [1] * 10
    assert found["labels"].dtype == np.int64
    assert found["class_names"].tolist() == ["cat", "dog"]


def test_embed_accepts_a_checkpoint_file_instead_of_a_run_folder(run, tmp_path):
    save_images(tmp_path / "images")
    by_folder = embedded(run, tmp_path / "images", out=tmp_path / "f.npz")
    by_file = embedded(run / "checkpoint.pt", tmp_path / "images", out=tmp_path / "g.npz")
    np.testing.assert_array_equal(by_folder["features"], by_file["features"])


def test_embed_takes_a_flat_folder_and_single_files(run, tmp_path):
    pixels = save_images(tmp_path / "images", 4)
    folder = tmp_path / "images" / "cat"
    flat = embedded(run, folder, out=tmp_path / "flat.npz")
    assert sorted(flat) == ["features", "paths"]
    assert flat["paths"].tolist() == ["000.png", "001.png"]
    one = embedded(run, folder / "001.png", out=tmp_path / "one.npz")
    assert one["paths"].tolist() == ["001.png"]
    torch.testing.assert_close(torch.from_numpy(one["features"]), truth(run, pixels[1:2]))


def test_embed_takes_several_folders_and_files(run, tmp_path):
    pixels = save_images(tmp_path / "a", 4)
    (tmp_path / "b" / "ant").mkdir(parents=True)
    (tmp_path / "a/dog/003.png").rename(tmp_path / "b/ant/x.png")
    found = embedded(run, tmp_path / "a", tmp_path / "b", tmp_path / "a/cat/000.png", out=tmp_path / "f.npz")
    assert found["paths"].tolist() == [
        str(tmp_path / name)
        for name in ("a/cat/000.png", "a/cat/001.png", "a/dog/002.png", "b/ant/x.png", "a/cat/000.png")
    ]
    assert found["class_names"].tolist() == ["ant", "cat", "dog"]
    assert found["labels"].tolist() == [1, 1, 2, 0, -1]
    torch.testing.assert_close(torch.from_numpy(found["features"]), truth(run, pixels[[0, 1, 2, 3, 0]]))


def test_embed_takes_train_and_test_parts(run, tmp_path, capsys):
    save_images(tmp_path / "images/train", 4)
    save_images(tmp_path / "images/val", 4)
    (tmp_path / "images/train/cat/.hidden.png").write_bytes(b"")
    found = embedded(run, tmp_path / "images", out=tmp_path / "f.npz")
    assert len(found["paths"]) == 8
    assert found["labels"].tolist() == [0, 0, 1, 1] * 2
    assert "note: left out 1 hidden entry: train/cat/.hidden.png" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["uint8", "float", "one"])
def test_embed_takes_the_images_of_an_npz(run, tmp_path, layout):
    pixels = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    pixels[0, 0, 0] = 255
    arrays = {
        "uint8": {"images": pixels, "labels": np.array(["b", "a", "b", "", "a", "a", "a"])},
        "float": {"images": (pixels / 255).transpose(0, 3, 1, 2), "test_images": (pixels / 255).transpose(0, 3, 1, 2)},
        "one": {"images": pixels[:1]},
    }[layout]
    np.savez(tmp_path / "images.npz", **arrays)
    found = embedded(run, tmp_path / "images.npz", "--batch-size", 3, out=tmp_path / "f.npz")
    count = len(arrays["images"])
    torch.testing.assert_close(torch.from_numpy(found["features"]), truth(run, pixels[:count]))
    assert found["paths"].tolist() == [str(number) for number in range(count)]
    if layout == "uint8":
        assert found["labels"].tolist() == [1, 0, 1, -1, 0, 0, 0]
        assert found["class_names"].tolist() == ["a", "b"]
    else:
        assert "labels" not in found


def test_embed_converts_colour_images_for_a_grey_encoder(runs, tmp_path):
    save_images(tmp_path / "images")
    found = embedded(runs[1], tmp_path / "images", out=tmp_path / "f.npz")
    files = sorted((tmp_path / "images").rglob("*.png"))
    grey = np.stack([np.asarray(Image.open(path).convert("L")) for path in files])
    torch.testing.assert_close(
        torch.from_numpy(found["features"]), truth(runs[1], grey[..., None]), rtol=0.02, atol=0.02
    )


def test_embed_expands_grey_images_for_a_colour_encoder(run, tmp_path):
    grey = make_stripes(5, 0)[0]
    np.savez(tmp_path / "images.npz", images=grey.numpy())
    found = embedded(run, tmp_path / "images.npz", out=tmp_path / "f.npz")
    pixels = grey.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    torch.testing.assert_close(torch.from_numpy(found["features"]), truth(run, pixels))


def test_embed_resizes_and_normalizes_on_request(run, tmp_path):
    save_images(tmp_path / "images")
    plain = embedded(run, tmp_path / "images", out=tmp_path / "f.npz")["features"]
    unit = embedded(run, tmp_path / "images", "--normalize", out=tmp_path / "g.npz")["features"]
    np.testing.assert_allclose(unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), rtol=1e-5)
    larger = embedded(run, tmp_path / "images", "--image-size", 24, out=tmp_path / "h.npz")["features"]
    assert larger.shape == plain.shape
    assert not np.allclose(larger, plain)


def test_embed_leaves_bad_images_out_on_request(run, tmp_path, capsys):
    pixels = save_images(tmp_path / "images", 6)
    for name in ("cat/001.png", "dog/004.png"):
        (tmp_path / "images" / name).write_bytes(b"no image")
    arguments = [str(tmp_path / "images"), "--checkpoint", str(run), "--out", str(tmp_path / "f.npz"), "--quiet"]
    assert embed([*arguments, "--batch-size", "1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: 2 of 6 images of {tmp_path}/images cannot be read: cat/001.png (")
    assert "dog/004.png" in line
    assert not (tmp_path / "f.npz").exists()

    found = embedded(run, tmp_path / "images", "--skip-bad", out=tmp_path / "f.npz")
    assert "note: left out 2 of 6 images that cannot be read: cat/001.png (" in capsys.readouterr().err
    torch.testing.assert_close(torch.from_numpy(found["features"]), truth(run, pixels[[0, 2, 3, 5]]))
    assert found["labels"].tolist() == [0, 0, 1, 1]


def test_embed_replaces_file_name_bytes_that_are_not_utf8(run, tmp_path):
    save_images(tmp_path / "images", 2)
    try:
        os.rename(tmp_path / "images/cat/000.png", os.fsencode(tmp_path / "images/cat") + b"/\xff\n.png")
    except OSError:
        pytest.skip("needs a file system that allows any bytes in file names")
    found = embedded(run, tmp_path / "images", out=tmp_path / "f.npz")
    assert found["paths"].tolist() == ["cat/?\n.png", "dog/001.png"]


def wrong(arguments: str, folder: Path, run: Path) -> list[str]:
    return [part.format(folder=folder, run=run) for part in arguments.split()]


MISTAKES = {
    "{folder}/nowhere": "{folder}/nowhere does not exist",
    "{folder}/empty": "no image under {folder}/empty",
    "{folder}/text.npz": "{folder}/text.npz cannot be read as an .npz file of plain arrays",
    "{folder}/other.npz": "{folder}/other.npz must hold an array `images`",
    "{folder}/other.npz {folder}/images": "an .npz file must be the only input, got {folder}/other.npz, ",
    "{folder}/good.npz --image-size 16": "--image-size is for image files",
    "{folder}/good.npz --out {folder}/good.npz --overwrite": "--out {folder}/good.npz is an input file",
    "{folder}/pipe.png": "{folder}/pipe.png is neither a folder nor a file",
    "{folder}/bad.png": "1 of 1 images of {folder}/bad.png cannot be read: bad.png (not an image of a known format)",
    "{folder}/bad.png --skip-bad": "no image of {folder}/bad.png can be read",
    "{folder}/images --image-size 7": "--image-size must be at least 8, got 7",
    "{folder}/images --batch-size 0": "--batch-size must be at least 1, got 0",
    "{folder}/images --device nonsense": "--device nonsense cannot be used",
    "{folder}/images --checkpoint {folder}": "no checkpoint at {folder}/checkpoint.pt",
    "{folder}/images --checkpoint {folder}/bad.png": "{folder}/bad.png cannot be read as a checkpoint",
    "{folder}/images --out {folder}/there.npz": "--out {folder}/there.npz exists: replace it with --overwrite",
    "{folder}/images --out {folder}": "--out {folder} is a folder",
    "{folder}/images --out {folder}/bad.png/f.npz": "--out {folder}/bad.png/f.npz cannot be written to: ",
    "{folder}/images --out /proc/f.npz": "--out /proc/f.npz cannot be written to: ",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_embed_reports_mistakes_in_one_line_before_encoding(run, tmp_path, capsys, monkeypatch, arguments):
    save_images(tmp_path / "images", 4)
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("text.npz", "bad.png", "there.npz"):
        (tmp_path / name).write_text("text")
    np.savez(tmp_path / "other.npz", pictures=np.zeros(3))
    np.savez(tmp_path / "good.npz", images=np.zeros((2, 16, 16), np.uint8))
    if "bad.png" not in arguments.split()[0]:
        monkeypatch.setattr(embed_module, "encode_images", None)
    before = sorted(path.name for path in tmp_path.iterdir())
    given = wrong(arguments, tmp_path, run)
    for option, default in (("--checkpoint", run), ("--out", tmp_path / "f.npz")):
        if option not in given:
            given += [option, str(default)]
    assert embed(given) == 2
    said = capsys.readouterr().err.replace("\r", "\n").splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    assert errors == said[-1:]
    assert said[-1].startswith("error: " + MISTAKES[arguments].format(folder=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "there.npz").read_text() == "text"


def test_embed_replaces_a_file_on_request(run, tmp_path):
    save_images(tmp_path / "images", 4)
    (tmp_path / "f.npz").write_text("text")
    assert len(embedded(run, tmp_path / "images", "--overwrite", out=tmp_path / "f.npz")["features"]) == 4


def test_embed_reports_an_image_size_that_the_encoder_rejects(tmp_path, capsys, monkeypatch, run):
    save_images(tmp_path / "images", 4)
    encoder = load_encoder(run)
    encoder.body = nn.Sequential(nn.Conv2d(3, 4, 16), nn.Flatten(), nn.Linear(4, 5))
    monkeypatch.setattr(embed_module, "load_encoder", lambda path: encoder)
    given = [str(tmp_path / "images"), "--checkpoint", str(run), "--out", str(tmp_path / "f.npz"), "--quiet"]
    assert embed(given) == 0
    assert embed([*given, "--image-size", "24", "--overwrite"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: the encoder, trained on images of 16 x 16 pixels, does not take 24 x 24: ")
    assert said.count("\n") == 1


def test_embed_prints_one_line_and_writes_nothing_when_interrupted(run, tmp_path, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    save_images(tmp_path / "images", 4)
    monkeypatch.setattr(embed_module, "encode_images", interrupt)
    assert embed([str(tmp_path / "images"), "--checkpoint", str(run), "--out", str(tmp_path / "f.npz")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; nothing was written"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]


def test_command_line_has_embed_and_export(run, tmp_path, cli):
    save_images(tmp_path / "images", 4)
    done = cli("embed", tmp_path / "images", "--checkpoint", run, "--out", tmp_path / "f.npz")
    assert done.returncode == 0, done.stderr
    arrays = "features, paths, labels, class_names"
    assert f"64 features of each of 4 images written to {tmp_path}/f.npz: {arrays}" in done.stdout
    done = cli("export", "--checkpoint", run, "--out", tmp_path / "e.pt2")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{tmp_path}/e.pt2 maps images (N, 3, 16, 16) in [0, 1] to features (N, 64)" in done.stdout
    done = cli("export", "--checkpoint", run, "--out", tmp_path / "e.pt2")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_export_gives_the_encoders_features(runs, tmp_path, channels):
    path = tmp_path / "encoder.pt2"
    assert export(["--checkpoint", str(runs[channels]), "--out", str(path)]) == 0
    program = torch.export.load(path).module()
    encoder = load_encoder(runs[channels])
    for count in (1, 2, 5):
        images = torch.rand(count, channels, 16, 16)
        torch.testing.assert_close(program(images), encoder(images), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:No complete tensor")  # about weights in channels-last layout
def test_export_of_a_resnet_gives_the_features(tmp_path):
    model = build_model(
        "resnet18", mean=[0.4] * 3, std=[0.2] * 3, image_size=(32, 24), width=8, hidden=8, proj_dim=4, seed=0
    )
    program = export_encoder(model.encoder)
    torch.export.save(program, str(tmp_path / "e.pt2"))
    images = torch.rand(4, 3, 32, 24)
    torch.testing.assert_close(
        torch.export.load(str(tmp_path / "e.pt2")).module()(images), model.encoder(images), rtol=1e-4, atol=1e-5
    )


class Untraceable(nn.Conv2d):
    def forward(self, x):
        return super().forward(x if float(x.sum()) > 0 else -x).flatten(1)


class Random(nn.Conv2d):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x)).flatten(1)


@pytest.mark.parametrize(("body", "words"), [
    (Untraceable(3, 4, 16), "torch.export cannot export the encoder: "),
    (Random(3, 4, 16), "the exported encoder gives different features"),
])  # fmt: skip
def test_export_rejects_encoders_that_it_cannot_reproduce(run, body, words):
    encoder = load_encoder(run)
    encoder.body = body
    with pytest.raises(ValueError, match=f"^{words}") as raised:
        export_encoder(encoder)
    assert "\n" not in str(raised.value)


def test_export_reports_mistakes_in_one_line(run, tmp_path, capsys):
    assert export(["--checkpoint", str(tmp_path), "--out", str(tmp_path / "e.pt2")]) == 2
    assert export(["--checkpoint", str(run), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: no checkpoint at {tmp_path}/checkpoint.pt",
        f"error: --out {tmp_path} is a folder; give the file to write",
    ]


# --- the page --------------------------------------------------------------------------------------------------------


def snippet(mark: str) -> str:
    """Return the code block of docs/encoder.md that follows this HTML comment."""
    found = re.findall(rf"<!-- {re.escape(mark)} -->\n\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(found) == 1, mark
    return found[0]


@pytest.mark.slow
def test_page_trains_embeds_retrieves_and_classifies(tmp_path, cli, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my_encoders.py").write_text(snippet("file: my_encoders.py"))
    generator = np.random.default_rng(0)
    for name, bright in (("bright", 150), ("dark", 0)):
        Path("photos", name).mkdir(parents=True)
        for index in range(10):
            pixels = generator.integers(bright, bright + 100, (40, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"photos/{name}/{index}.png")
    done = cli(
        "--data", "folder", "--data-dir", "photos", "--model", "my_encoders:small", "--out", "runs/photos",
        "--epochs", 2, "--batch-size", 8, "--device", "cpu", "--quiet",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = cli("embed", "photos", "--checkpoint", "runs/photos", "--out", "features.npz", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    exec(snippet("run"), {})
    said = capsys.readouterr().out
    assert said.count("is near") == 3
    assert "bright/0.png is near [('bright/" in said
    assert "accuracy: 1.000" in said


def test_embed_without_pillow_does_not_blame_the_files(run, tmp_path, capsys, monkeypatch):
    save_images(tmp_path / "images", 4)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    assert embed([str(tmp_path / "images"), "--checkpoint", str(run), "--out", str(tmp_path / "f.npz")]) == 2
    assert capsys.readouterr().err.startswith("error: this needs the package PIL: pip install fastntxent[simclr]")
