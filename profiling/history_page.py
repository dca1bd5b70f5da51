"""The performance diary as a page: a chart a setting, a line a variant, a point a run with its confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tetra.profiling.page import page

_SCRIPT = """
const chosen = { device: "", command: "" };
for (const key of ["device", "command"]) {
  const label = make(document.getElementById("controls"), "label", {}, key + " ");
  const select = make(label, "select", { id: key });
  make(select, "option", { value: "" }, "all");
  for (const value of [...new Set(DATA.points.map(p => p[key]))].sort()) make(select, "option", { value }, value);
  select.addEventListener("change", () => { chosen[key] = select.value; draw(); });
}
const label = make(document.getElementById("controls"), "label");
const others = make(label, "input", { type: "checkbox", checked: "" });
make(label, "span", {}, " other libraries");
others.addEventListener("change", draw);

function chart(parent, points) {
  const runs = [...new Set(points.map(p => p.run))], variants = [...new Set(points.map(p => p.variant))];
  const W = 1100, H = 260, L = 70, R = 16, T = 12, B = 34;
  const values = points.flatMap(p => [p.median_ms, p.low, p.high]).filter(v => v !== null && v > 0);
  let low = Math.log10(Math.min(...values)), high = Math.log10(Math.max(...values));
  const pad = Math.max(0.05 * (high - low), 0.02);
  low -= pad; high += pad;
  const x = run => L + (W - L - R) * (runs.indexOf(run) + 0.5) / runs.length;
  const y = v => T + (H - T - B) * (1 - (Math.log10(v) - low) / (high - low));
  const svg = make(parent, "svg", { viewBox: `0 0 ${W} ${H}`, role: "img" });
  for (let i = 0; i <= 4; i++) {
    const v = 10 ** (low + (high - low) * i / 4);
    make(svg, "line", { x1: L, x2: W - R, y1: y(v), y2: y(v), stroke: "#eee" });
    make(svg, "text", { x: L - 6, y: y(v) + 4, "text-anchor": "end" }, digits(v) + " ms");
  }
  const first = points.find(p => p.run === runs[0]), last = points.find(p => p.run === runs[runs.length - 1]);
  make(svg, "text", { x: L, y: H - 10 }, first.time);
  if (runs.length > 1) make(svg, "text", { x: W - R, y: H - 10, "text-anchor": "end" }, last.time);
  const legend = make(parent, "p");
  variants.forEach((variant, i) => {
    const colour = COLOURS[i % COLOURS.length], mine = points.filter(p => p.variant === variant);
    make(legend, "span", { style: `color:${colour};margin-right:14px` }, "\\u25cf " + variant);
    const line = mine.map(p => `${x(p.run)},${y(p.median_ms)}`).join(" ");
    make(svg, "polyline", { points: line, fill: "none", stroke: colour, "stroke-width": mine[0].own ? 2 : 1 });
    for (const p of mine) {
      if (p.low !== null)
        make(svg, "line", { x1: x(p.run), x2: x(p.run), y1: y(p.low), y2: y(p.high), stroke: colour, "stroke-width": 3,
          "stroke-opacity": 0.4 });
      const dot = make(svg, "circle", { cx: x(p.run), cy: y(p.median_ms), r: 4, fill: colour });
      const interval = p.low === null ? "too few samples for an interval" : `${digits(p.low)} to ${digits(p.high)} ms`;
      showTip(dot, `${p.variant}\\n${digits(p.median_ms)} ms, ${interval}\\nrun ${p.run}, ${p.time}\\n` +
        `${p.command}\\n${p.device}, ${p.threads} threads\\ncommit ${p.commit || "unknown"}`);
    }
  });
}
function draw() {
  const root = document.getElementById("page");
  root.replaceChildren();
  const shown = DATA.points.filter(p => (!chosen.device || p.device === chosen.device) &&
    (!chosen.command || p.command === chosen.command) && (others.checked || p.own));
  const groups = new Map();
  for (const p of shown) {
    const key = [p.setting, p.device, p.threads + " threads"].join(" \\u2014 ");
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(p);
  }
  for (const [key, points] of groups) { make(root, "h2", {}, key); chart(root, points); }
  if (!groups.size) make(root, "p", {}, "nothing fits");
}
draw();
"""


def history_html(points: Sequence[dict[str, Any]], confidence: float) -> str:
    """The page.

    Args:
        points: what ``tetra.diary.history`` gives, oldest first.
        confidence: of the intervals.
    """
    n_runs = len({point["run"] for point in points})
    notes = [
        f"{n_runs} runs. Medians; the bars are {confidence:.0%} intervals of them. Only runs of one device, and of one "
        "number of threads, share a chart.",
    ]
    return page("Performance diary", notes, {"points": list(points)}, _SCRIPT)
