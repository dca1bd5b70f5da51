"""Shipped tuning results: which configuration a kernel uses for a chip and a shape.

``<kernel>.json`` beside this file holds ``{"sm_80": {"<key>": [row of the kernel's config table], ...},
...}``. The kernel's file defines the keys and the meaning of a row. A miss gives the first row of the
kernel's table, so that a first call never stalls on tuning.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

Config = tuple[int, ...]

_FOLDER = Path(__file__).parent


@cache
def _results(kernel: str) -> dict[str, dict[str, list[int]]]:
    file = _FOLDER / f"{kernel}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def lookup(kernel: str, arch: int, key: str, configs: tuple[Config, ...]) -> Config:
    """The configuration of ``kernel`` for compute capability ``arch`` (80 means sm_80) and ``key``;
    ``configs[0]`` on a miss.

    A shipped row that is not in ``configs`` (the kernel's table has changed since) counts as a miss.
    """
    row = tuple(_results(kernel).get(f"sm_{arch}", {}).get(key, ()))
    return row if row in configs else configs[0]
