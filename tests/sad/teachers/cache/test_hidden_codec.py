"""Codecs of hidden states: what comes back, how far off, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sad.errors import UnfitError
from sad.teachers.cache.hidden import (
    CODECS,
    Bf16Codec,
    Int8Codec,
    build_codec,
    hidden_bytes,
)

WIDTHS = [1, 7, 48, 64, 96, 576]


def states(n: int, width: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, width, generator=g) + torch.randn(width, generator=g)


def with_outlier(n: int, width: int) -> Tensor:
    """One channel 40 times as large as the others, of either sign: as in trained models."""
    x = states(n, width)
    x[:, 5] *= 40
    return x


def plain_int8(x: Tensor) -> Tensor:
    """One scale per row, nothing else."""
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale).round() * scale


def relative_error(found: Tensor, x: Tensor) -> float:
    return float((found.double() - x.double()).norm() / x.double().norm())


def plain_rotation(codec: Int8Codec) -> Tensor:
    """The orthogonal matrix M [D, D] with ``M (x - mean)`` what is rounded, entry by entry."""
    D = codec.width
    b = next(b for b in (64, 32, 16, 8, 4, 2, 1) if D % b == 0)
    M = torch.zeros(D, D, dtype=torch.float64)
    for i in range(D):
        for j in range(i - i % b, i - i % b + b):
            sign = (-1) ** bin((i % b) & (j % b)).count("1")
            M[i, codec.permutation[j]] = sign * float(codec.signs[j]) / math.sqrt(b)
    return M


@given(st.sampled_from(WIDTHS), st.integers(0, 1000), st.floats(1e-6, 1e6))
def test_int8_is_its_definition_and_errs_by_half_a_step(D: int, seed: int, size: float) -> None:
    x = states(20, D, seed) * size
    codec = Int8Codec.fitted(x[:10], seed)
    M = plain_rotation(codec)
    torch.testing.assert_close(M @ M.T, torch.eye(D).double(), rtol=0, atol=1e-12)
    rotated = (x.double() - codec.mean.double()) @ M.T
    record = codec.encode(x)
    assert record["hidden"].dtype == torch.int8 and record["scale"].dtype == torch.float32
    scale = record["scale"].double()
    expected = rotated.abs().amax(1) / 127
    # float32: subtracting the mean and summing the block round at the size of the states.
    rounding = 4e-7 * float(x.abs().max()) * 8
    torch.testing.assert_close(scale, expected, rtol=0, atol=rounding / 127)
    off = record["hidden"].double() * scale[:, None] - rotated
    assert (off.abs() <= scale[:, None] / 2 + rounding).all()
    found = codec.decode(record, torch.float32).double()
    torch.testing.assert_close(
        found,
        (record["hidden"].double() * scale[:, None]) @ M + codec.mean.double(),
        rtol=0,
        atol=rounding,
    )
    bound = math.sqrt(D) * scale / 2 + rounding * math.sqrt(D)
    assert ((found - x.double()).norm(dim=1) <= bound).all()


def test_rotation_and_mean_save_what_one_outlier_costs() -> None:
    x = with_outlier(200, 576)
    codec = Int8Codec.fitted(x[:100])
    ours = relative_error(codec.decode(codec.encode(x), torch.float32), x)
    assert ours < 0.4 * relative_error(plain_int8(x), x)
    # A channel that is always large is the mean's: then nearly nothing is lost.
    x = states(200, 576)
    x[:, 5] += 400
    codec = Int8Codec.fitted(x[:100])
    off = codec.decode(codec.encode(x), torch.float32) - x
    off_plain = plain_int8(x) - x
    assert off[:, 6:].norm() < 0.05 * off_plain[:, 6:].norm()


@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("name", CODECS)
def test_bytes_and_leading_dimensions(name: str, D: int) -> None:
    x = states(12, D).reshape(3, 4, D)
    codec = build_codec(name, states=x.flatten(0, 1))
    record = codec.encode(x)
    assert codec.name == name
    assert sum(part.nbytes for part in record.values()) == 12 * hidden_bytes(name, D)
    whole = codec.decode(record, torch.float32)
    assert whole.shape == x.shape
    # A position does not depend on its company.
    alone = codec.encode(x[1, 2])
    assert all(torch.equal(part, record[key][1, 2]) for key, part in alone.items())
    assert torch.equal(codec.decode(alone, torch.float32), whole[1, 2])


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_come_back_in_the_dtype_of_the_head(name: str, dtype: torch.dtype) -> None:
    x = states(12, 64).to(dtype)
    codec = build_codec(name, states=x)
    found = codec.decode(codec.encode(x), dtype)
    assert found.dtype == dtype and relative_error(found, x) < 0.02


def test_bf16_gives_a_bf16_teacher_its_own_bits() -> None:
    x = states(12, 64).bfloat16()
    assert torch.equal(Bf16Codec().decode(Bf16Codec().encode(x), torch.bfloat16), x)


def test_a_codec_is_what_its_tensors_say() -> None:
    x = with_outlier(50, 96)
    codec = Int8Codec.fitted(x, seed=3)
    kept = codec.tensors()
    assert {name: (t.dtype, t.shape) for name, t in kept.items()} == {
        "mean": (torch.float32, (96,)),
        "permutation": (torch.int32, (96,)),
        "signs": (torch.int8, (96,)),
    }
    again = build_codec("int8", tensors=kept)
    record = codec.encode(x)
    assert all(torch.equal(part, record[name]) for name, part in again.encode(x).items())
    assert torch.equal(again.decode(record, torch.float32), codec.decode(record, torch.float32))
    other = Int8Codec.fitted(x, seed=4)
    assert not torch.equal(other.permutation, codec.permutation)
    assert build_codec("bf16").tensors() == {}


def test_autocast_changes_nothing() -> None:
    x = states(20, 576)
    codec = Int8Codec.fitted(x)
    record = codec.encode(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = codec.encode(x)
        found = codec.decode(record, torch.float32)
    assert torch.equal(within["hidden"], record["hidden"])
    assert torch.equal(found, codec.decode(record, torch.float32))


@pytest.mark.parametrize("D", WIDTHS)
def test_rows_of_zeros_and_of_one_value(D: int) -> None:
    x = states(20, D)
    x[0] = 0.0
    x[1] = 7.5
    codec = Int8Codec.fitted(x)
    x[2] = codec.mean
    record = codec.encode(x)
    assert record["scale"][2] == 0 and (record["hidden"][2] == 0).all()
    found = codec.decode(record, torch.float32)
    assert torch.equal(found[2], codec.mean)
    bound = math.sqrt(D) * record["scale"] / 2 * 1.001 + 1e-6
    assert ((found - x).norm(dim=1) <= bound).all()
    # Where the mean is 0, so is what a row of zeros gives.
    centred = Int8Codec(torch.zeros(D), codec.permutation, codec.signs)
    assert (centred.decode(centred.encode(torch.zeros(1, D)), torch.float32) == 0).all()


@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("size", [1e38, 1e30, 1e-30, 1e-44])
def test_the_largest_and_smallest_numbers_do_not_overflow(D: int, size: float) -> None:
    x = states(20, D)
    x = x / x.abs().max() * size
    codec = Int8Codec.fitted(x[:10])
    found = codec.decode(codec.encode(x), torch.float32)
    assert found.isfinite().all()
    # Relative to the largest: at 1e-44 there are a handful of numbers left.
    off = (found.double() - x.double()).abs().max()
    assert off < 0.06 * size + 1e-43


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_a_dtype_cannot_hold_becomes_its_largest_number(dtype: torch.dtype) -> None:
    x = torch.tensor([[3.4028e38, -3.4028e38, 1.0, 2.0]])
    for codec in (Bf16Codec(), Int8Codec.fitted(torch.zeros(1, 4))):
        found = codec.decode(codec.encode(x), dtype)
        assert found.isfinite().all()
        limit = torch.finfo(dtype).max
        assert found[0, 0] > 0.9 * min(limit, 3.4e38) and found[0, 1] < 0


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named(name: str, value: float) -> None:
    x = states(12, 48)
    codec = build_codec(name, states=x)
    x[3, 17] = value
    message = f"got {value} at position 3, channel 17, and 0 more"
    with pytest.raises(UnfitError, match=message):
        codec.encode(x)
    with pytest.raises(UnfitError, match=message):
        codec.encode(x.reshape(3, 4, 48))
    with pytest.raises(UnfitError, match=message):
        Int8Codec.fitted(x)


def test_a_basis_that_is_none_is_refused() -> None:
    good = Int8Codec.fitted(states(20, 8)).tensors()
    twice = good["permutation"].clone()
    twice[0] = twice[1]
    wrong: list[dict[str, Tensor]] = [
        good | {"mean": good["mean"] * math.nan},
        good | {"mean": good["mean"][:4]},
        good | {"permutation": twice},
        good | {"signs": good["signs"] * 0},
        good | {"signs": good["signs"][:, None]},
    ]
    for tensors in wrong:
        with pytest.raises(UnfitError, match="make the cache again"):
            Int8Codec.from_tensors(tensors)
    with pytest.raises(UnfitError, match="must hold mean, signs, got permutation"):
        Int8Codec.from_tensors({"permutation": twice})


def test_other_widths_and_names_are_refused() -> None:
    codec = Int8Codec.fitted(states(20, 8))
    with pytest.raises(UnfitError, match="width of their basis, 8, got 16"):
        codec.encode(states(2, 16))
    with pytest.raises(UnfitError, match="width of their basis, 8, got 16"):
        codec.decode({"hidden": torch.zeros(2, 16).to(torch.int8)}, torch.float32)
    for call in (lambda: build_codec("fp16"), lambda: hidden_bytes("fp16", 8)):
        with pytest.raises(UnfitError, match="bf16, int8, got 'fp16'"):
            call()
    with pytest.raises(ValueError, match="fitted to states"):
        build_codec("int8")
    with pytest.raises(ValueError, match="pass a sample"):
        Int8Codec.fitted(torch.zeros(0, 8))
