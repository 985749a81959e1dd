"""What the losses are tested on: input distributions, memory layouts, and pairwise option lists.

White noise alone is not among them without company: it keeps ``p_y`` near zero and so hides every
cancellation. All inputs sit inside larger buffers full of NaN (integers: the largest one), as do
ignored rows and the columns past ``valid_vocab``: whoever reads what is not theirs shows it.

Each ``*_problem`` function turns one set of options into a ``Problem`` that ``oracle.judge`` can
judge. The option lists below are crossed pairwise: any two levels of any two options meet in at
least one case.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from sad_kernels.objective import DIVERGENCES
from torch import Generator, Tensor

from support.oracle import IMPLS, SLOW, dtypes_of

IGNORE_INDEX = -100

Options = dict[str, Any]


# --- Pairwise lists ------------------------------------------------------------------------------


def pairwise(levels: Mapping[str, Sequence[Any]], seed: int) -> list[Options]:
    """A short list of option sets in which any two levels of any two options meet.

    Greedy: each case starts from a pair that is still missing and is the best of thirty random
    completions. The same seed gives the same list.
    """
    rng = random.Random(seed)
    missing = {
        ((a, x), (b, y)): None  # a dict keeps its order, a set would not
        for a, b in combinations(levels, 2)
        for x in range(len(levels[a]))
        for y in range(len(levels[b]))
    }
    chosen = []
    while missing:
        first = next(iter(missing))
        candidates = [
            {name: rng.randrange(len(values)) for name, values in levels.items()} | dict(first)
            for _ in range(30)
        ]
        pairs = [set(combinations(candidate.items(), 2)) for candidate in candidates]
        best = max(range(30), key=lambda i: len(pairs[i] & missing.keys()))
        for pair in pairs[best]:
            missing.pop(pair, None)
        chosen.append(candidates[best])
    return [{name: levels[name][i] for name, i in case.items()} for case in chosen]


def case_id(options: Options) -> str:
    """``key=value`` pairs, so that a failing case can be read off its name."""
    return ",".join(f"{name}={value}" for name, value in options.items())


def generator_for(op: str, options: Options, dtype: torch.dtype) -> Generator:
    seed = zlib.crc32(f"{op} {case_id(options)} {dtype}".encode())
    return Generator().manual_seed(seed)


_CALL: Options = {  # options of every loss
    "N": (1, 3, 8, 40),  # one row, odd, even, and enough for the median rule
    "ignore": ("none", "some", "first", "all"),
    "label_dtype": (torch.int64, torch.int32),
    "label_layout": ("contiguous", "strided", "shifted"),
    "upstream": ("one", "0.37", "random", "stride0"),
    "cut": (False, True),  # valid_vocab below the width
}
_LOGITS: Options = {
    "V": (1, 2, 31, 33, 97, 128),  # no column left over, one, and around multiples of 32
    "layout": ("contiguous", "padded", "transposed", "offset"),
}
_CE: Options = {"label_smoothing": (0.0, 0.1), "z_loss": (0.0, 1e-2), "softcap": (None, 20.0)}
_KD: Options = {
    "divergence": tuple(DIVERGENCES),
    "beta": (0.1, 0.5, 0.9),
    "temperature": (0.5, 1.0, 2.0, 20.0),
    "scale_t2": (True, False),
    "teacher_dtype": (None, torch.float32, torch.bfloat16),  # None: the student's
}
_DISTRIBUTIONS = (
    "randn1",
    "randn5",
    "randn30",  # saturated softmax
    "peaked",  # cancellation in p - 1
    "offset1e4",  # handling of the log-sum-exp
    "offset2^20",
    "zipf",  # rare classes
    "equal_logits",
    "same",  # teacher = student
    "near",  # small divergences
    "spread300",  # underflow on both sides
    "inf_student",
    "inf_teacher",
    "inf_both",
)
_LINEAR: Options = {
    "distribution": ("randn1", "randn5", "randn30", "peaked", "offset30", "zipf", "same", "near"),
    "V": (2, 31, 33, 97, 128),
    "D": (1, 24, 64),
    "bias": (False, True),
    "softcap": (None, 20.0),
    "logit_scale": (1.0, 0.25),
    "weight_dtype": (None, torch.float32),  # beside 16-bit hidden states; None: the same
    "wrt": ("hidden,weight,bias", "hidden", "weight", "bias", "hidden,weight", ""),
    "layout": _LOGITS["layout"],
    "chunk_bytes": (None, 8_000, 40_000),  # everything at once, and in more or fewer pieces
}
_JOINT: Options = {
    "ce_weight": (0.5, 0.0),
    "kd_weight": (0.7, 0.0, 1.0),
    "num_items": (None, 37, "tensor"),
}
_REDUCTION: Options = {"reduction": ("mean", "sum", "none")}

CROSS_ENTROPY = pairwise(
    {"distribution": _DISTRIBUTIONS, **_CALL, **_LOGITS, **_CE, **_REDUCTION}, seed=1
)
KL_DIV = pairwise({"distribution": _DISTRIBUTIONS, **_CALL, **_LOGITS, **_KD, **_REDUCTION}, seed=2)
DISTILL_LOSS = pairwise(
    {
        "distribution": _DISTRIBUTIONS,
        "teacher": ("logits", "hidden", "bucket", "zero", None),
        **_CALL,
        **_LOGITS,
        "label_smoothing": _CE["label_smoothing"],
        "z_loss": _CE["z_loss"],
        **_KD,
        **_JOINT,
    },
    seed=3,
)
LINEAR_CROSS_ENTROPY = pairwise({**_CALL, **_LINEAR, **_CE, **_REDUCTION}, seed=4)
LINEAR_DISTILL_LOSS = pairwise(
    {
        "teacher": ("hidden", "logits", "bucket", "zero", None),
        **_CALL,
        **_LINEAR,
        "label_smoothing": _CE["label_smoothing"],
        "z_loss": _CE["z_loss"],
        **_KD,
        **_JOINT,
    },
    seed=5,
)


APART = tuple(f"randn{size}{noise}" for size in (1, 5, 20) for noise in ("", "+1e-1", "+1e-3"))
"""From a teacher that has nothing in common with the student to one that nearly is the student, in
flat and in sharp distributions: where the gradient of a divergence is a small rest of what it is
computed from."""

MIXED_AND_PURE = tuple(
    (name, beta)
    for name, info in DIVERGENCES.items()
    for beta in ((0.1, 0.5, 0.9) if info.reads_beta else (0.5,))
)
"""Divergences with a beta of every kind."""


def crossed(cases: Sequence[Options]) -> list[Any]:
    """Every case in every dtype and implementation, as parameters ``(options, dtype, impl)``.

    A failure prints the options; the name is short. Offsets are left out in float64, where eager
    autograd, and with it the oracle, loses as many digits as what it would judge. Interpreted
    kernels are slow: of their cases all but a few for each dtype are marked so.
    """
    parameters = []
    for impl in IMPLS:
        for turn, dtype in enumerate(dtypes_of(impl)):
            chosen = representatives(cases, turn) if impl in SLOW else range(len(cases))
            for i, options in enumerate(cases):
                if dtype == torch.float64 and options["distribution"].startswith("offset"):
                    continue
                name = f"{impl}-{i}-{str(dtype).removeprefix('torch.')}"
                marks = () if i in chosen else pytest.mark.slow
                parameters.append(pytest.param(options, dtype, impl, id=name, marks=marks))
    return parameters


def representatives(cases: Sequence[Options], turn: int) -> set[int]:
    """Indices of a few cases that have every level of every option; other cases at every turn."""
    start = turn * len(cases) // 3
    order = [*range(start, len(cases)), *range(start)]  # the first of equally good ones is taken
    levels = [{(name, str(value)) for name, value in case.items()} for case in cases]
    missing = set().union(*levels)
    chosen = set()
    while missing:
        best = max(order, key=lambda i: len(levels[i] & missing))
        missing -= levels[best]
        chosen.add(best)
    return chosen


# --- Values: float64, before they are rounded ----------------------------------------------------


def draw_logits(
    distribution: str, N: int, V: int, generator: Generator, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits [N, V], teacher logits [N, V] and labels [N].

    ``randn5`` are two sides with nothing in common, ``randn5+1e-3`` a teacher that is the student
    plus noise of 1e-3. ``dtype`` is what they will be rounded to: 2^20 is out of reach for float16,
    and all that bfloat16 could see of such logits is the offset, so both keep to 1e4 there.
    """

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    s, t = randn(N, V), randn(N, V)
    y = torch.randint(V, (N,), generator=generator)
    match distribution:
        case _ if distribution.startswith("randn"):
            size, noise = _size_and_noise(distribution)
            s = size * s
            t = s + noise * t if noise else size * t
        case "peaked":
            s, t = _peaked(s, y), _peaked(t, y).flip(0)
        case "peaked_near":
            s = _peaked(s, y)
            t = s * (1 + 0.03 * t)
        case "offset1e4" | "offset2^20":
            wide = distribution == "offset2^20" and dtype in (torch.float32, torch.float64)
            offset = 2.0**20 if wide else 1e4
            s, t = 5 * s + offset, 5 * t + offset
        case "zipf":
            prior = -1.1 * torch.arange(1, V + 1, dtype=torch.float64).log()
            s, t = prior + 0.5 * s, prior + 0.5 * t
            y = _sample(prior, N, generator)
        case "equal_logits":
            s, t = torch.full_like(s, 0.5), torch.full_like(s, -3.0)
        case "same":
            s = t = 3 * s
        case "near":
            s = 3 * s
            t = s * (1 + 0.03 * t)
        case "spread300":
            s, t = (300 * (torch.rand(N, V, generator=generator).double() - 0.5) for _ in range(2))
        case "inf_student" | "inf_teacher" | "inf_both":
            hole = torch.rand(N, V, generator=generator) < 0.1
            hole.scatter_(-1, y[:, None], False)  # something must be left, the label for one
            s = s if distribution == "inf_teacher" else s.masked_fill(hole, -math.inf)
            t = t if distribution == "inf_student" else t.masked_fill(hole, -math.inf)
        case _:
            raise ValueError(distribution)
    return s, t, y


def _size_and_noise(distribution: str) -> tuple[float, float]:
    """Of ``randn5+1e-3``, or of ``randn5``, which has no noise: (5.0, 0.0)."""
    size, _, noise = distribution.removeprefix("randn").partition("+")
    return float(size), float(noise or 0)


def _peaked(x: Tensor, y: Tensor) -> Tensor:
    """Set the label's logit so that its probability runs from 0.05 to 1 - 1e-5 over the rows."""
    if x.shape[-1] == 1:
        return x
    odds = torch.logspace(math.log10(0.05), 5, len(y), dtype=torch.float64)
    others = x.scatter(-1, y[:, None], -math.inf).logsumexp(-1)
    return x.scatter(-1, y[:, None], (others + odds.log())[:, None])


def _sample(log_weights: Tensor, N: int, generator: Generator) -> Tensor:
    return torch.multinomial(log_weights.exp(), N, replacement=True, generator=generator)


def draw_head(
    distribution: str, N: int, V: int, D: int, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [N, D] and a weight [V, D] whose logits have the distribution, and labels."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = randn(N, D), randn(V, D) / math.sqrt(D)
    y = torch.randint(V, (N,), generator=generator)
    match distribution:
        case "offset30" if D > 1:  # alone it would leave a gradient of nothing but rounding
            # Neither would 30 times 1: by this column dhidden is 0, a sum of terms as large as the
            # column, and it is measured by what its other columns are.
            weight[:, -1], hidden[:, -1] = 3.0, 10.0
        case "same" | "near" | "offset30":
            pass
        case _ if distribution.startswith("randn"):
            hidden *= _size_and_noise(distribution)[0]
        case "peaked":  # along the label's own row of the weight
            hidden = 0.1 * hidden + torch.linspace(3, 20, N).double()[:, None] * (
                weight[y] / weight[y].square().sum(-1, keepdim=True).clamp(min=0.01)
            )
        case "zipf":
            prior = -1.1 * torch.arange(1, V + 1, dtype=torch.float64).log()
            weight[:, -1], hidden[:, -1] = prior, 1.0
            y = _sample(prior, N, generator)
        case _:
            raise ValueError(distribution)
    return hidden, weight, y


# --- Layout --------------------------------------------------------------------------------------


def place(x: Tensor, layout: str, dtype: torch.dtype | None = None) -> Tensor:
    """Values [N, K] inside a buffer full of poison; ``transposed`` has two leading dimensions."""
    dtype = dtype or x.dtype
    N, K = x.shape
    match layout:
        case "contiguous" | "offset":  # 64 elements keep any alignment, one more breaks it
            start = 64 if layout == "contiguous" else 65
            view = _poison(start + N * K + 64, dtype)[start : start + N * K].view(N, K)
        case "padded":
            view = _poison((N + 1) * (K + 7), dtype).view(N + 1, K + 7)[:N, :K]
        case "transposed":
            B = 2 if N % 2 == 0 else 1
            view = _poison(N * (K + 7), dtype).view(N // B, B, K + 7)[..., :K].transpose(0, 1)
        case _:
            raise ValueError(layout)
    return view.copy_(x.reshape(view.shape))


def place_labels(y: Tensor, layout: str, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """Labels [N] of the given leading shape inside a buffer of absurd ones."""
    N = len(y)
    match layout:
        case "contiguous":
            view = _poison(N, dtype)
        case "strided":
            view = _poison(3 * N, dtype).view(N, 3)[:, 1]
        case "shifted":
            view = _poison(N + 2, dtype)[1:-1]
        case _:
            raise ValueError(layout)
    return view.copy_(y).view(shape)


def _poison(numel: int, dtype: torch.dtype) -> Tensor:
    value = math.nan if dtype.is_floating_point else torch.iinfo(dtype).max
    return torch.full((numel,), value, dtype=dtype)
