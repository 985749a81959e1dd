"""Options of a command that are no keys of a configuration, among the words of its command line.

Nothing slow is imported: wrong words wait for no torch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from sad.errors import UsageError, quoted


def take_options(
    words: Sequence[str], names: Collection[str], switches: Collection[str] = ()
) -> tuple[dict[str, str], set[str], list[str]]:
    """Take the options out of the words: the value of each of ``names`` that is given, the
    ``switches`` that are, and the words that are left, which are overrides of keys.

    A value of several words is joined by commas. A switch has none.
    """
    found: dict[str, list[str]] = {}
    switched: set[str] = set()
    others: list[str] = []
    into = others
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in names:
            into = found[name] = [value] if equals else []
        elif word.startswith("--") and name in switches and not equals:
            switched.add(name)
            into = others
        elif word.startswith("--"):
            into = others
            into.append(word)
        else:
            into.append(word)
    return {name: ",".join(given) for name, given in found.items()}, switched, others


def positive_number(text: str) -> float | None:
    """A finite number above 0; None for any other text."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if value > 0 and math.isfinite(value) else None


def refused(name: str, expectation: str, text: str, remedy: str) -> UsageError:
    """The error of an option that cannot have this value."""
    return UsageError(f"{name} must {expectation}, got {quoted(text)}; {remedy} (command line)")
