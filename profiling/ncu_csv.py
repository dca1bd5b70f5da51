"""Reads what ``ncu --csv --page raw`` prints.

Before the table, and between its rows where output was not kept apart, stand lines of the tool (``==PROF== ...``) and
of the program. The table has a row of names, a row of units, and a row a kernel; a metric that took several passes is
one column all the same. Numbers have thousands separators, and are written as the locale says: only those of English
are read, since 1.234 would be a thousand in German. A launch whose time can't be read is left out, not counted as 0.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path

from tetra.profiling.events import MAX_INTEGER, Activity, Profile, ReadError

_TIME = "gpu__time_duration.sum"
_TRAFFIC = ("dram__bytes_read.sum", "dram__bytes_write.sum")
_PUSHED = "thread Domain:Push/Pop_Range"
_MAX_VALUE = 1e290  # sums of larger ones may be no numbers

# Units as versions of ncu have written them; more letters are small here than there.
_NANOSECONDS = {
    name: factor
    for factor, names in {
        1.0: "ns nsec nsecond nseconds nanosecond nanoseconds",
        1e3: "us μs usec usecond useconds microsecond microseconds",
        1e6: "ms msec msecond mseconds millisecond milliseconds",
        1e9: "s sec second seconds",
        60e9: "min minute minutes",
        3600e9: "h hour hours",
    }.items()
    for name in names.split()
}
_PREFIXES = {
    f"{letter}{i}": base**power
    for power, letter in enumerate(("", "k", "m", "g", "t"))
    for i, base in (("", 1e3), ("i", 2.0**10))
}

_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)(\.\d*)?(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_GROUPS_OF_OTHERS = re.compile(r"[+-]?[1-9]\d{0,2}\.\d{3}", re.ASCII)  # ncu has two decimals, or six
_LIKE_A_NUMBER = re.compile(r"[+-]?\d[\d.,'\u2019\s]*")

_CUT_SHORT = "rows of the table were cut short and left out"
_NO_TIME = f"launches have no {_TIME} that can be read, and were left out"
_ODD_NUMBERS = "numbers are not written as in English, and were left out; let ncu write the table again with LC_ALL=C"


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
    left_out: Counter[str] = Counter()
    for line in lines[first + 1 :]:
        if not line.strip() or not line.startswith('"') or line == lines[first]:
            continue  # of the tool or the program
        cells = _row(line)
        if len(cells) != len(names):
            left_out[_CUT_SHORT] += 1
            continue
        row = dict(zip(names, cells, strict=True))
        if not row["ID"]:
            units = row
            continue
        activity = _activity(row, units, left_out)
        if activity is not None:
            activities.append(activity)
    notices = [f"{count} {what}" for what, count in left_out.items()]
    if not activities:
        raise ReadError(": ".join([f"{path}: the table has no kernels that can be read", *notices, *problems[-1:]]))
    notices[:0] = [f"ncu said: {problem}" for problem in problems[:3]]
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
    """None for "no data", a name, nothing; and for a number of another language, or that may be one."""
    text = text.strip()
    if not _NUMBER.fullmatch(text) or _GROUPS_OF_OTHERS.fullmatch(text):
        return None
    value = float(text.replace(",", ""))
    return value if abs(value) < _MAX_VALUE else None


def _activity(row: dict[str, str], units: dict[str, str], left_out: Counter[str]) -> Activity | None:
    """None without a time that can be read; what is left out is counted."""
    metrics = {}
    for name, text in row.items():
        if "__" not in name or name.startswith("device__"):
            continue
        value = _value(text)
        if value is not None:
            metrics[name] = value
        elif _LIKE_A_NUMBER.fullmatch(text):
            left_out[_ODD_NUMBERS] += 1
    time = 0.0
    if _TIME in row:
        unit = units.get(_TIME, "").strip()
        factor = _NANOSECONDS.get(unit.casefold())
        if _TIME in metrics and factor is None:
            left_out[f"launches were left out: {_TIME} is in '{unit}', which is no unit of time known here"] += 1
            return None
        time = metrics.get(_TIME, -1.0) * (factor or 1.0)
        if not 0 <= time <= MAX_INTEGER:
            left_out[_NO_TIME] += 1
            return None
    pushed = next((text for name, text in row.items() if name.startswith(_PUSHED)), "")
    n_bytes = _traffic(metrics, units, left_out)
    return Activity(row["Kernel Name"], "kernel", 0, round(time), ranges_of(pushed), n_bytes, metrics)


def _traffic(metrics: dict[str, float], units: dict[str, str], left_out: Counter[str]) -> int | None:
    """Bytes that were read and written, as far as they are known."""
    found = []
    for name in _TRAFFIC:
        if name in metrics:
            unit = units.get(name, "").strip()
            factor = _bytes_of(unit)
            if factor is None:
                left_out[f"numbers were left out: {name} is in '{unit}', which is no unit of bytes known here"] += 1
            else:
                found.append(metrics[name] * factor)
    return round(sum(found)) if found and 0 <= sum(found) <= MAX_INTEGER else None


def _bytes_of(unit: str) -> float | None:
    """Of "byte", "Kbyte" (1000) or "Kibyte" (1024), in any case; or "KB", "KiB", where a small b would be bits."""
    match = re.fullmatch(r"([kmgt]i?)?bytes?", unit, re.IGNORECASE) or re.fullmatch(r"([kKMGT]i?)?B", unit)
    return _PREFIXES[(match[1] or "").lower()] if match else None


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
