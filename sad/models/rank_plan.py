"""What a run on several processes needs: memory per rank, transfers, and where it stops scaling.

FSDP2 splits both models over the ranks of one replica and gathers them piece by piece. Per
micro-batch every rank gathers the student's embedding, norm and head once and each of its layers
twice (once without ``reshard_after_forward``), all of the teacher once, and sums the gradients in
fp32: within a replica whenever they are summed, and what is left between replicas.

Transfers are counted in bytes of whole tensors, as nccl-tests counts its "algorithm bandwidth": n
ranks that gather a tensor of b bytes move b, although each has 1/n of it before. A sum between
replicas is a reduction and a gather, and counts twice. Parameters are padded to a multiple of the
ranks, and so they are here. Projectors of structural losses are small and not counted.

Transfers run beside computation, those inside a node beside those between nodes: what takes longest
sets the pace. This is a bound; nothing here knows of latencies, or of what the overlap costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sad.config.schema import DistillConfig
from sad.distributed.world import mesh_sizes
from sad.models.cached_targets import (
    CachedTargets,
    PlannedTeacher,
    cached_head_items,
    planned_teacher,
)
from sad.models.flops import bf16_peak, forward_flops, training_flops
from sad.models.heads import decoder_layers, output_embedding
from sad.models.load import build_student_model, compute_dtype, teacher_dtype
from sad.models.memory_plan import (
    ALLOCATOR,
    FP32,
    SNAPSHOT,
    TILES,
    UNUSED_SHARE,
    Item,
    evaluation_items,
    forward_items,
    item_line,
    loss_bytes,
    planned_device,
    projector_items,
    saves_in_background,
    teacher_cache_items,
    total_bytes,
)

HEAD_GRADIENTS = ("loss: gradient of the head", "loss: fp32 sum of that gradient")


@dataclass(frozen=True)
class Cluster:
    """The ranks of a run and what joins them; bandwidths in bytes per second and rank."""

    ranks: int
    ranks_per_node: int = 8
    inside: float = 300e9
    between: float = 40e9

    def bandwidth(self, crosses: bool) -> float:
        """Of a transfer that crosses nodes, or of one inside a node."""
        return self.between if crosses else self.inside


class Transfer(NamedTuple):
    """What a rank moves with others."""

    label: str
    size: int  # bytes, each time
    times: int  # per optimizer step
    crosses: bool  # nodes
    teacher: bool = False  # whether it is the teacher's


@dataclass(frozen=True)
class RankPlan:
    """What one rank of a run holds at most, and moves."""

    device: str
    cluster: Cluster
    replicas: int
    shards: int
    """Ranks that each replica is split over."""
    tokens: int
    """Of a micro-batch, on one rank."""
    micro_batches: int
    """Per optimizer step."""
    step_tokens: int
    """Of an optimizer step, on all ranks."""
    step_is_fixed: bool
    """Whether an optimizer step has so many on any number of ranks."""
    kept: tuple[Item, ...]
    """What is there all the time: this rank's parts."""
    whole: tuple[Item, ...]
    """What is gathered or whole for a while."""
    passing: tuple[Item, ...]
    """What a micro-batch or an evaluation needs besides."""
    host: tuple[Item, ...]
    """What lies in host memory and is not among those above."""
    transfers: tuple[Transfer, ...]
    student_flops: int
    """Of a forward and backward pass, per token, with what checkpointing computes again."""
    teacher_flops: int
    flops_per_second: float | None = None
    """Of one rank, where it is known."""

    @property
    def total(self) -> int:
        """Bytes on the device at most: as if all that is whole for a while was so at once."""
        return total_bytes((*self.kept, *self.whole, *self.passing))

    @property
    def moved_per_step(self) -> int:
        """Bytes per optimizer step."""
        return sum(t.size * t.times for t in self.transfers)

    @property
    def moved_per_batch(self) -> float:
        """Bytes per micro-batch, on average over an optimizer step."""
        return self.moved_per_step / self.micro_batches

    @property
    def flops(self) -> int:
        """Per token, of student and teacher."""
        return self.student_flops + self.teacher_flops

    def seconds(self, *, crosses: bool, teacher: bool = True) -> float:
        """Of the transfers per micro-batch inside a node or between nodes, of the ``teacher`` too
        or the student's alone."""
        moved = sum(
            t.size * t.times
            for t in self.transfers
            if t.crosses == crosses and (teacher or not t.teacher)
        )
        return moved / self.micro_batches / self.cluster.bandwidth(crosses)

    @property
    def transfer_seconds(self) -> float:
        """Of a micro-batch: inside nodes and between them at the same time."""
        return max(self.seconds(crosses=False), self.seconds(crosses=True))

    @property
    def compute_seconds(self) -> float | None:
        """Of a micro-batch; None where operations per second are not known."""
        if self.flops_per_second is None:
            return None
        return self.tokens * self.flops / self.flops_per_second

    def tokens_to_hide(self, *, teacher: bool = True) -> int | None:
        """Tokens per rank and micro-batch whose computation takes as long as the slowest link's
        transfers, on which of the ``teacher`` too or the student's alone count."""
        if self.flops_per_second is None:
            return None
        crosses = self.slowest_crosses
        seconds = self.seconds(crosses=crosses, teacher=teacher)
        return math.ceil(seconds * self.flops_per_second / self.flops)

    @property
    def slowest_crosses(self) -> bool:
        """Whether the link that takes longest is the one between nodes."""
        return self.seconds(crosses=True) > self.seconds(crosses=False)

    @property
    def teacher_share_of_transfers(self) -> float:
        """On the slowest link."""
        crosses = self.slowest_crosses
        seconds = self.seconds(crosses=crosses)
        return 1 - self.seconds(crosses=crosses, teacher=False) / seconds if seconds else 0.0

    @property
    def teacher_share_of_work(self) -> float:
        """Of the operations."""
        return self.teacher_flops / self.flops


def plan_ranks(
    config: DistillConfig,
    cluster: Cluster,
    flops_per_second: float | None = None,
    cached: CachedTargets | None = None,
) -> RankPlan:
    """Predict memory, transfers and time of a run on ``cluster``; no weight is loaded.

    ``flops_per_second`` is what one rank reaches, by default the peak of this machine's GPU.
    ``cached`` are the sizes of a ``teacher_cache``: each rank reads its rows' targets, and nothing
    of the teacher is moved. Raises ``UsageError`` for replicas that do not make up the ranks, and
    what ``plan`` raises.
    """
    device = planned_device(config.device)
    with torch.device("meta"):
        student = build_student_model(config)
        teacher = planned_teacher(config, cached)
    if flops_per_second is None and device.type == "cuda" and torch.cuda.is_available():
        flops_per_second = bf16_peak(torch.cuda.get_device_name())
    states = plan_states(config, student, teacher, cluster, flops_per_second)
    one = as_one_rank(config, cluster.ranks)
    training = forward_items(one, device, student, teacher)
    training = [item for item in training if item[0] not in (TILES, *HEAD_GRADIENTS)]
    evaluation = evaluation_items(one, device, student, teacher, None)
    passing = max(training, evaluation, key=total_bytes) + projector_items(one, student, teacher)
    if device.type == "cpu":
        passing.append((ALLOCATOR, int(UNUSED_SHARE * total_bytes([*passing, *states.whole]))))
    return replace(states, passing=tuple(passing))


def plan_states(
    config: DistillConfig,
    student: PreTrainedModel,
    teacher: PlannedTeacher | None,
    cluster: Cluster,
    flops_per_second: float | None = None,
) -> RankPlan:
    """What follows from the parameters alone: a plan without activations, and so without
    ``passing``."""
    (replicas, shards), length = mesh_of(config, cluster.ranks), config.max_length
    device = planned_device(config.device)
    kept, host = _kept_items(config, device, student, teacher, shards)
    one = as_one_rank(config, cluster.ranks)
    loss = loss_bytes(one, device, output_embedding(student), teacher)
    of_loss = [("fp32 sum of the head's gradient", loss.weight_sum), (TILES, loss.logits)]
    again = forward_flops(student, length) if config.gradient_checkpointing else 0
    return RankPlan(
        device=str(device),
        cluster=cluster,
        replicas=replicas,
        shards=shards,
        tokens=config.rows_per_process(cluster.ranks) * length,
        micro_batches=config.gradient_accumulation_steps,
        step_tokens=config.rows_per_micro_batch(cluster.ranks)
        * config.gradient_accumulation_steps
        * length,
        step_is_fixed=config.global_batch_size is not None,
        kept=tuple(kept),
        whole=(*whole_items(config, student, teacher), *(item for item in of_loss if item[1])),
        passing=(),
        host=tuple(host),
        transfers=tuple(transfers(config, student, teacher, cluster)),
        student_flops=training_flops(student, length) + again,
        teacher_flops=forward_flops(teacher, length) if isinstance(teacher, PreTrainedModel) else 0,
        flops_per_second=flops_per_second,
    )


def mesh_of(config: DistillConfig, ranks: int) -> tuple[int, int]:
    """Replicas of the models, and the ranks that each is split over; see ``mesh_sizes``."""
    return mesh_sizes(ranks, config.dp_replicate_size, config.dp_shard_size)


def as_one_rank(config: DistillConfig, ranks: int) -> DistillConfig:
    """A configuration whose single process computes what one of ``ranks`` does.

    Sharded parameters are gathered in the dtype of computation, without autocast; of two with 16
    bits sizes are the same.
    """
    config = replace(
        config,
        per_device_train_batch_size=config.rows_per_process(ranks),
        global_batch_size=None,
    )
    if compute_dtype(config).itemsize == FP32:
        return config
    dtype = str(teacher_dtype(config)).removeprefix("torch.")
    narrow = {"bf16": False, "fp16": False, "param_dtype": "bfloat16", "master_weights": False}
    return replace(config, **narrow, teacher_dtype=dtype)


# Memory


def _kept_items(
    config: DistillConfig,
    device: torch.device,
    student: PreTrainedModel,
    teacher: PlannedTeacher | None,
    shards: int,
) -> tuple[list[Item], list[Item]]:
    """This rank's parts, on the device and in host memory."""
    parts = state_items(config, student, shards)
    host = teacher_cache_items(config, teacher, None)
    state = total_bytes(item for item in parts if item[0] != "student gradients")
    copied = [(SNAPSHOT, state)] if saves_in_background(config) else []
    if device.type == "cpu":
        parts, host = parts + copied + host, []
    else:
        host = host + copied
    if config.cpu_offload and device.type != "cpu":
        parts, host = [], parts + host
    if isinstance(teacher, CachedTargets):
        parts = [*parts, *cached_head_items(teacher)]  # whole on each rank
    elif teacher is not None:
        dtype = teacher_dtype(config)
        size = split_numel(teacher.parameters(), shards) // shards * dtype.itemsize
        parts = [*parts, (f"teacher weights, {str(dtype).removeprefix('torch.')}", size)]
    return parts, host


def state_items(config: DistillConfig, student: PreTrainedModel, shards: int) -> list[Item]:
    """One rank's part of the student and of what trains it."""
    part = split_numel(student.parameters(), shards) // shards
    narrow = config.param_dtype == "bfloat16" and not config.master_weights
    dtype, itemsize = ("bfloat16", 2) if narrow else ("float32", FP32)
    items = [
        (f"student weights, {dtype}", itemsize * part),
        ("student gradients", itemsize * part),
        ("AdamW moments", 2 * itemsize * part),
    ]
    if config.use_ema:
        items.append(("EMA, float32", FP32 * part))
    return items


def whole_items(
    config: DistillConfig, student: PreTrainedModel, teacher: PlannedTeacher | None
) -> list[Item]:
    """What is gathered around a micro-batch, and gradients before they are summed over ranks."""
    itemsize = compute_dtype(config).itemsize
    root, layers = _root_and_layers(student)
    items = [
        ("student: embedding, norm and head", itemsize * root),
        ("their gradients", itemsize * root),
    ]
    if config.reshard_after_forward:
        items.append(("two student layers", itemsize * 2 * max(layers)))
    else:
        items.append(("all student layers", itemsize * sum(layers)))
    if not config.sync_each_batch and config.gradient_accumulation_steps > 1:
        items.append(("gradients of the step, float32", FP32 * (root + sum(layers))))
    if isinstance(teacher, PreTrainedModel):
        itemsize = teacher_dtype(config).itemsize
        _, layers = _root_and_layers(teacher)
        head = output_embedding(teacher).weight.numel()
        items += [
            ("teacher head", itemsize * head),
            ("two teacher layers", itemsize * 2 * max(layers)),
        ]
    return items


def _root_and_layers(model: PreTrainedModel) -> tuple[int, list[int]]:
    """Numbers in the parameters outside the layers, and in those of each layer."""
    layers = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)]
    return sum(p.numel() for p in model.parameters()) - sum(layers), layers


def split_numel(parameters: Iterable[Tensor], shards: int) -> int:
    """Numbers in all of them, each padded to a multiple of ``shards`` in its first dimension."""
    return sum(-(-p.shape[0] // shards) * shards * (p.numel() // p.shape[0]) for p in parameters)


# Transfers


def transfers(
    config: DistillConfig,
    student: PreTrainedModel,
    teacher: PlannedTeacher | None,
    cluster: Cluster,
) -> list[Transfer]:
    """What each rank moves in an optimizer step; nothing over ranks of which there is one."""
    replicas, shards = mesh_of(config, cluster.ranks)
    steps = config.gradient_accumulation_steps
    syncs = steps if config.sync_each_batch else 1
    # Ranks of a replica stand in a row, and replicas one after the other.
    split_crosses = cluster.ranks > cluster.ranks_per_node and cluster.ranks_per_node % shards > 0
    copies_cross = cluster.ranks > cluster.ranks_per_node
    everything = split_numel(student.parameters(), shards)
    in_layers = sum(split_numel(layer.parameters(), shards) for layer in decoder_layers(student))
    found: list[Transfer] = []
    if shards > 1:
        passes = 2 if config.reshard_after_forward else 1
        gathered = everything + (passes - 1) * in_layers
        size = compute_dtype(config).itemsize * gathered
        found.append(Transfer("student weights, gathered", size, steps, split_crosses))
        if isinstance(teacher, PreTrainedModel):
            size = teacher_dtype(config).itemsize * split_numel(teacher.parameters(), shards)
            label = "teacher weights, gathered"
            found.append(Transfer(label, size, steps, split_crosses, teacher=True))
        size = FP32 * everything
        found.append(Transfer("gradients, summed in fp32", size, syncs, split_crosses))
    if replicas > 1:
        size = 2 * FP32 * everything // shards
        found.append(Transfer("gradients, between replicas", size, syncs, copies_cross))
    return found


# As text


def format_rank_plan(plan: RankPlan) -> str:
    """The plan as text for a terminal."""
    ranks, copies = plan.cluster.ranks, f"{plan.replicas} replicas, " if plan.replicas > 1 else ""
    split = f"each model split over {plan.shards}" if plan.shards > 1 else "each model whole"
    lines = [f"memory per rank on {plan.device}, {ranks} ranks, {copies}{split}"]
    lines += [item_line(*item) for item in plan.kept]
    lines += ["whole for a while", *(item_line(*item) for item in plan.whole)]
    lines += ["of a micro-batch or an evaluation", *(item_line(*item) for item in plan.passing)]
    lines.append(item_line("at most, were all of it there at once", plan.total))
    if plan.host:
        lines += ["in host memory, per rank", *(item_line(*item) for item in plan.host)]
    if not plan.transfers:
        return "\n".join([*lines, "nothing is moved between ranks"])
    lines.append(f"moved per micro-batch of {plan.tokens:,} tokens and rank")
    lines += [_transfer_line(plan, transfer) for transfer in plan.transfers]
    step = plan.moved_per_step / 1e9
    lines.append(f"  {'per optimizer step, in all':<42}{step:>12,.3f} GB")
    lines += ["time per micro-batch", *_time_lines(plan)]
    return "\n".join([*lines, "what stops scaling", *_limits(plan)])


def _transfer_line(plan: RankPlan, transfer: Transfer) -> str:
    size = transfer.size * transfer.times / plan.micro_batches
    where = "between nodes" if transfer.crosses else "inside a node"
    return f"  {transfer.label:<42}{size / 1e9:>12,.3f} GB  {where}"


def _time_lines(plan: RankPlan) -> list[str]:
    lines = []
    for crosses, where in ((False, "inside a node"), (True, "between nodes")):
        seconds = plan.seconds(crosses=crosses)
        if seconds:
            rate = plan.cluster.bandwidth(crosses) / 1e9
            lines.append(_seconds(f"transfers {where}, {rate:g} GB/s", seconds))
    if plan.compute_seconds is None or plan.flops_per_second is None:
        return [*lines, "  computation: not known here; state --tflops of one rank"]
    rate = plan.flops_per_second / 1e12
    return [*lines, _seconds(f"computation, {rate:g} TFLOP/s", plan.compute_seconds)]


def _seconds(label: str, seconds: float) -> str:
    return f"  {label:<42}{seconds:>12,.3f} s"


def _limits(plan: RankPlan) -> list[str]:
    """What sets the pace, how many tokens would change that, and what of it is the teacher's."""
    where = "between nodes" if plan.slowest_crosses else "inside a node"
    share = plan.teacher_share_of_transfers
    lines: list[str] = []
    needed, alone = plan.tokens_to_hide(), plan.tokens_to_hide(teacher=False)
    compute, speed = plan.compute_seconds, plan.flops_per_second
    hidden = compute is not None and compute >= plan.transfer_seconds
    if compute is not None and speed is not None and needed is not None and alone is not None:
        pace = "computation sets" if hidden else f"transfers {where} set"
        rate = plan.tokens / max(compute, plan.transfer_seconds)
        lines += [
            f"{pace} the pace: at most {rate:,.0f} tokens/s per rank, "
            f"{rate * plan.cluster.ranks:,.0f} in all",
            f"computation alone: at most {speed / plan.flops:,.0f} tokens/s per rank",
            f"{needed:,} tokens per rank and micro-batch hide the transfers {where}; "
            f"without the teacher's {alone:,}",
        ]
    if plan.teacher_flops:
        lines.append(
            f"the teacher's share: {share:.0%} of the transfers {where}, "
            f"{plan.teacher_share_of_work:.0%} of the work"
        )
    if hidden:
        lines.append(
            f"more ranks share the {plan.step_tokens:,} tokens of an optimizer step, and each has "
            "fewer to hide the transfers"
            if plan.step_is_fixed
            else f"more ranks make optimizer steps larger, now {plan.step_tokens:,} tokens"
        )
    if hidden and plan.teacher_flops:
        gain = plan.flops / plan.student_flops
        lines.append(f"without the teacher's work a step would be {gain:.1f} times as fast")
    per_node = plan.cluster.ranks_per_node
    if plan.slowest_crosses and plan.shards > per_node and plan.cluster.ranks % per_node == 0:
        lines.append(
            f"dp_shard_size: {per_node} with dp_replicate_size: {plan.cluster.ranks // per_node} "
            "keeps all but sums of gradients inside nodes"
        )
    return [f"  {line}" for line in lines]
