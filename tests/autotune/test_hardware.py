"""Limits and peaks of GPUs: what the figures imply has to agree with how the chips are built; and which product a
device is, by what it says of itself."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tetra.autotune.hardware import CHIPS, KIB, MIB, PRODUCTS, Product, detect, find_product, product_of, to_markdown

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_resident_blocks_follow_the_scarcest_resource() -> None:
    a100 = CHIPS[80]
    assert a100.blocks_resident(registers=32, shared_bytes=0, num_warps=4) == 16  # threads
    assert a100.blocks_resident(registers=255, shared_bytes=0, num_warps=4) == 2  # registers
    assert a100.blocks_resident(registers=32, shared_bytes=40 * KIB, num_warps=4) == 4  # shared memory
    assert a100.blocks_resident(registers=32, shared_bytes=0, num_warps=1) == 32  # blocks
    assert a100.blocks_resident(registers=32, shared_bytes=164 * KIB, num_warps=4) == 0


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=lambda product: product.name)
def test_peaks_are_a_power_of_two_a_clock(product: Product) -> None:
    # Tensor cores do 2^n multiply-adds a clock. A figure with sparsity, of another clock or of another number of SMs
    # would not come out as one.
    for dtype in ("int8", "fp16", "tf32"):
        exponent = math.log2(product.macs_per_clock(dtype))
        assert abs(exponent - round(exponent)) < 0.01, (dtype, product.macs_per_clock(dtype))
    assert product.macs_per_clock("int8") >= 2 * product.macs_per_clock("fp16") * 0.99
    assert product.chip.arch == product.arch
    assert product.source
    assert product.called in product.name


@pytest.mark.parametrize(
    "name", ["A100", "RTX 3090", "Orin", "L4", "RTX 4090", "H100", "H200", "B200", "RTX 5090", "50W", "30W", "15W"]
)
def test_the_table_holds(name: str) -> None:
    assert any(name in known for known in PRODUCTS)


def test_products_of_an_architecture_have_the_same_tensor_cores() -> None:
    for arch in CHIPS:
        rates = {round(math.log2(p.macs_per_clock("int8"))) for p in PRODUCTS.values() if p.arch == arch}
        assert len(rates) == 1, arch


def test_every_architecture_has_a_product() -> None:
    assert {product_of(arch).arch for arch in CHIPS} == set(CHIPS)
    with pytest.raises(KeyError, match="sm_75"):
        product_of(75)


def test_products_are_found_by_part_of_their_name() -> None:
    assert find_product("orin") is PRODUCTS["Jetson AGX Orin 64GB"]
    assert find_product("H100") is PRODUCTS["H100 SXM"]
    assert find_product("h100 pcie") is PRODUCTS["H100 PCIe"]
    assert find_product("L4") is PRODUCTS["L4"]
    for name in ("", "RTX", "V100"):
        with pytest.raises(ValueError, match=f"gpu: '{name}' is not one GPU .* A100 SXM 80GB, .* RTX 3090"):
            find_product(name)


def test_the_documentation_has_the_table() -> None:
    assert to_markdown() in (DOCS / "static-tuning.md").read_text()


# --- the GPU that is there -----------------------------------------------------------------------------------


def device(product: Product, name: str, **other: Any) -> SimpleNamespace:
    """What PyTorch says of a device that is this product."""
    bus_bits = 512
    found = {
        "name": name,
        "major": product.arch // 10,
        "minor": product.arch % 10,
        "multi_processor_count": product.n_sms,
        "clock_rate": round(product.clock_ghz * 1e6),
        "memory_clock_rate": round(product.dram_gb_per_s * 1e6 / 2 / (bus_bits / 8)),
        "memory_bus_width": bus_bits,
        "L2_cache_size": product.l2_bytes,
        "total_memory": round(0.97 * product.memory_gb * 1e9),
        "is_integrated": int(product.arch == 87),
        "shared_memory_per_multiprocessor": product.chip.shared_per_sm,
        "shared_memory_per_block_optin": product.chip.shared_per_block,
        "max_threads_per_multi_processor": product.chip.threads_per_sm,
        "regs_per_multiprocessor": product.chip.registers_per_sm,
    }
    return SimpleNamespace(**(found | other))


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=lambda product: product.name)
def test_every_product_is_detected_whatever_its_name(product: Product) -> None:
    assert detect(properties=device(product, f"NVIDIA {product.called}")) == (product, [])
    assert detect(properties=device(product, "Graphics Device")) == (product, [])


# As an H200 says it, by Nsight Compute's device attributes. The clock is the highest, not that of the tensor cores.
H200: dict[str, Any] = {
    "name": "NVIDIA H200",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "clock_rate": 1980000,
    "memory_clock_rate": 3201000,
    "memory_bus_width": 6016,
    "L2_cache_size": 62914560,
    "total_memory": 150109880320,
    "shared_memory_per_block_optin": 232448,
    "shared_memory_per_multiprocessor": 233472,
    "max_threads_per_multi_processor": 2048,
    "regs_per_multiprocessor": 65536,
}


def test_a_real_h200() -> None:
    product, notices = detect(properties=SimpleNamespace(**H200))
    assert (product, notices) == (PRODUCTS["H200"], [])
    assert product.l2_bytes == H200["L2_cache_size"]
    assert product.chip.shared_per_block == H200["shared_memory_per_block_optin"]
    assert product.chip.shared_per_sm == H200["shared_memory_per_multiprocessor"]


def test_older_pytorch_tells_less() -> None:
    less = {k: v for k, v in H200.items() if "clock" not in k and "bus" not in k}
    assert detect(properties=SimpleNamespace(**less)) == (PRODUCTS["H200"], [])  # by its memory
    h100 = device(PRODUCTS["H100 SXM"], "NVIDIA H100 80GB HBM3", clock_rate=0, memory_clock_rate=0)
    assert detect(properties=h100) == (PRODUCTS["H100 SXM"], [])


def test_a_name_that_claims_something_else_is_said() -> None:
    product, (notice,) = detect(properties=SimpleNamespace(**{**H200, "name": "NVIDIA H100 80GB HBM3"}))
    assert product is PRODUCTS["H200"]
    assert "calls itself 'NVIDIA H100 80GB HBM3'" in notice
    assert "of H200" in notice
    # A laptop's chip has the name of a desktop's.
    laptop = device(PRODUCTS["RTX 4090"], "NVIDIA GeForce RTX 4090 Laptop GPU", multi_processor_count=76)
    product, notices = detect(properties=laptop)
    assert product.n_sms == 76
    assert len(notices) == 2
    assert "not those of RTX 4090, which has 128 multiprocessors" in notices[1]
    # L40 is not L4.
    _, notices = detect(properties=device(PRODUCTS["L4"], "NVIDIA L40", multi_processor_count=142))
    assert len(notices) == 1


def test_an_unlisted_chip_gets_the_least_of_its_architecture() -> None:
    a10 = device(
        PRODUCTS["RTX 3090"],
        "NVIDIA A10",
        multi_processor_count=72,
        memory_clock_rate=6251000,
        memory_bus_width=384,
    )
    product, (notice,) = detect(properties=a10)
    assert "NVIDIA A10 with 72 multiprocessors" in notice
    assert "not one that is known of sm_86 (RTX 3090)" in notice
    assert product.arch == product.chip.arch == 86
    assert product.n_sms == 72
    assert product.dram_gb_per_s == pytest.approx(600, rel=0.01)
    assert product.macs_per_clock("fp16") == pytest.approx(PRODUCTS["RTX 3090"].macs_per_clock("fp16"))
    limits = ("shared_per_block", "shared_per_sm", "threads_per_sm", "blocks_per_sm", "alu_per_clock")
    assert all(getattr(product.chip, name) == getattr(CHIPS[86], name) for name in limits)


def test_a_device_that_tells_nothing_is_not_overestimated() -> None:
    bare = SimpleNamespace(name="", major=9, minor=0, multi_processor_count=78)
    product, notices = detect(properties=bare)
    assert len(notices) == 1
    hopper = [p for p in PRODUCTS.values() if p.arch == 90]
    assert product.clock_ghz == min(p.clock_ghz for p in hopper)
    assert product.dram_gb_per_s == pytest.approx(78 * min(p.dram_gb_per_s / p.n_sms for p in hopper))
    assert product.l2_bytes == 50 * MIB


@pytest.mark.parametrize(("arch", "like"), [(121, 120), (103, 100), (130, None)])
def test_an_unknown_architecture_is_taken_with_care(arch: int, like: int | None) -> None:
    properties = device(
        replace(PRODUCTS["RTX 5090"], n_sms=48),
        "NVIDIA GB10",
        major=arch // 10,
        minor=arch % 10,
        shared_memory_per_block_optin=64 * KIB,
        shared_memory_per_multiprocessor=0,
    )
    product, notices = detect(properties=properties)
    assert f"of an architecture that is not known, sm_{arch}" in notices[0]
    assert product.arch == product.chip.arch == arch
    assert product.chip.shared_per_block == 64 * KIB < product.chip.shared_per_sm
    rates = [p.macs_per_clock("int8") for p in PRODUCTS.values() if like in (None, p.arch)]
    assert product.macs_per_clock("int8") == pytest.approx(min(rates))
    assert product.chip.blocks_resident(64, 30 * KIB, 4) >= 1


def test_what_the_kernels_do_not_run_on_is_refused() -> None:
    with pytest.raises(ValueError, match="sm_75 is not supported"):
        detect(properties=device(PRODUCTS["L4"], "NVIDIA T4", major=7, minor=5))
    with pytest.raises(ValueError, match="device: cpu is not a GPU of NVIDIA's"):
        detect("cpu")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device: cuda is not there"):
        detect()


@pytest.mark.gpu
def test_the_gpu_that_is_there() -> None:
    product, notices = detect()
    assert product.n_sms == torch.cuda.get_device_properties(0).multi_processor_count
    assert all(isinstance(notice, str) for notice in notices)
