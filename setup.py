"""Names the extension; everything else about the project is in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["pvfio/_native_build.py:ffibuilder"])
