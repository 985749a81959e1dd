"""Part of ``merge``: a top-k teacher's K ids and everything else, put into the sums of a row.

``statistics`` leaves the columns with an id out, see ``rows.py``; their logits are read here. The
divergence is one of K + 1 outcomes, and its gradient is known for all columns once it is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sad_kernels._triton.rows import (
    PAD_ID,
    RowSums,
    product,
)
from sad_kernels._triton.tile import (
    FORWARD_KL,
    JEFFREYS,
    LOG2_E,
    LOWEST,
    REVERSE_KL,
    TVD,
    bounded_ratio,
    kl_term,
    mixture_row,
    mixture_terms,
    mixture_value,
    sign,
    to_logits,
    value_weights,
    variation_terms,
)


@triton.jit
def add_top_k(
    sums, rows, counts, student, picked_ptr, N,
    ids_ptr, log_p_ptr, log_rest_ptr, inside_ptr, outside_ptr, K, V, inv_T, beta,
    BLOCK_K: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Add the logits at a top-k teacher's ids to the sums, which leave them out until here.

    Returns the sums and the divergence [ROWS], and stores its gradient: at the ids
    (``inside_ptr``) and of everything else (``outside_ptr``). ``m_t`` and ``d_t`` become maximum
    and sum of the columns without an id, which ``gradient`` needs.
    """
    # The ids, and which of them can be used: a repeated id, or one outside [0, V), is foreign and
    # poisons its row; padding is not present.
    k = tl.arange(0, BLOCK_K)
    at = rows[:, None] * K + k[None, :]
    given = counts[:, None] & (k < K)[None, :]
    ids = tl.load(ids_ptr + at, mask=given, other=PAD_ID)
    log_p = tl.load(log_p_ptr + at, mask=given, other=float("-inf"))
    repeated = ids == tl.load(ids_ptr + at - 1, mask=given & (k > 0)[None, :], other=-2)
    present = given & (log_p != float("-inf"))
    foreign = present & ((ids < 0) | (ids >= V) | repeated)
    usable = present & (ids >= 0) & (ids < V)

    # The student's logits there.
    if picked_ptr is None:
        z = tl.load(student.ptr + ids, mask=usable, other=0.0).to(tl.float32)
        z, _ = to_logits(z, ids, student, usable, True)
    else:  # some are of other shards
        picked = picked_ptr + (1 + k).to(tl.int64)[None, :] * N + rows[:, None]
        z = tl.load(picked, mask=usable, other=0.0)
    z = tl.where(usable, z, float("-inf"))
    top_z = tl.max(z, 1)
    best = sums.best
    if FLAGS.COMPUTE_METRICS:
        # Where an id is above all other columns, ``best`` may be any id, and is not looked at.
        best_id = tl.min(tl.where(z == top_z[:, None], ids, 0x7FFFFFFF), 1).to(tl.float32)
        first_of_both = tl.minimum(best, best_id)
        best = tl.where(top_z > sums.m, best_id, tl.where(top_z == sums.m, first_of_both, best))

    # All sums relative to the maximum of all columns.
    m_t, d_t = sums.m, sums.d  # of the columns without ids; from here on the others are in
    m = tl.maximum(m_t, top_z)
    move = m_t - m
    x = z - m[:, None]
    x_T, move_T = x * inv_T, move * inv_T
    total = d_t * tl.exp2(move_T) + tl.sum(tl.exp2(x_T), 1)
    d_1, S, E = sums.d_1, sums.S, sums.E
    if FLAGS.COMPUTE_CE:
        once = usable & ~repeated
        x = tl.where(once, x, float("-inf"))
        exp_1, decay_1 = tl.exp2(x * LOG2_E), tl.exp2(move * LOG2_E)
        if FLAGS.SMOOTH:
            S += sums.count * move + tl.sum(tl.where(once, x, 0.0), 1)
        if FLAGS.COMPUTE_METRICS:
            E = (E + d_1 * move) * decay_1 + tl.sum(product(exp_1, x), 1)
        d_1 = d_1 * decay_1 + tl.sum(exp_1, 1)

    # The divergence over K + 1 outcomes, the last of which is everything else.
    log_rest = tl.load(log_rest_ptr + rows, mask=counts, other=0.0)
    x_rest = move_T + tl.log2(d_t)
    IS_KL: tl.constexpr = FLAGS.DIVERGENCE == FORWARD_KL or FLAGS.DIVERGENCE == REVERSE_KL
    if IS_KL or FLAGS.DIVERGENCE == JEFFREYS or FLAGS.DIVERGENCE == TVD:
        log_total = tl.log2(total)
        a, a_rest = x_T - log_total[:, None], x_rest - log_total
        b, b_rest = log_p * LOG2_E, log_rest * LOG2_E
        if FLAGS.DIVERGENCE == TVD:
            x_top, log_p_top = likeliest_outcome(x_T, x_rest, log_p, log_rest)
            top = sign(tl.exp2(x_top - log_total) - tl.exp2(log_p_top * LOG2_E))
            f, h = variation_terms(a, b, top[:, None])
            f_rest, h_rest = variation_terms(a_rest, b_rest, top)
        elif FLAGS.DIVERGENCE == JEFFREYS:
            h, h_rest = forward_kl_slopes(x_T, x_rest, log_p, log_rest)
            reverse = (1 - beta) * kl_term(a, b, REVERSE_KL)
            reverse_rest = (1 - beta) * kl_term(a_rest, b_rest, REVERSE_KL)
            f = beta * kl_term(a, b, FORWARD_KL) + reverse
            f_rest = beta * kl_term(a_rest, b_rest, FORWARD_KL) + reverse_rest
            h, h_rest = beta * h + reverse, beta * h_rest + reverse_rest
        else:
            f = kl_term(a, b, FLAGS.DIVERGENCE)
            f_rest = kl_term(a_rest, b_rest, FLAGS.DIVERGENCE)
            h, h_rest = f, f_rest
            if FLAGS.DIVERGENCE == FORWARD_KL:
                h, h_rest = forward_kl_slopes(x_T, x_rest, log_p, log_rest)
        kd = tl.sum(f, 1) + f_rest
        expectation = tl.sum(h, 1) + h_rest
        inside = h - tl.exp2(a) * expectation[:, None]
        outside = tl.where(d_t > 0, h_rest / d_t, 0.0) - expectation * tl.exp2(move_T) / total
    else:
        q, q_column = tl.exp2(x_T) / total[:, None], tl.exp2(move_T) / total
        kd, inside, outside = top_k_mixture(
            x_T, x_rest, q, q_column * d_t, log_p, log_rest, beta, FLAGS.DIVERGENCE
        )
        outside *= q_column

    # A teacher without any outcome, as of a row of padding with tail "zero", teaches nothing.
    teaches = (tl.max(log_p, 1) != float("-inf")) | (log_rest != float("-inf"))
    kd = tl.where(teaches, kd, 0.0)
    tl.store(inside_ptr + at, tl.where(teaches[:, None], inside, 0.0), mask=given)
    tl.store(outside_ptr + rows, tl.where(teaches, outside, 0.0), mask=counts)
    # NaN and inf of a total, and NaN of the teacher, poison the row.
    given_p = tl.where(present, log_p, 0.0)
    kd += 0 * total + 0 * tl.sum(given_p, 1)
    kd = tl.where(tl.max(foreign.to(tl.int32), 1) > 0, float("nan"), kd)
    sums = RowSums(
        m=m, m_t=m_t, d=sums.d, d_1=d_1, S=S, count=sums.count, E=E, A=sums.A, C=sums.C, B=sums.B,
        d_t=d_t, best=best, best_t=sums.best_t, t_at_best=sums.t_at_best,
    )  # fmt: skip
    return sums, kd


@triton.jit
def likeliest_outcome(x, x_rest, log_p, log_rest):
    """The student's likeliest outcome: its ``x``, and the teacher's log-probability there."""
    top = tl.max(x, 1)
    log_p_top = tl.max(tl.where(x == top[:, None], log_p, float("-inf")), 1)
    return tl.maximum(top, x_rest), tl.where(x_rest > top, log_rest, log_p_top)


@triton.jit
def forward_kl_slopes(x, x_rest, log_p, log_rest):
    """``r0 q - p`` of all outcomes: 0 at the student's likeliest, where ``r0 = p/q``.

    Its own gradient is then what the others' add up to, and not a difference of numbers near 1.
    """
    x_top, log_p_top = likeliest_outcome(x, x_rest, log_p, log_rest)
    scale = tl.exp2(log_p_top * LOG2_E - x_top)
    is_top = (x == x_top[:, None]) & (log_p == log_p_top[:, None])
    h = tl.where(is_top, 0.0, tl.exp2(x) * scale[:, None] - tl.exp2(log_p * LOG2_E))
    is_top = (x_rest == x_top) & (log_rest == log_p_top)
    return h, tl.where(is_top, 0.0, tl.exp2(x_rest) * scale - tl.exp2(log_rest * LOG2_E))


@triton.jit
def top_k_mixture(x, x_rest, q, q_rest, log_p, log_rest, beta, DIVERGENCE: tl.constexpr):
    """A mixture's divergence over the ids' outcomes [ROWS, K] and all others as one [ROWS].

    ``x`` and ``q`` are the student's logits, in bits, and probabilities; ``log_p`` and ``log_rest``
    are the teacher's, in nats. Returns the divergence, its gradient by the ids' logits, and the
    gradient by any other logit over its probability.
    """
    # The outcome which ratios count from. The teacher may rule it out.
    x_top, log_p_top = likeliest_outcome(x, x_rest, log_p, log_rest)
    q_top = tl.maximum(tl.max(q, 1), q_rest)
    ratio = tl.exp2(log_p_top * LOG2_E) / q_top
    bounded = bounded_ratio(ratio, beta, DIVERGENCE)
    log_p_top = tl.where(ratio == bounded, log_p_top, tl.log(bounded * q_top))
    row = mixture_row(bounded, beta, DIVERGENCE, False)
    row_of_ids = mixture_row(bounded[:, None], beta, DIVERGENCE, False)

    gap = (log_p - log_p_top[:, None]) * LOG2_E - tl.maximum(x - x_top[:, None], LOWEST)
    gap_rest = (log_rest - log_p_top) * LOG2_E - tl.maximum(x_rest - x_top, LOWEST)
    phi, term = mixture_terms(gap, row_of_ids, beta, DIVERGENCE, True)
    phi_rest, term_rest = mixture_terms(gap_rest, row, beta, DIVERGENCE, True)
    expectation = tl.sum(q * phi, 1) + q_rest * phi_rest
    p, p_rest = tl.exp2(log_p * LOG2_E), tl.exp2(log_rest * LOG2_E)
    weights = value_weights(p, q, row_of_ids, DIVERGENCE)
    weight_rest = value_weights(p_rest, q_rest, row, DIVERGENCE)
    weighted = tl.sum(weights * term, 1) + weight_rest * term_rest
    value = mixture_value(weighted, expectation, row, beta, DIVERGENCE)
    return value, q * (phi - expectation[:, None]), phi_rest - expectation
