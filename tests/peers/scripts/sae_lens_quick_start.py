"""SAELens's quick start on a small local model."""

import sys

import torch
from datasets import Dataset
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TopKTrainingSAEConfig,
)

folder, out, *rule = sys.argv[1:]
generator = torch.Generator().manual_seed(0)
ids = torch.randint(4, 54, (600, 32), generator=generator)
dataset = Dataset.from_dict({"tokens": ids.tolist()})
torch.manual_seed(0)
width = {"d_in": 32, "d_sae": 256, "device": "cpu"}
sae_cfg = TopKTrainingSAEConfig(**width, k=8)
if rule == ["batch_topk"]:
    sae_cfg = BatchTopKTrainingSAEConfig(**width, k=8)
elif rule == ["matryoshka"]:
    sae_cfg = MatryoshkaBatchTopKTrainingSAEConfig(
        **width, k=8, matryoshka_widths=[32, 64, 128, 256]
    )
elif rule in (["jumprelu"], ["jumprelu_quadratic"]):
    aim = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 8} if "quad" in rule[0] else {}
    sae_cfg = JumpReLUTrainingSAEConfig(
        **width,
        l0_coefficient=0.05 if aim else 0.03,
        l0_warm_up_steps=100,
        jumprelu_bandwidth=1.0,
        jumprelu_init_threshold=0.5,
        normalize_activations="expected_average_only_in",
        **aim,
    )
cfg = LanguageModelSAERunnerConfig(
    sae=sae_cfg,
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
    n_batches_for_norm_estimate=20,
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
    l0 = float((sae.encode(x) > 0).sum(dim=-1).float().mean())
print("L0", l0)
print("FVU", fvu)
