"""PTX of a row's k largest of up to so many integers, in the order of their places, for
encode_aux.py's second list.

As encode_pick_ptx.py, of which it takes pieces: warps that share a row hold it in registers and
look for a limit by counting. A thread has neighbours, so that threads' order is the row's; nothing
is sorted.
"""

from __future__ import annotations

from triton import constexpr_function

from .encode_pick_ptx import FEW, count_lines, join_lines, places_lines, start_lines, wait_lines

# Stands for no entry; every key is larger.
_NONE = "0x80000000"


@constexpr_function
def _search_lines(values: list[str], warps: int) -> list[str]:
    """`low`, which at least k of `count` values reach, and `high`, which `over` values exceed, less
    than k: until `count` is k or less, or no more than FEW are from `low` to `high`, or they are
    the same. Halves first, from two octaves below the largest on, then in proportion to the
    numbers, as values of a narrow range lie evenly; an end that stayed twice counts half."""
    lines = [f"mov.b32 high, {_NONE};"]
    for i, value in enumerate(values):
        if i % 8 == 0 and i > 0:
            lines += [f"setp.le.s32 p, n, {32 * warps * i};", "@p bra LARGEST;"]
        lines += [f"max.s32 high, high, {value};"]
    return lines + [
        "LARGEST:", "redux.sync.max.s32 high, high, -1;", *join_lines(warps, ["max.s32 high"]),
        "mov.b32 low, 0x80000001;", "mov.b32 count, F;", "mov.b32 over, 0;", "mov.b32 moved, 0;",
        "mov.b32 step, 0;", "mov.f32 below, 0f3F800000;", "mov.f32 above, 0f3F800000;",
        "max.s32 mid, high, 0x82000000;", f"sub.s32 mid, mid, {1 << 24};",
        "STEP:", "setp.le.s32 p, count, k;", "setp.ge.or.s32 p, low, high, p;",
        "sub.s32 t, count, over;", f"setp.le.or.s32 p, t, {FEW}, p;", "@p bra FOUND;",
        "add.s32 t, low, 1;", "max.s32 mid, mid, t;", "min.s32 mid, mid, high;",
        *count_lines(values, "ge", "COUNTED", warps),
        "add.s32 step, step, 1;", "setp.ge.s32 p, c, k;", "@p bra LOWER;",
        "sub.s32 high, mid, 1;", "mov.b32 over, c;", "mov.f32 above, 0f3F800000;",
        "setp.eq.s32 p, moved, -1;", "@p mul.f32 below, below, 0f3F000000;",
        "@!p mov.f32 below, 0f3F800000;", "mov.b32 moved, -1;", "bra PROBE;",
        "LOWER:", "mov.b32 low, mid;", "mov.b32 count, c;", "mov.f32 below, 0f3F800000;",
        "setp.eq.s32 p, moved, 1;", "@p mul.f32 above, above, 0f3F000000;",
        "@!p mov.f32 above, 0f3F800000;", "mov.b32 moved, 1;",
        "PROBE:", "sub.s32 t, high, low;", "shr.u32 u, t, 1;", "add.s32 mid, low, u;",
        "rem.u32 u, step, 6;", "setp.eq.s32 p, u, 5;", f"setp.ge.or.u32 p, t, {1 << 24}, p;",
        "@p bra STEP;",
        "sub.s32 u, count, k;", "cvt.rn.f32.s32 x, u;", "add.f32 x, x, 0f3F000000;",
        "mul.f32 x, x, below;", "sub.s32 u, k, over;", "cvt.rn.f32.s32 y, u;",
        "add.f32 y, y, 0f3F000000;", "mul.f32 y, y, above;", "add.f32 y, y, x;",
        "div.approx.f32 x, x, y;", "cvt.rn.f32.s32 y, t;", "mul.f32 x, x, y;",
        "cvt.rzi.s32.f32 mid, x;", "add.s32 mid, mid, low;", "bra STEP;", "FOUND:",
    ]  # fmt: skip


@constexpr_function
def _limit_lines(values: list[str], warps: int) -> list[str]:
    """`least` and `last`: what is larger is kept, and what equals it up to that place; `tied` where
    not all do."""
    lines = [
        "mov.b32 least, low;", "mov.b32 last, 0x7FFFFFFF;", "setp.ne.s32 tied, 0, 0;",
        "setp.le.s32 p, count, k;", "@p bra LIMIT;",
        "sub.s32 target, k, over;",
        "sub.s32 t, count, over;", f"setp.gt.s32 p, t, {FEW};", "@p bra EQUAL;",
        # The few from `low` to `high`: their places and values.
        "sub.s32 first, 0x7FFFFFFF, own;",
    ]  # fmt: skip
    for i, value in enumerate(values):
        if i % 8 == 0 and i > 0:
            lines += [f"setp.le.s32 p, n, {32 * warps * i};", "@p bra GATHERED;"]
        lines += [
            f"setp.ge.s32 p, {value}, low;", f"setp.le.and.s32 p, {value}, high, p;",
            "@p atom.shared.add.u32 t, [counter], 1;", "mad.lo.s32 t, t, 8, keys;",
            f"sub.s32 u, first, {i};", f"@p st.shared.v2.b32 [t], {{u, {value}}};",
        ]  # fmt: skip
    lines += [
        "GATHERED:", wait_lines(warps), "sub.s32 m, count, over;",
        # Each warp finds the same: a lane has one of them and counts those that are larger.
        "mad.lo.s32 t, lane, 8, keys;", "mov.b64 key, 0x8000000000000000;",
        "setp.lt.s32 p, lane, m;", "@p ld.shared.b64 key, [t];", "mov.b32 c, 1;",
    ]  # fmt: skip
    for i in range(FEW):
        lines += [
            f"setp.gt.s32 q, m, {i};", "mov.b64 a, 0x8000000000000000;",
            f"@q ld.shared.b64 a, [keys + {8 * i}];", "setp.gt.s64 q, a, key;",
            "@q add.s32 c, c, 1;",
        ]  # fmt: skip
    lines += [
        "setp.eq.and.s32 p, c, target, p;", "vote.sync.ballot.b32 ballot, p, -1;",
        "clz.b32 t, ballot;", "sub.s32 t, 31, t;", "mov.b64 {u, m}, key;",
        "shfl.sync.idx.b32 u, u, t, 31, -1;", "shfl.sync.idx.b32 least, m, t, 31, -1;",
        "sub.s32 last, 0x7FFFFFFF, u;", "mov.b64 {u, m}, key;", "setp.eq.s32 p, m, least;",
        "setp.gt.and.s32 p, c, target, p;", "vote.sync.any.pred tied, p, -1;", "bra LIMIT;",
        # More are equal, of which the first ones are kept: the place of the last of them.
        "EQUAL:", "setp.eq.s32 tied, 0, 0;", "mov.b32 c, 0;",
    ]  # fmt: skip
    for value in values:
        lines += [f"setp.eq.s32 p, {value}, low;", "@p add.s32 c, c, 1;"]
    lines += [*places_lines("c"), "mov.b32 m, total;", *join_lines(warps, ["add.s32 m"], "before")]
    for i, value in enumerate(values):
        lines += [
            f"setp.eq.s32 p, {value}, low;", "@p add.s32 before, before, 1;",
            "setp.eq.and.s32 p, before, target, p;", f"add.s32 t, own, {i};",
            "@p st.shared.b32 [counter], t;",
        ]  # fmt: skip
    return [*lines, wait_lines(warps), "ld.shared.b32 last, [counter];", "LIMIT:"]


@constexpr_function
def _keep_lines(values: list[str], warps: int) -> list[str]:
    """Leaves {place, value} of those that are kept in `kept`, in order; `m` counts them."""

    def some_lines(label: str, tied: bool, what: list[str]) -> list[str]:
        lines = []
        for i, value in enumerate(values):
            if i % 8 == 0 and i > 0:
                lines += [f"setp.le.s32 p, n, {32 * warps * i};", f"@p bra {label};"]
            if tied:
                lines += [
                    f"setp.eq.s32 p, {value}, least;", f"setp.ge.and.s32 p, u, {i}, p;",
                    f"setp.gt.or.s32 p, {value}, least, p;",
                ]  # fmt: skip
            else:
                lines += [f"setp.ge.s32 p, {value}, least;"]
            lines += [line.format(value=value, i=i) for line in what]
        return lines

    counts = ["@p add.s32 c, c, 1;"]
    writes = [
        "add.s32 t, own, {i};", "@p st.shared.v2.b32 [to], {{t, {value}}};",
        "@p add.s32 to, to, 8;",
    ]  # fmt: skip
    return [
        "sub.s32 u, last, own;", "mov.b32 c, 0;", "@tied bra COUNT_TIED;",
        *some_lines("NUMBERED", False, counts), "bra NUMBERED;",
        "COUNT_TIED:", *some_lines("NUMBERED", True, counts), "NUMBERED:",
        *places_lines("c"), "mov.b32 m, total;", *join_lines(warps, ["add.s32 m"], "before"),
        "mad.lo.s32 to, before, 8, kept;", "sub.s32 u, last, own;", "@tied bra WRITE_TIED;",
        *some_lines("KEPT", False, writes), "bra KEPT;",
        "WRITE_TIED:", *some_lines("KEPT", True, writes), "KEPT:", wait_lines(warps),
    ]  # fmt: skip


@constexpr_function
def best_ptx(each: int, most: int, warps: int) -> str:
    """PTX of an unused output and 8 operands: row, how many keys it has, at most 32 * warps * each,
    k, at most `most`; the bytes from one row's keys to the next one's; addresses of the keys, which
    go on to a multiple of four without an entry, of their places' latents, the values, the indices.

    Keys order as their values do (`encode_aux._ordered`). Where there are fewer than k, -inf at
    latent 0 is behind them.
    """
    values = [f"v{i}" for i in range(each)]
    lines = [
        *start_lines(FEW, most, warps),
        f".reg .b32 v<{each}>, own, each, least, last, first, to;", ".reg .pred tied;",
        ".reg .b64 key, list, values, indices;",
        f"add.s32 each, F, {32 * warps * 4 - 1};",
        f"shr.u32 each, each, {(32 * warps * 4).bit_length() - 1};", "shl.b32 each, each, 2;",
        "mul.lo.s32 own, tid, each;", f"mul.lo.s32 n, each, {32 * warps};",
        "mul.wide.s32 a, row, $4;", "add.s64 a, a, $5;", "mul.wide.s32 key, own, 4;",
        "add.s64 a, a, key;", "setp.eq.s32 p, tid, 0;", "mov.b32 t, 0;",
        "@p st.shared.b32 [counter], t;",
    ]  # fmt: skip
    for i in range(0, each, 4):
        four = values[i : i + 4]
        lines += [
            *(f"mov.b32 {value}, {_NONE};" for value in four), f"setp.gt.s32 q, each, {i};",
            f"add.s32 t, own, {i};", "setp.lt.and.s32 q, t, F, q;",
            f"@q ld.global.v4.b32 {{{', '.join(four)}}}, [a + {4 * i}];",
        ]  # fmt: skip
    lines += [
        wait_lines(warps), *_search_lines(values, warps), *_limit_lines(values, warps),
        *_keep_lines(values, warps),
        "mul.lo.s32 t, k, 4;", "mul.wide.s32 a, row, t;", "mul.wide.s32 key, tid, 4;",
        "add.s64 a, a, key;", "add.s64 values, a, $7;", "add.s64 indices, a, $8;",
        "mov.b32 c, tid;", "mad.lo.s32 to, tid, 8, kept;",
        "WRITE:", "sub.s32 t, c, lane;", "setp.ge.s32 p, t, k;", "@p bra DONE;",
        "setp.lt.s32 p, c, m;", "setp.lt.s32 q, c, k;", "mov.b32 u, 0;", "mov.b32 t, 0xFF800000;",
        "mov.b32 over, 0;", "@p ld.shared.v2.b32 {u, t}, [to];", "mul.wide.s32 key, u, 4;",
        "add.s64 key, key, $6;", "@p ld.global.b32 over, [key];",
        # The value that the key stands for.
        "shr.s32 u, t, 31;", "and.b32 u, u, 0x7FFFFFFF;", "@p xor.b32 t, t, u;",
        # -inf marks the places that the mask leaves empty, at latent 0.
        "setp.eq.s32 p, t, 0xFF800000;", "@p mov.b32 over, 0;",
        "@q st.global.b32 [values], t;", "@q st.global.b32 [indices], over;",
        f"add.s64 values, values, {128 * warps};", f"add.s64 indices, indices, {128 * warps};",
        f"add.s32 c, c, {32 * warps};", f"add.s32 to, to, {256 * warps};", "bra WRITE;",
        "DONE:", "mov.b32 $0, 0;",
    ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"
