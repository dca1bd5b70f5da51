"""What is particular to Hamming distances on tensor cores; the answers are tested with those of the popcounts."""

from __future__ import annotations

import inspect
import re

import numpy as np
import pytest
import torch

from tetra.kernels import hamming_planes as source
from tetra.kernels.hamming_planes import (
    CONFIGS,
    MAX_BYTES,
    UNPACKED_ONE,
    configs_for,
    cost,
    default_config,
    launch_distances,
    query_planes,
)


def run_ptx(ptx: str, word: np.ndarray) -> np.ndarray:
    """$0 of the instructions that the unpacking uses, on 32-bit registers, of which $1 holds ``word``."""
    registers = {"$1": word.astype(np.uint32)}
    instructions = re.findall(r"(shr|and)\.b32 ([^;]+);", ptx)
    assert len(instructions) == ptx.count(".b32") - ptx.count(".reg")
    for operation, operands in instructions:
        target, name, number = operands.split(", ")
        value, constant = registers[name], np.uint32(int(number, 0))
        registers[target] = value >> constant if operation == "shr" else value & constant
    return registers["$0"]


def programs() -> list[str]:
    found = re.findall(r'_on_four_bytes\(packed, "([^"]*)"\)', inspect.getsource(source._unpack_plane.fn))
    assert len(found) == source.PLANES
    return found


def test_inline_assembly_on_every_byte_in_every_lane() -> None:
    every_byte = np.arange(256, dtype=np.uint32)
    for lane in range(4):
        for others in (0, 0xFFFFFFFF, 0xA5A5A5A5, 0x5A5A5A5A):
            words = (every_byte << np.uint32(8 * lane)) | np.uint32(others & ~(0xFF << 8 * lane))
            for plane, ptx in enumerate(programs()):
                byte = ((run_ptx(ptx, words) >> np.uint32(8 * lane)) & np.uint32(0xFF)).astype(np.uint8).view(np.int8)
                assert np.array_equal(byte, (np.arange(256) >> plane & 1) << min(plane, 6))


@pytest.mark.parametrize("n_bytes", [1, 16, 31, 32, 33, 100])
def test_planes_of_queries_are_weighted_signs(n_bytes: int) -> None:
    queries = torch.randint(0, 256, (5, n_bytes), dtype=torch.uint8)
    planes, ones = query_planes(queries, 4)
    assert (planes.dtype, planes.shape) == (torch.int8, (8, 256 * -(-n_bytes // 32)))
    assert ones.dtype == torch.int32
    assert ones.tolist() == [*np.unpackbits(queries.numpy(), axis=1).sum(1).tolist(), 0, 0, 0]
    for byte in range(32 * -(-n_bytes // 32)):
        for plane in range(8):
            column = planes[:5, byte // 32 * 256 + plane * 32 + byte % 32]
            if byte >= n_bytes:
                assert not column.any()
            else:
                set_ = (queries[:, byte] >> plane & 1).bool()
                weight = UNPACKED_ONE >> min(plane, 6)
                assert torch.equal(column, torch.where(set_, -weight, weight).to(torch.int8))


def test_planes_times_unpacked_rows_are_exact() -> None:
    """The arithmetic of the contract, in 64-bit integers, with the assembly's planes."""
    n_bytes = 37
    queries, codes = (torch.randint(0, 256, (n, n_bytes), dtype=torch.uint8) for n in (6, 9))
    planes, ones = query_planes(queries)
    rows = np.pad(codes.numpy(), ((0, 0), (0, 27))).reshape(9, 2, 32)
    unpacked = [run_ptx(ptx, rows.view(np.uint32)).view(np.int8).reshape(9, 2, 1, 32) for ptx in programs()]
    values = np.concatenate(unpacked, axis=2).reshape(9, -1).astype(np.int64)
    totals = planes.numpy().astype(np.int64) @ values.T
    assert not (totals % UNPACKED_ONE).any()
    true = (np.unpackbits(queries.numpy()[:, None] ^ codes.numpy()[None], axis=2)).sum(2)
    assert np.array_equal(totals // UNPACKED_ONE + ones.numpy()[:, None], true)


def test_the_bound_keeps_totals_in_32_bits() -> None:
    assert 8 * MAX_BYTES * UNPACKED_ONE < 2**31 <= 8 * (MAX_BYTES + 1) * UNPACKED_ONE
    queries = torch.zeros(1, MAX_BYTES + 1, dtype=torch.uint8)
    words = torch.zeros(-(-(MAX_BYTES + 1) // 16), 1, 4, dtype=torch.int32).expand(-1, 512, 4)
    with pytest.raises(ValueError, match=f"{MAX_BYTES + 1} bytes a code, wanted 1 to {MAX_BYTES}"):
        launch_distances(queries, words, 1)


@pytest.mark.parametrize("arch", [80, 86, 87, 89, 90, 100, 120])
def test_configurations_fit_the_queries_and_the_chip(arch: int) -> None:
    assert [default_config(arch, n)[0] for n in (1, 32, 33, 64, 65, 1000)] == [32, 32, 64, 64, 128, 128]
    assert {default_config(arch, n) for n in (1, 64, 1000)} <= set(configs_for(arch)) <= set(CONFIGS)


def test_cost_counts_both_operations_of_every_bit_of_a_group() -> None:
    assert cost(100, 1000, 192, 25) == (2 * 8 * 192 * 100 * 1000, 192 * (800 + 1000) + 8 * 100 * 25)
    assert cost(2, 3, 33) == (2 * 8 * 64 * 6, 64 * (16 + 3) + 4 * 6)
