#!/usr/bin/env bash
# SAEBench's core evaluation and sae-probes on the wrapper, SAEDashboard on an export, offline.
set -euo pipefail
. "$(dirname "$0")/common.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
peer sae_bench sae-bench==0.6.0 sae-probes==0.4.2 crc32c accelerate 'numpy<2'
# Of another torch than it, and of no use here.
"$PEERS/sae_bench/bin/pip" uninstall -qy torchvision
peer sae_dashboard sae-dashboard==0.8.0 'pyarrow<20'
"$PEERS/sae_dashboard/bin/pip" uninstall -qy torchvision torchaudio

PYTHONPATH=. "$PEERS/sae_bench/bin/python" tests/peers/run_sae_bench.py "$work"
python - "$work/ours" <<'PYTHON'
import sys

from flash_sae_dist import interop
from flash_sae_dist.models import ARCHITECTURES

for name, keys in {"topk": {"k": 5}, "batch_topk": {"k": 5}, "jumprelu": {}, "relu": {}, "gated": {}}.items():
    kind = ARCHITECTURES[name]
    sae = kind.from_config(kind.Config(d_sae=48, **keys), 12).eval()
    interop.save(sae, f"{sys.argv[1]}/{name}", "sae_lens", interop.About("model.layers.0"))
PYTHON
"$PEERS/sae_dashboard/bin/python" tests/peers/run_sae_dashboard.py "$work"
