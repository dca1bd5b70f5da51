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
_TEXT, _FAINT_TEXT = "#1a1a1a", "#6b6b6b"
_RIGHT, _WRONG, _UNKNOWN, _QUERY = "#1a9850", "#d73027", "#9a9a9a", "#2b5c8a"

# Sizes in pixels.
_TILE = 224  # an image is scaled to fit into a square of this side
_BORDER = 6
_GAP = 14
_TITLE_HEIGHT, _CAPTION_HEIGHT = 28, 42


@dataclass(frozen=True)
class Match:
    """A reference shown beside a query."""

    path: Path
    caption: str
    """such as its distance"""
    is_right: bool | None
    """green border if true, red if false, grey if nobody knows"""


def save_match_picture(path: str | Path, query: Path, matches: Sequence[Match]) -> None:
    """Draw ``query`` and, right of it, its matches in the order given, and write the PNG file ``path``.

    A border is green for a right match, red for a wrong one, grey where that is not known, blue for the
    query. Captions and file names stand below.

    Raises :class:`~tetra.errors.ImageError` for an image that cannot be read and
    :class:`~tetra.errors.TetraError` if ``path`` cannot be written.
    """
    tiles = [("Query", _QUERY, query, "")]
    for rank, match in enumerate(matches, start=1):
        colour = {True: _RIGHT, False: _WRONG, None: _UNKNOWN}[match.is_right]
        verdict = {True: " right", False: " wrong", None: ""}[match.is_right]  # not by colour alone
        tiles.append((f"{rank}{verdict}", colour, match.path, match.caption))
    images = [_scaled(path) for _, _, path, _ in tiles]

    step, row_height = _TILE + 2 * _BORDER + _GAP, max(image.height for image in images) + 2 * _BORDER
    size = (_GAP + step * len(tiles), _TITLE_HEIGHT + row_height + _CAPTION_HEIGHT + _GAP)
    canvas = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, (image, (title, colour, file_path, caption)) in enumerate(zip(images, tiles, strict=True)):
        centre = _GAP + number * step + (_TILE + 2 * _BORDER) // 2
        x, y = centre - image.width // 2, _TITLE_HEIGHT + (row_height - image.height) // 2
        outer = (x - _BORDER, y - _BORDER, x + image.width + _BORDER - 1, y + image.height + _BORDER - 1)
        draw.rectangle(outer, fill=colour)
        canvas.paste(image, (x, y))
        draw.text((centre, _TITLE_HEIGHT - 8), title, fill=colour, font=_font(16), anchor="ms")
        lines = [(caption, _TEXT)] * bool(caption) + [(file_path.name, _FAINT_TEXT)]
        for line, (text, fill) in enumerate(lines):
            text = _shorten(text, _TILE + 2 * _BORDER, _font(13))
            below = _TITLE_HEIGHT + row_height + 18 * (line + 1)
            draw.text((centre, below), text, fill=fill, font=_font(13), anchor="ms")
    with atomic_write(path) as file:
        canvas.save(file, format="PNG")


def _scaled(path: Path) -> Image.Image:
    """The image in the file, its longer side _TILE pixels."""
    image = Image.fromarray(load_image(path).permute(1, 2, 0).numpy())
    scale = _TILE / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _shorten(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut the middle out of ``text`` until it is at most ``width`` pixels wide."""
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
    axes.step([0.0, *recall], [precision[0], *precision], where="pre", color=_QUERY, linewidth=2)
    axes.fill_between([0.0, *recall], [precision[0], *precision], step="pre", color=_QUERY, alpha=0.12)
    full = 100 * curve.recall_at_full_precision
    if full > 0:
        axes.plot([full], [100], "o", color=_RIGHT, clip_on=False, zorder=3)
    axes.plot([recall[-1]], [precision[-1]], "o", color=_QUERY, clip_on=False, zorder=3)
    facts = [
        f"area {curve.auc:.3f}",
        f"recall at 100% precision {full:.1f}%",
        f"R@1 {recall[-1]:.1f}%",
    ]
    axes.text(0.03, 0.05, "\n".join(facts), transform=axes.transAxes, va="bottom", color=_TEXT, linespacing=1.5)
    axes.set(xlim=(0, 101), ylim=(0, 103), xlabel="recall (%)", ylabel="precision (%)")
    axes.set_title(title, loc="left", color=_TEXT)
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as file:
        canvas.print_png(file)
