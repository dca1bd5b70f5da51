"""Where a map's metres are counted from, and the way between them and latitude and longitude.

UTM on the WGS84 ellipsoid by Krueger's series in the third flattening n, to order 6, both ways.
Source: C. F. F. Karney, "Transverse Mercator with an accuracy of a few nanometers", J. Geodesy 85 (2011), 475-485,
eq. 7-9 (conformal latitude), 35 (forth) and 36 (back); the series go back to L. Krueger (1912). Within 9 degrees of a
zone's central meridian, which is a zone and the one beside it, they are off by less than a micrometre.

Latitudes and longitudes are in degrees, eastings and northings in metres; everything is float64 and works on whole
arrays.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tetra.errors import MapError

FloatArray = npt.NDArray[np.float64]

# WGS84: semi-major axis and flattening.
_A_M = 6378137.0
_F = 1 / 298.257223563

_N = _F / (2 - _F)
_E = math.sqrt(_F * (2 - _F))
# Radius of the circle as long as a meridian, times the scale on the central meridian.
_SCALE = 0.9996
_RADIUS_M = _SCALE * _A_M / (1 + _N) * (1 + _N**2 / 4 + _N**4 / 64 + _N**6 / 256)
_FALSE_EAST_M = 500_000.0
_FALSE_NORTH_M = 10_000_000.0  # of the southern hemisphere


def _polynomials(rows: list[list[float]]) -> list[float]:
    """Row j (from 1) holds the factors of n^j, n^(j+1), ... n^6."""
    return [sum(c * _N ** (j + i) for i, c in enumerate(row)) for j, row in enumerate(rows, 1)]


_ALPHA = _polynomials(
    [
        [1 / 2, -2 / 3, 5 / 16, 41 / 180, -127 / 288, 7891 / 37800],
        [13 / 48, -3 / 5, 557 / 1440, 281 / 630, -1983433 / 1935360],
        [61 / 240, -103 / 140, 15061 / 26880, 167603 / 181440],
        [49561 / 161280, -179 / 168, 6601661 / 7257600],
        [34729 / 80640, -3418889 / 1995840],
        [212378941 / 319334400],
    ]
)
_BETA = _polynomials(
    [
        [1 / 2, -2 / 3, 37 / 96, -1 / 360, -81 / 512, 96199 / 604800],
        [1 / 48, 1 / 15, -437 / 1440, 46 / 105, -1118711 / 3870720],
        [17 / 480, -37 / 840, -209 / 4480, 5569 / 90720],
        [4397 / 161280, -11 / 504, -830251 / 7257600],
        [4583 / 161280, -108847 / 3991680],
        [20648693 / 638668800],
    ]
)

# What a position may be, by hemisphere (None: local): low and high of x, then of y. Of a zone, its eastings and a part
# of its neighbours'; and 100 km beyond the equator for those who cross it.
_LIMITS_M = {
    None: np.array([[-1e8, 1e8], [-1e8, 1e8]]),
    "north": np.array([[100e3, 900e3], [-100e3, 9_400e3]]),
    "south": np.array([[100e3, 900e3], [1_000e3, 10_100e3]]),
}
_LATITUDE_LIMITS = (-80.0, 84.0)
_FARTHEST_DEGREES = 9.0  # from the central meridian: to the far side of the zone beside


@dataclass(frozen=True)
class CoordinateFrame:
    """What positions (x, y) in metres mean.

    ``local``: x and y of any plane, from any origin. ``utm``: easting and northing in one zone; positions that lie in
    the zone beside may be counted in it too, so that a map can cross the border.

    Raises :class:`~tetra.errors.MapError` for a zone or hemisphere that is none.
    """

    kind: Literal["local", "utm"] = "local"
    zone: int | None = None
    """1 to 60; None if local"""
    hemisphere: Literal["north", "south"] | None = None

    def __post_init__(self) -> None:
        if self.kind == "local":
            if self.zone is not None or self.hemisphere is not None:
                raise MapError(f"frame: a local one has no zone, but {self.zone} {self.hemisphere} was given; drop it")
        elif self.kind != "utm":
            raise MapError(f"frame: kind {self.kind!r} is not one of: local, utm")
        else:
            _check_zone(self.zone)
            if self.hemisphere not in ("north", "south"):
                raise MapError(f"frame: hemisphere {self.hemisphere!r} is not one of: north, south")

    def __str__(self) -> str:
        return "local" if self.kind == "local" else f"utm {self.zone} {self.hemisphere}"

    @classmethod
    def parse(cls, text: str) -> CoordinateFrame:
        """The frame that ``str`` gives: ``local``, or ``utm 32 north``.

        Raises :class:`~tetra.errors.MapError` for anything else.
        """
        words = text.split()
        if words == ["local"]:
            return cls()
        if len(words) == 3 and words[0] == "utm" and re.fullmatch("[0-9]{1,2}", words[1]):
            return cls("utm", int(words[1]), words[2])  # type: ignore[arg-type]  # checked there
        raise MapError(f"frame {text!r}: expected 'local', or 'utm' with zone and hemisphere as in 'utm 32 north'")

    def check(self, positions: FloatArray, rows: npt.NDArray[np.int64] | None = None) -> None:
        """Refuse float64 [n, 2] with a coordinate that is not finite or cannot be in this frame.

        ``rows`` are the ones to look at; None: all. Raises :class:`~tetra.errors.MapError`, which names a wrong one.
        """
        limits = _LIMITS_M[self.hemisphere]
        looked_at = positions if rows is None else positions[rows]
        is_right = (looked_at >= limits[:, 0]) & (looked_at <= limits[:, 1])  # NaN is neither
        if not is_right.all():
            row, column = np.unravel_index(is_right.argmin(), is_right.shape)
            name = (("x", "y") if self.kind == "local" else ("easting", "northing"))[column]
            low, high = limits[column]
            which = f" of number {row if rows is None else rows[row]}" if len(positions) > 1 else ""
            raise MapError(
                f"positions: {name} {looked_at[row, column]:.10g}{which} is not between {low:.0f} and {high:.0f} "
                f"metres, as the frame '{self}' has them; check units, order and zone"
            )

    def from_latlon(self, latitude: npt.ArrayLike, longitude: npt.ArrayLike) -> FloatArray:
        """Positions float64 [..., 2] in this frame from degrees; see :func:`utm_of` for the limits.

        Raises :class:`~tetra.errors.MapError` for a local frame, which has no place on the earth.
        """
        east, north, _ = utm_of(latitude, longitude, self)
        return np.stack([east, north], axis=-1)

    def to_latlon(self, positions: npt.ArrayLike) -> FloatArray:
        """(latitude, longitude) in degrees, float64 [..., 2], of positions [..., 2] in this frame.

        Positions that are NaN stay so. Raises :class:`~tetra.errors.MapError` as :func:`latlon_of`.
        """
        points = np.asarray(positions, dtype=np.float64)
        result = np.full(points.shape, np.nan)
        known = ~np.isnan(points).any(axis=-1)
        result[known] = np.stack(latlon_of(points[known, 0], points[known, 1], self), axis=-1)
        return result


LOCAL = CoordinateFrame()


def _check_zone(zone: Any) -> None:
    if not isinstance(zone, (int, np.integer)) or isinstance(zone, bool) or not 1 <= zone <= 60:
        raise MapError(f"frame: UTM zone {zone!r} is not a number from 1 to 60")


def _central_meridian(zone: int) -> float:
    return 6.0 * zone - 183.0


def zone_of(latitude: npt.ArrayLike, longitude: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """The UTM zone of points in degrees, with the exceptions of southern Norway and Svalbard.

    A point on the border belongs to the zone east of it. Raises :class:`~tetra.errors.MapError` as :func:`utm_of`.
    """
    phi, lam = _checked_degrees(latitude, longitude)
    zone = (np.floor((lam + 180.0) / 6.0).astype(np.int64) % 60) + 1
    zone = np.where((phi >= 56) & (phi < 64) & (lam >= 3) & (lam < 12), 32, zone)
    svalbard = np.select([lam < 9, lam < 21, lam < 33], [31, 33, 35], 37)
    return np.where((phi >= 72) & (lam >= 0) & (lam < 42), svalbard, zone)


def _checked_degrees(latitude: npt.ArrayLike, longitude: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    phi, lam = np.broadcast_arrays(np.asarray(latitude, dtype=np.float64), np.asarray(longitude, dtype=np.float64))
    low, high = _LATITUDE_LIMITS
    _refuse(~((phi >= low) & (phi <= high)), phi, "latitude", f"between {low:g} and {high:g} degrees, where UTM ends")
    _refuse(~((lam >= -180) & (lam <= 180)), lam, "longitude", "between -180 and 180 degrees")
    return phi, lam


def _refuse(is_wrong: npt.NDArray[np.bool_], values: FloatArray, name: str, wanted: str) -> None:
    if is_wrong.any():
        value = values.ravel()[int(is_wrong.ravel().argmax())]
        raise MapError(f"{name} {value:.10g}: it has to be {wanted}; check the order and the units")


def utm_of(
    latitude: npt.ArrayLike, longitude: npt.ArrayLike, zone: int | CoordinateFrame | None = None
) -> tuple[FloatArray, FloatArray, CoordinateFrame]:
    """Easting and northing in metres, and the frame that they are in, of points in degrees.

    ``zone`` None takes the zone in which the points lie. A number counts them in that zone, in the hemisphere where
    they lie; a frame also fixes the hemisphere, and then a point across the equator goes on counting.

    Raises:
        MapError: a latitude is not in [-80, 84] or a longitude not in [-180, 180]; the points lie in several zones or
            hemispheres and ``zone`` does not say which to use; one is more than 9 degrees from the zone's meridian;
            the frame is local.
    """
    phi, lam = _checked_degrees(latitude, longitude)
    if isinstance(zone, CoordinateFrame):
        frame = zone
    else:
        zones = [int(z) for z in np.unique(zone_of(phi, lam))] if zone is None else [zone]
        fix = f"pass the zone to count them in, or a frame such as 'utm {max(zones, default=32)} north'"
        number = _only(zones, "zones", fix)
        sides = ["north" if is_north else "south" for is_north in np.unique(phi >= 0)]
        fix = f"pass a frame to count them in, such as 'utm {number} north'"
        frame = CoordinateFrame("utm", number, _only(sides, "hemispheres", fix))
    apart = (lam - _central_meridian(_zone_number(frame)) + 180.0) % 360.0 - 180.0
    _refuse(abs(apart) > _FARTHEST_DEGREES, lam, "longitude", f"at most 9 degrees from the middle of '{frame}'")

    # Conformal latitude as tangent tau' (eq. 7-9), then the sphere's transverse Mercator (eq. 10-11), then eq. 35.
    tau = np.tan(np.radians(phi))
    sigma = np.sinh(_E * np.arctanh(_E * tau / np.hypot(1.0, tau)))
    tau_c = tau * np.hypot(1.0, sigma) - sigma * np.hypot(1.0, tau)
    lam_r = np.radians(apart)
    xi = np.arctan2(tau_c, np.cos(lam_r))
    eta = np.arcsinh(np.sin(lam_r) / np.hypot(tau_c, np.cos(lam_r)))
    zeta = xi + 1j * eta
    w = zeta + sum(a * np.sin(2 * j * zeta) for j, a in enumerate(_ALPHA, 1))
    north = _RADIUS_M * w.real + (_FALSE_NORTH_M if frame.hemisphere == "south" else 0.0)
    return _FALSE_EAST_M + _RADIUS_M * w.imag, north, frame


def _only(values: list[Any], what: str, fix: str) -> Any:
    if len(values) != 1:
        found = " and ".join(map(str, values)) if values else "none"
        raise MapError(f"the points lie in several {what} ({found}); {fix}" if values else f"no points, so no {what}")
    return values[0]


def _zone_number(frame: CoordinateFrame) -> int:
    if frame.zone is None:
        raise MapError("frame 'local': it has no latitude and longitude; use a map in a UTM zone")
    return frame.zone


def latlon_of(east: npt.ArrayLike, north: npt.ArrayLike, frame: CoordinateFrame) -> tuple[FloatArray, FloatArray]:
    """Latitude and longitude in degrees, longitude in [-180, 180), of eastings and northings in metres.

    Raises:
        MapError: the frame is local; a value is not finite, or farther out than :func:`utm_of` ever gives.
    """
    meridian = _central_meridian(_zone_number(frame))
    x, y = np.broadcast_arrays(np.asarray(east, dtype=np.float64), np.asarray(north, dtype=np.float64))
    x, y = x - _FALSE_EAST_M, y - (_FALSE_NORTH_M if frame.hemisphere == "south" else 0.0)
    _refuse(~(abs(x) <= 1_010_000), x + _FALSE_EAST_M, "easting", f"within 1010 km of the middle of '{frame}'")
    _refuse(~(abs(y) <= 9_500_000), y, "northing", "less than 9500 km from the equator")

    w = (y + 1j * x) / _RADIUS_M
    zeta = w - sum(b * np.sin(2 * j * w) for j, b in enumerate(_BETA, 1))  # eq. 36
    xi, eta = zeta.real, zeta.imag
    tau_c = np.sin(xi) / np.hypot(np.sinh(eta), np.cos(xi))
    lam = np.degrees(np.arctan2(np.sinh(eta), np.cos(xi)))
    tau = tau_c
    for _ in range(5):  # Newton's method for eq. 7 (eq. 19-21); two steps already give all digits
        sigma = np.sinh(_E * np.arctanh(_E * tau / np.hypot(1.0, tau)))
        found = tau * np.hypot(1.0, sigma) - sigma * np.hypot(1.0, tau)
        slope = (1 - _E**2) * np.hypot(1.0, found) * np.hypot(1.0, tau) / (1 + (1 - _E**2) * tau**2)
        tau = tau + (tau_c - found) / slope
    return np.degrees(np.arctan(tau)), (lam + meridian + 180.0) % 360.0 - 180.0
