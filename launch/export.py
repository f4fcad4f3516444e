"""`export`: every finished SAE in other libraries' formats."""

from __future__ import annotations

from pathlib import Path

from ..config import Config
from .entry import verb_main


def run(config: Config) -> None:
    """Write every finished SAE under output in the formats of export.formats.

    SAELens loads `<directory>/sae_lens/<job>` with SAE.load_from_disk, sparsify loads
    `<directory>/sparsify/<job>` with SparseCoder.load_from_disk.

    flash-sae export configs/quickstart.yaml "export.formats=[sae_lens]"
    """
    from ..evaluation.runner import finished_saes
    from ..interop import sae_lens, sparsify
    from ..models.topk import TopKSAE

    root = Path(config.export.directory or Path(config.output) / "export")
    for found in finished_saes(Path(config.output)):
        sae = TopKSAE.load(found.folder / "sae")
        if "sae_lens" in config.export.formats:
            sae_lens.export(
                sae,
                root / "sae_lens" / found.name,
                hookpoint=found.hookpoint,
                model_name=config.model.name if config.model else None,
                context_length=config.cache.context_length if config.cache else None,
            )
        if "sparsify" in config.export.formats:
            sparsify.export(sae, root / "sparsify" / found.name)
        print(f"{found.name} -> {root} ({', '.join(config.export.formats)})")


if __name__ == "__main__":
    verb_main(run)
