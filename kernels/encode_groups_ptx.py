"""PTX that makes keys of a row's pre-activations and their groups' largest (encode_tiles.py), for
encode_pick_ptx.py."""

from __future__ import annotations

from triton import constexpr_function

from .encode_pick_ptx import pick_lines, places_lines, search_lines, start_lines
from .encode_plan import GROUP

# Groups that are read at once (`encode_plan.groups_room` leaves room for them).
AT_ONCE = 32


@constexpr_function
def _groups_lines(groups: int, room: int, size: int) -> list[str]:
    """Makes keys of those entries of a row's groups that may be among the k largest, as long as
    there is room: of the k groups whose largest are largest, or a few more, the entries that reach
    the least of these. Their numbers are listed first."""
    each = (groups + 31) // 32
    lines = [
        f".reg .b32 g<{each}>, v<{AT_ONCE}>, list_length, first, number, to, zeros;",
        f".reg .b32 part, column, least, before, total, list, f<{AT_ONCE // 4}>;",
        # Fewer than k groups over the k-th one's largest, and up to k that equal it.
        f".shared .align 16 .b8 list_memory[{8 * size}];", "mov.u32 list, list_memory;",
        ".reg .pred left;",
        "mul.wide.s32 a, lane, 4;", "add.s64 a, a, maxima;",
    ]  # fmt: skip
    for i in range(each):
        lines += [
            f"add.s32 t, lane, {32 * i};", f"setp.lt.s32 p, t, {groups};", f"mov.b32 g{i}, -1;",
            f"@p ld.global.b32 g{i}, [a + {128 * i}];",
            # One NaN, as encode_select.relu_bits has it.
            f"min.s32 g{i}, g{i}, 0x7FC00000;",
        ]  # fmt: skip
    lines += [
        f"mov.b32 n, {groups};", "mov.b32 target, k;", f"mov.b32 most, {size};",
        "mov.b32 count, n;", *search_lines([f"g{i}" for i in range(each)], "GROUP_"),
        "mov.b32 t, 0;", "mov.b64 limit, {t, low};", "mov.b32 list_length, 0;", "mov.b32 c, 0;",
    ]  # fmt: skip
    for i in range(each):
        lines += [
            # Of groups with an equal largest the first k: each has such an entry.
            f"setp.eq.s32 p, g{i}, low;", "vote.sync.ballot.b32 ballot, p, -1;",
            "and.b32 to, ballot, lower;", "popc.b32 to, to;", "add.s32 to, to, c;",
            "popc.b32 ballot, ballot;", "add.s32 c, c, ballot;",
            "setp.lt.and.s32 p, to, k, p;", f"setp.gt.or.s32 p, g{i}, low, p;",
            "vote.sync.ballot.b32 ballot, p, -1;",
            "and.b32 to, ballot, lower;", "popc.b32 to, to;", "add.s32 to, to, list_length;",
            "mad.lo.s32 to, to, 4, list;", f"add.s32 t, lane, {32 * i};",
            "@p st.shared.b32 [to], t;", "popc.b32 ballot, ballot;",
            "add.s32 list_length, list_length, ballot;",
        ]  # fmt: skip
    lines += [
        "bar.warp.sync -1;", "mov.b32 first, 0;", "mov.b32 n, 0;", "mov.b32 zeros, low;",
        "shr.u32 part, lane, 3;", "and.b32 column, lane, 7;", "shl.b32 column, column, 2;",
        "READ:", "setp.lt.s32 left, first, list_length;", "@!left bra NO_ROOM;",
        f"setp.gt.s32 p, n, {32 * (room - AT_ONCE)};", "@p bra NO_ROOM;",
        "add.s32 t, first, lane;", "setp.lt.s32 p, t, list_length;", "mov.b32 number, 0;",
        "mad.lo.s32 t, t, 4, list;", "@p ld.shared.b32 number, [t];",
        # What a row's entries are to reach, raised with each turn.
        "mov.b64 {t, least}, limit;",
    ]  # fmt: skip
    loads = AT_ONCE // 4
    for i in range(loads):
        # A group's 32 are four of each of eight lanes.
        four = ", ".join(f"v{4 * i + j}" for j in range(4))
        lines += [
            f"add.s32 t, part, {4 * i};", "shfl.sync.idx.b32 u, number, t, 31, -1;",
            f"mad.lo.s32 f{i}, u, {GROUP}, column;", "add.s32 t, t, first;",
            "setp.lt.s32 p, t, list_length;", f"mul.wide.s32 a, f{i}, 4;", "add.s64 a, a, pre;",
            *(f"mov.b32 v{4 * i + j}, -1;" for j in range(4)),
            # What is read once makes room for what is not read yet.
            f"@p ld.global.L1::evict_first.v4.b32 {{{four}}}, [a];",
            f"@!p mov.b32 f{i}, F;",
        ]  # fmt: skip
    lines += ["setp.gt.s32 p, zeros, 0;", "@p bra POSITIVE;"]
    # ReLU.
    lines += [f"max.s32 v{i}, v{i}, 0;" for i in range(AT_ONCE)]
    lines += [
        "POSITIVE:", f"and.b32 t, F, {GROUP - 1};", "setp.eq.and.s32 p, t, 0, p;", "@p bra INSIDE;",
    ]  # fmt: skip
    for i in range(AT_ONCE):
        lines += [
            f"add.s32 t, f{i // 4}, {i % 4};", "setp.lt.s32 p, t, F;",
            f"selp.b32 v{i}, v{i}, -1, p;",
        ]  # fmt: skip
    lines += ["INSIDE:", "mov.b32 c, 0;"]
    for i in range(AT_ONCE):
        lines += [f"setp.ge.s32 p, v{i}, least;", "@p add.s32 c, c, 1;"]
    lines += [*places_lines("c"), "add.s32 t, before, n;", "mad.lo.s32 to, t, 8, keys;"]
    lines += ["add.s32 n, n, total;"]
    for i in range(AT_ONCE):
        if i % 4 == 0:
            lines += [f"sub.s32 u, 0x7FFFFFFF, f{i // 4};"]
        lines += [
            f"setp.ge.s32 p, v{i}, least;", f"@p st.shared.v2.b32 [to], {{u, v{i}}};",
            "@p add.s32 to, to, 8;",
        ]  # fmt: skip
        if i % 4 < 3:
            lines += ["sub.s32 u, u, 1;"]
    return [*lines, f"add.s32 first, first, {AT_ONCE};", "bra READ;"]


@constexpr_function
def groups_ptx(groups: int, pitch: int, room: int, size: int) -> str:
    """PTX of an output, a row's status, and 8 operands: row, F, k, the bytes from one row of
    pre-activations to the next; addresses of these and their groups' largest, the values and the
    indices. The status is 0 where the row's list is written, -1 where a group's largest was of a
    column that is no latent."""
    lines = [
        *start_lines(32 * room), ".reg .b64 pre, maxima;",
        "mul.wide.s32 a, row, $4;", "add.s64 pre, a, $5;",
        f"mul.wide.s32 a, row, {4 * pitch};", "add.s64 maxima, a, $6;",
        *_groups_lines(groups, room, size), *pick_lines(32 * room, size, 7, True),
    ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"
