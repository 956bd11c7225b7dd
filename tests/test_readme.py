"""The README's code runs, and the README has the signature of every function and the name of every module."""

import inspect
import re
from pathlib import Path

import fastntxent

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMON = 'reduction="mean", normalize=True, backend="auto", group=None'


def signature(name):
    """Return a signature as the README writes it, with `...` for the options that every loss has."""
    stars: dict[int, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parts, keywords = [], False
    for parameter in inspect.signature(getattr(fastntxent, name)).parameters.values():
        if parameter.kind == parameter.KEYWORD_ONLY and not keywords:
            parts.append("*")
        keywords |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}".replace("'", '"')
        parts.append(stars.get(parameter.kind, "") + parameter.name + default)
    return f"{name}({', '.join(parts)})".replace(COMMON, "...").replace("*, ...", "...")


def test_readme_python_runs(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block.replace("range(10)", "range(1)"), {})


def test_readme_has_every_signature():
    listed = "".join(re.findall(r"```text\n(.*?)```", README, re.DOTALL))
    entries = [re.sub(r"\s+", " ", entry) for entry in re.findall(r"^\w+\(.*?\)$", listed, re.DOTALL | re.MULTILINE)]
    functions = [name for name in fastntxent.__all__ if inspect.isfunction(getattr(fastntxent, name))]
    assert sorted(entries) == sorted(map(signature, functions))


def test_readme_names_every_module():
    modules = [name for name in fastntxent.__all__ if name.endswith(("Loss", "Queue"))]
    assert modules
    for name in modules:
        assert f"`{name}`" in README, name
