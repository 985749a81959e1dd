"""Distil with `accelerate`: mixed precision, and gradients accumulated exactly."""

import torch
from accelerate import Accelerator
from sad_kernels import Objective
from transformers import LlamaConfig, LlamaForCausalLM

from sad.integrations import DistillModel

OBJECTIVE = Objective(ce_weight=0.3, kd_weight=0.7, temperature=2.0)

tiny = {"vocab_size": 512, "num_hidden_layers": 2, "intermediate_size": 128}  # stand-ins for yours
student, teacher = (LlamaForCausalLM(LlamaConfig(hidden_size=d, **tiny)) for d in (64, 128))
loader = torch.utils.data.DataLoader(torch.randint(512, (8, 32)).repeat(20, 1), batch_size=8)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=3)
model = DistillModel(student, teacher, OBJECTIVE)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
# The loss is a share of the mean over all targets of a step; accelerate averages such shares.
factor = accelerator.gradient_accumulation_steps * accelerator.num_processes
for ids in loader:  # the rows of one optimizer step
    targets = accelerator.reduce((ids[:, 1:] != -100).sum())  # over all processes
    total = 0.0
    for rows in ids.split(3):
        with accelerator.accumulate(model):
            loss = model(rows, labels=rows, num_items_in_batch=targets)["loss"]
            accelerator.backward(loss * factor)
            optimizer.step()
            optimizer.zero_grad()
        total += loss.detach()
    accelerator.print(f"loss {total:.4f}")
