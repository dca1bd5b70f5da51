"""What GPUs can hold and can do: limits by compute capability, peak rates by product.

Sources
    Limits, and instructions a clock: NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities" and "Throughput of
    Native Arithmetic Instructions". Shared memory a block is the opt-in maximum; one KiB of every block's share of
    a multiprocessor's shared memory is taken by the system.
    Peaks: NVIDIA's data sheets and architecture papers, named beside every product; dense figures, without
    sparsity, at the boost clock. fp16 products accumulate in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True)
class Chip:
    """What one multiprocessor (SM) and one block of it may hold, and how many instructions it starts.

    Attributes:
        arch: compute capability, 80 for sm_80.
        example: products with it.
        shared_per_sm, shared_per_block: bytes of shared memory.
        threads_per_sm, blocks_per_sm: resident at once.
        float_per_clock: float32 operations of an SM a clock.
        registers_per_sm: 32-bit registers.
        alu_per_clock, special_per_clock: the same for integer operations, and for conversions, exponentials and
            popcounts.
        shared_bytes_per_clock, l2_bytes_per_clock: of an SM. The second is the width of its port, an assumption
            for chips whose papers do not give it.
        issue_per_clock: warp instructions of an SM a clock, one from each of its four schedulers.
    """

    arch: int
    example: str
    shared_per_sm: int
    shared_per_block: int
    threads_per_sm: int
    blocks_per_sm: int
    float_per_clock: int = 128
    registers_per_sm: int = 65536
    alu_per_clock: int = 64
    special_per_clock: int = 16
    shared_bytes_per_clock: int = 128
    l2_bytes_per_clock: int = 64
    issue_per_clock: int = 4

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
        Chip(80, "A100", 164 * KIB, 163 * KIB, 2048, 32, float_per_clock=64),
        Chip(86, "RTX 3090, A10", 100 * KIB, 99 * KIB, 1536, 16),
        Chip(87, "Jetson Orin", 164 * KIB, 163 * KIB, 1536, 16),
        Chip(89, "RTX 4090, L4", 100 * KIB, 99 * KIB, 1536, 24),
        Chip(90, "H100", 228 * KIB, 227 * KIB, 2048, 32),
        Chip(100, "B200", 228 * KIB, 227 * KIB, 2048, 32),
        Chip(120, "RTX 5090", 100 * KIB, 99 * KIB, 1536, 24),
    )
}


@dataclass(frozen=True)
class Product:
    """Peak rates of a GPU as its maker states them; nothing here was measured.

    Attributes:
        name: as in lists and tables.
        arch: compute capability, 80 for sm_80.
        n_sms: multiprocessors.
        clock_ghz: boost.
        int8_tops, fp16_tflops: of the tensor cores, dense, in 1e12 operations (two a multiply-add) a second.
        dram_gb_per_s: memory bandwidth, in 1e9 bytes a second.
        l2_bytes: last-level cache.
        source: of these figures.
    """

    name: str
    arch: int
    n_sms: int
    clock_ghz: float
    int8_tops: float
    fp16_tflops: float
    dram_gb_per_s: float
    l2_bytes: int
    source: str

    @property
    def chip(self) -> Chip:
        """Limits of one of its multiprocessors."""
        return CHIPS[self.arch]

    def macs_per_clock(self, dtype: str) -> float:
        """Multiply-adds of one multiprocessor's tensor cores a clock; ``dtype`` is int8, fp16 (also bf16) or tf32."""
        tera = {"int8": self.int8_tops, "fp16": self.fp16_tflops, "tf32": self.fp16_tflops / 2}[dtype]
        return tera * 1e12 / 2 / (self.n_sms * self.clock_ghz * 1e9)


# The first product of an architecture stands for it in reports.
PRODUCTS = {
    product.name: product
    for product in (
        Product("A100 SXM 80GB", 80, 108, 1.410, 624, 312, 2039, 40 * MIB, "A100 80GB data sheet (2021)"),
        Product("RTX 3090", 86, 82, 1.695, 284, 71, 936, 6 * MIB, "Ampere GA102 architecture paper (2021), table 2"),
        Product(
            *("Jetson AGX Orin 64GB", 87, 16, 1.300, 85, 42.6, 204.8, 4 * MIB),
            "Jetson AGX Orin series technical brief (2022): 170 sparse int8 TOPS of the GPU, halved",
        ),
        Product("RTX 4090", 89, 128, 2.520, 660.6, 165.2, 1008, 72 * MIB, "Ada GPU architecture paper (2022), table 2"),
        Product("H100 SXM", 90, 132, 1.830, 1979, 989.4, 3350, 50 * MIB, "H100 data sheet (2023), without sparsity"),
        Product(
            "B200",
            100,
            148,
            1.850,
            4500,
            2250,
            8000,
            126 * MIB,
            "HGX B200 data sheet (2024), one of eight GPUs; for tcgen05, older products are slower",
        ),
        Product("RTX 5090", 120, 170, 2.407, 838, 209.5, 1792, 96 * MIB, "RTX Blackwell architecture paper (2025)"),
    )
}


def product_of(arch: int) -> Product:
    """The product that stands for compute capability ``arch`` (80 means sm_80). KeyError for an unknown one."""
    return next(product for product in PRODUCTS.values() if product.arch == arch)


def find_product(name: str) -> Product:
    """The product whose name contains ``name``, in any case: "h100" finds H100 SXM.

    Raises:
        ValueError: none or more than one does; lists the known ones.
    """
    found = [product for known, product in PRODUCTS.items() if name.strip().lower() in known.lower()]
    if len(found) != 1 or not name.strip():
        raise ValueError(f"gpu: {name!r} is not one GPU that is known; wanted one of {', '.join(PRODUCTS)}")
    return found[0]
