"""A store that is to hold more tokens of its own text: what stays of it, and what is made again.

Rows stand in the order of the text's parts, each shuffled by itself, so all shards before the last
part stay as they are. That part ended where the store had enough, and is made anew, longer.
"""

from __future__ import annotations

import logging
from typing import Any

from .norm_limits import NORMS
from .records import COMPLETE, CONFIG, GEOMETRY, TEXT, shard_record
from .store import LEFT_OUT
from .text_parts import TextParts
from .writer import StoreWriter

logger = logging.getLogger(__name__)
_FOLDERS = ("activations", "scales", "tokens", "text", "statistics", LEFT_OUT)


def grow_(
    writer: StoreWriter, text: TextParts, rows: int, about: dict[str, Any], stamp: str | None
) -> None:
    """Takes back the last part of a store's text and the shards that have rows of it: `cache` then
    goes on with what stays as with any store that was begun, to so many rows. Where nothing would
    stay the store is begun anew. One process calls it, holding the store; a launch that ended in
    here does the same again.
    """
    record = writer.begun()
    assert record is not None
    writer.reopen()
    parts = text.known()
    stay = len(parts) - 1 if parts and parts[-1].last else len(parts)
    first = text.rows_before[stay] // record["shard_rows"]
    logger.info(
        "%s grows from %s to %s rows: %s of them stay, the others are made anew",
        writer.path,
        f"{record['rows']:,}",
        f"{rows:,}",
        f"{first * record['shard_rows']:,}",
    )
    for shard in sorted(writer.records.shards()):
        if shard >= first:
            writer.records.files.remove(f"records/{shard_record(shard)}")
    text.drop(stay if first else 0)
    if not first:
        _begin_anew(writer)
        return
    record.pop("metadata", None)
    record |= {"rows": rows, "about": about}
    if "identity" in record:
        record["identity"]["parts"].pop("text", None)
        record["identity"]["stamp"] = stamp
    writer.records.write(GEOMETRY, record)
    # Last: until it is there, a launch comes here again.
    writer.records.write(CONFIG, writer.config)


def _begin_anew(writer: StoreWriter) -> None:
    """Removes all but the record of who holds the store; the config's last."""
    records = writer.records
    for folder in _FOLDERS:
        records.files.remove_all(folder)
    for name in (NORMS, TEXT, COMPLETE, GEOMETRY, CONFIG):
        records.files.remove(f"records/{name}")
