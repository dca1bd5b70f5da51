"""From a camera frame to "you are here": one answer for each frame, as it comes.

    with PlaceMap.open("campus", read_only=True) as place_map:
        localizer = Localizer(tetra.load("nano"), place_map)
        for image, seconds in camera:
            answer = localizer.push(image, seconds)
            if answer.accepted:
                drive(answer.position, answer.spread_m)

Letters: k matches of a frame, B bytes of a code, W frames that the sequence remembers.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from tetra.confidence import BoolArray, Calibration, distance_ratio, estimate_position, second_place
from tetra.engine import Engine
from tetra.errors import ConfigError, ImageError, MapError
from tetra.images import load_image
from tetra.kernels import hamming_search, pack_bits
from tetra.model import TetraModel
from tetra.place_map import Hits, PlaceMap
from tetra.regions import Region
from tetra.sequences import (
    DEFAULT_SPEEDS,
    DEFAULT_TEMPERATURE,
    DEFAULT_WINDOW,
    Route,
    SequenceMatch,
    SequenceMatcher,
    check_time,
)

DEFAULT_K = 25
DEFAULT_PLACE_RADIUS_M = 25.0
DEFAULT_PLACE_ROWS = 3

SCORED_FRAMES = 5
"""the score of a sequence is over that many frames"""
FRAMES_ALIKE = 4.0
"""a frame by itself counts that much more than one of a sequence, whose frames err alike"""


class _Hits(Protocol):
    @property
    def distances(self) -> npt.NDArray[np.int32]: ...

    @property
    def rows(self) -> npt.NDArray[np.int64]: ...

    @property
    def similarities(self) -> npt.NDArray[np.float32] | None: ...


class SearchedMap(Protocol):
    """What is needed of a map: of a :class:`tetra.place_map.PlaceMap`, or of a :class:`CodeMap`."""

    @property
    def model_hash(self) -> str | None: ...

    @property
    def code_bytes(self) -> int: ...

    def __len__(self) -> int: ...

    def search(self, codes: Tensor, k: int, *, within: Region | None = None) -> _Hits: ...

    def rows(self) -> npt.NDArray[np.int64]: ...

    def codes(self, rows: npt.ArrayLike) -> npt.NDArray[np.uint8]: ...

    def positions(self, rows: npt.ArrayLike) -> npt.NDArray[np.float64]: ...

    def headings(self, rows: npt.ArrayLike) -> npt.NDArray[np.float32]: ...

    def times(self, rows: npt.ArrayLike) -> npt.NDArray[np.float64]: ...

    def ids(self, rows: npt.ArrayLike) -> list[str | None]: ...


@dataclass(frozen=True)
class _Found:
    distances: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int64]
    similarities: npt.NDArray[np.float32] | None = None


class CodeMap:
    """A map in memory: codes uint8 [R, B] in the order of travel, and float positions [R, 2] in metres if known."""

    def __init__(self, codes: Tensor, positions: npt.ArrayLike | None = None, *, model_hash: str | None = None) -> None:
        self._codes = codes.cpu().contiguous()
        n_rows = len(codes)
        self._positions = np.full((n_rows, 2), np.nan) if positions is None else np.array(positions, dtype=np.float64)
        if self._positions.shape != (n_rows, 2):
            raise MapError(f"positions {list(self._positions.shape)} do not fit {n_rows} codes; give [{n_rows}, 2]")
        self.model_hash = model_hash
        self.code_bytes = int(codes.shape[1])

    def __len__(self) -> int:
        return len(self._codes)

    def search(self, codes: Tensor, k: int, *, within: Region | None = None) -> _Found:
        """The ``k`` nearest rows of each code, by (distance, row); -1 and -1 where fewer lie ``within`` the region."""
        mask = None if within is None else within.mask(self._positions, self.headings(self.rows()))
        distances, rows = hamming_search(
            codes, self._codes, k, allowed=None if mask is None else torch.from_numpy(mask)
        )
        return _Found(distances.numpy(), rows.numpy())

    def rows(self) -> npt.NDArray[np.int64]:
        """All rows, 0..R - 1."""
        return np.arange(len(self))

    def codes(self, rows: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Codes [..., B] of ``rows``."""
        codes: npt.NDArray[np.uint8] = self._codes.numpy()[np.asarray(rows)]
        return codes

    def positions(self, rows: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Positions [..., 2] of ``rows``, NaN where they are not known."""
        return self._positions[np.asarray(rows)]

    def headings(self, rows: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """NaN: no headings are known."""
        return np.full(np.shape(rows), np.nan, dtype=np.float32)

    def times(self, rows: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """NaN: no times are known."""
        return np.full(np.shape(rows), np.nan)

    def ids(self, rows: npt.ArrayLike) -> list[str | None]:
        """The rows' numbers."""
        return [str(row) for row in np.asarray(rows).tolist()]


# --- answers ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timings:
    """Where the milliseconds of a push went; 0 for what there was none of."""

    decode_ms: float = 0.0
    preprocess_ms: float = 0.0
    network_ms: float = 0.0
    search_ms: float = 0.0
    decide_ms: float = 0.0
    """the sequence, the second place and the position"""

    @property
    def total_ms(self) -> float:
        """The sum."""
        return self.decode_ms + self.preprocess_ms + self.network_ms + self.search_ms + self.decide_ms


@dataclass(frozen=True)
class PlaceMatch:
    """A place of the shortlist."""

    id: str
    row: int
    distance: int
    """bits that differ"""
    position: tuple[float, float] | None
    """metres, in the map's frame"""
    similarity: float | None = None
    """cosine of the float descriptors, where matches were ranked by it"""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``similarity`` only where there is one."""
        ranked = {} if self.similarity is None else {"similarity": self.similarity}
        return {"id": self.id, "distance": self.distance, "position": _as_list(self.position), **ranked}


@dataclass(frozen=True)
class Answer:
    """Where a frame was taken."""

    id: str
    """of the best place: the nearest one, the most similar one if matches are ranked again; in a sequence the one that
    all frames so far speak for"""
    row: int
    distance: int
    """bits in which this frame differs from the best match of that place"""
    margin: int
    """by how many more it differs from the best match of another place; below 0 if that one is nearer. Where all
    matches are of one place, it is at least this"""
    score: float
    """(distance + 1) / (distance + margin + 1); in a sequence, distances are summed over the last 5 frames"""
    belief: float
    """share of the belief that is in the best place, between 0 and 1. It orders answers, but is not the probability of
    being right: a place that the map lacks has no share"""
    accepted: bool | None
    """what the calibration says of score or distance; None without one"""
    position: tuple[float, float] | None
    """metres, in the map's frame; None if the map has no positions there"""
    spread_m: float | None
    """see :func:`tetra.confidence.estimate_position`"""
    matches: tuple[PlaceMatch, ...]
    """the shortlist of this frame, nearest first, or most similar first"""
    time: float | None
    timings: Timings = field(compare=False)

    def to_dict(self, n_matches: int | None = None) -> dict[str, Any]:
        """Plain JSON values, with the first ``n_matches`` matches; the best place is ``id``, not always a match."""
        return {
            "accepted": self.accepted,
            "id": self.id,
            "distance": self.distance,
            "margin": self.margin,
            "score": self.score,
            "belief": self.belief,
            "position": _as_list(self.position),
            "spread_m": self.spread_m,
            "time": self.time,
            "matches": [match.to_dict() for match in self.matches[:n_matches]],
        }


def _as_list(position: tuple[float, float] | None) -> list[float] | None:
    return None if position is None else list(position)


# --- the localizer ------------------------------------------------------------------------------------------

Frame = str | Path | Tensor | npt.NDArray[np.uint8]


class Localizer:
    """Answers frame after frame against a map.

    One camera, one localizer: the frames of a sequence have to come from one robot, in order. A lock makes threads that
    push at once take turns. A model may be shared between localizers, as :meth:`tetra.model.TetraModel.describe` says.
    When the number of places in the map changes, the next push sees it.

    Args:
        model: describes frames; None if codes will be pushed.
        place_map: a :class:`~tetra.place_map.PlaceMap` or :class:`CodeMap` of that model. Its rows are one or more
            traversals, see :meth:`tetra.sequences.Route.of`, which finds them by positions and times.
        k: matches of a frame; a smaller map answers with all it has.
        window: W, frames of memory; 1 answers each frame by itself.
        calibration: which answers to accept; made from single frames for window 1, else from sequences.
        place_radius_m: matches within this distance of the best one are of its place.
        place_rows: where a position is not known, matches within so many rows of the order of travel are.
        route: the traversals, if the map's positions and times do not tell; fixed, so the map must not change.
        image_size: (height, width) that frames are scaled to; the engine's or the model's by default.
        engine: runs the model in its place, an engine of batch 1 for uint8 images that is warmed up.
        rerank: rank the k matches by the float descriptors that the map keeps. The first one is the answer of a single
            frame then; scores go on counting bits, so a calibration holds. Not for sequences, which weigh bits.
        speeds, usual_speed, backwards, temperature, frame_interval_s: see :class:`~tetra.sequences.SequenceMatcher`.

    Raises:
        ConfigError: a value that cannot work, or a calibration of another model or kind.
        MapError: the map is empty, of another model, or keeps no descriptors to rank by.
    """

    def __init__(
        self,
        model: TetraModel | None,
        place_map: SearchedMap,
        *,
        k: int = DEFAULT_K,
        window: int = DEFAULT_WINDOW,
        calibration: Calibration | Mapping[str, Any] | None = None,
        place_radius_m: float = DEFAULT_PLACE_RADIUS_M,
        place_rows: int = DEFAULT_PLACE_ROWS,
        route: Route | None = None,
        image_size: tuple[int, int] | None = None,
        engine: Engine | None = None,
        rerank: bool = False,
        speeds: tuple[float, ...] = DEFAULT_SPEEDS,
        usual_speed: float = 1.0,
        backwards: bool = False,
        temperature: float = DEFAULT_TEMPERATURE,
        frame_interval_s: float | None = None,
    ) -> None:
        if k < 1:
            raise ConfigError(f"k = {k}: it counts matches, so it must be at least 1")
        if window < 1:
            raise ConfigError(f"window of {window} frames: it must be at least 1")
        if not (np.isfinite(place_radius_m) and place_radius_m > 0):
            raise ConfigError(f"place radius of {place_radius_m} m: it must be a positive number")
        if place_rows < 0:
            raise ConfigError(f"{place_rows} rows of a place: it must be at least 0")
        if not len(place_map):
            raise MapError("the map is empty; add places first")
        if model is not None and place_map.model_hash is not None and model.content_hash != place_map.model_hash:
            name = "a model that was never saved" if model.content_hash is None else model.content_hash[:12]
            raise MapError(f"model: it is {name}, the map is of {place_map.model_hash[:12]}; use that one")
        if engine is not None and (model is None or engine.shape[0] != 1 or engine.image_dtype != torch.uint8):
            raise ConfigError(
                f"engine for images {engine.shape} of {engine.image_dtype}: it must take 1 image of torch.uint8, "
                "and its model must be given with it"
            )
        if isinstance(calibration, Mapping):
            calibration = Calibration.from_dict(calibration)
        if calibration is not None:
            calibration.check(model.content_hash if model else place_map.model_hash, place_map.code_bytes)
            if calibration.of_sequences != (window > 1):
                made, used = ("sequences", "1") if calibration.of_sequences else ("single frames", "above 1")
                raise ConfigError(f"calibration: made from {made}, used with a window {used}; calibrate again")
        if rerank and (model is None or window > 1):
            why = "a sequence weighs bits, so use window 1" if model else "codes alone have none, so give the model"
            raise ConfigError(f"rerank: matches are ranked by float descriptors; {why}")
        if rerank and not isinstance(place_map, PlaceMap):
            raise ConfigError("rerank: a map of codes keeps no float descriptors; use a PlaceMap")
        self._ranked_map = place_map if rerank and isinstance(place_map, PlaceMap) else None
        if self._ranked_map is not None and self._ranked_map.descriptor_dims is None:
            raise MapError(
                f"{self._ranked_map.path}: keeps no float descriptors to rank by; build it with --keep-descriptors, "
                "from Python with keep_descriptors"
            )
        self.model, self.map, self.k, self.window = model, place_map, k, window
        self.calibration, self.place_radius_m, self.place_rows = calibration, float(place_radius_m), place_rows
        self._describer: Engine | TetraModel | None = engine or model
        if engine is not None:
            self.image_size, self._device = (engine.shape[2], engine.shape[3]), engine.device
        elif model is not None:
            self.image_size, self._device = image_size or model.image_size, model.image_mean.device
        self._route_is_given = route is not None
        self._route = route
        self._n_seen = len(place_map)
        self._alone_bits = temperature * 8 * place_map.code_bytes / FRAMES_ALIKE
        self._matcher: SequenceMatcher | None = None
        if window > 1:
            self._matcher = SequenceMatcher(
                self.route,
                8 * place_map.code_bytes,
                window=window,
                speeds=speeds,
                usual_speed=usual_speed,
                backwards=backwards,
                temperature=temperature,
                frame_interval_s=frame_interval_s,
            )
        self._recent: deque[tuple[int, int]] = deque(maxlen=SCORED_FRAMES)
        self._n_frames = 0
        self._last: tuple[Tensor, SequenceMatch] | None = None
        self._time: float | None = None
        self._lock = threading.Lock()

    @property
    def route(self) -> Route:
        """The order of travel of the map's rows."""
        if self._route is None:
            rows = self.map.rows()
            self._route = Route.of(
                rows, self.map.positions(rows), self.map.times(rows), largest_step_m=self.place_radius_m
            )
        return self._route

    def reset(self) -> None:
        """Forget the sequence: the next frame begins a new one."""
        with self._lock:
            self._recent.clear()
            self._last = self._time = None
            if self._matcher is not None:
                self._matcher.reset()

    def refresh(self) -> None:
        """Look at the map's rows, positions and times again, as after a pose graph was optimised; keep the sequence."""
        with self._lock:
            self._follow_map()

    def push(self, frame: Frame, time: float | None = None, *, within: Region | None = None) -> Answer:
        """Answer the next frame.

        Args:
            frame: an image file; uint8 pixels, [3, height, width], [height, width, 3] or [height, width]; or a code,
                uint8 [B].
            time: when it was taken, in seconds. Without times, frames are taken to come at a steady rate. A frame with
                the time or the very code of the last one adds nothing to the sequence.
            within: only places of this region can be the answer, such as a circle around the position that a satellite
                receiver gives. A sequence forgets what it believed of others. The second place is one inside too; if
                there is no other place inside, the nearest one of the whole map.

        Raises:
            ImageError: the file can't be read, or pixels have another type or shape.
            MapError: the code has another length, the map has become empty, or no place lies ``within`` the region; the
                sequence goes on with the next frame.
            ConfigError: an image without a model.
            TetraError: the time is before that of the last frame. The sequence goes on with the next one.
        """
        if time is not None:
            check_time(time, self._time)  # before the work; the lock below is for those that push at once
        if within is not None and not isinstance(within, Region):
            raise MapError(f"within {within!r}: pass a Region, such as Region.circle((x, y), 100.0)")
        code, floats, timings = self._described(frame)
        with self._lock:
            if time is not None:
                check_time(time, self._time)
            return self._locate(code, floats, time, within, timings)

    # --- steps of a push

    def _described(self, frame: Frame) -> tuple[Tensor, Tensor | None, dict[str, float]]:
        """The code uint8 [1, B] of a frame, its descriptor float [1, D] if that is used, and where the time went."""
        start = perf_counter()
        if isinstance(frame, (str, Path)):
            pixels = load_image(frame)
        else:
            pixels = _as_tensor(frame)
            if pixels.dim() == 1:
                if self._ranked_map is not None:
                    raise ConfigError("rerank: a code has no float descriptor to rank by; push the image")
                return pixels[None], None, {}
            pixels = _as_chw(pixels)
        if self._describer is None:
            raise ConfigError("a frame is an image, but there is no model to describe it; push its code, uint8 [B]")
        decoded = perf_counter()
        image = _resized(pixels, self.image_size)[None].to(self._device)
        prepared = perf_counter()
        if self._ranked_map is None:
            code, floats = self._describer.describe(image).cpu(), None
        else:
            with torch.inference_mode():
                floats = self._describer(image).float().cpu()
            if not bool(floats.isfinite().all()):
                raise MapError("model: it gives a descriptor with NaN or infinity; check its weights")
            code = pack_bits(floats)
        done = perf_counter()
        return (
            code,
            floats,
            {
                "decode_ms": 1e3 * (decoded - start),
                "preprocess_ms": 1e3 * (prepared - decoded),
                "network_ms": 1e3 * (done - prepared),
            },
        )

    def _locate(
        self, code: Tensor, floats: Tensor | None, time: float | None, within: Region | None, timings: dict[str, float]
    ) -> Answer:
        start = perf_counter()
        if code.dtype != torch.uint8 or code.shape[1] != self.map.code_bytes:
            raise MapError(
                f"code of {code.shape[1]} x {code.dtype}, but the map's codes are {self.map.code_bytes} x torch.uint8; "
                "use its model"
            )
        if not len(self.map):
            raise MapError("the map is empty; add places first")
        hits = self.map.search(code, min(self.k, len(self.map)), within=within)
        if self._ranked_map is not None and floats is not None and isinstance(hits, Hits):
            hits = self._ranked_map.rerank(hits, floats)
        found = hits.rows[0] >= 0
        distances, rows = hits.distances[0][found].astype(np.int64), hits.rows[0][found]
        if not len(rows):
            raise MapError("within: no place of the map is known to be there; widen the region, or leave it out")
        # With fewer than k inside, the whole map says what a distance is worth.
        wider = None if within is None or found.all() else self.map.search(code, min(self.k, len(self.map)))
        searched = perf_counter()
        if time is not None:
            self._time = time
        if len(self.map) != self._n_seen or (self._matcher is not None and (self.route.places(rows) < 0).any()):
            self._follow_map()

        best = int(rows[0])
        candidates, weights = rows, np.exp((distances.min() - distances) / self._alone_bits)
        if self._matcher is not None:
            # A picture that comes twice (a frozen camera, a robot that waits in a recording) says nothing new.
            is_repeated = self._last is not None and torch.equal(code, self._last[0])
            if within is not None:
                self._matcher.restrict(lambda rows: self._is_inside(within, rows))
            unlisted = None if wider is None else int(wider.distances[0].max())
            match = (
                self._last[1]
                if self._last and is_repeated
                else self._matcher.push(distances, rows, time, unlisted_distance=unlisted)
            )
            self._last = (code, match)
            best = match.row
            if match.n_frames == 1:
                self._recent.clear()
            elif match.n_frames == self._n_frames:  # the last frame again
                self._recent.pop()
            self._n_frames = match.n_frames
            if within is not None and not self._is_inside(within, np.array([best]))[0]:
                best = int(rows[0])  # belief that moved out, or of a frame that came before with another region
            elif len(match.rows):
                candidates, weights = match.rows, match.weights
        else:
            self._recent.clear()
        is_same = self._same_place(best, rows)
        distance = int(distances[is_same].min()) if is_same.any() else _bits(code, self.map.codes([best]))
        second = second_place(distances, is_same)
        if wider is not None and is_same.all():
            second = second_place(wider.distances[0], self._same_place(best, wider.rows[0]))
        self._recent.append((distance, second))
        score = distance_ratio(*np.sum(self._recent, axis=0).tolist())

        agrees = self._same_place(best, candidates)
        belief = float(weights[agrees].sum() / (weights.sum() if candidates is rows else 1.0))
        estimate = estimate_position(self.map.positions(candidates), weights, agrees, self.place_radius_m)
        accepted = None
        if self.calibration is not None:
            accepted = self.calibration.accepts(distance if self.calibration.quantity == "distance" else score)
        done = perf_counter()
        return Answer(
            id=self.map.ids([best])[0] or "",
            row=best,
            distance=distance,
            margin=second - distance,
            score=score,
            belief=min(belief, 1.0),
            accepted=accepted,
            position=None if estimate is None else estimate.position,
            spread_m=None if estimate is None else estimate.spread_m,
            matches=self._matches(distances, rows, None if hits.similarities is None else hits.similarities[0][found]),
            time=time,
            timings=Timings(**timings, search_ms=1e3 * (searched - start), decide_ms=1e3 * (done - searched)),
        )

    def _same_place(self, best: int, rows: npt.NDArray[np.int64]) -> BoolArray:
        """Which of ``rows`` [n] are of the place of row ``best``."""
        there, here = self.map.positions(rows), self.map.positions([best])[0]
        away_m = np.hypot(*(there - here).T)
        by_position = away_m <= self.place_radius_m
        unknown = np.isnan(away_m)
        if unknown.any():
            route = self.route
            places, place = route.places(rows), route.places(np.array([best]))
            near = (abs(places - place) <= self.place_rows) & (route.traversals(places) == route.traversals(place))
            by_position = np.where(unknown, near, by_position)
        return by_position

    def _is_inside(self, within: Region, rows: npt.NDArray[np.int64]) -> BoolArray:
        return within.mask(self.map.positions(rows), self.map.headings(rows))

    def _matches(
        self,
        distances: npt.NDArray[np.int64],
        rows: npt.NDArray[np.int64],
        similarities: npt.NDArray[np.float32] | None,
    ) -> tuple[PlaceMatch, ...]:
        positions = self.map.positions(rows)
        known = np.asarray(np.isfinite(positions).all(axis=1))
        return tuple(
            PlaceMatch(id or "", row, distance, (position[0], position[1]) if is_known else None, similarity)
            for id, row, distance, position, is_known, similarity in zip(
                self.map.ids(rows),
                rows.tolist(),
                distances.tolist(),
                positions.tolist(),
                known.tolist(),
                [None] * len(rows) if similarities is None else similarities.tolist(),
                strict=True,
            )
        )

    def _follow_map(self) -> None:
        if self._route_is_given:
            raise ConfigError("the map has changed, but the route was given; make a localizer with a new route")
        self._route = None
        self._n_seen = len(self.map)
        if self._matcher is not None:
            self._matcher.follow(self.route)
            self._last = None


def _as_tensor(frame: Tensor | npt.NDArray[np.uint8]) -> Tensor:
    if not isinstance(frame, (Tensor, np.ndarray)):
        raise ImageError(f"frame of type {type(frame).__name__}: give a path, or uint8 pixels or code as an array")
    if isinstance(frame, np.ndarray):
        if frame.dtype != np.uint8:
            raise ImageError(f"frame of dtype {frame.dtype}: pixels and codes are uint8")
        return torch.from_numpy(np.require(frame, requirements=["C", "W"]))
    if frame.dtype != torch.uint8:
        raise ImageError(f"frame of dtype {frame.dtype}: pixels and codes are uint8")
    return frame


def _as_chw(pixels: Tensor) -> Tensor:
    """uint8 [3, height, width] of pixels in one of the usual layouts; three rows and three channels are [3, H, W]."""
    if pixels.dim() == 2:
        pixels = pixels.expand(3, *pixels.shape)
    elif pixels.dim() == 3 and pixels.shape[0] != 3 and pixels.shape[2] == 3:
        pixels = pixels.permute(2, 0, 1)
    if pixels.dim() != 3 or pixels.shape[0] != 3 or not pixels.numel():
        raise ImageError(
            f"frame of shape {list(pixels.shape)}: give pixels [3, H, W], [H, W, 3] or [H, W], or a code [B]"
        )
    return pixels


def _resized(pixels: Tensor, image_size: tuple[int, int]) -> Tensor:
    """As :func:`tetra.images.load_image` scales, so that a frame has one code whichever way it comes."""
    if tuple(pixels.shape[1:]) == tuple(image_size):
        return pixels
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
    image = image.resize((image_size[1], image_size[0]), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _bits(code: Tensor, other: npt.NDArray[np.uint8]) -> int:
    return int(np.bitwise_count(code.numpy() ^ other).sum())
