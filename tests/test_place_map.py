"""Place maps against a plain model of them, and everything that has to be refused."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors import safe_open

from tetra.coordinates import LOCAL, CoordinateFrame
from tetra.errors import MapError, TetraError
from tetra.files import save
from tetra.journal import Journal
from tetra.kernels import HammingDatabase, pack_bits
from tetra.map_columns import Added, Blobs, Ids, Places, Removed, hash_ids
from tetra.map_manifest import read_manifest
from tetra.map_segments import Segment
from tetra.map_tiers import join_youngest, pack_all
from tetra.model import TetraModel
from tetra.place_map import Hits, PlaceMap, Region

B = 5
HASH = "ab" * 32
UTM = CoordinateFrame("utm", 32, "north")
JPEG = b"\xff\xd8\xff\xe0 not really"


def make_codes(n: int, seed: int = 0, n_bytes: int = B) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (n, n_bytes), dtype=np.uint8)


def create(path: Path, **options: Any) -> PlaceMap:
    return PlaceMap.create(path, **{"model_hash": HASH, "code_bytes": B, "frame": LOCAL, **options})


@pytest.fixture
def map(tmp_path: Path) -> Iterator[PlaceMap]:
    with create(tmp_path / "map") as places:
        yield places


def refuse(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(TetraError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# --- the model: what a map should do, in a page ---


@dataclass
class Place:
    """One place of the plain model."""

    id: str
    row: int
    code: npt.NDArray[np.uint8]
    position: tuple[float, float] | None = None
    heading: float | None = None
    time: float | None = None
    metadata: dict[str, Any] | None = None
    thumbnail: bytes | None = None


@dataclass
class Model:
    """A map as a dict."""

    places: dict[str, Place] = field(default_factory=dict)
    next_row: int = 0

    def add(self, id: str, code: npt.NDArray[np.uint8], **rest: Any) -> None:
        assert id not in self.places
        self.places[id] = Place(id, self.next_row, code, **rest)
        self.next_row += 1

    def search(
        self, codes: npt.NDArray[np.uint8], k: int, inside: Callable[[Place], bool] = lambda place: True
    ) -> list[list[tuple[int, int]]]:
        """(distance, row) of the nearest, best first, for each code."""
        return [
            sorted((int(np.unpackbits(code ^ p.code).sum()), p.row) for p in self.places.values() if inside(p))[:k]
            for code in codes
        ]


def hits_as_lists(hits: Hits) -> list[list[tuple[int, int]]]:
    assert hits.distances.dtype == np.int32
    assert hits.rows.dtype == np.int64
    assert hits.distances.shape == hits.rows.shape
    assert ((hits.rows < 0) == (hits.distances < 0)).all()
    assert (hits.rows >= -1).all()
    found = [
        [(int(d), int(r)) for d, r in zip(ds, rs, strict=True)]
        for ds, rs in zip(hits.distances, hits.rows, strict=True)
    ]
    for row in found:
        n = sum(r >= 0 for _, r in row)
        assert all(r < 0 for _, r in row[n:])
    return [[pair for pair in row if pair[1] >= 0] for row in found]


def assert_same(places: PlaceMap, model: Model) -> None:
    """The map holds what the model holds, in its order and with its rows."""
    expected = sorted(model.places.values(), key=lambda place: place.row)
    rows = places.rows()
    assert len(places) == len(expected)
    assert rows.tolist() == [place.row for place in expected]
    assert places.ids(rows) == [place.id for place in expected]
    assert places.rows_of([place.id for place in expected]).tolist() == rows.tolist()
    if not expected:
        return
    assert (places.codes(rows) == np.stack([place.code for place in expected])).all()
    unknown = (np.nan, np.nan)
    np.testing.assert_array_equal(places.positions(rows), [place.position or unknown for place in expected])
    headings = [np.nan if place.heading is None else np.float32(place.heading) for place in expected]
    np.testing.assert_array_equal(places.headings(rows), headings)
    np.testing.assert_array_equal(places.times(rows), [np.nan if p.time is None else p.time for p in expected])
    assert places.metadata(rows) == [place.metadata for place in expected]
    assert places.thumbnails(rows) == [place.thumbnail for place in expected]


NAMES = st.text("abcdefghij/é", min_size=1, max_size=4).filter(lambda t: "" not in t.split("/"))
METRES = st.floats(-1e6, 1e6, allow_subnormal=False)
POSITIONS = st.none() | st.tuples(METRES, METRES)
PLACES = st.fixed_dictionaries(
    {
        "code": st.integers(0, 7).map(lambda i: make_codes(8, 1)[i]),  # few codes: many ties
        "position": POSITIONS,
        "heading": st.none() | st.sampled_from([0.0, 90.0, 271.5, 359.5]),
        "time": st.none() | st.floats(-1e9, 1e9),
        "metadata": st.none() | st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=2),
        "thumbnail": st.none() | st.binary(max_size=9).map(lambda b: b"\xff\xd8\xff" + b),
    }
)


class MapMachine(RuleBasedStateMachine):
    """Anything in any order, on a map whose journal and segments are tiny, beside a reader that follows."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.old: list[Place] = []

    @initialize()
    def begin(self) -> None:
        import tempfile

        self.folder = Path(tempfile.mkdtemp())
        self.map = create(self.folder / "map", sync_seconds=1000)
        self.limit()
        self.reader = PlaceMap.open(self.folder / "map", read_only=True)

    def limit(self) -> None:
        self.map.journal_limit_records = 7
        self.map.journal_limit_bytes = 1500
        self.map.segment_limit_bytes = 9000

    def teardown(self) -> None:
        self.map.close()
        shutil.rmtree(self.folder)

    def some(self, data: st.DataObject, least: int = 0) -> list[str]:
        names = sorted(self.model.places)
        return data.draw(st.lists(st.sampled_from(names), unique=True, min_size=least)) if names else []

    @rule(id=NAMES, place=PLACES)
    def add(self, id: str, place: dict[str, Any]) -> None:
        rest = {k: v for k, v in place.items() if k not in ("code", "position")}
        if id in self.model.places:
            refuse(lambda: self.map.add(id, place["code"], place["position"], **rest), repr(id), "already")
            return
        code = torch.from_numpy(place["code"]) if len(id) % 2 else place["code"]
        assert self.map.add(id, code, place["position"], **rest) == self.model.next_row
        self.model.add(id, **place)

    @rule(batch=st.dictionaries(NAMES, PLACES, max_size=25))
    def add_many(self, batch: dict[str, dict[str, Any]]) -> None:
        batch = {id: place for id, place in batch.items() if id not in self.model.places}
        columns = {
            f"{k}s": [place[k] for place in batch.values()] for k in ("position", "heading", "time", "thumbnail")
        }
        codes = np.array([place["code"] for place in batch.values()], dtype=np.uint8).reshape(-1, B)
        metadata = [place["metadata"] for place in batch.values()]
        rows = self.map.add_many(list(batch), codes, metadata=metadata, **columns)
        assert rows.tolist() == list(range(self.model.next_row, self.model.next_row + len(batch)))
        for id, place in batch.items():
            self.model.add(id, **place)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        ids = self.some(data)
        self.map.remove(ids)
        self.old += [self.model.places.pop(id) for id in ids]

    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        ids = self.some(data)
        positions = [data.draw(st.tuples(METRES, METRES)) for _ in ids]
        self.map.update_positions(ids, positions)
        for id, position in zip(ids, positions, strict=True):
            self.model.places[id].position = position

    @rule()
    def save(self) -> None:
        self.map.save()
        assert self.map.statistics()["journal_records"] == 0

    @rule()
    def compact(self) -> None:
        self.map.compact()
        assert self.map.statistics()["removed"] == 0

    @rule()
    def reopen(self) -> None:
        self.map.close()
        self.map = PlaceMap.open(self.folder / "map", sync_seconds=1000)
        self.limit()

    @rule()
    def follow(self) -> None:
        self.reader.refresh()
        assert_same(self.reader, self.model)
        assert not self.reader.refresh()

    @precondition(lambda self: self.model.places)
    @rule(data=st.data())
    def search(self, data: st.DataObject) -> None:
        k = data.draw(st.integers(1, len(self.model.places)))
        codes = make_codes(8, 1)[: data.draw(st.integers(0, 8))]
        assert hits_as_lists(self.map.search(codes, k)) == self.model.search(codes, k)
        radius = data.draw(st.integers(0, 8 * B))
        near = [[hit for hit in hits if hit[0] <= radius] for hits in self.model.search(codes, k)]
        assert hits_as_lists(self.map.search(codes, k, max_distance=radius)) == near
        x, y = data.draw(METRES), data.draw(METRES)

        def inside(place: Place) -> bool:
            return place.position is not None and place.position[0] >= x and place.position[1] <= y

        within = Region.box((x, -1e7), (1e7, y))
        assert hits_as_lists(self.map.search(codes, k, within=within)) == self.model.search(codes, k, inside)

    @invariant()
    def same(self) -> None:
        assert_same(self.map, self.model)
        gone = [place.row for place in self.old]
        assert self.map.ids(gone) == [None] * len(gone)
        assert self.map.rows_of([p.id for p in self.old if p.id not in self.model.places]).tolist() == [-1] * sum(
            p.id not in self.model.places for p in self.old
        )
        # No file is left over, and few are needed.
        names = set(os.listdir(self.folder / "map"))
        assert names == read_manifest(self.folder / "map").files | {"map.json", "lock"}
        assert self.map.verify() == self.map.statistics()["bytes"]


MapMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
test_anything_in_any_order = MapMachine.TestCase


# --- places and their data ---


def test_a_place_with_everything_and_one_with_nothing(map: PlaceMap) -> None:
    codes = make_codes(2)
    assert len(map) == 0
    assert "a" not in map
    assert map.rows().tolist() == []
    about = {"name": "Zürich", "list": [1, {"x": None}], "π": 3.25}
    assert (
        map.add(
            "street/a.jpg",
            torch.from_numpy(codes[0]),
            (1.5, -2.5),
            heading=-90,
            time=5.0,
            metadata=about,
            thumbnail=JPEG,
        )
        == 0
    )
    assert map.add("b", codes[1], None) == 1
    for _ in range(3):
        assert len(map) == 2
        assert "street/a.jpg" in map
        assert 3 not in map
        full, bare = (map.query(code, 1)[0] for code in codes)
        assert (full.id, full.row, full.distance, full.position, full.time) == ("street/a.jpg", 0, 0, (1.5, -2.5), 5.0)
        assert full.heading == 270.0
        assert full.metadata == about
        assert full.similarity is None
        assert (bare.id, bare.position, bare.heading, bare.time, bare.metadata) == ("b", None, None, None, None)
        assert map.thumbnails([0, 1, 7, -1]) == [JPEG, None, None, None]
        assert map.ids([1, 7, -1]) == ["b", None, None]
        assert np.isnan(map.positions([[1, 7, -1]])).all()
        assert map.positions([[0]]).shape == (1, 1, 2)
        assert map.codes([1, 9]).tolist() == [codes[1].tolist(), [0] * B]
        map.save()


def test_rows_stay_when_places_go(map: PlaceMap) -> None:
    codes = make_codes(100)
    map.add_many([f"{i}" for i in range(100)], codes, None)
    hits = map.search(codes[90:91], 3)
    map.remove([f"{i}" for i in range(90) if i % 3])
    before = map.rows().tolist()
    map.compact()
    assert map.rows().tolist() == before == [i for i in range(100) if i % 3 == 0 or i >= 90]
    assert map.ids(hits.rows[0])[0] == "90"
    map.remove([f"{i}" for i in before])
    map.compact()
    assert map.statistics() | {"bytes": 0, "journal_bytes": 0} == {
        "places": 0, "removed": 0, "segments": 0, "bytes": 0, "journal_bytes": 0, "journal_records": 0
    }  # fmt: skip
    assert map.add("5", codes[5], None) == 100


def test_an_id_may_come_back(map: PlaceMap) -> None:
    codes = make_codes(4)
    for i, code in enumerate(codes):
        assert map.add("a", code, (i, i)) == i
        assert map.query(code)[0].row == i
        if i % 2:
            map.save()
        if i < 3:
            map.remove(["a", "a"])
            assert "a" not in map
    assert map.positions(map.row("a")).tolist() == [3.0, 3.0]


def test_headings_are_kept_from_0_to_below_360(map: PlaceMap) -> None:
    given = [0.0, -1e-20, 360.0, -360.0, 359.9999999999, -90.0, 450.0 - 360.0]
    map.add_many([f"{i}" for i in range(len(given))], make_codes(len(given)), None, headings=given)
    headings = map.headings(map.rows())
    assert ((headings >= 0) & (headings < 360)).all()
    assert headings.tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 270.0, 90.0]
    north = Region.heading(0, 1)
    assert [match.row for match in map.query(make_codes(1)[0], 9, within=north)] != []
    assert {match.row for match in map.query(make_codes(1)[0], 9, within=north)} == {0, 1, 2, 3, 4}


def test_times_in_any_order_are_kept(map: PlaceMap) -> None:
    """A clock that goes back, or ran wrongly, changes nothing: times are data."""
    times = [5.0, 4.0, -1e18, 4.0, 1.7e9, 0.0]
    for i, time in enumerate(times):
        map.add(f"{i}", make_codes(1, i)[0], None, time=time)
    map.compact()
    assert map.times(map.rows()).tolist() == times
    assert map.rows().tolist() == list(range(6))


def test_positions_of_all_can_move_at_once(map: PlaceMap) -> None:
    n = 1000
    codes, positions = make_codes(n), np.random.default_rng(3).uniform(-100, 100, (n, 2))
    ids = [f"{i}" for i in range(n)]
    map.add_many(ids[:600], codes[:600], positions[:600])
    map.save()
    map.add_many(ids[600:], codes[600:], positions[600:])
    segment = next(map.path.glob("segment-*"))
    before = segment.read_bytes()
    order = np.random.default_rng(4).permutation(n)
    map.update_positions([ids[i] for i in order], torch.from_numpy(positions[order] + 7))
    map.update_positions(ids[:1], [(1.0, 2.0)])
    expected = positions + 7
    expected[0] = (1, 2)
    for _ in range(2):
        assert (map.positions(np.arange(n)) == expected).all()
        assert (map.codes(np.arange(n)) == codes).all()
        map.save()
    assert segment.read_bytes() == before  # codes were not touched
    with PlaceMap.open(map.path, read_only=True) as reader:
        assert (reader.positions(np.arange(n)) == expected).all()


def test_a_long_journal_is_saved_by_itself_and_segments_stay_few(tmp_path: Path) -> None:
    with create(tmp_path / "map", sync_seconds=1000) as places:
        places.journal_limit_records = 10
        places.segment_limit_bytes = 40_000
        for i in range(2000):
            places.add(f"place {i}", make_codes(1, i)[0], (i, 0))
            assert places.statistics()["journal_records"] <= 10
        assert places.statistics()["segments"] < 20
        assert places.rows().tolist() == list(range(2000))
        # A batch larger than the journal may become goes straight into a segment.
        places.journal_limit_bytes = 5000
        places.add_many([f"batch {i}" for i in range(500)], make_codes(500), None)
        assert places.statistics()["journal_records"] == 0
        assert len(places) == 2500
        assert places.ids([1999, 2000, 2499]) == ["place 1999", "batch 0", "batch 499"]


@pytest.mark.parametrize(
    ("sizes", "limit", "first"),
    [
        ([], 100, 0),
        ([1], 100, 0),
        ([1, 1, 1], 1 << 30, 2),
        ([1, 1, 1, 1], 1 << 30, 0),
        ([1 << 25, 1, 1, 1, 1], 1 << 30, 1),
        ([1 << 25] * 3 + [1 << 23] * 4, 1 << 30, 0),  # four small ones make a large one, the fourth of its kind
        ([1 << 25] * 3 + [1 << 23] * 3, 1 << 30, 5),
        ([700, 700], 1000, 1),
        ([400, 400], 1000, 0),  # four would not fit
    ],
)
def test_which_segments_are_joined(sizes: list[int], limit: int, first: int) -> None:
    assert join_youngest(sizes, limit) == first


@pytest.mark.parametrize(
    ("sizes", "counts"), [([], []), ([5], [1]), ([50], [1]), ([3, 3, 4, 1], [3, 1]), ([50, 1, 50], [1, 1, 1])]
)
def test_packing_all_segments(sizes: list[int], counts: list[int]) -> None:
    assert pack_all(sizes, 10) == counts


def test_ten_million_adds_would_give_few_segments() -> None:
    sizes: list[int] = []
    n_copied = 0
    for _ in range(2000):
        sizes.append(5 << 20)
        first = join_youngest(sizes, 1 << 30)
        sizes[first:] = [sum(sizes[first:])]
        n_copied += sizes[-1]
        assert len(sizes) < 40
    assert n_copied < 7 * 2000 * (5 << 20)


def test_ids_with_one_hash(map: PlaceMap, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids are found by their hash and then compared, so two with one hash are two places."""
    monkeypatch.setattr("tetra.map_columns.hash_ids", lambda keys: hash_ids(keys) & np.uint64(1))
    ids = [f"place/{i}" for i in range(50)]
    map.add_many(ids, make_codes(50), None)
    map.save()
    assert map.rows_of([*ids, "other", "place"]).tolist() == [*range(50), -1, -1]
    map.remove(ids[10:20])
    assert map.rows_of(ids[5:25]).tolist() == [*range(5, 10), *[-1] * 10, *range(20, 25)]
    refuse(lambda: map.add("place/7", make_codes(1)[0], None), "'place/7'", "already")


def test_hashes_are_the_documented_ones() -> None:
    import hashlib

    keys = [b"a", "é/ü.jpg".encode(), b"x" * 512]
    expected = [int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") for key in keys]
    assert hash_ids(keys).tolist() == expected


@pytest.mark.parametrize("keep", [None, [], [0], [1, 2, 4], [0, 1, 2, 3, 4]])
def test_blobs(keep: list[int] | None) -> None:
    items = [b"", b"abc", b"d", b"", b"efgh"]
    blobs = Blobs.of(items)
    assert blobs.to_list() == items == [blobs[i] for i in range(5)]
    numbers = None if keep is None else np.array(keep, dtype=np.int64)
    expected = items if keep is None else [items[i] for i in keep]
    if numbers is None or len(numbers):
        assert b"".join(run.tobytes() for run in blobs.runs(numbers)) == b"".join(expected)
    if numbers is not None:
        assert blobs.take(numbers).to_list() == expected
        assert blobs.take(numbers[::-1]).to_list() == expected[::-1]


def test_segments_are_plain_safetensors_files(map: PlaceMap) -> None:
    codes = make_codes(3)
    map.add_many(["a", "bé", "c"], codes, [(1, 2), None, (3, 4)], metadata=[{"a": 1}, None, None])
    map.save()
    path = next(map.path.glob("segment-*"))
    with safe_open(path, "np") as file:
        about = json.loads(file.metadata()["tetra"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert about["kind"] == "tetra-place-map-segment"
    assert set(tensors) == {
        "id_hashes", "id_order", "positions", "times", "headings", "codes", "ids", "ids_offsets", "metadata",
        "metadata_offsets",
    }  # fmt: skip
    assert (tensors["codes"] == codes).all()
    assert tensors["ids"].tobytes() == "abéc".encode()
    assert tensors["ids_offsets"].tolist() == [0, 1, 4, 5]
    assert tensors["metadata"].tobytes() == b'{"a":1}'


# --- searching ---


def test_codes_are_searched_where_they_lie(map: PlaceMap) -> None:
    codes = make_codes(500)
    map.add_many([f"{i}" for i in range(500)], codes, None)
    map.save()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with PlaceMap.open(map.path, read_only=True) as reader:
            part = reader._state.parts[0]
            assert isinstance(part, Segment)
            assert reader.search(codes[3:4], 1).rows.tolist() == [[3]]
    assert not part.places.codes.flags.owndata
    assert not part.places.codes.flags.writeable
    assert part.codes.data_ptr() == part.places.codes.ctypes.data


@pytest.mark.parametrize("n", [1, 2, 17])
def test_regions(map: PlaceMap, n: int) -> None:
    rng = np.random.default_rng(n)
    positions, headings = rng.uniform(-10, 10, (n, 2)), rng.uniform(0, 360, n)
    known = [tuple(p) if i % 5 else None for i, p in enumerate(positions.tolist(), 1)]
    directions = [h if i % 4 else None for i, h in enumerate(headings.tolist(), 1)]
    map.add_many([f"{i}" for i in range(n)], make_codes(n), known, headings=directions)
    heading, x, y = 350.0, 1.0, 2.0
    cases: list[tuple[Region, Callable[[int], bool]]] = [
        (
            Region.circle((x, y), 6),
            lambda i: known[i] is not None and (known[i][0] - x) ** 2 + (known[i][1] - y) ** 2 <= 36,
        ),  # type: ignore[index]
        (
            Region.box((-5, -6), (7, 8)),
            lambda i: known[i] is not None and -5 <= known[i][0] <= 7 and -6 <= known[i][1] <= 8,
        ),  # type: ignore[index]
        (
            Region.heading(heading, 60),
            lambda i: directions[i] is not None and (directions[i] >= 290 or directions[i] <= 50),  # type: ignore[operator]
        ),
    ]
    cases.append((cases[0][0] & cases[2][0], lambda i: cases[0][1](i) and cases[2][1](i)))
    for region, inside in cases:
        rows = map.search(make_codes(1, 9), n, within=region).rows[0]
        assert sorted(rows[rows >= 0].tolist()) == [i for i in range(n) if inside(i)]
    nowhere = Region.circle((1e6, 1e6), 1)
    hits = map.search(make_codes(2, 9), 1, within=nowhere)
    assert hits.rows.tolist() == hits.distances.tolist() == [[-1], [-1]]
    assert map.query(make_codes(1)[0], 3, within=nowhere) == []


def test_regions_that_cannot_be() -> None:
    refuse(lambda: Region.circle((0, float("nan")), 1), "centre", "nan")
    refuse(lambda: Region.circle((0, 0), -1), "radius -1")
    refuse(lambda: Region.box((0, 0), (1, -1)), "low corner first")
    refuse(lambda: Region.box((0, 0), (1, float("inf"))), "finite")
    refuse(lambda: Region.heading(0, 181), "tolerance 181")
    refuse(lambda: Region.heading("east", 10), "'east'", "2 finite numbers")  # type: ignore[arg-type]
    refuse(lambda: Region.circle((0, 0, 0), 1), "(0, 0, 0)", "2 finite numbers")  # type: ignore[arg-type]
    refuse(lambda: Region.circle((0, 0), None), "radius", "1 finite number")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Region.circle((0, 0), 1) & 3  # type: ignore[operator]


def _with_history(path: Path, **options: Any) -> PlaceMap:
    """A map with several segments, removed and moved places in them, and places in the journal; many distances tie."""
    places = create(path, **options)
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 2, (400, B), dtype=np.uint8)
    for start in range(0, 400, 100):
        ids = [f"{i}" for i in range(start, start + 100)]
        places.add_many(ids, codes[start : start + 100], rng.random((100, 2)) * 100, headings=rng.random(100) * 360)
        places.remove(ids[::7])
        if start < 300:
            places.save()
    places.update_positions(["1", "150", "399"], [(50, 50)] * 3)
    places.remove(["2", "250", "396"])
    return places


def _assert_same_answers(one: PlaceMap, other: PlaceMap) -> None:
    queries = np.random.default_rng(4).integers(0, 2, (20, B), dtype=np.uint8)
    for k in (1, 7, len(one)):
        for max_distance in (None, 2):
            for within in (None, Region.circle((50, 50), 20) & Region.heading(0, 90), Region.circle((999, 0), 1)):
                mine = one.search(queries, k, max_distance=max_distance, within=within)
                its = other.search(queries, k, max_distance=max_distance, within=within)
                assert np.array_equal(mine.rows, its.rows)
                assert np.array_equal(mine.distances, its.distances)


GPU = pytest.mark.gpu


@pytest.mark.parametrize(
    "devices",
    [["cpu"], ["cpu"] * 3, pytest.param(["cuda"], marks=GPU), pytest.param(["cuda", "cpu", "cuda"], marks=GPU)],
)
def test_searches_on_devices_give_the_same_answers(tmp_path: Path, devices: list[str]) -> None:
    with (
        _with_history(tmp_path / "map") as places,
        PlaceMap.open(places.path, read_only=True, search_devices=devices) as reader,
    ):
        _assert_same_answers(reader, places)
        places.remove(["3", "397"])
        places.add("new", make_codes(1)[0], (50, 50))
        reader.refresh()
        _assert_same_answers(reader, places)
        places.compact()
        reader.refresh()
        assert reader.statistics()["segments"] == 1
        _assert_same_answers(reader, places)
    with _with_history(tmp_path / "writer", search_devices=devices) as writer:  # which sees its own changes
        writer.save()
        writer.add("new", make_codes(1)[0], (50, 50))
        with PlaceMap.open(writer.path, read_only=True) as reader:
            _assert_same_answers(writer, reader)


IN_THE_INTERPRETER = """
import sys
import numpy as np
from tetra.place_map import PlaceMap, Region
queries = np.random.default_rng(4).integers(0, 2, (3, 5), dtype=np.uint8)
with PlaceMap.open(sys.argv[1], read_only=True, search_devices=["cpu"]) as places:
    for within in (None, Region.circle((50, 50), 20)):
        hits = places.search(queries, 7, within=within)
        print([hits.rows.tolist(), hits.distances.tolist()])
"""


def test_the_kernels_of_gpus_give_the_same_answers(tmp_path: Path) -> None:
    with _with_history(tmp_path / "map") as places:
        done = subprocess.run(
            [sys.executable, "-c", IN_THE_INTERPRETER, str(places.path)],
            env={**os.environ, "TRITON_INTERPRET": "1", "TETRA_BACKEND": "interpreter"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        queries = np.random.default_rng(4).integers(0, 2, (3, B), dtype=np.uint8)
        for line, within in zip(done.stdout.splitlines(), (None, Region.circle((50, 50), 20)), strict=True):
            hits = places.search(queries, 7, within=within)
            assert json.loads(line) == [hits.rows.tolist(), hits.distances.tolist()]


def test_a_segment_is_laid_out_once_and_let_go_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Counted(HammingDatabase):
        def __init__(self, codes: torch.Tensor, **options: Any) -> None:
            made.append(len(codes))
            super().__init__(codes, **options)

    monkeypatch.setattr("tetra.map_search.HammingDatabase", Counted)
    with _with_history(tmp_path / "map", search_devices=["cpu"]) as places:
        for _ in range(3):
            places.search(make_codes(2), 3)
        assert made == [85, 85, 85]  # what was removed before is not in a segment
        places.remove(["5"])
        places.search(make_codes(2), 3)
        assert made == [85, 85, 85]
        left = len(places)
        places.compact()
        assert places._searcher._laid_out == {}  # type: ignore[attr-defined]
        places.search(make_codes(2), 3)
        assert made == [85, 85, 85, left]


def test_ranking_again_by_the_float_descriptor(tmp_path: Path) -> None:
    n, dims = 40, 16
    floats = torch.randn(n, dims, generator=torch.Generator().manual_seed(1))
    with create(tmp_path / "map", code_bytes=2, keep_descriptors=dims) as places:
        places.add_many([f"{i}" for i in range(25)], pack_bits(floats[:25]), None, descriptors=floats[:25])
        places.save()
        places.add_many([f"{i}" for i in range(25, n)], pack_bits(floats[25:]), None, descriptors=floats[25:].numpy())
        queries = torch.randn(3, dims, generator=torch.Generator().manual_seed(2))
        hits = places.search(pack_bits(queries), 10)
        ranked = places.rerank(hits, queries, 4)
        assert ranked.similarities is not None
        for q in range(3):
            kept = floats[hits.rows[q]].half().float()
            cosine = torch.nn.functional.cosine_similarity(kept, queries[q][None])
            order = cosine.argsort(descending=True)[:4]
            assert ranked.rows[q].tolist() == hits.rows[q][order].tolist()
            assert ranked.distances[q].tolist() == hits.distances[q][order].tolist()
            np.testing.assert_allclose(ranked.similarities[q], cosine[order], atol=1e-6)
            matches = places.query(pack_bits(queries[q : q + 1])[0], 4, shortlist=10, descriptor=queries[q])
            assert [match.row for match in matches] == ranked.rows[q].tolist()
            assert [match.similarity for match in matches] == ranked.similarities[q].tolist()
        # Off by default, and a short hit list keeps its gaps at the end.
        assert places.query(pack_bits(queries[:1])[0])[0].similarity is None
        few = places.rerank(places.search(pack_bits(queries), 10, max_distance=3), queries)
        for rows in few.rows:
            assert (np.diff((rows < 0).astype(int)) >= 0).all()
        assert (places.descriptors([0, 99])[0] == floats[0].half().numpy()).all()
        assert np.isnan(places.descriptors([99])).all()
        refuse(lambda: places.add("x", pack_bits(floats[:1])[0], None), "descriptors", "16 values")
        refuse(lambda: places.add("x", pack_bits(floats[:1])[0], None, descriptor=floats[0][:5]), "[1, 5]", "[1, 16]")
        refuse(lambda: places.add("x", pack_bits(floats[:1])[0], None, descriptor=floats[0] * np.nan), "not finite")
        refuse(lambda: places.query(pack_bits(queries[:1])[0], 4, shortlist=10), "descriptor", "missing")
        refuse(lambda: places.query(pack_bits(queries[:1])[0], 4, shortlist=3), "shortlist 3")
    with create(tmp_path / "bare") as places:
        places.add("a", make_codes(1)[0], None)
        refuse(lambda: places.query(make_codes(1)[0], shortlist=5, descriptor=floats[0]), "keeps no float")
        refuse(lambda: places.descriptors([0]), "keeps no float")
        refuse(lambda: places.add("b", make_codes(1)[0], None, descriptor=floats[0]), "keeps none")


def test_images_are_described_by_the_model_of_the_map(tmp_path: Path, tiny_model: TetraModel) -> None:
    model = tiny_model.pack()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with create(tmp_path / "unsaved", code_bytes=8) as places:
        places.add("a", make_codes(1, n_bytes=8)[0], None)
        refuse(lambda: places.query(images[0], model=model), "never saved")
    save(model, tmp_path / "model.safetensors")
    assert model.content_hash is not None
    from PIL import Image

    Image.fromarray(images[1].permute(1, 2, 0).numpy()).save(tmp_path / "1.png")
    options = {"model_hash": model.content_hash, "code_bytes": 8, "keep_descriptors": 64}
    with create(tmp_path / "map", **options) as places:
        places.add_many(["a", "b", "c"], model.describe(images), None, descriptors=model(images))
        assert [places.query(image, model=model)[0].id for image in images] == ["a", "b", "c"]
        best = places.query(tmp_path / "1.png", 2, model=model, shortlist=3)
        assert (best[0].id, best[0].distance) == ("b", 0)
        assert best[0].similarity == pytest.approx(1, abs=1e-3)
        refuse(lambda: places.query(tmp_path / "1.png"), "pass the model")
        refuse(lambda: places.query(images[0]), "[3, 32, 32]", "a code [8]")
        refuse(lambda: places.query(tmp_path / "none.png", model=model), "none.png")
        model.content_hash = "cd" * 32
        refuse(lambda: places.query(images[0], model=model), "cdcd", places.model_hash[:12])
        refuse(lambda: PlaceMap.open(places.path, read_only=True, model_hash="cd" * 32), "cdcd", "build the map again")


# --- several at once ---


def test_readers_never_see_half_a_change(map: PlaceMap) -> None:
    """A thread adds, moves, removes and saves; others search meanwhile and see whole states only."""
    map.journal_limit_records = 20
    n = 40
    codes = make_codes(n)
    ids = [f"{i}" for i in range(n)]
    map.add_many(ids, codes, np.zeros((n, 2)))
    problems: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                hits = map.search(codes[:2], 5)
                if not ((hits.rows >= 0).all() and (np.diff(hits.distances) >= 0).all()):
                    problems.append("hits")
                positions = map.positions(np.arange(n))
                if not (positions == positions[0, 0]).all():
                    problems.append(f"positions {positions.tolist()}")
                if len(map) % 10:
                    problems.append(f"{len(map)} places")
                if map.row("7") != 7:
                    problems.append("id")
            except Exception as error:
                problems.append(repr(error))

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(60):
        map.update_positions(ids, np.full((n, 2), float(i)))
        extra = [f"extra {i} {j}" for j in range(10)]
        map.add_many(extra, make_codes(10, i), np.zeros((10, 2)))
        if i % 2:
            map.remove(extra)
        if i % 20 == 19:
            map.compact()
    done.set()
    for thread in threads:
        thread.join()
    assert not problems, problems[0]
    assert len(map) == n + 300


@pytest.mark.parametrize("is_saved", [False, True])
def test_a_state_never_changes(map: PlaceMap, is_saved: bool) -> None:
    """What a reader holds in its hand stays as it is, whatever is done meanwhile."""
    map.add_many(["a", "b", "c"], GOOD, [(1.0, 1.0)] * 3)
    if is_saved:
        map.save()
    state = map._state
    rows = np.arange(3)
    before = (
        state.gather(rows, "positions", np.float64, 2).tolist(),
        state.rows().tolist(),
        state.search(GOOD, 3, None, None),
    )
    map.update_positions(["a", "c"], [(2.0, 2.0)] * 2)
    map.remove(["b"])
    map.add("d", GOOD[0], None)
    map.compact()
    after = (
        state.gather(rows, "positions", np.float64, 2).tolist(),
        state.rows().tolist(),
        state.search(GOOD, 3, None, None),
    )
    assert before[:2] == after[:2]
    assert hits_as_lists(before[2]) == hits_as_lists(after[2])
    assert map.positions([0, 1, 2])[:, 0].tolist()[::2] == [2.0, 2.0]


def test_another_process_follows(map: PlaceMap) -> None:
    code = """
import sys
from tetra.place_map import PlaceMap
places = PlaceMap.open(sys.argv[1], read_only=True)
for line in sys.stdin:
    changed = places.refresh()
    print(len(places), changed, places.query(places.codes(places.rows()[-1]))[0].id if len(places) else "-", flush=True)
"""
    map.journal_limit_records = 5
    with subprocess.Popen(
        [sys.executable, "-c", code, str(map.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None

        def ask() -> str:
            print(file=reader.stdin, flush=True)
            assert reader.stdout is not None
            return reader.stdout.readline().strip()

        assert ask() == "0 False -"
        for i, code_of_place in enumerate(make_codes(23)):
            map.add(f"{i}", code_of_place, None)
            assert ask() == f"{i + 1} True {i}"
            assert ask() == f"{i + 1} False {i}"
        map.remove(["22", "20"])
        assert ask() == "21 True 21"
        map.compact()
        assert ask() == "21 True 21"
        map.calibration = {"max_distance": 3}
        assert ask() == "21 True 21"
        reader.stdin.close()


def test_one_writer(map: PlaceMap) -> None:
    refuse(lambda: PlaceMap.open(map.path), str(map.path), f"process {os.getpid()}", "read-only")
    done = subprocess.run(
        [sys.executable, "-c", f"from tetra.place_map import PlaceMap; PlaceMap.open({str(map.path)!r})"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"process {os.getpid()} has it open for writing" in done.stderr
    map.close()
    with PlaceMap.open(map.path) as again:
        again.add("a", make_codes(1)[0], None)


def test_a_fork_that_closes_the_map_leaves_it_to_its_parent(map: PlaceMap) -> None:
    map.add("before", make_codes(1)[0], None)
    go_read, go_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(go_read, 1)
        try:
            map.close()
        finally:
            os._exit(0)
    map.save()  # other files count now than the fork knows of
    map.add("after", make_codes(1)[0], None)
    os.write(go_write, b"x")
    os.waitpid(pid, 0)
    os.close(go_read)
    os.close(go_write)
    refuse(lambda: PlaceMap.open(map.path), "open for writing")
    map.add("last", make_codes(1)[0], None)
    with PlaceMap.open(map.path, read_only=True) as reader:
        assert reader.ids(reader.rows()) == ["before", "after", "last"]


def test_a_map_in_the_place_of_another_is_noticed(tmp_path: Path) -> None:
    with create(tmp_path / "map") as old:
        old.add_many(["a", "b", "c"], GOOD, None)
        reader = PlaceMap.open(old.path, read_only=True)
        shutil.rmtree(old.path)
        with create(tmp_path / "map", model_hash="cd" * 32) as new:
            new.add("z", make_codes(1)[0], None)
            refuse(reader.refresh, str(old.path), "another map", "open it again")
            assert reader.ids(reader.rows()) == ["a", "b", "c"]
            refuse(old.save, "another map")
            new.add("y", make_codes(1)[0], None)
            with PlaceMap.open(new.path, read_only=True) as again:
                assert again.ids(again.rows()) == ["z", "y"]


def test_a_fork_may_not_write(map: PlaceMap) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            map.add("a", make_codes(1)[0], None)
        except MapError as error:
            os._exit(0 if "forked" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_read_only(map: PlaceMap) -> None:
    map.add("a", make_codes(1)[0], None)
    before = {path.name: path.read_bytes() for path in map.path.iterdir()}
    with PlaceMap.open(map.path, read_only=True) as reader:
        calls: list[Callable[[], object]] = [
            lambda: reader.add("b", make_codes(1)[0], None),
            lambda: reader.remove(["a"]),
            lambda: reader.update_positions(["a"], [(0, 0)]),
            reader.save,
            reader.compact,
            reader.sync,
            lambda: reader.merge(map),
            lambda: setattr(reader, "calibration", {}),
        ]
        for call in calls:
            refuse(call, "read-only")
        assert len(reader) == 1
    assert before == {path.name: path.read_bytes() for path in map.path.iterdir()}


def test_a_closed_map_still_answers_and_takes_nothing(map: PlaceMap) -> None:
    map.add("a", make_codes(1)[0], None)
    map.close()
    map.close()
    assert map.query(make_codes(1)[0])[0].id == "a"
    refuse(lambda: map.add("b", make_codes(1)[0], None), "closed")


def test_merge(tmp_path: Path) -> None:
    model = Model()
    codes = make_codes(60)
    with create(tmp_path / "a") as first, create(tmp_path / "b") as second:
        for i in range(20):
            first.add(f"a{i}", codes[i], (i, i), metadata={"i": i})
            model.add(f"a{i}", codes[i], position=(i, i), metadata={"i": i})
        for i in range(20, 60):
            second.add(f"b{i}", codes[i], (i, i), heading=i, time=i, thumbnail=JPEG)
            if i == 40:
                second.save()
        second.update_positions(["b20", "b59"], [(-1, -1), (-2, -2)])
        second.remove([f"b{i}" for i in range(20, 60) if i % 3 == 0])
        for i in range(20, 60):
            if i % 3:
                position = {20: (-1, -1), 59: (-2, -2)}.get(i, (i, i))
                model.add(f"b{i}", codes[i], position=position, heading=i, time=i, thumbnail=JPEG)
        rows = first.merge(second)
        assert rows.tolist() == list(range(20, 20 + len(second)))
        assert_same(first, model)
        refuse(lambda: first.merge(second), "b20", "already")
        refuse(lambda: first.merge(first), "already")
        assert_same(first, model)
        first.close()
        with PlaceMap.open(tmp_path / "a") as again:
            assert_same(again, model)
            again.verify()


def test_maps_that_do_not_fit_are_not_merged(tmp_path: Path) -> None:
    with create(tmp_path / "a", frame=UTM) as first:
        others: list[tuple[dict[str, Any], tuple[str, ...]]] = [
            ({"frame": CoordinateFrame("utm", 33, "north")}, ("frame", "utm 33 north", "utm 32 north")),
            ({"frame": UTM, "model_hash": "cd" * 32}, ("model_hash", "cdcd")),
            ({"frame": UTM, "code_bytes": B + 1}, ("code_bytes", "6", "5")),
        ]
        for i, (options, words) in enumerate(others):
            with create(tmp_path / f"b{i}", **options) as other:
                refuse(lambda: first.merge(other), str(other.path), *words)
    with create(tmp_path / "c", keep_descriptors=8) as keeps, create(tmp_path / "d") as bare:
        refuse(lambda: keeps.merge(bare), "descriptor values")
        keeps.add("a", make_codes(1)[0], None, descriptor=np.ones(8))
        bare.merge(keeps)
        assert bare.ids([0]) == ["a"]


def test_calibration_stays_with_the_map(map: PlaceMap) -> None:
    assert map.calibration is None
    map.calibration = {"max_distance": 17, "precision": 0.95}
    map.add("a", make_codes(1)[0], None)
    map.save()
    refuse(lambda: setattr(map, "calibration", {"x": float("nan")}), "calibration", "JSON")
    map.close()
    with PlaceMap.open(map.path) as again:
        assert again.calibration == {"max_distance": 17, "precision": 0.95}
        again.calibration = None
        assert again.calibration is None


# --- what is refused ---

GOOD = make_codes(3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codes": make_codes(3, n_bytes=6)}, ("codes", "[3, 6]", "[3, 5]", HASH[:12])),
        ({"codes": make_codes(2)}, ("codes", "[2, 5]")),
        ({"codes": GOOD[0]}, ("codes", "[5]")),
        ({"codes": GOOD.astype(np.int64)}, ("codes", "int64", "uint8")),
        ({"codes": torch.zeros(3, B)}, ("codes", "float32")),
        ({"codes": [[1] * B] * 3}, ("codes", "list")),
        ({"ids": ["a", "b", "a"]}, ("ids", "'a'", "twice")),
        ({"ids": ["a", "old", "b"]}, ("ids", "'old'", "already")),
        ({"ids": ["a", "b"]}, ("codes", "[2, 5]")),
        ({"ids": "abc"}, ("ids", "'abc'")),
        ({"ids": ["a", 5, "b"]}, ("number 1", "5", "int")),
        ({"ids": ["a", "b", ""]}, ("number 2", "empty")),
        ({"ids": ["a", "x" * 513, "b"]}, ("number 1", "513", "512")),
        ({"ids": ["a", "é" * 257, "b"]}, ("number 1", "514", "512")),
        ({"ids": ["a", "\ud800", "b"]}, ("number 1", "Unicode")),
        ({"positions": [(0, 0), (0, np.nan), (0, 0)]}, ("positions", "nan", "number 1")),
        ({"positions": [(0, 0), None, (np.inf, 0)]}, ("positions", "inf", "number 2")),
        ({"positions": [(0, 0), (0, -2e8), (0, 0)]}, ("positions", "-200000000")),
        ({"positions": [(0, 0), (0, 0)]}, ("positions", "[2, 2]", "[3, 2]")),
        ({"positions": [(0, 0), None]}, ("positions", "[2, 2]", "[3, 2]")),
        ({"positions": "here"}, ("positions", "numbers")),
        ({"positions": [(1, 2, 3)] * 3}, ("positions", "[3, 3]")),
        ({"headings": [0, 361, 0]}, ("headings", "361", "number 1")),
        ({"headings": [0, None, np.nan]}, ("headings", "nan", "number 2")),
        ({"headings": [0, 0]}, ("headings", "[2]", "[3]")),
        ({"times": [0, 0, np.inf]}, ("times", "inf", "number 2", "finite")),
        ({"times": ["now"] * 3}, ("times", "numbers")),
        ({"metadata": [{}, {"x": np.nan}, {}]}, ("metadata", "number 1", "JSON")),
        ({"metadata": [{}, {"x": object()}, {}]}, ("metadata", "number 1", "JSON")),
        ({"metadata": [{}, [1], {}]}, ("metadata", "number 1", "list")),
        ({"metadata": [{}, {"x": "y" * (1 << 20)}, {}]}, ("metadata", "number 1", "bytes")),
        ({"metadata": [{}]}, ("metadata", "1 for 3")),
        ({"thumbnails": [None, b"PNG", None]}, ("thumbnails", "number 1", "JPEG")),
        ({"thumbnails": [None]}, ("thumbnails", "1 for 3")),
        ({"frame": UTM}, ("utm 32 north", "local")),
    ],
)
def test_places_that_cannot_be(map: PlaceMap, change: dict[str, Any], words: tuple[str, ...]) -> None:
    map.add("old", make_codes(1, 5)[0], (1, 1))
    good: dict[str, Any] = {"ids": ["a", "b", "c"], "codes": GOOD, "positions": [(0, 0)] * 3}
    size = next(map.path.glob("journal-*")).stat().st_size
    refuse(lambda: map.add_many(**{**good, **change}), *words)
    assert len(map) == 1
    assert next(map.path.glob("journal-*")).stat().st_size == size
    assert map.add_many(**good).tolist() == [1, 2, 3]  # it goes on working


@pytest.mark.parametrize(
    "id",
    [
        "..", ".", "../a", "a/..", "a/../b", "a/./b", "/a", "/", "a/", "a//b", "a\\b", "..\\a", "C:/a", "c:", "a\nb",
        "\n", "a\n", "a\0", "a\tb", "\x7f", "\x85", "a\u2028b",
    ],
)  # fmt: skip
def test_ids_that_could_lead_elsewhere(map: PlaceMap, id: str) -> None:
    refuse(lambda: map.add(id, GOOD[0], None), "ids", "number 0")
    refuse(lambda: map.add_many(["fine", id, "good"], GOOD, None), "ids", "number 1")
    assert map.row(id) == -1
    assert id not in map
    refuse(lambda: map.remove([id]), "ids")


@pytest.mark.parametrize(
    "id", ["a", "a/b.jpg", "..a", "a..", "a..b", "...", ".hidden/x", "a/.b", "@1@2@.jpg", " ", "ö/ß", "a:b", "x" * 512]
)
def test_ids_that_are_fine(map: PlaceMap, id: str) -> None:
    map.add_many(["first", id, "last"], GOOD, None)
    assert map.ids([1]) == [id]
    assert map.row(id) == 1


def test_ids_check_agrees_with_their_rule() -> None:
    """The quick check of many ids at once against the rule, part by part."""
    rng = np.random.default_rng(0)
    letters = list("ab./\\:C\n\t\u2028é")
    for _ in range(4000):
        ids = ["".join(rng.choice(letters, rng.integers(1, 6))) for _ in range(2)]
        is_fine = all(
            not (set(id) & set("\\\n\t\u2028"))
            and not ({"", ".", ".."} & set(id.split("/")))
            and not (len(id) > 1 and id[0] in "abC" and id[1] == ":" and (len(id) == 2 or id[2] == "/"))
            for id in ids
        )
        try:
            Ids.of(ids)
            assert is_fine, ids
        except MapError:
            assert not is_fine, ids


def test_zones_are_not_mixed(tmp_path: Path) -> None:
    with create(tmp_path / "map", frame=UTM) as places:
        places.add("a", GOOD[0], (500_000, 5_000_000), frame=UTM)
        other = CoordinateFrame("utm", 33, "north")
        refuse(lambda: places.add("b", GOOD[1], (500_000, 5e6), frame=other), "utm 33 north", "utm 32 north", "convert")
        refuse(lambda: places.add("b", GOOD[1], (5, 6)), "easting 5", "utm 32 north")
        refuse(lambda: places.update_positions(["a"], [(5e5, np.nan)]), "northing nan")
        assert places.positions([0]).tolist() == [[500_000, 5_000_000]]


def test_searches_that_cannot_be(map: PlaceMap) -> None:
    refuse(lambda: map.search(GOOD, 1), str(map.path), "empty", "add places first")
    refuse(lambda: map.query(GOOD[0]), str(map.path), "empty", "add places first")
    map.add_many(["a", "b", "c"], GOOD, None)
    refuse(lambda: map.search(GOOD, 0), "k 0", "3 places", "between 1 and 3")
    refuse(lambda: map.search(GOOD, 4), "k 4", "between 1 and 3")
    refuse(lambda: map.search(GOOD, 1.5), "k 1.5")  # type: ignore[arg-type]
    refuse(lambda: map.search(make_codes(2, n_bytes=4), 1), "codes", "[2, 4]", "[queries, 5]", HASH[:12])
    refuse(lambda: map.search(GOOD, True), "k True")
    for distance in (-1, 1.5, float("nan"), "7"):
        refuse(lambda: map.search(GOOD, 1, max_distance=distance), f"max_distance {distance!r}")  # type: ignore[arg-type]  # noqa: B023
    refuse(lambda: map.search(GOOD, 1, within="here"), "within 'here'", "Region")  # type: ignore[arg-type]
    refuse(lambda: map.query([1, 2, 3]), "query: list", "a code [5]")  # type: ignore[arg-type]
    refuse(lambda: map.query(GOOD), "shape [3, 5]", "a code [5]")
    refuse(lambda: map.query(GOOD[0], 0), "k 0")
    assert next(match.id for match in map.query(GOOD[0], 99)) == "a"
    assert len(map.query(GOOD[0], 99)) == 3
    assert map.search(GOOD[:0], 2).rows.shape == (0, 2)


def test_changes_that_cannot_be(map: PlaceMap) -> None:
    map.add_many(["a", "b", "c"], GOOD, [(0, 0)] * 3)
    refuse(lambda: map.remove(["a", "z"]), "'z'", "not in")
    refuse(lambda: map.update_positions(["a", "z"], [(0, 0)] * 2), "'z'", "not in")
    refuse(lambda: map.update_positions(["a", "b", "a"], [(0, 0)] * 3), "'a'", "twice")
    refuse(lambda: map.update_positions(["a"], [(0, 0)] * 3), "[3, 2]", "[1, 2]")
    refuse(lambda: map.update_positions(["a"], [None]), "positions")
    refuse(lambda: map.remove("abc"), "'abc'", "list")
    refuse(lambda: map.update_positions("abc", [(0, 0)] * 3), "'abc'", "list")
    refuse(lambda: map.add("d", [1, 2, 3, 4, 5], None), "codes: list", "uint8")  # type: ignore[arg-type]
    refuse(lambda: map.rows_of("abc"), "'abc'", "list")
    refuse(lambda: map.remove(3), "list")  # type: ignore[arg-type]
    assert len(map) == 3
    assert map.add_many(np.array(["d", "e"]), make_codes(2), None).tolist() == [3, 4]
    assert map.add_many((id for id in ["f"]), make_codes(1), None).tolist() == [5]  # type: ignore[arg-type]
    map.update_positions(np.array(["d"]), [(7, 8)])  # type: ignore[arg-type]
    assert map.positions([3]).tolist() == [[7, 8]]
    map.remove(np.array(["d", "e", "f"]))  # type: ignore[arg-type]
    map.remove([])
    map.update_positions([], [])
    assert map.add_many([], GOOD[:0], None).tolist() == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_hash": ""}, ("model_hash", "content_hash")),
        ({"model_hash": None}, ("model_hash", "save it first")),
        ({"code_bytes": 0}, ("code_bytes 0",)),
        ({"code_bytes": 2.5}, ("code_bytes 2.5",)),
        ({"keep_descriptors": 0}, ("keep_descriptors 0",)),
        ({"code_bytes": True}, ("code_bytes True",)),
        ({"frame": "utm 32 north"}, ("frame 'utm 32 north'", "CoordinateFrame")),
        ({"search_devices": []}, ("search_devices", "'cuda'")),
        ({"search_devices": ["cuda:99"]}, ("search_devices", "'cuda:99'")),
        ({"search_devices": ["nonsense"]}, ("search_devices", "'nonsense'")),
    ],
)
def test_maps_that_cannot_be(tmp_path: Path, options: dict[str, Any], words: tuple[str, ...]) -> None:
    refuse(lambda: create(tmp_path / "map", **options), *words)
    assert not (tmp_path / "map").exists()


def test_where_no_map_can_be(tmp_path: Path, map: PlaceMap) -> None:
    refuse(lambda: create(map.path), str(map.path), "already")
    (tmp_path / "file").touch()
    refuse(lambda: create(tmp_path / "file"), "is a file")
    refuse(lambda: PlaceMap.open(tmp_path / "file"), "is a file", "map.json")
    refuse(lambda: create(tmp_path / "none" / "map"), "none/map", "folder above")
    refuse(lambda: PlaceMap.open(tmp_path / "none"), "none", "no such place map")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "holiday.jpg").touch()
    refuse(lambda: create(tmp_path / "other"), "holiday.jpg", "new or an empty folder")
    refuse(lambda: PlaceMap.open(tmp_path / "other"), "no place map", "map.json")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["holiday.jpg"]
    refuse(lambda: PlaceMap.open(map.path, read_only=True, sync_records=0), "sync_records 0")


def test_a_creation_that_was_killed_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "map").mkdir()
    for name in ("lock", "journal-000000.log", ".map.json.0123abcd.tmp"):
        (tmp_path / "map" / name).write_bytes(b"half")
    refuse(lambda: PlaceMap.open(tmp_path / "map"), "no place map")
    with create(tmp_path / "map") as places:
        places.add("a", GOOD[0], None)
        assert sorted(os.listdir(places.path)) == ["journal-000000.log", "lock", "map.json"]


def test_a_link_to_a_map_and_another_working_folder(
    tmp_path: Path, map: PlaceMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    map.add("a", GOOD[0], None)
    map.close()
    (tmp_path / "link").symlink_to(map.path)
    monkeypatch.chdir(tmp_path)
    with PlaceMap.open("link") as linked:
        refuse(lambda: PlaceMap.open("map"), "open for writing")
        monkeypatch.chdir("/")
        linked.add("b", GOOD[1], None)
        linked.compact()
        linked.add("c", GOOD[2], None)
    with PlaceMap.open(tmp_path / "map") as places:
        assert places.ids(places.rows()) == ["a", "b", "c"]
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refuse(lambda: PlaceMap.open(tmp_path / "dangling"), "no such place map")


UNPRIVILEGED = """
import os, sys
from tetra.coordinates import LOCAL
from tetra.errors import MapError
from tetra.place_map import PlaceMap
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
path = sys.argv[1]
print(len(PlaceMap.open(path + "/map", read_only=True)))
calls = [
    lambda: PlaceMap.open(path + "/map"),
    lambda: PlaceMap.create(path + "/new", model_hash="x", code_bytes=1, frame=LOCAL),
    lambda: PlaceMap.open(path + "/secret", read_only=True),
]
for call in calls:
    try:
        call()
        print("no error")
    except MapError as error:
        print(error)
"""


def test_missing_permissions() -> None:
    import tempfile

    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to others
    try:
        for name in ("map", "secret"):
            with create(folder / name) as places:
                places.add_many(["a", "b", "c"], GOOD, None)
                places.save()
        for path in [folder / "map", *(folder / "map").iterdir()]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        next((folder / "secret").glob("segment-*")).chmod(0)
        folder.chmod(0o555)
        done = subprocess.run(
            [sys.executable, "-c", UNPRIVILEGED, str(folder)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        n, writing, creating, secret = done.stdout.splitlines()
        assert n == "3"
        assert f"{folder}/map: can't be opened for writing: Permission denied" in writing
        assert f"{folder}/new: can't be created: Permission denied" in creating
        assert "segment-" in secret
        assert "can't be read: Permission denied" in secret
    finally:
        for path in [folder, *folder.rglob("*")]:
            path.chmod(stat.S_IRWXU)
        shutil.rmtree(folder)


# --- damaged and foreign files ---


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """A closed map with a segment, changes to it, and a journal."""
    with create(tmp_path / "full") as places:
        places.add_many([f"{i}" for i in range(50)], make_codes(50), np.zeros((50, 2)))
        places.save()
        places.update_positions(["3"], [(1, 1)])
        places.remove(["4"])
        places.save()
        places.add("last", make_codes(1, 7)[0], None)
    assert {path.name.split("-")[0] for path in places.path.iterdir()} == {
        "map.json",
        "lock",
        "segment",
        "changes",
        "journal",
    }
    return places.path


def added_at_row(row: int) -> bytes:
    """A journal's record of one place."""
    places = Places(
        make_codes(1),
        np.zeros((1, 2)),
        np.zeros(1, np.float32),
        np.zeros(1),
        Blobs.of([b"x"]),
        Blobs.empty(1),
        Blobs.empty(1),
        None,
    )
    return b"".join(Added(row, places).encode())


KINDS = ("map.json", "segment-*", "changes-*", "journal-*")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.99])
def test_truncated_files(full: Path, kind: str, keep: float) -> None:
    path = next(full.glob(kind))
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    for read_only in (True, False):
        refuse(lambda: PlaceMap.open(full, read_only=read_only), str(path), "restore")  # noqa: B023


@pytest.mark.parametrize("kind", KINDS)
def test_missing_files(full: Path, kind: str) -> None:
    path = next(full.glob(kind))
    path.unlink()
    refuse(lambda: PlaceMap.open(full, read_only=True), "map.json" if kind == "map.json" else str(path))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["flip", "zeros", "noise"])
def test_a_damaged_small_map_is_refused_as_it_is_opened(full: Path, kind: str, damage: str) -> None:
    path = next(full.glob(kind))
    whole = path.read_bytes()
    rng = np.random.default_rng(len(damage))
    for position in rng.choice(len(whole), 60, replace=False).tolist():
        damaged = bytearray(whole)
        if damage == "flip":
            damaged[position] ^= 1 << int(rng.integers(8))
        else:
            n = len(damaged[position : position + 64])
            damaged[position : position + 64] = bytes(n) if damage == "zeros" else rng.bytes(n)
        if damaged != whole:
            path.write_bytes(damaged)
            refuse(lambda: PlaceMap.open(full, read_only=True), str(full))


def _look_up_all(places: PlaceMap) -> None:
    rows = places.rows()
    for column in (places.ids, places.metadata, places.thumbnails, places.codes, places.positions):
        column(rows)
    places.rows_of([f"{i}" for i in range(50)])


def _search_some(places: PlaceMap) -> None:
    places.query(GOOD[0], 9)
    places.search(GOOD, 3, within=Region.circle((0, 0), 1))


@pytest.mark.parametrize("kind", ["segment-*", "changes-*"])
def test_damage_in_a_map_too_large_to_be_checked_is_no_traceback(
    full: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlaceMap, "checked_bytes", 0)
    path = next(full.glob(kind))
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    start = 8 + int.from_bytes(whole[:8], "little")
    refused: list[str] = []
    for position in rng.integers(start, len(whole), 40).tolist():
        damaged = bytearray(whole)
        damaged[position : position + 8] = rng.bytes(len(damaged[position : position + 8]))
        path.write_bytes(damaged)
        shutil.rmtree(full.with_name("copy"), ignore_errors=True)
        shutil.copytree(full, full.with_name("copy"))
        with PlaceMap.open(full.with_name("copy")) as places:
            for call in (_look_up_all, _search_some, lambda m: m.add("more", GOOD[0], None), PlaceMap.compact):
                try:
                    call(places)
                except TetraError as error:
                    refused.append(str(error))
    assert all("\n" not in message and str(full.with_name("copy")) in message for message in refused)
    if kind == "segment-*":
        assert any("tetra map info --verify" in message for message in refused)


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_is_noticed(full: Path, kind: str) -> None:
    """By opening or by verify(); what opens and verifies is whole."""
    path = next(full.glob(kind))
    whole = path.read_bytes()
    with PlaceMap.open(full, read_only=True) as places:
        assert places.verify() > 0
    rng = np.random.default_rng(0)
    for position in rng.choice(len(whole), min(len(whole), 150), replace=False).tolist():
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)

        def open_and_verify() -> None:
            with PlaceMap.open(full, read_only=True) as places:
                places.verify()

        refuse(open_and_verify, str(full))
    path.write_bytes(whole)
    open_and_verify()


@pytest.mark.parametrize("kind", ["segment-*", "changes-*", "journal-*"])
def test_files_of_another_map(full: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(full, tmp_path / "twin")
    shutil.rmtree(full)
    # The same calls give the same sizes, so only the identity tells the files apart.
    with create(full) as places:
        places.add_many([f"{i}" for i in range(50)], make_codes(50), np.zeros((50, 2)))
        places.save()
        places.update_positions(["3"], [(1, 1)])
        places.remove(["4"])
        places.save()
        places.add("last", make_codes(1, 7)[0], None)
    mine, its = next(full.glob(kind)), next((tmp_path / "twin").glob(kind))
    assert (mine.name, mine.stat().st_size) == (its.name, its.stat().st_size)
    shutil.copy(its, mine)
    refuse(lambda: PlaceMap.open(full), str(mine), "another")


def rewrite_manifest(path: Path, **changes: Any) -> None:
    """With a hash that fits, as a faulty tool would."""
    import hashlib

    entries = {**json.loads((path / "map.json").read_text()), **changes}
    entries.pop("manifest_hash")
    text = json.dumps(entries, sort_keys=True, separators=(",", ":"))
    entries["manifest_hash"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "map.json").write_text(json.dumps(entries))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 2}, ("map format 2", "upgrade")),
        ({"format_version": "x"}, ("map format x",)),
        ({"kind": "tetra-packed-model"}, ("tetra-packed-model", "name a map's folder")),
        ({"journal": "../../etc/passwd"}, ("../../etc/passwd", "no map has")),
        ({"segments": [{"file": "x"}]}, ("garbles",)),
        ({"frame": "utm 99 north"}, ("garbles", "99")),
        ({"code_bytes": 6}, ("segment-", "shapes")),
        ({"journal_first_row": 3}, ("journal-", "another")),
    ],
)
def test_manifests_that_cannot_be(full: Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    rewrite_manifest(full)
    PlaceMap.open(full, read_only=True).close()
    rewrite_manifest(full, **changes)
    refuse(lambda: PlaceMap.open(full), str(full), *words)


def test_a_manifest_without_an_entry(full: Path) -> None:
    entries = json.loads((full / "map.json").read_text())
    (full / "map.json").write_text(json.dumps({k: v for k, v in entries.items() if k != "model_hash"}))
    refuse(lambda: PlaceMap.open(full), "map.json", "altered")
    (full / "map.json").write_text("[]")
    refuse(lambda: PlaceMap.open(full), "map.json", "expected 'tetra-place-map'")
    (full / "map.json").write_text("{")
    refuse(lambda: PlaceMap.open(full), "map.json", "not JSON")


def test_a_damaged_journal_can_be_cut(full: Path) -> None:
    path = next(full.glob("journal-*"))
    with PlaceMap.open(full) as places:
        places.add("more", make_codes(1, 8)[0], None)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refuse(lambda: PlaceMap.open(full), str(path), "damaged at byte", "repair=True")
    with PlaceMap.open(full, repair=True) as places:
        assert "last" in places
        assert "more" not in places
    with PlaceMap.open(full) as places:
        assert len(places) == 50


@pytest.mark.parametrize("payload", [b"", b"\0" * 40, Removed(np.arange(3)).encode()[0], added_at_row(7)])
def test_whole_records_that_do_not_fit(full: Path, payload: bytes) -> None:
    """Right by their checksum, and not what this map can have written."""
    path = next(full.glob("journal-*"))
    journal = Journal(path, path.stat().st_size, sync_records=1, sync_seconds=1)
    journal.append(payload)
    journal.close()
    refuse(lambda: PlaceMap.open(full), str(path), "does not fit", "restore")


def test_leftovers_are_deleted_and_other_files_are_not(full: Path) -> None:
    leftovers = ["segment-000099.safetensors", "journal-000098.log", ".segment-000007.safetensors.0123abcd.tmp"]
    for name in [*leftovers, "notes.txt", "segment-backup"]:
        (full / name).touch()
    PlaceMap.open(full, read_only=True).close()
    assert set(leftovers) < set(os.listdir(full))
    PlaceMap.open(full).close()
    assert not set(leftovers) & set(os.listdir(full))
    assert {"notes.txt", "segment-backup"} < set(os.listdir(full))


FULL_DISK = """
import resource, sys
import numpy as np
from tetra.coordinates import LOCAL
from tetra.errors import TetraError
from tetra.place_map import PlaceMap
from pathlib import Path

def limit(n):
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))

def refused(call):
    try:
        call()
        print("no error")
    except TetraError as error:
        print(error)

codes = np.random.default_rng(0).integers(0, 256, (400, 64), dtype=np.uint8)
with PlaceMap.create(sys.argv[1], model_hash="x", code_bytes=64, frame=LOCAL) as places:
    n = 0
    limit(20_000)
    while True:
        try:
            places.add(f"{n}", codes[n], (n, n))
            n += 1
        except TetraError as error:
            print(error)
            break
    print(n, len(places))
    assert places.query(codes[n - 1])[0].id == f"{n - 1}"
    limit(5_000)
    refused(places.save)
    refused(lambda: places.add_many([f"x{i}" for i in range(400)], codes, None))
    print(len(places), sorted(p.name for p in Path(sys.argv[1]).iterdir()))
    limit(resource.RLIM_INFINITY)
    for i in range(n, 300):
        places.add(f"{i}", codes[i], (i, i))
    limit(20_000)
    refused(places.compact)
    limit(resource.RLIM_INFINITY)
    places.compact()
    print(len(places))
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """Writing fails in the middle of a record, of a segment and of a batch; nothing that was there is lost."""
    path = tmp_path / "map"
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    adding, counts, saving, batch, after, compacting, n = done.stdout.splitlines()
    for message in (adding, saving, batch, compacting):
        assert message.startswith(str(path)), message
        assert "File too large" in message
    n_added, n_there = map_ints(counts.split())
    assert n_added == n_there > 100
    assert after == f"{n_there} ['journal-000000.log', 'lock', 'map.json']"
    assert n == "300"
    codes = np.random.default_rng(0).integers(0, 256, (400, 64), dtype=np.uint8)
    with PlaceMap.open(path, read_only=True) as places:
        assert places.ids(places.rows()) == [f"{i}" for i in range(300)]
        assert (places.codes(places.rows()) == codes[:300]).all()
        places.verify()


def map_ints(words: list[str]) -> list[int]:
    return [int(word) for word in words]
