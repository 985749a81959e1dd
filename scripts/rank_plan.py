"""Print the worked plan of sad/README.md: a model of 8 billion parameters taught by one of 73.

``python scripts/rank_plan.py`` prints the table. Only the two configurations are built, with the
shapes of Qwen3 8B and Qwen2.5 72B; no weight exists.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen3Config

from sad.config.schema import DistillConfig
from sad.models.rank_plan import Cluster, RankPlan, plan_states

STUDENT = Qwen3Config(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
)
TEACHER = Qwen2Config(
    vocab_size=151936,
    hidden_size=8192,
    intermediate_size=29568,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)
MESHES = {"8": (8, 1), "512, all split": (512, 1), "512, 64 x 8": (512, 64)}
"""Heading of a column: ranks, and replicas of the models among them."""

FLOPS = 400e12


def plans() -> dict[str, RankPlan]:
    """The plan of each mesh by its heading: 16 rows of 512 tokens per rank."""
    with torch.device("meta"):
        student, teacher = (
            AutoModelForCausalLM.from_config(shape, dtype=dtype)
            for shape, dtype in ((STUDENT, torch.float32), (TEACHER, torch.bfloat16))
        )
    return {name: _plan(student, teacher, *mesh) for name, mesh in MESHES.items()}


def _plan(
    student: PreTrainedModel, teacher: PreTrainedModel, ranks: int, replicas: int
) -> RankPlan:
    config = DistillConfig(
        student="student",
        teacher="teacher",
        device="cuda",
        bf16=True,
        max_length=512,
        per_device_train_batch_size=16,
        dp_replicate_size=replicas,
    )
    return plan_states(config, student, teacher, Cluster(ranks), FLOPS)


def table(plans: dict[str, RankPlan]) -> str:
    """The plans side by side, as Markdown."""
    rows = {
        "student: weights, gradients, moments, EMA": lambda p: _gb(_state(p)),
        "teacher": lambda p: _gb(_teacher(p)),
        "whole for a while": lambda p: _gb(sum(size for _, size in p.whole)),
        "moved per micro-batch, student": lambda p: _gb(_moved(p, "student weights")),
        "moved per micro-batch, teacher": lambda p: _gb(_moved(p, "teacher weights")),
        "moved per micro-batch, gradients": lambda p: _gb(_moved(p, "gradients, summed")),
        "between replicas": lambda p: _gb(_moved(p, "gradients, between")),
        "seconds inside a node": lambda p: f"{p.seconds(crosses=False):.2f}",
        "seconds between nodes": lambda p: f"{p.seconds(crosses=True):.2f}",
        "seconds of computation": lambda p: f"{p.compute_seconds:.2f}",
        "tokens per rank that hide the transfers": lambda p: f"{p.tokens_to_hide():,}",
        "the same without the teacher's": lambda p: f"{p.tokens_to_hide(teacher=False):,}",
        "the teacher's share of the transfers": lambda p: f"{p.teacher_share_of_transfers:.0%}",
        "the teacher's share of the work": lambda p: f"{p.teacher_share_of_work:.0%}",
    }
    lines = ["| per rank | " + " | ".join(plans) + " |", "|-|" + "-:|" * len(plans)]
    for label, cell in rows.items():
        lines.append(f"| {label} | " + " | ".join(cell(plan) for plan in plans.values()) + " |")
    return "\n".join(lines)


def _state(plan: RankPlan) -> int:
    return sum(size for label, size in plan.kept if not label.startswith("teacher"))


def _teacher(plan: RankPlan) -> int:
    return sum(size for label, size in plan.kept if label.startswith("teacher"))


def _moved(plan: RankPlan, label: str) -> int:
    return sum(t.size for t in plan.transfers if t.label.startswith(label))


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size else "-"


if __name__ == "__main__":
    print(table(plans()))
