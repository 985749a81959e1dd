"""A tokenizer whose tokens can be counted by hand, with a chat template, and conversations.

Each byte of UTF-8 is a token; ``<|bos|>``, ``<|eos|>``, ``<|turn|>`` and ``<|end|>`` are special.
As for Llama and Gemma, the post-processor puts ``<|bos|>`` before every text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

BOS, EOS, TURN, END = SPECIAL = ("<|bos|>", "<|eos|>", "<|turn|>", "<|end|>")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}<|turn|>tools: {{ tools | length }}<|end|>{% endif %}"
    "{% for message in messages %}<|turn|>{{ message.role }}: "
    "{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content or message.tool_calls }}<|end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
)
"""What the assistant says is marked, its end included."""

WITHOUT_MARKERS = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.post_processor = TemplateProcessing(  # pyright: ignore
        single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=[TURN, END],
        chat_template=chat_template,
    )


def say(*turns: str) -> list[dict[str, Any]]:
    """Messages: ``say("user: Hi", "assistant: Hello")``."""
    pairs = [turn.split(": ", 1) for turn in turns]
    return [{"role": role, "content": content} for role, content in pairs]


def write_records(path: Path, *records: object) -> str:
    """A JSON Lines file of these records; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)
