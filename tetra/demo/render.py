"""A small ray caster: a district, a pose and the weather in, a photograph out. NumPy only, one core.

The camera stays level, so one image column sees the town along one line of the plan. Each column therefore meets
the walls in an order that holds for all its rows: a wall covers the rows up to its top edge, and the running minimum
of those edges over the walls, near to far, says which wall a pixel belongs to. Shading then happens once a pixel.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tetra.demo.plan import (
    CAR_COLOURS,
    FLAT,
    GROUND_PX,
    HEIGHT_PX,
    MIP_LEVELS,
    STEPPED,
    PolygonTable,
    Pose,
    Sprite,
    Town,
    car_faces,
)

FIELD_OF_VIEW = 82.0  # degrees, horizontally
NEAR_M, FAR_M = 0.25, 230.0
WALLS_A_COLUMN = 20
EYE_HORIZON = 0.62  # the horizon lies a little below the middle of the picture

Array = NDArray[np.floating[Any]]
_LINEAR = ((np.arange(256, dtype=np.float32) / 255) ** 2.2).astype(np.float32)
_DISPLAY = (255 * (np.arange(4096, dtype=np.float32) / 4095) ** (1 / 2.2) + 0.5).astype(np.uint8)


@dataclass(frozen=True)
class Conditions:
    """Light, weather, traffic and sensor; the town's geometry does not depend on any of them.

    Angles in degrees; ``cloud``, ``rain``, ``snow`` and ``wet`` run from 0 to 1; ``fog`` is extinction a metre.
    """

    name: str = "day"
    sun_azimuth: float = 215.0
    sun_elevation: float = 42.0
    cloud: float = 0.25
    fog: float = 0.0012
    rain: float = 0.0
    snow: float = 0.0
    wet: float = 0.0
    traffic: int = 0  # seed of the parked cars and of the people about
    noise: float = 0.008  # standard deviation of the sensor noise, of full scale
    exposure: float = 1.0
    seed: int = 0  # of noise, rain drops and snow flakes


CONDITIONS: dict[str, Conditions] = {
    c.name: c
    for c in (
        Conditions("day"),
        Conditions("morning", sun_azimuth=98, sun_elevation=14, cloud=0.1, fog=0.003, traffic=1),
        Conditions("overcast", cloud=1.0, fog=0.003, traffic=2, noise=0.012),
        Conditions("dusk", sun_azimuth=282, sun_elevation=-1.5, cloud=0.35, fog=0.0025, traffic=3, noise=0.018),
        Conditions("night", sun_elevation=-20, cloud=0.3, fog=0.002, traffic=4, noise=0.03),
        Conditions("rain", cloud=1.0, fog=0.007, rain=0.7, wet=0.9, traffic=5, noise=0.014, sun_elevation=25),
        Conditions("fog", cloud=1.0, fog=0.028, traffic=6, noise=0.012, sun_elevation=20),
        Conditions("snow", cloud=0.95, fog=0.008, snow=0.9, traffic=7, noise=0.01, sun_elevation=22),
        Conditions("night-rain", sun_elevation=-20, cloud=1.0, fog=0.008, rain=0.6, wet=1.0, traffic=8, noise=0.035),
    )
}


@dataclass(frozen=True)
class _Light:
    """What a set of conditions sheds, in linear RGB."""

    direction: Array  # towards the sun
    sun: Array
    ambient: Array
    zenith: Array
    horizon: Array
    mist: Array
    lamps: float  # 0 by day, 1 at night
    exposure: float


def _blend(x: float, *stops: tuple[float, tuple[float, float, float]]) -> Array:
    xs = [s[0] for s in stops]
    return np.array([np.interp(x, xs, [s[1][c] for s in stops]) for c in range(3)], np.float32)


def _light(c: Conditions) -> _Light:
    azimuth, elevation = math.radians(c.sun_azimuth), math.radians(max(c.sun_elevation, 1.0))
    direction = np.array(
        [math.sin(azimuth) * math.cos(elevation), math.cos(azimuth) * math.cos(elevation), math.sin(elevation)]
    )
    e = c.sun_elevation
    sun = _blend(
        e,
        (-4, (0, 0, 0)),
        (0, (0.5, 0.16, 0.04)),
        (8, (1.9, 1.05, 0.5)),
        (25, (2.5, 2.1, 1.65)),
        (50, (2.7, 2.45, 2.1)),
    )
    sun *= 1 - min(1.0, c.cloud) ** 2
    clear = _blend(
        e,
        (-18, (0.012, 0.016, 0.034)),
        (-6, (0.06, 0.08, 0.17)),
        (0, (0.2, 0.22, 0.33)),
        (12, (0.42, 0.5, 0.66)),
        (40, (0.55, 0.68, 0.9)),
    )
    grey = _blend(
        e, (-18, (0.016, 0.016, 0.018)), (-4, (0.1, 0.1, 0.12)), (10, (0.7, 0.72, 0.75)), (40, (0.95, 0.97, 1.0))
    )
    zenith = _blend(
        e, (-18, (0.004, 0.006, 0.016)), (-5, (0.035, 0.06, 0.16)), (2, (0.1, 0.17, 0.34)), (40, (0.07, 0.19, 0.6))
    )
    horizon = _blend(
        e,
        (-18, (0.03, 0.028, 0.036)),
        (-5, (0.3, 0.16, 0.12)),
        (2, (0.85, 0.5, 0.3)),
        (15, (0.85, 0.82, 0.78)),
        (40, (0.72, 0.84, 0.98)),
    )
    k = np.float32(c.cloud**1.5)
    lamps = float(np.clip((2.0 - e) / 6, 0, 1))
    overcast = grey * np.float32(0.85)
    exposure = c.exposure * float(np.interp(e, [-18, -4, 3, 20], [3.4, 2.0, 1.15, 0.86])) * (1 + 0.12 * c.cloud)
    horizon = horizon * (1 - k) + overcast * k
    mist = horizon * np.float32(0.6) + (clear * (1 - k) + overcast * k) * np.float32(0.4)
    return _Light(
        direction.astype(np.float32),
        sun.astype(np.float32),
        clear * (1 - k) + grey * k,
        zenith * (1 - k) + overcast * np.float32(0.8) * k,
        horizon,
        mist,
        lamps,
        exposure,
    )


@dataclass
class Trace:
    """What each pixel sees before any light: inverse depth and, as flat pixel indices, walls, ground and sky."""

    inverse_depth: Array  # [H, W], 1/m along the optical axis, 0 in the sky
    wall_pixels: NDArray[np.int64]
    hits: NDArray[np.int64]  # for each wall pixel, its row in the hit tables below
    hit_wall: NDArray[np.int32]
    hit_u: Array  # metres along the wall
    hit_t: Array
    ground_pixels: NDArray[np.int64]
    sky_pixels: NDArray[np.int64]
    base_t: Array  # [W] depth of the nearest wall of each column


class _Camera:
    def __init__(self, pose: Pose, height: int, width: int) -> None:
        heading = math.radians(pose.heading)
        self.pose, self.rows, self.columns = pose, height, width
        self.focal = width / 2 / math.tan(math.radians(FIELD_OF_VIEW / 2))
        self.horizon = EYE_HORIZON * height
        self.forward = np.array([math.sin(heading), math.cos(heading)])
        self.right = np.array([math.cos(heading), -math.sin(heading)])
        x = (np.arange(width) + 0.5 - width / 2) / self.focal
        self.rays = (self.forward[None] + x[:, None] * self.right[None]).astype(np.float32)  # [W, 2] a metre of depth
        self.slopes = ((self.horizon - np.arange(height) - 0.5) / self.focal).astype(
            np.float32
        )  # rise a metre of depth
        self.at = np.array([pose.x, pose.y])


def _trace(town: Town, camera: _Camera) -> Trace:
    walls, height, width = town.walls, camera.rows, camera.columns
    at = camera.at.astype(np.float32)
    a, b = walls.a - at, walls.b - at
    edge = walls.b - walls.a
    facing = a[:, 0] * edge[:, 1] - a[:, 1] * edge[:, 0] < 0  # the camera is on the wall's right
    forward, right = camera.forward.astype(np.float32), camera.right.astype(np.float32)
    near, far = np.minimum(a @ forward, b @ forward), np.maximum(a @ forward, b @ forward)
    margin = math.tan(math.radians(FIELD_OF_VIEW / 2)) * 1.01
    too_left = (a @ right < -margin * (a @ forward)) & (b @ right < -margin * (b @ forward))
    too_right = (a @ right > margin * (a @ forward)) & (b @ right > margin * (b @ forward))
    seen = np.flatnonzero(facing & (far > NEAR_M) & (near < FAR_M) & ~too_left & ~too_right)
    if not len(seen):
        seen = np.zeros(1, np.int64)

    ax, ay, ex, ey = (v[seen][None, :] for v in (a[:, 0], a[:, 1], edge[:, 0], edge[:, 1]))
    dx, dy = camera.rays[:, :1], camera.rays[:, 1:]
    across = dx * ey - dy * ex
    across[np.abs(across) < 1e-9] = 1e-9
    t = (ax * ey - ay * ex) / across
    u = (ax * dy - ay * dx) / across
    t[(u < 0) | (u > 1) | (t < NEAR_M) | ~facing[seen][None, :]] = np.inf
    k = min(WALLS_A_COLUMN, len(seen))
    order = np.argpartition(t, k - 1, axis=1)[:, :k] if k < len(seen) else np.broadcast_to(np.arange(k), (width, k))
    t_near = np.take_along_axis(t, order, 1)
    inner = np.argsort(t_near, axis=1, kind="stable")
    order = np.take_along_axis(order, inner, 1)
    t_near, u_near = np.take_along_axis(t_near, inner, 1), np.take_along_axis(u, order, 1)
    wall = seen[order].astype(np.int32)

    fraction = 1 - np.abs(2 * u_near - 1)
    outline = walls.outline[wall]
    fraction = np.where(outline == STEPPED, np.ceil(fraction * 5 - 0.4) / 5, fraction)
    fraction = np.where((outline == FLAT) & (walls.roof_depth[wall] == 0), 0, fraction)
    fraction = np.where(walls.roof_depth[wall] > 0, 1, fraction)
    tops = walls.eaves[wall] + walls.rise[wall] * fraction
    top_row = (
        camera.horizon - camera.focal * (tops - camera.pose.height) / t_near
    )  # inf depth: the horizon, never above it
    top_row[np.isinf(t_near)] = np.inf
    first = np.minimum.accumulate(top_row, axis=1)
    # A pixel in row r belongs to the first wall whose running minimum is <= r + 1/2; a running sum counts those above.
    start = np.clip(np.ceil(np.minimum(first, height) - 0.5), 0, height).astype(np.int64)
    column = np.broadcast_to(np.arange(width)[:, None], start.shape)
    covered = np.bincount((start * width + column).ravel(), minlength=(height + 1) * width).reshape(height + 1, width)
    index = k - np.cumsum(covered[:height], axis=0)  # k: no wall
    hit = np.minimum(index, k - 1) + np.arange(width)[None, :] * k

    hit_t, hit_wall = t_near.ravel(), wall.ravel()
    inverse = (1 / hit_t)[hit]
    inverse[index == k] = 0
    ground = np.maximum(-camera.slopes / camera.pose.height, 0)[:, None]
    on_ground = ground > np.maximum(inverse, 1 / 2000)
    flat_index = index.ravel()
    ground_flat = on_ground.ravel()
    wall_pixels = np.flatnonzero((flat_index < k) & ~ground_flat)
    hits = hit.ravel()[wall_pixels]

    # Roof planes lean back: move their hits from the ridge down to the plane.
    depth = inverse.ravel()
    roof = walls.roof_depth[hit_wall[hits]] > 0
    if roof.any():
        pixels, of = wall_pixels[roof], hits[roof]
        w = hit_wall[of]
        length = np.hypot(edge[w, 0], edge[w, 1])
        normal = np.stack([edge[w, 1], -edge[w, 0]], 1) / length[:, None]
        pitch = walls.rise[w] / walls.roof_depth[w]
        ray = camera.rays[pixels % width]
        away = -(a[w] * normal).sum(1)
        rise = camera.slopes[pixels // width] + pitch * (ray[:, 0] * normal[:, 0] + ray[:, 1] * normal[:, 1])
        lean = (walls.eaves[w] + walls.rise[w] - camera.pose.height - pitch * away) / np.where(
            np.abs(rise) < 1e-6, 1e-6, rise
        )
        depth[pixels] = 1 / np.clip(np.where(lean > 0, lean, hit_t[of]), hit_t[of] * 0.3, hit_t[of])
    depth = np.where(ground_flat, np.broadcast_to(ground, (height, width)).ravel(), depth)
    lengths = np.hypot(edge[:, 0], edge[:, 1])
    return Trace(
        depth.reshape(height, width).astype(np.float32),
        wall_pixels,
        hits,
        hit_wall,
        (u_near.ravel() * lengths[hit_wall]),
        hit_t,
        np.flatnonzero(ground_flat),
        np.flatnonzero((flat_index == k) & ~ground_flat),
        t_near[:, 0],
    )


def _grid_sample(grid: Array, x: Array, y: Array) -> Array:
    """Bilinear sample of a map with HEIGHT_PX cells a metre; outside it the border holds."""
    rows, columns = grid.shape
    gx, gy = np.clip(x * HEIGHT_PX, 0, columns - 1.01), np.clip(y * HEIGHT_PX, 0, rows - 1.01)
    ix, iy = gx.astype(np.int32), gy.astype(np.int32)
    fx, fy = gx - ix, gy - iy
    flat, at = grid.ravel(), iy * columns + ix
    south = flat[at] * (1 - fx) + flat[at + 1] * fx
    north = flat[at + columns] * (1 - fx) + flat[at + columns + 1] * fx
    return south * (1 - fy) + north * fy


def _shadow_map(town: Town, direction: Array) -> Array:
    """Height below which a place lies in the shade of something towards the sun, cached per sun position."""
    key = ("shadow", *np.round(direction, 3).tolist())
    if key not in town.cache:
        heights = town.heights
        flat = float(np.hypot(direction[0], direction[1]))
        drop = float(direction[2]) / max(flat, 1e-3) / HEIGHT_PX
        step_x, step_y = float(direction[0]) / max(flat, 1e-3), float(direction[1]) / max(flat, 1e-3)
        shade = np.full_like(heights, -10)
        size = heights.shape[0]
        for i in range(1, min(260, int(heights.max() / max(drop, 1e-3)) + 1)):
            sx, sy = round(i * step_x), round(i * step_y)
            x0, x1, y0, y1 = max(0, -sx), min(size, size - sx), max(0, -sy), min(size, size - sy)
            part = shade[y0:y1, x0:x1]
            np.maximum(part, heights[y0 + sy : y1 + sy, x0 + sx : x1 + sx] - np.float32(i * drop), out=part)
        town.cache[key] = shade
    return town.cache[key]


def _lamp_map(town: Town) -> Array:
    """Light of the street lamps on the ground, 1 right under one."""
    if "lamps" not in town.cache:
        light = np.zeros_like(town.heights)
        reach = 17 * HEIGHT_PX
        gy, gx = np.mgrid[-reach : reach + 1, -reach : reach + 1] / np.float32(HEIGHT_PX)
        pool = (1 / (1 + (gx**2 + gy**2) / 20) ** 1.5 * np.clip(1.3 - np.hypot(gx, gy) / 13, 0, 1)).astype(np.float32)
        size = light.shape[0]
        for x, y in town.lamps * HEIGHT_PX:
            cx, cy = round(float(x)), round(float(y))
            x0, x1, y0, y1 = (
                max(0, cx - reach),
                min(size, cx + reach + 1),
                max(0, cy - reach),
                min(size, cy + reach + 1),
            )
            light[y0:y1, x0:x1] += pool[y0 - cy + reach : y1 - cy + reach, x0 - cx + reach : x1 - cx + reach]
        town.cache["lamps"] = light
    return town.cache["lamps"]


_LAMP = np.array([1.0, 0.66, 0.34], np.float32)
_WINDOW = np.array([1.0, 0.7, 0.38], np.float32)


def _shade_walls(town: Town, camera: _Camera, trace: Trace, light: _Light, c: Conditions) -> Array:
    walls, atlas = town.walls, town.atlas
    pixels, hits, width = trace.wall_pixels, trace.hits, camera.columns
    wall = trace.hit_wall[hits]
    inverse = trace.inverse_depth.ravel()[pixels]
    t = 1 / np.maximum(inverse, 1e-6)
    z = camera.pose.height + t * camera.slopes[pixels // width]
    edge = walls.b - walls.a
    length = np.hypot(edge[:, 0], edge[:, 1])
    normal = np.stack([edge[:, 1], -edge[:, 0]], 1) / length[:, None]
    is_roof = walls.roof_depth > 0
    pitch = np.where(is_roof, walls.rise / np.maximum(walls.roof_depth, 1e-3), 0)

    # Texel: along the wall from its start, up from the ground; a mip level whose texels match the pixel's footprint.
    hit_wall = trace.hit_wall
    slant = np.abs((camera.rays[np.arange(len(hit_wall)) // max(1, len(hit_wall) // width)] * normal[hit_wall]).sum(1))
    footprint = trace.hit_t * walls.texel_per_m[hit_wall, 0] / camera.focal / np.sqrt(np.clip(slant, 0.05, 1))
    level = np.clip(np.nan_to_num(np.log2(np.maximum(footprint, 1e-3)) + 0.15, posinf=0), 0, MIP_LEVELS - 1).astype(
        np.int32
    )
    texture = walls.texture[hit_wall]
    level_width, level_height = atlas.width[texture] >> level, atlas.height[texture] >> level
    column = (np.nan_to_num(trace.hit_u) * walls.texel_per_m[hit_wall, 0]).astype(np.int32) % atlas.width[
        texture
    ] >> level
    start = atlas.offset[texture, level] + np.minimum(column, level_width - 1)
    up = np.where(is_roof, np.sqrt(1 + 1 / np.maximum(pitch, 1e-3) ** 2), 1) * walls.texel_per_m[:, 1]
    row = (z * (up[hit_wall] / (1 << level))[hits]).astype(np.int32)
    rows = level_height[hits]
    row = rows - 1 - row % rows
    texel = atlas.texels[start[hits] + row * level_width[hits]].view(np.uint8).reshape(-1, 4)
    albedo = _LINEAR[texel[:, :3]] * (walls.tint**2.2)[wall]

    # Sun on the wall's normal (tilted on roofs), less the shade of what stands between.
    tilt = 1 / np.sqrt(1 + pitch**2)
    upward = pitch * tilt
    facing = np.maximum((normal * tilt[:, None]) @ light.direction[:2] + upward * light.direction[2], 0).astype(
        np.float32
    )
    ray = camera.rays[pixels % width]
    x = camera.pose.x + t * ray[:, 0] + 0.6 * normal[wall, 0]
    y = camera.pose.y + t * ray[:, 1] + 0.6 * normal[wall, 1]
    ambient = (0.62 + 0.3 * upward + 0.06 * normal[:, 0]).astype(np.float32)[wall] * np.minimum(
        1, 0.62 + 0.07 * np.maximum(z, 0)
    )
    lit = ambient[:, None] * light.ambient
    if light.sun.max() > 0.01:
        shade = _grid_sample(_shadow_map(town, light.direction), x, y)
        lit += (facing[wall] * np.clip((z - shade) * 1.4 + 0.5, 0, 1))[:, None] * light.sun
    glow = _LINEAR[texel[:, 3]]
    if light.lamps > 0:
        street = _grid_sample(_lamp_map(town), x, y) * np.exp(-((z - 3.2) ** 2) / 16)
        lit += (street * (0.75 * light.lamps))[:, None] * _LAMP
    if c.snow > 0:
        cover = (c.snow * is_roof.astype(np.float32))[wall] * 0.92
        albedo += cover[:, None] * (0.82 - albedo)
    colour = albedo * lit
    if light.lamps > 0.02:
        colour += (glow * (0.35 + 1.3 * albedo.mean(1)) * light.lamps)[:, None] * _WINDOW
    elif c.wet:
        colour *= 0.85
    return colour


def _shade_ground(town: Town, camera: _Camera, trace: Trace, light: _Light, c: Conditions) -> tuple[Array, Array]:
    """Colour of the ground pixels and how much of a mirror each of them is."""
    pixels, width = trace.ground_pixels, camera.columns
    t = 1 / trace.inverse_depth.ravel()[pixels]
    ray = camera.rays[pixels % width]
    x, y = camera.pose.x + t * ray[:, 0], camera.pose.y + t * ray[:, 1]
    footprint = t * t * (GROUND_PX / camera.focal / camera.pose.height) ** 0.5 * 0.28
    level = np.clip(np.log2(np.maximum(footprint * (GROUND_PX / camera.focal) ** 0.5, 1e-3)), 0, MIP_LEVELS - 1).astype(
        np.int8
    )
    texel = np.empty((len(pixels), 4), np.uint8)
    for k, texture in enumerate(town.ground):
        mine = np.flatnonzero(level == k)
        if len(mine):
            scale, (rows, columns) = GROUND_PX / 2**k, texture.shape[:2]
            fx, fy = np.clip(x[mine] * scale, 0, columns - 1.01), np.clip(y[mine] * scale, 0, rows - 1.01)
            gx, gy = fx.astype(np.int32), fy.astype(np.int32)
            at, flat = gy * columns + gx, texture.view(np.uint32).ravel()
            if k:
                texel[mine] = flat[at].view(np.uint8).reshape(-1, 4)
                continue
            fx, fy = (fx - gx)[:, None].astype(np.float32), (fy - gy)[:, None].astype(np.float32)
            south, north = (
                flat[at + step].view(np.uint8).reshape(-1, 4) * (1 - fx)
                + flat[at + step + 1].view(np.uint8).reshape(-1, 4) * fx
                for step in (0, columns)
            )
            texel[mine] = (south * (1 - fy) + north * fy).astype(np.uint8)
    albedo = _LINEAR[texel[:, :3]]
    size = town.noise.shape[0]
    grain = town.noise[(y * 61).astype(np.int32) % size, (x * 61).astype(np.int32) % size]
    patches = town.noise[(y * 9).astype(np.int32) % size, (x * 9).astype(np.int32) % size]
    albedo *= (1 + (grain - 0.5) * np.clip(0.9 - t * 0.05, 0.1, 0.9) * 0.5)[:, None]
    pavedness = texel[:, 3].astype(np.float32) / 255
    if c.snow > 0:
        cover = c.snow * np.clip(1.35 - 0.75 * pavedness + 0.9 * (patches - 0.5), 0, 1)
        albedo += cover[:, None] * (np.array([0.8, 0.83, 0.88], np.float32) - albedo)
    mirror = c.wet * pavedness * np.clip(0.35 + 1.5 * (patches - 0.35), 0.12, 1)
    albedo *= (1 - 0.5 * c.wet * pavedness)[:, None]
    lit = np.broadcast_to(light.ambient * np.float32(0.85), (len(pixels), 3)).copy()
    if light.sun.max() > 0.01:
        shade = _grid_sample(_shadow_map(town, light.direction), x, y)
        lit += (light.direction[2] * np.clip(0.5 - shade * 1.4, 0, 1))[:, None] * light.sun
    if light.lamps > 0:
        lit += (_grid_sample(_lamp_map(town), x, y) * (1.1 * light.lamps))[:, None] * _LAMP
    return albedo * lit, mirror


def _shade_sky(town: Town, camera: _Camera, trace: Trace, light: _Light, c: Conditions) -> Array:
    pixels, width = trace.sky_pixels, camera.columns
    column, slope = pixels % width, camera.slopes[pixels // width]
    reach_of = np.hypot(camera.rays[:, 0], camera.rays[:, 1])
    turn_of = np.arctan2(camera.rays[:, 0], camera.rays[:, 1])
    reach = reach_of[column]
    rise = slope / reach
    up = np.clip(rise, 0, 3)
    mix = np.exp(-3.2 * up)[:, None]
    sky = light.zenith + (light.horizon - light.zenith) * mix
    if light.sun.max() > 0.01:
        along = ((camera.rays @ light.direction[:2])[column] + slope * light.direction[2]) / np.hypot(reach, slope)
        sun = np.clip(along, 0, 1)
        sky += (0.35 * sun**12 + 0.8 * sun**220)[:, None] * (light.sun * np.float32(1 - 0.8 * c.cloud))
    size = town.noise.shape[0]
    far = 46 / np.maximum(up + 0.07, 0.05)
    heading = camera.rays / reach_of[:, None]
    cloud_x, cloud_y = (heading[column, 0] * far).astype(np.int32), (heading[column, 1] * far).astype(np.int32)
    veil = town.noise[cloud_y % size, cloud_x % size]
    body = np.clip((veil - (0.72 - 0.62 * c.cloud)) * 2.6, 0, 1) * np.clip(rise * 6, 0.15, 1)
    shine = (0.32 + 0.75 * veil)[:, None] * (light.ambient * 0.95 + light.sun * 0.22 + light.horizon * 0.2).astype(
        np.float32
    )
    sky += (body * np.float32(0.9 - 0.25 * c.cloud))[:, None] * (shine - sky)
    if light.lamps > 0.7 and c.cloud < 0.8:
        star = (
            np.sin((turn_of * 400).astype(np.int32)[column] * 12.9898 + (rise * 400).astype(np.int32) * 78.233)
            * 43758.5453
        )
        sky += ((star - np.floor(star) > 0.9985) * np.clip(up, 0, 1) * (1 - body) * 0.6)[:, None]
    # Hills around the town, bluer with distance; they reach up to a slope of 0.13.
    low = np.flatnonzero(rise < 0.15)
    turn = (turn_of / (2 * math.pi) * len(town.skyline)).astype(np.int32)
    for lift, colour in ((0, (0.1, 0.15, 0.17)), (170, (0.045, 0.085, 0.05))):
        ridge = town.skyline[(turn + lift) % len(town.skyline)] * np.float32(1 - lift / 400)
        hill = np.clip((ridge[column[low]] - rise[low]) * 400, 0, 1)
        lit = np.array(colour, np.float32) * (light.ambient + light.sun * 0.4)
        if c.snow:
            lit = lit + c.snow * 0.35 * light.ambient
        haze = np.float32(0.62 if not lift else 0.4)
        sky[low] += hill[:, None] * (lit * (1 - haze) + light.mist * haze - sky[low])
    return sky


def _draw_solids(
    town: Town, camera: _Camera, faces: PolygonTable, light: _Light, c: Conditions, image: Array, inverse_depth: Array
) -> None:
    """Rasterise convex faces with a depth test; edges and 1/depth are affine over the image."""
    eye = np.array([*camera.at, camera.pose.height], np.float32)
    offset = faces.where - eye[:2]
    ahead, aside = offset @ camera.forward, offset @ camera.right
    off = faces.corners[:, 0] - eye
    toward = (faces.normal * off).sum(1)  # negative where the outside is seen
    near = np.flatnonzero((toward < -1e-4) & (ahead > -4) & (ahead < faces.range_m) & (np.abs(aside) < ahead + 8))
    if not len(near):
        return
    # Camera space: x right, y down, z ahead. There a pixel's ray lies inside a face when it lies on the inner side of
    # the planes through the eye and each edge, wherever the corners are: nothing has to be clipped.
    relative = faces.corners[near] - eye
    view = np.stack([relative[..., :2] @ camera.right, -relative[..., 2], relative[..., :2] @ camera.forward], -1)
    safe = np.maximum(view[..., 2:], 1e-3)
    x, y = (view[..., :2] / safe * camera.focal + [camera.columns / 2, camera.horizon]).transpose(2, 0, 1)
    behind = view[..., 2].min(1) < NEAR_M
    x0, x1 = (np.where(behind, e, v) for e, v in ((0, x.min(1)), (camera.columns, x.max(1) + 1)))
    y0, y1 = (np.where(behind, e, v) for e, v in ((0, y.min(1)), (camera.rows, y.max(1) + 1)))
    x0, x1 = np.maximum(0, x0).astype(int), np.minimum(camera.columns, x1).astype(int)
    y0, y1 = np.maximum(0, y0).astype(int), np.minimum(camera.rows, y1).astype(int)
    keep = (view[..., 2].max(1) > NEAR_M) & (x1 > x0) & (y1 > y0)
    near, view, x0, x1, y0, y1 = (v[keep] for v in (near, view, x0, x1, y0, y1))
    if not len(near):
        return

    # As affine functions of column and row: the edge planes, and 1/depth from the face's own plane.
    edges = np.cross(view, np.roll(view, -1, 1))
    is_edge = np.abs(edges).max(-1) > 1e-9
    normal = faces.normal[near]
    facing = np.stack([normal[:, :2] @ camera.right, -normal[:, 2], normal[:, :2] @ camera.forward], -1)
    plane = facing / (facing * view[:, 0]).sum(1, keepdims=True)

    where = faces.where[near, 0], faces.where[near, 1]
    middle = faces.corners[near, :, 2].mean(1)
    lit = light.ambient * (0.6 + 0.35 * np.maximum(normal[:, 2:], 0))
    if light.sun.max() > 0.01:
        sunlit = np.clip((middle - _grid_sample(_shadow_map(town, light.direction), *where)) * 1.4 + 0.5, 0, 1)
        lit = lit + (sunlit * np.maximum(normal @ light.direction, 0))[:, None] * light.sun
    if light.lamps > 0:
        street = (
            _grid_sample(_lamp_map(town), *where)
            * np.exp(-(((middle - 2) / 5) ** 2))
            * (0.5 + 0.5 * np.maximum(normal[:, 2], 0))
        )
        lit = lit + (street * light.lamps)[:, None] * _LAMP
    albedo = faces.albedo[near]
    if c.snow:
        albedo = albedo + (c.snow * (normal[:, 2:] > 0.35)) * (0.8 - albedo)
    colour = albedo * lit + faces.glow[near, None] * albedo

    columns = (np.arange(camera.columns) + 0.5 - camera.columns / 2) / camera.focal
    rows = (np.arange(camera.rows)[:, None] + 0.5 - camera.horizon) / camera.focal
    for i in range(len(near)):
        area = slice(y0[i], y1[i]), slice(x0[i], x1[i])
        gx, gy = columns[area[1]], rows[area[0]]
        window = inverse_depth[area]
        depth = plane[i, 0] * gx + (plane[i, 1] * gy + plane[i, 2])
        inside = (depth > window * 0.998) & (depth < 1 / NEAR_M)
        for edge in edges[i, is_edge[i]]:
            inside &= edge[0] * gx + (edge[1] * gy + edge[2]) <= 0
        image[area][inside] = colour[i]
        window[inside] = depth[inside]


def _draw_sprites(
    town: Town, camera: _Camera, sprites: list[Sprite], light: _Light, c: Conditions, image: Array, inverse_depth: Array
) -> None:
    at = np.array([(s.x, s.y) for s in sprites]) - camera.at
    ahead, aside = at @ camera.forward, at @ camera.right
    order = np.argsort(-ahead)
    keep = (ahead > 0.8) & (ahead < 170) & (np.abs(aside) < ahead * 0.9 + 5)
    shadow = _shadow_map(town, light.direction) if light.sun.max() > 0.01 else None
    lamps = _lamp_map(town) if light.lamps > 0 else None
    for i in order[keep[order]]:
        sprite, depth = sprites[i], float(ahead[i])
        scale = camera.focal / depth
        middle = camera.columns / 2 + scale * float(aside[i])
        left, right = middle - sprite.width * scale / 2, middle + sprite.width * scale / 2
        bottom = camera.horizon + scale * camera.pose.height
        top = bottom - sprite.height * scale
        x0, x1 = max(0, int(left)), min(camera.columns, int(right) + 1)
        y0, y1 = max(0, int(top)), min(camera.rows, int(bottom) + 1)
        if x0 >= x1 or y0 >= y1:
            continue
        window = inverse_depth[y0:y1, x0:x1]
        visible = window < 1 / depth
        if not visible.any():
            continue
        name = sprite.picture
        is_tree = name.startswith("tree")
        levels = town.pictures[name]
        level = int(np.clip(math.log2(max(levels[0].shape[0] / max(bottom - top, 1), 1)), 0, len(levels) - 1))
        picture = levels[level]
        rows = np.clip(
            (np.arange(y0, y1) + 0.5 - top) / (bottom - top) * picture.shape[0], 0, picture.shape[0] - 1
        ).astype(int)
        columns = np.clip(
            (np.arange(x0, x1) + 0.5 - left) / (right - left) * picture.shape[1], 0, picture.shape[1] - 1
        ).astype(int)
        texel = picture[rows[:, None], columns[None, :]]
        where = np.array([sprite.x], np.float32), np.array([sprite.y], np.float32)
        high = sprite.height * (0.95 if is_tree else 0.5)
        sunlit = (
            float(np.clip((high - _grid_sample(shadow, *where)[0]) * 0.7 + 0.5, 0, 1)) if shadow is not None else 0.0
        )
        lit = light.ambient * 0.8 + light.sun * (0.45 * sunlit)
        if lamps is not None:
            lit = lit + light.lamps * min(0.7, float(_grid_sample(lamps, *where)[0])) * 0.5 * _LAMP
        colour = _LINEAR[texel[..., :3]]
        if c.snow and is_tree:
            bright = np.clip((colour.sum(-1, keepdims=True) - 0.12) * 5, 0, 1) * c.snow
            colour = colour + bright * (0.75 - colour)
        colour = colour * lit
        if name.startswith("lamp") and light.lamps > 0:
            lantern = (rows < picture.shape[0] * 0.17)[:, None] & (texel[..., :3].min(-1) > 170)
            colour[lantern] = _LAMP * 3.0 * light.lamps
        alpha = (texel[..., 3:].astype(np.float32) / 255) * visible[..., None]
        patch = image[y0:y1, x0:x1]
        patch += alpha * (colour - patch)
        window[alpha[..., 0] > 0.5] = 1 / depth
        if name.startswith("lamp") and light.lamps > 0:
            _halo(
                image, inverse_depth, middle, top + 0.09 * (bottom - top), depth, camera, light.lamps * (1 + 12 * c.fog)
            )


def _halo(
    image: Array, inverse_depth: Array, x: float, y: float, depth: float, camera: _Camera, strength: float
) -> None:
    radius = min(0.22 * camera.columns, 1.5 * camera.focal / depth)
    x0, x1 = max(0, int(x - radius)), min(camera.columns, int(x + radius) + 1)
    y0, y1 = max(0, int(y - radius)), min(camera.rows, int(y + radius) + 1)
    if x0 >= x1 or y0 >= y1:
        return
    gx, gy = np.arange(x0, x1)[None, :] - x, np.arange(y0, y1)[:, None] - y
    falloff = np.clip(1 - np.sqrt(gx**2 + gy**2) / radius, 0, 1) ** 3
    falloff *= inverse_depth[y0:y1, x0:x1] <= 1.15 / depth
    image[y0:y1, x0:x1] += (0.5 * strength * falloff)[..., None].astype(np.float32) * _LAMP


def _traffic(town: Town, c: Conditions, pose: Pose) -> tuple[list[PolygonTable], list[Sprite]]:
    """Cars and people of this traversal near the camera; the same seed parks the same cars."""
    rng = np.random.default_rng([town.seed, c.traffic, 77])
    taken = rng.random(len(town.car_slots)) < rng.uniform(0.25, 0.5)
    paint = rng.integers(len(CAR_COLOURS), size=len(town.car_slots))
    near = np.hypot(town.car_slots[:, 0] - pose.x, town.car_slots[:, 1] - pose.y) < 60
    cars = [
        car_faces(int(paint[i])).placed(*(float(v) for v in town.car_slots[i])) for i in np.flatnonzero(taken & near)
    ]
    present = rng.random(len(town.walkways)) < (0.16 if c.sun_elevation > 0 and c.rain == 0 else 0.06)
    who = rng.integers(8, size=len(town.walkways))
    close = np.hypot(town.walkways[:, 0] - pose.x, town.walkways[:, 1] - pose.y) < 70
    people = [
        Sprite(float(town.walkways[i, 0]), float(town.walkways[i, 1]), 0.68, 1.78, f"person{who[i]}")
        for i in np.flatnonzero(present & close)
    ]
    return cars, people


def _reflect(camera: _Camera, trace: Trace, image: Array, mirror: Array, noise: Array) -> None:
    """Wet ground mirrors, in each column, what stands above the foot of the nearest wall."""
    rows, columns = trace.ground_pixels // camera.columns, trace.ground_pixels % camera.columns
    foot = camera.horizon + camera.focal * camera.pose.height / np.minimum(trace.base_t, 400)
    ripple = noise[(rows * 7) % noise.shape[0], (columns * 3 + rows * 11) % noise.shape[1]] - 0.5
    depth = rows - camera.horizon
    source = np.clip(2 * foot[columns] - rows + ripple * depth * 0.34, 0, camera.rows - 1).astype(np.int64)
    side = np.clip(columns + ripple * depth * 0.03, 0, camera.columns - 1).astype(np.int64)
    grazing = np.clip(1.05 - depth / camera.rows * 1.2, 0.25, 1)
    weight = (mirror * grazing * 0.55)[:, None]
    flat = image.reshape(-1, 3)
    seen = image[source, side]
    flat[trace.ground_pixels] += weight * (seen - flat[trace.ground_pixels])


def _precipitation(image: Array, c: Conditions, light: _Light, rng: np.random.Generator) -> None:
    height, width = image.shape[:2]
    bright = light.mist * 1.2 + 0.02
    if c.rain:
        drops = np.zeros((height, width), np.float32)
        for _ in range(int(260 * c.rain)):
            x, y = int(rng.integers(width)), int(rng.integers(-30, height))
            size = int(rng.integers(10, 42) * height / 448) + 3
            ys = np.arange(max(0, y), min(height, y + size))
            drops[ys, np.clip(x + (ys - y) // 7, 0, width - 1)] = rng.uniform(0.1, 0.34)
        image += drops[..., None] * (bright - image)
    if c.snow:
        for radius, count in ((1, 380), (2, 70), (4, 9)):
            for _ in range(int(count * c.snow)):
                x, y = int(rng.integers(width)), int(rng.integers(height))
                patch = image[max(0, y - radius) : y + radius, max(0, x - radius) : x + radius]
                patch += np.float32(0.75 / radius**0.5) * (light.ambient * 1.1 - patch)


def trace_depth(town: Town, pose: Pose, size: tuple[int, int] = (224, 224)) -> Array:
    """Depth along the optical axis, ``float32 [H, W]`` metres (infinite in the sky), of walls and ground alone."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(1 / _trace(town, _Camera(pose, *size)).inverse_depth, np.float32)


def render_view(
    town: Town,
    pose: Pose,
    conditions: Conditions | str = "day",
    size: tuple[int, int] = (224, 224),
    *,
    supersample: int = 2,
) -> NDArray[np.uint8]:
    """Photograph the town: ``uint8 [H, W, 3]`` RGB. Equal arguments give equal pixels."""
    c = CONDITIONS[conditions] if isinstance(conditions, str) else conditions
    camera = _Camera(pose, size[0] * supersample, size[1] * supersample)
    light = _light(c)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        trace = _trace(town, camera)
    image = np.zeros((camera.rows, camera.columns, 3), np.float32)
    flat = image.reshape(-1, 3)
    flat[trace.sky_pixels] = _shade_sky(town, camera, trace, light, c)
    flat[trace.wall_pixels] = _shade_walls(town, camera, trace, light, c)
    ground, mirror = _shade_ground(town, camera, trace, light, c)
    flat[trace.ground_pixels] = ground
    cars, people = _traffic(town, c, pose)
    _draw_solids(town, camera, PolygonTable.joined([town.solids, *cars]), light, c, image, trace.inverse_depth)
    _draw_sprites(town, camera, town.sprites + people, light, c, image, trace.inverse_depth)
    if c.wet:
        _reflect(camera, trace, image, mirror, town.noise)
    inverse = np.maximum(trace.inverse_depth, 1e-5)
    clear = np.exp(-c.fog / inverse)
    clear[trace.inverse_depth == 0] = math.exp(-c.fog * 160)
    for channel in range(3):
        image[..., channel] += (1 - clear) * (light.mist[channel] - image[..., channel])
    rng = np.random.default_rng(
        [town.seed, c.seed, c.traffic, round(pose.x * 100) & 0xFFFFFF, round(pose.y * 100) & 0xFFFFFF]
    )
    _precipitation(image, c, light, rng)
    if supersample > 1:
        steps = range(supersample)
        parts = [image[i::supersample, j::supersample] for i in steps for j in steps]
        image = sum(parts[1:], parts[0].copy()) / np.float32(supersample**2)
    return _develop(image, light.exposure, c.noise, rng)


def _develop(image: Array, exposure: float, noise: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Filmic tone curve, vignette and sensor noise."""
    height, width = image.shape[:2]
    image = image * np.float32(exposure)
    image = image * (2.2 * image + 0.1) / (image * (2.1 * image + 0.62) + 0.14)
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    image *= (1 - 0.1 * (x**2 + y**2))[..., None]
    out = _DISPLAY[np.clip(image * 4095, 0, 4095).astype(np.int32)].astype(np.float32)
    out += rng.standard_normal(image.shape, np.float32) * np.float32(255 * noise)
    return np.clip(out, 0, 255).astype(np.uint8)


def as_jpeg(image: NDArray[np.uint8], quality: int = 90) -> bytes:
    """Encode a picture."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def vary(conditions: str, **changes: Any) -> Conditions:
    """A preset with some of its fields replaced."""
    return replace(CONDITIONS[conditions], **changes)
