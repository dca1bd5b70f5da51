"""The command line as scripts see it: exit status, stdout, stderr and JSON files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import Result, Runner, assert_refused, photo, read_json
from PIL import Image

from tetra import __version__
from tetra.files import load, save
from tetra.model import TetraModel


@pytest.fixture
def town(tmp_path: Path) -> Path:
    """UTM folders of 25 places 100 m apart; every query is a copy of its reference, one is far from all."""
    for i in range(25):
        photo(tmp_path / f"town/database/@{500000 + 100 * i}@5400000@.png", i)
        if i < 6:
            photo(tmp_path / f"town/queries/@{500005 + 100 * i}@5400000@.png", i)
    photo(tmp_path / "town/queries/@700000@5400000@.png", 99)
    return tmp_path / "town"


def test_version_and_help(tetra: Runner) -> None:
    assert tetra("--version").out == f"tetra {__version__}\n"
    result = tetra("--help")
    assert result.status == 0
    for command in ("evaluate", "match", "info", "bench", "kernels", "train", "pack", "demo", "map", "localize"):
        assert f"\n  {command} " in result.out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["no-such-command"], ["no-such-command", "see tetra --help"]),
        (["info"], ["MODEL", "see tetra info --help"]),
        (["info", "x", "--no-such-option"], ["--no-such-option", "see tetra info --help"]),
        (["evaluate", "x"], ["--dataset", "see tetra evaluate --help"]),
        (["evaluate", "x", "--dataset", "y", "--k", "0"], ["--k", "1"]),
        (["evaluate", "x", "--dataset", "y", "--layout", "gsv"], ["--layout", "vpr-bench"]),
        (["bench", "model", "--batch", "some"], ["--batch", "integer", "see tetra bench model --help"]),
    ],
)
def test_wrong_usage(tetra: Runner, args: list[str], words: list[str]) -> None:
    assert_refused(tetra(*args), *words)


@pytest.mark.parametrize("args", [[], ["bench"], ["train"]])
def test_no_arguments_show_the_help(tetra: Runner, args: list[str]) -> None:
    result = tetra(*args)
    assert result.status == 2
    assert "Usage" in result.err
    assert result.err.count("\n") > 5


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs the device that is always full")
@pytest.mark.parametrize("args", [["--version"], ["--help"], ["info", "nano"]])
def test_full_standard_output(args: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tetra.cli", *args],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert_refused(Result(done.returncode, "", done.stderr), "output", "No space left", "free space")


def test_names_that_the_terminal_cannot_show(town: Path, model_file: Path) -> None:
    town = town.rename(town.with_name("Zürich"))
    done = subprocess.run(
        [sys.executable, "-m", "tetra.cli", "evaluate", str(model_file), "--dataset", str(town)],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Z\\xfcrich: 7 queries" in done.stdout


def test_info(tetra: Runner, model_file: Path, tmp_path: Path) -> None:
    result = tetra("info", model_file, "--json", tmp_path / "info.json")
    assert result.status == 0
    found = read_json(tmp_path / "info.json")
    for key in ("file_bytes", "memory_bytes"):
        items = found[key]
        assert {"ternary", "full_precision", "head", "total"} <= items.keys()
        assert items["total"] == sum(n for name, n in items.items() if name != "total")
        assert f"{items['total']:,}" in result.out
    assert found["file_bytes"]["total"] == model_file.stat().st_size
    assert found["n_bits"] == 64
    assert found["content_hash"] == load(model_file).content_hash
    assert found["content_hash"] in result.out


def test_evaluate(tetra: Runner, model_file: Path, town: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    result = tetra(
        *("evaluate", model_file, "--dataset", town, "--json", tmp_path / "r.json", "--batch-size", 4),
        *("--pictures", pictures, "--n-pictures", 3),
    )
    assert result.status == 0, result.err
    found = read_json(tmp_path / "r.json")
    assert found["n_queries"] == 7
    assert found["n_references"] == 25
    assert found["recall_float"] == found["recall_binary"] == {"1": 100.0, "5": 100.0, "10": 100.0, "20": 100.0}
    assert found["n_bits"] == 64
    assert found["bytes_per_image"] == 8
    assert found["image_size"] == [32, 32]
    assert "R@1: 100.0, R@5: 100.0, R@10: 100.0, R@20: 100.0" in result.out
    assert "1 of 7 queries have no right reference" in result.err
    assert len(list(pictures.glob("match_*.png"))) == 3


def test_evaluate_asks_for_its_own_k_and_layout(tetra: Runner, model_file: Path, town: Path, tmp_path: Path) -> None:
    args = [
        "evaluate",
        model_file,
        "--dataset",
        town,
        "--layout",
        "utm",
        "--radius-m",
        1,
        "--json",
        tmp_path / "r",
    ]
    assert_refused(tetra(*args), town, "within 1 m")  # every query is 5 m beside its reference
    assert not (tmp_path / "r").exists()
    args[7] = 6
    assert tetra(*args, "--k", 1, "--k", 25).status == 0
    assert read_json(tmp_path / "r")["recall_binary"].keys() == {"1", "25"}
    assert_refused(tetra(*args, "--k", 26), "26", "25 references")


def test_match(tetra: Runner, model_file: Path, town: Path, tmp_path: Path) -> None:
    args = ["match", model_file, town / "queries", town / "database"]
    result = tetra(*args, "--k", 2, "--json", tmp_path / "m.json")
    assert result.status == 0
    matches = read_json(tmp_path / "m.json")["matches"]
    assert len(matches) == 7
    for match in matches[:6]:
        best = match["references"][0]
        assert best["distance"] == 0
        assert Path(best["path"]).read_bytes() == Path(match["query"]).read_bytes()
        assert len(match["references"]) == 2
        assert Path(best["path"]).name in result.out
    assert_refused(tetra(*args, "--k", 100), "100", "25 references")


def test_bad_image_among_many(tetra: Runner, model_file: Path, town: Path, tmp_path: Path) -> None:
    (town / "database/@500000@5400000@.png").write_bytes(b"not a picture")
    args = ["evaluate", model_file, "--dataset", town, "--json", tmp_path / "r.json"]
    assert_refused(tetra(*args), "@500000@5400000@.png")
    assert not (tmp_path / "r.json").exists()
    assert tetra(*args, "--skip-bad-images").status == 0
    assert len(read_json(tmp_path / "r.json")["skipped"]) == 1


def test_pack(tetra: Runner, tiny_model: TetraModel, tmp_path: Path) -> None:
    trained, out = tmp_path / "trained.safetensors", tmp_path / "packed.safetensors"
    save(tiny_model, trained)
    assert tetra("pack", trained, out, "--rest-dtype", "float32").status == 0
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load(out).describe(images), tiny_model.eval().describe(images))
    before = out.read_bytes()
    assert_refused(tetra("pack", trained, out), out, "exists")
    assert out.read_bytes() == before
    assert tetra("pack", trained, out, "--force").status == 0
    assert len(out.read_bytes()) < len(before)
    assert_refused(tetra("pack", out, tmp_path / "x"), out, "packed")


def test_packing_names_the_layer_that_is_not_finite(tetra: Runner, tiny_model: TetraModel, tmp_path: Path) -> None:
    tiny_model.backbone.blocks[0].mlp.up.weight.data[0, 0] = float("inf")
    save(tiny_model, tmp_path / "m.safetensors")
    result = tetra("pack", tmp_path / "m.safetensors", tmp_path / "out.safetensors")
    assert_refused(result, tmp_path / "m.safetensors", "backbone.blocks.0.mlp.up")
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["info", "nobody"], ["nobody"]),
        (["info", "{tmp}"], ["{tmp}", "folder"]),
        (["info", "{model}", "--json", "{tmp}/no/x.json"], ["{tmp}/no"]),
        (["info", "{model}", "--json", "{tmp}"], ["{tmp}", "folder"]),
        (["evaluate", "{model}", "--dataset", "{tmp}/no"], ["{tmp}/no"]),
        (["evaluate", "{model}", "--dataset", "{tmp}"], ["{tmp}"]),
        (["evaluate", "{model}", "--dataset", "{town}", "--device", "nowhere"], ["nowhere"]),
        (["evaluate", "{model}", "--dataset", "{town}", "--device", "meta"], ["'meta'", "use cpu"]),
        (["evaluate", "{model}", "--dataset", "{town}", "--layout", "vpr-bench"], ["{town}"]),
        (["match", "{model}", "{tmp}/no", "{town}"], ["{tmp}/no"]),
        (["train", "run", "{tmp}/no.yaml", "--out", "{tmp}/run"], ["no.yaml"]),
        (["bench", "model", "--batch", "1", "--json", "{tmp}/no/x.json"], ["{tmp}/no"]),
        (["bench", "model", "--plot", "{tmp}/x.jpg"], ["{tmp}/x.jpg", ".png"]),
        (["bench", "kernels", "--plot", "{tmp}/no/x.png"], ["{tmp}/no"]),
        (["bench", "kernels", "--json", "{tmp}"], ["{tmp}", "folder"]),
        (["bench", "kernels", "--kernel", "gemm"], ["'gemm'", "ternary_matmul"]),
        (["bench", "kernels", "--device", "nowhere"], ["nowhere"]),
        (["bench", "train", "--count", "--plot", "{tmp}/x.png"], ["--plot", "--count"]),
        (["bench", "train", "--arch", "nano", "--batch", "3"], ["batch is 3", "stage 2"]),
        (["kernels", "predict", "--gpu", "V100"], ["gpu: 'V100'", "A100 SXM 80GB"]),
        (["kernels", "predict", "--markdown", "{tmp}/no/x.md"], ["{tmp}/no"]),
    ],
)
def test_bad_input_is_one_line(
    tetra: Runner, model_file: Path, town: Path, tmp_path: Path, args: list[str], words: list[str]
) -> None:
    names = {"tmp": tmp_path, "town": town, "model": model_file}
    before = sorted(tmp_path.rglob("*"))
    result = tetra(*(arg.format(**names) for arg in args))
    assert_refused(result, *(word.format(**names) for word in words))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--arch", "sm_75"], ["sm_75", "not supported", "no int8 tensor-core product"]),
        (["--arch", "sm_80", "--arch", "88"], ["sm_88 is unknown", "sm_80", "sm_120"]),
        (["--arch", "hopper"], ["'hopper' is not an architecture"]),
        (["--kernel", "gemm"], ["kernel: 'gemm' is unknown", "ternary_matmul", "row_quantize"]),
    ],
)
def test_kernel_report_refuses(tetra: Runner, tmp_path: Path, args: list[str], words: list[str]) -> None:
    assert_refused(tetra("kernels", "report", *args, "--json", tmp_path / "r.json"), *words)
    assert not (tmp_path / "r.json").exists()


def test_kernel_predictions_say_what_they_are(tetra: Runner, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    files = ("--json", tmp_path / "p.json", "--markdown", tmp_path / "p.md")
    result = tetra("kernels", "predict", "--gpu", "orin", "--batch", 1, *files)
    assert result.status == 0, result.err
    (row,) = read_json(tmp_path / "p.json")
    assert (row["gpu"], row["batch"], row["label"], row["measured"]) == ("Jetson AGX Orin 64GB", 1, "predicted", False)
    assert f"{row['predicted_ms']:.3f}" in result.out
    assert "PREDICTED" in result.out
    assert f"formula: {row['formula']}" in " ".join(result.out.split())
    assert "predicted, never measured" in (tmp_path / "p.md").read_text()


@pytest.mark.parametrize("command", ["model", "kernels"])
def test_bench_writes_figures_and_a_picture(tetra: Runner, tmp_path: Path, command: str) -> None:
    args = ["bench", command, "--arch", "nano", "--repeats", 1, "--threads", 1, "--device", "cpu"]
    args += ["--kernel", "bits"] if command == "kernels" else []
    result = tetra(*args, "--json", tmp_path / "b.json", "--plot", tmp_path / "b.png")
    assert result.status == 0, result.err
    rows = read_json(tmp_path / "b.json")
    assert isinstance(rows, list)
    ratio = "ratio" if command == "kernels" else "ratio_to_fp32_sdpa"
    for row in rows:
        assert {"variant", "median_ms", "p95_ms", "first_call_ms", "versions", "commit", "device", ratio} <= row.keys()
        assert row["variant"] in result.out
        assert row["threads"] == 1
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.format == "PNG"


def test_bench_train_counts_and_names_what_is_kept(tetra: Runner, tmp_path: Path) -> None:
    args = [
        "bench",
        "train",
        "--arch",
        "nano",
        "--batch",
        4,
        "--image-size",
        64,
        "--stage",
        "distill",
        "--device",
        "cpu",
    ]
    file, picture = tmp_path / "b.json", tmp_path / "b.png"
    result = tetra(*args, "--count", "--by-tensor", "--recompute", "all", "--threads", 1, "--json", file)
    assert result.status == 0, result.err
    rows = read_json(file)
    step = [row for row in rows if row["stage"] == "distill"]
    assert [row["variant"] for row in step] == [
        "torch, sdpa", "torch, maps", "tetra", "tetra, attention again", "tetra, blocks again",
    ]  # fmt: skip
    assert "median ms" not in result.out
    assert "student.backbone.blocks.*.mlp.down" in result.out
    result = tetra(*args, "--repeats", 1, "--plot", picture)
    assert result.status == 0, result.err
    assert "images/s" in result.out
    assert picture.is_file()


@pytest.mark.parametrize("command", ["model", "kernels", "train"])
@pytest.mark.parametrize("option", ["--batch", "--repeats", "--threads"])
def test_bench_refuses_numbers_below_one(tetra: Runner, command: str, option: str) -> None:
    result = tetra("bench", command, option, 0)
    assert result.status == 2
    assert option in result.err
    assert "Traceback" not in result.err


def test_missing_extra_names_the_command_that_brings_it(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("{}")
    code = f"""
import sys
sys.modules["lightning"] = None  # what an install without the extra looks like
sys.argv = ["tetra", "train", "run", {str(recipe)!r}, "--out", {str(tmp_path / "out")!r}]
from tetra.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert_refused(Result(done.returncode, done.stdout, done.stderr), "lightning", 'pip install "tetra-vpr[train]"')


def test_console_script_is_installed() -> None:
    script = Path(sys.executable).with_name("tetra")
    if not script.exists():
        pytest.skip("the distribution is not installed in this environment")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == f"tetra {__version__}\n"
