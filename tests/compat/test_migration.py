"""docs/migration.md: its code runs, and every drop-in has its section."""

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import fastntxent.compat

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text()
SECTIONS = dict(section.split("\n", maxsplit=1) for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:])
DROP_INS = {name for _, name, _ in pkgutil.iter_modules(fastntxent.compat.__path__)} - {"pairs", "shared"}


@pytest.mark.parametrize("section", SECTIONS)
def test_code_runs_after_the_one_changed_line(section):
    (change,) = re.findall(r"```diff\n(.*?)```", SECTIONS[section], re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL)
    before, after = change.splitlines()
    assert before.startswith("-from ")
    assert after[1:] in code.splitlines()
    exec(code, {})


def test_every_drop_in_is_in_the_table_with_its_names():
    rows = dict(re.findall(r"`fastntxent\.compat\.(\w+)` \| (.+) \|$", PAGE, re.MULTILINE))
    assert set(rows) == DROP_INS
    assert len(SECTIONS) == len(DROP_INS)
    for name, names in rows.items():
        module = importlib.import_module(f"fastntxent.compat.{name}")
        assert set(re.findall(r"`(\w+)`", names)) <= set(module.__all__)
