"""Measure all faults and print them as JSON on the last line; ``measure()`` runs this."""

from __future__ import annotations

import json
from importlib.util import find_spec

from bench.faults import interpreter, rows
from bench.faults.core import INTERPRETED

if __name__ == "__main__":
    if INTERPRETED and find_spec("triton") is not None:
        interpreter.prepare()
    print(json.dumps(rows()))
