"""The header of a run: models, data, length, objective and machine, shown before it trains."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sad.config.identity import config_hash
from sad.config.schema import DistillConfig
from sad.data.rows import PackedRows
from sad.distributed.world import mesh_sizes
from sad.environment import library_versions
from sad.models.cached_targets import CachedTargets
from sad.models.memory_plan import plan
from sad.models.quantization import parameter_count, quantized_count, stored_quantization
from sad.models.rank_plan import Cluster, plan_ranks
from sad.optim.precision import Precision
from sad.optim.schedule import RunLength, describe

Line = tuple[str, str]
"""Label and text."""


def run_header(
    name: str,
    config: DistillConfig,
    *,
    run_length: RunLength,
    precision: Precision,
    student: nn.Module,
    teacher: str | None,
    vocabulary: int,
    train_rows: PackedRows,
    eval_rows: PackedRows,
    checks: dict[str, float],
    predicted: int | None,
    checkpoint: Path | None,
    tokenizer_notes: Sequence[str] = (),
    resumption_notes: Sequence[str] = (),
    balance_note: str = "",
    on_policy: str = "",
    world_size: int = 1,
) -> list[Line]:
    """What the run is about to do, for a person to check before leaving it alone.

    ``teacher`` says in words what it is, ``checks`` are the errors that the self-checks measured,
    by name, and ``predicted`` is the peak of memory in bytes, where there is a prediction.
    ``checkpoint`` is the one that the run goes on from, None for a run from the start.
    ``tokenizer_notes`` say in what the models' own tokenizers differ from the run's,
    ``resumption_notes`` what a change of sizes means, ``balance_note`` what becomes of the
    auxiliary loss of a mixture-of-experts student, and ``on_policy`` what the student writes.
    """
    lines = [
        ("run", f"{name} -> {config.output_dir}"),
        ("student", model_line(_student_source(config), student)),
        *_untrained_parts(student),
    ]
    if teacher is not None:
        # A teacher without a weight in the loss is still what evaluations compare with.
        role = "" if config.is_distilled else ", for evaluation only"
        lines.append(("teacher", teacher + role))
    lines += [
        ("vocabulary", f"{vocabulary:,} ids"),
        *((("tokenizer", "\n".join(tokenizer_notes)),) if tokenizer_notes else ()),
        ("text", _text_line(train_rows) + f"; held out {_text_line(eval_rows)}"),
        ("length", describe(config, run_length)),
        ("batch", _batch_line(config, run_length, world_size)),
        ("objective", _objective_line(config)),
        *((("on-policy", on_policy),) if on_policy else ()),
        *((("experts", balance_note),) if balance_note else ()),
        *((("routing", config.routing.mode),) if config.routing.mode != "teacher" else ()),
        ("precision", _precision_line(precision)),
    ]
    if checks:
        lines.append(("self-check", ", ".join(f"{k} {v:.1e}" for k, v in checks.items())))
    lines += [
        *((("processes", _processes_line(config, world_size)),) if world_size > 1 else ()),
        ("memory", _memory_forecast(predicted)),
        ("machine", _machine_line(precision.device)),
        ("versions", ", ".join(f"{k} {v}" for k, v in library_versions().items())),
        ("config", config_hash(config)[:12]),
    ]
    if checkpoint is not None:
        lines.append(("resumed", "\n".join((f"from {checkpoint}", *resumption_notes))))
    return lines


def predicted_peak(
    config: DistillConfig,
    eval_rows: int,
    world_size: int = 1,
    cached: CachedTargets | None = None,
) -> int | None:
    """The peak of one process, in bytes, that ``sad plan`` predicts; None where it fails, which
    ends no run. ``cached`` are the sizes of a ``teacher_cache``."""
    try:
        if world_size > 1:
            return plan_ranks(config, Cluster(world_size), cached=cached).total
        return plan(config, eval_rows, cached).total
    except Exception:  # for whatever reason: the run needs no estimate
        return None


def _memory_forecast(predicted: int | None) -> str:
    if predicted is None:
        return "not predicted: the estimate fails for these models, which harms nothing else"
    return f"{predicted / 2**20:,.0f} MiB predicted at peak"


def memory_line(predicted: int | None, rss_before: int, now: dict[str, int]) -> str:
    """Peak memory beside the prediction of ``sad plan``, both in MiB; arguments are in bytes.

    ``now`` is what ``sad.environment.memory_now`` returns, ``rss_before`` the resident memory
    before anything was loaded, which no prediction covers; without a prediction the peak stands
    alone. On a GPU, a prediction more than 20 % off the peak is a warning; on a CPU the peak may be
    that of an earlier run of the process.
    """
    mib = 2**20
    if "cuda_peak_bytes" in now:
        peak, total = now["cuda_peak_bytes"], now["cuda_total_bytes"]
        line = f"peak {peak / mib:,.0f} MiB of {total / mib:,.0f}"
        if predicted is None:
            return line
        off = abs(peak - predicted) > 0.2 * peak
        warning = "; warning: more than 20 % off" if off else ""
        return f"{line}, predicted {predicted / mib:,.0f}{warning}"
    peak = now.get("rss_peak_bytes", now["rss_bytes"])
    run = peak - rss_before
    line = (
        f"peak {peak / mib:,.0f} MiB, of which {rss_before / mib:,.0f} before anything was loaded "
        f"and {run / mib:,.0f} by the run"
    )
    if predicted is None:
        return line
    return f"{line}, predicted {predicted / mib:,.0f}"


def _student_source(config: DistillConfig) -> str:
    if config.student_init != "layers":
        return config.student
    return f"{layers_phrase(config)} of {config.teacher}"


def layers_phrase(config: DistillConfig) -> str:
    """How ``student_layers`` reads in a sentence: ``4 layers``, ``layers 0, 3, 5``."""
    layers = config.student_layers
    if isinstance(layers, int):
        return f"{layers} layers"
    return f"layers {', '.join(map(str, layers or ()))}"


def model_line(source: str, model: nn.Module) -> str:
    """A model in words: where it comes from, its parameters and their dtype."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"{source}, {parameter_count(model):,} parameters in {dtype}"


def quantized_part(config: DistillConfig, teacher: Any) -> str:
    """How many of the teacher's parameters are quantized, and how; nothing where none are."""
    kind = config.teacher_quantization or stored_quantization(teacher.config)
    if kind is None:
        return ""
    count = quantized_count(teacher)
    return f", {count:,} of them in {kind}" if count else f", quantized ({kind})"


def _untrained_parts(model: Any) -> list[Line]:
    """What of a multimodal model text does not pass through: images would, and there are none."""
    inner = model.base_model
    language_model = getattr(inner, "language_model", None)
    if not isinstance(language_model, nn.Module):
        return []
    parts = {name: part for name, part in inner.named_children() if part is not language_model}
    count = sum(p.numel() for part in parts.values() for p in part.parameters())
    if not count:
        return []
    return [("not trained", f"{', '.join(parts)} ({count:,} parameters), which text does not use")]


def _text_line(rows: PackedRows) -> str:
    targets = int(rows.num_targets.sum())
    line = (
        f"{rows.num_documents:,} documents, {rows.num_tokens:,} tokens, {targets:,} targets in "
        f"{len(rows):,} rows, {rows.padding:.1%} padding"
    )
    return f"{line} ({rows.left_out})" if rows.left_out else line


def _batch_line(config: DistillConfig, run_length: RunLength, world_size: int) -> str:
    rows, windows = run_length.batch_size, config.gradient_accumulation_steps
    tokens = rows * windows * config.max_length
    among = f", {-(-rows // world_size)} on each process" if world_size > 1 else ""
    return (
        f"{rows} rows x {config.max_length} tokens x {windows} micro-batches = {tokens:,} tokens"
        f"{among}"
    )


def _processes_line(config: DistillConfig, world_size: int) -> str:
    replicas, shards = mesh_sizes(world_size, config.dp_replicate_size, config.dp_shard_size)
    split = "whole on each" if shards == 1 else f"split over {shards}"
    copies = f", {replicas} replicas" if replicas > 1 else ""
    return f"{world_size}, each model {split}{copies}"


def _objective_line(config: DistillConfig) -> str:
    objective = config.objective()
    smoothing, z_loss = objective.label_smoothing, objective.z_loss
    parts = []
    if objective.ce_weight:
        smoothed = f" (smoothing {smoothing:g})" if smoothing else ""
        parts.append(f"{objective.ce_weight:g} CE{smoothed}")
    if objective.kd_weight:
        at = f" at T = {objective.temperature:g}"
        taid = f" to a mixture, {config.taid.start:g} to {config.taid.end:g} teacher"
        target = taid if config.taid.enabled else ""
        parts.append(f"{objective.kd_weight:g} {objective.divergence}{target}{at}")
    if z_loss:
        parts.append(f"{z_loss:g} lse^2")
    parts += [f"{weight:g} {name}" for name, weight in config.structural_weights.items()]
    return " + ".join(parts) or "nothing"


def _precision_line(precision: Precision) -> str:
    # What is stored, and what products are computed in.
    names = [
        str(d).removeprefix("torch.") for d in (precision.param_dtype, precision.compute_dtype)
    ]
    masters = ", fp32 master weights" if precision.masters is not None else ""
    # bf16 has 8 bits of mantissa: without fp32 masters, small updates round to nothing.
    lossy = precision.param_dtype == torch.bfloat16 and precision.masters is None
    warning = "; warning: updates below half a bf16 step are lost" if lossy else ""
    return f"parameters {names[0]}, compute {names[1]}{masters}{warning}"


def _machine_line(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
