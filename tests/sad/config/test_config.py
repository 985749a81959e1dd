"""The configuration: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sad_kernels import Objective

from sad.config import schema
from sad.config.help import EXPLAINED, RENAMED, about_unknown_key, field_docs, keys_help
from sad.config.identity import config_hash, require_same_run, trajectory_changes
from sad.config.load import load_config
from sad.config.schema import (
    MAY_CHANGE_ON_RESUME,
    STRUCTURAL,
    USUAL_DEVICES,
    CurriculumConfig,
    DataConfig,
    DistillConfig,
    FeatureConfig,
    ce_only,
    config_to_dict,
    config_to_yaml,
)
from sad.config.sections import Section
from sad.config.values import (
    ConfigError,
    FractionBelowOne,
    PositiveInt,
    field_types,
    input_paths,
    leaf_types,
    section_types,
)
from sad.curriculum import RAMPS
from sad.errors import UsageError
from sad.losses.structural import LOSSES
from sad.recipes import recipe_names

MINIMAL = "student: s\nteacher: t\n"


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str, *overrides: str, name: str = "run.yaml") -> DistillConfig:
    return load_config(write(folder, text, name), overrides)


def config(**values: Any) -> DistillConfig:
    given: dict[str, Any] = {"student": "s", "teacher": "t"}
    return DistillConfig(**(given | values))


# Reading


def test_command_line_beats_file_beats_default(tmp_path: Path) -> None:
    text = MINIMAL + "temperature: 3\nseed: 7\ndata:\n  text_field: body\n"
    loaded = load(tmp_path, text, "--seed", "8", "--data.train=a.txt", "--data.eval", "b", "c")
    assert (loaded.temperature, loaded.seed, loaded.beta) == (3.0, 8, 0.5)
    assert loaded.data == DataConfig(text_field="body", train=("a.txt",), eval=("b", "c"))
    assert isinstance(loaded.temperature, float)


def test_numbers_that_pyyaml_reads_as_texts_are_numbers(tmp_path: Path) -> None:
    loaded = load(tmp_path, MINIMAL + "learning_rate: 1e-4\nmax_steps: 1e3\n")
    assert loaded.learning_rate == 1e-4
    assert loaded.max_steps == 1000 and type(loaded.max_steps) is int


@pytest.mark.parametrize("word, value", [("false", False), ("False", False), ("TRUE", True)])
def test_switches_take_any_case(tmp_path: Path, word: str, value: bool) -> None:
    assert load(tmp_path, MINIMAL, "--use_ema", word).use_ema is value
    assert load(tmp_path, MINIMAL + f"use_ema: '{word}'\n").use_ema is value


def test_a_bare_switch_is_true_and_the_last_of_two_values_wins(tmp_path: Path) -> None:
    loaded = load(tmp_path, MINIMAL, "--bf16", "--seed", "1", "--seed", "2")
    assert loaded.bf16 is True and loaded.seed == 2


def test_negative_numbers_null_and_lists_on_the_command_line(tmp_path: Path) -> None:
    text = MINIMAL + "max_steps: 5\neval_steps: 3\nreport_to: wandb\n"
    loaded = load(
        tmp_path, text, "--max_steps", "-1", "--eval_steps", "null", "--report_to", "--debug"
    )
    assert (loaded.max_steps, loaded.eval_steps, loaded.report_to) == (-1, None, ())
    assert loaded.debug is True
    assert load(tmp_path, text).report_to == ("wandb",)


@pytest.mark.parametrize(
    ("words", "layers"),
    [(["4"], 4), (["[4]"], (4,)), (["0", "3", "-1"], (0, 3, -1)), (["[0, 3]"], (0, 3))],
)
def test_a_number_or_a_list(tmp_path: Path, words: list[str], layers: Any) -> None:
    path = write(tmp_path, "teacher: t\nstudent_init: layers\nstudent_layers: 2\n")
    found = load_config(path, ["--student_layers", *words])
    assert found.student_layers == layers and load_config(path).student_layers == 2
    path.write_text(config_to_yaml(found))
    assert load_config(path) == found
    assert "--student_layers INT|INT ..." in keys_help()
    with pytest.raises(UsageError, match=r"student_layers must be a whole number, got 'few'"):
        load_config(path, ["--student_layers", "few"])


def test_a_mapping_is_read_whole_whatever_its_names_are(tmp_path: Path) -> None:
    """Names may have dots, which else divide a section from its key."""
    pattern = {r"layers\.0\.q_proj": 4, "v.proj": 2}
    text = MINIMAL + "peft:\n  rank_pattern:\n    layers\\.0\\.q_proj: 4\n    v.proj: '2'\n"
    found = load(tmp_path, text)
    assert found.peft.rank_pattern == pattern
    content = {"student": "s", "teacher": "t", "peft": {"rank_pattern": pattern}}
    assert load(tmp_path, json.dumps(content), name="run.json") == found
    assert load(tmp_path, MINIMAL, "--peft.rank_pattern", json.dumps(pattern)) == found
    assert load(tmp_path, config_to_yaml(found)) == found
    assert "--peft.rank_pattern {TEXT: INT, ...}" in keys_help()
    for words, message in (
        (("--peft.rank_pattern", "q_proj"), "peft.rank_pattern must be a mapping, got 'q_proj'"),
        (("--peft.rank_pattern", '{"q": "x"}'), "peft.rank_pattern must be a whole number, got"),
        (("--peft.rank_pattern.q", "2"), "peft.rank_pattern must be given as a whole, got 'peft"),
    ):
        with pytest.raises(UsageError, match=message):
            load(tmp_path, MINIMAL, *words)
    with pytest.raises(UsageError, match=r"peft.rank_pattern: q must be given once.*a\.yaml:6"):
        load(tmp_path, MINIMAL + "peft:\n  rank_pattern:\n    q: 4\n    q: 2\n", name="a.yaml")


def test_a_mapping_is_compared_whole_and_in_its_order() -> None:
    """Of patterns the first that fits counts, and one that is gone is a change."""
    both, one = {"q_proj": 4, ".*proj": 2}, {"q_proj": 4}
    old = config_to_dict(config(peft={"rank_pattern": both}))
    key = "peft.rank_pattern"
    assert trajectory_changes(old, config(peft={"rank_pattern": both})) == []
    assert trajectory_changes(old, config(peft={"rank_pattern": one})) == [(key, both, one)]
    other = dict(reversed(both.items()))
    assert trajectory_changes(old, config(peft={"rank_pattern": other})) == [(key, both, other)]


def test_json_reads_like_yaml(tmp_path: Path) -> None:
    content = {"student": "s", "teacher": "t", "data": {"train": ["a", "b"]}, "seed": 3}
    loaded = load(tmp_path, json.dumps(content, indent="\t"), name="run.json")
    assert loaded == config(data=DataConfig(train=("a", "b")), seed=3)


def test_python_values_convert_too(tmp_path: Path) -> None:
    built = config(
        output_dir=tmp_path, learning_rate="3e-4", data={"train": "a.txt"}, report_to=["wandb"]
    )
    assert built.output_dir == str(tmp_path) and built.learning_rate == 3e-4
    assert built.data.train == ("a.txt",) and built.report_to == ("wandb",)


def test_paths_in_a_file_mean_its_own_folder_first(tmp_path: Path, monkeypatch: Any) -> None:
    recipes, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    (recipes / "model").mkdir(parents=True)
    (recipes / "text").mkdir()
    (elsewhere / "model").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    text = "student: model\nteacher: org/teacher\ndata: {train: [text, more]}\noutput_dir: text\n"
    loaded = load(recipes, text)
    assert loaded.student == str(recipes / "model")
    assert loaded.teacher == "org/teacher"
    assert loaded.data.train == (str(recipes / "text"), "more")
    assert loaded.output_dir == "text"  # what is written goes where the user is
    assert load(recipes, text, "--student", "model").student == "model"  # the user's own folder
    data = ("data.train", "data.eval", "data.chat_template_path")
    models = ("student", "teacher", "teacher_cache", "vocab_map", "teacher_tokenizer")
    paths = (*models, "tokenizer", *data)
    assert input_paths(DistillConfig) == paths


def test_bundled_recipes_load() -> None:
    assert "quickstart" in recipe_names()
    for name in recipe_names():
        assert Path(load_config(name).student).is_absolute(), name


def test_a_saved_configuration_loads_to_an_equal_one(tmp_path: Path) -> None:
    original = config(
        data=DataConfig(train=("a: b", "ü"), document_separator="\n---\n"),
        learning_rate=1e-5,
        report_to=("wandb", "trackio"),
        teacher_device="cpu",
    )
    assert load(tmp_path, config_to_yaml(original)) == original
    assert load(tmp_path, json.dumps(config_to_dict(original)), name="a.json") == original


# Refusing


REFUSED_KEYS = [
    ("ema_decya: 0.9", "unknown key 'ema_decya'; did you mean 'ema_decay'? ({path}:3)"),
    ("train: x", "unknown key 'train'; did you mean 'data.train'? ({path}:3)"),
    ("optimizer:\n  lr: 1", "unknown key 'optimizer.lr'; here it is 'learning_rate' ({path}:4)"),
    ("label_smoothing_factor: 0", "here it is 'label_smoothing' ({path}:3)"),
    ("kd_ratio: 0.5", "write ce_weight: 1 - r and kd_weight: r ({path}:3)"),
    ("seq_kd: true", "lmbda: 1 learns from the student's own"),
    ("max_new_tokens: 5", "here it is 'max_completion_length'"),
    ("num_generations: 5", "the student itself writes, once per prompt"),
    ("jsd_beta: 0.1", "beta: 1 - jsd_beta"),
    ("loss_functions:\n- {function: kl, weight: 1}", "a weight is ce_weight or kd_weight"),
    ("per-device-eval-batch-size: 1", "did you mean 'per_device_eval_batch_size'?"),
    ("xyzzy: 1", "unknown key 'xyzzy'; `sad distill --help` lists all keys ({path}:3)"),
    ("use_cache: false", "unknown key 'use_cache'; training uses no cache"),  # not use_ema
    ("use_lora: true", "peft: {{r: 16}}"),
    ("deepspeed: zero3.json", "torchrun --nproc_per_node N -m sad distill"),  # not seed
    ("load_in_4bit: true", "teacher_quantization: int8 or int4 quantizes the frozen"),
    ("num_gpus: 2", "torchrun --nproc_per_node N -m sad distill"),  # not layerwise.num_pairs
    ("kd_alpha: 0.5", "as the weight of the teacher it is kd_weight"),  # not taid.alpha
    ("eval_every: 5", "here it is 'eval_steps'"),
    ("use_frobnication: 1", "'use_frobnication'; `sad distill --help` lists all keys"),
    ("restore_callback_states_from_checkpoint: true", "`sad distill --help` lists all keys"),
    ("data: ./folder", "data must be a section, got a value; set one of its keys: data.train"),
    ("seed: 1\nseed: 2", "seed must be given once, got it twice; remove one ({path}:4)"),
    ("data: {train: a}\ndata.train: b", "data.train must be given once"),
]


@pytest.mark.parametrize("text, message", REFUSED_KEYS)
def test_a_wrong_key_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, MINIMAL + text)
    assert message.format(path=tmp_path / "run.yaml") in str(caught.value)
    assert caught.value.exit_code == 2


REFUSED_VALUES = [
    ("learning_rate: fast", "learning_rate must be a finite number, got 'fast'"),
    ("learning_rate: .nan", "learning_rate must be a finite number, got nan"),
    ("learning_rate: -1", "learning_rate must be at least 0, got -1.0"),
    ("learning_rate: true", "learning_rate must be a finite number, got True"),
    ("learning_rate: null", "learning_rate must be a finite number, got None"),
    ("max_steps: 2.5", "max_steps must be a whole number, got 2.5"),
    ("max_steps: 0", "max_steps must be -1 or at least 1, got 0"),
    ("use_ema: 1", "use_ema must be true or false, got 1"),
    ("use_ema: maybe", "use_ema must be true or false, got 'maybe'"),
    ("output_dir: 3", "output_dir must be a text, got 3"),
    ("output_dir: ''", "output_dir must not be empty, got ''"),
    ("impl: cuda", "impl must be one of auto, triton, torch, got 'cuda'"),
    ("report_to: [wandb, paper]", "report_to must be one of tensorboard, trackio, wandb"),
    ("save_total_limit: 1", "save_total_limit must be at least 2, got 1"),
    ("gradient_accumulation_steps: 0", "gradient_accumulation_steps must be at least 1, got 0"),
    ("label_smoothing: 1.1", "label_smoothing must lie in [0, 1], got 1.1"),
    ("temperature: 0", "temperature must be a finite number > 0, got 0.0"),
    ("divergence: kl", "divergence must be one of forward_kl"),
    ("{divergence: jsd, beta: 1}", "beta must lie strictly between 0 and 1, got 1.0"),
    ("kd_weight: -0.1", "kd_weight must be a finite number >= 0, got -0.1"),
    ("kd_weight: 1.5", "kd_weight must be at most 1 unless ce_weight is given, got 1.5"),
    (
        "{kd_weight: 0, ce_weight: 0}",
        "kd_weight must be above 0 when ce_weight and all structural weights are 0, got 0.0",
    ),
    ("teacher: null", "teacher must be given unless kd_weight is 0, got None"),
    ("{bf16: true, fp16: true}", "fp16 must be false when bf16 is true, got True"),
    ("{fp16: true, param_dtype: bfloat16}", "fp16 must be false with param_dtype bfloat16"),
    ("{warmup_steps: 5, warmup_ratio: 0.1}", "warm-up must be given once, got warmup_steps=5.0"),
    ("warmup_steps: 1.5", "warmup_steps must be a whole number of steps, or a fraction below 1"),
    ("metric_for_best_model: eval_loss", "metric_for_best_model must be one of eval/nll"),
    ("{metric_for_best_model: eval_ema/nll, use_ema: false}", "must be one of eval/nll"),
    ("{metric_for_best_model: eval/kl, kd_weight: 0, teacher: null}", "must be one of eval/nll"),
    ("seed: -1", "seed must lie in [0, 2^32), got -1"),
    ("device: gpu", "device must be a device, got 'gpu'"),
    ("data: {eval_fraction: 1}", "data.eval_fraction must lie in [0, 1), got 1.0"),
    ("data: {train: [1]}", "data.train must be a text, got [1]"),
    ("data: {train: null}", "data.train must be a text, got None"),
]


@pytest.mark.parametrize("text, message", REFUSED_VALUES)
def test_a_wrong_value_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    lines = text[1:-1].split(", ") if text.startswith("{") else [text]
    base = "" if "teacher" in text else "teacher: t\n"
    with pytest.raises(UsageError) as caught:
        load(tmp_path, f"student: s\n{base}" + "\n".join(lines))
    assert message in str(caught.value)
    assert f"({tmp_path / 'run.yaml'}:" in str(caught.value)


def test_a_wrong_value_of_the_command_line_says_so(tmp_path: Path) -> None:
    for words, message in [
        (["--learning_rate", "fast"], "got 'fast'; write one such as 0.5 or 1e-4 (command line)"),
        (["--learning_rate"], "must have a value, got none; write --learning_rate VALUE (command"),
        (["--seed", "1", "2"], "must have one value, got 2: 1 2; put a value with spaces in quo"),
        (["--ema_decya", "1"], "did you mean 'ema_decay'? (command line)"),
        (["seed=1"], "overrides must be --key value pairs, got 'seed=1'"),
        (["--"], "overrides must be --key value pairs, got '--'"),
    ]:
        with pytest.raises(UsageError) as caught:
            load(tmp_path, MINIMAL, *words)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.yaml", "", "student must be given, got no such key"),
        ("a.yaml", "data:\n", "student must be given, got no such key"),
        ("a.yaml", "- a\n- b\n", "must hold 'key: value' pairs, got a seq"),
        ("a.yaml", "student: [s\nseed: 1\n", "a.yaml:2)"),
        ("a.yaml", "student: !!python/name:os.system\n", "must be YAML, got could not determine"),
        ("a.yaml", "student: \x00\n", "must be YAML"),
        ("a.json", '{"student": "s",\n "seed": }', "a.json:2)"),
        ("a.json", '{"seed": 1, "seed": 2}', "seed must be given once, got it twice"),
        ("a.json", "[1]", "must hold 'key: value' pairs, got a list"),
        ("a.toml", "", "configuration must end in .yaml, .yml, .json"),
    ],
)
def test_a_broken_file_is_one_clear_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text, name=name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


ODD_TEXTS = [  # each was a traceback, or took seconds, or filled the terminal
    ("seed: !!int x", "must be YAML, got a value that is no int; see that line ("),
    ("seed: !!int ''", "got a value that is no int"),
    ("bf16: !!bool x", "got a value that is no bool"),
    ("seed: 0x_", "got a value that is no int"),
    ("student: !!timestamp x", "got a value that is no timestamp"),
    (f"seed: {'9' * 4301}", "got a value that is no int"),
    (f"seed: {'9' * 4299}", "seed must be a whole number below 2^63, got 9999"),
    (f"seed: 0x{'f' * 4500}", "got an integer of 18,000 bits; write one such as 8"),
    (f"learning_rate: {'9' * 400}", "learning_rate must be a finite number, got 9999"),
    (f"seed: '{'9' * 5000}'", "seed must be a whole number, got '9999"),
    (f"x: {'1:' * 20_000}1", "got a value that is no int"),
    ("data: {train: &a [*a]}", "got an alias, which stands for no value here; see that line ("),
    ("a: &a {b: 1}\ndata: *a", "got an alias"),
    ("<<: {seed: 1}", "unknown key '<<.seed'"),
    (f"data: {{train: {'[' * 5000}", "got more than 20 levels of nesting"),
    ("data: " * 30 + "{}", "must be YAML, got mapping values are not allowed here"),
    ("x: [" + "1," * 20_000 + "]", "got more than 5,000 values"),
    ("x: [" + "1, " * 50_000 + "]", "must be a configuration of at most 131,072 bytes"),
    ("? [a, b]\n: 1", "a key must be a text, got a sequence; write KEY: VALUE ("),
    (f"{'k' * 1000}: 1", "unknown key 'kkk"),
    (f"{'k' * 50}: 1\n{'k' * 50}: 1", f"{'k' * 50} must be given once"),
    (f"output_dir: {'n' * 5000}", "output_dir must be a path of at most 4,095 bytes, 255 of each"),
    (f"student: {'n' * 300}", "student must be a path of at most 4,095 bytes, 255 of each"),
    (f"data: {{train: [a, {'n/' * 2500}]}}", "data.train must be a path of at most 4,095 bytes"),
    ('data: {train: ""}', "data.train must be a path"),
    ("student: ~nobody-of-this-name/x", "student must be a path"),
    ('output_dir: "a\\0b"', "output_dir must be a path of"),
    ('student: "a\\nb\\e[31m"', r"without control characters, got 'a\nb\x1b[31m'; check"),
    ('student: "\\ud800"', r"student must be Unicode text, got '\ud800'; write each character"),
    ('"\\e[31m": 1', r"unknown key '\x1b[31m'; `sad distill --help` lists"),
    ('"\\e[31m": 1\n"\\e[31m": 1', r"\x1b[31m must be given once"),
    (f"data: {{text_field: {'n' * 256}}}", "data.text_field must be a name of at most 255 bytes"),
    (f"attention: {{layers: '{'[' * 5000}'}}", "attention.layers must be a list of lists, got '["),
    (f"attention: {{layers: '[[{'9' * 5000}]]'}}", "attention.layers must be a list of lists"),
    ("max_length: 9223372036854775808", "max_length must be a whole number below 2^63, got 92233"),
    ("max_length: 9223372036854775807", "max_length must be below 2^31, got 9223372036854775807"),
    ("peft: {layers_to_transform: [9223372036854775808]}", "must be a whole number below 2^63"),
    ("data: {num_proc: 100000}", "data.num_proc must be at most 1,024, got 100000"),
    ("warmup_steps: 1e10", "warmup_steps must be below 2^31, got 10000000000.0"),
    ("warmup_steps: 1e300", "warmup_steps must be a number below 2^63, got '1e300'"),
    ("num_train_epochs: 1e7", "num_train_epochs must be at most a million, got 10000000.0"),
    ("device: meta", "device must be a device, got 'meta'; write auto, cpu, cuda or one such as"),
    ("device: meta:0", "device must be a device, got 'meta:0'"),
    ("teacher_device: meta", "teacher_device must be a device, got 'meta'"),
    ("device: cuda:99999999999999999999", "device must be a device"),
    ("learning_rate: 1e38", "learning_rate must be a number below 2^63, got '1e38'"),
    (
        "learning_rate: 1e4\nadam_beta2: 0.5\nmax_grad_norm: 0",
        "learning_rate must keep every update below 2^100, got 10000.0; weights would overflow",
    ),
    ("learning_rate: 1e18\nprojector_lr_ratio: 1e18", "learning_rate must keep every update below"),
    ("routing: {learning_rate: 1e38}", "routing.learning_rate must be a number below 2^63"),
    ("weight_decay: 1e18", "weight_decay must be at most 1 / learning_rate, got 1e+18"),
    ("temperature: 1e300", "temperature must be a number below 2^63, got '1e300'"),
    ("data: {train: [a], train_weights: 1e10}", "data.train_weights must be at most a million"),
    ("adam_epsilon: 1e-46", "adam_epsilon must be at least 1e-30, got 1e-46"),
    ("adam_beta2: 0.99999999999", "adam_beta2 must be at most 0.999999, got 0.99999999999"),
]


@pytest.mark.parametrize(
    "text, message", ODD_TEXTS, ids=[f"{n}-{text[:24]!a}" for n, (text, _) in enumerate(ODD_TEXTS)]
)
def test_an_odd_text_is_refused_at_once_in_one_line(
    tmp_path: Path, text: str, message: str
) -> None:
    base = "" if re.match("student|teacher:", text) else "student: s\n"
    begin = time.process_time()
    with pytest.raises(UsageError) as caught:
        load(tmp_path, f"teacher: t\n{base}{text}\n")
    assert time.process_time() - begin < 5, "no text may take long to be refused"
    assert message in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"seed": ' + "9" * 5000 + "}", "must hold numbers, got one of thousands of digits"),
        ("[" * 100_000, "must hold few levels of nesting, got hundreds"),
        ('{"x": ' * 970 + "1" + "}" * 970, "must hold few levels of nesting, got hundreds"),
        ('{"student": "\\ud800"}', "student must be Unicode text"),
        ('{"student": "a\\u0000"}', "student must be a path"),
        ('{"data": {"train": ' + "[" * 900 + "]" * 900 + "}}", "student must be given"),
        ('{"student": "s", "teacher": ' + "[" * 900 + "]" * 900 + "}", "teacher must be a text"),
    ],
)
def test_odd_json_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text, name="run.json")
    assert message in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    "name", ["n" * 5000 + ".yaml", "a\0.yaml", "a/" * 3000, "\udcff", "pipe.yaml"]
)
def test_a_name_that_no_file_has_is_refused_in_one_line(
    tmp_path: Path, name: str, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.yaml")
    with pytest.raises(UsageError, match="configuration must be a file or one of") as caught:
        load_config(name)
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 300


def test_an_error_in_a_file_with_a_long_name_is_short(tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["n" * 200] * 10)
    folder.mkdir(parents=True)
    for text in (
        "seed: 1\nseed: 2",
        "a: *b",
        "- a",
        "unknown: 1",
        MINIMAL + "seed: -1",
        "teacher: t",
    ):
        with pytest.raises(UsageError) as caught:
            load(folder, text)
        assert len(str(caught.value)) <= 300, text


def test_dates_are_texts(tmp_path: Path) -> None:
    loaded = load(tmp_path, "student: 2024-99-99\nteacher: t\noutput_dir: 2024-01-02\n")
    assert (loaded.student, loaded.output_dir) == ("2024-99-99", "2024-01-02")


def test_the_directory_of_a_run_may_lie_in_the_users_home(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded = load(tmp_path, MINIMAL + "output_dir: ~/x\nresume_from_checkpoint: ~/y\n")
    assert loaded.output_dir == str(tmp_path / "x")
    assert loaded.resume_from_checkpoint == str(tmp_path / "y")
    assert load(tmp_path, MINIMAL, "--output_dir", "~/z").output_dir == str(tmp_path / "z")
    assert config(output_dir="~").output_dir == str(tmp_path)


@pytest.mark.parametrize("value", ["none", "null", "[]", "[none]", "None"])
def test_no_tracker_has_a_name(tmp_path: Path, value: str) -> None:
    """``report_to: none``, as transformers has it."""
    assert load(tmp_path, MINIMAL + f"report_to: {value}\n").report_to == ()
    assert load(tmp_path, MINIMAL, "--report_to", "none").report_to == ()
    assert config(report_to="none").report_to == config(report_to=None).report_to == ()


def test_files_that_are_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"did you mean 'quickstart'\?"):
        load_config("quikstart")
    with pytest.raises(UsageError, match="check the path"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes("student: \xe9".encode("latin-1"))
    with pytest.raises(UsageError, match="must be readable as UTF-8 text"):
        load_config(tmp_path / "latin.yaml")


def test_the_dictionary_of_other_libraries_leads_to_keys_that_exist() -> None:
    known = leaf_types(DistillConfig)
    assert set(RENAMED.values()) <= known.keys()
    for foreign in RENAMED | EXPLAINED:
        assert foreign not in known
        assert "did you mean" not in about_unknown_key(foreign), "the dictionary comes first"


# Meaning


def test_the_weight_of_the_text_follows_the_configured_weight_only() -> None:
    built = config(kd_weight=0.75)
    assert built.objective() == Objective(
        ce_weight=0.25, kd_weight=0.75, temperature=2.0, label_smoothing=0.1
    )
    assert built.objective(kd_weight=0.5).ce_weight == 0.25
    assert config(ce_weight=2, kd_weight=3).objective().ce_weight == 2.0
    assert config(kd_weight=0, teacher=None).objective().ce_weight == 1.0


CHANGED = {
    "seed": 1,
    "max_steps": 9,
    "impl": "torch",
    "temperature": 1.0,
    "data": DataConfig(text_field="body"),
}
MAY_CHANGE = {
    "output_dir": "elsewhere",
    "debug": True,
    "device": "cpu",
    "save_steps": 3,
    "eval_steps": 4,
    "logging_steps": 5,
    "eval_teacher_cache": 0,
    "resume_from_checkpoint": "auto",
    "data": DataConfig(cache_dir="elsewhere"),
}


@pytest.mark.parametrize("key", CHANGED)
def test_keys_that_decide_the_trajectory_are_compared(key: str) -> None:
    old = config()
    new = replace(old, **{key: CHANGED[key]})
    name, before, after = ("data.text_field", None, "body") if key == "data" else (key,) * 3
    if key != "data":
        before, after = config_to_dict(old)[key], config_to_dict(new)[key]
    assert trajectory_changes(config_to_dict(old), new) == [(name, before, after)]
    assert config_hash(old) != config_hash(new)


@pytest.mark.parametrize("key", MAY_CHANGE)
def test_keys_that_move_no_weight_may_change(key: str) -> None:
    old = config()
    new = replace(old, **{key: MAY_CHANGE[key]})
    assert new != old
    assert trajectory_changes(config_to_dict(old), new) == []
    assert config_hash(old) == config_hash(new)


def test_a_key_newer_than_the_checkpoint_had_its_default() -> None:
    old = config_to_dict(config())
    del old["z_loss"], old["data"]["max_documents"]
    assert trajectory_changes(old, config()) == []
    assert trajectory_changes(old, config(z_loss=0.1)) == [("z_loss", 0.0, 0.1)]


def test_a_run_from_before_conversations_goes_on() -> None:
    """Its text was in the field `text`, nothing was put before it, and its rows are compared."""
    old = config_to_dict(config())
    old["data"]["text_field"] = "text"
    for key in ("add_special_tokens", "document_end", "truncation", "assistant_only_loss"):
        del old["data"][key]
    assert trajectory_changes(old, config()) == []
    off = config(data={"add_special_tokens": False})
    assert trajectory_changes(old, off) == []
    assert trajectory_changes(config_to_dict(config()), off) == [
        ("data.add_special_tokens", True, False)
    ]
    run = {"config": old, "train_rows": "1", "eval_rows": "2", "tokenizer": "3", "versions": {}}
    run |= {"world_size": 1}
    with pytest.raises(UsageError, match=r"train_rows: 1 -> 4 \(if the tokenizer adds a BOS,"):
        require_same_run(run, run | {"train_rows": "4"}, config(), print)
    with pytest.raises(UsageError, match=r"got train_rows: 1 -> 4; restore"):
        require_same_run(run, run | {"train_rows": "4"}, off, print)
    body = config(data={"text_field": "body"})
    assert trajectory_changes(old, body) == [("data.text_field", "text", "body")]


@pytest.mark.parametrize("index", ["", ":0", ":9"])
@pytest.mark.parametrize("kind", [*USUAL_DEVICES, "hpu"])
def test_devices_are_those_that_torch_knows(kind: str, index: str) -> None:
    assert str(torch.device(kind + index)) == config(device=kind + index).device


def test_the_usual_devices_are_taken_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    config()  # what else a configuration imports is there
    monkeypatch.setitem(sys.modules, "torch", None)  # to import it is an error
    assert config(device="cuda:1", teacher_device="cpu").device == "cuda:1"
    with pytest.raises(ImportError):
        config(device="hpu")


@pytest.mark.parametrize("name", ["cuda:", "cuda:x", "cuda:-1", "cuda:01", "cudas", "cpu:0:0", ""])
def test_what_is_no_device_to_torch_is_refused(name: str) -> None:
    with pytest.raises(RuntimeError):
        torch.device(name)
    with pytest.raises(ConfigError, match="device must be a device"):
        config(device=name)


def test_every_key_has_a_docstring_and_stands_in_the_help() -> None:
    text = keys_help()
    sections = {n: hint for n, hint in field_types(DistillConfig).items() if is_dataclass(hint)}
    assert {"data", *STRUCTURAL} < sections.keys()
    for name, cls in {"": DistillConfig, **sections}.items():
        docs, prefix = field_docs(cls), f"{name}." if name else ""
        for item in fields(cls):
            if prefix or item.name not in sections:
                assert len(docs[item.name]) > 10, item.name
                assert f"  --{prefix}{item.name} " in text, item.name
            assert not item.metadata or item.metadata == MAY_CHANGE_ON_RESUME
    assert "Optimizer and schedule:\n  --learning_rate NUMBER  [5e-05]" in text


def test_every_section_knows_its_key() -> None:
    for key, section in section_types(DistillConfig).items():
        assert issubclass(section, Section) and section.name == key


def test_a_structural_loss_is_a_section_with_a_weight_a_schedule_and_a_phase() -> None:
    assert set(STRUCTURAL) == {name for name in RAMPS if name != "kd"}
    assert field_types(CurriculumConfig).keys() == RAMPS.keys()
    assert set(LOSSES) == set(STRUCTURAL)


def test_cross_entropy_alone_leaves_nothing_of_the_teacher() -> None:
    on = config(
        **{name: {"weight": 0.1} for name in STRUCTURAL},
        curriculum={"kd": [[0, 1], [1, 0]]},
        taid={"enabled": True},
        routing={"mode": "student_aware"},
        data={"text_field": "body"},
    )
    off = replace(on, **ce_only())
    plain = config(kd_weight=0, ce_weight=1, data={"text_field": "body"})
    assert off == plain and on.structural_weights and not off.structural_weights


@dataclass(frozen=True, kw_only=True)
class ToySection(Section):
    name = "toy"

    steps: PositiveInt = 1
    """A key with a constraint."""
    share: FractionBelowOne | None = None
    """A key that may be None."""


def test_a_key_is_a_field_whose_type_says_what_it_must_satisfy() -> None:
    toy: Any = ToySection
    assert toy(steps="3", share="null") == toy(steps=3)
    with pytest.raises(ConfigError, match=r"toy\.steps must be at least 1, got 0; choose such"):
        toy(steps=0)
    with pytest.raises(
        ConfigError, match=r"toy\.share must lie in \[0, 1\), got 1\.0; choose such"
    ):
        toy(share=1)
    assert field_docs(ToySection) == {
        "steps": "A key with a constraint.",
        "share": "A key that may be None.",
    }


def test_sections_of_structural_losses(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "student: s\nteacher: t\nfeature: {weight: 0.1}\nlayerwise:\n  layers: [[0, 1], [-1, -1]]\n"
        "curriculum:\n  feature: [[0, 0], [0.5, 1e-1]]\n"
    )
    config = load_config(path, ["--layerwise.weight", "5e-2", "--taid.enabled", "true"])
    assert config.structural_weights == {"feature": 0.1, "layerwise": 0.05}
    assert config.layerwise.layers == ((0, 1), (-1, -1))
    assert config.curriculum.schedules() == {"feature": ((0.0, 0.0), (0.5, 0.1))}
    words = ["--layerwise.layers", "[[1, 2], [-1, -1]]", "--curriculum.kd", "[[0, 0], [1, 0.5]]"]
    config = load_config(path, words)
    assert config.layerwise.layers == ((1, 2), (-1, -1))
    assert config.curriculum.schedules()["kd"] == ((0.0, 0.0), (1.0, 0.5))
    with pytest.raises(UsageError, match=r"must be a list of lists, got '0 1'"):
        load_config(path, ["--layerwise.layers", "0 1"])
    config = load_config(path, ["--layerwise.weight", "5e-2", "--taid.enabled", "true"])
    inside_only: dict[str, Any] = {"ce_weight": 0, "kd_weight": 0, "feature": {"weight": 1}}
    assert DistillConfig(student="s", teacher="t", **inside_only).structural_weights
    assert config.taid.enabled and config.objective(teacher_share=0.5).teacher_share == 0.5
    assert load_config(write(tmp_path, config_to_yaml(config), "saved.yaml")) == config
    assert config_hash(config) != config_hash(replace(config, feature=FeatureConfig(weight=0.2)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"feature": {"weight": -1}}, "feature.weight must be at least 0, got -1.0"),
        ({"feature": {"distance": "mse"}}, "feature.distance must be one of cosine, relative_mse"),
        ({"layerwise": {"layers": [[1, 2, 3]]}}, "layerwise.layers must be pairs"),
        ({"attention": {"layers": []}}, "attention.layers must be pairs"),
        ({"curriculum": {"kd": [[0.5, 1], [0.2, 1]]}}, "curriculum.kd must be points"),
        ({"curriculum": {"kd": [[0, -1]]}}, "curriculum.kd must be points"),
        ({"taid": {"start": 0}}, r"taid.start must lie in \(0, 1\], got 0.0"),
        ({"taid": {"start": 0.9, "end": 0.5}}, "taid.start must be at most taid.end, got 0.9"),
        ({"routing": {"explore": 2}}, r"routing.explore must lie in \[0, 1\], got 2.0"),
        (
            {"kd_weight": 0, "taid": {"enabled": True}},
            "kd_weight must be above 0 with taid.enabled, got 0",
        ),
        (
            {"teacher": None, "kd_weight": 0, "feature": {"weight": 0.1}},
            "teacher must be given for feature.weight above 0, got None",
        ),
    ],
)
def test_structural_values_that_cannot_be_meant(keys: dict[str, Any], message: str) -> None:
    models: dict[str, Any] = {"student": "s", "teacher": "t"}
    with pytest.raises(UsageError, match=message):
        DistillConfig(**(models | keys))


def unread(keys: Iterable[str], source: str) -> list[str]:
    """The keys that no attribute access in ``source`` names."""
    return [key for key in keys if not re.search(rf"\.{key.rpartition('.')[2]}\b", source)]


def test_every_key_is_read_somewhere() -> None:
    """A key that is accepted, shown in the help and ignored would promise what nothing does."""
    files = Path(schema.__file__).parents[1].rglob("*.py")
    source = "".join(file.read_text() for file in files)
    keys = [key for key in leaf_types(DistillConfig) if not key.startswith("curriculum.")]
    assert unread([*keys, "feature.nobody_reads_this"], source) == ["feature.nobody_reads_this"]


@pytest.mark.parametrize("name", ["quickstart-cached", "quickstart-hidden"])
def test_recipes_from_caches_are_the_quickstart(name: str) -> None:
    """But for where the targets come from, and where the run goes."""
    ours, theirs = (config_to_dict(load_config(recipe, [])) for recipe in (name, "quickstart"))
    differing = {key for key in ours if ours[key] != theirs[key]}
    assert differing == {"teacher_cache", "output_dir"}
