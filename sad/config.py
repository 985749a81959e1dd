"""The configuration: frozen dataclasses that are the schema, the YAML file and the command line at once.

Names that users know from ``transformers.TrainingArguments`` are reused where the meaning is the same. Suffixes tell
the unit: ``_steps`` counts optimizer steps, ``_batches`` micro-batches, ``_ratio`` is a fraction of training.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sad_kernels.objective import Divergence

SchedulerName = Literal["linear", "cosine", "constant", "wsd"]
DtypeName = Literal["float32", "bfloat16", "float16"]
Impl = Literal["auto", "triton", "torch"]

CADENCE = {"cadence": True}
"""Metadata of keys that may change between a run and its resumption: they move no weight."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes rows of tokens."""

    train: tuple[str, ...] = ()
    """Files (.txt, .jsonl, .parquet), folders of them, the name of a `datasets` data set, or `python-stdlib`: the
    source of the standard library of the Python that runs this."""
    eval: tuple[str, ...] = ()
    """Held-out text, in the same forms. Empty: `eval_fraction` of the training documents is held out."""
    eval_fraction: float = 0.05
    """Share of the documents held out for evaluation, chosen by a hash of each document's name."""
    text_field: str = "text"
    """The field that holds the text in .jsonl, .parquet and `datasets` records."""
    document_separator: str | None = None
    """Splits a .txt file into documents; without it each file is one document."""
    dataset_config: str | None = None
    """Configuration name of a `datasets` data set."""
    dataset_split: str = "train"
    """Split of a `datasets` data set."""
    max_documents: int | None = None
    """Use only this many documents, chosen by the hash of their names."""
    cache_dir: str | None = None
    """Where packed rows are kept. Default: `$XDG_CACHE_HOME/sad` or `~/.cache/sad`."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Everything that decides a run. The resolved configuration is saved with the run and in every checkpoint."""

    # Models
    student: str
    """Hugging Face id or local path of the student, or with `student_init: random` of its configuration."""
    teacher: str | None = None
    """Hugging Face id or local path of the teacher. Needed unless `kd_weight` is 0."""
    tokenizer: str | None = None
    """Hugging Face id or local path of the tokenizer. Default: the student's own."""
    student_init: Literal["pretrained", "random"] = "pretrained"
    """`random` builds the student from its configuration alone, with weights drawn from `seed`."""
    teacher_dtype: DtypeName | None = None
    """Dtype of the frozen teacher. Default: the compute dtype."""
    device: str = "auto"
    """`auto` takes CUDA where there is one, else the CPU."""
    teacher_device: str | None = None
    """Device of the teacher's layers (its head stays with the student). Default: `device`."""
    attn_implementation: str = "sdpa"
    """Attention of both models, as in transformers."""
    gradient_checkpointing: bool = False
    """Recompute the student's activations in backward instead of keeping them."""
    trust_remote_code_student: bool = False
    """Run code that comes with the student's repository."""
    trust_remote_code_teacher: bool = False
    """Run code that comes with the teacher's repository."""

    # Data
    data: DataConfig = field(default_factory=DataConfig)
    max_length: int = 1024
    """Tokens per row."""
    packing: bool = True
    """Several documents per row, each blind to the others. `false`: one document per row, right-padded."""

    # Objective
    ce_weight: float | None = None
    """Weight of the cross-entropy against the text. Default: `1 - kd_weight`."""
    kd_weight: float = 0.7
    """Weight of the divergence from the teacher."""
    temperature: float = 2.0
    """Softens both distributions in the divergence."""
    scale_t2: bool = True
    """Multiply the divergence by temperature^2, which keeps its gradient's size."""
    divergence: Divergence = "forward_kl"
    """Which divergence; see `sad_kernels.Objective`."""
    beta: float = 0.5
    """Mixture weight of jsd and the skew divergences."""
    label_smoothing: float = 0.1
    """Mass spread over all classes in the training cross-entropy. Evaluation uses none."""
    z_loss: float = 0.0
    """Weight of lse^2."""
    chunk_bytes: int | None = None
    """Memory budget of the loss. Default: that of `sad_kernels`."""
    impl: Impl = "auto"
    """Which implementation of the kernels."""
    use_curriculum: bool = True
    """Phase the structural losses in: see `sad.curriculum`."""
    baseline: bool = False
    """Also train the same student without the teacher, on the same batches for as many steps, and add it to the
    result table."""

    # Length
    num_train_epochs: float = 1.0
    """Passes over the data, if `max_steps` is not given."""
    max_steps: int = -1
    """Optimizer steps; positive values override `num_train_epochs`."""
    per_device_train_batch_size: int = 8
    """Rows per micro-batch."""
    per_device_eval_batch_size: int = 8
    """Rows per evaluation batch."""
    max_eval_rows: int | None = None
    """Evaluate on at most this many held-out rows."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""

    # Optimizer and schedule
    learning_rate: float = 5e-5
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; vectors (norms, biases) have none."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    """Global norm the gradient is clipped to; 0 turns clipping off."""
    lr_scheduler_type: SchedulerName = "linear"
    """Shape of the schedule after warm-up."""
    scheduler_unit: Literal["batch", "optimizer_step"] = "batch"
    """When the scheduler steps: once per micro-batch, or once per optimizer step."""
    warmup_steps: float = 0
    """Warm-up in optimizer steps; a value below 1 is a fraction of training, as in transformers 5."""
    warmup_batches: int = 0
    """Warm-up in micro-batches."""
    warmup_ratio: float = 0.0
    """Warm-up as a fraction of training."""
    min_lr_ratio: float = 0.0
    """Floor of the schedule, relative to the peak."""
    decay_ratio: float = 0.2
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
    max_nonfinite_steps: int = 3
    """So many updates in a row with a non-finite gradient stop the run."""

    # EMA
    use_ema: bool = True
    """Keep an exponential moving average of the student, evaluate it and export it if it is better."""
    ema_decay: float = 0.9999
    """Decay of the average."""
    ema_warmup: bool = True
    """Lower the decay in the first updates: min(ema_decay, (1 + n) / (10 + n))."""

    # Run
    output_dir: str = "runs/sad"
    """The run's directory."""
    seed: int = 42
    """Seed of initialisation, order and dropout."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms on GPUs, at some cost."""
    resume_from_checkpoint: str | None = field(default=None, metadata=CADENCE)
    """`auto`, or the path of a checkpoint."""
    allow_config_change: bool = field(default=False, metadata=CADENCE)
    """Resume although keys that decide the trajectory have changed."""
    logging_steps: int = field(default=10, metadata=CADENCE)
    eval_steps: int | None = field(default=None, metadata=CADENCE)
    """Evaluate every so many optimizer steps. Default: at the end only."""
    save_steps: int | None = field(default=None, metadata=CADENCE)
    """Save every so many optimizer steps. Default: at the end of each epoch only."""
    save_total_limit: int = field(default=2, metadata=CADENCE)
    """Checkpoints kept (at least 2: one to fall back to)."""
    metric_for_best_model: str | None = field(default=None, metadata=CADENCE)
    """Smallest wins. Default: `eval_ema/nll`, else `eval/nll`."""
    report_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = field(default=(), metadata=CADENCE)
    """Trackers to send the log to besides `log.jsonl`."""
    debug: bool = field(default=False, metadata=CADENCE)
    """Show tracebacks for every error."""
