"""What an operator is asked, but for its tensors, as an operator's schema can hold it.

Torch looks at each argument of an operator several times per call, so a few lists are faster than
one argument per number. Integers stay apart, because ``torch.compile`` may pass symbols for them;
for floats it never does: an operator compiles anew for each new weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from sad_kernels._task import Task
from sad_kernels.objective import Objective

Packed = tuple[list[int], list[float], str]


class Request(NamedTuple):
    """A task, and how products become logits on either side."""

    task: Task
    scale: float = 1.0
    softcap: float | None = None
    teacher_scale: float = 1.0
    teacher_softcap: float | None = None


def pack(request: Request) -> Packed:
    task, o = request.task, request.task.objective
    caps = request.softcap or 0.0, request.teacher_softcap or 0.0
    numbers = (
        o.ce_weight, o.kd_weight, o.label_smoothing, o.z_loss, o.temperature, o.beta,
        o.teacher_share, request.scale, request.teacher_scale, *caps,
    )  # fmt: skip
    words = f"{o.divergence} {o.scale_t2} {task.classes} {task.diagnostics}"
    return [task.vocab, task.ignore_index], [float(x) for x in numbers], words


def unpack(integers: Sequence[int], numbers: Sequence[float], words: str) -> Request:
    return _unpack(tuple(integers), tuple(numbers), words)


@lru_cache(maxsize=64)
def _unpack(integers: tuple[int, ...], numbers: tuple[float, ...], words: str) -> Request:
    ce_weight, kd_weight, label_smoothing, z_loss, temperature, beta, teacher_share, *rest = numbers
    scale, teacher_scale, softcap, teacher_softcap = rest
    divergence, *flags = words.split(" ")
    scale_t2, classes, diagnostics = (flag == "True" for flag in flags)
    how: dict[str, Any] = {"divergence": divergence, "scale_t2": scale_t2}
    objective = Objective(
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        temperature=temperature,
        beta=beta,
        teacher_share=teacher_share,
        **how,
    )
    vocab, ignore_index = integers
    return Request(
        task=Task(objective, vocab, ignore_index, classes, diagnostics),
        scale=scale,
        softcap=softcap or None,
        teacher_scale=teacher_scale,
        teacher_softcap=teacher_softcap or None,
    )
