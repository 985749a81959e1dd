"""What a teacher cache costs in quality: gradients, trained students, and hidden states in 8 bits.

Three parts, see ``sparse_targets`` and ``hidden_codecs``: ``gradients`` and ``students`` of sparse
targets, and ``codecs`` of hidden states. Each piece runs in a subprocess with one thread: only
quality is measured, not speed. Finished pieces are kept in a temporary folder of the commit, so
that a measurement that was interrupted, or is made in parts (``--only``), continues.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.training.hidden_codecs import STUDENTS, TEACHERS, CodecSizes, codecs
from bench.training.pieces import commit_folder, in_subprocess, measure_pieces
from bench.training.sparse_targets import ARMS, FORMS, Sizes, gradients, train_student

Json = dict[str, Any]

PARTS = ("gradients", "codecs", "students")
SEEDS = (0, 1, 2)


class Piece(NamedTuple):
    """What one process measures."""

    part: str
    name: str = ""  # of the arm or of the teacher
    seed: int = 0


PIECES = (
    Piece("gradients"),
    *(Piece("codecs", name) for name in TEACHERS),
    *(Piece("students", arm.name, seed) for seed in SEEDS for arm in ARMS),
)

Run = Callable[[Piece], Json]
Found = dict[Piece, Json]


def measure(
    run: Run | None = None,
    folder: Path | None = None,
    *,
    only: Sequence[str] = (),
    keep: Callable[[Json], None] = lambda _: None,
) -> Json:
    """All parts, or those of ``only``; the record holds the others, too, as far as this commit has
    measured them. ``run`` measures a piece, ``keep`` receives the record after each."""
    unknown = [part for part in only if part not in PARTS]
    if unknown:
        sys.exit(f"error: --only must be among {','.join(PARTS)}, got {unknown[0]}; leave it out")
    run, folder = run or partial(in_subprocess, __name__), folder or commit_folder("teachers")
    found = measure_pieces(
        PIECES,
        run,
        folder,
        wanted=lambda piece: piece.part in (only or PARTS),
        keep=lambda found: keep(_result(found)),
    )
    if len(found) == len(PIECES):
        shutil.rmtree(folder)  # all is measured: nothing to continue from
    return _result(found)


def _result(found: Found) -> Json:
    result: Json = {"case": "teachers", "recipe": "ablation", "gradients": None}
    result["gradients"] = found.get(Piece("gradients"))
    result["codecs"] = [found[p] for p in PIECES if p.part == "codecs" and p in found]
    students = []
    for arm in ARMS:
        seeds = [s for s in SEEDS if Piece("students", arm.name, s) in found]
        kl = [found[Piece("students", arm.name, seed)]["kl"] for seed in seeds]
        if seeds:
            students.append({"arm": arm.name, "k": arm.k, "seeds": seeds, "kl": kl})
    result["students"] = students
    return result


def run_here(piece: Piece, sizes: Sizes | None = None, codec: CodecSizes | None = None) -> Json:
    """One piece in this process."""
    sizes = sizes or Sizes()
    match piece.part:
        case "gradients":
            return gradients(sizes)
        case "codecs":
            return codecs(piece.name, codec or CodecSizes())
        case _:
            [arm] = [arm for arm in ARMS if arm.name == piece.name]
            return train_student(arm, piece.seed, sizes)


# Tables


def table(result: Json) -> list[str]:
    """Markdown: a table for each part that was measured, and a line for what was not."""
    lines: list[str] = []
    if result["gradients"]:
        lines += [*_gradient_table(result["gradients"]["rows"]), ""]
    if result["students"]:
        lines += [*_student_table(result["students"]), ""]
    if result["codecs"]:
        lines += [*_codec_table(result["codecs"]), ""]
    absent = [part for part in PARTS if not result[part]]
    absent += [f"{r['teacher']} ({r['reason']})" for r in result["codecs"] if r["reason"]]
    if absent:
        lines += [f"Not measured: {'; '.join(absent)}.", ""]
    return lines[:-1]


def _gradient_table(rows: Sequence[Json]) -> list[str]:
    """A line per K, temperature and step; of each form the error and the cosine."""
    lines = [
        f"| gradient against full KD | teacher's mass beyond K | {' | '.join(FORMS)} |",
        f"|-|-|{'-|' * len(FORMS)}",
    ]
    settings = dict.fromkeys((row["step"], row["temperature"], row["k"]) for row in rows)
    for step, temperature, k in settings:
        here = [r for r in rows if (r["step"], r["temperature"], r["k"]) == (step, temperature, k)]
        best = min(row["error"] for row in here)
        cells = [f"K = {k}, T = {temperature:g}, step {step}", f"{100 * here[0]['tail']:.0f} %"]
        for form in FORMS:
            [row] = [row for row in here if row["form"] == form]
            error = f"{row['error']:.3f}"
            bold = f"**{error}**" if row["error"] == best else error
            cells.append(f"{bold} (cosine {row['cosine']:.4f})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _student_table(rows: Sequence[Json]) -> list[str]:
    seeds = ", ".join(map(str, rows[0]["seeds"]))
    lines = [f"| targets | KL to the teacher, mean | seeds {seeds} |", "|-|-|-|"]
    for row in sorted(rows, key=lambda row: statistics.fmean(row["kl"])):
        values = ", ".join(f"{kl:.3f}" for kl in row["kl"])
        lines.append(f"| {row['arm']} | {statistics.fmean(row['kl']):.3f} | {values} |")
    return lines


def _codec_table(teachers: Sequence[Json]) -> list[str]:
    students = "".join(f" gradient error, {kl:g} nats |" for kl in STUDENTS.values())
    lines = [
        f"| codec | bytes per token | KL to the exact teacher | same top token |{students}",
        f"|-|-|-|-|{'-|' * len(STUDENTS)}",
    ]
    for teacher in teachers:
        if teacher["reason"]:
            continue
        about = f"width {teacher['width']:,}, {teacher['vocab']:,} ids, largest channel "
        about += f"{teacher['outlier']:.1f} times the median"
        lines.append(f"| **{teacher['teacher']}** ({about}) |{' |' * (3 + len(STUDENTS))}")
        for row in teacher["rows"]:
            cells = [row["codec"], f"{row['bytes']:,}"]
            known = row["kl"] is not None
            cells += [f"{row['kl']:.1e}", f"{100 * row['agreement']:.1f} %"] if known else ["-"] * 2
            cells += [f"{row[which]:.4f}" for which in STUDENTS]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    print(json.dumps(run_here(Piece(*json.loads(sys.argv[1])))))
