"""A training step towards a top-k teacher in memory, against the same step without a teacher.

What a cache of K ids and log-weights per token costs once it is loaded: model, batches and
optimizer are the quickstart's, the target is a ``TeacherTopK`` with ``tail="zero"`` whose ids were
drawn beforehand, K distinct ones in no order. Both steps take turns in one process, and so do, for
what the loss itself costs, the losses of random hidden states with their backward. The result is
the median over rounds of the ratio within a round, of the processor's time, with one thread and
with all.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from sad_kernels import Head, Objective, TeacherTopK, linear_distill_loss
from torch import Tensor

from sad.config.load import load_config
from sad.models.heads import split_head, with_valid_vocab
from sad.models.load import load_student
from sad.optim.precision import Precision
from sad.training.inputs import load_inputs
from sad.training.student import StudentWithLoss, build_student

K = 64
LOSSES = ((2048, 64, 4096), (512, 256, 32768))
"""Tokens, width and vocabulary at which the loss is measured by itself; the first is a step's."""


def measure(rounds: int = 15, steps: int = 1) -> dict[str, Any]:
    """Seconds of a step and of a loss, with and without the teacher, and their ratios."""
    everything = torch.get_num_threads()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        ways = {"step": _steps(folder, steps)}
    ways |= {f"loss N={N} D={D} V={V}": _losses(N, D, V) for N, D, V in LOSSES}
    try:
        for threads in sorted({1, everything}):
            torch.set_num_threads(threads)
            rows += [
                {"what": what, "threads": threads} | _compare(pair, rounds)
                for what, pair in ways.items()
            ]
    finally:
        torch.set_num_threads(everything)
    return {"case": "top-k step", "K": K, "tail": "zero", "steps_per_round": steps, "rows": rows}


Pair = dict[str, Callable[[], None]]


def _compare(pair: Pair, rounds: int) -> dict[str, Any]:
    """Both in turns, every second round in reverse, one round before the first to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in pair}
    for round_ in range(rounds + 1):
        order = list(pair.items())
        for name, call in order if round_ % 2 else reversed(order):
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    ratios = [a / b for a, b in zip(seconds["top_k"][1:], seconds["ce"][1:], strict=True)]
    return {
        "cpu_seconds": {name: statistics.median(values[1:]) for name, values in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_per_round": ratios,
    }


def _steps(folder: str, steps: int) -> Pair:
    """Steps of the quickstart's student: forward, backward and a fused AdamW."""
    config = load_config("quickstart", ("--output_dir", folder, "--baseline", "false"))
    inputs = load_inputs(config)
    precision = Precision(config, inputs.device)
    size = config.global_batch_size
    assert size is not None
    batches = [inputs.train_rows.batch(range(size * i, size * (i + 1))) for i in range(steps)]
    assert inputs.frozen_teacher is not None
    targets = []
    for batch in batches:
        (target,) = inputs.frozen_teacher.forward(batch).targets
        with torch.no_grad():
            targets.append(drawn(target.head(target.hidden)))

    def steps_of(target_of: list[TeacherTopK | None], objective: Objective) -> Callable[[], None]:
        model = load_student(config)
        student: StudentWithLoss = build_student(config, model, inputs.valid_vocab, precision)
        student.train()
        optimizer = torch.optim.AdamW(student.parameters(), config.learning_rate, fused=True)

        def run() -> None:
            for batch, target in zip(batches, target_of, strict=True):
                _, head = split_head(student.model)
                out = linear_distill_loss(
                    student.hidden(batch),
                    with_valid_vocab(head, inputs.valid_vocab),
                    batch.labels,
                    target,
                    objective,
                    num_items=max(batch.counts.targets, 1),
                )
                out.loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return run

    joint = config.objective()
    alone = replace(joint, kd_weight=0.0)
    return {"ce": steps_of([None] * steps, alone), "top_k": steps_of([*targets], joint)}


def _losses(N: int, D: int, V: int) -> Pair:
    """``linear_distill_loss`` of random hidden states, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).requires_grad_()
    weight = torch.randn(V, D, generator=generator).mul_(D**-0.5).requires_grad_()
    labels = torch.randint(V, (N,), generator=generator)
    target = drawn(2 * torch.randn(N, V, generator=generator))

    def loss_of(target: TeacherTopK | None, objective: Objective) -> Callable[[], None]:
        def run() -> None:
            hidden.grad = weight.grad = None
            linear_distill_loss(hidden, Head(weight), labels, target, objective).loss.backward()

        return run

    joint = Objective(ce_weight=0.1, kd_weight=0.9)
    alone = replace(joint, kd_weight=0.0)
    return {"ce": loss_of(None, alone), "top_k": loss_of(target, joint)}


def drawn(logits: Tensor) -> TeacherTopK:  # [..., V]
    """K distinct ids per row, drawn by their probability, and their log-probabilities."""
    generator = torch.Generator(logits.device).manual_seed(0)
    noise = torch.empty_like(logits).exponential_(generator=generator).log_()
    ids = (logits - noise).topk(K).indices
    return TeacherTopK(ids, logits.log_softmax(-1).gather(-1, ids), "zero")
