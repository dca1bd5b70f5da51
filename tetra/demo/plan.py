"""The plan of a demo district: streets, houses, trees, lamps and the painted ground, all drawn from one seed.

Local coordinates are metres, x east and y north, from the district's south-west corner; ``origin`` is that corner
in UTM. A house is a handful of vertical walls; the ray caster in :mod:`tetra.demo.render` needs nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from tetra.demo.textures import (
    LEAVES,
    PIXELS_PER_METRE,
    SHOP_NAMES,
    THEMES,
    Colour,
    Texture,
    Theme,
    facade,
    fractal_noise,
    lamp,
    person,
    plain_wall,
    roof_tiles,
    shade,
    tree,
    wall_surface,
)

BLOCKS = 4  # blocks along a side
PITCH_M = 62.0  # mean distance between parallel streets
MARGIN_M = 48.0  # meadow around the outermost streets
PAVEMENT_M = 2.3
HOUSE_DEPTH_M = 9.0
GROUND_PX = 8  # pixels a metre of the painted ground
HEIGHT_PX = 2  # cells a metre of the height and light maps
MIP_LEVELS = 5
MAX_CORNERS = 8
FLAT, GABLE, STEPPED = 0, 1, 2  # outline of a wall's top

FloatArray = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Pose:
    """Where a camera stands: local metres, height above ground, heading in degrees clockwise from north."""

    x: float
    y: float
    heading: float
    height: float = 1.7


@dataclass(frozen=True)
class Polygon:
    """A flat convex face: corners ``float32 [n, 3]`` counter-clockwise from outside, colour in [0, 255]."""

    corners: FloatArray
    colour: Colour
    glow: float = 0.0


@dataclass(frozen=True)
class Solid:
    """A small thing made of polygons (chimney, awning, car), with the distance up to which it is drawn."""

    x: float
    y: float
    polygons: tuple[Polygon, ...]
    range_m: float = 90.0


@dataclass(frozen=True)
class PolygonTable:
    """The faces of many solids as columns, so that all of them are projected and lit at once."""

    corners: FloatArray  # [n, MAX_CORNERS, 3]; shorter faces repeat their last corner
    normal: FloatArray  # [n, 3]
    albedo: FloatArray  # [n, 3], linear
    glow: FloatArray  # [n]
    where: FloatArray  # [n, 2], the solid's place
    range_m: FloatArray  # [n]

    @classmethod
    def of(cls, solids: list[Solid]) -> PolygonTable:
        """Tabulate the faces of some solids."""
        faces = [(face, solid) for solid in solids for face in solid.polygons]
        padded = [[*f.corners, *[f.corners[-1]] * (MAX_CORNERS - len(f.corners))] for f, _ in faces]
        corners = np.asarray(padded, np.float32).reshape(-1, MAX_CORNERS, 3)
        normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 1])
        normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
        return cls(
            corners,
            normal,
            np.asarray([(np.asarray(f.colour) / 255) ** 2.2 for f, _ in faces], np.float32).reshape(-1, 3),
            np.asarray([f.glow for f, _ in faces], np.float32),
            np.asarray([(s.x, s.y) for _, s in faces], np.float32).reshape(-1, 2),
            np.asarray([s.range_m for _, s in faces], np.float32),
        )

    def placed(self, x: float, y: float, heading: float) -> PolygonTable:
        """The same faces, drawn at the origin facing north, moved to (x, y) and turned to ``heading`` degrees."""
        angle = math.radians(heading)
        turn = np.array(
            [[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]], np.float32
        )
        offset = np.array([x, y, 0], np.float32)
        return replace(
            self, corners=self.corners @ turn + offset, normal=self.normal @ turn, where=self.where + offset[:2]
        )

    @classmethod
    def joined(cls, tables: list[PolygonTable]) -> PolygonTable:
        """All faces of several tables."""
        return cls(*(np.concatenate([getattr(t, f.name) for t in tables]) for f in fields(cls)))


@dataclass(frozen=True)
class Sprite:
    """A flat cut-out that always faces the camera."""

    x: float
    y: float
    width: float
    height: float
    picture: str


@dataclass
class Walls:
    """All walls of a district as columns of a table; a wall runs from ``a`` to ``b`` with its outside on the right."""

    a: FloatArray
    b: FloatArray
    eaves: FloatArray
    rise: FloatArray
    outline: NDArray[np.int8]
    roof_depth: FloatArray  # 0 for an upright wall; else the horizontal run of the roof plane below this ridge
    texture: NDArray[np.int32]
    texel_per_m: FloatArray  # [n, 2] along and up
    tint: FloatArray  # [n, 3]


@dataclass
class Atlas:
    """All wall textures in one flat buffer with their mip levels, so that one gather samples any wall."""

    width: NDArray[np.int32]
    height: NDArray[np.int32]
    offset: NDArray[np.int64]  # [textures, MIP_LEVELS]
    texels: NDArray[np.uint32]


@dataclass
class Town:
    """One district, ready to be rendered."""

    seed: int
    origin: tuple[float, float]
    extent_m: float
    lines: list[FloatArray]  # centre lines of the streets that can be driven, [points, 2]
    half_widths: list[float]
    walls: Walls
    atlas: Atlas
    ground: list[Texture]  # mip levels, RGB and how well a puddle forms there
    heights: FloatArray  # [cells, cells] of what throws shadows, metres, row 0 in the south
    house_heights: FloatArray  # the same without trees
    sprites: list[Sprite]
    pictures: dict[str, list[Texture]]  # mip levels of each sprite's picture
    lamps: FloatArray  # [lamps, 2]
    solids: PolygonTable
    car_slots: FloatArray  # [slots, 3]: x, y, heading
    walkways: FloatArray  # [places, 2] where people walk
    noise: FloatArray
    skyline: FloatArray  # height of the distant hills by heading, as a slope
    cache: dict[object, FloatArray] = field(default_factory=dict)

    def utm(self, pose: Pose) -> tuple[float, float]:
        """UTM east and north of a pose, metres."""
        return self.origin[0] + pose.x, self.origin[1] + pose.y


def drive(town: Town, spacing_m: float, *, start_m: float = 0.0, lane_m: float = 0.7) -> list[list[Pose]]:
    """Poses every ``spacing_m`` along every street of the district, one list a street, looking the way it goes.

    ``lane_m`` is how far right of the centre line the camera drives.
    """
    routes = []
    for line in town.lines:
        legs = np.hypot(*np.diff(line, axis=0).T)
        marks = np.concatenate([[0], np.cumsum(legs)])
        route = []
        for at in np.arange(marks[1] + start_m, marks[-2] - 22, spacing_m):
            here, behind, ahead = (
                np.array([np.interp(at + d, marks, line[:, 0]), np.interp(at + d, marks, line[:, 1])])
                for d in (0, -5, 5)
            )
            along = (ahead - behind) / np.hypot(*(ahead - behind))
            right = np.array([along[1], -along[0]])
            x, y = here + lane_m * right
            route.append(Pose(float(x), float(y), math.degrees(math.atan2(along[0], along[1])) % 360))
        routes.append(route)
    return routes


class _Builder:
    def __init__(self, rng: np.random.Generator, faces_out: Callable[[FloatArray], bool]) -> None:
        self.rng, self.faces_out = rng, faces_out
        self.rows: list[
            tuple[FloatArray, FloatArray, float, float, int, float, int, float, float, tuple[float, float, float]]
        ] = []
        self.textures: list[Texture] = []
        self.solids: list[Solid] = []
        self.footprints: list[tuple[FloatArray, float]] = []
        self.plain = [self.add_texture(plain_wall(rng, windows)) for windows in (False, False, True, True)]
        self.roofs = [
            self.add_texture(roof_tiles(rng, colour))
            for colour in ((162, 84, 58), (136, 74, 56), (84, 88, 98), (104, 92, 84), (176, 104, 70))
        ]

    def add_texture(self, texture: Texture) -> int:
        height, width = (max(16, -(-n // 16) * 16) for n in texture.shape[:2])
        if (height, width) != texture.shape[:2]:
            planes = [
                Image.fromarray(texture[..., c]).resize((width, height), Image.Resampling.BILINEAR) for c in range(4)
            ]
            texture = np.dstack([np.asarray(p) for p in planes])
        self.textures.append(np.ascontiguousarray(texture))
        return len(self.textures) - 1

    def wall(
        self,
        a: FloatArray,
        b: FloatArray,
        eaves: float,
        texture: int,
        *,
        rise: float = 0.0,
        outline: int = FLAT,
        roof_depth: float = 0.0,
        fit: bool = False,
        tint: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:
        """Add a wall; ``fit`` stretches the texture over it once, otherwise the texture repeats."""
        along = up = float(PIXELS_PER_METRE)
        if fit:
            height, width = self.textures[texture].shape[:2]
            along, up = width / float(np.hypot(*(b - a))), height / (eaves + rise)
        self.rows.append((a, b, eaves, rise, outline, roof_depth, texture, along, up, tint))

    def house(self, a: FloatArray, b: FloatArray, look: _Look, depth: float) -> None:
        """A house between party walls whose front runs from a to b."""
        rng = self.rng
        along = (b - a) / np.hypot(*(b - a))
        inward = np.array([-along[1], along[0]], np.float32)
        c, d = b + depth * inward, a + depth * inward
        width = float(np.hypot(*(b - a)))
        eaves = look.floors * look.floor_m + 0.8
        front_rise = {"gable": 0.55 * width, "stepped": 0.6 * width}.get(look.roof, 0.0)
        front = self.front(a, b, look, front_rise)
        outline = {"gable": GABLE, "stepped": STEPPED}.get(look.roof, FLAT)
        self.wall(a, b, eaves, front, rise=front_rise, outline=outline, fit=True)
        tint = tuple(float(v) / 205 for v in look.colour)
        tint = (tint[0], tint[1], tint[2])
        side, back = self.plain[int(rng.integers(2))], self.plain[2 + int(rng.integers(2))]
        roof = self.roofs[look.roof_colour]
        side_rise = 0.36 * depth if look.roof == "pitched" else 0.0
        for p, q in ((b, c), (d, a)):
            self.wall(p, q, eaves, side, rise=side_rise, outline=GABLE if side_rise else FLAT, tint=tint)
        self.wall(c, d, eaves, back, rise=front_rise * 0.95, outline=GABLE if front_rise else FLAT, tint=tint)
        if side_rise:
            p, q = (a + d) / 2, (b + c) / 2
            self.wall(p, q, eaves, roof, rise=side_rise, roof_depth=depth / 2)
            self.wall(q, p, eaves, roof, rise=side_rise, roof_depth=depth / 2)
        elif front_rise:
            p, q = (a + b) / 2 + 0.2 * inward, (c + d) / 2
            self.wall(q, p, eaves, roof, rise=front_rise * 0.93, roof_depth=width / 2)
            self.wall(p, q, eaves, roof, rise=front_rise * 0.93, roof_depth=width / 2)
        top = eaves + max(side_rise, 0.8 * front_rise)
        self.footprints.append((np.stack([a, b, c, d]), eaves + 0.6 * max(side_rise, front_rise)))
        if look.roof != "flat" or rng.random() < 0.4:
            at = (a + b + c + d) / 4 + along * width * rng.uniform(-0.3, 0.3)
            brick = shade((140, 84, 66), rng.uniform(0.7, 1.15))
            self.solids.append(box(at[0], at[1], top - 1.2, 0.9, 0.7, 2.6, math.atan2(along[1], along[0]), brick))
        if look.shop and rng.random() < 0.7:
            self.awning(a, b, along, -inward, look.floor_m)

    def corner(self, before: FloatArray, at: FloatArray, after: FloatArray, inner: FloatArray, look: _Look) -> None:
        """The house on a street corner: two fronts with one look and a flat roof."""
        eaves = look.floors * look.floor_m + 0.8
        for a, b in ((before, at), (at, after)):
            self.wall(a, b, eaves, self.front(a, b, look, 0.0), fit=True)
        tint = (look.colour[0] / 205, look.colour[1] / 205, look.colour[2] / 205)
        self.wall(after, inner, eaves, self.plain[0], tint=tint)
        self.wall(inner, before, eaves, self.plain[0], tint=tint)
        self.footprints.append((np.stack([before, at, after, inner]), eaves))

    def front(self, a: FloatArray, b: FloatArray, look: _Look, rise: float) -> int:
        """Paint a street front; fronts that face out of town are never driven past and stay plain."""
        if self.faces_out((a + b) / 2):
            return self.plain[3]
        width = float(np.hypot(*(b - a)))
        shop = SHOP_NAMES[int(self.rng.integers(len(SHOP_NAMES)))] if look.shop else None
        return self.add_texture(
            facade(self.rng, look.theme, look.colour, width, look.floors, look.floor_m, look.roof, rise, shop)
        )

    def awning(self, a: FloatArray, b: FloatArray, along: FloatArray, out: FloatArray, floor_m: float) -> None:
        rng = self.rng
        p, q = a + 0.6 * along, b - 0.6 * along
        z, reach = floor_m - 0.95, rng.uniform(0.9, 1.4)
        colours: tuple[Colour, Colour] = (
            ((176, 44, 44), (238, 232, 220)),
            ((36, 92, 70), (238, 232, 220)),
            ((40, 70, 130), (236, 236, 230)),
            ((214, 160, 60), (120, 60, 40)),
            ((90, 84, 80), (110, 104, 98)),
        )[int(rng.integers(5))]
        stripes = max(4, int(np.hypot(*(q - p)) / 0.8))
        faces = []
        for i in range(stripes):
            u, v = p + (q - p) * (i / stripes), p + (q - p) * ((i + 1) / stripes)
            lower = [[*(u + reach * out), z - 0.55], [*(v + reach * out), z - 0.55]]
            colour = colours[i % 2]
            faces.append(Polygon(np.array([*lower, [*v, z], [*u, z]], np.float32), colour))
            faces.append(
                Polygon(np.array([[*u, z - 0.02], [*v, z - 0.02], *lower[::-1]], np.float32), shade(colour, 0.6))
            )
            hem = [[*(u + reach * out), z - 0.75], [*(v + reach * out), z - 0.75], *lower[::-1]]
            faces.append(Polygon(np.array(hem, np.float32), shade(colour, 0.9)))
        middle = (p + q) / 2
        self.solids.append(Solid(float(middle[0]), float(middle[1]), tuple(faces), 45.0))

    def finish_walls(self) -> Walls:
        a, b, eaves, rise, outline, depth, texture, along, up, tint = zip(*self.rows, strict=True)
        return Walls(
            np.asarray(a, np.float32),
            np.asarray(b, np.float32),
            np.asarray(eaves, np.float32),
            np.asarray(rise, np.float32),
            np.asarray(outline, np.int8),
            np.asarray(depth, np.float32),
            np.asarray(texture, np.int32),
            np.stack([np.asarray(along, np.float32), np.asarray(up, np.float32)], 1),
            np.asarray(tint, np.float32),
        )

    def finish_atlas(self) -> Atlas:
        levels: list[NDArray[np.uint32]] = []
        offset = np.zeros((len(self.textures), MIP_LEVELS), np.int64)
        total = 0
        for i, texture in enumerate(self.textures):
            for level, texels in enumerate(mip_levels(texture)):
                offset[i, level] = total
                levels.append(np.ascontiguousarray(texels).view(np.uint32).ravel())
                total += levels[-1].size
        sizes = np.array([t.shape[:2] for t in self.textures], np.int32)
        return Atlas(sizes[:, 1].copy(), sizes[:, 0].copy(), offset, np.concatenate(levels))


@dataclass
class _Look:
    theme: Theme
    colour: Colour
    floors: int
    floor_m: float
    roof: str
    roof_colour: int
    shop: bool


def mip_levels(texture: Texture) -> list[Texture]:
    """The texture and its halvings by box average, MIP_LEVELS in all."""
    levels = [texture]
    while len(levels) < MIP_LEVELS:
        t = levels[-1]
        t = t[: t.shape[0] // 2 * 2, : t.shape[1] // 2 * 2].astype(np.uint16)
        levels.append(((t[::2, ::2] + t[1::2, ::2] + t[::2, 1::2] + t[1::2, 1::2] + 2) // 4).astype(np.uint8))
    return levels


def box(
    x: float,
    y: float,
    z: float,
    length: float,
    width: float,
    height: float,
    angle: float,
    colour: Colour,
    *,
    taper: float = 1.0,
    range_m: float = 90.0,
) -> Solid:
    """An upright box (or, tapered, a frustum) whose length lies along ``angle`` (radians from east)."""
    u = np.array([math.cos(angle), math.sin(angle)]) * length / 2
    v = np.array([-math.sin(angle), math.cos(angle)]) * width / 2
    base = [np.array([x, y]) + s * u + t * v for s, t in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    peak = [np.array([x, y]) + taper * (p - np.array([x, y])) for p in base]
    faces = []
    for i in range(4):
        j = (i + 1) % 4
        corners = [[*base[i], z], [*base[j], z], [*peak[j], z + height], [*peak[i], z + height]]
        faces.append(Polygon(np.array(corners, np.float32), shade(colour, (0.92, 1.0, 0.86, 1.04)[i])))
    faces.append(Polygon(np.array([[*p, z + height] for p in peak], np.float32), shade(colour, 1.1)))
    return Solid(float(x), float(y), tuple(faces), range_m)


CAR_COLOURS: tuple[Colour, ...] = (
    (176, 30, 34),
    (34, 62, 120),
    (210, 212, 214),
    (44, 46, 50),
    (238, 236, 230),
    (112, 118, 124),
    (36, 84, 66),
    (222, 174, 48),
    (98, 140, 168),
    (120, 70, 50),
)


def car(x: float, y: float, heading: float, colour: Colour) -> Solid:
    """A parked car, 4.2 m long, pointing along ``heading`` (degrees clockwise from north)."""
    angle = math.radians(90 - heading)
    u, v = np.array([math.cos(angle), math.sin(angle)]), np.array([-math.sin(angle), math.cos(angle)])

    def at(s: float, t: float, z: float) -> list[float]:
        p = np.array([x, y]) + s * u + t * v
        return [float(p[0]), float(p[1]), z]

    def face(colour: Colour, *points: tuple[float, float, float], glow: float = 0.0) -> Polygon:
        return Polygon(np.array([at(*p) for p in points], np.float32), colour, glow)

    glass, tyre, w, roof = (44, 54, 64), (24, 24, 26), 0.86, 0.7
    low, belt, top = 0.28, 0.86, 1.42
    faces = [face((38, 38, 40), (-2.2, -0.95, 0.03), (2.2, -0.95, 0.03), (2.2, 0.95, 0.03), (-2.2, 0.95, 0.03))]
    for side in (-1, 1):
        turn = slice(None, None, side)
        body = [(-2.05, side * w, low), (-2.1, side * w, belt), (2.0, side * w, belt - 0.12), (2.1, side * w, low)]
        panes = [(-1.55, side * w, belt), (-1.1, side * roof, top), (0.35, side * roof, top), (1.1, side * w, belt)]
        faces += [face(shade(colour, 0.9), *body[turn]), face(glass, *panes[turn])]
        post = [
            (-0.38, side * (w + 0.01), belt),
            (-0.34, side * (roof + 0.01), top),
            (-0.22, side * (roof + 0.01), top),
            (-0.22, side * (w + 0.01), belt),
        ]
        faces.append(face(shade(colour, 0.7), *post[turn]))
        for s in (-1.3, 1.3):
            rim = [
                (s + r * math.cos(q), side * (w + 0.02), 0.33 + r * math.sin(q))
                for r in (0.33,)
                for q in np.arange(0, 6.2, 0.8)
            ]
            hub = [
                (s + r * math.cos(q), side * (w + 0.03), 0.33 + r * math.sin(q))
                for r in (0.17,)
                for q in np.arange(0, 6.2, 1.05)
            ]
            faces += [face(tyre, *rim[::-side]), face((150, 152, 156), *hub[::-side])]
    faces += [
        face(shade(colour, 1.1), (1.1, -w, belt), (2.0, -w, belt - 0.12), (2.0, w, belt - 0.12), (1.1, w, belt)),
        face(shade(colour, 1.1), (-2.1, -w, belt), (-1.55, -w, belt), (-1.55, w, belt), (-2.1, w, belt)),
        face(shade(colour, 1.15), (-1.1, -roof, top), (0.35, -roof, top), (0.35, roof, top), (-1.1, roof, top)),
        face((70, 84, 96), (0.35, -roof, top), (1.1, -w, belt), (1.1, w, belt), (0.35, roof, top)),
        face((52, 62, 72), (-1.55, -w, belt), (-1.1, -roof, top), (-1.1, roof, top), (-1.55, w, belt)),
        face(shade(colour, 0.95), (2.1, -w, low), (2.1, w, low), (2.0, w, belt - 0.12), (2.0, -w, belt - 0.12)),
        face(shade(colour, 0.95), (-2.05, w, low), (-2.05, -w, low), (-2.1, -w, belt), (-2.1, w, belt)),
        face((228, 228, 216), (-2.12, 0.26, 0.42), (-2.12, -0.26, 0.42), (-2.13, -0.26, 0.54), (-2.13, 0.26, 0.54)),
    ]
    for t in (-0.66, 0.66):
        faces.append(
            face(
                (206, 28, 26),
                (-2.13, t + 0.17, 0.62),
                (-2.13, t - 0.17, 0.62),
                (-2.14, t - 0.17, 0.78),
                (-2.14, t + 0.17, 0.78),
                glow=0.25,
            )
        )
        faces.append(
            face(
                (244, 240, 224),
                (2.12, t - 0.18, 0.5),
                (2.12, t + 0.18, 0.5),
                (2.08, t + 0.18, 0.66),
                (2.08, t - 0.18, 0.66),
            )
        )
    return Solid(x, y, tuple(faces), 60.0)


@lru_cache(maxsize=len(CAR_COLOURS))
def car_faces(paint: int) -> PolygonTable:
    """The faces of a car of one of the CAR_COLOURS at the origin, facing north."""
    return PolygonTable.of([car(0.0, 0.0, 0.0, CAR_COLOURS[paint])])


def _inset(corners: NDArray[np.float64], widths: list[float]) -> FloatArray:
    """The quadrilateral whose side i lies ``widths[i]`` inside side i of ``corners`` (counter-clockwise)."""
    lines = []
    for i in range(4):
        p, q = corners[i], corners[(i + 1) % 4]
        along = (q - p) / np.hypot(*(q - p))
        lines.append((p + widths[i] * np.array([-along[1], along[0]]), along))
    points = []
    for i in range(4):
        (p, u), (q, v) = lines[i - 1], lines[i]
        s = ((q - p)[0] * v[1] - (q - p)[1] * v[0]) / (u[0] * v[1] - u[1] * v[0])
        points.append(p + s * u)
    return np.asarray(points, np.float32)


def build_town(seed: int = 0, *, origin: tuple[float, float] = (500_000.0, 5_400_000.0)) -> Town:
    """Plan and paint a district; the same seed gives the same district, pixel for pixel."""
    rng = np.random.default_rng([seed, 20_11])
    n = BLOCKS + 1
    grid = np.stack(np.meshgrid(np.arange(n), np.arange(n), indexing="ij"), -1) * PITCH_M + MARGIN_M
    grid = grid + rng.uniform(-9, 9, grid.shape)
    across = [float(rng.uniform(6.1, 7.8)) for _ in range(n)]  # half widths of the streets that run north
    along = [float(rng.uniform(6.1, 7.8)) for _ in range(n)]  # and of those that run east
    extent = BLOCKS * PITCH_M + 2 * MARGIN_M

    def faces_out(at: FloatArray) -> bool:
        return bool(min(at.min(), extent - at.max()) < MARGIN_M + 0.3 * PITCH_M and _on_rim(at, grid))

    builder = _Builder(rng, faces_out)
    lines: list[FloatArray] = []
    halves: list[float] = []
    for i in range(n):
        for points, half in ((grid[i, :], across[i]), (grid[:, i], along[i])):
            ends = points[0] + (points[0] - points[1]) * 0.6, points[-1] + (points[-1] - points[-2]) * 0.6
            lines.append(np.asarray([ends[0], *points, ends[1]], np.float32))
            halves.append(half)

    special = rng.permutation([(i, j) for i in range(BLOCKS) for j in range(BLOCKS)])[:3]
    kinds = {tuple(int(v) for v in at): kind for at, kind in zip(special, ("park", "church", "square"), strict=True)}
    sprites: list[Sprite] = []
    lawns, plazas, courts = [], [], []
    for i in range(BLOCKS):
        for j in range(BLOCKS):
            corners = np.stack([grid[i, j], grid[i + 1, j], grid[i + 1, j + 1], grid[i, j + 1]])
            quad = _inset(corners, [along[j], across[i + 1], along[j + 1], across[i]])
            kind = kinds.get((i, j), "houses")
            if kind == "houses":
                courts.append(_fill_block(builder, quad))
            elif kind == "park":
                lawns.append(quad)
                sprites += _scatter_trees(rng, quad, 34)
                _monument(builder, quad.mean(0), rng)
            elif kind == "church":
                plazas.append(quad)
                _church(builder, quad, rng)
                sprites += _scatter_trees(rng, quad, 9, keep_clear_m=17)
            else:
                plazas.append(quad)
                _monument(builder, quad.mean(0), rng, scale=1.9)
                sprites += _scatter_trees(rng, quad, 12, keep_clear_m=8)

    lamps, slots, walkways = [], [], []
    for line, half in zip(lines, halves, strict=True):
        crossings = grid.reshape(-1, 2)
        is_avenue, species = rng.random() < 0.55, int(rng.integers(len(LEAVES) - 1))
        style = int(rng.integers(3))
        for along_m, point, direction in _walk(line, 1.0):
            clear = np.hypot(*(crossings - point).T).min()
            right = np.array([direction[1], -direction[0]])
            heading = math.degrees(math.atan2(direction[0], direction[1])) % 360
            for side in (-1, 1):
                kerb = point + side * (half - PAVEMENT_M + 0.45) * right
                if along_m % 12 == (3 if side < 0 else 9) and is_avenue and clear > half + 5:
                    size = rng.uniform(0.8, 1.15)
                    sprites.append(
                        Sprite(
                            float(kerb[0]),
                            float(kerb[1]),
                            5.4 * size,
                            7.2 * size,
                            f"tree{species}{int(rng.integers(2))}",
                        )
                    )
                if along_m % 24 == (0 if side < 0 else 12) and clear > half + 1:
                    lamps.append(kerb)
                    sprites.append(Sprite(float(kerb[0]), float(kerb[1]), 1.4, 5.6, f"lamp{style}"))
                if along_m % 6 == 0 and clear > half + 8:
                    x, y = point + side * (half - PAVEMENT_M - 1.0) * right
                    slots.append((x, y, heading if side > 0 else (heading + 180) % 360))
                if along_m % 7 == 0:
                    walkways.append(point + side * (half - 0.9 - rng.uniform(0, 0.6)) * right)
    for _ in range(46):  # trees in the meadow around the town, against the hills
        angle, radius = rng.uniform(0, 2 * math.pi), extent * rng.uniform(0.56, 0.75)
        x, y = extent / 2 + radius * math.cos(angle), extent / 2 + radius * math.sin(angle)
        size = rng.uniform(0.9, 1.8)
        sprites.append(Sprite(x, y, 6 * size, 8 * size, f"tree{int(rng.integers(5))}0"))

    noise = fractal_noise(rng, 512)
    pictures = _paint_sprites(rng)
    house_heights, heights = _height_maps(builder, sprites, extent)
    ground = _paint_ground(rng, extent, lines, halves, grid, courts, lawns, plazas, noise, heights)
    ridge = fractal_noise(rng, 512, 2.2)[0] * 0.6 + fractal_noise(rng, 512, 1.5)[3] * 0.25
    return Town(
        seed,
        origin,
        extent,
        [x for k, x in enumerate(lines) if 2 <= k < 2 * n - 2],
        [h for k, h in enumerate(halves) if 2 <= k < 2 * n - 2],
        builder.finish_walls(),
        builder.finish_atlas(),
        ground,
        heights,
        house_heights,
        sprites,
        pictures,
        np.asarray(lamps, np.float32),
        PolygonTable.of(builder.solids),
        np.asarray(slots, np.float32),
        np.asarray(walkways, np.float32),
        noise,
        (0.02 + 0.1 * ridge).astype(np.float32),
    )


def _on_rim(at: FloatArray, grid: NDArray[np.float64]) -> bool:
    """Whether a front lies along one of the four outermost streets."""
    rims = grid[0], grid[-1], grid[:, 0], grid[:, -1]
    for rim in rims:
        for p, q in pairwise(rim):
            along = (q - p) / np.hypot(*(q - p))
            offset = at - p
            if 0 < offset @ along < np.hypot(*(q - p)) and abs(offset[0] * along[1] - offset[1] * along[0]) < 9:
                return True
    return False


def _walk(line: FloatArray, step_m: float) -> list[tuple[int, NDArray[np.float64], NDArray[np.float64]]]:
    """Points every ``step_m`` along a line with their direction."""
    places, travelled = [], 0
    for p, q in zip(line[:-1].astype(float), line[1:].astype(float), strict=True):
        length = float(np.hypot(*(q - p)))
        direction = (q - p) / length
        for s in np.arange(0, length, step_m):
            places.append((travelled, p + s * direction, direction))
            travelled += 1
    return places


def _look(rng: np.random.Generator, theme: Theme, shops: float, corner: bool = False) -> _Look:
    colour = theme.walls[int(rng.integers(len(theme.walls)))]
    roof = "flat" if corner else theme.roofs[int(rng.integers(len(theme.roofs)))]
    if corner and "mansard" in theme.roofs:
        roof = "mansard"
    floors = int(rng.integers(theme.floors[0], theme.floors[1] + 1)) + (1 if roof == "mansard" else 0)
    return _Look(
        theme,
        shade(colour, rng.uniform(0.9, 1.08)),
        floors,
        float(rng.uniform(2.9, 3.4)),
        roof,
        int(rng.integers(5)),
        bool(rng.random() < shops),
    )


def _fill_block(builder: _Builder, quad: FloatArray) -> FloatArray:
    """Line the four sides of a block with houses; returns the courtyard."""
    rng, depth = builder.rng, HOUSE_DEPTH_M
    main = THEMES[int(rng.integers(len(THEMES)))]
    shops = rng.uniform(0.1, 0.75)

    def theme() -> Theme:
        return main if rng.random() < 0.6 else THEMES[int(rng.integers(len(THEMES)))]

    court = _inset(quad.astype(float), [depth] * 4)
    directions = [(quad[(k + 1) % 4] - quad[k]) for k in range(4)]
    directions = [v / np.hypot(*v) for v in directions]
    for k in range(4):
        # A corner house owns `depth` metres of both of its streets.
        before, after = quad[k] - depth * directions[k - 1], quad[k] + depth * directions[k]
        builder.corner(before, quad[k], after, court[k], _look(rng, theme(), shops + 0.2, corner=True))
        a, b = after, quad[(k + 1) % 4] - depth * directions[k]
        length = float(np.hypot(*(b - a)))
        cuts = [0.0]
        while length - cuts[-1] > 15:
            cuts.append(cuts[-1] + float(rng.uniform(6, 9.5)))
        if length - cuts[-1] > 10.5:
            cuts.append((cuts[-1] + length) / 2)
        cuts.append(length)
        for s, t in pairwise(cuts):
            p, q = (a + s * directions[k]).astype(np.float32), (a + t * directions[k]).astype(np.float32)
            builder.house(p, q, _look(rng, theme(), shops), depth)
    return court


def _scatter_trees(rng: np.random.Generator, quad: FloatArray, count: int, keep_clear_m: float = 5.0) -> list[Sprite]:
    trees: list[Sprite] = []
    centre = quad.mean(0)
    while len(trees) < count:
        s, t = rng.uniform(0.06, 0.94, 2)
        x, y = (1 - s) * ((1 - t) * quad[0] + t * quad[3]) + s * ((1 - t) * quad[1] + t * quad[2])
        if math.hypot(x - centre[0], y - centre[1]) > keep_clear_m:
            size = rng.uniform(0.8, 1.5)
            trees.append(
                Sprite(float(x), float(y), 5.8 * size, 7.8 * size, f"tree{int(rng.integers(6))}{int(rng.integers(2))}")
            )
    return trees


def _monument(builder: _Builder, centre: FloatArray, rng: np.random.Generator, scale: float = 1.0) -> None:
    x, y = float(centre[0]), float(centre[1])
    angle = float(rng.uniform(0, 1.5))
    stone = shade((196, 188, 172), rng.uniform(0.8, 1.05))
    builder.solids += [
        box(x, y, 0, 4 * scale, 4 * scale, 0.4, angle, stone, range_m=150),
        box(x, y, 0.4, 2.6 * scale, 2.6 * scale, 0.5 * scale, angle, shade(stone, 0.95), range_m=150),
        box(x, y, 0.4 + 0.5 * scale, 1.2 * scale, 1.2 * scale, 6.5 * scale, angle, stone, taper=0.5, range_m=200),
        box(
            x, y, 0.4 + 7 * scale, 0.6 * scale, 0.6 * scale, 0.9 * scale, angle, (212, 176, 84), taper=0.02, range_m=200
        ),
    ]
    builder.footprints.append(
        (np.array([[x - 1, y - 1], [x + 1, y - 1], [x + 1, y + 1], [x - 1, y + 1]]) * 1.0, 6.5 * scale)
    )


def _church(builder: _Builder, quad: FloatArray, rng: np.random.Generator) -> None:
    centre = quad.mean(0)
    u = (quad[1] - quad[0]) / np.hypot(*(quad[1] - quad[0]))
    v = np.array([-u[1], u[0]], np.float32)
    stone = THEMES[2].walls[int(rng.integers(3))]

    def rectangle(at: FloatArray, length: float, width: float) -> list[FloatArray]:
        return [
            (at + s * u * length / 2 + t * v * width / 2).astype(np.float32)
            for s, t in ((-1, -1), (1, -1), (1, 1), (-1, 1))
        ]

    def fenestrate(width_m: float, height_m: float, rise: float) -> int:
        px = PIXELS_PER_METRE
        height, width = round((height_m + rise) * px), round(width_m * px)
        image = Image.fromarray(np.clip(wall_surface(rng, height, width, "stone", stone), 0, 255).astype(np.uint8))
        glow = Image.new("L", image.size)
        draw, light = ImageDraw.Draw(image), ImageDraw.Draw(glow)
        for x in range(round(width_m / 3.6)):
            middle = (x + 0.5) * width / round(width_m / 3.6)
            for bottom in (1.8,) if height_m < 14 else (2.5, 9.0, 15.5):
                base, tall = height - bottom * px, (4.6 if height_m < 14 else 3.2) * px
                outline = [
                    (middle - 15, base),
                    (middle - 15, base - tall),
                    (middle, base - tall - 24),
                    (middle + 15, base - tall),
                    (middle + 15, base),
                ]
                draw.polygon(outline, fill=(52, 58, 74), outline=(226, 214, 188))
                for _ in range(30):
                    gx, gy = middle + rng.uniform(-12, 12), base - rng.uniform(3, tall)
                    colour = ((150, 60, 60), (60, 84, 150), (170, 140, 60), (60, 120, 90))[int(rng.integers(4))]
                    draw.rectangle([gx, gy, gx + 5, gy + 7], fill=colour)
                light.polygon(outline, fill=110)
        for x in range(0, width, 72):
            draw.rectangle([x, height - round(0.8 * height_m * px), x + 9, height], fill=shade(stone, 0.9))
        return builder.add_texture(np.dstack([np.asarray(image), np.asarray(glow)]))

    nave = rectangle(centre, 26, 12)
    slate = builder.roofs[2]
    for k in range(4):
        a, b = nave[k], nave[(k + 1) % 4]
        rise = 6.0 if k % 2 else 0.0
        builder.wall(
            a, b, 8.5, fenestrate(12 if rise else 26, 8.5, rise), rise=rise, outline=GABLE if rise else FLAT, fit=True
        )
    p, q = (nave[0] + nave[3]) / 2, (nave[1] + nave[2]) / 2
    builder.wall(p, q, 8.5, slate, rise=6.0, roof_depth=6.0)
    builder.wall(q, p, 8.5, slate, rise=6.0, roof_depth=6.0)
    builder.footprints.append((np.stack(nave), 12.0))
    tower = rectangle(centre - 15.5 * u, 7, 7)
    shaft = fenestrate(7, 21.0, 0.0)
    for k in range(4):
        builder.wall(tower[k], tower[(k + 1) % 4], 21.0, shaft, fit=True)
    builder.footprints.append((np.stack(tower), 26.0))
    x, y = centre - 15.5 * u
    angle = math.atan2(u[1], u[0])
    builder.solids.append(box(float(x), float(y), 21.0, 7.6, 7.6, 0.5, angle, shade(stone, 1.05), range_m=400))
    builder.solids.append(box(float(x), float(y), 21.5, 7.0, 7.0, 13.0, angle, (74, 110, 98), taper=0.01, range_m=400))


def _paint_sprites(rng: np.random.Generator) -> dict[str, list[Texture]]:
    pictures = {}
    kinds = ("round", "round", "conifer", "poplar", "round", "round")
    for i, (kind, leaf) in enumerate(zip(kinds, LEAVES, strict=True)):
        for copy in range(2):
            pictures[f"tree{i}{copy}"] = tree(rng, kind, shade(leaf, rng.uniform(0.9, 1.1)))
    for i in range(3):
        pictures[f"bare{i}"] = tree(rng, "bare", (0, 0, 0))
        pictures[f"lamp{i}"] = lamp(i)
    for i in range(8):
        pictures[f"person{i}"] = person(rng)
    return {name: _sprite_levels(picture) for name, picture in pictures.items()}


def _sprite_levels(picture: Texture) -> list[Texture]:
    """Mip levels of a cut-out; colours are weighted by opacity, so that edges don't darken."""
    levels = [np.ascontiguousarray(picture)]
    while len(levels) < MIP_LEVELS:
        t = levels[-1].astype(np.float32)
        alpha = t[..., 3:] / 255
        parts = [
            np.concatenate([t[r::2, c::2, :3] * alpha[r::2, c::2], alpha[r::2, c::2]], -1)
            for r in (0, 1)
            for c in (0, 1)
        ]
        mean = sum(parts[1:], parts[0]) / 4
        colour = mean[..., :3] / np.maximum(mean[..., 3:], 1e-4)
        levels.append(np.concatenate([colour, mean[..., 3:] * 255], -1).round().clip(0, 255).astype(np.uint8))
    return levels


def _height_maps(builder: _Builder, sprites: list[Sprite], extent: float) -> tuple[FloatArray, FloatArray]:
    """Heights of the houses alone, and with the crowns of the trees."""
    cells = round(extent * HEIGHT_PX)
    canvas = Image.new("F", (cells, cells))
    draw = ImageDraw.Draw(canvas)
    for quad, height in builder.footprints:
        draw.polygon([(float(x) * HEIGHT_PX, float(y) * HEIGHT_PX) for x, y in quad], fill=float(height))
    houses = np.array(canvas, np.float32)
    heights = houses.copy()
    for sprite in sprites:
        if sprite.picture.startswith("tree"):
            x, y, radius = sprite.x * HEIGHT_PX, sprite.y * HEIGHT_PX, sprite.width * 0.33 * HEIGHT_PX
            x0, x1 = (int(np.clip(v, 0, cells)) for v in (x - radius, x + radius + 1))
            y0, y1 = (int(np.clip(v, 0, cells)) for v in (y - radius, y + radius + 1))
            gy, gx = np.mgrid[y0:y1, x0:x1]
            crown = (np.hypot(gx - x, gy - y) < radius * 0.9) * sprite.height * 0.85
            heights[y0:y1, x0:x1] = np.maximum(heights[y0:y1, x0:x1], crown)
    return houses, heights


def _paint_ground(
    rng: np.random.Generator,
    extent: float,
    lines: list[FloatArray],
    halves: list[float],
    grid: NDArray[np.float64],
    courts: list[FloatArray],
    lawns: list[FloatArray],
    plazas: list[FloatArray],
    noise: FloatArray,
    heights: FloatArray,
) -> list[Texture]:
    """The ground seen from above, row 0 in the south, as mip levels of ``uint8 [H, W, 4]``."""
    px, size = GROUND_PX, round(extent * GROUND_PX)
    canvas = Image.new("RGBA", (size, size), (96, 118, 66, 0))
    draw = ImageDraw.Draw(canvas)

    def scaled(points: NDArray[np.float64] | FloatArray) -> list[tuple[float, float]]:
        return [(float(x) * px, float(y) * px) for x, y in points]

    town = [grid[0, 0] - 9, grid[-1, 0] + [9, -9], grid[-1, -1] + 9, grid[0, -1] + [-9, 9]]
    draw.polygon(scaled(np.asarray(town)), fill=(156, 150, 142, 150))
    slabs = np.asarray(canvas.getchannel("A")) == 150
    for plaza in plazas:
        draw.polygon(scaled(plaza), fill=(172, 160, 142, 150))
    for lawn in lawns:
        draw.polygon(scaled(lawn), fill=(88, 122, 60, 0))
        middle = lawn.mean(0)
        for corner in lawn:
            draw.line(scaled(np.stack([corner, middle])), fill=(184, 168, 136, 60), width=3 * px)
        x, y = middle * px
        draw.ellipse([x - 7 * px, y - 7 * px, x + 7 * px, y + 7 * px], fill=(184, 168, 136, 60))
    for court in courts:
        draw.polygon(scaled(court), fill=(98, 110, 76, 0))
    asphalts = [shade((88, 88, 92), rng.uniform(0.85, 1.12)) for _ in lines]
    for line, half in zip(lines, halves, strict=True):
        draw.line(
            scaled(line), fill=(186, 182, 174, 130), width=round(2 * (half - PAVEMENT_M + 0.28) * px), joint="curve"
        )
    for line, half, asphalt in zip(lines, halves, asphalts, strict=True):
        draw.line(scaled(line), fill=(*asphalt, 255), width=round(2 * (half - PAVEMENT_M) * px), joint="curve")
    for line, half in zip(lines, halves, strict=True):
        for metre, point, direction in _walk(line, 0.5):
            gap = np.hypot(*(grid.reshape(-1, 2) - point).T).min()
            right = np.array([direction[1], -direction[0]])
            if metre % 12 == 0 and gap > 15:
                dash = np.stack([point - 0.08 * right, point + 0.08 * right])
                draw.polygon(scaled(np.concatenate([dash, dash[::-1] + 3 * direction])), fill=(214, 212, 204, 200))
            if metre % 140 == 33:
                x, y = (point + rng.uniform(-2, 2) * right) * px
                draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=(58, 58, 60, 120), outline=(110, 108, 104, 120))
        legs = np.diff(line, axis=0)
        for k, node in enumerate(line[1:-1]):
            for leg in (-legs[k], legs[k + 1]):  # a zebra crossing on each side of every junction
                direction = leg / np.hypot(*leg)
                right = np.array([direction[1], -direction[0]])
                for t in np.arange(-half + PAVEMENT_M + 0.4, half - PAVEMENT_M - 0.4, 1.0):
                    near = node + 9.3 * direction + t * right
                    corners = [near, near + 0.5 * right, near + 0.5 * right + 2.6 * direction, near + 2.6 * direction]
                    draw.polygon(scaled(np.asarray(corners)), fill=(222, 220, 214, 180))
    for _ in range(160):  # patches where the road was opened
        which = int(rng.integers(len(lines)))
        line, half, asphalt = lines[which], halves[which], asphalts[which]
        k = int(rng.integers(len(line) - 1))
        at = line[k] + rng.random() * (line[k + 1] - line[k]) + rng.uniform(-half + 3.4, half - 3.4, 2) * 0.5
        w, h = rng.uniform(0.5, 2.6, 2) * px
        x, y = at * px
        draw.rectangle([x, y, x + w, y + h], fill=(*shade(asphalt, rng.uniform(0.78, 1.15)), 230))
    ground = np.array(canvas)
    coarse = np.tile(noise, (size // 2048 + 1, size // 2048 + 1))[: size // 4, : size // 4]
    mottle = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR))
    tone = 0.84 + 0.3 * mottle + 0.03 * rng.standard_normal((size, size), np.float32)
    joints = (np.arange(size) % (px * 3 // 4) == 0)[:, None] | (np.arange(size) % (px * 3 // 4) == 0)[None, :]
    paved = slabs & (ground[..., 3] == 150)
    tone[paved & joints] *= 0.82
    # Corners between wall and pavement get less light from the sky.
    solid = Image.fromarray(((heights > 0) * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BILINEAR)
    closed = np.asarray(solid.reduce(8).resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255
    tone *= 1 - 0.32 * closed
    for channel in range(3):
        ground[..., channel] = np.minimum(ground[..., channel] * tone, 255).astype(np.uint8)
    return mip_levels(ground)
