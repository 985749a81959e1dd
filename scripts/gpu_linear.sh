#!/usr/bin/env bash
# How the linear losses should keep their logits, and where they stand beside every peer, on a GPU.
# Installs nothing; JSON goes to OUTDIR. What is finished there is left out, and what was cut off
# goes on from what it wrote: call it again with the same OUTDIR, on the same card and commit.
#   scripts/gpu_linear.sh OUTDIR
#   PYTHON=...          interpreter with torch, triton, pytest and the peers (default: .venv's, else
#                       python3)
#   STEPS=...           some of these, in this order (default: the first four):
#     compact           what decides between 32-bit and 16-bit logits, each figure with its limit
#     tests             the kernels' tests, compiled              with compact: 9 minutes
#     peers             linear losses beside every peer, D = 4096 first
#     logits            losses of logits, with the host's time    with peers: 5 minutes
#     shapes            linear losses of other shapes
#     sanitize          every kernel under compute-sanitizer
#     end_to_end        sad distill beside other loops; starts anew each time     all: 20 minutes
#   PEERS=...           names with a comma between them (default: all)
#   COMMIT=...          what the results belong to, in a copy whose git does not know
#   FAKE=1              without a GPU: tiny sizes, interpreted, to see that everything runs
set -uo pipefail
out="$(mkdir -p "${1:?usage: scripts/gpu_linear.sh OUTDIR}" && cd "$1" && pwd)" || exit 1
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

python="${PYTHON:-.venv/bin/python}"
if ! command -v "$python" >/dev/null; then python=python3; fi
export PYTHON="$python" # of the scripts that this one calls, too
steps="${STEPS:-compact tests peers logits}"
unset TRITON_INTERPRET STEPS # the kernels are compiled here
compact=() small=(--quick)
if [ -n "${FAKE:-}" ]; then
    export TRITON_INTERPRET=1
    compact=(--fake) small=(--fake)
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: gpu_linear.sh must run where torch sees a GPU, got none with $python" >&2
    exit 1
fi
only=()
if [ -n "${PEERS:-}" ]; then
    IFS=, read -ra only <<<"$PEERS"
    only=(--peers "${only[@]}")
fi
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1

failed=0
finished() { # finished NAME: it has exited with 0, and left nothing out
    [ -f "$out/$1.step" ] && [ "$(cut -d ' ' -f 2 "$out/$1.step")" = 0 ] &&
        ! grep -qs 'no time was left' "$out/$1.json"
}
step() { # step NAME SECONDS COMMAND...: its output to NAME.log, its time and exit status to NAME.step
    local name="$1" limit="$2" start="$SECONDS" status
    shift 2
    if finished "$name"; then
        echo "== $name: finished before"
        return
    fi
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    tail -n 15 "$out/$name.log"
    echo "== $name: exit status $status after $((SECONDS - start)) s (limit $limit s)"
    echo "$name $status $((SECONDS - start)) $limit" >"$out/$name.step"
    if [ "$status" -ne 0 ]; then failed=1; fi
}
losses() { # losses NAME SECONDS ARGUMENT...: the kernel benchmark, which ends by itself
    local name="$1" seconds="$2"
    shift 2
    step "$name" "$((seconds + 30))" "$python" -m bench "$@" "${small[@]}" --seconds "$seconds" \
        ${only[@]+"${only[@]}"} --resume --out "$out/$name.json"
}
shape() { # shape N D_s D_t V
    local sizes="$1,$2,$3,$4"
    if [ -n "${FAKE:-}" ]; then sizes=12,32,48,320; fi
    losses "shape-$1-$2-$3-$4" 120 linear_ce linear_kd --shape "$sizes" --dtype bfloat16
}

for name in $steps; do
    case "$name" in
    compact)
        step compact 240 "$python" -m bench compact ${compact[@]+"${compact[@]}"} \
            --resume --out "$out/compact.json"
        ;;
    tests)
        step tests 280 env STEPS="gpu kernels" TEST_SECONDS=240 bash scripts/gpu_check.sh "$out/tests"
        ;;
    peers) losses peers 190 linear_ce linear_kd ;;
    logits) losses logits 50 ce kd/forward_kl ;;
    shapes)
        shape 8192 2048 4096 151936
        shape 4096 1024 4096 262144
        ;;
    sanitize) step sanitize 400 bash scripts/gpu_sanitize.sh "$out/sanitize" ;;
    end_to_end)
        step end_to_end 420 "$python" -m bench end_to_end --rounds 2 --only ours,naive,transformers \
            --out "$out/end_to_end.json"
        ;;
    *)
        echo "error: STEPS must be among compact tests peers logits shapes sanitize end_to_end," \
            "got $name; leave it out" >&2
        exit 2
        ;;
    esac
done
exit "$failed"
