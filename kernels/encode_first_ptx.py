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
        ".reg .pred p, inclusive, some;", ".reg .b32 f, m, low, high, limit, info, four;",
        ".reg .b64 a;", "mov.u32 four, %laneid;", "and.b32 four, four, 28;",
        "shl.b32 four, 15, four;", f"mov.b64 {{low, high}}, ${first['lists']};",
        "setp.ne.s32 some, 0, 0;",
    ]  # fmt: skip
    for half in (0, 1):
        tau, last = (f"${first['limits'] + 2 * half + i}" for i in (0, 1))
        lines += [
            f".reg .b32 c{half}, equal{half}, limit{half}, mask{half};",
            f"mov.b32 c{half}, ${first['cursor'] + _PAIR + 2 * half};", f"mov.b32 mask{half}, 0;",
            # Where zeros pass, so do the negative values that ReLU makes zeros.
            f"sub.s32 equal{half}, {tau}, 1;", f"setp.eq.s32 p, {tau}, 0;",
            f"selp.b32 equal{half}, -2147483648, equal{half}, p;",
            f"setp.lt.s32 p, {last}, 0;", f"selp.b32 limit{half}, {tau}, equal{half}, p;",
            f"setp.lt.u32 p, {last}, 0x7FFFFFFF;", "or.pred some, some, p;",
        ]  # fmt: skip
    # As a rule all that equal a threshold pass.
    lines += ["vote.sync.any.pred some, some, -1;", "@some bra SOME;"]
    for ties in (False, True):
        lines += ["SOME:", f"mov.b32 f, ${first['latent']};"] if ties else []
        for run in range(32):
            for half in (0, 1):
                limit = f"limit{half}"
                if ties:
                    at = first["limits"] + 2 * half
                    lines += [
                        f"setp.le.s32 inclusive, f, ${at + 1};",
                        f"selp.b32 limit, equal{half}, ${at}, inclusive;",
                    ]
                    limit = "limit"
                bits = first["bits"] + 4 * run + 2 * half
                lines += [
                    f"max.s32 m, ${bits}, ${bits + 1};", f"setp.gt.s32 p, m, {limit};",
                    f"mov.b64 a, {{c{half}, high}};",
                    f"@p st.global.v2.b32 [a], {{${bits}, ${bits + 1}}};",
                    f"@p add.u32 c{half}, c{half}, {32 * shares};",
                    f"@p or.b32 mask{half}, mask{half}, {1 << run};",
                ]  # fmt: skip
                if run % 4 == 3:
                    end = first["cursor"] + _LAST_PAIR + 2 * half
                    lines += [f"min.u32 c{half}, c{half}, ${end};"]
            if ties:
                lines += [f"add.s32 f, f, ${first['apart']};"]
        lines += ["DONE:"] if ties else ["bra DONE;"]
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
    lines = ["mov.b32 u, 0;"]
    for j in reversed(range(cell, 32, cells)):
        lines += [
            f"max.s32 t, ${bits + 4 * j}, ${bits + 4 * j + 1};", "max.s32 t, t, 0;",
            "setp.eq.s32 p, t, m;", f"selp.b32 u, {j}, u, p;",
        ]  # fmt: skip
    return [
        *lines, f"mad.lo.s32 t, u, ${apart}, ${latent};", "or.b32 t, t, 7;", "sub.s32 t, -1, t;",
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
def agree_ptx(cells: int, groups: int, has_codes: bool) -> str:
    """PTX of 128 outputs and 8 operands as above: elements 0 and 2 are the thresholds' bits of rows
    r and r + 8, elements 1 and 3 up to which latent equal ones pass, 0x7FFFFFFF where all do; bits,
    the tile's first latent, how far its runs are apart; which largest of a row's keys reaches the
    threshold, or a few more; the least that it may be; a row's first key of those that the thread
    reads, its first key of those that it wrote, or 0; how many bytes further on their codes are.

    Waits until all keys are there. Of a row's `groups` of four keys each of the four threads that
    share it reads every fourth.
    """
    assert groups >= 4
    return "{\n" + "\n".join(_agree_lines(cells, groups, has_codes)) + "\n}"


@constexpr_function
def _sum_of_four(what: str) -> list[str]:
    """The sum of a register of the four threads that share a row."""
    lines = []
    for lanes in (1, 2):
        lines += [f"shfl.sync.bfly.b32 t, {what}, {lanes}, 31, -1;", f"add.s32 {what}, {what}, t;"]
    return lines


@constexpr_function
def _probe_lines(r: int, groups: int, read: int, enough: str) -> list[str]:
    """A step of the search for a value that `enough` of a row's keys reach, or a few more (`most`):
    as `encode_pick_ptx.search_lines`, without branches, as rows differ."""
    lines = [
        f"cvt.rn.f32.s32 x, count{r};", "lg2.approx.f32 x, x;", "sub.f32 x, x, want;",
        f"mul.f32 x, x, below{r};",
        f"cvt.rn.f32.s32 y, over{r};", "max.f32 y, y, 0f3F000000;", "lg2.approx.f32 y, y;",
        "sub.f32 y, want, y;", f"mul.f32 y, y, above{r};", "add.f32 y, y, x;",
        "div.approx.f32 x, x, y;", "selp.f32 x, 0f3F000000, x, half;",
        f"sub.s32 t, top{r}, bottom{r};", "cvt.rn.f32.s32 y, t;", "mul.f32 x, x, y;",
        "cvt.rzi.s32.f32 mid, x;", f"add.s32 mid, mid, bottom{r};", f"add.s32 t, bottom{r}, 1;",
        "max.s32 mid, mid, t;", f"min.s32 mid, mid, top{r};", "mov.b32 n, 0;",
        f"or.b32 t, mid, {_THERE:#x};",
    ]  # fmt: skip
    for loads, held in _groups_of(f"v{r}", f"${read + 2 * r}", groups):
        lines += loads
        for key in held:
            lines += [f"setp.ge.s32 p, {key}, t;", "@p add.s32 n, n, 1;"]
    return lines + [
        *_sum_of_four("n"),
        f"setp.ge.s32 p, n, {enough};",
        # The other end's weight is halved where this one moves the second time in turn.
        f"setp.eq.s32 more, moved{r}, 1;", "selp.f32 x, 0f3F000000, 0f3F800000, more;",
        f"setp.eq.s32 more, moved{r}, -1;", "selp.f32 y, 0f3F000000, 0f3F800000, more;",
        f"@p mul.f32 above{r}, above{r}, x;", f"@p mov.f32 below{r}, 0f3F800000;",
        f"@!p mul.f32 below{r}, below{r}, y;", f"@!p mov.f32 above{r}, 0f3F800000;",
        f"selp.b32 moved{r}, 1, -1, p;",
        f"@p mov.b32 bottom{r}, mid;", f"@p mov.b32 count{r}, n;",
        f"@!p sub.s32 top{r}, mid, 1;", f"@!p mov.b32 over{r}, n;",
        f"setp.lt.s32 more, bottom{r}, top{r};", f"setp.gt.and.s32 more, count{r}, most, more;",
        "or.pred open, open, more;",
    ]  # fmt: skip


# Keys that a thread holds of a row; where there are more, it loads them again for each step.
_HELD = 32


@constexpr_function
def _registers(groups: int) -> int:
    """How many a thread's keys of a row take."""
    return (groups + 3) // 4 * 4 if groups <= _HELD else 4


@constexpr_function
def _load_lines(name: str, first: int, address: str, j: int, groups: int) -> list[str]:
    """A thread's j-th group, to registers from `first` on; least ones where it is not there."""
    four = [f"{name}_{first + i}" for i in range(4)]
    load = f"ld.relaxed.gpu.global.v4.b32 {{{', '.join(four)}}}, [{address} + {64 * j}];"
    if 4 * j + 4 <= groups:
        return [load]
    lines = [f"mov.b32 {register}, {_THERE:#x};" for register in four]
    return [*lines, f"setp.lt.s32 p, quad, {groups - 4 * j};", f"@p {load}"]


@constexpr_function
def _groups_of(name: str, address: str, groups: int) -> list[tuple[list[str], list[str]]]:
    """A thread's groups, each as what loads it, if that is needed, and its registers."""
    found: list[tuple[list[str], list[str]]] = []
    for j in range((groups + 3) // 4):
        first = 4 * j if groups <= _HELD else 0
        loads = [] if groups <= _HELD else _load_lines(name, 0, address, j, groups)
        found += [(loads, [f"{name}_{first + i}" for i in range(4)])]
    return found


@constexpr_function
def _wait_lines(
    label: str, rows: tuple[int, ...], names: dict[int, tuple[str, str]], groups: int
) -> list[str]:
    """Until all keys, or codes, of the rows are there, which are loaded then. `names` has of each
    row the registers' name and the address."""
    lines = [f"{label}:", "mov.b32 n, -1;"]
    for r in rows:
        name, address = names[r]
        for j in range((groups + 3) // 4):
            first = 4 * j if groups <= _HELD else 0
            lines += _load_lines(name, first, address, j, groups)
            if groups > _HELD:
                lines += [f"and.b32 n, n, {name}_{i};" for i in range(4)]
        if groups <= _HELD:
            lines += [f"and.b32 n, n, {name}_{i};" for i in range((groups + 3) // 4 * 4)]
    return [*lines, "setp.ge.s32 p, n, 0;", f"@p bra {label};", "bar.warp.sync -1;"]


@constexpr_function
def _tied_lines(r: int, cells: int, groups: int, enough: str, has_codes: bool) -> list[str]:
    """Up to which latent, `last`, those that equal row r's threshold pass where too many keys do,
    or it is 0. The programs tell one another, as codes, in which of a cell's runs its largest is
    the first time, unless they did when they named the keys."""
    bits, latent, apart, _, _, read, own, further = (128 + 128 * i for i in range(8))
    lines = [f".reg .b32 code{r}_<{_registers(groups)}>;", f".reg .b64 at{r};"]
    if not has_codes:
        lines += [
            f"add.s64 at{r}, ${own + 2 * r}, ${further};", f"setp.eq.s64 p, ${own + 2 * r}, 0;",
            f"@p mov.b64 at{r}, 0;",
        ]  # fmt: skip
        for cell in range(cells):
            lines += _cell_lines(cell, cells, bits + 2 * r)
            lines += _code_lines(cell, cells, bits + 2 * r, latent, apart, f"at{r}")
    lines += [
        f"add.s64 at{r}, ${read + 2 * r}, ${further};",
        *_wait_lines(f"CODES{r}", (r,), {r: (f"code{r}", f"at{r}")}, groups),
        # Of those that equal it the ones from a code on.
        f"or.b32 u, bottom{r}, {_THERE:#x};", "mov.b32 mid, 0;", "mov.b32 step, 0x7FFFFFFF;",
        f"HALVE{r}:", "sub.s32 t, step, mid;", "shr.u32 t, t, 1;", "add.s32 t, t, mid;",
        "add.s32 t, t, 1;", f"or.b32 m, t, {_THERE:#x};", "mov.b32 n, 0;",
    ]  # fmt: skip
    keys = _groups_of(f"v{r}", f"${read + 2 * r}", groups)
    codes = _groups_of(f"code{r}", f"at{r}", groups)
    # (No tuples in tuples: Triton reads these functions, and does not know them.)
    for some_keys, some_codes in zip(keys, codes, strict=True):
        lines += [*some_keys[0], *some_codes[0]]
        for key, code in zip(some_keys[1], some_codes[1], strict=True):
            lines += [
                f"setp.ge.s32 p, {code}, m;", f"setp.eq.and.s32 p, {key}, u, p;",
                f"setp.gt.or.s32 p, {key}, u, p;", "@p add.s32 n, n, 1;",
            ]  # fmt: skip
    return [
        *lines, "mov.b32 m, t;", *_sum_of_four("n"),
        "setp.lt.s32 half, mid, step;",
        f"setp.ge.and.s32 p, n, {enough}, half;", "@p mov.b32 mid, m;",
        f"setp.lt.and.s32 p, n, {enough}, half;", "@p sub.s32 step, m, 1;",
        "setp.lt.s32 more, mid, step;", "vote.sync.any.pred more, more, -1;",
        f"@more bra HALVE{r};",
        f"setp.gt.s32 p, count{r}, most;", f"setp.eq.or.s32 p, bottom{r}, 0, p;",
        f"@p sub.s32 last{r}, 0x7FFFFFFF, mid;",
    ]  # fmt: skip


@constexpr_function
def _agree_lines(cells: int, groups: int, has_codes: bool) -> list[str]:
    _, _, _, order, least, read, _, _ = (128 * (1 + i) for i in range(8))
    enough = f"${order}"
    lines = [
        ".reg .pred p, more, open, half;", ".reg .b32 n, t, u, m, most, mid, step, quad;",
        ".reg .f32 want, x, y;", "mov.u32 quad, %laneid;", "and.b32 quad, quad, 3;",
        f"shr.u32 most, {enough}, 4;", f"add.s32 most, most, {enough};",
        # log2 of the middle of what is sought.
        f"add.s32 t, most, {enough};", "cvt.rn.f32.s32 want, t;", "mul.f32 want, want, 0f3F000000;",
        "lg2.approx.f32 want, want;",
    ]  # fmt: skip
    for r in (0, 1):
        lines += [
            f".reg .b32 v{r}_<{_registers(groups)}>, top{r}, bottom{r}, count{r}, over{r};",
            f".reg .b32 moved{r}, last{r};",
            f".reg .f32 below{r}, above{r};",
        ]
    # Both rows at once, as long as registers suffice.
    for rows in ((0, 1),) if groups <= 16 else ((0,), (1,)):
        again, probe, found = (f"{name}{rows[0]}" for name in ("AGAIN", "PROBE", "FOUND"))
        lines += _wait_lines(again, rows, {r: (f"v{r}", f"${read + 2 * r}") for r in rows}, groups)
        for r in rows:
            # The least one of those that are there for all four threads: at least so many reach it.
            lines += [f"mov.b32 bottom{r}, -1;", f"mov.b32 top{r}, {_THERE:#x};"]
            some = _groups_of(f"v{r}", f"${read + 2 * r}", groups)
            for j, group in enumerate(some):
                lines += group[0]
                for key in group[1]:
                    lines += [f"max.s32 top{r}, top{r}, {key};"]
                    if 4 * j + 4 <= groups:
                        lines += [f"min.s32 bottom{r}, bottom{r}, {key};"]
            for what, op in (("bottom", "min"), ("top", "max")):
                for lanes in (1, 2):
                    lines += [
                        f"shfl.sync.bfly.b32 t, {what}{r}, {lanes}, 31, -1;",
                        f"{op}.s32 {what}{r}, {what}{r}, t;",
                    ]
                lines += [f"and.b32 {what}{r}, {what}{r}, 0x7FFFFFFF;"]
            lines += [
                f"mov.b32 count{r}, {4 * groups};", f"mov.b32 over{r}, 0;", f"mov.b32 moved{r}, 0;",
                f"mov.f32 below{r}, 0f3F800000;", f"mov.f32 above{r}, 0f3F800000;",
            ]  # fmt: skip
        lines += [
            "mov.b32 step, 0;", f"{probe}:", "setp.ne.s32 open, 0, 0;",
            # Each fourth step halves, which bounds the steps whatever the values are.
            "and.b32 t, step, 3;", "setp.eq.s32 half, t, 3;", "add.s32 step, step, 1;",
        ]  # fmt: skip
        for r in rows:
            lines += _probe_lines(r, groups, read, enough)
        lines += ["vote.sync.any.pred open, open, -1;", f"@open bra {probe};"]
        for r in rows:
            lines += [
                f"mov.b32 last{r}, 0x7FFFFFFF;", f"setp.gt.s32 p, count{r}, most;",
                f"setp.eq.or.s32 p, bottom{r}, 0, p;", "or.pred open, open, p;",
            ]  # fmt: skip
        # All programs have found the same, so each of a row's comes here or none.
        lines += ["vote.sync.any.pred open, open, -1;", f"@!open bra {found};"]
        for r in rows:
            lines += _tied_lines(r, cells, groups, enough, has_codes)
        lines += [f"{found}:"]
    for r in (0, 1):
        lines += [
            # Where a NaN is to pass, none does: not every NaN is the one that is compared.
            f"setp.gt.s32 p, bottom{r}, 0x7F800000;", f"selp.b32 t, 0x7FFFFFFF, bottom{r}, p;",
            f"max.s32 t, t, ${least + 2 * r};", f"mov.b32 ${2 * r}, t;",
            "setp.eq.s32 p, t, 0x7FFFFFFF;", f"selp.b32 ${2 * r + 1}, -1, last{r}, p;",
        ]  # fmt: skip
    return lines


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
