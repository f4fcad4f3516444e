"""PTX that makes keys of a row's pre-activations and their groups' largest (encode_tiles.py), for
encode_pick_ptx.py."""

from __future__ import annotations

from triton import constexpr_function

from .encode_pick_ptx import (
    join_lines,
    pick_lines,
    places_lines,
    search_lines,
    start_lines,
    wait_lines,
)
from .encode_plan import GROUP


@constexpr_function
def _load_lines(v: str, f: str, group: int, each_lane: int) -> list[str]:
    """Loads a warp's groups from the `first` of the list on: a lane's entries, {v}0 ..., and the
    latent of each fourth one, {f}0 ...; F where there is none."""
    at_once, together = 32 * each_lane // group, 128 // group
    lines = [f"mad.lo.s32 u, warp, {at_once}, first;"]
    for j in range(at_once // 32):
        lines += [
            "add.s32 t, u, lane;", f"add.s32 t, t, {32 * j};", "setp.lt.s32 p, t, list_length;",
            f"mov.b32 number{j}, 0;", "mad.lo.s32 t, t, 4, chosen;",
            f"@p ld.shared.b32 number{j}, [t];",
        ]  # fmt: skip
    lines += ["add.s32 c, u, part;"]
    for i in range(each_lane // 4):
        # A group's are four of each of some neighbouring lanes.
        four = [f"{v}{4 * i + j}" for j in range(4)]
        number = f"number{together * i // 32}"
        lines += [
            f"add.s32 t, part, {together * i % 32};",
            f"shfl.sync.idx.b32 {f}{i}, {number}, t, 31, -1;",
            f"mad.lo.s32 {f}{i}, {f}{i}, {group}, place;", f"add.s32 t, c, {together * i};",
            "setp.lt.s32 p, t, list_length;", f"mul.wide.s32 a, {f}{i}, 4;", "add.s64 a, a, pre;",
            *(f"mov.b32 {one}, -1;" for one in four),
            # What is read once makes room for what is not read yet.
            f"@p ld.global.L1::evict_first.v4.b32 {{{', '.join(four)}}}, [a];",
            f"@!p mov.b32 {f}{i}, F;",
        ]  # fmt: skip
    return lines


@constexpr_function
def groups_lines(
    groups: int, room: int, size: int, warps: int, group: int, each_lane: int
) -> list[str]:
    """Makes keys of those entries of a row's groups that may be among the k largest, as long as
    there is room: of the k groups whose largest are largest, or a few more, the entries that reach
    the least of these. Their numbers are listed first."""
    # A thread has so many neighbours, so that threads' order is the row's.
    each = (groups + 128 * warps - 1) // (128 * warps) * 4
    lines = [
        f".reg .b32 g<{each}>, e<{each_lane}>, list_length, first, number, goes, zeros, same;",
        f".reg .b32 number<{each_lane // group}>;",
        f".reg .b32 part, place, chosen, own, l<{each_lane // 4}>;",
        f".reg .b32 next_e<{each_lane}>, next_l<{each_lane // 4}>;",
        # Fewer than k groups over the k-th one's largest, and up to k that equal it.
        f".shared .align 16 .b8 list_memory[{8 * size}];", "mov.u32 chosen, list_memory;",
        f"mul.lo.s32 own, tid, {each};", "mul.wide.s32 a, own, 4;", "add.s64 a, a, maxima;",
    ]  # fmt: skip
    for i in range(0, each, 4):
        four = [f"g{i + j}" for j in range(4)]
        lines += [
            f"add.s32 t, own, {i};", f"setp.lt.s32 p, t, {groups};",
            *(f"mov.b32 {g}, -1;" for g in four),
            # The last ones may be of columns that are no latents.
            f"@p ld.global.v4.b32 {{{', '.join(four)}}}, [a + {4 * i}];",
        ]  # fmt: skip
    for i in range(each):
        # One NaN, as encode_select.relu_bits has it.
        lines += [f"min.s32 g{i}, g{i}, 0x7FC00000;"]
        if groups % 4:
            lines += [
                f"add.s32 t, own, {i};", f"setp.ge.s32 p, t, {groups};", f"@p mov.b32 g{i}, -1;"
            ]  # fmt: skip
    lines += [
        # `count_lines` may not leave off any.
        f"mov.b32 n, {32 * warps * each};", "mov.b32 target, k;", f"mov.b32 most, {size};",
        f"mov.b32 count, {groups};",
        *search_lines([f"g{i}" for i in range(each)], "GROUP_", warps),
        "mov.b32 floor, low;", "mov.b32 same, 0;", "mov.b32 c, 0;",
    ]  # fmt: skip
    for i in range(each):
        lines += [f"setp.gt.s32 p, g{i}, low;", "@p add.s32 c, c, 1;"]
        lines += [f"setp.eq.s32 p, g{i}, low;", "@p add.s32 same, same, 1;"]
    # Those above the least one, then of those that equal it the first k: each has such an entry.
    lines += [
        *places_lines("c"), "mov.b32 m, total;", *join_lines(warps, ["add.s32 m"], "before"),
        "mad.lo.s32 goes, before, 4, chosen;", "mov.b32 list_length, m;", *places_lines("same"),
        "mov.b32 m, total;", *join_lines(warps, ["add.s32 m"], "before"),
        "min.s32 m, m, k;", "mov.b32 same, before;", "add.s32 number, before, list_length;",
        "mad.lo.s32 number, number, 4, chosen;", "add.s32 list_length, list_length, m;",
    ]  # fmt: skip
    for i in range(each):
        lines += [
            f"add.s32 t, own, {i};", f"setp.gt.s32 p, g{i}, low;",
            "@p st.shared.b32 [goes], t;", "@p add.s32 goes, goes, 4;",
            f"setp.eq.s32 q, g{i}, low;", "setp.lt.and.s32 p, same, k, q;",
            "@p st.shared.b32 [number], t;", "@q add.s32 same, same, 1;",
            "@q add.s32 number, number, 4;",
        ]  # fmt: skip
    lines += [
        wait_lines(warps), "mov.b32 first, 0;", "mov.b32 n, 0;", "mov.b32 zeros, low;",
        f"shr.u32 part, lane, {(group // 4).bit_length() - 1};",
        f"and.b32 place, lane, {group // 4 - 1};", "shl.b32 place, place, 2;",
        *_load_lines("e", "l", group, each_lane),
        "READ:", "setp.lt.s32 left, first, list_length;", "@!left bra NO_ROOM;",
        f"setp.gt.s32 p, n, {32 * (room - each_lane * warps)};", "@p bra NO_ROOM;",
        # The next ones are on their way meanwhile.
        f"add.s32 first, first, {32 * each_lane // group * warps};",
        *_load_lines("next_e", "next_l", group, each_lane),
    ]  # fmt: skip
    lines += ["setp.gt.s32 p, zeros, 0;", "@p bra POSITIVE;"]
    # ReLU.
    lines += [f"max.s32 e{i}, e{i}, 0;" for i in range(each_lane)]
    lines += [
        "POSITIVE:", f"and.b32 t, F, {group - 1};", "setp.eq.and.s32 p, t, 0, p;", "@p bra INSIDE;",
    ]  # fmt: skip
    for i in range(each_lane):
        lines += [
            f"add.s32 t, l{i // 4}, {i % 4};", "setp.lt.s32 p, t, F;",
            f"selp.b32 e{i}, e{i}, -1, p;",
        ]  # fmt: skip
    lines += ["INSIDE:", "mov.b32 c, 0;"]
    for i in range(each_lane):
        lines += [f"setp.ge.s32 p, e{i}, floor;", "@p add.s32 c, c, 1;"]
    lines += [
        *places_lines("c"), "mov.b32 c, total;", *join_lines(warps, ["add.s32 c"], "before"),
        "add.s32 t, before, n;", "mad.lo.s32 goes, t, 8, keys;", "add.s32 n, n, c;",
    ]  # fmt: skip
    for i in range(each_lane):
        if i % 4 == 0:
            lines += [f"sub.s32 u, 0x7FFFFFFF, l{i // 4};"]
        lines += [
            f"setp.ge.s32 p, e{i}, floor;", f"@p st.shared.v2.b32 [goes], {{u, e{i}}};",
            "@p add.s32 goes, goes, 8;",
        ]  # fmt: skip
        if i % 4 < 3:
            lines += ["sub.s32 u, u, 1;"]
    lines += [f"mov.b32 e{i}, next_e{i};" for i in range(each_lane)]
    lines += [f"mov.b32 l{i}, next_l{i};" for i in range(each_lane // 4)]
    return [*lines, "bra READ;"]


@constexpr_function
def groups_ptx(
    groups: int, pitch: int, room: int, size: int, warps: int, group: int = GROUP
) -> str:
    """PTX of an output, a row's status, and 8 operands: row, F, k, the bytes from one row of
    pre-activations to the next; addresses of these and their groups' largest, the values and the
    indices. The status is 0 where the row's list is written, -1 where a group's largest was of a
    column that is no latent."""
    lines = [
        *start_lines(32 * room, size, warps), ".reg .b64 pre, maxima;", ".reg .pred left;",
        "mul.wide.s32 a, row, $4;", "add.s64 pre, a, $5;",
        f"mul.wide.s32 a, row, {4 * pitch};", "add.s64 maxima, a, $6;",
        *groups_lines(groups, room, size, warps, group, 32),
        *pick_lines(32 * room, size, 7, True, warps),
    ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"
