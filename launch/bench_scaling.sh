#!/usr/bin/env bash
# How one SAE's step and a grid scale over the GPUs of a host (or CPU processes), in one call of under eight minutes on
# eight GPUs. It prints strong scaling (1, 2, 4, ... shards at wide and f1m, replicas x shards) with each collective and the
# losses beside one GPU's, weak scaling (as many latents a GPU), a job whose checkpoint of all GPUs goes on on half of them,
# a grid of eight SAEs on all GPUs beside one, and `train` end to end, from stores in /dev/shm.
#   bash launch/bench_scaling.sh                  # all GPUs of this host
#   GPUS=2 bash launch/bench_scaling.sh           # so many
#   CPU=1 GPUS=2 bash launch/bench_scaling.sh     # gloo on CPU processes, at tiny sizes: tries the script, says nothing
# Results also lie in OUT (a new folder under /tmp), one file a part. A part that fails is told, and the rest runs.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
# NVLink multicast is not to be had on every host that has NVLink.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
python=${PYTHON:-python} cpu=${CPU:-}
gpus=${GPUS:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}
out=${OUT:-$(mktemp -d /tmp/bench_scaling.XXXX)} stores=$(mktemp -d "$([ -d /dev/shm ] && echo /dev/shm || echo /tmp)/bench_scaling.XXXX")
trap 'rm -rf "$stores"' EXIT
failed=0

if [ "$gpus" -lt 2 ]; then
  echo "bench_scaling.sh needs two GPUs or more and finds $gpus; set GPUS, and CPU=1 to try it on CPU processes" >&2
  exit 2
fi
if [ -n "$cpu" ]; then
  export ACCELERATE_USE_CPU=1
  strong=(--cpu --shape tiny --steps 3 --blocks 2) weak=(--cpu --shape tiny --steps 3 --blocks 2)
  width=16 gib=0.002 batch=256 d_sae=64 k=4 steps=40 every=20 grid_k='1,2,3,4,5,6,7,8' grid_steps=60
else
  strong=(--shape wide --shape f1m --steps 20 --blocks 3) weak=(--shape seed --steps 20 --blocks 3)
  width=768 gib=4 batch=4096 d_sae=24576 k=32 steps=600 every=300 grid_k='8,12,16,24,32,40,48,64' grid_steps=600
fi

launch() { # processes, module, arguments
  local processes=$1 module=$2
  shift 2
  if [ "$processes" = 1 ]; then
    "$python" -m "flash_sae_dist.launch.$module" "$@"
  else
    "$python" -m accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes "$processes" --mixed_precision no \
      --dynamo_backend no --main_process_port 0 -m "flash_sae_dist.launch.$module" "$@"
  fi
}

part() { # name, seconds, command: its output to the screen and to a file
  local name=$1 limit=$2
  shift 2
  echo "== $name"
  export -f launch
  export python
  if ! timeout --kill-after 10 "$limit" bash -c '"$@"' _ "$@" 2>&1 | tee "$out/$name.log"; then
    echo "== $name failed; its output is in $out/$name.log"
    failed=1
  fi
}

meshes=()
for ((shards = 2; shards <= gpus; shards *= 2)); do meshes+=(--mesh "1x$shards"); done
mixed=()
if [ "$gpus" -ge 4 ]; then mixed+=(--mesh 2x2); fi
if [ "$gpus" -ge 8 ]; then mixed+=(--mesh 4x2); fi
part strong 170 launch "$gpus" bench_shards "${strong[@]}" "${meshes[@]}" "${mixed[@]}" --json "$out/strong.json"
part weak 60 launch "$gpus" bench_shards "${weak[@]}" --weak "${meshes[@]}" --json "$out/weak.json"

part store 60 "$python" -m flash_sae_dist.launch.cli bench load --keep "$stores/rows.zarr" --gib "$gib" --width "$width" \
  --batch-tokens "$batch" --cpu --preload none
common=("trackers=[]" "store=$stores/rows.zarr")
train=("train.hookpoint=rows" "train.batch_tokens=$batch" "train.log_every=20" "train.warmup_steps=10" "train.holdout=0")

cat > "$out/job.yaml" << YAML
output: $out/job
sae: {k: $k, d_sae: $d_sae}
YAML
job=("${common[@]}" "${train[@]}" "train.num_tokens=$((steps * batch))" "train.checkpoint_every=$every")
# The first half on all GPUs, stopped by its number of tokens; the whole on half of them.
part train 60 launch "$gpus" train "$out/job.yaml" "${job[@]}" "train.num_shards=$gpus" "output=$out/all"
part checkpoint-on-all 60 launch "$gpus" train "$out/job.yaml" "${job[@]}" "train.num_shards=$gpus" \
  "train.num_tokens=$((steps * batch / 2))" "train.keep_checkpoints=2" "train.decay_fraction=0"
half=$((gpus / 2))
part checkpoint-on-half 60 launch "$half" train "$out/job.yaml" "${job[@]}" "train.num_shards=$half" "train.decay_fraction=0"

cat > "$out/grid.yaml" << YAML
output: $out/grid
sae: {d_sae: $d_sae}
grid:
  hookpoints: [rows]
  values: {sae.k: [$grid_k]}
YAML
grid=("${common[@]}" "${train[@]:1}" "train.num_tokens=$((grid_steps * batch))" "train.num_shards=1" "train.num_replicas=1")
part grid-on-one 90 launch 1 grid "$out/grid.yaml" "${grid[@]}" "output=$out/grid-1"
part grid-on-all 60 launch "$gpus" grid "$out/grid.yaml" "${grid[@]}" "output=$out/grid-all"

"$python" - "$out" << 'PY'
import json, statistics, sys
from pathlib import Path

out = Path(sys.argv[1])


def rates(folder: Path) -> list[list[float]]:
    """tokens/s of each job's windows but the first, which compiles."""
    found = []
    for path in sorted(folder.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found.append([line["tokens_per_s"] for line in lines if "tokens_per_s" in line][1:])
    return [of for of in found if of]


print("== rates, tokens/s of the median window; of a grid the sum over its SAEs")
sums = {}
for name in ("all", "grid-1", "grid-all"):
    of = rates(out / name)
    if of:
        sums[name] = sum(statistics.median(windows) for windows in of)
        print(f"{name:10} {len(of)} SAEs {sums[name]:14,.0f}")
if {"grid-1", "grid-all"} <= sums.keys():
    print(f"grid on all GPUs / on one: {sums['grid-all'] / sums['grid-1']:.2f}")
PY
[ "$failed" = 0 ] && echo "== all parts ran; results in $out"
exit "$failed"
