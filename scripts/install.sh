#!/usr/bin/env bash
# Make .venv if there is none and install this checkout into it, editable, with the extras named in
# the first argument. Does nothing when that was done before from the same two files.
#   PYTHON=...        interpreter to build .venv with (default: the first one that will do)
#   CONSTRAINTS=...   versions to install (default: constraints.txt, the tested set)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="${1:-report,data}"
constraints="${CONSTRAINTS:-constraints.txt}"
stamp=".venv/installed-${extras//,/-}"

die() {
    echo "error: $1" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "python must be version 3.11 or newer, got none among ${PYTHON:-python3, python3.11 ...}; install one, or name one: PYTHON=/path/to/python3 $0"
}

if cat pyproject.toml "$constraints" | cmp -s - "$stamp"; then
    exit 0
fi

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python="$(find_python)"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python must be able to make a virtual environment, got no ensurepip; install your system's python3-venv package, or name another interpreter: PYTHON=/path/to/python3 $0"
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi

echo "Installing into .venv (minutes the first time, 2.5 GB, more where torch comes with CUDA)"
quiet=--quiet
if [ -t 1 ]; then quiet=--progress-bar=on; fi # somebody is watching
.venv/bin/python -m pip install "$quiet" --disable-pip-version-check \
    --constraint "$constraints" --editable ".[$extras]"
cat pyproject.toml "$constraints" >"$stamp"
