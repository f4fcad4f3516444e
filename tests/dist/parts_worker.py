"""`python -m tests.dist.parts_worker CONFIG ...`: the verb cache, with parts of the text of 16
sequences, of which one tells how a store is cut.
"""

from __future__ import annotations

from flash_sae_dist.activations import harvest
from flash_sae_dist.activations.store import Geometry
from flash_sae_dist.launch import cache
from flash_sae_dist.launch.entry import verb_main

if __name__ == "__main__":
    harvest.part_size = lambda *_: 16
    Geometry.enough_rows = 300  # type: ignore[assignment,method-assign]
    verb_main(cache.run)
