"""Linting judges the sources alone, whatever runs and builds have left beside them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("bench", "kernels", "sad", "tests", "pyproject.toml")
NOT_CODE = shutil.ignore_patterns("__pycache__", "recipes", "results")

LEFT = (
    *("runs", "build", "dist"),  # by the quickstart, by wheels
    *("support", "mutations", "sad_kernels", "torch", "triton"),  # names of what tests import
)


@pytest.mark.skipif(find_spec("ruff") is None, reason="ruff is not installed")
def test_folders_beside_the_sources_change_nothing(tmp_path: Path) -> None:
    """ruff takes a folder in the checkout for a package of ours and would sort imports anew."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=NOT_CODE)
        else:
            shutil.copy2(ROOT / name, tmp_path / name)
    for name in LEFT:
        (tmp_path / name / "quickstart").mkdir(parents=True)
    badly_sorted = "import torch\nimport os\n"
    (tmp_path / "runs" / "quickstart" / "user_script.py").write_text(badly_sorted)

    def lint() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ruff", "check", "--no-cache", "."]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = lint()
    assert done.returncode == 0, done.stdout
    (tmp_path / "sad" / "unsorted.py").write_text(badly_sorted)
    done = lint()
    assert done.returncode == 1 and "unsorted.py" in done.stdout
