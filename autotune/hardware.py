"""What GPUs can hold and can do: limits by compute capability, peak rates by product; and which one a device is.

:func:`detect` reads a device's properties and finds the product they belong to, or makes a careful entry of what it
read. A name never decides.

Sources
    Limits, and instructions a clock: NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities" and "Throughput of
    Native Arithmetic Instructions". Shared memory a block is the opt-in maximum; one KiB of every block's share of
    a multiprocessor's shared memory is taken by the system.
    Peaks: NVIDIA's data sheets and architecture papers, named beside every product; dense figures, without
    sparsity, at the boost clock. fp16 products accumulate in float32.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

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
        alu_per_clock, special_per_clock, popc_per_clock: the same for integer operations, for conversions and
            exponentials (MUFU), and for popcounts (POPC).
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
    popc_per_clock: int = 16
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
        clock_ghz: boost, of the tensor cores where they have one of their own.
        int8_tops, fp16_tflops: of the tensor cores, dense, in 1e12 operations (two a multiply-add) a second.
        dram_gb_per_s: memory bandwidth, in 1e9 bytes a second.
        l2_bytes: last-level cache.
        source: of these figures.
        memory_gb: memory, in 1e9 bytes; 0 where it is not known.
        called: the words of it in the names that devices have.
        limits: of a multiprocessor, where the architecture is not one of ``CHIPS``.
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
    memory_gb: float = 0.0
    called: str = ""
    limits: Chip | None = None

    @property
    def chip(self) -> Chip:
        """Limits of one of its multiprocessors."""
        return self.limits or CHIPS[self.arch]

    def macs_per_clock(self, dtype: str) -> float:
        """Multiply-adds of one multiprocessor's tensor cores a clock; ``dtype`` is int8, fp16 (also bf16) or tf32."""
        tera = {"int8": self.int8_tops, "fp16": self.fp16_tflops, "tf32": self.fp16_tflops / 2}[dtype]
        return tera * 1e12 / 2 / (self.n_sms * self.clock_ghz * 1e9)


def _orin(
    name: str, n_sms: int, clock_ghz: float, dram_gb_per_s: float, l2: int, memory_gb: int, source: str
) -> Product:
    """Dense peaks of an Orin: 2048 int8 multiply-adds of an SM a clock, as the AGX Orin's data sheet has it."""
    int8_tops = 2 * 2048 * n_sms * clock_ghz / 1e3
    figures = (n_sms, clock_ghz, int8_tops, int8_tops / 2, dram_gb_per_s, l2 * MIB, source, memory_gb)
    return Product(name, 87, *figures, called="Orin")


_HOPPER = "H100 architecture paper (2022), table 3, and data sheet (2023), without sparsity"
_POWER_MODES = "Jetson Linux Developer Guide, power modes of Jetson AGX Orin (SMs, GPU and memory clock)"
_AMPERE = "A100 data sheet (2021)"

# The first product of an architecture stands for it in reports, and for predictions that are shipped.
PRODUCTS = {
    product.name: product
    for product in (
        Product("A100 SXM 80GB", 80, 108, 1.410, 624, 312, 2039, 40 * MIB, "A100 80GB data sheet (2021)", 80, "A100"),
        Product("A100 PCIe 80GB", 80, 108, 1.410, 624, 312, 1935, 40 * MIB, _AMPERE, 80, "A100"),
        Product("A100 40GB", 80, 108, 1.410, 624, 312, 1555, 40 * MIB, _AMPERE, 40, "A100"),
        Product(
            *("RTX 3090", 86, 82, 1.695, 284, 71, 936, 6 * MIB, "Ampere GA102 architecture paper (2021), table 2"),
            *(24, "RTX 3090"),
        ),
        Product(
            *("Jetson AGX Orin 64GB", 87, 16, 1.300, 85, 42.6, 204.8, 4 * MIB),
            "Jetson AGX Orin series technical brief (2022): 170 sparse int8 TOPS of the GPU, halved; mode MAXN",
            *(64, "Orin"),
        ),
        _orin("Jetson AGX Orin 64GB 50W", 16, 0.816, 204.8, 4, 64, _POWER_MODES),
        _orin("Jetson AGX Orin 64GB 30W", 8, 0.612, 204.8, 4, 64, _POWER_MODES),
        _orin("Jetson AGX Orin 64GB 15W", 6, 0.408, 136.5, 4, 64, _POWER_MODES),
        _orin("Jetson Orin NX 16GB", 8, 0.918, 102.4, 2, 16, "Jetson Orin NX series data sheet (2023); L2 assumed"),
        _orin("Jetson Orin Nano 8GB", 8, 0.625, 68.3, 2, 8, "Jetson Orin Nano series data sheet (2023); L2 assumed"),
        Product(
            *("RTX 4090", 89, 128, 2.520, 660.6, 165.2, 1008, 72 * MIB, "Ada GPU architecture paper (2022), table 2"),
            *(24, "RTX 4090"),
        ),
        Product(
            *("L4", 89, 58, 2.040, 242.5, 121, 300, 48 * MIB, "L4 data sheet (2023), without sparsity"),
            *(24, "L4"),
        ),
        Product(
            *("H100 SXM", 90, 132, 1.830, 1979, 989.4, 3350, 50 * MIB, "H100 data sheet (2023), without sparsity"),
            *(80, "H100"),
        ),
        Product("H100 PCIe", 90, 114, 1.620, 1513, 756.5, 2039, 50 * MIB, _HOPPER, 80, "H100"),
        Product(
            *("H200", 90, 132, 1.830, 1979, 989.4, 4800, 60 * MIB),
            "H200 data sheet (2024), without sparsity; the clock is the H100's, L2 as the driver reports it",
            *(141, "H200"),
        ),
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
            180,
            "B200",
        ),
        Product(
            *("RTX 5090", 120, 170, 2.407, 838, 209.5, 1792, 96 * MIB, "RTX Blackwell architecture paper (2025)"),
            *(32, "RTX 5090"),
        ),
    )
}


def product_of(arch: int) -> Product:
    """The product that stands for compute capability ``arch`` (80 means sm_80). KeyError for an unknown one."""
    for product in PRODUCTS.values():
        if product.arch == arch:
            return product
    raise KeyError(f"no product of sm_{arch} is known")


def find_product(name: str) -> Product:
    """The product whose name contains ``name``, in any case: "h200" finds H200.

    Of several of one architecture the first: "h100" finds H100 SXM, "orin" the Jetson AGX Orin at full power.

    Raises:
        ValueError: none does, or products of several architectures do; lists the known ones.
    """
    text = name.strip().lower()
    exact = [product for known, product in PRODUCTS.items() if known.lower() == text]
    found = exact or [product for known, product in PRODUCTS.items() if text and text in known.lower()]
    if len({product.arch for product in found}) != 1:
        raise ValueError(f"gpu: {name!r} is not one GPU that is known; wanted one of {', '.join(PRODUCTS)}")
    return found[0]


# --- the GPU that is there -----------------------------------------------------------------------------------

# How far what a device says may be from a product's figures (as a logarithm of their ratio), so as to be that product.
# Boards differ in clocks by some percent, drivers keep some memory for themselves.
_NEAR = {"clock_ghz": 0.15, "dram_gb_per_s": 0.12, "memory_gb": 0.2}


@dataclass(frozen=True)
class Reading:
    """What a device says of itself; 0 where it does not."""

    name: str
    arch: int
    n_sms: int
    clock_ghz: float
    dram_gb_per_s: float
    l2_bytes: int
    memory_gb: float
    shared_per_sm: int
    shared_per_block: int
    threads_per_sm: int
    registers_per_sm: int


def _read(properties: Any) -> Reading:
    """From what ``torch.cuda.get_device_properties`` gives; versions of PyTorch differ in what that has."""

    def number(*names: str) -> int:
        return next((int(n) for n in (getattr(properties, name, 0) for name in names) if n and n > 0), 0)

    bus_bytes = number("memory_bus_width") / 8
    integrated = bool(number("is_integrated"))  # which report no memory clock, or another one
    return Reading(
        name=str(getattr(properties, "name", "")),
        arch=10 * int(properties.major) + int(properties.minor),
        n_sms=int(properties.multi_processor_count),
        clock_ghz=number("clock_rate") / 1e6,
        dram_gb_per_s=0.0 if integrated else 2 * number("memory_clock_rate") * 1e3 * bus_bytes / 1e9,
        l2_bytes=number("L2_cache_size", "l2_cache_size"),
        memory_gb=number("total_memory") / 1e9,
        shared_per_sm=number("shared_memory_per_multiprocessor"),
        shared_per_block=number("shared_memory_per_block_optin"),
        threads_per_sm=number("max_threads_per_multi_processor"),
        registers_per_sm=number("regs_per_multiprocessor"),
    )


def detect(device: torch.device | str | None = None, properties: Any | None = None) -> tuple[Product, list[str]]:
    """The product that a CUDA device is, by its properties, and notices for the user.

    Compute capability and multiprocessors have to be the product's; clock, memory bandwidth and memory near its, as far
    as the device tells them. Where none is, the product is made of what was read and, for what can't be read, of the
    least that a GPU of this architecture has; a notice says so. The name is compared at the end: a notice says where it
    claims something else.

    Args:
        device: by default the current CUDA device.
        properties: of the device, as ``torch.cuda.get_device_properties`` gives them; asked for unless given.

    Raises:
        ValueError: there is no such CUDA device, it is not NVIDIA's, or the compiled kernels do not run on it.
    """
    if properties is None:
        properties = _properties_of(device)
    from tetra.kernels.backend import check_arch

    reading = _read(properties)
    check_arch(reading.arch)
    fitting = [(distance, product) for product in PRODUCTS.values() if (distance := _distance(reading, product)) < 1]
    if fitting:
        product = min(fitting, key=lambda pair: pair[0])[1]
        return product, _contradictions(reading, product)
    return _unlisted(reading)


def _properties_of(device: torch.device | str | None) -> Any:
    import torch

    chosen = torch.device("cuda" if device is None else device)
    if chosen.type != "cuda" or torch.version.hip is not None:
        raise ValueError(f"device: {chosen} is not a GPU of NVIDIA's; name one such as cuda:0")
    if not torch.cuda.is_available():
        raise ValueError(f"device: {chosen} is not there, PyTorch finds no CUDA device")
    n_devices = torch.cuda.device_count()
    if chosen.index is not None and chosen.index >= n_devices:
        raise ValueError(f"device: {chosen} is not there; this machine has {n_devices}, from cuda:0 on")
    return torch.cuda.get_device_properties(chosen)


def _distance(reading: Reading, product: Product) -> float:
    """How far a device is from a product, 1 and more for what it is not."""
    if (reading.arch, reading.n_sms) != (product.arch, product.n_sms):
        return 1.0
    shares = [
        abs(math.log(getattr(reading, name) / getattr(product, name))) / near
        for name, near in _NEAR.items()
        if getattr(reading, name) and getattr(product, name)
    ]
    # The mean, so that products which agree in all are told apart; but no single figure may be off.
    return 1.0 if max(shares, default=0.0) >= 1 else sum(shares) / max(len(shares), 1)


def _claims(name: str) -> list[Product]:
    """Products whose words a device's name holds."""
    return [
        product
        for product in PRODUCTS.values()
        if re.search(rf"(?<![\w]){re.escape(product.called)}(?![\w])", name, re.IGNORECASE)
    ]


def _contradictions(reading: Reading, product: Product) -> list[str]:
    claimed = _claims(reading.name)
    if not claimed or product.called in {other.called for other in claimed}:
        return []
    return [
        f"the GPU calls itself {reading.name!r}, but has the multiprocessors, clock and memory of {product.name}; "
        f"taken to be that"
    ]


def _unlisted(reading: Reading) -> tuple[Product, list[str]]:
    """A careful entry for a GPU that is not in the table."""
    alike = _most_alike(reading.arch)
    n_sms = reading.n_sms
    clock_ghz = reading.clock_ghz or min(product.clock_ghz for product in alike)
    rates = {
        dtype: min(product.macs_per_clock(dtype) for product in alike) * 2 * n_sms * clock_ghz / 1e3
        for dtype in ("int8", "fp16")
    }
    bandwidth = reading.dram_gb_per_s or n_sms * min(product.dram_gb_per_s / product.n_sms for product in alike)
    product = Product(
        f"{reading.name or 'GPU'} (sm_{reading.arch}, not listed)",
        *(reading.arch, n_sms, clock_ghz, rates["int8"], rates["fp16"], bandwidth),
        reading.l2_bytes or min(product.l2_bytes for product in alike),
        "read from the device; what it does not tell, the least that GPUs of the architecture have",
        reading.memory_gb,
        limits=_limits(reading, alike),
    )
    if reading.arch in CHIPS:
        known = ", ".join(product.name for product in alike)
        unknown = f"not one that is known of sm_{reading.arch} ({known})"
    else:
        unknown = f"of an architecture that is not known, sm_{reading.arch}"
    notices = [
        f"{reading.name or 'the GPU'} with {n_sms} multiprocessors at {clock_ghz:.2f} GHz is {unknown}; what it does "
        f"not tell of itself is assumed to be the least that such GPUs have"
    ]
    for claimed in _claims(reading.name)[:1]:
        notices.append(
            f"the GPU calls itself {reading.name!r}, but its properties are not those of {claimed.name}, which has "
            f"{claimed.n_sms} multiprocessors (sm_{claimed.arch}) at {claimed.clock_ghz:.2f} GHz and "
            f"{claimed.dram_gb_per_s:g} GB/s"
        )
    return product, notices


def _most_alike(arch: int) -> list[Product]:
    """Products of the architecture; of its generation; else all of them."""
    products = list(PRODUCTS.values())
    same = [product for product in products if product.arch == arch]
    generation = [product for product in products if product.arch // 10 == arch // 10]
    return same or generation or products


def _limits(reading: Reading, alike: Iterable[Product]) -> Chip:
    """Limits of a multiprocessor: what the device says, and the least of similar chips for the rest."""
    chips = [CHIPS[reading.arch]] if reading.arch in CHIPS else [product.chip for product in alike]
    least = {
        name: min(getattr(chip, name) for chip in chips)
        for name in Chip.__dataclass_fields__
        if name not in ("arch", "example")
    }
    shared_per_block = reading.shared_per_block or least["shared_per_block"]
    return replace(
        chips[0],
        **least
        | {
            "arch": reading.arch,
            "example": reading.name,
            "shared_per_block": shared_per_block,
            "shared_per_sm": reading.shared_per_sm or max(least["shared_per_sm"], shared_per_block + KIB),
            "threads_per_sm": reading.threads_per_sm or least["threads_per_sm"],
            "registers_per_sm": reading.registers_per_sm or least["registers_per_sm"],
        },
    )


def to_markdown() -> str:
    """The table of products and of architectures, as in docs/static-tuning.md."""
    lines = [
        "| product | sm | SMs | GHz | int8 TOPS | fp16 TFLOPS | GB/s | L2 MiB | memory GB | source |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for p in PRODUCTS.values():
        peaks = f"{p.int8_tops:.4g} | {p.fp16_tflops:.4g} | {p.dram_gb_per_s:g} | {p.l2_bytes // MIB}"
        lines.append(f"| {p.name} | {p.arch} | {p.n_sms} | {p.clock_ghz:g} | {peaks} | {p.memory_gb:g} | {p.source} |")
    lines += [
        "",
        "| sm | shared KiB (SM, block) | registers | threads, blocks | float, integer | MUFU, POPC | shared, L2 B |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for c in CHIPS.values():
        held = f"{c.shared_per_sm // KIB}, {c.shared_per_block // KIB} | {c.registers_per_sm}"
        rates = f"{c.float_per_clock}, {c.alu_per_clock} | {c.special_per_clock}, {c.popc_per_clock}"
        moved = f"{c.shared_bytes_per_clock}, {c.l2_bytes_per_clock}"
        lines.append(f"| {c.arch} | {held} | {c.threads_per_sm}, {c.blocks_per_sm} | {rates} | {moved} |")
    return "\n".join(lines) + "\n"
