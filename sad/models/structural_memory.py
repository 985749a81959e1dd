"""How much memory structural losses take, by sizes: what they capture, keep and compute with.

By the formulas of ``sad.losses``, with factors that were measured on its code: losses between
states keep three tensors [N, D_t] in fp32 for backward, those between maps compute with some five
tensors [B, heads, block, L] at a time, which backward makes again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PreTrainedModel

from sad.config.schema import DistillConfig
from sad.models.cached_targets import PlannedTeacher, teacher_head
from sad.models.heads import output_embedding
from sad.models.load import compute_dtype, teacher_dtype

FP32 = 4

STATES_KEPT = 3
"""Tensors of the teacher's width that a loss between states keeps for backward, per pair."""

MAPS_AT_ONCE, MAPS_WITHOUT_GRADIENT = 5, 4
"""Tensors of the size of a block of maps that are alive at once."""

MIXED_MAPS_AT_ONCE = 3
"""The same for the teacher's maps, before its heads are mixed to the student's."""

TRAINED = 16
"""Bytes of a projector's parameter: itself, its gradient, two moments, all in fp32."""


class LossMemory(NamedTuple):
    """Bytes of one structural loss."""

    always: int
    """Projectors with what trains them, queues."""
    captured: int
    """What is taken from inside the teacher, and copies of what is taken from the student."""
    kept: int
    """What backward needs, beside."""
    passing: int
    """What is alive only while the loss, or its backward, is computed."""


def structural_memory(
    config: DistillConfig,
    student: PreTrainedModel,
    teacher: PlannedTeacher,
    rows: int,
    *,
    gradients: bool,
) -> dict[str, LossMemory]:
    """Loss -> its memory for micro-batches of ``rows`` rows, of those that have a weight."""
    return {
        name: _memory_of(name, config, student, teacher, rows, gradients=gradients)
        for name in config.structural_weights
    }


def peak_of_losses(losses: dict[str, LossMemory]) -> int:
    """What they hold at most beside ``always``: they run one after the other, and each keeps what
    its backward needs."""
    held = sum(loss.captured for loss in losses.values())
    peak = held
    for loss in losses.values():
        peak = max(peak, held + loss.passing)
        held += loss.kept
    return max(peak, held)


def _memory_of(
    name: str,
    config: DistillConfig,
    student: PreTrainedModel,
    teacher: PlannedTeacher,
    rows: int,
    *,
    gradients: bool,
) -> LossMemory:
    tokens = rows * config.max_length
    ours, theirs = output_embedding(student).in_features, _width(teacher)
    projector = TRAINED * ours * theirs if ours != theirs else 0
    teacher_size = teacher_dtype(config).itemsize
    model: Any = teacher  # a cache has no layers, and serves no loss that needs them
    upcast = FP32 if compute_dtype(config).itemsize < FP32 else 0
    states = STATES_KEPT * tokens * theirs * FP32

    def between_states(pairs: int, captured: int) -> LossMemory:
        kept = pairs * states if gradients else 0
        return LossMemory(pairs * projector, captured, kept, 0 if gradients else states)

    def between_maps(pairs: int, heads: int, block: int, captured: int, copied: int) -> LossMemory:
        block_bytes = rows * heads * min(block, config.max_length) * config.max_length * FP32
        at_once = MAPS_AT_ONCE if gradients else MAPS_WITHOUT_GRADIENT
        captured = pairs * tokens * (captured * teacher_size + copied * upcast)
        return LossMemory(0, captured, 0, at_once * block_bytes)

    match name:
        case "feature":
            return between_states(1, 0)
        case "layerwise":
            pairs = len(config.layerwise.layers or ()) or config.layerwise.num_pairs
            return between_states(pairs, pairs * tokens * theirs * teacher_size)
        case "contrastive":
            queue = config.contrastive.queue_size * theirs * FP32
            return LossMemory(projector + queue, 0, 0, 2 * tokens * (ours + theirs) * FP32)
        case "attention":
            mine, other = _heads(student), _heads(model)
            section = config.attention
            found = between_maps(
                len(section.layers), mine.heads, section.query_block, other.widths, mine.widths
            )
            block = min(section.query_block, config.max_length)
            mixed = rows * other.heads * block * config.max_length * FP32
            return found._replace(passing=max(found.passing, MIXED_MAPS_AT_ONCE * mixed))
        case "relations":
            mine, other = _heads(student), _heads(model)
            pairs, block = len(config.relations.layers), config.relations.query_block
            heads = _relation_heads(mine.query, other.query)
            return between_maps(pairs, heads, block, other.all_three, mine.all_three)
        case _:  # routers: gates are small beside all else
            return LossMemory(0, 0, 0, 0)


def _width(teacher: PlannedTeacher) -> int:
    head = teacher_head(teacher)
    return 0 if head is None else head.in_features


class _Heads(NamedTuple):
    heads: int
    query: int  # width
    key: int

    @property
    def widths(self) -> int:
        """Of what attention maps are made from: queries and keys."""
        return self.query + self.key

    @property
    def all_three(self) -> int:
        return self.query + 2 * self.key


def _heads(model: PreTrainedModel) -> _Heads:
    text: Any = model.config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    return _Heads(heads, heads * width, groups * width)


def _relation_heads(ours: int, theirs: int) -> int:
    """As ``sad.losses.relations.relation_heads`` has it, for any widths."""
    narrow = min(ours, theirs) // 16
    common = [n for n in range(1, narrow + 1) if ours % n == 0 and theirs % n == 0]
    return max(common, default=1)
