"""The causal filter against a full table, and on robots that stop, turn, jump and drop frames."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tetra import sequences
from tetra.errors import ConfigError, TetraError
from tetra.sequences import DEFAULT_SPEEDS, Route, SequenceMatch, SequenceMatcher

BITS = 1000
FAR = 400  # distance of unlike views


def shortlist(distances: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.argsort(distances, kind="stable")[:k]
    return distances[rows], rows


def views(true_rows: Iterable[int], n_rows: int, rng: np.random.Generator, *, clear: int = 300) -> np.ndarray:
    """Distances int [T, R]: the true row ``clear`` bits nearer than the others, whose distances vary by 40."""
    true = np.fromiter(true_rows, dtype=np.int64)
    distances = FAR + rng.integers(-20, 21, (len(true), n_rows))
    distances[np.arange(len(true)), true] -= clear
    return distances


def follow(matcher: SequenceMatcher, distances: np.ndarray, k: int = 8) -> list[SequenceMatch]:
    return [matcher.push(*shortlist(frame, k)) for frame in distances]


def rows_of(matches: list[SequenceMatch]) -> list[int]:
    return [match.row for match in matches]


# --- the filter itself --------------------------------------------------------------------------------------


class FullTable:
    """The belief of the module's docstring as a table over all rows and speeds, by loops."""

    def __init__(self, n_rows: int, breaks: list[int], window: int, speeds: tuple[float, ...]) -> None:
        self.speeds, self.window, self.n_rows = speeds, window, n_rows
        self.temperature = 0.08 * BITS
        prior = [2 ** -(abs(v - 1) / 0.5) for v in speeds]
        self.prior = [p / sum(prior) for p in prior]
        self.excess = np.zeros((n_rows, len(speeds)))
        self.traversal = np.array([sum(row >= b for b in breaks) for row in range(n_rows)])
        self.is_first = True

    def moved(self) -> np.ndarray:
        n = len(self.speeds)
        after = np.zeros_like(self.excess)
        for row in range(self.n_rows):
            for i, v in enumerate(self.speeds):
                for base, share in ((math.floor(v), 1 - v % 1), (math.floor(v) + 1, v % 1)):
                    for shift, chance in ((-1, 0.05), (0, 0.9), (1, 0.05)):
                        step = max(base + shift, 0) if v >= 0 else min(base + shift, 0)
                        there = row + step
                        if not 0 <= there < self.n_rows or self.traversal[there] != self.traversal[row]:
                            continue
                        beside = [j for j in (i - 1, i + 1) if 0 <= j < n] or [i]
                        amount = self.excess[row, i] * share * chance
                        after[there, i] += amount * 0.98
                        after[there] += amount * 0.01 / n
                        for j in beside:
                            after[there, j] += amount * 0.01 / len(beside)
        return after

    def push(self, distances: np.ndarray, rows: np.ndarray) -> np.ndarray:
        if not self.is_first:
            self.excess = self.moved()
            for row in range(self.n_rows):
                x = 1 + self.excess[row].sum()
                if x > 1:
                    self.excess[row] *= (x ** (1 - 1 / self.window) - 1) / (x - 1)
            mean = 1 + self.excess.sum() / self.n_rows
            self.excess /= 1 + 0.01 / 0.99 * mean
        self.is_first = False
        for distance, row in zip(distances, rows, strict=True):
            gain = math.exp((distances.max() - distance) / self.temperature)
            for i in range(len(self.speeds)):
                self.excess[row, i] = (self.excess[row, i] + self.prior[i]) * gain - self.prior[i]
        return 1 + self.excess.sum(axis=1)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 24),
    st.integers(1, 12),
    st.integers(2, 9),
    st.sampled_from([(1.0,), DEFAULT_SPEEDS, (0.0, 0.3, 2.7), (-1.5, -1.0, 0.0, 1.0)]),
    st.integers(0, 2**32 - 1),
)
def test_belief_equals_the_full_table(n_rows: int, k: int, window: int, speeds: tuple[float, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    k = min(k, n_rows)
    # The filter keeps the W k strongest hypotheses, which must be all of them here.
    window = max(window, -(-n_rows // k) + 1)
    breaks = sorted(set(rng.integers(1, n_rows, 2).tolist())) if n_rows > 1 else []
    matcher = SequenceMatcher(Route(n_rows, breaks), BITS, window=window, speeds=speeds, tolerance=0)
    table = FullTable(n_rows, breaks, window, speeds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "_NEGLIGIBLE", 0.0)  # else small excesses are dropped, which the table does not do
        for _ in range(6):
            distances, rows = shortlist(rng.integers(0, FAR, n_rows), k)
            match = matcher.push(distances, rows)
            x = table.push(distances, rows)
            found = np.ones(n_rows)
            found[match.rows] = match.weights * x.sum()
            np.testing.assert_allclose(found, x, rtol=1e-9)
            assert x[match.row] >= x.max() * (1 - 1e-9)
            assert match.probability == pytest.approx(x[match.row] / x.sum())


@pytest.mark.parametrize("speed", DEFAULT_SPEEDS)
@pytest.mark.parametrize("start", [0, 17])
def test_clear_views_are_answered_exactly_at_every_speed(speed: float, start: int) -> None:
    true = [start + math.floor(speed * t) for t in range(50)]
    matches = follow(SequenceMatcher(150, BITS), views(true, 150, np.random.default_rng(1)))
    assert rows_of(matches) == true
    assert matches[-1].probability > 0.99


@pytest.mark.parametrize("speed", DEFAULT_SPEEDS)
def test_sequences_find_what_frames_do_not(speed: float) -> None:
    rng = np.random.default_rng(3)
    true = np.array([5 + math.floor(speed * t) for t in range(80)])
    distances = views(true, 200, rng, clear=60)
    decoys = rng.integers(0, 200, (80, 2))
    np.put_along_axis(distances, decoys, FAR - 80, axis=1)  # two wrong places nearer than the true one, in each frame
    single = distances.argmin(axis=1)
    assert (abs(single - true) <= 2).mean() < 0.1
    rows = np.array(rows_of(follow(SequenceMatcher(200, BITS), distances, k=10)))
    assert (abs(rows - true) <= 2)[30:].mean() >= 0.9


def test_the_past_tells_two_equal_stretches_apart() -> None:
    # Rows 0..49 look like 60..109, and only rows 50..59 have no twin. Single frames take the lower row.
    true = np.arange(52, 105)
    distances = views(true, 110, np.random.default_rng(5))
    twins = true >= 60
    distances[np.flatnonzero(twins), true[twins] - 60] = distances[np.flatnonzero(twins), true[twins]]
    assert distances[20].argmin() == true[20] - 60
    assert rows_of(follow(SequenceMatcher(110, BITS), distances)) == true.tolist()


def test_nothing_looks_ahead() -> None:
    distances = np.random.default_rng(7).integers(100, FAR, (30, 60))
    whole = follow(SequenceMatcher(60, BITS), distances)
    for n in (1, 2, 13):
        part = follow(SequenceMatcher(60, BITS), distances[:n])
        assert [(m.row, m.probability) for m in part] == [(m.row, m.probability) for m in whole[:n]]


def test_the_order_of_the_shortlist_does_not_matter() -> None:
    rng = np.random.default_rng(9)
    one, other = SequenceMatcher(60, BITS), SequenceMatcher(60, BITS)
    for frame in rng.integers(300, 310, (20, 60)):
        distances, rows = shortlist(frame, 9)
        shuffled = rng.permutation(9)
        assert one.push(distances, rows).row == other.push(distances[shuffled], rows[shuffled]).row


def test_work_is_bounded_by_window_and_k_and_not_by_the_map() -> None:
    rng = np.random.default_rng(11)
    k, window, n_speeds, n_steps = 10, 6, len(DEFAULT_SPEEDS), 4  # steps of 0 to 3 rows
    frames = [(rng.integers(100, 400, k), rng.choice(5000, k, replace=False)) for _ in range(40)]
    small, large = (SequenceMatcher(n, BITS, window=window) for n in (5000, 10**12))
    for distances, rows in frames:
        for matcher in (small, large):
            match = matcher.push(distances, rows)
            assert len(match.rows) <= window * k
            assert matcher.operations <= window * k * n_speeds * n_steps + (window * k + k) * n_speeds
        assert small.operations == large.operations


# --- what robots do -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 199), st.integers(0, 199), st.integers(5, 60), st.integers(0, 2**32 - 1))
def test_a_kidnapped_robot_is_found_within_the_window(start: int, jump: int, n_before: int, seed: int) -> None:
    window = 20
    true = [*range(start, start + n_before), *range(jump, jump + window + 5)]
    distances = views(true, 300, np.random.default_rng(seed), clear=100)
    rows = rows_of(follow(SequenceMatcher(300, BITS, window=window), distances))
    assert rows[n_before + window :] == true[n_before + window :]


def test_a_robot_that_stops_and_goes_on() -> None:
    true = [*range(20), *[19] * 40, *range(20, 60)]
    matches = follow(SequenceMatcher(80, BITS), views(true, 80, np.random.default_rng(13), clear=120))
    wrong = np.flatnonzero(np.abs(np.array(rows_of(matches)) - true) > 2)
    assert len(wrong) <= 5  # it takes a few frames to see that the robot has stopped
    assert set(wrong.tolist()) <= set(range(20, 30))


def test_a_robot_that_turns_back_is_followed_if_that_is_allowed() -> None:
    true = np.array([*range(10, 60), *range(60, 10, -1)])
    distances = views(true, 80, np.random.default_rng(15), clear=80)
    forwards = np.array(rows_of(follow(SequenceMatcher(80, BITS), distances)))
    both = np.array(rows_of(follow(SequenceMatcher(80, BITS, backwards=True), distances)))
    assert (abs(both - true) <= 2).mean() > 0.92 > 0.8 > (abs(forwards - true) <= 2).mean()


def test_rows_that_the_shortlist_lacks_are_bridged() -> None:
    true = np.arange(60)
    distances = views(true, 80, np.random.default_rng(17))
    distances[20:30, :] = FAR + np.random.default_rng(1).integers(-20, 21, (10, 80))
    distances[np.arange(20, 30), true[20:30]] = 2 * FAR  # ten frames without the true row
    rows = np.array(rows_of(follow(SequenceMatcher(80, BITS), distances, k=6)))
    assert (abs(rows - true) <= 2).all()


def test_frames_that_say_nothing() -> None:
    matcher = SequenceMatcher(80, BITS)
    assert matcher.push([], []).row == -1
    distances = views(range(30), 80, np.random.default_rng(19))
    follow(matcher, distances[:25])
    for true in range(25, 29):
        match = matcher.push([-1, -1], [-1, -1])
        assert abs(match.row - true) <= 1
    assert matcher.push(*shortlist(distances[29], 8)).row == 29


@pytest.mark.parametrize("k", [1, 5])
def test_equal_distances_are_answered_by_row(k: int) -> None:
    assert SequenceMatcher(9, BITS).push([70] * k, list(range(8, 8 - k, -1))).row == 9 - k


def test_a_map_of_one_row() -> None:
    assert rows_of(follow(SequenceMatcher(1, BITS), np.full((4, 1), 30))) == [0] * 4


def test_a_search_up_to_a_radius_knows_that_others_are_farther() -> None:
    one, many = SequenceMatcher(50, BITS), SequenceMatcher(50, BITS)
    assert one.push([100], [30]).probability == pytest.approx(1 / 50)
    assert many.push([100], [30], unlisted_distance=FAR).probability > 0.4


# --- time ---------------------------------------------------------------------------------------------------


def test_dropped_frames_are_known_by_their_times() -> None:
    rng = np.random.default_rng(21)
    kept = np.flatnonzero(np.concatenate([np.ones(10, bool), rng.random(110) < 0.5]))
    distances = views(kept, 130, rng, clear=50)
    np.put_along_axis(distances, rng.integers(0, 130, (len(kept), 2)), FAR - 60, axis=1)
    matcher = SequenceMatcher(130, BITS)
    rows = [matcher.push(*shortlist(d, 10), time=0.5 * t).row for d, t in zip(distances, kept.tolist(), strict=True)]
    assert (abs(np.array(rows) - kept) <= 2)[10:].mean() > 0.9


def test_a_frame_with_the_same_time_changes_nothing() -> None:
    distances = views([3, 4, 60, 5], 80, np.random.default_rng(23))
    matcher = SequenceMatcher(80, BITS)
    before = [matcher.push(*shortlist(d, 8), time=t) for d, t in zip(distances[:2], (1.0, 2.0), strict=True)][-1]
    assert matcher.push(*shortlist(distances[2], 8), time=2.0) is before
    assert matcher.push(*shortlist(distances[3], 8), time=3.0).row == 5


def test_many_frames_of_one_interval_count_as_one() -> None:
    frames = views([10] * 10, 80, np.random.default_rng(25), clear=60)
    fast, slow = (SequenceMatcher(80, BITS, speeds=(0.0,), frame_interval_s=1.0) for _ in range(2))
    for i, frame in enumerate(frames):
        often = fast.push(*shortlist(frame, 8), time=0.1 * i)
    once = slow.push(*shortlist(frames[0], 8), time=0.0)
    assert often.row == once.row == 10
    seldom = [slow.push(*shortlist(frame, 8), time=1.0 + i) for i, frame in enumerate(frames[1:])][-1]
    assert often.probability < seldom.probability


def test_a_long_gap_starts_afresh() -> None:
    distances = views([*range(20), 50], 80, np.random.default_rng(27), clear=60)
    matcher = SequenceMatcher(80, BITS, window=10)
    for i, d in enumerate(distances[:-1]):
        matcher.push(*shortlist(d, 8), time=float(i))
    match = matcher.push(*shortlist(distances[-1], 8), time=29.0)
    alone = SequenceMatcher(80, BITS, window=10).push(*shortlist(distances[-1], 8))
    assert (match.row, match.probability, match.n_frames) == (50, alone.probability, 1)


@pytest.mark.parametrize("time", [1.9, -5.0, math.nan, math.inf])
def test_wrong_times_are_refused_and_change_nothing(time: float) -> None:
    distances = views([3, 4, 5], 80, np.random.default_rng(29))
    matcher, undisturbed = SequenceMatcher(80, BITS), SequenceMatcher(80, BITS)
    for one in (matcher, undisturbed):
        one.push(*shortlist(distances[0], 8), time=1.0)
        one.push(*shortlist(distances[1], 8), time=2.0)
    with pytest.raises(TetraError, match=r"time .* s? ?of a frame"):
        matcher.push(*shortlist(distances[2], 8), time=time)
    last = [one.push(*shortlist(distances[2], 8), time=3.0) for one in (matcher, undisturbed)]
    assert last[0].probability == last[1].probability


def test_reset_forgets() -> None:
    distances = views([30, 31, 3, 4], 80, np.random.default_rng(31))
    matcher, fresh = SequenceMatcher(80, BITS), SequenceMatcher(80, BITS)
    for i, d in enumerate(distances[:2]):
        matcher.push(*shortlist(d, 8), time=100.0 + i)
    matcher.reset()
    for i, d in enumerate(distances[2:]):
        one, other = (m.push(*shortlist(d, 8), time=float(i)) for m in (matcher, fresh))
        assert (one.row, one.probability, one.n_frames) == (other.row, other.probability, other.n_frames)


# --- routes -------------------------------------------------------------------------------------------------


def test_nothing_moves_from_one_traversal_to_the_next() -> None:
    for breaks, is_beyond in (([], True), ([20], False)):
        matcher = SequenceMatcher(Route(40, breaks), BITS)
        for row in range(15, 20):
            matcher.push([100], [row], unlisted_distance=FAR)
        for _ in range(2):
            rows = matcher.push([], []).rows
        assert bool((rows >= 20).any()) == is_beyond


def test_rows_in_the_order_of_travel() -> None:
    order = np.random.default_rng(35).permutation(60) * 3 + 1  # rows of a map with holes, in any order
    route = Route(order)
    assert route.rows(route.places(order)).tolist() == order.tolist()
    assert route.places(np.array([0, 2, 180, 10**9])).tolist() == [-1] * 4
    matcher = SequenceMatcher(route, BITS)
    for place, frame in enumerate(views(range(40), 60, np.random.default_rng(37))):
        distances, places = shortlist(frame, 8)
        assert matcher.push(distances, order[places]).row == order[place]


def test_traversals_from_positions_and_times() -> None:
    line = np.stack([np.arange(10.0) * 2, np.zeros(10)], axis=1)
    assert Route.of(range(20), np.concatenate([line, line + np.array([500, 0])])).n_traversals == 2
    assert Route.of(range(20), np.concatenate([line, line + np.array([19, 0])])).n_traversals == 1
    assert Route.of(range(10), line, largest_step_m=1.0).n_traversals == 10
    assert Route.of(range(10), np.full((10, 2), np.nan)).n_traversals == 1
    assert Route.of([7], [[0.0, 0.0]]).n_traversals == 1
    seconds = np.array([50.0, 51, 52, 53, 10, 11, 12, 13])
    route = Route.of(np.arange(8), np.full((8, 2), np.nan), seconds)
    assert route.n_traversals == 2
    assert route.rows(np.arange(8)).tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    seconds[3] = np.nan  # the order of travel is not known, then
    assert Route.of(np.arange(8), np.full((8, 2), np.nan), seconds).rows(np.arange(8)).tolist() == list(range(8))


def test_belief_outlives_a_change_of_the_map() -> None:
    true = list(range(12, 40))
    distances = views(true, 60, np.random.default_rng(39), clear=60)
    matcher = SequenceMatcher(60, BITS)
    before = follow(matcher, distances[:20])[-1]
    kept = np.delete(np.arange(80), [3, 4, 5])  # three places removed, twenty added
    matcher.follow(Route(kept))
    match = matcher.push([], [])
    assert before.row == true[19]
    assert match.row == true[20]


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"route": 0}, "0 rows"),
        ({"code_bits": 0}, "0 bits"),
        ({"window": 1}, "window of 1"),
        ({"speeds": ()}, "speeds"),
        ({"speeds": (math.nan,)}, "speeds"),
        ({"usual_speed": math.inf}, "usual speed inf"),
        ({"usual_speed": 1e6}, "far from all speeds"),
        ({"temperature": 0.0}, r"temperature 0\.0"),
        ({"tolerance": -1}, "tolerance of -1"),
        ({"frame_interval_s": 0.0}, r"0\.0 s"),
    ],
)
def test_settings_that_cannot_work(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SequenceMatcher(**{"route": 5, "code_bits": 8, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, [5]), "break at place 5"),
        ((5, [0]), "break at place 0"),
        (([3, 3],), "once"),
        (([-1, 2],), "once"),
        (([],), "0 rows"),
    ],
)
def test_routes_that_cannot_be(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Route(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("distances", "rows", "message"),
    [
        ([1, 2], [3], "two lists of k"),
        ([[1]], [[3]], "two lists of k"),
        ([1, 2], [3, 9], "row 9 is not one of the map's 9"),
        ([1, 2], [3, -2], "row -2"),
        ([1, -2], [3, 4], "distance -2"),
        ([1, 2], [3, 3], "named twice"),
    ],
)
def test_shortlists_that_cannot_be(distances: list[int], rows: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceMatcher(9, BITS).push(distances, rows)
