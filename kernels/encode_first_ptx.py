"""PTX of a thread of the Hopper filter (encode_first.py), which holds 128 accumulators: 64 columns
of rows r and r + 8.

Each function's text is run once a thread, with a register for each of 128 accumulators where an
operand or output is a tensor; of the same value in all of them the compiler makes one.
"""

from __future__ import annotations

from triton import constexpr_function

from .encode_first_plan import OVERSHOOT, TILE_SHIFT

# Elements of a cursor, of row r; those of row r + 8 are two further on. Where the next pair goes
# and where the list of pairs is full (lower halves of addresses), the same of records, and how many
# pairs there are.
_PAIR, _LAST_PAIR, _RECORD, _LAST_RECORD, _COUNT = 0, 1, 4, 5, 8


@constexpr_function
def start_ptx(shares: int, capacity: int, records: int) -> str:
    """PTX of 128 outputs and 3 operands for each of a thread's 128 accumulators: a cursor; byte
    offset of the row's lists, the list's number, address of all lists.

    Elements of a cursor that are not named above are never read nor written.
    """
    lines = [".reg .b32 low, high, c;", "mov.b64 {low, high}, $384;"]
    for half in (0, 2):
        lines += [
            f"mad.lo.u32 c, ${256 + half}, 8, low;", f"add.u32 c, c, ${128 + half};",
            f"mov.b32 ${_PAIR + half}, c;",
            f"add.u32 ${_LAST_PAIR + half}, c, {(capacity + 1) * 32 * shares};",
            f"add.u32 c, c, {(capacity + OVERSHOOT) * 32 * shares};",
            f"mov.b32 ${_RECORD + half}, c;",
            f"add.u32 ${_LAST_RECORD + half}, c, {records * 32 * shares};",
            f"mov.b32 ${_COUNT + half}, 0;",
        ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"


@constexpr_function
def filter_ptx(shares: int, together: bool) -> str:
    """PTX of 128 outputs and 7 operands as above: the new cursor; bits, limits (elements as
    `agree_ptx` has them), cursor, the tile's first latent, how far its runs are apart, its number,
    address of the lists.

    A pair is two neighbours' bits, of which one at least passes: no register has to be moved for
    its store, and most of a warp's stores have but one thread or two that take part. Which runs'
    they are is a mask, a record for each tile that has any, with the tile's number and how many
    pairs come before. The upper half of an address never changes (`encode_first._scratch` sees to
    it), and a cursor is held back after each 4 pairs of a row instead of each, so that up to
    OVERSHOOT fall behind a full list. Where the four threads that share a row write their records
    `together`, whose places are neighbours, some are empty.
    """
    each = ["bits", "limits", "cursor", "latent", "apart", "tile", "lists"]
    first = {name: 128 + i * 128 for i, name in enumerate(each)}
    lines = [
        ".reg .pred p, q, some;", ".reg .b32 bit<128>, f, m, low, high, limit, info, four;",
        ".reg .b64 a;", "mov.u32 four, %laneid;", "and.b32 four, four, 28;",
        "shl.b32 four, 15, four;", f"mov.b64 {{low, high}}, ${first['lists']};",
        "setp.ne.s32 some, 0, 0;", *(f"mov.b32 bit{i}, ${128 + i};" for i in range(128)),
    ]  # fmt: skip
    for half in (0, 1):
        tau, last = (f"${first['limits'] + 2 * half + i}" for i in (0, 1))
        lines += [
            f".reg .b32 c{half}, limit{half}, mask{half};",
            f"mov.b32 c{half}, ${first['cursor'] + _PAIR + 2 * half};", f"mov.b32 mask{half}, 0;",
            # Where zeros pass, so do the negative values that ReLU makes zeros.
            f"sub.s32 limit{half}, {tau}, 1;", f"setp.eq.s32 p, {tau}, 0;",
            f"selp.b32 limit{half}, -2147483648, limit{half}, p;",
            f"setp.lt.s32 p, {last}, 0;", f"selp.b32 limit{half}, {tau}, limit{half}, p;",
            f"setp.lt.u32 p, {last}, 0x7FFFFFFF;", "or.pred some, some, p;",
        ]  # fmt: skip
    # As a rule all that equal a threshold pass. Else pairs with none above it, of latents too far
    # on, are made least ones. (That would be a limit of its own for each run: half as much code
    # again, and the GPU holds some 64 KiB of a kernel's.)
    lines += [
        "vote.sync.any.pred some, some, -1;", "@!some bra ALL;", f"mov.b32 f, ${first['latent']};"
    ]  # fmt: skip
    for run in range(32):
        for half in (0, 1):
            at = first["limits"] + 2 * half
            pair = [f"bit{4 * run + 2 * half + i}" for i in (0, 1)]
            lines += [
                f"max.s32 m, {pair[0]}, {pair[1]};", f"setp.gt.s32 p, f, ${at + 1};",
                f"setp.le.and.s32 p, m, ${at}, p;", f"@p mov.b32 {pair[0]}, -2147483648;",
                f"@p mov.b32 {pair[1]}, -2147483648;",
            ]  # fmt: skip
        lines += [f"add.s32 f, f, ${first['apart']};"]
    lines += ["ALL:"]
    for run in range(32):
        for half in (0, 1):
            pair = [f"bit{4 * run + 2 * half + i}" for i in (0, 1)]
            lines += [
                f"max.s32 m, {pair[0]}, {pair[1]};", f"setp.gt.s32 p, m, limit{half};",
                f"mov.b64 a, {{c{half}, high}};",
                f"@p st.global.v2.b32 [a], {{{pair[0]}, {pair[1]}}};",
                f"@p add.u32 c{half}, c{half}, {32 * shares};",
                f"@p or.b32 mask{half}, mask{half}, {1 << run};",
            ]  # fmt: skip
            if run % 4 == 3:
                end = first["cursor"] + _LAST_PAIR + 2 * half
                lines += [f"min.u32 c{half}, c{half}, ${end};"]
    for half in (0, 1):
        out, cursor = 2 * half, first["cursor"] + 2 * half
        lines += [
            f"mov.b32 ${_PAIR + out}, c{half};",
            f"mov.b32 ${_LAST_PAIR + out}, ${cursor + _LAST_PAIR};",
            f"mov.b32 ${_LAST_RECORD + out}, ${cursor + _LAST_RECORD};",
            f"setp.ne.s32 p, mask{half}, 0;",
            *(
                ["vote.sync.ballot.b32 m, p, -1;", "and.b32 m, m, four;", "setp.ne.s32 p, m, 0;"]
                if together
                else []
            ),
            f"mad.lo.u32 info, ${first['tile']}, {1 << TILE_SHIFT}, ${cursor + _COUNT};",
            f"mov.b32 m, ${cursor + _RECORD};", "mov.b64 a, {m, high};",
            f"@p st.global.v2.b32 [a], {{mask{half}, info}};",
            f"@p add.u32 m, m, {32 * shares};",
            f"min.u32 ${_RECORD + out}, m, ${cursor + _LAST_RECORD};",
            f"popc.b32 m, mask{half};", f"add.u32 ${_COUNT + out}, m, ${cursor + _COUNT};",
        ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"


# The bit of a key, or of a code, that says that it is there.
_THERE = 0x80000000


@constexpr_function
def _cell_lines(cell: int, cells: int, bits: int) -> list[str]:
    """`m`, the largest activation of a cell, ReLU included: of every `cells`-th run."""
    lines = ["mov.b32 m, 0;"]
    for j in range(cell, 32, cells):
        lines += [f"max.s32 t, ${bits + 4 * j}, ${bits + 4 * j + 1};", "max.s32 m, m, t;"]
    return lines


@constexpr_function
def _code_lines(cell: int, cells: int, bits: int, latent: int, apart: int, to: str) -> list[str]:
    """Stores the code of a cell whose largest is `m`: 0x7FFFFFFF less the last latent of the first
    run that has it. An address of 0 is none."""
    lines = []
    for j in reversed(range(cell, 32, cells)):
        lines += [
            f"max.s32 t, ${bits + 4 * j}, ${bits + 4 * j + 1};", "setp.eq.s32 p, t, m;",
            f"@p mov.b32 u, {j};",
        ]  # fmt: skip
    return [
        # Zeros by ReLU are not found: all are.
        *lines, "setp.eq.s32 p, m, 0;", f"@p mov.b32 u, {cell};",
        f"mad.lo.s32 t, u, ${apart}, ${latent};", "or.b32 t, t, 7;", "sub.s32 t, -1, t;",
        f"setp.ne.s64 p, {to}, 0;", f"@p st.relaxed.gpu.global.b32 [{to} + {16 * cell}], t;",
    ]  # fmt: skip


@constexpr_function
def name_ptx(cells: int, with_codes: bool) -> str:
    """PTX of 32 unused outputs and 5 operands of 128 registers each: bits, the tile's first latent,
    how far its runs are apart, where a row's keys go, how many bytes further on their codes.

    A thread's 64 columns of a row are `cells` cells. A cell's key is its largest activation's bits.
    """
    bits, latent, apart, own, further = (32 + 128 * i for i in range(5))
    lines = [".reg .pred p;", ".reg .b32 m, t, u;", ".reg .b64 a;"]
    for half in (0, 2):
        if with_codes:
            lines += [f"add.s64 a, ${own + half}, ${further};"]
        for cell in range(cells):
            lines += _cell_lines(cell, cells, bits + half)
            if with_codes:
                lines += _code_lines(cell, cells, bits + half, latent, apart, "a")
            lines += [
                # One NaN, as encode_select.relu_bits has it.
                "min.s32 m, m, 0x7FC00000;", f"or.b32 m, m, {_THERE:#x};",
                f"st.relaxed.gpu.global.b32 [${own + half} + {16 * cell}], m;",
            ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"


@constexpr_function
def agree_ptx(cells: int, parts: int, first: int) -> str:
    """PTX of 128 outputs and 11 operands as above: elements 0 and 2 are the thresholds' bits of
    rows r and r + 8, elements 1 and 3 up to which latent equal ones pass, 0x7FFFFFFF where all do;
    bits, the tile's first latent, how far its runs are apart; which largest of a row's keys reaches
    the threshold, or a few more; the least that it may be; a row's first key of those that the
    thread wrote, or 0; how many bytes further on their codes are; where a row's threshold is told;
    of the warpgroup's 64 rows the first whose threshold the warp finds, the first one's keys, and
    where its threshold is told.

    Each of a block's `parts` programs finds the thresholds of some rows, by a warp a row, tells
    them, and waits for the others'. Told are the threshold's key; beside it whether not all that
    equal it may pass, as too many would; two words on, up to which latent those do.
    """
    assert first * parts * cells >= 4
    keys = 4 * first * parts * cells
    lines = [*_find_lines(keys, parts), *_order_lines(cells, keys, parts, first > 1)]
    for r in (0, 1):
        lines += [
            # Where a NaN is to pass, none does: not every NaN is the one that is compared.
            f"setp.gt.s32 p, bottom{r}, 0x7F800000;", f"selp.b32 t, 0x7FFFFFFF, bottom{r}, p;",
            f"max.s32 t, t, ${_LEAST + 2 * r};", f"mov.b32 ${2 * r}, t;",
            "setp.eq.s32 p, t, 0x7FFFFFFF;", f"selp.b32 ${2 * r + 1}, -1, last{r}, p;",
        ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"


_BITS, _LATENT, _APART, _ORDER, _LEAST, _OWN, _FURTHER, _FOUND, _MINE, _KEYS, _TOLD = (
    128 * (1 + i) for i in range(11)
)  # fmt: skip


@constexpr_function
def _wait_lines(label: str, name: str, address: str, keys: int) -> list[str]:
    """Loads a row's keys, or codes, to {name}0 ..., when all are there; least ones fill the last.
    All lanes leave at once: a shuffle of lanes that do not takes its slow way."""
    each = (keys + 31) // 32
    lines = [f"{label}:", "mov.b32 n, -1;"]
    for j in range(each):
        load = f"ld.relaxed.gpu.global.b32 {name}{j}, [{address} + {128 * j}];"
        if 32 * j + 32 > keys:
            lines += [f"mov.b32 {name}{j}, {_THERE:#x};", f"setp.lt.u32 p, lane, {keys - 32 * j};"]
            load = f"@p {load}"
        lines += [load]
    lines += [f"and.b32 n, n, {name}{j};" for j in range(each)]
    return [*lines, "setp.ge.s32 p, n, 0;", "vote.sync.any.pred p, p, -1;", f"@p bra {label};"]


@constexpr_function
def _find_lines(keys: int, parts: int) -> list[str]:
    """The thresholds of some rows, by halving, told; then `bottom`, those of the thread's two rows,
    and `tied`, whether too many equal them."""
    each = (keys + 31) // 32
    lines = [
        ".reg .pred p, q;", ".reg .b32 n, t, u, m, lane, most, row, low, high, reach, ties;",
        f".reg .b32 key<{each}>, bottom<2>, tied<2>, last<2>;", ".reg .b64 a, at, pair, lane_keys;",
        "mov.u32 lane, %laneid;", f"mad.wide.u32 lane_keys, lane, 4, ${_KEYS};",
        f"shr.u32 most, ${_ORDER}, 4;", f"add.s32 most, most, ${_ORDER};", "mov.b32 ties, 0;",
        f"mov.b32 row, ${_MINE};",
        "FIND:", "setp.ge.s32 p, row, 64;", "@p bra TOLD;",
        f"mad.wide.u32 at, row, {4 * keys}, lane_keys;", *_wait_lines("KEYS", "key", "at", keys),
        # At least so many reach the least one.
        f"mov.b32 reach, {keys};", "mov.b32 high, key0;", "mov.b32 low, -1;",
    ]  # fmt: skip
    for j in range(each):
        lines += [f"max.s32 high, high, key{j};"]
        if 32 * j + 32 > keys:
            lines += [f"setp.lt.u32 p, lane, {keys - 32 * j};", f"@p min.s32 low, low, key{j};"]
        else:
            lines += [f"min.s32 low, low, key{j};"]
    lines += [
        "redux.sync.max.s32 high, high, -1;", "redux.sync.min.s32 low, low, -1;",
        "HALVE:", "setp.gt.s32 p, reach, most;", "setp.lt.and.s32 p, low, high, p;",
        "@!p bra TELL;", "sub.s32 t, high, low;", "add.s32 t, t, 1;", "shr.u32 t, t, 1;",
        "add.s32 t, t, low;", "mov.b32 n, 0;",
    ]  # fmt: skip
    for j in range(each):
        lines += [f"setp.ge.s32 p, key{j}, t;", "@p add.s32 n, n, 1;"]
    lines += [
        "redux.sync.add.s32 n, n, -1;", f"setp.ge.s32 p, n, ${_ORDER};", "@p mov.b32 low, t;",
        "@p mov.b32 reach, n;", "@!p sub.s32 high, t, 1;", "bra HALVE;",
        "TELL:", "setp.gt.s32 p, reach, most;", f"setp.eq.or.s32 p, low, {_THERE:#x}, p;",
        "selp.b32 t, 1, 0, p;", "or.b32 ties, ties, t;", "mov.b64 pair, {low, t};",
        f"mad.wide.u32 at, row, 16, ${_TOLD};", "setp.eq.s32 p, lane, 0;",
        "@p st.relaxed.gpu.global.b64 [at], pair;",
        f"add.s32 row, row, {4 * parts};", "bra FIND;",
        "TOLD:",
    ]  # fmt: skip
    for r in (0, 1):
        lines += [
            f"ld.relaxed.gpu.global.b64 pair, [${_FOUND + 2 * r}];",
            f"mov.b64 {{bottom{r}, tied{r}}}, pair;",
        ]
    return [
        *lines, "and.b32 t, bottom0, bottom1;", "setp.ge.s32 p, t, 0;",
        "vote.sync.any.pred p, p, -1;", "@p bra TOLD;",
        "and.b32 bottom0, bottom0, 0x7FFFFFFF;", "and.b32 bottom1, bottom1, 0x7FFFFFFF;",
        "mov.b32 last0, 0x7FFFFFFF;", "mov.b32 last1, 0x7FFFFFFF;",
    ]  # fmt: skip


@constexpr_function
def _order_lines(cells: int, keys: int, parts: int, has_codes: bool) -> list[str]:
    """Where too many equal a threshold, up to which latent these pass, `last`. The programs tell
    one another, as codes, in which of a cell's runs its largest is the first time, unless they did
    when they named the keys; who found the threshold then finds which code is the last to pass."""
    each = (keys + 31) // 32
    lines = [
        f".reg .b32 code<{each}>;", "or.b32 t, tied0, tied1;", "setp.ne.s32 q, t, 0;",
        # The rows of a warp are one's in all programs, and so is what is told of them.
        "vote.sync.any.pred q, q, -1;", "setp.ne.or.s32 p, ties, 0, q;", "@!p bra AGREED;",
    ]  # fmt: skip
    if not has_codes:
        lines += ["@!q bra NAMED;"]
        for r in (0, 1):
            lines += [
                f"add.s64 at, ${_OWN + 2 * r}, ${_FURTHER};",
                f"setp.eq.s64 p, ${_OWN + 2 * r}, 0;", "@p mov.b64 at, 0;",
            ]  # fmt: skip
            for cell in range(cells):
                lines += _cell_lines(cell, cells, _BITS + 2 * r)
                lines += _code_lines(cell, cells, _BITS + 2 * r, _LATENT, _APART, "at")
        lines += ["NAMED:"]
    lines += [
        f"mov.b32 row, ${_MINE};",
        "ORDER:", "setp.ge.s32 p, row, 64;", "@p bra ORDERED;",
        f"mad.wide.u32 a, row, 16, ${_TOLD};",
        "AGAIN:", "ld.relaxed.gpu.global.b64 pair, [a];", "mov.b64 {low, t}, pair;",
        "setp.ge.s32 p, low, 0;", "vote.sync.any.pred p, p, -1;", "@p bra AGAIN;",
        "setp.eq.s32 p, t, 0;", "@p bra NEXT;",
        f"mad.wide.u32 at, row, {4 * keys}, lane_keys;", *_wait_lines("SAME", "key", "at", keys),
        f"add.s64 at, at, ${_FURTHER};", *_wait_lines("CODES", "code", "at", keys),
        f"mov.b32 m, {_THERE:#x};", "mov.b32 high, -1;",
        # With those of code m on at least so many pass, with those beyond `high` fewer.
        "NARROW:", "setp.eq.s32 p, m, high;", "@p bra NARROWED;",
        "sub.s32 t, high, m;", "add.s32 t, t, 1;", "shr.u32 t, t, 1;", "add.s32 t, t, m;",
        "mov.b32 n, 0;",
    ]  # fmt: skip
    for j in range(each):
        lines += [
            f"setp.ge.s32 p, code{j}, t;", f"setp.eq.and.s32 p, key{j}, low, p;",
            f"setp.gt.or.s32 p, key{j}, low, p;", "@p add.s32 n, n, 1;",
        ]  # fmt: skip
    lines += [
        "redux.sync.add.s32 n, n, -1;", f"setp.ge.s32 p, n, ${_ORDER};", "@p mov.b32 m, t;",
        "@!p sub.s32 high, t, 1;", "bra NARROW;",
        # A code is the complement of a latent.
        "NARROWED:", "not.b32 t, m;", f"or.b32 t, t, {_THERE:#x};", "setp.eq.s32 p, lane, 0;",
        "@p st.relaxed.gpu.global.b32 [a + 8], t;",
        "NEXT:", f"add.s32 row, row, {4 * parts};", "bra ORDER;",
        "ORDERED:", "mov.b32 n, -1;",
    ]  # fmt: skip
    for r in (0, 1):
        lines += [
            f"ld.relaxed.gpu.global.b32 t, [${_FOUND + 2 * r} + 8];",
            f"setp.eq.s32 p, tied{r}, 0;", "selp.b32 t, -1, t, p;", "and.b32 n, n, t;",
            f"and.b32 last{r}, t, 0x7FFFFFFF;",
        ]  # fmt: skip
    return [
        *lines, "setp.ge.s32 p, n, 0;", "vote.sync.any.pred p, p, -1;", "@p bra ORDERED;",
        "AGREED:",
    ]  # fmt: skip


@constexpr_function
def finish_ptx(shares: int, capacity: int, records: int) -> str:
    """PTX of 32 unused outputs and 4 operands as above: cursor, list numbers, limits, address of
    what is written: a list's pairs, capacity + 1 where it overflowed, its records, its row's
    limits."""
    lines = [".reg .b64 a;", ".reg .b32 n, m;"]
    for half in (0, 2):
        cursor = 32 + half
        lines += [
            f"sub.u32 n, ${cursor + _LAST_PAIR}, ${cursor + _PAIR};",
            f"div.u32 n, n, {32 * shares};", f"sub.u32 n, {capacity + 1}, n;",
            f"sub.u32 m, ${cursor + _LAST_RECORD}, ${cursor + _RECORD};",
            f"div.u32 m, m, {32 * shares};", f"sub.u32 m, {records}, m;",
            f"mad.wide.u32 a, ${32 + 128 + half}, 16, ${32 + 384};",
            f"st.global.v4.b32 [a], {{n, m, ${32 + 256 + half}, ${32 + 257 + half}}};",
        ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"


@constexpr_function
def constraints(outputs: int, operands: str) -> str:
    # Early clobber: outputs are written before all operands are read.
    return ",".join(["=&r"] * outputs + [c for c in operands for _ in range(128)])
