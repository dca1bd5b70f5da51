"""Losses of several processes, each with its part of a batch, against one process with all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist

from tetra.errors import TrainingError
from tetra.training.losses import BinaryMultiSimilarityLoss

WORLD_SIZES = (1, 2, 3)
DTYPES = {"float32": (torch.float32, 2e-6), "float64": (torch.float64, 1e-12)}
LAMBDAS = (0.0, 0.4, 1.0)
# Places mostly within a process, places across all of them, and parts that would be refused on their own.
LABELS = {
    "mixed": [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4],
    "far apart": [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3],
    "one place a process": [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1],
}
REFUSED = {"one place": [5] * 12, "one image a place": list(range(12))}
CASES = [(name, dtype, lam) for name in LABELS for dtype in DTYPES for lam in LAMBDAS]


def batch(name: str, dtype: str) -> tuple[nn.Linear, Tensor, Tensor]:
    """A model, what it gets, and labels; the same in every process."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.tensor((LABELS | REFUSED)[name])
    x = torch.randn(12, 10, generator=generator) + torch.randn(12, 10, generator=generator)[labels] / 3
    model = nn.Linear(10, 37, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(37, 10, generator=generator) / 4)  # a third of the descriptors' values pass 1
    return model.to(DTYPES[dtype][0]), x.to(DTYPES[dtype][0]), labels


def train(name: str, dtype: str, lam: float, part: slice) -> dict[str, Tensor]:
    """Loss and gradient that a process with ``part`` of the batch gets."""
    model, x, labels = batch(name, dtype)
    loss = BinaryMultiSimilarityLoss()(model(x[part]), labels[part], lam)
    loss.backward()
    assert model.weight.grad is not None
    return {"loss": loss.detach(), "gradient": model.weight.grad}


def run_rank(rank: int, folder: Path) -> None:
    """Everything that the tests look at; one start of each process serves all world sizes."""
    torch.set_num_threads(1)
    for world_size in WORLD_SIZES:
        if rank >= world_size:
            continue
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store{world_size}", rank=rank, world_size=world_size
        )
        n = 12 // world_size
        part = slice(rank * n, (rank + 1) * n)
        found: dict[str, Any] = {}
        for case in CASES:
            found[str(case)] = train(*case, part)
        for name in REFUSED:
            try:
                train(name, "float32", 0.5, part)
            except TrainingError as error:
                found[name] = str(error)
        torch.save(found, folder / f"{world_size}_{rank}.pt")
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """World size -> what each rank found."""
    if not dist.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.start_processes(run_rank, (folder,), nprocs=max(WORLD_SIZES), start_method="spawn")
    files = {n: [folder / f"{n}_{rank}.pt" for rank in range(n)] for n in WORLD_SIZES}
    return {n: [torch.load(file, weights_only=True) for file in files[n]] for n in WORLD_SIZES}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("name", "dtype", "lam"), CASES)
def test_loss_and_mean_gradient_are_those_of_one_process(
    results: dict[int, list[dict[str, Any]]], world_size: int, name: str, dtype: str, lam: float
) -> None:
    wanted, tolerance = train(name, dtype, lam, slice(None)), DTYPES[dtype][1]
    found = [of_rank[str((name, dtype, lam))] for of_rank in results[world_size]]
    losses = {of_rank["loss"].item() for of_rank in found}
    assert len(losses) == 1  # to the bit
    assert losses.pop() == pytest.approx(wanted["loss"].item(), rel=tolerance)
    # DistributedDataParallel averages.
    difference = torch.stack([of_rank["gradient"] for of_rank in found]).mean(0) - wanted["gradient"]
    assert difference.norm() <= tolerance * wanted["gradient"].norm()
    assert wanted["gradient"].norm() > 0.01


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_process_refuses_a_batch_that_teaches_nothing(
    results: dict[int, list[dict[str, Any]]], world_size: int
) -> None:
    for found in results[world_size]:
        assert "places in a batch of 12 images: 1, wanted 2" in found["one place"]
        assert "places in a batch of 12 images: 12, each shown once" in found["one image a place"]
