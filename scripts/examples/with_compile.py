"""Distil under `torch.compile`: one graph, in which the loss is one operator."""

import torch
import torch.nn.functional as F
from sad_kernels import Objective, TeacherHidden, linear_distill_loss
from transformers import LlamaConfig, LlamaForCausalLM

from sad.models import split_head

OBJECTIVE = Objective(ce_weight=0.3, kd_weight=0.7, temperature=2.0)
SIZES = {"vocab_size": 512, "num_hidden_layers": 2, "intermediate_size": 128}

torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
student, teacher = (LlamaForCausalLM(LlamaConfig(hidden_size=d, **SIZES)) for d in (64, 128))
teacher.requires_grad_(False).eval()
(teacher_backbone, teacher_head), (backbone, head) = split_head(teacher), split_head(student)


@torch.compile(fullgraph=True)
def loss_of(input_ids, labels):
    with torch.no_grad():
        target = TeacherHidden(teacher_backbone(input_ids), teacher_head)
    return linear_distill_loss(backbone(input_ids), head, labels, target, OBJECTIVE)


optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
input_ids = torch.randint(512, (4, 64))
labels = F.pad(input_ids[:, 1:], (0, 1), value=-100)  # position i predicts token i + 1
for step in range(20):
    out = loss_of(input_ids, labels)
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {out.loss:.4f}")
