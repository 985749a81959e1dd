"""Caches of a served teacher: the right targets whatever happens on the way, and nobody else's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.teacher_server import Fault, TeacherStub, serving
from support.tiny import save_tiny, tiny_llama, write_texts

from sad.cli import main
from sad.config.cache_options import CacheOptions
from sad.config.schema import DistillConfig
from sad.errors import StoppedError, UnfitError, UsageError
from sad.report.log import read_log
from sad.teachers.cache import server as server_module
from sad.teachers.cache.files import COMPLETE, read_facts
from sad.teachers.cache.sparse import decode
from sad.training import cache_served
from sad.training.cache_teacher import cache_teacher
from sad.training.inputs import load_inputs
from sad.training.run import distill

Make = Callable[..., DistillConfig]

K = 8
LENGTH = 32


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of milliseconds, and small batches: some shards of several."""
    build = server_module.TeacherServer.__init__

    def quicker(self: Any, *args: Any, **options: Any) -> None:
        build(self, *args, **(options | {"timeout": 0.5, "first_wait": 0.01}))

    monkeypatch.setattr(server_module.TeacherServer, "__init__", quicker)
    monkeypatch.setattr(cache_served, "BATCH_ROWS", 4)


@pytest.fixture
def make_config(tmp_path: Path) -> Make:
    save_tiny(tmp_path / "student", tiny_llama(seed=2))
    write_texts(tmp_path / "texts", count=6)

    def make(**overrides: Any) -> DistillConfig:
        defaults: dict[str, Any] = {
            "student": str(tmp_path / "student"),
            "teacher_cache": str(tmp_path / "cache"),
            "teacher_wait": 20,
            "temperature": 1.0,
            "data": {"train": str(tmp_path / "texts"), "eval_fraction": 0.3},
            "output_dir": str(tmp_path / "run"),
            "max_length": LENGTH,
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "max_eval_rows": 6,
        }
        return DistillConfig(**(defaults | overrides))

    return make


def cache_of(config: DistillConfig) -> Path:
    return Path(config.teacher_cache or "")


def teacher(seed: int = 1) -> Any:
    return tiny_llama(seed=seed)


def write(config: DistillConfig, stub: TeacherStub, **options: Any) -> Path:
    output = options.pop("output", config.teacher_cache)
    given = {"kind": "topk", "top_k": K, "server": stub.url} | options
    return cache_teacher(config, CacheOptions(output=output, **given), shard_bytes=12_000)


def hashes(folder: Path) -> dict[str, str]:
    return json.loads((folder / COMPLETE).read_text())["files"]


def require_targets(config: DistillConfig, folder: Path, model: Any) -> int:
    """Compare all records of the training rows with the model's own; return how many there are."""
    rows = load_inputs(cache_served.without_teacher(config)).train_rows
    found = read_facts(folder)
    assert found is not None
    shards = [load_file(path) for path in sorted(folder.glob("shard-*.safetensors"))]
    names = [name for name in shards[0] if name != "lengths"]
    record = {name: torch.cat([shard[name] for shard in shards]) for name in names}
    ids, log_probs = decode(record)
    start = compared = 0
    for number in range(len(rows)):
        batch = rows.batch([number])
        length = int(batch.lengths[0])
        with torch.no_grad():
            logits = model(
                batch.input_ids, position_ids=batch.position_ids, use_cache=False
            ).logits[0, :length]
        learned = (batch.labels[0, :length] >= 0).nonzero().flatten()
        at = start + learned
        expected = logits.double().log_softmax(1)[learned]
        stored = log_probs[at].double()
        torch.testing.assert_close(stored, expected.gather(1, ids[at]), atol=6e-4, rtol=0)
        expected = expected.topk(K, 1).values
        torch.testing.assert_close(stored, expected, atol=6e-4, rtol=0)
        tail = 1 - expected.exp().sum(1)
        torch.testing.assert_close(record["tail"][at, 0].double(), tail, atol=2e-6, rtol=1e-5)
        start += length
        compared += len(learned)
    return compared


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_targets_are_those_of_a_forward_pass(make_config: Make, kind: str) -> None:
    config = make_config()
    with serving(teacher()) as stub:
        folder = write(config, stub, server_kind=kind, all_rows=True)
        asked = len(stub.questions)
        write(config, stub, server_kind=kind, all_rows=True)  # it is whole
    assert len(stub.questions) == asked
    assert require_targets(config, folder, teacher()) > 200
    assert len(list(folder.glob("shard-*.safetensors"))) > 1
    found = read_facts(folder)
    assert found is not None
    assert found[0].teacher.name == "teacher"
    assert found[0].temperatures == (1.0,)
    assert len(found[1]["probes"]) == 64


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_what_passes_is_asked_again(make_config: Make, kind: str) -> None:
    config = make_config()
    with serving(teacher()) as stub:
        expected = hashes(write(config, stub, server_kind=kind))
    faults: list[Fault] = ["503", "drop", "cut", "slow", "not_json", "429", "503", "503"]
    with serving(teacher(), faults) as stub:
        other = f"{config.teacher_cache}-2"
        folder = write(config, stub, server_kind=kind, output=other)
        assert not stub.faults
    assert hashes(folder) == expected


@pytest.mark.parametrize("kind", ["vllm", pytest.param("sglang", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("wrong_k", "ids"),
        ("nan", "finite log-probabilities"),
        ("no_null", "be null"),
        ("other_text", "own token|other tokens"),
    ],
)
def test_what_cannot_be_right_ends_it(
    make_config: Make, kind: str, fault: Fault, complaint: str
) -> None:
    with serving(teacher(), [fault]) as stub, pytest.raises(UnfitError, match=complaint) as raised:
        write(make_config(), stub, server_kind=kind)
    assert "\n" not in str(raised.value)
    assert not list(cache_of(make_config()).glob("*.safetensors"))


def test_a_refused_question_ends_with_the_servers_first_line(make_config: Make) -> None:
    with serving(teacher(), ["400"]) as stub, pytest.raises(UsageError) as raised:
        write(make_config(), stub)
    message = str(raised.value)
    assert "400 'Requested prompt logprobs of 8'" in message
    assert f"--max-logprobs {K}" in message
    assert "second line" not in message


def test_a_killed_client_goes_on_to_the_same_shards(make_config: Make) -> None:
    config = make_config()
    with serving(teacher()) as stub:
        expected = hashes(write(config, stub))
        needed = len(stub.questions)
    other = f"{config.teacher_cache}-2"
    with serving(teacher()) as stub:
        stub.stop_after = needed // 2
        with pytest.raises(StoppedError, match="503") as raised:
            write(make_config(teacher_wait=1), stub, output=other)
        assert "--no-enable-prefix-caching" in str(raised.value)
        made = sorted(path.name for path in Path(other).glob("*.safetensors"))
        assert 0 < len(made) < len(expected)
        before = {name: (Path(other) / name).stat().st_mtime_ns for name in made}
        stub.stop_after = None
        folder = write(config, stub, output=other)
    assert hashes(folder) == expected
    assert before == {name: (folder / name).stat().st_mtime_ns for name in made}


@pytest.mark.parametrize("when", ["in between", "before a restart of the client"])
def test_other_weights_under_the_same_name_are_seen(make_config: Make, when: str) -> None:
    config = make_config()
    with serving(teacher()) as stub:
        write(config, stub)
        needed = len(stub.questions)
    other = f"{config.teacher_cache}-2"
    with serving(teacher()) as stub:
        stub.stop_after = needed // 2
        with pytest.raises(StoppedError):
            write(make_config(teacher_wait=1), stub, output=other)
        stub.stop_after = None
        if when == "in between":
            ask = stub.log_probs

            def changed(tokens: list[int]) -> torch.Tensor:
                if len(stub.questions) > needed:
                    stub.model = teacher(seed=5)
                return ask(tokens)

            stub.log_probs = changed
        else:
            stub.model = teacher(seed=5)
        with pytest.raises(UnfitError, match="other weights"):
            write(config, stub, output=other)
    assert not (Path(other) / COMPLETE).exists()


def test_a_check_asks_again(make_config: Make, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config()
    with serving(teacher()) as stub:
        write(config, stub)
        write(config, stub, check=True)
        assert "100.0 % of the ids" in capsys.readouterr().out
        stub.model = teacher(seed=5)
        with pytest.raises(UnfitError, match="of the ids in common"):
            write(config, stub, check=True)


def test_a_run_trains_from_it(make_config: Make) -> None:
    config = make_config()
    with serving(teacher()) as stub:
        write(config, stub)
    distill(config)
    steps = [record for record in read_log(Path(config.output_dir)) if record["kind"] == "train"]
    assert steps and all(record["kd"] > 0 for record in steps if "kd" in record)


def test_the_key_is_sent_and_kept_nowhere(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config()
    monkeypatch.setenv("TEACHER_KEY", "s3cret-key")
    with serving(teacher(), key="s3cret-key") as stub:
        folder = write(config, stub, server_key_env="TEACHER_KEY")
        monkeypatch.setenv("TEACHER_KEY", "wr0ng-key")
        with pytest.raises(UsageError, match=r"401 'wrong key Bearer \.\.\.'"):
            write(config, stub, server_key_env="TEACHER_KEY", output=str(folder) + "-2")
    assert all(b"s3cret" not in path.read_bytes() for path in folder.iterdir())
    assert "s3cret" not in "".join(capsys.readouterr())
    with serving(teacher()) as stub, pytest.raises(UsageError, match="NO_SUCH_KEY"):
        write(config, stub, server_key_env="NO_SUCH_KEY")


def test_what_does_not_fit_the_server_is_refused_at_once(make_config: Make) -> None:
    with serving(teacher()) as stub:
        with pytest.raises(UsageError, match="temperature must be 1 with --server"):
            write(make_config(temperature=2.0), stub)
        with pytest.raises(UsageError, match="top_k must be at most 512"):
            write(make_config(), stub, top_k=513)
        stub.names = ["one", "two"]
        with pytest.raises(UsageError, match="server_model must be one of one, two"):
            write(make_config(), stub)
        with pytest.raises(UsageError, match="got 'three'"):
            write(make_config(), stub, server_model="three")
        stub.max_model_len = LENGTH
        with pytest.raises(UnfitError, match="max_model_len of 32 for two"):
            write(make_config(), stub, server_model="two")
        assert not stub.questions
    with pytest.raises(UsageError, match="that runs, got 'ConnectionRefusedError"):
        write(make_config(), stub)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--server localhost:8000", "http or https address"),
        ("--server http://me:key@host", "without a user's name"),
        ("--server http://host --kind sampled", "kind must be topk with --server"),
        ("--server http://host --temperatures 2", "temperatures must be 1 with --server"),
        ("--server http://host --server_kind tgi", "server_kind must be one of vllm, sglang"),
        ("--server http://host --import x", "import must be left out with --server"),
        ("--server_kind vllm", "server_kind must be left out without --server"),
        ("--import x --check", "check must be left out with --import"),
        ("--import x --window 2", "window must be 0"),
    ],
)
def test_wrong_words_are_one_line(
    make_config: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: str,
    complaint: str,
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"student: {tmp_path}/student\n")
    code = main(["cache-teacher", str(file), "--output", str(tmp_path / "c"), *words.split()])
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert complaint in line


def test_the_command_needs_no_teacher(make_config: Make, tmp_path: Path) -> None:
    config = make_config()
    file = tmp_path / "run.yaml"
    file.write_text(
        f"student: {tmp_path}/student\ntemperature: 1\nmax_length: {LENGTH}\n"
        f"data: {{train: {tmp_path}/texts, eval_fraction: 0.3}}\n"
    )
    with serving(teacher()) as stub:
        words = ["--output", str(cache_of(config)), "--server", stub.url + "/v1/", "--top_k", "8"]
        assert main(["cache-teacher", str(file), *words]) == 0
    assert require_targets(config, cache_of(config), teacher()) > 200
