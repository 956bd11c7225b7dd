"""Settings: their ranges, TOML files, and the resolved settings that a run writes."""

import re

import pytest

from fastntxent.simclr import Config
from fastntxent.simclr.config import parse_args
from fastntxent.simclr.config_file import read_config, with_config_file, write_config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 2.0}, "--momentum must be less than 1, got 2.0"),
        ({"momentum": 1.0, "optimizer": "lars"}, "--momentum must be less than 1"),
        ({"warmup_epochs": 4.0, "epochs": 3}, "--warmup-epochs must be at most --epochs 3, got 4.0"),
        ({"warmup_epochs": -1.0}, "--warmup-epochs must be at least 0"),
        ({"seed": 2**63}, r"--seed must be less than 2\^63"),
        ({"proj_dim": 10**19}, r"--proj-dim must be less than 2\^63"),
        ({"lr": 10**400}, r"--lr must be less than 2\^63"),
        ({"lr": float("inf")}, "--lr must be at least 0, got inf"),
        ({"model": "resnet19"}, "--model must be .*resnet18.*got 'resnet19'"),
        ({"epochs": "3"}, "--epochs must be int, got '3'"),
        ({"epochs": True}, "--epochs must be int, got True"),
        ({"epochs": 2.5}, "--epochs must be int, got 2.5"),
        ({"lr": "fast"}, "--lr must be float, got 'fast'"),
        ({"temperature": None}, "--temperature must be float, got None"),
        ({"quiet": 1}, "--quiet must be bool, got 1"),
        ({"in_memory": "maybe"}, "--in-memory must be one of auto, yes, no, got 'maybe'"),
        ({"workers": -1}, "--workers must be at least 0, got -1"),
    ],
)
def test_config_check_refuses_invalid_values(options, message):
    with pytest.raises(ValueError, match=message):
        Config(**options).check()


def test_config_shortens_the_default_warm_up_of_a_short_run():
    assert Config().warmup == 3
    assert Config(epochs=10).warmup == 1
    assert Config(epochs=2, warmup_epochs=2.0).warmup == 2
    Config(epochs=1).check()


def test_config_accepts_paths_as_strings():
    assert Config(out="a/b").out.name == "b"


NASTY = 'a "quoted" \\ back\tslash\x7f\x01 caf\udce9 €'


def test_written_config_file_is_read_back_with_the_same_settings(tmp_path, make_trainer):
    settings = make_trainer().settings | {"wandb": NASTY, "data_dir": str(tmp_path), "lr": 1e-05, "out": "x"}
    write_config(tmp_path, settings)
    read = read_config(tmp_path / "config.toml")
    expected = {name: value for name, value in settings.items() if name not in ("resume", "overwrite")}
    expected["wandb"] = NASTY.replace("\udce9", "?")
    assert {name: str(v) if name in ("data_dir", "out") else v for name, v in read.items()} == expected
    Config(**{**read, "data": "mnist5k"}).check()
    with pytest.raises(ValueError, match=r"--data must be one of .*, got 'stripes \(from Python\)'"):
        Config(**read).check()


def test_resolved_config_of_a_run_reproduces_the_run(make_trainer, tmp_path):
    first = make_trainer("first", epochs=2, batch_size=500)
    first.fit()
    path = tmp_path / "first" / "config.toml"
    values = read_config(path)
    assert (values["batch_size"], values["device"], values["lr"], values["amp"]) == (500, "cpu", 0.003, "off")
    assert "auto" not in {values[name] for name in ("amp", "device", "augment", "backend")}
    given = {name: value for name, value in read_config(path).items() if name not in ("data", "out")}
    second = make_trainer("second", **given)
    second.fit()
    assert second.history.columns["steps"] == first.history.columns["steps"]


def test_command_line_overrides_the_config_file(tmp_path):
    (tmp_path / "c.toml").write_text('epochs = 9\nlr = 1\nout = "x"\ndata-dir = "y"\nquiet = true\n')
    given = with_config_file(parse_args(["--config", str(tmp_path / "c.toml"), "--epochs", "3"]))
    config = Config(**given)
    config.check()
    assert (config.epochs, config.lr, config.out.name, config.data_dir.name, config.quiet) == (3, 1.0, "x", "y", True)
    assert isinstance(config.lr, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs = @", r"c\.toml is not a TOML file: .*line 1"),
        ("epoch = 3", r"c\.toml: 'epoch' is not a setting; did you mean epochs\?"),
        ("resume = 'x'", r"'resume' is not a setting"),
        ("epochs = '3'", r"epochs must be an integer, got '3'"),
        ("epochs = true", r"epochs must be an integer, got True"),
        ("quiet = 1", r"quiet must be true or false, got 1"),
        ("out = 3", r"out must be a string, got 3"),
        ("[training]\nepochs = 3", r"'training' is not a setting"),
        (b"\xff\xfe", r"is not a TOML file"),
    ],
)
def test_read_config_reports_mistakes_in_the_file(tmp_path, text, message):
    (tmp_path / "c.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_config(tmp_path / "c.toml")
    assert re.search(r"--config .*c\.toml", str(caught.value))


def test_read_config_reports_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--config .*none\.toml is not a file"):
        read_config(tmp_path / "none.toml")
