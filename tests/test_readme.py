"""What the README tells people to type, typed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tetra.demo.town import write_town_dataset

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^    \.venv/bin/tetra (.+)$", README, re.MULTILINE)
SLOW = ("bench", "kernels", "tune measure")
PYTHON = re.findall(r"^```python\n(.+?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A current directory as `make demo` leaves it, with fewer streets."""
    folder = tmp_path_factory.mktemp("readme")
    data = write_town_dataset(folder / "demo-report" / "town", size=(64, 64), max_streets=2, workers=1)
    for name, shot in zip(("here.jpg", "there.jpg"), data.database, strict=False):
        (folder / name).write_bytes(shot.path.read_bytes())
    return folder


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    # A tool that is missing is said so, after the command line that was asked for.
    assert done.returncode == 0 or ("--dry-run" in command and "nsight" in done.stderr.lower()), done.stderr
    return done.stdout


def test_the_readme_has_examples() -> None:
    assert {command.split()[0] for command in COMMANDS} == {
        *("info", "evaluate", "match", "map", "localize", "bench", "kernels", "tune", "profile"),
    }
    assert len(PYTHON) == 3


@pytest.mark.parametrize(
    "command",
    [pytest.param(c, marks=pytest.mark.slow) if c.startswith(SLOW) else c for c in COMMANDS],
)
def test_commands_run_as_written(command: str, folder: Path) -> None:
    arguments = shlex.split(command)
    out = run([sys.executable, "-m", "tetra.cli", *arguments], folder)
    assert out.strip()
    if "--json" in arguments:
        assert json.loads((folder / arguments[arguments.index("--json") + 1]).read_text())


def test_python_runs_as_written(folder: Path) -> None:
    """One block after the other, as a reader would type them. The engine may choose bfloat16, which flips few bits."""
    code = "\n".join(
        [
            *PYTHON,
            "from tetra.kernels import unpack_bits",
            "n = model.n_bits",
            "assert (unpack_bits(codes, n) != unpack_bits(model.describe(images[:1]), n)).float().mean() < 0.02",
        ]
    )
    run([sys.executable, "-c", code], folder)


def test_python_gives_what_its_comments_say(folder: Path) -> None:
    code = PYTHON[0]
    checks = "assert codes.shape == (2, model.n_bits // 8) and floats.shape == (2, model.n_bits)\nassert rows == 0"
    run([sys.executable, "-c", f"{code}\n{checks}"], folder)


def test_it_names_only_what_exists() -> None:
    texts = README + (ROOT / "CONTRIBUTING.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"\bmake ([\w-]+)", " ".join(re.findall(r"`make [^`]+`|^    make .+$", texts, re.M)))):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for extra in ",".join(re.findall(r"pip install \"\.\[([\w,]+)\]", README)).split(","):
        assert extra in extras
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
