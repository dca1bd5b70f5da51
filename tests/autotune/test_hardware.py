"""Limits and peaks of GPUs: what the figures imply has to agree with how the chips are built."""

from __future__ import annotations

import math

import pytest

from tetra.autotune.hardware import CHIPS, KIB, PRODUCTS, Product, find_product, product_of


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


def test_every_architecture_has_a_product() -> None:
    assert {product_of(arch).arch for arch in CHIPS} == set(CHIPS)


def test_products_are_found_by_part_of_their_name() -> None:
    assert find_product("orin") is PRODUCTS["Jetson AGX Orin 64GB"]
    for name in ("", "RTX", "V100"):
        with pytest.raises(ValueError, match=f"gpu: '{name}' is not one GPU .* A100 SXM 80GB, RTX 3090"):
            find_product(name)
