"""Distil in TRL's `SFTTrainer`: its preparation of the data, with our loss."""

from datasets import Dataset
from sad_kernels import Objective
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from sad.integrations import DistillSFTMixin

OBJECTIVE = Objective(ce_weight=0.5, kd_weight=0.5, temperature=2.0)


class Distiller(DistillSFTMixin, SFTTrainer):
    pass


words = "one two three four five six seven eight <pad> <eos>".split()  # stand-ins for yours
core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
tiny = {"vocab_size": len(words), "num_hidden_layers": 2, "intermediate_size": 128}
student, teacher = (LlamaForCausalLM(LlamaConfig(hidden_size=d, **tiny)) for d in (64, 128))
texts = [" ".join(words[i % 8] for i in range(n, 3 * n)) for n in range(4, 20)]
parser = HfArgumentParser(SFTConfig)
parser.set_defaults(max_steps=20, learning_rate=1e-2, logging_steps=1, save_strategy="no")
parser.set_defaults(bf16=False)  # which TRL sets, and these stand-ins have no use for
(options,) = parser.parse_args_into_dataclasses()
trainer = Distiller(
    student,
    options,
    train_dataset=Dataset.from_dict({"text": texts}),
    processing_class=tokenizer,
    teacher=teacher,
    objective=OBJECTIVE,
)
trainer.train()
