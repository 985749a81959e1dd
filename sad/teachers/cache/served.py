"""Records of a teacher that a server runs: one question per segment of a row.

A *segment* is the part of one document that lies in a row. What is sent are its tokens up to the
last one that is learned, which is exactly what a student sees of it. Answers are put where their
questions came from, in whatever order they arrive.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sad.data.batch import Batch
from sad.errors import SadError, UnfitError
from sad.losses.cross_tokenizer import TeacherLikelihood
from sad.teachers.cache.answers import Answer
from sad.teachers.cache.facts import CacheFacts, Kind
from sad.teachers.cache.server import TeacherServer
from sad.teachers.cache.source import inputs_of, likelihood_record, placed
from sad.teachers.cache.sparse import Record, encode

IN_FLIGHT = 8
"""Questions that wait for an answer at a time."""

PROBES = 64
"""Positions that are asked for at the beginning and again at the end."""
PROBE_IDS = 8
"""Ids of each of them that are kept."""
PROBE_DISTANCE = 0.05
"""Total variation, half of ``sum |p - p'|`` over those ids, that is taken for rounding in the mean
of the probes: a server's batches are another each time, and move it by about 0.01 in bfloat16."""

PROBE_NATS = 0.1
"""Mean difference of log-probabilities that is taken for rounding, where those of the text itself
are all that is asked for."""


class Segment(NamedTuple):
    """Tokens of a document in a row, and the number of their first one among a batch's inputs."""

    tokens: list[int]
    start: int


def segments_of(batch: Batch) -> list[Segment]:
    """The segments of a batch in which anything is learned, each up to its last target."""
    found, start = [], 0
    for row, length in enumerate(batch.lengths.tolist()):
        inputs = batch.input_ids[row, :length].tolist()
        labels = batch.labels[row, :length].tolist()
        begins = (batch.position_ids[row, :length] == 0).nonzero().flatten().tolist()
        for begin, end in zip(begins, [*begins[1:], length], strict=True):
            last = max((i for i in range(begin, end) if labels[i] >= 0), default=None)
            if last is not None:
                tokens = [*inputs[begin : last + 1], labels[last]]
                found.append(Segment(tokens, start + begin))
        start += length
    return found


class ServedSource:
    """Makes the records of a cache by asking ``server``: the K most likely ids and the exact rest
    of the mass, at temperature 1."""

    def __init__(self, server: TeacherServer, facts: CacheFacts) -> None:
        assert facts.top_k is not None
        self.server = server
        self.facts = facts
        self._top_k = facts.top_k
        self._threads = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="teacher")

    def records(self, batch: Batch, kind: Kind, uniform: Tensor) -> Record:
        """As ``TeacherSource.records``; nothing is drawn. Raises as ``TeacherServer.answer``."""
        assert kind == "topk", kind
        learned = (batch.labels >= 0).cpu()[inputs_of(batch)]
        ids = torch.zeros(len(learned), self._top_k, dtype=torch.int64)
        log_probs = torch.full((len(learned), self._top_k), -torch.inf, dtype=torch.float64)
        tail = torch.ones(len(learned), dtype=torch.float64)
        segments = segments_of(batch)
        for segment, answer in zip(segments, self._answers(segments), strict=True):
            at = slice(segment.start, segment.start + len(answer.ids))
            ids[at], log_probs[at], tail[at] = answer.ids, answer.log_probs, answer.tail
        found = encode(
            ids[learned], log_probs[learned], tail[learned, None], self.facts.valid_vocab
        )
        return placed(found, learned, self.facts, kind)

    def probes(self, batches: Iterable[Batch]) -> list[dict[str, Any]]:
        """What the server says of the first positions of some text, to be compared later: ``ids``
        and ``log_probs`` of each, and the ``tail`` beyond all K ids."""
        found: list[dict[str, Any]] = []
        for batch in batches:
            segments, count = [], len(found)
            for segment in segments_of(batch):
                segments.append(segment)
                count += len(segment.tokens) - 1
                if count >= PROBES:
                    break
            for answer in self._answers(segments):
                found += [
                    {"ids": ids[:PROBE_IDS], "log_probs": values[:PROBE_IDS], "tail": tail}
                    for ids, values, tail in zip(
                        answer.ids.tolist(),
                        answer.log_probs.tolist(),
                        answer.tail.tolist(),
                        strict=True,
                    )
                ]
            if len(found) >= PROBES:
                break
        return found[:PROBES]

    def _answers(self, segments: Sequence[Segment]) -> list[Answer]:
        """The answers to some segments, in their order."""
        top_k, vocab = self._top_k, self.facts.valid_vocab
        try:
            return list(
                self._threads.map(lambda s: self.server.answer(s.tokens, top_k, vocab), segments)
            )
        except SadError as error:
            raise self.server.failure or error from None


class ServedLikelihood:
    """Makes the records of a cache by asking ``server`` for the likelihood of the text, in the
    tokens of its own tokenizer."""

    def __init__(self, server: TeacherServer) -> None:
        self.server = server
        self._threads = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="teacher")

    def records(self, batch: Batch, kind: Kind, uniform: Tensor) -> Record:
        """As ``TeacherSource.records``; nothing is drawn. Raises as ``TeacherServer.answer``."""
        assert kind == "likelihood" and batch.theirs is not None, kind
        theirs = batch.theirs.batch
        segments = segments_of(theirs)
        nll = torch.zeros(int(theirs.lengths.sum()), dtype=torch.float64)
        for segment, answer in zip(segments, self._answers(segments), strict=True):
            nll[segment.start : segment.start + len(answer)] = -answer
        padded = torch.zeros(theirs.labels.shape, dtype=torch.float64)
        padded[inputs_of(theirs)] = nll
        batch = batch.to(padded.device)
        return likelihood_record(batch, TeacherLikelihood.of(batch, padded))

    def probes(self, batches: Iterable[Batch]) -> list[dict[str, Any]]:
        """What the server says of the first tokens of some text, to be compared later: its
        ``log_prob`` of each."""
        found: list[dict[str, Any]] = []
        for batch in batches:
            assert batch.theirs is not None
            for answer in self._answers(segments_of(batch.theirs.batch)):
                found += [{"log_prob": value} for value in answer.tolist()]
            if len(found) >= PROBES:
                break
        return found[:PROBES]

    def _answers(self, segments: Sequence[Segment]) -> list[Tensor]:
        try:
            return list(self._threads.map(lambda s: self.server.likelihood(s.tokens), segments))
        except SadError as error:
            raise self.server.failure or error from None


def require_same_likelihood(
    before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]], where: object
) -> None:
    """As ``require_same_answers``, by the mean difference of log-probabilities."""
    pairs = zip(before, now, strict=False)
    total = sum(abs(one["log_prob"] - other["log_prob"]) for one, other in pairs)
    distance = total / max(len(now), 1) if len(before) == len(now) else math.inf
    if distance > PROBE_NATS:
        raise UnfitError(
            f"the server must give the likelihood that it gave when {where} was begun, got one "
            f"with a mean difference of {distance:.2f} nats at {len(now)} tokens; it runs other "
            "weights: start it with the first ones, or choose another --output"
        )


def require_same_answers(
    before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]], where: object
) -> None:
    """Raise ``UnfitError`` unless a server says of its probes what it said before: one that was
    started again with other weights does not."""
    if len(before) != len(now):
        distance = 1.0
    else:
        pairs = zip(before, now, strict=True)
        distance = sum(_distance(one, other) for one, other in pairs) / max(len(now), 1)
    if distance > PROBE_DISTANCE:
        raise UnfitError(
            f"the server must give the targets that it gave when {where} was begun, got such with "
            f"a mean distance of {distance:.2f} (total variation) at {len(now)} positions; it runs "
            "other weights: start it with the first ones, or choose another --output"
        )


def _distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Half of ``sum |p - p'|`` over the ids of both; an id that one of them lacks has 0 there."""
    p, q = (
        dict(zip(probe["ids"], torch.tensor(probe["log_probs"]).exp().tolist(), strict=True))
        for probe in (one, other)
    )
    return sum(abs(p.get(i, 0.0) - q.get(i, 0.0)) for i in p.keys() | q.keys()) / 2
