"""The rule itself, for one tensor: see the package's docstring."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def assert_within(
    ours: Tensor,  # [], [rows] or [rows, ...]; one row is [1, columns]
    oracle: Tensor,  # float64
    yardstick: Tensor,
    scale: float | Tensor,  # S_r: one number, or [rows]
    *,
    moved: Tensor | None = None,  # D_r: [rows]
    allowance: float | Tensor = 0.0,
    case: str = "",
    output: str = "",
) -> float:
    """Assert that ``ours`` keeps the rule, and return the largest share of a budget that it used.
    ``allowance``, one number or [rows], is added to the band.

    Raises ``ValueError`` for an oracle that is not finite or zero everywhere: the first has no
    errors, the second no size to compare them with. Such cases deserve an assertion of their own.
    """
    if not oracle.isfinite().all() or not oracle.any():
        raise ValueError(f"{case} {output}: the oracle must be finite and not zero everywhere")
    assert_same_kind(ours, yardstick, f"{case} {output}")
    allowed = torch.as_tensor(allowance, dtype=torch.float64)
    band = band_of(oracle, scale, ours.dtype, moved) + allowed
    err, err_eager = row_errors(ours, oracle), row_errors(yardstick, oracle)
    err_eager = err_eager.where(err_eager.isfinite(), 0)  # an eager overflow licenses nothing

    budget = torch.minimum(2 * err_eager + band, 4 * band)
    share = err / budget
    if not (err <= budget).all():
        raise AssertionError(_worst_row(ours, oracle, yardstick, err, budget, case, output))
    if err.numel() >= 32 and ours.dtype != torch.float64:
        unit = (band - allowed) / 8
        if moved is not None:
            unit = unit + torch.where(moved > 0, ulp(as_rows(oracle).abs().amax(-1), ours.dtype), 0)
        median_budget = 2 * err_eager.median() + unit.median() + allowed.median() / 2
        if err.median() > median_budget:
            raise AssertionError(
                f"{case} {output}: the median error of {err.numel()} rows is {err.median():.3e}, "
                f"its budget {median_budget:.3e}, share used {err.median() / median_budget:.2f}"
            )
        share = torch.cat((share, (err.median() / median_budget)[None]))
    return float(share.max())


def assert_zero(
    ours: Tensor,
    scale: float | Tensor,
    *,
    moved: Tensor | None = None,
    case: str = "",
    output: str = "",
) -> None:
    """The rule where the truth is zero everywhere: nothing but the band is left of it."""
    oracle = torch.zeros(ours.shape, dtype=torch.float64)
    err, band = row_errors(ours, oracle), band_of(oracle, scale, ours.dtype, moved)
    if not (err <= band).all():
        raise AssertionError(_worst_row(ours, oracle, oracle, err, band, case, output))


def assert_value(ours: Tensor, exact: Any, scale: float | Tensor = 1.0) -> None:
    """The rule against numbers known exactly; the yardstick is these numbers, rounded."""
    exact = torch.as_tensor(exact, dtype=torch.float64)
    assert ours.shape == exact.shape, f"got shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    if exact.any():
        assert_within(ours.detach(), exact, exact.to(ours.dtype), scale)
    else:
        assert_zero(ours.detach(), scale)


def assert_ema_within(ours: Tensor, oracle: Tensor, shadow: Tensor, param: Tensor) -> None:
    """EMA is judged element by element: 2 ulps of ``max(|shadow|, |param|)``, in ours' dtype."""
    err = (ours.double() - oracle).abs()
    budget = 2 * ulp(torch.maximum(shadow.double().abs(), param.double().abs()), ours.dtype)
    if not (err <= budget).all():
        flat = (err / budget).nan_to_num(nan=torch.inf).flatten()
        i = int(flat.argmax())
        raise AssertionError(
            f"EMA element {i}: ours {ours.flatten()[i]}, oracle {oracle.flatten()[i]}, "
            f"error {err.flatten()[i]:.3e}, budget {budget.flatten()[i]:.3e}, share {flat[i]:.2f}"
        )


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of ``dtype`` around ``|x|``."""
    info = torch.finfo(dtype)
    exponent = x.double().abs().clamp(min=info.smallest_normal).frexp().exponent - 1
    return info.eps * torch.ldexp(torch.ones_like(x, dtype=torch.float64), exponent)


def epsilon(dtype: torch.dtype) -> float:
    """What a result of this dtype was computed with, for the rule: four bits worse in float64."""
    return 2.0**-48 if dtype == torch.float64 else 2.0**-23


NEGLIGIBLE = 2.0**-17
"""Times ``epsilon``, 1e-12 for float32: errors in gradients of a divergence that are never out."""


def band_of(
    oracle: Tensor, scale: float | Tensor, dtype: torch.dtype, moved: Tensor | None = None
) -> Tensor:  # [rows]
    """``ulp + 8 eps S_r``, and ``ulp + 8 D_r`` more where a divergence has a part in it."""
    largest, eps = as_rows(oracle).abs().amax(-1), epsilon(dtype)
    scale = torch.as_tensor(scale, dtype=torch.float64, device=largest.device).flatten()
    band = ulp(largest, dtype) + 8 * eps * scale
    if moved is not None:
        band = band + torch.where(moved > 0, ulp(largest, dtype) + 8 * moved, 0)
        band = torch.where(moved > 0, band.clamp(min=NEGLIGIBLE * eps), band)
    return band


def row_errors(x: Tensor, oracle: Tensor) -> Tensor:  # [rows]
    return (as_rows(x).double() - as_rows(oracle)).abs().amax(-1)


def as_rows(x: Tensor) -> Tensor:  # [rows, columns]
    return x.reshape(1, 1) if x.ndim == 0 else x.reshape(x.shape[0], -1)


def assert_same_kind(ours: Tensor, yardstick: Tensor, what: str) -> None:
    assert (ours.shape, ours.dtype) == (yardstick.shape, yardstick.dtype), (
        f"{what}: got {ours.dtype} of shape {tuple(ours.shape)}, "
        f"expected {yardstick.dtype} of shape {tuple(yardstick.shape)}"
    )


def _worst_row(
    ours: Tensor,
    oracle: Tensor,
    yardstick: Tensor,
    err: Tensor,
    budget: Tensor,
    case: str,
    output: str,
) -> str:
    share = (err / budget).nan_to_num(nan=torch.inf)
    row = int(share.argmax())
    x, o, e = (as_rows(t)[row].double() for t in (ours, oracle, yardstick))
    column = int((x - o).abs().nan_to_num(nan=torch.inf).argmax())
    bad_rows = int((~(err <= budget)).sum())
    return (
        f"{case} {output}: {bad_rows} of {err.numel()} rows out of budget; the worst:\n"
        f"  row {row}, column {column}\n"
        f"  ours      {x[column]:.9e}\n"
        f"  oracle    {o[column]:.9e}\n"
        f"  yardstick {e[column]:.9e}\n"
        f"  error {err[row]:.3e}, budget {budget[row]:.3e}, share used {share[row]:.2f}"
    )
