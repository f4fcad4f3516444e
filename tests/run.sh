#!/usr/bin/env bash
# Every check, on a fresh machine too: linter, types, tests (slow ones included; GPU ones where there is a GPU).
#   bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
ensure_environment quickstart,interop,docs,dev
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

ruff check .
ruff format --check .
if [ $# -gt 0 ]; then
  mypy
  exec python -m pytest "$@"
fi
mypy &
types=$!
failed=0
python -m pytest --numprocesses 2 --dist loadfile || failed=1
wait "$types" || failed=1
exit "$failed"
