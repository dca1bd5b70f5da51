"""One HTML file that shows data in a browser, and asks no host for anything.

A policy in the page (Content-Security-Policy) forbids the browser to load anything, so that this is not a matter of
trust. Data are JSON that can stand in a script; the script writes texts by ``textContent``, never as HTML.
"""

from __future__ import annotations

import html
import json
from collections.abc import Sequence

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; script-src \
'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{notes}
<div id="controls"></div>
<div id="page"></div>
<div id="tip" hidden></div>
<script>"use strict";
const DATA = {data};
{script}
</script>
</body>
</html>
"""

_STYLE = """
body { font: 14px system-ui, sans-serif; color: #1a1a1a; margin: 24px; max-width: 1200px; }
h1 { font-size: 19px; } h2 { font-size: 15px; margin: 18px 0 4px; } p { color: #555; margin: 4px 0; }
svg { width: 100%; background: #fff; border: 1px solid #ddd; touch-action: none; }
svg text { font: 12px system-ui, sans-serif; fill: #444; }
#controls { margin: 12px 0; display: flex; flex-wrap: wrap; gap: 4px 14px; align-items: center; }
#tip { position: fixed; pointer-events: none; background: #fffffff2; border: 1px solid #888; border-radius: 4px;
  padding: 6px 9px; white-space: pre-line; max-width: 480px; box-shadow: 0 2px 8px #0003; }
table { border-collapse: collapse; } td, th { padding: 2px 12px 2px 0; text-align: left; }
td.number { text-align: right; }
"""

# What the scripts of all pages share.
_SCRIPT = """
const SVG = "http://www.w3.org/2000/svg";
function make(parent, name, attributes, text) {
  const element = ["svg", "g", "path", "line", "circle", "rect", "text", "polyline", "polygon", "clipPath", "defs"]
    .includes(name) ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.appendChild(element);
  return element;
}
const tip = document.getElementById("tip");
function showTip(element, text) {
  element.addEventListener("pointermove", event => {
    tip.textContent = typeof text === "function" ? text(event) : text;
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
  });
  element.addEventListener("pointerleave", () => { tip.hidden = true; });
}
function digits(value) {
  if (value === null) return "";
  const size = Math.abs(value);
  return size && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : Number(value.toPrecision(4)).toString();
}
const COLOURS = ["#1f6f8b", "#d1495b", "#66a182", "#8d6a9f", "#edae49", "#30638e", "#7a5c3e", "#5f7a1f", "#c05299",
  "#2a9d8f", "#9a6324", "#4363d8", "#808000", "#e6194b", "#00798c"];
"""


def script_json(value: object) -> str:
    """JSON that can stand in a script: nothing in it can end the script or begin a comment.

    ValueError for NaN and infinity.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))  # in ASCII, so without U+2028
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page(title: str, notes: Sequence[str], data: object, script: str, style: str = "") -> str:
    """The whole page.

    Args:
        notes: paragraphs below the title.
        data: JSON values, ``DATA`` in the script.
        script: draws into the elements ``controls`` and ``page``.
    """
    text = _PAGE.format(
        title=html.escape(title),
        style=_STYLE + style,
        notes="\n".join(f"<p>{html.escape(note)}</p>" for note in notes),
        data=script_json(data),
        script=_SCRIPT + script,
    )
    return text.encode(errors="backslashreplace").decode()  # names of others may have halves of surrogate pairs
