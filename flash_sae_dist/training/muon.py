"""Muon over matrices whose rows are split over shards, with Adam for everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..parallel import collectives
from ..parallel.mesh import Mesh

# Keller Jordan's quintic (kellerjordan.github.io/posts/muon), as torch.optim.Muon.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS, _EPS = 5, 1e-7
_MOMENTUM = 0.95


@torch.no_grad()
def orthogonalised(
    update: Tensor,  # [F, D], a shard's rows or all
    mesh: Mesh | None,  # over whose shards the rows are split
) -> Tensor:  # [F, D], in bfloat16, float64 of float64
    """What Newton-Schulz's iteration makes of a matrix: nearly its nearest orthogonal one.

    It needs no more of the other shards than the Gram matrix [D, D] of the columns, which is a sum
    over rows: one all-reduce of D * D values an iteration. torch.optim.Muon takes the Gram matrix
    of the shorter side, which comes to the same. Collective over the shard group.
    """
    x = update if update.dtype == torch.float64 else update.bfloat16()
    square = update.square().sum()
    _over_shards_(square, mesh)
    x = x / square.sqrt().clamp_min(_EPS).to(x.dtype)
    for _ in range(_STEPS):
        gram = (x.T @ x).to(update.dtype)
        _over_shards_(gram, mesh)
        gram = gram.to(x.dtype)
        x = torch.addmm(x, x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), beta=_A)
    return x


def _over_shards_(total: Tensor, mesh: Mesh | None) -> None:
    if mesh is not None:
        collectives.all_reduce_(total, mesh.shard_group, mesh.num_shards)


class Muon(torch.optim.Adam):
    """torch.optim.Muon's arithmetic for matrices, of which a rank may have some rows, and
    torch.optim.Adam's for other parameters, both at one learning rate (sparsify's recipe).

    torch.optim.Muon itself takes whole matrices alone. Matrices have the state `momentum_buffer`.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float,
        *,
        rows_of: dict[Tensor, tuple[int, Mesh | None]],  # matrices: all rows, who has them
        betas: tuple[float, float],
        eps: float,
        decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        self.rows_of, self.decay = rows_of, decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step from the parameters' gradients. Collective over the shard group."""
        del closure
        for group in self.param_groups:
            for param in group["params"]:
                if param in self.rows_of:
                    self._step_matrix(param, float(group["lr"]))
                    # Adam leaves alone what has no gradient.
                    param.grad = None
        super().step()

    def _step_matrix(self, param: Tensor, lr: float) -> None:
        rows, mesh = self.rows_of[param]
        grad, state = param.grad, self.state[param]
        assert grad is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer = state["momentum_buffer"].lerp_(grad, 1 - _MOMENTUM)
        update = orthogonalised(grad.lerp(buffer, _MOMENTUM), mesh)
        param.mul_(1 - lr * self.decay)
        scale = max(1.0, rows / param.shape[1]) ** 0.5
        param.add_(update.to(param.dtype), alpha=-lr * scale)
