"""A machine for the PTX of the selection kernels, which no interpreter runs: some warps of one
program, their registers, shared and global memory, in NumPy.

It knows the instructions that those kernels use, and is strict where a GPU is silent: about
addresses out of bounds or not aligned, types of registers, branches in which a warp's threads
differ, and warps that wait at different barriers. Registers and memory begin as noise. Between
barriers warps run one after another, in an order drawn anew each time.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
BASE = 0x7_0000_1000  # address of the first byte of global memory
_SHARED = 4096
_LANES = np.arange(32)
_TYPES: dict[str, Any] = {
    "s32": np.int32, "u32": np.uint32, "b32": np.uint32, "f32": np.float32, "s64": np.int64,
    "u64": np.uint64, "b64": np.uint64,
}  # fmt: skip
_BINARY: dict[str, Any] = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
_COMPARE: dict[str, Any] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip


class Instruction(NamedTuple):
    predicate: str  # "" where it is unconditional
    negated: bool
    op: tuple[str, ...]
    args: tuple[str, ...]
    text: str


class Program(NamedTuple):
    instructions: list[Instruction]
    labels: dict[str, int]
    registers: dict[str, str]  # their types
    shared: dict[str, int]  # sizes in bytes


def parse(text: str) -> Program:
    """A text in braces, with registers that are declared in inner braces, too."""
    program = Program([], {}, {}, {})
    scopes: list[dict[str, str]] = []

    def resolved(arg: str) -> str:
        def name(found: re.Match[str]) -> str:
            for scope in reversed(scopes):
                if found[0] in scope:
                    return scope[found[0]]
            return found[0]

        return re.sub(r"(?<![.%$\w])[A-Za-z_]\w*", name, arg)

    # A brace of its own line is a scope, others are vectors.
    for part in re.split(r"[;\n]", text):
        statement = part.strip()
        if statement == "{":
            scopes.append({})
            continue
        if statement == "}":
            scopes.pop()
            continue
        while label := re.match(r"([A-Za-z_]\w*):\s*", statement):
            program.labels[label[1]] = len(program.instructions)
            statement = statement[label.end() :]
        if not statement:
            continue
        if shared := re.match(r"\.shared \.align \d+ \.b8 (\w+)\[(\d+)\]", statement):
            program.shared[shared[1]] = int(shared[2])
            continue
        if declared := re.match(r"\.reg \.(\w+) (.*)", statement):
            for item in declared[2].split(","):
                many = re.fullmatch(r"(\w+)<(\d+)>", item.strip())
                names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [item.strip()]
                for name in names:
                    assert name not in scopes[-1], f"{name} is declared twice"
                    own = f"{name}@{len(program.registers)}"
                    scopes[-1][name] = own
                    program.registers[own] = declared[1]
            continue
        predicate = re.match(r"@(!?)(\w+)\s+", statement)
        rest = statement[predicate.end() :] if predicate else statement
        op, _, operands = rest.partition(" ")
        args = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{\[][^,]*", operands)
        program.instructions.append(
            Instruction(
                resolved(predicate[2]) if predicate else "", bool(predicate and predicate[1]),
                tuple(op.split(".")),
                tuple(arg if op == "bra" else resolved(arg.strip()) for arg in args), statement,
            )
        )  # fmt: skip
    assert not scopes
    return program


class Memory:
    """Bytes, read and written in vectors of words by 32 threads."""

    def __init__(self, pieces: list[tuple[int, int]], rng: np.random.Generator) -> None:
        self.pieces = pieces  # first address, and size
        self.start = min(first for first, _ in pieces)
        end = max(first + size for first, size in pieces)
        self.bytes = rng.integers(0, 256, end - self.start, dtype=np.uint8)

    def _offsets(self, address: Array, size: int) -> Array:
        at = address.astype(np.int64)
        assert (at % size == 0).all(), "an address is not aligned"
        inside = [((at >= first) & (at + size <= first + n)).all() for first, n in self.pieces]
        assert any(inside), "an address is out of bounds"
        return at - self.start

    def load(self, address: Array, width: int, words: int) -> list[Array]:
        at = self._offsets(address, width * words)[:, None] + np.arange(width * words)
        data = self.bytes[at].view(np.uint32 if width == 4 else np.uint64)
        return [data[:, i].copy() for i in range(words)]

    def store(self, address: Array, width: int, values: list[Array]) -> None:
        at = self._offsets(address, width * len(values))
        for i, value in enumerate(values):
            data = np.ascontiguousarray(value).view(np.uint8).reshape(-1, width)
            # One thread after another: of several that write to a word the last one stays.
            for thread, first in enumerate(at + width * i):
                self.bytes[first : first + width] = data[thread]


class Warp:
    def __init__(
        self,
        program: Program,
        number: int,
        operands: dict[str, Array],
        memories: dict[str, Memory],
        rng: np.random.Generator,
    ) -> None:
        self.program, self.number, self.memories = program, number, memories
        self.values: dict[str, Array] = dict(operands)
        for name, kind in program.registers.items():
            if kind == "pred":
                self.values[name] = rng.integers(0, 2, 32).astype(bool)
            else:
                bits = np.uint64 if kind.endswith("64") else np.uint32
                self.values[name] = rng.integers(0, np.iinfo(bits).max, 32, dtype=bits)
        self.shared = {name: _SHARED + (i << 20) for i, name in enumerate(program.shared)}

    def value(self, arg: str, width: int) -> Array:
        if arg in self.values:
            value = self.values[arg]
            assert value.dtype.itemsize == width, f"{arg} has another width"
            return value
        named: dict[str, Any] = {
            "%laneid": _LANES, "%tid.x": _LANES + 32 * self.number,
            **self.shared,
        }  # fmt: skip
        number = (
            named[arg] if arg in named else int(arg[2:], 16) if arg[:2] == "0f" else int(arg, 0)
        )
        bits = np.asarray(number, dtype=object) % (1 << 8 * width)
        return np.broadcast_to(bits, 32).astype(np.uint32 if width == 4 else np.uint64)

    def typed(self, arg: str, kind: str) -> Array:
        return self.value(arg, 8 if kind.endswith("64") else 4).view(_TYPES[kind])

    def put(self, register: str, value: Array, active: Array) -> None:
        kind = self.program.registers.get(register)
        if value.dtype != bool:
            value = value.view(np.uint64 if value.dtype.itemsize == 8 else np.uint32)
            assert kind is None or kind.endswith("64") == (value.dtype.itemsize == 8), register
        else:
            assert kind == "pred", register
        old = self.values.get(register, np.zeros(32, value.dtype))
        self.values[register] = np.where(active, value, old)

    def _address(self, arg: str, width: int) -> Array:
        base, _, offset = arg[1:-1].partition("+")
        return self.value(base.strip(), width) + self.value(offset.strip() or "0", width)

    def run(self) -> Generator[tuple[str, bool], bool, None]:
        """Yields where it waits for the other warps, and what it has to say there."""
        at, steps = 0, 0
        while at < len(self.program.instructions):
            step = self.program.instructions[at]
            at, steps = at + 1, steps + 1
            assert steps < 1_000_000, "it does not end"
            active = np.ones(32, bool)
            if step.predicate:
                active = self.values[step.predicate] ^ step.negated
            if step.op[0] == "bra":
                assert active.all() or not active.any(), f"threads differ at {step.text}"
                if active.any():
                    at = self.program.labels[step.args[0]]
            elif step.op[:2] == ("bar", "sync"):
                yield "sync", False
            elif step.op[:2] == ("bar", "red"):
                some = yield "or", bool(self.values[step.args[2]].any())
                self.put(step.args[0], np.full(32, some), active)
            elif step.op[:2] != ("bar", "warp"):
                self._do(step.op, step.args, active)

    def _do(self, op: tuple[str, ...], args: tuple[str, ...], active: Array) -> None:
        if op[0] in ("ld", "st", "atom", "red"):
            self._access(op, args, active)
        elif op[0] in ("shfl", "redux", "vote"):
            assert active.all(), "some threads of a warp are missing"
            self._together(op, args)
        elif op[-1] == "pred" or op[0] == "setp":
            self.put(args[0], self._predicate(op, args), active)
        elif op[0] == "mov" and args[0][0] == "{":
            low, high = (name.strip() for name in args[0][1:-1].split(","))
            value = self.value(args[1], 8)
            self.put(low, (value & np.uint64(0xFFFFFFFF)).astype(np.uint32), active)
            self.put(high, (value >> np.uint64(32)).astype(np.uint32), active)
        else:
            with np.errstate(all="ignore"):
                self.put(args[0], self._number(op, args), active)

    def _access(self, op: tuple[str, ...], args: tuple[str, ...], active: Array) -> None:
        if not active.any():
            return
        memory = self.memories["shared" if "shared" in op else "global"]
        width = 8 if op[-1].endswith("64") else 4
        loads = op[0] in ("ld", "atom")
        address = self._address(args[1 if loads else 0], 4 if "shared" in op else 8)
        if op[0] in ("atom", "red"):
            assert op[2] == "add"
            add = self.value(args[-1], 4)
            old = np.zeros(32, np.uint32)
            for lane in np.flatnonzero(active):
                one = address[lane : lane + 1]
                old[lane] = memory.load(one, 4, 1)[0][0]
                memory.store(one, 4, [old[lane : lane + 1] + add[lane : lane + 1]])
            if op[0] == "atom":
                self.put(args[0], old, active)
            return
        names = [name.strip() for name in args[0 if loads else 1].strip("{}").split(",")]
        if not loads:
            memory.store(address[active], width, [self.value(n, width)[active] for n in names])
            return
        for name, value in zip(names, memory.load(address[active], width, len(names)), strict=True):
            every = np.zeros(32, value.dtype)
            every[active] = value
            self.put(name, every, active)

    def _together(self, op: tuple[str, ...], args: tuple[str, ...]) -> None:
        everyone = np.ones(32, bool)
        if op[0] == "vote":
            said = self.values[args[1]]
            if op[2] == "ballot":
                self.put(args[0], np.full(32, (said * (1 << _LANES)).sum(), np.uint32), everyone)
            else:
                assert op[2] == "any"
                self.put(args[0], np.full(32, said.any()), everyone)
        elif op[0] == "redux":
            value = self.typed(args[1], op[3])
            sums = {"max": value.max, "min": value.min, "add": lambda: value.sum(dtype=value.dtype)}
            self.put(args[0], np.full(32, sums[op[2]](), value.dtype), everyone)
        else:
            names = args[0].split("|")
            value, by = self.value(args[1], 4), self.value(args[2], 4).astype(np.int64)
            source = {
                "bfly": _LANES ^ by, "idx": by & 31, "up": _LANES - by, "down": _LANES + by,
            }[op[2]]  # fmt: skip
            there = (source >= 0) & (source < 32)
            self.put(names[0], value[np.where(there, source, _LANES)], everyone)
            if len(names) > 1:
                self.put(names[1], there, everyone)

    def _predicate(self, op: tuple[str, ...], args: tuple[str, ...]) -> Array:
        if op[0] != "setp":
            a, b = self.values[args[1]], self.values[args[2]]
            return np.asarray(_BINARY[op[0]](a, b))
        found = _COMPARE[op[1]](self.typed(args[1], op[-1]), self.typed(args[2], op[-1]))
        if len(op) == 4:
            found = _BINARY[op[2]](found, self.values[args[3]])
        return np.asarray(found)

    def _number(self, op: tuple[str, ...], args: tuple[str, ...]) -> Array:
        name, kind = op[0], op[-1]
        if name == "mov":
            if args[1][0] == "{":
                low, high = (self.value(n.strip(), 4) for n in args[1][1:-1].split(","))
                return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
            return self.value(args[1], 8 if kind.endswith("64") else 4)
        if name in _BINARY:
            a, b = self.typed(args[1], kind), self.typed(args[2], kind)
            out = np.asarray(_BINARY[name](a, b))
            return np.maximum(out, 0) if op[1] == "relu" else out
        if name in ("mul", "mad"):
            a, b = self.typed(args[1], kind), self.typed(args[2], kind)
            if op[1] == "wide":
                long = np.int64 if kind == "s32" else np.uint64
                a, b = a.astype(long), b.astype(long)
            out = a * b
            if name == "mad":
                out = out + self.value(args[3], out.dtype.itemsize).view(out.dtype)
            return out
        if name == "selp":
            chosen = self.values[args[3]]
            return np.where(chosen, self.typed(args[1], kind), self.typed(args[2], kind))
        if name in ("shl", "shr"):
            shift = operator.lshift if name == "shl" else operator.rshift
            pairs = zip(self.typed(args[1], kind), self.value(args[2], 4), strict=True)
            return np.array([shift(int(v), int(n)) & 0xFFFFFFFF for v, n in pairs], np.uint32)
        return self._other(op, args)

    def _other(self, op: tuple[str, ...], args: tuple[str, ...]) -> Array:
        name, kind = op[0], op[-1]
        if name == "neg":
            return -self.typed(args[1], kind)
        if name == "popc":
            return np.array([int(v).bit_count() for v in self.value(args[1], 4)], np.uint32)
        if name == "clz":
            return np.array([32 - int(v).bit_length() for v in self.value(args[1], 4)], np.uint32)
        if name == "rem":
            return self.typed(args[1], kind) % self.typed(args[2], kind)
        if name == "div":
            return self.typed(args[1], kind) / self.typed(args[2], kind)
        if name == "lg2":
            return np.log2(self.typed(args[1], kind))
        assert name == "cvt", op
        if op[1:] == ("rn", "f32", "s32"):
            return self.typed(args[1], "s32").astype(np.float32)
        assert op[1:] == ("rzi", "s32", "f32"), op
        whole = np.trunc(np.nan_to_num(self.typed(args[1], "f32").astype(np.float64)))
        return np.clip(whole, -(2**31), 2**31 - 1).astype(np.int64).astype(np.int32)


def run(
    program: Program, warps: int, operands: dict[str, int], memory: Memory, rng: np.random.Generator
) -> int:
    """Runs a program's warps; operands over 2**32 are addresses. Returns $0."""
    pieces = [(_SHARED + (i << 20), size) for i, size in enumerate(program.shared.values())]
    memories = {"global": memory, "shared": Memory(pieces, rng)}
    values = {
        name: np.full(32, value, np.uint64 if value >= BASE else np.uint32)
        for name, value in operands.items()
    }
    all_warps = [Warp(program, w, values, memories, rng) for w in range(warps)]
    running = [warp.run() for warp in all_warps]
    said: bool | None = None
    while True:
        waits = []
        for w in rng.permutation(warps):
            try:
                waits += [next(running[w]) if said is None else running[w].send(said)]
            except StopIteration:
                waits += [("end", False)]
        assert len({kind for kind, _ in waits}) == 1, f"warps wait for different things: {waits}"
        if waits[0][0] == "end":
            break
        said = any(some for _, some in waits)
    results = {int(v) for warp in all_warps for v in warp.values["$0"].view(np.int32)}
    assert len(results) == 1, "threads differ in what they return"
    return results.pop()
