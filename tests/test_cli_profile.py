"""``tetra profile`` as scripts see it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from commands import Runner, assert_refused, photo, read_json
from nsys_files import two_blocks

from tetra.profiling import ranges
from tetra.profiling.events import Row, table
from tetra.profiling.readers import read

DATA = Path(__file__).parent / "profiling" / "data"
TETRA = Path(sys.executable).with_name("tetra")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is first on the PATH, for tools; without it there are none."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.defpath}")
    return folder


def tool(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(
        f"#!{sys.executable}\nimport os, pathlib, shutil, subprocess, sys\narguments = sys.argv[1:]\n{body}"
    )
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


# An nsys that runs the command, and "exports" a database that is there.
NSYS = """
if arguments[0] == "profile":
    program = arguments[1:]
    while program[0].startswith("-"): program.pop(0)
    output = next(a[9:] for a in arguments if a.startswith("--output="))
    pathlib.Path(output).write_text(os.environ.get("TETRA_NVTX_CAPTURE", "all"))
    sys.exit(subprocess.run(program).returncode)
output = next(a[9:] for a in arguments if a.startswith("--output="))
shutil.copy(DATABASE, output)
"""


def test_nsys_from_the_command_to_the_report(tetra: Runner, path: Path, tmp_path: Path) -> None:
    tool(path, "nsys", NSYS.replace("DATABASE", repr(str(two_blocks(tmp_path / "given.sqlite")))))
    code = f"import os, pathlib; pathlib.Path({str(tmp_path / 'seen')!r}).write_text(os.environ['TETRA_NVTX'])"
    command = ("--", sys.executable, "-c", code)
    result = tetra("profile", "nsys", "-o", tmp_path / "run", "--range", "describe", "--skip", 2, *command)
    assert (result.status, (tmp_path / "seen").read_text()) == (0, "1")
    assert f"tetra profile read {tmp_path / 'run.sqlite'}" in result.err
    assert (tmp_path / "run.nsys-rep").read_text() == "describe:2:1"
    result = tetra("profile", "read", tmp_path / "run.sqlite", "--json", tmp_path / "report.json")
    assert result.status == 0
    assert "NVIDIA H200" in result.out
    report = read_json(tmp_path / "report.json")
    assert (report["tool"], report["by"], report["total_ns"]) == ("nsys", "range", 1050)
    assert [(row["name"], row["time_ns"]) for row in report["rows"]] == [
        ("describe", 1050),
        ("blocks.0", 500),
        ("blocks.1", 500),
    ]


def test_the_status_of_the_command(tetra: Runner, path: Path, tmp_path: Path) -> None:
    tool(path, "nsys", NSYS.replace("DATABASE", repr(str(two_blocks(tmp_path / "given.sqlite")))))
    result = tetra("profile", "nsys", "-o", tmp_path / "run", "--", sys.executable, "-c", "import sys; sys.exit(7)")
    assert result.status == 7
    assert "ended with status 7" in result.err
    assert (tmp_path / "run.sqlite").exists()
    tool(path, "nsys", "os.kill(os.getpid(), 15)")
    result = tetra("profile", "nsys", "-o", tmp_path / "run", "--", "true")
    assert result.status == 128 + 15
    tool(path, "nsys", "")
    result = tetra("profile", "nsys", "-o", tmp_path / "other", "--", "true")
    assert_refused(result, "nothing was recorded", "--range")


@pytest.mark.skipif(shutil.which("nsys") is None, reason="needs Nsight Systems (nsys)")
def test_the_real_nsys_where_there_is_one(tmp_path: Path) -> None:
    """The ranges alone, which need no GPU."""
    pytest.importorskip("nvtx")
    for i in range(3):
        photo(tmp_path / f"images/{i}.png", i)
    command = [TETRA, "match", "nano", tmp_path / "images", tmp_path / "images", "--device", "cpu"]
    subprocess.run([TETRA, "profile", "nsys", "-o", tmp_path / "run", "--", *command], check=True)
    found = rows(tmp_path / "run.sqlite")
    assert {"load model", "describe", "stem", "blocks.0", "mlp.up", "head", "search"} <= set(found)
    sizes = sum(path.stat().st_size for path in (tmp_path / "images").iterdir())
    assert (found["read image"].calls, found["read image"].input_bytes) == (6, 2 * sizes)
    assert found["describe"].input_bytes == 2 * 3 * 3 * 224 * 224
    assert 0 < (found["blocks.0"].wall_ns or 0) < (found["describe"].wall_ns or 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("heeds", [True, False])
def test_what_is_profiled_ends_with_the_command(tmp_path: Path, number: signal.Signals, heeds: bool) -> None:
    """As a batch system ends a job: by a signal to this process alone."""
    pid, done = tmp_path / "pid", tmp_path / "done"
    ending = f"signal.signal({int(number)}, lambda *_: (pathlib.Path({str(done)!r}).touch(), sys.exit(0)))"
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, pathlib, signal, sys, time\n{ending if heeds else ''}\n"
        f"pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\ntime.sleep(60)"
    )
    default = partial(signal.signal, number, signal.SIG_DFL)  # a test may run where it is ignored
    trace = tmp_path / "t.json"
    with subprocess.Popen(
        [sys.executable, "-m", "tetra.cli", "profile", "torch", "-o", trace, "--", sys.executable, script],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default,
    ) as process:
        while not (pid.exists() and pid.read_text()):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert f"was ended by signal {int(number)}" in said
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert done.exists() == heeds
    assert trace.exists() == heeds  # a program that ends by itself leaves its trace


def test_paths_are_quoted_for_a_shell(tetra: Runner, path: Path, tmp_path: Path) -> None:
    tool(path, "nsys", NSYS.replace("DATABASE", repr(str(two_blocks(tmp_path / "given.sqlite")))))
    result = tetra("profile", "nsys", "-o", tmp_path / "my run2", "--", "true")
    assert f"tetra profile read '{tmp_path}/my run2.sqlite'\n" in result.err


def test_ncu_without_permission(tetra: Runner, path: Path, tmp_path: Path) -> None:
    tool(path, "ncu", "print('==ERROR== ERR_NVGPUCTRPERM - no permission', file=sys.stderr); sys.exit(1)")
    result = tetra("profile", "ncu", "-o", tmp_path / "run", "--", "true")
    assert result.status == 2
    last = result.err.splitlines()[-1]
    assert last.startswith("error: ")
    for words in ("NVreg_RestrictProfilingToAdminUsers=0", "CAP_SYS_ADMIN", "as root"):
        assert words in last


@pytest.mark.parametrize(("name", "words"), [("nsys", "Nsight Systems"), ("ncu", "Nsight Compute")])
def test_missing_tools_leave_the_command_and_advice(tetra: Runner, path: Path, name: str, words: str) -> None:
    result = tetra("profile", name, "--", "tetra", "info", "nano")
    assert_refused(result, name, words, "install")
    assert result.out.startswith(f"TETRA_NVTX=1 {name} ")
    assert result.out.splitlines()[0].endswith(" tetra info nano")
    dry = tetra("profile", name, "--dry-run", "--", "tetra", "info", "nano")
    assert (dry.status, dry.out, dry.err) == (0, result.out, "")


def test_a_program_that_is_not_there(tetra: Runner, path: Path, tmp_path: Path) -> None:
    trace = tmp_path / "t.json"
    assert_refused(tetra("profile", "torch", "-o", trace, "--", tmp_path / "python3", "a.py"), "python3")
    assert_refused(tetra("profile", "torch", "-o", trace, "--", "nowhere-at-all"), "no such program")
    assert_refused(tetra("profile", "torch", "-o", trace), "after --")
    assert_refused(tetra("profile", "torch", "-o", tmp_path / "t.txt", "--", "a.py"), ".json")
    assert_refused(tetra("profile", "torch", "--skip", 3, "--", "a.py"), "--range")


def rows(path: Path) -> dict[str, Row]:
    return {row.name: row for row in table(read(path), "range")}


def test_torch_traces_a_tetra_command(tmp_path: Path, model_file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The installed command, from one process to the next."""
    for i in range(4):
        photo(tmp_path / f"photos/{i}.png", i)
    trace = tmp_path / "trace.json.gz"
    match = [TETRA, "match", model_file, tmp_path / "photos", tmp_path / "photos", "--k", "1", "--batch-size", "2"]
    command = [
        TETRA,
        "profile",
        "torch",
        "-o",
        trace,
        "--range",
        "describe",
        "--skip",
        "1",
        "--count",
        "2",
        "--",
        *match,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "0.png" in done.stdout
    found = rows(trace)
    assert found["describe"].calls == 2  # of four
    assert {"stem", "blocks.0", "blocks.1", "mlp.up", "head"} <= set(found)
    assert "load model" not in found  # before the part that was recorded
    assert found["describe"].input_bytes == 2 * (2 * 3 * 32 * 32)
    shapes = {span.shape for span in read(trace).spans if span.name == "describe"}
    assert shapes == {(2, 3, 32, 32)}


SCRIPT = """
import sys, torch, helper
assert sys.argv[1:] == ["--x", "1"] and __name__ == "__main__", sys.argv
torch.ones(64) + 1
from tetra.profiling import ranges
with ranges.span("mine"):
    torch.ones(64) * 2
sys.exit(3)
"""


def test_torch_traces_a_script_and_keeps_its_status(tetra: Runner, tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("")  # beside the script, where Python finds it
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = tetra("profile", "torch", "-o", tmp_path / "t.json", "--", sys.executable, "-u", script, "--x", 1)
    assert result.status == 3, result.err
    found = rows(tmp_path / "t.json")
    assert found["mine"].time_ns > 0
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    script.write_text("raise SystemError('broken')")
    result = tetra("profile", "torch", "-o", tmp_path / "u.json", "--range", "nothing", "--", script)
    assert result.status == 1
    assert "status 1" in result.err
    assert not (tmp_path / "u.json").exists()  # since no such range came
    assert sorted(p.name for p in tmp_path.glob(".*")) == []


CODE = """
import atexit, pathlib, pickle, sys
class A: pass
assert isinstance(pickle.loads(pickle.dumps(A())), A)
assert (__name__, sys.modules[__name__].A, A.__module__) == ("__main__", A, "__main__")
assert __name__ in sys.modules and vars(sys.modules[__name__]) is globals()
class B:
    x: 1 + 1
assert B.__annotations__ == {"x": 2}  # nobody else's __future__
def late():
    pathlib.Path(sys.argv[1]).write_bytes(pickle.dumps(A()))
"""


def test_torch_runs_what_python_would(tetra: Runner, tmp_path: Path) -> None:
    """In a module of its own that is ``__main__``, by every spelling."""
    package, script, late = tmp_path / "package", tmp_path / "script", tmp_path / "late"
    package.mkdir()
    (package / "__main__.py").write_text(CODE)
    script.write_text(f"{CODE}assert __file__ == {str(script)!r}\natexit.register(late)\n")
    trace = ("profile", "torch", "-o", tmp_path / "t.json", "--", sys.executable)
    for command, is_late in ((("-uc", f"{CODE}atexit.register(late)"), True), ((script,), True), ((package,), False)):
        late.unlink(missing_ok=True)
        assert tetra(*trace, *command, late).status == 0
        assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
        assert late.exists() == is_late
    (tmp_path / "in.json").write_text("[1]")
    assert tetra(*trace, "-umjson.tool", tmp_path / "in.json", tmp_path / "out.json").status == 0
    assert read_json(tmp_path / "out.json") == [1]


def test_a_python_without_this_package(tetra: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "a b" / "python3"
    other.parent.mkdir()
    other.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')  # without what is installed
    other.chmod(0o755)
    result = tetra("profile", "torch", "-o", tmp_path / "t.json", "--", other, "-c", "1")
    assert result.status == 2
    last = result.err.splitlines()[-1]
    assert last == f"error: '{other}': this Python has no tetra, a part of which records the trace there; run: " + (
        f"'{other}' -m pip install tetra-vpr"
    )
    result = tetra("profile", "torch", "-o", tmp_path / "t.json", "--", sys.executable, "-c", "import os; os._exit(3)")
    assert result.status == 3  # it has, and the program left no trace


def test_torch_traces_programs_that_move_and_fork(
    tetra: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, torch\nos.chdir('elsewhere')\nchild = os.fork()\nif not child: sys.exit(5)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5\ntorch.arange(3).cumsum(0)\n"
    )
    result = tetra("profile", "torch", "-o", "t.json", "--", sys.executable, script)
    assert result.status == 0, result.err
    names = {row.name for row in table(read(tmp_path / "t.json"), "kernel")}
    assert "aten::cumsum" in names  # of the parent, after the child had ended
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_names_are_shown_as_they_are(tetra: Runner, tmp_path: Path) -> None:
    name = "[/x] f[bold]"
    kernel = {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7, "ts": 1, "dur": 2}
    span = {**kernel, "cat": "user_annotation", "ts": 0, "dur": 9}
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": [kernel, span]}))
    for command in (("read", tmp_path / "t.json"), ("diff", tmp_path / "t.json", tmp_path / "t.json")):
        for by in ("range", "kernel"):
            result = tetra("profile", *command, "--by", by)
            assert result.status == 0, result.err
            assert name in result.out


ODD = "a\x1b[31mRED\x07 \ud800"
"""As a trace may have it, which a terminal would obey and no encoding has."""


def test_names_that_are_no_text_are_shown_escaped(tetra: Runner, tmp_path: Path) -> None:
    kernel = {"ph": "X", "cat": "kernel", "name": ODD, "pid": 0, "tid": 7, "ts": 1, "dur": 2}
    span = {**kernel, "cat": "user_annotation", "ts": 0, "dur": 9}
    given = tmp_path / "t.json"
    given.write_text(json.dumps({"traceEvents": [kernel, span], "deviceProperties": [{"name": ODD}]}))
    other = tmp_path / "u.json"
    other.write_text(json.dumps({"traceEvents": [kernel, span]}))
    for command in (("read", given), ("diff", given, other)):
        for by in ("range", "kernel"):
            result = tetra("profile", *command, "--by", by, "--json", tmp_path / "out.json")
            assert result.status == 0, result.err
            assert "a\\x1b[31mRED" in result.out
            assert "\\ud800" in result.out
            assert "\x1b" not in result.out + result.err
            found = read_json(tmp_path / "out.json")
            assert ODD in {row["name"] for row in found["rows" if "read" in command else "movers"]}


@pytest.mark.parametrize("settings", [{"LC_ALL": "C.UTF-8"}, {"LC_ALL": "C"}, {"PYTHONIOENCODING": "utf-8:strict"}])
def test_half_pairs_under_every_locale(tmp_path: Path, settings: dict[str, str]) -> None:
    kernel = {"ph": "X", "cat": "kernel", "name": ODD, "pid": 0, "tid": 7, "ts": 1, "dur": 2}
    (tmp_path / "t.json").write_text(json.dumps([kernel]))
    command = [sys.executable, "-m", "tetra.cli", "profile", "read", tmp_path / "t.json", "--by", "kernel"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert b"\\ud800" in done.stdout


def test_reading_what_the_tools_wrote(tetra: Runner) -> None:
    result = tetra("profile", "read", DATA / "trace.json.gz", "--by", "kernel", "--top", 3)
    assert result.status == 0
    assert "NVIDIA H200, 160 launches" in result.out
    assert "fmha_cutlassF" in result.out
    assert "more; --top" in result.out
    result = tetra("profile", "read", DATA / "ncu_cut_off.csv", "--by", "kernel")
    assert result.status == 0
    for column in ("tensor %", "int8 %", "ALU %", "XU %", "conflicts", "L2 %", "DRAM %", "occupancy %", "registers"):
        assert column in result.out, column
    assert "Failed to profile" in result.err
    result = tetra("profile", "read", DATA / "ncu_basic.csv")
    assert "tetra.describe" in result.out


def test_files_without_ranges_say_so(tetra: Runner, tmp_path: Path) -> None:
    kernel = {"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": 1, "dur": 2}
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": [kernel]}))
    result = tetra("profile", "read", tmp_path / "t.json")
    assert result.status == 0
    assert "TETRA_NVTX=1" in result.err
    assert "(no range)" in result.out


def test_files_that_cannot_be_read(tetra: Runner, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("")
    (tmp_path / "text").write_bytes(b"\xff\xfehello")
    assert_refused(tetra("profile", "read", tmp_path / "empty"), "empty")
    assert_refused(tetra("profile", "read", tmp_path / "text"), "neither")
    assert_refused(tetra("profile", "read", tmp_path), "folder")
    assert_refused(tetra("profile", "read", tmp_path / "nowhere"), "No such file")
    assert_refused(tetra("profile", "diff", DATA / "trace.json.gz", tmp_path / "run.nsys-rep"), "nsys export")


def test_top_movers(tetra: Runner, tmp_path: Path) -> None:
    before = two_blocks(tmp_path / "a.sqlite")
    after = two_blocks(tmp_path / "b.sqlite", scale=3, extra=["new_kernel"])
    result = tetra("profile", "diff", before, after, "--json", tmp_path / "diff.json")
    assert (result.status, result.err) == (0, "")
    lines = [line for line in result.out.splitlines() if "_kernel" in line]
    assert [line.split()[1] for line in lines] == ["_ternary_matmul_kernel", "_row_quantize_kernel", "new_kernel"]
    assert "new" in lines[2]
    found = read_json(tmp_path / "diff.json")
    assert found["movers"][0]["ratio"] == 3.0
    assert sum(mover["change_ns"] for mover in found["movers"]) == found["total_after_ns"] - found["total_before_ns"]
    result = tetra("profile", "diff", before, DATA / "trace.json.gz", "--by", "range")
    assert "don't time alike" in result.err


def test_ranges_without_work_of_the_gpu_are_not_gone(tetra: Runner, tmp_path: Path) -> None:
    kernel = {"ph": "X", "cat": "kernel", "name": "k", "pid": 0, "tid": 7, "ts": 1, "dur": 2}
    files = []
    for name, ranges_here in (("a", ("load", "old")), ("b", ("load", "fresh"))):
        spans = [{**kernel, "cat": "user_annotation", "name": span, "ts": 50, "dur": 9} for span in ranges_here]
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps({"traceEvents": [kernel, *spans]}))
    result = tetra("profile", "diff", *files, "--by", "range", "--json", tmp_path / "diff.json")
    cells = [[cell.strip() for cell in line.split("│")] for line in result.out.splitlines() if "│" in line]
    ratios = {cell[1]: cell[5] for cell in cells}
    assert ratios == {"(no range)": "1.000", "load": "-", "old": "gone", "fresh": "new"}
    found = {mover["name"]: mover["found_in"] for mover in read_json(tmp_path / "diff.json")["movers"]}
    assert found == {"(no range)": "both", "load": "both", "old": "before", "fresh": "after"}


def test_what_ranges_cost(tetra: Runner, model_file: Path, tmp_path: Path) -> None:
    result = tetra("profile", "overhead", model_file, "--rounds", 3, "--device", "cpu", "--json", tmp_path / "o.json")
    assert result.status == 0, result.err
    assert not ranges.is_enabled()
    found = read_json(tmp_path / "o.json")
    assert found["rounds"] == 3
    assert all(found[f"{state}_ms"] > 0 for state in ("never", "again", "off", "on"))
    assert {"noise", "off_cost", "on_cost", "device_name"} <= set(found)
    ranges.enable()
    try:
        assert_refused(tetra("profile", "overhead", model_file, "--rounds", 3), "without TETRA_NVTX")
    finally:
        ranges.disable()


def test_the_variable_turns_ranges_on(tetra: Runner, model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        for value, is_on in (("0", False), ("", False), ("1", True)):
            monkeypatch.setenv(ranges.VARIABLE, value)
            assert tetra("info", model_file).status == 0
            assert ranges.is_enabled() == is_on
        ranges.disable()
        monkeypatch.setenv(ranges.CAPTURE_VARIABLE, "describe:a")
        assert_refused(tetra("info", model_file), "describe:a", "RANGE:SKIP:COUNT")
    finally:
        ranges.disable()
