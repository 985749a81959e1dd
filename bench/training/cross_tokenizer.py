"""What a teacher with another tokenizer gives: losses compared on three pairs of tokenizers.

The teacher is the quickstart's, a byte-level BPE of 4,096 pieces; the students and their tokenizers
are those of ``student_tokenizers``. The students of a pair and a seed start from the same weights
and train side by side on the same batches, each with an optimizer and an average of its own, by the
trainer's own steps. They are scored in bits per byte of the held-out text, which mean the same for
every tokenizer.

The weight of the teacher is chosen for each pair and loss by a seed of its own (``TUNING_SEED``),
and the loss on text has the rest, so that the sum is the same everywhere.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from bench.training.cross_tokenizer_peers import GoldLoss, UldLoss, shared_strings
from bench.training.pieces import commit_folder, in_subprocess, measure_pieces
from bench.training.student_tokenizers import TOKENIZERS, make_student
from sad.checkpoint.run_directory import RunDirectory
from sad.config.load import load_config
from sad.config.schema import DistillConfig
from sad.data.alignment import AlignedRows, Side
from sad.data.batch import Batch
from sad.data.outcomes import run_outcomes
from sad.data.tokenizers import load_tokenizer
from sad.environment import seed_everything
from sad.losses.capture import Capture
from sad.losses.cross_tokenizer import CrossTokenizerLoss
from sad.losses.prefix_inside import InsideTeacherTokens
from sad.models.load import load_student
from sad.optim.precision import Precision
from sad.teachers.frozen import TeacherOutput
from sad.teachers.other_tokenizer import OtherTokenizerTeacher
from sad.training.evaluate import evaluate_student
from sad.training.inputs import RunInputs, load_inputs
from sad.training.student import build_student
from sad.training.trainer import Trainer

Json = dict[str, Any]
Weights = dict[str, list[float]]  # of the teacher, for each loss: one student for each

SEEDS = (0, 1, 2)
TUNING_SEED = 100
TRIED = [0.3, 0.7]

CE = "CE alone"
ARMS = (
    CE,
    "shared strings",
    "ULD",
    "GOLD",
    "likelihood (ALM)",
    "prefix",
    "prefix, closed",
    "prefix, closed, inside",
)
UNDEFINED = {("bytes", "shared strings")}
"""A student of bytes has no token but shared ones: the KL to a teacher's rest is infinite."""


@dataclass(frozen=True)
class Sizes:
    """How much is trained; smaller in tests."""

    steps: int = 100
    documents: int = 400  # of the standard library, some of them held out
    eval_rows: int = 96
    tokenizer_documents: int = 120


class Piece(NamedTuple):
    """The students of one pair of tokenizers and one seed."""

    pair: str
    seed: int


Found = dict[Piece, Json]
Run = Callable[[Piece, Weights], Json]


def measure(
    run: Run | None = None,
    folder: Path | None = None,
    *,
    keep: Callable[[Json], None] = lambda _: None,
) -> Json:
    """All students; those that this commit has trained are not trained again."""
    run = run or (lambda piece, weights: in_subprocess(__name__, [piece, weights]))
    folder = folder or commit_folder("cross-tokenizer")
    tuning = [Piece(pair, TUNING_SEED) for pair in TOKENIZERS]
    tuned = measure_pieces(tuning, lambda piece: run(piece, tried(piece.pair)), folder)
    pieces = [Piece(pair, seed) for seed in SEEDS for pair in TOKENIZERS]
    found = measure_pieces(
        pieces,
        lambda piece: run(piece, best_weights(tuned[Piece(piece.pair, TUNING_SEED)])),
        folder,
        keep=lambda found: keep(_result(tuned, found)),
    )
    return _result(tuned, found)


def tried(pair: str) -> Weights:
    """The weights to choose among. CE has no teacher."""
    return {arm: [0.0] if arm == CE else TRIED for arm in ARMS if (pair, arm) not in UNDEFINED}


def best_weights(tuned: Json) -> Weights:
    """Of each loss the weight with the fewest bits per byte."""
    best: dict[str, Json] = {}
    for student in tuned["students"]:
        arm = student["arm"]
        if arm not in best or student["bits_per_byte"] < best[arm]["bits_per_byte"]:
            best[arm] = student
    return {arm: [student["weight"]] for arm, student in best.items()}


def _result(tuned: Found, found: Found) -> Json:
    def records(some: Found) -> list[Json]:
        return [piece._asdict() | record for piece, record in sorted(some.items())]

    result: Json = {"case": "cross_tokenizer", "recipe": "ablation", "steps": Sizes().steps}
    return result | {"tuning": records(tuned), "runs": records(found)}


# Training


class OneTeacher(OtherTokenizerTeacher):
    """A teacher that reads each batch once, for all students of a piece."""

    _last: tuple[list[int], TeacherOutput] | None = None

    def forward(self, batch: Batch, capture: Capture | None = None) -> TeacherOutput:
        assert batch.places is not None
        places = batch.places.tolist()
        if self._last is None or self._last[0] != places:
            self._last = places, super().forward(batch, capture)
        return self._last[1]


def run_here(piece: Piece, weights: Weights, sizes: Sizes | None = None) -> Json:
    """Train and score the students of a piece in this process, one for each of ``weights``."""
    sizes = sizes or Sizes()
    with tempfile.TemporaryDirectory() as folder:
        student = make_student(piece.pair, Path(folder), sizes.tokenizer_documents)
        config = _config(str(student), folder, piece.seed, sizes)
        inputs = load_inputs(config)
        frozen = inputs.frozen_teacher
        assert frozen is not None and isinstance(inputs.train_rows, AlignedRows)
        shared = replace(
            inputs, teacher=OneTeacher(frozen.model, frozen.head().vocab_size, device=frozen.device)
        )
        losses = _losses(config, inputs, inputs.train_rows)
        trainers = {
            (arm, weight): _trainer(config, shared, losses.get(arm), weight, folder)
            for arm, several in weights.items()
            for weight in several
        }
        for _ in range(sizes.steps):
            for trainer in trainers.values():
                trainer.micro_batch()
        students = [
            {"arm": arm, "weight": weight, "bits_per_byte": _score(config, inputs, trainer)}
            for (arm, weight), trainer in trainers.items()
        ]
    return {"notes": list(inputs.tokenizer_notes), "students": students}


def _config(student: str, folder: str, seed: int, sizes: Sizes) -> DistillConfig:
    settings = {
        "student": student,
        "tokenizer": student,
        "cross_tokenizer": "prefix",
        "data.max_documents": sizes.documents,
        "max_length": 192,
        "max_steps": sizes.steps,
        "warmup_steps": min(20, sizes.steps // 2),
        "max_eval_rows": sizes.eval_rows,
        "seed": seed,
        "output_dir": f"{folder}/run",
    }
    return load_config("ablation", [w for key, x in settings.items() for w in (f"--{key}", str(x))])


def _losses(
    config: DistillConfig, inputs: RunInputs, rows: AlignedRows
) -> dict[str, CrossTokenizerLoss]:
    """What each arm compares by. CE compares nothing."""
    assert config.teacher is not None
    sides = (
        Side.of(inputs.tokenizer, config.data, "student"),
        Side.of(load_tokenizer(config.teacher), config.data, "teacher"),
    )
    strings = shared_strings(*sides)
    prefixes = run_outcomes(*sides, rows, None)
    closed = run_outcomes(*sides, rows, config.outcome_threshold)
    inside = InsideTeacherTokens(sides[0].bytes, sides[1].bytes, closed)
    device = inputs.device
    return {
        "shared strings": CrossTokenizerLoss(strings, device),
        "ULD": UldLoss(prefixes, device),
        "GOLD": GoldLoss(strings, device),
        "likelihood (ALM)": CrossTokenizerLoss(prefixes, device, likelihood=True),
        "prefix": CrossTokenizerLoss(prefixes, device),
        "prefix, closed": CrossTokenizerLoss(closed, device),
        "prefix, closed, inside": CrossTokenizerLoss(closed, device, inside=inside),
    }


def _trainer(
    config: DistillConfig,
    inputs: RunInputs,
    loss: CrossTokenizerLoss | None,
    weight: float,
    folder: str,
) -> Trainer:
    config = replace(config, kd_weight=weight, ce_weight=round(1 - weight, 6))
    seed_everything(config.seed)
    precision = Precision(config, inputs.device)
    student = build_student(
        config, load_student(config), inputs.valid_vocab, precision, comparison=loss
    )
    trainer = Trainer(config, student, inputs, precision, RunDirectory(Path(folder) / "run"))
    student.train()
    return trainer


def _score(config: DistillConfig, inputs: RunInputs, trainer: Trainer) -> float:
    """Bits per byte of the averaged student on held-out text."""
    scores = evaluate_student(
        trainer.student, None, inputs.eval_batches(config), {"ema": trainer.averaged}
    )
    return scores["ema/bits_per_byte"]


# Table


def table(result: Json) -> list[str]:
    """Markdown: a line per loss; of each pair the mean, and the change against CE per seed."""
    pairs = list(dict.fromkeys(run["pair"] for run in result["runs"]))
    seeds = {p: ", ".join(str(r["seed"]) for r in result["runs"] if r["pair"] == p) for p in pairs}
    heads = (f"{pair} (seeds {seeds[pair]})" for pair in pairs)
    lines = [f"| loss | {' | '.join(heads)} |", f"|-|{'-|' * len(pairs)}"]
    for arm in ARMS:
        cells = [_cell(result["runs"], pair, arm) for pair in pairs]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def _cell(runs: Sequence[Json], pair: str, arm: str) -> str:
    students = [student for run in runs if run["pair"] == pair for student in run["students"]]
    scores = {
        name: [student["bits_per_byte"] for student in students if student["arm"] == name]
        for name in dict.fromkeys(student["arm"] for student in students)
    }
    if arm not in scores:
        return "-"
    mean = statistics.fmean(scores[arm])
    text = f"{mean:.3f}"
    if mean == min(statistics.fmean(values) for values in scores.values()):
        text = f"**{text}**"
    if arm == CE:
        return text
    changes = ", ".join(f"{a - b:+.3f}" for a, b in zip(scores[arm], scores[CE], strict=True))
    [weight] = {student["weight"] for student in students if student["arm"] == arm}
    return f"{text} ({changes}; weight {weight:g})"


if __name__ == "__main__":
    given, chosen = json.loads(sys.argv[1])
    print(json.dumps(run_here(Piece(*given), chosen)))
