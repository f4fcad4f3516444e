"""PTX of a warp that selects a row's k largest activations (encode_pick.py).

A row's keys, from lists or from groups (encode_lists_ptx.py, encode_groups_ptx.py), lie in shared
memory; `pick_lines` finds the k largest and sorts them. A key has an activation's bits above and
0x7FFFFFFF less its latent, so that of equal activations lower latents are larger keys.

Functions named `_lines` give pieces of a row's code, which share registers and labels. What they
all use is in `start_lines`; p, q, t, u, a are for a few lines at a time.
"""

from __future__ import annotations

from triton import constexpr_function


@constexpr_function
def start_lines(held: int) -> list[str]:
    """Operands 1 to 3: row, F, k."""
    return [
        f".shared .align 16 .b8 memory[{8 * held}];",
        ".reg .pred p, q;", ".reg .b32 lane, lower, row, k, F, status, keys, n, m, t, u, c;",
        ".reg .b32 ballot;",
        ".reg .b64 a, limit;", ".reg .b32 low, high, mid, count, over, target, most, moved, step;",
        ".reg .f32 want, x, y, below, above;",
        "mov.u32 lane, %laneid;", "mov.u32 lower, %lanemask_lt;", "mov.b32 status, 0;",
        "mov.u32 keys, memory;", "mov.b32 row, $1;", "mov.b32 F, $2;", "mov.b32 k, $3;",
    ]  # fmt: skip


@constexpr_function
def places_lines(what: str) -> list[str]:
    """`before` sums a register of all lanes before one's own, `total` of all."""
    lines = [f"mov.b32 before, {what};"]
    for lanes in (1, 2, 4, 8, 16):
        lines += [
            f"shfl.sync.up.b32 t|p, before, {lanes}, 0, -1;", "@p add.s32 before, before, t;",
        ]  # fmt: skip
    return [*lines, "shfl.sync.idx.b32 total, before, 31, 31, -1;",
            f"sub.s32 before, before, {what};"]  # fmt: skip


@constexpr_function
def count_lines(held: list[str], comparison: str, label: str) -> list[str]:
    """`c` counts a row's values by a comparison with `mid`, in eights a lane as long as there are
    any of `n`."""
    # Four sums, as each addition waits for the one before.
    sums = ("c", "t", "u", "m")
    lines = [f"mov.b32 {one}, 0;" for one in sums]
    for i, value in enumerate(held):
        if i % 8 == 0 and i > 0:
            lines += [f"setp.le.s32 p, n, {32 * i};", f"@p bra {label};"]
        one = sums[i % 4]
        lines += [f"setp.{comparison}.s32 p, {value}, mid;", f"@p add.s32 {one}, {one}, 1;"]
    return [
        *lines, f"{label}:", "add.s32 c, c, t;", "add.s32 u, u, m;", "add.s32 c, c, u;",
        "redux.sync.add.s32 c, c, -1;",
    ]  # fmt: skip


@constexpr_function
def search_lines(held: list[str], label: str) -> list[str]:
    """`low`, which at least `target` of `count` values reach and, but for equal ones, at most
    `most`; -1 is none. `count` of them do.

    The bits are searched as if the logarithm of the count fell evenly; `below` and `above` weigh
    the two ends (Illinois): one that stayed twice counts half. Every sixth step halves the range,
    which bounds the steps whatever the values are.
    """
    lines = [f"mov.b32 high, {held[0]};", f"mov.b32 low, {held[0]};"]
    for i, value in enumerate(held[1:], 1):
        if i % 8 == 0:
            lines += [f"setp.le.s32 p, n, {32 * i};", f"@p bra {label}BOUNDS;"]
        # As an unsigned number -1, where there is none, is the largest.
        lines += [f"max.s32 high, high, {value};", f"min.u32 low, low, {value};"]
    return lines + [
        f"{label}BOUNDS:", "redux.sync.max.s32 high, high, -1;", "redux.sync.min.u32 low, low, -1;",
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
        *count_lines(held, "ge", f"{label}COUNTED"),
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
def _load_lines(name: str, each: int, word: int) -> list[str]:
    """Loads a lane's keys' values, or lower halves, to name0, name1 ..., -1 where there is none."""
    lines = [f"mov.b32 {name}{i}, -1;" for i in range(each)]
    for i in range(each):
        if i % 8 == 0 and i > 0:
            lines += [f"setp.le.s32 p, n, {32 * i};", f"@p bra LOADED_{name}{word};"]
        lines += [
            f"add.s32 t, lane, {32 * i};", "setp.lt.s32 p, t, n;",
            f"@p ld.shared.b32 {name}{i}, [lane_keys + {256 * i + word}];",
        ]  # fmt: skip
    return [*lines, f"LOADED_{name}{word}:"]


@constexpr_function
def _limit_lines(each: int, size: int) -> list[str]:
    """`limit`, the least key of at least k and at most `size` of a row's n keys. Where too many
    values are equal, the keys' lower halves are searched the same way. A lane has `each` keys, of
    values value0, value1 ..."""
    values = [f"value{i}" for i in range(each)]
    lines = [
        f".reg .b32 value<{each}>, low_half<{each}>, equal;", *_load_lines("value", each, 4),
        "mov.b32 target, k;", f"mov.b32 most, {size};", "mov.b32 count, n;",
        *search_lines(values, "VALUE_"),
        "mov.b32 t, 0;", "mov.b64 limit, {t, low};", "setp.le.s32 p, count, most;", "@p bra LIMIT;",
        # Too many equal ones.
        *_load_lines("low_half", each, 0),
        "mov.b32 equal, low;", "mov.b32 mid, low;", *count_lines(values, "gt", "OVER"),
        "sub.s32 target, k, c;", f"sub.s32 most, {size}, c;", "sub.s32 count, count, c;",
    ]  # fmt: skip
    for i in range(each):
        lines += [f"setp.eq.s32 p, value{i}, equal;", f"selp.b32 low_half{i}, low_half{i}, -1, p;"]
    return [
        *lines, *search_lines([f"low_half{i}" for i in range(each)], "LATENT_"),
        "mov.b64 limit, {low, equal};", "mov.b32 low, equal;", "LIMIT:",
    ]  # fmt: skip


@constexpr_function
def _keep_lines(each: int) -> list[str]:
    """Leaves the keys from `limit` on, `m` of them, at the front."""
    lines = [".reg .b64 key<8>;", ".reg .pred kept<8>;", "mov.b32 m, 0;"]
    for i in range(0, each, 8):
        if i > 0:
            lines += [f"setp.le.s32 p, n, {32 * i};", "@p bra KEPT;"]
        some = range(min(8, each - i))
        for j in some:
            lines += [
                f"add.s32 t, lane, {32 * (i + j)};", f"setp.lt.s32 kept{j}, t, n;",
                f"@kept{j} ld.shared.b64 key{j}, [lane_keys + {256 * (i + j)}];",
            ]  # fmt: skip
        lines += ["bar.warp.sync -1;"]
        for j in some:
            lines += [
                f"setp.ge.and.s64 p, key{j}, limit, kept{j};",
                "vote.sync.ballot.b32 ballot, p, -1;", "and.b32 t, ballot, lower;",
                "popc.b32 t, t;", "add.s32 t, t, m;", "mad.lo.s32 t, t, 8, keys;",
                f"@p st.shared.b64 [t], key{j};",
                "popc.b32 ballot, ballot;", "add.s32 m, m, ballot;",
            ]  # fmt: skip
    return [*lines, "KEPT:", "bar.warp.sync -1;"]


@constexpr_function
def _network_lines(size: int, cross: str, swap: str) -> list[str]:
    """A bitonic network that leaves a warp's s0, s1 ... of `size` in descending order, of which a
    lane has size / 32 neighbours. `cross` leaves {s} the larger of it and the one {lanes} on where
    `up`, else the smaller; `swap` leaves {s} the larger of it and {t} where `up`."""
    each = size // 32
    lines = []
    block = 2
    while block <= size:
        stride = block // 2
        while stride >= 1:
            if stride >= each:
                # A lane and another: the first keeps the larger ones where the block descends.
                lines += [f"and.b32 t, lane, {stride // each};", "setp.eq.s32 up, t, 0;"]
                if block < size:
                    lines += [
                        f"and.b32 t, lane, {block // each};", "setp.ne.s32 p, t, 0;",
                        "xor.pred up, up, p;",
                    ]  # fmt: skip
                lines += [cross.format(s=f"s{r}", lanes=stride // each) for r in range(each)]
            else:
                # Within a lane. `up`: descends here.
                if each <= block < size:
                    lines += [f"and.b32 t, lane, {block // each};", "setp.eq.s32 up, t, 0;"]
                else:
                    lines += ["setp.eq.s32 up, 0, 0;"]
                for r in range(each):
                    if r & stride:
                        continue
                    pair = (r + stride, r) if block < each and r & block else (r, r + stride)
                    lines += [swap.format(s=f"s{pair[0]}", t=f"s{pair[1]}")]
            stride //= 2
        block *= 2
    return lines


@constexpr_function
def _write_lines(each: int, keys: list[str]) -> list[str]:
    """Writes a lane's sorted keys, as far as they are among the first k."""
    lines = [
        f"mul.lo.s32 c, lane, {each};", "mul.wide.s32 a, c, 4;",
        "add.s64 values, values, a;", "add.s64 indices, indices, a;",
    ]  # fmt: skip
    for r in range(each):
        lines += [
            f"add.s32 t, c, {r};", "setp.lt.s32 p, t, k;",
            f"mov.b64 {{t, u}}, {keys[r]};", "sub.s32 t, 0x7FFFFFFF, t;",
            f"@p st.global.b32 [values + {4 * r}], u;",
            f"@p st.global.b32 [indices + {4 * r}], t;",
        ]  # fmt: skip
    return lines


@constexpr_function
def _sort_lines(size: int) -> list[str]:
    """Sorts m keys, at most `size`, from the largest on, and writes k of them.

    Numbers of 32 bits are sorted first: how much a value is above the least one, as many bits of it
    as there is room for beside the key's place. Where two have the same bits, which is seldom, the
    keys themselves are.
    """
    each, bits = size // 32, size.bit_length() - 1
    lines = [
        ".reg .pred up, take;", f".reg .b64 key_of<{each}>;", "{", f".reg .b32 s<{each}>;",
        "mov.b32 high, low;",
    ]  # fmt: skip
    for r in range(each):
        lines += [
            f"add.s32 t, lane, {32 * r};", "setp.lt.s32 p, t, m;", f"mov.b32 s{r}, low;",
            f"@p ld.shared.b32 s{r}, [lane_keys + {256 * r + 4}];", f"max.s32 high, high, s{r};",
        ]  # fmt: skip
    lines += [
        "redux.sync.max.s32 high, high, -1;", "sub.s32 t, high, low;", "clz.b32 u, t;",
        f"sub.s32 u, {bits + 1}, u;", "max.s32 u, u, 0;",
    ]  # fmt: skip
    for r in range(each):
        lines += [
            f"sub.s32 s{r}, s{r}, low;", f"shr.u32 s{r}, s{r}, u;", f"add.s32 s{r}, s{r}, 1;",
            f"add.s32 t, lane, {32 * r};", "setp.lt.s32 p, t, m;",
            f"mad.lo.s32 s{r}, s{r}, {size}, t;", f"selp.b32 s{r}, s{r}, 0, p;",
        ]  # fmt: skip
    lines += _network_lines(
        size,
        "shfl.sync.bfly.b32 t, {s}, {lanes}, 31, -1; max.u32 u, {s}, t; min.u32 {s}, {s}, t; "
        "selp.b32 {s}, u, {s}, up;",
        "max.u32 t, {s}, {t}; min.u32 u, {s}, {t}; selp.b32 {s}, t, u, up; selp.b32 {t}, u, t, up;",
    )
    # Neighbours that differ in their places alone; the rest, which is nothing, is 0.
    lines += ["setp.ne.s32 q, 0, 0;", "shfl.sync.down.b32 t|p, s0, 1, 31, -1;", "@!p mov.b32 t, 0;"]
    for r in range(each):
        after = f"s{r + 1}" if r + 1 < each else "t"
        lines += [
            f"xor.b32 u, s{r}, {after};", f"setp.lt.u32 p, u, {size};",
            f"setp.ge.and.u32 p, s{r}, {size}, p;", "or.pred q, q, p;",
        ]  # fmt: skip
    lines += ["vote.sync.any.pred q, q, -1;", "@q bra EXACT;"]
    for r in range(each):
        lines += [
            f"and.b32 t, s{r}, {size - 1};", "mad.lo.s32 t, t, 8, keys;",
            f"ld.shared.b64 key_of{r}, [t];",
        ]  # fmt: skip
    lines += ["bra SORTED;", "}", "EXACT:", "{", f".reg .b64 s<{each}>;"]
    for r in range(each):
        lines += [
            f"add.s32 t, lane, {32 * r};", "setp.lt.s32 p, t, m;", f"mov.b64 s{r}, -1;",
            f"@p ld.shared.b64 s{r}, [lane_keys + {256 * r}];",
        ]  # fmt: skip
    lines += _network_lines(
        size,
        "mov.b64 {{t, u}}, {s}; shfl.sync.bfly.b32 t, t, {lanes}, 31, -1; "
        "shfl.sync.bfly.b32 u, u, {lanes}, 31, -1; mov.b64 a, {{t, u}}; "
        "setp.gt.xor.s64 take, a, {s}, up; selp.b64 {s}, {s}, a, take;",
        "setp.gt.xor.s64 take, {t}, {s}, up; selp.b64 a, {s}, {t}, take; "
        "selp.b64 {t}, {t}, {s}, take; mov.b64 {s}, a;",
    )
    lines += [f"mov.b64 key_of{r}, s{r};" for r in range(each)]
    return [*lines, "}", "SORTED:", *_write_lines(each, [f"key_of{r}" for r in range(each)])]


@constexpr_function
def pick_lines(held: int, size: int, outputs: int, in_turns: bool) -> list[str]:
    """Writes a row's list from the n keys in shared memory, at most `held`. Where they come in
    turns (READ makes more as long as there is room and `left`), the largest are kept. Operands from
    `outputs` on: addresses of values and indices."""
    each = held // 32
    return [
        ".reg .b64 values, indices;", ".reg .b32 lane_keys;",
        "NO_ROOM:", "mad.lo.s32 lane_keys, lane, 8, keys;", "bar.warp.sync -1;",
        "setp.lt.s32 p, n, k;", "@p bra LACKS;",
        *_limit_lines(each, size),
        *_keep_lines(each),
        *(["mov.b32 n, m;", "@left bra READ;"] if in_turns else []),
        "mul.lo.s32 t, k, 4;", "mul.wide.s32 a, row, t;", f"add.s64 values, a, ${outputs};",
        f"add.s64 indices, a, ${outputs + 1};",
        *_sort_lines(size), "bra DONE;",
        "LACKS:", "mov.b32 status, -1;", "DONE:", "mov.b32 $0, status;",
    ]  # fmt: skip
