"""Evaluation sets: which images are the map, which are the queries, and which answers are right.

Two layouts of folders are read; ``layout="auto"`` of :func:`load_dataset` tells them apart.

**UTM folders** (``utm``): ``database/`` and ``queries/``, searched with their subfolders, either in the named
folder or in its ``test/`` or ``images/test/``. A file's name says where it was taken:
``@UTM_east@UTM_north@zone number@zone letter@...@.jpg``, metres; fields after the north value may be empty or
missing. References within ``radius_m`` of a query (25 m by default) are right. A set may span zones that do not
touch, such as cities on two continents; where zones touch, near places would look far apart, so those are refused.

**VPR-Bench** (``vpr-bench``): ``query/``, ``ref/`` and ``ground_truth_new.npy``, an object array [Q, 2] whose
rows are (query index, right reference indices). Indices count the images of a folder in natural order.
Such a file holds a pickle, which could run any code, so numpy reads it only with ``allow_pickle``. Here an
unpickler reads it that knows nothing but arrays, integers and containers and builds them from scratch: no
option is needed, and a file that asks for more is refused.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tetra.errors import DatasetError
from tetra.images import list_images

LAYOUTS = ("auto", "utm", "vpr-bench")

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PlaceDataset:
    """References (the map), queries, and the right references of each query.

    ``ground_truth[i]`` is int64 [number of right references of query i], sorted indices into
    ``database_paths``; it is empty for a query of a place that the map does not have.
    """

    name: str
    layout: str
    database_paths: list[Path]
    query_paths: list[Path]
    ground_truth: list[IntArray]

    def __post_init__(self) -> None:
        if len(self.ground_truth) != self.num_queries:
            raise DatasetError(
                f"the ground truth has {len(self.ground_truth)} queries, but there are {self.num_queries} "
                "query images; the two must be equal"
            )
        for query, rows in enumerate(self.ground_truth):
            wrong = rows[(rows < 0) | (rows >= self.num_references)]
            if wrong.size:
                raise DatasetError(
                    f"the ground truth of query {query} names reference {wrong[0]}, but there are "
                    f"{self.num_references} reference images, counted from 0"
                )

    @property
    def num_references(self) -> int:
        """How many images the map has."""
        return len(self.database_paths)

    @property
    def num_queries(self) -> int:
        """How many queries there are."""
        return len(self.query_paths)

    def subset(self, queries: Sequence[int], references: Sequence[int]) -> PlaceDataset:
        """The data set with only these queries and references, renumbered in the order given."""
        new_row = np.full(self.num_references, -1, dtype=np.int64)
        new_row[np.asarray(references, dtype=np.int64)] = np.arange(len(references))
        rows = [new_row[self.ground_truth[query]] for query in queries]
        return replace(
            self,
            database_paths=[self.database_paths[row] for row in references],
            query_paths=[self.query_paths[query] for query in queries],
            ground_truth=[np.sort(row[row >= 0]) for row in rows],
        )


def load_dataset(path: str | Path, layout: str = "auto", radius_m: float = 25.0) -> PlaceDataset:
    """Read the evaluation set in the folder ``path`` (layouts: see the module).

    ``radius_m`` is the distance in metres up to which a reference of a UTM folder is right; VPR-Bench brings
    its own ground truth.

    Raises :class:`~tetra.errors.DatasetError` if the folder is missing, has another layout, holds no images,
    has names or a ground truth that cannot be read, or if no query at all has a right reference.
    """
    folder = Path(path)
    if layout not in LAYOUTS:
        raise DatasetError(f"layout {layout!r} is not known; choose one of {', '.join(LAYOUTS)}")
    if not (math.isfinite(radius_m) and radius_m >= 0):
        raise DatasetError(f"radius of {radius_m} m: it must be a finite number of metres, at least 0")
    if not folder.is_dir():
        problem = "is a file; name the data set's folder" if folder.exists() else "no such folder; check the path"
        raise DatasetError(f"{folder}: {problem}")
    if layout == "auto":
        layout = _detect_layout(folder)
    return _load_utm(folder, radius_m) if layout == "utm" else _load_vpr_bench(folder)


_GROUND_TRUTH = "ground_truth_new.npy"
_UTM_PLACES = ("", "test", "images/test")


def _utm_folder(folder: Path) -> Path | None:
    places = (folder / place for place in _UTM_PLACES)
    return next((place for place in places if _has_folders(place, "database", "queries")), None)


def _has_folders(folder: Path, *names: str) -> bool:
    return all((folder / name).is_dir() for name in names)


def _detect_layout(folder: Path) -> str:
    is_utm, is_vpr_bench = _utm_folder(folder) is not None, _has_folders(folder, "query", "ref")
    if is_utm and is_vpr_bench:
        raise DatasetError(
            f"{folder}: has database/ and queries/ as well as query/ and ref/; say --layout utm or --layout vpr-bench"
        )
    if not (is_utm or is_vpr_bench):
        raise DatasetError(f"{folder}: {_what_is_missing(folder)}")
    return "utm" if is_utm else "vpr-bench"


def _what_is_missing(folder: Path, wanted: str = "") -> str:
    expected = {
        "utm": "database/ and queries/ (UTM folders)",
        "vpr-bench": f"query/, ref/ and {_GROUND_TRUTH} (VPR-Bench)",
    }
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return (
        f"needs {expected.get(wanted) or ' or '.join(expected.values())}, but holds {shown or 'nothing'}; "
        "use `tetra match` for two folders without ground truth"
    )


# ---------------------------------------------------------------------------------------------- UTM folders


def _load_utm(folder: Path, radius_m: float) -> PlaceDataset:
    place = _utm_folder(folder)
    if place is None:
        raise DatasetError(f"{folder}: {_what_is_missing(folder, 'utm')}")
    database_paths = list_images(place / "database", recursive=True)
    query_paths = list_images(place / "queries", recursive=True)
    positions, zones = zip(*(parse_utm_name(path) for path in database_paths + query_paths), strict=True)
    zone_of = _check_zones(dict(zip(database_paths + query_paths, zones, strict=True)))
    database_m, queries_m = np.split(np.array(positions, dtype=np.float64), [len(database_paths)])
    database_zones, query_zones = (np.array([zone_of[p] for p in paths]) for paths in (database_paths, query_paths))
    ground_truth = [np.empty(0, dtype=np.int64)] * len(query_paths)
    for zone in np.unique(query_zones):
        rows, queries = np.flatnonzero(database_zones == zone), np.flatnonzero(query_zones == zone)
        for query, near in zip(queries, _within_radius(database_m[rows], queries_m[queries], radius_m), strict=True):
            ground_truth[query] = rows[near]
    if not any(rows.size for rows in ground_truth):
        raise DatasetError(
            f"{folder}: none of the {len(query_paths)} queries has a reference within {radius_m:g} m; "
            "check the positions in the names or raise the radius"
        )
    return PlaceDataset(folder.resolve().name, "utm", database_paths, query_paths, ground_truth)


def _check_zones(zones: dict[Path, str]) -> dict[Path, str]:
    """The zone of each file; names without one take that of the others.

    Raises :class:`~tetra.errors.DatasetError` if positions cannot be compared: zones that touch, or several zones
    and names without one.
    """
    first = {zone: path for path, zone in reversed(zones.items())}
    nameless = first.pop("", None)
    for i, (zone, path) in enumerate(first.items()):
        for other, other_path in list(first.items())[:i]:
            apart = abs(int(zone.split()[0]) - int(other.split()[0]))
            if min(apart, 60 - apart) <= 1:  # 60 zones go round the earth
                raise DatasetError(
                    f"{path}: UTM zone {zone}, but {other_path.name} is in {other}; places where two zones meet look "
                    "far apart, so keep one of them in a data set"
                )
    if nameless is not None and len(first) > 1:
        raise DatasetError(f"{nameless}: the name gives no UTM zone, others give {' and '.join(sorted(first))}; add it")
    only = next(iter(first), "")
    return {path: zone or only for path, zone in zones.items()}


def parse_utm_name(path: Path) -> tuple[tuple[float, float], str]:
    """((east, north) in metres, zone) of a file named ``@UTM_east@UTM_north@number@letter@...@.jpg``.

    The zone is its number and hemisphere, such as ``"10 north"``, or "" if the name gives none: letters from
    N on are bands of the northern hemisphere, whose northings all count from the equator.

    Raises :class:`~tetra.errors.DatasetError` for a name of another form, or a position that is not finite.
    """
    expected = "expected @UTM_east@UTM_north@...@.jpg with metres, as in @543256.96@4178906.70@10@S@@@@.jpg"
    fields = path.stem.split("@")
    try:
        if fields[0] or len(fields) < 3:
            raise ValueError
        east, north = float(fields[1]), float(fields[2])
        if not (math.isfinite(east) and math.isfinite(north)):
            raise ValueError
    except ValueError:
        raise DatasetError(f"{path}: the name does not give a position; {expected}") from None
    number, letter = (field.strip() for field in (*fields[3:5], "", "")[:2])
    if not number:
        return (east, north), ""
    if not (number.isdecimal() and 1 <= int(number) <= 60):
        raise DatasetError(f"{path}: UTM zone number {number!r} is not one of 1 to 60; {expected}")
    hemisphere = ""
    if letter.isalpha():
        hemisphere = " north" if letter.upper() >= "N" else " south"
    return (east, north), f"{int(number)}{hemisphere}"


def _within_radius(
    database_m: npt.NDArray[np.float64], queries_m: npt.NDArray[np.float64], radius_m: float
) -> list[IntArray]:
    """For each query, the sorted rows of the database at most ``radius_m`` away; positions [N, 2], metres."""
    by_east = np.argsort(database_m[:, 0], kind="stable")
    east = database_m[by_east, 0]
    # Only references in a strip of east values can be near enough, so no Q x R table is ever made.
    first = np.searchsorted(east, queries_m[:, 0] - radius_m, side="left")
    last = np.searchsorted(east, queries_m[:, 0] + radius_m, side="right")
    right = []
    for query_m, start, stop in zip(queries_m, first, last, strict=True):
        strip = by_east[start:stop]
        distance_m = np.hypot(*(database_m[strip] - query_m).T)
        right.append(np.sort(strip[distance_m <= radius_m]).astype(np.int64))
    return right


# ------------------------------------------------------------------------------------------------ VPR-Bench


def _load_vpr_bench(folder: Path) -> PlaceDataset:
    if not _has_folders(folder, "query", "ref"):
        raise DatasetError(f"{folder}: {_what_is_missing(folder, 'vpr-bench')}")
    query_paths, database_paths = list_images(folder / "query"), list_images(folder / "ref")
    path = folder / _GROUND_TRUTH
    if not path.is_file():
        raise DatasetError(
            f"{path}: no such file; it says which references are right (use `tetra match` to go without)"
        )
    table = read_vpr_bench_ground_truth(path)
    for query in table:
        if not 0 <= query < len(query_paths):
            raise DatasetError(
                f"{path}: names query {query}, but {folder / 'query'} has {len(query_paths)} images, counted from 0"
            )
    ground_truth = [table[query] for query in sorted(table)]
    if not any(rows.size for rows in ground_truth):
        raise DatasetError(f"{path}: gives no query a right reference, so there is no recall to compute")
    try:
        return PlaceDataset(folder.resolve().name, "vpr-bench", database_paths, query_paths, ground_truth)
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from None


def read_vpr_bench_ground_truth(path: Path) -> dict[int, IntArray]:
    """Query index -> sorted right reference indices, from a VPR-Bench ``ground_truth_new.npy``.

    Reads the file without running any code in it. Raises :class:`~tetra.errors.DatasetError` for a file that
    is damaged, that asks for anything but arrays, integers and containers, or that is not a table [Q, 2].
    """
    try:
        with path.open("rb") as file:
            rows = _read_npy(file)
    except DatasetError as error:
        raise DatasetError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can make the reader raise almost anything, MemoryError too
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(f"{path}: is not a readable .npy file ({reason}); fetch it again") from error
    table: dict[int, IntArray] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != 2:
            raise DatasetError(f"{path}: row {number} is not (query index, right reference indices): {str(row)[:60]}")
        query = _integers(row[0], path, number)
        if query.size != 1:
            raise DatasetError(f"{path}: row {number} has the query index {str(row[0])[:60]}; expected one integer")
        if int(query[0]) in table:
            raise DatasetError(f"{path}: row {number} is the second one for query {query[0]}; expected one each")
        table[int(query[0])] = np.unique(_integers(row[1], path, number))
    return table


def _integers(value: Any, path: Path, row: int) -> IntArray:
    """int64 [n] from an integer or a flat collection of integers."""
    if isinstance(value, _PickledArray):
        value = value.to_lists()
    values = list(value) if isinstance(value, (list, tuple, set, frozenset)) else [value]
    values = [item.to_lists() if isinstance(item, _PickledArray) else item for item in values]
    if not all(isinstance(item, int) and not isinstance(item, bool) and abs(item) < 2**63 for item in values):
        raise DatasetError(f"{path}: row {row} holds {str(value)[:60]}; expected integers")
    return np.array(values, dtype=np.int64)


def _read_npy(file: BinaryIO) -> list[Any]:
    """The rows of the array in a .npy file as nested lists, pickled (object) or plain."""
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }.get(version)
    if read_header is None:
        raise DatasetError(f".npy version {version} is not known; save the table with numpy.save")
    shape, _, dtype = read_header(file)
    if not dtype.hasobject:
        file.seek(0)
        rows = np.lib.format.read_array(file, allow_pickle=False).tolist()
    else:
        array = _ArraysOnlyUnpickler(io.BytesIO(file.read()), encoding="latin1").load()
        rows = array.to_lists() if isinstance(array, _PickledArray) else None
    if len(shape) != 2 or shape[1] != 2 or not isinstance(rows, list) or len(rows) != shape[0]:
        raise DatasetError(f"holds an array of shape {list(shape)}; expected [queries, 2]: (query, right references)")
    return rows


class _PickledDtype:
    """Stand-in for numpy.dtype in a pickle: remembers the type's code and byte order."""

    def __init__(self, code: str, *_: object) -> None:
        self.code, self.byte_order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.byte_order = {"|": "=", "=": "=", "<": "<", ">": ">"}[state[1]]

    @property
    def is_object(self) -> bool:
        return self.code in ("O", "O8", "O4")

    def decode(self, data: bytes | str) -> list[int]:
        if self.code not in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"):
            raise DatasetError(f"holds values of type {self.code!r}; expected integers")
        raw = data.encode("latin1") if isinstance(data, str) else data  # Python 2 wrote bytes as text
        return [int(value) for value in np.frombuffer(raw, dtype=self.byte_order + self.code)]


class _PickledArray:
    """Stand-in for numpy.ndarray in a pickle: shape and flat values, in plain Python."""

    def __init__(self, *_: object) -> None:
        self.shape: tuple[int, ...] = (0,)
        self.values: list[Any] = []

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, _, data = state  # objects are listed row by row in either memory order
        values = list(data) if dtype.is_object else dtype.decode(data)
        if len(shape) > 2 or math.prod(shape) != len(values):
            raise DatasetError(f"holds an array of shape {list(shape)} with {len(values)} values; it is damaged")
        self.shape, self.values = tuple(shape), values

    def to_lists(self) -> Any:
        """As ndarray.tolist(): one value for no dimension, a list for one, a list of rows for two."""
        if not self.shape:
            return self.values[0]
        if len(self.shape) == 1:
            return self.values
        width = self.shape[1]
        return [self.values[row * width : (row + 1) * width] for row in range(self.shape[0])]


class _PickledScalar(_PickledArray):
    """Stand-in for an integer of a numpy type: an array without dimensions."""

    def __init__(self, dtype: _PickledDtype, data: bytes | str) -> None:
        super().__init__()
        self.__setstate__((1, (), dtype, False, data))


class _PickledBytes(bytes):
    """Stand-in for the call by which pickle protocols 0 to 2 make bytes from text."""

    def __new__(cls, text: str, *_: object) -> _PickledBytes:
        return super().__new__(cls, text.encode("latin1"))


# What a pickle may name, and what it gets. Every entry is inert: none calls numpy's own reconstruction.
_ALLOWED_GLOBALS: dict[str, type] = {
    "numpy.ndarray": _PickledArray,
    "numpy.dtype": _PickledDtype,
    "numpy._core.multiarray._reconstruct": _PickledArray,
    "numpy._core.multiarray.scalar": _PickledScalar,
    "numpy.core.multiarray._reconstruct": _PickledArray,  # numpy 1
    "numpy.core.multiarray.scalar": _PickledScalar,
    "_codecs.encode": _PickledBytes,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "__builtin__.set": set,  # Python 2
    "__builtin__.frozenset": frozenset,
}


class _ArraysOnlyUnpickler(pickle._Unpickler):
    """Unpickles arrays of integers and containers into the stand-ins above, and refuses everything else.

    Built on the unpickler written in Python: the one in C takes gigabytes for a damaged file's memo numbers.
    """

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name not in _ALLOWED_GLOBALS:
            raise DatasetError(
                f"asks to load {full_name}, which could run code; only arrays of integers are read, so get "
                "the file from a source that you trust or save the table anew"
            )
        return _ALLOWED_GLOBALS[full_name]
