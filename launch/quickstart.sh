#!/usr/bin/env bash
# The main job on one machine: a real language model's activations, four SAEs, their evaluation and export.
#   bash launch/quickstart.sh [key=value ...]     (keys of configs/quickstart.yaml)
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
ensure_environment quickstart

config=configs/quickstart.yaml
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" = 0 ]; then
  # Two processes on the CPU, a core or more each.
  processes=2
  export ACCELERATE_USE_CPU=1
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(getconf _NPROCESSORS_ONLN) + 1) / 2))}
else
  # One process a GPU, at most two: NCCL does not let two processes share a GPU.
  processes=$((gpus < 2 ? gpus : 2))
fi
export TOKENIZERS_PARALLELISM=false TQDM_DISABLE=1

echo "== 1/4 cache: activations of two hookpoints, read once"
distributed "$processes" cache "$config" "$@"
echo "== 2/4 grid: four SAEs, each sharded over $processes process(es)"
distributed "$processes" grid "$config" "$@"
echo "== 3/4 export: SAELens and sparsify formats"
distributed 1 export "$config" "$@"
echo "== 4/4 evaluate"
distributed "$processes" evaluate "$config" "$@"
echo "Done. The report, curves and files: README.md tells what is where."
