"""Pictures for the eye: a query beside its best matches, and the precision-recall curve.

Both are written as PNG, whole or not at all. Match pictures need Pillow only; the curve needs matplotlib, an
optional dependency, and draws on its own canvas: no window system, no global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from tetra.errors import TetraError
from tetra.files import atomic_write
from tetra.images import load_image

if TYPE_CHECKING:
    from tetra.evaluation import PrecisionRecall

_BACKGROUND = "#ffffff"
TEXT, FAINT_TEXT = "#1a1a1a", "#6b6b6b"
RIGHT, WRONG, UNKNOWN, QUERY = "#1a9850", "#d73027", "#9a9a9a", "#2b5c8a"

# Sizes in pixels.
TILE = 224
"""an image is scaled to fit into a square of this side"""
_BORDER = 6
_GAP = 14
_TITLE_HEIGHT, _LINE_HEIGHT = 28, 18
_MAX_TEXT = 120  # characters of a line that are looked at


@dataclass(frozen=True)
class Match:
    """A reference shown beside a query."""

    path: Path
    caption: str
    """such as its distance"""
    is_right: bool | None
    """green border if true, red if false, grey if nobody knows"""


@dataclass(frozen=True)
class Tile:
    """A picture with its title above and lines of text below, of which those after the first are fainter."""

    title: str
    colour: str
    """of title and border"""
    image: Image.Image
    lines: Sequence[str]


def draw_tiles(tiles: Sequence[Tile], n_lines: int) -> Image.Image:
    """The tiles side by side, with room for ``n_lines`` lines below; text that is too wide loses its middle."""
    images = [_scaled(tile.image) for tile in tiles]
    width, height = TILE + 2 * _BORDER, max(image.height for image in images) + 2 * _BORDER
    size = (_GAP + (width + _GAP) * len(tiles), _TITLE_HEIGHT + height + _LINE_HEIGHT * n_lines + _GAP)
    canvas = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, (image, tile) in enumerate(zip(images, tiles, strict=True)):
        centre = _GAP + number * (width + _GAP) + width // 2
        x, y = centre - image.width // 2, _TITLE_HEIGHT + (height - image.height) // 2
        outer = (x - _BORDER, y - _BORDER, x + image.width + _BORDER - 1, y + image.height + _BORDER - 1)
        draw.rectangle(outer, fill=tile.colour)
        canvas.paste(image, (x, y))
        draw.text((centre, _TITLE_HEIGHT - 8), tile.title, fill=tile.colour, font=font(16), anchor="ms")
        for line, text in enumerate(tile.lines):
            below = _TITLE_HEIGHT + height + _LINE_HEIGHT * (line + 1)
            fill = FAINT_TEXT if line else TEXT
            draw.text((centre, below), _shorten(text, width, font(13)), fill=fill, font=font(13), anchor="ms")
    return canvas


def save_match_picture(path: str | Path, query: Path, matches: Sequence[Match]) -> None:
    """Draw ``query`` and, right of it, its matches in the order given, and write the PNG file ``path``.

    A border is green for a right match, red for a wrong one, grey where that is not known, blue for the
    query. Captions and file names stand below.

    Raises :class:`~tetra.errors.ImageError` for an image that cannot be read and
    :class:`~tetra.errors.TetraError` if ``path`` cannot be written.
    """
    tiles = [Tile("Query", QUERY, _opened(query), ("", query.name))]
    for rank, match in enumerate(matches, start=1):
        colour = {True: RIGHT, False: WRONG, None: UNKNOWN}[match.is_right]
        verdict = {True: " right", False: " wrong", None: ""}[match.is_right]  # not by colour alone
        tiles.append(Tile(f"{rank}{verdict}", colour, _opened(match.path), (match.caption, match.path.name)))
    canvas = draw_tiles(tiles, 2)
    with atomic_write(path) as file:
        canvas.save(file, format="PNG")


def _opened(path: Path) -> Image.Image:
    return Image.fromarray(load_image(path).permute(1, 2, 0).contiguous().numpy())


def _scaled(image: Image.Image) -> Image.Image:
    """The image with its longer side TILE pixels."""
    scale = TILE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of all text in pictures."""
    return ImageFont.load_default(size)


def _shorten(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut the middle out of ``text``, made one line, until it is at most ``width`` pixels wide."""
    text = " ".join(text.split())
    if len(text) > _MAX_TEXT:  # a name of any length should not take any time
        text = f"{text[: _MAX_TEXT // 2]}...{text[-_MAX_TEXT // 2 :]}"
    kept = len(text)
    shortened = text
    while kept > 2 and font.getlength(shortened) > width:
        kept -= 1
        shortened = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
    return shortened


def require_matplotlib() -> None:
    """Raise :class:`~tetra.errors.TetraError` with the command to install matplotlib if it is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise TetraError(
            "the precision-recall picture needs matplotlib, which is not installed; "
            "run pip install 'tetra-vpr[pictures]' or ask for no pictures"
        ) from None


def save_precision_recall(path: str | Path, curve: PrecisionRecall, *, title: str = "") -> None:
    """Draw ``curve`` with its area and its recall at full precision, and write the PNG file ``path``.

    Raises :class:`~tetra.errors.TetraError` if ``path`` cannot be written or matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.5), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    recall, precision = [100 * value for value in curve.recall], [100 * value for value in curve.precision]
    # Steps that reach back from each point, as the area counts them.
    axes.step([0.0, *recall], [precision[0], *precision], where="pre", color=QUERY, linewidth=2)
    axes.fill_between([0.0, *recall], [precision[0], *precision], step="pre", color=QUERY, alpha=0.12)
    full = 100 * curve.recall_at_full_precision
    if full > 0:
        axes.plot([full], [100], "o", color=RIGHT, clip_on=False, zorder=3)
    axes.plot([recall[-1]], [precision[-1]], "o", color=QUERY, clip_on=False, zorder=3)
    facts = [
        f"area {curve.auc:.3f}",
        f"recall at 100% precision {full:.1f}%",
        f"R@1 {recall[-1]:.1f}%",
    ]
    axes.text(0.03, 0.05, "\n".join(facts), transform=axes.transAxes, va="bottom", color=TEXT, linespacing=1.5)
    axes.set(xlim=(0, 101), ylim=(0, 103), xlabel="recall (%)", ylabel="precision (%)")
    axes.set_title(title, loc="left", color=TEXT)
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as file:
        canvas.print_png(file)
