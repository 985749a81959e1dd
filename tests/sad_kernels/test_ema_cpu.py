"""The torch path of averaging and swapping on a CPU: its bits, and what it spends on them."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from sad_kernels import ema, ema_swap_, ema_update_, reference
from sad_kernels._torch import ema as torch_ema
from sad_kernels._triton import ema as triton_ema
from support.ema import DECAYS, DTYPES, Watch, bits, floats, scalar
from support.oracle import IMPLS
from torch import Tensor

SIZES = (1, 3, 8, 9, 5, 31, 32, 33, 97, 1, 1000)  # in blocks of 32, some of which are shared
SWAPPED = [  # (shadow, parameter)
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64),
]
NEXT_TO_HALF = 0.5 + 2.0**-40  # 1 - this is below 1/2, but not once it is rounded to fp32


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_ema, "BLOCK", 32)


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls the operators' functions directly: inside of an operator a watch sees nothing."""
    monkeypatch.setattr(ema, "update_op", ema._update)
    monkeypatch.setattr(ema, "swap_op", ema._swap)


def random_bits(n: int, dtype: torch.dtype) -> Tensor:
    """Infinities, NaNs and numbers next to zero among them."""
    return torch.randint(-(2**63), 2**63 - 1, (n,)).view(dtype)[:n].clone()


# --- Bits ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", ["numbers", "bits"])
@pytest.mark.parametrize("decay", [*DECAYS, NEXT_TO_HALF, 0.0, 1.0, -0.3, 1.7, torch.nan])
def test_an_update_has_the_bits_of_the_other_devices(
    decay: float, kind: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Every NaN counts as equal: which of two is kept depends on the order of the operands."""
    if kind == "bits":
        pairs = [(random_bits(n, dtypes[0]), random_bits(n, dtypes[1])) for n in SIZES]
    else:
        pairs = [(torch.randn(n).to(dtypes[0]), torch.randn(n).to(dtypes[1])) for n in SIZES]
        zeros = torch.tensor([0.0, -0.0, 0.0, -0.0])
        pairs.append((zeros.to(dtypes[0]), zeros.sort(stable=True).values.to(dtypes[1])))
    others = [(s.clone(), p) for s, p in pairs]
    torch_ema.update(pairs, scalar(decay))
    torch_ema._update_elsewhere(others, scalar(decay))
    for (ours, _), (theirs, _) in zip(pairs, others, strict=True):
        assert ((bits(ours) == bits(theirs)) | ours.isnan() & theirs.isnan()).all()
        assert kind == "bits" or decay != decay or not ours.isnan().any()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtypes", SWAPPED)
@pytest.mark.parametrize("kind", ["numbers", "bits", "some bits"])
def test_a_swap_has_the_bits_of_the_reference(
    kind: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """And of the torch path elsewhere, with any share of elements that are swapped apart."""
    shadows = [random_bits(n, dtypes[0]) for n in SIZES]
    params = [random_bits(n, dtypes[1]) for n in SIZES]
    for shadow, param in zip(shadows, params, strict=True):
        share = {"numbers": 0.0, "bits": 1.0, "some bits": 0.05}[kind]
        usual = torch.rand(len(shadow)) >= share
        shadow[usual], param[usual] = (torch.randn(int(usual.sum())).to(dtype) for dtype in dtypes)
    before = [x.clone() for x in (*shadows, *params)]
    expected, elsewhere = ([x.clone() for x in before] for _ in range(2))
    reference.ema_swap_(expected[: len(SIZES)], expected[len(SIZES) :])
    pairs = list(zip(elsewhere[: len(SIZES)], elsewhere[len(SIZES) :], strict=True))
    torch_ema._swap_elsewhere(pairs)
    ema_swap_(shadows, params, impl="torch")
    for ours, *others in zip(shadows + params, expected, elsewhere, strict=True):
        assert all(torch.equal(bits(ours), bits(other)) for other in others)
    ema_swap_(shadows, params, impl="torch")
    assert all(map(torch.equal, map(bits, shadows + params), map(bits, before)))


STEPPED = 0x3F80_8000  # the bits of a shadow that is rounded up, to 0x3F81
OFF_CIRCLE = {  # bits of shadows and parameters, and how many of the pairs a step takes off
    "neither": ([0, 0x8000_0000, 0x7F80_0000, 0x3F80_0000], [0, 0x8000, 0x7FFF, 0xFFFF], 0),
    "parameters": ([STEPPED] * 8, [0, 0x8000, 1, 0x8001, 0x7F81, 0xFFFF, 2, 0x7F80], 6),
    "shadows": ([0x8000, 0x8000_FFFF, 0x7FFF_FFFF, 0xFF80_8000, 0x7F7F_FFFF], [0x3F80] * 5, 4),
}


@pytest.mark.parametrize("which", OFF_CIRCLE)
def test_only_elements_off_the_circle_are_swapped_apart(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes ten times as long. Zeros on both sides, as in padding and new biases, are not:
    where nothing was rounded, nothing steps."""
    apart: list[int] = []
    exactly = torch_ema._exchange_rounded

    def noted(s: Tensor, p: Tensor) -> None:
        apart.append(len(s))
        exactly(s, p)

    monkeypatch.setattr(torch_ema, "_exchange_rounded", noted)
    s, p, off = OFF_CIRCLE[which]
    shadow, param = torch.randn(100_000), torch.randn(100_000).bfloat16()
    at = torch.randperm(len(shadow))[: len(s)]
    shadow[at] = floats(torch.tensor(s), torch.float32)
    param[at] = floats(torch.tensor(p), torch.bfloat16)
    before = bits(shadow), bits(param)
    expected = shadow.clone(), param.clone()
    reference.ema_swap_(expected[:1], expected[1:])
    ema_swap_([shadow], [param], impl="torch")
    assert apart == [off] * (off > 0)
    assert all(map(torch.equal, map(bits, (shadow, param)), map(bits, expected)))
    ema_swap_([shadow], [param], impl="torch")
    assert all(map(torch.equal, map(bits, (shadow, param)), before))


# --- Cost ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("visible")
def test_many_small_tensors_take_few_calls() -> None:
    """A call costs more than the work on a hundred elements: tensors go in lists, or share one."""
    for dtype in (torch.float32, torch.bfloat16):
        work = []
        for count in (30, 300):
            pairs = [(torch.randn(100), torch.randn(100).to(dtype)) for _ in range(count)]
            shadows, params = map(list, zip(*pairs, strict=True))
            with Watch() as watch:
                ema_update_(shadows, params, 0.9, impl="torch")
                ema_swap_(shadows, params, impl="torch")
            assert watch.calls["_foreach_lerp_"] == 1
            work.append(watch.calls.total() - watch.calls["view"] - watch.calls["detach"])
        assert work[0] == work[1]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.usefixtures("small_blocks", "visible")
def test_no_large_temporary(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole-model temporary would double the EMA. Half of one tensor is swapped apart."""
    for kernel in ("_update_kernel", "_swap_kernel"):  # what the interpreter does is not ours
        monkeypatch.setattr(triton_ema, kernel, defaultdict(lambda: lambda *args, **options: None))
    dtypes = [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float16]
    pairs = [(torch.randn(1000), torch.randn(1000).to(dtype)) for dtype in dtypes]
    pairs[3][1].zero_()
    shadows, params = map(list, zip(*pairs, strict=True))
    with Watch() as watch:
        for decay in (0.9, 0.5, scalar(0.9), scalar(0.5), scalar(torch.nan)):
            ema_update_(shadows, params, decay, impl=impl)
        ema_swap_(shadows[:4], params[:4], impl=impl)
    assert 0 < watch.largest <= 8 * torch_ema.BLOCK * torch.get_num_threads()
    assert impl == "torch" or watch.host_reads == []


def test_no_host_read_on_other_devices() -> None:
    """On a GPU it would wait for the device. Tensors of the meta device, which have no values,
    raise: only on a CPU is the decay a number, and is a block looked at before it is swapped."""
    pairs = [
        (torch.zeros(1000, device="meta"), torch.zeros(1000, device="meta", dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    with Watch() as watch:
        torch_ema.update(pairs, scalar(0.5).to("meta"))
        torch_ema.swap(pairs)
    assert watch.host_reads == [] and watch.calls["addcmul"] == 2 and watch.calls["remainder"] == 2


def test_the_watch_sees_host_reads_and_allocations() -> None:
    with Watch() as watch:
        torch.ones(()).item()
        _ = torch.ones(100) + 1
    assert watch.host_reads and watch.largest == 400 and watch.calls["add"] == 1
