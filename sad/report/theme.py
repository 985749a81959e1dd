"""The colours and dashes that the report page and its plots share, for light and dark screens."""

from __future__ import annotations

LIGHT = {
    "paper": "#ffffff",
    "panel": "#f6f7f9",
    "ink": "#1f2328",
    "muted": "#636c76",
    "grid": "#e3e6ea",
    "student": "#0a66c2",
    "ema": "#d9580d",
    "baseline": "#7d8590",
    "teacher": "#8250df",
    "third": "#1a7f4b",
    "fourth": "#b7318e",
    "bad": "#cf222e",
}
DARK = {
    "paper": "#14171c",
    "panel": "#1c2027",
    "ink": "#e6e9ed",
    "muted": "#9aa3ad",
    "grid": "#2f353e",
    "student": "#6cb2ff",
    "ema": "#ff9d5c",
    "baseline": "#8d96a1",
    "teacher": "#c4a2ff",
    "third": "#5bd694",
    "fourth": "#f58bd0",
    "bad": "#ff7b72",
}

LINE_COLOURS = ("student", "ema", "third", "teacher", "fourth", "baseline")
"""Names of colours for the lines of one plot, in this order."""

DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
"""Dash patterns of matplotlib for lines that may coincide, or that share a colour."""


def with_variables(svg: str) -> str:
    """The same drawing with each colour of ``LIGHT`` as the CSS variable that the page themes."""
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg
