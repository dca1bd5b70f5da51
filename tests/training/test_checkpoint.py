"""Checkpoints: what goes in comes out, nothing is pickled, and an old one survives a failed write."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from tetra.errors import FileFormatError, TrainingError
from tetra.training.checkpoint import SafetensorsCheckpointIO, load_checkpoint, save_checkpoint


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_nested_structures_come_back(tmp_path: Path) -> None:
    tensor = torch.randn(4, 6)
    value: dict[str, Any] = {
        "epoch": 3,
        "ratio": 0.1,
        "none": None,
        "flag": True,
        "text": "with / and \N{SNOWMAN}",
        "empty": {"list": [], "tuple": (), "dict": {}},
        "states": {0: {"exp_avg": tensor, "step": torch.tensor(7.0)}, 1: [tensor.t(), tensor[1:3]]},
        "betas": (0.9, 0.999),
        "dtypes": [torch.zeros(2, dtype=d) for d in (torch.uint8, torch.int64, torch.bfloat16, torch.bool)],
        "scalars": [torch.tensor(1), torch.zeros(0, 3)],
        "shared": [tensor, tensor],
        "__tensor__x": "a key like a marker",
    }
    save_checkpoint(value, tmp_path / "a" / "c.safetensors")
    assert_same(load_checkpoint(tmp_path / "a" / "c.safetensors"), value)
    assert os.listdir(tmp_path / "a") == ["c.safetensors"]


def test_keys_that_look_like_the_markers(tmp_path: Path) -> None:
    value = {"__tensor__": 1, "__tuple__": {"__pairs__": [1, (2,)]}}
    save_checkpoint(value, tmp_path / "c")
    assert_same(load_checkpoint(tmp_path / "c"), value)


def test_keys_that_differ_by_type_or_by_slashes_stay_apart(tmp_path: Path) -> None:
    value = {
        1: torch.tensor(1.0),
        "1": torch.tensor(2.0),
        "a/b": {"c": torch.tensor(3.0)},
        "a": {"b/c": torch.tensor(4.0), "b": {"c": torch.tensor(5.0)}},
    }
    save_checkpoint(value, tmp_path / "c")
    assert_same(load_checkpoint(tmp_path / "c"), value)


leaves = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=5)
keys = st.text(max_size=4) | st.integers(-5, 5)
trees = st.recursive(
    leaves | st.integers(0, 6).map(lambda n: torch.arange(n)),
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=60)
@given(value=st.dictionaries(keys, trees, max_size=4))
def test_any_tree_comes_back(value: dict[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    save_checkpoint(value, path)
    assert_same(load_checkpoint(path), value)


def test_optimiser_states_come_back_to_the_bit(tmp_path: Path) -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 5)).square().sum().backward()
            optimizer.step()

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(5, 3)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    model, optimizer = fresh()
    train(model, optimizer, 1)
    save_checkpoint({"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}, tmp_path / "c")
    train(model, optimizer, 2)
    other, other_optimizer = fresh()
    state = load_checkpoint(tmp_path / "c")
    other.load_state_dict(state["model"])
    other_optimizer.load_state_dict(state["optimizer"])
    train(other, other_optimizer, 2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_file_is_safetensors_and_holds_no_pickle(tmp_path: Path) -> None:
    save_checkpoint({"w": torch.ones(3), "n": 4}, tmp_path / "c")
    assert torch.equal(load_file(tmp_path / "c")["/w"], torch.ones(3))
    raw = (tmp_path / "c").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"]["kind"] == "tetra-training-checkpoint"
    assert json.loads(header["__metadata__"]["tree"])


@pytest.mark.parametrize("value", [object(), {1, 2}, nn.Linear(1, 1), 1j, b"bytes"])
def test_what_json_can_not_hold_is_refused(value: object, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"checkpoint: '/a/b' is a .*JSON"):
        save_checkpoint({"a": {"b": value}}, tmp_path / "c")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 4, 8, 60, 0.5, -1])
def test_truncated_files(keep: float, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint({"w": torch.randn(50)}, path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep) if 0 < keep < 1 else int(keep)])
    with pytest.raises(FileFormatError, match=r"c\.safetensors: not a readable checkpoint") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_files_of_another_kind(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "plain")
    save_file({"w": torch.ones(2)}, tmp_path / "model", metadata={"kind": "something-else"})
    torch.save({"w": torch.ones(2)}, tmp_path / "pickle")
    (tmp_path / "text").write_text("hello")
    for name in ("plain", "model"):
        with pytest.raises(FileFormatError, match="not a training checkpoint"):
            load_checkpoint(tmp_path / name)
    for name in ("pickle", "text", "missing"):
        with pytest.raises(FileFormatError, match=f"{name}: not a readable checkpoint"):
            load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("tree", [None, "{", "[1", '{"__tensor__": "nowhere"}'])
def test_damaged_trees(tree: str | None, tmp_path: Path) -> None:
    metadata = {"kind": "tetra-training-checkpoint"} | ({} if tree is None else {"tree": tree})
    save_file({"w": torch.ones(2)}, tmp_path / "c", metadata=metadata)
    with pytest.raises(FileFormatError, match="c: "):
        load_checkpoint(tmp_path / "c")


def test_a_newer_checkpoint(tmp_path: Path) -> None:
    metadata = {"kind": "tetra-training-checkpoint", "format_version": "2", "tree": "{}"}
    save_file({"w": torch.ones(2)}, tmp_path / "c", metadata=metadata)
    with pytest.raises(FileFormatError, match="c: checkpoint format 2, this release reads up to 1"):
        load_checkpoint(tmp_path / "c")


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_flipped_bit_is_noticed(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    value = {"global_step": 7, "state": {"w": torch.arange(20.0), "b": torch.zeros(3)}, "lr": 0.25}
    save_checkpoint(value, path)
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    try:
        found = load_checkpoint(path)
    except FileFormatError:
        return
    assert_same(found, value)  # only the name of the hash was hit


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from tetra.errors import TrainingError
from tetra.training.checkpoint import save_checkpoint

resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    save_checkpoint({"w": torch.randn(20000)}, Path(sys.argv[1]))
except TrainingError as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file size are a POSIX facility")
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint({"w": torch.ones(3)}, path)
    before = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "c.safetensors: checkpoint can't be written" in done.stdout
    assert done.stdout.count("\n") == 1
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_a_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="can't be written"):
        save_checkpoint({"n": 1}, tmp_path / "file" / "c")


def test_the_lightning_plugin(tmp_path: Path) -> None:
    plugin = SafetensorsCheckpointIO()
    plugin.save_checkpoint({"x": torch.tensor(math.pi)}, str(tmp_path / "c"))
    assert plugin.load_checkpoint(tmp_path / "c")["x"].item() == pytest.approx(math.pi)
    plugin.remove_checkpoint(tmp_path / "c")
    plugin.remove_checkpoint(tmp_path / "c")
    assert not (tmp_path / "c").exists()
