from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tetra.kernels import patch_rows, patches

Run = Callable[..., Any]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 1e-6}


def rows(
    images: torch.Tensor, patch_size: int, weight: torch.Tensor, bias: torch.Tensor, out_dtype: torch.dtype
) -> torch.Tensor:
    return patch_rows(images, patch_size, weight, bias, mean=MEAN, std=STD, out_dtype=out_dtype)


def expected(images: torch.Tensor, patch_size: int, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Patch by patch, value by value, in float64."""
    x = images.double() / 255 if images.dtype == torch.uint8 else images.double()
    x = (x - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(3, 1, 1)
    b, _, height, width = x.shape
    p = patch_size
    out = [
        [
            x[i, :, r : r + p, c : c + p].permute(1, 2, 0).flatten()
            for r in range(0, height, p)
            for c in range(0, width, p)
        ]
        for i in range(b)
    ]
    flat = torch.stack([torch.stack(image) for image in out])
    centred = flat - flat.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return normed * weight.double() + bias.double()


def check(out: torch.Tensor, images: torch.Tensor, patch_size: int, weight: torch.Tensor, bias: torch.Tensor) -> None:
    wanted = expected(images, patch_size, weight, bias)
    assert out.shape == wanted.shape
    assert ((out.double() - wanted).abs() <= ROUNDING[out.dtype] * (wanted.abs() + 1) + 5e-6).all()


@pytest.mark.parametrize("out_dtype", ROUNDING)
@pytest.mark.parametrize(
    ("shape", "patch_size"), [((2, 3, 28, 42), 14), ((1, 3, 5, 10), 5), ((1, 3, 48, 16), 16), ((1, 3, 3, 4), 1)]
)
def test_patch_rows_are_their_definition(
    run: Run, out_dtype: torch.dtype, shape: tuple[int, ...], patch_size: int
) -> None:
    n_values = 3 * patch_size**2
    weight, bias = torch.rand(n_values) + 0.5, torch.randn(n_values)
    for images in (torch.randint(0, 256, shape, dtype=torch.uint8), torch.rand(shape), torch.rand(shape).half()):
        out = run(rows, images, patch_size, weight, bias, out_dtype)
        assert out.dtype == out_dtype
        check(out, images, patch_size, weight, bias)


def test_images_need_not_be_contiguous(run: Run) -> None:
    weight, bias = torch.rand(147).half() + 0.5, torch.randn(294).bfloat16()[::2]
    pixels = torch.randint(0, 256, (2, 40, 50, 4), dtype=torch.uint8)
    channels_last = pixels[:, :21, :28, :3].permute(0, 3, 1, 2)
    turned = pixels[:, :14, :35, 1:].permute(0, 3, 2, 1)
    reordered = torch.rand(3, 2, 14, 14).transpose(0, 1)
    for images in (channels_last, turned, reordered, torch.rand(1, 3, 7, 7).expand(2, 3, 7, 7)):
        check(run(rows, images, 7, weight, bias, torch.float32), images, 7, weight, bias)


def test_no_images(run: Run) -> None:
    out = run(rows, torch.zeros(0, 3, 14, 28, dtype=torch.uint8), 14, torch.ones(588), torch.ones(588), torch.float16)
    assert out.shape == (0, 2, 588)


def test_one_pixel_that_is_not_finite_stays_in_its_patch(run: Run) -> None:
    images = torch.rand(1, 3, 14, 21)
    images[0, 1, 13, 8] = float("nan")
    out = run(rows, images, 7, torch.ones(147), torch.zeros(147), torch.float32)
    assert torch.isnan(out).all(-1).tolist() == [[False, False, False, False, True, False]]


def test_wrong_arguments_are_refused() -> None:
    images, ones = torch.zeros(1, 3, 8, 12), torch.ones(48)
    for wrong, size, message in (
        (images.double(), 4, r"images: dtype is torch\.float64"),
        (images.long(), 4, r"images: dtype is torch\.int64"),
    ):
        with pytest.raises(TypeError, match=message):
            rows(wrong, size, ones, ones, torch.float32)
    for wrong, size, message in (
        (images[0], 4, r"images: shape is \(3, 8, 12\)"),
        (images[:, :2], 4, r"images: shape is \(1, 2, 8, 12\), wanted \[B, 3, H, W\]"),
        (images[..., :11], 4, "8 x 11 pixels are not positive multiples of patch_size = 4"),
        (images[..., :0], 4, "8 x 0 pixels"),
        (images, 0, "patch_size: is 0"),
        (images, 2, r"weight: shape is \(48,\), wanted \(12,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            rows(wrong, size, ones, ones, torch.float32)
    with pytest.raises(TypeError, match=r"out_dtype: is torch\.int8"):
        rows(images, 4, ones, ones, torch.int8)
    with pytest.raises(ValueError, match="mean: has 2 values"):
        patch_rows(images, 4, ones, ones, mean=MEAN[:2], std=STD)
    with pytest.raises(ValueError, match=r"std: is .* wanted positive"):
        patch_rows(images, 4, ones, ones, mean=MEAN, std=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="bias: is on meta"):
        patch_rows(images, 4, ones, ones.to("meta"), mean=MEAN, std=STD)


def test_operator_is_well_formed() -> None:
    images, ones = torch.rand(2, 3, 8, 12), torch.ones(48)
    torch.library.opcheck(patches._patch_rows_op, (images, 4, ones, ones, 1e-5, list(MEAN), list(STD), torch.float16))


def test_it_compiles_whole_and_exports_for_any_batch() -> None:
    class Stem(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return rows(images, 4, torch.ones(48), torch.zeros(48), torch.float32) * 2

    images = torch.rand(3, 3, 8, 12)
    compiled = torch.compile(Stem(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images), Stem()(images))
    program = torch.export.export(Stem(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.equal(program.module()(images[:2]), Stem()(images[:2]))


def test_cost_counts_every_value_once() -> None:
    assert patches.cost(2, 28, 14) == (9 * 2 * 3 * 28 * 14, 3 * 2 * 3 * 28 * 14)
