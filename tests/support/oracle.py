"""The one tolerance rule of this project: no test of a numerical result sets its own.

A result is judged row by row against two others computed from *the same rounded inputs*:

* the oracle ``o``: ``sad_kernels.reference`` on float64 copies. The copies are the leaves, so that
  the gradients are float64 too; upcasting inside the graph would round them to the input's dtype
  and let wrong kernels pass.
* the yardstick ``e``: the same eager definition in the inputs' dtypes, computed in float32 with the
  head's matrix product included. It says what rounding alone may do.

With ``err_r(x) = max_j |x_rj - o_rj|`` for a row r, and

    band_r = ulp(max_j |o_rj|) + 8 eps S_r        ulp in the dtype of the result, eps = 2^-23

all of these must hold:

    1. every row:          err_r(ours) <= 2 err_r(e) + band_r
    2. from 32 rows on: median err(ours) <= 2 median err(e) + median band / 8
    3. every row:          err_r(ours) <= 4 band_r: eager can be far off, which is no licence

A row is a token for losses and for the gradients of logits and hidden states, a class for the
gradient of a weight, and all of the gradient of a bias. ``S_r`` is the size of the numbers that
cancel in row r (see ``scales_of``). float64 results are held to lines 1 and 3 with eps = 2^-48: the
oracle has no more digits than they do, so four bits are left to it.

Where the gradient of the logits is rounded to 16 bits on its way into a matrix product, as it must
be on a GPU, the band of the product grows by what one such rounding can do to it, and by no more
(``rounding_of_products``); the median's budget by half of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import sad_kernels
import torch
from sad_kernels import DistillOutput, Objective, reference
from sad_kernels._dispatch import HAS_TRITON, INTERPRETED
from torch import Tensor

IMPLS = ("torch", "triton") if HAS_TRITON else ("torch",)
"""The implementations under test. Every test of ``sad_kernels`` runs once for each."""

ALL = ("reference", *IMPLS)
"""The specification and its implementations, for values that were computed by hand."""

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

COUNTS = frozenset({"num_tokens", "correct", "agree"})
"""Outputs that are counted, not computed: they must be equal."""

Outputs = dict[str, Tensor]


def dtypes_of(impl: str) -> tuple[torch.dtype, ...]:
    """What an implementation takes, widest first: the kernels refuse float64."""
    return DTYPES[1:] if impl == "triton" else DTYPES


IN_FLOAT64 = tuple(impl for impl in IMPLS if torch.float64 in dtypes_of(impl))
"""The implementations whose derivatives finite differences can check."""

SLOW = ("triton",) if INTERPRETED else ()
"""Implementations that get fewer and smaller cases: an interpreted program takes milliseconds."""


# --- The rule ------------------------------------------------------------------------------------


def assert_within(
    ours: Tensor,  # [], [rows] or [rows, ...]; one row is [1, columns]
    oracle: Tensor,  # float64
    yardstick: Tensor,
    scale: float | Tensor,  # S_r: one number, or [rows]
    *,
    allowance: float | Tensor = 0.0,
    case: str = "",
    output: str = "",
) -> float:
    """Assert that ``ours`` keeps the rule, and return the largest share of a budget that it used.
    ``allowance``, one number or [rows], is added to the band.

    Raises ``ValueError`` for an oracle that is not finite or zero everywhere: the first has no
    errors, the second no size to compare them with. Such cases deserve an assertion of their own.
    """
    if not oracle.isfinite().all() or not oracle.any():
        raise ValueError(f"{case} {output}: the oracle must be finite and not zero everywhere")
    _assert_same_kind(ours, yardstick, f"{case} {output}")
    allowed = torch.as_tensor(allowance, dtype=torch.float64)
    band = _band(oracle, scale, ours.dtype) + allowed
    err, err_eager = _row_errors(ours, oracle), _row_errors(yardstick, oracle)
    err_eager = err_eager.where(err_eager.isfinite(), 0)  # an eager overflow licenses nothing

    budget = torch.minimum(2 * err_eager + band, 4 * band)
    share = err / budget
    if not (err <= budget).all():
        raise AssertionError(_worst_row(ours, oracle, yardstick, err, budget, case, output))
    if err.numel() >= 32 and ours.dtype != torch.float64:
        unit = (band - allowed).median()
        median_budget = 2 * err_eager.median() + unit / 8 + allowed.median() / 2
        if err.median() > median_budget:
            raise AssertionError(
                f"{case} {output}: the median error of {err.numel()} rows is {err.median():.3e}, "
                f"its budget {median_budget:.3e}, share used {err.median() / median_budget:.2f}"
            )
        share = torch.cat((share, (err.median() / median_budget)[None]))
    return float(share.max())


def assert_zero(ours: Tensor, scale: float | Tensor, *, case: str = "", output: str = "") -> None:
    """The rule where the truth is zero everywhere: nothing but the band is left of it."""
    oracle = torch.zeros(ours.shape, dtype=torch.float64)
    err, band = _row_errors(ours, oracle), _band(oracle, scale, ours.dtype)
    if not (err <= band).all():
        raise AssertionError(_worst_row(ours, oracle, oracle, err, band, case, output))


def assert_value(ours: Tensor, exact: Any, scale: float | Tensor = 1.0) -> None:
    """The rule against numbers known exactly; the yardstick is these numbers, rounded."""
    exact = torch.as_tensor(exact, dtype=torch.float64)
    assert ours.shape == exact.shape, f"got shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    if exact.any():
        assert_within(ours.detach(), exact, exact.to(ours.dtype), scale)
    else:
        assert_zero(ours.detach(), scale)


def assert_ema_within(ours: Tensor, oracle: Tensor, shadow: Tensor, param: Tensor) -> None:
    """EMA is judged element by element: 2 ulps of ``max(|shadow|, |param|)``, in ours' dtype."""
    err = (ours.double() - oracle).abs()
    budget = 2 * ulp(torch.maximum(shadow.double().abs(), param.double().abs()), ours.dtype)
    if not (err <= budget).all():
        flat = (err / budget).nan_to_num(nan=torch.inf).flatten()
        i = int(flat.argmax())
        raise AssertionError(
            f"EMA element {i}: ours {ours.flatten()[i]}, oracle {oracle.flatten()[i]}, "
            f"error {err.flatten()[i]:.3e}, budget {budget.flatten()[i]:.3e}, share {flat[i]:.2f}"
        )


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of ``dtype`` around ``|x|``."""
    info = torch.finfo(dtype)
    exponent = x.double().abs().clamp(min=info.smallest_normal).frexp().exponent - 1
    return info.eps * torch.ldexp(torch.ones_like(x, dtype=torch.float64), exponent)


def epsilon(dtype: torch.dtype) -> float:
    """What a result of this dtype was computed with, for the rule: four bits worse in float64."""
    return 2.0**-48 if dtype == torch.float64 else 2.0**-23


def _band(oracle: Tensor, scale: float | Tensor, dtype: torch.dtype) -> Tensor:  # [rows]
    largest = _as_rows(oracle).abs().amax(-1)
    scale = torch.as_tensor(scale, dtype=torch.float64, device=largest.device).flatten()
    return ulp(largest, dtype) + 8 * epsilon(dtype) * scale


def _row_errors(x: Tensor, oracle: Tensor) -> Tensor:  # [rows]
    return (_as_rows(x).double() - _as_rows(oracle)).abs().amax(-1)


def _as_rows(x: Tensor) -> Tensor:  # [rows, columns]
    return x.reshape(1, 1) if x.ndim == 0 else x.reshape(x.shape[0], -1)


def _assert_same_kind(ours: Tensor, yardstick: Tensor, what: str) -> None:
    assert (ours.shape, ours.dtype) == (yardstick.shape, yardstick.dtype), (
        f"{what}: got {ours.dtype} of shape {tuple(ours.shape)}, "
        f"expected {yardstick.dtype} of shape {tuple(yardstick.shape)}"
    )


def _worst_row(
    ours: Tensor,
    oracle: Tensor,
    yardstick: Tensor,
    err: Tensor,
    budget: Tensor,
    case: str,
    output: str,
) -> str:
    share = (err / budget).nan_to_num(nan=torch.inf)
    row = int(share.argmax())
    x, o, e = (_as_rows(t)[row].double() for t in (ours, oracle, yardstick))
    column = int((x - o).abs().nan_to_num(nan=torch.inf).argmax())
    bad_rows = int((~(err <= budget)).sum())
    return (
        f"{case} {output}: {bad_rows} of {err.numel()} rows out of budget; the worst:\n"
        f"  row {row}, column {column}\n"
        f"  ours      {x[column]:.9e}\n"
        f"  oracle    {o[column]:.9e}\n"
        f"  yardstick {e[column]:.9e}\n"
        f"  error {err[row]:.3e}, budget {budget[row]:.3e}, share used {share[row]:.2f}"
    )


# --- One call of one function --------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One call of one public function, with everything that is needed to judge it.

    ``call(ops, leaves)`` makes the call, where ``ops`` has the public functions as attributes
    (``reference``, or ``bound(impl)``) and ``leaves`` are the floating-point tensors, in whatever
    precision. Outputs are named like the fields of ``DistillOutput``, and gradients "d" + leaf.
    """

    case: str
    call: Callable[[Any, dict[str, Tensor]], Any]  # a loss, or a DistillOutput
    leaves: Mapping[str, Tensor]
    wrt: tuple[str, ...]  # the leaves that require a gradient
    upstream: Tensor  # of the loss's shape
    scales: Mapping[str, float | Tensor]  # S_r where it is not max|o| over the tensor
    magnitude: float = 1.0  # max(1, max|z|) where logits z are computed, as in the linear ops
    zeros: Mapping[str, Tensor] = field(default_factory=dict)  # masks of what is exactly zero


def bound(impl: str, chunk_bytes: int | None = None) -> Any:
    """The public functions with their mechanics filled in, callable like ``reference``."""
    if impl == "reference":
        return reference
    linear = {"impl": impl, "chunk_bytes": chunk_bytes}
    return SimpleNamespace(
        cross_entropy=partial(sad_kernels.cross_entropy, impl=impl),
        kl_div=partial(sad_kernels.kl_div, impl=impl),
        distill_loss=partial(sad_kernels.distill_loss, impl=impl),
        linear_cross_entropy=partial(sad_kernels.linear_cross_entropy, **linear),
        linear_distill_loss=partial(sad_kernels.linear_distill_loss, **linear),
        rounds_products=impl == "triton",
    )


def judge(problem: Problem, ops: Any) -> float:
    """Assert that every output and gradient of ``ops`` keeps the rule; return the largest share."""
    rounds = getattr(ops, "rounds_products", False)
    allowances = rounding_of_products(problem) if rounds else {}
    return judge_outputs(problem, measure(problem, ops), allowances)


def judge_outputs(problem: Problem, ours: Outputs, allowances: Outputs | None = None) -> float:
    """``judge`` for outputs that are already there, be it only some of them."""
    oracle, yardstick = measure_oracle(problem), measure(problem, reference)
    return max(
        judge_output(problem, name, x, oracle, yardstick, (allowances or {}).get(name))
        for name, x in ours.items()
    )


def judge_output(
    problem: Problem,
    output: str,
    x: Tensor,
    oracle: Outputs,
    yardstick: Outputs,
    allowance: Tensor | None = None,  # of the shape of x
) -> float:
    what = f"{problem.case} {output}"
    _assert_same_kind(x, yardstick[output], what)
    x, o, e = (_one_row_per_unit(output, each) for each in (x, oracle[output], yardstick[output]))
    if output in problem.zeros:
        assert not x[problem.zeros[output]].any(), f"{what}: must be exactly zero"
    if output in COUNTS:
        assert torch.equal(x.double(), o), f"{what}: got {x}, expected {o}"
        return 0.0
    scale = problem.scales.get(output)
    if scale is None:
        scale = problem.magnitude * float(o.abs().max()) if o.numel() else 0.0
    if not o.any():
        assert_zero(x, scale, case=problem.case, output=output)
        return 0.0
    extra = 0.0
    if allowance is not None:
        extra = _as_rows(_one_row_per_unit(output, allowance)).amax(-1)
    return assert_within(x, o, e, scale, allowance=extra, case=problem.case, output=output)


def _one_row_per_unit(output: str, x: Tensor) -> Tensor:
    """Tokens or classes in the first dimension; a bias is one row."""
    if output == "dbias":
        return x[None]
    if output == "loss":
        return x.flatten() if x.ndim else x
    return x.flatten(0, -2) if x.ndim > 2 else x


def is_measurable(problem: Problem) -> bool:
    """Whether the rule can tell two right answers to this problem from a wrong one.

    It measures the gradients of hidden states, weight and bias by the largest of their tensor. With
    few rows, or probabilities near 1, that can be a small remainder of the terms that were rounded;
    and eager PyTorch can be near it by luck. So problems are drawn at random only where eager in
    float32 keeps to a quarter of the band, here and at two neighbours whose numbers are one bit
    away. About 1 in 20 is passed over, those with a loss that is not finite among them.
    """
    generator = torch.Generator().manual_seed(0)
    for bits in (0, 1, 1):
        leaves = {
            name: x.float()
            * (1 + 2.0**-23 * torch.randint(-bits, bits + 1, x.shape, generator=generator))
            for name, x in problem.leaves.items()
        }
        near = replace(problem, leaves=leaves)
        oracle, yardstick = measure_oracle(near), measure(near, reference)
        for name in oracle.keys() - COUNTS:
            if oracle[name].any():
                x, o = (_one_row_per_unit(name, each[name]) for each in (yardstick, oracle))
                scale = problem.scales.get(name, problem.magnitude * float(o.abs().max()))
                if not (_row_errors(x, o) <= _band(o, scale, x.dtype) / 4).all():
                    return False
    return True


def measure_oracle(problem: Problem) -> Outputs:
    """The outputs of the reference on float64 leaves."""
    return measure(problem, reference, {name: x.double() for name, x in problem.leaves.items()})


def measure(problem: Problem, ops: Any, leaves: Mapping[str, Tensor] | None = None) -> Outputs:
    """Every output of the call, and the gradient of every leaf that requires one."""
    given = problem.leaves if leaves is None else leaves
    own = {name: x.detach().requires_grad_(name in problem.wrt) for name, x in given.items()}
    result = problem.call(ops, own)
    outputs = result._asdict() if isinstance(result, DistillOutput) else {"loss": result}
    loss = outputs["loss"]
    assert loss.requires_grad == bool(problem.wrt), "the loss requires a gradient iff a leaf does"
    assert not any(x.requires_grad for name, x in outputs.items() if name != "loss")
    if problem.wrt:
        wrt = [own[name] for name in problem.wrt]
        grads = torch.autograd.grad(loss, wrt, problem.upstream.to(loss.dtype))
        outputs |= {f"d{name}": grad for name, grad in zip(problem.wrt, grads, strict=True)}
    return {name: x.detach() for name, x in outputs.items()}


# --- What a rounded factor may do ----------------------------------------------------------------


class _NormProducts(torch.autograd.Function):
    """``h W^T + b``, whose backward sums the p-th powers of absolute values. Where it sums over
    rows, equal rows of ``h`` count as one of their sum: their gradients are rounded alike."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, p: int) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.p = p
        return hidden @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, group, copies = ctx.saved_tensors[0].unique(
            dim=0, return_inverse=True, return_counts=True
        )
        alike = (copies[group] ** (ctx.p - 1))[:, None]
        g, hidden, weight = (x.abs() ** ctx.p for x in (g, *ctx.saved_tensors))
        return g @ weight, (g * alike).T @ hidden, (g * alike).sum(0), None


def rounding_of_products(problem: Problem) -> Outputs:
    """How far each gradient may be off because the logits' gradient was rounded to 16 bits once.

    Matrix products on a GPU take factors of one dtype. 16-bit hidden states therefore meet a 16-bit
    ``g``, of which every number is off by ``u |g|`` at most, ``u`` the unit roundoff. So a number
    of ``g^T h`` is off by ``u sum |g h|`` at most, and since the roundings do not know of each
    other, by no more than twice ``u sqrt(sum (g h)^2)`` in practice (m equal rows are rounded
    alike: they are m times one term); likewise ``g W`` and the column sums of g. A row that cancels
    has a bound of its own, and a second rounding, of a sum or of the logits, still shows.
    """
    hidden = problem.leaves.get("hidden")
    if hidden is None or hidden.dtype.itemsize != 2:
        return {}
    u = torch.finfo(hidden.dtype).eps / 2
    largest, usual = _norms_of_products(problem, 1), _norms_of_products(problem, 2)
    return {name: u * torch.minimum(x, 2 * usual[name].sqrt()) for name, x in largest.items()}


def _norms_of_products(problem: Problem, p: int) -> Outputs:
    """``sum |factor factor|^p`` for every number of a gradient, from the oracle's factors."""
    original = reference._logits

    def logits(hidden: Tensor, head: Any, V: int, dtype: torch.dtype) -> Tensor:
        bias = hidden.new_zeros(V) if head.bias is None else head.bias[:V]
        factors = (x.to(dtype) for x in (hidden, head.weight[:V], bias))
        z = head.logit_scale * _NormProducts.apply(*factors, p)
        return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)

    reference._logits = logits
    try:
        outputs = measure_oracle(problem)
    finally:
        reference._logits = original
    return {name: outputs[name] for name in ("dhidden", "dweight", "dbias") if name in outputs}


# --- The size of what cancels --------------------------------------------------------------------


def scales_of(
    objective: Objective,
    s: Tensor,  # [N, V] float64 logits of the student, cut to the valid vocabulary
    t: Tensor | None,  # the teacher's, or T times its log-probabilities; None without a teacher
    keep: Tensor,  # [N] the rows that count
    upstream: Tensor,  # [] or [N]
    divisor: float | None,  # of the sum over rows; None for a loss per row
    s_magnitude: float = 1.0,
    t_magnitude: float = 1.0,
) -> dict[str, Tensor]:
    """``S_r`` for losses, ``dlogits`` and the fields of ``DistillOutput``.

    =========================  =================  ===================
    term                       loss               gradient by a logit
    =========================  =================  ===================
    cross-entropy              1 nat              1
    divergence at T            ``T^2 R``          ``T R``
    z-loss, ``lse^2``          ``2 max(1, lse)``  ``2 lse``
    =========================  =================  ===================

    each times its weight in the objective and, for the gradient, times ``|upstream_r|``. ``R`` is
    the finite range of the row's logits over T, at least 1: the reverse KL multiplies probabilities
    by log-ratios. Both KD scales are divided by ``T^2`` with ``scale_t2=False``. A reduced loss has
    the sum of its rows' scales, divided as the loss is. Where logits z are computed from hidden
    states, they are rounded before anything else happens: the magnitudes, ``max(1, max|z|)``,
    multiply what depends on them. Ignored rows have a scale of 0: what they get must be exact.
    """
    T, lse = objective.temperature, s.logsumexp(-1).abs()
    one = torch.full_like(lse, s_magnitude)
    z = s_magnitude * 2 * lse
    kd = torch.zeros_like(lse)
    if t is not None:
        R = torch.maximum(_finite_range(s), _finite_range(t)) / T
        kd = max(s_magnitude, t_magnitude) * objective.kd_scale * R.clamp(min=1)

    def weighted(ce: Tensor, kd: Tensor, z: Tensor) -> Tensor:
        rows = objective.ce_weight * ce + objective.kd_weight * kd + objective.z_loss * z
        return rows.where(keep, 0)

    loss = weighted(one, kd, z.clamp(min=2 * s_magnitude))
    return {
        "loss": loss if divisor is None else loss.sum() / divisor,
        "dlogits": weighted(one, kd / T, z) * upstream.double().abs() / (divisor or 1.0),
        "ce": one.where(keep, 0).sum(),
        "kd": kd.where(keep, 0).sum(),
        "z": z.clamp(min=2 * s_magnitude).where(keep, 0).sum(),
        "entropy": one.where(keep, 0).sum(),
    }


def _finite_range(x: Tensor) -> Tensor:  # [N, V] -> [N]
    finite = x.isfinite()
    span = x.where(finite, -torch.inf).amax(-1) - x.where(finite, torch.inf).amin(-1)
    return span.clamp(min=0)
