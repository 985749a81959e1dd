"""What servers say of a text: taken as it is meant, or refused with the place that is wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.teacher_server import sglang_meta, vllm_entries

from sad.errors import UnfitError
from sad.teachers.cache.answers import own_of_sglang, own_of_vllm, read_sglang, read_vllm

V, K = 32, 4
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def log_probs() -> torch.Tensor:
    return torch.randn(len(TOKENS), V, generator=torch.Generator().manual_seed(0)).log_softmax(1)


def test_both_kinds_give_the_most_likely_ids_and_the_rest() -> None:
    values, ids = log_probs()[:-1].topk(K, 1)
    for answer in (
        read_vllm(vllm_entries(log_probs(), TOKENS, K), TOKENS, K, V, "it"),
        read_vllm(vllm_entries(log_probs(), TOKENS, K), TOKENS, None, V, "it"),
        read_sglang(sglang_meta(log_probs(), TOKENS, K), TOKENS, K, V, "it"),
        read_sglang(sglang_meta(log_probs(), TOKENS, K), TOKENS, None, V, "it"),
    ):
        # Without k an own token of rank k + 1 belongs to the most likely ids, too.
        assert torch.equal(answer.ids[:, :K], ids)
        assert torch.equal(answer.log_probs[:, :K], values.double())
        rest = 1 - answer.log_probs.exp().sum(1)
        torch.testing.assert_close(answer.tail, rest)


def test_an_own_token_that_ties_with_the_last_of_them_is_left_out() -> None:
    tokens = [0, 14]
    known = enumerate([0.4, 0.2, 0.1, 0.1])
    entry = {str(10 + i): {"logprob": math.log(p), "rank": i + 1} for i, p in known}
    for rank in (3, 4):
        own = {"14": {"logprob": math.log(0.1), "rank": rank}}
        for one in (own | entry, entry | own):
            answer = read_vllm([None, one], tokens, K, V, "it")
            assert answer.ids.tolist() == [[10, 11, 12, 13]]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda e: e.pop(), "with one entry per token, 8, got 7"),
        (lambda e: e.__setitem__(0, {}), "token 0, must be null"),
        (lambda e: e[2].clear(), "token 2, must hold the text's own token, 4"),
        (lambda e: e.__setitem__(2, None), "token 2, must be ids with rank and logprob"),
        (lambda e: e[2].__setitem__("40", {"logprob": -1.0, "rank": 1}), "token 2, must"),
        (lambda e: e[3].update({k: v | {"rank": v["rank"] + 1} for k, v in e[3].items()}), "ranks"),
        (lambda e: e[3].update({k: v | {"logprob": 0.0} for k, v in e[3].items()}), "at most 1"),
        (lambda e: e[3].update({k: v | {"logprob": math.nan} for k, v in e[3].items()}), "finite"),
    ],
)
def test_wrong_answers_are_refused(change: Any, complaint: str) -> None:
    entries = vllm_entries(log_probs(), TOKENS, K)
    change(entries)
    with pytest.raises(UnfitError) as raised:
        read_vllm(entries, TOKENS, K, V, "it")
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)


def test_ids_that_the_tokenizer_has_not_are_refused() -> None:
    with pytest.raises(UnfitError, match="ids of the tokenizer, below 8"):
        read_sglang(sglang_meta(log_probs(), TOKENS, K), TOKENS, K, 8, "it")


def test_another_text_is_refused() -> None:
    other = [*TOKENS[:-1], 7]
    with pytest.raises(UnfitError, match="other tokens from place 7"):
        read_sglang(sglang_meta(log_probs(), TOKENS, K), other, K, V, "it")


def test_both_kinds_give_the_log_probability_of_the_text() -> None:
    after = enumerate(TOKENS[1:])
    known = [float(log_probs()[place, token]) for place, token in after]
    for found in (
        own_of_vllm(vllm_entries(log_probs(), TOKENS, 1), TOKENS, "it"),
        own_of_sglang(sglang_meta(log_probs(), TOKENS, 1), TOKENS, "it"),
    ):
        assert found.tolist() == pytest.approx(known)
    rounded = own_of_vllm([None, {"7": {"logprob": 1e-4}}], [3, 7], "it")
    assert rounded.tolist() == [0.0]  # of 16 bits


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda e: e.pop(), "with one entry per token, 8, got 7"),
        (lambda e: e.__setitem__(0, {}), "token 0, must be null"),
        (lambda e: e[2].pop("4"), "token 2, must hold the text's own token, 4"),
        (lambda e: e.__setitem__(2, None), "token 2, must hold the text's own token, 4"),
        (lambda e: e[3]["1"].pop("logprob"), "token 3, must hold the text's own token, 1"),
        (lambda e: e[3]["1"].update(logprob=math.nan), "token 3, must hold finite log-prob"),
        (lambda e: e[3]["1"].update(logprob=-math.inf), "token 3, must hold finite log-prob"),
        (lambda e: e[3]["1"].update(logprob=0.1), "token 3, must hold finite log-prob"),
        (lambda e: e[3]["1"].update(logprob="x"), "must hold numbers as log-probabilities"),
    ],
)
def test_a_likelihood_that_cannot_be_right_is_refused(change: Any, complaint: str) -> None:
    entries = vllm_entries(log_probs(), TOKENS, 1)
    change(entries)
    with pytest.raises(UnfitError) as caught:
        own_of_vllm(entries, TOKENS, "it")
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [0, 3])
def test_a_likelihood_of_another_text_is_refused(place: int) -> None:
    meta = sglang_meta(log_probs(), TOKENS, 1)
    meta["input_token_logprobs"][place][1] += 1
    for wrong in (meta, {}, None, {"input_token_logprobs": [3]}):
        with pytest.raises(UnfitError, match="must have the text's tokens") as caught:
            own_of_sglang(wrong, TOKENS, "it")
        assert "\n" not in str(caught.value)
