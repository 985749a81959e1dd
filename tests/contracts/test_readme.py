"""What README.md shows is what the program takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sad.config.load import load_config
from sad.config.schema import STRUCTURAL

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
YAML = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("text", YAML, ids=lambda text: text.split(":")[0].strip("# \n"))
def test_configurations_load(text: str, tmp_path: Path) -> None:
    path = tmp_path / "shown.yaml"
    models = "" if "student:" in text else "student: s\nteacher: t\n"
    path.write_text(models + text)
    config = load_config(path)
    if "layerwise" in text:
        assert set(config.structural_weights) == set(STRUCTURAL), "one of each is shown"


def test_there_are_some() -> None:
    assert len(YAML) == 2
