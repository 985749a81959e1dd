"""Sections of the configuration: what a run reads, one frozen dataclass each."""

from __future__ import annotations

from dataclasses import dataclass, field

from sad.checks import (
    BELOW_ONE,
    NOT_EMPTY,
    POSITIVE_INT,
    Range,
    convert_and_check,
)

CADENCE = {"cadence": True}
"""Metadata of keys that may differ between a run and its resumption: they say when, where and with
whose permission, and move no weight. Every other key decides the trajectory, and so does a key that
only changes rounding, such as ``impl``: a resumed run promises the same bits."""

DATA_RANGES = {
    "eval_fraction": BELOW_ONE,
    "text_field": NOT_EMPTY,
    "dataset_split": NOT_EMPTY,
    "dataset_eval_split": NOT_EMPTY,
    "document_separator": Range("not be empty", lambda v: v != ""),
    "max_documents": POSITIVE_INT,
}


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes rows of tokens."""

    train: tuple[str, ...] = ()
    """Files (.txt, .jsonl, .parquet), folders of them, the name of a `datasets` data set, or
    `python-stdlib`: the source of the standard library of the Python that runs this."""
    eval: tuple[str, ...] = ()
    """Held-out text, in the same forms. Empty: `eval_fraction` of the training documents."""
    eval_fraction: float = 0.05
    """Share of the documents held out for evaluation, chosen by a hash of each document's name."""
    text_field: str = "text"
    """The field that holds the text in .jsonl, .parquet and `datasets` records."""
    document_separator: str | None = None
    """Splits a .txt file into documents; without it each file is one document."""
    dataset_config: str | None = None
    """Configuration name of a `datasets` data set."""
    dataset_split: str = "train"
    """Split of a `datasets` data set named in `train`."""
    dataset_eval_split: str = "validation"
    """Split of a `datasets` data set named in `eval`."""
    max_documents: int | None = None
    """Use only this many documents of `data.train`, chosen by the hash of their names."""
    cache_dir: str | None = field(default=None, metadata=CADENCE)
    """Where packed rows are kept. Default: `$XDG_CACHE_HOME/sad` or `~/.cache/sad`."""

    def __post_init__(self) -> None:
        convert_and_check(self, DATA_RANGES, "data.")
