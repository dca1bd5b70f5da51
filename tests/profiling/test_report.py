"""The kernel report, as a library and as the command that scripts call."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from tetra.autotune.hardware import CHIPS, product_of
from tetra.kernels.ahead_of_time import all_specimens, kernel_names
from tetra.profiling.report import kernel_report, report_row
from tetra.profiling.sass import KINDS

ARCH = 80
SMALLEST = min(kernel_names(), key=lambda name: len(all_specimens(ARCH, name)))  # quickest to compile


def check_row(row: dict[str, Any]) -> None:
    chip = CHIPS[int(row["arch"].removeprefix("sm_"))]
    assert isinstance(row["config"], dict)
    assert 0 < row["registers"] <= 255
    assert row["spills"] == row["stack_bytes"] == 0
    assert 0 <= row["shared_bytes"] <= row["shared_bytes_limit"] == chip.shared_per_block
    assert row["ctas_per_sm"] == chip.blocks_resident(row["registers"], row["shared_bytes"], row["num_warps"])
    loop = row["loop"]
    assert {"mma", "alu", "all", "sts", "popc", "local", "prmt", "i2f", "mma_shape"} <= loop.keys()
    assert sum(loop[kind] for kind in KINDS) == loop["all"] <= row["instructions"]
    assert (loop["mma"] > 0) == bool(row["tensor_core"])
    predicted = row["predicted"]
    assert predicted["measured"] is False
    assert predicted["on"] == product_of(chip.arch).name
    assert predicted["busy_share"][row["limiting_unit"]] == 1
    assert all(0 <= share <= 1 for share in predicted["busy_share"].values())
    share = predicted["tensor_core_share"]
    assert (share is None) == (loop["mma_shape"] is None)
    assert share is None or 0 < share <= 1


def test_the_command_writes_what_scripts_read(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    args = ["kernels", "report", "--arch", f"sm_{ARCH}", "--kernel", SMALLEST, "--json", str(file)]
    command = [sys.executable, "-m", "tetra.cli", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    specimens = all_specimens(ARCH, SMALLEST)
    assert [row["config"] for row in rows] == [specimen.config for specimen in specimens]
    for row in rows:
        assert (row["kernel"], row["arch"]) == (SMALLEST, f"sm_{ARCH}")
        check_row(row)
        assert row == report_row(specimens[rows.index(row)], ARCH)
    assert "nothing was measured" in done.stdout
    assert done.stdout.count(SMALLEST) == len(rows)
    assert done.stderr == ""


@pytest.mark.parametrize("arch", [80, 90])
def test_a_product_is_described_by_its_loop(arch: int) -> None:
    specimen = all_specimens(arch, "ternary_matmul")[0]
    row = report_row(specimen, arch)
    check_row(row)
    assert row["has_loop"]
    assert row["loop"]["mma_shape"] == ([16, 8, 32] if arch == 80 else [64, 128, 32])
    assert all(name.startswith("IMMA" if arch == 80 else "IGMMA") for name in row["tensor_core"])


def test_progress_counts_to_the_end_and_architectures_are_taken_once() -> None:
    seen: list[tuple[int, int, str]] = []
    rows = kernel_report([ARCH, ARCH], SMALLEST, lambda *args: seen.append(args))
    assert len(rows) == len(all_specimens(ARCH, SMALLEST))
    assert seen[-1][:2] == (len(rows), len(rows))
    assert [done for done, _, _ in seen] == list(range(len(rows) + 1))
