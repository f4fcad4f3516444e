"""`python -m tests.fleeting CONFIG`: the verb cache, where memory:// stands for an object store."""

from __future__ import annotations

from flash_sae_dist.activations import records
from flash_sae_dist.launch import cache
from flash_sae_dist.launch.entry import verb_main

if __name__ == "__main__":
    records.FLEETING.clear()
    verb_main(cache.run)
