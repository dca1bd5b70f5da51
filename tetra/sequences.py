"""Where a robot is, from all frames so far: a causal filter over the rows of a map.

One frame is often mistaken for another; twenty in a row seldom are. :class:`SequenceMatcher` takes the shortlist of
each frame (the k nearest rows of the map and their Hamming distances) and keeps a belief over places and speeds. It
never looks ahead, and its work for a frame does not grow with the map.

Letters: R rows of the map, k rows of a shortlist, V speeds, W window, A rows that stand out (at most W k).

**Belief.** For each row, x = how much likelier the robot is there than at a row that no frame spoke for. So x is 1 for
all rows but the A that stand out, and of those only the excess x - 1, split over the speeds, is stored.

- *Motion.* A hypothesis (row, speed v) moves by v rows a frame: by the two whole numbers around v, in shares that make
  v on average, now and then by one row more or less, never against its direction. Seldom it takes another speed. What
  leaves the end of a traversal is dropped. All this is linear and leaves x = 1 alone, so it acts on the excess.
- *Jump.* With a small probability the robot was carried to any row: the excess is divided by 1 + c, where
  c = p / (1 - p) times the mean of x over the map.
- *Forgetting.* x <- x ^ (1 - 1 / W), so that the evidence of a frame that is n old counts (1 - 1 / W) ^ n.
- *Evidence.* x <- x exp((m - d) / T) for a listed row at distance d, where m is the largest distance of the shortlist:
  an unlisted row is at least that far, so it is taken to be just there and keeps its x.

After a robot was carried elsewhere, the old place loses evidence by both, while the new one gains it: with frames
that speak for the true row as clearly as those before, it takes less than 0.7 W frames, often far fewer.

**Answer.** The row with most belief around it, where a neighbour counts less the farther it is, down to nothing beyond
``tolerance`` rows; and the share that the rows within the tolerance have in the whole belief.

**T** is ``temperature`` times the bits of a code. Were bits and frames independent, T would be near 1 bit; but the bits
of real codes vary together, and frames that follow each other err alike. docs/localisation.md has what was tried.

Source: matching along lines of several speeds is SeqSLAM (Milford and Wyeth, ICRA 2012). Here a discrete Bayes filter
(Thrun, Burgard and Fox, Probabilistic Robotics, 2005, table 4.1) takes the place of the lines, with exponential
forgetting (Kulhavy and Zarrop, Int. J. Control 58, 1993).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tetra.errors import ConfigError, TetraError

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

DEFAULT_SPEEDS = (0.0, 0.5, 1.0, 1.5, 2.0)
DEFAULT_WINDOW = 30
DEFAULT_TEMPERATURE = 0.08

_CHANGE_TO_BESIDE = 0.01
"""probability in a frame that the speed becomes one beside it"""
_CHANGE_TO_ANY = 0.01
"""probability in a frame that it becomes any, as when a robot stops or turns back"""
_JITTER = 0.1
"""probability of a step one row longer or shorter than the speed says"""
_JUMP = 0.01
"""probability that the robot is put elsewhere between two frames"""
_NEGLIGIBLE = 1e-3
"""an excess below this is as good as no evidence"""
_LARGEST_EVIDENCE = 100.0
"""of a frame, as log x; far from the end of float64 at e^709"""


# --- the map's rows as traversals ---------------------------------------------------------------------------


class Route:
    """Which row of the map comes after which.

    The rows make one or more traversals. Within one, neighbours in the order of travel are neighbours in the world;
    from one to the next nothing moves. A row's number in the order of travel is called its place.

    Attributes:
        n_rows: R, rows of the map.
    """

    def __init__(self, rows: int | npt.ArrayLike, breaks: npt.ArrayLike = ()) -> None:
        """``rows`` is int [R], the map's rows in the order of travel, or R for 0..R - 1. ``breaks`` are the places at
        which another traversal begins, such as 100 for places 0..99 and 100..R - 1.

        Raises:
            ConfigError: no rows, a row that is negative or named twice, or a break outside 1..R - 1.
        """
        order = None if isinstance(rows, int) else np.array(rows, dtype=np.int64).reshape(-1)
        self.n_rows: int = rows if isinstance(rows, int) else len(np.atleast_1d(np.asarray(rows)))
        if self.n_rows < 1:
            raise ConfigError(f"a map of {self.n_rows} rows: there is nothing to travel along; add places first")
        starts = np.asarray(breaks, dtype=np.int64).reshape(-1)
        outside = starts[(starts < 1) | (starts >= self.n_rows)]
        if len(outside):
            raise ConfigError(f"break at place {outside[0]}: it must be between 1 and {self.n_rows - 1}")
        self._starts = np.unique(np.append(starts, 0))
        self._row_at = self._sorted_rows = self._place_of_sorted = None
        if order is not None and not np.array_equal(order, np.arange(self.n_rows)):
            by_row = np.argsort(order)
            self._row_at, self._sorted_rows, self._place_of_sorted = order, order[by_row], by_row
            if self._sorted_rows[0] < 0 or (np.diff(self._sorted_rows) == 0).any():
                raise ConfigError("the order of travel must name each row of the map once, from 0 on")

    @classmethod
    def of(
        cls,
        rows: npt.ArrayLike,
        positions: npt.ArrayLike,
        times: npt.ArrayLike | None = None,
        *,
        largest_step_m: float = math.inf,
        largest_gap: float = 10.0,
    ) -> Route:
        """The traversals of ``rows`` int [R] from their positions float [R, 2] (metres) and times [R] (seconds).

        Both are NaN where they are not known. If every row has a time, rows are ordered by it, else as they stand. A
        traversal ends where the next row is more than ``largest_step_m`` away, or more than ``largest_gap`` times the
        median step, in metres or in seconds. So a map in no order at all has a traversal for each row.
        """
        order = np.asarray(rows, dtype=np.int64)
        positions_m = np.asarray(positions, dtype=np.float64).reshape(len(order), 2)
        seconds = np.full(len(order), np.nan) if times is None else np.asarray(times, dtype=np.float64)
        if np.isfinite(seconds).all():
            by_time = np.argsort(seconds, kind="stable")
            order, positions_m, seconds = order[by_time], positions_m[by_time], seconds[by_time]
        steps_m = np.hypot(*np.diff(positions_m, axis=0).T)
        far = _beyond(steps_m, largest_gap) | _beyond(np.diff(seconds), largest_gap)
        far |= np.nan_to_num(steps_m) > largest_step_m
        return cls(order, np.flatnonzero(far) + 1)

    @property
    def n_traversals(self) -> int:
        """How many stretches of the map are travelled in one go."""
        return len(self._starts)

    def places(self, rows: IntArray) -> IntArray:
        """Places of ``rows``; -1 for one that is not on the route."""
        if self._sorted_rows is None or self._place_of_sorted is None:
            return np.where((rows >= 0) & (rows < self.n_rows), rows, -1)
        found = np.minimum(np.searchsorted(self._sorted_rows, rows), self.n_rows - 1)
        return np.where(self._sorted_rows[found] == rows, self._place_of_sorted[found], -1)

    def rows(self, places: IntArray) -> IntArray:
        """Rows at ``places``."""
        return places if self._row_at is None else self._row_at[places]

    def traversals(self, places: IntArray) -> IntArray:
        """Number of the traversal that each of ``places`` belongs to."""
        return np.searchsorted(self._starts, places, side="right") - 1

    def room(self, places: IntArray, n: int) -> IntArray:
        """How many places within ``n`` of each are in its traversal, itself included."""
        traversals = self.traversals(places)
        first = self._starts[traversals]
        end = np.append(self._starts[1:], self.n_rows)[traversals]
        return np.minimum(places + n + 1, end) - np.maximum(places - n, first)

    def moved(self, places: IntArray, step: int) -> tuple[IntArray, BoolArray]:
        """``places`` after ``step``, and which of them are still in the same traversal."""
        there = places + step
        inside = (there >= 0) & (there < self.n_rows)
        return there, inside & (self.traversals(there) == self.traversals(places))


def _beyond(steps: FloatArray, factor: float) -> BoolArray:
    """Steps that are more than ``factor`` times the median of those that are not zero; unknown ones are not."""
    moves = steps[np.isfinite(steps) & (steps > 0)]
    return np.nan_to_num(steps) > factor * np.median(moves) if len(moves) else np.zeros(len(steps), dtype=bool)


def check_time(time: float, last: float | None) -> None:
    """Refuse the time of a frame, in seconds, that is not finite or before that of the last one.

    Raises:
        TetraError: it is.
    """
    if not math.isfinite(time):
        raise TetraError(f"time {time} of a frame: it must be a finite number of seconds")
    if last is not None and time < last:
        raise TetraError(
            f"time {time} s of a frame: the last one had {last} s, and clocks don't go back; push frames in order, "
            "or reset first"
        )


# --- the filter ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SequenceMatch:
    """Where the frames so far say that the robot is.

    ``rows`` (int64 [A]) are the rows that stand out, in the order of travel, and ``weights`` (float64 [A]) their shares
    of the belief; what is missing to 1 is spread evenly over the others.
    """

    row: int
    """the best row, or -1 while nothing is known"""
    probability: float
    """share of the belief within ``tolerance`` rows of it"""
    rows: IntArray
    weights: FloatArray
    n_frames: int
    """frames since the start, the last reset or a gap of the window"""


class SequenceMatcher:
    """A causal filter over the rows of a map; see the module. One thread at a time may push.

    Attributes:
        operations: additions to hypotheses in the last push, to see that the work is bounded by the shortlists:
            at most W k V s a motion step and (W k + k) V for the evidence, with s the different steps of all speeds.
    """

    _places: IntArray
    _excess: FloatArray
    _last: SequenceMatch | None

    def __init__(
        self,
        route: Route | int,
        code_bits: int,
        *,
        window: int = DEFAULT_WINDOW,
        speeds: Sequence[float] = DEFAULT_SPEEDS,
        usual_speed: float = 1.0,
        backwards: bool = False,
        temperature: float = DEFAULT_TEMPERATURE,
        tolerance: int = 2,
        frame_interval_s: float | None = None,
    ) -> None:
        """
        Args:
            route: the map's traversals, or its number of rows if they are one.
            code_bits: bits of a code, the largest distance there can be.
            window: W, frames of memory.
            speeds: in rows a frame.
            usual_speed: before any frame, a speed counts half for each 0.5 that it differs from this one.
            backwards: allow each speed with the other sign too.
            temperature: T as a part of the code's bits.
            tolerance: rows to each side whose belief speaks for a row.
            frame_interval_s: seconds for which a speed moves once. By default the lower quartile of the last W
                intervals, so that a frame dropped now and then does not stretch it.

        Raises:
            ConfigError: a value that cannot work.
        """
        self.route = Route(route) if isinstance(route, int) else route
        if code_bits < 1:
            raise ConfigError(f"codes of {code_bits} bits: there must be at least 1")
        if window < 2:
            raise ConfigError(f"window of {window} frames: it must be at least 2")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ConfigError(f"temperature {temperature}: it must be a positive number, such as {DEFAULT_TEMPERATURE}")
        if tolerance < 0:
            raise ConfigError(f"tolerance of {tolerance} rows: it must be at least 0")
        if frame_interval_s is not None and not (math.isfinite(frame_interval_s) and frame_interval_s > 0):
            raise ConfigError(f"frame interval of {frame_interval_s} s: it must be a positive number")
        self.window, self.tolerance, self.frame_interval_s = window, tolerance, frame_interval_s
        self.speeds = _all_speeds(speeds, backwards)
        self._temperature_bits = temperature * code_bits
        self._prior = _speed_prior(self.speeds, usual_speed)
        self._steps, self._kernel = _motion(self.speeds)
        self.reset()

    def follow(self, route: Route) -> None:
        """Go on along another route, when the map has changed; what was believed of rows that stay is kept."""
        rows = self.route.rows(self._places)
        self.route = route
        places = route.places(rows)
        order = np.argsort(places)[np.count_nonzero(places < 0) :]
        self._places, self._excess = places[order], self._excess[order]
        self._last = None

    def restrict(self, is_inside: Callable[[IntArray], BoolArray]) -> None:
        """Forget what was believed of rows outside, as when a position was measured.

        ``is_inside`` says of rows, int64 [n], which are inside, bool [n].
        """
        inside = is_inside(self.route.rows(self._places))
        if not inside.all():
            self._places, self._excess = self._places[inside], self._excess[inside]
            self._last = None

    def reset(self) -> None:
        """Forget all frames and times, as before the first push."""
        self._places = np.empty(0, dtype=np.int64)
        self._excess = np.empty((0, len(self.speeds)))
        self._n_frames = 0
        self._limit = 0
        self._time: float | None = None
        self._owed = 0.0  # part of a step that the times have not made up yet
        self._intervals: deque[float] = deque(maxlen=self.window)
        self._last = None
        self.operations = 0

    def push(
        self,
        distances: npt.ArrayLike,
        rows: npt.ArrayLike,
        time: float | None = None,
        *,
        unlisted_distance: int | None = None,
    ) -> SequenceMatch:
        """Take in the shortlist of the next frame and say where the robot is now.

        ``distances`` and ``rows`` are int [k], any order; a row of -1 stands for none. An empty shortlist is a frame
        that says nothing. ``unlisted_distance`` is the least distance that a row outside the shortlist can have, if it
        is more than the largest listed one (after a search up to a radius).

        ``time`` is in seconds. Hypotheses move as many steps as the time since the last frame has intervals, and a gap
        of W intervals starts afresh. A frame that comes sooner than an interval counts for that part of one, since
        it is much like the last one; a frame with the time of the last one is that frame and changes nothing.

        Raises:
            TetraError: the time is before the last one or not finite. The matcher is as it was.
            ValueError: shapes differ, a row is named twice or is not in the map, or a distance is negative.
        """
        places, log_evidence = self._check(distances, rows, unlisted_distance)
        n_steps, share = self._steps_to(time)
        if share == 0.0 and self._last is not None:
            return self._last
        log_evidence = log_evidence * share
        self.operations = 0
        self._limit = max(self._limit, self.window * len(places))
        if self._n_frames:
            if n_steps >= self.window:
                self._places, self._excess, self._n_frames = self._places[:0], self._excess[:0], 0
            for _ in range(n_steps):
                self._move()
                self._fade()
                self._keep_strongest()
        self._weigh(places, log_evidence)
        self._n_frames += 1
        self._last = self._answer(places, log_evidence)
        return self._last

    # --- steps of a push

    def _check(
        self, distances: npt.ArrayLike, rows: npt.ArrayLike, unlisted_distance: int | None
    ) -> tuple[IntArray, FloatArray]:
        """Places and log evidence [k] of a shortlist, sorted by place."""
        bits, listed = np.asarray(distances).astype(np.int64), np.asarray(rows).astype(np.int64)
        if bits.ndim != 1 or bits.shape != listed.shape:
            raise ValueError(f"distances {list(bits.shape)} and rows {list(listed.shape)} must be two lists of k")
        bits, listed = bits[listed != -1], listed[listed != -1]
        if not len(listed):
            return listed, np.empty(0)
        places = self.route.places(listed)
        if places.min() < 0:
            raise ValueError(f"row {listed[places < 0][0]} is not one of the map's {self.route.n_rows}")
        if bits.min() < 0:
            raise ValueError(f"distance {bits.min()} is negative")
        order = np.argsort(places)
        places, bits = places[order], bits[order]
        if (places[1:] == places[:-1]).any():
            raise ValueError("a row is named twice in the shortlist")
        unlisted = max(int(bits.max()), unlisted_distance or 0)
        return places, np.minimum((unlisted - bits) / self._temperature_bits, _LARGEST_EVIDENCE)

    def _steps_to(self, time: float | None) -> tuple[int, float]:
        """How often the hypotheses move until ``time``, which becomes the last one, and how much its frame counts."""
        if time is None:
            return 1, 1.0
        last = self._time
        check_time(time, last)
        self._time = time
        if last is None:
            return 1, 1.0
        if time == last:
            return 0, 0.0
        usual = self.frame_interval_s or (float(np.quantile(self._intervals, 0.25)) if self._intervals else time - last)
        self._intervals.append(time - last)
        n_intervals = min((time - last) / usual, float(self.window))
        n_steps = round(self._owed + n_intervals)
        self._owed += n_intervals - n_steps
        return n_steps, min(n_intervals, 1.0)

    def _move(self) -> None:
        """One motion step of every hypothesis; those that meet are added."""
        parts = [self.route.moved(self._places, step) for step in self._steps]
        targets = np.concatenate([there[inside] for there, inside in parts])
        values = np.concatenate(
            [self._excess[inside] @ self._kernel[i] for i, (_, inside) in enumerate(parts)],
        )
        self.operations += values.size
        self._places, inverse = np.unique(targets, return_inverse=True)
        self._excess = np.zeros((len(self._places), len(self.speeds)))
        np.add.at(self._excess, inverse, values)

    def _fade(self) -> None:
        odds = self._excess.sum(axis=1)
        kept = odds > 0
        self._places, self._excess, odds = self._places[kept], self._excess[kept], odds[kept]
        faded = np.expm1((1.0 - 1.0 / self.window) * np.log1p(odds))
        self._excess *= (faded / odds)[:, None]
        jump = _JUMP / (1.0 - _JUMP) * (1.0 + float(faded.sum()) / self.route.n_rows)
        self._excess /= 1.0 + jump

    def _weigh(self, places: IntArray, log_evidence: FloatArray) -> None:
        """Multiply x of the listed places."""
        merged = np.union1d(self._places, places)
        excess = np.zeros((len(merged), len(self.speeds)))
        excess[np.searchsorted(merged, self._places)] = self._excess
        listed = np.searchsorted(merged, places)
        gain = np.expm1(log_evidence)[:, None]
        excess[listed] += gain * (excess[listed] + self._prior)
        self.operations += excess.size
        self._places, self._excess = merged, excess
        self._keep_strongest()

    def _keep_strongest(self) -> None:
        """Drop hypotheses that do not stand out, and the weakest beyond W k of them."""
        odds = self._excess.sum(axis=1)
        kept = odds > _NEGLIGIBLE
        if kept.sum() > self._limit:
            weakest_first = np.argsort(odds, kind="stable")
            kept[weakest_first[: len(odds) - self._limit]] = False
        self._places, self._excess = self._places[kept], self._excess[kept]

    def _answer(self, places: IntArray, log_evidence: FloatArray) -> SequenceMatch:
        odds = self._excess.sum(axis=1)
        whole = self.route.n_rows + float(odds.sum())
        if not len(odds):
            if not len(places):
                return SequenceMatch(-1, 0.0, self._places, odds, self._n_frames)
            # All that is listed is equally far: the first row, as single frames are answered.
            nearest = int(self.route.rows(places)[log_evidence == log_evidence.max()].min())
            return SequenceMatch(nearest, 1.0 / whole, self._places, odds, self._n_frames)
        near = odds + self.route.room(self._places, self.tolerance)
        rank = odds.copy()
        for offset in (*range(-self.tolerance, 0), *range(1, self.tolerance + 1)):
            there, inside = self.route.moved(self._places, offset)
            found = np.minimum(np.searchsorted(self._places, there), len(odds) - 1)
            beside = np.where(inside & (self._places[found] == there), odds[found], 0.0)
            near += beside
            rank += beside * (1.0 - abs(offset) / (self.tolerance + 1))
        best = np.lexsort((self.route.rows(self._places), -odds, -rank))[0]
        return SequenceMatch(
            row=int(self.route.rows(self._places[best : best + 1])[0]),
            probability=float(near[best] / whole),
            rows=self.route.rows(self._places),
            weights=(odds + 1.0) / whole,
            n_frames=self._n_frames,
        )


def _all_speeds(speeds: Sequence[float], backwards: bool) -> tuple[float, ...]:
    if not len(speeds) or not all(math.isfinite(speed) and abs(speed) <= 100 for speed in speeds):
        raise ConfigError(f"speeds {list(speeds)}: name at least one, each at most 100 rows a frame")
    return tuple(sorted({float(s) for s in speeds} | ({-float(s) for s in speeds} if backwards else set())))


def _speed_prior(speeds: Sequence[float], usual_speed: float) -> FloatArray:
    if not math.isfinite(usual_speed):
        raise ConfigError(f"usual speed {usual_speed}: it must be a finite number of rows a frame")
    weights = np.exp2(-np.abs(np.asarray(speeds) - usual_speed) / 0.5)
    if not weights.any():
        raise ConfigError(f"usual speed {usual_speed} is far from all speeds {list(speeds)}; name one near them")
    return weights / weights.sum()


def _motion(speeds: Sequence[float]) -> tuple[list[int], FloatArray]:
    """Steps s and kernel [s, V, V]: the probability to step so far and have another speed after it."""
    n = len(speeds)
    change = np.eye(n) * (1.0 - _CHANGE_TO_BESIDE - _CHANGE_TO_ANY) + _CHANGE_TO_ANY / n
    for i in range(n):
        beside = [j for j in (i - 1, i + 1) if 0 <= j < n] or [i]
        for j in beside:
            change[i, j] += _CHANGE_TO_BESIDE / len(beside)
    stepping: dict[int, FloatArray] = {}
    for i, speed in enumerate(speeds):
        whole, part = math.floor(speed), speed - math.floor(speed)
        for base, share in ((whole, 1.0 - part), (whole + 1, part)):
            for shift, chance in ((-1, _JITTER / 2), (0, 1.0 - _JITTER), (1, _JITTER / 2)):
                step = base + shift
                step = max(step, 0) if speed >= 0 else min(step, 0)
                if share * chance:
                    stepping.setdefault(step, np.zeros(n))[i] += share * chance
    steps = sorted(stepping)
    return steps, np.stack([stepping[step][:, None] * change for step in steps])
