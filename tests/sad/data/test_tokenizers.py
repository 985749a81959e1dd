"""Tokenizers: loaded or refused with a reason, compared by what they do, trained in the test."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny import EOS, TEXT, save_tiny, tiny_gpt2, tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer
from tokenizers.normalizers import NFKC
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from sad.data.tokenizers import (
    fingerprint,
    load_tokenizer,
    own_tokenizer,
    require_same_tokenizer,
    train_tokenizer,
    valid_vocab,
)
from sad.errors import UnfitError, UsageError


def changed(change: Callable[[dict], object]) -> PreTrainedTokenizerFast:
    """The tiny tokenizer after ``change`` to the JSON that defines it."""
    definition = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    change(definition)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(definition)), eos_token=EOS, pad_token=EOS
    )


class TestLoading:
    def test_a_saved_tokenizer_comes_back(self, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(save_tiny(tmp_path, tiny_llama()))
        require_same_tokenizer(tokenizer, tiny_tokenizer())
        assert fingerprint(tokenizer) == fingerprint(tiny_tokenizer())

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"must be a local path .* got '.*/absent'") as e:
            load_tokenizer(str(tmp_path / "absent"))
        assert "\n" not in str(e.value)

    def test_an_unreachable_hub(self) -> None:
        with pytest.raises(UsageError, match=r"got 'absent/absent' .* check the path and the conn"):
            load_tokenizer("absent/absent")

    @pytest.mark.parametrize("model", [tiny_llama, tiny_gpt2])
    def test_a_model_without_its_tokenizer(self, tmp_path: Path, model: Callable) -> None:
        """For GPT-2 transformers makes up a tokenizer that knows one token."""
        model().save_pretrained(tmp_path)
        with pytest.raises(UnfitError, match=f"got .*{tmp_path}.*or name another in `tokenizer`"):
            load_tokenizer(str(tmp_path))

    def test_a_damaged_file(self, tmp_path: Path) -> None:
        tiny_tokenizer().save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_text('{"model": {}}')
        with pytest.raises(UnfitError, match=f"tokenizer must load, got '{tmp_path}'"):
            load_tokenizer(str(tmp_path))

    def test_a_slow_tokenizer(self, tmp_path: Path) -> None:
        ByT5Tokenizer().save_pretrained(tmp_path)
        with pytest.raises(UnfitError, match="must be a fast one, got ByT5Tokenizer"):
            load_tokenizer(str(tmp_path))

    def test_a_models_own_tokenizer_if_it_has_one(self, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path / "with", tiny_llama())
        own = own_tokenizer(folder)
        assert own is not None and fingerprint(own) == fingerprint(tiny_tokenizer())
        tiny_llama().save_pretrained(tmp_path / "without")
        assert own_tokenizer(str(tmp_path / "without")) is None
        assert own_tokenizer("absent/absent") is None

    @pytest.mark.parametrize("trust", [False, True])
    def test_code_of_others_runs_only_on_request(
        self, monkeypatch: pytest.MonkeyPatch, trust: bool
    ) -> None:
        asked = []

        def from_pretrained(name: str, **options: object) -> PreTrainedTokenizerFast:
            asked.append((name, options))
            return tiny_tokenizer()

        monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_pretrained)
        load_tokenizer("x", trust)
        assert asked == [("x", {"trust_remote_code": trust})]


class TestComparing:
    def test_equal_ones_pass_whatever_they_pad_with(self) -> None:
        student = tiny_tokenizer()
        student.pad_token = "!"
        require_same_tokenizer(tiny_tokenizer(), student)

    def test_tokens_of_the_teachers_after_the_last_id_are_cut_and_said(self) -> None:
        teacher = tiny_tokenizer()
        teacher.add_tokens(["<think>", "</think>"])
        (note,) = require_same_tokenizer(teacher, tiny_tokenizer())
        assert note == (
            "tokens of the teacher beyond the last id here: 2 (first '<think>', id 512); cut from "
            "both models' logits"
        )

    def test_a_token_that_the_teacher_lacks(self) -> None:
        student = tiny_tokenizer()
        student.add_tokens(["<think>", "</think>"])
        message = (
            "teacher and student tokenizers must be equal, got 2 of 514 tokens with other ids, "
            "first '<think>' (teacher none, student 512); choose a student with the teacher's "
            "tokenizer, or set cross_tokenizer: prefix"
        )
        with pytest.raises(UnfitError, match=re.escape(message) + "$"):
            require_same_tokenizer(tiny_tokenizer(), student)

    def test_a_token_of_the_teachers_in_a_gap_of_the_students_ids(self) -> None:
        """No cut reaches it: the student's ids go on after it."""

        def leave_a_gap(definition: dict) -> None:
            definition["model"]["vocab"]["\u0142\u0142"] = 600

        teacher = changed(lambda d: d["model"]["vocab"].update({"\u0142\u0142": 600, "zzz": 550}))
        with pytest.raises(UnfitError, match=r"got 1 of 514 .* 'zzz' \(teacher 550, student none"):
            require_same_tokenizer(teacher, changed(leave_a_gap))

    def test_equal_sizes_prove_nothing(self) -> None:
        with pytest.raises(UnfitError, match=r"got \d+ of \d+ tokens with other ids, first '"):
            require_same_tokenizer(tiny_tokenizer(), tiny_tokenizer(text=TEXT[::-1]))

    def test_two_ids_exchanged(self) -> None:
        def exchange(definition: dict) -> None:
            vocab = definition["model"]["vocab"]
            vocab["A"], vocab["B"] = vocab["B"], vocab["A"]

        a = tiny_tokenizer().get_vocab()["A"]
        message = f"got 2 of 512 tokens with other ids, first 'A' (teacher {a}, student {a + 1})"
        with pytest.raises(UnfitError, match=re.escape(message)):
            require_same_tokenizer(tiny_tokenizer(), changed(exchange))

    def test_another_end_of_text_is_said(self) -> None:
        student = tiny_tokenizer()
        student.eos_token = "!"
        (note,) = require_same_tokenizer(tiny_tokenizer(), student)
        assert note == (
            f"the teacher's eos_token '{EOS}' (0) is '!' ({student.eos_token_id}) here: the "
            "student's are taken; `tokenizer` may name the teacher's"
        )

    def test_a_special_token_on_one_side_only_is_said(self) -> None:
        student = tiny_tokenizer()
        student.bos_token = EOS
        (note,) = require_same_tokenizer(tiny_tokenizer(), student, source="tokenizer")
        assert f"bos_token none is '{EOS}' (0) here: those of `tokenizer` are taken" in note

    def test_a_special_token_with_another_name_is_said(self) -> None:
        """Llama 3 and its instruct models: reserved tokens of the one have names in the other."""
        teacher, student = tiny_tokenizer(), tiny_tokenizer()
        teacher.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<|tool|>"]})
        student.add_special_tokens({"additional_special_tokens": ["<|reserved_0|>", "<|tool|>"]})
        (note,) = require_same_tokenizer(teacher, student)
        assert note == (
            "special tokens with another name: 1 (first 512: teacher '<|eot_id|>', student "
            "'<|reserved_0|>'); the student's are taken"
        )

    def test_an_ordinary_token_with_another_name_is_refused(self) -> None:
        teacher, student = tiny_tokenizer(), tiny_tokenizer()
        teacher.add_tokens(["<a>"])
        student.add_tokens(["<b>"])
        with pytest.raises(UnfitError, match="got 2 of 514 tokens with other ids"):
            require_same_tokenizer(teacher, student)

    def test_a_tokenizer_with_new_tokens_for_the_student(self) -> None:
        ours = tiny_tokenizer()
        ours.add_tokens(["<think>"])
        (note,) = require_same_tokenizer(tiny_tokenizer(), ours, role="student", source="tokenizer")
        assert note.startswith(
            "tokens of `tokenizer` that are new to the student: 1 (first '<think>', id 512); "
        )

    @pytest.mark.parametrize(
        "change",
        [
            lambda d: d["model"]["merges"].reverse(),
            lambda d: d.update(normalizer={"type": "NFC"}),
            lambda d: d.update(normalizer={"type": "NFKC"}),
            lambda d: d.update(normalizer={"type": "Lowercase"}),
            lambda d: d["pre_tokenizer"].update(add_prefix_space=True),
            lambda d: d.update(
                pre_tokenizer={
                    "type": "Sequence",
                    "pretokenizers": [
                        {"type": "Digits", "individual_digits": True},
                        d["pre_tokenizer"],
                    ],
                }
            ),
        ],
        ids=["merges", "nfc", "nfkc", "lowercase", "prefix-space", "digits"],
    )
    def test_one_vocabulary_used_differently(self, change: Callable[[dict], object]) -> None:
        student = changed(change)
        assert student.get_vocab() == tiny_tokenizer().get_vocab()
        with pytest.raises(UnfitError, match="got the same vocabulary but other ids for "):
            require_same_tokenizer(tiny_tokenizer(), student)

    def test_valid_vocab_is_one_more_than_the_largest_id(self) -> None:
        tokenizer = tiny_tokenizer()
        assert valid_vocab(tokenizer) == 512

        def leave_a_gap(definition: dict) -> None:
            definition["model"]["vocab"]["\u0142\u0142"] = 600

        assert valid_vocab(changed(leave_a_gap)) == 601
        tokenizer.add_tokens(["<think>"])
        assert valid_vocab(tokenizer) == 513


class TestFingerprint:
    def test_using_a_tokenizer_does_not_change_it(self) -> None:
        tokenizer = tiny_tokenizer()
        before = fingerprint(tokenizer)
        tokenizer(["a", "b c d e"], padding=True, truncation=True, max_length=3)
        assert fingerprint(tokenizer) == before

    def test_whatever_changes_ids_changes_it(self) -> None:
        other_eos, normalized = tiny_tokenizer(), tiny_tokenizer()
        other_eos.eos_token = "!"
        normalized.backend_tokenizer.normalizer = NFKC()  # pyright: ignore
        reversed_merges = changed(lambda d: d["model"]["merges"].reverse())
        every = [tiny_tokenizer(), tiny_tokenizer(500), other_eos, normalized, reversed_merges]
        assert len({fingerprint(tokenizer) for tokenizer in every}) == 5


class TestTraining:
    TEXTS = tuple(TEXT.splitlines())

    def test_it_learns_and_loses_nothing(self) -> None:
        tokenizer = train_tokenizer(iter(self.TEXTS), 300)
        assert len(tokenizer) == valid_vocab(tokenizer) == 300
        assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS, 0, 0)
        for text in (*self.TEXTS, "naïve 日本語 \U0001f600\r\n\t\x00  x"):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.decode(ids) == text
        merged = tokenizer(TEXT)["input_ids"]
        assert len(merged) < 0.8 * len(TEXT.encode())  # pyright: ignore

    def test_the_same_texts_give_the_same_tokenizer(self) -> None:
        one, two = (train_tokenizer(self.TEXTS, 400) for _ in range(2))
        assert fingerprint(one) == fingerprint(two)

    def test_it_survives_saving(self, tmp_path: Path) -> None:
        tokenizer = train_tokenizer(self.TEXTS, 300)
        tokenizer.save_pretrained(tmp_path)
        loaded = load_tokenizer(str(tmp_path))
        require_same_tokenizer(loaded, tokenizer)
        assert fingerprint(loaded) == fingerprint(tokenizer)

    def test_little_text_gives_few_merges(self) -> None:
        assert valid_vocab(train_tokenizer(["aa"], 1000)) == 258

    def test_every_byte_needs_an_entry(self) -> None:
        with pytest.raises(UsageError, match="vocab_size must be more than 256, got 256;"):
            train_tokenizer(self.TEXTS, 256)
