"""An SAE's training as the benchmarks set it up: weights drawn on the device, the same on every
mesh, and a share of the latents dead that stays dead while it is timed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import NormalDist
from typing import Any, Literal
from unittest.mock import patch

import torch
import typer
from torch import Tensor

from .. import TopKSAE
from ..config.sae import SAEConfig
from ..config.train import ENGINES
from ..models import ARCHITECTURES
from ..models.base import SparseCoder
from ..parallel.mesh import Mesh
from ..training.metrics import PhaseTimer, StepMetrics
from ..training.step import SAETraining

Shape = tuple[int, int, int, int]  # N, D, F, k

SHAPES: dict[str, Shape] = {
    "seed": (1024, 4096, 65536, 64),
    "gpt2": (4096, 768, 24576, 32),
    "wide": (8192, 4096, 131072, 64),
    "n4096-d4096-f32768-k50": (4096, 4096, 32768, 50),
    "n2048-d3584-f16384-k60": (2048, 3584, 16384, 60),
    "n4096-d2304-f16384-k100": (4096, 2304, 16384, 100),
}

LR = 1e-4
# Adam's steps would make dead latents fire after some hundred of them at LR.
LR_DEAD = 1e-5
# Of these so many latents are active on the mean, and steps move nothing.
BY_THRESHOLD = ("jumprelu", "relu", "gated")
MEAN_L0, LR_STILL = 64, 1e-9
# With dead latents a training begins here: at a multiple of 100, when the list of dead latents is
# read, and so late that no latent that lives dies while it is timed.
START_DEAD = 10_000
# Encoder rows of dead latents, of unit norm otherwise. Pre-activations of a random batch are then
# of a standard deviation of 0.2, half of them positive: AuxK has work, and none reaches the k-th
# largest of the living (1.4 at the least, at F=16384 k=100 with nine tenths dead).
_DEAD_SCALE = 0.2


def shape_of(name: str) -> Shape:
    """The sizes of a named shape, or of one spelled out, such as n4096-d768-f24576-k32. Raises
    typer.BadParameter for anything else.
    """
    if name in SHAPES:
        return SHAPES[name]
    spelled = re.fullmatch(r"n(\d+)-d(\d+)-f(\d+)-k(\d+)", name)
    n, d, f, k = map(int, spelled.groups()) if spelled else (0, 0, 0, 0)
    if min(n, d, f, k) < 1 or k > f:
        raise typer.BadParameter(
            f"--shape {name} is no shape; give one of {', '.join(SHAPES)}, or its sizes as in "
            "n4096-d768-f24576-k32"
        )
    return n, d, f, k


def dead_latents(f: int, fraction: float) -> Tensor:  # [F] bool, CPU
    """Which latents are dead: the same ones on every rank, spread at random."""
    mask = torch.zeros(f, dtype=torch.bool)
    order = torch.randperm(f, generator=torch.Generator().manual_seed(0))
    mask[order[: int(f * fraction)]] = True
    return mask


def _local(mask: Tensor, sae: SparseCoder) -> Tensor:
    """This shard's part of a mask over all latents."""
    return mask[sae.first_latent :][: sae.W_dec.shape[0]].to(sae.W_dec.device)


@contextmanager
def _with_dead(scale_of_dead: float, dead: Tensor | None) -> Iterator[None]:
    """In SAEs that are made meanwhile some latents start so small that they are as good as dead."""
    usual = TopKSAE.reset_parameters

    @torch.no_grad()
    def draw(sae: TopKSAE, seed: int = 0) -> None:
        usual(sae, seed)
        if dead is not None:
            scale = torch.where(_local(dead, sae), scale_of_dead, 1.0)
            sae.W_enc.mul_(scale.to(sae.W_enc.dtype)[:, None])

    with patch.object(TopKSAE, "reset_parameters", draw):
        yield


def random_sae(shape: Shape, device: torch.device | str = "cuda") -> TopKSAE:
    """A whole SAE for another implementation to train."""
    _, d, f, k = shape
    with _with_dead(1.0, None):
        return TopKSAE(d, f, k, device=device)


def engine_of(training: SAETraining) -> Any:
    """What makes the training's steps."""
    return training.engine


def step_kind(training: SAETraining) -> str:
    """graph, eager or autograd: which kind of step a training makes."""
    graph = getattr(engine_of(training), "graph", None)
    return "autograd" if graph is None else "graph" if graph else "eager"


def no_graph_(training: SAETraining) -> None:
    """From now on no CUDA graph is replayed, so that each launch and collective can be seen."""
    if step_kind(training) == "graph":
        engine_of(training).graph = False


def sae_of(architecture: str, f: int, k: int, **options: Any) -> SAEConfig:
    """The config of an SAE; JumpReLU's thresholds let MEAN_L0 of a random batch through."""
    kind = ARCHITECTURES[architecture].Config
    if architecture == "jumprelu":
        options["initial_threshold"] = threshold_of(f)
    elif architecture not in BY_THRESHOLD:
        options["k"] = k
    return kind(d_sae=f, **options)


def threshold_of(f: int) -> float:
    """What MEAN_L0 of f standard normal pre-activations exceed in the mean, half at the most."""
    return NormalDist().inv_cdf(1 - min(0.5, MEAN_L0 / f))


def make_training(
    shape: Shape,
    mesh: Mesh,
    device: torch.device,
    *,
    dead: float = 0.0,
    architecture: str = "topk",
    search: Literal["exact", "fp8"] = "exact",
    transcodes: bool = False,
    skip: bool = False,
    **options: Any,
) -> SAETraining:
    """A training at a constant learning rate with TrainConfig's options, `dead` the share of its
    latents that are dead from its first step on; a transcoder's target is as wide as its input.

    Their encoder rows are short, which leaves half of their pre-activations positive.
    """
    n, d, f, k = shape
    sae = sae_of(architecture, f, k, **({"skip": True} if skip else {}))
    if search != "exact":
        sae = sae.model_copy(update={"search": search})
    mask = dead_latents(f, dead) if dead else None
    cfg = ENGINES[options.get("engine", "auto")](
        num_tokens=2 * START_DEAD * n,
        batch_tokens=n,
        lr=LR_STILL if architecture in BY_THRESHOLD else LR_DEAD if dead else LR,
        warmup_steps=0,
        decay_fraction=0,
        dead_after_tokens=(START_DEAD - 1) * n,
        num_shards=mesh.num_shards,
        num_replicas=mesh.num_replicas,
        target="target" if transcodes else None,
        **({} if dead else {"dead_latents": "none"}) | options,
    )
    with _with_dead(_DEAD_SCALE, mask):
        training = SAETraining(sae, cfg, d, mesh, device, d_out=d if transcodes else None)
    if architecture in ("relu", "gated"):
        # Pre-activations of random rows are standard normal.
        training.sae.b_enc.data.fill_(-threshold_of(f))
    if mask is not None:
        silent = _local(mask, training.sae)
        training.dead.tokens_since_fired.masked_fill_(silent, 2 * START_DEAD * n)
        training.step_index = START_DEAD
    return training


def still_dead(training: SAETraining) -> int:
    """Of this shard's latents that `make_training` made dead, how many have not fired since."""
    since = training.dead.tokens_since_fired
    return int((since >= 2 * START_DEAD * training.cfg.batch_tokens).sum())


class OurStep:
    """A training's step on one random batch, as a call without arguments."""

    def __init__(
        self,
        shape: Shape,
        device: torch.device | str = "cuda",
        *,
        graph: bool = True,
        everywhere: bool = False,
        **options: Any,
    ) -> None:
        self.training = make_training(shape, Mesh.single(), torch.device(device), **options)
        self.dead = still_dead(self.training)
        if everywhere:
            self.training.sae.b_enc.data[7] = 100.0
        if not graph:
            no_graph_(self.training)
        self.x = torch.randn(shape[0], shape[1], device=device)
        self.y = None if self.training.target is None else torch.randn_like(self.x)
        self._timer = PhaseTimer(self.training.device, enabled=False)

    def __call__(self) -> StepMetrics:
        return self.training.step(self.x, self._timer, self.y)

    def about(self) -> dict[str, str]:
        """The kind of its steps, and a remark where latents that must be dead have fired."""
        woken = self.dead - still_dead(self.training)
        remark = {"remark": f"{woken} of {self.dead} dead latents fired"} if woken else {}
        return {"step": step_kind(self.training), **remark}
