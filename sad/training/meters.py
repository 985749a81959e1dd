"""What is counted and timed while training and evaluating."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from sad_kernels import DistillOutput
from torch import Tensor, nn

from sad.data.batch import Batch
from sad.losses.base import Terms
from sad.metrics import table_metrics


class ThroughputMeter:
    """Targets per second since it was last asked, pauses left out."""

    def __init__(self, tokens: int) -> None:
        self._since = time.perf_counter()
        self._tokens = tokens

    def rate(self, tokens: int) -> float:
        now = time.perf_counter()
        rate = (tokens - self._tokens) / max(now - self._since, 1e-9)
        self._since, self._tokens = now, tokens
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - begin


LOGGED = ("loss", "ce", "kd", "z", "num_tokens", "correct", "agree")
"""What is summed on the device between two log lines, in this order."""


class EvalMeter:
    """Float64 sums of one pass over the held-out rows."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # [6]
        self.bytes = 0
        self.terms: dict[str, tuple[Tensor, int]] = {}

    def add(self, out: DistillOutput, batch: Batch) -> None:
        parts = (out.ce, out.kd, out.num_tokens, out.correct, out.agree, out.entropy)
        sums = torch.stack([part.double() for part in parts])
        self.sums = sums if self.sums is None else self.sums + sums
        self.bytes += batch.target_bytes

    def add_terms(self, terms: Terms) -> None:
        for name, term in terms.items():
            value, count = self.terms.get(name, (0.0, 0))
            self.terms[name] = (value + term.sum.double(), count + term.count)

    def metrics(self, prefix: str, *, against_teacher: bool) -> dict[str, float]:
        if self.sums is None:
            return {}
        ce, kd, targets, correct, agree, entropy = self.sums.tolist()
        nll = ce / targets
        result = {
            "nll": nll,
            "perplexity": math.exp(nll) if nll < 700 else math.inf,
            "bits_per_byte": ce / (math.log(2) * self.bytes) if self.bytes else math.nan,
            "accuracy": correct / targets,
            "entropy": entropy / targets,
        }
        if against_teacher:
            result |= {"kl": kd / targets, "agreement": agree / targets}
        result |= {
            name: float(value) / max(count, 1) for name, (value, count) in self.terms.items()
        }
        return {f"{prefix}/{name}": value for name, value in result.items()}


ResultRow = dict[str, Any]


def result_row(name: str, model: nn.Module, metrics: Mapping[str, float], prefix: str) -> ResultRow:
    """One line of the result table; a metric that does not apply is None."""
    scores = {m.name: metrics.get(f"{prefix}/{m.name}") for m in table_metrics()}
    return {"name": name, "parameters": sum(p.numel() for p in model.parameters())} | scores
