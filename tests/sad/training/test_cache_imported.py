"""Targets that other programs have written become a cache with rows of its own, or are refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import support.imports
import torch
from sad_kernels import TeacherTopK
from support.imports import import_config, targets_read
from support.teacher_server import sglang_meta, vllm_entries
from support.tiny import TEXT, save_tiny, tiny_llama, tiny_tokenizer, write_texts

from sad.cli import main
from sad.config.schema import DistillConfig
from sad.errors import UnfitError, UsageError
from sad.report.log import read_log
from sad.teachers.cache.files import COMPLETE, read_facts
from sad.teachers.foreign import formats
from sad.teachers.foreign.openai import token_bytes
from sad.training import imported_rows
from sad.training.inputs import load_inputs
from sad.training.run import distill

Make = Callable[..., DistillConfig]

K = 8
LENGTH = 48


class Text(NamedTuple):
    """A document, and a teacher that mostly knows what comes next."""

    tokens: list[int]
    log_probs: torch.Tensor  # float32 [n, V]
    text: str


def texts(count: int = 24) -> list[Text]:
    tokenizer = tiny_tokenizer()
    lines = TEXT.strip().splitlines()
    draw = torch.Generator().manual_seed(3)
    found = []
    for i in range(count):
        text = f"{i} {lines[i % len(lines)][i : i + 60]}"
        tokens = tokenizer(text)["input_ids"][:LENGTH]
        logits = torch.randn(len(tokens), 512, generator=draw)
        for place, following in enumerate(tokens[1:]):
            logits[place, following] += 7.0
        found.append(Text(tokens, logits.log_softmax(1), str(tokenizer.decode(tokens))))
    return found


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imported_rows, "BATCH_ROWS", 4)


@pytest.fixture
def make_config(tmp_path: Path) -> Make:
    save_tiny(tmp_path / "student", tiny_llama(seed=2))

    def make(**overrides: Any) -> DistillConfig:
        defaults: dict[str, Any] = {"temperature": 1.0, "max_length": LENGTH}
        return import_config(tmp_path, **(defaults | overrides))

    return make


run_import = partial(support.imports.run_import, kind="topk")


# What each program writes


def vllm(text: Text) -> dict[str, Any]:
    entries = vllm_entries(text.log_probs, text.tokens, K)
    return {"prompt_token_ids": text.tokens, "prompt_logprobs": entries}


def vllm_answer(text: Text) -> dict[str, Any]:
    return {"object": "text_completion", "choices": [vllm(text) | {"text": "", "index": 0}]}


def sglang(text: Text) -> dict[str, Any]:
    return {"text": "", "meta_info": sglang_meta(text.log_probs, text.tokens, K)}


def axolotl(text: Text) -> dict[str, Any]:
    values, ids = text.log_probs.topk(K, 1)
    values = values.log_softmax(1)
    labels = [-100, -100, *text.tokens[2:]]
    return {
        "input_ids": text.tokens,
        "labels": labels,
        "target_token_ids": ids.tolist(),
        "target_logprobs": values.tolist(),
        "target_mask": [[1] * K for _ in text.tokens],
    }


def distillkit(text: Text) -> dict[str, Any]:
    values, ids = text.log_probs.topk(K, 1)
    return {"input_ids": text.tokens, "token_ids": ids.tolist(), "top_values": values.tolist()}


def openai(text: Text) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    of_id = dict(token_bytes(tokenizer))
    first = 2
    content = []
    for place in range(first, len(text.tokens)):
        values, ids = text.log_probs[place - 1].topk(K)
        top = [
            {"token": "?", "bytes": list(of_id[i]), "logprob": value}
            for i, value in zip(ids.tolist(), values.tolist(), strict=True)
        ]
        token = text.tokens[place]
        own = text.log_probs[place - 1, token].item()
        content.append(
            {"token": "?", "bytes": list(of_id[token]), "logprob": own, "top_logprobs": top}
        )
    prompt = tokenizer.decode(text.tokens[:first])
    return {"prompt": prompt, "choices": [{"logprobs": {"content": content}}]}


WRITERS: dict[str, Callable[[Text], dict[str, Any]]] = {
    "vllm": vllm,
    "vllm_answer": vllm_answer,
    "sglang": sglang,
    "axolotl": axolotl,
    "distillkit": distillkit,
    "openai": openai,
}


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def require_targets(config: DistillConfig, known: list[Text], *, whole: bool = True) -> int:
    """Compare what training reads with what was written; return how many positions there are.

    ``whole``: probabilities are those of the teacher; else they sum to 1 over the ids.
    """
    by_tokens = {tuple(text.tokens): text for text in known}
    compared = 0
    for batch, target in targets_read(config):
        assert isinstance(target, TeacherTopK)
        length = int(batch.lengths[0])
        row = tuple(batch.input_ids[0, :length].tolist())
        text = next(text for tokens, text in by_tokens.items() if tokens[:-1] == row)
        learned = (batch.labels[0] >= 0).nonzero().flatten()
        assert batch.labels[0][learned].tolist() == [text.tokens[i + 1] for i in learned]
        expected, ids = text.log_probs[learned].topk(K, 1)
        expected = expected if whole else expected.log_softmax(1)
        assert torch.equal(target.ids[0][learned], ids)
        torch.testing.assert_close(target.log_probs[0][learned], expected, atol=1e-3, rtol=0)
        compared += len(learned)
    return compared


@pytest.mark.parametrize("name", WRITERS)
def test_targets_and_rows_are_those_of_the_file(
    make_config: Make, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known = texts()
    path = write_jsonl(tmp_path / "targets.jsonl", [WRITERS[name](text) for text in known])
    config = make_config()
    folder = run_import(config, path)
    said = capsys.readouterr().out
    assert ("biased" in said) == (name == "axolotl")
    count = require_targets(config, known, whole=name != "axolotl")
    first = 1 if name in ("axolotl", "openai") else 0
    assert count == sum(len(text.tokens) - 1 - first for text in known)
    found = read_facts(folder)
    assert found is not None
    facts, notes = found
    assert facts.kind == ("sampled" if name == "axolotl" else "topk")
    assert notes["format"] == name.partition("_")[0]
    assert notes["next_token_among_ids"][0] > 0.9
    assert not (folder / "import-spool").exists()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    run_import(config, path)  # it is whole
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("ending", ["parquet", "arrow", "jsonl.gz"])
def test_tables_and_folders_are_read(make_config: Make, tmp_path: Path, ending: str) -> None:
    known = texts()
    folder = tmp_path / "targets"
    folder.mkdir()
    parts = known[:10], known[10:]
    for number, part in enumerate(parts):
        path = folder / f"part-{number}.{ending}"
        records = [axolotl(text) if ending == "arrow" else distillkit(text) for text in part]
        if ending == "jsonl.gz":
            content = "".join(json.dumps(record) + "\n" for record in records)
            path.write_bytes(gzip.compress(content.encode()))
            continue
        pyarrow = pytest.importorskip("pyarrow")
        table = pyarrow.Table.from_pylist(records)
        if ending == "parquet":
            from pyarrow import parquet

            parquet.write_table(table, path)
        else:
            with pyarrow.ipc.new_stream(path, table.schema) as stream:
                stream.write_table(table)
    (folder / "state.json").write_text("{}")
    config = make_config()
    run_import(config, folder)
    assert require_targets(config, known, whole=ending != "arrow") > 400


def test_packed_targets_are_read_by_distillkit_itself(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = texts()
    records = [
        {
            "input_ids": text.tokens,
            "compressed_logprobs": (-text.log_probs.topk(K, 1).values * 1e6).int().tolist(),
            "bytepacked_indices": text.log_probs.topk(K, 1).indices.tolist(),
        }
        for text in known
    ]
    path = write_jsonl(tmp_path / "targets.jsonl", records)
    formats._decompressor.cache_clear()
    with pytest.raises(UsageError, match="distillkit must be installed"):
        run_import(make_config(), path)

    class Compressor:
        def __init__(self, config: Any) -> None:
            assert config == {"d": 512, "k": K}

        def decompress_to_sparse(self, row: dict[str, torch.Tensor]) -> Any:
            return row["bytepacked_indices"], row["compressed_logprobs"] / -1e6

    kit: Any = ModuleType("distillkit.compression")
    kit.LogprobCompressor = Compressor
    kit.DistributionQuantizationConfig = SimpleNamespace(model_validate=lambda content: content)
    monkeypatch.setitem(__import__("sys").modules, "distillkit.compression", kit)
    monkeypatch.setitem(__import__("sys").modules, "distillkit", ModuleType("distillkit"))
    with pytest.raises(UnfitError, match="compression_config"):
        run_import(make_config(), path)
    (tmp_path / "compression_config.yaml").write_text(f"{{d: 512, k: {K}}}\n")
    config = make_config()
    run_import(config, path)
    assert require_targets(config, known) > 400
    formats._decompressor.cache_clear()


def test_a_run_trains_and_resumes_from_an_import(make_config: Make, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "targets.jsonl", [vllm(text) for text in texts()])
    config = make_config(save_steps=2, lr_scheduler_type="constant", max_eval_rows=4)
    run_import(config, path)
    straight = distill(config)
    steps = [r for r in read_log(Path(config.output_dir)) if r["kind"] == "train"]
    assert steps

    halved = replace(config, output_dir=str(tmp_path / "halved"))
    distill(replace(halved, max_steps=2))
    resumed = distill(replace(halved, resume_from_checkpoint="auto", allow_config_change=True))
    assert resumed.results == straight.results


def test_an_interrupted_import_goes_on(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "targets.jsonl", [vllm(text) for text in texts()])
    config = make_config()
    expected = json.loads((run_import(config, path) / COMPLETE).read_text())["files"]
    from sad.teachers.cache import writer

    write, written = writer.write_shard, []

    def fails(shard: Path, *others: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        write(shard, *others)

    other = f"{config.teacher_cache}-2"
    monkeypatch.setattr(writer, "write_shard", fails)
    with pytest.raises(KeyboardInterrupt):
        run_import(config, path, output=other)
    monkeypatch.setattr(writer, "write_shard", write)
    folder = run_import(config, path, output=other)
    assert json.loads((folder / COMPLETE).read_text())["files"] == expected
    write_jsonl(path, [vllm(text) for text in texts(20)])
    with pytest.raises(UsageError, match="a cache of the same files"):
        run_import(config, path, output=other)


def damaged(change: Callable[[list[dict[str, Any]]], Any], name: str = "vllm") -> Any:
    records = [WRITERS[name](text) for text in texts()]
    change(records)
    return records


def shift_targets(records: list[dict[str, Any]]) -> None:
    for record in records:
        for name in ("token_ids", "top_values"):
            record[name] = [record[name][0], *record[name][:-1]]


def add_to_ids(records: list[dict[str, Any]]) -> None:
    """As if another tokenizer had made them."""
    for record in records:
        record["input_ids"] = [(token * 7 + 1) % 512 for token in record["input_ids"]]
        record["token_ids"] = [[(i * 7 + 1) % 512 for i in row] for row in record["token_ids"]]


def set_at(*path: Any, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    def change(records: list[dict[str, Any]]) -> None:
        place: Any = records
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("distillkit", shift_targets, "any wrong shift"),
        ("distillkit", add_to_ids, "those of the tokenizer, got 0 of 24"),
        ("distillkit", set_at(3, "token_ids", 0, 0, value=512), ":4, token 1, must hold ids"),
        ("distillkit", set_at(3, "top_values", 0, 0, value=5.0), "sum to at most 1"),
        ("distillkit", set_at(3, "token_ids", value=[[1]]), ":4 must have token_ids for each"),
        ("distillkit", set_at(3, "input_ids", value="text"), ":4 must have input_ids, a list"),
        ("distillkit", set_at(3, "input_ids", 0, value=600), ":4 must hold ids of the tokenizer"),
        ("vllm", set_at(2, "prompt_logprobs", 0, value={}), ":3, token 0, must be null"),
        ("vllm", set_at(2, "prompt_logprobs", value=[None]), ":3 must have prompt_logprobs with"),
        ("sglang", set_at(2, "meta_info", "input_top_logprobs", 1, value=3), "must be a list of"),
        ("axolotl", set_at(2, "labels", value=[1]), ":3 must have one of labels per token"),
        ("axolotl", set_at(0, value={"text": "a"}), "must be targets as DistillKit"),
        ("openai", set_at(0, "prompt", value=None), "must have the messages, or the prompt"),
    ],
)
def test_wrong_files_are_refused_in_one_line(
    make_config: Make, tmp_path: Path, name: str, change: Any, complaint: str
) -> None:
    path = write_jsonl(tmp_path / "targets.jsonl", damaged(change, name))
    with pytest.raises(UnfitError) as raised:
        run_import(make_config(), path)
    assert complaint in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (Path(make_config().teacher_cache or "") / "cache.json").exists()


def test_text_that_is_no_single_token_is_refused(make_config: Make, tmp_path: Path) -> None:
    records = [openai(text) for text in texts()]
    records[1]["choices"][0]["logprobs"]["content"][0]["bytes"] = list(b"no such token")
    path = write_jsonl(tmp_path / "targets.jsonl", records)
    with pytest.raises(UnfitError, match="one id of the tokenizer, got b'no such token'"):
        run_import(make_config(), path)


def test_what_cannot_be_read_is_refused_in_one_line(make_config: Make, tmp_path: Path) -> None:
    path = tmp_path / "targets.jsonl"
    path.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UnfitError, match="targets as DistillKit"):
        run_import(make_config(), path)
    write_jsonl(path, [vllm(texts(1)[0])])
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(UnfitError, match=r"jsonl:\d+ must be JSON"):
        run_import(make_config(), path)
    with pytest.raises(UsageError, match="which does not exist"):
        run_import(make_config(), tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="files that end in"):
        run_import(make_config(), tmp_path / "empty")
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_text("no table")
    with pytest.raises(UnfitError, match="valid Parquet file"):
        run_import(make_config(), tmp_path / "a.parquet")


def test_keys_that_do_not_go_with_an_import_are_refused(make_config: Make, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "targets.jsonl", [vllm(text) for text in texts()])
    with pytest.raises(UsageError, match="packing must be false"):
        run_import(make_config(packing=True), path)
    with pytest.raises(UsageError, match="temperature must be 1 with --import"):
        run_import(make_config(temperature=2.0), path)
    data = {"train": write_texts(tmp_path / "texts")}
    with pytest.raises(UsageError, match=r"data\.train must be left out with --import"):
        run_import(make_config(data=data), path)
    with pytest.raises(UnfitError, match="must have at most max_length"):
        run_import(make_config(max_length=8), path)
    run_import(make_config(), path)
    with pytest.raises(UsageError, match=r"data\.train must be left out with an imported"):
        load_inputs(make_config(data=data))
    with pytest.raises(UnfitError, match="for this run's packing"):
        load_inputs(make_config(packing=True))


def test_the_command_needs_no_teacher_and_no_text(make_config: Make, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "targets.jsonl", [vllm(text) for text in texts()])
    file = tmp_path / "run.yaml"
    file.write_text(
        f"student: {tmp_path}/student\ntemperature: 1\nmax_length: {LENGTH}\n"
        "data: {eval_fraction: 0.3}\n"
    )
    words = ["cache-teacher", str(file), "--output", str(tmp_path / "cache"), "--import", str(path)]
    make_config()
    assert main([*words, "--import_format", "sglang", "--packing", "false"]) == 65
    assert main([*words, "--import_format", "vllm", "--packing", "false"]) == 0
    assert require_targets(make_config(), texts()) > 400


def test_damaged_rows_are_seen(make_config: Make, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "targets.jsonl", [vllm(text) for text in texts()])
    config = make_config()
    tokens = run_import(config, path) / "rows" / "train" / "tokens.bin"
    content = bytearray(tokens.read_bytes())
    content[5] ^= 1
    tokens.write_bytes(content)
    with pytest.raises(UnfitError, match="import them again"):
        load_inputs(config)
