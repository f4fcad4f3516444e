"""PTX of a warp that selects a row's k largest activations (encode_pick.py).

Functions named `_lines` give pieces of it, which share registers and labels.
"""

from __future__ import annotations

from triton import constexpr_function

from .encode_plan import GROUP

# Groups that are read at once (`encode_plan.groups_room` leaves room for them).
AT_ONCE = 16


@constexpr_function
def _gather_lines(lists: int, capacity: int, room: int, size: int) -> list[str]:
    """Makes keys of a row's lists, one after another at the front of the same memory, as long as
    there is room; `n` counts them. No key is written past the entries read. A list's entries, of
    latent and bits, are `lists` apart; a key has the bits above and 0x7FFFFFFF less the latent.
    """
    padded = 1 << (lists - 1).bit_length()
    of_lane = max(1, padded // 32)  # lists that a lane reads
    together = max(1, 32 // padded)  # entries of a list that are read at once
    # What a batch may add has to leave room for what is kept when there is no more.
    batch = 16 if room >= 32 + size // 32 else 8
    unroll = max(1, batch // of_lane)
    lines = [
        f".reg .b32 list, slot, first, longest, length<{of_lane}>, ballot, to;",
        f".reg .b64 at<{of_lane}>;", f".reg .pred there<{of_lane * unroll}>;",
        f".reg .b32 f<{of_lane * unroll}>, v<{of_lane * unroll}>;",
        f"and.b32 list, lane, {min(padded, 32) - 1};",
        f"shr.u32 slot, lane, {min(padded, 32).bit_length() - 1};",
        "mov.b32 longest, 0;",
    ]  # fmt: skip
    for j in range(of_lane):
        lines += [
            f"add.s32 t, list, {32 * j};", f"setp.lt.s32 p, t, {lists};",
            f"mov.b32 length{j}, 0;", "mul.wide.s32 a, t, 4;", "add.s64 a, a, counts;",
            f"@p ld.global.b32 length{j}, [a];", f"max.s32 longest, longest, length{j};",
            f"mad.lo.s32 t, slot, {lists}, t;", "mul.wide.s32 a, t, 8;",
            f"add.s64 at{j}, a, row_keys;",
        ]  # fmt: skip
    lines += [
        "redux.sync.max.s32 longest, longest, -1;", f"setp.gt.s32 p, longest, {capacity};",
        "@p mov.b32 status, -1;", "@p bra DONE;", "mov.b32 first, 0;", "mov.b32 n, 0;",
        "READ:", "setp.lt.s32 left, first, longest;", "@!left bra NO_ROOM;",
        f"setp.gt.s32 p, n, {32 * (room - batch)};", "@p bra NO_ROOM;",
    ]  # fmt: skip
    for u in range(unroll):
        for j in range(of_lane):
            i = u * of_lane + j
            lines += [
                f"add.s32 t, slot, {u * together};", f"setp.lt.s32 there{i}, t, length{j};",
                f"@there{i} ld.global.v2.b32 {{f{i}, v{i}}}, [at{j} + {8 * lists * u * together}];",
            ]  # fmt: skip
    # Every lane has read its entries before any is overwritten.
    lines += ["bar.warp.sync -1;"]
    for i in range(of_lane * unroll):
        lines += [
            # Of the last tile's columns some are no latents.
            f"setp.lt.and.s32 p, f{i}, F, there{i};", "vote.sync.ballot.b32 ballot, p, -1;",
            "and.b32 to, ballot, lower;", "popc.b32 to, to;", "add.s32 to, to, n;",
            "mul.wide.s32 a, to, 8;", "add.s64 a, a, row_keys;",
            # ReLU, and one NaN, as encode_select.relu_bits has it.
            f"max.s32 v{i}, v{i}, 0;", f"min.s32 v{i}, v{i}, 0x7FC00000;",
            f"sub.s32 f{i}, 0x7FFFFFFF, f{i};", f"@p st.global.v2.b32 [a], {{f{i}, v{i}}};",
            "popc.b32 ballot, ballot;", "add.s32 n, n, ballot;",
        ]  # fmt: skip
    for j in range(of_lane):
        lines += [f"add.s64 at{j}, at{j}, {8 * lists * unroll * together};"]
    lines += [f"add.s32 slot, slot, {unroll * together};"]
    lines += [f"add.s32 first, first, {unroll * together};", "bra READ;"]
    return lines


@constexpr_function
def _groups_lines(groups: int, room: int, size: int) -> list[str]:
    """Makes keys of those entries of a row's groups that may be among the k largest, as long as
    there is room: of the k groups whose largest are largest, or a few more, the entries that reach
    the least of these. Their numbers are listed first, where the largest were."""
    each = (groups + 31) // 32
    lines = [
        f".reg .b32 g<{each}>, v<{AT_ONCE}>, list_length, first, number, ballot, to, f;",
        ".reg .b64 least;", f".reg .pred there<{AT_ONCE}>;",
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
        "mov.b32 count, n;", *_search_lines([f"g{i}" for i in range(each)], "GROUP_"),
        "mov.b32 t, 0;", "mov.b64 limit, {t, low};", "mov.b32 list_length, 0;", "mov.b32 c, 0;",
        # Every lane has read its groups' before any is overwritten.
        "bar.warp.sync -1;",
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
            "mul.wide.s32 a, to, 4;", "add.s64 a, a, maxima;", f"add.s32 t, lane, {32 * i};",
            "@p st.global.b32 [a], t;", "popc.b32 ballot, ballot;",
            "add.s32 list_length, list_length, ballot;",
        ]  # fmt: skip
    lines += [
        "bar.warp.sync -1;", "mov.b32 first, 0;", "mov.b32 n, 0;",
        "READ:", "setp.lt.s32 left, first, list_length;", "@!left bra NO_ROOM;",
        f"setp.gt.s32 p, n, {32 * (room - AT_ONCE)};", "@p bra NO_ROOM;",
        "add.s32 t, first, lane;", "setp.lt.s32 p, t, list_length;", "mov.b32 number, 0;",
        "mul.wide.s32 a, t, 4;", "add.s64 a, a, maxima;", "@p ld.global.b32 number, [a];",
    ]  # fmt: skip
    for i in range(AT_ONCE):
        lines += [
            f"add.s32 t, first, {i};", f"setp.lt.s32 there{i}, t, list_length;",
            f"shfl.sync.idx.b32 t, number, {i}, 31, -1;", f"mad.lo.s32 t, t, {GROUP}, lane;",
            f"setp.lt.and.s32 there{i}, t, F, there{i};", "mul.wide.s32 a, t, 4;",
            # What is read once makes room for what is not read yet.
            "add.s64 a, a, pre;", f"@there{i} ld.global.L1::evict_first.b32 v{i}, [a];",
        ]  # fmt: skip
    for i in range(AT_ONCE):
        lines += [
            f"shfl.sync.idx.b32 t, number, {i}, 31, -1;", f"mad.lo.s32 f, t, {GROUP}, lane;",
            "sub.s32 f, 0x7FFFFFFF, f;",
            f"max.s32 v{i}, v{i}, 0;", f"min.s32 v{i}, v{i}, 0x7FC00000;",
            f"mov.b64 least, {{f, v{i}}};", f"setp.ge.and.s64 p, least, limit, there{i};",
            "vote.sync.ballot.b32 ballot, p, -1;", "and.b32 to, ballot, lower;",
            "popc.b32 to, to;", "add.s32 to, to, n;", "mul.wide.s32 a, to, 8;",
            "add.s64 a, a, row_keys;", "@p st.global.b64 [a], least;",
            "popc.b32 ballot, ballot;", "add.s32 n, n, ballot;",
        ]  # fmt: skip
    return [*lines, f"add.s32 first, first, {AT_ONCE};", "bra READ;"]


@constexpr_function
def _count_lines(held: list[str], comparison: str, label: str) -> list[str]:
    """`c` counts a row's values by a comparison, in eights as long as there are any."""
    lines = ["mov.b32 c, 0;"]
    for i, value in enumerate(held):
        if i % 8 == 0 and i > 0:
            lines += [f"setp.le.s32 p, n, {32 * i};", f"@p bra {label};"]
        lines += [f"setp.{comparison}.s32 p, {value}, mid;", "@p add.s32 c, c, 1;"]
    return [*lines, f"{label}:", "redux.sync.add.s32 c, c, -1;"]


@constexpr_function
def _search_lines(held: list[str], label: str) -> list[str]:
    """`low`, which at least `target` of `count` values reach and, but for equal ones, at most
    `most`; -1 is none. `count` of them do.

    The bits are searched as if the logarithm of the count fell evenly; `below` and `above` weigh
    the two ends (Illinois): one that stayed twice counts half. Every sixth step halves the range,
    which bounds the steps whatever the values are.
    """
    lines = [f"mov.b32 high, {held[0]};", f"mov.b32 low, {held[0]};"]
    for value in held[1:]:
        # As an unsigned number -1, where there is none, is the largest.
        lines += [f"max.s32 high, high, {value};", f"min.u32 low, low, {value};"]
    return lines + [
        "redux.sync.max.s32 high, high, -1;", "redux.sync.min.u32 low, low, -1;",
        "mov.b32 over, 0;", "mov.b32 moved, 0;", "mov.b32 step, 0;",
        "mov.f32 below, 0f3F800000;", "mov.f32 above, 0f3F800000;",
        # log2 of the middle of what is sought.
        "add.s32 t, target, most;", "cvt.rn.f32.s32 want, t;", "mul.f32 want, want, 0f3F000000;",
        "lg2.approx.f32 want, want;",
        f"{label}STEP:", "setp.le.s32 p, count, most;", f"@p bra {label}FOUND;",
        "setp.ge.s32 p, low, high;", f"@p bra {label}FOUND;",
        "cvt.rn.f32.s32 x, count;", "lg2.approx.f32 x, x;", "sub.f32 x, x, want;",
        "mul.f32 x, x, below;",
        "cvt.rn.f32.s32 y, over;", "max.f32 y, y, 0f3F000000;", "lg2.approx.f32 y, y;",
        "sub.f32 y, want, y;", "mul.f32 y, y, above;", "add.f32 y, y, x;",
        "div.approx.f32 x, x, y;",
        "rem.u32 t, step, 6;", "setp.eq.s32 p, t, 5;", "selp.f32 x, 0f3F000000, x, p;",
        "sub.s32 t, high, low;", "cvt.rn.f32.s32 y, t;", "mul.f32 x, x, y;",
        "cvt.rzi.s32.f32 mid, x;", "add.s32 mid, mid, low;", "add.s32 t, low, 1;",
        "max.s32 mid, mid, t;", "min.s32 mid, mid, high;",
        *_count_lines(held, "ge", f"{label}COUNTED"),
        "add.s32 step, step, 1;", "setp.ge.s32 p, c, target;", f"@p bra {label}LOWER;",
        "sub.s32 high, mid, 1;", "mov.b32 over, c;", "mov.f32 above, 0f3F800000;",
        "setp.eq.s32 p, moved, -1;", "@p mul.f32 below, below, 0f3F000000;",
        "@!p mov.f32 below, 0f3F800000;", "mov.b32 moved, -1;", f"bra {label}STEP;",
        f"{label}LOWER:", "mov.b32 low, mid;", "mov.b32 count, c;", "mov.f32 below, 0f3F800000;",
        "setp.eq.s32 p, moved, 1;", "@p mul.f32 above, above, 0f3F000000;",
        "@!p mov.f32 above, 0f3F800000;", "mov.b32 moved, 1;", f"bra {label}STEP;",
        f"{label}FOUND:",
    ]  # fmt: skip


@constexpr_function
def _limit_lines(room: int, size: int) -> list[str]:
    """`limit`, the least key of at least k and at most `size` of a row's n keys. Where too many
    values are equal, the keys' lower halves are searched the same way."""
    lines = [f"mov.b32 b{i}, -1;" for i in range(room)]
    for i in range(room):
        if i % 8 == 0 and i > 0:
            lines += [f"setp.le.s32 p, n, {32 * i};", "@p bra LOADED;"]
        lines += [
            f"add.s32 t, lane, {32 * i};", "setp.lt.s32 p, t, n;",
            f"@p ld.global.b32 b{i}, [lane_keys + {256 * i + 4}];",
        ]  # fmt: skip
    lines += [
        "LOADED:", "mov.b32 target, k;", f"mov.b32 most, {size};", "mov.b32 count, n;",
        "mov.b32 equal, -1;",
        "SEARCH:", *_search_lines([f"b{i}" for i in range(room)], ""),
        "setp.ge.s32 p, equal, 0;", "mov.b64 limit, {low, equal};", "@p bra LIMIT;",
        "mov.b32 t, 0;", "mov.b64 limit, {t, low};", "setp.le.s32 p, count, most;", "@p bra LIMIT;",
        # Too many equal ones.
        "mov.b32 equal, low;", "mov.b32 mid, low;",
        *_count_lines([f"b{i}" for i in range(room)], "gt", "OVER"),
        "sub.s32 target, k, c;", f"sub.s32 most, {size}, c;", "sub.s32 count, count, c;",
    ]  # fmt: skip
    for i in range(room):
        lines += [
            f"setp.eq.s32 p, b{i}, equal;", f"mov.b32 b{i}, -1;",
            f"@p ld.global.b32 b{i}, [lane_keys + {256 * i}];",
        ]  # fmt: skip
    return [*lines, "bra SEARCH;", "LIMIT:"]


@constexpr_function
def _keep_lines(room: int) -> list[str]:
    """Leaves the keys from `limit` on, `m` of them, at the front."""
    lines = ["mov.b32 m, 0;"]
    for i in range(0, room, 8):
        if i > 0:
            lines += [f"setp.le.s32 p, n, {32 * i};", "@p bra KEPT;"]
        for j in range(8):
            lines += [
                f"add.s32 t, lane, {32 * (i + j)};", f"setp.lt.s32 kept{j}, t, n;",
                f"@kept{j} ld.global.b64 key{j}, [lane_keys + {256 * (i + j)}];",
            ]  # fmt: skip
        lines += ["bar.warp.sync -1;"]
        for j in range(8):
            lines += [
                f"setp.ge.and.s64 p, key{j}, limit, kept{j};",
                "vote.sync.ballot.b32 ballot, p, -1;", "and.b32 to, ballot, lower;",
                "popc.b32 to, to;", "add.s32 to, to, m;", "mul.wide.s32 a, to, 8;",
                "add.s64 a, a, row_keys;", f"@p st.global.b64 [a], key{j};",
                "popc.b32 ballot, ballot;", "add.s32 m, m, ballot;",
            ]  # fmt: skip
    return [*lines, "KEPT:", "bar.warp.sync -1;"]


@constexpr_function
def _sort_lines(size: int) -> list[str]:
    """Sorts m keys, at most `size`, from the largest on by a bitonic network, and writes k of them.
    Of the sorted a lane has size / 32 neighbours."""
    each = size // 32
    lines = [f".reg .b64 s<{each}>;", ".reg .pred up, take;", ".reg .b32 high_word, low_word;"]
    for r in range(each):
        lines += [
            f"add.s32 t, lane, {32 * r};", "setp.lt.s32 p, t, m;", f"mov.b64 s{r}, -1;",
            f"@p ld.global.b64 s{r}, [lane_keys + {256 * r}];",
        ]  # fmt: skip
    block = 2
    while block <= size:
        stride = block // 2
        while stride >= 1:
            if stride >= each:
                # A lane and another: the first keeps the larger ones where the block descends.
                lines += [f"and.b32 t, lane, {stride // each};"]
                if block < size:
                    lines += [
                        f"and.b32 u, lane, {block // each};", "setp.eq.s32 p, u, 0;",
                        "setp.eq.s32 up, t, 0;", "xor.pred up, up, p;", "not.pred up, up;",
                    ]  # fmt: skip
                else:
                    lines += ["setp.eq.s32 up, t, 0;"]
                for r in range(each):
                    lines += [
                        f"mov.b64 {{low_word, high_word}}, s{r};",
                        f"shfl.sync.bfly.b32 low_word, low_word, {stride // each}, 31, -1;",
                        f"shfl.sync.bfly.b32 high_word, high_word, {stride // each}, 31, -1;",
                        "mov.b64 a, {low_word, high_word};",
                        f"setp.gt.s64 take, a, s{r};", "xor.pred take, take, up;",
                        f"selp.b64 s{r}, s{r}, a, take;",
                    ]  # fmt: skip
            else:
                # Within a lane. `up`: descends here.
                if each <= block < size:
                    lines += [f"and.b32 u, lane, {block // each};", "setp.eq.s32 up, u, 0;"]
                else:
                    lines += ["setp.eq.s32 up, 0, 0;"]
                for r in range(each):
                    if r & stride:
                        continue
                    if block < each and r & block:
                        first, second = f"s{r + stride}", f"s{r}"
                    else:
                        first, second = f"s{r}", f"s{r + stride}"
                    lines += [
                        f"setp.gt.s64 take, {second}, {first};", "xor.pred take, take, up;",
                        f"selp.b64 a, {first}, {second}, take;",
                        f"selp.b64 {second}, {second}, {first}, take;",
                        f"mov.b64 {first}, a;",
                    ]  # fmt: skip
            stride //= 2
        block *= 2
    lines += [f"mul.lo.s32 to, lane, {each};", "mul.wide.s32 a, to, 4;"]
    lines += ["add.s64 values, values, a;", "add.s64 indices, indices, a;"]
    for r in range(each):
        lines += [
            f"add.s32 t, to, {r};", "setp.lt.s32 p, t, k;",
            f"mov.b64 {{low_word, high_word}}, s{r};", "sub.s32 low_word, 0x7FFFFFFF, low_word;",
            f"@p st.global.b32 [values + {4 * r}], high_word;",
            f"@p st.global.b32 [indices + {4 * r}], low_word;",
        ]  # fmt: skip
    return lines


@constexpr_function
def _pick_lines(gather: list[str], room: int, size: int) -> list[str]:
    """A row's list from keys that `gather` makes at `row_keys`, which goes on at READ."""
    return [
        f".reg .b32 b<{room}>, c, low, high, mid, count, over, target, most, moved, step, equal;",
        ".reg .b32 m;",
        ".reg .f32 want, x, y, below, above;", ".reg .b64 lane_keys, limit, key<8>;",
        ".reg .pred left, kept<8>;",
        "mul.wide.s32 a, lane, 8;", "add.s64 lane_keys, a, row_keys;",
        *gather,
        "NO_ROOM:", "bar.warp.sync -1;",
        "setp.lt.s32 p, n, k;", "@p mov.b32 status, -1;", "@p bra DONE;",
        *_limit_lines(room, size),
        *_keep_lines(room),
        "mov.b32 n, m;", "@left bra READ;",
        *_sort_lines(size),
        "DONE:", "setp.eq.s32 p, lane, 0;", "@p st.global.b32 [statuses], status;",
        "END:", "mov.b32 $0, status;",
    ]  # fmt: skip


@constexpr_function
def _row_lines(keys: int, pitch: int, outputs: int) -> list[str]:
    """Operands 1 to 4: first row, N, F, k; others as numbered: a row's keys, the bytes from one
    row's to the next one's, and from `outputs` on addresses of values, indices and statuses."""
    return [
        ".reg .pred p, q;", ".reg .b32 lane, lower, row, n, t, u, k, F, status;",
        ".reg .b64 a, row_keys, values, indices, statuses;",
        "mov.u32 lane, %laneid;", "mov.u32 lower, %lanemask_lt;", "mov.b32 status, 0;",
        "mov.b32 F, $3;", "mov.b32 k, $4;",
        "mov.u32 t, %tid.x;", "shr.u32 t, t, 5;", "add.s32 row, $1, t;",
        "setp.ge.s32 p, row, $2;", "@p bra END;",
        f"mul.wide.s32 a, row, ${pitch};", f"add.s64 row_keys, a, ${keys};",
        "mul.lo.s32 t, k, 4;", "mul.wide.s32 a, row, t;", f"add.s64 values, a, ${outputs};",
        f"add.s64 indices, a, ${outputs + 1};", "mul.wide.s32 a, row, 4;",
        f"add.s64 statuses, a, ${outputs + 2};",
    ]  # fmt: skip


@constexpr_function
def lists_ptx(lists: int, capacity: int, room: int, size: int) -> str:
    """PTX of an output, a row's status, and 10 operands: first row, N, F, k, the bytes from one
    row's lists to the next one's; addresses of the lists, the values, the indices, the statuses and
    the lists' lengths. A warp takes a row. Its status is 0 where its list is written, -1 where its
    lists lack some."""
    lines = [
        *_row_lines(6, 5, 7), ".reg .b64 counts;",
        f"mul.wide.s32 a, row, {4 * lists};", "add.s64 counts, a, $10;",
        *_pick_lines(_gather_lines(lists, capacity, room, size), room, size),
    ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"


@constexpr_function
def groups_ptx(groups: int, pitch: int, room: int, size: int) -> str:
    """As `lists_ptx`, of 12 operands: first row, N, F, k, the bytes from one row's keys to the
    next one's; addresses of the keys, the values, the indices, the statuses, the pre-activations
    and their groups' largest; the bytes from one row of pre-activations to the next."""
    lines = [
        *_row_lines(6, 5, 7), ".reg .b64 pre, maxima;",
        "mul.wide.s32 a, row, $12;", "add.s64 pre, a, $10;",
        f"mul.wide.s32 a, row, {4 * pitch};", "add.s64 maxima, a, $11;",
        *_pick_lines(_groups_lines(groups, room, size), room, size),
    ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"
