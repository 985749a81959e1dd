"""From options to a ``Problem`` that ``oracle.judge`` can judge, one function per public op.

Options that exclude each other are reconciled here, each with its reason: a class without
probability under label smoothing, a divergence that is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from sad_kernels import Head, Objective, TeacherHidden, TeacherLogits, TeacherTopK
from sad_kernels.objective import DIVERGENCES, Teacher
from torch import Generator, Tensor

from support.cases import (
    IGNORE_INDEX,
    Options,
    case_id,
    draw_head,
    draw_logits,
    generator_for,
    place,
    place_labels,
)
from support.oracle import Problem, scales_of

PLAIN: Options = {
    "distribution": "randn5",
    "N": 8,
    "V": 97,
    "D": 24,
    "cut": False,
    "ignore": "none",
    "label_dtype": torch.int64,
    "label_layout": "contiguous",
    "layout": "contiguous",
    "upstream": "one",
    "reduction": "mean",
    "label_smoothing": 0.0,
    "z_loss": 0.0,
    "softcap": None,
    "temperature": 2.0,
    "divergence": "forward_kl",
    "beta": 0.5,
    "scale_t2": True,
    "teacher": "logits",
    "teacher_dtype": None,
    "ce_weight": 0.5,
    "kd_weight": 0.7,
    "num_items": None,
    "bias": True,
    "logit_scale": 1.0,
    "weight_dtype": None,
    "wrt": "hidden,weight,bias",
}
"""Ordinary options, of which a test changes the few that it is about."""


def plain(op: str, dtype: torch.dtype, **options: Any) -> Problem:
    """One call of ``op`` with ordinary options but for those given."""
    unknown = options.keys() - PLAIN.keys() - {"teacher_share"}
    assert not unknown, unknown
    build = {
        "cross_entropy": cross_entropy_problem,
        "kl_div": kl_div_problem,
        "distill_loss": distill_loss_problem,
        "linear_cross_entropy": linear_cross_entropy_problem,
        "linear_distill_loss": linear_distill_loss_problem,
    }[op]
    joint = op in ("distill_loss", "linear_distill_loss")
    fixed = {"reduction": "mean"} if joint else {"num_items": None}
    return build(PLAIN | options | fixed, dtype)


class Rows:
    """What all calls share: which rows and columns count, the labels, the layout, the upstream."""

    def __init__(self, o: Options, y: Tensor, generator: Generator) -> None:
        self.options, self.generator = o, generator
        self.valid = valid_width(o)
        self.valid_vocab = self.valid if o["cut"] else None
        self.y = y.clone()
        match o["ignore"]:
            case "some":
                self.y[1::3] = IGNORE_INDEX
            case "first":
                self.y[0] = IGNORE_INDEX
            case "all":
                self.y[:] = IGNORE_INDEX
        self.keep = self.y != IGNORE_INDEX
        num_items = o.get("num_items")
        self.num_items = torch.tensor(29) if num_items == "tensor" else num_items

    def place(self, x: Tensor, dtype: torch.dtype, width: int | None = None) -> Tensor:
        """Rows [N, K] with poison in those that are ignored and in the columns up to ``width``."""
        x = F.pad(x, (0, (width or x.shape[-1]) - x.shape[-1]), value=math.nan)
        ignored = ~self.keep[:, None]
        poison = math.nan if x.is_floating_point() else torch.iinfo(dtype).max
        return place(x.masked_fill(ignored, poison), self.options["layout"], dtype)

    def labels(self, shape: torch.Size) -> Tensor:
        o = self.options
        return place_labels(self.y, o["label_layout"], o["label_dtype"], shape)

    def rounded(self, x: Tensor) -> Tensor:
        """A placed tensor as float64 [N, valid], poison replaced by 0."""
        x = x.reshape(len(self.y), -1)[:, : self.valid].double()
        return x.masked_fill(~self.keep[:, None], 0.0)

    def rounded_all(self, x: Tensor) -> Tensor:
        """The same with all columns."""
        x = x.reshape(len(self.y), -1).double()
        return x.masked_fill(~self.keep[:, None], 0.0)

    def problem(
        self,
        op: str,
        call: Callable[[Any, dict[str, Tensor]], Any],
        leaves: Mapping[str, Tensor],
        wrt: tuple[str, ...],
        objective: Objective,
        s: Tensor,  # [N, valid] as the loss sees them
        t: Tensor | None,
        s_magnitude: float = 1.0,
        t_magnitude: float = 1.0,
    ) -> Problem:
        reduction = self.options.get("reduction", "mean")
        shape = next(iter(leaves.values())).shape[:-1] if reduction == "none" else torch.Size()
        upstream = _upstream(self.options["upstream"], shape, self.generator)
        count = float(self.keep.sum()) if self.num_items is None else float(self.num_items)
        divisor = {"none": None, "sum": 1.0, "mean": count or 1.0}[reduction]
        past = torch.arange(self.options["V"]) >= self.valid
        return Problem(
            case=f"{op}[{case_id(self.options)}]",
            call=call,
            leaves=leaves,
            wrt=wrt,
            upstream=upstream,
            scales=scales_of(
                objective, s, t, self.keep, upstream.flatten(), divisor, s_magnitude, t_magnitude
            ),
            magnitude=max(s_magnitude, t_magnitude),
            zeros={
                "dlogits": ~self.keep[:, None] | past,
                "dhidden": ~self.keep,
                "dweight": past,
                "dbias": past[None],
            },
        )


def valid_width(o: Options) -> int:
    """``cut`` is False, True for three quarters of the width, or a width of its own."""
    V, cut = o["V"], o["cut"]
    if isinstance(cut, bool):
        return max(1, V - V // 4) if cut else V
    return cut


def _upstream(kind: str, shape: torch.Size, generator: Generator) -> Tensor:
    match kind:
        case "one":
            return torch.ones(shape)
        case "0.37":
            return torch.full(shape, 0.37)
        case "random":  # of both signs
            return torch.randn(shape, generator=generator)
        case "stride0":  # what .sum().backward() passes on
            return torch.tensor(0.7).expand(shape)
        case _:
            raise ValueError(kind)


# --- Problems ------------------------------------------------------------------------------------


def cross_entropy_problem(o: Options, dtype: torch.dtype) -> Problem:
    """One call of ``cross_entropy``."""
    g = generator_for("cross_entropy", o, dtype)
    s, _, y = draw_logits(o["distribution"], o["N"], valid_width(o), g, dtype)
    rows = Rows(o, y, g)
    logits = rows.place(s, dtype, o["V"])
    labels = rows.labels(logits.shape[:-1])
    # A class without probability makes the smoothed loss infinite; a cap gives it some.
    infinite = bool(s.isinf().any()) and not o["softcap"]
    smoothing = 0.0 if infinite else o["label_smoothing"]

    def call(ops: Any, x: dict[str, Tensor]) -> Tensor:
        return ops.cross_entropy(
            x["logits"],
            labels,
            label_smoothing=smoothing,
            z_loss=o["z_loss"],
            softcap=o["softcap"],
            valid_vocab=rows.valid_vocab,
            reduction=o["reduction"],
        )

    objective = Objective(
        ce_weight=1.0, kd_weight=0.0, label_smoothing=smoothing, z_loss=o["z_loss"]
    )
    s = capped(rows.rounded(logits), o["softcap"])
    return rows.problem("cross_entropy", call, {"logits": logits}, ("logits",), objective, s, None)


def kl_div_problem(o: Options, dtype: torch.dtype) -> Problem:
    """One call of ``kl_div``."""
    g = generator_for("kl_div", o, dtype)
    distribution = _finite(o["distribution"], o["divergence"])
    s, t, y = draw_logits(distribution, o["N"], valid_width(o), g, dtype)
    rows = Rows(o, y, g)
    student = rows.place(s, dtype, o["V"])
    teacher = rows.place(t, o["teacher_dtype"] or dtype, o["V"])
    labels = None if o["ignore"] == "none" else rows.labels(student.shape[:-1])
    kd = {name: o[name] for name in ("temperature", "divergence", "beta", "scale_t2")}

    def call(ops: Any, x: dict[str, Tensor]) -> Tensor:
        return ops.kl_div(
            x["logits"],
            x["teacher"],
            **kd,
            labels=labels,
            valid_vocab=rows.valid_vocab,
            reduction=o["reduction"],
        )

    leaves = {"logits": student, "teacher": teacher}
    s, t = rows.rounded(student), rows.rounded(teacher)
    return rows.problem("kl_div", call, leaves, ("logits",), Objective(**kd), s, t)


def distill_loss_problem(o: Options, dtype: torch.dtype) -> Problem:
    """One call of ``distill_loss``."""
    kind = o["teacher"]
    # Here only a dense teacher can say that the width is cut.
    o = o | {"cut": o["cut"] and kind in ("logits", "hidden")}
    g = generator_for("distill_loss", o, dtype)
    distribution = _finite(o["distribution"], o["divergence"])
    if distribution.startswith("inf_"):
        if kind in ("bucket", "zero"):
            distribution = "inf_both"  # a student that rules out an id of the teacher is infinite
    if kind == "hidden" and distribution.startswith(("inf_", "offset", "equal_")):
        # Computed logits are finite, cannot tell 1e4 from 1e4 + 1e-3, and may break ties.
        distribution = "randn5"
    infinite = DIVERGENCES[o["divergence"]].needs_full_support
    if infinite and (kind, distribution) == ("bucket", "spread300"):
        distribution = "randn5"  # a bucket below rounding is empty
    s, t, y = draw_logits(distribution, o["N"], valid_width(o), g, dtype)
    rows = Rows(o, y, g)
    objective = _joint_objective(o, finite=not s.isinf().any())
    logits = rows.place(s, dtype, o["V"])
    labels = rows.labels(logits.shape[:-1])
    teacher, teacher_leaves, t = _teacher(o, t, rows, dtype)

    def call(ops: Any, x: dict[str, Tensor]) -> Any:
        return ops.distill_loss(
            x["logits"], labels, teacher(x), objective, num_items=rows.num_items
        )

    leaves = {"logits": logits, **teacher_leaves}
    s = rows.rounded(logits)
    return rows.problem(
        "distill_loss", call, leaves, ("logits",), objective, s, t, 1.0, _computed(o, t)
    )


def linear_cross_entropy_problem(o: Options, dtype: torch.dtype) -> Problem:
    """One call of ``linear_cross_entropy``."""
    g = generator_for("linear_cross_entropy", o, dtype)
    leaves, rows, s, magnitude = _student_head(o, dtype, g)
    labels = rows.labels(leaves["hidden"].shape[:-1])

    def call(ops: Any, x: dict[str, Tensor]) -> Tensor:
        return ops.linear_cross_entropy(
            x["hidden"],
            x["weight"],
            labels,
            bias=x.get("bias"),
            label_smoothing=o["label_smoothing"],
            z_loss=o["z_loss"],
            softcap=o["softcap"],
            logit_scale=o["logit_scale"],
            valid_vocab=rows.valid_vocab,
            reduction=o["reduction"],
        )

    objective = Objective(
        ce_weight=1.0,
        kd_weight=0.0,
        label_smoothing=o["label_smoothing"],
        z_loss=o["z_loss"],
    )
    return rows.problem(
        "linear_cross_entropy", call, leaves, _wrt(o, leaves), objective, s, None, magnitude
    )


def linear_distill_loss_problem(o: Options, dtype: torch.dtype) -> Problem:
    """One call of ``linear_distill_loss``."""
    g = generator_for("linear_distill_loss", o, dtype)
    leaves, rows, s, magnitude = _student_head(o, dtype, g)
    labels = rows.labels(leaves["hidden"].shape[:-1])
    name, _, noise = o["distribution"].partition("+")
    t = torch.randn(s.shape, generator=g, dtype=s.dtype)
    t = {"same": s, "near": s * (1 + 0.03 * t)}.get(name, s + float(noise) * t if noise else 3 * t)
    teacher, teacher_leaves, t = _teacher(o, t, rows, dtype)
    objective = _joint_objective(o, finite=True)

    def call(ops: Any, x: dict[str, Tensor]) -> Any:
        head = _head(o, x, rows)
        return ops.linear_distill_loss(
            x["hidden"], head, labels, teacher(x), objective, num_items=rows.num_items
        )

    return rows.problem(
        "linear_distill_loss",
        call,
        leaves | teacher_leaves,
        _wrt(o, leaves),
        objective,
        s,
        t,
        magnitude,
        _computed(o, t),
    )


def _computed(o: Options, t: Tensor | None) -> float:
    """The magnitude of the teacher's logits where they are computed, from hidden states or as a
    mixture with the student's."""
    if t is None or (o["teacher"] != "hidden" and o.get("teacher_share", 1.0) == 1.0):
        return 1.0
    return max(1.0, float(t.where(t.isfinite(), 0).abs().max()))


def capped(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else softcap * (z / softcap).tanh()


def _finite(distribution: str, divergence: str) -> str:
    """-inf on one side alone can make the divergence infinite, which has its own tests."""
    weights = DIVERGENCES[divergence].kl_weights
    forward, reverse = (0.0, 0.0) if weights is None else weights(0.5)
    infinite = {"inf_student": forward > 0, "inf_teacher": reverse > 0}
    return "inf_both" if infinite.get(distribution) else distribution


def _joint_objective(o: Options, finite: bool) -> Objective:
    divergence = o["divergence"]
    if o["teacher"] == "zero" and DIVERGENCES[divergence].needs_full_support:
        divergence = "jsd"  # the other is infinite there, and refused
    return Objective(
        ce_weight=o["ce_weight"],
        kd_weight=o["kd_weight"] if o["teacher"] else 0.0,
        label_smoothing=o["label_smoothing"] if finite else 0.0,
        z_loss=o["z_loss"],
        temperature=o["temperature"],
        scale_t2=o["scale_t2"],
        divergence=divergence,
        beta=o["beta"],
        teacher_share=o.get("teacher_share", 1.0),
    )


def _teacher(
    o: Options, t: Tensor, rows: Rows, dtype: torch.dtype
) -> tuple[Callable[[dict[str, Tensor]], Teacher | None], dict[str, Tensor], Tensor | None]:
    """How to build a teacher with these logits from leaves, the leaves, and its rounded logits."""
    T, V = o["temperature"], o["V"]
    log_dtype = torch.promote_types(dtype, torch.float32)
    dtype = o["teacher_dtype"] or dtype
    match o["teacher"]:
        case None:
            return lambda _: None, {}, None
        case "logits":
            logits = rows.place(t, dtype, V)
            return (
                lambda x: TeacherLogits(x["teacher"], rows.valid_vocab),
                {"teacher": logits},
                rows.rounded(logits),
            )
        case "hidden":  # an orthogonal weight: hidden states that have just these logits
            noise = torch.randn(rows.valid, rows.valid, generator=rows.generator, dtype=t.dtype)
            weight, _ = torch.linalg.qr(noise)
            leaves = {
                "teacher_hidden": rows.place(t @ weight, dtype),
                "teacher_weight": _place_weight(weight, V, dtype),
            }
            hidden = rows.rounded_all(leaves["teacher_hidden"])
            return (
                lambda x: TeacherHidden(
                    x["teacher_hidden"], Head(x["teacher_weight"], valid_vocab=rows.valid_vocab)
                ),
                leaves,
                hidden @ leaves["teacher_weight"][: rows.valid].double().T,
            )
        case "bucket" | "zero":
            log_probs, ids = (t / T).log_softmax(-1).topk(min(5, rows.valid))
            if ids.shape[-1] > 2:  # the last of them is padding
                log_probs[:, -1], ids[:, -1] = -math.inf, -1
            placed_ids = rows.place(ids, torch.int32)
            leaves = {"log_probs": rows.place(log_probs, log_dtype)}
            return (
                lambda x: TeacherTopK(placed_ids, x["log_probs"], o["teacher"]),
                leaves,
                T * rows.rounded_all(leaves["log_probs"]),
            )
        case _:
            raise ValueError(o["teacher"])


def _student_head(
    o: Options, dtype: torch.dtype, g: Generator
) -> tuple[dict[str, Tensor], Rows, Tensor, float]:
    """Leaves, rows, the rounded leaves' logits [N, valid], and the largest logit before the cap."""
    hidden, weight, y = draw_head(o["distribution"], o["N"], valid_width(o), o["D"], g)
    rows = Rows(o, y, g)
    # A wider weight is rounded to the hidden states' dtype, so it holds values that survive this.
    weight_dtype = (o["weight_dtype"] if dtype.itemsize == 2 else None) or dtype
    leaves = {
        "hidden": rows.place(hidden, dtype),
        "weight": _place_weight(weight.to(dtype), o["V"], weight_dtype),
    }
    z = rows.rounded_all(leaves["hidden"]) @ leaves["weight"][: rows.valid].double().T
    if o["bias"]:
        bias = torch.randn(rows.valid, 1, generator=g, dtype=torch.float64).to(dtype)
        leaves["bias"] = _place_weight(bias, o["V"], weight_dtype)[:, 0]
        z = z + leaves["bias"][: rows.valid].double()
    z = o["logit_scale"] * z
    return leaves, rows, capped(z, o["softcap"]), max(1.0, float(z.abs().max()))


def _head(o: Options, x: dict[str, Tensor], rows: Rows) -> Head:
    return Head(x["weight"], x.get("bias"), o["logit_scale"], o["softcap"], rows.valid_vocab)


def _place_weight(weight: Tensor, V: int, dtype: torch.dtype) -> Tensor:
    """[valid, D] as the first rows of [V, D], the rest poison, between poisoned columns."""
    return place(F.pad(weight, (0, 0, 0, V - weight.shape[0]), value=math.nan), "padded", dtype)


def _wrt(o: Options, leaves: Mapping[str, Tensor]) -> tuple[str, ...]:
    return tuple(name for name in o["wrt"].split(",") if name in leaves)
