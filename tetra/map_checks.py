"""What callers give to a map, checked and as arrays. Every error names the argument, the value and the way out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from tetra.coordinates import CoordinateFrame
from tetra.errors import MapError
from tetra.map_columns import Blobs, Floats

MAX_METADATA_BYTES = 1 << 20
MAX_THUMBNAIL_BYTES = 1 << 24
LARGEST = float(np.finfo(np.float64).max)


def check_whole(value: Any, name: str, least: int, wanted: str) -> int:
    """``value`` as an int of at least ``least``; ``wanted`` says what would be right."""
    is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_whole or value < least:
        raise MapError(f"{name} {value!r}: {wanted}")
    return int(value)


def check_codes(
    codes: Tensor | npt.NDArray[np.uint8], n: int | None, n_bytes: int, of_map: str, name: str = "codes"
) -> npt.NDArray[np.uint8]:
    """uint8 [n, n_bytes], contiguous on the CPU; ``n`` None takes any number, ``of_map`` says whose codes fit."""
    array = codes.detach().cpu().numpy() if isinstance(codes, Tensor) else codes
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8:
        found = getattr(codes, "dtype", type(codes).__name__)
        raise MapError(f"{name}: {found}, expected uint8 [places, {n_bytes}] as model.describe gives them")
    if array.ndim != 2 or array.shape[1] != n_bytes or (n is not None and len(array) != n):
        wanted = f"[{'queries' if n is None else n}, {n_bytes}]"
        raise MapError(f"{name}: shape {list(array.shape)}, expected {wanted}: {of_map}")
    return np.ascontiguousarray(array)


def check_positions(positions: Any, n: int, frame: CoordinateFrame, *, may_lack: bool = True) -> Floats:
    """float64 [n, 2] in ``frame``; if they ``may_lack``, None, for all or for some in a list, becomes NaN."""
    if positions is None and may_lack:
        return np.full((n, 2), np.nan)
    known = None
    if may_lack and isinstance(positions, (list, tuple)) and any(p is None for p in positions):
        known = np.flatnonzero([p is not None for p in positions])
        positions = [(np.nan, np.nan) if p is None else p for p in positions]
    array = _floats(positions, "positions")
    if n == 0 and array.size == 0:
        array = array.reshape(0, 2)
    if array.shape != (n, 2):
        raise MapError(f"positions: shape {list(array.shape)}, expected [{n}, 2]: one (x, y) a place")
    frame.check(array, known)
    return array


def check_numbers(values: Any, n: int, name: str, limit: float) -> Floats:
    """float64 [n] of finite numbers up to ``limit`` either way; None, for all or for some, becomes NaN."""
    if values is None:
        return np.full(n, np.nan)
    lacks = None
    if isinstance(values, (list, tuple)) and len(values) == n and any(v is None for v in values):
        lacks = np.array([v is None for v in values], dtype=np.bool_)
        values = [0.0 if v is None else v for v in values]
    array = _floats(values, name)
    if array.shape != (n,):
        raise MapError(f"{name}: shape {list(array.shape)}, expected [{n}]: one a place")
    is_right = abs(array) <= limit  # NaN is not
    if not is_right.all():
        number = int(is_right.argmin())
        wanted = f"between {-limit:g} and {limit:g}" if limit < LARGEST else "a finite number"
        raise MapError(f"{name}: {array[number]:g} of number {number} is not {wanted}; pass None where it is unknown")
    return array if lacks is None else np.where(lacks, np.nan, array)


def check_headings(values: Any, n: int) -> npt.NDArray[np.float32]:
    """float32 [n] degrees in [0, 360) of degrees from -360 to 360; None, for all or for some, becomes NaN."""
    headings = check_numbers(values, n, "headings", 360.0).astype(np.float32) % np.float32(360)
    headings[headings == 360] = 0  # what is a little below 0 is rounded up to 360
    return headings


def check_descriptors(descriptors: Tensor | npt.NDArray[Any], n: int, n_dims: int) -> npt.NDArray[np.float32]:
    """float32 [n, n_dims] whose values float16 can hold."""
    values = descriptors.detach().cpu().float().numpy() if isinstance(descriptors, Tensor) else descriptors
    array = np.asarray(values, dtype=np.float32)
    if array.shape != (n, n_dims):
        raise MapError(f"descriptors: shape {list(array.shape)}, expected [{n}, {n_dims}] as the map keeps them")
    is_wrong = ~(abs(array) <= np.finfo(np.float16).max).all(axis=1)
    if is_wrong.any():
        raise MapError(
            f"descriptors: number {int(is_wrong.argmax())} has values that are not finite in float16; check the model"
        )
    return array


def check_metadata(values: Sequence[Mapping[str, Any] | None] | None, n: int) -> Blobs:
    """JSON of each; no bytes where there is none."""
    if values is None:
        return Blobs.empty(n)
    if len(values) != n:
        raise MapError(f"metadata: {len(values)} for {n} places; pass one each, None where there is none")
    texts = []
    for number, value in enumerate(values):
        if value is not None and not isinstance(value, Mapping):
            raise MapError(f"metadata: number {number} is a {type(value).__name__}; expected a dict or None")
        text = b"" if value is None else to_json(dict(value), f"metadata: number {number}")
        if len(text) > MAX_METADATA_BYTES:
            raise MapError(f"metadata: number {number} has {len(text)} bytes, at most {MAX_METADATA_BYTES} are kept")
        texts.append(text)
    return Blobs.of(texts)


def check_thumbnails(values: Sequence[bytes | None] | None, n: int) -> Blobs:
    """JPEG files; no bytes where there is none."""
    if values is None:
        return Blobs.empty(n)
    if len(values) != n:
        raise MapError(f"thumbnails: {len(values)} for {n} places; pass one each, None where there is none")
    for number, value in enumerate(values):
        if value is not None and not (isinstance(value, bytes) and value[:3] == b"\xff\xd8\xff"):
            raise MapError(f"thumbnails: number {number} is no JPEG file; pass its bytes")
        if value is not None and len(value) > MAX_THUMBNAIL_BYTES:
            raise MapError(
                f"thumbnails: number {number} has {len(value)} bytes, at most {MAX_THUMBNAIL_BYTES} are kept"
            )
    return Blobs.of([value or b"" for value in values])


def to_json(value: Any, name: str) -> bytes:
    """As JSON, which has neither NaN nor infinity."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise MapError(f"{name}: JSON can't hold it ({error}); use text, finite numbers, lists and dicts") from None


def _floats(values: Any, name: str) -> Floats:
    try:
        return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise MapError(f"{name}: expected numbers ({' '.join(str(error).split())})") from None
