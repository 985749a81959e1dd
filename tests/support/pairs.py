"""Tokenizers that cut one text differently, and aligned rows of texts in their tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from sad.config.sections import DataConfig
from sad.data.alignment import AlignedRows, align_documents
from sad.data.split import DocumentSet, split_documents

END = "<end>"


def wrapped(tokenizer: Tokenizer, *, end: str = END, **roles: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose special tokens are the ``end`` of text and those of other ``roles``."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end, **roles
    )


def byte_level(merges: list[tuple[str, str]], *, end: str = END) -> PreTrainedTokenizerFast:
    """A byte-level BPE with these merges, of strings in ASCII or in GPT-2's alphabet."""
    tokens = [end, *sorted(ByteLevel.alphabet()), *(a + b for a, b in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    return wrapped(tokenizer, end=end)


def beginning(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, which puts a token before each text."""
    changed = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    changed.add_special_tokens(["<begin>"])
    number = changed.token_to_id("<begin>")
    changed.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="<begin> $A", special_tokens=[("<begin>", number)]
    )
    return wrapped(changed, end=str(tokenizer.eos_token), bos_token="<begin>")


def sentencepiece(pieces: list[str], *, prefix: bool) -> PreTrainedTokenizerFast:
    """A Llama-like vocabulary of bytes and ``pieces``; with a ``prefix`` a space is put before
    each text."""
    tokens = [END, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    merges = [
        (piece[:i], piece[i:])
        for piece in pieces
        for i in range(1, len(piece))
        if piece[:i] in pieces and piece[i:] in pieces
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("\u2581")] if prefix else []
    steps.append(normalizers.Replace(" ", "\u2581"))
    tokenizer.normalizer = normalizers.Sequence(steps)  # pyright: ignore
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return wrapped(tokenizer, unk_token="<unk>")


def lower_casing(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, which changes its text."""
    changed = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    changed.normalizer = normalizers.Lowercase()  # pyright: ignore
    return wrapped(changed, end=str(tokenizer.eos_token))


def word_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer whose strings do not tell their bytes."""
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, END: 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore
    tokenizer.decoder = decoders.WordPiece()  # pyright: ignore
    return wrapped(tokenizer)


def documents_of(folder: Path, texts: list[str]) -> tuple[DocumentSet, DataConfig]:
    """These texts as documents of training, and the configuration that reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_bytes(text.encode())
    (folder.parent / "held-out.txt").write_text("x")
    config = DataConfig(train=(str(folder),), eval=(str(folder.parent / "held-out.txt"),))
    return split_documents(config)[0], config


def aligned(
    folder: Path,
    texts: list[str],
    student: PreTrainedTokenizerFast,
    teacher: PreTrainedTokenizerFast,
    *,
    max_length: int = 32,
    packing: bool = True,
    document_end: str | None = None,
) -> AlignedRows:
    """Aligned rows of these texts."""
    documents, config = documents_of(folder / "texts", texts)
    config = replace(config, document_end=document_end)
    return align_documents(
        documents,
        student,
        teacher,
        max_length=max_length,
        packing=packing,
        cache_dir=folder / "cache",
        config=config,
    )
