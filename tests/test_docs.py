"""docs/losses.md runs and covers every loss, pages name real make targets, and CHANGELOG.md has this version."""

import ast
import re
from pathlib import Path

import pytest
import torch

import fastntxent

ROOT = Path(__file__).parent.parent
LOSSES = (ROOT / "docs/losses.md").read_text()
SET_UP, *BLOCKS = re.findall(r"```python\n(.*?)```", LOSSES, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_losses_page_runs(block):
    names: dict = {}
    exec(SET_UP, names)
    for statement in ast.parse(block).body:
        names.pop("loss", None)
        exec(compile(ast.Module([statement], []), "losses.md", "exec"), names)
        if "loss" in names:
            assert names["loss"].shape == ()
            assert torch.isfinite(names["loss"])
            names["loss"].backward()


def test_losses_page_calls_every_loss():
    functions = {name for name in fastntxent.losses.__all__ if name.islower()} | {"matryoshka"}
    calls = set(re.findall(r"fastntxent\.(\w+)[(,]", "".join(BLOCKS)))
    assert functions <= calls
    modules = {name for name in fastntxent.modules.__all__ if name.endswith("Loss")} | {"MatryoshkaLoss"}
    table = "".join(re.findall(r"^\|.*", LOSSES, re.MULTILINE))
    assert modules <= set(re.findall(r"`(\w+)`", table))


@pytest.mark.parametrize(
    ("page", "command", "expected"),
    [
        ("README.md", r"\bmake ([a-z-]+)", {"test", "lint", "demo", "bench"}),
        ("CONTRIBUTING.md", r"(?:`|^)make ([a-z-]+)", {"test", "test-all", "lint", "sanitize"}),
    ],
)
def test_commands_are_make_targets(page, command, expected):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(command, (ROOT / page).read_text(), re.MULTILINE))
    assert expected <= named <= targets


def test_changelog_and_citation_have_this_version():
    dated = re.findall(r"^## \[(.+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert dated[0][0] == fastntxent.__version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)\ndate-released: (.*)$", citation, re.MULTILINE) == dated[:1]
