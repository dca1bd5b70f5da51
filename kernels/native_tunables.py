"""What can be tuned of the C++ kernels: how work is cut into blocks, and how much is worth another thread.

The tables and keys are in ``native``, which looks them up. Results of all rows are equal, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tetra.kernels import native
from tetra.kernels.layer_norm import layer_norm_reference
from tetra.kernels.row_quantize import norm_quantize_reference, quantize_rows_reference
from tetra.kernels.ternary_matmul import pack_ternary, ternary_matmul_int32_reference
from tetra.kernels.tunable import DTYPES, TOLERANCES, Config, Sizes, Trial, Tunable, seeded

ROW_OPERATIONS = ("quantize_rows", "norm_quantize", "layer_norm")
NEIGHBOURS = 25  # of a query, in trials of the search


def _distinct(configs: tuple[Config, ...], plan: Callable[[Config], object]) -> tuple[Config, ...]:
    """Of rows that come to the same plan the first."""
    first: dict[object, Config] = {}
    for config in configs:
        first.setdefault(plan(config), config)
    return tuple(first.values())


def _threads(work: int, work_a_thread: int) -> int:
    return min(torch.get_num_threads(), work // work_a_thread + 1)


# --- rows ----------------------------------------------------------------------------------------------------


def _rows_key(sizes: Sizes) -> str:
    threads = torch.get_num_threads()
    return native.rows_key(sizes["operation"], sizes["m"], sizes["k"], DTYPES[sizes["dtype"]], threads)


def _rows_space(arch: int, sizes: Sizes) -> tuple[Config, ...]:
    def plan(config: Config) -> object:
        values_a_thread, rows_a_task = config
        threads = min(_threads(sizes["m"] * sizes["k"], values_a_thread), -(-sizes["m"] // rows_a_task))
        return (threads, rows_a_task) if threads > 1 else 1

    return _distinct(native.ROW_CONFIGS, plan)


def _rows_trial(sizes: Sizes, device: torch.device) -> Trial:
    m, k, dtype, random = sizes["m"], sizes["k"], DTYPES[sizes["dtype"]], seeded(device)
    x = torch.randn(m, k, generator=random, device=device).to(dtype)
    weight = torch.randn(k, generator=random, device=device).to(dtype)
    bias = torch.randn(k, generator=random, device=device).to(dtype)
    if sizes["operation"] == "layer_norm":

        def norm(config: Config) -> tuple[Tensor, ...]:
            out = native.layer_norm(x, weight, bias, config=config)
            assert isinstance(out, Tensor)
            return (out,)

        tolerance = TOLERANCES[sizes["dtype"]]
        return Trial(norm, lambda: (layer_norm_reference(x, weight, bias),), tolerance, tolerance)
    # Where the reference's value is half way between two codes, the other code is right too.
    rtol, atol = (0.0, 1e-5), (1.0, 0.0)
    if sizes["operation"] == "quantize_rows":
        return Trial(
            lambda config: native.quantize_rows(x, config=config), lambda: quantize_rows_reference(x), rtol, atol
        )
    return Trial(
        lambda config: native.norm_quantize(x, weight, bias, config=config),
        lambda: norm_quantize_reference(x, weight, bias, 1e-5, False, None),
        rtol,
        atol,
    )


# --- search --------------------------------------------------------------------------------------------------


def _hamming_key(sizes: Sizes) -> str:
    return native.hamming_key(sizes["queries"], sizes["rows"], sizes["n_bytes"], torch.get_num_threads())


def _hamming_space(arch: int, sizes: Sizes) -> tuple[Config, ...]:
    n_rows, n_bytes = sizes["rows"], sizes["n_bytes"]

    def plan(config: Config) -> object:  # as hamming_parts in hamming.hpp, which takes eight rows at a time
        block_bytes, bytes_a_thread = config
        threads = _threads(sizes["queries"] * n_rows * n_bytes, bytes_a_thread)
        tiles = -(-n_rows // 8)
        return threads, min(max(block_bytes // (8 * n_bytes), 1), max(tiles // (4 * threads), 1))

    return _distinct(native.HAMMING_CONFIGS, plan)


def _hamming_trial(sizes: Sizes, device: torch.device) -> Trial:
    random = seeded(device)
    queries, database = (
        torch.randint(0, 256, (n, sizes["n_bytes"]), dtype=torch.uint8, generator=random, device=device)
        for n in (sizes["queries"], sizes["rows"])
    )
    k = min(NEIGHBOURS, sizes["rows"])
    return Trial(
        lambda config: native.hamming_search(queries, database, k, None, None, config=config),
        lambda: _nearest(queries, database, k),
    )


def _nearest(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """In numpy, query by query."""
    rows = np.ascontiguousarray(np.pad(database.numpy(), ((0, 0), (0, -database.shape[1] % 8)))).view(np.uint64)
    found = []
    for query in np.pad(queries.numpy(), ((0, 0), (0, -queries.shape[1] % 8))):
        differing = np.bitwise_count(rows ^ query.view(np.uint64)).sum(axis=1, dtype=np.int32)
        nearest = np.argsort(differing, kind="stable")[:k]
        found.append((differing[nearest], nearest))
    return tuple(torch.from_numpy(np.stack(parts)) for parts in zip(*found, strict=True))  # type: ignore[return-value]


# --- products ------------------------------------------------------------------------------------------------


def _ternary_key(sizes: Sizes) -> str:
    return native.ternary_key(sizes["m"], sizes["n"], sizes["k"], torch.get_num_threads())


def _ternary_trial(sizes: Sizes, device: torch.device) -> Trial:
    m, n, k, random = sizes["m"], sizes["n"], sizes["k"], seeded(device)
    x_q = torch.randint(-127, 128, (m, k), dtype=torch.int8, generator=random, device=device)
    packed = pack_ternary(torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=random, device=device))
    return Trial(
        lambda config: (native.ternary_matmul_int32(x_q, packed, config=config),),
        lambda: (ternary_matmul_int32_reference(x_q, packed),),
    )


def tunables() -> list[Tunable]:
    """Of the row kernels, the search and the products with packed weights."""
    return [
        Tunable(
            name="native_rows",
            module="native",
            on="cpu",
            fields=native.ROW_FIELDS,
            key=_rows_key,
            space=_rows_space,
            default=lambda arch, cores, sizes: native.ROW_CONFIGS[0],
            works=None,
            trial=_rows_trial,
        ),
        Tunable(
            name="native_hamming",
            module="native",
            on="cpu",
            fields=native.HAMMING_FIELDS,
            key=_hamming_key,
            space=_hamming_space,
            default=lambda arch, cores, sizes: native.HAMMING_CONFIGS[0],
            works=None,
            trial=_hamming_trial,
        ),
        Tunable(
            name="native_ternary",
            module="native",
            on="cpu",
            fields=native.TERNARY_FIELDS,
            key=_ternary_key,
            space=lambda arch, sizes: native.TERNARY_CONFIGS,
            default=lambda arch, cores, sizes: native.TERNARY_CONFIGS[0],
            works=None,
            trial=_ternary_trial,
        ),
    ]
