"""The hash that decides what dropout keeps. What every backend makes of it is tested with the operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tetra.kernels.dropout import check_dropout, hash_words, keep_scale, mix, seed_words, threshold

MASK = 0xFFFFFFFF


def hashes(seed: int, rows: int, columns: int) -> Tensor:
    """float64 [rows, columns] in [0, 1)."""
    words = hash_words(*seed_words(torch.tensor(seed)), torch.arange(rows)[:, None], torch.arange(columns))
    return words.double() / 2**32


def correlation(a: Tensor, b: Tensor) -> float:
    return abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]))


def test_the_mixer_is_the_published_one() -> None:
    """Its three multiplications and shifts in Python's integers, and that nothing is lost: it can be undone."""
    for x in (0, 1, 2, 12345, 0x80000000, MASK):
        y = x
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            y = (y ^ y >> shift) * factor & MASK
        y ^= y >> 16
        assert int(mix(torch.tensor(x))) == y
        z = y ^ y >> 16
        z = z * pow(0x846CA68B, -1, 2**32) & MASK
        z ^= z >> 15 ^ z >> 30
        z = z * pow(0x7FEB352D, -1, 2**32) & MASK
        assert z ^ z >> 16 == x


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -1, 2**40])
def test_hashes_are_uniform(seed: int) -> None:
    """Over rows and columns as small as counters are; a chi-square of 256 bins, 1 in 10^6 by chance above 375."""
    found = hashes(seed, 512, 512)
    counts = torch.histc(found.flatten().float(), 256, 0.0, 1.0)
    expected = found.numel() / 256
    assert float(((counts - expected) ** 2 / expected).sum()) < 375
    # Every row and every column alone: 512 values each, 6 standard deviations.
    for dim in (0, 1):
        assert float((found.mean(dim) - 0.5).abs().max()) < 6 * (1 / 12 / 512) ** 0.5


def test_neighbours_and_seeds_are_independent() -> None:
    found = hashes(7, 512, 512)
    limit = 5 / 512
    assert correlation(found[1:], found[:-1]) < limit
    assert correlation(found[:, 1:], found[:, :-1]) < limit
    assert correlation(found[1:, 1:], found[:-1, :-1]) < limit
    assert correlation(found, found.T) < limit
    for other in (6, 8, 7 + 2**32, -7):
        assert correlation(found, hashes(other, 512, 512)) < limit


@pytest.mark.parametrize("bit", range(0, 32, 5))
def test_a_changed_bit_changes_half_of_the_others(bit: int) -> None:
    words = torch.randint(0, 2**32, (4000,), generator=torch.Generator().manual_seed(bit))
    changed = mix(words) ^ mix(words ^ (1 << bit))
    flips = torch.stack([(changed >> i & 1).double().mean() for i in range(32)])
    assert float((flips - 0.5).abs().max()) < 6 * 0.5 / 4000**0.5


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_means_stay_as_they_were(p: float) -> None:
    kept = hashes(3, 1000, 1000) * 2**32 >= threshold(p)
    assert float(kept.double().mean()) * keep_scale(p) == pytest.approx(1.0, abs=6e-3 * (p / (1 - p)) ** 0.5)
    assert keep_scale(p) == pytest.approx(1 / (1 - p), rel=1e-8)


def test_no_dropout_keeps_all() -> None:
    assert threshold(0.0) == 0
    assert keep_scale(0.0) == 1.0
    check_dropout(0.0)
    for p in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="wanted 0 <= dropout < 1"):
            check_dropout(p)
