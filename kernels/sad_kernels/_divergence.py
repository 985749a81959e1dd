"""The terms of each divergence and of its gradient, one function by name, for the torch path.

Any divergence here is a sum over outcomes, ``D = sum_v q_v F(r_v)`` with ``r = p/q``, of a teacher
``p`` and a student ``q = softmax(z)``. Its gradient is

    dD/dz_v = q_v (phi(r_v) - sum_u q_u phi(r_u)),        phi(r) = F(r) - r F'(r)

and a constant added to ``phi`` changes nothing. That constant decides the accuracy. Where a student
agrees with its teacher, or is sure of a token, all ``phi`` that matter are nearly equal, and their
differences are what rounding left. So ``phi`` is counted from its value at the student's most
likely outcome ``y``: exactly 0 there, and the sum adds up the others only. With ``r0 = p_y/q_y``,
``g = log(r/r0)``, ``w = e^g - 1``, ``a`` the share of p in the mixture m and

    mu0 = a r0 + 1 - a    rho = a r0/mu0    kappa = (1 - a)/mu0    u = 1 + rho w = m/(q mu0)

==================  =======================================  =================================
divergence          f, the summands of the value             phi(r) - phi(r0)
==================  =======================================  =================================
jsd                 beta p log(p/m) + (1-beta) q log(q/m)    -(1-beta) log u
skew_forward_kl     p log(p/m)                               -((1-beta)/mu0)^2 r0 w/u
skew_reverse_kl     q log(q/m)                               kappa rho w/u - log u
tvd                 |p - q| / 2                              (sign(q - p) - sign(q_y - p_y)) / 2
==================  =======================================  =================================

The KLs and their weighted sums are apart: ``KL(p || q)`` has the gradient ``q - p``, ``KL(q || p)``
has ``phi - phi_y = -g``. Of whole logits they come from running sums, see
``_torch/statistics.py``; here they are for the few outcomes of a top-k teacher.

Sources: Hinton et al. 1503.02531, MiniLLM 2306.08543, GKD 2306.13649, DistiLLM 2402.03898.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sad_kernels._divergence_table import DIVERGENCES, missing
from sad_kernels.objective import Tail

LARGEST_G0 = 40.0
"""Nats that r0 may be off 1: any r0 is right if g counts from it, and this one keeps kappa > 0."""
LARGEST_G = {torch.float32: 88.0, torch.float64: 700.0}
"""Nats up to which e^g is finite."""


class Terms(NamedTuple):
    """What makes one divergence: two functions of every outcome."""

    value: Callable[[float, Tensor, Tensor, Tensor, bool], Tensor]
    """(beta, gap = log p/q, p, q, normalised) -> ``f``. ``gap`` may be overwritten. ``normalised``
    says that p and q both sum to 1: then ``p - q``, which sums to 0, may be added where it makes
    the summands as small as their sum."""
    slope: Callable[[float, Tensor, Counted], Tensor]
    """(beta, g, counted) -> ``phi - phi_y``. ``g`` may be overwritten."""


class Counted(NamedTuple):
    """What ``phi`` is counted from in each row, [n, 1] each."""

    gap: Tensor  # log p_y/q_y
    g0: Tensor  # the same, bounded; what g counts from
    share: float  # a, of p in the mixture
    mu0: Tensor
    rho: Tensor
    kappa: Tensor


def terms_of(divergence: str) -> Terms:
    """The functions of ``f`` and ``phi`` of a divergence that is no sum of KLs."""
    if divergence not in TERMS:
        raise missing(divergence, f"{__name__}.TERMS")
    return TERMS[divergence]


def counted_from(divergence: str, beta: float, gap: Tensor) -> Counted:
    """The constants of rows in which the most likely outcome has ``gap = log p/q``, [n, 1]."""
    g0 = gap.clamp(-LARGEST_G0, LARGEST_G0)
    share = 1 - beta if divergence == "skew_reverse_kl" else beta
    mixed = g0.exp() * share
    mu0 = mixed + (1 - share)
    # Never 1 - rho: kappa may be far below what is left of rho beside 1.
    return Counted(gap, g0, share, mu0, mixed / mu0, (1 - share) / mu0)


def weighted_slope(
    slope: Callable[[float, Tensor, Counted], Tensor],
    beta: float,
    g: Tensor,  # log p/q - g0, overwritten
    counted: Counted,
    q: Tensor,
) -> Tensor:
    """``q (phi - phi_y)`` of every outcome, from which the gradient is made; 0 where q is."""
    g.clamp_(max=LARGEST_G[g.dtype])
    # 0 * inf: an outcome without probability has no part in the gradient.
    return zero_nan_(slope(beta, g, counted).mul_(q))


def value_and_gradient(
    divergence: str, beta: float, log_p: Tensor, log_q: Tensor
) -> tuple[Tensor, Tensor]:
    """The divergence [n] of a few outcomes [n, K], and its gradient by log q before softmax."""
    gap, p, q = log_p - log_q, log_p.exp(), log_q.exp()

    def from_slope(slope: Callable[[float, Tensor, Counted], Tensor]) -> Tensor:
        y = log_q.argmax(1, keepdim=True)
        counted = counted_from(divergence, beta, gap.gather(1, y))
        h = weighted_slope(slope, beta, gap - counted.g0, counted, q)
        return h - q * h.sum(1, keepdim=True)

    weights = DIVERGENCES[divergence].kl_weights
    if weights is None:
        terms = terms_of(divergence)
        gradient = from_slope(terms.slope)
        return terms.value(beta, gap, p, q, False).sum(1), gradient
    on_forward, on_reverse = weights(beta)
    parts: list[tuple[Tensor, Tensor]] = []
    if on_forward > 0:
        value = zero_nan_(p * gap).sum(1).mul_(on_forward)
        fall = gap.abs().neg_().expm1_()
        difference = _difference(gap, p, q, fall)  # p - q; p need not sum to 1
        gradient = torch.mul(q, difference.sum(1, keepdim=True)).sub_(difference)
        parts.append((value, gradient.mul_(on_forward)))
    if on_reverse > 0:
        value = zero_nan_(q * gap).sum(1).mul_(-on_reverse)
        gradient = from_slope(lambda beta, g, counted: g.neg_())
        parts.append((value, gradient.mul_(on_reverse)))
    if len(parts) == 1:
        return parts[0]
    (value, gradient), (other_value, other_gradient) = parts
    return value.add_(other_value), gradient.add_(other_gradient)


def zero_nan_(x: Tensor) -> Tensor:
    """0 in the place of NaN: a weight of 0 adds 0, whatever it multiplies.

    A row that is NaN throughout becomes a row of zeros; whoever adds it up poisons that row.
    """
    return x.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


# --- Values --------------------------------------------------------------------------------------


def _jsd(beta: float, gap: Tensor, p: Tensor, q: Tensor, normalised: bool) -> Tensor:
    log_m, _ = _log_mixture(1 - beta, gap)
    # log m/q and log p/m, from what m is of the larger of p and q
    over_q = zero_nan_(gap.clamp(min=0).add_(log_m).mul_(q))
    f = zero_nan_(gap.clamp_(max=0).sub_(log_m).mul_(p)).mul_(beta)
    return f.sub_(over_q, alpha=1 - beta)


def _skew_forward_kl(beta: float, gap: Tensor, p: Tensor, q: Tensor, normalised: bool) -> Tensor:
    log_m, fall = _log_mixture(1 - beta, gap)
    difference = _difference(gap, p, q, fall) if normalised else None
    f = zero_nan_(gap.clamp_(max=0).sub_(log_m).mul_(p))
    return f if difference is None else f.sub_(difference, alpha=1 - beta)


def _skew_reverse_kl(beta: float, gap: Tensor, p: Tensor, q: Tensor, normalised: bool) -> Tensor:
    log_m, fall = _log_mixture(beta, gap)
    difference = _difference(gap, p, q, fall) if normalised else None
    f = zero_nan_(gap.neg_().clamp_(max=0).sub_(log_m).mul_(q))
    return f if difference is None else f.add_(difference, alpha=1 - beta)


def _tvd(beta: float, gap: Tensor, p: Tensor, q: Tensor, normalised: bool) -> Tensor:
    fall = gap.abs_().neg_().expm1_()
    return zero_nan_(fall.mul_(torch.maximum(p, q)).mul_(-0.5))


def _log_mixture(share: float, gap: Tensor) -> tuple[Tensor, Tensor]:
    """``log(m / larger)`` of the mixture ``m = share q + (1 - share) p``, and ``e^-|gap| - 1``.

    Relative to the larger of p and q: nothing underflows, and the logarithm's argument stays
    between the smaller share and 1.
    """
    fall = gap.abs().neg_().expm1_()
    if share == 0.5:
        return torch.mul(fall, share).log1p_(), fall
    # The share of the smaller: q's where p is larger. No torch.where, which is slow on a CPU.
    smaller = torch.lt(gap, 0, out=torch.empty_like(gap)).mul_(1 - 2 * share).add_(share)
    return smaller.mul_(fall).log1p_(), fall


def _difference(gap: Tensor, p: Tensor, q: Tensor, fall: Tensor) -> Tensor:
    """``p - q``, exact to rounding of its own size; overwrites ``fall``."""
    return zero_nan_(torch.copysign(fall.neg_().mul_(torch.maximum(p, q)), gap, out=fall))


# --- Slopes --------------------------------------------------------------------------------------


def _jsd_slope(beta: float, g: Tensor, counted: Counted) -> Tensor:
    z = g.expm1().mul_(counted.rho)
    return _log_u(z, _rest(z, g, counted)).mul_(beta - 1)


def _skew_forward_kl_slope(beta: float, g: Tensor, counted: Counted) -> Tensor:
    z = g.expm1().mul_(counted.rho)
    u = _u(z, _rest(z, g, counted))
    # K w/u, with K w = K/rho z: one factor for every column
    factor = -((1 - beta) ** 2) / (counted.share * counted.mu0)
    return z.div_(u).mul_(factor)


def _skew_reverse_kl_slope(beta: float, g: Tensor, counted: Counted) -> Tensor:
    z = g.expm1().mul_(counted.rho)
    rest = _rest(z, g, counted)
    log_u = _log_u(z, rest)
    return z.div_(_u(z, rest)).mul_(counted.kappa).sub_(log_u)


def _tvd_slope(beta: float, g: Tensor, counted: Counted) -> Tensor:
    return g.add_(counted.g0).sign_().sub_(counted.gap.sign()).mul_(-0.5)


def _rest(z: Tensor, g: Tensor, counted: Counted) -> Tensor | None:
    """``min(u, 1/2)`` by ``u = kappa + rho e^g``, which keeps its digits near u = 0; overwrites g.

    None if no u is below 1/2, which costs a tenth to find out.
    """
    if z.device.type == "cpu" and not bool(z.numel() and z.amin() < -0.5):
        return None
    return g.exp_().mul_(counted.rho).add_(counted.kappa).clamp_(max=0.5)


def _u(z: Tensor, rest: Tensor | None) -> Tensor:
    """``u = 1 + z``, from z where z > -1/2 and from the rest below."""
    return z + 1 if rest is None else z.clamp(min=-0.5).add_(0.5).add_(rest)


def _log_u(z: Tensor, rest: Tensor | None) -> Tensor:
    """``log u`` likewise: one of the two summands is what it is at u = 1/2, and cancels."""
    if rest is None:
        return z.log1p()
    return z.clamp(min=-0.5).log1p_().add_(torch.mul(rest, 2).log_())


TERMS: dict[str, Terms] = {
    "jsd": Terms(_jsd, _jsd_slope),
    "skew_forward_kl": Terms(_skew_forward_kl, _skew_forward_kl_slope),
    "skew_reverse_kl": Terms(_skew_reverse_kl, _skew_reverse_kl_slope),
    "tvd": Terms(_tvd, _tvd_slope),
}


def teacher_outcomes(
    log_probs: Tensor,  # [n, K], -inf is padding
    tail: Tail,
    vocab: int,
) -> tuple[Tensor, Tensor]:
    """The teacher's log-probabilities at its ids [n, K], and of everything else [n].

    A row of padding alone has no teacher with tail "zero": all its probabilities are 0.
    """
    if tail == "zero":
        total = log_probs.logsumexp(1, keepdim=True)
        log_p = log_probs - total.masked_fill(total == -torch.inf, 0)
        return log_p, torch.full_like(log_probs[:, 0], -torch.inf)
    # In float64, because log_probs are given: what is left of 1 is known better than to 1e-7.
    rest = (1 - log_probs.double().exp().sum(1)).clamp(min=0)
    covers_all = (log_probs != -torch.inf).sum(1) == vocab
    return log_probs, rest.where(~covers_all, 0).log().to(log_probs.dtype)
