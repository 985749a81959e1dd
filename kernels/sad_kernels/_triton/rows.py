"""What the four kernels over rows of logits share: how they work together, constants, helpers.

Every loss and gradient of the package is made of these kernels, each in the file of its name:

``statistics``  reads the logits once, in segments of the vocabulary, one program per row and
                segment, and writes a dozen partial sums for each
``merge``       puts the segments of a row together in their order and finishes its losses
``mixture``     reads once more for the mixtures (JSD, the skews), which need both normalisers;
                ``merge`` runs before it, for the normalisers, and again after it
``gradient``    reads once more and writes the gradient once, in any dtype

Partial sums
------------
A row is always cut into the same segments, whether one program or many work on it, so its bits do
not depend on how many rows come with it, and few rows still fill the machine.

Every sum is kept relative to the running maxima ``m``, and when a maximum moves by ``move = m_old -
m_new``, with ``r = e^(move/T)``, it is rescaled as follows (x = s - m, a and b the two sides of
a KL relative to their own maxima):

====================  ===============================  ====================================
sum over columns      after a move                     gives
====================  ===============================  ====================================
d = sum e^(x/T)       d r                              log-normaliser  log d
S = sum x             S + columns so far * move        smooth term     log d - S/V   (T = 1)
E = sum e^x x         (E + d move) r                   entropy         log d - E/d   (T = 1)
A = sum e^(a/T)(a-b)  (A + d_a (move_a - move_b)) r_a  KL(a||b) = A/(T d_a) - log (d_a/d_b)
B = d_t - d           B r + d_t (r_t - r)              log (d_t/d) = log1p(B/d), and d_t/d - 1
====================  ===============================  ====================================

``B``, of the teacher's total and the student's, is summed up as differences of exponentials: where
both sides nearly agree, what is left of two rounded totals would be rounding.

Lanes
-----
Maxima and sums belong to a thread ("lane"), which takes those of what it has loaded, and the lanes
are put together at the end of a segment: a tile costs no exchange between threads at all. What all
lanes load at once is a *piece*; a tile is one or a few. Of an argmax a lane keeps where its tile
begins, which is read once more in the end.

Top-k teachers
--------------
Beside a top-k teacher ``statistics`` sums up only the columns without an id: the probability of
everything outside the ids then comes without cancellation, and does not underflow beside an id that
stands far above it. Tiles end before the next id, and only pieces are compared with ids, so that
most columns cost what they cost without ids. ``merge``, which reads the K logits anyway, adds them
to every sum.

Offsets and ignored rows
------------------------
Rows are 64-bit offsets, columns 32-bit. Programs of rows that do not count return at once, except
in ``gradient``, where they write zeros without reading.

Weights of rows, and two divergences
------------------------------------
Losses are multiplied by the weights of tokens in ``merge``, gradients in ``gradient``. Where the
divergence's weight is 0 no kernel reads the teacher's row. A choice between two divergences by row
launches every kernel twice, once for each: programs of rows that take the other one return at once
and write nothing.

Weights of classes, and labels that are probabilities
-----------------------------------------------------
CE is ``sum_v a_v (lse - s_v)``, see ``ce.py``. With weights ``S`` is the sum of ``w_v x``, for
labels that are probabilities that of ``a_v x``, and the columns so far are counted with the same
factors. ``merge`` saves ``sum a``, of which the gradient takes a share ``q``.

Shards of a vocabulary
----------------------
Where the columns are split over processes, ``V`` of ``statistics``, ``mixture`` and ``gradient`` is
the number of those that are here, columns and ids count from the first of them, and ``classes`` is
the number of all; labels are columns of the whole vocabulary. ``merge`` has the segments of no
shard before it but the shards themselves, see ``shards.py``, and the whole ``V``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

MASKED_LOGIT = tl.constexpr(-1.2345679e34)
"""Stands for the logit of a column that must not count: e^MASKED_LOGIT is 0, and no logit of 16
bits, nor one that a model has made, is this number."""

PAD_ID = tl.constexpr(2**31 - 1)  # the id of padding: no column, and last in order
ID_CHUNK = tl.constexpr(128)  # ids that first_id_at compares at a time

# Kinds of teachers
NO_TEACHER = tl.constexpr(0)
DENSE = tl.constexpr(1)
TOP_K = tl.constexpr(2)

# Partial sums, [PARTIALS, segments, N]
MAXIMUM = tl.constexpr(0)
TOTAL = tl.constexpr(1)  # d at T
TOTAL_1 = tl.constexpr(2)  # d at 1
PLAIN = tl.constexpr(3)  # S
WEIGHTED = tl.constexpr(4)  # E
BEST = tl.constexpr(5)  # argmax, or near it an id that is no smaller; exact in fp32 below 2^24
TEACHER_MAXIMUM = tl.constexpr(6)
TEACHER_TOTAL = tl.constexpr(7)
TEACHER_BEST = tl.constexpr(8)
CROSS = tl.constexpr(9)  # A of a KL; of Jeffreys' two that of KL(p || q)
CROSS_REVERSE = tl.constexpr(11)  # and that of KL(q || p)
DIFFERENCE = tl.constexpr(10)  # B of what is no mixture
TEACHER_AT_BEST = tl.constexpr(9)  # the teacher's logit at BEST, for a mixture
COUNT = tl.constexpr(6)  # columns in S, beside a TOP_K teacher or with weights of classes
PARTIALS = 12
SHARD_COUNT = tl.constexpr(12)  # columns in S of a shard, whatever its teacher, see ``shards.py``

# What the gradient needs, [SAVED, N], in the numbering above for the first three
SAVED_TEACHER_MAXIMUM = tl.constexpr(3)
SAVED_TEACHER_TOTAL = tl.constexpr(4)
# forward_kl: B/d_t; reverse_kl, jeffreys: A/d; a mixture: sum_v q_v phi_v; tvd: the same of signs
EXPECTATION = tl.constexpr(5)
REFERENCE = tl.constexpr(6)  # the teacher's logit that a mixture's ratios count from
RATIO = tl.constexpr(7)  # and p/q there
TOTALS = tl.constexpr(6)  # jeffreys and tvd: B/d_t
TOP_SIGN = tl.constexpr(7)  # tvd: the sign of q - p at the student's argmax
MASS = tl.constexpr(3)  # sum of a, with weights of classes, which have no teacher beside them
SAVED = 8

# Parts of the loss, [PARTS, N]
PARTS = 7  # ce, kd, z, correct, agree, entropy, lse


class Flags(NamedTuple):
    """What a kernel is compiled for, one argument ``FLAGS`` of all kernels.

    The fields are plain numbers that kernels compare with the constants above and of ``tile.py``.
    """

    TEACHER: int  # NO_TEACHER, DENSE or TOP_K
    DIVERGENCE: int
    T_CASE: int  # whether the temperature is 1, 2 or any
    COMPUTE_CE: bool = False  # CE and z-loss; in ``gradient`` only where a weight is not 0
    SMOOTH: bool = False  # each class has a share of CE: label smoothing, or probabilities
    COMPUTE_METRICS: bool = False  # correct, agree, entropy
    TWO_PASSES: bool = False  # a dense teacher's divergence takes a second reading


class RowSums(NamedTuple):
    """The sums of whole rows, [ROWS] each, named as above."""

    m: Any
    m_t: Any
    d: Any
    d_1: Any
    S: Any
    count: Any
    E: Any
    A: Any
    C: Any
    B: Any
    d_t: Any
    best: Any  # the student's argmax, a number in fp32
    best_t: Any
    t_at_best: Any  # the teacher's logit at ``best``


@triton.jit
def first_id_at(ids, K, column):
    """The position of the first of the K ascending ``ids`` that is not below ``column``."""
    position = 0
    for k in range(0, K, ID_CHUNK):
        at = k + tl.arange(0, ID_CHUNK)
        below = tl.load(ids + at, mask=at < K, other=PAD_ID) < column
        position += tl.sum(below.to(tl.int32), 0)
    return position


@triton.jit
def id_at(ids, K, position):
    """The id at ``position``; past the last one ``PAD_ID``, which no column reaches."""
    return tl.load(ids + position, mask=position < K, other=PAD_ID)


@triton.jit
def rescale_cross(total, cross, move, other_move, inv_T):
    """The cross sum ``A`` after both maxima have moved, with 0 * inf = 0."""
    decay = tl.exp2(move * inv_T)
    return tl.where(decay > 0, (cross + total * (move - other_move)) * decay, 0.0)


@triton.jit
def rescale_difference(total_t, difference, decay_t, decay):
    """The difference of totals ``B`` after both maxima have moved; ``total_t`` is the teacher's."""
    return difference * decay + total_t * (decay_t - decay)


@triton.jit
def to_lanes(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """View a tile as its threads have loaded it: [BLOCK] -> [pieces, LANES, VECTOR]."""
    return tl.reshape(x, [x.shape[0] // (LANES * VECTOR), LANES, VECTOR])


@triton.jit
def lane_sum(x):
    """Sum within each thread: [pieces, LANES, VECTOR] -> [LANES]."""
    return tl.sum(tl.sum(x, 2), 0)


@triton.jit
def lane_max(x):
    """Maximum within each thread: [pieces, LANES, VECTOR] -> [LANES]."""
    return tl.max(tl.max(x, 2), 0)


@triton.jit
def over_lanes(x):
    """Broadcast a number per lane over a tile: [LANES] -> [1, LANES, 1]."""
    return x[None, :, None]


@triton.jit
def product(weights, x):
    """``weights * x``, and 0 where the weight is 0, even of inf and NaN."""
    return weights * tl.where(weights > 0, x, 0.0)
