"""Benchmark cases: which losses on which shapes, and the least bytes and FLOP each can take.

N tokens, V vocabulary, D_s and D_t hidden sizes of student and teacher. A case names a loss and one
shape; ``inputs.py`` draws its tensors. No loss is multiplied by ``T^2`` (``scale_t2=False``): no
peer does so, and to scale a loss whose gradients were computed in forward would cost it a pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from sad_kernels import Objective

OBJECTIVES = {
    "ce": Objective(ce_weight=1.0, kd_weight=0.0),
    "kd/forward_kl": Objective(divergence="forward_kl", scale_t2=False),
    "kd/reverse_kl": Objective(divergence="reverse_kl", scale_t2=False),
    "kd/jsd": Objective(divergence="jsd", scale_t2=False),
    "kd/joint": Objective(ce_weight=0.5, kd_weight=0.5, temperature=2.0, scale_t2=False),
}
OBJECTIVES["kd/top_k"] = OBJECTIVES["kd/joint"]
ROWS = tuple(OBJECTIVES)
LINEAR = ("linear_ce", "linear_kd/forward_kl", "linear_kd/reverse_kl", "linear_kd/jsd")
LINEAR += ("linear_kd/joint",)
TELLING = (*LINEAR[:2], "linear_kd/joint", "linear_kd/jsd")  # these first, since time may run out
EMA = ("ema/update", "ema/swap")
NAMES = ROWS + LINEAR + EMA
TOP_K = 64
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class LossCase:
    """A loss of logits (``ce``, ``kd/...``) or of hidden states (``linear_...``)."""

    name: str
    N: int
    V: int
    D_s: int = 0  # 0: the loss takes logits
    D_t: int = 0
    V_t: int = 0  # rows of the teacher's head, past V as padding; 0: V
    dtype: str = "bfloat16"
    ignored: float = 0.0  # share of rows without a label
    upstream: float = 0.125  # gradient of the loss; at 1 some peers skip the scaling pass
    kl: float = 0.1  # KL of teacher and student, roughly, in nats

    @property
    def objective(self) -> Objective:
        return OBJECTIVES[self.name.removeprefix("linear_")]

    @property
    def kind(self) -> Literal["ce", "kd", "joint"]:
        if self.objective.kd_weight == 0:
            return "ce"
        return "joint" if self.objective.ce_weight else "kd"

    @property
    def linear(self) -> bool:
        return self.D_s > 0

    @property
    def top_k(self) -> int:
        return min(TOP_K, self.V) if self.name == "kd/top_k" else 0

    @property
    def valid(self) -> int:
        """The number of rows with a label."""
        return self.N - int(self.ignored * self.N)

    @property
    def shape(self) -> dict[str, int]:
        sizes = {"N": self.N, "V": self.V}
        if self.linear:
            sizes["D_s"] = self.D_s
        if self.linear and self.kind != "ce":
            sizes |= {"D_t": self.D_t} | ({"V_t": self.V_t} if self.V_t else {})
        return sizes | ({"K": self.top_k} if self.top_k else {})

    @property
    def record(self) -> dict[str, Any]:
        """What identifies the case in the JSON."""
        return {
            "case": self.name,
            "shape": self.shape,
            "dtype": self.dtype,
            "options": {"objective": vars(self.objective), "kl": self.kl},
            "ignored": self.ignored,
            "upstream": self.upstream,
        }

    def bytes(self, backward: bool) -> int:
        """The least memory traffic: logits are read forward, and read and overwritten backward."""
        reads = 1 if self.kind == "ce" or self.top_k else 2
        row = self.V * ITEMSIZE[self.dtype]
        forward = self.valid * (reads * row + 16 * self.top_k)
        return forward + (forward + self.N * row if backward else 0)

    def flops(self, backward: bool) -> int:
        """FLOP of the necessary matrix products: both models' logits, and two for the gradients."""
        teacher = self.D_t if self.kind != "ce" else 0
        return 2 * self.valid * self.V * ((3 if backward else 1) * self.D_s + teacher)

    def small(self) -> LossCase:
        """The same loss on a tiny shape, whose time is the host's alone."""
        sizes = {"D_s": 64, "D_t": 64} if self.linear else {}
        return replace(self, N=16, V=1024, V_t=0, **sizes)


@dataclass(frozen=True, kw_only=True)
class EmaCase:
    """``ema/update``, or ``ema/swap``: swapped in and out again, as around an evaluation."""

    name: str
    parameters: int
    tensors: int
    dtype: str = "bfloat16"  # of the parameters; shadows are float32
    decay: float = 0.999

    @property
    def shape(self) -> dict[str, int]:
        return {"parameters": self.parameters, "tensors": self.tensors}

    @property
    def record(self) -> dict[str, Any]:
        options = {"decay": self.decay}
        return {"case": self.name, "shape": self.shape, "dtype": self.dtype, "options": options}

    def bytes(self) -> int:
        """Least memory traffic: shadows read and written, parameters read.

        A swap writes the parameters, too, and counts twice: in and out.
        """
        item = ITEMSIZE[self.dtype]
        each = 8 + item if self.name == "ema/update" else 2 * (8 + 2 * item)
        return self.parameters * each

    def scaled(self, free_bytes: int) -> EmaCase:
        """The same case with few enough parameters that several peers' shadows fit at once."""
        most = free_bytes // 48
        return self if self.parameters <= most else replace(self, parameters=most)


Case = LossCase | EmaCase


# --- Sets ----------------------------------------------------------------------------------------


def quick() -> list[Case]:
    """For a GPU in 100 seconds, the most telling first."""
    large, small = (8192, 128256, 4096, 4096), (8192, 151936, 1024, 4096)
    return [
        *_linear(TELLING[:2], [large]),
        *_rows([(8192, 128256)]),
        *_ema([(10**9, 300)]),
        *_linear(TELLING[2:], [large]),
        *_linear(TELLING, [small]),
        *_rows([(256, 128256)]),
        *_ema([(25_000_000, 600)]),
    ]


def full() -> list[Case]:
    """For a GPU, every claim: rows, vocabularies, hidden sizes, dtypes, and what inputs may do."""
    return [
        *_linear(LINEAR, [(8192, 128256, 4096, 4096), (8192, 151936, 4096, 4096)]),
        *_rows([(N, 128256) for N in (8192, 256, 1024, 4096, 16384)]),
        *_ema([(10**9, 300), (25_000_000, 600)]),
        *_linear(LINEAR, [(8192, 151936, 1024, 4096), (8192, 151936, 2048, 4096)]),
        *_linear(LINEAR, [(4096, 262144, 1024, 4096), (8192, 50257, 576, 1024)]),
        *_linear(LINEAR, [(8192, 151936, 896, 3584)], V_t=152064),
        *_linear(LINEAR, [(8192, 128256, 4096, 4096)], ignored=0.5),
        *_linear(LINEAR, [(8192, 128256, 4096, 4096)], upstream=1.0),
        *_linear(LINEAR[1:], [(8192, 128256, 4096, 4096)], kl=1e-3),
        *_linear(LINEAR, [(8192, 32000, 2048, 2048)], dtype="float16"),
        *_linear(LINEAR, [(2048, 32000, 1024, 1024)], dtype="float32"),
        *_rows([(4096, V) for V in (32000, 50257, 151936, 262144)]),
        *_rows([(4096, 128256)], dtype="float16"),
        *_rows([(4096, 128256)], dtype="float32"),
        *_rows([(8192, 128256)], ignored=0.5),
        *_ema([(10**9, 300)], dtype="float32"),
    ]


def cpu() -> list[Case]:
    """Cases small enough for seven rounds of every peer on two CPU cores."""
    return [
        *_linear(LINEAR, [(512, 32768, 512, 512)], dtype="float32"),
        *_rows([(256, 32768)], dtype="float32"),
        *_linear(LINEAR, [(256, 32768, 256, 512)], dtype="bfloat16"),
        *_linear(LINEAR[:1], [(64, 32768, 256, 0)], dtype="float32"),
        *_linear(LINEAR[:1], [(64, 32768, 256, 0)], dtype="bfloat16"),
        *_ema([(25_000_000, 600), (24_000_000, 12)]),
    ]


def quick_cpu() -> list[Case]:
    return [
        *_linear(LINEAR, [(128, 16384, 128, 256)], dtype="float32"),
        *_rows([(64, 16384)], dtype="float32"),
        *_ema([(1_000_000, 60)]),
    ]


def fake() -> list[Case]:
    """Cases so small that they only show that everything runs: their times mean nothing."""
    return [
        *_linear(LINEAR, [(12, 320, 32, 48)], dtype="float32"),
        *_linear(LINEAR[2:4], [(12, 320, 32, 48)], dtype="float32", V_t=352, ignored=0.5),
        *_rows([(8, 384)], dtype="float32"),
        *_rows([(9, 500)], ignored=0.5),
        *_ema([(5_000, 7)]),
        *_ema([(5_000, 7)], dtype="float32"),
    ]


def of_shape(shape: tuple[int, int, int, int], dtype: str) -> list[Case]:
    """Every loss on one shape ``N, D_s, D_t, V``: of hidden states first, then of logits."""
    N, D_s, D_t, V = shape
    names = dict.fromkeys((*TELLING, *LINEAR))
    return [*_linear(names, [(N, V, D_s, D_t)], dtype=dtype), *_rows([(N, V)], dtype=dtype)]


def chosen(cases: Iterable[Case], names: Iterable[str]) -> list[Case]:
    """The cases with these names; ``kd`` stands for all ``kd/...``, no name for all cases."""
    wanted = tuple(names)
    if not wanted:
        return list(cases)
    return [c for c in cases if any(c.name == w or c.name.startswith(f"{w}/") for w in wanted)]


def _rows(shapes: Iterable[tuple[int, int]], **options: Any) -> Iterator[LossCase]:
    for N, V in shapes:
        yield from (LossCase(name=name, N=N, V=V, **options) for name in ROWS)


def _linear(
    names: Iterable[str], shapes: Iterable[tuple[int, int, int, int]], **options: Any
) -> Iterator[LossCase]:
    for N, V, D_s, D_t in shapes:
        for name in names:
            yield LossCase(name=name, N=N, V=V, D_s=D_s, D_t=D_t, **options)


def _ema(shapes: Iterable[tuple[int, int]], **options: Any) -> Iterator[EmaCase]:
    for parameters, tensors in shapes:
        for name in EMA:
            yield EmaCase(name=name, parameters=parameters, tensors=tensors, **options)
