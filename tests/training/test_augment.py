"""Augmentation: what each effect does, and that everything is drawn from the one generator."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tetra.training.augment import AugmentConfig, augment, photometric, random_homography, resize, warp

NOTHING = AugmentConfig(**{f.name: 0.0 for f in fields(AugmentConfig)})
CPU = torch.device("cpu")


@pytest.fixture
def images() -> Tensor:
    smooth = F.interpolate(torch.rand(4, 3, 8, 12), size=(32, 48), mode="bilinear")
    return (smooth * 255).to(torch.uint8)


def identity(n: int) -> Tensor:
    return torch.eye(3).repeat(n, 1, 1)


@pytest.mark.parametrize("size", [(32, 48), (16, 24), (40, 40), (8, 64), (9, 7)])
@pytest.mark.parametrize("config", [AugmentConfig(), replace(NOTHING, shift=0.5, perspective=0.4)])
def test_shape_and_range(config: AugmentConfig, size: tuple[int, int], images: Tensor) -> None:
    for _ in range(5):
        out = augment(images, config, size)
        assert out.shape == (4, 3, *size)
        assert out.dtype == torch.float32
        assert torch.isfinite(out).all()
        assert out.min() >= 0.0
        assert out.max() <= 1.0


@pytest.mark.parametrize("effect", [f.name for f in fields(AugmentConfig)])
def test_every_effect_alone_changes_images_and_stays_in_range(effect: str, images: Tensor) -> None:
    config = replace(NOTHING, **{effect: 1.0 if effect != "rotation_deg" else 30.0})
    out = augment(images, config, (32, 48))
    assert (out - images.float() / 255).abs().max() > 0.02
    assert torch.isfinite(out).all()
    assert 0.0 <= out.min() <= out.max() <= 1.0


def test_without_effects_images_pass_nearly_unchanged(images: Tensor) -> None:
    torch.testing.assert_close(augment(images, NOTHING, (32, 48)), images.float() / 255, rtol=0, atol=2e-3)


def test_one_seed_one_result(images: Tensor) -> None:
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(augment(images, AugmentConfig(), (32, 48)))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_input_is_left_alone(images: Tensor) -> None:
    before = images.clone()
    augment(images, AugmentConfig(low_resolution=1.0, blur=1.0, erase=1.0), (32, 48))
    assert torch.equal(images, before)
    x = images.float() / 255
    y = x.clone()
    photometric(x, AugmentConfig(low_resolution=1.0, blur=1.0, erase=1.0))
    assert torch.equal(x, y)


def test_mirror(images: Tensor) -> None:
    out = augment(images, replace(NOTHING, mirror=1.0), (32, 48))
    torch.testing.assert_close(out, images.float().flip(-1) / 255, rtol=0, atol=2e-3)


def test_no_mirror_by_default() -> None:
    assert AugmentConfig().mirror == 0.0
    homography = random_homography(200, AugmentConfig(), CPU)
    assert (homography[:, 0, 0] > 0).all()


@pytest.mark.parametrize(("dx", "dy"), [(3, 0), (0, 5), (-4, 2)])
def test_warp_against_a_shift_by_hand(dx: int, dy: int, images: Tensor) -> None:
    x = images.float()
    homography = identity(4)
    homography[:, 0, 2], homography[:, 1, 2] = 2 * dx / 48, 2 * dy / 32
    out = warp(x, homography, (32, 48))
    for row in range(8, 24):
        for column in range(8, 40):
            torch.testing.assert_close(
                out[..., row, column], x[..., row + dy, column + dx], rtol=0, atol=0.05, msg=f"{row}, {column}"
            )


def test_warp_reflects_at_the_edge() -> None:
    x = torch.arange(8.0).reshape(1, 1, 1, 8).expand(1, 1, 8, 8)
    homography = identity(1)
    homography[:, 0, 2] = 2 * 2 / 8
    assert warp(x, homography, (8, 8))[0, 0, 0].tolist() == pytest.approx([2, 3, 4, 5, 6, 7, 7, 6], abs=1e-4)


def test_warp_by_a_perspective_by_hand() -> None:
    x = torch.rand(1, 1, 16, 16)
    homography = torch.tensor([[[0.9, 0.1, 0.05], [-0.1, 0.8, 0.1], [0.2, -0.1, 1.0]]])
    out = warp(x, homography, (16, 16))
    for row, column in ((5, 6), (8, 8), (10, 4)):
        point = torch.tensor([(column + 0.5) / 8 - 1, (row + 0.5) / 8 - 1, 1.0])
        u, v, w = (homography[0] @ point).tolist()
        px, py = (u / w + 1) * 8 - 0.5, (v / w + 1) * 8 - 0.5
        x0, y0 = int(px), int(py)
        fx, fy = px - x0, py - y0
        expected = sum(
            float(x[0, 0, y0 + j, x0 + i]) * (fx if i else 1 - fx) * (fy if j else 1 - fy)
            for i in (0, 1)
            for j in (0, 1)
        )
        assert out[0, 0, row, column].item() == pytest.approx(expected, abs=1e-4)


def test_shrinking_averages(images: Tensor) -> None:
    x = images.float()
    out = warp(x, identity(4), (8, 12))
    torch.testing.assert_close(out, F.avg_pool2d(x, 4), rtol=0, atol=0.05)


@pytest.mark.parametrize("n", [1, 5])
def test_limits_of_the_motion(n: int) -> None:
    assert torch.equal(random_homography(n, NOTHING, CPU), identity(n))
    for _ in range(20):
        shift = random_homography(n, replace(NOTHING, shift=0.1), CPU)
        assert (shift[:, :2, 2].abs() <= 0.2).all()  # 0.1 sides of an image that is 2 wide
        zoom = random_homography(n, replace(NOTHING, zoom=1.0), CPU)
        assert ((zoom[:, 0, 0] >= 0.5) & (zoom[:, 0, 0] <= 2.0)).all()
        assert torch.equal(zoom[:, 0, 0], zoom[:, 1, 1])
        turned = random_homography(n, replace(NOTHING, rotation_deg=10.0), CPU)
        torch.testing.assert_close(torch.linalg.det(turned[:, :2, :2]), torch.ones(n))
        assert (turned[:, 1, 0].abs() <= 0.1737).all()


def test_grey_images_stay_grey_and_grey_takes_the_colour(images: Tensor) -> None:
    out = augment(images, replace(NOTHING, grey=1.0), (32, 48))
    torch.testing.assert_close(out[:, 0], out[:, 1], rtol=0, atol=1e-6)
    grey = images[:, :1].expand(-1, 3, -1, -1).contiguous()
    out = augment(grey, replace(NOTHING, saturation=1.0, gamma=0.5, contrast=0.5), (32, 48))
    torch.testing.assert_close(out[:, 0], out[:, 2], rtol=0, atol=1e-5)


def test_resize(images: Tensor) -> None:
    assert torch.equal(resize(images, (32, 48)), images.float() / 255)
    out = resize(images, (16, 24))
    expected = F.interpolate(images.float() / 255, size=(16, 24), mode="bilinear", antialias=True)
    torch.testing.assert_close(out, expected)
