"""Limits of the GPUs that kernels are compiled for, by compute capability.

Source: NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities", table of technical specifications. Shared
memory a block is the opt-in maximum; one KiB of every block's share of a multiprocessor's shared memory is
taken by the system.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Chip:
    """What one multiprocessor (SM) and one block of it may hold.

    Attributes:
        arch: compute capability, 80 for sm_80.
        example: a product with it.
        shared_per_sm, shared_per_block: bytes of shared memory.
        threads_per_sm, blocks_per_sm: resident at once.
        registers_per_sm: 32-bit registers.
    """

    arch: int
    example: str
    shared_per_sm: int
    shared_per_block: int
    threads_per_sm: int
    blocks_per_sm: int
    registers_per_sm: int = 65536

    def blocks_resident(self, registers: int, shared_bytes: int, num_warps: int) -> int:
        """Blocks of a kernel that one multiprocessor holds at once; 0 if a block does not fit.

        Args:
            registers: a thread.
            shared_bytes: a block.
            num_warps: of 32 threads, a block.
        """
        if shared_bytes > self.shared_per_block or registers > 255:
            return 0
        threads = 32 * num_warps
        by_registers = self.registers_per_sm // (-(-max(registers, 1) // 8) * 8 * threads)
        by_shared = self.shared_per_sm // (shared_bytes + KIB)
        return min(self.blocks_per_sm, self.threads_per_sm // threads, by_registers, by_shared)


CHIPS = {
    chip.arch: chip
    for chip in (
        Chip(80, "A100", 164 * KIB, 163 * KIB, 2048, 32),
        Chip(86, "RTX 3090, A10", 100 * KIB, 99 * KIB, 1536, 16),
        Chip(87, "Jetson Orin", 164 * KIB, 163 * KIB, 1536, 16),
        Chip(89, "RTX 4090, L4", 100 * KIB, 99 * KIB, 1536, 24),
        Chip(90, "H100", 228 * KIB, 227 * KIB, 2048, 32),
        Chip(100, "B200", 228 * KIB, 227 * KIB, 2048, 32),
        Chip(120, "RTX 5090", 100 * KIB, 99 * KIB, 1536, 24),
    )
}
