"""Which of a store's rows an SAE is measured on: those that its training left out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from ..activations.holdout import held_out
from ..activations.store import ActivationStore
from ..config.run import EvaluateConfig
from ..training.made_of import other_rows, rows_made_of
from .finished import FinishedSAE

logger = logging.getLogger(__name__)


class MeasuredRows(NamedTuple):
    """Rows of a store to measure an SAE on."""

    holdout: float  # share whose documents alone are read; 0: all rows
    available: int
    told: str  # what they are
    warning: str = ""


def measured_rows(found: FinishedSAE, store: ActivationStore, cfg: EvaluateConfig) -> MeasuredRows:
    """The rows that training held out, where evaluate.rows asks for them and there are any; all of
    a store that the SAE was not trained on. A warning tells where there are none.
    """
    everything = MeasuredRows(0.0, store.kept_rows, "all rows, which training may have seen")
    if cfg.rows == "all":
        return everything
    record = found.made_of()
    if record is None:
        unknown = "it is not known what their training held out: all rows are read"
        return everything._replace(warning=unknown)
    step = record["step"]
    names = {"names": store.config}
    is_stream = step.get("train.source") == "stream"
    if not is_stream and other_rows(record["store"], rows_made_of(store, found.hookpoint) | names):
        return everything._replace(told="all rows of a store that training did not read")
    # Older versions held nothing out.
    share = step.get("train.holdout", 0.0)
    rows = held_out(store, share).rows if share else ()
    if not len(rows):
        none = (
            f"train.holdout={share:g} held no rows of {store.path} out: all are read, which "
            "training has seen; a larger share holds out more, and evaluate.rows=all says that "
            "this is meant"
        )
        return everything._replace(warning=none)
    return MeasuredRows(share, len(rows), "rows that training held out")


class _Named(Protocol):
    @property
    def name(self) -> str: ...


def warn_of_rows(saes: Sequence[_Named], rows: Sequence[MeasuredRows]) -> None:
    """Tells each warning once, with the SAEs that it is of."""
    names: dict[str, list[str]] = {}
    for found, measured in zip(saes, rows, strict=True):
        if measured.warning:
            names.setdefault(measured.warning, []).append(found.name)
    for warning, of in names.items():
        others = f" and {len(of) - 1} more" if len(of) > 1 else ""
        logger.warning("%s%s: %s", of[0], others, warning)
