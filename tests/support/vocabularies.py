"""Tokenizers and teachers that differ from the tiny ones by their ids alone."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from support.tiny import EOS, tiny_tokenizer


def permutation(size: int, seed: int = 0) -> np.ndarray:
    """The teacher's id for each of the student's."""
    return np.random.default_rng(seed).permutation(size)


def permuted_tokenizer(order: np.ndarray) -> PreTrainedTokenizerFast:
    """The tiny tokenizer, whose token v has the id ``order[v]``."""
    definition = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocab = definition["model"]["vocab"]
    definition["model"]["vocab"] = {token: int(order[v]) for token, v in vocab.items()}
    for token in definition["added_tokens"]:
        token["id"] = int(order[token["id"]])
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def permuted_model(model: PreTrainedModel, order: np.ndarray) -> PreTrainedModel:
    """The same model for those ids; its weights are changed in place."""
    inner: Any = model
    with torch.no_grad():
        for table in (inner.model.embed_tokens.weight, inner.lm_head.weight):
            table[torch.from_numpy(order)] = table[: len(order)].clone()
    return model
