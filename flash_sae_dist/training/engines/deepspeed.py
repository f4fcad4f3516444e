"""The deepspeed engine: the autograd engine's losses, with torch.optim.Adam under DeepSpeed's ZeRO.

The replicas are ZeRO's data-parallel group: they split the master weights and Adam's moments, and
with stage 2 the summed gradients. The shards are DeepSpeed's model-parallel group. Gradients of
parameters that every shard has are summed over the shards by the model itself (`feed_shards`).

What the constraint and the unit of the biases need of gradients is linear, so hooks do it before
ZeRO sums them: decoder rows' lose their part along the row, biases' are taken times the unit, which
Adam then sees as one of size 1. Decoder rows are normalised behind each step in the parameters, and
from there in ZeRO's master weights.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...config.base import UserError
from ...config.deepspeed import read_deepspeed
from ...config.train import DeepSpeedTrainConfig
from ...models.base import SparseCoder
from ...models.dead_latents import DeadLatents
from ...parallel.collectives import all_reduce_
from ...parallel.mesh import Mesh, real_groups
from ..optim import project_rows_, renormalise_decoder_
from .autograd import AutogradEngine, Losses, Shared

# Of a decoder's gradient that are projected at once.
_ROWS = 1 << 13


class DeepSpeedEngine(AutogradEngine):
    """Dense gradients, ZeRO-1 or 2; see the module. Made collectively, by all processes."""

    def __init__(
        self,
        sae: SparseCoder,
        dead: DeadLatents,
        cfg: DeepSpeedTrainConfig,
        *,
        lr: float,
        k_aux: int,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__(sae, dead, cfg, lr=lr, k_aux=k_aux, compute_dtype=compute_dtype)
        # ZeRO counts the parts of a step: they stay train.micro_batches.
        self.density = None
        mesh, device = sae.mesh, sae.W_dec.device
        groups = _Groups(mesh, *real_groups(mesh, device))
        deepspeed = _import_deepspeed(device)
        for name, param in sae.named_parameters():
            # Else the norm that clips is that of one shard.
            param.model_parallel = sae.roles[name] == "rows"  # type: ignore[attr-defined]
        if not sae.transcodes:
            _hook(sae.W_dec, lambda grad: _project_(grad, sae.W_dec))
        for name, param in sae.named_parameters():
            if name in sae.in_data_units:
                _hook(param, lambda grad: grad * self.unit)
        self.zero, *_ = deepspeed.initialize(
            model=_Losses(sae, super()._forward),
            optimizer=self.optimizer,
            mpu=groups,
            config=read_deepspeed(cfg, mesh.num_replicas),
            dist_init_required=False,
        )
        self._make_moments()

    def _make_moments(self) -> None:
        """Adam makes its moments at its first step; here they may be loaded before it."""
        for group in self.optimizer.param_groups:
            (flat,) = group["params"]
            step = torch.zeros((), dtype=torch.float32, device=flat.device)
            moments = {moment: torch.zeros_like(flat) for moment in self.moments}
            self.optimizer.state[flat] = {"step": step, **moments}
        self.zero.optimizer._lazy_init_hp_params_optimizer_state()

    def set_unit(self, unit: float) -> None:
        """See Engine: Adam of gradients times the unit is Adam of the gradients with an epsilon
        that is divided by it.
        """
        self.unit = unit
        self.set_lr(self.optimizer.param_groups[0]["lr"])

    def _begin(self) -> None:
        """ZeRO drops gradients itself; those of its flat tensors it uses again."""

    def _forward(self, x: Tensor, y: Tensor, shared: Shared) -> Losses:
        out: Losses = self.zero(x, y, shared)
        return out

    def _backward(self, loss: Tensor, *, is_last: bool) -> None:
        self.zero.set_gradient_accumulation_boundary(is_last)
        # DeepSpeed takes the mean over the replicas, each of which has its share of the sum.
        self.zero.backward(loss * self.sae.mesh.num_replicas, scale_wrt_gas=False)

    def _update(self) -> None:
        self.zero.step()
        if not self.zero.was_step_applied():
            # The norm is all shards': all of them end.
            raise UserError("the gradient is not finite; lower train.lr, check the store")
        if not self.sae.transcodes:
            renormalise_decoder_(self.sae)
        for name in ("W_dec", *self.sae.project_()):
            param = self.sae.get_parameter(name)
            _Part.of(param).set(param)

    @torch.no_grad()
    def refresh_(self) -> None:
        """See Engine."""
        for param in self.sae.parameters():
            _Part.of(param).set(param)

    def forget_(self, mask: Tensor) -> None:
        """See Engine."""
        for name, param in self.sae.named_parameters():
            if self.sae.roles[name] == "rows":
                kept = (~mask).view(-1, *[1] * (param.ndim - 1)).expand_as(param)
                for moment in self.moments:
                    _Part.of(param, moment).keep(kept)

    def state(self) -> dict[str, Tensor]:
        """See Engine. Of several replicas the first has the moments, on the host; the others have
        tensors on the meta device. Collective over the replicas.
        """
        out: dict[str, Tensor] = {}
        for name, param in self.sae.named_parameters():
            out[name] = param.detach()
            for power, moment in enumerate(self.moments, 1):
                value = _Part.of(param, moment).gather(param, self.sae.mesh)
                if name in self.sae.in_data_units:
                    # In float64, from which a resumed run gets the same bits.
                    value = value.double() / self.unit**power
                out[f"{moment}.{name}"] = value
        return out

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor], step: int) -> None:
        """See Engine."""
        for name, param in self.sae.named_parameters():
            param.copy_(state[name])
            for power, moment in enumerate(self.moments, 1):
                value = state[f"{moment}.{name}"]
                if name in self.sae.in_data_units:
                    value = value.double() * self.unit**power
                _Part.of(param, moment).set(value)
        for own in self.optimizer.state.values():
            own["step"].fill_(float(step))
        self.refresh_()


def _hook(param: nn.Parameter, of: Callable[[Tensor], Tensor]) -> None:
    """Puts a function of each gradient in its place, before it is added up."""
    param.register_hook(of)  # type: ignore[no-untyped-call]


@torch.no_grad()
def _project_(grad: Tensor, rows: Tensor) -> Tensor:
    """See `project_rows_`, some rows at a time: a large SAE has no memory for copies."""
    for start in range(0, len(rows), _ROWS):
        project_rows_(grad[start : start + _ROWS], rows[start : start + _ROWS])
    return grad


class _Part(NamedTuple):
    """What this rank has of a parameter's master weights, or of a moment: some of its elements, in
    the flat tensors that Adam steps, on the host where they are offloaded.
    """

    values: Tensor | None  # [n], a view; None where other replicas have all
    start: int  # its first element's number in the parameter

    @classmethod
    def of(cls, param: nn.Parameter, moment: str | None = None) -> _Part:
        """That of the master weights where no moment is named."""
        mapping = param._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return cls(None, 0)
        return cls(mapping.get_hp_fragment(moment).detach(), mapping.lp_fragment_address.start)

    def of_whole(self, whole: Tensor) -> Tensor:
        """The same elements of a tensor of the parameter's shape."""
        assert self.values is not None
        return whole.detach().reshape(-1)[self.start : self.start + len(self.values)]

    def set(self, whole: Tensor) -> None:
        """Takes the elements over from a tensor of the parameter's shape."""
        if self.values is not None:
            self.values.copy_(self.of_whole(whole))

    def keep(self, kept: Tensor) -> None:
        """Zeroes the elements that are not kept, bool of the parameter's shape."""
        if self.values is not None:
            self.values.mul_(self.of_whole(kept).to(self.values.device))

    def gather(self, param: nn.Parameter, mesh: Mesh) -> Tensor:
        """The whole of it; see `state`."""
        if mesh.num_replicas == 1:
            assert self.values is not None
            return self.values.view_as(param)
        whole = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
        if self.values is not None:
            self.of_whole(whole).copy_(self.values)
        all_reduce_(whole, mesh.replica_group, mesh.num_replicas)
        return whole.to("cpu" if mesh.replica == 0 else "meta")


class _Losses(nn.Module):
    """The module that DeepSpeed wraps: an SAE whose forward pass gives a micro-batch's losses."""

    def __init__(self, sae: SparseCoder, losses: Callable[..., Any]) -> None:
        super().__init__()
        self.sae, self.losses = sae, losses

    def forward(self, *batch: Any) -> Any:
        return self.losses(*batch)


class _Groups(NamedTuple):
    """What DeepSpeed calls an mpu: the ranks that hold the parts of a model, and its copies."""

    mesh: Mesh
    shards: dist.ProcessGroup
    replicas: dist.ProcessGroup

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.shards

    def get_model_parallel_rank(self) -> int:
        return self.mesh.shard

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.num_shards

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.replicas

    def get_data_parallel_world_size(self) -> int:
        return self.mesh.num_replicas


def _import_deepspeed(device: torch.device) -> Any:
    """The library, set to a device's kind and to saying no more than warnings."""
    if device.type == "cpu":
        # It would take a GPU where there is one.
        os.environ["DS_ACCELERATOR"] = "cpu"
    # It asks for what every launcher sets, and a process alone lacks.
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    deepspeed.logger.setLevel(logging.ERROR)
    # It calls by names that new versions of torch warn of.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if device.type == "cpu":
        # All-reduces by shared memory, for which it would compile C++ at the first start.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    return deepspeed
