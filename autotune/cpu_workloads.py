"""The problems that the C++ kernels meet in the models: what is tuned on a CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tetra.autotune.workloads import Problem, Shape
from tetra.kernels.native_tunables import ROW_OPERATIONS

# Queries, rows and bytes of a code: one image and a hundred, in maps of the size of a town's and a city's.
SEARCHES = (
    (1, 10_000, 32),
    (100, 10_000, 32),
    (1, 100_000, 192),
    (100, 100_000, 192),
    (1, 10_000, 1536),
    (100, 10_000, 1536),
)


def cpu_problems(backbones: Mapping[str, Shape], batches: Sequence[int] = (1, 8)) -> list[Problem]:
    """Rows, products and searches of models with the shapes of ``backbones``, ``batches`` images at a time."""
    found = []
    for shape in backbones.values():
        height, width = shape.image_size
        tokens = (height // shape.patch_size) * (width // shape.patch_size) + 1
        for m in (batch * tokens for batch in batches):
            for dtype in ("bfloat16", "float32"):
                widths = {"norm_quantize": (shape.width, shape.mlp_dim)}
                found += [
                    Problem("native_rows", {"operation": operation, "m": m, "k": k, "dtype": dtype})
                    for operation in ROW_OPERATIONS
                    for k in widths.get(operation, (shape.width,))
                ]
            attended = shape.n_heads * shape.head_dim
            layers = (
                (3 * attended, shape.width),
                (shape.width, attended),
                (shape.mlp_dim, shape.width),
                (shape.width, shape.mlp_dim),
            )
            found += [Problem("native_ternary", {"m": m, "n": n, "k": k}) for n, k in layers]
    found += [Problem("native_hamming", {"queries": q, "rows": r, "n_bytes": b}) for q, r, b in SEARCHES]
    return found
