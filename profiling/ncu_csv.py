"""Reads what ``ncu --csv --page raw`` prints.

Before the table, and between its rows where output was not kept apart, stand lines of the tool (``==PROF== ...``) and
of the program. The table has a row of names, a row of units, and a row a kernel; a metric that took several passes is
one column all the same. Numbers have thousands separators.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

from tetra.profiling.events import MAX_INTEGER, Activity, Profile, ReadError

_TIME = "gpu__time_duration.sum"
_TRAFFIC = ("dram__bytes_read.sum", "dram__bytes_write.sum")
_PUSHED = "thread Domain:Push/Pop_Range"
_NANOSECONDS = {"s": 1e9, "m": 1e6, "u": 1e3, "n": 1.0}  # by the first letter: "ns", "usecond", "second"
_MAX_VALUE = 1e290  # sums of larger ones may be no numbers
_BYTES = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def is_one(text: str) -> bool:
    """Whether a text has the lines that ncu prints."""
    return re.search(r'^("ID",|==[A-Z]+== )', text, re.MULTILINE) is not None


def parse(path: Path, text: str) -> Profile:
    """
    Raises:
        ReadError: no table, or one of another page.
    """
    lines = [line.rstrip("\r") for line in text.split("\n")]
    said = [line for line in lines if re.match(r"==[A-Z]+== ", line)]
    problems = [re.sub(r"^==ERROR== ", "", line) for line in said if line.startswith("==ERROR==")]
    first = next((number for number, line in enumerate(lines) if line.startswith('"ID",')), None)
    if first is None:
        reason = f"ncu said: {problems[-1]}" if problems else "did it find a kernel? (--kernel, --range)"
        raise ReadError(f"{path}: ncu printed no table; {reason}")
    names = _row(lines[first])
    if "Metric Name" in names:
        raise ReadError(f"{path}: is another page of ncu's; write it with --csv --page raw")
    if "Kernel Name" not in names or len(set(names)) != len(names):
        raise ReadError(f"{path}: the table has no column 'Kernel Name', or one name twice; write it with --page raw")
    units: dict[str, str] = {}
    activities: list[Activity] = []
    n_strange = 0
    for line in lines[first + 1 :]:
        if not line.strip() or not line.startswith('"') or line == lines[first]:
            continue  # of the tool or the program
        cells = _row(line)
        if len(cells) != len(names):
            n_strange += 1
            continue
        row = dict(zip(names, cells, strict=True))
        if not row["ID"]:
            units = row
        else:
            activities.append(_activity(row, units))
    if not activities:
        raise ReadError(f"{path}: the table has no kernels{': ' + problems[-1] if problems else ''}")
    notices = [f"ncu said: {problem}" for problem in problems[:3]]
    if n_strange:
        notices.append(f"{n_strange} rows of the table were cut short and left out")
    if _TIME not in names:
        notices.append(f"no {_TIME} in the file: all times are 0; add it to the metrics")
    device = next((row for row in _column(lines, first, names, "device__attribute_display_name") if row), None)
    return Profile(path, "ncu", device, activities, [], notices)


def _row(line: str) -> list[str]:
    try:
        return next(csv.reader([line]), [])
    except csv.Error:  # such as a field of more than 128 KiB
        return []


def _column(lines: list[str], first: int, names: list[str], name: str) -> list[str]:
    if name not in names:
        return []
    rows = [_row(line) for line in lines[first + 1 :] if line.startswith('"')]
    return [row[names.index(name)] for row in rows if len(row) == len(names) and row[0]]


def _value(text: str) -> float | None:
    try:
        value = float(text.replace(",", ""))
    except ValueError:  # "no data", a name, nothing
        return None
    return value if abs(value) < _MAX_VALUE else None  # so neither is NaN


def _activity(row: dict[str, str], units: dict[str, str]) -> Activity:
    metrics = {}
    for name, text in row.items():
        value = _value(text) if "__" in name and not name.startswith("device__") else None
        if value is not None:
            metrics[name] = value
    time = metrics.get(_TIME, 0.0) * _NANOSECONDS.get(units.get(_TIME, "ns")[:1], 1.0)
    traffic = [metrics[name] * _scale(units.get(name, "")) for name in _TRAFFIC if name in metrics]
    pushed = next((text for name, text in row.items() if name.startswith(_PUSHED)), "")
    n_bytes = _whole(sum(traffic)) if traffic else None
    return Activity(row["Kernel Name"], "kernel", 0, _whole(time), ranges_of(pushed), n_bytes, metrics)


def _whole(value: float) -> int:
    return round(min(max(value, 0.0), MAX_INTEGER))


def _scale(unit: str) -> float:
    match = re.fullmatch(r"([KMGT]?)i?byte", unit)
    return _BYTES[match[1]] if match else 1.0


def ranges_of(text: str) -> tuple[str, ...]:
    """The names in a cell such as ``4979  "tetra:describe:none:..." "tetra:blocks.0:none:..."``.

    Each entry is domain, range and six more fields, between colons; a name may have colons itself.
    """
    found = []
    for entry in re.findall(r'"([^"]*)"', text):
        name = entry.partition(":")[2].rsplit(":", 6)[0]
        if name:
            found.append(name)
    return tuple(found)
