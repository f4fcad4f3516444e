"""On sparse mixtures of known directions a TopK SAE finds the directions."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from flash_sae_dist.config.train import FusedTrainConfig
from flash_sae_dist.models.topk import TopKConfig
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training.metrics import PhaseTimer
from flash_sae_dist.training.step import SAETraining

D_IN, NUM_FEATURES, ACTIVE = 32, 48, 3
CPU = torch.device("cpu")


def mixtures(num_tokens: int, directions: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Sums of ACTIVE random directions with coefficients in 0.5..1.5, plus a constant offset."""
    which = torch.rand(num_tokens, NUM_FEATURES, generator=generator).topk(ACTIVE, dim=1).indices
    coef = torch.zeros(num_tokens, NUM_FEATURES)
    coef.scatter_(1, which, 0.5 + torch.rand(num_tokens, ACTIVE, generator=generator))
    return coef @ directions + 0.3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_recovers_known_features(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    directions = normalize(torch.randn(NUM_FEATURES, D_IN, generator=generator), dim=1)
    steps, batch = 500, 512
    cfg = FusedTrainConfig(
        num_tokens=steps * batch,
        batch_tokens=batch,
        lr=3e-3,
        warmup_steps=50,
        dead_after_tokens=50_000,
        seed=seed,
    )
    training = SAETraining(TopKConfig(k=ACTIVE, d_sae=96), cfg, D_IN, Mesh.single(), CPU)
    fvu = torch.tensor(1.0)
    for _ in range(steps):
        x = mixtures(batch, directions, generator)
        fvu = training.step(x, PhaseTimer(CPU, enabled=False)).fvu
    best = (directions @ training.sae.W_dec.detach().T).max(dim=1).values
    recovered = float((best >= 0.9).float().mean())
    assert recovered >= 0.95, f"{recovered:.0%} of the features at cosine >= 0.9, fvu {float(fvu)}"
    assert float(fvu) < 0.1
