"""The rows in a process of their own, as JSON on the last line."""

from __future__ import annotations

import json
from contextlib import nullcontext
from importlib.util import find_spec

from bench.faults import interpreter, rows
from bench.faults.core import INTERPRETED

if __name__ == "__main__":
    interpreted = INTERPRETED and find_spec("triton") is not None
    with interpreter.prepared() if interpreted else nullcontext():
        print(json.dumps(rows()))
