"""What torch's CPU allocator holds, counted from its own events: no temporary is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes alive at once beyond those alive before; results that stay count."""
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
