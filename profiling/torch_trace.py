"""Runs a Python program under ``torch.profiler``: what ``tetra profile torch`` starts in a process of its own.

    python -m tetra.profiling.torch_trace TRACE [--stack] -- SCRIPT|-m MODULE|-c CODE [ARGUMENTS...]

The program's own exit status is kept. The trace is written however it ends, unless it is killed.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

from tetra.profiling import ranges

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler itself speaks on stderr; read when torch is imported


def _profiler(with_stack: bool) -> Any:
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    # Shapes have to be on for the facts of our ranges to show.
    return profile(activities=activities, record_shapes=True, with_stack=with_stack)


def _search_first(folder: str) -> None:
    """For modules, where Python would; with -I or -P it adds no folder."""
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = folder


def _run_as_main(source: str | bytes, name: str, is_file: bool = False) -> None:
    """In a module that stays ``__main__``, where pickle looks for its classes, also in what runs at exit."""
    module = types.ModuleType("__main__")
    if is_file:
        module.__file__ = name
    sys.modules["__main__"] = module
    exec(compile(source, name, "exec", dont_inherit=True), vars(module))


def _run(program: list[str]) -> int:
    """Status of a program that is run as Python itself would run it."""
    kind, *rest = program
    try:
        if kind == "-m":
            module, *arguments = rest
            sys.argv = [module, *arguments]
            _search_first(os.getcwd())
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        elif kind == "-c":
            code, *arguments = rest
            sys.argv = ["-c", *arguments]
            _search_first("")
            _run_as_main(code, "<string>")
        else:
            sys.argv = program
            _search_first(str(Path(kind).resolve().parent))
            if Path(kind).is_dir() or kind.endswith(".pyc") or zipfile.is_zipfile(kind):
                runpy.run_path(kind, run_name="__main__")
            else:
                _run_as_main(Path(kind).read_bytes(), str(Path(kind).absolute()), is_file=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> int:
    split = sys.argv.index("--")
    (output, *options), program = sys.argv[1:split], sys.argv[split + 1 :]
    path = Path(output).absolute()  # the program may change the folder
    process = os.getpid()
    profiler = _profiler("--stack" in options)
    text = os.environ.get(ranges.CAPTURE_VARIABLE, "")
    if text:
        ranges.set_capture(ranges.Capture(*ranges.parse_capture(text), profiler.start, profiler.stop))
    if os.environ.get(ranges.VARIABLE):
        with warnings.catch_warnings():  # NVTX is not what this is about
            warnings.simplefilter("ignore")
            ranges.enable()
    if not text:
        profiler.start()
    status = _run(program)
    if os.getpid() != process:  # the program forked: the trace is its parent's
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # an end as usual would wait for the profiler's threads, which a fork does not copy
    if not text or ranges.is_capturing():
        profiler.stop()
    ranges.set_capture(None)
    if text and profiler.profiler is None:
        print(f"note: no range was captured, so there is no trace ({ranges.CAPTURE_VARIABLE}={text})", file=sys.stderr)
        return status or 1
    # Under a name with the same ending, since that says whether it is compressed.
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        profiler.export_chrome_trace(str(partial))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
