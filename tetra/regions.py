"""Which places a search may answer with: a part of the plane, a direction of view, or both.

``Region.circle((east, north), 200) & Region.heading(90, 45)``: within 200 m, looking east give or take 45 degrees.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tetra.errors import MapError

BoolArray = npt.NDArray[np.bool_]


class Region(ABC):
    """A set of poses. Make one by :meth:`circle`, :meth:`box` or :meth:`heading`, and join several with ``&``."""

    @abstractmethod
    def mask(self, positions: npt.NDArray[np.float64], headings: npt.NDArray[np.float32]) -> BoolArray:
        """Which places are inside, bool [n], of positions [n, 2] in metres and headings [n] in degrees.

        A place whose position or heading is unknown (NaN) is outside of every region that asks for it.
        """

    def __and__(self, other: Region) -> Region:
        return _Both(self, other) if isinstance(other, Region) else NotImplemented

    @staticmethod
    def circle(centre: tuple[float, float], radius_m: float) -> Region:
        """At most ``radius_m`` from ``centre``. Raises MapError for numbers that are not finite or a radius below 0."""
        x, y = _finite("circle's centre", centre, 2)
        (radius_m,) = _finite("circle's radius", (radius_m,), 1)
        if radius_m < 0:
            raise MapError(f"circle's radius {radius_m:g}: it must not be below 0 metres")
        return _Circle(x, y, radius_m)

    @staticmethod
    def box(low: tuple[float, float], high: tuple[float, float]) -> Region:
        """From the corner ``low`` to the corner ``high``, both included. Raises MapError if they are not so ordered."""
        x0, y0 = _finite("box's low corner", low, 2)
        x1, y1 = _finite("box's high corner", high, 2)
        if x0 > x1 or y0 > y1:
            raise MapError(f"box from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}): name the low corner first")
        return _Box(x0, y0, x1, y1)

    @staticmethod
    def heading(heading: float, tolerance: float) -> Region:
        """Looking at most ``tolerance`` degrees (0 to 180) to either side of ``heading``, round the circle."""
        heading, tolerance = _finite("heading and tolerance", (heading, tolerance), 2)
        if not 0 <= tolerance <= 180:
            raise MapError(f"heading's tolerance {tolerance:g}: it has to be between 0 and 180 degrees")
        return _Heading(heading, tolerance)


def _finite(what: str, values: tuple[float, ...], n: int) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != n or not all(map(math.isfinite, numbers)):
        raise MapError(f"{what} {values!r}: expected {n} finite number{'s' if n > 1 else ''}")
    return numbers


@dataclass(frozen=True)
class _Circle(Region):
    x: float
    y: float
    radius_m: float

    def mask(self, positions: npt.NDArray[np.float64], headings: npt.NDArray[np.float32]) -> BoolArray:
        inside: BoolArray = np.hypot(positions[:, 0] - self.x, positions[:, 1] - self.y) <= self.radius_m
        return inside


@dataclass(frozen=True)
class _Box(Region):
    x0: float
    y0: float
    x1: float
    y1: float

    def mask(self, positions: npt.NDArray[np.float64], headings: npt.NDArray[np.float32]) -> BoolArray:
        x, y = positions[:, 0], positions[:, 1]
        inside: BoolArray = (x >= self.x0) & (x <= self.x1) & (y >= self.y0) & (y <= self.y1)
        return inside


@dataclass(frozen=True)
class _Heading(Region):
    heading_deg: float
    tolerance_deg: float

    def mask(self, positions: npt.NDArray[np.float64], headings: npt.NDArray[np.float32]) -> BoolArray:
        apart = abs((headings.astype(np.float64) - self.heading_deg + 180.0) % 360.0 - 180.0)
        inside: BoolArray = apart <= self.tolerance_deg
        return inside


@dataclass(frozen=True)
class _Both(Region):
    first: Region
    second: Region

    def mask(self, positions: npt.NDArray[np.float64], headings: npt.NDArray[np.float32]) -> BoolArray:
        inside: BoolArray = self.first.mask(positions, headings) & self.second.mask(positions, headings)
        return inside
