"""``sad selftest``: compare the kernels with their reference definitions on this machine (1 s).

Every public function of ``sad_kernels`` runs on small random inputs, with ignored rows that hold
NaN, columns past the vocabulary, softcap, bias and logit scale. Its values and gradients are
compared with ``sad_kernels.reference`` in float64 on the same inputs. This finds a broken
installation, driver or compiler; it is no substitute for the test suite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Literal, NamedTuple, assert_never, get_args

import sad_kernels
import torch
from sad_kernels import Head, Objective, TeacherHidden, TeacherLogits, TeacherTopK, reference
from sad_kernels.objective import Divergence
from torch import Tensor

from sad.errors import UnfitError

ROWS, VOCAB, VALID, D_STUDENT, D_TEACHER, TOP_K = 6, 101, 97, 24, 32, 5
DTYPES = (torch.float32, torch.bfloat16)

TeacherKind = Literal["logits", "top-k"]
Values = dict[str, Tensor]
Operation = Callable[..., Values]
"""(module that has the function, inputs, impl) -> results by name; ``loss`` is differentiated."""


class Check(NamedTuple):
    """A public function with the options that it is called with."""

    name: str
    run: Operation
    options: dict[str, Any]
    exact: bool = False  # copies bits without arithmetic: any difference is a failure


class Outcome(NamedTuple):
    """The error of a check against its reference, and the error it may have."""

    name: str
    error: float  # largest over all results, relative to each result's largest entry
    budget: float
    worst: str  # the result with this error

    @property
    def passed(self) -> bool:
        return self.error <= self.budget  # False for NaN

    def __str__(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        return (
            f"{verdict} {self.name:<62} error {self.error:.1e} of {self.budget:.1e} ({self.worst})"
        )


def run() -> int:
    """Print one line per check; return 0, or raise ``UnfitError`` if any failed."""
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    outcomes = []
    for outcome in _outcomes(device):
        print(outcome)
        outcomes.append(outcome)
    failed = [outcome for outcome in outcomes if not outcome.passed]
    if failed:
        raise UnfitError(
            f"kernels must agree with their definitions on this machine, got {len(failed)} of "
            f"{len(outcomes)} checks outside their budget, first {failed[0].name}; train with "
            "--impl torch if those checks passed, and report the output of `sad --version`"
        )
    seconds = time.perf_counter() - start
    print(f"{len(outcomes)} checks passed on {device} in {seconds:.1f} s")
    return 0


def _outcomes(device: torch.device) -> Iterator[Outcome]:
    for impl in ("auto",) if device.type == "cpu" else ("auto", "torch"):
        for dtype in DTYPES:
            inputs = _inputs(dtype, device)
            for check in _checks():
                yield _compare(check, inputs, dtype, impl)


def _checks() -> Iterator[Check]:
    yield Check("cross_entropy", _cross_entropy, {})
    yield Check("linear_cross_entropy", _linear_cross_entropy, {})
    for divergence in get_args(Divergence):
        yield Check("kl_div", _kl_div, {"divergence": divergence})
        yield Check("linear_distill_loss", _linear_distill_loss, {"divergence": divergence})
    for kind in get_args(TeacherKind):
        yield Check("distill_loss", _distill_loss, {"teacher": kind})
    yield Check("ema_update_", _ema_update, {})
    yield Check("ema_swap_", _ema_swap, {}, exact=True)


def _compare(check: Check, inputs: Values, dtype: torch.dtype, impl: str) -> Outcome:
    # 32 roundings of fp32 arithmetic, and two of the dtype that gradients are returned in.
    budget = 32 * torch.finfo(torch.float32).eps + 2 * torch.finfo(dtype).eps
    ours = _results(check, sad_kernels, inputs, impl=impl)
    oracle = _results(check, reference, inputs if check.exact else _in_float64(inputs))
    errors = {name: _relative_error(ours[name], value) for name, value in oracle.items()}
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    words = [check.name, *check.options.values(), str(dtype).removeprefix("torch."), impl]
    return Outcome(" ".join(words), errors[worst], 0.0 if check.exact else budget, worst)


def _results(check: Check, functions: ModuleType, inputs: Values, **how: str) -> Values:
    """The operation's results and the gradients of its loss, by name."""
    # Clones: the EMA operations write to their inputs.
    leaves = {k: v.clone() for k, v in inputs.items()}
    for name in ("logits", "hidden", "weight", "bias"):
        leaves[name].requires_grad_()
    results = check.run(functions, leaves, **check.options, **how)
    if "loss" in results:
        results["loss"].backward()
        grads = {f"d{k}": v.grad for k, v in leaves.items() if v.grad is not None}
        results = {name: value.detach() for name, value in results.items()} | grads
    return results


def _in_float64(inputs: Values) -> Values:
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def _relative_error(ours: Tensor, oracle: Tensor) -> float:
    if torch.equal(ours, oracle):
        return 0.0
    scale = oracle.double().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((ours.double() - oracle.double()).abs().max() / scale)


def _inputs(dtype: torch.dtype, device: torch.device) -> Values:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(*shape, generator=draw)).to(kind)

    # Drawn on the CPU, so that every device gets the same numbers.
    labels = torch.randint(0, VALID, (ROWS,), generator=draw)
    labels[1] = -100
    top = normal(ROWS, VALID, kind=torch.float32).log_softmax(-1).topk(TOP_K)
    inputs = {
        "labels": labels,
        "logits": normal(ROWS, VOCAB, scale=3.0),
        "t_logits": normal(ROWS, VOCAB, scale=3.0),
        "hidden": normal(ROWS, D_STUDENT),
        "weight": normal(VOCAB, D_STUDENT, scale=0.5),
        "bias": normal(VOCAB),
        "t_hidden": normal(ROWS, D_TEACHER),
        "t_weight": normal(VOCAB, D_TEACHER, scale=0.5),
        "top_ids": top.indices,
        "top_log_probs": top.values,
        "shadow": normal(ROWS, VOCAB, kind=torch.float32),
        "param": normal(ROWS, VOCAB),
    }
    for name in ("logits", "t_logits", "hidden", "t_hidden"):
        inputs[name][1] = float("nan")  # the ignored row may hold anything
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _cross_entropy(functions: ModuleType, x: Values, **how: str) -> Values:
    loss = functions.cross_entropy(
        x["logits"],
        x["labels"],
        label_smoothing=0.1,
        z_loss=1e-3,
        softcap=10.0,
        valid_vocab=VALID,
        **how,
    )
    return {"loss": loss}


def _linear_cross_entropy(functions: ModuleType, x: Values, **how: str) -> Values:
    loss = functions.linear_cross_entropy(
        x["hidden"],
        x["weight"],
        x["labels"],
        bias=x["bias"],
        label_smoothing=0.1,
        z_loss=1e-3,
        softcap=10.0,
        logit_scale=0.7,
        valid_vocab=VALID,
        **how,
    )
    return {"loss": loss}


def _kl_div(functions: ModuleType, x: Values, *, divergence: str, **how: str) -> Values:
    loss = functions.kl_div(
        x["logits"],
        x["t_logits"],
        labels=x["labels"],
        temperature=2.0,
        divergence=divergence,
        beta=0.3,
        valid_vocab=VALID,
        **how,
    )
    return {"loss": loss}


def _distill_loss(functions: ModuleType, x: Values, *, teacher: TeacherKind, **how: str) -> Values:
    match teacher:
        case "logits":
            target = TeacherLogits(x["t_logits"][:, :VALID])
        case "top-k":
            target = TeacherTopK(x["top_ids"], x["top_log_probs"])
        case _:
            assert_never(teacher)
    objective = Objective(ce_weight=0.3, kd_weight=0.7, label_smoothing=0.1, z_loss=1e-3)
    student = x["logits"][:, :VALID]
    return functions.distill_loss(student, x["labels"], target, objective, **how)._asdict()


def _linear_distill_loss(
    functions: ModuleType, x: Values, *, divergence: Any, **how: str
) -> Values:
    objective = Objective(
        ce_weight=0.3,
        kd_weight=0.7,
        label_smoothing=0.1,
        z_loss=1e-3,
        temperature=2.0,
        divergence=divergence,
        beta=0.3,
    )
    head = Head(x["weight"], x["bias"], logit_scale=0.7, softcap=10.0, valid_vocab=VALID)
    teacher = TeacherHidden(x["t_hidden"], Head(x["t_weight"], valid_vocab=VALID))
    out = functions.linear_distill_loss(x["hidden"], head, x["labels"], teacher, objective, **how)
    return out._asdict()


def _ema_update(functions: ModuleType, x: Values, **how: str) -> Values:
    functions.ema_update_([x["shadow"]], [x["param"]], 0.9, **how)
    return {"shadow": x["shadow"]}


def _ema_swap(functions: ModuleType, x: Values, **how: str) -> Values:
    functions.ema_swap_([x["shadow"]], [x["param"]], **how)
    return {"shadow": x["shadow"], "param": x["param"]}
