"""Caches of strangers, and folders that are none: one line, and nothing is trained."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.caches import make_cache
from torch import Tensor

from sad.checkpoint.run_lock import run_lock
from sad.checkpoint.tensor_files import FileTensors
from sad.config.schema import DistillConfig
from sad.errors import OutputError, StoppedError, UnfitError, UsageError
from sad.teachers.cache.files import CACHE, COMPLETE, READER, write_shard
from sad.teachers.cache.writer import CacheWriter
from sad.teachers.cached import CachedTeacher
from sad.teachers.fingerprint import fingerprint_file
from sad.training.inputs import load_inputs

Make = Callable[..., DistillConfig]
Caches = dict[str, Path]
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def rewritten(cache: Path, change: Change = lambda tensors: tensors, plan: str = "") -> None:
    """Change the tensors of all shards, and make headers and hashes fit."""
    for path in [*cache.glob("shard-*"), *cache.glob("eval-*")]:
        found = FileTensors(path)
        tensors = {name: found[name] for name in found}
        if path.name.startswith("shard"):
            tensors = change(tensors)
        write_shard(path, tensors, plan or found.metadata["plan"])
    rehashed(cache, plan)


def rehashed(cache: Path, plan: str = "") -> None:
    content = json.loads((cache / COMPLETE).read_text())
    content["files"] = {name: fingerprint_file(cache / name) for name in content["files"]}
    content["plan"] = plan or content["plan"]
    (cache / COMPLETE).write_text(json.dumps(content))


def with_fact(cache: Path, key: str, value: object) -> None:
    """Another value in ``cache.json``, with the hashes that belong to it."""
    content = json.loads((cache / CACHE).read_text())
    *folders, last = key.split(".")
    inner = content
    for folder in folders:
        inner = inner[folder]
    inner[last] = value
    facts = {k: v for k, v in content.items() if k not in ("plan", "notes")}
    text = json.dumps(facts, sort_keys=True)
    content["plan"] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    (cache / CACHE).write_text(json.dumps(content))
    rewritten(cache, plan=content["plan"])


def refusal(make_config: Make, cache: Path, **keys: Any) -> str:
    with pytest.raises((UnfitError, UsageError)) as caught:
        load_inputs(make_config(teacher=None, teacher_cache=str(cache), **keys))
    line = str(caught.value)
    assert "\n" not in line and line.isprintable() and len(line) < 600
    return line


FACTS: list[Any] = [
    ("sampled", "train_places", 2**62, "train_places must fill 1,000,000 shards at most"),
    ("sampled", "eval_places", 2**62, "eval_places must fill 1,000,000 shards at most"),
    ("sampled", "train_places", 3, "number of rows, got 3 in|must hold lengths"),
    ("sampled", "subset", {"seed": 42, "rows": 35, "of": 2**50}, "number of training rows"),
    ("sampled", "top_k", None, "top_k must be given with sampled targets"),
    ("sampled", "top_k", 2**60, "eval-00000.safetensors must hold lengths"),
    ("sampled", "temperatures", [0.0], "temperatures must be above 0"),
    ("sampled", "temperatures", [1.0, 2.0], "temperatures must be as many as go with"),
    ("sampled", "codec", "int8", "codec must be null with sampled targets"),
    ("sampled", "kind", "hidden", "codec must be given with hidden targets"),
    ("sampled", "notes.scores", [1], "notes.scores must be an object"),
    ("sampled", "notes.parameters", "x", "notes.parameters must be an integer"),
    ("sampled", "tokenizer", "a\nsad: error: b" * 9, "got a..sad: error: b"),
    ("bf16", "head.softcap", 0.0, "head must have a logit_scale and a softcap other than 0"),
    ("bf16", "head.logit_scale", 0.0, "head must have a logit_scale and a softcap other"),
    ("bf16", "head.width", 2**40, "head.safetensors must hold a weight"),
]


@pytest.mark.parametrize(("name", "key", "value", "message"), FACTS)
def test_facts_that_cannot_be_are_refused(
    make_config: Make,
    caches: Caches,
    tmp_path: Path,
    name: str,
    key: str,
    value: object,
    message: str,
) -> None:
    cache = shutil.copytree(caches[name], tmp_path / "cache")
    with_fact(cache, key, value)
    line = refusal(make_config, cache)
    assert re.search(message, line), line


SHARDS: dict[str, tuple[str, Change, str]] = {
    "another dtype": ("sampled", lambda t: t | {"ids_lo": t["ids_lo"].long()}, "ids_lo uint16"),
    "fewer ids": ("sampled", lambda t: t | {"logw": t["logw"][:, :3].clone()}, "logw uint16"),
    "no weights": ("sampled", lambda t: {k: t[k] for k in ("lengths", "ids_lo")}, "logw uint16"),
    "another tensor": ("sampled", lambda t: t | {"more": torch.ones(3)}, "'more' float32 [3]"),
    "a narrow state": ("bf16", lambda t: t | {"hidden": t["hidden"][:, :5].clone()}, "hidden bf"),
    "short lengths": ("sampled", lambda t: t | {"lengths": t["lengths"] - 1}, "ids_lo uint16 ["),
    "negative lengths": ("sampled", lambda t: t | {"lengths": -t["lengths"]}, "rows of 0 to 16"),
    "no lengths": ("bf16", lambda t: {"hidden": t["hidden"]}, "must hold lengths int32"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_shards_of_another_form_are_refused(
    make_config: Make, caches: Caches, tmp_path: Path, name: str
) -> None:
    kind, change, message = SHARDS[name]
    cache = shutil.copytree(caches[kind], tmp_path / "cache")
    rewritten(cache, change)
    assert message in refusal(make_config, cache)


RECORDS: dict[str, tuple[str, Change, str]] = {
    "an id beyond the vocabulary": (
        "sampled",
        lambda t: t | {"ids_lo": torch.full(t["ids_lo"].shape, 600).to(torch.uint16)},
        "must hold ids below 512, got 600",
    ),
    "a tail of NaN": ("topk", lambda t: t | {"tail": t["tail"] * torch.nan}, "tails from 0 to 1"),
    "a tail above 1": ("topk", lambda t: t | {"tail": t["tail"] * 0 + 2}, "tails from 0 to 1"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_that_no_teacher_makes_are_refused_when_they_are_read(
    make_config: Make, caches: Caches, tmp_path: Path, name: str
) -> None:
    kind, change, message = RECORDS[name]
    cache = shutil.copytree(caches[kind], tmp_path / "cache")
    rewritten(cache, change)
    inputs = load_inputs(make_config(teacher=None, teacher_cache=str(cache)))
    assert isinstance(inputs.teacher, CachedTeacher)
    subset = inputs.teacher.reader.facts.subset
    rows = [0] if subset is None else subset.numbers()[:1]
    with pytest.raises(UnfitError, match=message) as caught:
        inputs.teacher.forward(inputs.train_rows.batch(rows))
    assert caught.value.spoken, "this rank alone knows it"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {"weight": t["weight"][:, :5].clone()},
        lambda t: {"weight": t["weight"][:50].clone()},
        lambda t: {"weight": t["weight"][0].clone()},
        lambda t: {"weight": t["weight"].int()},
        lambda t: {"weight": t["weight"], "bias": torch.ones(3)},
        lambda t: {"head": t["weight"]},
    ],
)
def test_a_head_of_another_form_is_refused(
    make_config: Make, caches: Caches, tmp_path: Path, change: Change
) -> None:
    cache = shutil.copytree(caches["int8"], tmp_path / "cache")
    save_file(change(load_file(cache / "head.safetensors")), cache / "head.safetensors")
    rehashed(cache)
    assert "head.safetensors must hold a weight [512 or more, 32]" in refusal(make_config, cache)


def test_a_basis_of_another_width_is_refused(
    make_config: Make, caches: Caches, tmp_path: Path
) -> None:
    cache = shutil.copytree(caches["int8"], tmp_path / "cache")
    basis = load_file(cache / "basis.safetensors")
    save_file({k: v[:5].clone() for k, v in basis.items()}, cache / "basis.safetensors")
    rehashed(cache)
    assert "basis.safetensors must hold mean float32 [32]" in refusal(make_config, cache)


@pytest.mark.parametrize("content", ["[" * 10**5, '{"seed": ' + "9" * 6000 + "}", "null"])
def test_no_text_is_too_odd_for_a_cache_json(
    make_config: Make, caches: Caches, tmp_path: Path, content: str
) -> None:
    cache = shutil.copytree(caches["sampled"], tmp_path / "cache")
    (cache / CACHE).write_text(content)
    assert "must hold a JSON object" in refusal(make_config, cache)


def test_hashes_that_are_none_are_refused(
    make_config: Make, caches: Caches, tmp_path: Path
) -> None:
    cache = shutil.copytree(caches["sampled"], tmp_path / "cache")
    content = json.loads((cache / COMPLETE).read_text())
    (cache / COMPLETE).write_text(json.dumps(content | {"files": [1]}))
    assert "of size and hash None" in refusal(make_config, cache)


def test_a_folder_of_other_things_is_no_cache(make_config: Make, tmp_path: Path) -> None:
    """Nobody waits for ``cache.json`` in the directory of a run; nothing is written there."""
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.yaml").write_text("teacher: x\n")
    assert "which holds 'config.yaml' and no cache.json" in refusal(
        make_config, folder, teacher_wait=1
    )
    with pytest.raises(UsageError, match=r"must be new, or hold a teacher's cache.*config\.yaml"):
        make_cache(make_config(), folder)
    assert os.listdir(folder) == ["config.yaml"]


def test_an_output_that_is_a_file_is_refused(make_config: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="must be writable, got ENOTDIR"):
            make_cache(make_config(), output)
    assert (tmp_path / "file").read_text() == "mine"
    assert "which is no folder" in refusal(make_config, tmp_path / "file")


def test_a_second_writer_is_refused(make_config: Make, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    with (
        run_lock(folder, pytest.fail),
        pytest.raises(UsageError, match="must be used by one process"),
    ):
        make_cache(make_config(), folder)
    make_cache(make_config(), folder)


def test_a_signal_stops_a_writer_and_the_same_command_goes_on(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_cache(make_config(), tmp_path / "whole", all_rows=True)
    beats = 0

    def beat(self: CacheWriter) -> None:
        nonlocal beats
        beats += 1
        if beats == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    folder = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "beat", beat)
        with pytest.raises(StoppedError, match="got SIGTERM; the same command goes on") as end:
            make_cache(make_config(), folder, all_rows=True)
    assert end.value.exit_code == 75 and 0 < len(list(folder.glob("*.safetensors"))) < 10
    make_cache(make_config(), folder, all_rows=True)
    files = [json.loads((f / COMPLETE).read_text())["files"] for f in (whole, folder)]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "said",
    ["{", "[]", '{"next": "x"}', '{"next": -5}', '{"next": 1e99}', '{"next": 9, "plan": "other"}'],
)
def test_a_writer_believes_no_odd_word_of_a_reader(
    make_config: Make, tmp_path: Path, said: str
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / READER).write_text(said)
    with pytest.raises(StoppedError, match="got no word of one for 1 s"):
        make_cache(make_config(teacher_wait=1), folder, "hidden", window=2)
    shards = {path.name for path in folder.glob("shard-*")}
    assert shards == {"shard-00000.safetensors", "shard-00001.safetensors"}
