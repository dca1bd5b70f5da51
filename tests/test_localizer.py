"""Frames in, answers out: against maps in memory and on disk, and on real traversals."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tetra
from tetra.confidence import Calibration, calibrate
from tetra.coordinates import CoordinateFrame
from tetra.datasets import PlaceDataset, load_dataset
from tetra.engine import Engine
from tetra.errors import ConfigError, DatasetError, ImageError, MapError, TetraError
from tetra.evaluation import describe_folder
from tetra.files import save
from tetra.localizer import Answer, CodeMap, Localizer
from tetra.model import TetraModel
from tetra.place_map import PlaceMap
from tetra.regions import Region
from tetra.sequence_evaluation import SequenceReport, evaluate_sequences, report_sequences
from tetra.sequences import Route

BYTES = 32


def codes(n: int, seed: int = 0) -> torch.Tensor:
    """Codes of a walk: neighbours share most bits, so that distances grow over some ten rows."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n + 20, 8 * BYTES, generator=generator)
    smooth = torch.nn.functional.avg_pool1d(noise.T, 10, 1).T[:n]
    return torch.from_numpy(np.packbits((smooth > 0).numpy(), axis=1))


def disturbed(code: torch.Tensor, n_bits: int, seed: int) -> torch.Tensor:
    """``code`` with ``n_bits`` flipped."""
    bits = np.unpackbits(code.numpy())
    bits[np.random.default_rng(seed).permutation(bits.size)[:n_bits]] ^= 1
    return torch.from_numpy(np.packbits(bits))


def hamming(one: torch.Tensor, others: torch.Tensor) -> np.ndarray:
    return np.unpackbits(one.numpy() ^ others.numpy(), axis=-1).sum(axis=-1).astype(int)


def line(n: int, step_m: float = 10.0) -> np.ndarray:
    return np.stack([np.arange(n) * step_m, np.full(n, 5.0)], axis=1)


# --- single frames ------------------------------------------------------------------------------------------


def test_an_answer_by_hand() -> None:
    references = codes(60)
    frame = disturbed(references[20], 20, seed=1)
    localizer = Localizer(None, CodeMap(references, line(60)), window=1, k=12, place_radius_m=25.0)
    answer = localizer.push(frame)
    bits = hamming(frame, references)
    order = np.argsort(bits, kind="stable")[:12]
    assert [(m.row, m.distance, m.id, m.position) for m in answer.matches] == [
        (row, bits[row], str(row), (10.0 * row, 5.0)) for row in order.tolist()
    ]
    best = order[0]
    elsewhere = [row for row in order if abs(row - best) > 2]  # 25 m are two rows
    assert (answer.row, answer.id, answer.distance) == (best, str(best), bits[best])
    assert answer.margin == bits[elsewhere].min() - bits[best]
    assert answer.score == pytest.approx((bits[best] + 1) / (bits[elsewhere].min() + 1))
    agreeing = np.array([row for row in order if abs(row - best) <= 2])
    weights = np.exp(-bits[agreeing] / (0.02 * 8 * BYTES))
    weights /= weights.sum()
    east = (weights * agreeing * 10.0).sum()
    assert answer.position == pytest.approx((east, 5.0))
    assert answer.spread_m == pytest.approx(np.sqrt((weights * (agreeing * 10.0 - east) ** 2).sum()))
    assert answer.accepted is None
    assert 0 < answer.belief <= 1


def test_without_positions_neighbours_in_the_order_of_travel_are_one_place() -> None:
    references = codes(60)
    for breaks, same in (([], {18, 19, 20, 21, 22}), ([20], {20, 21, 22})):
        localizer = Localizer(None, CodeMap(references), window=1, k=60, place_rows=2, route=Route(60, breaks))
        answer = localizer.push(references[20])
        bits = hamming(references[20], references)
        assert answer.margin == min(bits[row] for row in range(60) if row not in same)
        assert answer.position is answer.spread_m is None


def test_small_maps_and_equal_places() -> None:
    one = Localizer(None, CodeMap(codes(1)), window=1).push(codes(1)[0])
    assert (one.row, one.distance, one.margin, one.score, one.belief) == (0, 0, 0, 1.0, 1.0)
    twins = Localizer(None, CodeMap(codes(1).repeat(20, 1)), window=1, place_rows=0).push(codes(1)[0])
    assert (twins.row, twins.margin, twins.score) == (0, 0, 1.0)


def test_only_places_within_a_region_are_answers() -> None:
    references = codes(60)
    frame = disturbed(references[20], 20, seed=1)
    bits = hamming(frame, references)
    localizer = Localizer(None, CodeMap(references, line(60)), window=1, k=12, place_radius_m=25.0)
    answer = localizer.push(frame, within=Region.circle((450.0, 5.0), 100.0))
    inside = [row for row in range(60) if abs(10 * row - 450) <= 100]
    order = sorted(inside, key=lambda row: (bits[row], row))
    assert [match.row for match in answer.matches] == order[:12]
    assert answer.row == order[0]
    assert answer.margin == min(bits[row] for row in order[:12] if abs(row - order[0]) > 2) - bits[order[0]]
    assert localizer.push(frame).row != answer.row  # it holds for one frame
    nowhere = Region.circle((450.0, 500.0), 10.0)
    with pytest.raises(MapError, match="within: no place"):
        localizer.push(frame, within=nowhere)
    with pytest.raises(MapError, match="pass a Region"):
        localizer.push(frame, within=(450.0, 5.0))  # type: ignore[arg-type]
    with pytest.raises(MapError, match="within: no place"):  # no heading is known
        localizer.push(frame, within=Region.heading(0, 180))


def test_where_a_region_has_one_place_the_whole_map_gives_the_second() -> None:
    """A small circle around a satellite's position holds no other place, and the score still means the same."""
    references = codes(60)
    frame = disturbed(references[20], 20, seed=1)
    bits = hamming(frame, references)
    localizer = Localizer(None, CodeMap(references, line(60)), window=1, k=12, place_radius_m=25.0)
    free = localizer.push(frame)
    within = localizer.push(frame, within=Region.circle((200.0, 5.0), 15.0))
    assert {match.row for match in within.matches} == {19, 20, 21}
    assert (within.row, within.margin, within.score) == (free.row, free.margin, free.score)
    far = localizer.push(frame, within=Region.circle((500.0, 5.0), 15.0))
    assert {match.row for match in far.matches} == {49, 50, 51}
    assert far.margin == bits.min() - bits[far.row] < 0
    assert far.score > 1


def test_a_sequence_forgets_what_lies_outside_of_a_region() -> None:
    half = codes(40)
    references = torch.cat([half, half])  # two streets that look the same
    positions = np.concatenate([line(40), line(40) + np.array([0, 1000])])
    localizer = Localizer(None, CodeMap(references, positions), k=10)
    for i in range(10):
        assert localizer.push(disturbed(half[i], 10, seed=i)).row < 40  # of two that are alike, the first
    there = Region.circle((100.0, 1005.0), 300.0)
    for i in range(10, 20):
        answer = localizer.push(disturbed(half[i], 10, seed=i), within=there)
        assert answer.row >= 40
        assert answer.position is not None
        assert answer.position[1] == pytest.approx(1005.0)
    assert abs(answer.row - 59) <= 1
    for i in range(20, 25):  # what was learnt stays when the region goes
        assert localizer.push(disturbed(half[i], 10, seed=i)).row >= 40
    localizer.push(half[24])
    again = localizer.push(half[24], within=Region.circle((0.0, 5.0), 300.0))  # the very same frame, another region
    assert again.row < 40


def test_a_region_that_has_one_row_is_followed_by_a_sequence() -> None:
    references = codes(60)
    localizer = Localizer(None, CodeMap(references, line(60)), k=12)
    for i in range(5):
        localizer.push(disturbed(references[i], 10, seed=i))
    only = Region.circle((300.0, 5.0), 1.0)
    for i in (30, 30, 30):
        assert localizer.push(disturbed(references[i], 10, seed=i + 1), within=only).row == 30


@pytest.mark.parametrize("with_engine", [False, True])
def test_matches_are_ranked_again_by_kept_descriptors(
    tmp_path: Path, tiny_model: TetraModel, with_engine: bool
) -> None:
    model = tiny_model.pack()
    save(model, tmp_path / "tiny.safetensors")
    images = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        floats = model(images).float()
    engine = Engine(model, dtype=torch.float32).warm_up() if with_engine else None
    assert model.content_hash is not None
    made = {"model_hash": model.content_hash, "code_bytes": 8, "frame": CoordinateFrame()}
    with (
        PlaceMap.create(tmp_path / "map", keep_descriptors=64, **made) as places,
        PlaceMap.create(tmp_path / "bare", **made) as bare,
    ):
        ids = [f"{i}" for i in range(30)]
        # Descriptors that say something else than the codes.
        kept = floats.flip(0) + 0.02 * torch.randn(30, 64)
        places.add_many(ids, model.describe(images), line(30), descriptors=kept)
        bare.add_many(ids, model.describe(images), line(30))
        localizer = Localizer(model, places, window=1, k=10, rerank=True, engine=engine, place_radius_m=5.0)
        plain = Localizer(model, places, window=1, k=10, engine=engine, place_radius_m=5.0)
        for i in range(0, 30, 5):
            answer, nearest = localizer.push(images[i]), plain.push(images[i])
            rows = [match.row for match in nearest.matches]
            cosine = torch.nn.functional.cosine_similarity(kept[rows].half().float(), floats[i : i + 1]).tolist()
            order = sorted(range(10), key=lambda rank: (-cosine[rank], rank))
            assert [match.row for match in answer.matches] == [rows[rank] for rank in order]
            assert [match.similarity for match in answer.matches] == pytest.approx(
                sorted(cosine, reverse=True), abs=1e-3
            )
            assert answer.row == rows[order[0]]
            assert answer.distance == hamming(model.describe(images[i : i + 1])[0], model.describe(images))[answer.row]
            assert answer.to_dict()["matches"][0].keys() == {"id", "distance", "position", "similarity"}
            assert nearest.to_dict()["matches"][0].keys() == {"id", "distance", "position"}
        with pytest.raises(ConfigError, match="push the image"):
            localizer.push(torch.zeros(8, dtype=torch.uint8))
        with pytest.raises(ConfigError, match="use window 1"):
            Localizer(model, places, rerank=True)
        with pytest.raises(ConfigError, match="give the model"):
            Localizer(None, places, window=1, rerank=True)
        with pytest.raises(MapError, match=r"keeps no float descriptors.*--keep-descriptors"):
            Localizer(model, bare, window=1, rerank=True)
        with pytest.raises(ConfigError, match="use a PlaceMap"):
            Localizer(model, CodeMap(codes(4)[:, :8], model_hash=model.content_hash), window=1, rerank=True)


@pytest.mark.parametrize("quantity", ["ratio", "distance"])
def test_acceptance(quantity: str) -> None:
    references = codes(60)
    frames = [disturbed(references[20], n, seed=n) for n in (5, 40)]
    free = Localizer(None, CodeMap(references), window=1)
    clear, vague = (free.push(frame) for frame in frames)
    assert clear.score < vague.score
    values = [clear.distance, vague.distance] if quantity == "distance" else [clear.score, vague.score]
    calibration = calibrate(values, [True, False], confidence=0.5, quantity=quantity, code_bytes=BYTES)
    for given in (calibration, calibration.to_dict()):
        localizer = Localizer(None, CodeMap(references), window=1, calibration=given)
        assert [localizer.push(frame).accepted for frame in frames] == [True, False]


def test_answers_are_json(tmp_path: Path) -> None:
    localizer = Localizer(None, CodeMap(codes(30), line(30)))
    values = json.loads(json.dumps(localizer.push(codes(30)[3], 1.5).to_dict(n_matches=2), allow_nan=False))
    assert {"accepted", "matches", "position", "spread_m", "distance", "margin"} <= values.keys()
    assert values["time"] == 1.5
    assert [set(match) for match in values["matches"]] == [{"id", "distance", "position"}] * 2
    bare = Localizer(None, CodeMap(codes(30))).push(codes(30)[3]).to_dict()
    assert (bare["position"], bare["spread_m"], bare["accepted"], bare["time"]) == (None, None, None, None)


# --- sequences ----------------------------------------------------------------------------------------------


def walk(rows: np.ndarray, references: torch.Tensor, seed: int, n_bits: int) -> list[torch.Tensor]:
    return [disturbed(references[row], n_bits, seed + i) for i, row in enumerate(rows.tolist())]


def check_spreads(answers: list[Answer], true_m: np.ndarray) -> None:
    """Of answers about the right place: 1 sigma holds 68% of normal errors, 2 sigma hold 95%."""
    errors = np.array([a.position[0] if a.position else np.nan for a in answers]) - true_m
    spreads = np.array([a.spread_m for a in answers], dtype=float)
    about_right = abs(errors) <= 15
    assert about_right.mean() > 0.75
    errors, spreads = abs(errors[about_right]), spreads[about_right]
    # Spreads may be too wide, not too narrow; places are 1 m apart.
    assert (errors <= spreads).mean() > 0.6
    assert (errors <= 2 * spreads).mean() > 0.9
    assert np.median(spreads) < max(4 * np.sqrt((errors**2).mean()), 1.0)


def test_positions_are_off_by_about_their_spread() -> None:
    references = codes(300, seed=4)
    rows = np.arange(20, 270)
    frames = walk(rows, references, 5, n_bits=95)
    for window in (1, 30):
        localizer = Localizer(None, CodeMap(references, line(300, 1.0)), window=window, place_radius_m=10.0)
        check_spreads([localizer.push(frame) for frame in frames], rows.astype(float))


def test_a_sequence_is_surer_than_its_frames() -> None:
    references = codes(200, seed=6)
    rows = np.arange(10, 150)
    frames = walk(rows, references, 7, n_bits=105)
    found = {}
    for window in (1, 30):
        localizer = Localizer(None, CodeMap(references), window=window)
        found[window] = np.array([localizer.push(frame).row for frame in frames])
    share = {window: (abs(found[window] - rows) <= 2).mean() for window in found}
    assert share[30] > share[1] + 0.1


def test_the_score_of_a_sequence_is_over_five_frames() -> None:
    references = codes(200, seed=8)
    localizer = Localizer(None, CodeMap(references), k=40)
    answers = [localizer.push(frame) for frame in walk(np.arange(50, 60), references, 9, n_bits=30)]
    for i in (0, 3, 9):
        recent = answers[max(0, i - 4) : i + 1]
        near, far = sum(a.distance for a in recent), sum(a.distance + a.margin for a in recent)
        assert answers[i].score == pytest.approx((near + 1) / (far + 1))
    localizer.reset()
    again = localizer.push(references[70])
    assert again.score == pytest.approx((again.distance + 1) / (again.distance + again.margin + 1))


def test_an_answer_that_the_shortlist_lacks_has_its_true_distance() -> None:
    references = codes(200, seed=10)
    localizer = Localizer(None, CodeMap(references), k=4)
    for row in range(50, 80):
        localizer.push(references[row])
    odd = references[150]
    answer = localizer.push(odd)
    assert abs(answer.row - 80) <= 1
    assert answer.row not in [match.row for match in answer.matches]
    assert answer.distance == hamming(odd, references[answer.row])
    assert answer.margin < 0


def test_time_that_goes_back_or_stands_still() -> None:
    references = codes(50)
    for window in (1, 30):
        localizer = Localizer(None, CodeMap(references), window=window)
        localizer.push(references[3], 10.0)
        before = localizer.push(references[4], 11.0)
        with pytest.raises(TetraError, match=r"time 10\.5 s of a frame: the last one had 11\.0 s"):
            localizer.push(references[5], 10.5)
        if window > 1:
            again = localizer.push(references[40], 11.0)
            assert (again.row, again.belief) == (before.row, before.belief)
        assert localizer.push(references[5], 12.0).row == 5
        localizer.reset()
        assert localizer.push(references[6], 0.0).row == 6


def test_a_picture_that_is_repeated_adds_nothing() -> None:
    references = codes(100)
    frames = walk(np.arange(30, 60), references, 3, n_bits=60)
    once, often = Localizer(None, CodeMap(references)), Localizer(None, CodeMap(references))
    for i, frame in enumerate(frames):
        expected = once.push(frame)
        for _ in range(1 if i % 4 else 7):
            answer = often.push(frame)
            assert (answer.row, answer.belief, answer.score) == (expected.row, expected.belief, expected.score)


def test_threads_that_push_at_once_take_turns() -> None:
    references = codes(100)
    localizer = Localizer(None, CodeMap(references))
    frames = [disturbed(references[30], 5, seed) for seed in range(80)]
    answers: list[Answer] = []

    def push_some(part: list[torch.Tensor]) -> None:
        answers.extend(localizer.push(frame) for frame in part)

    threads = [threading.Thread(target=push_some, args=(frames[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 80
    assert max(abs(answer.row - 30) for answer in answers) <= 2


# --- images -------------------------------------------------------------------------------------------------


@pytest.fixture
def packed(tiny_model: TetraModel, tmp_path: Path) -> TetraModel:
    """A packed model that was saved, so that it has a content hash."""
    save(tiny_model.pack(), tmp_path / "tiny.safetensors")
    return tetra.load(tmp_path / "tiny.safetensors")


def picture(path: Path, seed: int, mode: str = "RGB") -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((70, 48), Image.Resampling.BICUBIC).convert(mode).save(path)
    return path


def test_every_kind_of_frame_gives_the_code_of_its_file(tmp_path: Path, packed: TetraModel) -> None:
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(6)]
    described = describe_folder(packed, paths, progress=False).codes
    localizer = Localizer(packed, CodeMap(described, model_hash=packed.content_hash), window=1)
    for row, path in enumerate(paths):
        hwc = np.asarray(Image.open(path))
        frames = [path, str(path), hwc, torch.from_numpy(hwc.copy()), hwc.transpose(2, 0, 1), described[row]]
        answers = [localizer.push(frame) for frame in frames]
        assert {(a.row, a.distance) for a in answers} == {(row, 0)}
        assert answers[0].timings.decode_ms > 0
        assert answers[-1].timings.network_ms == 0 < answers[-1].timings.search_ms < answers[-1].timings.total_ms
    grey = np.asarray(Image.open(paths[0]).convert("L"))
    assert localizer.push(grey).distance == localizer.push(np.repeat(grey[None], 3, axis=0)).distance
    # The map is of its own model alone.
    with pytest.raises(MapError, match="a model that was never saved"):
        Localizer(packed.pack(), CodeMap(described, model_hash=packed.content_hash))


def test_an_engine_runs_the_model(tmp_path: Path, packed: TetraModel) -> None:
    paths = [picture(tmp_path / f"{i}.png", i) for i in range(3)]
    described = describe_folder(packed, paths, progress=False).codes
    engine = tetra.Engine(packed, batch=1, dtype=torch.float32).warm_up()
    localizer = Localizer(packed, CodeMap(described), engine=engine, window=1)
    assert [localizer.push(path).row for path in paths] == [0, 1, 2]
    with pytest.raises(ConfigError, match="must take 1 image"):
        Localizer(packed, CodeMap(described), engine=tetra.Engine(packed, batch=2))


@pytest.mark.parametrize(
    ("frame", "error", "message"),
    [
        (np.zeros((4, 5, 3), np.float32), ImageError, "dtype float32"),
        (torch.zeros(3, 4, 5), ImageError, r"dtype torch\.float32"),
        (np.zeros((4, 5, 4), np.uint8), ImageError, r"shape \[4, 5, 4\]"),
        (np.zeros((1, 3, 4, 5), np.uint8), ImageError, r"shape \[1, 3, 4, 5\]"),
        (np.zeros((3, 0, 5), np.uint8), ImageError, r"shape \[3, 0, 5\]"),
        ([1, 2], ImageError, "type list"),
        (Path("missing.png"), ImageError, "missing.png: no such file"),
        (np.zeros((3, 4, 5), np.uint8), ConfigError, "no model"),
        (np.zeros(BYTES + 1, np.uint8), MapError, f"code of {BYTES + 1} x .* {BYTES} x"),
    ],
)
def test_frames_that_cannot_be(frame: Any, error: type[TetraError], message: str) -> None:
    with pytest.raises(error, match=message):
        Localizer(None, CodeMap(codes(5))).push(frame)


# --- settings and maps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k = 0"),
        ({"window": 0}, "window of 0"),
        ({"place_radius_m": 0.0}, "place radius"),
        ({"place_radius_m": float("nan")}, "place radius"),
        ({"place_rows": -1}, "-1 rows"),
        ({"speeds": ()}, "speeds"),
        ({"calibration": {"threshold": 1}}, "is missing"),
    ],
)
def test_settings_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Localizer(None, CodeMap(codes(5)), **options)


def test_calibrations_of_another_kind_or_model() -> None:
    def made(**of: Any) -> Calibration:
        return calibrate([1.0, 2.0], [True, False], confidence=0.5, **of)

    for window, calibration, message in (
        (1, made(of_sequences=True), "made from sequences"),
        (9, made(), "made from single frames"),
        (1, made(model_hash="b" * 64), "made with the model bbbbbbbbbbbb"),
        (1, made(code_bytes=BYTES + 1), "codes of 33 bytes"),
    ):
        with pytest.raises(ConfigError, match=message):
            Localizer(None, CodeMap(codes(5), model_hash="a" * 64), window=window, calibration=calibration)


def test_an_empty_map() -> None:
    with pytest.raises(MapError, match="empty"):
        Localizer(None, CodeMap(codes(5)[:0]))
    with pytest.raises(MapError, match=r"positions \[4, 2\]"):
        CodeMap(codes(5), line(4))


def test_a_map_on_disk_that_changes_while_it_is_used(tmp_path: Path) -> None:
    references = codes(80, seed=12)
    with PlaceMap.create(
        tmp_path / "map", model_hash="a" * 64, code_bytes=BYTES, frame=CoordinateFrame("local")
    ) as place_map:
        with pytest.raises(MapError, match="empty"):
            Localizer(None, place_map)
        ids = [f"place {i}" for i in range(80)]
        place_map.add_many(ids[:60], references[:60], line(60))
        localizer = Localizer(None, place_map)
        answers = [localizer.push(references[row]) for row in range(40, 55)]
        assert [a.id for a in answers] == ids[40:55]
        assert answers[-1].position == pytest.approx((540.0, 5.0), abs=10.0)
        place_map.remove(ids[10:20])
        place_map.add_many(ids[60:], references[60:], line(80)[60:])
        answers = [localizer.push(references[row]) for row in range(55, 75)]
        assert [a.id for a in answers] == ids[55:75]
        # A pose graph was optimised: codes stay, positions move.
        remaining = ids[:10] + ids[20:]
        place_map.update_positions(remaining, np.delete(line(80), range(10, 20), axis=0) + 1000.0)
        localizer.refresh()
        moved = localizer.push(references[75])
        assert moved.id == ids[75]
        assert moved.position == pytest.approx((1750.0, 1005.0), abs=10.0)


# --- real traversals ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_sets(shared_data: Path) -> dict[str, PlaceDataset]:
    return {name: load_dataset(shared_data / "eval" / name) for name in ("corridor", "gardens_point")}


@pytest.fixture(scope="module")
def real_codes(real_sets: dict[str, PlaceDataset]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of queries and references."""
    model = tetra.load("nano")

    def described(paths: list[Path]) -> torch.Tensor:
        return describe_folder(model, paths, progress=False).codes

    return {name: (described(data.query_paths), described(data.database_paths)) for name, data in real_sets.items()}


@pytest.fixture(scope="module")
def real_reports(
    real_sets: dict[str, PlaceDataset], real_codes: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, SequenceReport]:
    """Each set judged by the thresholds from the other one."""
    learned = {name: report_sequences(data, *real_codes[name]).calibration for name, data in real_sets.items()}
    other = dict(zip(real_sets, reversed(list(real_sets)), strict=True))
    return {
        name: report_sequences(data, *real_codes[name], calibration=learned[other[name]])
        for name, data in real_sets.items()
    }


@pytest.mark.parametrize("name", ["corridor", "gardens_point"])
def test_sequences_on_real_traversals(name: str, real_reports: dict[str, SequenceReport]) -> None:
    recall = real_reports[name].recall
    assert recall["sequence"] >= min(recall["frame"] + 10.0, 98.0)
    assert real_reports[name].recall_hidden["sequence"] >= real_reports[name].recall_hidden["frame"] + 5.0


@pytest.mark.parametrize("name", ["corridor", "gardens_point"])
@pytest.mark.parametrize("kind", ["frame", "sequence"])
def test_thresholds_from_the_other_real_set(name: str, kind: str, real_reports: dict[str, SequenceReport]) -> None:
    trust = real_reports[name].trust[kind]
    assert trust.precision is not None
    assert trust.precision >= 0.95
    assert trust.share_accepted >= {"frame": 0.02, "sequence": 0.2}[kind]


@pytest.mark.parametrize("name", ["corridor", "gardens_point"])
@pytest.mark.parametrize("window", [1, 30])
def test_spreads_on_real_traversals(
    name: str, window: int, real_codes: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    # The two traversals go frame by frame, so the number of the frame is a position.
    queries, references = real_codes[name]
    localizer = Localizer(None, CodeMap(references, line(len(references), 1.0)), window=window, place_radius_m=10.0)
    check_spreads([localizer.push(code) for code in queries], np.arange(len(queries), dtype=float))


def test_the_report(real_reports: dict[str, SequenceReport]) -> None:
    report = real_reports["corridor"]
    values = json.loads(json.dumps(report.to_json_dict(), allow_nan=False))
    assert values["n_queries"] == values["n_references"] == 111
    assert values["n_hidden"] == 37
    assert values["notices"] == []
    assert Calibration.from_dict(values["calibration"]["sequence"]) == report.calibration["sequence"]
    lines = "\n".join(report.lines())
    assert f"R@1: {report.recall['sequence']:.1f}" in lines
    assert "% accepted, " in lines


# --- evaluation on made images ------------------------------------------------------------------------------


def made_dataset(folder: Path, n: int, truth: list[list[int]]) -> PlaceDataset:
    references = [picture(folder / f"r{i}.png", i) for i in range(n)]
    queries = [picture(folder / f"q{i}.png", i) for i in range(len(truth))]
    return PlaceDataset("made", "vpr-bench", references, queries, [np.array(rows, dtype=np.int64) for rows in truth])


def test_evaluation_of_made_images(tmp_path: Path, packed: TetraModel) -> None:
    dataset = made_dataset(tmp_path, 9, [[i] for i in range(8)] + [[]])
    report = evaluate_sequences(packed, dataset, progress=False, confidence=0.5, target_precision=0.5)
    # Queries are the references themselves, so single frames are all right where the map has the place.
    assert report.recall == {"frame": 100.0, "sequence": 100.0}
    assert (report.n_hidden, report.recall_hidden["frame"]) == (3, 100.0)
    assert report.calibration["frame"].n_answers == 18
    assert report.calibration["frame"].n_right == 8 + 5
    assert report.trust == {}


def test_evaluation_says_what_could_not_be_calibrated(tmp_path: Path, packed: TetraModel) -> None:
    dataset = made_dataset(tmp_path, 6, [[i] for i in range(6)])
    report = evaluate_sequences(packed, dataset, progress=False)
    assert "frame" not in report.calibration
    assert any(line.startswith("frame: calibration: no threshold") for line in report.notices)


def test_evaluation_refuses_sets_without_a_sequence(tmp_path: Path, packed: TetraModel) -> None:
    with pytest.raises(DatasetError, match="2 references"):
        evaluate_sequences(packed, made_dataset(tmp_path, 2, [[0]]), progress=False)
    with pytest.raises(DatasetError, match="no query has a right reference"):
        evaluate_sequences(packed, made_dataset(tmp_path, 5, [[]]), progress=False)
    foreign = {"frame": calibrate([1.0, 2.0], [True, False], confidence=0.5, model_hash="a" * 64)}
    with pytest.raises(ConfigError, match="made with the model aaaaaaaaaaaa"):
        evaluate_sequences(packed, made_dataset(tmp_path, 5, [[0]]), calibration=foreign, progress=False)
