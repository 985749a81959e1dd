"""Rows: what is packed, what is cached, and in which order it is read."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.layouts import total
from support.tiny import tiny_tokenizer, write_texts
from tokenizers.normalizers import Replace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from sad.config.schema import DataConfig, DistillConfig
from sad.data import forecast, packing, parallel
from sad.data import rows as data
from sad.data.batch import IGNORE_INDEX, Batch
from sad.data.documents import Document
from sad.data.rows import PackedRows, epoch_permutation, load_rows, pack_documents
from sad.data.split import DocumentSet
from sad.errors import OutputError, UnfitError

EOS = 0


class Texts(DocumentSet):
    """Documents that are in memory already."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    @property
    def digest(self) -> str:
        return json.dumps(self.texts)

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[Document]:
        return (Document(str(i), text) for i, text in enumerate(self.texts))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def pack(
    cache: Path,
    *texts: str,
    max_length: int = 8,
    packed: bool = True,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **data: Any,
) -> PackedRows:
    return pack_documents(
        Texts(*texts),
        tokenizer or tiny_tokenizer(),
        max_length=max_length,
        packing=packed,
        cache_dir=cache,
        config=DataConfig(**data),
    )


def stream_of(rows: PackedRows) -> np.ndarray:
    """The tokens of all documents, in order."""
    return rows._tokens[np.arange(rows.num_tokens)]


def everything(rows: PackedRows) -> Batch:
    return rows.batch(range(len(rows)))


def ids_of(text: str) -> list[int]:
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]  # pyright: ignore


def same_rows(a: PackedRows, b: PackedRows) -> bool:
    one, two = everything(a), everything(b)
    return all(torch.equal(x, y) for x, y in zip(one[:3], two[:3], strict=True)) and (
        a.target_bytes.tolist() == b.target_bytes.tolist()
    )


class TestRows:
    def test_packed_rows_by_hand(self, cache: Path) -> None:
        rows = pack(cache, "ZQX", "JK", "W", max_length=4)
        a, b, c, d, e, f = ids_of("ZQXJKW")  # no two of these letters merge
        batch = everything(rows)
        ignore = IGNORE_INDEX
        # The stream is a b c EOS d e EOS f EOS, nine tokens: eight inputs, two rows.
        assert batch.input_ids.tolist() == [[a, b, c, EOS], [d, e, EOS, f]]
        assert batch.labels.tolist() == [[b, c, EOS, ignore], [e, EOS, ignore, EOS]]
        assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]
        assert rows.num_targets.tolist() == [3, 3]
        assert rows.target_bytes.tolist() == [2, 1]  # b c, e: end-of-text tokens have no text
        assert (batch.num_targets, batch.target_bytes) == (6, 3)
        assert (rows.num_documents, rows.num_tokens) == (3, 9)
        assert rows.max_token_id == max(a, b, c, d, e, f)

    def test_a_cut_loses_no_target_and_starts_positions_again(self, cache: Path) -> None:
        batch = everything(pack(cache, "ZQXJKW", max_length=3))
        a, b, c, d, e, f = ids_of("ZQXJKW")
        assert batch.input_ids.tolist() == [[a, b, c], [d, e, f]]
        assert batch.labels.tolist() == [[b, c, d], [e, f, EOS]]
        assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]

    def test_only_the_last_row_is_padded(self, cache: Path) -> None:
        batch = everything(pack(cache, "ZQXJKW", max_length=4))
        assert batch.labels[0].min() >= 0
        assert batch.labels[1].tolist() == [*ids_of("W"), EOS, IGNORE_INDEX, IGNORE_INDEX]
        assert batch.position_ids[1].tolist() == [0, 1, 2, 3]

    def test_one_document_per_row_by_hand(self, cache: Path) -> None:
        rows = pack(cache, "ZQXJ", "K", max_length=3, packed=False)
        a, b, c, d, e = ids_of("ZQXJK")
        batch, ignore = everything(rows), IGNORE_INDEX
        assert batch.labels.tolist() == [[b, c, d], [EOS, ignore, ignore], [EOS, ignore, ignore]]
        assert batch.input_ids[:, 0].tolist() == [a, d, e]
        assert batch.input_ids[0].tolist() == [a, b, c]
        # No restart inside a row, or transformers would take padding for a second document.
        assert batch.position_ids.tolist() == [[0, 1, 2]] * 3
        assert rows.num_targets.tolist() == [3, 1, 1]
        assert rows.target_bytes.tolist() == [3, 0, 0]

    def test_a_batch_holds_the_rows_asked_for_in_their_order(self, cache: Path) -> None:
        rows = pack(cache, "the quick brown fox jumps", "over the lazy dog", max_length=3)
        whole, some = everything(rows), rows.batch(np.array([3, 0, 3]))
        for part, of in zip(some[:3], whole[:3], strict=True):
            assert torch.equal(part, of[[3, 0, 3]])
            assert part.dtype == torch.int64
        assert some.num_targets == rows.num_targets[[3, 0, 3]].sum()
        assert some.target_bytes == rows.target_bytes[[3, 0, 3]].sum()

    def test_a_batch_moves_between_devices(self, cache: Path) -> None:
        batch = pack(cache, "abc").batch([0]).to(torch.device("meta"))
        assert {tensor.device.type for tensor in batch[:3]} == {"meta"}
        assert batch.num_targets == 3


# Letters that merge and letters that do not, two to four bytes in UTF-8, and text that the
# tokenizer takes for its end-of-text token.
ALPHABET = ["a", "t", "the", " ", "  ", "\n", "é", "日", "😀", "<|endoftext|>", "return"]
texts = st.lists(
    st.lists(st.sampled_from(ALPHABET), min_size=1, max_size=12).map("".join),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("packed", [True, False])
class TestAnyRows:
    """Against a definition that walks over the tokens one by one."""

    @given(texts=texts, max_length=st.integers(1, 9))
    def test_rows_are_as_defined(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        packed: bool,
        texts: list[str],
        max_length: int,
    ) -> None:
        cache = tmp_path_factory.mktemp("cache")
        rows = pack(cache, *texts, max_length=max_length, packed=packed)
        batch = everything(rows)
        expected = list(rows_by_definition(texts, max_length, packed))
        assert len(rows) == len(expected)
        for row, (inputs, labels, positions) in enumerate(expected):
            n = len(inputs)
            assert batch.input_ids[row, :n].tolist() == inputs
            assert batch.labels[row, :n].tolist() == labels
            assert batch.position_ids[row, :n].tolist() == positions
            assert set(batch.labels[row, n:].tolist()) <= {IGNORE_INDEX}
            assert batch.position_ids[row].max() < max_length
            assert rows.num_targets[row] == (batch.labels[row] != IGNORE_INDEX).sum()

            assert batch.lengths[row] == n
            sizes = segment_sizes(positions)
            counts = rows.counts([row])
            assert counts == (
                rows.num_targets[row],
                sum(size - 1 for size in sizes),
                sum(size > 1 for size in sizes),
                len(sizes),
            )
        assert batch.counts == total(rows.counts([row]) for row in range(len(rows)))

    @given(texts=texts, max_length=st.integers(1, 9))
    def test_every_token_but_the_first_of_a_document_is_a_target_once(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        packed: bool,
        texts: list[str],
        max_length: int,
    ) -> None:
        cache = tmp_path_factory.mktemp("cache")
        labels = everything(pack(cache, *texts, max_length=max_length, packed=packed)).labels
        targets = labels[labels != IGNORE_INDEX].tolist()
        assert targets == [token for text in texts for token in [*ids_of(text), EOS][1:]]

    @given(texts=texts, max_length=st.integers(1, 9))
    def test_every_byte_counts_once(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        packed: bool,
        texts: list[str],
        max_length: int,
    ) -> None:
        cache = tmp_path_factory.mktemp("cache")
        rows = pack(cache, *texts, max_length=max_length, packed=packed)
        of_first_tokens = 0
        for text in texts:
            offsets = tiny_tokenizer()(text, return_offsets_mapping=True)["offset_mapping"]
            of_first_tokens += len(text[: offsets[0][1]].encode())  # pyright: ignore
        assert rows.target_bytes.sum() == len("".join(texts).encode()) - of_first_tokens

    @given(
        texts=st.lists(st.text("at e,\n", min_size=1, max_size=20), min_size=1, max_size=5),
        max_length=st.integers(1, 9),
    )
    def test_bytes_of_each_row(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        packed: bool,
        texts: list[str],
        max_length: int,
    ) -> None:
        """In ASCII, a byte-level token is as long as the bytes it stands for."""
        cache = tmp_path_factory.mktemp("cache")
        rows = pack(cache, *texts, max_length=max_length, packed=packed)
        for row in range(len(rows)):
            labels = rows.batch([row]).labels
            targets = labels[labels > EOS].tolist()
            tokens = tiny_tokenizer().convert_ids_to_tokens(targets)
            assert rows.target_bytes[row] == sum(map(len, tokens))


def segment_sizes(positions: list[int]) -> list[int]:
    """Lengths of the runs that begin at position 0."""
    starts = [i for i, position in enumerate(positions) if position == 0]
    return [end - start for start, end in zip(starts, [*starts[1:], len(positions)], strict=True)]


def rows_by_definition(
    texts: list[str], max_length: int, packed: bool
) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Inputs, labels and positions of each row, without padding."""
    documents = [[*ids_of(text), EOS] for text in texts]
    streams = [documents] if packed else [[document] for document in documents]
    for stream in streams:
        tokens = [(token, d) for d, document in enumerate(stream) for token in document]
        for start in range(0, len(tokens) - 1, max_length):
            inputs, labels, positions = [], [], []
            for at in range(start, min(start + max_length, len(tokens) - 1)):
                (token, document), (target, of) = tokens[at], tokens[at + 1]
                inputs.append(token)
                labels.append(target if of == document else IGNORE_INDEX)
                starts_part = at == start or tokens[at - 1][1] != document
                positions.append(0 if starts_part else positions[-1] + 1)
            yield inputs, labels, positions


class TestBytes:
    def test_byte_tokens_of_one_character_count_it_once(self) -> None:
        # "é" as two byte tokens, "😀" as four: all offsets of a character are equal.
        offsets = [(0, 1), (1, 2), (1, 2), (2, 3), (2, 3), (2, 3), (2, 3), (3, 4)]
        assert packing._utf8_bytes("aé😀b", offsets).tolist() == [1, 2, 0, 4, 0, 0, 0, 1]

    def test_characters_that_no_token_covers_count_too(self) -> None:
        assert packing._utf8_bytes(" é  b\n", [(1, 2), (4, 5)]).tolist() == [3, 4]

    def test_offsets_that_step_back_count_nothing_twice(self) -> None:
        assert packing._utf8_bytes("abcd", [(0, 3), (1, 2), (3, 4)]).tolist() == [3, 0, 1]

    def test_no_token_has_no_bytes(self) -> None:
        assert packing._utf8_bytes("a", []).tolist() == []


EOS_TOKEN = "<|endoftext|>"


def with_special_tokens(template: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, which now puts ``!``, ``?`` or the end of text around a text."""
    tokenizer = tiny_tokenizer()
    known = [(token, ids_of(token)[0]) for token in ("!", "?", EOS_TOKEN)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # pyright: ignore
        single=template, special_tokens=known
    )
    return tokenizer


class TestTokenising:
    def test_long_documents_are_tokenised_in_pieces(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The memory of packing does not grow with a document, nor with their number."""
        texts = ["one two\nthree\n" * 9, "x" * 70, "short", *["y\n"] * 50]
        limit = 32
        sizes = []
        tokenize = packing.tokenize_batch

        def spy(pieces: list[Any], *args: Any) -> Any:
            sizes.append(sum(len(piece.text) for piece in pieces))
            return tokenize(pieces, *args)

        whole = pack(cache / "whole", *texts)
        monkeypatch.setattr(packing, "_BATCH_CHARS", limit)
        monkeypatch.setattr(packing, "tokenize_batch", spy)
        pieces = pack(cache / "pieces", *texts)
        assert max(sizes) < 2 * limit
        assert sum(sizes) == sum(map(len, texts))
        # No two letters x merge, and a line end never merges with what follows: nothing changes.
        assert same_rows(whole, pieces)

    def test_settings_left_behind_in_the_tokenizer_do_not_matter(self, cache: Path) -> None:
        used = tiny_tokenizer()
        used(["a", "b c d e f"], padding=True, truncation=True, max_length=3)
        text = "the quick brown fox " * 20
        rows = pack(cache / "used", text, tokenizer=used)
        fresh = pack(cache / "fresh", text)
        assert rows.fingerprint == fresh.fingerprint
        assert same_rows(rows, fresh)

    def test_a_text_begins_as_the_tokenizer_begins_it(self, cache: Path) -> None:
        """Models that were trained with a BOS, such as Gemma, are useless without it."""
        batch = everything(pack(cache, "ZQ", "J", tokenizer=with_special_tokens("! $A")))
        bos, z, q, j = ids_of("!ZQJ")
        assert with_special_tokens("! $A")("ZQ")["input_ids"] == [bos, z, q]
        assert batch.input_ids[0, :6].tolist() == [bos, z, q, EOS, bos, j]
        # The first token of the text is a target now, BOS is none.
        ignore = IGNORE_INDEX
        assert batch.labels[0].tolist() == [z, q, EOS, ignore, j, EOS, ignore, ignore]
        assert (batch.num_targets, batch.target_bytes) == (5, 3)

    def test_a_key_turns_special_tokens_off(self, cache: Path) -> None:
        tokenizer = with_special_tokens("! $A ?")
        without = pack(cache, "Z", tokenizer=tokenizer, add_special_tokens=False)
        assert same_rows(without, pack(cache, "Z"))
        assert without.fingerprint != pack(cache, "Z", tokenizer=tokenizer).fingerprint

    def test_no_token_before_the_text_is_a_target(self, cache: Path) -> None:
        rows = pack(cache, "ZQ", "J", max_length=16, tokenizer=with_special_tokens("! ? $A"))
        labels = everything(rows).labels
        z, q, j = ids_of("ZQJ")
        assert labels[labels != IGNORE_INDEX].tolist() == [z, q, EOS, j, EOS]
        assert rows.num_targets.tolist() == [5]

    @pytest.mark.parametrize("end, twice", [(EOS_TOKEN, 1), ("?", 2)])
    def test_an_end_that_the_tokenizer_adds_is_not_added_twice(
        self, cache: Path, end: str, twice: int
    ) -> None:
        tokenizer = with_special_tokens(f"$A {end}")
        rows = pack(cache, "ZQ", f"Z{EOS_TOKEN}", max_length=16, tokenizer=tokenizer)
        z, q = ids_of("ZQ")
        ends = [*ids_of("?"), EOS] if twice == 2 else [EOS]
        # What stands in the text itself is text.
        assert stream_of(rows).tolist() == [z, q, *ends, z, EOS, *ends]
        assert rows.end_tokens == [EOS]

    def test_another_token_may_end_a_text(self, cache: Path) -> None:
        """The end of a turn, which a chat model's eos is, is not what its teacher expects there."""
        rows = pack(cache, "ZQ", document_end="!")
        assert everything(rows).labels[0, :2].tolist() == ids_of("Q!")
        assert rows.end_tokens == ids_of("!")
        assert rows.fingerprint != pack(cache, "ZQ").fingerprint
        with pytest.raises(
            UnfitError, match=r"data\.document_end must be a token of the tokenizer, got '<\|no"
        ):
            pack(cache, "ZQ", document_end="<|no|>")

    def test_special_tokens_stand_around_a_long_text_once(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tokenizer = with_special_tokens("! $A ?")
        whole = pack(cache / "whole", "Z\nQ\nJ\n", tokenizer=tokenizer)
        monkeypatch.setattr(packing, "_BATCH_CHARS", 2)
        assert same_rows(whole, pack(cache / "pieces", "Z\nQ\nJ\n", tokenizer=tokenizer))
        assert (stream_of(whole) == ids_of("!")[0]).sum() == 1

    def test_documents_without_tokens_are_left_out(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def drop_b(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
            tokenizer.backend_tokenizer.normalizer = Replace("b", "")  # pyright: ignore
            return tokenizer

        rows = pack(cache, "a", "b", "c", tokenizer=drop_b(tiny_tokenizer()))
        assert rows.num_documents == 2
        with pytest.raises(UnfitError, match="got no token from 2 documents"):
            pack(cache, "b", "bb", tokenizer=drop_b(tiny_tokenizer()))

    def test_a_tokenizer_without_end_of_text_is_refused(self, cache: Path) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = None  # pyright: ignore
        with pytest.raises(UnfitError, match="must have an end-of-text token, got none"):
            pack(cache, "a", tokenizer=tokenizer)
        assert pack(cache, "a", tokenizer=tokenizer, document_end="!").num_tokens == 2

    def test_ids_are_stored_in_16_bits_where_they_fit(self, cache: Path) -> None:
        tokenizer = tiny_tokenizer()
        small = pack(cache, "a<|late|>b", tokenizer=tokenizer)
        tokenizer.add_tokens([f"<{n}>" for n in range(70_000)] + ["<|late|>"])
        large = pack(cache, "a<|late|>b", tokenizer=tokenizer)
        assert (cache / f"rows-{small.fingerprint}" / "tokens.bin").stat().st_size == (
            small.num_tokens * 2
        )
        assert everything(large).labels[0, 0] == large.max_token_id == 70_512


class TestCache:
    TEXTS = ("the quick brown fox", "jumps over", "a lazy dog, naïve 日本")

    def test_rows_are_packed_once(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = pack(cache, *self.TEXTS)
        monkeypatch.delattr(data, "write_rows")
        assert same_rows(first, pack(cache, *self.TEXTS))

    def test_whatever_decides_the_rows_is_in_the_fingerprint(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other_eos = tiny_tokenizer()
        other_eos.eos_token = "!"
        fingerprints = [
            pack(cache, *self.TEXTS).fingerprint,
            pack(cache, *reversed(self.TEXTS)).fingerprint,
            pack(cache, *self.TEXTS, max_length=7).fingerprint,
            pack(cache, *self.TEXTS, packed=False).fingerprint,
            pack(cache, *self.TEXTS, tokenizer=tiny_tokenizer(500)).fingerprint,
            pack(cache, *self.TEXTS, tokenizer=other_eos).fingerprint,
        ]
        monkeypatch.setattr(packing, "FORMAT", packing.FORMAT + 1)
        fingerprints.append(pack(cache, *self.TEXTS).fingerprint)
        assert len(set(fingerprints)) == 7

    @pytest.mark.parametrize(
        "name", ["index.json", "tokens.bin", "documents.bin", "target_bytes.bin"]
    )
    @pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
    def test_damage_is_noticed_and_repaired(
        self, cache: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        intact = pack(cache, *self.TEXTS)
        expected, fingerprint = everything(intact), intact.fingerprint
        del intact
        path = cache / f"rows-{fingerprint}" / name
        content = path.read_bytes()
        if damage == "delete":
            path.unlink()
        elif damage == "truncate":
            path.write_bytes(content[: len(content) // 2])
        else:
            middle = len(content) // 2
            path.write_bytes(
                content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            )
        with caplog.at_level(logging.WARNING):
            rows = pack(cache, *self.TEXTS)
        assert "packed rows are damaged and made again" in caplog.text
        assert all(
            torch.equal(x, y) for x, y in zip(everything(rows)[:3], expected[:3], strict=True)
        )
        assert path.read_bytes() == content

    @pytest.mark.parametrize(
        "change",
        [
            {"max_length": 9},
            {"packing": False},
            {"token_dtype": "<i4"},
            {"max_token_id": 5},
            {"files": {}},
        ],
    )
    def test_a_changed_index_is_noticed(self, cache: Path, change: dict[str, Any]) -> None:
        rows = pack(cache, *self.TEXTS)
        path = cache / f"rows-{rows.fingerprint}" / "index.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        assert same_rows(rows, pack(cache, *self.TEXTS))
        assert json.loads(path.read_text())["max_length"] == 8

    @pytest.mark.parametrize("index", ["", "[]", "{}", "null"])
    def test_an_index_that_is_none_is_noticed(self, cache: Path, index: str) -> None:
        rows = pack(cache, *self.TEXTS)
        (cache / f"rows-{rows.fingerprint}" / "index.json").write_text(index)
        assert same_rows(rows, pack(cache, *self.TEXTS))

    @pytest.mark.parametrize("change", ["flip", "swap", "truncate", "empty", "grow and flip"])
    def test_rows_that_change_while_they_are_read_are_noticed(
        self, cache: Path, change: str
    ) -> None:
        """A memory map showed whatever was written, and ended the process where it was cut."""
        rows = pack(cache, *self.TEXTS * 2000)
        path = cache / f"rows-{rows.fingerprint}" / "tokens.bin"
        content = path.read_bytes()
        assert len(content) > 3 << 14  # several blocks
        middle = len(content) // 2
        with path.open("r+b") as file:
            if change in ("truncate", "empty"):
                file.truncate(middle if change == "truncate" else 0)
            elif change == "swap":  # the same bytes in another order
                file.write(content[::-1])
            else:
                file.seek(middle)
                file.write(bytes([content[middle] ^ 1]))
            if change.startswith("grow"):
                file.seek(0, os.SEEK_END)
                file.write(content)
        with pytest.raises(UnfitError, match=r"packed rows must stay as they are .*tokens\.bin"):
            everything(rows)
        if change == "flip":  # what lies elsewhere is as it was
            rows.batch([0, len(rows) - 1])

    def test_rows_that_are_replaced_are_read_as_they_were(self, cache: Path) -> None:
        rows = pack(cache, *self.TEXTS)
        expected = everything(rows)
        folder = cache / f"rows-{rows.fingerprint}"
        (cache / "other").write_bytes(bytes(1000))
        (cache / "other").rename(folder / "tokens.bin")
        assert torch.equal(everything(rows).input_ids, expected.input_ids)
        shutil.rmtree(folder)
        assert torch.equal(everything(rows).input_ids, expected.input_ids)

    @pytest.mark.parametrize("max_length", [3, 1000, 20_000])
    def test_tokens_come_from_every_block(self, cache: Path, max_length: int) -> None:
        rows = pack(cache, *self.TEXTS * 2000, max_length=max_length)
        stream = np.fromfile(cache / f"rows-{rows.fingerprint}" / "tokens.bin", dtype="<u2")
        at = np.arange(len(stream))
        assert np.array_equal(rows._tokens[at], stream)
        assert np.array_equal(rows._tokens[at[::-1, None]], stream[::-1, None])
        batch = rows.batch(list(reversed(range(len(rows)))))
        inputs = [row[:n] for row, n in zip(batch.input_ids, batch.lengths, strict=True)]
        assert torch.equal(torch.cat(inputs[::-1]), torch.from_numpy(stream[:-1].astype(np.int64)))

    def test_a_process_that_was_faster_wins(
        self, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_rows = packing.write_rows

        def write_twice(folder: Path, name: str, *args: Any, **kwargs: Any) -> None:
            write_rows(folder, name, *args, **kwargs)
            shutil.copytree(folder, cache / f"rows-{name}")

        alone = pack(tmp_path / "other", *self.TEXTS)
        monkeypatch.setattr(data, "write_rows", write_twice)
        rows = pack(cache, *self.TEXTS)
        assert same_rows(rows, alone)
        assert [path.name for path in cache.iterdir()] == [f"rows-{rows.fingerprint}"]

    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_failed_writes_leave_nothing_that_looks_finished(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        write_rows = packing.write_rows

        def full_disk(*args: Any, **kwargs: Any) -> None:
            if moment == "after":
                write_rows(*args, **kwargs)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(data, "write_rows", full_disk)
        with pytest.raises(OutputError, match=r"data\.cache_dir must be writable, got ENOSPC"):
            pack(cache, *self.TEXTS)
        assert list(cache.iterdir()) == []

    def test_an_unwritable_cache_is_one_clear_line(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(
            OutputError, match=r"data\.cache_dir must be writable, got ENOTDIR"
        ) as e:
            pack(tmp_path / "file" / "cache", *self.TEXTS)
        assert e.value.exit_code == 73

    def test_bad_text_leaves_nothing_behind(self, cache: Path) -> None:
        class Bad(Texts):
            def __iter__(self) -> Iterator[Document]:
                yield Document("good", "good")
                raise UnfitError("bad")

        with pytest.raises(UnfitError, match="bad"):
            pack_documents(Bad(), tiny_tokenizer(), max_length=8, packing=True, cache_dir=cache)
        assert list(cache.iterdir()) == []

    def test_leftovers_of_killed_processes_go_after_a_week(self, cache: Path) -> None:
        old, new = cache / ".tmp-rows-old", cache / ".tmp-rows-new"
        for path in (old, new):
            path.mkdir(parents=True)
        eight_days_ago = time.time() - 8 * 86_400
        os.utime(old, (eight_days_ago, eight_days_ago))
        pack(cache, *self.TEXTS)
        assert (old.exists(), new.exists()) == (False, True)

    def test_leftovers_that_vanish_meanwhile_do_no_harm(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Path, "glob", lambda *_: [cache / ".tmp-rows-published-just-now"])
        assert len(pack(cache, *self.TEXTS)) > 0


class TestLoadRows:
    def test_both_sides_of_a_folder(self, tmp_path: Path) -> None:
        folder = write_texts(tmp_path / "texts", count=20)
        config = DistillConfig(
            student="s",
            kd_weight=0.0,
            data=DataConfig(train=(folder,), eval_fraction=0.3, cache_dir=str(tmp_path / "cache")),
            max_length=16,
            packing=False,
        )
        train, held_out = load_rows(config, tiny_tokenizer())
        assert (train.num_documents + held_out.num_documents, train.max_length) == (20, 16)
        assert min(train.num_documents, held_out.num_documents) > 1
        assert train.fingerprint != held_out.fingerprint
        assert (everything(train).position_ids == torch.arange(16)).all()  # packed, some restart
        again = load_rows(config, tiny_tokenizer())
        assert [rows.fingerprint for rows in again] == [train.fingerprint, held_out.fingerprint]

    def test_the_runs_own_directory_is_no_text(self, tmp_path: Path) -> None:
        folder = write_texts(tmp_path / "texts", count=20)
        run = tmp_path / "texts" / "run"
        data_config = DataConfig(train=(folder,), cache_dir=str(tmp_path / "cache"))
        config = DistillConfig(student="s", kd_weight=0.0, data=data_config, output_dir=str(run))
        before = [rows.fingerprint for rows in load_rows(config, tiny_tokenizer())]
        run.mkdir()
        (run / "report.txt").write_text("what the run wrote")
        after = [rows.fingerprint for rows in load_rows(config, tiny_tokenizer())]
        assert after == before

    def test_where_the_cache_lies(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert data.cache_directory("~/mine") == tmp_path / "home" / "mine"
        assert data.cache_directory(None) == tmp_path / "xdg" / "sad"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert data.cache_directory(None) == tmp_path / "home" / ".cache" / "sad"

    def test_a_user_without_a_home_is_told_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def homeless(_: Path) -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "expanduser", homeless)
        with pytest.raises(OutputError, match=r"data\.cache_dir must be a directory"):
            data.cache_directory(None)


class TestRowOrder:
    def test_golden_values(self) -> None:
        """Whatever library is installed, a run resumed tomorrow reads the same rows."""
        assert epoch_permutation(42, 0, 10).tolist() == [8, 7, 6, 3, 5, 1, 0, 4, 9, 2]
        assert epoch_permutation(42, 1, 10).tolist() == [8, 6, 0, 9, 1, 7, 4, 5, 3, 2]
        assert epoch_permutation(-1, 10**6, 5).tolist() == [0, 3, 2, 4, 1]

    def test_the_definition_in_python_integers(self) -> None:
        def splitmix64(state: int, index: int) -> int:
            mask = 2**64 - 1
            z = (state + index * 0x9E3779B97F4A7C15) & mask
            z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
            z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
            return z ^ (z >> 31)

        # The generator's published first outputs for the state 1234567.
        published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
        assert [splitmix64(1234567, i) for i in (1, 2, 3)] == published
        state = int.from_bytes(blake2b(b"7:3", digest_size=8).digest(), "little")
        expected = sorted(range(1000), key=lambda row: splitmix64(state, row + 1))
        assert epoch_permutation(7, 3, 1000).tolist() == expected

    @pytest.mark.parametrize("num_rows", [0, 1, 2, 1000])
    def test_each_row_once_per_epoch(self, num_rows: int) -> None:
        """A resumed run that draws a new permutation repeats some rows and never sees others.
        https://github.com/wyim-pgl/transgenic/issues/59
        """
        order = epoch_permutation(0, 5, num_rows)
        assert order.dtype == np.int64
        assert sorted(order.tolist()) == list(range(num_rows))

    def test_seeds_and_epochs_give_unrelated_orders(self) -> None:
        orders = [
            epoch_permutation(s, e, 1000) for s, e in ((0, 0), (0, 1), (1, 0), (1, 1), (10, 0))
        ]
        for i, one in enumerate(orders):
            for two in orders[:i]:
                assert (one == two).mean() < 0.01  # one in a thousand agrees by chance
                assert abs(np.corrcoef(one, two)[0, 1]) < 0.15  # 4.7 standard deviations


# Much text


@pytest.mark.parametrize("num_proc", [2, 3, None])
def test_rows_are_the_same_bytes_by_any_number_of_processes(
    cache: Path, num_proc: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_BATCH_CHARS", 300)  # many batches, and documents that are cut
    monkeypatch.setattr(parallel, "FEW", 2)
    texts = Texts(*(f"naïve text {i}, " + "and more of it\n" * (i % 50) for i in range(100)))
    contents = []
    for processes in (1, num_proc):
        rows = pack_documents(
            texts,
            tiny_tokenizer(),
            max_length=16,
            packing=True,
            cache_dir=cache / str(processes),
            config=DataConfig(num_proc=processes),
        )
        (folder,) = (cache / str(processes)).glob("rows-*")
        contents.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
        assert folder.name == f"rows-{rows.fingerprint}"
    assert contents[0] == contents[1]


def test_what_much_text_takes_is_said_first(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = Texts(*(f"document {i} of many, all alike" for i in range(5000)))
    texts.num_bytes = sum(len(text) for text in texts.texts)
    monkeypatch.setattr(forecast, "_SAMPLE_CHARS", 5000)
    options: Any = {"max_length": 16, "packing": True, "cache_dir": cache}
    expected = forecast.forecast(texts, tiny_tokenizer(), DataConfig(num_proc=1))
    monkeypatch.setattr(data, "LARGE_TEXT", texts.num_bytes)
    rows = pack_documents(texts, tiny_tokenizer(), **options)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("text: 0.0 GB in 5,000 documents, about ")
    assert str(cache) in line and "minutes by" in line
    assert expected.tokens == pytest.approx(rows.num_tokens, rel=0.2)
    (folder,) = cache.glob("rows-*")
    assert expected.disk == pytest.approx(
        sum(path.stat().st_size for path in folder.iterdir()) + 4 * rows.num_tokens, rel=0.2
    )
    assert expected.seconds > 0
    pack_documents(texts, tiny_tokenizer(), **options)
    assert capsys.readouterr().out == "", "rows that are there take nothing"


def test_a_cache_without_room_is_refused_first(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = Texts("some text", "and more")
    texts.num_bytes = 10**12
    monkeypatch.setattr(data, "free_bytes", lambda _: 10**9)
    with pytest.raises(OutputError, match=r"data\.cache_dir must have room for about .* 0\.9 GiB"):
        pack_documents(texts, tiny_tokenizer(), max_length=8, packing=True, cache_dir=cache)
    assert not list(cache.glob("*"))
