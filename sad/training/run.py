"""``distill(config)``: the whole run, from a configuration to a student, metrics and a report.

    sad distill quickstart                          on any machine, in minutes
    sad distill FILE.yaml --output_dir runs/one     on one GPU
    sad distill FILE.yaml --output_dir runs/one --resume_from_checkpoint auto

How one student is trained is in ``sad.training.trainer``. Around it, here: load text and teacher,
score the teacher, train the baseline without it, train the student, write results and report.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sad_kernels._torch.gemm import onednn_products
from transformers import PreTrainedModel

from sad.checkpoint.disk_space import require_space
from sad.checkpoint.run_directory import RunDirectory, is_whole_export
from sad.checkpoint.store import Checkpoint
from sad.config.identity import trajectory_changes
from sad.config.load import load_config
from sad.config.schema import DistillConfig, ce_only, config_to_dict
from sad.distributed.world import World, lost_ranks_explained, use_own_device, whole_world
from sad.environment import (
    StopSignals,
    library_versions,
    memory_now,
    resolve_device,
    seed_everything,
)
from sad.errors import OutputError, SadError, StoppedError, UsageError, with_type
from sad.models.load import export_dtype, load_student
from sad.models.preflight import check_model, check_models_and_loss, known_positions
from sad.models.stop_tokens import add_stop_tokens
from sad.optim.precision import Precision
from sad.report.header import memory_line, predicted_peak, run_header
from sad.report.log import RunLog, SilentLog
from sad.report.model_card import push_to_hub
from sad.report.page import write_report
from sad.report.results import BASELINE_NAME, format_results
from sad.teachers.sharded import ShardedTeacher
from sad.training.inputs import RunInputs, load_inputs
from sad.training.machine import check_machine
from sad.training.meters import ResultRow, result_row
from sad.training.ranks import (
    SharedRunDirectory,
    check_ranks,
    load_sharded_student,
    run_within,
    shard_student,
    sharded_config,
    shared_keys,
    with_sharded_teacher,
)
from sad.training.rehearsal import needs_rehearsal, rehearse
from sad.training.resume import (
    LENGTH,
    Resumption,
    ResumptionRefusedError,
    plan_resumption,
)
from sad.training.samples import write_samples
from sad.training.student import build_student
from sad.training.teacher_score import describe_teacher, planned_sizes, score_teacher
from sad.training.trainer import MakeScheduler, Trainer


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
    use_own_device()
    check_machine(config)
    with whole_world(
        resolve_device(config.device).type,
        timeout_seconds=config.ddp_timeout,
        replicas=config.dp_replicate_size,
        shard_size=config.dp_shard_size,
    ) as world:
        check_ranks(config, world)
        world.same(lambda: shared_keys(config), "the configuration")
        world.same(library_versions, "the versions of libraries")
        run_dir = RunDirectory(config.output_dir)
        if world.size > 1:
            run_dir = SharedRunDirectory(config.output_dir, world)
        with run_dir.claimed(config, report=print) as checkpoint:
            try:
                with StopSignals() as signals, onednn_products(), lost_ranks_explained(world):
                    result = _distill(config, run_dir, checkpoint, signals, make_scheduler, world)
            except ResumptionRefusedError:  # the run is what it was
                raise
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
    world: World,
) -> RunResult:
    _say = partial(_announce, world)
    world.from_main(lambda: require_space(config))  # before anything that takes time
    inputs = load_inputs(config, _say, world)
    world.same(lambda: inputs.identity(config) | {"config": None}, "text, tokenizer and teacher")
    resumption = _resumption(checkpoint, config, inputs, make_scheduler)
    baseline = _plan_baseline(config, run_dir, inputs, make_scheduler) if config.baseline else None
    if resumption is not None:  # both can go on
        run_dir.write_config(config)
    results: list[ResultRow] = []
    metrics: dict[str, float] = {}

    if inputs.teacher is not None:
        if inputs.frozen_teacher is not None:
            row = inputs.frozen_teacher.own_tokens(inputs.eval_rows.batch([0])).input_ids
            check = partial(check_model, inputs.frozen_teacher.model, row, packing=config.packing)
            inputs.frozen_teacher.within(check)  # before it is relied on
        if needs_rehearsal(config):
            _say("trying every loss on one row")
            rehearse(config, inputs)
        inputs = with_sharded_teacher(inputs)
        metrics, rows = score_teacher(config, inputs, _say)
        results += rows

    if baseline is not None:
        results.append(_train_baseline(baseline, run_dir, inputs, signals, make_scheduler))

    name = "student, distilled" if config.is_distilled else "student"
    title = f"2 of 2: {name}" if config.baseline else name
    trainer, samples = _train(
        config, run_dir, resumption, inputs, signals, make_scheduler, title=title
    )
    results.append(_student_row(name, trainer))
    metrics |= trainer.counters.metrics

    record = {"results": results, "samples": samples, "scored": inputs.scored(config)}
    try:
        run_dir.write_run(run_dir.read_run() | record)
    except OutputError as error:  # the table is printed, the student is there
        print(f"warning: {error}", flush=True)
    if world.main:
        report = _try_report(run_dir)
        print(f"\n{format_results(results)}\n\n{report}\nstudent  {run_dir.final}")
        if config.push_to_hub:
            print(push_to_hub(config, run_dir.best))
    return RunResult(run_dir.path, metrics, results)


def _announce(world: World, text: str) -> None:
    """A line for whoever waits, before there is a log; the place to stop before the wait."""
    world.stop_if_requested(text)
    if world.main:
        print(text, flush=True)


def _try_report(run_dir: RunDirectory) -> str:
    """Write the report, and say where it is; without one the student is as good."""
    try:
        return f"report   {write_report(run_dir.path)}"
    except Exception as error:
        return f"warning: the report could not be written, got {with_type(error)}"


class _Baseline(NamedTuple):
    config: DistillConfig
    run_dir: RunDirectory
    finished: bool
    claimed: bool  # else it has not begun, and its directory is made when it does
    resumption: Resumption | None


def _plan_baseline(
    config: DistillConfig,
    run_dir: RunDirectory,
    inputs: RunInputs,
    make_scheduler: MakeScheduler | None,
) -> _Baseline:
    """Whether the baseline of a run is done, goes on or begins; what cannot go on is refused."""
    config_ce_only = replace(
        config,
        **ce_only(),
        baseline=False,
        output_dir=str(run_dir.baseline),
        resume_from_checkpoint=config.resume_from_checkpoint and "auto",
    )
    baseline, world = run_dir.baseline_run, inputs.world
    begun = config.resume_from_checkpoint is not None
    begun = begun and world.from_main(baseline.path.exists)
    if begun and world.from_main(lambda: _finished_as_long(baseline, config_ce_only)):
        return _Baseline(config_ce_only, baseline, True, True, None)
    checkpoint = baseline.claim(config_ce_only, report=print) if begun else None
    resumption = _resumption(checkpoint, config_ce_only, inputs, make_scheduler)
    if resumption is not None:
        baseline.write_config(config_ce_only)
    return _Baseline(config_ce_only, baseline, False, begun, resumption)


def _train_baseline(
    plan: _Baseline,
    run_dir: RunDirectory,
    inputs: RunInputs,
    signals: StopSignals,
    make_scheduler: MakeScheduler | None,
) -> ResultRow:
    """Train the same student from the same weights on the same batches, without its teacher.

    It is a run of its own in ``baseline/``: resumed by itself, and not repeated once finished.
    """
    config, baseline, name = plan.config, plan.run_dir, BASELINE_NAME
    if plan.finished:
        (row,) = inputs.world.from_main(lambda: baseline.read_run()["results"])
        return row
    if not plan.claimed:
        baseline.claim(config, report=print)
    title = f"1 of 2: {name}"
    try:
        trainer, samples = _train(
            config, baseline, plan.resumption, inputs, signals, make_scheduler, title=title
        )
    except BaseException as error:
        _write_failure(baseline, error)
        newest = baseline.read_status().get("checkpoint")
        if newest:  # where the whole run goes on from
            run_dir.write_status("running", checkpoint=f"baseline/checkpoints/{newest}")
        raise
    row = _student_row(name, trainer)
    baseline.write_run(baseline.read_run() | {"results": [row], "samples": samples})
    baseline.write_status("finished")
    return row


def _finished_as_long(baseline: RunDirectory, config: DistillConfig) -> bool:
    """Whether a baseline is done, for as many steps as it would be trained now."""
    rows = baseline.read_run().get("results")
    has_row = isinstance(rows, list) and len(rows) == 1 and isinstance(rows[0], dict)
    exports = (baseline.best, baseline.final)
    if baseline.read_status().get("state") != "finished" or not has_row:
        return False
    if not all(is_whole_export(folder) for folder in exports):
        return False
    try:
        before = config_to_dict(load_config(baseline.path / "config.yaml"))
    except UsageError:  # damaged: its checkpoints know better
        return False
    return not any(key in LENGTH for key, _, _ in trajectory_changes(before, config))


def _resumption(
    checkpoint: Checkpoint | None,
    config: DistillConfig,
    inputs: RunInputs,
    make_scheduler: MakeScheduler | None,
) -> Resumption | None:
    """Where a run goes on from its checkpoint, if it has one.

    Before anything that takes time: what cannot go on is refused here.
    """
    if checkpoint is None:
        return None
    return plan_resumption(
        checkpoint,
        config,
        inputs.train_rows,
        builds_scheduler=make_scheduler is None,
        world_size=inputs.world.size,
    )


class _Trained(NamedTuple):
    trainer: Trainer
    samples: list[dict[str, str]]


def _train(
    config: DistillConfig,
    run_dir: RunDirectory,
    resumption: Resumption | None,
    inputs: RunInputs,
    signals: StopSignals,
    make_scheduler: MakeScheduler | None,
    *,
    title: str,
) -> _Trained:
    """Train one student from the start or from a checkpoint to the end, and write ``final/``."""
    world = inputs.world
    _announce(world, f"loading the student {config.student}")
    # Seeded again, so that a student does not depend on whether a baseline was trained before it.
    seed_everything(config.seed, deterministic=config.deterministic)
    sharded = world.size > 1
    loaded = sharded_config(config) if sharded else config
    precision = Precision(loaded, inputs.device, sharded=sharded)
    teacher: Any = None if inputs.teacher is None else inputs.teacher.model
    frozen = inputs.frozen_teacher
    student = load_sharded_student(config, inputs, precision, partial(_announce, world))
    split = student is not None
    student = student or build_student(
        config, load_student(loaded), inputs.valid_vocab, precision, teacher, inputs.comparison
    )
    stop_tokens = add_stop_tokens(student.model, inputs.train_rows.end_tokens, inputs.tokenizer)
    objective = config.objective()
    # Targets from a cache, or of another vocabulary: there is nothing to compare with.
    if frozen is None or inputs.comparison is not None:
        frozen, objective = None, replace(objective, ce_weight=1.0, kd_weight=0.0)
    answers = isinstance(frozen, ShardedTeacher) or (frozen is not None and frozen.is_mapped)
    check = partial(
        check_models_and_loss,
        student.model,
        None if answers or frozen is None else frozen.model,  # checked before
        inputs.eval_rows.batch([0]).input_ids,
        objective,
        valid_vocab=inputs.valid_vocab,
        packing=config.packing,
        compute_dtype=precision.compute_dtype,
        autocast=precision.autocast,
        chunk_bytes=config.chunk_bytes,
        impl=config.impl,
        logits=config.loss_logits,
        run_teacher=frozen.answer if answers and frozen is not None else None,
    )
    checks = run_within(student, check)
    world.from_main(lambda: run_dir.require_exportable(student.model, inputs.tokenizer))
    if config.torch_compile:  # after the checks, whose rows have other shapes
        rows = range(min(config.rows_per_process(), len(inputs.train_rows)))
        packed = inputs.train_rows.batch(list(rows)).to(inputs.device)
        checks["student/compiled"] = student.train().compile_layers(packed)
    if sharded and not split:
        shard_student(student, config, precision, world)
    trainer = Trainer(
        config,
        student,
        inputs,
        precision,
        run_dir,
        make_scheduler,
        export_dtype=export_dtype(config),
    )
    with _open_log(config, run_dir, trainer, resumption, title) as log:
        if resumption is not None:
            trainer.restore(resumption, log.warning)
            resumption.checkpoint.tensors.clear()  # copied: the files need not stay mapped
        predicted = None  # one rank says it for all
        if world.main:
            cached = planned_sizes(inputs.teacher)
            predicted = predicted_peak(config, len(inputs.eval_rows), world.size, cached)
        header = run_header(
            title,
            config,
            run_length=trainer.run_length,
            precision=precision,
            student=student.model,
            teacher=describe_teacher(config, inputs),
            vocabulary=inputs.valid_vocab,
            train_rows=inputs.train_rows,
            eval_rows=inputs.eval_rows,
            checks=checks,
            predicted=predicted,
            checkpoint=None if resumption is None else resumption.checkpoint.path,
            resumption_notes=() if resumption is None else resumption.notes,
            tokenizer_notes=inputs.tokenizer_notes,
            on_policy=trainer.batches.describe(trainer.counters.micro_step),
            balance_note=student.balance_note,
            world_size=world.size,
        )
        if stop_tokens:
            header.append(("stop tokens", stop_tokens))
        rows = trainer.run_length.batch_size
        log.header(header, rows=(rows, rows) if resumption is None else resumption.rows)
        _warn_of_new_positions(student.model, inputs, log)
        run_dir.write_run({"header": [list(line) for line in header]})
        newest = resumption.checkpoint.path.name if resumption else ""
        run_dir.write_status("running", checkpoint=newest)
        trainer.train(log, signals)
        _export_final(trainer, run_dir, log)
        memory = memory_now(inputs.device)  # of training: samples come after it
        log.message(f"memory: {memory_line(predicted, inputs.rss_before, memory)}")
        samples = world.from_main(
            partial(
                write_samples,
                run_dir.final,
                inputs,
                trust_remote_code=config.trust_remote_code_student,
                warn=log.warning,
            )
        )
        log.end({"micro_step": trainer.counters.micro_step, **memory})
    return _Trained(trainer, samples)


def _open_log(
    config: DistillConfig,
    run_dir: RunDirectory,
    trainer: Trainer,
    resumption: Resumption | None,
    title: str,
) -> RunLog:
    if not trainer.world.main:
        return SilentLog()
    return RunLog(
        run_dir.path,
        total_batches=trainer.run_length.micro_batches,
        initial=0 if resumption is None else resumption.micro_step,
        report_to=config.report_to,
        name=title,
    )


def _export_final(trainer: Trainer, run_dir: RunDirectory, log: RunLog) -> None:
    """Write ``final/``, in a second attempt if a disk refuses once; the state is saved by now."""
    try:
        trainer.export(run_dir.final)
    except OutputError as error:
        log.warning(f"{error}; trying once more")
        trainer.export(run_dir.final)


def _warn_of_new_positions(model: PreTrainedModel, inputs: RunInputs, log: RunLog) -> None:
    known, longest = known_positions(model.config), inputs.train_rows.longest_segment
    if known is not None and longest > known:
        log.warning(
            f"rows hold documents of {longest} positions, and the student knows {known} "
            "(max_position_embeddings): it learns the others from this text alone"
        )


def _student_row(name: str, trainer: Trainer) -> ResultRow:
    prefix = trainer.metric_for_best.partition("/")[0]
    label = f"{name} (EMA)" if prefix == "eval_ema" else name
    return result_row(label, trainer.student.model, trainer.counters.metrics, prefix)


def _write_failure(run_dir: RunDirectory, error: BaseException) -> None:
    """Write exit code and message to ``status.json``; a failure to do so is ignored."""
    code = error.exit_code if isinstance(error, SadError) else 1
    state = "stopped" if isinstance(error, StoppedError) else "failed"
    message = str(error) or type(error).__name__
    with suppress(OutputError):
        run_dir.write_status(state, code=code, message=message)
