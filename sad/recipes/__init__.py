"""The recipes that ship with the package: complete configurations under a short name.

A recipe is a YAML file here; its first line, a comment, says what it does. Paths in it are relative
to this folder.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """The names that stand for a file."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The file of a recipe."""
    return FOLDER / f"{name}.yaml"


def recipe_summary(name: str) -> str:
    """The recipe's first line."""
    with recipe_path(name).open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()
