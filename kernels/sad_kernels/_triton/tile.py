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

# Temperatures: 1 and 2 save an exponential per element
ANY = tl.constexpr(0)
ONE = tl.constexpr(1)
TWO = tl.constexpr(2)


@triton.jit
def tanh(x):
    """Within 2 ulps: a polynomial (Cephes) near 0, where ``1 - 2 / (e^2x + 1)`` cancels."""
    square = x * x
    near = square * -5.70498872745e-3 + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    size = tl.abs(x)
    far = 1 - 2 / (tl.exp2(size * (2 * LOG2_E)) + 1)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def finish(
    x, columns, bias, scale, cap, mask,
    MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """Products to logits: bias, scale, softcap, in this order."""
    if HAS_BIAS:
        if MASKED:
            x += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
        else:
            x += tl.load(bias + columns).to(tl.float32)
    if HAS_SCALE:
        x *= scale
    if HAS_CAP:
        x = cap * tanh(x / cap)
    return x


@triton.jit
def load_logits(
    row, columns, V, bias, scale, cap,
    MASKED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """The logits of one row at ``columns``, in fp32; -inf past the vocabulary."""
    if MASKED:
        mask = columns < V
        x = tl.load(row + columns, mask=mask, other=0.0).to(tl.float32)
        x = finish(x, columns, bias, scale, cap, mask, True, HAS_BIAS, HAS_SCALE, HAS_CAP)
        return tl.where(mask, x, float("-inf"))
    x = tl.load(row + columns).to(tl.float32)
    return finish(x, columns, bias, scale, cap, columns, False, HAS_BIAS, HAS_SCALE, HAS_CAP)


@triton.jit
def exponentials(x, heat, HEAT: tl.constexpr):
    """``exp(x / T)`` and ``exp(x)`` of x <= 0, with ``heat = log2(e) / T``."""
    hot = tl.exp2(x * heat)
    if HEAT == ONE:
        return hot, hot
    if HEAT == TWO:
        return hot, hot * hot
    return hot, tl.exp2(x * LOG2_E)


@triton.jit
def divergence_terms(a, b, beta, DIVERGENCE: tl.constexpr):
    """``f`` and ``h`` of ``_divergence.py``, in nats, from ``a = log2 q`` and ``b = log2 p``.

    ``0 log 0 = 0``: a weight of 0 adds 0, whatever it multiplies.
    """
    q, p = tl.exp2(a), tl.exp2(b)
    if DIVERGENCE == FORWARD_KL:
        return tl.where(p > 0, p * (b - a), 0.0) * LN_2, -p
    if DIVERGENCE == REVERSE_KL:
        f = tl.where(q > 0, q * (a - b), 0.0) * LN_2
        return f, f

    # Relative to the larger of p and q nothing underflows, and the logarithm's argument stays
    # between the smaller share and 1.
    share = beta if DIVERGENCE == SKEW_REVERSE_KL else 1 - beta  # of q in the mixture
    gap = a - b
    larger_share = tl.where(gap >= 0, share, 1 - share)
    log_m = tl.log2(larger_share + (1 - larger_share) * tl.exp2(-tl.abs(gap)))
    over_q = tl.minimum(gap, 0.0) - log_m  # log2(q/m)
    over_p = tl.minimum(-gap, 0.0) - log_m  # log2(p/m)
    q_part = tl.where(q > 0, q * over_q, 0.0) * LN_2
    p_part = tl.where(p > 0, p * over_p, 0.0) * LN_2
    if DIVERGENCE == JSD:
        h = (1 - beta) * q_part
        return beta * p_part + h, h
    if DIVERGENCE == SKEW_FORWARD_KL:
        return p_part, tl.where(q > 0, tl.exp2(over_p + a), 0.0) * (beta - 1)
    return q_part, q_part - beta * tl.where(q > 0, tl.exp2(over_q + a), 0.0)
