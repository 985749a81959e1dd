"""What a student gains from text that it writes itself: on-policy beside off-policy training.

The recipe ``quickstart-instruct`` trains a student off-policy for half of its steps. From there on
it is trained in four ways, each from the same weights for as many steps as the others:

* off-policy as before (forward KL), and off-policy towards the reverse KL;
* half of the micro-batches on-policy, and all of them (reverse KL).

What is compared is the reverse KL to the teacher at temperature 1: on completions that each student
writes itself after the same held-out prompts, and on the held-out text, and beside it what an
evaluation measures. The learning rate is the same in all four.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sad_kernels import Objective

from bench.training.pieces import commit_folder, in_subprocess, measure_pieces
from sad.config.load import load_config
from sad.config.schema import DistillConfig
from sad.data.prompts import load_prompts
from sad.environment import quiet_libraries
from sad.models.heads import eval_no_grad
from sad.models.load import load_student
from sad.optim.precision import Precision
from sad.training.inputs import load_inputs
from sad.training.on_policy import score_rollouts
from sad.training.rollouts import Sampling
from sad.training.run import distill
from sad.training.student import build_student

SEEDS = (0, 1, 2)
FIRST_STEPS, STEPS, PROMPTS = 150, 60, 96
SECOND_RATE = "1e-3"
WAYS: dict[str, tuple[str, ...]] = {
    "off-policy, forward KL": (),
    "off-policy, reverse KL": ("--divergence", "reverse_kl"),
    "half on-policy": ("--lmbda", "0.5"),
    "on-policy": ("--lmbda", "1"),
}
METRICS = ("reverse_kl_own_text", "reverse_kl_held_out", "kl", "nll", "completion_length")


class Piece(NamedTuple):
    """One seed: a student, and what becomes of it in every way."""

    seed: int


Scores = dict[str, dict[str, float]]  # by way


def measure(
    run: Callable[[Piece], Scores] | None = None,
    folder: Path | None = None,
    *,
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Mean and per-seed values of every way's scores. ``keep`` receives them after each seed."""
    run = run or partial(in_subprocess, __name__)
    found = measure_pieces(
        [Piece(seed) for seed in SEEDS],
        run,
        folder or commit_folder("on-policy"),
        keep=lambda found: keep(_result(found)),
    )
    return _result(found)


def _result(found: dict[Piece, Scores]) -> dict[str, Any]:
    runs = [found[piece] for piece in sorted(found)]
    table = []
    for name in runs[0]:
        values = {metric: [run[name][metric] for run in runs] for metric in METRICS}
        means = {m: {"mean": statistics.fmean(v), "seeds": v} for m, v in values.items()}
        table.append({"name": name} | means)
    return {
        "case": "on_policy",
        "seeds": [piece.seed for piece in sorted(found)],
        "first_steps": FIRST_STEPS,
        "steps": STEPS,
        "prompts": PROMPTS,
        "table": table,
    }


def table(result: dict[str, Any]) -> list[str]:
    """Each way's scores as a table: the mean, and every seed."""
    seeds = ", ".join(map(str, result["seeds"]))
    lines = [
        f"| {result['steps']} steps more, mean (seeds {seeds}) | reverse KL, own text "
        "| reverse KL, held-out text | KL, held-out text | NLL | tokens written |",
        "|-|-|-|-|-|-|",
    ]
    for row in result["table"]:
        cells = [_cell(row[metric], "{:.3f}") for metric in METRICS[:-1]]
        length = f"{row['completion_length']['mean']:.0f}"
        lines.append(f"| {' | '.join([row['name'], *cells, length])} |")
    return lines


def _cell(values: dict[str, Any], form: str) -> str:
    return f"{form.format(values['mean'])} ({', '.join(map(form.format, values['seeds']))})"


def run_here(piece: Piece) -> Scores:
    """Train and score every way of a seed in this process."""
    with tempfile.TemporaryDirectory() as folder:
        common = (
            *("--seed", str(piece.seed), "--baseline", "false", "--max_completion_length", "96"),
            *("--eval_steps", "1000000", "--max_eval_rows", "48"),
        )
        first = Path(folder) / "first"
        steps = ("--max_steps", str(FIRST_STEPS), "--output_dir", str(first))
        distill(load_config("quickstart-instruct", (*common, *steps)))
        second = (
            *common,
            *("--student", str(first / "final"), "--student_init", "pretrained"),
            *("--learning_rate", SECOND_RATE, "--max_steps", str(STEPS)),
        )
        scores = {"before": _scores(load_config("quickstart-instruct", second))}
        for i, (name, words) in enumerate(WAYS.items()):
            out = Path(folder) / f"way-{i}"
            keys = (*second, *words, "--output_dir", str(out))
            distill(load_config("quickstart-instruct", keys))
            keys = (*second, "--student", str(out / "final"))
            scores[name] = _scores(load_config("quickstart-instruct", keys))
        return scores


def _scores(config: DistillConfig) -> dict[str, float]:
    """The scores of ``config.student`` against ``config.teacher``."""
    with quiet_libraries():
        inputs = load_inputs(config)
        precision = Precision(config, inputs.device)
        student = build_student(config, load_student(config), inputs.valid_vocab, precision)
    assert inputs.teacher is not None
    prompts = load_prompts(config, inputs.tokenizer, PROMPTS, held_out=True)
    sampling = Sampling.of(config, inputs.train_rows.end_tokens)
    some = [prompts[i] for i in range(len(prompts))]
    own = score_rollouts(student, inputs.teacher, some, sampling, seed=0, rows=16)

    sums = dict.fromkeys(("reverse_kl", "forward_kl"), 0.0)
    nll, targets = 0.0, 0
    for batch in inputs.eval_batches(config):
        target = inputs.teacher.forward(batch)
        for divergence in ("reverse_kl", "forward_kl"):
            objective = Objective(ce_weight=1.0, kd_weight=1.0, divergence=divergence)
            with eval_no_grad(student):
                out = student(batch, target, objective, batch.counts).distill
            sums[divergence] += float(out.kd)
        nll += float(out.ce)
        targets += batch.num_targets
    return {
        "reverse_kl_own_text": own["reverse_kl"],
        "reverse_kl_held_out": sums["reverse_kl"] / targets,
        "kl": sums["forward_kl"] / targets,
        "nll": nll / targets,
        "completion_length": own["completion_length"],
    }


if __name__ == "__main__":
    print(json.dumps(run_here(Piece(*json.loads(sys.argv[1])))))
