"""Records of a teacher that runs: its forward passes as training would make them, then the codec.

A batch of a cache is a batch of training: the same rows together, the same positions, no mask. Of
hidden states every input has a record, of sparse targets only those whose next token is learned and
that the teacher can read up to; the others hold padding.

A teacher with another tokenizer reads the same text in its own tokens. Its records are those of
the student's positions: at boundaries some outcomes (``sad.data.outcomes``) and their
probabilities, each the sum over the teacher's tokens that count for it, elsewhere padding; or a
number in fp32, ``log_prob``, where a group begins that of its text, elsewhere 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from sad_kernels import Outcomes, TeacherHidden
from torch import Tensor

from sad.data.batch import Batch
from sad.losses.cross_tokenizer import TeacherLikelihood, likelihood
from sad.teachers.cache.facts import CacheFacts, Kind
from sad.teachers.cache.files import BASIS, open_tensors, write_tensors
from sad.teachers.cache.hidden import Codec, build_codec, hidden_bytes
from sad.teachers.cache.sparse import (
    encode,
    padding_record,
    record_bytes,
    systematic_sample,
    top_k,
)
from sad.teachers.frozen import FrozenTeacher

Record = dict[str, Tensor]

CHUNK_BYTES = 256 * 2**20
"""Memory for the logits of some positions, and what is computed from them in float64."""

MIN_STATES = 256
"""Positions that the basis of int8 is fitted to, at least, if there are so many."""


class Source(Protocol):
    """What makes the records of a cache: a teacher that runs here, a server, somebody's files."""

    def records(self, batch: Batch, kind: Kind, uniform: Tensor) -> Record:
        """The records of all inputs of a batch, row after row, in host memory.

        ``uniform`` [inputs] float64 in [0, 1) are the random numbers of ``sampled``.
        """
        ...


class TeacherSource:
    """Makes the records of a cache with ``teacher``; ``codec`` is that of hidden states,
    ``outcomes`` are those of a teacher with another tokenizer."""

    def __init__(
        self,
        teacher: FrozenTeacher,
        facts: CacheFacts,
        codec: Codec | None = None,
        outcomes: Outcomes | None = None,
    ) -> None:
        self.teacher = teacher
        self.facts = facts
        self.codec = codec
        self.outcomes = outcomes

    def records(self, batch: Batch, kind: Kind, uniform: Tensor) -> Record:
        """The records of all inputs of a batch, row after row, in host memory.

        ``uniform`` [inputs] float64 in [0, 1) are the random numbers of ``sampled``.
        """
        output = self.teacher.forward(batch)
        (target,) = output.targets
        assert isinstance(target, TeacherHidden)
        inside = inputs_of(batch)
        if kind == "likelihood":
            return likelihood_record(batch, likelihood(batch, target))
        states = target.hidden if batch.theirs is None else batch.theirs.at_students(target.hidden)
        hidden = states[inside.to(states.device)]  # [inputs, D]
        if kind == "hidden":
            assert self.codec is not None
            return on_host(self.codec.encode(hidden))
        learned = batch.labels >= 0
        if output.kd_weights is not None:
            learned &= output.kd_weights.to(learned.device) > 0
        learned = learned[inside.to(learned.device)].cpu()
        hidden = hidden[learned.to(hidden.device)]
        found = self._sparse(hidden, target, kind, uniform[learned])
        return placed(found, learned, self.facts, kind)

    def _sparse(self, hidden: Tensor, target: TeacherHidden, kind: Kind, uniform: Tensor) -> Record:
        """Records of positions by their hidden states [n, D], a chunk at a time."""
        facts, head = self.facts, target.head
        assert facts.top_k is not None
        vocab, parts = facts.num_ids, []
        size = max(CHUNK_BYTES // (max(vocab, len(head.weight)) * 32), 1)
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            with torch.no_grad():
                logits = head(hidden[chunk].to(head.weight.dtype)).float()  # [n, V]
            if kind == "sampled":
                (temperature,) = facts.temperatures
                probs = self._probabilities(logits / temperature)
                ids, weights = systematic_sample(
                    probs, facts.top_k, uniform[chunk].to(probs.device)
                )
                parts.append(on_host(encode(ids, weights.log(), None, vocab)))
            else:
                if self.outcomes is not None:
                    logits = self._probabilities(logits).log()
                found = top_k(logits, facts.top_k, facts.tail_temperatures)
                parts.append(on_host(encode(*found, vocab)))
        if not parts:
            return {}
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _probabilities(self, logits: Tensor) -> Tensor:
        """Those of the ids that records may hold, [n, V] or [n, outcomes], from logits [n, V]."""
        if self.outcomes is None:
            return logits.softmax(1)
        probs = logits.double().softmax(1)
        of_outcomes = probs.new_zeros(len(probs), self.outcomes.count)
        return of_outcomes.index_add_(1, self.outcomes.teacher[: probs.shape[1]].long(), probs)


def placed(found: Record, learned: Tensor, facts: CacheFacts, kind: Kind) -> Record:
    """The records ``found``, one for each position that is ``learned`` (bool [n]), among padding
    at the others: n in all."""
    temperatures = len(facts.tail_temperatures) if kind == "topk" else 0
    assert facts.top_k is not None
    whole = padding_record(len(learned), facts.top_k, facts.num_ids, temperatures)
    for name, values in found.items():
        _signed(whole[name])[learned] = _signed(values)
    return whole


def likelihood_record(batch: Batch, known: TeacherLikelihood) -> Record:
    """The records of what a teacher with another tokenizer gives the text of each group."""
    return on_host({"log_prob": known.log_probs.cpu().clamp(max=0.0)[inputs_of(batch)]})


def inputs_of(batch: Batch) -> Tensor:
    """Which positions [B, L] hold an input, not padding; on the host."""
    return torch.arange(batch.input_ids.shape[1]) < batch.lengths.cpu()[:, None]


def position_bytes(facts: CacheFacts, kind: Kind, width: int) -> int:
    """Bytes of a record, for hidden states of this ``width``."""
    if kind == "hidden":
        assert facts.codec is not None
        return hidden_bytes(facts.codec, width)
    if kind == "likelihood":
        return torch.float32.itemsize
    assert facts.top_k is not None
    return record_bytes(kind, facts.top_k, facts.num_ids, len(facts.tail_temperatures))


def make_codec(
    facts: CacheFacts, folder: Path, device: torch.device, states: Callable[[], Iterator[Tensor]]
) -> Codec | None:
    """The codec of a cache's hidden states, from its folder, or fitted to the first ``states``
    [n, D] of its rows; None for another kind."""
    if facts.codec is None:
        return None
    if facts.codec != "int8":
        return build_codec(facts.codec)
    path = folder / BASIS
    if path.exists():
        return build_codec(facts.codec, tensors=open_tensors(path)).to(device)
    sample: list[Tensor] = []
    for part in states():
        sample.append(part)
        if sum(map(len, sample)) >= MIN_STATES:
            break
    codec = build_codec(facts.codec, states=torch.cat(sample))
    write_tensors(path, on_host(codec.tensors()))
    return codec


def final_states(teacher: FrozenTeacher, batch: Batch) -> Tensor:
    """The teacher's final hidden states [inputs, D] of all inputs of a batch, row after row."""
    (target,) = teacher.forward(batch).targets
    assert isinstance(target, TeacherHidden)
    return target.hidden[inputs_of(batch).to(target.hidden.device)]


def _signed(tensor: Tensor) -> Tensor:
    """The same bits as a dtype that torch can index: it cannot write single rows of uint16."""
    return tensor.view(torch.int16) if tensor.dtype == torch.uint16 else tensor


def on_host(record: Mapping[str, Tensor]) -> Record:
    """A record in host memory."""
    return {name: tensor.cpu().contiguous() for name, tensor in record.items()}
