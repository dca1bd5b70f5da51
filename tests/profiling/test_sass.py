from __future__ import annotations

from tetra.profiling.sass import find_loops, main_loop, parse_instructions

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
"""


def test_instructions_loops_and_kinds() -> None:
    instructions = parse_instructions(LISTING)
    assert [i.kind for i in instructions] == [
        "alu", "global", "alu", "mma", "mma", "control", "local", "control", "control",
    ]  # fmt: skip
    assert find_loops(instructions) == [(2, 5), (1, 7)]
    assert [i.address for i in main_loop(instructions)] == [0x20, 0x30, 0x40, 0x50]


def test_code_without_a_loop_is_taken_whole() -> None:
    instructions = parse_instructions(LISTING)[:3]
    assert main_loop(instructions) == instructions
