"""What tokenizing much text will take, said before it begins."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from sad.config.sections import DataConfig
from sad.data.documents import Document
from sad.data.packing import tokenize
from sad.data.parallel import usable_cores
from sad.data.split import DocumentSet
from sad.data.tokenizers import valid_vocab

LARGE_TEXT = 100 * 10**6
"""Bytes of text for which time and disk are foreseen."""

_SAMPLE_CHARS = 1 << 20


class Forecast(NamedTuple):
    """What tokenizing documents will take, from a sample of them."""

    tokens: int
    seconds: float
    disk: int
    """Bytes of the rows, and of what is needed until they are cut."""


def forecast(
    documents: DocumentSet, tokenizer: PreTrainedTokenizerFast, config: DataConfig
) -> Forecast:
    """Foresee tokens, time and disk from the beginning of the documents, tokenized by one process.

    Documents are taken to be alike; those read more than once count as often.
    """
    sample, chars = [], 0
    for document in documents:
        sample.append(document._replace(text=document.text[: _SAMPLE_CHARS - chars]))
        chars += max(len(_content(document)), 1)
        if chars >= _SAMPLE_CHARS:
            break
    read = sum(len(_content(document).encode()) for document in sample)
    alone = replace(config, num_proc=1)
    before = time.perf_counter()
    tokens = sum(len(piece.ids) for piece in tokenize(sample, tokenizer, alone))
    seconds = time.perf_counter() - before
    scale = documents.num_bytes / max(read, 1)
    id_bytes = 2 if valid_vocab(tokenizer) <= 1 << 16 else 4
    total = int(tokens * scale)
    processes = config.num_proc or usable_cores()
    return Forecast(
        tokens=total,
        seconds=seconds * scale / processes,
        disk=total * (id_bytes + 4) + 8 * len(documents),
    )


def _content(document: Document) -> str:
    """The text of a document, or the JSON of a conversation: what ``num_bytes`` counts."""
    conversation = document.conversation
    return document.text if conversation is None else conversation.to_json()
