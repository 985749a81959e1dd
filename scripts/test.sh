#!/usr/bin/env bash
# Install if need be, then lint and run the tests. Arguments go to pytest, for example:
#   -m slow           what is left out by default
#   --durations=30    which tests are dearest; all of them take some 20 minutes on two cores
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/lint.sh
exec .venv/bin/python -m pytest -n logical --maxprocesses 8 --dist worksteal "$@"
