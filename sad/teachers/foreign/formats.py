"""The formats of targets that other programs write, record by record.

==========  ======================================================================================
distillkit  ``input_ids``, ``token_ids`` and ``top_values`` (natural logarithms of probabilities),
            one list per token: the distribution of the next one. Or packed,
            ``compressed_logprobs`` and ``bytepacked_indices``, which needs DistillKit itself and
            its compression_config.yaml beside the files
axolotl     its prepared data set: ``input_ids``, ``labels``, ``target_token_ids``,
            ``target_logprobs``, ``target_mask``, one list per token. They sum to 1 over the K ids:
            what the teacher gave to others is lost
vllm        ``prompt_token_ids`` and ``prompt_logprobs``, as the server answers
sglang      ``meta_info.input_token_logprobs`` and ``.input_top_logprobs``, likewise
openai      ``messages`` or ``prompt``, and ``logprobs.content`` of the answer: texts with at most
            20 alternatives, of which each must be one token of the tokenizer
==========  ======================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch

from sad.config.cache_options import ImportFormat
from sad.errors import UnfitError, UsageError, one_line, quoted
from sad.teachers.cache.answers import read_sglang, read_vllm
from sad.teachers.foreign.base import (
    Context,
    ForeignDocument,
    Row,
    as_list,
    field,
    first_of,
    matrix,
    sorted_answer,
    token_ids,
)
from sad.teachers.foreign.openai import read_openai

COMPRESSION = "compression_config.yaml"


def format_of(record: Row, where: str) -> ImportFormat:
    """The format that a record looks like; ``UnfitError`` for none of them."""
    body = _body(record)
    meta = record.get("meta_info")
    if "prompt_logprobs" in body:
        return "vllm"
    if isinstance(meta, dict) and "input_top_logprobs" in meta:
        return "sglang"
    if "target_token_ids" in record:
        return "axolotl"
    if "compressed_logprobs" in record or "top_values" in record:
        return "distillkit"
    if isinstance(body.get("logprobs"), dict):
        return "openai"
    raise UnfitError(
        f"{where} must be targets as DistillKit, axolotl, vLLM, SGLang or OpenAI write them, got "
        f"fields {quoted(sorted(map(str, record)))}; name another file with --import"
    )


def _vllm(record: Row, context: Context, where: str) -> ForeignDocument:
    body = _body(record)
    tokens = token_ids(
        body.get("prompt_token_ids") or record.get("prompt_token_ids"), "prompt_token_ids", where
    )
    return ForeignDocument(
        tokens, read_vllm(body.get("prompt_logprobs"), tokens, None, context.vocab, where)
    )


def _sglang(record: Row, context: Context, where: str) -> ForeignDocument:
    meta = field(record, "meta_info", where)
    tokens = record.get("input_ids")
    if tokens is None:
        try:
            tokens = [one[1] for one in meta["input_token_logprobs"]]
        except (IndexError, KeyError, TypeError):
            tokens = None
    tokens = token_ids(tokens, "input_ids, or meta_info.input_token_logprobs", where)
    return ForeignDocument(tokens, read_sglang(meta, tokens, None, context.vocab, where))


def _axolotl(record: Row, context: Context, where: str) -> ForeignDocument:
    tokens = token_ids(record.get("input_ids"), "input_ids", where)
    ids, log_probs, mask = (
        matrix(field(record, name, where), len(tokens), name, where)
        for name in ("target_token_ids", "target_logprobs", "target_mask")
    )
    _require_one_shape({"target_token_ids": ids, "target_logprobs": log_probs}, where)
    _require_one_shape({"target_token_ids": ids, "target_mask": mask}, where)
    log_probs = log_probs.masked_fill(mask == 0, -torch.inf)
    labels = as_list(field(record, "labels", where))
    if not isinstance(labels, list) or len(labels) != len(tokens):
        raise UnfitError(
            f"{where} must have one of labels per token, {len(tokens)}, got {quoted(labels)}; "
            "correct the file"
        )
    targets = sorted_answer(ids, log_probs, context.vocab, where)
    return ForeignDocument(tokens, targets, [label != -100 for label in labels])


def _distillkit(record: Row, context: Context, where: str) -> ForeignDocument:
    tokens = token_ids(record.get("input_ids"), "input_ids", where)
    if "top_values" in record:
        ids = matrix(field(record, "token_ids", where), len(tokens), "token_ids", where)
        values = matrix(record["top_values"], len(tokens), "top_values", where)
    else:
        packed = {
            name: torch.tensor(as_list(field(record, name, where)))
            for name in ("compressed_logprobs", "bytepacked_indices")
        }
        found = _decompressor(context.folder)(packed)
        ids, values = (
            matrix(one.double(), len(tokens), name, where)
            for one, name in zip(found, packed, strict=True)
        )
    _require_one_shape({"ids": ids, "values": values}, where)
    return ForeignDocument(tokens, sorted_answer(ids, values, context.vocab, where))


READERS: dict[ImportFormat, Callable[[Row, Context, str], ForeignDocument]] = {
    "distillkit": _distillkit,
    "axolotl": _axolotl,
    "vllm": _vllm,
    "sglang": _sglang,
    "openai": read_openai,
}


@cache
def _decompressor(folder: Any) -> Callable[[Any], Any]:
    """DistillKit's own reader of its packed records, by the compression_config.yaml beside them."""
    try:
        kit: Any = import_module("distillkit.compression")
    except ImportError as error:
        raise UsageError(
            "distillkit must be installed to read its packed targets, got "
            f"'{one_line(error)}'; install it, or write token_ids and top_values"
        ) from error
    path = folder / COMPRESSION
    try:
        import yaml

        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        config = kit.DistributionQuantizationConfig.model_validate(content)
        return kit.LogprobCompressor(config=config).decompress_to_sparse
    except Exception as error:  # whatever another library makes of a file
        raise UnfitError(
            f"{path} must be the compression_config.yaml of DistillKit's targets, got "
            f"'{one_line(error)}'; copy it there"
        ) from error


def _body(record: Row) -> Row:
    """The one choice of a server's answer, or the record itself."""
    choice = first_of(record.get("choices"))
    return choice if isinstance(choice, dict) else record


def _require_one_shape(tensors: dict[str, torch.Tensor], where: str) -> None:
    (one, first), (other, second) = tensors.items()
    if first.shape != second.shape:
        raise UnfitError(
            f"{where} must have as many {one} as {other}, got {list(first.shape)} and "
            f"{list(second.shape)}; correct the file"
        )
