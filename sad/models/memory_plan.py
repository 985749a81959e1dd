"""How much memory a run will need, from configurations alone: no weight is loaded.

Weights, gradients and the optimizer's states are arithmetic on parameter counts, exact to the
byte. The student's activations come from its own forward pass over fake tensors, which have shapes
and storages but no data: what autograd asks to keep is added up, each storage once. The need of
the loss follows from the size of its tiles.

Memory peaks at one of five moments. When a micro-batch turns from forward to backward, all of its
activations are alive, those that structural losses look at among them, and the gradients of the
window's earlier micro-batches. At the optimizer step the activations are gone, but all gradients
are there. While the teacher runs, its own activations are alive, a few at a time; and in an
evaluation there are no gradients, but there may be more rows. While the student writes text of its
own, its keys and values are cached. The plan itemises the worst of them.

On a CPU the allocator of the C library keeps much of what was freed in pieces that nothing fits: it
has an item of its own, a share of what comes and goes that was measured. Not counted are libraries.
The interpreter with its libraries (``base``) is named apart: the process that plans has loaded the
same ones. A CUDA context takes about 0.5 GiB besides.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from sad_kernels import LinearMemory, linear_memory_bytes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from sad.config.schema import DistillConfig
from sad.environment import memory_now, resolve_device
from sad.errors import SadError, UnfitError, with_type
from sad.models.cached_targets import (
    CachedTargets,
    PlannedTeacher,
    cached_head_items,
    planned_teacher,
    sparse,
    teacher_head,
)
from sad.models.forward_memory import forward_peak, put_tensors
from sad.models.heads import Backbone, output_embedding
from sad.models.load import (
    build_model,
    build_student_model,
    compute_dtype,
    enable_checkpointing,
    read_model_config,
    teacher_dtype,
)
from sad.models.quantization import bits_of_teacher, linear_weights, quantized_bytes
from sad.models.rollout_memory import rollout_items
from sad.models.structural_memory import peak_of_losses, structural_memory

Item = tuple[str, int]
"""What takes memory, and how many bytes."""

FAKES = logging.getLogger("torch._subclasses.fake_tensor")

FP32 = 4
"""Bytes of a number in fp32."""

SMALLEST_IN_8_BITS, BLOCK_IN_8_BITS = 4096, 256
"""Numbers in the smallest tensor whose moments bitsandbytes keeps in 8 bits, and those that share a
scale."""

EMA = "EMA, float32"
ALLOCATOR = "freed memory that the allocator cannot reuse"
UNUSED_SHARE = 0.25
"""Of what comes and goes, in glibc's allocator (2026-11-30, runs of 0.9 to 1.5 GiB)."""

SNAPSHOT = "copy of the state, for saving"
TILES = "loss: tiles of logits"
OF_TARGETS = "loss: of the targets of each token"
AT_BOUNDARIES = "teacher states in the student's positions"
OWN_HEAD = "head of the student as its own teacher"
READING = "reading the teacher's targets"
STRUCTURAL_LOSSES = "structural losses: captured states and maps"


@dataclass(frozen=True)
class MemoryPlan:
    """The predicted peak on the training device."""

    device: str
    moment: str
    """When the peak is reached."""
    items: tuple[Item, ...]
    """What is alive then."""
    elsewhere: tuple[Item, ...]
    """What lies on the teacher's own device, if it has one."""
    full_logits: int
    """Bytes of the logits of both models for one micro-batch, which never exist whole."""
    host: tuple[Item, ...] = ()
    """What lies in host memory and is not among ``items``."""
    base: int = field(default=0, compare=False)
    """Resident bytes of the interpreter and its libraries, before anything is loaded."""

    @property
    def total(self) -> int:
        """The peak in bytes: the sum of ``items``."""
        return total_bytes(self.items)

    @property
    def tensors(self) -> int:
        """What of it tensors hold."""
        return total_bytes(item for item in self.items if item[0] != ALLOCATOR)


def plan(
    config: DistillConfig, eval_rows: int | None = None, cached: CachedTargets | None = None
) -> MemoryPlan:
    """Predict the peak memory of a run. Random states are left as they are.

    Rows are taken to be packed; with ``packing: false`` attention may need a little less. Without
    ``eval_rows``, the number of held-out rows, what evaluations keep is an upper bound. ``cached``
    are the sizes of a ``teacher_cache``, which stands for the teacher. Raises what loading the
    models raises, as far as their configurations can tell.
    """
    device = planned_device(config.device)
    base = memory_now()["rss_bytes"]
    with torch.device("meta"):
        student = build_student_model(config)
        teacher = planned_teacher(config, cached)

    here, elsewhere = _teacher_weights(config, student, teacher)
    host = teacher_cache_items(config, teacher, eval_rows)
    known = eval_rows is not None or config.max_eval_rows is not None
    if device.type == "cpu" and known:  # the budget alone would be no prediction
        here, host = here + host, []
    states = student_states(config, student)
    copied = _snapshot_items(config, device, student)
    if device.type == "cpu":
        here = here + copied
    else:
        host = host + copied
    if config.ema_device == "cpu" != device.type:
        host += [item for item in states if item[0] == EMA]
        states = [item for item in states if item[0] != EMA]
    always = states + here
    gradients = [("gradients", gradient_bytes(config, student.parameters()))]
    own = config.self_teacher is not None
    turning = forward_items(config, device, student, student if own else teacher)
    if own:
        turning.append((OWN_HEAD, output_embedding(student).weight.nbytes))
    earlier = gradients if config.gradient_accumulation_steps > 1 else []
    # On a CPU the loss keeps its buffers for the next call.
    tiles = [item for item in turning if item[0] == TILES and device.type == "cpu"]
    running = _teacher_items(config, device, cached)
    ahead = _prefetched_items(config, student, teacher)
    beside = ahead + running if ahead else []  # the teacher runs while the student is trained
    moments = {
        "between forward and backward": turning + earlier + beside,
        "at the optimizer step": gradients + tiles + beside,
        "in the teacher's forward pass": running + earlier + tiles,
        "in an evaluation": evaluation_items(config, device, student, teacher, eval_rows) + ahead,
    }
    if config.lmbda:
        moments["while the student writes"] = writing_items(config, device, student) + tiles
    moment = max(moments, key=lambda name: total_bytes(moments[name]))
    passing = moments[moment]
    if device.type == "cpu":
        passing = [*passing, (ALLOCATOR, int(UNUSED_SHARE * total_bytes(passing)))]
    return MemoryPlan(
        device=str(device),
        moment=moment,
        items=tuple(always + projector_items(config, student, teacher) + passing),
        elsewhere=tuple(elsewhere),
        full_logits=_full_logits(config, student, teacher),
        host=tuple(host),
        base=base,
    )


def format_plan(plan: MemoryPlan) -> str:
    """The plan as a table for a terminal."""
    lines = [f"memory on {plan.device}, {plan.moment}"]
    lines += [item_line(label, size) for label, size in plan.items]
    lines += [item_line("predicted peak", plan.total)]
    if plan.base:
        lines += [item_line("interpreter and libraries, besides", plan.base)]
    if plan.elsewhere:
        lines += ["on the teacher's device"]
        lines += [item_line(label, size) for label, size in plan.elsewhere]
    if plan.host:
        lines += ["in host memory"]
        lines += [item_line(label, size) for label, size in plan.host]
    lines += ["for contrast", item_line("full logits, never held", plan.full_logits)]
    return "\n".join(lines)


def item_line(label: str, size: int) -> str:
    """One line of the table."""
    return f"  {label:<42}{size / 2**20:>12,.1f} MiB"


def planned_device(name: str) -> torch.device:
    """The device of a name in the configuration; it need not be on this machine."""
    if name.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        return torch.device(name)
    return resolve_device(name)


def _of_fakes(device: torch.device) -> torch.device:
    """Where tensors without data lie: a build of torch without CUDA has none there either, and on a
    CPU the same ones are kept."""
    away = device.type == "cuda" and not torch.cuda.is_available()
    return torch.device("cpu") if away else device


# Weights and what the optimizer adds to them


def student_states(config: DistillConfig, student: nn.Module) -> list[Item]:
    """What is alive from the first update on, and is saved in every checkpoint."""
    trained = [p for p in student.parameters() if p.requires_grad]
    items = [(f"student weights, {config.param_dtype}", weight_bytes(student))]
    if _has_masters(config):
        rounded = sum(p.numel() for p in trained if p.dtype == torch.bfloat16)
        items.append(("master weights, float32", FP32 * rounded))
    items.append(("AdamW moments", sum(_moment_bytes(config, p) for p in trained)))
    if config.use_ema:
        items.append((EMA, FP32 * sum(p.numel() for p in trained)))
    return items


def _snapshot_items(config: DistillConfig, device: torch.device, student: nn.Module) -> list[Item]:
    """The copy that is written while training goes on; none where the only save is the last."""
    if not saves_in_background(config):
        return []
    sizes = [size for _, size in student_states(config, student)]
    sizes[0] -= frozen_bytes(student)
    if device.type == "cuda":  # torch locks the pages of a power of two of bytes
        sizes = [1 << (size - 1).bit_length() for size in sizes if size]
    return [(SNAPSHOT, sum(sizes))]


def saves_in_background(config: DistillConfig) -> bool:
    """Whether checkpoints are written while training goes on, and not the last alone.

    With ``max_steps`` the number of epochs is not known: ``save_steps`` alone decides.
    """
    epochs = config.num_train_epochs if config.max_steps <= 0 else 1
    return config.async_save and bool(config.save_steps or epochs > 1)


def frozen_bytes(student: nn.Module) -> int:
    """Of the weights that adapters lie upon: no checkpoint holds them."""
    return _tensor_bytes(p for p in student.parameters() if not p.requires_grad)


def gradient_bytes(config: DistillConfig, parameters: Iterable[Tensor]) -> int:
    """Of those parameters that are trained."""
    return sum(_optimized_itemsize(config, p) * p.numel() for p in parameters if p.requires_grad)


def _moment_bytes(config: DistillConfig, parameter: Tensor) -> int:
    """Of both moments; those in 8 bits have a scale in fp32 per block."""
    count = parameter.numel()
    if config.optim == "adamw_8bit" and count >= SMALLEST_IN_8_BITS:
        return 2 * (count + FP32 * -(-count // BLOCK_IN_8_BITS))
    return 2 * _optimized_itemsize(config, parameter) * count


def _teacher_weights(
    config: DistillConfig, student: PreTrainedModel, teacher: PlannedTeacher | None
) -> tuple[list[Item], list[Item]]:
    """On the training device, and elsewhere. The head is copied to where the student is, and for
    other ids to their order."""
    if teacher is None:
        return [], []
    if isinstance(teacher, CachedTargets):
        return cached_head_items(teacher), []
    dtype = str(teacher_dtype(config)).removeprefix("torch.")
    bits, size = _teacher_bits(config), weight_bytes(teacher)
    if bits is not None:
        dtype = f"{dtype} and {bits} bits"
        linear = linear_weights(teacher, output_embedding(teacher))
        size += sum(quantized_bytes(weight, bits) - weight.nbytes for weight in linear)
    weights = (f"teacher weights, {dtype}", size)
    head = output_embedding(teacher)
    mapped = []
    if config.vocab_map is not None:
        rows = output_embedding(student).out_features
        mapped = [("teacher head, in the student's ids", head.weight[0].nbytes * rows)]
    if planned_device(config.teacher_device or config.device) == planned_device(config.device):
        return [weights, *mapped], []
    return [*mapped, ("teacher head", _tensor_bytes(head.parameters()))], [weights]


def _teacher_bits(config: DistillConfig) -> int | None:
    """Bits of the teacher's linear weights; None if they are not quantized."""
    return bits_of_teacher(config, read_model_config(config, "teacher"))


def teacher_cache_items(
    config: DistillConfig, teacher: PlannedTeacher | None, eval_rows: int | None
) -> list[Item]:
    """What evaluations keep of the teacher for one another."""
    if teacher is None or not config.eval_cache_bytes:  # 0 with a teacher_cache
        return []
    per_row = config.max_length * _teacher_bytes_per_token(config, teacher)
    rows = [n for n in (eval_rows, config.max_eval_rows) if n is not None]
    size = min([config.eval_cache_bytes, *(n * per_row for n in rows)])
    return [("teacher states for evaluations" + (", at most" if eval_rows is None else ""), size)]


def _teacher_bytes_per_token(config: DistillConfig, teacher: PlannedTeacher) -> int:
    """Of its final hidden states, or of sparse targets."""
    if isinstance(teacher, CachedTargets):
        return teacher.token_bytes
    return output_embedding(teacher).in_features * teacher_dtype(config).itemsize


# One micro-batch


def forward_items(
    config: DistillConfig,
    device: torch.device,
    student: PreTrainedModel,
    teacher: PlannedTeacher | None,
) -> list[Item]:
    """What is alive when backward has been through the loss, but not yet through a layer."""
    tokens = _tokens(config)
    head = output_embedding(student)
    loss = loss_bytes(config, device, head, teacher)
    tiles = (TILES, loss.logits)
    width = head.in_features * 2  # in fp32: the hidden states and their gradient
    items = [("student activations", _activation_bytes(config, device))]
    structural = 0
    if teacher is not None:
        rows = config.rows_per_process()
        structural = peak_of_losses(
            structural_memory(config, student, teacher, rows, gradients=True)
        )
    if config.gradient_checkpointing:
        # Backward recomputes a layer after the loss has freed its tiles; on a CPU it keeps them.
        whole = _activation_bytes(config, device, checkpointing=False)
        depth = student.config.get_text_config().num_hidden_layers
        layer = ("one layer's activations, recomputed", whole // depth)
        if device.type == "cpu":
            items.append(layer)
        else:
            tiles = max(tiles, layer, key=_size)
    if teacher is not None:
        size = tokens * _teacher_bytes_per_token(config, teacher)
        items.append((_target_label(teacher), size))
        if config.cross_tokenizer == "prefix" and not sparse(teacher):
            items.append((AT_BOUNDARIES, size))
        theirs = teacher_head(teacher)
        width += 0 if theirs is None else theirs.in_features
    items += [
        tiles,
        ("loss: hidden states and their gradient", tokens * width * FP32),
        ("loss: gradient of the head", gradient_bytes(config, [head.weight])),
    ]
    if sparse(teacher):
        items.append((OF_TARGETS, loss.rows))
    items = [item for item in items if item[1]]  # a frozen head has no gradient
    if loss.weight_sum > 0:
        items.append(("loss: fp32 sum of that gradient", loss.weight_sum))
    if structural:
        items.append((STRUCTURAL_LOSSES, structural))
    return items


def _target_label(teacher: PlannedTeacher) -> str:
    return "teacher targets" if sparse(teacher) else "teacher hidden states"


def projector_items(
    config: DistillConfig, student: PreTrainedModel, teacher: PlannedTeacher | None
) -> list[Item]:
    """What structural losses have of their own, with what trains it."""
    if teacher is None or not config.structural_weights:
        return []
    losses = structural_memory(config, student, teacher, 1, gradients=True)
    size = sum(loss.always for loss in losses.values())
    return [("structural losses: projectors and queues", size)] if size else []


# The teacher's forward pass, and evaluations


def _teacher_items(
    config: DistillConfig, device: torch.device, cached: CachedTargets | None
) -> list[Item]:
    """What the teacher holds while it runs a micro-batch, if it does so on the training device; or
    what reading its cache takes."""
    if cached is not None:
        return [(READING, _tokens(config) * cached.reading_bytes)]
    size = _teacher_peak(config, device, config.rows_per_process())
    return [("teacher activations", size)] if size else []


def _prefetched_items(
    config: DistillConfig, student: PreTrainedModel, teacher: PlannedTeacher | None
) -> list[Item]:
    """The teacher's answer to the next micro-batch, beside the one that is being trained on."""
    if teacher is None or not config.teacher_prefetch:
        return []
    if isinstance(teacher, CachedTargets):
        return [("teacher's answer to the next micro-batch", _tokens(config) * teacher.token_bytes)]
    rows = config.rows_per_process()
    losses = structural_memory(config, student, teacher, rows, gradients=True)
    captured = sum(loss.captured for loss in losses.values())
    size = _tokens(config) * _teacher_bytes_per_token(config, teacher)
    return [("teacher's answer to the next micro-batch", size + captured)]


def _teacher_peak(config: DistillConfig, device: torch.device, rows: int) -> int:
    here = planned_device(config.teacher_device or config.device) == device
    if config.teacher is None or not config.loads_teacher or not here:
        return 0
    with _without_data(config.teacher):
        with torch.device("meta"), no_init_weights():
            teacher = build_model(config, "teacher", teacher_dtype(config))
        expanded = 0
        if _teacher_bits(config) is not None:  # one layer at a time
            linear = linear_weights(teacher, output_embedding(teacher))
            expanded = max((weight.nbytes for weight in linear), default=0)
        return expanded + forward_peak(teacher, _of_fakes(device), rows, config.max_length)


def writing_items(
    config: DistillConfig, device: torch.device, student: PreTrainedModel
) -> list[Item]:
    """What is alive while the student writes a micro-batch: no gradient, and no teacher."""
    length = config.max_length - config.max_completion_length
    prompts = _student_peak(config, device, config.rows_per_process(), length)
    return rollout_items(config, student, compute_dtype(config).itemsize, prompts)


def _student_peak(config: DistillConfig, device: torch.device, rows: int, length: int) -> int:
    """What the student's forward pass without gradients takes."""
    dtype, cast, fakes = _param_dtype(config), compute_dtype(config), _of_fakes(device)

    def autocast() -> AbstractContextManager[object]:
        return torch.autocast(fakes.type, cast) if cast != dtype else nullcontext()

    with _without_data(config.student):
        with torch.device("meta"), no_init_weights():
            model = build_student_model(config)
        return forward_peak(model, fakes, rows, length, autocast)


def evaluation_items(
    config: DistillConfig,
    device: torch.device,
    student: PreTrainedModel,
    teacher: PlannedTeacher | None,
    eval_rows: int | None,
) -> list[Item]:
    """What is alive in an evaluation's batch, at the worst of its three steps."""
    known = [n for n in (eval_rows, config.max_eval_rows) if n is not None]
    rows = min([config.per_device_eval_batch_size, *known])
    tokens = rows * config.max_length
    students = _student_peak(config, device, rows, config.max_length)
    head = output_embedding(student)
    theirs = None if teacher is None else teacher_head(teacher)
    loss = loss_bytes(config, device, head, teacher, tokens=tokens, gradients=False)
    width = head.in_features + (0 if theirs is None else theirs.in_features)
    states = tokens * width * FP32
    if sparse(teacher):
        states += loss.rows
    losing = loss.logits + states
    held: list[Item] = []
    teachers = 0
    if teacher is not None:
        size = tokens * _teacher_bytes_per_token(config, teacher)
        held.append((_target_label(teacher), size))
        if config.cross_tokenizer is not None and not sparse(teacher):
            held.append((AT_BOUNDARIES, size))
        if isinstance(teacher, CachedTargets):
            teachers = tokens * teacher.reading_bytes - size
        else:
            teachers = _teacher_peak(config, device, rows) - size
        losses = structural_memory(config, student, teacher, rows, gradients=False)
        structural = peak_of_losses(losses)
        if structural:
            held.append((STRUCTURAL_LOSSES, structural))
    if device.type == "cpu":  # the buffers of the loss stay, and the teacher comes first
        trained = loss_bytes(config, device, head, teacher).logits
        buffers = max(loss.logits, trained)
        held.append((TILES, buffers))
        losing = states
        if known and min(known) <= rows:  # in the only batch
            teachers -= buffers - trained
    steps = {
        READING if isinstance(teacher, CachedTargets) else "teacher activations": teachers,
        "student activations, without gradients": students,
        "loss of the evaluation": losing,
    }
    step = max(steps, key=lambda name: steps[name])
    return [*held, (step, steps[step])]


def loss_bytes(
    config: DistillConfig,
    device: torch.device,
    student: nn.Linear,
    teacher: PlannedTeacher | None,
    *,
    tokens: int | None = None,
    gradients: bool = True,
) -> LinearMemory:
    """What the loss takes on this device with the student's head, by default of a micro-batch.

    As if every token was a target: where few are, in conversations, the loss takes less.
    """
    theirs = None if teacher is None else teacher_head(teacher)
    kind, width = ("hidden", theirs.in_features) if theirs is not None else (None, 0)
    if isinstance(teacher, CachedTargets) and teacher.top_k:
        kind, width = "top_k", teacher.top_k
    wrt = ("hidden", "weight") if student.weight.requires_grad else ("hidden",)
    return linear_memory_bytes(
        _tokens(config) if tokens is None else tokens,
        student.out_features,
        student.in_features,
        teacher=kind,
        teacher_width=width,
        gradients=wrt if gradients else (),
        dtype=compute_dtype(config),
        chunk_bytes=config.chunk_bytes,
        logits=config.loss_logits,
        device=device,
    )


def _activation_bytes(
    config: DistillConfig, device: torch.device, *, checkpointing: bool | None = None
) -> int:
    """What autograd keeps of the student's layers, parameters aside.

    Raises ``UnfitError`` for a student with an operator that has no fake form.
    """
    if checkpointing is None:
        checkpointing = config.gradient_checkpointing
    dtype, cast = _param_dtype(config), compute_dtype(config)
    with _without_data(config.student):
        return _kept_bytes(config, _of_fakes(device), dtype, cast, checkpointing)


@contextmanager
def _without_data(name: str) -> Iterator[None]:
    """Within, a model runs on tensors without data: what it raises becomes an ``UnfitError``."""
    before, FAKES.disabled = FAKES.disabled, True  # torch logs what it raises, with tracebacks
    try:
        yield
    except (SadError, MemoryError):
        raise
    except Exception as error:
        raise UnfitError(
            f"an estimate of memory must run {name} on tensors without data, got "
            f"{with_type(error)}; train without one"
        ) from error
    finally:
        FAKES.disabled = before


class _FakeGroupedProducts(TorchDispatchMode):
    """Grouped products of experts on fake tensors: torch's own fakes are those of its GPU kernel,
    which takes bf16 alone, in widths of 16 bytes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            rows, weights = args[:2]
            return rows.new_empty(*rows.shape[:-1], weights.shape[-1])
        return func(*args, **(kwargs or {}))


def _kept_bytes(
    config: DistillConfig,
    device: torch.device,
    dtype: torch.dtype,
    cast: torch.dtype,
    checkpointing: bool,
) -> int:
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no other storage gets its address
        return tensor

    with torch.device("meta"), no_init_weights():
        model = build_student_model(config, dtype).train()
    with FakeTensorMode(), _FakeGroupedProducts():
        put_tensors(model, device)
        rows = config.rows_per_process(), config.max_length
        ids, positions = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(2))
        if checkpointing:
            enable_checkpointing(model)
        autocast = torch.autocast(device.type, cast) if cast != dtype else nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            Backbone(model)(ids, positions)
        for tensor in (*model.parameters(), *model.buffers()):
            kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())


def _full_logits(
    config: DistillConfig, student: PreTrainedModel, teacher: PlannedTeacher | None
) -> int:
    per_token = output_embedding(student).out_features * compute_dtype(config).itemsize
    theirs = None if teacher is None else teacher_head(teacher)
    if theirs is not None:
        per_token += theirs.out_features * theirs.weight.dtype.itemsize
    return _tokens(config) * per_token


# Sizes


def _tokens(config: DistillConfig) -> int:
    return config.rows_per_process() * config.max_length


def _param_dtype(config: DistillConfig) -> torch.dtype:
    return getattr(torch, config.param_dtype)


def _has_masters(config: DistillConfig) -> bool:
    return config.param_dtype == "bfloat16" and config.master_weights


def _optimized_itemsize(config: DistillConfig, parameter: Tensor) -> int:
    """Moments and gradients have the dtype of what the optimizer trains: the masters, if any."""
    return FP32 if _has_masters(config) else parameter.element_size()


def weight_bytes(model: nn.Module) -> int:
    return _tensor_bytes(model.parameters()) + _tensor_bytes(model.buffers())


def _tensor_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def total_bytes(items: Iterable[Item]) -> int:
    """The sum of the items' sizes."""
    return sum(size for _, size in items)


def _size(item: Item) -> int:
    return item[1]
