"""What every test relies on: interpreted Triton without a GPU, poisoned memory, seeds, no network.

The environment is set while this file is imported, before any test module can import torch's
friends: Triton reads ``TRITON_INTERPRET`` and huggingface_hub ``HF_HUB_OFFLINE`` at import.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from importlib.util import find_spec

assert "triton" not in sys.modules, "triton was imported before its mode could be chosen"

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers warns about threads once a test forks
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it deterministic cuBLAS calls raise
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process per core already

import torch

HAS_TRITON = find_spec("triton") is not None
if HAS_TRITON and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
from hypothesis import settings
from sad_kernels._torch import gemm
from support import default_set

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("ci")


@pytest.hookimpl(tryfirst=True)  # before ``-m`` is asked
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave most cases of long grids to ``-m slow``: see ``support/default_set.py``."""
    default_set.thin_out(items, interpreted=os.environ.get("TRITON_INTERPRET") == "1")


@pytest.fixture(autouse=True)
def products_of_any_processor() -> Iterator[None]:
    """bf16 products as a processor makes them that has no instructions for it: the results of
    tests must not depend on the machine. ``test_products.py`` asks for the others."""
    before, gemm.HAS_BF16_PRODUCTS = gemm.HAS_BF16_PRODUCTS, False
    yield
    gemm.HAS_BF16_PRODUCTS = before


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN (integers: the maximum), so that reading it unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def private_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches go to a folder of this session, never to the home of the person who runs the tests."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    cache.mkdir(exist_ok=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture(autouse=True)
def small_tiles() -> Iterator[None]:
    """Interpreted kernels cross tiles and segments of small vocabularies, as on a GPU of large."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from sad_kernels._triton.tile_sizes import Tile, tile_rule

    def small(arch: str, kernel: str, vocab: int, pressure: int, ids: bool) -> Tile:
        if vocab <= 1024:
            return Tile(32, 64, 1, threads_per_warp=2)  # two pieces of 16 bits, four of fp32
        return Tile(1 << 16, 1 << 17, 1 << 12, threads_per_warp=2)  # one or two

    with tile_rule(small):
        yield


@pytest.fixture(scope="session", autouse=True)
def interpreter_for_tests() -> Iterator[None]:
    """Interpreted kernels run quickly: see ``support/interpreter.py``."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from support import interpreter

    with pytest.MonkeyPatch.context() as patch:
        interpreter.patch_language_once_per_launch(patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def kernels_on_the_gpu() -> Iterator[None]:
    """With a GPU, compiled kernels take the tests' CPU tensors there: see ``on_gpu.py``."""
    if not HAS_TRITON or os.environ.get("TRITON_INTERPRET") == "1":
        yield
        return
    from support import on_gpu

    with pytest.MonkeyPatch.context() as patch:
        on_gpu.take_cpu_tensors(patch)
        yield
