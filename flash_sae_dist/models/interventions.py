"""What people do with a trained SAE: read it, dense activations, steering, ablation, the error
term, and an SAE in place of a model's activations.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..kernels.reference import Codes, Dense, Slots

if TYPE_CHECKING:
    from ..parallel.mesh import Mesh
    from .about import About

# Takes the activations [N, d_sae], which it may change in place, and returns them or others.
ActsHook = Callable[[Tensor], Tensor | None]


def flat(codes: Codes) -> Codes:
    """Slots [..., K] as [N, K]; Pairs are a list of tokens as they are."""
    if isinstance(codes, Slots) and codes.values.ndim != 2:
        return Slots(*(t.reshape(-1, t.shape[-1]) for t in codes))
    return codes


def shaped(codes: Codes, shape: torch.Size) -> Codes:
    """Slots [N, K] as [*shape, K]; Pairs as they are."""
    if isinstance(codes, Slots) and len(shape) != 1:
        return Slots(*(t.view(*shape, t.shape[-1]) for t in codes))
    return codes


class Interventions(nn.Module):
    """Changes to an SAE's activations, and what they make of its reconstruction.

    A hook sees the activations of every forward pass as a dense [N, d_sae], all tokens one after
    another, and what it returns is decoded in their place:

        def steer(acts):
            acts[:, 1234] = 8.0              # or acts[:, 1234] = 0: ablate

        handle = sae.register_acts_hook(steer)
        with sae.spliced(model, "model.layers.12"):
            model.generate(...)              # goes on from the changed reconstruction
        handle.remove()

    With `sae.use_error_term = True` what the SAE leaves out is added to what it gives, so that
    without a hook x comes back and with one only the hook's change is made.
    """

    use_error_term = False
    about: About
    d_in: int
    d_out: int
    d_sae: int
    transcodes: bool
    sources: tuple[int, ...]
    mesh: Mesh
    b_dec: nn.Parameter
    W_dec: nn.Parameter
    encode: Callable[[Tensor], Codes]
    base: Callable[[Tensor | None], Tensor]
    spec: Callable[[], dict[str, Any]]
    compute: Callable[[Tensor], Tensor]

    def __init__(self) -> None:
        super().__init__()
        self._acts_hooks: OrderedDict[int, ActsHook] = OrderedDict()

    def register_acts_hook(self, hook: ActsHook) -> RemovableHandle:
        """Calls hook(acts) in every forward pass, hooks in the order of their registration; the
        handle's `remove()` ends that.
        """
        self._whole("register_acts_hook")
        handle = RemovableHandle(self._acts_hooks)
        self._acts_hooks[handle.id] = hook
        return handle

    def encode_dense(self, x: Tensor) -> Tensor:
        """The activations [..., d_sae] of tokens x [..., d_in], zero where a latent is not active:
        as other libraries' `encode`."""
        self._whole("encode_dense")
        return self.dense(self.encode(x)).view(*x.shape[:-1], self.d_sae)

    def decode_dense(self, acts: Tensor, x: Tensor | None = None) -> Tensor:
        """`acts @ W_dec + b_dec`: the reconstruction [..., d_out] of activations [..., d_sae], with
        what a skip connection makes of the input x."""
        self._whole("decode_dense")
        W_dec = self.compute(self.W_dec)
        return (acts.to(W_dec.dtype) @ W_dec).to(self.b_dec.dtype) + self.base(x)

    def intervened(self, x: Tensor, codes: Codes, clean: Tensor) -> Tensor:
        """The reconstruction [N, d_out] of tokens x [N, d_in] and their codes behind hooks and
        error term, that without them being clean.
        """
        recon = clean
        if self._acts_hooks:
            acts = self.dense(codes)
            for hook in list(self._acts_hooks.values()):
                acts = acts if (given := hook(acts)) is None else given
            recon = self.decode_dense(acts, x)
        if self.use_error_term:
            if self.transcodes:
                raise ValueError(
                    "a transcoder has no error term: its input is not what it reconstructs; leave "
                    "use_error_term out"
                )
            recon = recon + (x - clean).detach()
        return recon

    @contextmanager
    def spliced(self, model: nn.Module, hookpoint: str) -> Iterator[None]:
        """Puts the reconstruction in place of what a module of a model gives, `model.layers.12`, or
        of what goes into it, `model.layers.12:input`, as long as the context lasts.

        Raises ValueError where the model has no such module, or for a transcoder or a crosscoder.
        """
        if self.transcodes or len(self.sources) > 1:
            kind = "crosscoder reads several modules"
            if self.transcodes:
                kind = "transcoder does not read what it gives"
            raise ValueError(f"spliced is for SAEs: a {kind}; call it yourself")
        name, _, side = hookpoint.partition(":")
        modules = dict(model.named_modules())
        if name not in modules or side not in ("", "input", "output"):
            raise ValueError(f"the model has no module {hookpoint!r} (a name of named_modules())")

        def after(module: nn.Module, inputs: Any, output: Any) -> Any:
            del module, inputs
            return self._replaced(output)

        def before(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
            del module
            return self._replaced(inputs)

        module = modules[name]
        if side == "input":
            handle = module.register_forward_pre_hook(before)
        else:
            handle = module.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    def _replaced(self, given: Any) -> Any:
        """The reconstruction of a tensor, or of the first of several, in its own type."""
        if isinstance(given, tuple):
            return (self._replaced(given[0]), *given[1:])
        if not isinstance(given, Tensor):
            raise ValueError(
                f"the hookpoint gives a {type(given).__name__}, not activations; name another"
            )
        # The model's bfloat16 is not the SAE's.
        with torch.autocast(given.device.type, enabled=False):
            return self(given.to(self.b_dec.dtype)).recon.to(given.dtype)

    def dense(self, codes: Codes) -> Tensor:
        """Codes as activations: [..., d_sae] of Slots [..., K], [N, d_sae] of Pairs."""
        if isinstance(codes, Dense):
            return codes.values
        values, latents = codes.values, codes.latents.long()
        # Summed: an unused slot's 0 must not cover what another slot of the same latent holds.
        if isinstance(codes, Slots):
            dense = values.new_zeros(*values.shape[:-1], self.d_sae)
            return dense.scatter_add(-1, latents, values)
        dense = values.new_zeros(len(codes.offsets) - 1, self.d_sae)
        return dense.index_put((codes.tokens.long(), latents), values, accumulate=True)

    def _whole(self, what: str) -> None:
        """Raises ValueError on a shard, whose latents are not all."""
        if self.mesh.num_shards > 1:
            raise ValueError(f"{what} needs a whole SAE, not one of several shards; load it whole")

    @property
    def cfg(self) -> SimpleNamespace:
        """What a script asks of an SAE: architecture, d_in, d_sae, k, dtype, device, hookpoint."""
        dtype = str(self.W_dec.dtype).removeprefix("torch.")
        place = {"dtype": dtype, "device": str(self.W_dec.device)}
        return SimpleNamespace(**self.about._asdict(), **place, **self.spec())

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        subfolder: str = "",
        *,
        revision: str | None = None,
        device: torch.device | str = "cpu",
    ) -> Self:
        """The SAE of a folder or file of any known format (see interop), or of one in a repository
        of the Hugging Face hub, `from_pretrained("org/name", "layers.3")`. Raises ValueError where
        it holds none, or one of another class.
        """
        # Not at the top: most who use an SAE read no other library's.
        from ..interop import load
        from ..interop.hub import local_copy

        sae = load(local_copy(name, subfolder, revision), device=device)
        if not isinstance(sae, cls):
            raise ValueError(f"{name} holds a {type(sae).__name__}, not a {cls.__name__}")
        return sae
