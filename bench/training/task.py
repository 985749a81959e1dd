"""The training task of all contenders: sizes, text, teacher and student; and the quality score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from sad.config.schema import DataConfig, DistillConfig
from sad.data.batch import IGNORE_INDEX
from sad.data.rows import epoch_permutation, load_rows
from sad.data.tokenizers import load_tokenizer
from sad.environment import quiet_libraries
from sad.optim.optimizer import build_adamw
from sad.optim.schedule import RunLength, build_scheduler
from sad.recipes import FOLDER
from sad.teachers.eval_teacher import EvalTeacher
from sad.teachers.frozen import FrozenTeacher
from sad.training.inputs import RunInputs

QUICKSTART = str(FOLDER / "quickstart" / "teacher")

UNUSED = -12.0
"""The teacher's logit for ids outside the quickstart's vocabulary. Together they get a probability
of 1e-4 in Qwen's vocabulary; with a logit of 0 it would be 0.86."""


@dataclass(frozen=True)
class Setup:
    """Sizes of a run. Model shapes are fields of ``Qwen3Config``; heads are tied to embeddings."""

    student: dict[str, Any]
    teacher: dict[str, Any] | None = None  # None: the quickstart's, with a widened head
    vocab: int = 151936
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of both models
    rows: int = 4  # per step
    length: int = 128  # tokens per row
    warmup: int = 2  # steps before the clock starts
    steps: int = 14
    rounds: int = 3
    eval_rows: int = 24  # 0: no quality score
    documents: int = 200  # of the standard library
    threads: int = 2


def shape(hidden: int, layers: int, heads: int, kv_heads: int, head: int, mlp: int) -> Any:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "intermediate_size": mlp,
    }


CPU = Setup(student=shape(128, 2, 4, 2, 32, 384))

GPU = Setup(
    student=shape(1024, 28, 16, 8, 128, 3072),
    teacher=shape(2560, 36, 32, 8, 128, 9728),
    device="cuda",
    dtype="bfloat16",
    length=1024,
    warmup=3,
    steps=20,
    eval_rows=0,
)


class Task(NamedTuple):
    """Models, data and configuration of one round."""

    setup: Setup
    config: DistillConfig
    inputs: RunInputs
    student: Any  # PreTrainedModel
    teacher: Any
    order: np.ndarray  # training row indices, in sad's order

    def optimizers(self) -> tuple[Any, Any]:
        """Sad's optimizer and schedule, for the other trainers."""
        setup, rows = self.setup, len(self.inputs.train_rows)
        run_length = RunLength(
            rows, setup.rows, 1, num_train_epochs=1, max_steps=self.config.max_steps
        )
        optimizer = build_adamw(self.config, dict(self.student.named_parameters()))
        return optimizer, build_scheduler(optimizer, self.config, run_length)


def distill_config(setup: Setup, seed: int) -> DistillConfig:
    """The quickstart's objective and optimizer, a learning rate for few steps, no extras."""
    return DistillConfig(
        student="in memory",
        teacher="in memory",
        data=DataConfig(train=("python-stdlib",), max_documents=setup.documents),
        max_length=setup.length,
        packing=False,
        kd_weight=0.9,
        temperature=1.0,
        label_smoothing=0.0,
        use_curriculum=False,
        max_steps=setup.warmup + setup.steps,
        per_device_train_batch_size=setup.rows,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        min_lr_ratio=0.02,
        weight_decay=0.01,
        param_dtype=setup.dtype,
        master_weights=False,
        use_ema=False,
        device=setup.device,
        seed=seed,
    )


def prepare(setup: Setup, seed: int) -> Task:
    """Load text and build the models of a round; ``seed`` decides weights and row order."""
    config, tokenizer = distill_config(setup, seed), load_tokenizer(QUICKSTART)
    train, held_out = load_rows(config, tokenizer)
    needed = config.max_steps * setup.rows
    if len(train) < needed:
        raise ValueError(f"documents must give {needed} rows, got {len(train)}; take more of them")
    if setup.teacher is None:
        some = train.batch(epoch_permutation(0, 0, len(train))[:64])
        teacher = _quickstart_teacher(setup, some.input_ids)
    else:
        teacher = random_model(setup.teacher, setup, seed=1000 + seed)
    teacher.requires_grad_(False).eval()
    student = random_model(setup.student, setup, seed).train()
    device = torch.device(setup.device)
    frozen = FrozenTeacher(teacher, setup.vocab, device=device)
    inputs = RunInputs(
        tokenizer=tokenizer,
        valid_vocab=setup.vocab,
        train_rows=train,
        eval_rows=held_out,
        teacher=frozen,
        eval_teacher=EvalTeacher(frozen, cache_bytes=0),
        device=device,
        rss_before=0,
    )
    order = epoch_permutation(seed, 0, len(train))[:needed]
    return Task(setup, config, inputs, student, teacher, order)


def random_model(shape: dict[str, Any], setup: Setup, seed: int) -> Any:
    config = Qwen3Config(
        **shape,
        vocab_size=setup.vocab,
        max_position_embeddings=2 * setup.length,
        tie_word_embeddings=True,
        use_cache=False,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    with torch.device(setup.device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, setup.dtype))


@torch.no_grad()
def _quickstart_teacher(setup: Setup, some_ids: Tensor) -> Any:
    """The quickstart's teacher with its head widened to ``setup.vocab``.

    The new rows are a least-squares fit of the logit ``UNUSED`` on the hidden states of
    ``some_ids``; on other text their logits lie between -17 and -8.
    """
    with quiet_libraries():
        dtype = getattr(torch, setup.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(QUICKSTART, dtype=dtype)
        hidden = model.model(some_ids).last_hidden_state.flatten(0, 1).float()
        wanted = torch.full((len(hidden), 1), UNUSED)
        known = model.config.vocab_size
        model.resize_token_embeddings(setup.vocab, mean_resizing=False)
    unused = torch.linalg.lstsq(hidden, wanted).solution[:, 0]
    model.get_output_embeddings().weight[known:] = unused
    model.config.use_cache = False
    return model.to(setup.device)


@torch.no_grad()
def quality(task: Task) -> dict[str, float]:
    """Held-out quality in nats per target: KL to the teacher, NLL of student and teacher."""
    task.student.eval()
    rows = task.inputs.eval_rows
    sums = torch.zeros(4, dtype=torch.float64)
    for number in epoch_permutation(0, 0, len(rows))[: task.setup.eval_rows]:
        batch = rows.batch([number]).to(task.inputs.device)
        keep = batch.labels != IGNORE_INDEX
        labels = batch.labels[keep][:, None]
        log_q, log_p = (
            F.log_softmax(model(input_ids=batch.input_ids).logits[keep].float(), -1)
            for model in (task.student, task.teacher)
        )
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="sum")
        nll, teacher_nll = (-logs.gather(1, labels).sum() for logs in (log_q, log_p))
        sums += torch.stack([kl, nll, teacher_nll, keep.sum()]).double().cpu()
    kl, nll, teacher_nll = (sums[:3] / sums[3]).tolist()
    return {"kl": kl, "nll": nll, "teacher_nll": teacher_nll}
