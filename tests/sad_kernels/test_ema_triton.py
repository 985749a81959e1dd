"""How a whole model's update and swap reach the device: tables, launches, operators, traffic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sad_kernels import ema, ema_swap_, ema_update_, reference
from sad_kernels._extents import Extent
from sad_kernels._triton import ema as triton_ema
from support.oracle import IMPLS, assert_ema_within
from support.traffic import counted_traffic, needs_interpreter
from torch import Tensor
from torch.library import opcheck

impls = pytest.mark.parametrize("impl", IMPLS)

Lists = tuple[list[Tensor], list[Tensor]]


@pytest.fixture(autouse=True)
def small_blocks_and_no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs per tensor; no table is left from a test before."""
    monkeypatch.setattr(triton_ema, "BLOCK", 32)
    monkeypatch.setattr(triton_ema, "_captured", {})
    triton_ema._plan.cache_clear()


class Launches:
    """Stands for a kernel and notes (dtype of the parameters, programs) of every launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.seen: list[tuple[str, int]] = []

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(table: Tensor, *args: Any, **options: Any) -> None:
            self.seen.append((str(options["PARAM"]), *grid))
            self.kernel[grid](table, *args, **options)

        return launch


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def a_model(count: int = 7, dtype: torch.dtype = torch.bfloat16) -> Lists:
    params = [torch.randn(20 + n).to(dtype) for n in range(count)]
    return [torch.randn(p.shape) for p in params], params


def update_and_judge(shadows: list[Tensor], params: list[Tensor], decay: float) -> None:
    before = [shadow.clone() for shadow in shadows]
    expected = [shadow.double() for shadow in shadows]
    reference.ema_update_(expected, [param.double() for param in params], decay)
    ema_update_(shadows, params, decay, impl="triton")
    for shadow, oracle, old, param in zip(shadows, expected, before, params, strict=True):
        assert_ema_within(shadow, oracle, old, param)


# --- Launches ------------------------------------------------------------------------------------


def test_one_launch_per_pair_of_dtypes_and_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 elements are 32 programs of 32; every other tensor begins 4 or 2 bytes off."""
    shadows, params = [], []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for start in (0, 1, 0, 1):
            shadows.append(torch.randn(1001)[start:][:1000])
            params.append(torch.randn(1001).to(dtype)[start:][:1000])
    launches = Launches(triton_ema._update_kernel)
    monkeypatch.setattr(triton_ema, "_update_kernel", launches)
    update_and_judge(shadows, params, 0.25)
    assert Counter(launches.seen) == {("fp32", 64): 2, ("bf16", 64): 2, ("fp16", 64): 2}

    swaps = Launches(triton_ema._swap_kernel)
    monkeypatch.setattr(triton_ema, "_swap_kernel", swaps)
    ema_swap_(shadows[:8], params[:8], impl="triton")
    assert Counter(swaps.seen) == {("int32", 64): 2, ("int16", 64): 2}


def test_alignment_is_that_of_both_sides() -> None:
    def aligned(shadow: Tensor, param: Tensor) -> bool:
        addresses = shadow.data_ptr(), param.data_ptr()
        pair = Extent(shadow.device, shadow.dtype, param.dtype, *addresses, numel=9)
        (launch,) = triton_ema._plan((pair,), 32)
        return launch.aligned

    s, p = torch.zeros(64), torch.zeros(64)
    assert aligned(s, p) and aligned(s[4:], p[8:])
    for i in (1, 2, 3):
        assert not aligned(s[i:], p) and not aligned(s, p[i:])
    half = p.bfloat16()
    assert aligned(s, half[8:]) and not aligned(s, half[4:])


def test_parts_that_triton_cannot_take_go_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with ``auto``: a model with float64 parts, or with some on the CPU."""

    def choose(impl: str, device: str, double: bool) -> str:
        return "torch" if double else "triton"

    monkeypatch.setattr(ema, "choose_impl", choose)
    launches = Launches(triton_ema._update_kernel)
    monkeypatch.setattr(triton_ema, "_update_kernel", launches)
    shadows = [torch.zeros(3), torch.zeros(3, dtype=torch.float64), torch.zeros(3)]
    ema_update_(shadows, [torch.ones_like(s) for s in shadows], 0.25)
    assert [shadow.tolist() for shadow in shadows] == [[0.75] * 3] * 3
    assert launches.seen == [("fp32", 2)]


# --- Tables --------------------------------------------------------------------------------------


def test_rows_of_a_table() -> None:
    pair = Extent(torch.device("cpu"), torch.float32, torch.bfloat16, 1000, 5000, 70)
    rows = triton_ema._rows(pair, 32).tolist()
    assert rows == [[1000, 5000, 32], [1128, 5064, 32], [1256, 5128, 6]]


def test_tables_reach_past_32_bits() -> None:
    """Byte offsets past 2^33, and addresses in the upper half of the address space."""
    numel, block = (1 << 31) + 5, 1 << 20
    high = (1 << 64) - (1 << 40)
    pair = Extent(torch.device("cpu"), torch.float32, torch.bfloat16, 1 << 45, high, numel)
    last = triton_ema._rows(pair, block)[-1].tolist()
    start = 1 << 31
    assert last == [(1 << 45) + 4 * start, high + 2 * start - (1 << 64), 5]


def test_the_same_storage_is_planned_once() -> None:
    shadows, params = a_model()
    for decay in (0.5, 0.25, scalar(0.75)):
        ema_update_(shadows, params, decay, impl="triton")
    ema_swap_(shadows, params, impl="triton")
    assert triton_ema._plan.cache_info().misses == 1


@pytest.mark.parametrize("side", ["shadow", "param"])
def test_replaced_storage_is_noticed(side: str) -> None:
    """A table of old addresses would go on averaging what the model no longer is."""
    shadows, params = a_model()
    ema_update_(shadows, params, 0.5, impl="triton")
    replaced = (shadows if side == "shadow" else params)[3]
    old = replaced.data
    replaced.data = torch.full_like(old, 100.0)
    kept = old.clone()
    update_and_judge(shadows, params, 0.5)
    assert torch.equal(old, kept)


def test_tables_are_bounded() -> None:
    models = [a_model(count=1) for _ in range(3 * triton_ema.PLANS)]
    for shadows, params in models:
        ema_update_(shadows, params, 0.5, impl="triton")
    info = triton_ema._plan.cache_info()
    assert info.misses == len(models) and info.currsize == triton_ema.PLANS
    assert triton_ema._captured == {}


def test_capture_wants_a_table_and_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured graph holds the table's address, so the table must exist before and stay after."""
    shadows, params = a_model()
    before = [shadow.clone() for shadow in shadows]
    monkeypatch.setattr(triton_ema, "_is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="before a CUDA graph captures"):
        ema_update_(shadows, params, 0.5, impl="triton")
    assert all(map(torch.equal, shadows, before))

    monkeypatch.setattr(triton_ema, "_is_capturing", lambda device: False)
    ema_update_(shadows, params, 0.5, impl="triton")
    assert triton_ema._captured == {}
    monkeypatch.setattr(triton_ema, "_is_capturing", lambda device: True)
    ema_update_(shadows, params, 0.5, impl="triton")
    monkeypatch.setattr(triton_ema, "_is_capturing", lambda device: False)
    for _ in range(triton_ema.PLANS):
        ema_update_(*a_model(count=1), 0.5, impl="triton")
    ((launch,),) = triton_ema._captured.values()
    assert launch.table[:, 2].sum() == sum(p.numel() for p in params)


# --- Operators -----------------------------------------------------------------------------------


def mixed_model() -> Lists:
    """Permuted, sliced and frozen tensors, and two dtypes."""
    params: list[Tensor] = [
        torch.nn.Parameter(torch.randn(8, 8, dtype=torch.bfloat16)),
        torch.randn(5, 7).T,
        torch.randn(40)[3:],
        torch.nn.Parameter(torch.randn(4), requires_grad=False),
    ]
    return [torch.randn_like(p, dtype=torch.float32, requires_grad=False) for p in params], params


@impls
def test_opcheck(impl: str) -> None:
    shadows, params = mixed_model()
    opcheck(ema.update_op, (shadows, params, scalar(0.9), impl))
    opcheck(ema.swap_op, (shadows, [p.detach() for p in params], impl))


@pytest.mark.few(1)
@impls
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_in_one_graph(backend: str, impl: str) -> None:
    """Bit for bit as without a compiler, for every kind of decay.

    Inductor must work on the tensors themselves: copies of a model cost memory, and each copy would
    have a table of its own. ``aot_eager`` copies, by its nature.
    """

    def step(shadows: list[Tensor], params: list[Tensor], decay: float | Tensor) -> None:
        ema_update_(shadows, params, decay, impl=impl)
        ema_swap_(shadows, params, impl=impl)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    shadows, params = mixed_model()
    own = [x.clone() for x in shadows], [x.detach().clone() for x in params]
    step(*own, 0.5)
    step(shadows, params, 0.5)
    planned = triton_ema._plan.cache_info().misses
    for decay in (scalar(0.9), 0.8, 0.7, 1.0):
        step(*own, decay)
        compiled(shadows, params, decay)
        for ours, theirs in zip(shadows + params, own[0] + own[1], strict=True):
            assert torch.equal(ours.detach(), theirs)
    if backend != "aot_eager":
        assert triton_ema._plan.cache_info().misses == planned


@impls
def test_versions_tell_what_was_written(impl: str) -> None:
    """Autograd must see that what it saved has changed."""
    shadows, params = mixed_model()
    versions = [x._version for x in shadows + params]
    ema_update_(shadows, params, 0.5, impl=impl)
    updated = [x._version for x in shadows + params]
    ema_swap_(shadows, params, impl=impl)
    swapped = [x._version for x in shadows + params]
    grew = [b > a for a, b in zip(versions, updated, strict=True)]
    assert grew == [True] * len(shadows) + [False] * len(params)
    assert all(b > a for a, b in zip(updated, swapped, strict=True))


# --- Traffic -------------------------------------------------------------------------------------


@needs_interpreter
@pytest.mark.parametrize("start", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_update_reads_each_side_once_and_writes_the_shadow_once(
    dtype: torch.dtype, start: int
) -> None:
    shadow, param = torch.randn(101)[start:], torch.randn(101).to(dtype)[start:]
    with counted_traffic() as traffic:
        ema_update_([shadow], [param], 0.5, impl="triton")
    assert traffic.read_from(shadow) == traffic.written_to(shadow) == shadow.nbytes
    assert traffic.read_from(param) == param.nbytes
    assert traffic.written_bytes == shadow.nbytes
    programs = 4
    assert traffic.read_bytes - shadow.nbytes - param.nbytes == programs * (3 * 8 + 2 * 4)


@needs_interpreter
def test_decay_1_touches_nothing() -> None:
    shadow, param = torch.randn(100), torch.randn(100)
    with counted_traffic() as traffic:
        ema_update_([shadow], [param], 1.0, impl="triton")
    assert traffic.written_bytes == traffic.read_from(shadow) == traffic.read_from(param) == 0


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swap_reads_and_writes_each_side_once(dtype: torch.dtype) -> None:
    shadow, param = torch.randn(100), torch.randn(100).to(dtype)
    with counted_traffic() as traffic:
        ema_swap_([shadow], [param], impl="triton")
    for tensor in (shadow, param):
        assert traffic.read_from(tensor) == traffic.written_to(tensor) == tensor.nbytes
    assert traffic.written_bytes == shadow.nbytes + param.nbytes
