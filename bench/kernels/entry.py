"""The measuring effort of a run, and the state of one peer in one case."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from bench.kernels.timing import Device, Step, Times
from bench.peers import Peer

Row = dict[str, Any]
NO_TIME = "no time was left"


@dataclass(frozen=True)
class Effort:
    """How much a run measures, and its deadline."""

    rounds: int
    calls: int  # in a round, at least
    deadline: float  # by time.monotonic()
    round_ms: float = 1e9  # the longest round of one peer, but two calls at least
    compiled: bool = True  # include peers that compile, and further settings of peers
    peers: tuple[str, ...] = ()  # by name; empty: all
    graphs: bool = True  # capture CUDA graphs
    resident: bool = False  # also measure resident memory, in a fresh process
    interpreted: bool = False  # Triton's interpreter replaces a GPU: its times mean nothing

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def skip_reason(self, peer: Peer, device: Device) -> str | None:
        """Why a peer is skipped, or None."""
        if device.device.type not in peer.devices and not self.interpreted:
            return "needs a GPU" if peer.devices == ("cuda",) else "runs on a CPU only"
        if self.peers and peer.name not in self.peers:
            return "not asked for"
        if not self.peers and not self.compiled and (peer.compiles or peer.extra):
            return "left out of small sets"
        return None if self.left() > 0 else NO_TIME


@dataclass
class Entry:
    """One peer in one case: its step, its status and its measurements."""

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
        """Median milliseconds of each round, forward and backward."""
        return [statistics.median(t.full for t in times) for times in self.rounds]


@dataclass
class Gemm:
    """The bare matrix products of a case, timed in the same rounds as the peers."""

    step: Step | None = None
    full: list[float] = field(default_factory=list)  # median of each round
