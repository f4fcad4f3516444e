"""BatchTopK: the N k largest pre-activations of a batch of N tokens are active (Bussmann et al.
2024, arXiv 2412.06410); at inference those above a threshold, each token for itself.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from ..config.base import Beta
from ..config.sae import SAEConfig
from ..kernels import ops
from ..kernels.dispatch import implementation
from ..parallel.collectives import all_reduce_, feed_shards
from ..parallel.selection import global_batch_mask
from .base import Codes, Pairs, SparseCoder
from .ranks import ranked, unranked
from .threshold import encode_above
from .topk import TopKConfig


class BatchTopKConfig(TopKConfig):
    """BatchTopK sparse autoencoder."""

    architecture: Literal["batch_topk"] = "batch_topk"  # type: ignore[assignment]
    """batch_topk: the k largest pre-activations a token on the mean over a batch are active, at
    inference those above a threshold."""
    threshold_decay: Beta = 0.999
    """Decay a step of the moving average of a batch's least activation, the threshold at inference:
    0.999 is dictionary_learning's; SAELens's 1 - topk_threshold_lr is 0.99."""
    threshold_start: int = Field(default=1000, ge=0)
    """Steps before the average begins, until when the newest batch's stands for it (it falls fast
    at first): dictionary_learning's. SAELens averages from 0 at the first step on, which stays too
    low for some hundred steps."""


class BatchTopK(SparseCoder):
    """`recon = batchtopk(relu((x - b_dec) @ W_enc.T + b_enc)) @ W_dec + b_dec`; see SparseCoder.

    `train()` selects over the whole batch, all replicas and shards; `eval()`, which a loaded SAE is
    in, takes what exceeds `threshold` [d_sae_local]: the moving average while training, then what
    held-out rows calibrate for each latent.
    """

    Config: ClassVar[type[SAEConfig]] = BatchTopKConfig
    roles = SparseCoder.roles | {
        "threshold": "rows",
        "mean_threshold": "whole",
        "threshold_steps": "whole",
    }
    in_data_units = SparseCoder.in_data_units | {"threshold", "mean_threshold"}
    threshold: Tensor
    mean_threshold: Tensor
    threshold_steps: Tensor
    config: BatchTopKConfig

    def __init__(self, config: SAEConfig, d_in: int, **place: Any) -> None:
        super().__init__(config, d_in, **place)
        device, dtype = self.b_dec.device, self.b_dec.dtype
        self.register_buffer("threshold", torch.zeros_like(self.b_enc, requires_grad=False))
        self.register_buffer("mean_threshold", torch.zeros((), dtype=dtype, device=device))
        self.register_buffer("threshold_steps", torch.zeros((), dtype=dtype, device=device))

    def encode_rows(self, x: Tensor) -> Pairs:
        """See SparseCoder."""
        if not self.training:
            return encode_above(self, x, self.threshold)
        ranks = self.ranks()
        return unranked(self.selected(x, ranks), ranks)

    def selected(self, x: Tensor, per: Tensor | None = None) -> Pairs:
        """The N k largest activations of a batch x [N/R, d_in], or of their products with `per`
        [d_sae_local] > 0; differentiable. Collective over the members.
        """
        fed, b_dec = feed_shards(x, self.mesh), self.fed_centre()
        W_enc: Tensor = self.compute(self.W_enc)
        b_enc: Tensor = self.b_enc
        if per is not None:
            W_enc, b_enc = ranked(W_enc, b_enc, per)
        return self._kept(
            ops.batch_topk_encode(fed, W_enc, b_enc, self._offered, b_dec=b_dec), len(x)
        )

    def select(self, xc: Tensor, W_enc: Tensor, b_enc: Tensor) -> Pairs:
        """The same for the fused engine; see SparseCoder."""
        if (ranks := self.ranks()) is not None:
            W_enc, b_enc = ranked(W_enc, b_enc, ranks)
        encode = implementation("batch_topk_encode", W_enc)
        return unranked(self._kept(encode(xc, W_enc, b_enc, self._offered), len(xc)), ranks)

    @property
    def _offered(self) -> int:
        """Candidates a token of this rank: its tokens may have all that are active."""
        return min(self.config.k * self.mesh.num_replicas, self.d_sae_local)

    def _kept(self, found: Pairs, num_tokens: int) -> Pairs:
        total = self.config.k * num_tokens * self.mesh.num_replicas
        keep = global_batch_mask(found, total, self.mesh)
        return found if keep is None else found._replace(values=found.values * keep)

    @torch.no_grad()
    def observe_(self, active: list[Codes]) -> None:
        """See SparseCoder: the threshold's moving average, of activations as they are ranked."""
        least, ranks = self.mean_threshold.new_full((), torch.inf), self.ranks()
        for codes in active:
            used = codes.values.detach().to(least.dtype)
            if ranks is not None:
                used = used * ranks[codes.latents.long()]
            least = torch.minimum(least, used.masked_fill(used <= 0, torch.inf).amin())
        all_reduce_(least, self.mesh.member_group, self.mesh.members, dist.ReduceOp.MIN)
        late = self.threshold_steps > self.config.threshold_start
        decay = self.config.threshold_decay * late.to(least.dtype)
        mean = decay * self.mean_threshold + (1 - decay) * least
        # A batch without any activation has no least one.
        self.mean_threshold.copy_(torch.where(least.isfinite(), mean, self.mean_threshold))
        self.threshold_steps.add_(1)
        self.threshold.copy_(self.mean_threshold / (1 if ranks is None else ranks))
