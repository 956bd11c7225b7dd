"""Everything is in pyproject.toml; this file is where the native parts of csrc/ are built from."""

from setuptools import setup

setup()
