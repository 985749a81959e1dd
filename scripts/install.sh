#!/usr/bin/env bash
# Make .venv if there is none and install this checkout into it, editable, with the extras named in
# the first argument. Does nothing when that was done before, here, from the same two files.
#   PYTHON=...        interpreter to build .venv with (default: the first one that will do)
#   CONSTRAINTS=...   versions to install (default: constraints.txt, the tested set)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras="${1:-report,data}"
constraints="${CONSTRAINTS:-constraints.txt}"
stamp=".venv/installed-${extras//,/-}"

wanted() {
    cat pyproject.toml "$constraints"
    pwd # a copied checkout still runs the code of the original
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
            2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: python must be 3.11 or newer and able to make virtual environments, got none such" \
        "among ${PYTHON:-python3, python3.14 ... python3.11}; install one (some systems keep" \
        "ensurepip in a package python3-venv), or name one: PYTHON=/path/to/python3 $0" >&2
    return 1
}

if wanted | cmp -s - "$stamp"; then
    exit 0
fi

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python="$(find_python)"
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi

echo "Installing into .venv (minutes the first time, 2.5 GB, more where torch comes with CUDA)"
quiet=--quiet
if [ -t 1 ]; then quiet=--progress-bar=on; fi # somebody is watching
.venv/bin/python -m pip install "$quiet" --disable-pip-version-check --no-compile \
    --constraint "$constraints" --editable ".[$extras]"
# Bytecode, on all cores, where pip would use one; it fails for files that are templates.
packages="$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
.venv/bin/python -m compileall -q -q -j 0 "$packages" || true
wanted >"$stamp"
