"""``ema_update_`` and ``ema_swap_``: the elementwise rule, exact cases, bits that must survive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sad_kernels import ema_swap_, ema_update_, reference
from sad_kernels._torch import ema as torch_ema
from sad_kernels._triton import ema as triton_ema
from support.ema import DECAYS, DTYPES, bits, floats, random_patterns, scalar
from support.oracle import IMPLS, assert_ema_within
from torch import Tensor

SIZES = [1, 31, 32, 33, 97]  # one element, and around and across blocks of 32
GUARD = 49  # elements around a tensor: more than a block, and odd, so that it begins unaligned
LOWS = [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF]  # where the swap's rounding turns

impls = pytest.mark.parametrize("impl", IMPLS)


def impls_and(name: str, dtypes: list[Any]) -> pytest.MarkDecorator:
    """Every implementation with every dtype, or pair of dtypes, that it takes."""
    cases = [
        pytest.param(impl, each, id=f"{impl}-{each}")
        for impl in IMPLS
        for each in dtypes
        if impl != "triton" or each not in (torch.float64, (torch.float64, torch.float64))
    ]
    return pytest.mark.parametrize(("impl", name), cases)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_ema, "BLOCK", 32)
    monkeypatch.setattr(triton_ema, "BLOCK", 32)


def surrounded(values: Tensor, by: float) -> tuple[Tensor, Tensor]:
    """(buffer full of a number, view of ``values`` in its middle).

    Not full of NaN: an update that goes too far leaves it NaN, and a swap exchanges NaN for NaN.
    """
    buffer = torch.full((values.numel() + 2 * GUARD,), by, dtype=values.dtype)
    view = buffer[GUARD:-GUARD].view(values.shape)
    view.copy_(values)
    return buffer, view


def assert_only_inside(buffer: Tensor, by: float) -> None:
    assert (buffer[:GUARD] == by).all() and (buffer[-GUARD:] == by).all(), "wrote outside"


# --- Update --------------------------------------------------------------------------------------


@impls
@pytest.mark.parametrize("as_tensor", [False, True])
def test_hand_computed_value(impl: str, as_tensor: bool) -> None:
    """https://github.com/ostris/ai-toolkit/issues/1034: with the sign flipped, decay moves away."""
    shadow, param = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 2.0])
    ema_update_([shadow], [param], scalar(0.75) if as_tensor else 0.75, impl=impl)
    assert shadow.tolist() == [1.5, -1.0]


@impls_and("dtypes", DTYPES)
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("decay", DECAYS)
def test_update_keeps_the_rule(impl: str, dtypes: tuple[torch.dtype, torch.dtype], decay: float):
    for n in SIZES:
        shadow = torch.randn(n, dtype=torch.float64).to(dtypes[0])
        param = (torch.randn(n, dtype=torch.float64) * 3).to(dtypes[1])
        oracle = shadow.to(torch.float64, copy=True)
        reference.ema_update_([oracle], [param.double()], decay)
        for given_decay in (decay, scalar(decay)):
            buffer, ours = surrounded(shadow, by=7.0)
            ema_update_([ours], [param], given_decay, impl=impl)
            assert_ema_within(ours, oracle, shadow, param)
            assert_only_inside(buffer, 7.0)


@impls
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("decay", [0.9999, 0.99999])
def test_the_first_step_is_rounded_once(decay: float, as_tensor: bool, impl: str) -> None:
    """From 0 to 1 it is 1 - decay. Formed in float32 that would be off by 2e-4 and 1e-3."""
    shadow = torch.zeros(1)
    ema_update_([shadow], [torch.ones(1)], scalar(decay) if as_tensor else decay, impl=impl)
    assert shadow == scalar(1 - decay).float()


@impls
@pytest.mark.usefixtures("small_blocks")
def test_many_pairs_of_any_dense_layout(impl: str) -> None:
    """Scalars, permuted and offset tensors, empty ones, and two dtype pairs in one call."""
    params = [
        torch.randn(()),
        torch.randn(5, 7).T,
        torch.randn(3, 4, 5).permute(2, 0, 1),
        torch.randn(40)[3:],
        torch.randn(6, 1, 9).transpose(0, 1),
        torch.randn(0, 4),
        torch.randn(8, 5, dtype=torch.bfloat16),
        torch.nn.Parameter(torch.randn(2, 3)),
    ]
    before = [torch.randn_like(p, dtype=torch.float32, requires_grad=False) for p in params]
    shadows = [shadow.clone() for shadow in before]
    versions = [(bits(p), p._version) for p in params]

    ema_update_(shadows, params, 0.9, impl=impl)

    for shadow, old, param, (param_bits, version) in zip(
        shadows, before, params, versions, strict=True
    ):
        oracle = old.to(torch.float64, copy=True)
        reference.ema_update_([oracle], [param.detach().double()], 0.9)
        assert_ema_within(shadow, oracle, old, param.detach())
        assert not shadow.requires_grad
        assert torch.equal(bits(param), param_bits) and param._version == version


@impls_and("dtypes", DTYPES)
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("decay", [1.0, scalar(1.0)], ids=["number", "tensor"])
def test_decay_1_keeps_every_bit(
    impl: str, dtypes: tuple[torch.dtype, torch.dtype], decay: float | Tensor
) -> None:
    """Adding 0 * (p - s) would turn -0.0 into +0.0 and let a NaN in."""
    shadow = torch.randn(97).to(dtypes[0])
    shadow[:4] = torch.tensor([-0.0, 0.0, torch.nan, torch.inf])
    param = torch.randn(97).to(dtypes[1])
    param[1:90:3] = torch.nan
    before = bits(shadow)
    ema_update_([shadow], [param], decay, impl=impl)
    assert torch.equal(bits(shadow), before)


@impls_and("dtypes", DTYPES)
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("decay", [0.0, scalar(0.0)], ids=["number", "tensor"])
def test_decay_0_copies(
    impl: str, dtypes: tuple[torch.dtype, torch.dtype], decay: float | Tensor
) -> None:
    shadow = torch.full((97,), 1e30).to(dtypes[0])
    shadow[:2] = torch.tensor([torch.nan, torch.inf])
    param = torch.randn(97).to(dtypes[1])
    param[5] = -0.0
    ema_update_([shadow], [param], decay, impl=impl)
    assert torch.equal(bits(shadow), bits(param.to(dtypes[0])))


@impls
def test_nan_decay_is_not_hidden(impl: str) -> None:
    shadow = torch.zeros(3)
    ema_update_([shadow], [torch.ones(3)], scalar(torch.nan), impl=impl)
    assert shadow.isnan().all()


@given(
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.floats(0, 1),
    st.sampled_from(IMPLS),
)
def test_shadow_stays_between_old_and_new(s: float, p: float, decay: float, impl: str) -> None:
    shadow, param = torch.tensor([s]), torch.tensor([p])
    old = shadow.clone()
    ema_update_([shadow], [param], decay, impl=impl)
    low, high = torch.minimum(old, param).double(), torch.maximum(old, param).double()
    between = shadow.double().clamp(low, high)  # up to the rule, where rounding carries over
    assert_ema_within(shadow, between, old, param)


@impls
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_steps_follow_float64(impl: str, dtype: torch.dtype) -> None:
    """https://github.com/d8ahazard/sd_dreambooth_extension/pull/1415: a bf16 shadow never moves."""
    steps = 200 if impl == "triton" else 1000  # an interpreted launch takes 5 ms
    decay = 1 - 0.1 / steps
    start = torch.randn(512)
    param = (start + 1).to(dtype)
    shadow, exact = start.clone(), start.double()
    for _ in range(steps):
        ema_update_([shadow], [param], scalar(decay), impl=impl)
        exact = decay * exact + (1 - decay) * param.double()
    displacement = (exact - start.double()).abs()
    assert displacement.min() > 0.05
    assert ((shadow.double() - exact).abs() <= 1e-3 * displacement).all()


# --- Swap ----------------------------------------------------------------------------------------


@impls_and("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.usefixtures("small_blocks")
def test_equal_dtypes_are_exchanged(impl: str, dtype: torch.dtype) -> None:
    patterns = torch.randint(-(2**63), 2**63 - 1, (64,))  # NaNs with payloads among them
    s = patterns.view(dtype)[:97].clone()
    p = patterns.flip(0).view(dtype)[:97].clone()
    old_s, old_p = bits(s), bits(p)
    ema_swap_([s], [p], impl=impl)
    assert torch.equal(bits(s), old_p) and torch.equal(bits(p), old_s)


def assert_swap_undoes_itself(shadow: Tensor, param: Tensor, impl: str) -> None:
    s, p, ref_s, ref_p = shadow.clone(), param.clone(), shadow.clone(), param.clone()
    ema_swap_([s], [p], impl=impl)
    reference.ema_swap_([ref_s], [ref_p])
    assert torch.equal(bits(s), bits(ref_s)) and torch.equal(bits(p), bits(ref_p))
    ema_swap_([s], [p], impl=impl)
    assert torch.equal(bits(s), bits(shadow)) and torch.equal(bits(p), bits(param))


@impls
def test_swapping_twice_is_the_identity(impl: str) -> None:
    assert_swap_undoes_itself(*random_patterns(400_000), impl)


@impls
@pytest.mark.slow
def test_swapping_twice_is_the_identity_for_millions(impl: str) -> None:
    assert_swap_undoes_itself(*random_patterns(4_000_000), impl)


@impls
@pytest.mark.parametrize("low", LOWS)
def test_swapping_twice_is_the_identity_for_every_upper_half(impl: str, low: int) -> None:
    """NaNs, infinities and denormals of both sides, against a parameter that is shifted by one."""
    hi = torch.arange(1 << 16)
    assert_swap_undoes_itself(
        floats(hi << 16 | low, torch.float32), floats((hi + 1) % (1 << 16), torch.bfloat16), impl
    )


@impls
def test_the_parameter_becomes_the_rounded_shadow(impl: str) -> None:
    """Ties go away from zero; everything else is a cast to bf16, infinities and NaNs included."""
    shadow, param = random_patterns(400_000)
    shadow[:5] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3.4e38])
    cast = shadow.bfloat16()
    tie = (shadow.view(torch.int32) & 0xFFFF) == 0x8000
    tiny = shadow.abs() < 2.0**-133  # there the neighbours of a cast are zero and one denormal
    signalling = (shadow.view(torch.int32) & 0x7FFF_0000) == 0x7F80_0000
    signalling &= shadow.isnan()
    ema_swap_([shadow], [param], impl=impl)
    usual = ~(tie | tiny | signalling)
    assert torch.equal(bits(param)[usual & ~cast.isnan()], bits(cast)[usual & ~cast.isnan()])
    assert param[usual & cast.isnan()].isnan().all()


@impls
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ties_are_rounded_away_from_zero(impl: str, sign: float) -> None:
    shadow = sign * torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8])
    param = torch.zeros(2, dtype=torch.bfloat16)
    ema_swap_([shadow], [param], impl=impl)
    assert (sign * param.float()).tolist() == [1 + 2.0**-7, 1 + 2.0**-6]


@impls
@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7FC08000])
def test_nan_shadows_stay_nan(impl: str, pattern: int) -> None:
    """NVIDIA GPUs produce 0x7FFFFFFF; adding 0x8000 to it gives -0.0, a model of zeros."""
    shadow = floats(torch.tensor([pattern]), torch.float32)
    param = torch.ones(1, dtype=torch.bfloat16)
    ema_swap_([shadow], [param], impl=impl)
    assert param.isnan().all()


@impls
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swap_stays_inside(dtype: torch.dtype, n: int, impl: str) -> None:
    shadow, param = torch.randn(n), torch.randn(n).to(dtype)
    (s_buffer, s), (p_buffer, p) = surrounded(shadow, by=7.0), surrounded(param, by=3.0)
    ema_swap_([s], [p], impl=impl)
    reference.ema_swap_([shadow], [param])
    assert torch.equal(bits(s), bits(shadow)) and torch.equal(bits(p), bits(param))
    assert_only_inside(s_buffer, 7.0)
    assert_only_inside(p_buffer, 3.0)


@impls
@pytest.mark.usefixtures("small_blocks")
def test_swap_of_permuted_parameters(impl: str) -> None:
    param = torch.nn.Parameter(torch.randn(7, 9, dtype=torch.bfloat16).T)
    shadow = torch.empty_like(param, dtype=torch.float32, requires_grad=False).normal_()
    expected, old = shadow.bfloat16(), bits(param)
    ema_swap_([shadow], [param], impl=impl)
    assert torch.equal(param.detach(), expected)
    ema_swap_([shadow], [param], impl=impl)
    assert torch.equal(bits(param), old)
