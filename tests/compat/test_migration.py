"""The code of docs/migration.md runs, and every drop-in has its section."""

import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastntxent.compat

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
SECTIONS = dict(section.split("\n", maxsplit=1) for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:])
DROP_INS = {name for _, name, _ in pkgutil.iter_modules(fastntxent.compat.__path__)} - {"cached", "pairs", "shared"}
HAND_WRITTEN = "A hand-written info_nce_loss"  # not from a library


@pytest.mark.parametrize("section", [section for section in SECTIONS if section != HAND_WRITTEN])
def test_code_of_each_section_runs_with_its_changed_line(section):
    (change,) = re.findall(r"```diff\n(.*?)```", SECTIONS[section], re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL)
    before, after = change.splitlines()
    assert before.startswith("-from ")
    assert after[1:] in code.splitlines()
    exec(code, {})


def test_replacement_equals_the_hand_written_loss():
    (change,) = re.findall(r"```diff\n(.*?)```", SECTIONS[HAND_WRITTEN], re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", SECTIONS[HAND_WRITTEN], re.DOTALL)
    lines = code.splitlines()
    for line in change.splitlines():
        assert (line[1:] if line.startswith("+") else line[1:].replace("loss = ", "before = ")) in lines
    found: dict[str, Any] = {}
    exec(code, found)
    gradients = [torch.autograd.grad(found[name], found["features"])[0] for name in ("before", "loss")]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    hits = (found["logits"].topk(5).indices == 0).any(dim=1).float().mean()
    torch.testing.assert_close(found["top5"], hits)
    torch.testing.assert_close(found["top1"], (found["logits"].argmax(dim=1) == 0).float().mean())
    one_line = f"loss = {re.search(r'`(fastntxent.nt_xent.*?)`', SECTIONS[HAND_WRITTEN])[1]}"
    again = {**found}
    exec(one_line, again)
    assert again["loss"] == found["loss"]


def test_every_drop_in_is_in_the_table_with_its_names():
    rows = dict(re.findall(r"`fastntxent\.compat\.(\w+)` \| (.+) \|$", PAGE, re.MULTILINE))
    assert set(rows) == DROP_INS
    assert len(SECTIONS) == len(DROP_INS) + 1  # plus the hand-written loss
    for name, names in rows.items():
        module = importlib.import_module(f"fastntxent.compat.{name}")
        assert set(re.findall(r"`(\w+)`", names)) <= set(module.__all__)
