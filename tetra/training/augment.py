"""Augmentation of a whole batch: camera motion, light, weather and sensor, as a robot meets them.

Everything is drawn from torch's global generator, which the trainer seeds for every step, so that a resumed
run draws what an uninterrupted one would.

Kornia has these effects one by one, but a chain of ten of its transforms took 4.2 times as long an image (CPU
time, medians of 15 batches of 64 taken in turn, 224 to 112 pixels), which would be a fifth of nano's training
time. Motion is kept apart from light, as a homography, so that a teacher's token map can move with the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tetra.config import check_range


@dataclass(frozen=True)
class AugmentConfig:
    """Strength of each effect; 0 turns it off.

    Attributes:
        shift, zoom, rotation_deg, shear, perspective: limits of the camera's motion: translation in image
            sides, log2 of the zoom, degrees, slope, and projective terms.
        mirror: probability of a mirror image. A mirrored street is another place: for distillation only.
        brightness, contrast, gamma, saturation, hue: log2 or relative limits of the light.
        shade: probability of a soft shadow or glow across the image.
        grey: probability of a colourless image.
        blur, low_resolution, noise, erase: probability of each.
    """

    shift: float = 0.06
    zoom: float = 0.15
    rotation_deg: float = 5.0
    shear: float = 0.04
    perspective: float = 0.06
    mirror: float = 0.0
    brightness: float = 0.7
    contrast: float = 0.6
    gamma: float = 0.8
    saturation: float = 0.8
    hue: float = 0.05
    shade: float = 0.4
    grey: float = 0.25
    blur: float = 0.2
    low_resolution: float = 0.35
    noise: float = 0.35
    erase: float = 0.25

    def __post_init__(self) -> None:
        check_range("augment", self, "shift zoom rotation_deg shear perspective brightness contrast gamma hue", 0)
        check_range("augment", self, "mirror saturation shade grey blur low_resolution noise erase", 0, 1)


def _uniform(n: int, limit: float, device: torch.device) -> Tensor:
    return (torch.rand(n, device=device) * 2 - 1) * limit


def random_homography(n: int, config: AugmentConfig, device: torch.device) -> Tensor:
    """Homographies [n, 3, 3] from output to input in normalised coordinates ([-1, 1] is the image)."""
    angle = _uniform(n, math.radians(config.rotation_deg), device)
    scale = 2.0 ** -_uniform(n, config.zoom, device)
    shear = _uniform(n, config.shear, device)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    zero, one = torch.zeros(n, device=device), torch.ones(n, device=device)
    rows = [
        [cos, shear - sin, _uniform(n, 2 * config.shift, device)],
        [sin, cos, _uniform(n, 2 * config.shift, device)],
        [_uniform(n, config.perspective, device), _uniform(n, config.perspective, device), one + zero],
    ]
    homography = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)
    mirrored = torch.rand(n, device=device) < config.mirror
    homography[:, :, 0] *= torch.where(mirrored, -1.0, 1.0)[:, None]
    return homography


def warp(images: Tensor, homography: Tensor, size: tuple[int, int]) -> Tensor:
    """Sample float [B, C, H, W] through homographies [B, 3, 3] at ``size``; edges repeat by reflection."""
    h, w = size
    ys = (torch.arange(h, device=images.device) + 0.5) / h * 2 - 1
    xs = (torch.arange(w, device=images.device) + 0.5) / w * 2 - 1
    points = torch.stack([xs.expand(h, w), ys[:, None].expand(h, w), torch.ones(h, w, device=images.device)], dim=-1)
    mapped = points.reshape(1, -1, 3) @ homography.transpose(1, 2)
    grid = (mapped[..., :2] / mapped[..., 2:].clamp(min=0.1)).reshape(-1, h, w, 2)
    # One resample for both motion and size; a box filter first where the output is much smaller.
    factor = images.shape[-1] // w
    if factor >= 2:
        images = F.avg_pool2d(images, factor)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _chance(n: int, probability: float, device: torch.device) -> Tensor:
    return (torch.rand(n, device=device) < probability).float().reshape(n, 1, 1, 1)


def photometric(x: Tensor, config: AugmentConfig) -> Tensor:
    """Light, weather and sensor on float [B, 3, H, W] in [0, 1] -> the same."""
    n, _, h, w = x.shape
    device = x.device

    def per_image(limit: float) -> Tensor:
        return _uniform(n, limit, device).reshape(n, 1, 1, 1)

    # Sensor resolution and focus first: light does not change what a lens has lost.
    if config.low_resolution > 0:
        pick = torch.rand(n, device=device) < config.low_resolution
        if pick.any():
            side = int(torch.randint(max(8, h // 4), max(9, (3 * h) // 4), ()).item())
            small = F.interpolate(x[pick], size=(side, max(8, side * w // h)), mode="bilinear", antialias=True)
            x = x.clone()
            x[pick] = F.interpolate(small, size=(h, w), mode="bilinear", align_corners=False)
    if config.blur > 0:
        pick = torch.rand(n, device=device) < config.blur
        if pick.any():
            length = 3 + 2 * int(torch.randint(0, max(1, h // 64), ()).item())
            along = bool(torch.rand(()) < 0.7)  # a moving camera blurs along the horizon more often
            kernel = (1, length) if along else (length, 1)
            padding = (0, length // 2) if along else (length // 2, 0)
            x = x.clone()
            x[pick] = F.avg_pool2d(x[pick], kernel, stride=1, padding=padding, count_include_pad=False)

    grey = x.mean(1, keepdim=True)
    saturation = 1.0 - torch.rand(n, 1, 1, 1, device=device) * config.saturation
    saturation = saturation * (1 - _chance(n, config.grey, device))
    x = grey + (x - grey) * saturation
    if config.hue > 0:
        x = x * (1.0 + _uniform(3 * n, 2 * config.hue, device).reshape(n, 3, 1, 1) * saturation)
    x = x.clamp(1e-4, 1.0) ** (2.0 ** per_image(config.gamma))
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * 2.0 ** per_image(config.contrast) + mean * 2.0 ** per_image(config.brightness)
    if config.shade > 0:
        ys = torch.linspace(-1, 1, h, device=device).reshape(1, 1, h, 1)
        xs = torch.linspace(-1, 1, w, device=device).reshape(1, 1, 1, w)
        edge = per_image(1.0) * xs + per_image(1.0) * ys + per_image(0.5)
        ramp = torch.sigmoid(edge * 4.0 * 2.0 ** per_image(2.0))
        x = x * (1.0 + ramp * per_image(0.7) * _chance(n, config.shade, device))
    if config.noise > 0:
        amount = torch.rand(n, 1, 1, 1, device=device) * 0.08 * _chance(n, config.noise, device)
        x = x + torch.randn(x.shape, device=device) * amount
    if config.erase > 0:
        for i in torch.nonzero(torch.rand(n, device=device) < config.erase).flatten().tolist():
            eh, ew = (int(s * (0.1 + 0.25 * torch.rand(()).item())) for s in (h, w))
            top, left = (int(torch.randint(0, s - e + 1, ()).item()) for s, e in ((h, eh), (w, ew)))
            x[i, :, top : top + eh, left : left + ew] = torch.rand(3, 1, 1, device=device)
    return x.clamp(0.0, 1.0)


def augment(images: Tensor, config: AugmentConfig, size: tuple[int, int]) -> Tensor:
    """uint8 [B, 3, H, W] -> float [B, 3, *size] in [0, 1], each image with its own motion, light and sensor."""
    x = images.float().div_(255.0)
    return photometric(warp(x, random_homography(len(x), config, x.device), size), config)


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [B, 3, H, W] -> float [B, 3, *size] in [0, 1], without augmentation."""
    x = images.float() / 255.0
    return x if tuple(x.shape[-2:]) == size else F.interpolate(x, size=size, mode="bilinear", antialias=True)
