"""Distil into LoRA adapters with `peft`: the student's own weights and its head stay frozen."""

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from sad_kernels import Objective, TeacherHidden, linear_distill_loss
from transformers import LlamaConfig, LlamaForCausalLM

from sad.models import split_head

OBJECTIVE = Objective(ce_weight=0.3, kd_weight=0.7, temperature=2.0)
SIZES = {"vocab_size": 512, "num_hidden_layers": 2, "intermediate_size": 128}


def tiny(hidden_size: int) -> LlamaForCausalLM:  # in place of AutoModelForCausalLM.from_pretrained
    config = LlamaConfig(hidden_size=hidden_size, **SIZES)
    return LlamaForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu")


teacher, base = tiny(128).eval().requires_grad_(False), tiny(64)
# Leave "lm_head" out of target_modules: the loss multiplies by the head's own weight. Frozen,
# that weight costs no gradient product.
student = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
student.print_trainable_parameters()
(teacher_backbone, teacher_head), (backbone, head) = split_head(teacher), split_head(student)
adapters = [parameter for parameter in student.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(adapters, lr=1e-2)
input_ids = torch.randint(512, (4, 64), device=base.device)
labels = F.pad(input_ids[:, 1:], (0, 1), value=-100)  # position i predicts token i + 1
with torch.no_grad():
    target = TeacherHidden(teacher_backbone(input_ids), teacher_head)

for step in range(20):
    out = linear_distill_loss(backbone(input_ids), head, labels, target, OBJECTIVE)
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {out.loss:.4f}")
