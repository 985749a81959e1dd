"""The held-out split: a function of names, the same everywhere, never empty."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sad.config.load import load_config
from sad.config.schema import DataConfig, config_to_yaml
from sad.data.split import DocumentSet, split_documents
from sad.errors import UnfitError, UsageError


def make(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    for index in range(count):
        (folder / f"{index:04d}.txt").write_text(f"text {index}")
    return folder


def split(source: Path, **options: Any) -> tuple[DocumentSet, DocumentSet]:
    return split_documents(DataConfig(train=(str(source),), **options))


def names(documents: DocumentSet) -> list[str]:
    return [document.name for document in documents]


def test_every_document_is_on_one_side_and_the_share_is_as_asked(tmp_path: Path) -> None:
    train, held_out = split(make(tmp_path, 1000), eval_fraction=0.1)
    assert sorted(names(train) + names(held_out)) == [f"{i:04d}.txt" for i in range(1000)]
    assert (len(train), len(held_out)) == (len(names(train)), len(names(held_out)))
    assert 70 <= len(held_out) <= 130  # three standard deviations of a fair draw


def test_the_split_is_the_same_on_every_machine(tmp_path: Path) -> None:
    _, held_out = split(make(tmp_path, 100), eval_fraction=0.05)
    golden = ["0018", "0029", "0035", "0040", "0045", "0096"]
    assert names(held_out) == [f"{number}.txt" for number in golden]


def test_another_process_sees_the_same(tmp_path: Path) -> None:
    make(tmp_path, 20)
    program = (
        "from sad.config import DataConfig; from sad.data.split import split_documents; "
        f"sides = split_documents(DataConfig(train={str(tmp_path)!r}, eval_fraction=0.3)); "
        "print([(side.digest, [document.name for document in side]) for side in sides])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = [(side.digest, names(side)) for side in split(tmp_path, eval_fraction=0.3)]
    assert result.stdout.strip() == str(here)


def test_new_documents_move_no_other(tmp_path: Path) -> None:
    before = names(split(make(tmp_path, 200), eval_fraction=0.2)[1])
    after = names(split(make(tmp_path, 400), eval_fraction=0.2)[1])
    assert before == [name for name in after if name < "0200"]


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.99])
def test_a_handful_of_documents_leaves_no_side_empty(tmp_path: Path, fraction: float) -> None:
    train, held_out = split(make(tmp_path, 3), eval_fraction=fraction)
    assert len(train) + len(held_out) == 3
    assert min(len(train), len(held_out)) == 1


def test_two_documents_of_one_name_can_be_split(tmp_path: Path) -> None:
    sources = [make(tmp_path / folder, 1) for folder in ("a", "b")]
    train, held_out = split_documents(DataConfig(train=tuple(str(s) for s in sources)))
    assert (len(train), len(held_out)) == (1, 1)


def test_one_document_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(UnfitError, match=r"at least 2 documents .* got 1; name held-out text"):
        split(make(tmp_path, 1))


def test_held_out_text_of_its_own(tmp_path: Path) -> None:
    train, held_out = split(make(tmp_path / "a", 1), eval=(str(make(tmp_path / "b", 2)),))
    assert names(train) == ["0000.txt"]
    assert names(held_out) == ["0000.txt", "0001.txt"]


def test_max_documents_takes_a_sample_of_both_sides(tmp_path: Path) -> None:
    """Fails if one hash decides both: the sample would be the held-out documents."""
    make(tmp_path, 400)
    train, held_out = split(tmp_path, eval_fraction=0.2, max_documents=100)
    assert len(train) + len(held_out) == 100
    assert 8 <= len(held_out) <= 32  # three standard deviations of a fair draw
    everything = [names(side) for side in split(tmp_path, eval_fraction=0.2)]
    assert set(names(train)) < set(everything[0])
    assert set(names(held_out)) < set(everything[1])


@pytest.mark.parametrize("text", ["", " \n\t\u3000"])
def test_text_must_not_be_empty(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    with pytest.raises(
        UnfitError, match=r"data\.train must hold text, got no document in .* not e"
    ):
        split(tmp_path / "a.txt")


def test_the_digest_tells_texts_order_and_boundaries_apart(tmp_path: Path) -> None:
    digests = set()
    for index, texts in enumerate([("ab", "c"), ("a", "bc"), ("c", "ab"), ("abc",)]):
        folder = tmp_path / str(index)
        folder.mkdir()
        for number, text in enumerate(texts):
            (folder / f"{number}.txt").write_text(text)
        digests.add(split(folder, eval=(str(folder),))[0].digest)
    assert len(digests) == 4
    train, held_out = split(tmp_path / "0")
    assert train.digest != held_out.digest


def test_text_that_changes_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    train, _ = split(make(tmp_path, 5))
    (tmp_path / "0002.txt").write_text("something else")
    with pytest.raises(UnfitError, match="must stay as it is while it is read"):
        list(train)


# Weights


def sources(folder: Path) -> list[str]:
    return [str(make(folder / name, count)) for name, count in (("a", 40), ("b", 20), ("c", 10))]


def read(folder: Path, *weights: float, **options: Any) -> tuple[Counter[str], Counter[str]]:
    """How often each document is read for training and for evaluation."""
    config = DataConfig(
        train=tuple(sources(folder)), train_weights=weights or None, eval_fraction=0.2, **options
    )
    train, held_out = (Counter(names(side)) for side in split_documents(config))
    return train, held_out


def of_source(times: Counter[str], source: int) -> Counter[int]:
    """How many documents of a source are read so often."""
    mine = [
        n
        for name, n in times.items()
        if name.startswith(f"{source}:") or (source == 0 and ":" not in name)
    ]
    return Counter(mine)


def test_a_weight_is_how_often_documents_are_read(tmp_path: Path) -> None:
    plain, held_out = read(tmp_path)
    weighted, same = read(tmp_path, 1, 2.5, 0.5)
    assert same == held_out, "what is held out is read once"
    assert of_source(weighted, 0) == of_source(plain, 0)
    count = sum(of_source(plain, 1).values())
    assert of_source(weighted, 1) == {2: count - round(count / 2), 3: round(count / 2)}
    assert of_source(weighted, 2) == {1: round(sum(of_source(plain, 2).values()) / 2)}
    assert weighted.keys() <= plain.keys()


def test_copies_are_not_side_by_side(tmp_path: Path) -> None:
    config = DataConfig(train=tuple(sources(tmp_path)), train_weights=(1, 2, 1))
    train, _ = split_documents(config)
    order = names(train)
    assert len(order) == len(train) == len(set(order)) + sum(n.startswith("1:") for n in set(order))
    assert order[len(set(order)) :] == [
        name for name in order[: len(set(order))] if name[:2] == "1:"
    ]


def test_a_fraction_is_of_the_documents_that_are_used(tmp_path: Path) -> None:
    """With ``max_documents``, which goes by the same hashes, as well."""
    limited, _ = read(tmp_path, 0.5, 0.5, 0.5, max_documents=30)
    whole, _ = read(tmp_path, max_documents=30)
    assert abs(limited.total() - whole.total() / 2) <= 1.5


def test_weights_of_1_change_nothing(tmp_path: Path) -> None:
    """Rows that were packed before there were weights are found again."""
    plain, ones = (
        DataConfig(train=tuple(sources(tmp_path)), train_weights=weights)
        for weights in (None, (1, 1, 1))
    )
    assert split_documents(plain)[0].digest == split_documents(ones)[0].digest
    other = DataConfig(train=plain.train, train_weights=(1, 1, 2))
    assert split_documents(other)[0].digest != split_documents(plain)[0].digest
    assert split_documents(other)[1].digest == split_documents(plain)[1].digest


def test_an_entry_may_carry_its_weight(tmp_path: Path) -> None:
    make(tmp_path / "b", 2)
    path = tmp_path / "run.yaml"
    path.write_text("student: s\nteacher: t\ndata:\n  train: [a/, {path: b, weight: 2.5}]\n")
    config = load_config(path)
    assert config.data.train == ("a/", str(tmp_path / "b"))
    assert config.data.train_weights == (1, 2.5)
    path.write_text(config_to_yaml(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"train": ["a"], "train_weights": [1, 2]},
            r"be one number per entry of data\.train \(1\)",
        ),
        ({"train": ["a"], "train_weights": [0]}, r"data\.train_weights must be numbers above 0"),
        (
            {"train": [{"path": "a", "wait": 2}]},
            r"data\.train must hold texts, or entries with path",
        ),
        (
            {"train": [{"path": "a", "weight": 2}], "train_weights": [2]},
            r"data\.train_weights must be left out where entries",
        ),
        (
            {"train": [{"path": "a", "weight": "two"}]},
            r"data\.train_weights must be a finite number",
        ),
    ],
)
def test_weights_that_cannot_be_meant(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DataConfig(**keys)
