"""Text that the student writes after prompts (*rollouts*), as micro-batches to train on.

Micro-batch ``i`` is on-policy if ``floor((i + 1) f) > floor(i f)``, with ``f = lmbda``: the exact
share, evenly spread, without a random number. All that the student writes in a window of gradient
accumulation is written when the window opens. The weights do not change within a window, so the
tokens are a pure function of weights, seed and position: a run that resumes in its middle writes
them again, and a checkpoint holds nothing of them. How many there are is then known before the
first forward pass, whose loss is divided by it.

A row is a prompt and its completion, padded on the right. Targets are the tokens of the completion,
its first end-of-text included. They are compared with the teacher alone (``kd_weight`` 1, no
cross-entropy: the labels are the student's own words).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from sad.config.schema import DistillConfig
from sad.data.batch import IGNORE_INDEX, Batch, LossCounts
from sad.data.prompts import Prompt
from sad.environment import quiet_libraries
from sad.models.heads import eval_no_grad
from sad.training.student import StudentWithLoss


def is_on_policy(micro_step: int, share: float) -> bool:
    """Whether the student writes the text of this micro-batch."""
    return on_policy_before(micro_step + 1, share) > on_policy_before(micro_step, share)


def on_policy_before(micro_step: int, share: float) -> int:
    """How many of the first ``micro_step`` micro-batches are on-policy: ``floor(micro_step f)``.

    ``f`` is the decimal number as it is written: 0.29 of 100 are 29, which in binary arithmetic are
    28.999999999999996.
    """
    return int(micro_step * Fraction(repr(share)))


def rollout_seed(seed: int, micro_step: int) -> int:
    """The seed of a micro-batch's tokens: a BLAKE2b hash of the run's seed and its position."""
    key = hashlib.blake2b(f"{seed}:{micro_step}".encode(), digest_size=8, person=b"sad rollouts")
    return int.from_bytes(key.digest(), "little") >> 1  # below 2^63


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and where a completion ends."""

    end_tokens: tuple[int, ...]
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    greedy: bool = False

    @classmethod
    def of(cls, config: DistillConfig, end_tokens: Sequence[int]) -> Sampling:
        return cls(
            tuple(end_tokens),
            config.max_completion_length,
            config.generation_temperature,
            config.top_p,
            config.top_k,
        )

    def generation_config(self) -> GenerationConfig:
        """All of it, for a model that has no settings of its own besides: what is left unset here
        would be read from those, ``suppress_tokens`` among them."""
        how = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return GenerationConfig(
            do_sample=not self.greedy,
            **({} if self.greedy else how),
            max_new_tokens=self.max_new_tokens,
            eos_token_id=list(self.end_tokens),
            pad_token_id=self.end_tokens[0],
            use_cache=True,
        )


class Rollouts(NamedTuple):
    """What the student has written in a micro-batch."""

    batch: Batch
    teacher_batch: Batch | None
    """The same completions after the teacher's own prompts, if any row has one."""
    shift: Tensor | None  # int64 [B]: how much later the teacher's rows have a completion
    completion_tokens: int
    finished: int
    """Rows that came to an end of text."""

    @property
    def num_rows(self) -> int:
        return len(self.batch.lengths)


def write_rollouts(
    student: StudentWithLoss, prompts: Sequence[Prompt], sampling: Sampling, seed: int
) -> Rollouts:
    """Let the student write after each prompt, and make a batch of it.

    The student is in eval mode meanwhile. Its modes and settings and the global random generators
    are left as they were. Prompts of different lengths are padded on the left.
    """
    device = next(student.model.parameters()).device
    pad = sampling.end_tokens[0]
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.ids) :] = torch.from_numpy(prompt.ids.astype(np.int64))
        mask[row, width - len(prompt.ids) :] = 1
    with _writing(student, sampling, seed, device) as model:
        output = model.generate(
            ids.to(device),
            attention_mask=mask.to(device),
            logits_processor=LogitsProcessorList([_ValidVocab(student.valid_vocab)]),
        )
    written = getattr(output, "sequences", output)[:, width:].cpu().numpy()
    completions = [_up_to_end(row, sampling.end_tokens) for row in written]
    batch = _batch([prompt.ids for prompt in prompts], completions).to(device)
    teacher_batch = shift = None
    if any(prompt.teacher_ids is not None for prompt in prompts):
        theirs = [p.ids if p.teacher_ids is None else p.teacher_ids for p in prompts]
        teacher_batch = _batch(theirs, completions).to(device)
        longer = [len(t) - len(p.ids) for t, p in zip(theirs, prompts, strict=True)]
        shift = torch.tensor(longer, device=device)
    return Rollouts(
        batch,
        teacher_batch,
        shift,
        completion_tokens=sum(map(len, completions)),
        finished=sum(int(row[-1]) in sampling.end_tokens for row in completions),
    )


def at_student_positions(states: Tensor, shift: Tensor, length: int) -> Tensor:
    """States [B, L_t, ...] of the teacher's rows at the ``length`` positions of the student's.

    Row b's position i becomes i + ``shift[b]``, where both sides read the same token of the
    completion; elsewhere, where there is no target, any other one.
    """
    at = torch.arange(length, device=states.device) + shift.to(states.device)[:, None]  # [B, L]
    rows = torch.arange(len(states), device=states.device)[:, None]
    return states[rows, at.clamp(0, states.shape[1] - 1)]


class RolloutMeter:
    """How fast rollouts come, since it was last asked: in no checkpoint, as no time is."""

    def __init__(self) -> None:
        self._seconds, self._rows = 0.0, 0

    @contextmanager
    def timed(self, rows: int) -> Iterator[None]:
        """Within, ``rows`` rollouts are written."""
        begin = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - begin
        self._rows += rows

    def record(self, elapsed: float) -> dict[str, float]:
        """What a train record says of the last ``elapsed`` seconds of training."""
        if not self._rows:
            return {}
        record = {
            "rollouts_per_second": self._rows / max(self._seconds, 1e-9),
            "rollout_time": min(self._seconds / max(elapsed, 1e-9), 1.0),
        }
        self._seconds, self._rows = 0.0, 0
        return record


class _ValidVocab(LogitsProcessor):
    """Draw no id that the tokenizer does not have: a head may be wider, and its loss is not."""

    def __init__(self, valid_vocab: int) -> None:
        self._valid_vocab = valid_vocab

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self._valid_vocab :] = -torch.inf
        return scores


@contextmanager
def _writing(
    student: StudentWithLoss, sampling: Sampling, seed: int, device: torch.device
) -> Iterator[Any]:
    """Within, the student's model writes by ``sampling`` alone, from random numbers of ``seed``."""
    model: Any = student.model
    own = model.generation_config
    # manual_seed reaches every device's generator.
    devices = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    try:
        with (
            quiet_libraries(),
            eval_no_grad(student),
            torch.random.fork_rng(devices=list(devices)),
            student.autocast(),
        ):
            model.generation_config = sampling.generation_config()
            torch.manual_seed(seed)
            yield model
    finally:
        model.generation_config = own


def _up_to_end(tokens: np.ndarray, end_tokens: Sequence[int]) -> np.ndarray:
    """A completion with its first end of text, and without what comes after it."""
    ends = np.flatnonzero(np.isin(tokens, end_tokens))
    return tokens[: ends[0] + 1] if len(ends) else tokens


def _batch(prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray]) -> Batch:
    """Rows of prompt and completion; the last token of each is a target only."""
    lengths = [len(p) + len(c) - 1 for p, c in zip(prompts, completions, strict=True)]
    shape = len(lengths), max(lengths)
    # Padding repeats the last token: under causal attention no token before it sees it.
    ids, labels = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE_INDEX)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        whole, length = np.concatenate([prompt, completion]), lengths[row]
        ids[row] = whole[-1]
        ids[row, :length] = whole[:-1]
        labels[row, len(prompt) - 1 : length] = completion
    counts = LossCounts(
        targets=sum(map(len, completions)),
        tokens=sum(lengths) - len(lengths),
        sequences=sum(length > 1 for length in lengths),
    )
    return Batch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.arange(shape[1]).repeat(shape[0], 1),
        lengths=torch.tensor(lengths),
        counts=counts,
        target_bytes=0,
    )
