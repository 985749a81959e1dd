"""Conversations and prompts: what becomes a target, what is context, what is left out and told."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.chat import (
    BOS,
    CHAT_TEMPLATE,
    END,
    EOS,
    WITHOUT_MARKERS,
    byte_tokenizer,
    say,
    write_records,
)
from transformers import PreTrainedTokenizerFast

from sad.config.schema import DataConfig, DistillConfig
from sad.data.batch import IGNORE_INDEX
from sad.data.chat import set_chat_template
from sad.data.documents import Document, read_documents
from sad.data.packing import fingerprint_rows
from sad.data.rows import PackedRows, load_rows
from sad.data.split import DocumentSet
from sad.errors import SadError, UnfitError, UsageError

MAX_LENGTH = 128


def load(
    folder: Path,
    *records: object,
    max_length: int = MAX_LENGTH,
    packing: bool = True,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **data: Any,
) -> PackedRows:
    """The rows of these records."""
    path = write_records(folder / "chat.jsonl", *records)
    held_out = write_records(folder / "held_out.jsonl", *records)
    data = {"train": path, "eval": held_out, "cache_dir": str(folder / "cache")} | data
    config = DistillConfig(
        student="s", kd_weight=0.0, data=DataConfig(**data), max_length=max_length, packing=packing
    )
    tokenizer = tokenizer or byte_tokenizer()
    set_chat_template(tokenizer, config.data)
    return load_rows(config, tokenizer)[0]


def targets_of(rows: PackedRows) -> str:
    """The text of all targets, one after another."""
    labels = rows.batch(range(len(rows))).labels
    assert (labels != IGNORE_INDEX).sum() == rows.num_targets.sum()
    return text_of(labels[labels != IGNORE_INDEX].tolist())


def inputs_of(rows: PackedRows) -> str:
    batch = rows.batch(range(len(rows)))
    ids = [row[:n] for row, n in zip(batch.input_ids, batch.lengths.tolist(), strict=True)]
    return text_of(torch.cat(ids).tolist())


def ids_of(tokens: Sequence[str]) -> list[int]:
    return byte_tokenizer().convert_tokens_to_ids(list(tokens))  # pyright: ignore


def text_of(ids: list[int]) -> str:
    return byte_tokenizer().decode(ids)  # pyright: ignore[reportReturnType]


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {}}}

SHAPES: dict[str, tuple[list[Any], int, str]] = {
    "multi-turn": (
        [{"messages": say("user: Hi", "assistant: Hello", "user: And now?", "assistant: So long")}],
        (5 + 1) + (7 + 1),
        "Hello<|end|>So long<|end|>",
    ),
    "tools": (
        [
            {
                "messages": [
                    {"role": "user", "content": "Rain?"},
                    {"role": "assistant", "content": None, "tool_calls": "weather()"},
                    {"role": "tool", "content": "no"},
                    {"role": "assistant", "content": "No."},
                ],
                "tools": [WEATHER],
            }
        ],
        (9 + 1) + (3 + 1),
        "weather()<|end|>No.<|end|>",
    ),
    "system only": (
        [{"messages": say("system: Be kind.")}, {"messages": say("user: A", "assistant: B")}],
        1 + 1,
        "B<|end|>",
    ),
    "empty assistant": ([{"messages": say("user: Hi", "assistant: ")}], 1, "<|end|>"),
    "unicode": (
        [{"messages": say("user: naïve 日本?", "assistant: é日😀")}],
        2 + 3 + 4 + 1,
        "é日😀<|end|>",
    ),
    "longer than max_length": (
        [
            {"messages": say("user: Hi", f"assistant: {'x' * 128}")},
            {"messages": say("user: Hi", "assistant: short")},
        ],
        5 + 1,
        "short<|end|>",
    ),
    "prompt strings": (
        [{"prompt": "2 + 2 = ", "completion": "4"}, {"prompt": "", "completion": "ab"}],
        (1 + 1) + (2 + 1),
        "4<|eos|>ab<|eos|>",
    ),
    "prompt messages": (
        [
            {
                "prompt": say("system: Count.", "user: One", "assistant: Two", "user: Three"),
                "completion": say("assistant: Four"),
            }
        ],
        4 + 1,
        "Four<|end|>",
    ),
    "mixed": (
        [
            {"text": "abc"},
            {"messages": say("user: Hi", "assistant: Yes"), "text": "not read"},
            {"prompt": "p", "completion": "c", "text": "not read"},
            {"messages": None, "text": "d"},
        ],
        (3 + 1) + (3 + 1) + (1 + 1) + (1 + 1),
        "abc<|eos|>Yes<|end|>c<|eos|>d<|eos|>",
    ),
    "ends with the user": (
        [{"messages": say("user: A", "assistant: B", "user: thanks")}],
        1 + 1,
        "B<|end|>",
    ),
}
"""Ten shapes of chat files: records, their targets counted by hand (a token per byte), their text.
Only what the assistant says is learned."""


class TestTenShapes:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("packing", [True, False])
    def test_targets_are_those_counted_by_hand(
        self, tmp_path: Path, shape: str, packing: bool
    ) -> None:
        records, count, text = SHAPES[shape]
        only = any("messages" in r or isinstance(r.get("prompt"), list) for r in records)
        rows = load(tmp_path, *records, packing=packing, assistant_only_loss=only)
        assert targets_of(rows) == text
        assert rows.num_targets.sum() == count
        # Special tokens stand for no text.
        spoken = text.replace(END, "").replace(EOS, "")
        assert rows.target_bytes.sum() == len(spoken.encode())

    def test_all_that_a_template_writes_is_learned_unless_asked_otherwise(
        self, tmp_path: Path
    ) -> None:
        rows = load(tmp_path, {"messages": say("user: Hi", "assistant: Yes")})
        assert targets_of(rows) == "<|turn|>user: Hi<|end|><|turn|>assistant: Yes<|end|>"
        assert inputs_of(rows) == "<|bos|><|turn|>user: Hi<|end|><|turn|>assistant: Yes"

    def test_prompts_are_learned_if_asked(self, tmp_path: Path) -> None:
        records = [
            {"prompt": "ab", "completion": "c"},
            {"prompt": say("user: A"), "completion": say("assistant: B")},
        ]
        rows = load(tmp_path, *records, completion_only_loss=False)
        assert targets_of(rows) == "abc<|eos|><|turn|>user: A<|end|><|turn|>assistant: B<|end|>"

    def test_both_masks_apply_to_completions_of_messages(self, tmp_path: Path) -> None:
        record = {
            "prompt": say("user: A", "assistant: B", "user: C"),
            "completion": say("assistant: D", "user: E", "assistant: F"),
        }
        assert targets_of(load(tmp_path / "1", record, assistant_only_loss=True)) == (
            "D<|end|>F<|end|>"
        )
        both = load(tmp_path / "2", record, assistant_only_loss=True, completion_only_loss=False)
        assert targets_of(both) == "B<|end|>D<|end|>F<|end|>"

    def test_what_the_assistant_says_is_what_transformers_says_it_is(self, tmp_path: Path) -> None:
        messages = SHAPES["multi-turn"][0][0]["messages"]
        tokenizer = byte_tokenizer()
        theirs: Any = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = [
            token
            for token, said in zip(theirs["input_ids"], theirs["assistant_masks"], strict=True)
            if said
        ]
        rows = load(tmp_path, {"messages": messages}, max_length=256, assistant_only_loss=True)
        assert targets_of(rows) == tokenizer.decode(ids)
        assert inputs_of(rows) + END == tokenizer.decode(theirs["input_ids"])


class TestContext:
    def test_prompts_are_read_but_carry_no_loss(self, tmp_path: Path) -> None:
        rows = load(tmp_path, {"prompt": "ab", "completion": "cd"}, max_length=8)
        batch = rows.batch([0])
        bos, a, b, c, d, eos = ids_of([BOS, *"abcd", EOS])
        ignore = IGNORE_INDEX
        assert batch.input_ids[0, :5].tolist() == [bos, a, b, c, d]
        assert batch.labels[0].tolist() == [ignore, ignore, c, d, eos, *[ignore] * 3]
        assert batch.position_ids[0, :5].tolist() == [0, 1, 2, 3, 4]
        assert (batch.lengths.item(), batch.num_targets, batch.target_bytes) == (5, 3, 2)
        # Structural losses compare all that is read: each position but the first.
        assert batch.counts == (3, 4, 1, 1)

    def test_a_template_gets_tools_and_its_other_arguments(self, tmp_path: Path) -> None:
        template = CHAT_TEMPLATE + "{{ style }}"
        record = {"messages": say("user: A"), "tools": [WEATHER, WEATHER]}
        rows = load(
            tmp_path,
            record | {"chat_template_kwargs": {"style": "!"}},
            record | {"tools": f"[{{}}]", "chat_template_kwargs": '{"style": "?"}'},  # noqa: F541
            chat_template=template,
        )
        assert "tools: 2<|end|>" in targets_of(rows) and "A<|end|>!" in targets_of(rows)
        assert "tools: 1<|end|>" in targets_of(rows) and "A<|end|>?" in targets_of(rows)

    @pytest.mark.parametrize("content", [{"content": None}, {}])
    @pytest.mark.parametrize(
        "asks",
        ["{% if m.content is none %}", "{% if m['content'] is not none %}{% else %}"],
    )
    def test_a_template_that_knows_calls_of_tools_by_null_gets_it(
        self, tmp_path: Path, content: dict[str, None], asks: str
    ) -> None:
        """As DeepSeek's do, which would write nothing of the call."""
        template = "{% for m in messages %}" + asks + "{{ m.tool_calls }}{% endif %}{% endfor %}"
        calls: dict[str, Any] = {"role": "assistant", "tool_calls": "f()"} | content
        rows = load(tmp_path, {"messages": [calls]}, chat_template=template)
        assert inputs_of(rows) + ")" == "f()"

    def test_another_never_writes_a_null(self, tmp_path: Path) -> None:
        silent = {"role": "assistant", "content": None, "tool_calls": None}
        template = "{% for m in messages %}>{{ m.content }}{{ m.tool_calls }}<|end|>{% endfor %}"
        rows = load(tmp_path, {"messages": [silent]}, chat_template=template)
        assert inputs_of(rows) + END == ">" + END

    def test_a_template_that_asks_for_the_date_gives_the_same_rows_every_day(
        self, tmp_path: Path
    ) -> None:
        template = "{{ strftime_now('%d %b %Y') }} " + CHAT_TEMPLATE
        rows = load(tmp_path, {"messages": say("user: A")}, chat_template=template)
        assert inputs_of(rows).startswith("01 Jan 2025 <|bos|><|turn|>user: A")


class TestRows:
    def test_a_conversation_that_does_not_fit_opens_the_next_row(self, tmp_path: Path) -> None:
        # With BOS and EOS, 5, 5 and 5 tokens; rows of 12 inputs hold two and have 3 left.
        records = [{"prompt": "p", "completion": c * 2} for c in "abc"]
        rows = load(tmp_path, *records, max_length=12)
        batch = rows.batch(range(2))
        assert batch.lengths.tolist() == [9, 4]  # the last token before a break is no input
        assert batch.position_ids[0, :9].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
        assert rows.num_targets.tolist() == [6, 3]
        assert rows.padding == 1 - 13 / 24
        assert (len(rows), rows.num_documents, rows.num_tokens) == (2, 3, 15)

    def test_the_end_of_a_conversation_needs_no_room(self, tmp_path: Path) -> None:
        records = [{"prompt": "p", "completion": c * 2} for c in "abc"]
        rows = load(tmp_path, *records, max_length=9)  # 5 tokens and 4 inputs
        assert rows.batch(range(2)).lengths.tolist() == [9, 4]
        assert rows.num_segments.tolist() == [2, 1]

    @pytest.mark.parametrize("length, kept", [(5, 1), (4, 0)])
    def test_the_limit_is_max_length_tokens(self, tmp_path: Path, length: int, kept: int) -> None:
        records = [{"prompt": "p", "completion": "aa"}, {"prompt": "p", "completion": ""}]
        assert load(tmp_path, *records, max_length=length).num_documents == kept + 1

    @given(
        documents=st.lists(
            st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=9
        ),
        max_length=st.integers(3, 12),
        packing=st.booleans(),
    )
    def test_rows_are_as_defined(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        documents: list[tuple[bool, int, int]],
        max_length: int,
        packing: bool,
    ) -> None:
        """Against a definition that fills rows document by document."""
        texts = [("p" * n, "c" * m) if chat else "t" * (n + m) for chat, n, m in documents]
        records: list[Any] = [
            {"text": t} if isinstance(t, str) else {"prompt": t[0], "completion": t[1]}
            for t in texts
        ]
        records.append({"prompt": "q", "completion": ""})  # of which something is always left
        expected = list(rows_by_definition([*texts, ("q", "")], max_length, packing))
        rows = load(
            tmp_path_factory.mktemp("rows"), *records, max_length=max_length, packing=packing
        )
        batch = rows.batch(range(len(rows)))
        found = [
            (ids[:n].tolist(), labels[:n].tolist(), positions[:n].tolist())
            for ids, labels, positions, n in zip(*batch[:4], strict=True)
        ]
        assert found == expected
        for row, (_, labels, positions) in enumerate(expected):
            starts = sum(position == 0 for position in positions)
            assert rows.counts([row])[:2] == (
                sum(label != IGNORE_INDEX for label in labels),
                len(positions) - starts,
            )
            assert (batch.labels[row, len(labels) :] == IGNORE_INDEX).all()


Row = tuple[list[int], list[int], list[int]]


def rows_by_definition(
    texts: list[str | tuple[str, str]], max_length: int, packing: bool
) -> Iterator[Row]:
    """Inputs, labels and positions of each row, without padding."""
    parts: list[list[tuple[int, int, bool, bool]]] = [[]]  # token, document, learned, first
    for number, text in enumerate(texts):
        prompt, rest = text if isinstance(text, tuple) else ("", text)
        whole = isinstance(text, tuple)
        if not prompt + rest:
            continue  # a document without text
        ids = ids_of([BOS, *prompt, *rest, EOS])
        if whole and len(ids) > max_length:
            continue
        used = len(parts[-1]) % max_length
        full = bool(parts[-1]) and used == 1 and whole_of(texts, parts[-1][-1][1])
        if parts[-1] and (not packing or full or (whole and used + len(ids) - 1 > max_length)):
            parts.append([])
        parts[-1] += [(token, number, i > len(prompt), i == 0) for i, token in enumerate(ids)]
    for part in parts:
        for start in range(0, len(part) - 1, max_length):
            inputs, labels, positions = [], [], []
            for at in range(start, min(start + max_length, len(part) - 1)):
                (token, document, _, first), (target, of, learned, _) = part[at], part[at + 1]
                inputs.append(token)
                labels.append(target if of == document and learned else IGNORE_INDEX)
                positions.append(0 if at == start or first else positions[-1] + 1)
            yield inputs, labels, positions


def whole_of(texts: list[str | tuple[str, str]], number: int) -> bool:
    return isinstance(texts[number], tuple)


class TestLeftOut:
    LONG: ClassVar[dict[str, str]] = {
        "prompt": "0123456789",
        "completion": "abcdefghij",
    }  # 22 tokens

    def test_nothing_is_left_out_in_silence(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        records = [
            self.LONG,
            {"messages": say("user: A", "assistant: ")},
            {"messages": say("system: A")},
            {"messages": say("user: A")},
            {"prompt": "a", "completion": ""},
        ]
        with caplog.at_level(logging.WARNING):
            rows = load(tmp_path, *records, max_length=21, assistant_only_loss=True)
        assert rows.left_out == (
            "2 left out for more than 21 tokens, 2 left out with nothing to learn, "
            "2 with an empty answer"
        )
        for line in (
            "2 documents left out for more than 21 tokens, first chat.jsonl:1",
            "2 documents left out with nothing to learn, first chat.jsonl:3",
            "2 documents with an empty answer, first chat.jsonl:2",
        ):
            assert caplog.messages.count(line) == 1
        assert load(tmp_path, {"text": "a"}).left_out == ""

    @pytest.mark.parametrize(
        "truncation, read, learned",
        [
            ("keep_start", "<|bos|>0123456789a", "ab"),
            ("keep_end", "9abcdefghij", "abcdefghij<|eos|>"),
        ],
    )
    def test_they_are_cut_on_request(
        self, tmp_path: Path, truncation: str, read: str, learned: str
    ) -> None:
        length = {"keep_start": 13, "keep_end": 12}[truncation]
        rows = load(tmp_path, self.LONG, max_length=length, truncation=truncation)
        assert (inputs_of(rows), targets_of(rows)) == (read, learned)
        assert rows.left_out == f"1 cut to {length} tokens"

    def test_a_prompt_that_fills_the_row_leaves_nothing_to_learn(self, tmp_path: Path) -> None:
        with pytest.raises(
            UnfitError,
            match=r"that can be learned from, got 1 left out with nothing to learn, 1 cut to 9",
        ):
            load(tmp_path, self.LONG, max_length=9, truncation="keep_start")

    def test_if_none_is_left_the_reason_is_told(self, tmp_path: Path) -> None:
        with pytest.raises(UnfitError, match="got 1 left out for more than 8 tokens among 1 doc"):
            load(tmp_path, self.LONG, max_length=8)

    @pytest.mark.parametrize(
        ("record", "options", "remedy"),
        [
            (LONG, {"max_length": 8}, "raise max_length, or set data.truncation"),
            (
                LONG,
                {"max_length": 8, "truncation": "keep_start"},
                "raise max_length, or keep the other end in data.truncation",
            ),
            (
                {"messages": say("system: Be kind.")},
                {"assistant_only_loss": True},
                "add what the assistant says, or leave out data.assistant_only_loss",
            ),
            (
                {"prompt": say("user: A"), "completion": []},
                {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"},
                "give each prompt its completion",
            ),
        ],
    )
    def test_and_what_to_do_about_it(
        self, tmp_path: Path, record: Any, options: dict[str, Any], remedy: str
    ) -> None:
        with pytest.raises(UnfitError, match=r"got .* among 1 documents; ") as caught:
            load(tmp_path, record, **options)
        assert str(caught.value).endswith(f"; {remedy}")


ANOTHER_PROMPT = CHAT_TEMPLATE.replace("<|turn|>assistant: ", "<|turn|>bot: ")

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no template": (
        {"messages": say("user: A")},
        {"tokenizer": byte_tokenizer(None)},
        "must have a chat template for records of messages such as chat.jsonl:1, got none; name a "
        "model that has one, .* in data.chat_template_path",
    ),
    "no markers": (
        {"messages": say("user: A")},
        {"chat_template": WITHOUT_MARKERS, "assistant_only_loss": True},
        "must mark what the assistant says with {% generation %} for data.assistant_only_loss, got",
    ),
    "another prompt": (
        {"prompt": say("user: A"), "completion": say("assistant: B")},
        {"chat_template": ANOTHER_PROMPT},
        "chat.jsonl:1 must begin with the tokens of its prompt alone, got 'assistan' where the "
        "prompt alone has 'bot: ';",
    ),
    "a template that objects": (
        {"messages": say("robot: A")},
        {"chat_template": "{{ raise_exception('no robots') }}"},
        "chat.jsonl:1 must fit the chat template, got 'no robots'; correct the record",
    ),
    "a template that is none": (
        {"messages": say("user: A")},
        {"chat_template": "a\n{% if %}"},
        "the chat template must be written in Jinja, got 'Expected an expression.*' in line 2;",
    ),
    "no assistant": (
        {"text": "a"},
        {"assistant_only_loss": True},
        "data.assistant_only_loss must be left out for data without messages, got no such record",
    ),
    "no completion": (
        {"messages": say("user: A")},
        {"completion_only_loss": True},
        "data.completion_only_loss must be left out for data without prompt and completion, got",
    ),
}


class TestRefused:
    @pytest.mark.parametrize("case", REFUSED)
    def test_in_one_line(self, tmp_path: Path, case: str) -> None:
        record, options, message = REFUSED[case]
        with pytest.raises(UnfitError, match=message) as caught:
            load(tmp_path, record, **options)
        assert "\n" not in str(caught.value)

    def test_a_prompt_whose_last_token_goes_on_in_the_completion(self, tmp_path: Path) -> None:
        """Byte by byte none does; of letters that merge the student would see another prompt."""
        from support.tiny import tiny_tokenizer

        with pytest.raises(
            UnfitError, match=r"prompt alone, got 'he' where the prompt alone has 'h'"
        ):
            load(tmp_path, {"prompt": "th", "completion": "e"}, tokenizer=tiny_tokenizer())


class TestTemplates:
    def test_where_a_template_comes_from(self, tmp_path: Path) -> None:
        def template_of(**data: Any) -> object:
            tokenizer = byte_tokenizer()
            set_chat_template(tokenizer, DataConfig(**data))
            return tokenizer.chat_template

        other = tmp_path / "other"
        byte_tokenizer("other").save_pretrained(other)
        (tmp_path / "file.jinja").write_text("file")
        assert template_of() == CHAT_TEMPLATE
        assert template_of(chat_template="inline") == "inline"
        assert template_of(chat_template_path=str(tmp_path / "file.jinja")) == "file"
        assert template_of(chat_template_path=str(other)) == "other"
        (other / "chat_template.jinja").unlink(missing_ok=True)
        byte_tokenizer(None).save_pretrained(other)
        for path, error, message in (
            (other, UnfitError, "must name a tokenizer that has a chat template, got '"),
            (tmp_path / "no.jinja", UsageError, "must name a file that exists, got"),
        ):
            with pytest.raises(error, match=f"data.chat_template_path {message}"):
                template_of(chat_template_path=str(path))
        with pytest.raises(
            SadError, match=r"data\.chat_template must be left out with data.chat_t"
        ):
            DataConfig(chat_template="a", chat_template_path="b")


class OneOf(DocumentSet):
    """The documents of a file."""

    def __init__(self, path: str) -> None:
        self.config = DataConfig(train=(path,))
        self.kinds = frozenset().union(*(document.kind for document in self))

    @property
    def digest(self) -> str:
        return "same"

    def __len__(self) -> int:
        return len(list(self))

    def __iter__(self) -> Iterator[Document]:
        return read_documents(self.config, "train")


class TestFingerprint:
    CHANGES: ClassVar[tuple[dict[str, Any], ...]] = (
        {"completion_only_loss": False},
        {"assistant_only_loss": True},
        {"truncation": "keep_end"},
        {"chat_template": "other"},
        {"add_special_tokens": False},
        {"document_end": "<|end|>"},
    )

    def names(self, documents: DocumentSet, tokenizer: Any = byte_tokenizer) -> list[str]:
        found = []
        for change in ({}, *self.CHANGES):
            config, made = DataConfig(**change), tokenizer()
            set_chat_template(made, config)
            found.append(fingerprint_rows(documents, made, 8, packing=True, config=config))
        return found

    def test_whatever_decides_what_is_learned_is_in_it(self, tmp_path: Path) -> None:
        path = write_records(tmp_path / "a.jsonl", {"messages": say("user: A")})
        names = self.names(OneOf(path))
        assert len(set(names)) == len(names)

    def test_of_texts_only_what_is_put_around_them(self, tmp_path: Path) -> None:
        names = self.names(OneOf(write_records(tmp_path / "a.jsonl", {"text": "A"})))
        assert len(set(names[:5])) == 1
        assert len(set(names)) == 3

    def test_rows_of_texts_that_were_packed_before_keep_their_name(self, tmp_path: Path) -> None:
        """A run that began then goes on: nothing is added to a text without a BOS."""
        from support.tiny import tiny_tokenizer

        from sad.data.packing import _digest
        from sad.data.tokenizers import fingerprint

        tokenizer = tiny_tokenizer()
        documents = OneOf(write_records(tmp_path / "a.jsonl", {"text": "A"}))
        before = _digest(
            format=1,
            documents=documents.digest,
            tokenizer=fingerprint(tokenizer),
            max_length=8,
            packing=True,
        )
        options: Any = {"packing": True, "config": DataConfig()}
        assert fingerprint_rows(documents, tokenizer, 8, **options) == before
