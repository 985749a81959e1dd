"""Values and gradients of every divergence without the cancellation of the plain definitions.

Autograd through the plain definition loses digits where both sides agree, where the student is sure
of a token, and where the sides are far apart: in float64 up to 40 percent of a row. So everything
is counted from the student's most likely outcome ``y``. With ``r = p / q``,

    g_v = log r_v - log r_y = ((t_v - max t) - (s_v - max s) - the same at y) / T

needs no normaliser, and for ``D = sum_v q_v F(r_v)`` the gradient by a logit is

    dD/ds_v = (q_v / T) (phi_v - sum_w q_w phi_w),    phi = F(r) - r F'(r),

in which a constant of phi drops out: what is computed is ``phi_v - phi_y``. It is exactly 0 at y,
so where ``q_y`` is near 1 the sum is over the others. Differences of probabilities come from
``expm1``, and values are sums without negative terms.

In float64 this is the oracle, held to ``mpmath`` at 80 digits by ``test_exact.py``; in
float32 it is an algorithm that the rule must let pass. It shares no code with ``sad_kernels``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from sad_kernels.objective import Tail
from torch import Tensor

NATS = 40.0
"""How far ``p_y`` and ``q_y`` may be apart where a mixture is counted from y: beyond that one of
them has no digit in the mixture, and their ratio would overflow float32."""


class Sides(NamedTuple):
    """Student and teacher over the outcomes of a row, [n, outcomes], in nats."""

    student: Tensor  # log q up to a constant of the row: 0 at y, the largest
    teacher: Tensor  # log p likewise
    gap: Tensor  # log p / q up to a constant; 0 where both are impossible
    missing: Tensor  # [n, 1] 1 - sum p: log-probabilities of a top-k teacher may be rounded


class Ratios(NamedTuple):
    """What the divergences are made of, [n, outcomes]."""

    p: Tensor
    q: Tensor
    difference: Tensor  # p - q
    log_ratio: Tensor  # log p / q
    g: Tensor  # the same, counted from y
    y: Tensor  # [n, 1]
    missing: Tensor  # [n, 1]


def ratios_of(sides: Sides) -> Ratios:
    student, teacher, gap, missing = sides
    hot, hot_t = student.exp(), teacher.exp()
    d, sum_t = hot.sum(-1, keepdim=True), hot_t.sum(-1, keepdim=True)
    d_t = sum_t / (1 - missing)
    # hot_t - hot, and B = d_t - d, of numbers that may agree to the last digit
    rise = torch.copysign(-torch.maximum(hot, hot_t) * torch.expm1(-gap.abs()), gap)
    B = rise.sum(-1, keepdim=True) + sum_t * missing / (1 - missing)
    offset = torch.where(B.abs() < d / 2, torch.log1p(B / d), d_t.log() - d.log())  # log d_t / d
    # p - q over the larger of d and d_t: over the other a term of B would cancel most of its own
    difference = torch.where(B > 0, (rise - hot * (B / d)) / d_t, (rise - hot_t * (B / d_t)) / d)
    y = student.argmax(-1, keepdim=True)
    return Ratios(
        p=hot_t / d_t,
        q=hot / d,
        difference=difference,
        log_ratio=gap - offset,
        g=gap - gap.gather(-1, y),
        y=y,
        missing=missing,
    )


# --- Mixtures -------------------------------------------------------------------------------------


class Mixture(NamedTuple):
    """``m = a p + (1 - a) q`` by ``mu = m / q``, counted from y."""

    g: Tensor  # log r_v / r_y, or from 40 nats away where r_y is further; [n, outcomes]
    r: Tensor  # r_y, [n, 1] as all that follow
    mu: Tensor  # mu_y
    teacher: Tensor  # a r_y / mu_y, the teacher's share of m_y
    student: Tensor  # (1 - a) / mu_y, the student's


def _mixture(a: float, k: Ratios) -> Mixture:
    at_y = k.log_ratio.gather(-1, k.y)
    start = at_y.clamp(-NATS, NATS)
    g = torch.where(start == at_y, k.g, k.log_ratio - start)
    r = start.exp()
    mu = a * r + (1 - a)
    return Mixture(g, r, mu, a * r / mu, (1 - a) / mu)


def _log_growth(m: Mixture) -> Tensor:
    """``log mu / mu_y``."""
    largest = 0.9 * math.log(torch.finfo(m.g.dtype).max)
    g, above = m.g.clamp(max=largest), (m.g - largest).clamp(min=0)  # there mu grows like e^g
    z = m.teacher * torch.expm1(g)
    fallen = (m.student + m.teacher * g.exp()).log()
    return torch.where(z < -0.5, fallen, torch.log1p(z.clamp(min=-0.5))) + above


def _relative_rise(m: Mixture) -> Tensor:
    """``(e^g - 1) mu_y / mu``, for g above 0 with both sides of the fraction divided by e^g."""
    down, up = m.g.clamp(max=0), -m.g.clamp(min=0)
    falling = torch.expm1(down) / (m.student + m.teacher * down.exp())
    rising = -torch.expm1(up) / (m.teacher + m.student * up.exp())
    return torch.where(m.g > 0, rising, falling)


# --- phi, counted from y --------------------------------------------------------------------------


def _reverse_kl_phi(k: Ratios, beta: float) -> Tensor:
    return -k.g


def _jsd_phi(k: Ratios, beta: float) -> Tensor:
    return -(1 - beta) * _log_growth(_mixture(beta, k))


def _skew_forward_kl_phi(k: Ratios, beta: float) -> Tensor:
    return -_steepness(k, beta) * _relative_rise(_mixture(beta, k))


def _steepness(k: Ratios, beta: float) -> Tensor:
    """``-dphi / dlog r`` of the skew forward KL at y, [n, 1]."""
    m = _mixture(beta, k)
    return ((1 - beta) / m.mu).square() * m.r


def _skew_reverse_kl_phi(k: Ratios, beta: float) -> Tensor:
    m = _mixture(1 - beta, k)
    return m.student * m.teacher * _relative_rise(m) - _log_growth(m)


def _tvd_phi(k: Ratios, beta: float) -> Tensor:
    phi = -0.5 * k.difference.sign()
    return phi - phi.gather(-1, k.y)


def size_of_mean(sides: Sides, k: Ratios) -> Tensor:
    """What the mean of the reverse KL's phi adds up if it does not count from y, [n, 1]."""
    return torch.where(k.q > 0, k.q * sides.gap.abs(), 0 * k.q).sum(-1, keepdim=True)


def rounded_step(name: str, beta: float, k: Ratios) -> float | Tensor:
    """What an error of 1 in the logarithm or the exponential of a mixture is in phi."""
    match name:
        case "jsd":
            return 1 - beta
        case "skew_forward_kl":
            return _steepness(k, beta)
        case "skew_reverse_kl":
            return 1.0
        case _:
            return 0.0


# --- Gradients by the logit of an outcome, times T ------------------------------------------------


def _centred(k: Ratios, phi: Tensor, off: float | Tensor = 0.0) -> Tensor:
    """``q (phi - sum q phi - off)``; an outcome with ``q = 0`` has no part whatever its phi."""

    def times_q(x: Tensor) -> Tensor:
        return torch.where(k.q > 0, k.q * x, 0 * k.q)

    return times_q(phi - times_q(phi).sum(-1, keepdim=True) - off)


Change = Callable[[Tensor], Tensor] | None

PHI: dict[str, Callable[[Ratios, float], Tensor]] = {
    "reverse_kl": _reverse_kl_phi,
    "jsd": _jsd_phi,
    "skew_forward_kl": _skew_forward_kl_phi,
    "skew_reverse_kl": _skew_reverse_kl_phi,
    "tvd": _tvd_phi,
}


def gradient_of(
    name: str, beta: float, k: Ratios, change: Change = None, mean_off: float | Tensor = 0.0
) -> Tensor:
    """[n, outcomes]; ``change`` makes another phi of phi, and ``mean_off`` [n, 1] is what is wrong
    with the mean of the reverse KL's phi."""
    if name == "jeffreys":
        forward, reverse = (
            gradient_of(each, beta, k, change, mean_off) for each in ("forward_kl", "reverse_kl")
        )
        return beta * forward + (1 - beta) * reverse
    if name == "forward_kl":
        return -k.difference - k.q * k.missing  # q sum p - p
    phi = PHI[name](k, beta)
    return _centred(k, change(phi) if change else phi, mean_off if name == "reverse_kl" else 0.0)


# --- Values ---------------------------------------------------------------------------------------


def _kl(a: Tensor, b: Tensor, log_ratio: Tensor) -> Tensor:
    """``KL(a || b) - sum (a - b) = sum a (e^z - 1 - z)`` with ``z = log b / a``: no term is
    negative, so nothing cancels."""
    z = log_ratio.clamp(max=1)
    near = a * torch.where(z.abs() < 0.3, _exponential_tail(z), torch.expm1(z) - z)
    far = b - a - torch.where(a > 0, a * log_ratio, 0 * a)
    return torch.where(log_ratio < 1, near, far).sum(-1)


def _exponential_tail(z: Tensor) -> Tensor:
    """``e^z - 1 - z`` by its series, to a part in 1e18 for ``|z| < 0.3``."""
    total = torch.zeros_like(z)
    for k in range(15, 1, -1):
        total = z / k * (1 + total)
    return z * total


def _logs_of_mixture(a: float, k: Ratios) -> tuple[Tensor, Tensor]:
    """``log m / p`` and ``log m / q`` for ``m = a p + (1 - a) q``, from the larger of the two."""
    share = torch.full_like(k.log_ratio, a).where(k.log_ratio >= 0, 1 - a)  # of the larger
    log_m = torch.log1p((1 - share) * torch.expm1(-k.log_ratio.abs()))  # log m / larger
    return log_m - k.log_ratio.clamp(max=0), log_m + k.log_ratio.clamp(min=0)


def value_of(name: str, beta: float, k: Ratios) -> Tensor:
    """[n]. ``_kl`` leaves out a sum of p that is not 1; the definitions do not."""
    p, q, missing = k.p, k.q, k.missing[:, 0]
    match name:
        case "forward_kl":
            return _kl(p, q, -k.log_ratio) - missing
        case "reverse_kl":
            return _kl(q, p, k.log_ratio) + missing
        case "jsd":
            m, (of_p, of_q) = beta * p + (1 - beta) * q, _logs_of_mixture(beta, k)
            return beta * _kl(p, m, of_p) + (1 - beta) * _kl(q, m, of_q)
        case "skew_forward_kl":
            m, (of_p, _) = beta * p + (1 - beta) * q, _logs_of_mixture(beta, k)
            return _kl(p, m, of_p) - (1 - beta) * missing
        case "skew_reverse_kl":
            m, (_, of_q) = (1 - beta) * p + beta * q, _logs_of_mixture(1 - beta, k)
            return _kl(q, m, of_q) + (1 - beta) * missing
        case "tvd":
            return 0.5 * k.difference.abs().sum(-1)
        case "jeffreys":
            forward, reverse = (value_of(each, beta, k) for each in ("forward_kl", "reverse_kl"))
            return beta * forward + (1 - beta) * reverse
        case _:
            raise NotImplementedError(f"divergence must be one of {NAMES}, got {name!r}; add it")


NAMES = ("forward_kl", "jeffreys", *PHI)


# --- Sides ----------------------------------------------------------------------------------------


def dense_sides(s: Tensor, t: Tensor, T: float, teacher_share: float = 1.0) -> Sides:
    """Both sides of logits [n, V]; the target is ``s + teacher_share (t - s)``."""
    student, teacher = _from_largest(s), _from_largest(t)
    gap = _difference(teacher, student)
    if teacher_share != 1:
        impossible = torch.isneginf(student)  # for the student, and so for the target
        gap = (teacher_share * gap).masked_fill(impossible, 0)
        largest = (student + gap).amax(-1, keepdim=True)
        gap = (gap - largest).masked_fill(impossible, 0)
        teacher = student + gap
    return Sides(student / T, teacher / T, gap / T, torch.zeros_like(student[:, :1]))


def top_k_sides(
    s: Tensor,  # [n, V]
    ids: Tensor,  # [n, K], anything where the log-probability is -inf
    log_probs: Tensor,  # [n, K]
    tail: Tail,
    T: float,
    off: Tensor | None = None,  # [n, 1]
) -> tuple[Sides, Tensor, Tensor]:
    """K outcomes and the rest as one more; each column's outcome, and its share in it, [n, V].

    A row with a foreign or a repeated id is NaN. ``off`` times ``1 - max p`` is added to the
    teacher's rest, up to half of it.
    """
    (n, K), V = ids.shape, s.shape[-1]
    padding = torch.isneginf(log_probs)
    foreign = ~padding & ((ids < 0) | (ids >= V))
    columns = ids.masked_fill(padding | foreign, V)  # a column that is dropped again
    numbers = torch.arange(K, device=s.device).expand(n, K)
    outcome = torch.full((n, V + 1), K, device=s.device).scatter(-1, columns, numbers)[:, :V]
    in_rest = outcome == K

    x = _from_largest(s) / T
    outside = x.masked_fill(~in_rest, -torch.inf)
    rest = outside.logsumexp(-1, keepdim=True)
    share = outside.masked_fill(torch.isneginf(rest), 0).softmax(-1).masked_fill(~in_rest, 1)
    listed = x.gather(-1, columns.clamp(max=V - 1)).masked_fill(padding, -torch.inf)
    student = _from_largest(torch.cat((listed, rest), -1))

    missing = torch.zeros_like(rest)
    if tail == "zero":  # the teacher is renormalised over its ids
        rest_t = torch.zeros_like(rest)
    else:
        # 1 - sum p = (1 - p_1) - the others, of which the bracket is exact where p_1 is near 1
        first = numbers == log_probs.argmax(-1, keepdim=True)
        others = log_probs.exp().masked_fill(first, 0).sum(-1, keepdim=True)
        but_first = -torch.expm1(log_probs.amax(-1, keepdim=True))
        left = but_first - others
        nothing = (left < 0) | ~in_rest.any(-1, keepdim=True)
        if off is not None:
            left = left + (off * but_first).clamp(-left.abs() / 2, left.abs() / 2)
        rest_t, missing = left.masked_fill(nothing, 0), left.masked_fill(~nothing, 0)
    teacher = _from_largest(torch.cat((log_probs, rest_t.log()), -1))

    ordered = columns.sort(-1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < V)
    poisoned = (foreign.any(-1) | repeated.any(-1))[:, None]
    gap = _difference(teacher, student).masked_fill(poisoned, torch.nan)
    if tail == "zero":  # a teacher without a single id asks for nothing
        empty = padding.all(-1, keepdim=True)
        teacher, gap = torch.where(empty, student, teacher), gap.masked_fill(empty, 0)
    return Sides(student, teacher, gap, missing), outcome, share


def outcome_logits(z: Tensor, table: Tensor, count: int, T: float) -> Tensor:  # [n, count]
    """Logits of outcomes, each ``T log sum exp(z / T)`` over the columns of its own."""
    member = table[: z.shape[-1]] == torch.arange(count, device=z.device)[:, None]  # [count, V]
    x = _from_largest(z) / T
    return T * x[:, None, :].masked_fill(~member, -torch.inf).logsumexp(-1)


def columns_of_outcomes(
    z: Tensor, of_outcomes: Tensor, table: Tensor, T: float
) -> tuple[Tensor, Tensor]:
    """Each column's outcome, and its share in it, [n, V]; a column alone is all of its own."""
    outcome = table[: z.shape[-1]].long().expand(z.shape)
    apart = _difference(_from_largest(z), of_outcomes.gather(-1, outcome))
    return outcome, (apart / T).exp()


def _from_largest(x: Tensor) -> Tensor:
    return x - x.amax(-1, keepdim=True)


def _difference(y: Tensor, x: Tensor) -> Tensor:
    """``y - x``, 0 where both are -inf."""
    return (y - x).masked_fill(torch.isneginf(x) & torch.isneginf(y), 0)
