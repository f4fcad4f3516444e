"""Bytes that a rank contributes to the collectives of a step, one by one.

Legend: N tokens a step, R replicas, P shards, n = N / R, D d_in, F d_sae / P, K slots a token, M
listed dead latents of a shard, padded. docs/notes/several-gpus.md has the same as tables; a test
compares those of the TopK family with collectives counted around torch.distributed. What
selections by threshold send is an estimate: their lists are as long as many latents are active.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from .memory import Work, dead_block

Group = Literal["shards", "replicas", "members"]
Kind = Literal["all_gather", "all_reduce"]
_COUNT = 4  # bytes


class Sent(NamedTuple):
    """A collective of a step."""

    what: str
    kind: Kind
    group: Group
    calls: int
    bytes: int  # of all calls, that a rank contributes


def step_sent(work: Work, num_shards: int, num_replicas: int, dead: int = 0) -> list[Sent]:
    """The collectives of one step; `dead` are the latents of this shard that are listed as dead."""
    make = _fused if work.engine == "fused" else _autograd
    listed = work.listed(num_shards, dead / (work.d_sae // num_shards)) if dead else 0
    # Shards' lists are about as long as one another.
    selects = dead * num_shards > work.k_aux
    found = make(work, num_shards, num_replicas, listed, selects)
    size = {"shards": num_shards, "replicas": num_replicas, "members": num_shards * num_replicas}
    return [sent for sent in found if size[sent.group] > 1 and sent.calls]


def batch_sent(work: Work, num_shards: int, num_replicas: int) -> list[Sent]:
    """The gather of a batch over the shards that each read a part of, beside the step."""
    if num_shards == 1:
        return []
    rows = work.train.batch_tokens // (num_shards * num_replicas)
    return [Sent("batch", "all_gather", "shards", 1, rows * work.d_in * work.row_bytes)]


def _selection(work: Work, n: int, P: int, passes: int, nested: int) -> list[Sent]:
    """Which candidates are active, in so many passes over n tokens; nested is how often the token
    rule looks among them where reconstructions are.
    """
    wide, parts = work.master, work.train.micro_batches
    calls = passes * parts
    if work.rule == "threshold":
        return []
    if work.rule == "token":
        times = passes if work.levels == 1 else nested
        # An index travels as wide as the value beside it.
        size = times * n * work.slots(P) * 2 * wide
        return [Sent("candidates", "all_gather", "shards", times * parts, size)]
    return [
        # A round decides a byte of the values' sort keys.
        Sent("counts of digits", "all_reduce", "members", wide * calls, wide * calls * 1024),
        Sent("ties", "all_gather", "members", calls, passes * n * _COUNT),
        Sent("least activation", "all_reduce", "members", 1, wide),
    ]


def _pairs(work: Work, n: int, P: int, R: int) -> list[Sent]:
    """What each pair adds to its latent's gradients: its index and two coefficients, in a flat list
    its token too, with nested reconstructions its row of their residuals.
    """
    wide, F = work.master, work.d_sae // P
    slots = n * work.slots(P, R)
    columns = 3 + (work.rule != "token") + (work.levels > 1)
    found = [Sent("pairs", "all_gather", "replicas", 1, slots * columns * wide)]
    if work.levels == 1 and not work.pairwise:
        return found
    return [*found, Sent("latents that fired", "all_reduce", "replicas", 1, 4 * F)]


def _fused(work: Work, P: int, R: int, M: int, selects: bool) -> list[Sent]:
    n, parts = work.train.batch_tokens // R, work.train.micro_batches
    D, wide, narrow = work.d_in, work.master, work.compute.itemsize
    clips = work.train.grad_clip is not None
    found = [
        # A nested reconstruction's latents are found among the others'.
        *_selection(work, n, P, 1, 2),
        Sent("reconstruction", "all_reduce", "shards", parts, work.levels * n * D * wide),
        Sent("gradient of b_dec, L0", "all_reduce", "shards", 2, (D + 1) * wide),
        Sent("norm of the gradient", "all_reduce", "shards", int(clips), 2 * wide * clips),
        *_pairs(work, n, P, R),
        Sent(
            "rows of x, residuals", "all_gather", "replicas", 2, (1 + work.levels) * n * D * narrow
        ),
        Sent("variance, metrics", "all_reduce", "replicas", 2, (D + 1 + 4) * wide),
    ]
    return found + _dead(work, n, M, selects) if M else found


def _dead(work: Work, n: int, M: int, selects: bool) -> list[Sent]:
    D, wide = work.d_in, work.master
    blocks = -(-n // min(n, dead_block(work, M)))
    digits = wide * blocks * selects
    auxk = int(work.train.dead_latents == "auxk")
    return [
        Sent("dead: reconstruction", "all_reduce", "shards", blocks, n * D * wide),
        Sent("dead: counts of digits", "all_reduce", "shards", digits, n * 1024 * wide * selects),
        Sent("dead: ties", "all_gather", "shards", blocks * selects, n * _COUNT * selects),
        Sent("dead: gradients", "all_reduce", "replicas", 3, (2 * M * D + M) * wide),
        Sent("dead: variance", "all_reduce", "replicas", auxk, (D + 1) * wide * auxk),
    ]


def _gradients_sent(work: Work, R: int, whole: int) -> list[Sent]:
    """Dense gradients; with ZeRO the weights that each replica stepped, too."""
    if work.zero is None:
        return [Sent("dense gradients", "all_reduce", "replicas", 4, whole)]
    # Stage 2 sums those of each micro-batch.
    times = work.train.micro_batches if work.zero.stage == 2 else 1
    return [
        Sent("dense gradients", "all_reduce", "replicas", 4 * times, times * whole),
        Sent("weights", "all_gather", "replicas", 2, -(-whole // R)),
    ]


def _autograd(work: Work, P: int, R: int, M: int, selects: bool) -> list[Sent]:
    n, parts = work.train.batch_tokens // R, work.train.micro_batches
    D, F, wide = work.d_in, work.d_sae // P, work.master
    clips = work.train.grad_clip is not None
    # AuxK's normaliser takes a forward pass of its own, and its loss a gradient.
    passes, b_dec = 2 if M else 1, parts * D * wide
    recons = work.levels + passes - 1
    found = [
        # For the levels and for what counts as active; before AuxK's loss for the latter.
        *_selection(work, n, P, passes, 2 * passes + 1),
        Sent("reconstruction", "all_reduce", "shards", recons * parts, recons * n * D * wide),
        Sent("gradient of b_dec", "all_reduce", "shards", passes * parts, passes * b_dec),
        Sent("L0", "all_reduce", "shards", 1, wide),
        Sent("norm of the gradient", "all_reduce", "shards", int(clips), wide * clips),
        *_gradients_sent(work, R, (2 * F * D + F + D) * wide),
        Sent("latents that fired", "all_reduce", "replicas", 1, 4 * F),
        Sent("variance, metrics", "all_reduce", "replicas", 3, (D + 1 + 4) * wide),
    ]
    if not M:
        return found
    digits = wide * parts * selects
    return [
        *found,
        Sent("dead: reconstruction", "all_reduce", "shards", parts, n * D * wide),
        Sent("dead: counts of digits", "all_reduce", "shards", digits, n * 1024 * wide * selects),
        Sent("dead: ties", "all_gather", "shards", parts * selects, n * _COUNT * selects),
        Sent("dead: variance", "all_reduce", "replicas", parts, parts * (D + 1) * wide),
    ]
