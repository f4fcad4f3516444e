#!/usr/bin/env bash
# The scripts of tests/peers/scripts on the libraries themselves: what they end at is compared with, and written into,
# tests/data/quick_starts.json, which tests/test_compat.py compares the same scripts on this library with.
set -euo pipefail
. "$(dirname "$0")/common.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
dictionary_learning_environment
peer sparsify eai-sparsify==1.3.3
peer sae_lens sae-lens==6.54.12

PYTHONPATH=. python -c "from pathlib import Path; from tests.tiny_model import save_llama; save_llama(Path('$work/model'), width=32)"
scripts=tests/peers/scripts
{
  echo "dictionary_learning $(stubbed $scripts/dictionary_learning_quick_start.py "$work/model" "$work/dl" | tail -1)"
  for rule in batch_topk matryoshka; do
    found=$(stubbed $scripts/dictionary_learning_quick_start.py "$work/model" "$work/dl-$rule" "$rule")
    echo "dictionary_learning $rule $(tail -1 <<<"$found")"
  done
  for optimizer in adam signum; do
    # Without triton, as here, it decodes by PyTorch.
    found=$("$PEERS/sparsify/bin/python" $scripts/sparsify_quick_start.py "$work/model" "$work/sp-$optimizer" "$optimizer")
    echo "sparsify $optimizer $(tail -1 <<<"$found")"
  done
  echo "sae_lens $("$PEERS/sae_lens/bin/python" $scripts/sae_lens_quick_start.py "$work/model" "$work/sl" | tail -1)"
  for rule in batch_topk matryoshka jumprelu jumprelu_quadratic; do
    found=$("$PEERS/sae_lens/bin/python" $scripts/sae_lens_quick_start.py "$work/model" "$work/sl-$rule" "$rule")
    echo "sae_lens $rule $(tail -1 <<<"$found")"
  done
} | tee "$work/found"
python - "$work/found" <<'PYTHON'
import json
import sys
from pathlib import Path

file = Path("tests/data/quick_starts.json")
before = json.loads(file.read_text())
lines = [line.split(" FVU ") for line in Path(sys.argv[1]).read_text().splitlines()]
now = {name: float(fvu) for name, fvu in lines}
for name, fvu in now.items():
    print(f"{name}: {fvu:.5f}, was {before.get(name, 0):.5f}")
file.write_text(json.dumps(now, indent=1) + "\n")
PYTHON
