"""Log-probabilities as OpenAI's interface gives them: texts and their bytes, of what was generated.

They become ids only if every text is one token of the tokenizer, and of no other id: a byte string
that two ids have, or none, ends the import.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sad.errors import UnfitError, one_line, quoted
from sad.teachers.foreign.base import Context, ForeignDocument, Row, first_of, sorted_answer


def read_openai(record: Row, context: Context, where: str) -> ForeignDocument:
    """The prompt's tokens, which are not learned, and those that were generated, each with its
    alternatives."""
    body = first_of(record.get("choices"))
    body = body if isinstance(body, dict) else record
    try:
        content = list(body["logprobs"]["content"])
        given = [(one, list(one["top_logprobs"])) for one in content]
    except (KeyError, TypeError):
        raise UnfitError(
            f"{where} must have logprobs.content with top_logprobs, got "
            f"{quoted(body.get('logprobs'))}; ask with logprobs and top_logprobs"
        ) from None
    prompt = _prompt(record, context.tokenizer, where)
    ids = _ids_of_bytes(context.tokenizer)
    tokens = [*prompt, *(_id(one, ids, where) for one, _ in given)]
    if len(tokens) < 2 or not given:
        raise UnfitError(f"{where} must hold generated tokens, got none; leave it out")
    width = max(len(top) for _, top in given)
    top_ids = torch.zeros(len(tokens) - 1, max(width, 1), dtype=torch.int64)
    log_probs = torch.full(top_ids.shape, -torch.inf, dtype=torch.float64)
    for at, (_, top) in enumerate(given, len(prompt) - 1):
        if at < 0:
            continue  # the first token of all: nothing comes before it
        for slot, one in enumerate(top):
            top_ids[at, slot] = _id(one, ids, where)
            log_probs[at, slot] = _number(one, where)
    targets = sorted_answer(top_ids, log_probs, context.vocab, where)
    learned = [False] * len(prompt) + [True] * len(given)
    return ForeignDocument(tokens, targets, learned)


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[tuple[int, bytes]]:
    """The bytes that each id stands for; special tokens stand for their names."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    byte_level = "ByteLevel" in json.dumps([definition["decoder"], definition["pre_tokenizer"]])
    characters = {character: byte for byte, character in bytes_to_unicode().items()}
    added = {int(i): token.content for i, token in tokenizer.added_tokens_decoder.items()}
    found = []
    for token, i in tokenizer.get_vocab().items():
        if i in added:
            content = added[i].encode()
        elif byte_level:
            content = bytes(characters[c] for c in token if c in characters)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            content = bytes.fromhex(token[3:5])
        else:
            content = token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
        found.append((i, content))
    return found


@lru_cache(maxsize=2)
def _ids_of_bytes(tokenizer: PreTrainedTokenizerFast) -> dict[bytes, int | None]:
    """Bytes -> their id; None where two ids have them."""
    found: dict[bytes, int | None] = {}
    for i, content in token_bytes(tokenizer):
        found[content] = None if content in found else i
    return found


def _id(one: Any, ids: dict[bytes, int | None], where: str) -> int:
    """The id of a token as OpenAI names it."""
    try:
        given = one.get("bytes")
        content = one["token"].encode() if given is None else bytes(given)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UnfitError(
            f"{where} must name tokens by text and bytes, got {quoted(one)}; correct the file"
        ) from None
    found = ids.get(content)
    if found is None:
        count = "two ids" if content in ids else "none"
        raise UnfitError(
            f"{where} must hold tokens that are one id of the tokenizer, got {quoted(content)}, "
            f"which has {count}; name the teacher's own tokenizer, or import ids instead of texts"
        )
    return found


def _number(one: Any, where: str) -> float:
    try:
        return max(float(one["logprob"]), -9999.0)
    except (KeyError, TypeError, ValueError):
        raise UnfitError(
            f"{where} must have a number as logprob, got {quoted(one)}; correct the file"
        ) from None


def _prompt(record: Row, tokenizer: PreTrainedTokenizerFast, where: str) -> list[int]:
    """The tokens of what was asked."""
    if isinstance(record.get("prompt"), str):
        return tokenizer(record["prompt"], add_special_tokens=False)["input_ids"]
    if not isinstance(record.get("messages"), list):
        raise UnfitError(
            f"{where} must have the messages, or the prompt, that were asked, got "
            f"{quoted(sorted(map(str, record)))}; add them to the answers"
        )
    try:
        text: Any = tokenizer.apply_chat_template(
            record["messages"], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # whatever a template does with what it did not expect
        raise UnfitError(
            f"{where} must fit the chat template, got '{one_line(error)}'; correct the record, or "
            "name another template in data.chat_template_path"
        ) from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]
