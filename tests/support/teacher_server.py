"""A teacher's server for tests: a tiny model behind the interfaces of vLLM and SGLang, with faults.

``Faults`` are met by the next questions, one each, in their order.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import torch

Fault = Literal[
    "503",
    "429",
    "drop",
    "cut",
    "slow",
    "not_json",
    "400",
    "wrong_k",
    "nan",
    "no_null",
    "other_text",
]

SLOW_SECONDS = 1.0


class TeacherStub(ThreadingHTTPServer):
    """Serves ``model`` until it is shut down; ``weights`` may be replaced meanwhile."""

    daemon_threads = True

    def __init__(self, model: Any, faults: Sequence[Fault] = (), key: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = model
        self.faults = list(faults)
        self.key = key
        self.max_model_len = 512
        self.names = ["teacher"]
        self.lock = threading.Lock()
        self.questions: list[dict[str, Any]] = []
        self.stop_after: int | None = None
        """So many questions are answered; then 503, for ever."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def log_probs(self, tokens: list[int]) -> torch.Tensor:
        """The model's own: float32 [n, V], at temperature 1."""
        with self.lock, torch.no_grad():
            logits = self.model(torch.tensor([tokens]), use_cache=False).logits[0]
            return logits.float().log_softmax(1)


@contextmanager
def serving(model: Any, faults: Sequence[Fault] = (), key: str = "") -> Iterator[TeacherStub]:
    with TeacherStub(model, faults, key) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def vllm_entries(log_probs: torch.Tensor, tokens: list[int], k: int) -> list[Any]:
    """``prompt_logprobs`` of a text."""
    values, ids = log_probs.topk(k, 1)
    entries: list[Any] = [None]
    for place in range(len(tokens) - 1):
        own = tokens[place + 1]
        rank = int((log_probs[place] > log_probs[place, own]).sum()) + 1
        entry = {str(own): _one(log_probs[place, own].item(), rank)}
        for i, (value, one) in enumerate(zip(values[place], ids[place], strict=True)):
            entry[str(int(one))] = _one(value.item(), i + 1)
        entries.append(entry)
    return entries


def sglang_meta(log_probs: torch.Tensor, tokens: list[int], k: int) -> dict[str, Any]:
    """``meta_info`` of a text."""
    values, ids = log_probs.topk(k, 1)
    own = [[None, tokens[0], None]]
    own += [[log_probs[i, t].item(), t, None] for i, t in enumerate(tokens[1:])]
    top: list[Any] = [None]
    for place in range(len(tokens) - 1):
        pairs = zip(values[place].tolist(), ids[place].tolist(), strict=True)
        top.append([[value, one, None] for value, one in pairs])
    return {"input_token_logprobs": own, "input_top_logprobs": top}


def _one(value: float, rank: int) -> dict[str, Any]:
    return {"logprob": value, "rank": rank, "decoded_token": ""}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any  # a TeacherStub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        limit = self.server.max_model_len
        cards = [
            {"id": name, "created": int(time.time()), "max_model_len": limit}
            for name in self.server.names
        ]
        self._reply(200, {"object": "list", "data": cards})

    def do_POST(self) -> None:
        server = self.server
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.questions.append(question)
            fault = server.faults.pop(0) if server.faults else None
            ended = server.stop_after is not None and len(server.questions) > server.stop_after
        if ended:
            return self._reply(503, {"error": "gone"})
        if server.key and self.headers["Authorization"] != f"Bearer {server.key}":
            said = f"wrong key {self.headers['Authorization']}"
            return self._reply(401, raw=f"{said}\nand more".encode())
        match fault:
            case "503" | "429":
                return self._reply(int(fault), {"error": "busy"})
            case "400":
                return self._reply(400, raw=b"Requested prompt logprobs of 8\nsecond line")
            case "not_json":
                return self._reply(200, raw=b"{")
            case "drop":
                self.close_connection = True
                return self.connection.close()
            case "cut":
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                self.close_connection = True
                return None
            case "slow":
                time.sleep(SLOW_SECONDS)
        sglang = self.path == "/generate"
        tokens = question["input_ids" if sglang else "prompt"]
        k = question["top_logprobs_num" if sglang else "prompt_logprobs"]
        answered = tokens if fault != "other_text" else [(token + 1) % 512 for token in tokens]
        log_probs = server.log_probs(tokens)
        if fault == "nan":
            log_probs[0] = torch.nan
        k -= 2 * (fault == "wrong_k")
        if sglang:
            meta = sglang_meta(log_probs, answered, k)
            if fault == "no_null":
                meta["input_top_logprobs"][0] = meta["input_top_logprobs"][1]
            return self._reply(200, {"text": "", "meta_info": meta})
        entries = vllm_entries(log_probs, answered, k)
        if fault == "no_null":
            entries[0] = entries[1]
        choice = {"index": 0, "text": "", "prompt_logprobs": entries}
        return self._reply(200, {"object": "text_completion", "choices": [choice]})

    def _reply(self, code: int, content: Any = None, raw: bytes | None = None) -> None:
        body = json.dumps(content).encode() if raw is None else raw
        with suppress(OSError):  # who asked may have gone
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
