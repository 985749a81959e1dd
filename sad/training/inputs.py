"""The inputs of a run that are not trained: text, tokenizer, frozen teacher; checked to match."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
from sad.distributed.world import ALONE, World
from sad.environment import (
    library_versions,
    memory_now,
    resolve_device,
    seed_everything,
)
from sad.models.load import load_teacher, read_model_config
from sad.models.preflight import require_known_positions
from sad.report.terminal import waiting_bar
from sad.teachers.eval_teacher import EvalTeacher
from sad.teachers.fingerprint import HASHES, fingerprint_model
from sad.teachers.frozen import FrozenTeacher
from sad.teachers.sharded import load_sharded_teacher
from sad.training.batches import rank_batch


@dataclass(frozen=True)
class RunInputs:
    """Everything a run reads; shared by the student, its baseline and a later evaluation."""

    tokenizer: PreTrainedTokenizerFast
    valid_vocab: int
    train_rows: PackedRows
    eval_rows: PackedRows
    teacher: FrozenTeacher | None
    eval_teacher: EvalTeacher | None
    """The same teacher, for evaluations: with its hidden states of the held-out rows."""
    device: torch.device
    rss_before: int
    """Resident memory in bytes before any of this was loaded."""
    tokenizer_notes: tuple[str, ...] = ()
    """In what the models' own tokenizers differ from ``tokenizer``, and which is taken."""
    teacher_fingerprint: dict[str, str] | None = None
    """What tells the teacher's weights from others: see ``sad.teachers.fingerprint``."""
    world: World = ALONE

    def eval_row_numbers(self, config: DistillConfig) -> np.ndarray:
        """The held-out rows, or ``max_eval_rows`` of them: always the same sample."""
        return epoch_permutation(0, 0, len(self.eval_rows))[: config.max_eval_rows]

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
            yield rank_batch(self.eval_rows, together, share).to(self.device)

    def identity(self, config: DistillConfig) -> dict[str, Any]:
        """The run's identity, which checkpoints hold: what a resumed run must share with it."""
        return {
            "config": config_to_dict(config),
            "train_rows": self.train_rows.fingerprint,
            "eval_rows": self.eval_rows.fingerprint,
            "tokenizer": fingerprint(self.tokenizer),
            "world_size": self.world.size,
            "versions": library_versions(),
            "teacher": self.teacher_fingerprint,
            "train_rows_content": self.train_rows.content,
            "eval_rows_content": self.eval_rows.content,
        }


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
    if config.teacher is not None:
        read_model_config(config, "teacher")
    of_layers = config.student_init == "layers"
    trust = config.trust_remote_code_teacher if of_layers else config.trust_remote_code_student
    tokenizer = load_tokenizer(config.tokenizer or config.student, trust)
    set_chat_template(tokenizer, config.data)
    vocabulary = valid_vocab(tokenizer)
    notes = _compare_with_student(config, tokenizer)
    teacher = eval_teacher = teacher_fingerprint = None
    if config.teacher is not None:
        teacher_tokenizer = load_tokenizer(config.teacher, config.trust_remote_code_teacher)
        source = "student" if config.tokenizer is None else "tokenizer"
        notes += require_same_tokenizer(teacher_tokenizer, tokenizer, source=source)
        say(f"loading the teacher {config.teacher}")
        teacher = load_sharded_teacher(config, vocabulary, device=device, world=world, say=say)
        teacher = teacher or FrozenTeacher(load_teacher(config), vocabulary, device=device)
        # One rank reads the files; what it finds is remembered for the others.
        teacher_fingerprint = world.main_first(
            partial(
                fingerprint_model,
                config.teacher,
                commit=getattr(teacher.model.config, "_commit_hash", None),
                memory=cache_directory(config.data.cache_dir) / HASHES,
            )
        )
        eval_teacher = EvalTeacher(teacher, config.eval_cache_bytes, world)
    say("reading text")
    train_rows, eval_rows = world.main_first(partial(load_rows, config, tokenizer))
    if teacher is not None:
        longest = max(rows.longest_segment for rows in (train_rows, eval_rows))
        require_known_positions(teacher.model.config, longest)
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
        world=world,
    )


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
