"""Run inside one tree of the sources, by ``tetra.profiling.static_profile``: dumps what its kernels compile to, or what
its operations launch.

The text of this file is run with that tree on PYTHONPATH, so that both sides of a comparison are read with the same
instrument; of the tree itself it needs only ``tetra.kernels.ahead_of_time``. One JSON object on stdin is the request,
one on stdout the answer.
"""

from __future__ import annotations

import ctypes
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

Choice = list[Any]  # [name of a tunable, sizes of a problem, a row of its table]; JSON values

# Operations of PyTorch that start no kernel where they are made of no others: they allocate, or show the same memory in
# another way.
_NO_KERNEL = {
    "_reshape_alias", "_unsafe_view", "alias", "as_strided", "broadcast_to", "chunk", "contiguous", "detach",
    "detach_", "dropout", "empty", "empty_like", "empty_strided", "expand", "expand_as", "flatten", "lift_fresh",
    "movedim", "narrow", "new_empty", "new_empty_strided", "permute", "pin_memory", "promote_types", "requires_grad_",
    "reshape", "reshape_as", "resize_", "resolve_conj", "resolve_neg", "result_type", "select", "set_", "slice",
    "split", "split_with_sizes", "squeeze", "t", "to", "transpose", "type_as", "unbind", "unflatten", "unfold",
    "unsqueeze", "view", "view_as",
}  # fmt: skip
_ITEM_BYTES = {
    "float": 4, "double": 8, "c10::Half": 2, "c10::BFloat16": 2, "signed char": 1, "unsigned char": 1, "bool": 1,
    "int": 4, "long int": 8, "short int": 2, "long": 8,
}  # fmt: skip


def _only_from(tree: str) -> None:
    """RuntimeError unless the kernels are those of the tree.

    An editable install finds modules too, and would lend a tree what it does not have yet.
    """
    sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
    import tetra.kernels

    found = tetra.kernels.__file__ or ""
    if not found.startswith(tree):
        raise RuntimeError(f"kernels come from {found}, not from {tree}")


def _config_fits(config: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(name in config and str(config[name]).lower() == str(value).lower() for name, value in wanted.items())


def list_specimens(request: dict[str, Any]) -> list[tuple[int, Any, Choice | None]]:
    """(architecture, specimen, choice that it is of, if any) of all that is asked for: ``choices`` of another tree; if
    they are None, what may run the models' problems, and what this one's kernels' files list."""
    from tetra.kernels.ahead_of_time import all_specimens, kernel_names

    wanted = [name for name in kernel_names() if request["kernels"] is None or name in request["kernels"]]
    found: dict[str, Any] = {}
    for arch in request["archs"]:
        asked: list[tuple[Any, Choice | None]] = []
        if request["choices"] is None:
            for choice in _choices(arch, request["calls"]):
                asked += [(specimen, choice) for specimen in _specimens_of(arch, choice)]
            # After the choices, which are what another tree can be asked for.
            asked += [(specimen, None) for kernel in wanted for specimen in all_specimens(arch, kernel)]
        for other in request["choices"] or ():
            with suppress(Exception):  # this tree may not know the kernel, its sizes, or anything that can be tuned
                asked += [(specimen, other) for specimen in _specimens_of(arch, other)]
        for specimen, its_choice in asked:
            if specimen.name in wanted and _config_fits(specimen.config, request["config"]):
                function = getattr(specimen.kernel, "__name__", "")
                key = json.dumps([arch, specimen.name, function, specimen.config], sort_keys=True, default=str)
                found.setdefault(key, (arch, specimen, its_choice))
    return list(found.values())


def _choices(arch: int, sources: list[str]) -> list[Choice]:
    """What may run the problems of the backbones that ``sources`` name: the default, and what the tree's results say.
    Nothing in a tree without tuning results.

    Results count whatever they were made from. Launches leave out those of a kernel that was edited, but then an edit
    would take away the very configurations that show what it does.
    """
    try:
        from tetra.autotune.hardware import product_of
        from tetra.autotune.store import read_or_notice
        from tetra.autotune.table import SHIPPED
        from tetra.autotune.workloads import problems
        from tetra.kernels.tunable import all_tunables
    except ImportError:
        return []
    read = [read_or_notice(path) for path in sorted(SHIPPED.glob("*.json"))]
    tables = [found.results for found in read if found is not None and found.device.get("arch") == f"sm_{arch}"]
    choices = []
    for source in sources:
        for problem in problems(_functions(source).get("backbones", dict)()):
            tunable = all_tunables()[problem.tunable]
            entries = [table.get(tunable.name, {}).get(problem.key) for table in tables]
            default = tunable.default(arch, product_of(arch).n_sms, problem.sizes)
            rows = [default, *(tuple(entry["config"]) for entry in entries if entry is not None)]
            choices += [[tunable.name, problem.sizes, list(row)] for row in dict.fromkeys(rows)]
    return choices


def _specimens_of(arch: int, choice: Choice) -> list[Any]:
    """What runs a problem in a configuration; nothing if the tree's table lacks that row, or Triton compiles none."""
    from tetra.autotune.hardware import product_of
    from tetra.kernels.tunable import all_tunables

    name, sizes, config = choice
    tunable, n_sms = all_tunables()[name], product_of(arch).n_sms
    row = tuple(config)
    if tunable.works is None or row not in (tunable.default(arch, n_sms, sizes), *tunable.space(arch, sizes)):
        return []
    return [work.specimen for work in tunable.works(arch, n_sms, sizes, row)]


def _functions(source: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "traced"}
    exec(compile(Path(source).read_text(), source, "exec"), namespace)
    return namespace


def compiled(request: dict[str, Any]) -> dict[str, Any]:
    """Machine code of every ``part``-th of ``parts`` specimens, as text."""
    from tetra.kernels.ahead_of_time import compile_for, disassemble

    found = []
    for number, (arch, specimen, choice) in enumerate(list_specimens(request)):
        if number % request["parts"] != request["part"]:
            continue
        row = {
            "number": number,
            "arch": arch,
            "kernel": specimen.name,
            "function": getattr(specimen.kernel, "__name__", "") or specimen.kernel.fn.__name__,
            "config": specimen.config,
            "choice": choice,
        }
        try:
            code = compile_for(specimen, arch)
            sass, usage = disassemble(code)
        except Exception as error:  # what the compiler refuses is a finding, not an end
            found.append({**row, "error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200}"})
            continue
        row |= {"shared_bytes": code.shared_bytes, "num_warps": code.num_warps, "sass": sass, "usage": usage}
        found.append(row)
    return {"compiled": found}


@contextmanager
def _launches_counted() -> Iterator[Counter[str]]:
    """Within this context the kernels do not run; how often each would is counted."""
    import importlib

    interpreter = importlib.import_module("tetra.kernels.backend").triton.runtime.interpreter
    kind, counted = interpreter.InterpretedFunction, Counter[str]()
    before = kind.run

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        counted[self.fn.__name__] += 1
        for argument in (*args, *kwargs.values()):
            _clear_if_not_finite(argument)

    kind.run = run
    try:
        yield counted
    finally:
        kind.run = before


def _clear_if_not_finite(argument: Any) -> None:
    """Sets what would be an output, and is whatever memory held, to zero if an operation would refuse its values.

    Written past PyTorch, which would count it as an operation.
    """
    n_bytes = getattr(argument, "nbytes", 0)
    exponents = {"torch.float16": (2, 0x7C00), "torch.bfloat16": (2, 0x7F80), "torch.float32": (4, 0x7F800000)}
    item, exponent = exponents.get(str(getattr(argument, "dtype", "")), (0, 0))
    if not n_bytes or not item or not argument.is_contiguous():
        return
    memory = memoryview((ctypes.c_char * n_bytes).from_address(argument.data_ptr()))
    bits: Any = np.frombuffer(memory, np.uint16 if item == 2 else np.uint32)
    if (bits & exponent == exponent).any():
        ctypes.memset(argument.data_ptr(), 0, n_bytes)


def _numel(shape: list[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def torch_operations(call: Callable[[], object]) -> tuple[Counter[str], int]:
    """Names of PyTorch's operations in ``call`` that would start a kernel on a GPU, and bytes that are copied."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        call()
    operations, n_bytes = Counter[str](), 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name().startswith("aten::")]
    by_end = sorted(events, key=lambda e: (e.start_thread_id(), e.start_ns(), -e.end_ns()))
    for event, following in zip(by_end, [*by_end[1:], None], strict=True):
        inner = (
            following is not None
            and following.start_thread_id() == event.start_thread_id()
            and following.end_ns() <= event.end_ns()
            and following.start_ns() < event.end_ns()
        )
        name = event.name().removeprefix("aten::")
        if name == "copy_":
            shape, dtype = event.shapes()[0], event.dtypes()[0]
            n_bytes += _numel(shape) * _ITEM_BYTES.get(dtype, 4)
        # An operation made of others is what they are; copies are made of nothing that a GPU would show.
        if (not inner or name == "copy_") and name not in _NO_KERNEL:
            operations[name] += 1
    return operations, n_bytes


def traced(request: dict[str, Any]) -> dict[str, Any]:
    """What every call launches: our kernels, PyTorch's operations, and bytes copied."""
    rows: dict[str, Any] = {}
    for source in request["calls"]:
        for name, (kernels, prepare) in _functions(source)["calls"]().items():
            if request["kernels"] is not None and not set(kernels) & set(request["kernels"]):
                continue
            try:
                call = prepare()
                with _launches_counted() as launches:
                    call()  # what happens once, such as tables that are kept
                    launches.clear()
                    operations, n_bytes = torch_operations(call)
            except Exception as error:
                rows[name] = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200}"}
                continue
            rows[name] = {"launches": dict(launches), "torch": dict(operations), "copied_bytes": n_bytes}
    return {"traced": rows}


def main() -> None:
    request = json.load(sys.stdin)
    answers = sys.stdout
    sys.stdout = sys.stderr  # what the tree prints is no answer
    warnings.simplefilter("ignore")
    _only_from(request["tree"])
    json.dump({"compiled": compiled, "traced": traced}[request["what"]](request), answers)


if __name__ == "__main__":
    main()
