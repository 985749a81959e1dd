"""What is done to one tile of logits: device functions that the kernels of ``rows.py`` share.

Logits are fp32 from the load on, and every exponent is taken of a difference: the row's maximum is
subtracted first, then comes ``1 / T``. Folding both into one multiply-add would lose what a large
common offset hides.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # where maxima start: -inf - -inf would be NaN

# Divergences
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)
SKEW_FORWARD_KL = tl.constexpr(3)
SKEW_REVERSE_KL = tl.constexpr(4)

LOG2_TINY = tl.constexpr(-150.0)  # log2 of a probability that is 0 in fp32
LOG2_RATIO_MAX = tl.constexpr(
    60.0
)  # log2 of the largest ratio of two probabilities of which both count

# Temperatures: 1 and 2 save an exponential per element
ANY = tl.constexpr(0)
ONE = tl.constexpr(1)
TWO = tl.constexpr(2)


@triton.jit
def fast_log2(x):
    """Of a normal number x > 0, within 3 ulps, near 1 too; fewer instructions than tl.log2.

    The polynomial's relative error is 2.6e-8 on the mantissas, 2/3 to 4/3 (Lawson's fit, degree 8).
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & ~0x7FFFFF  # times 2^23
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1
    p = 0.202786641 * f + -0.222221178
    p = p * f + 0.201799191
    p = p * f + -0.236786523
    p = p * f + 0.288711326
    p = p * f + -0.360789569
    p = p * f + 0.480895972
    p = p * f + -0.721346541
    p = p * f + 1.44269505
    return exponent.to(tl.float32) * (1 / (1 << 23)) + p * f


@triton.jit
def tanh(x):
    """``tanh`` within 2 ulps, and its derivative, also where little of it is left.

    A polynomial (Cephes) near 0, where ``1 - 2 / (e^2x + 1)`` cancels. Far from 0 the derivative
    ``1 - tanh^2`` cancels instead, and is ``rest (2 - rest)`` of the ``rest`` that tanh lacks to 1.
    """
    square = x * x
    near = square * -5.70498872745e-3 + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    size = tl.abs(x)
    rest = 2 / (tl.exp2(size * (2 * LOG2_E)) + 1)
    far = 1 - rest
    far = tl.where(x < 0, -far, far)
    is_near = size < 0.625
    slope = tl.where(is_near, 1 - near * near, rest * (2 - rest))
    return tl.where(is_near, near, far), slope


@triton.jit
def rounded_product(x, factor):
    """``x * factor``, which no compiler may fuse with the subtraction of a maximum that follows.

    The maximum is a product that was rounded. Less an unrounded one, it would leave a remainder at
    the maximum itself: e^remainder in place of 1, and probabilities above 1.
    """
    zero = tl.zeros_like(x)
    return tl.fma(x, factor + zero, zero)


@triton.jit
def finish(
    x, columns, bias, scale, cap, mask,
    MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Products to logits: bias, scale, softcap, in this order; and the softcap's derivative."""
    if HAS_BIAS:
        if MASKED:
            x += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
        else:
            x += tl.load(bias + columns).to(tl.float32)
    if HAS_SCALE:
        x = rounded_product(x, scale)
    slope = x
    if HAS_CAP:
        capped, slope = tanh(x / cap)
        x = rounded_product(capped, cap)
    return x, slope


@triton.jit
def load_logits(
    row, columns, V, bias, scale, cap,
    MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """The logits of one row at ``columns``, in fp32, -inf past the vocabulary; as ``finish``."""
    if MASKED:
        mask = columns < V
        x = tl.load(row + columns, mask=mask, other=0.0).to(tl.float32)
        x, slope = finish(x, columns, bias, scale, cap, mask, True, HAS_BIAS, HAS_SCALE, HAS_CAP)
        x = tl.where(mask, x, float("-inf"))
    else:
        x = tl.load(row + columns).to(tl.float32)
        x, slope = finish(
            x, columns, bias, scale, cap, columns, False, HAS_BIAS, HAS_SCALE, HAS_CAP
        )
    return x, slope


@triton.jit
def load_target(
    s, row, columns, V, bias, scale, cap, share,
    MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
    MIXED: tl.constexpr,
):  # fmt: skip
    """What the student's logits ``s`` are compared with: the teacher's, or a mixture of both.

    The mixture is an explicit fma, so that every kernel gets the same bits.
    """
    t, _ = load_logits(row, columns, V, bias, scale, cap, MASKED, HAS_BIAS, HAS_SCALE, HAS_CAP)
    if MIXED:
        t = tl.fma(t, share + tl.zeros_like(t), s * (1 - share))
    return t


@triton.jit
def exponentials(x, inv_T, T_CASE: tl.constexpr):
    """``exp(x / T)`` and ``exp(x)`` of x <= 0, with ``inv_T = log2(e) / T``."""
    exp_T = tl.exp2(x * inv_T)
    if T_CASE == ONE:
        return exp_T, exp_T
    if T_CASE == TWO:
        return exp_T, exp_T * exp_T
    return exp_T, tl.exp2(x * LOG2_E)


@triton.jit
def mixture_parts(a, b, beta, DIVERGENCE: tl.constexpr, HAS_LOG: tl.constexpr):
    """Of a mixture's divergence, from ``a = log2 q`` and ``b = log2 p``: q, and the two products
    that ``mixture_terms`` makes ``f`` and ``h`` of; of their sums it makes the sums.

    Relative to q, with the gap bounded: a share below 2^-60 of the other adds nothing, and what is
    left neither overflows nor takes p along when q underflows. No branch and no comparison, which
    cost these kernels more than exponentials do. A ratio to m is an exponential where its logarithm
    is there (HAS_LOG): a division takes six instructions.
    """
    q_log = tl.maximum(
        tl.maximum(a, b - LOG2_RATIO_MAX), LOG2_TINY
    )  # finite, so that no -inf meets another
    gap = tl.maximum(b - q_log, -LOG2_RATIO_MAX)
    share = beta if DIVERGENCE == SKEW_REVERSE_KL else 1 - beta  # of q in the mixture
    ratio = tl.exp2(gap)
    mix = share + (1 - share) * ratio  # m/q
    log_mix = fast_log2(mix)
    q = tl.exp2(q_log)
    if DIVERGENCE == JSD:
        return q, q * ratio * (gap - log_mix), q * log_mix  # p log2 p/m, q log2 m/q
    elif DIVERGENCE == SKEW_FORWARD_KL:
        p = q * ratio
        over_m = q * tl.exp2(gap - log_mix) if HAS_LOG else p / mix
        return q, p * (gap - log_mix), over_m  # p log2 p/m, pq/m
    else:
        return q, q * log_mix, q * tl.exp2(-log_mix)  # q log2 m/q, qq/m


@triton.jit
def mixture_terms(u, v, beta, DIVERGENCE: tl.constexpr):
    """``f`` and ``h`` of ``_divergence.py``, in nats, from what ``mixture_parts`` returns."""
    if DIVERGENCE == JSD:
        h = (1 - beta) * -LN_2 * v
        f = beta * LN_2 * u + h
    elif DIVERGENCE == SKEW_FORWARD_KL:
        f = u * LN_2
        h = (beta - 1) * v
    else:
        f = u * -LN_2
        h = f - beta * v
    return f, h


@triton.jit
def divergence_terms(a, b, beta, DIVERGENCE: tl.constexpr):
    """``f`` and ``h`` of ``_divergence.py``, in nats, from ``a = log2 q`` and ``b = log2 p``.

    ``0 log 0 = 0``: a weight of 0 adds 0, whatever it multiplies.
    """
    if DIVERGENCE == FORWARD_KL:
        p = tl.exp2(b)
        return tl.where(p > 0, p * (b - a), 0.0) * LN_2, -p
    elif DIVERGENCE == REVERSE_KL:
        q = tl.exp2(a)
        f = tl.where(q > 0, q * (a - b), 0.0) * LN_2
        return f, f
    else:
        _, u, v = mixture_parts(a, b, beta, DIVERGENCE, True)
        return mixture_terms(u, v, beta, DIVERGENCE)
