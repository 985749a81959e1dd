"""Mutated configurations: each must give a configuration or be refused in one line.

``run(count, seed)`` damages the recipes and the texts of ``BASES`` in ``count`` ways, by bytes, by
tokens, by values of odd kinds and by structure, and reads each result as ``sad distill FILE``
does. A result is *survived* if it loads or is refused with exit code 2, in one line of at most
``MAX_MESSAGE`` characters and within ``LIMIT`` seconds of processor time. Any other is *lost*.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import sad.cli
from sad.config.load import MAX_MESSAGE
from sad.recipes import recipe_names, recipe_path

LIMIT = 1.0
PREFIX = "sad: error: "
MAX_EXAMPLES = 20


class Tally(NamedTuple):
    """How many were inflicted, how many survived and were lost, and the first of the lost."""

    inflicted: int
    survived: int
    lost: int
    examples: list[str]


def run(count: int, seed: int) -> Tally:
    """Inflict ``count`` mutations, the same ones for the same seed."""
    lost = []
    with tempfile.TemporaryDirectory() as name:
        for number in range(count):
            suffix, content = mutated(number, seed)
            path = Path(name, f"run{suffix}")
            path.write_bytes(content)
            problem = verdict(path)
            if problem:
                lost.append(f"mutation {number} of seed {seed} ({suffix}): {problem}")
    return Tally(count, count - len(lost), len(lost), lost[:MAX_EXAMPLES])


def verdict(path: Path, *words: str) -> str:
    """What is wrong with how a configuration is taken; nothing if it is taken or refused well."""
    err = io.StringIO()
    begin = time.process_time()
    with (
        mock.patch("sad.cli._distill", sad.cli._load),  # the entry of the command, without a run
        contextlib.redirect_stderr(err),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            code = sad.cli.main(["distill", str(path), *words])
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
    seconds = time.process_time() - begin
    lines = err.getvalue().splitlines()
    if seconds > LIMIT:
        return f"took {seconds:.1f} s"
    if not isinstance(code, int):  # the configuration itself
        return ""
    if code != 2:
        return f"exit code {code}: {lines[-1:]}"
    if len(lines) != 1 or not lines[0].startswith(PREFIX) or not lines[0].isprintable():
        return f"not one printable line: {lines[:3]}"
    if len(lines[0]) > len(PREFIX) + MAX_MESSAGE:
        return f"{len(lines[0])} characters: {lines[0][:200]}"
    return ""


def mutated(number: int, seed: int) -> tuple[str, bytes]:
    """A mutation: the suffix of its file, and its content."""
    draw = random.Random(f"{seed}:{number}")
    bases = _bases()
    suffix, text = bases[number % len(bases)]
    content = text.encode()
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        content = draw.choice(MUTATIONS)(draw, content)
    return suffix, content


# What is mutated

BASES = (
    "student: s\nteacher: t\n",
    "student: s\nkd_weight: 0\nmax_steps: 1e3\nlearning_rate: 1e-4\n",
    "student: s\nteacher: t\ndata:\n  train: [a.txt, b/]\n  eval: c.jsonl\n  text_field: body\n",
    "student: s\nteacher: t\ndata:\n  train:\n  - {path: a, weight: 2}\n  - b\n",
    "teacher: t\nstudent_init: layers\nstudent_layers: [0, 3, -1]\n",
    "student: s\nteacher: t\nattention: {weight: 0.1, layers: [[0, 0], [-1, -1]]}\n",
    "student: s\nteacher: t\ncurriculum:\n  kd: [[0, 0], [0.5, 1e-1]]\ntaid: {enabled: true}\n",
    "student: s\nteacher: t\npeft:\n  r: 8\n  target_modules: all-linear\n",
    "student: 's'\nteacher: \"t\"\noutput_dir: |\n  runs\ndevice: cuda:0\nbf16: true\n",
    "# a comment\nstudent: s  # one more\nteacher: t\nreport_to: [wandb, none]\nseed: 0x10\n",
    "student: s\nteacher: t\neval_steps: null\nmetric_for_best_model: eval/nll\nwarmup_steps: 5\n",
    "student: s\nteacher: t\nrouting: {mode: student_aware}\nresume_from_checkpoint: auto\n",
)


def _bases() -> list[tuple[str, str]]:
    yaml_texts = [recipe_path(name).read_text() for name in recipe_names()]
    yaml_texts += BASES
    json_texts = [
        json.dumps({"student": "s", "teacher": "t", "data": {"train": ["a", "b"]}, "seed": 3}),
        json.dumps({"student": "s", "teacher": "t", "attention": {"layers": [[0, 0]]}}, indent=1),
        '{"student": "s", "kd_weight": 0, "learning_rate": 1e-4, "bf16": true, "tokenizer": null}',
    ]
    return [(".yaml", text) for text in yaml_texts] + [(".json", text) for text in json_texts]


# How

Mutation = Callable[[random.Random, bytes], bytes]


def _words(text: str) -> list[str]:
    return [word for line in text.strip().splitlines() for word in line.split(" | ")]


ODD_VALUES = (
    *_words(r"""
!!int x | !!int '' | !!float x | !!bool x | !!null x | !!timestamp x | !!binary x | !!binary é
!!set {a} | !!omap [a: 1] | !!pairs [a: 1] | !!python/name:os.system | !x y | !!str [a]
!!python/object/apply:os.getcwd [] | 2024-01-01 | 2024-99-99 | 2024-02-30 25:61:61 | 1:60
0x_ | 0b_ | 0o | 0x | 1_ | _ | + | - | . | .. | .inf | -.inf | .nan | null | ~ | true | no | =
<< | [] | {} | '' | "" | ' | " | [ | { | ] | } | *a | &a b | ? x | : y | - z | % | @ | ` | ,
> | ! | !! | # | &a [*a] | &a {b: *a} | [&a x, *a, *a] | *unknown | --- x | %YAML 9.9
~/x | ~nobody/x | "\0" | "a\nb" | "\ud800" | "\udcff" | "\e[31m" | "\U0010ffff" | "\U00110000"
"\u202e" | meta | meta:0 | cuda:99999999999999999999 | cuda: | cpu:-1 | ünï | 1e308 | 1e309
-1e309 | 1e-400 | 1e38 | [[0, 0], [1, [2]]] | [1, a, null, {b: c}] | [[1e400, 0]] | {path: x}
[{path: {path: [x]}}] | [{weight: x}] | [{path: x, weight: []}] | '[[1, 2]' | '[[[' | "[[1e999]]"
"""),
    *(str(n) for n in (2**31, 2**63 - 1, 2**63, 2**64)),
    *("9" * 4299, "9" * 4301, "-" + "9" * 100_000, "0x" + "f" * 5000, "1:" * 5000 + "1"),
    *("1" + "0" * 400, "0." + "1" * 5000, "\x85", "\u2028", "|\n  a\n  b", ">-\n  a", "||"),
    *("[" * 50, "[" * 5000, "[" * 50 + "]" * 50, "'" + "[" * 5000 + "'"),
    *("{a: " * 500 + "}" * 500, "- " * 900 + "x", "? " * 900),
    *("n" * 5000, "é" * 2500, "/" + "n" * 300, "a/" * 2100, "~" * 300),
)

TOKENS = (
    *_words(r"""
:  | -  | ?  | ,  | [ | ] | { | } | # | &a  | *a  | !!int  | !!str  | !x  | ' | " | > | <<:  | = 
\ | \u0000 | 0x | _ | . | e | ~ | é | null
"""),
    *("|", "\n", "\n  ", "\t", "\r", "---\n", "...\n", "\x00", "\ufeff", "\u2028"),
    *("%YAML 1.1\n", "%YAML " + "9" * 5000 + ".1\n", "!<" + "t" * 500 + "> "),
    "%TAG ! tag:" + "x" * 400 + "\n",
)

BYTES = (b"\x00", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b"\x1b", b"\x7f", b"\xef\xbf\xbe", b"\x80")


def _flip(draw: random.Random, content: bytes) -> bytes:
    at = draw.randrange(len(content) or 1)
    return content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]


def _insert_bytes(draw: random.Random, content: bytes) -> bytes:
    at = draw.randrange(len(content) + 1)
    return content[:at] + draw.choice(BYTES) * draw.choice((1, 1, 100)) + content[at:]


def _cut(draw: random.Random, content: bytes) -> bytes:
    a, b = sorted(draw.randrange(len(content) + 1) for _ in range(2))
    return content[:a] + content[b:] if draw.random() < 0.5 else content[:b]


def _insert_token(draw: random.Random, content: bytes) -> bytes:
    at = draw.randrange(len(content) + 1)
    return content[:at] + draw.choice(TOKENS).encode() * draw.choice((1, 1, 2, 50)) + content[at:]


def _odd_value(draw: random.Random, content: bytes) -> bytes:
    """The value of a line replaced, or of a new line for a key that the file has not."""
    value = draw.choice(ODD_VALUES).encode()
    lines = content.split(b"\n")
    if draw.random() < 0.5:
        lines.append(draw.choice(KEYS).encode() + b": " + value)
        return b"\n".join(line for line in lines if line)
    number = draw.randrange(len(lines))
    key, colon, rest = lines[number].partition(b":")
    lines[number] = key + colon + b" " + value + (b"," if rest.endswith(b",") else b"")
    return b"\n".join(lines)


def _odd_key(draw: random.Random, content: bytes) -> bytes:
    lines = content.split(b"\n")
    number = draw.randrange(len(lines))
    indent = lines[number][: len(lines[number]) - len(lines[number].lstrip())]
    lines[number] = indent + draw.choice(ODD_VALUES).encode() + b": 1"
    return b"\n".join(lines)


def _move_lines(draw: random.Random, content: bytes) -> bytes:
    """Lines repeated, exchanged or indented."""
    lines = content.split(b"\n")
    a, b = (draw.randrange(len(lines)) for _ in range(2))
    match draw.randrange(4):
        case 0:
            lines[a] = lines[b]
        case 1:
            lines[a], lines[b] = lines[b], lines[a]
        case 2:
            lines[a] = b" " * draw.choice((1, 2, 7)) + lines[a]
        case _:
            lines[a:a] = lines[b : b + 1] * draw.choice((1, 3, 500))
    return b"\n".join(lines)


def _wrap(draw: random.Random, content: bytes) -> bytes:
    """Everything one or many levels deeper."""
    levels = draw.choice((1, 3, 30, 900))
    if content.lstrip().startswith(b"{"):
        opening, closing = draw.choice(((b'{"data": ', b"}"), (b"[", b"]"), (b'{"x": [', b"]}")))
        return opening * levels + content + closing * levels
    levels = min(levels, 90)
    head = b"".join(b" " * n + b"data:\n" for n in range(levels))
    return head + b"\n".join(b" " * levels + line for line in content.split(b"\n"))


def _repeat(draw: random.Random, content: bytes) -> bytes:
    return content * draw.choice((2, 2, 20, 200)) if len(content) < 5000 else content * 2


KEYS = (
    *"student teacher tokenizer student_layers device teacher_device attn_implementation".split(),
    *"max_length ce_weight kd_weight temperature beta chunk_bytes num_train_epochs".split(),
    *"max_steps per_device_train_batch_size eval_teacher_cache learning_rate weight_decay".split(),
    *"adam_beta1 adam_beta2 adam_epsilon max_grad_norm warmup_steps warmup_ratio bf16".split(),
    *"output_dir seed resume_from_checkpoint save_steps save_total_limit report_to".split(),
    *"metric_for_best_model hub_model_id debug data peft data.train data.eval".split(),
    *"data.text_field data.document_separator data.train_weights data.cache_dir".split(),
    *"data.chat_template data.num_proc attention.layers curriculum.kd peft.r".split(),
    *"peft.layers_to_transform peft.target_modules routing.learning_rate taid.start".split(),
    *"feature.weight contrastive.queue_size unknown.key lr x".split(),
)

MUTATIONS: tuple[Mutation, ...] = (
    _flip,
    _insert_bytes,
    _cut,
    _insert_token,
    _insert_token,
    _odd_value,
    _odd_value,
    _odd_value,
    _odd_key,
    _move_lines,
    _wrap,
    _repeat,
)
