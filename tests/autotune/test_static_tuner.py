"""The static tuner: real compilations of small kernels, refusals, ranking, what is kept, and the shipped results."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from tetra.autotune import measured_tuner, static_tuner, table
from tetra.autotune.hardware import CHIPS, PRODUCTS, product_of
from tetra.autotune.source import kernel_hash, toolchain
from tetra.autotune.static_model import MEMORY_LATENCY, OVERLAP_LOST, TERMS, Code, predict, refusal
from tetra.autotune.static_tuner import LEAST_GAIN_S, MARGIN, StaticResult, compile_one, explain, save, tune_static
from tetra.autotune.store import read_results
from tetra.autotune.workloads import Problem, problems
from tetra.config import BACKBONES
from tetra.kernels import bits
from tetra.kernels.ahead_of_time import ARCHITECTURES, compile_for
from tetra.kernels.specimen import Specimen
from tetra.kernels.tunable import Work, all_tunables
from tetra.profiling.roofline import LAUNCH_OVERHEAD_S, unit_clocks
from tetra.profiling.sass import report

A100 = PRODUCTS["A100 SXM 80GB"]
BITS = Problem("bits", {"rows": 8, "d": 4096, "dtype": "float16", "checked": False})
MANY_BITS = Problem("bits", {"rows": 10_000, "d": 8192, "dtype": "float16", "checked": False})
WEIGHT = Problem("blend_weight", {"n": 1 << 20, "x": "float32", "y": "bfloat16"})
ROOT = Path(static_tuner.__file__).parent


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("static")


@pytest.fixture(scope="module")
def result(cache: Path) -> StaticResult:
    """Of three kernels, compiled by two processes."""
    calls: list[tuple[int, int, str]] = []
    found = tune_static(80, [BITS, MANY_BITS, WEIGHT], workers=2, cache_dir=cache, progress=lambda *a: calls.append(a))
    assert [done for done, _, _ in calls] == list(range(1, found.compiled + 1))
    assert {total for _, total, _ in calls} == {found.compiled}
    assert {text for _, _, text in calls} == {"bits", "blend_weight"}
    return found


def test_code_that_problems_share_is_compiled_once(result: StaticResult) -> None:
    tables = {name: len(all_tunables()[name].space(80, {})) for name in ("bits", "blend_weight")}
    assert result.compiled == sum(tables.values())
    assert result.cached == 0
    assert len(result.ranked["bits"]) == 2


def test_every_candidate_is_ranked_or_refused(result: StaticResult) -> None:
    for name, by_key in result.ranked.items():
        for key, ranked in by_key.items():
            rows = [one.config for one in ranked] + [one.config for one in result.rejected[name][key]]
            assert sorted(rows) == sorted(all_tunables()[name].space(80, {}))
            assert [one.seconds for one in ranked] == sorted(one.seconds for one in ranked)
            assert result.top(name, key, 2)[0] == result.chosen(name, key).config  # type: ignore[union-attr]


def test_the_second_time_nothing_is_compiled(result: StaticResult, cache: Path) -> None:
    again = tune_static(80, [BITS, MANY_BITS, WEIGHT], workers=2, cache_dir=cache)
    assert (again.compiled, again.cached) == (0, result.compiled)
    assert again.document() == result.document()
    assert again.seconds < result.seconds


def test_a_change_of_one_kernel_compiles_that_kernel(
    result: StaticResult, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = static_tuner.function_hash

    def changed(module: str, name: str) -> str:
        return "0" * 16 if module == "bits" else before(module, name)

    monkeypatch.setattr(static_tuner, "function_hash", changed)
    for path in (cache / "sm_80").iterdir():  # as the cache was before the change
        target = cache.parent / "copied" / "sm_80" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())
    again = tune_static(80, [BITS, WEIGHT], workers=1, cache_dir=cache.parent / "copied")
    assert again.compiled == len(all_tunables()["bits"].space(80, {}))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"stamp": 1}', '{"stamp": null, "codes": {}}'])
def test_a_damaged_cache_is_made_again(result: StaticResult, tmp_path: Path, content: str) -> None:
    file = tmp_path / "sm_80" / "blended_linear.json"
    file.parent.mkdir()
    file.write_text(content)
    found = tune_static(80, [WEIGHT], workers=1, cache_dir=tmp_path)
    assert found.compiled == 6
    assert found.ranked["blend_weight"] == result.ranked["blend_weight"]
    assert tune_static(80, [WEIGHT], workers=1, cache_dir=tmp_path).compiled == 0


def test_another_compiler_compiles_again(cache: Path, result: StaticResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_tuner, "toolchain", lambda: {"triton": "9.9", "ptxas": "1.2"})
    other = cache.parent / "other"
    (other / "sm_80").mkdir(parents=True)
    (other / "sm_80" / "blended_linear.json").write_text((cache / "sm_80" / "blended_linear.json").read_text())
    assert tune_static(80, [WEIGHT], workers=1, cache_dir=other).compiled == 6


def test_a_folder_that_cannot_be_written_is_a_notice(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = tune_static(80, [WEIGHT], workers=1, cache_dir=tmp_path / "file")
    assert found.compiled == 6
    assert found.ranked["blend_weight"]
    (notice,) = found.notices
    assert "can't be kept" in notice
    assert str(tmp_path) in notice


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="sm_75 is not supported"):
        tune_static(75, [])
    with pytest.raises(ValueError, match="sm_99 is unknown; wanted one of sm_80"):
        tune_static(99, [])
    with pytest.raises(ValueError, match="workers: is 0"):
        tune_static(80, [], workers=0)
    with pytest.raises(ValueError, match="'matmul' can't be tuned; wanted one of attention"):
        tune_static(80, [Problem("matmul", {})])
    with pytest.raises(ValueError, match="H200 is sm_90, not sm_80"):
        tune_static(80, [], product=PRODUCTS["H200"])


def test_the_document(result: StaticResult, tmp_path: Path) -> None:
    save(result, tmp_path / "deep" / "sm_80.json")
    found = json.loads((tmp_path / "deep" / "sm_80.json").read_text())
    assert found == result.document()
    assert (found["format"], found["version"], found["origin"]) == ("tetra-tuning", 1, "static")
    assert found["note"] == "static, unmeasured"
    assert found["device"] == {"kind": "cuda", "arch": "sm_80", "name": A100.name}
    assert found["toolchain"] == toolchain()
    assert found["kernels"] == {m: kernel_hash(m) for m in ("bits", "blended_linear")}
    entry = found["results"]["bits"][BITS.key]
    assert tuple(entry["config"]) in all_tunables()["bits"].space(80, {})
    assert entry["predicted_us"] > 1


def test_what_is_ranked_is_what_the_measured_tuner_tries_first(
    result: StaticResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(result, tmp_path / "sm_80.json")
    source = table.Source("shipped static", tmp_path / "sm_80.json", read_results(tmp_path / "sm_80.json"))
    monkeypatch.setattr(table, "sources", lambda arch, device: (source,))
    for name in ("bits", "blend_weight"):
        for key, ranked in result.ranked[name].items():
            found = measured_tuner.predicted(all_tunables()[name], key, torch.device("cpu"))
            assert found == result.top(name, key, 99)
            assert sorted(found) == sorted(one.config for one in ranked)
            assert found[0] == result.chosen(name, key).config  # type: ignore[union-attr]


def test_explanations_have_every_term(result: StaticResult) -> None:
    rows = explain(result, "bits", MANY_BITS.key)
    assert len(rows) == 5
    assert rows[0]["share_of_best"] == 1
    assert sum(row["chosen"] for row in explain(result, "bits", MANY_BITS.key, 99)) == 1
    for row in rows:
        assert set(row["terms_us"]) == set(TERMS)
        assert row["config"].keys() == {"BLOCK_BYTES", "num_warps"}
        largest = max(row["terms_us"].values())
        others = sum(row["terms_us"].values()) - largest
        assert row["terms_us"][row["limit"]] == largest
        assert row["predicted_us"] == pytest.approx(largest + OVERLAP_LOST * others + 1e6 * LAUNCH_OVERHEAD_S)
        assert row["blocks_per_sm"] >= 1
        assert row["waves"] == pytest.approx(row["blocks"] / (A100.n_sms * row["blocks_per_sm"]))
    with pytest.raises(ValueError, match=f"no prediction of bits nothing; there are .*{BITS.key}"):
        explain(result, "bits", "nothing")
    with pytest.raises(ValueError, match="no prediction of attention x; there are bits"):
        explain(result, "attention", "x")


# --- the model -----------------------------------------------------------------------------------------------

CODE = Code(
    registers=64,
    stack_bytes=0,
    spills=0,
    shared_bytes=32 * 1024,
    num_warps=4,
    loop={"IMMA.16832.S8.S8.SAT": 64, "LDSM.16.M88.4": 8, "LDGSTS.E.BYPASS.128": 4, "LOP3.LUT": 20, "BAR.SYNC": 1},
    outside={"STG.E.128": 8, "FMUL": 40},
)
SPECIMEN = Specimen("none", {}, None, {}, {}, {"num_stages": 3})
MACS = 4 * 64 * 16 * 8 * 32
WORK = Work(SPECIMEN, blocks=216, iterations=10, macs=MACS, operations=1, n_bytes=1000, dtype="int8")


def test_the_formula_by_hand() -> None:
    found = predict(WORK, CODE, A100)
    clock = 1.41e9
    # 216 blocks on 108 multiprocessors: two in turn. 4 warps, 10 iterations.
    assert found.terms["tensor"] * clock == pytest.approx(2 * 10 * MACS / 2048, rel=1e-2)
    assert found.terms["alu"] * clock == pytest.approx(2 * 10 * 4 * 20 * 32 / 64 + 2 * 10 * 4 * 32 / 64 * 0, rel=1e-6)
    assert found.terms["shared"] * clock == pytest.approx(2 * 10 * 4 * (8 * 512 + 4 * 512) / 128)
    assert found.terms["l2"] * clock == pytest.approx(2 * (10 * 4 * 4 * 512 + 4 * 8 * 512) / 64)
    assert found.terms["memory"] == pytest.approx(1000 / 2039e9)
    # All resident at once: one wave. An iteration: the tensor cores, which take longer than half the memory's latency,
    # and waits for shared memory, product and barrier.
    assert found.blocks_per_sm == 4
    iteration = max(MACS / 2048, MEMORY_LATENCY / 2) + 30 + 35 + 30
    once = MEMORY_LATENCY + 4 * 8 * 512 / 64
    assert found.terms["latency"] * clock == pytest.approx(10 * iteration + once, rel=1e-2)
    assert found.limit == "tensor"
    largest = found.terms["tensor"]
    others = sum(found.terms.values()) - largest
    assert found.seconds == pytest.approx(largest + 0.1 * others + 1e-6)
    assert found.waves == pytest.approx(0.5)


def test_waves_are_whole() -> None:
    one, two = (predict(replace(WORK, blocks=blocks), CODE, A100) for blocks in (108, 109))
    assert two.terms["tensor"] == pytest.approx(2 * one.terms["tensor"])
    assert two.terms["latency"] == one.terms["latency"]  # both are resident


def test_fewer_resident_blocks_hide_less() -> None:
    many = replace(WORK, blocks=108 * 8)
    roomy = predict(many, CODE, A100)
    cramped = predict(many, replace(CODE, shared_bytes=100 * 1024), A100)
    assert (roomy.blocks_per_sm, cramped.blocks_per_sm) == (4, 1)
    assert cramped.terms["latency"] == pytest.approx(4 * roomy.terms["latency"])
    assert cramped.terms["tensor"] == roomy.terms["tensor"]
    assert cramped.limit == "latency"


def test_more_stages_wait_less() -> None:
    fast = replace(CODE, loop={"LDGSTS.E.BYPASS.128": 1, "IMMA.16832.S8.S8.SAT": 1})
    work = replace(WORK, macs=0)
    waits = [
        predict(replace(work, specimen=replace(SPECIMEN, options={"num_stages": n})), fast, A100).terms["latency"]
        for n in (2, 3, 5)
    ]
    assert waits[0] > waits[1] > waits[2]
    direct = replace(fast, loop={"LDG.E.128": 1, "IMMA.16832.S8.S8.SAT": 1})
    assert predict(work, direct, A100).terms["latency"] > waits[0]


def test_unrolled_loops_run_less_often() -> None:
    twice = replace(CODE, loop={name: 2 * n for name, n in CODE.loop.items()})
    assert predict(WORK, twice, A100).terms["tensor"] == pytest.approx(predict(WORK, CODE, A100).terms["tensor"])


@pytest.mark.parametrize("config", [(1, 256, 4, 5), (1, 512, 4, 5), (8, 256, 8, 2)])
def test_loops_of_popcounts_that_the_compiler_unrolls(config: tuple[int, ...]) -> None:
    """Of the search: whatever is unrolled, all popcounts are counted once."""
    sizes = {"n_queries": 8, "n_rows": 200_000, "n_bytes": 1024, "k": 25}
    (work,) = all_tunables()["hamming_popcount"].works(80, A100.n_sms, sizes, config)  # type: ignore[misc]
    code = Code.of(report(compile_for(work.specimen, 80)))
    in_turn = -(-work.blocks // A100.n_sms)
    popcounts = in_turn * work.iterations * config[0] * config[1] * 16 // 4
    special = predict(work, code, A100).terms["special"]
    assert special * 1.41e9 == pytest.approx(popcounts / CHIPS[80].popc_per_clock, rel=0.1)


def test_old_products_are_slower_on_new_chips() -> None:
    assert predict(WORK, CODE, PRODUCTS["H200"]).terms["tensor"] * 1.83e9 == pytest.approx(
        2 * 10 * MACS / 4096 / 0.63, rel=1e-2
    )


@pytest.mark.parametrize(
    ("code", "work", "reason"),
    [
        (CODE, WORK, None),
        (replace(CODE, spills=12), WORK, "spills: 12 local loads and stores, 0 bytes of stack"),
        (replace(CODE, stack_bytes=8), WORK, "spills: 0 local loads and stores, 8 bytes of stack"),
        (replace(CODE, shared_bytes=200_000), WORK, "200000 bytes of shared memory a block, at most 166912 on sm_80"),
        (replace(CODE, registers=255, num_warps=16), WORK, "no block fits a multiprocessor: 16 warps of 255 registers"),
        (CODE, replace(WORK, resident=5), "4 blocks fit a multiprocessor, but the launch counts on 5"),
        (replace(CODE, loop={"BAR.SYNC": 1}), WORK, "no tensor-core instruction in the main loop"),
        (replace(CODE, loop={"BAR.SYNC": 1}), replace(WORK, macs=0), None),
    ],
)
def test_refusals(code: Code, work: Work, reason: str | None) -> None:
    assert refusal(work, code, A100) == reason


def test_what_was_read_survives_json() -> None:
    assert Code(**json.loads(json.dumps(asdict(CODE)))) == CODE
    assert CODE.loop_kinds == {"mma": 64, "ldsm": 8, "ldgsts": 4, "alu": 20, "barrier": 1}
    assert CODE.resident(A100) == 4


def test_real_code_gives_what_the_roofline_gives() -> None:
    specimen = bits.specimens(80)[0]
    found = report(compile_for(specimen, 80))
    code = Code.of(found)
    assert code.resident(A100) == found.blocks_per_sm
    clocks = code.clocks(A100, replace(WORK, dtype="fp32", macs=0))
    for taken, instructions in ((clocks.loop, found.loop), (clocks.once, found.outside)):
        assert taken == pytest.approx(unit_clocks(instructions, found.num_warps, A100))


# --- candidates that are planted -----------------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    tunable = replace(all_tunables()[name], **changes)
    monkeypatch.setattr(static_tuner, "all_tunables", lambda: {**all_tunables(), name: tunable})


def test_candidates_that_spill_or_do_not_fit_or_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good, spilling, large, broken = (
        (64, 64, 1, 1, 4, 3),
        (128, 64, 1, 1, 1, 2),
        (128, 128, 2, 1, 4, 4),
        (48, 64, 1, 1, 4, 3),
    )
    plant(monkeypatch, "ternary_matmul", space=lambda arch, sizes: (good, spilling, large, broken))
    plain = {"bias": True, "gelu": False, "residual": False, "scaled": False, "x": "int8", "out": "float16"}
    problem = Problem("ternary_matmul", {"m": 530, "n": 768, "k": 768, **plain})
    found = tune_static(86, [problem], workers=1, cache_dir=tmp_path)
    assert [one.config for one in found.ranked["ternary_matmul"][problem.key]] == [good]
    reasons = {one.config: one.reason for one in found.rejected["ternary_matmul"][problem.key]}
    assert reasons[spilling].startswith("spills: ")
    assert "bytes of shared memory a block, at most 101376 on sm_86" in reasons[large]
    assert reasons[broken].startswith("does not compile: ")
    assert "power of 2" in reasons[broken]
    entry = found.document()["results"]["ternary_matmul"][problem.key]
    assert entry["config"] == list(good)
    assert len(entry["rejected"]) == 3
    assert entry["rejected"][0].startswith("128x64x1x1x1x2: spills")


def test_where_all_are_refused_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plant(monkeypatch, "bits", space=lambda arch, sizes: ((48, 1),))
    found = tune_static(80, [BITS], workers=1, cache_dir=tmp_path)
    assert found.chosen("bits", BITS.key) is None
    assert found.top("bits", BITS.key, 5) == []
    assert found.document()["results"] == {}
    assert explain(found, "bits", BITS.key) == []


def test_the_default_stays_unless_another_row_is_clearly_faster(result: StaticResult) -> None:
    key = MANY_BITS.key
    ranked = result.ranked["bits"][key]
    first, second = ranked[0], ranked[1]
    long = replace(first, seconds=1e-3)
    near = replace(second, seconds=1e-3 / (MARGIN + 0.01))
    far = replace(second, seconds=1e-3 / (MARGIN - 0.01))
    short = replace(first, seconds=2e-6)
    a_little = replace(second, seconds=2e-6 + 0.9 * LEAST_GAIN_S)  # 18%, but of next to nothing
    enough = replace(second, seconds=2e-6 + 1.1 * LEAST_GAIN_S)
    for best, slower, wanted in (
        (long, near, near),
        (long, far, long),
        (short, a_little, a_little),
        (short, enough, short),
    ):
        one = StaticResult(
            80, A100, {"bits": {key: [best, slower]}}, {"bits": {key: []}}, {"bits": {key: second.config}}
        )
        assert one.chosen("bits", key) == wanted
        assert one.top("bits", key, 1) == [wanted.config]


# --- processes -----------------------------------------------------------------------------------------------


def killed(task: Any, arch: int) -> Code | str:
    """A compiler that crashes on one of the configurations."""
    if task.config == (512, 8):
        os.kill(os.getpid(), signal.SIGKILL)
    return compile_one(task, arch)


def test_a_compiler_that_crashes_takes_nothing_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(static_tuner, "compile_one", killed)
    found = tune_static(80, [BITS], workers=2, cache_dir=tmp_path)
    assert [(one.config, one.reason) for one in found.rejected["bits"][BITS.key]] == [
        ((512, 8), "the compiler's process died")
    ]
    assert len(found.ranked["bits"][BITS.key]) == len(all_tunables()["bits"].space(80, {})) - 1


INTERRUPTED = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background processes ignore
from tetra.autotune.static_tuner import tune_static
from tetra.autotune.workloads import problems
from tetra.config import BACKBONES

def main():
    def progress(done, total, text):
        print(done, flush=True)
    try:
        tune_static(80, problems({"nano": BACKBONES["nano"]}, (1,), (8,)), workers=2, progress=progress,
                    cache_dir=Path(sys.argv[1]))
    except KeyboardInterrupt:
        print("stopped", flush=True)

if __name__ == "__main__":
    main()
"""


def test_ctrl_c_stops_all_processes_and_keeps_what_was_read(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(INTERRUPTED)
    root = str(Path(__file__).resolve().parents[2])
    running = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "cache")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root, "TRITON_CACHE_DIR": str(tmp_path / "triton")},
        start_new_session=True,
    )
    assert running.stdout is not None
    try:
        assert running.stdout.readline() == "1\n"
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to every process of the group
        rest, _ = running.communicate(timeout=60)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
    assert rest.endswith("stopped\n")
    assert running.returncode == 0
    kept = [json.loads(path.read_text())["codes"] for path in (tmp_path / "cache" / "sm_80").glob("*.json")]
    assert sum(map(len, kept)) >= 1
    for _ in range(100):  # the workers are gone too
        try:
            os.killpg(running.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a worker is left")


# --- what is shipped -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def listed() -> list[Problem]:
    return problems(BACKBONES)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shipped_results_are_of_these_kernels(arch: int, listed: list[Problem]) -> None:
    again = f"run: tetra tune static --arch sm_{arch} -o autotune/sm_{arch}.json"
    found = json.loads((ROOT / f"sm_{arch}.json").read_text())
    assert (found["origin"], found["note"]) == ("static", "static, unmeasured")
    assert found["device"] == {"kind": "cuda", "arch": f"sm_{arch}", "name": product_of(arch).name}
    assert set(found["toolchain"]) == {"triton", "ptxas"}
    for module, digest in found["kernels"].items():
        assert digest == kernel_hash(module), f"{module} has changed; {again}"
    keys = {(name, key) for name, by_key in found["results"].items() for key in by_key}
    assert keys == {(one.tunable, one.key) for one in listed}, again
    for one in listed:
        entry = found["results"][one.tunable][one.key]
        assert tuple(entry["config"]) in all_tunables()[one.tunable].space(arch, one.sizes), (one, again)
        ranked = [tuple(map(int, row.split("x"))) for row in entry["ranked"].split()]
        assert (ranked[0], len(ranked)) == (tuple(entry["config"]), entry["candidates"])
        assert math.isfinite(entry["predicted_us"])
        assert entry["predicted_us"] > 1


def test_there_is_a_file_for_every_architecture() -> None:
    assert {path.stem for path in ROOT.glob("sm_*.json")} == {f"sm_{arch}" for arch in CHIPS}
