"""The fused engine: a whole training step without autograd and without a dense gradient.

Legend: N tokens of this replica, R replicas, D d_in, F d_sae of this shard, K slots a token (or C
of a flat list in all), M listed dead latents.

Each replica encodes and decodes its tokens, in micro-batches; a batch's (token, latent) pairs, and
what each adds to its latent's gradients, are gathered over the replicas; then every rank steps its
shard's rows from all of them. Dead latents' gradients come from dense products over their compacted
rows (`dead_step.py`). On CUDA the step is captured in a graph, its collectives too. No host sync
but after a capture, to hear whether all ranks made one.

Lists of varied lengths (a selection by threshold) get a fixed room, and their step three graphs: to
the end of the selection, which tells whether all pairs had room; to the optimizer's step, meanwhile
the host reads that; and the rest. Where they had no room, nothing was changed yet, and the step is
made eagerly, with more.
"""

from __future__ import annotations

import logging
import math
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.dispatch import has_triton, implementation, on_device, use_kernels
from ...kernels.reference import DenseRows, Nest, PairGradients, PairOrder
from ...models.base import Codes, SparseCoder
from ...models.dead_latents import DeadLatents, padded
from ...models.losses import inverse_variance, source_fvus, source_sums
from ...models.sparsity import Batch
from ...models.threshold import ThresholdCoder
from ...parallel.collectives import all_gather, all_reduce_
from ..metrics import HostCopy, PhaseTimer, StepMetrics
from ..sparse_adam import LatentGradients, SparseAdam
from .base import Engine
from .dead_step import AuxLoss, DeadStep, Listed, product
from .dense_step import DenseStep
from .density import Density
from .pair_forward import (
    Forward,
    by_level,
    gather_pairs,
    has_gradient,
    is_general,
    join_pairs,
    joined,
    own_gradients,
    pair_forward,
    same_length,
    split_bias,
    used_slots,
    with_skip,
)
from .step_batch import Begun, Captured, Made, Rows, StepBatch, Totals

logger = logging.getLogger(__name__)
# Calls of one kind made eagerly before its graph is captured: kernels compile, libraries warm up.
_EAGER_CALLS = 2
# Slots of a captured step's lists for each pair of the longest that was seen.
_MORE_ROOM = 1.3


class FusedEngine(Engine):
    """Trains on one replica's batch [N, D] a call; see the module."""

    optimizer: SparseAdam

    def __init__(
        self,
        sae: SparseCoder,
        optimizer: SparseAdam,
        dead: DeadLatents,
        *,
        dead_latents: Literal["auxk", "ghost", "none"] = "auxk",
        aux_coef: float = 1 / 32,
        k_aux: int | None = None,
        micro_batches: int = 1,
        graph: bool | None = None,
        loss: Literal["fvu", "mse"] = "fvu",
        aux_by_loss: bool = False,
    ) -> None:
        """loss: the error is divided by the batch's variance, or by its tokens (its mean squared
        length); aux_by_loss: AuxK's, too, in place of the residual's own variance.
        """
        self.sae, self.optimizer, self.dead = sae, optimizer, dead
        self.kind, self.micro_batches, self.loss = dead_latents, micro_batches, loss
        k_aux = min(k_aux or max(1, sae.d_in // 2), sae.d_sae)
        ghost = dead_latents == "ghost"
        self.dead_step = DeadStep(
            sae, dead, ghost=ghost, coef=aux_coef, k_aux=k_aux, by_loss=aux_by_loss
        )
        obstacle = self._obstacle()
        if graph and obstacle:
            raise ValueError(f"graph=True cannot be: {obstacle}; leave graph out")
        if obstacle and sae.W_dec.is_cuda and graph is None and sae.mesh.is_lead:
            logger.warning(
                "the fused step runs without a CUDA graph, which is slower: %s", obstacle
            )
        self.graph = obstacle is None and graph is not False
        self.side = optimizer.side
        self.ramp = torch.ones_like(sae.b_dec[0], requires_grad=False)
        self.is_general = is_general(sae)
        self.density = Density.of(sae)
        self.dense_step = DenseStep.of(sae, dead, self.density, self.dead_step)
        self._calls: dict[tuple[object, ...], int] = {}
        self._warm: set[tuple[object, ...]] = set()
        self._captured: dict[tuple[object, ...], Captured] = {}
        self.moments = tuple(name for name in optimizer.state[sae.W_dec] if name != "step")

    def _obstacle(self) -> str | None:
        """Why a step cannot be captured in a CUDA graph; None where it can."""
        W_dec, mesh = self.sae.W_dec, self.sae.mesh
        if not W_dec.is_cuda:
            return "it needs a CUDA device"
        if not has_triton():
            return (
                "triton is not installed, and plain PyTorch does what kernels would; "
                "pip install 'flash_sae_dist[gpu]'"
            )
        if not use_kernels(W_dec):
            return f"the reference, which serves {W_dec.dtype}, reads the host"
        if mesh.members > 1 and (backend := dist.get_backend(mesh.member_group)) != "nccl":
            return f"collectives of {backend} cannot be captured, only NCCL's"
        return None

    @property
    def encoder_weights(self) -> Tensor:
        """See Engine."""
        return self.optimizer.compute_weights[0]

    def set_unit(self, unit: float) -> None:
        """See Engine."""
        self.optimizer.unit = self.dead_step.unit = unit
        self._captured.clear()

    def refresh_(self) -> None:
        """See Engine."""
        self.optimizer.refresh_copies_()

    def average(self, param: Tensor) -> Tensor:
        """See Engine."""
        return self.optimizer.average(param)

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor], step: int) -> None:
        """Copies in place, so that a captured graph stays valid."""
        for name, param in self.sae.named_parameters():
            param.copy_(state[name])
            own = self.optimizer.state[param]
            own["step"].fill_(float(step))
            for moment in self.moments:
                own[moment].copy_(state[f"{moment}.{name}"])
        self.refresh_()

    @torch.no_grad()
    def step(
        self, x: Tensor, timer: PhaseTimer | None = None, y: Tensor | None = None
    ) -> StepMetrics:
        """See Engine. The timer's phases are encode, decode and optimizer, or fused_step where a
        graph is replayed, which is one piece to the host.
        """
        timer = timer or PhaseTimer(x.device, enabled=False)
        # The kernels read any type; the reference computes in that of its input.
        x = x if x.is_cuda else x.to(self.sae.b_dec.dtype)
        y = x if y is None else y if y.is_cuda else y.to(self.sae.b_dec.dtype)
        with on_device(self.sae.W_dec):
            return self._train(Rows(x, y), timer)

    def _train(self, rows: Rows, timer: PhaseTimer) -> StepMetrics:
        if self.optimizer.sync_group_():
            self._captured.clear()
        revives = self.kind != "none" and self.dead.any_listed
        if self.density is not None and self.density.is_dense:
            return self.shown(self._dense_work(rows, revives, timer))
        if not self.graph:
            return self.shown(self._step(rows, revives, timer))
        kind = (rows.x.shape, rows.x.dtype, revives)
        key = (*kind, self.dead_step.shape() if revives else None, self.room)
        if key not in self._captured:
            # Another list of dead latents may need kernels of other sizes: one call warms them up.
            self._calls[key] = self._calls.get(key, 0) + 1
            eager = 1 if kind in self._warm else _EAGER_CALLS
            if self._calls[key] <= eager or not self._capture(rows, revives, key):
                return self.shown(self._step(rows, revives, timer))
            self._warm.add(kind)
        captured = self._captured[key]
        captured.rows.copy_(rows)
        captured.graph.replay()
        if captured.number is not None:
            with self.side.beside():
                number = HostCopy([captured.number])
            captured.rest[0].replay()
            if not self._fits(int(number.read()[0])):
                return self.shown(self._step(rows, revives, timer))
            captured.rest[1].replay()
        timer.mark("fused_step")
        return self.shown(captured.metrics.clone())

    def _capture(self, rows: Rows, revives: bool, key: tuple[object, ...]) -> bool:
        """Captures a step, or says why it cannot be and gives graphs up, on all members alike."""
        # Only the newest list of dead latents is used again.
        for old in [k for k in self._captured if k[:3] == key[:3]]:
            del self._captured[old]
        static, error, device = rows.copied(), "", rows.x.device
        graph = torch.cuda.CUDAGraph()
        try:
            # The loader's threads pin memory meanwhile, which a global capture takes for its own.
            timer = PhaseTimer(device, enabled=False)
            rest, number = [], None
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                if self.sae.varied_lengths:
                    begun, number = self._within(static)
                else:
                    metrics = self._step(static, revives, timer)
            if number is not None:
                rest = [torch.cuda.CUDAGraph() for _ in range(2)]
                with torch.cuda.graph(rest[0], graph.pool(), capture_error_mode="thread_local"):
                    made = self._made(begun, revives, timer)
                    self.side.meet()
                with torch.cuda.graph(rest[1], graph.pool(), capture_error_mode="thread_local"):
                    metrics = self._apply(made, timer)
        except (RuntimeError, torch.OutOfMemoryError) as e:
            error = " ".join(str(e).split())[:200]
        failed = torch.tensor(float(bool(error)), device=device)
        mesh = self.sae.mesh
        all_reduce_(failed, mesh.member_group, mesh.members, dist.ReduceOp.MAX)
        if bool(failed):
            self.graph = False
            if error or mesh.is_lead:
                logger.warning(
                    "the fused step runs without a CUDA graph, which is slower: %s",
                    error or "another process could not capture it",
                )
            return False
        self._captured[key] = Captured(graph, static, metrics, tuple(rest), number)
        return True

    def _fits(self, longest: int) -> bool:
        """Whether lists had room for all pairs; chooses that of the steps to come, anew where it
        was too little or is more than twice what is needed. The same on all members.
        """
        fits = longest <= self.room
        if not fits or 2 * _MORE_ROOM * longest < self.room:
            self.room = padded(math.ceil(_MORE_ROOM * longest))
        return fits

    def _within(self, rows: Rows) -> tuple[Begun, Tensor]:
        """A step up to the selection, into lists of the room that there is; pairs of the longest
        list of all members.
        """
        sae, mesh = self.sae, self.sae.mesh
        assert isinstance(sae, ThresholdCoder)
        batch, _ = self._begin(rows)
        lists = [
            sae.select_within(xc, self.encoder_weights, sae.b_enc.detach(), self.room)
            for xc in batch.xc.chunk(self.micro_batches)
        ]
        numbers = [number for _, number in lists]
        number = torch.stack(numbers).amax() if len(numbers) > 1 else numbers[0]
        all_reduce_(number, mesh.member_group, mesh.members, dist.ReduceOp.MAX)
        self.side.meet()
        return Begun(batch, None, [found for found, _ in lists], True), number

    def _step(self, rows: Rows, revives: bool, timer: PhaseTimer) -> Tensor:  # [4 + S]
        try:
            return self._work(rows, revives, timer)
        finally:
            # Even where memory ran out midway: what crosses streams is freed after this.
            self.side.meet()

    def _work(self, rows: Rows, revives: bool, timer: PhaseTimer) -> Tensor:  # [4 + S]
        if self.graph and self.sae.varied_lengths:
            return self._apply(self._made(self._fitting(rows), revives, timer), timer)
        batch, ready = self._begin(rows)
        found = [
            self.sae.select(xc, self.encoder_weights, self.sae.b_enc.detach())
            for xc in batch.xc.chunk(self.micro_batches)
        ]
        timer.mark("encode")
        return self._apply(self._made(Begun(batch, ready, found, False), revives, timer), timer)

    def _fitting(self, rows: Rows) -> Begun:
        """A step up to the selection in the room that a replay has: sums over lists of other
        lengths round otherwise.
        """
        self.room = self.room or padded(1)
        while True:
            begun, number = self._within(rows)
            if self._fits(int(number)):
                return begun

    def _made(self, begun: Begun, revives: bool, timer: PhaseTimer) -> Made:
        """A step from the selection to the optimizer's, which changes nothing. The order of pairs
        is made beside the decoder where these are all pairs of the step.
        """
        sae, mesh = self.sae, self.sae.mesh
        batch, ready, selected, within = begun
        found = by_level(sae, selected, len(batch.y))
        alone = self.micro_batches == 1 and mesh.num_replicas == 1
        order, ordered = None, None
        if alone:
            ((codes, _),) = found
            with self.side.beside():
                order = self._order(codes.latents, used_slots(sae, codes))
                ordered = self.side.mark()
        self.side.wait(ready)
        listed: Listed | None = None
        if revives:
            with self.side.beside():
                listed = self.dead_step.begin(self.optimizer.compute_weights)
                ready = self.side.mark()
        parts = self._forward(batch, found)
        timer.mark("decode")
        local = join_pairs(parts, batch.xc)
        dead: DenseRows | None = None
        aux: AuxLoss | None = None
        if listed is not None:
            self.side.wait(ready)
            residual = joined([part.made.residual for part in parts])
            dead, aux = self.dead_step(residual, batch.xc, listed, batch.inverse, self.side)
            # The side stream's memory: what it is given next waits for the products that read it.
            del listed
            timer.mark("dead")
        if sae.varied_lengths and not within:
            local = same_length(local, mesh)
        pairs = gather_pairs(local, batch.xc_all, mesh)
        if order is None:
            order = self._order(
                pairs.latents, has_gradient(pairs) if self.is_general else pairs.dec_coef
            )
        self.side.wait(ordered)
        return Made(batch, parts, pairs, order, dead, aux, alone)

    def _apply(self, made: Made, timer: PhaseTimer) -> Tensor:  # [4 + S]
        """The optimizer's step, and what else a step changes."""
        batch, parts, pairs, order = made[:4]
        with self.side.beside():
            if self.sae.varied_lengths:
                self.optimizer.advance_()
            advanced = self.side.mark()
            grads = own_gradients(self.sae, parts, order if made.alone else None)
            own, bias = split_bias(self.sae, grads)
            if bias is not None:
                advanced = self.side.mark()
            # Those of the first level: what the gradients of all reconstructions come to.
            sizes = (self.sae.mesh.num_replicas, -1, len(batch.y), self.sae.d_out)
            given = pairs.dec_rows.view(sizes)[:, 0].flatten(0, 1)
            b_dec = given.sum(dim=0, dtype=batch.scale.dtype) * batch.scale
            metrics = self._metrics(self._totals(parts), made.aux, batch)
            self._count_active(parts, pairs, batch.tokens)
            if not self.sae.sources:
                self.sae.observe_([part.codes for part in parts])
        self.side.wait(advanced)
        own = with_skip(self.sae, own, given, pairs.enc_rows, batch.scale)
        self._update(LatentGradients(pairs, order, b_dec, made.dead, own, bias))
        if self.sae.sources:
            # A crosscoder's thresholds depend on decoder rows, which the step moves.
            self.sae.observe_([part.codes for part in parts])
        timer.mark("optimizer")
        return metrics

    def _dense_work(self, rows: Rows, revives: bool, timer: PhaseTimer) -> Tensor:  # [4 + S]
        """A step as dense products, all on the current stream."""
        batch, _ = self._begin(rows)
        self.side.meet()
        self.optimizer.advance_()
        assert self.dense_step is not None
        shared = self._shared(batch)
        found, gradients, aux = self.dense_step(batch.y, batch.xc, shared, revives, self.optimizer)
        timer.mark("forward")
        totals = Totals(found.squares, found.active, found.penalty, found.residual)
        metrics = self._metrics(totals, aux, batch)
        self._update(gradients)
        timer.mark("optimizer")
        return metrics

    def _shared(self, batch: StepBatch) -> Batch:
        W_dec = self.optimizer.compute_weights[1]
        return Batch(batch.inverse, batch.tokens, self.optimizer.unit, self.ramp, W_dec=W_dec)

    def _update(self, gradients: LatentGradients) -> None:
        self.optimizer.gradients = gradients
        self.optimizer.step()
        self.sae.project_()

    def _forward(self, batch: StepBatch, found: list[tuple[Codes, Nest]]) -> list[Forward]:
        """Decodes the micro-batches."""
        sae, parts = self.sae, batch.y.chunk(self.micro_batches)
        shared = self._shared(batch)
        if sae.needs_l0:
            l0 = torch.stack([(sae.activate(codes).values > 0).sum() for codes, _ in found]).sum()
            l0 = l0.to(batch.scale.dtype)
            all_reduce_(l0, sae.mesh.member_group, sae.mesh.members)
            shared = shared._replace(l0=l0 / batch.tokens)
        W_dec = self.optimizer.compute_weights[1]
        return [
            pair_forward(sae, W_dec, part, codes, nest, shared, batch.scale, self.side)
            for part, (codes, nest) in zip(parts, found, strict=True)
        ]

    def _count_active(self, parts: list[Forward], pairs: PairGradients, tokens: int) -> None:
        """Counts which latents fire, of all replicas."""
        values = joined([part.active.values for part in parts])
        latents = joined([part.active.latents for part in parts])
        count_fired_ = implementation("count_fired_", self.sae.W_dec)
        since = self.dead.tokens_since_fired
        if self.sae.mesh.num_replicas == 1:
            count_fired_(since, values, latents, tokens)
        elif self.is_general:
            self.dead.update_(values, latents, tokens)
        else:
            count_fired_(since, pairs.dec_coef, pairs.latents, tokens)

    def _begin(self, rows: Rows) -> tuple[StepBatch, torch.cuda.Event | None]:
        """Centres the batch; its variance and Adam's scalars are made on the side stream."""
        sae, mesh, (x, y) = self.sae, self.sae.mesh, rows
        dtype, tokens = self.encoder_weights.dtype, len(x) * mesh.num_replicas
        xc, sums, squares = implementation("centre", sae.W_dec)(y, sae.b_dec.detach(), dtype)
        if sae.transcodes:
            xc = x.to(dtype).contiguous()
        if sae.W_skip is not None:
            y = y.to(sae.b_dec.dtype) - product(xc, sae.W_skip.detach().to(dtype).T)
        with self.side.beside():
            xc_all = all_gather(xc, mesh.replica_group, mesh.num_replicas).flatten(0, 1)
            both = torch.cat([sums.sum(dim=0), squares.sum().view(1)])
            all_reduce_(both, mesh.replica_group, mesh.num_replicas)
            # b_dec lies near the mean, so little cancels.
            if self.loss == "fvu":
                inverse = inverse_variance(both[:-1], both[-1], tokens)
            else:
                inverse = torch.full_like(both[-1], 1 / tokens)
            scale = 2 * inverse
            if not self.sae.varied_lengths:
                self.optimizer.advance_()
        return StepBatch(xc, xc_all, y, inverse, scale, tokens, (sums, squares)), self.side.mark()

    def _order(self, latents: Tensor, coef: Tensor) -> PairOrder:
        order: PairOrder = implementation("order_pairs", self.sae.W_dec)(
            latents, self.sae.d_sae_local, coef
        )
        return order

    def _totals(self, parts: list[Forward]) -> Totals:
        squares = torch.stack([part.made.squares.sum() for part in parts]).sum()
        active = torch.stack([(part.active.values > 0).sum() for part in parts]).sum()
        penalties = [part.penalty for part in parts if part.penalty is not None]
        penalty = torch.stack(penalties).sum() if penalties else torch.zeros_like(squares)
        return Totals(squares, active, penalty, joined([part.made.residual for part in parts]))

    def _metrics(self, totals: Totals, aux: AuxLoss | None, batch: StepBatch) -> Tensor:  # [4 + S]
        """FVU, the dead latents' loss, L0 and the penalty of the whole batch, and a crosscoder's
        FVU of each hookpoint. Collective over the members.
        """
        mesh, squares = self.sae.mesh, totals.squares
        active = totals.active.to(squares.dtype)
        all_reduce_(active, mesh.shard_group, mesh.num_shards)
        loss = torch.zeros_like(squares) if aux is None else aux.total()
        fields = [squares * batch.inverse, loss, active / batch.tokens, totals.penalty]
        metrics = torch.stack([field.to(squares.dtype) for field in fields])
        all_reduce_(metrics, mesh.replica_group, mesh.num_replicas)
        if sources := self.sae.sources:
            sums = source_sums(totals.residual, batch.xc, sources)
            fvus = source_fvus(sums, sources, batch.tokens, mesh)
            metrics = torch.cat([metrics, fvus.to(metrics.dtype)])
        if self.density is not None:
            self.density.saw_(metrics[2])
        return metrics
