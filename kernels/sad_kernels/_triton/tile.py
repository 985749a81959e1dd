"""Mathematics of one tile of logits: device functions shared by the kernels over rows.

Logits are fp32 from the load on, and every exponent is taken of a difference: the row's maximum is
subtracted first, then comes ``1 / T``. Folding both into one multiply-add would lose what a large
common offset hides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # where maxima start: -inf - -inf would be NaN

# Codes of the divergences
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)
SKEW_FORWARD_KL = tl.constexpr(3)
SKEW_REVERSE_KL = tl.constexpr(4)

DIVERGENCE_CODES: dict[str, int] = {
    "forward_kl": FORWARD_KL.value,
    "reverse_kl": REVERSE_KL.value,
    "jsd": JSD.value,
    "skew_forward_kl": SKEW_FORWARD_KL.value,
    "skew_reverse_kl": SKEW_REVERSE_KL.value,
}
"""The divergences that these kernels compute.

A new one also needs a branch in ``divergence_terms`` and, if it takes two passes, in
``require_mixture``, ``mixture_parts`` and ``mixture_terms``: without it the kernels do not compile.
"""

LOG2_TINY = tl.constexpr(-150.0)  # log2 of a probability that is 0 in fp32
LOG2_RATIO_MAX = tl.constexpr(60.0)  # log2 of the largest p/q at which both still count

# Cases of the temperature: 1 and 2 save an exponential per element
ANY = tl.constexpr(0)
ONE = tl.constexpr(1)
TWO = tl.constexpr(2)


@triton.jit
def to_fp32(x):
    """A run-time number in fp32, which a compiler in front of us may hand over in fp64."""
    return tl.full((), x, tl.float32)


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


class LogitsRow(NamedTuple):
    """One row of logits in memory, and what turns its stored products into logits.

    A step that a model does not have is None, and then costs nothing: Triton compiles a kernel for
    which of them are there.
    """

    ptr: Any  # the row's first column, of any floating dtype
    bias: Any  # None, or a pointer to [>= V]
    scale: Any  # None, or a number
    softcap: Any  # None, or a number
    is_read: Any  # None, or 0 for a row that is not read, in whose place there are zeros


@triton.jit
def to_logits(x, columns, row, mask, MASKED: tl.constexpr):
    """Bias, scale and softcap of ``row``, in this order, applied to its products ``x``.

    Returns the logits at ``columns`` and the softcap's derivative there.
    """
    if row.bias is not None:
        if MASKED:
            x += tl.load(row.bias + columns, mask=mask, other=0.0).to(tl.float32)
        else:
            x += tl.load(row.bias + columns).to(tl.float32)
    if row.scale is not None:
        x = rounded_product(x, to_fp32(row.scale))
    slope = x
    if row.softcap is not None:
        cap = to_fp32(row.softcap)
        capped, slope = tanh(x / cap)
        x = rounded_product(capped, cap)
    return x, slope


@triton.jit
def load_logits(row, columns, V, MASKED: tl.constexpr):
    """The logits of one row at ``columns`` in fp32, and the softcap's derivative.

    MASKED: some columns may lie past the vocabulary, where the logit is -inf.
    """
    if MASKED:
        mask = columns < V
        read = mask if row.is_read is None else mask & (tl.zeros_like(columns) < row.is_read)
        x = tl.load(row.ptr + columns, mask=read, other=0.0).to(tl.float32)
        x, slope = to_logits(x, columns, row, mask, True)
        x = tl.where(mask, x, float("-inf"))
    elif row.is_read is not None:
        read = tl.zeros_like(columns) < row.is_read  # one truth for all: loads stay wide
        x = tl.load(row.ptr + columns, mask=read, other=0.0).to(tl.float32)
        x, slope = to_logits(x, columns, row, columns, False)
    else:
        x = tl.load(row.ptr + columns).to(tl.float32)
        x, slope = to_logits(x, columns, row, columns, False)
    return x, slope


@triton.jit
def load_target(s, teacher, share, columns, V, MASKED: tl.constexpr):
    """What the student's logits ``s`` are compared with: the teacher's, or a mixture of both.

    ``share`` is the teacher's in the mixture; None: the teacher alone. The mixture is an explicit
    fma, so that every kernel gets the same bits.
    """
    t, _ = load_logits(teacher, columns, V, MASKED)
    if share is not None:
        share = to_fp32(share)
        t = tl.fma(t, share + tl.zeros_like(t), s * (1 - share))
    return t


class ClassShares(NamedTuple):
    """By how much each class counts in the CE of one row: ``w_v (label l_v + smooth)``."""

    soft: Any  # None, or a pointer to the row's probabilities l
    weight: Any  # None, or a pointer to the weights w
    label: Any  # a number, 1 - eps
    smooth: Any  # a number, eps / V


@triton.jit
def load_shares(shares, columns, V, MASKED: tl.constexpr):
    """The shares of ``columns``, without a hard label's; 0 past the vocabulary."""
    mask = columns < V
    a = tl.zeros_like(columns).to(tl.float32) + shares.smooth
    if shares.soft is not None:
        if MASKED:
            soft = tl.load(shares.soft + columns, mask=mask, other=0.0).to(tl.float32)
        else:
            soft = tl.load(shares.soft + columns).to(tl.float32)
        a += shares.label * soft
    if shares.weight is not None:
        if MASKED:
            a *= tl.load(shares.weight + columns, mask=mask, other=0.0)
        else:
            a *= tl.load(shares.weight + columns)
    if MASKED:
        a = tl.where(mask, a, 0.0)
    return a


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
def require_mixture(DIVERGENCE: tl.constexpr):
    """Stop the compiler at a divergence that no branch knows: it must not be taken for another."""
    tl.static_assert(
        (DIVERGENCE == JSD) | (DIVERGENCE == SKEW_FORWARD_KL) | (DIVERGENCE == SKEW_REVERSE_KL),
        "divergence must have a branch in every kernel that asks for it, got an unknown code; "
        "add it where the known ones are told apart",
    )


@triton.jit
def mixture_parts(a, b, beta, DIVERGENCE: tl.constexpr, HAS_LOG: tl.constexpr):
    """q and the two summands of a mixture's divergence, from ``a = log2 q`` and ``b = log2 p``.

    ``mixture_terms`` makes ``f`` and ``h`` of the two summands, and the sums of f and h of their
    sums. ``HAS_LOG`` says that the caller needs the first, so that its logarithm is there: a ratio
    to the mixture m is then an exponential of it, where a division takes six instructions.

    Everything is relative to q, with the gap between the two logarithms bounded: a share below
    2^-60 of the other adds nothing, and what is left neither overflows nor takes p along when q
    underflows. Neither branches nor comparisons, which cost these kernels more than exponentials.
    """
    require_mixture(DIVERGENCE)
    # q_log is finite, so that no -inf meets another.
    q_log = tl.maximum(tl.maximum(a, b - LOG2_RATIO_MAX), LOG2_TINY)
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
    elif DIVERGENCE == SKEW_REVERSE_KL:
        return q, q * log_mix, q * tl.exp2(-log_mix)  # q log2 m/q, qq/m
    else:
        tl.static_assert(False, "divergence must have its summands in mixture_parts, got none")


@triton.jit
def mixture_terms(u, v, beta, DIVERGENCE: tl.constexpr):
    """``f`` and ``h`` of ``_divergence.py``, in nats, from the summands of ``mixture_parts``."""
    require_mixture(DIVERGENCE)
    if DIVERGENCE == JSD:
        h = (1 - beta) * -LN_2 * v
        f = beta * LN_2 * u + h
    elif DIVERGENCE == SKEW_FORWARD_KL:
        f = u * LN_2
        h = (beta - 1) * v
    elif DIVERGENCE == SKEW_REVERSE_KL:
        f = u * -LN_2
        h = f - beta * v
    else:
        tl.static_assert(False, "divergence must have its terms in mixture_terms, got none")
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
