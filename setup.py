"""Everything is in pyproject.toml; the native parts of csrc/ will be built from here."""

from setuptools import setup

setup()
