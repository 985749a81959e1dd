"""Float64 reference results on the same rounded inputs, and the errors of a peer against them.

Losses come from ``sad_kernels.reference``, chunk by chunk of rows; ``g``, the gradient of a chunk's
logits, comes from autograd, and ``dhidden = g W`` and ``dweight = g^T h`` from it. A gradient of
logits is kept for up to ``SAMPLE`` evenly spaced rows, the first and the last included: a whole one
would take memory that the peers need.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from sad_kernels import TeacherLogits, TeacherTopK, reference
from sad_kernels.objective import Teacher
from torch import Tensor

from bench.problems.inputs import IGNORED, Hidden, Logits, Parameters

ELEMENTS = 1 << 25  # of a chunk of logits
SAMPLE = 1024
LIMIT = 0.05
"""The relative error above which a result counts as wrong, and its time as nothing."""


@dataclass
class Truth:
    """The float64 loss and gradients, times the upstream gradient.

    ``rows`` are the rows that a gradient of logits is kept for.
    """

    loss: float
    gradients: dict[str, Tensor]
    rows: Tensor | None = None

    def errors(self, loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, float]:
        """Errors of the loss in nats and relative; of each gradient ``|g - truth| / |truth|``."""
        value = float(loss.detach())
        off = abs(value - self.loss)
        found = {"loss": off, "loss_relative": off / max(abs(self.loss), 1e-30)}
        for name, expected in self.gradients.items():
            gradient = leaves[name].grad
            if gradient is None or not _finite(gradient):
                found[name] = math.nan
            else:
                rows = gradient if self.rows is None else gradient[self.rows]
                found[name] = relative_error(rows, expected)
        return found


def is_wrong(errors: dict[str, float]) -> bool:
    """Whether any relative error exceeds ``LIMIT`` or is not a number."""
    values = [value for name, value in errors.items() if name != "loss"]
    return not all(value <= LIMIT for value in values)  # NaN is not


def truth_of(problem: Logits | Hidden) -> Truth:
    return _of_logits(problem) if isinstance(problem, Logits) else _of_hidden(problem)


def _of_logits(problem: Logits) -> Truth:
    case, keep = problem.case, problem.labels != IGNORED
    step = max(1, -(-(case.N - 1) // (SAMPLE - 1)))
    rows = torch.arange(0, case.N, step, device=keep.device)
    if rows[-1] != case.N - 1:
        rows = torch.cat((rows, rows.new_tensor([case.N - 1])))
    loss = 0.0
    for i in _chunks(case.N, case.V):
        with torch.no_grad():
            loss += float(_loss(problem, problem.logits[i].double(), i))
    gradients = []
    for i in rows.split(max(1, ELEMENTS // case.V)):
        s = problem.logits.detach()[i].double().requires_grad_()
        _loss(problem, s, i).backward(problem.upstream.double())
        assert s.grad is not None
        gradients.append(_stored(s.grad, problem.logits))
    return Truth(loss, {"dlogits": torch.cat(gradients)}, rows)


def _of_hidden(problem: Hidden) -> Truth:
    case = problem.case
    weight, needs_teacher = problem.weight.detach().double(), case.kind != "ce"
    teacher_weight = problem.cut_teacher_weight.double() if needs_teacher else None
    dhidden = torch.zeros_like(problem.hidden, dtype=torch.float64)
    dweight, loss = torch.zeros_like(weight), 0.0
    for i in _chunks(case.N, case.V):
        hidden = problem.hidden.detach()[i].double()
        s = (hidden @ weight.T).requires_grad_()
        t = (
            None
            if teacher_weight is None
            else problem.teacher_hidden[i].double() @ teacher_weight.T
        )
        out = _loss(problem, s, i, t)
        out.backward(problem.upstream.double())
        assert s.grad is not None
        loss += float(out.detach())
        dhidden[i] = s.grad @ weight
        dweight.addmm_(s.grad.T, hidden)
    gradients = {"dhidden": dhidden, "dweight": dweight}
    return Truth(loss, {name: _stored(g, problem.weight) for name, g in gradients.items()})


def _loss(
    problem: Logits | Hidden, s: Tensor, rows: slice | Tensor, t: Tensor | None = None
) -> Tensor:
    """The contribution of ``rows`` to the loss."""
    case, labels = problem.case, problem.labels[rows]
    teacher: Teacher | None = None
    if t is not None:
        teacher = TeacherLogits(t)
    elif isinstance(problem, Logits) and problem.ids is not None:
        assert problem.log_probs is not None
        teacher = TeacherTopK(problem.ids[rows], problem.log_probs[rows])
    elif isinstance(problem, Logits) and problem.teacher_logits is not None:
        teacher = TeacherLogits(problem.teacher_logits[rows].double())
    return reference.distill_loss(s, labels, teacher, case.objective, num_items=case.valid).loss


def _chunks(N: int, V: int) -> Iterator[slice]:
    size = max(1, ELEMENTS // V)
    return (slice(i, min(i + size, N)) for i in range(0, N, size))


def _stored(gradient: Tensor, leaf: Tensor) -> Tensor:
    """The gradient in fp32 where the results are 16-bit: half the memory, an error of 6e-8."""
    return gradient.float() if leaf.element_size() == 2 else gradient


def relative_error(x: Tensor, expected: Tensor, start: Tensor | None = None) -> float:
    """``|x - expected| / |expected - start|`` over all elements, ``start`` being 0 if absent."""
    off = size = 0.0
    rows = max(1, ELEMENTS * x.shape[0] // max(1, x.numel()))
    for i in range(0, x.shape[0], rows):
        wanted = expected[i : i + rows].double()
        origin = 0.0 if start is None else start[i : i + rows].double()
        off += float((x[i : i + rows].double() - wanted).square().sum())
        size += float((wanted - origin).square().sum())
    return math.sqrt(off / size) if size else math.sqrt(off)


def _finite(x: Tensor) -> bool:
    """Whether all elements are finite, by their sum: a mask would need as much memory as ``x``."""
    return bool(x.sum(dtype=torch.float32).isfinite())


def ema_error(problem: Parameters, shadows: list[Tensor]) -> float:
    """Error of one update from ``problem.start``, relative to the distance that shadows move."""
    decay, worst = problem.case.decay, 0.0
    for i, (shadow, param) in enumerate(zip(shadows, problem.params, strict=True)):
        start = problem.start(i).double()
        expected = decay * start + (1 - decay) * param.double()
        worst = max(worst, relative_error(shadow.flatten(), expected, start))
    return worst
