"""A run on several processes: what each may do, and where the first one acts for all.

There is one run directory and one log. The first rank writes them; the others do the same work and
say nothing.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from sad.checkpoint.run_directory import RunDirectory
from sad.checkpoint.state import start_rng
from sad.checkpoint.store import Checkpoint
from sad.config.identity import flatten
from sad.config.schema import DistillConfig, config_to_dict
from sad.distributed.loading import fill
from sad.distributed.sharding import reshard, shard_trained
from sad.distributed.shards import load_shards
from sad.distributed.world import World
from sad.errors import OutputError, UsageError
from sad.models.heads import decoder_layers
from sad.models.load import model_to_fill
from sad.optim.precision import Precision
from sad.teachers.eval_teacher import EvalTeacher
from sad.teachers.sharded import ShardedTeacher
from sad.training.inputs import RunInputs
from sad.training.student import StudentWithLoss, build_student

T = TypeVar("T")

FORCE_SUM = "set_force_sum_reduction_for_comms"


def check_ranks(config: DistillConfig, world: World) -> None:
    """Raise ``UsageError`` for what a run on several processes cannot do yet."""
    if world.size == 1:
        return
    _require_engine()
    remedies = {
        "peft": ("be empty", config.peft.enabled),
        "torch_compile": ("be false", config.torch_compile),
        "optim": ("be adamw_torch_fused", config.optim != "adamw_torch_fused"),
        "teacher_device": ("be left out", config.teacher_device is not None),
        "teacher_quantization": ("be left out", config.teacher_quantization is not None),
        "teacher_prefetch": ("be 0", config.teacher_prefetch > 0),
        "lmbda": ("be 0", config.lmbda > 0),
        "self_teacher": ("be left out", config.self_teacher is not None),
        "ema_device": ("be left out", config.ema_device is not None),
        "routing.mode": ("be teacher", config.routing.mode != "teacher"),
        # What these compare or balance is all rows of a micro-batch together.
        "contrastive.weight": ("be 0", config.contrastive.weight > 0),
        "router.balance_weight": (
            "be 0",
            config.router.weight > 0 and config.router.balance_weight > 0,
        ),
    }
    for key, (expectation, wrong) in remedies.items():
        if wrong:
            raise UsageError(
                f"{key} must {expectation} on several processes, got WORLD_SIZE={world.size}; "
                "change it, or run one process"
            )


def shared_keys(config: DistillConfig) -> dict[str, Any]:
    """Dotted keys and values of what all processes must be told alike.

    Also of what may change on resumption: a process that saves or evaluates alone waits in vain.
    That ``output_dir`` is the same, however it is written, shows once there are files in it.
    """
    return {k: v for k, v in flatten(config_to_dict(config)).items() if k != "output_dir"}


def _require_engine() -> None:
    """Raise ``UsageError`` for a torch that cannot sum gradients over ranks as a run does."""
    there = {
        "fully_shard(ignored_params=...)": "ignored_params" in signature(fully_shard).parameters,
        FORCE_SUM: hasattr(FSDPModule, FORCE_SUM),
    }
    lacking = [name for name, found in there.items() if not found]
    if lacking:
        raise UsageError(
            f"torch must be 2.10 or newer on several processes, got {torch.__version__} without "
            f"{' and '.join(lacking)}; install a newer one, or run one process"
        )


def sharded_config(config: DistillConfig) -> DistillConfig:
    """How a student that is split over ranks is loaded: fp32 parameters, where a process of its own
    has bf16 ones and fp32 masters, are these masters, rounded when they are gathered."""
    if config.param_dtype == "bfloat16" and config.master_weights:
        return replace(config, param_dtype="float32", bf16=True)
    return config


def shard_student(
    student: StudentWithLoss, config: DistillConfig, precision: Precision, world: World
) -> None:
    """Split a student over the ranks, in place; from here on they draw their own dropout."""
    assert world.mesh is not None
    shard_trained(
        student,
        decoder_layers(student.model),
        world.mesh,
        compute_dtype=precision.compute_dtype,
        reshard_after_forward=config.reshard_after_forward,
        cpu_offload=config.cpu_offload,
    )
    register_fsdp_forward_method(student, "within")
    start_rng(config.seed, world.rank, 0)


def run_within(student: StudentWithLoss, run: Callable[[], T]) -> T:
    """``run()``, while the student's model can be run and its head be read, split or not."""
    try:
        return student.within(run)
    finally:
        reshard(student)  # what is restored now is what is gathered next


def load_sharded_student(
    config: DistillConfig, inputs: RunInputs, precision: Precision, say: Callable[[str], None]
) -> StudentWithLoss | None:
    """The run's student, of which no rank ever holds more than its part; None for one that can be
    loaded only whole (``say`` has been told why) and in a process of its own."""
    found = model_to_fill(sharded_config(config), "student", inputs.world, say)
    if found is None:
        return None
    model, weights = found
    student = build_student(config, model, inputs.valid_vocab, precision)
    shard_student(student, config, precision, inputs.world)
    host = torch.device("cpu")
    fill(model, weights, host if config.cpu_offload else inputs.device, inputs.world)
    return student


def with_sharded_teacher(inputs: RunInputs) -> RunInputs:
    """The same inputs, with a teacher that is split over the ranks if there are several."""
    whole, scored = inputs.frozen_teacher, inputs.eval_teacher
    if inputs.world.mesh is None or whole is None or isinstance(whole, ShardedTeacher):
        return inputs
    assert isinstance(scored, EvalTeacher)
    teacher = ShardedTeacher(
        whole.model, inputs.valid_vocab, device=inputs.device, mesh=inputs.world.mesh
    )
    cached = EvalTeacher(teacher, scored.cache_bytes, inputs.world)
    return replace(inputs, teacher=teacher, eval_teacher=cached)


class SharedRunDirectory(RunDirectory):
    """The directory of a run on several processes, in which the first rank writes for all."""

    def __init__(self, path: str | Path, world: World) -> None:
        super().__init__(path, world_size=world.size)
        self.world = world

    @property
    def baseline_run(self) -> RunDirectory:
        return SharedRunDirectory(self.baseline, self.world)

    @contextmanager
    def claimed(
        self, config: DistillConfig, report: Callable[[str], None]
    ) -> Iterator[Checkpoint | None]:
        alone = RunDirectory(self.path, world_size=self.world.size)
        with ExitStack() as stack:
            yield self._on_main(lambda: stack.enter_context(alone.claimed(config, report)))

    def claim(self, config: DistillConfig, report: Callable[[str], None]) -> Checkpoint | None:
        alone = RunDirectory(self.path, world_size=self.world.size)
        return self._on_main(lambda: alone.claim(config, report))

    def _on_main(self, claim: Callable[[], Checkpoint | None]) -> Checkpoint | None:
        """The checkpoint that the first rank's ``claim`` finds, on every rank."""

        def path() -> Path | None:
            checkpoint = claim()
            return checkpoint and checkpoint.path

        resumed = self.world.from_main(path)
        self._require_shared()
        return None if resumed is None else load_shards(resumed, self.world)

    def _require_shared(self) -> None:
        """Raise ``OutputError`` unless all ranks see the same directory."""
        token = self.world.from_main(lambda: f".tmp-shared-{secrets.token_hex(8)}")
        self.world.main_first(lambda: (self.path / token).touch() if self.world.main else None)

        def seen() -> None:
            if not (self.path / token).exists():
                raise OutputError(
                    f"output_dir must be on a file system that all processes share, got "
                    f"{self.path}, where rank {self.world.rank} does not see what rank 0 writes; "
                    "choose another --output_dir"
                )

        try:
            self.world.agree(seen)
        finally:
            if self.world.main:
                (self.path / token).unlink(missing_ok=True)

    def write_config(self, config: DistillConfig) -> None:
        if self.world.main:
            super().write_config(config)

    def _write_record(self, name: str, record: dict[str, Any]) -> None:
        if self.world.main:
            super()._write_record(name, record)
