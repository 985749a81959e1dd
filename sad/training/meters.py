"""Counters and meters: sums, means and rates that become log records and evaluation metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from sad_kernels import DistillOutput
from torch import Tensor, nn

from sad.data.batch import Batch
from sad.distributed.world import ALONE, World
from sad.expected import Check, anything, every, integer, mapping, number, record, sequence, string
from sad.losses.base import LossTerms
from sad.metrics import table_metrics
from sad.models.quantization import parameter_count
from sad.optim.precision import UpdateResult


@dataclass
class Counters:
    """Where the run stands, in plain numbers."""

    micro_step: int = 0
    global_step: int = 0
    tokens: int = 0
    """Targets seen so far."""
    best_value: float = math.inf
    best_micro_step: int = -1
    evaluated_at: int = -1
    """``micro_step`` of the newest evaluation, whose figures are ``metrics``."""
    metrics: dict[str, float] = field(default_factory=dict)
    window_begins: int = 0
    """Where a resumption with other windows has cut one short, in micro-batches; 0: nowhere."""
    best_metric: str = ""
    """What ``best_value`` is a value of."""

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(vars(Counters(**state)))


COUNTERS = record(
    {
        "micro_step": integer(0),
        "global_step": integer(0),
        "tokens": integer(0),
        "best_value": number(finite=False),
        "best_micro_step": integer(-1),
        "evaluated_at": integer(-1),
        "metrics": mapping(number(finite=False)),
    },
    optional={"window_begins": integer(0), "best_metric": string},
)
"""What a checkpoint may say of ``Counters``; those before the last two keys lack them."""


class ThroughputMeter:
    """Targets per second since the last call of ``rate``, pauses left out."""

    def __init__(self, tokens: int) -> None:
        self._since = time.perf_counter()
        self._tokens = tokens
        self.seconds = 0.0
        """How long the last rate was measured."""

    def rate(self, tokens: int) -> float:
        """The rate since the last call; ``tokens`` are all targets seen so far in the run."""
        now = time.perf_counter()
        self.seconds = now - self._since
        rate = (tokens - self._tokens) / max(self.seconds, 1e-9)
        self._since, self._tokens = now, tokens
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent within does not count."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - begin


LOGGED = ("loss", "ce", "kd", "z", "num_tokens", "correct", "agree")
"""What is summed over targets between two log lines, in the order of ``TrainMeter.sums``."""


class MeanMeter:
    """Means of named quantities since the last reset: sums on the device, counts on the host."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = tuple(names)
        self._sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)
        self._counts = [0] * len(self.names)

    def add(self, terms: LossTerms) -> None:
        """Add sums and counts by name. Does not wait for the device."""
        for i, name in enumerate(self.names):
            if name in terms:
                self._sums[i] += terms[name].sum.detach()
                self._counts[i] += terms[name].count

    def means(self) -> dict[str, float]:
        """The mean of each quantity that has come up. Waits for the device."""
        sums = zip(self.names, self._sums.tolist(), self._counts, strict=True)
        return {name: value / count for name, value, count in sums if count}

    def total(self, name: str) -> tuple[float, int]:
        """Sum and count of a quantity, 0 and 0 for one without a name. Waits for the device."""
        if name not in self.names:
            return 0.0, 0
        index = self.names.index(name)
        return float(self._sums[index]), self._counts[index]

    def reset(self) -> None:
        self._sums.zero_()
        self._counts = [0] * len(self.names)

    def collect(self, world: World) -> None:
        """Move the sums and counts of all ranks to the first. Waits for the device."""
        counts = torch.tensor(self._counts, dtype=torch.float64, device=self._sums.device)
        sums, counts = world.sum_(torch.stack([self._sums, counts])) * world.main
        self._sums.copy_(sums)
        self._counts = [int(count) for count in counts.tolist()]

    def state_dict(self) -> dict[str, Any]:
        """``sums`` and ``counts``, in the order of the names."""
        return {"sums": self._sums.tolist(), "counts": list(self._counts)}

    @property
    def checks(self) -> tuple[Check, Check]:
        """What a state must be: of these losses, and where they may have been others."""

        def other(state: Any, where: str) -> None:
            record({"sums": every(anything), "counts": every(anything)})(state, where)
            _sums_and_counts(len(state["counts"]))(state, where)

        return _sums_and_counts(len(self.names)), other

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there, or from 0 if the losses have changed."""
        if len(state["counts"]) == len(self.names):
            self._sums.copy_(torch.tensor(state["sums"], dtype=torch.float64))
            self._counts = list(state["counts"])


def _sums_and_counts(size: int) -> Check:
    sums, counts = [number(finite=False)] * size, [integer(0)] * size
    return record({"sums": sequence(*sums), "counts": sequence(*counts)})


class TrainMeter:
    """What a train record says of the micro-batches since the last one.

    ``sums`` (see ``LOGGED``), ``terms`` and ``skipped`` are in checkpoints: a run that was stopped
    between two log lines writes the same numbers. Everything stays on the device until it is
    reported.
    """

    def __init__(self, terms: Sequence[str], device: torch.device) -> None:
        self.sums = torch.zeros(len(LOGGED), dtype=torch.float64, device=device)
        self.terms = MeanMeter(terms, device)
        self.skipped = torch.zeros(3, dtype=torch.int64, device=device)
        """Updates skipped for a non-finite gradient: in all, in a row just now, in a row at most
        since the last record."""
        self.lr = 0.0
        self.grad_norm = torch.zeros(())

    def add(self, out: DistillOutput, terms: LossTerms, num_items: int) -> None:
        """Add a micro-batch whose loss was divided by ``num_items``. Waits for nothing."""
        loss = out.loss.detach().double() * num_items  # the sum may be past float32
        parts = (loss, out.ce, out.kd, out.z, out.num_tokens, out.correct, out.agree)
        self.sums += torch.stack([part.double() for part in parts])
        self.terms.add(terms)

    def add_update(self, update: UpdateResult) -> None:
        """Add what became of an optimizer step. Waits for nothing."""
        self.grad_norm = update.norm
        total, streak, longest = self.skipped
        streak = (streak + 1) * update.skipped
        longest = torch.maximum(longest, streak)
        self.skipped.copy_(torch.stack([total + update.skipped, streak, longest]))

    def collect(self, world: World) -> None:
        """Move what all ranks have summed to the first, as if it had seen all of it."""
        if world.size > 1:
            self.sums.copy_(world.sum_(self.sums.clone()) * world.main)
            self.terms.collect(world)

    def keep_on_main(self, world: World) -> None:
        """After a checkpoint was loaded on all ranks: only the first has seen what is summed."""
        if not world.main:
            self.sums.zero_()
            self.terms.reset()

    def losses(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The total loss and its parts, as means over their own units. Waits for the device.

        ``weights`` are those of the structural terms that count now.
        """
        loss, ce, kd, z, targets, correct, agree = self.sums.tolist()
        per_target = 1 / targets if targets else math.nan
        terms = self.terms.means()
        structural = sum(w * terms[name] for name, w in weights.items() if name in terms)
        written, on_policy = self.terms.total("on_policy_kd")  # a divergence of weight 1
        if on_policy and not targets:  # nothing else has come up
            return {"loss": written / on_policy + structural, **terms}
        return {
            "loss": (loss + written) / (targets + on_policy or math.nan) + structural,
            "ce": ce * per_target,
            "kd": kd * per_target,
            "z": z * per_target,
            "accuracy": correct * per_target,
            "agreement": agree * per_target,
            **terms,
        }

    def reset(self) -> None:
        """Begin anew after a record. A row of skipped updates that is not over goes on."""
        self.sums.zero_()
        self.terms.reset()
        self.skipped[2] = self.skipped[1]


class EvalMetrics:
    """Metrics of one pass over the held-out rows: float64 sums, divided once at the end.

    ``terms`` are the structural terms to report.
    """

    def __init__(self, terms: Sequence[str] = ()) -> None:
        self._names = terms
        self._sums: Tensor | None = None  # [7] on the device
        self._bytes = 0
        self._terms: dict[str, tuple[Tensor, int]] = {}  # sum on the device, count

    def update(
        self,
        out: DistillOutput,
        batch: Batch,
        terms: LossTerms | None = None,
        compared: Tensor | None = None,
    ) -> None:
        """Add a batch, of whose targets ``compared`` [] have an answer of the teacher's, by default
        all. Does not wait for the device."""
        compared = out.num_tokens if compared is None else compared
        parts = (out.ce, out.kd, out.num_tokens, out.correct, out.agree, out.entropy, compared)
        sums = torch.stack([part.double() for part in parts])
        self._sums = sums if self._sums is None else self._sums + sums
        self._bytes += batch.target_bytes
        for name in self._names:
            if terms and name in terms:
                term = terms[name]
                value, count = self._terms.get(name, (0.0, 0))
                self._terms[name] = (value + term.sum.double(), count + term.count)

    def compute(self, divergence: str | None, *, world: World = ALONE) -> dict[str, float]:
        """The metrics by name, over the batches of all ranks; none if there was no batch.

        ``divergence`` is the name of that from the teacher, None without one. Waits for the device.
        """
        if self._sums is None:
            return {}
        if world.size > 1:
            self._collect(world)
        ce, kd, targets, correct, agree, entropy, compared = self._sums.tolist()
        nll = ce / targets
        result = {
            "nll": nll,
            "perplexity": math.exp(nll) if nll < 700 else math.inf,
            "bits_per_byte": ce / (math.log(2) * self._bytes) if self._bytes else math.nan,
            "accuracy": correct / targets,
            "entropy": entropy / targets,
        }
        if divergence is not None:
            compared = compared or math.nan
            result |= {divergence: kd / compared, "agreement": agree / compared}
        return result | {
            name: float(value) / max(count, 1) for name, (value, count) in self._terms.items()
        }

    def _collect(self, world: World) -> None:
        """Sum over all ranks, which have the same terms."""
        assert self._sums is not None
        terms = [(value, count) for value, count in self._terms.values()]
        parts = [*self._sums, self._sums.new_tensor(self._bytes), *(value for value, _ in terms)]
        counts = [self._sums.new_tensor(count) for _, count in terms]
        total = world.sum_(torch.stack([*parts, *counts]))
        self._sums, self._bytes = total[:7], int(total[7])
        values, counts = total[8:].view(2, -1)
        both = zip(self._terms, values, counts.tolist(), strict=True)
        self._terms = {name: (value, int(count)) for name, value, count in both}


ResultRow = dict[str, Any]


def result_row(
    name: str, model: nn.Module | int | None, metrics: Mapping[str, float], prefix: str
) -> ResultRow:
    """One line of the result table, of a ``model`` or one of so many parameters; what is not known
    or does not apply is None."""
    scores = {m.name: metrics.get(f"{prefix}/{m.name}") for m in table_metrics()}
    if isinstance(model, nn.Module):
        model = parameter_count(model)
    return {"name": name, "parameters": model} | scores
