"""Settings in a TOML file: read for --config, and written to a run's folder with defaults resolved."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from .config import Config, kind
from .output import printable, write_text
from .sources import require

FILE_NAME = "config.toml"
# These options belong to a single invocation of the command, not to the run.
_OF_THE_COMMAND = ("resume", "overwrite")


def with_config_file(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options given on the command line, completed by the settings in its --config file."""
    path = given.pop("config", None)
    return given if path is None else {**read_config(path), **given}


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings in a TOML file, by field name.

    Raises:
        FileNotFoundError, OSError: the file does not exist or cannot be read.
        ValueError: the file is not TOML, a name is not a setting, or a value has the wrong type.
        ImportError: Python is 3.10, and tomli is missing.
    """
    try:
        toml = require("tomllib")
    except ImportError:
        toml = require("tomli")
    name = printable(path)
    if not path.is_file():
        raise FileNotFoundError(f"--config {name} is not a file")
    try:
        values = toml.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise ValueError(f"--config {name} is not a TOML file: {error}") from error
    known = {option.name: option for option in fields(Config) if option.name not in _OF_THE_COMMAND}
    given = {}
    for key, value in values.items():
        option = known.get(key.replace("-", "_"))
        if option is None:
            near = difflib.get_close_matches(key.replace("-", "_"), known, 1)
            raise ValueError(
                f"--config {name}: {key!r} is not a setting" + (f"; did you mean {near[0]}?" if near else "")
            )
        wanted = kind(option)
        number = wanted is float and type(value) is int
        if type(value) is not (str if wanted is Path else wanted) and not number:
            raise ValueError(f"--config {name}: {key} must be {_WORDS[wanted]}, got {value!r}")
        given[option.name] = wanted(value)
    return given


_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string", Path: "a string"}


def write_config(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write config.toml, which --config accepts, to a run's folder."""
    lines = ["# The settings of this run with defaults resolved. --config accepts this file."]
    group = ""
    for option in fields(Config):
        value = settings[option.name]
        if value is None or option.name in _OF_THE_COMMAND:
            continue
        if option.metadata["group"] != group:
            group = option.metadata["group"]
            lines += ["", f"# {group}"]
        lines.append(f"{option.name} = {_toml(value)}")
    write_text(folder / FILE_NAME, "\n".join(lines) + "\n")


def _toml(value: str | float | bool) -> str:
    """Return a value as TOML. JSON is valid TOML here, except that JSON does not escape the control character DEL."""
    return json.dumps(printable(value) if isinstance(value, str) else value, ensure_ascii=False).replace(
        "\x7f", "\\u007f"
    )
