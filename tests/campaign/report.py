"""What was inflicted and what came of it, added up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Tally:
    """One thing that was done to a run, and whether anything was lost or wrong."""

    inflicted: int
    lost: int
    example: str = ""


@dataclass
class Promise:
    """A promise, how often it was put to the test, and what was lost."""

    text: str
    inflicted: int = 0
    lost: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, tallies: Iterable[Tally]) -> Promise:
        for tally in tallies:
            self.inflicted += tally.inflicted
            self.lost += tally.lost
            if tally.example:
                self.examples.append(tally.example)
                print(f"LOST OR WRONG: {tally.example}", flush=True)
        return self

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"survived": self.inflicted - self.lost}
