#!/usr/bin/env bash
# Everything worth running on a machine with a GPU, in order of worth; every part is bounded and none stops the others.
#
#   benchmarks/gpu.sh OUT [--rehearse] [PART ...]
#
# OUT is a folder (benchmarks/results to keep them). Without PARTs all are run: thirteen minutes at most. Where a command
# may take ten minutes, call it twice: "tests profile encode kernels paper", "tune compiled statistics".
# --rehearse: tiny shapes on a CPU with Triton's interpreter, to find the typos; every part has five times as long.
# Needs torch, triton, timm (with safetensors, which it brings) and pytest (pytest-xdist is used where it is there), and the
# repository's tree; nothing is installed.
# Without .git, set COMMIT. Logs are packed into OUT/gpu-logs.tar.gz after each part, named after the PARTs where some are given.
set -u
out=$(realpath -m "${1:?usage: benchmarks/gpu.sh OUT [--rehearse] [PART ...]}")
cd "$(dirname "$0")/.."
shift
rehearse=
if [ "${1:-}" = --rehearse ]; then
  rehearse=--rehearse
  export TRITON_INTERPRET=1
  shift
fi
slower=${rehearse:+5}
logs=gpu-logs$(printf -- "${1:+-%s}" "$@").tar.gz
wanted=" ${*:-tests profile encode kernels paper tune compiled statistics} "
mkdir -p "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH=. PYTHONUNBUFFERED=1
export TEST_FAILURES="$out/gpu-failures.log" # written as they come: a part that runs out of time reports nothing else

part() { # part NAME SECONDS COMMAND...
  local name=$1 limit=$(($2 * ${slower:-1}))
  shift 2
  case "$wanted" in *" $name "*) ;; *) return 0 ;; esac
  echo "== $name (at most $limit s)"
  timeout -k 15 "$limit" "$@" 2>&1 | tee "$scratch/gpu-$name.log" | tail -n 60
  echo "== $name: exit ${PIPESTATUS[0]}"
  [ -e "$TEST_FAILURES" ] && cp "$TEST_FAILURES" "$scratch"
  tar -C "$scratch" -czf "$out/$logs" . # whatever ends this script later finds the logs packed
}

# Hundreds of small kernels are compiled in the tests: side by side where that can be had. The project's own options of
# pytest ask for pytest-xdist.
beside="-o addopts=--import-mode=importlib"
if [ -z "$rehearse" ] && python3 -c 'import xdist' 2>/dev/null; then
  cores=$(nproc)
  beside="$beside -n $((cores < 14 ? cores : 14))"
fi
# shellcheck disable=SC2086
part tests "${TESTS_SECONDS:-150}" python3 -m pytest -q -p no:cacheprovider --continue-on-collection-errors $beside tests/test_cuda.py \
  tests/test_operations.py tests/kernels --deselect tests/kernels/test_report.py
part profile 35 python3 benchmarks/gpu_paper.py "$out/gpu-profile.json" --profile $rehearse
part encode 105 python3 benchmarks/gpu_encode.py "$out/gpu-encode.json" $rehearse
part kernels 75 python3 benchmarks/gpu_kernels.py "$out/gpu-kernels.json" $rehearse
part paper 75 python3 benchmarks/gpu_paper.py "$out/gpu-paper.json" $rehearse
part tune 80 python3 benchmarks/gpu_tune.py "$out/gpu-tune.json" $rehearse
part compiled 200 python3 benchmarks/gpu_encode.py "$out/gpu-encode-compiled.json" --compiled $rehearse
part statistics 60 python3 benchmarks/gpu_statistics.py "$out/gpu-statistics.json" $rehearse
rm -f "$TEST_FAILURES"
