"""Points and roofs of the roofline chart, and its pictures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from commands import Runner, assert_refused, read_json

from tetra.autotune.hardware import PRODUCTS, find_product
from tetra.config import BACKBONES
from tetra.profiling import roofline_chart as chart
from tetra.profiling.memory_timeline import Timeline
from tetra.profiling.memory_timeline import draw_html as memory_html
from tetra.profiling.page import page
from tetra.profiling.roofline_chart import Chart, Point, RooflineError

H100 = find_product("H100 SXM")
ROW = {"kernel": "attention", "shape": {"B": 1, "T": 530, "H": 12, "D": 64}, "variant": "tetra attention_qkv fp16"}


def write(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


# --- figures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)
def test_roofs_are_the_data_sheets(product: Any) -> None:
    roofs = {roof.name: roof for roof in chart.roofs_of(product)}
    memory = next(iter(roofs.values()))
    assert memory.rate == product.dram_gb_per_s * 1e9
    assert roofs["int8 tensor"].rate == product.int8_tops * 1e12
    assert roofs["fp16 tensor"].rate == product.fp16_tflops * 1e12
    assert roofs["L2"].rate == product.chip.l2_bytes_per_clock * product.n_sms * product.clock_ghz * 1e9
    assert [roof.name for roof in roofs.values() if roof.is_assumed] == ["L2"]
    assert "assumption" in roofs["L2"].source
    assert roofs["L2"].rate > memory.rate


def test_a_point_by_hand() -> None:
    """1e9 operations on 1e7 bytes in 10 us: 100 a byte, 1e14 a second, below memory's 100 x 3.35e12."""
    point = Point("k", "n", "", 10**9, 10**7, "fp16", 1e-5, "measured")
    drawn = Chart("x", chart.roofs_of(H100), [point], [])
    assert (point.intensity, point.performance) == (100, pytest.approx(1e14))
    (row,) = drawn.to_json()["points"]
    assert row["roof"] == "HBM"
    assert row["share_of_roof"] == pytest.approx(1e14 / (100 * 3.35e12))
    flat = Point("k", "n", "", 10**12, 10**7, "int8", 1e-3, "measured")
    assert drawn.roof_of(flat) == ("int8 tensor", H100.int8_tops * 1e12)
    other = Point("k", "n", "", 10**12, 10**7, "fp16", 1e-3, "measured")
    assert drawn.roof_of(other) == ("fp16 tensor", H100.fp16_tflops * 1e12)


def test_measured_points_of_bench_kernels(tmp_path: Path) -> None:
    rows = [
        {**ROW, "median_ms": 0.1},
        {**ROW, "variant": "torch fp16", "median_ms": 0.1},
        {**ROW, "variant": "tetra attention_qkv fp16, plain torch", "median_ms": 0.1},
        {**ROW, "kernel": "ternary_matmul", "shape": {"layer": "up", "M": 8, "N": 64, "K": 32},
         "variant": "tetra int32, product only", "median_ms": 0.1},
    ]  # fmt: skip
    notes: list[str] = []
    attention, product = chart.read_measured(write(tmp_path / "f.json", rows), "H100 SXM", (), notes)
    assert attention.operations == 12 * 530 * 530 * (4 * 64 + 4)
    assert attention.n_bytes == 4 * 530 * 768 * 2
    assert (attention.dtype, attention.label, attention.seconds) == ("fp16", "measured", pytest.approx(1e-4))
    assert (product.operations, product.dtype) == (2 * 8 * 64 * 32, "int8")
    assert product.n_bytes == 8 * 32 + 64 * (32 + 4) + 8 * 64 * 4 + 4 * 8  # rows of 32 packed bytes at least
    assert "2 figures" in notes[0]


def test_measured_points_of_other_lists(tmp_path: Path) -> None:
    search = {"backend": "tetra", "rows": 1000, "bytes": 64, "queries": 2, "k": 5, "median_ms": 1.0}
    free = {"kernel": "mine", "operations": 1000, "n_bytes": 10, "dtype": "int8", "median_us": 2.0}
    found = chart.read_measured(write(tmp_path / "f.json", [search, {**search, "backend": "faiss"}, free]), "H100 SXM")
    assert [(p.kernel, p.seconds) for p in found] == [("hamming_popcount", 1e-3), ("mine", 2e-6)]
    assert found[0].operations == 3 * (64 // 4) * 2 * 1000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "JSON"),
        ("{}", "no list"),
        ("[1]", "no list"),
        ('[{"kernel": "x"}]', "entry 0"),
        ('[{"kernel": "x", "shape": {}, "median_ms": 1}]', "nothing is known"),
        ('[{"kernel": "attention", "shape": {"B": 1}, "median_ms": 1}]', "nothing is known"),
        ('[{"kernel": "bits", "shape": {"B": "1", "D": null}, "median_ms": 1}]', "no numbers"),
        ('[{"kernel": "bits", "shape": {"B": 1, "D": 8}, "median_ms": 0}]', "median_ms"),
        ('[{"kernel": "bits", "shape": {"B": 1, "D": 8}, "median_ms": NaN}]', "median_ms"),
        ('[{"operations": 1, "n_bytes": 0, "median_ms": 1}]', "n_bytes"),
        ('[{"operations": 1, "n_bytes": 1, "median_ms": 1, "dtype": "int3"}]', "int3"),
        ("[]", "no list"),
        ("[" * 100_000, "JSON"),
        ('[{"kernel": "bits", "shape": {"B": 0, "D": 8}, "median_ms": 1}]', "no numbers above 0"),
        ('[{"kernel": "bits", "shape": {"B": -1, "D": NaN}, "median_ms": 1}]', "no numbers above 0"),
        (f'[{{"operations": 1{"0" * 400}, "n_bytes": 1, "median_ms": 1}}]', "operations"),
        ('[{"operations": 1e308, "n_bytes": 1, "median_ms": 1}]', "operations"),
        ('[{"operations": 1, "n_bytes": 1, "median_ms": 1e-318}]', "median_ms"),
        ('[{"operations": 1, "n_bytes": 1, "median_ms": 1, "device_name": "NVIDIA H1000"}]', "H1000"),
        ('[{"operations": 1, "n_bytes": 1, "median_ms": 1, "device_name": ""}]', "measured on"),
        ('{"format": "tetra-tuning", "origin": "measured", "results": {}}', "measured on"),
        ('{"format": "tetra-tuning", "origin": "static", "results": {}}', "not measured"),
        ('[{"kernel": "bits", "shape": {"B": 1, "D": 8}, "median_ms": 1, "device_name": "NVIDIA A100"}]', "A100"),
    ],
)
def test_what_is_no_measurement(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "f.json"
    path.write_text(text)
    with pytest.raises(RooflineError, match=words) as caught:
        chart.read_measured(path, "H100 SXM")
    assert str(path) in str(caught.value)


def test_devices_are_told_apart(tmp_path: Path) -> None:
    for name, device in (("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA GeForce RTX 4090", "RTX 4090")):
        assert chart.read_measured(write(tmp_path / "f", [{**ROW, "median_ms": 1, "device_name": name}]), device)
    for name, device in (
        ("NVIDIA H200", "H100 SXM"),
        ("NVIDIA GeForce RTX 3090", "RTX 4090"),
        ("AMD EPYC", "L4"),
        ("NVIDIA L40S", "L4"),
    ):
        with pytest.raises(RooflineError, match=name):
            chart.read_measured(write(tmp_path / "f", [{**ROW, "median_ms": 1, "device_name": name}]), device)


def test_the_smallest_launches_and_units(tmp_path: Path) -> None:
    row = {"operations": 0.5, "n_bytes": 0.5, "median_ms": None, "median_us": 5}
    (point,) = chart.read_measured(write(tmp_path / "f", [row]), "L4")
    assert (point.intensity, point.seconds) == (1.0, pytest.approx(5e-6))


def test_files_that_say_nothing_of_a_cpu(tmp_path: Path) -> None:
    tuned = {"format": "tetra-tuning", "origin": "measured", "results": {}, "device": {"name": "X"}}
    row = {**ROW, "median_ms": 1}
    for value, words in (
        (tuned, "no figures"),
        ([{**row, "threads": [1]}], "threads"),
        ([{**row, "threads": -8}], "threads"),
        ([{**row, "threads": 1}, {**row, "threads": 2}], "1 and 2 threads"),
    ):
        with pytest.raises(RooflineError, match=words):
            chart.cpu_chart("X", [write(tmp_path / "f", value)])


def test_configurations_that_are_none(tmp_path: Path) -> None:
    from tetra.autotune.workloads import problems

    (known, *_) = [p for p in problems({"": BACKBONES["vit-b"]}) if p.tunable == "ternary_matmul"]
    results = {known.tunable: {known.key: {"config": [], "measured_us": 1.0}}}
    value = {"format": "tetra-tuning", "origin": "measured", "results": results, "device": {"name": "NVIDIA L4"}}
    with pytest.raises(RooflineError, match="none of this kernel"):
        chart.read_measured(write(tmp_path / "f", value), "L4", [known])


def test_results_of_the_measured_tuner(tmp_path: Path) -> None:
    from tetra.autotune.workloads import problems

    known = problems({"": BACKBONES["vit-b"]}, (1,), (32,))
    problem = next(p for p in known if p.tunable == "attention")
    results = {
        "format": "tetra-tuning", "version": 1, "origin": "measured",
        "device": {"kind": "cuda", "name": "NVIDIA H100 80GB HBM3"},
        "results": {"attention": {problem.key: {"config": [64, 64, 4, 3], "measured_us": 20.0},
                                  "other": {"config": [64, 64, 4, 3], "measured_us": 20.0}}},
    }  # fmt: skip
    notes: list[str] = []
    (point,) = chart.read_measured(write(tmp_path / "f.json", results), "H100 SXM", known, notes)
    assert (point.kernel, point.seconds, point.label) == ("attention", 2e-5, "measured")
    assert point.operations == 12 * 530 * 530 * (4 * 64 + 4)
    assert "1 results" in notes[0]
    search = next(p for p in known if p.tunable == "hamming_popcount")
    results["results"] = {search.tunable: {search.key: {"config": [1, 512, 4, 5], "measured_us": 200.0}}}
    (point,) = chart.read_measured(write(tmp_path / "f.json", results), "H100 SXM", known)
    assert (point.dtype, point.operations) == ("int32", 3 * 200_000 * 1536 // 4)


def test_predicted_points_lie_below_their_roofs() -> None:
    pytest.importorskip("triton")
    from tetra.autotune.workloads import problems

    wanted = [
        p for p in problems({"": BACKBONES["vit-b"]}, (1,), (32,)) if p.tunable in ("layer_norm", "bits", "attention")
    ]
    points, notes = chart.predicted_points(H100, wanted)
    assert len(points) == len(wanted)
    assert not notes
    for row in Chart("x", chart.roofs_of(H100), points, []).to_json()["points"]:
        assert row["label"] == "predicted"
        assert 0 < row["share_of_roof"] <= 1
        assert "config=" in row["shape"]


# --- pictures ----------------------------------------------------------------------------------------------

EVIL = "</script><img src=x onerror=alert(1)>"


def many_points(n: int) -> Chart:
    points = [
        Point(f"kernel {i % 17}", EVIL, f"{EVIL} {i}", 10 ** (3 + i % 9) + i, 1000 + i, "fp16", 1e-5 * (1 + i), label)
        for i, label in enumerate(["predicted", "measured"] * (n // 2))
    ]
    return Chart(EVIL, chart.roofs_of(H100), points, [EVIL])


def check_page(text: str) -> None:
    assert "<img" not in text
    assert text.count("<script") == text.count("</script") == 1
    assert "default-src 'none'" in text
    assert set(re.findall(r"\w+://[\w./]+", text)) == {"http://www.w3.org/2000/svg"}  # the name of a language
    assert "innerHTML" not in text
    if node := shutil.which("node"):
        script = re.search(r"<script>(.*)</script>", text, re.DOTALL)
        assert script is not None
        done = subprocess.run([node, "--check", "-"], input=script[1], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_page_is_safe_and_holds_many_points() -> None:
    text = chart.draw_html(many_points(500))
    check_page(text)
    data = re.search(r"const DATA = (.*);", text)
    assert data is not None
    assert len(json.loads(data[1])["points"]) == 500


def test_the_page_draws_every_point_in_a_browser_of_sorts(tmp_path: Path) -> None:
    """The page's own script, on a document that only counts."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    script = re.search(r"<script>(.*)</script>", chart.draw_html(many_points(500)), re.DOTALL)
    assert script is not None
    stub = """
    const counts = {};
    function element(name) {
      return { name, style: {}, addEventListener() {}, setAttribute() {}, appendChild() {}, replaceChildren() {},
        getBoundingClientRect: () => ({ left: 0, top: 0, width: 1, height: 1 }) };
    }
    globalThis.addEventListener = () => {};
    globalThis.document = { getElementById: element, createElement: element,
      createElementNS: (space, name) => { counts[name] = (counts[name] || 0) + 1; return element(name); } };
    """
    file = tmp_path / "page.js"
    file.write_text(f"{stub}{script[1]}\nconsole.log(JSON.stringify(counts));")
    done = subprocess.run([node, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["circle"] == 500


def test_halves_of_surrogate_pairs_can_be_written() -> None:
    text = page("a \ud800", ["b \udfff"], {"c": "\ud800"}, "")
    assert text.encode()
    assert "a \\ud800" in text


def test_pages_of_memory_are_safe_too() -> None:
    timeline = Timeline("cpu", [0.0, 1.0], {"weights": [1, 2]}, [("forward", 0.0, 2.0)], 2, 1.0, EVIL, [])
    check_page(memory_html(timeline, EVIL))


def test_a_picture_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for drawn in (many_points(40), Chart("empty", chart.roofs_of(H100), [], [])):
        with open(tmp_path / "x.png", "wb") as file:
            chart.draw_png(drawn, file)
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


# --- the command -------------------------------------------------------------------------------------------


def test_the_command_draws_measured_points_without_a_compiler(tetra: Runner, tmp_path: Path) -> None:
    file = write(tmp_path / "f.json", [{**ROW, "median_ms": 0.05, "device_name": "NVIDIA H100 80GB HBM3"}])
    out = {name: tmp_path / f"x.{name}" for name in ("png", "html", "json")}
    options = [part for name, path in out.items() for part in (f"--{name}", path)]
    result = tetra("kernels", "roofline", "--gpu", "h100", "--no-predict", "--measured", file, *options)
    assert result.status == 0, result.err
    assert "measured" in result.out
    found = read_json(out["json"])
    assert [point["label"] for point in found["points"]] == ["measured"]
    assert found["device"] == "H100 SXM"
    check_page(out["html"].read_text())
    assert out["png"].read_bytes().startswith(b"\x89PNG")


def test_a_chart_of_this_cpu(tetra: Runner, tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    tetra(
        "bench",
        "kernels",
        "--arch",
        "nano",
        "--kernel",
        "layer_norm",
        "--repeats",
        "3",
        "--threads",
        "1",
        "--json",
        file,
    )
    result = tetra("kernels", "roofline", "--gpu", "cpu", "--measured", file, "--json", tmp_path / "x.json")
    assert result.status == 0, result.err
    found = read_json(tmp_path / "x.json")
    assert all("measured on" in roof["source"] and "1 threads" in roof["source"] for roof in found["roofs"])
    assert all(roof["rate"] > 1e7 for roof in found["roofs"])
    assert {roof["name"] for roof in found["roofs"]} == {"DRAM", "int8 product", "fp16 product", "fp32 product"}
    assert_refused(tetra("kernels", "roofline", "--gpu", "cpu"), "--measured")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--gpu", "H1000"], ["H1000", "H100"]),
        (["--gpu", "h100", "--measured", "missing.json"], ["missing.json"]),
        (["--gpu", "h100", "--png", "/nowhere/x.png"], ["/nowhere"]),
        (["--gpu", "h100", "--batch", "0"], ["--batch"]),
        (["--gpu", "h100", "--model", "vit-x"], ["vit-x"]),
        ([], ["--gpu"]),
    ],
)
def test_bad_input(tetra: Runner, args: list[str], words: list[str]) -> None:
    assert_refused(tetra("kernels", "roofline", *args), *words)
