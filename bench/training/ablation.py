"""Ablation of the structural losses: the quickstart's student with KD alone, one more loss, all.

Every arm of a group trains the same student from the same weights on the same batches for equally
many steps; only its own configuration keys differ. Scores are those that ``sad eval`` gives the
best student: on held-out text, against the teacher as it was loaded, before its gates were trained.
Differences are paired: they are taken within a seed, between runs that share weights and batches,
because the scores of different seeds scatter by a tenth.

Three groups: a dense teacher; a mixture of experts that teaches the same dense student; and a
mixture of experts whose own first and last layers are the student, so that its routers have
something to follow. The mixture is trained first, by the recipe ``quickstart-moe-teacher``.

Runs use one thread each and run in parallel: only quality is measured, not speed. Finished runs are
kept, see ``pieces.py``, so that an interrupted measurement continues.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bench.training.pieces import commit_folder, in_subprocess, measure_pieces, piece_file
from sad.metrics import headline_metrics

Json = dict[str, Any]

SEEDS = (0, 1, 2)
KEPT_LAYERS = (0, -1)  # of the mixture, in the student cut from it
REHEARSAL = ("--max_steps", "1", "--warmup_steps", "0", "--max_eval_rows", "2")

LOSSES = {
    "feature": ("--feature.weight", "0.1"),
    "attention": ("--attention.weight", "0.1"),
    "relations": ("--relations.weight", "0.1"),
    "layerwise": ("--layerwise.weight", "0.05"),
    "contrastive": ("--contrastive.weight", "0.05"),
}
ROUTING = ("--routing.learning_rate", "1e-3", "--routing.mode")


class Arm(NamedTuple):
    """One arm of the ablation: the recipe with these command-line overrides."""

    group: str
    name: str
    words: tuple[str, ...]


def arms(moe_teacher: str, moe_student: str) -> list[Arm]:
    moe = ("--teacher", moe_teacher)
    cut = (*moe, "--student", moe_student, "--student_init", "pretrained")
    router = ("--router.weight", "0.1", "--router.layers", "[[0, 0], [-1, -1]]")
    every = tuple(word for words in LOSSES.values() for word in words)
    tenfold = tuple(
        word for key, weight in LOSSES.values() for word in (key, f"{10 * float(weight):g}")
    )
    return [
        Arm("dense teacher", "KD alone", ()),
        *(Arm("dense teacher", f"+ {name}", words) for name, words in LOSSES.items()),
        Arm("dense teacher", "+ all five", every),
        Arm("dense teacher", "+ all five, ten times the weights", tenfold),
        Arm("dense teacher", "TAID", ("--taid.enabled", "true")),
        Arm("MoE teacher", "KD alone", moe),
        Arm("MoE teacher", "student-aware routing", (*moe, *ROUTING, "student_aware")),
        Arm("MoE teacher", "knowledge augmentation", (*moe, *ROUTING, "knowledge_augmentation")),
        Arm("MoE teacher, MoE student", "KD alone", cut),
        Arm("MoE teacher, MoE student", "+ router", (*cut, *router)),
    ]


class Piece(NamedTuple):
    """One run: an arm with a seed, or its rehearsal."""

    group: str
    name: str
    seed: int | Literal["rehearsal"]


def measure(
    seeds: Sequence[int] = SEEDS,
    run: Callable[[Arm, Piece, Path], Json] | None = None,
    teach: Callable[[Path], tuple[str, str]] | None = None,
    folder: Path | None = None,
) -> Json:
    """Train and score all arms with all seeds.

    ``run`` makes one run, ``teach`` the mixture of experts and its student. Every arm first trains
    for one step (the rehearsal), so that an arm that cannot start fails within minutes.
    """
    run, teach = run or run_in_subprocess, teach or make_models
    folder = folder or commit_folder("ablation")
    chosen = {(arm.group, arm.name): arm for arm in arms(*teach(folder))}

    def run_piece(piece: Piece) -> Json:
        return run(chosen[piece.group, piece.name], piece, folder)

    measure_pieces([Piece(*names, "rehearsal") for names in chosen], run_piece, folder)
    pieces = [Piece(*names, seed) for seed in seeds for names in chosen]
    scores = measure_pieces(pieces, run_piece, folder)
    rows = []
    for arm in chosen.values():
        base = next(other for other in chosen.values() if other.group == arm.group)
        of_arm, of_base = (
            [scores[Piece(one.group, one.name, seed)] for seed in seeds] for one in (arm, base)
        )
        row: Json = {"group": arm.group, "arm": arm.name, "words": list(arm.words)}
        for metric in [shown.name for shown in headline_metrics()]:
            values, others = (
                [score["student"][metric] for score in some] for some in (of_arm, of_base)
            )
            changes = [value - other for value, other in zip(values, others, strict=True)]
            row[metric] = {"mean": statistics.fmean(values), "seeds": values, "change": changes}
        row["teacher_perplexity"] = of_arm[0]["teacher"]["perplexity"]
        rows.append(row)
    return {"case": "ablation", "recipe": "ablation", "seeds": list(seeds), "rows": rows}


def table(result: Json) -> list[str]:
    """Markdown table: one line per arm, with changes against the first arm of its group."""
    lines = [
        "| | perplexity | change, per seed | KL to the teacher | change "
        "| same top token | change |",
        "|-|-|-|-|-|-|-|",
    ]
    group = ""
    for row in result["rows"]:
        first = row["group"] != group
        if first:
            group = row["group"]
            perplexity = row["teacher_perplexity"]
            lines.append(f"| **{group}** (perplexity {perplexity:.1f}) | | | | | | |")
        cells = [row["arm"], f"{row['perplexity']['mean']:.1f}"]
        cells.append("" if first else _changes(row["perplexity"]["change"], 1))
        cells.append(f"{row['kl']['mean']:.3f}")
        cells.append("" if first else _changes(row["kl"]["change"], 3))
        cells.append(f"{100 * row['agreement']['mean']:.1f} %")
        cells.append("" if first else _changes([100 * c for c in row["agreement"]["change"]], 1))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _changes(values: Sequence[float], digits: int) -> str:
    """The changes per seed; bold if all have one sign."""
    text = ", ".join(f"{value:+.{digits}f}" for value in values)
    same = all(value > 0 for value in values) or all(value < 0 for value in values)
    return f"**{text}**" if same else text


def run_in_subprocess(arm: Arm, piece: Piece, folder: Path) -> Json:
    """The scores of one run."""
    output = piece_file(folder, piece).with_suffix("")
    shutil.rmtree(output, ignore_errors=True)  # left by an interrupted run
    words = ["--output_dir", str(output)]
    words += REHEARSAL if piece.seed == "rehearsal" else ["--seed", str(piece.seed)]
    scores = in_subprocess(__name__, [*arm.words, *words])
    shutil.rmtree(output, ignore_errors=True)
    return scores


def make_models(folder: Path) -> tuple[str, str]:
    """Paths of the trained mixture of experts and of the student cut from its layers."""

    def make(_: tuple[str]) -> Json:
        shutil.rmtree(folder / "moe-teacher", ignore_errors=True)
        words = [str(folder / name) for name in ("moe-teacher", "moe-student")]
        return in_subprocess(__name__, ["--make", *words], threads=2)

    [made] = measure_pieces([("models",)], make, folder).values()
    return made["teacher"], made["student"]


def _run_here(words: list[str]) -> Json:
    """Train and score in this process."""
    from sad.config.load import load_config
    from sad.training.rescore import evaluate_run
    from sad.training.run import distill

    run_dir = distill(load_config("ablation", words)).run_dir
    teacher, student = evaluate_run(run_dir)
    return {"teacher": teacher, "student": student}


def _make_here(teacher: str, student: str) -> Json:
    """Train the mixture of experts, and cut its first and last layer out as the student."""
    from transformers import AutoModelForCausalLM

    from sad.config.load import load_config
    from sad.data.tokenizers import load_tokenizer
    from sad.training.run import distill

    words = ["--output_dir", teacher]
    best = distill(load_config("quickstart-moe-teacher", words)).best
    model: Any = AutoModelForCausalLM.from_pretrained(best)
    layers = model.model.layers
    kept = [layers[i] for i in KEPT_LAYERS]
    for i, layer in enumerate(kept):  # the KV cache is indexed by layer_idx
        layer.self_attn.layer_idx = i
    model.model.layers = type(layers)(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in KEPT_LAYERS]
    model.save_pretrained(student)
    load_tokenizer(str(best)).save_pretrained(student)
    return {"teacher": str(best), "student": student}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(_make_here(*given[1:]) if given[0] == "--make" else _run_here(given)))
