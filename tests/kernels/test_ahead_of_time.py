"""Compiling for GPUs that need not be here: what is listed, what is refused, and the health of all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tetra.autotune.hardware import CHIPS
from tetra.kernels.ahead_of_time import (
    ARCHITECTURES,
    all_specimens,
    compile_for,
    disassemble,
    kernel_names,
    parse_arch,
)
from tetra.profiling.sass import report


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_specimens_are_listed_by_file_and_tell_themselves_apart(arch: int) -> None:
    found = all_specimens(arch)
    assert {specimen.name for specimen in found} == set(kernel_names())
    assert {"ternary_matmul", "row_quantize", "attention"} <= set(kernel_names())
    labels = [f"{specimen.name} {json.dumps(specimen.config, sort_keys=True)}" for specimen in found]
    assert len(set(labels)) == len(labels)
    for specimen in found:
        # The compiler has to be told every argument, as a type or as a value.
        assert set(specimen.kernel.arg_names) == {*specimen.signature, *specimen.constants}, specimen.config
        assert set(specimen.unaligned) <= set(specimen.signature)


def test_one_file_can_be_asked_for() -> None:
    assert {specimen.name for specimen in all_specimens(87, "row_quantize")} == {"row_quantize"}
    with pytest.raises(ValueError, match=r"kernel: 'no_such' is unknown; wanted one of .*row_quantize.*ternary_matmul"):
        all_specimens(87, "no_such")


def test_compiled_code_is_for_the_architecture_and_disassembly_is_kept() -> None:
    specimen = all_specimens(89, "row_quantize")[0]
    compiled = compile_for(specimen, 89)
    assert compiled.arch == 89
    assert compiled.cubin.startswith(b"\x7fELF")
    assert compiled.num_warps == specimen.options["num_warps"]
    first = disassemble(compiled)
    assert "sm_89" in first[0]
    assert "/* 0x" not in first[0]  # without the encoding
    assert disassemble(compiled) == first


@pytest.mark.parametrize("text", ["sm_87", "87", " SM_87 ", 87])
def test_architectures_can_be_written_in_two_ways(text: str | int) -> None:
    assert parse_arch(text) == 87


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sm_75", r"sm_75 is not supported .* no int8 tensor-core product"),
        ("70", "sm_70 is not supported"),
        ("sm_88", "sm_88 is unknown; wanted one of sm_80, sm_86, sm_87"),
        ("sm_8.0", "'sm_8.0' is not an architecture; wanted one of sm_80"),
        ("", "'' is not an architecture"),
        ("-80", "'-80' is not an architecture"),
    ],
)
def test_other_architectures_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arch(text)


def test_refusals_come_before_the_work() -> None:
    specimen = all_specimens(80, "row_quantize")[0]
    with pytest.raises(ValueError, match="sm_75 is not supported"):
        compile_for(specimen, 75)
    with pytest.raises(ValueError, match="sm_75 is not supported"):
        all_specimens(75)
    with pytest.raises(ValueError, match="sm_88 is unknown"):
        compile_for(specimen, 88)
    assert set(CHIPS) == set(ARCHITECTURES)


def fails(code: str, **environment: str) -> str:
    """Last line of stderr of a fresh process that must fail."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


COMPILE = "from tetra.kernels.ahead_of_time import *; compile_for(all_specimens(80, 'row_quantize')[0], 80)"


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("import sys; sys.modules['triton'] = None", "Triton is not installed; pip install triton"),
        ("import triton; triton.__version__ = '3.4.1'", "Triton 3.4.1 is too old; pip install"),
    ],
)
def test_a_missing_or_old_compiler_is_named(before: str, words: str) -> None:
    line = fails(f"{before}; {COMPILE}")
    assert line.startswith(f"RuntimeError: compiling kernels needs Triton 3.5 or newer: {words}")


def test_interpreted_kernels_are_refused() -> None:
    line = fails(COMPILE, TETRA_BACKEND="interpreter")
    assert line.startswith("RuntimeError: the kernels were imported for Triton's interpreter; unset TETRA_BACKEND")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_everything_that_ships_fits_the_chip(arch: int) -> None:
    for specimen in all_specimens(arch):
        found = report(compile_for(specimen, arch))
        where = f"{specimen.name} {specimen.config} sm_{arch}"
        assert found.spill_instructions == found.stack_bytes == 0, where
        assert found.shared_bytes <= CHIPS[arch].shared_per_block, where
        assert found.blocks_per_sm >= 1, where
