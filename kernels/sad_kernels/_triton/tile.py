"""Mathematics of one tile of logits: device functions shared by the kernels over rows.

Logits are fp32 from the load on, and every exponent is taken of a difference: the row's maximum is
subtracted first, then comes ``1 / T``. Folding both into one multiply-add would lose what a large
common offset hides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from sad_kernels import _dispatch

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e30)  # where maxima start: -inf - -inf would be NaN

# Codes of the divergences
FORWARD_KL = tl.constexpr(0)
REVERSE_KL = tl.constexpr(1)
JSD = tl.constexpr(2)
SKEW_FORWARD_KL = tl.constexpr(3)
SKEW_REVERSE_KL = tl.constexpr(4)
JEFFREYS = tl.constexpr(5)
TVD = tl.constexpr(6)

DIVERGENCE_CODES: dict[str, int] = {
    "forward_kl": FORWARD_KL.value,
    "reverse_kl": REVERSE_KL.value,
    "jsd": JSD.value,
    "skew_forward_kl": SKEW_FORWARD_KL.value,
    "skew_reverse_kl": SKEW_REVERSE_KL.value,
    "jeffreys": JEFFREYS.value,
    "tvd": TVD.value,
}
"""The divergences that these kernels compute.

A new one also needs a branch in ``require_mixture``, ``mixture_terms`` and ``mixture_value``, if it
compares with a mixture: without it the kernels do not compile.
"""

LOG2_TINY = tl.constexpr(-150.0)  # log2 of a number that is 0 in fp32
LOG2_GAP_MAX = tl.constexpr(120.0)  # of the largest ratio, whose products do not overflow
MIN_REFERENCE_RATIO = tl.constexpr(2.0**-60)  # bounds of r0, see bounded_ratio
MAX_REFERENCE_RATIO = tl.constexpr(16.0)

INTERPRETED = tl.constexpr(_dispatch.INTERPRETED)  # in this process, not compiled

# Cases of the temperature: 1 and 2 save an exponential per element
ANY = tl.constexpr(0)
ONE = tl.constexpr(1)
TWO = tl.constexpr(2)


@triton.jit
def to_fp32(x):
    """A run-time number in fp32, which a compiler in front of us may hand over in fp64."""
    return tl.full((), x, tl.float32)


@triton.jit
def to_dtype(x, DTYPE: tl.constexpr):
    """fp32 numbers in the dtype of their store, rounded to nearest, ties to even.

    Compiled, this is the conversion itself. Triton's interpreter truncates to bf16.
    """
    if INTERPRETED:
        if DTYPE == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits += 0x7FFF + ((bits >> 16) & 1)
            bits = tl.where(x == x, bits >> 16, 0x7FC0)
            return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def log2_parts(x):
    """``log2`` of a normal number x > 0 as an integer and the rest, which is small and precise.

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
    return exponent.to(tl.float32) * (1 / (1 << 23)), p * f


@triton.jit
def fast_log2(x):
    """Of a normal number x > 0, within 3 ulps, near 1 too; fewer instructions than tl.log2."""
    whole, part = log2_parts(x)
    return whole + part


@triton.jit
def log2_1p(z):
    """``log2(1 + z)`` for z > -1, to relative precision near 0 as well."""
    u = 1 + z
    return fast_log2(u) + LOG2_E * (z - (u - 1)) / u  # what the rounding of u has lost, put back


@triton.jit
def expm1(x):
    """``e^x - 1`` within a few ulps, near 0 too, where it is its Taylor series."""
    p = x * (1.0 / 5040) + 1.0 / 720
    p = p * x + 1.0 / 120
    p = p * x + 1.0 / 24
    p = p * x + 1.0 / 6
    p = p * x + 0.5
    return tl.where(tl.abs(x) < 0.35, p * x * x + x, tl.exp2(x * LOG2_E) - 1)


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
def to_target(s, t, share):
    """What the student's logits ``s`` are compared with: the teacher's, or a mixture of both.

    ``share`` is the teacher's in the mixture; None: the teacher alone. The mixture is an explicit
    fma, so that every kernel gets the same bits.
    """
    if share is not None:
        share = to_fp32(share)
        t = tl.fma(t, share + tl.zeros_like(t), s * (1 - share))
    return t


@triton.jit
def teacher_side(x, s, t, share, m, m_t):
    """The target's logits less their maximum, ``y``, and how far they are from the student's, both
    less their maxima: ``y - x``, with ``x = s - m``.

    A mixture differs from the student by ``share (t - s)``, which is known better than the
    difference of two rounded logits.
    """
    if share is None:
        y = t - m_t
        apart = y - x
    else:
        gap = to_fp32(share) * (t - tl.maximum(s, LOWEST))  # -inf on both sides would leave NaN
        y = (x + gap) + (m - m_t)
        apart = gap + (m - m_t)
    return y, apart


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


class MixtureRow(NamedTuple):
    """What the terms of a mixture's divergence need of one row, made by ``mixture_row``."""

    ratio: Any  # r0
    rho: Any  # a r0/mu0, the teacher's part of the mixture there, mu0 = a r0 + 1 - a
    kappa: Any  # (1 - a)/mu0, the student's
    pull: Any  # (1 - beta)/mu0
    log_mu: Any  # log2 mu0
    whole: Any  # log2 r0/mu0, an integer near it
    rest: Any  # and what is left
    near: Any  # 1 where r0 is near 1 and p sums up to 1, else 0


@triton.jit
def student_share(beta, DIVERGENCE: tl.constexpr):
    """The student's share 1 - a of the mixture, not 0 where fp32 rounds ``beta`` to 1."""
    if DIVERGENCE == SKEW_REVERSE_KL:
        return beta
    else:
        return tl.maximum(1 - beta, 2.0**-25)


@triton.jit
def bounded_ratio(ratio, beta, DIVERGENCE: tl.constexpr):
    """Bound ``r0``, so that it does not underflow and ``1 - rho`` keeps digits.

    At the largest the student's part ``kappa`` is 2^-16, and ``rho`` exactly what that leaves of 1.
    """
    share = student_share(beta, DIVERGENCE)
    most = tl.minimum(MAX_REFERENCE_RATIO, share * 65535 / (1 - share))
    return tl.minimum(tl.maximum(ratio, MIN_REFERENCE_RATIO), most)


@triton.jit
def mixture_row(ratio, beta, DIVERGENCE: tl.constexpr, P_SUMS_TO_1: tl.constexpr):
    """The constants of a row whose ratios count from ``r0 = ratio``.

    Those of a top-k teacher, as given, may not sum up to 1.
    """
    require_mixture(DIVERGENCE)
    share = student_share(beta, DIVERGENCE)
    a = 1 - beta if DIVERGENCE == SKEW_REVERSE_KL else beta
    mu = a * ratio + share
    kappa = share / mu
    rho = tl.where(kappa < 0.5, 1 - kappa, a * ratio / mu)
    whole, part = log2_parts(ratio)
    whole_mu, part_mu = log2_parts(mu)
    above_1 = a * (ratio - 1)
    part_mu = tl.where(tl.abs(above_1) < 0.5, log2_1p(above_1) - whole_mu, part_mu)
    return MixtureRow(
        ratio=ratio, rho=rho, kappa=kappa, pull=(1 - beta) / mu,
        log_mu=whole_mu + part_mu, whole=whole - whole_mu, rest=part - part_mu,
        near=tl.where((tl.abs(ratio - 1) < 0.5) & P_SUMS_TO_1, 1.0, 0.0),
    )  # fmt: skip


@triton.jit
def mixture_gap(x, t, reference, share, inv_T):
    """``log2 r/r0`` of the columns, from the student's logits less their maximum, ``x``.

    ``reference`` is the teacher's logit that ratios count from. Neither normalisers nor a rounded
    mixture of logits take part.
    """
    gap = (t - reference) - tl.maximum(x, LOWEST)  # -inf on both sides would leave NaN
    if share is not None:
        inv_T *= to_fp32(share)
    return gap * inv_T


@triton.jit
def mixture_terms(gap, row, beta, DIVERGENCE: tl.constexpr, HAS_VALUE: tl.constexpr):
    """``phi`` of an outcome, in nats, and what the sum of the value adds up, see below.

    ``gap`` is ``log2 r/r0`` of the outcome's ratio ``r = p/q``. With ``w = r/r0 - 1`` and
    ``u = mu/mu0 = 1 + rho w``, the second number only if ``HAS_VALUE``:

    ===============  =======================  ================================
    divergence       phi                      value
    ===============  =======================  ================================
    jsd              -(1 - beta) log u        log2 r/mu
    skew_forward_kl  -pull^2 r0 w/u           log2 r/mu - near pull rho w/u/ln 2
    skew_reverse_kl  kappa rho w/u - log u    rho w/u
    ===============  =======================  ================================

    ``u`` is formed from ``w``, so that both are exact at the student's most likely outcome, which
    the ratios count from. ``1/u`` is the square of a reciprocal root: a division takes four
    instructions more, and an exponential of ``-log u`` loses digits of a large u. Of large
    logarithms the integers are subtracted first.
    """
    require_mixture(DIVERGENCE)
    gap = tl.minimum(gap, LOG2_GAP_MAX)
    if HAS_VALUE and DIVERGENCE != SKEW_REVERSE_KL:
        gap = tl.maximum(gap, LOG2_TINY)  # a finite log r
    w = tl.exp2(gap) - 1
    z = row.rho * w
    u = z + 1
    whole, part = log2_parts(u)
    log_over_mu = ((gap + row.whole) - whole) + (row.rest - part)
    root = tl.rsqrt(u)
    if DIVERGENCE == JSD:
        return (beta - 1) * LN_2 * (whole + part), log_over_mu
    elif DIVERGENCE == SKEW_FORWARD_KL:
        over_u = w * root * root
        phi = -(row.pull * row.pull * row.ratio) * over_u
        return phi, log_over_mu - (row.near * row.pull * row.rho * LOG2_E) * over_u
    elif DIVERGENCE == SKEW_REVERSE_KL:
        over_u = z * root * root
        return row.kappa * over_u - LN_2 * (whole + part), over_u
    else:
        tl.static_assert(False, "divergence must have its terms in mixture_terms, got none")


@triton.jit
def value_weights(p, q, row, DIVERGENCE: tl.constexpr):
    """The weights of the value's sum: p, but q for skew_reverse_kl where p and q are not near."""
    if DIVERGENCE == SKEW_REVERSE_KL:
        return tl.where(row.near > 0, p, q)
    else:
        return p


@triton.jit
def mixture_value(weighted, q_sum, row, beta, DIVERGENCE: tl.constexpr):
    """The divergence in nats, from the sums of ``mixture_terms``'s second number, by its weights,
    and of ``phi`` over q.

    That p and q sum up to 1 takes from the skews what would cancel near agreement. Far from it
    there may be more of that than of the divergence, and they do without.
    """
    require_mixture(DIVERGENCE)
    if DIVERGENCE == JSD:
        return beta * LN_2 * weighted + (q_sum - (1 - beta) * LN_2 * row.log_mu)
    elif DIVERGENCE == SKEW_FORWARD_KL:
        return LN_2 * weighted + row.near * (q_sum - row.pull * (row.ratio - 1))
    elif DIVERGENCE == SKEW_REVERSE_KL:
        near, far = row.pull * (weighted + (row.ratio - 1)), -row.kappa * weighted
        return tl.where(row.near > 0, near, far) + (q_sum - LN_2 * row.log_mu)
    else:
        tl.static_assert(False, "divergence must have its value in mixture_value, got none")


@triton.jit
def kl_term(a, b, DIVERGENCE: tl.constexpr):
    """The summand of a KL, in nats, from ``a = log2 q`` and ``b = log2 p``.

    ``0 log 0 = 0``: a weight of 0 adds 0, whatever it multiplies.
    """
    if DIVERGENCE == FORWARD_KL:
        p = tl.exp2(b)
        return tl.where(p > 0, p * (b - a), 0.0) * LN_2
    else:
        q = tl.exp2(a)
        return tl.where(q > 0, q * (a - b), 0.0) * LN_2


@triton.jit
def variation_terms(a, b, top):
    """``f`` and ``h`` of TVD in ``_divergence.py`` from ``a = log2 q`` and ``b = log2 p``.

    The slopes ``sign(q - p) / 2`` count from that of the student's likeliest outcome, half ``top``:
    they are 0 there, and in a row where it has nearly all probability their mean is small.
    """
    p, q = tl.exp2(b), tl.exp2(a)
    return 0.5 * tl.abs(p - q), 0.5 * q * (sign(q - p) - top)


@triton.jit
def totals_ratio(difference, d, d_t):
    """``d/d_t`` as ``near - rest``, from ``difference = B/d_t``: near agreement 1 and B/d_t."""
    is_near = tl.abs(difference * d_t) < 0.5 * d
    return tl.where(is_near, 1.0, d / d_t), tl.where(is_near, difference, 0.0)


@triton.jit
def exponential_difference(exp_T, exp_T_t, apart, share, inv_T):
    """``e^(y/T) - e^(x/T)``; of a mixture by their ratio, of which ``apart`` is ``y - x``."""
    if share is None:
        return exp_T_t - exp_T
    else:
        # The smaller of the two is the larger one times e^-|apart|.
        lost = tl.maximum(exp_T, exp_T_t) * expm1(tl.abs(apart) * (inv_T * -LN_2))
        return tl.where(apart > 0, -lost, lost)


@triton.jit
def probability_difference(exp_T, exp_T_t, apart, near, rest, share, inv_T):
    """``d (q - p)`` from the exponentials of both sides and ``totals_ratio``; 0 if both agree."""
    difference = exp_T - exp_T_t * near
    if share is not None:
        exact = exponential_difference(exp_T, exp_T_t, apart, share, inv_T)
        difference = tl.where(near == 1, -exact, difference)
    return difference + exp_T_t * rest


@triton.jit
def sign(x):
    """-1, 0 or 1; NaN for NaN."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x * 0))
