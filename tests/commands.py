"""Running the command line in tests, and pictures to give it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tetra import cli


@dataclass
class Result:
    status: int
    out: str
    err: str


class Runner:
    """Runs a command in this process, which has torch loaded already."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *args: object) -> Result:
        self.monkeypatch.setattr(sys, "argv", ["tetra", *map(str, args)])
        self.monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        out, err = self.capsys.readouterr()
        return Result(code if isinstance(code, int) else int(code is not None), out, err)


def photo(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((40, 30), Image.Resampling.BICUBIC).save(path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def assert_refused(result: Result, *words: object) -> None:
    """Bad input: status 2 and one line on stderr that says what is wrong."""
    assert result.status == 2
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    for word in words:
        assert str(word) in result.err
