#!/usr/bin/env bash
# Every kernel on small and odd shapes under compute-sanitizer: stray accesses, races, reads of
# memory that nobody wrote. Installs nothing; the logs go to OUTDIR. Three minutes or so.
#   scripts/gpu_sanitize.sh OUTDIR
#   PYTHON=...          interpreter with torch and triton (default: .venv's, else python3)
#   TOOLS=...           default: memcheck racecheck initcheck
#   TOOL_SECONDS=...    for each of them (default 120)
#   FAKE=1              interpreted, without a GPU: to see that everything runs
set -uo pipefail
out="$(mkdir -p "${1:?usage: scripts/gpu_sanitize.sh OUTDIR}" && cd "$1" && pwd)" || exit 1
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python="${PYTHON:-.venv/bin/python}"
if ! command -v "$python" >/dev/null; then python=python3; fi
if ! command -v compute-sanitizer >/dev/null; then
    echo "error: gpu_sanitize.sh must find compute-sanitizer on the path, got none" >&2
    exit 1
fi
unset TRITON_INTERPRET # the kernels are compiled here
if [ -n "${FAKE:-}" ]; then export TRITON_INTERPRET=1; fi
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # an allocation for each tensor, whose end is seen
TRITON_CACHE_DIR="$(mktemp -d)"
export TRITON_CACHE_DIR
trap 'rm -rf "$TRITON_CACHE_DIR"' EXIT

failed=0
run() { # run NAME COMMAND...
    local name="$1" start="$SECONDS" status
    shift
    timeout --kill-after=5 "${TOOL_SECONDS:-120}" "$@" >"$out/sanitize-$name.log" 2>&1
    status=$?
    tail -n 3 "$out/sanitize-$name.log"
    echo "== $name: exit status $status after $((SECONDS - start)) s"
    if [ "$status" -ne 0 ]; then failed=1; fi
}
run compile "$python" tests/support/every_kernel.py
for tool in ${TOOLS:-memcheck racecheck initcheck}; do
    run "$tool" compute-sanitizer --tool "$tool" --target-processes application-only \
        --error-exitcode 9 "$python" tests/support/every_kernel.py
done
exit "$failed"
