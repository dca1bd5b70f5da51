"""Model files: what goes in comes out, and nothing damaged, foreign or newer gets in."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from tetra.config import ModelConfig
from tetra.errors import ConfigError, FileFormatError, TetraError
from tetra.files import (
    FORMAT_VERSION,
    atomic_write,
    check_output,
    load,
    load_trainable,
    read_header,
    save,
    shipped_models,
    write_json,
)
from tetra.kernels import pack_ternary
from tetra.model import TetraModel

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def packed(tiny_model: TetraModel) -> TetraModel:
    return tiny_model.pack(torch.float16)


@pytest.fixture
def path(packed: TetraModel, tmp_path: Path) -> Path:
    save(packed, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def reference_hash(config: object, tensors: dict[str, Tensor]) -> str:
    """The content hash as the format describes it, from the raw bytes that safetensors itself writes."""
    digest = hashlib.sha256(canonical(config))
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(canonical([name, str(tensor.dtype), list(tensor.shape)]))
        raw = safetensors.torch.save({"x": tensor})
        digest.update(raw[8 + int.from_bytes(raw[:8], "little") :])
    return digest.hexdigest()


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["tetra"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def forge(path: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Rewrite a model file after ``edit``, with hashes that match, as a faulty converter would."""
    header, tensors = read(path)
    edit(header, tensors)
    header["content_hash"] = reference_hash(header["config"], tensors)
    header.pop("header_hash")
    header["header_hash"] = hashlib.sha256(canonical(header)).hexdigest()
    safetensors.torch.save_file(tensors, path, metadata={"tetra": canonical(header).decode()})


def assert_one_line(error: BaseException, *parts: object) -> None:
    message = str(error)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message


# --- round trips ---


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_packed_model_comes_back_bit_for_bit(tiny_model: TetraModel, tmp_path: Path, dtype: torch.dtype | None) -> None:
    model = tiny_model.pack(dtype)
    model.info = {"data": "none", "epochs": 3, "name": "Zürich"}
    save(model, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    assert loaded.is_packed
    assert not loaded.training
    assert loaded.config == model.config
    assert loaded.info == model.info
    assert loaded.content_hash == model.content_hash is not None
    want, got = model.state_dict(), loaded.state_dict()
    assert want.keys() == got.keys()
    for name in want:
        assert want[name].dtype == got[name].dtype
        assert torch.equal(want[name], got[name])
    assert torch.equal(model(IMAGES), loaded(IMAGES))
    assert torch.equal(model.describe(IMAGES), loaded.describe(IMAGES))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_trainable_model_comes_back_and_packs_to_the_same_codes(tiny_model: TetraModel, tmp_path: Path) -> None:
    save(tiny_model, tmp_path / "m.safetensors")
    loaded = load_trainable(tmp_path / "m.safetensors")
    assert not loaded.is_packed
    assert all(p.requires_grad for p in loaded.parameters())
    assert torch.equal(loaded.pack().describe(IMAGES), tiny_model.pack().describe(IMAGES))


def test_saving_twice_gives_the_same_bytes(packed: TetraModel, path: Path, tmp_path: Path) -> None:
    save(load(path), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_content_hash_is_the_documented_one(path: Path) -> None:
    header, tensors = read(path)
    assert header["content_hash"] == reference_hash(header["config"], tensors)


def test_content_hash_is_the_models_identity(packed: TetraModel, path: Path, tmp_path: Path) -> None:
    before = packed.content_hash
    other = tmp_path / "other.safetensors"
    packed.info = {"note": "does not change what the model computes"}
    save(packed, other)
    assert packed.content_hash == before
    packed.head.p.data += 1.0
    save(packed, other)
    assert packed.content_hash != before


def test_header_reads_alone(packed: TetraModel, path: Path) -> None:
    header = read_header(path)
    assert header.config == packed.config
    assert header.content_hash == packed.content_hash
    assert header.file_bytes == path.stat().st_size
    assert header.tensor_bytes == {k: t.numel() * t.element_size() for k, t in packed.state_dict().items()}


def test_not_overwriting(packed: TetraModel, path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(TetraError) as caught:
        save(packed, path, overwrite=False)
    assert_one_line(caught.value, path, "exists")
    assert path.read_bytes() == before


# --- damage ---


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(data=st.data())
def test_any_flipped_bit_is_noticed(path: Path, packed: TetraModel, data: st.DataObject) -> None:
    whole = path.read_bytes()
    n_header = 8 + int.from_bytes(whole[:8], "little")
    # Half of the examples in the header, which is short and where damage is easy to misread.
    in_header = data.draw(st.booleans())
    place = data.draw(st.integers(0, n_header - 1) if in_header else st.integers(n_header, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    other = path.with_name("damaged.safetensors")
    other.write_bytes(damaged)
    try:
        loaded = load(other)
    except (FileFormatError, ConfigError) as error:
        assert_one_line(error, other)
    else:  # \u00fc and \u00FC are the same JSON
        assert loaded.info == packed.info
        assert loaded.config == packed.config
        for name, tensor in packed.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name])


@pytest.mark.parametrize(("key", "value"), [("info", {"recall": 100}), ("tetra_version", "0.1.1"), ("note", 1)])
def test_facts_cannot_be_changed_in_silence(path: Path, key: str, value: object) -> None:
    header, tensors = read(path)
    header[key] = value
    safetensors.torch.save_file(tensors, path, metadata={"tetra": canonical(header).decode()})
    with pytest.raises(FileFormatError) as caught:
        load(path)
    assert_one_line(caught.value, path, "altered")


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 200, 0.3, 0.9, -1])
def test_truncated_file(path: Path, keep: float) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(FileFormatError) as caught:
        load(path)
    assert_one_line(caught.value, path, "truncated")


def test_appended_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 16)
    with pytest.raises(FileFormatError, match="damaged"):
        load(path)


# --- other files ---


def test_foreign_files(tmp_path: Path) -> None:
    picture = tmp_path / "picture.jpg"
    Image.new("RGB", (8, 8)).save(picture)
    pickle = tmp_path / "model.pt"
    torch.save({"w": torch.zeros(2)}, pickle)
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a", "b")
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, other, metadata={"format": "pt"})
    bare = tmp_path / "bare.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(2)}, bare)
    wrong_json = tmp_path / "list.safetensors"
    wrong_json.write_bytes(struct.pack("<Q", 2) + b"[]")
    for path, words in [
        (picture, "safetensors"),
        (pickle, "pickle"),
        (archive, "pickle"),
        (other, "another kind"),
        (bare, "another kind"),
        (wrong_json, "JSON object"),
        (tmp_path, "folder"),
        (tmp_path / "missing", "no such"),
    ]:
        with pytest.raises(FileFormatError) as caught:
            load(path)
        assert_one_line(caught.value, path, words)


def test_unknown_name_lists_what_ships() -> None:
    with pytest.raises(FileFormatError) as caught:
        load("nanoo")
    assert_one_line(caught.value, "nanoo", *shipped_models())


def test_kinds_are_not_mixed_up(tiny_model: TetraModel, path: Path) -> None:
    with pytest.raises(FileFormatError, match="trainable") as caught:
        load_trainable(path)
    assert_one_line(caught.value, path)
    save(tiny_model, path)
    with pytest.raises(FileFormatError, match="tetra pack") as caught:
        load(path)
    assert_one_line(caught.value, path)


def _set(key: str, value: object) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda header, tensors: header.__setitem__(key, value)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99, "2"])
def test_newer_version(path: Path, version: object) -> None:
    forge(path, _set("format_version", version))
    with pytest.raises(FileFormatError) as caught:
        load(path)
    assert_one_line(caught.value, path, version, "upgrade")


def test_unknown_kind(path: Path) -> None:
    forge(path, _set("kind", "tetra-map"))
    with pytest.raises(FileFormatError) as caught:
        load(path)
    assert_one_line(caught.value, path, "tetra-map")


def test_unknown_config_key(path: Path) -> None:
    def misspell(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        header["config"]["backbone"]["widht"] = header["config"]["backbone"].pop("width")

    forge(path, misspell)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert_one_line(caught.value, path, "widht", "width")


def test_unknown_head_option(path: Path) -> None:
    forge(path, lambda header, tensors: header["config"]["head"]["options"].update(pp=3.0))
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert_one_line(caught.value, path, "pp", "out_dim")


@pytest.mark.parametrize("rest_dtype", [None, torch.float16])
def test_what_could_not_be_loaded_is_not_saved(
    tiny_model: TetraModel, tmp_path: Path, rest_dtype: torch.dtype | None
) -> None:
    with torch.no_grad():
        tiny_model.backbone.cls_token[0, 0, 0] = float("nan") if rest_dtype is None else 1e6
    packed = tiny_model.pack(rest_dtype)
    with pytest.raises(TetraError) as caught:
        save(packed, tmp_path / "m.safetensors")
    assert_one_line(caught.value, tmp_path / "m.safetensors", "backbone.cls_token", "infinite")
    assert not list(tmp_path.iterdir())


def test_a_config_that_gains_a_default_still_loads(path: Path, packed: TetraModel) -> None:
    # Files of older releases lack keys that have a default now; their hash covers what they wrote.
    forge(path, lambda header, tensors: header["config"]["backbone"].pop("full_precision_blocks"))
    assert torch.equal(load(path).describe(IMAGES), packed.describe(IMAGES))


QKV = "backbone.blocks.0.attention.qkv.packed"


def _illegal(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[QKV][3, 5] = 0b10


def _padding(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[QKV][0, -1] |= 0b01000000  # value 127 of a row of 40


def _nan(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["backbone.cls_token"][0, 0, 0] = float("nan")


def _half_scale(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["backbone.blocks.0.mlp.up.weight_scale"] = torch.tensor(0.5, dtype=torch.float16)


def _float_codes(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors[QKV] = tensors[QKV].float()


def _integer_bias(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["head.project.bias"] = torch.zeros(64, dtype=torch.int32)


def _reshaped(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors["head.project.bias"] = torch.zeros(65)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda header, tensors: tensors.pop("head.p"), ["head.p", "missing"]),
        (lambda header, tensors: tensors.update(extra=torch.zeros(1)), ["extra", "unexpected"]),
        (_reshaped, ["head.project.bias", "[65]", "[64]"]),
        (_illegal, [QKV, "row 3", "illegal"]),
        (_padding, [QKV, "not zero"]),
        (_nan, ["backbone.cls_token", "NaN"]),
        (_half_scale, ["weight_scale", "float16", "float32"]),
        (_float_codes, [QKV, "float32", "uint8"]),
        (_integer_bias, ["head.project.bias", "int32"]),
    ],
)
def test_tensors_that_do_not_fit(
    path: Path, edit: Callable[[dict[str, Any], dict[str, Tensor]], None], words: list[str]
) -> None:
    forge(path, edit)
    with pytest.raises(FileFormatError) as caught:
        load(path)
    assert_one_line(caught.value, path, *words)


def test_forging_without_an_edit_loads(path: Path, packed: TetraModel) -> None:
    # The tests above fail for their edit, not for being rewritten.
    forge(path, lambda header, tensors: None)
    assert torch.equal(load(path).describe(IMAGES), packed.describe(IMAGES))
    forge(path, lambda header, tensors: tensors[QKV].copy_(pack_ternary(torch.ones(72, 40, dtype=torch.int8))))
    assert not torch.equal(load(path)(IMAGES), packed(IMAGES))


# --- writing ---


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_full_disk_leaves_the_old_file_and_no_other(path: Path) -> None:
    before = path.read_bytes()
    script = f"""
import resource
from tetra.files import load, save
from tetra.errors import TetraError
model = load({str(path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # as if the disk had room for one block
try:
    save(model, {str(path)!r})
except TetraError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path}: can't be written")
    assert done.stdout.count("\n") == 1
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_atomic_write_leaves_nothing_when_its_block_fails(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")
    with pytest.raises(KeyError), atomic_write(target) as file:  # noqa: PT012
        file.write(b"half of the new")
        raise KeyError
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_atomic_write_keeps_the_users_file_mode(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [1, None]})
    (tmp_path / "plain").write_text("")
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, None]}
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and links are POSIX")
def test_pipes_and_links_stay_what_they_are(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-pipe").symlink_to("pipe")
    for name in ("pipe", "to-pipe"):
        with pytest.raises(TetraError) as caught:
            write_json(tmp_path / name, 1)
        assert_one_line(caught.value, tmp_path / name, "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/a.json")
    for value in (1, 2):  # the link leads nowhere, then to a file
        write_json(tmp_path / "link", value)
        assert (tmp_path / "link").is_symlink()
        assert json.loads((tmp_path / "folder" / "a.json").read_text()) == value
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "pipe", "to-pipe"]
    assert os.listdir(tmp_path / "folder") == ["a.json"]


@pytest.mark.parametrize("name", ["no/such/folder/x", "."])
def test_unwritable_places_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(TetraError) as caught:
        check_output(tmp_path / name)
    assert_one_line(caught.value, tmp_path)


def test_config_survives_json(tiny_config: ModelConfig) -> None:
    assert ModelConfig.from_dict(json.loads(json.dumps(tiny_config.to_dict()))) == tiny_config
