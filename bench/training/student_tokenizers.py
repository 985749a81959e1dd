"""Three students whose tokenizers are not their teacher's, made from the text of the quickstart.

===========  =======================================================================================
unigram      3,000 pieces of a unigram model, with other pre-tokens than the teacher's
bytes        256 bytes: the student's tokens are parts of the teacher's
bpe          1,024 pieces of a byte-level BPE that splits off spaces, which the teacher joins to
             the word that follows
===========  =======================================================================================

Each is the quickstart's student but for the size of its embeddings. The unigram model's scores
differ from one training to the next in their second digit; its pieces do not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sad.config.schema import DataConfig
from sad.data.split import split_documents
from sad.recipes import FOLDER

END = "<|end|>"
DOCUMENTS = 120
"""Of the training text, which a tokenizer is made from."""
CHARACTERS = 40_000
"""Of each of them, at most."""


def make_student(name: str, folder: Path, documents: int = DOCUMENTS) -> Path:
    """Write configuration and tokenizer of one of ``TOKENIZERS`` to a folder of its name."""
    path = folder / name
    if (path / "config.json").exists():
        return path
    tokenizer = TOKENIZERS[name](_texts(documents))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    wrapped.save_pretrained(path)
    config = json.loads((FOLDER / "quickstart" / "student" / "config.json").read_text())
    config["vocab_size"] = tokenizer.get_vocab_size()
    config["eos_token_id"] = tokenizer.token_to_id(END)
    config["max_position_embeddings"] = 1024  # bytes take more of them
    (path / "config.json").write_text(json.dumps(config))
    return path


def _texts(documents: int) -> Iterator[str]:
    train, _ = split_documents(DataConfig(train=("python-stdlib",), eval_fraction=0.05))
    for document in islice(train, 0, None, 5):
        yield document.text[:CHARACTERS]
        documents -= 1
        if not documents:
            return


def _unigram(texts: Iterator[str]) -> Tokenizer:
    tokenizer = _of_bytes(models.Unigram(), r" ?\w+| ?[^\s\w]+|\s+(?!\S)|\s+")
    trainer = trainers.UnigramTrainer(
        vocab_size=3000,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        unk_token=None,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _bpe(texts: Iterator[str], size: int = 1024) -> Tokenizer:
    tokenizer = _of_bytes(models.BPE(), r"\w+|[^\s\w]+|\s+")
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _single_bytes(texts: Iterator[str]) -> Tokenizer:
    return _bpe(texts, 257)  # no merges


def _of_bytes(model: models.Model, words: str) -> Tokenizer:
    """A byte-level tokenizer whose tokens lie within what the pattern ``words`` finds."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZERS: dict[str, Callable[[Iterator[str]], Tokenizer]] = {
    "unigram": _unigram,
    "bytes": _single_bytes,
    "bpe": _bpe,
}
