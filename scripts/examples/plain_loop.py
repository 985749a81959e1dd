"""Distil one causal language model into another in a plain PyTorch loop, with an EMA."""

import torch
import torch.nn.functional as F
from sad_kernels import Objective, TeacherHidden, linear_distill_loss
from transformers import LlamaConfig, LlamaForCausalLM

from sad.ema import ModelEMA
from sad.models import split_head

OBJECTIVE = Objective(ce_weight=0.3, kd_weight=0.7, temperature=2.0, label_smoothing=0.1)
SIZES = {"vocab_size": 512, "num_hidden_layers": 2, "intermediate_size": 128}


def tiny(hidden_size: int) -> LlamaForCausalLM:  # in place of AutoModelForCausalLM.from_pretrained
    config = LlamaConfig(hidden_size=hidden_size, initializer_range=0.2, **SIZES)
    return LlamaForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu")


torch.manual_seed(0)
teacher, student = tiny(128).eval().requires_grad_(False), tiny(64)
(teacher_backbone, teacher_head), (backbone, head) = split_head(teacher), split_head(student)
optimizer, average = torch.optim.AdamW(student.parameters(), lr=1e-2), ModelEMA(student)
input_ids = torch.randint(512, (4, 64), device=student.device)
labels = F.pad(input_ids[:, 1:], (0, 1), value=-100)  # position i predicts token i + 1
with torch.no_grad():
    target = TeacherHidden(teacher_backbone(input_ids), teacher_head)

for step in range(20):
    out = linear_distill_loss(backbone(input_ids), head, labels, target, OBJECTIVE)
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    average.update()
    ce, kd = out.ce / out.num_tokens, out.kd / out.num_tokens  # ce and kd are sums over tokens
    print(f"step {step}: loss {out.loss:.4f}, ce {ce:.4f}, kd {kd:.4f}")

with average.swapped(), torch.no_grad():  # evaluate or save the averaged weights in here
    out = linear_distill_loss(backbone(input_ids), head, labels, target, OBJECTIVE)
    print(f"average: loss {out.loss:.4f}")
