"""Samples for the report: what the exported student writes after prompts of held-out rows.

They decorate the report. Whatever goes wrong here is a warning and never an error: the student is
exported already.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from sad.data.batch import IGNORE_INDEX, Batch
from sad.environment import MAKING_MODELS, quiet_libraries
from sad.errors import with_type
from sad.training.inputs import RunInputs

SAMPLES, SAMPLE_PROMPT, SAMPLE_TOKENS = 2, 48, 64
"""How many texts the finished student writes for the report, how much of a text it is shown, and
how much it writes, in tokens (less if it knows fewer positions)."""


def write_samples(
    exported: Path, inputs: RunInputs, *, trust_remote_code: bool, warn: Callable[[str], None]
) -> list[dict[str, str]]:
    """Load the student in ``exported`` as a user would, and let it write greedily.

    Returns a ``prompt``, the ``text`` written after it and the ``model``'s name for each sample;
    fewer of them, after one warning, if the model cannot be loaded or cannot write.
    """
    samples: list[dict[str, str]] = []
    try:
        with MAKING_MODELS, quiet_libraries():
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
    prompt = _prompt(inputs.eval_rows.batch([row]), int(min(SAMPLE_PROMPT, positions // 2)))
    prompt = prompt[None].to(inputs.device)  # [1, T]
    length = prompt.shape[1]
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        # A prompt is never cut; the token written after the last position needs none of its own.
        max_new_tokens=int(max(min(SAMPLE_TOKENS, positions - length), 1)),
    )
    ids = getattr(output, "sequences", output)
    texts = [str(inputs.tokenizer.decode(part)) for part in (prompt[0], ids[0, length:])]
    return dict(zip(("prompt", "text"), texts, strict=True))


def _prompt(batch: Batch, longest: int) -> Tensor:
    """The first prompt in a row, or else at most ``longest`` tokens that begin its longest text.

    A prompt is the context before a document's first target, and whole. Neither reaches into the
    next document of the row, nor do a text's tokens include the one that ends it.
    """
    length = int(batch.lengths[0])
    ids, is_target = batch.input_ids[0, :length], batch.labels[0, :length] != IGNORE_INDEX
    begins = (batch.position_ids[0, :length] == 0).nonzero()[:, 0].tolist()
    documents = list(zip(begins, [*begins[1:], length], strict=True))
    for begin, end in documents:
        before = is_target[begin:end].nonzero()[:1, 0].tolist()  # first target: the next token
        if before and before[0] > 0:
            return ids[begin : begin + before[0] + 1]
    begin, end = max(documents, key=lambda document: document[1] - document[0])
    size = end - begin - int(not is_target[end - 1])  # a token without a target ends its document
    return ids[begin : begin + max(min(longest, size), 1)]
