# Longer than other files: the whole specification is one file, to be read from top to bottom.
"""Reference definitions of the public functions in eager PyTorch: the specification.

Read this file to learn what is computed, and the others to learn how. Nothing here is optimised
and nothing is shared with the code it judges: whole [N, V] tensors, one expression per formula,
gradients from autograd. float64 inputs are computed in float64, which makes this the oracle of the
tests; anything narrower is computed in float32. Results have the dtype they were computed in.

The functions take the arguments of their namesakes except ``impl`` and ``chunk_bytes``, which do
not change what is computed. Nor does ``logits``, the format in which a kernel keeps logits: it is
taken and ignored. Two conventions hold everywhere:

* Rows whose label is ``ignore_index`` are removed *before* any arithmetic, so they may hold
  anything, NaN included.
* A value that makes no sense (a label outside the vocabulary, a teacher's id that occurs twice,
  NaN, +inf, a row of only -inf) turns its own row's loss into NaN and leaves the other rows alone.
  Its gradient is then meaningless.

Notation as in ``objective.py``: ``N`` tokens, ``V`` valid vocabulary, ``s`` and ``t`` the logits of
student and teacher, ``T`` temperature, ``p = softmax(t / T)``, ``q = softmax(s / T)``,
``q1 = softmax(s)``. In the private functions ``n`` counts the rows that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from sad_kernels._divergence_table import DIVERGENCES, missing
from sad_kernels.objective import (
    DistillOutput,
    Divergence,
    Head,
    Objective,
    Tail,
    Teacher,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    require_valid_vocab,
)
from sad_kernels.outcomes import Outcomes

Reduction = Literal["mean", "sum", "none"]

# --- Losses --------------------------------------------------------------------------------------


def cross_entropy(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...] classes, or [..., V] their probabilities
    *,
    weight: Tensor | None = None,  # [V]
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """``CE + z_loss * lse^2`` per row of ``s = softcap(logit_scale * logits)``."""
    require_valid_vocab(valid_vocab, logits.shape[-1])
    shape, V = logits.shape[:-1], valid_vocab or logits.shape[-1]
    soft = labels.dtype.is_floating_point
    keep = _kept(None if soft else labels, ignore_index, logits)
    s = _transformed(_rows(logits, keep)[:, :V].to(_math_dtype(logits)), logit_scale, softcap)
    y = _rows(labels, keep)[:, :V].detach().to(s.dtype) if soft else labels.flatten()[keep]
    loss, mass = _ce_loss(s, y, weight, label_smoothing, z_loss)
    return _reduced(loss, keep, shape, reduction, num_items, mass)


def linear_cross_entropy(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    labels: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    class_weight: Tensor | None = None,  # [V]
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    valid_vocab: int | None = None,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
    logits: str = "exact",  # ignored
) -> Tensor:
    """``cross_entropy`` of ``softcap(logit_scale * (hidden @ weight.T + bias))``, classes only."""
    head = Head(weight, bias, logit_scale, softcap, valid_vocab)
    keep = _kept(labels, ignore_index, hidden)
    s = _logits(_rows(hidden, keep), head, head.vocab_size, _math_dtype(hidden, weight))
    y = labels.flatten()[keep]
    loss, mass = _ce_loss(s, y, class_weight, label_smoothing, z_loss)
    return _reduced(loss, keep, labels.shape, reduction, num_items, mass)


def kl_div(
    student_logits: Tensor,  # [..., V]
    teacher_logits: Tensor,  # [..., V]
    *,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    scale_t2: bool = True,
    labels: Tensor | None = None,  # [...], only says which rows count
    ignore_index: int = -100,
    valid_vocab: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
    outcomes: Outcomes | None = None,
) -> Tensor:
    """The divergence between ``p`` and ``q`` per row, times ``T^2`` unless ``scale_t2=False``.

    With ``outcomes`` of the sums of ``p`` and ``q`` over each; ``valid_vocab`` is the student's.
    """
    objective = Objective(
        temperature=temperature, scale_t2=scale_t2, divergence=divergence, beta=beta
    )
    common = valid_vocab if outcomes is None else None
    teacher = TeacherLogits(teacher_logits, common, teacher_logit_scale, teacher_softcap)
    V = _common_vocab(student_logits.shape[-1], valid_vocab, teacher, outcomes)
    keep = _kept(labels, ignore_index, student_logits)
    s = _rows(student_logits, keep)[:, :V].to(_math_dtype(student_logits))
    kd, _ = _kd(_transformed(s, logit_scale, softcap), teacher, keep, objective, None, outcomes)
    if labels is not None:
        kd = kd * _one_or_nan(labels.flatten()[keep], V)
    return _reduced(kd, keep, student_logits.shape[:-1], reduction, num_items)


def distill_loss(
    student_logits: Tensor,  # [..., V]
    labels: Tensor | None,  # [...]; None: every row counts, without a CE
    teacher: Teacher | None,
    objective: Objective,
    *,
    num_items: int | Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    token_weights: Tensor | None = None,  # [...] or [N], on CE and z-loss
    kd_token_weights: Tensor | None = None,  # [...] or [N], on KD; None: the weights above
    other_rows: Tensor | None = None,  # [...] or [N] bool: compared by the other divergence
    softcap: float | None = None,
    logit_scale: float = 1.0,
    outcomes: Outcomes | None = None,
) -> DistillOutput:
    """The sum of ``ce_weight * CE + kd_weight * KD + z_loss * lse^2`` over ``num_items``.

    Without a teacher, which takes ``kd_weight=0``, ``kd`` and ``agree`` are 0; without labels,
    which takes ``ce_weight=0``, ``ce`` and ``correct`` are. With ``outcomes`` KD is that of the
    sums of ``p`` and ``q`` over each, a ``TeacherTopK`` gives those of outcomes, and both sides
    agree if their choices are of one outcome.
    """
    keep = _kept(labels, ignore_index, student_logits)
    V = _common_vocab(student_logits.shape[-1], None, teacher, outcomes)
    s = _rows(student_logits, keep)[:, :V].to(_math_dtype(student_logits))
    s = _transformed(s, logit_scale, softcap)
    on_ce, on_kd = _token_weights(token_weights, kd_token_weights, keep, s)
    rows = _distilled(s, labels, teacher, keep, objective, on_ce, on_kd, other_rows, outcomes)
    return _output(rows, keep, student_logits.shape[:-1], reduction, num_items)


def linear_distill_loss(
    hidden: Tensor,  # [..., D_s]
    head: Head,
    labels: Tensor | None,  # [...]
    teacher: Teacher | None,
    objective: Objective,
    *,
    num_items: int | Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    token_weights: Tensor | None = None,  # [...] or [N]
    kd_token_weights: Tensor | None = None,  # [...] or [N]
    other_rows: Tensor | None = None,  # [...] or [N] bool
    logits: str = "exact",  # ignored
    outcomes: Outcomes | None = None,
) -> DistillOutput:
    """``distill_loss`` of ``head(hidden)``."""
    keep = _kept(labels, ignore_index, hidden)
    V = _common_vocab(head.weight.shape[0], head.valid_vocab, teacher, outcomes)
    s = _logits(_rows(hidden, keep), head, V, _math_dtype(hidden, head.weight))
    on_ce, on_kd = _token_weights(token_weights, kd_token_weights, keep, s)
    rows = _distilled(s, labels, teacher, keep, objective, on_ce, on_kd, other_rows, outcomes)
    return _output(rows, keep, hidden.shape[:-1], reduction, num_items)


# --- One row -------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """The loss and the metrics of every kept row, [n] each, token weights included."""

    loss: Tensor  # the only one with a gradient
    ce: Tensor
    kd: Tensor
    z: Tensor
    correct: Tensor
    agree: Tensor
    entropy: Tensor
    lse: Tensor


def _distilled(
    s: Tensor,  # [n, V]
    labels: Tensor | None,  # of all N rows, as what follows but for the weights
    teacher: Teacher | None,
    keep: Tensor,  # [N] bool, True n times
    objective: Objective,
    on_ce: Tensor,  # [n]
    on_kd: Tensor,  # [n]
    other_rows: Tensor | None,
    outcomes: Outcomes | None,
) -> _Rows:
    lse = s.logsumexp(-1)
    student_choice = s.argmax(-1)  # the first of equal logits
    poison, ce, correct = torch.ones_like(lse), torch.zeros_like(lse), torch.zeros_like(lse)
    if labels is not None:
        y = labels.flatten()[keep]
        poison = _one_or_nan(y, s.shape[-1])
        ce, correct = _ce(s, y, objective.label_smoothing), (student_choice == y).to(s.dtype)
    elif objective.ce_weight != 0:
        raise ValueError(
            f"ce_weight must be 0 without labels, got {objective.ce_weight}; "
            "pass labels or set ce_weight=0"
        )

    # Rows without a weight are removed before their teacher's row is read, which may hold anything.
    kd, agree = torch.zeros_like(lse), torch.zeros_like(lse)
    if teacher is not None:
        compared = on_kd != 0
        other = None if other_rows is None else other_rows.reshape(-1)[keep][compared]
        some = keep.masked_scatter(keep, compared)
        value, teacher_choice = _kd(s[compared], teacher, some, objective, other, outcomes)
        choice = student_choice[compared]
        choice = choice if outcomes is None else outcomes.student[choice]
        same = (choice == teacher_choice).to(s.dtype)
        kd, agree = kd.masked_scatter(compared, value), agree.masked_scatter(compared, same)
    elif objective.kd_weight != 0:
        raise ValueError(
            f"kd_weight must be 0 without a teacher, got {objective.kd_weight}; "
            "pass a teacher or set kd_weight=0"
        )

    ce, kd, z = _times(on_ce, ce), _times(on_kd, kd), _times(on_ce, lse.square())
    # An empty sum is a zero that hangs on the graph: weights of 0 then still give a gradient of 0.
    loss = s[:, :0].sum(-1)
    for weight, term in (
        (objective.ce_weight, ce),
        (objective.kd_weight, kd),
        (objective.z_loss, z),
    ):
        if weight != 0:  # a weight of 0 switches even an infinite term off
            loss = loss + weight * term
    log_q1 = s.log_softmax(-1)
    entropy = -_expectation(log_q1, log_q1)
    return _Rows(loss * poison, ce, kd, z, correct, agree, entropy, lse)


def _times(weight: Tensor, term: Tensor) -> Tensor:  # [n]
    """``weight * term``, 0 for a weight of 0 whatever the term."""
    return weight * term.where(weight != 0, 0)


def _ce_loss(
    s: Tensor,  # [n, V]
    y: Tensor,  # [n] classes, or [n, V] their probabilities
    class_weight: Tensor | None,  # [>= V]
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor | None]:  # [n], []
    """Cross-entropy as an objective of its own, which also validates the two options.

    Returns the row losses, and what their mean divides by if that is not the number of rows: the
    sum of the classes' weights at the labels, as in torch.
    """
    Objective(ce_weight=1.0, kd_weight=0.0, label_smoothing=label_smoothing, z_loss=z_loss)
    mass = None
    if class_weight is not None:
        class_weight = class_weight[: s.shape[-1]].detach().to(s.dtype)
        if not y.dtype.is_floating_point:
            mass = class_weight[y[(y >= 0) & (y < s.shape[-1])].long()].sum()
    ce = _ce(s, y, label_smoothing, class_weight)
    return ce + z_loss * s.logsumexp(-1).square() if z_loss else ce, mass


def _ce(
    s: Tensor,  # [n, V]
    y: Tensor,  # [n] classes, or [n, V] their probabilities
    label_smoothing: float,
    class_weight: Tensor | None = None,  # [V]
) -> Tensor:  # [n]
    """``-sum_v a_v log q1_v`` with ``a_v = w_v ((1 - eps) l_v + eps / V)``, ``0 * inf = 0``.

    ``l`` are the probabilities ``y``, or ``[v = y]``, and ``w`` the weights of the classes.
    """
    V, soft = s.shape[-1], y.dtype.is_floating_point
    targets = y if soft else one_hot(y.long().clamp(0, V - 1), V).to(s.dtype)
    a = (1 - label_smoothing) * targets + label_smoothing / V
    if class_weight is not None:
        a = class_weight * a
    ce = -(a * s.log_softmax(-1).where(a != 0, 0)).sum(-1)
    return ce if soft else ce * _one_or_nan(y, V)


def _kd(
    s: Tensor,  # [n, V]
    teacher: Teacher,  # of all N rows
    keep: Tensor,  # [N] bool, True n times
    objective: Objective,
    other_rows: Tensor | None = None,  # [n] bool
    outcomes: Outcomes | None = None,
) -> tuple[Tensor, Tensor]:
    """The divergence after T^2, [n], and the teacher's argmax, or its outcome, [n]."""
    T, V = objective.temperature, s.shape[-1]
    log_q = (s / T).log_softmax(-1)
    if outcomes is not None:
        _require_comparable(outcomes, objective)
        log_q, V = _log_sums(log_q, outcomes.student, outcomes.count), outcomes.count
    if isinstance(teacher, TeacherTopK):
        if objective.teacher_share != 1:
            raise ValueError(
                f"teacher_share must be 1 for a sparse teacher, got {objective.teacher_share}; "
                "its logits are not known"
            )
        for name in objective.divergences:
            if teacher.tail == "zero" and DIVERGENCES[name].needs_full_support:
                raise ValueError(
                    f"tail must be 'bucket' for {name}, got 'zero'; its value for a teacher that "
                    "gives the other tokens no mass is infinite"
                )
        ids, log_probs = _rows(teacher.ids, keep).long(), _rows(teacher.log_probs, keep)
        log_probs = log_probs.to(_math_dtype(s, log_probs))
        log_p, log_q = _top_k_outcomes(ids, log_probs, teacher.tail, log_q)
        best = (log_probs == log_probs.amax(-1, keepdim=True)) & ~torch.isneginf(log_probs)
        choice = ids.masked_fill(~best, V).amin(-1)
    else:
        if isinstance(teacher, TeacherHidden):
            dtype = _math_dtype(s, teacher.hidden, teacher.head.weight)
            V_t = V if outcomes is None else teacher.head.vocab_size
            t = _logits(_rows(teacher.hidden, keep), teacher.head, V_t, dtype).detach()
        else:
            V_t = V if outcomes is None else teacher.valid_vocab
            t = _rows(teacher.logits, keep)[:, :V_t].to(_math_dtype(s, teacher.logits))
            t = _transformed(t, teacher.logit_scale, teacher.softcap)
        u = objective.teacher_share
        if u != 1:  # TAID: a target between student and teacher, without a gradient
            t = (1 - u) * s.detach() + u * t
        log_p, choice = (t / T).log_softmax(-1), t.argmax(-1)
        if outcomes is not None:
            log_p = _log_sums(log_p, outcomes.teacher, outcomes.count)
            choice = outcomes.teacher[choice]
    value = _either_divergence(objective, log_p, log_q, other_rows)
    return objective.kd_scale * value, choice


def _either_divergence(
    objective: Objective,
    log_p: Tensor,  # [n, outcomes]
    log_q: Tensor,
    other_rows: Tensor | None,  # [n] bool
) -> Tensor:  # [n]
    """The objective's divergence, in ``other_rows`` its other one: each row sees but one."""
    other = objective.other_divergence
    if (other is None) != (other_rows is None):
        raise ValueError(
            "other_rows must be given together with the objective's other_divergence, got "
            f"{'no rows' if other_rows is None else 'rows'} and {other!r}; pass both or neither"
        )
    if other is None or other_rows is None:
        return _divergence(objective.divergence, log_p, log_q, objective.beta)
    rest = ~other_rows
    first = _divergence(objective.divergence, log_p[rest], log_q[rest], objective.beta)
    second = _divergence(other, log_p[other_rows], log_q[other_rows], objective.other_beta)
    value = first.new_zeros(other_rows.shape).masked_scatter(rest, first)
    return value.masked_scatter(other_rows, second)


def _divergence(name: str, log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:  # [n]
    if name not in DEFINITIONS:
        raise missing(name, f"{__name__}.DEFINITIONS")
    return DEFINITIONS[name](log_p, log_q, beta)


def _forward_kl(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return _kl(log_p, log_q)


def _reverse_kl(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return _kl(log_q, log_p)


def _jeffreys(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return beta * _kl(log_p, log_q) + (1 - beta) * _kl(log_q, log_p)


def _tvd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)  # torch's subgradient of |0| is 0


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    log_m = _log_mixture(beta, log_p, log_q)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def _skew_forward_kl(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return _kl(log_p, _log_mixture(beta, log_p, log_q))


def _skew_reverse_kl(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return _kl(log_q, _log_mixture(beta, log_q, log_p))


DEFINITIONS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jeffreys": _jeffreys,
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "tvd": _tvd,
}
"""Name -> the divergence of teacher ``p`` and student ``q``, [n], from their log-probabilities."""


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """``KL(a || b) = sum_v a_v (log a_v - log b_v)``, over the last dimension."""
    return _expectation(log_a, log_a, minus=log_b)


def _expectation(log_a: Tensor, value: Tensor, minus: Tensor | None = None) -> Tensor:
    """``sum_v a_v (value_v - minus_v)``, where a term with ``a_v = 0`` is 0 whatever its bracket.

    The bracket is cleared *before* the product: a NaN that is masked afterwards comes back as a NaN
    gradient.
    """
    a = log_a.exp()
    bracket = value.where(a > 0, 0)
    if minus is not None:
        bracket = bracket - minus.where(a > 0, 0)
    return (a * bracket).sum(-1)


def _log_mixture(weight: float, log_a: Tensor, log_b: Tensor) -> Tensor:
    """``log(weight * a + (1 - weight) * b)``, -inf with a gradient of 0 where both are 0."""
    empty = torch.isneginf(log_a) & torch.isneginf(log_b)
    weighted_a = log_a.masked_fill(empty, 0) + math.log(weight)
    weighted_b = log_b.masked_fill(empty, 0) + math.log1p(-weight)
    return torch.logaddexp(weighted_a, weighted_b).masked_fill(empty, -math.inf)


def _top_k_outcomes(
    ids: Tensor,  # [n, K], anything where the log-probability is -inf
    log_probs: Tensor,  # [n, K]
    tail: Tail,
    log_q: Tensor,  # [n, V]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of teacher and student over K tokens and one bucket, both [n, K + 1].

    The bucket holds all other columns: ``p_r = 1 - sum_K p`` and ``q_r``, the sum of q outside K.
    With ``tail="zero"`` the teacher is renormalised over K and ``p_r = 0``; the student never is.
    Where all K are padding there is nothing to compare then: both sides have no mass.
    """
    n, V = log_q.shape
    padding = torch.isneginf(log_probs)
    foreign = ~padding & ((ids < 0) | (ids >= V))
    columns = ids.masked_fill(padding | foreign, V)  # a column that is dropped again
    in_k = torch.zeros(n, V + 1, dtype=torch.bool, device=ids.device).scatter(-1, columns, True)
    in_k = in_k[:, :V]
    ordered = columns.sort(-1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < V)

    if tail == "zero":
        nothing = padding.all(-1, keepdim=True)
        log_probs = (
            log_probs.masked_fill(nothing, 0).log_softmax(-1).masked_fill(padding, -math.inf)
        )
        log_q = log_q.masked_fill(nothing, -math.inf)
        p_rest = log_probs.new_zeros(n)
    else:
        p_rest = (1 - log_probs.exp().sum(-1)).clamp(min=0)
        p_rest = p_rest.masked_fill(in_k.all(-1), 0)  # no column is left, only rounding
    log_p = torch.cat((log_probs, p_rest.log()[:, None]), -1)

    log_q_in = log_q.gather(-1, columns.clamp(max=V - 1)).masked_fill(padding, -math.inf)
    log_q_rest = _logsumexp(log_q.masked_fill(in_k, -math.inf))
    log_q = torch.cat((log_q_in, log_q_rest[:, None]), -1)
    poisoned = foreign.any(-1) | repeated.any(-1)
    return log_p.masked_fill(poisoned[:, None], math.nan), log_q


def _log_sums(log_q: Tensor, table: Tensor, count: int) -> Tensor:  # [n, V] -> [n, count]
    """``log sum of q`` over the columns of each outcome; -inf where it has none or no mass."""
    table = table[: log_q.shape[-1]].long()
    index = table.expand_as(log_q)
    # Relative to each outcome's largest, which carries no gradient: it drops out of the sum.
    top = torch.full_like(log_q[:, :1], -math.inf).expand(-1, count)
    top = top.scatter_reduce(-1, index, log_q.detach(), "amax")
    top = top.masked_fill(torch.isneginf(top), 0)
    empty = torch.zeros_like(log_q[:, :1]).expand(-1, count)
    sums = empty.scatter_add(-1, index, (log_q - top.gather(-1, index)).exp())
    return sums.where(sums != 0, 1).log().where(sums != 0, -math.inf) + top


def _require_comparable(outcomes: Outcomes, objective: Objective) -> None:
    """Raise unless the objective is one that outcomes are compared by."""
    if objective.divergences != ("forward_kl",) or objective.teacher_share != 1:
        raise ValueError(
            "objective must have the forward_kl and teacher_share=1 with outcomes, got "
            f"{' and '.join(objective.divergences)} and {objective.teacher_share}; leave them out"
        )


def _logsumexp(x: Tensor) -> Tensor:
    """``log sum_v exp(x_v)``, -inf with a gradient of 0 where all are -inf."""
    empty = torch.isneginf(x).all(-1)
    return x.masked_fill(empty[:, None], 0).logsumexp(-1).masked_fill(empty, -math.inf)


# --- Plumbing ------------------------------------------------------------------------------------


def _logits(hidden: Tensor, head: Head, V: int, dtype: torch.dtype) -> Tensor:  # [n, V]
    """``softcap(logit_scale * (h W^T + b))``, the first V columns."""
    if head.shard is not None:
        raise ValueError(
            f"head must hold the whole vocabulary, got the shard {head.shard.start} to "
            f"{head.shard.stop}; gather the weight, or call the function of sad_kernels"
        )
    z = hidden.to(dtype) @ head.weight[:V].to(dtype).T
    if head.bias is not None:
        z = z + head.bias[:V].to(dtype)
    return _transformed(z, head.logit_scale, head.softcap)


def _transformed(z: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
    z = logit_scale * z
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _common_vocab(
    width: int, valid_vocab: int | None, teacher: Teacher | None, outcomes: Outcomes | None = None
) -> int:
    """The number of columns that student and teacher are cut to, with outcomes the student."""
    if teacher is None or isinstance(teacher, TeacherTopK) or outcomes is not None:
        return width if valid_vocab is None else valid_vocab
    if isinstance(teacher, TeacherHidden):
        teacher_width, teacher_valid = teacher.head.weight.shape[0], teacher.head.valid_vocab
    else:
        teacher_width, teacher_valid = teacher.logits.shape[-1], teacher.valid_vocab
    said = {v for v in (valid_vocab, teacher_valid) if v is not None} or {width, teacher_width}
    if len(said) > 1 or min(said) > min(width, teacher_width):
        raise ValueError(
            "student and teacher must have one vocabulary, got "
            f"{width} columns with valid_vocab={valid_vocab} and "
            f"{teacher_width} columns with valid_vocab={teacher_valid}; "
            "pass the same valid_vocab on both sides"
        )
    return min(said)


def _math_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of them is, otherwise float32."""
    return reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)


def _kept(labels: Tensor | None, ignore_index: int, x: Tensor) -> Tensor:  # [N] bool
    """Which rows of ``x`` [..., K] count: those that are not ignored, without labels all."""
    if labels is None:
        return torch.ones(x.shape[:-1].numel(), dtype=torch.bool, device=x.device)
    return labels.flatten() != ignore_index


def _token_weights(
    on_ce: Tensor | None, on_kd: Tensor | None, keep: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:  # [n] each
    """The weights of the kept rows, without a gradient: 1 if not given; KD's those of CE."""
    on_ce = torch.ones_like(keep, dtype=s.dtype) if on_ce is None else on_ce.detach().reshape(-1)
    on_kd = on_ce if on_kd is None else on_kd.detach().reshape(-1)
    return on_ce[keep].to(s.dtype), on_kd[keep].to(s.dtype)


def _rows(x: Tensor, keep: Tensor) -> Tensor:
    """The kept rows of [..., K] as [n, K]; the others get a gradient of exactly 0."""
    return x.reshape(keep.shape[0], x.shape[-1])[keep]


def _one_or_nan(y: Tensor, V: int) -> Tensor:
    """1 for a label inside the vocabulary, NaN for one outside, [n]: multiplied into the loss."""
    return torch.where((y >= 0) & (y < V), 1.0, math.nan)


def _nonzero(count: int | Tensor) -> int | Tensor:
    """``count``, or 1 for 0: the mean over no rows is 0, not 0 / 0."""
    return torch.where(count == 0, 1, count) if isinstance(count, Tensor) else count or 1


def _reduced(
    rows: Tensor,  # [n]
    keep: Tensor,  # [N] bool, True n times
    shape: torch.Size,  # of N rows
    reduction: Reduction,
    num_items: int | Tensor | None = None,
    mass: Tensor | None = None,  # [], divides the mean in the place of n
) -> Tensor:
    if num_items is not None and reduction != "mean":
        raise ValueError(
            f"num_items must be None unless reduction='mean', got {num_items} with {reduction!r}; "
            "leave it out"
        )
    match reduction:
        case "none":
            return _restored(rows, keep).reshape(shape)
        case "sum":
            return rows.sum()
        case "mean":
            count = keep.sum() if mass is None else mass
            return rows.sum() / _nonzero(count if num_items is None else num_items)
        case _:
            raise ValueError(
                f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}; choose one of these"
            )


def _restored(rows: Tensor, keep: Tensor) -> Tensor:  # [n] -> [N]
    """The kept rows in their places, 0 in the others."""
    return rows.new_zeros(keep.shape).masked_scatter(keep, rows)


def _output(
    rows: _Rows,
    keep: Tensor,
    shape: torch.Size,
    reduction: Reduction,
    num_items: int | Tensor | None,
) -> DistillOutput:
    loss = _reduced(rows.loss, keep, shape, reduction, num_items)
    ce, kd, z, correct, agree, entropy = (x.sum().detach() for x in rows[1:-1])
    lse = _restored(rows.lse.detach(), keep)
    return DistillOutput(loss, ce, kd, z, keep.sum().to(lse.dtype), correct, agree, entropy, lse)


# --- Exponential moving average ------------------------------------------------------------------


@torch.no_grad()
def ema_update_(shadows: Sequence[Tensor], params: Sequence[Tensor], decay: float | Tensor) -> None:
    """``shadow <- decay * shadow + (1 - decay) * param``, in float64 and rounded once.

    A decay of 1 writes nothing and a decay of 0 copies, exactly and whatever the other side holds.
    """
    decay = float(decay)
    for shadow, param in zip(shadows, params, strict=True):
        if decay == 0:
            shadow.copy_(param)
        elif decay != 1:
            shadow.copy_(decay * shadow.double() + (1 - decay) * param.double())


@torch.no_grad()
def ema_swap_(shadows: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Exchange shadows and parameters in place; a second call restores every bit.

    Equal dtypes are exchanged. A bfloat16 parameter takes its fp32 shadow rounded half away from
    zero; the shadow takes the parameter as its upper 16 bits and keeps its own lower 16, which
    remember the rounding. With ``hi, low`` the two halves of the shadow's bits:

        parameter, shadow <- hi,     (parameter, low)           if low <  0x8000
        parameter, shadow <- up(hi), (down(parameter), low)     if low >= 0x8000

    ``up`` adds 1 to the 15 bits of magnitude and ``down`` subtracts it, as permutations of these
    bits: zero and NaN (above 0x7F80, which is infinity) stay where they are, and infinity, which
    has no next number, becomes 1.
    """
    for shadow, param in zip(shadows, params, strict=True):
        if shadow.dtype == param.dtype:
            old_shadow = shadow.clone()
            shadow.copy_(param)
            param.copy_(old_shadow)
        elif (shadow.dtype, param.dtype) == (torch.float32, torch.bfloat16):
            shadow_bits = shadow.view(torch.int32).long() & 0xFFFF_FFFF
            param_bits = param.view(torch.int16).long() & 0xFFFF
            hi, low = shadow_bits >> 16, shadow_bits & 0xFFFF
            new_param = torch.where(low < 0x8000, hi, _up(hi))
            new_hi = torch.where(low < 0x8000, param_bits, _down(param_bits))
            shadow.view(torch.int32).copy_(_signed(new_hi << 16 | low, bits=32))
            param.view(torch.int16).copy_(_signed(new_param, bits=16))
        else:
            raise TypeError(
                "a shadow must have its parameter's dtype or be float32 over bfloat16, got "
                f"{shadow.dtype} over {param.dtype}; keep the shadow in one of these"
            )


def _up(x: Tensor) -> Tensor:
    """The next bf16 bits away from zero; infinity becomes the smallest magnitude."""
    sign, magnitude = x & 0x8000, x & 0x7FFF
    step = (magnitude >= 1) & (magnitude < 0x7F80)
    return sign | torch.where(magnitude == 0x7F80, 1, magnitude + step)


def _down(x: Tensor) -> Tensor:
    """The inverse of ``_up``."""
    sign, magnitude = x & 0x8000, x & 0x7FFF
    step = (magnitude >= 2) & (magnitude <= 0x7F80)
    return sign | torch.where(magnitude == 1, 0x7F80, magnitude - step.long())


def _signed(x: Tensor, bits: int) -> Tensor:
    """Unsigned integers as two's complement of the same width."""
    return torch.where(x >= 1 << (bits - 1), x - (1 << bits), x)
