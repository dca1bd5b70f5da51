"""What the compiler makes of the Hamming kernels, for GPUs that need not be here."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

pytest.importorskip("triton")

from tetra.autotune.hardware import CHIPS
from tetra.kernels import hamming_planes
from tetra.kernels.ahead_of_time import ARCHITECTURES, all_specimens, compile_for
from tetra.kernels.specimen import Specimen
from tetra.profiling.sass import Report, report

KINDS = ("distances", "topk", "topk of allowed")
POPCOUNT = {"BLOCK_Q": 8, "BLOCK_R": 256}
PLANES = {"BLOCK_Q": 128, "BLOCK_R": 128}


@cache
def _report(arch: int, name: str, index: int) -> Report:
    return report(compile_for(all_specimens(arch, name)[index], arch))


def compiled(arch: int, name: str, **wanted: Any) -> Report:
    """Of the first specimen with these values in its configuration; healthy."""
    listed = all_specimens(arch, name)
    index = next(i for i, found in enumerate(listed) if wanted.items() <= found.config.items())
    found = _report(arch, name, index)
    check_health(found, listed[index])
    return found


def check_health(found: Report, specimen: Specimen) -> None:
    where = f"{specimen.name} {specimen.config} sm_{found.arch}"
    assert found.spill_instructions == found.stack_bytes == 0, where
    assert found.shared_bytes <= CHIPS[found.arch].shared_per_block, where
    assert found.has_loop, where
    # The number of parts that rows are split into relies on it.
    assert found.blocks_per_sm >= specimen.config.get("blocks_per_sm", 1), where


def words_a_thread(arch: int, name: str, **wanted: Any) -> float:
    """Pairs of 32-bit words of an iteration of the main loop, for each thread of a block."""
    config = next(s.config for s in all_specimens(arch, name) if wanted.items() <= s.config.items())
    words = {"hamming_popcount": 4, "hamming_planes": 8}[name]
    return config["BLOCK_Q"] * config["BLOCK_R"] * words / (32 * config["num_warps"])


@pytest.mark.parametrize("arch", [80, 87, 90])
@pytest.mark.parametrize("kind", KINDS)
def test_a_word_is_one_popcount_and_under_two_integer_instructions(arch: int, kind: str) -> None:
    found = compiled(arch, "hamming_popcount", kernel=kind, **POPCOUNT)
    words = words_a_thread(arch, "hamming_popcount", kernel=kind, **POPCOUNT)
    assert found.main_loop["popc"] == words
    assert found.main_loop["alu"] <= 1.85 * words
    # Two loads of 16 bytes for two rows and one for each of eight queries; nothing goes through shared memory.
    assert found.main_loop["ldg"] == 10
    assert all(i.name.endswith(".128") for i in found.loop if i.kind == "ldg")
    assert found.main_loop.total() <= 3.2 * words


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("block_q", [1, 2, 4])
def test_blocks_for_few_queries(arch: int, block_q: int) -> None:
    wanted = {"kernel": "topk", "BLOCK_Q": block_q}
    found, words = (of(arch, "hamming_popcount", **wanted) for of in (compiled, words_a_thread))
    assert found.main_loop["popc"] == words
    assert found.main_loop["alu"] <= 2.1 * words
    assert all(i.name.endswith(".128") for i in found.loop if i.kind == "ldg")


@pytest.mark.parametrize(
    ("arch", "most", "kind"), [*((80, 0.47, kind) for kind in KINDS), (87, 0.47, "topk"), (90, 0.24, "topk")]
)
def test_a_word_is_half_an_instruction_on_tensor_cores(arch: int, most: float, kind: str) -> None:
    found = compiled(arch, "hamming_planes", kernel=kind, **PLANES)
    words = words_a_thread(arch, "hamming_planes", kernel=kind, **PLANES)
    assert found.main_loop.total() <= most * words
    if arch == 90:
        assert set(found.tensor_core) == {"IGMMA.64x128x32.S8.S8"}
    else:
        assert set(found.tensor_core) == {"IMMA.16832.S8.S8.SAT"}
        # Nine instructions unpack a register of four bytes to eight planes; the others are addresses.
        assert found.main_loop["alu"] <= 110
    # The rows' planes go from registers to the tensor cores.
    assert found.main_loop["sts"] == found.main_loop["cvt"] == 0


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("name", "wanted"), [("hamming_popcount", POPCOUNT), ("hamming_planes", PLANES)], ids=["popcount", "planes"]
)
def test_looking_for_the_nearest_adds_nothing_to_the_main_loop(arch: int, name: str, wanted: dict[str, int]) -> None:
    plain = compiled(arch, name, kernel="distances", **wanted).main_loop
    for kind in KINDS[1:]:
        found = compiled(arch, name, kernel=kind, **wanted).main_loop
        for work in ("popc", "mma", "ldg", "lds", "ldsm", "ldgsts", "sts", "stg", "shfl", "float", "local"):
            assert found[work] == plain[work], work
        # How addresses are held may differ by a few instructions.
        assert found.total() <= 1.05 * plain.total()


@pytest.mark.parametrize("arch", [86, 100, 120])
def test_other_chips(arch: int) -> None:
    planes = compiled(arch, "hamming_planes", kernel="topk", **PLANES)
    assert planes.main_loop.total() <= 0.47 * words_a_thread(arch, "hamming_planes", kernel="topk", **PLANES)
    assert set(planes.tensor_core) == {"IMMA.16832.S8.S8.SAT"}
    popcount = compiled(arch, "hamming_popcount", kernel="topk", **POPCOUNT)
    words = words_a_thread(arch, "hamming_popcount", kernel="topk", **POPCOUNT)
    assert popcount.main_loop["popc"] == words
    assert popcount.main_loop["alu"] <= 1.9 * words


def test_inline_assembly_earns_its_place() -> None:
    config = hamming_planes.CONFIGS[-1]
    with_asm, plain = (
        report(compile_for(hamming_planes.specimen(config, "distances", inline_asm=inline), 80))
        for inline in (True, False)
    )
    assert plain.alu_per_mma > 2 * with_asm.alu_per_mma


@pytest.mark.parametrize("name", ["hamming_popcount", "hamming_planes"])
def test_sizes_of_one_which_the_compiler_takes_as_constants(name: str) -> None:
    """One query, row, column, neighbour and tile a part."""
    for specimen in all_specimens(80, name)[-4:]:
        ones = {size: 1 for size in ("Q", "R", "C", "k", "tiles_a_part") if size in specimen.signature}
        compile_for(
            replace(
                specimen,
                signature={n: kind for n, kind in specimen.signature.items() if n not in ones},
                constants=specimen.constants | ones,
                unaligned=tuple(n for n in specimen.unaligned if n not in ones),
            ),
            80,
        )


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", ["hamming_popcount", "hamming_planes"])
def test_every_configuration_on_every_architecture(name: str, arch: int) -> None:
    for index, specimen in enumerate(all_specimens(arch, name)):
        found = _report(arch, name, index)
        check_health(found, specimen)
        config = specimen.config
        if name == "hamming_popcount" and "BLOCK_Q" in config:
            assert found.main_loop["popc"] == words_a_thread(arch, name, **config)
            assert found.main_loop["alu"] <= 2.2 * found.main_loop["popc"], config
        if name == "hamming_planes":
            most = {128: 0.5, 64: 0.6, 32: 0.9}[config["BLOCK_Q"]]
            assert found.main_loop.total() <= most * words_a_thread(arch, name, **config), config
