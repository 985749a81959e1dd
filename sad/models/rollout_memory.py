"""What a student takes while it writes text, beside its weights: for plans of memory."""

from __future__ import annotations

from transformers import PreTrainedModel

from sad.config.schema import DistillConfig
from sad.models.heads import output_embedding

CACHE = "rollouts: cache of keys and values"
NEXT_TOKEN = "rollouts: logits of the next token"
PROMPTS = "rollouts: activations of the prompts"

_COPIES = 4
"""Of the next token's logits in fp32: as the model gives them, at the temperature, without the ids
that may not be drawn, and as probabilities."""
_SORTED_BYTES = 4 + 8 + 4 + 4
"""Per id besides with ``top_p`` below 1: sorted logits, their places, probabilities and sums."""


def cache_bytes(config: DistillConfig, student: PreTrainedModel, itemsize: int) -> int:
    """Keys and values of a micro-batch's rows, as long as rows can be; a layer's are there twice
    while they grow by a token."""
    text = student.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    positions = config.rows_per_process() * (config.max_length - 1)
    return 2 * (text.num_hidden_layers + 1) * heads * width * positions * itemsize


def next_token_bytes(config: DistillConfig, student: PreTrainedModel) -> int:
    """What drawing one token for each row takes."""
    per_id = 4 * _COPIES + (_SORTED_BYTES if config.top_p < 1 else 0)
    return config.rows_per_process() * output_embedding(student).out_features * per_id


def rollout_items(
    config: DistillConfig, student: PreTrainedModel, itemsize: int, prompts: int
) -> list[tuple[str, int]]:
    """What is alive at the worst of two moments: when the prompts are read, which takes ``prompts``
    bytes of activations, and when a token is drawn."""
    drawing = (NEXT_TOKEN, next_token_bytes(config, student))
    passing = max((PROMPTS, prompts), drawing, key=lambda item: item[1])
    return [(CACHE, cache_bytes(config, student, itemsize)), passing]
