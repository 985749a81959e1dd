"""The largest ``per_device_train_batch_size`` that fits a given memory, by the plans of memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from sad.config.schema import DistillConfig
from sad.environment import memory_now
from sad.errors import UsageError
from sad.models.cached_targets import CachedTargets
from sad.models.memory_plan import plan, planned_device
from sad.models.rank_plan import Cluster, plan_ranks

CUDA_CONTEXT = 512 * 2**20
"""Bytes that a CUDA context takes besides, about."""

MOST_ROWS = 1 << 16
STRAIGHT_TRIES = 8


def largest_batch(
    config: DistillConfig,
    memory: int,
    cluster: Cluster | None = None,
    cached: CachedTargets | None = None,
) -> tuple[int, int]:
    """Rows per micro-batch and process, and the bytes that they need: the most that fit ``memory``
    bytes, on one process or on each of a ``cluster``. ``cached`` are the sizes of a
    ``teacher_cache``.

    0 rows if one does not fit; its need is then returned. What more rows than ``MOST_ROWS`` need is
    not asked. ``global_batch_size`` is left aside.
    """
    besides = beside_tensors(config)

    def need(rows: int) -> int:
        one = replace(config, per_device_train_batch_size=rows, global_batch_size=None)
        if cluster is None:
            return besides + plan(one, cached=cached).total
        return besides + plan_ranks(one, cluster, cached=cached).total

    return most_that_fit(need, memory)


def most_that_fit(need: Callable[[int], int], memory: int) -> tuple[int, int]:
    """The largest n up to ``MOST_ROWS`` with ``need(n) <= memory``, and ``need(n)``; for no such n
    0 and ``need(1)``.

    ``need`` must not fall, and costs much. Where it is nearly a straight line a few calls suffice:
    the next n is where the line through the first and the last reaches ``memory``. After
    ``STRAIGHT_TRIES`` of them the range is halved.
    """
    first = need(1)
    if first > memory:
        return 0, first
    low, high = 1, MOST_ROWS + 1
    fitting, guess, tries = first, 2, 0
    while high - low > 1:
        n = min(max(guess, low + 1), high - 1)
        needed = need(n)
        if needed <= memory:
            low, fitting = n, needed
        else:
            high = n
        tries += 1
        rise = (needed - first) / (n - 1)
        straight = tries < STRAIGHT_TRIES and rise > 0
        guess = 1 + int((memory - first) / rise) if straight else (low + high) // 2
    return low, fitting


def beside_tensors(config: DistillConfig) -> int:
    """Bytes that a process takes besides what is planned: its libraries, or a CUDA context."""
    on_cpu = planned_device(config.device).type == "cpu"
    return memory_now()["rss_bytes"] if on_cpu else CUDA_CONTEXT


def memory_of_device(config: DistillConfig) -> int:
    """Bytes that the device has; ``UsageError`` for one without a memory of its own here."""
    device = planned_device(config.device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise UsageError(
            f"memory must be stated for device {device}, which has none of its own here, got "
            "--memory alone; write for example --memory 24"
        )
    return torch.cuda.get_device_properties(device).total_memory


def describe_largest(
    config: DistillConfig,
    memory: float | None,
    cluster: Cluster | None = None,
    cached: CachedTargets | None = None,
) -> str:
    """``largest_batch`` in a line; ``memory`` is in GiB, by default that of the device."""
    size = memory_of_device(config) if memory is None else int(memory * 2**30)
    rows, need = largest_batch(config, size, cluster, cached)
    of = f"of {size / 2**30:,.1f} GiB"
    if not rows:
        return f"no batch fits: one row needs {need / 2**30:,.2f} {of}"
    more = " or more" if rows == MOST_ROWS else ""
    line = (
        f"largest per_device_train_batch_size: {rows:,}{more}, which needs {need / 2**30:,.2f} {of}"
    )
    if config.global_batch_size is None:
        return line
    return f"{line}; global_batch_size overrides it"
