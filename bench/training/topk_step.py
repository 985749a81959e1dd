"""A training step towards K ids of a teacher per token, against the same step without a teacher.

Model, batches and optimizer are the quickstart's. The step comes without a teacher (``ce``),
towards a ``TeacherTopK`` with ``tail="zero"`` in memory, K distinct ids that were drawn beforehand
and are in no order (``top_k``), and towards the records of a cache that ``sad cache-teacher``
wrote, read and decoded in every step (``cached``). All take turns in one process, and so do, for
what the loss itself costs, the losses of random hidden states with their backward. The result is
the median over rounds of the ratio within a round: with one thread of the processor's time, with
all threads of the clock's, since those that wait for others count as busy. Nothing else may run
then.
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

from sad.config.cache_options import CacheOptions
from sad.config.load import load_config
from sad.data.batch import Batch
from sad.models.heads import split_head, with_valid_vocab
from sad.models.load import load_student
from sad.optim.optimizer import clip_gradients
from sad.optim.precision import Precision
from sad.optim.schedule import planned_length
from sad.training.batches import TrainBatches
from sad.training.cache_teacher import cache_teacher
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
                    {"what": what, "threads": threads} | _compare(calls, rounds)
                    for what, calls in ways.items()
                ]
        finally:
            torch.set_num_threads(everything)
    return {"case": "top-k step", "K": K, "tail": "zero", "steps_per_round": steps, "rows": rows}


Calls = dict[str, Callable[[], None]]
"""What is compared with the first of them, "ce"."""


def _compare(calls: Calls, rounds: int) -> dict[str, Any]:
    """All in turns, every second round in reverse, one round before the first to warm up."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        order = list(calls.items())
        for name, call in order if round_ % 2 else reversed(order):
            start = clock()
            call()
            seconds[name].append(clock() - start)
    ratios = {
        name: [a / b for a, b in zip(values[1:], seconds["ce"][1:], strict=True)]
        for name, values in seconds.items()
        if name != "ce"
    }
    return {
        "seconds": {name: statistics.median(values[1:]) for name, values in seconds.items()},
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "ratio_per_round": ratios,
    }


Targets = Callable[[int, Batch], TeacherTopK | None]


def _steps(folder: str, steps: int) -> Calls:
    """Steps of the quickstart's student: forward, backward, clipping, a fused AdamW and the average
    of the weights. The cache is made in ``folder``, and read from it by every call."""
    words = {"output_dir": folder, "baseline": False, "max_steps": steps, "warmup_steps": 0}
    given = [word for key, value in words.items() for word in (f"--{key}", str(value).lower())]
    config = load_config("quickstart", given)
    inputs = load_inputs(config)
    precision = Precision(config, inputs.device)
    length = planned_length(config, len(inputs.train_rows), 1)
    order = TrainBatches(config, inputs.train_rows, length, inputs.device)
    batches = [order.batch(step) for step in range(length.micro_batches)]
    assert inputs.frozen_teacher is not None
    in_memory = []
    for batch in batches:
        (target,) = inputs.frozen_teacher.forward(batch).targets
        with torch.no_grad():
            in_memory.append(drawn(target.head(target.hidden)))
    cache = f"{folder}/cache"
    cache_teacher(config, CacheOptions(output=cache, top_k=K))
    reader = load_inputs(replace(config, teacher_cache=cache)).teacher
    assert reader is not None

    def read(batch: Batch) -> TeacherTopK:
        (target,) = reader.forward(batch).targets
        assert isinstance(target, TeacherTopK)
        return target

    def steps_of(target_of: Targets, objective: Objective) -> Callable[[], None]:
        model = load_student(config)
        student: StudentWithLoss = build_student(config, model, inputs.valid_vocab, precision)
        student.train()
        parameters = list(student.parameters())
        optimizer = torch.optim.AdamW(parameters, config.learning_rate, fused=True)
        average = precision.build_ema(student.model)

        def run() -> None:
            for number, batch in enumerate(batches):
                target = target_of(number, batch)
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
                norm = clip_gradients(parameters, config.max_grad_norm)
                optimizer.step()
                average.update(norm.isfinite())
                optimizer.zero_grad(set_to_none=True)

        return run

    joint = config.objective()
    alone = replace(joint, kd_weight=0.0)
    return {
        "ce": steps_of(lambda number, batch: None, alone),
        "top_k": steps_of(lambda number, batch: in_memory[number], joint),
        "cached": steps_of(lambda number, batch: read(batch), joint),
    }


def _losses(N: int, D: int, V: int) -> Calls:
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
