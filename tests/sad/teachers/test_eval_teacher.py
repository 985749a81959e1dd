"""The hidden states that evaluations share: when the teacher runs, what they take, same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny import tiny_llama

from sad.data.batch import Batch, LossCounts
from sad.losses.base import CaptureSpec
from sad.losses.capture import Capture
from sad.teachers.eval_teacher import EvalTeacher
from sad.teachers.frozen import FrozenTeacher, TeacherOutput

SIZE = 2 * 16 * 32 * 4
"""Bytes of the hidden states of a batch."""


class Counted(FrozenTeacher):
    """Counts its forward passes."""

    passes = 0

    def forward(self, batch: Batch, capture: Capture | None = None) -> TeacherOutput:
        self.passes += 1
        return super().forward(batch, capture)


@pytest.fixture
def teacher() -> Counted:
    return Counted(tiny_llama().requires_grad_(False), 512, device=torch.device("cpu"))


def batch_of(seed: int, **parts: Any) -> Batch:
    ids = torch.randint(512, (2, 16), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(16).repeat(2, 1)
    lengths = torch.full((2,), 16)
    return Batch(ids, ids, positions, lengths, LossCounts(32, 30, 2), 1)._replace(**parts)


def hidden(output: TeacherOutput) -> torch.Tensor:
    (target,) = output.targets
    return target.hidden


def test_batches_that_come_again_cost_no_pass_and_have_the_same_bits(teacher: Counted) -> None:
    cached = EvalTeacher(teacher, 2 * SIZE)
    batches = [batch_of(0), batch_of(1)]
    first = [hidden(cached.forward(batch)).clone() for batch in batches]
    again = [cached.forward(batch) for batch in (batch_of(1), batch_of(0))]
    assert teacher.passes == 2 and cached.kept_bytes == 2 * SIZE
    for batch, kept, output in zip(batches, first, reversed(again), strict=True):
        plain = teacher.forward(batch)
        assert torch.equal(kept, hidden(plain)) and torch.equal(hidden(output), hidden(plain))
        assert output.targets[0].head is plain.targets[0].head


def test_no_more_is_kept_than_fits(teacher: Counted) -> None:
    cached = EvalTeacher(teacher, 2 * SIZE - 1)
    for _ in range(3):
        for seed in range(2):
            assert torch.equal(
                hidden(cached.forward(batch_of(seed))), hidden(teacher.forward(batch_of(seed)))
            )
    assert cached.kept_bytes == SIZE
    assert teacher.passes == 6 + 1 + 3  # ours, the batch that was kept, the one that was not


def test_nothing_is_kept_of_0_bytes(teacher: Counted) -> None:
    cached = EvalTeacher(teacher, 0)
    for _ in range(2):
        cached.forward(batch_of(0))
    assert teacher.passes == 2 and cached.kept_bytes == 0


@pytest.mark.parametrize(
    "part", [{"position_ids": torch.arange(16).repeat(2, 1) % 9}, {"input_ids": batch_of(1)[0]}]
)
def test_whatever_the_teacher_reads_tells_batches_apart(
    teacher: Counted, part: dict[str, Any]
) -> None:
    cached = EvalTeacher(teacher, 9 * SIZE)
    cached.forward(batch_of(0))
    other = batch_of(0, **part)
    assert torch.equal(hidden(cached.forward(other)), hidden(teacher.forward(other)))


def test_the_same_tokens_in_other_rows_are_another_batch(teacher: Counted) -> None:
    cached, whole = EvalTeacher(teacher, 9 * SIZE), batch_of(0)
    ids, positions = whole.input_ids.view(1, 32), whole.position_ids.view(1, 32)
    cached.forward(whole)
    flat = whole._replace(input_ids=ids, position_ids=positions)
    assert hidden(cached.forward(flat)).shape == (1, 32, 32)


def test_activations_are_captured_anew(teacher: Counted) -> None:
    cached = EvalTeacher(teacher, 9 * SIZE)
    capture = Capture(teacher.model, CaptureSpec(hidden=(0,)), role="teacher", detach=True)
    cached.forward(batch_of(0))
    for _ in range(2):
        assert 0 in cached.forward(batch_of(0), capture).activations.hidden
    assert teacher.passes == 3
