"""One HTML file that tells what a run did: numbers, tables, charts and pictures, all inside the file.

:class:`Report` collects blocks and renders them; the functions below it draw the charts. The file needs no network
and no scripts, and follows the reader's light or dark setting. Charts are SVG on a transparent ground with colours
that read on both.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tetra.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tetra.demo.plan import Town

INK, FAINT, GRID = "#7d8794", "#9aa3ae", "#8a94a040"
BLUE, GREEN, RED, AMBER, VIOLET, TEAL = "#3f7fd6", "#2a9d5c", "#d9483b", "#d9902f", "#8662c7", "#1f9aa5"
SERIES = (BLUE, AMBER, GREEN, VIOLET, RED, TEAL)

_STYLE = """
:root { color-scheme: light dark; --ground: #f6f5f2; --paper: #ffffff; --ink: #1d2329; --soft: #5c6670;
  --line: #e2e0da;
  --accent: #2f6fc4; --good: #1d8a4e; --bad: #c9382b; --shadow: 0 1px 2px rgb(30 30 40 / 6%), 0 6px 24px
  rgb(30 30 40 / 5%); }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --paper: #1c2127; --ink: #e6e9ec; --soft:
  #9aa5b0;
  --line: #2d343c; --accent: #79aef2; --good: #4cc582; --bad: #f0776b; --shadow: none; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); line-height: 1.55; font-size: 16px;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header.hero { position: relative; min-height: 21rem; display: flex; align-items: flex-end; background-size:
  cover;
  background-position: center 55%; color: #fff; }
header.hero > div { width: 100%; padding: 7rem max(1.5rem, calc((100vw - 68rem) / 2)) 2.2rem;
  background: linear-gradient(transparent, rgb(10 14 20 / 82%)); }
h1 { font-size: clamp(1.9rem, 4.5vw, 3rem); line-height: 1.15; margin: 0 0 .5rem; letter-spacing: -.02em;
  font-weight: 700; }
header.hero p { margin: 0; max-width: 46rem; font-size: 1.08rem; opacity: .94; }
main { max-width: 71rem; margin: 0 auto; padding: 1.5rem 1.5rem 4rem; }
section { margin-top: 3.2rem; }
h2 { font-size: 1.5rem; letter-spacing: -.01em; margin: 0 0 .4rem; }
h2 .number { color: var(--accent); font-variant-numeric: tabular-nums; margin-right: .55rem; font-weight:
  600; }
p.lead { color: var(--soft); max-width: 46rem; margin: 0 0 1.2rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: 1rem; margin-top:
  1.8rem; }
.card, figure, .table { background: var(--paper); border: 1px solid var(--line); border-radius: 12px;
  box-shadow: var(--shadow); }
.card { padding: 1rem 1.1rem; }
.card .label { color: var(--soft); font-size: .84rem; }
.card .value { font-size: 1.6rem; white-space: nowrap; font-weight: 650; letter-spacing: -.02em; line-height: 1.25;
  font-variant-numeric: tabular-nums; }
.card .note { color: var(--soft); font-size: .84rem; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1rem;
  margin-top: 1rem;
  align-items: start; }
figure { margin: 1rem 0 0; padding: 1rem; overflow: hidden; }
.row > figure, .row > .table { margin-top: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 6px; }
figure.photo { padding: 0; } figure.photo img { border-radius: 0; } figure.photo figcaption { padding:
  .45rem .75rem .6rem; margin: 0; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .7rem; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .8rem;
  margin-top: 1rem; }
.gallery figure { margin: 0; }
.gallery.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
.table { overflow-x: auto; margin-top: 1rem; padding: .4rem 1rem .6rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
caption { text-align: left; color: var(--soft); font-size: .88rem; padding: .5rem 0 .3rem; }
th, td { text-align: right; padding: .42rem .45rem; border-top: 1px solid var(--line); white-space: nowrap; }
thead th { color: var(--soft); font-weight: 550; border-top: 0; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.total td { font-weight: 650; }
td.good { color: var(--good); } td.bad { color: var(--bad); }
footer { margin-top: 4rem; color: var(--soft); font-size: .88rem; border-top: 1px solid var(--line);
  padding-top: 1rem; }
@media print { .card, figure, .table { box-shadow: none; break-inside: avoid; } }
"""


def data_uri(data: bytes | str) -> str:
    """PNG, JPEG or SVG (a string) as a URI that holds the picture itself."""
    if isinstance(data, str):
        return "data:image/svg+xml;base64," + base64.b64encode(data.encode()).decode()
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True)
class Picture:
    """Bytes of a PNG or JPEG, or the text of an SVG, with what it shows (for a caption and for screen readers)."""

    data: bytes | str
    caption: str
    is_photo: bool = False

    def to_html(self) -> str:
        """A figure with a caption."""
        photo = ' class="photo"' if self.is_photo else ""
        text, uri = html.escape(self.caption), data_uri(self.data)
        return f'<figure{photo}><img src="{uri}" alt="{text}" loading="lazy"><figcaption>{text}</figcaption></figure>'


@dataclass(frozen=True)
class Table:
    """Rows of text; ``good`` and ``bad`` name the (row, column) cells to colour, ``totals`` the rows to stress."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    good: frozenset[tuple[int, int]] = frozenset()
    bad: frozenset[tuple[int, int]] = frozenset()
    totals: frozenset[int] = frozenset()

    def to_html(self) -> str:
        """A table in a box that scrolls where the window is narrow."""
        head = "".join(f"<th>{html.escape(c)}</th>" for c in self.columns)
        body = []
        for i, row in enumerate(self.rows):
            cells = []
            for j, cell in enumerate(row):
                mark = "good" if (i, j) in self.good else "bad" if (i, j) in self.bad else ""
                cells.append(f"<td{f' class={mark!r}' if mark else ''}>{html.escape(cell)}</td>")
            body.append(f"<tr{' class=total' if i in self.totals else ''}>{''.join(cells)}</tr>")
        caption = f"<caption>{html.escape(self.caption)}</caption>" if self.caption else ""
        thead, tbody = f"<thead><tr>{head}</tr></thead>", f"<tbody>{''.join(body)}</tbody>"
        return f'<div class="table"><table>{caption}{thead}{tbody}</table></div>'


Block = Picture | Table


class Report:
    """Collects the parts of the page in order; :meth:`write` renders them into one file.

    Args:
        title: heading of the page.
        subtitle: a sentence or two below it.
        hero: picture behind the heading.
    """

    def __init__(self, title: str, subtitle: str, hero: bytes) -> None:
        self.title, self.subtitle, self.hero = title, subtitle, hero
        self._parts: list[str] = []
        self._sections = 0

    def cards(self, cards: Sequence[tuple[str, str, str]]) -> None:
        """Figures to be seen first: (label, value, note) each."""
        inner = "".join(
            f'<div class="card"><div class="label">{html.escape(label)}</div>'
            f'<div class="value">{html.escape(value)}</div>'
            f'<div class="note">{html.escape(note)}</div></div>'
            for label, value, note in cards
        )
        self._parts.append(f'<div class="cards">{inner}</div>')

    def section(self, title: str, lead: str, *rows: Block | Sequence[Block]) -> None:
        """A numbered section; blocks given in one sequence stand side by side where there is room."""
        self._sections += 1
        blocks = []
        for row in rows:
            if isinstance(row, (Picture, Table)):
                blocks.append(row.to_html())
            else:
                blocks.append(f'<div class="row">{"".join(b.to_html() for b in row)}</div>')
        self._parts.append(
            f'<section><h2><span class="number">{self._sections}</span>{html.escape(title)}</h2>'
            f'<p class="lead">{html.escape(lead)}</p>{"".join(blocks)}</section>'
        )

    def gallery(self, pictures: Sequence[Picture], *, wide: bool = False) -> None:
        """Many pictures as tiles, at the end of the last section."""
        inner = "".join(p.to_html() for p in pictures)
        self._parts.append(f'<div class="gallery{" wide" if wide else ""}">{inner}</div>')

    def to_html(self, footer: str = "") -> str:
        """The whole page."""
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head><body>"
            f'<header class="hero" style="background-image:url({data_uri(self.hero)})"><div>'
            f"<h1>{html.escape(self.title)}</h1>"
            f"<p>{html.escape(self.subtitle)}</p></div></header><main>{''.join(self._parts)}"
            f"<footer>{html.escape(footer)}</footer></main></body></html>\n"
        )

    def write(self, path: str | Path, footer: str = "") -> Path:
        """Write the page, whole or not at all.

        Raises :class:`~tetra.errors.TetraError` if ``path`` cannot be written.
        """
        with atomic_write(path) as file:
            file.write(self.to_html(footer).encode())
        return Path(path)


# --- charts -------------------------------------------------------------------------------------------------


def jpeg(image: np.ndarray[Any, np.dtype[np.uint8]], quality: int = 86) -> bytes:
    """An RGB image [H, W, 3] as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    _dress(axes)
    return figure, axes


def _dress(axes: Axes) -> None:
    axes.patch.set_alpha(0)
    axes.tick_params(colors=INK, labelsize=9, length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)


def _svg(figure: Figure) -> str:
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "tetra", "svg.fonttype": "path"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, color=INK, fontsize=9.5)
    axes.set_ylabel(y, color=INK, fontsize=9.5)


def _legend(axes: Axes, **options: Any) -> None:
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, **options)


def line_chart(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    x_label: str,
    y_label: str,
    *,
    twin: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    twin_label: str = "",
    markers: bool = False,
    y_from_zero: bool = False,
    split_at: float | None = None,
) -> str:
    """Named (x, y) curves as SVG; ``twin`` curves are dashed and have their own scale on the right.

    ``split_at`` draws a rule where one stage ends and the next begins.
    """
    figure, axes = _figure(5.6, 3.1)
    for (name, (x, y)), colour in zip(series.items(), SERIES, strict=False):
        axes.plot(x, y, color=colour, linewidth=2, label=name, marker="o" if markers else None, markersize=4.5)
    if y_from_zero:
        axes.set_ylim(bottom=0)
    _label(axes, x_label, y_label)
    handles, labels = axes.get_legend_handles_labels()
    if twin:
        right = axes.twinx()
        _dress(right)
        right.grid(False)
        for (name, (x, y)), colour in zip(twin.items(), SERIES[len(series) :], strict=False):
            right.plot(x, y, color=colour, linewidth=1.8, linestyle=(0, (4, 2)), label=name)
        right.set_ylabel(twin_label, color=INK, fontsize=9.5)
        more = right.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    if split_at is not None:
        axes.axvline(split_at, color=FAINT, linewidth=1)
    _legend(axes, handles=handles, labels=labels, loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=len(labels))
    return _svg(figure)


def bar_chart(
    groups: Sequence[str], series: Mapping[str, Sequence[float]], y_label: str, *, top: float | None = None
) -> str:
    """Bars side by side for each group, with their values, as SVG."""
    figure, axes = _figure(max(5.6, 0.85 * len(groups) + 1.2), 3.1)
    axes.grid(axis="x", visible=False)
    width = 0.8 / len(series)
    for i, ((name, values), colour) in enumerate(zip(series.items(), SERIES, strict=False)):
        x = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        bars = axes.bar(x, values, width * 0.92, color=colour, label=name)
        axes.bar_label(bars, [f"{v:.0f}" for v in values], color=INK, fontsize=7.5, padding=1.5)
    axes.set_xticks(range(len(groups)), groups)
    if top is not None:
        axes.set_ylim(0, top)
    _label(axes, "", y_label)
    if len(series) > 1:
        _legend(axes, loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=len(series))
    return _svg(figure)


def stacked_bars(groups: Sequence[str], parts: Mapping[str, Sequence[float]], x_label: str, unit: str) -> str:
    """One lying bar a group, made of named parts, with its sum at the end, as SVG."""
    figure, axes = _figure(5.6, 0.62 * len(groups) + 1.15)
    axes.grid(axis="y", visible=False)
    left = np.zeros(len(groups))
    for (name, values), colour in zip(parts.items(), SERIES, strict=False):
        axes.barh(groups, values, 0.62, left=left, color=colour, label=name)
        left += np.asarray(values)
    for i, total in enumerate(left):
        axes.text(total + 0.012 * left.max(), i, f"{total:,.2f} {unit}", va="center", color=INK, fontsize=9)
    axes.set_xlim(0, left.max() * 1.2)
    axes.invert_yaxis()
    _label(axes, x_label, "")
    _legend(axes, loc="upper center", bbox_to_anchor=(0.45, 1.26), ncols=len(parts))
    return _svg(figure)


@dataclass(frozen=True)
class Localised:
    """One query on the map: where it was taken and where the model puts it, local metres."""

    truth: tuple[float, float]
    answer: tuple[float, float]
    is_right: bool


def town_map(town: Town, database: Sequence[tuple[float, float]], queries: Sequence[Localised]) -> bytes:
    """The district from above with the map's positions and every query's true and found position, as PNG.

    Green: found within the radius that counts as right. Red: elsewhere, with a line from truth to answer.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 8.4), dpi=110)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(_aerial(town), extent=(0, town.extent_m, 0, town.extent_m), interpolation="bilinear")
    x, y = zip(*database, strict=True)
    axes.plot(
        x, y, "o", color="#ffffff", markersize=4.2, markeredgecolor="#20262c", markeredgewidth=0.7, label="map image"
    )
    for found, colour, name in ((True, "#27d07a", "localised"), (False, "#ff4b3a", "wrong place")):
        mine = [q for q in queries if q.is_right == found]
        for q in mine:
            axes.plot(*zip(q.truth, q.answer, strict=True), color=colour, linewidth=1.6, alpha=0.9)
        if mine:
            axes.plot(
                [q.truth[0] for q in mine],
                [q.truth[1] for q in mine],
                "o",
                color=colour,
                markersize=7.5,
                markeredgecolor="#10161c",
                markeredgewidth=1,
                label=f"query, {name} ({len(mine)})",
            )
            axes.plot(
                [q.answer[0] for q in mine],
                [q.answer[1] for q in mine],
                "x",
                color=colour,
                markersize=6,
                markeredgewidth=2,
            )
    edge = 0.09 * town.extent_m
    axes.set(xlim=(edge, town.extent_m - edge), ylim=(edge, town.extent_m - edge))
    axes.set_axis_off()
    bar = town.extent_m - edge - 12
    axes.plot([bar - 50, bar], [edge + 8] * 2, color="white", linewidth=4, solid_capstyle="butt")
    axes.text(bar - 25, edge + 11, "50 m", color="white", ha="center", va="bottom", fontsize=11)
    legend = axes.legend(
        loc="upper left", fontsize=10, facecolor="#12181f", labelcolor="white", framealpha=0.78, edgecolor="none"
    )
    legend.set_zorder(9)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    # A photo-like picture: JPEG is a fifth of the size.
    return jpeg(np.asarray(Image.open(buffer).convert("RGB")), 84)


def _aerial(town: Town) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The painted ground with roofs and tree crowns shaded by their height, north up."""
    ground = town.ground[2][..., :3]
    size = (ground.shape[0], ground.shape[0])
    houses, heights = (
        np.asarray(Image.fromarray(h).resize(size, Image.Resampling.NEAREST))
        for h in (town.house_heights, town.heights)
    )
    slope = np.clip((heights - np.roll(heights, (1, -1), (0, 1))) * 0.02, -0.2, 0.2)
    light = (0.72 + 0.02 * np.clip(heights, 0, 16) + slope)[..., None]
    picture = np.where((houses > 0)[..., None], np.array([204, 176, 158]) * light, ground)
    picture = np.where((heights > houses)[..., None], np.array([96, 128, 76]) * light, picture)
    return np.clip(picture[::-1], 0, 255).astype(np.uint8)
