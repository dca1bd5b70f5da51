from __future__ import annotations

from tetra.autotune.table import lookup

CONFIGS = ((128, 4), (64, 2))


def test_a_miss_gives_the_first_row() -> None:
    assert lookup("no_such_kernel", 80, "m1", CONFIGS) == CONFIGS[0]
    assert lookup("ternary_matmul", 12, "m1", CONFIGS) == CONFIGS[0]
