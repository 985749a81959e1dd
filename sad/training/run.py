"""``distill(config)``: the whole run, from a configuration to a student, metrics and a report.

    sad distill quickstart                          on any machine, in minutes
    sad distill FILE.yaml --output_dir runs/one     on one GPU
    sad distill FILE.yaml --output_dir runs/one --resume_from_checkpoint auto

How one student is trained is in ``sad.training.trainer``. Around it, here: load text and teacher,
score the teacher, train the baseline without it, train the student, write results and report.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sad_kernels._torch.gemm import onednn_products
from transformers import AutoModelForCausalLM

from sad.checkpoint.disk_space import require_space
from sad.checkpoint.run_directory import RunDirectory
from sad.checkpoint.store import Checkpoint
from sad.config.schema import DistillConfig, ce_only
from sad.environment import StopSignals, memory_now, quiet_libraries, seed_everything
from sad.errors import OutputError, SadError, StoppedError
from sad.models.load import load_student
from sad.models.memory_plan import plan
from sad.models.preflight import check_model, check_models_and_loss
from sad.models.stop_tokens import add_stop_tokens
from sad.optim.precision import Precision
from sad.report.header import memory_line, run_header
from sad.report.log import RunLog
from sad.report.page import write_report
from sad.report.results import BASELINE_NAME, format_results
from sad.training.evaluate import evaluate_teacher
from sad.training.inputs import RunInputs, load_inputs
from sad.training.meters import ResultRow, result_row
from sad.training.student import build_structural, build_student
from sad.training.trainer import MakeScheduler, Trainer

SAMPLES, SAMPLE_PROMPT, SAMPLE_TOKENS = 2, 48, 64
"""How many texts the finished student writes for the report, and their lengths in tokens (less if
it knows fewer positions)."""


@dataclass(frozen=True)
class RunResult:
    """Result of ``distill``: the run's directory, and what its last evaluation measured.

    ``metrics`` are those of the last evaluation under their logged names (``eval_ema/nll``, ...);
    ``results`` the rows of the printed table: teacher, baseline if there is one, student.
    """

    run_dir: Path
    metrics: dict[str, float]
    results: list[ResultRow]

    @property
    def best(self) -> Path:
        """The student with the best held-out score, as ``save_pretrained`` wrote it."""
        return self.run_dir / "best"

    @property
    def final(self) -> Path:
        """The student at the end of training."""
        return self.run_dir / "final"

    @property
    def report(self) -> Path:
        return self.run_dir / "report.html"


def distill(config: DistillConfig, *, make_scheduler: MakeScheduler | None = None) -> RunResult:
    """Train ``config.student`` against ``config.teacher`` on ``config.data``.

    Everything is written under ``config.output_dir``. Raises a subclass of ``SadError``, whose
    ``exit_code`` says what kind of failure it is; ``StoppedError`` after a signal, with all state
    saved. Whatever happens, ``status.json`` in the run directory tells.

    Where oneDNN computes a CPU's fp32 products faster than MKL, it is chosen for the process until
    the run is over; models and losses gain alike.

    ``make_scheduler`` builds a learning-rate scheduler from the optimizer in place of the
    configured one. It is stepped once per ``scheduler_unit``; one that waits for a metric, or ends
    before the run, is a ``UsageError``.
    """
    run_dir = RunDirectory(config.output_dir)
    checkpoint = run_dir.claim(config, report=print)
    try:
        with StopSignals() as signals, onednn_products():
            result = _distill(config, run_dir, checkpoint, signals, make_scheduler)
    except BaseException as error:
        _write_failure(run_dir, error)
        raise
    run_dir.write_status("finished")
    return result


def _distill(
    config: DistillConfig,
    run_dir: RunDirectory,
    checkpoint: Checkpoint | None,
    signals: StopSignals,
    make_scheduler: MakeScheduler | None,
) -> RunResult:
    require_space(config)  # before anything that takes time
    inputs = load_inputs(config)
    results: list[ResultRow] = []
    metrics: dict[str, float] = {}

    if inputs.eval_teacher is not None:
        teacher, row = inputs.eval_teacher.model, inputs.eval_rows.batch([0]).input_ids
        check_model(teacher, row, packing=config.packing)  # before it is relied on
        metrics = evaluate_teacher(inputs.eval_teacher, inputs.eval_batches(config))
        results.append(result_row("teacher", teacher, metrics, "eval_teacher"))

    if config.baseline:
        _require_structural(config, inputs)  # the baseline takes its time, and has none
        results.append(_train_baseline(config, run_dir, inputs, signals, make_scheduler))

    distilled = config.kd_weight or config.structural_weights
    name = "student, distilled" if distilled else "student"
    trainer = _train(config, run_dir, checkpoint, inputs, signals, make_scheduler, name=name)
    results.append(_student_row(name, trainer))
    metrics |= trainer.counters.metrics

    record = {"results": results, "samples": _samples(run_dir.final, inputs)}
    run_dir.write_run(run_dir.read_run() | record)
    report = write_report(run_dir.path)
    print(f"\n{format_results(results)}\n\nreport   {report}\nstudent  {run_dir.final}")
    return RunResult(run_dir.path, metrics, results)


def _train_baseline(
    config: DistillConfig,
    run_dir: RunDirectory,
    inputs: RunInputs,
    signals: StopSignals,
    make_scheduler: MakeScheduler | None,
) -> ResultRow:
    """Train the same student from the same weights on the same batches, without its teacher.

    It is a run of its own in ``baseline/``: resumed by itself, and not repeated once finished.
    """
    config_ce_only = replace(
        config,
        **ce_only(),
        baseline=False,
        output_dir=str(run_dir.baseline),
        resume_from_checkpoint=config.resume_from_checkpoint and "auto",
    )
    name = BASELINE_NAME
    baseline = RunDirectory(run_dir.baseline)
    if config.resume_from_checkpoint and baseline.read_status().get("state") == "finished":
        return baseline.read_run()["results"][0]
    checkpoint = baseline.claim(config_ce_only, report=print)
    trainer = _train(
        config_ce_only, baseline, checkpoint, inputs, signals, make_scheduler, name=name
    )
    row = _student_row(name, trainer)
    baseline.write_run(baseline.read_run() | {"results": [row]})
    baseline.write_status("finished")
    return row


def _train(
    config: DistillConfig,
    run_dir: RunDirectory,
    checkpoint: Checkpoint | None,
    inputs: RunInputs,
    signals: StopSignals,
    make_scheduler: MakeScheduler | None,
    *,
    name: str,
) -> Trainer:
    """Train one student from the start or from ``checkpoint`` to the end, and write ``final/``."""
    # Seeded again, so that a student does not depend on whether a baseline was trained before it.
    seed_everything(config.seed, deterministic=config.deterministic)
    precision = Precision(config, inputs.device)
    teacher = None if inputs.teacher is None else inputs.teacher.model
    student = build_student(config, load_student(config), inputs.valid_vocab, precision, teacher)
    stop_tokens = add_stop_tokens(student.model, inputs.train_rows.end_tokens, inputs.tokenizer)
    checks = check_models_and_loss(
        student.model,
        teacher,
        inputs.eval_rows.batch([0]).input_ids,
        config.objective(),
        valid_vocab=inputs.valid_vocab,
        packing=config.packing,
        compute_dtype=precision.compute_dtype,
        chunk_bytes=config.chunk_bytes,
        impl=config.impl,
    )
    trainer = Trainer(config, student, inputs, precision, run_dir, make_scheduler)
    with RunLog(
        run_dir.path,
        total_batches=trainer.run_length.micro_batches,
        initial=0 if checkpoint is None else checkpoint.micro_step,
        report_to=config.report_to,
        name=name,
    ) as log:
        if checkpoint is not None:
            trainer.restore(checkpoint, log.warning)
            checkpoint.tensors.clear()  # copied: the files need not stay mapped
        header = run_header(
            name,
            config,
            run_length=trainer.run_length,
            precision=precision,
            student=student.model,
            teacher=teacher,
            vocabulary=inputs.valid_vocab,
            train_rows=inputs.train_rows,
            eval_rows=inputs.eval_rows,
            checks=checks,
            checkpoint=None if checkpoint is None else checkpoint.path,
        )
        if stop_tokens:
            header.append(("stop tokens", stop_tokens))
        log.header(header)
        run_dir.write_run({"header": [list(line) for line in header]})
        run_dir.write_status("running")
        trainer.train(log, signals)
        trainer.export(run_dir.final)
        memory = memory_now(inputs.device)
        predicted = plan(config, len(inputs.eval_rows)).total
        log.message(f"memory: {memory_line(predicted, inputs.rss_before, memory)}")
        log.end({"micro_step": trainer.counters.micro_step, **memory})
    return trainer


def _require_structural(config: DistillConfig, inputs: RunInputs) -> None:
    """Raise ``UnfitError`` if the models cannot supply a structural loss of the configuration."""
    if config.structural_weights and inputs.teacher is not None:
        build_structural(config, load_student(config), inputs.teacher.model)


def _student_row(name: str, trainer: Trainer) -> ResultRow:
    prefix = trainer.metric_for_best.partition("/")[0]
    label = f"{name} (EMA)" if prefix == "eval_ema" else name
    return result_row(label, trainer.student.model, trainer.counters.metrics, prefix)


@torch.no_grad()
def _samples(final: Path, inputs: RunInputs) -> list[dict[str, str]]:
    """Texts that the exported student generates from the beginning of held-out rows.

    It is loaded as a user would load it: an export that cannot be used fails the run here.
    """
    with quiet_libraries():
        model: Any = AutoModelForCausalLM.from_pretrained(final)
    model.to(inputs.device).eval()
    tokenizer = inputs.tokenizer
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    length = int(min(SAMPLE_PROMPT, inputs.eval_rows.max_length, positions // 2))
    samples = []
    for row in range(min(SAMPLES, len(inputs.eval_rows))):
        prompt = inputs.eval_rows.batch([row]).input_ids[:, :length].to(inputs.device)
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=int(min(SAMPLE_TOKENS, positions - length)),
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.decode(prompt[0]), tokenizer.decode(output[0, length:])
        samples.append({"prompt": texts[0], "text": texts[1], "model": final.name})
    return samples


def _write_failure(run_dir: RunDirectory, error: BaseException) -> None:
    """Write exit code and message to ``status.json``; a failure to do so is ignored."""
    code = error.exit_code if isinstance(error, SadError) else 1
    state = "stopped" if isinstance(error, StoppedError) else "failed"
    message = str(error) or type(error).__name__
    with suppress(OutputError):
        run_dir.write_status(state, code=code, message=message)
