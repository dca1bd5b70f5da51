"""Runs a Python program under ``torch.profiler``: what ``tetra profile torch`` starts in a process of its own.

    python -m tetra.profiling.torch_trace TRACE [--stack] -- SCRIPT|-m MODULE|-c CODE [ARGUMENTS...]

The program's own exit status is kept. The trace is written however it ends, unless it is killed.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
import warnings
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


def _run(program: list[str]) -> int:
    """Status of a program that is run as Python itself would run it."""
    kind, *rest = program
    try:
        if kind == "-m":
            module, *arguments = rest
            sys.argv = [module, *arguments]
            sys.path[0] = os.getcwd()
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        elif kind == "-c":
            code, *arguments = rest
            sys.argv = ["-c", *arguments]
            sys.path[0] = ""
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
        else:
            sys.argv = program
            sys.path[0] = str(Path(kind).resolve().parent)
            runpy.run_path(kind, run_name="__main__")
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
