"""Sections of the configuration: what a run reads, one frozen dataclass each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from sad.config.values import (
    BELOW_ONE,
    FRACTION,
    NOT_EMPTY,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_INT,
    Range,
    convert_and_check,
    field_types,
    require,
)
from sad.curriculum import is_schedule

MAY_CHANGE_ON_RESUME = {"cadence": True}
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
    cache_dir: str | None = field(default=None, metadata=MAY_CHANGE_ON_RESUME)
    """Where packed rows are kept. Default: `$XDG_CACHE_HOME/sad` or `~/.cache/sad`."""

    def __post_init__(self) -> None:
        convert_and_check(self, DATA_RANGES, "data.")


# Structural losses. A weight of 0, the default, computes and keeps nothing. By `python -m bench
# ablation` relations, contrastive and attention help small models in every seed at the weights of
# the README, feature, layerwise, router and TAID do not reliably, and student-aware routing harms.
# Those that help are off as well: they ask of both models what not all have, and cost time.

Distance = Literal["cosine", "relative_mse"]
Pairs = tuple[tuple[int, ...], ...]
"""Student layer, teacher layer, both counted from 0; negative numbers count from the end."""
Points = tuple[tuple[float, ...], ...]
"""Share of training, factor."""

_WEIGHT = {"weight": NOT_NEGATIVE}


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Last hidden states, after the final norm: see `sad.losses.feature`."""

    weight: float = 0.0
    """Weight of the distance between the last hidden states of student and teacher."""
    distance: Distance = "cosine"
    """`cosine`, or `relative_mse`, which also compares magnitudes."""

    def __post_init__(self) -> None:
        convert_and_check(self, _WEIGHT, "feature.")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Attention maps: see `sad.losses.attention`."""

    weight: float = 0.0
    """Weight of the divergence between attention maps."""
    layers: Pairs = ((-1, -1),)
    """Pairs of student and teacher layers whose maps are compared."""
    head_map: Literal["block", "learned"] = "block"
    """How teacher heads are combined for student heads when their numbers differ."""
    query_block: int = 256
    """Query rows whose maps exist at a time: the memory bound."""

    def __post_init__(self) -> None:
        convert_and_check(self, _WEIGHT | {"query_block": POSITIVE_INT}, "attention.")
        _check_pairs(self.layers, "attention.layers")


@dataclass(frozen=True, kw_only=True)
class RelationsConfig:
    """Relations between queries, keys and values of a layer: see `sad.losses.relations`."""

    weight: float = 0.0
    """Weight of the divergence between relations (MiniLMv2), whatever the numbers of heads."""
    layers: Pairs = ((-1, -1),)
    """Pairs of student and teacher layers whose projections are compared."""
    query_block: int = 256
    """Rows whose relations exist at a time: the memory bound."""

    def __post_init__(self) -> None:
        convert_and_check(self, _WEIGHT | {"query_block": POSITIVE_INT}, "relations.")
        _check_pairs(self.layers, "relations.layers")


@dataclass(frozen=True, kw_only=True)
class LayerwiseConfig:
    """Outputs of decoder layers: see `sad.losses.layerwise`."""

    weight: float = 0.0
    """Weight of the distance between outputs of paired layers."""
    num_pairs: int = 4
    """Pairs of layers, spread evenly and ending with the last of both."""
    layers: Pairs | None = None
    """Pairs of student and teacher layers, in place of `num_pairs`; the last pair must be the last
    layers of both."""
    distance: Distance = "cosine"
    """`cosine`, or `relative_mse`, which also compares magnitudes."""
    pair_weights: Literal["uniform", "adaptive"] = "uniform"
    """`adaptive` gives closer pairs more weight, as far as the entropy of the weights allows."""

    def __post_init__(self) -> None:
        convert_and_check(self, _WEIGHT | {"num_pairs": POSITIVE_INT}, "layerwise.")
        _check_pairs(self.layers or ((0, 0),), "layerwise.layers")


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """Whole segments of text: see `sad.losses.contrastive`."""

    weight: float = 0.0
    """Weight of the symmetric InfoNCE between pooled hidden states."""
    queue_size: int = 1024
    """Teacher embeddings of earlier segments that serve as further negatives; 0: none."""
    temperature: float = 0.07
    """Of the similarities."""

    def __post_init__(self) -> None:
        ranges = {"queue_size": NOT_NEGATIVE, "temperature": POSITIVE}
        convert_and_check(self, _WEIGHT | ranges, "contrastive.")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Routers of mixture-of-experts students: see `sad.losses.router`."""

    weight: float = 0.0
    """Weight of the divergence between the gates of student and teacher, which must have equally
    many experts, the student's descending from the teacher's."""
    layers: Pairs | None = None
    """Pairs of student and teacher layers. Default: every layer with experts, in order."""
    balance_weight: float = 0.001
    """Of the student's load balance (Switch), beside the above."""
    z_weight: float = 0.001
    """Of the squared log-normaliser of the student's gates, beside the above."""

    def __post_init__(self) -> None:
        ranges = {"balance_weight": NOT_NEGATIVE, "z_weight": NOT_NEGATIVE}
        convert_and_check(self, _WEIGHT | ranges, "router.")
        _check_pairs(self.layers or ((0, 0),), "router.layers")


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """How the weight of each loss changes while training: points `[share of training, factor]`,
    joined by straight lines, constant before the first and after the last. Default: the phases of
    `sad.curriculum`."""

    kd: Points | None = None
    """Of `kd_weight`."""
    feature: Points | None = None
    """Of `feature.weight`."""
    attention: Points | None = None
    """Of `attention.weight`."""
    relations: Points | None = None
    """Of `relations.weight`."""
    layerwise: Points | None = None
    """Of `layerwise.weight`."""
    contrastive: Points | None = None
    """Of `contrastive.weight`."""
    router: Points | None = None
    """Of `router.weight`."""

    def __post_init__(self) -> None:
        convert_and_check(self, {}, "curriculum.")
        for name in field_types(CurriculumConfig):
            points = getattr(self, name)
            require(
                f"curriculum.{name}",
                "be points [share of training, factor] with shares rising from 0 to 1 at most and "
                "factors of at least 0",
                points,
                "for example [[0, 0], [0.3, 0], [0.6, 1]]",
                holds=points is None or is_schedule(points),
            )

    def schedules(self) -> dict[str, Any]:
        """The schedules that were given, by the name of their loss."""
        given = {name: getattr(self, name) for name in field_types(CurriculumConfig)}
        return {name: points for name, points in given.items() if points is not None}


@dataclass(frozen=True, kw_only=True)
class TAIDConfig:
    """A target that moves from student to teacher: see `sad.losses.taid.TAIDSchedule`."""

    enabled: bool = False
    """Compare the student with a mixture of its own and the teacher's logits (TAID)."""
    start: float = 0.4
    """Share of the teacher in the mixture at the beginning."""
    end: float = 1.0
    """Share of the teacher at the end."""
    alpha: float = 5e-4
    """How fast the share may run ahead of a straight line while the loss falls."""
    beta: float = 0.99
    """Decay of the moving average of the loss's relative change."""

    def __post_init__(self) -> None:
        share = Range("lie in (0, 1]", lambda v: 0 < v <= 1)
        ranges = {"start": share, "end": share, "alpha": NOT_NEGATIVE, "beta": BELOW_ONE}
        convert_and_check(self, ranges, "taid.")
        require(
            "taid.start",
            "be at most taid.end",
            self.start,
            "the share of the teacher only grows",
            holds=self.start <= self.end,
        )


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """What a mixture-of-experts teacher does with its experts: see `sad.teachers.routing`."""

    mode: Literal["teacher", "student_aware", "knowledge_augmentation"] = "teacher"
    """`teacher` leaves its routing alone. `student_aware` trains the teacher's gates, with all
    experts active, to teach this student. `knowledge_augmentation` averages over several passes
    with different experts."""
    learning_rate: float = 1e-4
    """Of the teacher's gates."""
    balance_weight: float = 0.01
    """Of the variation between the experts' loads, while the gates learn."""
    passes: int = 2
    """Teacher passes per micro-batch in `knowledge_augmentation`."""
    explore: float = 0.05
    """Probability, per token and layer, of experts drawn from the gate in
    `knowledge_augmentation`."""

    def __post_init__(self) -> None:
        ranges = {
            "learning_rate": NOT_NEGATIVE,
            "balance_weight": NOT_NEGATIVE,
            "passes": POSITIVE_INT,
            "explore": FRACTION,
        }
        convert_and_check(self, ranges, "routing.")


def _check_pairs(pairs: Pairs, key: str) -> None:
    require(
        key,
        "be pairs [student layer, teacher layer]",
        pairs,
        "for example [[0, 0], [-1, -1]]",
        holds=len(pairs) > 0 and all(len(pair) == 2 for pair in pairs),
    )
