"""Distil in `transformers.Trainer`: its gradient accumulation and its folders, with our loss."""

import torch
from sad_kernels import Objective
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sad.integrations import DistillMixin, DistillModel

OBJECTIVE = Objective(ce_weight=0.3, kd_weight=0.7, temperature=2.0, label_smoothing=0.1)


class Distiller(DistillMixin, Trainer):  # the mix-in saves, resumes and loads the student alone
    pass


tiny = {"vocab_size": 512, "num_hidden_layers": 2, "intermediate_size": 128}  # stand-ins for yours
student, teacher = (LlamaForCausalLM(LlamaConfig(hidden_size=d, **tiny)) for d in (64, 128))
ids = torch.randint(512, (16, 32))
labels = ids.where(torch.arange(32) > torch.arange(16)[:, None], -100)  # prompts are no targets
rows = [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]
parser = HfArgumentParser(TrainingArguments)
parser.set_defaults(max_steps=20, learning_rate=1e-2, logging_steps=1, save_strategy="no")
(options,) = parser.parse_args_into_dataclasses()
trainer = Distiller(DistillModel(student, teacher, OBJECTIVE), options, train_dataset=rows)
trainer.train()
trainer.save_model("student")  # for AutoModelForCausalLM.from_pretrained
