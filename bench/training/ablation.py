"""What each structural loss is worth: the quickstart's student with KD alone, one more, all.

Every arm of a group trains the same student from the same weights on the same batches for as many
steps; only the keys under its name differ. Scores are those of the best student as ``sad eval``
gives them: held-out text, against the teacher as it was loaded, whatever its gates learned
meanwhile. Differences are taken within a seed, between runs that share weights and batches, which
tells more than the means: from seed to seed these scatter by a tenth.

Three groups: a dense teacher; a mixture of experts that teaches the same dense student; and a
mixture of experts whose own first and last layers are the student, so that its routers have
something to follow. The mixture is trained first, by the recipe ``quickstart-moe-teacher``.

Runs use one thread each and go side by side: this measures what is learned, not how fast. What has
been measured is kept in a folder of the commit until all is, so that a measurement which was
interrupted goes on.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from sad.metrics import headline_metrics

Json = dict[str, Any]

SEEDS = (0, 1, 2)
KEPT_LAYERS = (0, -1)  # of the mixture, in the student cut from it
REHEARSED = ("--max_steps", "1", "--warmup_steps", "0", "--max_eval_rows", "2")

LOSSES = {
    "feature": ("--feature.weight", "0.1"),
    "attention": ("--attention.weight", "0.1"),
    "relations": ("--relations.weight", "0.1"),
    "layerwise": ("--layerwise.weight", "0.05"),
    "contrastive": ("--contrastive.weight", "0.05"),
}
ROUTING = ("--routing.learning_rate", "1e-3", "--routing.mode")


class Arm(NamedTuple):
    """A configuration: the recipe's with these words."""

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


def measure(
    seeds: Sequence[int] = SEEDS,
    run: Callable[[Arm, int | None, Path], Json] | None = None,
    teach: Callable[[Path], tuple[str, str]] | None = None,
    folder: Path | None = None,
) -> Json:
    """All arms over all seeds; ``run`` makes one run and ``teach`` the mixture and its student.

    Each arm is rehearsed for a step first: what cannot start shall fail in minutes.
    """
    run, teach = run or run_apart, teach or make_models
    folder = folder or Path(tempfile.gettempdir()) / f"sad-ablation-{_commit()}"
    folder.mkdir(exist_ok=True)
    moe_teacher, moe_student = teach(folder)
    chosen = arms(moe_teacher, moe_student)
    rehearsals = [arm._replace(words=(*arm.words, *REHEARSED)) for arm in chosen]
    jobs = [(arm, seed) for seed in seeds for arm in chosen]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for some in ([(arm, None) for arm in rehearsals], jobs):
            results = list(pool.map(lambda job: run(job[0], job[1], folder), some))
    shutil.rmtree(folder)
    scores = dict(zip(jobs, results, strict=True))
    rows = []
    for arm in chosen:
        base = next(other for other in chosen if other.group == arm.group)
        row: Json = {"group": arm.group, "arm": arm.name, "words": list(arm.words)}
        for metric in [shown.name for shown in headline_metrics()]:
            values = [scores[arm, seed]["student"][metric] for seed in seeds]
            changes = [
                value - scores[base, seed]["student"][metric]
                for value, seed in zip(values, seeds, strict=True)
            ]
            row[metric] = {"mean": statistics.fmean(values), "seeds": values, "change": changes}
        row["teacher_perplexity"] = scores[arm, seeds[0]]["teacher"]["perplexity"]
        rows.append(row)
    return {"case": "ablation", "recipe": "ablation", "seeds": list(seeds), "rows": rows}


def table(result: Json) -> list[str]:
    """Markdown: a line for each arm, changes against the first of its group."""
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
    """All of one sign are in bold: better or worse in every seed."""
    text = ", ".join(f"{value:+.{digits}f}" for value in values)
    same = all(value > 0 for value in values) or all(value < 0 for value in values)
    return f"**{text}**" if same else text


def run_apart(arm: Arm, seed: int | None, folder: Path) -> Json:
    """One run and its scores, in a process with one thread, or what it gave before.

    ``seed`` is None for a rehearsal.
    """
    name = re.sub(r"\W+", "-", f"{arm.group} {arm.name} {'rehearsal' if seed is None else seed}")
    kept = folder / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    shutil.rmtree(folder / name, ignore_errors=True)  # of a run that was interrupted
    words = ["--output_dir", str(folder / name), "--seed", str(seed or 0)]
    result = _python("bench.training.ablation", [*arm.words, *words])
    kept.write_text(json.dumps(result))
    return result


def _commit() -> str:
    from bench import record

    return record.run("")["commit"][:8] or "nocommit"


def make_models(folder: Path) -> tuple[str, str]:
    """The trained mixture of experts, and a student of some of its layers."""
    kept = folder / "models.json"
    if not kept.exists():
        teacher, student = folder / "moe-teacher", folder / "moe-student"
        shutil.rmtree(teacher, ignore_errors=True)
        made = _python("bench.training.ablation", ["--make", str(teacher), str(student)])
        kept.write_text(json.dumps(made))
    made, cut = json.loads(kept.read_text())
    return made, cut


def _python(module: str, words: list[str]) -> Any:
    threads = "2" if words[0] == "--make" else "1"
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
    )
    if done.returncode:
        raise RuntimeError(f"a run must finish, got {done.stderr[-2000:]} for {words}")
    result = json.loads(done.stdout.splitlines()[-1])
    print(" ".join(words), json.dumps(result), flush=True)
    return result


def _run_here(words: list[str]) -> Json:
    from sad.config.load import load_config
    from sad.training.rescore import evaluate_run
    from sad.training.run import distill

    run_dir = distill(load_config("ablation", words)).run_dir
    teacher, student = evaluate_run(run_dir)
    return {"teacher": teacher, "student": student}


def _make_here(teacher: str, student: str) -> tuple[str, str]:
    from transformers import AutoModelForCausalLM

    from sad.config.load import load_config
    from sad.data.tokenizers import load_tokenizer
    from sad.training.run import distill

    words = ["--output_dir", teacher]
    best = distill(load_config("quickstart-moe-teacher", words)).best
    model: Any = AutoModelForCausalLM.from_pretrained(best)
    layers = model.model.layers
    kept = [layers[i] for i in KEPT_LAYERS]
    for i, layer in enumerate(kept):
        layer.self_attn.layer_idx = i
    model.model.layers = type(layers)(kept)
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in KEPT_LAYERS]
    model.save_pretrained(student)
    load_tokenizer(str(best)).save_pretrained(student)
    return str(best), student


if __name__ == "__main__":
    if sys.argv[1] == "--make":
        print(json.dumps(_make_here(*sys.argv[2:])))
    else:
        print(json.dumps(_run_here(sys.argv[1:])))
