"""How much memory a ``linear_*`` loss takes, from sizes alone: nothing is computed or allocated.

For planning: does a batch, a vocabulary or a ``chunk_bytes`` fit, before a run is started?
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple, get_args

import torch

from sad_kernels import _check
from sad_kernels._dispatch import choose_impl
from sad_kernels._divergence_table import DIVERGENCES
from sad_kernels._tiles import (
    BLOCK,
    CODE_BYTES,
    COMPACT_CHUNK_BYTES,
    DEFAULT_CHUNK_BYTES,
    HEAD_ROWS,
    TRITON_CHUNK_BYTES,
    LogitStorage,
    chunk_rows,
    compact_rows,
    has_codes,
    head_budget,
    pitch,
    product_row_bytes,
    whole_rows,
)
from sad_kernels._torch import gemm
from sad_kernels.objective import Divergence

TeacherKind = Literal["hidden", "logits", "top_k"]
Wrt = Literal["hidden", "weight", "bias"]

FP32 = 4  # bytes of a number
ROW_BYTES = 256  # of one row's statistics: b in linear.py
ID_BYTES = 48  # more of them per id of a top-k teacher, some of them padding


class LinearMemory(NamedTuple):
    """Bytes beyond the inputs of a ``linear_*`` loss and its backward, by what they hold.

    Forward computes the gradients as well, and backward needs no logits; with ``impl="torch"`` only
    where some whole rows of logits fit ``chunk_bytes``, else they are made again in backward.
    """

    logits: int
    """Tiles of the logits of both models and of their gradient, and the slices of the heads that
    they are made of: ``chunk_bytes`` at most, whatever the vocabulary is."""
    hidden: int
    """Copies of hidden states in the dtype of the arithmetic, and the sum of their gradient."""
    weight_copy: int
    """The weight rounded to the dtype of the hidden states. 0 with ``impl="torch"``."""
    weight_sum: int
    """The fp32 sums of the gradients of weight and bias. With ``impl="torch"`` that of a weight in
    16 bits whose rows do not fit ``chunk_bytes`` at once."""
    rows: int
    """A few numbers per row: maxima, normalisers, losses."""
    gradients: int
    """What backward returns."""

    @property
    def total(self) -> int:
        """The sum: more than the peak, since not all of it is alive at one moment."""
        return sum(self)


def linear_memory_bytes(
    num_tokens: int,
    vocab_size: int,
    hidden_size: int,
    *,
    teacher: TeacherKind | None = None,
    teacher_width: int = 0,
    divergence: Divergence = "forward_kl",
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    gradients: Collection[Wrt] = ("hidden", "weight"),
    chunk_bytes: int | None = None,
    logits: LogitStorage = "exact",
    device: torch.device | str = "cpu",
    impl: str = "auto",
) -> LinearMemory:
    """Bytes that ``linear_cross_entropy`` or ``linear_distill_loss`` takes beyond its inputs.

    Of a call with ``N = num_tokens`` hidden states [N, D_s] and a head [V, D_s] under the mean or
    sum of the rows, forward and backward. ``teacher`` is "hidden" for a ``TeacherHidden``, "logits"
    or "top_k", and ``teacher_width`` is the D_t of its hidden states, or its K. ``dtype`` is that
    of the hidden states, ``weight_dtype`` that of the student's weight, if another. ``gradients``
    names the leaves that get one. ``logits`` is the format of the logits, taken where such a call
    can take it. ``device`` decides, as a tensor's would, what ``impl="auto"`` is; it need not exist
    here.

    A call with ``outcomes`` keeps to the same ``chunk_bytes``, in which it has fewer rows of both
    sides' logits; with ``impl="torch"`` 8 bytes per column of either side come on top.

    For the worst number of ignored rows. They take nothing but their hidden states: where most
    labels are ignored, as those of prompts and padding are, ``num_tokens`` should be the number of
    those that are not, or far too much is said. With ``impl="torch"`` the rows are cut into chunks
    of one size, so that a little more of them than fit at once take little more than half as much.

    An estimate, by the formulas of the module ``linear``: as if some row was ignored, so that the
    hidden states are copied; without what an allocator rounds up. With ``impl="torch"`` temporaries
    may take another quarter of ``logits``, and a softcap one more tile where the vocabulary is too
    small to fill ``chunk_bytes``.

    Raises ``TypeError`` and ``ValueError`` for sizes out of range, for names that do not exist and
    for an ``impl`` that does not work on the device.

    >>> plan = linear_memory_bytes(8192, 128256, 2048, dtype=torch.bfloat16)
    >>> plan.logits, plan.gradients  # the default chunk_bytes; bf16 hidden states and weight
    (33554432, 558891008)
    """
    for name, value, low in (
        ("num_tokens", num_tokens, 0),
        ("vocab_size", vocab_size, 1),
        ("hidden_size", hidden_size, 1),
        ("teacher_width", teacher_width, 1 if teacher in ("hidden", "top_k") else 0),
    ):
        _check.require_int(name, value, low)
    _check.require_choice("teacher", teacher, (*get_args(TeacherKind), None))
    for name in gradients:
        _check.require_choice("gradients", name, get_args(Wrt))
    _check.require_choice("divergence", divergence, tuple(DIVERGENCES))
    for name, value in (("dtype", dtype), ("weight_dtype", weight_dtype or dtype)):
        _check.require_float_dtype(name, value)
    _check.require_chunk_bytes(chunk_bytes)
    _check.require_choice("logits", logits, get_args(LogitStorage))
    impl = choose_impl(impl, torch.device(device).type, double=dtype == torch.float64)

    N, V, D_s = num_tokens, vocab_size, hidden_size
    D_t = teacher_width if teacher == "hidden" else 0
    wrt_hidden, wrt_weight, wrt_bias = (name in gradients for name in get_args(Wrt))
    itemsize, weight_itemsize = dtype.itemsize, (weight_dtype or dtype).itemsize
    parameters = V * (D_s * wrt_weight + wrt_bias)  # numbers of the head that get a gradient
    returned = itemsize * N * D_s * wrt_hidden + weight_itemsize * parameters
    rows = N * (ROW_BYTES + (ID_BYTES * teacher_width if teacher == "top_k" else 0))

    if impl == "torch":
        number = max(itemsize, FP32)
        narrow = {dtype, weight_dtype or dtype} != {dtype} or itemsize < FP32
        parts = head_budget(
            student_width=D_s,
            teacher_width=D_t,
            converts=narrow,
            dense=teacher in ("hidden", "logits"),
            divergences=(divergence,),
            splits=gemm.HAS_BF16_PRODUCTS and {dtype, weight_dtype or dtype} == {torch.bfloat16},
        )
        budget = DEFAULT_CHUNK_BYTES if chunk_bytes is None else chunk_bytes
        at_a_time = whole_rows(N, V, budget // number, parts)
        if not gradients or dtype == torch.float16:
            at_a_time = 0
        slabs = parts.half_slabs * V * min(N, at_a_time or HEAD_ROWS) // 2
        factors = parts.per_column * V
        factors = min(parts.converted, factors) if at_a_time else factors
        blocks = -(-parts.blocks // 2)  # that are alive at once, of those that room is made for
        alive = slabs + factors + blocks * min(BLOCK, N * V)
        several = 0 < at_a_time < N
        return LinearMemory(
            logits=min(budget, number * alive),
            hidden=number * N * (D_s + D_t + D_s * wrt_hidden),
            weight_copy=0,
            weight_sum=number * V * D_s if several and narrow and wrt_weight else 0,
            rows=rows,
            gradients=returned,
        )

    sides = 2 if teacher == "hidden" else 1  # models whose logits are made
    compact = logits == "compact" and has_codes(itemsize, teacher, (divergence,))
    default = COMPACT_CHUNK_BYTES if compact else TRITON_CHUNK_BYTES
    budget = default if chunk_bytes is None else chunk_bytes
    chunk = compact_rows(V, sides, budget) if compact else chunk_rows(V, sides, itemsize, budget)
    forward_rows, gradient_rows = min(chunk.forward, N), min(chunk.gradient, N)
    if compact:
        code_rows = (gradient_rows if gradients else forward_rows) + (sides - 1) * forward_rows
        of_logits = pitch(V) * CODE_BYTES * code_rows + product_row_bytes(V, sides) * forward_rows
    else:
        row_of_g = itemsize * gradient_rows if gradients else 0
        of_logits = pitch(V) * (FP32 * sides * forward_rows + row_of_g)
    # dhidden stays in fp32 until backward for fp16, and is rounded chunk by chunk for bf16.
    dhidden = (FP32 if dtype == torch.float16 else itemsize) * N
    product = FP32 * gradient_rows if dtype == torch.bfloat16 else 0
    masked = itemsize * gradient_rows  # the hidden states of a chunk, ignored rows zeroed
    return LinearMemory(
        logits=of_logits,
        hidden=D_s * ((dhidden + product) * wrt_hidden + masked * wrt_weight),
        weight_copy=itemsize * V * D_s if weight_itemsize != itemsize else 0,
        weight_sum=FP32 * parameters,
        rows=rows,
        gradients=returned,
    )
