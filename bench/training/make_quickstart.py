"""Rebuild the files in ``sad/recipes/quickstart/``: the tokenizer, and the teacher in bfloat16.

    python -m bench.training.make_quickstart tokenizer
    sad distill quickstart-teacher --output_dir RUN_DIR
    python -m bench.training.make_quickstart teacher RUN_DIR

``scripts/make_quickstart_teacher.sh`` runs the three. A run on another machine or with another
version of Python gives another teacher, whose training text is that Python's standard library.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from sad.config.load import load_config
from sad.data.split import split_documents
from sad.data.tokenizers import train_tokenizer
from sad.recipes import FOLDER

VOCAB_SIZE = 4096
TEACHER = FOLDER / "quickstart" / "teacher"


def make_tokenizer() -> None:
    """Train the tokenizer on the recipe's training documents, held-out ones excluded."""
    train, _ = split_documents(load_config("quickstart-teacher").data)
    tokenizer = train_tokenizer((document.text for document in train), VOCAB_SIZE)
    tokenizer.save_pretrained(TEACHER)
    print(f"{len(tokenizer)} entries from {len(train)} documents -> {TEACHER}")


def publish_teacher(run_dir: Path) -> None:
    """Round the finished teacher to bfloat16 and put it beside its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(run_dir / "final", dtype=torch.bfloat16)
    model.save_pretrained(TEACHER)
    shutil.copy(run_dir / "final" / "sad.json", TEACHER / "sad.json")
    size = (TEACHER / "model.safetensors").stat().st_size
    print(f"{model.num_parameters():,} parameters, {size / 1e6:.1f} MB -> {TEACHER}")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["tokenizer"]:
            make_tokenizer()
        case ["teacher", run_dir]:
            publish_teacher(Path(run_dir))
        case _:
            sys.exit(__doc__)
