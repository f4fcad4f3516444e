"""sparsify's quick start on a small local model."""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from sparsify import SaeConfig, SparseCoder, TrainConfig, Trainer
from transformers import AutoModelForCausalLM

folder, out, optimizer = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(folder)
generator = torch.Generator().manual_seed(0)
ids = torch.randint(0, 54, (1600, 32), generator=generator)
dataset = Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
cfg = TrainConfig(
    SaeConfig(num_latents=256, k=8),
    batch_size=8,
    optimizer=optimizer,
    lr=2e-3,
    lr_warmup_steps=20,
    layers=[1],
    log_to_wandb=False,
    save_dir=out,
)
trainer = Trainer(cfg, dataset, model)
trainer.fit()
(saved,) = Path(out).rglob("sae.safetensors")
sae = SparseCoder.load_from_disk(str(saved.parent))
rows = []
model.base_model.layers[1].register_forward_hook(
    lambda m, i, output: rows.append(output[0] if isinstance(output, tuple) else output)
)
generator.manual_seed(99)
with torch.no_grad():
    model(torch.randint(0, 54, (64, 32), generator=generator))
    x = rows[0].flatten(0, 1)
    fvu = float((x - sae(x).sae_out).square().sum() / (x - x.mean(0)).square().sum())
print("FVU", fvu)
