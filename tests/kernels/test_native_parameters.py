"""The C++ kernels' block sizes and threads change nothing of what they give, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tetra.kernels import native, pack_ternary
from tetra.kernels.tunable import Config

# Beside the tables' rows those that cut at odd places, one row and one byte at a time, and all at once.
ROWS: tuple[Config, ...] = (*native.ROW_CONFIGS, (1, 1), (1, 3), (777, 5), (1, 1000), (1 << 40, 7))
HAMMING: tuple[Config, ...] = (*native.HAMMING_CONFIGS, (1, 1), (9999, 1), (1 << 30, 1), (1, 1 << 40))
TERNARY: tuple[Config, ...] = (*native.TERNARY_CONFIGS, (1,), (12345,), (1 << 30,))


@pytest.fixture(autouse=True, params=[1, 3])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    if not native.available():
        pytest.skip("the C++ kernels can't be built here")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("m", "k"), [(0, 8), (1, 5), (37, 130), (200, 768)])
def test_rows(m: int, k: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, residual = torch.randn(m, k).to(dtype), torch.randn(m, k).to(dtype)
        weight, bias = torch.randn(k).to(dtype), torch.randn(k).to(dtype)
        operations = (
            lambda config, x=x: native.quantize_rows(x, config=config),
            lambda config, x=x, w=weight, b=bias, r=residual: native.norm_quantize(
                x, w, b, gelu=True, residual=r, config=config
            ),
            lambda config, x=x, w=weight, b=bias, r=residual: native.layer_norm(x, w, b, residual=r, config=config),
        )
        for operation in operations:
            expected = operation(native.ROW_CONFIGS[0])
            for config in ROWS:
                assert same(operation(config), expected), config


@pytest.mark.parametrize(("n_queries", "n_rows", "n_bytes"), [(1, 1, 1), (3, 100, 7), (70, 1003, 33), (130, 515, 64)])
def test_searches(n_queries: int, n_rows: int, n_bytes: int) -> None:
    queries = torch.randint(0, 256, (n_queries, n_bytes), dtype=torch.uint8)
    database = torch.randint(0, 256, (n_rows, n_bytes), dtype=torch.uint8)
    database[n_rows // 2 :] = database[: n_rows - n_rows // 2].clone()  # ties
    allowed = torch.rand(n_rows) < 0.7
    k, radius = min(5, n_rows), 4 * n_bytes
    operations = (
        lambda config: native.hamming_search(queries, database, k, allowed, None, config=config),
        lambda config: native.hamming_range_search(queries, database, radius, allowed, None, config=config),
        lambda config: (native.hamming_distances(queries, database, None, config=config),),
    )
    for operation in operations:
        expected = operation(native.HAMMING_CONFIGS[0])
        for config in HAMMING:
            assert same(operation(config), expected), config


@pytest.mark.parametrize(("m", "n", "k"), [(0, 8, 8), (1, 1, 1), (37, 65, 130), (64, 300, 768)])
def test_products(m: int, n: int, k: int) -> None:
    x_q = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8)
    expected = (x_q.long() @ codes.long().T).to(torch.int32)
    for config in TERNARY:
        assert torch.equal(native.ternary_matmul_int32(x_q, pack_ternary(codes), config=config), expected), config


def test_asked_threads_are_used_whatever_is_kept() -> None:
    queries, database = torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(50, 8, dtype=torch.uint8)
    assert native.hamming_threads(queries, database, 2) == 2
    assert native.hamming_threads(queries, database, None) == 1
