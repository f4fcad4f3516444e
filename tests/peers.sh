#!/usr/bin/env bash
# Other libraries beside this one, each in an environment of its own (some GB, some ten minutes, on a CPU).
#   bash tests/peers.sh
set -euo pipefail
cd "$(dirname "$0")/.."
for script in tests/peers/*.sh; do
  case $script in */common.sh) continue ;; esac
  echo "== $script"
  bash "$script"
done
