"""``sad cache-teacher --import PATH --kind hidden``: a teacher's states that vLLM has exported.

They come from before the final norm of ``config.teacher``, which is loaded: for this norm, for its
head, and to see on a few documents that the states are its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sad.config.cache_options import STATES_ENDING, CacheOptions, ImportFormat
from sad.config.schema import DistillConfig
from sad.data.chat import set_chat_template
from sad.data.rows import cache_directory
from sad.data.tokenizers import load_tokenizer, valid_vocab
from sad.distributed.world import ALONE, World
from sad.environment import library_versions, resolve_device, stop_if_requested
from sad.errors import UnfitError, UsageError
from sad.models.final_norm import FinalNorm, find_final_norm
from sad.models.load import load_teacher, read_model_config, teacher_dtype
from sad.models.preflight import require_known_positions
from sad.models.quantization import parameter_count
from sad.teachers.cache.facts import TeacherFacts
from sad.teachers.cache.files import ROWS, Section, read_facts
from sad.teachers.cache.own_rows import open_rows
from sad.teachers.cache.source import make_codec
from sad.teachers.fingerprint import HASHES, fingerprint_files, fingerprint_model
from sad.teachers.foreign.base import Context
from sad.teachers.foreign.records import IMPORTING, files_of
from sad.teachers.foreign.states import Agreement, require_own_states
from sad.teachers.foreign.vllm_hidden import ExportedSource, ExportedStates, input_states
from sad.teachers.frozen import FrozenTeacher
from sad.training.cache_layout import nothing_to_write, write_head
from sad.training.imported_rows import (
    ImportedRows,
    import_facts,
    import_inputs,
    imported_sections,
    is_whole,
    require_import_keys,
    spool_folder,
    write_import,
)
from sad.training.vocabulary import teacher_vocabulary

FORMAT: ImportFormat = "vllm-hidden"

Documents = dict[Section, list[Path]]
"""The file of each row of a section."""


def fill_from_states(
    config: DistillConfig, options: CacheOptions, folder: Path, world: World, shard_bytes: int
) -> Path:
    """As ``cache_teacher``, from the files of hidden states at ``options.import_path``; by one
    process.

    Raises ``UsageError`` also for keys that do not go with an import, and ``UnfitError`` for files
    that hold no such states, documents longer than ``max_length``, tokens that are not the
    tokenizer's, a teacher without one final norm, and states that are not its own.
    """
    assert options.import_path is not None
    require_import_keys(config, world)
    if config.teacher is None:
        raise UsageError(
            "teacher must be given to import hidden states, got none; name the model that they are "
            "of in the file: they need its final norm and its head"
        )
    paths = files_of(options.import_path, (STATES_ENDING,))
    theirs = _fingerprints(config, config.teacher, paths)
    whole = is_whole(folder, theirs, "files, teacher and teacher_dtype")
    if whole and not options.check:
        print(f"{folder} is whole: nothing to do", flush=True)
        return folder
    tokenizer = load_tokenizer(config.tokenizer or config.student, config.trust_remote_code_student)
    set_chat_template(tokenizer, config.data)
    context = Context(tokenizer, valid_vocab(tokenizer), None)
    _require_same_ids(config, config.teacher, context)
    print(f"loading the teacher {config.teacher}", flush=True)
    device = resolve_device(config.device)
    teacher = FrozenTeacher(load_teacher(config), context.vocab, device=device)
    if options.check:
        _check(config, folder, context, teacher)
        return folder
    norm = _final_norm(teacher, context)
    print(f"reading {len(paths):,} files of {options.import_path}", flush=True)
    with spool_folder(folder) as spool, closing(ImportedRows(config, context, spool)) as rows:
        documents = _read(paths, rows, teacher, norm, config.teacher)
        rows.require_both(options.import_path)
        every = [*documents["train"], *documents["eval"]]
        found = require_own_states(every, teacher, norm, config.teacher, options.import_path)
        inputs = import_inputs(context, rows.finish(options.import_path), device)
        facts = import_facts(
            config,
            inputs,
            shard_bytes,
            kind="hidden",
            codec=options.codec_or_default,
            top_k=None,
            temperatures=(),
            teacher=TeacherFacts(config.teacher, theirs, FORMAT),
            head=write_head(teacher, folder),
        )
        first_states = partial(input_states, documents["train"], norm)
        codec = make_codec(facts, folder, device, first_states)
        assert codec is not None

        def source_of(section: Section) -> ExportedSource:
            return ExportedSource(documents[section], norm, codec)

        notes = partial(_notes, teacher, found)
        write_import(config, folder, facts, inputs, rows.folder, notes, source_of)
    return folder


def _fingerprints(config: DistillConfig, name: str, paths: list[Path]) -> dict[str, str]:
    """What decides the records: one hash of all files, as there may be very many, the teacher's own
    files, and the dtype of its norm and its head."""
    memory = cache_directory(config.data.cache_dir) / HASHES
    digest = hashlib.blake2b(digest_size=16)
    for path, found in fingerprint_files(paths, memory).items():
        digest.update(f"{path.name} {found};".encode())
    commit = getattr(read_model_config(config, "teacher"), "_commit_hash", None)
    model = fingerprint_model(name, commit=commit, memory=memory)
    own = {f"teacher {part}": found for part, found in model.items()}
    dtype = str(teacher_dtype(config)).removeprefix("torch.")
    return {"states": f"{len(paths)} {digest.hexdigest()}", "teacher_dtype": dtype, **own}


def _require_same_ids(config: DistillConfig, name: str, context: Context) -> None:
    """Refuse a teacher with other ids than the student's: its documents would be other rows."""
    theirs = load_tokenizer(name, config.trust_remote_code_teacher)
    source = "student" if config.tokenizer is None else "tokenizer"
    found, notes = teacher_vocabulary(config, theirs, context.tokenizer, source, ALONE)
    if found is not None:
        raise UnfitError(
            f"teacher must have the student's ids to import its hidden states, got others in "
            f"{name}; let it run on your text: leave --import out"
        )
    for note in notes:
        print(f"note: {note}", flush=True)


def _final_norm(teacher: FrozenTeacher, context: Context) -> FinalNorm:
    model = teacher.model
    ids = torch.arange(16, device=next(model.parameters()).device) % context.vocab
    return find_final_norm(model, ids[None])


def _read(
    paths: list[Path], rows: ImportedRows, teacher: FrozenTeacher, norm: FinalNorm, name: str
) -> Documents:
    """Make each file a row, once its states have been read and found to be computed numbers."""
    documents: Documents = {"train": [], "eval": []}
    for path in paths:
        stop_if_requested(IMPORTING)
        document = ExportedStates(path)
        rows.check(document.tokens, str(path))
        require_known_positions(teacher.model.config, document.length - 1)
        document.require_width(norm.width, name)
        document.states()
        section = rows.add(document.tokens)
        assert section is not None
        documents[section].append(path)
    return documents


def _notes(teacher: FrozenTeacher, found: Agreement) -> Mapping[str, Any]:
    return {
        "versions": library_versions(),
        "format": FORMAT,
        "parameters": parameter_count(teacher.model),
        "model_type": teacher.model.config.model_type,
        "compared": found._asdict(),
    }


def _check(config: DistillConfig, folder: Path, context: Context, teacher: FrozenTeacher) -> None:
    """Compare some batches of the cache in ``folder`` with the teacher."""
    found = read_facts(folder)
    if found is None:
        raise UsageError(
            f"output must be a cache to be checked, got {folder}, which holds none; leave --check "
            "out to make it"
        )
    inputs = import_inputs(context, open_rows(folder / ROWS), teacher.device)
    facts = found[0]
    config = replace(config, max_eval_rows=facts.eval_places)  # whatever the run scores now
    sections = imported_sections(config, facts, inputs)
    say = partial(print, flush=True)
    nothing_to_write(folder, facts, sections, teacher.device, teacher, say, check=True)
