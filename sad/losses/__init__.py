"""Structural losses: distillation from activations inside the teacher, beside its logits.

Each is a function of tensors that returns a ``LossTerm``, a sum and the count it is divided by.
Which positions count is defined by a ``Layout`` (``sad.losses.layout``). How a run captures the
tensors, and what it trains beside the student, is in ``sad.losses.structural``.
"""

from sad.losses.attention import LearnedHeadMap, attention_loss, head_map, project_heads
from sad.losses.base import AttentionInputs, LossTerm, Projections, make_projector
from sad.losses.contrastive import TeacherQueue, contrastive_loss, mean_pool
from sad.losses.feature import feature_loss
from sad.losses.layerwise import check_layer_map, layer_pairs, layerwise_loss
from sad.losses.layout import Layout, layout_of
from sad.losses.relations import relation_heads, relation_loss
from sad.losses.router import balance_loss, gate_variation, router_loss, router_z_loss
from sad.losses.taid import TAIDSchedule, adaptive_kl

__all__ = [
    "AttentionInputs",
    "Layout",
    "LearnedHeadMap",
    "LossTerm",
    "Projections",
    "TAIDSchedule",
    "TeacherQueue",
    "adaptive_kl",
    "attention_loss",
    "balance_loss",
    "check_layer_map",
    "contrastive_loss",
    "feature_loss",
    "gate_variation",
    "head_map",
    "layer_pairs",
    "layerwise_loss",
    "layout_of",
    "make_projector",
    "mean_pool",
    "project_heads",
    "relation_heads",
    "relation_loss",
    "router_loss",
    "router_z_loss",
]
