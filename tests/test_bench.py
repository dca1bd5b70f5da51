from __future__ import annotations

import os
import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tetra import __version__
from tetra.bench import BASELINE, _float_model, _packed_model, bench_model
from tetra.bench_kernels import KERNELS, bench_kernels
from tetra.config import model_config
from tetra.errors import ConfigError, ImageError
from tetra.kernels.backend import backend_for
from tetra.timing import forced_backend, take_turns

CPU = torch.device("cpu")


def check_figures(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["p95_ms"]
        assert row["first_call_ms"] > 0
        assert row["device"] == "cpu"
        assert row["device_name"]
        assert row["versions"]["tetra"] == __version__
        assert row["versions"]["python"] == platform.python_version()
        assert row["versions"]["torch"] == torch.__version__
        assert row["commit"] is None or len(row["commit"].removesuffix("-dirty")) == 40


def test_variants_and_their_figures() -> None:
    threads = torch.get_num_threads()
    lines: list[str] = []
    rows = bench_model("nano", batch=2, image_size=(64, 96), repeats=3, threads=1, progress=lines.append)
    by_name = {row["variant"]: row for row in rows}
    assert rows[0]["variant"] == BASELINE
    assert rows[0]["ratio_to_fp32_sdpa"] == 1
    assert len(by_name) == len(rows)
    assert len(lines) == 3
    check_figures(rows)
    for row in rows:
        assert (row["threads"], row["batch"], row["image_size"]) == (1, 2, [64, 96])
        assert row["ratio_to_fp32_sdpa"] == rows[0]["median_ms"] / row["median_ms"]
    assert torch.get_num_threads() == threads
    fp32, bf16 = by_name[BASELINE]["weights_mib"], by_name["bf16 sdpa"]["weights_mib"]
    assert bf16 == pytest.approx(fp32 / 2)
    # Two bits for sixteen in the blocks; the stem stays as it is.
    assert by_name["tetra packed, bf16 rest"]["weights_mib"] < bf16 / 3
    assert by_name["tetra packed, fp32 rest"]["weights_mib"] < bf16
    # Baselines never run on this project's kernels; the packed model runs on what a user gets, and in plain torch.
    own = backend_for(torch.empty(0))
    floats = {BASELINE, "bf16 sdpa", "bf16 matmul-softmax"}
    assert all(by_name[name]["backend"] == "torch" for name in floats)
    assert by_name["tetra packed, bf16 rest"]["backend"] == own
    if own != "torch":
        assert by_name["tetra packed, bf16 rest, plain torch"]["backend"] == "torch"


class _Operations(TorchDispatchMode):
    """Notes which namespaces' operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.namespaces: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.namespaces.add(func.namespace)
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def test_baselines_are_plain_torch_and_packed_models_are_not() -> None:
    config = model_config("nano", None)
    images = torch.rand(1, 3, 32, 32)
    for make, backend, expected in ((_float_model, "torch", {"aten"}), (_packed_model, None, {"aten", "tetra"})):
        with forced_backend(backend), _Operations() as seen:
            make(config, torch.bfloat16, CPU).features(images)
        assert seen.namespaces - {"prim", "prims"} == expected


def test_vit_b_backbone_takes_less_than_36_mib_packed() -> None:
    from tetra.bench import weights_mib
    from tetra.model import create_model

    with torch.device("meta"):
        model = create_model("vit-b", head=None)
    packed = sum(
        module.out_features * 32 * -(-module.in_features // 128)
        for name, module in model.backbone.named_modules()
        if type(module).__name__ == "TernaryLinear"
    )
    ternary = sum(module.weight.numel() for module in model.modules() if type(module).__name__ == "TernaryLinear")
    rest_mib = (weights_mib(model.backbone) - 4 * ternary / 2**20) / 2  # at 2 bytes a value
    assert packed / 2**20 + rest_mib <= 36


def test_kernels_beside_torch() -> None:
    cases: list[str] = []
    notices: list[str] = []
    rows = bench_kernels("nano", repeats=2, threads=1, progress=cases.append, notices=notices)
    assert notices == [f"{name} runs on NVIDIA GPUs alone and was left out" for name in ("gemlite", "BitBLAS")]
    check_figures(rows)
    # nano has a convolutional stem and no dropout.
    assert {row["kernel"] for row in rows} == set(KERNELS) - {"patches", "residual_dropout"}
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(f"{row['kernel']} {row['shape']}", []).append(row)
    assert len(groups) == len(cases)
    for group in groups.values():
        assert group[0]["variant"] == "torch fp32"
        assert all(row["ratio"] == group[0]["median_ms"] / row["median_ms"] for row in group)
        assert any(row["variant"].startswith("tetra") for row in group)
    shapes = [row["shape"] for row in rows if row["kernel"] == "ternary_matmul" and row["variant"] == "torch fp32"]
    assert [tuple(shape.values()) for shape in shapes] == [
        ("qkv", 197, 768, 256), ("out", 197, 256, 256), ("up", 197, 1024, 256), ("down", 197, 256, 1024),
    ]  # fmt: skip


def test_one_kernel_can_be_asked_for() -> None:
    rows = bench_kernels("vit-s", repeats=1, threads=1, kernel="residual_dropout")
    assert {row["kernel"] for row in rows} == {"residual_dropout"}
    assert rows[0]["shape"] == {"M": 530, "K": 384, "dropout": 0.05}
    rows = bench_kernels("vit-s", batch=2, repeats=1, threads=1, kernel="patches")
    assert {row["kernel"] for row in rows} == {"patches"}
    assert rows[0]["shape"] == {"B": 2, "H": 322, "W": 322, "patch_size": 14}


@pytest.mark.gpu
def test_on_a_gpu_every_variant_runs() -> None:
    notices: list[str] = []
    names = {row["variant"] for row in bench_model("nano", repeats=2, device="cuda", notices=notices)}
    assert {BASELINE, "fp16 sdpa", "fp16 sdpa, CUDA graph", "tetra packed, fp16 rest, CUDA graph"} <= names
    rows = bench_kernels("nano", repeats=2, device="cuda", notices=notices)
    assert {row["kernel"] for row in rows} == set(KERNELS) - {"patches", "residual_dropout"}


@pytest.mark.parametrize("bench", [bench_model, bench_kernels])
@pytest.mark.parametrize("argument", ["batch", "repeats", "threads"])
def test_numbers_have_to_be_positive(bench: Callable[..., Any], argument: str) -> None:
    with pytest.raises(ConfigError, match=f"{argument} is 0"):
        bench("nano", **{argument: 0})


def test_unknown_names_and_wrong_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown architecture 'vit-x'"):
        bench_model("vit-x")
    with pytest.raises(ConfigError, match="unknown architecture 'vit-x'"):
        bench_kernels("vit-x")
    with pytest.raises(ConfigError, match="unknown kernel 'gemm'; known: ternary_matmul, "):
        bench_kernels("nano", kernel="gemm")
    with pytest.raises(ImageError, match="does not fit"):
        bench_model("nano", image_size=65, repeats=1)


def test_variants_take_turns_and_first_calls_stand_apart() -> None:
    order: list[str] = []
    times = take_turns({name: lambda name=name: order.append(name) for name in "ab"}, CPU, repeats=3)  # type: ignore[misc]
    assert "".join(order) == "ab" * 5  # first calls, a warm-up round, three that count
    assert {name: len(t.calls) for name, t in times.items()} == {"a": 3, "b": 3}


def test_what_cannot_run_is_left_out_but_never_our_own() -> None:
    def fail() -> None:
        raise RuntimeError("no such unit\nand more")

    left_out: list[str] = []
    times = take_turns({"torch": list, "other": fail}, CPU, 1, left_out=left_out)
    assert list(times) == ["torch"]
    assert left_out == ["other was left out: no such unit"]
    for variants in ({"torch": fail}, {"torch": list, "tetra": fail}):
        with pytest.raises(RuntimeError, match="no such unit"):
            take_turns(variants, CPU, 1, left_out=left_out)


@pytest.mark.parametrize("before", [None, "torch", "auto"])
def test_a_forced_backend_is_forgotten_afterwards(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if before is None:
        monkeypatch.delenv("TETRA_BACKEND", raising=False)
    else:
        monkeypatch.setenv("TETRA_BACKEND", before)
    with forced_backend("torch"):
        assert backend_for(torch.empty(0)) == "torch"
    with forced_backend(None):
        assert os.environ.get("TETRA_BACKEND") == before
    assert os.environ.get("TETRA_BACKEND") == before
