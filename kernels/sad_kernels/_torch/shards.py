"""Row sums of a vocabulary that is split over processes: those of all shards from each one's own.

``merge_sums`` gathers the statistics of some rows, once, and puts them together by the rules of
``statistics.py``: a shard is to a row what a block is, and all of them move to the largest maximum.
Every process does the same arithmetic with the same numbers, in the order of the vocabulary, so the
sums, and the losses that follow, are the same on all of them to the bit. ``merge_terms`` does so
for the sums of the second reading, which a mixture and the total variation have.

Only what the objective asks for is sent: 7 numbers per row for a CE with smoothing and metrics, 13
beside a dense teacher with the forward KL, 9 + K beside a top-k teacher.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from sad_kernels._torch.statistics import Comparison, RowStatistics, label_columns
from sad_kernels.vocab import gathered

Parts = dict[str, Tensor]
"""Name of a statistic -> [shards, rows]."""


def merge_sums(statistics: RowStatistics, rows: slice) -> None:
    """Replace the sums of the first reading over this shard's columns by those over all."""
    spec, sums = statistics.spec, statistics.at(rows)
    assert spec.shard is not None
    own = _own_sums(statistics, rows)
    at_ids = _own_logits_at_ids(statistics, rows)  # [K, rows]
    everyone = gathered(torch.cat([torch.stack(list(own.values())), at_ids]), spec.shard.group)
    parts: Parts = dict(zip(own, everyone.unbind(1), strict=False))

    merged = _merged(parts, statistics.temperature, spec.objective.teacher_share != 1)
    for name, value in merged.items():
        if name == "best":
            statistics.best[rows] = value.long()
        elif name == "teacher_best":
            statistics.teacher_best[rows] = value.long()
        else:
            getattr(sums, name).copy_(value)
    if len(at_ids) and statistics.topk is not None:
        logits = statistics.topk.logits[rows]  # none of rows without a teacher
        logits.copy_(everyone[:, len(own) :].amax(0).T[: len(logits)])


def merge_terms(statistics: RowStatistics, rows: slice) -> None:
    """The same for the two sums of the second reading."""
    shard, sums = statistics.spec.shard, statistics.at(rows)
    assert shard is not None
    both = gathered(torch.stack([sums.value, sums.expectation]), shard.group)
    value, expectation = _in_order(both)
    sums.value.copy_(value)
    sums.expectation.copy_(expectation)


def _own_sums(statistics: RowStatistics, rows: slice) -> dict[str, Tensor]:
    """This shard's statistics of the rows that the objective asks for, by name, [rows] each."""
    spec, targets = statistics.spec, statistics.targets
    sums, compared = statistics.at(rows), _comparisons(statistics, rows)
    weights = [how.kl_weights for how in compared if how.kl_weights is not None]
    by_class = targets.soft is not None or (
        targets.labels is not None and spec.objective.label_smoothing > 0
    )
    top_k = statistics.topk is not None and len(compared) > 0
    dense = statistics.topk is None and len(compared) > 0
    needed = {
        "maximum": True,
        "total_1": spec.compute_ce,
        "weighted": spec.compute_ce and spec.compute_metrics,
        "plain": spec.compute_ce and by_class,
        "plain_weight": spec.compute_ce and by_class,
        "total": dense,
        "teacher_maximum": dense,
        "teacher_total": dense,
        "difference": dense,
        "at_best": dense and any(how.counts_from_best for how in compared),
        "cross": dense and any(on_forward > 0 for on_forward, _ in weights),
        "cross_student": dense and any(on_reverse > 0 for _, on_reverse in weights),
        "rest_maximum": top_k,
        "rest_total": top_k,
    }
    own = {name: getattr(sums, name) for name, is_needed in needed.items() if is_needed}
    if spec.compute_metrics:
        own["best"] = statistics.best[rows].to(sums.total)  # exact below 2^24
        if dense:
            own["teacher_best"] = statistics.teacher_best[rows].to(sums.total)
    if spec.compute_ce and targets.labels is not None:
        # Known to one shard: the others' 0 adds nothing.
        here = slice(spec.first, spec.first + spec.width)
        _, is_here = label_columns(targets.labels[rows], here)
        own["label_logit"] = sums.label_logit.where(is_here, 0)
    return own


def _own_logits_at_ids(statistics: RowStatistics, rows: slice) -> Tensor:  # [K, rows]
    """The student's logits at a top-k teacher's ids, -inf for those of other shards; K may be 0."""
    like = statistics.sums.total[rows]
    if statistics.topk is None or not _comparisons(statistics, rows):
        return like.new_empty(0, len(like))
    logits = statistics.topk.logits[rows]
    out = like.new_zeros(logits.shape[1], len(like))
    out[:, : len(logits)] = logits.T
    return out


def _comparisons(statistics: RowStatistics, rows: slice) -> list[Comparison]:
    """The divergences that some of the rows are compared by."""
    return [
        how
        for group, how in statistics.groups
        if how is not None and group.start < rows.stop and rows.start < group.stop
    ]


def _merged(parts: Parts, temperature: float, has_gap: bool) -> dict[str, Tensor]:
    """The statistics over all columns, by name, [rows] each: see the table in ``statistics.py``."""
    # No difference of maxima exceeds 0; a shard without columns has -1e30, and decays to 0.
    maximum = parts["maximum"].amax(0)
    owner = parts["maximum"].argmax(0)  # the leftmost
    move = parts["maximum"] - maximum
    r = (move / temperature).exp()
    out = {"maximum": maximum}
    for name in ("best", "at_best"):
        if name in parts:
            out[name] = _of(owner, parts[name])
    if "label_logit" in parts:
        out["label_logit"] = _in_order(parts["label_logit"])

    if "total_1" in parts:
        r_1 = move.exp()
        out["total_1"] = _in_order(parts["total_1"] * r_1)
        if "weighted" in parts:
            out["weighted"] = _in_order((parts["weighted"] + parts["total_1"] * move) * r_1)
    if "plain" in parts:  # each shard's sum has moved for its own columns
        out["plain"] = _in_order(parts["plain"] + parts["plain_weight"] * move)
        out["plain_weight"] = _in_order(parts["plain_weight"])

    if "rest_total" in parts:
        rest_maximum = parts["rest_maximum"].amax(0)
        r_rest = ((parts["rest_maximum"] - rest_maximum) / temperature).exp()
        out |= {
            "rest_maximum": rest_maximum,
            "rest_total": _in_order(parts["rest_total"] * r_rest),
        }
    if "teacher_total" not in parts:
        return out

    d, d_t = parts["total"], parts["teacher_total"]
    teacher_maximum = parts["teacher_maximum"].amax(0)
    move_t = parts["teacher_maximum"] - teacher_maximum
    r_t = (move_t / temperature).exp()
    out |= {
        "teacher_maximum": teacher_maximum,
        "total": _in_order(d * r),
        "teacher_total": _in_order(d_t * r_t),
        "difference": _in_order(parts["difference"] * r + d_t * (r_t - r)),
    }
    if "teacher_best" in parts:
        owner_t = parts["teacher_maximum"].argmax(0)
        out["teacher_best"] = _of(owner_t, parts["teacher_best"])
    if "cross" in parts:
        moved = (parts["cross"] + d_t * (move_t - move)) * r_t
        out["cross"] = _in_order(moved.where(r_t > 0, 0))
    if "cross_student" in parts:
        change = out["at_best"] - parts["at_best"]  # of what it counts from
        change = (change if has_gap else change + move).nan_to_num(0.0, 0.0, 0.0)
        moved = (parts["cross_student"] + d * change) * r
        out["cross_student"] = _in_order(moved.where(r > 0, 0))
    return out


def _of(owner: Tensor, x: Tensor) -> Tensor:  # [rows], [shards, rows] -> [rows]
    return x.gather(0, owner[None]).squeeze(0)


def _in_order(x: Tensor) -> Tensor:  # [shards, ...] -> [...]
    """The sum over the shards, from left to right."""
    return reduce(torch.add, x.unbind(0))
