"""Samples for the report: what the exported student writes after the beginning of held-out rows.

They decorate the report. Whatever goes wrong here is a warning and never an error: the student is
exported already.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from sad.environment import quiet_libraries
from sad.errors import with_type
from sad.training.inputs import RunInputs

SAMPLES, SAMPLE_PROMPT, SAMPLE_TOKENS = 2, 48, 64
"""How many texts the finished student writes for the report, and their lengths in tokens (less if
it knows fewer positions)."""


def write_samples(
    exported: Path, inputs: RunInputs, *, trust_remote_code: bool, warn: Callable[[str], None]
) -> list[dict[str, str]]:
    """Load the student in ``exported`` as a user would, and let it write greedily.

    Returns a ``prompt``, the ``text`` written after it and the ``model``'s name for each sample;
    fewer of them, after one warning, if the model cannot be loaded or cannot write.
    """
    samples: list[dict[str, str]] = []
    try:
        with quiet_libraries():
            model: Any = AutoModelForCausalLM.from_pretrained(
                exported, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # a family's own code may raise anything
        warn(
            f"{exported} cannot be loaded again, got {with_type(error)}; the report has no samples"
        )
        return samples
    try:
        with quiet_libraries(), torch.no_grad():
            model.to(inputs.device).eval()
            model.generation_config = _greedy(model, inputs.tokenizer.eos_token_id)
            for row in range(min(SAMPLES, len(inputs.eval_rows))):
                samples.append(_sample(model, inputs, row) | {"model": exported.name})
    except Exception as error:
        warn(f"the report has {len(samples) or 'no'} samples, generation got {with_type(error)}")
    return samples


def _greedy(model: Any, end_of_text: Any) -> GenerationConfig:
    """Greedy decoding that returns token ids and nothing else, whatever the student's own settings
    say: beams, several sequences, dictionaries, stop strings and contrastive search among them."""
    own = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    return GenerationConfig(
        do_sample=False,
        eos_token_id=end_of_text if ends is None else ends,
        pad_token_id=end_of_text,
        bos_token_id=getattr(own, "bos_token_id", None),
        suppress_tokens=getattr(own, "suppress_tokens", None),
    )


def _sample(model: Any, inputs: RunInputs, row: int) -> dict[str, str]:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    length = int(min(SAMPLE_PROMPT, inputs.eval_rows.max_length, positions // 2))
    prompt = inputs.eval_rows.batch([row]).input_ids[:, :length].to(inputs.device)
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=int(min(SAMPLE_TOKENS, positions - length)),
    )
    ids = getattr(output, "sequences", output)
    texts = [str(inputs.tokenizer.decode(part)) for part in (prompt[0], ids[0, length:])]
    return dict(zip(("prompt", "text"), texts, strict=True))
