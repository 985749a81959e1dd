"""Versions of what a run's numbers depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("student-aware-distillation", "torch", "triton", "transformers", "tokenizers", "numpy")


def library_versions() -> dict[str, str]:
    """Package -> installed version, and Python's."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found
