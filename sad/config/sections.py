"""Sections of the configuration, one frozen dataclass each: data, structural losses, routing ...

A key is a field with its type, its default and, as a docstring under it, its line in
``sad distill --help``. The type carries the constraint on the value (``sad.config.values``). To add
a section: its class here, and a field of ``sad.config.schema.DistillConfig`` under its name. The
sections of structural losses are recognised by their base class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from sad.config.values import (
    INPUT_PATH,
    NAME,
    PATH,
    Constraint,
    Fraction,
    FractionBelowOne,
    Name,
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    convert_and_check,
    is_path,
    require,
)
from sad.curriculum import RAMPS, is_schedule

MAY_CHANGE_ON_RESUME = {"may_change_on_resume": True}
"""Metadata of keys that may differ between a run and its resumption: they say when, where and with
whose permission, and change no weight. Every other key decides the trajectory, and so does a key
that only changes rounding, such as ``impl``: a resumed run promises the same bits."""

TextSources = Annotated[
    tuple[str, ...], INPUT_PATH, PATH._replace(holds=lambda paths: all(map(is_path, paths)))
]
TextSource = Annotated[NonEmptyStr, INPUT_PATH, PATH]
Processes = Annotated[PositiveInt, Constraint("be at most 1,024", lambda v: v <= 1024)]
Distance = Literal["cosine", "relative_mse"]

Weights = Annotated[
    tuple[float, ...],
    Constraint("be numbers above 0", lambda weights: all(w > 0 for w in weights)),
    Constraint("be at most a million", lambda weights: all(w <= 1e6 for w in weights)),
]

Pairs = Annotated[
    tuple[tuple[int, ...], ...],
    Constraint(
        "be pairs [student layer, teacher layer]",
        lambda pairs: len(pairs) > 0 and all(len(pair) == 2 for pair in pairs),
        "for example [[0, 0], [-1, -1]]",
    ),
]
"""Student layer, teacher layer, both counted from 0; negative numbers count from the end."""

Points = Annotated[
    tuple[tuple[float, ...], ...],
    Constraint(
        "be points [share of training, factor] with shares rising from 0 to 1 at most and factors "
        "of at least 0",
        is_schedule,
        "for example [[0, 0], [0.3, 0], [0.6, 1]]",
    ),
]
"""Share of training, factor."""

S = TypeVar("S")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section of the configuration; values are converted and checked when it is built."""

    name: ClassVar[str]
    """Its key in the configuration."""

    def __post_init__(self) -> None:
        convert_and_check(self, f"{self.name}.")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Sources of text, the documents held out, and the cache of packed rows."""

    name = "data"

    train: TextSources = ()
    """Files (such as .txt, .json, .jsonl, .parquet), folders of them, the name of a `datasets` data
    set, or `python-stdlib`: the source of the standard library of the Python that runs this, or
    `python-stdlib-functions`: its documented functions, of which the bodies are learned."""
    eval: TextSources = ()
    """Held-out text, in the same forms. Empty: `eval_fraction` of the training documents."""
    eval_fraction: FractionBelowOne = 0.05
    """Share of the documents held out for evaluation, chosen by a hash of each document's name."""
    text_field: Name | None = None
    """The field that holds the text in records: .json, .jsonl, .parquet and `datasets`. Default,
    for each record: `messages`, else `prompt` and `completion`, else `text`."""
    document_separator: Annotated[str | None, Constraint("not be empty", bool)] = None
    """Splits a .txt file into documents; without it each file is one document."""
    dataset_config: Annotated[str | None, NAME] = None
    """Configuration name of a `datasets` data set."""
    dataset_split: Name = "train"
    """Split of a `datasets` data set named in `train`."""
    dataset_eval_split: Name = "validation"
    """Split of a `datasets` data set named in `eval`."""
    train_weights: Weights | None = None
    """One number per entry of `train`: how often its training documents are read per epoch, 1 by
    default. Of 2.5 all are read twice and half of them, chosen by the hash of their names, once
    more. In a file an entry of `train` may be written `{path: code/, weight: 2.5}`."""
    max_documents: PositiveInt | None = None
    """Use only this many documents of `data.train`, chosen by the hash of their names."""
    completion_only_loss: bool | None = None
    """Learn completions alone; their prompts are context. Default: true for records with `prompt`
    and `completion`, the only ones it applies to."""
    assistant_only_loss: bool = False
    """Learn only what the assistant says in conversations. Needs a chat template that marks it with
    `{% generation %}`."""
    chat_template_path: TextSource | None = None
    """A Jinja file, or a folder or id of a tokenizer, whose chat template makes text of messages.
    Default: the tokenizer's own. The exported student has the one that was used."""
    chat_template: NonEmptyStr | None = None
    """The chat template itself, in place of `data.chat_template_path`."""
    truncation: Literal["drop", "keep_start", "keep_end"] = "drop"
    """What becomes of conversations, and of prompts with their completions, that are longer than
    `max_length`: they are left out, or their beginning or end is kept. Each is counted."""
    add_special_tokens: bool = True
    """Begin a document of text as `tokenizer(text)` does, with BOS for many tokenizers. Chat
    templates bring their own."""
    document_end: Name | None = None
    """The token that ends a document of text, such as `<|endoftext|>`. Default: the tokenizer's end
    of text. Chat templates bring their own."""
    num_proc: Processes | None = field(default=None, metadata=MAY_CHANGE_ON_RESUME)
    """Processes that tokenize; the rows are the same whatever their number. Default: one per core
    where there is much text, else none besides this one."""
    cache_dir: Annotated[str | None, PATH] = field(default=None, metadata=MAY_CHANGE_ON_RESUME)
    """Where packed rows are kept. Default: `$XDG_CACHE_HOME/sad` or `~/.cache/sad`."""

    def __post_init__(self) -> None:
        _take_weights_apart(self)
        super().__post_init__()
        require(
            "data.chat_template",
            "be left out with data.chat_template_path",
            self.chat_template,
            "give one of the two",
            holds=self.chat_template is None or self.chat_template_path is None,
        )
        require(
            "data.train_weights",
            f"be one number per entry of data.train ({len(self.train)})",
            self.train_weights,
            "give each its weight, or leave the key out",
            holds=self.train_weights is None or len(self.train_weights) == len(self.train),
        )

    @property
    def weighted(self) -> bool:
        """Whether a source is read more or less often than once per epoch."""
        return any(weight != 1 for weight in self.train_weights or ())


def _take_weights_apart(config: DataConfig) -> None:
    """Turn entries ``{path: ..., weight: ...}`` of ``train`` into paths and ``train_weights``."""
    entries = config.train if isinstance(config.train, list | tuple) else [config.train]
    if not any(isinstance(entry, Mapping) for entry in entries):
        return
    paths, weights = [], []
    for entry in entries:
        plain: Any = entry if isinstance(entry, Mapping) else {"path": entry}
        require(
            "data.train",
            "hold texts, or entries with path and weight",
            entry,
            "write for example {path: code/, weight: 2}",
            holds="path" in plain and plain.keys() <= {"path", "weight"},
        )
        paths.append(plain["path"])
        weights.append(plain.get("weight", 1))
    require(
        "data.train_weights",
        "be left out where entries of data.train have weights",
        config.train_weights,
        "keep one of both",
        holds=config.train_weights is None,
    )
    object.__setattr__(config, "train", paths)
    object.__setattr__(config, "train_weights", weights)


# Structural losses. With a weight of 0, the default, nothing is captured or computed for one. By
# `python -m bench ablation` relations, contrastive and attention help small models in every seed at
# the weights of the README, feature, layerwise, router and TAID do not reliably, and student-aware
# routing harms. Those that help are off by default as well: not every model supports them, and they
# cost time.


@dataclass(frozen=True, kw_only=True)
class StructuralSection(Section):
    """The section of a structural loss, which a weight above 0 turns on."""

    weight: NonNegativeFloat = 0.0


@dataclass(frozen=True, kw_only=True)
class FeatureConfig(StructuralSection):
    """Last hidden states, after the final norm: see `sad.losses.feature`."""

    name = "feature"

    weight: NonNegativeFloat = 0.0
    """Weight of the distance between the last hidden states of student and teacher."""
    distance: Distance = "cosine"
    """`cosine`, or `relative_mse`, which also compares magnitudes."""


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(StructuralSection):
    """Attention maps: see `sad.losses.attention`."""

    name = "attention"

    weight: NonNegativeFloat = 0.0
    """Weight of the divergence between attention maps."""
    layers: Pairs = ((-1, -1),)
    """Pairs of student and teacher layers whose maps are compared."""
    head_map: Literal["block", "learned"] = "block"
    """How teacher heads are combined for student heads when their numbers differ."""
    query_block: PositiveInt = 256
    """Query rows whose maps are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class RelationsConfig(StructuralSection):
    """Relations between queries, keys and values of a layer: see `sad.losses.relations`."""

    name = "relations"

    weight: NonNegativeFloat = 0.0
    """Weight of the divergence between relations (MiniLMv2), whatever the numbers of heads."""
    layers: Pairs = ((-1, -1),)
    """Pairs of student and teacher layers whose projections are compared."""
    query_block: PositiveInt = 256
    """Rows whose relations are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class LayerwiseConfig(StructuralSection):
    """Outputs of decoder layers: see `sad.losses.layerwise`."""

    name = "layerwise"

    weight: NonNegativeFloat = 0.0
    """Weight of the distance between outputs of paired layers."""
    num_pairs: PositiveInt = 4
    """Pairs of layers, spread evenly and ending with the last of both."""
    layers: Pairs | None = None
    """Pairs of student and teacher layers, in place of `num_pairs`; the last pair must be the last
    layers of both."""
    distance: Distance = "cosine"
    """`cosine`, or `relative_mse`, which also compares magnitudes."""
    pair_weights: Literal["uniform", "adaptive"] = "uniform"
    """`adaptive` gives closer pairs more weight, as far as the entropy of the weights allows."""


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig(StructuralSection):
    """Whole segments of text: see `sad.losses.contrastive`."""

    name = "contrastive"

    weight: NonNegativeFloat = 0.0
    """Weight of the symmetric InfoNCE between pooled hidden states."""
    queue_size: NonNegativeInt = 1024
    """Teacher embeddings of earlier segments that serve as further negatives; 0: none."""
    temperature: PositiveFloat = 0.07
    """Temperature of the similarities."""


@dataclass(frozen=True, kw_only=True)
class RouterConfig(StructuralSection):
    """Routers of mixture-of-experts students: see `sad.losses.router`."""

    name = "router"

    weight: NonNegativeFloat = 0.0
    """Weight of the divergence between the gates of student and teacher, which must have equally
    many experts, the student's descending from the teacher's."""
    layers: Pairs | None = None
    """Pairs of student and teacher layers. Default: every layer with experts, in order."""
    balance_weight: NonNegativeFloat = 0.001
    """Weight of the student's load-balancing loss (Switch Transformer), added to the above."""
    z_weight: NonNegativeFloat = 0.001
    """Weight of the squared log-normaliser of the student's gates (z-loss), added to the above."""


def _one_key_per_loss(cls: type[S]) -> type[S]:
    """Add a field for each loss that a curriculum knows: a new loss is named in ``RAMPS`` alone."""
    for loss in RAMPS:
        cls.__annotations__[loss] = "Points | None"
        setattr(cls, loss, None)
    return cls


@dataclass(frozen=True, kw_only=True)
@_one_key_per_loss
class CurriculumConfig(Section):
    """Schedules of loss weights, one key per loss: points `[share of training, factor]`, joined by
    straight lines, constant before the first and after the last. Default: the phases of
    `sad.curriculum`."""

    name = "curriculum"
    field_docs: ClassVar[dict[str, str]] = {
        loss: f"Schedule of `{'kd_weight' if loss == 'kd' else f'{loss}.weight'}`."
        for loss in RAMPS
    }
    """Key -> its line in the help; the source has no field where it could stand."""

    def schedules(self) -> dict[str, Any]:
        """Loss -> its schedule, of the losses that were given one."""
        given = {loss: getattr(self, loss) for loss in RAMPS}
        return {loss: points for loss, points in given.items() if points is not None}


LoRAInit = Literal["gaussian", "orthogonal"]
"""PEFT's initialisations that leave the weights under the adapters as they are."""


Pattern = Annotated[
    dict[str, int],
    Constraint("hold numbers of at least 1", lambda v: all(n >= 1 for n in v.values())),
]


@dataclass(frozen=True, kw_only=True)
class PeftConfig(Section):
    """LoRA adapters of the student, by PEFT's keys: see `sad.models.adapters`.

    Any key that is given turns them on; the others then have PEFT's defaults.
    """

    name = "peft"

    peft_type: Literal["LORA"] | None = None
    """Train adapters of this kind instead of the student's own weights, which stay frozen. Any key
    of `peft` turns them on; needs the extra `peft`."""
    r: PositiveInt | None = None
    """Rank of the adapters. Default: PEFT's, 8."""
    lora_alpha: PositiveInt | None = None
    """The adapters' product is multiplied by `lora_alpha / r`. Default: PEFT's, 8."""
    lora_dropout: FractionBelowOne | None = None
    """Dropout of what the adapters read. Default: none."""
    target_modules: tuple[str, ...] | None = None
    """Names of the layers that get adapters, `all-linear`, or one regular expression for their
    whole names. Default: PEFT's choice for the family, often the attention's projections."""
    target_parameters: tuple[str, ...] | None = None
    """Ends of the names of parameters that get adapters where no layer of its own holds them, such
    as `mlp.experts.gate_up_proj`; without dropout and DoRA. With `target_modules: []` these
    alone."""
    exclude_modules: tuple[str, ...] | None = None
    """Names of layers that get none, or one regular expression."""
    layers_to_transform: tuple[int, ...] | None = None
    """Numbers of the decoder layers that get adapters. Default: all."""
    rank_pattern: Pattern | None = None
    """Other ranks than `r`: ends of layers' names, or regular expressions for them, to numbers. The
    first that fits counts."""
    alpha_pattern: Pattern | None = None
    """Other values than `lora_alpha`, in the same form."""
    bias: Literal["none", "all", "lora_only"] | None = None
    """Which biases of the student are trained besides. Default: none."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules that are trained whole and saved with the adapters; the head cannot be one."""
    use_rslora: bool | None = None
    """Scale the adapters by `lora_alpha / sqrt(r)`."""
    use_dora: bool | None = None
    """Train magnitude and direction apart (DoRA)."""
    init_lora_weights: LoRAInit | None = None
    """How adapters begin. Default: PEFT's, at which they change nothing yet. What would change the
    weights under them (pissa, olora ...) is not offered."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, name in (("lora_dropout", "dropout"), ("use_dora", "DoRA")):
            require(
                f"peft.{key}",
                "be left out with peft.target_parameters",
                getattr(self, key),
                f"PEFT has no {name} for parameters: leave out one of the two",
                holds=not (getattr(self, key) and self.target_parameters),
            )
        require(
            "peft.layers_to_transform",
            "be left out with peft.target_parameters",
            self.layers_to_transform,
            "PEFT does not look at it there: name the layers, as in layers.1.mlp.experts.down_proj",
            holds=not (self.layers_to_transform and self.target_parameters),
        )

    @property
    def enabled(self) -> bool:
        """Whether the student is trained through adapters."""
        return any(getattr(self, item.name) is not None for item in fields(self))


PositiveFraction = Annotated[float, Constraint("lie in (0, 1]", lambda v: 0 < v <= 1)]


@dataclass(frozen=True, kw_only=True)
class TAIDConfig(Section):
    """Targets interpolated between student and teacher: see `sad.losses.taid.TAIDSchedule`."""

    name = "taid"

    enabled: bool = False
    """Compare the student with a mixture of its own and the teacher's logits (TAID)."""
    start: PositiveFraction = 0.4
    """Share of the teacher in the mixture at the beginning."""
    end: PositiveFraction = 1.0
    """Share of the teacher at the end."""
    alpha: NonNegativeFloat = 5e-4
    """How fast the share may run ahead of a straight line while the loss falls."""
    beta: FractionBelowOne = 0.99
    """Decay of the moving average of the loss's relative change."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            "taid.start",
            "be at most taid.end",
            self.start,
            "the share of the teacher only grows",
            holds=self.start <= self.end,
        )


@dataclass(frozen=True, kw_only=True)
class RoutingConfig(Section):
    """Routing of a mixture-of-experts teacher: see `sad.teachers.routing`."""

    name = "routing"

    mode: Literal["teacher", "student_aware", "knowledge_augmentation"] = "teacher"
    """`teacher` keeps its own routing. `student_aware` trains the teacher's gates, with all
    experts active, to teach this student. `knowledge_augmentation` averages over several passes
    with different experts."""
    learning_rate: NonNegativeFloat = 1e-4
    """Learning rate of the teacher's gates."""
    balance_weight: NonNegativeFloat = 0.01
    """Weight of the variation between the experts' loads, while the gates learn."""
    passes: PositiveInt = 2
    """Teacher passes per micro-batch in `knowledge_augmentation`."""
    explore: Fraction = 0.05
    """Probability, per token and layer, of experts drawn from the gate in
    `knowledge_augmentation`."""
