#!/usr/bin/env bash
# All GPU tests, dealt out to several processes of which each compiles its part, then a small case of
# every kernel under compute-sanitizer, where it is installed. For a machine whose time is short;
# tests/run.sh runs them, too, among all others.
#   PYTHON=python3 PROCESSES=10 bash tests/gpu.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} processes=${PROCESSES:-10}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

"$python" -m pytest -m gpu --collect-only -q "$@" | grep "::" > "$logs/all"
split --number="r/$processes" "$logs/all" "$logs/part."
running=()
for part in "$logs"/part.??; do
  [ -s "$part" ] || continue
  "$python" -m pytest -q --durations=3 "@$part" > "$part.log" 2>&1 &
  running+=($!)
done
failed=0
for process in "${running[@]}"; do wait "$process" || failed=1; done
grep -hE "^(FAILED|ERROR|=+ .* in )|^[0-9]+ (passed|skipped|failed)|Error" "$logs"/part.??.log || true

if command -v compute-sanitizer > "$logs/which"; then
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
  compute-sanitizer --tool memcheck --error-exitcode 1 "$python" tests/kernels/small_case.py | tail -n 3 || failed=1
fi
exit "$failed"
