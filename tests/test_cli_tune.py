"""``tetra tune`` through the real command, on the CPU and for GPUs that need not be here."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Runner, assert_refused, read_json

from tetra import cli_tune
from tetra.autotune import table
from tetra.autotune.store import FOLDER_VARIABLE, Results, Store, device_identity, read_results, write_results
from tetra.autotune.workloads import Problem
from tetra.kernels import native

CPU = torch.device("cpu")
SMALL = [
    Problem("native_hamming", {"queries": 1, "rows": 2000, "n_bytes": 32}),
    Problem("native_ternary", {"m": 8, "n": 64, "k": 128}),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    if not native.available():
        pytest.skip("the C++ kernels can't be built here")
    folder = tmp_path / "cache"
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    monkeypatch.delenv(table.VARIABLE, raising=False)
    table.reset()
    yield folder
    monkeypatch.undo()
    table.reset()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Problems that take no time."""
    monkeypatch.setattr(
        cli_tune, "_problems", lambda kind, model, kernel: [p for p in SMALL if kernel in (None, p.tunable)]
    )


def keep(*kernels: str, config: tuple[int, ...] = (1 << 15, 1 << 20), **changes: Any) -> Path:
    """Results of this machine's CPU in the user's cache, as ``tetra tune measure`` writes them."""
    identity = device_identity(CPU)
    for kernel in kernels:
        key = native.hamming_key(1, 10_000, 32, torch.get_num_threads())
        hashes = {table.module_of(kernel): table.current_hash("native")}
        Store().add(identity, hashes, kernel, key, {"config": list(config), "measured_us": 5.0})
    table.reset()
    return Store().path_of(identity)


def test_measure_show_verify_and_clear(tetra: Runner, tmp_path: Path, cache: Path, small: None) -> None:
    result = tetra("tune", "measure", "--device", "cpu", "--budget", "300", "--json", tmp_path / "m.json")
    assert result.status == 0, result.err
    assert "2 measured in" in result.out
    found = read_json(tmp_path / "m.json")
    assert [row["kernel"] for row in found["finished"]] == ["native_hamming", "native_ternary"]
    assert Path(found["file"]).parent == cache
    assert read_results(found["file"]).results.keys() == {"native_hamming", "native_ternary"}

    result = tetra("tune", "measure", "--device", "cpu")
    assert "0 measured in" in result.out
    assert "2 were there already" in result.out

    result = tetra("tune", "show", "--device", "cpu", "--json", tmp_path / "s.json")
    rows = read_json(tmp_path / "s.json")
    assert [row["origin"] for row in rows] == ["user", "user"]
    assert [row["config"] for row in rows] == [row["config"] for row in found["finished"]]
    assert all(row["file"] == found["file"] for row in rows)
    assert f"user: {found['file']}" in result.out

    result = tetra("tune", "verify", "--device", "cpu", "--json", tmp_path / "v.json")
    assert result.status == 0, result.err
    verdicts = read_json(tmp_path / "v.json")
    assert [row["origin"] for row in verdicts["verdicts"]] == ["user", "user"]
    assert verdicts["largest_regret"] >= 1
    assert "2 verified, largest regret" in result.out

    assert tetra("tune", "clear", "--kernel", "native_ternary", "--yes").out == f"{cache}: 1 results removed\n"
    assert read_results(found["file"]).results.keys() == {"native_hamming"}
    assert tetra("tune", "clear", "--yes").out == f"{cache}: 1 results removed\n"
    assert tetra("tune", "clear", "--yes").out == f"{cache}: 0 results removed\n"


def test_a_small_budget_reports_what_is_left(tetra: Runner, tmp_path: Path, small: None) -> None:
    result = tetra("tune", "measure", "--device", "cpu", "--budget", "0.01", "--json", tmp_path / "m.json")
    assert result.status == 0
    assert "did not suffice for 2 problems; the same command goes on with them" in result.err
    assert read_json(tmp_path / "m.json")["unfinished"] == [
        ["native_hamming", "q1_r2048_b32_t1"],
        ["native_ternary", "m8_n64_k128_t1"],
    ]


def test_bad_arguments(tetra: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("measure", "verify"):
        assert_refused(tetra("tune", command, "--device", "cpu", "--budget", "0"), "budget: is 0 seconds")
        assert_refused(tetra("tune", command, "--device", "cpu", "--kernel", "warp"), "'warp'", "native_rows")
        assert_refused(tetra("tune", command, "--device", "cpu", "--arch", "vit-x"), "'vit-x'", "nano")
        assert_refused(tetra("tune", command, "--device", "moon"), "--device 'moon'")
        assert_refused(tetra("tune", command, "--device", "cpu", "--json", tmp_path / "no" / "x"), "does not exist")
    for command in ("static", "show"):
        assert_refused(tetra("tune", command, "--arch", "sm_99"), "sm_99 is unknown", "sm_80")
        assert_refused(tetra("tune", command, "--arch", "volta"), "'volta'", "sm_80")
    assert_refused(tetra("tune", "static"), "--arch")
    assert_refused(tetra("tune", "static", "--arch", "sm_80", "--kernel", "warp"), "'warp'", "attention")
    assert_refused(tetra("tune", "static", "--arch", "sm_80", "-o", tmp_path / "no" / "x"), "does not exist")
    assert_refused(tetra("tune", "show", "--arch", "sm_80", "--device", "cpu"), "name one of them")
    assert_refused(tetra("tune", "show", "--explain", "--device", "cpu"), "--arch")
    monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: SIM115
    assert_refused(tetra("tune", "clear"), "add --yes")


def test_an_unwritable_cache(tetra: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "file" / "below"))
    result = tetra("tune", "measure", "--device", "cpu")
    assert_refused(result, tmp_path / "file" / "below", "set TETRA_TUNING_DIR to a folder that can be written")
    result = tetra("tune", "show", "--device", "cpu")
    assert result.status == 0
    assert "first row" in result.out


def test_without_a_compiler(tetra: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    with native.switched_off():
        assert_refused(tetra("tune", "measure", "--device", "cpu"), "install a compiler")
        assert_refused(tetra("tune", "verify", "--device", "cpu"), "install a compiler")
        assert tetra("tune", "show", "--device", "cpu", "--kernel", "native_rows").status == 0


def test_show_for_a_gpu_that_is_not_here(tetra: Runner, tmp_path: Path) -> None:
    result = tetra("tune", "show", "--arch", "sm_80", "--kernel", "attention", "--json", tmp_path / "s.json")
    assert result.status == 0, result.err
    rows = read_json(tmp_path / "s.json")
    assert rows
    assert {row["kernel"] for row in rows} == {"attention"}
    assert {row["origin"] for row in rows} <= {"shipped static", "first row"}


def test_switched_off(tetra: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    keep("native_hamming")
    assert "user" in tetra("tune", "show", "--device", "cpu", "--kernel", "native_hamming").out
    monkeypatch.setenv(table.VARIABLE, "off")
    table.reset()
    result = tetra("tune", "show", "--device", "cpu", "--kernel", "native_hamming")
    assert "TETRA_TUNING is off" in result.out
    assert "user" not in result.out


# --- files -----------------------------------------------------------------------------------------------------


def test_export_and_import(tetra: Runner, tmp_path: Path, cache: Path) -> None:
    path = keep("native_hamming")
    file = tmp_path / "mine.json"
    assert tetra("tune", "export", file, "--device", "cpu").out == f"{file}: 1 results\n"
    before = path.read_bytes()
    assert tetra("tune", "clear", "--yes").status == 0
    assert_refused(tetra("tune", "export", tmp_path / "none.json", "--device", "cpu"), "holds no results for cpu")
    result = tetra("tune", "import", file, "--json", tmp_path / "i.json")
    assert result.out == "native_hamming: 1 results\n"
    assert read_json(tmp_path / "i.json") == {"accepted": {"native_hamming": 1}, "refused": []}
    assert path.read_bytes() == before
    # It adds to what is there.
    keep("native_hamming", config=(1 << 16, 1 << 20))
    Store().add(device_identity(CPU), {}, "native_hamming", "other", {"config": [1, 2]})
    assert tetra("tune", "import", file).status == 0
    entries = read_results(path).results["native_hamming"]
    assert [entry["config"] for entry in entries.values()] == [[1 << 15, 1 << 20], [1, 2]]


def test_imports_that_would_not_count_are_refused(tetra: Runner, tmp_path: Path, cache: Path) -> None:
    path = keep("native_hamming")
    good = json.loads(path.read_bytes())
    path.unlink()

    def changed(**changes: Any) -> Path:
        file = tmp_path / "changed.json"
        file.write_text(json.dumps(good | changes))
        return file

    for change, words in (
        ({"device": good["device"] | {"instructions": "abacus"}}, "instructions was abacus, here it is"),
        ({"device": good["device"] | {"name": "Another CPU"}}, "there is no Another CPU here"),
        ({"kernels": {"native": "older"}}, "its source has changed since"),
        ({"results": {"warp": {"k": {"config": [1]}}}}, "this release has no such kernel"),
        ({"kernels": {"warp": "x"}, "results": {"warp": {"k": {"config": [1]}}}}, "this release has no such kernel"),
        ({"origin": "static", "device": {"kind": "cuda", "name": "x", "arch": "sm_80"}}, "it runs on cpu"),
        ({"results": {"native_hamming": {"k": {"config": [1]}}}}, "[1] is no configuration (BYTES_A_BLOCK"),
        ({"results": {"native_hamming": {"k": {"config": [1, "x"]}}}}, "is no configuration"),
    ):
        file = changed(**change)
        result = tetra("tune", "import", file)
        assert result.status == 2
        assert words in result.err
        assert "refused" in result.err
        assert f"error: {file}: nothing was imported" in result.err
    for arch in ("sm_999", "sm_" + "9" * 5000):
        file = changed(origin="static", device={"kind": "cuda", "name": "x", "arch": arch})
        assert_refused(tetra("tune", "import", file), arch)
    assert not cache.exists() or not list(cache.glob("*.json"))
    # One bad kernel doesn't keep the good ones out.
    both = good["results"] | {"warp": {"k": {"config": [1]}}}
    result = tetra("tune", "import", changed(results=both))
    assert result.status == 0
    assert result.out == "native_hamming: 1 results\n"
    assert "note: warp: refused: this release has no such kernel" in result.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is no JSON"),
        (b'{"format": "tetra-tuning", "version": 9}', "version 9 of the format"),
        (b'{"some": "json"}', "holds no tuning results"),
        (b'{"format": "tetra-tuning", "vers', "only a part"),
    ],
)
def test_files_that_are_no_results(tetra: Runner, tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content)
    assert_refused(tetra("tune", "import", file), file, words)
    assert_refused(tetra("tune", "diff", file, file), file, words)
    assert_refused(tetra("tune", "import", tmp_path / "none.json"), "none.json: can't be read")


def test_diff(tetra: Runner, tmp_path: Path) -> None:
    path = keep("native_hamming")
    file = tmp_path / "other.json"
    found = read_results(path)
    ((key, _),) = found.results["native_hamming"].items()
    found.results = {"native_hamming": {key: {"config": [1 << 17, 1 << 20]}, "new": {"config": [1, 2]}}}
    write_results(file, found)
    result = tetra("tune", "diff", "user", file, "--device", "cpu", "--json", tmp_path / "d.json")
    assert result.status == 0, result.err
    assert "2 problems differ, 0 are the same" in result.out
    assert read_json(tmp_path / "d.json") == [
        {"kernel": "native_hamming", "key": "new", "first": None, "second": [1, 2]},
        {"kernel": "native_hamming", "key": key, "first": [1 << 15, 1 << 20], "second": [1 << 17, 1 << 20]},
    ]
    assert "0 problems differ, 2 are the same" in tetra("tune", "diff", file, file).out
    assert "0 problems differ, 1 are the same" in tetra("tune", "diff", "user", "user", "--device", "cpu").out
    assert_refused(tetra("tune", "diff", "shipped", file, "--device", "cpu"), "there are no shipped results for cpu")
    assert_refused(tetra("tune", "diff", "sm_99", file), "no shipped results for sm_99")
    assert_refused(tetra("tune", "diff", tmp_path / "none", file), "can't be read")


def test_static_predictions_can_be_the_users(tetra: Runner, tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "static.json"
    results = {"attention": {"some": {"config": [64, 64, 4, 2], "predicted_us": 3.0}}}
    device = {"kind": "cuda", "name": "A100", "arch": "sm_80"}
    hashes = {"attention": table.current_hash("attention")}
    write_results(file, Results("static", device, {}, hashes, results, "static, unmeasured"))
    assert tetra("tune", "import", file).out == "attention: 1 results\n"
    assert table.lookup("attention", 80, "some", ((1, 1, 1, 1), (64, 64, 4, 2))) == (64, 64, 4, 2)
    assert read_results(cache / "static-sm_80.json").note == "static, unmeasured"


@pytest.mark.slow
def test_static_through_the_command(tetra: Runner, tmp_path: Path, cache: Path) -> None:
    arguments = ("tune", "static", "--arch", "sm_80", "--kernel", "sign_similarity")
    result = tetra(*arguments, "-o", tmp_path / "sm_80.json", "--json", tmp_path / "j.json")
    assert result.status == 0, result.err
    assert "PREDICTED" in result.out
    found = read_results(tmp_path / "sm_80.json")
    assert found.origin == "static"
    assert found.results.keys() == {"sign_similarity"}
    assert read_json(tmp_path / "j.json") == read_json(tmp_path / "sm_80.json")
    result = tetra(*arguments)  # from the cache, and into the user's
    assert "0 candidates compiled" in result.out
    assert (cache / "static-sm_80.json").is_file()
    result = tetra("tune", "show", "--arch", "sm_80", "--kernel", "sign_similarity", "--explain")
    assert result.status == 0, result.err
    assert "PREDICTED" in result.out


def test_times_that_are_none(tetra: Runner, tmp_path: Path) -> None:
    path = keep("native_hamming")
    good = json.loads(path.read_bytes())
    for us in ("soon", None, [1], math.nan, 10**400):
        (entry,) = good["results"]["native_hamming"].values()
        entry |= {"measured_us": us, "predicted_us": us}
        path.write_text(json.dumps(good))
        table.reset()
        result = tetra("tune", "show", "--device", "cpu", "--kernel", "native_hamming", "--json", tmp_path / "s.json")
        assert result.status == 0, result.err
        assert "user" in {row["origin"] for row in read_json(tmp_path / "s.json")}


def test_equal_numbers_written_otherwise_are_of_this_device(tetra: Runner, tmp_path: Path, cache: Path) -> None:
    path = keep("native_hamming")
    value = json.loads(path.read_bytes())
    value["device"]["cores"] = float(value["device"]["cores"])
    path.unlink()
    (tmp_path / "x.json").write_text(json.dumps(value))
    assert tetra("tune", "import", tmp_path / "x.json").status == 0
    assert list(cache.glob("*.json")) == [path]


def test_diff_of_one_kernel(tetra: Runner) -> None:
    assert_refused(tetra("tune", "diff", "sm_80", "sm_86", "--kernel", "warp"), "'warp'", "attention")
    assert_refused(tetra("tune", "diff", "sm_80", "sm_" + "9" * 400), "can't be read")
    one, every = (tetra("tune", "diff", "sm_80", "sm_80", *more).out for more in (("--kernel", "bits"), ()))
    assert int(one.split()[3]) < int(every.split()[3])
