"""How fast a run reads its teacher's cache: tokens per second, cold and warm.

Random rows of 512 tokens out of a cache of a million, whose records hold random numbers: sampled
ids at a vocabulary of 151,936, and hidden states of width 4096 (an eighth of the tokens). *Cold* is
after the system was told to forget the files (``posix_fadvise``); it may keep some of them. What is
measured is what a training step does: the records of a batch, decoded.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sad_kernels import Head

from sad.config.cache_options import Kind
from sad.data.batch import Batch, LossCounts
from sad.teachers.cache.facts import CacheFacts, HeadFacts, TeacherFacts
from sad.teachers.cache.files import (
    BASIS,
    CACHE,
    COMPLETE,
    HEAD,
    LENGTHS,
    SHARD_BYTES,
    all_names,
    shards_of,
    write_json,
    write_shard,
    write_tensors,
)
from sad.teachers.cache.hidden import Int8Codec
from sad.teachers.cache.reader import CacheReader
from sad.teachers.cached import CachedTeacher
from sad.teachers.fingerprint import fingerprint_file

LENGTH, K, VOCAB, WIDTH = 512, 64, 151_936, 4096
BATCH_ROWS = 8
KINDS: dict[str, tuple[Kind, str | None, int]] = {
    "sampled, K = 64": ("sampled", None, 1_000_000),
    "hidden, int8, D = 4096": ("hidden", "int8", 125_000),
    "hidden, bf16, D = 4096": ("hidden", "bf16", 125_000),
}
"""Name -> kind, codec and tokens."""


def measure(batches: int = 40, scale: float = 1.0) -> dict[str, Any]:
    """Tokens per second of each kind of cache, with all threads; ``scale`` shrinks the caches."""
    rows = []
    for name, (kind, codec, tokens) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            facts = _make(Path(folder), kind, codec, max(int(tokens * scale) // LENGTH, BATCH_ROWS))
            for how in ("cold", "warm"):
                found = _read(Path(folder), facts, batches, cold=how == "cold")
                rows.append({"what": name, "cache": how} | found)
    return {"case": "cache reading", "rows": rows, "batch_tokens": BATCH_ROWS * LENGTH}


def table(result: dict[str, Any]) -> list[str]:
    """Markdown, a line per kind and state of the system's memory of files."""
    lines = [
        "| cache | tokens/s | tokens per CPU second |",
        "|-|-:|-:|",
    ]
    lines += [
        f"| {row['what']}, {row['cache']} | {row['tokens_per_second']:,.0f} | "
        f"{row['tokens_per_cpu_second']:,.0f} |"
        for row in result["rows"]
    ]
    return lines


def _read(folder: Path, facts: CacheFacts, batches: int, *, cold: bool) -> dict[str, Any]:
    """Read ``batches`` batches of random rows and decode them."""
    reader = CacheReader(folder, memory=folder / "hashes.json", patience=1.0)
    teacher = CachedTeacher(reader, "train", temperature=1.0, device=torch.device("cpu"))
    if cold:  # opening the cache has hashed it
        _forget(folder)
    draw = random.Random(0)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(batches):
        teacher.forward(_batch([draw.randrange(facts.train_places) for _ in range(BATCH_ROWS)]))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tokens = batches * BATCH_ROWS * LENGTH
    return {"tokens_per_second": tokens / wall, "tokens_per_cpu_second": tokens / cpu}


def _batch(rows: list[int]) -> Batch:
    shape = (len(rows), LENGTH)
    ids = torch.zeros(shape, dtype=torch.int64)
    return Batch(
        input_ids=ids,
        labels=ids,
        position_ids=ids,
        lengths=torch.full((len(rows),), LENGTH),
        counts=LossCounts(targets=ids.numel(), tokens=ids.numel(), sequences=len(rows)),
        target_bytes=0,
        rows=torch.tensor(rows),
    )


def _make(folder: Path, kind: Kind, codec: Any, rows: int) -> CacheFacts:
    """A cache of ``rows`` rows of random records."""
    generator = torch.Generator().manual_seed(0)
    head = None
    if kind == "hidden":
        weight = Head(torch.zeros(1000, WIDTH)).weight
        write_tensors(folder / HEAD, {"weight": weight})
        head = HeadFacts(fingerprint_file(folder / HEAD), WIDTH, 1.0, None)
        if codec == "int8":
            states = torch.randn(16, WIDTH, generator=generator)
            write_tensors(folder / BASIS, Int8Codec.fitted(states).tensors())
    each = {"sampled": 288, "int8": WIDTH + 4, "bf16": 2 * WIDTH}[codec or "sampled"] * LENGTH
    facts = CacheFacts(
        kind=kind,
        codec=codec,
        top_k=K if kind == "sampled" else None,
        temperatures=(1.0,) if kind == "sampled" else (),
        seed=0,
        train_rows="",
        eval_rows="",
        max_length=LENGTH,
        packing=True,
        tokenizer="",
        valid_vocab=VOCAB if kind == "sampled" else 1000,
        teacher=TeacherFacts("random", {}, "float32"),
        head=head,
        order=None,
        subset=None,
        vocab_map=None,
        cross_tokenizer=None,
        batch_rows=1,
        rows_per_shard=max(SHARD_BYTES // each, 1),
        train_places=rows,
        eval_batch_rows=1,
        eval_rows_per_shard=1,
        eval_places=0,
    )
    (folder / CACHE).write_text(facts.to_json({}))
    shards = shards_of(facts, "train")
    for number in range(len(shards)):
        places = len(shards.of(number))
        n = places * LENGTH
        tensors = {LENGTHS: torch.full((places,), LENGTH, dtype=torch.int32)}
        tensors |= dict(_records(codec or "sampled", n, generator))
        write_shard(folder / shards.name(number), tensors, facts.plan)
    files = {name: fingerprint_file(folder / name) for name in all_names(facts)}
    write_json(folder / COMPLETE, {"plan": facts.plan, "files": files})
    return facts


def _records(what: str, n: int, generator: torch.Generator) -> Iterator[tuple[str, torch.Tensor]]:
    def bytes_of(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    if what == "sampled":
        yield "ids_lo", bytes_of(n, 2 * K).view(torch.uint16)
        yield "ids_hi", bytes_of(n, K // 2).bitwise_and(0x11)
        yield "logw", bytes_of(n, 2 * K).view(torch.uint16)
    elif what == "int8":
        yield "hidden", bytes_of(n, WIDTH).view(torch.int8)
        yield "scale", torch.rand(n, generator=generator)
    else:
        yield "hidden", torch.randn(n, WIDTH, generator=generator).bfloat16()


def _forget(folder: Path) -> None:
    """Write files out and drop them from the system's memory, as far as it does."""
    os.sync()
    for path in folder.iterdir():
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
