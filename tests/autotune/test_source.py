"""What counts as a change of a kernel, on files written by the test, and on those of the package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tetra.autotune import source
from tetra.autotune.source import hash_of, kernel_hash, toolchain, triton_version, without_comments
from tetra.kernels.tunable import all_tunables

KERNEL = '''"""A file."""

from tetra.kernels.backend import tl, triton
from tetra.kernels.parts import helper as aid, WIDTH, plain

BLOCK = 64  # rows
SCALE: float = 1e-5


@triton.jit
def _kernel(
    x_ptr,  # float [N]
    BLOCK: tl.constexpr,
):
    """What it does."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(x_ptr, aid(x, WIDTH) * SCALE)


def launch(x):
    return _kernel[(1,)](x, BLOCK)
'''
PARTS = """
from tetra.kernels.deeper import INNER

WIDTH = 8
OTHER = 3


@triton.jit
def helper(x, n):
    return x + n + INNER


@triton.jit
def unused(x):
    return x


def plain():
    pass
"""
DEEPER = "INNER = (1, 2)\nALONE = 5\n"
TEXTS = {"kernel": KERNEL, "parts": PARTS, "deeper": DEEPER}


def changed(file: str, old: str, new: str) -> bool:
    assert TEXTS[file].count(old) == 1
    return hash_of("kernel", {**TEXTS, file: TEXTS[file].replace(old, new)}) != hash_of("kernel", TEXTS)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("kernel", "tl.arange(0, BLOCK)", "tl.arange(0, BLOCK) << 1"),  # the code
        ("kernel", "BLOCK = 64", "BLOCK = 128"),  # a constant
        ("kernel", "1e-5", "1e-6"),
        ("kernel", "tl.constexpr", "tl.tensor"),
        ("kernel", "_kernel(\n", "_kernel(\n    y_ptr,\n"),
        ("parts", "x + n + INNER", "x - n + INNER"),  # of another file
        ("parts", "WIDTH = 8", "WIDTH = 9"),
        ("deeper", "INNER = (1, 2)", "INNER = (1, 3)"),  # and what that uses
    ],
)
def test_a_change_of_the_code_changes_the_hash(file: str, old: str, new: str) -> None:
    assert changed(file, old, new)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("kernel", "# rows", "# other rows"),
        ("kernel", '"""What it does."""', '"""What it really does."""'),
        ("kernel", '    """What it does."""\n', ""),
        ("kernel", "BLOCK = 64  # rows", "BLOCK = (\n    64\n)"),  # layout
        ("kernel", "SCALE: float = 1e-5", "SCALE: float = 0.00001"),  # the same number
        ("kernel", "return _kernel[(1,)](x, BLOCK)", "return None"),  # what launches it
        ("kernel", '"""A file."""', '"""Another text."""'),
        ("parts", "return x\n", "return -x\n"),  # a kernel that is not used
        ("parts", "OTHER = 3", "OTHER = 4"),
        ("deeper", "ALONE = 5", "ALONE = 6"),
    ],
)
def test_what_the_kernel_is_not_made_of_does_not(file: str, old: str, new: str) -> None:
    assert not changed(file, old, new)


def test_order_does_not_count() -> None:
    swapped = KERNEL.replace("BLOCK = 64  # rows\nSCALE: float = 1e-5\n", "SCALE: float = 1e-5\nBLOCK = 64\n")
    assert swapped != KERNEL
    assert hash_of("kernel", {**TEXTS, "kernel": swapped}) == hash_of("kernel", TEXTS)


@pytest.mark.parametrize("module", sorted({one.module for one in all_tunables().values()}))
def test_every_file_has_one(module: str) -> None:
    assert re.fullmatch("[0-9a-f]{16}", kernel_hash(module))


def test_files_differ_and_shared_code_counts() -> None:
    hashes = {kernel_hash(one.module) for one in all_tunables().values()}
    assert len(hashes) == len({one.module for one in all_tunables().values()})
    folder = Path(source.__file__).parent.parent / "kernels"
    texts = {path.stem: path.read_text() for path in folder.glob("*.py")}
    assert hash_of("row_quantize", texts) == kernel_hash("row_quantize")
    texts["rows"] = texts["rows"].replace("tl.sum(total) * (1.0 / K)", "tl.sum(total) / K")
    assert hash_of("row_quantize", texts) != kernel_hash("row_quantize")
    assert hash_of("ternary_matmul", texts) == kernel_hash("ternary_matmul")


def test_an_unknown_file() -> None:
    with pytest.raises(ValueError, match=r"there is no 'nothing' in tetra\.kernels; wanted one of .*ternary_matmul"):
        kernel_hash("nothing")


def test_comments_of_cpp_do_not_count() -> None:
    assert without_comments('int a; // x\n/* b */ char* s = "// no";\n') == 'int a; char* s = "// no";'
    assert without_comments("a /* x\n y */ b") == without_comments("a b")
    assert without_comments("a + b") != without_comments("a - b")


def test_toolchain_is_what_is_installed() -> None:
    triton = pytest.importorskip("triton")
    assert toolchain()["triton"] == triton_version() == triton.__version__
    assert re.fullmatch(r"\d+\.\d+(\.\d+)?", toolchain()["ptxas"] or "")


def test_hashing_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from tetra.autotune.source import kernel_hash, toolchain\n"
        "print(kernel_hash('ternary_matmul'), toolchain())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == kernel_hash("ternary_matmul")
    assert "{'triton': None, 'ptxas': None}" in done.stdout
