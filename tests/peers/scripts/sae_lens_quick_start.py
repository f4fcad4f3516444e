"""SAELens's quick start on a small local model."""

import sys

import torch
from datasets import Dataset
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAEConfig,
)

folder, out = sys.argv[1:3]
generator = torch.Generator().manual_seed(0)
ids = torch.randint(4, 54, (600, 32), generator=generator)
dataset = Dataset.from_dict({"tokens": ids.tolist()})
torch.manual_seed(0)
cfg = LanguageModelSAERunnerConfig(
    sae=TopKTrainingSAEConfig(d_in=32, d_sae=256, k=8, device="cpu"),
    model_name=folder,
    model_class_name="AutoModelForCausalLM",
    hook_name="model.layers.1",
    dataset_path="none",
    is_dataset_tokenized=True,
    streaming=False,
    context_size=32,
    prepend_bos=False,
    training_tokens=256 * 200,
    train_batch_size_tokens=256,
    store_batch_size_prompts=8,
    n_batches_in_buffer=32,
    lr=2e-3,
    lr_warm_up_steps=20,
    lr_decay_steps=40,
    device="cpu",
    output_path=out,
    logger=LoggingConfig(log_to_wandb=False),
)
runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset)
sae = runner.run()
generator.manual_seed(99)
rows = []
with torch.no_grad():
    tokens = torch.randint(4, 54, (64, 32), generator=generator)
    _, cache = runner.model.run_with_cache(tokens, names_filter=["model.layers.1"])
    x = cache["model.layers.1"].flatten(0, 1)
    fvu = float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum())
print("FVU", fvu)
