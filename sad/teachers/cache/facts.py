"""What a cache of a teacher's targets is a cache of: the content of its ``cache.json``.

Everything that decides a record is here: text, tokenizer, teacher, kind of target, temperatures,
how rows are grouped into shards. Two caches with the same ``plan``, a hash of it all, hold the same
records; a run refuses a cache whose facts are not its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np

from sad.config.cache_options import Codec
from sad.data.rows import epoch_permutation
from sad.errors import UnfitError
from sad.expected import (
    Check,
    UnexpectedValueError,
    boolean,
    every,
    integer,
    mapping,
    number,
    one_of,
    optional,
    plain,
    record,
    string,
)

FORMAT = 1
"""Version of the layout. A cache of another one is made again."""

Kind = Literal["sampled", "topk", "hidden", "likelihood"]
"""Of records. ``likelihood`` is that of the text, of a teacher with another tokenizer."""


@dataclass(frozen=True)
class TeacherFacts:
    """Which model the targets are those of."""

    name: str
    """As the configuration named it."""
    fingerprint: dict[str, str]
    """Commit, or size and hash of each file: see ``sad.teachers.fingerprint``."""
    dtype: str
    quantization: str | None = None
    attention: str | None = None


@dataclass(frozen=True)
class HeadFacts:
    """The teacher's output head, whose weight and bias are ``head.safetensors``."""

    hash: str
    """Size and BLAKE2b hash of that file."""
    width: int
    """Of the hidden states."""
    logit_scale: float
    softcap: float | None


@dataclass(frozen=True)
class MapFacts:
    """The map from the student's ids to the teacher's, where they differ; all targets are in the
    student's."""

    hash: str
    missing: int
    """Ids of the student that the teacher lacks."""
    masked: int
    """Targets behind a token that it cannot read, which have no record or one that is not used."""


@dataclass(frozen=True)
class CrossFacts:
    """How a student is compared with a teacher that has another tokenizer; all records are of
    positions in the student's tokens."""

    tokenizer: str
    """The teacher's: its fingerprint."""
    outcomes: str | None
    """A hash of the tables that say which outcome each token counts for; None where the likelihood
    of the text is all that is kept."""
    count: int | None
    """Outcomes: ids in records are their numbers."""

    @property
    def mode(self) -> str:
        """The run's ``cross_tokenizer``."""
        return "likelihood" if self.outcomes is None else "prefix"


@dataclass(frozen=True)
class RunOrder:
    """The one run whose order the records have, epoch by epoch."""

    seed: int
    micro_batches: int
    rows_per_micro_batch: int


@dataclass(frozen=True)
class Subset:
    """The training rows that runs of one seed read first, where these are not all of them."""

    seed: int
    rows: int
    """So many of the order that the seed gives the first epoch."""
    of: int
    """Training rows in all."""

    def numbers(self) -> np.ndarray:
        """The numbers of these rows, rising: int64 [rows]."""
        return np.sort(epoch_permutation(self.seed, 0, self.of)[: self.rows])


@dataclass(frozen=True)
class CacheFacts:
    """What a cache is a cache of.

    Training rows are records of ``kind``, held-out ones of ``eval_kind``, and both are grouped into
    batches, as the teacher saw them, and shards of whole batches.
    """

    kind: Kind
    codec: Codec | None
    """Of hidden states; None for other kinds."""
    top_k: int | None
    """Ids per position; None for hidden states and likelihoods."""
    temperatures: tuple[float, ...]
    """Of ``sampled`` the one it was drawn at, of ``topk`` those it can be read at."""
    seed: int
    """Of the samples."""
    train_rows: str
    """Fingerprint of the packed rows."""
    eval_rows: str
    max_length: int
    packing: bool
    tokenizer: str
    """Its fingerprint."""
    valid_vocab: int
    """Ids that the tokenizer can produce."""
    vocab_map: MapFacts | None
    """None for a teacher with the same ids."""
    cross_tokenizer: CrossFacts | None
    """None for a teacher with the same tokenizer."""
    teacher: TeacherFacts
    head: HeadFacts | None
    """None but for hidden states."""
    order: RunOrder | None
    """None for the order of the text, which serves every run that reads these rows."""
    subset: Subset | None
    """None for all training rows."""
    batch_rows: int
    rows_per_shard: int
    train_places: int
    """Rows that are cached, or with an ``order`` places of rows in the run."""
    eval_batch_rows: int
    eval_rows_per_shard: int
    eval_places: int
    """Held-out rows: so many of the sample that evaluations take first; 0 for likelihoods, which
    no evaluation reads."""

    @property
    def eval_kind(self) -> Kind:
        """Of what kind the records of held-out rows are: what is sampled cannot be scored."""
        return "topk" if self.kind == "sampled" else self.kind

    @property
    def tail_temperatures(self) -> tuple[float, ...]:
        """Temperatures at which records of the most likely ids have a tail: those of the cache, or
        1 for the held-out rows of a sampled one."""
        return (1.0,) if self.kind == "sampled" else self.temperatures

    @property
    def num_ids(self) -> int:
        """Ids that sparse records may hold: of the student's tokens, or of outcomes."""
        count = None if self.cross_tokenizer is None else self.cross_tokenizer.count
        return count or self.valid_vocab

    @property
    def plan(self) -> str:
        """A hash of all facts: equal for caches of the same records."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def to_json(self, notes: Mapping[str, Any]) -> str:
        """The content of ``cache.json``. ``notes`` are what decides no record: versions, scores."""
        content = {"format": FORMAT, "plan": self.plan, **asdict(self), "notes": dict(notes)}
        return json.dumps(content, indent=1) + "\n"


_HEAD = record(
    {
        "hash": string,
        "width": integer(1),
        "logit_scale": number(),
        "softcap": optional(number(0.0)),
    }
)
_TEACHER = record(
    {
        "name": string,
        "fingerprint": mapping(string),
        "dtype": string,
        "quantization": optional(string),
        "attention": optional(string),
    }
)
_MAP = record({"hash": string, "missing": integer(0), "masked": integer(0)})
_CROSS = record({"tokenizer": string, "outcomes": optional(string), "count": optional(integer(1))})
_ORDER = record(
    {"seed": integer(0), "micro_batches": integer(1), "rows_per_micro_batch": integer(1)}
)
_CHECKS: dict[str, Check] = {
    "kind": one_of(*get_args(Kind)),
    "codec": optional(one_of(*get_args(Codec))),
    "top_k": optional(integer(1)),
    "temperatures": every(number(0.0)),
    "seed": integer(0),
    "train_rows": string,
    "eval_rows": string,
    "max_length": integer(1),
    "packing": boolean,
    "tokenizer": string,
    "valid_vocab": integer(1),
    "vocab_map": optional(_MAP),
    "cross_tokenizer": optional(_CROSS),
    "teacher": _TEACHER,
    "head": optional(_HEAD),
    "order": optional(_ORDER),
    "subset": optional(record({"seed": integer(0), "rows": integer(1), "of": integer(1)})),
    "batch_rows": integer(1),
    "rows_per_shard": integer(1),
    "train_places": integer(1),
    "eval_batch_rows": integer(1),
    "eval_rows_per_shard": integer(1),
    "eval_places": integer(0),
}
assert list(_CHECKS) == [field.name for field in fields(CacheFacts)]

_FILE = record({"format": integer(1), "plan": string, **_CHECKS, "notes": mapping(plain)})

_NOTES: dict[str, Check] = {
    "scores": mapping(number()),
    "scored_rows": integer(0),
    "parameters": integer(0),
    "window": integer(0),
}
"""Those of the notes that runs read."""

MAX_SHARDS = 10**6
"""Of a section: so many of 256 MB are 256 TB."""


def _require_consistent(facts: CacheFacts, where: str) -> None:
    """Raise ``UnexpectedValueError`` for facts of which each could be, but not all together."""

    def require(holds: bool, key: str, expectation: str) -> None:
        if not holds:
            raise UnexpectedValueError(f"{where} {key}", expectation, getattr(facts, key))

    hidden, of_kind = facts.kind == "hidden", f"with {facts.kind} targets"
    for key in ("codec", "head"):
        expectation = f"{'be given' if hidden else 'be null'} {of_kind}"
        require((getattr(facts, key) is not None) == hidden, key, expectation)
    if facts.head is not None:
        scale, softcap = facts.head.logit_scale, facts.head.softcap
        require(
            scale != 0 and softcap != 0, "head", "have a logit_scale and a softcap other than 0"
        )
    sparse = facts.kind in ("sampled", "topk")
    expectation = f"{'be given' if sparse else 'be null'} {of_kind}"
    require((facts.top_k is not None) == sparse, "top_k", expectation)
    counts = {"sampled": (1,), "topk": range(1, 1000)}.get(facts.kind, (0,))
    require(len(facts.temperatures) in counts, "temperatures", f"be as many as go {of_kind}")
    require(all(t > 0 for t in facts.temperatures), "temperatures", "be above 0")
    if facts.kind == "topk":
        require(1.0 in facts.temperatures, "temperatures", "hold 1, at which is evaluated")
    crossed, likelihood = facts.cross_tokenizer, facts.kind == "likelihood"
    fits = crossed is not None if likelihood else crossed is None or not hidden
    if crossed is not None:
        fits &= (crossed.outcomes is None) == (crossed.count is None) == likelihood
    require(fits, "cross_tokenizer", f"be such as goes {of_kind}")
    for places, rows in (
        ("train_places", "rows_per_shard"),
        ("eval_places", "eval_rows_per_shard"),
    ):
        few = getattr(facts, places) <= MAX_SHARDS * getattr(facts, rows)
        require(few, places, f"fill {MAX_SHARDS:,} shards at most")


def facts_of(content: Mapping[str, Any], where: str) -> tuple[CacheFacts, dict[str, Any]]:
    """Facts and notes from the content of a ``cache.json``.

    Raises ``UnfitError`` for a content that no version, or another one, has written.
    """
    if content.get("format") != FORMAT and type(content.get("format")) is int:
        raise UnfitError(
            f"{where} must be of format {FORMAT}, got {content['format']}; make the cache again "
            "with `sad cache-teacher`"
        )
    try:
        _FILE(content, where)
        for key, check in _NOTES.items():
            if key in content["notes"]:
                check(content["notes"][key], f"{where} notes.{key}")
        values = {key: content[key] for key in _CHECKS}
        values["teacher"] = TeacherFacts(**values["teacher"])
        values["head"] = values["head"] and HeadFacts(**values["head"])
        values["vocab_map"] = values["vocab_map"] and MapFacts(**values["vocab_map"])
        values["cross_tokenizer"] = values["cross_tokenizer"] and CrossFacts(
            **values["cross_tokenizer"]
        )
        values["order"] = values["order"] and RunOrder(**values["order"])
        values["subset"] = values["subset"] and Subset(**values["subset"])
        values["temperatures"] = tuple(map(float, values["temperatures"]))
        facts = CacheFacts(**values)
        _require_consistent(facts, where)
        if facts.plan != content["plan"]:
            raise UnexpectedValueError(f"{where} plan", f"be {facts.plan}", content["plan"])
    except UnexpectedValueError as error:
        raise UnfitError(f"{error}; make the cache again with `sad cache-teacher`") from error
    return facts, content["notes"]
