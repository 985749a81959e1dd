"""Reading text: every source, in a fixed order, and one clear line for what cannot be read."""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sad.config.help import field_docs
from sad.config.schema import DataConfig
from sad.data.documents import read_documents
from sad.data.formats import READERS, parquet, txt
from sad.data.formats.base import Document, require_field
from sad.data.split import split_documents
from sad.errors import UnfitError, UsageError


def read(*sources: Path | str, **options: Any) -> list[tuple[str, str]]:
    """Names and texts of all documents of these sources."""
    config = DataConfig(train=tuple(str(source) for source in sources), **options)
    return [(document.name, document.text) for document in read_documents(config, "train")]


def contents(*sources: Path | str, **options: Any) -> list[Any]:
    """The texts, and what is given of the conversations, of all documents of these sources."""
    config = DataConfig(train=tuple(str(source) for source in sources), **options)
    found = [(document.text, document.conversation) for document in read_documents(config, "train")]
    return [
        {key: value for key, value in chat._asdict().items() if value is not None} if chat else text
        for text, chat in found
    ]


def write_jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


class TestTextFiles:
    def test_a_file_is_a_document(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one\n\ntwo\n")
        assert read(tmp_path / "a.txt") == [("a.txt", "one\n\ntwo\n")]

    def test_the_separator_cuts_it_into_documents(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one\n\n\ntwo\n\n\n\n\nthree\n\n")
        # As str.split has it; pieces that are empty or white space are left out, names count them.
        assert read(tmp_path / "a.txt", document_separator="\n\n") == [
            ("a.txt:0", "one"),
            ("a.txt:1", "\ntwo"),
            ("a.txt:3", "\nthree"),
        ]

    @pytest.mark.parametrize("chunk", [1, 2, 3, 5, 8])
    def test_separators_across_reads(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
    ) -> None:
        text = "<><a><b><><c>><<d<><><e"
        (tmp_path / "a.txt").write_text(text)
        monkeypatch.setattr(txt, "CHUNK_CHARS", chunk)
        expected = [piece for piece in text.split("<>") if piece]
        assert [text for _, text in read(tmp_path / "a.txt", document_separator="<>")] == expected

    def test_byte_order_mark_and_line_ends_do_not_matter(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
        assert read(tmp_path / "a.txt") == [("a.txt", "one\ntwo\n")]

    def test_invalid_utf8_names_file_and_line(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"fine\nalso fine\ncaf\xe9 not\n")
        with pytest.raises(
            UnfitError, match=r"a\.txt must be UTF-8 text, got byte 0xe9 in line 3;"
        ):
            read(tmp_path / "a.txt")


class TestJsonLines:
    def test_a_line_is_a_document(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(
            '\ufeff{"text": "é\\u2028"}\r\n\n{"text": "", "n": 1}\n{"text": "b"}'.encode()
        )
        assert read(path) == [("a.jsonl:1", "é\u2028"), ("a.jsonl:4", "b")]

    def test_the_field_has_a_name(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", {"text": "no", "body": "yes"})
        assert read(path, text_field="body") == [("a.jsonl:1", "yes")]

    def test_a_missing_field_names_those_that_are_there(self, tmp_path: Path) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", {"text": "yes"}, {"id": 1, "body": "no"})
        with pytest.raises(
            UnfitError,
            match=r"a\.jsonl, line 2 must have the field 'messages', or 'prompt' and 'completion', "
            r"or 'text', got 'id', 'body'; set data\.text_field",
        ):
            read(path)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (b'{"text": "a"', "line 2 must be valid JSON, got 'Expecting"),
            (b'{"text": "caf\xe9"}', "line 2 must be UTF-8, got byte 0xe9"),
            (b'["a"]', "line 2 must be a JSON object, got list"),
            (b'{"text": null}', "line 2 must hold text in field 'text', got null"),
            (b'{"text": ["a"]}', "line 2 must hold text in field 'text', got list"),
            (b'{"text": "\\ud800"}', "line 2 must be Unicode text, got half of a surrogate pair"),
            (b"[" * 100_000, "line 2 must be valid JSON"),
        ],
    )
    def test_bad_lines_name_file_and_line(self, tmp_path: Path, line: bytes, message: str) -> None:
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b"\n")
        with pytest.raises(UnfitError, match=f"a.jsonl, {message}"):
            read(tmp_path / "a.jsonl")


class TestParquet:
    def test_a_row_is_a_document(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(parquet, "ROWS_PER_READ", 2)  # rows count on across reads
        table = pa.table({"id": [1, 2, 3, 4, 5], "text": ["a", "b", "", "d", "e"]})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
        assert read(tmp_path / "a.parquet") == [
            ("a.parquet:0", "a"),
            ("a.parquet:1", "b"),
            ("a.parquet:3", "d"),
            ("a.parquet:4", "e"),
        ]

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"id": [1], "body": ["a"]}, "or 'text', got 'id', 'body'; set data.text_field"),
            ({"text": ["a", None]}, "row 1 must hold text in field 'text', got null"),
            ({"text": [1]}, "row 0 must hold text in field 'text', got int"),
        ],
    )
    def test_bad_columns(self, tmp_path: Path, columns: dict[str, Any], message: str) -> None:
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        with pytest.raises(UnfitError, match=message):
            read(tmp_path / "a.parquet")

    def test_a_damaged_file_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
        with pytest.raises(UnfitError, match=r"a\.parquet must be a valid Parquet file, got '"):
            read(tmp_path / "a.parquet")

    @pytest.mark.parametrize("field", ["text", "messages"])
    def test_text_that_is_no_utf8_is_named(self, tmp_path: Path, field: str) -> None:
        texts: Any = pa.array([b"fine", b"caf\xe9 not"]).view(pa.string())
        if field == "messages":
            roles = pa.array(["user", "user"])
            turns = pa.StructArray.from_arrays([roles, texts], ["role", "content"])
            texts = pa.ListArray.from_arrays([0, 1, 2], turns)
        pq.write_table(pa.table({field: texts}), tmp_path / "a.parquet")
        with pytest.raises(UnfitError, match=r"a\.parquet must hold UTF-8 text, got byte 0xe9;"):
            read(tmp_path / "a.parquet")

    def test_what_python_has_no_value_for_is_one_line(self, tmp_path: Path) -> None:
        times = pa.array([2**62], type=pa.timestamp("us"))
        pq.write_table(pa.table({"text": times}), tmp_path / "a.parquet")
        with pytest.raises(UnfitError, match=r"a\.parquet must be a valid Parquet file, got '"):
            read(tmp_path / "a.parquet")

    def test_tools_of_many_levels_are_one_line(self, tmp_path: Path) -> None:
        records = {"messages": [HI], "tools": ["[" * 100_000]}
        pq.write_table(pa.table(records), tmp_path / "a.parquet")
        with pytest.raises(UnfitError, match=r"row 0 must hold a list in field 'tools', got str"):
            read(tmp_path / "a.parquet")

    def test_a_missing_extra_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a.parquet").touch()
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(UsageError, match=r"pip install 'student-aware-distillation\[data\]'"):
            read(tmp_path / "a.parquet")


HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


class TestRecords:
    """What a record holds, record by record; the same for every format."""

    def test_a_record_is_read_from_the_first_fields_that_it_has(self, tmp_path: Path) -> None:
        records = [
            {"messages": HI, "prompt": "p", "completion": "c", "text": "t"},
            {"messages": None, "prompt": "p", "completion": "c", "text": "t"},
            {"prompt": "p", "text": "t"},
            {"prompt": HI[:1], "completion": HI[1:], "tools": [], "chat_template_kwargs": None},
            {"messages": HI, "tools": [{"name": "f"}], "chat_template_kwargs": {"a": 1}},
        ]
        path = write_jsonl(tmp_path / "a.jsonl", *records)
        assert contents(path) == [
            {"messages": HI},
            {"prompt": "p", "completion": "c"},
            "t",
            {"prompt": HI[:1], "completion": HI[1:]},
            {"messages": HI, "tools": [{"name": "f"}], "template_kwargs": {"a": 1}},
        ]
        assert contents(write_jsonl(path, *records[:3]), text_field="text") == ["t", "t", "t"]

    def test_empty_conversations_are_left_out_as_empty_texts_are(self, tmp_path: Path) -> None:
        empty = [
            {"messages": []},
            {"prompt": " ", "completion": ""},
            {"prompt": [], "completion": []},
        ]
        path = write_jsonl(tmp_path / "a.jsonl", *empty, {"prompt": "", "completion": "c"})
        assert contents(path) == [{"prompt": "", "completion": "c"}]

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ({"messages": "Hi"}, "hold messages in field 'messages', got str; write a list"),
            ({"messages": ["Hi"]}, "hold messages in field 'messages', got list of str;"),
            (
                {"messages": [{"from": "human", "value": "Hi"}]},
                "have a 'role' in each message, got 'from', 'value' in message 0 of",
            ),
            (
                {"messages": [{"role": 3, "content": "Hi"}]},
                "have a 'role' in each message, got a 'role' that is int in message 0 of",
            ),
            (
                {"prompt": "a", "completion": HI},
                "hold texts or messages in both 'prompt' and 'completion', got str and list;",
            ),
            ({"messages": HI, "tools": "f()"}, "hold a list in field 'tools', got str; write"),
            (
                {"messages": HI, "chat_template_kwargs": [1]},
                "hold an object in field 'chat_template_kwargs', got list;",
            ),
            ({"prompt": "a"}, "or 'text', got 'prompt'; give each prompt its completion"),
            (
                {"conversations": [{"from": "human"}]},
                "got 'conversations'; rename 'conversations', each with 'role' and 'content', to",
            ),
            (
                {"messages": [{"role": "user", "content": "\ud800"}]},
                "be Unicode text, got half of a surrogate pair in field 'messages'",
            ),
        ],
    )
    def test_what_is_no_conversation_is_one_line(
        self, tmp_path: Path, record: dict[str, Any], message: str
    ) -> None:
        path = write_jsonl(tmp_path / "a.jsonl", {"text": "a"}, record)
        with pytest.raises(UnfitError, match=f"a.jsonl, line 2 must .*{message}") as caught:
            read(path)
        assert "\n" not in str(caught.value)

    def test_tables_give_no_message_the_fields_of_another(self, tmp_path: Path) -> None:
        call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
        table = pa.table({"id": [1, 2], "messages": [[HI[0], call], None], "text": [None, "t"]})
        pq.write_table(table, tmp_path / "a.parquet")
        assert contents(tmp_path / "a.parquet") == [{"messages": [HI[0], call]}, "t"]

    def test_the_digest_tells_a_conversation_from_its_json(self, tmp_path: Path) -> None:
        chat = write_jsonl(tmp_path / "a.jsonl", {"messages": HI})
        [document] = read_documents(DataConfig(train=(str(chat),)), "train")
        assert document.conversation is not None
        (tmp_path / "b.txt").write_text(document.conversation.to_json())
        other = write_jsonl(tmp_path / "c.jsonl", {"messages": HI[::-1]})
        digests = {
            split_documents(DataConfig(train=(str(path),), eval=(str(path),)))[0].digest
            for path in (chat, tmp_path / "b.txt", other)
        }
        assert len(digests) == 3


class TestJson:
    @pytest.mark.parametrize(
        "content",
        [
            '[{"text": "a"}, {"text": "é"}]',
            '\ufeff[\n  {"text": "a"},\n  {"text": "é"}\n]\n',
            '{"text": "a"}\n{"text": "é"}\n',
        ],
    )
    def test_a_list_of_records_or_one_per_line(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "a.json").write_text(content, encoding="utf-8")
        assert [text for _, text in read(tmp_path / "a.json")] == ["a", "é"]

    def test_names_count_the_records(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": ""}, {"text": "b"}]')
        assert read(tmp_path / "a.json") == [("a.json:0", "a"), ("a.json:2", "b")]
        (tmp_path / "b.json").write_text('{\n "text": "a"\n}')
        assert read(tmp_path / "b.json") == [("b.json:0", "a")]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("3", "must hold a list of JSON objects, got int; write one object for each"),
            ('{"lr": 1}', "record 0 must have the field 'messages', or .* got 'lr'; set"),
            (
                '[{"text": "a"}, {"lr": 1}]',
                "record 1 must have the field 'messages', or .* got 'lr'",
            ),
            ('[{"text": "a"', "must be valid JSON, got"),
            ('{"text": "a"}\n{"text', "line 2 must be valid JSON, got"),
        ],
    )
    def test_bad_files_are_one_line(self, tmp_path: Path, content: str, message: str) -> None:
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(UnfitError, match=rf"a\.json,? {message}"):
            read(tmp_path / "a.json")

    def test_compressed_lines(self, tmp_path: Path) -> None:
        content = b'{"text": "a"}\n\n{"text": "b"}\n'
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
        assert read(tmp_path / "a.jsonl.gz") == [("a.jsonl.gz:1", "a"), ("a.jsonl.gz:3", "b")]
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content * 999)[:-20])
        with pytest.raises(UnfitError, match=r"a\.jsonl\.gz must be a whole gzip file, got 'C"):
            read(tmp_path / "a.jsonl.gz")
        (tmp_path / "a.jsonl.gz").write_bytes(content)
        with pytest.raises(UnfitError, match=r"a\.jsonl\.gz must be readable, got 'Not a gzip"):
            read(tmp_path / "a.jsonl.gz")


def read_csv(path: Path, name: str, config: DataConfig) -> Iterator[Document]:
    column, *texts = path.read_text().splitlines()
    require_field(config.text_field or "text", [column], str(path))
    yield from (Document(f"{name}:{row}", text) for row, text in enumerate(texts))


class TestFormats:
    def test_a_format_is_a_reader_and_its_suffix(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(READERS, ".csv", read_csv)  # pyright: ignore[reportArgumentType]
        (tmp_path / "a.CSV").write_text("text\none\ntwo\n")
        (tmp_path / "b.txt").write_text("three")
        assert read(tmp_path / "a.CSV") == [("a.CSV:0", "one"), ("a.CSV:1", "two")]
        assert [text for _, text in read(tmp_path)] == ["one", "two", "three"]
        with pytest.raises(UnfitError, match=r"a\.CSV must have the field 'body', got 'text'"):
            read(tmp_path / "a.CSV", text_field="body")
        with pytest.raises(UsageError, match=r"must name text that exists, got absent\.csv"):
            read("absent.csv")

    def test_the_help_of_data_train_names_none_that_is_not_read(self) -> None:
        named = re.findall(r"\.[a-z]+\b", field_docs(DataConfig)["train"])
        assert len(named) >= 3 and set(named) <= set(READERS)


class TestPipes:
    """Opening one would wait for a writer."""

    @pytest.mark.parametrize("suffix", [*READERS])
    def test_a_pipe_is_refused_at_once(self, tmp_path: Path, suffix: str) -> None:
        os.mkfifo(tmp_path / f"a{suffix}")
        with pytest.raises(UsageError, match=r"must name files and folders, got a pipe or a dev"):
            read(tmp_path / f"a{suffix}")

    def test_a_pipe_in_a_folder_is_passed_over(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.txt")
        (tmp_path / "b.txt").write_text("b")
        told: list[str] = []
        documents = read_documents(DataConfig(train=(str(tmp_path),)), "train", told.append)
        assert [document.name for document in documents] == ["b.txt"]
        assert told == [f"data.train: not read in {tmp_path}: a.txt"]

    def test_the_home_of_nobody_is_no_folder(self) -> None:
        with pytest.raises(UsageError, match=r"data\.train must"):
            read("~nobody-of-this-name/x.txt")


class TestRunDirectory:
    """What the run writes is no text of it: a resumed run would read more than it began with."""

    def test_a_folder_is_read_without_the_runs_own_directory(self, tmp_path: Path) -> None:
        run = tmp_path / "runs" / "one"
        for folder in (tmp_path, run, tmp_path / "runs"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "a.txt").write_text(folder.name)
        (run / "log.jsonl").write_text('{"kind": "start"}\n')
        config, told = DataConfig(train=(str(tmp_path),)), list[str]()
        documents = read_documents(config, "train", told.append, run_dir=str(run))
        assert [document.name for document in documents] == ["a.txt", "runs/a.txt"]
        assert told == [f"data.train: not read in {tmp_path}: the run's own directory"]
        train, held_out = split_documents(config, run_dir=str(run))
        assert sorted(document.name for side in (train, held_out) for document in side) == [
            "a.txt",
            "runs/a.txt",
        ]

    def test_a_link_to_it_is_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "text" / "run").mkdir(parents=True)
        (tmp_path / "text" / "a.txt").write_text("a")
        (tmp_path / "text" / "run" / "log.jsonl").write_text('{"kind": "start"}\n')
        (tmp_path / "link").symlink_to("text/run")
        monkeypatch.chdir(tmp_path)
        documents = read_documents(DataConfig(train=("text",)), "train", run_dir="link")
        assert [document.name for document in documents] == ["a.txt"]

    def test_the_directory_itself_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("a")
        config = DataConfig(train=(str(tmp_path),))
        with pytest.raises(UsageError, match=r"must be another folder than output_dir, got '"):
            list(read_documents(config, "train", run_dir=f"{tmp_path}/../{tmp_path.name}"))


class TestFolders:
    def test_odd_names_of_files_are_shown_on_one_line(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("a")
        (tmp_path / "b\n\x1b[31m.md").write_text("b")
        told: list[str] = []
        list(read_documents(DataConfig(train=(str(tmp_path),)), "train", told.append))
        assert told == [rf"data.train: not read in {tmp_path}: b\n\x1b[31m.md"]

    def test_files_sort_by_path_and_only_text_is_read(self, tmp_path: Path) -> None:
        for name in ("b.txt", "a/z.txt", "a/y/x.TXT", "a.md", ".hidden.txt", ".git/c.txt"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(name)
        write_jsonl(tmp_path / "a" / "w.jsonl", {"text": "w"})
        names = [name for name, _ in read(tmp_path)]
        assert names == ["a/w.jsonl:1", "a/y/x.TXT", "a/z.txt", "b.txt"]

    def test_the_order_of_directory_listings_does_not_matter(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("b/2.txt", "a/1.txt", "a/3.txt", "c.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(name)
        before, walk = read(tmp_path), os.walk

        def backwards(*args: Any, **kwargs: Any) -> Any:
            for parent, folders, files in walk(*args, **kwargs):
                folders.sort(reverse=True)
                yield parent, folders, sorted(files, reverse=True)

        monkeypatch.setattr(os, "walk", backwards)
        assert read(tmp_path) == before

    def test_sources_come_in_the_order_given_under_distinct_names(self, tmp_path: Path) -> None:
        for folder in ("b", "a"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "x.txt").write_text(folder)
        assert read(tmp_path / "b", tmp_path / "a") == [("x.txt", "b"), ("1:x.txt", "a")]

    def test_names_do_not_tell_where_the_folder_lies(self, tmp_path: Path) -> None:
        for folder in ("here", "there"):
            (tmp_path / folder / "sub").mkdir(parents=True)
            (tmp_path / folder / "sub" / "x.txt").write_text("text")
        assert read(tmp_path / "here") == read(tmp_path / "there") == [("sub/x.txt", "text")]

    def test_files_that_are_not_read_are_named(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Once in a run, which reads every file twice."""
        for name in ("a.txt", "sub/b.csv", "README.md", ".hidden"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("text")
        (tmp_path / "settings.json").write_text('{"lr": 1}')
        with caplog.at_level(logging.WARNING):
            train, held_out = split_documents(
                DataConfig(train=(str(tmp_path),), eval=(str(tmp_path / "a.txt"),))
            )
            assert [document.name for side in (train, held_out) for document in side] == [
                "a.txt"
            ] * 2
        line = f"data.train: not read in {tmp_path}: README.md, settings.json, sub/b.csv"
        assert caplog.messages == [line]

    def test_a_folder_without_text_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.md").write_text("text")
        with pytest.raises(UnfitError, match=r"folders with \.txt, .* files of text, got a\.md in"):
            read(tmp_path)


class TestBadSources:
    def test_no_source(self) -> None:
        with pytest.raises(
            UsageError, match=r"data\.train must name the text to read, got nothing"
        ):
            read()

    @pytest.mark.parametrize("source", ["absent.txt", "./absent", "/absent/folder", "a/b/c", "x/"])
    def test_missing_files_are_not_looked_for_on_the_hub(
        self, source: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(UsageError, match=f"must name text that exists, got {source}; no such"):
            read(source)

    def test_other_kinds_of_files(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("a,b\n")
        with pytest.raises(
            UsageError, match=r"must name \.txt, .*\.parquet files, got .*a\.csv; convert"
        ):
            read(tmp_path / "a.csv")

    def test_unreadable_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.txt").write_text("text")

        def denied(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")  # root may read whatever its mode is

        monkeypatch.setattr(Path, "open", denied)
        with pytest.raises(UnfitError, match=r"a\.txt must be readable, got 'Permission denied'"):
            read(tmp_path / "a.txt")


class TestDatasets:
    def test_records_are_documents(self, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")
        asked: list[object] = []

        def load_dataset(name: str, config: str | None, *, split: str) -> Any:
            asked.append((name, config, split))
            return datasets.Dataset.from_dict({"id": [1, 2, 3], "body": ["a", " ", "c"]})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        options = {"text_field": "body", "dataset_config": "en", "dataset_split": "validation"}
        assert read("owner/name", **options) == [("owner/name:0", "a"), ("owner/name:2", "c")]
        assert asked == [("owner/name", "en", "validation")]
        with pytest.raises(UnfitError, match="or 'text', got 'id', 'body'"):
            read("owner/name")

    def test_real_records_of_every_kind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A folder as it lies on the Hub, read by `datasets` itself."""
        datasets = pytest.importorskip("datasets")
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        folder = tmp_path / "data"
        folder.mkdir()
        call = {"role": "assistant", "tool_calls": [{"name": "f"}]}
        write_jsonl(
            folder / "train.jsonl", {"messages": HI, "id": 1}, {"messages": [call], "id": 2}
        )
        write_jsonl(folder / "validation.jsonl", {"messages": HI[:1], "id": 3})
        load_dataset = datasets.load_dataset

        def from_folder(name: str, *args: Any, **options: Any) -> Any:
            assert name == "owner/chats"
            return load_dataset(str(folder), *args, **options)

        monkeypatch.setattr(datasets, "load_dataset", from_folder)
        assert contents("owner/chats") == [{"messages": HI}, {"messages": [call]}]
        assert contents("owner/chats", dataset_split="validation") == [{"messages": HI[:1]}]
        assert [name for name, _ in read("owner/chats")] == ["owner/chats:0", "owner/chats:1"]

    def test_training_and_held_out_text_come_from_different_splits(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One name serves both, or the student would be scored on what it was trained on."""
        datasets = pytest.importorskip("datasets")

        def load_dataset(name: str, config: str | None, *, split: str) -> Any:
            if split not in ("train", "validation"):
                raise ValueError(f"Unknown split {split!r}")
            return datasets.Dataset.from_dict({"text": [split]})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        config = DataConfig(train=("owner/name",), eval=("owner/name",))
        assert [d.text for d in read_documents(config, "train")] == ["train"]
        assert [d.text for d in read_documents(config, "eval")] == ["validation"]
        other = replace(config, dataset_eval_split="test")
        with pytest.raises(UsageError, match=r"Unknown split 'test'.* data\.dataset_eval_split"):
            list(read_documents(other, "eval"))

    def test_an_unreachable_hub_is_one_clear_line(self) -> None:
        pytest.importorskip("datasets")
        with pytest.raises(
            UsageError, match="data set that can be loaded, got 'absent/absent'"
        ) as e:
            read("absent/absent")
        assert "\n" not in str(e.value)

    def test_a_missing_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(
            UsageError, match=r"datasets must be installed unless 'corpus' is a file"
        ):
            read("corpus")


class TestStandardLibrary:
    def test_library_source_without_tests_and_without_this_machine(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        skipped = (
            "test/a.py",
            "unittest/test/a.py",
            "idlelib/idle_test/a.py",
            "lib2to3/tests/a.py",
            "site-packages/a.py",
            "dist-packages/a.py",
            "__pycache__/a.py",
            "config-3.11-x86_64-linux-gnu/a.py",
            "_sysconfigdata__linux_.py",
            "lib.txt",
        )
        for name in (*skipped, "os.py", "json/decoder.py", "unittest/case.py", "latin.py"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"# {name}\r\n", newline="")
        (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
        monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
        assert read("python-stdlib") == [
            ("json/decoder.py", "# json/decoder.py\n"),
            ("os.py", "# os.py\n"),
            ("unittest/case.py", "# unittest/case.py\n"),
        ]

    def test_functions_ask_with_their_docstrings(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = '''
@decorated
def one(x):
    """Add one."""
    return x + 1


class A:
    async def two(self):
        """Say nothing.

        At all.
        """

        if self:
            return 2

    def no_docstring(self):
        return 3

    def no_body(self):
        """Nothing follows."""

    def one_line(self): """Doc."""; return 4
'''
        (tmp_path / "a.py").write_text(source)
        (tmp_path / "broken.py").write_text('def f(:\n    """Doc."""\n    return')
        monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tmp_path)}.__getitem__)
        assert contents("python-stdlib-functions") == [
            {"prompt": 'def one(x):\n    """Add one."""', "completion": "\n    return x + 1"},
            {
                "prompt": 'async def two(self):\n    """Say nothing.\n\n    At all.\n    """',
                "completion": "\n\n    if self:\n        return 2",
            },
        ]
        assert {name for name, _ in read("python-stdlib-functions")} == {"a.py"}

    def test_the_running_interpreter(self) -> None:
        texts = dict(read("python-stdlib"))
        assert "class ArgumentParser" in texts["argparse.py"]
        assert "asyncio/base_events.py" in texts
        assert sum(map(len, texts.values())) > 5_000_000
