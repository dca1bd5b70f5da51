"""Reads what ``cuobjdump`` prints about a compiled kernel: resources, and the instructions of its main loop.

The main loop is the innermost loop with the most tensor-core instructions (for kernels without any: popcounts, or
simply instructions). Counts are of static instructions: they say how much work an iteration is, not how long it
takes.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from tetra.autotune.hardware import CHIPS
from tetra.kernels.ahead_of_time import Compiled, disassemble

_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<operands>[^;]*);"
)
_TARGET = re.compile(r"0x([0-9a-f]+)")

# Tensor-core products: mma (sm_80 and on), wgmma (sm_90) and tcgen05 (sm_100).
_TENSOR_CORE = re.compile(r"^([IHBQOD]MMA|[IHQ]GMMA|UTC\w*MMA)\b")
_SHAPE = re.compile(r"\.(?:(?P<m>\d+)x(?P<n>\d+)x(?P<k>\d+)|(?P<digits>\d{3,6}))\b")
# The shapes of mma.sync are written without separators: 16832 is 16 x 8 x 32.
_MMA_SHAPES = {
    "884": (8, 8, 4), "8816": (8, 8, 16), "8832": (8, 8, 32), "1684": (16, 8, 4), "1688": (16, 8, 8),
    "16816": (16, 8, 16), "16832": (16, 8, 32), "16864": (16, 8, 64), "168128": (16, 8, 128),
}  # fmt: skip
_KINDS = {
    "ldsm": "LDSM",
    "lds": "LDS",
    "sts": "STS STSM",
    "ldgsts": "LDGSTS",
    "ldg": "LDG LD",
    "stg": "STG ST",
    "atomic": "ATOM ATOMG ATOMS RED REDG",
    "local": "LDL STL",
    "shfl": "SHFL",
    "popc": "POPC UPOPC",
    "cvt": "MUFU I2F F2I F2F I2I I2FP F2IP F2FP",
    "control": (
        "ARRIVES BAR BRA BSSY BSYNC CALL CCTL CS2R DEPBAR ELECT ERRBAR EXIT FENCE LDC LDCU LDGDEPBAR LDT LDTM "
        "MEMBAR NANOSLEEP NOP R2UR RET S2R S2UR STT STTM SYNCS ULDC UTCBAR UTMALDG UTMASTG VOTE VOTEU WARPGROUP "
        "WARPGROUPDEPBAR WARPSYNC YIELD"
    ),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}
KINDS = ("mma", "alu", "ualu", "float", *_KINDS)


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction."""

    address: int
    name: str  # with its modifiers, such as IMMA.16832.S8.S8
    operands: str

    @property
    def base(self) -> str:
        """The name without its modifiers."""
        return self.name.partition(".")[0]

    @property
    def kind(self) -> str:
        """One of ``KINDS``. ``alu`` is integer work of the vector unit; ``ualu`` that of the scalar unit beside it."""
        if _TENSOR_CORE.match(self.name):
            return "mma"
        if self.base in _KIND_OF:
            return _KIND_OF[self.base]
        if self.base.startswith("U"):
            return "ualu"
        return "float" if self.base.startswith(("F", "H")) else "alu"

    @property
    def access_bytes(self) -> int:
        """Bytes that a warp moves with this load or store: 32 lanes times the width, 4 bytes unless named."""
        if self.base in ("LDSM", "STSM"):  # 8 x 8 matrices of 16 bits
            matrices = re.search(r"\.([124])$", self.name)
            return 128 * int(matrices[1] if matrices else 1)
        width = re.search(r"\.[US]?(8|16|64|128|256)\b", self.name)
        return 32 * int(width[1]) // 8 if width else 128


def mma_shape(name: str) -> tuple[int, int, int] | None:
    """(m, n, k) of one tensor-core instruction, from its name; None where the name does not tell (tcgen05)."""
    found = _SHAPE.search(name)
    if found is None:
        return None
    return _MMA_SHAPES.get(found["digits"]) if found["digits"] else (int(found["m"]), int(found["n"]), int(found["k"]))


@dataclass(frozen=True)
class Report:
    """What one compiled kernel takes.

    Attributes:
        registers: a thread.
        stack_bytes, spill_instructions: of local memory; both 0 in a healthy kernel.
        shared_bytes: a block.
        num_warps: a block.
        blocks_per_sm: how many blocks one multiprocessor of this architecture holds at once.
        loop: instructions of the main loop; all of the kernel's if it has none.
        outside: the others, which run once (but for smaller loops).
    """

    arch: int
    registers: int
    stack_bytes: int
    spill_instructions: int
    shared_bytes: int
    num_warps: int
    blocks_per_sm: int
    loop: tuple[Instruction, ...] = field(repr=False)
    outside: tuple[Instruction, ...] = field(repr=False)

    @cached_property
    def main_loop(self) -> Counter[str]:
        """Instructions of the main loop by kind."""
        return Counter(i.kind for i in self.loop)

    @cached_property
    def tensor_core(self) -> Counter[str]:
        """The main loop's tensor-core instructions by name."""
        return Counter(i.name for i in self.loop if i.kind == "mma")

    @property
    def has_loop(self) -> bool:
        """Whether the kernel loops at all."""
        return bool(self.outside)

    @property
    def alu_per_mma(self) -> float:
        """Integer instructions of the main loop for each tensor-core instruction."""
        return self.main_loop["alu"] / max(self.main_loop["mma"], 1)

    @property
    def all_per_mma(self) -> float:
        """All instructions of the main loop for each tensor-core instruction."""
        return self.main_loop.total() / max(self.main_loop["mma"], 1)


def parse_instructions(sass: str) -> list[Instruction]:
    """The instructions of ``cuobjdump -sass``, in order, without what only fills the space after the last."""
    matches = (_INSTRUCTION.search(line) for line in sass.splitlines())
    instructions = [Instruction(int(m["address"], 16), m["name"], m["operands"]) for m in matches if m]
    while instructions and _is_padding(instructions[-1]):
        instructions.pop()
    return instructions


def _is_padding(instruction: Instruction) -> bool:
    """Whether it fills the space after the code: NOP, or a branch to itself."""
    target = _TARGET.search(instruction.operands) if instruction.base == "BRA" else None
    return instruction.base == "NOP" or (target is not None and int(target[1], 16) == instruction.address)


def find_loops(instructions: list[Instruction]) -> list[tuple[int, int]]:
    """(first, last) positions of every loop: a branch back to an earlier instruction.

    What lies after the last EXIT are stretches that the body jumps out to, such as waits for a barrier; their way back
    into the body closes no loop.
    """
    position = {instruction.address: i for i, instruction in enumerate(instructions)}
    exits = [i for i, instruction in enumerate(instructions) if instruction.base == "EXIT"]
    end_of_body = exits[-1] if exits else len(instructions)
    loops = []
    for i, instruction in enumerate(instructions):
        target = _TARGET.search(instruction.operands) if instruction.base == "BRA" else None
        first = position.get(int(target[1], 16), i) if target else i
        if first < i and not first <= end_of_body < i:
            loops.append((first, i))
    return loops


def _main_loop_span(instructions: list[Instruction]) -> tuple[int, int]:
    """First position of the main loop and the position after its last; everything if there is no loop."""
    loops = find_loops(instructions)

    def count(kind: str, loop: tuple[int, int]) -> int:
        return sum(i.kind == kind for i in instructions[loop[0] : loop[1] + 1])

    for kind in ("mma", "popc"):  # the kernels' work, where they have any of it
        working = [loop for loop in loops if count(kind, loop)]
        if working:
            break
    else:
        kind, working = "", loops
    # A loop that only waits (for a barrier, say) may lie inside the one that works.
    innermost = [
        (first, last)
        for first, last in working
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in working)
    ]
    if not innermost:
        return 0, len(instructions)
    first, last = max(innermost, key=lambda loop: (count(kind, loop), loop[1] - loop[0]))
    return first, last + 1


def main_loop(instructions: list[Instruction]) -> list[Instruction]:
    """The instructions of the innermost loop that does the work; all of them if there is no loop."""
    first, end = _main_loop_span(instructions)
    return instructions[first:end]


def _usage(text: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", text)
    if found is None:
        raise ValueError(f"resource usage: no {name} in what cuobjdump printed: {text[:80]!r}")
    return int(found[1])


def report(compiled: Compiled) -> Report:
    """Resources and main loop of a compiled kernel."""
    return parse_report(compiled.arch, *disassemble(compiled), compiled.shared_bytes, compiled.num_warps)


def parse_report(arch: int, sass: str, usage: str, shared_bytes: int, num_warps: int) -> Report:
    """The same from what ``cuobjdump -sass`` and ``-res-usage`` print."""
    instructions = parse_instructions(sass)
    first, end = _main_loop_span(instructions)
    registers = _usage(usage, "REG")
    return Report(
        arch=arch,
        registers=registers,
        stack_bytes=_usage(usage, "STACK"),
        spill_instructions=sum(i.kind == "local" for i in instructions),
        shared_bytes=shared_bytes,
        num_warps=num_warps,
        blocks_per_sm=CHIPS[arch].blocks_resident(registers, shared_bytes, num_warps),
        loop=tuple(instructions[first:end]),
        outside=tuple(instructions[:first] + instructions[end:]),
    )
