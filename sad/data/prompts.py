"""Prompts from the data, for text that the student writes: their tokens, in a reproducible order.

* A record with ``prompt`` and ``completion``: its prompt, whole.
* A conversation: what comes before its last turn of the assistant, as the chat template writes it
  for whoever is to answer.
* A text: of each window of ``max_length`` tokens the first ``prompt_length``.

A record may have a field ``teacher_prompt`` besides, in the form of its prompt: the teacher reads
it in the prompt's place, and sees what the student does not (a worked solution, a longer
instruction).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from sad.config.schema import DistillConfig
from sad.data.chat import render_prompts
from sad.data.formats.base import Document
from sad.data.rows import epoch_permutation
from sad.data.split import split_documents
from sad.data.stream import Affixes
from sad.errors import UnfitError

_TEXT_CHARS = 1 << 18
"""Characters of a text that are tokenized at once."""


class Prompt(NamedTuple):
    """The tokens of a prompt."""

    ids: np.ndarray  # int32 [P]
    teacher_ids: np.ndarray | None = None  # int32 [P_t], where the teacher reads another


class Prompts:
    """Prompts that are asked for by their place in the run."""

    def __init__(self, prompts: Iterable[Prompt], seed: int) -> None:
        self._prompts = list(prompts)
        self._seed = seed
        self._order: tuple[int, np.ndarray] | None = None  # a pass, and its order

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, number: int) -> Prompt:
        return self._prompts[number]

    def at(self, places: range) -> list[Prompt]:
        """The prompts at these places of the run: a pure function of seed, data and place. Each
        comes once before any comes again."""
        return [self._prompts[self._number(place)] for place in places]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each prompt, int64 [prompts]."""
        return np.array([len(prompt.ids) for prompt in self._prompts], dtype=np.int64)

    @property
    def for_teacher(self) -> int:
        """How many of them the teacher reads in a form of its own."""
        return sum(prompt.teacher_ids is not None for prompt in self._prompts)

    def _number(self, place: int) -> int:
        turn, at = divmod(place, len(self._prompts))
        if self._order is None or self._order[0] != turn:
            self._order = turn, epoch_permutation(self._seed, turn, len(self._prompts))
        return int(self._order[1][at])


def load_prompts(
    config: DistillConfig,
    tokenizer: PreTrainedTokenizerFast,
    count: int,
    *,
    held_out: bool = False,
) -> Prompts:
    """Prompts from ``count`` documents of the training set, or of the held-out one, drawn by
    ``seed``; from all of them if there are fewer.

    A prompt that leaves no room for ``max_completion_length`` tokens in a row loses its beginning.
    Raises ``UnfitError`` if no document has a prompt, and what reading the data raises.
    """
    documents = split_documents(config.data, run_dir=config.output_dir)[held_out]
    chosen = np.zeros(len(documents), dtype=bool)
    chosen[epoch_permutation(config.seed, 0, len(documents))[:count]] = True
    wanted = (document for document, take in zip(documents, chosen, strict=True) if take)
    prompts = Prompts(_prompts(wanted, config, tokenizer), config.seed)
    if not len(prompts):
        raise UnfitError(
            f"data must hold prompts for lmbda above 0, got none in {int(chosen.sum()):,} "
            "documents; give records a prompt, or texts of more than one token"
        )
    return prompts


def _prompts(
    documents: Iterable[Document], config: DistillConfig, tokenizer: PreTrainedTokenizerFast
) -> Iterator[Prompt]:
    prefix = Affixes.of(tokenizer, config.data).prefix.tolist()
    room = config.max_length - config.max_completion_length

    def encoded(text: str, *, from_template: bool = False) -> np.ndarray:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = list(ids) if from_template else prefix + list(ids)
        return np.array(ids[-room:], dtype=np.int32)

    for document in documents:
        if document.conversation is None:
            yield from _of_text(document.text, config, tokenizer, prefix)
            continue
        ours, theirs, from_template = render_prompts(document, tokenizer)
        ids = encoded(ours, from_template=from_template) if ours else np.zeros(0)
        if len(ids):
            other = None if theirs is None else encoded(theirs, from_template=from_template)
            yield Prompt(ids, other)


def _of_text(
    text: str, config: DistillConfig, tokenizer: PreTrainedTokenizerFast, prefix: list[int]
) -> Iterator[Prompt]:
    """The beginnings of the windows that a text is cut into; a window of one token has none."""
    size = min(config.prompt_length, config.max_length - config.max_completion_length)
    for start in range(0, len(text), _TEXT_CHARS):
        piece = text[start : start + _TEXT_CHARS]
        ids = list(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
        ids = ids if start else prefix + ids
        for begin in range(0, len(ids) - 1, config.max_length):
            yield Prompt(np.array(ids[begin : begin + size], dtype=np.int32))
