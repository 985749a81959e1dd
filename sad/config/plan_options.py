"""The options of ``sad plan`` that are no keys of a configuration.

Nothing slow is imported: wrong words wait for no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sad.config.command_options import positive_number, refused, take_options

NAMES = ("ranks", "ranks_per_node", "bandwidth", "tflops", "memory")


@dataclass(frozen=True)
class PlanOptions:
    """What ``sad plan`` is asked beside the configuration."""

    ranks: int | None = None
    """Processes; None: the one process of a run without torchrun."""
    ranks_per_node: int = 8
    bandwidth: tuple[float, float] = (300.0, 40.0)
    """GB/s per process, inside a node and between nodes."""
    tflops: float | None = None
    """10^12 operations per second of one process; None: those of the device, if they are known."""
    asks_for_batch: bool = False
    """Whether the largest batch is wanted that fits a memory."""
    memory: float | None = None
    """That memory in GiB; None: the device's own."""

    @property
    def flops_per_second(self) -> float | None:
        return None if self.tflops is None else self.tflops * 1e12


def read_plan_options(words: Sequence[str]) -> tuple[PlanOptions, list[str]]:
    """Take the options out of the words of a command line; the others are overrides of keys.

    Raises ``UsageError`` for a value that an option cannot have.
    """
    values, _, others = take_options(words, NAMES)
    ranks = _count("ranks", values["ranks"]) if "ranks" in values else None
    return PlanOptions(
        ranks=ranks,
        ranks_per_node=_count("ranks_per_node", values.get("ranks_per_node", "8")),
        bandwidth=_bandwidth(values.get("bandwidth", "300,40")),
        tflops=_positive("tflops", values["tflops"]) if "tflops" in values else None,
        asks_for_batch="memory" in values,
        memory=_positive("memory", values["memory"]) if values.get("memory") else None,
    ), others


def _count(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text[:7]) and len(text) < 7):
        raise refused(name, "be a positive integer", text, f"write for example --{name} 8")
    return int(text)


def _positive(name: str, text: str) -> float:
    value = positive_number(text)
    if value is None:
        raise refused(name, "be a number above 0", text, "leave the unit out")
    return value


def _bandwidth(text: str) -> tuple[float, float]:
    parts = text.split(",")
    if len(parts) != 2:
        remedy = "write for example --bandwidth 300,40"
        raise refused("bandwidth", "be two numbers: inside a node, between nodes", text, remedy)
    inside, between = (_positive("bandwidth", part) for part in parts)
    return inside, between
