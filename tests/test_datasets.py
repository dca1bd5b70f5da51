"""Readers of evaluation sets: right references, and clear errors for folders of another kind."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tetra.datasets import (
    PlaceDataset,
    _within_radius,
    load_dataset,
    parse_utm_name,
    read_vpr_bench_ground_truth,
)
from tetra.errors import DatasetError

EVAL_SETS = Path(__file__).resolve().parents[2] / "shared" / "data" / "eval"


def make_images(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)


def refuse(action: Callable[[], object], *words: str) -> None:
    """``action`` raises a DatasetError of one line that holds all ``words``."""
    with pytest.raises(DatasetError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


# --- UTM folders --------------------------------------------------------------------------------------------


def utm_name(east: float, north: float, rest: str = "@10@S@37.7@-122.4@@@.jpg") -> str:
    return f"@{east:.2f}@{north:.2f}{rest}"


def make_utm(folder: Path, references: list[tuple[float, float]], queries: list[tuple[float, float]]) -> None:
    make_images(folder / "database", *(utm_name(*place) for place in references))
    make_images(folder / "queries", *(utm_name(*place) for place in queries))


def test_utm_folders(tmp_path: Path) -> None:
    make_utm(tmp_path, [(500, 1000), (525, 1000), (500, 1030), (900, 900)], [(500, 1000), (700, 700), (510, 1010)])
    dataset = load_dataset(tmp_path)
    assert (dataset.name, dataset.layout) == (tmp_path.name, "utm")
    assert (dataset.num_references, dataset.num_queries) == (4, 3)
    right = {
        query.name: sorted(dataset.database_paths[row].name for row in rows)
        for query, rows in zip(dataset.query_paths, dataset.ground_truth, strict=True)
    }
    assert right == {
        utm_name(500, 1000): [utm_name(500, 1000), utm_name(525, 1000)],  # 25 m away is within 25 m
        utm_name(700, 700): [],
        utm_name(510, 1010): [utm_name(500, 1000), utm_name(500, 1030), utm_name(525, 1000)],
    }


def test_utm_radius(tmp_path: Path) -> None:
    make_utm(tmp_path, [(0, 0), (10, 0), (30, 0)], [(0, 0)])
    assert [load_dataset(tmp_path, radius_m=r).ground_truth[0].tolist() for r in (0, 10, 29.99, 30)] == [
        [0],
        [0, 1],
        [0, 1],
        [0, 1, 2],
    ]


@pytest.mark.parametrize("radius_m", [-1.0, float("nan"), float("inf")])
def test_radius_is_checked(tmp_path: Path, radius_m: float) -> None:
    make_utm(tmp_path, [(0, 0)], [(0, 0)])
    refuse(lambda: load_dataset(tmp_path, radius_m=radius_m), "radius", str(radius_m))


@pytest.mark.parametrize("place", ["test", "images/test"])
def test_utm_folders_below_test(tmp_path: Path, place: str) -> None:
    make_utm(tmp_path / place, [(0, 0)], [(0, 0)])
    assert load_dataset(tmp_path).num_references == 1


def test_utm_subfolders_are_searched(tmp_path: Path) -> None:
    make_images(tmp_path / "database", "north/" + utm_name(0, 0), "south/" + utm_name(5, 5))
    make_images(tmp_path / "queries", utm_name(1, 1))
    assert load_dataset(tmp_path).ground_truth[0].tolist() == [0, 1]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 40),
    st.integers(1, 10),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 1.0, 3.7, 25.0, 200.0]),
)
def test_radius_search_equals_the_full_table(n_references: int, n_queries: int, seed: int, radius_m: float) -> None:
    rng = np.random.default_rng(seed)
    database_m = rng.integers(-60, 60, (n_references, 2)).astype(np.float64)  # whole metres: many exact ties
    queries_m = rng.integers(-60, 60, (n_queries, 2)).astype(np.float64)
    table = ((database_m[None] - queries_m[:, None]) ** 2).sum(-1) <= radius_m**2
    for rows, expected in zip(_within_radius(database_m, queries_m, radius_m), table, strict=True):
        assert rows.dtype == np.int64
        assert rows.tolist() == np.flatnonzero(expected).tolist()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "@543256.96@4178906.70@10@S@037.76@-122.51@id@@@@@@201903@@.jpg",
            ((543256.96, 4178906.70), "10 north"),
        ),
        ("@543256.96@4178906.70@10@@.jpg", ((543256.96, 4178906.70), "10")),
        ("@0543256.960@-12.5@@@@@.jpg", ((543256.96, -12.5), "")),
        ("@1e5@2@.png", ((1e5, 2.0), "")),
        ("@1.5@2.5.jpg", ((1.5, 2.5), "")),
        ("@1@2@ 7 @m@.jpg", ((1.0, 2.0), "7 south")),
    ],
)
def test_utm_names(name: str, expected: tuple[tuple[float, float], str]) -> None:
    assert parse_utm_name(Path("database") / name) == expected


@pytest.mark.parametrize(
    "name",
    [
        "IMG_0001.jpg",
        "543256@4178906@.jpg",
        "@543256.jpg",
        "@x@y@.jpg",
        "@@@.jpg",
        "@nan@1@.jpg",
        "@1@inf@.jpg",
    ],
)
def test_utm_names_that_do_not_parse(tmp_path: Path, name: str) -> None:
    make_utm(tmp_path, [(0, 0)], [(0, 0)])
    make_images(tmp_path / "queries", name)
    refuse(lambda: load_dataset(tmp_path), name, "expected @UTM_east@UTM_north@")


def test_utm_zone_number_out_of_range(tmp_path: Path) -> None:
    make_utm(tmp_path, [(0, 0)], [(0, 0)])
    make_images(tmp_path / "queries", "@1@2@61@S@.jpg")
    refuse(lambda: load_dataset(tmp_path), "@1@2@61@S@.jpg", "'61'", "1 to 60")


@pytest.mark.parametrize("rest", ["@11@S@.jpg", "@9@T@.jpg", "@10@C@.jpg", "@10@@.jpg"])
def test_utm_zones_that_touch_are_refused(tmp_path: Path, rest: str) -> None:
    make_utm(tmp_path, [(0, 0)], [(0, 0)])
    make_images(tmp_path / "queries", utm_name(1, 1, rest))
    refuse(lambda: load_dataset(tmp_path), utm_name(1, 1, rest), "zone", "10 north")


def test_utm_zones_meet_round_the_earth(tmp_path: Path) -> None:
    make_images(tmp_path / "database", "@1@2@1@S@.jpg")
    make_images(tmp_path / "queries", "@1@2@60@S@.jpg")
    refuse(lambda: load_dataset(tmp_path), "zone", "1 north", "60 north")


def test_utm_zones_that_lie_apart_share_no_places(tmp_path: Path) -> None:
    make_images(tmp_path / "database", "@1@2@10@S@a.jpg", "@1@2@33@U@b.jpg", "@5@2@10@T@c.jpg")
    make_images(tmp_path / "queries", "@1@2@10@S@.jpg", "@1@2@33@U@.jpg", "@1@2@56@H@.jpg")
    dataset = load_dataset(tmp_path)
    assert [path.name for path in dataset.database_paths] == ["@1@2@10@S@a.jpg", "@1@2@33@U@b.jpg", "@5@2@10@T@c.jpg"]
    assert [rows.tolist() for rows in dataset.ground_truth] == [[0, 2], [1], []]


def test_utm_names_without_a_zone_among_several(tmp_path: Path) -> None:
    make_images(tmp_path / "database", "@1@2@10@S@.jpg", "@1@2@33@U@.jpg")
    make_images(tmp_path / "queries", "@1@2@@@.jpg")
    refuse(lambda: load_dataset(tmp_path), "@1@2@@@.jpg", "no UTM zone", "10 north and 33 north")


def test_utm_bands_of_one_hemisphere_and_missing_zones_agree(tmp_path: Path) -> None:
    make_utm(tmp_path, [(0, 0)], [(0, 0)])
    make_images(tmp_path / "queries", utm_name(1, 1, "@10@T@.jpg"), utm_name(2, 2, "@@@.jpg"))
    assert load_dataset(tmp_path).num_queries == 3


def test_utm_without_any_right_reference(tmp_path: Path) -> None:
    make_utm(tmp_path, [(0, 0)], [(100, 0), (200, 0)])
    refuse(lambda: load_dataset(tmp_path), str(tmp_path), "none of the 2 queries", "25 m", "radius")


# --- VPR-Bench ----------------------------------------------------------------------------------------------


def make_vpr_bench(folder: Path, n_queries: int, n_references: int, ground_truth: Any) -> Path:
    make_images(folder / "query", *(f"{i}.png" for i in range(n_queries)))
    make_images(folder / "ref", *(f"{i}.png" for i in range(n_references)))
    np.save(folder / "ground_truth_new.npy", ground_truth, allow_pickle=True)
    return folder


def object_table(rows: list[tuple[Any, Any]]) -> np.ndarray:
    table = np.empty((len(rows), 2), dtype=object)
    for i, (query, right) in enumerate(rows):
        table[i, 0], table[i, 1] = query, right
    return table


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((0, np.array([[3], [1]])[:, 0]), [1, 3]),
        ((0, [2, 1]), [1, 2]),
        ((0, (3,)), [3]),
        ((0, 3), [3]),
        ((0, []), []),
        ((0, {1, 3}), [1, 3]),
        ((0, [1, 1, 2]), [1, 2]),
        ((np.int64(0), [np.int32(2), np.uint8(3)]), [2, 3]),
        (([0], np.array([3, 0])), [0, 3]),
        ((np.array([0], dtype=">i4"), np.array([2, 1], dtype=">i2")), [1, 2]),
        ((np.array(0), np.array([], dtype=np.int64)), []),
        (([0], np.array([1, 2], dtype=object)), [1, 2]),
    ],
)
def test_ground_truth_in_all_its_forms(tmp_path: Path, row: tuple[Any, Any], expected: list[int]) -> None:
    dataset = load_dataset(make_vpr_bench(tmp_path, 2, 4, object_table([row, (1, [0])])))
    assert (dataset.layout, dataset.num_queries, dataset.num_references) == ("vpr-bench", 2, 4)
    assert [rows.tolist() for rows in dataset.ground_truth] == [expected, [0]]
    assert all(rows.dtype == np.int64 for rows in dataset.ground_truth)


def test_rows_go_by_their_query_index(tmp_path: Path) -> None:
    dataset = load_dataset(make_vpr_bench(tmp_path, 3, 3, object_table([(2, [0]), (0, [1]), (1, [2])])))
    assert [rows.tolist() for rows in dataset.ground_truth] == [[1], [2], [0]]


def test_images_are_counted_in_natural_order(tmp_path: Path) -> None:
    dataset = load_dataset(make_vpr_bench(tmp_path, 1, 11, object_table([(0, [10])])))
    assert dataset.database_paths[dataset.ground_truth[0][0]].name == "10.png"


def test_a_plain_integer_table(tmp_path: Path) -> None:
    dataset = load_dataset(make_vpr_bench(tmp_path, 2, 5, np.array([[0, 4], [1, 2]])))
    assert [rows.tolist() for rows in dataset.ground_truth] == [[4], [2]]


def test_a_table_in_fortran_order(tmp_path: Path) -> None:
    table = np.asfortranarray(object_table([(0, [1, 2]), (1, [0]), (2, 2)]))
    assert not table.flags.c_contiguous
    dataset = load_dataset(make_vpr_bench(tmp_path, 3, 3, table))
    assert [rows.tolist() for rows in dataset.ground_truth] == [[1, 2], [0], [2]]


@pytest.mark.parametrize(
    ("protocol", "values"),
    [(protocol, row) for protocol in range(5) for row in [(0, [1, 2]), (np.int64(0), np.array([1, 2])), (0, {1, 2})]],
)
@pytest.mark.parametrize("module", [b"numpy._core.", b"numpy.core."])
def test_every_protocol_that_numpy_has_saved_with(
    tmp_path: Path, protocol: int, values: tuple[Any, Any], module: bytes
) -> None:
    table = object_table([values, (1, [0])])
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(table))
    pickled = pickle.dumps(table, protocol=protocol)
    if protocol < 4:  # numpy 1 had no underscore; later protocols count the letters of a name
        pickled = pickled.replace(b"numpy._core.", module)
    (tmp_path / "a.npy").write_bytes(file.getvalue() + pickled)
    table_read = read_vpr_bench_ground_truth(tmp_path / "a.npy")
    assert {query: rows.tolist() for query, rows in table_read.items()} == {0: [1, 2], 1: [0]}


class _Bomb:
    """Unpickles to a call of ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.mkdir, "mkdir"), (eval, "builtins.eval"), (getattr, "builtins.getattr"), (np.fromfile, "fromfile")],
)
def test_a_pickle_that_would_run_code_is_refused_and_not_run(
    tmp_path: Path, function: Callable[..., Any], name: str
) -> None:
    target = tmp_path / "made_by_the_pickle"
    arguments = {"mkdir": (str(target),), "builtins.eval": (f"__import__('os').mkdir({str(target)!r})",)}
    bomb = _Bomb(function, *arguments.get(name, (str(target), "x")))
    folder = make_vpr_bench(tmp_path / "set", 1, 1, object_table([(0, bomb)]))
    refuse(lambda: load_dataset(folder), "ground_truth_new.npy", name, "run code")
    assert not target.exists()
    if name == "mkdir":  # the bomb is live: numpy's own reader sets it off
        np.load(folder / "ground_truth_new.npy", allow_pickle=True)
        assert target.exists()


def test_objects_of_other_classes_are_refused(tmp_path: Path) -> None:
    folder = make_vpr_bench(tmp_path, 1, 1, object_table([(0, Path("x"))]))
    refuse(lambda: load_dataset(folder), "ground_truth_new.npy", "pathlib")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([(0, [0]), (1, [4])], ("query 1", "reference 4", "4 reference images")),
        ([(0, [0]), (1, [-1])], ("query 1", "reference -1")),
        ([(0, [0]), (2, [1])], ("names query 2", "2 images")),
        ([(-1, [0]), (0, [1])], ("names query -1",)),
        ([(0, [0]), (0, [1])], ("row 1", "second", "query 0")),
        ([(0, [0])], ("1 queries", "2")),
        ([(0, [0]), (1, [1]), (2, [1])], ("query 2", "2 images")),
        ([(0, [0]), (1, ["a"])], ("row 1", "'a'", "integers")),
        ([(0, [0]), (1, [1.5])], ("row 1", "1.5", "integers")),
        ([(0, [0]), (1, [2**70])], ("row 1", str(2**70), "integers")),
        ([(0, [0]), (1, None)], ("row 1", "None", "integers")),
        ([(0, [0]), ([1, 2], [0])], ("row 1", "query index", "one integer")),
        ([(0, []), (1, [])], ("no query", "right reference")),
        ([(0, [0]), (1, np.array([0.5]))], ("f8", "integers")),
        ([(0, [0]), (1, np.array(["x"]))], ("U1", "integers")),
    ],
)
def test_ground_truth_that_does_not_fit(tmp_path: Path, rows: list[tuple[Any, Any]], words: tuple[str, ...]) -> None:
    folder = make_vpr_bench(tmp_path, 2, 4, object_table(rows))
    refuse(lambda: load_dataset(folder), "ground_truth_new.npy", *words)


@pytest.mark.parametrize("table", [np.arange(4), np.zeros((2, 3), dtype=int), np.zeros((2, 2, 2), dtype=int)])
@pytest.mark.parametrize("dtype", [np.int64, object])
def test_tables_of_another_shape(tmp_path: Path, table: np.ndarray, dtype: type) -> None:
    folder = make_vpr_bench(tmp_path, 2, 4, table.astype(dtype))
    refuse(lambda: load_dataset(folder), "ground_truth_new.npy", str(list(table.shape)))


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.3, 0.6, 0.97])
def test_truncated_ground_truth(tmp_path: Path, keep: float) -> None:
    folder = make_vpr_bench(tmp_path, 2, 4, object_table([(0, [0, 1, 2]), (1, [2, 3])]))
    path = folder / "ground_truth_new.npy"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    refuse(lambda: load_dataset(folder), "ground_truth_new.npy", "not a readable .npy file")


def test_damaged_ground_truth_never_raises_anything_else(tmp_path: Path) -> None:
    folder = make_vpr_bench(tmp_path, 2, 4, object_table([(np.int64(0), np.array([0, 1])), (1, [2, 3])]))
    path = folder / "ground_truth_new.npy"
    whole = path.read_bytes()
    n_refused = 0
    for position in range(len(whole)):
        for flip in (0xFF, 0x01, 0x10):
            damaged = bytearray(whole)
            damaged[position] ^= flip
            path.write_bytes(damaged)
            try:
                read_vpr_bench_ground_truth(path)
            except DatasetError:  # anything else fails the test
                n_refused += 1
    assert n_refused > len(whole) / 4


def test_missing_ground_truth_points_to_match(tmp_path: Path) -> None:
    (make_vpr_bench(tmp_path, 1, 1, object_table([(0, [0])])) / "ground_truth_new.npy").unlink()
    refuse(lambda: load_dataset(tmp_path), "ground_truth_new.npy", "no such file", "tetra match")


@pytest.mark.parametrize("name", ["corridor", "gardens_point"])
def test_real_sets_agree_with_numpy(name: str) -> None:
    folder = EVAL_SETS / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    dataset = load_dataset(folder)
    assert (dataset.name, dataset.layout) == (name, "vpr-bench")
    table = np.load(folder / "ground_truth_new.npy", allow_pickle=True)
    assert len(table) == dataset.num_queries
    for query, right in table:
        assert dataset.ground_truth[query].tolist() == sorted(right)
        # The frames of these sets are aligned by name, two to either side counting as right.
        assert query in right


# --- either layout ------------------------------------------------------------------------------------------


def test_layout_can_be_named(tmp_path: Path) -> None:
    make_utm(tmp_path, [(0, 0)], [(0, 0)])
    make_vpr_bench(tmp_path, 2, 3, object_table([(0, [0]), (1, [2])]))
    assert load_dataset(tmp_path, "utm").layout == "utm"
    assert load_dataset(tmp_path, "vpr-bench").layout == "vpr-bench"
    refuse(lambda: load_dataset(tmp_path), str(tmp_path), "--layout utm", "--layout vpr-bench")
    refuse(lambda: load_dataset(tmp_path, "vprbench"), "'vprbench'", "auto, utm, vpr-bench")


@pytest.mark.parametrize(
    ("layout", "words"),
    [("auto", ("database/", "query/")), ("utm", ("database/",)), ("vpr-bench", ("query/",))],
)
def test_a_folder_of_another_kind(tmp_path: Path, layout: str, words: tuple[str, ...]) -> None:
    make_images(tmp_path, "somewhere/a.png")
    refuse(lambda: load_dataset(tmp_path, layout), str(tmp_path), *words, "holds somewhere/", "tetra match")


def test_missing_folder_and_file(tmp_path: Path) -> None:
    refuse(lambda: load_dataset(tmp_path / "none"), "none", "no such folder")
    (tmp_path / "a.txt").touch()
    refuse(lambda: load_dataset(tmp_path / "a.txt"), "a.txt", "is a file")


@pytest.mark.parametrize("empty", ["database", "queries"])
def test_folder_without_images(tmp_path: Path, empty: str) -> None:
    make_utm(tmp_path, [(0, 0)], [(0, 0)])
    for path in (tmp_path / empty).iterdir():
        path.unlink()
    refuse(lambda: load_dataset(tmp_path), str(tmp_path / empty), "no images", ".jpg")


def test_dataset_checks_its_ground_truth() -> None:
    paths = [Path("a"), Path("b")]
    refuse(lambda: PlaceDataset("x", "utm", paths, paths, [np.array([0])]), "1 queries", "2 query images")
    refuse(
        lambda: PlaceDataset("x", "utm", paths, paths, [np.array([0]), np.array([2])]),
        "query 1",
        "reference 2",
    )


def test_subset_renumbers() -> None:
    references, queries = [Path(f"r{i}") for i in range(5)], [Path(f"q{i}") for i in range(3)]
    dataset = PlaceDataset("x", "utm", references, queries, [np.array([0, 4]), np.array([1, 2]), np.array([3])])
    part = dataset.subset([2, 0], [4, 3, 1])
    assert part.query_paths == [Path("q2"), Path("q0")]
    assert part.database_paths == [Path("r4"), Path("r3"), Path("r1")]
    assert [rows.tolist() for rows in part.ground_truth] == [[1], [0]]
    assert dataset.num_queries == 3
