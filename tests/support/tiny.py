"""Tiny models, a tokenizer and texts, built inside a test without downloads.

The models have two layers, hidden size 32 and the tokenizer's vocabulary of 512; their weights are
large enough for clearly different logits. The same arguments give the same weights.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 512
EOS = "<|endoftext|>"

TEXT = """
The quick brown fox jumps over the lazy dog while seven wizards judge my box of old frozen liquid.
A student learns from a teacher: it reads the same pages, compares answers and corrects itself.
Small models forget rare words first, large ones remember strange details about almost everything.
def average(values): total = sum(values); return total / len(values) if values else None  # empty
for index, value in enumerate(sequence): print(index, value); raise ValueError("unexpected")
class Counter(object): def __init__(self, start=0): self.count = start; import collections
Gradient descent moves parameters against the slope; momentum keeps direction; decay shrinks them.
Numbers such as 1234, 56.78 and 9.01e-23 appear between parentheses, brackets [so] and {braces}.
"""


def tiny_llama(*, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A random two-layer Llama; ``overrides`` are fields of ``LlamaConfig``."""
    return _build(LlamaForCausalLM, LlamaConfig(**_llama_like(overrides)), seed)


def overflowing_llama(*, seed: int = 0) -> LlamaForCausalLM:
    """A Llama whose hidden states pass 65,504, the largest number of float16."""
    model: Any = tiny_llama(seed=seed)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 3000
            layer.mlp.up_proj.weight *= 3000
    return model


def tiny_qwen3(*, seed: int = 0, **overrides: Any) -> Qwen3ForCausalLM:
    """A random two-layer Qwen 3; ``overrides`` are fields of ``Qwen3Config``."""
    return _build(Qwen3ForCausalLM, Qwen3Config(**_llama_like({"head_dim": 8} | overrides)), seed)


def tiny_gpt2(*, seed: int = 0, **overrides: Any) -> GPT2LMHeadModel:
    """A random two-layer GPT-2 without dropout; ``overrides`` are fields of ``GPT2Config``."""
    fields = {
        "vocab_size": VOCAB_SIZE,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 256,
        "initializer_range": 0.1,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return _build(GPT2LMHeadModel, GPT2Config(**(fields | overrides)), seed)


def tiny_tokenizer(vocab_size: int = VOCAB_SIZE, text: str = TEXT) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose one special token, ``<|endoftext|>`` (id 0), is EOS and padding."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_bpe(vocab_size, text)),
        eos_token=EOS,
        pad_token=EOS,
    )


def save_tiny(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None
) -> str:
    """Save a model and a tokenizer (default: the tiny one); return the folder."""
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return str(folder)


def write_texts(folder: Path, count: int = 8, seed: int = 0) -> str:
    """Write ``count`` text files of random lines of ``TEXT``; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = TEXT.strip().splitlines()
    draw = torch.Generator().manual_seed(seed)
    for i in range(count):
        length = int(torch.randint(1, 30, (1,), generator=draw))
        picks = torch.randint(0, len(lines), (length,), generator=draw).tolist()
        (folder / f"{i:03d}.txt").write_text("\n".join(lines[pick] for pick in picks) + "\n")
    return str(folder)


def tiny_run(
    folder: Path,
    student: PreTrainedModel | None = None,
    teacher: PreTrainedModel | None = None,
    *,
    texts: int = 12,
) -> dict[str, Any]:
    """Keys of a configuration with two tiny models, by default Llamas, and text in ``folder``."""
    return {
        "student": save_tiny(folder / "student", student or tiny_llama(seed=2)),
        "teacher": save_tiny(folder / "teacher", teacher or tiny_llama(seed=1)),
        "data": {"train": write_texts(folder / "texts", count=texts), "eval_fraction": 0.3},
        "output_dir": str(folder / "run"),
        "max_length": 32,
        "per_device_train_batch_size": 2,
    }


def _llama_like(overrides: dict[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
    } | overrides


def _build(cls: Any, config: PreTrainedConfig, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(config).eval()


@cache
def _trained_bpe(vocab_size: int, text: str) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        show_progress=False,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([text], trainer)
    assert tokenizer.get_vocab_size() == vocab_size, tokenizer.get_vocab_size()
    return tokenizer.to_str()
