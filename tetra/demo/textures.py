"""Paint for the demo town: facades, roofs, trees, lamps, people and noise, all drawn from a seed.

Every painter returns ``uint8 [H, W, 4]``. For walls the fourth channel is how much a texel glows at night
(lit windows, shop signs); for sprites it is opacity. Row 0 is the top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

PIXELS_PER_METRE = 20
Colour = tuple[int, int, int]
Texture = NDArray[np.uint8]


@dataclass(frozen=True)
class Theme:
    """What the houses of a quarter have in common."""

    material: str  # brick, stucco, stone, timber, panel or glass
    walls: tuple[Colour, ...]
    trims: tuple[Colour, ...]
    window: str  # sash, shutters, arched, ribbon or grid
    roofs: tuple[str, ...]  # flat, pitched, gable, stepped or mansard
    floors: tuple[int, int]
    doors: tuple[Colour, ...] = ((70, 30, 28), (28, 52, 44), (32, 44, 78), (60, 60, 64), (120, 84, 40))


THEMES = (
    Theme(
        "brick",
        ((150, 78, 60), (168, 94, 70), (128, 70, 58), (176, 112, 84)),
        ((232, 226, 212), (214, 206, 190)),
        "sash",
        ("pitched", "pitched", "flat"),
        (2, 3),
    ),
    Theme(
        "stucco",
        ((232, 196, 140), (222, 158, 128), (236, 220, 178), (196, 208, 190), (206, 172, 160), (170, 192, 208)),
        ((244, 238, 226),),
        "shutters",
        ("pitched", "pitched", "flat"),
        (2, 4),
    ),
    Theme(
        "stone",
        ((206, 190, 156), (196, 184, 164), (182, 168, 142)),
        ((222, 210, 182), (168, 156, 134)),
        "arched",
        ("mansard", "flat", "mansard"),
        (3, 4),
    ),
    Theme(
        "timber",
        ((238, 230, 210), (230, 214, 180), (216, 200, 172)),
        ((74, 48, 34), (92, 58, 40)),
        "sash",
        ("gable", "gable", "pitched"),
        (2, 3),
    ),
    Theme(
        "brick",
        ((86, 56, 50), (110, 66, 54), (70, 52, 52), (132, 84, 66)),
        ((240, 236, 228),),
        "sash",
        ("stepped", "gable", "stepped"),
        (3, 4),
    ),
    Theme(
        "panel",
        ((218, 216, 212), (188, 188, 190), (204, 194, 180), (150, 158, 166)),
        ((90, 94, 100), (60, 64, 70)),
        "ribbon",
        ("flat",),
        (3, 5),
    ),
    Theme(
        "glass",
        ((92, 116, 132), (110, 128, 128), (84, 98, 118)),
        ((52, 58, 64), (200, 204, 206)),
        "grid",
        ("flat",),
        (4, 6),
    ),
)
SHOP_NAMES = (
    "BAKERY",
    "CAFE LUNA",
    "BOOKS",
    "FLORIST",
    "PHARMACY",
    "BISTRO",
    "CYCLES",
    "OPTIK",
    "TEA ROOM",
    "MARKET",
    "TAILOR",
    "RECORDS",
    "PIZZERIA",
    "BARBER",
    "ANTIQUES",
    "GALLERY",
    "WINE BAR",
    "TOYS",
    "NOODLES",
    "HOTEL",
    "SHOES",
    "CINEMA",
    "BANK",
    "GELATO",
    "POST",
    "MUSIC",
    "CHEESE",
    "LAMPS",
    "JEWELS",
    "HARDWARE",
)
SIGN_COLOURS: tuple[Colour, ...] = (
    (24, 66, 54),
    (120, 26, 30),
    (24, 40, 88),
    (38, 36, 36),
    (196, 140, 30),
    (86, 30, 76),
    (16, 92, 110),
    (226, 220, 206),
)
LEAVES: tuple[Colour, ...] = ((74, 94, 52), (92, 112, 58), (54, 80, 54), (112, 118, 60), (128, 86, 54), (190, 152, 162))


def fractal_noise(rng: np.random.Generator, size: int, slope: float = 1.7) -> NDArray[np.float32]:
    """Tileable noise ``float32 [size, size]`` in [0, 1] whose spectrum falls as frequency ** -slope."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :])
    frequency[0, 0] = 1.0
    spectrum = rng.normal(size=frequency.shape) + 1j * rng.normal(size=frequency.shape)
    noise = np.fft.irfft2(spectrum * frequency**-slope, s=(size, size))
    low, high = np.percentile(noise, [1, 99])
    return np.clip((noise - low) / (high - low), 0, 1).astype(np.float32)


def shade(colour: Colour, factor: float) -> Colour:
    """The colour, lighter (factor above 1) or darker."""
    red, green, blue = colour
    return min(255, int(red * factor)), min(255, int(green * factor)), min(255, int(blue * factor))


def _masonry(
    rng: np.random.Generator,
    height: int,
    width: int,
    colour: Colour,
    course: int,
    length: int,
    joint: float,
    spread: float,
) -> NDArray[np.float32]:
    """Courses of bricks or stones, each with its own tone; ``joint`` is the mortar's brightness."""
    rows = np.arange(height) // course
    offset = (rows % 2) * (length // 2)
    columns = (np.arange(width)[None, :] + offset[:, None]) // length
    tones = 1 + spread * rng.normal(size=(rows.max() + 1, columns.max() + 1, 1))
    tones = tones + 0.25 * spread * rng.normal(size=(*tones.shape[:2], 3))
    texture = np.asarray(colour, np.float32) * tones[rows[:, None], columns]
    mortar = (np.arange(height) % course == 0)[:, None] | ((np.arange(width)[None, :] + offset[:, None]) % length == 0)
    texture[mortar] = texture[mortar] * 0.45 + np.asarray(colour) * joint * 0.55
    return texture.astype(np.float32)


@lru_cache(maxsize=8)
def _stains(seed: int) -> NDArray[np.float32]:
    return fractal_noise(np.random.default_rng(seed), 256, 1.3)


def wall_surface(
    rng: np.random.Generator, height: int, width: int, material: str, colour: Colour
) -> NDArray[np.float32]:
    """A bare wall ``float32 [height, width, 3]`` with weathering."""
    if material == "brick":
        texture = _masonry(rng, height, width, colour, 3, 7, 1.25, 0.09)
    elif material == "stone":
        texture = _masonry(rng, height, width, colour, 9, 20, 0.72, 0.05)
    elif material == "panel":
        texture = _masonry(rng, height, width, colour, 31, 40, 0.7, 0.02)
    else:
        texture = np.broadcast_to(np.asarray(colour, np.float32), (height, width, 3)).copy()
    top, left = rng.integers(256, size=2)
    rows, columns = (np.arange(height) // 2 + top) % 256, (np.arange(width) + left) % 256
    texture *= 0.88 + 0.2 * _stains(int(rng.integers(8)))[rows[:, None], columns][..., None]
    texture *= 1 + 0.025 * rng.standard_normal((height, width, 1), np.float32)
    grime = np.clip((height - np.arange(height)) / (0.8 * PIXELS_PER_METRE), 0, 1)
    return (texture * (0.72 + 0.28 * grime)[:, None, None]).astype(np.float32)


class _Facade:
    """One front: an RGB canvas and, beside it, the glow it gives off at night."""

    def __init__(self, rng: np.random.Generator, surface: NDArray[np.float32], trim: Colour) -> None:
        self.rng, self.trim = rng, trim
        self.image = Image.fromarray(np.clip(surface, 0, 255).astype(np.uint8))
        self.draw = ImageDraw.Draw(self.image)
        self.glow = Image.new("L", self.image.size)
        self.glow_draw = ImageDraw.Draw(self.glow)
        self.shutters: Colour = ((52, 92, 84), (62, 84, 120), (110, 64, 50), (92, 110, 72), (150, 150, 140))[
            int(rng.integers(5))
        ]
        self.curtain = rng.random()

    def glass(self, x0: int, y0: int, x1: int, y1: int, lit: float = 0.34) -> None:
        """Panes that mirror the sky above and a dark room below, some with curtains, some lit at night."""
        rng, height = self.rng, max(y1 - y0, 1)
        tone = rng.uniform(0.75, 1.2)
        for y in range(y0, y1 + 1, 3):
            mix = ((y - y0) / height) ** 0.8
            pane = shade((int(128 - 84 * mix), int(146 - 94 * mix), int(164 - 104 * mix)), tone)
            self.draw.rectangle([x0, y, x1, min(y + 2, y1)], fill=pane)
        curtain = rng.random()
        if curtain < 0.25 + 0.3 * self.curtain:
            width, cloth = max(1, (x1 - x0) // 4), shade((216, 208, 196), rng.uniform(0.7, 1))
            self.draw.rectangle([x0, y0, x0 + width, y1], fill=cloth)
            self.draw.rectangle([x1 - width, y0, x1, y1], fill=cloth)
        elif curtain < 0.7:
            blind = int(height * rng.uniform(0.15, 0.55))
            self.draw.rectangle([x0, y0, x1, y0 + blind], fill=shade((200, 192, 178), rng.uniform(0.6, 1)))
        if rng.random() < lit:
            self.glow_draw.rectangle([x0, y0, x1, y1], fill=int(rng.integers(90, 230)))

    def frame(self, x0: int, y0: int, x1: int, y1: int, bars: tuple[int, int]) -> None:
        """Glazing bars, and the shadow that the lintel throws on the glass."""
        for i in range(1, bars[0]):
            x = x0 + (x1 - x0) * i // bars[0]
            self.draw.line([(x, y0), (x, y1)], fill=self.trim)
            self.glow_draw.line([(x, y0), (x, y1)], fill=0)
        for i in range(1, bars[1]):
            y = y0 + (y1 - y0) * i // bars[1]
            self.draw.line([(x0, y), (x1, y)], fill=self.trim)
            self.glow_draw.line([(x0, y), (x1, y)], fill=0)
        self.draw.line([(x0, y0), (x1, y0)], fill=(34, 36, 42), width=2)
        self.draw.line([(x0, y0), (x0, y1)], fill=(58, 60, 66))

    def window(self, x0: int, y0: int, x1: int, y1: int, style: str) -> None:
        """A window in its opening, with sill, lintel and what hangs beside it."""
        rng, draw = self.rng, self.draw
        if style == "shutters":
            leaf = (x1 - x0) // 2
            for side in (x0 - leaf - 1, x1 + 2):
                draw.rectangle([side, y0, side + leaf - 1, y1], fill=self.shutters, outline=shade(self.shutters, 0.6))
                for y in range(y0 + 2, y1, 3):
                    draw.line([(side + 1, y), (side + leaf - 2, y)], fill=shade(self.shutters, 0.8))
        draw.rectangle([x0 - 2, y0 - 2, x1 + 2, y1 + 1], fill=self.trim)
        if style == "arched":
            draw.pieslice([x0 - 2, y0 - (x1 - x0) // 2 - 2, x1 + 2, y0 + (x1 - x0) // 2 + 2], 180, 360, fill=self.trim)
            draw.pieslice([x0, y0 - (x1 - x0) // 2, x1, y0 + (x1 - x0) // 2], 180, 360, fill=(66, 80, 94))
        self.glass(x0, y0, x1, y1)
        self.frame(x0, y0, x1, y1, (2, 3) if style != "shutters" else (2, 2))
        draw.rectangle([x0 - 4, y1 + 1, x1 + 4, y1 + 3], fill=shade(self.trim, 1.05))
        draw.line([(x0 - 3, y1 + 4), (x1 + 3, y1 + 4)], fill=(60, 54, 50))
        if rng.random() < 0.14:
            for _ in range(26):
                x, y = int(rng.integers(x0 - 3, x1 + 3)), y1 - int(rng.integers(0, 5))
                blossom = ((70, 110, 48), (90, 130, 60), (206, 60, 70), (232, 150, 60))[int(rng.integers(4))]
                draw.ellipse([x - 1, y - 1, x + 1, y + 1], fill=blossom)

    def balcony(self, x0: int, x1: int, y: int) -> None:
        """A slab with a railing in front of what is behind it."""
        self.draw.rectangle([x0, y, x1, y + 3], fill=shade(self.trim, 0.8))
        self.draw.line([(x0, y - 19), (x1, y - 19)], fill=(40, 42, 46), width=2)
        for x in range(x0, x1 + 1, 4):
            self.draw.line([(x, y - 19), (x, y)], fill=(46, 48, 52))

    def door(self, x0: int, y0: int, x1: int, y1: int, colour: Colour) -> None:
        """A panelled door with a fanlight and a step."""
        draw = self.draw
        draw.rectangle([x0 - 4, y0 - 4, x1 + 4, y1], fill=self.trim)
        self.glass(x0, y0, x1, y0 + 7, lit=0.7)
        draw.rectangle([x0, y0 + 9, x1, y1], fill=colour)
        middle = (x0 + x1) // 2
        for left, right in ((x0 + 3, middle - 2), (middle + 2, x1 - 3)):
            draw.rectangle([left, y0 + 13, right, y0 + 25], outline=shade(colour, 0.6), fill=shade(colour, 1.15))
            draw.rectangle([left, y0 + 29, right, y1 - 4], outline=shade(colour, 0.6), fill=shade(colour, 1.1))
        draw.rectangle([x0 - 6, y1 - 3, x1 + 6, y1], fill=(150, 146, 140))

    def shop(self, x0: int, x1: int, y0: int, y1: int, name: str, sign: Colour) -> None:
        """A shop front: fascia with the name, display windows with goods, a glazed door."""
        rng, draw = self.rng, self.draw
        draw.rectangle([x0, y0, x1, y1], fill=shade(sign, 0.85))
        fascia = y0 + 15
        draw.rectangle([x0, y0, x1, fascia], fill=sign, outline=shade(sign, 0.6))
        ink = (244, 236, 214) if sum(sign) < 420 else (44, 38, 34)
        for points in range(15, 7, -1):
            font = ImageFont.load_default(points)
            if draw.textlength(name, font=font) < x1 - x0 - 8:
                break
        at = ((x0 + x1) // 2, (y0 + fascia) // 2)
        draw.text(at, name, fill=ink, font=font, anchor="mm")
        self.glow_draw.rectangle([x0, y0, x1, fascia], fill=36)
        self.glow_draw.text(at, name, fill=255, font=font, anchor="mm")
        door = int(rng.integers(0, 3))
        bays = max(2, (x1 - x0) // 36)
        for bay in range(bays):
            left, right = x0 + (x1 - x0) * bay // bays + 3, x0 + (x1 - x0) * (bay + 1) // bays - 3
            if bay == min(door, bays - 1):
                draw.rectangle([left + 4, fascia + 3, right - 4, y1], fill=shade(sign, 0.7))
                self.glass(left + 7, fascia + 6, right - 7, y1 - 10, lit=0.9)
                continue
            self.glass(left, fascia + 3, right, y1 - 9, lit=0.92)
            for _ in range(int((right - left) * 0.8)):
                x, size = int(rng.integers(left + 1, max(left + 2, right - 3))), int(rng.integers(2, 6))
                goods = tuple(int(c) for c in rng.integers(50, 235, 3))
                draw.rectangle([x, y1 - 10 - size - int(rng.integers(0, 2)) * 9, x + size, y1 - 10], fill=goods)
            draw.rectangle([left, fascia + 3, right, y1 - 9], outline=shade(sign, 0.6))

    def pixels(self) -> Texture:
        """RGB and glow together."""
        return np.dstack([np.asarray(self.image), np.asarray(self.glow)])


def facade(
    rng: np.random.Generator,
    theme: Theme,
    colour: Colour,
    width_m: float,
    floors: int,
    floor_m: float,
    roof: str,
    rise_m: float,
    shop: str | None,
) -> Texture:
    """The street front of one house, ``uint8 [H, W, 4]``; H covers ``floors * floor_m + 0.8`` m and the gable."""
    px = PIXELS_PER_METRE
    body = round((floors * floor_m + 0.8) * px)
    top = round(rise_m * px)
    width, height = round(width_m * px), body + top
    trim = theme.trims[int(rng.integers(len(theme.trims)))]
    front = _Facade(rng, wall_surface(rng, height, width, theme.material, colour), trim)
    draw, floor = front.draw, floor_m * px
    if theme.material == "timber":
        _beams(front, top, height, width, floor, floors)
    window_m = {"sash": 1.1, "shutters": 1.0, "arched": 1.2, "ribbon": 2.6, "grid": 1.5}[theme.window]
    pitch_m = {"sash": 2.3, "shutters": 2.7, "arched": 2.5, "ribbon": 3.2, "grid": 1.6}[theme.window] * rng.uniform(
        0.92, 1.15
    )
    bays = max(1, int((width_m - 0.7) / pitch_m))
    centres = [(i + 0.5) * (width - 0.7 * px) / bays + 0.35 * px for i in range(bays)]
    balconies = rng.random() < (0.5 if theme.window in ("ribbon", "arched") else 0.2)
    for level in range(1, floors):
        bottom = height - level * floor
        if theme.material in ("stone", "brick", "stucco") and rng.random() < 0.8:
            draw.rectangle([0, bottom - 3, width, bottom], fill=shade(trim, 0.95))
            draw.line([(0, bottom + 1), (width, bottom + 1)], fill=(76, 70, 64))
        mansard = roof == "mansard" and level == floors - 1
        if mansard:
            slate = np.clip(_masonry(rng, int(bottom) - top, width, (84, 90, 102), 4, 6, 0.7, 0.08), 0, 255)
            front.image.paste(Image.fromarray(slate.astype(np.uint8)), (0, top))
            draw.rectangle([0, bottom - 6, width, bottom], fill=shade(trim, 1.05))
            draw.line([(0, bottom + 1), (width, bottom + 1)], fill=(60, 56, 52), width=2)
        tall = 1.75 if theme.window in ("arched", "sash") else 1.5
        if theme.window == "grid":
            tall = floor_m - 0.5
        sill = bottom - (0.75 if theme.window != "grid" else 0.3) * px
        for centre in centres:
            x0, x1 = round(centre - window_m * px / 2), round(centre + window_m * px / 2)
            y0 = round(sill - tall * px * (0.85 if mansard else 1))
            if theme.window in ("ribbon", "grid"):
                draw.rectangle([x0 - 1, y0 - 1, x1 + 1, sill + 1], fill=trim)
                front.glass(x0, y0, x1, round(sill), lit=0.35)
                front.frame(x0, y0, x1, round(sill), (3, 1) if theme.window == "ribbon" else (1, 2))
            else:
                if mansard:
                    draw.polygon([(x0 - 5, y0 - 2), ((x0 + x1) // 2, y0 - 13), (x1 + 5, y0 - 2)], fill=shade(trim, 0.8))
                front.window(x0, y0, x1, round(sill), "sash" if mansard else theme.window)
        if balconies and not mansard and theme.window != "grid":
            for centre in centres[:: 1 if bays < 4 else 2]:
                front.balcony(round(centre - 0.95 * px), round(centre + 0.95 * px), round(bottom))
    ground = height - round(floor)
    sign = SIGN_COLOURS[int(rng.integers(len(SIGN_COLOURS)))]
    if shop is not None:
        front.shop(6, width - 7, ground + 4, height - 1, shop, sign)
    else:
        entrance = int(rng.integers(bays))
        for i, centre in enumerate(centres):
            if i == entrance:
                colour_door = theme.doors[int(rng.integers(len(theme.doors)))]
                front.door(
                    round(centre - 0.55 * px),
                    height - round(2.5 * px),
                    round(centre + 0.55 * px),
                    height - 1,
                    colour_door,
                )
            elif theme.window in ("ribbon", "grid"):
                x0, x1 = round(centre - window_m * px / 2), round(centre + window_m * px / 2)
                front.glass(x0, ground + 12, x1, height - 14, lit=0.6)
                front.frame(x0, ground + 12, x1, height - 14, (2, 1))
            else:
                x0, x1 = round(centre - window_m * px / 2), round(centre + window_m * px / 2)
                front.window(x0, height - round(2.45 * px), x1, height - round(0.9 * px), theme.window)
        if theme.material in ("stucco", "stone"):
            plinth = shade(colour, 0.62)
            draw.rectangle([0, height - 9, width, height], fill=plinth)
    if roof in ("flat", "pitched"):
        depth = 11 if roof == "flat" else 6
        draw.rectangle([0, top, width, top + depth], fill=shade(trim, 0.98))
        draw.line([(0, top + depth + 1), (width, top + depth + 1)], fill=(58, 54, 50), width=3)
        if theme.material in ("stone", "brick") and roof == "flat":
            for x in range(2, width, 8):
                draw.rectangle([x, top + depth - 4, x + 3, top + depth], fill=shade(trim, 0.7))
    if roof in ("gable", "stepped"):
        x, y = width // 2, top - round(0.1 * px)
        front.window(x - 10, y - 22, x + 10, y, "sash")
        for edge in range(5):
            points = [(0, top - edge), (width // 2, -edge), (width, top - edge)]
            if roof == "gable":
                draw.line([(px, py + 4) for px, py in points], fill=shade(trim, 0.9 - 0.08 * edge))
    if rng.random() < 0.7:
        pipe = 2 if rng.random() < 0.5 else width - 5
        draw.rectangle([pipe, top, pipe + 2, height], fill=shade(colour, 0.55))
    if theme.material in ("brick", "stone") and rng.random() < 0.16:
        _ivy(front, width, height)
    return front.pixels()


def _beams(front: _Facade, top: int, height: int, width: int, floor: float, floors: int) -> None:
    draw, beam = front.draw, front.trim
    for level in range(1, floors + 1):
        y = round(height - level * floor)
        draw.rectangle([0, y - 5, width, y], fill=beam)
        for x in range(0, width, 23):
            draw.rectangle([x, y, x + 3, min(height - 1, round(y + floor))], fill=beam)
        if level > 1:
            for x in (2, width - 26):
                draw.line([(x, y + floor - 4), (x + 22, y + 4)], fill=beam, width=4)
    draw.line([(0, top), (width // 2, 0), (width, top)], fill=beam, width=8)
    draw.line([(width // 2, 0), (width // 2, top)], fill=beam, width=4)
    draw.rectangle([width - 4, top, width, height], fill=beam)


def _ivy(front: _Facade, width: int, height: int) -> None:
    rng = front.rng
    start, spread = rng.uniform(0, width), width * rng.uniform(0.15, 0.35)
    for _ in range(520):
        climb = rng.random() ** 1.4
        x = start + rng.normal() * spread * (1 - 0.6 * climb)
        y = height - climb * height * 0.72
        leaf = shade((64, 98, 46), rng.uniform(0.6, 1.3))
        front.draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=leaf)
        front.glow_draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=0)


def plain_wall(rng: np.random.Generator, windows: bool) -> Texture:
    """A grey side or back wall to be tinted, ``uint8 [320, 320, 4]``, 16 m on a side and repeating."""
    surface = wall_surface(rng, 320, 320, "brick", (205, 205, 205))
    wall = _Facade(rng, surface * 1.0, (170, 170, 168))
    if windows:
        for y in range(34, 320, 62):
            for x in range(24, 320, 53):
                if rng.random() < 0.7:
                    wall.window(x, y - 18, x + 18, y + 12, "sash")
    return wall.pixels()


def roof_tiles(rng: np.random.Generator, colour: Colour) -> Texture:
    """Rows of tiles, ``uint8 [160, 320, 4]``, repeating."""
    surface = _masonry(rng, 160, 320, colour, 5, 5, 0.6, 0.1)
    surface *= 0.85 + 0.25 * fractal_noise(rng, 320, 1.4)[:160, :, None]
    return np.dstack([np.clip(surface, 0, 255).astype(np.uint8), np.zeros((160, 320), np.uint8)])


def tree(rng: np.random.Generator, kind: str, leaf: Colour) -> Texture:
    """A tree cut out of its background, ``uint8 [256, 192, 4]``; ``kind`` is round, poplar, conifer or bare."""
    canvas = Image.new("RGBA", (192, 256))
    draw = ImageDraw.Draw(canvas)
    bark = shade((84, 66, 52), rng.uniform(0.7, 1.1))
    if kind == "bare":
        _branch(draw, rng, 96, 255, -math.pi / 2 + rng.normal() * 0.05, 62, 9, bark, 7)
        return np.asarray(canvas)
    draw.polygon([(90, 255), (103, 255), (99, 120), (93, 120)], fill=(*bark, 255))
    draw.polygon([(90, 255), (94, 255), (95, 120), (93, 120)], fill=(*shade(bark, 1.35), 255))
    for _ in range(7):
        angle = rng.uniform(-2.5, -0.6)
        draw.line([(96, 170), (96 + 70 * math.cos(angle), 150 + 70 * math.sin(angle))], fill=(*bark, 255), width=4)
    lumps = [(rng.uniform(-1, 1), rng.uniform(-1, 1), rng.uniform(0.6, 1)) for _ in range(14)]
    leaves = []
    for _ in range(2600):
        if kind == "conifer":
            depth = rng.random() ** 0.7
            x = 96 + rng.uniform(-1, 1) * (6 + 66 * depth) * (0.75 + 0.25 * math.cos(depth * 40))
            y = 12 + 214 * depth
        elif kind == "poplar":
            angle, radius = rng.uniform(0, 2 * math.pi), math.sqrt(rng.random())
            x, y = (
                96 + 40 * radius * math.cos(angle) * (1 - 0.3 * math.sin(angle)),
                112 + 106 * radius * math.sin(angle),
            )
        else:
            lx, ly, size = lumps[int(rng.integers(len(lumps)))]
            angle, radius = rng.uniform(0, 2 * math.pi), math.sqrt(rng.random())
            x = 96 + 54 * lx * (1 - 0.3 * abs(ly)) + 34 * size * radius * math.cos(angle)
            y = 96 + 58 * ly + 31 * size * radius * math.sin(angle)
        leaves.append((y + rng.normal() * 30, float(x), float(y)))
    for _, x, y in sorted(leaves, reverse=True):
        light = 1.2 - 0.0038 * (y - 20) - 0.0018 * (x - 96) + 0.17 * rng.normal()
        size = rng.uniform(1.6, 4.6)
        draw.ellipse([x - size, y - size * 0.75, x + size, y + size * 0.75], fill=(*shade(leaf, max(0.3, light)), 255))
    return np.asarray(canvas)


def _branch(
    draw: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    x: float,
    y: float,
    angle: float,
    length: float,
    width: float,
    colour: Colour,
    depth: int,
) -> None:
    end_x, end_y = x + length * math.cos(angle), y + length * math.sin(angle)
    draw.line([(x, y), (end_x, end_y)], fill=(*shade(colour, rng.uniform(0.8, 1.1)), 255), width=max(1, round(width)))
    if depth:
        for turn in (-1, 1) if depth < 5 or rng.random() < 0.6 else (-1, 0.1, 1):
            _branch(
                draw,
                rng,
                end_x,
                end_y,
                angle + turn * rng.uniform(0.25, 0.6),
                length * rng.uniform(0.66, 0.86),
                width * 0.68,
                colour,
                depth - 1,
            )


def lamp(style: int) -> Texture:
    """A street lamp, ``uint8 [256, 64, 4]``; the lantern is at the top."""
    canvas = Image.new("RGBA", (64, 256))
    draw = ImageDraw.Draw(canvas)
    iron = ((44, 50, 48, 255), (70, 74, 80, 255), (30, 58, 50, 255))[style % 3]
    draw.rectangle([30, 40, 34, 255], fill=iron)
    draw.rectangle([27, 215, 37, 255], fill=iron)
    if style % 3 == 1:
        draw.line([(32, 40), (44, 12), (58, 10)], fill=iron, width=4)
        draw.rectangle([42, 8, 62, 14], fill=(220, 220, 208, 255))
        draw.rectangle([42, 5, 63, 9], fill=iron)
    else:
        draw.polygon([(22, 12), (42, 12), (38, 42), (26, 42)], fill=(236, 228, 196, 255), outline=iron)
        draw.polygon([(18, 12), (46, 12), (32, 0)], fill=iron)
        draw.line([(32, 12), (32, 42)], fill=iron, width=2)
        draw.rectangle([20, 60, 44, 63], fill=iron)
    return np.asarray(canvas)


def _cloth(rng: np.random.Generator) -> Colour:
    grey, (red, green, blue) = rng.uniform(40, 150), rng.uniform(-34, 34, 3)
    return int(grey + red), int(grey + green), int(grey + blue)


def person(rng: np.random.Generator) -> Texture:
    """Somebody on the pavement, ``uint8 [128, 48, 4]``, 1.8 m high."""
    canvas = Image.new("RGBA", (48, 128))
    draw = ImageDraw.Draw(canvas)
    coat, legs = (_cloth(rng) for _ in range(2))
    skin = ((236, 200, 170), (198, 150, 116), (130, 88, 64))[int(rng.integers(3))]
    stride = int(rng.integers(2, 9))
    for side in (-1, 1):
        x = 24 + side * stride
        draw.polygon(
            [(20, 70), (28, 70), (x + 4, 124), (x - 3, 124)], fill=(*shade(legs, 0.7 if side < 0 else 0.85), 255)
        )
        draw.ellipse([x - 4, 120, x + 6, 127], fill=(30, 28, 28, 255))
        draw.line([(24 + side * 8, 30), (24 + side * (9 + stride // 2), 66)], fill=(*shade(coat, 0.8), 255), width=6)
    draw.rounded_rectangle([14, 24, 34, 78], 7, fill=(*coat, 255))
    draw.rounded_rectangle([14, 24, 21, 78], 6, fill=(*shade(coat, 1.25), 255))
    draw.ellipse([17, 3, 31, 22], fill=(*skin, 255))
    draw.pieslice([16, 1, 32, 20], 180, 360, fill=(*shade((90, 60, 40), rng.uniform(0.3, 1.8)), 255))
    return np.asarray(canvas)
