"""The problems that are tuned for GPUs: every launch of the models, in inference and in training, and of searches.

Inference is in float16; training has a float32 stream and bfloat16 for all else, as autocast makes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tetra.kernels.tunable import all_tunables

BATCHES = (1, 2, 4, 8, 16, 32, 64)
TRAINING_BATCHES = (8, 32, 128)
DROPOUT = 0.1
NEIGHBOURS = 25
ROWS = (200_000, 1_000_000)  # of a database
DESCRIPTOR_BITS = (12288, 8448, 8192, 6400)  # of BoQ, SALAD, 1 KiB, and the small MixVPR
PLACES = ((400, 12288), (400, 8448), (96, 6400))  # descriptors that are compared in a step of fine-tuning, and bits
TEACHERS = ((768, "bfloat16"), (432, "float32"))  # width and dtype of tokens
TEACHER_WIDTH = 768  # of all heads, whose attention is distilled


class Shape(Protocol):
    """The sizes of a backbone; ``tetra.config.BackboneConfig`` has them."""

    @property
    def width(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def mlp_dim(self) -> int: ...
    @property
    def image_size(self) -> tuple[int, int]: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def full_precision_blocks(self) -> int: ...


@dataclass(frozen=True)
class Problem:
    """One problem of one kernel: ``sizes`` by the names that the kernel's file gives them."""

    tunable: str
    sizes: dict[str, Any]

    @property
    def key(self) -> str:
        """What names it among the results."""
        return all_tunables()[self.tunable].key(self.sizes)


def problems(
    backbones: Mapping[str, Shape],
    batches: Sequence[int] = BATCHES,
    training_batches: Sequence[int] = TRAINING_BATCHES,
) -> list[Problem]:
    """All that GPUs compute for these backbones, and searches; of problems that share a key, the first.

    Args:
        backbones: by name, such as ``tetra.config.BACKBONES``.
        batches, training_batches: images at a time.
    """
    found: dict[tuple[str, str], Problem] = {}
    for problem in _all(list(backbones.values()), batches, training_batches):
        found.setdefault((problem.tunable, problem.key), problem)
    return list(found.values())


def _all(shapes: list[Shape], batches: Sequence[int], training_batches: Sequence[int]) -> Iterator[Problem]:
    for shape in shapes:
        for batch in batches:
            yield from _inference(shape, batch)
    for shape in shapes:
        for batch in training_batches:
            yield from _training(shape, batch)
    yield from _losses(shapes, training_batches)
    yield from _descriptors_and_searches(max(batches, default=1))


def _tokens(shape: Shape) -> int:
    height, width = shape.image_size
    return 1 + (height // shape.patch_size) * (width // shape.patch_size)


def _products(shape: Shape) -> list[tuple[int, int]]:
    """Outputs and inputs of the four ternary layers of a block: QKV, output, up, down."""
    inner = shape.n_heads * shape.head_dim
    return [(3 * inner, shape.width), (shape.width, inner), (shape.mlp_dim, shape.width), (shape.width, shape.mlp_dim)]


def _inference(shape: Shape, batch: int) -> Iterator[Problem]:
    m, inner = batch * _tokens(shape), shape.n_heads * shape.head_dim
    plain = {"bias": True, "gelu": False, "residual": False, "scaled": False}
    epilogues = ({"bias": False, "scaled": True}, {"residual": True}, {"gelu": True}, {"residual": True})
    for (n, k), epilogue in zip(_products(shape), epilogues, strict=True):
        yield Problem("ternary_matmul", {"m": m, "n": n, "k": k, "x": "int8", "out": "float16", **plain, **epilogue})
    heads = {"b": batch, "t": _tokens(shape), "n_heads": shape.n_heads, "head_dim": shape.head_dim, "dtype": "float16"}
    yield Problem("attention", {**heads, "prescaled": True})
    for k in (shape.width, inner, shape.mlp_dim):
        flags = {"norm": True, "gelu": False, "residual": False}
        yield Problem("row_quantize", {"m": m, "k": k, "dtype": "float16", **flags})
    if shape.full_precision_blocks:
        yield Problem("attention", {**heads, "prescaled": False})
        yield Problem("layer_norm", {"m": m, "k": shape.width, "dtype": "float16", "residual": True})
    for k in (shape.width, inner):
        yield Problem("layer_norm", {"m": m, "k": k, "dtype": "float16", "residual": False})
    if getattr(shape, "stem", "patch") == "patch":
        height, width = shape.image_size
        sizes = {"b": batch, "height": height, "width": width, "patch_size": shape.patch_size}
        yield Problem("patches", {**sizes, "images": "uint8", "out": "float16"})


def _training(shape: Shape, batch: int) -> Iterator[Problem]:
    m = batch * _tokens(shape)
    heads: dict[str, Any] = {"b": batch, "t": _tokens(shape), "n_heads": shape.n_heads, "head_dim": shape.head_dim}
    for part in ("forward", "queries", "keys"):
        yield Problem("attention_training", {"part": part, **heads, "dtype": "bfloat16", "dropout": 0.0})
    for i, (n, k) in enumerate(_products(shape)):
        # QKV and up take the stream; down drops and activates first.
        last = i == 3
        rows: dict[str, Any] = {
            "m": m,
            "k": k,
            "x": "bfloat16" if i in (1, 3) else "float32",
            "y": "bfloat16",
            "norm": True,
        }
        rows |= {"gelu": last, "dropout": DROPOUT if last else 0.0, "blend": True}
        for part in ("forward", "backward"):
            yield Problem("blend_rows", {"part": part, **rows})
        yield Problem("blend_weight", {"n": n * k, "x": "float32", "y": "bfloat16"})
    for residual, y, out in (("float32", "bfloat16", "float32"), (None, "float32", "bfloat16")):
        yield Problem("residual_dropout", {"m": m, "k": shape.width, "residual": residual, "y": y, "out": out})


def _losses(shapes: list[Shape], training_batches: Sequence[int]) -> Iterator[Problem]:
    for batch in training_batches:
        for shape in shapes:
            t, width = _tokens(shape), shape.n_heads * shape.head_dim
            for part in ("forward", "gradient"):
                sizes = {"b": batch, "t": t, "student_width": width, "teacher_width": TEACHER_WIDTH}
                yield Problem("attention_distillation", {"part": part, **sizes, "dtype": "bfloat16"})
                for c, teacher in TEACHERS:
                    tokens = {"m": batch * (t - 1), "c": c, "student": "bfloat16", "teacher": teacher}
                    yield Problem("token_loss", {"part": part, **tokens})
    for b, d in PLACES:
        yield Problem("sign_similarity", {"b": b, "d": d})
        yield Problem("sign_gradient", {"b": b, "d": d, "dtype": "float32"})


def _descriptors_and_searches(batch: int) -> Iterator[Problem]:
    for bits in DESCRIPTOR_BITS:
        for dtype in ("float16", "float32"):
            yield Problem("bits", {"rows": batch, "d": bits, "dtype": dtype, "checked": True})
    for n_rows, bits in itertools.product(ROWS, DESCRIPTOR_BITS):
        search = {"n_rows": n_rows, "n_bytes": bits // 8, "k": NEIGHBOURS}
        for n_queries in (1, 2, 4, 8, 16):
            yield Problem("hamming_popcount", {"n_queries": n_queries, **search})
        for n_queries in (4, 8, 16, 32, 64, 128, 256, 1024):
            yield Problem("hamming_planes", {"n_queries": n_queries, **search})
