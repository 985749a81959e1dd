"""Markdown table of faults, with wrong values in bold."""

from __future__ import annotations

from typing import Any

from bench.faults.core import RELATIVE, Row

COLUMNS = ("fault", "who", "their value", "float64", "ours")
SEVERAL = 4  # more numbers than these are shown as a range


def table(result: dict[str, Any]) -> list[str]:
    lines = [_line(COLUMNS), _line(["-"] * len(COLUMNS))]
    before = ""
    for row in result["rows"]:
        fault = f"{row['title']} ({row['unit']})"
        shown = "" if fault == before else fault  # once for all its rows
        before = fault
        true = text(row["true_value"], row["unit"])
        lines.append(_line([shown, _who(row), _theirs(row), true, _ours(row)]))
    return lines


def _line(cells: Any) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _who(row: Row) -> str:
    return f"{row['peer']}, `{row['call']}`" + (" (interpreted)" if row["interpreted"] else "")


def _theirs(row: Row) -> str:
    value = text(row["peer_value"], row["unit"])
    match row["status"]:
        case "shown":
            return f"**{value}**"
        case "right":
            return value
        case status:
            return f"{status}: {row['reason']}"


def _ours(row: Row) -> str:
    """Our values of both implementations, once if they are equal in print."""
    texts = {impl: text(value, row["unit"]) for impl, value in row["ours"].items()}
    first, *rest = texts.items()
    cell = first[1] + "".join(f" ({impl}: {t})" for impl, t in rest if t != first[1])
    return cell if row["ours_right"] else f"**wrong: {cell}**"


def text(value: Any, unit: str) -> str:
    """A number, several with / between them, or many as a range."""
    if value is None:
        return "-"
    if not isinstance(value, list):
        return _number(value, unit)
    if len(value) > SEVERAL and all(isinstance(v, float) for v in value):
        low, high = _number(min(value), unit), _number(max(value), unit)
        return low if low == high else f"{low} to {high}"
    texts = [_number(v, unit) for v in value]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def _number(value: float | str, unit: str) -> str:
    if isinstance(value, str):  # not finite, or a reason
        return value
    if unit.startswith(RELATIVE):
        return f"{_digits(100 * value)} %"
    return _digits(value) if abs(value) < 10 else f"{value:.2f}"  # losses differ in hundredths


def _digits(value: float) -> str:
    """Three significant digits."""
    return f"{value:#.3g}".rstrip(".") if abs(value) > 1e-9 else "0"
