"""The client of a server that runs a teacher: vLLM or SGLang, over HTTP.

One request asks for the distribution after every token of a text, given as ids: nothing is
tokenized by the server, and no BOS comes before it. What may pass (a lost connection, a body that
was cut, a server that is busy or starts again) is asked anew, after a wait that doubles each time;
what will not pass ends with the server's own words.

    vLLM    POST /v1/completions  {"prompt": ids, "max_tokens": 1, "prompt_logprobs": K, ...}
    SGLang  POST /generate        {"input_ids": ids, "logprob_start_len": 0,
                                   "top_logprobs_num": K, ...}
    both    GET  /v1/models

The key is sent as a bearer token, and to no other address: redirections are not followed.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from sad.config.cache_options import ServerKind
from sad.environment import stop_if_requested
from sad.errors import SadError, StoppedError, UnfitError, UsageError, one_line, printable, quoted
from sad.teachers.cache.answers import (
    Answer,
    own_of_sglang,
    own_of_vllm,
    read_sglang,
    read_vllm,
)

T = TypeVar("T")

REQUEST_SECONDS = 120.0
"""Seconds to wait for an answer before the question is asked again."""
FIRST_WAIT = 0.5
LONGEST_WAIT = 30.0
_POLL_SECONDS = 0.1
_START_TRIES = 3
"""Of the first question: a wrong address must not be tried for minutes."""

_PASSING = frozenset({408, 429})
"""Statuses below 500 that may be another one the next time."""

MODELS = "/v1/models"


class _Passing(Exception):
    """A failure that may not happen again."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class TeacherServer:
    """A served model at the address ``url``; ``key`` is neither printed nor kept anywhere.

    A failure that may pass is met again for ``patience`` seconds, then ``StoppedError`` is raised;
    an answer is waited for ``timeout`` seconds. All threads may ask at once.
    """

    def __init__(
        self,
        url: str,
        kind: ServerKind,
        *,
        key: str = "",
        model: str | None = None,
        patience: float = 600.0,
        timeout: float = REQUEST_SECONDS,
        first_wait: float = FIRST_WAIT,
    ) -> None:
        self.url = url
        self.kind: ServerKind = kind
        self.model = model
        self.patience = patience
        self.timeout = timeout
        self.first_wait = first_wait
        self._key = key
        self._opener = urllib.request.build_opener(_NoRedirection())
        self._over = threading.Event()
        self.failure: SadError | None = None
        """What one thread has met that will not pass; the others ask no more."""

    def card(self) -> dict[str, Any]:
        """What the server says of its model: ``id``, and what of ``root``, ``parent`` and
        ``max_model_len`` it has. From then on that model is asked.

        Raises ``UsageError`` for an address where no such server answers, and for a server without
        the model, or with several of them and none named.
        """
        try:
            content = self._asked(MODELS, None, tries=_START_TRIES)
        except _Passing as error:
            raise UsageError(
                f"server must be the address of a server that runs, got '{error}' from {self.url}; "
                "start it, or correct --server"
            ) from None
        cards = content.get("data")
        if not isinstance(cards, list) or not all(
            isinstance(card, dict) and isinstance(card.get("id"), str) for card in cards
        ):
            raise UnfitError(
                f"server must list its models at {MODELS}, got {quoted(content)}; correct --server"
            )
        names = [card["id"] for card in cards]
        if self.model is None and len(names) == 1:
            self.model = names[0]
        if self.model not in names:
            got = "none named" if self.model is None else repr(self.model)
            raise UsageError(
                f"server_model must be one of {', '.join(map(printable, names)) or 'no models'}, "
                f"got {got}; write --server_model NAME"
            )
        card = cards[names.index(self.model)]
        return {name: card[name] for name in _OF_A_MODEL if card.get(name) is not None}

    def answer(self, tokens: Sequence[int], k: int, vocab: int) -> Answer:
        """The ``k`` most likely ids after each of ``tokens`` but the last, from a vocabulary of
        ``vocab`` ids.

        Raises ``UnfitError`` for an answer that cannot be one, ``UsageError`` where the server
        refuses the question, and ``StoppedError`` when it was asked in vain.
        """
        where = f"the answer of {self.url}"

        def read(found: Any) -> Answer:
            reader = read_vllm if self.kind == "vllm" else read_sglang
            return reader(found, tokens, k, vocab, where)

        return self._answered(tokens, k, where, read)

    def likelihood(self, tokens: Sequence[int]) -> Tensor:
        """The log-probability of each of ``tokens`` but the first, float64 [n - 1].

        Raises as ``answer``.
        """
        where = f"the answer of {self.url}"
        reader = own_of_vllm if self.kind == "vllm" else own_of_sglang
        return self._answered(tokens, 1, where, lambda found: reader(found, tokens, where))

    def _answered(self, tokens: Sequence[int], k: int, where: str, read: Callable[[Any], T]) -> T:
        """What ``read`` makes of the answer to a question for ``k`` ids per token."""
        try:
            if self.kind == "vllm":
                content = self._asked("/v1/completions", self._to_vllm(tokens, k))
                return read(_only(content.get("choices"), where).get("prompt_logprobs"))
            content = self._asked("/generate", _to_sglang(tokens, k))
            return read(content.get("meta_info"))
        except SadError as error:
            raise self._failed(error) from error.__cause__
        except _Passing as error:
            raise self._failed(
                StoppedError(
                    f"the server must answer, got '{error}' from {self.url} for "
                    f"{self.patience:.0f} s (teacher_wait); {self._advice(k)}, then the same "
                    "command goes on"
                )
            ) from None

    def _failed(self, error: SadError) -> SadError:
        """The first error of all threads."""
        self.failure = self.failure or error
        self._over.set()
        return self.failure

    def _advice(self, k: int) -> str:
        if self.kind == "sglang":
            return "start SGLang again"
        return (
            "start vLLM again, if it has run out of memory with --max-num-batched-tokens 2048, "
            f"and always with --no-enable-prefix-caching and --max-logprobs {k}"
        )

    def _to_vllm(self, tokens: Sequence[int], k: int) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": list(tokens),
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": k,
        }

    def _asked(
        self, path: str, question: Mapping[str, Any] | None, tries: int | None = None
    ) -> dict[str, Any]:
        """The object that is answered; ``_Passing`` when patience, or ``tries``, are used up."""
        begun, wait, tried = time.monotonic(), self.first_wait, 0
        while True:
            try:
                return self._asked_once(path, question)
            except _Passing as error:
                tried += 1
                pause = max(min(wait, LONGEST_WAIT), error.wait)
                wait *= 2
                late = time.monotonic() + pause - begun > self.patience
                if late if tries is None else tried >= tries:
                    raise
                self._pause(pause)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            stop_if_requested("the teacher's cache")
            if self._over.wait(min(left, _POLL_SECONDS)):
                raise StoppedError("the server must answer, got an end of all questions")

    def _asked_once(self, path: str, question: Mapping[str, Any] | None) -> dict[str, Any]:
        body = None if question is None else json.dumps(question).encode()
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url + path, body, headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as reply:
                content = json.loads(reply.read())
        except urllib.error.HTTPError as error:
            said = self._first_line(error)
            if error.code >= 500 or error.code in _PASSING:
                raise _Passing(f"{error.code} {said}", _seconds(error.headers)) from None
            raise self._refused(error.code, said, question) from None
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            # Refused or lost connections, time that is up, bodies cut short, JSON that is none.
            reason = getattr(error, "reason", None)
            shown = reason if isinstance(reason, BaseException) else error
            raise _Passing(f"{type(shown).__name__}: {one_line(shown)}") from None
        if isinstance(content, list) and len(content) == 1:
            content = content[0]
        if not isinstance(content, dict):
            raise _Passing(f"no JSON object but {quoted(content, 40)}")
        return content

    def _refused(self, code: int, said: str, question: Mapping[str, Any] | None) -> UsageError:
        remedy = "check --server, --server_kind and --server_key_env"
        if question is not None and self.kind == "vllm":
            remedy += f"; vLLM must run with --max-logprobs {question['prompt_logprobs']}"
        return UsageError(f"server must take the question, got {code} '{said}'; {remedy}")

    def _first_line(self, error: urllib.error.HTTPError) -> str:
        """The first line of what the server says of an error."""
        try:
            text = error.read(1 << 16).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            text = ""
        text = next((line for line in text.splitlines() if line.strip()), "")
        if self._key:
            text = text.replace(self._key, "...")
        return printable(text.strip())[:200] or error.reason


_OF_A_MODEL = ("id", "root", "parent", "max_model_len")
"""Fields of a model's card that are the same after a restart."""


def card_hash(card: Mapping[str, Any]) -> str:
    """A hash of what a server says of its model."""
    text = json.dumps(dict(card), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _to_sglang(tokens: Sequence[int], k: int) -> dict[str, Any]:
    return {
        "input_ids": list(tokens),
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": k,
    }


def _only(choices: Any, where: str) -> dict[str, Any]:
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise UnfitError(
            f"{where} must have one choice, got {quoted(choices)}; check --server_kind"
        )
    return choices[0]


def _seconds(headers: Any) -> float:
    """What the server asks to wait, at most a minute."""
    try:
        return min(max(float(headers.get("Retry-After", 0)), 0.0), 60.0)
    except (TypeError, ValueError):
        return 0.0
