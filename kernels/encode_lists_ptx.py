"""PTX that makes keys of the lists of the Hopper filter (encode_first_ptx.py), for
encode_pick_ptx.py.

A list's pairs are `lists` apart, and so are its records behind all pairs. A record is a mask of
runs and a tile's number above how many of the list's pairs come before.
"""

from __future__ import annotations

from triton import constexpr_function

from .encode_first_plan import OVERSHOOT, TILE_SHIFT
from .encode_pick_ptx import pick_lines, places_lines, start_lines


@constexpr_function
def _bit_lines(r: int, lists: int) -> list[str]:
    """Record r's next pair, if it has one: its place, to `to`."""
    return [
        f"brev.b32 bit, mask{r};", "clz.b32 bit, bit;", f"setp.ne.s32 p, mask{r}, 0;",
        "mad.lo.s32 t, bit, c, first_latent;", "@p st.shared.v2.b32 [to], {t, u};",
        f"sub.s32 t, mask{r}, 1;", f"and.b32 mask{r}, mask{r}, t;", "add.s32 to, to, 8;",
        f"add.s32 u, u, {lists};",
    ]  # fmt: skip


@constexpr_function
def _places_lines(lists: int, capacity: int, records: int, held: int) -> list[str]:
    """For each pair of a row, where a key of it goes in the end: the first latent that it may be of
    and its number in the row's memory. `n` counts the pairs."""
    padded = 1 << (lists - 1).bit_length()
    of_lane = max(1, padded // 32)  # lists that a lane reads
    together = max(1, 32 // padded)  # records of a list that are read at once
    # That a lane reads before it takes the first one's bits.
    at_once = max(1, min(8 // of_lane, (records + together - 1) // together))
    lines = [
        ".reg .b32 list, slot, tau, last, before, total, longest, most_records, whole, bit, to;",
        ".reg .b32 first_latent;",
        ".reg .b64 row_lists, counts;",
        f".reg .b32 length<{of_lane}>, records<{of_lane}>, offset<{of_lane}>;",
        f".reg .b64 first<{of_lane}>;",
        f".reg .b32 mask<{of_lane * at_once}>, info<{of_lane * at_once}>;",
        "mov.b32 whole, $5;", "mul.wide.s32 a, row, $4;", "add.s64 row_lists, a, $6;",
        f"mul.wide.s32 a, row, {16 * lists};", "add.s64 counts, a, $7;",
        f"and.b32 list, lane, {min(padded, 32) - 1};",
        f"shr.u32 slot, lane, {min(padded, 32).bit_length() - 1};",
        ".reg .b32 column;", "and.b32 column, list, 3;", "shl.b32 column, column, 1;",
        "mov.b32 longest, 0;", "mov.b32 most_records, 0;", "mov.b32 c, 0;",
    ]  # fmt: skip
    for j in range(of_lane):
        lines += [
            f"add.s32 t, list, {32 * j};", f"setp.lt.s32 p, t, {lists};",
            f"mov.b32 length{j}, 0;", f"mov.b32 records{j}, 0;", "mul.wide.s32 a, t, 16;",
            "add.s64 a, a, counts;",
            # The first list is a block's own program's, which always writes it; others may have
            # no row's limits.
            "@p ld.global.v4.b32 {length0, records0, tau, last}, [a];"
            if j == 0
            else f"@p ld.global.v2.b32 {{length{j}, records{j}}}, [a];",
            "mul.wide.s32 a, t, 8;", "add.s64 a, a, row_lists;",
            f"add.s64 first{j}, a, {8 * lists * (capacity + OVERSHOOT)};",
        ]  # fmt: skip
    for j in range(of_lane):
        lines += [
            f"max.s32 longest, longest, length{j};",
            f"max.s32 most_records, most_records, records{j};",
        ]
        if together > 1:
            # One of the lanes that share a list counts it.
            lines += ["setp.eq.s32 p, slot, 0;", f"selp.b32 t, length{j}, 0, p;"]
            lines += ["add.s32 c, c, t;"]
        else:
            lines += [f"add.s32 c, c, length{j};"]
    lines += [
        "redux.sync.max.s32 longest, longest, -1;", f"setp.gt.s32 p, longest, {capacity};",
        "@p bra LACKS;",
        "redux.sync.max.s32 most_records, most_records, -1;",
        *places_lines("c"), f"setp.gt.s32 p, total, {held};", "@p bra LACKS;", "mov.b32 n, total;",
        "shfl.sync.idx.b32 tau, tau, 0, 31, -1;", "shfl.sync.idx.b32 last, last, 0, 31, -1;",
    ]  # fmt: skip
    if together > 1:
        lines += ["shfl.sync.idx.b32 before, before, list, 31, -1;"]
    for j in range(of_lane):
        lines += [f"mov.b32 offset{j}, before;", f"add.s32 before, before, length{j};"]
    lines += ["RECORDS:"]
    for i in range(at_once):
        for j in range(of_lane):
            r = i * of_lane + j
            lines += [
                f"add.s32 t, slot, {i * together};", f"setp.lt.s32 p, t, records{j};",
                f"mul.wide.s32 a, t, {8 * lists};", f"add.s64 a, a, first{j};",
                f"mov.b32 mask{r}, 0;", f"@p ld.global.v2.b32 {{mask{r}, info{r}}}, [a];",
            ]  # fmt: skip
    for r in range(at_once * of_lane):
        j = r % of_lane
        lines += [
            f"shr.u32 t, info{r}, {TILE_SHIFT};", f"and.b32 u, info{r}, {(1 << TILE_SHIFT) - 1};",
            # As encode_first._runs_of: f + apart * run.
            "setp.eq.s32 p, t, whole;", "shl.b32 first_latent, t, 3;",
            "@p shl.b32 first_latent, whole, 8;",
            "add.s32 first_latent, first_latent, column;",
            "shl.b32 c, whole, 3;", "@p mov.b32 c, 8;",
            f"add.s32 t, offset{j}, u;", "mad.lo.s32 to, t, 8, keys;",
            f"mad.lo.s32 u, u, {lists}, list;", f"add.s32 u, u, {32 * j};",
        ]  # fmt: skip
        # Few records have more than two.
        lines += [*_bit_lines(r, lists), *_bit_lines(r, lists)]
        lines += [
            f"setp.ne.s32 p, mask{r}, 0;", "vote.sync.any.pred q, p, -1;", f"@!q bra BITS{r};",
            f"BIT{r}:", *_bit_lines(r, lists), f"setp.ne.s32 p, mask{r}, 0;",
            "vote.sync.any.pred q, p, -1;", f"@q bra BIT{r};", f"BITS{r}:",
        ]  # fmt: skip
    return lines + [
        f"add.s32 slot, slot, {at_once * together};",
        f"sub.s32 most_records, most_records, {at_once * together};",
        "setp.gt.s32 p, most_records, 0;", "@p bra RECORDS;", "bar.warp.sync -1;",
    ]  # fmt: skip


@constexpr_function
def _keys_lines(held: int) -> list[str]:
    """A key of each pair, its larger activation's, in its place. The other one, which is seldom
    among the largest, goes behind all, where it is."""
    lines = [
        ".reg .b32 from, end, other, edge, f<8>, v<8>, w<8>;", ".reg .pred there<8>;",
        "mov.b32 end, n;", "mad.lo.s32 from, lane, 8, keys;", "sub.s32 c, n, lane;", "PAIRS:",
    ]  # fmt: skip
    for i in range(8):
        lines += [
            f"setp.gt.s32 there{i}, c, {32 * i};", "mov.b32 u, 0;", f"mov.b32 f{i}, 0;",
            f"@there{i} ld.shared.v2.b32 {{f{i}, u}}, [from + {256 * i}];",
            "mad.wide.u32 a, u, 8, row_lists;", f"mov.b32 v{i}, -1;", f"mov.b32 w{i}, -1;",
            f"@there{i} ld.global.v2.b32 {{v{i}, w{i}}}, [a];",
        ]  # fmt: skip
    for i in range(8):
        lines += [
            f"setp.gt.s32 p, w{i}, v{i};", f"sub.s32 u, 0x7FFFFFFF, f{i};",
            # ReLU.
            f"max.s32 t, v{i}, w{i};", "max.s32 t, t, 0;", "@p sub.s32 u, u, 1;",
            f"@there{i} st.shared.v2.b32 [from + {256 * i}], {{u, t}};", f"min.s32 t, v{i}, w{i};",
            "mov.b32 other, t;" if i == 0 else "max.s32 other, other, t;",
            "mov.b32 edge, f0;" if i == 0 else f"max.s32 edge, edge, f{i};",
        ]  # fmt: skip
    lines += [
        "add.s32 edge, edge, 1;", "setp.ge.s32 p, edge, F;", "setp.ge.or.s32 p, other, tau, p;",
        # Where zeros pass, negative values do.
        "setp.eq.or.s32 p, tau, 0, p;", "vote.sync.any.pred p, p, -1;", "@!p bra ONE;",
    ]  # fmt: skip
    for i in range(8):
        lines += [
            f"min.s32 t, v{i}, w{i};", "max.s32 t, t, 0;", f"add.s32 bit, f{i}, 1;",
            # Of equal ones those that the filter let pass alone: with one of a higher latent the k
            # largest might not be complete.
            "setp.eq.s32 p, t, tau;", f"setp.le.and.s32 p, f{i}, last, p;",
            "setp.gt.or.s32 p, t, tau, p;", "setp.lt.and.s32 p, bit, F, p;",
            f"and.pred p, p, there{i};",
            f"setp.gt.s32 q, w{i}, v{i};", f"selp.b32 u, f{i}, bit, q;",
            "sub.s32 u, 0x7FFFFFFF, u;",
            "vote.sync.ballot.b32 ballot, p, -1;", "and.b32 to, ballot, lower;", "popc.b32 to, to;",
            "add.s32 to, to, n;", f"setp.lt.and.s32 p, to, {held}, p;",
            "mad.lo.s32 to, to, 8, keys;",
            "@p st.shared.v2.b32 [to], {u, t};", "popc.b32 ballot, ballot;",
            "add.s32 n, n, ballot;",
            # Of the last tile's columns some are no latents: only the first may be one.
            "setp.ge.s32 p, bit, F;", f"and.pred p, p, there{i};", f"max.s32 t, v{i}, 0;",
            f"sub.s32 u, 0x7FFFFFFF, f{i};", f"@p st.shared.v2.b32 [from + {256 * i}], {{u, t}};",
            f"setp.ge.and.s32 p, f{i}, F, p;", "vote.sync.any.pred q, p, -1;",
            # Where none is, the row is left to others.
            "@q bra LACKS;",
        ]  # fmt: skip
    return lines + [
        "ONE:", "sub.s32 c, c, 256;", "add.s32 from, from, 2048;", "add.s32 t, c, lane;",
        "setp.gt.s32 p, t, 0;", "@p bra PAIRS;", f"setp.gt.s32 p, n, {held};", "@p bra LACKS;",
    ]  # fmt: skip


@constexpr_function
def lists_ptx(lists: int, capacity: int, records: int, held: int, size: int) -> str:
    """PTX of an output, a row's status, and 9 operands: row, F, k, the bytes from one row's lists
    to the next one's, whole tiles; addresses of the lists, their lengths, the values and the
    indices. The status is 0 where the row's list is written, -1 where its lists lack some, or have
    more keys than are held: each pair is one, or two."""
    lines = [
        *start_lines(held), *_places_lines(lists, capacity, records, held), *_keys_lines(held),
        *pick_lines(held, size, 8, False),
    ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"
