"""Time and memory of each structural loss: 28 layers, 512 hidden, 2048 tokens.

A step is what training does with a micro-batch: the teacher's forward pass, the student's with its
loss, backward. Every arm takes the same models and the same row in turn, every second round in
reverse; a ratio is the median over rounds to the step with KD alone. Memory is the peak of a step
beyond what was there before, by torch's own count. Weights are random; what is compared does not
depend on them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from bench.kernels.timing import MIB, peak_bytes
from sad.config.schema import DistillConfig
from sad.data.batch import Batch, LossCounts
from sad.optim.precision import Precision
from sad.teachers.frozen import FrozenTeacher
from sad.training.student import build_student

Json = dict[str, Any]

WEIGHTS: dict[str, Any] = {
    name: {"weight": 0.1}
    for name in ("feature", "attention", "relations", "layerwise", "contrastive")
}
DENSE: dict[str, Json] = {
    "KD alone": {},
    **{f"+ {name}": {name: section} for name, section in WEIGHTS.items()},
    "+ all five": WEIGHTS,
}
MIXTURE: dict[str, Json] = {"KD alone": {}, "+ router": {"router": {"weight": 0.1}}}


@dataclass(frozen=True)
class Setup:
    """Both models have ``layers``; the teacher is wider by a quarter and has more heads."""

    layers: int = 28
    hidden: int = 512
    tokens: int = 2048
    vocab: int = 32000
    experts: int = 8
    rounds: int = 5
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"


def measure(setup: Setup | None = None) -> Json:
    """Seconds and MiB of every arm, of dense models and of mixtures of experts."""
    on_gpu = torch.cuda.is_available()
    setup = setup or (Setup(device="cuda", dtype="bfloat16") if on_gpu else Setup())
    rows = _measure(setup, "dense", DENSE) + _measure(setup, "mixture of experts", MIXTURE)
    return {"case": "structure", "setup": asdict(setup), "rows": rows}


def _measure(setup: Setup, group: str, arms: dict[str, Json]) -> list[Json]:
    mixture = group != "dense"
    student = _model(setup, setup.hidden, mixture, seed=0).train()
    teacher = _model(setup, setup.hidden * 5 // 4, mixture, seed=1).requires_grad_(False).eval()
    batch = _batch(setup)
    steps = {name: _step(setup, student, teacher, batch, keys) for name, keys in arms.items()}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(setup.rounds):
        for name in reversed(steps) if round_ % 2 else steps:
            seconds[name].append(_timed(steps[name], setup.device))
    memory = {name: _peak(step, setup.device) for name, step in steps.items()}
    base = next(iter(steps))
    rows = []
    for name in steps:
        ratios = [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]
        rows.append(
            {
                "group": group,
                "arm": name,
                "seconds": seconds[name],
                "time_ratio": statistics.median(ratios),
                "time_ratio_range": [min(ratios), max(ratios)],
                "peak_mib": memory[name] / MIB,
                "extra_mib": (memory[name] - memory[base]) / MIB,
            }
        )
    return rows


def _step(
    setup: Setup, model: Any, teacher_model: Any, batch: Batch, keys: Json
) -> Callable[[], Tensor]:
    config = DistillConfig(
        student="in memory", teacher="in memory", param_dtype=setup.dtype, master_weights=False,
        use_curriculum=False, **keys,
    )  # fmt: skip
    device = torch.device(setup.device)
    precision = Precision(config, device)
    student = build_student(config, model, setup.vocab, precision, teacher_model).train()
    teacher = FrozenTeacher(teacher_model, setup.vocab, device=device)
    objective, weights = config.objective(), config.structural_weights
    capture = student.teacher_capture(weights)

    def step() -> Tensor:
        output = teacher.forward(batch, capture)
        return _backward(student, student(batch, output, objective, batch.counts, weights).loss)

    return step


def _backward(module: torch.nn.Module, loss: Tensor) -> Tensor:
    loss.backward()
    for parameter in module.parameters():
        parameter.grad = None
    return loss.detach()


def _timed(step: Callable[[], Tensor], device: str) -> float:
    begin = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _peak(step: Callable[[], Tensor], device: str) -> float:
    if device == "cpu":
        return peak_bytes(step)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def _model(setup: Setup, hidden: int, mixture: bool, seed: int) -> Any:
    shape: Any = {
        "vocab_size": setup.vocab,
        "hidden_size": hidden,
        "num_hidden_layers": setup.layers,
        "num_attention_heads": max(1, hidden // 64),
        "num_key_value_heads": max(1, hidden // 128),
        "max_position_embeddings": setup.tokens,
        "head_dim": 64,
        "use_cache": False,
        "tie_word_embeddings": True,
    }
    if mixture:
        config: Any = Qwen3MoeConfig(
            **shape, intermediate_size=2 * hidden, moe_intermediate_size=hidden // 2,
            num_experts=setup.experts, num_experts_per_tok=2,
        )  # fmt: skip
    else:
        shape["num_key_value_heads"] = shape["num_attention_heads"] // 2 or 1
        config = LlamaConfig(**shape, intermediate_size=3 * hidden)
    torch.manual_seed(seed)
    with torch.device(setup.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, setup.dtype))


def _batch(setup: Setup) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(setup.vocab, (1, setup.tokens), generator=generator)
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = -100
    counts = LossCounts(setup.tokens - 1, setup.tokens - 1, 1)
    positions = torch.arange(setup.tokens)[None]
    lengths = torch.tensor([setup.tokens])
    return Batch(ids, labels, positions, lengths, counts, 1).to(torch.device(setup.device))


def table(result: Json) -> list[str]:
    """Markdown: a line for each arm, over the step with KD alone."""
    lines = [
        "| | step | over KD alone (range of rounds) | peak beyond KD alone |",
        "|-|-|-|-|",
    ]
    for row in result["rows"]:
        seconds = statistics.median(row["seconds"])
        time_ = f"{seconds:.2f} s" if seconds > 0.5 else f"{1000 * seconds:.1f} ms"
        if row["arm"] == "KD alone":
            cells = [f"**{row['group']}**, KD alone", time_, "", f"({row['peak_mib']:,.0f} MiB)"]
        else:
            low, high = row["time_ratio_range"]
            ratio = f"{row['time_ratio']:.2f}x ({low:.2f} to {high:.2f})"
            cells = [row["arm"], time_, ratio, f"{row['extra_mib']:+,.0f} MiB"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
