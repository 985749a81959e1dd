#!/usr/bin/env bash
# Interrupt and damage runs in every way that they promise to survive, and print what came of it.
# Arguments as in tests/campaign/__main__.py: --share 0.02 for a fiftieth of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/install.sh dev
PYTHONPATH=tests OMP_NUM_THREADS=1 exec .venv/bin/python -m campaign "$@"
