#!/usr/bin/env bash
# Everything worth running on a machine with a GPU, in order of worth; every part is bounded and none stops the others.
#
#   benchmarks/gpu.sh [output folder]        (--rehearse as second argument: tiny shapes on a CPU, to find the typos)
#
# Needs torch, triton, timm, safetensors and pytest, and the repository's tree; nothing is installed.
set -u
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
rehearse=${2:-}
mkdir -p "$out"
export PYTHONPATH=. PYTHONUNBUFFERED=1

part() { # part SECONDS NAME COMMAND...
  local limit=$1 name=$2
  shift 2
  echo "== $name (at most $limit s)"
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n 40
  echo "== $name: exit ${PIPESTATUS[0]}"
}

part 200 gpu-tests python3 -m pytest -q -x -p no:cacheprovider tests/test_cuda.py
part 240 gpu-encode python3 benchmarks/gpu_encode.py "$out/gpu-encode.json" $rehearse
part 120 gpu-tests-all python3 -m pytest -q -p no:cacheprovider tests/test_encoder.py tests/test_objective.py
