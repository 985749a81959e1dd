#!/usr/bin/env bash
# Makes the files that the quickstart ships: tokenizer and teacher. About an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
run_dir=${1:-runs/quickstart-teacher}
.venv/bin/python -m bench.training.make_quickstart tokenizer
.venv/bin/sad distill quickstart-teacher --output_dir "$run_dir"
.venv/bin/python -m bench.training.make_quickstart teacher "$run_dir"
