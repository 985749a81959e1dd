"""How far a right result may be off, from the sizes of what was rounded on the way to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sad_kernels import Objective, reference
from sad_kernels.objective import Head
from torch import Generator, Tensor

from support.oracle.calls import Outputs, Problem, measure
from support.oracle.divergences import Ratios, Sides, rounded_step, size_of_mean
from support.oracle.exact import Inputs, in_float64, kd_of, measure_oracle, replaced

# --- What rounded logits may do ------------------------------------------------------------------

DRAWS = 4


def rounding_of_logits(
    problem: Problem, oracle: Outputs, eps: float, plain_forms: bool = False
) -> Outputs:
    """``D``: how far each number of a gradient moves with the logits of the divergence, at most in
    four draws.

    The divergence's logits are moved at random, by up to ``eps`` of what rounding errors in them
    are proportional to: where they are given, the distance from the row's largest, which is
    subtracted first; where they are scaled or capped, the result; where they are computed, the root
    of the sum of squares of what is summed up as well; log-probabilities of a top-k teacher by
    ``eps`` of themselves, and what they leave to the other tokens by ``eps`` of what the first of
    them leaves. So is phi, by ``eps`` of itself. What else is in the loss does not move: see
    ``scales_of``.

    The gradient of a TVD jumps where p and q cross. Where they are as near as eight roundings, phi
    moves by the jump, divided by the eight that the rule multiplies D by.

    With ``plain_forms`` the logarithms and exponentials that phi is made of are off by ``eps``
    of 1, however near to 0 they are: GPUs have no ``expm1`` and ``log1p`` at the price of ``exp2``
    and ``log2``. And the mean that a reverse KL subtracts is off by ``eps`` of what it adds up:
    from one reading of the logits, which do not tell yet where the student's maximum is.
    """
    largest = {name: torch.zeros_like(x) for name, x in oracle.items() if name[1:] in problem.wrt}
    for seed in range(DRAWS):
        rounding = _Rounding(eps, plain_forms, Generator().manual_seed(seed))
        with replaced(
            _logits=rounding.logits,
            _transformed=rounding.transformed,
            _kd=kd_of(rounding.of, rounding.of_phi, rounding.of_mean if plain_forms else None),
        ):
            moved = measure(problem, reference, in_float64(problem))
        if not rounding.asked:  # there is no divergence
            break
        for name, x in largest.items():
            largest[name] = torch.maximum(x, (moved[name] - oracle[name]).abs())
    return largest


class _Rounding:
    """One draw of rounding errors."""

    def __init__(self, eps: float, plain_forms: bool, generator: Generator) -> None:
        self.eps, self.plain_forms, self.generator = eps, plain_forms, generator
        self.computed: list[tuple[Tensor, Tensor]] = []  # logits, and the size of their errors
        self.reach: float | Tensor = 0.0  # the largest move of a row's computed logits, [n, 1]
        self.asked, self.beside_ids = False, False
        self.product, self.transform = reference._logits, reference._transformed

    def logits(self, hidden: Tensor, head: Head, V: int, dtype: torch.dtype) -> Tensor:
        """``reference._logits``, which takes note of its result."""
        z = self.product(hidden, head, V, dtype)
        with torch.no_grad():
            squares = hidden.to(dtype).square() @ head.weight[:V].to(dtype).square().T
            if head.bias is not None:
                squares = squares + head.bias[:V].to(dtype).square()
            self.computed.append((z, abs(head.logit_scale) * squares.sqrt() + z.abs()))
        return z

    def transformed(self, z: Tensor, logit_scale: float, softcap: float | None) -> Tensor:
        """``reference._transformed`` likewise."""
        s = self.transform(z, logit_scale, softcap)
        if (logit_scale, softcap) != (1.0, None):
            self.computed.append((s, s.detach().abs()))
        return s

    def of(self, inputs: Inputs) -> Inputs:
        self.asked, self.beside_ids = True, inputs.ids is not None
        s, t = self._moved(inputs.s), inputs.t
        if not self.beside_ids:
            return replace(inputs, s=s, t=self._moved(t))
        t = t + self._noise(t) * t.masked_fill(torch.isneginf(t), 0)
        return replace(inputs, s=s, t=t, rest_off=self._noise(t[:, :1]))

    def _moved(self, z: Tensor) -> Tensor:
        size = self._size_if_computed(z)
        if size is None:
            size = (z - z.amax(-1, keepdim=True)).masked_fill(torch.isneginf(z), 0)
        else:
            self.reach = self.reach + self.eps * size.amax(-1, keepdim=True)
        return z + self._noise(z) * size

    def _size_if_computed(self, z: Tensor) -> Tensor | None:
        """Rows of logits that were noted, last of all as they are, are known by three numbers."""
        for known, size in reversed(self.computed):
            if z.shape[-1] == known.shape[-1]:
                ends = [0, z.shape[-1] // 2, -1]
                found = (z[:, None, ends] == known[None, :, ends]).all(-1)
                if found.any(-1).all():
                    return size[found.long().argmax(-1)] if len(z) else size[:0]
        return None

    def _noise(self, like: Tensor) -> Tensor:
        """Of either sign, between eps / 2 and eps: what depends on one number moves in any draw."""
        noise = 2 * torch.rand(like.shape, generator=self.generator, dtype=like.dtype) - 1
        return (self.eps / 2 * (noise + noise.sign())).to(like.device)

    def of_phi(self, objective: Objective, sides: Sides, k: Ratios, phi: Tensor) -> Tensor:
        phi = phi + self._noise(phi) * phi.masked_fill(phi.isinf(), 0)
        if objective.divergence == "tvd":
            return phi + self._jumps(sides, k, objective.temperature)
        if self.plain_forms:
            step = rounded_step(objective.divergence, objective.beta, k)
            return phi + (step * self._noise(phi)).scatter(-1, k.y, 0.0)  # exact at y
        return phi

    def of_mean(self, sides: Sides, k: Ratios) -> Tensor:
        size = size_of_mean(sides, k)
        return self._noise(size) * (0.0 if self.beside_ids else size)

    def _jumps(self, sides: Sides, k: Ratios, T: float) -> Tensor:
        """Of ``sign(q - p) / 2``, by an eighth, where the signs are not known."""
        size = self.eps * (1 - sides.student - sides.teacher) + self.reach / T
        if self.beside_ids:  # the rest, of which one rounding may be a large part
            but_first = 1 - k.p[:, :-1].amax(-1)
            size[:, -1] += self.eps * but_first / k.p[:, -1]
        unknown = k.log_ratio.abs() <= 8 * size
        return torch.where(unknown, self._noise(k.q).sign() / 8, 0 * k.q)


# --- What a rounded factor may do ----------------------------------------------------------------


class _NormProducts(torch.autograd.Function):
    """``h W^T + b``, whose backward sums the p-th powers of absolute values. Where it sums over
    rows, equal rows of ``h`` count as one of their sum: their gradients are rounded alike."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, p: int) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.p = p
        return hidden @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, group, copies = ctx.saved_tensors[0].unique(
            dim=0, return_inverse=True, return_counts=True
        )
        alike = (copies[group] ** (ctx.p - 1))[:, None]
        g, hidden, weight = (x.abs() ** ctx.p for x in (g, *ctx.saved_tensors))
        return g @ weight, (g * alike).T @ hidden, (g * alike).sum(0), None


def rounding_of_products(problem: Problem) -> Outputs:
    """How far each gradient may be off because the logits' gradient was rounded to 16 bits once.

    Matrix products on a GPU take factors of one dtype. 16-bit hidden states therefore meet a 16-bit
    ``g``, of which every number is off by ``u |g|`` at most, ``u`` the unit roundoff. So a number
    of ``g^T h`` is off by ``u sum |g h|`` at most, and since the roundings do not know of each
    other, by no more than twice ``u sqrt(sum (g h)^2)`` in practice (m equal rows are rounded
    alike: they are m times one term); likewise ``g W`` and the column sums of g. A row that cancels
    has a bound of its own, and a second rounding, of a sum or of the logits, still shows.
    """
    hidden = problem.leaves.get("hidden")
    if hidden is None or hidden.dtype.itemsize != 2:
        return {}
    u = torch.finfo(hidden.dtype).eps / 2
    largest, usual = _norms_of_products(problem, 1), _norms_of_products(problem, 2)
    return {name: u * torch.minimum(x, 2 * usual[name].sqrt()) for name, x in largest.items()}


def _norms_of_products(problem: Problem, p: int) -> Outputs:
    """``sum |factor factor|^p`` for every number of a gradient, from the oracle's factors."""

    def logits(hidden: Tensor, head: Head, V: int, dtype: torch.dtype) -> Tensor:
        bias = hidden.new_zeros(V) if head.bias is None else head.bias[:V]
        factors = (x.to(dtype) for x in (hidden, head.weight[:V], bias))
        z = head.logit_scale * _NormProducts.apply(*factors, p)
        return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)

    with replaced(_logits=logits):
        outputs = measure_oracle(problem)
    return {name: outputs[name] for name in ("dhidden", "dweight", "dbias") if name in outputs}


# --- The size of what cancels --------------------------------------------------------------------


def scales_of(
    objective: Objective,
    s: Tensor,  # [N, V] float64 logits of the student, cut to the valid vocabulary
    t: Tensor | None,  # the teacher's, or T times its log-probabilities; None without a teacher
    keep: Tensor,  # [N] the rows that count
    upstream: Tensor,  # [] or [N]
    divisor: float | None,  # of the sum over rows; None for a loss per row
    s_magnitude: float = 1.0,
    t_magnitude: float = 1.0,
) -> dict[str, Tensor]:
    """``S_r`` for losses, ``dlogits`` and the fields of ``DistillOutput``.

    =========================  =================  ==========================
    term                       loss               gradient by a logit
    =========================  =================  ==========================
    cross-entropy              1 nat              1
    divergence at T            ``T^2 R``          ``rounding_of_logits``
    z-loss, ``lse^2``          ``2 max(1, lse)``  ``2 lse``
    =========================  =================  ==========================

    each times its weight in the objective and, for the gradient, times ``|upstream_r|``. ``R`` is
    the finite range of the row's logits over T, at least 1: the reverse KL multiplies probabilities
    by log-ratios. ``T^2`` is 1 with ``scale_t2=False``. A reduced loss has the sum of its rows'
    scales, divided as the loss is. Where logits z are computed from hidden states, they are rounded
    before anything else happens: the magnitudes, ``max(1, max|z|)``, multiply what depends on them.
    Ignored rows have a scale of 0: what they get must be exact.
    """
    T, lse = objective.temperature, s.logsumexp(-1).abs()
    one = torch.full_like(lse, s_magnitude)
    z = s_magnitude * 2 * lse
    kd = torch.zeros_like(lse)
    if t is not None:
        R = torch.maximum(_finite_range(s), _finite_range(t)) / T
        kd = max(s_magnitude, t_magnitude) * objective.kd_scale * R.clamp(min=1)

    def weighted(ce: Tensor, kd: Tensor | float, z: Tensor) -> Tensor:
        rows = objective.ce_weight * ce + objective.kd_weight * kd + objective.z_loss * z
        return rows.where(keep, 0)

    loss = weighted(one, kd, z.clamp(min=2 * s_magnitude))
    return {
        "loss": loss if divisor is None else loss.sum() / divisor,
        "dlogits": weighted(one, 0.0, z) * upstream.double().abs() / (divisor or 1.0),
        "ce": one.where(keep, 0).sum(),
        "kd": kd.where(keep, 0).sum(),
        "z": z.clamp(min=2 * s_magnitude).where(keep, 0).sum(),
        "entropy": one.where(keep, 0).sum(),
    }


def _finite_range(x: Tensor) -> Tensor:  # [N, V] -> [N]
    finite = x.isfinite()
    span = x.where(finite, -torch.inf).amax(-1) - x.where(finite, torch.inf).amin(-1)
    return span.clamp(min=0)
