"""What is known of an SAE beside its weights."""

from __future__ import annotations

from typing import NamedTuple


class About(NamedTuple):
    """Where an SAE reads, as far as its file or its job tells."""

    hookpoint: str | None = None
    model_name: str | None = None
    context_length: int | None = None
    prepend_bos: bool = True  # sequences began with the begin token
    output_hookpoint: str | None = None  # of a transcoder
