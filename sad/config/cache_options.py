"""The options of ``sad cache-teacher`` that are no keys of a configuration.

Nothing slow is imported: wrong words wait for no torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sad.errors import UsageError, quoted

Kind = Literal["sampled", "topk", "hidden"]
Codec = Literal["bf16", "int8"]

VALUES = ("output", "kind", "codec", "top_k", "temperatures", "window")
SWITCHES = ("wait_for_reader", "check", "all_rows")


@dataclass(frozen=True)
class CacheOptions:
    """What ``sad cache-teacher`` is asked beside the configuration."""

    output: str = ""
    """The folder to write."""
    kind: Kind = "sampled"
    codec: Codec | None = None
    """Of hidden states. Default: int8, and bf16 with a window."""
    top_k: int = 64
    """Ids per token."""
    temperatures: tuple[float, ...] | None = None
    """Default: the configuration's; of top-k targets 1 is always there, for evaluations."""
    window: int = 0
    """Shards kept ahead of the one run that reads them meanwhile; 0: all are kept, for any run."""
    wait_for_reader: bool = False
    """Wait for that run without an end."""
    all_rows: bool = False
    """Cache rows that the configured run would not read, too, so that other seeds and longer runs
    find theirs."""
    check: bool = False
    """Compare random rows of a cache that is there with the teacher."""

    def __post_init__(self) -> None:
        if not self.output:
            raise UsageError("output must be given, got none; write --output DIR (command line)")
        if self.kind != "hidden" and self.codec is not None:
            raise _refused("codec", "be left out but for --kind hidden", self.codec, "leave it out")
        if self.kind == "hidden" and self.temperatures is not None:
            given = ",".join(f"{t:g}" for t in self.temperatures)
            remedy = "hidden states serve any: leave it out"
            raise _refused("temperatures", "be left out with --kind hidden", given, remedy)
        if self.kind == "sampled" and len(self.temperatures or (1.0,)) > 1:
            given = ",".join(f"{t:g}" for t in self.temperatures or ())
            remedy = "samples are drawn at one: choose it, or --kind topk"
            raise _refused("temperatures", "be one with --kind sampled", given, remedy)
        if self.window and self.kind != "hidden":
            remedy = "write --kind hidden, or leave --window out"
            raise _refused("window", f"be 0 with --kind {self.kind}", str(self.window), remedy)
        if self.wait_for_reader and not self.window:
            raise UsageError(
                "wait_for_reader must be left out without a window, got a cache that is kept; "
                "write for example --window 4 (command line)"
            )

    @property
    def codec_or_default(self) -> Codec | None:
        if self.kind != "hidden":
            return None
        return self.codec or ("bf16" if self.window else "int8")


def read_cache_options(words: Sequence[str]) -> tuple[CacheOptions, list[str]]:
    """Take the options out of the words of a command line; the others are overrides of keys.

    Raises ``UsageError`` for a value that an option cannot have.
    """
    found: dict[str, list[str]] = {}
    switched: set[str] = set()
    others: list[str] = []
    into = others
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in VALUES:
            into = found[name] = [value] if equals else []
        elif word.startswith("--") and name in SWITCHES and not equals:
            switched.add(name)
            into = others
        elif word.startswith("--"):
            into = others
            into.append(word)
        else:
            into.append(word)
    values = {name: ",".join(given) for name, given in found.items()}
    options = CacheOptions(
        output=values.get("output", ""),
        kind=_one_of("kind", values.get("kind", "sampled"), get_args(Kind)),
        codec=_one_of("codec", values["codec"], get_args(Codec)) if "codec" in values else None,
        top_k=_count("top_k", values.get("top_k", "64"), 1),
        temperatures=_temperatures(values["temperatures"]) if "temperatures" in values else None,
        window=_count("window", values.get("window", "0"), 0),
        wait_for_reader="wait_for_reader" in switched,
        all_rows="all_rows" in switched,
        check="check" in switched,
    )
    return options, others


def _one_of(name: str, text: str, choices: tuple[str, ...]) -> Any:
    if text not in choices:
        raise _refused(
            name, f"be one of {', '.join(choices)}", text, f"write --{name} {choices[0]}"
        )
    return text


def _count(name: str, text: str, low: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 7 and int(text) >= low):
        what = "a positive integer" if low else "an integer of at least 0"
        raise _refused(name, f"be {what}", text, f"write for example --{name} 64")
    return int(text)


def _temperatures(text: str) -> tuple[float, ...]:
    found = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            value = math.nan
        if not (value > 0 and math.isfinite(value)):
            remedy = "write for example --temperatures 1,2"
            raise _refused("temperatures", "be numbers above 0", text, remedy)
        found.append(value)
    return tuple(sorted(set(found)))


def _refused(name: str, expectation: str, text: str, remedy: str) -> UsageError:
    return UsageError(f"{name} must {expectation}, got {quoted(text)}; {remedy} (command line)")
