"""The kernels move the fewest bytes that their algorithm allows, and reach past 2^31 elements."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from sad_kernels import Objective, TeacherLogits, TeacherTopK, cross_entropy, distill_loss, kl_div
from sad_kernels._divergence_table import DIVERGENCES
from sad_kernels._rows import LossSpec, RowTargets
from support.traffic import Traffic, counted_traffic, needs_interpreter
from torch import Tensor

N, V = 5, 203  # tiles and segments with a tail
SEGMENT, BLOCK = 64, 32
STARTS = (0, 32, 64, 96, 128, 160, 192, 200)  # of tiles, and of the pieces of 8 that are left
STARTS_BESIDE_IDS = (0, 8, 40, 48, 56, *STARTS[2:])  # if the first piece has the ids
TWO_READINGS = [name for name, info in DIVERGENCES.items() if info.forward_passes == 2]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = needs_interpreter


def logits(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(N, V).to(dtype)


def read_again(x: Tensor, starts: Sequence[int] = STARTS, ids: int = 0) -> int:
    """Bytes: of each row and segment a tile from where the best of its columns was found.

    The first ``ids`` columns are not among these.
    """
    columns = 0
    for row in x.detach():
        for first in range(0, V, SEGMENT):
            last = min(first + SEGMENT, V)
            of_ids = max(ids - first, 0)
            best = first + of_ids + int(row[first + of_ids : last].argmax())
            start = max(start for start in starts if start <= best)
            columns += min(start + BLOCK, last) - start
    return columns * x.element_size()


def backward(loss: Tensor, x: Tensor) -> tuple[Traffic, Tensor]:
    with counted_traffic() as traffic:
        (gradient,) = torch.autograd.grad(loss, x)
    return traffic, gradient


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_reads_once_then_reads_and_writes_once(dtype: torch.dtype) -> None:
    x, y = logits(dtype).requires_grad_(), torch.randint(V, (N,))
    with counted_traffic() as forward:
        loss = cross_entropy(x, y, label_smoothing=0.1, z_loss=1e-3, impl="triton")
    assert forward.read_from(x) == x.nbytes + N * x.element_size()  # and the label's logit
    assert forward.written_to(x) == 0
    traffic, gradient = backward(loss, x)
    assert traffic.read_from(x) == x.nbytes
    assert traffic.written_to(gradient) == gradient.nbytes == x.nbytes


def at_best(x: Tensor) -> int:
    """Bytes: of each row and segment the logit where the student's is largest."""
    return len(x) * -(-V // SEGMENT) * x.element_size()


@pytest.mark.few(3)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_kl_reads_each_side_once_and_a_mixture_twice(divergence: str) -> None:
    """And before the second reading the logits of the student's likeliest token."""
    s, t = logits().requires_grad_(), logits()
    with counted_traffic() as forward:
        loss = kl_div(s, t, temperature=3.0, divergence=divergence, impl="triton")  # pyright: ignore
    twice = divergence in TWO_READINGS
    assert forward.read_from(s) == (2 * s.nbytes + read_again(s) if twice else s.nbytes)
    assert forward.read_from(t) == (2 * t.nbytes + at_best(t) if twice else t.nbytes)
    traffic, gradient = backward(loss, s)
    assert traffic.read_from(s) == traffic.read_from(t) == s.nbytes
    assert traffic.written_to(gradient) == s.nbytes


def test_the_joint_loss_costs_two_argmaxes_more() -> None:
    s, t, y = logits().requires_grad_(), logits(), torch.randint(V, (N,))
    objective = Objective(ce_weight=0.5, label_smoothing=0.1, temperature=3.0)
    with counted_traffic() as forward:
        loss = distill_loss(s, y, TeacherLogits(t), objective, impl="triton").loss
    assert forward.read_from(s) == s.nbytes + N * s.element_size() + read_again(s)
    assert forward.read_from(t) == t.nbytes + read_again(t)
    traffic, gradient = backward(loss, s)
    assert traffic.read_from(s) == traffic.read_from(t) == s.nbytes
    assert traffic.written_to(gradient) == s.nbytes


def test_a_top_k_teacher_costs_its_ids() -> None:
    s, y = logits().requires_grad_(), torch.randint(V, (N,))
    log_probs, ids = logits().log_softmax(-1)[:, :4], torch.arange(4).expand(N, 4)
    objective = Objective(ce_weight=0.5)
    with counted_traffic() as forward:
        loss = distill_loss(s, y, TeacherTopK(ids, log_probs), objective, impl="triton").loss
    again = read_again(s, STARTS_BESIDE_IDS, ids=4)
    assert forward.read_from(s) == s.nbytes + N * (1 + 4) * s.element_size() + again
    traffic, gradient = backward(loss, s)
    assert traffic.read_from(s) == s.nbytes
    assert traffic.written_to(gradient) == s.nbytes


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_slabs_of_a_linear_loss_are_read_twice_and_written_once(divergence: str) -> None:
    from sad_kernels._triton import launch

    s, t, y = logits(), logits(), torch.randint(V, (N,))
    g = torch.empty(N, V, dtype=torch.bfloat16)
    objective = Objective(ce_weight=0.5, temperature=2.0, divergence=divergence)  # pyright: ignore
    spec = LossSpec(objective, V, -100, compute_ce=True, compute_metrics=True)
    student, teacher = launch.Logits(s), launch.Logits(t)
    with counted_traffic() as traffic:
        forward = launch.forward(spec, student, RowTargets(y), teacher)
        launch.gradient(spec, student, RowTargets(y), teacher, forward, torch.ones(1), g)
    readings = 3 if divergence == "jsd" else 2
    assert traffic.read_from(s) == readings * s.nbytes + N * s.element_size() + read_again(s)
    more = at_best(t) if divergence == "jsd" else 0
    assert traffic.read_from(t) == readings * t.nbytes + more + read_again(t)
    assert traffic.written_to(g) == g.nbytes


def test_ignored_rows_are_not_read() -> None:
    s, t = logits().requires_grad_(), logits()
    y = torch.tensor([-100, 3, -100, -100, 5])
    with counted_traffic() as forward:
        loss = distill_loss(s, y, TeacherLogits(t), Objective(ce_weight=0.5), impl="triton").loss
    row = V * s.element_size()
    assert forward.read_from(t) == 2 * row + read_again(t[y >= 0])
    traffic, gradient = backward(loss, s)
    assert traffic.read_from(s) == 2 * row
    assert traffic.written_to(gradient) == gradient.nbytes


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_rows_of_weight_0_do_not_read_their_teacher(divergence: str) -> None:
    """The student's rows are read as ever; the mixture of such a row is not formed."""
    s, t, y = logits().requires_grad_(), logits(), torch.randint(V, (N,))
    weights = torch.tensor([0.0, 2.0, 0.0, 0.0, 0.5])
    objective = Objective(ce_weight=0.5, divergence=divergence)  # pyright: ignore
    with counted_traffic() as forward:
        out = distill_loss(
            s, y, TeacherLogits(t), objective, kd_token_weights=weights, impl="triton"
        )
    row, compared = V * t.element_size(), t[weights > 0]
    mixed = 2 if divergence == "jsd" else 0
    more = at_best(compared) if mixed else 0
    assert forward.read_from(t) == (2 + mixed) * row + more + read_again(compared)
    traffic, gradient = backward(out.loss, s)
    assert traffic.read_from(t) == 2 * row and traffic.read_from(s) == s.nbytes
    assert traffic.written_to(gradient) == gradient.nbytes


def test_columns_past_the_vocabulary_are_not_read() -> None:
    s, t = logits().requires_grad_(), logits()
    with counted_traffic() as forward:
        loss = kl_div(s, t, valid_vocab=190, impl="triton")
    assert forward.read_from(t) == N * 190 * t.element_size()
    traffic, gradient = backward(loss, s)
    assert traffic.read_from(s) == N * 190 * s.element_size()
    assert traffic.written_to(gradient) == gradient.nbytes


FAR_APART = """
import torch
from sad_kernels import Objective
from sad_kernels._rows import LossSpec, RowTargets
from sad_kernels._triton import launch

def far(x):  # the same rows, 2^30 + 16 elements apart: the third starts past 2^31
    base = torch.empty(2 * (2**30 + 16) + x.shape[1], dtype=x.dtype)
    rows = base.as_strided(x.shape, (2**30 + 16, 1))
    rows.copy_(x)
    return rows

def run(s, t, g):
    spec = LossSpec(Objective(ce_weight=0.5, divergence=DIVERGENCE), 40, -100, True, True)
    student, teacher, y = launch.Logits(s), launch.Logits(t), torch.tensor([1, 2, 3])
    forward = launch.forward(spec, student, RowTargets(y), teacher)
    launch.gradient(spec, student, RowTargets(y), teacher, forward, torch.ones(1), g)
    return forward.loss, g

s, t = torch.randn(3, 40).bfloat16(), torch.randn(3, 40).bfloat16()
near = run(s, t, torch.empty(3, 40, dtype=torch.bfloat16))
for spread in ((True, False, False), (False, True, False), (False, False, True)):
    tensors = [far(x) if wide else x for x, wide in zip((s, t, torch.zeros_like(s)), spread)]
    for a, b in zip(near, run(*tensors)):
        assert torch.equal(a, b), spread
"""


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_rows_past_two_to_the_31_elements(divergence: str) -> None:
    """A 32-bit offset would fault or read elsewhere.

    https://github.com/linkedin/Liger-Kernel/pull/1248
    https://github.com/fla-org/flash-linear-attention/pull/1082
    https://github.com/state-spaces/mamba/issues/1015
    https://github.com/microsoft/dion/pull/103
    Of each 4.3 GB only the pages that hold the three rows exist.
    """
    script = FAR_APART.replace("DIVERGENCE", repr(divergence))
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=env, check=False)
    assert done.returncode == 0
