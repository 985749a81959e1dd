"""Timing of one call, by CUDA events or the CPU's clock; peak memory, CUDA graphs, host time.

On a GPU calls are queued one after the other, and before each of them a buffer four times as large
as the L2 is overwritten, so that no call finds its inputs there. Work outside the two events, such
as restoring inputs, is not timed. If the host launches a call more slowly than the GPU runs it, its
time is the host's: ``graph`` measures it without the host, ``host_us`` the host alone.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

MIB = 1 << 20


class DeviceLost(Exception):
    """The GPU failed: nothing more can be measured in this process."""


class Unmeasurable(Exception):
    """A quantity cannot be measured here; the message is the reason."""


class Times(NamedTuple):
    """Milliseconds of one call. For a moving average ``forward`` is all of it."""

    forward: float
    backward: float

    @property
    def full(self) -> float:
        return self.forward + self.backward


@dataclass
class Step:
    """A timed call: ``forward``, then ``backward`` of its result; ``prepare`` is not timed."""

    forward: Callable[[], Any]
    backward: Callable[[Any], None] = lambda result: None
    prepare: Callable[[], None] = lambda: None

    def __call__(self) -> Any:
        result = self.forward()
        self.backward(result)
        return result


def loss_step(
    loss: Callable[[], Tensor],
    upstream: Tensor,
    leaves: Sequence[Tensor],
    originals: Sequence[Tensor] = (),
) -> Step:
    """A loss and its backward; before each, leaves are restored from ``originals``."""

    def prepare() -> None:
        for leaf in leaves:
            leaf.grad = None
        for leaf, original in zip(leaves, originals, strict=False):
            leaf.detach().copy_(original)

    return Step(loss, lambda result: result.backward(upstream), prepare)


def peak_bytes(function: Callable[[], Any]) -> int:
    """Peak bytes of torch's CPU allocator during a call, beyond those allocated before."""
    # acc_events only keeps torch 2.11 from warning that a second cycle would clear the first.
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        function()
    results: Any = profiler.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@dataclass
class Cpu:
    """Measures by the host's clock and torch's allocation events."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def time(self, step: Step, calls: int) -> list[Times]:
        times = []
        for _ in range(calls):
            step.prepare()
            a = time.perf_counter()
            result = step.forward()
            b = time.perf_counter()
            step.backward(result)
            c = time.perf_counter()
            times.append(Times(1e3 * (b - a), 1e3 * (c - b)))
        return times

    def finish(self) -> None:
        """Do nothing: a CPU works synchronously."""

    def free(self) -> None:
        gc.collect()

    def peak(self, step: Step) -> int:
        step.prepare()
        return peak_bytes(step)

    def graph(self, step: Step, calls: int) -> float:
        raise Unmeasurable("a CPU has no graphs")


class Gpu:
    """Measures by CUDA events and torch's memory statistics."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        properties = torch.cuda.get_device_properties(self.device)
        l2 = getattr(properties, "L2_cache_size", 0) or 64 * MIB
        self.cache = torch.empty(4 * l2, dtype=torch.uint8, device=self.device)

    def time(self, step: Step, calls: int) -> list[Times]:
        marks = []
        # Calls are queued without waiting; one synchronisation at the end, then events are read.
        for _ in range(calls):
            step.prepare()
            self.cache.zero_()  # evict the inputs from L2
            a, b, c = (torch.cuda.Event(enable_timing=True) for _ in range(3))
            a.record()
            result = step.forward()
            b.record()
            step.backward(result)
            c.record()
            del result
            marks.append((a, b, c))
        torch.cuda.synchronize()
        return [Times(a.elapsed_time(b), b.elapsed_time(c)) for a, b, c in marks]

    def finish(self) -> None:
        """Wait for the GPU; ``DeviceLost`` if it reports an error."""
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLost(one_line(error)) from error

    def free(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def peak(self, step: Step) -> int:
        step.prepare()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def graph(self, step: Step, calls: int) -> float:
        """Median milliseconds of a CUDA graph's replay; ``Unmeasurable`` if capture fails."""
        self._require_no_sync(step)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm up on the stream of the capture
            step.prepare()
            step()
        torch.cuda.synchronize()
        step.prepare()
        torch.cuda.empty_cache()  # the graph has a memory pool of its own
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin()
                try:
                    result = step()
                finally:
                    graph.capture_end()
            del result
        except Exception as error:
            raise Unmeasurable(one_line(_first(error))) from error
        torch.cuda.synchronize()
        marks = []
        for _ in range(calls):
            self.cache.zero_()
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record()
            graph.replay()
            b.record()
            marks.append((a, b))
        torch.cuda.synchronize()
        graph.reset()
        torch.cuda.empty_cache()
        return statistics.median(a.elapsed_time(b) for a, b in marks)

    def _require_no_sync(self, step: Step) -> None:
        """Raise ``Unmeasurable`` if the step waits for the GPU, which cannot be captured.

        Asked before capture, because a failed one leaves the allocator unable to reuse memory.
        """
        step.prepare()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        except RuntimeError as error:
            raise Unmeasurable(f"waits for the GPU: {one_line(error)}") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")


Device = Cpu | Gpu


def launched_ms(device: Device, call: Callable[[], Any], calls: int) -> float:
    """Median milliseconds of a call without the host's launch time: in a CUDA graph on a GPU."""
    if isinstance(device, Gpu):
        return device.graph(Step(call), calls)
    return statistics.median(t.full for t in device.time(Step(call), calls))


def host_us(device: Device, step: Step, calls: int = 20) -> float:
    """Microseconds the host takes to launch a call, or on a CPU to run it."""
    for _ in range(3):
        step.prepare()
        step()
    device.finish()
    start = time.perf_counter()
    for _ in range(calls):
        step.prepare()
        step()
    elapsed = time.perf_counter() - start
    device.finish()
    return 1e6 * elapsed / calls


def percentiles(values: Sequence[float]) -> list[float]:
    """The 20th, 50th and 80th percentile, interpolated."""
    if len(values) == 1:
        return [values[0]] * 3
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return [deciles[1], deciles[4], deciles[7]]


def one_line(error: BaseException) -> str:
    """Type and message of an exception in at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def _first(error: BaseException) -> BaseException:
    """The first exception of a chain, which caused the others."""
    while error.__context__ is not None:
        error = error.__context__
    return error
