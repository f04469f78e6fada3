"""What a compiled program runs, loop by loop, read from its text.

A kernel is an instruction of a program or of the body of a loop, with all that is fused into it.
Beside those for a TPU, XLA writes its estimate of their cycles; what has none there is arithmetic
on single numbers, or a copy that runs beside the others, and does not count.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
PRODUCTS = ("dot", "convolution")
# Names for values, control flow, and the ends of what another instruction started.
NO_KERNELS = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "opt-barrier", "optimization-barrier", "partition-id", "replica-id",
)  # fmt: skip
FULL = re.compile(r'operand_precision(?:=\{|":\[")highest\b', re.IGNORECASE)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}


class Instruction(NamedTuple):
    kind: str
    shape: str
    line: str

    def attribute(self, pattern: str) -> str:
        """The group of a pattern in the line; empty where it does not occur."""
        found = re.search(pattern, self.line)
        return found[1] if found else ""

    def called(self, names: str) -> list[str]:
        return re.findall(rf"(?:{names})=%?([\w.\-]+)", self.line)

    def branches(self) -> list[str]:
        listed = self.attribute(r"branch_computations=\{(.*?)\}")
        names = [name.strip().lstrip("%") for name in listed.split(",")]
        return names if listed else self.called("true_computation|false_computation")


class Work(NamedTuple):
    kernels: int = 0
    products: int = 0
    """Kernels with a product of matrices in them."""
    full: int = 0
    """Those whose products are at full precision."""
    cycles: int = 0
    """Zero where XLA gives no estimate."""

    def plus(self, other: "Work", times: int = 1) -> "Work":
        return Work(*(a + times * b for a, b in zip(self, other, strict=True)))


@dataclass
class Loop:
    """The body and the condition of a loop; or the program itself, which runs once."""

    trips: int | None = 1
    """None if only the data tell."""
    own: Work = field(default_factory=Work)
    """Without the loops inside."""
    loops: list["Loop"] = field(default_factory=list)
    collectives: list[dict[str, Any]] = field(default_factory=list)
    """`{"kind", "bytes", "depth"}` of these and of those in loops inside; depth in loops."""

    def trip(self, *counts: int) -> Work:
        """The work of one trip, where the loops inside take `counts` of trips, in their order.

        Without `counts` a loop inside takes the number that is known, or one.
        """
        counts = counts or tuple(loop.trips or 1 for loop in self.loops)
        total = self.own
        for loop, count in zip(self.loops, counts, strict=True):
            total = total.plus(loop.trip(), count)
        return total

    def add(self, other: "Loop") -> None:
        self.own = self.own.plus(other.own)
        self.loops += other.loops
        self.collectives += other.collectives


def read(text: str) -> Loop:
    """The program in the text of a compiled module, `compiled.as_text()`."""
    bodies, entry = computations(text)
    return _Reader(bodies, estimated="estimated_cycles" in text).part(entry, 0)


def collectives(text: str) -> list[dict[str, Any]]:
    """The collectives of a compiled program: `{"kind", "bytes", "depth"}`, depth in loops."""
    return read(text).collectives


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The instructions of each computation by its name, and the name of the first to run."""
    bodies: dict[str, list[Instruction]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head:
            current = head[2]
            bodies[current] = []
            entry = current if head[1] else entry
        elif current and (
            made := re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\(", line)
        ):
            bodies[current].append(Instruction(made[2], made[1], line))
    return bodies, entry


class _Reader(NamedTuple):
    bodies: dict[str, list[Instruction]]
    estimated: bool

    def part(self, name: str, depth: int) -> Loop:
        """What a computation runs that lies in `depth` loops."""
        part = Loop()
        for instruction in self.bodies.get(name, []):
            part.collectives += self.crossing(instruction, depth)
            if instruction.kind == "while":
                loop = self.part(instruction.called("body")[0], depth + 1)
                loop.add(self.part(instruction.called("condition")[0], depth + 1))
                trips = instruction.attribute(r'known_trip_count":\{"n":"(\d+)"')
                loop.trips = int(trips) if trips else None
                part.loops.append(loop)
                part.collectives += loop.collectives
            elif instruction.kind == "conditional":
                branches = [self.part(branch, depth) for branch in instruction.branches()]
                longest = max(branches, key=lambda branch: branch.trip().kernels)
                part.own, part.loops = part.own.plus(longest.own), part.loops + longest.loops
                part.collectives += [c for branch in branches for c in branch.collectives]
            elif instruction.kind == "call":
                part.add(self.part(instruction.called("to_apply")[0], depth))
            elif instruction.kind not in NO_KERNELS and not instruction.kind.endswith("-done"):
                part.own = part.own.plus(self.kernel(instruction))
        return part

    def kernel(self, instruction: Instruction) -> Work:
        cycles = int(instruction.attribute(r'"estimated_cycles":"(\d+)"') or 0)
        if self.estimated and not cycles:
            return Work()
        products = [
            part
            for part in self.fused(instruction)
            if part.kind in PRODUCTS or (part.kind == "custom-call" and "gemm" in part.line)
        ]
        full = bool(products) and all(FULL.search(part.line) for part in products)
        return Work(1, bool(products), full, cycles)

    def fused(self, instruction: Instruction) -> Iterator[Instruction]:
        """An instruction, and those that run as a part of it."""
        yield instruction
        for name in instruction.called("calls"):
            for inner in self.bodies.get(name, []):
                yield from self.fused(inner)

    def crossing(self, instruction: Instruction, depth: int) -> list[dict[str, Any]]:
        kinds = [(part.kind.removesuffix("-start"), part.shape) for part in self.fused(instruction)]
        return [
            {"kind": kind, "bytes": size(shape), "depth": depth}
            for kind, shape in kinds
            if kind in COLLECTIVES
        ]


def size(shapes: str) -> int:
    """Bytes of a shape such as `f32[8,2]{1,0}`, or of a tuple of them."""
    total = 0
    for dtype, dims in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes):
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        total += BYTES.get(dtype, 4) * count
    return total
