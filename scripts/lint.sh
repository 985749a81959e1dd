#!/usr/bin/env bash
# Install if need be, then check style, format and types.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/install.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# Node from the package index, so that nothing else needs to be on the machine or is downloaded.
PYRIGHT_PYTHON_GLOBAL_NODE=0 .venv/bin/pyright --pythonpath .venv/bin/python
