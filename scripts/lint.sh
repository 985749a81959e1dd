#!/usr/bin/env bash
# Install if need be, then check style, format and types.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/install.sh dev
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
# Node from the package index, so that nothing else needs to be on the machine or is downloaded.
PYRIGHT_PYTHON_GLOBAL_NODE=0 .venv/bin/python -m pyright --pythonpath .venv/bin/python
