"""A teacher whose ids are not those of its student: the map between them, and what it cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Literal

from transformers import PreTrainedTokenizerFast

from sad.config.schema import DistillConfig
from sad.data.chat import render
from sad.data.rows import PackedRows
from sad.data.split import split_documents
from sad.data.vocab_map import (
    DOCUMENTS,
    MAX_MASKED,
    VocabMap,
    find_vocab_map,
    masked_targets,
    require_alike_documents,
)
from sad.distributed.world import World
from sad.errors import UnfitError
from sad.teachers.cache.checks import require_answers
from sad.teachers.cache.facts import MapFacts
from sad.teachers.frozen import FrozenTeacher


def teacher_vocabulary(
    config: DistillConfig,
    theirs: PreTrainedTokenizerFast,
    ours: PreTrainedTokenizerFast,
    source: Literal["student", "tokenizer"],
    world: World,
) -> tuple[VocabMap | None, tuple[str, ...]]:
    """The map from the run's ids to the teacher's, None for equal ones, and notes for the header.

    Raises ``UnfitError`` for tokenizers that have none, and where a teacher cannot be run with one:
    split over several processes, with another routing than its own, and for a student that is made
    of its layers.
    """
    found, notes = find_vocab_map(theirs, ours, file=config.vocab_map, source=source)
    if found is None:
        return None, notes
    refusals = (
        (
            world.size > 1,
            "teacher must have the student's ids on several processes, got others and "
            f"WORLD_SIZE={world.size}; cache its targets with `sad cache-teacher`, or run one "
            "process",
        ),
        (
            config.routing.mode != "teacher",
            "routing.mode must be teacher where its ids differ from the student's, got "
            f"{config.routing.mode}; leave it out",
        ),
        (
            config.student_init == "layers",
            "tokenizer must have the teacher's ids with student_init layers, got others; leave it "
            "out: the student's embeddings are the teacher's",
        ),
    )
    for wrong, message in refusals:
        if wrong:
            raise UnfitError(message)
    return found, notes


def check_vocabulary(
    config: DistillConfig,
    found: VocabMap,
    theirs: PreTrainedTokenizerFast,
    ours: PreTrainedTokenizerFast,
    rows: tuple[PackedRows, PackedRows],
    teacher: FrozenTeacher,
) -> tuple[MapFacts, tuple[str, ...]]:
    """What a map means for a run's text and objective, with notes for its header.

    Raises ``UnfitError`` if the first documents are encoded otherwise under it, if more than 1 % of
    the targets stand behind a token that the teacher lacks, and for an objective that needs an
    answer where it has none.
    """
    require_alike_documents(found, theirs, ours, _texts(config, ours))
    missing, notes = int(found.missing.sum()), []
    masked = 0
    for name, part in zip(("training", "held-out"), rows, strict=True):
        targets = int(part.num_targets.sum())
        behind = masked_targets(part, found.missing) if missing else 0
        if behind > MAX_MASKED * targets:
            raise UnfitError(
                f"the teacher must be able to read {1 - MAX_MASKED:.0%} of the {name} text, got "
                f"{behind:,} of {targets:,} targets behind a token that it lacks; leave out such "
                "documents, or choose another teacher"
            )
        if behind:
            notes.append(
                f"{behind:,} of {targets:,} {name} targets stand behind a token that the teacher "
                "lacks: they learn from the text alone"
            )
        masked += behind
    require_answers(config, missing, masked)
    size = min(config.per_device_eval_batch_size, len(rows[1]))
    outside = teacher.mass_outside(rows[1].batch(range(size)).to(teacher.device))
    notes.append(
        f"{100 * outside:.2g} % of the teacher's probability is outside the student's vocabulary, "
        "by the first held-out rows"
    )
    return MapFacts(found.hash, missing, masked), tuple(notes)


def _texts(config: DistillConfig, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[str, str]]:
    """Names and texts of the first training documents."""
    documents, _ = split_documents(config.data, run_dir=config.output_dir)
    for document in islice(documents, DOCUMENTS):
        if document.conversation is None:
            yield document.name, document.text
        else:
            yield document.name, render(document, tokenizer, config.data).text
