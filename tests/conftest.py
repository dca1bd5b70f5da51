"""Fixtures that more than one test file uses."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# The models here are tiny: a second thread only waits for the first, in this process and in those it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from commands import Runner

from tetra.config import BackboneConfig, HeadConfig, ModelConfig
from tetra.files import save
from tetra.kernels import native
from tetra.kernels.backend import backend_for
from tetra.model import TetraModel

ROOT = Path(__file__).resolve().parent.parent

# What was tuned or saved on this machine is not asked and not touched.
_OWN_FILES = tempfile.mkdtemp(prefix="tetra-tests-")
atexit.register(shutil.rmtree, _OWN_FILES, ignore_errors=True)
os.environ["TETRA_TUNING_DIR"] = os.path.join(_OWN_FILES, "tuning")
os.environ["TETRA_DIARY"] = os.path.join(_OWN_FILES, "diary.jsonl")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    """No test finds what another set for the whole process: random numbers, threads, kernels measured to be slower."""
    torch.manual_seed(0)
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)
    native._slower.clear()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images beside the checkout; the test is skipped where it is missing."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}")
    return folder


@pytest.fixture
def fused_training() -> None:
    """The test compares fused with composed training; it is skipped where only the second runs."""
    if backend_for(torch.zeros(1)) == "torch":
        pytest.skip("no compiled kernels here")


@pytest.fixture
def tiny_config() -> ModelConfig:
    """A model of a few kilobytes with every kind of tensor; widths that do not fill a packed row."""
    backbone = BackboneConfig(
        width=40, depth=2, n_heads=2, head_dim=12, mlp_dim=136, image_size=(32, 32), patch_size=16
    )
    return ModelConfig("tiny", backbone, HeadConfig("gem", {"out_dim": 64}))


@pytest.fixture
def tiny_model(tiny_config: ModelConfig) -> TetraModel:
    """A trainable model of ``tiny_config`` with random weights."""
    return TetraModel(tiny_config)


@pytest.fixture
def tetra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner(monkeypatch, capsys)


@pytest.fixture
def model_file(tiny_model: TetraModel, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.safetensors"
    save(tiny_model.pack(torch.float16), path)
    return path
