"""The view of recall while training: against independent figures, and the same from several processes as from one."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from tetra.config import from_dict
from tetra.datasets import load_dataset
from tetra.errors import ConfigError, DatasetError, ImageError
from tetra.evaluation import evaluate
from tetra.files import load_trainable, save
from tetra.images import load_image
from tetra.model import TetraModel
from tetra.training.augment import AugmentConfig, augment, resize
from tetra.training.data import find_images
from tetra.training.probe import (
    BATCH,
    Probe,
    ProbeConfig,
    backbone_probe,
    head_probe,
    in_batches,
    own_part,
    pooled_tokens,
    reduced,
)

SIZE = (32, 32)


def place(path: Path, place_number: int, noise: float, seed: int) -> None:
    """A picture of a place, disturbed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(place_number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    fine = np.asarray(Image.fromarray(coarse).resize((40, 36), Image.Resampling.BICUBIC)).astype(float)
    fine += np.random.default_rng(1000 + seed).normal(0.0, noise, (1, 1, 3)) + np.random.default_rng(seed).normal(
        0.0, noise, fine.shape
    )
    Image.fromarray(fine.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """UTM folders: 35 references of places 100 m apart, 11 queries of which the last has no right reference."""
    root = tmp_path_factory.mktemp("data")
    for i in range(35):
        place(root / f"town/database/@{500000 + 100 * i}@5400000@33@U@.png", i, 3.0, i)
    for i in range(10):
        place(root / f"town/queries/@{500005 + 300 * i}@5400000@33@U@.png", 3 * i, 6.0, 100 + i)
    place(root / "town/queries/@700000@5400000@33@U@.png", 99, 10.0, 99)
    return root / "town"


@pytest.fixture
def student(make_student: Callable[..., TetraModel]) -> TetraModel:
    return make_student().eval()


# --- settings ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"probe: neither 'folders' nor 'dataset'; name one of them"),
        ({"folders": ["a"], "dataset": "b"}, r"probe: both 'folders' and 'dataset'; name one of them"),
        ({"dataset": "b", "layout": "utn"}, r"'layout' is 'utn', expected .*'utm'"),
        ({"dataset": "b", "radius_m": -1.0}, r"'radius_m' is -1\.0, expected at least 0"),
        ({"dataset": "b", "max_queries": -1}, r"'max_queries' is -1, expected at least 0"),
        ({"dataset": "b", "workers": 0}, r"'workers' is 0, expected at least 1"),
        ({"folders": ["a"], "max_frames": 1}, r"'max_frames' is 1, expected at least 2"),
        ({"datset": "b"}, r"unknown key 'datset'; did you mean 'dataset'\?"),
    ],
)
def test_settings_that_can_not_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_dict(ProbeConfig, values, "recipe: probe")
    assert "\n" not in str(caught.value)


def test_data_sets_that_can_not_be(town: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="nowhere: no such folder"):
        Probe(ProbeConfig(dataset="nowhere"), SIZE, tmp_path)
    with pytest.raises(DatasetError, match=r"needs query/, ref/"):
        Probe(ProbeConfig(dataset="town", layout="vpr-bench"), SIZE, town.parent)
    with pytest.raises(DatasetError, match=r"none of the 11 queries has a reference within 1 m"):
        Probe(ProbeConfig(dataset="town", radius_m=1.0), SIZE, town.parent)


# --- frames of videos ---


def test_frames_are_found_beside_their_changed_neighbours(student: TetraModel, pictures: Path) -> None:
    """The figures from their definition, on all frames at once."""
    config = ProbeConfig(folders=("one", "two"), max_frames=11, seed=3)
    expected = {"backbone": [0.0, 0.0], "head": [0.0, 0.0]}
    torch.manual_seed(3)
    changed = []
    for folder in config.folders:
        frames = torch.stack([load_image(p, SIZE) for p in find_images([pictures / folder])[:11]])
        changed.append((augment(frames[1::2], AugmentConfig(), SIZE), resize(frames[0::2], SIZE)))
    for queries, references in changed:
        pooled = [pooled_tokens(student.features(x)) for x in (queries, references)]
        for name, pair in (
            ("backbone", [F.normalize(x - x.mean(0, keepdim=True), dim=1) for x in pooled]),
            ("head", [student(x) for x in (queries, references)]),
        ):
            for i, (q, r) in enumerate((pair, [torch.sign(x - 1e-30) for x in pair])):
                nearest = (q @ r.T).argmax(1).tolist()
                expected[name][i] += 50.0 * sum(n in (k, k + 1) for k, n in enumerate(nearest)) / len(q)
    probe = Probe(config, SIZE, pictures)
    for name, found in (("backbone", backbone_probe(probe, student)), ("head", head_probe(probe, student))):
        assert list(found) == ["recall_float", "recall_binary"]
        assert list(found.values()) == pytest.approx(expected[name], abs=1e-4)
    assert 0 < sum(map(sum, expected.values())) < 400  # or anything would do
    assert head_probe(probe, student) == head_probe(Probe(config, SIZE, pictures), student)


def test_the_random_state_is_left_alone(pictures: Path) -> None:
    before = torch.get_rng_state()
    Probe(ProbeConfig(folders=("one",)), SIZE, pictures)
    assert torch.equal(torch.get_rng_state(), before)


# --- data sets ---


@pytest.fixture(scope="module")
def bench(town: Path) -> Path:
    """The same places as a VPR-Bench set."""
    root, dataset = town.parent / "bench", load_dataset(town)
    for name, paths in (("query", dataset.query_paths), ("ref", dataset.database_paths)):
        (root / name).mkdir(parents=True)
        for i, path in enumerate(paths):
            (root / name / f"{i}.png").write_bytes(path.read_bytes())
    table = np.empty((len(dataset.ground_truth), 2), dtype=object)
    for i, rows in enumerate(dataset.ground_truth):
        table[i, 0], table[i, 1] = i, rows.tolist()
    np.save(root / "ground_truth_new.npy", table, allow_pickle=True)
    return root


@pytest.mark.parametrize("layout", ["auto", "utm", "vpr-bench"])
def test_recall_is_that_of_evaluate(layout: str, town: Path, bench: Path, student: TetraModel) -> None:
    folder = bench if layout == "vpr-bench" else town
    report = evaluate(student, load_dataset(folder), ks=[1, 5], progress=False)
    probe = Probe(from_dict(ProbeConfig, {"dataset": folder.name, "layout": layout}, "probe"), SIZE, town.parent)
    assert head_probe(probe, student) == {
        "recall_float": report.recall_float[1],
        "recall5_float": report.recall_float[5],
        "recall_binary": report.recall_binary[1],
        "recall5_binary": report.recall_binary[5],
    }
    assert 0 < report.recall_binary[1] < report.recall_binary[5] < 100  # or anything would do


def test_without_a_head_the_mean_is_that_of_the_whole_set(town: Path, student: TetraModel) -> None:
    dataset = load_dataset(town)
    both = []
    for paths in (dataset.query_paths, dataset.database_paths):
        images = torch.stack([load_image(p, SIZE) for p in paths])
        pooled = pooled_tokens(student.features(images)).double()
        both.append(pooled - pooled.mean(0))
    q, r = both
    cosine = F.normalize(q, dim=1) @ F.normalize(r, dim=1).T
    hamming = ((q > 0)[:, None] != (r > 0)[None]).sum(-1)
    expected = {}
    for name, order in (
        ("float", (-cosine).argsort(dim=1, stable=True)),
        ("binary", hamming.argsort(dim=1, stable=True)),
    ):
        for label, k in (("recall", 1), ("recall5", 5)):
            hits = [
                bool(set(rows[:k].tolist()) & set(right.tolist()))
                for rows, right in zip(order, dataset.ground_truth, strict=True)
                if len(right)
            ]
            expected[f"{label}_{name}"] = 100.0 * sum(hits) / len(hits)
    assert backbone_probe(Probe(ProbeConfig(dataset=str(town)), SIZE, Path()), student) == pytest.approx(expected)


def test_images_come_in_batches_and_are_read_anew(town: Path, tmp_path: Path) -> None:
    root = tmp_path / "town"
    for path in town.rglob("*.png"):
        target = root / path.relative_to(town)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    probe = Probe(ProbeConfig(dataset="town"), SIZE, tmp_path)
    seen: list[Tensor] = []

    def describe(images: Tensor) -> Tensor:
        seen.append(images)
        return F.adaptive_avg_pool2d(images.float(), (4, 4)).flatten(1) - 127.0

    assert set(probe.recall(describe)) == {"recall_float", "recall_binary", "recall5_float", "recall5_binary"}
    assert all(x.dtype == torch.uint8 and x.shape[1:] == (3, *SIZE) for x in seen)
    assert [len(x) for x in seen] == [11, BATCH, 35 - BATCH]
    assert not any(isinstance(value, Tensor) for value in vars(probe).values())
    bad = next((root / "database").iterdir())
    bad.write_bytes(b"")
    with pytest.raises(ImageError, match="is empty"):
        probe.recall(describe)


def test_a_map_of_fewer_than_five(tmp_path: Path, student: TetraModel) -> None:
    for i in range(3):
        place(tmp_path / f"database/@{100 * i}@0@.png", i, 0.0, 0)
    place(tmp_path / "queries/@1@1@.png", 0, 0.0, 0)
    figures = head_probe(Probe(ProbeConfig(dataset="."), SIZE, tmp_path), student)
    assert figures["recall5_float"] == figures["recall5_binary"] == 100.0


def test_a_part_of_a_data_set(town: Path) -> None:
    dataset = load_dataset(town)
    for limit in (0, 99):
        whole = reduced(dataset, limit, limit)
        assert (whole.query_paths, whole.database_paths) == (dataset.query_paths, dataset.database_paths)
    part = reduced(dataset, 4, 9)
    assert (part.num_queries, part.num_references) == (4, 9)
    assert [len(rows) for rows in part.ground_truth] == [1, 1, 1, 1]
    for query, rows in zip(part.query_paths, part.ground_truth, strict=True):
        right = dataset.ground_truth[dataset.query_paths.index(query)]
        assert [part.database_paths[i] for i in rows] == [dataset.database_paths[i] for i in right]
    # Evenly spread, in the order of the whole, and the same every time.
    assert [dataset.query_paths.index(p) for p in part.query_paths] == [0, 3, 6, 9]
    references = [dataset.database_paths.index(p) for p in part.database_paths]
    assert references == sorted(references)
    assert min(references) < 5
    assert max(references) > 30
    assert reduced(dataset, 4, 9).database_paths == part.database_paths
    with pytest.raises(ConfigError, match=r"'max_references' is 3, but the 4 queries of town have 4 right references;"):
        reduced(dataset, 4, 3)


# --- several processes ---


def _together(rank: int, world: int, store: Path, model_file: Path, base: Path, dataset: str) -> dict[str, Any]:
    """One of ``world`` processes: figures and descriptors."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        return _figures(load_trainable(model_file).eval(), base, dataset)
    finally:
        dist.destroy_process_group()


def _figures(model: TetraModel, base: Path, dataset: str) -> dict[str, Any]:
    labelled = Probe(ProbeConfig(dataset=dataset), SIZE, base)
    frames = Probe(ProbeConfig(folders=(f"{dataset}/database",), max_frames=15), SIZE, base)
    paths = load_dataset(base / dataset).database_paths
    described: list[np.ndarray[Any, Any]] = []
    with torch.inference_mode():
        for centre in (False, True):
            describe = in_batches(lambda x: pooled_tokens(model.features(x)), torch.device("cpu"))
            described.append(labelled._describe_files(paths, describe, centre).numpy())
    return {
        "part": own_part(35),
        "descriptors": described,
        "figures": [probe(images, model) for images in (labelled, frames) for probe in (backbone_probe, head_probe)],
    }


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    if not dist.is_gloo_available() or "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("no processes that share this one's imports, or no gloo to join them")
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork"), torch.set_num_threads, (1,)) as pool:
        yield pool


@pytest.mark.parametrize("world", [3, 2])
def test_several_processes_find_what_one_does(
    world: int, processes: ProcessPoolExecutor, town: Path, student: TetraModel, tmp_path: Path
) -> None:
    model_file = tmp_path / "student.safetensors"
    save(student, model_file)
    alone = _figures(student, town.parent, town.name)
    arguments = (world, tmp_path / "store", model_file, town.parent, town.name)
    tasks = [processes.submit(_together, rank, *arguments) for rank in range(world)]
    results = [task.result(timeout=300) for task in tasks]
    parts = [result["part"] for result in results]
    assert {len(each) for each in parts} == {-(-35 // world)}
    assert [i for each in parts for i in each][:35] == alone["part"] == list(range(35))
    for result in results:
        for found, expected in zip(result["descriptors"], alone["descriptors"], strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        assert result["figures"] == alone["figures"]
    assert any(0 < value < 100 for figures in alone["figures"] for value in figures.values())
