"""dictionary_learning's dictionaries: modules whose parameters are views of an SAE's of this
library. `compat/dictionary_learning.py` gives them out.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..models.base import SAEOutput
from ..models.batch_topk import BatchTopKConfig
from ..models.matryoshka import MatryoshkaConfig
from .recipe import Watched, WatchedBatch, WatchedMatryoshka


def _unit(rows: Tensor) -> Tensor:
    norms: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / (norms + torch.finfo(rows.dtype).eps)


class Dictionary(nn.Module):
    """A dictionary whose parameters are views of an SAE's of this library."""

    # The SAE's matrix that the module holds transposed; its other parameters are the SAE's own.
    turned: ClassVar[str]
    k: Tensor
    threshold: Tensor

    def __init__(self, activation_dim: int, dict_size: int, k: int) -> None:
        super().__init__()
        self.activation_dim, self.dict_size = activation_dim, dict_size
        self.register_buffer("k", torch.tensor(k, dtype=torch.int))
        self.register_buffer("threshold", torch.tensor(-1.0))

    def _hold(self, sae: Any, rows: Tensor) -> None:
        """Takes an SAE, whose weights begin as these rows [dict_size, activation_dim]."""
        with torch.no_grad():
            sae.W_dec.copy_(_unit(rows))
            sae.W_enc.copy_(sae.W_dec)
        # In a list, whose modules are not this one's: no parameter twice.
        self._held = [sae]

    @property
    def sae(self) -> Any:
        """The SAE that is trained."""
        return self._held[0]

    def _tie(self) -> None:
        """Makes the transposed parameter a view of the SAE's."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The others are the SAE's own: moved by the module's walk.
        matrix = getattr(self.sae, self.turned)
        matrix.data = fn(matrix.data)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tie()
        return self

    def every(self, x: Tensor) -> Tensor:
        """All activations after ReLU."""
        sae = self.sae
        return torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)

    def decode(self, x: Tensor) -> Tensor:
        """The reconstruction of dense activations."""
        out: Tensor = x @ self.sae.W_dec + self.sae.b_dec
        return out

    @torch.no_grad()
    def scale_biases(self, scale: float) -> None:
        """Turns weights for rows into those for rows times scale."""
        self.sae.b_enc.mul_(scale)
        self.sae.b_dec.mul_(scale)
        if self.threshold >= 0:
            self.threshold.mul_(scale)

    @classmethod
    def from_pretrained(cls, path: str | Path, k: int | None = None, device: Any = None) -> Self:
        """Reads an `ae.pt`."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        stored = int(state["k"]) if "k" in state else k
        if k is not None and stored != k or stored is None:
            raise ValueError(f"k={k}, but {path} holds k={stored}")
        found = cls._of_state(state, stored)
        found.load_state_dict(state)
        return found if device is None else found.to(device)

    @classmethod
    def _of_state(cls, state: dict[str, Tensor], k: int) -> Self:
        raise NotImplementedError


class _AutoEncoder(Dictionary):
    """Those whose matrices are linear layers'."""

    turned = "W_dec"

    def __init__(self, activation_dim: int, dict_size: int, k: int) -> None:
        super().__init__(activation_dim, dict_size, k)
        # In the library's order, so that a seed gives its weights.
        self.decoder = nn.Linear(dict_size, activation_dim, bias=False)
        self.encoder = nn.Linear(activation_dim, dict_size)
        self._hold(self._made(activation_dim, dict_size, k), self.decoder.weight.detach().T)
        sae = self.sae
        self.encoder.weight, self.encoder.bias, self.b_dec = sae.W_enc, sae.b_enc, sae.b_dec
        self._tie()

    @staticmethod
    def _made(activation_dim: int, dict_size: int, k: int) -> Watched | WatchedBatch:
        raise NotImplementedError

    def _tie(self) -> None:
        self.decoder.weight.data = self.sae.W_dec.data.T

    @classmethod
    def _of_state(cls, state: dict[str, Tensor], k: int) -> Self:
        d_sae, d_in = state["encoder.weight"].shape
        return cls(d_in, d_sae, k)


class AutoEncoderTopK(_AutoEncoder):
    """dictionary_learning's TopK autoencoder."""

    @staticmethod
    def _made(activation_dim: int, dict_size: int, k: int) -> Watched:
        return Watched(activation_dim, dict_size, k, seed=None)

    def encode(
        self, x: Tensor, return_topk: bool = False, use_threshold: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        """Dense activations; with return_topk also the k's values, indices, and all after ReLU."""
        if not return_topk and not use_threshold:
            dense: Tensor = self.sae.encode_dense(x)
            return dense
        every, codes = self.every(x), self.sae.encode(x)
        values, indices = codes.values, codes.latents
        if use_threshold:
            acts = every * (every > self.threshold)
        else:
            acts = torch.zeros_like(every).scatter(-1, indices.long(), values)
        return (acts, values, indices, every) if return_topk else acts

    def forward(self, x: Tensor, output_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The reconstruction, with output_features also the dense activations."""
        out: SAEOutput = self.sae(x)
        if not output_features:
            return out.recon
        return out.recon, self.sae.dense(out.codes)


class _BatchRule(Dictionary):
    """At inference what exceeds `threshold`."""

    def encode(
        self, x: Tensor, return_active: bool = False, use_threshold: bool = True
    ) -> Tensor | tuple[Tensor, ...]:
        """Dense activations, above the threshold or the batch's k a row; with return_active also
        which latents fired, and all activations after ReLU."""
        every = self.every(x)
        # In training the SAE selects over the batch.
        acts = every * (every > self.threshold) if use_threshold else self.sae.encode_dense(x)
        return (acts, acts.sum(0) > 0, every) if return_active else acts

    def forward(self, x: Tensor, output_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The reconstruction at inference, with output_features also the dense activations."""
        acts = self.encode(x)
        assert isinstance(acts, Tensor)
        return (self.decode(acts), acts) if output_features else self.decode(acts)


class BatchTopKSAE(_BatchRule, _AutoEncoder):
    """dictionary_learning's BatchTopK autoencoder."""

    @staticmethod
    def _made(activation_dim: int, dict_size: int, k: int) -> WatchedBatch:
        config = BatchTopKConfig(d_sae=dict_size, k=k)
        return WatchedBatch(config, activation_dim, seed=None)


class MatryoshkaBatchTopKSAE(_BatchRule):
    """dictionary_learning's Matryoshka autoencoder; latents beyond the first `active_groups` are 0
    where it encodes."""

    turned = "W_enc"
    group_sizes: Tensor

    def __init__(self, activation_dim: int, dict_size: int, k: int, group_sizes: list[int]) -> None:
        super().__init__(activation_dim, dict_size, k)
        if sum(group_sizes) != dict_size or min(group_sizes) < 1:
            raise ValueError(f"group_sizes={group_sizes} must be positive and sum to {dict_size}")
        self.register_buffer("group_sizes", torch.tensor(group_sizes))
        self.active_groups = len(group_sizes)
        self.group_indices = [0, *accumulate(group_sizes)]
        config = MatryoshkaConfig(d_sae=dict_size, k=k, prefix_widths=tuple(self.group_indices[1:]))
        # Drawn as the library does, so that a seed gives its weights.
        rows = nn.init.kaiming_uniform_(torch.empty(dict_size, activation_dim))
        self._hold(WatchedMatryoshka(config, activation_dim, seed=None), rows)
        sae = self.sae
        self.W_enc = nn.Parameter(sae.W_enc.data.T)
        self.b_enc, self.W_dec, self.b_dec = sae.b_enc, sae.W_dec, sae.b_dec
        self._tie()

    def _tie(self) -> None:
        self.W_enc.data = self.sae.W_enc.data.T

    def encode(
        self, x: Tensor, return_active: bool = False, use_threshold: bool = True
    ) -> Tensor | tuple[Tensor, ...]:
        """See BatchTopKSAE."""
        acts, _, every = super().encode(x, True, use_threshold)
        acts = acts.clone()
        acts[:, self.group_indices[self.active_groups] :] = 0
        return (acts, acts.sum(0) > 0, every) if return_active else acts

    @classmethod
    def _of_state(cls, state: dict[str, Tensor], k: int) -> Self:
        d_in, d_sae = state["W_enc"].shape
        return cls(d_in, d_sae, k, state["group_sizes"].tolist())
