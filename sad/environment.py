"""The process and its machine: devices, memory in use, seeds, versions, signals, quiet libraries.

A run stops in order on the first stop signal and at once on the second. Preemptible machines send
SIGTERM or SIGUSR1 some seconds before they are taken away, a terminal sends SIGINT on Ctrl-C. The
trainer reads ``StopSignals.requested`` after each micro-batch, saves its state and exits. What else
may take long (reading, packing, scoring, evaluation, export) calls ``stop_if_requested``.

Functions import torch, transformers, numpy and psutil when they are called, so that
``sad --version`` waits for none of them.
"""

from __future__ import annotations

import importlib
import logging
import os
import platform
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from sad.errors import StoppedError, UsageError, one_line

if TYPE_CHECKING:
    import torch

PACKAGES = ("student-aware-distillation", "torch", "triton", "transformers", "tokenizers", "numpy")


def library_versions() -> dict[str, str]:
    """Package -> installed version, Python included; "absent" for one that is not installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def import_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Import a library that an extra brings; ``UsageError`` with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UsageError(
            f"{package} must be installed {purpose}, got '{one_line(error)}'; run: "
            f"python -m pip install 'student-aware-distillation[{extra}]'"
        ) from error


def quiet_quantizers() -> None:
    """Silence what torchao and bitsandbytes tell when they are imported: what they lack for other
    devices and uses. transformers imports torchao wherever it is installed."""
    for name in ("torchao", "torch.utils._pytree", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


HUB = logging.getLogger("huggingface_hub")
"""Logger of the Hub's client, which warns of every failed attempt to reach the network; after the
last attempt it raises an error."""


@contextmanager
def quiet_libraries(*, show_bars: bool = False) -> Iterator[None]:
    """Within, silence transformers' and the Hub client's messages below errors, warnings of names
    that transformers itself still uses, and a wrong one of PEFT's.

    transformers' progress bars are silenced as well, unless ``show_bars`` on a terminal. Of blocks
    that overlap, in several threads, the first one to begin decides, and the last one to end brings
    back what was set before.
    """
    with _QUIET.lock:
        if _QUIET.blocks == 0:
            _QUIET.undo.enter_context(_quieted(show_bars))
        _QUIET.blocks += 1
    try:
        yield
    finally:
        with _QUIET.lock:
            _QUIET.blocks -= 1
            if _QUIET.blocks == 0:
                _QUIET.undo.close()


MAKING_MODELS = threading.RLock()
"""Held by whoever makes a model. transformers exchanges ``tie_weights``, the functions that draw
weights and torch's default dtype meanwhile, for the whole process: of two threads that overlap, the
one that ends last would leave weights untied in every later model."""


class _Quiet:
    """How many blocks are within ``quiet_libraries``: what it sets is the whole process's."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.blocks = 0
        self.undo = ExitStack()


_QUIET = _Quiet()


@contextmanager
def _quieted(show_bars: bool) -> Iterator[None]:
    """As ``quiet_libraries``, of one block at a time."""
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    hub_level = HUB.level
    transformers_logging.set_verbosity_error()
    if not (show_bars and sys.stderr.isatty()):
        transformers_logging.disable_progress_bar()
    HUB.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # PEFT 0.21 does not find those of parameters, and `add_adapters` has looked.
            warnings.filterwarnings(
                "ignore", "The following (rank|alpha)_pattern keys did not match"
            )
            yield
    finally:
        HUB.setLevel(hub_level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Context manager that catches SIGTERM, SIGINT and SIGUSR1.

    >>> with StopSignals() as signals:
    ...     signals.requested is None
    True

    The second signal, whichever it is, ends the process at once with ``128 + n``: nothing is
    flushed and no ``finally`` runs. At the end of the block the previous handlers are restored.
    Only the main thread may set handlers; in any other this does nothing.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        """Name of the first signal, such as ``SIGTERM``; None before any."""
        self._previous: dict[signal.Signals, Any] = {}
        self._outer: StopSignals | None = None

    def __enter__(self) -> StopSignals:
        global _active
        if threading.current_thread() is threading.main_thread():
            self._outer, _active = _active, self
            self._previous = {
                number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS
            }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _active
        if _active is self:
            _active = self._outer
        for number, handler in self._previous.items():
            # None is a handler that was not installed from Python, which Python cannot restore.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            os._exit(128 + number)
        self.requested = signal.Signals(number).name


_active: StopSignals | None = None
"""Who catches the signals of the process now."""


def stop_if_requested(doing: str, again: str = "with --resume_from_checkpoint auto ") -> None:
    """Raise ``StoppedError`` if a stop signal has come; ``doing`` names what it interrupts, and the
    same command goes on ``again``, with these words.

    For loops that may take seconds, between two steps. What is interrupted must be harmless to
    repeat: nothing of it is saved.
    """
    if _active is not None and _active.requested is not None:
        raise StoppedError(
            f"{doing} must be finished, got {_active.requested}; the same command {again}goes on"
        )


def memory_now(device: torch.device | str | int | None = None) -> dict[str, int]:
    """Memory in use, in bytes.

    ``rss_bytes`` is the resident memory of this process, ``rss_peak_bytes`` its maximum so far
    (Linux only). Once CUDA is in use, for ``device``: ``cuda_used_bytes`` of ``cuda_total_bytes``
    by all processes, ``cuda_peak_bytes`` the maximum that this process's tensors took, and
    ``cuda_reserved_bytes`` what its allocator holds.
    """
    import psutil
    import torch

    memory = {"rss_bytes": psutil.Process().memory_info().rss} | _peak_rss()
    if torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info(device)
        memory |= {
            "cuda_used_bytes": total - free,
            "cuda_total_bytes": total,
            "cuda_peak_bytes": torch.cuda.max_memory_allocated(device),
            "cuda_reserved_bytes": torch.cuda.memory_reserved(device),
        }
    return memory


def _peak_rss() -> dict[str, int]:
    """Peak resident memory from /proc; ``getrusage`` would include that of the parent process."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return {}
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return {"rss_peak_bytes": 1024 * int(line.split()[1])}
    return {}


def processes() -> tuple[int, int]:
    """Rank of this process and number of processes, as torchrun and accelerate announce them.

    A rank that no such number of processes has is 0, so that its errors are said.
    """
    numbers = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    rank, world_size = (int(text) if text.isdecimal() else 0 for text in numbers)
    world_size = max(world_size, 1)
    return rank if rank < world_size else 0, world_size


def resolve_device(name: str, key: str = "device") -> torch.device:
    """The torch device of a name; ``auto`` is CUDA where there is one, else the CPU.

    Raises ``UsageError``, which names the configuration's ``key``, for a device that this machine
    does not have.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"{key} must be one that this machine has, got {name} ({one_line(error)}); "
            "use auto or cpu"
        ) from error
    return device


def seed_everything(seed: int, *, deterministic: bool = False) -> None:
    """Seed the global generators of Python, numpy and torch.

    ``deterministic`` also makes torch take deterministic kernels, and raise where it has none.
    """
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
