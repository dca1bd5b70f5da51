"""What Triton's interpreter does otherwise than its compiler, set right; for use inside kernels.

The interpreter holds bfloat16 as integers: a conversion to it cuts bits off instead of rounding, and a product
multiplies the integers. ``cast`` and ``product`` give, interpreted, the values that compiled code gives.
"""

from __future__ import annotations

import os

from tetra.kernels.backend import HAS_TRITON, tl, triton

# Read when the kernels are defined, as Triton does; a constant, so that compiled code holds one branch only.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1") if HAS_TRITON else None


@triton.jit
def cast(x, dtype: tl.constexpr):
    """``x`` as ``dtype``, rounding half to even."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def product(a, b, sums):
    """a @ b + sums of 16-bit floats, with float32 sums."""
    if INTERPRETED:
        out = tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    else:
        out = tl.dot(a, b, sums)
    return out
