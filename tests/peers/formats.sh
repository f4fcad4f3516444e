#!/usr/bin/env bash
# Files of each format: ours in its own library, its own here, reconstructions compared to 1e-5.
# OpenAI's library is in no registry: OPENAI names a checkout of its repository, or its files are left out.
set -euo pipefail
. "$(dirname "$0")/common.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
dictionary_learning_environment
peer llamascopium --pre llamascopium==2.0.0b34 'transformer-lens<4'
peer circuit_tracer --no-deps circuit-tracer==0.5.0
[ -e "$PEERS/circuit_tracer/needs" ] || "$PEERS/circuit_tracer/bin/pip" install -q --disable-pip-version-check \
  numpy safetensors pyyaml huggingface-hub tqdm transformer-lens==3.9.0 einops
touch "$PEERS/circuit_tracer/needs"
peer delphi --no-deps eai-delphi==0.1.3
[ -e "$PEERS/delphi/needs" ] || "$PEERS/delphi/bin/pip" install -q --disable-pip-version-check \
  asyncer beartype blobfile datasets faiss-cpu jaxtyping orjson safetensors sentence-transformers simple-parsing transformers
touch "$PEERS/delphi/needs"
peer sparsify eai-sparsify==1.3.3
peer sae_lens sae-lens==6.54.12

python tests/peers/formats.py write "$work"
stubbed tests/peers/formats.py dictionary_learning "$work"
[ -z "${OPENAI:-}" ] || PYTHONPATH=$OPENAI python tests/peers/formats.py openai "$work"
for library in llamascopium circuit_tracer delphi sparsify sae_lens; do
  "$PEERS/$library/bin/python" tests/peers/formats.py "$library" "$work"
done
python tests/peers/formats.py check "$work"
