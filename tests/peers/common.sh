# Sourced by the scripts beside it.
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. launch/environment.sh
ensure_environment quickstart,interop,dev
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}
PEERS=${PEERS:-.venv/peers}

# `peer NAME REQUIREMENT...`: an environment of that name with torch 2.13 for the CPU, made once.
peer() {
  local place=$PEERS/$1
  shift
  [ -e "$place/done" ] && return
  python -m venv "$place"
  # torch first and alone, else pip takes a build for GPUs of some GB.
  "$place/bin/pip" install -q --disable-pip-version-check torch==2.13.0
  "$place/bin/pip" install -q --disable-pip-version-check "$@" torch==2.13.0
  touch "$place/done"
}

# `stubbed FILE ARGUMENTS...`: dictionary_learning imports what its own buffers need, which is not used here.
stubbed() {
  "$PEERS/dictionary_learning/bin/python" - "$@" <<'PYTHON'
import runpy
import sys
import types

from transformers import AutoModelForCausalLM  # noqa: F401, before the stub of datasets

for name in ("nnsight", "datasets", "zstandard", "circuitsvis", "circuitsvis.activations", "umap", "plotly"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["nnsight"].LanguageModel = object
sys.modules["datasets"].load_dataset = None
sys.modules["zstandard"].ZstdDecompressor = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
PYTHON
}

dictionary_learning_environment() {
  peer dictionary_learning --no-deps dictionary-learning==0.1.0
  [ -e "$PEERS/dictionary_learning/needs" ] && return
  "$PEERS/dictionary_learning/bin/pip" install -q --disable-pip-version-check einops tqdm wandb pandas transformers
  touch "$PEERS/dictionary_learning/needs"
}
