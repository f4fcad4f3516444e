"""What all architectures share: parameters with roles, a batch's codes, decoder, save and load.

Legend: N tokens, D d_in, F d_sae, K slots a token, C slots of a flat list.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..config.file import parse
from ..config.sae import SAEConfig
from ..files import write_json
from ..kernels import ops
from ..kernels.reference import Codes as Codes
from ..kernels.reference import Pairs as Pairs
from ..kernels.reference import Slots as Slots
from ..parallel import agree
from ..parallel.collectives import feed_shards, sum_over_shards
from ..parallel.mesh import Mesh
from .about import About
from .initial import unit_rows_
from .interventions import Interventions, flat, shaped
from .losses import geometric_median
from .saved import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_sae_folder,
    check_weights,
    is_whole,
    read_spec,
    save_weights,
)
from .sparsity import Batch, Edges
from .usual import TrainDefaults

_NORM_EPS = 1e-5
# rows: a row a latent, split over the shards; whole: the same on every shard.
Role = Literal["rows", "whole"]


class SAEOutput(NamedTuple):
    """What one forward pass of an SAE gives."""

    recon: Tensor  # [..., d_out]
    codes: Codes  # Slots [..., K], or Pairs of all tokens: values >= 0, latents of this shard


class SparseCoder(Interventions):
    """A sparse autoencoder `decode(encode(x))`, whole or one shard of it; an ordinary nn.Module.

    x is [..., d_in]: tokens, or sequences of them. With config.input_norm layer_norm each token is
    standardised before it is encoded, which `forward` undoes behind the decoder.

    W_enc and W_dec are [d_sae_local, d_in], b_enc is [d_sae_local], b_dec is [d_in]. With a d_out
    it is a transcoder, whose target rows are [..., d_out]: W_dec is [d_sae_local, d_out] and of any
    norm, b_dec [d_out], nothing is subtracted from the input, and with config.skip W_skip [d_out,
    d_in] adds `x @ W_skip.T`. On a mesh with several shards a rank holds rows `mesh.shard *
    d_sae_local` onwards, and every method is collective over the shard group. Under autocast the
    products take autocast's dtype; sums and the selection stay float32.

    An architecture says which latents are active, and how much: `encode_rows`. To be trained it
    says which pairs have an activation or a gradient, `candidates` for autograd and `select` for
    the fused engine (the same pairs without gradients, from weights in the compute dtype); what
    they come to, `activate`; and what else there is to lose than the error, `penalty` and `levels`.
    Pairs are `Slots`, K for each token, or `Pairs`, a flat list of which a token has any number; on
    a shard a value is 0 where another holds the latent.
    """

    Config: ClassVar[type[SAEConfig]]
    about = About()  # where it reads, if its file told
    roles: ClassVar[dict[str, Role]] = {
        "W_enc": "rows",
        "b_enc": "rows",
        "W_dec": "rows",
        "b_dec": "whole",
        "W_skip": "whole",
    }
    # Parameters that go with s where x -> s x, the matrices staying as they are.
    in_data_units: ClassVar[frozenset[str]] = frozenset({"b_enc", "b_dec"})
    defaults: ClassVar[TrainDefaults] = TrainDefaults()
    # What train.dead_latents may be.
    revivals: ClassVar[frozenset[str]] = frozenset({"auxk", "ghost", "resample", "none"})
    # Whether activations are a function of candidates' values, or there is a penalty.
    is_pairwise: ClassVar[bool] = False
    # Whether activations depend on b_enc beside their pre-activations, as magnitudes of a gate do.
    bias_apart: ClassVar[bool] = False
    # Whether lists differ in length, as those of a selection by threshold: `select` reads the host.
    varied_lengths: ClassVar[bool] = False
    sources: tuple[int, ...] = ()  # widths of a crosscoder's hookpoints

    def __init__(
        self,
        config: SAEConfig,
        d_in: int,
        *,
        d_out: int | None = None,
        mesh: Mesh | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        seed: int | None = 0,
    ) -> None:
        """seed draws the initial weights; None leaves memory as it is, for weights that are loaded.

        Raises ValueError where config's d_sae is not divisible by the shards, or a transcoder is to
        standardise its tokens.
        """
        super().__init__()
        if d_out is not None and config.input_norm != "none":
            raise ValueError(
                f"sae.input_norm={config.input_norm!r} is for SAEs: what a transcoder gives is not "
                "its input, and could not be put back; leave it out"
            )
        self.config, self.d_in, self.d_sae = config, d_in, config.width(d_in)
        self.transcodes, self.d_out = d_out is not None, d_in if d_out is None else d_out
        self.mesh = mesh if mesh is not None else Mesh.single()
        if self.d_sae % self.mesh.num_shards:
            raise ValueError(
                f"d_sae={self.d_sae} is not divisible by the {self.mesh.num_shards} shards; "
                f"use d_sae={-(-self.d_sae // self.mesh.num_shards) * self.mesh.num_shards}"
            )
        self.d_sae_local = self.d_sae // self.mesh.num_shards
        # Pairs a token that a selection by threshold found last, of which the next begins.
        self.last_pairs = 64.0
        place: dict[str, Any] = {"dtype": dtype, "device": device}
        self.W_enc = nn.Parameter(torch.empty((self.d_sae_local, d_in), **place))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae_local, **place))
        self.W_dec = nn.Parameter(torch.empty((self.d_sae_local, self.d_out), **place))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out, **place))
        self.W_skip: nn.Parameter | None = None
        if config.skip and self.transcodes:
            self.W_skip = nn.Parameter(torch.zeros((self.d_out, d_in), **place))
        if seed is not None:
            self.reset_parameters(seed)

    @classmethod
    def from_config(cls, config: SAEConfig, d_in: int, **place: Any) -> Self:
        """An SAE of what a config's section `sae` says; place is mesh, dtype, device and seed."""
        return cls(config, d_in, **place)

    @property
    def first_latent(self) -> int:
        """Index over all shards of this rank's first latent."""
        return self.mesh.shard * self.d_sae_local

    @classmethod
    def autograd_reason(cls, config: SAEConfig) -> str | None:
        """Why the fused engine cannot train it, to be logged; None where it can."""
        del config
        return None

    @classmethod
    def scales_encoder(cls, config: SAEConfig) -> bool:
        """Whether train.encoder_scale is of use: few latents are active at the start."""
        del config
        return not cls.is_pairwise

    @classmethod
    def scaled_penalty(cls, config: SAEConfig) -> str | None:
        """The key and value by which its penalty grows with activations, so that it says something
        only where decoder rows are of unit norm, as a transcoder's are not; None where it does not.
        """
        del config
        return None

    def ranks(self) -> Tensor | None:
        """What pre-activations are multiplied by, [d_sae_local] > 0, where a selection ranks them;
        None is 1 for all.
        """
        return None

    @property
    def level_weights(self) -> tuple[float, ...]:
        """Weights of the FVUs of nested reconstructions: the j-th is of the pairs up to level j."""
        return (1.0,)

    @property
    def main_level(self) -> int:
        """The level whose reconstruction is that of `forward`."""
        return len(self.level_weights) - 1

    @property
    def sparsity_warmup(self) -> float:
        """Part of the steps over which the penalty's coefficient rises linearly from 0."""
        return 0.0

    @property
    def needs_l0(self) -> bool:
        """Whether `penalty` asks for the whole batch's L0."""
        return False

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0) -> None:
        """Unit-norm random encoder rows, the decoder equal to them (a transcoder's zero, as
        sparsify's), zero biases.

        An element is a function of (seed, its latent over all shards, its column) alone: see
        initial.py.
        """
        unit_rows_(self.W_enc, seed, self.first_latent)
        if self.transcodes:
            self.W_dec.zero_()
        else:
            self.W_dec.copy_(self.W_enc)
        if self.W_skip is not None:
            self.W_skip.zero_()
        self.b_enc.zero_()
        self.b_dec.zero_()

    def encode(self, x: Tensor) -> Codes:
        """The active latents of tokens x [..., d_in], differentiable: Slots [..., K], or Pairs of
        all tokens one after another. Collective over the shards. Raises ValueError on a width that
        does not fit.
        """
        self.check_input(x)
        return shaped(self.encode_rows(self.normalise(x.reshape(-1, self.d_in))[0]), x.shape[:-1])

    def encode_rows(self, x: Tensor) -> Codes:
        """`encode` of tokens x [N, d_in] that are standardised where they are to be."""
        raise NotImplementedError

    def normalise(
        self,
        x: Tensor,  # [N, d_in]
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Tokens as the encoder reads them, and their deviations and means [N, 1] where these were
        taken out (input_norm layer_norm, in OpenAI's form); of a crosscoder its sources' [d_in].
        """
        if self.config.input_norm == "none":
            return x, None
        x = x.to(self.b_dec.dtype)
        centred = x - (mean := x.mean(dim=1, keepdim=True))
        deviation = centred.std(dim=1, keepdim=True) if self.d_in > 1 else torch.zeros_like(mean)
        return centred / (deviation + _NORM_EPS), (deviation, mean)

    def select(self, xc: Tensor, W_enc: Tensor, b_enc: Tensor) -> Codes:
        """`encode_rows` of centred tokens xc [N, d_in] with weights in xc's dtype, without
        gradients. Collective over the shards; no host sync but for lists of varied lengths.
        """
        raise NotImplementedError

    def candidates(self, x: Tensor) -> Codes:
        """The pairs of tokens x [N, d_in] that have an activation or a gradient, with values that
        `activate` takes; differentiable. Collective over the shards.
        """
        return self.encode_rows(x)

    def activate(self, found: Codes) -> Codes:
        """Activations of candidates, differentiable in their values and in this SAE's parameters
        pair by pair: no product of matrices.
        """
        return found

    def penalty(self, x: Tensor, found: Codes, codes: Codes, batch: Batch) -> Tensor:
        """What candidates `found` and their activations `codes` of target rows x [N, d_out] cost
        beside the error: these tokens' share of the batch's, over all shards. Collective over the
        shards.
        """
        del found, codes, batch
        return x.new_zeros(())

    def edges(self, batch: Batch) -> Edges | None:
        """What says the gradients of `activate` and `penalty` in closed form; None where autograd
        takes them.
        """
        del batch
        return None

    @property
    def penalises_dead(self) -> bool:
        """Whether `dead_penalty` is called where latents are listed as dead."""
        return False

    def dead_penalty(self, x: Tensor, rows: Tensor, left_out: Tensor, batch: Batch) -> Tensor:
        """What listed dead latents, rows [M] of this shard but those left out [M] bool, cost on
        tokens x: these tokens' share. Collective over the shards.
        """
        raise NotImplementedError

    def levels(self, codes: Codes) -> Tensor | None:
        """The least level, as codes.values, of the nested reconstructions that has a pair; None is
        0 for all. Collective over the shards.
        """
        del codes
        return None

    def main_codes(self, codes: Codes) -> Codes:
        """Without the pairs beyond the main level, which do not count as active."""
        if self.main_level == len(self.level_weights) - 1:
            return codes
        levels = self.levels(codes)
        assert levels is not None
        return codes._replace(values=codes.values * (levels <= self.main_level))

    @torch.no_grad()
    def begin_(self, x: Tensor, y: Tensor, unit: float) -> None:
        """What the first batch x [N, d_in] and its target rows y, of all replicas, decide: b_dec
        starts at the geometric median (Gao et al. 2024), a transcoder's at the mean, its encoder
        subtracts the mean input (sparsify's).
        """
        if not self.transcodes:
            self.b_dec.copy_(geometric_median(x, unit=unit))
            return
        self.b_dec.copy_(y.mean(dim=0))
        self.b_enc.copy_(-self.W_enc @ x.mean(dim=0))

    @torch.no_grad()
    def scale_encoder_(self, factor: Tensor) -> None:
        """Multiplies the pre-activations of the start by a scalar."""
        self.W_enc.mul_(factor)

    def set_unit(self, unit: float) -> None:
        """Tells the root mean square of the elements of the data that is trained on."""

    @torch.no_grad()
    def project_(self) -> tuple[str, ...]:
        """Puts parameters back where they have to be, after a step; returns their names. Rows of
        W_dec are put back to unit norm by the engine.
        """
        return ()

    @torch.no_grad()
    def observe_(self, active: list[Codes]) -> None:
        """Takes in the activations of a step's micro-batches. Collective over the members; no host
        sync.
        """

    @torch.no_grad()
    def restart_(self, mask: Tensor) -> None:
        """Puts parameters of resampled latents [d_sae_local] bool, other than the matrices, back to
        their start. Collective over the shards.
        """
        self.b_enc[mask] = 0

    def for_moved_input(self, weights: dict[str, Tensor], moved: Tensor) -> dict[str, Tensor]:
        """Weights of a transcoder that give for inputs x what these give for x - mean, where moved
        [d_sae_local] is W_enc @ mean.
        """
        return weights | {"b_enc": weights["b_enc"] - moved}

    def over_shards(self, share: Tensor) -> Tensor:
        """A sum over the shards' shares, whose gradient is each share's."""
        return sum_over_shards(share, self.mesh)

    def compute(self, weight: Tensor) -> Tensor:
        """A weight in the dtype of products: autocast's where it is on."""
        device = weight.device.type
        if torch.is_autocast_enabled(device) and weight.dtype == torch.float32:
            return weight.to(torch.get_autocast_dtype(device))
        return weight

    def check_input(self, x: Tensor) -> None:
        """Raises ValueError where x is not [..., d_in]."""
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            raise ValueError(
                f"x must be [..., {self.d_in}], not {list(x.shape)}; is it of another hookpoint?"
            )

    def pre_activations(self, x: Tensor, rows: Tensor, bias: Tensor) -> Tensor:
        """`(x - b_dec) @ W_enc[rows].T + bias` [N, M] for a few rows [M] of this shard."""
        centred = feed_shards(x, self.mesh)
        if (centre := self.centre) is not None:
            centred = centred - feed_shards(centre, self.mesh)
        W = self.compute(self.W_enc[rows])
        return (centred.to(W.dtype) @ W.T).to(bias.dtype) + bias

    def combine_rows(self, acts: Tensor, rows: Tensor) -> Tensor:
        """`acts @ W_dec[rows]` [N, d_in] of dense acts [N, M], summed over shards: no b_dec."""
        W = self.compute(self.W_dec[rows])
        return sum_over_shards((acts.to(W.dtype) @ W).to(self.b_dec.dtype), self.mesh)

    def combine(self, codes: Codes, W_dec: Tensor | None = None) -> Tensor:
        """`sum of value * W_dec[latent]` over each token's pairs [N, d_in], and over shards: no
        b_dec. W_dec may be another than this SAE's.
        """
        W_dec = self.compute(self.W_dec if W_dec is None else W_dec)
        partial = ops.sparse_decode(codes.values, codes.latents, W_dec, codes.tokens, codes.offsets)
        return sum_over_shards(partial.to(self.b_dec.dtype), self.mesh)

    def decode(self, codes: Codes, x: Tensor | None = None) -> Tensor:
        """`combine(codes) + b_dec`: the reconstruction [..., d_out] of Slots [..., K], or [N,
        d_out] of Pairs, in the units of tokens as the encoder reads them. x is the input, which
        W_skip takes.
        """
        shape = codes.values.shape[:-1] if isinstance(codes, Slots) else (-1,)
        rows = self.combine(flat(codes))
        return (rows + self.base(None if x is None else x.reshape(-1, self.d_in))).view(
            *shape, self.d_out
        )

    def base(self, x: Tensor | None) -> Tensor:
        """What the reconstruction of inputs x is without latents: b_dec, of a transcoder with a
        skip connection `b_dec + x @ W_skip.T`.
        """
        if self.W_skip is None:
            return self.b_dec
        if x is None:
            raise ValueError(
                "a transcoder with a skip connection needs its input: decode(codes, x)"
            )
        W = self.compute(self.W_skip)
        return self.b_dec + (x.to(W.dtype) @ W.T).to(self.b_dec.dtype)

    @property
    def centre(self) -> Tensor | None:
        """What the encoder subtracts from its input: b_dec, of a transcoder nothing."""
        return None if self.transcodes else self.b_dec

    def fed_centre(self) -> Tensor | None:
        """`centre` for the products of this shard."""
        return None if self.centre is None else feed_shards(self.centre, self.mesh)

    def nested(self, codes: Codes, x: Tensor) -> list[Tensor]:
        """The reconstructions [N, d_out] of all levels."""
        levels = self.levels(codes)
        if levels is None:
            return [self.decode(codes, x)]
        found: list[Tensor] = []
        below = self.base(x)
        for level in range(len(self.level_weights)):
            own = codes._replace(values=codes.values * (levels == level))
            below = below + self.combine(own)
            found.append(below)
        return found

    def forward(self, x: Tensor) -> SAEOutput:
        """Encodes and decodes x [..., d_in]; both parts are differentiable, the selection is not.
        Hooks and the error term (see Interventions) change the reconstruction alone.
        """
        self.check_input(x)
        rows, undo = self.normalise(x.reshape(-1, self.d_in))
        codes = self.encode_rows(rows)
        recon = self.intervened(rows, codes, self.decode(codes, rows))
        if undo is not None:
            recon = recon * undo[0] + undo[1]
        return SAEOutput(recon.view(*x.shape[:-1], self.d_out), shaped(codes, x.shape[:-1]))

    def spec(self) -> dict[str, Any]:
        """What `save` writes beside the weights: the architecture, widths and its own keys."""
        own = self.config.model_dump(mode="json", exclude={"d_sae", "expansion_factor", "search"})
        if own["input_norm"] == "none":
            del own["input_norm"]
        head = {"architecture": own.pop("architecture"), "d_in": self.d_in, "d_sae": self.d_sae}
        if self.transcodes:
            head["d_out"] = self.d_out
        else:
            del own["skip"]
        return head | own

    def save(self, folder: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Writes this SAE as safetensors and json, renamed into place, or other weights in place of
        its own: by name, of a shard its rows. Collective over the members: see `save_weights`.

        config.json is written last and holds the weights' crc32c: without it there is no SAE.
        """
        path = Path(folder)
        if weights is None:
            weights = self.state_dict()
        config = path / CONFIG_FILE
        agree.by_lead(lambda: config.unlink(missing_ok=True), self.mesh)
        rows = {name: t for name, t in weights.items() if self.roles[name] == "rows"}
        whole = {name: t for name, t in weights.items() if name not in rows}
        crc = save_weights(path / WEIGHTS_FILE, rows, whole, self.mesh)
        spec = self.spec() | {"weights_crc32c": crc}
        if self.about != About():
            spec["about"] = self.about._asdict()
        agree.by_lead(lambda: write_json(config, spec, indent=2), self.mesh)

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> Self:
        """Reads what `save` wrote. Raises ValueError where a file is missing, damaged, does not fit
        or holds another architecture.
        """
        path = Path(folder)
        check_sae_folder(path)
        try:
            spec = read_spec(path)
            check_weights(path, spec.pop("weights_crc32c", None))
            weights = load_file(path / WEIGHTS_FILE)
            d_in = spec.pop("d_in")
            place = {name: spec.pop(name) for name in ("d_out", "sources") if name in spec}
            about = About(**spec.pop("about", {}))
            config = parse(cls.Config, spec, str(path / CONFIG_FILE))
            sae = cls.from_config(config, d_in, **place, dtype=weights["W_enc"].dtype, seed=None)
            sae.load_state_dict(weights)
        except (OSError, KeyError, RuntimeError, TypeError, ValueError, SafetensorError) as e:
            raise ValueError(
                f"{path} holds no whole {cls.__name__} ({e}); train or export it anew"
            ) from e
        sae.about = about
        return sae.to(device).eval()

    is_whole = staticmethod(is_whole)
