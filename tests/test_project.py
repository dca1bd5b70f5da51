"""The rules of the house: which part may import which, and that the project's files agree with the code."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import tetra

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE_DIR: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
BESIDE = {name.removeprefix("tetra."): folder for name, folder in PACKAGE_DIR.items() if name != "tetra"}


def module_name(path: Path) -> str:
    """The import name of a file of the checkout."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "tetra" else ("tetra", *parts)).removesuffix(".__init__")


def sources() -> list[Path]:
    folders = ["tetra", *BESIDE.values()]
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Full names of all that a file imports, at the top or lazily; package.module.name for ``from``."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import; use the installed name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part_of(module: str) -> str:
    """Of ``tetra.x.y``: x if x is a folder beside tetra/, else "tetra"."""
    second = module.removeprefix("tetra.").partition(".")[0]
    return second if second in BESIDE else "tetra"


# Which parts a part may import. The command line may import all, when it runs a command that needs them.
ALLOWED = {
    "tetra": {"tetra", "kernels"},
    "kernels": {"kernels", "autotune"},
    "autotune": {"autotune", "kernels", "profiling"},
    "profiling": {"profiling", "kernels", "autotune"},
}


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_keep_to_the_parts(path: Path) -> None:
    part = part_of(module_name(path))
    for name in imports(path):
        root = name.partition(".")[0]
        assert root not in BESIDE, f"{path}: imports '{root}'; write tetra.{root}"
        if root == "triton":
            assert part in ("kernels", "autotune"), f"{path}: Triton has its home in kernels/ and autotune/"
        if root == "tetra" and not module_name(path).startswith("tetra.cli"):
            assert part_of(name) in ALLOWED[part], f"{path}: {part} may not import {name}"
        if part_of(name) != part:
            assert not re.search(r"\._", name), f"{path}: {name} is private to its part"
        if part == "autotune" and part_of(name) == "profiling":
            static = ("tetra.profiling.sass", "tetra.profiling.roofline")
            assert name.startswith(static), f"{path}: of profiling/, the tuners read compiled code and the static model"
        if part == "kernels" and part_of(name) == "autotune":
            assert name.startswith("tetra.autotune.table"), f"{path}: kernels/ knows only autotune's table"


@pytest.mark.parametrize("path", sorted((ROOT / "tetra").rglob("*.py")), ids=module_name)
def test_models_never_mention_triton(path: Path) -> None:
    assert "triton" not in path.read_text().lower()


def test_package_list_matches_the_folders() -> None:
    found = {module_name(path) for path in sources() if path.name == "__init__.py"}
    # A package without __init__.py would be left out of the wheel in silence.
    holders = {module_name(path).rpartition(".")[0] for path in sources() if path.name != "__init__.py"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found == holders | {"tetra"}
    for folder in ("kernels", "autotune", "profiling"):
        if any((ROOT / folder).rglob("*.py")):
            assert PACKAGE_DIR[f"tetra.{folder}"] == folder


def test_data_files_are_packaged() -> None:
    data: dict[str, list[str]] = PROJECT["tool"]["setuptools"]["package-data"]
    packaged = set()
    for package, patterns in data.items():
        folder = ROOT / PACKAGE_DIR.get(package, package.replace(".", "/"))
        packaged |= {path for pattern in patterns for path in folder.glob(pattern)}
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--", "tetra", *BESIDE.values()],
        capture_output=True,
        text=True,
        check=False,
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    others = {ROOT / line for line in tracked.stdout.splitlines() if not line.endswith(".py")}
    assert others <= packaged


def requirements(section: str) -> set[str]:
    """Normalised names of the distributions that an extra asks for; "" is the core."""
    project = PROJECT["project"]
    lines: list[str] = project["optional-dependencies"][section] if section else project["dependencies"]
    names = set()
    for line in lines:
        name = re.split(r"[\[<>=;! ]", line)[0]
        if name == "tetra-vpr":
            for inner in line[line.index("[") + 1 : line.index("]")].split(","):
                names |= requirements(inner)
        else:
            names.add(normalised(name))
    return names


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 can't tell which package brings a module")
def test_every_import_is_declared() -> None:
    declared = requirements("") | requirements("dev")
    distributions = importlib.metadata.packages_distributions()
    for path in sources():
        for name in imports(path):
            root = name.partition(".")[0]
            if root in sys.stdlib_module_names or root == "tetra":
                continue
            brought_by = {normalised(d) for d in distributions.get(root, [])}
            assert brought_by & declared, f"{path}: '{root}' ({brought_by or 'not installed'}) is not declared"


def test_every_requirement_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {normalised(line.split("==")[0]) for line in lines if "==" in line}
    assert requirements("") | requirements("dev") <= pinned
    for line in lines:
        assert line.startswith("#") or re.fullmatch(r'[\w.-]+==[\w.]+(; python_version (<|>=) "3\.\d+")?', line)


# What imports each command and the model need, and nothing more: run with the rest made unimportable.
HEAVY = "lightning tensorboard pytorch_metric_learning kornia transformers matplotlib faiss triton scipy sklearn"
BLOCK = f"import sys; sys.modules.update(dict.fromkeys('{HEAVY}'.split())); "


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_core_works_without_the_extras() -> None:
    code = """
import torch, tetra
from tetra import cli, datasets, evaluation, files, memory
from tetra.model import create_model
codes = create_model("nano", "gem").pack().describe(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
print(codes.shape[1])
"""
    assert python(BLOCK + code) == "256\n"


def test_the_command_line_starts_without_torch() -> None:
    assert python("import sys, tetra.cli; print('torch' in sys.modules)") == "False\n"


def test_importing_the_model_touches_no_gpu() -> None:
    code = "import torch, tetra.model, tetra.evaluation; print(torch.cuda.is_initialized())"
    assert python(code) == "False\n"


@pytest.mark.parametrize(
    ("file", "statement"),
    [("tetra/x.py", "import triton"), ("profiling/x.py", "from kernels import pack_bits")],
)
def test_linter_knows_the_rules(file: str, statement: str) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", file, "-"]
    done = subprocess.run(command, input=f"{statement}\n", cwd=ROOT, capture_output=True, text=True, check=False)
    assert "TID251" in done.stdout


def test_version_is_the_one_of_the_changelog() -> None:
    newest = re.search(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == tetra.__version__


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network from a copy of the sources (setuptools leaves files behind)."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("tetra", *BESIDE.values()):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_all_packages_and_their_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {module_name(p).replace(".", "/") + ".py" for p in sources() if p.name != "__init__.py"}
    expected |= {module_name(p).replace(".", "/") + "/__init__.py" for p in sources() if p.name == "__init__.py"}
    expected |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "tetra/assets").glob("*")}
    expected |= {p.relative_to(ROOT).as_posix() for p in (ROOT / "tetra/training/recipes").glob("*")}
    expected |= {f"tetra/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "kernels/native_src").glob("*")}
    expected |= {f"tetra/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "autotune").glob("*.json")}
    assert expected | {"tetra/py.typed"} == {n for n in names if ".dist-info/" not in n}


def test_the_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import tetra, torch
from tetra import cli, files, kernels
from tetra.autotune import table
assert tetra.__path__ == [{str(tmp_path / "tetra")!r}], tetra.__path__
assert kernels.__file__.startswith({str(tmp_path)!r})
for name in files.shipped_models():
    model = tetra.load(name)
    model.describe(torch.zeros(1, 3, *model.image_size, dtype=torch.uint8))
print("works")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "works\n", done.stderr
