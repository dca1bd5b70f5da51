"""Static profile: the main loop of a compiled kernel, line by line, and what a change of the sources does to all of
them. Needs no GPU, and measures nothing.

A *profile* of a tree of the sources holds

- ``kernels``: a row for every kernel, configuration and architecture: the kernel report (``tetra.profiling.report``),
  how many loops there are, and the ``choice`` that the configuration is for a problem of the models, if it is one;
- ``launches``: a row for every public operation: which kernels it launches, which operations of PyTorch it runs beside
  them, and how many bytes those copy;
- ``others``, where it is compared: rows of what only the other tree chooses (:func:`other_choices`).

:func:`compare` finds what is worse in one profile than in another. Instructions are compared, not machine code, so that
a change that only moves lines, or renames, is none. Each tree is read in processes of its own, with the tree on
PYTHONPATH, by the same instrument (``static_worker``).
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import os
import re
import secrets
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tetra.kernels.ahead_of_time import all_specimens, check_kernel, check_known_arch, compile_for, disassemble
from tetra.kernels.backend import versions
from tetra.kernels.specimen import Specimen
from tetra.profiling.report import describe
from tetra.profiling.sass import KINDS, Report, find_loops, parse_instructions, parse_report

FORMAT, VERSION = "tetra-static-profile", 2
CACHE_VARIABLE = "TETRA_PROFILE_CACHE"
_OF_KERNELS = ("all", *KINDS, "instructions", "shared_bytes")
CLASSES = (*_OF_KERNELS, "copied_bytes")
"""what a slack can be given for: classes of the main loop, instructions of the whole kernel, and bytes"""
# What runs once is moved about more by the compiler, and costs less, than what is in the loop.
SLACK_PERCENT = {**dict.fromkeys(CLASSES, 1.0), "instructions": 10.0, "copied_bytes": 0.0}

_FOLDER = Path(__file__).parent
_FOLDERS = ("kernels", "autotune", "profiling", "tetra")
# What of a configuration says how the work is cut, not which work it is.
_TILES = re.compile(r"BLOCK_|num_|GROUP|SPLIT|CHUNK|ROWS|QUERIES|WARPS|STAGES")

# What two rows have in common that are compared, the surest first: with the same code, unless a function or a file was
# renamed, and with the same work cut another way.
_SAME_CODE = (("kernel", "function", "arch", "config"), ("kernel", "arch", "config"), ("function", "arch", "config"))
_SAME_WORK = (("kernel", "function", "arch", "work"), ("kernel", "arch", "work"))

_GROUPS = {"launches": "launches of {}", "torch": "{} of PyTorch"}  # what an operation causes, and how it is said

Progress = Callable[[int, int, str], None]
Row = dict[str, Any]
Pairs = list[tuple[Row, Row]]


class StaticProfileError(ValueError):
    """A tree, a revision or a file that can't be profiled or compared."""


# --- the main loop, line by line ---------------------------------------------------------------------------


def find_specimen(kernel: str, arch: int, config: Mapping[str, str]) -> tuple[Specimen, int]:
    """The first shipped specimen of ``kernel`` whose configuration has these values (as texts, in any case), and how
    many have.

    Raises:
        ValueError: an unknown kernel or architecture; none has; lists the values that there are.
    """
    check_known_arch(arch)
    check_kernel(kernel)
    specimens = all_specimens(arch, kernel)
    fitting = [s for s in specimens if all(_text(s.config.get(k)) == v.lower() for k, v in config.items())]
    if not fitting:
        known: dict[str, set[str]] = {}
        for specimen in specimens:
            for name, value in specimen.config.items():
                known.setdefault(name, set()).add(_text(value))
        values = "; ".join(f"{name}={'|'.join(sorted(found))}" for name, found in sorted(known.items()))
        wanted = ", ".join(f"{k}={v}" for k, v in config.items())
        raise StaticProfileError(f"config: no specimen of {kernel} for sm_{arch} has {wanted}; there are {values}")
    return fitting[0], len(fitting)


def _text(value: object) -> str:
    return str(value).lower()


def loop_view(specimen: Specimen, arch: int) -> dict[str, Any]:
    """The main loop of a specimen, compiled for ``arch``.

    Returns:
        The row of the kernel report, with ``lines``: a mapping an instruction, ``address``, ``text`` and ``kind`` (one
        of ``KINDS``); and ``n_loops``.

    Raises:
        RuntimeError: there is no Triton that can compile.
    """
    compiled = compile_for(specimen, arch)
    sass, usage = disassemble(compiled)
    found = parse_report(arch, sass, usage, compiled.shared_bytes, compiled.num_warps)
    lines = [
        {"address": i.address, "text": f"{i.name} {i.operands}".strip(), "kind": i.kind, "access_bytes": _access(i)}
        for i in found.loop
    ]
    return {
        **describe(specimen.name, specimen.config, found),
        "n_loops": len(find_loops(parse_instructions(sass))),
        "lines": lines,
    }


def _access(instruction: Any) -> int | None:
    kinds = ("lds", "ldsm", "sts", "ldg", "stg", "local", "ldgsts", "atomic")
    return instruction.access_bytes if instruction.kind in kinds else None


# --- profiles of trees -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What of a tree is profiled.

    Attributes:
        archs: compute capabilities, 80 for sm_80.
        kernels: only these files; None for all.
        config: only configurations with these values.
        calls: files with ``calls()``, whose launches are counted (see ``traced_calls``).
    """

    archs: tuple[int, ...]
    kernels: tuple[str, ...] | None = None
    config: tuple[tuple[str, str], ...] = ()
    calls: tuple[Path, ...] = (_FOLDER / "traced_calls.py",)

    def about(self) -> dict[str, Any]:
        """What has to be the same in two profiles."""
        return {
            "archs": [f"sm_{arch}" for arch in self.archs],
            "kernels": None if self.kernels is None else list(self.kernels),
            "config": dict(self.config),
        }


def toolchain() -> dict[str, str | None]:
    """What decides, beside the sources, what a kernel compiles to."""
    return {"triton": versions()["triton"], "ptxas": os.environ.get("TRITON_PTXAS_PATH")}


def profile_tree(
    tree: Path, request: Request, *, name: str = "", workers: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """The profile of the sources in the folder ``tree``; kept by content, so that a second time takes seconds.

    Args:
        name: of the tree, for messages and in the profile.
        workers: processes that compile; by default as many as there are cores.
        progress: called with (number done, number of all, what comes next).

    Raises:
        StaticProfileError: the tree can't be read or its kernels can't be imported.
    """
    tree, name = tree.resolve(), name or str(tree)
    if not (tree / "kernels" / "ahead_of_time.py").is_file():
        raise StaticProfileError(f"{name}: has no kernels/ahead_of_time.py, so its kernels can't be compiled from here")
    work = [("compiled", arch) for arch in request.archs] + [("traced", 0)] * bool(request.calls)
    rows: dict[str, Any] = {"kernels": [], "launches": {}}
    for done, (what, arch) in enumerate(work):
        if progress is not None:
            progress(done, len(work), f"{name}: " + (f"sm_{arch}" if arch else "launches"))
        if what == "compiled":
            rows["kernels"] += _compiled(tree, name, request, arch, workers)
        else:
            rows["launches"] = _traced(tree, name, request)
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": name,
        "toolchain": toolchain(),
        "about": request.about(),
        "measured": False,
        **rows,
    }


def other_choices(
    tree: Path,
    request: Request,
    own: Mapping[str, Any],
    other: Mapping[str, Any],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Rows of ``tree``, whose profile is ``own``, in the configurations that only the tree of ``other`` chooses, as far
    as this one has them: so both are compared in what either chooses. Kept by content.

    Raises:
        StaticProfileError: the tree's kernels can't be imported.
    """
    has = {_key(row, _SAME_CODE[0]) for row in own["kernels"]}
    rows: list[Row] = []
    for done, arch in enumerate(request.archs):
        if progress is not None:
            progress(done, len(request.archs), f"{own['name']}: sm_{arch} as {other['name']} chooses")
        lacks = [row for row in other["kernels"] if row["arch"] == f"sm_{arch}" and _key(row, _SAME_CODE[0]) not in has]
        choices = [row["choice"] for row in lacks if row.get("choice") is not None]
        if choices:
            rows += _compiled(tree.resolve(), own["name"], request, arch, workers, choices)
    return rows


def _ask(tree: Path, request: Mapping[str, Any], backend: str) -> subprocess.Popen[str]:
    """Starts the worker; its answer is read by :func:`_answer`."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "TETRA_BACKEND": backend}
    # What is shipped, and not what this user's cache knows.
    environment |= {"TETRA_TUNING": "static", "TETRA_TUNING_DIR": str(tree / ".no-tuning")}
    environment.pop("TRITON_INTERPRET", None)
    environment.setdefault("OMP_NUM_THREADS", "1")
    # Not as a script, whose folder would come first where modules are looked for.
    run = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-c", run, str(_FOLDER / "static_worker.py")]
    # Files and not pipes: both ends could wait for each other.
    with tempfile.TemporaryFile("w+") as asked:
        json.dump({"tree": str(tree), **request}, asked)
        asked.seek(0)
        return subprocess.Popen(
            command, cwd=tree, env=environment, stdin=asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )


def _answer(process: subprocess.Popen[str], name: str) -> dict[str, Any]:
    out, err = process.communicate()
    if process.returncode:
        lines = [line for line in err.splitlines() if line.strip() and not line.startswith("USDT")]
        reason = lines[-1] if lines else f"exit status {process.returncode}"
        raise StaticProfileError(f"{name}: its kernels can't be read: {reason[:300]}")
    answer: dict[str, Any] = json.loads(out)
    return answer


def _compiled(
    tree: Path, name: str, request: Request, arch: int, workers: int | None, choices: list[Any] | None = None
) -> list[Row]:
    """Rows of what ``tree`` lists and chooses itself, or of ``choices`` of another."""
    kept = _cache_file(tree, request, "compiled", arch, choices)
    found = _read_cache(kept)
    if not _are_kernels(found):
        found = _compile(tree, name, request, arch, workers, choices)
        _write_cache(kept, found)
    return found  # type: ignore[no-any-return]


def _compile(
    tree: Path, name: str, request: Request, arch: int, workers: int | None, choices: list[Any] | None
) -> list[Row]:
    parts = max(workers or os.cpu_count() or 1, 1)
    asked = {
        "what": "compiled",
        "archs": [arch],
        "kernels": None if request.kernels is None else list(request.kernels),
        "config": dict(request.config),
        "calls": [str(path) for path in request.calls],
        "choices": choices,
        "parts": parts,
    }
    processes = [_ask(tree, {**asked, "part": part}, "auto") for part in range(parts)]
    try:
        raw = [row for process in processes for row in _answer(process, name)["compiled"]]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return [_kernel_row(row) for row in sorted(raw, key=lambda row: row["number"])]


def _kernel_row(row: Row) -> Row:
    """What is kept of a specimen."""
    known = {name: row[name] for name in ("kernel", "function", "config", "choice")} | {"arch": f"sm_{row['arch']}"}
    if "error" in row:
        return {**known, "error": row["error"]}
    found = parse_report(row["arch"], row["sass"], row["usage"], row["shared_bytes"], row["num_warps"])
    return {
        **describe(row["kernel"], row["config"], found),
        **known,
        "n_loops": len(find_loops(parse_instructions(row["sass"]))),
        "names": _digest(found),
    }


def _digest(found: Report) -> str:
    """Of the instructions' names, in order: equal where nothing but registers and addresses differs."""
    names = " ".join(i.name for i in (*found.loop, *found.outside))
    return hashlib.sha256(names.encode()).hexdigest()[:16]


def _traced(tree: Path, name: str, request: Request) -> dict[str, Any]:
    kept = _cache_file(tree, request, "traced", 0)
    found: Any = _read_cache(kept)
    if _are_launches(found):
        return found  # type: ignore[no-any-return]
    asked = {
        "what": "traced",
        "kernels": None if request.kernels is None else list(request.kernels),
        "calls": [str(path) for path in request.calls],
    }
    found = _answer(_ask(tree, asked, "interpreter"), name)["traced"]
    _write_cache(kept, found)
    return found  # type: ignore[no-any-return]


# --- kept by content ---------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where profiles are kept: ``TETRA_PROFILE_CACHE``, or a folder in the user's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tetra" / "static-profile"


@cache
def _source_digest(text: bytes, is_python: bool) -> bytes:
    if is_python:
        with contextlib.suppress(SyntaxError, ValueError):
            text = ast.dump(ast.parse(text)).encode()
    return hashlib.sha256(text).digest()


def sources_hash(tree: Path, folders: Iterable[str]) -> str:
    """Of the sources in these folders of a tree, as far as they can change a result: comments don't count."""
    digest = hashlib.sha256()
    for path in sorted(p for folder in folders for p in (tree / folder).rglob("*") if p.suffix in (".py", ".json")):
        digest.update(path.relative_to(tree).as_posix().encode() + b"\0")
        digest.update(_source_digest(path.read_bytes(), path.suffix == ".py"))
    return digest.hexdigest()


def _cache_file(tree: Path, request: Request, what: str, arch: int, choices: list[Any] | None = None) -> Path:
    # Launches are also made by the model; what compiles depends on kernels, on what chooses among them, and on shapes.
    folders = ("kernels", "autotune") if what == "compiled" else ("kernels", "autotune", "tetra")
    instrument = [_FOLDER / name for name in ("static_worker.py", "static_profile.py", "sass.py", "report.py")]
    instrument += [_FOLDER / "roofline.py", _FOLDER.parent / "autotune" / "hardware.py", *request.calls]
    parts = [
        sources_hash(tree, folders),
        _source_digest((tree / "tetra" / "config.py").read_bytes(), True).hex(),
        *(hashlib.sha256(path.read_bytes()).hexdigest() for path in instrument if path.is_file()),
        json.dumps([what, arch, request.about(), toolchain(), versions(), choices], sort_keys=True),
    ]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return cache_folder() / f"{what}-{key[:32]}.json"


def _read_cache(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):  # not there, or damaged: it is made again
        return None


def _write_cache(path: Path, value: object) -> None:
    with contextlib.suppress(OSError):  # a cache that can't be written only makes the next time slower
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        temporary.write_text(json.dumps(value))
        temporary.replace(path)


# --- revisions and files -----------------------------------------------------------------------------------


def _git(repository: Path, *args: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(repository), *args], capture_output=True, check=False)
    except OSError as error:
        raise StaticProfileError(f"git can't be run: {error.strerror}; install it, or use --baseline FILE") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise StaticProfileError(f"git {args[0]}: {lines[0] if lines else 'failed'}")
    return done.stdout


def repository_root(path: Path) -> Path:
    """The checkout that ``path`` lies in. StaticProfileError if it is in none, or in one of another project."""
    if not path.is_dir():
        raise StaticProfileError(f"{path}: no such folder; name a checkout of the sources")
    try:
        root = Path(_git(path, "rev-parse", "--show-toplevel").decode().strip())
    except StaticProfileError as error:
        raise StaticProfileError(
            f"{path}: is in no git checkout ({error}); name one with --repo, or use --baseline FILE"
        ) from None
    if not (root / "kernels").is_dir() or not (root / "tetra").is_dir():
        raise StaticProfileError(
            f"{root}: is no checkout of the sources (no kernels/ and tetra/); name one with --repo"
        )
    return root


def commit_of(repository: Path, revision: str) -> str:
    """The commit's full name. StaticProfileError for what is no revision."""
    if revision.startswith("-"):
        raise StaticProfileError(f"{revision!r} is not a revision")
    try:
        return _git(repository, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").decode().strip()
    except StaticProfileError:
        raise StaticProfileError(f"{revision!r} is not a revision of {repository}; git log shows them") from None


def check_kernel_files(repository: Path, revision: str | None, kernels: Iterable[str]) -> None:
    """StaticProfileError for a kernel without a file in ``revision``, or in the files as they are."""
    for kernel in kernels:
        if revision is None:
            there = re.fullmatch(r"\w+", kernel) is not None and (repository / "kernels" / f"{kernel}.py").is_file()
        else:
            there = bool(_git(repository, "ls-tree", "--name-only", revision, f"kernels/{kernel}.py"))
        if not there:
            raise StaticProfileError(
                f"kernel: there is no kernels/{kernel}.py in {revision or 'the files as they are'}"
            )


@contextlib.contextmanager
def tree_of(repository: Path, revision: str) -> Iterator[tuple[Path, str]]:
    """A folder with the sources of ``revision`` (any name that git knows), which goes when the context ends, and the
    commit's abbreviated name. StaticProfileError for an unknown revision or one without kernels."""
    commit = commit_of(repository, revision)
    there = set(_git(repository, "ls-tree", "--name-only", commit).decode().splitlines())
    if not {"kernels", "tetra", "pyproject.toml"} <= there:
        raise StaticProfileError(f"{revision}: has no kernels/ and tetra/; name a later revision")
    wanted = [name for name in (*_FOLDERS, "pyproject.toml") if name in there]
    archive = _git(repository, "archive", commit, *wanted)
    with tempfile.TemporaryDirectory(prefix="tetra-tree-") as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as file:
            file.extractall(folder, filter="data")
        yield Path(folder), commit[:12]


def read_profile(path: Path) -> dict[str, Any]:
    """A profile that was written as JSON. StaticProfileError for any other file; of pipes only those that this process
    was given are read, since another may never end."""
    try:
        kind = path.stat().st_mode
        given = path.as_posix().startswith(("/dev/stdin", "/dev/fd/"))
        if not (stat.S_ISREG(kind) or (given and stat.S_ISFIFO(kind))):
            raise StaticProfileError(f"{path}: is no regular file; write a profile to one with --write-baseline")
        found = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(found, ensure_ascii=False).encode()
    except StaticProfileError:
        raise
    except OSError as error:
        raise StaticProfileError(f"{path}: can't be read: {error.strerror}; write it with --write-baseline") from error
    except UnicodeEncodeError:  # a half of a surrogate pair, which can't be printed
        raise StaticProfileError(f"{path}: has text that is no Unicode; write it again with --write-baseline") from None
    except (ValueError, RecursionError):
        raise StaticProfileError(f"{path}: is not JSON, or truncated; write it again with --write-baseline") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise StaticProfileError(f"{path}: is no static profile; write one with --write-baseline")
    if found.get("version") != VERSION:
        raise StaticProfileError(f"{path}: version {found.get('version')!r}, wanted {VERSION}; write it again")
    wanted = {"toolchain": dict, "about": dict, "kernels": list, "launches": dict, "name": str}
    wrong = [key for key, kind in wanted.items() if not isinstance(found.get(key), kind)]
    if not wrong:
        counts = f"whole numbers from 0 to {_MOST:,}"
        wrong += [f"figures of a kernel ({counts})"] * (not _are_kernels(found["kernels"]))
        wrong += [f"figures of an operation ({counts})"] * (not _are_launches(found["launches"]))
    if wrong:
        raise StaticProfileError(f"{path}: lacks {', '.join(wrong)}; write it again")
    return {key: found[key] for key in wanted}


_FIGURES = ("registers", "spills", "stack_bytes", "shared_bytes", "ctas_per_sm", "num_warps", "n_loops", "instructions")
_MOST = 2**53  # of a count: what floating point has exactly


def _are_counts(row: object, names: Iterable[str]) -> bool:
    """Whether ``row`` has counts by these names."""
    return isinstance(row, dict) and all(type(row.get(name)) is int and 0 <= row[name] <= _MOST for name in names)


def _are_kernels(rows: object) -> bool:
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and isinstance(row.get("kernel"), str)
        and isinstance(row.get("arch"), str)
        and isinstance(row.get("config"), dict)
        and isinstance(row.get("choice", []), (list, type(None)))
        and ("error" in row or (_are_counts(row, _FIGURES) and _are_counts(row.get("loop"), ("all", *KINDS))))
        for row in rows
    )


def _are_launches(rows: object) -> bool:
    return isinstance(rows, dict) and all(
        isinstance(row, dict)
        and (
            "error" in row
            or (_are_counts(row, ("copied_bytes",)) and all(_are_counts(row.get(g), row.get(g) or ()) for g in _GROUPS))
        )
        for row in rows.values()
    )


# --- comparing ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One difference.

    Attributes:
        where: kernel, configuration and architecture, or the operation.
        what: such as "alu of the loop"; see :meth:`text`.
        base, head: the figures.
        is_regression: whether it is worse, and beyond the slack.
        note: said in place of figures.
    """

    where: str
    what: str
    base: int
    head: int
    is_regression: bool
    note: str = ""

    def text(self) -> str:
        """Such as "adds 12 alu to the loop (340 -> 352)"."""
        if self.note:
            return self.note
        change = self.head - self.base
        verb, to = ("adds", "to") if change > 0 else ("removes", "from")
        if self.what in CLASSES and not self.what.endswith("_bytes"):
            what = "instructions" if self.what == "all" else self.what
            place = "whole kernel" if self.what == "instructions" else "loop"
            return f"{verb} {abs(change):,} {what} {to} the {place} ({self.base:,} -> {self.head:,})"
        return f"{verb} {abs(change):,} {self.what.replace('_', ' ')} ({self.base:,} -> {self.head:,})"


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found: differences, worst first; how many rows, and of those kernels, were compared, and how
    many were the same."""

    findings: list[Finding]
    n_compared: int
    n_kernels: int
    n_same: int

    @property
    def regressions(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.is_regression]

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        rows = [{**asdict(finding), "text": finding.text()} for finding in self.findings]
        return {
            "regressions": len(self.regressions),
            "compared": self.n_compared,
            "compared_kernels": self.n_kernels,
            "same": self.n_same,
            "findings": rows,
        }


def parse_slack(texts: Sequence[str]) -> dict[str, float]:
    """Percent by class from texts such as "2" and "alu=5". StaticProfileError for others.

    A percentage alone is for all classes but ``copied_bytes``, and makes that of ``instructions`` no smaller.
    """
    slack = dict(SLACK_PERCENT)
    for text in sorted(texts, key=lambda text: "=" in text):  # those for all classes first
        name, _, number = text.rpartition("=")
        try:
            percent = float(number)
        except ValueError:
            percent = -1.0
        if name not in ("", *CLASSES) or not 0 <= percent < float("inf"):
            known = ", ".join(CLASSES)
            raise StaticProfileError(f"slack: {text!r}; wanted PERCENT or CLASS=PERCENT with one of {known}")
        if name:
            slack[name] = percent
        else:
            slack |= dict.fromkeys(_OF_KERNELS, percent)
            slack["instructions"] = max(percent, SLACK_PERCENT["instructions"])
    return slack


def _where(row: Mapping[str, Any]) -> str:
    config = " ".join(f"{k.removeprefix('BLOCK_').removeprefix('num_')}={v}" for k, v in row["config"].items())
    return f"{row['kernel']} {row['arch']} {config}"


def _key(row: Mapping[str, Any], parts: Sequence[str]) -> str:
    """The same for rows that have these parts in common; ``work`` is the configuration without what cuts it up."""
    values = {**row, "work": {k: v for k, v in row["config"].items() if not _TILES.search(k)}}
    return json.dumps([values.get(part) for part in parts], sort_keys=True)


def compare(base: Mapping[str, Any], head: Mapping[str, Any], slack: Mapping[str, float] | None = None) -> Comparison:
    """What is different in ``head``, and what of it is worse beyond the slack.

    Regressions are: more instructions of a class in the main loop, or in the whole kernel, or more shared memory, by
    more than the class's slack; any new spill or stack; registers or shared memory with which fewer blocks fit a
    multiprocessor; more loops; code that no longer compiles; an operation that launches more kernels, runs more
    operations of PyTorch, or copies more bytes. A configuration that is new has to compile, fit and not spill; one that
    took the place of another is compared with it. A function of which nothing could be compared is a regression too,
    unless there is nothing that may have taken its place.

    Args:
        slack: percent by class, see :func:`parse_slack`.

    Raises:
        StaticProfileError: the two can't be compared: other toolchains, or other kernels were looked at.
    """
    slack = parse_slack([]) if slack is None else slack
    for key, fix in (("toolchain", "compile both with one"), ("about", "profile both with the same options")):
        if base[key] != head[key]:
            raise StaticProfileError(
                f"{base['name']} and {head['name']} can't be compared: {key} {json.dumps(base[key])} and "
                f"{json.dumps(head[key])}; {fix}, or write the baseline again"
            )
    findings: list[Finding] = []
    n_same = 0
    pairs, gone, added = _paired(base["kernels"], head["kernels"], _SAME_CODE)
    pairs += _paired(gone, head.get("others", []), _SAME_CODE)[0]
    pairs += _paired(base.get("others", []), added, _SAME_CODE)[0]
    retiled, gone, added = _paired(gone, added, _SAME_WORK)
    for before, after in sorted(pairs, key=lambda pair: _where(pair[0])):
        found = _compare_rows(before, after, slack)
        findings += found
        n_same += not found
    for before, after in retiled:
        findings.append(Finding(_where(after), "configuration", 0, 0, False, f"took the place of {_where(before)}"))
        findings += _compare_rows(before, after, None)
    for row in added:
        findings += _check_new(row)
    findings += [Finding(_where(row), "configuration", 1, 0, False, "is gone") for row in gone]
    findings += _renamed([*pairs, *retiled])
    findings += _not_compared(base["kernels"], head["kernels"], [*pairs, *retiled])
    n_kernels = n_compared = len(pairs) + len(retiled)
    for name in sorted(base["launches"].keys() | head["launches"].keys()):
        found = _compare_launches(name, base["launches"].get(name), head["launches"].get(name), slack)
        findings += found
        n_compared += 1
        n_same += not found
    return Comparison(sorted(findings, key=lambda finding: not finding.is_regression), n_compared, n_kernels, n_same)


def _paired(old: list[Row], new: list[Row], ways: Iterable[Sequence[str]]) -> tuple[Pairs, list[Row], list[Row]]:
    """Rows that belong together, by the first of ``ways`` that makes it clear which do; and those left on each side."""
    pairs: Pairs = []
    for parts in ways:
        groups: dict[str, tuple[list[Row], list[Row]]] = {}
        for side, rows in enumerate((old, new)):
            for row in rows:
                groups.setdefault(_key(row, parts), ([], []))[side].append(row)
        old, new = [], []
        for before, after in groups.values():
            if len(before) == len(after) == 1:
                pairs.append((before[0], after[0]))
            else:
                old, new = old + before, new + after
    return pairs, old, new


def _renamed(pairs: Pairs) -> list[Finding]:
    """A note for each function that has another name, or is in another file."""
    names = {tuple((row["kernel"], str(row.get("function"))) for row in pair) for pair in pairs}
    return [
        Finding(" ".join(now), "function", 0, 0, False, f"was {was[1]}" + f" of {was[0]}" * (was[0] != now[0]))
        for was, now in sorted(names)
        if was != now
    ]


def _not_compared(old: list[Row], new: list[Row], pairs: Pairs) -> list[Finding]:
    """Functions of which nothing was compared though their file has others that may be they, since silence would pass
    for an answer; where nothing was of any, all of them."""

    def function(row: Row) -> tuple[str, str, str]:
        return row["kernel"], row["arch"], str(row.get("function"))

    compared = [{function(pair[side]) for pair in pairs} for side in (0, 1)]
    strangers = {function(row)[:2] for row in new if function(row) not in compared[1]}
    text = "nothing could be compared: it is not clear what took the place of its configurations"
    return [
        Finding(" ".join(name), "function", n, 0, True, text)
        for name, n in sorted(Counter(map(function, old)).items())
        if name not in compared[0] and (name[:2] in strangers or not pairs)
    ]


def _compare_rows(
    before: Mapping[str, Any], after: Mapping[str, Any], slack: Mapping[str, float] | None
) -> list[Finding]:
    """Of one kernel; without ``slack`` its work is cut another way, and only what is always bad counts."""
    where = _where(after)
    if "error" in after or "error" in before:
        if "error" in after and "error" not in before:
            return [Finding(where, "compiles", 1, 0, True, f"no longer compiles: {after['error']}")]
        text = "does not compile, as before" if "error" in after else "compiles now"
        return [Finding(where, "compiles", 0, int("error" not in after), False, text)]
    found: list[Finding] = []

    def differs(what: str, old: int, new: int, worse: bool) -> None:
        if old != new:
            found.append(Finding(where, what, old, new, worse))

    for what in ("spills", "stack_bytes"):
        differs(what, before[what], after[what], after[what] > before[what])
    fewer = after["ctas_per_sm"] < before["ctas_per_sm"]
    if before["ctas_per_sm"] != after["ctas_per_sm"]:
        resources = ", ".join(
            f"{name.replace('_', ' ')} {before[name]} -> {after[name]}"
            for name in ("registers", "shared_bytes", "num_warps")
            if before[name] != after[name]
        )
        text = f"{before['ctas_per_sm']} -> {after['ctas_per_sm']} blocks fit a multiprocessor ({resources})"
        lost = fewer and (slack is not None or not after["ctas_per_sm"])
        found.append(Finding(where, "ctas_per_sm", before["ctas_per_sm"], after["ctas_per_sm"], lost, text))
    if slack is None:
        return found
    differs("loops", before["n_loops"], after["n_loops"], after["n_loops"] > before["n_loops"])
    for what in _OF_KERNELS:
        if what == "instructions" and all(row[what] == row["loop"]["all"] for row in (before, after)):
            continue  # without a loop all of the kernel counts as one
        old, new = ((row if what in _FIGURES else row["loop"])[what] for row in (before, after))
        differs(what, old, new, new > old * (1 + slack[what] / 100))
    return found


def _check_new(row: Mapping[str, Any]) -> list[Finding]:
    where = _where(row)
    if "error" in row:
        return [Finding(where, "compiles", 0, 0, True, f"is new and does not compile: {row['error']}")]
    bad = []
    if row["spills"] or row["stack_bytes"]:
        bad.append(f"spills ({row['spills']} instructions, {row['stack_bytes']} bytes of stack)")
    if not row["ctas_per_sm"]:
        bad.append(f"does not fit ({row['registers']} registers, {row['shared_bytes']} bytes of shared memory)")
    text = f"is new and {' and '.join(bad)}" if bad else "is new"
    return [Finding(where, "configuration", 0, 1, bool(bad), text)]


def _compare_launches(
    name: str, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, slack: Mapping[str, float]
) -> list[Finding]:
    if before is None or after is None:
        return [Finding(name, "operation", 0, 0, False, "is new" if before is None else "is gone")]
    if "error" in after or "error" in before:
        if "error" in after and "error" not in before:
            return [Finding(name, "runs", 1, 0, True, f"can no longer be called as before: {after['error']}")]
        return [] if "error" in after else [Finding(name, "runs", 0, 1, False, "can be compared from now on")]
    found = []
    total_before, total_after = (sum(sum(row[group].values()) for group in _GROUPS) for row in (before, after))
    more = total_after > total_before  # one that takes the place of another is none more
    for group, what in _GROUPS.items():
        old, new = Counter(before[group]), Counter(after[group])
        for operation in sorted(old.keys() | new.keys()):
            a, b = old[operation], new[operation]
            if a != b:
                text = f"{what.format(operation)}: {a} -> {b}"
                found.append(Finding(name, operation, a, b, more and b > a, text))
    a, b = before["copied_bytes"], after["copied_bytes"]
    if a != b:
        found.append(Finding(name, "copied_bytes", a, b, b > a * (1 + slack["copied_bytes"] / 100)))
    return found
