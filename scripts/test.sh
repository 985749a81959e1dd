#!/usr/bin/env bash
# Install if need be, then lint and run the tests. Arguments go to pytest, for example: -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/lint.sh
exec .venv/bin/python -m pytest -n logical --maxprocesses 8 --dist worksteal "$@"
