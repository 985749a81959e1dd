"""Sparse targets: the sample against its definition, records against what was put into them.

The definitions are written out once more here, in plain loops of float64.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sad_kernels import Objective, TeacherLogits, TeacherTopK, distill_loss
from torch import Tensor

from sad.errors import UnfitError
from sad.teachers.cache import sparse
from sad.teachers.cache.sparse import (
    decode,
    encode,
    padding_record,
    record_bytes,
    systematic_sample,
    top_k,
)

FORWARD_KL = Objective(divergence="forward_kl")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def zipf_logits(n: int, vocab: int, seed: int = 0, spread: float = 2.0) -> Tensor:
    return torch.randn(n, vocab, generator=generator(seed)) * spread


def uniforms(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=generator(seed), dtype=torch.float64)


def plain_sample(p: list[float], k: int, u: float) -> dict[int, float]:
    """Id -> weight of one row, by the definition: head, then points of the tail's running sum."""
    order = sorted(range(len(p)), key=lambda v: -p[v])
    j = 0
    while j < k and p[order[j]] * (k - j) >= math.fsum(p[v] for v in order[j:]):
        j += 1
    weights = {v: p[v] for v in order[:j]}
    tail = [v for v in range(len(p)) if v not in weights]
    R, m = math.fsum(p[v] for v in tail), k - j
    for i in range(m):
        running, point = 0.0, (u + i) * R / m
        for v in tail:
            running += p[v]
            if running > point:
                weights[v] = R / m
                break
    return weights


def as_dict(ids: Tensor, weights: Tensor) -> dict[int, float]:
    return {v: w for v, w in zip(ids.tolist(), weights.tolist(), strict=True) if w > 0}


# Sampling


@given(st.integers(0, 10_000), st.integers(1, 20), st.floats(0.1, 6.0))
def test_a_sample_is_that_of_the_definition(seed: int, k: int, spread: float) -> None:
    p = zipf_logits(4, 40, seed, spread).double().softmax(1)
    u = uniforms(4, seed + 1)
    ids, weights = systematic_sample(p, k, u)
    assert ids.shape == weights.shape == (4, k) and ids.dtype == torch.int64
    for row in range(4):
        expected = plain_sample(p[row].tolist(), k, float(u[row]))
        found = as_dict(ids[row], weights[row])
        assert found == pytest.approx(expected, rel=1e-11)
        assert len(found) == k  # distinct


@given(
    st.integers(0, 10_000),
    st.integers(1, 70),
    st.sampled_from(["uniform", "one-hot", "two", "steps", "steep", "nearly all"]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_weights_sum_to_one_and_ids_are_distinct(
    seed: int, k: int, kind: str, dtype: torch.dtype
) -> None:
    V = 50
    x = torch.rand(6, V, generator=generator(seed), dtype=torch.float64)
    p = {
        "uniform": torch.full((6, V), 1.0),
        "one-hot": torch.eye(V)[:6],
        "two": torch.eye(V)[:6] + 1e-12 * torch.eye(V)[6:12],
        "steps": (4 * x).floor().exp2(),  # ties everywhere
        "steep": (-40 * x).exp(),
        "nearly all": torch.where(x > 0.5, x, 1e-30),
    }[kind]
    p = (p / p.sum(1, keepdim=True)).to(dtype)
    for u in (torch.zeros(6), torch.full((6,), 1 - 2.0**-53, dtype=torch.float64), uniforms(6)):
        ids, weights = systematic_sample(p, k, u)
        torch.testing.assert_close(weights.sum(1), torch.ones(6).double(), rtol=0, atol=1e-14)
        for row in range(6):
            found, support = as_dict(ids[row], weights[row]), int((p[row] > 0).sum())
            assert len(found) == int((weights[row] > 0).sum()) == min(k, support)
            assert all(p[row, v] > 0 for v in found)
            assert (ids[row][weights[row] == 0] == 0).all()
            if support <= k:  # exact
                for v, w in found.items():
                    assert w == pytest.approx(float(p[row, v]), rel=1e-6)


def test_each_id_is_drawn_with_its_probability_and_weighs_one_over_it() -> None:
    """Every uniform number on a fine grid: the mean weight is p itself, not an estimate of it."""
    p = zipf_logits(1, 30, spread=1.5).double().softmax(1)
    n, k = 20_000, 6
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    ids, weights = systematic_sample(p.expand(n, -1), k, u)
    mean = torch.zeros(30, dtype=torch.float64)
    mean.index_add_(0, ids.flatten(), weights.flatten())
    torch.testing.assert_close(mean / n, p[0], rtol=0, atol=2 / n)
    drawn = torch.bincount(ids.flatten(), minlength=30) / n
    c = _factor(p[0].tolist(), k)
    torch.testing.assert_close(drawn.double(), (c * p[0]).clamp(max=1), rtol=0, atol=5 / n)


def _factor(p: list[float], k: int) -> float:
    """c with sum min(1, c p) = k, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if sum(min(1.0, c * x) for x in p) < k else (low, c)
    return low


def test_a_row_does_not_depend_on_its_company() -> None:
    p, u = zipf_logits(32, 500).softmax(1), uniforms(32)
    ids, weights = systematic_sample(p, 16, u)
    for rows in (slice(0, 1), slice(7, 8), slice(5, 20)):
        some_ids, some_weights = systematic_sample(p[rows], 16, u[rows])
        assert torch.equal(some_ids, ids[rows]) and torch.equal(some_weights, weights[rows])


def test_a_small_rest_is_drawn_as_it_is() -> None:
    """1 - sum would have no digits left of a tail of 1e-18."""
    p = torch.full((1, 100), 1e-20, dtype=torch.float64)
    p[0, 3] = 1.0
    ids, weights = systematic_sample(p, 5, torch.tensor([0.5]))
    assert ids[0, 0] == 3 and len(set(ids[0].tolist())) == 5
    assert weights[0, 1:].tolist() == pytest.approx([99e-20 / 4] * 4, rel=1e-12)


def test_the_last_slot_may_hold_any_of_what_is_left() -> None:
    """However small the mass beyond K ids is, it can be drawn."""
    p = torch.tensor([[0.6, 0.4 - 1e-12, 1e-12]], dtype=torch.float64)
    for u, last in ((0.0, 1), (0.5, 1), (1 - 2.0**-53, 2)):
        ids, weights = systematic_sample(p, 2, torch.tensor([u], dtype=torch.float64))
        assert ids.tolist() == [[0, last]]
        assert weights[0].tolist() == pytest.approx([0.6, 0.4], rel=1e-12)


def test_the_mean_gradient_of_samples_is_the_full_one() -> None:
    """Within 4 standard errors of 400 samples; a renormalised top-k is far outside."""
    n, V, k, samples = 64, 400, 8, 400
    teacher = zipf_logits(n, V, 1)
    student = zipf_logits(n, V, 2, 1.0)

    def gradient(target: Any) -> Tensor:
        logits = student.clone().requires_grad_()
        distill_loss(logits, None, target, FORWARD_KL).loss.backward()
        assert logits.grad is not None
        return logits.grad

    full = gradient(TeacherLogits(teacher))
    p = teacher.softmax(1)

    def sampled(seed: int) -> Tensor:
        ids, weights = systematic_sample(p, k, uniforms(n, seed))
        return gradient(TeacherTopK(*decode(encode(ids, weights.log(), None, V)), tail="zero"))

    found = torch.stack([sampled(seed) for seed in range(samples)])
    one = (found - full).flatten(1).norm(dim=1).square().mean().sqrt()
    bound = 4 / math.sqrt(samples) * one
    assert (found.mean(0) - full).norm() < bound
    ids, log_probs, _ = top_k(teacher, k)
    assert (gradient(TeacherTopK(ids, log_probs.float(), "zero")) - full).norm() > bound


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1])
def test_probabilities_that_are_none_are_refused(value: float) -> None:
    p = zipf_logits(3, 20).softmax(1)
    p[1, 4] = value
    for k in (2, 30):
        with pytest.raises(UnfitError, match="1 of 3 positions"):
            systematic_sample(p, k, uniforms(3))
    with pytest.raises(UnfitError, match="2 of 2"):
        systematic_sample(torch.zeros(2, 5), 2, uniforms(2))


def test_arguments_that_do_not_fit_are_refused() -> None:
    p = zipf_logits(3, 20).softmax(1)
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        systematic_sample(p, 4, torch.ones(3))
    with pytest.raises(ValueError, match="one number per row"):
        systematic_sample(p, 4, uniforms(2))
    with pytest.raises(ValueError, match="k must be"):
        systematic_sample(p, 0, uniforms(3))
    with pytest.raises(ValueError, match=r"\[rows, V\]"):
        systematic_sample(p[0], 4, uniforms(3))


# Top-k


@given(st.integers(0, 10_000), st.integers(1, 40), st.floats(0.1, 4.0))
def test_top_k_and_its_tail_are_those_of_the_definition(seed: int, k: int, spread: float) -> None:
    temperatures = (0.5, 1.0, 2.0, 4.0)
    logits = zipf_logits(3, 60, seed, spread)
    ids, log_probs, tail = top_k(logits, k, temperatures)
    for row in range(3):
        z = logits[row].double().tolist()
        order = sorted(range(60), key=lambda v: -z[v])
        assert ids[row].tolist() == order[:k]
        lse = math.log(math.fsum(math.exp(x) for x in z))
        assert log_probs[row].tolist() == pytest.approx([z[v] - lse for v in order[:k]], abs=1e-12)
        for column, T in enumerate(temperatures):
            masses = [math.exp(z[v] / T) for v in order]
            expected = math.fsum(masses[k:]) / math.fsum(masses)
            assert float(tail[row, column]) == pytest.approx(expected, rel=1e-12)


def test_a_small_tail_has_all_its_digits() -> None:
    logits = torch.zeros(1, 10).double()
    logits[0, 0] = 60.0
    _, _, tail = top_k(logits, 1)
    assert float(tail) == pytest.approx(9 * math.exp(-60), rel=1e-12)


def test_what_a_record_cannot_hold_is_part_of_the_tail() -> None:
    logits = torch.tensor([[0.0, -1.0, -40.0, -50.0]])
    ids, log_probs, tail = top_k(logits, 3, (1.0, 4.0))
    assert ids.tolist() == [[0, 1, 0]] and log_probs[0, 2] == -math.inf
    for column, T in enumerate((1.0, 4.0)):
        masses = [math.exp(x / T) for x in logits[0].tolist()]
        assert float(tail[0, column]) == pytest.approx(sum(masses[2:]) / sum(masses), rel=1e-12)


def test_more_ids_than_columns_and_masked_columns_are_padding() -> None:
    logits = torch.tensor([[1.0, -math.inf, 3.0]])
    ids, log_probs, tail = top_k(logits, 5)
    assert ids.tolist() == [[2, 0, 0, 0, 0]]
    assert log_probs.isneginf().tolist() == [[False, False, True, True, True]]
    assert tail.tolist() == [[0.0]]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_none_are_refused(value: float) -> None:
    logits = zipf_logits(3, 20)
    logits[2, 4] = value
    with pytest.raises(UnfitError, match="1 of 3 positions"):
        top_k(logits, 4)
    with pytest.raises(UnfitError, match="2 of 2 positions"):
        top_k(torch.full((2, 5), -math.inf), 4)
    with pytest.raises(ValueError, match="above 0"):
        top_k(zipf_logits(3, 20), 4, (1.0, 0.0))


# Records


@given(
    st.integers(0, 10_000),
    st.integers(1, 9),
    st.sampled_from([300, 65_536, 65_537, 150_000, 2**20]),
)
def test_ids_come_back(seed: int, k: int, vocab: int) -> None:
    ids = torch.randint(vocab, (5, k), generator=generator(seed))
    ids[0, 0], ids[0, -1] = 0, vocab - 1
    record = encode(ids, torch.full((5, k), -1.0), None, vocab)
    assert torch.equal(decode(record)[0], ids)
    assert ("ids_hi" in record) == (vocab > 65_536)
    size = sum(part.nbytes for part in record.values())
    assert size == 5 * record_bytes("sampled", k, vocab)


def test_bytes_per_position() -> None:
    assert record_bytes("sampled", 64, 151_936) == 288
    assert record_bytes("topk", 64, 151_936) == 292
    assert record_bytes("topk", 64, 4096, temperatures=3) == 268
    assert record_bytes("topk", 7, 2**20) == 14 + 4 + 14 + 4
    record = encode(*top_k(zipf_logits(3, 70_000), 7, (1.0, 2.0)), 70_000)
    assert sum(part.nbytes for part in record.values()) == 3 * record_bytes("topk", 7, 70_000, 2)
    with pytest.raises(ValueError, match="sampled or topk"):
        record_bytes("dense", 7, 100)  # pyright: ignore[reportArgumentType]


@given(st.integers(0, 10_000), st.integers(1, 64), st.floats(0.1, 5.0))
def test_a_weight_errs_by_half_a_step_and_the_tail_not_at_all(
    seed: int, k: int, spread: float
) -> None:
    logits = zipf_logits(8, 300, seed, spread)
    ids, log_probs, tail = top_k(logits, k)
    record = encode(ids, log_probs, tail, 300)
    found = decode(record)[1].double()
    # float32 adds its own rounding: of logarithms, and of 1 - tail.
    steps = record["logw"].int()
    torch.testing.assert_close(-steps / 2048, log_probs.float(), rtol=0, atol=1 / 4096 + 4e-6)
    mass = 1 - record["tail"][:, 0].double()
    torch.testing.assert_close(found.exp().sum(1), mass, rtol=1e-6, atol=0)
    error = (found - log_probs).exp() - 1
    assert error.abs().max() < 2 / 4096 + 6e-8 / float(mass.min()) + 5e-6


@given(st.integers(0, 10_000), st.sampled_from([0.5, 0.9, 1.0, 2.0, 4.0]), st.floats(0.1, 5.0))
def test_another_temperature_is_that_of_the_full_distribution(
    seed: int, T: float, spread: float
) -> None:
    temperatures = (1.0, T)
    logits = zipf_logits(8, 300, seed, spread)
    ids, log_probs, tail = top_k(logits, 16, temperatures)
    found = decode(encode(ids, log_probs, tail, 300), temperatures.index(T), T)[1].double()
    exact = (logits.double() / T).log_softmax(1).gather(1, ids)
    mass = 1 - tail[:, temperatures.index(T)]
    torch.testing.assert_close(found.exp().sum(1), mass, rtol=1e-5, atol=0)
    kept = log_probs.isfinite()
    assert ((found - exact)[kept].abs() < 2 / 4096 / T + 1e-5).all()
    assert found[~kept].isneginf().all()


def test_the_tail_makes_another_temperature_exact() -> None:
    """All that ``decode`` adds is the rounding of log-weights."""
    logits = zipf_logits(8, 300)
    temperatures = (0.5, 1.5, 2.0, 4.0)
    ids, log_probs, tail = top_k(logits, 16, temperatures)
    for column, T in enumerate(temperatures):
        found = (log_probs / T).log_softmax(1) + torch.log1p(-tail[:, column, None])
        exact = (logits.double() / T).log_softmax(1).gather(1, ids)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-13)


def test_positions_without_a_target_decode_to_nothing() -> None:
    for temperatures in (0, 2):
        record = padding_record(3, 5, 70_000, temperatures)
        ids, log_probs = decode(record)
        assert ids.tolist() == [[0] * 5] * 3 and log_probs.isneginf().all()
    # Beside others they change nothing.
    ids, weights = systematic_sample(zipf_logits(2, 100).softmax(1), 5, uniforms(2))
    some = encode(ids, weights.log(), None, 70_000)
    empty = padding_record(2, 5, 70_000)
    both = {name: torch.stack((some[name], empty[name])) for name in some}
    ids_of_both, log_probs = decode(both)  # [2, 2, 5]
    assert torch.equal(ids_of_both[0], ids) and torch.equal(log_probs[0], decode(some)[1])
    assert log_probs[1].isneginf().all()


def test_weights_too_small_for_a_record_are_padding() -> None:
    log_weights = torch.tensor([[0.0, -31.999, -32.1, -math.inf]])
    record = encode(torch.tensor([[4, 5, 6, 99]]), log_weights, None, 10)
    assert record["logw"].tolist() == [[0, 65_534, sparse.PADDING, sparse.PADDING]]
    assert record["ids_lo"].tolist() == [[4, 5, 0, 0]]


def test_a_record_is_refused_what_it_cannot_hold() -> None:
    one, log_weight = torch.zeros(1, 1).long(), torch.zeros(1, 1)
    with pytest.raises(UnfitError, match="1,048,576"):
        encode(one, log_weight, None, 2**20 + 1)
    with pytest.raises(UnfitError, match="1,048,576"):
        record_bytes("topk", 64, 2**20 + 1)
    with pytest.raises(ValueError, match=r"lie in \[0, 10\)"):
        encode(one + 10, log_weight, None, 10)
    with pytest.raises(ValueError, match=r"lie in \[0, 10\)"):
        encode(one - 1, log_weight, None, 10)
    for wrong in (math.nan, 0.5):
        with pytest.raises(ValueError, match="at most 0"):
            encode(one, log_weight + wrong, None, 10)
    with pytest.raises(ValueError, match="tail must lie"):
        encode(one, log_weight, torch.full((1, 1), 1.5), 10)
    with pytest.raises(ValueError, match="leading dimensions"):
        encode(one, log_weight, torch.zeros(2, 1), 10)
    with pytest.raises(ValueError, match="one shape"):
        encode(one, torch.zeros(1, 2), None, 10)
