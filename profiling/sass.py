"""Reads what ``cuobjdump`` prints about a compiled kernel: resources, and the instructions of its main loop.

The main loop is the innermost loop with the most tensor-core instructions (or, for kernels without any, the
most instructions). Counts are of static instructions: they say how much work an iteration is, not how long it
takes.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

from tetra.autotune.hardware import CHIPS
from tetra.kernels.ahead_of_time import Compiled, disassemble

_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<operands>[^;]*);"
)
_TARGET = re.compile(r"0x([0-9a-f]+)")

# Tensor-core products: mma (sm_80 and on), wgmma (sm_90) and tcgen05 (sm_100).
_TENSOR_CORE = re.compile(r"^([IHBQOD]MMA|[IHQ]GMMA|UTC\w*MMA)\b")
_KINDS = {
    "local": "LDL STL",
    "shared": "LDS STS LDSM STSM LDGSTS LDTM STTM",
    "global": "LDG LD STG ST UTMALDG UTMASTG",
    "convert": "MUFU I2F F2I F2F I2I I2FP F2IP F2FP",
    "popcount": "POPC UPOPC",
    "control": (
        "ARRIVES BAR BRA BSSY BSYNC CALL CCTL CS2R DEPBAR ELECT ERRBAR EXIT FENCE LDC LDCU LDGDEPBAR MEMBAR "
        "NANOSLEEP NOP R2UR RET S2R S2UR SHFL SYNCS ULDC UTCBAR VOTE VOTEU WARPGROUP WARPGROUPDEPBAR "
        "WARPSYNC YIELD"
    ),
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction."""

    address: int
    name: str  # with its modifiers, such as IMMA.16832.S8.S8
    operands: str

    @property
    def kind(self) -> str:
        """mma, local, shared, global, convert, popcount, control, uniform, float or alu."""
        if _TENSOR_CORE.match(self.name):
            return "mma"
        base = self.name.split(".")[0]
        if base in _KIND_OF:
            return _KIND_OF[base]
        if base.startswith("U"):
            return "uniform"
        return "float" if base.startswith(("F", "H")) else "alu"


@dataclass(frozen=True)
class Report:
    """What one compiled kernel takes.

    Attributes:
        registers: a thread.
        stack_bytes, spill_instructions: of local memory; both 0 in a healthy kernel.
        shared_bytes: a block.
        blocks_per_sm: how many blocks one multiprocessor of this architecture holds at once.
        main_loop: instructions of the main loop by kind.
        tensor_core: names of its tensor-core instructions.
    """

    arch: int
    registers: int
    stack_bytes: int
    spill_instructions: int
    shared_bytes: int
    blocks_per_sm: int
    main_loop: Counter[str] = field(repr=False)
    tensor_core: Counter[str] = field(repr=False)

    @property
    def alu_per_mma(self) -> float:
        """Integer instructions of the main loop for each tensor-core instruction."""
        return self.main_loop["alu"] / max(self.main_loop["mma"], 1)

    @property
    def all_per_mma(self) -> float:
        """All instructions of the main loop for each tensor-core instruction."""
        return self.main_loop.total() / max(self.main_loop["mma"], 1)


def parse_instructions(sass: str) -> list[Instruction]:
    """The instructions of ``cuobjdump -sass``, in order."""
    matches = (_INSTRUCTION.search(line) for line in sass.splitlines())
    return [Instruction(int(m["address"], 16), m["name"], m["operands"]) for m in matches if m]


def find_loops(instructions: list[Instruction]) -> list[tuple[int, int]]:
    """(first, last) positions of every loop: a branch back to an earlier instruction."""
    position = {instruction.address: i for i, instruction in enumerate(instructions)}
    loops = []
    for i, instruction in enumerate(instructions):
        target = _TARGET.search(instruction.operands) if instruction.name.startswith("BRA") else None
        if target and int(target[1], 16) < instruction.address and int(target[1], 16) in position:
            loops.append((position[int(target[1], 16)], i))
    return loops


def main_loop(instructions: list[Instruction]) -> list[Instruction]:
    """The instructions of the innermost loop that does the work; all of them if there is no loop."""
    loops = find_loops(instructions)
    innermost = [
        (first, last)
        for first, last in loops
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b in loops)
    ]

    def work(loop: tuple[int, int]) -> tuple[int, int]:
        body = instructions[loop[0] : loop[1] + 1]
        return sum(i.kind == "mma" for i in body), len(body)

    if not innermost:
        return instructions
    first, last = max(innermost, key=work)
    return instructions[first : last + 1]


def _usage(text: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", text)
    if found is None:
        raise ValueError(f"resource usage: no {name} in what cuobjdump printed: {text[:80]!r}")
    return int(found[1])


def report(compiled: Compiled) -> Report:
    """Resources and main loop of a compiled kernel."""
    sass, usage = disassemble(compiled)
    instructions = parse_instructions(sass)
    loop = main_loop(instructions)
    registers = _usage(usage, "REG")
    return Report(
        arch=compiled.arch,
        registers=registers,
        stack_bytes=_usage(usage, "STACK"),
        spill_instructions=sum(i.kind == "local" for i in instructions),
        shared_bytes=compiled.shared_bytes,
        blocks_per_sm=CHIPS[compiled.arch].blocks_resident(registers, compiled.shared_bytes, compiled.num_warps),
        main_loop=Counter(i.kind for i in loop),
        tensor_core=Counter(i.name for i in loop if i.kind == "mma"),
    )
