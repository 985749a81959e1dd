"""The divergences, term by term: one function for every path that holds log-probabilities.

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

from typing import assert_never

import torch
from torch import Tensor

from sad_kernels.objective import Divergence, Tail


def divergence_terms(
    divergence: Divergence,
    beta: float,
    log_q: Tensor,  # student
    log_p: Tensor,  # teacher, same shape
) -> tuple[Tensor, Tensor]:
    """Return ``f`` and ``h`` of every outcome, with ``0 log 0 = 0``.

    A NaN among the log-probabilities also gives 0: whoever sums the terms poisons that row.
    """
    match divergence:
        case "forward_kl":
            p = log_p.exp()
            return _zero_nan(p * (log_p - log_q)), -p
        case "reverse_kl":
            f = _zero_nan(log_q.exp() * (log_q - log_p))
            return f, f
        case "jsd":
            over_q, over_p = _over_mixture(1 - beta, log_q, log_p)
            h = _zero_nan(over_q.mul_(log_q.exp())).mul_(1 - beta)
            return _zero_nan(over_p.mul_(log_p.exp())).mul_(beta).add_(h), h
        case "skew_forward_kl":
            _, over_p = _over_mixture(1 - beta, log_q, log_p)
            f = _zero_nan(over_p * log_p.exp())
            return f, _zero_nan(over_p.add_(log_q).exp_()).mul_(beta - 1)
        case "skew_reverse_kl":
            over_q, _ = _over_mixture(beta, log_q, log_p)
            f = _zero_nan(over_q * log_q.exp())
            return f, f - _zero_nan(over_q.add_(log_q).exp_()).mul_(beta)
        case _:
            assert_never(divergence)


def _over_mixture(share: float, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``log(q/m)`` and ``log(p/m)`` for the mixture ``m = share q + (1 - share) p``.

    Both are taken relative to the larger of p and q: nothing underflows, and the logarithm's
    argument stays between the smaller share and 1.
    """
    gap = log_q - log_p
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
