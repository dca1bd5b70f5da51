"""One packed model, every backend: from pixels to codes, what plain PyTorch, C++ and Triton make of it is the same."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tetra.config import BackboneConfig, HeadConfig, ModelConfig
from tetra.files import load, save
from tetra.kernels import native
from tetra.model import TetraModel

# Two ternary blocks and one in full precision; nothing fills a tile, a group of 128 values or a power of two.
PATCHES = BackboneConfig(width=40, depth=3, n_heads=1, head_dim=96, mlp_dim=136, image_size=(28, 42), patch_size=14)
ODD_HEADS = replace(PATCHES, n_heads=3, head_dim=33, width=130, mlp_dim=50, depth=2)
CONV = replace(
    ODD_HEADS,
    stem="conv",
    stem_channels=(8, 12, 16),
    patch_size=16,
    image_size=(32, 48),
    full_precision_blocks=0,
    head_dim=20,
)


@dataclass(frozen=True)
class Case:
    backbone: BackboneConfig
    head: HeadConfig
    dtype: str
    image_dtype: str = "uint8"


CASES = {
    "patches": Case(PATCHES, HeadConfig("gem", {"out_dim": 256}), "float32"),
    "odd heads, float pixels": Case(ODD_HEADS, HeadConfig("gem", {"out_dim": 256}), "float32", "float32"),
    "conv stem": Case(CONV, HeadConfig("mixvpr", {"out_channels": 64, "mix_depth": 1, "out_rows": 4}), "float32"),
    "half precision": Case(
        PATCHES,
        HeadConfig("boq", {"channels": 32, "n_queries": 4, "n_heads": 4, "n_layers": 1, "out_rows": 8}),
        "float16",
    ),
}

Results = dict[str, dict[str, Tensor]]


@torch.inference_mode()
def evaluate(folder: Path, device: str) -> Results:
    """Tokens, descriptors before normalisation, and codes of every case in ``folder``."""
    results = {}
    for name, dtype, images in torch.load(folder / "cases.pt", weights_only=True):
        model = load(folder / f"{name}.safetensors", device=device)
        model.compute_dtype = getattr(torch, dtype)
        features = model.features(images.to(device))
        assert model.head is not None
        result = {"tokens": features.tokens, "values": model.head.values(features)}
        result["codes"] = model.describe(images.to(device))
        results[name] = {part: tensor.cpu() for part, tensor in result.items()}
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a packed model for each case, and their images."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("models")
    cases: list[tuple[str, str, Tensor]] = []
    for name, case in CASES.items():
        model = TetraModel(ModelConfig("tiny", case.backbone, case.head))
        with torch.no_grad():  # LayerNorms start at one and zero, which would hide a mistake
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        save(model.pack(), folder / f"{name}.safetensors")
        images = torch.randint(0, 256, (2, 3, *case.backbone.image_size), dtype=torch.uint8)
        cases.append((name, case.dtype, images if case.image_dtype == "uint8" else images / 255.0))
    torch.save(cases, folder / "cases.pt")
    return folder


def run(folder: Path, backend: str, device: str = "cpu") -> Results:
    """What ``backend`` makes of every case."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TETRA_BACKEND", backend)
        if backend != "interpreter":
            return evaluate(folder, device)
        # Kernels are interpreted or not from when they are defined, so this takes a process of its own.
        done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    results: Results = torch.load(folder / "interpreted.pt", weights_only=True)
    return results


@pytest.fixture(scope="module")
def expected(folder: Path) -> Results:
    """What plain PyTorch makes of every case."""
    return run(folder, "torch")


def require(backend: str) -> None:
    if backend == "interpreter":
        pytest.importorskip("triton")
    if backend == "native" and not native.available():
        pytest.skip("no C++ compiler")


@pytest.fixture(
    scope="module",
    params=[("native", "cpu"), ("interpreter", "cpu"), pytest.param(("triton", "cuda"), marks=pytest.mark.gpu)],
    ids=lambda p: p[0],
)
def found(request: pytest.FixtureRequest, folder: Path) -> Results:
    """What another backend makes of them."""
    require(request.param[0])
    return run(folder, *request.param)


@pytest.mark.parametrize("name", CASES)
def test_every_backend_gives_the_same_codes(name: str, found: Results, expected: Results) -> None:
    ours, theirs = found[name], expected[name]
    # An activation may round the other way where two sums differ in their last bit.
    tolerance = 1e-4 if CASES[name].dtype == "float32" else 2e-2
    for part in ("tokens", "values"):
        a, b = ours[part].float(), theirs[part].float()
        assert ours[part].dtype == theirs[part].dtype == getattr(torch, CASES[name].dtype)
        assert (a - b).abs().max() <= tolerance * b.abs().max(), part
    values = theirs["values"].float()
    is_certain = values.abs() > tolerance * values.abs().amax(1, keepdim=True)
    assert is_certain.float().mean() > 0.9
    bits = [unpack(result["codes"]) for result in (ours, theirs)]
    assert not ((bits[0] != bits[1]) & is_certain).any()
    assert torch.equal(bits[1], values > 0)


def unpack(codes: Tensor) -> Tensor:
    """uint8 [B, D / 8] -> bool [B, D], most significant bit first."""
    return torch.stack([(codes >> (7 - i)) & 1 for i in range(8)], dim=-1).flatten(1).bool()


def test_a_backend_that_can_not_run_here_is_refused(folder: Path) -> None:
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="TETRA_BACKEND is triton, but a tensor is on cpu"):
        run(folder, "triton")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(evaluate(Path(sys.argv[1]), "cpu"), Path(sys.argv[1]) / "interpreted.pt")
