"""How far an answer can be trusted: thresholds from known answers, the second place, and the estimate of a position.

Letters: n answers, k matches of a frame, best first.

**Score.** A distance alone says little: 1500 of 6400 bits may be right between day and night and wrong in a corridor.
So the default score is the ratio test of Lowe (IJCV 60, 2004, section 7.1): the distance of the best place over that of
the best match of *another* place. It has no unit, and is 1 where two places fit alike. In a sequence it is taken of the
place that the sequence says, and over the last few frames, sum by sum.

**Threshold.** :func:`calibrate` takes the largest score up to which the answers of a held-out set are right often
enough. The share of right ones there is too hopeful, since the threshold was chosen by it, and few answers prove
little. So the lower bound of Wilson (J. Am. Stat. Assoc. 22, 1927), one-sided, has to reach the target.

**Position.** The mean of the positions of all matches that agree with the best place, weighted by how likely each is,
and their standard deviation around it: see :func:`estimate_position`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from tetra.errors import ConfigError, TetraError

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]

QUANTITIES = ("ratio", "distance")
DEFAULT_TARGET = 0.95
DEFAULT_CONFIDENCE = 0.8

_AGAIN = "calibrate again"


# --- thresholds ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """Up to which score answers are accepted, and what that is based on.

    ``precision`` and ``share_accepted`` are of the ``n_answers`` that it was calibrated on; expect less elsewhere.
    """

    threshold: float
    """the largest score that is accepted"""
    target_precision: float
    confidence: float
    precision: float
    """right answers / accepted answers"""
    lower_bound: float
    """Wilson's, at ``confidence``: at least the target"""
    share_accepted: float
    n_answers: int
    n_right: int
    quantity: str = "ratio"
    """what the score is: "ratio" to the second place, or "distance" in bits"""
    of_sequences: bool = False
    """the answers were those of a sequence, not of single frames"""
    model_hash: str | None = None
    """content hash of the model that the codes were of; None: any"""
    code_bytes: int | None = None
    """length of those codes; None: any"""

    def __post_init__(self) -> None:
        shares = (self.target_precision, self.confidence, self.precision, self.lower_bound, self.share_accepted)
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise ConfigError(f"calibration: threshold {self.threshold} must be a number from 0 on; {_AGAIN}")
        if not all(0.0 <= share <= 1.0 for share in shares):
            raise ConfigError(f"calibration: shares {shares} must be between 0 and 1; {_AGAIN}")
        if not 0 <= self.n_right <= self.n_answers:
            raise ConfigError(f"calibration: {self.n_right} right of {self.n_answers} answers; {_AGAIN}")
        if self.quantity not in QUANTITIES:
            raise ConfigError(f"calibration: quantity {self.quantity!r} is none of {', '.join(QUANTITIES)}; {_AGAIN}")

    def accepts(self, score: float) -> bool:
        """Whether an answer with this score is accepted."""
        return score <= self.threshold

    def check(self, model_hash: str | None, code_bytes: int) -> None:
        """Refuse codes other than those that it was calibrated on.

        Raises:
            ConfigError: the model or the length of its codes differs.
        """
        if self.model_hash is not None and self.model_hash != model_hash:
            found = "a model without a hash" if model_hash is None else f"the model {model_hash[:12]}"
            raise ConfigError(f"calibration: made with the model {self.model_hash[:12]}, used with {found}; {_AGAIN}")
        if self.code_bytes is not None and self.code_bytes != code_bytes:
            raise ConfigError(
                f"calibration: made with codes of {self.code_bytes} bytes, used with {code_bytes}; {_AGAIN}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; :meth:`from_dict` reads them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "calibration") -> Calibration:
        """Read what :meth:`to_dict` gave; ``where`` names its source in errors.

        Raises:
            ConfigError: a key is missing or unknown, or a value has the wrong type or cannot be.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: holds a {type(values).__name__}, expected an object with keys; {_AGAIN}")
        known = cls.__dataclass_fields__
        for key in values.keys() - known.keys():
            raise ConfigError(f"{where}: unknown key {key!r}; {_AGAIN}, or upgrade")
        for key in known.keys() - values.keys():
            raise ConfigError(f"{where}: key {key!r} is missing; {_AGAIN}")
        for key, value in values.items():
            kinds = _KINDS[str(known[key].type)]
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise ConfigError(f"{where}: {key} is {value!r}, expected {known[key].type}; {_AGAIN}")
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {str(error).removeprefix('calibration: ')}") from None


_KINDS: dict[str, tuple[type, ...]] = {
    "float": (int, float),
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
    "str | None": (str, type(None)),
    "int | None": (int, type(None)),
}


def wilson_lower_bound(n_right: npt.ArrayLike, n: npt.ArrayLike, confidence: float) -> FloatArray:
    """The share of which one can be ``confidence`` sure (one-sided) after ``n_right`` of ``n`` > 0 were right.

    Source: Wilson 1927; (p + z²/2n - z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n), z the normal quantile.
    """
    z = NormalDist().inv_cdf(confidence)
    number = np.asarray(n, dtype=np.float64)
    p = np.asarray(n_right, dtype=np.float64) / number
    half = z * np.sqrt(p * (1.0 - p) / number + z * z / (4.0 * number * number))
    bound: FloatArray = (p + z * z / (2.0 * number) - half) / (1.0 + z * z / number)
    return bound


def calibrate(
    distances: npt.ArrayLike,
    is_right: npt.ArrayLike,
    *,
    target_precision: float = DEFAULT_TARGET,
    confidence: float = DEFAULT_CONFIDENCE,
    quantity: str = "ratio",
    of_sequences: bool = False,
    model_hash: str | None = None,
    code_bytes: int | None = None,
) -> Calibration:
    """The threshold that accepts most answers while ``target_precision`` of them are right.

    Args:
        distances: [n], the score of each held-out answer; smaller is surer.
        is_right: bool [n]. Give queries of places that the map does not have, too: they are what a robot meets.
        target_precision: share of accepted answers that shall be right, above 0 and at most 1.
        confidence: how sure to be of it, from 0.5 (the share on this set itself) to below 1.
        quantity, of_sequences, model_hash, code_bytes: see :class:`Calibration`.

    Raises:
        ConfigError: target or confidence cannot be; shapes differ; a score is negative or not finite.
        TetraError: there are no answers, only right ones or only wrong ones, or no threshold reaches the target.
    """
    if not 0.0 < target_precision <= 1.0:
        raise ConfigError(f"target precision {target_precision}: it must be above 0 and at most 1, such as 0.95")
    if not 0.5 <= confidence < 1.0:
        raise ConfigError(f"confidence {confidence}: it must be at least 0.5 and below 1, such as 0.8")
    scores, right = np.asarray(distances, dtype=np.float64), np.asarray(is_right)
    if scores.ndim != 1 or scores.shape != right.shape:
        raise ConfigError(f"scores {list(scores.shape)} and right answers {list(right.shape)} must be two lists of n")
    if right.dtype != np.bool_ and not np.isin(right, (0, 1)).all():
        raise ConfigError("right answers must be True or False, one for each score")
    if not len(scores):
        raise TetraError("calibration: no answers to learn from; give queries with known places")
    unusable = scores[~(np.isfinite(scores) & (scores >= 0))]
    if len(unusable):
        raise ConfigError(f"score {unusable[0]} of an answer: scores must be finite numbers from 0 on")
    right = right.astype(np.bool_)
    n_right = int(right.sum())
    if n_right in (0, len(scores)):
        kind, other = ("wrong", "known") if n_right == 0 else ("right", "unknown")
        raise TetraError(
            f"calibration: all {len(scores)} answers are {kind}, so no score tells right from wrong; "
            f"add queries of {other} places"
        )

    thresholds, point = np.unique(scores, return_inverse=True)
    n_accepted = np.cumsum(np.bincount(point))
    n_accepted_right = np.cumsum(np.bincount(point, weights=right))
    bounds = wilson_lower_bound(n_accepted_right, n_accepted, confidence)
    reached = np.flatnonzero(bounds >= target_precision)
    if not len(reached):
        best = int(bounds.argmax())
        raise TetraError(
            f"calibration: no threshold reaches a precision of {target_precision:g} with confidence {confidence:g}; "
            f"the best one reaches {bounds[best]:.3f} ({n_accepted_right[best]:g} of {n_accepted[best]} right); "
            "give more queries, or ask for less"
        )
    chosen = int(reached[-1])
    return Calibration(
        threshold=float(thresholds[chosen]),
        target_precision=float(target_precision),
        confidence=float(confidence),
        precision=float(n_accepted_right[chosen] / n_accepted[chosen]),
        lower_bound=float(bounds[chosen]),
        share_accepted=float(n_accepted[chosen] / len(scores)),
        n_answers=len(scores),
        n_right=n_right,
        quantity=quantity,
        of_sequences=of_sequences,
        model_hash=model_hash,
        code_bytes=code_bytes,
    )


# --- second place and position ------------------------------------------------------------------------------


def second_place(distances: npt.ArrayLike, is_same_place: npt.ArrayLike) -> int:
    """Distance of the best match that is of another place than the best, of int [k] and bool [k], k > 0.

    Where all k are of one place the second is at least as far as the last of them, and that distance stands for it.
    """
    bits, same = np.asarray(distances), np.asarray(is_same_place, dtype=np.bool_)
    return int(bits.max() if same.all() else bits[~same].min())


def distance_ratio(distance: float, second: float) -> float:
    """(``distance`` + 1) / (``second`` + 1); the ones make it 1 where two places fit perfectly, and never infinite."""
    return (distance + 1.0) / (second + 1.0)


@dataclass(frozen=True)
class PositionEstimate:
    """Where the robot is, in metres of the map's frame."""

    position: tuple[float, float]
    spread_m: float
    """root of the mean squared distance from the position: 1 sigma along a line, the two sides' together in a plane"""


def estimate_position(
    positions: npt.ArrayLike, weights: npt.ArrayLike, is_same_place: npt.ArrayLike, place_radius_m: float
) -> PositionEstimate | None:
    """The mean and spread of the positions [k, 2] that agree with the best place, with ``weights`` [k] above 0.

    With w scaled to sum 1: p = sum w_i p_i and spread = sqrt(sum w_i |p_i - p|²), over i of the same place with a known
    position. Where fewer than two different positions agree, nothing is known but that the views are of one place,
    and the spread is ``place_radius_m``. None if no position is known. The spread is that of the right place: it does
    not say how likely the place itself is wrong.
    """
    metres, weight = np.asarray(positions, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    used = np.asarray(is_same_place, dtype=np.bool_) & np.isfinite(metres).all(axis=-1)
    if not used.any():
        return None
    metres, weight = metres[used], weight[used] / weight[used].max()
    origin = metres[0]  # eastings are large: squares of them would cost the spread its digits
    offsets = metres - origin
    mean = (weight[:, None] * offsets).sum(axis=0) / weight.sum()
    spread_m = math.sqrt(float((weight * ((offsets - mean) ** 2).sum(axis=1)).sum() / weight.sum()))
    if (offsets == offsets[0]).all():
        spread_m = place_radius_m
    east, north = (origin + mean).tolist()
    return PositionEstimate((east, north), spread_m)
