"""The weights of an SAE as one safetensors file, each shard's rows written by its owner."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from ..files import replacing
from ..parallel import agree
from ..parallel.mesh import Mesh
from ..sums import Part, combine
from ..tensor_files import Layout, Spec


def save_weights(
    file: Path,
    rows: Mapping[str, Tensor],  # [d_sae_local, ...], this shard's
    whole: Mapping[str, Tensor],  # the same on every shard
    mesh: Mesh,
) -> str:
    """Writes tensors of all shards, renamed into place; returns the file's crc32c in hex.

    The shards of replica 0 write their rows at their place, so no rank holds more than its own.
    Tensors that share memory (tied weights) are written one by one. The folder must be one that
    every member sees. Collective over the members; an error that any of them meets is raised on
    all.
    """
    specs = {name: Spec.of(t) for name, t in {**rows, **whole}.items()}
    for name, (dtype, shape) in [(name, specs[name]) for name in rows]:
        specs[name] = Spec(dtype, (shape[0] * mesh.num_shards, *shape[1:]))
    layout = Layout(specs)
    with ExitStack() as stack:

        def begin() -> tuple[str, Part] | None:
            if not mesh.is_lead:
                return None
            partial = stack.enter_context(replacing(file))
            return str(partial), layout.begin(partial)

        begun = agree.by_member(begin, mesh)[0]
        assert begun is not None

        def write() -> list[Part]:
            if mesh.replica:
                return []
            partial, own = Path(begun[0]), {} if mesh.shard else whole
            first = mesh.shard * next((len(t) for t in rows.values()), 0)
            return layout.write(partial, rows, first) + layout.write(partial, own)

        written = agree.by_member(write, mesh)
        # The lead's rename, where it may fail as well.
        agree.by_member(stack.close, mesh)
    return combine([begun[1], *(part for parts in written for part in parts)])
