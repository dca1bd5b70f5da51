"""The check of compiled kernels, on planted changes in real commits, and what it is made of."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from commands import Result, Runner, assert_refused, read_json

from tetra.profiling import static_profile as static
from tetra.profiling.sass import KINDS

ROOT = Path(__file__).resolve().parent.parent.parent
ATTENTION = ("--kernel", "attention", "--config", "head_dim=64", "--config", "tokens=576")
PRODUCT = ("--kernel", "ternary_matmul", "--config", "out=i32")

Edit = Callable[..., None]


def git(repository: Path, *args: str) -> None:
    command = ["git", "-C", str(repository), "-c", "user.name=Test", "-c", "user.email=test@localhost", *args]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one commit: the sources as they are."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    repository = tmp_path_factory.mktemp("repository")
    for name in ("kernels", "autotune", "profiling", "tetra"):
        shutil.copytree(ROOT / name, repository / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copy(ROOT / "pyproject.toml", repository)
    git(repository, "init", "--quiet")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "-m", "base")
    return repository


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def repository(pristine: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TETRA_PROFILE_CACHE", str(cache))
    git(pristine, "checkout", "--quiet", "--force", "-B", "change", "HEAD")
    git(pristine, "clean", "--quiet", "-fd")
    return pristine


def replace(repository: Path, file: str, old: str, new: str, count: int = 1) -> None:
    path = repository / file
    text = path.read_text()
    assert old in text, f"{file} has no {old!r}"
    path.write_text(text.replace(old, new, count))


def check(tetra: Runner, repository: Path, *args: object) -> Result:
    return tetra("kernels", "check", "--repo", repository, "--arch", "sm_80", "--workers", 1, "--base", "HEAD", *args)


# --- planted changes ---------------------------------------------------------------------------------------


def test_an_extra_shift_in_the_unpack_is_caught(tetra: Runner, repository: Path, tmp_path: Path) -> None:
    old, new = "shl.b32 t, $1, 4; and.b32", "shr.b32 t, $1, 1; shl.b32 t, t, 5; and.b32"
    replace(repository, "kernels/ternary_matmul.py", old, new)
    result = check(tetra, repository, *PRODUCT, "--json", tmp_path / "found.json")
    assert result.status == 1
    assert "alu to the loop" in result.out
    found = read_json(tmp_path / "found.json")
    worse = [row for row in found["findings"] if row["is_regression"]]
    assert {row["what"] for row in worse} == {"all", "alu"}
    assert all(row["head"] > row["base"] for row in worse)


@pytest.mark.slow
def test_an_improvement_is_told_and_does_not_fail(tetra: Runner, repository: Path) -> None:
    old, new = "shl.b32 t, $1, 4; and.b32", "shr.b32 t, $1, 1; shl.b32 t, t, 5; and.b32"
    replace(repository, "kernels/ternary_matmul.py", old, new)
    git(repository, "checkout", "--quiet", "-B", "worse")
    git(repository, "commit", "--quiet", "--all", "-m", "worse")
    try:
        args = ("--repo", repository, "--arch", "sm_80", "--base", "worse", "--head", "change", *PRODUCT)
        result = tetra("kernels", "check", *args)
        assert result.status == 0
        assert "removes" in result.out
        assert "note" in result.out
    finally:
        git(repository, "checkout", "--quiet", "--force", "change")


@pytest.mark.slow
def test_enough_slack_lets_it_pass(tetra: Runner, repository: Path) -> None:
    old, new = "shl.b32 t, $1, 4; and.b32", "shr.b32 t, $1, 1; shl.b32 t, t, 5; and.b32"
    replace(repository, "kernels/ternary_matmul.py", old, new)
    assert check(tetra, repository, *PRODUCT, "--slack", "50").status == 0
    assert check(tetra, repository, *PRODUCT, "--slack", "alu=50").status == 1
    assert check(tetra, repository, *PRODUCT, "--slack", "alu=50", "--slack", "all=50").status == 0


def test_a_spilling_configuration_is_caught(tetra: Runner, repository: Path) -> None:
    path = repository / "kernels" / "attention.py"
    head = path.read_text().partition("def config_for(")[2].partition("\n\n\n")[0]
    body = head.rpartition('"""\n')[0] + '"""\n    return (128, 128, 4, 2)'
    replace(repository, "kernels/attention.py", f"def config_for({head}", f"def config_for({body}")
    result = check(tetra, repository, *ATTENTION)
    assert result.status == 1
    assert "spills (0 -> " in result.out
    assert "took the place of" in result.out


def test_a_copied_rearrange_is_caught(tetra: Runner, repository: Path) -> None:
    copied = (
        "    qkv = qkv.view(b, t, 3, n_heads, head_dim).permute(2, 0, 3, 1, 4).contiguous()\n"
        "    qkv = qkv.permute(1, 3, 0, 2, 4).reshape(b, t, width)\n"
    )
    line = "    out = torch.empty((b, t, width // 3)"
    replace(repository, "kernels/attention.py", line, copied + line)
    result = check(tetra, repository, *ATTENTION)
    assert result.status == 1
    assert "attention_qkv: copy_ of PyTorch: 0 -> 2" in result.out
    assert "copied bytes" in result.out


@pytest.mark.slow
def test_a_copy_in_the_model_is_caught(tetra: Runner, repository: Path) -> None:
    replace(
        repository,
        "tetra/vit.py",
        "attention_qkv(qkv",
        "attention_qkv(qkv.transpose(0, 1).contiguous().transpose(0, 1)",
    )
    result = check(tetra, repository, *ATTENTION)
    assert result.status == 1
    assert "backbone" in result.out
    assert "copied bytes" in result.out
    assert "attention_qkv: " not in result.out


@pytest.mark.slow
def test_a_second_launch_is_caught(tetra: Runner, repository: Path) -> None:
    path = repository / "kernels" / "attention.py"
    launch = next(line for line in path.read_text().splitlines() if "_attention_kernel[grid](" in line)
    replace(repository, "kernels/attention.py", launch, f"{launch}\n{launch}")
    result = check(tetra, repository, *ATTENTION)
    assert result.status == 1
    assert "attention_qkv: launches of _attention_kernel: 1 -> 2" in result.out


def test_comments_and_docstrings_change_nothing(tetra: Runner, repository: Path) -> None:
    path = repository / "kernels" / "attention.py"
    text = path.read_text().replace('    """One step of', '    """A step, one more sentence, of')
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("def _attend("))
    lines[at - 1 : at - 1] = ["# A comment that moves", "# all that follows."]
    path.write_text("\n".join(lines) + "\n")
    result = check(tetra, repository, *ATTENTION)
    assert result.status == 0
    assert "nothing is worse" in result.out
    assert "WORSE" not in result.out
    assert "note" not in result.out


@pytest.mark.slow
def test_a_kernel_that_no_longer_compiles_is_caught(tetra: Runner, repository: Path) -> None:
    replace(
        repository,
        "kernels/attention.py",
        "    share = 1.0 / tl.max(total, 1)",
        "    share = 1.0 / tl.nonsense(total, 1)",
    )
    result = check(tetra, repository, *ATTENTION)
    assert result.status == 1
    assert "no longer compiles" in result.out


def test_a_tree_that_cannot_be_imported(tetra: Runner, repository: Path) -> None:
    (repository / "kernels" / "attention.py").write_text("this is no Python\n")
    assert_refused(check(tetra, repository, *ATTENTION), "files as they are", "SyntaxError")


def test_a_tree_is_read_alone(tetra: Runner, repository: Path, tmp_path: Path) -> None:
    """What it does not have is not taken from where TeTRA is installed."""
    (repository / "autotune" / "workloads.py").unlink()  # without it a tree only lists what its kernels' files list
    result = check(tetra, repository, "--kernel", "residual_dropout", "--json", tmp_path / "found.json")
    assert result.status == 0, result.err
    assert [row["what"] for row in read_json(tmp_path / "found.json")["findings"]], (
        "no configuration went with the file"
    )
    assert "is gone" in result.out


def test_a_second_run_reads_what_was_kept(
    tetra: Runner, repository: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(tetra, repository, *ATTENTION).status == 0
    monkeypatch.setattr(static, "_ask", None)  # a process would be needed to compile
    assert check(tetra, repository, *ATTENTION).status == 0
    for path in cache.iterdir():
        path.write_text(path.read_text()[:20])  # damaged: compiled again
    assert check(tetra, repository, *ATTENTION).status == 2


def test_a_baseline_file_stands_for_history(tetra: Runner, repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    args = ("kernels", "check", "--repo", repository, "--arch", "sm_80", "--workers", 1, *ATTENTION)
    assert tetra(*args, "--write-baseline", file).status == 0
    assert tetra(*args, "--baseline", file).status == 0
    profile = read_json(file)
    for row in profile["kernels"]:
        row["loop"]["alu"] -= 12
        row["loop"]["all"] -= 12
    file.write_text(json.dumps(profile))
    result = tetra(*args, "--baseline", file)
    assert result.status == 1
    assert "adds 12 alu to the loop" in result.out
    other = json.dumps(profile | {"about": profile["about"] | {"archs": ["sm_90"]}})
    file.write_text(other)
    assert_refused(tetra(*args, "--baseline", file), "about", "sm_90", "sm_80")
    file.write_text(json.dumps(profile | {"toolchain": {"triton": "0.1"}}))
    assert_refused(tetra(*args, "--baseline", file), "toolchain", "0.1")
    for text, word in (("{", "JSON"), ("[]", "no static profile"), ('{"format": "x"}', "no static profile")):
        file.write_text(text)
        assert_refused(tetra(*args, "--baseline", file), file, word)
    file.write_text(json.dumps(profile | {"version": 99}))
    assert_refused(tetra(*args, "--baseline", file), "99")
    file.write_text(json.dumps({k: v for k, v in profile.items() if k != "kernels"} | {"kernels": [1]}))
    assert_refused(tetra(*args, "--baseline", file), "lacks")
    for key, value, words in (
        ("kernels", [{**profile["kernels"][0], "loop": {}}], "figures of a kernel"),
        ("kernels", [{**profile["kernels"][0], "config": 5}], "figures of a kernel"),
        ("kernels", [{**profile["kernels"][0], "spills": "1"}], "figures of a kernel"),
        ("launches", {"x": [1]}, "figures of an operation"),
        ("launches", {"x": {"launches": {}, "copied_bytes": 1}}, "figures of an operation"),
    ):
        file.write_text(json.dumps(profile | {key: value}))
        assert_refused(tetra(*args, "--baseline", file), words)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--base", "no-such-branch"], ["no-such-branch", "not a revision"]),
        (["--base=--help"], ["--help", "not a revision"]),
        ([], ["--base REV", "--baseline FILE"]),
        (["--base", "HEAD", "--baseline", "x"], ["give one of them"]),
        (["--baseline", "missing.json"], ["missing.json", "No such file"]),
        (["--base", "HEAD", "--arch", "sm_1"], ["sm_1"]),
        (["--base", "HEAD", "--slack", "alu=-1"], ["slack", "alu=-1"]),
        (["--base", "HEAD", "--slack", "nonsense=1"], ["slack", "nonsense"]),
        (["--base", "HEAD", "--slack", "nan"], ["slack", "nan"]),
        (["--base", "HEAD", "--config", "BLOCK_M"], ["NAME=VALUE"]),
        (["--base", "HEAD", "--kernel", "nonsense"], ["nonsense"]),
        (["--base", "HEAD", "--repo", "/"], ["/: is in no git checkout", "--repo", "--baseline"]),
        (["--base", "HEAD", "--repo", "/nowhere"], ["/nowhere"]),
    ],
)
def test_bad_input(tetra: Runner, repository: Path, args: list[str], words: list[str]) -> None:
    where = [] if "--repo" in args else ["--repo", repository]
    assert_refused(tetra("kernels", "check", *where, *args), *words)


def test_another_repository(tetra: Runner, tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    assert_refused(tetra("kernels", "check", "--base", "HEAD", "--repo", tmp_path), "no checkout")


# --- the main loop -----------------------------------------------------------------------------------------


def test_the_loop_is_shown_line_by_line(tetra: Runner, tmp_path: Path) -> None:
    file = tmp_path / "loop.json"
    result = tetra("kernels", "loop", "attention", "--arch", "sm_80", "--config", "head_dim=64", "--json", file)
    assert result.status == 0
    row = read_json(file)
    lines = row["lines"]
    assert len(lines) == row["loop"]["all"]
    for kind in KINDS:
        assert sum(line["kind"] == kind for line in lines) == row["loop"][kind]
    assert lines[-1]["text"].startswith("BRA")  # back to the first
    assert int(lines[-1]["text"].split()[-1], 16) == lines[0]["address"]
    for line in lines:
        assert f"{line['address']:#06x}  {line['kind']}" in result.out
    for word in ("registers", "spills", "shared memory", "blocks fit", "predicted", "not measured"):
        assert word in result.out


def test_a_loop_that_there_is_not(tetra: Runner) -> None:
    assert_refused(tetra("kernels", "loop", "nonsense"), "nonsense", "attention")
    result = tetra("kernels", "loop", "attention", "--config", "head_dim=65")
    assert_refused(result, "head_dim=65", "head_dim=128|32|64|96")
    assert_refused(tetra("kernels", "loop", "attention", "--arch", "sm_75"), "sm_75")


# --- comparing profiles ------------------------------------------------------------------------------------


def profile(**changes: Any) -> dict[str, Any]:
    row = {
        "kernel": "k", "function": "_k", "arch": "sm_80", "config": {"BLOCK_M": 64, "dtype": "fp16"},
        "registers": 128, "spills": 0, "stack_bytes": 0, "shared_bytes": 4096, "ctas_per_sm": 4, "num_warps": 4,
        "n_loops": 1, "loop": {"all": 200, **dict.fromkeys(KINDS, 0), "alu": 100, "mma": 100},
    }  # fmt: skip
    launches = {"op": {"launches": {"_k": 1}, "torch": {}, "copied_bytes": 0}}
    loop = {**row["loop"], **changes.pop("loop", {})}  # type: ignore[dict-item]
    launches["op"] |= changes.pop("launches", {})
    row |= {"loop": loop, **changes}
    return {"name": "n", "toolchain": {}, "about": {}, "kernels": [row], "launches": launches}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loop": {"alu": 112, "all": 212}}, "adds 12 alu to the loop (100 -> 112)"),
        ({"spills": 2}, "adds 2 spills (0 -> 2)"),
        ({"stack_bytes": 8}, "adds 8 stack bytes"),
        ({"registers": 160, "ctas_per_sm": 3}, "4 -> 3 blocks fit a multiprocessor (registers 128 -> 160)"),
        ({"shared_bytes": 8192}, "adds 4,096 shared bytes"),
        ({"n_loops": 2}, "adds 1 loops"),
        ({"error": "boom"}, "no longer compiles: boom"),
        ({"launches": {"launches": {"_k": 1, "_copy": 1}}}, "launches of _copy: 0 -> 1"),
        ({"launches": {"torch": {"copy_": 1}, "copied_bytes": 64}}, "adds 64 copied bytes"),
        ({"launches": {"error": "boom"}}, "can no longer be called as before: boom"),
        ({"config": {"BLOCK_M": 128, "dtype": "fp16"}, "spills": 1}, "adds 1 spills"),
        ({"config": {"BLOCK_M": 128, "dtype": "bf16"}, "spills": 1}, "is new and spills"),
        ({"config": {"BLOCK_M": 128, "dtype": "bf16"}, "ctas_per_sm": 0}, "is new and does not fit"),
    ],
)
def test_what_is_worse(change: dict[str, Any], words: str) -> None:
    found = static.compare(profile(), profile(**change))
    assert any(words in finding.text() for finding in found.regressions), [f.text() for f in found.findings]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"loop": {"alu": 101, "all": 201}},  # within the slack
        {"loop": {"alu": 50, "all": 150}},
        {"registers": 130},  # no step of occupancy
        {"registers": 100, "ctas_per_sm": 5},
        {"config": {"BLOCK_M": 128, "dtype": "fp16"}, "loop": {"alu": 300, "all": 400}},  # other tiles
        {"launches": {"launches": {"_other": 1}}},  # one in place of another
    ],
)
def test_what_is_not(change: dict[str, Any]) -> None:
    assert not static.compare(profile(), profile(**change)).regressions


def test_a_step_that_shared_memory_takes_counts_too() -> None:
    found = static.compare(profile(), profile(shared_bytes=4100, ctas_per_sm=3))
    assert [f.what for f in found.regressions] == ["ctas_per_sm"]
