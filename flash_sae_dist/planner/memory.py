"""Memory of a rank that trains an SAE: what its engine keeps, and what a step takes beside it.

Legend: N tokens a step, R replicas, P shards, n = N / R, D d_in, F d_sae / P, K slots a token,
M listed dead latents, padded.

What is kept is exact for the TopK family, a test compares it with engines' tensors; others' vectors
a latent, and a transcoder's other width and its W_skip, are not in it. What a step takes follows
the fused engine's kernels and the autograd engine's saved tensors; beside docs/performance.md's
measured peaks of TopK it is within a tenth (tests/test_planner.py). What other architectures'
lists take, and DeepSpeed for its sums, are estimates.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch

from ..activations.feed import num_buffers
from ..activations.store import storage_dtype
from ..activations.stored_rows import float_dtype
from ..config.deepspeed import ZeroOptimization, zero_of
from ..config.sae import SAEConfig
from ..config.train import DeepSpeedTrainConfig, TrainConfig
from ..kernels.encode_plan import FLAT_BYTES
from ..kernels.reference import num_candidates
from ..models import ARCHITECTURES
from ..models.crosscoder import Crosscoder
from ..models.dead_latents import padded
from ..models.matryoshka import MatryoshkaConfig
from ..models.multi_topk import MultiTopK, MultiTopKConfig
from ..models.threshold import ThresholdCoder
from ..models.topk import TopKSAE
from ..training.defaults import with_defaults
from ..training.eight_bit import BLOCK, check_eight_bit, wants_eight_bit
from ..training.engine import choose_engine
from ..training.engines.dead_step import MAX_BLOCK_BYTES
from ..training.engines.density import BLOCK_ELEMENTS, SHARES
from ..training.job import Config
from ..training.step import resolve_precision

# Slots a token of an architecture that has no k, once it is trained: for times and bytes sent.
_SLOTS = 64
# Of the encoder's lists or its pre-activations: docs/notes/encoder.md.
_ENCODER_BYTES = 63 << 20
# The reference encodes rows in blocks of so many pre-activations (kernels/reference_encode.py),
# beside which a selection holds as much again.
_REFERENCE_ELEMENTS, _REFERENCE_COPIES = 1 << 25, 3
# What the loader stages on a GPU: parts of 16 MiB, a block more, indices.
_STAGED_BYTES = 18 << 20
# What a captured step keeps of its batch, bytes an element: fitted to five runs of `train`, which
# took 1 to 13 beyond all else (docs/notes/planner.md).
_CAPTURED_BYTES = 8
# A latent's share that is dead, for figures that need one.
DEAD_SHARE = 0.1
# What a stream's rows are called among what its model takes.
BUFFER = "train.buffer_tokens"


class Streamed(NamedTuple):
    """What a model that runs beside the steps (train.source=stream) takes of a process."""

    weights: int  # bytes
    a_pass: int  # bytes of a forward pass beside them
    buffer: int  # bytes of the rows of the SAE's hookpoint that are mixed
    flops: float  # of a token that is trained on, up to the last hookpoint


class Work(NamedTuple):
    """What of a job decides what it takes."""

    name: str
    d_in: int
    d_sae: int
    k: int
    train: TrainConfig
    engine: Literal["fused", "autograd", "deepspeed"]
    compute: torch.dtype
    row_bytes: int  # of an element of a batch, as the loader gives it
    on_gpu: bool
    stored_bytes: int  # of the same element in the store
    zero: ZeroOptimization | None = None  # of the deepspeed engine
    stream: Streamed | None = None  # where a model is planned, too
    rule: Literal["token", "batch", "threshold"] = "token"  # by which latents are active
    levels: int = 1  # nested reconstructions
    widest: int = 1  # candidates for each of the k
    pairwise: bool = False  # whether its activations are functions of pre-activations
    crosses: bool = False  # whether rows of several hookpoints are put side by side
    searches_fp8: bool = False

    @property
    def offloads(self) -> bool:
        """Whether Adam and its moments are on the host and not on the GPU."""
        return self.zero is not None and self.on_gpu and self.zero.offload_optimizer.device == "cpu"

    @property
    def master(self) -> int:
        """Bytes of a master weight."""
        return 8 if self.compute == torch.float64 else 4

    @property
    def moment(self) -> int:
        """Bytes of an element of a matrix's moment."""
        halves = getattr(self.train, "moment_dtype", "float32") == "bfloat16"
        return 2 if halves and self.master == 4 else self.master

    @property
    def averages(self) -> bool:
        """Whether a running average of the weights is kept."""
        return getattr(self.train, "ema_decay", None) is not None

    @property
    def revives(self) -> bool:
        """Whether dead latents have gradients of their own."""
        return self.train.dead_latents in ("auxk", "ghost")

    @property
    def k_aux(self) -> int:
        """Dead latents that a token uses."""
        return min(self.train.k_aux or max(1, self.d_in // 2), self.d_sae)

    @property
    def steps(self) -> int:
        """Steps of the whole job."""
        return -(-self.train.num_tokens // self.train.batch_tokens)

    def slots(self, num_shards: int, num_replicas: int = 1) -> int:
        """Candidates of a token on a shard. By the batch rule one replica's tokens may have all
        pairs of the batch, for which each keeps room.
        """
        most = self.k * self.widest * (num_replicas if self.rule == "batch" else 1)
        return min(most, self.d_sae // num_shards)

    def most_slots(self, num_shards: int, num_replicas: int = 1) -> int:
        """The same where it is largest: where more are above thresholds, steps are dense."""
        if self.rule == "threshold":
            enter, _ = SHARES["cuda" if self.on_gpu else "cpu"]
            return max(1, math.ceil(enter * self.d_sae / num_shards))
        return self.slots(num_shards, num_replicas)

    def listed(self, num_shards: int, share: float) -> int:
        """Rows of a shard's list where a share of the latents is dead; 0 where none are revived."""
        count = round(share * (self.d_sae // num_shards)) if self.revives else 0
        return padded(count) if count else 0


def work_of(name: str, config: Config, d_in: int, dtype: str, *, on_gpu: bool) -> Work:
    """What of a job's config decides what it takes, at a hookpoint of some width in a store of some
    dtype. Raises ConfigError where the config does not fit that width.
    """
    sae, train = config.sae, config.train
    assert sae is not None
    assert train is not None
    d_sae = sae.width(d_in)
    train = with_defaults(train, sae, d_in)
    check_eight_bit(train, (1, d_in))
    device = torch.device("cuda" if on_gpu else "cpu")
    kind = ARCHITECTURES[sae.architecture]
    by_batch: Literal["threshold", "batch"] = (
        "threshold" if issubclass(kind, ThresholdCoder) else "batch"
    )
    return Work(
        name,
        d_in,
        d_sae,
        min(getattr(sae, "k", _SLOTS), d_sae),
        train,
        choose_engine(train, sae).engine,
        resolve_precision(train.precision, device),
        float_dtype(dtype).itemsize,
        on_gpu,
        storage_dtype(dtype).itemsize,
        zero_of(train) if isinstance(train, DeepSpeedTrainConfig) else None,
        rule="token" if issubclass(kind, TopKSAE) else by_batch,
        levels=_levels(sae, d_in),
        widest=MultiTopK.times if issubclass(kind, MultiTopK) else 1,
        pairwise=kind.is_pairwise,
        crosses=issubclass(kind, Crosscoder),
        searches_fp8=getattr(sae, "search", "exact") != "exact",
    )


def _levels(sae: SAEConfig, d_in: int) -> int:
    if isinstance(sae, MatryoshkaConfig):
        return len(sae.widths(d_in))
    return len(MultiTopK.level_weights) if isinstance(sae, MultiTopKConfig) else 1


class Memory(NamedTuple):
    """Bytes of a rank by what they hold."""

    kept: dict[str, int]  # from the first step to the last
    step: dict[str, int]  # while a step is made
    feed: dict[str, int]  # batches ahead and rows in memory, which the jobs of a bundle share
    model: dict[str, int]  # of a stream: its model and its rows, which they share as well

    @property
    def own(self) -> int:
        """Of one SAE, without what it shares."""
        return sum(self.kept.values()) + sum(self.step.values())

    @property
    def peak(self) -> int:
        """Of a rank that trains this SAE alone."""
        return self.own + sum(self.feed.values()) + sum(self.model.values())


def kept_bytes(work: Work, num_shards: int) -> dict[str, int]:
    """What an engine keeps on each shard; of the deepspeed engine what a shard's replicas keep
    together, wherever it is.
    """
    D, F = work.d_in, work.d_sae // num_shards
    matrices, vectors = 2 * F * D, F + D
    whole = (matrices + vectors) * work.master
    fused = work.engine == "fused"
    kept = {"weights": whole}
    if fused and work.compute.itemsize != work.master:
        kept["compute copies"] = matrices * work.compute.itemsize
    kept["moments"] = 2 * (matrices * work.moment + vectors * work.master) if fused else 2 * whole
    if wants_eight_bit(work.train):
        # Two of one byte and their scales.
        kept["moments"] = 2 * (matrices + matrices // BLOCK * 4 + vectors * 4)
    elif work.train.optimizer == "muon":
        kept["moments"] -= matrices * work.master
    elif work.train.optimizer == "signum":
        kept["moments"] = whole
    if work.averages:
        kept["running average"] = whole
    if not fused:
        kept["gradients"] = whole
    # int64 tokens since each latent fired, int32 place among the dead.
    kept["counters"] = 12 * F
    return kept


def _zero_bytes(work: Work, num_shards: int, num_replicas: int) -> dict[str, int]:
    """What ZeRO keeps on each of R replicas of a shard, without its padding."""
    D, F = work.d_in, work.d_sae // num_shards
    matrix = F * D * work.master
    whole = 2 * matrix + (F + D) * work.master
    kept = {"weights": whole, "counters": 12 * F}
    part = -(-whole // num_replicas)
    if work.offloads:
        kept["offload buffer"] = matrix
    else:
        kept |= {"master weights": part, "moments": 2 * part}
    assert work.zero is not None
    if work.zero.stage == 1 or not work.offloads:
        kept["gradients"] = whole if work.zero.stage == 1 else part
    return kept


def step_bytes(work: Work, num_shards: int, num_replicas: int, dead: float) -> dict[str, int]:
    """What a step takes beside that, a share of the latents being dead."""
    make = _fused_step if work.engine == "fused" else _autograd_step
    return make(work, num_shards, num_replicas, work.listed(num_shards, dead))


def _batch_bytes(work: Work, num_replicas: int) -> int:
    """The batch as the step takes it, centred in the compute dtype, and its residual."""
    n, D = work.train.batch_tokens // num_replicas, work.d_in
    divided = work.master if work.train.normalize != "none" or work.crosses else 0
    given = max(work.row_bytes, divided) * (2 if divided else 1)
    given += work.row_bytes if work.crosses else 0
    return n * D * (given + 2 * work.compute.itemsize)


def _encoder_bytes(work: Work, F: int, n: int, slots: int) -> int:
    if work.crosses and work.rule != "threshold":
        # Its rows multiplied by the decoder's norms.
        plain = _encoder_bytes(work._replace(crosses=False), F, n, slots)
        return plain + F * work.d_in * work.compute.itemsize
    if work.on_gpu and work.compute.itemsize < 8:
        more = _fp8_bytes(work, F, n) if work.searches_fp8 else 0
        if work.rule != "token":
            # Keys, counts a token, a sample's products (kernels/encode_flat.py).
            more += 8 * (6 * n * slots + 4096) + (FLAT_BYTES + 4 * 512) * n
        return _ENCODER_BYTES + more
    # The reference multiplies in float32.
    copy = F * work.d_in * work.master if work.compute.itemsize < work.master else 0
    block = min(n * F, max(_REFERENCE_ELEMENTS, F))
    return _REFERENCE_COPIES * block * work.master + copy


def _fp8_bytes(work: Work, F: int, n: int) -> int:
    """e4m3 copies of W_enc and of the tokens, scales and what comes of them, candidates."""
    wide = num_candidates(min(work.k * work.widest, F), F)
    return (F + n) * work.d_in + 3 * 4 * (F + n) + n * wide * 3 * 4


def _fused_step(work: Work, P: int, R: int, M: int) -> dict[str, int]:
    N, D, F, K = work.train.batch_tokens, work.d_in, work.d_sae // P, work.most_slots(P, R)
    n, wide, narrow = N // R, work.master, work.compute.itemsize
    # Values, indices and two coefficients a pair; their order, with numbers and places.
    pairs = n * K * (3 * wide + 4) + N * K * 4 * 4 + 8 * F
    if R > 1:
        pairs += N * K * 3 * wide * 2 + 2 * N * D * narrow
    found = {"batch": _batch_bytes(work, R), "pairs": pairs}
    part = -(-n // work.train.micro_batches)
    encode = _encoder_bytes(work, F, part, K)
    if P > 1:
        # Everyone's candidates, gathered, in order, as sort keys; partial reconstructions.
        gathered = 0 if work.rule != "token" else 10 * wide * part * K * P
        encode = max(encode, gathered, 2 * wide * part * D)
    if work.rule == "threshold":
        dense = found["batch"] + _dense_step(work, F, n)
        if dense > sum(found.values()) + encode:
            return {"batch": found["batch"], "dense step": dense - found["batch"]}
    if not M:
        return found | {"encoder": encode}
    return found | {"encoder and dead latents": max(encode, _dead_bytes(work, n, M))}


def _dense_step(work: Work, F: int, n: int) -> int:
    """All pairs of a block of tokens, and both gradients of a block beside their sums."""
    block = min(n * F, max(BLOCK_ELEMENTS["cuda" if work.on_gpu else "cpu"], F))
    gradients = 2 * F * work.d_in * work.master
    return 10 * block * work.master + gradients * (1 if block == n * F else 2)


def dead_block(work: Work, M: int) -> int:
    """Tokens of a product over M dead latents, of which longer batches have several."""
    return max(1, MAX_BLOCK_BYTES // (4 * M))


def _dead_bytes(work: Work, n: int, M: int) -> int:
    """Products over M dead latents: their rows, a block's activations, dense gradients."""
    D, wide, narrow = work.d_in, work.master, work.compute.itemsize
    b = min(n, dead_block(work, M))
    listed, gradients = 2 * M * D * narrow, 2 * M * D * wide * (1 if b == n else 2)
    forward = b * M * (wide + narrow)
    backward = 2 * b * M * narrow + gradients + b * D * (wide + narrow)
    return listed + max(forward, backward)


def _autograd_step(work: Work, P: int, R: int, M: int) -> dict[str, int]:
    D, F, K = work.d_in, work.d_sae // P, work.most_slots(P, R)
    n, wide, narrow = work.train.batch_tokens // R, work.master, work.compute.itemsize
    part = -(-n // work.train.micro_batches)
    pairs = 8 * n * K * wide
    if work.rule == "threshold":
        block = max(BLOCK_ELEMENTS["cuda" if work.on_gpu else "cpu"], F)
        block = min(part * F, block) if work.train.loss == "fvu" else part * F
        pairs = max(pairs, 10 * wide * block)
    found = {"batch": _batch_bytes(work, R) + 4 * part * D * wide, "pairs": pairs}
    encode = _encoder_bytes(work, F, part, K)
    if P > 1 and work.rule == "token":
        encode = max(encode, 10 * wide * part * K * P)
    # Copies that autocast makes, or a gradient's part along the decoder rows.
    copies = 2 * F * D * narrow if narrow != wide else 0
    more = F * D * wide * (2 if work.train.micro_batches > 1 else 1)
    dense = max(copies, more)
    if work.train.optimizer == "muon":
        # A matrix's update, and what Newton-Schulz makes of it, twice.
        dense = max(dense, F * D * (wide + 3 * (8 if wide == 8 else 2)))
    if work.zero is not None:
        # With stage 2 the gradient that ZeRO has not split yet, or with offload both, which it
        # copies to the host (measured); what it flattens for Adam.
        split = F * D * wide * (work.zero.stage - 1) * (2 if work.offloads else 1)
        dense = max(copies + split, 0 if work.offloads else 2 * F * D * wide // R)
    if M:
        # Pre-activations and masks are saved. The gradient of picked rows is as large as all, but
        # is gone where copies are made (measured on a GPU).
        dense += 2 * M * D * (wide + narrow) + 4 * part * M * wide
        dense += 0 if copies else F * D * wide
    return found | {"encoder": encode, "dense products": dense}


def feed_bytes(work: Work, num_replicas: int, preloaded: int = 0) -> dict[str, int]:
    """Batches ahead of the step; preloaded are the bytes of rows that stay on the device."""
    elements = work.train.batch_tokens // num_replicas * work.d_in
    batch = elements * work.row_bytes
    if not work.on_gpu:
        return {"batches ahead": batch}
    staged = 0 if work.train.source == "stream" else _STAGED_BYTES
    captured = _CAPTURED_BYTES * elements
    feed = {"batches ahead": num_buffers(batch) * batch + staged, "captured steps": captured}
    return feed | {"rows": preloaded} if preloaded else feed


def _model_bytes(stream: Streamed | None) -> dict[str, int]:
    if stream is None:
        return {}
    told = {"model": stream.weights, "a forward pass": stream.a_pass, BUFFER: stream.buffer}
    return {what: size for what, size in told.items() if size}


def memory_of_rank(
    work: Work, num_shards: int, num_replicas: int, *, dead: float = 0.0, preloaded: int = 0
) -> Memory:
    """Memory of each rank of P shards x R replicas, a share of the latents being dead."""
    kept = kept_bytes(work, num_shards)
    if work.zero is not None:
        kept = _zero_bytes(work, num_shards, num_replicas)
    return Memory(
        kept,
        step_bytes(work, num_shards, num_replicas, dead),
        feed_bytes(work, num_replicas, preloaded),
        _model_bytes(work.stream),
    )
