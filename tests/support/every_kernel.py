"""Run every Triton kernel once, on small odd shapes, for compute-sanitizer.

    python tests/support/every_kernel.py

Results are not compared: the tests do that. Shapes have tails in tiles and segments, rows at
unaligned addresses, ignored rows, and ids at both ends of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from sad_kernels import (
    Head,
    Objective,
    Outcomes,
    TeacherHidden,
    TeacherLogits,
    TeacherTopK,
    cross_entropy,
    distill_loss,
    ema_swap_,
    ema_update_,
    kl_div,
    linear_cross_entropy,
    linear_distill_loss,
)
from sad_kernels._dispatch import INTERPRETED
from sad_kernels.objective import Divergence
from torch import Tensor

DEVICE = "cpu" if INTERPRETED else "cuda"
N, D, K = 5, 24, 7
DIVERGENCES: tuple[Divergence, ...] = ("forward_kl", "skew_reverse_kl")  # one pass, and two
V = 131 if INTERPRETED else 33001  # two segments on a GPU
JOINT = Objective(ce_weight=0.5, kd_weight=0.5, label_smoothing=0.1, z_loss=1e-3, temperature=2.7)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).bfloat16()


def calls() -> Iterator[tuple[str, Callable[[], Tensor], list[Tensor]]]:
    """Every loss: its name, a function, and the tensors to differentiate by."""
    wide, t = noise(N, V + 3), noise(N, V)
    x = wide[:, 1 : V + 1].requires_grad_()  # rows at unaligned addresses
    y = torch.randint(V, (N,), device=DEVICE)
    y[0], y[-1] = -100, V - 1
    log_probs = torch.randn(N, K, device=DEVICE).log_softmax(1) - 0.1
    ids = torch.linspace(0, V - 1, K, device=DEVICE).long().flip(0).expand(N, K)
    h, w = noise(N, D).requires_grad_(), noise(V, D).requires_grad_()
    ht, wt = noise(N, D), noise(V, D)
    bias = noise(V).requires_grad_()
    yield "ce", lambda: cross_entropy(x, y, label_smoothing=0.1, z_loss=1e-3, softcap=30.0), [x]
    yield "linear ce", lambda: linear_cross_entropy(h, w, y, bias=bias), [h, w, bias]
    head = Head(w, bias, softcap=30.0, logit_scale=0.5)
    for divergence in DIVERGENCES:
        objective = Objective(**vars(JOINT) | {"divergence": divergence, "beta": 0.3})
        dense, top_k = TeacherLogits(t), TeacherTopK(ids, log_probs)
        hidden = TeacherHidden(ht, Head(wt))

        def from_logits(teacher: object, objective: Objective = objective) -> Tensor:
            return distill_loss(x, y, teacher, objective).loss  # pyright: ignore[reportArgumentType]

        def from_hidden(objective: Objective = objective, hidden: TeacherHidden = hidden) -> Tensor:
            return linear_distill_loss(h, head, y, hidden, objective).loss

        def alone(objective: Objective = objective) -> Tensor:
            return kl_div(x, t, divergence=objective.divergence, labels=y, temperature=2.0)

        yield f"kd {divergence}", alone, [x]
        yield f"joint {divergence}", lambda f=from_logits, d=dense: f(d), [x]
        yield f"top-k {divergence}", lambda f=from_logits, k=top_k: f(k), [x]
        yield f"linear {divergence}", from_hidden, [h, w, bias]
    coded: Any = {"impl": "triton", "logits": "compact"}
    hidden = TeacherHidden(ht, Head(wt, softcap=30.0))
    yield (
        "codes",
        lambda: linear_distill_loss(h, Head(w, bias), y, hidden, JOINT, **coded).loss,
        [h, w, bias],
    )
    own = (torch.arange(V, device=DEVICE).flip(0) // 2).int()
    outcomes = Outcomes(own, own[7:], V // 2 + 1)
    other = TeacherHidden(ht, Head(wt[7:]))
    yield "outcomes", lambda: kl_div(x, t[:, 7:], labels=y, outcomes=outcomes), [x]
    yield (
        "linear outcomes",
        lambda: linear_distill_loss(h, head, y, other, JOINT, outcomes=outcomes).loss,
        [h, w, bias],
    )


def averages() -> None:
    """An EMA update and two swaps of tensors of odd sizes and alignments."""
    params = [noise(n) for n in (1, 17, 4096, 5001)]
    params.append(noise(301)[1:])  # not aligned
    shadows = [p.float() for p in params]
    ema_update_(shadows, params, 0.9)
    ema_swap_(shadows, params)
    ema_swap_(shadows, params)


def main() -> None:
    torch.manual_seed(0)
    done = 0
    for name, loss, leaves in calls():
        gradients = torch.autograd.grad(loss(), leaves)
        assert all(g.isfinite().all() for g in gradients), name
        done += 1
    averages()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"{done} losses with their gradients, updates and swaps: done")


if __name__ == "__main__":
    main()
