"""The text of ``sad distill --help``, and explanations of keys that do not exist.

The help has every key with its type, its default and its docstring, which is read from the source
of the schema, where it stands under the field.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import sys
import textwrap
from dataclasses import MISSING, Field, fields
from functools import cache
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin

from sad_kernels._divergence_table import Divergence

from sad.config.schema import DistillConfig
from sad.config.values import field_types, leaf_types, section_types, without_none

WIDTH = 96
TYPE_WORDS = {bool: "true|false", int: "INT", float: "NUMBER", str: "TEXT"}


def keys_help() -> str:
    """One entry per key, under the headings that the schema's source gives them."""
    headings = field_headings(DistillConfig)
    sections = section_types(DistillConfig)
    blocks: list[str] = []
    for item in fields(DistillConfig):
        if item.name in headings:
            blocks.append(f"{headings[item.name]}:")
        if item.name in sections:
            section = sections[item.name]
            blocks += [_entry(section, inner, f"{item.name}.") for inner in fields(section)]
        else:
            blocks.append(_entry(DistillConfig, item, ""))
    return "\n".join(blocks)


@cache  # each key asks for those of its class
def field_docs(cls: type) -> dict[str, str]:
    """Field -> its docstring, the string literal under it in the source, on one line."""
    docs: dict[str, str] = dict(getattr(cls, "field_docs", {}))  # of fields made by a program
    # A field's docstring is a bare string after it, which only the source has.
    for statement, following in pairwise(_class_node(cls).body):
        match statement, following:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                docs[name] = " ".join(text.split())
    return docs


def field_headings(cls: type) -> dict[str, str]:
    """First field of each group -> the group's heading, the comment line above the field."""
    node = _class_node(cls)
    lines = _source(cls.__module__).splitlines()[node.lineno - 1 : node.end_lineno]
    found = re.findall(r"^    # (.+)\n    (\w+):", "\n".join(lines), re.M)
    return {name: title for title, name in found}


def _class_node(cls: type) -> ast.ClassDef:
    (node,) = (node for node in _classes(cls.__module__) if node.name == cls.__name__)
    return node


@cache  # the sections are a dozen classes of one module
def _classes(module: str) -> tuple[ast.ClassDef, ...]:
    body = ast.parse(_source(module)).body
    return tuple(node for node in body if isinstance(node, ast.ClassDef))


@cache
def _source(module: str) -> str:
    return inspect.getsource(sys.modules[module])


def _entry(cls: type, item: Field[Any], prefix: str) -> str:
    words = f"  --{prefix}{item.name} {_type_word(field_types(cls)[item.name])}"
    if item.default not in (MISSING, None, ()):
        words += f"  [{str(item.default).lower() if item.type == 'bool' else item.default}]"
    elif item.default is MISSING:
        words += "  [required]"
    indent = " " * 6
    doc = field_docs(cls)[item.name]
    return f"{words}\n{textwrap.fill(doc, WIDTH, initial_indent=indent, subsequent_indent=indent)}"


def _type_word(hint: Any) -> str:
    inner = without_none(hint)
    if get_origin(inner) is Literal:
        return "|".join(get_args(inner))
    if get_origin(inner) is tuple:
        return f"{_type_word(get_args(inner)[0])} ..."
    return TYPE_WORDS[inner]


def about_unknown_key(key: str) -> str:
    """Explain in one sentence why a key is refused: a section, a misspelling, a foreign name."""
    known = leaf_types(DistillConfig)
    # From certain to uncertain: a section without its keys, our key in another spelling or without
    # its section, a key of another library, the nearest of our keys.
    if any(name.startswith(f"{key}.") for name in known):
        inner = [name for name in known if name.startswith(f"{key}.")]
        return f"{key} must be a section, got a value; set one of its keys: {', '.join(inner)}"
    plain = key.replace("-", "_")
    short = plain.rpartition(".")[2]
    if plain in known or short in known:
        return f"unknown key {key!r}; did you mean {plain if plain in known else short!r}?"
    for name in (plain, short):
        if name in RENAMED:
            return f"unknown key {key!r}; here it is {RENAMED[name]!r}"
        if name in EXPLAINED:
            return f"unknown key {key!r}; {EXPLAINED[name]}"
    tails = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(plain, known, 1) or difflib.get_close_matches(short, tails, 1)
    if near:
        return f"unknown key {key!r}; did you mean {tails.get(near[0], near[0])!r}?"
    return f"unknown key {key!r}; `sad distill --help` lists all keys"


RENAMED = {
    # transformers
    "label_smoothing_factor": "label_smoothing",
    "lr": "learning_rate",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "dataset_text_field": "data.text_field",
    "train_file": "data.train",
    "validation_file": "data.eval",
    "max_train_samples": "data.max_documents",
    "max_eval_samples": "max_eval_rows",
    # TRL
    "truncation_mode": "data.truncation",
    "model_name_or_path": "student",
    "student_model_name_or_path": "student",
    "teacher_model_name_or_path": "teacher",
    # DistillKit, torchtune, NeMo and others
    "model": "student",
    "student_model": "student",
    "teacher_model": "teacher",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "sequence_len": "max_length",
    "sequence_length": "max_length",
    "seq_length": "max_length",
    "block_size": "max_length",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "accumulation_steps": "gradient_accumulation_steps",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "scheduler": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type",
    "clip_grad_norm": "max_grad_norm",
    "gradient_clip_val": "max_grad_norm",
    "kd_temperature": "temperature",
    "add_bos_token": "data.add_special_tokens",
    "ema": "use_ema",
    "resume": "resume_from_checkpoint",
}
"""Keys of other libraries that have the same meaning here under another name."""


_DIRECTION = f"divergence names it: {', '.join(get_args(Divergence))}"


_16_BITS = "bf16: true or fp16: true computes in 16 bits, param_dtype stores them"


_CADENCE = "eval_steps and save_steps say how often; without them it is done at the end"


_LEARNED = "data.completion_only_loss and data.assistant_only_loss say what of a record is learned"


EXPLAINED = {
    # transformers
    "load_best_model_at_end": "the best weights are always kept, in RUN_DIR/best",
    "greater_is_better": "the smallest metric_for_best_model wins",
    "optim": "the optimizer is AdamW",
    "eval_strategy": _CADENCE,
    "evaluation_strategy": _CADENCE,
    "save_strategy": _CADENCE,
    "use_cpu": "write device: cpu",
    "no_cuda": "write device: cpu",
    "trust_remote_code": "there is one per model: trust_remote_code_student and _teacher",
    "dtype": _16_BITS,
    "torch_dtype": _16_BITS,
    "global_batch_size": (
        "it is per_device_train_batch_size x gradient_accumulation_steps: set these two"
    ),
    # TRL
    "lmbda": "there is no such thing: training is off-policy, on the text of data.train",
    "seq_kd": "there is no such thing: training is off-policy, on the text of data.train",
    # Axolotl, LLaMA-Factory
    "train_on_inputs": _LEARNED,
    "train_on_prompt": _LEARNED,
    # DistillKit
    "loss_functions": (
        "a weight is ce_weight or kd_weight here, and is not divided by their sum; "
        "a function is divergence"
    ),
    "function": _DIRECTION,
    "loss_type": _DIRECTION,
    "kd_loss": _DIRECTION,
    "alpha": "as the weight of the teacher it is kd_weight, as a skew it is beta",
    # torchtune, NeMo
    "kd_ratio": "for kd_ratio: r write ce_weight: 1 - r and kd_weight: r",
    "sym_kd_ratio": (
        "it weighs two KLs, its 1 being forward: choose divergence forward_kl or reverse_kl"
    ),
    # KDFlow, DistiLLM
    "jsd_beta": "there the student's share is meant: write divergence: jsd and beta: 1 - jsd_beta",
    "lam": "with JSD write beta: 1 - lam, with a skew beta: lam",
}
"""Keys of other libraries that have no single counterpart here, and what to write instead."""
