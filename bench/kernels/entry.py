"""How much is measured, and what becomes of one peer in one case."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from bench.kernels.timing import Device, Step, Times
from bench.peers import Peer

Row = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How much is measured, and until when."""

    rounds: int
    calls: int  # of a round, at least
    deadline: float  # of time.monotonic()
    round_ms: float = 1e9  # of calls of one peer in one round, but two at least
    compiled: bool = True  # peers that compile for long, and further settings of others
    peers: tuple[str, ...] = ()  # none: all
    graphs: bool = True
    resident: bool = False  # memory in a fresh process, too
    interpreted: bool = False  # Triton's interpreter stands in for a GPU: results, never times

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def leaves_out(self, peer: Peer, device: Device) -> str | None:
        """Why a peer takes no part, or None."""
        if device.device.type not in peer.devices and not self.interpreted:
            return "needs a GPU" if peer.devices == ("cuda",) else "runs on a CPU only"
        if self.peers and peer.name not in self.peers:
            return "not asked for"
        if not self.peers and not self.compiled and (peer.compiles or peer.extra):
            return "left out of small sets"
        return None if self.left() > 0 else "no time was left"


@dataclass
class Entry:
    """A peer in a case: what it does, how that went, what was measured."""

    peer: Peer
    step: Step | None = None
    status: str = "ok"
    reason: str | None = None
    rounds: list[list[Times]] = field(default_factory=list)
    no_grad: list[float] | None = None
    figures: Row = field(default_factory=dict)

    def end(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason

    @property
    def full(self) -> list[float]:
        """Median of each round."""
        return [statistics.median(t.full for t in times) for times in self.rounds]


@dataclass
class Gemm:
    """The bare products of a case, which take part in its rounds."""

    step: Step | None = None
    full: list[float] = field(default_factory=list)  # median of each round
