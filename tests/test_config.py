"""Configurations: JSON and back, and one clear line for everything that can't be."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import yaml

from tetra.config import BACKBONES, BackboneConfig, HeadConfig, ModelConfig, from_dict, model_config
from tetra.errors import ConfigError

SMALL: dict[str, Any] = {"width": 32, "depth": 2, "n_heads": 2, "head_dim": 16, "mlp_dim": 64}
HEADS = ("boq", "salad", "mixvpr", "gem")


@pytest.mark.parametrize("head", [*HEADS, None])
@pytest.mark.parametrize("arch", sorted(BACKBONES))
def test_stock_configurations_survive_json_and_yaml(arch: str, head: str | None) -> None:
    config = model_config(arch, head)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))).backbone == config.backbone
    back = ModelConfig.from_dict(yaml.safe_load(json.dumps(config.to_dict())))
    assert json.dumps(back.to_dict()) == json.dumps(config.to_dict())
    assert (back.head is None) == (head is None)


def test_stock_backbones_are_those_of_the_paper() -> None:
    small, base = BACKBONES["vit-s"], BACKBONES["vit-b"]
    assert (small.width, small.depth, small.n_heads, small.head_dim, small.inner_dim) == (384, 12, 6, 96, 576)
    assert (base.width, base.depth, base.n_heads, base.head_dim, base.inner_dim) == (768, 12, 12, 64, 768)
    assert (small.mlp_dim, base.mlp_dim) == (1536, 3072)
    assert (small.dropout, small.embedding_dropout) == (0.05, 0.1)
    assert (base.dropout, base.embedding_dropout) == (0.1, 0.05)
    for config in (small, base):
        assert config.image_size == (322, 322)
        assert config.grid == (23, 23)
        assert config.full_precision_blocks == 1
        assert config.stem == "patch"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"widht": 32}, ("unknown key 'widht'", "did you mean 'width'?")),
        ({"zzz": 1}, ("unknown key 'zzz'", "known keys")),
        ({"width": 0}, ("'width' is 0", "positive")),
        ({"width": "32"}, ("'width' is '32'", "int")),
        ({"width": True}, ("'width' is True", "int")),
        ({"width": 32.5}, ("'width' is 32.5", "int")),
        ({"depth": -1}, ("'depth' is -1",)),
        ({"dropout": 1.0}, ("'dropout' is 1.0", "0 <= value < 1")),
        ({"dropout": None}, ("'dropout' is None", "float")),
        ({"full_precision_blocks": 3}, ("'full_precision_blocks' is 3", "depth 2")),
        ({"image_size": [30, 28]}, ("'image_size' is (30, 28)", "patch_size 14")),
        ({"image_size": [28]}, ("'image_size' is (28,)",)),
        ({"image_size": 28}, ("'image_size' is 28",)),
        ({"image_size": [0, 28]}, ("'image_size' is (0, 28)",)),
        ({"stem": "convs"}, ("'stem' is 'convs'", "conv")),
        ({"stem": "conv", "patch_size": 14, "image_size": [28, 28]}, ("'stem_channels' has 0 entries",)),
    ],
)
def test_bad_backbone_settings_are_one_clear_line(change: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_dict(BackboneConfig, {**SMALL, **change}, "file.yaml: backbone")
    message = str(caught.value)
    assert "\n" not in message
    assert "backbone" in message
    for word in words:
        assert word in message


def test_missing_keys_are_named() -> None:
    with pytest.raises(ConfigError, match=r"somewhere: missing key 'mlp_dim'"):
        from_dict(BackboneConfig, {k: v for k, v in SMALL.items() if k != "mlp_dim"}, "somewhere")


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_what_is_not_a_mapping_is_refused(data: object) -> None:
    with pytest.raises(ConfigError, match="expected a mapping"):
        ModelConfig.from_dict(data)


def test_errors_inside_nested_sections_name_the_section() -> None:
    data = {"arch": "x", "backbone": SMALL, "head": {"kind": "boqs"}}
    with pytest.raises(ConfigError, match=r"model config: head: 'kind' is 'boqs'"):
        ModelConfig.from_dict(data)
    with pytest.raises(ConfigError, match=r"model config: backbone: unknown key 'with'"):
        ModelConfig.from_dict({**data, "backbone": {**SMALL, "with": 1}})


def test_values_that_can_not_be_name_the_file_and_the_section_once() -> None:
    with pytest.raises(ConfigError, match=r"^m\.json: backbone: 'depth' is 0, expected a positive integer$"):
        ModelConfig.from_dict({"arch": "x", "backbone": {**SMALL, "depth": 0}}, "m.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(ConfigError, match=r"here: 'dropout' is .*, expected float"):
        from_dict(BackboneConfig, {**SMALL, "dropout": value}, "here")


def test_numbers_that_yaml_takes_for_text() -> None:
    data = {**SMALL, **yaml.safe_load("dropout: 1e-3")}
    with pytest.raises(ConfigError, match=r"here: 'dropout' is '1e-3', expected float; write 1\.0e-03") as caught:
        from_dict(BackboneConfig, data, "here")
    assert yaml.safe_load(str(caught.value).partition("; write ")[2].partition(",")[0]) == 1e-3


def test_lists_become_tuples_and_integers_pass_for_floats() -> None:
    config = from_dict(BackboneConfig, {**SMALL, "image_size": [28, 42], "dropout": 0}, "here")
    assert config.image_size == (28, 42)
    assert config.grid == (2, 3)
    assert config.dropout == 0


def test_to_dict_shares_nothing_with_the_configuration() -> None:
    config = ModelConfig("x", BackboneConfig(**SMALL), HeadConfig("gem", {"out_dim": 64}))
    config.to_dict()["head"]["options"]["out_dim"] = 8
    assert asdict(config)["head"]["options"] == {"out_dim": 64}


def test_unknown_architecture_and_head_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown architecture 'vit-l'; known: vit-s, vit-b, nano"):
        model_config("vit-l")
    with pytest.raises(ConfigError, match=r"unknown head 'netvlad'; known: boq, salad, mixvpr, gem"):
        model_config("nano", "netvlad")


def test_stock_options_are_copies() -> None:
    first = model_config("nano", "mixvpr")
    assert first.head is not None
    before = dict(first.head.options)
    first.head.options["out_rows"] = 1
    second = model_config("nano", "mixvpr")
    assert second.head is not None
    assert second.head.options == before


def test_frozen() -> None:
    config = BackboneConfig(**SMALL)
    with pytest.raises(AttributeError):
        config.width = 3  # type: ignore[misc]
    assert replace(config, width=64).width == 64
