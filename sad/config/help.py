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
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from functools import cache
from itertools import pairwise
from typing import Any, Literal, get_args, get_origin

from sad_kernels._divergence_table import Divergence

from sad.config.schema import DistillConfig
from sad.config.values import (
    field_types,
    is_union,
    leaf_types,
    section_types,
    takes_mapping,
    without_none,
)
from sad.errors import quoted

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
    if item.default not in (MISSING, None, (), ""):
        words += f"  [{str(item.default).lower() if item.type == 'bool' else item.default}]"
    elif item.default is MISSING:
        words += "  [required]"
    indent = " " * 6
    doc = field_docs(cls)[item.name]
    return f"{words}\n{textwrap.fill(doc, WIDTH, initial_indent=indent, subsequent_indent=indent)}"


def _type_word(hint: Any) -> str:
    inner = without_none(hint)
    if is_union(inner):
        return "|".join(_type_word(arg) for arg in get_args(inner))
    if get_origin(inner) is Literal:
        return "|".join(get_args(inner))
    if get_origin(inner) is tuple:
        return f"{_type_word(get_args(inner)[0])} ..."
    if takes_mapping(inner):
        return f"{{TEXT: {_type_word(get_args(inner)[1])}, ...}}"
    return TYPE_WORDS[inner]


def about_unknown_key(key: str) -> str:
    """Explain in one sentence why a key is refused: a section, a misspelling, a foreign name."""
    known = leaf_types(DistillConfig)
    # From certain to uncertain: a section without its keys, our key in another spelling or without
    # its section, a key of another library, the nearest of our keys.
    if any(name.startswith(f"{key}.") for name in known):
        inner = [name for name in known if name.startswith(f"{key}.")]
        named = ", ".join(inner[:5]) + " ..." * (len(inner) > 5)
        return f"{key} must be a section, got a value; set one of its keys: {named}"
    shown = quoted(key)
    plain = key.replace("-", "_")
    short = plain.rpartition(".")[2]
    if plain in known or short in known:
        return f"unknown key {shown}; did you mean {plain if plain in known else short!r}?"
    for name in (plain, short):
        if name in RENAMED:
            return f"unknown key {shown}; here it is {RENAMED[name]!r}"
        if name in EXPLAINED:
            return f"unknown key {shown}; {EXPLAINED[name]}"
    # A misspelling only: names that merely look alike mean something else (use_peft, use_ema).
    tails = {name.rpartition(".")[2]: name for name in known}
    for name in known:
        if plain.startswith(f"{name}.") and takes_mapping(known[name]):
            return f"{name} must be given as a whole, got {shown}; write --{name} '{{...}}'"
    near = _misspelt(plain, known) or _misspelt(short, tails)
    if near:
        return f"unknown key {shown}; did you mean {tails.get(near[0], near[0])!r}?"
    return f"unknown key {shown}; `sad distill --help` lists all keys"


def _misspelt(word: str, names: Iterable[str]) -> list[str]:
    """The name that ``word`` may be meant to be, in a list; empty if none is near enough."""
    return difflib.get_close_matches(word, names, n=1, cutoff=MISSPELT)


MISSPELT = 0.85
"""How alike a misspelt key and the one that is meant must be, as ``difflib`` counts it."""


RENAMED = {
    # transformers
    "label_smoothing_factor": "label_smoothing",
    "max_new_tokens": "max_completion_length",
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
    "lora_r": "peft.r",
    "lora_alpha": "peft.lora_alpha",
    "lora_dropout": "peft.lora_dropout",
    "lora_target_modules": "peft.target_modules",
    "lora_modules_to_save": "peft.modules_to_save",
    "use_rslora": "peft.use_rslora",
    "use_dora": "peft.use_dora",
    "lora_rank_pattern": "peft.rank_pattern",
    "lora_alpha_pattern": "peft.alpha_pattern",
    "lora_target_parameters": "peft.target_parameters",
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
    # names in use for the same thing
    "activation_checkpointing": "gradient_checkpointing",
    "adam_eps": "adam_epsilon",
    "attn_impl": "attn_implementation",
    "ce_alpha": "ce_weight",
    "compile": "torch_compile",
    "data_path": "data.train",
    "dataset_num_proc": "data.num_proc",
    "dataset_path": "data.train",
    "datasets": "data.train",
    "ema_rate": "ema_decay",
    "eval_dataset": "data.eval",
    "eval_every": "eval_steps",
    "eval_file": "data.eval",
    "eval_interval": "eval_steps",
    "eval_packing": "packing",
    "full_determinism": "deterministic",
    "hard_label_weight": "ce_weight",
    "iterations": "max_steps",
    "log_every": "logging_steps",
    "log_interval": "logging_steps",
    "logging_interval": "logging_steps",
    "max_grad": "max_grad_norm",
    "max_iters": "max_steps",
    "max_norm": "max_grad_norm",
    "max_tokens": "max_length",
    "num_steps": "max_steps",
    "num_train_steps": "max_steps",
    "out_dir": "output_dir",
    "outdir": "output_dir",
    "output": "output_dir",
    "sample_packing": "packing",
    "save_every": "save_steps",
    "save_interval": "save_steps",
    "soft_label_weight": "kd_weight",
    "total_steps": "max_steps",
    "train_dataset": "data.train",
    "use_compile": "torch_compile",
    "val_file": "data.eval",
    "val_set_size": "data.eval_fraction",
    "warmup_iters": "warmup_steps",
}
"""Keys of other libraries that have the same meaning here under another name."""


_DIRECTION = f"divergence names it: {', '.join(get_args(Divergence))}"


_16_BITS = "bf16: true or fp16: true computes in 16 bits, param_dtype stores them"


_CADENCE = "eval_steps and save_steps say how often; without them it is done at the end"


_TORCHRUN = (
    "torchrun --nproc_per_node N -m sad distill ... splits both models over N processes by FSDP2; "
    "dp_shard_size and dp_replicate_size say how"
)


_NO_MODEL_PARALLELISM = "layers are not split by themselves: FSDP2 splits models, see dp_shard_size"


_QUANTIZED = (
    "teacher_quantization: int8 or int4 quantizes the frozen teacher; a student is trained as it is"
)


_NO_EARLY_STOPPING = (
    "a run is as long as max_steps or num_train_epochs say; the best weights are kept in "
    "RUN_DIR/best"
)


_LEARNED = "data.completion_only_loss and data.assistant_only_loss say what of a record is learned"


EXPLAINED = {
    # transformers
    "load_best_model_at_end": "the best weights are always kept, in RUN_DIR/best",
    "greater_is_better": "the smallest metric_for_best_model wins",
    "eval_strategy": _CADENCE,
    "evaluation_strategy": _CADENCE,
    "save_strategy": _CADENCE,
    "use_cpu": "write device: cpu",
    "no_cuda": "write device: cpu",
    "trust_remote_code": "there is one per model: trust_remote_code_student and _teacher",
    "dtype": _16_BITS,
    "torch_dtype": _16_BITS,
    # TRL
    "use_peft": "peft.r trains LoRA adapters of that rank: peft: {r: 16}",
    "seq_kd": "the teacher writes no text here; lmbda: 1 learns from the student's own",
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
    # several processes or devices
    **dict.fromkeys(
        """ddp ddp_backend deepspeed deepspeed_config fsdp fsdp_config local_rank nproc_per_node
        num_gpus num_processes parallelism_config world_size zero_stage""".split(),
        _TORCHRUN,
    ),
    **dict.fromkeys(
        "pipeline_parallel_size sequence_parallel tensor_parallel_size".split(),
        _NO_MODEL_PARALLELISM,
    ),
    "device_map": "device takes one device, and teacher_device another for the teacher's layers",
    # quantized models
    **dict.fromkeys(
        """bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_config
        load_in_4bit load_in_8bit load_teacher_in_4bit load_teacher_in_8bit qlora quantization
        quantization_config quantize_teacher teacher_load_in_4bit teacher_load_in_8bit
        teacher_quantization_config""".split(),
        _QUANTIZED,
    ),
    # adapters
    **dict.fromkeys(
        "adapter adapters lora lora_rank peft_config use_adapter use_lora".split(),
        "peft.r trains LoRA adapters of that rank: peft: {r: 16}",
    ),
    # teachers that run elsewhere, or write
    **dict.fromkeys(
        "cache_logits cache_teacher logits_path offline teacher_logits".split(),
        "`sad cache-teacher` writes a teacher's targets to a folder, which teacher_cache names",
    ),
    **dict.fromkeys(
        """kd_online_server kd_online_server_base_url teacher_model_server
        teacher_model_server_url teacher_server""".split(),
        "`sad cache-teacher --server URL` asks a server once, before training: see teacher_cache",
    ),
    "max_prompt_length": (
        "prompts are cut to max_length - max_completion_length tokens, of which the last are kept"
    ),
    "logprobs_field": "`sad cache-teacher --import PATH` reads targets from files",
    **dict.fromkeys(
        "num_generations use_vllm vllm_mode vllm_server_base_url".split(),
        "with lmbda above 0 the student itself writes, once per prompt, where it is trained",
    ),
    "student_tokenizer": "the key tokenizer names it, and teacher_tokenizer the teacher's",
    "use_uld_loss": "for a teacher with another tokenizer write cross_tokenizer: prefix",
    **dict.fromkeys(
        "gkd_logits_topk kd_online_topk kd_top_k loss_top_k".split(),
        "a teacher here has its whole vocabulary; `sad cache-teacher --top_k 64` keeps so many ids",
    ),
    # objective
    **dict.fromkeys(
        "distil_alpha distill_alpha distillation_alpha kd_alpha".split(),
        "as the weight of the teacher it is kd_weight",
    ),
    "loss_weight": "each loss has a weight: ce_weight, kd_weight, feature.weight ...",
    "cosine_weight": "between last hidden states it is feature.weight",
    "mse_weight": "between hidden states it is feature.weight with feature.distance: relative_mse",
    "layer_map": "pairs of layers are layerwise.layers, attention.layers, relations.layers",
    "layer_mapping": "pairs of layers are layerwise.layers, attention.layers, relations.layers",
    # optimizer and schedule
    "betas": "they are adam_beta1 and adam_beta2",
    "warmup": "it is warmup_steps, warmup_batches or warmup_ratio",
    "lr_scheduler_kwargs": "a schedule's numbers are min_lr_ratio and decay_ratio",
    "early_stopping": _NO_EARLY_STOPPING,
    "early_stopping_patience": _NO_EARLY_STOPPING,
    "patience": _NO_EARLY_STOPPING,
    # precision and speed
    **dict.fromkeys(
        "amp fp32 half mixed_precision precision tf32 use_amp".split(),
        f"numbers are fp32 by default; {_16_BITS}",
    ),
    **dict.fromkeys(
        "flash_attention flash_attn use_flash_attention use_flash_attention_2".split(),
        "write attn_implementation: flash_attention_2",
    ),
    "use_liger_kernel": "the losses are fused already, and layers are those of transformers",
    "gradient_checkpointing_kwargs": "gradient_checkpointing is always the non-reentrant one",
    "activation_checkpointing_kwargs": "gradient_checkpointing is always the non-reentrant one",
    "auto_find_batch_size": "`sad plan` predicts what a batch takes",
    # data
    **dict.fromkeys(
        "dataloader_num_workers dataloader_pin_memory num_workers streaming".split(),
        "text is packed once, and rows are read from a memory map without workers",
    ),
    "group_by_length": "packing: true fills rows with several documents instead",
    "data_seed": "seed decides the order of the rows, too",
    "shuffle": "rows come in an order of their own in every epoch, which seed decides",
    # models
    "dropout": "it belongs to the student: set it in the config.json of its folder",
    "attention_dropout": "it belongs to the student: set it in the config.json of its folder",
    "use_cache": "training uses no cache, and exported students do",
    # logs and files
    **dict.fromkeys(
        "logging_dir project_name run_name wandb_project wandb_run_name".split(),
        "a tracker's run has the name of output_dir, in the project sad",
    ),
    "logging_strategy": "logging_steps says how often",
    "logging_first_step": "logging_steps: 1 logs every step",
    "disable_tqdm": "there is a bar on a terminal only",
    "eval_on_start": "the teacher is scored at the start, the student every eval_steps",
    "eval_delay": _CADENCE,
    "eval_accumulation_steps": "evaluations keep sums only, which take no memory",
    "do_train": "`sad distill` trains, and `sad eval RUN_DIR` evaluates",
    "do_eval": "`sad distill` trains, and `sad eval RUN_DIR` evaluates",
    "overwrite_output_dir": (
        "nothing is overwritten: choose another output_dir, or resume_from_checkpoint: auto"
    ),
    "save_safetensors": "weights are always saved as safetensors",
}
"""Keys of other libraries that have no single counterpart here, and what to write instead."""
