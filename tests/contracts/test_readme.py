"""What the READMEs show is what the program takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sad.config.load import load_config
from sad.config.schema import STRUCTURAL

ROOT = Path(__file__).parents[2]
READMES = [
    path
    for folder in (".", "sad", "kernels", "bench")
    if (path := ROOT / folder / "README.md").exists()
]
YAML = [
    shown
    for path in READMES
    for shown in re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
]


@pytest.mark.parametrize("text", YAML, ids=lambda text: text.split(":")[0].strip("# \n"))
def test_configurations_load(text: str, tmp_path: Path) -> None:
    path = tmp_path / "shown.yaml"
    models = "" if "student:" in text else "student: s\nteacher: t\n"
    path.write_text(models + text)
    config = load_config(path)
    if "layerwise" in text:
        assert set(config.structural_weights) == set(STRUCTURAL), "one of each is shown"


def test_there_are_some() -> None:
    assert len(YAML) >= 2
