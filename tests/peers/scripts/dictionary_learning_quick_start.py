"""dictionary_learning's quick start, its rows from a small local model."""

import sys

import torch
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import (
    MatryoshkaBatchTopKSAE,
    MatryoshkaBatchTopKTrainer,
)
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE
from transformers import AutoModelForCausalLM

folder, out, *rule = sys.argv[1:]
trainer, dictionary = TopKTrainer, AutoEncoderTopK
if rule == ["batch_topk"]:
    trainer, dictionary = BatchTopKTrainer, BatchTopKSAE
if rule == ["matryoshka"]:
    trainer, dictionary = MatryoshkaBatchTopKTrainer, MatryoshkaBatchTopKSAE
model = AutoModelForCausalLM.from_pretrained(folder)
rows = []
module = model.base_model.layers[1]
module.register_forward_hook(
    lambda m, i, output: rows.append(output[0] if isinstance(output, tuple) else output)
)
generator = torch.Generator().manual_seed(0)


def activations(sequences):
    rows.clear()
    with torch.no_grad():
        model(torch.randint(0, 54, (sequences, 32), generator=generator))
    return rows[0].flatten(0, 1)


def buffer():
    while True:
        yield activations(16)


trainer_cfg = {
    "trainer": trainer,
    "activation_dim": 32,
    "dict_size": 256,
    "k": 8,
    "layer": 1,
    "lm_name": "tiny",
    "lr": 2e-3,
    "warmup_steps": 20,
    "decay_start": 160,
    "threshold_start_step": 50,
    "threshold_beta": 0.9,
    "steps": 200,
    "seed": 0,
    "device": "cpu",
}
if rule == ["matryoshka"]:
    trainer_cfg["group_fractions"] = [1 / 8, 1 / 8, 1 / 4, 1 / 2]
trainSAE(data=buffer(), trainer_configs=[trainer_cfg], steps=200, save_dir=out, device="cpu")
ae = dictionary.from_pretrained(out + "/trainer_0/ae.pt")
generator.manual_seed(99)
x = activations(64)
with torch.no_grad():
    fvu = float((x - ae(x)).square().sum() / (x - x.mean(0)).square().sum())
print("FVU", fvu)
