"""PTX of a warp, or a few, that select a row's k largest activations (encode_pick.py).

A row's keys, from lists or from groups (encode_lists_ptx.py, encode_groups_ptx.py), lie in shared
memory; `pick_lines` finds the k largest and sorts them. A key has an activation's bits above and
0x7FFFFFFF less its latent, so that of equal activations lower latents are larger keys.

Functions named `_lines` give pieces of a row's code, which share registers and labels. What they
all use is in `start_lines`; p, q, t, u, a are for a few lines at a time.
"""

from __future__ import annotations

from triton import constexpr_function

# Keys that a warp puts in order by comparing each with all.
FEW = 32


@constexpr_function
def start_lines(held: int, size: int, warps: int) -> list[str]:
    """Operands 1 to 3: row, F, k. Shared memory: `keys`, so many as are held; `kept`, those that
    are sorted; `joint`, what warps tell one another; `counter`, a number."""
    return [
        f".shared .align 64 .b8 memory[{8 * (held + size + 32) + 128}];",
        ".reg .pred p, q, first_lane;",
        ".reg .b32 lane, tid, warp, row, k, F, status, keys, kept, joint, counter;",
        ".reg .b32 n, m, t, u, c, ballot, tid_keys, word<8>;",
        ".reg .b64 a;", ".reg .b32 low, high, mid, count, over, target, most, moved, step;",
        ".reg .b32 before, total, largest, floor;",
        ".reg .f32 want, x, y, below, above;",
        "mov.u32 lane, %laneid;", "mov.b32 status, 0;",
        "mov.u32 tid, %tid.x;", "shr.u32 warp, tid, 5;", "setp.eq.s32 first_lane, lane, 0;",
        "mov.u32 keys, memory;", f"add.s32 kept, keys, {8 * held};",
        f"add.s32 joint, keys, {8 * (held + size + 32)};", "add.s32 counter, joint, 64;",
        "mad.lo.s32 tid_keys, tid, 8, keys;",
        "mov.b32 row, $1;", "mov.b32 F, $2;", "mov.b32 k, $3;",
    ]  # fmt: skip


@constexpr_function
def wait_lines(warps: int) -> str:
    """All threads of the row see what each wrote to shared memory."""
    return "bar.warp.sync -1;" if warps == 1 else "bar.sync 0;"


@constexpr_function
def join_lines(warps: int, operations: list[str], before: str = "") -> list[str]:
    """Registers that are equal in each warp's lanes, up to two, of all warps together: an operation
    is an instruction and a register, as "add.s32 c". `before` gets the sum of the first one of the
    warps before one's own added."""
    if warps == 1:
        return []
    # Warps write to the other half the next time, when some may not have read these.
    names = [operation.split()[1] for operation in operations]
    words = len(names) * warps
    vector = f"v{len(names)}." if len(names) > 1 else ""
    lines = [
        f"mad.lo.s32 t, warp, {4 * len(names)}, joint;",
        f"@first_lane st.shared.{vector}b32 [t], {{{', '.join(names)}}};", "bar.sync 0;",
    ]  # fmt: skip
    step = min(words, 4)
    for i in range(0, words, step):
        some = ", ".join(f"word{j}" for j in range(i, i + step))
        lines += [f"ld.shared.v{step}.b32 {{{some}}}, [joint + {4 * i}];"]
    lines += ["xor.b32 joint, joint, 32;"]
    for i, operation in enumerate(operations):
        lines += [f"mov.b32 {names[i]}, word{i};"]
        for w in range(1, warps):
            instruction, name = operation.split()
            lines += [f"{instruction} {name}, {name}, word{w * len(names) + i};"]
    if before:
        for w in range(warps - 1):
            lines += [
                f"setp.gt.s32 p, warp, {w};",
                f"@p add.s32 {before}, {before}, word{w * len(names)};",
            ]  # fmt: skip
    return lines


@constexpr_function
def places_lines(what: str) -> list[str]:
    """`before` sums a register of a warp's lanes before one's own, `total` of all its lanes."""
    lines = [f"mov.b32 before, {what};"]
    for lanes in (1, 2, 4, 8, 16):
        lines += [
            f"shfl.sync.up.b32 t|p, before, {lanes}, 0, -1;", "@p add.s32 before, before, t;",
        ]  # fmt: skip
    return [*lines, "shfl.sync.idx.b32 total, before, 31, 31, -1;",
            f"sub.s32 before, before, {what};"]  # fmt: skip


@constexpr_function
def count_lines(held: list[str], comparison: str, label: str, warps: int) -> list[str]:
    """`c` counts a row's values by a comparison with `mid`, in eights a thread as long as there are
    any of `n`."""
    # Four sums, as each addition waits for the one before.
    sums = ("c", "t", "u", "m")
    lines = [f"mov.b32 {one}, 0;" for one in sums]
    for i, value in enumerate(held):
        if i % 8 == 0 and i > 0:
            lines += [f"setp.le.s32 p, n, {32 * warps * i};", f"@p bra {label};"]
        one = sums[i % 4]
        lines += [f"setp.{comparison}.s32 p, {value}, mid;", f"@p add.s32 {one}, {one}, 1;"]
    return [
        *lines, f"{label}:", "add.s32 c, c, t;", "add.s32 u, u, m;", "add.s32 c, c, u;",
        "redux.sync.add.s32 c, c, -1;", *join_lines(warps, ["add.s32 c"]),
    ]  # fmt: skip


@constexpr_function
def search_lines(held: list[str], label: str, warps: int) -> list[str]:
    """`low`, which at least `target` of `count` values reach and, but for equal ones, at most
    `most`; -1 is none. `count` of them do. `largest` is the largest. It ends, too, where no more
    than FEW are between `low` and `high`, which `over` values exceed, less than `target`.

    The bits are searched as if the logarithm of the count fell evenly; `below` and `above` weigh
    the two ends (Illinois): one that stayed twice counts half. Every sixth step halves the range,
    which bounds the steps whatever the values are.
    """
    lines = [f"mov.b32 high, {held[0]};", f"mov.b32 low, {held[0]};"]
    for i, value in enumerate(held[1:], 1):
        if i % 8 == 0:
            lines += [f"setp.le.s32 p, n, {32 * warps * i};", f"@p bra {label}BOUNDS;"]
        # As an unsigned number -1, where there is none, is the largest.
        lines += [f"max.s32 high, high, {value};", f"min.u32 low, low, {value};"]
    return lines + [
        f"{label}BOUNDS:", "redux.sync.max.s32 high, high, -1;", "redux.sync.min.u32 low, low, -1;",
        *join_lines(warps, ["max.s32 high", "min.u32 low"]), "mov.b32 largest, high;",
        "mov.b32 over, 0;", "mov.b32 moved, 0;", "mov.b32 step, 0;",
        "mov.f32 below, 0f3F800000;", "mov.f32 above, 0f3F800000;",
        # log2 of the middle of what is sought.
        "add.s32 t, target, most;", "cvt.rn.f32.s32 want, t;", "mul.f32 want, want, 0f3F000000;",
        "lg2.approx.f32 want, want;",
        f"{label}STEP:", "setp.le.s32 p, count, most;", f"@p bra {label}FOUND;",
        "setp.ge.s32 p, low, high;",
        "sub.s32 t, count, over;", f"setp.le.or.s32 p, t, {FEW}, p;", f"@p bra {label}FOUND;",
        "cvt.rn.f32.s32 x, count;", "lg2.approx.f32 x, x;", "sub.f32 x, x, want;",
        "mul.f32 x, x, below;",
        "cvt.rn.f32.s32 y, over;", "max.f32 y, y, 0f3F000000;", "lg2.approx.f32 y, y;",
        "sub.f32 y, want, y;", "mul.f32 y, y, above;", "add.f32 y, y, x;",
        "div.approx.f32 x, x, y;",
        "rem.u32 t, step, 6;", "setp.eq.s32 p, t, 5;", "selp.f32 x, 0f3F000000, x, p;",
        "sub.s32 t, high, low;", "cvt.rn.f32.s32 y, t;", "mul.f32 x, x, y;",
        "cvt.rzi.s32.f32 mid, x;", "add.s32 mid, mid, low;", "add.s32 t, low, 1;",
        "max.s32 mid, mid, t;", "min.s32 mid, mid, high;",
        *count_lines(held, "ge", f"{label}COUNTED", warps),
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
def _limit_lines(each: int, size: int, warps: int) -> list[str]:
    """Of a row's n keys those of values over `high`, fewer than k or at most `size`, are among the
    largest; where they are fewer, the rest is among those from `low` on, at most FEW. A thread has
    `each` keys, of values value0, value1 ...; `floor` is the least that may be of the k largest.
    Where too many values equal it, the keys' lower halves stand for these."""
    values = [f"value{i}" for i in range(each)]
    lines = [f".reg .b32 value<{each}>, top;", *(f"mov.b32 {value}, -1;" for value in values)]
    for i in range(each):
        if i % 8 == 0 and i > 0:
            lines += [f"setp.le.s32 p, n, {32 * warps * i};", "@p bra LOADED;"]
        lines += [
            f"add.s32 t, tid, {32 * warps * i};", "setp.lt.s32 p, t, n;",
            f"@p ld.shared.b32 value{i}, [tid_keys + {256 * warps * i + 4}];",
        ]  # fmt: skip
    lines += [
        "LOADED:", "mov.b32 target, k;", f"mov.b32 most, {size};", "mov.b32 count, n;",
        *search_lines(values, "VALUE_", warps),
        "mov.b32 floor, low;", "setp.le.s32 p, count, most;", "@p bra ALL_SURE;",
        "sub.s32 t, count, over;", f"setp.le.s32 p, t, {FEW};", "@p bra LIMIT;",
        # Too many equal ones.
        "mov.b32 top, largest;",
    ]  # fmt: skip
    for i, value in enumerate(values):
        lines += [
            f"ld.shared.b32 t, [tid_keys + {256 * warps * i}];", "sub.s32 t, t, 1;",
            f"setp.eq.s32 p, {value}, floor;", "selp.b32 t, t, -1, p;",
            # Larger ones above all of them.
            f"setp.gt.s32 p, {value}, floor;", f"selp.b32 {value}, 0x7FFFFFFF, t, p;",
        ]  # fmt: skip
    return [
        *lines, *search_lines(values, "LATENT_", warps), "mov.b32 largest, top;",
        "setp.gt.s32 p, count, most;", "@p bra LIMIT;",
        "ALL_SURE:", "sub.s32 high, low, 1;", "LIMIT:",
    ]  # fmt: skip


@constexpr_function
def _keep_lines(each: int, warps: int) -> list[str]:
    """Writes the largest keys, `m` of them, to `kept`: those that are over `high`, and the best of
    those from `low` on where they are fewer than k."""
    lines = [".reg .b64 key;", ".reg .b32 to_sure, to_rest, sure, rest;"]

    def some_lines(label: str, what: str) -> list[str]:
        lines = []
        for i in range(each):
            if i % 8 == 0 and i > 0:
                lines += [f"setp.le.s32 p, n, {32 * warps * i};", f"@p bra {label};"]
            lines += [what.format(value=f"value{i}", key=f"tid_keys + {256 * warps * i}")]
        return [*lines, f"{label}:"]

    lines += [
        "mov.b32 c, 0;", "mov.b32 m, 0;",
        *some_lines(
            "COUNTED",
            "setp.gt.s32 p, {value}, high; @p add.s32 c, c, 1; "
            "setp.ge.s32 p, {value}, low; @p add.s32 m, m, 1;",
        ),
        # Two sums in a word.
        "sub.s32 m, m, c;", "shl.b32 m, m, 16;", "add.s32 c, c, m;", *places_lines("c"),
        "mov.b32 m, total;", *join_lines(warps, ["add.s32 m"], "before"),
        "and.b32 sure, m, 0xFFFF;", "shr.u32 rest, m, 16;", "and.b32 t, before, 0xFFFF;",
        "mad.lo.s32 to_sure, t, 8, kept;", "shr.u32 t, before, 16;", "add.s32 t, t, sure;",
        "mad.lo.s32 to_rest, t, 8, kept;",
        *some_lines(
            "KEPT",
            "setp.ge.s32 p, {value}, low; @p ld.shared.b64 key, [{key}]; "
            "setp.gt.s32 q, {value}, high; @q st.shared.b64 [to_sure], key; "
            "@q add.s32 to_sure, to_sure, 8; setp.le.and.s32 q, {value}, high, p; "
            "@q st.shared.b64 [to_rest], key; @q add.s32 to_rest, to_rest, 8;",
        ),
        wait_lines(warps), "mov.b32 m, sure;", "setp.eq.s32 p, rest, 0;", "@p bra RANKED;",
        "setp.ne.s32 p, warp, 0;", "@p bra RANKS;",
        # A lane has one of the rest and counts those that are larger.
        "mad.lo.s32 u, sure, 8, kept;", "mad.lo.s32 to_rest, lane, 8, u;", "mov.b64 key, -1;",
        "setp.lt.s32 p, lane, rest;", "@p ld.shared.b64 key, [to_rest];",
        "@!p st.shared.b64 [to_rest], key;", "bar.warp.sync -1;", "mov.b32 c, sure;",
        "mov.b32 t, 0;",
    ]  # fmt: skip
    for i in range(FEW):
        one = "ct"[i % 2]
        lines += [
            f"ld.shared.b64 a, [u + {8 * i}];", "setp.gt.s64 q, a, key;",
            f"@q add.s32 {one}, {one}, 1;",
        ]  # fmt: skip
    return [
        *lines, "add.s32 c, c, t;", "setp.lt.and.s32 p, c, k, p;", "mad.lo.s32 c, c, 8, kept;",
        "bar.warp.sync -1;", "@p st.shared.b64 [c], key;",
        "RANKS:", wait_lines(warps), "mov.b32 m, k;", "RANKED:",
    ]  # fmt: skip


@constexpr_function
def _network_lines(size: int, warps: int, far: str, near: str, best: str, swap: str) -> list[str]:
    """A bitonic network that leaves a row's s0, s1 ... of `size` in descending order, of which a
    thread has size / 32 / warps neighbours. The first of two neighbours, blocks' halves and so on
    is the larger; blocks are turned about for that. `near` makes {t} the {s} of the thread whose
    number differs by {threads}, `far` all of them where that is another warp's: u0, u1 ...; `best`
    leaves {s} the larger of it and {t} where `up`, else the smaller; `swap` {s} the larger of it
    and {t}, which gets the other."""
    each = size // 32 // warps
    lines = []
    block = 2
    while block <= size:
        stride = block // 2
        while stride >= 1:
            # A block's halves are compared from their outer ends on, what follows side by side.
            turned = stride == block // 2
            if stride >= each:
                other = block // each - 1 if turned else stride // each
                lines += [f"and.b32 t, tid, {stride // each};", "setp.eq.s32 up, t, 0;"]
                if other >= 32:
                    lines += [far.format(threads=other)]
                else:
                    lines += [near.format(s=f"s{r}", t=f"u{r}", threads=other) for r in range(each)]
                for r in range(each):
                    lines += [best.format(s=f"s{r}", t=f"u{each - 1 - r if turned else r}")]
            else:
                for r in range(each):
                    o = r ^ (block - 1 if turned else stride)
                    if r < o:
                        lines += [swap.format(s=f"s{r}", t=f"s{o}")]
            stride //= 2
        block *= 2
    return lines


@constexpr_function
def _far_lines(each: int, warps: int, word: str) -> str:
    """`far` of `_network_lines` by way of the keys' memory, which nobody reads any more."""
    width = 4 if word == "b32" else 8
    lines = [f"mad.lo.s32 t, tid, {width}, keys;"]
    lines += [f"st.shared.{word} [t + {32 * warps * width * r}], s{r};" for r in range(each)]
    lines += ["bar.sync 0;", "xor.b32 t, tid, {threads};", f"mad.lo.s32 t, t, {width}, keys;"]
    lines += [f"ld.shared.{word} u{r}, [t + {32 * warps * width * r}];" for r in range(each)]
    return " ".join([*lines, "bar.sync 0;"])


@constexpr_function
def _write_lines(each: int, keys: list[str]) -> list[str]:
    """Writes a thread's sorted keys, as far as they are among the first k."""
    lines = [
        f"mul.lo.s32 c, tid, {each};", "mul.wide.s32 a, c, 4;",
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
def _sort_lines(size: int, warps: int) -> list[str]:
    """Sorts the m keys of `kept`, at most `size`, from the largest on, and writes k of them.

    Numbers of 32 bits are sorted first: how much a value is above the least one, as many bits of it
    as there is room for beside the key's place. Where two have the same bits, which is seldom, the
    keys themselves are.
    """
    each, bits = size // 32 // warps, size.bit_length() - 1
    lines = [
        ".reg .pred up, take;", f".reg .b64 key_of<{each}>;", "{",
        f".reg .b32 s<{each}>, u<{each}>;", "mad.lo.s32 tid_keys, tid, 8, kept;",
        "sub.s32 t, largest, floor;", "clz.b32 u, t;", f"sub.s32 u, {bits + 1}, u;",
        "max.s32 u, u, 0;",
    ]  # fmt: skip
    for r in range(each):
        lines += [
            f"add.s32 t, tid, {32 * warps * r};", "setp.lt.s32 p, t, m;", f"mov.b32 s{r}, floor;",
            f"@p ld.shared.b32 s{r}, [tid_keys + {256 * warps * r + 4}];",
            f"sub.s32 s{r}, s{r}, floor;", f"shr.u32 s{r}, s{r}, u;", f"add.s32 s{r}, s{r}, 1;",
            f"mad.lo.s32 s{r}, s{r}, {size}, t;", f"selp.b32 s{r}, s{r}, 0, p;",
        ]  # fmt: skip
    lines += _network_lines(
        size, warps, _far_lines(each, warps, "b32"),
        "shfl.sync.bfly.b32 {t}, {s}, {threads}, 31, -1;",
        "@up max.u32 {s}, {s}, {t}; @!up min.u32 {s}, {s}, {t};",
        "max.u32 t, {s}, {t}; min.u32 {t}, {s}, {t}; mov.b32 {s}, t;",
    )  # fmt: skip
    # Neighbours that differ in their places alone; the rest, which is nothing, is 0.
    lines += ["setp.ne.s32 q, 0, 0;", "shfl.sync.down.b32 t|p, s0, 1, 31, -1;"]
    if warps > 1:
        lines += [
            "mad.lo.s32 u, warp, 4, joint;", "@first_lane st.shared.b32 [u], s0;", "bar.sync 0;",
            f"setp.lt.s32 take, warp, {warps - 1};", "mov.b32 c, 0;",
            "@take ld.shared.b32 c, [u + 4];", "@!p mov.b32 t, c;",
        ]  # fmt: skip
    else:
        lines += ["@!p mov.b32 t, 0;"]
    for r in range(each):
        after = f"s{r + 1}" if r + 1 < each else "t"
        lines += [
            f"xor.b32 u, s{r}, {after};", f"setp.lt.u32 p, u, {size};",
            f"setp.ge.and.u32 p, s{r}, {size}, p;", "or.pred q, q, p;",
        ]  # fmt: skip
    lines += [
        "vote.sync.any.pred q, q, -1;" if warps == 1 else "bar.red.or.pred q, 0, q;",
        "@q bra EXACT;",
    ]  # fmt: skip
    for r in range(each):
        lines += [
            f"and.b32 t, s{r}, {size - 1};", "mad.lo.s32 t, t, 8, kept;",
            f"ld.shared.b64 key_of{r}, [t];",
        ]  # fmt: skip
    lines += ["bra SORTED;", "}", "EXACT:", "{", f".reg .b64 s<{each}>, u<{each}>;"]
    for r in range(each):
        lines += [
            f"add.s32 t, tid, {32 * warps * r};", "setp.lt.s32 p, t, m;", f"mov.b64 s{r}, -1;",
            f"@p ld.shared.b64 s{r}, [tid_keys + {256 * warps * r}];",
        ]  # fmt: skip
    lines += _network_lines(
        size, warps, _far_lines(each, warps, "b64"),
        "mov.b64 {{t, u}}, {s}; shfl.sync.bfly.b32 t, t, {threads}, 31, -1; "
        "shfl.sync.bfly.b32 u, u, {threads}, 31, -1; mov.b64 {t}, {{t, u}};",
        "setp.gt.xor.s64 take, {t}, {s}, up; selp.b64 {s}, {s}, {t}, take;",
        "setp.gt.s64 take, {t}, {s}; selp.b64 a, {s}, {t}, take; "
        "selp.b64 {s}, {t}, {s}, take; mov.b64 {t}, a;",
    )  # fmt: skip
    lines += [f"mov.b64 key_of{r}, s{r};" for r in range(each)]
    return [*lines, "}", "SORTED:", *_write_lines(each, [f"key_of{r}" for r in range(each)])]


@constexpr_function
def _again_lines(size: int, warps: int) -> list[str]:
    """The kept keys among the keys again, where there are more to READ."""
    lines = ["@!left bra ALL;", "mov.b32 n, m;"]
    for i in range(size // 32 // warps):
        lines += [
            f"add.s32 t, tid, {32 * warps * i};", "setp.lt.s32 p, t, n;",
            "mad.lo.s32 u, t, 8, kept;", "@p ld.shared.b64 key, [u];",
            f"@p st.shared.b64 [tid_keys + {256 * warps * i}], key;",
        ]  # fmt: skip
    return [*lines, wait_lines(warps), "bra READ;", "ALL:"]


@constexpr_function
def pick_lines(held: int, size: int, outputs: int, in_turns: bool, warps: int) -> list[str]:
    """Writes a row's list from the n keys in shared memory, at most `held`. Where they come in
    turns (READ makes more as long as there is room and `left`), the largest are kept. Operands from
    `outputs` on: addresses of values and indices."""
    each = (held + 32 * warps - 1) // (32 * warps)
    return [
        ".reg .b64 values, indices;",
        "NO_ROOM:", wait_lines(warps), "setp.lt.s32 p, n, k;", "@p bra LACKS;",
        *_limit_lines(each, size, warps),
        *_keep_lines(each, warps),
        *(_again_lines(size, warps) if in_turns else []),
        "mul.lo.s32 t, k, 4;", "mul.wide.s32 a, row, t;", f"add.s64 values, a, ${outputs};",
        f"add.s64 indices, a, ${outputs + 1};",
        *_sort_lines(size, warps), "bra DONE;",
        "LACKS:", "mov.b32 status, -1;", "DONE:", "mov.b32 $0, status;",
    ]  # fmt: skip
