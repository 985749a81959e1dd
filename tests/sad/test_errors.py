"""Quoting what libraries say."""

from __future__ import annotations

import pytest

from sad.errors import one_line, with_type


@pytest.mark.parametrize(
    ("message", "quoted"),
    [
        ("short", "short"),
        ("\n\n  first that speaks  \nsecond", "first that speaks"),
        ("", "OSError"),
        (" \n ", "OSError"),
        ("x" * 500, "x" * 200),
    ],
)
def test_one_line(message: str, quoted: str) -> None:
    assert one_line(OSError(message)) == quoted


@pytest.mark.parametrize(
    ("message", "quoted"), [("no space\nleft", "OSError: no space"), ("", "OSError")]
)
def test_with_type(message: str, quoted: str) -> None:
    assert with_type(OSError(message)) == quoted
