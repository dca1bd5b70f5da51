"""Command lines of the profilers, and running them: with stand-ins on the PATH that are real programs."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from pathlib import Path

import pytest

from tetra.profiling import nsight
from tetra.profiling.nsight import Window

OUT = Path("out")
COMMAND = ["tetra", "match", "a b"]


def test_nsys_records_all_or_a_part() -> None:
    whole = nsight.nsys(COMMAND, OUT, Window())
    profile, export = whole.commands
    assert profile[:2] == ["nsys", "profile"]
    assert profile[-3:] == COMMAND
    assert "--cuda-graph-trace=node" in profile
    assert not any(option.startswith("--capture-range") for option in profile)
    assert export == [
        "nsys",
        "export",
        "--type=sqlite",
        "--force-overwrite=true",
        "--output=out.sqlite",
        "out.nsys-rep",
    ]
    assert whole.environment == {"TETRA_NVTX": "1"}
    assert "--trace=cuda,nvtx" in profile
    part = nsight.nsys(COMMAND, OUT, Window("describe", 10, 5), whole_graphs=True, trace="nvtx,osrt")
    options = {"--capture-range=cudaProfilerApi", "--cuda-graph-trace=graph", "--trace=nvtx,osrt"}
    assert options <= set(part.commands[0])
    assert part.environment == {"TETRA_NVTX": "1", "TETRA_NVTX_CAPTURE": "describe:10:5"}
    assert part.text().startswith("TETRA_NVTX=1 TETRA_NVTX_CAPTURE=describe:10:5 nsys profile ")
    assert part.text().splitlines()[0].endswith("tetra match 'a b'")


@pytest.mark.parametrize("trace", ["", "cuda nvtx", "cuda,", "--stats=true", "cuda,nvtx\n"])
def test_traces_that_cannot_be(trace: str) -> None:
    with pytest.raises(ValueError, match="trace: is"):
        nsight.nsys(COMMAND, OUT, Window(), trace=trace)


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_ncu_takes_metrics_that_the_chip_has() -> None:
    wanted = {arch: option(nsight.ncu(COMMAND, OUT, Window(), arch=arch).commands[0], "--metrics") for arch in (80, 90)}
    assert "imma" in wanted[80]
    assert "gmma" not in wanted[80]
    assert "gmma" in wanted[90]
    unknown = option(nsight.ncu(COMMAND, OUT, Window()).commands[0], "--metrics").split(",")
    assert not any("imma" in name or "gmma" in name for name in unknown)
    for kind in ("time_duration", "pipe_tensor", "pipe_alu", "pipe_xu", "bank_conflicts", "lts__", "dram__bytes"):
        assert any(kind in name for name in unknown), kind
    for kind in ("warps_active", "registers_per_thread", "op_local"):
        assert any(kind in name for name in unknown), kind
    assert all(metric.why for metric in nsight.METRICS)
    # A run on an H200 had all of them.
    header = (Path(__file__).parent / "data" / "ncu_cut_off.csv").read_text()
    assert all(f'"{metric.name}"' in header for metric in nsight.METRICS)


def test_ncu_filters() -> None:
    recipe = nsight.ncu(COMMAND, OUT, Window("describe", 3), metrics="basic", inside="blocks.0", launches=12)
    profile, convert = recipe.commands
    assert option(profile, "--set") == "basic"
    assert option(profile, "--profile-from-start") == "off"
    assert option(profile, "--launch-count") == "12"
    assert option(profile, "--nvtx-include") == "tetra@blocks.0/"
    assert option(profile, "--kernel-name") == nsight.KERNELS
    assert convert[:5] == ["env", "LC_ALL=C", "ncu", "--import", "out.ncu-rep"]  # or numbers are of any language
    assert option(convert, "--log-file") == "out.csv"
    assert "--kernel-name" not in nsight.ncu(COMMAND, OUT, Window(), kernel=None).commands[0]


def test_the_filter_of_names_finds_our_kernels_alone() -> None:
    pattern = re.compile(nsight.KERNELS.removeprefix("regex:"))
    root = Path(__file__).resolve().parent.parent.parent / "kernels"
    launched = set(re.findall(r"(_\w+_kernel)\[", "".join(path.read_text() for path in root.glob("*.py"))))
    assert len(launched) > 10
    assert all(pattern.search(name) for name in launched)
    assert not pattern.search("void at::native::elementwise_kernel")
    assert not pattern.search("triton_poi_fused_add_0")


def test_characters_that_mean_something_to_ncu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nsight.nvtx_filter("a/b,c [1]") == r"tetra@a\/b\,c \[1\]/"
    monkeypatch.setitem(sys.modules, "nvtx", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert nsight.nvtx_filter("step") == "step/"  # PyTorch's own NVTX has no domain


@pytest.mark.parametrize("build", [nsight.nsys, nsight.ncu, nsight.torch])
def test_no_command(build: object) -> None:
    with pytest.raises(ValueError, match="after --"):
        build([], Path("t.json"), Window())  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((None, 3), "name one"), ((None, 0, 2), "name one"), (("a:b",), "':'"), ((" ",), "name of a range")],
)
def test_windows_that_cannot_be(arguments: tuple[object, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Window(*arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 or more and 1 or more"):
        Window("a", -1, 0)


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_which_python_runs_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def split(*command: str) -> tuple[list[str], list[str]]:
        (run,) = nsight.torch(list(command), Path("t.json"), Window()).commands
        start, end = run.index("-m"), run.index("--")
        assert run[start : end + 1] == ["-m", "tetra.profiling.torch_trace", "t.json", "--"]
        return run[:start], run[end + 1 :]

    assert split(sys.executable, "-X", "dev", "-u", "a.py", "-m", "x") == (
        [sys.executable, "-X", "dev", "-u"],
        ["a.py", "-m", "x"],
    )
    assert split(sys.executable, "-m", "pytest", "--", "-k") == ([sys.executable], ["-m", "pytest", "--", "-k"])
    assert split("a.py", "1") == ([sys.executable], ["a.py", "1"])
    for written, options, started in (  # as Python itself reads them
        (["-mjson.tool", "x"], [], ["-m", "json.tool", "x"]),
        (["-um", "json.tool", "-x"], ["-u"], ["-m", "json.tool", "-x"]),
        (["-umjson.tool", "x"], ["-u"], ["-m", "json.tool", "x"]),
        (["-uc", "print(1)", "-m"], ["-u"], ["-c", "print(1)", "-m"]),
        (["-cprint(1)"], [], ["-c", "print(1)"]),
        (["-Xdev", "-bb", "-OO", "a.py"], ["-Xdev", "-bb", "-OO"], ["a.py"]),
        (["-Wc", "-uW", "error::m", "a.py", "-c"], ["-Wc", "-uW", "error::m"], ["a.py", "-c"]),
        (["-uX", "dev", "-m", "a"], ["-uX", "dev"], ["-m", "a"]),
        (["--check-hash-based-pycs", "never", "a.py"], ["--check-hash-based-pycs", "never"], ["a.py"]),
        (["-u", "--", "a.py"], ["-u"], ["a.py"]),
    ):
        assert split(sys.executable, *written) == ([sys.executable, *options], started)
    installed = {
        "plain": "#!/opt/venv/bin/python3.11\nimport x\n",
        "env": "#!/usr/bin/env python3\nimport x\n",
        "long": "#!/bin/sh\n'''exec' \"/opt/a b/bin/python3\" \"$0\" \"$@\"\n' '''\nimport x\n",
    }
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = {name: split(str(program(tmp_path / name, text)), "info")[0] for name, text in installed.items()}
    assert found == {"plain": ["/opt/venv/bin/python3.11"], "env": ["python3"], "long": ["/opt/a b/bin/python3"]}
    assert split("plain", "x")[1] == [str(tmp_path / "plain"), "x"]  # found on the PATH
    program(tmp_path / "binary", "\x7fELF")
    for command, words in (
        (["binary"], "not a Python program"),
        (["nowhere-at-all"], "no such program"),
        ([sys.executable], "no script"),
        ([sys.executable, "-m"], "no script"),
        ([sys.executable, "-uc"], "no script"),
        ([sys.executable, "-W"], "no script"),
        ([sys.executable, "-u", "-"], "no script"),
        ([sys.executable, "-X", "dev"], "no script"),
    ):
        with pytest.raises(ValueError, match=words):
            nsight.torch(command, Path("t.json"), Window())
    with pytest.raises(ValueError, match=r"named \.json"):
        nsight.torch(["a.py"], Path("trace"), Window())


# --- running


TOOL = """#!PYTHON
import json, os, pathlib, sys
settings = {name: value for name, value in os.environ.items() if name.startswith("TETRA_NVTX")}
with open("LOG", "a") as file:
    print(json.dumps([sys.argv[1:], settings]), file=file)
"""


def tool(folder: Path, name: str, body: str) -> Path:
    """A program of this name that writes down how it was called, and does ``body``; gives the file in which it does."""
    log = folder / f"{name}.log"
    program(folder / name, TOOL.replace("PYTHON", sys.executable).replace("LOG", str(log)) + body)
    return log


WRITES = """
for argument in sys.argv:
    if argument.startswith("--output="): pathlib.Path(argument[9:]).write_text("written")
print("on stdout"); print("on stderr", file=sys.stderr)
"""


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def test_commands_run_one_after_the_other(bin_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tool(bin_folder, "nsys", WRITES)
    recipe = nsight.nsys(COMMAND, tmp_path / "deep" / "out", Window("describe", 2, 3))
    assert recipe.is_there()
    assert nsight.run(recipe) == nsight.Outcome(0)
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert [arguments for arguments, _ in calls] == [command[1:] for command in recipe.commands]
    assert all(found == recipe.environment for _, found in calls)
    assert [path.exists() for path in recipe.outputs] == [True, True]
    assert capfd.readouterr() == ("on stdout\n" * 2, "on stderr\n" * 2)


def test_the_status_of_the_profiled_command(bin_folder: Path, tmp_path: Path) -> None:
    log = tool(bin_folder, "nsys", WRITES + "sys.exit(7 if 'profile' in sys.argv else 0)")
    recipe = nsight.nsys(COMMAND, tmp_path / "out", Window())
    outcome = nsight.run(recipe)
    assert (outcome.status, outcome.advice) == (7, "")
    assert "tetra match" in outcome.failed
    assert len(log.read_text().splitlines()) == 2  # what was recorded is converted all the same
    tool(bin_folder, "nsys", "import signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert nsight.run(recipe).status == -9
    assert not recipe.outputs[0].exists()  # that of the run before is not taken for this one's


@pytest.mark.parametrize("name", ["nsys", "ncu"])
def test_a_tool_that_recorded_nothing_writes_no_report(bin_folder: Path, tmp_path: Path, name: str) -> None:
    log = tool(bin_folder, name, "")
    outcome = nsight.run(getattr(nsight, name)(COMMAND, tmp_path / "out", Window("describe")))
    assert (outcome.status, outcome.advice) == (1, nsight.NOTHING_RECORDED)
    assert len(log.read_text().splitlines()) == 1  # there is nothing to convert


def test_a_driver_that_gives_no_counters(bin_folder: Path, tmp_path: Path) -> None:
    tool(
        bin_folder,
        "ncu",
        'print("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance '
        'Counters on the target device 0."); sys.exit(1)',
    )
    outcome = nsight.run(nsight.ncu(COMMAND, tmp_path / "out", Window()))
    assert outcome.status == 1
    for words in ("NVreg_RestrictProfilingToAdminUsers=0", "CAP_SYS_ADMIN", "root"):
        assert words in outcome.advice


def test_missing_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not nsight.nsys(COMMAND, OUT, Window()).is_there()
    assert not nsight.ncu(COMMAND, OUT, Window()).is_there()
    assert nsight.torch(["a.py"], Path("t.json"), Window()).is_there()
    assert set(nsight.INSTALL) == {"nsys", "ncu"}
