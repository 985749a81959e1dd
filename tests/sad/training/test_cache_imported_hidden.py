"""Hidden states that vLLM has exported become a teacher's cache, or are refused in one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import support.imports
import torch
from sad_kernels import TeacherHidden
from safetensors.torch import load_file, save_file
from support.imports import import_config, targets_read
from support.tiny import TEXT, VOCAB_SIZE, save_tiny, tiny_llama, tiny_qwen3, tiny_tokenizer
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from sad.cli import CACHE_OPTIONS, main
from sad.config.cache_options import ImportFormat, read_cache_options
from sad.config.schema import DistillConfig
from sad.errors import SadError, UnfitError, UsageError
from sad.models.load import load_teacher
from sad.report.log import read_log
from sad.teachers.cache import verify
from sad.teachers.cache.files import COMPLETE, read_facts
from sad.teachers.cached import CachedTeacher
from sad.teachers.frozen import FrozenTeacher
from sad.training import cache_imported_hidden, imported_rows
from sad.training.run import distill

Make = Callable[..., DistillConfig]

LENGTH = 40
COUNT = 20
FAMILIES = ("llama", "gemma2")


def tiny_gemma2() -> Gemma2ForCausalLM:
    """A norm that multiplies by 1 + weight, and a softcapped head that is the embedding."""
    config = Gemma2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        sliding_window=32,
        initializer_range=0.1,
        final_logit_softcapping=5.0,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return Gemma2ForCausalLM(config).eval()


def save_teacher(folder: Path, family: str, seed: int = 1) -> str:
    """A teacher in bfloat16 whose norms are no ones: what leaves one out shows."""
    model: Any = tiny_gemma2() if family == "gemma2" else tiny_llama(seed=seed, num_hidden_layers=3)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.model.norm.weight += torch.randn(32, generator=draw).abs() + 0.5
    return save_tiny(folder, model.to(torch.bfloat16))


class Document(NamedTuple):
    tokens: torch.Tensor  # int64 [n]
    layers: torch.Tensor  # bf16 [n, 3, 32]: what the layers gave
    final: torch.Tensor  # bf16 [n, 32]: what the norm made of the last of them


def documents(teacher: str) -> list[Document]:
    tokenizer = tiny_tokenizer()
    model: Any = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16)
    kept: list[torch.Tensor] = []
    for module in (*model.model.layers[1:], model.model.norm):
        module.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    model.model.norm.register_forward_hook(lambda _, inputs, output: kept.append(output))
    lines = TEXT.strip().splitlines()
    found = []
    for i in range(COUNT):
        text = f"{i} {lines[i % len(lines)][i : i + 60]}"
        tokens = torch.tensor(tokenizer(text)["input_ids"][:LENGTH])
        kept.clear()
        with torch.no_grad():
            model(tokens[None])
        *layers, final = (states[0].clone() for states in kept)
        found.append(Document(tokens, torch.stack(layers, 1), final))
    return found


def write(folder: Path, known: list[Document]) -> Path:
    """The files that vLLM writes, and the locks that it leaves beside them."""
    folder.mkdir(parents=True)
    for i, document in enumerate(known):
        path = folder / f"{(i * 7) % COUNT}-cmpl-{i:04x}.safetensors"
        tensors = {"hidden_states": document.layers, "token_ids": document.tokens}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        path.with_name(path.name + ".lock").touch()
    return folder


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imported_rows, "BATCH_ROWS", 2)
    monkeypatch.setattr(verify, "BATCHES", 100)  # all of them


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("exporting")
    return {family: save_teacher(folder / family, family) for family in FAMILIES}


@pytest.fixture(scope="session")
def exported(teachers: dict[str, str]) -> dict[str, list[Document]]:
    return {family: documents(teacher) for family, teacher in teachers.items()}


@pytest.fixture
def make_config(tmp_path: Path, teachers: dict[str, str]) -> Make:
    save_tiny(tmp_path / "student", tiny_llama(seed=2))

    def make(family: str = "llama", **overrides: Any) -> DistillConfig:
        defaults: dict[str, Any] = {
            "teacher": teachers[family],
            "teacher_dtype": "bfloat16",
            "temperature": 2.0,
            "data": {"eval_fraction": 0.3, "cache_dir": str(tmp_path / "rows")},
            "max_length": LENGTH,
        }
        return import_config(tmp_path, **(defaults | overrides))

    return make


run_import = partial(support.imports.run_import, kind="hidden", codec="bf16")


# What becomes of them


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("codec", "bound"), [("bf16", 0.0), ("int8", 0.02)])
def test_a_run_reads_the_teachers_final_states(
    make_config: Make,
    exported: dict[str, list[Document]],
    tmp_path: Path,
    family: str,
    codec: str,
    bound: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path / "states", exported[family])
    config = make_config(family)
    folder = run_import(config, path, codec=codec)
    assert not (folder / "import-spool").exists()
    known = {tuple(one.tokens.tolist()): one for one in exported[family]}
    seen = 0
    for batch, target in targets_read(config):
        assert isinstance(target, TeacherHidden)
        length = int(batch.lengths[0])
        row = batch.input_ids[0, :length].tolist()
        assert (batch.labels[0, :length] >= 0).all()
        document = known.pop((*row, int(batch.labels[0, length - 1])))
        difference = (target.hidden[0, :length].float() - document.final[:-1].float()).norm()
        assert difference <= bound * document.final.float().norm()
        seen += 1
    assert seen == COUNT and not known

    found = read_facts(folder)
    assert found is not None
    facts, notes = found
    assert (facts.kind, facts.codec, facts.teacher.dtype) == ("hidden", codec, "vllm-hidden")
    assert facts.teacher.name == config.teacher
    compared = notes["compared"]
    assert abs(compared["nll"] - compared["teacher_nll"]) < 1e-3 and compared["kl"] < 1e-3

    capsys.readouterr()
    run_import(replace(config, max_eval_rows=1), path, codec=codec, check=True)
    assert "holds the targets of" in capsys.readouterr().out
    before = {one.name: one.stat().st_mtime_ns for one in folder.iterdir()}
    run_import(config, path, codec=codec)
    assert "nothing to do" in capsys.readouterr().out
    assert before == {one.name: one.stat().st_mtime_ns for one in folder.iterdir()}


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_a_student_learns_what_it_learns_of_the_teacher_itself(
    make_config: Make,
    exported: dict[str, list[Document]],
    tmp_path: Path,
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(family, learning_rate=1e-2, logging_steps=1)
    run_import(config, write(tmp_path / "states", exported[family]))
    cached = distill(config)

    live = FrozenTeacher(load_teacher(config), VOCAB_SIZE, device=torch.device("cpu"))
    asked = []

    def forward(self: CachedTeacher, batch: Any, capture: Any = None) -> Any:
        asked.append(len(batch.input_ids))
        return live.forward(batch)

    monkeypatch.setattr(CachedTeacher, "forward", forward)
    other = replace(config, output_dir=str(tmp_path / "live"))
    itself = distill(other)
    assert asked
    steps = [
        [line for line in read_log(Path(one.output_dir)) if line["kind"] == "train"]
        for one in (config, other)
    ]
    assert len(steps[0]) == len(steps[1]) == 4
    for ours, theirs in zip(*steps, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
    for name in ("eval/kl", "eval/nll", "eval_teacher/nll"):
        assert cached.metrics[name] == pytest.approx(itself.metrics[name], abs=2e-3), name


def test_the_command_sees_by_itself_what_the_files_are(
    make_config: Make, exported: dict[str, list[Document]], teachers: dict[str, str], tmp_path: Path
) -> None:
    path = write(tmp_path / "states", exported["llama"])
    make_config()
    file = tmp_path / "run.yaml"
    file.write_text(
        f"student: {tmp_path}/student\nteacher: {teachers['llama']}\nteacher_dtype: bfloat16\n"
        f"temperature: 2\nmax_length: {LENGTH}\npacking: false\nmax_steps: 2\n"
        "per_device_train_batch_size: 4\n"
        f"data: {{eval_fraction: 0.3, cache_dir: {tmp_path}/rows}}\n"
    )
    out = str(tmp_path / "cache")
    words = ["cache-teacher", str(file), "--output", out, "--import", str(path)]
    assert main([*words, "--kind", "topk"]) == 2
    assert main(words) == 0
    assert main([*words, "--check"]) == 0
    found = read_facts(tmp_path / "cache")
    assert found is not None and found[0].codec == "int8"
    run = ["distill", str(file), "--teacher_cache", out, "--output_dir", str(tmp_path / "run")]
    assert main(run) == 0


def test_an_interrupted_import_goes_on(
    make_config: Make,
    exported: dict[str, list[Document]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(tmp_path / "states", exported["llama"])
    config = make_config()
    expected = json.loads((run_import(config, path, codec="int8") / COMPLETE).read_text())["files"]
    from sad.teachers.cache import writer

    write_shard, written = writer.write_shard, []

    def fails(shard: Path, *others: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        write_shard(shard, *others)

    other = f"{config.teacher_cache}-2"
    monkeypatch.setattr(writer, "write_shard", fails)
    with pytest.raises(KeyboardInterrupt):
        run_import(config, path, codec="int8", output=other)
    monkeypatch.setattr(writer, "write_shard", write_shard)
    folder = run_import(config, path, codec="int8", output=other)
    assert json.loads((folder / COMPLETE).read_text())["files"] == expected
    with pytest.raises(UsageError, match="of the same files, teacher and teacher_dtype"):
        run_import(make_config(teacher_dtype="float32"), path, codec="int8", output=other)
    changed = sorted(path.glob("*.safetensors"))[0]
    tensors = load_file(changed)
    save_file(tensors | {"hidden_states": tensors["hidden_states"] * 1.5}, changed)
    with pytest.raises(UsageError, match="a cache of the same files"):
        run_import(config, path, codec="int8", output=other)


def test_a_check_sees_states_that_are_not_the_teachers(
    make_config: Make,
    exported: dict[str, list[Document]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = [one._replace(layers=one.layers[:, :-1]) for one in exported["llama"]]
    path = write(tmp_path / "states", wrong)
    known = cache_imported_hidden.Agreement(0.0, 0.0, 0.0)
    monkeypatch.setattr(cache_imported_hidden, "require_own_states", lambda *_: known)
    run_import(make_config(), path)
    with pytest.raises(UnfitError, match="must hold the targets of"):
        run_import(make_config(), path, check=True)
    with pytest.raises(UsageError, match="must be a cache to be checked"):
        run_import(make_config(), path, check=True, output=str(tmp_path / "none"))


# What is refused

Change = Callable[[Document], Document]


def each(change: Change) -> Callable[[list[Document]], list[Document]]:
    return lambda known: [change(one) for one in known]


def one_of_them(change: Change) -> Callable[[list[Document]], list[Document]]:
    return lambda known: [*known[:5], change(known[5]), *known[6:]]


def with_layers(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda one: one._replace(layers=change(one.layers))


def with_tokens(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda one: one._replace(tokens=change(one.tokens))


def set_to(value: float, row: Any, layer: Any = -1) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(layers: torch.Tensor) -> torch.Tensor:
        layers = layers.clone()
        layers[row, layer] = value
        return layers

    return change


def another_document(known: list[Document]) -> list[Document]:
    """The states of other documents, cut to the same length: those of a confused server."""
    turned = [*known[1:], known[0]]
    pairs = [(a, b, min(len(a.tokens), len(b.tokens))) for a, b in zip(known, turned, strict=True)]
    return [Document(a.tokens[:n], b.layers[:n], b.final[:n]) for a, b, n in pairs]


LOSSES = (
    r"got a loss of (\d+\.\d+) where the teacher has (\d+\.\d+), and a divergence of (\d\.\d+), "
)
REFUSALS: dict[str, tuple[Callable[[list[Document]], list[Document]], str]] = {
    "a layer too early": (
        each(with_layers(lambda x: x[:, :-1])),
        LOSSES + "over 8 documents; they are of another layer, model or text: export layer 3 ",
    ),
    "the last layer is not last": (
        each(with_layers(lambda x: x.flip(1))),
        LOSSES + "over 8 documents; number 1 of the 3 exported layers agrees, not the last",
    ),
    "after the norm": (
        each(lambda one: one._replace(layers=one.final[:, None])),
        LOSSES + "over 8 documents; they are normed already",
    ),
    "states of the token before": (
        each(with_layers(lambda x: x.roll(1, 0))),
        LOSSES + "over 8 documents; they are those of the token before",
    ),
    "states of the token after": (
        each(with_layers(lambda x: x.roll(-1, 0))),
        LOSSES + "over 8 documents; they are those of the token after",
    ),
    "ids of the next token": (each(with_tokens(lambda x: x.roll(-1))), LOSSES),
    "another document": (another_document, LOSSES),
    "infinity": (
        one_of_them(with_layers(set_to(torch.inf, 3))),
        "must hold finite hidden_states, got NaN or infinity at 1 of .* tokens, first at 3",
    ),
    "NaN": (one_of_them(with_layers(set_to(torch.nan, 0))), "NaN or infinity at 1 of"),
    "never computed": (
        one_of_them(with_layers(set_to(0.0, slice(4), slice(None)))),
        "got only zeros at 4 of .* tokens, first at 0: they were not computed; export it again",
    ),
    "fewer states than tokens": (
        one_of_them(with_layers(lambda x: x[2:])),
        r"hidden_states of each token, got 25 and 27 token_ids; export it again without prefix",
    ),
    "one token": (
        one_of_them(lambda one: Document(one.tokens[:1], one.layers[:1], one.final[:1])),
        "must hold 2 tokens at least, got 1, which nothing follows",
    ),
    "another width": (
        one_of_them(with_layers(lambda x: torch.cat([x, x], 2))),
        "of the teacher's width, 32, got 64; export those of",
    ),
    "integers": (
        one_of_them(with_layers(lambda x: x.to(torch.int32))),
        r"hidden_states \[n, layers, width\] of floating point .* got .*'hidden_states' int32",
    ),
    "no layers": (one_of_them(with_layers(lambda x: x[:, 0])), r"must hold hidden_states \[n, lay"),
    "ids that are none": (
        one_of_them(with_tokens(lambda x: x.float())),
        r"token_ids \[n\] of integers, .* got 'token_ids' float32",
    ),
    "an id out of range": (
        one_of_them(with_tokens(lambda x: x.index_fill(0, torch.tensor([1]), VOCAB_SIZE))),
        "must hold ids of the tokenizer, below 512, got 512",
    ),
    "a negative id": (
        one_of_them(with_tokens(lambda x: x.index_fill(0, torch.tensor([1]), -1))),
        "must hold ids of the tokenizer, below 512, got -1",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_wrong_states_are_refused_in_one_line(
    make_config: Make, exported: dict[str, list[Document]], tmp_path: Path, name: str
) -> None:
    change, complaint = REFUSALS[name]
    path = write(tmp_path / "states", change(exported["llama"]))
    with pytest.raises(UnfitError, match=complaint) as raised:
        run_import(make_config(), path)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "cache" / "cache.json").exists()


def test_gemmas_states_before_its_norm_are_not_taken_for_normed_ones(
    make_config: Make, exported: dict[str, list[Document]], tmp_path: Path
) -> None:
    known = [one._replace(layers=one.final[:, None]) for one in exported["gemma2"]]
    with pytest.raises(UnfitError, match=LOSSES + "over 8 documents; they are normed already"):
        run_import(make_config("gemma2"), write(tmp_path / "states", known))


@pytest.mark.parametrize("alike", ["loss", "distributions"])
def test_loss_and_distributions_must_both_be_the_teachers(
    make_config: Make,
    exported: dict[str, list[Document]],
    teachers: dict[str, str],
    tmp_path: Path,
    alike: str,
) -> None:
    """Noise that the mean loss does not see, and so little of it that only the loss does: it is
    added where it makes the next token less likely, and taken away where it does not; or the other
    way round everywhere."""
    model: Any = AutoModelForCausalLM.from_pretrained(teachers["llama"], dtype=torch.bfloat16)
    draw = torch.Generator().manual_seed(6)
    scales = torch.tensor([1.0, 0.75, 0.5, 0.25] if alike == "loss" else [0.0625])
    scales = torch.cat([scales, -scales]).to(torch.bfloat16)

    def losses(states: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = model.lm_head(model.model.norm(states)).float()
        return torch.nn.functional.cross_entropy(logits, following, reduction="none")

    known = []
    for one in exported["llama"]:
        states, following = one.layers[:-1, -1], one.tokens[1:]
        noise = torch.randn(states.shape, generator=draw).to(states) * states.float().std()
        exact = losses(states, following)
        changes = torch.stack([losses(states + c * noise, following) - exact for c in scales])
        chosen, balance = torch.zeros(len(states), 1).to(states), 0.0
        for i, change in enumerate(changes.T):
            best = int((balance + change).abs().argmin() if alike == "loss" else change.argmin())
            chosen[i], balance = scales[best], balance + float(change[best])
        noisy = torch.cat([states + chosen * noise, one.layers[-1:, -1]])
        known.append(one._replace(layers=noisy[:, None]))
    with pytest.raises(UnfitError, match=LOSSES) as raised:
        run_import(make_config(), write(tmp_path / "states", known))
    found = re.search(LOSSES, str(raised.value))
    assert found is not None
    ours, theirs, divergence = map(float, found.groups())
    assert (abs(ours - theirs) < 0.01, divergence < 0.01) == (alike == "loss", alike != "loss")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_floating_point_is_taken(
    make_config: Make, exported: dict[str, list[Document]], tmp_path: Path, dtype: torch.dtype
) -> None:
    known = [one._replace(layers=one.layers[:, -1:].to(dtype)) for one in exported["llama"]]
    assert (run_import(make_config(), write(tmp_path / "states", known)) / COMPLETE).exists()


def test_files_that_are_no_such_files_are_refused(
    make_config: Make, exported: dict[str, list[Document]], tmp_path: Path
) -> None:
    config = make_config()
    path = write(tmp_path / "states", exported["llama"])
    file = sorted(path.glob("*.safetensors"))[3]
    content = file.read_bytes()

    def refused(complaint: str, what: Path = path, error: type[SadError] = UnfitError) -> None:
        with pytest.raises(error, match=complaint) as raised:
            run_import(config, what)
        assert "\n" not in str(raised.value)

    for cut in (0, 4, 30, len(content) - 10):
        file.write_bytes(content[:cut])
        refused(f"{file.name} must be a whole safetensors file, got ")
    save_file({"token_ids": torch.arange(5)}, file)
    refused(r"must hold hidden_states \[n, layers, width\].*got 'token_ids' int64 \[5\]")
    save_file({"hidden_states": torch.ones(5, 1, 32)}, file)
    refused(r"must hold hidden_states .* and token_ids \[n\].*got 'hidden_states' float32")
    file.write_bytes(content)
    refused("name a folder of such files", tmp_path / "student")  # a model's weights
    (tmp_path / "empty").mkdir()
    refused(r"files that end in \.safetensors, got none", tmp_path / "empty", UsageError)
    refused("got no held-out ones|got no training ones", file)


def test_documents_are_whole_rows_of_the_tokenizer(
    make_config: Make, exported: dict[str, list[Document]], tmp_path: Path
) -> None:
    path = write(tmp_path / "states", exported["llama"])
    with pytest.raises(UnfitError, match=r"must have at most max_length \+ 1 = 9 tokens"):
        run_import(make_config(max_length=8), path)
    with pytest.raises(UnfitError, match="for training and for evaluations"):
        run_import(make_config(data={"eval_fraction": 1e-9}), path)
    short = tmp_path / "short"
    shutil.copytree(make_config().teacher or "", short)
    declared = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(declared | {"max_position_embeddings": 16}))
    with pytest.raises(UnfitError, match="must be at most the 16 positions that the teacher knows"):
        run_import(make_config(teacher=str(short)), path)
    with pytest.raises(UsageError, match="packing must be false"):
        run_import(make_config(packing=True), path)
    with pytest.raises(UsageError, match="teacher must be given to import hidden states"):
        run_import(make_config(teacher=None), path)


def test_a_teacher_with_other_ids_or_without_a_norm_is_refused(
    make_config: Make,
    exported: dict[str, list[Document]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(tmp_path / "states", exported["llama"])
    theirs = tiny_tokenizer(vocab_size=300)
    other = save_tiny(tmp_path / "other", tiny_qwen3(vocab_size=300), theirs)
    with pytest.raises(UnfitError, match="teacher and student tokenizers must be equal"):
        run_import(make_config(teacher=other), path)
    more = tiny_tokenizer()
    more.add_tokens("<more>")  # ids that a map finds
    student = save_tiny(tmp_path / "more", tiny_llama(vocab_size=520), more)
    with pytest.raises(UnfitError, match="must have the student's ids to import its hidden states"):
        run_import(make_config(student=student), path)
    model: Any = tiny_llama()
    forward = type(model.model).forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 2
        return output

    monkeypatch.setattr(type(model.model), "forward", doubled)
    with pytest.raises(UnfitError, match="must have a final norm, one module between its last"):
        run_import(make_config(), path)


# Words of the command line


def test_options_say_what_goes_with_hidden_states(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    words = ["--output", "out", "--import", str(tmp_path)]
    assert read_cache_options(words)[0].kind == "hidden"
    assert read_cache_options([*words, "--import_format", "vllm"])[0].kind == "topk"
    assert read_cache_options([*words[:3], "gone", "--import_format", "vllm-hidden"])[0].check is (
        False
    )
    for more, complaint in (
        ("--kind topk --import_format vllm-hidden", "kind must be hidden with --import_format vll"),
        ("--kind hidden --import_format vllm", "kind must be topk with --import_format vllm"),
        ("--kind sampled", "kind must be topk or hidden with --import"),
        ("--window 2", "window must be 0 with --import"),
        ("--temperatures 2", "temperatures must be left out with --kind hidden"),
        ("--kind topk --check", "check must be left out with --import"),
        ("--server http://host", "import must be left out with --server"),
    ):
        with pytest.raises(UsageError, match=complaint):
            read_cache_options([*words, *more.split()])


def test_the_help_names_every_format() -> None:
    from typing import get_args

    assert all(name in CACHE_OPTIONS for name in get_args(ImportFormat))
