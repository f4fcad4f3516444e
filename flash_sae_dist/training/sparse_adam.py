"""Adam whose step takes the sparse gradients of a batch instead of dense `.grad` tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.dispatch import implementation
from ..kernels.reference import (
    AdamOptions,
    DenseRows,
    Gradients,
    LatentRows,
    PairGradients,
    PairOrder,
)
from ..models.base import SparseCoder
from ..parallel.collectives import all_reduce_
from .side_stream import SideStream


class LatentGradients(NamedTuple):
    """A batch's gradients in the form that `SparseAdam.step` takes."""

    pairs: PairGradients
    order: PairOrder
    b_dec: Tensor  # [D], the decoder's part; made beside the current stream
    dense: DenseRows | None = None  # of listed dead latents
    own: tuple[Tensor, ...] = ()  # of an architecture's own parameters, over all replicas
    bias: Tensor | None = None  # [F], likewise: of b_enc's what pre-activations do not have


class _Own(NamedTuple):
    """A parameter that an architecture has beside the usual four."""

    param: Tensor
    in_data_units: bool
    is_rows: bool  # each shard its part


def _own_of(sae: SparseCoder) -> list[_Own]:
    usual = ("W_enc", "b_enc", "W_dec", "b_dec")
    return [
        _Own(param, name in sae.in_data_units, sae.roles[name] == "rows")
        for name, param in sae.named_parameters()
        if name not in usual
    ]


class SparseAdam(torch.optim.Optimizer):
    """Adam over an SAE's W_enc, b_enc, W_dec and b_dec that never sees a dense `[F, D]` gradient.

    `FusedEngine` puts a batch's pairs into `gradients`; `step` forms a latent's gradient, removes
    its part along the decoder row, applies Adam to the master weights, renormalises the decoder row
    and writes the compute copies, in one pass over each matrix. With grad_clip another pass over
    each sums the squares of all gradients, which are then scaled as torch.nn.utils.clip_grad_norm_
    does, the norm taken over all shards. Exact mode is dense Adam's arithmetic; lazy mode moves
    only latents that fired, with the bias correction of the global step count, as
    torch.optim.SparseAdam: their moments do not decay in between, and a rarely firing latent's
    first steps are up to sqrt(10) times dense Adam's. bfloat16 moments are rounded stochastically
    by a hash of (seed, step, latent over all shards, column): the same run gives the same bits, on
    any number of shards.

    Parameters that an architecture has beside these four are stepped one by one from dense
    gradients.

    b_enc and b_dec are in the data's units and so is their step: lr * unit, their epsilon eps /
    unit, and clipping counts their gradients times unit. With the data's root mean square as unit
    training does not depend on the data's scale. A captured graph holds it as a constant.

    decay is AdamW's: the matrices are multiplied by 1 - lr * decay before each step, biases and
    what else is a vector are not.

    sign: schedule-free sign descent in place of Adam, betas[0] its momentum
    (`reference_adam.schedule_free_`): a parameter is y while it is trained, its one moment is z,
    `average` gives x, and `swap_` puts it in the parameter's place.

    unit_norm=False leaves decoder rows and their gradients as they are, as transcoders do and some
    recipes; renorm=False the rows alone, which the caller scales before each step, as sparsify
    does.

    state_dict, param_groups and lr schedulers work as with torch.optim.Adam (the states bear its
    names); loading copies in place. All parameters share one group. The learning rate reaches the
    device by `sync_group_`, so that a captured graph follows a schedule.
    """

    gradients: LatentGradients | None = None

    def __init__(
        self,
        sae: SparseCoder,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 6.25e-10,
        lazy: bool = False,
        moment_dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype = torch.bfloat16,
        ema_decay: float | None = None,
        grad_clip: float | None = None,
        seed: int = 0,
        unit: float = 1.0,
        unit_norm: bool = True,
        renorm: bool = True,
        decay: float = 0.0,
        sign: bool = False,
    ) -> None:
        if moment_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"moment_dtype={moment_dtype} is neither float32 nor bfloat16")
        self.lazy, self.seed, self.ema_decay, self.grad_clip = lazy, seed, ema_decay, grad_clip
        self._lr_value, self.unit, self.decay, self.sign = lr, unit, decay, sign
        self._centres, self.side = not sae.transcodes, SideStream(sae.W_dec.device)
        self.unit_norm, self.renorm = unit_norm and not sae.transcodes, renorm
        self._mesh, self._first_latent, self._own = sae.mesh, sae.first_latent, _own_of(sae)
        self._params = (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, *(o.param for o in self._own))
        super().__init__(self._params, {"lr": lr, "betas": betas, "eps": eps})
        master, device = sae.W_dec.dtype, sae.W_dec.device
        self.moment_dtype = moment_dtype if master == torch.float32 else master
        self._betas = torch.tensor(betas, dtype=torch.float64, device=device)
        self._lr = torch.full((), lr, dtype=master, device=device)
        self._constants = (tuple(betas), eps)
        self._scalars = torch.ones(4, dtype=master, device=device)
        self._step = torch.zeros((), dtype=torch.float32, device=device)
        self._make_state()
        self.copies: tuple[Tensor, Tensor] | None = None
        if compute_dtype != master:
            W_enc, W_dec = sae.W_enc.detach(), sae.W_dec.detach()
            self.copies = (W_enc.to(compute_dtype), W_dec.to(compute_dtype))

    def _make_state(self) -> None:
        for param in self._params:
            rounded = param is self._params[0] or param is self._params[2]
            dtype = self.moment_dtype if rounded else param.dtype
            self.state[param] = {"step": self._step}
            if self.sign:
                self.state[param]["z"] = param.detach().clone()
            else:
                for name in ("exp_avg", "exp_avg_sq"):
                    zeros = torch.zeros_like(param, dtype=dtype, requires_grad=False)
                    self.state[param][name] = zeros
            if self.ema_decay is not None:
                self.state[param]["ema"] = param.detach().clone()

    def _moments(self, param: Tensor) -> tuple[Tensor, Tensor]:
        """Both of a parameter; of a descent by signs one, twice."""
        state = self.state[param]
        names = ("z", "z") if self.sign else ("exp_avg", "exp_avg_sq")
        return state[names[0]], state[names[1]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Takes the one group made at construction. Raises ValueError on another."""
        if self.param_groups:
            raise ValueError("SparseAdam keeps one param group; use torch.optim.Adam for several")
        # Its wrapper imports torch._dynamo, which takes longer than all else that a start imports.
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    @property
    def compute_weights(self) -> tuple[Tensor, Tensor]:
        """W_enc and W_dec [F, D] in the compute dtype, refreshed by each step."""
        return self.copies or (self._params[0].detach(), self._params[2].detach())

    @torch.no_grad()
    def refresh_copies_(self) -> None:
        """Rewrites the compute copies; call it after changing the weights by other means."""
        if self.copies is not None:
            self.copies[0].copy_(self._params[0])
            self.copies[1].copy_(self._params[2])

    def sync_group_(self) -> bool:
        """Sends what the param group says to the device where it changed; no host sync.

        Returns whether betas or eps changed, which a captured graph holds as constants.
        """
        group = self.param_groups[0]
        lr, constants = float(group["lr"]), (tuple(group["betas"]), group["eps"])
        if lr != self._lr_value:
            self._lr.fill_(lr)
            self._lr_value = lr
        if constants == self._constants:
            return False
        self._constants = constants
        for i, beta in enumerate(group["betas"]):
            self._betas[i].fill_(beta)
        return True

    def options(self) -> AdamOptions:
        """The step's constants, from the param group."""
        group, scaled = self.param_groups[0], self.grad_clip is not None
        seed, unit = self.seed % 2**31, self.unit
        return AdamOptions(
            group["betas"], group["eps"], self.lazy, self.unit_norm, seed, scaled, unit, self.decay,
            self.sign, self.renorm,
        )  # fmt: skip

    def _latent_rows(self) -> LatentRows:
        rows = self._params[:3]
        m, v = zip(*map(self._moments, rows), strict=True)
        W_enc, b_enc, W_dec = (p.detach() for p in rows)
        return LatentRows(W_enc, b_enc, W_dec, (m[0], m[1], m[2]), (v[0], v[1], v[2]), self.copies)

    @torch.no_grad()
    def advance_(self) -> None:
        """Counts a step and computes the scalars of its update; once before each `step`, which
        then need not wait for it."""
        implementation("adam_scalars_", self._params[2])(
            self._step, self._lr, self._betas, self._scalars
        )
        if self.sign:
            torch.reciprocal(self._step.to(self._scalars.dtype), out=self._scalars[1])

    @torch.no_grad()
    def average(self, param: Tensor) -> Tensor:
        """What stands for a parameter in the end: a running average, x of a descent by signs."""
        if self.sign:
            return param.lerp(self.state[param]["z"], 1 - 1 / self.param_groups[0]["betas"][0])
        kept: Tensor = self.state[param].get("ema", param)
        return kept

    @torch.no_grad()
    def swap_(self, *, to_average: bool) -> None:
        """Puts the average in the parameters' place, or y again, of a descent by signs."""
        momentum = self.param_groups[0]["betas"][0]
        for param in self._params:
            z = self.state[param]["z"]
            param.lerp_(z, 1 - 1 / momentum if to_average else 1 - momentum)
        self.refresh_copies_()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Applies and forgets `gradients`. Raises RuntimeError where none were put. Collective over
        the shard group; no host sync.
        """
        if closure is not None or self.gradients is None:
            raise RuntimeError("SparseAdam steps through FusedEngine, which gives it its gradients")
        given, self.gradients = self.gradients, None
        W_dec, rows, options = self._params[2], self._latent_rows(), self.options()
        sums = implementation("heavy_sums", W_dec)(given.order, given.pairs, W_dec.shape[0])
        grads = Gradients(given.pairs, given.order, given.dense, sums, given.bias)
        grad_b_dec: Tensor | None = None
        if self.grad_clip is not None:
            grad_b_dec = self._clip(rows, grads, options, given)
        constants = (self._scalars, self._step, options, self._first_latent)
        weighted = implementation("adam_encoder_", W_dec)(rows, grads, *constants)
        with self.side.beside():
            if grad_b_dec is None:
                grad_b_dec = given.b_dec
                if self._centres:
                    grad_b_dec = grad_b_dec - self._over_shards(weighted)
            self._update_b_dec(grad_b_dec, options)
            self._update_own(given.own, options)
        implementation("adam_decoder_", W_dec)(rows, grads, *constants)
        self.side.meet()
        if self.ema_decay is not None:
            emas = [self.state[p]["ema"] for p in self._params]
            torch._foreach_lerp_(emas, [p.detach() for p in self._params], 1 - self.ema_decay)

    def _over_shards(self, weighted: Tensor) -> Tensor:
        """b_dec's gradient through the encoder, negated, from a shard's parts [any, D]."""
        total = weighted.sum(dim=0)
        all_reduce_(total, self._mesh.shard_group, self._mesh.num_shards)
        return total

    def _clip(
        self,
        rows: LatentRows,
        grads: Gradients,
        options: AdamOptions,
        given: LatentGradients,
    ) -> Tensor:
        """Puts the factor that clipping scales all gradients by into the scalars; returns b_dec's
        whole gradient [D], not scaled.
        """
        assert self.grad_clip is not None
        b_dec = given.b_dec
        squares = self._scalars.new_empty(2)
        with self.side.beside():
            # Beside the encoder's: neither pass alone fills the memory's bandwidth.
            found = implementation("decoder_squares", rows.W_dec)(rows, grads, options)
            torch.sum(found, 0, out=squares[1])
        parts, weighted = implementation("encoder_squares", rows.W_enc)(rows, grads, options)
        torch.sum(parts, 0, out=squares[0])
        over_encoder = torch.zeros_like(b_dec)
        if self._centres:
            over_encoder = self._over_shards(weighted)
        self.side.meet()  # b_dec's part is made there, too
        whole = squares.new_zeros(())
        for own, found in zip(self._own, given.own, strict=True):
            square = (found * self._unit_of(own)).square().sum()
            (squares[0] if own.is_rows else whole).add_(square)
        all_reduce_(squares, self._mesh.shard_group, self._mesh.num_shards)
        squares[0] += whole
        grad: Tensor = implementation("clip_", b_dec)(
            b_dec, over_encoder, squares, self.grad_clip, self._scalars, self.unit
        )
        return grad

    def _unit_of(self, own: _Own) -> float:
        return self.unit if own.in_data_units else 1.0

    def _update_own(self, grads: tuple[Tensor, ...], options: AdamOptions) -> None:
        for own, grad in zip(self._own, grads, strict=True):
            if options.decay and own.param.ndim == 2:
                own.param.detach().mul_(1 - options.decay * self._scalars[3])
            moved = (own.param, *self._moments(own.param), grad.contiguous())
            whole = (t.detach().view(-1) for t in moved)
            implementation("adam_vector_", own.param)(
                *whole, self._scalars,
                options._replace(unit=self._unit_of(own)),
            )  # fmt: skip

    def _update_b_dec(self, grad: Tensor, options: AdamOptions) -> None:
        b_dec = self._params[3]
        implementation("adam_vector_", b_dec)(
            b_dec.detach(), *self._moments(b_dec), grad, self._scalars, options
        )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copies a state_dict in place, so that a captured graph stays valid. Raises ValueError
        where a state is missing or has another shape.
        """
        for index, param in enumerate(self._params):
            source = state_dict["state"].get(index, {})
            for name, tensor in self.state[param].items():
                if name not in source or source[name].shape != tensor.shape:
                    raise ValueError(
                        f"state {name!r} of parameter {index} must have shape "
                        f"{list(tensor.shape)}; was it saved by another optimizer or width?"
                    )
                tensor.copy_(source[name])
        (saved,) = state_dict["param_groups"]
        self.param_groups[0].update({k: v for k, v in saved.items() if k != "params"})
        self.refresh_copies_()
