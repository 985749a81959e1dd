"""``sad eval``: evaluate the best student of a run again, from the files in its directory."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from sad_kernels._torch.gemm import onednn_products

from sad.checkpoint.run_directory import RunDirectory, is_whole_export
from sad.config.load import load_config
from sad.errors import UsageError
from sad.models.adapters import ADAPTER_CONFIG, load_adapters
from sad.models.load import load_student
from sad.optim.precision import Precision
from sad.training.evaluate import evaluate_student, require_finite_score
from sad.training.inputs import load_inputs
from sad.training.meters import ResultRow, result_row
from sad.training.student import build_student
from sad.training.teacher_score import score_teacher


@onednn_products()  # as in the run, so that its scores come out again
def evaluate_run(
    run_dir: str | Path,
    *,
    trust_remote_code_student: bool = False,
    trust_remote_code_teacher: bool = False,
) -> list[ResultRow]:
    """Evaluate the best student of a finished or stopped run again, from its run directory.

    Student and tokenizer come from ``best/``, as their users load them; text and teacher are those
    of the run's configuration, whose ``trust_remote_code_*`` do not count: a directory that came
    from somebody else must not decide that its own code runs. Returns rows of the result table:
    the teacher, if there is one, and the student. Raises ``UsageError`` for a directory that holds
    no scored student, and ``UnfitError`` for a score that is not finite.
    """
    run = RunDirectory(run_dir)
    if not (run.best / "sad.json").exists():
        raise UsageError(
            f"RUN_DIR must hold a scored student, got {run.path}, "
            f"{'without best/' if run.path.is_dir() else 'which does not exist'}; let "
            "`sad distill` reach its first evaluation"
        )
    if not is_whole_export(run.best):
        raise UsageError(
            f"{run.best} must hold what was exported, got other files or bytes than its sad.json "
            "names; restore it, or let `sad distill` write it again"
        )
    config = load_config(run.path / "config.yaml")
    config = replace(
        config,
        tokenizer=str(run.best),
        output_dir=str(run.path),  # it may have been moved: text is read without the run's own
        trust_remote_code_student=trust_remote_code_student,
        trust_remote_code_teacher=trust_remote_code_teacher,
    )
    adapters = (run.best / ADAPTER_CONFIG).exists()
    if not adapters:  # best/ is a whole model, adapters merged
        whole: dict[str, Any] = {"peft": {}, "merge_adapters": False}
        whole |= {"student_init": "pretrained", "student_layers": None}
        config = replace(config, student=str(run.best), **whole)
    inputs = load_inputs(config, lambda text: print(text, file=sys.stderr, flush=True))
    _, rows = score_teacher(config, inputs)
    model = load_student(config)
    if adapters:
        load_adapters(model, run.best)
    precision = Precision(config, inputs.device)
    student = build_student(
        config, model, inputs.valid_vocab, precision, comparison=inputs.comparison
    )
    scores = evaluate_student(
        student, inputs.eval_teacher, inputs.eval_batches(config), {"eval": nullcontext}
    )
    require_finite_score(scores, "eval", "the student")
    rows.append(result_row("student, best", model, scores, "eval"))
    return rows
