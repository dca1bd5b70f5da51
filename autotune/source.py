"""What a tuning result was made from: the kernels' source and the compiler.

:func:`kernel_hash` is of a file's ``@triton.jit`` functions and constants (names in capitals), together with those of
other files that they use. It is of their syntax trees: comments, docstrings and layout do not count, and every version
of Python gives the same. C++ sources count without their comments.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import subprocess
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path

_PACKAGE = "tetra.kernels"
_IGNORED_FIELDS = {"ctx", "kind", "type_comment", "type_params"}  # say nothing, or not in every version of Python
_COMMENTS = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)

Definition = ast.FunctionDef | ast.Assign | ast.AnnAssign


def _folder() -> Path:
    found = importlib.util.find_spec(_PACKAGE)
    assert found is not None
    assert found.submodule_search_locations is not None
    return Path(next(iter(found.submodule_search_locations)))


def _is_kernel(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef) and any(
        ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list
    )


def _names_of(node: ast.stmt) -> list[str]:
    """Constants that a statement defines."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in names if name.isupper()]


class _Module:
    """The definitions of one file, by name, and where its imported names come from."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.definitions: dict[str, Definition] = {}
        self.imported: dict[str, tuple[str, str]] = {}  # name -> file, its name there
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and _is_kernel(node):
                self.definitions[node.name] = node
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                self.definitions |= dict.fromkeys(_names_of(node), node)
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{_PACKAGE}."):
                file = (node.module or "").rpartition(".")[2]
                self.imported |= {alias.asname or alias.name: (file, alias.name) for alias in node.names}


@lru_cache(maxsize=64)
def _parsed(name: str, text: str) -> _Module:
    return _Module(name, text)


def _canonical(node: object) -> object:
    """A syntax tree as nested lists, the same for the same code."""
    if isinstance(node, ast.AST):
        fields = [
            [name, _canonical(value)]
            for name, value in ast.iter_fields(node)
            if value is not None and value != [] and name not in _IGNORED_FIELDS
        ]
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            fields = [[name, value[1:] if name == "body" else value] for name, value in fields]  # type: ignore[index]
        return [type(node).__name__, *fields]
    if isinstance(node, list):
        return [_canonical(item) for item in node]
    return f"{type(node).__name__} {node!r}"


def hash_of(module: str, texts: Mapping[str, str], name: str | None = None) -> str:
    """:func:`kernel_hash` of ``texts``, the sources by file name, of which ``module`` is one.

    Args:
        name: of a function or constant of the module: of that alone, and what it uses.
    """

    def of(file: str) -> _Module:
        return _parsed(file, texts[file])

    found: dict[tuple[str, str], object] = {}
    waiting = [(module, name)] if name is not None else [(module, one) for one in of(module).definitions]
    while waiting:
        file, one = waiting.pop()
        if (file, one) in found:
            continue
        node = of(file).definitions[one]
        found[file, one] = _canonical(node)
        for used in {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}:
            if used in of(file).definitions:
                waiting.append((file, used))
            else:
                other, there = of(file).imported.get(used, ("", ""))
                if other in texts and there in of(other).definitions:
                    waiting.append((other, there))
    return _digest(repr(sorted(found.items())))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def without_comments(cpp: str) -> str:
    """C++ without comments, and with every stretch of white space as one blank."""
    code = _COMMENTS.sub(lambda found: found[0] if found[0].startswith('"') else " ", cpp)
    return " ".join(code.split())


@cache
def _texts() -> Mapping[str, str]:
    """The sources of ``tetra.kernels`` by file name."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(_folder().glob("*.py"))}


@cache
def function_hash(module: str, name: str) -> str:
    """Of one ``@triton.jit`` function of a file, and what it uses: all of the source that its machine code depends on.

    Raises:
        ValueError: there is no such file.
        KeyError: it has no such function.
    """
    _check_module(module)
    return hash_of(module, _texts(), name)


def _check_module(module: str) -> None:
    if module not in _texts():
        raise ValueError(f"module: there is no '{module}' in {_PACKAGE}; wanted one of {', '.join(_texts())}")


@cache
def kernel_hash(module: str) -> str:
    """16 hexadecimal digits of what the kernels of ``tetra.kernels.<module>`` are made of.

    Raises:
        ValueError: there is no such file.
    """
    _check_module(module)
    folder, of_python = _folder(), hash_of(module, _texts())
    sources = sorted((folder / f"{module}_src").glob("*")) if (folder / f"{module}_src").is_dir() else []
    if not sources:
        return of_python
    of_cpp = [f"{path.name} {without_comments(path.read_text(encoding='utf-8'))}" for path in sources]
    return _digest("\n".join([of_python, *of_cpp]))


def triton_version() -> str | None:
    """Of the Triton that is installed; None without one."""
    from tetra.kernels.backend import versions

    return versions()["triton"]


@cache
def toolchain() -> dict[str, str | None]:
    """Versions of what compiles kernels, ``triton`` and its ``ptxas``; None for what is not there."""
    return {"triton": triton_version(), "ptxas": _ptxas_version()}


def _ptxas_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    try:
        done = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"\bV(\d+(?:\.\d+)+)", done.stdout)
    return found[1] if found else None
