"""UTM against an independent calculation, published points and itself backwards."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from tetra.coordinates import LOCAL, CoordinateFrame, latlon_of, utm_of, zone_of
from tetra.errors import MapError

A_M, F = 6378137.0, 1 / 298.257223563
E2 = F * (2 - F)
E = np.sqrt(E2)


def transverse_mercator(latitude: npt.ArrayLike, apart: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) in metres of the Gauss-Krueger projection without scale, by its definition and no series.

    The projection is the analytic continuation of the length of the meridian: find the complex latitude whose isometric
    latitude is psi + i lambda, and integrate the meridian up to there (Gauss-Legendre, 64 points).
    """
    phi, lam = np.radians(np.asarray(latitude, dtype=float)), np.radians(np.asarray(apart, dtype=float))

    def isometric(t: np.ndarray) -> np.ndarray:
        return np.arcsinh(np.tan(t)) - E * np.arctanh(E * np.sin(t))

    target = isometric(phi + 0j) + 1j * lam
    # The sphere gives the start: gd of the target.
    t = np.arctan(np.sinh(target))
    for _ in range(20):
        slope = (1 - E2) / ((1 - E2 * np.sin(t) ** 2) * np.cos(t))
        t = t - (isometric(t) - target) / slope
    nodes, weights = np.polynomial.legendre.leggauss(64)
    points = t[..., None] * (nodes + 1) / 2
    meridian = (A_M * (1 - E2) / (1 - E2 * np.sin(points) ** 2) ** 1.5) @ weights * t / 2
    return meridian.imag, meridian.real


def points(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.uniform(-80, 84, n), rng.uniform(-180, 180, n)


def apart_of(longitude: np.ndarray, zone: int) -> np.ndarray:
    return (longitude - (6 * zone - 183) + 180) % 360 - 180


@pytest.mark.parametrize("zone", [1, 31, 60])
def test_agrees_with_the_definition_to_a_tenth_of_a_millimetre(zone: int) -> None:
    latitude, _ = points(4000, zone)
    apart = np.random.default_rng(zone).uniform(-9, 9, len(latitude))
    longitude = (6 * zone - 183 + apart + 180) % 360 - 180
    x, y = transverse_mercator(latitude, apart)
    for hemisphere, origin in (("north", 0.0), ("south", 1e7)):
        east, north, _ = utm_of(latitude, longitude, CoordinateFrame("utm", zone, hemisphere))
        assert abs(east - (5e5 + 0.9996 * x)).max() < 1e-4
        assert abs(north - (origin + 0.9996 * y)).max() < 1e-4


@pytest.mark.parametrize(
    ("latitude", "longitude", "expected", "frame"),
    [
        # CN Tower, Toronto, as listed for the UTM grid; the angles are given to 0.01".
        (43 + 38 / 60 + 33.24 / 3600, -(79 + 23 / 60 + 13.7 / 3600), (630084, 4833438), "utm 17 north"),
        # Middle of the grid square 38SMB4488, to five decimals of a degree.
        (33.33424, 44.40363, (444500, 3688500), "utm 38 north"),
    ],
)
def test_published_points(latitude: float, longitude: float, expected: tuple[float, float], frame: str) -> None:
    east, north, found = utm_of(latitude, longitude)
    assert str(found) == frame
    assert (float(east), float(north)) == pytest.approx(expected, abs=1.0)


def test_the_central_meridian_and_the_equator() -> None:
    east, north, frame = utm_of(0.0, 9.0)
    assert (float(east), float(north), str(frame)) == (500_000.0, 0.0, "utm 32 north")
    # A quarter of the meridian of WGS84 is 10 001 965.729 m long.
    x, y = transverse_mercator([89.9999999999], [0.0])
    assert x[0] == pytest.approx(0, abs=1e-6)
    assert y[0] == pytest.approx(10_001_965.729, abs=1e-3)


def test_there_and_back() -> None:
    latitude, longitude = points(20_000)
    zones = zone_of(latitude, longitude)
    for zone in range(1, 61):
        for hemisphere in ("north", "south"):
            for beside in (-1, 0, 1):
                frame = CoordinateFrame("utm", (zone + beside - 1) % 60 + 1, hemisphere)  # type: ignore[arg-type]
                mine = (zones == zone) & (abs(apart_of(longitude, frame.zone or 0)) <= 9)
                back = frame.to_latlon(frame.from_latlon(latitude[mine], longitude[mine]))
                assert abs(back[:, 0] - latitude[mine]).max() < 1e-9
                assert abs((back[:, 1] - longitude[mine] + 180) % 360 - 180).max() < 1e-9


def test_single_points_and_shapes() -> None:
    east, north, frame = utm_of(48.0, 11.0)
    assert east.shape == north.shape == ()
    latitude, longitude = latlon_of(east, north, frame)
    assert (float(latitude), float(longitude)) == pytest.approx((48.0, 11.0), abs=1e-9)
    assert frame.from_latlon(np.full((2, 3), 48.0), 11.0).shape == (2, 3, 2)
    assert np.isnan(frame.to_latlon([[np.nan, np.nan], [5e5, 5e6]])).tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize(
    ("latitude", "longitude", "zone"),
    [
        (0, -180, 1),
        (0, 180, 1),
        (0, 179.999, 60),
        (0, -0.001, 30),
        (0, 0, 31),
        (60.39, 5.32, 32),  # Bergen
        (55.999, 5.32, 31),
        (64.0, 5.32, 31),
        (58, 2.999, 31),
        (58, 12, 33),
        (78.22, 15.65, 33),  # Longyearbyen
        (72, 8.999, 31),
        (72, 9, 33),
        (80, 21, 35),
        (84, 33, 37),
        (84, 42, 38),
        (71.999, 7, 32),
    ],
)
def test_zones_with_their_exceptions(latitude: float, longitude: float, zone: int) -> None:
    assert int(zone_of(latitude, longitude)) == zone


def test_a_border_can_be_crossed_in_one_frame() -> None:
    latitude, longitude = np.array([48.0, 48.0]), np.array([11.999, 12.001])
    with pytest.raises(MapError, match=r"32 and 33.*pass the zone"):
        utm_of(latitude, longitude)
    east, _, frame = utm_of(latitude, longitude, 32)
    assert frame.zone == 32
    assert 140 < east[1] - east[0] < 160  # 0.002 degrees at 48 north
    equator = np.array([-0.001, 0.001])
    with pytest.raises(MapError, match="hemispheres"):
        utm_of(equator, 9.0)
    _, north, _ = utm_of(equator, 9.0, CoordinateFrame("utm", 32, "south"))
    assert 220 < north[1] - north[0] < 222


@pytest.mark.parametrize(
    ("latitude", "longitude", "zone", "words"),
    [
        (84.1, 0, None, "latitude 84.1"),
        (-80.5, 0, None, "latitude -80.5"),
        (float("nan"), 0, None, "latitude nan"),
        (0, float("inf"), None, "longitude inf"),
        (0, 180.5, None, "longitude 180.5"),
        (0, 19.0, 32, "longitude 19"),
        (0, 9, 61, "zone 61"),
        (0, 9, 0, "zone 0"),
        (0, 9, LOCAL, "local"),
        ([], [], None, "no points"),
    ],
)
def test_what_utm_refuses(latitude: float, longitude: float, zone: int | CoordinateFrame | None, words: str) -> None:
    with pytest.raises(MapError, match=words) as caught:
        utm_of(latitude, longitude, zone)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("east", "north", "words"), [(float("nan"), 0, "easting nan"), (2e6, 0, "easting"), (5e5, 2e7, "northing")]
)
def test_what_the_way_back_refuses(east: float, north: float, words: str) -> None:
    with pytest.raises(MapError, match=words):
        latlon_of(east, north, CoordinateFrame("utm", 32, "north"))


@pytest.mark.parametrize("text", ["local", "utm 1 south", "utm 60 north"])
def test_text_and_back(text: str) -> None:
    assert str(CoordinateFrame.parse(text)) == text
    assert CoordinateFrame.parse(f" {text.replace(' ', '  ')} ") == CoordinateFrame.parse(text)


@pytest.mark.parametrize(
    "text", ["", "utm", "utm 32", "utm 32 N", "utm north 32", "utm 0 north", "utm 61 south", "wgs"]
)
def test_text_that_is_no_frame(text: str) -> None:
    with pytest.raises(MapError) as caught:
        CoordinateFrame.parse(text)
    assert "\n" not in str(caught.value)


def test_frames_check_themselves() -> None:
    for arguments in (("local", 3, None), ("utm", None, "north"), ("utm", 3, "east"), ("mars", None, None)):
        with pytest.raises(MapError):
            CoordinateFrame(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("frame", "position", "words"),
    [
        ("local", (np.nan, 0), "x nan of number 1"),
        ("local", (0, np.inf), "y inf"),
        ("local", (2e8, 0), "x 200000000 of number 1"),
        ("utm 32 north", (99_999, 5e6), "easting 99999"),
        ("utm 32 north", (5e6, 5e5), "easting 5000000 of number 1"),
        ("utm 32 north", (5e5, 9.5e6), "northing"),
        ("utm 32 south", (5e5, 5e5), "northing"),
    ],
)
def test_positions_that_cannot_be(frame: str, position: tuple[float, float], words: str) -> None:
    good = (5e5, 5e6)
    CoordinateFrame.parse(frame).check(np.array([good]))
    with pytest.raises(MapError, match=words):
        CoordinateFrame.parse(frame).check(np.array([good, position]))
