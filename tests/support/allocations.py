"""Peak memory of torch's CPU allocator, from its allocation events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sad_kernels._torch.scratch import release_scratch
from torch.autograd.profiler import profile


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most bytes alive at once beyond those alive before; results that stay count."""
    # torch.profiler would turn every event into a Python object: twenty times the call's own time.
    profiler: Any = profile(profile_memory=True)
    release_scratch()  # buffers of earlier calls count as well
    with profiler:
        kept = function()
    events = (e for e in profiler.kineto_results.events() if e.name() == "[memory]")
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    del kept
    return peak
