"""PTX that makes keys of the lists of the Hopper filter (encode_first_ptx.py), for
encode_pick_ptx.py.

A list's pairs are `lists` apart, and so are its records behind all pairs. A record is a mask of
runs and a tile's number above how many of the list's pairs come before.
"""

from __future__ import annotations

from triton import constexpr_function

from .encode_first_plan import OVERSHOOT, TAIL_EACH, TILE_SHIFT
from .encode_groups_ptx import groups_lines
from .encode_pick_ptx import pick_lines, places_lines, start_lines, wait_lines
from .encode_plan import RUN


@constexpr_function
def _bit_lines(r: int, lists: int) -> list[str]:
    """Record r's last pair that is left, if there is one: its place, to `to`."""
    to, u, latent, apart = (f"{name}{r % 2}" for name in ("to", "u", "latent", "apart"))
    return [
        f"clz.b32 bit, mask{r};", f"setp.ne.s32 p, mask{r}, 0;",
        f"mad.lo.s32 t, bit, {apart}, {latent};", f"@p st.shared.v2.b32 [{to}], {{t, {u}}};",
        "shr.u32 t, 0x80000000, bit;", f"xor.b32 mask{r}, mask{r}, t;", f"sub.s32 {to}, {to}, 8;",
        f"sub.s32 {u}, {u}, {lists};",
    ]  # fmt: skip


@constexpr_function
def _record_lines(at_once: int, together: int, of_lane: int, lists: int, most: int) -> list[str]:
    """Reads a turn's records, whether a list has so many or not."""
    lines = []
    for r in range(at_once * of_lane):
        i, j = r // of_lane, r % of_lane
        lines += [
            f"add.s32 t, slot, {i * together};", f"setp.lt.and.s32 p, t, {most}, mine{j};",
            f"mul.wide.s32 a, t, {8 * lists};", f"add.s64 a, a, first{j};",
            f"mov.b32 mask{r}, 0;", f"@p ld.global.v2.b32 {{mask{r}, info{r}}}, [a];",
        ]  # fmt: skip
    return lines


@constexpr_function
def _places_lines(lists: int, capacity: int, records: int, held: int, warps: int) -> list[str]:
    """For each pair of a row, where a key of it goes in the end: the first latent that it may be of
    and its number in the row's memory. `n` counts the pairs."""
    padded = 1 << (lists - 1).bit_length()
    of_lane = max(1, padded // 32)  # lists that a lane reads
    together = max(1, 32 // padded)  # records of a list that a warp reads at once
    # That a lane reads before it takes the first one's bits.
    most = (records + together * warps - 1) // (together * warps)
    at_once = max(1, min(8 // of_lane, most))
    turn = at_once * together  # a warp's records of a list
    lines = [
        ".reg .b32 list, slot, tau, last, longest, most_records, whole, bit, to;",
        ".reg .b32 apart, apart<2>, latent<2>, to<2>, u<2>;",
        ".reg .b64 row_lists, counts;",
        f".reg .b32 length<{of_lane}>, records<{of_lane}>, offset<{of_lane}>;",
        f".reg .b32 tau<{of_lane}>, last<{of_lane}>;",
        f".reg .b64 first<{of_lane}>;",
        f".reg .b32 mask<{of_lane * at_once}>, info<{of_lane * at_once}>;",
        "mov.b32 whole, $5;", "mul.wide.s32 a, row, $4;", "add.s64 row_lists, a, $6;",
        f"mul.wide.s32 a, row, {16 * lists};", "add.s64 counts, a, $7;",
        f"and.b32 list, lane, {min(padded, 32) - 1};",
        f"shr.u32 slot, lane, {min(padded, 32).bit_length() - 1};",
        f".reg .pred mine<{of_lane}>;", ".reg .b32 column;",
        "and.b32 column, list, 3;", "shl.b32 column, column, 1;",
        "shl.b32 apart, whole, 3;", "neg.s32 apart, apart;",
        "mov.b32 longest, 0;", "mov.b32 most_records, 0;", "mov.b32 c, 0;",
    ]  # fmt: skip
    for j in range(of_lane):
        lines += [
            f"add.s32 t, list, {32 * j};", f"setp.lt.s32 mine{j}, t, {lists};",
            f"mov.b32 length{j}, 0;", f"mov.b32 records{j}, 0;", "mul.wide.s32 a, t, 16;",
            "add.s64 a, a, counts;",
            f"mov.b32 tau{j}, 0;", f"mov.b32 last{j}, 0;",
            f"@mine{j} ld.global.v4.b32 {{length{j}, records{j}, tau{j}, last{j}}}, [a];",
            "mul.wide.s32 a, t, 8;", "add.s64 a, a, row_lists;",
            f"add.s64 first{j}, a, {8 * lists * (capacity + OVERSHOOT)};",
        ]  # fmt: skip
    # Beside how many there are, which would be waited for.
    lines += [
        f"mad.lo.s32 slot, warp, {turn}, slot;",
        *_record_lines(at_once, together, of_lane, lists, records),
    ]  # fmt: skip
    for j in range(of_lane):
        lines += [
            f"max.s32 longest, longest, length{j};",
            f"max.s32 most_records, most_records, records{j};",
        ]
        if together > 1:
            # One of the lanes that share a list counts it.
            lines += [f"setp.lt.s32 p, lane, {padded};", f"selp.b32 t, length{j}, 0, p;"]
            lines += ["add.s32 c, c, t;"]
        else:
            lines += [f"add.s32 c, c, length{j};"]
    lines += [
        "redux.sync.max.s32 longest, longest, -1;", f"setp.gt.s32 p, longest, {capacity};",
        "@p bra LACKS;",
        "redux.sync.max.s32 most_records, most_records, -1;",
        # Records that are left for this warp's turn; every warp counts all lists.
        f"mad.lo.s32 most_records, warp, {-turn}, most_records;",
        *places_lines("c"), f"setp.gt.s32 p, total, {held};", "@p bra LACKS;", "mov.b32 n, total;",
        "setp.eq.s32 p, tid, 0;", "@p st.shared.b32 [counter], n;",
        # The first list is a block's own program's, which always writes it; of others some may
        # have no limits, but no different ones: the k largest might not be complete.
        "shfl.sync.idx.b32 tau, tau0, 0, 31, -1;", "shfl.sync.idx.b32 last, last0, 0, 31, -1;",
        "setp.ne.s32 q, 0, 0;",
    ]  # fmt: skip
    for j in range(of_lane):
        lines += [
            f"xor.b32 t, tau{j}, tau;", f"xor.b32 u, last{j}, last;", "or.b32 t, t, u;",
            f"or.b32 u, tau{j}, last{j};", "setp.ne.s32 p, t, 0;", "setp.ne.and.s32 p, u, 0, p;",
            "or.pred q, q, p;",
        ]  # fmt: skip
    lines += ["vote.sync.any.pred q, q, -1;", "@q bra LACKS;"]
    if together > 1:
        lines += ["shfl.sync.idx.b32 before, before, list, 31, -1;"]
    for j in range(of_lane):
        lines += [f"mov.b32 offset{j}, before;", f"add.s32 before, before, length{j};"]
    lines += ["RECORDS:"]
    for r in range(0, at_once * of_lane, 2):
        two = list(range(r, min(r + 2, at_once * of_lane)))
        for q in two:
            i, j = q // of_lane, q % of_lane
            lines += [
                f"add.s32 t, slot, {i * together};", f"setp.lt.s32 p, t, records{j};",
                f"selp.b32 mask{q}, mask{q}, 0, p;", f"shr.u32 t, info{q}, {TILE_SHIFT};",
                f"and.b32 u{q % 2}, info{q}, {(1 << TILE_SHIFT) - 1};",
                # As encode_first_kernel._runs_of: f + apart * run.
                "setp.eq.s32 p, t, whole;", "shl.b32 t, t, 3;", "@p shl.b32 t, whole, 8;",
                "add.s32 t, t, column;", f"selp.b32 apart{q % 2}, -8, apart, p;",
                f"mad.lo.s32 latent{q % 2}, apart{q % 2}, -31, t;",
                # From the last one on, which takes less to find.
                f"popc.b32 t, mask{q};", f"add.s32 u{q % 2}, u{q % 2}, t;",
                f"sub.s32 u{q % 2}, u{q % 2}, 1;",
                f"add.s32 t, offset{j}, u{q % 2};", f"mad.lo.s32 to{q % 2}, t, 8, keys;",
                f"mad.lo.s32 u{q % 2}, u{q % 2}, {lists}, list;",
                f"add.s32 u{q % 2}, u{q % 2}, {32 * j};",
            ]  # fmt: skip
        bits = [line for q in two for line in _bit_lines(q, lists)]
        any_left = [
            f"or.b32 t, mask{two[0]}, mask{two[-1]};", "setp.ne.s32 p, t, 0;",
            "vote.sync.any.pred q, p, -1;",
        ]  # fmt: skip
        # Few records have more than two.
        lines += [
            *bits, *bits, *any_left, f"@!q bra BITS{r};", f"BIT{r}:", *bits, *any_left,
            f"@q bra BIT{r};", f"BITS{r}:",
        ]  # fmt: skip
    return lines + [
        f"add.s32 slot, slot, {turn * warps};",
        f"sub.s32 most_records, most_records, {turn * warps};",
        "setp.le.s32 p, most_records, 0;", "@p bra PLACED;",
        *_record_lines(at_once, together, of_lane, lists, records), "bra RECORDS;",
        "PLACED:", wait_lines(warps),
    ]  # fmt: skip


@constexpr_function
def _append_lines(held: int) -> list[str]:
    """Where p, a key of a latent's lower half u and activation t behind all others."""
    return [
        "@p atom.shared.add.u32 to, [counter], 1;", f"setp.lt.and.s32 p, to, {held}, p;",
        "mad.lo.s32 to, to, 8, keys;", "@p st.shared.v2.b32 [to], {u, t};",
    ]  # fmt: skip


@constexpr_function
def _keys_lines(held: int, size: int, warps: int) -> list[str]:
    """A key of each pair, its larger activation's, in its place. The other one, which is seldom
    among the largest, goes behind all, where it is."""
    # Pairs that a thread reads at once, up to 8: about so many there are mostly.
    each = (min(held // 2, 4 * size) + 32 * warps - 1) // (32 * warps)
    turns = (each + 7) // 8
    each = (each + turns - 1) // turns
    some = range(each)
    lines = [
        f".reg .b32 from, other, edge, f<{each}>, v<{each}>, w<{each}>;",
        f".reg .pred there<{each}>;", "mov.b32 from, tid_keys;", "sub.s32 c, n, tid;", "PAIRS:",
    ]  # fmt: skip
    for i in some:
        lines += [
            f"setp.gt.s32 there{i}, c, {32 * warps * i};", "mov.b32 u, 0;", f"mov.b32 f{i}, 0;",
            f"@there{i} ld.shared.v2.b32 {{f{i}, u}}, [from + {256 * warps * i}];",
            "mad.wide.u32 a, u, 8, row_lists;", f"mov.b32 v{i}, -1;", f"mov.b32 w{i}, -1;",
            f"@there{i} ld.global.v2.b32 {{v{i}, w{i}}}, [a];",
        ]  # fmt: skip
    for i in some:
        lines += [
            f"setp.gt.s32 p, w{i}, v{i};", f"sub.s32 u, 0x7FFFFFFF, f{i};",
            f"max.relu.s32 t, v{i}, w{i};", "@p sub.s32 u, u, 1;",
            f"@there{i} st.shared.v2.b32 [from + {256 * warps * i}], {{u, t}};",
            f"min.s32 t, v{i}, w{i};",
            "mov.b32 other, t;" if i == 0 else "max.s32 other, other, t;",
            "mov.b32 edge, f0;" if i == 0 else f"max.s32 edge, edge, f{i};",
        ]  # fmt: skip
    lines += [
        # Where zeros pass, negative values do; and of the last tile's columns some are no latents.
        "add.s32 edge, edge, 1;", "setp.ge.s32 p, edge, F;", "setp.eq.or.s32 p, tau, 0, p;",
        "vote.sync.any.pred p, p, -1;", "@p bra ANY;",
        "setp.ge.s32 p, other, tau;", "vote.sync.any.pred p, p, -1;", "@!p bra ONE;",
    ]  # fmt: skip
    for i in some:
        lines += [
            f"min.s32 t, v{i}, w{i};",
            # Of equal ones those that the filter let pass alone: with one of a higher latent the k
            # largest might not be complete.
            "setp.eq.s32 p, t, tau;", f"setp.le.and.s32 p, f{i}, last, p;",
            "setp.gt.or.s32 p, t, tau, p;",
            f"setp.gt.s32 q, w{i}, v{i};", f"sub.s32 u, 0x7FFFFFFF, f{i};",
            "@!q sub.s32 u, u, 1;", *_append_lines(held),
        ]  # fmt: skip
    lines += ["bra ONE;", "ANY:"]
    for i in some:
        lines += [
            f"min.s32 t, v{i}, w{i};", "max.s32 t, t, 0;", f"add.s32 bit, f{i}, 1;",
            "setp.eq.s32 p, t, tau;", f"setp.le.and.s32 p, f{i}, last, p;",
            "setp.gt.or.s32 p, t, tau, p;", "setp.lt.and.s32 p, bit, F, p;",
            f"and.pred p, p, there{i};",
            f"setp.gt.s32 q, w{i}, v{i};", f"selp.b32 u, f{i}, bit, q;",
            "sub.s32 u, 0x7FFFFFFF, u;", *_append_lines(held),
            # Only the first one may be a latent.
            "setp.ge.s32 p, bit, F;", f"and.pred p, p, there{i};", f"max.s32 t, v{i}, 0;",
            f"sub.s32 u, 0x7FFFFFFF, f{i};",
            f"@p st.shared.v2.b32 [from + {256 * warps * i}], {{u, t}};",
            # Where none is, the row is left to others.
            f"setp.ge.and.s32 p, f{i}, F, p;",
            f"@p red.shared.add.u32 [counter], {1 << 20};",
        ]  # fmt: skip
    return lines + [
        "ONE:", f"sub.s32 c, c, {32 * warps * each};", f"add.s32 from, from, {256 * warps * each};",
        "add.s32 t, c, lane;",
        "setp.gt.s32 p, t, 0;", "@p bra PAIRS;", wait_lines(warps), "ld.shared.b32 n, [counter];",
        f"setp.gt.s32 p, n, {held};", "@p bra LACKS;",
    ]  # fmt: skip


@constexpr_function
def lists_ptx(
    lists: int, capacity: int, records: int, held: int, size: int, warps: int, groups: int = 0,
    pitch: int = 0,
) -> str:  # fmt: skip
    """PTX of an output, a row's status, and 9 operands: row, F, k, the bytes from one row's lists
    to the next one's, whole tiles; addresses of the lists, their lengths, the values and the
    indices. The status is 0 where the row's list is written, -1 where its lists lack some, or have
    more keys than are held: each pair is one, or two.

    With `groups` of RUN neighbours 3 more: the first row that has pre-activations instead of lists,
    addresses of these and of the groups' largest, `pitch` a row.
    """
    assert not groups or size + 32 * TAIL_EACH * warps <= held, "a turn has no room"
    lines = [
        *start_lines(held, size, warps),
        *([".reg .pred left;", "setp.ge.s32 left, row, $10;", "@left bra TAIL;"] if groups else []),
        *_places_lines(lists, capacity, records, held, warps), *_keys_lines(held, size, warps),
        *(["setp.ne.s32 left, 0, 0;"] if groups else []),
        *pick_lines(held, size, 8, groups > 0, warps),
    ]  # fmt: skip
    if groups:
        # Behind what most rows take, which a multiprocessor holds.
        lines += [
            "bra END;", "TAIL:", ".reg .b32 tail_row;", "sub.s32 tail_row, row, $10;",
            ".reg .b64 pre, maxima;", f"mul.wide.s32 a, tail_row, {4 * RUN * pitch};",
            "add.s64 pre, a, $11;", f"mul.wide.s32 a, tail_row, {4 * pitch};",
            "add.s64 maxima, a, $12;",
            *groups_lines(groups, held // 32, size, warps, RUN, TAIL_EACH), "END:",
        ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"
