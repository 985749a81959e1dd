"""Distil in `transformers.Trainer`, which takes a module whose forward returns the loss."""

import torch
import torch.nn.functional as F
from sad_kernels import Objective, TeacherHidden, linear_distill_loss
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sad.models import split_head

OBJECTIVE = Objective(ce_weight=0.3, kd_weight=0.7, temperature=2.0, label_smoothing=0.1)


class Distillation(torch.nn.Module):
    loss_type = "ForCausalLM"  # Trainer counts targets in labels[:, 1:], as forward shifts them
    accepts_loss_kwargs = True  # Trainer passes that count, over all micro-batches of a step

    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)

    def forward(self, input_ids, labels, num_items_in_batch=None):
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)  # position i predicts token i + 1
        with torch.no_grad():
            backbone, head = split_head(self.teacher.eval())  # Trainer put it in training mode
            target = TeacherHidden(backbone(input_ids), head)
        (backbone, head), n = split_head(self.student), num_items_in_batch
        out = linear_distill_loss(backbone(input_ids), head, labels, target, OBJECTIVE, num_items=n)
        return {"loss": out.loss}


tiny = {"vocab_size": 512, "num_hidden_layers": 2, "intermediate_size": 128}  # stand-ins for yours
student, teacher = (LlamaForCausalLM(LlamaConfig(hidden_size=d, **tiny)) for d in (64, 128))
ids = torch.randint(512, (16, 32))
labels = ids.where(torch.arange(32) > torch.arange(16)[:, None], -100)  # prompts are no targets
rows = [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]
parser = HfArgumentParser(TrainingArguments)
parser.set_defaults(max_steps=20, learning_rate=1e-2, logging_steps=1, save_strategy="no")
(options,) = parser.parse_args_into_dataclasses()
Trainer(Distillation(student, teacher), options, train_dataset=rows).train()
