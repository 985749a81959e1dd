"""The options of ``sad cache-teacher`` that are no keys of a configuration.

Nothing slow is imported: wrong words wait for no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from sad.config.command_options import positive_number, refused, take_options
from sad.errors import UsageError

Kind = Literal["sampled", "topk", "hidden"]
Codec = Literal["bf16", "int8"]
ServerKind = Literal["vllm", "sglang"]
ImportFormat = Literal["distillkit", "axolotl", "vllm", "sglang", "openai", "vllm-hidden"]

HIDDEN_FORMATS: frozenset[ImportFormat] = frozenset({"vllm-hidden"})
"""Formats of hidden states; the others hold a few ids per token."""

STATES_ENDING = ".safetensors"
"""Of files of hidden states."""

VALUES = (
    "output",
    "kind",
    "codec",
    "top_k",
    "temperatures",
    "window",
    "server",
    "server_kind",
    "server_key_env",
    "server_model",
    "import",
    "import_format",
)
SWITCHES = ("wait_for_reader", "check", "all_rows")


@dataclass(frozen=True)
class CacheOptions:
    """What ``sad cache-teacher`` is asked beside the configuration."""

    output: str = ""
    """The folder to write."""
    kind: Kind = "sampled"
    codec: Codec | None = None
    """Of hidden states. Default: int8, and bf16 with a window."""
    top_k: int = 64
    """Ids per token."""
    temperatures: tuple[float, ...] | None = None
    """Default: the configuration's; of top-k targets 1 is always there, for evaluations."""
    window: int = 0
    """Shards kept ahead of the one run that reads them meanwhile; 0: all are kept, for any run."""
    wait_for_reader: bool = False
    """Wait for that run without an end."""
    all_rows: bool = False
    """Cache rows that the configured run would not read, too, so that other seeds and longer runs
    find theirs."""
    check: bool = False
    """Compare random rows of a cache that is there with the teacher."""
    server: str | None = None
    """Address of a server that runs the teacher: it is asked for its most likely ids."""
    server_kind: ServerKind = "vllm"
    server_key_env: str | None = None
    """The environment variable that holds the server's key."""
    server_model: str | None = None
    """Which of the server's models. Default: its only one."""
    import_path: str | None = None
    """A file, or a folder of files, of targets that another program has written; of hidden states
    with ``kind`` hidden."""
    import_format: ImportFormat | None = None
    """Default: the format that the first record has, or the only one of hidden states."""

    def __post_init__(self) -> None:
        if not self.output:
            raise UsageError("output must be given, got none; write --output DIR (command line)")
        if self.server is not None and self.import_path is not None:
            remedy = "leave one of them out"
            raise refused("import", "be left out with --server", self.import_path, remedy)
        if self.import_path is not None:
            self._check_import()
        elif self.server is not None:
            self._check_most_likely("--server", "topk")
        if self.kind != "hidden" and self.codec is not None:
            raise refused("codec", "be left out but for --kind hidden", self.codec, "leave it out")
        if self.kind == "hidden" and self.temperatures is not None:
            given = ",".join(f"{t:g}" for t in self.temperatures)
            remedy = "hidden states serve any: leave it out"
            raise refused("temperatures", "be left out with --kind hidden", given, remedy)
        if self.kind == "sampled" and len(self.temperatures or (1.0,)) > 1:
            given = ",".join(f"{t:g}" for t in self.temperatures or ())
            remedy = "samples are drawn at one: choose it, or --kind topk"
            raise refused("temperatures", "be one with --kind sampled", given, remedy)
        if self.window and self.kind != "hidden":
            remedy = "write --kind hidden, or leave --window out"
            raise refused("window", f"be 0 with --kind {self.kind}", str(self.window), remedy)
        if self.wait_for_reader and not self.window:
            raise UsageError(
                "wait_for_reader must be left out without a window, got a cache that is kept; "
                "write for example --window 4 (command line)"
            )

    @property
    def from_elsewhere(self) -> bool:
        """Whether the targets come from a server or from files, not from a teacher that is loaded
        here."""
        return self.server is not None or self.import_path is not None

    def _check_import(self) -> None:
        """Refuse what somebody's files cannot give."""
        if self.import_format is not None:
            kind = "hidden" if self.import_format in HIDDEN_FORMATS else "topk"
            if self.kind != kind:
                expectation = f"be {kind} with --import_format {self.import_format}"
                raise refused("kind", expectation, self.kind, f"write --kind {kind}")
        if self.kind != "hidden":
            self._check_most_likely("--import", "topk or hidden")
            if self.check:
                remedy = "there is no teacher to ask: leave it out"
                raise UsageError(f"check must be left out with --import, got both; {remedy}")
        elif self.window:
            remedy = "the states are all there: leave it out"
            raise refused("window", "be 0 with --import", str(self.window), remedy)

    def _check_most_likely(self, source: str, kinds: str) -> None:
        """Refuse what the most likely ids at temperature 1 cannot give: draws, and the normaliser
        of any other temperature."""
        if self.kind != "topk":
            remedy = "only the most likely ids are known: leave it out"
            raise refused("kind", f"be {kinds} with {source}", self.kind, remedy)
        if self.temperatures not in (None, (1.0,)):
            given = ",".join(f"{t:g}" for t in self.temperatures or ())
            remedy = "the normaliser of another temperature is not known: leave it out"
            raise refused("temperatures", f"be 1 with {source}", given, remedy)

    @property
    def codec_or_default(self) -> Codec | None:
        if self.kind != "hidden":
            return None
        return self.codec or ("bf16" if self.window else "int8")


def read_cache_options(words: Sequence[str]) -> tuple[CacheOptions, list[str]]:
    """Take the options out of the words of a command line; the others are overrides of keys.

    Raises ``UsageError`` for a value that an option cannot have.
    """
    values, switched, others = take_options(words, VALUES, SWITCHES)
    _require_with(values, "server", ("server_kind", "server_key_env", "server_model"))
    _require_with(values, "import", ("import_format",))
    options = CacheOptions(
        output=values.get("output", ""),
        kind=_one_of("kind", values.get("kind", _default_kind(values)), get_args(Kind)),
        codec=_one_of("codec", values["codec"], get_args(Codec)) if "codec" in values else None,
        top_k=_count("top_k", values.get("top_k", "64"), 1),
        temperatures=_temperatures(values["temperatures"]) if "temperatures" in values else None,
        window=_count("window", values.get("window", "0"), 0),
        wait_for_reader="wait_for_reader" in switched,
        all_rows="all_rows" in switched,
        check="check" in switched,
        server=_address(values["server"]) if "server" in values else None,
        server_kind=_one_of("server_kind", values.get("server_kind", "vllm"), get_args(ServerKind)),
        server_key_env=_named("server_key_env", values, "TEACHER_KEY"),
        server_model=_named("server_model", values, "NAME"),
        import_path=_named("import", values, "FILE"),
        import_format=_one_of("import_format", values["import_format"], get_args(ImportFormat))
        if "import_format" in values
        else None,
    )
    return options, others


def _default_kind(values: Mapping[str, str]) -> Kind:
    """What the source of the targets can give: a teacher that runs all, a server and most files the
    most likely ids."""
    if "import_format" in values:
        return "hidden" if values["import_format"] in HIDDEN_FORMATS else "topk"
    if values.get("import", "").strip() and _holds_states(values["import"]):
        return "hidden"
    return "topk" if "server" in values or "import" in values else "sampled"


def _holds_states(path: str) -> bool:
    """Whether it is a file of hidden states, by its name, or a folder that holds such files."""
    found = Path(path).expanduser()
    return found.name.endswith(STATES_ENDING) or any(found.rglob("*" + STATES_ENDING))


def _require_with(values: Mapping[str, str], name: str, others: tuple[str, ...]) -> None:
    """Refuse options that say how, where there is no --NAME."""
    for other in others:
        if other in values and name not in values:
            remedy = f"write --{name} as well, or leave it out"
            raise refused(other, f"be left out without --{name}", values[other], remedy)


def _named(name: str, values: Mapping[str, str], example: str) -> str | None:
    if name in values and not values[name].strip():
        raise refused(name, "be given", values[name], f"write for example --{name} {example}")
    return values.get(name)


def _address(text: str) -> str:
    """The address of a server, without a slash at its end, nor the ``/v1`` of its interface."""
    remedy = "write for example --server http://localhost:8000"
    if "@" in text:  # what follows would be printed
        raise UsageError(
            "server must be an address without a user's name or password, got one with '@'; "
            "name the variable that holds the key with --server_key_env (command line)"
        )
    try:
        parts = urlsplit(text)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
        known = known and not (parts.query or parts.fragment)
    except ValueError:  # a port that is none
        known = False
    if not known or not text.isprintable() or " " in text:
        raise refused("server", "be the http or https address of a server", text, remedy)
    return text.rstrip("/").removesuffix("/v1")


def _one_of(name: str, text: str, choices: tuple[str, ...]) -> Any:
    if text not in choices:
        raise refused(name, f"be one of {', '.join(choices)}", text, f"write --{name} {choices[0]}")
    return text


def _count(name: str, text: str, low: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 7 and int(text) >= low):
        what = "a positive integer" if low else "an integer of at least 0"
        raise refused(name, f"be {what}", text, f"write for example --{name} 64")
    return int(text)


def _temperatures(text: str) -> tuple[float, ...]:
    found = []
    for part in text.split(","):
        value = positive_number(part)
        if value is None:
            remedy = "write for example --temperatures 1,2"
            raise refused("temperatures", "be numbers above 0", text, remedy)
        found.append(value)
    return tuple(sorted(set(found)))
