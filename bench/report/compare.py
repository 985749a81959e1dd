"""Compare two results of the kernel benchmark: what became slower or lost its result.

Compared are ratios to the copy or the matrix products of the same run, which hardly depend on
clocks and load. A row is matched by everything but its numbers. It is worse if its ratio grew by
more than ``LIMIT``, or if it was ok and is now wrong, failed or gone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

LIMIT = 0.10


class Change(NamedTuple):
    """The ratio of one row in both results."""

    row: str
    old: float
    new: float | None  # None: it has no result any more
    why: str

    @property
    def worse(self) -> bool:
        return self.new is None or self.new > self.old * (1 + LIMIT)

    def __str__(self) -> str:
        if self.new is None:
            return f"{self.row}: {self.old:.3g} -> {self.why}"
        return f"{self.row}: {self.old:.3g} -> {self.new:.3g} ({self.new / self.old - 1:+.1%})"


def load(path: Path) -> dict[str, Any]:
    """A result of the kernel benchmark; ``ValueError`` for any other file."""
    record = json.loads(path.read_text())
    rows = record.get("rows", [])
    if record.get("schema") != 1 or not rows or "peer" not in rows[0]:
        raise ValueError(
            f"{path} must be a result of the kernel benchmark, got schema {record.get('schema')!r} "
            f"and {len(rows)} rows with no peer in them; pass a file that python -m bench wrote"
        )
    return record


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """A change for each row with a result in ``old`` whose case is also in ``new``."""
    found, cases = [], {_case(row) for row in new["rows"]}
    rows = {_key(row): row for row in new["rows"]}
    for row in old["rows"]:
        ratio = _ratio(row)
        if row["status"] != "ok" or ratio is None or _case(row) not in cases:
            continue
        other = rows.get(_key(row))
        if other is None or other["status"] != "ok" or _ratio(other) is None:
            why = f"{other['status']}: {other['reason']}" if other else "gone"
            found.append(Change(_key(row), ratio, None, why))
        else:
            found.append(Change(_key(row), ratio, _ratio(other), ""))
    return found


def report(old_path: Path, new_path: Path) -> int:
    """Print what got worse and what got better; return 1 if anything got worse, else 0."""
    old, new = load(old_path), load(new_path)
    if old["machine"]["gpu"] != new["machine"]["gpu"]:
        print(f"note: {old['machine']['gpu']} is compared with {new['machine']['gpu']}")
    found = changes(old, new)
    worse = [change for change in found if change.worse]
    better = [c for c in found if c.new is not None and c.old > c.new * (1 + LIMIT)]
    for title, some in ((f"worse by more than {LIMIT:.0%}", worse), ("better", better)):
        print(f"{title}: {len(some)} of {len(found)}")
        print("".join(f"  {change}\n" for change in some), end="")
    if not found:
        print("no row is in both results; compare runs of the same set")
    return 1 if worse or not found else 0


def _ratio(row: dict[str, Any]) -> float | None:
    ratio = row.get("ratio_gemm") or row.get("ratio_copy")
    return ratio if isinstance(ratio, float | int) else None


def _case(row: dict[str, Any]) -> str:
    fields = ("case", "shape", "dtype", "options", "ignored", "upstream")
    return json.dumps([row.get(f) for f in fields], sort_keys=True)


def _key(row: dict[str, Any]) -> str:
    """A readable key that differs for different rows."""
    sizes = " ".join(f"{name}={value}" for name, value in row["shape"].items())
    more = "".join(
        f" {name}={row[name]}" for name in ("ignored", "upstream") if row.get(name) is not None
    )
    kl = row["options"].get("kl")
    more += "" if kl is None else f" kl={kl}"
    return f"{row['case']} {sizes} {row['dtype']}{more} {row['peer']}"
