"""How far a right result may be off, from the sizes of what was rounded on the way to it."""

from __future__ import annotations

from typing import Any

import torch
from sad_kernels import Objective
from torch import Tensor

from support.oracle.calls import Outputs, Problem
from support.oracle.exact import measure_oracle, replaced

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

    def logits(hidden: Tensor, head: Any, V: int, dtype: torch.dtype) -> Tensor:
        bias = hidden.new_zeros(V) if head.bias is None else head.bias[:V]
        factors = (x.to(dtype) for x in (hidden, head.weight[:V], bias))
        z = head.logit_scale * _NormProducts.apply(*factors, p)
        return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)

    with replaced(_logits=logits):
        outputs = measure_oracle(problem)
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
