"""Peak memory of torch's CPU allocator, from its allocation events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], Any]) -> int:
    """Peak bytes allocated during the call, its results included, beyond those held before."""
    # acc_events only keeps torch 2.11 from warning that a second cycle would clear the first.
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        kept = function()
    profiler_: Any = profiler.profiler
    events = (e for e in profiler_.kineto_results.events() if e.name() == "[memory]")
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    del kept
    return peak
