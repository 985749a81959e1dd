"""The one tolerance rule of this project: no test of a numerical result sets its own.

A result is judged row by row against two others computed from *the same rounded inputs*:

* the oracle ``o``: ``sad_kernels.reference`` on float64 copies, with divergences that are exact
  near agreement as well, where its own are not (``exact.py``, ``divergences.py``). The copies are
  the leaves, so that the gradients are float64 too; upcasting inside the graph would round them to
  the input's dtype and let wrong kernels pass.
* the yardstick ``e``: the plain eager definition in the inputs' dtypes, computed in float32 with
  the head's matrix product included. It says what rounding alone may do.

With ``err_r(x) = max_j |x_rj - o_rj|`` for a row r, ulps in the dtype of the result and
eps = 2^-23,

    band_r = ulp(max_j |o_rj|) + 8 eps S_r
           + ulp(max_j |o_rj|) + 8 D_r         if a gradient has a divergence's in it

all of these must hold:

    1. every row:          err_r(ours) <= 2 err_r(e) + band_r
    2. from 32 rows on: median err(ours) <= 2 median err(e) + median band / 8, and one ulp more
                        if a gradient has a divergence's in it
    3. every row:          err_r(ours) <= 4 band_r: eager can be far off, which is no licence

A row is a token for losses and for the gradients of logits and hidden states, a class for the
gradient of a weight, and all of the gradient of a bias. ``S_r`` is the size of the numbers that
cancel in row r (see ``scales_of``): for a loss, of all its terms, for a gradient, of cross-entropy
and z-loss. The gradient of a divergence is a small rest where student and teacher agree, and where
they have nothing in common; no size of logits tells how small. So ``D_r`` is how far the oracle's
row moves with logits that are off by a rounding (see ``rounding_of_logits``), and neither a
gradient of nothing nor half of a gradient keeps the rule. Errors below 1e-12 are never out.

float64 results are held to lines 1 and 3 with eps = 2^-48: the oracle has no more digits than they
do, so four bits are left to it.

Where the gradient of the logits is rounded to 16 bits on its way into a matrix product, as it must
be on a GPU, the band of the product grows by what one such rounding can do to it, and by no more
(``rounding_of_products``); the median's budget by half of it.

calls.py        a call of a public function, its outputs and gradients
divergences.py  values and gradients of divergences, to 14 digits in float64
exact.py        the oracle: the reference with these
rounding.py     D_r, S_r, and what a rounded factor of a product may do
rule.py         the rule for one tensor
judgement.py    the rule for every output of a call
"""

from __future__ import annotations

from support.oracle.calls import (
    ALL,
    COUNTS,
    DTYPES,
    IMPLS,
    IN_FLOAT64,
    SLOW,
    Outputs,
    Problem,
    bound,
    dtypes_of,
    measure,
)
from support.oracle.exact import measure_exact, measure_oracle
from support.oracle.judgement import (
    Measure,
    broken,
    judge,
    judge_output,
    judge_outputs,
    measure_of,
)
from support.oracle.rounding import rounding_of_logits, rounding_of_products, scales_of
from support.oracle.rule import (
    assert_ema_within,
    assert_value,
    assert_within,
    assert_zero,
    epsilon,
    ulp,
)

__all__ = [
    "ALL",
    "COUNTS",
    "DTYPES",
    "IMPLS",
    "IN_FLOAT64",
    "SLOW",
    "Measure",
    "Outputs",
    "Problem",
    "assert_ema_within",
    "assert_value",
    "assert_within",
    "assert_zero",
    "bound",
    "broken",
    "dtypes_of",
    "epsilon",
    "judge",
    "judge_output",
    "judge_outputs",
    "measure",
    "measure_exact",
    "measure_of",
    "measure_oracle",
    "rounding_of_logits",
    "rounding_of_products",
    "scales_of",
    "ulp",
]
