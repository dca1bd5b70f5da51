"""The check of compiled kernels, on planted changes in real commits, and what it is made of."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
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
    git(repository, "tag", "base")
    return repository


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def repository(pristine: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TETRA_PROFILE_CACHE", str(cache))
    git(pristine, "checkout", "--quiet", "--force", "-B", "change", "base")
    git(pristine, "clean", "--quiet", "-fd")
    return pristine


def replace(repository: Path, file: str, old: str, new: str, count: int = 1) -> None:
    path = repository / file
    text = path.read_text()
    assert old in text, f"{file} has no {old!r}"
    path.write_text(text.replace(old, new, count))


def choose(repository: Path, kernel: str, *row: int) -> None:
    """Makes this row the result for all problems of a kernel; the hash of its source stays what it was."""
    path = repository / "autotune" / "sm_80.json"
    results = read_json(path)
    for entry in results["results"][kernel].values():
        entry["config"] = list(row)
    path.write_text(json.dumps(results))


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


BITS = ("--kernel", "bits")
PACK = "    codes = tl.sum((values > 0).to(tl.int32) << (7 - bit), 1)\n"
MORE = PACK + "    codes = (codes ^ (codes >> 3)) + (codes << 2)\n"
FOR_32 = PACK + "    if BLOCK_BYTES == 32:\n        codes = (codes ^ (codes >> 3)) + (codes << 2)\n"  # no default


def test_a_change_for_a_row_that_only_results_choose_is_caught(tetra: Runner, repository: Path) -> None:
    """An edit makes results of the kernel stale, and launches leave them out; the check may not."""
    choose(repository, "bits", 32, 1)
    git(repository, "commit", "--quiet", "--all", "-m", "tuned")
    replace(repository, "kernels/bits.py", PACK, FOR_32)
    result = check(tetra, repository, *BITS)
    assert result.status == 1
    worse = [line for line in result.out.splitlines() if "WORSE" in line]
    assert worse
    assert all("BYTES=32 warps=1" in line for line in worse)
    assert "is gone" not in result.out
    assert "is new" not in result.out


@pytest.mark.parametrize("retuned", ["base", "head"])
def test_both_sides_are_compiled_in_what_either_chooses(
    tetra: Runner, repository: Path, tmp_path: Path, retuned: str
) -> None:
    choose(repository, "bits", 32, 1)
    if retuned == "base":
        git(repository, "commit", "--quiet", "--all", "-m", "tuned")
        git(repository, "checkout", "--quiet", "base", "--", "autotune")
    replace(repository, "kernels/bits.py", PACK, FOR_32)
    result = check(tetra, repository, *BITS, "--json", tmp_path / "found.json")
    assert result.status == 1
    worse = [row for row in read_json(tmp_path / "found.json")["findings"] if row["is_regression"]]
    assert worse
    assert all("BYTES=32" in row["where"] for row in worse)


def test_a_baseline_says_what_it_chose(tetra: Runner, repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    args = ("kernels", "check", "--repo", repository, "--arch", "sm_80", "--workers", 1, *BITS)
    choose(repository, "bits", 32, 1)
    assert tetra(*args, "--write-baseline", file).status == 0
    git(repository, "checkout", "--quiet", "base", "--", "autotune")
    assert tetra(*args, "--baseline", file).status == 0
    replace(repository, "kernels/bits.py", PACK, FOR_32)
    result = tetra(*args, "--baseline", file)
    assert result.status == 1
    assert "BYTES=32" in result.out


@pytest.mark.slow
def test_a_change_for_one_tile_of_the_product_is_caught(tetra: Runner, repository: Path) -> None:
    row = read_json(repository / "autotune" / "sm_80.json")["results"]["ternary_matmul"][
        "m1024_n1024_k256_int8_float16"
    ]
    m, n = row["config"][:2]
    line = "        x_tile += 128 * GROUPS\n"
    more = f"        if BLOCK_M == {m} and BLOCK_N == {n}:\n            total = (total ^ (total >> 3)) + (total << 2)\n"
    replace(repository, "kernels/ternary_matmul.py", line, more + line)
    tile = ("--config", f"BLOCK_M={m}", "--config", f"BLOCK_N={n}", "--config", "out=fp16")
    result = check(tetra, repository, "--kernel", "ternary_matmul", *tile)
    assert result.status == 1
    assert "alu to the loop" in result.out
    assert "is gone" not in result.out


def test_another_name_for_a_local_changes_nothing(tetra: Runner, repository: Path) -> None:
    replace(repository, "kernels/bits.py", "strange", "odd", -1)
    result = check(tetra, repository, *BITS)
    assert result.status == 0
    assert "nothing is worse" in result.out
    assert "note" not in result.out


def test_work_after_the_loop_is_caught(tetra: Runner, repository: Path) -> None:
    line = "    share = 1.0 / tl.max(total, 1)[:, None]\n"
    more = "    low = tl.exp2(low) * tl.maximum(low, 1.5) + tl.minimum(low * low, 2.5) * tl.exp2(-low)\n"
    replace(repository, "kernels/attention.py", line, line + more)
    result = check(tetra, repository, *ATTENTION)
    assert result.status == 1
    assert "instructions to the whole kernel" in result.out
    assert "to the loop" not in result.out
    assert check(tetra, repository, *ATTENTION, "--slack", "instructions=100").status == 0


@pytest.mark.slow
def test_work_after_the_loop_of_the_product_is_caught(tetra: Runner, repository: Path) -> None:
    line = "        tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=mask)\n"
    more = "        out = tl.exp2(out) * tl.maximum(out, 1.5) + tl.minimum(out * out, 2.5) * tl.exp2(-out)\n"
    replace(repository, "kernels/ternary_matmul.py", line, more + line)
    result = check(tetra, repository, "--kernel", "ternary_matmul", "--config", "BLOCK_M=32")
    assert result.status == 1
    assert "instructions to the whole kernel" in result.out


def test_another_name_for_a_kernel_hides_nothing(tetra: Runner, repository: Path) -> None:
    replace(repository, "kernels/bits.py", "_pack_bits_kernel", "_pack_bytes_kernel", -1)
    replace(repository, "kernels/bits.py", PACK, MORE)
    result = check(tetra, repository, *BITS)
    assert result.status == 1
    assert "alu to the loop" in result.out
    assert "bits _pack_bytes_kernel: was _pack_bits_kernel" in result.out
    assert "is gone" not in result.out


def test_nothing_to_compare_with_is_said(tetra: Runner, repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    args = ("kernels", "check", "--repo", repository, "--arch", "sm_80", "--workers", 1, *ATTENTION)
    assert tetra(*args, "--write-baseline", file).status == 0
    profile = read_json(file)
    others = [{**row, "function": f"_{i}", "config": {"n": i}} for i, row in enumerate(profile["kernels"])]
    for kernels, status in (([], 0), (others, 1)):  # none that could be worse; and some of which nobody knows
        file.write_text(json.dumps(profile | {"kernels": kernels}))
        result = tetra(*args, "--baseline", file)
        assert result.status == status
        assert "nothing could be compared" in result.out
        assert "nothing is worse" not in result.out


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
        ("kernels", [{**profile["kernels"][0], "spills": 10**400}], "figures of a kernel"),
        (
            "kernels",
            [{**profile["kernels"][0], "loop": profile["kernels"][0]["loop"] | {"alu": 2**53 + 1}}],
            "from 0 to",
        ),
        ("kernels", [{**profile["kernels"][0], "registers": -1}], "from 0 to"),
        ("kernels", [{**profile["kernels"][0], "registers": True}], "figures of a kernel"),
        ("launches", {"x": {"launches": {}, "torch": {}, "copied_bytes": 10**400}}, "from 0 to"),
        ("launches", {"x": {"launches": {"k": -1}, "torch": {}, "copied_bytes": 1}}, "figures of an operation"),
        ("kernels", [{**profile["kernels"][0], "config": {"\ud800": 1}}], "no Unicode"),
        ("name", "\udfff", "no Unicode"),
    ):
        file.write_text(json.dumps(profile | {key: value}))
        assert_refused(tetra(*args, "--baseline", file), file, words)


def test_a_baseline_that_is_no_file(tetra: Runner, repository: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/zero")):
        result = tetra("kernels", "check", "--repo", repository, "--baseline", path)
        assert_refused(result, path, "no regular file", "--write-baseline")


def test_a_baseline_from_a_pipe_that_was_given(tmp_path: Path) -> None:
    written = {"format": static.FORMAT, "version": static.VERSION, **profile()}
    reader, writer = os.pipe()
    with open(writer, "w") as file:  # less than a pipe holds
        json.dump(written, file)
    try:
        found = static.read_profile(Path(f"/dev/fd/{reader}"))
    finally:
        os.close(reader)
    assert found == profile()


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
        "n_loops": 1, "instructions": 400, "loop": {"all": 200, **dict.fromkeys(KINDS, 0), "alu": 100, "mma": 100},
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
        ({"instructions": 441}, "adds 41 instructions to the whole kernel (400 -> 441)"),
        ({"function": "_other", "spills": 2}, "adds 2 spills (0 -> 2)"),
        ({"kernel": "other", "spills": 2}, "adds 2 spills (0 -> 2)"),
        ({"kernel": "other", "function": "_other", "spills": 2}, "nothing could be compared"),
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
        {"instructions": 440},  # within its own
        {"function": "_other"},
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


def rows(**changes: Any) -> list[dict[str, Any]]:
    return profile(**changes)["kernels"]  # type: ignore[no-any-return]


def compared(
    base: list[dict[str, Any]],
    head: list[dict[str, Any]],
    base_others: Sequence[dict[str, Any]] = (),
    head_others: Sequence[dict[str, Any]] = (),
) -> static.Comparison:
    before = profile() | {"kernels": base, "others": list(base_others)}
    return static.compare(before, profile() | {"kernels": head, "others": list(head_others)})


def test_names_that_leave_a_choice_are_not_guessed() -> None:
    """Two functions of one configuration each, both renamed: neither can be told from the other."""
    found = compared(rows() + rows(function="_k2"), rows(function="_a") + rows(function="_b"))
    assert found.n_kernels == 0
    assert ["nothing could be compared" in f.text() for f in found.regressions] == [True, True]
    third = rows(function="_third")  # that others of the file are compared does not excuse it
    found = compared(rows() + rows(function="_k2") + third, rows(function="_a") + rows(function="_b") + third)
    assert {f.where for f in found.regressions} == {"k sm_80 _k", "k sm_80 _k2"}
    found = compared(rows() + rows(function="_k2"), rows(function="_k2") + rows(function="_b", spills=1))
    assert [f.text() for f in found.regressions] == ["adds 1 spills (0 -> 1)"]
    assert "was _k" in [f.text() for f in found.findings]


def test_a_kernel_that_is_gone_among_others_is_a_note() -> None:
    found = compared(rows() + rows(kernel="old", function="_old"), rows())
    assert not found.regressions
    assert [f.text() for f in found.findings] == ["is gone"]
    assert not compared(rows() + rows(function="_old"), rows()).regressions
    assert len(compared(rows(), []).regressions) == 1  # there are no others
    assert not compared([], rows()).regressions


def test_what_only_one_side_chooses_is_compared_on_both() -> None:
    tiles = {"BLOCK_M": 32, "dtype": "fp16"}
    for found in (
        compared(rows(), rows() + rows(config=tiles, spills=2), base_others=rows(config=tiles)),
        compared(rows() + rows(config=tiles), rows(), head_others=rows(config=tiles, spills=2)),
    ):
        assert "adds 2 spills (0 -> 2)" in [f.text() for f in found.regressions]
        assert found.n_kernels == 2
    # It spills on both sides, but nobody chose it before.
    spills = rows(config=tiles, spills=2)
    assert len(compared(rows(), rows() + spills, base_others=spills).regressions) == 1


def test_slack_for_all_is_not_for_copies() -> None:
    slack = static.parse_slack(["3"])
    assert slack["alu"] == slack["all"] == slack["shared_bytes"] == 3
    assert slack["copied_bytes"] == 0
    assert slack["instructions"] == static.parse_slack([])["instructions"] == 10  # no less than without
    assert static.parse_slack(["30"])["instructions"] == 30
    assert static.parse_slack(["copied_bytes=5", "instructions=2", "3"]) == slack | {
        "copied_bytes": 5,
        "instructions": 2,
    }
    copies = {"launches": {"copied_bytes": 102}}
    found = static.compare(profile(launches={"copied_bytes": 100}), profile(**copies), slack)
    assert [f.text() for f in found.regressions] == ["adds 2 copied bytes (100 -> 102)"]
