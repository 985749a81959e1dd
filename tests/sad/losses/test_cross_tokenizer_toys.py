"""Worlds of two texts, of which everything can be counted: what the loss is at exact models, and
where its optimum lies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sad_kernels import Head, Objective, TeacherHidden
from support.pairs import aligned, beginning, byte_level
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sad.config.sections import DataConfig
from sad.data.alignment import Side
from sad.data.batch import Batch
from sad.data.outcomes import shared_outcomes
from sad.losses.cross_tokenizer import CrossTokenizerLoss

Context = tuple[int, ...]
KD = 0.7


class World(NamedTuple):
    """Texts of equal probability, one to a row, and models of them by their contexts."""

    batch: Batch
    loss: CrossTokenizerLoss
    hidden: Tensor  # [B, L, contexts]: which context it is
    truth: Tensor  # [contexts, V_s]: counts of the next token
    teacher: TeacherHidden  # which knows the texts
    num_bytes: int  # end-of-text is one

    def value(self, logits: Tensor, objective: Objective) -> Any:
        """The loss of a student with a row of logits [V_s, contexts] per context."""
        arguments = self.hidden, Head(logits), self.batch, self.teacher, objective
        return self.loss(*arguments, self.batch.counts.targets, training=True)

    def exact(self) -> Tensor:
        """The logits of a student who knows the texts."""
        return known(self.truth).T.contiguous()

    def bias(self, objective: Objective) -> Tensor:  # [contexts]
        """How far the optimum of the loss is from the texts in each context; they sum to bits per
        byte."""
        logits = (0.9 * self.exact().clamp(min=-12)).contiguous().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [logits], max_iter=400, line_search_fn="strong_wolfe", tolerance_grad=1e-9
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.value(logits, objective).loss
            loss.backward()
            return loss

        optimizer.step(closure)
        q = logits.detach().T.log_softmax(1)
        p = self.truth / self.truth.sum(1, keepdim=True)
        divergence = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q), 0).sum(1)
        return self.truth.sum(1) * divergence / math.log(2) / self.num_bytes


def known(counts: Tensor) -> Tensor:
    """Log-probabilities of the next token, [contexts, V]."""
    return (counts / counts.sum(1, keepdim=True)).clamp(min=1e-30).log()


def counted(batch: Batch, vocab: int) -> tuple[Tensor, Tensor]:
    """Which context each position is, one-hot, and how often each token follows a context."""
    numbers: dict[Context, int] = {}
    at = torch.zeros(batch.labels.shape, dtype=torch.long)
    for row, ids in enumerate(batch.input_ids.tolist()):
        for place in range(int(batch.lengths[row])):
            at[row, place] = numbers.setdefault(tuple(ids[: place + 1]), len(numbers))
    counts = torch.zeros(len(numbers), vocab, dtype=torch.float64)
    for row, place in (batch.labels >= 0).nonzero().tolist():
        counts[at[row, place], batch.labels[row, place]] += 1
    return torch.nn.functional.one_hot(at, len(numbers)).double(), counts


def world(
    folder: Path,
    texts: list[str],
    student: PreTrainedTokenizerFast,
    teacher: PreTrainedTokenizerFast,
    **keys: Any,
) -> World:
    student, teacher = beginning(student), beginning(teacher)
    rows = aligned(folder, texts, student, teacher, max_length=8, packing=False)
    assert len(rows) == len(texts)
    batch = rows.batch(range(len(rows)))
    assert batch.theirs is not None
    sides = (Side.of(tokenizer, DataConfig(), "student") for tokenizer in (student, teacher))
    loss = CrossTokenizerLoss(shared_outcomes(*sides), torch.device("cpu"), **keys)
    hidden, truth = counted(batch, len(student))
    states, counts = counted(batch.theirs.batch, len(teacher))
    target = TeacherHidden(states, Head(known(counts).T.contiguous()))
    num_bytes = sum(len(text) + 1 for text in texts)
    return World(batch, loss, hidden, truth, target, num_bytes)


def test_two_exact_models_can_disagree(tmp_path: Path) -> None:
    """``ab c`` and ``a bc``: where the text begins the teacher is sure of ``ab``, and the student
    as often of ``a``, the way that it spells ``abc``."""
    both = [("a", "b"), ("b", "c")]
    found = world(tmp_path, ["abc", "ab"], byte_level(both[::-1]), byte_level(both))
    objective = Objective(ce_weight=1 - KD, kd_weight=KD)
    first = found.batch._replace(labels=found.batch.labels.clone())
    first.labels[:, 1:] = -100
    kd = found._replace(batch=first).value(found.exact(), objective).kd / 2
    assert float(kd) == pytest.approx(math.log(2), rel=1e-9)
    # Cross-entropy wants 1/2 for ab, the divergence 1: q = 0.3 * 1/2 + 0.7.
    nats = -0.5 * math.log(2 * 0.85) - 0.5 * math.log(2 * 0.15)
    expected = nats / math.log(2) * 2 / 7
    assert expected == pytest.approx(0.139, abs=5e-4)
    bias = found.bias(objective)
    assert float(bias[0]) == pytest.approx(expected, abs=1e-4)
    # After ab the student's text always ends, and half of the teacher's go on with c.
    expected -= math.log(0.3 + 0.7 / 2) / math.log(2) / 7
    assert float(bias.sum()) == pytest.approx(expected, abs=1e-4)


def test_a_student_of_bytes_is_not_biased_though_the_divergence_is_above_0(tmp_path: Path) -> None:
    """``ab`` and ``a c``: after ``a`` the teacher knows that no ``b`` comes, and the student does
    not. It meets the others in the text that the teacher spells ``ab``, inside that token."""
    found = world(tmp_path, ["ab", "ac"], byte_level([]), byte_level([("a", "b")]))
    objective = Objective(ce_weight=1 - KD, kd_weight=KD)
    out = found.value(found.exact(), objective)
    assert float(out.kd) == pytest.approx(math.log(2), rel=1e-9)  # once in five boundaries
    assert float(found.bias(objective).sum()) == pytest.approx(0, abs=1e-6)


def test_weights_that_do_not_sum_to_the_same_move_the_optimum(tmp_path: Path) -> None:
    found = world(tmp_path, ["ab", "ac"], byte_level([]), byte_level([("a", "b")]))

    class Unequal(CrossTokenizerLoss):
        def __call__(self, *arguments: Any, **_: Any) -> Any:
            return super().__call__(*arguments, training=False)  # its weights are the objective's

    loss = Unequal(found.loss.tables, torch.device("cpu"))
    objective = Objective(ce_weight=1 - KD, kd_weight=KD)
    assert found._replace(loss=loss).bias(objective).sum() > 0.01


def test_equal_tokenizers_are_not_biased(tmp_path: Path) -> None:
    merges = [("a", "b"), ("b", "c")]
    found = world(tmp_path, ["abc", "ab", "cb"], byte_level(merges), byte_level(merges))
    objective = Objective(ce_weight=1 - KD, kd_weight=KD)
    assert float(found.value(found.exact(), objective).kd) == pytest.approx(0, abs=1e-9)
    assert float(found.bias(objective).sum()) == pytest.approx(0, abs=1e-6)


def test_likelihood_of_exact_models_is_equal_where_they_meet(tmp_path: Path) -> None:
    """Every text is one group or several of the same likelihood on both sides."""
    both = [("a", "b"), ("b", "c")]
    tokenizers = byte_level(both[::-1]), byte_level(both)
    found = world(tmp_path, ["abc", "cba"], *tokenizers, likelihood=True)
    objective = Objective(ce_weight=1 - KD, kd_weight=KD)
    assert float(found.value(found.exact(), objective).kd) == pytest.approx(0, abs=1e-6)
    assert float(found.bias(objective).sum()) == pytest.approx(0, abs=1e-4)
