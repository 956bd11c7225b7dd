import base64
import json
import re

import numpy as np
import pytest
import torch

from fastntxent.simclr.checkpoint import load_checkpoint, with_saved_options
from fastntxent.simclr.command import main
from fastntxent.simclr.config import Config, parse_args

PNG = b"\x89PNG\r\n\x1a\n"


def test_cli_trains_evaluates_and_reports_on_digits(cli, tmp_path):
    out = tmp_path / "a <run> & more"
    result = cli("--data", "digits", "--epochs", "6", "--verify-every", "10", "--learn-temperature", "--out", out)
    assert result.returncode == 0, result.stderr
    assert "images/s" in result.stderr, "a progress bar was expected"
    assert "knn:" in result.stdout

    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["timing"]["steps"] == 36 == len(metrics["history"]["steps"]["loss"])
    assert metrics["config"]["data"] == "digits"
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["verification"]["checks"] == 4
    assert metrics["verification"]["max_gradient_error"] <= metrics["verification"]["min_gradient_budget"]
    scores = metrics["evaluation"]["scores"]
    assert scores["knn"]["trained"] > 0.8
    assert scores["alignment"]["trained"] < scores["alignment"]["untrained"]
    assert metrics["history"]["measured"]["step"][-1] == 35

    page = (out / "report.html").read_text()
    assert f"{100 * scores['knn']['trained']:.1f} %" in page
    assert "<run>" not in page, "user input must be escaped"
    assert "a &lt;run&gt; &amp; more" in page
    text = re.sub(r"base64,[^\"]*", "", page)
    assert not re.search(r"(src|href)=(?!\"data:)|url\(|https?:", text), "the page must be self-contained"
    assert "$" not in text, "no placeholder should be left"
    pictures = [base64.b64decode(code) for code in re.findall(r"base64,([^\"]*)", page)]
    assert sorted(pictures) == sorted((out / f"{name}.png").read_bytes() for name in ("curves", "embedding", "views"))
    assert all(picture.startswith(PNG) for picture in pictures)


def test_main_reports_on_images_without_labels(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3)).astype(np.uint8)
    np.savez(tmp_path / "d.npz", images=images)
    arguments = ["--data", "npz", "--data-dir", tmp_path / "d.npz", "--epochs", 1, "--out", tmp_path / "run", "--quiet"]
    assert main([str(argument) for argument in arguments]) == 0
    assert capsys.readouterr().err == (
        "note: The images have no labels, so accuracies are not measured.\n"
        "note: --batch-size 256 exceeds the 48 training images: every step uses all of them\n"
    )
    page = (tmp_path / "run" / "report.html").read_text()
    assert "no labels" in page
    assert "k-NN accuracy" not in page
    assert "The loss was not verified in this run" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data folder --data-dir {tmp}/none", "--data-dir .*none does not exist"),
        ("--data npz", "--data npz needs --data-dir"),
        ("--data fashion-mnist --data-dir {tmp}", "no train-images-idx3-ubyte"),
        ("--data digits --temperature 0", "--temperature must be positive, got 0.0"),
        ("--data digits --temperature nan", "--temperature must be positive, got nan"),
        ("--data digits --epochs 0", "--epochs must be at least 1, got 0"),
        ("--data digits --batch-size 1", "--batch-size must be at least 2, got 1"),
        ("--data digits --model resnet18 --width 7", "--width must be at least 8 for resnet18, got 7: .*PyTorch 2.13"),
        ("--data digits --chunk 8", "--chunk requires --accumulate-batch"),
        ("--data digits --loss reference --backend blocked", "--backend blocked cannot be combined"),
        ("--data digits --accumulate-batch 1", "--accumulate-batch must be 0"),
        ("--data digits --backend magic", "backend must be .*'magic'"),
        ("--data digits --device tpu9", "--device tpu9 cannot be used"),
        ("--data digits --device cpu --amp fp16", "--amp fp16 needs a CUDA device"),
        ("--data digits --resume {tmp}/none.pt", "no checkpoint to resume from at .*none.pt"),
    ],
)
def test_main_reports_a_mistake_in_one_line(tmp_path, capsys, arguments, message):
    status = main([*arguments.format(tmp=tmp_path).split(), "--out", str(tmp_path / "run")])
    captured = capsys.readouterr()
    assert status == 2
    assert re.fullmatch(f"error: .*{message}.*\n", captured.err)
    assert captured.out == ""
    assert not (tmp_path / "run").exists(), "a run that cannot start should leave nothing behind"


def test_main_refuses_an_unknown_choice(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--data", "imagenet"])
    assert caught.value.code == 2
    assert re.fullmatch(
        r"error: argument --data: invalid choice: 'imagenet'.* --help lists .*\n", capsys.readouterr().err
    )


def test_main_exits_with_status_1_if_verification_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastntxent.error_budget.Report.ok", False)
    status = main(["--data", "digits", "--verify-every", "5", "--quiet", "--out", str(tmp_path)])
    assert status == 1
    assert re.match(r"stopped: the loss failed its verification at step 0: .*budget", capsys.readouterr().err)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_main_resumes_with_the_options_of_the_checkpoint(tmp_path):
    options = ["--data", "digits", "--width", "4", "--epochs", "2", "--quiet", "--out", str(tmp_path)]
    assert main([*options, "--max-steps", "2"]) == 0
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2
    assert main(["--resume", "--out", str(tmp_path), "--quiet"]) == 0
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] == 12
    assert state["config"]["width"] == 4
    config = with_saved_options({"resume": str(tmp_path / "checkpoint.pt"), "seed": 7})
    assert (config.out, config.width, config.seed, config.max_steps) == (tmp_path, 4, 7, 0)


def test_parse_args_returns_only_given_options_and_config_round_trips():
    assert parse_args([]) == {}
    config = Config()
    assert Config.from_dict(config.to_dict()) == config
    given = parse_args(["--learn-temperature", "--data-dir", "x", "--lr", "0.1", "--resume"])
    assert Config(**given).lr == 0.1
    assert given["resume"] == "auto"
    text = Config.from_dict(json.loads(json.dumps(Config(**given).to_dict())))
    assert text == Config(**given)


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for name in Config().to_dict():
        assert re.search(rf"^  --{name.replace('_', '-')}\b.*", text, re.MULTILINE), name


def test_main_finds_cheap_mistakes_before_it_reads_the_images(tmp_path, capsys, monkeypatch):
    def read(*args, **options):
        raise AssertionError("the images were read")

    monkeypatch.setattr("fastntxent.simclr.pipeline.load_data", read)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"of another run")
    mistakes = {
        "": "holds another run's checkpoint",
        "--overwrite --device tpu9": "--device tpu9 cannot be used",
        "--overwrite --model no_such_module:make": "there is no module no_such_module",
        "--overwrite --model fastntxent.simclr.models:nothing": "nothing",
    }
    for options, words in mistakes.items():
        assert main(["--data", "digits", "--out", str(tmp_path / "run"), *options.split()]) == 2
        assert words in capsys.readouterr().err


def test_main_prints_a_summary_of_the_images(tmp_path, capsys):
    arguments = ["--data", "digits", "--width", "4", "--epochs", "1", "--max-steps", "1", "--eval-limit", "20"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    words = "digits: 1,442 training and 355 test images of 10 classes (0, 1, 2, 3, 4 and 5 more)\n"
    assert words in capsys.readouterr().err


def test_main_refuses_to_resume_a_run_whose_data_came_from_python(make_trainer, tmp_path, capsys):
    make_trainer(max_steps=1).fit()
    assert main(["--resume", "--out", str(tmp_path / "run")]) == 2
    assert "belongs to a run whose data came from Python: continue it there" in capsys.readouterr().err
