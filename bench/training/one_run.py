"""One run of one trainer; prints the result as JSON on the last line (see ``end_to_end``)."""

from __future__ import annotations

import json
import sys

import torch

from bench.training.task import Setup
from bench.training.trainers import attempt

if __name__ == "__main__":
    setup = Setup(**json.loads(sys.argv[1]))
    torch.set_num_threads(setup.threads)
    print(json.dumps(attempt(setup, sys.argv[2], int(sys.argv[3]))))
