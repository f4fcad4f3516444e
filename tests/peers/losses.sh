#!/usr/bin/env bash
# Losses and gradients of SAELens, dictionary_learning and sparsify on this machine, each in an environment of its own,
# written to tests/data/peers and compared with ours. CI compares with the files that are there.
set -euo pipefail
. "$(dirname "$0")/common.sh"

# environment NAME PACKAGE...: without the packages' dependencies, which are those of ours or not needed for losses.
environment() {
  local folder=$PEERS/losses/$1
  shift
  [ -x "$folder/bin/python" ] || python -m venv "$folder"
  # What is ours is found behind what the environment has itself.
  python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$("$folder/bin/python" -c \
    'import sysconfig; print(sysconfig.get_path("purelib"))')/ours.pth"
  "$folder/bin/python" -m pip install -q --disable-pip-version-check --no-deps "$@"
}

environment sae_lens sae-lens==6.54.12 transformer-lens==3.9.0
environment dictionary_learning dictionary-learning==0.1.0 einops==0.8.2
environment sparsify eai-sparsify==1.3.3 schedulefree==1.4.1
for library in sae_lens dictionary_learning sparsify; do
  PYTHONPATH=$PWD "$PEERS/losses/$library/bin/python" -m "tests.peers.of_$library"
done
python -m pytest -q tests/test_peers.py
git diff --stat -- tests/data/peers
