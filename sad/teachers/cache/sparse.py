r"""Sparse targets: K of a teacher's V probabilities per token, and the bytes that hold them.

Two ways to choose the K ids, with ``p = softmax(t / T)`` the teacher's distribution:

==========  =======================================================================================
sampled     ``systematic_sample``: K distinct ids, each drawn with probability
            ``min(1, c p_v)`` and weighing ``p_v`` over that probability. Weights sum to 1 and the
            expectation of the weight of v is p_v, so the gradient of the forward KL,
            ``q - w``, is right in the mean. Other divergences are not linear in p and are not.
top-k       ``top_k``: the K most likely ids, with the exact mass of all others ("tail"), at each
            temperature that a student may ask for.
==========  =======================================================================================

A *record* is the bytes of a position, a dictionary of tensors with equal leading dimensions:

===========  ===================  =================================================================
``ids_lo``   uint16 [..., K]      the lower 16 bits of each id
``ids_hi``   uint8 [..., K/2]     the next 4 bits, two ids to the byte; absent if V <= 65,536
``logw``     uint16 [..., K]      ``-2048 log w``, rounded; 65,535 is padding
``tail``     float32 [..., T]     mass outside the K ids, one column per temperature; absent if
                                  there is none (sampled)
===========  ===================  =================================================================

So a log-weight errs by at most 1/4096 nats (2.4e-4), and weights below e^-32 = 1.3e-14 are
padding. A tail computed from the rounded weights would be far off where it is small; it is stored,
and ``decode`` scales the K weights to the mass ``1 - tail``: what they sum to is exact, and each of
them errs by at most 4.9e-4, relative. A position without a target is a record of padding alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from sad.errors import UnfitError

Record = dict[str, Tensor]
Kind = Literal["sampled", "topk"]

STEPS_PER_NAT = 2048
PADDING = 65_535
"""The ``logw`` of a slot that holds no id."""
MAX_VOCAB = 2**20
"""Ids have 20 bits."""

_LEAST_LOG_WEIGHT = -(PADDING - 1) / STEPS_PER_NAT  # -32 nats
_MARGIN = 1e-9  # far above the rounding of a float64 sum, far below what a weight is rounded to


def systematic_sample(
    probs: Tensor,  # [n, V]
    k: int,
    uniform: Tensor,  # [n], in [0, 1)
) -> tuple[Tensor, Tensor]:
    r"""Draw K distinct ids per row, each with probability ``min(1, c p_v)``, and weigh them.

    For a fixed number of ids these inclusion probabilities minimise the variance
    ``sum_v p_v^2 / pi_v`` of the weights ``w_v = p_v / pi_v``. The j most likely ids have
    ``pi = 1`` and keep their probabilities (the *head*): j is the smallest number with
    ``p_(j+1) (K - j) < R``, R the mass of all others (the *tail*). The other ``m = K - j`` ids are
    drawn systematically, at the points ``(u + i) R/m``, i = 0 .. m-1, of the tail's cumulative
    sum, with one uniform number ``u`` per row. None can be met twice, since none is as long as
    ``R/m``, which each of them weighs.

    Returns ``ids`` [n, K], int64, and ``weights`` [n, K], float64, that sum to 1 (rows of ``probs``
    need not, quite: they are scaled): the head by falling probability, then the tail by id. A row
    with fewer than K ids of positive probability holds all of them exactly, and then *padding* of
    id 0 and weight 0; so for K > V. A row depends on its own probabilities and its own uniform
    number alone. Memory: two float64 tensors of ``probs``' shape; call it on few rows at a time.

    Raises ``UnfitError`` for probabilities that are NaN, infinite, negative, or all 0, and
    ``ValueError`` for arguments of the wrong shape or range.
    """
    _require_rows("probs", probs, k)
    n, V = probs.shape
    if uniform.shape != (n,):
        raise ValueError(
            f"uniform must have one number per row ({n}), got shape {tuple(uniform.shape)}; "
            "draw torch.rand(n, dtype=torch.float64)"
        )
    if not bool(((uniform >= 0) & (uniform < 1)).all()):
        raise ValueError("uniform must lie in [0, 1), got a number outside; draw torch.rand")
    p = probs.double()
    top = min(k, V)
    values, ids = p.topk(top, dim=1)
    p = p.scatter(1, ids, 0.0)
    beyond = p.sum(1)  # the mass of the ids beyond the first K
    _require_probabilities(p, values, beyond)

    # R_j = the mass outside the first j ids: from the small end, so that a small rest is exact.
    slot = torch.arange(top, device=p.device)
    rest = values.flip(1).cumsum(1).flip(1) + beyond[:, None]  # R_0 .. R_(K-1)
    tail_begins = values * (k - slot) < rest * (1 - _MARGIN)
    if top == k:  # the last slot alone may hold any id: it weighs all that is left
        tail_begins[:, -1] = beyond > 0
    in_head = tail_begins.cumsum(1) == 0
    j = in_head.sum(1, keepdim=True)

    p = p.scatter(1, ids, torch.where(in_head, 0.0, values))
    cumulated = p.cumsum(1)
    R = cumulated[:, -1:]
    m = (k - j).clamp(min=1)
    points = (uniform.double()[:, None] + (slot - j).clamp(min=0)) / m * R
    # The last point may round to R, which no id's interval holds.
    points = torch.minimum(points, torch.nextafter(R, torch.zeros_like(R)))
    drawn = torch.searchsorted(cumulated, points, right=True).clamp_(max=V - 1)

    ids = torch.where(in_head, ids, drawn)
    weights = torch.where(in_head, values, R / m)
    weights = weights / weights.cumsum(1)[:, -1:]
    ids = torch.where(weights > 0, ids, 0)
    return _padded(ids, k, 0), _padded(weights, k, 0.0)


def top_k(
    logits: Tensor,  # [n, V]
    k: int,
    temperatures: Sequence[float] = (1.0,),
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The K most likely ids of each row, and the mass of all others at each temperature.

    Returns ``ids`` [n, K], int64, by falling probability; ``log_probs`` [n, K], float64, at
    temperature 1; and ``tail`` [n, len(temperatures)], float64: ``sum p_v^(1/T) / sum_all p^(1/T)``
    over the v that are not among the ids, which is summed over these themselves and so has all its
    digits where it is small. With it the distribution at T is known exactly on the K ids: it is
    proportional to ``p_v^(1/T)`` there and sums to ``1 - tail_T``.

    Ids with a probability below e^-32 have no place in a record: their slots are *padding*, of id
    0 and -inf, and their mass is the tail's. So for K > V, and for columns of -inf. Memory: three
    float64 tensors of the logits' shape; call it on few rows at a time.

    Raises ``UnfitError`` for logits with NaN, +inf or rows of -inf alone, and ``ValueError`` for
    arguments of the wrong shape or range.
    """
    _require_rows("logits", logits, k)
    if not all(T > 0 for T in temperatures):
        raise ValueError(f"temperatures must be above 0, got {tuple(temperatures)}; leave that out")
    z = logits.double()
    z = z - z.amax(1, keepdim=True)
    total = z.exp().sum(1, keepdim=True)
    _refuse_rows(
        ~total.isfinite(), "teacher's logits must be finite or -inf", "NaN, inf or no finite logit"
    )
    values, ids = z.topk(min(k, z.shape[1]), dim=1)
    log_probs = values - total.log()
    kept = log_probs > _LEAST_LOG_WEIGHT
    others = z.scatter(1, ids, torch.where(kept, -torch.inf, values))
    tails = []
    for T in temperatures:
        mass = (others / T).exp().sum(1)
        tails.append(mass / (mass + (values / T).exp().where(kept, 0.0).sum(1)))
    tail = torch.stack(tails, 1) if tails else z.new_empty(len(z), 0)
    ids, log_probs = torch.where(kept, ids, 0), torch.where(kept, log_probs, -torch.inf)
    return _padded(ids, k, 0), _padded(log_probs, k, -torch.inf), tail


def encode(
    ids: Tensor,  # [..., K], integers
    log_weights: Tensor,  # [..., K]
    tail: Tensor | None,  # [..., T]
    vocab: int,
) -> Record:
    """The record of these ids, with the logarithms of their weights at temperature 1.

    ``-inf`` marks padding, whose id may be anything. ``tail`` is None for weights that sum to 1
    (sampled ones).

    Raises ``UnfitError`` for a vocabulary of more than 2^20 ids, and ``ValueError`` for an id
    outside the vocabulary, a weight that is NaN or above 1, a tail outside [0, 1] and shapes that
    do not fit.
    """
    _require_vocab(vocab)
    if ids.shape != log_weights.shape:
        raise ValueError(
            f"ids and log_weights must have one shape, got {tuple(ids.shape)} and "
            f"{tuple(log_weights.shape)}; pass one weight per id"
        )
    log_weights = log_weights.double()
    if not bool((log_weights <= 1e-3).all()):  # NaN compares false
        raise ValueError("log_weights must be at most 0, got NaN or a weight above 1")
    steps = (log_weights * -STEPS_PER_NAT).round().clamp(0, PADDING)
    used = steps < PADDING
    ids = torch.where(used, ids, 0).to(torch.int32)
    if ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < vocab):
        raise ValueError(f"ids must lie in [0, {vocab:,}), got one outside; cut the padded head")
    record = {"ids_lo": (ids & 0xFFFF).to(torch.uint16)}
    if vocab > 2**16:
        hi = _even(ids >> 16)
        record["ids_hi"] = (hi[..., ::2] | (hi[..., 1::2] << 4)).to(torch.uint8)
    record["logw"] = steps.to(torch.int32).to(torch.uint16)
    if tail is not None:
        if tail.shape[:-1] != ids.shape[:-1]:
            raise ValueError(
                f"tail must have the leading dimensions of the ids, {tuple(ids.shape[:-1])}, got "
                f"{tuple(tail.shape)}; pass one column per temperature"
            )
        if not bool(((tail >= 0) & (tail <= 1)).all()):
            raise ValueError("tail must lie in [0, 1], got a mass outside")
        record["tail"] = tail.float()
    return record


def decode(
    record: Mapping[str, Tensor], column_of_tail: int = 0, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Ids [..., K], int64, and log-probabilities [..., K], float32, for a ``TeacherTopK``.

    For top-k targets at a ``temperature`` other than 1, ``column_of_tail`` says where its tail is
    among those that were stored; the weights are then raised to 1 / temperature. The weights of a
    position sum to 1 less that tail, or to 1 without one. Padding has id 0 and -inf.
    """
    ids = record["ids_lo"].to(torch.int64)
    if "ids_hi" in record:
        hi = record["ids_hi"].to(torch.int64)
        hi = torch.stack((hi & 15, hi >> 4), -1).flatten(-2)[..., : ids.shape[-1]]
        ids = ids | (hi << 16)
    steps = record["logw"].to(torch.int32)
    log_weights = steps.double() / (-STEPS_PER_NAT * temperature)
    log_weights = log_weights.masked_fill(steps == PADDING, -torch.inf)
    total = log_weights.logsumexp(-1, keepdim=True)
    total = torch.where(total.isneginf(), 0.0, total)  # padding alone stays -inf
    if "tail" in record:
        total = total - torch.log1p(-record["tail"][..., column_of_tail, None].double())
    return ids, (log_weights - total).float()


def padding_record(n: int, k: int, vocab: int, temperatures: int = 0) -> Record:
    """The records of ``n`` positions without a target; ``temperatures`` columns of tail, none for
    0."""
    ids = torch.zeros(n, k, dtype=torch.int64)
    tail = torch.zeros(n, temperatures) if temperatures else None
    return encode(ids, torch.full((n, k), -torch.inf), tail, vocab)


def record_bytes(kind: Kind, k: int, vocab: int, temperatures: int = 1) -> int:
    """Bytes per position: 4.5 for each of K ids (4 if V <= 65,536), and 4 per temperature of top-k.

    At K = 64 and 65,536 < V <= 2^20 these are 288 for sampled targets, and 292 for top-k at one
    temperature. Raises ``UnfitError`` for a vocabulary of more than 2^20 ids.
    """
    _require_vocab(vocab)
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be sampled or topk, got {kind!r}; choose one of these")
    hi = (k + 1) // 2 if vocab > 2**16 else 0
    return 4 * k + hi + (4 * temperatures if kind == "topk" else 0)


def _padded(values: Tensor, k: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, k - values.shape[1]), value=fill)


def _even(values: Tensor) -> Tensor:
    """Values with an even number of columns: with a zero at the end if it was odd."""
    return torch.nn.functional.pad(values, (0, values.shape[-1] % 2))


def _require_rows(name: str, values: Tensor, k: int) -> None:
    if values.ndim != 2 or values.shape[1] < 1:
        raise ValueError(f"{name} must be [rows, V], got shape {tuple(values.shape)}; reshape it")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}; 64 is a good number")


def _require_vocab(vocab: int) -> None:
    if not 1 <= vocab <= MAX_VOCAB:
        raise UnfitError(
            f"vocabulary of a sparse teacher cache must have at most {MAX_VOCAB:,} ids, got "
            f"{vocab:,}; cache hidden states instead"
        )


def _require_probabilities(p: Tensor, values: Tensor, beyond: Tensor) -> None:
    """``values`` are the largest of a row, taken out of ``p``; ``beyond`` is the others' sum."""
    total = values[:, 0] + beyond  # topk takes NaN for the largest
    wrong = ~total.isfinite() | (total <= 0) | (p.amin(1) < 0) | (values[:, -1] < 0)
    _refuse_rows(wrong, "teacher's probabilities must be finite and >= 0", "others, or zeros alone")


def _refuse_rows(wrong: Tensor, expectation: str, got: str) -> None:
    if bool(wrong.any()):
        count = int(wrong.sum())
        raise UnfitError(
            f"{expectation}, got {got} at {count:,} of {wrong.numel():,} positions; check the "
            "teacher's dtype (teacher_dtype: bfloat16 does not overflow)"
        )
