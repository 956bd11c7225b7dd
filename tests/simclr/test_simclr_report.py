import dataclasses
import errno
import importlib
import json
import math
import re
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import fastntxent.simclr
from fastntxent.simclr import ImageData, figures, report
from fastntxent.simclr.command import main
from fastntxent.simclr.evaluate import Evaluation, evaluate
from fastntxent.simclr.history import History
from fastntxent.simclr.page import STYLE
from fastntxent.simclr.pipeline import finish, summarise
from fastntxent.simclr.report import remarks, write_report

from .conftest import ROOT

run_module = importlib.import_module("fastntxent.simclr.pipeline")

PNG = b"\x89PNG\r\n\x1a\n"
PICTURES = ("curves", "embedding", "views")
# Difficult class names. Mathtext rejects some, and a legend drops others. Some contain HTML, control characters, or
# characters that a font or an encoding lacks. Some are empty or too long.
ODD_NAMES = (
    r"$\frac{$", "$", "_hidden", "", "x" * 90, "two\nlines", "汉字", "🦊", "caf\udce9", "<b>&", "a\tb", "__",
    "\x1b[31m",
)  # fmt: skip


def read(out, name="metrics.json"):
    return json.loads((out / name).read_text(encoding="utf-8"))


def page(out):
    return re.sub(r"base64,[^\"]*", "", (out / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def trainer(make_trainer):
    trainer = make_trainer(epochs=1)
    trainer.fit()
    return trainer


@pytest.fixture
def evaluation(trainer):
    return evaluate(trainer.model, trainer.config, trainer.data)


@pytest.fixture
def drawn(monkeypatch):
    """Return a list that collects the drawn figures, which are saved as usual."""
    kept = []
    save = figures.to_png

    def keep(figure):
        kept.append(figure)
        return save(figure)

    monkeypatch.setattr(figures, "to_png", keep)
    return kept


DEGENERATE = """
import warnings, torch
from fastntxent.simclr.figures import lay_out
warnings.simplefilter("ignore")
torch.set_num_threads(1)
g = torch.Generator().manual_seed(0)
x = torch.randn(60, 8, generator=g)
one_off = torch.ones(60, 8)
one_off[7] = 0
cases = {
    "ones": torch.ones(60, 8), "zeros": torch.zeros(60, 8), "tenths": torch.full((60, 8), 0.1),
    "rounding": torch.ones(60, 8) + 1e-7 * x, "vanishing": x * 1e-30, "denormal": x * 1e-44, "huge": x * 1e30,
    "large": x * 1e14, "nan": torch.full((60, 8), torch.nan), "one nan": torch.where(x == x[3, 3], torch.nan, x),
    "inf": torch.full((60, 8), torch.inf), "two points": torch.eye(2, 8).repeat(30, 1), "one off": one_off,
    "a line": x[:, :1] * torch.ones(8), "one feature": x[:, :1], "two features": x[:, :2], "no feature": x[:, :0],
    "dead": torch.cat((x[:, :1], torch.zeros(60, 7)), 1), "few": x[:5], "two": x[:2], "one": x[:1],
    "outlier": torch.cat((x[:59], torch.full((1, 8), 1e14))), "no features": None,
}
for name, features in cases.items():
    points, words = lay_out(features)
    assert words, name
    if points is not None:
        assert points.shape == (len(features), 2) and torch.from_numpy(points).isfinite().all(), name
    print(name, "|", words, flush=True)
"""


@pytest.mark.slow
def test_lay_out_survives_degenerate_features():
    # In a separate process, because a NaN makes scikit-learn's t-SNE end in a segmentation fault.
    result = subprocess.run([sys.executable, "-c", DEGENERATE], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    said = dict(line.split(" | ") for line in result.stdout.splitlines())
    same = {"ones", "zeros", "tenths", "rounding", "one"}
    assert {name for name, words in said.items() if words == "all images have the same features"} == same
    plain = {"one feature", "two features", "few", "two"}
    assert {name for name, words in said.items() if words == "two principal components"} == plain
    none = {"nan", "one nan", "inf", "huge", "no feature", "no features"}
    rest = set(said) - same - plain - none
    assert all(said[name] == "t-SNE" for name in rest)
    assert {"two points", "one off", "a line", "vanishing", "denormal", "outlier"} <= rest


def test_draw_embedding_writes_every_class_name_as_plain_text(stripes, drawn):
    count = len(ODD_NAMES)
    labels = torch.arange(-1, 60) % (count + 1) - 1
    features = torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(0))
    data = dataclasses.replace(stripes, class_names=ODD_NAMES)
    evaluation = Evaluation(features={"raw pixels": features, "trained": features}, labels=labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert figures.draw_embedding(evaluation, data).startswith(PNG)
    (figure,) = drawn
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == [
        "no label", r"$\frac{$", "$", "_hidden", "(no name)", "x" * 23 + "…", "two?lines", "汉字", "🦊", "caf?", "<b>&",
        "a?b", "__", "?[31m",
    ]  # fmt: skip
    assert not any(text.get_parse_math() for text in legend.get_texts())


def test_colour_key_gives_each_of_twenty_classes_its_own_colour(stripes):
    data = dataclasses.replace(stripes, class_names=tuple(map(str, range(20))))
    key = figures.colour_key(Evaluation(labels=torch.arange(20)), data)
    assert len({colour for _, colour, _ in key}) == 20


def test_draw_embedding_says_why_a_map_is_not_drawn(stripes, drawn):
    features = {"raw pixels": torch.full((30, 4), torch.nan)}
    figures.draw_embedding(Evaluation(features=features, labels=stripes.test_labels), stripes)
    left, right = drawn[0].axes
    assert left.texts[0].get_text() == right.texts[0].get_text() == "not drawn"
    assert left.get_xlabel() == "they are not all finite numbers"
    assert right.get_xlabel() == "there are no features"


@pytest.mark.parametrize("steps", [0, 1, 2, 7])
@pytest.mark.parametrize("learnt", [False, True])
def test_draw_curves_draws_any_number_of_steps(steps, learnt, drawn):
    history = History()
    for step in range(steps):
        history.record(torch.tensor(5.0 - step), 0.1, 0.5)
        history.log("measured", step=step, alignment=1.0, uniformity=-2.0)
    history.flush(steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert figures.draw_curves(history, 3, learnt).startswith(PNG)
    loss = drawn[0].axes[0]
    assert [text.get_text() for text in loss.texts] == (["not measured"] if steps == 0 else [])
    assert (loss.lines[0].get_marker() == "o") == (steps == 1), "a single point should have a marker"


def test_draw_curves_ignores_a_matplotlibrc_that_asks_for_latex(monkeypatch):
    import matplotlib

    monkeypatch.setenv("PATH", "")
    with matplotlib.rc_context({"text.usetex": True}):
        assert figures.draw_curves(History(), 3, False).startswith(PNG)


@pytest.mark.parametrize("channels", [1, 3])
def test_draw_views_draws_grey_and_colour_images(channels, drawn, monkeypatch):
    images = torch.zeros(1, channels, 16, 16, dtype=torch.uint8)
    monkeypatch.setattr(figures, "two_views", lambda images, *_: (images / 255, images / 255))
    config = fastntxent.simclr.Config()
    none = torch.full((2,), -1)
    data = ImageData("flat", images.expand(2, -1, -1, -1), none, images, none[:1], ())
    assert figures.draw_views(config, data).startswith(PNG)


def test_finish_writes_the_report_without_a_picture_that_fails(trainer, monkeypatch):
    def fail(*args):
        raise ValueError("mathtext <refuses>\nthis")

    monkeypatch.setattr(report, "draw_curves", fail)
    (trainer.config.out / "curves.png").write_bytes(b"of an earlier run")
    metrics = finish(trainer)
    assert metrics == read(trainer.config.out)
    assert metrics["evaluation"]["notes"] == ["Not drawn: curves.png (mathtext <refuses>)."]
    assert not (trainer.config.out / "curves.png").exists()
    assert (trainer.config.out / "views.png").read_bytes().startswith(PNG)
    assert "Training curves: not drawn (mathtext &lt;refuses&gt;)." in page(trainer.config.out)
    assert "Not drawn: curves.png" in summarise(metrics, "x")


def test_finish_writes_the_report_without_any_picture(trainer, monkeypatch):
    def fail(*args):
        raise MemoryError

    for name in ("draw_curves", "draw_embedding", "draw_views"):
        monkeypatch.setattr(report, name, fail)
    metrics = finish(trainer)
    assert [note for note in metrics["evaluation"]["notes"] if "(out of memory)" in note] == [
        f"Not drawn: {name}.png (out of memory)." for name in PICTURES
    ]
    assert "<img" not in page(trainer.config.out)


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "x.png went away"), RuntimeError("boom")])
def test_finish_writes_the_history_if_the_evaluation_fails(trainer, monkeypatch, error):
    def fail(*args):
        raise error

    monkeypatch.setattr(run_module, "evaluate", fail)
    metrics = finish(trainer)
    assert metrics["evaluation"]["scores"] == {}
    assert metrics["evaluation"]["notes"][0].startswith("Not evaluated: the encoder (")
    assert len(metrics["history"]["steps"]["loss"]) == 3
    assert "Nothing was measured." in page(trainer.config.out)
    assert "Not evaluated" in summarise(metrics, "x")


KILLED = """
import os, sys, torch
from pathlib import Path
from fastntxent.simclr import Config, Trainer, report
from fastntxent.simclr.pipeline import finish
import importlib
from tests.simclr.conftest import make_stripes
from fastntxent.simclr import ImageData
run = importlib.import_module("fastntxent.simclr.pipeline")
data = ImageData("stripes", *make_stripes(83, 0), *make_stripes(30, 1), class_names=("across", "down", "plain"))
out = Path(sys.argv[1])
trainer = Trainer(Config(out=out, epochs=1, batch_size=32, width=4, device="cpu", quiet=True), data)
trainer.fit()
def die(*args):
    os._exit(139)
setattr(*{"draw": (report, "draw_embedding", die), "judge": (run, "evaluate", die)}[sys.argv[2]])
finish(trainer)
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["draw", "judge"])
def test_finish_leaves_metrics_and_a_report_if_the_process_dies(tmp_path, moment):
    command = [sys.executable, "-c", KILLED, str(tmp_path), moment]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 139, result.stderr
    metrics = read(tmp_path)
    assert len(metrics["history"]["steps"]["loss"]) == 3
    assert set(metrics["evaluation"]["scores"]) == (
        {"knn", "linear probe", "effective rank", "alignment", "uniformity"} if moment == "draw" else set()
    )
    text = page(tmp_path)
    assert "Two maps of the test images: not drawn (the process ended before it was drawn)." in text
    assert ("before the encoder was evaluated" in text) == (moment == "judge")


def test_finish_raises_oserror_if_the_disk_is_full(trainer, monkeypatch):
    def full(path, write):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report, "write_whole", full)
    with pytest.raises(OSError, match="No space left"):
        finish(trainer)


def test_metrics_hold_null_for_numbers_that_are_not_finite(trainer, evaluation):
    trainer.history.columns["measured"]["uniformity"][0] = math.nan
    trainer.history.columns["measured"]["alignment"][0] = math.inf
    write_report(trainer, evaluation, ())
    measured = read(trainer.config.out)["history"]["measured"]
    assert measured["uniformity"][0] is measured["alignment"][0] is None


def test_report_survives_odd_names_everywhere(make_trainer, stripes, monkeypatch):
    labels = torch.arange(83) % len(ODD_NAMES)
    data = dataclasses.replace(
        stripes, class_names=ODD_NAMES, train_labels=labels, test_labels=labels[:30], title="caf\udce9 <i>",
        notes=("left out: \udcff.png <x>",),
    )  # fmt: skip
    trainer = make_trainer("caf\udce9", data=data, epochs=1)
    trainer.fit()
    metrics = finish(trainer, ["--out", "caf\udce9"])
    text = page(trainer.config.out)
    assert "<title>SimCLR on caf? &lt;i&gt;</title>" in text
    assert "<li>left out: ?.png &lt;x&gt;</li>" in text
    assert "caf\\udce9" in text, "the code on the page must find the folder"
    assert '<ul class="key">' in text
    assert "</i>&lt;b&gt;&amp;</li>" in text
    assert "\ud83e\udd8a".encode("utf-16", "surrogatepass").decode("utf-16") in text
    assert metrics["command"] == ["--out", "caf?"]
    summarise(metrics, str(trainer.config.out)).encode()


@pytest.mark.slow
def test_report_is_written_for_images_of_one_value(cli, tmp_path):
    # In a separate process, because t-SNE of these images could crash the test process.
    images = np.full((300, 12, 12), 7, np.uint8)
    np.savez(tmp_path / "d.npz", images=images, labels=np.arange(300) % 2)
    result = cli(
        "--data", "npz", "--data-dir", tmp_path / "d.npz", "--epochs", 1, "--batch-size", 64, "--device", "cpu",
        "--quiet", "--out", tmp_path / "run",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert [line.partition(":")[0] for line in result.stderr.splitlines()] == ["note"], (
        "the only note should be about dark images"
    )
    assert all((tmp_path / "run" / f"{name}.png").exists() for name in PICTURES)
    assert read(tmp_path / "run")["evaluation"]["scores"]["effective rank"]["raw pixels"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("labels", "limit", "note"),
    [
        (np.array([0] * 590 + [1] * 10), 20, ""),
        (np.arange(600) % 3, 2, "At most 2 images"),
        (np.zeros(600, int), 10000, "of one class (0)"),
    ],
)
def test_main_finishes_whatever_classes_are_evaluated(tmp_path, capsys, labels, limit, note):
    images = np.random.default_rng(0).integers(0, 256, (600, 12, 12), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", images=images, labels=labels)
    options = f"--data npz --data-dir {tmp_path}/d.npz --out {tmp_path}/run --epochs 1 --batch-size 64 --device cpu"
    assert main([*options.split(), "--eval-limit", str(limit)]) == 0
    notes = read(tmp_path / "run")["evaluation"]["notes"]
    assert note in " ".join(notes)
    printed = capsys.readouterr().out
    assert all(line in printed for line in notes)
    assert printed.endswith(f"{tmp_path}/run/report.html\n")


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ({}, []),
        ({"knn": {"trained": 0.9, "untrained": 0.5, "raw pixels": 0.8}}, []),
        ({"knn": {"trained": 0.9}, "linear probe": {"untrained": 0.9}}, []),
        ({"knn": {"trained": 1.0, "untrained": 1.0, "raw pixels": 1.0}}, []),
        ({"knn": {"trained": 0.8, "untrained": 0.8, "raw pixels": 0.7}},
         ["no better than the untrained encoder by k-NN accuracy. More epochs"]),
        ({"knn": {"trained": 0.8, "raw pixels": 0.9}, "linear probe": {"trained": 0.5, "raw pixels": 0.9}},
         ["no better than raw pixels by k-NN accuracy and linear probe accuracy. More epochs"]),
        ({"knn": {"trained": 0.5, "untrained": 0.6, "raw pixels": 0.7}},
         ["than the untrained encoder by k-NN accuracy, or than raw pixels by k-NN accuracy. More epochs"]),
        ({"uniformity": {"trained": -0.01}, "effective rank": {"trained": 1.0, "raw pixels": 30.0}},
         ["The embeddings have collapsed: a uniformity of -0.01"]),
        ({"uniformity": {"trained": -2.0}, "effective rank": {"trained": 1.2, "raw pixels": 30.0}},
         ["The features have collapsed: an effective rank of 1.2"]),
        ({"uniformity": {"trained": -2.0}, "effective rank": {"trained": 1.0, "raw pixels": 1.0}}, []),
    ],
)  # fmt: skip
def test_remarks_tell_what_is_wrong_and_what_to_try(scores, words):
    found = remarks(scores)
    assert len(found) == len(words)
    assert all(part in remark for part, remark in zip(words, found, strict=True))


def test_summarise_shows_dashes_for_missing_scores_in_the_terminals_encoding(trainer, evaluation, monkeypatch):
    del evaluation.scores["knn"]["trained"], evaluation.scores["linear probe"]
    evaluation.notes.append("left out: 汉字")
    metrics = write_report(trainer, evaluation, ())
    monkeypatch.setattr(sys, "stdout", type("Terminal", (), {"encoding": "ascii"})())
    text = summarise(metrics, "caf\udce9")
    assert text.isascii()
    assert re.match(r"knn:          trained -, untrained \d", text)
    assert "linear probe" not in text
    assert "left out: ??" in text
    assert f"report:       {Path('caf?', 'report.html')}" in text


def test_report_shows_the_resolved_settings_and_the_title(make_trainer, stripes):
    trainer = make_trainer(epochs=1, data=dataclasses.replace(stripes, title="my zebras"))
    trainer.settings |= {"image_size": None}
    trainer.fit()
    metrics = finish(trainer)
    text = page(trainer.config.out)
    assert "<h1>SimCLR on my zebras</h1>" in text
    assert "<tr><th>augment</th><td>digits</td></tr>" in text
    assert "<tr><th>lr</th><td>0.003</td></tr>" in text
    assert "<tr><th>image_size</th><td>&ndash;</td></tr>" in text
    assert metrics["settings"] == trainer.settings
    assert metrics["config"]["lr"] == 0.0


def test_report_adapts_to_phones_and_dark_mode(trainer, evaluation):
    evaluation.notes.append("Not measured: nothing.")
    write_report(trainer, evaluation, ())
    text = page(trainer.config.out)
    assert '<meta name="color-scheme" content="light dark">' in text
    assert "@media (prefers-color-scheme: dark)" in STYLE
    assert text.count("<table") == len(re.findall(r"<div class=scroll><table", text)) >= 3
    assert "<p>Not measured: nothing.</p>" in text
    # Only values, such as paths, may break within a word. Headings of rows and columns may not.
    assert re.findall(r"[^{}]*(?={[^{}]*anywhere)", STYLE)
    for selector in re.findall(r"([^{}]*){[^{}]*overflow-wrap: anywhere", STYLE):
        assert not re.search(r"(^|[\s,])(th|\.scores)\b", selector), selector


def test_report_marks_an_encoder_that_learnt_nothing(trainer, evaluation):
    evaluation.scores["knn"].update(trained=0.5, untrained=0.6)
    metrics = write_report(trainer, evaluation, ())
    (remark,) = [remark for remark in metrics["evaluation"]["remarks"] if "no better" in remark]
    assert f"<p class=remark>{remark}</p>" in page(trainer.config.out)
    assert remark in summarise(metrics, "x")


def test_report_has_a_snippet_that_runs(trainer, evaluation, monkeypatch):
    write_report(trainer, evaluation, ())
    (code,) = re.findall(r"<pre>(import torch.*?)</pre>", page(trainer.config.out), re.DOTALL)
    load = fastntxent.simclr.load_encoder
    opened = []

    def load_from(folder):
        opened.append(folder)
        return load(Path(folder) / "checkpoint.pt")

    monkeypatch.setattr(fastntxent.simclr, "load_encoder", load_from)
    found = {"images": trainer.data.test_images / 255}
    exec(textwrap.dedent(code.replace("&#x27;", "'")), found)
    assert opened == [str(trainer.config.out)]
    assert found["found"].indices.shape == (30, 6)
    assert found["found"].indices[:, 0].tolist() == list(range(30))
