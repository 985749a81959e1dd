"""What ``ema_update_`` and ``ema_swap_`` take, and what they refuse before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from sad_kernels import _dispatch, ema_swap_, ema_update_
from support.oracle import IMPLS

impls = pytest.mark.parametrize("impl", IMPLS)

# --- Bad input changes nothing -------------------------------------------------------------------

GOOD = (torch.zeros(4), torch.ones(4))
TIED = torch.ones(6)

BAD_PAIRS = {
    "shape": (torch.zeros(4), torch.ones(2, 2), ValueError, "one shape"),
    "integers": (torch.zeros(4), torch.ones(4, dtype=torch.int32), TypeError, "floating-point"),
    "bf16 shadow": (torch.zeros(4).half(), torch.ones(4), TypeError, "float32"),
    "device": (torch.zeros(4), torch.ones(4, device="meta"), ValueError, "one device"),
    "no tensor": (torch.zeros(4), [1.0] * 4, TypeError, "must be a tensor"),
    "strides": (torch.zeros(2, 3), torch.ones(3, 2).T, ValueError, "dense with equal strides"),
    "strides of the shadow": (
        torch.zeros(3, 2).T,
        torch.ones(2, 3),
        ValueError,
        "dense with equal strides",
    ),
    "holes": (torch.zeros(8)[::2], torch.ones(8)[::2], ValueError, "dense with equal strides"),
    "expanded": (
        torch.zeros(1).expand(4),
        torch.ones(1).expand(4),
        ValueError,
        "dense with equal strides",
    ),
    "shadow is parameter": (TIED, TIED, ValueError, "share memory"),
    "shadow overlaps parameter": (TIED[:4], TIED[2:], ValueError, "share memory"),
    "listed before": (GOOD[0], torch.ones(4), ValueError, "share memory"),
    "tied to one before": (torch.zeros(2, 2), GOOD[1].view(2, 2), ValueError, "share memory"),
}


@impls
@pytest.mark.parametrize("function", ["update", "swap"])
@pytest.mark.parametrize("name", BAD_PAIRS)
def test_bad_pairs_are_refused_before_anything_is_written(
    name: str, function: str, impl: str
) -> None:
    shadow, param, error, message = BAD_PAIRS[name]
    good_shadow, good_param = GOOD
    with pytest.raises(error, match=message):
        if function == "update":
            ema_update_([good_shadow, shadow], [good_param, param], 0.5, impl=impl)
        else:
            ema_swap_([good_shadow, shadow], [good_param, param], impl=impl)
    assert good_shadow.tolist() == [0.0] * 4 and good_param.tolist() == [1.0] * 4


@impls
def test_neighbours_in_one_buffer_are_not_overlapping(impl: str) -> None:
    flat = torch.tensor([0.0, 0.0, 4.0, 8.0])
    ema_update_([flat[:2]], [flat[2:]], 0.5, impl=impl)
    assert flat.tolist() == [2.0, 4.0, 4.0, 8.0]


def test_lists_must_have_one_length() -> None:
    for call in (ema_swap_, partial(ema_update_, decay=0.5)):
        with pytest.raises(ValueError, match="one length, got 2 and 1"):
            call([torch.zeros(1), torch.zeros(1)], [torch.ones(1)])


def test_fp16_cannot_be_exchanged_with_fp32() -> None:
    with pytest.raises(TypeError, match="one dtype"):
        ema_swap_([torch.zeros(4)], [torch.ones(4).half()])


@pytest.mark.parametrize(
    ("decay", "error"),
    [
        (-0.1, ValueError),
        (1.1, ValueError),
        (float("nan"), ValueError),
        ("0.9", TypeError),
        (True, TypeError),
        (torch.ones(1), ValueError),
        (torch.tensor(1), ValueError),
    ],
)
def test_bad_decay_is_refused(decay, error: type[Exception]) -> None:
    with pytest.raises(error, match="decay must"):
        ema_update_([torch.zeros(1)], [torch.ones(1)], decay)


BOTH = (ema_swap_, partial(ema_update_, decay=0.5))


@pytest.mark.parametrize("pairs", [0, 1])
@pytest.mark.parametrize("call", BOTH, ids=["swap", "update"])
def test_impl_is_met_or_refused(
    call: Callable[..., None], pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadows, params = [torch.zeros(1)] * pairs, [torch.ones(1)] * pairs
    with pytest.raises(ValueError, match="impl must be one of"):
        call(shadows, params, impl="cuda")
    monkeypatch.setattr(_dispatch, "HAS_TRITON", False)
    with pytest.raises(ModuleNotFoundError, match="triton"):
        call(shadows, params, impl="triton")
    assert [shadow.tolist() for shadow in shadows] == [[0.0]] * pairs


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_triton_refuses_float64(decay: float) -> None:
    good, double = torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    for call in (ema_swap_, partial(ema_update_, decay=decay)):
        with pytest.raises(TypeError, match="impl='torch' for float64"):
            call([good, double], [torch.ones(1), double + 1], impl="triton")
        assert good == 0 and double == 0


@impls
def test_nothing_to_do(impl: str) -> None:
    ema_update_([], [], 0.5, impl=impl)
    ema_swap_([], [], impl=impl)
    ema_update_([torch.zeros(0)], [torch.zeros(0)], 0.5, impl=impl)
    ema_swap_([torch.zeros(0, 3)], [torch.zeros(0, 3, dtype=torch.bfloat16)], impl=impl)
