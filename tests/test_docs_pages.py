"""The documentation site: the code of its pages runs, its reference is complete, and it builds without a warning."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastntxent

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [DOCS / "index.md", DOCS / "quickstart.md", *sorted((DOCS / "tutorials").glob("*.md"))]

# A block of Python, and the file name that the page tells the reader to save it as, if any.
BLOCK = re.compile(r"^(?:<!-- file: (\S+) -->\n\n)?```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[str]:
    return [code for name, code in BLOCK.findall(page.read_text()) if not name]


def files(page: Path) -> dict[str, str]:
    return {name: code for name, code in BLOCK.findall(page.read_text()) if name}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": page.stem}
    code = blocks(page)
    assert code
    for number, block in enumerate(code):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)


def test_blocks_are_all_found():
    for page in PAGES:
        assert len(BLOCK.findall(page.read_text())) == page.read_text().count("```python"), page.name


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs gloo and torchrun")
def test_clip_script_runs_on_two_ranks(tmp_path):
    script = files(DOCS / "tutorials/clip.md")
    assert script.keys() == {"pairs.py", "train_clip.py"}
    for name, code in script.items():
        (tmp_path / name).write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train_clip.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 5
    assert losses[-1] < losses[0] / 2
    (accuracy,) = re.findall(r"zero-shot accuracy: ([\d.]+)", done.stdout)
    assert float(accuracy) > 0.5, "24 captions: chance is 0.04"


def test_api_reference_has_every_public_name():
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    documented = set()
    for line in re.findall(r"^\.\. (?:currentmodule|auto\w+):: .*", pages, re.MULTILINE):
        directive, name = line.removeprefix(".. ").split(":: ")
        if directive == "currentmodule":
            module = name
        else:
            documented.add(name if name.startswith("fastntxent.") else f"{module}.{name}")
    assert {f"fastntxent.{name}" for name in fastntxent.__all__} <= documented
    for library in fastntxent.compat.__all__:
        names = importlib.import_module(f"fastntxent.compat.{library}").__all__
        assert {f"fastntxent.compat.{library}.{name}" for name in names if not name.isupper()} <= documented
    simclr = importlib.import_module("fastntxent.simclr")
    assert {f"fastntxent.simclr.{name}" for name in simclr.__all__} <= documented


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
    for module in ("sphinx", "furo", "myst_parser", "sphinx_copybutton", "mathjax"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}: pip install -e '.[docs]', or make docs")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", DOCS, tmp_path]
    built = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "api" / "losses.html").read_text()
    assert 'id="fastntxent.nt_xent"' in page
    for page in tmp_path.rglob("*.html"):
        remote = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)', page.read_text())
        assert not remote, f"{page.name} needs the network"
