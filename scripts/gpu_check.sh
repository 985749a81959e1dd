#!/usr/bin/env bash
# Everything that only a GPU can show, in under nine minutes. Installs nothing; JSON goes to OUTDIR.
#   scripts/gpu_check.sh OUTDIR
#   PYTHON=...          interpreter with torch, triton and pytest (default: .venv's, else python3)
#   TEST_SECONDS=...    for the tests, which run side by side (default 280)
#   BENCH_SECONDS=...   for the benchmark, which then has the machine to itself (default 200)
#   STEPS=...           some of: gpu kernels bench (default: all)
#   COMMIT=...          what the results belong to, in a copy whose git does not know
#   FAKE=1              without a GPU: the same steps on a tiny set, to see that everything runs
#   BENCH_CASES=...     which cases of the benchmark (default: all)
#   KERNEL_TESTS=...    where the kernels' tests are (default: tests/sad_kernels)
set -uo pipefail
out="$(mkdir -p "${1:?usage: scripts/gpu_check.sh OUTDIR}" && cd "$1" && pwd)" || exit 1
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python="${PYTHON:-.venv/bin/python}"
if ! command -v "$python" >/dev/null; then python=python3; fi
unset TRITON_INTERPRET # the kernels are compiled here
which_tests="triton" fake=()
if [ -n "${FAKE:-}" ]; then
    export TRITON_INTERPRET=1
    which_tests="triton and cross_entropy_by_hand" fake=(--fake)
fi
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 TRITON_DEFAULT_FP_FUSION=1
TRITON_CACHE_DIR="$(mktemp -d)"
export TRITON_CACHE_DIR
trap 'rm -rf "$TRITON_CACHE_DIR"' EXIT

if [ -z "${FAKE:-}" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: gpu_check.sh must run where torch sees a GPU, got none with $python" >&2
    exit 1
fi

wanted() { [[ " ${STEPS:-gpu kernels bench} " == *" $1 "* ]]; }
step() { # step NAME SECONDS COMMAND...: its output to NAME.log, its time and exit status to NAME.step
    local name="$1" limit="$2" start="$SECONDS" status
    shift 2
    wanted "$name" || return 0
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    tail -n 15 "$out/$name.log"
    echo "== $name: exit status $status after $((SECONDS - start)) s (limit $limit s)"
    echo "$name $status $((SECONDS - start)) $limit" >"$out/$name.step"
}
pytest() { # pytest NAME SECONDS ARGUMENT...
    local name="$1" limit="$2"
    shift 2
    # -v and at_once, so that a run which is cut off tells what it did, and what failed why;
    # no:benchmark, because that plugin, where installed, warns of parallel runs: an error here;
    # xunit1, because only that format may hold what tests measured
    step "$name" "$limit" "$python" -m pytest -v -p support.at_once --junit-xml="$out/$name.xml" \
        -o junit_family=xunit1 -p no:cacheprovider -p no:benchmark "$@"
}
processes=()
if "$python" -c 'import xdist' 2>/dev/null; then
    spare=$(($(nproc) > 3 ? $(nproc) - 2 : 0)) # a single one would only take longer to start
    processes=(-n "$((spare < 14 ? spare : 14))")
fi

rm -f "$out"/*.step "$out"/*.xml
tests="${TEST_SECONDS:-280}" seconds="${BENCH_SECONDS:-200}"
pytest gpu "$tests" tests/sad_kernels/test_gpu.py &
pytest kernels "$tests" -k "$which_tests" "${KERNEL_TESTS:-tests/sad_kernels}" --ignore=tests/sad_kernels/test_gpu.py \
    "${processes[@]}" &
wait
# Alone on the machine, because it measures.
read -ra cases <<<"${BENCH_CASES:-}"
step bench "$((seconds + 40))" "$python" -m bench ${cases[@]+"${cases[@]}"} --quick ${fake[@]+"${fake[@]}"} \
    --seconds "$seconds" --out "$out/bench.json"
"$python" tests/support/gpu_report.py "$out"
