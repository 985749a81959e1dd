"""Distil with `accelerate`: mixed precision, and gradients accumulated exactly."""

import torch
from accelerate import Accelerator
from sad_kernels import Objective, TeacherHidden, linear_distill_loss
from transformers import LlamaConfig, LlamaForCausalLM

from sad.models import split_head


class Distillation(torch.nn.Module):  # in one module, so that autocast and DDP wrap all of it
    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher.eval().requires_grad_(False)
        self.objective = Objective(ce_weight=0.3, kd_weight=0.7, temperature=2.0)

    def forward(self, ids, labels, num_items):
        (backbone, head), teacher = split_head(self.student), split_head(self.teacher)
        target = TeacherHidden(teacher[0](ids).bfloat16(), teacher[1])  # frozen, so without a graph
        x = backbone(ids).bfloat16()  # autocast leaves what comes out of Llama's last norm in fp32
        return linear_distill_loss(x, head, labels, target, self.objective, num_items=num_items)


tiny = {"vocab_size": 512, "num_hidden_layers": 2, "intermediate_size": 128}  # stand-ins for yours
student, teacher = (LlamaForCausalLM(LlamaConfig(hidden_size=d, **tiny)) for d in (64, 128))
loader = torch.utils.data.DataLoader(torch.randint(512, (8, 32)).repeat(20, 1), batch_size=8)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
accelerator = Accelerator(mixed_precision="bf16")
model, optimizer, loader = accelerator.prepare(Distillation(student, teacher), optimizer, loader)
for ids in loader:  # the rows of one optimizer step
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)  # i predicts token i + 1
    num_items = accelerator.reduce((labels != -100).sum())  # over all processes
    loss = 0.0
    for micro_batch in zip(ids.split(3), labels.split(3), strict=True):
        out = model(*micro_batch, num_items)
        accelerator.backward(out.loss * accelerator.num_processes)  # DDP averages gradients
        loss += out.loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"loss {loss:.4f}")
