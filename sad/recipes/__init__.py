"""Recipes: complete configurations that ship with the package, under a short name.

A recipe is a YAML file here; its first line, a comment, says what it does. Paths in it are relative
to this folder.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def recipe_names() -> list[str]:
    """The names of all recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The path of a recipe's file."""
    return FOLDER / f"{name}.yaml"


def recipe_summary(name: str) -> str:
    """A recipe's first line, which says what it does."""
    with recipe_path(name).open(encoding="utf-8") as file:
        return file.readline().lstrip("# ").strip()
