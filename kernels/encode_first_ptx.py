"""PTX of a thread of the Hopper filter (encode_first.py), which holds 128 accumulators: 64 columns
of rows r and r + 8.

Each function's text is run once a thread, with a register for each of 128 accumulators where an
operand or output is a tensor; of the same value in all of them the compiler makes one.
"""

from __future__ import annotations

from triton import constexpr_function


@constexpr_function
def start_ptx(parts: int, capacity: int) -> str:
    """PTX of 128 outputs and 2 operands for each of a thread's 128 accumulators: a cursor; byte
    offset of the list's first entry, address of the lists.

    Of a cursor elements 0 and 2 say where the next entry of rows r and r + 8 goes (the lower half
    of its address), elements 1 and 3 where a list is full; the others are never read nor written.
    """
    lines = [".reg .b32 low, high;", "mov.b64 {low, high}, $256;"]
    for half in (0, 1):
        lines += [
            f"add.u32 ${2 * half}, ${128 + 2 * half}, low;",
            f"add.u32 ${2 * half + 1}, ${2 * half}, {(capacity + 1) * 4 * parts * 8};",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


@constexpr_function
def filter_ptx(parts: int) -> str:
    """PTX of 128 outputs and 6 operands as above: the new cursor; bits, limits (elements as
    `agree_ptx` has them), cursor, the tile's first latent and how far its runs are apart, address
    of the lists.

    The upper half of an address never changes (`encode_first._scratch` sees to it), and a cursor is
    held back after each 8 accumulators of a row instead of each, so that up to OVERSHOOT entries
    fall behind a full list.
    """
    each = ["bits", "limits", "cursor", "latent", "apart", "lists"]
    first = {name: 128 + i * 128 for i, name in enumerate(each)}
    lines = [
        ".reg .pred p, inclusive;", ".reg .b32 f, g, low, high, limit;", ".reg .b64 a;",
        f"mov.b64 {{low, high}}, ${first['lists']};", f"mov.b32 f, ${first['latent']};",
    ]  # fmt: skip
    for half in (0, 1):
        tau = f"${first['limits'] + 2 * half}"
        lines += [
            f".reg .b32 c{half}, equal{half};",
            f"mov.b32 c{half}, ${first['cursor'] + 2 * half};",
            # Where zeros pass, so do the negative values that ReLU makes zeros.
            f"sub.s32 equal{half}, {tau}, 1;", f"setp.eq.s32 p, {tau}, 0;",
            f"selp.b32 equal{half}, -2147483648, equal{half}, p;",
        ]  # fmt: skip
    for run in range(32):
        lines += ["add.s32 g, f, 1;"]
        for half in (0, 1):
            lines += [
                f"setp.le.s32 inclusive, f, ${first['limits'] + 2 * half + 1};",
                f"selp.b32 limit, equal{half}, ${first['limits'] + 2 * half}, inclusive;",
            ]
            for column, latent in ((0, "f"), (1, "g")):
                bits = first["bits"] + 4 * run + 2 * half + column
                lines += [
                    f"setp.gt.s32 p, ${bits}, limit;",
                    f"mov.b64 a, {{c{half}, high}};",
                    f"@p st.global.v2.b32 [a], {{{latent}, ${bits}}};",
                    f"@p add.u32 c{half}, c{half}, {4 * parts * 8};",
                ]
            if run % 4 == 3:
                lines += [f"min.u32 c{half}, c{half}, ${first['cursor'] + 2 * half + 1};"]
        lines += [f"add.s32 f, f, ${first['apart']};"]
    for half in (0, 1):
        lines += [f"mov.b32 ${2 * half}, c{half};"]
        lines += [f"mov.b32 ${2 * half + 1}, ${first['cursor'] + 2 * half + 1};"]
    return "{\n" + "\n".join(lines) + "\n}"


@constexpr_function
def name_ptx(cells: int) -> str:
    """PTX of 32 unused outputs and 5 operands of 128 registers each: bits, the tile's first latent
    and how far its runs are apart, where a row's keys go, their mark.

    A thread's 64 columns of a row are `cells` cells, of every `cells`-th run. A cell's key is its
    largest activation's bits and, below, 0x7FFFFFFF less the last latent of the first run that has
    it, so that of equal activations lower latents are larger keys.
    """
    bits, latent, apart, out, mark = (32 + 128 * i for i in range(5))
    lines = [".reg .pred p;", ".reg .b32 m, t, run;", ".reg .b64 key;"]
    for half in (0, 1):
        for cell in range(cells):
            # ReLU: where nothing is above 0, all are equal to 0.
            lines += ["mov.b32 m, 0;", f"mov.b32 run, {cell};"]
            for j in range(cell, 32, cells):
                at = bits + 4 * j + 2 * half
                lines += [
                    f"max.s32 t, ${at}, ${at + 1};", "setp.gt.s32 p, t, m;",
                    f"selp.b32 run, {j}, run, p;", "max.s32 m, m, t;",
                ]  # fmt: skip
            lines += [
                # One NaN, as encode_select.relu_bits has it.
                "min.s32 m, m, 0x7FC00000;",
                f"mad.lo.s32 run, run, ${apart}, ${latent};",
                "or.b32 run, run, 7;", "sub.s32 run, 0x7FFFFFFF, run;",
                "mov.b64 key, {run, m};", f"or.b64 key, key, ${mark};",
                f"st.relaxed.gpu.global.b64 [${out + 2 * half} + {32 * cell}], key;",
            ]  # fmt: skip
    return "{\n" + "\n".join(lines) + "\n}"


@constexpr_function
def agree_ptx(each: int) -> str:
    """PTX of 128 outputs and 4 operands as above: elements 0 and 2 are the thresholds' bits of rows
    r and r + 8, elements 1 and 3 up to which latent equal ones pass; the first of a thread's keys
    of a row, of which it has `each`, every 32 bytes; their mark; which largest of the row's keys is
    the threshold; the least that it may be. Waits until all keys are there.

    Halves the keys between which it lies until so many are above, or a few more. Four threads share
    a row.
    """
    return "{\n" + "\n".join(_agree_lines(each)) + "\n}"


# The bits of a key that mark it as written, one of the two.
_MARKS = 0x8000000080000000


@constexpr_function
def _of_four(op: str, what: str) -> list[str]:
    """The smallest or largest of a 64-bit register of the four threads that share a row."""
    lines = []
    for lanes in (1, 2):
        lines += [
            f"mov.b64 {{t, u}}, {what};", f"shfl.sync.bfly.b32 t, t, {lanes}, 31, -1;",
            f"shfl.sync.bfly.b32 u, u, {lanes}, 31, -1;", "mov.b64 a, {t, u};",
            f"{op}.s64 {what}, {what}, a;",
        ]  # fmt: skip
    return lines


@constexpr_function
def _agree_lines(each: int) -> list[str]:
    keys, mark, order, least = (128 * (1 + i) for i in range(4))
    enough = f"${order}"
    lines = [".reg .pred p, more, open;", ".reg .b32 n, t, u, most;", ".reg .b64 wrong, a, b;"]
    lines += [f"shr.u32 most, {enough}, 4;", f"add.s32 most, most, {enough};"]
    for row in (0, 1):
        lines += [f".reg .b64 k{row}_<{each}>, low{row}, high{row}, mid{row};"]
        lines += [f".reg .b32 count{row};"]
    # Both rows at once, as long as registers suffice.
    for rows in ((0, 1),) if each <= 16 else ((0,), (1,)):
        again, halve = f"AGAIN{rows[0]}", f"HALVE{rows[0]}"
        lines += [f"{again}:", "mov.b64 wrong, 0;"]
        for row in rows:
            for j in range(each):
                lines += [f"ld.relaxed.gpu.global.b64 k{row}_{j}, [${keys + 2 * row} + {32 * j}];"]
        for row in rows:
            for j in range(each):
                lines += [f"xor.b64 k{row}_{j}, k{row}_{j}, ${mark};"]
                lines += [f"or.b64 wrong, wrong, k{row}_{j};"]
        lines += [f"and.b64 wrong, wrong, {_MARKS:#x};", "setp.ne.s64 p, wrong, 0;"]
        lines += [f"@p bra {again};", "bar.warp.sync -1;"]
        for row in rows:
            for what, op in (("low", "min"), ("high", "max")):
                lines += [f"mov.b64 {what}{row}, k{row}_0;"]
                for j in range(1, each):
                    lines += [f"{op}.s64 {what}{row}, {what}{row}, k{row}_{j};"]
                lines += _of_four(op, f"{what}{row}")
            lines += [f"mov.b32 count{row}, {4 * each};"]
        lines += [f"{halve}:", "setp.ne.s32 open, 0, 0;"]
        for row in rows:
            lines += [
                f"sub.s64 a, high{row}, low{row};", "add.s64 a, a, 1;", "shr.s64 a, a, 1;",
                f"add.s64 mid{row}, low{row}, a;", "mov.b32 n, 0;",
            ]  # fmt: skip
            for j in range(each):
                lines += [f"setp.ge.s64 p, k{row}_{j}, mid{row};", "@p add.s32 n, n, 1;"]
            for lanes in (1, 2):
                lines += [f"shfl.sync.bfly.b32 t, n, {lanes}, 31, -1;", "add.s32 n, n, t;"]
            lines += [
                f"setp.ge.s32 p, n, {enough};",
                f"@p mov.b64 low{row}, mid{row};", f"@p mov.b32 count{row}, n;",
                f"@!p sub.s64 high{row}, mid{row}, 1;",
                f"setp.lt.s64 more, low{row}, high{row};",
                f"setp.gt.and.s32 more, count{row}, most, more;",
                "or.pred open, open, more;",
            ]  # fmt: skip
        lines += ["vote.sync.any.pred open, open, -1;", f"@open bra {halve};"]
        for row in rows:
            # The least key that is so large.
            lines += ["mov.b64 b, 0x7FFFFFFFFFFFFFFF;"]
            for j in range(each):
                lines += [
                    f"setp.ge.s64 p, k{row}_{j}, low{row};", f"selp.b64 a, k{row}_{j}, b, p;",
                    "min.s64 b, b, a;",
                ]  # fmt: skip
            lines += _of_four("min", "b")
            lines += [
                "mov.b64 {t, u}, b;",
                # Where a NaN is to pass, none does: not every NaN is the one that is compared.
                "setp.eq.s32 p, u, 0x7FC00000;", "selp.b32 u, 0x7FFFFFFF, u, p;",
                f"max.s32 u, u, ${least + 2 * row};", f"mov.b32 ${2 * row}, u;",
                "sub.s32 t, 0x7FFFFFFF, t;", "setp.eq.s32 p, u, 0x7FFFFFFF;",
                "selp.b32 t, -1, t, p;", f"mov.b32 ${2 * row + 1}, t;",
            ]  # fmt: skip
    return lines


@constexpr_function
def finish_ptx(parts: int, capacity: int) -> str:
    """PTX of 32 unused outputs and 3 operands as above: cursor, list numbers, address of the
    lengths to write. The length of a list that overflowed is capacity + 1."""
    lines = [".reg .b64 a;", ".reg .b32 n;"]
    for half in (0, 1):
        lines += [
            f"sub.u32 n, ${32 + 2 * half + 1}, ${32 + 2 * half};",
            f"div.u32 n, n, {4 * parts * 8};",
            f"sub.u32 n, {capacity + 1}, n;",
            f"mad.wide.u32 a, ${32 + 128 + 2 * half}, 4, ${32 + 256};",
            "st.global.b32 [a], n;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"


@constexpr_function
def constraints(outputs: int, operands: str) -> str:
    # Early clobber: outputs are written before all operands are read.
    return ",".join(["=&r"] * outputs + [c for c in operands for _ in range(128)])
