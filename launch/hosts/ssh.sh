#!/usr/bin/env bash
# A verb on several hosts without a scheduler: one launcher a host, started over ssh; Ctrl-C stops all with a checkpoint.
#   HOSTS="node1 node2" GPUS=8 bash launch/hosts/ssh.sh train configs/llama-3.1-8b-wide.yaml [key=value ...]
# Every host needs the same checkout at the same path and must see `output` and the store; the first host's name must be
# one that the others reach. PORT (29500) and SSH ("ssh", a command with options) may be set, too.
set -euo pipefail
cd "$(dirname "$0")/../.."
usage='usage: HOSTS="node1 node2" GPUS=8 bash launch/hosts/ssh.sh VERB CONFIG.yaml [key=value ...]'
read -ra hosts <<< "${HOSTS:?$usage}"
verb=${1:?$usage}
shift
port=${PORT:-29500} gpus=${GPUS:-8}
read -ra ssh <<< "${SSH:-ssh}"

# shellcheck disable=SC2329 # the trap calls it
stop() { # to each host's launcher, which tells its processes; not to an ssh whose words hold the same
  for host in "${hosts[@]}"; do
    "${ssh[@]}" "$host" "pkill -TERM -f -- '^[^ ]*python.* --main_process_port $port '" < /dev/null || true
  done
}
trap stop INT TERM

pids=()
for rank in "${!hosts[@]}"; do
  command=$(printf '%q ' accelerate launch --multi_gpu --mixed_precision no --dynamo_backend no \
    --num_machines "${#hosts[@]}" --num_processes $((${#hosts[@]} * gpus)) --machine_rank "$rank" \
    --main_process_ip "${hosts[0]}" --main_process_port "$port" -m "flash_sae_dist.launch.$verb" "$@")
  # In a session of its own: Ctrl-C is for this script, which asks the hosts.
  setsid "${ssh[@]}" "${hosts[$rank]}" \
    "cd $(printf %q "$PWD") && { [ ! -e .venv/bin/activate ] || . .venv/bin/activate; } && exec $command" < /dev/null &
  pids+=($!)
done

code=0
for pid in "${pids[@]}"; do
  while true; do
    one=0
    wait "$pid" || one=$?
    # A signal ends `wait`, not what it waits for.
    kill -0 "$pid" 2> /dev/null || break
  done
  [ "$one" = 0 ] || code=$one
done
exit "$code"
