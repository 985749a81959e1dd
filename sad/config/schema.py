"""The configuration of a run: one frozen dataclass defines Python, YAML and command-line keys.

Names that users know from ``transformers.TrainingArguments`` are reused where the meaning is the
same. Suffixes tell the unit: ``_steps`` counts optimizer steps, ``_batches`` micro-batches,
``_ratio`` is a fraction of training.

A configuration converts and checks its values when it is built, wherever they come from: a mistake
is found before weights are loaded or text is read. ``sad.config.load`` reads files and the command
line. No torch is imported for it: help and error messages would wait seconds.

To add a key: a field with its type, its default and a docstring, which becomes its line in
``sad distill --help``; then its use. What its value must satisfy is part of the type, as in
``PositiveInt``, and so is that it names something to read (``sad.config.values``). Conditions
between keys are checked by the functions at the end of this file.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

import yaml
from sad_kernels._divergence_table import Divergence
from sad_kernels._tiles import LogitStorage
from sad_kernels.objective import Objective

from sad.config.cross_tokenizer import check_cross_tokenizer
from sad.config.on_policy import check_on_policy
from sad.config.sections import (
    MAY_CHANGE_ON_RESUME,
    AttentionConfig,
    ContrastiveConfig,
    CurriculumConfig,
    DataConfig,
    FeatureConfig,
    LayerwiseConfig,
    PeftConfig,
    PositiveFraction,
    RelationsConfig,
    RouterConfig,
    RoutingConfig,
    StructuralSection,
    TAIDConfig,
)
from sad.config.updates import LARGEST_UPDATE, update_bound
from sad.config.values import (
    HOME_PATH,
    INPUT_PATH,
    NAME,
    PATH,
    SMALL,
    ConfigError,
    Constraint,
    Fraction,
    FractionBelowOne,
    Name,
    NonEmptyStr,
    NonNegativeBytes,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveBytes,
    PositiveFloat,
    PositiveInt,
    convert_and_check,
    require,
    section_types,
)
from sad.metrics import best_model_metrics

SchedulerName = Literal["linear", "cosine", "constant", "wsd"]
"""The names of ``sad.optim.schedule.SCHEDULES``."""
SchedulerUnit = Literal["batch", "optimizer_step"]
DtypeName = Literal["float32", "bfloat16", "float16"]
Impl = Literal["auto", "triton", "torch"]

ModelPath = Annotated[NonEmptyStr, INPUT_PATH, PATH]
MaxSteps = Annotated[int, Constraint("be -1 or at least 1", lambda v: v == -1 or v >= 1), SMALL]
StepsOrFraction = Annotated[
    float,
    Constraint(
        "be a whole number of steps, or a fraction below 1",
        lambda v: 0 <= v < 1 or (v > 0 and v.is_integer()),
    ),
    SMALL,
]
LayerChoice = Annotated[
    int | tuple[int, ...],
    Constraint(
        "be a number of layers, or a list of layers",
        lambda v: v >= 1 if isinstance(v, int) else len(v) >= 1,
        "for example 4, or [0, 3, 7, 11]",
    ),
]
Seed = Annotated[int, Constraint("lie in [0, 2^32)", lambda v: 0 <= v < 2**32)]
ZeroOrOne = Annotated[int, Constraint("be 0 or 1", lambda v: v in (0, 1))]
AtLeastTwo = Annotated[int, Constraint("be at least 2", lambda v: v >= 2), SMALL]
Epochs = Annotated[PositiveFloat, Constraint("be at most a million", lambda v: v <= 1e6)]
# A decay that fp32 rounds to 1 divides by 0, and so does an epsilon that it rounds to 0.
MomentDecay = Annotated[
    FractionBelowOne, Constraint("be at most 0.999999", lambda v: v <= 0.999999)
]
Epsilon = Annotated[PositiveFloat, Constraint("be at least 1e-30", lambda v: v >= 1e-30)]

USUAL_DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Kinds of devices that every version of torch knows and that hold numbers."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """The configuration of a run, saved in resolved form with the run and in every checkpoint.

    Values are converted to the types of their fields (``"1e-4"`` to a float, a text to a tuple of
    one) and checked. Raises ``UsageError`` for a wrong type, a value out of range, or keys that
    contradict each other.
    """

    # Models
    student: ModelPath = ""
    """Hugging Face id or local path of the student, or with `student_init: random` of its
    configuration. Needed unless `student_init` is `layers`."""
    teacher: ModelPath | None = None
    """Hugging Face id or local path of the teacher. Needed unless `kd_weight` is 0 or there is a
    `teacher_cache`."""
    teacher_cache: Annotated[NonEmptyStr | None, INPUT_PATH, PATH] = field(
        default=None, metadata=MAY_CHANGE_ON_RESUME
    )
    """Folder of the teacher's targets that `sad cache-teacher` has made: the teacher itself is not
    loaded, and need not be there."""
    teacher_wait: PositiveInt = field(default=600, metadata=MAY_CHANGE_ON_RESUME)
    """Seconds to wait for a teacher that fills its cache meanwhile and gives no sign of life; then
    the run saves its state and ends."""
    vocab_map: ModelPath | None = field(default=None, metadata=MAY_CHANGE_ON_RESUME)
    """JSON file of the teacher's id for each of the student's, for vocabularies of a common base: a
    list, or an object of student id -> teacher id, null for none. Default: by equal tokens, where
    all that the teacher lacks were added to the student's tokenizer."""
    cross_tokenizer: Literal["prefix", "likelihood"] | None = None
    """How to learn from a teacher with another tokenizer. `prefix` compares what both predict where
    they have read the same bytes, each token counting for its longest prefix that both have as a
    token; `likelihood` the probability that they give to the text between two such places."""
    teacher_tokenizer: ModelPath | None = None
    """With `cross_tokenizer`: Hugging Face id or local path of the teacher's tokenizer. Default:
    the teacher's own."""
    closed_outcomes: bool = True
    """With `cross_tokenizer`: leave out shared tokens whose text the other side spells otherwise in
    more than `outcome_threshold` of their uses; they count for a shorter shared prefix."""
    outcome_threshold: Fraction = 0.03
    """See `closed_outcomes`."""
    prefix_inside: bool = False
    """With `cross_tokenizer: prefix`: compare inside the teacher's tokens as well, where its last
    distribution is conditioned on the bytes that have come since. For research: slow."""
    likelihood_weight: NonNegativeFloat = 0.0
    """With `cross_tokenizer: prefix`: weight of the loss of `likelihood` as a further term, times
    `kd_weight`."""
    tokenizer: ModelPath | None = None
    """Hugging Face id or local path of the tokenizer. Default: the student's own."""
    student_init: Literal["pretrained", "random", "layers"] = "pretrained"
    """`random` builds the student from its configuration alone, with weights drawn from `seed`;
    `layers` makes it of the teacher's embeddings, norm, head and `student_layers`."""
    student_layers: LayerChoice | None = None
    """With `student_init: layers`: which of the teacher's decoder layers the student has, counted
    from 0, negative ones from the end; or how many, spread evenly from the first to the last."""
    teacher_dtype: DtypeName | None = None
    """Dtype of the frozen teacher. Default: the compute dtype."""
    teacher_quantization: Literal["int8", "int4"] | None = None
    """Keep the weights of the teacher's linear layers in 8 bits (torchao, a scale per row) or in 4
    (NF4 of bitsandbytes); all else, its head included, has `teacher_dtype`. Needs the extra
    `quantized`."""
    device: str = field(default="auto", metadata=MAY_CHANGE_ON_RESUME)
    """`auto` takes CUDA where there is one, else the CPU."""
    teacher_device: str | None = field(default=None, metadata=MAY_CHANGE_ON_RESUME)
    """Device of the teacher's layers (its head stays with the student). Default: `device`."""
    teacher_prefetch: ZeroOrOne = field(default=0, metadata=MAY_CHANGE_ON_RESUME)
    """1: run the teacher on the next micro-batch, in a thread, while the student trains on this
    one. For a teacher on the CPU or another device; the numbers stay the same to the bit."""
    attn_implementation: Annotated[str | None, NAME] = None
    """Attention of both models, as in transformers: `sdpa`, `eager` ... Default: what transformers
    chooses for each family, which is `sdpa` where the family has it."""
    gradient_checkpointing: bool = False
    """Recompute the student's activations in backward instead of keeping them."""
    torch_compile: bool = False
    """Compile the student's decoder layers. The first step takes a minute or more; packed rows are
    compared with those of the layers as they are."""
    trust_remote_code_student: bool = field(default=False, metadata=MAY_CHANGE_ON_RESUME)
    """Run code that comes with the student's repository."""
    trust_remote_code_teacher: bool = field(default=False, metadata=MAY_CHANGE_ON_RESUME)
    """Run code that comes with the teacher's repository."""
    peft: PeftConfig = field(default_factory=PeftConfig)
    merge_adapters: bool = field(default=False, metadata=MAY_CHANGE_ON_RESUME)
    """Export the student with its adapters merged into its weights, instead of the adapters."""

    # Data
    data: DataConfig = field(default_factory=DataConfig)
    max_length: PositiveInt = 1024
    """Tokens per row."""
    packing: bool = True
    """Pack several documents into a row; none attends to another. `false`: one document per row,
    right-padded."""

    # Objective
    ce_weight: float | None = None
    """Weight of the cross-entropy against the text. Default: `1 - kd_weight`."""
    kd_weight: float = 0.7
    """Weight of the divergence from the teacher."""
    temperature: float = 2.0
    """Softens both distributions in the divergence."""
    scale_t2: bool = True
    """Multiply the divergence by temperature^2, so that its gradient keeps its size."""
    divergence: Divergence = "forward_kl"
    """Which divergence; see `sad_kernels.Objective`."""
    beta: float = 0.5
    """Mixture weight of jsd and the skew divergences."""
    label_smoothing: float = 0.1
    """Mass spread over all classes in the training cross-entropy. Evaluation uses none."""
    z_loss: float = 0.0
    """Weight of lse^2, the squared log-normaliser of the student's logits."""
    chunk_bytes: PositiveBytes | None = None
    """Memory budget of the loss in bytes. Default: that of `sad_kernels`."""
    impl: Impl = "auto"
    """Implementation of the kernels; `auto` takes Triton on GPUs, else torch."""
    loss_logits: LogitStorage = "exact"
    """How Triton kernels keep the logits of the student's loss: in 32 bits, or `compact` in 16:
    half the memory traffic, its time not measured yet, and larger errors of the gradient where
    student and teacher nearly agree; see `sad_kernels.linear_distill_loss`."""
    use_curriculum: bool = True
    """Phase the structural losses in: see `sad.curriculum`."""
    router_aux_loss_coef: NonNegativeFloat | None = None
    """Weight of the load-balancing loss of a mixture-of-experts student. Default: that of its own
    configuration, for families of which transformers has the loss."""
    projector_lr_ratio: NonNegativeFloat = 1.0
    """Learning rate of the projectors of structural losses, relative to `learning_rate`."""
    feature: FeatureConfig = field(default_factory=FeatureConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    relations: RelationsConfig = field(default_factory=RelationsConfig)
    layerwise: LayerwiseConfig = field(default_factory=LayerwiseConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    taid: TAIDConfig = field(default_factory=TAIDConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    baseline: bool = False
    """Also train the same student without the teacher, on the same batches for as many steps, and
    add it to the result table."""

    # Text that the student writes
    lmbda: Fraction = 0.0
    """Share of micro-batches whose text the student writes itself, after prompts from the data
    (on-policy), and that it learns from the teacher alone. 0: none."""
    on_policy_divergence: Divergence = "reverse_kl"
    """Divergence from the teacher on text that the student has written; its weight is 1."""
    max_completion_length: PositiveInt = 128
    """Tokens that the student writes after a prompt, at most: it stops at its end of text."""
    prompt_length: PositiveInt = 64
    """Tokens of a text that are a prompt. Prompts of records, and conversations up to their last
    answer, are taken whole."""
    generation_temperature: PositiveFloat = 1.0
    """Temperature at which the student's tokens are drawn; `temperature` is that of the loss."""
    top_p: PositiveFraction = 1.0
    """Draw from the most likely tokens alone that have this probability together. 1: from all."""
    top_k: NonNegativeInt = 0
    """Draw from so many most likely tokens. 0: from all."""
    self_teacher: Literal["ema", "base"] | None = None
    """Take the student itself as the teacher: `ema`, its averaged weights, or `base`, the model
    under its adapters. No second model is loaded, and no `teacher` named."""

    # Length
    num_train_epochs: Epochs = 1.0
    """Passes over the data, if `max_steps` is not given."""
    max_steps: MaxSteps = -1
    """Optimizer steps; positive values override `num_train_epochs`."""
    per_device_train_batch_size: PositiveInt = 8
    """Rows per micro-batch."""
    per_device_eval_batch_size: PositiveInt = field(default=8, metadata=MAY_CHANGE_ON_RESUME)
    """Rows per evaluation batch."""
    max_eval_rows: PositiveInt | None = field(default=None, metadata=MAY_CHANGE_ON_RESUME)
    """Evaluate on at most this many held-out rows."""
    eval_all_losses: bool = field(default=False, metadata=MAY_CHANGE_ON_RESUME)
    """Evaluate structural losses also while the curriculum has their weight at 0."""
    eval_teacher_cache: NonNegativeBytes = field(default=256 * 2**20, metadata=MAY_CHANGE_ON_RESUME)
    """Bytes of host memory in which evaluations keep the teacher's hidden states for one another;
    0: none. With structural losses, or another `routing.mode` than `teacher`, none are kept."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches per optimizer step."""
    global_batch_size: PositiveInt | None = None
    """Rows per optimizer step, over all processes: with it a run is the same on any number of them.
    Default: `per_device_train_batch_size` for each process and micro-batch, which it overrides."""

    # Optimizer and schedule
    learning_rate: NonNegativeFloat = 5e-5
    """Peak learning rate of AdamW."""
    optim: Literal["adamw_torch_fused", "adamw_8bit"] = "adamw_torch_fused"
    """AdamW as torch has it, or by bitsandbytes with moments in 8 bits: a quarter of their memory,
    one wait for the device per step. Needs the extra `8bit`."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of matrices; vectors (norms, biases) have none."""
    adam_beta1: MomentDecay = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: MomentDecay = 0.999
    """Decay of AdamW's second moment."""
    adam_epsilon: Epsilon = 1e-8
    """Added to the root of AdamW's second moment."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Global norm the gradient is clipped to; 0 turns clipping off."""
    lr_scheduler_type: SchedulerName = "linear"
    """Shape of the schedule after warm-up."""
    scheduler_unit: SchedulerUnit = "batch"
    """When the scheduler steps: once per micro-batch, or once per optimizer step."""
    warmup_steps: StepsOrFraction = 0
    """Warm-up in optimizer steps; below 1: as a fraction of training, as in transformers 5."""
    warmup_batches: NonNegativeInt = 0
    """Warm-up in micro-batches."""
    warmup_ratio: Fraction = 0.0
    """Warm-up as a fraction of training."""
    min_lr_ratio: Fraction = 0.0
    """Floor of the schedule, relative to the peak."""
    decay_ratio: Fraction = 0.2
    """Length of the final decay of `wsd`, as a fraction of training."""

    # Precision
    bf16: bool = False
    """Compute in bfloat16 (autocast over fp32 parameters, unless `param_dtype` says otherwise)."""
    fp16: bool = False
    """Compute in float16 with a GradScaler."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the student's parameters."""
    master_weights: bool = True
    """With bfloat16 parameters: keep fp32 masters that the optimizer updates."""
    max_nonfinite_steps: PositiveInt = 3
    """So many updates in a row that are not finite, by their gradient or their learning rate, stop
    the run."""

    # EMA
    use_ema: bool = True
    """Keep an exponential moving average of the student, evaluate it, export it if it is better."""
    ema_decay: FractionBelowOne = 0.9999
    """Decay of the average."""
    ema_warmup: bool = True
    """Lower the decay in the first updates: min(ema_decay, (1 + n) / (10 + n))."""
    ema_device: Literal["cpu"] | None = None
    """`cpu` keeps the average in host memory: it leaves a GPU 4 bytes per parameter, and each step
    waits until the weights are copied. Default: the student's device."""

    # Several processes, started by torchrun
    dp_shard_size: PositiveInt | None = field(default=None, metadata=MAY_CHANGE_ON_RESUME)
    """Processes that each model is split over. Default: all, or with `dp_replicate_size` all of
    one replica."""
    dp_replicate_size: PositiveInt | None = field(default=None, metadata=MAY_CHANGE_ON_RESUME)
    """Replicas of the split models. With as many as there are processes nothing is split. Default:
    one, or as many as `dp_shard_size` makes of all processes."""
    reshard_after_forward: bool = field(default=True, metadata=MAY_CHANGE_ON_RESUME)
    """Gather each layer again in backward. `false` keeps it whole from forward on: one transfer
    less, at the memory of the whole student."""
    cpu_offload: bool = field(default=False, metadata=MAY_CHANGE_ON_RESUME)
    """Keep the split student, its gradients and its optimizer in host memory."""
    sync_each_batch: bool = field(default=True, metadata=MAY_CHANGE_ON_RESUME)
    """Sum the gradients over processes after each micro-batch. `false` does so once per optimizer
    step, and holds whole gradients until then."""
    ddp_timeout: PositiveInt = field(default=1800, metadata=MAY_CHANGE_ON_RESUME)
    """Seconds after which a process that does not answer is given up."""

    # Run
    output_dir: Annotated[NonEmptyStr, PATH, HOME_PATH] = field(
        default="runs/sad", metadata=MAY_CHANGE_ON_RESUME
    )
    """Directory of the run: log, checkpoints, report, exported models. `~/` is the user's home."""
    seed: Seed = 42
    """Seed of initialisation, order and dropout."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms on GPUs, at some cost."""
    resume_from_checkpoint: Annotated[str | None, PATH, HOME_PATH] = field(
        default=None, metadata=MAY_CHANGE_ON_RESUME
    )
    """`auto`, or the path of a checkpoint."""
    allow_config_change: bool = field(default=False, metadata=MAY_CHANGE_ON_RESUME)
    """Resume although keys that decide the trajectory have changed."""
    logging_steps: PositiveInt = field(default=10, metadata=MAY_CHANGE_ON_RESUME)
    """Log every so many optimizer steps."""
    eval_steps: PositiveInt | None = field(default=None, metadata=MAY_CHANGE_ON_RESUME)
    """Evaluate every so many optimizer steps. Default: at the end only."""
    save_steps: PositiveInt | None = field(default=None, metadata=MAY_CHANGE_ON_RESUME)
    """Save every so many optimizer steps. Default: at the end of each epoch only."""
    save_total_limit: AtLeastTwo = field(default=2, metadata=MAY_CHANGE_ON_RESUME)
    """Checkpoints kept (at least 2: one to fall back to)."""
    async_save: bool = field(default=True, metadata=MAY_CHANGE_ON_RESUME)
    """Write checkpoints in the background while training goes on, from a copy in host memory."""
    save_dtype: DtypeName | None = field(default=None, metadata=MAY_CHANGE_ON_RESUME)
    """Dtype of the weights in `best/` and `final/`. Default: that of the student's files, or of its
    parameters if these have fewer bits or it began at random."""
    metric_for_best_model: str | None = field(default=None, metadata=MAY_CHANGE_ON_RESUME)
    """Smallest wins. Default: `eval_ema/nll`, else `eval/nll`."""
    report_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = field(
        default=(), metadata=MAY_CHANGE_ON_RESUME
    )
    """Trackers to send the log to besides `log.jsonl`."""
    push_to_hub: bool = field(default=False, metadata=MAY_CHANGE_ON_RESUME)
    """Upload `best/` to the Hugging Face Hub after the run; a failure is a warning."""
    hub_model_id: Name | None = field(default=None, metadata=MAY_CHANGE_ON_RESUME)
    """Repository on the Hub, `name` or `owner/name`. Default: the name of `output_dir`."""
    hub_private_repo: bool | None = field(default=None, metadata=MAY_CHANGE_ON_RESUME)
    """Make that repository private, if it is new. Default: as the account has it."""
    debug: bool = field(default=False, metadata=MAY_CHANGE_ON_RESUME)
    """Show tracebacks for every error."""

    def __post_init__(self) -> None:
        if self.student_init == "layers" and not self.student:
            object.__setattr__(self, "student", self.teacher or "")  # what it is made of
        require(
            "student",
            "be given",
            self.student,
            "name a model, or take its layers from a teacher with student_init: layers",
            holds=bool(self.student),
        )
        convert_and_check(self)
        _check_models(self)
        _check_layers(self)
        _check_compile(self)
        _check_adapters(self)
        _check_objective(self)
        _check_teacher_sections(self)
        check_cross_tokenizer(self)
        check_on_policy(self)
        _check_placement(self)
        _check_schedule(self)
        _check_batches(self)
        _check_updates(self)
        _check_precision(self)
        _check_metric(self)

    @property
    def loads_teacher(self) -> bool:
        """Whether the teacher itself takes part, not a cache of its targets or none at all."""
        return self.teacher is not None and self.teacher_cache is None

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher to compare with: itself, its cache, or the student."""
        named = self.teacher is not None or self.teacher_cache is not None
        return named or self.self_teacher is not None

    @property
    def is_distilled(self) -> bool:
        """Whether anything that the student learns comes from a teacher."""
        return bool(self.kd_weight or self.structural_weights or self.lmbda)

    @property
    def structural_weights(self) -> dict[str, float]:
        """Structural loss -> its full weight, of those above 0."""
        weights = {name: getattr(self, name).weight for name in STRUCTURAL}
        return {name: weight for name, weight in weights.items() if weight > 0}

    @property
    def eval_cache_bytes(self) -> int:
        """``eval_teacher_cache``, or 0 if evaluations cannot share the teacher's hidden states.

        Gates that train or are sampled change them; structural losses read activations beside them.
        """
        shared = self.routing.mode == "teacher" and not self.structural_weights
        return self.eval_teacher_cache if shared and self.loads_teacher else 0

    def rows_per_micro_batch(self, world_size: int = 1) -> int:
        """Rows of a micro-batch, over ``world_size`` processes."""
        if self.global_batch_size is not None:
            return self.global_batch_size // self.gradient_accumulation_steps
        return self.per_device_train_batch_size * world_size

    def rows_per_process(self, world_size: int = 1) -> int:
        """Rows of a micro-batch on one of ``world_size`` processes, at most."""
        return -(-self.rows_per_micro_batch(world_size) // world_size)

    def objective(self, *, kd_weight: float | None = None, teacher_share: float = 1.0) -> Objective:
        """The objective while the divergence has the weight ``kd_weight`` (default: the configured
        one). The weight of the cross-entropy does not depend on it."""
        return Objective(
            ce_weight=1 - self.kd_weight if self.ce_weight is None else self.ce_weight,
            kd_weight=self.kd_weight if kd_weight is None else kd_weight,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            temperature=self.temperature,
            scale_t2=self.scale_t2,
            divergence=self.divergence,
            beta=self.beta,
            teacher_share=teacher_share,
        )

    def on_policy_objective(self) -> Objective:
        """The objective on text that the student has written: the divergence alone."""
        return replace(
            self.objective(kd_weight=1.0),
            ce_weight=0.0,
            label_smoothing=0.0,
            z_loss=0.0,
            divergence=self.on_policy_divergence,
        )


STRUCTURAL = tuple(
    name
    for name, section in section_types(DistillConfig).items()
    if issubclass(section, StructuralSection)
)
"""The names of the structural losses: the sections that derive from ``StructuralSection``."""


def ce_only() -> dict[str, Any]:
    """Changes, for ``dataclasses.replace``, that make a run train on cross-entropy alone.

    Every section but ``data`` and ``peft`` configures something of the teacher's, and returns to
    its default.
    """
    sections = section_types(DistillConfig).items()
    defaults = {name: section() for name, section in sections if name not in ("data", "peft")}
    plain = {"kd_weight": 0.0, "ce_weight": 1.0, "lmbda": 0.0, "self_teacher": None}
    return plain | defaults


def config_to_dict(config: DistillConfig) -> dict[str, Any]:
    """The configuration as JSON represents it: nested dicts, lists for tuples."""
    return json.loads(json.dumps(asdict(config)))


def config_to_yaml(config: DistillConfig) -> str:
    """The resolved configuration as YAML that loads to an equal one."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)


def _check_models(config: DistillConfig) -> None:
    require(
        "teacher",
        "be given unless kd_weight is 0",
        config.teacher,
        "name a model, or set kd_weight: 0 to train on the text alone",
        holds=config.has_teacher or config.kd_weight == 0,
    )
    for name in config.structural_weights:
        require(
            "teacher",
            f"be given for {name}.weight above 0",
            config.teacher,
            f"name a model, or set {name}.weight: 0",
            holds=config.teacher is not None or config.teacher_cache is not None,
        )
    require(
        "routing.mode",
        "be teacher with a teacher_cache",
        config.routing.mode,
        "its experts are not there: leave it out, or teacher_cache",
        holds=config.teacher_cache is None or config.routing.mode == "teacher",
    )
    require(
        "vocab_map",
        "be left out without a teacher",
        config.vocab_map,
        "there are no ids to map: leave it out, or name a teacher",
        holds=config.vocab_map is None or config.has_teacher,
    )
    require(
        "vocab_map",
        "be left out with student_init layers",
        config.vocab_map,
        "the student has the teacher's embeddings: leave it out",
        holds=config.vocab_map is None or config.student_init != "layers",
    )
    for key, name in (("device", config.device), ("teacher_device", config.teacher_device)):
        remedy = "write auto, cpu, cuda or one such as cuda:1"
        known = name is None or (key == "device" and name == "auto") or _is_device(name)
        require(key, "be a device", name, remedy, holds=known)


def _check_batches(config: DistillConfig) -> None:
    rows, steps = config.global_batch_size, config.gradient_accumulation_steps
    require(
        "global_batch_size",
        f"be a multiple of gradient_accumulation_steps, {steps}",
        rows,
        "change one of them: each micro-batch has as many rows",
        holds=rows is None or rows % steps == 0,
    )


def _check_compile(config: DistillConfig) -> None:
    require(
        "torch_compile",
        "be false with structural losses",
        config.torch_compile,
        f"they look into the layers: leave it out, or {', '.join(config.structural_weights)}",
        holds=not (config.torch_compile and config.structural_weights),
    )


def _check_layers(config: DistillConfig) -> None:
    of_layers = config.student_init == "layers"
    require(
        "student_layers",
        "be given with student_init layers, and with no other",
        config.student_layers,
        "write for example student_init: layers with student_layers: 4",
        holds=of_layers == (config.student_layers is not None),
    )
    require(
        "student",
        "be left out with student_init layers",
        config.student,
        "the student is made of the teacher's layers",
        holds=not of_layers or config.student == config.teacher,
    )


def _check_adapters(config: DistillConfig) -> None:
    require(
        "merge_adapters",
        "be false without a key of peft",
        config.merge_adapters,
        "there are no adapters to merge: leave it out, or set peft.r",
        holds=config.peft.enabled or not config.merge_adapters,
    )
    saved = config.student_init == "pretrained" or config.merge_adapters
    require(
        "student_init",
        "be pretrained for adapters that are exported alone",
        config.student_init,
        "what they belong to is saved nowhere: set merge_adapters: true",
        holds=saved or not config.peft.enabled,
    )


def _check_objective(config: DistillConfig) -> None:
    require(
        "kd_weight",
        "be at most 1 unless ce_weight is given",
        config.kd_weight,
        "the default of ce_weight, 1 - kd_weight, would be negative",
        holds=config.ce_weight is not None or config.kd_weight <= 1,
    )
    try:
        objective = config.objective()
    except (TypeError, ValueError) as error:  # the message opens with the name of the key
        raise ConfigError(str(error).split()[0], str(error)) from None
    require(
        "kd_weight",
        "be above 0 when ce_weight and all structural weights are 0",
        config.kd_weight,
        "with all of them at 0 there is nothing to learn",
        holds=bool(objective.ce_weight or config.is_distilled),
    )


def _check_teacher_sections(config: DistillConfig) -> None:
    """Refuse TAID and routing, which need the divergence from the teacher, without it."""
    for key, on in (
        ("taid.enabled", config.taid.enabled),
        ("routing.mode", config.routing.mode != "teacher"),
    ):
        require(
            "kd_weight",
            f"be above 0 with {key}",
            config.kd_weight,
            f"raise it, or leave {key} out",
            holds=not on or config.kd_weight > 0,
        )


def _check_placement(config: DistillConfig) -> None:
    """Refuse routing that a quantized teacher, or one that works ahead, cannot have."""
    quantized, mode = config.teacher_quantization, config.routing.mode
    require(
        "teacher_quantization",
        "be left out without a teacher",
        quantized,
        "there is nothing to quantize",
        holds=quantized is None or config.teacher is not None,
    )
    require(
        "teacher_quantization",
        "be left out with routing.mode student_aware",
        quantized,
        "gates are trained through all layers of the teacher",
        holds=quantized is None or mode != "student_aware",
    )
    require(
        "teacher_prefetch",
        "be 0 unless routing.mode is teacher",
        config.teacher_prefetch,
        f"{mode} changes from one micro-batch to the next: leave it out",
        holds=not config.teacher_prefetch or mode == "teacher",
    )


def _check_schedule(config: DistillConfig) -> None:
    keys = ("warmup_steps", "warmup_batches", "warmup_ratio")
    given = [key for key in keys if getattr(config, key)]
    if len(given) > 1:
        values = " and ".join(f"{key}={getattr(config, key)}" for key in given)
        raise ConfigError(
            given[1], f"warm-up must be given once, got {values}; keep the one in the unit you mean"
        )


def _check_updates(config: DistillConfig) -> None:
    """Refuse a learning rate with which one update can make a weight infinite."""
    largest = config.learning_rate * max(1.0, config.projector_lr_ratio)
    betas, eps = (config.adam_beta1, config.adam_beta2), config.adam_epsilon
    bound = update_bound(largest, betas, eps, max_grad_norm=config.max_grad_norm)
    require(
        "learning_rate",
        "keep every update below 2^100",
        config.learning_rate,
        "weights would overflow: lower it, or raise adam_epsilon",
        holds=bound < LARGEST_UPDATE,
    )
    require(
        "weight_decay",
        "be at most 1 / learning_rate",
        config.weight_decay,
        "a step would take more of a weight than there is",
        holds=largest * config.weight_decay <= 1,
    )


def _check_precision(config: DistillConfig) -> None:
    require(
        "fp16",
        "be false when bf16 is true",
        config.fp16,
        "choose one compute dtype",
        holds=not (config.bf16 and config.fp16),
    )
    require(
        "fp16",
        "be false with param_dtype bfloat16",
        config.fp16,
        "bfloat16 parameters compute in bfloat16",
        holds=not (config.fp16 and config.param_dtype == "bfloat16"),
    )


def _check_metric(config: DistillConfig) -> None:
    if config.metric_for_best_model is None:
        return
    prefixes = ("eval", "eval_ema") if config.use_ema else ("eval",)
    names = best_model_metrics(
        with_teacher=config.has_teacher
        and config.self_teacher is None
        and not (config.cross_tokenizer == "likelihood" and config.teacher_cache is not None),
        with_cache=config.teacher_cache is not None,
    )
    choices = [f"{prefix}/{name}" for prefix in prefixes for name in names]
    require(
        "metric_for_best_model",
        f"be one of {', '.join(choices)}",
        config.metric_for_best_model,
        "choose one of these, of which the smallest wins",
        holds=config.metric_for_best_model in choices,
    )


def _is_device(name: str) -> bool:
    if re.fullmatch(rf"({'|'.join(USUAL_DEVICES)})(:[0-9])?", name):
        return True  # without torch, whose import takes seconds
    # Tensors on `meta` have shapes and no numbers.
    if not re.fullmatch(r"[a-z]{2,20}(:[0-9]{1,3})?", name) or name.startswith("meta"):
        return False
    import torch

    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True
