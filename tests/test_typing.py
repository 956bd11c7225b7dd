"""The package as type checkers see it: calls return tensors, and option types list the existing names."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from fastntxent import backends, options

ROOT = Path(__file__).parents[1]
CHECKERS = {"mypy": ["tests/typed_usage.py"], "basedpyright": ["--pythonpath", sys.executable]}


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_type_checkers_see_the_signatures(checker):
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"needs {checker}, which the extra 'lint' installs")
    command = [sys.executable, "-m", checker, *CHECKERS[checker]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_type_of_backend_names_lists_every_backend():
    assert get_args(options.BackendName) == ("auto", *backends())
