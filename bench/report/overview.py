"""The comparison that the READMEs open with: time, memory and error of a few packages on one GPU.

A row per package, a column per loss, from one record of the kernel benchmark. Of each package the
fastest setting whose gradients are right stands for it; where none is right, the fastest is shown
struck out. ``draw`` makes a picture of one of the losses, for light and for dark pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Json = Mapping[str, Any]

LOSSES = {
    "linear_ce": "cross-entropy",
    "linear_kd/forward_kl": "KL",
    "linear_kd/joint": "CE + KL",
    "linear_kd/jsd": "JSD",
}
"""Cases of the benchmark, and the columns of the table."""

PACKAGES = {
    "ours": "SAD",
    "liger-kernel": "Liger",
    "trl": "TRL",
    "unsloth_zoo": "Unsloth",
    "cut-cross-entropy": "CCE",
    "quack-kernels": "QuACK",
    "eager": "PyTorch eager",
}
"""Rows of the table, if they have a time: distributions, or peers that belong to none."""

SEPARATE = ("trl", "unsloth_zoo")
"""Packages whose CE + KL is both their losses, one after the other."""

PICTURED = "linear_kd/joint"
THEMES = ("light", "dark")


class Entry(NamedTuple):
    """What a package takes for a loss."""

    ms: float
    gib: float  # peak beyond the inputs, returned gradients included
    error: float  # the larger of both gradients', relative to float64 in the 2-norm
    right: bool

    def __str__(self) -> str:
        time = f"{self.ms:.0f} ms" if self.right else f"~~{self.ms:.0f} ms~~"
        return f"{time}<br>{_gib(self.gib)} · {_percent(self.error)}"


def entries(record: Json, width: int) -> dict[str, dict[str, Entry]]:
    """Package -> loss -> its entry, among the rows whose hidden states have this width."""
    found: dict[str, dict[str, Entry]] = {name: {} for name in PACKAGES}
    for package in PACKAGES:
        for case in LOSSES:
            rows = [
                _entry(row)
                for row in record["rows"]
                if row["case"] == case
                and row["shape"].get("D_s") == width
                and package in (row["peer"], row["package"])
                and row.get("ms")
            ]
            if rows:
                # Right before wrong, then the fastest.
                found[package][case] = min(rows, key=lambda e: (not e.right, e.ms))
    return {package: of_package for package, of_package in found.items() if of_package}


def table(record: Json, width: int) -> list[str]:
    """Markdown: the entries, what the columns are, and who needs less than we do."""
    found = entries(record, width)
    some = next(r for r in record["rows"] if r["case"] == PICTURED and r["shape"]["D_s"] == width)
    shape, card = some["shape"], record["machine"]["gpu"].removeprefix("NVIDIA ")
    lines = [f"| {card}: time, memory · error | {' | '.join(LOSSES.values())} |"]
    lines.append("|-" * (1 + len(LOSSES)) + "|")
    for package, of_package in found.items():
        cells = [str(of_package.get(case, "-")) for case in LOSSES]
        lines.append(f"| {_name(package, record)} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        f"**{' '.join(_lower(found))}** Forward and backward in bf16 of {shape['N']:,} tokens, "
        f"from hidden states of width {shape['D_s']:,} (teacher: {shape['D_t']:,}) over "
        f"{shape['V']:,} columns, at a KL of about {some['options']['kl']:g} nat. Time: the "
        "median. Memory: the peak beyond the inputs, of which the gradients are "
        f"{some['gradient_mib'] / 1024:.1f} GiB. Error: relative to float64, the larger of both "
        "gradients. Each package in its fastest setting that is right; a time is struck out where "
        f"every setting is more than 5 % off; `-`: it has no such loss. {_separate(found)}",
    ]


def _separate(found: Mapping[str, Mapping[str, Entry]]) -> str:
    """Who has CE + KL as two losses only."""
    names = [PACKAGES[package] for package in SEPARATE if package in found]
    have, their = ("has", "its") if len(names) == 1 else ("have", "their")
    said = f"{' and '.join(names)} {have} no CE + KL: both {their} losses, one after the other."
    return said if names else ""


def _lower(found: Mapping[str, Mapping[str, Entry]]) -> Iterator[str]:
    """Who takes less time than we do, or less memory, for which losses."""
    ours = found["ours"]
    for what, key in (("Less time", "ms"), ("Less memory", "gib")):
        who = []
        for package, of_package in found.items():
            losses = [
                LOSSES[case]
                for case, entry in of_package.items()
                if entry.right and getattr(entry, key) < getattr(ours[case], key)
            ]
            if losses:
                who.append(f"{PACKAGES[package]} ({', '.join(losses)})")
        yield f"{what} than SAD: {', '.join(who) or 'none'}."


def draw(record: Json, width: int, folder: Path) -> list[Path]:
    """Bars of memory, time and error of ``PICTURED`` as SVG, one file for each of ``THEMES``.

    Letters are outlines, so that every viewer shows the same; each text also stands in a comment.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    from sad.report.plots import STYLE
    from sad.report.theme import DARK, LIGHT

    folder.mkdir(parents=True, exist_ok=True)
    found = {p: of[PICTURED] for p, of in entries(record, width).items() if PICTURED in of}
    panels = (
        ("peak memory", [e.gib for e in found.values()], _gib),
        ("time, forward and backward", [e.ms for e in found.values()], lambda v: f"{v:.0f} ms"),
        ("error of the gradients", [e.error for e in found.values()], _percent),
    )
    paths = []
    style: dict[Any, Any] = STYLE | {"svg.fonttype": "path", "svg.hashsalt": "sad"}
    for theme, colours in zip(THEMES, (LIGHT, DARK), strict=True):
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(8.6, 1.75), layout="constrained")
            FigureCanvasSVG(figure)
            colour = [colours["student" if p == "ours" else "baseline"] for p in found]
            for axes, (title, values, text) in zip(figure.subplots(1, 3), panels, strict=True):
                bars = axes.barh(range(len(values)), values, height=0.66, color=colour)
                labels = axes.bar_label(bars, [text(v) for v in values], padding=4, fontsize=9)
                for i, label in enumerate(labels):
                    label.set_color(colours["ink"])
                    label.set_fontweight("bold" if i == 0 else "normal")
                axes.set_title(title, loc="left", fontsize=9, color=colours["ink"])
                axes.set_xlim(0, 1.3 * max(values))  # room for the labels
                axes.invert_yaxis()
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
                axes.grid(visible=False)
            first = figure.axes[0]
            first.set_yticks(range(len(found)), [PACKAGES[p] for p in found], fontsize=9)
            for tick in first.get_yticklabels():
                tick.set_color(colours["ink"])
            paths.append(folder / f"overview-{theme}.svg")
            nothing = {"Date": None, "Creator": None}
            figure.savefig(paths[-1], metadata=nothing, transparent=True)
    return paths


def _entry(row: Json) -> Entry:
    errors = [row["err"][name] for name in ("dhidden", "dweight")]
    error = max((e for e in errors if isinstance(e, int | float)), default=float("nan"))
    return Entry(row["ms"]["full"][1], row["peak_mib"] / 1024, error, row["status"] == "ok")


def _name(package: str, record: Json) -> str:
    if package == "ours":
        return "**SAD**"
    return " ".join(filter(None, (PACKAGES[package], record["versions"].get(package))))


def _gib(value: float) -> str:
    return f"{value:.1f} GiB"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %" if value < 0.01 else f"{100 * value:.1f} %"
