#!/usr/bin/env bash
# Quality at equal tokens beside the libraries, small: three architectures and JumpReLU on the mixture and SAELens's benchmark.
#   bash tests/peers/quality.sh [ARGUMENT of flash-sae bench quality ...]
set -euo pipefail
. "$(dirname "$0")/common.sh"
dictionary_learning_environment
peer sparsify eai-sparsify==1.3.3
peer sae_lens sae-lens==6.54.12

pythons=()
for library in sae_lens dictionary_learning sparsify; do
  pythons+=(--python "$library=$PEERS/$library/bin/python")
done
[ $# -gt 0 ] || set -- --steps 60 --seeds 1 --factor 1 --architecture topk --architecture batch_topk --architecture matryoshka --architecture jumprelu
python -m flash_sae_dist bench quality "${pythons[@]}" "$@"
