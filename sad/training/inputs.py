"""The inputs of a run that are not trained: text, tokenizer, frozen teacher; checked to match."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from sad.config.schema import DistillConfig, config_to_dict
from sad.data.batch import Batch
from sad.data.chat import set_chat_template
from sad.data.rows import PackedRows, cache_directory, epoch_permutation, load_rows
from sad.data.tokenizers import (
    fingerprint,
    load_tokenizer,
    own_tokenizer,
    require_same_tokenizer,
    valid_vocab,
)
from sad.data.vocab_map import VocabMap, read_vocab_map
from sad.distributed.world import ALONE, World
from sad.environment import (
    library_versions,
    memory_now,
    resolve_device,
    seed_everything,
)
from sad.losses.cross_tokenizer import CrossTokenizerLoss
from sad.models.load import load_teacher, read_model_config
from sad.models.preflight import require_known_positions
from sad.optim.schedule import planned_length
from sad.report.terminal import waiting_bar
from sad.teachers.cache.checks import RunFacts, require_own_cache
from sad.teachers.cache.facts import CacheFacts, CrossFacts, MapFacts, RunOrder
from sad.teachers.cache.own_rows import rows_of_cache
from sad.teachers.cache.reader import CacheReader
from sad.teachers.cached import CachedTeacher
from sad.teachers.eval_teacher import EvalTeacher
from sad.teachers.fingerprint import HASHES, fingerprint_model
from sad.teachers.frozen import FrozenTeacher, Teacher
from sad.teachers.other_tokenizer import OtherTokenizerTeacher
from sad.teachers.sharded import load_sharded_teacher
from sad.training.batches import rank_batch
from sad.training.cross_tokenizer import (
    cross_facts,
    load_comparison,
    read_by_teacher,
    require_one_process,
)
from sad.training.vocabulary import check_vocabulary, teacher_vocabulary


@dataclass(frozen=True)
class RunInputs:
    """Everything a run reads; shared by the student, its baseline and a later evaluation."""

    tokenizer: PreTrainedTokenizerFast
    valid_vocab: int
    train_rows: PackedRows
    eval_rows: PackedRows
    teacher: Teacher | None
    eval_teacher: EvalTeacher | CachedTeacher | None
    """The same teacher, for evaluations: with its hidden states of the held-out rows."""
    device: torch.device
    rss_before: int
    """Resident memory in bytes before any of this was loaded."""
    tokenizer_notes: tuple[str, ...] = ()
    """In what the models' own tokenizers differ from ``tokenizer``, and which is taken."""
    teacher_fingerprint: dict[str, str] | None = None
    """What tells the teacher's weights from others: see ``sad.teachers.fingerprint``."""
    vocabulary: MapFacts | None = None
    """The map from the student's ids to those of a teacher that runs here; None for equal ids."""
    cross_tokenizer: CrossFacts | None = None
    """What a teacher's cache must agree with if the teacher has another tokenizer."""
    comparison: CrossTokenizerLoss | None = None
    """How the student is compared with a teacher that has another tokenizer."""
    world: World = ALONE

    @property
    def frozen_teacher(self) -> FrozenTeacher | None:
        """The teacher, if it runs here: not its cache."""
        return self.teacher if isinstance(self.teacher, FrozenTeacher) else None

    @property
    def teacher_follows_run(self) -> bool:
        """Whether the teacher's targets come from a cache in the order of this run alone."""
        teacher = self.teacher
        return isinstance(teacher, CachedTeacher) and teacher.reader.facts.order is not None

    def eval_row_numbers(self, config: DistillConfig) -> np.ndarray:
        """The held-out rows, or ``max_eval_rows`` of them: always the same sample."""
        return eval_row_numbers(self.eval_rows, config.max_eval_rows)

    def scored(self, config: DistillConfig) -> dict[str, int]:
        """How much text an evaluation scores: ``rows`` and ``targets``."""
        rows = self.eval_row_numbers(config)
        return {"rows": len(rows), "targets": self.eval_rows.counts(rows).targets}

    def eval_batches(self, config: DistillConfig, shown: str = "evaluating") -> Iterator[Batch]:
        """Batches of the rows that an evaluation scores, of this rank's part; on a terminal a bar
        says ``shown``.

        Raises ``StoppedError`` after a stop signal, before the next batch.
        """
        rows = self.eval_row_numbers(config)
        size, world = config.per_device_eval_batch_size, self.world
        share = slice(world.rank * size, (world.rank + 1) * size)
        starts = range(0, len(rows), size * world.size)
        for start in waiting_bar(starts, shown) if world.main else starts:
            world.stop_if_requested(shown)
            together = rows[start : start + size * world.size]
            batch = rank_batch(self.eval_rows, together, share, start)
            yield batch.to(self.device)

    def identity(self, config: DistillConfig) -> dict[str, Any]:
        """The run's identity, which checkpoints hold: what a resumed run must share with it."""
        return {
            "config": config_to_dict(config),
            "train_rows": self.train_rows.fingerprint,
            "eval_rows": self.eval_rows.fingerprint,
            "tokenizer": fingerprint(self.tokenizer),
            "world_size": self.world.size,
            "versions": library_versions(),
            "teacher": self._teacher_identity,
            "train_rows_content": self.train_rows.content,
            "eval_rows_content": self.eval_rows.content,
        }

    @property
    def _teacher_identity(self) -> dict[str, str] | None:
        if self.teacher_fingerprint is None or self.vocabulary is None:
            return self.teacher_fingerprint
        return self.teacher_fingerprint | {"vocab_map": self.vocabulary.hash}


def load_inputs(
    config: DistillConfig, say: Callable[[str], None] = lambda _: None, world: World = ALONE
) -> RunInputs:
    """Load tokenizer, teacher and rows of text, and seed the random generators.

    ``say`` is told of whatever may take long, before it does.

    Raises ``UsageError`` for what cannot be found and ``UnfitError`` for what cannot be used, such
    as a teacher with another tokenizer, or one that does not know as many positions.
    """
    seed_everything(config.seed, deterministic=config.deterministic)
    rss_before = memory_now()["rss_bytes"]
    device = resolve_device(config.device)
    # Configurations of models before tokenizers: a misspelt `student` must not be reported as a
    # missing `tokenizer`.
    read_model_config(config, "student")
    if config.loads_teacher:
        read_model_config(config, "teacher")
    of_layers = config.student_init == "layers"
    trust = config.trust_remote_code_teacher if of_layers else config.trust_remote_code_student
    tokenizer = load_tokenizer(config.tokenizer or config.student, trust)
    set_chat_template(tokenizer, config.data)
    vocabulary = valid_vocab(tokenizer)
    notes = _compare_with_student(config, tokenizer)
    teacher = eval_teacher = teacher_fingerprint = teacher_tokenizer = None
    found: VocabMap | None = None
    crosses = config.cross_tokenizer is not None
    if crosses or config.loads_teacher:
        name = config.teacher_tokenizer or config.teacher
        assert name is not None
        teacher_tokenizer = load_tokenizer(name, config.trust_remote_code_teacher)
    if crosses:
        require_one_process(world)
    memory = cache_directory(config.data.cache_dir) / HASHES
    if config.loads_teacher:
        assert config.teacher is not None
        assert teacher_tokenizer is not None
        source = "student" if config.tokenizer is None else "tokenizer"
        if not crosses:
            found, more = teacher_vocabulary(config, teacher_tokenizer, tokenizer, source, world)
            notes += more
        say(f"loading the teacher {config.teacher}")
        if crosses:
            teacher = OtherTokenizerTeacher(
                load_teacher(config), valid_vocab(teacher_tokenizer), device=device
            )
        else:
            teacher = load_sharded_teacher(config, vocabulary, device=device, world=world, say=say)
            teacher = teacher or FrozenTeacher(
                load_teacher(config), vocabulary, device=device, vocab_map=found
            )
        # One rank reads the files; what it finds is remembered for the others.
        teacher_fingerprint = world.main_first(
            partial(
                fingerprint_model,
                config.teacher,
                commit=getattr(teacher.model.config, "_commit_hash", None),
                memory=memory,
            )
        )
        eval_teacher = EvalTeacher(teacher, config.eval_cache_bytes, world)
    say("reading text")
    # An imported cache has rows of its own.
    comparison = crossing = None
    if crosses:
        assert teacher_tokenizer is not None
        train_rows, eval_rows, comparison, more = load_comparison(
            config, tokenizer, teacher_tokenizer, device
        )
        crossing = cross_facts(teacher_tokenizer, comparison)
        notes += more
    else:
        rows = world.main_first(partial(rows_of_cache, config))
        train_rows, eval_rows = rows or world.main_first(partial(load_rows, config, tokenizer))
    if config.teacher_cache is not None:
        teacher, eval_teacher = _open_cache(
            config,
            tokenizer,
            vocabulary,
            crossing,
            (train_rows, eval_rows),
            device,
            world,
            memory,
            say,
        )
        if teacher.kind == "likelihood":  # which tells nothing of other text than this
            eval_teacher = None
        teacher_fingerprint = {"cache": teacher.reader.facts.plan}
        notes += tuple(map(str, teacher.reader.notes.get("vocabulary", ())))
    elif teacher is not None:
        read = (read_by_teacher(rows) for rows in (train_rows, eval_rows))
        longest = max(rows.longest_segment for rows in read)
        require_known_positions(teacher.model.config, longest)
    facts = None
    if found is not None and isinstance(teacher, FrozenTeacher):
        assert teacher_tokenizer is not None
        facts, more = world.main_first(
            partial(
                check_vocabulary,
                *(config, found, teacher_tokenizer, tokenizer, (train_rows, eval_rows), teacher),
            )
        )
        notes += more
    return RunInputs(
        tokenizer=tokenizer,
        valid_vocab=vocabulary,
        train_rows=train_rows,
        eval_rows=eval_rows,
        teacher=teacher,
        eval_teacher=eval_teacher,
        device=device,
        rss_before=rss_before,
        tokenizer_notes=notes,
        teacher_fingerprint=teacher_fingerprint,
        vocabulary=facts,
        cross_tokenizer=crossing,
        comparison=comparison,
        world=world,
    )


def eval_row_numbers(rows: PackedRows, count: int | None) -> np.ndarray:
    """The held-out rows that evaluations score, ``count`` of them or all, in their order."""
    return epoch_permutation(0, 0, len(rows))[:count]


def _open_cache(
    config: DistillConfig,
    tokenizer: PreTrainedTokenizerFast,
    vocabulary: int,
    crossing: CrossFacts | None,
    rows: tuple[PackedRows, PackedRows],
    device: torch.device,
    world: World,
    memory: Path,
    say: Callable[[str], None],
) -> tuple[CachedTeacher, CachedTeacher]:
    """The teacher of training and that of evaluations, from their cache; refused if it is not this
    run's."""
    assert config.teacher_cache is not None
    say(f"opening the teacher's cache {config.teacher_cache}")
    reader = CacheReader(
        config.teacher_cache, memory=memory, patience=config.teacher_wait, world=world, say=say
    )
    train_rows, eval_rows = rows
    length = planned_length(config, len(train_rows), world.size)
    run = RunFacts(
        train_rows=train_rows.fingerprint,
        eval_rows=eval_rows.fingerprint,
        eval_places=len(eval_row_numbers(eval_rows, config.max_eval_rows)),
        tokenizer=fingerprint(tokenizer),
        valid_vocab=vocabulary,
        order=RunOrder(config.seed, length.micro_batches, length.batch_size),
        num_rows=len(train_rows),
        vocab_map=_named_map(config, vocabulary, reader.facts),
        cross_tokenizer=crossing,
    )
    require_own_cache(reader.facts, reader.notes, config, run, reader.folder, memory)
    return (
        CachedTeacher(reader, "train", temperature=config.temperature, device=device),
        CachedTeacher(reader, "eval", temperature=1.0, device=device),
    )


def _named_map(config: DistillConfig, vocabulary: int, facts: CacheFacts) -> str | None:
    """The hash of the map that a run with a cache names; how many ids the teacher has, the cache
    need not tell."""
    if config.vocab_map is None:
        return None
    named = read_vocab_map(config.vocab_map, vocabulary, 1 << 62)
    return None if named.is_identity and facts.vocab_map is None else named.hash


def _compare_with_student(
    config: DistillConfig, tokenizer: PreTrainedTokenizerFast
) -> tuple[str, ...]:
    """Compare ``tokenizer`` with the student's own, whose ids its pretrained weights stand for."""
    if config.tokenizer is None or config.student_init != "pretrained":
        return ()
    own = own_tokenizer(config.student, config.trust_remote_code_student)
    if own is None:
        return ()
    return require_same_tokenizer(own, tokenizer, role="student", source="tokenizer")
