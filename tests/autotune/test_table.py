from __future__ import annotations

from tetra.autotune.hardware import CHIPS, KIB
from tetra.autotune.table import lookup

CONFIGS = ((128, 4), (64, 2))


def test_a_miss_gives_the_first_row() -> None:
    assert lookup("no_such_kernel", 80, "m1", CONFIGS) == CONFIGS[0]
    assert lookup("ternary_matmul", 12, "m1", CONFIGS) == CONFIGS[0]


def test_resident_blocks_follow_the_scarcest_resource() -> None:
    a100 = CHIPS[80]
    assert a100.blocks_resident(registers=32, shared_bytes=0, num_warps=4) == 16  # threads
    assert a100.blocks_resident(registers=255, shared_bytes=0, num_warps=4) == 2  # registers
    assert a100.blocks_resident(registers=32, shared_bytes=40 * KIB, num_warps=4) == 4  # shared memory
    assert a100.blocks_resident(registers=32, shared_bytes=0, num_warps=1) == 32  # blocks
    assert a100.blocks_resident(registers=32, shared_bytes=164 * KIB, num_warps=4) == 0
