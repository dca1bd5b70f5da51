"""Reading compiled code: on a listing written by hand, and on what the compiler makes of small kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from tetra.autotune.hardware import CHIPS
from tetra.profiling.sass import Instruction, find_loops, main_loop, mma_shape, parse_instructions

# Two nested loops; the inner one holds the products.
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                 /* 0x00000a0000017a02 */
        /*0010*/                   LDG.E R2, [R4.64] ;                    /* 0x0000000404027981 */
        /*0020*/                   LOP3.LUT R8, R2, 0xc0, RZ, 0xc0, !PT ; /* 0x000000c002087812 */
        /*0030*/                   IMMA.16832.S8.S8.SAT R12, R8.ROW, R20.COL, R12 ; /* 0x000000140c0c7237 */
        /*0040*/              @!P0 IMMA.16832.S8.S8.SAT R16, R8.ROW, R22.COL, R16 ; /* 0x0000001608107237 */
        /*0050*/               @P1 BRA 0x20 ;                             /* 0xffffffc000001947 */
        /*0060*/                   STL [R1], R12 ;                        /* 0x0000000c01007387 */
        /*0070*/               @P2 BRA 0x10 ;                             /* 0xffffff9000002947 */
        /*0080*/                   EXIT ;                                 /* 0x000000000000794d */
        /*0090*/                   BRA 0x90;                              /* 0xfffffff000007947 */
        /*00a0*/                   NOP;                                   /* 0x0000000000007918 */
"""


def test_instructions_loops_and_kinds() -> None:
    instructions = parse_instructions(LISTING)
    assert [i.kind for i in instructions] == [
        "alu", "ldg", "alu", "mma", "mma", "control", "local", "control", "control",
    ]  # fmt: skip
    assert find_loops(instructions) == [(2, 5), (1, 7)]
    assert [i.address for i in main_loop(instructions)] == [0x20, 0x30, 0x40, 0x50]


def test_code_without_a_loop_is_taken_whole() -> None:
    instructions = parse_instructions(LISTING)[:3]
    assert main_loop(instructions) == instructions


def test_a_loop_that_waits_inside_the_working_one_is_not_the_main_loop() -> None:
    lines = [line for line in LISTING.splitlines() if line]
    wait = "        /*0048*/               @P3 BRA 0x40 ; /* 0x0 */"  # the second product alone, again and again
    lines[4] = lines[4].replace("IMMA.16832.S8.S8.SAT", "SYNCS.PHASECHK")
    instructions = parse_instructions("\n".join([*lines[:5], wait, *lines[5:]]))
    assert [i.address for i in main_loop(instructions)] == [0x20, 0x30, 0x40, 0x48, 0x50]


def test_the_way_back_from_code_after_the_end_is_no_loop() -> None:
    # A wait for a barrier, out of the way: the body jumps there, and it jumps back to just after.
    away = """
        /*0090*/                   SYNCS.PHASECHK P0, [UR4] ;
        /*00a0*/              @!P0 BRA 0x90 ;
        /*00b0*/                   BRA 0x20 ;
    """
    body = LISTING[: LISTING.index("        /*0090*/")]
    instructions = parse_instructions(body + away)
    assert find_loops(instructions) == [(2, 5), (1, 7), (9, 10)]
    assert [i.address for i in main_loop(instructions)] == [0x20, 0x30, 0x40, 0x50]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("IMMA.16832.S8.S8.SAT", "mma"), ("HMMA.16816.F32", "mma"), ("IGMMA.64x128x32.S8.S8", "mma"),
        ("UTCHMMA", "mma"), ("LDSM.16.M88.4", "ldsm"), ("STSM.16.M88.4", "sts"), ("LDGSTS.E.BYPASS.128", "ldgsts"),
        ("SHFL.BFLY", "shfl"), ("POPC", "popc"), ("UPOPC", "popc"), ("MUFU.EX2", "cvt"), ("I2FP.F32.S32", "cvt"),
        ("ULOP3.LUT", "ualu"), ("UIADD3", "ualu"), ("R2UR", "control"), ("FFMA.FTZ", "float"), ("HADD2.F32", "float"),
        ("PRMT", "alu"), ("IMAD.MOV.U32", "alu"), ("STL.64", "local"), ("RED.E.ADD.F32.FTZ", "atomic"),
    ],
)  # fmt: skip
def test_kinds(name: str, kind: str) -> None:
    assert Instruction(0, name, "").kind == kind


@pytest.mark.parametrize(
    ("name", "n_bytes"),
    [
        ("LDG.E.128", 512), ("LDG.E", 128), ("LDG.E.U8.CONSTANT", 32), ("STG.E.U16", 64), ("LDSM.16.M88.4", 512),
        ("LDSM.16.MT88.2", 256), ("LDGSTS.E.BYPASS.LTC128B.128", 512), ("LDS.U.64", 256), ("STS", 128),
        ("STSM.16.M88.4", 512), ("LDG.E.ENL2.256", 1024),
    ],
)  # fmt: skip
def test_bytes_of_an_access(name: str, n_bytes: int) -> None:
    assert Instruction(0, name, "").access_bytes == n_bytes


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("IMMA.16832.S8.S8.SAT", (16, 8, 32)), ("HMMA.16816.F32.BF16", (16, 8, 16)), ("HMMA.1688.F32", (16, 8, 8)),
        ("IGMMA.64x128x32.S8.S8", (64, 128, 32)), ("HGMMA.64x64x16.F32", (64, 64, 16)), ("UTCHMMA", None),
    ],
)  # fmt: skip
def test_sizes_of_products(name: str, shape: tuple[int, int, int] | None) -> None:
    assert mma_shape(name) == shape


@cache
def compiled_report(arch: int, kernel: str):  # type: ignore[no-untyped-def]
    pytest.importorskip("triton")
    from tetra.kernels.ahead_of_time import all_specimens, compile_for
    from tetra.profiling.sass import report

    return report(compile_for(all_specimens(arch, kernel)[0], arch))


def test_report_of_a_compiled_row_kernel() -> None:
    found = compiled_report(80, "row_quantize")
    assert 0 < found.registers <= 255
    assert found.spill_instructions == found.stack_bytes == 0
    assert found.blocks_per_sm == CHIPS[80].blocks_resident(found.registers, found.shared_bytes, found.num_warps)
    assert not found.has_loop
    assert not found.tensor_core
    # What it says of memory: a row of 768 fp16 is read once, 16 bytes a thread, and 768 bytes are written.
    loads = [i for i in found.loop if i.kind == "ldg"]
    assert sum(i.access_bytes for i in loads) == 2 * 768
    assert {i.access_bytes for i in loads} == {512}


def test_report_of_a_compiled_product() -> None:
    found = compiled_report(80, "ternary_matmul")
    assert found.has_loop
    assert found.tensor_core
    assert all(name.startswith("IMMA.16832.S8.S8") for name in found.tensor_core)
    loop = found.main_loop
    assert loop.total() == len(found.loop) < len(found.loop) + len(found.outside)
    assert found.alu_per_mma == loop["alu"] / loop["mma"]
    assert found.all_per_mma == loop.total() / loop["mma"] > 1
    spilling = replace(found, loop=(*found.loop, Instruction(0, "LDL", "R1, [R2]")))
    assert spilling.main_loop["local"] == 1
