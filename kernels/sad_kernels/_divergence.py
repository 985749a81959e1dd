"""The terms of each divergence and of its gradient, from log-probabilities: one function by name.

Any divergence here is a sum over outcomes, ``D = sum_v f(p_v, q_v)``, of a teacher ``p`` and a
student ``q = softmax(z)``. With ``h_v = q_v df/dq_v`` its gradient is

    dD/dz_v = h_v - q_v sum_u h_u

and adding ``c q_v`` to ``h_v`` changes nothing, so constants are dropped from ``df/dq``. With
``m`` the mixture of the divergence (see ``Objective``) and ``w`` the student's share of it:

==================  =======================================  ===========================
divergence          f                                        h
==================  =======================================  ===========================
forward_kl          p log(p/q)                               -p
reverse_kl          q log(q/p)                               q log(q/p)
jsd                 beta p log(p/m) + (1-beta) q log(q/m)    (1-beta) q log(q/m)
skew_forward_kl     p log(p/m)                               -(1-beta) p q/m
skew_reverse_kl     q log(q/m)                               q log(q/m) - beta q^2/m
==================  =======================================  ===========================

Sources: Hinton et al. 1503.02531, MiniLLM 2306.08543, GKD 2306.13649, DistiLLM 2402.03898.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sad_kernels._divergence_table import missing
from sad_kernels.objective import Tail

Terms = Callable[[float, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(beta, log q, log p) -> ``f`` and ``h`` of every outcome, which may be one tensor.

The log-probabilities are read only. ``0 log 0 = 0``, and a NaN among them gives 0 as well: whoever
sums the terms poisons that row.
"""


def terms_of(divergence: str) -> Terms:
    """The function of ``f`` and ``h`` for a name of the table of divergences."""
    if divergence not in TERMS:
        raise missing(divergence, f"{__name__}.TERMS")
    return TERMS[divergence]


def _forward_kl(beta: float, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    return _zero_nan(p * (log_p - log_q)), -p


def _reverse_kl(beta: float, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    f = _zero_nan(log_q.exp() * (log_q - log_p))
    return f, f


def _jsd(beta: float, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    over_q, over_p = _over_mixture(1 - beta, log_q, log_p)
    h = _zero_nan(over_q.mul_(log_q.exp())).mul_(1 - beta)
    return _zero_nan(over_p.mul_(log_p.exp())).mul_(beta).add_(h), h


def _skew_forward_kl(beta: float, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    _, over_p = _over_mixture(1 - beta, log_q, log_p)
    f = _zero_nan(over_p * log_p.exp())
    # p q/m = exp(log(p/m) + log q): as one exponential it cannot overflow on the way.
    return f, _zero_nan(over_p.add_(log_q).exp_()).mul_(beta - 1)


def _skew_reverse_kl(beta: float, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    over_q, _ = _over_mixture(beta, log_q, log_p)
    f = _zero_nan(over_q * log_q.exp())
    return f, f - _zero_nan(over_q.add_(log_q).exp_()).mul_(beta)


TERMS: dict[str, Terms] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
}


def _over_mixture(share: float, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log(q/m)`` and ``log(p/m)`` for the mixture ``m = share q + (1 - share) p``.

    Both are taken relative to the larger of p and q: nothing underflows, and the logarithm's
    argument stays between the smaller share and 1.
    """
    gap = log_q - log_p
    # m = larger * (its share + the other share * e^-|gap|)
    larger_share = torch.where(gap >= 0, gap.new_tensor(share), gap.new_tensor(1 - share))
    log_m = gap.abs().neg_().exp_().mul_(1 - larger_share).add_(larger_share).log_()
    return gap.clamp(max=0).sub_(log_m), gap.neg_().clamp_(max=0).sub_(log_m)


def _zero_nan(x: Tensor) -> Tensor:
    return x.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def teacher_outcomes(
    log_probs: Tensor,  # [n, K], -inf is padding
    tail: Tail,
    vocab: int,
) -> tuple[Tensor, Tensor]:
    """The teacher's log-probabilities at its ids [n, K], and of everything else [n]."""
    if tail == "zero":
        return log_probs.log_softmax(1), torch.full_like(log_probs[:, 0], -torch.inf)
    # In float64, because log_probs are given: what is left of 1 is known better than to 1e-7.
    rest = (1 - log_probs.double().exp().sum(1)).clamp(min=0)
    covers_all = (log_probs != -torch.inf).sum(1) == vocab
    return log_probs, rest.where(~covers_all, 0).log().to(log_probs.dtype)
